# Owner(s): ["oncall: jit"]

"""Arguments of a replay: how they are passed, and every kind of tensor and value they can be."""

import collections
import dataclasses
import types
import unittest
from typing import Any, NamedTuple

import numpy
import torch
from oracle import (
    Call,
    check,
    check_refused,
    makefunctiontest,
    maketest,
    random_tensor,
    tensors,
)
from torch import Tensor, nn

from torch_lazy_ext import UnsupportedError, extract_compiled_graph


class Point(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float


class Holder:
    """An object of the user's own, as a cache or a batch is."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


class Corner(NamedTuple):
    x: Tensor
    y: Tensor


def _array_of(i: int) -> tuple[Any, ...]:
    """Zeros, the same bytes in every dtype."""
    return randn(2), numpy.zeros(2, (numpy.float32, numpy.int32)[i % 2])


def _raises_by_what_was(a: Tensor, b: Tensor) -> Tensor:
    a.zero_()
    if b.sum() > 0:
        raise ValueError("b is not a any more")
    return b + 1


def _one_memory() -> tuple[Tensor, Tensor]:
    x = torch.rand(3) + 1
    return x, x.detach()


def _moved(i: int) -> tuple[Any, ...]:
    argument = collections.OrderedDict(a=randn(2), b=randn(2))
    argument.move_to_end("ab"[i % 2])
    return (argument,)


def _conjugated(i: int) -> tuple[Tensor]:
    x = torch.randn(2, dtype=torch.complex64)
    return (x.conj() if i % 2 else x,)


def _one_list_or_two(i: int) -> tuple[list[Tensor], list[Tensor]]:
    first, second = [randn(2)], [randn(2)]
    return (first, first) if i % 2 else (first, second)


class Named(dict[str, Any]):
    """A dictionary whose items are attributes: a name that is no key raises a KeyError."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class SlotsAndNames:
    """Finds by `__getattr__` what it has no place for."""

    __slots__ = ("names",)

    def __init__(self, **names: Any) -> None:
        self.names = names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # which copies ask for
        return object.__getattribute__(self, "names")[name]


def _keyed(i: int) -> tuple[Any, ...]:
    x, y = randn(2), randn(2)
    return (x, y), {(x, y)[i % 2]: randn(2), "k": y}


def _adds_key(x: Tensor, held: dict[Any, Any]) -> Tensor:
    held[x] = x + 1
    return x * 2


def _set_coefficient(array_polynomial: Any, i: int) -> Any:
    array_polynomial.coeffs[0] = i // 2
    return array_polynomial


_POLYNOMIAL = numpy.poly1d([1.0, 2.0, 3.0])


class DifferenceTest(unittest.TestCase):
    """What two arguments can differ in beside values and items."""

    test_type_of_key = makefunctiontest(
        lambda d: [(repr(key), x + 1) for key, x in d.items()],
        lambda i: (collections.OrderedDict([((1, True, 1.0)[i % 3], randn(2))]),),
        captures=3,
        calls=6,
    )
    test_type_of_key_of_dict = makefunctiontest(
        lambda d: [(repr(key), x + 1) for key, x in d.items()],
        lambda i: ({(1, True, 1.0)[i % 3]: randn(2)},),
        captures=3,
        calls=6,
    )
    test_type_of_number = makefunctiontest(
        lambda x, n: (x * n, repr(n)),
        lambda i: (torch.randint(9, (2,)), (1, 1.0, True)[i % 3]),
        captures=3,
        calls=6,
    )
    test_one_list_or_two = makefunctiontest(
        lambda a, b: (a is b, a[0] + b[0]), _one_list_or_two, captures=2, calls=4
    )
    test_two_lists_or_one = makefunctiontest(
        lambda a, b: (a is b, a[0] + b[0]),
        lambda i: _one_list_or_two(i + 1),
        captures=2,
        calls=4,
    )

    test_two_lists_of_numbers_or_one = makefunctiontest(
        lambda x, lists: (lists[0] is lists[1], x + lists[0][0]),
        lambda i: (randn(2), [[1]] * 2 if i % 2 else [[1], [1]]),
        captures=2,
        calls=4,
    )

    def test_parameter_or_another_tensor(self) -> None:
        module = nn.Linear(2, 2, bias=False).requires_grad_(False)
        other = randn(2, 2)

        def program(weight: Tensor) -> Tensor:
            return weight + 2 * module.weight

        for first, second in ((module.weight, other), (other, module.weight)):
            graph = extract_compiled_graph(program, (first,))
            for weight in (first, second, first, nn.Parameter(other, requires_grad=False)):
                self.assertEqual(graph(weight).tolist(), program(weight).tolist())

    def test_gradient_or_another_tensor(self) -> None:
        weight, other = randn(2).requires_grad_(), randn(2)
        weight.grad = randn(2)

        def program(x: Tensor) -> Tensor:
            return x + 2 * weight.grad

        for first, second in ((weight.grad, other), (other, weight.grad)):
            graph = extract_compiled_graph(program, (first,))
            for x in (first, second, first, randn(2)):
                self.assertEqual(graph(x).tolist(), program(x).tolist())

    test_conjugate_bit = makefunctiontest(
        lambda x: (x.is_conj(), x.resolve_conj(), x * 2), _conjugated, captures=2, calls=4
    )
    test_negative_bit = makefunctiontest(
        lambda x: (x.is_neg(), x.resolve_neg(), x * 2),
        lambda i: (torch._neg_view(randn(2)) if i % 2 else randn(2),),
        captures=2,
        calls=4,
    )
    test_order_of_keys = makefunctiontest(
        lambda d: [(key, x + 1) for key, x in d.items()], _moved, captures=2, calls=4
    )
    test_names_of_attributes = makefunctiontest(
        lambda o: {name: x * 2 for name, x in vars(o).items()},
        lambda i: (types.SimpleNamespace(**{"ab"[i % 2]: randn(2)}),),
        captures=2,
        calls=4,
    )
    test_maxlen = makefunctiontest(
        lambda d: (d.maxlen, d[0] + 1),
        lambda i: (collections.deque([randn(2)], maxlen=i % 2 + 2),),
        captures=2,
        calls=4,
    )
    test_default_factory = makefunctiontest(
        lambda d: (d.default_factory(), d["x"] + 1),
        lambda i: (collections.defaultdict((list, dict)[i % 2], x=randn(2)),),
        captures=2,
        calls=4,
    )
    test_class_of_namedtuple = makefunctiontest(
        lambda p: (type(p).__name__, p.x - p.y),
        lambda i: ((Point, Corner)[i % 2](randn(2), randn(2)),),
        captures=2,
        calls=4,
    )
    test_dtype_of_array = makefunctiontest(
        lambda x, a: (x + 1, str(a.dtype)), _array_of, captures=2, calls=4
    )

    def test_array_changed_in_place(self) -> None:
        x, array = randn(2), numpy.ones(2, numpy.float32)
        graph = extract_compiled_graph(lambda x, a: x * float(a[0]), (x, array))
        for i in range(3):
            array[0] = i
            self.assertEqual(graph(x, array).tolist(), (x * i).tolist())

    test_raises_by_what_was_written = makefunctiontest(
        _raises_by_what_was, _one_memory, captures=None
    )


class TakenApartTest(unittest.TestCase):
    """Arguments that are no plain containers, and still have parts."""

    test_dict_with_getattr = makefunctiontest(
        lambda x, c: (x + c.offset, c["offset"], len(c)),
        lambda i: (randn(2), Named(offset=randn(2) if i % 2 else 5)),
        captures=2,
        calls=4,
    )
    test_dict_with_getattr_and_factory = makefunctiontest(
        lambda x, c: x + c.default_factory,
        lambda: (randn(2), Named(default_factory=randn(2))),
        captures=None,
    )
    test_slots_with_getattr = makefunctiontest(
        lambda x, c: x * c.scale,
        lambda i: (randn(2), SlotsAndNames(scale=float(i % 2))),
        captures=2,
        calls=4,
    )
    test_keyed_by_a_tensor = makefunctiontest(
        lambda pair, d: [d[k] for k in pair if k in d], _keyed, captures=2, calls=4
    )
    test_keyed_by_a_tensor_alone = makefunctiontest(
        lambda d: [k * v for k, v in d.items()], lambda: ({randn(2): randn(2)},)
    )
    test_keyed_by_a_tensor_of_other_shape = makefunctiontest(
        lambda d: sum(k.sum() * v for k, v in d.items()),
        lambda i: ({randn(2 + i % 2): 2.0},),
        captures=2,
        calls=4,
    )
    test_ordered_keyed_by_tensors = makefunctiontest(
        lambda d: torch.cat(list(d)) + torch.cat(list(d.values())),
        lambda: (collections.OrderedDict((randn(2), randn(2)) for _ in range(2)),),
    )
    test_key_added = makefunctiontest(_adds_key, lambda: (randn(2), {"a": 1}), captures=None)
    test_key_written_to = makefunctiontest(
        lambda d: next(k.mul_(v) for k, v in d.items()) + 1, lambda: ({randn(2): 3.0},)
    )
    test_dict_with_tensor_keys_is_returned = makefunctiontest(
        lambda x, d: (d, d[x] + 1), lambda: (x := randn(2), {x: randn(2)})
    )

    test_finfo = makefunctiontest(
        lambda x, info: x * float(info.eps) + float(info.max),
        lambda i: (randn(2), numpy.finfo((numpy.float32, numpy.float64)[i % 2])),
        captures=2,
        calls=4,
    )
    test_iinfo = makefunctiontest(
        lambda x, info: x * info.bits,
        lambda i: (randn(2), numpy.iinfo((numpy.int8, numpy.int64)[i % 2])),
        captures=2,
        calls=4,
    )
    test_polynomial = makefunctiontest(
        lambda x, p: p(x), lambda: (randn(2), numpy.poly1d([1.0, 2.0])), captures=None
    )
    test_polynomial_changed_in_place = makefunctiontest(
        lambda x, p: x * float(p(2.0)),
        lambda i: (randn(2), _set_coefficient(_POLYNOMIAL, i)),
        captures=None,
        calls=6,
    )
    test_vectorized = makefunctiontest(
        lambda x, f: x * float(f(2.0)),
        lambda: (randn(2), numpy.vectorize(lambda v: v + 1)),
        captures=None,
    )
    test_dtype_of_numpy = makefunctiontest(
        lambda x, d: x * d.itemsize,
        lambda i: (randn(2), numpy.dtype(("int8", "int64")[i % 2])),
        captures=2,
        calls=4,
    )


class PassingTest(unittest.TestCase):
    """The ways to pass an argument."""

    test_no_arguments = makefunctiontest(lambda: torch.arange(3) * 2, lambda: ())
    test_kwargs = makefunctiontest(lambda x, *, y: x - y, lambda: Call(randn(2, 3), y=randn(2, 3)))
    test_positional_by_name = makefunctiontest(
        lambda x, y: x - y, lambda: Call(y=randn(2, 3), x=randn(2, 3))
    )
    test_kwargs_order_changes = makefunctiontest(
        lambda a, b: a - b,
        lambda i: Call(a=randn(2), b=randn(2)) if i % 2 else Call(b=randn(2), a=randn(2)),
        captures=2,
        calls=4,
    )
    test_default_left_out = makefunctiontest(lambda x, y=2.0: x * y, tensors((2, 3)))
    test_default_sometimes_given = makefunctiontest(
        lambda x, y=2.0: x * y,
        lambda i: (randn(2, 3), 3.0) if i % 2 else (randn(2, 3),),
        captures=2,
        calls=5,
    )
    test_default_tensor_or_none = makefunctiontest(
        lambda x, mask=None: x if mask is None else x * mask,
        lambda i: (randn(2, 3), randn(2, 3)) if i % 2 else (randn(2, 3), None),
        captures=2,
        calls=5,
    )
    test_varargs = makefunctiontest(
        lambda *xs: torch.stack(xs).cumsum(0), tensors((2,), (2,), (2,))
    )
    test_varargs_of_changing_number = makefunctiontest(
        lambda *xs: sum(xs), lambda i: tuple(randn(2) for _ in range(i % 3 + 1)), captures=3,
        calls=6,
    )  # fmt: skip
    test_varkwargs = makefunctiontest(
        lambda **kw: {k: v * 2 for k, v in kw.items()}, lambda: Call(a=randn(2), zeta=randn(3))
    )
    test_varkwargs_names_change = makefunctiontest(
        lambda **kw: {k: v * len(k) for k, v in kw.items()},
        lambda i: Call(**{"x" * (i % 2 + 1): randn(2)}),
        captures=2,
        calls=4,
    )
    test_nested = makefunctiontest(
        lambda d: d["a"][0] - d["b"]["c"][1],
        lambda: ({"a": [randn(2), None], "b": {"c": (1, randn(2))}},),
    )
    test_list_length_changes = makefunctiontest(
        lambda xs: torch.cat(xs), lambda i: ([randn(2)] * (i % 3 + 1),), captures=3, calls=6
    )
    test_dict_keys_change = makefunctiontest(
        lambda d: d.get("a", 0) + d.get("b", 1),
        lambda i: ({"a": randn(2)} if i % 2 else {"b": randn(2)},),
        captures=2,
        calls=4,
    )
    test_dict_order_changes = makefunctiontest(
        lambda d: (lambda first, second: first * 2 - second)(*d.values()),
        lambda i: ({"a": randn(2), "b": randn(2)} if i % 2 else {"b": randn(2), "a": randn(2)},),
        captures=2,
        calls=4,
    )
    test_list_then_tuple = makefunctiontest(
        lambda xs: (xs[0] + 1, isinstance(xs, list)),
        lambda i: ([randn(2)] if i % 2 else (randn(2),),),
        captures=2,
        calls=4,
    )
    test_namedtuple = makefunctiontest(lambda p: p.x - p.y, lambda: (Point(randn(2), randn(2)),))
    test_ordered_dict = makefunctiontest(
        lambda d: d["b"] - d["a"],
        lambda: (collections.OrderedDict([("b", randn(2)), ("a", randn(2))]),),
    )
    test_dataclass = makefunctiontest(lambda b: b.x * b.scale, lambda: (Batch(randn(2), 2.0),))
    test_dataclass_mutated = makefunctiontest(
        lambda b: (b.x.mul_(b.scale), None)[1], lambda: (Batch(randn(2), 2.0),), captures=None
    )
    test_dataclass_field_changes = makefunctiontest(
        lambda b: b.x * b.scale, lambda i: (Batch(randn(2), float(i % 2)),), captures=None, calls=4
    )
    test_object_with_a_tensor = makefunctiontest(
        lambda h: h.x * 2, lambda: (Holder(randn(2)),), captures=None
    )
    test_object_with_other_shape = makefunctiontest(
        lambda h: h.x * 2, lambda i: (Holder(randn(2 + i % 2)),), captures=None, calls=4
    )
    test_function_argument = makefunctiontest(
        lambda f, x: f(x), lambda i: ((torch.sin, torch.cos)[i % 2], randn(2)), captures=2, calls=4
    )
    test_module_argument = makefunctiontest(
        lambda m, x: m(x), lambda: (nn.Linear(3, 3), randn(2, 3)), exact=False, captures=None
    )
    test_unused_argument = makefunctiontest(lambda x, unused: x + 1, tensors((2,), (3,)))
    test_unused_argument_of_changing_shape = makefunctiontest(
        lambda x, unused: x + 1, lambda i: (randn(2), randn(i + 1)), captures=None
    )
    test_bound_method = maketest(lambda: nn.Linear(3, 4).forward, tensors((2, 3)), exact=False)

    def test_partial(self):
        import functools

        def make():
            return functools.partial(lambda w, x, k: x * w + k, torch.randn(3), k=2)

        check(make, tensors((2, 3)))

    def test_script_and_fx_modules(self):
        for make in (
            lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
            lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
        ):
            with self.subTest(make=make):
                check(make, tensors((2, 3)), exact=False)


def changing(values: list[Any], program: Any, **options: Any) -> Any:
    """`program(x, value)`, with one of `values` in turn: a variant for each, and no more."""
    return makefunctiontest(
        program,
        lambda i: (randn(2, 3), values[i % len(values)]),
        calls=2 * len(values) + 1,
        captures=len(values),
        **options,
    )


class ValueTest(unittest.TestCase):
    """Python values whose value changes from call to call."""

    test_int = changing([2, 3, -1], lambda x, k: x * k)
    test_float = changing(
        [0.5, 1.5, 1e300, 5e-324], lambda x, k: torch.copysign(x, torch.tensor(k))
    )
    test_int_and_float = changing([2, 2.0], lambda x, k: (x * k, k))
    test_bool = changing([True, False], lambda x, k: x + 1 if k else x - 1)
    test_bool_and_int = changing([True, 1], lambda x, k: (x + k, isinstance(k, bool)))
    test_none_and_number = changing(
        [None, 0, 1], lambda x, dim: x.sum() if dim is None else x.sum(dim)
    )
    test_string = changing(["floor", "trunc"], lambda x, k: torch.div(x, 0.3, rounding_mode=k))
    test_complex = changing([1 + 2j, 2 - 1j], lambda x, k: x * k)
    test_nan = makefunctiontest(  # Another NaN on each call: equal for the program's purposes.
        lambda x, k: x * k,
        lambda i: (randn(2), float("nan") if i % 2 else 1.0),
        captures=2,
        calls=5,
    )
    test_inf = changing([float("inf"), -float("inf"), 0.0], lambda x, k: x * k)
    test_negative_zero = changing([-0.0, 0.0], lambda x, k: x.new_full((2,), k))
    test_dtype = changing([torch.float64, torch.int32], lambda x, d: x.to(d))
    test_slice = changing([slice(0, 1), slice(1, 2)], lambda x, s: x[s])
    test_shape = changing([(3, 2), (6,), (1, 6)], lambda x, s: x.reshape(s) + 1)
    test_torch_size = changing([torch.Size([3, 2]), torch.Size([6])], lambda x, s: x.reshape(s) + 1)
    test_list_of_numbers = changing([[0, 1], [1, 0]], lambda x, p: x.permute(p) + 1)
    test_big_int = changing([2**40, -(2**62)], lambda x, k: torch.full((2,), k) + x.long()[0, :2])
    test_range = changing([range(2), range(1)], lambda x, r: [x[i] + 1 for i in r])
    test_tuple_of_mixed = changing([(1, "a"), (2, "b")], lambda x, t: (x * t[0], t[1]))
    test_numbers_close_to_each_other = changing(
        [0.3, 0.30000000000000004], lambda x, k: x.double() * k
    )
    test_callable_default = changing([len, sum], lambda x, f: x * f([1, 2, 3]))


def shaped(*shapes: tuple[int, ...], captures: int | None = None, program: Any = None) -> Any:
    """One argument, of each of these shapes in turn."""
    return makefunctiontest(
        program or (lambda x: (x * 2).sum(-1, keepdim=True) + x),
        lambda i: (randn(*shapes[i % len(shapes)]),),
        calls=2 * len(shapes) + 1,
        captures=captures or len(shapes),
        exact=False,
    )


class ShapeTest(unittest.TestCase):
    test_other_sizes = shaped((2, 3), (4, 3), (4, 5))
    test_other_ranks = shaped((2,), (2, 3), (2, 3, 4), ())
    test_zero_sizes = shaped((0, 3), (2, 3), (3, 0), (0,))
    test_size_one = shaped((1, 3), (2, 3), (1, 1), (2, 1))
    test_many_sizes = shaped(*[(n, 2) for n in range(1, 9)])
    test_batch_size_read_as_a_number = shaped(
        (2, 3), (5, 3), program=lambda x: (x.view(x.shape[0], -1) * x.size(0), x.numel())
    )
    test_branch_on_rank = shaped(
        (2, 3), (3,), program=lambda x: x.t() + 1 if x.dim() == 2 else x - 1
    )
    test_branch_on_size = shaped((2, 3), (7, 3), program=lambda x: x + 1 if len(x) < 5 else x - 1)
    test_loop_over_rows = shaped(
        (2, 3), (4, 3), program=lambda x: sum(row * i for i, row in enumerate(x))
    )
    test_conv_of_other_sizes = maketest(
        lambda: nn.Conv2d(2, 3, 3, padding=1),
        lambda i: (randn(1 + i % 2, 2, 5 + i % 3, 6),),
        calls=6,
        captures=6,
        exact=False,
    )
    test_broadcast_patterns = makefunctiontest(
        lambda x, y: x * y + y,
        lambda i: (
            randn(*[(2, 3), (2, 1), (1, 3), ()][i % 4]),
            randn(*[(2, 3), (3,), (2, 1), (4, 2, 3)][i % 4]),
        ),
        calls=9,
        captures=4,
    )
    test_broadcast_becomes_none = makefunctiontest(
        lambda x, y: x - y,
        lambda i: (randn(2, 3), randn(1, 3) if i % 2 else randn(2, 3)),
        calls=5,
        captures=2,
    )


ALL_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


def of_dtype(dtype: torch.dtype) -> Any:
    def program(x, y):
        z = torch.where(x == y, x, y)
        return z, x * y, x.clone()[0], (x + y).t(), x.sum(), x.to(torch.float32), x != 0

    return makefunctiontest(program, tensors((4, 3), (4, 3), dtype=dtype), exact=False)


def mutated_of_dtype(dtype: torch.dtype) -> Any:
    def program(x, y):
        x.mul_(y)
        x[0].copy_(y[1])
        x.masked_fill_(y == 1, 0)
        return x[1:], y

    return makefunctiontest(program, tensors((4, 3), (4, 3), dtype=dtype))


class DtypeTest(unittest.TestCase):
    test_dtype_changes = makefunctiontest(
        lambda x: (x + 1, x.dtype, x * 2),
        lambda i: (random_tensor((2, 3), ALL_DTYPES[i % len(ALL_DTYPES)]),),
        calls=2 * len(ALL_DTYPES) + 1,
        captures=len(ALL_DTYPES),
    )
    test_dtype_pairs_promote = makefunctiontest(
        lambda x, y: (x + y, x * y, torch.cat([x, y]), torch.result_type(x, y)),
        lambda i: (
            random_tensor((2, 3), ALL_DTYPES[i % 5]),
            random_tensor((2, 3), ALL_DTYPES[(3 * i + 2) % 12]),
        ),
        calls=12,
        captures=13,
    )
    test_module_in_bfloat16 = maketest(
        lambda: nn.Linear(3, 4).bfloat16(), tensors((2, 3), dtype=torch.bfloat16), exact=False
    )
    test_module_in_float64 = maketest(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU()).double(),
        tensors((2, 3), dtype=torch.float64),
        exact=False,
    )
    test_float16_matmul = makefunctiontest(
        lambda x, y: x @ y, tensors((2, 3), (3, 4), dtype=torch.float16), exact=False
    )
    test_float8_round_trip = makefunctiontest(
        lambda x: x.to(torch.float8_e4m3fn).to(torch.float32), tensors((2, 3))
    )
    test_float8_argument = makefunctiontest(
        lambda x: (x.to(torch.float32) * 2, x), tensors((2, 3), dtype=torch.float8_e5m2)
    )
    test_uint16_argument = makefunctiontest(
        lambda x: (x.to(torch.int32) * 2, x.clone()), tensors((2, 3), dtype=torch.uint16)
    )
    test_bool_logic = makefunctiontest(
        lambda x, y: (x & y, x | y, ~x, x ^ y, x.any(), x.all(1)),
        tensors((4, 3), (4, 3), dtype=torch.bool),
    )
    test_integer_arithmetic = makefunctiontest(
        lambda x, y: (x // (y + 1), x % (y + 1), x / (y + 1), x << 2, x >> 1, -x),
        tensors((4, 3), (4, 3), dtype=torch.int32),
    )
    test_uint8_wraps = makefunctiontest(
        lambda x: (x * 100, x - 200, x + 255), tensors((4, 3), dtype=torch.uint8)
    )


for _dtype in ALL_DTYPES:
    _name = str(_dtype).removeprefix("torch.")
    setattr(DtypeTest, f"test_{_name}", of_dtype(_dtype))
    setattr(DtypeTest, f"test_mutated_{_name}", mutated_of_dtype(_dtype))

LAYOUTS = {
    "transposed": lambda: randn(3, 4).t(),
    "permuted": lambda: randn(2, 4, 3).permute(2, 0, 1)[0].t(),
    "strided_rows": lambda: randn(8, 3)[::2],
    "strided_columns": lambda: randn(4, 9)[:, ::3],
    "sliced": lambda: randn(10, 10)[3:7, 4:7],
    "offset": lambda: randn(20)[5:17].view(4, 3),
    "column_of_larger": lambda: randn(4, 3, 5)[..., 2],
    "as_strided": lambda: randn(100).as_strided((4, 3), (7, 2), 3),
    "channels_last": lambda: (
        randn(1, 3, 2, 2).to(memory_format=torch.channels_last)[0].flatten(1).t()
    ),
    "diagonal": lambda: randn(4, 3, 3).diagonal(dim1=1, dim2=2),
    "size_one_with_odd_stride": lambda: randn(4, 3).as_strided((4, 3), (3, 1)),
    "flipped": lambda: randn(4, 3).flip(0),
}  # fmt: skip
READ_ONLY_LAYOUTS = {
    "expanded": lambda: randn(4, 1).expand(4, 3),
    "expanded_scalar": lambda: torch.randn(()).expand(4, 3),
    "overlapping": lambda: randn(6).as_strided((4, 3), (1, 1)),
}


def read(x):
    return x + 1, x.sum(0), x * x.mean(), x.reshape(-1), x.contiguous(), x.t(), x.is_contiguous()


def write(x):
    x.add_(1)
    x[1].mul_(2)
    x[:, 1:].copy_(x[:, :-1].clone())
    x.t()[0].zero_()
    return x.sum(), x[1:]


def write_then_read(x):
    """What the program sees of a strided argument after it wrote to it."""
    x.add_(1)
    return x.reshape(-1), x.stride(), x.storage_offset(), x.is_contiguous(), x * 2, x.t().clone()


class LayoutTest(unittest.TestCase):
    """Strided arguments, read and written, and contiguous ones in turn with them."""

    test_offset_read = makefunctiontest(
        lambda x: x + 1 if x.storage_offset() < 3 else x - 1,
        lambda i: (randn(8)[i : i + 3],),
        captures=None,
    )


for _name, _make in (LAYOUTS | READ_ONLY_LAYOUTS).items():
    setattr(
        LayoutTest,
        f"test_read_{_name}",
        makefunctiontest(read, lambda make=_make: (make(),), exact=False),
    )
    setattr(
        LayoutTest,
        f"test_in_turn_with_contiguous_{_name}",
        makefunctiontest(
            lambda x: (x.is_contiguous(), x.stride(), x * 2, x.t()),
            lambda i, make=_make: (make() if i % 2 else randn(4, 3),),
            calls=4,
            captures=2,
        ),
    )
for _name, _make in LAYOUTS.items():
    setattr(
        LayoutTest,
        f"test_write_{_name}",
        makefunctiontest(write, lambda make=_make: (make(),), exact=False),
    )
    setattr(
        LayoutTest,
        f"test_write_then_read_{_name}",
        makefunctiontest(write_then_read, lambda make=_make: (make(),)),
    )
    setattr(
        LayoutTest,
        f"test_write_in_turn_with_contiguous_{_name}",
        makefunctiontest(
            write,
            lambda i, make=_make: (make() if i % 2 else randn(4, 3),),
            calls=4,
            captures=2,
            exact=False,
        ),
    )
LayoutTest.test_storage_offset_read = makefunctiontest(
    lambda x: (x + x.storage_offset(), x.as_strided((2,), (1,))),
    lambda i: (torch.randn(9)[i % 3 :][:4],),
    calls=5,
    captures=3,
)
LayoutTest.test_detach_in_place_of_views_in_turn = makefunctiontest(
    lambda x: x.detach_() + 1,  # a view raises
    lambda i: (randn(4, 3)[0] if i % 2 else randn(3),),
    calls=4,
)
LayoutTest.test_is_view_read = makefunctiontest(
    lambda x: (x._is_view(), x + 1),
    lambda i: (randn(4, 3)[0] if i % 2 else randn(3),),
    calls=4,
    captures=2,
)
for _name in ("expanded", "expanded_scalar"):
    _make = READ_ONLY_LAYOUTS[_name]
    # "unsupported operation: more than one element of the written-to tensor ..."
    setattr(
        LayoutTest,
        f"test_write_is_refused_{_name}",
        makefunctiontest(lambda x: x.add_(1), lambda make=_make: (make(),)),
    )
    setattr(
        LayoutTest,
        f"test_write_is_refused_later_{_name}",
        makefunctiontest(
            lambda x: x.add_(1),
            lambda i, make=_make: (make() if i % 2 else randn(4, 3),),
            calls=4,
            captures=None,
        ),
    )


def _shared(kind: str) -> tuple[Tensor, Tensor]:
    """Two tensors of shape (4,), related as `kind` says."""
    x = torch.randn(8)
    return {
        "same": lambda: (x[:4],) * 2,
        "equal_views": lambda: (x[:4], x[:4]),
        "overlap": lambda: (x[:4], x[2:6]),
        "overlap_reversed": lambda: (x[2:6], x[:4]),
        "disjoint_of_one": lambda: (x[:4], x[4:]),
        "interleaved": lambda: (x[::2], x[1::2]),
        "separate": lambda: (x[:4].clone(), torch.randn(4)),
    }[kind]()


KINDS = (
    "same", "equal_views", "overlap", "overlap_reversed", "disjoint_of_one", "interleaved",
)  # fmt: skip


def write_first(a, b):
    a.mul_(2)
    return a + b


def write_both(a, b):
    a.mul_(2)
    b.add_(3)
    c = a - b
    a[1:].copy_(b[:-1].clone())
    return c, b.sum()


def write_second_return_first(a, b):
    b.add_(1)
    return a, b[1:]


def only_read(a, b):
    return a + b, a, b[:2]


def compared_by_identity(a, b):
    return a + 1 if a is b else a - b


def accumulated(a, b):
    for _ in range(3):
        a += b * 2  # Not `b` itself: eager refuses operands that overlap in part.
    return a.sum()


class AliasedArgumentsTest(unittest.TestCase):
    """Two arguments that are one tensor or overlap: always, at capture only, or at replay only."""


for _program in (
    write_first,
    write_both,
    write_second_return_first,
    only_read,
    compared_by_identity,
    accumulated,
):
    for _kind in KINDS:
        _name = f"{_program.__name__}_{_kind}"
        setattr(
            AliasedArgumentsTest,
            f"test_always_{_name}",
            makefunctiontest(_program, lambda kind=_kind: _shared(kind), exact=False),
        )
        setattr(
            AliasedArgumentsTest,
            f"test_at_capture_{_name}",
            makefunctiontest(
                _program,
                lambda i, kind=_kind: _shared("separate" if i else kind),
                exact=False,
                captures=2,
            ),
        )
        setattr(
            AliasedArgumentsTest,
            f"test_at_replay_{_name}",
            makefunctiontest(
                _program,
                lambda i, kind=_kind: _shared("separate" if i % 2 == 0 else kind),
                exact=False,
                calls=4,
                captures=2,
            ),
        )


def _mixed_up(a, b, c):
    c.mul_(2)
    a.add_(b * 1)
    return a, b + c


@torch.library.custom_op("torch_lazy_ext_test_inputs::add_twice_", mutates_args=("x",))
def add_twice_(x: Tensor, y: Tensor) -> None:
    x.add_(y).add_(y)


class PartialOverlapTest(unittest.TestCase):
    """Eager refuses operands that overlap in part; functionalized they would go through."""

    test_one_argument = makefunctiontest(lambda x: x[1:].add_(x[:-1]), tensors((4,)))
    test_at_capture = makefunctiontest(
        lambda a, b: a.add_(b), lambda i: _shared("separate" if i else "overlap"), captures=None
    )
    test_at_replay = makefunctiontest(
        lambda a, b: a.add_(b),
        lambda i: _shared("separate" if i % 2 == 0 else "overlap"),
        captures=None,
        calls=4,
    )
    test_intermediate = makefunctiontest(
        lambda x: (lambda y: y[1:].mul_(y[:-1]))(x + 1), tensors((4,))
    )
    test_expanded_intermediate = makefunctiontest(
        lambda x: (x + 1).expand(3, 4).add_(1), tensors((4,))
    )
    # What shares a storage and no memory, and what eager reads before it writes.
    test_every_other = makefunctiontest(lambda x: x[::2].add_(x[1::2]), tensors((8,)))
    test_one_element = makefunctiontest(
        lambda x: x.masked_fill_(x > 0, x[2]).index_fill_(0, torch.tensor([1]), x[0]), tensors((6,))
    )
    test_itself = makefunctiontest(
        lambda x: (x.mul_(x), torch.add(x, x, out=x), x.copy_(x))[2], tensors((2, 3))
    )

    def test_computed_in_the_order_of_a_loop(self):
        for program in (
            lambda x: x.mul_(x[:1].expand(3, 3)),
            lambda x: add_twice_(x[0], x[:, 0]),
            lambda x: x[:1].expand(3, 3).index_put_((torch.tensor([0, 2]),), x[:2] + 1),
        ):
            check_refused(
                lambda p=program: p,
                tensors((3, 3)),
                UnsupportedError,
                r"memory.*test_inputs\.py:\d+.*: clone|test_inputs\.py:\d+.*memory: clone",
            )

    def test_product_into_its_operand(self):
        """Kernels differ: what computes the product before it writes is captured, others refused."""
        for size in (1, 3, 8, 31, 33, 64):
            x = torch.randn(size, size)
            product = x @ x
            like_eager = torch.allclose(torch.mm(x, x, out=x), product, atol=1e-4)
            with self.subTest(size, like_eager=like_eager):
                program = lambda x: torch.mm(x, x, out=x)  # noqa: E731
                if like_eager:
                    check(lambda p=program: p, tensors((size, size)), exact=False)
                else:
                    check_refused(
                        lambda p=program: p,
                        tensors((size, size)),
                        UnsupportedError,
                        r"aten::mm\.out reads memory .*test_inputs\.py:\d+.*: clone the operand",
                    )


class ManyAliasedArgumentsTest(unittest.TestCase):
    """Three and more arguments, some of which share memory: as synthetic bases are for."""

    def _inputs(i: int) -> tuple[Tensor, ...]:
        base = torch.randn(12)
        return {
            0: lambda: (base[:4], base[2:6], base[1:5]),
            1: lambda: (base[:4], base[2:6], torch.randn(4)),
            2: lambda: (base[:4], torch.randn(4), base[:4]),
            3: lambda: (torch.randn(4), base[:4], base[3:7]),
            4: lambda: (base[:4], base.view(3, 4)[1], base.view(3, 4)[0]),
            5: lambda: (torch.randn(4), torch.randn(4), torch.randn(4)),
            6: lambda: (base[:4],) * 3,
        }[i % 7]()

    test_in_turn = makefunctiontest(_mixed_up, _inputs, calls=14, captures=7)
    for _i in range(7):
        locals()[f"test_case_{_i}"] = makefunctiontest(
            _mixed_up, lambda i=None, n=_i, make=_inputs: make(n)
        )
    del _i

    test_two_pairs = makefunctiontest(
        lambda a, b, c, d: (a.add_(1), c.mul_(2), b * 3, d - 1)[2:],
        lambda: (lambda x, y: (x[:4], y[:3], x[2:6], y[1:4]))(torch.randn(8), torch.randn(8)),
    )
    test_two_pairs_crossed_at_replay = makefunctiontest(
        lambda a, b, c, d: (a.add_(b * 1), d.mul_(c * 1), a + c, b - d)[2:],
        lambda i: (lambda x, y: (x[:4], x[2:6], y[:4], y[1:5]) if i % 2 else
                   (x[:4], y[2:6], x[1:5], y[:4]))(torch.randn(8), torch.randn(8)),
        calls=4,
        captures=2,
    )  # fmt: skip
    test_shape_of_an_alias_is_changed = makefunctiontest(
        lambda a, b: (a.t_(), b.add_(1), a * 2)[2],
        lambda: (lambda x: (x.view(2, 3), x))(torch.randn(6)),
    )
    test_result_is_view_of_two_aliases = makefunctiontest(
        lambda a, b: (a.mul_(2), b[1:], a[:2], b.view(2, 2))[1:],
        lambda: (lambda x: (x[:4], x[2:6]))(torch.randn(8)),
    )
    test_one_alias_detached = makefunctiontest(
        lambda a, b: (a.detach().mul_(2), b + 1)[1],
        lambda: (lambda x: (x[:4], x[2:6]))(torch.randn(8)),
    )
    test_base_and_view = makefunctiontest(
        lambda base, view: (base.add_(1), view * 2, view.mul_(3)),
        lambda: (lambda b: (b, b[0]))(torch.randn(2, 3)),
    )
    test_view_and_base = makefunctiontest(
        lambda view, base: (view.add_(1), base.sum()),
        lambda: (lambda b: (b[0], b))(torch.randn(2, 3)),
        exact=False,
    )
    test_transposes = makefunctiontest(
        lambda a, b: (a.add_(b * 1), b.clone()), lambda: (lambda x: (x, x.t()))(torch.randn(3, 3))
    )
    test_other_dtype = makefunctiontest(
        lambda a, b: (a.mul_(2), b + 1),
        lambda: (lambda x: (x, x.view(torch.int32)))(torch.randn(4)),
    )
    test_complex_and_real = makefunctiontest(
        lambda a, b: (b.mul_(2), a + 1),
        lambda: (lambda x: (x, torch.view_as_real(x)))(torch.randn(4, dtype=torch.complex64)),
    )
    test_same_tensor_in_container = makefunctiontest(
        lambda a, d: (a.add_(1), d["x"] * 2), lambda: (lambda x: (x, {"x": x}))(torch.randn(4))
    )
    test_list_of_one_tensor = makefunctiontest(
        lambda xs: [x.add_(1) for x in xs][2] * 2, lambda: ([torch.randn(4)] * 3,)
    )

    def test_argument_is_sometimes_the_parameter(self):
        def make():
            m = _Scaled()
            return lambda own, x: m(m.weight if own else x)

        check(make, lambda i: (bool(i % 2), torch.randn(3)), calls=4, captures=2)

    def test_argument_overlaps_a_buffer(self):
        """The argument of the odd calls lies in the memory of a buffer that is written to."""

        def make():
            m = _Scaled()
            return lambda own, x: m(m.steps[:] if own else x)

        check(make, lambda i: (bool(i % 2), torch.randn(3)), calls=4, captures=2)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x):
        self.steps += x
        return x * self.weight + self.steps


def _requires_grad(i: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, requires_grad=bool(i % 2)),)


class RequiresGradTest(unittest.TestCase):
    """requires_grad of the arguments flips between calls."""

    test_without_grad_mode = makefunctiontest(
        lambda x: (x * 2, x.requires_grad, x), _requires_grad, calls=4, captures=2
    )
    test_with_grad_mode = makefunctiontest(
        lambda x: x * 2, _requires_grad, calls=4, captures=2, grad=True, poke=False
    )
    test_detached_result = makefunctiontest(
        lambda x: x.detach() * 2, _requires_grad, calls=4, captures=2, grad=True
    )
    test_no_grad_inside = makefunctiontest(
        torch.no_grad()(lambda x: x * 2), _requires_grad, calls=4, captures=2, grad=True
    )
    test_branch_on_requires_grad = makefunctiontest(
        lambda x: x.detach() + (1 if x.requires_grad else 2), _requires_grad, calls=4, captures=2,
        grad=True,
    )  # fmt: skip
    test_leaf_in_place_is_refused = makefunctiontest(
        lambda x: x.add_(1), _requires_grad, calls=4, captures=None, grad=True
    )
    test_integer_result = makefunctiontest(
        lambda x: (x.argmax(), x > 0), _requires_grad, calls=4, captures=2, grad=True
    )
    test_requires_grad_set_inside = makefunctiontest(
        lambda x: x.clone().requires_grad_(), tensors((2, 3)), grad=True, poke=False
    )
    test_parameter_argument = makefunctiontest(
        lambda p: (p.detach() * 2, isinstance(p, nn.Parameter)),
        lambda i: (nn.Parameter(torch.randn(2)) if i % 2 else torch.randn(2),),
        calls=4,
        captures=2,
        grad=True,
    )


def failing(program: Any, wrong: Any, right: Any = None) -> Any:
    """Calls that the program rejects, in turn with calls that it takes."""
    right = right or (lambda: (randn(2, 3),))
    return makefunctiontest(
        program, lambda i: wrong() if i % 2 else right(), calls=5, captures=None, exact=False
    )


class ErrorTest(unittest.TestCase):
    """What eager rejects is rejected in the same words, and the next good call works."""

    test_missing_argument = failing(lambda x: x + 1, lambda: ())
    test_extra_argument = failing(lambda x: x + 1, lambda: (randn(2), randn(2)))
    test_unexpected_keyword = failing(lambda x: x + 1, lambda: Call(randn(2), wrong=1))
    test_argument_twice = failing(lambda x: x + 1, lambda: Call(randn(2), x=randn(2)))
    test_positional_for_keyword_only = failing(lambda x, *, k=1: x * k, lambda: (randn(2, 3), 2))
    test_wrong_shape = failing(lambda x: x + torch.ones(3), lambda: (randn(2, 4),))
    test_wrong_shape_matmul = failing(lambda x: x @ torch.ones(3, 2), lambda: (randn(2, 4),))
    test_wrong_rank = failing(lambda x: x.t() + 1, lambda: (randn(2, 3, 4),))
    test_wrong_view = failing(lambda x: x.view(6) + 1, lambda: (randn(2, 4),))
    test_wrong_view_of_strided = failing(lambda x: x.view(6) + 1, lambda: (randn(3, 2).t(),))
    test_wrong_dim = failing(lambda x: x.sum(1), lambda: (randn(3),))
    test_wrong_dtype = failing(lambda x: x @ torch.ones(3, 2), lambda: (randn(2, 3).double(),))
    test_wrong_index = failing(lambda x: x[1] + 1, lambda: (randn(1, 3),))
    test_wrong_type = failing(lambda x: torch.sin(x), lambda: ("text",))
    test_none_for_a_tensor = failing(lambda x: torch.sin(x), lambda: (None,))
    test_string_for_a_tensor = failing(lambda x: x.exp(), lambda: ("text",))
    test_wrong_unpacking = failing(lambda x: (lambda a, b: a + b)(*x), lambda: (randn(3, 3),))
    test_index_out_of_range = makefunctiontest(
        lambda x, i: x[i],
        lambda i: (randn(3), torch.tensor([0, 7 if i % 2 else 2])),
        calls=5,
        captures=None,
    )
    test_embedding_out_of_range = maketest(
        lambda: nn.Embedding(4, 2),
        lambda i: (torch.tensor([0, 9 if i % 2 else 3]),),
        calls=5,
        captures=None,
    )
    test_program_raises_on_value = failing(
        lambda x, k=1: [1][k - 1] * x, lambda: (randn(2), 5), lambda: (randn(2),)
    )
    test_raises_at_extraction = makefunctiontest(lambda x: x @ x, tensors((2, 3)))
    test_missing_argument_at_extraction = makefunctiontest(lambda x, y: x, tensors((2, 3)))
    test_error_after_mutation = makefunctiontest(
        lambda x, y: (x.add_(1), x + y),
        lambda i: (randn(2, 3), randn(2, 4 if i % 2 else 3)),
        calls=5,
        captures=None,
    )
    test_module_wrong_width = maketest(
        lambda: nn.Linear(3, 2),
        lambda i: (randn(2, 4 if i % 2 else 3),),
        calls=5,
        captures=None,
        exact=False,
    )


if __name__ == "__main__":
    unittest.main()
