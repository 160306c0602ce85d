"""Record: Python floats that the graph computes.

A learning rate that a scheduler changes, or the bias correction of a step count, must not become
a constant of the graph. While a program is recorded such a float is a `Number`: arithmetic with it
is recorded, PyTorch's operators take it where they take a float, and whoever wants to know its
value (a comparison, `float()`, printing) gets the value of this run, which is guarded.

`torch.SymFloat` is how PyTorch itself hands floats without a value through its operators.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Values(Protocol):
    """Who knows the values of this run: the capture."""

    def twin_of(self, tensor: torch.Tensor) -> torch.Tensor: ...

    def observe(self, tensor: torch.Tensor) -> Any:
        """The value of a capture tensor in this run, which is guarded."""


class _Node:
    """What PyTorch's C++ code sees of a `Number`.

    Attributes:
        answers: what the program asked about the number, and was told.
    """

    def __init__(self, tensor: torch.Tensor, values: Values) -> None:
        self._tensor = tensor
        self.values = values
        self.answers: dict[Any, bool] = {}

    @property
    def number(self) -> torch.Tensor:
        """The capture tensor; an input is lifted when it is used for the first time."""
        return self.values.twin_of(self._tensor)

    def is_float(self) -> bool:
        return True

    def is_int(self) -> bool:
        return False

    def is_bool(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return True

    def has_hint(self) -> bool:
        return True

    def guard_float(self, file: str, line: int) -> float:
        value: float = self.values.observe(self.number)
        return value


_EXACT = 2**53  # up to here, an int and its float are the same number


def _operand(value: Any) -> Any:
    """A number or a float of the other side of an operator; None for anything else.

    Subclasses, such as numpy's scalars, have operators of their own.
    """
    if type(value) in (int, float, bool):
        return float(value)
    return value if type(value) is Number else None


def _binary(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    op, by_value = getattr(torch.ops.torch_lazy_ext, name), getattr(operator, name)

    def forward(self: Number, other: Any) -> Any:
        operand = _operand(other)
        if operand is not None:
            return self._made(op, self, operand)
        return NotImplemented if isinstance(other, torch.Tensor) else by_value(float(self), other)

    def reflected(self: Number, other: Any) -> Any:
        operand = _operand(other)
        if operand is not None:
            return self._made(op, operand, self)
        return NotImplemented if isinstance(other, torch.Tensor) else by_value(other, float(self))

    return forward, reflected


def _comparison(name: str) -> Callable[..., bool]:
    op, by_value = getattr(torch, name), getattr(operator, name)

    def compare(self: Number, other: Any) -> Any:
        inexact = type(other) is int and abs(other) > _EXACT
        operand = None if inexact else _operand(other)
        if operand is None:
            if isinstance(other, torch.Tensor):
                return NotImplemented
            return by_value(float(self), other)
        right = operand.node.number if isinstance(operand, Number) else operand
        answers = self.node.answers
        key = (name, right)
        if key not in answers:
            with torch.no_grad():
                answers[key] = self.node.values.observe(op(self.node.number, right))
        return answers[key]

    return compare


def _by_value(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def method(self: Number, *args: Any) -> Any:
        return function(float(self), *args)

    return method


class Number(torch.SymFloat):
    """A float of a running capture.

    Args:
        tensor: its value, 0-dim and float64: a capture tensor, or one that is going to be lifted.
        values: the capture.
    """

    node: _Node

    def __init__(self, tensor: torch.Tensor, values: Values) -> None:
        super().__init__(_Node(tensor, values))  # type: ignore[no-untyped-call] # PyTorch's own

    def _made(self, op: Callable[..., torch.Tensor], *operands: Any) -> Number:
        with torch.no_grad():
            return Number(op(*operands), self.node.values)

    __add__, __radd__ = _binary("add")
    __sub__, __rsub__ = _binary("sub")
    __mul__, __rmul__ = _binary("mul")
    __truediv__, __rtruediv__ = _binary("truediv")
    __pow__, __rpow__ = _binary("pow")

    def __neg__(self) -> Number:
        return self._made(torch.ops.torch_lazy_ext.neg, self)

    def __abs__(self) -> Number:
        return self._made(torch.ops.torch_lazy_ext.abs, self)

    def __pos__(self) -> Number:
        return self

    __eq__ = _comparison("eq")
    __ne__ = _comparison("ne")
    __lt__ = _comparison("lt")
    __le__ = _comparison("le")
    __gt__ = _comparison("gt")
    __ge__ = _comparison("ge")

    def __bool__(self) -> bool:
        return self != 0

    def __deepcopy__(self, memo: Any) -> Number:
        return self

    __hash__ = _by_value(hash)
    __repr__ = _by_value(repr)
    __str__ = _by_value(str)
    __format__ = _by_value(format)
    __int__ = _by_value(int)
    __trunc__ = _by_value(math.trunc)
    __floor__ = _by_value(math.floor)
    __ceil__ = _by_value(math.ceil)
    __round__ = _by_value(round)
    __floordiv__ = _by_value(operator.floordiv)
    __mod__ = _by_value(operator.mod)
    __divmod__ = _by_value(divmod)
    is_integer = _by_value(float.is_integer)
    as_integer_ratio = _by_value(float.as_integer_ratio)
    hex = _by_value(float.hex)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return sys.modules["numpy"].asarray(float(self), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # numpy's scalars and arrays compute with it as with a float.
        if method == "__call__" and ufunc.__name__ in QUESTIONS and not kwargs:
            return sys.modules["numpy"].bool_(ask(self, ufunc.__name__))
        known = [float(v) if isinstance(v, Number) else v for v in inputs]
        return getattr(ufunc, method)(*known, **kwargs)

    def __rfloordiv__(self, other: Any) -> Any:
        return other // float(self)

    def __rmod__(self, other: Any) -> Any:
        return other % float(self)

    def __rdivmod__(self, other: Any) -> Any:
        return divmod(other, float(self))

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """A new 0-dim tensor with the number in it."""
        with torch.no_grad():
            return self.node.number.to(dtype, copy=True)

    @property  # type: ignore[misc] # object's can be assigned to, and a number is always a float
    def __class__(self) -> type:
        return float  # to isinstance()

    @property
    def real(self) -> Number:
        return self

    @property
    def imag(self) -> float:
        return 0.0


# Functions of math, of numpy and of torch.
QUESTIONS = ("isfinite", "isinf", "isnan")


def ask(number: Number, question: str) -> bool:
    """One of `QUESTIONS`, of which the answer is guarded, and not the number."""
    answers = number.node.answers
    if question not in answers:
        with torch.no_grad():
            found = getattr(torch, question)(number.node.number)
            answers[question] = number.node.values.observe(found)
    return answers[question]


def greater(number: Number, bound: float) -> torch.Tensor:
    """Whether a number is greater, as a tensor of the graph: nobody looks at it."""
    with torch.no_grad():
        return torch.gt(number.node.number, bound)


def select(
    number: Number, bound: float, greater_one: Number | float, other: Number | float
) -> Number:
    """One number where `number` is greater than `bound`, and the other where not."""

    def tensor(value: Number | float) -> torch.Tensor:
        if isinstance(value, Number):
            return value.node.number
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")

    with torch.no_grad():
        chosen = torch.where(greater(number, bound), tensor(greater_one), tensor(other))
        return Number(chosen, number.node.values)
