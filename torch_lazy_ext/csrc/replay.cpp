#include "replay.h"

#include "lower.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
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

bool same_layout(const Value* a, const Value* b) {
  const auto x = a->type()->cast<c10::TensorType>();
  const auto y = b->type()->cast<c10::TensorType>();
  return x && y && x->scalarType().has_value() && x->scalarType() == y->scalarType() &&
      x->sizes().concrete_sizes().has_value() &&
      x->sizes().concrete_sizes() == y->sizes().concrete_sizes() &&
      x->strides().concrete_sizes().has_value() &&
      x->strides().concrete_sizes() == y->strides().concrete_sizes();
}

// `add_` for `add`, where the result fits in the place of the first operand. Only of pointwise
// operators, whose in-place variants compute what they do, but for one.
std::optional<c10::OperatorHandle> in_place_overload(const Node* n, const c10::OperatorHandle& op) {
  if (!op.hasTag(at::Tag::pointwise) || op.hasTag(at::Tag::nondeterministic_seeded) ||
      n->inputs().empty() || n->outputs().size() != 1 || !same_layout(n->input(0), n->output(0)) ||
      rounds_otherwise_in_place(n)) {
    return std::nullopt;
  }
  const c10::FunctionSchema& schema = op.schema();
  const auto found =
      c10::Dispatcher::singleton().findOp({schema.name() + "_", schema.overload_name()});
  if (!found || found->schema().arguments().size() != schema.arguments().size()) {
    return std::nullopt;
  }
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::Argument& argument = found->schema().arguments()[i];
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (written != (i == 0) || *argument.type() != *schema.arguments()[i].type()) {
      return std::nullopt;
    }
  }
  return found;
}

// Whether `n` normalizes with statistics that it only reads, and nothing but the normalized tensor
// is read: each element is then a function of the same element.
bool is_inference_batch_norm(const Node* n) {
  if (n->kind() != c10::aten::native_batch_norm || n->output(1)->hasUses() ||
      n->output(2)->hasUses() || !same_layout(n->input(0), n->output(0))) {
    return false;
  }
  const std::optional<c10::IValue> training = torch::jit::toIValue(n->namedInput("training"));
  return training && training->isBool() && !training->toBool();
}

void batch_norm_in_place(Stack& stack) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::native_batch_norm", "out");
  const at::Tensor input = stack[0].toTensor();
  stack.emplace_back(input);
  for (int i = 0; i < 2; ++i) {
    stack.emplace_back(at::empty({0}, input.options()));
  }
  op.callBoxed(&stack);
}

std::function<void(Stack&)> in_place_variant(const Node* n, const c10::OperatorHandle& op) {
  if (is_inference_batch_norm(n)) {
    return batch_norm_in_place;
  }
  if (const auto found = in_place_overload(n, op)) {
    return [op = *found](Stack& stack) { op.callBoxed(&stack); };
  }
  return nullptr;
}

// The kernel of a contiguous input goes through each window number by number, and guesses each
// comparison. That of channels_last compares whole vectors of channels, in the same order: it is 2
// to 8 times as fast, with both copies counted.
bool is_max_pool_of_many_channels(const Node* n) {
  constexpr int64_t few_channels = 8, few_elements = 4096;
  if (n->kind() != c10::aten::max_pool2d_with_indices || n->output(1)->hasUses()) {
    return false;
  }
  const auto type = n->input(0)->type()->cast<c10::TensorType>();
  const auto sizes = type ? type->sizes().concrete_sizes() : std::nullopt;
  const auto strides = type ? type->strides().concrete_sizes() : std::nullopt;
  return sizes && strides && sizes->size() == 4 && (*sizes)[1] >= few_channels &&
      c10::multiply_integers(*sizes) >= few_elements &&
      *strides ==
      std::vector<int64_t>{
          (*sizes)[1] * (*sizes)[2] * (*sizes)[3], (*sizes)[2] * (*sizes)[3], (*sizes)[3], 1} &&
      (type->scalarType() == at::kFloat || type->scalarType() == at::kDouble);
}

void max_pool_over_channels(const c10::OperatorHandle& op, Stack& stack) {
  if (!stack[0].toTensor().is_cpu()) {
    op.callBoxed(&stack);
    return;
  }
  stack[0] = std::move(stack[0]).toTensor().contiguous(at::MemoryFormat::ChannelsLast);
  op.callBoxed(&stack);
  stack[0] = std::move(stack[0]).toTensor().contiguous();
}

// A comparison with a number makes a tensor of the number and casts it to the other operand's
// dtype, on each call. Of a constant both are done once, here.
struct Comparison {
  c10::OperatorHandle op;
  at::Tensor other;
};

std::optional<Comparison> with_constant_tensor(const Node* n, const c10::OperatorHandle& op) {
  static const std::unordered_set<std::string> comparisons = {
      "aten::eq", "aten::ne", "aten::lt", "aten::le", "aten::gt", "aten::ge"};
  if (op.operator_name().overload_name != "Scalar" ||
      comparisons.count(op.operator_name().name) == 0) {
    return std::nullopt;
  }
  const std::optional<c10::IValue> other = torch::jit::toIValue(n->input(1));
  const auto type = n->input(0)->type()->cast<c10::TensorType>();
  const std::optional<at::ScalarType> dtype = type ? type->scalarType() : std::nullopt;
  // The dtypes that every number is compared in; the strides are known of strided tensors only.
  if (!other || !other->isScalar() || other->isComplexDouble() ||
      (dtype != at::kFloat && dtype != at::kDouble) ||
      !type->strides().concrete_sizes().has_value()) {
    return std::nullopt;
  }
  return Comparison{
      c10::Dispatcher::singleton().findSchemaOrThrow(op.operator_name().name.c_str(), "Tensor"),
      at::scalar_to_tensor(other->toScalar()).to(*dtype)};
}

bool is_owned_alone(const c10::IValue& v) {
  if (!v.isTensor()) {
    return false;
  }
  const at::Tensor& t = v.toTensor();
  // Nobody has compared the strides of an empty tensor with the recorded ones.
  return t.defined() && t.numel() != 0 && t.use_count() == 1 && t.has_storage() &&
      t.storage().use_count() == 1 && !t.is_conj() && !t.is_neg() && !t.is_inference() &&
      !t._is_zerotensor();
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
    Instruction instruction{std::nullopt, operation_of(n), {}, {}, nullptr};
    if (const c10::FunctionSchema* schema = n->maybeSchema()) {
      instruction.op = c10::Dispatcher::singleton().findOp(schema->operator_name());
    }
    for (const Value* v : n->inputs()) {
      instruction.inputs.push_back(operand(v));
    }
    if (is_max_pool_of_many_channels(n)) {
      instruction.operation = [op = *instruction.op](Stack& stack) {
        max_pool_over_channels(op, stack);
      };
      instruction.op.reset();
    } else if (instruction.op) {
      instruction.in_place = in_place_variant(n, *instruction.op);
      if (auto comparison = with_constant_tensor(n, *instruction.op)) {
        instruction.op = comparison->op;
        instruction.inputs[1].index = ~static_cast<int32_t>(constants_.size());
        constants_.emplace_back(std::move(comparison->other));
      }
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

void Program::call(const Instruction& i, Stack& stack) const {
  if (i.in_place && i.inputs[0].last && is_owned_alone(stack[0])) {
    // Below what counts versions: the result is a new tensor to whoever gets it.
    at::AutoDispatchBelowADInplaceOrView below;
    i.in_place(stack);
  } else if (i.op) {
    i.op->callBoxed(&stack);
  } else {
    i.operation(stack);
  }
}

void Program::run(Stack& stack) const {
  // As eager runs under no_grad, without autograd's kernels, which would do nothing. Those
  // above the kernels proper stay: a view shares the version counter of its base.
  c10::AutoGradMode no_grad(false);
  at::AutoDispatchBelowAutograd below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  TORCH_CHECK(
      static_cast<int32_t>(stack.size()) == num_inputs_,
      "the graph has ",
      num_inputs_,
      " inputs, and was given ",
      stack.size());
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
    call(i, stack);
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
