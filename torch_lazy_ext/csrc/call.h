// Stage "replay": one call of a captured program, from arguments to result, in C++ as far as
// the variant is of the common kind, with Python for the rest.
#pragma once

#include "compile.h"
#include "guards.h"
#include "namespaces.h"
#include "record.h"
#include "replay.h"

#include <ATen/core/Generator.h>

namespace tle {

// A call that is like the captured one in all but its data.
struct Call {
  py::object args; // held: everything else here is borrowed from them
  py::object kwargs; // null when there are none
  Arguments arguments;
  std::vector<at::Tensor> tensors; // for each lifted tensor, the one of this call

  py::list containers();
};

// Where a replay takes a lifted tensor from.
struct Source {
  enum class Kind : uint8_t { Argument, State, Number, Fixed, Storage, Gradient } kind;
  int64_t index = -1; // of the leaf, the handle of the slot, or whose gradient it is
  at::Tensor tensor; // one that is the same on each call
  bool made = false; // by the program, so nobody else has it
  std::optional<TensorGuard> guard; // of a tensor in a slot
  int64_t element = -1; // of a tuple of floats in a slot
};

// Lifted tensors that were lifted as views of one storage.
struct StorageGroup {
  int64_t base; // stands for the storage
  std::vector<std::pair<int64_t, int64_t>> members; // lifted tensor, storage offset
  size_t nbytes;
};

struct DataGuard {
  int64_t root;
  bool is_value;
  at::Tensor expected;
  std::vector<int64_t> expected_sizes;
  bool holds(const at::Tensor& value) const;
};

struct SimpleWrite {
  int64_t index;
  int64_t root;
  int64_t bumps;
};

// A result made of outputs, lifted tensors, constants, and lists, tuples and dicts of them.
struct Result {
  enum class Kind : uint8_t { Root, Lifted, Constant, Tuple, List, Dict } kind;
  int64_t index = -1;
  PyObject* object = nullptr; // borrowed
  std::vector<PyObject*> keys; // borrowed
  std::vector<Result> children;
};

// The C++ half of a Specialization.
class Variant {
 public:
  explicit Variant(Keep keep) : keep_(keep.ptr()) {}

  std::optional<Call> match(const py::handle& args, const py::handle& kwargs);
  bool has_state();
  // A new reference to the program's result. Raises _Mismatch when the data takes another
  // way (nothing has happened then), and what `_values` and `_finish` raise.
  PyObject* run(PyObject* self, Call& call);

  int64_t hits = 0;
  int64_t misses = 0;
  bool checked = false; // the first run has been compared with what was recorded
  bool stale = false; // not to be used again
  uint64_t signature = 0; // of the calls that it fits, or 0: none has yet
  // The roots that the program's outputs are, of `num_roots`; none: it gives all of them.
  std::vector<int64_t> outputs;
  int64_t num_roots = 0;
  // Lifted leaves whose gradients the program sets without having looked at them.
  std::vector<int64_t> overwritten;
  // Must not run twice in a call, since other processes take part in it.
  bool communicates = false;

  // Setting up, from Python.
  void set_arguments(
      const py::object& spec,
      const py::list& leaves,
      const std::vector<int64_t>& weak,
      const py::object& names,
      Placement read);
  // Function modes: each mode that is on, or the device that a torch.device(...) makes the
  // default.
  void set_surroundings(const Surroundings& surroundings, const py::list& function_modes);
  void add_value(const py::object& slot, const py::object& expected);
  // Of a tensor in a slot that the graph does not read: what a program can tell of it without its
  // data.
  void add_tensor(const py::object& slot, const py::object& tensor, Placement read);
  void add_size(const py::object& container, Py_ssize_t size);
  void add_order(const py::object& dict, const py::list& keys);
  void add_tied(const py::object& slot, const py::object& other);
  // Of the containers among the arguments (their positions), these are objects of the program's
  // own state, and no other is one of `known`, whose ids these are.
  void set_identities(
      const std::vector<std::pair<int64_t, py::object>>& objects,
      const std::vector<int64_t>& known);
  void lift_argument(int64_t leaf);
  void lift_slot(const py::object& slot, const py::object& tensor, Placement read);
  // A float in a slot, or an element of a tuple there.
  void lift_number(const py::object& slot, int64_t element);
  // No tensor: a tangent, which only the backward reads.
  void lift_fixed(const std::optional<at::Tensor>& tensor, bool made);
  void lift_storage();
  void lift_gradient(int64_t leaf);
  // A lifted leaf has no gradient, or one like this, which is the lifted tensor `index` unless
  // that is -1.
  void add_gradient_guard(int64_t leaf, const py::object& gradient, Placement read, int64_t index);
  void add_same_object(const py::object& slot, int64_t leaf);
  // The program runs a backward, and a lifted tensor has these hooks (as hooks_of lists them).
  void add_hooks(int64_t index, const py::list& functions);
  void add_group(int64_t base, std::vector<std::pair<int64_t, int64_t>> members, size_t nbytes);
  void set_written(const std::vector<int64_t>& indices);
  void add_guard(DataGuard guard);
  // The guarded values alone, to look at before anything else.
  void set_precheck(const std::shared_ptr<Program>& program, std::vector<int64_t> parameters) {
    precheck_ = program;
    precheck_parameters_ = std::move(parameters);
  }
  void set_program(const py::object& program);
  py::object program() const;
  void set_native_finish(const std::vector<SimpleWrite>& writes, const py::tuple& result);

  // Guards on names: see NamespaceGuard.
  NamespaceGuard& namespaces() { return namespaces_; }
  Keep keep() const { return py::reinterpret_borrow<py::list>(keep_); }

  std::vector<int64_t> parameters;
  std::vector<at::Generator> generators;
  // A signal has to wait for the end of a call where half of its effects could have happened, or
  // where the graph runs Python, whose errors may be a handler's.
  bool has_effects = false; // other than random numbers
  bool runs_python = false;

 private:
  bool is_whole() const { return !checked || runs_python || (has_effects && !native_finish_); }
  PyObject* run(PyObject* self, Call& call, bool whole);
  bool has_function_modes() const;
  bool has_identities(const Arguments& arguments) const;
  bool gather(Call& call);
  bool is_apart(const Call& call) const;
  bool overlaps_in_part(const Call& call) const;
  std::vector<at::Tensor> values(PyObject* self, const Call& call);
  // From the values of the outputs to those of all roots, undefined where there are none.
  std::vector<at::Tensor> in_place_of_roots(std::vector<at::Tensor> values) const;
  void raise_mismatch(const std::vector<at::Tensor>* observed);
  void write_back(const Call& call, const std::vector<at::Tensor>& values) const;
  PyObject* make(const Result& result, const Call& call, const std::vector<at::Tensor>& values)
      const;
  Result parse_result(const py::tuple& tree);

  PyObject* keep_; // a list that the Python half holds
  Surroundings surroundings_{};
  std::vector<PyObject*> function_modes_; // borrowed
  std::optional<ArgumentGuard> arguments_;
  StateGuard state_;
  NamespaceGuard namespaces_;
  std::vector<Source> lifted_;
  std::vector<std::pair<int64_t, TensorGuard>> seen_tensors_; // handle
  bool has_identities_ = false;
  std::unordered_map<int64_t, PyObject*> objects_; // by position
  std::unordered_set<PyObject*> known_; // never looked into: they may be gone
  std::vector<std::pair<int64_t, int64_t>> tied_;
  std::vector<std::pair<int64_t, int64_t>> same_objects_; // handle, leaf
  struct GradientGuard {
    int64_t leaf;
    std::optional<TensorGuard> tensor; // none: there is no gradient
    int64_t index;
  };
  std::vector<GradientGuard> gradients_;
  std::vector<std::pair<int64_t, std::vector<PyObject*>>> hooks_; // borrowed
  std::vector<StorageGroup> groups_;
  std::vector<int64_t> group_of_; // -1: on its own
  std::vector<int64_t> written_;
  std::vector<DataGuard> guards_;
  // Whether the guards hold; else raises a mismatch.
  bool check(const std::vector<at::Tensor>& values);

  std::shared_ptr<Program> program_;
  std::shared_ptr<Runnable> runnable_;
  std::shared_ptr<Program> precheck_;
  std::vector<int64_t> precheck_parameters_;
  bool native_finish_ = false;
  std::vector<SimpleWrite> writes_;
  Result result_{Result::Kind::Constant};
};

// The C++ half of a CompiledGraph: finds the variant that fits, and asks Python's
// `_serve(args, kwargs, variant, error)` when none does, or its data took another way.
class Caller {
 public:
  PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs);
  // So many calls run the program itself, before the variants are looked at again.
  int64_t eager_calls = 0;
  void touch(PyObject* variant); // is the most recently used one
  // Borrowed; the Python half holds them. Most recently used first.
  std::vector<std::pair<PyObject*, Variant*>> variants;
};

bool same_bits(const at::Tensor& a, const at::Tensor& b);

void bind_call(py::module_& m);

} // namespace tle
