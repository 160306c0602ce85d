// Stage "record": the nested tensor that nn.TransformerEncoder makes of a padding mask, as the
// padded tensor and its mask. The sizes of a nested tensor are data; those of the padded one are
// not, so one graph serves every mask.
#pragma once

#include "record.h"

namespace tle {

// Records an operator that makes or takes such a tensor. Returns whether it has put the results on
// the stack, in the place of the arguments from `begin` on.
bool record_nested(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    torch::jit::Stack* stack,
    size_t begin);

// Whether `record_nested` can record an operator of a nested tensor.
bool takes_nested(const c10::OperatorHandle& op);

} // namespace tle
