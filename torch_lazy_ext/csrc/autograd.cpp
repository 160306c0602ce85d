#include "autograd.h"

#include "products.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/extension.h>

#include <cstring>
#include <typeinfo>
#include <unordered_set>

namespace py = pybind11;
using torch::autograd::Edge;
using torch::autograd::Node;

namespace tle {

namespace {

constexpr size_t kKinds = 4; // as hooks_of lists them

// The dictionary of a hook that holds Python functions; null for one of C++. Their classes are
// known to libtorch_python alone, by name to others.
template <class PythonHook, class Hook>
PyObject* functions_of(const Hook& hook, const char* name) {
  return std::strcmp(typeid(hook).name(), name) == 0
      ? reinterpret_cast<const PythonHook&>(hook).dict
      : nullptr;
}

void append(std::vector<PyObject*>& out, PyObject* functions) {
  if (functions == nullptr || !PyDict_Check(functions)) {
    return;
  }
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(functions, &position, &key, &value) != 0) {
    out.push_back(value);
  }
}

template <class PythonHook, class Hooks>
void append_all(std::vector<PyObject*>& out, const Hooks& hooks, const char* name) {
  for (const auto& hook : hooks) {
    append(out, functions_of<PythonHook>(*hook, name));
  }
}

constexpr const char* kTensorPre = "N5torch8autograd23PyFunctionTensorPreHookE";
constexpr const char* kPre = "N5torch8autograd17PyFunctionPreHookE";
constexpr const char* kPost = "N5torch8autograd18PyFunctionPostHookE";
constexpr const char* kPostAccumulate = "N5torch8autograd32PyFunctionTensorPostAccGradHooksE";

// What `cut` changed.
struct Cut {
  std::vector<std::pair<decltype(Edge::function), size_t>> places;
  std::vector<Edge> before;

  void restore() {
    for (size_t i = 0; i < places.size(); ++i) {
      places[i].first->next_edges()[places[i].second] = before[i];
    }
    places.clear();
    before.clear();
  }
};

} // namespace

std::vector<PyObject*> hooks_of(const at::Tensor& tensor) {
  namespace impl = torch::autograd::impl;
  const auto* meta =
      static_cast<torch::autograd::AutogradMeta*>(tensor.unsafeGetTensorImpl()->autograd_meta());
  std::vector<PyObject*> out;
  out.reserve(kKinds);
  if (meta == nullptr) {
    out.resize(kKinds, nullptr);
    return out;
  }
  append_all<torch::autograd::PyFunctionTensorPreHook>(out, meta->hooks_, kTensorPre);
  out.push_back(nullptr);
  if (meta->post_acc_grad_hooks_) {
    append(
        out,
        functions_of<torch::autograd::PyFunctionTensorPostAccGradHooks>(
            *meta->post_acc_grad_hooks_, kPostAccumulate));
  }
  out.push_back(nullptr);
  const auto accumulator = impl::try_get_grad_accumulator(tensor);
  if (accumulator) {
    append_all<torch::autograd::PyFunctionPreHook>(out, accumulator->pre_hooks(), kPre);
  }
  out.push_back(nullptr);
  if (accumulator) {
    append_all<torch::autograd::PyFunctionPostHook>(out, accumulator->post_hooks(), kPost);
  }
  out.push_back(nullptr);
  return out;
}

bool has_no_hooks(const at::Tensor& tensor) {
  const auto* meta =
      static_cast<torch::autograd::AutogradMeta*>(tensor.unsafeGetTensorImpl()->autograd_meta());
  if (meta == nullptr) {
    return true;
  }
  if (!meta->hooks_.empty() || meta->post_acc_grad_hooks_) {
    return false;
  }
  const auto accumulator = torch::autograd::impl::try_get_grad_accumulator(tensor);
  return !accumulator || (accumulator->pre_hooks().empty() && accumulator->post_hooks().empty());
}

void bind_autograd(py::module_& m) {
  m.def("has_tangent", &has_tangent, "Whether a tensor has a tangent of forward-mode AD.");
  m.def(
      "hooks_of",
      [](const at::Tensor& t) {
        std::vector<std::vector<py::object>> out(1);
        for (PyObject* function : hooks_of(t)) {
          if (function == nullptr) {
            out.emplace_back();
          } else {
            out.back().push_back(py::reinterpret_borrow<py::object>(function));
          }
        }
        out.pop_back();
        return out;
      },
      "The functions that a backward calls when it comes by a tensor, of four kinds.");
  m.def(
      "grad_of",
      [](const at::Tensor& t) -> std::optional<at::Tensor> {
        const auto* meta = torch::autograd::impl::get_autograd_meta(t);
        if (meta == nullptr || !meta->grad_.defined()) {
          return std::nullopt;
        }
        return meta->grad_;
      },
      "The gradient of a tensor, leaf or not: `Tensor.grad` warns where nobody has asked for one.");
  m.def(
      "name_in_eager",
      &name_in_eager,
      "Of a tensor whose function of autograd is this package's: what eager's is called.");
  m.def(
      "drop_hooks",
      [](const at::Tensor& t) {
        torch::autograd::impl::clear_hooks(t);
        if (const auto& function = t.grad_fn()) {
          function->tensor_pre_hooks().clear();
          function->retains_grad_hooks().clear();
        }
      },
      "Take the hooks from a tensor that stands for one of the user's.");
  m.def(
      "is_hooked",
      [](const at::Tensor& view, const at::Tensor& base) {
        auto function = view.grad_fn();
        const auto end = base.grad_fn();
        while (function && function != end && function->num_outputs() != 0) {
          if (!function->tensor_pre_hooks().empty() || !function->pre_hooks().empty() ||
              !function->post_hooks().empty()) {
            return true;
          }
          function = function->num_outputs() == 1 ? function->next_edge(0).function : nullptr;
        }
        return false;
      },
      "Whether there are hooks in the history that a view has beyond that of its base.");
  py::class_<Cut>(m, "Cut").def("restore", &Cut::restore);
  m.def(
      "cut",
      [](const std::vector<at::Tensor>& outputs,
         const std::vector<at::Tensor>& places,
         const std::vector<at::Tensor>& stops) {
        Cut cut;
        std::unordered_set<const Node*> seen;
        std::vector<decltype(Edge::function)> stack;
        for (const at::Tensor& output : outputs) {
          stack.push_back(output.grad_fn());
        }
        while (!stack.empty()) {
          const auto function = stack.back();
          stack.pop_back();
          if (!function || !seen.insert(function.get()).second) {
            continue;
          }
          auto& edges = function->next_edges();
          for (size_t k = 0; k < edges.size(); ++k) {
            for (size_t p = 0; p < places.size(); ++p) {
              if (edges[k].function == places[p].grad_fn() &&
                  edges[k].input_nr == places[p].output_nr()) {
                cut.places.emplace_back(function, k);
                cut.before.push_back(edges[k]);
                edges[k] = torch::autograd::impl::gradient_edge(stops[p]);
                break;
              }
            }
            stack.push_back(edges[k].function);
          }
        }
        return cut;
      },
      "Let histories end at `places`, in the leaves `stops`, until `restore()` is called.");
}

} // namespace tle
