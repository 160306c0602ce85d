# Owner(s): ["oncall: jit"]

"""Programs that look at their data: captured whole, replayed while the guess holds, never stale.

Every program comes with the ways its data can lead it. It is captured once and called along four
sequences that switch between the ways, and every call is compared with eager by `oracle.check`.
Each way must have one variant in the end: a guard that asks for too much fails as surely as a
missing one.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import math
import random
import re
import unittest
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from oracle import Call, check, expected_failures, extract_untouched
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torch_lazy_ext import CompiledGraph, ExtractionError, GuardError, extract_compiled_graph

# A function is a program as it is; a class is called for a new one.
Program = Callable[..., Any]
# Fresh arguments that lead a program one way.
Way = Callable[[], tuple[Any, ...]]

# What cannot pass yet: test -> reason. An entry that passes fails its test.
EXPECTED_FAILURES: dict[str, str] = {}


def expected(cls: type) -> type:
    """Mark the tests of `cls` that `EXPECTED_FAILURES` names, as "Class.test"."""
    prefix = f"{cls.__name__}."
    return expected_failures(
        {k.removeprefix(prefix): v for k, v in EXPECTED_FAILURES.items() if k.startswith(prefix)}
    )(cls)


# --------------------------------------------------------------------------- the factory


@dataclasses.dataclass
class Raises:
    """A way that ends in the program's own exception, of exactly this type."""

    exception: type[Exception]
    message: str  # a pattern, searched for
    args: Way


def orders(names: Sequence[str]) -> Iterator[list[str]]:
    """Four sequences over `names`, each of which leaves and comes back to every name."""
    there, back = list(names), list(names)[::-1]
    yield there + back + there
    yield back + there + back
    yield [name for other in there[1:] for name in (there[0], other)] * 2 + there[:1]
    # As a caller's data would: no pattern at all, with every name at least once.
    yield random.Random(len(names)).choices(there, k=3 * len(there)) + back


def new(program: Program) -> Callable[..., Any]:
    """The program to capture; a module is made anew, in eval mode."""
    return program().eval() if isinstance(program, type) else program


def check_ways(program: Program, ways: dict[str, Way | Raises]) -> None:
    """The test's own expectations: what eager does on each way is what its name says."""
    for name, way in ways.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            args = way.args() if isinstance(way, Raises) else way()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    new(program)(*args)
            except Exception as e:
                if not isinstance(way, Raises) or type(e) is not way.exception:
                    raise AssertionError(f"eager raises {e!r} on {name!r}") from e
                if re.search(way.message, str(e)) is None:
                    raise AssertionError(f"eager's {e!r} lacks {way.message!r}") from e
            else:
                if isinstance(way, Raises):
                    raise AssertionError(f"eager raises nothing on {name!r}")


def check_rejected(program: Program, way: Raises, grad: bool) -> None:
    """The extraction on arguments that the program rejects: it changes nothing.

    It raises the program's own exception where the program's Python does; where a kernel would
    have, it may leave that to the first call.
    """
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        graph, error = extract_untouched(new(program), Call(*way.args()))
        if graph is not None:
            try:
                graph(*way.args())
            except Exception as e:
                error = e
    if type(error) is not way.exception or re.search(way.message, str(error)) is None:
        raise AssertionError(f"expected {way.exception.__name__}, got {error!r}") from error


def maketest(
    program: Program,
    *,
    same: Sequence[str] = (),
    counted: bool = True,
    eager: Sequence[str] = (),
    exact: bool = True,
    grad: bool = False,
    between: Callable[[Any, int], object] | None = None,
    **ways: Way | Raises,
) -> Callable[[unittest.TestCase], None]:
    """A test method that calls `program` along four sequences of `ways`.

    Args:
        program: a function without state, or a module class.
        same: prefixes of names: the ways whose names start with one share a variant.
        counted: whether each way has exactly one variant; else their number is not known.
        eager: ways that no graph can go, and that may run eagerly.
        exact: whether results must agree bit for bit.
        grad: the grad mode of all calls.
        between: called on the program before each call, see `oracle.check`.
        ways: by name, functions that make fresh arguments.
    """

    def variant_of(name: str) -> str:
        return next((prefix for prefix in same if name.startswith(prefix)), name)

    def test(self: unittest.TestCase) -> None:
        check_ways(program, ways)
        for order in orders(list(ways)):
            with self.subTest(order=" ".join(order)):
                follow(order)

    def follow(order: list[str]) -> None:
        def inputs(i: int) -> tuple[Any, ...]:
            way = ways[order[max(i, 1) - 1]]
            return way.args() if isinstance(way, Raises) else way()

        while isinstance(ways[order[0]], Raises):
            check_rejected(program, ways[order.pop(0)], grad)
        met = {variant_of(name) for name in order if not isinstance(ways[name], Raises)}
        graph = check(
            lambda: new(program),
            inputs,
            calls=len(order),
            captures=len(met) if counted else None,
            exact=exact,
            grad=grad,
            between=between,
        )
        if counted and len(graph.specializations) != len(met):
            raise AssertionError(f"{len(graph.specializations)} variants, expected {len(met)}")
        served = sum(not isinstance(ways[name], Raises) and name not in eager for name in order)
        hits = sum(s.hits for s in graph.specializations)
        if hits < served:
            # Right results from running the program eagerly are not what is tested here.
            raise AssertionError(f"{served} calls returned, and the graphs served {hits} of them")

    return test


def counting(*values: float, size: int = 3) -> dict[str, Way]:
    """Ways "value_V": a tensor that holds V, and a fresh tensor of `size` random elements."""
    return {f"value_{v}": lambda v=v: (torch.tensor(v), torch.randn(size)) for v in values}


# ------------------------------------------------------------------------------ branches


def if_positive(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x - 1


def if_not(x: Tensor) -> Tensor:
    return x.neg() if not x.any() else x.exp()


def chained_conditions(x: Tensor) -> Tensor:
    # Which guards there are depends on where the evaluation stops.
    if x.min() > 0 or x.max() < 0:
        return x.abs().log()
    if x[0] > 0 and x[1] > 0:
        return x[:2].sqrt()
    return x.square()


def elif_chain(x: Tensor) -> tuple[str, Tensor]:
    level = x.mean()
    if level < -1:
        return "low", x + 1
    elif level < 0:
        return "below", x + 2
    elif 0 <= level < 1:
        return "above", x + 3
    else:
        return "high", x + 4


def nested_branches(x: Tensor, y: Tensor) -> Tensor:
    if x.sum() > 0:
        z = x + y
        if z.sum() > 0:
            return z
        return -z
    if (x * y).sum() > 0:
        return x * y
    return x / (1 + y.abs())


def whole_tensor_predicates(x: Tensor, y: Tensor) -> tuple[Tensor, bool]:
    if torch.equal(x, y):
        return x + 1, True
    if torch.allclose(x, y, atol=0.5):
        return x + 2, torch.is_nonzero(x[0])
    return x + 3, x[1].is_nonzero()


def python_builtins(x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    smaller = min(x.sum(), y.sum())
    ordered = sorted([x[0], y[0], x[1]])
    return smaller * max(x[1], y[1]), ordered


def match_on_value(x: Tensor, y: Tensor) -> Tensor:
    match x.item():
        case 0:
            return y
        case 1 | 2:
            return y + 1
        case n if n > 10:
            return y * 2
        case _:
            return -y


def branch_on_a_function_of_both(x: Tensor, y: Tensor) -> Tensor:
    x, y = (x, y) if x.norm() > y.norm() else (y, x)
    return x - 2 * y


def comprehension(x: Tensor) -> Tensor:
    return torch.stack([row.cumsum(0) for row in x if row.sum() > 0])


@torch.jit.script
def scripted_branch(x: Tensor) -> Tensor:
    if bool(x.sum() > 0):
        return x * 2
    n = 0
    while bool(x.sum() < -1):
        x = x / 2
        n += 1
    return x - n


def scripted(x: Tensor) -> Tensor:
    return scripted_branch(x) + 1


def filled(n: float, size: int = 4) -> Way:
    """One tensor of values just around `n`, closer than 0.05."""
    return lambda: (n + torch.rand(size) / 20,)


def signs(*signs: int) -> Way:
    """One tensor with elements of these signs, between 1 and 2 in size."""
    return lambda: (torch.tensor(signs) * (1 + torch.rand(len(signs))),)


def rows_of_signs(*signs: int) -> Way:
    return lambda: (torch.tensor(signs)[:, None] * (1 + torch.rand(len(signs), 2)),)


@expected
class BranchTest(unittest.TestCase):
    """`if` in all its spellings."""

    test_if = maketest(if_positive, positive=filled(1), negative=filled(-1))
    test_if_not = maketest(if_not, zero=lambda: (torch.zeros(3),), other=filled(2))
    test_and_or = maketest(
        chained_conditions,
        positive=signs(1, 1, 1),
        negative=signs(-1, -1, -1),
        first_two=signs(1, 1, -1),
        first=signs(1, -1, 1),
        last=signs(-1, -1, 1),
    )
    test_elif = maketest(
        elif_chain, low=filled(-3), below=filled(-0.5), above=filled(0.5), high=filled(3)
    )
    test_nested = maketest(
        nested_branches,
        plus_plus=lambda: (1 + torch.rand(3), torch.rand(3)),
        plus_minus=lambda: (torch.rand(3), -1 - torch.rand(3)),
        minus_minus=lambda: (-1 - torch.rand(3), -torch.rand(3)),
        minus_plus=lambda: (-1 - torch.rand(3), torch.rand(3)),
    )
    test_predicates = maketest(
        whole_tensor_predicates,
        equal=lambda: (torch.ones(3), torch.ones(3)),
        close=lambda: (1 + torch.rand(3) / 4, torch.ones(3)),
        far=lambda: (torch.rand(3) + 3, torch.ones(3)),
        far_with_zero=lambda: (torch.tensor([5.0, 0.0, 5.0]), torch.rand(3)),
    )
    test_builtins = maketest(
        python_builtins,
        ascending=lambda: (torch.rand(2) + torch.tensor([1, 3]), torch.rand(2) + 5),
        descending=lambda: (torch.rand(2) + torch.tensor([3, 1]), torch.rand(2) - 5),
    )
    test_match = maketest(match_on_value, **counting(0, 1, 2, 5, 11))
    test_swap = maketest(
        branch_on_a_function_of_both,
        keep=lambda: (torch.rand(3) + 2, torch.rand(3)),
        swap=lambda: (torch.rand(3), torch.rand(3) + 2),
    )
    test_comprehension = maketest(
        comprehension,
        all=rows_of_signs(1, 1, 1),
        first=rows_of_signs(1, -1, -1),
        last=rows_of_signs(-1, -1, 1),
        none=Raises(RuntimeError, "non-empty", rows_of_signs(-1, -1, -1)),
    )
    test_scripted = maketest(
        scripted, positive=filled(1), not_once=filled(-0.1), twice=filled(-0.9), more=filled(-5)
    )


# --------------------------------------------------------------------------------- loops


def halve_while_large(x: Tensor) -> tuple[Tensor, int]:
    steps = 0
    while x.abs().max() > 1:
        x = x / 2
        steps += 1
    return x, steps


def halve_in_place_while_large(x: Tensor) -> Tensor:
    while x.abs().max() > 1:
        x.div_(2)
    return x.sum()


def collatz(n: Tensor, y: Tensor) -> tuple[list[int], Tensor]:
    seen, n = [], n.clone()
    while n != 1:
        seen.append(int(n))
        if n % 2 == 0:
            n //= 2
        else:
            n = 3 * n + 1
    return seen, y * len(seen)


def newton(x: Tensor, scale: Tensor) -> Tensor:
    root = torch.ones_like(x)
    for _ in range(50):
        step = (root - x / root) / 2
        if step.abs().max() < 1e-4:
            break
        root = root - step
    return root * scale


def skip_and_stop(x: Tensor) -> Tensor:
    total = torch.zeros(2)
    for row in x:
        if row[0] < -10:
            break
        if row[0] < 0:
            continue
        total += row
    else:
        total *= 100
    return total


def repeat_n_times(n: Tensor, y: Tensor) -> Tensor:
    for i in range(int(n)):
        y = y * 2 + i
    return y


def nested_loops(lengths: Tensor, y: Tensor) -> Tensor:
    total = y.new_zeros(())
    for i in range(len(lengths)):
        j = 0
        while j < lengths[i]:
            total = total + y[j] * (i + 1)
            j += 1
    return total


def generator(x: Tensor) -> list[Tensor]:
    def positive() -> Iterator[Tensor]:
        while x.sum() > 0:
            yield x.clone()
            x.sub_(1)

    return list(positive())


@expected
class LoopTest(unittest.TestCase):
    """Loops whose number of rounds is in the data."""

    test_while = maketest(
        halve_while_large, **{f"rounds_{n}": filled(0.9 * 2**n) for n in (0, 1, 3, 6)}
    )
    test_while_in_place = maketest(
        halve_in_place_while_large, **{f"rounds_{n}": filled(0.9 * 2**n) for n in (0, 1, 3, 6)}
    )
    test_collatz = maketest(collatz, **counting(1, 2, 6, 7))
    test_until_converged = maketest(
        newton,
        **{
            f"of_{n}": lambda n=n: (torch.full((2,), float(n)), torch.rand(2))
            for n in (1, 4, 100, 1e4)
        },
    )
    test_break_continue_else = maketest(
        skip_and_stop,
        through=rows_of_signs(1, 1, 1),
        skip=rows_of_signs(1, -1, 1),
        stop=rows_of_signs(1, -20, 1),
        skip_and_stop=rows_of_signs(-1, 1, -20),
    )
    test_range = maketest(repeat_n_times, **counting(0, 1, 2, 5))
    test_nested = maketest(
        nested_loops,
        **{
            "_".join(map(str, n)): lambda n=n: (torch.tensor(n), torch.randn(4))
            for n in ((0, 0, 0), (1, 0, 2), (2, 0, 1), (3, 4, 0))
        },
    )
    test_generator = maketest(
        generator, none=filled(-0.5), one=filled(0.5), two=filled(1.5), five=filled(4.5)
    )


# -------------------------------------------------------------------------------- values


def reading(read: Callable[[Tensor], Any]) -> Program:
    """A program that returns what `read` makes of its first argument, and computes beside it."""

    def program(x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        before = y * 2
        return read(x), before + 1

    return program


def holding(*values: Any, dtype: torch.dtype | None = None) -> dict[str, Way]:
    """Ways "holds_V": a tensor made from V, and a fresh one."""
    return {
        f"holds_{v}": lambda v=v: (torch.tensor(v, dtype=dtype), torch.randn(2)) for v in values
    }


# Two neighbours among them: a guard compares bits, not closely.
FLOATS = (1.5, -2.25, 0.1, 0.10000001, 1e30)
INTS = (0, 3, -7, 2**62 + 1)
VECTORS = ([1.5, 2.0], [1.5, -2.0], [0.0, 0.25])
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, torch.finfo(torch.float32).max)


def sign_and_class(x: Tensor) -> tuple[float, bool, bool]:
    value = x.item()
    return math.copysign(1.0, value), math.isnan(value), math.isinf(value)


def read_twice(x: Tensor) -> tuple[float, list[float], float]:
    return x.item(), [x.item(), float(x)], (x + 1).item()


def read_through_a_view(x: Tensor, y: Tensor) -> tuple[float, float, Tensor]:
    row = x[1]
    first = row[0].item()
    x.mul_(2)
    return first, row[0].item(), x + y


def read_before_and_after_a_write(x: Tensor, y: Tensor) -> tuple[list[Any], Tensor]:
    before = x.tolist()
    x[0] = 5
    middle = x.numpy().copy()
    x.copy_(y)
    # Written over: y is no guard here, only what is read of it.
    return [before, middle.tolist(), bool(x[0] > 0)], x.exp()


def read_under_modes(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    with torch.no_grad():
        a = x.item()
    with torch.inference_mode():
        b = x.sum().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = (x * 2).item()
    return a, b, c, y + a


def iterate(x: Tensor, y: Tensor) -> tuple[list[float], Tensor]:
    return [float(v) for v in x], sum(y)


def unpack(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    a, b = x
    return float(a), a * y + b


class Half(nn.Module):
    """Reads a value of its own computation in lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> tuple[float, Tensor]:
        y = self.linear(x.bfloat16())
        return round(y.item()), y.float()


@expected
class ValueTest(unittest.TestCase):
    """A Python value made from a tensor is the value of this call, bit for bit."""

    test_item_float = maketest(reading(Tensor.item), **holding(*FLOATS))
    test_item_double = maketest(reading(Tensor.item), **holding(*FLOATS, dtype=torch.float64))
    test_item_half = maketest(reading(Tensor.item), **holding(*FLOATS[:3], dtype=torch.float16))
    test_item_bfloat16 = maketest(
        reading(Tensor.item), **holding(*FLOATS[:3], dtype=torch.bfloat16)
    )
    test_item_int = maketest(reading(Tensor.item), **holding(*INTS))
    test_item_uint8 = maketest(reading(Tensor.item), **holding(0, 3, 255, dtype=torch.uint8))
    test_item_bool = maketest(reading(Tensor.item), **holding(True, False))
    test_item_complex = maketest(reading(Tensor.item), **holding(1 + 2j, 1 - 2j, 0j))
    test_item_special = maketest(reading(sign_and_class), **holding(*SPECIAL))
    test_item_of_one_element = maketest(reading(Tensor.item), **holding([[1.5]], [[2.5]], [[-1.0]]))
    test_item_of_several = maketest(
        reading(lambda x: (x + 1).item()),
        same=("holds_",),
        **holding(*FLOATS[:2]),
        several=Raises(RuntimeError, "2 elements", lambda: (torch.ones(2), torch.rand(2))),
    )
    test_kind_of_number = maketest(
        reading(lambda x: (isinstance(x.item(), float), isinstance(x.item(), (int, bool)))),
        same=("holds_",),
        **holding(*FLOATS[:2]),
    )
    test_float = maketest(reading(float), **holding(*FLOATS, 3, True))
    test_int = maketest(reading(int), **holding(0.5, -2.5, 3.5))
    test_int_of_int = maketest(reading(int), **holding(*INTS))
    test_int_of_nan = maketest(
        reading(int),
        **holding(0.5, 2.5),
        nan=Raises(ValueError, "NaN", lambda: (torch.tensor(math.nan), torch.rand(2))),
    )
    test_bool = maketest(reading(bool), **holding(0.0, 1.0))
    test_bool_of_several = maketest(
        reading(bool),
        **holding(0.0, 1.0),
        several=Raises(RuntimeError, "ambiguous", lambda: (torch.ones(2), torch.rand(2))),
    )
    test_complex = maketest(reading(complex), **holding(1 + 2j, 1 - 2j, 0j))
    test_index = maketest(reading(lambda n: [10, 20, 30][n]), **holding(0, 1, 2))
    test_slice_bounds = maketest(reading(lambda n: list(range(9))[n : n + 2]), **holding(0, 1, 5))
    test_range = maketest(reading(lambda n: list(range(n))), **holding(0, 1, 5))
    test_math = maketest(
        reading(lambda x: (math.sqrt(x), math.floor(x))), **holding(4.0, 2.5, 0.25)
    )
    test_round = maketest(reading(lambda x: round(x.item(), 1)), **holding(1.25, 2.5, 0.26))
    test_tolist = maketest(reading(lambda x: x.tolist()), **holding(*VECTORS))
    test_tolist_nested = maketest(
        reading(lambda x: x.tolist()),
        **holding([[1, 2], [3, 4]], [[1, 2], [3, 5]], [[0, 0], [0, 0]]),
    )
    test_tolist_scalar = maketest(reading(lambda x: x.tolist()), **holding(*INTS))
    test_tolist_special = maketest(
        reading(lambda x: repr(x.tolist())),
        **holding(*([v, math.nan] for v in SPECIAL)),
    )
    test_tolist_of_nothing = maketest(
        reading(lambda x: x.tolist()),
        empty=lambda: (torch.zeros(0), torch.rand(2)),
        **holding(*VECTORS),
    )
    # As programs hold them that were imported before anything was captured.
    test_tolist_by_reference = maketest(reading(Tensor.tolist), **holding(*VECTORS))
    test_numpy_by_reference = maketest(
        reading(functools.partial(lambda numpy, x: numpy(x * 2).tolist(), Tensor.numpy)),
        **holding(*VECTORS),
    )
    test_numpy = maketest(reading(lambda x: x.numpy().sum().item()), **holding(*VECTORS))
    test_numpy_options = maketest(
        reading(lambda x: x.detach().cpu().numpy(force=True).tolist()), **holding(*VECTORS)
    )
    test_numpy_array = maketest(reading(lambda x: np.asarray(x).tolist()), **holding(*VECTORS))
    test_numpy_dtype = maketest(
        reading(lambda x: np.array(x, dtype=np.int64).tolist()), **holding(*VECTORS)
    )
    test_numpy_functions = maketest(
        reading(lambda x: (float(np.max(x.numpy())), float(np.linalg.norm(x)))), **holding(*VECTORS)
    )
    test_numpy_and_back = maketest(
        reading(lambda x: torch.from_numpy(x.numpy() * 2) + x), **holding(*VECTORS)
    )
    test_twice = maketest(reading(read_twice), **holding(*FLOATS))
    test_view = maketest(
        read_through_a_view,
        same=("holds_",),
        **{
            f"holds_{v}": lambda v=v: (torch.tensor([[0.5], [v]]), torch.randn(2, 1))
            for v in FLOATS
        },
    )
    test_before_and_after_a_write = maketest(
        read_before_and_after_a_write,
        **{
            f"{a}_{sign}": lambda a=a, sign=sign: (torch.tensor([a, 1.0]), sign * torch.rand(2))
            for a in (1.5, 2.5)
            for sign in (1, -1)
        },
    )
    test_modes = maketest(read_under_modes, same=("holds_",), **holding(*FLOATS))
    test_iteration = maketest(iterate, **holding(*VECTORS))
    test_unpacking = maketest(
        unpack,
        **holding(*VECTORS[:2]),
        # The second element is not read: a guard on all of x would ask too much.
        same=("holds_[1.5",),
        other=lambda: (torch.tensor([9.0, 1.0]), torch.randn(2)),
    )
    test_bfloat16_layer = maketest(
        Half,
        counted=False,
        **{f"ways_{n}": lambda n=n: (torch.full((2,), float(n)),) for n in (0, 5, 50)},
    )
    test_with_requires_grad = maketest(
        reading(lambda x: (x.detach().item(), (x * 2).tolist(), float(x.detach()))),
        grad=True,
        **{
            f"holds_{v}": lambda v=v: (torch.tensor(v, requires_grad=True), torch.randn(2))
            for v in FLOATS
        },
    )


# ------------------------------------------------------------------- formatting and printing


def report(x: Tensor) -> str:
    low, high = x.aminmax()
    return f"mean {x.mean():.3f}, from {low.item():>8.2f} to {high:g}, all {x}, {x!r}, {x.shape}"


def text_of_options(x: Tensor) -> str:
    with torch._tensor_str.printoptions(precision=2, sci_mode=False):
        return str(x / 3)


def printed(x: Tensor) -> str:
    out = io.StringIO()
    print("x is", x, file=out)
    print(x.sum(), x.tolist(), sep=", ", end="", file=out)
    return out.getvalue()


@expected
class TextTest(unittest.TestCase):
    """Text made from a tensor shows this call's values."""

    test_f_string = maketest(reading(lambda x: f"{x}"), **holding(*FLOATS, *VECTORS, 3, True))
    test_format_spec = maketest(reading(lambda x: f"{x:.2f}|{x:8.1e}"), **holding(*FLOATS))
    test_format_spec_int = maketest(reading(lambda x: f"{x:05d}|{x:x}"), **holding(0, 3, 255))
    test_format_method = maketest(reading("{0:.1f} {0}".format), **holding(*FLOATS))
    test_percent = maketest(reading(lambda x: "%.2f %s" % (x, x)), **holding(*FLOATS))  # noqa: UP031
    test_repr = maketest(reading(repr), **holding(*FLOATS, *VECTORS, 1 + 2j, [[1, 2]]))
    test_str = maketest(reading(str), **holding(*FLOATS, *VECTORS))
    test_repr_of_a_result = maketest(reading(lambda x: repr(x * 2 + 1)), **holding(*VECTORS))
    test_repr_of_a_container = maketest(
        reading(lambda x: repr({"x": x, "list": [x.sum(), (x > 1,)]})), **holding(*VECTORS)
    )
    test_repr_of_dtypes = maketest(
        reading(lambda x: [repr(x.to(d)) for d in (torch.float64, torch.int8, torch.bfloat16)]),
        **holding(*VECTORS),
    )
    test_repr_large = maketest(
        reading(repr),
        **{
            f"from_{n}": lambda n=n: (torch.arange(n, n + 2000.0), torch.randn(2)) for n in range(3)
        },
    )
    test_report = maketest(reading(report), **holding(*VECTORS))
    test_print_options = maketest(reading(text_of_options), **holding(*VECTORS))
    test_print_to_file = maketest(reading(printed), **holding(*VECTORS))
    test_repr_with_grad = maketest(
        reading(lambda x: (repr(x), repr(x.detach()), repr(x * 2), str(x.sum() + 1))),
        grad=True,
        **{
            f"holds_{v}": lambda v=v: (torch.tensor(v, requires_grad=True), torch.randn(2))
            for v in VECTORS
        },
    )
    test_repr_of_a_parameter = maketest(
        reading(lambda x: repr(nn.Parameter(x, requires_grad=False))), **holding(*VECTORS)
    )

    def test_print_to_stdout(self) -> None:
        """What a capture prints is what eager prints; a replay runs no Python, and so no print."""

        def program(x: Tensor) -> Tensor:
            print("mean:", x.mean(), f"{x[0]:.1f}")
            return x + 1

        graph = None
        for value in (1.0, 2.0, 1.0, 3.0, 2.0, 1.0):
            x, eager, captured = torch.full((2,), value), io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(eager):
                want = program(x)
            with contextlib.redirect_stdout(captured):
                if graph is None:
                    graph = extract_compiled_graph(program, (x,))
                variants = len(graph.specializations)
                got = graph(x)
            new_variant = len(graph.specializations) > variants
            self.assertTrue(torch.equal(want, got))
            if new_variant or captured.getvalue():
                self.assertEqual(captured.getvalue(), eager.getvalue())
        self.assertEqual(len(graph.specializations), 3)

    def test_print_to_stdout_is_not_hidden(self) -> None:
        captured = io.StringIO()
        with contextlib.redirect_stdout(captured):
            extract_compiled_graph(lambda x: (print(x.tolist()), x)[1], (torch.ones(2),))
        self.assertEqual(captured.getvalue(), "[1.0, 1.0]\n")


# --------------------------------------------------------------- values used for something


def sizes_of_factories(n: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    n = int(n)
    return (
        torch.zeros(n, 2) + y,
        torch.arange(n),
        torch.full((n,), n, dtype=torch.int32),
        torch.linspace(0, 1, steps=n),
        torch.eye(n, 2) * y,
        y.new_ones(n, 2),
        torch.empty(n).fill_(n),
    )


def sizes_of_random_factories(n: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn(int(n), 2) + y, torch.randperm(n.item() + 1)


def sizes_of_views(n: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    n = n.item()
    return (
        y[:n],
        y[n:],
        y.narrow(0, 1, n),
        y.view(n, -1).sum(1),
        y.unfold(0, n, 1),
        y.as_strided((n,), (2,)) + 1,
        y[None].expand(n, -1),
    )


def sizes_of_operators(n: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    n = n.item()
    return (
        y.repeat(n),
        y.topk(n).values,
        F.pad(y, (n, 0)),
        torch.stack([y] * n),
        y.reshape(4, 3).split([n, 4 - n])[0],
        y.roll(n),
        y.cumsum(0)[::n],
    )


def split_by_lengths(lengths: Tensor, y: Tensor) -> list[Tensor]:
    return [part.sum() for part in y.split(lengths.tolist())]


def largest_class(labels: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(labels, int(labels.max()) + 1) * y


def sequence_mask(lengths: Tensor, y: Tensor) -> Tensor:
    mask = torch.arange(lengths.max()) < lengths[:, None]
    return mask * y[: mask.shape[1]]


@expected
class SizeTest(unittest.TestCase):
    """Values as sizes."""

    test_factories = maketest(sizes_of_factories, **counting(0, 1, 2, 5, size=2))
    test_random_factories = maketest(sizes_of_random_factories, **counting(0, 1, 2, 5, size=2))
    test_views = maketest(sizes_of_views, **counting(1, 2, 3, 4, size=12))
    test_operators = maketest(sizes_of_operators, **counting(1, 2, 3, size=12))
    test_split = maketest(
        split_by_lengths,
        **{
            "_".join(map(str, n)): lambda n=n: (torch.tensor(n), torch.randn(6))
            for n in ((1, 2, 3), (3, 2, 1), (0, 6), (6,))
        },
        wrong=Raises(
            RuntimeError, "split_with_sizes", lambda: (torch.tensor((1, 2)), torch.rand(6))
        ),
    )
    test_number_of_classes = maketest(
        largest_class,
        same=("three", "four"),
        three=lambda: (torch.tensor([0, 2, 1]), torch.randn(3, 1)),
        three_again=lambda: (torch.tensor([2, 0, 2]), torch.randn(3, 1)),
        four=lambda: (torch.tensor([0, 3, 1]), torch.randn(3, 1)),
        four_again=lambda: (torch.tensor([3, 0, 0]), torch.randn(3, 1)),
        one=lambda: (torch.tensor([0, 0, 0]), torch.randn(3, 1)),
    )
    test_sequence_mask = maketest(
        sequence_mask,
        same=("two", "four"),
        two=lambda: (torch.tensor([1, 2]), torch.randn(4)),
        two_again=lambda: (torch.tensor([2, 0]), torch.randn(4)),
        four=lambda: (torch.tensor([4, 1]), torch.randn(4)),
        four_again=lambda: (torch.tensor([2, 4]), torch.randn(4)),
    )


def index_with_number(n: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    y[n.item()] = 9
    return y[n.item() - 1], y[: n.item()].sum()


def index_with_tensor(n: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # A 0-dim integer index selects; what Python sees is a view, as with a number.
    row = y[n]
    row += 1
    return row, y


def delete_row(n: Tensor, y: Tensor) -> Tensor:
    n = int(n)
    return torch.cat([y[:n], y[n + 1 :]])


def write_cache(position: Tensor, y: Tensor) -> Tensor:
    cache = torch.zeros(4, 3)
    cache[position : position + 1] = y
    return cache[: position + 1]


def dot_dot_dot(n: Tensor, y: Tensor) -> Tensor:
    return y[..., n, None] + y[n, ...]


OUT_OF_RANGE = Raises(IndexError, "out of (range|bounds)", lambda: (torch.tensor(8), torch.rand(3)))


@expected
class IndexTest(unittest.TestCase):
    """Values as indices."""

    test_number = maketest(index_with_number, **counting(0, 1, 2), out=OUT_OF_RANGE)
    test_tensor = maketest(
        index_with_tensor,
        **{f"row_{n}": lambda n=n: (torch.tensor(n), torch.randn(3, 2)) for n in (0, 1, 2, -1)},
        out=OUT_OF_RANGE,
    )
    test_slices = maketest(delete_row, **counting(0, 1, 2, size=4))
    test_slice_assignment = maketest(write_cache, **counting(0, 1, 2, 3))
    test_mixed = maketest(
        dot_dot_dot,
        **{f"at_{n}": lambda n=n: (torch.tensor(n), torch.randn(3, 3)) for n in (0, 1, 2)},
    )


def arithmetic(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    n = x.item()
    return y * n, y + n, n - y, y / (n + 10), y**2 * math.exp(-abs(n)), torch.add(y, y, alpha=n)


def scalar_arguments(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    n = x.item()
    return (
        y.clamp(max=n),
        torch.full_like(y, n),
        F.threshold(y, n, 0.0),
        torch.where(y > n, y, n),
        y.masked_fill(y > 0, n),
        F.dropout(y, 0.5, training=n > 0),
    )


def dtype_of_result(x: Tensor, y: Tensor) -> Tensor:
    # A Python number takes part in type promotion as a number, not as a tensor.
    return torch.arange(3) * x.item() + (1 if y.sum() > 1000 else 0)


def big_integers(x: Tensor, y: Tensor) -> tuple[int, Tensor]:
    n = x.item() ** 3 + 1
    return n, y * (n % 7)


def back_to_tensors(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        torch.tensor(x.item()) + y,
        torch.tensor([x.item(), 2.0, -1.0]) * y,
        torch.as_tensor(x.tolist()) - y,
        torch.tensor([float(x), *y.shape]).sum(),
        torch.scalar_tensor(x.item()),
    )


def tensors_in_a_list(x: Tensor, y: Tensor) -> Tensor:
    # Reads the elements one by one, below Python.
    return torch.tensor([x, x + 1, 5.0]) * y


def rescale_if_large(x: Tensor, y: Tensor) -> Tensor:
    scale = min(1.0, 2.0 / (x.norm().item() + 1e-6))
    return y * scale


@expected
class ArithmeticTest(unittest.TestCase):
    """Values in arithmetic, as scalar arguments, and made into tensors again."""

    test_scalars = maketest(arithmetic, **counting(*FLOATS[:4]))
    test_integers = maketest(arithmetic, **counting(0, 1, -3))
    test_scalar_arguments = maketest(
        scalar_arguments,
        same=("value_-",),  # what is not positive
        **counting(0.5, -0.5, -0.0),
        **{"value_-_or_0": lambda: (torch.tensor(0.0), torch.randn(3))},
    )
    test_type_promotion = maketest(dtype_of_result, **counting(2, 2.0, True, 1))
    test_big_integers = maketest(big_integers, **counting(2, 10**9, -5))
    test_back_to_tensors = maketest(back_to_tensors, **counting(1.5, -2.0, 0.1))
    test_tensors_in_a_list = maketest(tensors_in_a_list, **counting(1.5, -2.0, 0.1))
    test_clipping = maketest(
        rescale_if_large,
        same=("of_1",),  # what is at least 1 is another number, and the same operators
        **{f"of_{n}": lambda n=n: (torch.full((4,), n), torch.randn(3)) for n in (0.1, 1.0, 10.0)},
    )


class Token(NamedTuple):
    id: int
    score: Tensor


@dataclasses.dataclass
class Hypothesis:
    length: int
    tokens: list[int]


class ByName(nn.Module):
    """Chooses one of its parts by a number in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.table = nn.ParameterDict({"a": torch.ones(3), "b": torch.full((3,), 2.0)})
        self.names = {0: "a", 1: "b", 2: "a"}

    def forward(self, n: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        name = self.names[n.item()]
        return self.parts[n](y), {name: self.table[name] + y}


def containers(x: Tensor, y: Tensor) -> dict[Any, Any]:
    counts = collections.Counter(x.tolist())
    first = {value: i for i, value in reversed(list(enumerate(x.tolist())))}
    ordered = sorted(range(len(x)), key=lambda i: (-x[i].item(), i))
    return {
        "counts": dict(counts),
        "first": first,
        "distinct": sorted(set(x.tolist())),
        "ordered": y[ordered],
        "token": Token(int(x[0]), y[0] * 2),
        **{f"y{i}": y[int(i)] for i in x},
    }


def returned_object(x: Tensor, y: Tensor) -> tuple[Token, list[Any]]:
    return Token(int(x), y + 1), [x.item(), {"double": x.item() * 2, "text": "ab" * int(x)}]


def membership(x: Tensor, y: Tensor) -> tuple[bool, Tensor]:
    return x in (1, 2), y + 1 if x.item() in {1: "one"} else y - 1


def queue(x: Tensor, y: Tensor) -> Tensor:
    """Dijkstra's order over the weights in x, with a priority queue of Python floats."""
    import heapq

    heap: list[tuple[float, int]] = []
    for i, weight in enumerate(x):
        heapq.heappush(heap, (weight.item(), i))
    return y[[heapq.heappop(heap)[1] for _ in range(len(heap))]]


@expected
class QuestionTest(unittest.TestCase):
    """Whether a number is finite is asked for at each call, and only the answer is guarded."""

    def check(self, program: Callable[[Tensor], Any], captures: int = 3) -> None:
        graph = extract_compiled_graph(program, (torch.ones(2),))
        for value in (1.0, 2.5, -3.0, math.inf, 4.0, math.nan, -0.0, -math.inf, math.nan):
            x = torch.tensor([value, 1.0])
            self.assertEqual(str(graph(x)), str(program(x)))
        self.assertLessEqual(len(graph.specializations), captures)

    def test_of_math(self) -> None:
        self.check(lambda x: x * 2 if math.isfinite(x.sum().item()) else x)
        self.check(lambda x: (x * 2, math.isinf(x[0].item()), math.isnan(x[0].item())))

    def test_of_a_tensor(self) -> None:
        self.check(lambda x: x * 2 if math.isnan(x.sum()) else x)
        with self.assertRaises(Exception) as eager:
            math.isnan(torch.ones(2))
        with self.assertRaises(type(eager.exception)) as ours:
            extract_compiled_graph(lambda x: math.isnan(x), (torch.ones(2),))
        self.assertEqual(str(ours.exception), str(eager.exception))

    def test_of_numpy(self) -> None:
        self.check(lambda x: x * 2 if np.isfinite(x.sum().item()) else x)
        self.check(lambda x: (x * 2, np.isnan(x[0].item()), np.isinf(x[0].item())))

    def test_held_elsewhere(self) -> None:
        from math import isfinite

        held = [isfinite]
        self.check(lambda x: x * 2 if isfinite(x.sum().item()) else x)
        self.check(lambda x: x * 2 if held[0](x.sum().item()) else x)
        self.check(lambda x, ask=isfinite: x * 2 if ask(x.sum().item()) else x)
        self.assertIs(held[0], math.isfinite)

    def test_of_other_values(self) -> None:
        self.check(lambda x: (x, math.isfinite(3), math.isnan(math.inf), math.isinf(10**30)))
        with self.assertRaisesRegex(TypeError, "must be real number, not str"):
            extract_compiled_graph(lambda x: math.isnan("a"), (torch.ones(2),))

    def test_of_a_computed_number(self) -> None:
        def program(x: Tensor) -> Any:
            loss = x.mean().item() * 3 - 1
            return (x / loss, "fine") if math.isfinite(loss) and loss > 0 else (x, "skipped")

        self.check(program, 4)


class ContainerTest(unittest.TestCase):
    """Values in Python containers, as keys, and as results."""

    test_module_list = maketest(
        ByName,
        **counting(0, 1, 2),
        missing=Raises(KeyError, "7", lambda: (torch.tensor(7), torch.rand(3))),
    )
    test_containers = maketest(
        containers,
        **{
            "_".join(map(str, n)): lambda n=n: (torch.tensor(n), torch.randn(3))
            for n in ((0, 1, 2), (2, 1, 0), (1, 1, 1), (0, 2, 0))
        },
    )
    test_returned = maketest(returned_object, **counting(0, 1, 3))
    test_membership = maketest(membership, **counting(0, 1, 2, 3))
    test_priority_queue = maketest(
        queue,
        **{
            "_".join(map(str, n)): lambda n=n: (torch.tensor(n), torch.randn(3))
            for n in ((0.5, 1.0, 2.0), (2.0, 1.0, 0.5), (1.0, 1.0, 0.0))
        },
    )


# ------------------------------------------------------------------------ checks on data


class TooLarge(Exception):
    """An exception that only the program knows."""

    def __init__(self, value: float) -> None:
        super().__init__(f"{value:.1f} is too large")
        self.value = value


def assert_positive(x: Tensor) -> Tensor:
    assert (x > 0).all(), "x must be positive"
    return x.log()


def assert_with_values(x: Tensor) -> Tensor:
    assert x.max() < 2, f"largest is {x.max().round()}, of {x.round().tolist()}"
    return x + 1


def assert_after_mutation(x: Tensor) -> Tensor:
    x.mul_(2)
    assert x.sum() > 0, "no longer positive"
    return x.sub_(1)


def assert_after_randomness(x: Tensor) -> Tensor:
    noise = torch.rand_like(x)
    assert x.sum() > 0, "not positive"
    return noise + torch.rand(3)


class CountsCalls(nn.Module):
    """Counts a call before it may refuse it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("served", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.max() > 2:
            raise TooLarge(x.max().round().item())
        self.served += 1
        return x * 2


def torch_assert(x: Tensor) -> Tensor:
    torch._assert(bool((x > 0).all()), "x must be positive")
    torch._assert_async((x < 100).all(), "x must be small")
    return x.sqrt()


def try_except(x: Tensor) -> tuple[str, Tensor]:
    try:
        if x.sum() < 0:
            raise TooLarge(-1.0)
        y = x + 1
    except TooLarge as e:
        return str(e), x
    finally:
        x.zero_()
    return "fine", y


def try_operator(x: Tensor) -> tuple[str, Tensor]:
    try:
        return "factor", torch.linalg.cholesky(x)
    except torch.linalg.LinAlgError:
        return "eigenvalues", torch.linalg.eigvalsh(x)


def try_out_of_range(index: Tensor, table: Tensor) -> tuple[str, Tensor]:
    try:
        # The kernel finds out, not the capture.
        return "inside", F.embedding(index, table)
    except IndexError:
        return "outside", table


def try_number(x: Tensor) -> int:
    try:
        return int(x)
    except (ValueError, OverflowError) as e:
        return -len(str(e))


def warn_on_nan(x: Tensor) -> Tensor:
    if x.isnan().any():
        warnings.warn("nan on the way", stacklevel=2)
        x = x.nan_to_num()
    return x * 2


def embed(index: Tensor, table: Tensor) -> Tensor:
    return F.embedding(index, table)


def gather(index: Tensor, table: Tensor) -> Tensor:
    return table.gather(0, index[:, None])


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def integer_division(a: Tensor, b: Tensor) -> Tensor:
    return a // b


def one_hot(labels: Tensor, scale: Tensor) -> Tensor:
    return F.one_hot(labels, 4) * scale


def sample(weights: Tensor, y: Tensor) -> Tensor:
    return torch.multinomial(weights, 2) + y


def log_prob(scale: Tensor, y: Tensor) -> Tensor:
    # The distribution checks its own parameters, and then the value.
    return torch.distributions.Normal(torch.zeros(2), scale).log_prob(y)


def indices(*values: int) -> Way:
    return lambda: (torch.tensor(values), torch.rand(4, 4))


def vectors(*values: float, size: int = 2) -> Way:
    return lambda: (torch.tensor(values), torch.rand(size))


@expected
class RaisingTest(unittest.TestCase):
    """The program's own exceptions come out, with what the program did before them."""

    test_assert = maketest(
        assert_positive,
        good=filled(1),
        bad=Raises(AssertionError, "^x must be positive$", filled(-1)),
        nan=Raises(AssertionError, "positive", lambda: (torch.full((4,), math.nan),)),
    )
    test_assert_message = maketest(
        assert_with_values,
        good=filled(1),
        three=Raises(AssertionError, r"^largest is 3.0, of \[3.0, ", filled(3)),
        five=Raises(AssertionError, r"^largest is 5.0, of \[5.0, ", filled(5)),
    )
    test_assert_after_mutation = maketest(
        assert_after_mutation,
        good=filled(1),
        bad=Raises(AssertionError, "no longer", filled(-1)),
    )
    test_assert_after_randomness = maketest(
        assert_after_randomness,
        good=filled(1, size=3),
        bad=Raises(AssertionError, "not", filled(-1, size=3)),
    )
    test_own_exception = maketest(
        CountsCalls,
        good=filled(1),
        four=Raises(TooLarge, "^4.0 is too large", filled(4)),
        five=Raises(TooLarge, "^5.0 is too large", filled(5)),
    )
    test_torch_assert = maketest(
        torch_assert,
        good=filled(1),
        bad=Raises(AssertionError, "^x must be positive$", filled(-1)),
        large=Raises(RuntimeError, "x must be small", filled(1000)),
    )
    test_caught = maketest(try_except, fine=filled(1), caught=filled(-1))
    test_caught_operator = maketest(
        try_operator,
        exact=False,
        definite=lambda: (torch.eye(3) + torch.rand(()) * torch.ones(3, 3),),
        indefinite=lambda: (torch.rand(()) * torch.ones(3, 3) - torch.eye(3),),
    )
    test_caught_kernel = maketest(
        try_out_of_range,
        counted=False,
        eager=("outside",),
        inside=indices(0, 3),
        outside=indices(1, 4),
    )
    test_caught_conversion = maketest(
        try_number,
        number=lambda: (torch.tensor(2.5),),
        nan=lambda: (torch.tensor(math.nan),),
        infinite=lambda: (torch.tensor(math.inf),),
    )
    test_embedding = maketest(
        embed,
        same=("in",),
        inside=indices(0, 3),
        inside_again=indices(2, 1),
        outside=Raises(IndexError, "out of range", indices(1, 4)),
    )
    test_gather = maketest(
        gather,
        same=("in",),
        inside=indices(0, 3),
        inside_again=indices(2, 1),
        outside=Raises(RuntimeError, "out of bounds", indices(1, 4)),
    )
    test_advanced_index = maketest(
        lambda index, table: table[index],
        same=("in",),
        inside=indices(0, 3),
        inside_again=indices(-2, 1),
        outside=Raises(IndexError, "out of bounds", indices(1, 4)),
    )
    test_cross_entropy = maketest(
        cross_entropy,
        same=("in",),
        inside=indices(0, 3, 1, 1),
        inside_again=indices(2, 1, 0, 3),
        inside_ignored=indices(0, 3, 1, -100),
        outside=Raises(IndexError, "out of bounds", indices(0, 0, 0, 4)),
    )
    test_integer_division = maketest(
        integer_division,
        same=("by",),
        by_two=lambda: (torch.randint(0, 9, (3,)), torch.tensor([2, 2, 2])),
        by_some=lambda: (torch.randint(0, 9, (3,)), torch.tensor([1, -2, 3])),
        zero=Raises(
            RuntimeError,
            "ZeroDivisionError",
            lambda: (torch.randint(0, 9, (3,)), torch.tensor([1, 0, 2])),
        ),
    )
    test_one_hot = maketest(
        one_hot,
        same=("in",),
        inside=indices(0, 3, 0, 1),
        inside_again=indices(3, 0, 2, 2),
        negative=Raises(RuntimeError, "non-negative", indices(0, 3, -1, 1)),
        outside=Raises(RuntimeError, "smaller than num_classes", indices(0, 4, 0, 1)),
    )
    test_multinomial = maketest(
        sample,
        same=("good",),
        good=vectors(0.5, 0.5, 0.0),
        good_again=vectors(1.0, 0.0, 2.0),
        negative=Raises(RuntimeError, "element < 0", vectors(0.5, -1.0, 1.0)),
        zeros=Raises(RuntimeError, "sum of probabilities <= 0", vectors(0.0, 0.0, 0.0)),
    )
    test_distribution = maketest(
        log_prob,
        same=("good",),
        good=vectors(1.0, 2.0),
        good_again=vectors(0.1, 3.0),
        negative=Raises(ValueError, "parameter scale", vectors(1.0, -1.0)),
    )

    def test_warning(self) -> None:
        """A warning is the program's own too: it comes with every capture and eager call."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            graph = extract_compiled_graph(warn_on_nan, (torch.ones(2),))
        for value in (1.0, math.nan, 2.0, math.nan):
            x = torch.full((2,), value)
            with warnings.catch_warnings(record=True):
                warnings.simplefilter("always")
                self.assertTrue(torch.equal(graph(x), torch.full((2,), value).nan_to_num() * 2))
        self.assertEqual(len(graph.specializations), 2)


def inverse(a: Tensor) -> Tensor:
    return torch.linalg.inv(a) @ a


def lu(a: Tensor) -> tuple[Tensor, Tensor]:
    factors, pivots = torch.linalg.lu_factor(a)
    return torch.linalg.lu_solve(factors, pivots, a), pivots


def ldl(a: Tensor) -> Tensor:
    return torch.linalg.ldl_factor(a + a.mT).LD


def inverse_ex(a: Tensor) -> tuple[Tensor, Tensor]:
    # Reports instead of raising: no guard, one variant for all.
    inverse, info = torch.linalg.inv_ex(a)
    return torch.where(info == 0, inverse, torch.zeros(())), info


def checked_by_hand(a: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(a)
    if info.any():
        factor, _ = torch.linalg.cholesky_ex(a + 10 * torch.eye(3))
    return factor


def regular() -> tuple[Tensor]:
    return (torch.eye(3) * 3 + torch.rand(3, 3),)


def singular() -> tuple[Tensor]:
    return (torch.diag(torch.tensor([1.0, 0.0, 2.0])) + torch.rand(()) * torch.eye(3)[:1],)


def symmetric() -> tuple[Tensor]:
    a = torch.rand(3, 3)
    return (a @ a.mT + torch.eye(3),)


def indefinite() -> tuple[Tensor]:
    return (-symmetric()[0],)


def with_nan() -> tuple[Tensor]:
    return (torch.full((3, 3), math.nan),)


def linalgtest(program: Program, message: str, good: Way, bad: Way) -> Any:
    return maketest(
        program,
        same=("good",),
        exact=False,
        good=good,
        good_again=good,
        bad=Raises(torch.linalg.LinAlgError, message, bad),
    )


@expected
class LinalgTest(unittest.TestCase):
    """The error checks of torch.linalg, which read a flag that the kernel returns."""

    test_inv = linalgtest(inverse, "linalg.inv: .*singular", regular, singular)
    test_inverse_method = linalgtest(lambda a: a.inverse(), "singular", regular, singular)
    test_solve = linalgtest(
        lambda a: torch.linalg.solve(a, a + 1), "linalg.solve: .*singular", regular, singular
    )
    test_cholesky = linalgtest(torch.linalg.cholesky, "not positive", symmetric, indefinite)
    if hasattr(torch.ops.aten, "cholesky"):  # torch 2.14 has it no longer.
        test_old_cholesky = linalgtest(torch.cholesky, "not positive", symmetric, indefinite)
    test_matrix_power = linalgtest(
        lambda a: torch.linalg.matrix_power(a, -2), "singular", regular, singular
    )
    test_eigh = linalgtest(lambda a: torch.linalg.eigh(a)[0], "converge", symmetric, with_nan)
    test_tensorinv = linalgtest(
        lambda a: torch.linalg.tensorinv(a[None], ind=2), "singular", regular, singular
    )
    test_svd = linalgtest(torch.linalg.svdvals, "converge", regular, with_nan)
    test_batch = linalgtest(
        lambda a: torch.linalg.inv(torch.stack([torch.eye(3), a])),
        "Batch element 1",
        regular,
        singular,
    )
    test_lu = maketest(lu, exact=False, same=("g",), good=regular, good_again=regular)
    test_ldl = maketest(ldl, exact=False, same=("good",), good=regular, good_again=symmetric)
    test_inv_ex = maketest(
        inverse_ex, exact=False, same=("any",), any_regular=regular, any_singular=singular
    )
    test_checked_by_hand = maketest(
        checked_by_hand, exact=False, definite=symmetric, indefinite=indefinite
    )


# ------------------------------------------------------------- shapes that are in the data


def mask_of(*bits: int) -> Way:
    """A boolean mask, and as many fresh numbers."""
    return lambda: (torch.tensor(bits, dtype=torch.bool), torch.randn(len(bits)))


# Ways with the same prefix keep the same number of elements, elsewhere.
MASKS = {
    "two_first": mask_of(1, 1, 0, 0, 0),
    "two_others": mask_of(0, 0, 1, 0, 1),
    "none": mask_of(0, 0, 0, 0, 0),
    "four": mask_of(1, 1, 0, 1, 1),
    "four_others": mask_of(0, 1, 1, 1, 1),
    "all": mask_of(1, 1, 1, 1, 1),
}


def masktest(program: Program, **options: Any) -> Any:
    return maketest(program, same=("two", "four"), **options, **MASKS)


def integers(*values: int) -> Way:
    return lambda: (torch.tensor(values), torch.randn(len(values)))


def count_in_python(mask: Tensor, y: Tensor) -> tuple[int, Tensor]:
    chosen = y[mask]
    if chosen.numel() == 0:
        return 0, y
    if len(chosen) > 3:
        chosen = chosen[:3] * chosen.shape[0]
    return chosen.shape[0], chosen.sum() / len(chosen)


def rows_by_mask(mask: Tensor, y: Tensor) -> Tensor:
    x = torch.outer(y, y)
    return x[mask].sum(1) @ x[mask][:, mask]


def update_by_mask(mask: Tensor, y: Tensor) -> Tensor:
    y[mask] *= 2
    z = torch.zeros_like(y)
    z[mask] = y[mask] + 1
    return z


def views_of_chosen(mask: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen = mask.nonzero()
    flat = chosen[:, 0]
    flat += 1
    return chosen, flat, y[chosen.view(-1) - 1]


def two_stages(mask: Tensor, y: Tensor) -> Tensor:
    chosen = y[mask]
    return chosen[chosen.round() == chosen.round()][: max(1, chosen.numel() // 2)]


def reshape_chosen(mask: Tensor, y: Tensor) -> Tensor:
    # With an odd number of elements the captured graph cannot even run.
    chosen = y[mask]
    return chosen.view(2, -1) if chosen.numel() % 2 == 0 else chosen.view(1, -1)


def unique(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return values, counts, torch.zeros(len(values)).index_add(0, inverse, y)


def unique_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.stack([x, x % 2], 1)
    return torch.unique(rows, dim=0), y.sum()


def unique_loop(x: Tensor, y: Tensor) -> dict[int, Tensor]:
    return {int(value): y[x == value].sum() for value in x.unique()}


def unique_consecutive(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    values, counts = torch.unique_consecutive(x, return_counts=True)
    return values * counts, y


def repeat_interleave(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y.repeat_interleave(x), torch.repeat_interleave(x)


def repeat_interleave_dim(x: Tensor, y: Tensor) -> Tensor:
    return torch.outer(y, y).repeat_interleave(x, dim=1)


def bincount(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    counts = torch.bincount(x)
    return counts, torch.bincount(x, weights=y), counts / counts.sum()


def bincount_minlength(x: Tensor, y: Tensor) -> Tensor:
    return torch.bincount(x, minlength=6) * 2 + y.sum().long() * 0


def where(mask: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    (index,) = torch.where(mask)
    rows, columns = torch.where(mask[:, None] & mask)
    return y[index], rows + columns


def packed_lstm() -> type[nn.Module]:
    class Packed(nn.Module):
        """Sequences of different lengths, through the packed form whose sizes are the lengths."""

        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(2, 3, batch_first=True)

        def forward(self, lengths: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            out, (h, _) = self.lstm(packed)
            return *pad_packed_sequence(out, batch_first=True), h

    return Packed


@expected
class DynamicShapeTest(unittest.TestCase):
    """Operators whose result's shape is in the data: a variant for each shape, not each value."""

    test_nonzero = masktest(lambda m, y: (m.nonzero(), y + 1))
    test_nonzero_tuple = masktest(lambda m, y: y[m.nonzero(as_tuple=True)])
    test_argwhere = masktest(lambda m, y: torch.argwhere(m * y))
    test_mask_index = masktest(lambda m, y: y[m] * 2)
    test_mask_in_a_tuple = masktest(lambda m, y: torch.outer(y, y)[1:, m])
    test_masked_select = masktest(lambda m, y: y.masked_select(m).exp())
    test_masked_select_broadcast = masktest(lambda m, y: y[:, None].masked_select(m))
    test_where = masktest(where)
    test_shape_in_python = masktest(count_in_python)
    test_rows = masktest(rows_by_mask, exact=False)
    test_update = masktest(update_by_mask)
    test_views = masktest(views_of_chosen)
    test_two_stages = masktest(two_stages)
    test_reshape = masktest(reshape_chosen)
    test_unique = maketest(
        unique,
        same=("two", "three"),
        two=integers(1, 5, 1, 1),
        two_others=integers(3, 3, 2, 2),
        three=integers(1, 2, 3, 3),
        three_others=integers(7, 7, 9, 8),
        one=integers(4, 4, 4, 4),
    )
    test_unique_rows = maketest(
        unique_rows,
        same=("two", "three"),
        two=integers(1, 5, 1, 1),
        three=integers(1, 2, 3, 3),
        three_others=integers(7, 7, 9, 8),
    )
    test_unique_loop = maketest(
        unique_loop,
        one=integers(4, 4, 4, 4),
        two=integers(1, 5, 1, 5),
        other_two=integers(1, 6, 1, 6),
        three=integers(1, 2, 3, 3),
    )
    test_unique_consecutive = maketest(
        unique_consecutive,
        same=("two", "three"),
        two=integers(1, 1, 5, 5),
        two_others=integers(3, 2, 2, 2),
        three=integers(1, 2, 1, 1),
        three_others=integers(7, 7, 9, 8),
    )
    test_repeat_interleave = maketest(
        repeat_interleave,
        same=("six", "three"),
        six=integers(1, 2, 3),
        six_others=integers(6, 0, 0),
        three=integers(1, 1, 1),
        three_others=integers(0, 3, 0),
        none=integers(0, 0, 0),
        negative=Raises(RuntimeError, "negative", integers(1, -1, 1)),
    )
    test_repeat_interleave_dim = maketest(
        repeat_interleave_dim,
        same=("six", "three"),
        six=integers(1, 2, 3),
        six_others=integers(6, 0, 0),
        three=integers(1, 1, 1),
        three_others=integers(0, 3, 0),
    )
    test_bincount = maketest(
        bincount,
        same=("four", "six"),
        four=integers(0, 3, 3),
        four_others=integers(3, 1, 2),
        six=integers(5, 0, 0),
        six_others=integers(1, 5, 5),
        one=integers(0, 0, 0),
    )
    test_bincount_minlength = maketest(
        bincount_minlength,
        same=("six",),
        six=integers(0, 3, 3),
        six_others=integers(3, 5, 2),
        eight=integers(7, 0, 0),
    )
    test_packed_sequence = maketest(
        packed_lstm(),
        exact=False,
        **{
            "_".join(map(str, n)): lambda n=n: (torch.tensor(n), torch.randn(3, 4, 2))
            for n in ((4, 2, 1), (1, 4, 3), (2, 2, 2))
        },
        zero=Raises(
            RuntimeError, "greater than 0", lambda: (torch.tensor([2, 0, 1]), torch.randn(3, 4, 2))
        ),
    )
    test_tensor_split = maketest(
        lambda x, y: [part.sum() for part in y.tensor_split(x)],
        **{
            "_".join(map(str, n)): lambda n=n: (torch.tensor(n), torch.randn(6))
            for n in ((1, 3), (2, 2), (0, 6))
        },
    )


# --------------------------------------------------- operators that cannot say their shape


LIBRARY = torch.library.Library("data_dependence_test", "DEF")
LIBRARY.define("double(Tensor x) -> Tensor")
LIBRARY.define("positive(Tensor x) -> Tensor")
LIBRARY.define("split_signs(Tensor x) -> (Tensor, Tensor[])")
LIBRARY.define("count(Tensor x) -> int")
LIBRARY.define("refuse_negative(Tensor x) -> Tensor")
RUNS = 0


def _counted_double(x: Tensor) -> Tensor:
    global RUNS
    RUNS += 1
    return x * 2


def _refuse_negative(x: Tensor) -> Tensor:
    if x.min() < 0:
        raise TooLarge(float(x.min().round()))
    return x.sqrt()


LIBRARY.impl("double", _counted_double, "CPU")
LIBRARY.impl("positive", lambda x: x[x > 0], "CPU")
LIBRARY.impl("split_signs", lambda x: (x.abs(), [x[x > 0], x[x <= 0]]), "CPU")
LIBRARY.impl("count", lambda x: int((x > 0).sum()), "CPU")
LIBRARY.impl("refuse_negative", _refuse_negative, "CPU")
OPS = torch.ops.data_dependence_test


@torch.library.custom_op("data_dependence_test::keep_large", mutates_args=())
def keep_large(x: Tensor, bound: float) -> Tensor:
    return x[x > bound].clone()


def no_meta(x: Tensor) -> Tensor:
    return OPS.double(x + 1) - 1


def no_meta_dynamic(x: Tensor) -> tuple[Tensor, int]:
    chosen = OPS.positive(x)
    return chosen + 1, chosen.numel()


def no_meta_several(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    size, (positive, negative) = OPS.split_signs(x)
    return size, [positive * 2, negative.sum()]


def no_meta_number(x: Tensor) -> tuple[int, Tensor]:
    n = OPS.count(x)
    return n, x[:n] * 2


def no_fake_custom_op(x: Tensor) -> Tensor:
    return keep_large(x * 2, 0.0).cumsum(0)


def histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    counts, edges = torch.histogram(x, bins=3, range=(0.0, 4.0))
    return counts.cumsum(0), edges


def least_squares(x: Tensor) -> Tensor:
    a = torch.outer(x, x) + torch.eye(4)
    q, _tau = torch.geqrf(a)
    return torch.linalg.lstsq(a, x[:, None]).solution + q.sum()


def random_without_meta(x: Tensor) -> tuple[Tensor, ...]:
    # All of them draw from one stream, in program order.
    before = torch.rand(2)
    counts = torch.binomial(torch.full((4,), 5.0), x / 4)
    weights = torch._sample_dirichlet(x)
    return before, counts, weights, torch.rand(2)


SIGNS = {
    "two": signs(1, 1, -1, -1),
    "two_others": signs(-1, 1, -1, 1),
    "none": signs(-1, -1, -1, -1),
    "three": signs(1, 1, -1, 1),
    "three_others": signs(-1, 1, 1, 1),
}


@expected
class NoMetaTest(unittest.TestCase):
    """Operators without a meta kernel: run once to see the shape, which is guarded."""

    test_fixed_shape = maketest(no_meta, same=("any",), any_1=filled(1), any_2=filled(2))
    test_dynamic_shape = maketest(no_meta_dynamic, same=("two", "three"), **SIGNS)
    test_several_results = maketest(no_meta_several, same=("two", "three"), **SIGNS)
    test_number = maketest(no_meta_number, counted=False, **SIGNS)
    test_custom_op = maketest(no_fake_custom_op, same=("two", "three"), **SIGNS)
    test_histogram = maketest(histogram, same=("any",), any_1=filled(1), any_2=filled(3))
    test_least_squares = maketest(
        least_squares, exact=False, same=("any",), any_1=filled(1), any_2=filled(2)
    )
    test_random = maketest(random_without_meta, same=("any",), any_1=filled(1), any_2=filled(2))
    test_raising = maketest(
        lambda x: OPS.refuse_negative(x) + 1,
        good=filled(1),
        bad=Raises(TooLarge, "-4.0 is too large", filled(-4)),
    )


# ------------------------------------------------------------------- mixture of experts


class Experts(nn.Module):
    """Three experts; the router is the identity, so that the input says who gets a row.

    The three classes below route in the ways that are seen in the wild.
    """

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(3)
        )


class TopOneByMask(Experts):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = x.softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = chosen == i
            if mask.any():
                out[mask] = expert(x[mask]) * weights[mask, None]
        return out


class TopTwoByWhere(Experts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = torch.topk(x.softmax(-1), 2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        expert_mask = F.one_hot(chosen, num_classes=3).permute(2, 1, 0)
        for expert_index in torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, row = torch.where(expert_mask[expert_index].squeeze(0))
            current = self.experts[expert_index](x[None, row].reshape(-1, 3))
            out.index_add_(0, row, current * weights[row, slot, None])
        return out, expert_mask.sum((1, 2))


class TopOneBySorting(Experts):
    def forward(self, x: Tensor) -> Tensor:
        chosen = x.argmax(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=3).tolist()
        parts = x[order].split(counts)
        done = [e(part) for e, part in zip(self.experts, parts, strict=True) if len(part)]
        return torch.cat(done)[order.argsort(stable=True)]


class WithCapacity(Experts):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        chosen = x.argmax(-1)
        out, dropped = x.clone(), 0
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            dropped += max(0, rows.shape[0] - 2)
            rows = rows[:2]
            out = out.index_copy(0, rows, expert(out.index_select(0, rows)))
        return out, dropped


def routed(*experts: int) -> Way:
    """Rows of which row i goes to `experts[i]` first, and to the expert before it second."""

    def args() -> tuple[Tensor]:
        first = F.one_hot(torch.tensor(experts), 3)
        return (first * 4.0 + first.roll(-1, 1) * 2 + torch.rand(len(experts), 3),)

    return args


ROUTES = {
    "all": routed(0, 1, 2, 0),
    "all_others": routed(2, 0, 0, 1),
    "not_two": routed(0, 1, 1, 0),
    "not_two_others": routed(1, 0, 1, 0),
    "zero": routed(0, 0, 0, 0),
    "two": routed(2, 2, 2, 2),
}


@expected
class MixtureOfExpertsTest(unittest.TestCase):
    """Routing, with experts that receive no rows: a variant for each number of rows."""

    test_mask = maketest(TopOneByMask, exact=False, same=("all", "not_two"), **ROUTES)
    test_where = maketest(TopTwoByWhere, exact=False, same=("all", "not_two"), **ROUTES)
    test_sorting = maketest(TopOneBySorting, exact=False, same=("all", "not_two"), **ROUTES)
    test_capacity = maketest(WithCapacity, exact=False, same=("all", "not_two"), **ROUTES)


# --------------------------------------------------------------- early exit and decoding


class EarlyExit(nn.Module):
    """Layers that double their input, with a classifier after each, up to a confident one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(4))
        for layer in self.layers:
            nn.init.eye_(layer.weight).data.mul_(2)
        self.register_buffer("layers_run", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            self.layers_run += 1
            confidence = x.softmax(-1).max(-1).values
            if confidence.min() > 0.95:
                return x, i
        return x, -1


class ExitPerRow(EarlyExit):
    """Rows leave one by one; what stays gets shorter."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[int]]:
        out, active, left = torch.zeros_like(x), torch.arange(len(x)), []
        for layer in self.layers:
            x = layer(x)
            done = x.softmax(-1).max(-1).values > 0.95
            out[active[done]] = x[done]
            x, active = x[~done], active[~done]
            left.append(active.numel())
            if not left[-1]:
                break
        out[active] = x
        return out, left


def confident_after(*layers: int) -> Way:
    """Rows that are confident after so many layers (5: never)."""

    def args() -> tuple[Tensor]:
        margin = torch.tensor([4.5 / 2**n for n in layers])
        return (margin[:, None] * torch.tensor([1.0, 0, 0]) + torch.rand(len(layers), 1),)

    return args


VOCABULARY, END = 8, 0


class Bigram(nn.Module):
    """A language model whose next token is a function of the last: 7 -> 6 -> ... -> 1 -> END.

    The runner-up is the token two below, so that a beam has something to choose from.
    """

    def __init__(self) -> None:
        super().__init__()
        token = torch.arange(VOCABULARY)
        table = F.one_hot((token - 1).clamp(min=END), VOCABULARY) * 6.0
        table += F.one_hot((token - 2).clamp(min=END), VOCABULARY) * (5.0 - token[:, None] / 10)
        self.embedding = nn.Embedding.from_pretrained(table)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


class Greedy(Bigram):
    """Ends when all rows have ended."""

    def forward(self, prompt: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        tokens, logits = prompt, scale
        finished = torch.zeros(len(prompt), dtype=torch.bool)
        for _ in range(10):
            logits = super().forward(tokens[:, -1]) * scale
            following = logits.argmax(-1).masked_fill(finished, END)
            tokens = torch.cat([tokens, following[:, None]], 1)
            finished |= following == END
            if finished.all():
                break
        return tokens, logits


class GreedyWithCache(Bigram):
    """Writes to a cache of its own, at a position that is in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(12, VOCABULARY))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def forward(self, prompt: Tensor, scale: Tensor) -> tuple[list[int], Tensor]:
        token, text = prompt[0, -1], []
        self.position.zero_()
        while token != END and self.position < 10:
            logits = super().forward(token)
            self.cache.index_copy_(0, self.position[None], logits[None] * scale)
            self.position += 1
            token = logits.argmax()
            text.append(token.item())
        return text, self.cache[: self.position.item()].sum(0)


class Beam(Bigram):
    """Beam search with hypotheses in Python lists, as textbooks write it."""

    def forward(self, prompt: Tensor, scale: Tensor) -> tuple[list[int], float, Tensor]:
        beams = [(prompt[0].tolist(), 0.0)]
        finished: list[tuple[list[int], float]] = []
        for _ in range(6):
            candidates = []
            for tokens, score in beams:
                logits = super().forward(torch.tensor(tokens[-1])).log_softmax(-1)
                best, following = logits.topk(2)
                for value, token in zip(best.tolist(), following.tolist(), strict=True):
                    candidates.append(([*tokens, token], score + value))
            candidates.sort(key=lambda c: c[1], reverse=True)
            beams = []
            for candidate in candidates[:3]:
                (finished if candidate[0][-1] == END else beams).append(candidate)
            if not beams:
                break
        tokens, score = max(finished + beams, key=lambda c: c[1] / len(c[0]))
        return tokens, score, torch.tensor(tokens) * scale


class TensorBeam(Bigram):
    """Beam search over tensors, as libraries write it: only its end is in the data."""

    def forward(self, prompt: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompt[:1].repeat(3, 1)
        scores = torch.tensor([0.0, -1e9, -1e9]) * scale.abs()
        for _ in range(10):
            following = super().forward(tokens[:, -1]).log_softmax(-1)
            ended = tokens[:, -1] == END
            stay = torch.full((VOCABULARY,), -1e9).index_fill(0, torch.tensor([END]), 0)
            following = torch.where(ended[:, None], stay, following)
            total = (scores[:, None] + following).view(-1)
            scores, index = total.topk(3)
            tokens = torch.cat([tokens[index // VOCABULARY], (index % VOCABULARY)[:, None]], 1)
            if (tokens[:, -1] == END).all():
                break
        return tokens, scores


class Sampled(Bigram):
    """Draws tokens: the data that decides comes from the random number generator."""

    def forward(self, prompt: Tensor, scale: Tensor) -> tuple[list[int], Tensor]:
        token, text = prompt[0, -1:], []
        for _ in range(8):
            probabilities = super().forward(token)[0].div(2).softmax(-1)
            token = torch.multinomial(probabilities, 1)
            text.append(int(token))
            if token == END:
                break
        return text, torch.rand(2) * scale


class Nucleus(Bigram):
    """Top-p filtering: how many tokens stay is in the data."""

    def forward(self, prompt: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        values, index = super().forward(prompt[0, -1]).softmax(-1).sort(descending=True)
        keep = values.cumsum(0) - values < 0.9
        values, index = values[keep], index[keep]
        return index[torch.multinomial(values, 1)], values * scale


class Speculative(Bigram):
    """Accepts the part of a draft that the model agrees with."""

    def forward(self, draft: Tensor, scale: Tensor) -> tuple[Tensor, int]:
        predicted = super().forward(draft[0, :-1]).argmax(-1)
        agree = predicted == draft[0, 1:]
        accepted = agree.long().cumprod(0).sum().item()
        return torch.cat([draft[0, : accepted + 1], predicted[accepted : accepted + 1]]), accepted


def prompts(*tokens: int) -> Way:
    """One row for each token, and a positive scale that changes no choice."""
    return lambda: (torch.tensor(tokens)[:, None], torch.rand(()) + 1)


def drafts(*tokens: int) -> Way:
    return lambda: (torch.tensor([tokens]), torch.rand(()))


@expected
class EarlyExitTest(unittest.TestCase):
    """Layers that are run only while the data asks for more."""

    test_whole_batch = maketest(
        EarlyExit,
        first=confident_after(1, 1),
        second=confident_after(2, 1),
        third=confident_after(1, 3),
        never=confident_after(5, 1),
    )
    test_per_row = maketest(
        ExitPerRow,
        same=("one_two", "two_two"),
        one_two=confident_after(1, 2, 2),
        one_two_others=confident_after(2, 1, 2),
        two_two=confident_after(2, 2, 2),
        never=confident_after(5, 1, 5),
    )


@expected
class DecodingTest(unittest.TestCase):
    """Decoding loops as one graph each; a variant for each course that a decoding takes."""

    test_greedy = maketest(
        Greedy,
        same=("four", "six"),
        four=prompts(4, 1),
        four_others=prompts(2, 4),
        six=prompts(6, 3),
        six_others=prompts(6, 6),
        one=prompts(1, 1),
    )
    test_greedy_with_cache = maketest(
        GreedyWithCache, four=prompts(4), one=prompts(1), six=prompts(6), none=prompts(0)
    )
    test_beam = maketest(Beam, four=prompts(4), one=prompts(1), six=prompts(6), seven=prompts(7))
    test_tensor_beam = maketest(
        TensorBeam, counted=False, four=prompts(4), one=prompts(1), six=prompts(6)
    )
    test_sampling = maketest(Sampled, counted=False, four=prompts(4), one=prompts(1))
    test_nucleus = maketest(Nucleus, counted=False, four=prompts(4), one=prompts(1), two=prompts(2))
    test_speculative = maketest(
        Speculative,
        same=("all", "two"),
        all=drafts(5, 4, 3, 2),
        all_others=drafts(7, 6, 5, 4),
        two=drafts(5, 4, 3, 7),
        two_others=drafts(6, 5, 4, 4),
        none=drafts(5, 1, 0, 0),
    )


# ----------------------------------------------------------------------- attention masks


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def attend(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class MaskIfAnyPadding(Attention):
    def forward(self, mask: Tensor | None, x: Tensor) -> Tensor:
        if mask is not None and mask.all():
            mask = None
        return self.attend(x, None if mask is None else ~mask)


class MaskFromLengths(Attention):
    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())
        x, mask = x[:, :longest], mask[:, :longest]
        if torch.all(mask == 1):
            return self.attend(x, None)
        return self.attend(x, mask == 0)


class LeftOrRightPadded(Attention):
    """Warns about padding on the wrong side, as text generation does."""

    def forward(self, mask: Tensor, x: Tensor) -> tuple[Tensor, str]:
        side = "none"
        if (mask[:, -1] == 0).sum() > 0:
            side = "right"
        elif 0 in mask[:, 0]:
            side = "left"
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        return self.attend(x + positions[..., None], None), side


class Unpadded(Attention):
    """Computes on the real tokens only, as variable length attention does."""

    def forward(self, mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor, int]:
        lengths = mask.sum(-1, dtype=torch.int32)
        index = mask.flatten().nonzero().flatten()
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        tokens = x.flatten(0, 1)[index]
        parts = [self.attend(tokens[None, a:b], None)[0] for a, b in itertools.pairwise(bounds)]
        out = torch.zeros_like(x).flatten(0, 1).index_put((index,), torch.cat(parts))
        return out.view_as(x), bounds, lengths.max().item()


class Encoder(nn.Module):
    """PyTorch's own encoder, which looks at the mask to choose a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=None if mask.all() else ~mask)


class NestedEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


def causal_hint(mask: Tensor, x: Tensor) -> Tensor:
    """Finds out whether a mask is the causal one, which has a kernel of its own."""
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    if torch.equal(mask, causal):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def padded(*lengths: int) -> Way:
    """The mask of a batch padded on the right to four tokens, and the batch."""
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    return lambda: (mask.clone(), torch.randn(len(lengths), 4, 4))


def left_padded(*lengths: int) -> Way:
    mask = torch.arange(4) >= 4 - torch.tensor(lengths)[:, None]
    return lambda: (mask.clone(), torch.randn(len(lengths), 4, 4))


PADDED = {
    "full": padded(4, 4),
    "padded": padded(4, 2),
    "padded_others": padded(1, 4),
    "full_again": padded(4, 4),
}


@expected
class AttentionMaskTest(unittest.TestCase):
    """Models that look at their attention mask."""

    test_all = maketest(
        MaskIfAnyPadding,
        exact=False,
        same=("full", "padded"),
        **PADDED,
        without=lambda: (None, torch.randn(2, 4, 4)),
    )
    test_lengths = maketest(
        MaskFromLengths, exact=False, same=("full", "padded"), short=padded(2, 2), **PADDED
    )
    test_side = maketest(
        LeftOrRightPadded,
        exact=False,
        same=("full", "padded", "left"),
        **PADDED,
        left=left_padded(4, 2),
        left_others=left_padded(4, 1),
    )
    test_unpadded = maketest(
        Unpadded, exact=False, full=padded(4, 4), short=padded(4, 2), swapped=padded(2, 4)
    )
    test_encoder = maketest(Encoder, exact=False, same=("full", "padded"), **PADDED)
    test_nested_encoder_unpadded = maketest(
        NestedEncoder, exact=False, same=("two", "three"), two=padded(4, 4), three=padded(4, 4, 4)
    )
    test_nested_encoder_padded = maketest(
        NestedEncoder, exact=False, same=("full", "padded"), **PADDED
    )
    test_causal = maketest(
        causal_hint,
        exact=False,
        same=("other",),
        causal=lambda: (torch.ones(4, 4).tril().bool(), torch.randn(1, 2, 4, 4)),
        other=lambda: (torch.ones(4, 4).bool(), torch.randn(1, 2, 4, 4)),
        other_again=lambda: (torch.eye(4).bool(), torch.randn(1, 2, 4, 4)),
    )


# ------------------------------------------------- with mutation, randomness, live state


class UpdatesAround(nn.Module):
    """Updates a buffer before it looks at the data, and after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.mean.lerp_(x, 0.1)
        if x.sum() < 0:
            self.skipped.add_(1)
            return self.mean.clone()
        self.mean.mul_(0.9)
        y = x + self.mean
        if y.max() > 100:
            self.seen.sub_(1)
        return y


def argument_around(x: Tensor) -> Tensor:
    x.add_(1)
    if x.sum() > 0:
        x[0].mul_(2)
    else:
        x.neg_()
    y = x * 2
    while x.max() > 4:
        x.sub_(1)
    return y


def out_around(x: Tensor, out: Tensor) -> Tensor:
    torch.exp(x, out=out)
    if out.max() > 1:
        torch.neg(out, out=out)
    return out.view(-1)


def dropout_before(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.dropout(x, 0.5)
    noise = torch.rand(3)
    if x.sum() > 0:
        return y + noise[0], torch.randn(2)
    return y, noise


def random_branch(x: Tensor) -> tuple[Tensor, Tensor]:
    if torch.rand(()) > 0.5:
        return x + torch.rand(4), torch.rand(2)
    return x - 1, torch.rand(2)


def random_size(x: Tensor) -> tuple[Tensor, Tensor]:
    k = int(torch.randint(0, 3, ()))
    return x[:k] * 2, torch.rand(k)


def keep_by_coin(x: Tensor) -> Tensor:
    keep = torch.bernoulli(torch.full((4,), 0.5)).bool()
    return F.dropout(x[keep], 0.5)


def unused_random(x: Tensor) -> Tensor:
    torch.rand(3)
    y = F.dropout(x, 0.5)
    y = x + torch.rand(4)
    torch.randn(2)
    return y


def unused_random_branch(x: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.rand(4)
    if x.sum() > 0:
        x = x + noise
    if torch.rand(()) > 0.5:
        noise = torch.randn(2)
    return x, torch.rand(2)


def shuffled(x: Tensor) -> tuple[Tensor, list[int]]:
    order = torch.randperm(3).tolist()
    return x[order], order


class Stochastic(nn.Module):
    """Stochastic depth in train mode, with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.train()
        for layer in self.layers:
            if torch.rand(1).item() < 0.5:
                x = x + layer(x)
        x = self.norm(x)
        return x if x.sum() > 0 else F.dropout(x, 0.2)


class OwnGenerator(nn.Module):
    """Draws from a generator of its own, and from everyone's."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        if torch.rand((), generator=self.generator) > 0.5:
            x = x + torch.rand(4, generator=self.generator)
        return x - torch.rand(4)


class Remembers(nn.Module):
    """Keeps a Python number made from its data, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = 0
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.last
        self.last = int(x.max())
        self.history.append(self.last)
        del self.history[:-2]
        return y


class ReboundMean(nn.Module):
    """A running mean that is bound anew on each call, and forgotten when it is large."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.mean + (x - self.mean) / self.count.item()
        if self.mean.abs().sum() > 5:
            self.mean = torch.zeros(4)
            self.count.zero_()
        return self.mean * 1


@expected
class MutationAndRandomnessTest(unittest.TestCase):
    """A wrong guess leaves no trace: updates happen once, random numbers are drawn once."""

    test_buffers = maketest(
        UpdatesAround, positive=filled(1), negative=filled(-1), large=filled(200)
    )
    test_arguments = maketest(
        argument_around,
        **{f"around_{n}": filled(n) for n in (-3, 0, 4, 7)},
    )
    test_out = maketest(
        out_around,
        large=lambda: (1 + torch.rand(2, 2), torch.zeros(2, 2)),
        small=lambda: (-1 - torch.rand(2, 2), torch.rand(2, 2)),
    )
    test_dropout = maketest(dropout_before, positive=filled(1), negative=filled(-1))
    test_random_branch = maketest(random_branch, counted=False, a=filled(1), b=filled(2))
    test_random_size = maketest(random_size, counted=False, a=filled(1), b=filled(2))
    test_random_mask = maketest(keep_by_coin, counted=False, a=filled(1), b=filled(2))
    test_unused_random = maketest(unused_random, same=("any",), any_1=filled(1), any_2=filled(2))
    test_unused_random_branch = maketest(
        unused_random_branch, counted=False, positive=filled(1), negative=filled(-1)
    )
    test_random_order = maketest(shuffled, counted=False, a=filled(1), b=filled(2))
    test_own_generator = maketest(OwnGenerator, counted=False, a=filled(1), b=filled(2))
    test_remembered = maketest(Remembers, counted=False, a=filled(1), b=filled(2))
    test_rebound = maketest(ReboundMean, counted=False, a=filled(1), b=filled(-2))
    test_stochastic_depth = maketest(
        Stochastic,
        exact=False,
        counted=False,
        a=lambda: (torch.randn(5, 4),),
        b=lambda: (torch.randn(5, 4) + 1,),
    )


class EveryThird(nn.Module):
    """Acts on every third call; the count is a buffer that only the graph advances."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.steps % 3 == 0:
            return x * 3
        return x


class ReadsCount(EveryThird):
    """Reads the count itself, as Adam reads its step."""

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1).remainder_(4)
        return x / (1 - 0.9 ** (self.steps.item() + 1))


class Calibrated(nn.Module):
    """Sets a scale from the first data it sees, and uses it from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if not self.calibrated:
            self.scale.copy_(x.abs().max())
            self.calibrated.fill_(True)
        return x / self.scale


class LooksAtWeights(nn.Module):
    """Looks at a parameter, a plain attribute and an entry of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.threshold = torch.tensor(2.0)
        self.flags = [torch.tensor(False)]

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.norm() > self.threshold + 1:
            x = x * self.weight
        if self.flags[0]:
            return x + 1
        return x


def change_weights(program: LooksAtWeights, i: int) -> None:
    """Four states that come and go, each changed in another way."""
    with torch.no_grad():
        program.weight.fill_(3.0 if i % 2 else 1.0)
    program.threshold = torch.tensor(100.0 if i % 8 > 5 else 2.0)
    program.flags[0].fill_(bool(i % 4 > 1))


def load_steps(program: EveryThird, i: int) -> None:
    if i % 5 == 0:
        program.load_state_dict({"steps": torch.tensor(1)})


def with_closure() -> Callable[[Tensor], Tensor]:
    """A program with its state in a closure."""
    count = torch.zeros((), dtype=torch.long)

    def program(x: Tensor) -> Tensor:
        count.add_(1)
        if count % 2 == 1:
            return x + 1
        return x - 1

    return program


@expected
class LiveStateTest(unittest.TestCase):
    """Data in the program's own state: as much of a guard as data in its arguments."""

    test_cycle = maketest(EveryThird, counted=False, a=filled(1), b=filled(2))
    test_cycle_loaded = maketest(
        EveryThird, counted=False, between=load_steps, a=filled(1), b=filled(2)
    )
    test_item = maketest(ReadsCount, counted=False, a=filled(1), b=filled(2))
    test_calibration = maketest(Calibrated, counted=False, a=filled(1), b=filled(2))
    test_weights = maketest(
        LooksAtWeights, counted=False, between=change_weights, a=filled(1), b=filled(2)
    )

    def test_number_of_variants(self) -> None:
        """The states that come back are the variants, whatever the arguments are."""
        for make, states in (
            (EveryThird, 2),
            (ReadsCount, 4),
            (Calibrated, 2),
            (with_closure, 2),
        ):
            with self.subTest(make=make.__name__):
                graph = check(make, lambda: (torch.randn(4),), calls=14, captures=states)
                self.assertEqual(len(graph.specializations), states)


# ------------------------------------------------------------------------------ no guards


def constants(x: Tensor) -> Tensor:
    weights = torch.tensor([1.0, 2.0, 3.0])
    if weights.sum() > 5 and torch.arange(4).max().item() == 3:
        x = x * weights.max().item()
    n = torch.ones(3).nonzero().shape[0]
    return x + n + sum(torch.linspace(0, 1, 3).tolist())


def position_ids(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[-1])
    if positions.max() >= 100:
        raise ValueError("the sequence is too long")
    assert positions.unique().numel() == x.shape[-1]
    return x + positions[positions > 1].sum()


def causal_mask(x: Tensor) -> Tensor:
    mask = torch.full((4, 4), -math.inf).triu(1)
    assert not mask.isnan().any()
    index = torch.tril_indices(4, 4)
    pairs = [tuple(pair) for pair in index.t().tolist()]
    return x @ mask.exp() + len(pairs)


def metadata(x: Tensor) -> Tensor:
    if x.shape[0] > 2 and x.dim() == 1 and x.is_floating_point() and x.is_contiguous():
        x = x * x.numel() + x.element_size() + len(x)
    return x[: x.size(0) // 2]


def probing(x: Tensor) -> Tensor:
    # Finds out about shapes by trying.
    try:
        x = x.view(3, -1)
    except RuntimeError:
        x = x.view(2, -1) * 2
    try:
        return x.mm(torch.ones(3, 3))
    except RuntimeError:
        return x + 1


def elementwise(x: Tensor) -> Tensor:
    # A mask that is never read is no branch.
    y = torch.where(x > 0, x, -x).masked_fill(x < 0.5, 2.0)
    y[x > 1] = 0.0
    y = y.masked_scatter(x < 0, x)
    return y.gather(0, x.argsort()).index_select(0, x.argmax()[None]).clamp(max=y.max())


def constant_mutated(x: Tensor) -> Tensor:
    counts = torch.zeros(3)
    counts[1] += 2
    counts.add_(1)
    return x * counts.tolist()[1] + counts.max().item()


class ReadsNoState(nn.Module):
    """Has state, but looks only at constants."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if torch.tensor([0, 1]).any():
            x = self.linear(x)
        return x + self.seen


class Rotary(nn.Module):
    """Position tables from constants, at positions of which only the number is known."""

    def forward(self, x: Tensor) -> Tensor:
        frequency = 1.0 / 10 ** (torch.arange(0, 4, 2).float() / 4)
        angle = torch.outer(torch.arange(x.shape[0]).float(), frequency)
        if angle.max() > 1000:
            angle = angle / 2
        return torch.cat([x[:, :2] * angle.cos(), x[:, 2:] * angle.sin()], -1)


def unguardedtest(program: Program, make_args: Way, results: int = 1) -> Any:
    """One variant for all data, and a graph that has no outputs but its `results`."""

    def test(self: unittest.TestCase) -> None:
        graph = check(lambda: new(program), make_args, calls=6, exact=False)
        self.assertEqual(len(graph.specializations), 1)
        self.assertEqual(len(list(graph.graph.outputs())), results, graph.graph_text())

    return test


@expected
class UnguardedTest(unittest.TestCase):
    """What depends on no input and no live state is no guard."""

    test_constants = unguardedtest(constants, lambda: (torch.randn(4),))
    test_position_ids = unguardedtest(position_ids, lambda: (torch.randn(4),))
    test_causal_mask = unguardedtest(causal_mask, lambda: (torch.randn(4, 4),))
    test_metadata = unguardedtest(metadata, lambda: (torch.randn(4),))
    test_probing = unguardedtest(probing, lambda: (torch.randn(4),))
    test_elementwise = unguardedtest(elementwise, lambda: (torch.randn(4),))
    test_constant_mutated = unguardedtest(constant_mutated, lambda: (torch.randn(4),))
    test_module_state = unguardedtest(ReadsNoState, lambda: (torch.randn(4),), results=2)
    test_rotary = unguardedtest(Rotary, lambda: (torch.randn(3, 4),))
    test_random_after_constant = unguardedtest(
        lambda x: x + torch.rand(4) if torch.ones(2).all() else x, lambda: (torch.randn(4),)
    )


# ----------------------------------------------------------------------- failed replays


def guarded_index(index: Tensor, table: Tensor) -> Tensor:
    if index.max() < len(table):
        return table.index_select(0, index) * 2
    return table - 1


def guarded_division(a: Tensor, b: Tensor) -> Tensor:
    if (b != 0).all():
        return a // b
    return a


def guarded_inverse(a: Tensor) -> Tensor:
    if torch.linalg.det(a).abs() > 1e-3:
        return torch.linalg.inv(a)
    return a + 1


def guarded_operator(x: Tensor) -> Tensor:
    if x.min() >= 0:
        return OPS.refuse_negative(x)
    return -x


def guarded_mutation(index: Tensor, table: Tensor) -> Tensor:
    table.mul_(2)
    noise = torch.rand(4)
    if index.max() < len(table):
        table[index] += 1
    return table + noise


@expected
class FailedReplayTest(unittest.TestCase):
    """An exception inside a graph that was captured on other data is no exception at all."""

    test_index = maketest(
        guarded_index, inside=indices(0, 3), outside=indices(1, 4), same=("inside", "outside")
    )
    test_division = maketest(
        guarded_division,
        nonzero=lambda: (torch.randint(0, 9, (3,)), torch.tensor([1, -2, 3])),
        zero=lambda: (torch.randint(0, 9, (3,)), torch.tensor([1, 0, 3])),
    )
    test_inverse = maketest(guarded_inverse, exact=False, regular=regular, singular=singular)
    test_python_operator = maketest(guarded_operator, good=filled(1), bad=filled(-1))
    test_mutation = maketest(guarded_mutation, inside=indices(0, 3), outside=indices(1, 4))


def write_through_numpy(x: Tensor) -> Tensor:
    x.numpy()[0] = 7
    return x * 2


def write_through_numpy_of_result(x: Tensor) -> Tensor:
    y = x * 2
    array = y.numpy()
    array += 1
    return y


def return_numpy(x: Tensor) -> tuple[np.ndarray, Tensor]:
    y = x * 2
    return y.numpy(), y


@expected
class NumpyMemoryTest(unittest.TestCase):
    """An array shares the tensor's memory: writes through it are right, or refused."""

    def right_or_refused(self, program: Program) -> None:
        x = torch.rand(3)
        try:
            graph = extract_compiled_graph(program, (x.clone(),))
        except (ExtractionError, ValueError) as e:
            # numpy's own error for an array that must not be written is as clear.
            self.assertRegex(str(e), "numpy|read-only")
            return
        for _ in range(4):
            x = torch.rand(3)
            eager, replayed = x.clone(), x.clone()
            want, got = program(eager), graph(replayed)
            torch.testing.assert_close((got, replayed), (want, eager), rtol=0, atol=0)

    def test_argument(self) -> None:
        self.right_or_refused(write_through_numpy)

    def test_result(self) -> None:
        self.right_or_refused(write_through_numpy_of_result)

    def test_returned(self) -> None:
        """An array in the result is a new one on each call, over the memory of its tensor."""
        try:
            graph = extract_compiled_graph(return_numpy, (torch.ones(3),))
        except ExtractionError as e:
            self.assertRegex(str(e), "numpy")
            return
        for value in (1.0, 2.0, 1.0, 2.0):
            array, y = graph(torch.full((3,), value))
            self.assertIsInstance(array, np.ndarray)
            np.testing.assert_array_equal(array, np.full((3,), 2 * value, np.float32))
            y += 1
            np.testing.assert_array_equal(array, y.numpy())
            array += 100
            np.testing.assert_array_equal(array, y.numpy())


# ----------------------------------------------------------------------- cost of a guess


def many_guards(x: Tensor) -> Tensor:
    x = OPS.double(x)
    if x.sum() > 0:
        x = x + 1
    if x.max() > 0 and x.min() < 1000:
        x = x[x > -1000]
    return x * (2 if x.isnan().any() else 3)


def by_number(n: Tensor, x: Tensor) -> Tensor:
    return OPS.double(x) * n.item()


def by_two_numbers(n: Tensor, x: Tensor) -> Tensor:
    x = OPS.double(x)
    if n[0] == 0:
        return x + n[1].item()
    if n[0] == 1:
        return x - n[1].item()
    return x * n[1].item()


@expected
class CostTest(unittest.TestCase):
    """How often a graph runs in one call, counted by an operator that counts."""

    def runs(self, graph: CompiledGraph, *args: Tensor) -> int:
        before = RUNS
        graph(*args)
        return RUNS - before

    def test_guess_holds(self) -> None:
        graph = extract_compiled_graph(many_guards, (torch.ones(3),))
        for _ in range(5):
            self.assertEqual(self.runs(graph, torch.rand(3) + 1), 1)

    def test_guess_holds_among_many(self) -> None:
        graph = extract_compiled_graph(by_number, (torch.tensor(0), torch.ones(3)))
        for n in range(8):
            graph(torch.tensor(n), torch.ones(3))
        self.assertEqual(len(graph.specializations), 8)
        for n in (7, 2, 5):
            # The variant that ran last comes first, whenever it was captured.
            graph(torch.tensor(n), torch.ones(3))
            for _ in range(3):
                self.assertEqual(self.runs(graph, torch.tensor(n), torch.rand(3)), 1)

    def test_switching(self) -> None:
        """Two variants in turn: the wrong one once, then the right one."""
        graph = extract_compiled_graph(by_number, (torch.tensor(0), torch.ones(3)))
        graph(torch.tensor(1), torch.ones(3))
        for n in (0, 1, 0, 0, 1):
            self.assertLessEqual(self.runs(graph, torch.tensor(n), torch.rand(3)), 2)

    def test_one_guard_leads_to_the_variant(self) -> None:
        """However many variants there are: the guard that failed says which one is right."""
        graph = extract_compiled_graph(by_number, (torch.tensor(0), torch.ones(3)))
        for n in range(8):
            graph(torch.tensor(n), torch.ones(3))
        for n in (0, 5, 3, 7, 1, 0):
            self.assertLessEqual(self.runs(graph, torch.tensor(n), torch.rand(3)), 2)
        self.assertEqual(len(graph.specializations), 8)

    def test_guards_lead_step_by_step(self) -> None:
        """Each wrong variant settles at least one guard more."""
        graph = extract_compiled_graph(by_two_numbers, (torch.tensor([0, 0]), torch.ones(3)))
        pairs = [torch.tensor(p) for p in itertools.product(range(3), range(4))]
        for n in pairs:
            graph(n, torch.ones(3))
        self.assertEqual(len(graph.specializations), 12)
        for n in random.Random(0).choices(pairs, k=20):
            self.assertLessEqual(self.runs(graph, n, torch.rand(3)), 4)
        self.assertEqual(len(graph.specializations), 12)

    def test_no_variant(self) -> None:
        """Data that no variant was captured for: at most one wrong variant runs before it shows."""
        graph = extract_compiled_graph(by_number, (torch.tensor(0), torch.ones(3)))
        # What a capture and the call of its graph cost, where nothing was tried before.
        first = self.runs(graph, torch.tensor(1), torch.ones(3)) - 1
        for n in range(2, 8):
            self.assertLessEqual(self.runs(graph, torch.tensor(n), torch.ones(3)), first + 1)

    def test_hits_and_misses(self) -> None:
        graph = extract_compiled_graph(if_positive, (torch.ones(3),))
        for value in (1, 2, -1, -2, 1):
            graph(torch.full((3,), float(value)))
        self.assertEqual(sum(s.hits for s in graph.specializations), 5)
        self.assertEqual(sum(s.misses for s in graph.specializations), 2)
        self.assertEqual(sorted(s.hits for s in graph.specializations), [2, 3])


# ------------------------------------------------------------------- limits and reports


def line_of(function: Callable[..., Any], text: str) -> str:
    """Where the line with `text` in the source of `function` is, as reports name it."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = [i for i, line in enumerate(lines) if text in line]
    return f"test_data_dependence.py:{first + offset}"


class Counts(nn.Module):
    """Reads one number and checks another; updates state around it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, n: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        if x.sum() > 1e6:
            return x
        y = x * int(n)
        x.add_(1)
        return y + torch.rand(3)


def number(n: int) -> Way:
    return lambda: (torch.tensor(n), torch.rand(3))


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """The texts of all warnings inside; each counts, also when it comes again."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught]


@expected
class LimitTest(unittest.TestCase):
    """Past the limit of variants a call runs eagerly, right, with one warning."""

    def numbers(self, sequence: Sequence[int], **options: Any) -> CompiledGraph:
        return check(
            Counts,
            lambda i: number(sequence[max(i, 1) - 1])(),
            calls=len(sequence),
            captures=None,
            options=options,
        )

    def test_limit(self) -> None:
        with recorded_warnings() as texts:
            graph = self.numbers([0, 1, 2, 3, 0, 1, 4, 2, 0, 5, 1], limit=3)
        self.assertEqual(len(graph.specializations), 3)
        self.assertEqual(len(texts), 1, texts)
        self.assertIn(line_of(Counts, "int(n)"), texts[0])
        self.assertNotIn(line_of(Counts, "1e6"), texts[0])

    def test_kept_variants_serve(self) -> None:
        with recorded_warnings():
            graph = extract_compiled_graph(by_number, (torch.tensor(0), torch.ones(3)), limit=2)
            for n in (0, 1, 2, 3, 2, 3):
                graph(torch.tensor(n), torch.ones(3))
            hits = sum(s.hits for s in graph.specializations)
            for n in (0, 1, 0, 1):
                graph(torch.tensor(n), torch.ones(3))
        self.assertEqual(len(graph.specializations), 2)
        self.assertEqual(sum(s.hits for s in graph.specializations), hits + 4)

    def test_default_limit(self) -> None:
        with recorded_warnings() as texts:
            graph = self.numbers([*range(40), *range(0, 40, 3)])
        self.assertEqual(len(graph.specializations), 32)
        self.assertEqual(len(texts), 1, texts)

    def test_no_warning_below_the_limit(self) -> None:
        with recorded_warnings() as texts:
            graph = self.numbers([0, 1, 2, 0, 1, 2], limit=3)
        self.assertEqual(len(graph.specializations), 3)
        self.assertEqual(texts, [])

    def test_limit_of_one(self) -> None:
        with recorded_warnings() as texts:
            graph = self.numbers([0, 1, 0, 2, 0], limit=1)
        self.assertEqual(len(graph.specializations), 1)
        self.assertEqual(len(texts), 1, texts)

    def test_graphs_that_fail(self) -> None:
        """Variants that cannot even run on other data count like those whose guards fail."""
        sequence = [3, 2, 3, 1, 4, 2, 5, 3, 4]
        with recorded_warnings() as texts:
            graph = check(
                lambda: column_of_positive,
                lambda i: (positive(sequence[max(i, 1) - 1]),),
                calls=len(sequence),
                captures=None,
                options={"limit": 2},
            )
            hits = [s.hits for s in graph.specializations]
            with torch.no_grad():  # as `check` captured them
                for n in (3, 2):
                    graph(positive(n))
        self.assertEqual(len(graph.specializations), 2)
        self.assertEqual(sum(s.hits for s in graph.specializations), sum(hits) + 2)
        self.assertEqual(len(texts), 1, texts)


def column_of_positive(x: Tensor) -> Tensor:
    chosen = x[x > 0]
    return chosen.view(chosen.numel(), 1) + 1


def positive(n: int) -> Tensor:
    """Six numbers, of which the first n are positive."""
    return torch.where(torch.arange(6) < n, 1, -1) * (1 + torch.rand(6))


@expected
class GuardFailureTest(unittest.TestCase):
    """The option `on_guard_failure`."""

    def test_recapture(self) -> None:
        sequence = [0, 1, 0, 2, 1]
        graph = check(
            Counts,
            lambda i: number(sequence[max(i, 1) - 1])(),
            calls=len(sequence),
            captures=3,
            options={"on_guard_failure": "recapture"},
        )
        self.assertEqual(len(graph.specializations), 3)

    def test_eager(self) -> None:
        sequence = [0, 1, 0, 2, 1, 0]
        with recorded_warnings() as texts:
            graph = check(
                Counts,
                lambda i: number(sequence[max(i, 1) - 1])(),
                calls=len(sequence),
                captures=None,
                options={"on_guard_failure": "eager"},
            )
        self.assertEqual(len(graph.specializations), 1)
        self.assertEqual(graph.specializations[0].hits, 3)
        self.assertEqual(texts, [])

    def test_error(self) -> None:
        """The error names the line, and leaves arguments, state and random numbers as they were."""
        program = Counts()
        graph = extract_compiled_graph(
            program, (torch.tensor(0), torch.ones(3)), on_guard_failure="error"
        )
        for n in (0, 1, 0, 2):
            args = (torch.tensor(n), torch.rand(3))
            untouched = [t.clone() for t in (*args, program.calls)]
            torch.manual_seed(n)
            rng_state = torch.get_rng_state()
            if n == 0:
                graph(*args)
                self.assertEqual(program.calls, untouched[2] + 1)
                self.assertTrue(torch.equal(args[1], untouched[1] + 1))
                continue
            with self.assertRaises(GuardError) as raised:
                graph(*args)
            self.assertIn(line_of(Counts, "int(n)"), str(raised.exception))
            self.assertNotIn(line_of(Counts, "1e6"), str(raised.exception))
            torch.testing.assert_close([*args, program.calls], untouched, rtol=0, atol=0)
            self.assertTrue(torch.equal(torch.get_rng_state(), rng_state))
        self.assertEqual(len(graph.specializations), 1)

    def test_eager_when_the_graph_fails(self) -> None:
        graph = extract_compiled_graph(column_of_positive, (positive(3),), on_guard_failure="eager")
        for n in (3, 2, 4, 3):
            x = positive(n)
            self.assertTrue(torch.equal(graph(x), column_of_positive(x)))
        self.assertEqual(len(graph.specializations), 1)
        self.assertEqual(graph.specializations[0].hits, 2)

    def test_error_when_the_graph_fails(self) -> None:
        graph = extract_compiled_graph(column_of_positive, (positive(3),), on_guard_failure="error")
        for n in (3, 2, 4, 3):
            x = positive(n)
            if n == 3:
                self.assertTrue(torch.equal(graph(x), column_of_positive(x)))
            else:
                with self.assertRaises(GuardError):
                    graph(x)
        self.assertEqual(len(graph.specializations), 1)

    def test_other_signatures(self) -> None:
        """The option is about data: other shapes are captured whatever it says."""
        for option in ("recapture", "eager", "error"):
            graph = extract_compiled_graph(if_positive, (torch.ones(3),), on_guard_failure=option)
            for size in (2, 3, 4, 2):
                x = torch.ones(size)
                self.assertTrue(torch.equal(graph(x), if_positive(x)))
            self.assertEqual(len(graph.specializations), 3)

    def test_unknown(self) -> None:
        with self.assertRaisesRegex(ValueError, "on_guard_failure.*sometimes"):
            extract_compiled_graph(if_positive, (torch.ones(3),), on_guard_failure="sometimes")


def reported(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x[x > 1]
    return x * int(x.max())


@expected
class ReportTest(unittest.TestCase):
    """What people can see of the variants."""

    def setUp(self) -> None:
        self.graph = extract_compiled_graph(reported, (torch.tensor([1.0, 2.0]),))
        for x in ([1.0, 2.0], [-1.0, -2.0], [-1.0, -9.0], [2.0, 0.0]):
            self.graph(torch.tensor(x))
        self.branch, self.mask, self.item = (
            line_of(reported, text) for text in ("x.sum()", "x[x > 1]", "int(x.max())")
        )

    def test_guards(self) -> None:
        """Each variant shows its own guards, in program order, with the line of each."""
        self.assertEqual(len(self.graph.specializations), 2)
        positive, negative = self.graph.specializations
        for variant, lines in (
            (positive, [self.branch, self.mask]),
            (negative, [self.branch, self.item]),
        ):
            shown = [str(guard) for guard in variant.guards]
            self.assertEqual(len(shown), len(lines), shown)
            for text, line in zip(shown, lines, strict=True):
                self.assertIn(line, text)

    def test_hits_and_misses(self) -> None:
        positive, negative = self.graph.specializations
        self.assertEqual((positive.hits, positive.misses), (2, 1))
        self.assertEqual((negative.hits, negative.misses), (2, 1))

    def test_explain(self) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            returned = self.graph.explain()
        text = returned or printed.getvalue()
        for line in (self.branch, self.mask, self.item):
            self.assertIn(line, text)
        self.assertRegex(text, r"2 hits")
        self.assertRegex(text, r"1 miss")
        self.assertNotRegex(text, "0x[0-9a-f]{6}")

    def test_explain_without_guards(self) -> None:
        graph = extract_compiled_graph(lambda x: x + 1, (torch.ones(2),))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            text = graph.explain() or printed.getvalue()
        self.assertRegex(text, "no guards")


if __name__ == "__main__":
    unittest.main()
