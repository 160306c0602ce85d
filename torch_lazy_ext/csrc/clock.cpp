#include "clock.h"

#if PY_VERSION_HEX >= 0x030D0000

#include <unordered_map>
#include <utility>

namespace tle {

// What the interpreter tells of the dictionaries that have a clock. All of it with the GIL held.
struct Watchers {
  std::unordered_map<PyObject*, DictClock::Watched*> watched;
  uint64_t changes = 1;
  int id; // negative: no watcher was free

  Watchers() : id(PyDict_AddWatcher(&notice)) {
    if (id < 0) {
      PyErr_Clear();
    }
  }

  // Lives as long as the process: dictionaries are destroyed after static objects are.
  static Watchers& instance() {
    static auto* watchers = new Watchers();
    return *watchers;
  }

  static int notice(PyDict_WatchEvent event, PyObject* dict, PyObject*, PyObject*) {
    Watchers& self = instance();
    const auto found = self.watched.find(dict);
    if (found != self.watched.end()) {
      ++found->second->changes;
      ++self.changes;
      if (event == PyDict_EVENT_DEALLOCATED) {
        found->second->dict = nullptr; // another one may get its address
        self.watched.erase(found);
      }
    }
    return 0;
  }
};

// An object and its `__dict__` may share the values, and then a store to an attribute tells no
// watcher. Takes them apart, as `popitem` does: the dictionary has its items, in their order, for
// itself. Returns whether it has.
static bool has_own_values(PyObject* dict) {
  auto is_shared = [&] { return reinterpret_cast<PyDictObject*>(dict)->ma_values != nullptr; };
  if (!is_shared()) {
    return true;
  }
  if (PyDict_GET_SIZE(dict) == 0) {
    // A key that no attribute has takes them apart, too.
    if (PyDict_SetItem(dict, Py_None, Py_None) != 0 || PyDict_DelItem(dict, Py_None) != 0) {
      PyErr_Clear();
    }
    return !is_shared();
  }
  PyObject* item = PyObject_CallMethod(dict, "popitem", nullptr);
  if (item == nullptr ||
      PyDict_SetItem(dict, PyTuple_GET_ITEM(item, 0), PyTuple_GET_ITEM(item, 1)) != 0) {
    PyErr_Clear();
  }
  Py_XDECREF(item);
  return !is_shared();
}

DictClock::DictClock(PyObject* dict) : watched_(nullptr) {
  Watchers& watchers = Watchers::instance();
  if (watchers.id < 0) {
    return;
  }
  const auto found = watchers.watched.find(dict);
  if (found != watchers.watched.end()) {
    watched_ = found->second;
  } else {
    if (!has_own_values(dict) || PyDict_Watch(watchers.id, dict) != 0) {
      PyErr_Clear();
      return;
    }
    watched_ = new Watched{dict, 0, 1};
    watchers.watched.emplace(dict, watched_);
  }
  ++watched_->clocks;
}

DictClock::DictClock(DictClock&& other) noexcept
    : watched_(std::exchange(other.watched_, nullptr)) {}

DictClock::~DictClock() {
  if (watched_ == nullptr || --watched_->clocks > 0) {
    return;
  }
  if (watched_->dict != nullptr) {
    Watchers& watchers = Watchers::instance();
    watchers.watched.erase(watched_->dict);
    if (PyDict_Unwatch(watchers.id, watched_->dict) != 0) {
      PyErr_Clear(); // no watcher any more: the interpreter is being taken down
    }
  }
  delete watched_;
}

uint64_t DictClock::of_all() {
  const Watchers& watchers = Watchers::instance();
  return watchers.id < 0 ? 0 : watchers.changes;
}

} // namespace tle

#endif
