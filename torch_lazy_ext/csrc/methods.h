// Stage "record": methods in C that work on tensors below any operator.
#pragma once

#include <Python.h>

namespace tle {

// From now on a call of `method` (the descriptor of a method, or class method, of a class written
// in C) in a capturing thread asks `handler(self, *args, **kwargs)` first, and goes on when that
// returns NotImplemented. The entry in the class's own table is exchanged, so that references to
// the method from before are no way around. For the life of the process.
void hook_method(PyObject* method, PyObject* handler);

// The same for calls of the classes that `metaclass` makes: `handler(cls, *args, **kwargs)`. Not
// for those of a metaclass derived from it.
void hook_calls(PyTypeObject* metaclass, PyObject* handler);

} // namespace tle
