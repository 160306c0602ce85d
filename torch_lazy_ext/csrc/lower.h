// Stage "lower": recorded nodes -> torch::jit::Graph and its parameters.
#pragma once

#include "record.h"

#include <torch/csrc/jit/ir/ir.h>

namespace tle {

// Whether results of an operator can share the memory of this argument, which they do not write to.
bool is_viewed(const c10::FunctionSchema& schema, size_t argument);

bool makes_views(const c10::FunctionSchema& schema);

// Whether the in-place variant of a node's operator gives something else: a product with a number
// that the tensor's type does not have (see `multiplier_in_place`).
bool rounds_otherwise_in_place(const torch::jit::Node* node);

struct Lowered {
  std::shared_ptr<torch::jit::Graph> graph;
  // For each graph input, the index of the lifted tensor it reads.
  std::vector<int64_t> parameters;
};

// Lowers what `roots` need of the nodes [begin, end), in program
// order. Values in `boundary` are inputs of the graph, after the lifted tensors. Equal nodes
// are lowered once, except those whose memory one of the first `num_exposed` roots hands
// out: a program may write to its results. Random nodes and collectives are lowered whether or
// not a root needs them, if `random` and `collectives` say so.
Lowered lower(
    Recorder& recorder,
    const std::vector<ValueRef>& roots,
    size_t num_exposed,
    int64_t begin,
    int64_t end,
    const std::vector<ValueRef>& boundary,
    bool random,
    bool collectives);

} // namespace tle
