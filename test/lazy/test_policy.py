# Owner(s): ["oncall: jit"]

"""Programs that are never twice the same: captured a number of times, and then run eagerly."""

import itertools
import unittest
import unittest.mock
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_lazy_ext import _policy, extract_compiled_graph


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return x * self.step


def clock(step: float) -> Any:
    """Time that goes on by `step` seconds each time that it is looked at."""
    times = iter(range(10**9))
    return unittest.mock.patch.object(_policy, "now", lambda: next(times) * step)


class GraphTest(unittest.TestCase):
    def calls(
        self, program: Callable[..., Any], eager: Callable[..., Any], arguments: list[Any]
    ) -> tuple[Any, list[str]]:
        """The graph after these calls, each compared with eager, and what it warned of."""
        with clock(1e-3), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = extract_compiled_graph(program, arguments[0])
            for args in arguments:
                self.assertEqual(graph(*args).tolist(), eager(*args).tolist())
        return graph, [str(w.message) for w in caught]

    def test_counter(self) -> None:
        program, eager = Counting(), Counting()
        graph, messages = self.calls(program, eager, [(torch.ones(2),)] * 300)
        self.assertEqual(program.step, eager.step)
        self.assertLess(graph._policy.captures, 40)
        self.assertEqual(len(messages), 1)
        self.assertIn("`step`: 32 values in 32 captures (31, 30, 29, ...)", messages[0])
        answered = sum(s.hits for s in graph.specializations)
        told = [line for line in graph.explain().splitlines() if "captures did not pay" in line]
        self.assertEqual(len(told), 1)
        self.assertEqual(int(told[0].split()[0]) + answered + graph._dropped_hits, 300)

    def test_number_as_argument(self) -> None:
        x = torch.ones(3)
        _graph, messages = self.calls(
            lambda x, n: x * n, lambda x, n: x * n, [(x, i) for i in range(200)]
        )
        self.assertEqual(len(messages), 1)
        self.assertIn("argument `n`: 32 values in 32 captures (31, 30, 29, ...)", messages[0])

    def test_lengths(self) -> None:
        def program(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return batch["ids"] * len(batch["ids"])

        arguments = [({"ids": torch.ones(1 + i)},) for i in range(200)]
        _graph, messages = self.calls(program, program, arguments)
        self.assertEqual(len(messages), 1)
        self.assertIn(
            "argument `batch.ids`: 32 values in 32 captures (float32[32], float32[31], ",
            messages[0],
        )

    def test_arguments_of_a_module(self) -> None:
        class Cropped(nn.Module):
            def forward(self, x: torch.Tensor, to: int) -> torch.Tensor:
                return x[:to] * 2

        module = Cropped()
        x = torch.ones(200)
        _graph, messages = self.calls(module, module, [(x, 1 + i) for i in range(100)])
        self.assertIn("argument `to`: 32 values in 32 captures", messages[0])
        arguments = [(torch.ones(1 + i), 1) for i in range(100)]
        _graph, messages = self.calls(module, module, arguments)
        self.assertIn("argument `x`: 32 values in 32 captures", messages[0])

    def test_data(self) -> None:
        def program(x: torch.Tensor) -> torch.Tensor:
            return x[: int(x.sum())]

        arguments = [((torch.arange(200) <= i).float(),) for i in range(200)]
        graph, messages = self.calls(program, program, arguments)
        self.assertLess(graph._policy.captures, 40)
        self.assertEqual(len(messages), 1)
        self.assertIn("ran eagerly: the data took a way that no variant took", graph.explain())
        self.assertNotIn("captures did not pay", graph.explain())

    def test_objects(self) -> None:
        """What has no value that could be told."""
        functions = [lambda x: x * 2 for _ in range(100)]
        arguments = [(torch.ones(2), f) for f in functions]
        _graph, messages = self.calls(lambda x, f: f(x), lambda x, f: f(x), arguments)
        self.assertEqual(len(messages), 1)
        self.assertIn("they differ in objects that are not the same ones", messages[0])

    def test_error_of_the_program(self) -> None:
        """Between calls that are not looked at, an error is the program's own."""

        def program(x: torch.Tensor, n: int) -> torch.Tensor:
            if n == 150:
                raise KeyError(n)
            return x * n

        x = torch.ones(2)
        with clock(1e-3), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = extract_compiled_graph(program, (x, 0))
            for n in range(200):
                if n == 150:
                    with self.assertRaisesRegex(KeyError, "150"):
                        graph(x, n)
                else:
                    self.assertEqual(graph(x, n).tolist(), [n, n])

    def test_comes_to_rest(self) -> None:
        """A variant that fits is found again."""
        x = torch.ones(2)
        with clock(1e-3), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = extract_compiled_graph(lambda x, n: x * n, (x, 0))
            for n in range(100):
                graph(x, n)
            before = sum(s.hits for s in graph.specializations)
            for _ in range(2000):
                self.assertEqual(graph(x, 20).tolist(), [20, 20])
        self.assertGreater(sum(s.hits for s in graph.specializations), before + 1000)

    def test_variants_that_are_kept_are_made(self) -> None:
        x = torch.ones(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            graph = extract_compiled_graph(lambda x, n: x * n, (x, 0), limit=50)
            for _ in range(3):
                for n in range(50):
                    graph(x, n)
        self.assertEqual(len(graph.specializations), 50)
        self.assertEqual(sum(s.hits for s in graph.specializations), 150)


class PolicyTest(unittest.TestCase):
    """With times of our own."""

    def exhausted(self) -> _policy.Policy:
        policy = _policy.Policy(limit=1)
        for i in range(_policy.FREE):
            policy.missed(i)
            self.assertTrue(policy.may_capture())
            policy.captured(1.0)
        policy.missed(_policy.FREE)
        self.assertFalse(policy.may_capture())
        return policy

    def tries(self, policy: _policy.Policy, look: float, seconds: float, calls: int) -> list[int]:
        """At which of these calls it captures again, though no variant ever answers."""
        found, left = [], 0
        for i in range(calls):
            if left:
                left -= 1
                continue
            policy.missed(policy.captures)
            if policy.may_capture():
                policy.captured(1.0)
                found.append(i)
            else:
                left = policy.ran_eagerly(look, seconds)
        return found

    def test_ever_more_seldom(self) -> None:
        found = self.tries(self.exhausted(), 0.0, 0.01, 40_000)
        gaps = [b - a for a, b in itertools.pairwise(found)]
        self.assertEqual(len(found), 4)
        self.assertAlmostEqual(found[0], 2000, delta=2)
        for gap, expected in zip(gaps, (4000, 8000, 16000)):
            self.assertAlmostEqual(gap, expected, delta=2)

    def test_dear_looks(self) -> None:
        """Looks that cost ten times the call are made at one of two hundred calls."""
        policy = self.exhausted()
        looks, left = 0, 0
        for i in range(20_000):
            if left:
                left -= 1
                continue
            policy.missed(policy.captures)
            if i > 500:
                looks += 1
            left = policy.ran_eagerly(0.1, 0.01)
        self.assertLessEqual(looks, 100)
        self.assertGreater(looks, 50)

    def test_cheap_looks(self) -> None:
        policy = self.exhausted()
        for _ in range(1000):
            policy.missed(policy.captures)
            self.assertEqual(policy.ran_eagerly(0.0001, 0.01), 0)

    def test_captures_that_pay(self) -> None:
        policy = self.exhausted()
        policy.missed(policy.captures + _policy.PRICE)
        self.assertTrue(policy.may_capture())
        policy.captured(1.0)
        policy.missed(policy.captures + _policy.PRICE)
        self.assertFalse(policy.may_capture())


if __name__ == "__main__":
    unittest.main()
