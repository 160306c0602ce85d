# Owner(s): ["oncall: jit"]

"""Where a program's values come from when it is not from tensors: iterators, files, queues, clocks.

They give something else at each use. A replay must do so as well, or the capture is refused; and a
capture must not have used them.
"""

import contextlib
import datetime
import functools
import gc
import io
import itertools
import logging
import os
import pathlib
import queue
import random
import secrets
import socket
import subprocess
import sys
import time
import types
import unittest
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from os import urandom
from time import perf_counter
from typing import Any

import torch
from oracle import Call, check, extract_untouched, makefunctiontest, maketest, tensors
from torch import nn
from torch.utils.data import DataLoader

from torch_lazy_ext import UnsupportedError, extract_compiled_graph

try:
    import numpy
except ImportError:
    numpy = None


def batches() -> Iterator[float]:
    yield 1.0
    yield 2.0
    yield 3.0


def filled(kind: Any) -> Any:
    made = kind()
    for i in range(3):
        made.put(float(i))
    return made


def text_file() -> Any:
    return io.TextIOWrapper(io.BytesIO(b"1.0\n2.0\n3.0\n"))


# name -> how it is made, what its refusal says.
ITERATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: iter([1.0, 2.0]), "list_iterator"),
    "reversed": (lambda: reversed([1.0, 2.0]), "list_reverseiterator"),
    "tuple": (lambda: iter((1.0, 2.0)), "tuple_iterator"),
    "dict": (lambda: iter({1.0: 2.0}), "dict_keyiterator"),
    "set": (lambda: iter({1.0, 2.0}), "set_iterator"),
    "range": (lambda: iter(range(3)), "range_iterator"),
    "generator": (batches, "generator"),
    "generator expression": (lambda: (i for i in range(3)), "generator"),
    "begun generator": (lambda: (g := batches(), next(g))[0], "generator"),
    "zip": (lambda: map(sum, zip([1.0], [2.0])), "map"),
    "enumerate": (lambda: map(sum, enumerate([1.0, 2.0])), "map"),
    "filter": (lambda: filter(None, [1.0, 2.0]), "filter"),
    "cycle": (lambda: itertools.cycle([1.0, 2.0]), "cycle"),
    "count": (itertools.count, "count"),
    "chain": (lambda: itertools.chain([1.0], batches()), "chain"),
    "sentinel": (lambda: iter(iter([1.0, 2.0]).__next__, 2.0), "callable_iterator"),
    "tensor": (lambda: iter(torch.ones(3)), "tuple_iterator|map|generator"),
    "DataLoader": (
        lambda: iter(DataLoader(torch.arange(6.0), batch_size=None)),
        "_SingleProcessDataLoaderIter",
    ),
}

# name -> how it is made, how the program uses it, what the refusal says.
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "file": (text_file, lambda f: float(f.readline()), "reads or writes a file"),
    "lines": (text_file, lambda f: float(next(f)), "reads or writes a file"),
    "text in memory": (
        lambda: io.StringIO("1\n2\n"), lambda f: float(f.read(1)), "reads or writes a file"
    ),
    "queue": (lambda: filled(queue.Queue), lambda q: q.get(), "uses a queue"),
    "stack": (lambda: filled(queue.LifoQueue), lambda q: q.get_nowait(), "uses a queue"),
    "simple queue": (lambda: filled(queue.SimpleQueue), lambda q: q.get(), "uses a queue"),
    "length of a queue": (
        lambda: filled(queue.Queue), lambda q: float(q.qsize()), "uses a queue"
    ),
    "next": (
        lambda: iter([1.0, 2.0]).__next__, lambda f: f(), "next value of an iterator"
    ),
    "send": (lambda: batches().send, lambda f: f(None), "next value of an iterator"),
    "get": (lambda: filled(queue.Queue).get, lambda f: f(), "uses a queue"),
}  # fmt: skip

RANDOM: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "random.Random": (lambda: random.Random(3), lambda r: r.random()),
    "random.Random.shuffle": (
        lambda: random.Random(3), lambda r: float(r.sample(range(100), 1)[0])
    ),
}  # fmt: skip
if numpy is not None:
    RANDOM["Generator"] = (lambda: numpy.random.default_rng(3), lambda r: float(r.random()))
    RANDOM["MT19937"] = (
        lambda: numpy.random.Generator(numpy.random.MT19937(3)), lambda r: float(r.normal())
    )  # fmt: skip
    RANDOM["RandomState"] = (lambda: numpy.random.RandomState(3), lambda r: float(r.rand()))

LINE = r"\(at .*\.py:\d+\)"
X = torch.tensor([1.0, 2.0])
shared: Any = None  # what a program finds in a global
reached: Any = None  # a function that it finds there


class Holder(nn.Module):
    def __init__(self, source: Any, use: Callable[[Any], Any]) -> None:
        super().__init__()
        self.source = source
        self.use = use

    def forward(self, x):
        return x + self.use(self.source)


class Plain:
    def __init__(self, source: Any) -> None:
        self.source = source


class Slotted:
    __slots__ = ("source",)

    def __init__(self, source: Any) -> None:
        self.source = source


def from_global(use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: x + use(shared)


def from_default(source: Any, use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def program(x, source=source):
        return x + use(source)

    return program


def from_keyword(source: Any, use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def program(x, *, source=source):
        return x + use(source)

    return program


def from_method(source: Any, use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    class Program:
        def __call__(self, x):
            return self.further(x)

        def further(self, x, source=source):
            return x + use(source)

    return Program()


def from_function_of_globals(source: Any, use: Callable[[Any], Any]) -> Callable[[Any], Any]:
    global reached

    def reached(x, source=(source,)):
        return x + use(source[0])

    return lambda x: reached(x)  # found as the program runs


def places(source: Any, use: Callable[[Any], Any]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One source in all places where a program may have it from: program and arguments."""
    global shared
    shared = source
    plain, slotted = Plain(source), Slotted(source)
    deep = {"a": [(0, (source,))]}
    return {
        "closure": (lambda x: x + use(source), (X,)),
        "global": (from_global(use), (X,)),
        "attribute of a module": (Holder(source, use), (X,)),
        "attribute": (lambda x: x + use(plain.source), (X,)),
        "slot": (lambda x: x + use(slotted.source), (X,)),
        "containers": (lambda x: x + use(deep["a"][0][1][0]), (X,)),
        "argument": (lambda x, s: x + use(s), (X, source)),
        "argument's container": (lambda x, d: x + use(d["a"][0][1][0]), (X, deep)),
        "argument's attribute": (lambda x, p: x + use(p.source), (X, plain)),
        "default": (from_default(source, use), (X,)),
        "default of a method": (from_method(source, use), (X,)),
        "in a default of a global": (from_function_of_globals(source, use), (X,)),
        "default for a keyword": (from_keyword(source, use), (X,)),
        "partial": (functools.partial(lambda s, x: x + use(s), source), (X,)),
        "keyword of a partial": (functools.partial(lambda x, s: x + use(s), s=source), (X,)),
        "partial in a closure": ((lambda p: lambda x: x + p())(functools.partial(use, source)), (X,)),
    }  # fmt: skip


class MovingSourceTest(unittest.TestCase):
    """Refused by name and line, before anything has moved, wherever the program has it from."""

    def refused(self, program: Any, args: tuple[Any, ...], pattern: str) -> None:
        _graph, error = extract_untouched(program, Call(*args))
        self.assertIsInstance(error, UnsupportedError)
        self.assertRegex(str(error), pattern)

    def everywhere(self, make: Callable[[], Any], use: Callable[[Any], Any], pattern: str) -> None:
        expected = use(make())
        for place in places(make(), use):
            with self.subTest(place=place):
                source = make()
                program, args = places(source, use)[place]
                self.refused(program, args, pattern)
                self.assertEqual(use(source), expected, "the capture moved it")

    def test_iterators(self):
        for name, (make, kind) in ITERATORS.items():
            with self.subTest(name):
                self.everywhere(
                    make, next, f"takes the next value of an iterator .* of type ({kind}) {LINE}"
                )

    def test_others(self):
        for name, (make, use, what) in OTHERS.items():
            with self.subTest(name):
                self.everywhere(make, use, f"the program .*{what} .* {LINE}")

    def test_random_generators(self):
        for name, (make, use) in RANDOM.items():
            with self.subTest(name):
                self.everywhere(make, use, "draws numbers from .*, a .*, which a replay would not")

    def test_come_by_only_then(self):
        """In the state of functions that the program's own does not lead to."""
        hidden = types.ModuleType("hidden_by_its_name")
        exec("def use(x):\n    return x + next(source)\n", vars(hidden))
        sys.modules[hidden.__name__] = hidden
        self.addCleanup(sys.modules.pop, hidden.__name__)

        def closed_over(source):
            return lambda x: x + next(source)

        for place in ("a global", "a closure"):
            with self.subTest(place):
                source = itertools.count(1)
                if place == "a global":
                    hidden.source, name = source, "use"
                else:
                    hidden.inner, name = closed_over(source), "inner"

                def program(x, name=name):
                    return vars(sys.modules["hidden_" + "by_its_name"])[name](x)

                self.refused(program, (X,), "next value of an iterator that was there before it")
                self.assertEqual(next(source), 1)

    def test_come_by_in_a_backward(self):
        source = itertools.count(1)

        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, gradient):
                return gradient * next(source)

        x = torch.ones(2, requires_grad=True)
        self.refused(Scaled.apply, (x,), "next value of an iterator that was there before it")
        self.refused(
            lambda x: torch.autograd.grad(Scaled.apply(x).sum(), x),
            (x,),
            "next value of an iterator",
        )
        self.assertEqual(next(source), 1)

    def test_for_loop(self):
        def program(x):
            for value in source:
                x = x + value
            return x

        source = batches()
        self.refused(program, (X,), "that was there before it, `source`")
        self.assertEqual(list(source), [1.0, 2.0, 3.0])

    def test_uses_that_are_no_next(self):
        source = iter([1.0, 2.0])
        uses = {
            "list": lambda: len(list(source)),
            "sum": lambda: sum(source),
            "zip": lambda: sum(a + b for a, b in zip(source, [1.0])),
            "in": lambda: 2.0 in source,
            "unpacked": lambda: [*source][0],  # noqa: RUF015
            "islice": lambda: next(itertools.islice(source, 1, 2)),
            "tee": lambda: next(itertools.tee(source)[0]),
            "stack": lambda: torch.tensor(list(source)).sum(),
            "yield from": lambda: next((lambda: (yield from source))()),
        }
        for name, use in uses.items():
            with self.subTest(name):
                self.refused(lambda x, use=use: x + use(), (X,), "next value of an iterator")
        self.assertEqual(list(source), [1.0, 2.0])

    def test_program_that_catches_the_refusal(self):
        def program(x):
            try:
                return x + next(source)
            except Exception:
                return x

        source = iter([1.0, 2.0])
        self.refused(program, (X,), "next value of an iterator")

    def test_program_that_raises(self):
        """The random numbers that it drew are put back; the call draws them, as eager does."""

        def program(x, draws):
            if draws() >= 0:
                raise ValueError("mine")
            return x

        for name, (make, use) in RANDOM.items():
            with self.subTest(name):
                source = make()
                with self.assertRaisesRegex(ValueError, "mine"):
                    extract_compiled_graph(program, (X, lambda s=source, u=use: u(s)))
                self.assertEqual(use(source), use(make()))

    def test_socket(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.send(b"12")
            self.refused(
                lambda x: x + int(ours.recv(1)), (X,), f"uses a socket .*of type socket {LINE}"
            )
            self.assertEqual(ours.recv(1), b"1")


class StandInTest(unittest.TestCase):
    """What a program may do with something that moves: everything but moving it."""

    def test_looked_at(self):
        source = iter([1.0])

        def program(x):
            known = source is not None and isinstance(source, type(iter([]))) and bool(source)
            return x + known

        check(lambda: program, tensors((2,)))

    def test_returned_and_kept(self):
        """It is the thing itself that is returned, and kept."""
        source = iter([1.0, 2.0])
        kept: dict[str, Any] = {}
        holder = Plain((source, 1))

        def program(x):
            kept["it"] = source
            kept["both"] = holder.source
            return x + 1, source, {"a": (source,)}, holder.source

        graph = extract_compiled_graph(program, (X,))
        self.assertEqual(kept, {})
        self.assertIs(holder.source[0], source)
        for _ in range(3):
            _, first, second, third = graph(X)
            for found in (first, second["a"][0], third[0], kept["it"], kept["both"][0]):
                self.assertIs(found, source)
        self.assertIs(holder.source[0], source)

    def test_argument_is_another_one(self):
        graph = extract_compiled_graph(lambda x, it: (x + 1, it), (X, iter([1])))
        for _ in range(3):
            source = iter([1])
            self.assertIs(graph(X, source)[1], source)

    test_made_inside = makefunctiontest(
        lambda x: x + sum(itertools.islice(itertools.count(3), 4)) + next(iter([x])), tensors((2,))
    )
    test_random_made_inside = makefunctiontest(
        lambda x: x + random.Random(3).random(), tensors((2,))
    )
    # Its attributes are state like any other.
    test_own_class = maketest(lambda: Counted(), tensors((2,)), captures=None)

    def test_printed_to(self):
        stream = sys.stderr
        check(lambda: lambda x: x + (stream.write("") or 0) + stream.writable(), tensors((2,)))


# ------------------------------------------------------------------- asked for at each call

ROOT = pathlib.Path(__file__)
log = logging.getLogger("torch_lazy_ext_test_moving_sources")

# name -> a program that depends on what it is told, what the refusal says.
ASKED: dict[str, tuple[Callable[..., Any], str]] = {
    "product": (lambda x: x * time.time(), "clock .`time`"),
    "reference": (lambda x: x * perf_counter(), "clock .`perf_counter`"),
    "difference": (lambda x: x * (time.monotonic() - perf_counter()), "clock"),
    "branch": (lambda x: x if perf_counter() - perf_counter() > 1 else x + 1, "clock"),
    "operator": (lambda x: torch.add(x, time.time()), "clock"),
    "tensor": (lambda x: x + torch.tensor(time.process_time()), "clock"),
    "nanoseconds": (lambda x: x + time.time_ns() % 7, "clock .`time_ns`"),
    "int": (lambda x: x + int(time.time()), "clock"),
    "text": (lambda x: {f"{time.time():.1f}": x}, "clock"),
    "key": (lambda x: {time.time(): x}, "clock"),
    "result": (lambda x: (x, time.time()), "clock"),
    "attribute": (lambda x: setattr(kept, "value", time.time()), "clock"),
    "datetime": (lambda x: x + datetime.datetime.now().second, "clock .`now`"),
    "datetime reference": (lambda x: x + date.today().day, "clock .`today`"),
    "urandom": (lambda x: x + os.urandom(1)[0], "system's random numbers"),
    "urandom reference": (lambda x: x + urandom(1)[0], "system's random numbers"),
    "uuid4": (lambda x: x + uuid.uuid4().int % 5, "system's random numbers"),
    "uuid1": (lambda x: x + uuid.uuid1().int % 5, "UUID of the time"),
    "secrets": (lambda x: x + secrets.randbelow(9), "system's random numbers"),
    "SystemRandom": (lambda x: x + random.SystemRandom().random(), "system's random numbers"),
    "Random": (lambda x: x + random.Random().random(), "a seed from the system"),
    "Random.seed": (lambda x: x + seeded_again(random.Random(3)), "a seed from the system"),
    "open": (lambda x: x + len(open(ROOT).read()), "opens a file"),  # noqa: SIM115
    "pathlib": (lambda x: x + len(ROOT.read_text()), "opens a file"),
    "torch.load": (lambda x: x + torch.load(str(ROOT)), "reads a file"),
    "input": (lambda x: x + int(input()), "reads what is typed"),
}  # fmt: skip
if numpy is not None:
    ASKED["default_rng"] = (
        lambda x: x + float(numpy.random.default_rng().random()), "system's random numbers"
    )  # fmt: skip
    ASKED["numpy.load"] = (lambda x: x + numpy.load(ROOT), "opens a file")


def seeded_again(generator):
    generator.seed()
    return generator.random()


kept = Plain(None)


def timed(x):
    begin = time.time(), perf_counter()
    y = x + 1
    elapsed = (time.time() - begin[0]) * 1000 + (perf_counter() - begin[1])
    return y * 2 if elapsed is not None and isinstance(elapsed, float) else y


def warned(x):
    log.info("computes")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        warnings.warn("computes", stacklevel=2)
    return x + 1


def of_a_date(x):
    day = datetime.datetime(2020, 1, 2) - datetime.datetime(2020, 1, 1)
    return x + day.days + isinstance(date(2020, 1, 1), datetime.date)


class AskedTest(unittest.TestCase):
    def test_refused(self):
        for name, (program, what) in ASKED.items():
            with self.subTest(name):
                _graph, error = extract_untouched(program, Call(X))
                self.assertIsInstance(error, UnsupportedError)
                self.assertRegex(str(error), f"the program .*{what}.*, at .*{ROOT.name}:[0-9]+")
        self.assertEqual(vars(kept), {"source": None})

    def test_program_that_catches_the_refusal(self):
        def program(x):
            try:
                return x * time.time()
            except Exception:
                return x

        _graph, error = extract_untouched(program, Call(X))
        self.assertRegex(str(error), "reads the clock")

    # Not for the result: taken and forgotten, or by a library for itself.
    test_timed = makefunctiontest(timed, tensors((2,)))
    test_warned = makefunctiontest(warned, tensors((2,)))
    test_date_of_numbers = makefunctiontest(of_a_date, tensors((2,)))
    test_seeded = makefunctiontest(lambda x: x + random.Random(x=3).random(), tensors((2,)))

    def test_callback_of_the_collector(self):
        """It runs at moments that are none of the program's."""

        def program(x):
            gc.collect()
            return x + 1

        gc.callbacks.append(lambda phase, info: time.perf_counter() > 0)
        try:
            graph = extract_compiled_graph(program, (X,))
        finally:
            del gc.callbacks[-1]
        self.assertEqual(graph(X).tolist(), (X + 1).tolist())

    def test_functions_are_back(self):
        before = (
            time.time,
            os.urandom,
            open,
            input,
            io.open,
            datetime.datetime,
            random.Random.seed,
        )
        for program in (timed, ASKED["product"][0], lambda x: x.no_such_method()):
            with contextlib.suppress(UnsupportedError, AttributeError):
                extract_compiled_graph(program, (X,))
        now = (time.time, os.urandom, open, input, io.open, datetime.datetime, random.Random.seed)
        self.assertEqual(now, before)
        self.assertIs(date, datetime.date)
        self.assertIsInstance(perf_counter(), float)

    def test_returned_itself(self):
        graph = extract_compiled_graph(lambda x: (x + 1, perf_counter, date), (X,))
        self.assertIs(graph(X)[1], time.perf_counter)
        self.assertIs(graph(X)[2], datetime.date)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers()

    def forward(self, x):
        return x + next(self.numbers)


class Numbers:
    def __init__(self) -> None:
        self.last = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.last += 1
        return self.last


class MissingFunctionTest(unittest.TestCase):
    def test_python_without_a_library(self) -> None:
        """A function of the table that is None there, as uuid's is without libuuid, is none."""
        script = (
            "import uuid; uuid._generate_time_safe = None\n"
            "import torch, torch_lazy_ext\n"
            "graph = torch_lazy_ext.extract_compiled_graph(lambda x: x + 1, (torch.ones(2),))\n"
            "print(graph(torch.ones(2)).tolist())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        self.assertEqual(done.stdout, "[2.0, 2.0]\n", done.stderr)


if __name__ == "__main__":
    unittest.main()
