// Stage "record": shapes an operator gave before, so that its meta kernel runs once for
// equal arguments.
#pragma once

#include "record.h"

#include <torch/csrc/lazy/core/hash.h>

#include <mutex>

namespace tle {

// All that a meta kernel can see: operator, shapes, constants, default dtype. 128 bits of
// hash stand for them.
using ShapeKey = torch::lazy::hash_t;

template <class F>
ShapeKey shape_key(const OperatorCall& call, c10::Device device, F&& meta_of) {
  using torch::lazy::DataHash;
  using torch::lazy::HashCombine;
  const c10::OperatorName& name = call.op.operator_name();
  ShapeKey key = HashCombine(
      DataHash(name.name.data(), name.name.size()),
      DataHash(name.overload_name.data(), name.overload_name.size()));
  key = HashCombine(key, call.constants_hash);
  key = HashCombine(
      key, ShapeKey(static_cast<int64_t>(c10::typeMetaToScalarType(c10::get_default_dtype()))));
  key = HashCombine(key, ShapeKey(static_cast<int64_t>(device.type())));
  for (const Argument& a : call.arguments) {
    key = HashCombine(key, ShapeKey(static_cast<int64_t>(a.kind) + 16 * (a.values.size() + 1)));
    for (const ValueRef& v : a.values) {
      if (v.node < 0) {
        key = HashCombine(key, ShapeKey(int64_t{7}));
        continue;
      }
      const TensorMeta& m = meta_of(v);
      key = HashCombine(key, DataHash(m.sizes.data(), m.sizes.size() * sizeof(int64_t)));
      key = HashCombine(key, DataHash(m.strides.data(), m.strides.size() * sizeof(int64_t)));
      const int64_t rest[] = {
          static_cast<int64_t>(m.sizes.size()),
          m.storage_offset,
          static_cast<int64_t>(m.dtype),
          static_cast<int64_t>(m.conj) + 2 * static_cast<int64_t>(m.neg)};
      key = HashCombine(key, DataHash(rest, sizeof(rest)));
    }
  }
  return key;
}

// One for the process; safe from threads; emptied when it is full.
class ShapeCache {
 public:
  std::optional<Outputs> find(const ShapeKey& key);
  void insert(const ShapeKey& key, const Outputs& outputs);

 private:
  static constexpr size_t limit = 1 << 14;
  std::mutex mutex_;
  std::unordered_map<ShapeKey, Outputs, torch::lazy::HashReducer> known_;
};

ShapeCache& shape_cache();

} // namespace tle
