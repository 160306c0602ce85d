#include "compile.h"

#include "generators.h"
#include "interrupts.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind.h>
#include <torch/csrc/utils/pybind.h>

#include <dlfcn.h>

#include <algorithm>
#include <set>

namespace tle {

namespace py = pybind11;

namespace {

// void inductor_entry_impl(AtenTensorHandle* inputs, AtenTensorHandle* outputs), in C++'s name.
constexpr const char* kEntry = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_";

AtenTensorOpaque* handle_of(const at::Tensor& tensor) {
  return reinterpret_cast<AtenTensorOpaque*>(new at::Tensor(tensor));
}

Tensors tensors_of(const py::handle& sequence) {
  Tensors out;
  for (const py::handle& item : sequence) {
    out.push_back(item.cast<at::Tensor>());
  }
  return out;
}

py::list list_of(const Tensors& tensors) {
  py::list out(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    out[i] = py::cast(tensors[i]);
  }
  return out;
}

// Reading it leaves a copy-on-write storage as it is.
const void* memory_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->unsafe_storage().data();
}

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0
                               : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

} // namespace

Tensors ScriptProgram::run(const Tensors& inputs) {
  py::gil_scoped_release no_gil;
  torch::jit::Stack stack(inputs.begin(), inputs.end());
  program_.run(stack);
  Tensors outputs;
  outputs.reserve(stack.size());
  for (c10::IValue& v : stack) {
    outputs.push_back(std::move(v).toTensor());
  }
  return outputs;
}

Attempt::Attempt(std::shared_ptr<Runnable> target, bool draws, PyObject* failed)
    : target_(std::move(target)), draws_(draws), failed_(failed) {
  Py_INCREF(failed_);
}

Attempt::~Attempt() {
  if (Py_IsInitialized() == 0) {
    return; // the end of the process
  }
  py::gil_scoped_acquire gil;
  Py_DECREF(failed_);
}

Tensors Attempt::run(const Tensors& inputs) {
  RandomStates drawn;
  if (draws_) {
    drawn.keep(at::detail::getDefaultCPUGenerator());
  }
  py::object error = py::none();
  try {
    return target_->run(inputs);
  } catch (py::error_already_set& e) {
    if (!e.matches(PyExc_Exception)) {
      throw;
    }
    error = e.value();
  } catch (const NotFinite&) {
    // Python raises for such a number, unless it came of others that are not finite: the graph
    // knows.
  } catch (const std::exception& e) {
    const auto* known = dynamic_cast<const c10::Error*>(&e);
    error =
        py::module_::import("builtins")
            .attr("RuntimeError")(known == nullptr ? e.what() : known->what_without_backtrace());
  }
  drawn.put_back();
  const Hold whole; // what a handler raises is no error of the graph
  return tensors_of(py::handle(failed_)(list_of(inputs), error));
}

std::shared_ptr<Runnable> Switch::target() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return target_;
}

void Switch::set_target(std::shared_ptr<Runnable> target) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    target_.swap(target);
  }
  // The one that was there goes here, outside of the lock.
}

NativeProgram::NativeProgram(
    const std::string& path,
    std::vector<int64_t> inputs,
    Tensors constants,
    size_t num_outputs,
    std::vector<OutputPlan> outputs,
    bool last_is_check)
    : inputs_(std::move(inputs)),
      constants_(std::move(constants)),
      num_outputs_(num_outputs),
      outputs_(std::move(outputs)),
      last_is_check_(last_is_check) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "Inductor's library cannot be loaded: ", dlerror());
  entry_ = reinterpret_cast<Entry>(dlsym(library, kEntry));
  TORCH_CHECK(entry_ != nullptr, path, " has no entry point of Inductor's C++ wrapper");
}

Tensors NativeProgram::run(const Tensors& inputs) {
  c10::AutoGradMode no_grad(false);
  Tensors made;
  made.reserve(num_outputs_);
  {
    // Nothing that happens inside is differentiated or seen: no dispatch through autograd.
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    c10::SmallVector<AtenTensorOpaque*, 64> handles;
    handles.reserve(inputs_.size() + constants_.size());
    for (int64_t i : inputs_) {
      handles.push_back(handle_of(inputs[i])); // the entry point owns them
    }
    for (const at::Tensor& t : constants_) {
      handles.push_back(handle_of(t));
    }
    c10::SmallVector<AtenTensorOpaque*, 16> results(num_outputs_, nullptr);
    entry_(handles.data(), results.data());
    if (PyErr_Occurred() != nullptr) {
      throw py::error_already_set(); // the outputs are not there
    }
    for (AtenTensorOpaque* handle : results) {
      made.push_back(*reinterpret_cast<at::Tensor*>(handle));
    }
    // Where two outputs are one buffer, they come as one handle.
    std::sort(results.begin(), results.end());
    results.erase(std::unique(results.begin(), results.end()), results.end());
    for (AtenTensorOpaque* handle : results) {
      delete reinterpret_cast<at::Tensor*>(handle);
    }
  }
  Tensors outputs;
  outputs.reserve(outputs_.size());
  for (const OutputPlan& plan : outputs_) {
    const at::Tensor& base = plan.from_input ? inputs[plan.index] : made[plan.index];
    if (!plan.view) {
      outputs.push_back(base);
      continue;
    }
    outputs.push_back(base.as_strided(
        plan.view->sizes, plan.view->strides, base.storage_offset() + plan.view->offset));
  }
  if (last_is_check_) {
    if (!outputs.back().item<bool>()) {
      throw NotFinite();
    }
    outputs.pop_back();
  }
  return outputs;
}

FrozenProgram::FrozenProgram(
    std::shared_ptr<Runnable> frozen,
    const std::vector<int64_t>& weights,
    const Tensors& inputs,
    PyObject* changed)
    : frozen_(std::move(frozen)), changed_(changed) {
  for (int64_t i : weights) {
    const at::Tensor& t = inputs[i];
    weights_.push_back({i, t, version_of(t), memory_of(t)});
  }
  Py_INCREF(changed_);
}

FrozenProgram::~FrozenProgram() {
  if (Py_IsInitialized() == 0) {
    return;
  }
  py::gil_scoped_acquire gil;
  Py_DECREF(changed_);
}

bool FrozenProgram::is_fresh(const Tensors& inputs) const {
  for (const Weight& w : weights_) {
    const at::Tensor& now = inputs[w.index];
    if (!now.is_same(w.tensor) || version_of(now) != w.version || memory_of(now) != w.data) {
      return false;
    }
  }
  return true;
}

Tensors FrozenProgram::run(const Tensors& inputs) {
  if (is_fresh(inputs)) {
    return frozen_->run(inputs);
  }
  const Hold whole; // what a handler raises is no error of the graph
  return tensors_of(py::handle(changed_)(list_of(inputs)));
}

PythonProgram::PythonProgram(PyObject* callable) : callable_(callable) {
  Py_INCREF(callable_);
}

PythonProgram::~PythonProgram() {
  if (Py_IsInitialized() == 0) {
    return;
  }
  py::gil_scoped_acquire gil;
  Py_DECREF(callable_);
}

Tensors PythonProgram::run(const Tensors& inputs) {
  const Hold whole; // what a handler raises is no error of the graph
  return tensors_of(py::handle(callable_)(list_of(inputs)));
}

void bind_compile(py::module_& m) {
  py::class_<Runnable, std::shared_ptr<Runnable>>(m, "Runnable", "A graph in a form that runs.")
      .def("run", &Runnable::run, "The graph's outputs for these inputs.");
  py::class_<ScriptProgram, Runnable, std::shared_ptr<ScriptProgram>>(m, "ScriptProgram")
      .def(py::init<std::shared_ptr<torch::jit::Graph>>());
  py::register_exception<NotFinite>(m, "NotFinite", PyExc_ArithmeticError);
  py::class_<Attempt, Runnable, std::shared_ptr<Attempt>>(m, "Attempt")
      .def(py::init([](std::shared_ptr<Runnable> target, bool draws, const py::function& failed) {
        return std::make_shared<Attempt>(std::move(target), draws, failed.ptr());
      }));
  py::class_<Switch, Runnable, std::shared_ptr<Switch>>(m, "Switch")
      .def(py::init<std::shared_ptr<Runnable>>())
      .def_property("target", &Switch::target, &Switch::set_target);
  py::class_<OutputPlan>(m, "OutputPlan")
      .def(
          py::init([](bool from_input,
                      int64_t index,
                      const std::optional<
                          std::tuple<std::vector<int64_t>, std::vector<int64_t>, int64_t>>& view) {
            OutputPlan plan{from_input, index, std::nullopt};
            if (view) {
              plan.view = {std::get<0>(*view), std::get<1>(*view), std::get<2>(*view)};
            }
            return plan;
          }),
          "Where an output comes from; `view`: (sizes, strides, offset) of a view of that.");
  py::class_<NativeProgram, Runnable, std::shared_ptr<NativeProgram>>(m, "NativeProgram")
      .def(
          py::init<
              const std::string&,
              std::vector<int64_t>,
              Tensors,
              size_t,
              std::vector<OutputPlan>,
              bool>());
  py::class_<FrozenProgram, Runnable, std::shared_ptr<FrozenProgram>>(m, "FrozenProgram")
      .def(
          py::init([](std::shared_ptr<Runnable> frozen,
                      const std::vector<int64_t>& weights,
                      const Tensors& inputs,
                      const py::function& changed) {
            return std::make_shared<FrozenProgram>(
                std::move(frozen), weights, inputs, changed.ptr());
          }))
      .def("is_fresh", &FrozenProgram::is_fresh);
  py::class_<PythonProgram, Runnable, std::shared_ptr<PythonProgram>>(m, "PythonProgram")
      .def(py::init([](const py::object& callable) {
        return std::make_shared<PythonProgram>(callable.ptr());
      }));
  m.def(
      "namespaces_of",
      [](const torch::jit::Graph& graph) {
        std::set<std::string> found;
        for (const torch::jit::Node* node : graph.nodes()) {
          found.insert(node->kind().ns().toUnqualString());
        }
        return found;
      },
      "The namespaces of the operators of a graph.");
}

} // namespace tle
