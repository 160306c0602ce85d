// Stage "record": the capture-time tensor, the generic LTC node and the
// recorder that owns them.
#pragma once

#include <Python.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/jit/frontend/source_range.h>
#include <torch/csrc/lazy/ts_backend/ts_node.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace tle {

// Everything about a tensor that a program can see without reading its data.
struct TensorMeta {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  int64_t storage_offset = 0;
  at::ScalarType dtype = at::kFloat;
  c10::Device device = c10::kCPU;
  bool conj = false;
  bool neg = false;

  static TensorMeta of(const at::Tensor& tensor);
  at::Tensor make_meta_tensor() const;
};

// A line of the user's program; the code object keeps the file name alive.
struct SourceLocation {
  PyCodeObject* code = nullptr; // owned by the Recorder's code table
  int line = 0;
};

struct Recorder;

// One operand of an operator: output `index` of the node recorded as `node`.
struct ValueRef {
  int64_t node = -1; // -1: no tensor (None, or an undefined tensor)
  int64_t index = 0;
  bool operator==(const ValueRef& o) const {
    return node == o.node && index == o.index;
  }
};

enum class ArgKind : uint8_t { Constant, Tensor, TensorList };

struct Argument {
  ArgKind kind = ArgKind::Constant;
  std::vector<ValueRef> values; // Tensor: one; TensorList: one per element
  bool optional_elements = false;
};

enum class NodeKind : uint8_t { Input, Operator };

// The generic LTC node. An Input stands for a lifted tensor; an Operator holds
// any dispatcher operator together with its non-tensor arguments.
class GenericNode : public torch::lazy::TsNode {
 public:
  // Input
  GenericNode(int64_t input_index, const TensorMeta& meta);
  // Operator
  GenericNode(
      c10::OperatorHandle op,
      torch::lazy::OpList operands,
      std::vector<torch::lazy::Shape>&& shapes,
      size_t num_outputs,
      torch::lazy::hash_t constants_hash);

  torch::lazy::TSOpVector Lower(
      std::shared_ptr<torch::jit::GraphFunction> function,
      torch::lazy::TSLoweringContext* loctx) const override;

  NodeKind kind;
  int64_t input_index = -1;
  std::optional<c10::OperatorHandle> handle;
  std::vector<Argument> arguments;
  std::vector<c10::IValue> constants; // parallel to arguments
  std::vector<TensorMeta> metas; // one per output tensor
  std::vector<int64_t> list_lengths; // per schema return: -1, or length of Tensor[]
  SourceLocation source;
  torch::jit::SourceRange source_range; // `source` for the lowered node
  int64_t id = -1; // position in program order
  bool random = false;
  bool depends_on_input = false;
  std::vector<at::Tensor> values; // real outputs, once computed during capture
};

// A tensor of the running capture. It says of itself what the eager tensor would
// say (device, sizes, strides, dtype) and holds no data.
struct CaptureTensorImpl : public c10::TensorImpl {
  CaptureTensorImpl(
      std::shared_ptr<Recorder> recorder,
      ValueRef value,
      const TensorMeta& meta);

  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version_counter,
      bool allow_tensor_metadata_change) const override;
  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version_counter,
      bool allow_tensor_metadata_change) const override;

  std::shared_ptr<Recorder> recorder;
  ValueRef value;
  TensorMeta meta;
};

// nullptr when the tensor is not a tensor of a capture.
CaptureTensorImpl* as_capture(const at::Tensor& tensor);

struct Guard {
  enum class Kind : uint8_t { Value, Sizes } kind;
  ValueRef value;
  at::Tensor expected; // Kind::Value
  std::vector<int64_t> expected_sizes; // Kind::Sizes
  SourceLocation source;
};

struct LiftedInput {
  at::Tensor tensor; // the user's tensor
  at::Tensor twin; // its functional wrapper during the capture
  int64_t node;
  bool constant; // created by the program itself: no one else can change it
};

// Owns one capture: the nodes in program order, the lifted tensors and the guards.
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
    explicit Resume(Recorder& recorder);
    ~Resume();
    Resume(const Resume&) = delete;
    Resume& operator=(const Resume&) = delete;

   private:
    Recorder* previous_;
    bool previous_reapply_;
  };

  at::Tensor lift(const at::Tensor& tensor, bool constant);
  at::Tensor twin_of(const at::Tensor& tensor); // lifts when necessary
  bool is_liftable(const at::Tensor& tensor) const;

  at::Tensor make_tensor(ValueRef value, bool wrap_functional);
  void record(const c10::OperatorHandle& op, torch::jit::Stack* stack);

  // The value a capture tensor has in this run, computed beside the graph.
  at::Tensor materialize(ValueRef value);
  void add_value_guard(ValueRef value, const at::Tensor& expected);

  GenericNode& node(int64_t id) {
    return *nodes[id];
  }
  std::string describe(const SourceLocation& source) const;
  torch::jit::SourceRange source_range(const SourceLocation& source);
  SourceLocation current_source();

  std::vector<std::shared_ptr<GenericNode>> nodes;
  std::vector<LiftedInput> inputs;
  std::unordered_map<c10::TensorImpl*, size_t> input_by_impl;
  std::unordered_map<c10::TensorImpl*, size_t> input_by_twin;
  std::vector<Guard> guards;
  // operator -> (count, where) for operators the fallback config names
  std::vector<std::tuple<std::string, int64_t, std::string>> fallbacks;
  std::unordered_map<PyCodeObject*, bool> code_is_library;
  std::map<std::pair<PyCodeObject*, int>, torch::jit::SourceRange> source_ranges;
  std::string library_prefix;
  std::string own_prefix;
  at::Tensor rng_state; // the program's view of the default CPU generator
  bool ran_random = false;
  bool finished = false;

 private:
  void run_node(GenericNode& node);
  Recorder* previous_ = nullptr;
  bool previous_reapply_ = false;
  bool entered_ = false;
};

} // namespace tle
