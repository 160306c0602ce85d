// Stage "record": what eager refuses about memory and dtypes, and functionalization does not see.
#pragma once

#include "record.h"

namespace tle {

// Raises what eager would raise for an operator that writes to its arguments: results that
// cannot be cast to them, and operands that overlap with them in part. Where eager computes
// with such operands in the order of its kernel's loop, raises Unsupported. The arguments are
// those on top of the stack, from `begin` on; functional tensors stand for the captured ones.
void rehearse(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    const torch::jit::Stack& stack,
    size_t begin);

// The result of a custom operator that returns a view of one of its arguments, made with
// as_strided instead: where it lies in the argument's memory, stand-ins tell. Raises
// Unsupported when it is no view of the argument's own dtype, or not always the same one.
at::Tensor view_as_strided(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    const torch::jit::Stack& stack,
    size_t begin);

} // namespace tle
