#include "ran.h"

#include "record.h"

#include <frameobject.h>
#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <functional>

// Of the frames of these versions the function is known, and the first argument at once.
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000
#define TLE_FRAME_INTERNALS 1
#include <torch/csrc/dynamo/cpython_includes.h>
#else
#define TLE_FRAME_INTERNALS 0
#if PY_VERSION_HEX < 0x030C0000
// Of these the lists of the collector of cycles; the atomic numbers of C are none of C++.
#undef HAVE_STD_ATOMIC
#undef _PyGC_FINALIZED
#define Py_BUILD_CORE
#include <internal/pycore_interp.h>
#undef Py_BUILD_CORE
#endif
#endif

#if PY_VERSION_HEX >= 0x030C0000
#define TLE_CODE_EXTRA(name) PyUnstable_##name
#else
#define TLE_CODE_EXTRA(name) _Py##name
#endif

namespace tle {

namespace {

void throw_if(bool error) {
  if (error) {
    throw py::error_already_set();
  }
}

// ------------------------------------------------------------------- bytecode

struct Opcodes {
  int load_global, load_name, load_attr, load_method, load_super_attr, store_global, store_attr,
      delete_global, delete_attr, import_name, import_from, extended_arg, cache, push_null;

  Opcodes() {
    const py::dict map = py::module_::import("dis").attr("opmap");
    auto code = [&](const char* name) { return map.contains(name) ? map[name].cast<int>() : -1; };
    load_global = code("LOAD_GLOBAL");
    load_name = code("LOAD_NAME");
    load_attr = code("LOAD_ATTR");
    load_method = code("LOAD_METHOD");
    load_super_attr = code("LOAD_SUPER_ATTR");
    store_global = code("STORE_GLOBAL");
    store_attr = code("STORE_ATTR");
    delete_global = code("DELETE_GLOBAL");
    delete_attr = code("DELETE_ATTR");
    import_name = code("IMPORT_NAME");
    import_from = code("IMPORT_FROM");
    extended_arg = code("EXTENDED_ARG");
    cache = code("CACHE");
    push_null = code("PUSH_NULL");
  }
};

bool is_identifiers(PyObject* text) {
  const Py_ssize_t length = PyUnicode_GET_LENGTH(text);
  if (length == 0 || length > 80) {
    return false;
  }
  for (Py_ssize_t i = 0; i < length; ++i) {
    const Py_UCS4 c = PyUnicode_READ_CHAR(text, i);
    if (!Py_UNICODE_ISALNUM(c) && c != '_' && c != '.') {
      return false;
    }
  }
  return true;
}

// Strings by which `getattr` and its like find an attribute: "a", or the parts of "a.b".
void add_strings(PyObject* value, py::set& strings) {
  if (PyUnicode_CheckExact(value) && is_identifiers(value)) {
    for (const py::handle& part : py::list(py::handle(value).attr("split")("."))) {
      strings.add(part);
    }
  } else if (PyTuple_CheckExact(value) || PyFrozenSet_CheckExact(value)) {
    for (const py::handle& item : py::reinterpret_borrow<py::object>(value)) {
      add_strings(item.ptr(), strings);
    }
  }
}

// The other fields of a _code.Names.
py::tuple make_names(
    const py::tuple& chains,
    const py::frozenset& stored,
    const py::frozenset& attributes,
    const py::frozenset& stored_attributes,
    const py::tuple& imports,
    const py::frozenset& strings,
    const py::tuple& inner) {
  static PyObject* type =
      py::object(py::module_::import("torch_lazy_ext._code").attr("Names")).release().ptr();
  const py::object all = attributes | stored_attributes | strings;
  const py::dict globals; // in their order
  for (const py::handle& chain : chains) {
    globals[py::handle(PyTuple_GET_ITEM(chain.ptr(), 0))] = py::none();
  }
  const py::list sorted(stored);
  throw_if(PyList_Sort(sorted.ptr()) != 0);
  for (const py::handle& name : sorted) {
    globals[name] = py::none();
  }
  return py::handle(type)(
      chains,
      stored,
      attributes,
      stored_attributes,
      imports,
      strings,
      all,
      py::tuple(globals),
      inner);
}

py::tuple read_names(PyObject* code) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Opcodes> known;
  const Opcodes& op = known.call_once_and_store_result([] { return Opcodes(); }).get_stored();
  constexpr int global_shift = PY_VERSION_HEX >= 0x030B0000 ? 1 : 0;
  constexpr int attr_shift = PY_VERSION_HEX >= 0x030C0000 ? 1 : 0;
  const py::bytes text = py::handle(code).attr("co_code");
  const py::tuple names = py::handle(code).attr("co_names");
  const auto* bytes = reinterpret_cast<const unsigned char*>(PyBytes_AS_STRING(text.ptr()));
  const Py_ssize_t count = PyBytes_GET_SIZE(text.ptr());
  py::set chains, stored, attributes, stored_attributes, imports, strings;
  std::vector<py::object> chain;
  auto end = [&] {
    if (!chain.empty()) {
      py::tuple made(chain.size());
      for (size_t i = 0; i < chain.size(); ++i) {
        made[i] = chain[i];
      }
      chains.add(made);
      chain.clear();
    }
  };
  int extended = 0;
  for (Py_ssize_t i = 0; i + 1 < count; i += 2) {
    const int o = bytes[i];
    const int arg = bytes[i + 1] | extended << 8;
    extended = o == op.extended_arg ? arg : 0;
    if (o == op.extended_arg || o == op.cache || o == op.push_null) {
      continue;
    }
    auto name = [&](int index) { return py::object(names[index]); };
    if (o == op.load_global || o == op.load_name) {
      end();
      chain.push_back(name(o == op.load_global ? arg >> global_shift : arg));
      continue;
    }
    if (o == op.load_attr || o == op.load_method) {
      const py::object attribute = name(o == op.load_attr ? arg >> attr_shift : arg);
      attributes.add(attribute);
      if (!chain.empty()) {
        chain.push_back(attribute);
      }
      continue;
    }
    end();
    if (o == op.load_super_attr) {
      attributes.add(name(arg >> 2));
    } else if (o == op.store_global || o == op.delete_global) {
      stored.add(name(arg));
    } else if (o == op.store_attr || o == op.delete_attr) {
      stored_attributes.add(name(arg));
    } else if (o == op.import_name) {
      imports.add(name(arg));
    } else if (o == op.import_from) {
      attributes.add(name(arg));
    }
  }
  end();
  for (const py::handle& constant : py::tuple(py::handle(code).attr("co_consts"))) {
    add_strings(constant.ptr(), strings);
  }
  return make_names(
      py::tuple(chains),
      py::frozenset(stored),
      py::frozenset(attributes),
      py::frozenset(stored_attributes),
      py::tuple(imports),
      py::frozenset(strings),
      py::tuple());
}

py::tuple read_names_within(PyObject* code) {
  py::tuple own = names_of(code);
  py::dict chains, imports; // in their order
  py::set sets[4];
  constexpr NameField fields[] = {
      NameField::Stored, NameField::Attributes, NameField::StoredAttributes, NameField::Strings};
  py::list inner;
  auto add = [&](const py::tuple& names) {
    auto field = [&](NameField f) { return py::object(names[static_cast<size_t>(f)]); };
    for (const py::handle& chain : field(NameField::Chains)) {
      chains[chain] = py::none();
    }
    for (const py::handle& name : field(NameField::Imports)) {
      imports[name] = py::none();
    }
    for (size_t i = 0; i < 4; ++i) {
      for (const py::handle& name : field(fields[i])) {
        sets[i].add(name);
      }
    }
  };
  add(own);
  for (const py::handle& constant : py::tuple(py::handle(code).attr("co_consts"))) {
    if (PyCode_Check(constant.ptr())) {
      const py::tuple names = names_within(constant.ptr());
      add(names);
      inner.append(constant);
      for (const py::handle& code : names[static_cast<size_t>(NameField::Inner)]) {
        inner.append(code);
      }
    }
  }
  if (inner.empty()) {
    return own;
  }
  return make_names(
      py::tuple(chains),
      py::frozenset(sets[0]),
      py::frozenset(sets[1]),
      py::frozenset(sets[2]),
      py::tuple(imports),
      py::frozenset(sets[3]),
      py::tuple(inner));
}

void release(void* names) {
  Py_XDECREF(static_cast<PyObject*>(names));
}

// ---------------------------------------------------------------------- frames

thread_local Ran* running = nullptr;

#if TLE_FRAME_INTERNALS

// How many threads have something running; the interpreter's lock guards all of this.
int64_t num_running = 0;
bool installed = false;
_PyFrameEvalFunction before = nullptr;

PyObject* evaluate(PyThreadState* thread, _PyInterpreterFrame* frame, int throws) {
  if (running != nullptr && throws == 0) {
    PyCodeObject* code = F_CODE(frame);
    running->called(
        reinterpret_cast<PyObject*>(code),
        reinterpret_cast<PyObject*>(FUNC(frame)),
        frame->f_globals,
        code->co_argcount > 0 ? frame->localsplus[0] : nullptr);
  }
  return before(thread, frame, throws);
}

void watch() {
  PyInterpreterState* interpreter = PyInterpreterState_Get();
  ++num_running;
  if (!installed) {
    installed = true;
    before = _PyInterpreterState_GetEvalFrameFunc(interpreter);
    _PyInterpreterState_SetEvalFrameFunc(interpreter, &evaluate);
  }
}

// False: another has taken the place of `evaluate`, and may not call it. It stays installed then,
// for the other one may yet.
bool unwatch() {
  PyInterpreterState* interpreter = PyInterpreterState_Get();
  const bool there = _PyInterpreterState_GetEvalFrameFunc(interpreter) == &evaluate;
  if (--num_running == 0 && there) {
    _PyInterpreterState_SetEvalFrameFunc(interpreter, before);
    installed = false;
  }
  return there;
}

#else

thread_local Py_tracefunc other = nullptr;
thread_local PyObject* other_object = nullptr;

// A frame of these versions does not know its function, which has what guards stand on (default
// arguments, the code itself): so it is looked for among all functions that there are.
class Functions {
 public:
  // Goes through all that the collector of cycles knows, which takes milliseconds: once a
  // recording. References are held until then, so that each function stays what it is.
  Functions() {
    visit([this](PyObject* object) {
      if (PyFunction_Check(object)) {
        found_.emplace_back(
            PyFunction_GET_CODE(object), py::reinterpret_borrow<py::object>(object));
      }
    });
    std::sort(found_.begin(), found_.end(), [](const auto& a, const auto& b) {
      return std::less<>()(a.first, b.first);
    });
  }

  // Those that `frame` can be a call of, borrowed: with its code, globals and free variables. They
  // are more than one where functions differ in their defaults only; none if it was made since.
  std::vector<PyObject*> of(PyFrameObject* frame, PyCodeObject* code, PyObject* globals) const {
    auto* wanted = reinterpret_cast<PyObject*>(code);
    std::vector<PyObject*> functions;
    auto entry = std::lower_bound(
        found_.begin(), found_.end(), wanted, [](const auto& found, PyObject* other) {
          return std::less<>()(found.first, other);
        });
    for (; entry != found_.end() && entry->first == wanted; ++entry) {
      PyObject* function = entry->second.ptr();
      PyObject* closure = PyFunction_GET_CLOSURE(function);
      if (PyFunction_GET_GLOBALS(function) == globals &&
          (closure == nullptr || has_closure(frame, code, closure))) {
        functions.push_back(function);
      }
    }
    return functions;
  }

 private:
#if PY_VERSION_HEX >= 0x030C0000
  using Visitor = std::function<void(PyObject*)>;
  static void visit(Visitor visitor) {
    auto call = [](PyObject* object, void* data) {
      (*static_cast<Visitor*>(data))(object);
      return 1;
    };
    PyUnstable_GC_VisitObjects(call, &visitor);
  }

  static bool has_closure(PyFrameObject* frame, PyCodeObject* code, PyObject* closure) {
    const py::tuple names = py::handle(reinterpret_cast<PyObject*>(code)).attr("co_freevars");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(closure); ++i) {
      PyObject* value = PyFrame_GetVar(frame, PyTuple_GET_ITEM(names.ptr(), i));
      if (value == nullptr) {
        PyErr_Clear(); // it has no value yet
      }
      Py_XDECREF(value);
      if (value != PyCell_GET(PyTuple_GET_ITEM(closure, i))) {
        return false;
      }
    }
    return true;
  }
#else
  template <typename Visitor>
  static void visit(const Visitor& visitor) {
    auto visit_list = [&](gc_generation& generation) {
      for (auto* head = _PyGCHead_NEXT(&generation.head); head != &generation.head;
           head = _PyGCHead_NEXT(head)) {
        visitor(reinterpret_cast<PyObject*>(head + 1));
      }
    };
    auto& collector = PyInterpreterState_Get()->gc;
    for (gc_generation& generation : collector.generations) {
      visit_list(generation);
    }
    visit_list(collector.permanent_generation); // `gc.freeze`
  }

  static bool has_closure(PyFrameObject* frame, PyCodeObject* code, PyObject* closure) {
    PyObject** cells = frame->f_localsplus + code->co_nlocals + PyTuple_GET_SIZE(code->co_cellvars);
    return std::equal(cells, cells + PyTuple_GET_SIZE(closure), &PyTuple_GET_ITEM(closure, 0));
  }
#endif

  std::vector<std::pair<PyObject*, py::object>> found_; // by the address of their code
};

thread_local std::unique_ptr<Functions> functions;

PyObject* first_argument(PyFrameObject* frame, PyCodeObject* code) {
  if (code->co_argcount == 0) {
    return nullptr;
  }
#if PY_VERSION_HEX < 0x030B0000
  PyObject* first = frame->f_localsplus[0];
  if (first == nullptr && code->co_cell2arg != nullptr) {
    first = frame->f_localsplus[code->co_nlocals];
  }
  Py_XINCREF(first);
  return first;
#else
  const py::object names = py::handle(reinterpret_cast<PyObject*>(code)).attr("co_varnames");
  PyObject* first = PyFrame_GetVar(frame, PyTuple_GET_ITEM(names.ptr(), 0));
  if (first == nullptr) {
    PyErr_Clear();
  }
  return first;
#endif
}

int on_event(PyObject* /*self*/, PyFrameObject* frame, int what, PyObject* arg) {
  if (what == PyTrace_CALL && running != nullptr && running->listens()) {
    PyCodeObject* code = PyFrame_GetCode(frame);
#if PY_VERSION_HEX >= 0x030B0000
    PyObject* globals = PyFrame_GetGlobals(frame);
#else
    PyObject* globals = Py_NewRef(frame->f_globals);
#endif
    PyObject* first = first_argument(frame, code);
    if (functions == nullptr) {
      functions = std::make_unique<Functions>();
    }
    auto* noted = reinterpret_cast<PyObject*>(code);
    const std::vector<PyObject*> callable = functions->of(frame, code, globals);
    for (PyObject* function : callable) {
      running->called(noted, function, globals, first);
    }
    if (callable.empty()) {
      running->called(noted, nullptr, globals, first);
    }
    Py_DECREF(code);
    Py_DECREF(globals);
    Py_XDECREF(first);
  }
  return other == nullptr ? 0 : other(other_object, frame, what, arg);
}

void watch() {
  PyThreadState* thread = PyThreadState_Get();
  if (thread->c_profilefunc != &on_event) {
    other = thread->c_profilefunc;
    other_object = thread->c_profileobj;
    Py_XINCREF(other_object);
    PyEval_SetProfile(&on_event, nullptr);
  }
}

bool unwatch() {
  PyThreadState* thread = PyThreadState_Get();
  const bool there = thread->c_profilefunc == &on_event;
  if (there) {
    PyEval_SetProfile(other, other_object);
  }
  other = nullptr;
  Py_CLEAR(other_object);
  return there;
}

#endif

} // namespace

namespace {

// What `read` gives, read once and kept with the code object.
template <py::tuple (*read)(PyObject*)>
py::tuple kept(PyObject* code) {
  static const Py_ssize_t index = TLE_CODE_EXTRA(Eval_RequestCodeExtraIndex)(&release);
  void* known = nullptr;
  throw_if(TLE_CODE_EXTRA(Code_GetExtra)(code, index, &known) != 0);
  if (known == nullptr) {
    py::tuple made = read(code);
    known = made.inc_ref().ptr();
    throw_if(TLE_CODE_EXTRA(Code_SetExtra)(code, index, known) != 0);
  }
  return py::reinterpret_borrow<py::tuple>(static_cast<PyObject*>(known));
}

py::tuple checked(const py::object& code, py::tuple (*names)(PyObject*)) {
  if (!PyCode_Check(code.ptr())) {
    throw py::type_error("expected a code object");
  }
  return names(code.ptr());
}

} // namespace

py::tuple names_of(PyObject* code) {
  return kept<&read_names>(code);
}

py::tuple names_within(PyObject* code) {
  return kept<&read_names_within>(code);
}

// ------------------------------------------------------------------------- Ran

void Ran::start() {
  outer_ = std::exchange(running, this);
  watch();
}

bool Ran::stop() {
  const bool there = unwatch();
  running = outer_;
#if !TLE_FRAME_INTERNALS
  if (running == nullptr) {
    functions.reset();
  }
#endif
  if (error_) {
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
  return there;
}

Ran::Origin Ran::origin(PyObject* globals) {
  auto found = origins_.find(globals);
  if (found != origins_.end()) {
    return found->second;
  }
  Origin origin = Origin::User;
  PyObject* name = PyDict_GetItemString(globals, "__name__");
  if (name != nullptr && PyUnicode_Check(name)) {
    // The whole name, and then the names of the packages that it is in.
    for (py::object part = py::reinterpret_borrow<py::object>(name);
         py::len(part) != 0 && origin == Origin::User;
         part = part.attr("rpartition")(".")[py::int_(0)]) {
      if (own_.contains(part)) {
        origin = Origin::Own;
      } else if (libraries_.contains(part)) {
        origin = Origin::Library;
      }
    }
  }
  origins_[globals] = origin;
  return origin;
}

bool Ran::listens() const {
  // Without a recorder it is code of a kernel that the recording runs, not of the program.
  return !busy_ && Recorder::current() != nullptr;
}

void Ran::called(PyObject* code, PyObject* function, PyObject* globals, PyObject* first) noexcept {
  if (!listens()) {
    return;
  }
  if (first != nullptr && PyCell_Check(first)) {
    first = PyCell_GET(first);
  }
  if (function != nullptr && (!PyFunction_Check(function) || inner_.count(code) != 0)) {
    function = nullptr;
  }
  void* which = first;
  if (first != nullptr && !is_told_apart(first)) {
    which = Py_TYPE(first);
  }
  if (!seen_.insert({code, function, which}).second) {
    return;
  }
  busy_ = true;
  try {
    note(code, function, globals, first);
  } catch (...) {
    // Raised when the program has ended: it must not be able to catch this.
    error_ = error_ ? error_ : std::current_exception();
  }
  busy_ = false;
}

void Ran::note(PyObject* code, PyObject* function, PyObject* globals, PyObject* first) {
  auto held = [](PyObject* object) { return py::reinterpret_borrow<py::object>(object); };
  const Origin origin = this->origin(globals);
  Entry entry{held(code), held(globals), {}, {}, {}, origin != Origin::User};
  if (origin == Origin::Own) {
    entry.globals = py::object();
    entries.push_back(std::move(entry));
    return;
  }
  for (const py::handle& constant : py::tuple(py::handle(code).attr("co_consts"))) {
    if (PyCode_Check(constant.ptr())) {
      inner_.insert(constant.ptr());
    }
  }
  if (first != nullptr) {
    entry.first = held(reinterpret_cast<PyObject*>(Py_TYPE(first)));
    if (is_told_apart(first)) {
      entry.instance = held(first);
    }
  }
  if (function != nullptr) {
    entry.function = py::reinterpret_steal<py::object>(PyWeakref_NewRef(function, nullptr));
    throw_if(entry.function.ptr() == nullptr);
  }
  entries.push_back(std::move(entry));
  if (origin == Origin::User && !entered_.is_none()) {
    entered_(held(code), function == nullptr ? py::none() : held(function), held(globals));
  }
}

void bind_ran(py::module_& m) {
  m.attr("frames_know_functions") = py::bool_(TLE_FRAME_INTERNALS != 0);
  m.def(
      "names_of",
      [](const py::object& code) { return checked(code, &names_of); },
      "What a code object names, a _code.Names.");
  m.def(
      "names_within",
      [](const py::object& code) { return checked(code, &names_within); },
      "What a code object and those inside of it name, a _code.Names.");
  py::class_<Ran, std::shared_ptr<Ran>>(m, "Ran")
      .def(py::init<py::anyset, py::anyset, py::object, py::object>())
      .def("start", &Ran::start)
      .def("stop", &Ran::stop)
      .def_property_readonly(
          "entries",
          [](const Ran& r) {
            py::list out;
            for (const Ran::Entry& e : r.entries) {
              if (!e.globals) {
                continue;
              }
              py::object function = py::none();
              if (e.function) {
                PyObject* alive = PyWeakref_GET_OBJECT(e.function.ptr());
                function = py::reinterpret_borrow<py::object>(alive);
              }
              auto or_none = [](const py::object& o) { return o ? o : py::none(); };
              out.append(
                  py::make_tuple(
                      e.code,
                      e.globals,
                      or_none(e.first),
                      function,
                      e.library,
                      or_none(e.instance)));
            }
            return out;
          },
          "For each code object that ran: code, globals, type of the first argument,\nfunction, "
          "whether it is a library's, and the first argument where it is told apart.");
}

} // namespace tle
