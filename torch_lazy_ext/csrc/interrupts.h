// Python's signal handlers while something is half done, and exceptions that are no errors.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <exception>

namespace tle {

namespace py = pybind11;

// For as long as one lives, Python's signal handlers wait. They run in the main thread alone, so in
// any other this does nothing. Those of one thread may be nested.
class Hold {
 public:
  // stop: a signal ends what runs in `stoppable`.
  // Raises what the handler of a signal that came before does.
  explicit Hold(bool stop = true);
  ~Hold();
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  // Runs the handlers of the signals that came, and raises what they do.
  void end();

 private:
  bool active_ = false;
  int previous_mode_ = 0;
  bool previous_stop_ = true;
};

// Whether an exception is an error, and not an interrupt or an exit that has to leave as itself.
bool is_error(const std::exception& e);

void bind_interrupts(py::module_& m);

} // namespace tle
