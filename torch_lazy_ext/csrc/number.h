// Stage "record": Python floats that a graph computes.
#pragma once

#include <ATen/core/Tensor.h>

namespace tle {

// A number of the graph: a 0-dim tensor of float64.
at::Tensor number(double value);

// A tensor that takes part in type promotion as a Python float does.
at::Tensor wrapped_number(double value);

// What eager's `mul_` multiplies by where it is given a number: the number in the type of the
// tensor, while `mul` computes with the number itself. A difference for float16 and bfloat16 only.
at::Scalar multiplier_in_place(const at::Scalar& number, at::ScalarType type);

} // namespace tle
