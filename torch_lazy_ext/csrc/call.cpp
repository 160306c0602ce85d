#include "call.h"

#include "autograd.h"
#include "generators.h"
#include "interrupts.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind.h>

#include <algorithm>
#include <cstring>

namespace tle {

namespace {

py::object from(const char* module, const char* name) {
  return py::module_::import(module).attr(name);
}

py::list list_of(const std::vector<at::Tensor>& tensors) {
  py::list out(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(tensors[i]));
  }
  return out;
}

std::vector<at::Tensor> tensors_of(const py::handle& list) {
  std::vector<at::Tensor> out;
  for (const py::handle& t : py::reinterpret_borrow<py::sequence>(list)) {
    out.push_back(t.is_none() ? at::Tensor() : at::Tensor(THPVariable_Unpack(t.ptr())));
  }
  return out;
}

// Lets other threads run Python for as long as it lives.
class NoGil {
 public:
  NoGil() : state_(PyEval_SaveThread()) {}
  ~NoGil() { PyEval_RestoreThread(state_); }
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;

 private:
  PyThreadState* state_;
};

const void* memory_of(const at::Tensor& t) {
  return t.storage().data();
}

} // namespace

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) {
    return false;
  }
  if (a.numel() == 1 && !a.is_conj() && !a.is_neg() && !b.is_conj() && !b.is_neg() &&
      a.device().is_cpu() && b.device().is_cpu()) {
    return std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.itemsize()) == 0;
  }
  StandaloneGuard alone;
  const at::Tensor x = a.resolve_conj().resolve_neg().contiguous();
  const at::Tensor y = b.resolve_conj().resolve_neg().contiguous();
  return x.numel() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

bool DataGuard::holds(const at::Tensor& value) const {
  return is_value ? same_bits(value, expected) : value.sizes() == expected_sizes;
}

py::list Call::containers() {
  py::list out;
  for (PyObject* container : arguments.containers) {
    out.append(container == nullptr ? py::none() : py::reinterpret_borrow<py::object>(container));
  }
  if (!kwargs) {
    kwargs = py::dict();
    out[arguments.containers.size() - 1] = kwargs;
  }
  return out;
}

// ------------------------------------------------------------------- setting up

void Variant::set_arguments(
    const py::object& spec,
    const py::list& leaves,
    const std::vector<int64_t>& weak,
    const py::object& names,
    Placement read) {
  Keep k = keep();
  arguments_.emplace(spec, leaves, weak, names, read, k);
}

void Variant::set_surroundings(const Surroundings& now, const py::list& function_modes) {
  surroundings_ = now;
  for (const py::handle& mode : function_modes) {
    keep().append(mode);
    function_modes_.push_back(mode.ptr());
  }
}

void Variant::add_value(const py::object& slot, const py::object& expected) {
  Keep k = keep();
  state_.value(slot, expected, k);
}

void Variant::add_size(const py::object& container, Py_ssize_t size) {
  Keep k = keep();
  state_.size(container, size, k);
}

void Variant::add_order(const py::object& dict, const py::list& keys) {
  Keep k = keep();
  state_.order(dict, keys, k);
}

void Variant::add_tied(const py::object& slot, const py::object& other) {
  Keep k = keep();
  const int64_t handle = state_.handle(slot, k);
  tied_.emplace_back(handle, state_.handle(other, k));
}

void Variant::set_identities(
    const std::vector<std::pair<int64_t, py::object>>& objects,
    const std::vector<int64_t>& known) {
  has_identities_ = true;
  for (const auto& [position, object] : objects) {
    keep().append(object);
    objects_[position] = object.ptr();
  }
  for (int64_t id : known) {
    known_.insert(reinterpret_cast<PyObject*>(id));
  }
}

bool Variant::has_identities(const Arguments& arguments) const {
  for (size_t i = 0; i < arguments.containers.size(); ++i) {
    PyObject* container = arguments.containers[i];
    auto expected = objects_.find(static_cast<int64_t>(i));
    if (expected == objects_.end() ? known_.count(container) != 0 : expected->second != container) {
      return false;
    }
  }
  return true;
}

void Variant::lift_argument(int64_t leaf) {
  lifted_.push_back({Source::Kind::Argument, leaf});
}

void Variant::lift_slot(const py::object& slot, const py::object& tensor, Placement read) {
  Keep k = keep();
  k.append(py::type::of(tensor));
  lifted_.push_back(
      {Source::Kind::State,
       state_.handle(slot, k),
       at::Tensor(),
       false,
       TensorGuard(tensor.ptr(), read)});
}

void Variant::add_tensor(const py::object& slot, const py::object& tensor, Placement read) {
  Keep k = keep();
  k.append(py::type::of(tensor));
  seen_tensors_.emplace_back(state_.handle(slot, k), TensorGuard(tensor.ptr(), read));
}

void Variant::lift_number(const py::object& slot, int64_t element) {
  Keep k = keep();
  Source source{Source::Kind::Number, state_.handle(slot, k)};
  source.element = element;
  lifted_.push_back(std::move(source));
}

void Variant::lift_fixed(const std::optional<at::Tensor>& tensor, bool made) {
  lifted_.push_back({Source::Kind::Fixed, -1, tensor.value_or(at::Tensor()), made});
}

void Variant::lift_storage() {
  lifted_.push_back({Source::Kind::Storage});
}

void Variant::lift_gradient(int64_t leaf) {
  lifted_.push_back({Source::Kind::Gradient, leaf});
}

void Variant::add_gradient_guard(
    int64_t leaf,
    const py::object& gradient,
    Placement read,
    int64_t index) {
  std::optional<TensorGuard> guard;
  if (!gradient.is_none()) {
    guard.emplace(gradient.ptr(), read);
  }
  gradients_.push_back({leaf, std::move(guard), index});
}

void Variant::add_same_object(const py::object& slot, int64_t leaf) {
  Keep k = keep();
  same_objects_.emplace_back(state_.handle(slot, k), leaf);
}

void Variant::add_hooks(int64_t index, const py::list& functions) {
  std::vector<PyObject*> hooks;
  for (const py::handle& kind : functions) {
    for (const py::handle& function : py::cast<py::list>(kind)) {
      keep().append(function);
      hooks.push_back(function.ptr());
    }
    hooks.push_back(nullptr);
  }
  hooks_.emplace_back(index, std::move(hooks));
}

void Variant::add_group(
    int64_t base,
    std::vector<std::pair<int64_t, int64_t>> members,
    size_t nbytes) {
  groups_.push_back({base, std::move(members), nbytes});
}

void Variant::set_written(const std::vector<int64_t>& indices) {
  written_ = indices;
  group_of_.assign(lifted_.size(), -1);
  for (const StorageGroup& g : groups_) {
    group_of_[g.base] = g.base;
    for (const auto& [index, offset] : g.members) {
      group_of_[index] = g.base;
    }
  }
}

void Variant::add_guard(DataGuard guard) {
  guards_.push_back(std::move(guard));
}

void Variant::set_program(const py::object& program) {
  if (py::isinstance<Program>(program)) {
    program_ = program.cast<std::shared_ptr<Program>>();
    runnable_ = nullptr;
    return;
  }
  keep().append(program); // alive for those that have weak references to it
  runnable_ = program.cast<std::shared_ptr<Runnable>>();
  program_ = nullptr;
}

py::object Variant::program() const {
  return program_ ? py::cast(program_) : py::cast(runnable_);
}

void Variant::set_native_finish(const std::vector<SimpleWrite>& writes, const py::tuple& result) {
  native_finish_ = true;
  writes_ = writes;
  result_ = parse_result(result);
}

Result Variant::parse_result(const py::tuple& tree) {
  const auto kind = tree[0].cast<std::string>();
  Result out{Result::Kind::Constant};
  if (kind == "root" || kind == "lifted") {
    out.kind = kind == "root" ? Result::Kind::Root : Result::Kind::Lifted;
    out.index = tree[1].cast<int64_t>();
    return out;
  }
  if (kind == "constant") {
    keep().append(tree[1]);
    out.object = py::object(tree[1]).ptr();
    return out;
  }
  out.kind = kind == "tuple" ? Result::Kind::Tuple
      : kind == "list"       ? Result::Kind::List
                             : Result::Kind::Dict;
  for (const py::handle& child : tree[1]) {
    out.children.push_back(parse_result(py::cast<py::tuple>(child)));
  }
  if (out.kind == Result::Kind::Dict) {
    for (const py::handle& key : tree[2]) {
      keep().append(key);
      out.keys.push_back(key.ptr());
    }
  }
  return out;
}

// --------------------------------------------------------------------- matching

// As many as there were are on. A mode is another program each, and its attributes are guarded like
// the program's; the contexts of one device are alike.
bool Variant::has_function_modes() const {
  const py::object device_context = from("torch.utils._device", "DeviceContext");
  for (size_t i = 0; i < function_modes_.size(); ++i) {
    const py::handle mode = at::impl::PythonTorchFunctionTLS::get_stack_at(static_cast<int64_t>(i))
                                ->ptr(getPyInterpreter());
    const py::handle expected = function_modes_[i];
    const bool as_before = py::type::handle_of(mode).is(device_context)
        ? py::object(mode.attr("device")).equal(expected)
        : mode.is(expected);
    if (!as_before) {
      return false;
    }
  }
  return true;
}

// What is read of Python alone, whatever the arguments are.
bool Variant::has_state() {
  if (!namespaces_.check() || !state_.check()) {
    return false;
  }
  for (const auto& [handle, guard] : seen_tensors_) {
    PyObject* tensor = state_.current(handle);
    if (!THPVariable_Check(tensor) || !guard.check(tensor)) {
      return false;
    }
  }
  return std::all_of(tied_.begin(), tied_.end(), [&](const auto& tied) {
    return state_.current(tied.first) == state_.current(tied.second);
  });
}

std::optional<Call> Variant::match(const py::handle& args, const py::handle& kwargs) {
  const Surroundings now = Surroundings::now();
  if (stale || !(now == surroundings_)) {
    return std::nullopt;
  }
  if (now.function_modes > 0 && !has_function_modes()) {
    return std::nullopt;
  }
  Call call;
  call.args = py::reinterpret_borrow<py::object>(args);
  call.kwargs = py::reinterpret_borrow<py::object>(kwargs);
  if (!arguments_->match(args.ptr(), kwargs.ptr(), call.arguments) || !has_state()) {
    return std::nullopt;
  }
  if (has_identities_ && !has_identities(call.arguments)) {
    return std::nullopt;
  }
  for (const auto& [handle, leaf] : same_objects_) {
    if (state_.current(handle) != call.arguments.leaves[leaf]) {
      return std::nullopt;
    }
  }
  // Tensors at once, while nothing else can run: slots are read without holding them.
  call.tensors.reserve(lifted_.size());
  for (const Source& s : lifted_) {
    switch (s.kind) {
      case Source::Kind::Argument:
        call.tensors.push_back(THPVariable_Unpack(call.arguments.leaves[s.index]));
        break;
      case Source::Kind::State: {
        PyObject* tensor = state_.current(s.index);
        if (!s.guard->check(tensor)) {
          return std::nullopt;
        }
        call.tensors.push_back(THPVariable_Unpack(tensor));
        break;
      }
      case Source::Kind::Number: {
        PyObject* value = state_.current(s.index);
        if (s.element >= 0) {
          if (value == nullptr || !PyTuple_CheckExact(value) ||
              PyTuple_GET_SIZE(value) <= s.element) {
            return std::nullopt;
          }
          value = PyTuple_GET_ITEM(value, s.element);
        }
        if (value == nullptr || !PyFloat_CheckExact(value)) {
          return std::nullopt;
        }
        call.tensors.push_back(number(PyFloat_AS_DOUBLE(value)));
        break;
      }
      case Source::Kind::Fixed:
        call.tensors.push_back(s.tensor);
        break;
      case Source::Kind::Storage:
      case Source::Kind::Gradient:
        call.tensors.emplace_back();
        break;
    }
  }
  for (size_t i = 0; i < lifted_.size(); ++i) {
    if (lifted_[i].kind == Source::Kind::Gradient) {
      call.tensors[i] = call.tensors[lifted_[i].index].grad();
    }
  }
  for (const auto& [leaf, guard, index] : gradients_) {
    const at::Tensor& gradient = call.tensors[leaf].grad();
    if (guard ? !gradient.defined() || !guard->check(gradient) : gradient.defined()) {
      return std::nullopt;
    }
    if (index >= 0 && !gradient.is_same(call.tensors[index])) {
      return std::nullopt;
    }
  }
  for (const auto& [index, hooks] : hooks_) {
    const at::Tensor& t = call.tensors[index];
    const bool none = hooks.size() == std::count(hooks.begin(), hooks.end(), nullptr);
    if (!(none && has_no_hooks(t)) && hooks_of(t) != hooks) {
      return std::nullopt;
    }
  }
  return call;
}

// ---------------------------------------------------------------------- running

// Whether tensors share memory as they did: those of a group one storage, and what is
// written to none with any other.
bool Variant::gather(Call& call) {
  for (const StorageGroup& g : groups_) {
    const at::Tensor& first = call.tensors[g.members[0].first];
    for (const auto& [index, offset] : g.members) {
      const at::Tensor& other = call.tensors[index];
      if (memory_of(other) != memory_of(first) || other.storage().nbytes() != g.nbytes ||
          other.storage_offset() != offset) {
        return false;
      }
    }
    call.tensors[g.base] = whole_storage(first);
  }
  return written_.empty() || is_apart(call);
}

bool Variant::is_apart(const Call& call) const {
  // Storages that are written to, with the group that may share them.
  std::unordered_map<const void*, int64_t> owners;
  for (int64_t w : written_) {
    const void* memory = memory_of(call.tensors[w]);
    if (memory != nullptr) {
      owners.try_emplace(memory, group_of_[w] >= 0 ? group_of_[w] : ~w);
    }
  }
  for (size_t i = 0; i < lifted_.size(); ++i) {
    if (lifted_[i].made) {
      continue;
    }
    auto found = owners.find(memory_of(call.tensors[i]));
    const int64_t own = group_of_[i] >= 0 ? group_of_[i] : ~static_cast<int64_t>(i);
    if (found != owners.end() && found->second != own) {
      return false;
    }
  }
  return !overlaps_in_part(call);
}

// Memory that another library owns (numpy) may lie in the middle of a storage.
bool Variant::overlaps_in_part(const Call& call) const {
  auto begin_of = [&](size_t i) { return static_cast<const char*>(memory_of(call.tensors[i])); };
  auto end_of = [&](size_t i) { return begin_of(i) + call.tensors[i].storage().nbytes(); };
  auto own_deleter = c10::GetCPUAllocator()->raw_deleter();
  for (size_t i = 0; i < lifted_.size(); ++i) {
    const at::Tensor& t = call.tensors[i];
    if (lifted_[i].made || !t.device().is_cpu() ||
        t.storage().data_ptr().get_deleter() == own_deleter) {
      continue;
    }
    const bool writes =
        std::find(written_.begin(), written_.end(), static_cast<int64_t>(i)) != written_.end();
    for (size_t k = 0; k < lifted_.size(); ++k) {
      if (!lifted_[k].made && begin_of(k) != begin_of(i) && begin_of(k) < end_of(i) &&
          begin_of(i) < end_of(k) &&
          (writes ||
           std::find(written_.begin(), written_.end(), static_cast<int64_t>(k)) !=
               written_.end())) {
        return true;
      }
    }
  }
  return false;
}

std::vector<at::Tensor> Variant::values(PyObject* self, const Call& call) {
  // The graph has its casts; around a part without any, eager would not cast either.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (checked && program_) {
    torch::jit::Stack stack;
    stack.reserve(parameters.size());
    for (int64_t p : parameters) {
      stack.emplace_back(call.tensors[p]);
    }
    {
      NoGil no_gil;
      program_->run(stack);
    }
    std::vector<at::Tensor> out;
    out.reserve(stack.size());
    for (c10::IValue& v : stack) {
      out.push_back(std::move(v).toTensor());
    }
    return in_place_of_roots(std::move(out));
  }
  if (!checked) {
    // Of all lifted tensors: this run looks also at what no result needs.
    return tensors_of(py::handle(self).attr("_first_values")(list_of(call.tensors)));
  }
  std::vector<at::Tensor> inputs;
  inputs.reserve(parameters.size());
  for (int64_t p : parameters) {
    inputs.push_back(call.tensors[p]);
  }
  return in_place_of_roots(runnable_->run(inputs));
}

std::vector<at::Tensor> Variant::in_place_of_roots(std::vector<at::Tensor> values) const {
  if (outputs.empty()) {
    return values;
  }
  std::vector<at::Tensor> out(num_roots);
  for (size_t k = 0; k < outputs.size(); ++k) {
    out[outputs[k]] = std::move(values[k]);
  }
  return out;
}

void Variant::raise_mismatch(const std::vector<at::Tensor>* observed) {
  const py::object type = from("torch_lazy_ext._replay", "_Mismatch");
  const py::object seen = observed == nullptr ? py::object(py::none()) : list_of(*observed);
  PyErr_SetObject(type.ptr(), type(seen).ptr());
}

bool Variant::check(const std::vector<at::Tensor>& values) {
  for (size_t i = 0; i < guards_.size(); ++i) {
    if (!guards_[i].holds(values[guards_[i].root])) {
      ++misses;
      std::vector<at::Tensor> observed;
      for (size_t k = 0; k <= i; ++k) {
        observed.push_back(values[guards_[k].root]);
      }
      raise_mismatch(&observed);
      return false;
    }
  }
  return true;
}

PyObject* Variant::run(PyObject* self, Call& call) {
  if (!is_whole()) {
    return run(self, call, false);
  }
  const Hold hold;
  return run(self, call, true);
}

PyObject* Variant::run(PyObject* self, Call& call, bool whole) {
  if (!gather(call)) {
    raise_mismatch(nullptr);
    return nullptr;
  }
  RandomStates drawn(generators);
  auto take_back = [&] { drawn.put_back(); };
  std::vector<at::Tensor> values;
  try {
    if (precheck_) {
      torch::jit::Stack stack;
      for (int64_t p : precheck_parameters_) {
        stack.emplace_back(call.tensors[p]);
      }
      precheck_->run(stack);
      take_back();
      std::vector<at::Tensor> guarded;
      for (c10::IValue& v : stack) {
        guarded.push_back(std::move(v).toTensor());
      }
      if (!check(guarded)) {
        return nullptr;
      }
    }
    // A first run may be ended by a signal, while the graph is compiled.
    if (checked && (precheck_ || guards_.empty())) {
      // The program is going to set them, whatever they are: nothing needs them any more.
      for (int64_t leaf : overwritten) {
        call.tensors[leaf].mutable_grad().reset();
      }
    }
    values = this->values(self, call);
  } catch (py::error_already_set& e) {
    take_back();
    if (communicates || e.matches(from("torch_lazy_ext._replay", "_KEPT_ERRORS")) ||
        !e.matches(PyExc_Exception)) {
      e.restore();
      return nullptr;
    }
    // The program itself decides whether this is its error.
    ++misses;
    raise_mismatch(nullptr);
    return nullptr;
  } catch (const std::exception& e) {
    take_back();
    if (communicates || !is_error(e)) {
      throw; // the others have gone on; or it is none of the program's errors
    }
    ++misses;
    raise_mismatch(nullptr);
    return nullptr;
  }
  if (!precheck_ && !check(values)) {
    take_back();
    return nullptr;
  }
  ++hits;
  if (!native_finish_) {
    const py::list containers = call.containers(); // makes kwargs where there are none
    try {
      py::object result = py::handle(self).attr("_finish")(
          containers,
          list_of(call.tensors),
          list_of(values),
          list_of(drawn.states()),
          call.args,
          call.kwargs);
      return result.release().ptr();
    } catch (py::error_already_set&) {
      if (!whole) {
        --hits;
        take_back(); // the handler of a signal has raised, and nothing has happened yet
      }
      throw;
    }
  }
  if (!writes_.empty()) {
    write_back(call, values);
  }
  return make(result_, call, values);
}

void Variant::write_back(const Call& call, const std::vector<at::Tensor>& values) const {
  c10::AutoGradMode no_grad(false);
  std::vector<int64_t> versions;
  for (const SimpleWrite& w : writes_) {
    const at::Tensor& t = call.tensors[w.index];
    versions.push_back(t.is_inference() ? -1 : static_cast<int64_t>(t._version()));
  }
  for (const SimpleWrite& w : writes_) {
    call.tensors[w.index].copy_(values[w.root]);
  }
  for (size_t i = 0; i < writes_.size(); ++i) {
    if (versions[i] >= 0) {
      c10::VariableVersion counter =
          call.tensors[writes_[i].index].unsafeGetTensorImpl()->version_counter();
      counter.set_version(versions[i] + writes_[i].bumps);
    }
  }
}

PyObject*
Variant::make(const Result& result, const Call& call, const std::vector<at::Tensor>& values) const {
  auto child = [&](size_t i) {
    PyObject* made = make(result.children[i], call, values);
    if (made == nullptr) {
      throw py::error_already_set();
    }
    return made;
  };
  const size_t count = result.children.size();
  switch (result.kind) {
    case Result::Kind::Root:
      return THPVariable_Wrap(values[result.index]);
    case Result::Kind::Lifted:
      return THPVariable_Wrap(call.tensors[result.index]);
    case Result::Kind::Constant:
      return Py_NewRef(result.object);
    case Result::Kind::Tuple: {
      py::tuple out(count);
      for (size_t i = 0; i < count; ++i) {
        PyTuple_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), child(i));
      }
      return out.release().ptr();
    }
    case Result::Kind::List: {
      py::list out(count);
      for (size_t i = 0; i < count; ++i) {
        PyList_SET_ITEM(out.ptr(), static_cast<Py_ssize_t>(i), child(i));
      }
      return out.release().ptr();
    }
    case Result::Kind::Dict: {
      py::dict out;
      for (size_t i = 0; i < count; ++i) {
        auto value = py::reinterpret_steal<py::object>(child(i));
        if (PyDict_SetItem(out.ptr(), result.keys[i], value.ptr()) != 0) {
          throw py::error_already_set();
        }
      }
      return out.release().ptr();
    }
  }
  return nullptr;
}

// ---------------------------------------------------------------------- calling

namespace {

// The object behind a Python object of the type, which Python code may have derived from.
template <class T>
T* unwrap(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  return static_cast<T*>(instance->simple_value_holder[0]);
}

PyObject*
serve(PyObject* self, PyObject* args, PyObject* kwargs, PyObject* variant, PyObject* error) {
  static PyObject* name = PyUnicode_InternFromString("_serve");
  const py::object keywords =
      kwargs == nullptr ? py::dict() : py::reinterpret_borrow<py::object>(kwargs);
  return PyObject_CallMethodObjArgs(self, name, args, keywords.ptr(), variant, error, nullptr);
}

PyObject* caller_call(PyObject* self, PyObject* args, PyObject* kwargs) {
  try {
    return unwrap<Caller>(self)->call(self, args, kwargs);
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (python_error& e) {
    e.restore();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

// What any variant compares of tensors, integers and strings that are arguments themselves: other
// calls have, but for chance, another number, and equal calls the same. Never 0.
uint64_t signature_of(PyObject* args) {
  uint64_t out = static_cast<uint64_t>(PyTuple_GET_SIZE(args)) + 1;
  auto add = [&](uint64_t part) { out = (out ^ part) * 0x9E3779B97F4A7C15 + (out >> 29); };
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    PyObject* arg = PyTuple_GET_ITEM(args, i);
    if (!THPVariable_CheckExact(arg)) {
      const bool simple = PyLong_CheckExact(arg) || PyUnicode_CheckExact(arg);
      add(simple ? static_cast<uint64_t>(PyObject_Hash(arg)) : 1);
      continue;
    }
    const at::Tensor& t = THPVariable_Unpack(arg);
    if (t.is_nested()) {
      add(2);
      continue;
    }
    add(static_cast<uint64_t>(t.scalar_type()) + 3);
    for (const int64_t size : t.sizes()) {
      add(static_cast<uint64_t>(size));
    }
  }
  return out == 0 ? 1 : out;
}

} // namespace

void Caller::touch(PyObject* variant) {
  for (auto it = variants.begin(); it != variants.end(); ++it) {
    if (it->first == variant) {
      std::rotate(variants.begin(), it, it + 1);
      return;
    }
  }
}

PyObject* Caller::call(PyObject* self, PyObject* args, PyObject* kwargs) {
  if (Recorder::current() != nullptr) {
    // Part of the program that is captured: its calls run inline.
    const py::object program = py::handle(self).attr("_fn");
    return PyObject_Call(program.ptr(), args, kwargs);
  }
  if (eager_calls > 0) {
    --eager_calls;
    const py::object program = py::handle(self).attr("_fn");
    return PyObject_Call(program.ptr(), args, kwargs);
  }
  uint64_t signature = 0; // of this call, once the first variant has not fitted
  for (size_t i = 0; i < variants.size(); ++i) {
    // Held: another thread may drop it meanwhile.
    const auto held = py::reinterpret_borrow<py::object>(variants[i].first);
    Variant* variant = variants[i].second;
    if (i > 0 && variant->signature != 0) {
      signature = signature == 0 ? signature_of(args) : signature;
      if (variant->signature != signature) {
        continue;
      }
    }
    std::optional<Call> call = variant->match(args, kwargs);
    if (!call) {
      continue;
    }
    PyObject* result = variant->run(held.ptr(), *call);
    if (result != nullptr) {
      if (variant->signature == 0) {
        variant->signature = signature_of(args);
      }
      if (!variants.empty() && variants[0].second != variant) {
        touch(held.ptr());
      }
      return result;
    }
    py::error_already_set error; // takes Python's error
    if (is_interrupted(error) && !is_held()) {
      if (run_handlers() != 0) {
        throw py::error_already_set();
      }
      return serve(self, args, kwargs, Py_None, Py_None); // the call has not begun
    }
    if (!error.matches(from("torch_lazy_ext._replay", "_HANDLED_ERRORS"))) {
      throw error;
    }
    return serve(self, args, kwargs, held.ptr(), error.value().ptr());
  }
  return serve(self, args, kwargs, Py_None, Py_None);
}

void bind_call(py::module_& m) {
  py::class_<Surroundings>(m, "Surroundings").def_static("now", &Surroundings::now);
  py::class_<Placement>(m, "Placement")
      .def(
          py::init([](bool offset, bool view, bool leaf) { return Placement{offset, view, leaf}; }),
          py::arg("offset"),
          py::arg("view"),
          py::arg("leaf"));
  py::class_<Call>(m, "Call");
  py::class_<Variant>(m, "Variant")
      .def(py::init<py::list>())
      .def(
          "match",
          [](Variant& v, const py::tuple& args, const py::dict& kwargs) {
            return v.match(args, kwargs);
          },
          "The call, or None when it is not like the captured one in all but its data.")
      .def(
          "run",
          [](const py::object& self, Call& call) {
            PyObject* result = self.cast<Variant&>().run(self.ptr(), call);
            if (result == nullptr) {
              throw py::error_already_set();
            }
            return py::reinterpret_steal<py::object>(result);
          },
          "The program's result, with its effects.")
      .def(
          "has_state",
          &Variant::has_state,
          "Whether what it compares of Python, beside the arguments, is as it was.")
      .def_readwrite("hits", &Variant::hits)
      .def_readwrite("misses", &Variant::misses)
      .def_readwrite("_checked", &Variant::checked)
      .def_property("_program", &Variant::program, &Variant::set_program)
      .def("_set_arguments", &Variant::set_arguments)
      .def("_set_surroundings", &Variant::set_surroundings)
      .def("_add_value", &Variant::add_value)
      .def("_add_size", &Variant::add_size)
      .def("_add_order", &Variant::add_order)
      .def("_add_tensor", &Variant::add_tensor)
      .def("_set_identities", &Variant::set_identities)
      .def(
          "_add_code",
          [](Variant& v,
             const py::object& code,
             const py::dict& globals,
             bool library,
             const py::anyset& skip,
             py::set types) {
            Keep k = v.keep();
            v.namespaces().code(code, globals, library, skip, types, k);
          })
      .def(
          "_add_names",
          [](Variant& v,
             const py::object& owner,
             const py::anyset& names,
             const py::anyset& places,
             bool all_keys) {
            Keep k = v.keep();
            v.namespaces().names(owner, names, places, all_keys, k);
          },
          py::arg("owner"),
          py::arg("names"),
          py::arg("places"),
          py::arg("all_keys") = false)
      .def(
          "_add_entry",
          [](Variant& v, const py::object& owner, const py::object& key) {
            Keep k = v.keep();
            v.namespaces().entry(owner.ptr(), key.ptr(), k);
          })
      .def(
          "_add_function",
          [](Variant& v, const py::object& function, bool held) {
            Keep k = v.keep();
            v.namespaces().function(function, held, k);
          },
          py::arg("function"),
          py::arg("held") = true)
      .def(
          "_add_type_of",
          [](Variant& v, const py::object& object, bool held) {
            Keep k = v.keep();
            v.namespaces().type_of(object, held, k);
          },
          py::arg("object"),
          py::arg("held") = true)
      .def(
          "_add_bases",
          [](Variant& v, const py::object& type) {
            Keep k = v.keep();
            v.namespaces().bases(type, k);
          })
      .def(
          "_add_content",
          [](Variant& v, const py::anyset& set) {
            Keep k = v.keep();
            v.namespaces().content(set, k);
          })
      .def(
          "_add_getter",
          [](Variant& v, const py::object& getter, const py::object& value) {
            Keep k = v.keep();
            v.namespaces().getter(getter, value, k);
          })
      .def("_add_tied", &Variant::add_tied)
      .def("_lift_argument", &Variant::lift_argument)
      .def("_lift_slot", &Variant::lift_slot)
      .def("_lift_number", &Variant::lift_number)
      .def("_set_precheck", &Variant::set_precheck)
      .def_readwrite("_stale", &Variant::stale)
      .def_readwrite("_outputs", &Variant::outputs)
      .def_readwrite("_num_roots", &Variant::num_roots)
      .def_readwrite("_overwritten", &Variant::overwritten)
      .def_readwrite("_communicates", &Variant::communicates)
      .def_readwrite("_has_effects", &Variant::has_effects)
      .def_readwrite("_runs_python", &Variant::runs_python)
      .def("_lift_fixed", &Variant::lift_fixed)
      .def("_lift_storage", &Variant::lift_storage)
      .def("_lift_gradient", &Variant::lift_gradient)
      .def("_add_gradient_guard", &Variant::add_gradient_guard)
      .def("_add_same_object", &Variant::add_same_object)
      .def("_add_hooks", &Variant::add_hooks)
      .def("_add_group", &Variant::add_group)
      .def("_set_written", &Variant::set_written)
      .def(
          "_add_value_guard",
          [](Variant& v, int64_t root, const at::Tensor& expected) {
            v.add_guard({root, true, expected, {}});
          })
      .def(
          "_add_size_guard",
          [](Variant& v, int64_t root, std::vector<int64_t> sizes) {
            v.add_guard({root, false, at::Tensor(), std::move(sizes)});
          })
      .def(
          "_set_native_finish",
          [](Variant& v,
             const std::vector<std::tuple<int64_t, int64_t, int64_t>>& writes,
             const py::tuple& result) {
            std::vector<SimpleWrite> list;
            for (const auto& [index, root, bumps] : writes) {
              list.push_back({index, root, bumps});
            }
            v.set_native_finish(list, result);
          })
      .def_readwrite("_parameters", &Variant::parameters)
      .def_readwrite("_generators", &Variant::generators);
  py::class_<Caller>(m, "Caller", py::custom_type_setup([](PyHeapTypeObject* type) {
                       type->ht_type.tp_call = &caller_call;
                     }))
      .def(py::init<>())
      .def_readwrite("_calls_left", &Caller::eager_calls)
      .def(
          "_set_variants",
          [](Caller& c, const py::list& variants) {
            c.variants.clear();
            for (const py::handle& v : variants) {
              c.variants.emplace_back(v.ptr(), v.cast<Variant*>());
            }
          })
      .def(
          "_variants",
          [](const Caller& c) {
            py::list out;
            for (const auto& [object, variant] : c.variants) {
              out.append(py::handle(object));
            }
            return out;
          },
          "Most recently used first.")
      .def("_touch", [](Caller& c, const py::object& variant) { c.touch(variant.ptr()); });
}

} // namespace tle
