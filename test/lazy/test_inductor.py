# Owner(s): ["oncall: jit"]

"""What Inductor makes of a graph is what eager computes, and stays in compiled code.

Values are compared with eager's exactly where they cannot depend on rounding: NaN or not, infinities,
signs of zeros, integers.
"""

import unittest
import warnings
from collections.abc import Callable
from typing import Any

import torch
from oracle import check, needs_inductor, tensors
from torch import Tensor
from torch.nn import functional as F

from torch_lazy_ext import CompiledGraph, extract_compiled_graph


def setUpModule() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unittest.addModuleCleanup(torch.set_num_threads, threads)


def check_compiled(
    case: unittest.TestCase, program: Callable[..., Any], inputs: Any, **options: Any
) -> CompiledGraph:
    """`check`, and that one variant answered all calls from native code, without a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = check(lambda: program, inputs, options={"backend": "inductor"}, **options)
    case.assertEqual([str(w.message) for w in caught if "TorchScript" in str(w.message)], [])
    case.assertEqual([s.backend for s in graph.specializations], ["inductor"])
    return graph


# --- operators that the generated code calls through the dispatcher ------------------------------


@needs_inductor
class DispatcherTest(unittest.TestCase):
    """Operators that Inductor has no code and no C function for, with every type of argument."""

    def test_lists_of_integers(self) -> None:
        x = tensors((1, 2, 6, 6))

        def program(x: Tensor) -> list[Tensor]:
            return [
                F.interpolate(x, size=(5, 7), mode="bicubic") + 1,
                F.interpolate(x, size=(5, 7), mode="bicubic", antialias=True),
                F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True) * 2,
                F.interpolate(x, scale_factor=(0.5, 2.0), mode="bicubic"),
                F.interpolate(x, scale_factor=1.5, mode="bilinear", antialias=True),
                F.interpolate(x[0], size=5, mode="nearest-exact"),
                F.interpolate(x, size=[5, 3], mode="area") + x.mean(),
            ]

        check_compiled(self, program, x, exact=False)

    def test_gradients_of_lists_of_integers(self) -> None:
        for antialias in (False, True):

            def program(x: Tensor, antialias: bool = antialias) -> Tensor:
                return F.interpolate(x, size=(5, 7), mode="bicubic", antialias=antialias).sin()

            with self.subTest(antialias=antialias):
                graph = extract_compiled_graph(
                    program, (torch.rand(1, 2, 3, 4, requires_grad=True),), backend="inductor"
                )
                for _ in range(3):
                    x = torch.rand(1, 2, 3, 4, requires_grad=True)
                    expected = torch.autograd.grad(program(x).sum(), x)
                    torch.testing.assert_close(torch.autograd.grad(graph(x).sum(), x), expected)
                self.assertEqual([s.hits for s in graph.specializations], [3])
                self.assertEqual(graph.specializations[0].backend, "inductor")

    def test_other_arguments(self) -> None:
        """Numbers, booleans, dtypes, strings, optional and listed tensors, several results."""

        def program(x: Tensor, y: Tensor) -> list[Any]:
            index, values = torch.searchsorted(y.sort()[0], x, side="right"), x.logcumsumexp(1)
            return [
                index,
                values,
                torch.quantile(x, 0.5, dim=1, interpolation="lower"),
                torch.renorm(x, 2.0, 0, 0.5),
                *torch.frexp(x),
                *torch.linalg.slogdet(y),
                torch.block_diag(x, y),
                torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5]), out_int32=True),
                torch.nn.functional.unfold(x[None, None], (2, 2)),
                torch.polygamma(1, x.abs() + 1),
                torch.linalg.matrix_exp(y),
            ]

        check_compiled(self, program, tensors((4, 4), (4, 4)), exact=False)


# --- sizes that depend on the data ---------------------------------------------------------------


def indexed(i: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(4, 3, 5),
        torch.randint(-3, 3, (2, 2)),
        torch.randint(0, 3, (2,), dtype=torch.int32),
    )


@needs_inductor
class SizesTest(unittest.TestCase):
    """Only operators whose sizes the data decides keep a graph from being compiled."""

    def test_integer_indices(self) -> None:
        def program(x: Tensor, i: Tensor, j: Tensor) -> list[Tensor]:
            y = x.clone()
            y[i, j] = 7.0
            return [
                x[i] * 2,
                x[:, i] + 1,
                x[i, j],
                x[i, :, j],
                x[..., j],
                x[None, j, None],
                x[j][:, j],
                x.take(i),
                y,
            ]

        graph = check_compiled(self, program, indexed)
        self.assertEqual(graph.specializations[0].guards, [])

    def test_gradients_of_integer_indices(self) -> None:
        x, i, j = indexed(0)
        graph = extract_compiled_graph(
            lambda x, i, j: x[i, j] * x[j].sum(), (x.requires_grad_(), i, j), backend="inductor"
        )
        for n in range(3):
            x, i, j = indexed(n)
            x.requires_grad_()
            expected = torch.autograd.grad((x[i, j] * x[j].sum()).sum(), x)
            torch.testing.assert_close(torch.autograd.grad(graph(x, i, j).sum(), x), expected)
        self.assertEqual([s.backend for s in graph.specializations], ["inductor"])

    def test_repeats_of_a_named_size(self) -> None:
        def inputs(i: int) -> tuple[Tensor, Tensor]:
            repeats = torch.tensor([1, 2, 3]).roll(i)
            return torch.randn(3, 2), repeats

        def named(x: Tensor, repeats: Tensor) -> Tensor:
            return torch.repeat_interleave(x, repeats, dim=0, output_size=6) * 2

        check_compiled(self, named, inputs)
        check_compiled(self, lambda x, _repeats: x.repeat_interleave(2, dim=0) + 1, inputs)

    def test_of_the_data(self) -> None:
        """A mask, a count, the distinct values: these stay on TorchScript, and are captured anew
        where the size is another one."""

        def inputs(i: int) -> tuple[Tensor]:
            return (torch.tensor([0, 1, 1, 3 + i // 3]),)

        for name, program in {
            "mask": lambda x: x[x > 0],
            "byte": lambda x: x[(x > 0).to(torch.uint8)],
            "mask_and_index": lambda x: x[None][torch.tensor([0]), x > 0],
            "nonzero": lambda x: x.nonzero(),
            "masked_select": lambda x: x.masked_select(x > 0),
            "unique": lambda x: x.unique(),
            "unique_consecutive": lambda x: x.unique_consecutive(),
            "repeat_interleave": lambda x: x.repeat_interleave(x),
            "bincount": lambda x: x.bincount(),
        }.items():
            with self.subTest(name), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check(
                    lambda program=program: program,
                    inputs,
                    captures=2,
                    options={"backend": "inductor"},
                )
                (reason,) = [str(w.message) for w in caught if "TorchScript" in str(w.message)]
                self.assertIn("sizes that depend on the data", reason)

    def test_an_index_that_is_too_large(self) -> None:
        """Eager's error, at the call and at the extraction; a program may catch it."""

        def caught(x: Tensor, i: Tensor) -> Tensor:
            try:
                return x[i] + 1
            except IndexError:
                return x - 1

        def inputs(i: int) -> tuple[Tensor, Tensor]:
            return torch.randn(3, 2), torch.tensor([0, 9 if i in (0, 2) else 1])

        check(lambda: lambda x, i: x[i] + 1, inputs, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(lambda: caught, inputs, 4, captures=None)


# --- what must never differ ----------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 1e-5, -0.5, 0.7, 1.0, -3.0, 3e38, -3e38, INF, -INF, NAN]


def special_pairs(size: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Any]:
    """Two tensors, which over the calls hold each pair of special values, in vectors and tails."""

    def inputs(i: int) -> tuple[Tensor, Tensor]:
        values = torch.tensor(SPECIAL).to(dtype)
        pairs = torch.cartesian_prod(values, values)
        # A stride without a common divisor: neighbours differ in both, and no pair comes twice.
        pairs = pairs[(torch.arange(len(pairs)) + i * size) * 55 % len(pairs)]
        return pairs[:size, 0].clone(), pairs[:size, 1].clone()

    return inputs


def semantics(t: Tensor) -> Tensor:
    """What rounding does not change: NaN or not, the infinities, zero or not, and signs."""
    if not t.is_floating_point():
        return t
    kind = t.isnan() * 8 + t.isinf() * 4 + (t == 0) * 2
    return torch.where(t.isnan(), kind, kind + t.signbit())


SIZES = (1, 7, 16, 33, len(SPECIAL) ** 2)

# Operators whose own code, decomposition or optimization differed from eager, and some beside them.
POINTWISE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "times_zero": lambda x, y: x * 0 + 1,
    "times_zero_int": lambda x, y: torch.zeros_like(x, dtype=torch.int32) * x,
    "plus_zero": lambda x, y: x + 0.0,
    "plus_negative_zero": lambda x, y: x + -0.0,
    "minus_zero": lambda x, y: x - 0,
    "divided_by_one": lambda x, y: x / 1,
    "minus_itself": lambda x, y: x - x,
    "divided_by_itself": lambda x, y: x / x,
    "negative_difference": lambda x, y: -(x - y),
    "difference_from_zero": lambda x, y: 0.0 - x,
    "neg": lambda x, y: -x,
    "to_the_zero": lambda x, y: x**0,
    "pow": lambda x, y: [x**2, x**3, x**0.5, x**-0.5, x**-1, x**1, x**-2, 2**x, x**y],
    "copysign": lambda x, y: torch.copysign(x, x * 0),
    "sign": lambda x, y: [torch.sign(x), torch.sgn(x), torch.signbit(x * 0), 1 / torch.sign(x)],
    "minimum": lambda x, y: [torch.minimum(x, y), torch.minimum(x * 0, -x * 0)],
    "maximum": lambda x, y: [torch.maximum(x, y), torch.maximum(-x * 0, x * 0)],
    "fmin": lambda x, y: [torch.fmin(x, y), torch.fmax(x, y)],
    "clamp": lambda x, y: [
        x.clamp(0, 1),
        x.clamp(-0.0, 1),
        x.clamp(min=0),
        x.clamp(max=-0.0),
        x.clamp_min(0.0),
        x.clamp_max(0.0),
        x.clamp(-INF, INF),
        x.clamp(2, 1),
        x.clamp(min=NAN),
        x.clamp(y, -y),
        x.clamp(min=y),
    ],
    "relu": lambda x, y: [F.relu(x), F.relu6(x), F.hardtanh(x), F.threshold(x, 0, -0.0)],
    "leaky": lambda x, y: [F.leaky_relu(x), F.elu(x), F.celu(x), F.selu(x), F.softshrink(x)],
    "gelu": lambda x, y: [F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.mish(x)],
    # By another kernel: not one after another in memory.
    "gelu_apart": lambda x, y: [
        F.gelu(torch.stack([x, y], 1)[:, 0]),
        F.gelu(torch.stack([x, y], 1)[:, 1], approximate="tanh"),
        F.gelu(torch.stack([x, y]).t())[:, 0],
        F.gelu(x[0]).expand_as(x),
        F.gelu(x[:1].expand_as(x)) + 0.0,
    ],
    "hard": lambda x, y: [F.hardswish(x), F.hardsigmoid(x), F.hardshrink(x), F.softsign(x)],
    "sigmoid": lambda x, y: [torch.sigmoid(x), torch.tanh(x), F.logsigmoid(x), F.softplus(x)],
    "exponentials": lambda x, y: [x.exp(), x.expm1(), x.exp2(), x.log(), x.log1p(), x.log2()],
    "hyperbolic": lambda x, y: [x.sinh(), x.asinh(), x.atanh(), x.acosh(), x.atan(), x.asin()],
    "floor_divide": lambda x, y: [
        torch.floor_divide(x, 0.7),
        torch.floor_divide(x, y),
        torch.div(x, y, rounding_mode="trunc"),
        x // -0.5,
    ],
    "remainder": lambda x, y: [x % y, x % 0.7, torch.fmod(x, y), torch.fmod(x, -2.0), 3.0 % x],
    "round": lambda x, y: [x.round(), x.floor(), x.ceil(), x.trunc(), x.frac()],
    "quotients": lambda x, y: [x / y, 1 / x, x.reciprocal(), x.rsqrt(), x.sqrt(), y / 0.0],
    "lerp": lambda x, y: [torch.lerp(x, y, 0.3), torch.lerp(x, y, 1.0), torch.lerp(x, y, x)],
    "addcmul": lambda x, y: [torch.addcmul(x, y, x, value=0.5), torch.addcdiv(x, y, x, value=2)],
    "logarithms": lambda x, y: [
        torch.logaddexp(x, y),
        torch.logaddexp2(x, y),
        torch.xlogy(x, y),
        torch.special.xlog1py(x, y),
        torch.logit(x, 0.1),
    ],
    "comparisons": lambda x, y: [x < y, x == y, x.isnan(), x.isinf(), torch.isclose(x, y)],
    "where": lambda x, y: [torch.where(x > y, x, y), x.nan_to_num(), torch.heaviside(x, y)],
    "hypot": lambda x, y: [torch.hypot(x, y), torch.atan2(x, y), torch.nextafter(x, y)],
}


@needs_inductor
class SemanticsTest(unittest.TestCase):
    """All of POINTWISE in one graph for each size and dtype."""

    def check(self, size: int, dtype: torch.dtype) -> None:
        names = [n for n in POINTWISE if dtype is torch.float32 or n not in ("hypot",)]

        def program(x: Tensor, y: Tensor) -> list[list[Tensor]]:
            results = [POINTWISE[name](x, y) for name in names]
            return [r if isinstance(r, list) else [r] for r in results]

        inputs = special_pairs(size, dtype)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = extract_compiled_graph(program, inputs(0), backend="inductor")
            for i in range(-(-SIZES[-1] // size) + 1):
                x, y = inputs(i)
                for name, eager, ours in zip(names, program(x, y), graph(x, y)):
                    for k, (e, o) in enumerate(zip(eager, ours)):
                        self.assertEqual(e.dtype, o.dtype)
                        same = semantics(e) == semantics(o)
                        where = (~same).nonzero().flatten()[:5]
                        self.assertTrue(
                            bool(same.all()),
                            f"{name} {k}, size {size}: {x[where]}, {y[where]}: {e[where]} / "
                            f"{o[where]}",
                        )
        self.assertEqual([str(w.message) for w in caught if "TorchScript" in str(w.message)], [])
        self.assertEqual([s.backend for s in graph.specializations], ["inductor"])

    def test_vectors(self) -> None:
        self.check(SIZES[-1], torch.float32)

    def test_few(self) -> None:
        self.check(7, torch.float32)


if __name__ == "__main__":
    unittest.main()
