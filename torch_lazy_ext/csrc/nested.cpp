#include "nested.h"

#include <ATen/Functions.h>
#include <torch/library.h>

namespace tle {

using c10::IValue;
using torch::jit::Stack;

namespace {

// As PyTorch's kernel, which reads the mask: each row is a run of true, then a run of false.
at::Tensor is_left_aligned(const at::Tensor& mask) {
  return at::le(mask.slice(1, 1), mask.slice(1, 0, -1)).all();
}

bool are_padded_and_mask(const IValue& padded, const IValue& mask) {
  const at::Tensor &t = padded.toTensor(), &m = mask.toTensor();
  return t.dim() == 3 && m.dim() == 2 && m.scalar_type() == at::kBool && m.size(0) == t.size(0) &&
      m.size(1) == t.size(1);
}

// aten::_transformer_encoder_layer_fwd of the nested tensor that `mask` picks out of `src`, padded
// with zeros.
at::Tensor padded_encoder_layer(
    const at::Tensor& src,
    const at::Tensor& mask,
    int64_t embed_dim,
    int64_t num_heads,
    const at::Tensor& qkv_weight,
    const at::Tensor& qkv_bias,
    const at::Tensor& proj_weight,
    const at::Tensor& proj_bias,
    bool use_gelu,
    bool norm_first,
    double eps,
    const at::Tensor& norm_weight_1,
    const at::Tensor& norm_bias_1,
    const at::Tensor& norm_weight_2,
    const at::Tensor& norm_bias_2,
    const at::Tensor& ffn_weight_1,
    const at::Tensor& ffn_bias_1,
    const at::Tensor& ffn_weight_2,
    const at::Tensor& ffn_bias_2) {
  if (src.is_meta()) {
    return at::empty(src.sizes(), src.options());
  }
  const at::Tensor out = at::_transformer_encoder_layer_fwd(
      at::_nested_tensor_from_mask(src, mask, /*mask_check=*/false),
      embed_dim,
      num_heads,
      qkv_weight,
      qkv_bias,
      proj_weight,
      proj_bias,
      use_gelu,
      norm_first,
      eps,
      norm_weight_1,
      norm_bias_1,
      norm_weight_2,
      norm_bias_2,
      ffn_weight_1,
      ffn_bias_1,
      ffn_weight_2,
      ffn_bias_2);
  return out.to_padded_tensor(0.0, src.sizes());
}

// What the program is given: another tensor than the values, which any operator may take.
at::Tensor stand_in(Recorder& recorder, const at::Tensor& values, const at::Tensor& mask) {
  at::Tensor t = at::alias(values);
  recorder.nested[t.unsafeGetTensorImpl()] = {t, values, mask};
  return t;
}

constexpr size_t num_weights_end = 18; // of the layer's arguments; then mask and mask_type

} // namespace

bool takes_nested(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  return name == "aten::_transformer_encoder_layer_fwd" || name == "aten::to_padded_tensor";
}

bool record_nested(Recorder& recorder, const c10::OperatorHandle& op, Stack* stack, size_t begin) {
  const std::string& name = op.schema().name();
  auto at = [&](size_t i) -> const IValue& { return (*stack)[begin + i]; };
  auto answer = [&](IValue result) {
    stack->resize(begin);
    stack->push_back(std::move(result));
    return true;
  };
  if (name == "aten::_nested_tensor_from_mask_left_aligned") {
    return are_padded_and_mask(at(0), at(1)) &&
        answer(is_left_aligned(at(1).toTensor()).item().toBool());
  }
  if (name == "aten::_nested_tensor_from_mask" && op.schema().overload_name().empty()) {
    if (!are_padded_and_mask(at(0), at(1)) ||
        (at(2).toBool() && !is_left_aligned(at(1).toTensor()).item().toBool())) {
      return false; // an error
    }
    const at::Tensor values = at(0).toTensor().clone(at::MemoryFormat::Contiguous);
    return answer(stand_in(recorder, values, at(1).toTensor().clone()));
  }
  if (!takes_nested(op) || !op.schema().overload_name().empty()) {
    return false;
  }
  const auto found = recorder.nested.find(at(0).toTensor().unsafeGetTensorImpl());
  if (found == recorder.nested.end()) {
    return false;
  }
  const at::Tensor values = found->second.values, mask = found->second.mask;
  if (name == "aten::to_padded_tensor") {
    // Without a size, that of the longest row.
    if (at(2).isNone() || at(2).toIntVector() != values.sizes().vec()) {
      throw Unsupported(
          c10::str(
              "aten::to_padded_tensor gives a size that depends on data (at ",
              recorder.describe(recorder.current_source()),
              "): pass the size of the tensor that was masked as output_size"));
    }
    return answer(at::where(mask.unsqueeze(-1), values, at(1).toDouble()));
  }
  if (!at(num_weights_end).isNone()) {
    return false;
  }
  static const auto layer =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_lazy_ext::padded_encoder_layer", "");
  Stack arguments{values, mask};
  arguments.insert(
      arguments.end(),
      stack->begin() + static_cast<int64_t>(begin) + 1,
      stack->begin() + static_cast<int64_t>(begin + num_weights_end));
  layer.callBoxed(&arguments);
  return answer(stand_in(recorder, arguments[0].toTensor(), mask));
}

TORCH_LIBRARY_FRAGMENT(torch_lazy_ext, m) {
  m.def(
      "padded_encoder_layer(Tensor src, Tensor mask, int embed_dim, int num_heads, "
      "Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias, bool use_gelu, "
      "bool norm_first, float eps, Tensor norm_weight_1, Tensor norm_bias_1, "
      "Tensor norm_weight_2, Tensor norm_bias_2, Tensor ffn_weight_1, Tensor ffn_bias_1, "
      "Tensor ffn_weight_2, Tensor ffn_bias_2) -> Tensor");
}

TORCH_LIBRARY_IMPL(torch_lazy_ext, CompositeExplicitAutograd, m) {
  m.impl("padded_encoder_layer", &padded_encoder_layer);
}

} // namespace tle
