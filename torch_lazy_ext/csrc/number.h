// Stage "record": Python floats that a graph computes.
#pragma once

#include <ATen/core/Tensor.h>

namespace tle {

// A number of the graph: a 0-dim tensor of float64.
at::Tensor number(double value);

// A tensor that takes part in type promotion as a Python float does.
at::Tensor wrapped_number(double value);

} // namespace tle
