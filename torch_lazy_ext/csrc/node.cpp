#include "node.h"

#include <torch/csrc/lazy/core/hash.h>

namespace tle {

namespace {

std::vector<torch::lazy::Shape> shapes_of(const std::vector<TensorMeta>& metas) {
  std::vector<torch::lazy::Shape> shapes;
  shapes.reserve(metas.size());
  for (const TensorMeta& m : metas) {
    shapes.emplace_back(m.dtype, m.sizes);
  }
  return shapes;
}

// Nodes of one hash are one computation.
torch::lazy::hash_t hash_seed(const OperatorCall& call) {
  using torch::lazy::HashCombine;
  using torch::lazy::hash_t;
  const std::string& overload = call.op.schema().overload_name();
  hash_t h =
      HashCombine(call.constants_hash, torch::lazy::DataHash(overload.data(), overload.size()));
  // Which argument each operand is: LTC's own hash only sees the operands in a row.
  for (const Argument& a : call.arguments) {
    h = HashCombine(h, hash_t(static_cast<int64_t>(a.kind) + 16 * (a.values.size() + 1)));
    for (const ValueRef& v : a.values) {
      h = HashCombine(h, hash_t(v.node < 0 ? int64_t{-1} : v.index));
    }
  }
  return call.random || call.collective ? HashCombine(h, hash_t(call.serial)) : h;
}

} // namespace

GenericNode::GenericNode(int64_t input_index_, const TensorMeta& meta)
    : TsNode(
          torch::lazy::OpKind::Get("lazy_tensors::lifted"),
          torch::lazy::Shape(meta.dtype, meta.sizes),
          1,
          torch::lazy::hash_t(input_index_)),
      kind(NodeKind::Input),
      input_index(input_index_),
      metas({meta}),
      list_lengths({-1}),
      depends_on_input(true) {}

GenericNode::GenericNode(
    OperatorCall call_,
    std::vector<TensorMeta> metas_,
    std::vector<int64_t> list_lengths_)
    // A Tensor[] is unpacked when it is lowered, so outputs are counted as tensors;
    // LTC wants one at least.
    : TsNode(
          torch::lazy::OpKind(c10::Symbol::fromQualString(call_.op.schema().name())),
          call_.operands,
          shapes_of(metas_),
          std::max<size_t>(metas_.size(), 1),
          hash_seed(call_)),
      kind(NodeKind::Operator),
      call(std::move(call_)),
      metas(std::move(metas_)),
      list_lengths(std::move(list_lengths_)),
      depends_on_input(call->depends_on_input),
      depends_on_tangent(call->depends_on_tangent) {}

DefaultDtypeGuard::DefaultDtypeGuard(std::optional<at::ScalarType> dtype)
    : previous_(c10::get_default_dtype()), changed_(dtype.has_value()) {
  if (changed_) {
    c10::set_default_dtype(c10::scalarTypeToTypeMeta(*dtype));
  }
}

DefaultDtypeGuard::~DefaultDtypeGuard() {
  if (changed_) {
    c10::set_default_dtype(previous_);
  }
}

double number_of(const at::Tensor& t) {
  return t.is_meta() ? 1.0 : *t.const_data_ptr<double>();
}

torch::lazy::hash_t hash_constant(const c10::IValue& v) {
  using torch::lazy::DataHash;
  using torch::lazy::HashCombine;
  auto tag = [](int64_t k) { return torch::lazy::hash_t(k); };
  if (v.isNone()) {
    return tag(1);
  }
  if (v.isInt()) {
    return HashCombine(tag(2), tag(v.toInt()));
  }
  if (v.isDouble()) {
    // By bits: 0.1 and its neighbour differ, -0.0 and 0.0 differ, nan equals itself.
    const double d = v.toDouble();
    return HashCombine(tag(3), DataHash(&d, sizeof(d)));
  }
  if (v.isBool()) {
    return HashCombine(tag(4), tag(v.toBool() ? 1 : 0));
  }
  if (v.isComplexDouble()) {
    const auto c = v.toComplexDouble();
    return HashCombine(tag(5), DataHash(&c, sizeof(c)));
  }
  if (v.isString()) {
    const auto& s = v.toStringRef();
    return HashCombine(tag(6), DataHash(s.data(), s.size()));
  }
  if (v.isDevice()) {
    return HashCombine(tag(7), tag(static_cast<int64_t>(v.toDevice().type())));
  }
  if (v.isList()) {
    auto h = tag(8);
    for (const c10::IValue& e : v.toListRef()) {
      h = HashCombine(h, hash_constant(e));
    }
    return h;
  }
  if (v.isTensor() && v.toTensor().defined()) {
    const at::Tensor& t = v.toTensor();
    const auto dtype = tag(static_cast<int64_t>(t.scalar_type()));
    if (t.dim() == 0 && t.device().is_cpu()) {
      // A wrapped number.
      return HashCombine(tag(9), HashCombine(dtype, DataHash(t.const_data_ptr(), t.itemsize())));
    }
    return HashCombine(tag(10), tag(reinterpret_cast<intptr_t>(t.unsafeGetTensorImpl())));
  }
  return tag(11);
}

std::vector<at::Tensor> tensors_of(const torch::jit::Stack& results) {
  std::vector<at::Tensor> out;
  for (const c10::IValue& v : results) {
    if (v.isTensor()) {
      out.push_back(v.toTensor());
    } else if (v.isTensorList()) {
      for (const at::Tensor& t : v.toTensorVector()) {
        out.push_back(t);
      }
    }
  }
  return out;
}

} // namespace tle
