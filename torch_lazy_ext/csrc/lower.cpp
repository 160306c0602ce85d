#include "lower.h"

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/csrc/lazy/ts_backend/ts_lowering_context.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <unordered_set>

namespace tle {

using torch::jit::Graph;
using torch::jit::Value;

namespace {

// What a variant's guards promise about a value, for texts and passes.
c10::TypePtr type_of(const TensorMeta& m) {
  return c10::TensorType::create(
      m.dtype,
      m.device,
      c10::VaryingShape<int64_t>(m.sizes),
      c10::VaryingShape<int64_t>(m.strides),
      std::nullopt);
}

// Calls `visit` with the nodes that `v` shares its memory with, down to the one that owns it.
template <class F>
void visit_owners(Recorder& recorder, ValueRef v, F&& visit) {
  bool view = true;
  while (view) {
    visit(v.node);
    const GenericNode& n = recorder.node(v.node);
    view = false;
    for (size_t i = 0; n.call && i < n.call->arguments.size() && !view; ++i) {
      const Argument& a = n.call->arguments[i];
      if (a.kind == ArgKind::Tensor && is_viewed(n.call->op.schema(), i)) {
        v = a.values[0];
        view = true;
      }
    }
  }
}

c10::Symbol attr_default_dtype() {
  return c10::Symbol::attr("default_dtype");
}

// Runs the operator that a node of kind "torch_lazy_ext::aten.view.dtype" stands for.
torch::jit::Operation boxed_operation(const torch::jit::Node* node) {
  std::string name = node->kind().toUnqualString();
  name.replace(name.find('.'), 1, "::");
  const size_t dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.substr(0, dot).c_str(), overload.c_str());
  std::optional<at::ScalarType> default_dtype;
  if (node->hasAttribute(attr_default_dtype())) {
    default_dtype = static_cast<at::ScalarType>(node->i(attr_default_dtype()));
  }
  const bool grad_mode = node->hasAttribute(c10::Symbol::attr("grad_mode"));
  return [op, grad_mode, default_dtype](torch::jit::Stack& stack) {
    DefaultDtypeGuard guard(default_dtype);
    call_operator(op, grad_mode, stack);
  };
}

// The kind of a node that calls `op` whatever TorchScript thinks of its arguments' types.
c10::Symbol boxed_operator(const c10::OperatorHandle& op) {
  static std::mutex mutex;
  static auto* known = new std::unordered_set<std::string>();
  const c10::FunctionSchema& schema = op.schema();
  std::string name = schema.name();
  name.replace(name.find("::"), 2, ".");
  name = "torch_lazy_ext::" + name;
  if (!schema.overload_name().empty()) {
    name += "." + schema.overload_name();
  }
  const c10::Symbol kind = c10::Symbol::fromQualString(name);
  std::lock_guard<std::mutex> lock(mutex);
  if (known->insert(name).second) {
    torch::jit::registerOperator(
        torch::jit::Operator(kind, &boxed_operation, c10::AliasAnalysisKind::CONSERVATIVE));
  }
  return kind;
}

class Lowering {
 public:
  Lowering(
      const GenericNode& node,
      const std::shared_ptr<Graph>& graph,
      torch::lazy::TSLoweringContext& context)
      : call_(*node.call), node_(node), graph_(graph), context_(context) {}

  torch::lazy::TSOpVector run() {
    for (size_t i : call_.mutated) {
      for (const ValueRef& v : call_.arguments[i].values) {
        copies_.emplace_back(v, nullptr);
      }
    }
    std::vector<Value*> inputs;
    for (size_t i = 0; i < call_.arguments.size(); ++i) {
      inputs.push_back(argument(i));
    }
    std::vector<Value*> written;
    for (size_t i : call_.mutated) {
      written.push_back(inputs[i]);
    }
    torch::jit::Node* n = create(inputs);
    torch::lazy::TSOpVector outputs;
    size_t result = 0;
    auto add = [&](Value* v) {
      const int64_t length = node_.list_lengths[result++];
      if (length == -1) {
        v->setType(c10::TensorType::get());
        outputs.push_back(v);
      } else if (length >= 0) {
        v->setType(c10::ListType::ofTensors());
        torch::jit::Node* unpack = graph_->insertNode(graph_->createListUnpack(v, length));
        for (Value* element : unpack->outputs()) {
          outputs.push_back(element);
        }
      } else {
        v->setType(call_.op.schema().returns()[result - 1].type());
      }
    };
    for (Value* v : n->outputs()) {
      add(v);
    }
    for (Value* v : written) {
      add(v);
    }
    for (size_t i = 0; i < node_.metas.size(); ++i) {
      if (node_.metas[i].defined) {
        outputs[i]->setType(type_of(node_.metas[i]));
      }
    }
    if (outputs.empty()) {
      outputs.push_back(graph_->insertConstant(c10::IValue())); // LTC wants one
    }
    return outputs;
  }

 private:
  Value* argument(size_t i) {
    const Argument& a = call_.arguments[i];
    if (a.kind == ArgKind::Constant) {
      const bool undefined = a.constant.isTensor() && !a.constant.toTensor().defined();
      return graph_->insertConstant(undefined ? c10::IValue() : a.constant);
    }
    if (a.kind == ArgKind::Tensor) {
      return operand(a.values[0]);
    }
    if (a.kind == ArgKind::Number) {
      return number(a.values[0]);
    }
    if (a.kind == ArgKind::WrappedNumber) {
      return graph_->insert(
          c10::Symbol::fromQualString("torch_lazy_ext::wrapped_number"), {number(a.values[0])});
    }
    std::vector<Value*> elements;
    if (a.kind == ArgKind::NumberList) {
      for (size_t k = 0; k < a.values.size(); ++k) {
        elements.push_back(
            a.values[k].node >= 0 ? number(a.values[k])
                                  : graph_->insertConstant(a.constant.toListRef()[k]));
      }
      return graph_->insertNode(graph_->createList(c10::NumberType::get(), elements))->output();
    }
    for (const ValueRef& v : a.values) {
      elements.push_back(v.node >= 0 ? operand(v) : graph_->insertConstant(c10::IValue()));
    }
    const c10::TypePtr type = a.kind == ArgKind::OptionalTensorList
        ? c10::TypePtr(c10::OptionalType::ofTensor())
        : c10::TypePtr(c10::TensorType::get());
    return graph_->insertNode(graph_->createList(type, elements))->output();
  }

  // What the operator writes to, it gets as a copy: one of each value, which may come as
  // several arguments.
  Value* operand(const ValueRef& v) {
    const torch::lazy::Output& output = node_.operand(next_operand_++);
    Value* value = context_.GetOutputOp(output);
    for (auto& [of, copy] : copies_) {
      if (of == v) {
        if (copy == nullptr) {
          copy = strided_copy(value, *static_cast<const GenericNode*>(output.node), output.index);
        }
        return copy;
      }
    }
    return value;
  }

  Value* strided_copy(Value* value, const GenericNode& source, size_t index) {
    const TensorMeta& meta = source.metas[index];
    if (meta.make_meta_tensor().is_non_overlapping_and_dense()) {
      return graph_->insert(c10::aten::clone, {value});
    }
    // A clone has no gaps.
    Value* empty = graph_->insert(c10::aten::new_empty_strided, {value, meta.sizes, meta.strides});
    return graph_->insert(c10::aten::copy_, {empty, value});
  }

  Value* number(const ValueRef& v) { return graph_->insert(c10::aten::Float, {operand(v)}); }

  // TorchScript finds the overload by the types of the inputs. Where that leads it astray
  // (None fits several overloads, a bool is no number to it), the node calls the operator
  // directly.
  torch::jit::Node* create(const std::vector<Value*>& inputs) {
    const c10::FunctionSchema& schema = call_.op.schema();
    torch::jit::Node* n =
        graph_->create(c10::Symbol::fromQualString(schema.name()), inputs, schema.returns().size());
    graph_->insertNode(n);
    n->setSourceRange(node_.source_range);
    auto resolved = [&] {
      const torch::jit::Operator* found = n->maybeOperator();
      return found != nullptr && found->schema().operator_name() == schema.operator_name();
    };
    // The executor's passes know which of PyTorch's own operators are random.
    const bool ordered = call_.random && schema.name().compare(0, 6, "aten::") != 0;
    if (!ordered && !call_.grad_mode && !call_.default_dtype && resolved()) {
      return n;
    }
    torch::jit::Node* boxed =
        graph_->create(boxed_operator(call_.op), inputs, schema.returns().size());
    boxed->insertBefore(n);
    n->destroy();
    if (call_.grad_mode) {
      boxed->i_(c10::Symbol::attr("grad_mode"), 1);
    }
    boxed->setSourceRange(node_.source_range);
    if (call_.default_dtype) {
      boxed->i_(attr_default_dtype(), static_cast<int64_t>(*call_.default_dtype));
    }
    boxed->getOperator(); // raises when TorchScript does not find it
    return boxed;
  }

  const OperatorCall& call_;
  const GenericNode& node_;
  const std::shared_ptr<Graph>& graph_;
  torch::lazy::TSLoweringContext& context_;
  size_t next_operand_ = 0;
  std::vector<std::pair<ValueRef, Value*>> copies_;
};

} // namespace

bool rounds_otherwise_in_place(const torch::jit::Node* node) {
  if (node->kind() != c10::aten::mul ||
      node->input(1)->type()->isSubtypeOf(*c10::TensorType::get())) {
    return false;
  }
  const auto type = node->input(0)->type()->cast<c10::TensorType>();
  if (type && type->scalarType() && !at::isReducedFloatingType(*type->scalarType())) {
    return false;
  }
  const std::optional<c10::IValue> number = torch::jit::toIValue(node->input(1));
  if (!type || !type->scalarType() || !number || !number->isScalar()) {
    return true;
  }
  const at::Scalar given = number->toScalar();
  const at::Scalar taken = multiplier_in_place(given, *type->scalarType());
  return !given.isComplex() && given.toDouble() != taken.toDouble();
}

bool is_viewed(const c10::FunctionSchema& schema, size_t argument) {
  // Their schemas do not say that the result shares the argument's memory.
  static const std::unordered_set<std::string> unannotated = {
      "aten::_unsafe_view",
      "aten::unsafe_chunk",
      "aten::unsafe_split",
      "aten::unsafe_split_with_sizes"};
  const c10::AliasInfo* alias = schema.arguments()[argument].alias_info();
  return alias != nullptr ? !alias->isWrite()
                          : argument == 0 && unannotated.count(schema.name()) != 0;
}

bool makes_views(const c10::FunctionSchema& schema) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    if (is_viewed(schema, i)) {
      return true;
    }
  }
  return false;
}

torch::lazy::TSOpVector GenericNode::Lower(
    std::shared_ptr<torch::jit::GraphFunction> function,
    torch::lazy::TSLoweringContext* context) const {
  auto graph = context->graph();
  if (kind == NodeKind::Input) {
    Value* v = graph->addInput();
    v->setType(type_of(metas[0]));
    return {v};
  }
  return Lowering(*this, graph, *context).run();
}

Lowered lower(
    Recorder& recorder,
    const std::vector<ValueRef>& roots,
    size_t num_exposed,
    int64_t begin,
    int64_t end,
    const std::vector<ValueRef>& boundary,
    bool random,
    bool collectives) {
  const int64_t count = static_cast<int64_t>(recorder.nodes.size());
  std::set<std::pair<int64_t, int64_t>> boundary_set;
  for (const ValueRef& v : boundary) {
    boundary_set.emplace(v.node, v.index);
  }
  auto at_boundary = [&](const ValueRef& v) { return boundary_set.count({v.node, v.index}) != 0; };
  auto lowered_here = [&](int64_t i) { return i >= begin && i < end; };
  std::vector<char> live(count, 0);
  std::vector<char> exposed(count, 0);
  for (size_t i = 0; i < roots.size(); ++i) {
    if (!at_boundary(roots[i])) {
      live[roots[i].node] = 1;
    }
    if (i < num_exposed) {
      visit_owners(recorder, roots[i], [&](int64_t node) { exposed[node] = 1; });
    }
  }
  for (int64_t i = count - 1; i >= 0; --i) {
    GenericNode& n = recorder.node(i);
    // A random node moves the generator even when nobody uses its numbers, and a collective
    // has other processes wait for it.
    const bool draws = random && n.random() && !n.call->reads_generator;
    if ((draws || (collectives && n.collective())) && lowered_here(i)) {
      live[i] = 1;
    }
    if (live[i] != 0 && n.call) {
      n.call->for_each_value([&](const ValueRef& v) {
        if (!at_boundary(v)) {
          live[v.node] = 1;
        }
      });
    }
  }
  torch::lazy::TSLoweringContext context(
      "torch_lazy_ext",
      torch::lazy::BackendDevice(std::make_shared<torch::lazy::BackendDeviceType>(), 0));
  Lowered result;
  // Inputs first, so that they are the graph's parameters in the order of lifting.
  for (int64_t i = 0; i < count; ++i) {
    if (live[i] != 0 && recorder.node(i).kind == NodeKind::Input) {
      context.Lower(&recorder.node(i));
      result.parameters.push_back(recorder.node(i).input_index);
    }
  }
  result.graph = context.graph();
  auto output_of = [&](const ValueRef& v) {
    return torch::lazy::Output(&recorder.node(v.node), static_cast<size_t>(v.index));
  };
  for (const ValueRef& v : boundary) {
    Value* input = result.graph->addInput();
    input->setType(type_of(recorder.meta_of(v)));
    context.AssignOutputOp(output_of(v), input);
  }
  std::unordered_map<torch::lazy::hash_t, int64_t, torch::lazy::HashReducer> known;
  for (int64_t i = 0; i < count; ++i) {
    GenericNode& n = recorder.node(i);
    if (live[i] == 0 || n.kind == NodeKind::Input) {
      continue;
    }
    TORCH_INTERNAL_ASSERT(lowered_here(i), "a value that is neither lowered nor given");
    auto [same, fresh] = known.try_emplace(n.hash(), i);
    if (!fresh && exposed[i] == 0) {
      for (size_t k = 0; k < n.num_outputs(); ++k) {
        context.AssignOutputOp(
            torch::lazy::Output(&n, k),
            context.GetOutputOp(torch::lazy::Output(&recorder.node(same->second), k)));
      }
      continue;
    }
    n.source_range = recorder.source_range(n.call->source);
    context.Lower(&n);
  }
  for (const ValueRef& r : roots) {
    result.graph->registerOutput(context.GetOutputOp(output_of(r)));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (live[i] != 0 && recorder.node(i).pinned()) {
      // The executor drops what nobody uses: an output keeps it.
      Value* v = context.GetOutputOp(torch::lazy::Output(&recorder.node(i), 0));
      if (!v->hasUses()) {
        result.graph->registerOutput(v);
      }
    }
  }
  return result;
}

} // namespace tle
