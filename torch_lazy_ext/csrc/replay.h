// Stage "replay": a lowered graph that can be run.
#pragma once

#include "lower.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

namespace tle {

// A graph without control flow as a list of instructions over registers. Not TorchScript's
// executor: it optimizes (drops random nodes that nobody reads, rewrites constants) where
// this graph is final, and it pays for what the graph has none of (frames, branches).
class Program {
 public:
  explicit Program(std::shared_ptr<torch::jit::Graph> graph);

  // Takes the inputs from `stack` and leaves the outputs there. Needs no GIL. A value is
  // let go of by its last reader.
  void run(torch::jit::Stack& stack) const;

  const std::shared_ptr<torch::jit::Graph>& graph() const { return graph_; }

 private:
  struct Operand {
    int32_t index; // of a register, or ~index of a constant
    bool last;
  };
  struct Instruction {
    std::optional<c10::OperatorHandle> op; // called directly, when the dispatcher has it
    mutable torch::jit::Operation operation; // calling one is not const
    std::vector<Operand> inputs;
    std::vector<int32_t> outputs; // registers; -1: nobody reads it
    // The same operator on the memory of its first operand, for when nobody else has that.
    std::function<void(torch::jit::Stack&)> in_place;
  };
  void call(const Instruction& instruction, torch::jit::Stack& stack) const;

  std::shared_ptr<torch::jit::Graph> graph_;
  std::vector<c10::IValue> constants_;
  std::vector<Instruction> instructions_;
  std::vector<Operand> outputs_;
  int32_t num_inputs_ = 0;
  int32_t num_registers_ = 0;
};

} // namespace tle
