#include "namespaces.h"

#include "ran.h"

#include <torch/csrc/autograd/python_variable.h>

namespace tle {

namespace {

void throw_if(bool error) {
  if (error) {
    throw py::error_already_set();
  }
}

// Of a class, or nothing for one that cannot change.
PyObject* dict_of(PyObject* owner) {
  if (!PyType_Check(owner)) {
    return owner;
  }
  auto* type = reinterpret_cast<PyTypeObject*>(owner);
  return (type->tp_flags & Py_TPFLAGS_HEAPTYPE) != 0 ? type->tp_dict : nullptr;
}

PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  throw_if(found == nullptr && PyErr_Occurred() != nullptr);
  return found;
}

bool is_special(PyObject* key) {
  return PyUnicode_Check(key) && PyUnicode_GET_LENGTH(key) > 4 &&
      PyUnicode_READ_CHAR(key, 0) == '_' && PyUnicode_READ_CHAR(key, 1) == '_';
}

bool is_named(PyObject* key, PyObject* names) {
  if (!PyUnicode_Check(key)) {
    return false;
  }
  if (is_special(key)) {
    return true;
  }
  const int found = PySet_Contains(names, key);
  throw_if(found < 0);
  return found == 1;
}

bool is_in(PyObject* key, PyObject* set) {
  const int found = set == nullptr ? 0 : PySet_Contains(set, key);
  throw_if(found < 0);
  return found == 1;
}

// Never freed: it holds Python objects.
std::unordered_map<PyObject*, PyObject*>& stand_ins() {
  static auto* map = new std::unordered_map<PyObject*, PyObject*>();
  return *map;
}

// What stands in a namespace when no capture runs. Borrowed, or null.
PyObject* original(PyObject* now) {
  if (now == nullptr || stand_ins().empty()) {
    return now;
  }
  auto found = stand_ins().find(now);
  return found == stand_ins().end() ? now : found->second;
}

// TorchDynamo wraps functions of PyTorch when it is first used, and calls them as they are.
bool is_wrapped_by_dynamo(PyObject* now, PyObject* expected) {
  static PyObject* name = PyUnicode_InternFromString("_torchdynamo_orig_callable");
  if (now == nullptr || expected == nullptr || !PyFunction_Check(now)) {
    return false;
  }
  PyObject* attributes = reinterpret_cast<PyFunctionObject*>(now)->func_dict;
  return attributes != nullptr && item(attributes, name) == expected;
}

bool agrees(PyObject* now, PyObject* expected) {
  if (now == expected) {
    return true;
  }
  now = original(now);
  if (now == expected || is_wrapped_by_dynamo(now, expected)) {
    return true;
  }
  return now != nullptr && expected != nullptr && is_simple(expected) && same(now, expected);
}

} // namespace

void set_stand_ins(const py::dict& originals) {
  auto& map = stand_ins();
  for (const auto& [now, before] : map) {
    Py_DECREF(now);
    Py_XDECREF(before);
  }
  map.clear();
  for (const auto& [now, before] : originals) {
    map[now.inc_ref().ptr()] = before.is_none() ? nullptr : before.inc_ref().ptr();
  }
}

NamespaceGuard::Space& NamespaceGuard::space(PyObject* owner, Keep& keep) {
  PyObject* dict = dict_of(owner);
  auto [found, fresh] = index_.try_emplace(dict, spaces_.size());
  if (fresh) {
    spaces_.push_back({dict});
    clocks_.emplace_back(DictClock(dict), 0);
    keep.append(py::handle(owner)); // which holds its dictionary
  }
  return spaces_[found->second];
}

void NamespaceGuard::add(Space& space, PyObject* key, Keep& keep) {
  if (!known_.insert({space.dict, key}).second) {
    return;
  }
  PyObject* expected = original(item(space.dict, key));
  keep.append(py::handle(key));
  if (expected != nullptr) {
    keep.append(py::handle(expected));
  }
  space.entries.push_back({key, expected});
}

void NamespaceGuard::entry(PyObject* owner, PyObject* key, Keep& keep) {
  if (dict_of(owner) != nullptr) {
    add(space(owner, keep), key, keep);
  }
}

Py_ssize_t NamespaceGuard::count_named(PyObject* dict, PyObject* names, PyObject* places) {
  Py_ssize_t count = 0;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  while (PyDict_Next(dict, &position, &key, &value) != 0) {
    count += is_named(key, names) && !is_in(key, places) && original(value) != nullptr;
  }
  return count;
}

void NamespaceGuard::names(
    const py::object& owner,
    const py::anyset& names,
    const py::anyset& places,
    bool all_keys,
    Keep& keep) {
  if (dict_of(owner.ptr()) == nullptr) {
    return;
  }
  Space& space = this->space(owner.ptr(), keep);
  keep.append(names);
  keep.append(places);
  space.names = names.ptr();
  space.places = places.empty() ? nullptr : places.ptr();
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  std::vector<PyObject*> found;
  space.keys.clear();
  while (PyDict_Next(space.dict, &position, &key, &value) != 0) {
    if (is_named(key, space.names) && !is_in(key, space.places) && original(value) != nullptr) {
      found.push_back(key);
    }
    if (all_keys) {
      space.keys.push_back(key);
      keep.append(py::handle(key));
    }
  }
  space.has_keys = all_keys;
  space.named = static_cast<Py_ssize_t>(found.size());
  for (PyObject* k : found) {
    add(space, k, keep);
  }
}

void NamespaceGuard::code(
    const py::object& code,
    const py::dict& globals,
    bool library,
    const py::anyset& skip,
    py::set& found,
    Keep& keep) {
  PyObject* builtins = PyEval_GetBuiltins();
  PyObject* modules = PyImport_GetModuleDict();
  const py::tuple names = names_of(code.ptr());
  auto field = [&](NameField f) { return py::object(names[static_cast<size_t>(f)]); };
  keep.append(names);
  for (const py::handle& item_of : py::tuple(field(NameField::Chains))) {
    PyObject* chain = item_of.ptr();
    PyObject* key = PyTuple_GET_ITEM(chain, 0);
    if (is_in(key, skip.ptr())) {
      continue;
    }
    PyObject* value = original(item(globals.ptr(), key));
    if (library || value == nullptr || !THPVariable_Check(value)) {
      entry(globals.ptr(), key, keep);
    }
    if (value == nullptr) {
      value = item(builtins, key);
      entry(builtins, key, keep);
    }
    for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(chain) && value != nullptr; ++i) {
      if (!PyModule_Check(value)) {
        break;
      }
      PyObject* dict = PyModule_GetDict(value);
      key = PyTuple_GET_ITEM(chain, i);
      value = original(item(dict, key));
      if (library || value == nullptr || !THPVariable_Check(value)) {
        entry(dict, key, keep);
      }
    }
    if (value != nullptr &&
        (PyType_Check(value) || PyContextVar_CheckExact(value) || PyCFunction_Check(value))) {
      found.add(py::handle(value));
    }
  }
  for (const py::handle& name : py::tuple(field(NameField::Imports))) {
    entry(modules, name.ptr(), keep);
    PyObject* module = item(modules, name.ptr());
    if (module == nullptr || !PyModule_Check(module)) {
      continue;
    }
    for (const py::handle& attribute : field(NameField::Attributes)) {
      PyObject* dict = PyModule_GetDict(module);
      PyObject* value = item(dict, attribute.ptr());
      if (value == nullptr || !THPVariable_Check(value)) {
        entry(dict, attribute.ptr(), keep);
      }
    }
  }
}

void NamespaceGuard::function(const py::object& function, bool held, Keep& keep) {
  if (!PyFunction_Check(function.ptr()) || !known_functions_.insert(function.ptr()).second) {
    return;
  }
  auto* f = reinterpret_cast<PyFunctionObject*>(function.ptr());
  for (PyObject* part : {function.ptr(), f->func_code, f->func_defaults, f->func_kwdefaults}) {
    if (part != nullptr && (held || part != function.ptr())) {
      keep.append(py::handle(part));
    }
  }
  functions_.push_back({function.ptr(), f->func_code, f->func_defaults, f->func_kwdefaults});
  if (f->func_kwdefaults != nullptr) {
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(f->func_kwdefaults, &position, &key, &value) != 0) {
      if (!THPVariable_Check(value)) {
        entry(f->func_kwdefaults, key, keep);
      }
    }
  }
}

void NamespaceGuard::type_of(const py::object& object, bool held, Keep& keep) {
  if (held) {
    keep.append(object);
  }
  keep.append(py::type::of(object));
  types_.emplace_back(object.ptr(), Py_TYPE(object.ptr()));
}

void NamespaceGuard::bases(const py::object& type, Keep& keep) {
  auto* t = reinterpret_cast<PyTypeObject*>(type.ptr());
  keep.append(type);
  keep.append(py::handle(t->tp_mro));
  bases_.emplace_back(t, t->tp_mro);
}

void NamespaceGuard::content(const py::anyset& set, Keep& keep) {
  keep.append(set);
  std::vector<PyObject*> items;
  for (const py::handle& item_of : set) {
    keep.append(item_of);
    items.push_back(item_of.ptr());
  }
  sets_.emplace_back(set.ptr(), std::move(items));
}

bool NamespaceGuard::holds(PyObject* set, const std::vector<PyObject*>& items) {
  if (PySet_GET_SIZE(set) != static_cast<Py_ssize_t>(items.size())) {
    return false;
  }
  if (items.empty()) {
    return true;
  }
  const auto iterator = py::reinterpret_steal<py::object>(PySet_Type.tp_iter(set));
  throw_if(iterator.ptr() == nullptr);
  for (PyObject* expected : items) {
    const auto now = py::reinterpret_steal<py::object>(PyIter_Next(iterator.ptr()));
    throw_if(PyErr_Occurred() != nullptr);
    if (now.ptr() != expected &&
        (now.ptr() == nullptr || !is_simple(expected) || !same(now.ptr(), expected))) {
      return false;
    }
  }
  return true;
}

void NamespaceGuard::getter(const py::object& getter, const py::object& value, Keep& keep) {
  keep.append(getter);
  keep.append(value);
  getters_.emplace_back(getter.ptr(), value.ptr());
}

bool NamespaceGuard::has_keys(const Space& space) {
  if (PyDict_GET_SIZE(space.dict) != static_cast<Py_ssize_t>(space.keys.size())) {
    return false;
  }
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (size_t i = 0; PyDict_Next(space.dict, &position, &key, &value) != 0; ++i) {
    if (key != space.keys[i] && !(is_simple(space.keys[i]) && same(key, space.keys[i]))) {
      return false;
    }
  }
  return true;
}

bool NamespaceGuard::holds(const Space& space) {
  for (const Entry& e : space.entries) {
    if (!agrees(item(space.dict, e.key), e.expected)) {
      return false;
    }
  }
  if (space.has_keys) {
    return has_keys(space); // and so no other ones that are named
  }
  return space.names == nullptr ||
      count_named(space.dict, space.names, space.places) == space.named;
}

bool NamespaceGuard::check() {
  for (const auto& [object, type] : types_) {
    if (Py_TYPE(object) != type) {
      return false;
    }
  }
  for (const auto& [type, mro] : bases_) {
    if (type->tp_mro != mro) {
      return false;
    }
  }
  for (const Function& f : functions_) {
    auto* now = reinterpret_cast<PyFunctionObject*>(f.function);
    if (now->func_code != f.code || now->func_defaults != f.defaults ||
        now->func_kwdefaults != f.keyword_defaults) {
      return false;
    }
  }
  for (const auto& [set, items] : sets_) {
    if (!holds(set, items)) {
      return false;
    }
  }
  for (const auto& [getter, expected] : getters_) {
    const auto now = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(getter));
    throw_if(now.ptr() == nullptr);
    if (now.ptr() != expected && !same(now.ptr(), expected)) {
      return false;
    }
  }
  const uint64_t all_clocks = DictClock::of_all();
  for (size_t i = 0; i < clocks_.size() && (all_clocks == 0 || all_clocks != all_clocks_); ++i) {
    auto& [clock, before] = clocks_[i];
    const uint64_t now = clock.now();
    if (now == 0 || now != before) {
      if (!holds(spaces_[i])) {
        return false;
      }
      before = now;
    }
  }
  all_clocks_ = all_clocks;
  return true;
}

void bind_namespaces(py::module_& m) {
  m.def("set_stand_ins", &set_stand_ins);
}

} // namespace tle
