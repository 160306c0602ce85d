// Stage "record": methods of torch.Tensor that read its memory below any operator.
#pragma once

#include <Python.h>

namespace tle {

// From now on a call of `method` (a method descriptor of torch._C.TensorBase) in a capturing
// thread asks `handler(tensor, *args, **kwargs)` first, and goes on when that returns
// NotImplemented. The entry in the class's own table is exchanged, so that references to the
// method from before are no way around. For the life of the process.
void hook_method(PyObject* method, PyObject* handler);

} // namespace tle
