// Stage "replay": a lowered graph with its executor.
#pragma once

#include "lower.h"

#include <torch/csrc/jit/runtime/graph_executor.h>

namespace tle {

// Holds graph and executor, so that no cache of LTC's can drop them.
class Program {
 public:
  explicit Program(std::shared_ptr<torch::jit::Graph> graph);

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs);

  const std::shared_ptr<torch::jit::Graph>& graph() const {
    return graph_;
  }

 private:
  std::shared_ptr<torch::jit::Graph> graph_;
  torch::jit::GraphExecutor executor_;
};

} // namespace tle
