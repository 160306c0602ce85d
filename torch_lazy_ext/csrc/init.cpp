// The Python face of the extension.
#include "autograd.h"
#include "call.h"
#include "compile.h"
#include "generators.h"
#include "interrupts.h"
#include "lower.h"
#include "methods.h"
#include "namespaces.h"
#include "ran.h"
#include "record.h"
#include "update.h"

#include <ATen/FunctionalTensorWrapper.h>
#include <torch/csrc/jit/python/pybind.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstring>

namespace py = pybind11;
using namespace tle;

namespace {

namespace fi = at::functionalization::impl;
using ViewMetas = std::vector<std::shared_ptr<at::functionalization::ViewMeta>>;

// The chain of views that leads from a storage's base to one tensor of it.
struct ViewSequence {
  ViewMetas metas;
};

// How a tensor of the program relates to the graph.
struct Described {
  bool captured = false; // false: an eager tensor, or one of another kind
  int64_t lifted = -1; // the lifted tensor it is the twin of
  bool constant = false; // which is a constant
  int64_t base_lifted = -1; // the lifted tensor whose storage it shares
  uintptr_t storage = 0; // identity of the functional storage
  bool shares_version = false; // with that lifted tensor: a write to one counts for the other
  bool mutated = false; // the storage saw a mutation
  bool metadata_mutated = false;
  bool storage_changed = false;
  int64_t version = 0;
  ValueRef value;
  ViewSequence views;
};

// Whether two tensors count their versions together, as views of one tensor do.
bool share_version_counter(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_inference() || b.is_inference()) {
    return true; // there is nothing to count
  }
  c10::VariableVersion one = a.unsafeGetTensorImpl()->version_counter();
  const c10::VariableVersion other = b.unsafeGetTensorImpl()->version_counter();
  const auto before = one.current_version();
  const auto other_before = other.current_version();
  one.bump();
  const bool same = other.current_version() != other_before;
  one.set_version(before);
  return same;
}

// What the program sees in the place of `t`.
const at::Tensor& seen_by(Recorder& r, const at::Tensor& t) {
  auto original = r.input_by_impl.find(t.unsafeGetTensorImpl());
  auto rebound = r.rebound.find(t.unsafeGetTensorImpl());
  return rebound != r.rebound.end()       ? rebound->second.second
      : original != r.input_by_impl.end() ? r.inputs[original->second].twin
                                          : t;
}

Described describe_tensor(Recorder& r, const at::Tensor& t) {
  Described d;
  const at::Tensor& seen = seen_by(r, t);
  if (!fi::isFunctionalTensor(seen)) {
    return d;
  }
  Recorder::Resume resume(r);
  fi::sync(seen);
  auto* wrapper = fi::unsafeGetFunctionalWrapper(seen);
  CaptureTensorImpl* c = as_capture(wrapper->value());
  if (c == nullptr || c->recorder.get() != &r) {
    return d;
  }
  d.captured = true;
  auto twin = r.input_by_twin.find(seen.unsafeGetTensorImpl());
  if (twin != r.input_by_twin.end()) {
    d.lifted = static_cast<int64_t>(twin->second);
    d.constant = r.inputs[twin->second].constant;
  }
  auto* storage = wrapper->unsafe_storage().unsafeGetStorageImpl();
  d.storage = reinterpret_cast<uintptr_t>(storage);
  const auto writes = r.inference_writes.find(d.storage);
  d.version = !seen.is_inference()         ? static_cast<int64_t>(seen._version())
      : writes != r.inference_writes.end() ? writes->second
                                           : 0;
  // An input that is in no group is the only one over its memory.
  const bool alone = d.lifted >= 0 && r.inputs[d.lifted].base < 0;
  for (size_t i = alone ? d.lifted : 0; i < r.inputs.size(); ++i) {
    auto* w = fi::unsafeGetFunctionalWrapper(r.inputs[i].twin);
    // After Tensor.set_, the memory is another one's.
    if (w->unsafe_storage().unsafeGetStorageImpl() == storage && !w->was_storage_changed()) {
      d.base_lifted = static_cast<int64_t>(i);
      break;
    }
  }
  d.shares_version =
      d.base_lifted >= 0 && share_version_counter(seen, r.inputs[d.base_lifted].twin);
  d.mutated = wrapper->has_data_mutation();
  d.metadata_mutated = wrapper->has_metadata_mutation();
  d.storage_changed = wrapper->was_storage_changed();
  d.value = c->value;
  d.views.metas = wrapper->view_metas();
  return d;
}

// The leaf of the capture that the gradient of an input belongs to. It may have become a leaf that
// requires grad in the program, or ceased to be.
std::optional<at::Tensor> source_of(const LiftedInput& i) {
  const at::Tensor& leaf = i.source.defined() ? i.source : i.twin;
  const bool wanted = !i.constant && leaf.requires_grad() && leaf.is_leaf();
  return wanted ? std::optional(leaf) : std::nullopt;
}

py::tuple as_tuple(const LiftedInput& i) {
  return py::make_tuple(i.tensor, i.twin, i.constant, i.base);
}

// The value of the base of the storage that `t` belongs to, all updates applied.
ValueRef base_value(Recorder& r, const at::Tensor& tensor) {
  const at::Tensor& t = seen_by(r, tensor);
  Recorder::Resume resume(r);
  fi::sync(t);
  auto* wrapper = fi::unsafeGetFunctionalWrapper(t);
  wrapper->apply_updates();
  auto* storage = static_cast<at::functionalization::FunctionalStorageImpl*>(
      wrapper->unsafe_storage().unsafeGetStorageImpl());
  CaptureTensorImpl* c = as_capture(storage->base());
  TORCH_CHECK(c != nullptr && c->recorder.get() == &r);
  return c->value;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<ValueRef>(m, "ValueRef")
      .def_readonly("node", &ValueRef::node)
      .def_readonly("index", &ValueRef::index)
      .def("__eq__", [](const ValueRef& a, const ValueRef& b) { return a == b; })
      .def("__hash__", [](const ValueRef& a) { return a.node * 1000003 + a.index; });

  py::class_<ViewSequence>(m, "ViewSequence")
      .def("__len__", [](const ViewSequence& v) { return v.metas.size(); })
      .def(
          "apply",
          [](const ViewSequence& v, const at::Tensor& base) {
            return fi::apply_view_meta_sequence(base, v.metas);
          },
          "The view of `base`, a real tensor, that this sequence leads to.")
      .def(
          "after",
          [](const ViewSequence& v, const ViewSequence& first) -> std::optional<ViewSequence> {
            const size_t count = first.metas.size();
            if (count > v.metas.size() ||
                !std::equal(first.metas.begin(), first.metas.end(), v.metas.begin())) {
              return std::nullopt;
            }
            return ViewSequence{{v.metas.begin() + static_cast<int64_t>(count), v.metas.end()}};
          },
          "What follows on `first`, which it begins with; None where it does not.");

  py::class_<Described>(m, "Described")
      .def_readonly("captured", &Described::captured)
      .def_readonly("lifted", &Described::lifted)
      .def_readonly("constant", &Described::constant)
      .def_readonly("base_lifted", &Described::base_lifted)
      .def_readonly("storage", &Described::storage)
      .def_readonly("shares_version", &Described::shares_version)
      .def_readonly("mutated", &Described::mutated)
      .def_readonly("metadata_mutated", &Described::metadata_mutated)
      .def_readonly("storage_changed", &Described::storage_changed)
      .def_readonly("version", &Described::version)
      .def_readonly("value", &Described::value)
      .def_readonly("views", &Described::views);

  py::class_<TensorMeta>(m, "TensorMeta")
      .def_readonly("sizes", &TensorMeta::sizes)
      .def_readonly("strides", &TensorMeta::strides)
      .def_property_readonly("dtype", [](const TensorMeta& t) { return t.dtype; });

  py::class_<Checked>(m, "Checked")
      .def_readonly("values", &Checked::values)
      .def_readonly("complete", &Checked::complete)
      .def_readonly("learned", &Checked::learned)
      .def_readonly("bumps", &Checked::bumps);

  py::class_<Recorder, std::shared_ptr<Recorder>>(m, "Recorder")
      .def(py::init<>())
      .def("enter", &Recorder::enter)
      .def("exit", &Recorder::exit)
      .def("lift", &Recorder::lift, py::arg("tensor"), py::arg("constant") = false)
      .def(
          "share_storage",
          [](Recorder& r, const at::Tensor& t) {
            auto [known, fresh] =
                r.shared_storages.try_emplace(t.storage().unsafeGetStorageImpl(), t.scalar_type());
            if (!fresh && t.itemsize() < c10::elementSize(known->second)) {
              known->second = t.scalar_type();
            }
          },
          "Lift every tensor over the storage of this one as a view of the storage.")
      .def(
          "watch",
          [](Recorder& r, const at::Tensor& t, py::function written) {
            // The recorder may go where nobody has the GIL.
            const std::shared_ptr<py::function> call(
                new py::function(std::move(written)), [](py::function* function) {
                  py::gil_scoped_acquire gil;
                  delete function;
                });
            r.watched[storage_of(t)] = [call] {
              py::gil_scoped_acquire gil;
              (*call)();
            };
          },
          "Call a function after each write to the memory of a tensor.")
      .def("note_leaf", &Recorder::note_leaf, py::arg("twin"), py::arg("leaf"))
      .def("alive", &Recorder::alive)
      .def("is_nested", &Recorder::is_nested)
      .def("nested_tensors", &Recorder::nested_tensors)
      .def_readwrite("verify_layouts", &Recorder::verify_layouts)
      .def_readwrite("refusal", &Recorder::refusal)
      .def(
          "random_calls",
          [](const Recorder& r) {
            return std::count_if(r.nodes.begin(), r.nodes.end(), [](const auto& n) {
              return n->random() && !n->call->reads_generator;
            });
          })
      .def(
          "communicates",
          [](const Recorder& r) {
            return std::any_of(
                r.nodes.begin(), r.nodes.end(), [](const auto& n) { return n->collective(); });
          })
      .def(
          "run_checked",
          [](Recorder& r,
             const std::vector<ValueRef>& roots,
             int64_t begin,
             const std::vector<ValueRef>& given,
             const std::vector<at::Tensor>& values,
             int64_t all_before) {
            py::gil_scoped_release no_gil;
            return r.run_checked(roots, begin, given, values, all_before);
          },
          py::arg("roots"),
          py::arg("begin"),
          py::arg("given"),
          py::arg("values"),
          py::arg("all_before") = 0)
      .def(
          "input_values",
          [](const Recorder& r, const std::vector<int64_t>& inputs) {
            std::vector<ValueRef> out;
            for (int64_t i : inputs) {
              out.push_back({r.inputs[i].node, 0});
            }
            return out;
          })
      .def_readwrite("reads_offset", &Recorder::reads_offset)
      .def_readwrite("reads_views", &Recorder::reads_views)
      .def_readonly("running", &Recorder::running)
      .def(
          "add_generator",
          [](Recorder& r, const at::Generator& stand_in, const at::Generator& generator) {
            r.generators_of_stand_ins[stand_in.unsafeGetGeneratorImpl()] = generator;
          },
          "Record `generator` where an operator draws from `stand_in`.")
      .def("is_liftable", &Recorder::is_liftable)
      .def("has_failed_write", &Recorder::has_failed_write)
      .def("rebind", &Recorder::rebind)
      .def("assign_data", &Recorder::assign_data)
      .def("twin_of", &Recorder::twin_of)
      .def(
          "sources",
          [](const Recorder& r) {
            std::vector<std::optional<at::Tensor>> out;
            for (const LiftedInput& i : r.inputs) {
              out.push_back(source_of(i));
            }
            return out;
          },
          "For each lifted tensor, the leaf of the capture that its gradient belongs to.")
      .def(
          "source",
          [](const Recorder& r, size_t index) { return source_of(r.inputs.at(index)); },
          "One of `sources`.")
      .def("random_position", &Recorder::random_position)
      .def("seek", &Recorder::seek)
      .def("generators", &Recorder::generators)
      .def(
          "draws_only_from",
          [](const Recorder& r, const std::vector<at::Generator>& known) {
            const auto drawn = r.generators();
            return std::all_of(drawn.begin(), drawn.end(), [&](const at::Generator& g) {
              return std::find(known.begin(), known.end(), g) != known.end();
            });
          })
      .def("describe", &describe_tensor)
      .def("base_value", &base_value)
      .def(
          "materialize",
          [](Recorder& r, const at::Tensor& t, bool guard) {
            Described d = describe_tensor(r, t);
            TORCH_CHECK(d.captured, "not a tensor of this capture");
            at::Tensor real;
            {
              py::gil_scoped_release no_gil;
              real = r.materialize(d.value);
            }
            if (guard) {
              r.add_value_guard(d.value, real);
            }
            return real;
          },
          py::arg("tensor"),
          py::arg("guard") = true)
      .def(
          "lifted",
          [](const Recorder& r) {
            py::list out;
            for (const LiftedInput& i : r.inputs) {
              out.append(as_tuple(i));
            }
            return out;
          },
          "For each lifted tensor: it, its twin, whether it is a constant, and its group or -1.")
      .def(
          "input",
          [](const Recorder& r, size_t index) { return as_tuple(r.inputs.at(index)); },
          "One of `lifted`.")
      .def_property_readonly("fallbacks", [](const Recorder& r) { return r.fallbacks; })
      .def(
          "guards",
          [](const Recorder& r) {
            py::list out;
            for (const Guard& g : r.guards) {
              const bool is_value = g.kind == Guard::Kind::Value;
              out.append(
                  py::make_tuple(
                      g.value,
                      is_value ? py::cast(g.expected) : py::cast(g.expected_sizes),
                      is_value,
                      r.describe(g.source)));
            }
            return out;
          })
      .def(
          "node_info",
          [](Recorder& r, int64_t id) {
            GenericNode& n = r.node(id);
            return py::make_tuple(
                n.kind == NodeKind::Input ? std::string("lifted")
                                          : c10::toString(n.call->op.operator_name()),
                n.metas,
                n.call ? r.describe(n.call->source) : std::string());
          })
      .def(
          "is_input",
          [](Recorder& r, const ValueRef& v) { return r.node(v.node).kind == NodeKind::Input; })
      .def("release", &Recorder::release)
      .def("add_tangent", &Recorder::add_tangent)
      .def(
          "resumed",
          [](Recorder& r, const py::function& fn) {
            Recorder::Resume recording(r, /*lifting=*/true);
            return fn();
          },
          "Call `fn`, and record its operators after those of the program.")
      .def(
          "operands",
          [](Recorder& r, int64_t id) {
            std::vector<ValueRef> out;
            if (r.node(id).call) {
              r.node(id).call->for_each_value([&](const ValueRef& v) { out.push_back(v); });
            }
            return out;
          })
      .def(
          "depends_on_tangent",
          [](Recorder& r, const ValueRef& v) { return r.node(v.node).depends_on_tangent; })
      .def(
          "depends_on_input",
          [](Recorder& r, const ValueRef& v) { return r.node(v.node).depends_on_input; })
      .def("__len__", [](const Recorder& r) { return r.nodes.size(); });

  py::class_<Program, std::shared_ptr<Program>>(m, "Program")
      .def(py::init<std::shared_ptr<torch::jit::Graph>>())
      .def(
          "run",
          [](const Program& program, const std::vector<at::Tensor>& inputs) {
            torch::jit::Stack stack(inputs.begin(), inputs.end());
            program.run(stack);
            std::vector<at::Tensor> outputs;
            for (c10::IValue& v : stack) {
              outputs.push_back(std::move(v).toTensor());
            }
            return outputs;
          },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("graph", &Program::graph);
  py::class_<RandomStates>(m, "RandomStates", "States of generators, to be put back.")
      .def(py::init<const std::vector<at::Generator>&>())
      .def("put_back", &RandomStates::put_back);
  m.def("note_seed", &note_seed, "This thread has given a generator another seed, or state.");
  bind_interrupts(m);
  bind_namespaces(m);
  bind_ran(m);
  bind_call(m);

  bind_compile(m);

  bind_autograd(m);

  m.def(
      "lower",
      [](Recorder& r,
         const std::vector<ValueRef>& roots,
         size_t num_exposed,
         int64_t begin,
         int64_t end,
         const std::vector<ValueRef>& boundary,
         bool random,
         bool collectives) {
        Lowered l = lower(r, roots, num_exposed, begin, end, boundary, random, collectives);
        return py::make_tuple(l.graph, l.parameters);
      },
      py::arg("recorder"),
      py::arg("roots"),
      py::arg("num_exposed"),
      py::arg("begin"),
      py::arg("end"),
      py::arg("boundary") = std::vector<ValueRef>(),
      py::arg("random") = true,
      py::arg("collectives") = true);
  m.def(
      "makes_views",
      [](const std::string& name, const std::string& overload) {
        return makes_views(
            c10::Dispatcher::singleton()
                .findSchemaOrThrow(name.c_str(), overload.c_str())
                .schema());
      },
      "Whether the results of an operator share the memory of an argument.");
  m.def("share_version_counter", &share_version_counter);
  m.def("update_boundary", &update_boundary);
  m.def(
      "write_in_place",
      [](const std::shared_ptr<torch::jit::Graph>& graph, const std::vector<int64_t>& targets) {
        write_in_place(*graph, targets);
      });
  m.def(
      "call_with_numbers",
      [](const std::string& name,
         const py::tuple& args,
         const py::dict& kwargs,
         const std::vector<std::pair<std::string, c10::SymFloat>>& numbers) {
        auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
        torch::jit::Stack stack = torch::jit::createStackForSchema(
            op.schema(),
            torch::jit::tuple_slice(args),
            py::reinterpret_borrow<py::kwargs>(kwargs),
            std::nullopt);
        for (const auto& [argument, number] : numbers) {
          stack[op.schema().argumentIndexWithName(argument).value()] = number;
        }
        py::gil_scoped_release no_gil;
        op.callBoxed(&stack);
      },
      "Call an operator that returns nothing, with floats that the graph computes.");
  m.def(
      "standalone",
      [](const py::function& fn, const py::args& args, const py::kwargs& kwargs) {
        StandaloneGuard alone;
        return fn(*args, **kwargs);
      },
      "Call `fn` as if there were no capture, no autograd and no mode of any kind.");
  m.def(
      "hook_method",
      [](const py::object& method, const py::object& handler) {
        hook_method(method.ptr(), handler.ptr());
      },
      "Let calls of a method in a capturing thread ask `handler` first.");
  m.def(
      "hook_calls",
      [](const py::type& metaclass, const py::object& handler) {
        hook_calls(reinterpret_cast<PyTypeObject*>(metaclass.ptr()), handler.ptr());
      },
      "Let calls of the classes of a metaclass in a capturing thread ask `handler` first.");
  m.def("whole_storage", [](const at::Tensor& t) { return whole_storage(t); });
  m.def("unsupported_kind", &unsupported_kind);
  m.def(
      "same_bits",
      &same_bits,
      "Equal shapes, dtypes and values; 0.0 and -0.0 differ, a nan equals itself.");
  m.def(
      "claim_dispatch_key",
      &claim_capture_key,
      "Once for the process. Raises ImportError where somebody else has a fallback on the key.");
  m.def("set_unsupported_error", [](const py::object& type) { set_unsupported_type(type.ptr()); });
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) {
        std::rethrow_exception(p);
      }
    } catch (Unsupported& e) {
      PyErr_SetString(e.python_type(), e.what());
    }
  });
  m.def("is_capture_tensor", [](const at::Tensor& t) {
    return fi::isFunctionalTensor(t)
        ? as_capture(fi::unsafeGetFunctionalWrapper(t)->value()) != nullptr
        : as_capture(t) != nullptr;
  });
  m.def("capturing", [] { return Recorder::current() != nullptr; });
}
