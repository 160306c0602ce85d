#include "replay.h"

namespace tle {

Program::Program(std::shared_ptr<torch::jit::Graph> graph)
    : graph_(std::move(graph)),
      // The simple executor: the graph is final, there is nothing to profile, and
      // the first call costs what every call costs.
      executor_(graph_, "torch_lazy_ext", torch::jit::SIMPLE) {}

std::vector<at::Tensor> Program::run(const std::vector<at::Tensor>& inputs) {
  torch::jit::Stack stack;
  stack.reserve(inputs.size());
  for (const at::Tensor& t : inputs) {
    stack.emplace_back(t);
  }
  c10::AutoGradMode no_grad(false);
  executor_.run(stack);
  std::vector<at::Tensor> outputs;
  outputs.reserve(stack.size());
  for (c10::IValue& v : stack) {
    outputs.push_back(std::move(v).toTensor());
  }
  return outputs;
}

} // namespace tle
