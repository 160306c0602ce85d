// Stage "record": every operator of a running capture becomes a GenericNode.
//
// Two dispatch keys serve a capture, both switched on for the capturing thread
// only: DeferredInit, above autograd, replaces the user's eager tensors by their
// twins; Fake, below functionalization, records the operator. Both keys are kept by
// PyTorch for out-of-tree modes of this kind, and its own tensor constructors
// switch them off where they write to memory.
#include "record.h"

#include <ATen/EmptyTensor.h>
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/Functions.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/WrapDimUtils.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/lazy/core/config.h>
#include <torch/csrc/lazy/ts_backend/ts_lowering_context.h>
#include <torch/library.h>

#include <pybind11/pybind11.h>

namespace tle {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using torch::jit::Stack;

namespace {

thread_local Recorder* current_recorder = nullptr;

constexpr DispatchKeySet capture_keys{DispatchKey::Fake, DispatchKey::DeferredInit};

// What has to be out of the way when an operator runs for itself (on meta or on
// real tensors) in the middle of a program: the capture, functionalization,
// autograd, functorch and every Python mode.
const DispatchKeySet bystander_keys = capture_keys | c10::autograd_dispatch_keyset |
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

// Runs an operator alone; restores every thread-local on the way out.
class StandaloneGuard {
 public:
  StandaloneGuard()
      : exclude_(bystander_keys),
        grad_(false),
        torch_function_(at::impl::PythonTorchFunctionTLS::get_disabled_state()),
        recorder_(current_recorder) {
    at::impl::PythonTorchFunctionTLS::set_disabled_state(
        at::impl::TorchFunctionDisabledState::ALL_DISABLED);
    current_recorder = nullptr;
  }
  ~StandaloneGuard() {
    current_recorder = recorder_;
    at::impl::PythonTorchFunctionTLS::set_disabled_state(torch_function_);
  }
  StandaloneGuard(const StandaloneGuard&) = delete;
  StandaloneGuard& operator=(const StandaloneGuard&) = delete;

 private:
  c10::impl::ExcludeDispatchKeyGuard exclude_;
  c10::AutoGradMode grad_;
  at::impl::TorchFunctionDisabledState torch_function_;
  Recorder* recorder_;
};

bool is_wrapped_number(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->is_wrapped_number();
}

at::Tensor strip_functional(const at::Tensor& t) {
  if (at::functionalization::impl::isFunctionalTensor(t)) {
    at::functionalization::impl::sync(t);
    return at::functionalization::impl::from_functional_tensor(t);
  }
  return t;
}

torch::lazy::hash_t hash_constant(const IValue& v) {
  using torch::lazy::Hash;
  using torch::lazy::MHash;
  auto tag = [](int k) { return torch::lazy::hash_t(static_cast<int64_t>(k)); };
  if (v.isNone()) {
    return tag(1);
  }
  if (v.isInt()) {
    return torch::lazy::HashCombine(tag(2), torch::lazy::hash_t(v.toInt()));
  }
  if (v.isDouble()) {
    // By bits: 0.1 and its neighbour differ, -0.0 and 0.0 differ, nan equals itself.
    const double d = v.toDouble();
    return torch::lazy::HashCombine(tag(3), torch::lazy::DataHash(&d, sizeof(d)));
  }
  if (v.isBool()) {
    return torch::lazy::HashCombine(tag(4), tag(v.toBool() ? 1 : 0));
  }
  if (v.isComplexDouble()) {
    const auto c = v.toComplexDouble();
    return torch::lazy::HashCombine(tag(5), torch::lazy::DataHash(&c, sizeof(c)));
  }
  if (v.isString()) {
    const auto& s = v.toStringRef();
    return torch::lazy::HashCombine(tag(6), torch::lazy::DataHash(s.data(), s.size()));
  }
  if (v.isDevice()) {
    return torch::lazy::HashCombine(tag(7), tag(static_cast<int>(v.toDevice().type())));
  }
  if (v.isList()) {
    auto h = tag(8);
    for (const IValue& e : v.toListRef()) {
      h = torch::lazy::HashCombine(h, hash_constant(e));
    }
    return h;
  }
  if (v.isTensor() && v.toTensor().defined()) {
    return torch::lazy::HashCombine(
        tag(9),
        torch::lazy::hash_t(static_cast<int64_t>(
            reinterpret_cast<intptr_t>(v.toTensor().unsafeGetTensorImpl()))));
  }
  return tag(10);
}

} // namespace

// ---------------------------------------------------------------- TensorMeta

TensorMeta TensorMeta::of(const at::Tensor& t) {
  TensorMeta m;
  m.sizes = t.sizes().vec();
  m.strides = t.strides().vec();
  m.storage_offset = t.storage_offset();
  m.dtype = t.scalar_type();
  m.device = t.device();
  m.conj = t.is_conj();
  m.neg = t.is_neg();
  return m;
}

at::Tensor TensorMeta::make_meta_tensor() const {
  int64_t extent = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) {
      extent = 0;
      break;
    }
    extent += (sizes[i] - 1) * strides[i];
  }
  extent += storage_offset;
  at::Tensor t = at::Tensor(at::detail::empty_strided_meta({extent}, {1}, dtype));
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(sizes, strides, storage_offset);
  if (conj) {
    impl->_set_conj(true);
  }
  if (neg) {
    impl->_set_neg(true);
  }
  return t;
}

// ------------------------------------------------------------- capture tensor

CaptureTensorImpl::CaptureTensorImpl(
    std::shared_ptr<Recorder> recorder_,
    ValueRef value_,
    const TensorMeta& meta_)
    : c10::TensorImpl(
          DispatchKeySet(c10::computeDispatchKey(std::nullopt, std::nullopt, meta_.device)) |
              DispatchKeySet(DispatchKey::Fake),
          c10::scalarTypeToTypeMeta(meta_.dtype),
          meta_.device),
      recorder(std::move(recorder_)),
      value(value_),
      meta(meta_) {
  set_sizes_and_strides(meta.sizes, meta.strides, meta.storage_offset);
  if (meta.conj) {
    _set_conj(true);
  }
  if (meta.neg) {
    _set_neg(true);
  }
}

c10::intrusive_ptr<c10::TensorImpl> CaptureTensorImpl::shallow_copy_and_detach(
    const c10::VariableVersion& version_counter,
    bool allow_tensor_metadata_change) const {
  auto impl = c10::make_intrusive<CaptureTensorImpl>(recorder, value, meta);
  copy_tensor_metadata(this, impl.get(), version_counter, allow_tensor_metadata_change);
  return impl;
}

c10::intrusive_ptr<c10::TensorImpl> CaptureTensorImpl::shallow_copy_and_detach(
    c10::VariableVersion&& version_counter,
    bool allow_tensor_metadata_change) const {
  auto impl = c10::make_intrusive<CaptureTensorImpl>(recorder, value, meta);
  copy_tensor_metadata(this, impl.get(), std::move(version_counter), allow_tensor_metadata_change);
  return impl;
}

CaptureTensorImpl* as_capture(const at::Tensor& t) {
  if (!t.defined() || !t.unsafeGetTensorImpl()->key_set().has(DispatchKey::Fake)) {
    return nullptr;
  }
  return dynamic_cast<CaptureTensorImpl*>(t.unsafeGetTensorImpl());
}

// -------------------------------------------------------------------- the node

GenericNode::GenericNode(int64_t input_index_, const TensorMeta& meta)
    : TsNode(
          torch::lazy::OpKind::Get("lazy_tensors::lifted"),
          torch::lazy::Shape(meta.dtype, meta.sizes),
          1,
          torch::lazy::hash_t(input_index_)),
      kind(NodeKind::Input),
      input_index(input_index_) {
  metas.push_back(meta);
  list_lengths.push_back(-1);
  depends_on_input = true;
}

GenericNode::GenericNode(
    c10::OperatorHandle op,
    torch::lazy::OpList operands,
    std::vector<torch::lazy::Shape>&& shapes,
    size_t num_outputs,
    torch::lazy::hash_t constants_hash)
    : TsNode(
          torch::lazy::OpKind(c10::Symbol::fromQualString(op.schema().name())),
          operands,
          std::move(shapes),
          num_outputs,
          torch::lazy::HashCombine(
              constants_hash,
              torch::lazy::DataHash(
                  op.schema().overload_name().data(),
                  op.schema().overload_name().size()))),
      kind(NodeKind::Operator),
      handle(op) {}

// -------------------------------------------------------------------- recorder

Recorder::Recorder() {
  pybind11::gil_scoped_acquire gil;
  auto dirname = [](const char* module) {
    auto file = pybind11::module_::import(module).attr("__file__").cast<std::string>();
    return file.substr(0, file.find_last_of("/\\") + 1);
  };
  library_prefix = dirname("torch");
  own_prefix = dirname("torch_lazy_ext");
}

Recorder::~Recorder() {
  // Operands are strong references: the last node first, so that the chain never
  // unwinds by recursion.
  while (!nodes.empty()) {
    nodes.pop_back();
  }
  pybind11::gil_scoped_acquire gil;
  for (auto& [code, unused] : code_is_library) {
    Py_DECREF(reinterpret_cast<PyObject*>(code));
  }
}

Recorder* Recorder::current() {
  return current_recorder;
}

void Recorder::enter() {
  TORCH_CHECK(!entered_ && !finished, "a recorder serves one capture");
  TORCH_CHECK(current_recorder == nullptr, "a capture is already running on this thread");
  entered_ = true;
  current_recorder = this;
  previous_reapply_ = at::functionalization::impl::getFunctionalizationReapplyViewsTLS();
  at::functionalization::impl::setFunctionalizationReapplyViewsTLS(true);
  c10::impl::tls_set_dispatch_key_included(DispatchKey::Fake, true);
  c10::impl::tls_set_dispatch_key_included(DispatchKey::DeferredInit, true);
}

void Recorder::exit() {
  if (!entered_) {
    return;
  }
  entered_ = false;
  finished = true;
  current_recorder = nullptr;
  c10::impl::tls_set_dispatch_key_included(DispatchKey::Fake, false);
  c10::impl::tls_set_dispatch_key_included(DispatchKey::DeferredInit, false);
  at::functionalization::impl::setFunctionalizationReapplyViewsTLS(previous_reapply_);
}

Recorder::Resume::Resume(Recorder& recorder)
    : previous_(current_recorder),
      previous_reapply_(at::functionalization::impl::getFunctionalizationReapplyViewsTLS()) {
  current_recorder = &recorder;
  at::functionalization::impl::setFunctionalizationReapplyViewsTLS(true);
}

Recorder::Resume::~Resume() {
  current_recorder = previous_;
  at::functionalization::impl::setFunctionalizationReapplyViewsTLS(previous_reapply_);
}

SourceLocation Recorder::current_source() {
  pybind11::gil_scoped_acquire gil;
  SourceLocation loc;
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(frame);
  while (frame != nullptr) {
    PyCodeObject* code = PyFrame_GetCode(frame); // new reference
    auto it = code_is_library.find(code);
    if (it == code_is_library.end()) {
      const char* file = PyUnicode_AsUTF8(code->co_filename);
      const std::string_view name = file == nullptr ? std::string_view() : std::string_view(file);
      const bool library = name.substr(0, library_prefix.size()) == library_prefix ||
          name.substr(0, own_prefix.size()) == own_prefix;
      Py_INCREF(reinterpret_cast<PyObject*>(code));
      it = code_is_library.emplace(code, library).first;
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
  return std::string(file == nullptr ? "?" : file) + ":" + std::to_string(source.line);
}

torch::jit::SourceRange Recorder::source_range(const SourceLocation& source) {
  if (source.code == nullptr) {
    return {};
  }
  auto [it, fresh] = source_ranges.try_emplace({source.code, source.line});
  if (fresh) {
    // The range's text is the location itself: that is what a jit node gives back.
    std::string text = describe(source);
    const size_t length = text.size();
    it->second = torch::jit::SourceRange(
        std::make_shared<torch::jit::Source>(std::move(text)), 0, length);
  }
  return it->second;
}

bool Recorder::is_liftable(const at::Tensor& t) const {
  if (!t.defined() || is_wrapped_number(t) || as_capture(t) != nullptr) {
    return false;
  }
  auto* impl = t.unsafeGetTensorImpl();
  if (at::functionalization::impl::isFunctionalTensor(t) ||
      impl->key_set().has_any(c10::functorch_transforms_ks) || t.is_meta()) {
    return false;
  }
  return t.layout() == at::kStrided;
}

at::Tensor Recorder::make_tensor(ValueRef value, bool wrap_functional) {
  at::Tensor t = at::detail::make_tensor<CaptureTensorImpl>(
      shared_from_this(), value, node(value.node).metas[value.index]);
  if (wrap_functional) {
    t = at::functionalization::impl::to_functional_tensor(t);
  }
  return t;
}

at::Tensor Recorder::lift(const at::Tensor& tensor, bool constant) {
  auto found = input_by_impl.find(tensor.unsafeGetTensorImpl());
  if (found != input_by_impl.end()) {
    return inputs[found->second].twin;
  }
  const TensorMeta meta = TensorMeta::of(tensor);
  auto n = std::make_shared<GenericNode>(static_cast<int64_t>(inputs.size()), meta);
  n->id = static_cast<int64_t>(nodes.size());
  n->depends_on_input = !constant;
  n->values.push_back(tensor.detach());
  nodes.push_back(n);
  at::Tensor twin;
  {
    c10::impl::ExcludeDispatchKeyGuard guard(capture_keys);
    twin = make_tensor({n->id, 0}, /*wrap_functional=*/true);
    if (tensor.requires_grad()) {
      twin.requires_grad_(true);
    }
  }
  input_by_impl[tensor.unsafeGetTensorImpl()] = inputs.size();
  input_by_twin[twin.unsafeGetTensorImpl()] = inputs.size();
  inputs.push_back({tensor, twin, n->id, constant});
  return twin;
}

at::Tensor Recorder::twin_of(const at::Tensor& tensor) {
  return is_liftable(tensor) ? lift(tensor, /*constant=*/false) : tensor;
}

// ------------------------------------------------- values needed by the program

void Recorder::run_node(GenericNode& n) {
  Stack stack;
  stack.reserve(n.arguments.size());
  for (size_t i = 0; i < n.arguments.size(); ++i) {
    const Argument& a = n.arguments[i];
    switch (a.kind) {
      case ArgKind::Constant:
        stack.push_back(n.constants[i]);
        break;
      case ArgKind::Tensor:
        stack.emplace_back(node(a.values[0].node).values[a.values[0].index]);
        break;
      case ArgKind::TensorList:
        if (a.optional_elements) {
          c10::List<std::optional<at::Tensor>> list;
          for (const ValueRef& v : a.values) {
            list.push_back(
                v.node < 0 ? std::optional<at::Tensor>()
                           : std::optional<at::Tensor>(node(v.node).values[v.index]));
          }
          stack.emplace_back(std::move(list));
        } else {
          c10::List<at::Tensor> list;
          for (const ValueRef& v : a.values) {
            list.push_back(v.node < 0 ? at::Tensor() : node(v.node).values[v.index]);
          }
          stack.emplace_back(std::move(list));
        }
        break;
    }
  }
  n.handle->callBoxed(&stack);
  n.values.clear();
  for (const IValue& out : stack) {
    if (out.isTensor()) {
      n.values.push_back(out.toTensor());
    } else if (out.isTensorList()) {
      for (const at::Tensor& t : out.toTensorVector()) {
        n.values.push_back(t);
      }
    } else {
      n.values.emplace_back();
    }
  }
}

at::Tensor Recorder::materialize(ValueRef value) {
  GenericNode& target = node(value.node);
  if (target.values.empty()) {
    // What the value depends on and is not known yet; with one random node among
    // them, all earlier random nodes too, since they draw from the same stream.
    std::vector<char> needed(value.node + 1, 0);
    needed[value.node] = 1;
    int64_t last_random = -1;
    auto mark = [&](const GenericNode& n) {
      for (const Argument& a : n.arguments) {
        for (const ValueRef& v : a.values) {
          if (v.node >= 0 && node(v.node).values.empty()) {
            needed[v.node] = 1;
          }
        }
      }
    };
    for (int64_t i = value.node; i >= 0; --i) {
      GenericNode& n = node(i);
      if (!n.values.empty()) {
        needed[i] = 0;
        continue;
      }
      if (n.random && (needed[i] != 0 || last_random > i)) {
        needed[i] = 1;
        last_random = std::max(last_random, i);
      }
      if (needed[i] != 0) {
        mark(n);
      }
    }
    StandaloneGuard alone;
    auto generator = at::detail::getDefaultCPUGenerator();
    at::Tensor users_state;
    if (last_random >= 0) {
      users_state = generator.get_state();
      if (rng_state.defined()) {
        generator.set_state(rng_state);
      }
    }
    std::exception_ptr error;
    try {
      for (int64_t i = 0; i <= value.node; ++i) {
        if (needed[i] != 0) {
          run_node(node(i));
        }
      }
    } catch (...) {
      error = std::current_exception();
    }
    if (last_random >= 0) {
      rng_state = generator.get_state();
      generator.set_state(users_state);
    }
    if (error) {
      std::rethrow_exception(error);
    }
  }
  return target.values[value.index];
}

void Recorder::add_value_guard(ValueRef value, const at::Tensor& expected) {
  if (!node(value.node).depends_on_input) {
    return;
  }
  for (const Guard& g : guards) {
    if (g.kind == Guard::Kind::Value && g.value == value) {
      return;
    }
  }
  StandaloneGuard alone;
  guards.push_back({Guard::Kind::Value, value, expected.clone(), {}, {}});
  guards.back().source = current_source();
}

// ------------------------------------------------------------------- recording

namespace {

struct Parsed {
  std::vector<Argument> arguments;
  std::vector<IValue> constants;
  std::vector<torch::lazy::Value> operands;
  bool any_capture = false;
  bool any_eager = false; // a real tensor that is not a wrapped number
  int64_t device_arg = -1;
};

bool has_device_arg(const c10::FunctionSchema& schema, size_t i) {
  const auto& type = schema.arguments()[i].type();
  if (type->kind() == c10::TypeKind::DeviceObjType) {
    return true;
  }
  return type->kind() == c10::TypeKind::OptionalType &&
      type->expectRef<c10::OptionalType>().getElementType()->kind() ==
      c10::TypeKind::DeviceObjType;
}

} // namespace

void Recorder::record(const c10::OperatorHandle& op, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t nargs = schema.arguments().size();
  const size_t begin = stack->size() - nargs;

  auto ref_of = [&](const at::Tensor& t, torch::lazy::NodePtr* owner) -> ValueRef {
    CaptureTensorImpl* c = as_capture(t);
    if (c == nullptr) {
      // A tensor that an operator's own C++ code made while the capture ran.
      at::Tensor twin = lift(t, /*constant=*/true);
      c = as_capture(strip_functional(twin));
    }
    TORCH_CHECK(
        c->recorder.get() == this,
        "a tensor of another capture is used in this one (operator ",
        schema.operator_name(),
        ")");
    *owner = nodes[c->value.node];
    return c->value;
  };

  Parsed p;
  p.arguments.resize(nargs);
  p.constants.resize(nargs);
  torch::lazy::hash_t constants_hash(static_cast<int64_t>(nargs));
  for (size_t i = 0; i < nargs; ++i) {
    const IValue& v = (*stack)[begin + i];
    Argument& a = p.arguments[i];
    if (v.isTensor()) {
      const at::Tensor& t = v.toTensor();
      if (!t.defined()) {
        p.constants[i] = v;
      } else if (is_wrapped_number(t) && as_capture(t) == nullptr) {
        p.constants[i] = v;
      } else {
        torch::lazy::NodePtr owner;
        a.kind = ArgKind::Tensor;
        a.values.push_back(ref_of(t, &owner));
        p.operands.emplace_back(owner, a.values.back().index);
        continue;
      }
    } else if (v.isTensorList()) {
      a.kind = ArgKind::TensorList;
      for (const at::Tensor& t : v.toTensorVector()) {
        torch::lazy::NodePtr owner;
        if (!t.defined()) {
          a.values.emplace_back();
          continue;
        }
        a.values.push_back(ref_of(t, &owner));
        p.operands.emplace_back(owner, a.values.back().index);
      }
      continue;
    } else if (v.isOptionalTensorList()) {
      a.kind = ArgKind::TensorList;
      a.optional_elements = true;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) {
        torch::lazy::NodePtr owner;
        if (!t.has_value() || !t->defined()) {
          a.values.emplace_back();
          continue;
        }
        a.values.push_back(ref_of(*t, &owner));
        p.operands.emplace_back(owner, a.values.back().index);
      }
      continue;
    } else {
      p.constants[i] = v;
    }
    constants_hash = torch::lazy::HashCombine(constants_hash, hash_constant(p.constants[i]));
  }

  const std::string& forced = torch::lazy::getLTCForceFallback();
  const SourceLocation source = current_source();
  if (!forced.empty() && forced == schema.name()) {
    const std::string full = schema.overload_name().empty()
        ? schema.name()
        : schema.name() + "." + schema.overload_name();
    bool known = false;
    for (auto& [name, count, where] : fallbacks) {
      if (name == full) {
        ++count;
        known = true;
      }
    }
    if (!known) {
      fallbacks.emplace_back(full, 1, describe(source));
    }
  }

  const bool random = op.hasTag(at::Tag::nondeterministic_seeded);
  bool depends = random;
  for (const Argument& a : p.arguments) {
    for (const ValueRef& v : a.values) {
      depends = depends || (v.node >= 0 && node(v.node).depends_on_input);
    }
  }

  // --- shapes: the operator itself, on meta tensors
  std::vector<TensorMeta> metas;
  std::vector<int64_t> list_lengths;
  bool tensors_only = true;
  Stack results;
  c10::Device device = c10::kCPU;
  bool have_device = false;
  for (size_t i = 0; i < nargs; ++i) {
    for (const ValueRef& v : p.arguments[i].values) {
      if (v.node >= 0 && (!have_device || device.type() == c10::kCPU)) {
        device = node(v.node).metas[v.index].device;
        have_device = true;
      }
    }
  }
  for (size_t i = 0; i < nargs; ++i) {
    if (p.arguments[i].kind == ArgKind::Constant && has_device_arg(schema, i) &&
        p.constants[i].isDevice()) {
      device = p.constants[i].toDevice();
    }
  }

  bool use_real = op.hasTag(at::Tag::dynamic_output_shape) ||
      op.hasTag(at::Tag::data_dependent_output);
  if (!use_real) {
    Stack meta_stack;
    meta_stack.reserve(nargs);
    for (size_t i = 0; i < nargs; ++i) {
      const Argument& a = p.arguments[i];
      auto meta_of = [&](const ValueRef& v) {
        return node(v.node).metas[v.index].make_meta_tensor();
      };
      if (a.kind == ArgKind::Tensor) {
        meta_stack.emplace_back(meta_of(a.values[0]));
      } else if (a.kind == ArgKind::TensorList && a.optional_elements) {
        c10::List<std::optional<at::Tensor>> list;
        for (const ValueRef& v : a.values) {
          list.push_back(v.node < 0 ? std::nullopt : std::optional<at::Tensor>(meta_of(v)));
        }
        meta_stack.emplace_back(std::move(list));
      } else if (a.kind == ArgKind::TensorList) {
        c10::List<at::Tensor> list;
        for (const ValueRef& v : a.values) {
          list.push_back(v.node < 0 ? at::Tensor() : meta_of(v));
        }
        meta_stack.emplace_back(std::move(list));
      } else if (has_device_arg(schema, i) && (p.constants[i].isDevice() || p.operands.empty())) {
        meta_stack.emplace_back(c10::Device(c10::kMeta));
      } else {
        meta_stack.push_back(p.constants[i]);
      }
    }
    try {
      StandaloneGuard alone;
      op.callBoxed(&meta_stack);
      results = std::move(meta_stack);
    } catch (const std::exception&) {
      // No meta kernel, or the program's own mistake: the real operator decides, and
      // an error of the program leaves as the operator's own exception.
      use_real = true;
    }
  }

  auto node_ptr = [&](size_t num_outputs, std::vector<torch::lazy::Shape>&& shapes) {
    auto n = std::make_shared<GenericNode>(
        op, p.operands, std::move(shapes), num_outputs, constants_hash);
    n->arguments = std::move(p.arguments);
    n->constants = std::move(p.constants);
    n->source = source;
    n->random = random;
    n->depends_on_input = depends;
    return n;
  };

  std::shared_ptr<GenericNode> n;
  if (use_real) {
    n = node_ptr(0, {});
    n->id = static_cast<int64_t>(nodes.size());
    nodes.push_back(n);
    try {
      // materialize() of a node without outputs: run it for its results.
      std::vector<ValueRef> operands;
      for (const Argument& a : n->arguments) {
        for (const ValueRef& v : a.values) {
          if (v.node >= 0) {
            materialize(v);
          }
        }
      }
      Stack real_stack;
      for (size_t i = 0; i < nargs; ++i) {
        const Argument& a = n->arguments[i];
        if (a.kind == ArgKind::Tensor) {
          real_stack.emplace_back(node(a.values[0].node).values[a.values[0].index]);
        } else if (a.kind == ArgKind::TensorList && a.optional_elements) {
          c10::List<std::optional<at::Tensor>> list;
          for (const ValueRef& v : a.values) {
            list.push_back(
                v.node < 0 ? std::nullopt
                           : std::optional<at::Tensor>(node(v.node).values[v.index]));
          }
          real_stack.emplace_back(std::move(list));
        } else if (a.kind == ArgKind::TensorList) {
          c10::List<at::Tensor> list;
          for (const ValueRef& v : a.values) {
            list.push_back(v.node < 0 ? at::Tensor() : node(v.node).values[v.index]);
          }
          real_stack.emplace_back(std::move(list));
        } else {
          real_stack.push_back(n->constants[i]);
        }
      }
      StandaloneGuard alone;
      op.callBoxed(&real_stack);
      results = std::move(real_stack);
    } catch (...) {
      nodes.pop_back();
      throw;
    }
    nodes.pop_back();
  }

  std::vector<at::Tensor> real_values;
  for (const IValue& out : results) {
    auto add = [&](const at::Tensor& t) {
      TORCH_CHECK_NOT_IMPLEMENTED(
          !t.defined() || t.layout() == at::kStrided,
          schema.operator_name(),
          " makes a tensor of layout ",
          t.layout(),
          ", which a graph cannot hold");
      TensorMeta m;
      if (t.defined()) {
        m = TensorMeta::of(t);
        m.device = device;
      }
      metas.push_back(std::move(m));
      real_values.push_back(t);
    };
    if (out.isTensor()) {
      list_lengths.push_back(-1);
      add(out.toTensor());
    } else if (out.isTensorList()) {
      const auto list = out.toTensorVector();
      list_lengths.push_back(static_cast<int64_t>(list.size()));
      for (const at::Tensor& t : list) {
        add(t);
      }
    } else {
      tensors_only = false;
    }
  }
  if (!tensors_only) {
    // A number or a flag about tensors. What depends on data is guarded.
    if (use_real) {
      const Argument& first = n->arguments[0];
      for (const Argument& a : n->arguments) {
        for (const ValueRef& v : a.values) {
          if (v.node >= 0) {
            add_value_guard(v, materialize(v));
          }
        }
      }
      (void)first;
    }
    torch::jit::drop(*stack, nargs);
    for (IValue& out : results) {
      stack->push_back(std::move(out));
    }
    return;
  }

  std::vector<torch::lazy::Shape> shapes;
  shapes.reserve(metas.size());
  for (const TensorMeta& m : metas) {
    shapes.emplace_back(m.dtype, m.sizes);
  }
  if (n) {
    p.arguments = std::move(n->arguments);
    p.constants = std::move(n->constants);
  }
  // TSLoweringContext wants one LTC output per lowered value: a Tensor[] return is
  // unpacked, so outputs are counted as tensors.
  n = node_ptr(std::max<size_t>(metas.size(), 1), std::move(shapes));
  n->metas = metas;
  n->list_lengths = list_lengths;
  n->id = static_cast<int64_t>(nodes.size());
  if (use_real) {
    n->values = real_values;
  }
  nodes.push_back(n);
  if (use_real && depends) {
    for (size_t i = 0; i < metas.size(); ++i) {
      guards.push_back(
          {Guard::Kind::Sizes, {n->id, static_cast<int64_t>(i)}, {}, metas[i].sizes, source});
    }
  }

  const bool wrap =
      !c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::Functionalize);
  torch::jit::drop(*stack, nargs);
  size_t k = 0;
  for (const IValue& out : results) {
    auto take = [&](bool defined) {
      const size_t index = k++;
      return defined ? make_tensor({n->id, static_cast<int64_t>(index)}, wrap) : at::Tensor();
    };
    if (out.isTensor()) {
      stack->emplace_back(take(out.toTensor().defined()));
    } else {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : out.toTensorVector()) {
        list.push_back(take(t.defined()));
      }
      stack->emplace_back(std::move(list));
    }
  }
}

// -------------------------------------------------------------------- dispatch

namespace {

template <class F>
void for_each_tensor(Stack* stack, size_t nargs, F&& f) {
  const size_t begin = stack->size() - nargs;
  for (size_t i = 0; i < nargs; ++i) {
    IValue& v = (*stack)[begin + i];
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

void record_kernel(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t nargs = schema.arguments().size();
  bool any_capture = false;
  bool any_tensor = false;
  for_each_tensor(stack, nargs, [&](const at::Tensor& t) {
    any_tensor = any_tensor || t.defined();
    any_capture = any_capture || as_capture(t) != nullptr;
  });
  Recorder* recorder = current_recorder;
  if (recorder == nullptr) {
    TORCH_CHECK(
        !any_capture,
        "a tensor that belongs to a finished capture was used by ",
        schema.operator_name(),
        ": the program kept it somewhere outside its results");
  }
  bool factory = false;
  if (recorder != nullptr && !any_tensor) {
    for (size_t i = 0; i < nargs; ++i) {
      if (has_device_arg(schema, i)) {
        const IValue& v = (*stack)[stack->size() - nargs + i];
        factory = v.isNone() || v.toDevice().type() != c10::kMeta;
      }
    }
  }
  if (any_capture || factory) {
    recorder->record(op, stack);
    return;
  }
  c10::impl::ExcludeDispatchKeyGuard guard(DispatchKey::Fake);
  op.redispatchBoxed(
      ks & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::Fake), stack);
}

void lift_kernel(const c10::OperatorHandle& op, DispatchKeySet ks, Stack* stack) {
  Recorder* recorder = current_recorder;
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
  for (size_t i = 0; i < nargs; ++i) {
    IValue& v = (*stack)[begin + i];
    if (v.isTensor()) {
      if (v.toTensor().defined()) {
        v = IValue(recorder->twin_of(v.toTensor()));
      }
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) {
        list.push_back(recorder->twin_of(t));
      }
      v = IValue(std::move(list));
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) {
        list.push_back(
            t.has_value() ? std::optional<at::Tensor>(recorder->twin_of(*t)) : std::nullopt);
      }
      v = IValue(std::move(list));
    }
  }
  op.callBoxed(stack);
  if (op.schema().is_mutable()) {
    // `w.mul_(2)` returns `w`: the user's own tensor, not its twin.
    for (IValue& v : *stack) {
      if (v.isTensor()) {
        auto it = recorder->input_by_twin.find(v.toTensor().unsafeGetTensorImpl());
        if (it != recorder->input_by_twin.end()) {
          v = IValue(recorder->inputs[it->second].tensor);
        }
      }
    }
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
