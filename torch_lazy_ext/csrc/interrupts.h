// Python's signal handlers while something is half done, and exceptions that are no errors.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <exception>

namespace tle {

namespace py = pybind11;

// For as long as one lives, Python's signal handlers wait; afterwards they run where the
// interpreter next looks for signals. They belong to the main thread: in another one this does
// nothing. Made and destroyed with the GIL held, in one thread; one may live inside of another.
class Hold {
 public:
  // Args:
  //   stops: a signal ends what runs in `stoppable`.
  // Raises what the handler of a signal that came before does.
  explicit Hold(bool stops = true);
  ~Hold();
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  bool active_ = false;
  bool previous_stops_ = false;
  bool previous_may_stop_ = false;
};

// Whether a Hold of this thread lives.
bool is_held();

// Runs the handlers that have waited; -1 with Python's error set when one raises. In a Hold they go
// on waiting.
int run_handlers();

// Whether the exception is what `stoppable` raises.
bool is_interrupted(const py::error_already_set& e);

// Whether an exception is an error, and not an interrupt or an exit that has to leave as itself.
bool is_error(const std::exception& e);

void bind_interrupts(py::module_& m);

} // namespace tle
