#include "interrupts.h"

#include <ATen/ThreadLocalState.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <csignal>
#include <cstdint>
#include <optional>
#include <utility>

namespace tle {

namespace {

// What a signal does that comes while a Hold lives.
enum Mode : int {
  Wait, // it is noted, and its handler runs when the Hold ends
  Stop, // likewise, and what runs is ended by `Interrupted`
  Open, // its handler runs
};

constexpr int num_signals = 65; // Linux has them from 1 to 64

// Of the main thread, under the GIL.
struct State {
  int depth = 0;
  int mode = Wait;
  bool stop = true;
  std::array<bool, num_signals> came{};
  std::array<PyObject*, num_signals> handlers{}; // Python's, in whose place `note` is
  std::array<struct sigaction, num_signals> actions{};
};
State state;

PyObject* interrupted_type = nullptr; // these live as long as the process
PyObject* note_function = nullptr;
PyObject* get_signal = nullptr;
PyObject* set_signal = nullptr;
PyObject* main_thread = nullptr;

bool is_waiting() {
  for (const bool came : state.came) {
    if (came) {
      return true;
    }
  }
  return false;
}

// The handler of every signal in the meantime.
PyObject* note(PyObject* /*self*/, PyObject* args) {
  const long number = PyLong_AsLong(PyTuple_GET_ITEM(args, 0));
  if (number <= 0 || number >= num_signals) {
    Py_RETURN_NONE;
  }
  PyObject* handler = state.handlers[number];
  if (state.mode == Open && handler != nullptr) {
    return PyObject_Call(handler, args, nullptr);
  }
  state.came[number] = true;
  if (state.mode == Stop && state.stop) {
    PyErr_SetNone(interrupted_type);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef note_definition = {"note", &note, METH_VARARGS, nullptr};

bool in_main_thread() {
  const py::object thread = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(main_thread));
  return thread && thread.attr("ident").cast<unsigned long>() == PyThread_get_thread_ident();
}

// The exception that is set, to be set again: pybind11's own holds the GIL for it.
using Error = std::optional<py::error_already_set>;

// Puts a handler in its place. A signal that is still to be handled is handled before that, and its
// handler may raise; the first such error is kept.
void put(int number, PyObject* handler, Error& first) {
  while (true) {
    auto done =
        py::reinterpret_steal<py::object>(PyObject_CallFunction(set_signal, "iO", number, handler));
    if (done) {
      return;
    }
    py::error_already_set error;
    if (!first) {
      first.emplace(error);
    }
  }
}

// Gives each signal back its handler.
void give_back(Error& error) {
  for (int i = 1; i < num_signals; ++i) {
    PyObject* handler = state.handlers[i];
    if (handler == nullptr) {
      continue;
    }
    state.handlers[i] = nullptr;
    const auto now = py::reinterpret_steal<py::object>(PyObject_CallFunction(get_signal, "i", i));
    // The program may have put another one there.
    if (now.ptr() == note_function) {
      put(i, handler, error);
      sigaction(i, &state.actions[i], nullptr); // with the flags that it had
    }
    PyErr_Clear();
    // Held until here: a waiting signal asks for it by its number.
    Py_DECREF(handler);
  }
}

// Has the handlers of waiting signals run.
void run_waiting(Error& error) {
  for (int i = 1; i < num_signals; ++i) {
    if (!std::exchange(state.came[i], false)) {
      continue;
    }
    const auto handler =
        py::reinterpret_steal<py::object>(PyObject_CallFunction(get_signal, "i", i));
    if (!handler || PyCallable_Check(handler.ptr()) == 0) {
      PyErr_Clear();
      continue;
    }
    if (error) {
      PyErr_SetInterruptEx(i); // one at a time
      continue;
    }
    PyObject* frame = reinterpret_cast<PyObject*>(PyEval_GetFrame());
    const auto done = py::reinterpret_steal<py::object>(
        PyObject_CallFunction(handler.ptr(), "iO", i, frame == nullptr ? Py_None : frame));
    if (!done) {
      error.emplace();
    }
  }
}

// In the mode that was: what waits is for the caller to hear of.
void run_waiting_in_place(Error& error) {
  for (int i = 1; i < num_signals; ++i) {
    PyObject* handler = state.handlers[i];
    if (handler == nullptr || error || !std::exchange(state.came[i], false)) {
      continue;
    }
    PyObject* frame = reinterpret_cast<PyObject*>(PyEval_GetFrame());
    const auto done = py::reinterpret_steal<py::object>(
        PyObject_CallFunction(handler, "iO", i, frame == nullptr ? Py_None : frame));
    if (!done) {
      error.emplace();
    }
  }
}

// Calls `fn` in another mode.
py::object
in_mode(int mode, const py::function& fn, const py::args& args, const py::kwargs& kwargs) {
  if (state.depth == 0 || !in_main_thread()) {
    return fn(*args, **kwargs);
  }
  Error error;
  if (mode == Open) {
    run_waiting_in_place(error);
  } else if (state.stop && is_waiting()) {
    PyErr_SetNone(interrupted_type);
    error.emplace();
  }
  if (error) {
    throw *error;
  }
  const int previous = std::exchange(state.mode, mode);
  PyObject* result = PyObject_Call(fn.ptr(), args.ptr(), kwargs.ptr());
  // From here on a signal is noted, and nothing more.
  state.mode = previous;
  if (result == nullptr) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(result);
}

// What an interrupted context manager of the program has left is put back too.
py::object stoppable(const py::function& fn, const py::args& args, const py::kwargs& kwargs) {
  const at::ThreadLocalState before;
  try {
    return in_mode(Stop, fn, args, kwargs);
  } catch (...) {
    if (is_waiting()) {
      at::ThreadLocalState::setThreadLocalState(before);
    }
    throw;
  }
}

} // namespace

Hold::Hold(bool stop) {
  if (!in_main_thread()) {
    return;
  }
  if (state.depth == 0) {
    state.mode = Wait;
    Error error;
    for (int i = 1; i < num_signals && !error; ++i) {
      if (i == SIGSEGV || i == SIGBUS || i == SIGFPE || i == SIGILL) {
        continue; // they come from the code that runs, and it does not go on
      }
      auto handler = py::reinterpret_steal<py::object>(PyObject_CallFunction(get_signal, "i", i));
      if (!handler) {
        PyErr_Clear();
        continue;
      }
      if (PyCallable_Check(handler.ptr()) != 0) {
        sigaction(i, nullptr, &state.actions[i]);
        const auto done = py::reinterpret_steal<py::object>(
            PyObject_CallFunction(set_signal, "iO", i, note_function));
        if (done) {
          state.handlers[i] = handler.release().ptr();
        } else {
          error.emplace();
        }
      }
    }
    if (error) {
      give_back(error);
      run_waiting(error);
      throw *error;
    }
  }
  active_ = true;
  ++state.depth;
  previous_mode_ = std::exchange(state.mode, Wait);
  previous_stop_ = std::exchange(state.stop, stop && state.stop);
}

void Hold::end() {
  if (!std::exchange(active_, false)) {
    return;
  }
  Error error;
  state.mode = previous_mode_;
  state.stop = previous_stop_;
  if (--state.depth == 0) {
    state.mode = Wait;
    give_back(error);
    run_waiting(error);
  } else if (state.mode == Open) {
    run_waiting_in_place(error);
  } else if (state.mode == Stop && state.stop && is_waiting()) {
    PyErr_SetNone(interrupted_type);
    error.emplace();
  }
  if (error) {
    throw *error;
  }
}

Hold::~Hold() {
  if (!std::exchange(active_, false)) {
    return;
  }
  // Another exception is on its way: handlers run when Python looks for signals next.
  py::error_scope raised;
  state.mode = previous_mode_;
  state.stop = previous_stop_;
  if (--state.depth == 0) {
    state.mode = Wait;
    Error error;
    give_back(error);
    for (int i = 1; i < num_signals; ++i) {
      if (std::exchange(state.came[i], false)) {
        PyErr_SetInterruptEx(i);
      }
    }
  }
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
  explicit PythonHold(bool stop) : stop_(stop) {}
  void enter() { hold_.emplace(stop_); }
  void exit() {
    if (hold_) {
      hold_->end();
      hold_.reset();
    }
  }

 private:
  bool stop_;
  std::optional<Hold> hold_;
};

} // namespace

void bind_interrupts(py::module_& m) {
  const auto module = py::module_::import("_signal");
  get_signal = py::object(module.attr("getsignal")).release().ptr();
  set_signal = py::object(module.attr("signal")).release().ptr();
  main_thread = py::object(py::module_::import("threading").attr("main_thread")).release().ptr();
  note_function = PyCFunction_New(&note_definition, nullptr);
  interrupted_type =
      PyErr_NewException("torch_lazy_ext._C.Interrupted", PyExc_BaseException, nullptr);
  m.attr("Interrupted") = py::reinterpret_borrow<py::object>(interrupted_type);
  py::class_<PythonHold>(m, "Hold", "While it is entered, Python's signal handlers wait.")
      .def(py::init<bool>(), py::arg("stop") = true)
      .def("__enter__", &PythonHold::enter)
      .def("__exit__", [](PythonHold& hold, const py::args& /*exception*/) { hold.exit(); });
  m.def("stoppable", &stoppable, "Call `fn`; in a Hold, a signal ends it with `Interrupted`.");
  m.def(
      "opened",
      [](const py::function& fn, const py::args& args, const py::kwargs& kwargs) {
        return in_mode(Open, fn, args, kwargs);
      },
      "Call `fn`; in a Hold too, the handlers of signals run.");
  m.def(
      "interrupted",
      [] { return state.depth > 0 && in_main_thread() && is_waiting(); },
      "Whether a signal waits for a Hold to end.");
}

} // namespace tle
