#include "guards.h"

#include "autograd.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/gil_safe_call_once.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace tle {

namespace {

bool is_unchanged(const std::pair<DictClock, uint64_t>& clock) {
  return clock.second != 0 && clock.first.now() == clock.second;
}

// Borrowed references to what lives as long as the process. Not a static of C++, for whose lock
// another thread would wait with the GIL that the import needs.
template <class Tag>
PyObject* once(const char* module, const char* name) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<PyObject*> found;
  return found
      .call_once_and_store_result(
          [&] { return py::object(py::module_::import(module).attr(name)).release().ptr(); })
      .get_stored();
}

PyObject* missing() {
  return once<struct Missing>("torch_lazy_ext._lift", "MISSING");
}

void throw_if(bool error) {
  if (error) {
    throw py::error_already_set();
  }
}

// Borrowed, or null.
PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  throw_if(found == nullptr && PyErr_Occurred() != nullptr);
  return found;
}

} // namespace

bool is_simple(PyObject* value) {
  PyObject* types = once<struct SimpleTypes>("torch_lazy_ext._tree", "SIMPLE_TYPES");
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i) {
    if (PyTuple_GET_ITEM(types, i) == type) {
      return true;
    }
  }
  return false;
}

bool same(PyObject* a, PyObject* b) {
  if (a == b) {
    return true;
  }
  if (Py_TYPE(a) != Py_TYPE(b)) {
    return false;
  }
  if (PyLong_CheckExact(a) || PyUnicode_CheckExact(a)) {
    const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
    throw_if(equal < 0);
    return equal == 1;
  }
  PyObject* python = once<struct Same>("torch_lazy_ext._tree", "same");
  PyObject* result = PyObject_CallFunctionObjArgs(python, a, b, nullptr);
  throw_if(result == nullptr);
  const bool answer = result == Py_True;
  Py_DECREF(result);
  return answer;
}

// -------------------------------------------------------------------- tensors

TensorGuard::TensorGuard(PyObject* tensor, Placement read)
    : type_(Py_TYPE(tensor)),
      keys_(THPVariable_Unpack(tensor).key_set()),
      device_(THPVariable_Unpack(tensor).device()),
      dtype_(THPVariable_Unpack(tensor).dtype()) {
  const at::Tensor& t = THPVariable_Unpack(tensor);
  sizes_ = t.sizes();
  strides_ = t.strides();
  requires_grad_ = t.requires_grad();
  offset_ = read.offset ? t.storage_offset() : -1;
  view_ = read.view ? static_cast<int8_t>(t.is_view()) : -1;
  leaf_ = read.leaf ? static_cast<int8_t>(t.is_leaf()) : -1;
}

bool TensorGuard::check(PyObject* object) const {
  return Py_TYPE(object) == type_ && check(THPVariable_Unpack(object));
}

bool TensorGuard::check(const at::Tensor& t) const {
  const c10::TensorImpl& impl = *t.unsafeGetTensorImpl();
  return impl.key_set() == keys_ && impl.dtype() == dtype_ && impl.sizes() == sizes_ &&
      impl.strides() == strides_ && impl.requires_grad() == requires_grad_ &&
      impl.device() == device_ && (offset_ < 0 || impl.storage_offset() == offset_) &&
      (view_ < 0 || t.is_view() == (view_ == 1)) && (leaf_ < 0 || t.is_leaf() == (leaf_ == 1)) &&
      !has_tangent(t);
}

// --------------------------------------------------------------- surroundings

Surroundings Surroundings::now() {
  const bool autocast = at::autocast::is_autocast_enabled(at::kCPU);
  return {
      c10::GradMode::is_enabled(),
      c10::InferenceMode::is_enabled(),
      autocast,
      at::globalContext().deterministicAlgorithms(),
      at::autocast::get_autocast_dtype(at::kCPU),
      c10::get_default_dtype(),
      at::impl::PythonTorchFunctionTLS::stack_len(),
      c10::impl::TorchDispatchModeTLS::stack_len()};
}

bool Surroundings::operator==(const Surroundings& o) const {
  return grad_mode == o.grad_mode && inference_mode == o.inference_mode && autocast == o.autocast &&
      deterministic == o.deterministic && autocast_dtype == o.autocast_dtype &&
      default_dtype == o.default_dtype && function_modes == o.function_modes &&
      dispatch_modes == o.dispatch_modes;
}

// ------------------------------------------------------------------ arguments

ArgumentGuard::ArgumentGuard(
    const py::object& spec,
    const py::list& leaves,
    const std::vector<int64_t>& weak,
    const py::object& names,
    Placement read,
    Keep& keep) {
  if (!names.is_none()) {
    names_ = names.ptr();
    keep.append(names);
  }
  // The pair of args and kwargs, which is of our own making.
  const auto children = py::cast<py::tuple>(py::cast<py::tuple>(spec)[1]);
  args_ = parse(children[0], keep);
  kwargs_ = parse(children[1], keep);
  std::unordered_map<PyObject*, int64_t> position;
  for (const py::handle& leaf : leaves) {
    Leaf guard;
    if (THPVariable_Check(leaf.ptr())) {
      guard.tensor.emplace(leaf.ptr(), read);
      guard.first =
          position.try_emplace(leaf.ptr(), static_cast<int64_t>(leaves_.size())).first->second;
      keep.append(py::type::of(leaf));
      for (const auto& [name, value] : py::cast<py::dict>(leaf.attr("__dict__"))) {
        if (may_be_read(name.ptr())) {
          guard.attributes.emplace_back(name.ptr(), value.ptr());
          keep.append(name);
          keep.append(value);
        }
      }
    } else {
      guard.value = leaf.ptr();
      guard.weak =
          std::find(weak.begin(), weak.end(), static_cast<int64_t>(leaves_.size())) != weak.end();
      keep.append(leaf);
    }
    leaves_.push_back(std::move(guard));
  }
}

bool ArgumentGuard::may_be_read(PyObject* name) const {
  const int found = names_ == nullptr ? 1 : PySet_Contains(names_, name);
  throw_if(found < 0);
  return found == 1;
}

bool ArgumentGuard::has_attributes(PyObject* tensor, const Leaf& leaf) const {
  PyObject** place = _PyObject_GetDictPtr(tensor);
  PyObject* dict = place == nullptr ? nullptr : *place;
  if (dict == nullptr || PyDict_GET_SIZE(dict) == 0) {
    return leaf.attributes.empty();
  }
  PyObject *name = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  size_t count = 0;
  while (PyDict_Next(dict, &position, &name, &value)) {
    count += may_be_read(name) ? 1 : 0;
  }
  if (count != leaf.attributes.size()) {
    return false;
  }
  return std::all_of(leaf.attributes.begin(), leaf.attributes.end(), [&](const auto& expected) {
    PyObject* now = item(dict, expected.first);
    return now != nullptr && same(now, expected.second);
  });
}

ArgumentGuard::Node ArgumentGuard::parse(const py::handle& spec, Keep& keep) {
  Node node{Kind::Leaf};
  if (spec.is_none()) {
    node.index = parsed_++;
    return node;
  }
  if (py::isinstance<py::int_>(spec)) {
    node.kind = Kind::Again;
    node.index = spec.cast<int64_t>();
    return node;
  }
  const auto pair = py::cast<py::tuple>(spec);
  const py::object shape = pair[0];
  const py::object cls = shape.attr("cls");
  node.shape = shape.ptr();
  keep.append(shape);
  if (cls.ptr() == reinterpret_cast<PyObject*>(&PyTuple_Type)) {
    node.kind = Kind::Tuple;
  } else if (cls.ptr() == reinterpret_cast<PyObject*>(&PyList_Type)) {
    node.kind = Kind::List;
  } else if (
      cls.ptr() == reinterpret_cast<PyObject*>(&PyDict_Type) &&
      !shape.attr("has_tensor_keys").cast<bool>()) {
    node.kind = Kind::Dict;
    for (const py::handle& key : py::cast<py::tuple>(shape.attr("keys"))) {
      node.keys.push_back(key.ptr());
    }
  } else {
    node.kind = Kind::Other;
  }
  node.immutable = PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(cls.ptr()), &PyTuple_Type);
  for (const py::handle& child : py::cast<py::tuple>(pair[1])) {
    node.children.push_back(parse(child, keep));
  }
  return node;
}

bool ArgumentGuard::match(PyObject* args, PyObject* kwargs, Arguments& arguments) const {
  arguments.containers.push_back(nullptr); // the pair
  if (!match(args_, args, arguments)) {
    return false;
  }
  if (kwargs == nullptr) {
    if (!kwargs_.children.empty()) {
      return false;
    }
    arguments.containers.push_back(nullptr);
  } else if (!match(kwargs_, kwargs, arguments)) {
    return false;
  }
  // Which arguments are one tensor object matters: the program saw them so.
  const auto& leaves = arguments.leaves;
  if (leaves.size() <= 16) {
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (leaves_[i].first < 0) {
        continue;
      }
      size_t first = 0;
      while (leaves[first] != leaves[i]) {
        ++first;
      }
      if (static_cast<int64_t>(first) != leaves_[i].first) {
        return false;
      }
    }
    return true;
  }
  std::unordered_map<PyObject*, int64_t> position;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const int64_t first = leaves_[i].first;
    if (first >= 0 &&
        position.try_emplace(leaves[i], static_cast<int64_t>(i)).first->second != first) {
      return false;
    }
  }
  return true;
}

bool ArgumentGuard::match_children(const Node& node, PyObject* const* values, Arguments& arguments)
    const {
  for (size_t i = 0; i < node.children.size(); ++i) {
    if (!match(node.children[i], values[i], arguments)) {
      return false;
    }
  }
  return true;
}

bool ArgumentGuard::match(const Node& node, PyObject* value, Arguments& arguments) const {
  auto& containers = arguments.containers;
  if (node.kind == Kind::Leaf) {
    const Leaf& leaf = leaves_[node.index];
    arguments.leaves.push_back(value);
    if (leaf.weak) {
      return PyWeakref_GET_OBJECT(leaf.value) == value;
    }
    return leaf.tensor ? leaf.tensor->check(value) && has_attributes(value, leaf)
                       : same(value, leaf.value);
  }
  if (node.kind == Kind::Again) {
    return containers[node.index] == value;
  }
  if (!node.immutable &&
      std::find(containers.begin(), containers.end(), value) != containers.end()) {
    return false; // was two containers at the capture
  }
  const auto count = static_cast<Py_ssize_t>(node.children.size());
  switch (node.kind) {
    case Kind::Tuple:
      if (!PyTuple_CheckExact(value) || PyTuple_GET_SIZE(value) != count) {
        return false;
      }
      containers.push_back(value);
      return match_children(node, &PyTuple_GET_ITEM(value, 0), arguments);
    case Kind::List: {
      if (!PyList_CheckExact(value) || PyList_GET_SIZE(value) != count) {
        return false;
      }
      containers.push_back(value);
      return match_children(node, reinterpret_cast<PyListObject*>(value)->ob_item, arguments);
    }
    case Kind::Dict: {
      if (!PyDict_CheckExact(value) || PyDict_GET_SIZE(value) != count) {
        return false;
      }
      containers.push_back(value);
      PyObject *key = nullptr, *item = nullptr;
      Py_ssize_t position = 0;
      for (size_t i = 0; PyDict_Next(value, &position, &key, &item); ++i) {
        if (!same(key, node.keys[i]) || !match(node.children[i], item, arguments)) {
          return false;
        }
      }
      return true;
    }
    default: {
      PyObject* parts = once<struct Parts>("torch_lazy_ext._tree", "parts");
      auto taken = py::reinterpret_steal<py::object>(PyObject_CallOneArg(parts, value));
      throw_if(taken.ptr() == nullptr);
      if (taken.is_none()) {
        return false;
      }
      PyObject* children = PyTuple_GET_ITEM(taken.ptr(), 1);
      const int equal =
          PyObject_RichCompareBool(PyTuple_GET_ITEM(taken.ptr(), 0), node.shape, Py_EQ);
      throw_if(equal < 0);
      if (equal == 0 || PyList_GET_SIZE(children) != count) {
        return false;
      }
      containers.push_back(value);
      arguments.made.push_back(std::move(taken));
      return match_children(node, reinterpret_cast<PyListObject*>(children)->ob_item, arguments);
    }
  }
}

// ---------------------------------------------------------------------- state

StateGuard::Dict& StateGuard::watch(PyObject* dict, Keep& keep) {
  auto [found, fresh] = dict_index_.try_emplace(dict, dicts_.size());
  if (fresh) {
    dicts_.push_back({dict});
    clocks_.emplace_back(DictClock(dict), 0);
    keep.append(py::handle(dict));
  }
  clocks_[found->second].second = all_clocks_ = 0; // more is asked of it than before
  return dicts_[found->second];
}

void StateGuard::add(const py::object& slot, Entry entry, Keep& keep) {
  PyObject* plain = once<struct PlainSlot>("torch_lazy_ext._lift", "Slot");
  const py::object owner = slot.attr("owner");
  const py::object key = slot.attr("key");
  entry.key = key.ptr();
  keep.append(slot); // which holds owner and key
  const bool is_plain = reinterpret_cast<PyObject*>(Py_TYPE(slot.ptr())) == plain;
  if (is_plain && PyDict_Check(owner.ptr())) {
    watch(owner.ptr(), keep).entries.push_back(entry);
    return;
  }
  Loose loose{Loose::Kind::Other, slot.ptr(), owner.ptr(), 0, entry};
  if (is_plain && PyCell_Check(owner.ptr())) {
    loose.kind = Loose::Kind::Cell;
  } else if (is_plain && PyList_Check(owner.ptr())) {
    loose.kind = Loose::Kind::List;
    loose.index = key.cast<Py_ssize_t>();
  } else if (is_plain && PyTuple_Check(owner.ptr()) && PyLong_CheckExact(key.ptr())) {
    loose.kind = Loose::Kind::Tuple;
    loose.index = key.cast<Py_ssize_t>();
  }
  loose_.push_back(loose);
}

void StateGuard::value(const py::object& slot, const py::object& expected, Keep& keep) {
  keep.append(expected);
  add(slot, {nullptr, expected.ptr() == missing() ? nullptr : expected.ptr(), -1}, keep);
}

void StateGuard::size(const py::object& container, Py_ssize_t size, Keep& keep) {
  if (PyDict_Check(container.ptr())) {
    watch(container.ptr(), keep).size = size;
  } else {
    keep.append(container);
    sizes_.emplace_back(container.ptr(), size);
  }
}

void StateGuard::order(const py::object& dict, const py::list& keys, Keep& keep) {
  keep.append(keys);
  std::vector<PyObject*> order;
  for (const py::handle& key : keys) {
    order.push_back(key.ptr());
  }
  if (PyODict_Check(dict.ptr())) {
    keep.append(dict);
    orders_.emplace_back(dict.ptr(), std::move(order));
  } else {
    watch(dict.ptr(), keep).keys = std::move(order);
  }
}

int64_t StateGuard::handle(const py::object& slot, Keep& keep) {
  const auto handle = static_cast<int64_t>(current_.size());
  current_.push_back(nullptr);
  add(slot, {nullptr, nullptr, handle}, keep);
  return handle;
}

bool StateGuard::check_entry(const Entry& entry, PyObject* now) {
  if (entry.handle >= 0) {
    current_[entry.handle] = now;
    return now != nullptr;
  }
  if (now == entry.expected) {
    return true;
  }
  if (now == nullptr || entry.expected == nullptr || !is_simple(entry.expected)) {
    return false;
  }
  called_python_ = true;
  return same(now, entry.expected);
}

bool StateGuard::is_key(PyObject* key, PyObject* expected) {
  if (key == expected) {
    return true;
  }
  if (!is_simple(expected)) {
    return false;
  }
  called_python_ = true;
  return same(key, expected);
}

bool StateGuard::has_order(const Dict& dict) {
  PyObject* key = nullptr;
  Py_ssize_t position = 0;
  for (PyObject* expected : dict.keys) {
    if (PyDict_Next(dict.dict, &position, &key, nullptr) == 0 || !is_key(key, expected)) {
      return false;
    }
  }
  return true;
}

bool StateGuard::has_order(PyObject* ordered_dict, const std::vector<PyObject*>& keys) {
  // Not the iterator of a subclass.
  const auto iterator = py::reinterpret_steal<py::object>(PyODict_Type.tp_iter(ordered_dict));
  throw_if(iterator.ptr() == nullptr);
  for (PyObject* expected : keys) {
    const auto key = py::reinterpret_steal<py::object>(PyIter_Next(iterator.ptr()));
    throw_if(PyErr_Occurred() != nullptr);
    if (key.ptr() == nullptr || !is_key(key.ptr(), expected)) {
      return false;
    }
  }
  return true;
}

PyObject* StateGuard::read(const Loose& loose) {
  if (loose.kind == Loose::Kind::Cell) {
    return PyCell_GET(loose.owner);
  }
  if (loose.kind == Loose::Kind::List) {
    return loose.index < PyList_GET_SIZE(loose.owner) ? PyList_GET_ITEM(loose.owner, loose.index)
                                                      : nullptr;
  }
  if (loose.kind == Loose::Kind::Tuple) {
    return PyTuple_GET_ITEM(loose.owner, loose.index);
  }
  called_python_ = true;
  static PyObject* name = PyUnicode_InternFromString("read");
  held_.push_back(py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(loose.slot, name)));
  throw_if(held_.back().ptr() == nullptr);
  PyObject* now = held_.back().ptr();
  return now == missing() ? nullptr : now;
}

bool StateGuard::check() {
  called_python_ = false;
  held_.clear();
  for (const auto& [container, size] : sizes_) {
    const Py_ssize_t now =
        PyList_Check(container) ? PyList_GET_SIZE(container) : PyObject_Size(container);
    throw_if(now < 0);
    if (now != size) {
      return false;
    }
  }
  for (const auto& [dict, keys] : orders_) {
    if (!has_order(dict, keys)) {
      return false;
    }
  }
  for (const Loose& l : loose_) {
    if (!check_entry(l.entry, read(l))) {
      return false;
    }
  }
  // Read before the dictionaries are: what changes one meanwhile is seen at the next check.
  const uint64_t all_clocks = DictClock::of_all();
  for (size_t i = 0; i < clocks_.size() && (all_clocks == 0 || all_clocks != all_clocks_); ++i) {
    if (is_unchanged(clocks_[i])) {
      continue;
    }
    const Dict& d = dicts_[i];
    const uint64_t now = clocks_[i].first.now();
    if ((d.size >= 0 && PyDict_GET_SIZE(d.dict) != d.size) || !has_order(d)) {
      return false;
    }
    for (const Entry& e : d.entries) {
      if (!check_entry(e, item(d.dict, e.key))) {
        return false;
      }
    }
    clocks_[i].second = now;
  }
  all_clocks_ = all_clocks;
  return !called_python_ || read_handles_again();
}

// Python code ran in between, and other threads with it: the objects seen before may be
// gone. This runs none.
bool StateGuard::read_handles_again() {
  for (const Loose& l : loose_) {
    if (l.entry.handle >= 0 && l.kind != Loose::Kind::Other) {
      current_[l.entry.handle] = read(l);
      if (current_[l.entry.handle] == nullptr) {
        return false;
      }
    }
  }
  for (size_t i = 0; i < clocks_.size(); ++i) {
    if (is_unchanged(clocks_[i])) {
      continue;
    }
    const Dict& d = dicts_[i];
    for (const Entry& e : d.entries) {
      if (e.handle >= 0) {
        current_[e.handle] = item(d.dict, e.key);
        if (current_[e.handle] == nullptr) {
          return false;
        }
      }
    }
  }
  return true;
}

} // namespace tle
