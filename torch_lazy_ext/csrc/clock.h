// Stage "replay": whether a dictionary has changed, for the price of one comparison.
#pragma once

#include <Python.h>

#include <cstdint>

namespace tle {

// A number that moves with each change of a dictionary, and with nothing else. Up to Python 3.12
// CPython keeps it itself (`ma_version_tag`). From 3.13 on the dictionary is watched, and its
// changes are counted: there the change follows the count, and nothing runs in between.
//
// A clock borrows its dictionary. It is made, asked and destroyed with the GIL held.
class DictClock {
 public:
  explicit DictClock(PyObject* dict);
  DictClock(DictClock&& other) noexcept;
  DictClock(const DictClock&) = delete;
  DictClock& operator=(const DictClock&) = delete;
  DictClock& operator=(DictClock&&) = delete;
  ~DictClock();

  // 0: unknown, the dictionary may change at any time (all watchers of the interpreter are taken).
  uint64_t now() const;

  // Moves whenever a dictionary with a clock does. 0: unknown.
  static uint64_t of_all();

 private:
#if PY_VERSION_HEX < 0x030D0000
  PyObject* dict_;
#else
  struct Watched;
  friend struct Watchers;
  Watched* watched_;
#endif
};

#if PY_VERSION_HEX < 0x030D0000

inline DictClock::DictClock(PyObject* dict) : dict_(dict) {}
inline DictClock::DictClock(DictClock&& other) noexcept : dict_(other.dict_) {}
inline DictClock::~DictClock() = default;

inline uint64_t DictClock::now() const {
  return reinterpret_cast<PyDictObject*>(dict_)->ma_version_tag;
}

inline uint64_t DictClock::of_all() {
  return 0;
}

#else

struct DictClock::Watched {
  PyObject* dict; // null once it is gone
  int64_t clocks; // how many there are
  uint64_t changes;
};

inline uint64_t DictClock::now() const {
  return watched_ == nullptr ? 0 : watched_->changes;
}

#endif

} // namespace tle
