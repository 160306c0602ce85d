// Stage "lower": the recorded nodes, in program order, as a torch::jit::Graph.
#include "lower.h"

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/csrc/lazy/ts_backend/ts_lowering_context.h>

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

} // namespace

torch::lazy::TSOpVector GenericNode::Lower(
    std::shared_ptr<torch::jit::GraphFunction> function,
    torch::lazy::TSLoweringContext* loctx) const {
  auto graph = loctx->graph();
  if (kind == NodeKind::Input) {
    Value* v = graph->addInput();
    v->setType(type_of(metas[0]));
    return {v};
  }
  const c10::FunctionSchema& schema = handle->schema();
  std::vector<Value*> inputs;
  inputs.reserve(arguments.size());
  size_t operand_index = 0;
  auto next_operand = [&]() { return loctx->GetOutputOp(operand(operand_index++)); };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const Argument& a = arguments[i];
    switch (a.kind) {
      case ArgKind::Tensor:
        inputs.push_back(next_operand());
        break;
      case ArgKind::TensorList: {
        std::vector<Value*> elements;
        Value* none = nullptr;
        for (const ValueRef& v : a.values) {
          if (v.node >= 0) {
            elements.push_back(next_operand());
            continue;
          }
          if (none == nullptr) {
            none = graph->insertConstant(c10::IValue());
          }
          elements.push_back(none);
        }
        c10::TypePtr element_type = c10::TensorType::get();
        if (a.optional_elements) {
          element_type = c10::OptionalType::ofTensor();
        }
        inputs.push_back(graph->insertNode(graph->createList(element_type, elements))->output());
        break;
      }
      case ArgKind::Constant: {
        const c10::IValue& c = constants[i];
        if (c.isTensor() && !c.toTensor().defined()) {
          inputs.push_back(graph->insertConstant(c10::IValue()));
        } else {
          inputs.push_back(graph->insertConstant(c));
        }
        break;
      }
    }
  }
  torch::jit::Node* n = graph->create(
      c10::Symbol::fromQualString(schema.name()), inputs, schema.returns().size());
  graph->insertNode(n);
  n->setSourceRange(source_range);
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    n->output(i)->setType(
        list_lengths[i] < 0 ? c10::TypePtr(c10::TensorType::get())
                            : c10::TypePtr(c10::ListType::ofTensors()));
  }
  const torch::jit::Operator* found = n->maybeOperator();
  TORCH_CHECK(
      found != nullptr && found->schema().operator_name() == schema.operator_name(),
      "TorchScript resolves ",
      schema.operator_name(),
      " to ",
      found == nullptr ? std::string("no operator") : c10::toString(found->schema().operator_name()));
  torch::lazy::TSOpVector outputs;
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    if (list_lengths[i] < 0) {
      outputs.push_back(n->output(i));
      continue;
    }
    torch::jit::Node* unpack =
        graph->insertNode(graph->createListUnpack(n->output(i), list_lengths[i]));
    for (Value* v : unpack->outputs()) {
      outputs.push_back(v);
    }
  }
  for (size_t i = 0; i < metas.size(); ++i) {
    outputs[i]->setType(type_of(metas[i]));
  }
  if (outputs.empty()) {
    // An operator without tensor outputs: keep LTC's "one output at least".
    outputs.push_back(graph->insertConstant(c10::IValue()));
  }
  return outputs;
}

Lowered lower(Recorder& recorder, const std::vector<ValueRef>& roots) {
  const int64_t count = static_cast<int64_t>(recorder.nodes.size());
  std::vector<char> live(count, 0);
  for (const ValueRef& r : roots) {
    live[r.node] = 1;
  }
  for (int64_t i = count - 1; i >= 0; --i) {
    GenericNode& n = recorder.node(i);
    // A random node moves the generator even when nobody uses its numbers.
    if (n.random) {
      live[i] = 1;
    }
    if (live[i] == 0) {
      continue;
    }
    for (const Argument& a : n.arguments) {
      for (const ValueRef& v : a.values) {
        if (v.node >= 0) {
          live[v.node] = 1;
        }
      }
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
  for (int64_t i = 0; i < count; ++i) {
    if (live[i] == 0 || recorder.node(i).kind == NodeKind::Input) {
      continue;
    }
    GenericNode& n = recorder.node(i);
    n.source_range = recorder.source_range(n.source);
    context.Lower(&n);
  }
  result.graph = context.graph();
  for (const ValueRef& r : roots) {
    result.graph->registerOutput(context.GetOutputOp(
        torch::lazy::Output(&recorder.node(r.node), static_cast<size_t>(r.index))));
  }
  return result;
}

} // namespace tle
