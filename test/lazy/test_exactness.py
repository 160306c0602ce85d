# Owner(s): ["oncall: jit"]

"""How far native code is from eager's kernels: tools/exactness, and what docs/exactness.md says.

The sweep itself is slow: `PYTORCH_TEST_WITH_SLOW=1 python test/lazy/test_exactness.py SweepTest`.
"""

import math
import os
import re
import sys
import unittest
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from tools.exactness.__main__ import chosen, table  # noqa: E402
from tools.exactness.compare import Difference, compare  # noqa: E402
from tools.exactness.items import Item, collect  # noqa: E402
from tools.exactness.sweep import Outcome, sweep  # noqa: E402
from torch_lazy_ext import _exact  # noqa: E402

PAGE = (ROOT / "docs" / "exactness.md").read_text()
SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"


class CompareTest(unittest.TestCase):
    def test_equal(self) -> None:
        x = torch.tensor([1.0, -0.0, math.inf, math.nan])
        self.assertEqual(compare(x, x.clone()), Difference())

    def test_what_may_not_differ(self) -> None:
        for eager, ours, what in (
            (math.nan, 1.0, "NaN"),
            (math.inf, -math.inf, "infinities"),
            (math.inf, 3e38, "infinities"),
            (0.0, -0.0, "signs of zeros"),
        ):
            with self.subTest(what):
                found = compare(torch.tensor([1.0, eager]), torch.tensor([1.0, ours]))
                self.assertIn(what, found.wrong)
                self.assertIn("(1,)", found.wrong)
        self.assertIn("integers", compare(torch.tensor([1]), torch.tensor([2])).wrong)
        self.assertTrue(compare(torch.tensor([1]), torch.tensor([1.0])).wrong)
        self.assertTrue(compare(torch.ones(2), torch.ones(2, 1)).wrong)

    def test_rounding(self) -> None:
        one = torch.tensor([1.0, -1.0, 4.0])
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            x = one.to(dtype)
            up = x * (1 + torch.finfo(dtype).eps)
            found = compare(x, up)
            self.assertEqual((found.wrong, found.ulps), ("", 1), dtype)
            self.assertAlmostEqual(found.error, 1.0)
        across = compare(torch.tensor([1e-37, 1.0]), torch.tensor([-1e-37, 1.0]))
        self.assertGreater(across.ulps, 1 << 24)
        self.assertLess(across.error, 1e-6)


class PageTest(unittest.TestCase):
    def test_kernels(self) -> None:
        """The operators that keep eager's kernel are those of the code, with the reasons there."""
        rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|$", PAGE, re.MULTILINE))
        self.assertEqual(rows, _exact.KERNELS)

    def test_table(self) -> None:
        add, exp = torch.ops.aten.add.Tensor, torch.ops.aten.exp.default
        x = torch.ones(2)
        outcomes = [
            Outcome(Item(add, (x, x), {}, "one"), Difference()),
            Outcome(Item(exp, (x,), {}, "one"), Difference("", 1, 0.5)),
            Outcome(Item(exp, (x,), {}, "two"), Difference("", 3, 0.25)),
        ]
        text = table(outcomes)
        self.assertIn("Equal to the bit (1): `add.Tensor`\n", text)
        self.assertIn("| `exp` | 3 | 0.5 |", text)


@unittest.skipIf(" " in str(ROOT) + sys.prefix, "Inductor compiles nothing where paths have spaces")
class SweepTest(unittest.TestCase):
    def check(self, outcomes: list[Outcome]) -> None:
        self.assertEqual([f"{o.item}: {o.refused}" for o in outcomes if o.refused], [])
        wrong = [f"{o.item}: {o.difference.wrong}" for o in outcomes if o.difference.wrong]
        self.assertEqual(wrong, [])
        listed = set(re.findall(r"`([\w.]+)`", PAGE))
        names = {o.item.name.removeprefix("aten.").removesuffix(".default") for o in outcomes}
        self.assertEqual(names - listed, set())

    def test_some(self) -> None:
        names = {f"aten.{n}" for n in ("add.Tensor", "minimum.default", "expm1.default")}
        items = chosen(collect((torch.float32,), 1, names), 1)
        self.assertEqual({i.name for i in items}, names)
        self.check(list(sweep(items)))

    @unittest.skipUnless(SLOW, "set PYTORCH_TEST_WITH_SLOW=1")
    def test_all(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.check(list(sweep(chosen(collect((torch.float32,), 1), 1), 64)))


if __name__ == "__main__":
    unittest.main()
