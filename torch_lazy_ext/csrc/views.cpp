#include "views.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/Functions.h>
#include <ATen/WrapDimUtils.h>

#include <functional>
#include <unordered_set>

namespace tle {

namespace fi = at::functionalization::impl;
using at::functionalization::ViewMeta;
using torch::jit::Stack;

namespace {

// A view by its place in the memory of another tensor; `offset` is that tensor's own if it is none.
struct Place {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  std::optional<int64_t> offset;
};

// Calls `visit` with the place in the storage of each element.
template <class F>
void visit_elements(at::IntArrayRef sizes, at::IntArrayRef strides, int64_t position, F&& visit) {
  std::vector<int64_t> index(sizes.size(), 0);
  for (int64_t left = c10::multiply_integers(sizes); left > 0; --left) {
    visit(position);
    for (size_t d = sizes.size(); d-- > 0;) {
      position += strides[d];
      if (++index[d] < sizes[d]) {
        break;
      }
      position -= sizes[d] * strides[d];
      index[d] = 0;
    }
  }
}

// Whether a place shows elements of `base` only, and nothing of what lies between and around them.
bool is_within(const Place& place, const at::Tensor& base) {
  const int64_t begin = base.storage_offset();
  const int64_t from = place.offset.value_or(begin);
  int64_t last = from;
  for (size_t d = 0; d < place.sizes.size(); ++d) {
    if (place.sizes[d] == 0) {
      return true;
    }
    last += (place.sizes[d] - 1) * place.strides[d];
  }
  if (base.is_non_overlapping_and_dense()) {
    return from >= begin && last < begin + base.numel();
  }
  std::unordered_set<int64_t> elements;
  visit_elements(base.sizes(), base.strides(), begin, [&](int64_t p) { elements.insert(p); });
  bool within = true;
  visit_elements(place.sizes, place.strides, from, [&](int64_t p) {
    within = within && elements.count(p) != 0;
  });
  return within;
}

// A view whose way back writes to its place, and nowhere else.
struct PlacedView : public ViewMeta {
  PlacedView(std::shared_ptr<ViewMeta> view, std::function<Place(const at::Tensor& base)> place)
      : ViewMeta(/*has_symbolic_inputs=*/false), view_(std::move(view)), place_(std::move(place)) {}

  at::Tensor forward(const at::Tensor& base) override { return view_->forward(base); }

  at::Tensor reverse(const at::Tensor& base, const at::Tensor& mutated_view) override {
    const Place place = place_(base);
    if (!is_within(place, base)) {
      throw NotRecordable(
          "it writes through as_strided to memory that is none of the elements of the view that "
          "as_strided was called on: call it on the tensor that the view was made of.");
    }
    return at::as_strided_scatter(base, mutated_view, place.sizes, place.strides, place.offset);
  }

 private:
  std::shared_ptr<ViewMeta> view_;
  std::function<Place(const at::Tensor& base)> place_;
};

Place place_of_windows(const at::Tensor& base, int64_t dim, int64_t size, int64_t step) {
  Place place{base.sizes().vec(), base.strides().vec(), std::nullopt};
  if (base.dim() == 0) {
    return {{size}, {1}, std::nullopt};
  }
  dim = at::maybe_wrap_dim(dim, base.dim());
  place.strides.push_back(place.strides[dim]);
  place.strides[dim] *= step;
  place.sizes[dim] = (place.sizes[dim] - size) / step + 1;
  place.sizes.push_back(size);
  return place;
}

} // namespace

bool has_inexact_inverse(const c10::OperatorHandle& op) {
  return op.schema().name() == "aten::unfold" || op.schema().name() == "aten::as_strided";
}

void make_reversible(const c10::OperatorHandle& op, const Stack& given, const at::Tensor& view) {
  if (!fi::isFunctionalTensor(view)) {
    return;
  }
  const bool windows = op.schema().name() == "aten::unfold";
  const auto& metas = fi::unsafeGetFunctionalWrapper(view)->view_metas();
  if (metas.empty() || (!windows && metas.size() == 1)) {
    return; // of no view, as_strided has a way back that is exact
  }
  std::function<Place(const at::Tensor&)> place;
  if (windows) {
    place = [dim = given.at(1).toInt(), size = given.at(2).toInt(), step = given.at(3).toInt()](
                const at::Tensor& base) { return place_of_windows(base, dim, size, step); };
  } else {
    Place fixed{given.at(1).toIntVector(), given.at(2).toIntVector(), view.storage_offset()};
    place = [fixed = std::move(fixed)](const at::Tensor&) { return fixed; };
  }
  // The wrapper's own list, which PyTorch gives out to read only. It was made for this view, and
  // nobody has seen it yet.
  auto& own = const_cast<std::vector<std::shared_ptr<ViewMeta>>&>(metas);
  own.back() = std::make_shared<PlacedView>(own.back(), std::move(place));
}

} // namespace tle
