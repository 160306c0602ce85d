# Owner(s): ["oncall: jit"]

"""Every entry of PyTorch's operator database: captured on one set of values, replayed on another.

`-k '*.test_add'` runs the entry `add`. The slow set takes all samples and all dtypes of an entry.
"""

import os
import re
import unittest
import warnings
from collections.abc import Callable

import torch
from opinfo import ENTRIES, check_entry, supported_dtypes

TEST_WITH_SLOW = os.getenv("PYTORCH_TEST_WITH_SLOW") == "1"

# Entries that the capture refuses with an ExtractionError, with the reason. No other failure can be
# expected: a result that differs from eager fails the test of a listed entry, too.
EXPECTED_FAILURES: dict[str, str] = {
    "sparse.mm.reduce": "takes a sparse tensor, which a graph cannot hold",
    "sparse.sampled_addmm": "takes a sparse tensor, which a graph cannot hold",
    "to_sparse": "returns a sparse tensor, which a graph cannot hold",
}

# Entries captured again for other values, with what depends on these. All others are captured once.
DATA_DEPENDENT: dict[str, str] = {
    "__getitem__": "a mask as index decides about the shape",
    "bincount": "the largest value decides about the shape",
    "masked_select": "the mask decides about the shape",
    "nn.functional.ctc_loss": "lengths decide about the shape of what is kept for the backward",
    "nn.functional.one_hot": "checks the range of the classes, and may count them",
    "nonzero": "values decide about the shape",
    "unique": "values decide about the shape",
    "unique_consecutive": "values decide about the shape",
}

# The same, where it takes a dtype in which random values are often equal.
DATA_DEPENDENT_DTYPES: dict[str, str] = {
    "argwhere": "values decide about the shape",
    "item": "integers decide about sizes and indices, so their value is guarded",
}


def setUpModule() -> None:
    # The tensors are small: more threads would only wait for each other.
    torch.set_num_threads(1)


def method_name(entry: str) -> str:
    """The name of an entry's test method: its full name, with `_` for what no name can hold."""
    return "test_" + re.sub(r"\W", "_", entry)


class EntryTestCase(unittest.TestCase):
    def check(self, entry: str, dtype: torch.dtype, count: int | None) -> int:
        """Check samples of an entry that is not expected to fail; see `check_entry`.

        Returns the number of captures of the sample that took most.
        """
        with warnings.catch_warnings():
            # Deprecations of what the database uses.
            warnings.simplefilter("ignore")
            captures, refusals = check_entry(ENTRIES[entry], dtype, count)
        if entry in EXPECTED_FAILURES:
            self.assertTrue(refusals, "is captured: take it from EXPECTED_FAILURES")
        elif refusals:
            raise refusals[0]
        return captures


class OpInfoTest(EntryTestCase):
    """The default set: three samples of each entry, in the first dtype that it supports."""

    def test_lists(self) -> None:
        listed = [*EXPECTED_FAILURES, *DATA_DEPENDENT, *DATA_DEPENDENT_DTYPES]
        self.assertLessEqual(set(listed), ENTRIES.keys())
        self.assertEqual(len(set(listed)), len(listed))
        self.assertEqual(len({method_name(entry) for entry in ENTRIES}), len(ENTRIES))


@unittest.skipUnless(TEST_WITH_SLOW, "slow: set PYTORCH_TEST_WITH_SLOW=1")
class OpInfoSlowTest(EntryTestCase):
    """The slow set: all samples of each entry, and one in each of its other dtypes."""


def make_test(entry: str) -> Callable[[EntryTestCase], None]:
    def test(self: EntryTestCase) -> None:
        dtypes = supported_dtypes(ENTRIES[entry])
        if not dtypes:
            self.skipTest("supports no dtype on the CPU")
        if entry in DATA_DEPENDENT:
            captures = self.check(entry, dtypes[0], None)
            self.assertGreater(captures, 1, "is captured once: take it from DATA_DEPENDENT")
        else:
            captures = self.check(entry, dtypes[0], 3)
            self.assertLessEqual(captures, 1, "is captured again for other values")

    return test


def make_slow_test(entry: str) -> Callable[[EntryTestCase], None]:
    def test(self: EntryTestCase) -> None:
        for i, dtype in enumerate(supported_dtypes(ENTRIES[entry])):
            with self.subTest(dtype=dtype):
                captures = self.check(entry, dtype, None if i == 0 else 1)
                if entry not in DATA_DEPENDENT and entry not in DATA_DEPENDENT_DTYPES:
                    self.assertLessEqual(captures, 1, "is captured again for other values")

    return test


for _entry in ENTRIES:
    setattr(OpInfoTest, method_name(_entry), make_test(_entry))
    setattr(OpInfoSlowTest, method_name(_entry), make_slow_test(_entry))


if __name__ == "__main__":
    unittest.main()
