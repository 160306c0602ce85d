#include "replay.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/operator.h>

namespace tle {

using torch::jit::Node;
using torch::jit::Stack;
using torch::jit::Value;

namespace {

torch::jit::Operation operation_of(const Node* n) {
  const size_t count = n->inputs().size();
  if (n->kind() == c10::prim::ListConstruct) {
    const c10::TypePtr type = n->output()->type()->expectRef<c10::ListType>().getElementType();
    return [type, count](Stack& stack) {
      c10::impl::GenericList list(type);
      list.reserve(count);
      for (const c10::IValue& v : torch::jit::last(stack, count)) {
        list.push_back(v);
      }
      torch::jit::drop(stack, count);
      stack.emplace_back(std::move(list));
    };
  }
  if (n->kind() == c10::prim::ListUnpack) {
    return [](Stack& stack) {
      const c10::List<c10::IValue> list = torch::jit::pop(stack).toList();
      for (const c10::IValue& v : list.vec()) {
        stack.push_back(v);
      }
    };
  }
  return n->getOperation();
}

} // namespace

Program::Program(std::shared_ptr<torch::jit::Graph> graph) : graph_(std::move(graph)) {
  std::unordered_map<const Value*, int32_t> place;
  for (const Value* v : graph_->inputs()) {
    place[v] = num_registers_++;
  }
  num_inputs_ = num_registers_;
  auto operand = [&](const Value* v) { return Operand{place.at(v), false}; };
  for (const Node* n : graph_->nodes()) {
    TORCH_CHECK(n->blocks().empty(), "a graph with control flow: ", n->kind().toQualString());
    if (n->kind() == c10::prim::Constant) {
      place[n->output()] = ~static_cast<int32_t>(constants_.size());
      constants_.push_back(*torch::jit::toIValue(n->output()));
      continue;
    }
    Instruction instruction{std::nullopt, operation_of(n), {}, {}};
    if (const c10::FunctionSchema* schema = n->maybeSchema()) {
      instruction.op = c10::Dispatcher::singleton().findOp(schema->operator_name());
    }
    for (const Value* v : n->inputs()) {
      instruction.inputs.push_back(operand(v));
    }
    for (const Value* v : n->outputs()) {
      place[v] = v->hasUses() ? num_registers_++ : -1;
      instruction.outputs.push_back(place[v]);
    }
    instructions_.push_back(std::move(instruction));
  }
  for (const Value* v : graph_->outputs()) {
    outputs_.push_back(operand(v));
  }
  // From the end: the first reader met is the last one.
  std::vector<bool> read(num_registers_, false);
  auto mark = [&](std::vector<Operand>& operands) {
    for (auto o = operands.rbegin(); o != operands.rend(); ++o) {
      if (o->index >= 0 && !read[o->index]) {
        o->last = read[o->index] = true;
      }
    }
  };
  mark(outputs_);
  for (auto i = instructions_.rbegin(); i != instructions_.rend(); ++i) {
    mark(i->inputs);
  }
}

void Program::run(Stack& stack) const {
  // As eager runs under no_grad, without autograd's kernels, which would do nothing. Those
  // above the kernels proper stay: a view shares the version counter of its base.
  c10::AutoGradMode no_grad(false);
  at::AutoDispatchBelowAutograd below;
  TORCH_CHECK(
      static_cast<int32_t>(stack.size()) == num_inputs_,
      "the graph has ", num_inputs_, " inputs, and was given ", stack.size());
  std::vector<c10::IValue> registers = std::move(stack);
  registers.resize(num_registers_);
  stack.clear();
  auto push = [&](const std::vector<Operand>& operands) {
    for (const Operand& o : operands) {
      if (o.index < 0) {
        stack.push_back(constants_[~o.index]);
      } else if (o.last) {
        stack.push_back(std::move(registers[o.index]));
      } else {
        stack.push_back(registers[o.index]);
      }
    }
  };
  for (const Instruction& i : instructions_) {
    push(i.inputs);
    if (i.op) {
      i.op->callBoxed(&stack);
    } else {
      i.operation(stack);
    }
    for (size_t k = i.outputs.size(); k-- > 0;) {
      if (i.outputs[k] >= 0) {
        registers[i.outputs[k]] = std::move(stack[k]);
      }
    }
    stack.clear();
  }
  push(outputs_);
}

} // namespace tle
