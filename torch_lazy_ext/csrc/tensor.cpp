#include "tensor.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/TensorOptions.h>

namespace tle {

using c10::DispatchKeySet;

TensorMeta TensorMeta::of(const at::Tensor& t) {
  TensorMeta m;
  m.sizes = t.sizes().vec();
  m.strides = t.strides().vec();
  m.storage_offset = t.storage_offset();
  m.dtype = t.scalar_type();
  m.device = t.device();
  m.conj = t.is_conj();
  m.neg = t.is_neg();
  return m;
}

at::Tensor TensorMeta::make_meta_tensor() const {
  int64_t extent = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) {
      extent = 0;
      break;
    }
    extent += (sizes[i] - 1) * strides[i];
  }
  extent += storage_offset;
  at::Tensor t = at::Tensor(at::detail::empty_strided_meta({extent}, {1}, dtype));
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(sizes, strides, storage_offset);
  if (conj) {
    impl->_set_conj(true);
  }
  if (neg) {
    impl->_set_neg(true);
  }
  return t;
}

CaptureTensorImpl::CaptureTensorImpl(
    std::shared_ptr<Recorder> recorder_,
    ValueRef value_,
    const TensorMeta& meta)
    // The eager tensor's own key set: what looks at keys (autocast, fused kernels,
    // type checks) decides as eager. The capture's keys come from the thread.
    : c10::TensorImpl(
          DispatchKeySet(c10::computeDispatchKey(std::nullopt, std::nullopt, meta.device)),
          c10::scalarTypeToTypeMeta(meta.dtype),
          meta.device),
      recorder(std::move(recorder_)),
      value(value_) {
  set_sizes_and_strides(meta.sizes, meta.strides, meta.storage_offset);
  if (meta.conj) {
    _set_conj(true);
  }
  if (meta.neg) {
    _set_neg(true);
  }
  set_storage_access_should_throw();
}

namespace {

TensorMeta meta_of(const CaptureTensorImpl& t) {
  TensorMeta m;
  m.sizes = t.sizes().vec();
  m.strides = t.strides().vec();
  m.storage_offset = t.storage_offset();
  m.dtype = c10::typeMetaToScalarType(t.dtype());
  m.device = t.device();
  return m;
}

} // namespace

c10::intrusive_ptr<c10::TensorImpl> CaptureTensorImpl::shallow_copy_and_detach(
    const c10::VariableVersion& version_counter,
    bool allow_tensor_metadata_change) const {
  auto impl = c10::make_intrusive<CaptureTensorImpl>(recorder, value, meta_of(*this));
  copy_tensor_metadata(this, impl.get(), version_counter, allow_tensor_metadata_change);
  return impl;
}

c10::intrusive_ptr<c10::TensorImpl> CaptureTensorImpl::shallow_copy_and_detach(
    c10::VariableVersion&& version_counter,
    bool allow_tensor_metadata_change) const {
  auto impl = c10::make_intrusive<CaptureTensorImpl>(recorder, value, meta_of(*this));
  copy_tensor_metadata(this, impl.get(), std::move(version_counter), allow_tensor_metadata_change);
  return impl;
}

const char* CaptureTensorImpl::tensorimpl_type_name() const {
  return "a tensor recorded by torch_lazy_ext (it has no data while the program is captured, and "
         "none afterwards when the program kept it outside its results)";
}

CaptureTensorImpl* as_capture(const at::Tensor& t) {
  if (!t.defined() || t.unsafeGetTensorImpl()->has_storage()) {
    return nullptr;
  }
  return dynamic_cast<CaptureTensorImpl*>(t.unsafeGetTensorImpl());
}

std::string unsupported_kind(const at::Tensor& t) {
  if (t.is_nested()) {
    return "a nested tensor";
  }
  if (c10::isQIntType(t.scalar_type())) {
    return c10::str("a quantized tensor of dtype ", t.scalar_type());
  }
  if (t.layout() != at::kStrided) {
    return c10::str("a tensor of layout ", t.layout());
  }
  return "";
}

bool is_wrapped_number(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->is_wrapped_number();
}

} // namespace tle
