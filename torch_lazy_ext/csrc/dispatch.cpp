// Stage "record": the two boxed fallbacks through which every operator of a capture goes.
#include "record.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/Functions.h>
#include <torch/library.h>

namespace tle {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using torch::jit::Stack;
namespace fi = at::functionalization::impl;

namespace {

template <class F>
void for_each_tensor(const Stack& stack, size_t nargs, F&& f) {
  for (size_t i = stack.size() - nargs; i < stack.size(); ++i) {
    const IValue& v = stack[i];
    if (v.isTensor()) {
      f(v.toTensor());
    } else if (v.isTensorList()) {
      for (const at::Tensor& t : v.toTensorVector()) {
        f(t);
      }
    } else if (v.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) {
        if (t.has_value()) {
          f(*t);
        }
      }
    }
  }
}

// Puts `f(tensor)` in the place of each tensor among the operator's arguments.
template <class F>
void map_tensors(Stack* stack, size_t begin, size_t end, F&& f) {
  for (size_t i = begin; i < end; ++i) {
    IValue& v = (*stack)[i];
    if (v.isTensor()) {
      if (v.toTensor().defined()) {
        v = IValue(f(v.toTensor()));
      }
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) {
        list.push_back(t.defined() ? f(t) : t);
      }
      v = IValue(std::move(list));
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) {
        list.push_back(
            t.has_value() && t->defined() ? std::optional<at::Tensor>(f(*t)) : std::nullopt);
      }
      v = IValue(std::move(list));
    }
  }
}

bool is_captured(const at::Tensor& t) {
  if (as_capture(t) != nullptr) {
    return true;
  }
  return t.defined() && fi::isFunctionalTensor(t) &&
      as_capture(fi::unsafeGetFunctionalWrapper(t)->value()) != nullptr;
}

// Makes tensors out of nothing: recorded, unless it was asked for a meta tensor.
bool is_factory(const c10::FunctionSchema& schema, const Stack& stack) {
  const size_t nargs = schema.arguments().size();
  for (size_t i = 0; i < nargs; ++i) {
    if (is_device_argument(schema.arguments()[i])) {
      const IValue& v = stack[stack.size() - nargs + i];
      return v.isNone() || v.toDevice().type() != c10::kMeta;
    }
  }
  return false;
}

void record_kernel(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  const size_t nargs = op.schema().arguments().size();
  Recorder* recorder = Recorder::current();
  if (recorder != nullptr) {
    bool any_capture = false;
    bool any_tensor = false;
    for_each_tensor(*stack, nargs, [&](const at::Tensor& t) {
      any_tensor = any_tensor || t.defined();
      any_capture = any_capture || is_captured(t);
    });
    if (any_capture || (!any_tensor && is_factory(op.schema(), *stack))) {
      recorder->record(op, stack);
      return;
    }
  }
  c10::impl::ExcludeDispatchKeyGuard guard(DispatchKey::Fake);
  op.redispatchBoxed(ks & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::Fake), stack);
}

// Composite operators whose C++ code reads the data of these arguments: they get the
// values of this run, which become guards.
struct DataReader {
  const char* name;
  const char* overload;
  std::vector<size_t> arguments;
};

const std::vector<size_t>* data_arguments(const c10::OperatorHandle& op) {
  static const std::vector<DataReader> readers = {
      {"aten::tensor_split", "tensor_indices_or_sections", {1}},
      {"aten::ctc_loss", "Tensor", {2, 3}},
      {"aten::lstm", "data", {1}},
      {"aten::gru", "data", {1}},
      {"aten::rnn_tanh", "data", {1}},
      {"aten::rnn_relu", "data", {1}},
      {"aten::_pad_packed_sequence", "", {1}},
  };
  for (const DataReader& r : readers) {
    if (op.schema().name() == r.name && op.schema().overload_name() == r.overload) {
      return &r.arguments;
    }
  }
  return nullptr;
}

at::Tensor value_of_this_run(Recorder& recorder, const at::Tensor& t) {
  if (!fi::isFunctionalTensor(t)) {
    return t;
  }
  fi::sync(t);
  CaptureTensorImpl* c = as_capture(fi::unsafeGetFunctionalWrapper(t)->value());
  if (c == nullptr) {
    return t;
  }
  at::Tensor value = recorder.materialize(c->value);
  recorder.add_value_guard(c->value, value);
  return value;
}

// What composite code does with these operators on plain CPU tensors needs their data;
// this is the same computation through operators that can be recorded.
bool replace_composite(const c10::OperatorHandle& op, Stack* stack) {
  const std::string& name = op.schema().name();
  if (name == "aten::max_pool1d") {
    const size_t begin = stack->size() - 6;
    auto list = [&](size_t i) { return (*stack)[begin + i].toIntVector(); };
    const at::Tensor self = (*stack)[begin].toTensor();
    at::Tensor result = std::get<0>(at::max_pool1d_with_indices(
        self, list(1), list(2), list(3), list(4), (*stack)[begin + 5].toBool()));
    torch::jit::drop(*stack, 6);
    stack->emplace_back(std::move(result));
    return true;
  }
  return false;
}

// Writes to its arguments, and functionalization knows no variant that does not.
bool has_no_functional_variant(const c10::OperatorHandle& op) {
  const c10::FunctionSchema& schema = op.schema();
  return schema.is_mutable() && schema.name().compare(0, 6, "aten::") != 0 &&
      !op.hasKernelForDispatchKey(DispatchKey::Functionalize) &&
      !op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
}

void lift_kernel(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  Recorder* recorder = Recorder::current();
  const size_t nargs = op.schema().arguments().size();
  const size_t begin = stack->size() - nargs;
  c10::impl::ExcludeDispatchKeyGuard guard(DispatchKey::DeferredInit);
  if (recorder == nullptr) {
    op.callBoxed(stack);
    return;
  }
  const std::string& name = op.schema().name();
  if (name == "aten::lift_fresh" || name == "aten::lift") {
    // A tensor the program has just made from Python data.
    const at::Tensor t = (*stack)[begin].toTensor();
    if (recorder->is_liftable(t)) {
      torch::jit::drop(*stack, nargs);
      stack->emplace_back(recorder->lift(t, /*constant=*/true));
      return;
    }
  }
  // (twin, what the program passed), for operators that return an argument.
  std::vector<std::pair<c10::TensorImpl*, at::Tensor>> passed;
  map_tensors(stack, begin, stack->size(), [&](const at::Tensor& t) {
    if (t.layout() != at::kStrided || t.is_quantized()) {
      throw Unsupported(c10::str(
          op.schema().operator_name(),
          " gets a tensor of layout ",
          t.layout(),
          " and type ",
          t.toString(),
          ", which a graph cannot hold (at ",
          recorder->describe(recorder->current_source()),
          "): convert it to a dense tensor outside of the captured program"));
    }
    at::Tensor twin = recorder->twin_of(t);
    if (!twin.is_same(t)) {
      passed.emplace_back(twin.unsafeGetTensorImpl(), t);
    }
    return twin;
  });
  if (const auto* read = data_arguments(op)) {
    for (size_t i : *read) {
      map_tensors(stack, begin + i, begin + i + 1, [&](const at::Tensor& t) {
        return value_of_this_run(*recorder, t);
      });
    }
  }
  if (replace_composite(op, stack)) {
    return;
  }
  if (has_no_functional_variant(op)) {
    c10::impl::ExcludeDispatchKeyGuard no_functionalization(DispatchKey::Functionalize);
    op.callBoxed(stack);
  } else {
    op.callBoxed(stack);
  }
  if (!passed.empty() && op.schema().is_mutable()) {
    // `w.mul_(2)` returns `w`: the tensor that was passed, not its twin.
    map_tensors(stack, begin, stack->size(), [&](const at::Tensor& t) {
      for (const auto& [twin, original] : passed) {
        if (twin == t.unsafeGetTensorImpl()) {
          return original;
        }
      }
      return t;
    });
  }
}

} // namespace

TORCH_LIBRARY_IMPL(_, Fake, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&record_kernel>());
}

TORCH_LIBRARY_IMPL(_, DeferredInit, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&lift_kernel>());
}

} // namespace tle
