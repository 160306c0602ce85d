#include "interrupts.h"

#include <ATen/ThreadLocalState.h>
#include <torch/csrc/Exceptions.h>

#include <pthread.h>

#include <array>
#include <atomic>
#include <csignal>
#include <optional>
#include <utility>

namespace tle {

namespace {

constexpr int num_signals = 65; // Linux has them from 1 to 64
constexpr int restorer = 0x04000000; // a flag of Linux's own, which glibc sets

// Of the main thread; the GIL guards it.
struct State {
  int depth = 0; // how many Holds live
  bool may_stop = true;
  bool stops = false; // the next signal ends what runs
  std::array<bool, num_signals> came{}; // their handlers have still to run
  std::array<PyObject*, num_signals> handlers{}; // Python's, in whose place `note` is
  std::array<struct sigaction, num_signals> actions{};
  std::optional<py::error_already_set> raised; // by a handler that ran while they changed places
};

// Never freed: it holds Python objects.
State& state() {
  static auto* the_state = new State();
  return *the_state;
}

// These live as long as the process.
PyObject* interrupted_type = nullptr;
PyObject* note_function = nullptr;
PyObject* get_signal = nullptr;
PyObject* set_signal = nullptr;
PyObject* main_thread = nullptr;
std::array<PyObject*, num_signals> numbers{};

std::atomic<int> forks{0}; // after each, another thread may be the main one

bool any_waits() {
  for (const bool came : state().came) {
    if (came) {
      return true;
    }
  }
  return state().raised.has_value();
}

// The handler of every signal in the meantime.
PyObject* note(PyObject* /*self*/, PyObject* args) {
  State& s = state();
  const long number = PyLong_AsLong(PyTuple_GET_ITEM(args, 0));
  if (number > 0 && number < num_signals) {
    s.came[number] = true;
    if (std::exchange(s.stops, false)) {
      // Once: what is ended is not ended again while it is taken back.
      PyErr_SetNone(interrupted_type);
      return nullptr;
    }
  }
  Py_RETURN_NONE;
}

PyMethodDef note_definition = {"note", &note, METH_VARARGS, nullptr};

bool in_main_thread() {
  thread_local int asked = -1;
  thread_local bool answer = false;
  const int now = forks;
  if (asked != now) {
    const auto thread = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(main_thread));
    if (!thread) {
      throw py::error_already_set(); // of the handler of a signal that came just then
    }
    answer = thread.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
    asked = now;
  }
  return answer;
}

py::object handler_of(int number) {
  // Sixty of these calls belong to each Hold: without the ways around them, where that is known.
  PyObject* handler = PyCFunction_GetFlags(get_signal) == METH_O
      ? PyCFunction_GET_FUNCTION(get_signal)(PyCFunction_GET_SELF(get_signal), numbers[number])
      : PyObject_CallOneArg(get_signal, numbers[number]);
  if (handler == nullptr) {
    PyErr_Clear(); // there is no such signal
  }
  return py::reinterpret_steal<py::object>(handler);
}

// Puts a handler in its place. Python first runs the handlers of signals that have come, and an
// error of theirs keeps it from that.
std::optional<py::error_already_set> put(int number, PyObject* handler) {
  PyObject* arguments[] = {numbers[number], handler};
  const auto done =
      py::reinterpret_steal<py::object>(PyObject_Vectorcall(set_signal, arguments, 2, nullptr));
  if (done) {
    return std::nullopt;
  }
  return py::error_already_set();
}

// They come from the code that runs, and it does not go on.
bool is_synchronous(int number) {
  return number == SIGSEGV || number == SIGBUS || number == SIGFPE || number == SIGILL;
}

int run_pending(void* /*unused*/) {
  try {
    return run_handlers();
  } catch (py::error_already_set& error) {
    error.restore();
    return -1;
  }
}

void give_back() {
  State& s = state();
  for (int i = 1; i < num_signals; ++i) {
    if (s.handlers[i] == nullptr) {
      continue;
    }
    const auto handler = py::reinterpret_steal<py::object>(std::exchange(s.handlers[i], nullptr));
    if (handler_of(i).ptr() != note_function) {
      continue; // the program has put another one there
    }
    while (auto error = put(i, handler.ptr())) {
      if (!s.raised) {
        s.raised = std::move(error);
      }
    }
    if ((s.actions[i].sa_flags & ~restorer) != SA_ONSTACK) {
      sigaction(i, &s.actions[i], nullptr); // flags that signal.signal() does not set
    }
  }
  if (any_waits()) {
    Py_AddPendingCall(&run_pending, nullptr);
  }
}

[[noreturn]] void throw_interrupted() {
  PyErr_SetNone(interrupted_type);
  throw py::error_already_set();
}

py::object stoppable(const py::function& fn, const py::args& args, const py::kwargs& kwargs) {
  State& s = state();
  if (s.depth == 0 || !s.may_stop || !in_main_thread()) {
    return fn(*args, **kwargs);
  }
  if (any_waits()) {
    throw_interrupted();
  }
  const at::ThreadLocalState before;
  s.stops = true;
  auto result =
      py::reinterpret_steal<py::object>(PyObject_Call(fn.ptr(), args.ptr(), kwargs.ptr()));
  s.stops = false;
  if (any_waits()) {
    // Whatever the program has made of it. A context manager may have been interrupted, too.
    PyErr_Clear();
    at::ThreadLocalState::setThreadLocalState(before);
    throw_interrupted();
  }
  if (!result) {
    throw py::error_already_set();
  }
  return result;
}

} // namespace

Hold::Hold(bool stops) {
  if (!in_main_thread()) {
    return;
  }
  State& s = state();
  if (s.depth == 0) {
    for (int i = 1; i < num_signals; ++i) {
      if (is_synchronous(i)) {
        continue;
      }
      const py::object handler = handler_of(i);
      if (!handler || PyCallable_Check(handler.ptr()) == 0 || handler.ptr() == note_function) {
        continue;
      }
      sigaction(i, nullptr, &s.actions[i]);
      if (auto error = put(i, note_function)) {
        give_back();
        throw std::move(*error);
      }
      s.handlers[i] = Py_NewRef(handler.ptr());
    }
  }
  active_ = true;
  ++s.depth;
  previous_stops_ = std::exchange(s.stops, false);
  previous_may_stop_ = std::exchange(s.may_stop, stops && s.may_stop);
}

Hold::~Hold() {
  if (!active_) {
    return;
  }
  State& s = state();
  s.may_stop = previous_may_stop_;
  if (--s.depth > 0) {
    s.stops = previous_stops_;
    return;
  }
  const py::error_scope raised; // what is on its way goes on
  s.stops = false;
  give_back();
}

bool is_held() {
  return state().depth > 0 && in_main_thread();
}

int run_handlers() {
  State& s = state();
  if (s.depth > 0 || !in_main_thread()) {
    return 0; // at the end of the Hold
  }
  auto next = [&](int i) {
    if (any_waits()) {
      Py_AddPendingCall(&run_pending, nullptr);
    }
    return i;
  };
  if (s.raised) {
    py::error_already_set error = std::move(*s.raised);
    s.raised.reset();
    error.restore();
    return next(-1);
  }
  for (int i = 1; i < num_signals; ++i) {
    if (!std::exchange(s.came[i], false)) {
      continue;
    }
    const py::object handler = handler_of(i);
    if (!handler || PyCallable_Check(handler.ptr()) == 0) {
      continue;
    }
    PyObject* frame = reinterpret_cast<PyObject*>(PyEval_GetFrame());
    const auto done = py::reinterpret_steal<py::object>(
        PyObject_CallFunction(handler.ptr(), "iO", i, frame == nullptr ? Py_None : frame));
    if (!done) {
      return next(-1);
    }
  }
  return 0;
}

bool is_interrupted(const py::error_already_set& e) {
  return e.matches(interrupted_type);
}

bool is_error(const std::exception& e) {
  if (const auto* python = dynamic_cast<const python_error*>(&e)) {
    py::gil_scoped_acquire gil;
    return python->type == nullptr ||
        PyErr_GivenExceptionMatches(python->type, PyExc_Exception) != 0;
  }
  if (const auto* python = dynamic_cast<const py::error_already_set*>(&e)) {
    py::gil_scoped_acquire gil;
    return python->matches(PyExc_Exception);
  }
  return true;
}

namespace {

// As a context manager.
class PythonHold {
 public:
  explicit PythonHold(bool stops) : stops_(stops) {}
  void enter() { hold_.emplace(stops_); }
  void exit() { hold_.reset(); }

 private:
  bool stops_;
  std::optional<Hold> hold_;
};

} // namespace

void bind_interrupts(py::module_& m) {
  const auto module = py::module_::import("_signal"); // without the wrappers of `signal`
  get_signal = py::object(module.attr("getsignal")).release().ptr();
  set_signal = py::object(module.attr("signal")).release().ptr();
  main_thread = py::object(py::module_::import("threading").attr("main_thread")).release().ptr();
  for (int i = 1; i < num_signals; ++i) {
    numbers[i] = PyLong_FromLong(i);
  }
  pthread_atfork(nullptr, nullptr, [] { ++forks; });
  note_function = PyCFunction_New(&note_definition, nullptr);
  interrupted_type =
      PyErr_NewException("torch_lazy_ext._C.Interrupted", PyExc_BaseException, nullptr);
  m.attr("Interrupted") = py::reinterpret_borrow<py::object>(interrupted_type);
  py::class_<PythonHold>(m, "Hold", "While it is entered, Python's signal handlers wait.")
      .def(py::init<bool>(), py::arg("stops") = true)
      .def("__enter__", &PythonHold::enter)
      .def("__exit__", [](PythonHold& hold, const py::args& /*exception*/) { hold.exit(); });
  m.def("stoppable", &stoppable, "Call `fn`; in a Hold, a signal ends it with `Interrupted`.");
  m.def("is_held", &is_held, "Whether a Hold is entered in this thread.");
  m.def(
      "run_handlers",
      [] {
        if (run_handlers() != 0) {
          throw py::error_already_set();
        }
      },
      "Run the handlers that have waited, if no Hold is entered.");
}

} // namespace tle
