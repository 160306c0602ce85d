#include "shapes.h"

namespace tle {

std::optional<Outputs> ShapeCache::find(const ShapeKey& key) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = known_.find(key);
  return it == known_.end() ? std::nullopt : std::optional<Outputs>(it->second);
}

void ShapeCache::insert(const ShapeKey& key, const Outputs& outputs) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (known_.size() >= limit) {
    known_.clear();
  }
  known_.insert_or_assign(key, outputs);
}

ShapeCache& shape_cache() {
  // Never destroyed: captures may end after static destruction has begun.
  static ShapeCache* cache = new ShapeCache();
  return *cache;
}

} // namespace tle
