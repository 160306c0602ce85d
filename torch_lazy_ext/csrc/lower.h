// Stage "lower": recorded nodes -> torch::jit::Graph and its parameters.
#pragma once

#include "record.h"

#include <torch/csrc/jit/ir/ir.h>

namespace tle {

struct Lowered {
  std::shared_ptr<torch::jit::Graph> graph;
  // For each graph input, the index of the lifted tensor it reads.
  std::vector<int64_t> parameters;
};

// Lowers what `roots` need, and every random node, in program order.
Lowered lower(Recorder& recorder, const std::vector<ValueRef>& roots);

} // namespace tle
