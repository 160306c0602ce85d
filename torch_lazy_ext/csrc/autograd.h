// Stage "record": what autograd keeps of a tensor beside its history.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <vector>

namespace tle {

// The Python functions that a backward calls when it comes by a tensor, in their order: hooks of
// the tensor, hooks after its gradient has been accumulated, and those of the function that
// accumulates, before and after it. A null pointer ends each of the four. Borrowed.
std::vector<PyObject*> hooks_of(const at::Tensor& tensor);

// Whether there are none, nor any of C++.
bool has_no_hooks(const at::Tensor& tensor);

// Whether a tensor has a tangent of forward-mode AD.
inline bool has_tangent(const at::Tensor& tensor) {
  const auto* meta =
      static_cast<torch::autograd::AutogradMeta*>(tensor.unsafeGetTensorImpl()->autograd_meta());
  return meta != nullptr && meta->fw_grad_ && !meta->fw_grad_->empty();
}

void bind_autograd(pybind11::module_& m);

} // namespace tle
