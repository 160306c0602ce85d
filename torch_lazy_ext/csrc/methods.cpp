#include "methods.h"

#include "record.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace tle {

namespace {

struct Hook {
  PyCFunction original = nullptr;
  PyObject* handler = nullptr;
};

// Each hook has a function of its own: a method's C function is not told its name.
constexpr size_t max_hooks = 4;
std::array<Hook, max_hooks> hooks; // written once, when the package is imported
size_t used_hooks = 0;

// A new reference; NotImplemented when the original method shall run; null for an error.
PyObject* ask(const Hook& hook, PyObject* self, PyObject* args, PyObject* kwargs) {
  if (Recorder::current() == nullptr) {
    return Py_NewRef(Py_NotImplemented);
  }
  const Py_ssize_t count = args == nullptr ? 0 : PyTuple_GET_SIZE(args);
  PyObject* all = PyTuple_New(count + 1);
  if (all == nullptr) {
    return nullptr;
  }
  PyTuple_SET_ITEM(all, 0, Py_NewRef(self));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyTuple_SET_ITEM(all, i + 1, Py_NewRef(PyTuple_GET_ITEM(args, i)));
  }
  PyObject* answer = PyObject_Call(hook.handler, all, kwargs);
  Py_DECREF(all);
  return answer;
}

template <size_t I>
PyObject* without_arguments(PyObject* self, PyObject* unused) {
  PyObject* answer = ask(hooks[I], self, nullptr, nullptr);
  if (answer != Py_NotImplemented) {
    return answer;
  }
  Py_DECREF(answer);
  return hooks[I].original(self, unused);
}

template <size_t I>
PyObject* with_arguments(PyObject* self, PyObject* args) {
  PyObject* answer = ask(hooks[I], self, args, nullptr);
  if (answer != Py_NotImplemented) {
    return answer;
  }
  Py_DECREF(answer);
  return hooks[I].original(self, args);
}

template <size_t I>
PyObject* with_keywords(PyObject* self, PyObject* args, PyObject* kwargs) {
  PyObject* answer = ask(hooks[I], self, args, kwargs);
  if (answer != Py_NotImplemented) {
    return answer;
  }
  Py_DECREF(answer);
  return reinterpret_cast<PyCFunctionWithKeywords>(reinterpret_cast<void*>(hooks[I].original))(
      self, args, kwargs);
}

// Null for a calling convention that is not known here.
template <size_t... I>
PyCFunction function_for(size_t index, int convention, std::index_sequence<I...>) {
  static const std::array<PyCFunction, max_hooks> plain = {&without_arguments<I>...};
  static const std::array<PyCFunction, max_hooks> positional = {&with_arguments<I>...};
  static const std::array<PyCFunctionWithKeywords, max_hooks> full = {&with_keywords<I>...};
  switch (convention) {
    case METH_NOARGS:
      return plain[index];
    case METH_VARARGS:
      return positional[index];
    case METH_VARARGS | METH_KEYWORDS:
      return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(full[index]));
    default:
      return nullptr;
  }
}

// What calls the classes that are instances of a metaclass.
struct CallHook {
  PyTypeObject* metaclass;
  ternaryfunc original;
  PyObject* handler;
};

std::vector<CallHook> call_hooks; // written once, when the package is imported

PyObject* call_class(PyObject* cls, PyObject* args, PyObject* kwargs) {
  const auto hook = std::find_if(call_hooks.begin(), call_hooks.end(), [&](const CallHook& h) {
    return PyObject_TypeCheck(cls, h.metaclass);
  });
  PyObject* answer = ask({nullptr, hook->handler}, cls, args, kwargs);
  if (answer != Py_NotImplemented) {
    return answer;
  }
  Py_DECREF(answer);
  return hook->original(cls, args, kwargs);
}

} // namespace

void hook_calls(PyTypeObject* metaclass, PyObject* handler) {
  Py_INCREF(handler); // for the life of the process
  call_hooks.push_back({metaclass, metaclass->tp_call, handler});
  metaclass->tp_call = &call_class;
}

void hook_method(PyObject* method, PyObject* handler) {
  TORCH_CHECK(
      Py_IS_TYPE(method, &PyMethodDescr_Type) || Py_IS_TYPE(method, &PyClassMethodDescr_Type),
      "not the descriptor of a method");
  TORCH_CHECK(used_hooks < max_hooks, "more hooks than expected");
  PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
  const PyCFunction function = function_for(
      used_hooks, definition->ml_flags & ~METH_CLASS, std::make_index_sequence<max_hooks>());
  TORCH_CHECK(function != nullptr, "a calling convention not expected");
  Py_INCREF(handler); // for the life of the process
  hooks[used_hooks] = {definition->ml_meth, handler};
  definition->ml_meth = function;
  ++used_hooks;
}

} // namespace tle
