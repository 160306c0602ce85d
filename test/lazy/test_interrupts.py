# Owner(s): ["oncall: jit"]

"""A signal may come at any moment: a capture or a call has happened as a whole, or not at all.

Signals are sent at counted events: before a line of the package or of the program, and at the N-th
operator. The first run counts the events of an undisturbed one; then each of them, or every so many
of them, is hit once. So the moments are the same on every machine, at every load.
"""

from __future__ import annotations

import _thread
import contextlib
import gc
import os
import random
import signal
import sys
import threading
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Scene, _difference, surroundings
from torch import nn

import torch_lazy_ext
from torch_lazy_ext import _escapes, extract_compiled_graph

# The slow set strikes hundreds of times.
TIMES = 6 if os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1" else 1
PACKAGE = str(Path(torch_lazy_ext.__file__).parent)
HERE = __file__


class Timeout(Exception):
    """What a handler of one's own may raise: no BaseException alone."""


@contextlib.contextmanager
def handler(number: int, raises: Callable[[], BaseException] | None) -> Iterator[list[int]]:
    """A handler of a signal, which notes that it ran; the list it notes that in."""
    ran: list[int] = []

    def handle(_number: int, _frame: Any) -> None:
        ran.append(1)
        if raises is not None:
            raise raises()

    before = signal.signal(number, handle)
    try:
        yield ran
    finally:
        signal.signal(number, before)


class Events:
    """Counts lines of the package and of this file, and sends a signal before one of them.

    Args:
        at: before which one; -1 for none.
    """

    def __init__(self, at: int = -1, number: int = signal.SIGINT) -> None:
        self.count = 0
        self._at = at
        self._number = number

    def __enter__(self) -> Events:
        sys.settrace(self._called)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)

    def _called(self, frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if name.startswith(PACKAGE) or name == HERE else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_code is not Events.__exit__.__code__:
            if self.count == self._at:
                self.count += 1
                _thread.interrupt_main(self._number)
            else:
                self.count += 1
        return self._line


def patched() -> dict[str, Any]:
    """Attributes of PyTorch that a capture replaces for its time, and what it sets in Python."""
    owners = (torch, torch.Tensor, torch.random, torch.func, torch.autograd, nn.Module)
    owners += (torch.optim.Optimizer, torch.optim.SGD, torch.optim.Adam, torch.autograd.graph)
    names = {f"{o.__name__}.{k}": id(v) for o in owners for k, v in list(vars(o).items())}
    names["handlers"] = id(signal.getsignal(signal.SIGTERM))
    names["profile"] = id(sys.getprofile())
    names["frozen"] = gc.get_freeze_count() >= _escapes.FROZEN_BY_PYTHON
    return names


class Model(nn.Module):
    """Reads and writes state of each kind, looks at its data, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.last: torch.Tensor | None = None
        self.log: list[int] = []
        self.table = {"n": 0}

    def forward(self, x: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        self.table["n"] += 0
        with torch.no_grad():
            options["seen"] = x.sum()
        y = F.dropout(self.norm(self.linear(x)), 0.5)
        if y.sum() > 1000:
            y = -y
        x.data.mul_(2)
        self.last = y.detach()
        return {"y": y, "first": y[0], "options": options}


class Step:
    """A training step."""

    def __init__(self) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)

    def __call__(self, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(x).pow(2).sum()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


PROGRAMS: dict[str, Callable[[], Any]] = {"model": Model, "step": Step}


def made(name: str) -> Any:
    torch.manual_seed(1)
    return PROGRAMS[name]()


def arguments(i: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(4, 3, generator=generator), {"k": 1}


class InterruptTest(unittest.TestCase):
    def setUp(self) -> None:
        for name in PROGRAMS:  # what a first capture imports, and learns
            extract_compiled_graph(made(name), arguments())(*arguments())

    def assert_capture_works(self) -> None:
        """In this thread, and in another one: no lock is held, and nothing is left of a capture."""

        def capture() -> None:
            graph = extract_compiled_graph(lambda x: x.tolist() and x + 1, (torch.ones(2),))
            found.append(graph(torch.ones(2)).tolist())

        found: list[list[float]] = []
        capture()
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join()
        self.assertEqual(found, [[2.0, 2.0]] * 2)

    def sampled(self, count: int, wanted: int) -> list[int]:
        """Some of `count` events, the same ones on each run."""
        return sorted(random.Random(7).sample(range(count), min(wanted, count)))

    def check_captures(self, name: str, raises: Callable[[], BaseException], wanted: int) -> None:
        with Events() as events:
            extract_compiled_graph(made(name), arguments())
        self.assertGreater(events.count, 200)
        struck = 0
        handling = signal.getsignal(signal.SIGINT)
        for at in self.sampled(events.count, wanted):
            program, given = made(name), arguments()
            scene = Scene(program=program, arguments=given)
            scene.remember()
            state, around, names = scene.observe(), surroundings(), patched()
            threads = threading.active_count()
            with handler(signal.SIGINT, raises) as ran:
                caught: BaseException | None = None
                try:
                    with Events(at):
                        extract_compiled_graph(program, given)
                except BaseException as e:
                    caught = e
            if ran:
                struck += 1
                self.assertIs(type(caught), type(raises()), f"at {at}: {caught!r}")
            difference = _difference(state, scene.observe(), exact=True, compare_values=True)
            self.assertIsNone(difference, f"at {at}")
            self.assertEqual(around, surroundings(), f"at {at}")
            self.assertEqual(names, patched(), f"at {at}")
            self.assertEqual(threads, threading.active_count())
            self.assertIs(signal.getsignal(signal.SIGINT), handling)
        self.assertGreater(struck, wanted * 0.9)
        self.assert_capture_works()

    def test_captures(self) -> None:
        self.check_captures("model", KeyboardInterrupt, 30 * TIMES)

    def test_captures_of_a_step(self) -> None:
        self.check_captures("step", SystemExit, 15 * TIMES)

    def test_captures_end_by_an_error(self) -> None:
        self.check_captures("model", Timeout, 15 * TIMES)

    def check_calls(self, name: str, raises: Callable[[], BaseException], wanted: int) -> None:
        """Each call, before or after the first, has happened as in eager, or not at all."""
        graph = extract_compiled_graph(made(name), arguments())
        with Events() as events:
            graph(*arguments())
        with Events() as replayed:
            graph(*arguments())
        happened = []
        for first in (True, False):
            count = (events if first else replayed).count
            for at in self.sampled(count, wanted):
                programs = made(name), made(name)
                graph = extract_compiled_graph(programs[1], arguments())
                if not first:
                    for function in (programs[0], graph):
                        torch.manual_seed(3)
                        function(*arguments(1))
                scenes = [Scene(program=p, arguments=None) for p in programs]
                given = arguments(2), arguments(2)
                for scene, own in zip(scenes, given):
                    scene.roots["arguments"] = own
                    scene.remember()
                torch.manual_seed(5)
                names = patched()
                before, rng = scenes[0].observe(), torch.get_rng_state()
                caught: BaseException | None = None
                with handler(signal.SIGINT, raises):
                    try:
                        with Events(at):
                            graph(*given[1])
                    except BaseException as e:
                        caught = e
                rng_after = torch.get_rng_state()
                if caught is not None:
                    self.assertIs(type(caught), type(raises()), f"at {at}: {caught!r}")
                self.assertEqual(names, patched(), f"at {at}")
                now = scenes[1].observe()
                unchanged = _difference(before, now, exact=True, compare_values=True) is None
                if unchanged:
                    self.assertIsNotNone(caught, f"at {at}")
                    self.assertTrue(torch.equal(rng, rng_after), f"at {at}")
                else:
                    torch.manual_seed(5)
                    programs[0](*given[0])
                    want = scenes[0].observe()
                    self.assertIsNone(
                        _difference(want, now, exact=True, compare_values=True), f"at {at}"
                    )
                    self.assertTrue(torch.equal(torch.get_rng_state(), rng_after), f"at {at}")
                happened.append(not unchanged)
                for function in (programs[0], graph):
                    torch.manual_seed(6)
                    function(*arguments(4))
        self.assertIn(True, happened)
        self.assert_capture_works()

    def test_calls(self) -> None:
        self.check_calls("model", KeyboardInterrupt, 15 * TIMES)

    def test_calls_of_a_step(self) -> None:
        self.check_calls("step", Timeout, 10 * TIMES)

    # ------------------------------------------------------------ at an operator, by a hook

    def test_interrupt_in_the_program(self) -> None:
        for raises in (KeyboardInterrupt, SystemExit, GeneratorExit, Timeout):
            with self.subTest(raises.__name__), handler(signal.SIGUSR1, raises):

                def program(x: torch.Tensor) -> torch.Tensor:
                    y = x + 1
                    signal.raise_signal(signal.SIGUSR1)
                    return y * 2

                with self.assertRaises(raises):
                    extract_compiled_graph(program, (torch.ones(2),))
                self.assert_capture_works()

    def test_program_that_catches_everything(self) -> None:
        """A signal does not send the program another way: it is captured anew."""
        sent: list[int] = []

        def program(x: torch.Tensor) -> torch.Tensor:
            try:
                if not sent:
                    sent.append(1)
                    signal.raise_signal(signal.SIGUSR1)
                return x + 1
            except BaseException:
                return x + 2

        with handler(signal.SIGUSR1, Timeout), self.assertRaises(Timeout):
            extract_compiled_graph(program, (torch.ones(2),))

    def test_handler_that_raises_nothing(self) -> None:
        """The capture is made anew, with the handler's changes in the state it begins with."""
        model = Model()
        noted: list[int] = []

        def note(_number: int, _frame: Any) -> None:
            noted.append(1)
            model.table["n"] += 1

        def program(x: torch.Tensor) -> torch.Tensor:
            if not noted:
                signal.raise_signal(signal.SIGUSR1)
            return x * 2

        before = signal.signal(signal.SIGUSR1, note)
        try:
            graph = extract_compiled_graph(program, (torch.ones(2),))
        finally:
            signal.signal(signal.SIGUSR1, before)
        self.assertEqual(model.table["n"], 1)
        self.assertEqual(graph(torch.ones(2)).tolist(), [2.0, 2.0])

    def test_signal_at_each_attempt(self) -> None:
        """A timer that is faster than a capture does not keep it from its end."""

        def program(x: torch.Tensor) -> torch.Tensor:
            signal.raise_signal(signal.SIGUSR1)
            return x * 2

        with handler(signal.SIGUSR1, None) as ran:
            graph = extract_compiled_graph(program, (torch.ones(2),))
            self.assertGreater(len(ran), 1)
            self.assertEqual(graph(torch.ones(2)).tolist(), [2.0, 2.0])

    def test_flags_and_other_handlers_stay(self) -> None:
        numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
        with handler(signal.SIGUSR1, None):
            before = [signal.getsignal(n) for n in numbers]
            extract_compiled_graph(lambda x: x + 1, (torch.ones(2),))
            self.assertEqual(before, [signal.getsignal(n) for n in numbers])

    def test_exit_in_a_custom_operator(self) -> None:
        """What is no error leaves as itself, also through shape inference."""
        for raises in (SystemExit, KeyboardInterrupt):
            name = f"torch_lazy_ext_test::exits_{raises.__name__.lower()}"

            @torch.library.custom_op(name, mutates_args=())
            def exits(x: torch.Tensor) -> torch.Tensor:
                return x.clone()

            @exits.register_fake
            def _(x: torch.Tensor, raises: type[BaseException] = raises) -> torch.Tensor:
                raise raises

            with self.subTest(raises.__name__), self.assertRaises(raises):
                extract_compiled_graph(lambda x: exits(x) * 2, (torch.ones(2),))
            self.assert_capture_works()

    def test_exit_in_a_hook(self) -> None:
        for raises in (SystemExit, KeyboardInterrupt):
            model = nn.Linear(2, 2)

            def hook(*_: Any, raises: type[BaseException] = raises) -> None:
                raise raises

            model.register_forward_hook(hook)
            names = patched()
            with self.assertRaises(raises):
                extract_compiled_graph(model, (torch.ones(2),))
            self.assertEqual(names, patched())

    # ------------------------------------------------------------ in a kernel, or a compiler

    def test_compiler_is_interrupted(self) -> None:
        """The call has not begun; the next one compiles."""
        sent: list[int] = []

        def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            sent.append(1)
            if len(sent) == 1:
                signal.raise_signal(signal.SIGUSR1)
            return module

        for raises in (KeyboardInterrupt, Timeout):
            with self.subTest(raises.__name__), handler(signal.SIGUSR1, raises):
                sent.clear()
                x = torch.ones(2)
                graph = extract_compiled_graph(lambda x: x.mul_(2), (x,), backend=backend)
                with self.assertRaises(raises):
                    graph(x)
                self.assertEqual(x.tolist(), [1.0, 1.0])
                graph(x)
                self.assertEqual(x.tolist(), [2.0, 2.0])
                self.assertEqual(len(graph.specializations), 1)
                self.assertEqual(len(sent), 2)

    def test_handler_while_a_compiler_runs(self) -> None:
        """It raises nothing: the call begins anew."""
        sent: list[int] = []

        def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            sent.append(1)
            signal.raise_signal(signal.SIGUSR1)
            return module

        with handler(signal.SIGUSR1, None) as ran:
            x = torch.ones(2)
            graph = extract_compiled_graph(lambda x: x.mul_(2), (x,), backend=backend)
            graph(x)
        self.assertEqual(x.tolist(), [2.0, 2.0])
        self.assertGreater(len(ran), 1)

    def test_error_of_a_handler_in_a_kernel(self) -> None:
        """It is none of the program's, which would make the call run eagerly."""
        armed = [False]

        @torch.library.custom_op("torch_lazy_ext_test_interrupts::signals", mutates_args=())
        def signals(x: torch.Tensor) -> torch.Tensor:
            if armed[0]:
                armed[0] = False
                signal.raise_signal(signal.SIGUSR1)
            return x.clone()

        @signals.register_fake
        def _(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(x)

        programs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "without effects": lambda x: signals(x) * torch.rand(2),
            "with effects": lambda x: x.mul_(signals(x)) * torch.rand(2),
            "that looks": lambda x: signals(x) if signals(x).sum() > 0 else x,
        }
        for name, program in programs.items():
            for backend in ("torchscript", "fx"):
                for first in (True, False):
                    with (
                        self.subTest(name, backend=backend, first=first),
                        handler(signal.SIGUSR1, Timeout),
                    ):
                        graph = extract_compiled_graph(program, (torch.ones(2),), backend=backend)
                        if not first:
                            graph(torch.ones(2))
                        armed[0] = True
                        with self.assertRaises(Timeout):
                            graph(torch.ones(2))
                        self.assertNotIn("eagerly", graph.explain())

    def test_derivatives(self) -> None:
        """The capture of a derivative, in a backward with create_graph."""
        weight = torch.ones(2, requires_grad=True)

        def program(x: torch.Tensor) -> torch.Tensor:
            return (weight * x).sin() * torch.rand(2)

        def derive(result: torch.Tensor, events: Events) -> torch.Tensor:
            with events:
                return torch.autograd.grad(
                    result.sum(), weight, create_graph=True, retain_graph=True
                )[0]

        def called() -> torch.Tensor:
            graph = extract_compiled_graph(program, (torch.ones(2),))
            torch.manual_seed(3)
            return graph(torch.ones(2))

        events = Events()
        torch.manual_seed(3)
        want = derive(program(torch.ones(2)), Events())
        derive(called(), events)
        struck = 0
        for at in self.sampled(events.count, 12 * TIMES):
            with handler(signal.SIGINT, Timeout) as ran:
                result = called()
                rng, names = torch.get_rng_state(), patched()
                try:
                    derive(result, Events(at))
                except Timeout:
                    struck += 1
                self.assertTrue(ran)
                self.assertTrue(torch.equal(rng, torch.get_rng_state()), f"at {at}")
                self.assertEqual(names, patched(), f"at {at}")
                self.assertTrue(torch.equal(derive(result, Events()), want))
        self.assertGreater(struck, 0)

    def test_several_signals(self) -> None:
        """Each handler runs, also when another one has raised."""
        ran: list[int] = []

        def note(number: int, _frame: Any) -> None:
            ran.append(number)
            raise Timeout

        numbers = (signal.SIGUSR1, signal.SIGUSR2)
        before = [signal.signal(n, note) for n in numbers]

        def program(x: torch.Tensor) -> torch.Tensor:
            if not ran:
                try:
                    signal.raise_signal(numbers[0])
                finally:
                    signal.raise_signal(numbers[1])
            return x * 2

        caught = 0
        try:
            try:
                try:
                    extract_compiled_graph(program, (torch.ones(2),))
                except Timeout:
                    caught += 1
                for _ in range(10):  # the interpreter looks for signals here
                    pass
            except Timeout:
                caught += 1
            self.assertEqual(sorted(ran), sorted(numbers))
            self.assertGreater(caught, 0)
        finally:
            for number, old in zip(numbers, before):
                signal.signal(number, old)

    def test_timer(self) -> None:
        """At moments of the clock's choosing: whatever comes, what is captured is right."""
        model = nn.Linear(2, 2)
        expected = model(torch.ones(2)).detach()
        names, around = patched(), surroundings()
        chance = random.Random(3)
        armed = [False]

        def handle(_number: int, _frame: Any) -> None:
            if armed[0]:
                raise Timeout

        before = signal.signal(signal.SIGALRM, handle)
        try:
            for _ in range(100 * TIMES):
                try:
                    armed[0] = True
                    signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 4e-3))
                    graph = extract_compiled_graph(model, (torch.ones(2),))
                    result = graph(torch.ones(2)).detach()
                    armed[0] = False
                    self.assertTrue(torch.equal(result, expected))
                except Timeout:
                    armed[0] = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.assertEqual(names, patched())
        self.assertEqual(around, surroundings())
        self.assert_capture_works()


if __name__ == "__main__":
    unittest.main()
