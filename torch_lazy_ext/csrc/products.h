// Stage "record": gradients of products, for which eager looks at the data.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace tle {

// `aten::prod`, of one dimension or of all, whose backward goes the way that eager's goes of these
// data: PyTorch's own takes another one for tensors that are no plain ones. What is asked of the
// data is a guard of the capture.
at::Tensor differentiable_prod(
    const at::Tensor& self,
    std::optional<int64_t> dim,
    bool keepdim,
    std::optional<at::ScalarType> dtype);

// What eager calls the function that such a tensor is a result of; nothing for other tensors.
std::optional<std::string> name_in_eager(const at::Tensor& tensor);

// `aten::cumprod_backward` where there is no zero; undefined where there is one.
at::Tensor cumprod_backward_without_zeros(
    const at::Tensor& grad,
    const at::Tensor& input,
    int64_t dim,
    const at::Tensor& output);

} // namespace tle
