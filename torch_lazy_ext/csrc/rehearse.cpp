#include "rehearse.h"

#include "generators.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/Functions.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorIterator.h>
#include <c10/util/ScopeExit.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace tle {

using c10::IValue;
using torch::jit::Stack;
namespace fi = at::functionalization::impl;

namespace {

// A captured tensor among the arguments: its place in the memory of its storage.
struct Operand {
  at::Tensor tensor;
  const c10::StorageImpl* storage;
  bool written;
  int64_t begin; // in bytes
  int64_t end;
};

template <class F>
void for_each_tensor(const IValue& v, F&& f) {
  if (v.isTensor()) {
    f(v.toTensor());
  } else if (v.isTensorList()) {
    for (const at::Tensor& t : v.toTensorVector()) {
      f(t);
    }
  } else if (v.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) {
      if (t.has_value()) {
        f(*t);
      }
    }
  }
}

Operand operand_of(const at::Tensor& t, bool written) {
  fi::sync(t);
  int64_t extent = t.numel() == 0 ? 0 : 1;
  for (int64_t d = 0; d < t.dim() && extent != 0; ++d) {
    extent += (t.size(d) - 1) * t.stride(d);
  }
  const auto itemsize = static_cast<int64_t>(t.itemsize());
  const int64_t begin = t.storage_offset() * itemsize;
  return {
      t,
      fi::unsafeGetFunctionalWrapper(t)->unsafe_storage().unsafeGetStorageImpl(),
      written,
      begin,
      begin + extent * itemsize};
}

bool same_layout(const Operand& a, const Operand& b) {
  return a.begin == b.begin && a.tensor.sizes() == b.tensor.sizes() &&
      a.tensor.strides() == b.tensor.strides() && a.tensor.scalar_type() == b.tensor.scalar_type();
}

// Calls `visit` with the position in bytes of each element.
template <class F>
void visit_elements(const Operand& o, F&& visit) {
  const at::Tensor& t = o.tensor;
  const auto itemsize = static_cast<int64_t>(t.itemsize());
  std::vector<int64_t> index(t.dim(), 0);
  int64_t position = o.begin;
  for (int64_t left = t.numel(); left > 0; --left) {
    visit(position);
    for (int64_t d = t.dim() - 1; d >= 0; --d) {
      position += t.stride(d) * itemsize;
      if (++index[d] < t.size(d)) {
        break;
      }
      position -= t.size(d) * t.stride(d) * itemsize;
      index[d] = 0;
    }
  }
}

bool overlap(const Operand& a, const Operand& b) {
  if (a.storage != b.storage || a.begin >= b.end || b.begin >= a.end) {
    return false;
  }
  const int64_t begin = std::min(a.begin, b.begin);
  std::vector<bool> covered(std::max(a.end, b.end) - begin, false);
  visit_elements(a, [&](int64_t position) {
    for (size_t k = 0; k < a.tensor.itemsize(); ++k) {
      covered[position - begin + k] = true;
    }
  });
  bool found = false;
  visit_elements(b, [&](int64_t position) {
    for (size_t k = 0; k < b.tensor.itemsize(); ++k) {
      found = found || covered[position - begin + k];
    }
  });
  return found;
}

// The words of errors about dtypes and about memory; others may be due to the stand-ins' values.
bool is_about_operands(const std::string& message) {
  for (const char* words :
       {"be cast",
        "dtype",
        "scalar type",
        "memory location",
        "not implemented for",
        "match the broadcast shape"}) {
    if (message.find(words) != std::string::npos) {
      return true;
    }
  }
  return false;
}

// Memory of a numpy array is not.
bool is_resizable(const Recorder& recorder, const c10::StorageImpl* storage) {
  return std::all_of(recorder.inputs.begin(), recorder.inputs.end(), [&](const LiftedInput& input) {
    return storage_of(input.twin) != storage || !input.tensor.defined() ||
        input.tensor.storage().resizable();
  });
}

class SilentWarnings : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// What is in the memory of stand-ins: other values at each place, also where tensors share
// it only, or zeros.
enum class Contents { Counted, CountedIfShared, Zeros };

// Eager tensors with the layouts of the captured ones, over memory of `aliased` tensors or
// each over its own.
Stack stand_ins(
    const Stack& stack,
    size_t begin,
    const std::vector<Operand>& operands,
    bool aliased,
    Contents contents) {
  std::vector<std::pair<const c10::StorageImpl*, at::Tensor>> memory;
  auto bytes_of = [&](const Operand& o) {
    for (const auto& [storage, bytes] : memory) {
      if (aliased && storage == o.storage) {
        return bytes;
      }
    }
    int64_t size = 0;
    size_t sharing = 0;
    for (const Operand& other : operands) {
      if (other.storage == o.storage) {
        size = std::max(size, other.end);
        ++sharing;
      }
    }
    at::Tensor bytes = at::zeros({size}, at::kByte);
    const at::ScalarType dtype = o.tensor.scalar_type();
    const bool counted_here =
        contents == Contents::Counted || (contents == Contents::CountedIfShared && sharing > 1);
    if (counted_here && size % static_cast<int64_t>(o.tensor.itemsize()) == 0) {
      // The same ones in each run.
      at::Tensor values =
          bytes.view(c10::isComplexType(dtype) ? c10::toRealValueType(dtype) : dtype);
      const at::Tensor counted = at::arange(values.numel(), at::kDouble);
      if (c10::isIntegralType(dtype, /*includeBool=*/true)) {
        // For bool the golden ratio: a pattern with a period would be the same in each row.
        values.copy_(
            dtype == at::kBool ? counted.add(1).mul(0.6180339887).frac().ge(0.5)
                               : counted.remainder(61).add(1));
      } else {
        values.copy_(counted.remainder(61).add(1).div(17));
      }
    }
    memory.emplace_back(o.storage, bytes);
    return bytes;
  };
  // One object passed twice is one object here: it may get its new shape before it is read.
  std::vector<std::pair<at::Tensor, at::Tensor>> objects;
  auto make = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined() || !fi::isFunctionalTensor(t)) {
      return t;
    }
    for (const auto& [captured, made] : objects) {
      if (aliased && captured.is_same(t)) {
        return made;
      }
    }
    for (const Operand& o : operands) {
      if (o.tensor.is_same(t)) {
        at::Tensor made = at::empty({0}, t.options().device(at::kCPU));
        made.set_(bytes_of(o).storage(), t.storage_offset(), t.sizes(), t.strides());
        objects.emplace_back(t, made);
        return made;
      }
    }
    return t;
  };
  Stack out;
  for (size_t i = begin; i < stack.size(); ++i) {
    const IValue& v = stack[i];
    if (v.isTensor()) {
      out.emplace_back(make(v.toTensor()));
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) {
        list.push_back(make(t));
      }
      out.emplace_back(std::move(list));
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : v.toOptionalTensorVector()) {
        list.push_back(t.has_value() ? std::optional<at::Tensor>(make(*t)) : std::nullopt);
      }
      out.emplace_back(std::move(list));
    } else {
      out.push_back(v);
    }
  }
  return out;
}

} // namespace

void rehearse(Recorder& recorder, const c10::OperatorHandle& op, const Stack& stack, size_t begin) {
  const c10::FunctionSchema& schema = op.schema();
  std::vector<Operand> operands;
  std::vector<size_t> written;
  bool other_dtypes = false;
  bool resizes = false; // where the tensor has another shape than the result
  bool only_cpu = true;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
    const bool writes = alias != nullptr && alias->isWrite();
    const bool is_out = writes && schema.arguments()[i].kwarg_only();
    for_each_tensor(stack[begin + i], [&](const at::Tensor& t) {
      if (!t.defined() || !fi::isFunctionalTensor(t)) {
        return;
      }
      only_cpu = only_cpu && t.device().is_cpu();
      if (writes) {
        written.push_back(operands.size());
        resizes = resizes || is_out;
        other_dtypes = other_dtypes || c10::isIntegralType(t.scalar_type(), true);
      }
      operands.push_back(operand_of(t, writes));
      other_dtypes = other_dtypes ||
          t.scalar_type() != operands[written.empty() ? 0 : written[0]].tensor.scalar_type();
    });
  }
  if (written.empty() || !only_cpu) {
    return;
  }
  bool same = false;
  bool in_part = false;
  for (size_t w : written) {
    for (size_t i = 0; i < operands.size(); ++i) {
      if (i == w || (operands[i].written && i < w) || operands[i].storage != operands[w].storage) {
        continue;
      }
      if (same_layout(operands[i], operands[w])) {
        same = true;
      } else if (overlap(operands[i], operands[w])) {
        in_part = true;
      }
    }
  }
  const bool own = schema.name().compare(0, 6, "aten::") == 0;
  const bool random = op.hasTag(at::Tag::nondeterministic_seeded);
  if (!(in_part || (own && (resizes || (!random && (same || other_dtypes)))))) {
    return;
  }
  bool order_matters = in_part;
  if (own && (!random || resizes)) {
    RandomStates generators({at::detail::getDefaultCPUGenerator()});
    for (size_t i = begin; i < stack.size(); ++i) {
      if (stack[i].isGenerator()) {
        generators.keep(stack[i].toGenerator());
      }
    }
    auto put_back = c10::make_scope_exit([&]() { generators.put_back(); });
    // Eager gives a tensor its new shape in place, and views go on seeing the old one.
    auto check_sizes = [&](const std::vector<at::Tensor>& now, bool failed) {
      for (size_t k = 0; now.size() == written.size() && k < now.size(); ++k) {
        const Operand& o = operands[written[k]];
        auto* wrapper = fi::unsafeGetFunctionalWrapper(o.tensor);
        const bool alone =
            !failed && wrapper->view_metas().empty() && wrapper->unsafe_storage().use_count() == 1;
        const bool grows = now[k].numel() > o.tensor.numel();
        if (grows && !is_resizable(recorder, o.storage)) {
          throw Unsupported(
              c10::str(
                  schema.operator_name(),
                  " gives another shape to a tensor whose memory cannot grow (at ",
                  recorder.describe(recorder.current_source()),
                  "): use the result, without out="));
        }
        if (now[k].sizes() != o.tensor.sizes() && !alone) {
          throw Unsupported(
              c10::str(
                  schema.operator_name(),
                  " gives another shape to a tensor that shares memory with others, or fails after "
                  "that (at ",
                  recorder.describe(recorder.current_source()),
                  "): use the result, without out="));
        }
      }
    };
    StandaloneGuard alone;
    SilentWarnings silent;
    c10::WarningUtils::WarningHandlerGuard no_warnings(&silent);
    std::vector<at::Tensor> results[2];
    // Indices of other values than zero may be out of range, and those of zero meet one element.
    bool ran = false;
    for (const Contents contents :
         {Contents::Counted, Contents::CountedIfShared, Contents::Zeros}) {
      results[0].clear();
      results[1].clear();
      try {
        for (const bool aliased : {true, false}) {
          Stack arguments = stand_ins(stack, begin, operands, aliased, contents);
          auto& into = results[aliased ? 0 : 1];
          for (size_t i = 0; i < schema.arguments().size(); ++i) {
            const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
            if (alias != nullptr && alias->isWrite()) {
              for_each_tensor(arguments[i], [&](const at::Tensor& t) { into.push_back(t); });
            }
          }
          if (aliased || same || in_part) {
            op.callBoxed(&arguments);
          }
          if (aliased) {
            check_sizes(into, /*failed=*/false);
          }
        }
      } catch (const c10::Error& e) {
        check_sizes(results[0], /*failed=*/true);
        if (!ran && e.what_without_backtrace() != nullptr &&
            is_about_operands(e.what_without_backtrace())) {
          throw;
        }
        if (!ran && contents == Contents::Zeros) {
          return; // the operator itself decides
        }
        continue;
      }
      order_matters = order_matters && ran;
      ran = true;
      for (size_t k = 0; (same || in_part) && k < results[0].size(); ++k) {
        order_matters = order_matters || results[0][k].sizes() != results[1][k].sizes() ||
            !at::allclose(results[0][k].to(at::kComplexDouble),
                          results[1][k].to(at::kComplexDouble),
                          1e-5,
                          1e-8,
                          /*equal_nan=*/true);
      }
      if (!(same || in_part)) {
        break;
      }
    }
  }
  if (order_matters) {
    throw Unsupported(
        c10::str(
            schema.operator_name(),
            " reads memory that it writes to (at ",
            recorder.describe(recorder.current_source()),
            "), and its result depends on the order in which it does so: clone the operand"));
  }
}

at::Tensor view_as_strided(
    Recorder& recorder,
    const c10::OperatorHandle& op,
    const Stack& stack,
    size_t begin) {
  const c10::FunctionSchema& schema = op.schema();
  std::vector<Operand> operands;
  at::Tensor viewed;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
    for_each_tensor(stack[begin + i], [&](const at::Tensor& t) {
      if (t.defined() && fi::isFunctionalTensor(t)) {
        operands.push_back(operand_of(t, /*written=*/false));
        if (alias != nullptr && !alias->isWrite() && !viewed.defined()) {
          viewed = t;
        }
      }
    });
  }
  std::vector<at::Tensor> views;
  if (viewed.defined() && !viewed.requires_grad() && schema.returns().size() == 1 &&
      !schema.is_mutable() && viewed.device().is_cpu()) {
    StandaloneGuard alone;
    for (const bool ones : {false, true}) {
      Stack arguments = stand_ins(stack, begin, operands, /*aliased=*/true, Contents::Zeros);
      at::Tensor memory;
      for (size_t i = 0; i < arguments.size(); ++i) {
        for_each_tensor(arguments[i], [&](const at::Tensor& t) {
          if (ones && t.defined()) {
            t.fill_(1);
          }
          if (stack[begin + i].isTensor() && stack[begin + i].toTensor().is_same(viewed)) {
            memory = t;
          }
        });
      }
      op.callBoxed(&arguments);
      if (arguments.size() == 1 && arguments[0].isTensor() && memory.defined()) {
        const at::Tensor view = arguments[0].toTensor();
        if (view.storage().is_alias_of(memory.storage()) &&
            view.scalar_type() == viewed.scalar_type()) {
          views.push_back(view);
        }
      }
    }
  }
  if (views.size() != 2 || views[0].sizes() != views[1].sizes() ||
      views[0].strides() != views[1].strides() ||
      views[0].storage_offset() != views[1].storage_offset()) {
    throw Unsupported(
        c10::str(
            schema.operator_name(),
            " returns a view of its argument (at ",
            recorder.describe(recorder.current_source()),
            "), which cannot be followed: return a copy, or make the view with PyTorch's own "
            "operators"));
  }
  return at::as_strided(viewed, views[0].sizes(), views[0].strides(), views[0].storage_offset());
}

} // namespace tle
