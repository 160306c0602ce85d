// Stage "record": the generic LTC node, one kind for every dispatcher operator.
#pragma once

#include <Python.h>

#include "number.h"
#include "tensor.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/frontend/source_range.h>
#include <torch/csrc/lazy/ts_backend/ts_node.h>

namespace tle {

// A line of the user's program.
struct SourceLocation {
  PyCodeObject* code = nullptr; // kept alive by the Recorder
  int line = 0;
};

// Number: a Scalar or float that the graph computes. WrappedNumber: the same where the
// operator wants a tensor. NumberList: a list of Scalars, some of which are computed.
enum class ArgKind : uint8_t {
  Constant,
  Tensor,
  TensorList,
  OptionalTensorList,
  Number,
  WrappedNumber,
  NumberList
};

struct Argument {
  ArgKind kind = ArgKind::Constant;
  std::vector<ValueRef> values; // Tensor, Number: one; lists: one per element
  c10::IValue constant; // Constant; NumberList: the elements that are not computed
};

// The value of a number; of a meta tensor, one that every operator takes.
double number_of(const at::Tensor& t);

// One call of an operator: tensor arguments by reference, all others by value.
struct OperatorCall {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  std::vector<torch::lazy::Value> operands;
  torch::lazy::hash_t constants_hash;
  SourceLocation source;
  // Draws from the generator: always live, and in program order.
  bool random = false;
  bool reads_generator = false; // takes its turn among random nodes, and moves nothing
  // The default dtype it was called under, where the program had changed it.
  std::optional<at::ScalarType> default_dtype;
  // Talks to other processes: likewise, and never run for a value while a program is recorded.
  bool collective = false;
  bool after_collective = false; // depends on one
  int64_t serial = 0; // tells random and collective calls apart
  bool depends_on_input = false;
  bool depends_on_tangent = false;
  // The kernel asks for the grad mode, and it was on.
  bool grad_mode = false;
  // Writes to its arguments and has no functional variant: runs on copies of them,
  // and their new values are further outputs.
  std::vector<size_t> mutated;

  // The arguments as a boxed call wants them, with `tensor_of(ValueRef)` for tensors.
  template <class F>
  void push(torch::jit::Stack& stack, F&& tensor_of) const {
    for (const Argument& a : arguments) {
      switch (a.kind) {
        case ArgKind::Constant:
          stack.push_back(a.constant);
          break;
        case ArgKind::Tensor:
          stack.emplace_back(tensor_of(a.values[0]));
          break;
        case ArgKind::TensorList: {
          c10::List<at::Tensor> list;
          list.reserve(a.values.size());
          for (const ValueRef& v : a.values) {
            list.push_back(v.node < 0 ? at::Tensor() : at::Tensor(tensor_of(v)));
          }
          stack.emplace_back(std::move(list));
          break;
        }
        case ArgKind::OptionalTensorList: {
          c10::List<std::optional<at::Tensor>> list;
          list.reserve(a.values.size());
          for (const ValueRef& v : a.values) {
            list.push_back(v.node < 0 ? std::nullopt : std::optional<at::Tensor>(tensor_of(v)));
          }
          stack.emplace_back(std::move(list));
          break;
        }
        case ArgKind::Number:
          stack.emplace_back(number_of(tensor_of(a.values[0])));
          break;
        case ArgKind::WrappedNumber:
          stack.emplace_back(wrapped_number(number_of(tensor_of(a.values[0]))));
          break;
        case ArgKind::NumberList: {
          c10::impl::GenericList list = a.constant.toList().copy();
          for (size_t i = 0; i < a.values.size(); ++i) {
            if (a.values[i].node >= 0) {
              list.set(i, number_of(tensor_of(a.values[i])));
            }
          }
          stack.emplace_back(std::move(list));
          break;
        }
      }
    }
  }

  template <class F>
  void for_each_value(F&& f) const {
    for (const Argument& a : arguments) {
      for (const ValueRef& v : a.values) {
        if (v.node >= 0) {
          f(v);
        }
      }
    }
  }
};

enum class NodeKind : uint8_t { Input, Operator };

// An Input stands for a lifted tensor; an Operator for one call.
class GenericNode : public torch::lazy::TsNode {
 public:
  GenericNode(int64_t input_index, const TensorMeta& meta);
  GenericNode(OperatorCall call, std::vector<TensorMeta> metas, std::vector<int64_t> list_lengths);

  torch::lazy::TSOpVector Lower(
      std::shared_ptr<torch::jit::GraphFunction> function,
      torch::lazy::TSLoweringContext* loctx) const override;

  bool random() const { return call.has_value() && call->random; }

  bool collective() const { return call.has_value() && call->collective; }

  // Live whether or not its results are used.
  bool pinned() const { return random() || collective(); }

  NodeKind kind;
  int64_t input_index = -1;
  std::optional<OperatorCall> call;
  std::vector<TensorMeta> metas; // one per output tensor
  // Per result: -1 for a tensor, -2 for a plain value, or the length of a Tensor[].
  std::vector<int64_t> list_lengths;
  torch::jit::SourceRange source_range; // call->source for the lowered node
  int64_t id = -1; // position in program order
  bool depends_on_input = false;
  bool depends_on_tangent = false; // `values`, if any, are those of a stand-in
  bool sizes_from_data = false;
  std::vector<at::Tensor> values; // real outputs, once computed during capture
};

// Runs an operator under the default dtype that the program had set for it.
class DefaultDtypeGuard {
 public:
  explicit DefaultDtypeGuard(std::optional<at::ScalarType> dtype);
  ~DefaultDtypeGuard();
  DefaultDtypeGuard(const DefaultDtypeGuard&) = delete;
  DefaultDtypeGuard& operator=(const DefaultDtypeGuard&) = delete;

 private:
  caffe2::TypeMeta previous_;
  bool changed_;
};

// Equal constants have equal hashes; floats count by their bits.
torch::lazy::hash_t hash_constant(const c10::IValue& value);

// The tensors among an operator's results, lists flattened, plain values left out.
std::vector<at::Tensor> tensors_of(const torch::jit::Stack& results);

} // namespace tle
