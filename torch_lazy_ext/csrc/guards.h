// Stage "replay": whether a call is like the one that was captured, all but its data.
#pragma once

#include <Python.h>

#include "clock.h"
#include "tensor.h"

#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <vector>

namespace tle {

namespace py = pybind11;

// Objects here are borrowed: the Python half of a variant holds them, where Python's
// collector of cycles sees them.
using Keep = py::list;

// What else a program may have read of its tensors: where they lie in their storages, whether
// they are views, and whether they are leaves.
struct Placement {
  bool offset;
  bool view;
  bool leaf;
};

// What a program can read of a tensor without looking at its data.
class TensorGuard {
 public:
  TensorGuard(PyObject* tensor, Placement read);
  bool check(PyObject* object) const;
  bool check(const at::Tensor& tensor) const; // whatever its Python class

 private:
  PyTypeObject* type_;
  c10::DispatchKeySet keys_; // layout, conjugation, negation, inference mode
  c10::Device device_;
  caffe2::TypeMeta dtype_;
  c10::SmallVector<int64_t, 5> sizes_;
  c10::SmallVector<int64_t, 5> strides_;
  bool requires_grad_;
  int64_t offset_; // -1: any
  int8_t view_; // -1: whether or not
  int8_t leaf_; // -1: whether or not
};

// What is no argument and no state, and still decides what a program does.
struct Surroundings {
  bool grad_mode;
  bool inference_mode;
  bool autocast;
  bool deterministic;
  c10::ScalarType autocast_dtype;
  caffe2::TypeMeta default_dtype;
  int64_t function_modes;
  int64_t dispatch_modes;

  static Surroundings now();
  bool operator==(const Surroundings& other) const;
};

// The arguments of one call, taken apart as a variant expects them. Objects are borrowed
// from the call.
struct Arguments {
  c10::SmallVector<PyObject*, 16> leaves;
  c10::SmallVector<PyObject*, 4> containers; // as in _tree.flatten
  std::vector<py::object> made; // what had to be taken apart in Python
};

// The structure of the arguments, with a guard for each leaf.
class ArgumentGuard {
 public:
  // `spec`: of _tree.flatten; `leaves`: those of the capture, values copied where
  // they can change; `names`: the attributes of tensors that code may read, or None for all.
  // weak: positions of leaves that come as weak references to the values themselves.
  ArgumentGuard(
      const py::object& spec,
      const py::list& leaves,
      const std::vector<int64_t>& weak,
      const py::object& names,
      Placement read,
      Keep& keep);
  // `kwargs` may be null. Raises what Python code that takes containers apart raises.
  bool match(PyObject* args, PyObject* kwargs, Arguments& arguments) const;

 private:
  enum class Kind : uint8_t { Leaf, Again, Tuple, List, Dict, Other };
  struct Node {
    Kind kind;
    int64_t index = 0; // of the leaf, or of the container that comes again
    std::vector<PyObject*> keys; // of a dict
    PyObject* shape = nullptr; // _tree.Shape, of anything else
    bool immutable = false;
    std::vector<Node> children;
  };
  struct Leaf {
    std::optional<TensorGuard> tensor;
    PyObject* value = nullptr;
    bool weak = false;
    int64_t first = -1; // the first leaf that is the same tensor
    std::vector<std::pair<PyObject*, PyObject*>> attributes; // of a tensor, that code may read
  };
  // Whether a tensor has the attributes of the captured one.
  bool has_attributes(PyObject* tensor, const Leaf& leaf) const;
  bool may_be_read(PyObject* name) const;
  Node parse(const py::handle& spec, Keep& keep);
  bool match(const Node& node, PyObject* value, Arguments& arguments) const;
  bool match_children(const Node& node, PyObject* const* values, Arguments& arguments) const;

  Node args_;
  Node kwargs_;
  std::vector<Leaf> leaves_;
  PyObject* names_ = nullptr; // null: all
  int64_t parsed_ = 0;
};

// Slots (places that hold a value: see _lift.Slot) and what they should hold. A dictionary
// is looked through only when it has changed since the last time.
class StateGuard {
 public:
  // The slot holds this very object, or an equal one of a simple type.
  void value(const py::object& slot, const py::object& expected, Keep& keep);
  // A dict, list or deque has this many items.
  void size(const py::object& container, Py_ssize_t size, Keep& keep);
  // A dict has its keys in this order.
  void order(const py::object& dict, const py::list& keys, Keep& keep);
  // The slot may hold anything: `current(handle)` after a `check` that held.
  int64_t handle(const py::object& slot, Keep& keep);
  bool check();
  PyObject* current(int64_t handle) const { return current_[handle]; }

 private:
  struct Entry {
    PyObject* key;
    PyObject* expected; // null: nothing
    int64_t handle; // -1, or where to put what is there, whatever it is
  };
  struct Dict {
    PyObject* dict;
    Py_ssize_t size = -1;
    std::vector<PyObject*> keys; // in their order, where that is guarded
    std::vector<Entry> entries;
  };
  struct Loose { // a slot in anything else
    enum class Kind : uint8_t { Cell, List, Tuple, Other } kind;
    PyObject* slot;
    PyObject* owner;
    Py_ssize_t index;
    Entry entry;
  };
  void add(const py::object& slot, Entry entry, Keep& keep);
  Dict& watch(PyObject* dict, Keep& keep);
  bool check_entry(const Entry& entry, PyObject* now);
  PyObject* read(const Loose& loose);
  bool is_key(PyObject* key, PyObject* expected);
  bool has_order(const Dict& dict);
  bool has_order(PyObject* ordered_dict, const std::vector<PyObject*>& keys);
  bool read_handles_again();

  std::vector<Dict> dicts_;
  // Parallel to dicts_, and looked at on every call: the clock, and where it stood at the last
  // check that held, or 0.
  std::vector<std::pair<DictClock, uint64_t>> clocks_;
  uint64_t all_clocks_ = 0; // where they all stood, or 0
  std::unordered_map<PyObject*, size_t> dict_index_;
  std::vector<Loose> loose_;
  std::vector<std::pair<PyObject*, Py_ssize_t>> sizes_;
  // OrderedDicts, whose own order is none of the dictionary's below them.
  std::vector<std::pair<PyObject*, std::vector<PyObject*>>> orders_;
  std::vector<PyObject*> current_;
  std::vector<py::object> held_; // what a slot's own code made for this check
  bool called_python_ = false;
};

// Two leaves of arguments or state as a program can tell them apart (_tree.same).
bool same(PyObject* a, PyObject* b);
// Whether it is of a type whose values `same` compares (_tree.SIMPLE_TYPES).
bool is_simple(PyObject* value);

} // namespace tle
