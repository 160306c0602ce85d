// Stage "record": owns one capture.
#pragma once

#include "node.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Generator.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

namespace tle {

// The one key that serves a capture, on for the capturing thread only, with one fallback for all
// operators. PyTorch keeps it for out-of-tree modes of this kind, has no kernel there, and switches
// it off in its own tensor constructors, where they write to memory. It stands above autograd and
// functionalization, and an operator comes by it twice: as the program calls it, and, with
// Functionalize switched off, as functionalization calls it on what it has unwrapped.
constexpr c10::DispatchKey capture_key = c10::DispatchKey::DeferredInit;

// Puts the fallback there. Raises ImportError where somebody else has one.
void claim_capture_key();

struct Guard {
  enum class Kind : uint8_t { Value, Sizes } kind;
  ValueRef value;
  at::Tensor expected; // Kind::Value
  std::vector<int64_t> expected_sizes; // Kind::Sizes
  SourceLocation source;
};

struct LiftedInput {
  at::Tensor tensor; // the user's tensor
  at::Tensor twin; // what stands for it: a functional tensor over a capture tensor
  int64_t node;
  at::Tensor source; // the leaf that a gradient belongs to: the twin, unless it has a history
  bool constant; // made by the program itself: no one else can change it
  int64_t base = -1; // the input that holds all of its storage, when it was lifted as a view
};

// What an operator gives: known shapes, and values when it had to run for them.
struct Outputs {
  std::vector<TensorMeta> metas;
  std::vector<int64_t> list_lengths; // as in GenericNode
  std::vector<at::Tensor> values; // empty, or parallel to metas
  std::vector<c10::IValue> plain; // the results that are no tensors, in their order
};

// The first run of a graph, operator by operator.
struct Checked {
  std::vector<at::Tensor> values; // of the roots, when it is complete
  bool complete = false;
  // An operator gave other strides than its meta kernel had said: that is known now, and
  // the program has to be captured again.
  bool learned = false;
  // How much further custom operators moved version counters than the capture counted, by
  // the identity of the functional storage.
  std::map<uintptr_t, int64_t> bumps;
};

// One tensor that a custom operator writes to.
struct CustomWrite {
  int64_t node;
  size_t position; // among all that it writes to
  uintptr_t storage; // identity of the functional storage
  int64_t counted; // how far the version counter moved in the capture
};

// What stands for a nested tensor (see nested.h).
struct Nested {
  at::Tensor given; // to the program
  at::Tensor values; // padded
  at::Tensor mask; // true where the nested tensor has elements
};

struct Recorder : public std::enable_shared_from_this<Recorder> {
  Recorder();
  ~Recorder();

  void enter();
  void exit();
  static Recorder* current();

  // Lets functionalization record what it still owes (pending updates, views to
  // regenerate) after the program has ended.
  class Resume {
   public:
    // `lifting`: the user's own tensors may come up (in a backward), and get twins.
    explicit Resume(Recorder& recorder, bool lifting = false);
    ~Resume();
    Resume(const Resume&) = delete;
    Resume& operator=(const Resume&) = delete;

   private:
    Recorder* previous_;
    bool previous_reapply_;
    Recorder& recorder_;
    bool previous_lifting_;
    c10::impl::IncludeDispatchKeyGuard include_;
    c10::impl::ExcludeDispatchKeyGuard exclude_;
  };

  at::Tensor lift(const at::Tensor& tensor, bool constant);
  bool lifting = true; // whether the user's own tensors get twins
  int64_t dispatch_modes = 0; // TorchDispatchModes that were active when the capture began
  // Lets go of every tensor: twins hold the recorder, and it holds them.
  void release();
  bool is_nested(const at::Tensor& tensor) const;
  std::vector<at::Tensor> nested_tensors() const;
  // Tensors the program was given by operators and still holds.
  std::vector<at::Tensor> alive();
  // An input of the backward: no tensor of the user's. While it is recorded, ones stand in
  // for its values where an operator has to run to tell its shapes.
  at::Tensor add_tangent(const at::Tensor& output);
  at::Tensor twin_of(const at::Tensor& tensor); // lifts when necessary
  // The twin of the storage that a functional tensor lies in, when that was lifted as a
  // whole and has the tensor's dtype; else nothing.
  at::Tensor whole_storage_of(const at::Tensor& tensor) const;
  bool is_liftable(const at::Tensor& tensor) const;
  // Whether a twin lies in memory of `failed_writes`.
  bool has_failed_write(const at::Tensor& twin) const;
  // From now on `twin` stands for `tensor` (an assignment to `tensor.data`).
  void rebind(const at::Tensor& tensor, const at::Tensor& twin);
  // `op` changed the shape of a tensor of the user's in place, called with `given`: the program
  // reads the new one from the tensor itself, which has it until the capture ends.
  void follow_layout(const c10::OperatorHandle& op, torch::jit::Stack given);
  // The same for an assignment to `tensor.data`: `twin` counts its versions with `tensor`.
  void assign_data(const at::Tensor& tensor, const at::Tensor& twin);

  void record(const c10::OperatorHandle& op, torch::jit::Stack* stack);

  // How often the program has drawn from the default generator, up to the state it is in.
  int64_t random_position() const;
  // Back to such a state: what is drawn from now on are the numbers that were drawn then.
  void seek(int64_t position);

  // The value a capture tensor has in this run, computed beside the graph.
  at::Tensor materialize(ValueRef value);
  // Runs the nodes from `begin` on, given the values of what they read of earlier ones, and
  // compares what each operator gives with what shape inference said.
  // The nodes before `all_before` run also when no root needs them: eager raises their errors.
  Checked run_checked(
      const std::vector<ValueRef>& roots,
      int64_t begin,
      const std::vector<ValueRef>& given,
      const std::vector<at::Tensor>& values,
      int64_t all_before);
  bool depends_on_tangent(const OperatorCall& call);
  void add_value_guard(ValueRef value, const at::Tensor& expected);

  GenericNode& node(int64_t id) { return *nodes[id]; }
  const TensorMeta& meta_of(ValueRef value) { return nodes[value.node]->metas[value.index]; }
  std::string describe(const SourceLocation& source) const;
  torch::jit::SourceRange source_range(const SourceLocation& source);
  SourceLocation current_source();
  std::vector<at::Generator> generators() const; // what random nodes draw from

  std::vector<std::shared_ptr<GenericNode>> nodes; // in program order
  std::vector<LiftedInput> inputs;
  std::unordered_map<c10::TensorImpl*, size_t> input_by_impl;
  std::unordered_map<c10::TensorImpl*, size_t> input_by_twin;
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> rebound;
  // Storages of which the program reads several tensors and writes to one, with the dtype
  // of their smallest elements.
  std::unordered_map<c10::StorageImpl*, at::ScalarType> shared_storages;
  // What the program was given for a generator -> the generator.
  std::unordered_map<c10::GeneratorImpl*, at::Generator> generators_of_stand_ins;
  // Where its tensors lie in their storages matters to the program, or whether they are views.
  bool reads_offset = false;
  bool reads_views = false;
  int64_t running = -1; // the node that run_checked is at
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> made;
  // Run every operator while it is recorded, and learn what its meta kernel has wrong.
  bool verify_layouts = false;
  // The exception on its way up is the one that eager would raise.
  bool eager_raised = false;
  std::unordered_map<c10::TensorImpl*, Nested> nested; // by `given`
  // Called after a write to one of these storages of functional tensors.
  std::unordered_map<c10::StorageImpl*, std::function<void()>> watched;
  // Memory of leaves that are views of a tensor that does not require grad, which eager takes their
  // views for views of.
  std::unordered_map<c10::StorageImpl*, c10::Storage> leaf_views;
  // Memory that an operator was to write to, and raised.
  std::unordered_map<c10::StorageImpl*, c10::Storage> failed_writes;
  // Looks whether `twin`, which is a leaf by now, is one of those; `leaf`: what it stands for.
  void note_leaf(const at::Tensor& twin, const at::Tensor& leaf);
  // What the program was refused, also when it caught the error.
  std::string refusal;
  std::vector<Guard> guards;
  std::vector<CustomWrite> custom_writes;
  int64_t last_write = -1; // the last node that writes to its arguments
  // How often the program wrote to inference tensors, which count no versions, by the
  // identity of the functional storage: eager's tensor may be another kind.
  std::map<uintptr_t, int64_t> inference_writes;
  // (operator, count, where) for operators the fallback config names
  std::vector<std::tuple<std::string, int64_t, std::string>> fallbacks;

 private:
  OperatorCall parse(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t begin);
  GenericNode* drawn_again(const OperatorCall& call);
  void push_outputs(
      torch::jit::Stack* stack,
      size_t count,
      GenericNode& n,
      const std::vector<size_t>& mutated,
      std::vector<c10::IValue> plain,
      const SourceLocation& source);
  ValueRef value_of(const at::Tensor& tensor, const c10::OperatorHandle& op);
  c10::Device device_of(const OperatorCall& call);
  std::optional<Outputs> infer(const OperatorCall& call, c10::Device device);
  Outputs observe(const OperatorCall& call, c10::Device device);
  std::string error_on_zeros(const OperatorCall& call);
  void learn(const OperatorCall& call, c10::Device device, const Outputs& real);
  void note_forced_fallback(const OperatorCall& call);
  at::Tensor make_tensor(ValueRef value, bool wrap_functional);
  // `bumps`: how far the operator moves the version counters of what it writes to.
  torch::jit::Stack run(const OperatorCall& call, std::vector<int64_t>* bumps = nullptr);
  std::vector<char> needed_for(int64_t target);
  at::Tensor lift_alone(const at::Tensor& tensor, bool constant);
  at::Tensor lift_storage(const at::Tensor& tensor);

  struct Layout {
    at::Tensor tensor;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int64_t storage_offset;
  };
  std::unordered_map<c10::TensorImpl*, Layout> layouts_; // of the user's, as the program met them
  std::unordered_map<PyCodeObject*, bool> code_is_library_;
  std::map<std::pair<PyCodeObject*, int>, torch::jit::SourceRange> source_ranges_;
  std::string library_prefix_;
  std::string own_prefix_;
  // The program's view of each generator it drew from so far.
  std::unordered_map<c10::GeneratorImpl*, at::Tensor> rng_states_;
  std::vector<int64_t> drawn_; // nodes that draw from the default generator
  int64_t position_ = -1; // the next of them to be drawn again, or -1
  bool inference_failed_ = false; // the last meta kernel raised an error about its arguments
  at::ScalarType default_dtype_ = at::kFloat; // when the capture began
  bool previous_reapply_ = false;
  bool modes_were_excluded_ = false;
  bool entered_ = false;
  bool finished_ = false;
};

// Lets code run as if there were no capture, no autograd and no mode of any kind;
// restores every thread-local on the way out.
class StandaloneGuard {
 public:
  StandaloneGuard();
  ~StandaloneGuard();
  StandaloneGuard(const StandaloneGuard&) = delete;
  StandaloneGuard& operator=(const StandaloneGuard&) = delete;

 private:
  c10::impl::ExcludeDispatchKeyGuard exclude_;
  c10::AutoGradMode grad_;
  at::impl::TorchFunctionDisabledState torch_function_;
  Recorder* recorder_;
};

// Calls a kernel as autograd does when `grad_mode` is on.
void call_operator(const c10::OperatorHandle& op, bool grad_mode, torch::jit::Stack& stack);

// Leaves C++ as torch_lazy_ext.UnsupportedError. The running capture remembers it.
struct Unsupported : public torch::PyTorchError {
  explicit Unsupported(const std::string& message);
  PyObject* python_type() override;
};

// Something of an operator that eager does, and that recording cannot express.
struct NotRecordable : public c10::Error {
  explicit NotRecordable(const std::string& message)
      : c10::Error({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, message) {}
};

// The text of an error, as Python shows it.
std::string message_of(const std::exception& e);
std::string message_of(const std::exception_ptr& e); // nothing for none
void set_unsupported_type(PyObject* type);

// The storage of a functional tensor, which tells what shares memory with it.
c10::StorageImpl* storage_of(const at::Tensor& functional);

// The whole storage of a tensor as one flat tensor, of the tensor's own dtype or another.
at::Tensor whole_storage(
    const at::Tensor& tensor,
    std::optional<at::ScalarType> dtype = std::nullopt);
// The capture tensor behind a Python float of the capture (torch_lazy_ext._number.Number) or
// behind the tensor that PyTorch wraps it in; an undefined tensor for anything else.
at::Tensor number_behind(const c10::IValue& value);

// Whether an argument of this type names a device.
bool is_device_argument(const c10::Argument& argument);

} // namespace tle
