// Stage "replay": whether the names that a program's code uses still mean what they meant. Guards
// stand on namespaces (dictionaries of modules, classes and objects), not on objects: a namespace
// whose version is as before costs one comparison.
#pragma once

#include "guards.h"

#include <set>
#include <unordered_set>

namespace tle {

class NamespaceGuard {
 public:
  // The dictionary, or that of the type, holds under `key` what it holds now.
  void entry(PyObject* owner, PyObject* key, Keep& keep);
  // Each of `names`, and each special name (`__add__`), is there as it is now, or is not there.
  // Values in `places` (a set of keys) may differ. `all_keys`: it has the keys that it has now, in
  // their order.
  void names(
      const py::object& owner,
      const py::anyset& names,
      const py::anyset& places,
      bool all_keys,
      Keep& keep);
  // The globals, builtins and attributes of modules that a code object names are as they are now.
  // `found` gets the values that are classes, ContextVars or C functions.
  void code(
      const py::object& code,
      const py::dict& globals,
      bool library,
      const py::anyset& skip,
      py::set& found,
      Keep& keep);
  // Code and defaults of the function are as they are now.
  void function(const py::object& function, bool held, Keep& keep);
  // The class of the object, and the bases of a class, are as they are now.
  // Not held: where the object has gone, something that is compared earlier tells so.
  void type_of(const py::object& object, bool held, Keep& keep);
  void bases(const py::object& type, Keep& keep);
  // The set has the items that it has now, in their order.
  void content(const py::anyset& set, Keep& keep);
  // Calling it gives what it gives now.
  void getter(const py::object& getter, const py::object& value, Keep& keep);
  bool check();

 private:
  struct Entry {
    PyObject* key;
    PyObject* expected; // null: nothing
  };
  struct Space {
    PyObject* dict;
    PyObject* names = nullptr; // a set: no other of these are there
    PyObject* places = nullptr;
    Py_ssize_t named = 0; // how many of the names are there
    std::vector<Entry> entries;
    bool has_keys = false;
    std::vector<PyObject*> keys; // all of them, where that is guarded
  };
  struct Function {
    PyObject *function, *code, *defaults, *keyword_defaults;
  };
  Space& space(PyObject* owner, Keep& keep);
  bool holds(const Space& space);
  bool holds(PyObject* set, const std::vector<PyObject*>& items);
  static bool has_keys(const Space& space);
  static Py_ssize_t count_named(PyObject* dict, PyObject* names, PyObject* places);
  void add(Space& space, PyObject* key, Keep& keep);

  std::vector<Space> spaces_;
  std::vector<std::pair<DictClock, uint64_t>> clocks_; // parallel to spaces_, with what they said
  uint64_t all_clocks_ = 0;
  std::unordered_map<PyObject*, size_t> index_;
  std::set<std::pair<PyObject*, PyObject*>> known_; // dictionary and key
  std::vector<Function> functions_;
  std::unordered_set<PyObject*> known_functions_;
  std::vector<std::pair<PyObject*, PyTypeObject*>> types_;
  std::vector<std::pair<PyTypeObject*, PyObject*>> bases_;
  std::vector<std::pair<PyObject*, std::vector<PyObject*>>> sets_;
  std::vector<std::pair<PyObject*, PyObject*>> getters_;
};

// While captures run, the methods and functions that they have put in place: each with the one
// that stands there otherwise, or None for nothing.
void set_stand_ins(const py::dict& originals);

void bind_namespaces(py::module_& m);

} // namespace tle
