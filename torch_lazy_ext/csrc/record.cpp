#include "record.h"

#include "autograd.h"

#include "generators.h"
#include "interrupts.h"
#include "shapes.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/Functions.h>
#include <ATen/TensorUtils.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/lazy/core/config.h>
#include <torch/csrc/utils/python_symnode.h>

#include <cstring>
#include <unordered_set>

namespace tle {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using torch::jit::Stack;
namespace fi = at::functionalization::impl;

namespace {

thread_local Recorder* current_recorder = nullptr;
// The same, also while something runs standalone.
thread_local Recorder* capturing_recorder = nullptr;
PyObject* unsupported_type = nullptr;

// What has to be out of the way when an operator runs for itself (on meta or on
// real tensors) in the middle of a program.
const DispatchKeySet bystander_keys = DispatchKeySet(capture_key) | c10::autograd_dispatch_keyset |
    c10::autocast_dispatch_keyset | c10::functorch_transforms_ks |
    DispatchKeySet(
                                          {DispatchKey::Functionalize,
                                           DispatchKey::Python,
                                           DispatchKey::PythonTLSSnapshot,
                                           DispatchKey::PythonDispatcher,
                                           DispatchKey::PreDispatch,
                                           DispatchKey::ADInplaceOrView,
                                           DispatchKey::FuncTorchDynamicLayerBackMode,
                                           DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           DispatchKey::Tracer});

at::Tensor without_wrapper(const at::Tensor& t) {
  if (fi::isFunctionalTensor(t)) {
    fi::sync(t);
    return fi::from_functional_tensor(t);
  }
  return t;
}

// clone() would make a strided tensor dense.
at::Tensor strided_copy(const at::Tensor& t) {
  c10::InferenceMode normal(false); // has a version counter in every mode
  c10::AutoGradMode no_grad(false);
  return at::empty_strided(t.sizes(), t.strides(), t.options()).copy_(t);
}

at::Generator generator_of(const OperatorCall& call) {
  for (const Argument& a : call.arguments) {
    if (a.kind == ArgKind::Constant && a.constant.isGenerator()) {
      return a.constant.toGenerator();
    }
  }
  return at::detail::getDefaultCPUGenerator();
}

} // namespace

// ---------------------------------------------------------------------- guards

StandaloneGuard::StandaloneGuard()
    : exclude_(bystander_keys),
      grad_(false),
      torch_function_(at::impl::PythonTorchFunctionTLS::get_disabled_state()),
      recorder_(current_recorder) {
  at::impl::PythonTorchFunctionTLS::set_disabled_state(
      at::impl::TorchFunctionDisabledState::ALL_DISABLED);
  current_recorder = nullptr;
}

StandaloneGuard::~StandaloneGuard() {
  current_recorder = recorder_;
  at::impl::PythonTorchFunctionTLS::set_disabled_state(torch_function_);
}

std::string message_of(const std::exception& e) {
  const auto* error = dynamic_cast<const c10::Error*>(&e);
  return error == nullptr ? e.what() : error->what_without_backtrace();
}

std::string message_of(const std::exception_ptr& e) {
  if (!e) {
    return "";
  }
  try {
    std::rethrow_exception(e);
  } catch (const std::exception& error) {
    return message_of(error);
  }
}

Unsupported::Unsupported(const std::string& message) : PyTorchError(message) {
  if (capturing_recorder != nullptr) {
    capturing_recorder->refusal = message;
  }
}

PyObject* Unsupported::python_type() {
  return unsupported_type;
}

void set_unsupported_type(PyObject* type) {
  Py_INCREF(type); // for the life of the process, like the module that owns it
  unsupported_type = type;
}

bool is_device_argument(const c10::Argument& argument) {
  const auto& type = argument.type();
  if (type->kind() == c10::TypeKind::DeviceObjType) {
    return true;
  }
  return type->kind() == c10::TypeKind::OptionalType &&
      type->expectRef<c10::OptionalType>().getElementType()->kind() == c10::TypeKind::DeviceObjType;
}

at::Tensor number_behind(const IValue& value) {
  if (value.isSymFloat()) {
    pybind11::gil_scoped_acquire gil; // longer than every object here
    const c10::SymNode symbolic = value.toSymFloat().toSymNodeImpl();
    if (auto* python = dynamic_cast<torch::impl::PythonSymNodeImpl*>(symbolic.get())) {
      auto node = pybind11::reinterpret_borrow<pybind11::object>(python->getPyObj());
      return pybind11::getattr(node, "number", pybind11::none()).cast<at::Tensor>();
    }
  } else if (
      value.isTensor() && value.toTensor().defined() && is_wrapped_number(value.toTensor())) {
    pybind11::gil_scoped_acquire gil;
    pybind11::object wrapped = pybind11::cast(value.toTensor());
    pybind11::object number = pybind11::getattr(wrapped, "_wrapped_number", pybind11::none());
    if (!number.is_none()) {
      return number.attr("node").attr("number").cast<at::Tensor>();
    }
  }
  return {};
}

// -------------------------------------------------------------- begin and end

Recorder::Recorder() {
  pybind11::gil_scoped_acquire gil;
  auto dirname = [](const char* module) {
    auto file = pybind11::module_::import(module).attr("__file__").cast<std::string>();
    return file.substr(0, file.find_last_of("/\\") + 1);
  };
  library_prefix_ = dirname("torch");
  own_prefix_ = dirname("torch_lazy_ext");
}

Recorder::~Recorder() {
  // Operands are strong references: the last node first, so that the chain never
  // unwinds by recursion.
  while (!nodes.empty()) {
    nodes.pop_back();
  }
  if (Py_IsInitialized() == 0) {
    return; // the end of the process
  }
  pybind11::gil_scoped_acquire gil;
  for (auto& [code, unused] : code_is_library_) {
    Py_DECREF(reinterpret_cast<PyObject*>(code));
  }
}

Recorder* Recorder::current() {
  return current_recorder;
}

namespace {

// Functionalize is on for the thread, as it is wherever PyTorch functionalizes without
// LTC: otherwise `_to_copy` takes a copy to an eager device for the end of the program.
void set_included(bool on) {
  c10::impl::tls_set_dispatch_key_included(DispatchKey::Functionalize, on);
  c10::impl::tls_set_dispatch_key_included(capture_key, on);
}

void set_layout(
    c10::TensorImpl& impl,
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    int64_t storage_offset) {
  const bool allowed = impl.allow_tensor_metadata_change();
  impl.set_allow_tensor_metadata_change(true);
  impl.set_sizes_and_strides(sizes, strides, storage_offset);
  impl.set_allow_tensor_metadata_change(allowed);
}

// A tensor without memory. Whatever shape it gets lies within its storage.
at::Tensor layout_of(const at::Tensor& t) {
  const at::Tensor memory =
      at::empty({int64_t{1} << 48}, at::TensorOptions(t.dtype()).device(at::kMeta));
  return memory.as_strided(t.sizes(), t.strides(), t.storage_offset());
}

// A TorchDispatchMode of the caller sees the operators of each run of the graph. What it makes of
// those of the capture would be recorded, and be made once more.
const DispatchKeySet dispatch_mode_keys({DispatchKey::Python, DispatchKey::PythonTLSSnapshot});

void exclude_dispatch_modes(bool on) {
  c10::impl::tls_set_dispatch_key_excluded(DispatchKey::Python, on);
  c10::impl::tls_set_dispatch_key_excluded(DispatchKey::PythonTLSSnapshot, on);
}

} // namespace

void Recorder::enter() {
  TORCH_CHECK(!entered_ && !finished_, "a recorder serves one capture");
  TORCH_CHECK(current_recorder == nullptr, "a capture is already running on this thread");
  entered_ = true;
  current_recorder = capturing_recorder = this;
  default_dtype_ = c10::typeMetaToScalarType(c10::get_default_dtype());
  dispatch_modes = c10::impl::TorchDispatchModeTLS::stack_len();
  previous_reapply_ = fi::getFunctionalizationReapplyViewsTLS();
  fi::setFunctionalizationReapplyViewsTLS(true);
  modes_were_excluded_ = c10::impl::tls_is_dispatch_key_excluded(DispatchKey::Python);
  exclude_dispatch_modes(true);
  set_included(true);
}

void Recorder::exit() {
  if (!entered_) {
    return;
  }
  entered_ = false;
  finished_ = true;
  current_recorder = capturing_recorder = nullptr;
  set_included(false);
  exclude_dispatch_modes(modes_were_excluded_);
  fi::setFunctionalizationReapplyViewsTLS(previous_reapply_);
  for (auto& [impl, before] : layouts_) {
    set_layout(*impl, before.sizes, before.strides, before.storage_offset);
  }
  layouts_.clear();
}

Recorder::Resume::Resume(Recorder& recorder, bool lifting)
    : previous_(current_recorder),
      previous_reapply_(fi::getFunctionalizationReapplyViewsTLS()),
      recorder_(recorder),
      previous_lifting_(std::exchange(recorder.lifting, lifting)),
      include_(DispatchKeySet({capture_key, DispatchKey::Functionalize})),
      exclude_(dispatch_mode_keys) {
  current_recorder = &recorder;
  fi::setFunctionalizationReapplyViewsTLS(true);
}

Recorder::Resume::~Resume() {
  recorder_.lifting = previous_lifting_;
  current_recorder = previous_;
  fi::setFunctionalizationReapplyViewsTLS(previous_reapply_);
}

// ---------------------------------------------------------------- source lines

SourceLocation Recorder::current_source() {
  pybind11::gil_scoped_acquire gil;
  SourceLocation loc;
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(frame);
  while (frame != nullptr) {
    PyCodeObject* code = PyFrame_GetCode(frame); // new reference
    auto it = code_is_library_.find(code);
    if (it == code_is_library_.end()) {
      const char* file = PyUnicode_AsUTF8(code->co_filename);
      if (file == nullptr) {
        PyErr_Clear(); // a name that is no text
      }
      const std::string_view name = file == nullptr ? std::string_view() : std::string_view(file);
      const bool library = name.substr(0, library_prefix_.size()) == library_prefix_ ||
          name.substr(0, own_prefix_.size()) == own_prefix_;
      Py_INCREF(reinterpret_cast<PyObject*>(code));
      it = code_is_library_.emplace(code, library).first;
    }
    Py_DECREF(reinterpret_cast<PyObject*>(code));
    if (!it->second) {
      loc.code = code;
      loc.line = PyFrame_GetLineNumber(frame);
      break;
    }
    PyFrameObject* back = PyFrame_GetBack(frame);
    Py_DECREF(reinterpret_cast<PyObject*>(frame));
    frame = back;
  }
  Py_XDECREF(reinterpret_cast<PyObject*>(frame));
  return loc;
}

std::string Recorder::describe(const SourceLocation& source) const {
  if (source.code == nullptr) {
    return "";
  }
  pybind11::gil_scoped_acquire gil;
  const char* file = PyUnicode_AsUTF8(source.code->co_filename);
  if (file == nullptr) {
    PyErr_Clear();
  }
  return std::string(file == nullptr ? "?" : file) + ":" + std::to_string(source.line);
}

torch::jit::SourceRange Recorder::source_range(const SourceLocation& source) {
  if (source.code == nullptr) {
    return {};
  }
  auto [it, fresh] = source_ranges_.try_emplace({source.code, source.line});
  if (fresh) {
    // The range's text is the location itself: that is what a jit node gives back.
    std::string text = describe(source);
    const size_t length = text.size();
    it->second =
        torch::jit::SourceRange(std::make_shared<torch::jit::Source>(std::move(text)), 0, length);
  }
  return it->second;
}

void call_operator(const c10::OperatorHandle& op, bool grad_mode, Stack& stack) {
  if (!grad_mode) {
    op.callBoxed(&stack);
    return;
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::AutoGradMode on(true);
  op.callBoxed(&stack);
}

// -------------------------------------------------------------------- lifting

bool Recorder::has_failed_write(const at::Tensor& twin) const {
  return failed_writes.count(storage_of(twin)) != 0;
}

bool Recorder::is_liftable(const at::Tensor& t) const {
  if (!t.defined() || is_wrapped_number(t) || as_capture(t) != nullptr) {
    return false;
  }
  if (fi::isFunctionalTensor(t) || t.is_meta() ||
      t.unsafeGetTensorImpl()->key_set().has_any(c10::functorch_transforms_ks)) {
    return false;
  }
  return unsupported_kind(t).empty();
}

at::Tensor Recorder::make_tensor(ValueRef value, bool wrap_functional) {
  at::Tensor t =
      at::detail::make_tensor<CaptureTensorImpl>(shared_from_this(), value, meta_of(value));
  return wrap_functional ? fi::to_functional_tensor(t) : t;
}

c10::StorageImpl* storage_of(const at::Tensor& functional) {
  return fi::unsafeGetFunctionalWrapper(functional)->unsafe_storage().unsafeGetStorageImpl();
}

at::Tensor whole_storage(const at::Tensor& tensor, std::optional<at::ScalarType> dtype) {
  StandaloneGuard alone;
  at::Tensor whole = at::empty({0}, tensor.options().dtype(dtype.value_or(tensor.scalar_type())));
  const auto count = static_cast<int64_t>(tensor.storage().nbytes() / whole.itemsize());
  whole.set_(tensor.storage(), 0, {count}, {1});
  return whole;
}

at::Tensor Recorder::lift(const at::Tensor& tensor, bool constant) {
  auto found = input_by_impl.find(tensor.unsafeGetTensorImpl());
  if (found != input_by_impl.end()) {
    return inputs[found->second].twin;
  }
  if (!constant && has_tangent(tensor)) {
    throw Unsupported(
        "the program is given a tensor with a tangent of forward-mode AD, which a graph would "
        "drop: call the program itself, or make the dual tensor inside of it");
  }
  if (!constant && shared_storages.count(tensor.storage().unsafeGetStorageImpl()) != 0) {
    return lift_storage(tensor);
  }
  return lift_alone(tensor, constant);
}

namespace {

// Stands for the history that a lifted tensor has outside of the program.
struct Given : public torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& tangents) override {
    return std::move(tangents);
  }
};

// A node of autograd, counted as this release of PyTorch counts them: by themselves, or before 2.12
// by a std::shared_ptr.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>) {
    return c10::make_intrusive<N>();
  } else {
    return std::make_shared<N>();
  }
}

// The history of a tensor, which it keeps when it is given other data.
struct Kept : public Given {};

// Lets the history of a tensor lead on to that of another one: of a twin, to a leaf that gets the
// gradient of the user's tensor.
template <class N>
void give_history(const at::Tensor& tensor, const at::Tensor& other) {
  auto history = make_node<N>();
  history->add_next_edge(torch::autograd::impl::gradient_edge(other));
  torch::autograd::set_history(tensor, history);
}

} // namespace

at::Tensor Recorder::lift_alone(const at::Tensor& tensor, bool constant) {
  auto n =
      std::make_shared<GenericNode>(static_cast<int64_t>(inputs.size()), TensorMeta::of(tensor));
  n->id = static_cast<int64_t>(nodes.size());
  n->depends_on_input = !constant;
  at::Tensor twin;
  at::Tensor source;
  {
    std::optional<c10::InferenceMode> inference;
    if (tensor.is_inference() != c10::InferenceMode::is_enabled()) {
      // So that a write outside of the mode raises, and where it is met decides nothing.
      inference.emplace(tensor.is_inference());
    }
    c10::impl::ExcludeDispatchKeyGuard guard(capture_key);
    n->values.push_back(tensor.detach());
    nodes.push_back(n);
    twin = make_tensor({n->id, 0}, /*wrap_functional=*/true);
    twin.storage().unsafeGetStorageImpl()->set_throw_on_mutable_data_ptr();
    if (tensor.requires_grad() && tensor.is_leaf()) {
      source = twin.requires_grad_(true);
      note_leaf(twin, tensor);
    } else if (tensor.requires_grad()) {
      source = make_tensor({n->id, 0}, /*wrap_functional=*/true).requires_grad_(true);
      give_history<Given>(twin, source);
      note_leaf(twin, tensor);
    }
  }
  input_by_impl[tensor.unsafeGetTensorImpl()] = inputs.size();
  input_by_twin[twin.unsafeGetTensorImpl()] = inputs.size();
  inputs.push_back({tensor, twin, n->id, source, constant});
  return twin;
}

void Recorder::note_leaf(const at::Tensor& twin, const at::Tensor& leaf) {
  if (twin.requires_grad() && leaf.is_view() && !leaf._base().requires_grad()) {
    const c10::Storage& storage = fi::unsafeGetFunctionalWrapper(twin)->unsafe_storage();
    leaf_views.emplace(storage.unsafeGetStorageImpl(), storage);
  }
}

at::Tensor Recorder::add_tangent(const at::Tensor& output) {
  TensorMeta meta = TensorMeta::of(output);
  meta.storage_offset = 0;
  meta.conj = meta.neg = false;
  if (!output.is_non_overlapping_and_dense()) {
    meta.strides = at::detail::defaultStrides(meta.sizes);
  }
  auto n = std::make_shared<GenericNode>(static_cast<int64_t>(inputs.size()), meta);
  n->id = static_cast<int64_t>(nodes.size());
  n->depends_on_tangent = true;
  nodes.push_back(n);
  at::Tensor twin;
  {
    c10::impl::ExcludeDispatchKeyGuard guard(capture_key);
    {
      StandaloneGuard alone;
      const auto options = at::TensorOptions(meta.dtype).device(meta.device);
      n->values.push_back(at::empty_strided(meta.sizes, meta.strides, options).fill_(1));
    }
    twin = make_tensor({n->id, 0}, /*wrap_functional=*/true);
  }
  inputs.push_back({at::Tensor(), twin, n->id, at::Tensor(), /*constant=*/true});
  return twin;
}

// The twin is a view of the twin of the whole storage, so that functionalization sees
// what a write to one tensor does to another.
at::Tensor Recorder::lift_storage(const at::Tensor& tensor) {
  // As `tensor` is: where it is met decides nothing.
  c10::InferenceMode inference(tensor.is_inference());
  int64_t base = -1;
  for (size_t i = 0; i < inputs.size() && base < 0; ++i) {
    const at::Tensor& other = inputs[i].tensor;
    if (inputs[i].base != static_cast<int64_t>(i) ||
        !other.storage().is_alias_of(tensor.storage())) {
      continue;
    }
    base = static_cast<int64_t>(i);
  }
  if (base < 0) {
    at::Tensor whole =
        whole_storage(tensor, shared_storages.at(tensor.storage().unsafeGetStorageImpl()));
    base = static_cast<int64_t>(inputs.size());
    lift_alone(whole, /*constant=*/false);
    inputs[base].base = base;
  }
  at::Tensor twin;
  at::Tensor source;
  {
    Resume recording(*this);
    c10::AutoGradMode no_grad(false);
    at::Tensor whole = inputs[base].twin;
    const auto parts = static_cast<int64_t>(tensor.itemsize() / whole.itemsize());
    if (parts == 1) {
      twin = whole.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    } else {
      std::vector<int64_t> sizes = tensor.sizes().vec(), strides = tensor.strides().vec();
      for (int64_t& stride : strides) {
        stride *= parts;
      }
      sizes.push_back(parts);
      strides.push_back(1);
      twin = whole.as_strided(sizes, strides, tensor.storage_offset() * parts);
    }
    if (whole.scalar_type() != tensor.scalar_type()) {
      // After as_strided: functionalization writes through it in first place only.
      twin = twin.view(tensor.scalar_type());
    }
    if (parts != 1) {
      twin = twin.squeeze(-1);
    }
    twin = twin.detach(); // it shares its memory with others, and its history with none
    if (tensor.requires_grad() && tensor.is_leaf()) {
      source = twin.requires_grad_(true);
      note_leaf(twin, tensor);
    } else if (tensor.requires_grad()) {
      source = twin.detach().requires_grad_(true);
      give_history<Given>(twin, source);
      note_leaf(twin, tensor);
    }
  }
  input_by_impl[tensor.unsafeGetTensorImpl()] = inputs.size();
  input_by_twin[twin.unsafeGetTensorImpl()] = inputs.size();
  inputs.push_back({tensor, twin, -1, source, false, base});
  return twin;
}

at::Tensor Recorder::whole_storage_of(const at::Tensor& tensor) const {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].base == static_cast<int64_t>(i) &&
        storage_of(inputs[i].twin) == storage_of(tensor) &&
        inputs[i].twin.scalar_type() == tensor.scalar_type()) {
      return inputs[i].twin;
    }
  }
  return {};
}

at::Tensor Recorder::twin_of(const at::Tensor& tensor) {
  if (!rebound.empty()) {
    auto it = rebound.find(tensor.unsafeGetTensorImpl());
    if (it != rebound.end()) {
      return it->second.second;
    }
  }
  return is_liftable(tensor) ? lift(tensor, /*constant=*/false) : tensor;
}

void Recorder::rebind(const at::Tensor& tensor, const at::Tensor& twin) {
  rebound[tensor.unsafeGetTensorImpl()] = {tensor, twin};
}

void Recorder::follow_layout(const c10::OperatorHandle& op, Stack given) {
  const at::Tensor tensor = given.at(0).toTensor();
  StandaloneGuard alone;
  for (IValue& argument : given) {
    if (argument.isTensor() && argument.toTensor().defined()) {
      argument = layout_of(argument.toTensor());
    }
  }
  op.callBoxed(&given);
  const at::Tensor now = given.at(0).toTensor();
  auto* impl = tensor.unsafeGetTensorImpl();
  layouts_.try_emplace(
      impl, Layout{tensor, tensor.sizes().vec(), tensor.strides().vec(), tensor.storage_offset()});
  set_layout(*impl, now.sizes(), now.strides(), now.storage_offset());
}

void Recorder::assign_data(const at::Tensor& tensor, const at::Tensor& twin) {
  const at::Tensor before = twin_of(tensor);
  if (!before.is_inference() && !twin.is_inference()) {
    torch::autograd::impl::set_version_counter(
        twin, torch::autograd::impl::version_counter(before));
  }
  if (before.requires_grad() && !before.is_leaf()) {
    give_history<Kept>(twin, before);
  }
  auto held = input_by_twin.find(tensor.unsafeGetTensorImpl());
  if (held != input_by_twin.end()) {
    // The program holds the twin of an argument. What that was until now is still the
    // argument's memory.
    fi::sync(tensor);
    const size_t index = held->second;
    LiftedInput& input = inputs[index];
    auto* impl = tensor.unsafeGetTensorImpl();
    at::Tensor former(impl->shallow_copy_and_detach(
        impl->version_counter(), /*allow_tensor_metadata_change=*/true));
    input_by_twin.erase(held);
    input_by_twin[former.unsafeGetTensorImpl()] = index;
    if (input.source.is_same(input.twin)) {
      input.source = former;
    }
    input.twin = former;
    rebind(input.tensor, twin);
  }
  rebind(tensor, twin);
}

// ------------------------------------------------- values needed by the program

namespace {

std::vector<at::Tensor> written_by(const OperatorCall& call, const Stack& arguments) {
  std::vector<at::Tensor> out;
  for (size_t i : call.mutated) {
    if (arguments[i].isTensor()) {
      out.push_back(arguments[i].toTensor());
    } else {
      const auto list = arguments[i].toTensorVector();
      out.insert(out.end(), list.begin(), list.end());
    }
  }
  return out;
}

int64_t version_of(const at::Tensor& t) {
  return t.defined() && !t.is_inference() ? static_cast<int64_t>(t._version()) : 0;
}

} // namespace

Stack Recorder::run(const OperatorCall& call, std::vector<int64_t>* bumps) {
  // One copy of each value, which the operator may get as several arguments.
  std::vector<std::pair<ValueRef, at::Tensor>> copies;
  for (size_t i : call.mutated) {
    for (const ValueRef& v : call.arguments[i].values) {
      const bool known =
          std::any_of(copies.begin(), copies.end(), [&](const auto& c) { return c.first == v; });
      if (v.node >= 0 && !known) {
        copies.emplace_back(v, strided_copy(node(v.node).values[v.index]));
      }
    }
  }
  Stack stack;
  stack.reserve(call.arguments.size());
  call.push(stack, [&](const ValueRef& v) {
    for (const auto& [of, copy] : copies) {
      if (of == v) {
        return copy;
      }
    }
    return node(v.node).values[v.index];
  });
  std::vector<IValue> written;
  for (size_t i : call.mutated) {
    written.push_back(stack[i]);
  }
  const std::vector<at::Tensor> targets = written_by(call, stack);
  std::vector<int64_t> before;
  for (const at::Tensor& t : targets) {
    before.push_back(version_of(t));
  }
  DefaultDtypeGuard default_dtype(call.default_dtype);
  call_operator(call.op, call.grad_mode, stack);
  stack.insert(stack.end(), written.begin(), written.end());
  for (size_t k = 0; bumps != nullptr && k < targets.size(); ++k) {
    const bool again = std::any_of(
        targets.begin(), targets.begin() + static_cast<int64_t>(k), [&](const at::Tensor& t) {
          return t.is_same(targets[k]);
        });
    bumps->push_back(again ? 0 : version_of(targets[k]) - before[k]);
  }
  return stack;
}

std::vector<char> Recorder::needed_for(int64_t target) {
  // What the value depends on and is not known yet; with one random node among
  // them, all earlier random nodes too, since they draw from the same stream.
  std::vector<char> needed(target + 1, 0);
  needed[target] = 1;
  bool random_after = false;
  for (int64_t i = target; i >= 0; --i) {
    GenericNode& n = node(i);
    if (!n.values.empty()) {
      needed[i] = 0;
      continue;
    }
    if (n.random() && random_after) {
      needed[i] = 1;
    }
    if (needed[i] == 0) {
      continue;
    }
    if (n.collective()) {
      throw Unsupported(
          c10::str(
              "the program looks at a value (at ",
              describe(current_source()),
              ") that ",
              n.call->op.schema().operator_name(),
              " (at ",
              describe(n.call->source),
              ") brings from other processes. It is not there while the program is captured, since "
              "not every process captures at the same call: compute with tensors, or look at the "
              "value after the call"));
    }
    TORCH_INTERNAL_ASSERT(n.call);
    random_after = random_after || n.random();
    n.call->for_each_value([&](const ValueRef& v) { needed[v.node] = 1; });
  }
  return needed;
}

at::Tensor Recorder::materialize(ValueRef value) {
  GenericNode& target = node(value.node);
  if (!target.values.empty()) {
    return target.values[value.index];
  }
  const std::vector<char> needed = needed_for(value.node);
  StandaloneGuard alone;
  // The user's generators stay as they are: the capture has its own copy of each.
  RandomStates users;
  for (int64_t i = 0; i <= value.node; ++i) {
    if (needed[i] == 0 || !node(i).random()) {
      continue;
    }
    at::Generator g = generator_of(*node(i).call);
    if (users.keep(g)) {
      auto ours = rng_states_.find(g.unsafeGetGeneratorImpl());
      if (ours != rng_states_.end()) {
        g.set_state(ours->second);
        note_seed(g);
      }
    }
  }
  std::exception_ptr error;
  try {
    for (int64_t i = 0; i <= value.node; ++i) {
      if (needed[i] != 0) {
        node(i).values = tensors_of(run(*node(i).call));
      }
    }
  } catch (...) {
    error = std::current_exception();
  }
  for (const at::Generator& g : users.generators()) {
    rng_states_[g.unsafeGetGeneratorImpl()] = g.get_state();
  }
  users.put_back();
  if (error) {
    std::rethrow_exception(error);
  }
  return target.values[value.index];
}

bool Recorder::depends_on_tangent(const OperatorCall& call) {
  bool depends = false;
  call.for_each_value(
      [&](const ValueRef& v) { depends = depends || node(v.node).depends_on_tangent; });
  return depends;
}

void Recorder::add_value_guard(ValueRef value, const at::Tensor& expected) {
  if (node(value.node).depends_on_tangent) {
    throw Unsupported(
        c10::str(
            "a backward reads the values of its gradients (at ",
            describe(current_source()),
            "), which are not there while it is captured: compute with tensors"));
  }
  if (!node(value.node).depends_on_input) {
    return;
  }
  for (const Guard& g : guards) {
    if (g.kind == Guard::Kind::Value && g.value == value) {
      return;
    }
  }
  const SourceLocation source = current_source();
  StandaloneGuard alone;
  guards.push_back({Guard::Kind::Value, value, expected.clone(), {}, source});
}

void Recorder::release() {
  for (LiftedInput& input : inputs) {
    input.tensor.reset();
    input.twin.reset();
    input.source.reset();
  }
  for (auto& n : nodes) {
    n->values.clear();
  }
  input_by_impl.clear();
  input_by_twin.clear();
  rebound.clear();
  watched.clear();
  leaf_views.clear();
  failed_writes.clear();
  nested.clear();
  made.clear();
}

bool Recorder::is_nested(const at::Tensor& t) const {
  return !nested.empty() && nested.count(t.unsafeGetTensorImpl()) != 0;
}

std::vector<at::Tensor> Recorder::nested_tensors() const {
  std::vector<at::Tensor> out;
  for (const auto& [impl, tensor] : nested) {
    out.push_back(tensor.given);
  }
  return out;
}

std::vector<at::Tensor> Recorder::alive() {
  std::vector<at::Tensor> out;
  std::unordered_set<c10::TensorImpl*> seen;
  for (auto& weak : made) {
    auto impl = weak.lock();
    if (impl && seen.insert(impl.get()).second) {
      out.emplace_back(std::move(impl));
    }
  }
  made.clear();
  return out;
}

std::vector<at::Generator> Recorder::generators() const {
  std::vector<at::Generator> out;
  for (const auto& n : nodes) {
    if (n->random()) {
      at::Generator g = generator_of(*n->call);
      if (std::find(out.begin(), out.end(), g) == out.end()) {
        out.push_back(std::move(g));
      }
    }
  }
  return out;
}

// ------------------------------------------------------------------- recording

ValueRef Recorder::value_of(const at::Tensor& t, const c10::OperatorHandle& op) {
  at::Tensor seen = without_wrapper(t);
  CaptureTensorImpl* c = as_capture(seen);
  if (c == nullptr) {
    if (!is_liftable(t)) {
      throw Unsupported(
          c10::str(
              op.schema().operator_name(),
              " gets ",
              unsupported_kind(t).empty() ? "a tensor of another kind" : unsupported_kind(t),
              ", which a graph cannot hold (at ",
              describe(current_source()),
              "): convert it to a dense tensor before the capture"));
    }
    // A tensor that an operator's own C++ code made while the capture ran.
    seen = without_wrapper(lift(t, /*constant=*/true));
    c = as_capture(seen);
  }
  if (c->recorder.get() != this) {
    throw Unsupported(
        c10::str(
            op.schema().operator_name(),
            " gets a tensor of another capture (at ",
            describe(current_source()),
            "): results of one capture can be used in another after a call of the graph"));
  }
  return c->value;
}

namespace {

// The values of the result do not depend on the values of the arguments.
bool reads_shape_only(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::new_empty",
      "aten::new_empty_strided",
      "aten::new_full",
      "aten::new_ones",
      "aten::new_zeros",
      "aten::empty_like",
      "aten::full_like",
      "aten::ones_like",
      "aten::zeros_like"};
  return names.count(name) != 0;
}

} // namespace

OperatorCall Recorder::parse(const c10::OperatorHandle& op, const Stack& stack, size_t begin) {
  const size_t count = op.schema().arguments().size();
  OperatorCall call{op, {}, {}, torch::lazy::hash_t(static_cast<int64_t>(count)), current_source()};
  call.arguments.resize(count);
  call.random = op.hasTag(at::Tag::nondeterministic_seeded);
  call.serial = static_cast<int64_t>(nodes.size());
  // Its workspace is there for a backward.
  call.grad_mode = op.schema().name() == "aten::mkldnn_rnn_layer" && c10::GradMode::is_enabled();
  if (call.grad_mode) {
    call.constants_hash = torch::lazy::HashCombine(call.constants_hash, torch::lazy::hash_t(1));
  }
  call.reads_generator = op.schema().name() == "torch_lazy_ext::get_rng_state" ||
      op.schema().name() == "torch_lazy_ext::initial_seed";
  const auto default_dtype = c10::typeMetaToScalarType(c10::get_default_dtype());
  if (default_dtype != default_dtype_) {
    call.default_dtype = default_dtype;
    call.constants_hash = torch::lazy::HashCombine(
        call.constants_hash, torch::lazy::hash_t(static_cast<int64_t>(default_dtype) + 1000));
  }
  call.collective = op.schema().name().rfind("_c10d_functional", 0) == 0;
  call.depends_on_input = call.random || call.collective;
  const bool reads_values = !reads_shape_only(op.schema().name());
  auto add = [&](Argument& a, const at::Tensor& t) {
    if (!t.defined()) {
      a.values.emplace_back();
      return;
    }
    const ValueRef v = value_of(t, op);
    call.operands.emplace_back(nodes[v.node], v.index);
    call.depends_on_input =
        call.depends_on_input || (reads_values && node(v.node).depends_on_input);
    call.depends_on_tangent =
        call.depends_on_tangent || (reads_values && node(v.node).depends_on_tangent);
    const auto& source = node(v.node).call;
    call.after_collective = call.after_collective ||
        (source.has_value() && (source->collective || source->after_collective));
    a.values.push_back(v);
  };
  for (size_t i = 0; i < count; ++i) {
    const IValue& v = stack[begin + i];
    Argument& a = call.arguments[i];
    if (const at::Tensor number = number_behind(v); number.defined()) {
      a.kind = v.isTensor() ? ArgKind::WrappedNumber : ArgKind::Number;
      add(a, number);
    } else if (
        v.isList() && std::any_of(v.toListRef().begin(), v.toListRef().end(), [](const IValue& e) {
          return e.isSymFloat();
        })) {
      a.kind = ArgKind::NumberList;
      c10::impl::GenericList constants = v.toList().copy();
      for (size_t k = 0; k < constants.size(); ++k) {
        const at::Tensor element = number_behind(constants.get(k));
        if (element.defined()) {
          add(a, element);
          constants.set(k, 1.0);
        } else {
          a.values.emplace_back();
        }
      }
      a.constant = std::move(constants);
      call.constants_hash =
          torch::lazy::HashCombine(call.constants_hash, hash_constant(a.constant));
    } else if (
        v.isTensor() && v.toTensor().defined() && is_wrapped_number(v.toTensor()) &&
        v.toTensor().scalar_type() == at::kBool) {
      // TorchScript makes a Scalar of a wrapped number, and takes no bool for one. Bool is
      // the lowest of types, so a plain tensor promotes alike.
      at::Tensor plain;
      {
        StandaloneGuard alone;
        plain = at::scalar_tensor(v.toTensor().item(), v.toTensor().options());
      }
      a.kind = ArgKind::Tensor;
      add(a, plain);
    } else if (
        v.isTensor() && v.toTensor().defined() &&
        !(is_wrapped_number(v.toTensor()) && as_capture(v.toTensor()) == nullptr)) {
      a.kind = ArgKind::Tensor;
      add(a, v.toTensor());
    } else if (v.isTensorList()) {
      a.kind = ArgKind::TensorList;
      for (const at::Tensor& t : v.toTensorVector()) {
        add(a, t);
      }
    } else if (v.isOptionalTensorList()) {
      a.kind = ArgKind::OptionalTensorList;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) {
        add(a, t.value_or(at::Tensor()));
      }
    } else {
      a.constant = v;
      if (v.isGenerator()) {
        auto real = generators_of_stand_ins.find(v.toGenerator().unsafeGetGeneratorImpl());
        if (real != generators_of_stand_ins.end()) {
          a.constant = real->second;
        }
      }
      call.constants_hash = torch::lazy::HashCombine(call.constants_hash, hash_constant(v));
    }
  }
  if (op.schema().is_mutable()) {
    // A fused optimizer writes to the gradients only to scale them.
    const auto scale = op.schema().argumentIndexWithName("grad_scale");
    const auto gradients = op.schema().argumentIndexWithName("grads");
    const bool unscaled = scale.has_value() && stack[begin + *scale].isNone();
    for (size_t i = 0; i < count; ++i) {
      if (unscaled && gradients == static_cast<int>(i)) {
        continue;
      }
      if (call.arguments[i].kind != ArgKind::Constant &&
          op.schema().is_mutable({c10::SchemaArgType::input, i})) {
        call.mutated.push_back(i);
      }
    }
  }
  return call;
}

void Recorder::note_forced_fallback(const OperatorCall& call) {
  const std::string& forced = torch::lazy::getLTCForceFallback();
  const c10::FunctionSchema& schema = call.op.schema();
  if (forced.empty() || forced != schema.name()) {
    return;
  }
  const std::string full = c10::toString(schema.operator_name());
  for (auto& [name, count, where] : fallbacks) {
    if (name == full) {
      ++count;
      return;
    }
  }
  fallbacks.emplace_back(full, 1, describe(call.source));
}

c10::Device Recorder::device_of(const OperatorCall& call) {
  c10::Device device = c10::kCPU;
  call.for_each_value([&](const ValueRef& v) {
    if (device.type() == c10::kCPU) {
      device = meta_of(v).device;
    }
  });
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    const Argument& a = call.arguments[i];
    if (is_device_argument(call.op.schema().arguments()[i]) && a.constant.isDevice()) {
      device = a.constant.toDevice();
    }
  }
  return device;
}

namespace {

Outputs
outputs_of(const OperatorCall& call, Stack results, c10::Device device, const std::string& where) {
  Outputs out;
  auto add = [&](const at::Tensor& t) {
    TensorMeta m;
    if (t.defined()) {
      const std::string kind = unsupported_kind(t);
      if (!kind.empty()) {
        throw Unsupported(
            c10::str(
                call.op.schema().operator_name(),
                " makes ",
                kind,
                ", which a graph cannot hold (at ",
                where,
                "): keep this part outside of the captured program"));
      }
      m = TensorMeta::of(t);
      m.device = device;
    } else {
      m.defined = false;
    }
    out.metas.push_back(std::move(m));
    out.values.push_back(t);
  };
  for (const IValue& v : results) {
    if (v.isTensor()) {
      out.list_lengths.push_back(-1);
      add(v.toTensor());
    } else if (v.isTensorList()) {
      const auto list = v.toTensorVector();
      out.list_lengths.push_back(static_cast<int64_t>(list.size()));
      for (const at::Tensor& t : list) {
        add(t);
      }
    } else {
      out.list_lengths.push_back(-2);
      out.plain.push_back(v);
    }
  }
  return out;
}

} // namespace

namespace {

// Returns nothing and writes nothing: the operator exists to raise on bad data.
bool is_check(const OperatorCall& call) {
  return call.op.schema().returns().empty() && !call.op.schema().is_mutable();
}

} // namespace

namespace {

bool is_not_implemented(const std::exception& e) {
  if (dynamic_cast<const c10::NotImplementedError*>(&e) != nullptr) {
    return true;
  }
  const auto* python = dynamic_cast<const python_error*>(&e);
  if (python == nullptr || python->type == nullptr) {
    return false;
  }
  pybind11::gil_scoped_acquire gil;
  return PyErr_GivenExceptionMatches(python->type, PyExc_NotImplementedError) != 0;
}

// PyTorch's tag is for an operator, and says of all its calls what is true of some.
bool sizes_depend_on_data(Recorder& recorder, const OperatorCall& call) {
  if (!call.op.hasTag(at::Tag::dynamic_output_shape)) {
    return false;
  }
  const std::string& name = call.op.schema().name();
  if (name == "aten::index") { // a mask selects as many elements as are true in it
    const std::vector<ValueRef>& indices = call.arguments[1].values;
    return std::any_of(indices.begin(), indices.end(), [&](const ValueRef& v) {
      const at::ScalarType dtype = v.node < 0 ? at::kLong : recorder.meta_of(v).dtype;
      return dtype != at::kLong && dtype != at::kInt;
    });
  }
  if (name == "aten::repeat_interleave") { // the sum of the repeats, unless the program names it
    return call.arguments.back().constant.isNone();
  }
  return true;
}

} // namespace

std::optional<Outputs> Recorder::infer(const OperatorCall& call, c10::Device device) {
  inference_failed_ = false;
  if (sizes_depend_on_data(*this, call) || call.op.hasTag(at::Tag::data_dependent_output) ||
      is_check(call)) {
    return std::nullopt;
  }
  if (call.op.schema().returns().empty() &&
      call.op.schema().name().rfind("aten::_fused_", 0) == 0) {
    // Some of them have no meta kernel. All that comes out is what they write to.
    Outputs out;
    for (size_t i : call.mutated) {
      const Argument& a = call.arguments[i];
      out.list_lengths.push_back(
          a.kind == ArgKind::Tensor ? -1 : static_cast<int64_t>(a.values.size()));
      for (const ValueRef& v : a.values) {
        out.metas.push_back(meta_of(v));
      }
    }
    return out;
  }
  const ShapeKey key =
      shape_key(call, device, [&](const ValueRef& v) -> const TensorMeta& { return meta_of(v); });
  if (auto known = shape_cache().find(key)) {
    return known;
  }
  Stack stack;
  stack.reserve(call.arguments.size());
  call.push(stack, [&](const ValueRef& v) { return meta_of(v).make_meta_tensor(); });
  for (size_t i = 0; i < call.arguments.size(); ++i) {
    if (is_device_argument(call.op.schema().arguments()[i]) &&
        (stack[i].isDevice() || call.operands.empty())) {
      stack[i] = c10::Device(c10::kMeta);
    }
  }
  std::vector<IValue> written;
  for (size_t i : call.mutated) {
    written.push_back(stack[i]);
  }
  Stack results;
  try {
    StandaloneGuard alone;
    call.op.callBoxed(&stack);
    results = std::move(stack);
  } catch (const std::exception& e) {
    if (!is_error(e)) {
      throw;
    }
    // No meta kernel, or the program's own mistake: the real operator decides, and
    // an error of the program leaves as the operator's own exception.
    inference_failed_ = !is_not_implemented(e);
    return std::nullopt;
  }
  results.insert(results.end(), written.begin(), written.end());
  Outputs out = outputs_of(call, std::move(results), device, describe(call.source));
  out.values.clear();
  if (!out.plain.empty()) {
    return out;
  }
  shape_cache().insert(key, out);
  return out;
}

std::string Recorder::error_on_zeros(const OperatorCall& call) {
  StandaloneGuard alone;
  Stack stack;
  call.push(stack, [&](const ValueRef& v) {
    const at::Tensor& value = node(v.node).values[v.index];
    return at::empty_strided(value.sizes(), value.strides(), value.options()).zero_();
  });
  try {
    call.op.callBoxed(&stack);
  } catch (const std::exception& e) {
    if (!is_error(e)) {
      throw;
    }
    return message_of(e);
  }
  return "";
}

Outputs Recorder::observe(const OperatorCall& call, c10::Device device) {
  // A node of its own, so that random operators draw in their turn.
  auto n = std::make_shared<GenericNode>(call, std::vector<TensorMeta>{}, std::vector<int64_t>{});
  call.for_each_value([&](const ValueRef& v) { materialize(v); });
  Stack results;
  if (call.random) {
    n->id = static_cast<int64_t>(nodes.size());
    n->metas.resize(1);
    nodes.push_back(n);
    try {
      materialize({n->id, 0});
    } catch (...) {
      nodes.pop_back();
      throw;
    }
    nodes.pop_back();
    // Random operators give tensors only.
    for (const at::Tensor& t : n->values) {
      results.emplace_back(t);
    }
  } else {
    try {
      StandaloneGuard alone;
      results = run(call);
    } catch (const std::exception& e) {
      eager_raised = true;
      if (!is_error(e)) {
        throw;
      }
      // The program may catch the error, and go on because of it. What shape inference and
      // zeros run into too depends on no values.
      if (!inference_failed_ || message_of(e) != error_on_zeros(call)) {
        call.for_each_value([&](const ValueRef& v) { add_value_guard(v, materialize(v)); });
      }
      throw;
    }
  }
  return outputs_of(call, std::move(results), device, describe(call.source));
}

// ---------------------------------------------------------- numbers drawn again

int64_t Recorder::random_position() const {
  return position_ < 0 ? static_cast<int64_t>(drawn_.size()) : position_;
}

void Recorder::seek(int64_t position) {
  position_ = position == static_cast<int64_t>(drawn_.size()) ? -1 : position;
}

namespace {

// Random operators that read no values of their tensor: `bernoulli` has an overload that does.
bool draws_by_shape(const c10::OperatorName& name) {
  static const std::unordered_set<std::string> names = {
      "aten::bernoulli.p",
      "aten::rand_like",
      "aten::randn_like",
      "aten::randint_like",
      "aten::uniform",
      "aten::normal_functional"};
  return names.count(c10::toString(name)) != 0;
}

} // namespace

GenericNode* Recorder::drawn_again(const OperatorCall& call) {
  if (position_ < 0 || !call.random || call.reads_generator ||
      generator_of(call) != at::detail::getDefaultCPUGenerator()) {
    return nullptr;
  }
  GenericNode& before = node(drawn_[position_]);
  bool same = before.call->op == call.op && before.call->constants_hash == call.constants_hash &&
      before.call->operands.size() == call.operands.size() && call.mutated.empty();
  for (size_t i = 0; same && i < call.operands.size(); ++i) {
    // Equal hashes are equal computations on the same inputs. A reentrant checkpoint computes again
    // on detached inputs, and what is drawn in the place of a tensor depends on its shape alone.
    const auto meta = [](const torch::lazy::Output& o) -> const TensorMeta& {
      return static_cast<const GenericNode*>(o.node)->metas[o.index];
    };
    same = before.call->operands[i].hash() == call.operands[i].hash() ||
        (draws_by_shape(call.op.operator_name()) &&
         meta(before.call->operands[i]).sizes == meta(call.operands[i]).sizes &&
         meta(before.call->operands[i]).strides == meta(call.operands[i]).strides &&
         meta(before.call->operands[i]).dtype == meta(call.operands[i]).dtype);
  }
  if (!same) {
    throw Unsupported(
        c10::str(
            "the program puts the random number generator back to an earlier state, and then ",
            call.op.operator_name(),
            " draws other numbers from it than were drawn before (at ",
            describe(call.source),
            "): draw the same ones again, or pass a torch.Generator for each"));
  }
  seek(position_ + 1);
  return &before;
}

// ----------------------------------------------------------------- verification

void Recorder::learn(const OperatorCall& call, c10::Device device, const Outputs& real) {
  const ShapeKey key =
      shape_key(call, device, [&](const ValueRef& v) -> const TensorMeta& { return meta_of(v); });
  Outputs learned = real;
  learned.values.clear();
  shape_cache().insert(key, learned);
}

namespace {

enum class Agreement { Full, Strides, Sizes };

// Strides: these differ, or the dtypes; those of empty tensors decide nothing. Sizes: some of these
// differ, or what there is at all.
Agreement compare(const std::vector<TensorMeta>& real, const std::vector<TensorMeta>& inferred) {
  if (real.size() != inferred.size()) {
    return Agreement::Sizes;
  }
  bool same = true;
  bool sizes_agree = true;
  for (size_t k = 0; k < real.size(); ++k) {
    const TensorMeta& a = real[k];
    const TensorMeta& b = inferred[k];
    if (a.defined != b.defined || a.sizes != b.sizes) {
      sizes_agree = false;
      continue;
    }
    if (!a.defined) {
      continue;
    }
    same = same && a.dtype == b.dtype && a.conj == b.conj && a.neg == b.neg;
    const bool empty = std::find(a.sizes.begin(), a.sizes.end(), 0) != a.sizes.end();
    same = same && (empty || a.strides == b.strides);
  }
  return !sizes_agree ? Agreement::Sizes : same ? Agreement::Full : Agreement::Strides;
}

} // namespace

Checked Recorder::run_checked(
    const std::vector<ValueRef>& roots,
    int64_t begin,
    const std::vector<ValueRef>& given,
    const std::vector<at::Tensor>& values,
    int64_t all_before) {
  const int64_t count = static_cast<int64_t>(nodes.size());
  std::vector<int64_t> last_use(count, -1);
  std::vector<char> live(count, 0); // the graph holds it
  for (const ValueRef& r : roots) {
    last_use[r.node] = count;
    live[r.node] = 1;
  }
  for (int64_t i = count - 1; i >= begin; --i) {
    if (node(i).pinned()) {
      live[i] = 1;
    }
    if (live[i] != 0 || i < all_before) {
      last_use[i] = std::max(last_use[i], i);
    }
    if (last_use[i] >= 0 && node(i).call) {
      node(i).call->for_each_value([&](const ValueRef& v) {
        last_use[v.node] = std::max(last_use[v.node], i);
        live[v.node] |= live[i];
      });
    }
  }
  std::vector<std::vector<int64_t>> dead_after(count);
  for (int64_t i = 0; i < count; ++i) {
    node(i).values.clear();
    if (last_use[i] >= 0 && last_use[i] < count) {
      dead_after[last_use[i]].push_back(i);
    }
  }
  // As a replay runs, so that views of the inputs share their version counters, and without a cast
  // that no node is.
  c10::AutoGradMode no_grad(false);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  for (size_t k = 0; k < given.size(); ++k) {
    if (given[k].node < 0) {
      continue; // a view of another input
    }
    GenericNode& n = node(given[k].node);
    n.values.resize(n.metas.size());
    n.values[given[k].index] = values[k];
  }
  Checked result;
  result.complete = true;
  running = -1;
  bool communicated = false;
  for (int64_t i = begin; i < count; ++i) {
    GenericNode& n = node(i);
    if (last_use[i] < 0) {
      continue;
    }
    if (n.call) {
      running = i;
      std::vector<int64_t> bumps;
      Stack results = run(*n.call, &bumps);
      for (const CustomWrite& w : custom_writes) {
        if (w.node == i) {
          result.bumps[w.storage] += bumps[w.position] - w.counted;
        }
      }
      n.values = tensors_of(results);
      const Outputs real =
          outputs_of(*n.call, std::move(results), device_of(*n.call), describe(n.call->source));
      const auto agrees = live[i] != 0 ? compare(real.metas, n.metas) : Agreement::Full;
      // Sizes that depend on data are guarded; others the meta kernel had wrong.
      if (agrees == Agreement::Strides || (agrees == Agreement::Sizes && !n.sizes_from_data)) {
        learn(*n.call, device_of(*n.call), real);
        result.learned = true;
      }
      communicated = communicated || n.collective();
      if (agrees == Agreement::Strides && communicated) {
        // The other processes would wait for a second run: go on, with what was promised.
        for (size_t k = 0; k < n.values.size(); ++k) {
          const TensorMeta& m = n.metas[k];
          if (m.defined) {
            n.values[k] =
                at::empty_strided(m.sizes, m.strides, n.values[k].options().dtype(m.dtype))
                    .copy_(n.values[k]);
          }
        }
      } else if (agrees != Agreement::Full) {
        result.complete = false;
        break;
      }
    }
    for (int64_t d : dead_after[i]) {
      node(d).values.clear();
    }
  }
  for (const ValueRef& r : roots) {
    if (result.complete) {
      result.values.push_back(node(r.node).values[r.index]);
    }
  }
  for (auto& n : nodes) {
    n->values.clear();
  }
  return result;
}

void Recorder::record(const c10::OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  if (op.schema().name() == "aten::allclose") {
    auto at = [&](size_t i) -> const IValue& { return (*stack)[stack->size() - count + i]; };
    const bool close =
        at::isclose(
            at(0).toTensor(), at(1).toTensor(), at(2).toDouble(), at(3).toDouble(), at(4).toBool())
            .all()
            .item<bool>();
    torch::jit::drop(*stack, count);
    stack->emplace_back(close);
    return;
  }
  if (op.schema().name() == "aten::equal") {
    // The answer is guarded, not the operands: it is a node of the graph.
    const at::Tensor self = (*stack)[stack->size() - 2].toTensor();
    const at::Tensor other = (*stack)[stack->size() - 1].toTensor();
    if (self.scalar_type() == other.scalar_type()) {
      const bool same_sizes = self.sizes() == other.sizes();
      torch::jit::drop(*stack, count);
      stack->emplace_back(same_sizes && at::eq(self, other).all().item<bool>());
      return;
    }
  }
  if (op.schema().name() == "aten::view" && op.schema().overload_name() == "dtype") {
    // A write through a conjugate view leaves the bit on the new value of the viewed tensor, which
    // eager's does not have.
    IValue& self = (*stack)[stack->size() - count];
    if (self.toTensor().is_conj() || self.toTensor().is_neg()) {
      self = at::resolve_neg(at::resolve_conj(self.toTensor()));
    }
  }
  OperatorCall call = parse(op, *stack, stack->size() - count);
  note_forced_fallback(call);
  if (GenericNode* before = drawn_again(call)) {
    push_outputs(stack, count, *before, {}, {}, call.source);
    return;
  }
  const c10::Device device = device_of(call);
  std::optional<Outputs> inferred = infer(call, device);
  const bool observed = !inferred.has_value();
  if (observed && call.collective) {
    throw Unsupported(
        c10::str(
            op.schema().operator_name(),
            " says only by running what it gives (at ",
            describe(call.source),
            "), and no collective runs while a program is captured: call it outside of the "
            "program"));
  }
  Outputs out = observed ? observe(call, device) : std::move(*inferred);
  if (verify_layouts && !observed && out.plain.empty() && !call.collective &&
      !call.after_collective) {
    Outputs real = observe(call, device);
    if (compare(real.metas, out.metas) != Agreement::Full) {
      learn(call, device, real);
      out = std::move(real);
    }
    out.values = std::move(real.values);
  }
  if ((out.metas.empty() && !out.plain.empty()) || is_check(call)) {
    // A number or a flag about tensors. What depends on data is guarded.
    if (observed) {
      call.for_each_value([&](const ValueRef& v) { add_value_guard(v, materialize(v)); });
    }
    torch::jit::drop(*stack, count);
    for (IValue& v : out.plain) {
      stack->push_back(std::move(v));
    }
    return;
  }

  if (call.operands.empty() && out.metas.size() == 1 && out.metas[0].defined) {
    // A factory without a dtype takes the default dtype of this moment.
    for (size_t i = 0; i < count; ++i) {
      if (op.schema().arguments()[i].name() == "dtype" && call.arguments[i].constant.isNone()) {
        call.arguments[i].constant = IValue(static_cast<int64_t>(out.metas[0].dtype));
      }
    }
  }
  const bool guarded = observed && call.depends_on_input;
  const SourceLocation source = call.source;
  const std::vector<size_t> mutated = call.mutated;
  auto n = std::make_shared<GenericNode>(
      std::move(call), std::move(out.metas), std::move(out.list_lengths));
  n->id = static_cast<int64_t>(nodes.size());
  n->values = std::move(out.values);
  n->sizes_from_data = guarded;
  nodes.push_back(n);
  if (n->random() && !n->call->reads_generator &&
      generator_of(*n->call) == at::detail::getDefaultCPUGenerator()) {
    drawn_.push_back(n->id);
  }
  if (!mutated.empty()) {
    last_write = n->id;
  }
  if (guarded) {
    for (size_t i = 0; i < n->metas.size(); ++i) {
      if (n->metas[i].defined) {
        guards.push_back(
            {Guard::Kind::Sizes, {n->id, static_cast<int64_t>(i)}, {}, n->metas[i].sizes, source});
      }
    }
  }
  push_outputs(stack, count, *n, mutated, std::move(out.plain), source);
}

// Puts the outputs of a node in the place of its arguments.
void Recorder::push_outputs(
    Stack* stack,
    size_t count,
    GenericNode& n,
    const std::vector<size_t>& mutated,
    std::vector<IValue> plain_values,
    const SourceLocation& source) {
  // In the middle of functionalization the caller wraps the results itself.
  const bool wrap =
      !c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::Functionalize) ||
      !mutated.empty();
  const Stack arguments(stack->end() - static_cast<int64_t>(count), stack->end());
  torch::jit::drop(*stack, count);
  int64_t index = 0;
  auto take = [&](bool wrapped) {
    const ValueRef v{n.id, index++};
    return meta_of(v).defined ? make_tensor(v, wrapped) : at::Tensor();
  };
  const size_t returns = n.list_lengths.size() - mutated.size();
  size_t plain = 0;
  for (size_t r = 0; r < returns; ++r) {
    if (n.list_lengths[r] == -2) {
      stack->push_back(plain_values[plain++]);
      continue;
    }
    if (n.list_lengths[r] < 0) {
      stack->emplace_back(take(wrap));
      continue;
    }
    c10::List<at::Tensor> list;
    for (int64_t i = 0; i < n.list_lengths[r]; ++i) {
      list.push_back(take(wrap));
    }
    stack->emplace_back(std::move(list));
  }
  auto write = [&](const at::Tensor& argument) {
    at::Tensor value = take(/*wrapped=*/false);
    if (!fi::isFunctionalTensor(argument)) {
      throw Unsupported(
          c10::str(
              n.call->op.schema().operator_name(),
              " writes to its argument where functionalization cannot follow it (at ",
              describe(source),
              "): call it outside of transforms, on plain tensors"));
    }
    fi::replace_(argument, value);
    fi::commit_update(argument);
    fi::sync(argument);
  };
  for (size_t i : mutated) {
    if (arguments[i].isTensor()) {
      write(arguments[i].toTensor());
    } else {
      for (const at::Tensor& t : arguments[i].toTensorVector()) {
        write(t);
      }
    }
  }
}

} // namespace tle
