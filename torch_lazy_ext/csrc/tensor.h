// Stage "lift": the tensor that stands for an eager one while a program is recorded.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>

#include <memory>
#include <string>
#include <vector>

namespace tle {

struct Recorder;

// Everything about a tensor that a program can see without reading its data.
struct TensorMeta {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  int64_t storage_offset = 0;
  at::ScalarType dtype = at::kFloat;
  c10::Device device = c10::kCPU;
  bool conj = false;
  bool neg = false;
  bool defined = true;

  static TensorMeta of(const at::Tensor& tensor);
  // A meta tensor with these properties, for shape inference.
  at::Tensor make_meta_tensor() const;
};

// Output `index` of the node recorded as number `node`; no tensor when `node` is -1.
struct ValueRef {
  int64_t node = -1;
  int64_t index = 0;
  bool operator==(const ValueRef& o) const { return node == o.node && index == o.index; }
};

// A tensor of a running capture. It says of itself what the eager tensor would say
// (device, sizes, strides, dtype) and holds no data.
struct CaptureTensorImpl : public c10::TensorImpl {
  CaptureTensorImpl(std::shared_ptr<Recorder> recorder, ValueRef value, const TensorMeta& meta);

  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version_counter,
      bool allow_tensor_metadata_change) const override;
  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version_counter,
      bool allow_tensor_metadata_change) const override;
  // Shown by PyTorch's error when somebody reads the data or the storage.
  const char* tensorimpl_type_name() const override;

  std::shared_ptr<Recorder> recorder;
  ValueRef value;
};

// nullptr when the tensor is not a tensor of a capture.
CaptureTensorImpl* as_capture(const at::Tensor& tensor);

// What kind of tensor a graph cannot hold this is ("a sparse tensor ..."), or nothing.
std::string unsupported_kind(const at::Tensor& tensor);

// A number that an operator wrapped in a tensor to compute with it.
bool is_wrapped_number(const at::Tensor& tensor);

} // namespace tle
