// Stage "lower": the part of a graph that only brings the tensors it writes to up to date.
#pragma once

#include "record.h"

#include <torch/csrc/jit/ir/ir.h>

namespace tle {

// Divides what `written` needs from what `kept` needs. Returns the values that are computed
// with `kept` and read by the rest: operators that cannot raise, each of them elementwise, so
// that the rest may write to the program's tensors as it goes.
std::vector<ValueRef> update_boundary(
    Recorder& recorder,
    const std::vector<ValueRef>& kept,
    const std::vector<ValueRef>& written);

// Lets a graph write output `k` to its input `targets[k]`: in place where its operators have
// such a variant and nobody reads the old value afterwards, or else by a copy as soon as nobody
// does.
void write_in_place(torch::jit::Graph& graph, const std::vector<int64_t>& targets);

} // namespace tle
