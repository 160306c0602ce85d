# Owner(s): ["oncall: jit"]

"""Random programs, captured once and replayed with fresh values, compared with eager.

Hypothesis draws the numbers that `random_programs.Generated` makes programs of. A failure shrinks to
a small program, and is printed as a script that can be pasted into a file beside this one. The
default set draws the same programs on each run. The slow set has 200,000 of them, 5,000 a test,
and prints the seeds:

    PYTORCH_TEST_WITH_SLOW=1 python test/lazy/test_random_programs.py LongRunTest
    PYTORCH_TEST_WITH_SLOW=1 python test/lazy/test_random_programs.py WideLongRunTest.test_part_07
"""

import collections
import os
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from random_known import KNOWN, Known
from random_programs import DERIVATIONS, STATE_CLASS, Generated, Outcome, Wide, compare
from random_statements import (
    ALIASED,
    AMBIENT,
    CHANGES_OF_WORLD,
    DRAWN,
    DTYPES,
    FRESH,
    GROUPS,
    RETURNS,
    SHAPES,
    WIDE_GROUPS,
    WIDE_RETURNS,
)

SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"

number = st.integers(0, 15)
input_numbers = st.tuples(
    st.integers(0, len(FRESH) + len(ALIASED) - 1),
    st.integers(0, len(SHAPES) - 1),
    st.integers(0, len(DTYPES) - 1),
    st.integers(0, 2),
)
input_lists = st.lists(input_numbers, min_size=1, max_size=3)
statement_numbers = st.tuples(
    st.integers(0, len(DRAWN) - 1),
    st.integers(0, max(map(len, [*GROUPS, *WIDE_GROUPS])) - 1),
    number,
    number,
    st.integers(0, 127),
)
programs = st.builds(
    Generated,
    input_lists,
    st.one_of(st.none(), input_lists),
    st.lists(statement_numbers, min_size=1, max_size=14),
    st.tuples(st.integers(0, len(RETURNS) - 1), number, number, number),
)
wide_programs = st.builds(
    Generated,
    input_lists,
    st.one_of(st.none(), st.none(), input_lists),
    st.lists(statement_numbers, min_size=1, max_size=8),
    st.tuples(st.integers(0, len(WIDE_RETURNS) - 1), number, number, number),
    st.builds(
        Wide,
        st.integers(0, len(AMBIENT) - 1),
        st.lists(st.tuples(number, st.integers(0, len(CHANGES_OF_WORLD) - 1)), max_size=2),
        st.integers(0, DERIVATIONS - 1),
        st.integers(0, 15).map(lambda i: i == 15),
    ),
)

# The program that runs, for the case that it takes the process down.
LAST_PROGRAM = Path(tempfile.gettempdir(), f"random_program_{os.getpid()}.py")


def run(
    count: int, first_seed: int | None, kind: st.SearchStrategy[Generated] = programs
) -> collections.Counter[Outcome]:
    """Compare `count` random programs; of no seed, the same ones on each run."""
    outcomes: collections.Counter[Outcome] = collections.Counter()

    @settings(
        max_examples=count,
        derandomize=first_seed is None,
        database=None,
        deadline=None,
        # Shrinking runs many more programs: in the long run only.
        phases=[Phase.generate] if first_seed is None else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind)
    def test(program: Generated) -> None:
        LAST_PROGRAM.write_text(program.script)
        try:
            outcomes[compare(program.source, KNOWN)] += 1
        except Exception as e:
            raise AssertionError(f"{type(e).__name__}: {e}\n\n{program.script}") from e

    if first_seed is not None:
        test = seed(first_seed)(test)
    test()
    LAST_PROGRAM.unlink()
    return outcomes


def statistic(outcomes: collections.Counter[Outcome]) -> str:
    """How many programs were equal, raised or were refused, and why those were."""
    of: collections.Counter[str] = collections.Counter()
    for outcome, count in outcomes.items():
        of[outcome.what] += count
    refusals = [(n, o.why) for o, n in outcomes.items() if o.what == "refused"]
    lines = [f"{outcomes.total()} programs, 0 wrong: {dict(of)}"]
    lines += [f"    {n:6} refused: {why}" for n, why in sorted(refusals, reverse=True)[:30]]
    return "\n".join(lines)


class RandomProgramTest(unittest.TestCase):
    def test_programs(self) -> None:
        """The same programs on each run."""
        run(400, None)

    def test_wide_programs(self) -> None:
        run(400, None, wide_programs)


# Found by long runs, and shrunk: the type of `a`, of shape (2, 3), and what the program does.
FOUND = {
    "data_before_its_view": ("float32", "v = a[0]; d = v.data; return {'x': d, 'l': [d, v]}"),
    "view_of_former_data": ("float32", "a.add_(1); v = a.t(); a.data = a * 2; return v[0]"),
    "former_data_in_state": ("float32", "a.add_(1); v = a.t(); a.data = a * 2; self.s = v[0]"),
    "data_of_a_written_tensor": (
        "float32",
        "v = a + 1; w = a * 2; w *= 2; v.data = w; return v[:1], v, w",
    ),
    "data_then_write": ("float32", "v = a + 1; v.data = a * 2; v.add_(1); return v[:1], v"),
    "set_after_write": ("float32", "b = a.view(-1)[1:]; a.clamp_(min=3); a.set_(b)"),
    "sum_into_itself": ("bool", "v = a[0, 0].clone(); torch.sum(v, 0, out=v); return v"),
    "write_of_no_bools": ("bool", "v = a.any().expand(0, 3); v.zero_(); return v"),
    "write_of_no_windows": ("int64", "v = a[:0].unfold(-1, 2, 1); v.data.add_(1); return v"),
    "out_broadcasts": ("float32", "torch.add(a, torch.ones(2, 2, 3), out=a)"),
    "view_dtype_after_conj_write": (
        "complex64",
        "v = a.conj(); v *= 2; return a.view(torch.uint8), v",
    ),
    "view_dtype_of_conj": ("complex64", "return a.conj().view(torch.uint8)"),
    "numpy_of_conj": ("complex64", "return a.conj().numpy()"),
    "numpy_of_neg": ("complex64", "return a.conj().imag.numpy()"),
    "number_and_complex": (
        "float32",
        "k = a[0, 0].item(); return k + 1j, 2j - k, 2j**k, k == 1 + 0j, 1j != k",
    ),
    "number_below_complex": ("float32", "return a[0, 0].item() < 1j"),
    "number_and_numpy": (
        "float32",
        "k = a[0, 0].item(); f = numpy.float32(0.1); return k + f, f + k, numpy.sqrt(k * k), k < f",
    ),
    "layout_of_a_transposed_state": (
        "float32",
        "self.s.transpose_(0, 1); return self.s.shape, self.s.stride(), self.s * 2",
    ),
    "layout_of_a_larger_state": (
        "float32",
        "self.t.unsqueeze_(0); self.t.add_(1); return self.t.shape, self.t.size(0), self.t + 1",
    ),
    "layout_of_a_state_that_is_set": (
        "float32",
        "self.s.set_(a.t()); return self.s.stride(), self.s.is_contiguous(), self.s + 1",
    ),
    "data_of_a_view_is_a_constant": (
        "float32",
        "v = a[0]; v.data = torch.tensor([1.0]); return v",
    ),
    "number_and_large_int": ("float32", "k = a[0, 0].item(); return k < 10**400, k == 2**60 + 1"),
}


class FoundTest(unittest.TestCase):
    """What was wrong once."""


def _found(dtype: str, body: str) -> Callable[[unittest.TestCase], None]:
    lines = "".join(f"        {line}\n" for line in body.split("; "))
    inputs = f"def inputs(i):\n    return (random_tensor((2, 3), torch.{dtype}),)\n"
    program = f"class Program(State):\n    def __call__(self, a):\n{lines}"

    def test(self: unittest.TestCase) -> None:
        compare(f"{STATE_CLASS}\n{inputs}\n{program}")

    return test


for _name, (_dtype, _body) in FOUND.items():
    setattr(FoundTest, f"test_{_name}", _found(_dtype, _body))


class KnownTest(unittest.TestCase):
    """What is excluded: fails as long as it has to be."""


def _known(known: Known) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        compare(known.source())

    return unittest.expectedFailure(test)


for _name, _row in KNOWN.items():
    setattr(KnownTest, f"test_{_name}", _known(_row))


def longtest(part: int, kind: st.SearchStrategy[Generated]) -> Callable[[unittest.TestCase], None]:
    """A test of 5,000 programs from 10 seeds of their own."""

    def test(self: unittest.TestCase) -> None:
        outcomes: collections.Counter[Outcome] = collections.Counter()
        for first in range(10 * part, 10 * part + 10):
            outcomes += run(500, first, kind)
        print(f"seeds {10 * part} to {10 * part + 9}: {statistic(outcomes)}")

    return test


@unittest.skipUnless(SLOW, "set PYTORCH_TEST_WITH_SLOW=1")
class LongRunTest(unittest.TestCase):
    """100,000 programs in parts of 5,000; a part can be run alone, and again."""


@unittest.skipUnless(SLOW, "set PYTORCH_TEST_WITH_SLOW=1")
class WideLongRunTest(unittest.TestCase):
    """The same of wide programs."""


for _part in range(20):
    setattr(LongRunTest, f"test_part_{_part:02}", longtest(_part, programs))
    setattr(WideLongRunTest, f"test_part_{_part:02}", longtest(_part, wide_programs))


if __name__ == "__main__":
    unittest.main()
