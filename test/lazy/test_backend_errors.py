# Owner(s): ["oncall: jit"]

"""An error of what a backend made is not an error of the program: the graph answers the call.

Only where the graph raises, too, does the program itself decide what its error is.
"""

import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle import check, needs_inductor, tensors
from torch import Tensor, fx, nn

from torch_lazy_ext import CompiledGraph, ExtractionError, _native, extract_compiled_graph


def setUpModule() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unittest.addModuleCleanup(torch.set_num_threads, threads)


class Failing:
    """A program that raises from its call number `first` on, after it has run."""

    def __init__(self, program: Any, first: int, error: Exception) -> None:
        self.program = program
        self.first = first
        self.error = error
        self.calls = 0

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        outputs: list[Tensor] = self.program.run(inputs)
        if self.calls >= self.first:
            raise self.error
        return outputs


@contextmanager
def failing_code(first: int, error: Exception) -> Iterator[list[Failing]]:
    """Native code raises from call `first` on: an assertion of Inductor's, say."""
    from torch_lazy_ext import _C

    made: list[Failing] = []
    plain = _native.Code.program

    def program(self: _native.Code) -> Any:
        made.append(Failing(plain(self), first, error))
        return _C.PythonProgram(made[-1])

    with unittest.mock.patch.object(_native.Code, "program", program):
        yield made


def reasons(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "stays on TorchScript" in str(w.message)]


# What an error of a backend could be taken for.
ERRORS = (
    RuntimeError("planted"),
    IndexError("planted"),
    ValueError("planted"),
    AssertionError("planted"),
    KeyError("planted"),
    StopIteration("planted"),
    NotImplementedError("planted"),
    ExtractionError("planted"),
)


@needs_inductor
class NativeTest(unittest.TestCase):
    """Code that fails at its first call, or later."""

    def check(self, program: Callable[..., Any], inputs: Any, first: int, error: Exception) -> None:
        with warnings.catch_warnings(record=True) as caught, failing_code(first, error) as made:
            warnings.simplefilter("always")
            graph = check(lambda: program, inputs, 4, options={"backend": "inductor"})
        self.assertEqual([f.calls for f in made], [first])
        (reason,) = reasons(caught)
        self.assertIn("planted", reason)
        self.assertIn("planted", graph.explain())
        self.assertNotIn("eagerly", graph.explain())

    def test_errors(self) -> None:
        for first in (1, 3):
            for error in ERRORS:
                with self.subTest(first=first, error=type(error).__name__):
                    self.check(lambda x: x * 2 - 1, tensors((4,)), first, error)

    def test_random_numbers(self) -> None:
        """Those that the code has drawn are drawn again."""
        for first in (1, 3):
            with self.subTest(first):
                self.check(
                    lambda x: nn.functional.dropout(x, 0.5) + torch.rand(4),
                    tensors((4,)),
                    first,
                    RuntimeError("planted"),
                )

    def test_writes(self) -> None:
        def program(x: Tensor) -> Tensor:
            x.mul_(2)
            return x + 1

        for first in (1, 3):
            with self.subTest(first):
                self.check(program, tensors((4,)), first, RuntimeError("planted"))

    def test_not_loaded(self) -> None:
        def missing(_self: Any) -> Any:
            raise RuntimeError("planted")

        with (
            warnings.catch_warnings(record=True) as caught,
            unittest.mock.patch.object(_native.Code, "program", missing),
        ):
            warnings.simplefilter("always")
            check(lambda: torch.sin, tensors((4,)), options={"backend": "inductor"})
        self.assertIn("planted", reasons(caught)[0])

    def test_backward(self) -> None:
        with warnings.catch_warnings(record=True), failing_code(2, RuntimeError("planted")):
            weight = torch.randn(4, requires_grad=True)
            graph = extract_compiled_graph(
                lambda x: (x * weight).sin(), (torch.randn(4),), backend="inductor"
            )
            for _ in range(4):
                x = torch.randn(4)
                result = graph(x)
                torch.testing.assert_close(result, (x * weight).sin())
                (gradient,) = torch.autograd.grad(result.sum(), weight)
                torch.testing.assert_close(gradient, (x * weight).cos() * x)
        (variant,) = graph.specializations
        self.assertEqual(variant.hits, 4)

    def test_an_interrupt_is_no_error(self) -> None:
        for first in (1, 2):
            with (
                self.subTest(first),
                torch.no_grad(),
                failing_code(first, KeyboardInterrupt()),
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always")
                x = torch.randn(4)
                graph = extract_compiled_graph(lambda x: x * 3, (x,), backend="inductor")
                for _ in range(first):
                    graph(x)
                with self.assertRaises(KeyboardInterrupt):
                    graph(x)
                self.assertEqual(graph.specializations[0].backend, "inductor")
                self.assertEqual(reasons(caught), [])


@needs_inductor
class UpdateTest(unittest.TestCase):
    """A training step's update writes in place."""

    def graph(self) -> tuple[CompiledGraph, nn.Linear, Tensor]:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        x = torch.ones(2, 3)

        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = module(x).sum()
            loss.backward()
            optimizer.step()
            return loss

        return extract_compiled_graph(step, (x,), backend="inductor"), module, x

    def expected(self, calls: int) -> Tensor:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(calls):
            optimizer.zero_grad()
            module(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        return module.weight.detach()

    def test_first_run(self) -> None:
        """What the code has written is taken back before the graph writes."""
        with warnings.catch_warnings(record=True), failing_code(1, RuntimeError("planted")):
            graph, module, x = self.graph()
            for _ in range(4):
                graph(x)
        torch.testing.assert_close(module.weight.detach(), self.expected(4))

    def test_later(self) -> None:
        """Half an update is no answer, and nothing can be tried again: an error that says so."""
        with warnings.catch_warnings(record=True), failing_code(2, RuntimeError("planted")) as made:
            graph, _module, x = self.graph()
            with self.assertRaisesRegex(ExtractionError, "inductor made of an update in place"):
                for _ in range(6):
                    graph(x)
                    for failing in made:  # of the gradients: these are as they were
                        failing.first = 2 if failing is made[-1] and len(made) > 1 else 1000
        self.assertGreater(len(made), 1)


@needs_inductor
class ProgramErrorTest(unittest.TestCase):
    """An error that the data makes is the program's own, in eager's words, also from native code."""

    def test_index(self) -> None:
        def inputs(i: int) -> tuple[Tensor, Tensor]:
            return torch.randn(4, 3), torch.tensor([0, 7 if i == 2 else 3])

        for program in (lambda x, i: x[i] * 2, lambda x, i: x.index_select(0, i) + 1):
            check(lambda p=program: p, inputs, 4, options={"backend": "inductor"})

    def test_number(self) -> None:
        """Python raises for a division by zero, and native code has a check for it."""

        def program(x: Tensor, y: Tensor) -> Tensor:
            return x * (1 / y.item())

        def inputs(i: int) -> tuple[Tensor, Tensor]:
            return torch.randn(4), torch.tensor(0.0 if i == 2 else float(i + 1))

        check(lambda: program, inputs, 4, options={"backend": "inductor"})

    def test_number_that_python_takes(self) -> None:
        """The check sees an infinity, and Python raises nothing: the graph answers."""

        def program(x: Tensor, y: Tensor) -> Tensor:
            return x * (y.item() / 2)

        def inputs(i: int) -> tuple[Tensor, Tensor]:
            return torch.randn(4), torch.tensor(float("inf") if i == 2 else float(i + 1))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = check(lambda: program, inputs, 4, options={"backend": "inductor"})
        self.assertEqual(reasons(caught), [])
        self.assertEqual(graph.specializations[0].backend, "inductor")


class CallableTest(unittest.TestCase):
    """A backend of the user's own that raises when it runs."""

    def test_errors(self) -> None:
        for error in ERRORS[:4]:
            calls: list[int] = []

            def broken(
                module: fx.GraphModule,
                _inputs: list[Tensor],
                error: Exception = error,
                calls: list[int] = calls,
            ) -> Callable[..., Any]:
                def run(*args: Tensor) -> Any:
                    calls.append(1)
                    if len(calls) > 1:
                        raise error
                    return module(*args)

                return run

            with self.subTest(type(error).__name__), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                graph = check(
                    lambda: lambda x: x * 2, tensors((4,)), 4, options={"backend": broken}
                )
                self.assertIn("the backend broken fails on it: planted", reasons(caught)[0])
                self.assertEqual(len(reasons(caught)), 1)
                self.assertEqual(len(calls), 2)
                self.assertIn("on torchscript (planted)", graph.explain())

    def test_of_the_program(self) -> None:
        def inputs(i: int) -> tuple[Tensor, Tensor]:
            return torch.randn(4, 3), torch.tensor([0, 7 if i == 2 else 3])

        def interpreting(module: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
            return lambda *args: fx.Interpreter(module).run(*args)

        for backend in ("fx", interpreting):
            check(lambda: lambda x, i: x[i] * 2, inputs, 4, options={"backend": backend})


if __name__ == "__main__":
    unittest.main()
