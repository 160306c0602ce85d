#include "products.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <torch/csrc/autograd/custom_function.h>

namespace tle {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

bool is_any(const at::Tensor& mask) {
  return mask.any().item().toBool();
}

// For each element the product of the others along `dim`, whatever is zero among them.
at::Tensor products_of_others(const at::Tensor& grad, const at::Tensor& input, int64_t dim) {
  const int64_t size = input.size(dim);
  if (input.numel() == 0) {
    return grad.expand_as(input);
  }
  if (size == 1) {
    return grad;
  }
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes[dim] = 1;
  const at::Tensor one = at::ones(sizes, grad.options());
  const at::Tensor before = at::cat({one, input.narrow(dim, 0, size - 1)}, dim).cumprod(dim);
  const at::Tensor turned = input.narrow(dim, 1, size - 1).flip(dim);
  const at::Tensor after = at::cat({one, turned}, dim).cumprod(dim).flip(dim);
  return grad * (before * after).conj();
}

class Prod : public torch::autograd::Function<Prod> {
 public:
  static at::Tensor forward(
      AutogradContext* context,
      const at::Tensor& self,
      std::optional<int64_t> dim,
      bool keepdim,
      std::optional<at::ScalarType> dtype) {
    const at::Tensor result = dim ? at::prod(self, *dim, keepdim, dtype) : at::prod(self, dtype);
    context->save_for_backward({self, result});
    if (dim) {
      context->saved_data["dim"] = at::maybe_wrap_dim(*dim, self.dim());
      context->saved_data["keepdim"] = keepdim;
    }
    return result;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    at::Tensor grad = grads[0], result = saved[1];
    at::Tensor gradient;
    if (grad.defined()) {
      const at::Tensor input = saved[0].to(grad.scalar_type());
      const bool whole = context->saved_data.count("dim") == 0;
      const int64_t dim = whole ? 0 : context->saved_data["dim"].toInt();
      if (!whole && !context->saved_data["keepdim"].toBool()) {
        grad = grad.unsqueeze(dim);
        result = result.unsqueeze(dim);
      }
      const at::Tensor zero = input == 0;
      if (!is_any(zero)) {
        gradient = grad * (result / input).conj();
      } else if (!whole) {
        gradient = products_of_others(grad, input, dim);
      } else if (!at::GradMode::is_enabled() && is_any(zero.sum() > 1)) {
        gradient = at::zeros_like(input);
      } else {
        gradient = products_of_others(grad, input.contiguous().view(-1), 0).view_as(input);
      }
    }
    return {gradient, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

} // namespace

at::Tensor differentiable_prod(
    const at::Tensor& self,
    std::optional<int64_t> dim,
    bool keepdim,
    std::optional<at::ScalarType> dtype) {
  return Prod::apply(self, dim, keepdim, dtype);
}

std::optional<std::string> name_in_eager(const at::Tensor& tensor) {
  const auto& function = tensor.grad_fn();
  const auto* own = dynamic_cast<const torch::autograd::CppNode<Prod>*>(function.get());
  if (own == nullptr) {
    return std::nullopt;
  }
  return own->ctx_.saved_data.count("dim") == 0 ? "ProdBackward0" : "ProdBackward1";
}

at::Tensor cumprod_backward_without_zeros(
    const at::Tensor& grad,
    const at::Tensor& input,
    int64_t dim,
    const at::Tensor& output) {
  const at::Tensor weighted = output.conj() * grad;
  if (is_any(input == 0)) {
    return at::Tensor();
  }
  return weighted.flip(dim).cumsum(dim).flip(dim).div(input.conj());
}

} // namespace tle
