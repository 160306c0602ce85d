// Stage "record": which Python code runs while a program is recorded, library code included.
#pragma once

#include <Python.h>

#include <c10/util/flat_hash_map.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

namespace tle {

namespace py = pybind11;

// What a code object reads and writes by name: a _code.Names that the code object keeps.
enum class NameField : uint8_t {
  Chains,
  Stored,
  Attributes,
  StoredAttributes,
  Imports,
  Strings,
  All,
  Globals,
  Inner
};
py::tuple names_of(PyObject* code);
// The same with the code objects inside of it.
py::tuple names_within(PyObject* code);

// Notes each code object that starts in this thread between `start` and `stop`. Where the layout of
// frames is known, by the function that evaluates frames (PEP 523), which costs tens of nanoseconds
// a call; else by the profile function of the thread, and functions are looked for in the heap. A
// profiler that the thread has goes on.
class Ran {
 public:
  struct Entry {
    py::object code;
    py::object globals;
    py::object first; // the type of the first argument, or null
    py::object instance; // the first argument itself, where it is `told_apart`; or null
    py::object function; // a weak reference, or null: unknown, or made by code that ran
    bool library;
  };
  // Names of modules and packages: `libraries`, and `own`, which are of nobody's interest.
  // `entered(code, function, globals)` is called before other code than a library's runs for the
  // first time. `told_apart`: the class of which first arguments are noted themselves.
  Ran(py::anyset libraries, py::anyset own, py::object entered, py::object told_apart)
      : libraries_(std::move(libraries)),
        own_(std::move(own)),
        entered_(std::move(entered)),
        told_apart_(std::move(told_apart)) {}
  Ran(const Ran&) = delete;
  Ran& operator=(const Ran&) = delete;

  void start();
  // Raises what `entered` raised. False: the program has put another profile function in place.
  bool stop();
  // Whether it notes what is called now.
  bool listens() const;
  // Borrowed; function, globals and first argument may be null.
  void called(PyObject* code, PyObject* function, PyObject* globals, PyObject* first) noexcept;

  std::vector<Entry> entries;

 private:
  struct Key {
    void *code, *function, *first; // the type of the first argument, or itself
    bool operator==(const Key& o) const {
      return code == o.code && function == o.function && first == o.first;
    }
  };
  struct Hash {
    size_t operator()(const Key& k) const {
      auto mix = [](void* p) { return reinterpret_cast<size_t>(p) >> 4; };
      return (mix(k.code) * 31 + mix(k.function)) * 31 + mix(k.first);
    }
  };
  enum class Origin : uint8_t { Own, Library, User };
  void note(PyObject* code, PyObject* function, PyObject* globals, PyObject* first);
  Origin origin(PyObject* globals);
  bool is_told_apart(PyObject* first) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(first)) == told_apart_.ptr();
  }

  py::anyset libraries_, own_;
  py::object entered_;
  py::object told_apart_;
  ska::flat_hash_set<Key, Hash> seen_;
  ska::flat_hash_set<void*> inner_; // code objects that are constants of code that ran
  ska::flat_hash_map<void*, Origin> origins_; // of globals
  Ran* outer_ = nullptr;
  bool busy_ = false;
  std::exception_ptr error_;
};

void bind_ran(py::module_& m);

} // namespace tle
