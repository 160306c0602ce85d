// Stage "record": arithmetic of Python floats that a graph computes, such as the bias
// correction of an optimizer. A number is a 0-dim float64 tensor; each operator does what
// Python does with two floats, to the bit, and raises where Python does.
#include "number.h"

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <cmath>

namespace tle {

at::Tensor number(double value) {
  // Not through the dispatcher: a capture may be running.
  at::Tensor t = at::Tensor(at::detail::empty_cpu({}, at::kDouble));
  *t.mutable_data_ptr<double>() = value;
  return t;
}

namespace {

template <double (*function)(double, double)>
at::Tensor binary(const at::Scalar& a, const at::Scalar& b) {
  return number(function(a.toDouble(), b.toDouble()));
}

double add(double a, double b) {
  return a + b;
}

double sub(double a, double b) {
  return a - b;
}

double mul(double a, double b) {
  return a * b;
}

double truediv(double a, double b) {
  TORCH_CHECK(b != 0, "float division by zero");
  return a / b;
}

// As float_pow of CPython's Objects/floatobject.c, which leaves to C what C99 defines.
double power(double a, double b) {
  TORCH_CHECK(a != 0 || !(b < 0), "0.0 cannot be raised to a negative power");
  const bool complex = a < 0 && std::isfinite(a) && std::isfinite(b) && b != std::floor(b);
  TORCH_CHECK(!complex, "a negative number to a fractional power is complex");
  const double result = std::pow(a, b);
  TORCH_CHECK(!std::isinf(result) || !std::isfinite(a) || !std::isfinite(b), "Result too large");
  return result;
}

at::Tensor neg(const at::Scalar& a) {
  return number(-a.toDouble());
}

at::Tensor absolute(const at::Scalar& a) {
  return number(std::abs(a.toDouble()));
}

// What `Tensor.item()` gives, as a number of the graph.
at::Tensor item(const at::Tensor& t) {
  return t.is_meta() ? number(0) : number(t.item<double>());
}

} // namespace

// A tensor that takes part in type promotion as a Python float does.
at::Tensor wrapped_number(double value) {
  at::Tensor t = number(value);
  t.unsafeGetTensorImpl()->set_wrapped_number(true);
  return t;
}

TORCH_LIBRARY(torch_lazy_ext, m) {
  m.def("add(Scalar a, Scalar b) -> Tensor", &binary<&add>);
  m.def("sub(Scalar a, Scalar b) -> Tensor", &binary<&sub>);
  m.def("mul(Scalar a, Scalar b) -> Tensor", &binary<&mul>);
  m.def("truediv(Scalar a, Scalar b) -> Tensor", &binary<&truediv>);
  m.def("pow(Scalar a, Scalar b) -> Tensor", &binary<&power>);
  m.def("neg(Scalar a) -> Tensor", &neg);
  m.def("abs(Scalar a) -> Tensor", &absolute);
  m.def("item(Tensor t) -> Tensor");
  m.def("wrapped_number(float value) -> Tensor", &wrapped_number);
}

TORCH_LIBRARY_IMPL(torch_lazy_ext, CompositeExplicitAutograd, m) {
  m.impl("item", &item);
}

at::Scalar multiplier_in_place(const at::Scalar& number, at::ScalarType type) {
  if (!at::isReducedFloatingType(type) || number.isComplex()) {
    return number;
  }
  auto rounded = [type](auto value) -> double {
    return type == at::kHalf ? float(c10::convert<c10::Half>(value))
                             : float(c10::convert<c10::BFloat16>(value));
  };
  return number.isFloatingPoint() ? rounded(number.toDouble()) : rounded(number.toLong());
}

} // namespace tle
