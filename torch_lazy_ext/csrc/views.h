// Stage "record": the way back from a view to what it is a view of, exact where functionalization's
// is not.
#pragma once

#include "record.h"

namespace tle {

// Whether functionalization has no exact way back from the view that an operator makes: it fills
// the gaps between the windows of `unfold` with zeros, and refuses writes through `as_strided` of a
// view, whose offset counts from the begin of the storage. (In a graph it does so too, for there
// the nodes of views make views.)
bool has_inexact_inverse(const c10::OperatorHandle& op);

// Gives a view that a call of such an operator has just made a way back that writes to what it
// shows, and leaves everything else as it is.
//   given: the arguments of the call.
void make_reversible(
    const c10::OperatorHandle& op,
    const torch::jit::Stack& given,
    const at::Tensor& view);

} // namespace tle
