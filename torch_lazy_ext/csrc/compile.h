// Stage "compile": what can run a graph.
#pragma once

#include "replay.h"

#include <ATen/core/Tensor.h>

#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

struct AtenTensorOpaque; // Inductor's C name for a heap-allocated at::Tensor

namespace tle {

using Tensors = std::vector<at::Tensor>;

// A graph in a form that runs. Called with the GIL; whoever computes lets go of it.
class Runnable {
 public:
  virtual ~Runnable() = default;
  virtual Tensors run(const Tensors& inputs) = 0;
};

// TorchScript's graph, operator by operator.
class ScriptProgram : public Runnable {
 public:
  explicit ScriptProgram(std::shared_ptr<torch::jit::Graph> graph) : program_(std::move(graph)) {}
  Tensors run(const Tensors& inputs) override;

 private:
  Program program_;
};

// A number that Python would have raised for: what native code gave is not to be used.
struct NotFinite : std::runtime_error {
  NotFinite() : std::runtime_error("a number of the graph is not finite") {}
};

// What a backend made of a graph. An error of that decides nothing about the program: the graph
// itself answers then.
class Attempt : public Runnable {
 public:
  // Args:
  //   draws: random numbers, which are put back before the graph draws them again.
  //   failed: called with the inputs, as a list, and the error, or None for NotFinite; returns the
  //     outputs.
  Attempt(std::shared_ptr<Runnable> target, bool draws, PyObject* failed);
  ~Attempt() override;
  Tensors run(const Tensors& inputs) override;

 private:
  std::shared_ptr<Runnable> target_;
  bool draws_;
  PyObject* failed_;
};

// Passes calls on to another one, which can be replaced between calls, from any thread.
class Switch : public Runnable {
 public:
  explicit Switch(std::shared_ptr<Runnable> target) : target_(std::move(target)) {}
  Tensors run(const Tensors& inputs) override { return target()->run(inputs); }
  std::shared_ptr<Runnable> target() const;
  void set_target(std::shared_ptr<Runnable> target);

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Runnable> target_;
};

// How an output of a graph comes out of what Inductor's code returns.
struct OutputPlan {
  bool from_input = false;
  int64_t index = 0; // of the input, or of the code's output
  // A view of that: the output as the program's graph has it.
  struct View {
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int64_t offset;
  };
  std::optional<View> view;
};

// A library that Inductor's C++ wrapper made, called at its innermost entry point.
class NativeProgram : public Runnable {
 public:
  // Args:
  //   path: the library; somebody else keeps it loaded.
  //   inputs: which inputs of the graph it takes, in its order.
  //   constants: what it takes after them, the same on each call.
  //   num_outputs: how many tensors it returns.
  //   outputs: how the outputs of the graph come out of these.
  //   last_is_check: the last of them says whether the others are right, and is none itself.
  NativeProgram(
      const std::string& path,
      std::vector<int64_t> inputs,
      Tensors constants,
      size_t num_outputs,
      std::vector<OutputPlan> outputs,
      bool last_is_check);
  Tensors run(const Tensors& inputs) override;

 private:
  using Entry = void (*)(AtenTensorOpaque**, AtenTensorOpaque**);
  Entry entry_;
  std::vector<int64_t> inputs_;
  Tensors constants_;
  size_t num_outputs_;
  std::vector<OutputPlan> outputs_;
  bool last_is_check_;
};

// Code that has the values of some inputs in it: valid while those inputs are the same
// tensors with the same contents.
class FrozenProgram : public Runnable {
 public:
  // Args:
  //   weights: the inputs whose values `frozen` knows.
  //   inputs: what they are.
  //   changed: called with the inputs, as a list, instead, when one of them is another
  //     one or was written to; returns the outputs.
  FrozenProgram(
      std::shared_ptr<Runnable> frozen,
      const std::vector<int64_t>& weights,
      const Tensors& inputs,
      PyObject* changed);
  ~FrozenProgram() override;
  Tensors run(const Tensors& inputs) override;
  bool is_fresh(const Tensors& inputs) const;

 private:
  struct Weight {
    int64_t index;
    at::Tensor tensor; // held: so that no other one gets its address
    uint32_t version;
    const void* data;
  };
  std::shared_ptr<Runnable> frozen_;
  std::vector<Weight> weights_;
  PyObject* changed_;
};

// A Python callable, list of tensors -> sequence of tensors.
class PythonProgram : public Runnable {
 public:
  explicit PythonProgram(PyObject* callable);
  ~PythonProgram() override;
  Tensors run(const Tensors& inputs) override;

 private:
  PyObject* callable_;
};

void bind_compile(pybind11::module_& m);

} // namespace tle
