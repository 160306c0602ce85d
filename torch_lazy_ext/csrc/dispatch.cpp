// Stage "record": the boxed fallback through which every operator of a capture goes, and comes
// again below functionalization.
#include "generators.h"
#include "interrupts.h"
#include "nested.h"
#include "products.h"
#include "record.h"
#include "rehearse.h"
#include "views.h"

#include <ATen/ExpandUtils.h>
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Reduction.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

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

bool has_number(const Stack& stack, size_t nargs) {
  return std::any_of(stack.end() - static_cast<int64_t>(nargs), stack.end(), [](const IValue& v) {
    return v.isSymFloat() ||
        (v.isList() && std::any_of(v.toListRef().begin(), v.toListRef().end(), [](const IValue& e) {
             return e.isSymFloat();
           }));
  });
}

// Puts any float in the place of each number that the graph computes.
void forget_numbers(Stack* stack, size_t nargs) {
  for (size_t i = stack->size() - nargs; i < stack->size(); ++i) {
    IValue& v = (*stack)[i];
    if (v.isSymFloat()) {
      v = 1.0;
    } else if (v.isList()) {
      c10::impl::GenericList list = v.toList().copy();
      for (size_t k = 0; k < list.size(); ++k) {
        if (list.get(k).isSymFloat()) {
          list.set(k, 1.0);
        }
      }
      v = std::move(list);
    }
  }
}

// PyTorch resolves these bits in fallbacks of its own, below the capture's key, for each operator
// that does not know them.
void resolve_bits(DispatchKeySet ks, Stack* stack, size_t nargs) {
  const size_t begin = stack->size() - nargs;
  if (ks.has(DispatchKey::Conjugate)) {
    map_tensors(
        stack, begin, stack->size(), [](const at::Tensor& t) { return at::resolve_conj(t); });
  }
  if (ks.has(DispatchKey::Negative)) {
    map_tensors(
        stack, begin, stack->size(), [](const at::Tensor& t) { return at::resolve_neg(t); });
  }
}

// Below functionalization: `below` are the keys that the operator would go on with.
void record_kernel(const c10::OperatorHandle& op, DispatchKeySet below, Stack* stack) {
  const size_t nargs = op.schema().arguments().size();
  Recorder* recorder = Recorder::current();
  if (recorder != nullptr) {
    bool any_capture = false;
    bool any_tensor = false;
    for_each_tensor(*stack, nargs, [&](const at::Tensor& t) {
      any_tensor = any_tensor || t.defined();
      any_capture = any_capture || is_captured(t);
    });
    const bool any_number = has_number(*stack, nargs);
    if (any_capture || (!any_tensor && any_number) ||
        (!any_tensor && is_factory(op.schema(), *stack))) {
      if (!op.schema().is_mutable()) {
        resolve_bits(below, stack, nargs);
      }
      recorder->record(op, stack);
      return;
    }
    if (any_number) {
      // Functionalization tries in-place operators on meta tensors; they want a float.
      forget_numbers(stack, nargs);
    }
  }
  c10::impl::ExcludeDispatchKeyGuard guard(capture_key);
  op.redispatchBoxed(below, stack);
}

// In the place of an operator's kernels, below autograd: for those that write and have no
// functional variant, to whose arguments autograd comes without functionalization.
void select_kernel(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  const DispatchKeySet below =
      ks & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::BackendSelect);
  if (Recorder::current() == nullptr) {
    op.redispatchBoxed(below, stack);
  } else {
    record_kernel(op, below, stack);
  }
}

// Puts `select_kernel` there, where PyTorch lets operators with tensors through: for the life of
// the process, since another thread may be on its way through it.
void select(const c10::OperatorHandle& op) {
  static std::mutex mutex;
  static auto* selected = new std::unordered_map<std::string, c10::RegistrationHandleRAII>();
  const std::string name = c10::toString(op.operator_name());
  const std::lock_guard<std::mutex> lock(mutex);
  if (selected->count(name) == 0) {
    selected->emplace(
        name,
        c10::Dispatcher::singleton().registerImpl(
            op.operator_name(),
            DispatchKey::BackendSelect,
            c10::KernelFunction::makeFromBoxedFunction<&select_kernel>(),
            std::nullopt,
            nullptr,
            "torch_lazy_ext"));
  }
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
      {"aten::lstm", "data", {1}},
      {"aten::gru", "data", {1}},
      {"aten::rnn_tanh", "data", {1}},
      {"aten::rnn_relu", "data", {1}},
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

// The storage that a captured tensor has in eager, if it is that of a lifted tensor.
const c10::StorageImpl* lifted_storage_of(const Recorder& recorder, const at::Tensor& t) {
  for (const auto& input : recorder.inputs) {
    if (storage_of(input.twin) == storage_of(t) && !input.constant &&
        !fi::unsafeGetFunctionalWrapper(input.twin)->was_storage_changed() &&
        input.tensor.has_storage()) {
      return input.tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    }
  }
  return nullptr;
}

bool is_same_memory(const Recorder& recorder, const at::Tensor& a, const at::Tensor& b) {
  if (!fi::isFunctionalTensor(a) || !fi::isFunctionalTensor(b)) {
    return false;
  }
  if (storage_of(a) != storage_of(b)) {
    const auto* storage = lifted_storage_of(recorder, a);
    if (storage == nullptr || storage != lifted_storage_of(recorder, b)) {
      return false;
    }
  }
  fi::sync(a);
  fi::sync(b);
  return a.storage_offset() == b.storage_offset() && a.sizes() == b.sizes() &&
      a.strides() == b.strides() && a.scalar_type() == b.scalar_type() &&
      a.is_conj() == b.is_conj() && a.is_neg() == b.is_neg();
}

std::vector<int64_t> batches_of_this_run(Recorder& recorder, const at::Tensor& batch_sizes) {
  StandaloneGuard alone;
  const at::Tensor t = value_of_this_run(recorder, batch_sizes).contiguous();
  return {t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel()};
}

// `_pad_packed_sequence`, whose own code writes the lengths through a data pointer.
std::pair<at::Tensor, at::Tensor> pad_packed(
    Recorder& recorder,
    const at::Tensor& data,
    const at::Tensor& batch_sizes,
    bool batch_first,
    const at::Scalar& padding,
    int64_t total_length) {
  std::vector<int64_t> batches = batches_of_this_run(recorder, batch_sizes);
  const auto steps = static_cast<int64_t>(batches.size());
  TORCH_CHECK(
      total_length <= 0 || total_length >= steps,
      "Expected total_length to be at least the length of the longest sequence in input, but got "
      "total_length=",
      total_length,
      " and max sequence length being ",
      steps);
  std::vector<int64_t> sizes = {std::max(total_length, steps), batches[0]};
  const auto further = data.sizes().slice(1);
  sizes.insert(sizes.end(), further.begin(), further.end());
  at::Tensor output = at::full(sizes, padding, data.options());
  std::vector<int64_t> lengths(batches[0]);
  batches.push_back(0);
  int64_t offset = 0, begin = 0, batch = batches[0];
  for (int64_t i = 0; i <= steps; ++i) {
    if (batches[i] == batch) {
      continue;
    }
    const int64_t count = batch * (i - begin);
    std::vector<int64_t> part = {i - begin, batch};
    part.insert(part.end(), further.begin(), further.end());
    output.slice(0, begin, i)
        .slice(1, 0, batch)
        .copy_(data.slice(0, offset, offset + count).view(part));
    offset += count;
    begin = i;
    while (batch > batches[i]) {
      lengths[--batch] = i;
    }
    batch = batches[i];
  }
  at::Tensor length;
  {
    StandaloneGuard alone;
    length = at::tensor(lengths, at::kLong);
  }
  return {batch_first ? output.transpose(0, 1) : output, recorder.lift(length, /*constant=*/true)};
}

// The backward of `_pack_padded_sequence`, whose own code reads the batch sizes.
at::Tensor pack_backward(
    Recorder& recorder,
    const at::Tensor& grad,
    std::vector<int64_t> sizes,
    const at::Tensor& batch_sizes,
    bool batch_first) {
  if (batch_first) {
    std::swap(sizes[0], sizes[1]);
  }
  at::Tensor out = at::zeros(sizes, grad.options());
  int64_t offset = 0;
  const std::vector<int64_t> batches = batches_of_this_run(recorder, batch_sizes);
  for (size_t i = 0; i < batches.size(); ++i) {
    out.select(0, static_cast<int64_t>(i))
        .slice(0, 0, batches[i])
        .copy_(grad.slice(0, offset, offset + batches[i]));
    offset += batches[i];
  }
  return batch_first ? out.transpose(0, 1) : out;
}

// Raises what eager raises for a view of another dtype; the values beside the capture have no bits.
void check_view_of_dtype(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    const Stack& arguments) {
  if (op.schema().name() != "aten::view" || op.schema().overload_name() != "dtype") {
    return;
  }
  const at::Tensor& self = arguments.at(arguments.size() - 2).toTensor();
  if ((self.is_conj() || self.is_neg()) && self.scalar_type() != arguments.back().toScalarType()) {
    recorder.eager_raised = true;
    TORCH_CHECK(
        false,
        "torch.Tensor.view is not supported for ",
        self.is_conj() ? "conjugate view tensors" : "tensors with negative bit set",
        " when converting to a different dtype.");
  }
}

// Operators that cannot be recorded as they are: the same computation through others.
// Returns whether it has put the results on the stack.
bool replace(Recorder& recorder, const c10::OperatorHandle& op, Stack* stack) {
  const std::string& name = op.schema().name();
  const size_t begin = stack->size() - op.schema().arguments().size();
  auto at = [&](size_t i) -> const IValue& { return (*stack)[begin + i]; };
  auto answer = [&](auto... results) {
    stack->resize(begin);
    (stack->emplace_back(std::move(results)), ...);
    return true;
  };
  auto answer_pair = [&](std::pair<at::Tensor, at::Tensor> results) {
    return answer(std::move(results.first), std::move(results.second));
  };
  if (name == "aten::mul_" && op.schema().overload_name() == "Scalar" && at(1).isScalar()) {
    (*stack)[begin + 1] = multiplier_in_place(at(1).toScalar(), at(0).toTensor().scalar_type());
    return false;
  }
  if (name == "aten::_foreach_mul_" &&
      (op.schema().overload_name() == "Scalar" || op.schema().overload_name() == "ScalarList")) {
    // Eager's kernel is a loop of `mul_`.
    const std::vector<at::Tensor> tensors = at(0).toTensorVector();
    const bool one = !at(1).isList();
    if (std::none_of(
            tensors.begin(),
            tensors.end(),
            [](const at::Tensor& t) { return at::isReducedFloatingType(t.scalar_type()); }) ||
        (one && !at(1).isScalar())) {
      return false;
    }
    std::vector<at::Scalar> numbers;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!one && i >= at(1).toListRef().size()) {
        return false; // an error
      }
      const at::Scalar number = (one ? at(1) : at(1).toListRef()[i]).toScalar();
      numbers.push_back(multiplier_in_place(number, tensors[i].scalar_type()));
    }
    if (one) {
      at::_foreach_mul_(tensors, numbers);
      return answer();
    }
    c10::impl::GenericList list(c10::NumberType::get());
    for (const at::Scalar& number : numbers) {
      list.push_back(number);
    }
    (*stack)[begin + 1] = list;
    return false;
  }
  if (name == "aten::prod" && at::GradMode::is_enabled() && at(0).toTensor().requires_grad() &&
      at(0).toTensor().dim() > 0) {
    if (op.schema().overload_name().empty()) {
      return answer(differentiable_prod(
          at(0).toTensor(), std::nullopt, false, at(1).toOptional<at::ScalarType>()));
    }
    if (op.schema().overload_name() == "dim_int") {
      return answer(differentiable_prod(
          at(0).toTensor(), at(1).toInt(), at(2).toBool(), at(3).toOptional<at::ScalarType>()));
    }
  }
  if (name == "aten::cumprod_backward" && at::GradMode::is_enabled()) {
    // A second derivative is of what eager computes here.
    const at::Tensor input = at(1).toTensor();
    const int64_t dim = at(2).toInt();
    if (input.numel() <= 1 || input.size(dim) == 1) {
      return false;
    }
    const at::Tensor gradient =
        cumprod_backward_without_zeros(at(0).toTensor(), input, dim, at(3).toTensor());
    return gradient.defined() && answer(gradient);
  }
  if (name == "aten::max_pool1d") {
    // Without gradients its composite code reads the data of a CPU tensor.
    auto list = [&](size_t i) { return at(i).toIntVector(); };
    return answer(
        std::get<0>(at::max_pool1d_with_indices(
            at(0).toTensor(), list(1), list(2), list(3), list(4), at(5).toBool())));
  }
  if (name == "aten::as_strided" && fi::isFunctionalTensor(at(0).toTensor())) {
    recorder.reads_offset = true;
    const at::Tensor self = at(0).toTensor();
    const at::Tensor whole = recorder.whole_storage_of(self);
    if (!whole.defined() || whole.is_same(self) || self.requires_grad()) {
      return false;
    }
    // Counted from the begin of the storage, whatever the tensor is.
    const int64_t offset = at(3).isNone() ? self.storage_offset() : at(3).toInt();
    return answer(at::as_strided(whole, at(1).toIntVector(), at(2).toIntVector(), offset));
  }
  if (name == "aten::as_strided_") {
    recorder.reads_offset = true;
  }
  if ((name == "aten::resize_" || name == "aten::resize_as_") &&
      fi::isFunctionalTensor(at(0).toTensor())) {
    const at::Tensor self = at(0).toTensor();
    const bool as = name == "aten::resize_as_";
    const std::vector<int64_t> sizes = as ? at(1).toTensor().sizes().vec() : at(1).toIntVector();
    if (!self.is_contiguous()) {
      if (self.sizes() == at::IntArrayRef(sizes) && at(2).isNone()) {
        return answer(self); // functionalization would give it other strides
      }
      throw Unsupported(
          c10::str(
              op.schema().operator_name(),
              " gives another shape to a tensor with gaps, or with dimensions in another order "
              "(at ",
              recorder.describe(recorder.current_source()),
              "), and so shows memory that is none of its elements: make it contiguous before"));
    }
    if (!as && !at(2).isNone() && at(2).toMemoryFormat() != at::MemoryFormat::Contiguous) {
      // Functionalization leaves the format out.
      throw Unsupported(
          c10::str(
              op.schema().operator_name(),
              " gives a tensor another memory format in place (at ",
              recorder.describe(recorder.current_source()),
              "), so that each of its elements becomes another one: use "
              "contiguous(memory_format=...), which makes a copy"));
    }
  }
  if (name == "aten::rrelu_with_noise" && !at(0).toTensor().is_contiguous()) {
    // Eager's result is contiguous; that of the operator functionalization takes is not.
    using Generator = std::optional<at::Generator>;
    at::Tensor noise = at(1).toTensor();
    return answer(
        at::rrelu_with_noise(
            at(0).toTensor().contiguous(),
            noise,
            at(2).toScalar(),
            at(3).toScalar(),
            at(4).toBool(),
            at(5).to<Generator>()));
  }
  if (name == "aten::copy_" && is_same_memory(recorder, at(0).toTensor(), at(1).toTensor())) {
    // Eager looks at no element, so they may be one place in memory.
    const at::Tensor self = at(0).toTensor();
    const bool differentiated =
        c10::GradMode::is_enabled() && (self.requires_grad() || at(1).toTensor().requires_grad());
    if (!self.is_inference() && !differentiated) {
      self.unsafeGetTensorImpl()->bump_version();
      return answer(self);
    }
  }
  if (name == "aten::set_" && op.schema().overload_name() == "source_Tensor" &&
      is_same_memory(recorder, at(0).toTensor(), at(1).toTensor()) &&
      !at(0).toTensor().is_inference() && !at(0).toTensor().requires_grad()) {
    const at::Tensor self = at(0).toTensor();
    self.unsafeGetTensorImpl()->bump_version();
    return answer(self);
  }
  if (name == "aten::set_" &&
      recorder.input_by_twin.count(at(0).toTensor().unsafeGetTensorImpl()) != 0 &&
      fi::unsafeGetFunctionalWrapper(at(0).toTensor())->has_data_mutation()) {
    throw Unsupported(
        c10::str(
            op.schema().operator_name(),
            " gives other memory to a tensor whose memory the program wrote to before (at ",
            recorder.describe(recorder.current_source()),
            "): write to it after that, or assign to its `.data`"));
  }
  if (name == "aten::set_" && op.schema().overload_name().empty()) {
    const at::Tensor self = at(0).toTensor();
    return answer(self.set_(at::empty({0}, self.options())));
  }
  if (name == "aten::expand") {
    // The way back from a view through `expand` is a sum, which rounds: where nothing is
    // repeated there is another one.
    const at::Tensor self = at(0).toTensor();
    const std::vector<int64_t> sizes = at(1).toIntVector();
    if (static_cast<int64_t>(sizes.size()) < self.dim()) {
      return false; // an error
    }
    const size_t fresh = sizes.size() - self.dim();
    const auto [full, strides] = at::inferExpandGeometry(self.sizes(), self.strides(), sizes);
    if (c10::multiply_integers(full) == 0 && !self.requires_grad()) {
      // Of no elements, there is no sum (and of bools no difference).
      return answer(self.as_strided(full, strides, self.storage_offset()));
    }
    for (size_t d = 0; d < sizes.size(); ++d) {
      const int64_t before = d < fresh ? 1 : self.size(static_cast<int64_t>(d - fresh));
      if (sizes[d] != before && !(sizes[d] == -1 && d >= fresh)) {
        return false;
      }
    }
    at::Tensor view = fresh == 0 ? at::alias(self) : self;
    for (size_t d = 0; d < fresh; ++d) {
      view = view.unsqueeze(0);
    }
    // Dimensions of size 1 may have other strides.
    return view.strides() == at::IntArrayRef(strides) && answer(view);
  }
  if (name == "aten::is_nonzero" && at(0).toTensor().numel() == 1) {
    // What a branch looks at is the answer, not the number.
    const at::Tensor& asked = at(0).toTensor();
    const at::Tensor truth = asked.scalar_type() == at::kBool ? asked : at::ne(asked, 0);
    return answer(truth.item().toBool());
  }
  if (name == "aten::ctc_loss") {
    // Its composite code reads the lengths, and writes them to a tensor of its own.
    auto lengths = [&](size_t i) -> std::vector<int64_t> {
      if (!at(i).isTensor()) {
        return at(i).toIntVector();
      }
      StandaloneGuard alone;
      const at::Tensor t =
          value_of_this_run(recorder, at(i).toTensor()).to(at::kCPU, at::kLong).contiguous();
      return {t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel()};
    };
    const std::vector<int64_t> inputs = lengths(2), targets = lengths(3);
    const bool zero_infinity = at(6).toBool();
    at::Tensor loss = std::get<0>(at::_ctc_loss(
        at(0).toTensor(), at(1).toTensor(), inputs, targets, at(4).toInt(), zero_infinity));
    if (zero_infinity) {
      const auto infinite = at::eq(loss, std::numeric_limits<double>::infinity());
      loss = at::where(infinite, at::zeros({}, loss.options()), loss);
    }
    if (at(5).toInt() == at::Reduction::Mean) {
      at::Tensor divisor;
      {
        StandaloneGuard alone;
        divisor = at::tensor(targets, loss.options()).clamp_min(1);
      }
      loss = at::div(loss, recorder.lift(divisor, /*constant=*/true)).mean();
    } else if (at(5).toInt() == at::Reduction::Sum) {
      loss = loss.sum();
    }
    return answer(loss);
  }
  if (name == "aten::_pad_packed_sequence") {
    // Its composite code fills a tensor through its data pointer: one node.
    const bool differentiable = at::GradMode::is_enabled() && at(0).toTensor().requires_grad();
    if (!differentiable) {
      recorder.record(op, stack);
      return true;
    }
    return answer_pair(pad_packed(
        recorder,
        at(0).toTensor(),
        at(1).toTensor(),
        at(2).toBool(),
        at(3).toScalar(),
        at(4).toInt()));
  }
  if (name == "aten::_pack_padded_sequence_backward") {
    return answer(pack_backward(
        recorder, at(0).toTensor(), at(1).toIntVector(), at(2).toTensor(), at(3).toBool()));
  }
  if (name == "aten::batch_norm" || name == "aten::native_batch_norm") {
    // It updates the running statistics, and its schema does not say so. The kernel
    // behind the other name is the same one.
    const bool updates = at(5).toBool() && at(3).isTensor() && at(3).toTensor().defined() &&
        at(0).toTensor().numel() > 0; // of nothing, there are none
    if (!updates || !at(0).toTensor().device().is_cpu()) {
      return false;
    }
    if (name == "aten::batch_norm" && at(0).toTensor().dim() > 1) {
      // The kernel believes that there is one of each for a channel; eager's own code looks.
      for (size_t i = 1; i <= 4; ++i) {
        const at::Tensor each = at(i).isTensor() ? at(i).toTensor() : at::Tensor();
        if (each.defined() && each.numel() != at(0).toTensor().size(1)) {
          return false;
        }
      }
    }
    auto optional = [&](size_t i) { return at(i).toOptional<at::Tensor>(); };
    auto [out, mean, rstd] = at::_native_batch_norm_legit(
        at(0).toTensor(),
        optional(1),
        optional(2),
        const_cast<at::Tensor&>(at(3).toTensor()),
        const_cast<at::Tensor&>(at(4).toTensor()),
        true,
        at(6).toDouble(),
        at(7).toDouble());
    return name == "aten::batch_norm" ? answer(out) : answer(out, mean, rstd);
  }
  return false;
}

// The optimizers' fused kernels. Their float arguments may be numbers that the graph computes,
// which PyTorch's kernels on the way (autograd, functionalization) would ask for their values.
bool is_fused(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  return name.rfind("aten::_fused_", 0) == 0 && name.back() == '_';
}

// Writes to its arguments, and functionalization knows no variant that does not, or one that
// does something else.
bool has_no_functional_variant(const c10::OperatorHandle& op, const Stack& stack, size_t begin) {
  const c10::FunctionSchema& schema = op.schema();
  const bool functionalized = op.hasKernelForDispatchKey(DispatchKey::Functionalize);
  const bool composite = op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
  // A product rounds by how its matrices lie; these two do not ask how `out` lies.
  static const std::unordered_set<std::string> by_layout = {
      "aten::addbmm_", "aten::_softmax", "aten::_log_softmax"};
  const bool random = op.hasTag(at::Tag::nondeterministic_seeded);
  if (schema.is_mutable() && schema.name() == "aten::linalg_solve_triangular") {
    return true; // it solves the transposed system where `out` is contiguous
  }
  if (schema.is_mutable() && (random || by_layout.count(schema.name()) != 0) &&
      (functionalized || !composite)) {
    // Which number goes where depends on how the tensor lies in memory; the functional variant
    // has, or draws for, one that lies otherwise.
    bool contiguous = true;
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      if (schema.is_mutable({c10::SchemaArgType::input, i}) && stack[begin + i].isTensor()) {
        contiguous = contiguous && stack[begin + i].toTensor().is_contiguous();
      }
    }
    return !contiguous;
  }
  return is_fused(op) ||
      (schema.is_mutable() && schema.name().compare(0, 6, "aten::") != 0 && !functionalized &&
       !composite);
}

uint32_t version_of(const at::Tensor& t) {
  return t.is_inference() ? 0 : static_cast<uint32_t>(t._version());
}

// Whether elements of a tensor can be one place in memory: not when each stride is larger
// than all that the smaller ones reach.
bool may_overlap_itself(const at::Tensor& t) {
  if (t.numel() < 2 || t.is_non_overlapping_and_dense()) {
    return false;
  }
  std::vector<std::pair<int64_t, int64_t>> dims; // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) {
      dims.emplace_back(t.stride(d), t.size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t reached = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reached) {
      return true;
    }
    reached += stride * (size - 1);
  }
  return false;
}

// Whether a tensor is a view of a view of which several elements are one place in memory.
bool is_part_of_overlap(const at::Tensor& t) {
  auto* wrapper = fi::unsafeGetFunctionalWrapper(t);
  const auto& metas = wrapper->view_metas();
  if (metas.size() < 2) {
    return false;
  }
  const at::Tensor& base = static_cast<at::functionalization::FunctionalStorageImpl*>(
                               wrapper->unsafe_storage().unsafeGetStorageImpl())
                               ->base();
  StandaloneGuard alone;
  at::Tensor view =
      at::empty_strided(base.sizes(), base.strides(), base.options().device(at::kMeta));
  for (size_t i = 0; i + 1 < metas.size(); ++i) {
    view = metas[i]->forward(view);
    if (may_overlap_itself(view)) {
      return true;
    }
  }
  return false;
}

// A functional tensor that an operator writes to.
struct Written {
  at::Tensor tensor;
  at::Tensor before; // the value inside
  uint32_t version; // its version counter before
  size_t position; // among all tensors that the operator writes to
  bool out; // it gets the shape of the result
};

// Give a tensor that they write to another shape by their own decision, as with `out=`.
const std::unordered_set<std::string> resizing = {
    "aten::fused_moving_avg_obs_fake_quant",
    "aten::_fused_moving_avg_obs_fq_helper"};

std::vector<Written> written_to(const c10::OperatorHandle& op, const Stack& stack, size_t begin) {
  std::vector<Written> out;
  const c10::FunctionSchema& schema = op.schema();
  if (!schema.is_mutable() || op.hasTag(at::Tag::inplace_view)) {
    return out;
  }
  size_t position = 0;
  auto add = [&](const at::Tensor& t, bool out_argument) {
    if (t.defined() && may_overlap_itself(t)) {
      throw NotRecordable(
          "several elements of the tensor that is written to are one place in memory: clone it "
          "before.");
    }
    if (t.defined() && fi::isFunctionalTensor(t)) {
      if (is_part_of_overlap(t)) {
        throw NotRecordable(
            "the tensor that is written to is a view of one of which several elements are one "
            "place in memory: clone that one before.");
      }
      fi::sync(t);
      out.push_back({t, fi::from_functional_tensor(t), version_of(t), position, out_argument});
    }
    ++position;
  };
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) {
      continue;
    }
    const IValue& v = stack[begin + i];
    const bool out_argument =
        schema.arguments()[i].kwarg_only() || resizing.count(schema.name()) != 0;
    if (v.isTensor()) {
      add(v.toTensor(), out_argument);
    } else if (v.isTensorList()) {
      for (const at::Tensor& t : v.toTensorVector()) {
        // Eager's kernel is a loop, and sees in one round what it wrote in another.
        if (fi::isFunctionalTensor(t) && std::any_of(out.begin(), out.end(), [&](const Written& w) {
              return storage_of(w.tensor) == storage_of(t);
            })) {
          throw NotRecordable("tensors of a list that is written to share memory.");
        }
        add(t, out_argument);
      }
    }
  }
  return out;
}

// Functionalization puts the result of an out-of-place operator in the place of a tensor
// with gaps, or with dimensions in another order; eager leaves these as they are.
void restore_strides(const Written& w) {
  if (w.tensor.sizes() != w.before.sizes() || w.tensor.strides() == w.before.strides()) {
    return;
  }
  auto* wrapper = fi::unsafeGetFunctionalWrapper(w.tensor);
  if (!wrapper->view_metas().empty()) {
    wrapper->apply_updates();
    wrapper->regenerate_from_base();
    if (w.tensor.strides() == w.before.strides()) {
      return;
    }
    // A tensor that was transposed in place: it is all of its base.
  }
  at::Tensor value;
  {
    at::AutoDispatchSkipFunctionalize below;
    value = at::copy(w.before, fi::from_functional_tensor(w.tensor)); // keeps the strides
  }
  fi::replace_(w.tensor, value);
  fi::commit_update(w.tensor);
  fi::sync(w.tensor);
}

// Operators that a graph cannot hold, by how their names begin.
struct Inexpressible {
  const char* begins;
  const char* does;
  const char* instead;
};

constexpr const char* keep_outside = "keep this part outside of the captured program";
constexpr const char* quantizes = "makes a quantized tensor, which a graph cannot hold";
constexpr const char* takes_memory =
    "wants the memory of a tensor, and there is none while it is captured";
constexpr Inexpressible inexpressible[] = {
    {"aten::quantize_per_", quantizes, keep_outside},
    {"aten::_empty_affine_quantized", quantizes, keep_outside},
    {"aten::_empty_per_channel_affine_quantized", quantizes, keep_outside},
    {"inductor::resize_storage_bytes_", takes_memory, keep_outside},
    {"inductor::_reinterpret_tensor", takes_memory, "use torch.as_strided"},
    {"inductor::_alloc_from_pool", takes_memory, "use torch.as_strided"},
    {"c10d::",
     "talks to other processes in a way that cannot be recorded",
     "call torch.distributed.all_reduce, broadcast, all_gather_into_tensor or "
     "reduce_scatter_tensor as attributes of torch.distributed, or "
     "torch.distributed._functional_collectives"},
};

void check_expressible(Recorder& recorder, const c10::OperatorHandle& op) {
  if (c10::impl::TorchDispatchModeTLS::stack_len() > recorder.dispatch_modes) {
    throw Unsupported(
        c10::str(
            op.schema().operator_name(),
            " is called under a TorchDispatchMode of the program (at ",
            recorder.describe(recorder.current_source()),
            "), which would see it now and not in a replay: capture outside of the mode, and keep "
            "tracers (make_fx, torch.func.linearize) out of the program"));
  }
  const std::string& name = op.schema().name();
  for (const Inexpressible& row : inexpressible) {
    if (name.compare(0, std::strlen(row.begins), row.begins) == 0) {
      throw Unsupported(
          c10::str(
              op.schema().operator_name(),
              " ",
              row.does,
              " (at ",
              recorder.describe(recorder.current_source()),
              "): ",
              row.instead));
    }
  }
}

bool is_view_of_custom_operator(const c10::OperatorHandle& op) {
  const c10::FunctionSchema& schema = op.schema();
  const bool returns_alias =
      std::any_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& r) {
        return r.alias_info() != nullptr && !r.alias_info()->isWrite();
      });
  return returns_alias && schema.name().compare(0, 6, "aten::") != 0 &&
      !op.hasKernelForDispatchKey(DispatchKey::Functionalize) &&
      !op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
}

// Of a view, whether it is one of an inference tensor; nothing of what is no view.
std::optional<bool>
inference_of_view(const c10::OperatorHandle& op, const Stack& stack, size_t begin) {
  const c10::FunctionSchema& schema = op.schema();
  const bool view =
      std::any_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& r) {
        return r.alias_info() != nullptr && !r.alias_info()->isWrite();
      });
  // `to` and `reshape` give a view, or no view: what they are made of tells.
  const bool decides = view && !op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
  const IValue& viewed = stack[begin];
  if (!decides || !viewed.isTensor() || !viewed.toTensor().defined()) {
    return std::nullopt;
  }
  return viewed.toTensor().is_inference();
}

// A reduction computes in the dtype of `out`, where functionalization computes in another one
// and casts the result.
void take_dtype_of_out(const c10::OperatorHandle& op, Stack* stack, size_t begin) {
  static const std::unordered_set<std::string> reductions = {
      "aten::sum", "aten::nansum", "aten::mean", "aten::prod"};
  const c10::FunctionSchema& schema = op.schema();
  if (!schema.is_mutable() || reductions.count(schema.name()) == 0) {
    return;
  }
  const auto dtype = schema.argumentIndexWithName("dtype");
  const auto out = schema.argumentIndexWithName("out");
  if (dtype && out && (*stack)[begin + *dtype].isNone()) {
    (*stack)[begin + *dtype] = (*stack)[begin + *out].toTensor().scalar_type();
  }
}

// `torch.add(2, 3, out=t)`: nothing of what it reads is recorded, so its result is a constant,
// which is copied to `t`. Returns whether it has put the result on the stack.
bool record_write_of_numbers(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    Stack* stack,
    size_t begin) {
  const std::vector<c10::Argument>& arguments = op.schema().arguments();
  if (!op.schema().is_mutable() || op.schema().returns().size() != 1) {
    return false;
  }
  std::optional<size_t> out;
  bool any_number = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const IValue& v = (*stack)[begin + i];
    const c10::AliasInfo* alias = arguments[i].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (!v.isTensor()) {
      if (v.isTensorList() || v.isOptionalTensorList() || written) {
        return false;
      }
    } else if (written) {
      if (out || !arguments[i].kwarg_only() || !fi::isFunctionalTensor(v.toTensor())) {
        return false;
      }
      out = i;
    } else if (is_captured(v.toTensor())) {
      return false;
    } else {
      any_number = any_number || v.toTensor().defined();
    }
  }
  if (!out || !any_number) {
    return false;
  }
  const at::Tensor target = (*stack)[begin + *out].toTensor();
  at::Tensor value;
  {
    StandaloneGuard alone;
    Stack real(stack->begin() + static_cast<int64_t>(begin), stack->end());
    real[*out] = at::empty({0}, target.options().requires_grad(false));
    recorder.eager_raised = true; // what it raises
    op.callBoxed(&real);
    recorder.eager_raised = false;
    value = real.back().toTensor();
  }
  if (value.sizes() != target.sizes()) {
    throw Unsupported(
        c10::str(
            op.schema().operator_name(),
            " of numbers gives another shape to a tensor (at ",
            recorder.describe(recorder.current_source()),
            "): use the result, without out="));
  }
  target.copy_(recorder.lift(value, /*constant=*/true));
  stack->resize(begin);
  stack->emplace_back(target);
  return true;
}

// Puts the first of several tensors that are the same place in memory in the place of the others.
// An operator that writes to its arguments sees in one of them what it wrote to another, which
// clones of two views would not.
void merge_same_places(Stack* stack, size_t begin) {
  std::vector<at::Tensor> seen;
  map_tensors(stack, begin, stack->size(), [&](const at::Tensor& t) {
    if (!fi::isFunctionalTensor(t)) {
      return t;
    }
    for (const at::Tensor& other : seen) {
      if (storage_of(other) == storage_of(t) && other.storage_offset() == t.storage_offset() &&
          other.sizes() == t.sizes() && other.strides() == t.strides() &&
          other.scalar_type() == t.scalar_type()) {
        return other;
      }
    }
    seen.push_back(t);
    return t;
  });
}

// Several tensors over one memory were given to the program, with histories of their own that eager
// ties together by what they are views of.
void check_shared_history(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    const std::vector<Written>& written) {
  if (recorder.shared_storages.empty() || !at::GradMode::is_enabled()) {
    return;
  }
  for (const Written& w : written) {
    for (const LiftedInput& input : recorder.inputs) {
      if (input.base >= 0 && input.source.defined() && !input.tensor.is_leaf() &&
          storage_of(input.twin) == storage_of(w.tensor)) {
        throw Unsupported(
            c10::str(
                op.schema().operator_name(),
                " writes to memory that the program is given through several tensors with a "
                "history (at ",
                recorder.describe(recorder.current_source()),
                "): pass what they are views of, and derive them inside the program"));
      }
    }
  }
}

// Whether eager takes `t`, which is a view to the recorder, for a view of a tensor that does
// not require grad.
bool is_view_without_grad(Recorder& recorder, const at::Tensor& t) {
  const at::TensorBase base = t._base();
  const auto input = recorder.input_by_twin.find(base.unsafeGetTensorImpl());
  if (input == recorder.input_by_twin.end()) {
    return !base.requires_grad();
  }
  const at::Tensor& given = recorder.inputs[input->second].tensor;
  return given.is_view() && !given._base().requires_grad();
}

// A leaf that is a view of a tensor that does not require grad: its views are views of that tensor.
// So, once the memory is written to, no way leads from them to the leaf.
void check_leaf_views(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    const std::vector<at::Tensor>& changed) {
  for (const at::Tensor& one : changed) {
    if (recorder.leaf_views.count(storage_of(one)) == 0) {
      continue;
    }
    bool affected = false;
    for (const LiftedInput& input : recorder.inputs) {
      affected = affected ||
          (input.source.defined() && !input.tensor.is_leaf() && input.tensor.is_view() &&
           !input.tensor._base().requires_grad() && storage_of(input.twin) == storage_of(one));
    }
    for (const auto& weak : recorder.made) {
      const auto impl = weak.lock();
      const at::Tensor t = impl ? at::Tensor(impl) : at::Tensor();
      affected = affected ||
          (t.defined() && fi::isFunctionalTensor(t) && storage_of(t) == storage_of(one) &&
           t.requires_grad() && !t.is_leaf() && t.is_view() && is_view_without_grad(recorder, t));
    }
    if (affected) {
      throw Unsupported(
          c10::str(
              op.schema().operator_name(),
              " writes (at ",
              recorder.describe(recorder.current_source()),
              ") to memory that the program holds a view of, of a leaf that is itself a view of a "
              "tensor that does not require grad: eager forgets the way from the view to the "
              "leaf. Make the view after the write, or the leaf of a clone"));
    }
  }
}

// A view of such a leaf that is made without grad mode does not require grad.
void forget_leaf(Recorder& recorder, const Stack& views) {
  for_each_tensor(views, 1, [&](const at::Tensor& t) {
    if (t.defined() && fi::isFunctionalTensor(t) && t.requires_grad() && t.is_leaf() &&
        t.is_view() && recorder.leaf_views.count(storage_of(t)) != 0 &&
        is_view_without_grad(recorder, t)) {
      t.unsafeGetTensorImpl()->set_autograd_meta(nullptr);
    }
  });
}

// Set between the two visits of an operator to `lift_kernel`.
thread_local bool lifted_arguments = false;
// With that: to go on to `select_kernel`.
thread_local bool passes_functionalization = false;

// Records an operator whose tensor arguments are twins. Returns whether it went through
// the dispatcher, and not through other operators in its place.
bool record_lifted(Recorder& recorder, const c10::OperatorHandle& op, Stack* stack, size_t begin) {
  if (const auto* read = data_arguments(op)) {
    for (size_t i : *read) {
      map_tensors(stack, begin + i, begin + i + 1, [&](const at::Tensor& t) {
        return value_of_this_run(recorder, t);
      });
    }
  }
  if (is_view_of_custom_operator(op)) {
    const at::Tensor view = view_as_strided(recorder, op, *stack, begin);
    stack->resize(begin);
    stack->emplace_back(view);
    return false;
  }
  check_view_of_dtype(recorder, op, *stack);
  bool replaced = false;
  try {
    replaced = replace(recorder, op, stack);
  } catch (const Unsupported&) {
    throw;
  } catch (...) {
    recorder.eager_raised = false; // it was another operator that raised
    throw;
  }
  if (replaced || record_nested(recorder, op, stack, begin) ||
      record_write_of_numbers(recorder, op, stack, begin)) {
    return false;
  }
  std::vector<Written> written = written_to(op, *stack, begin);
  check_shared_history(recorder, op, written);
  if (!recorder.leaf_views.empty()) {
    std::vector<at::Tensor> changed;
    for (const Written& w : written) {
      changed.push_back(w.tensor);
    }
    if (op.hasTag(at::Tag::inplace_view) && fi::isFunctionalTensor((*stack)[begin].toTensor())) {
      changed.push_back((*stack)[begin].toTensor());
    }
    check_leaf_views(recorder, op, changed);
  }
  const bool fused = is_fused(op);
  if (op.schema().is_mutable() && !op.hasTag(at::Tag::inplace_view) && !fused) {
    try {
      rehearse(recorder, op, *stack, begin);
    } catch (const Unsupported&) {
      throw;
    } catch (...) {
      recorder.eager_raised = true; // the stand-ins are eager tensors
      throw;
    }
    take_dtype_of_out(op, stack, begin);
  }
  // Through the dispatcher once more, which computes the keys of the twins.
  lifted_arguments = true;
  auto id_of = [](const at::Tensor& t) { return reinterpret_cast<uintptr_t>(storage_of(t)); };
  const bool alone = has_no_functional_variant(op, *stack, begin);
  if (fused) {
    c10::impl::ExcludeDispatchKeyGuard skip(
        DispatchKeySet(DispatchKey::Functionalize) |
        c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    op.callBoxed(stack);
  } else if (alone) {
    merge_same_places(stack, begin);
    select(op);
    passes_functionalization = true;
    op.callBoxed(stack);
    std::unordered_set<uintptr_t> counted; // what shares memory counts together
    for (const Written& w : written) {
      const uintptr_t id = id_of(w.tensor);
      const int64_t moved = counted.insert(id).second ? version_of(w.tensor) - w.version : 0;
      recorder.custom_writes.push_back({recorder.last_write, w.position, id, moved});
    }
  } else {
    const bool inexact = has_inexact_inverse(op);
    const Stack given =
        inexact ? Stack(stack->begin() + static_cast<int64_t>(begin), stack->end()) : Stack();
    // A view of an inference tensor is one, and any other is none, in whatever mode it is made; the
    // wrapper of a functional tensor would go by the mode.
    std::optional<c10::InferenceMode> mode;
    std::optional<at::NoGradGuard> without_grad;
    const std::optional<bool> inference = inference_of_view(op, *stack, begin);
    if (inference && *inference != c10::InferenceMode::is_enabled()) {
      mode.emplace(*inference);
      without_grad.emplace();
    }
    op.callBoxed(stack);
    if (inference && !recorder.leaf_views.empty()) {
      forget_leaf(recorder, *stack);
    }
    if (inexact) {
      make_reversible(op, given, stack->back().toTensor());
    }
  }
  for (const Written& w : written) {
    const bool view = !fi::unsafeGetFunctionalWrapper(w.tensor)->view_metas().empty();
    if (fi::from_functional_tensor(w.tensor).sizes() != w.before.sizes() && (!w.out || view)) {
      // As it was, for what asks eager for its error.
      fi::replace_(w.tensor, w.before);
      fi::commit_update(w.tensor);
      fi::sync(w.tensor);
      if (!w.tensor.is_inference()) {
        c10::VariableVersion counter = w.tensor.unsafeGetTensorImpl()->version_counter();
        counter.set_version(w.version);
      }
      TORCH_CHECK(false, "the result has another shape than the tensor that it is put in.");
    }
    restore_strides(w);
    if (w.tensor.is_inference()) {
      // Of a custom operator the first run tells.
      recorder.inference_writes[id_of(w.tensor)] += alone ? 0 : 1;
    } else if (
        w.tensor._version() == w.version && op.schema().name().rfind("aten::_foreach_", 0) == 0) {
      // Eager's kernel is a loop of in-place operators; a fused one counts nothing.
      w.tensor.unsafeGetTensorImpl()->bump_version();
    }
    const auto watched = recorder.watched.find(storage_of(w.tensor));
    if (watched != recorder.watched.end()) {
      watched->second();
    }
  }
  return true;
}

// A real tensor laid out like `value`, with its values, or with zeros.
at::Tensor stand_in(const at::Tensor& value, bool zeros) {
  int64_t extent = value.numel() == 0 ? 0 : 1;
  for (int64_t d = 0; d < value.dim() && extent > 0; ++d) {
    extent += (value.size(d) - 1) * value.stride(d);
  }
  at::Tensor t = at::zeros({extent}, value.options()).as_strided(value.sizes(), value.strides());
  if (!zeros && !may_overlap_itself(t)) {
    t.copy_(value);
  }
  return t;
}

// Called while an exception is handled: an operator could not be recorded. The operator
// itself, on real tensors, tells what eager does: raise its own error, in its own words, or
// what recording cannot express.
void raise_as_eager(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    const Stack& arguments,
    const std::exception& raised) {
  const std::string message = message_of(raised);
  const bool ours = dynamic_cast<const NotRecordable*>(&raised) != nullptr;
  std::vector<std::pair<ValueRef, at::Tensor>> read;
  Stack real = arguments, zeros = arguments;
  bool known = true;
  bool differentiated = false;
  for_each_tensor(arguments, arguments.size(), [&](const at::Tensor& t) {
    differentiated = differentiated || (at::GradMode::is_enabled() && t.requires_grad());
  });
  auto fill = [&](Stack* stack, bool with_zeros) {
    map_tensors(stack, 0, stack->size(), [&](const at::Tensor& t) {
      if (!is_captured(t)) {
        known = known && !fi::isFunctionalTensor(t) && t.has_storage() && !t.is_meta();
        return t;
      }
      at::Tensor inner = t;
      if (fi::isFunctionalTensor(t)) {
        fi::sync(t);
        inner = fi::from_functional_tensor(t);
      }
      const ValueRef v = as_capture(inner)->value;
      const at::Tensor value = recorder.materialize(v);
      StandaloneGuard alone;
      if (!with_zeros) {
        read.emplace_back(v, value);
      }
      return stand_in(value, with_zeros);
    });
  };
  auto cannot_be_recorded = [&]() {
    return Unsupported(
        c10::str(
            op.schema().operator_name(),
            " cannot be recorded (at ",
            recorder.describe(recorder.current_source()),
            "): ",
            message,
            " Keep this part outside of the captured program"));
  };
  try {
    fill(&real, false);
    fill(&zeros, true);
  } catch (const Unsupported&) {
    throw;
  } catch (const c10::Error&) {
    throw cannot_be_recorded(); // functionalization cannot bring an argument up to date
  }
  if (!known) {
    return;
  }
  RandomStates generators({at::detail::getDefaultCPUGenerator()});
  for (const IValue& v : arguments) {
    if (v.isGenerator()) {
      generators.keep(v.toGenerator());
    }
  }
  bool exits = false;
  // What the call raises, or nothing.
  auto attempt = [&](Stack* stack) -> std::exception_ptr {
    std::exception_ptr error;
    try {
      StandaloneGuard alone;
      op.callBoxed(stack);
    } catch (const std::exception& e) {
      error = std::current_exception();
      exits = exits || !is_error(e);
    }
    generators.put_back();
    return error;
  };
  const std::exception_ptr error = attempt(&real);
  if (!error && differentiated && !ours) {
    return; // what autograd refuses, it refuses in eager too
  }
  if (!error) {
    throw cannot_be_recorded();
  }
  recorder.eager_raised = true;
  if (exits) {
    std::rethrow_exception(error);
  }
  if (message_of(error) != message_of(attempt(&zeros))) {
    // The program may catch the error, and go on because of it.
    for (auto& [value, expected] : read) {
      recorder.add_value_guard(value, expected);
    }
  }
  std::rethrow_exception(error);
}

// Raises what `detach_` raises for a view: a twin is none, whatever the user's tensor is.
void check_detachable(Recorder& recorder, const at::Tensor& t) {
  const auto twin = recorder.input_by_twin.find(t.unsafeGetTensorImpl());
  const at::Tensor& given =
      twin == recorder.input_by_twin.end() ? t : recorder.inputs[twin->second].tensor;
  recorder.reads_views = true;
  if (given.defined() && given.is_view()) {
    c10::impl::ExcludeDispatchKeyGuard no_capture(capture_key);
    at::empty({0}).view({0}).detach_();
  }
}

// An operator raised: what it was to write to may be memory that other tensors of the program
// share, which eager's error may be about.
void note_failed_writes(Recorder& recorder, const c10::OperatorHandle& op, const Stack& arguments) {
  const c10::FunctionSchema& schema = op.schema();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (schema.is_mutable({c10::SchemaArgType::input, i})) {
      for_each_tensor({arguments[i]}, 1, [&](const at::Tensor& t) {
        if (t.defined() && fi::isFunctionalTensor(t)) {
          const c10::Storage& storage = fi::unsafeGetFunctionalWrapper(t)->unsafe_storage();
          recorder.failed_writes.emplace(storage.unsafeGetStorageImpl(), storage);
        }
      });
    }
  }
}

void lift_kernel(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  Recorder* recorder = Recorder::current();
  const size_t nargs = op.schema().arguments().size();
  const size_t begin = stack->size() - nargs;
  const DispatchKeySet below = ks & DispatchKeySet(DispatchKeySet::FULL_AFTER, capture_key);
  const bool lifted = std::exchange(lifted_arguments, false);
  if (std::exchange(passes_functionalization, false)) {
    c10::impl::ExcludeDispatchKeyGuard no_functionalization(DispatchKey::Functionalize);
    op.redispatchBoxed(below - DispatchKeySet(DispatchKey::Functionalize), stack);
    return;
  }
  if (recorder != nullptr &&
      c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::Functionalize)) {
    record_kernel(op, below, stack); // tensors are C++ code's own
    return;
  }
  if (lifted || recorder == nullptr || !recorder->lifting) {
    op.redispatchBoxed(below, stack);
    return;
  }
  const std::string& name = op.schema().name();
  check_expressible(*recorder, op);
  if (op.hasTag(at::Tag::inplace_view) && !recorder->rebound.empty() &&
      recorder->rebound.count((*stack)[begin].toTensor().unsafeGetTensorImpl()) != 0) {
    throw Unsupported(
        c10::str(
            op.schema().operator_name(),
            " changes the shape of a tensor after an assignment to its `.data` (at ",
            recorder->describe(recorder->current_source()),
            "): change the shape before the assignment"));
  }
  if (name == "aten::lift_fresh" || name == "aten::lift") {
    // A tensor the program has just made from Python data.
    const at::Tensor t = (*stack)[begin].toTensor();
    if (recorder->is_liftable(t)) {
      torch::jit::drop(*stack, nargs);
      stack->emplace_back(recorder->lift(t, /*constant=*/true));
      return;
    }
  }
  const bool reshapes = op.hasTag(at::Tag::inplace_view);
  const Stack given =
      reshapes ? Stack(stack->begin() + static_cast<int64_t>(begin), stack->end()) : Stack();
  if (name == "aten::detach_") {
    check_detachable(*recorder, given.at(0).toTensor());
  }
  // (twin, what the program passed), for operators that return an argument.
  std::vector<std::pair<c10::TensorImpl*, at::Tensor>> passed;
  map_tensors(stack, begin, stack->size(), [&](const at::Tensor& t) {
    const bool refused_nested = recorder->is_nested(t) && !takes_nested(op);
    const std::string kind = refused_nested ? "a nested tensor" : unsupported_kind(t);
    if (!kind.empty()) {
      throw Unsupported(
          c10::str(
              op.schema().operator_name(),
              " gets ",
              kind,
              ", which a graph cannot hold (at ",
              recorder->describe(recorder->current_source()),
              "): convert it to a dense tensor outside of the captured program"));
    }
    if (t.key_set().has(DispatchKey::Python)) {
      throw Unsupported(
          c10::str(
              op.schema().operator_name(),
              " gets a tensor of a subclass with __torch_dispatch__ (at ",
              recorder->describe(recorder->current_source()),
              "), whose behaviour a graph cannot hold: unwrap it outside of the captured program"));
    }
    at::Tensor twin = recorder->twin_of(t);
    if (!twin.is_same(t)) {
      passed.emplace_back(twin.unsafeGetTensorImpl(), t);
    } else if (fi::isFunctionalTensor(t)) {
      // What a factory gives to Python may be a copy of the tensor object made here.
      recorder->made.emplace_back(t.getIntrusivePtr());
    }
    return twin;
  });
  const Stack arguments(stack->begin() + static_cast<int64_t>(begin), stack->end());
  recorder->eager_raised = false;
  try {
    if (!record_lifted(*recorder, op, stack, begin)) {
      return;
    }
  } catch (const Unsupported&) {
    throw;
  } catch (const std::exception& e) {
    note_failed_writes(*recorder, op, arguments);
    if (!recorder->eager_raised && is_error(e)) {
      raise_as_eager(*recorder, op, arguments, e);
    }
    throw;
  }
  if (reshapes && name != "aten::detach_" && recorder->is_liftable(given.at(0).toTensor())) {
    recorder->follow_layout(op, given);
  }
  for_each_tensor(*stack, stack->size() - begin, [&](const at::Tensor& t) {
    if (t.defined()) {
      recorder->made.emplace_back(t.getIntrusivePtr());
      if (fi::isFunctionalTensor(t)) {
        // Whoever reads the memory of a tensor without any must hear of it.
        t.storage().unsafeGetStorageImpl()->set_throw_on_mutable_data_ptr();
      }
    }
  });
  if (!passed.empty() && (op.schema().is_mutable() || !recorder->rebound.empty())) {
    // `w.mul_(2)` returns `w`: the tensor that was passed, not its twin. So does `w.to(w.dtype)`,
    // and a twin that came by an assignment to `.data` is known as `w` only.
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

void claim_capture_key() {
  static bool claimed = false;
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  if (claimed) {
    return;
  }
  if (dispatcher.hasBackendFallbackForDispatchKey(capture_key)) {
    throw pybind11::import_error(
        c10::str(
            "torch_lazy_ext records through PyTorch's dispatch key ",
            capture_key,
            ", and something that was imported before has a fallback of its own there (torchdistx "
            "is "
            "one that does): import torch_lazy_ext in a process without it"));
  }
  static auto* fallback = new c10::RegistrationHandleRAII(dispatcher.registerFallback(
      capture_key, c10::KernelFunction::makeFromBoxedFunction<&lift_kernel>(), "torch_lazy_ext"));
  claimed = fallback != nullptr;
}

} // namespace tle
