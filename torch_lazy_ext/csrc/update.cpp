#include "update.h"

#include "lower.h"

#include <torch/csrc/jit/runtime/operator.h>

#include <algorithm>
#include <functional>
#include <unordered_set>

namespace tle {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Use;
using torch::jit::Value;

namespace {

bool is_elementwise(const OperatorCall& call) {
  static const std::unordered_set<std::string> copies = {
      "aten::clone", "aten::copy", "aten::_to_copy"};
  const std::string& name = call.op.schema().name();
  return call.op.hasTag(at::Tag::pointwise) || makes_views(call.op.schema()) ||
      name.rfind("aten::_foreach_", 0) == 0 || name.rfind("aten::_fused_", 0) == 0 ||
      copies.count(name) != 0;
}

// The operator that does the same in place, for a node that gives one new tensor.
const torch::jit::Operator* in_place_variant(const Node* node) {
  const c10::FunctionSchema* schema = node->maybeSchema();
  if (schema == nullptr || node->inputs().empty() || node->outputs().size() != 1 ||
      schema->is_mutable() || makes_views(*schema) || rounds_otherwise_in_place(node)) {
    return nullptr;
  }
  const c10::Symbol kind = c10::Symbol::fromQualString(schema->name() + "_");
  for (const auto& candidate : torch::jit::getAllOperatorsFor(kind)) {
    const c10::FunctionSchema& other = candidate->schema();
    if (other.overload_name() == schema->overload_name() &&
        other.arguments().size() == schema->arguments().size() &&
        other.is_mutable({c10::SchemaArgType::input, 0})) {
      return candidate.get();
    }
  }
  return nullptr;
}

bool same_layout(const Value* a, const Value* b) {
  const auto s = a->type()->cast<c10::TensorType>();
  const auto t = b->type()->cast<c10::TensorType>();
  return s && t && s->scalarType() == t->scalarType() && s->sizes() == t->sizes() &&
      s->sizes().isComplete();
}

// Whether `node` is the last one to look at what `value` holds.
bool reads_last(const Node* node, const Value* value) {
  return std::all_of(value->uses().begin(), value->uses().end(), [&](const Use& use) {
    if (use.user == node) {
      return true;
    }
    const c10::FunctionSchema* schema = use.user->maybeSchema();
    return schema != nullptr && !makes_views(*schema) && use.user->isBefore(node);
  });
}

// The nodes from `target` to `value`, if each can do its work in place of its first input.
std::vector<Node*> chain_to(const Value* target, Value* value) {
  std::vector<Node*> chain;
  while (value != target) {
    Node* node = value->node();
    if (node->kind() == torch::jit::prim::Param || in_place_variant(node) == nullptr ||
        !same_layout(node->input(0), value) || !reads_last(node, node->input(0))) {
      return {};
    }
    chain.push_back(node);
    value = node->input(0);
  }
  return chain;
}

void replace_in_place(Graph& graph, Node* node) {
  Node* now = graph.create(
      c10::Symbol::fromQualString(std::string(node->kind().toQualString()) + "_"), node->inputs());
  now->insertBefore(node);
  now->setSourceRange(node->sourceRange());
  now->output()->setType(node->output()->type());
  node->output()->replaceAllUsesWith(now->output());
  node->destroy();
}

// A kernel without a functional variant works on a copy; here it can have the tensor itself.
bool drop_copy(Value* target, Value* value) {
  Node* copy = value->node();
  if (copy->kind() != c10::aten::clone || copy->input(0) != target || target->uses().size() != 1) {
    return false;
  }
  value->replaceAllUsesWith(target);
  copy->destroy();
  return true;
}

// The elements of a list in the place of what is unpacked from it.
void forward_lists(Graph& graph) {
  std::vector<Node*> dead;
  for (Node* node : graph.nodes()) {
    Node* list = node->kind() == torch::jit::prim::ListUnpack ? node->input()->node() : nullptr;
    if (list != nullptr && list->kind() == torch::jit::prim::ListConstruct &&
        list->inputs().size() == node->outputs().size()) {
      for (size_t i = 0; i < node->outputs().size(); ++i) {
        node->outputs()[i]->replaceAllUsesWith(list->inputs()[i]);
      }
      dead.push_back(node);
    }
  }
  for (Node* node : dead) {
    Node* list = node->input()->node();
    node->destroy();
    if (!list->output()->hasUses()) {
      list->destroy();
    }
  }
}

void copy_when_unread(Graph& graph, Value* target, Value* value) {
  Node* last = value->node();
  auto later = [&](Node* node) {
    if (node->kind() != torch::jit::prim::Return && last->isBefore(node)) {
      last = node;
    }
  };
  // What reads it through a view or a list reads it as well. The new value, too, may change
  // until its last use, when it is the copy that a kernel works on.
  std::vector<Value*> aliases = {target, value};
  for (size_t i = 0; i < aliases.size(); ++i) {
    for (const Use& use : aliases[i]->uses()) {
      later(use.user);
      const c10::FunctionSchema* schema = use.user->maybeSchema();
      if (schema == nullptr || makes_views(*schema)) {
        aliases.insert(aliases.end(), use.user->outputs().begin(), use.user->outputs().end());
      }
    }
  }
  Node* copy;
  {
    torch::jit::WithInsertPoint at(last->next());
    copy = graph.insert(c10::aten::copy_, {target, value})->node();
  }
  copy->output()->setType(target->type());
  for (size_t k = 0; k < graph.outputs().size(); ++k) {
    if (graph.outputs()[k] == value) {
      graph.return_node()->replaceInput(k, copy->output());
    }
  }
}

} // namespace

std::vector<ValueRef> update_boundary(
    Recorder& recorder,
    const std::vector<ValueRef>& kept,
    const std::vector<ValueRef>& written) {
  const int64_t count = static_cast<int64_t>(recorder.nodes.size());
  std::vector<char> first(count, 0), second(count, 0);
  for (const ValueRef& v : kept) {
    first[v.node] = 1;
  }
  for (const ValueRef& v : written) {
    second[v.node] = 1;
  }
  for (int64_t i = count - 1; i >= 0; --i) {
    GenericNode& n = recorder.node(i);
    if (!n.call) {
      continue;
    }
    if (n.pinned() || (second[i] != 0 && !is_elementwise(*n.call))) {
      first[i] = 1;
    }
    if (first[i] != 0) {
      n.call->for_each_value([&](const ValueRef& v) { first[v.node] = 1; });
    } else if (second[i] != 0) {
      n.call->for_each_value([&](const ValueRef& v) { second[v.node] = 1; });
    }
  }
  std::vector<ValueRef> boundary;
  std::function<void(const ValueRef&)> read = [&](const ValueRef& v) {
    const auto& call = recorder.node(v.node).call;
    if (first[v.node] == 0 || !call) {
      return;
    }
    if (makes_views(call->op.schema())) {
      // Made anew, so that nothing from outside shares the memory that is written to.
      call->for_each_value(read);
    } else if (std::find(boundary.begin(), boundary.end(), v) == boundary.end()) {
      boundary.push_back(v);
    }
  };
  for (const ValueRef& v : written) {
    read(v);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (first[i] == 0 && second[i] != 0 && recorder.node(i).call) {
      recorder.node(i).call->for_each_value(read);
    }
  }
  return boundary;
}

void write_in_place(Graph& graph, const std::vector<int64_t>& targets) {
  forward_lists(graph);
  for (size_t k = 0; k < targets.size(); ++k) {
    Value* target = graph.inputs()[targets[k]];
    Value* value = graph.outputs()[k];
    const std::vector<Node*> chain = chain_to(target, value);
    if (!chain.empty()) {
      for (Node* node : chain) {
        replace_in_place(graph, node);
      }
    } else if (!drop_copy(target, value)) {
      copy_when_unread(graph, target, value);
    }
  }
  graph.lint();
}

} // namespace tle
