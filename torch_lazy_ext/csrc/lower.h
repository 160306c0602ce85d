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

// Lowers what `roots` need, and every random node, in program order. Equal nodes are
// lowered once, except those whose memory one of the first `num_exposed` roots hands out:
// a program may write to its results.
Lowered lower(Recorder& recorder, const std::vector<ValueRef>& roots, size_t num_exposed);

} // namespace tle
