# Owner(s): ["oncall: jit"]

"""What extraction and replay leave alone, and that they are safe with threads, forks and time."""

import contextlib
import copy
import gc
import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import unittest
import unittest.mock
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch._lazy.metrics
from oracle import Call, check, extract_untouched, makefunctiontest, maketest, surroundings, tensors
from torch import nn
from torch.optim import radam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_lazy_ext import ExtractionError, UnsupportedError, extract_compiled_graph, ts_backend

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
KEPT = "AddressSanitizer keeps memory that was freed"

refusals: list[bool] = []


@torch.library.custom_op("torch_lazy_ext_test_hygiene::moody", mutates_args=())
def moody(x: torch.Tensor) -> torch.Tensor:
    refusals.append(True)
    if len(refusals) % 3:  # the variant there is, and the one captured after it
        raise ValueError("not this time")
    return x * 2


@moody.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("torch_lazy_ext_test_hygiene::slow", mutates_args=())
def slow(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.05)  # other threads come in
    return x * 2


@slow.register_fake
def _(x):
    return torch.empty_like(x)


for _optimizer in (torch.optim.Adam, torch.optim.SGD):
    _optimizer([torch.zeros(1)])  # the first one puts a profiler around the step of its class
# Before the first extraction.
METHODS = [
    (owner, dict(vars(owner)))
    for owner in (
        torch, torch.Tensor, torch.random, torch.func, torch.autograd, torch.optim.LBFGS,
        torch.autograd.Function, nn.Module, torch.optim.Optimizer, torch.distributed,
        nn.parallel.DistributedDataParallel, torch.optim.Adam, torch.optim.SGD, radam,
    )
]  # fmt: skip


class OwnError(Exception):
    """An exception that no library knows."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"{detail} ({code})")
        self.code = code


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout()

    def forward(self, x):
        return self.dropout(self.norm(self.linear(x)))


def raising(error: Exception) -> Any:
    def program(x):
        y = x + torch.rand(3)
        x.mul_(2)
        torch.set_grad_enabled(not torch.is_grad_enabled())
        if y is not None:
            raise error
        return y

    return program


class UntouchedTest(unittest.TestCase):
    """extract_untouched compares arguments, program, RNG, modes, defaults and warning filters."""

    def untouched(self, program: Any, *args: Any) -> Exception | None:
        return extract_untouched(program, Call(*args))[1]

    def test_function(self):
        self.assertIsNone(self.untouched(lambda x: x.add_(1) * torch.rand(3), torch.randn(3)))

    def test_module(self):
        self.assertIsNone(self.untouched(Stateful(), torch.randn(4, 3)))

    def test_methods_are_the_same(self):
        """What a capture puts in the place of methods and functions of torch is gone after it."""
        programs = {
            "returns": lambda x: x.add_(1) * x.sum().item() + torch.rand(3),
            "raises": raising(OwnError(3, "mine")),
            "refused": lambda x: x.to_sparse(),
        }
        for name, program in programs.items():
            with self.subTest(name):
                self.untouched(program, torch.randn(3))
                for owner, known in METHODS:
                    now = vars(owner)
                    # A module of torch may be filled lazily.
                    keys = known.keys() | (now.keys() if isinstance(owner, type) else set())
                    changed = [key for key in keys if now.get(key) is not known.get(key)]
                    self.assertEqual(changed, [], owner)

    def test_program_that_raises(self):
        x = torch.randn(2, 3)
        before = surroundings()
        errors = (
            OwnError(3, "mine"), ValueError("v"), KeyError("k"), AssertionError("a"),
            ZeroDivisionError("z"), NotImplementedError("n"), StopIteration("s"),
        )  # fmt: skip
        for error in errors:
            with self.subTest(error=type(error)):
                torch.set_grad_enabled(True)
                try:
                    extract_compiled_graph(raising(error), (x,))
                except Exception as e:
                    self.assertIs(e, error)
                else:
                    self.fail("nothing was raised")
                finally:
                    torch.set_grad_enabled(before["grad mode"])
        self.assertEqual(before, surroundings())

    def test_own_exception_keeps_its_fields(self):
        with self.assertRaises(OwnError) as caught:
            extract_compiled_graph(raising(OwnError(7, "field")), (torch.randn(2, 3),))
        self.assertEqual(caught.exception.code, 7)
        torch.set_grad_enabled(True)

    def test_traceback_shows_the_users_line(self):
        try:
            extract_compiled_graph(lambda x: x @ x, (torch.randn(2, 3),))
        except RuntimeError as e:
            lines = []
            trace = e.__traceback__
            while trace is not None:
                lines.append(os.path.basename(trace.tb_frame.f_code.co_filename))
                trace = trace.tb_next
            self.assertIn("test_hygiene.py", lines[1:])
        else:
            self.fail("nothing was raised")

    def test_base_exceptions_pass(self):
        def program(x):
            raise KeyboardInterrupt

        x = torch.randn(3)
        before = surroundings()
        for _ in range(2):
            with self.assertRaises(KeyboardInterrupt):
                extract_compiled_graph(program, (x,))
        self.assertEqual(before, surroundings())
        # A capture that was broken off must not stand in the way of the next one.
        self.assertEqual(
            extract_compiled_graph(lambda x: x + 1, (torch.ones(1),))(torch.ones(1)), 2
        )

    def test_failed_extraction_leaves_the_thread_usable(self):
        for _ in range(3):
            with contextlib.suppress(RuntimeError):
                extract_compiled_graph(lambda x: x @ x, (torch.randn(2, 3),))
            self.assertEqual((torch.ones(2) + 1).sum().item(), 4)
            self.assertEqual(torch.zeros(2).device.type, "cpu")

    def test_users_grad_is_kept(self):
        m = nn.Linear(3, 3)
        m(torch.randn(2, 3)).sum().backward()
        grads = {n: (p.grad, p.grad.clone()) for n, p in m.named_parameters()}
        x = torch.randn(2, 3, requires_grad=True)
        with torch.no_grad():
            extract_compiled_graph(m, (x,))(torch.randn(2, 3))
        for name, p in m.named_parameters():
            self.assertIs(p.grad, grads[name][0])
            self.assertTrue(torch.equal(p.grad, grads[name][1]))
        self.assertIsNone(x.grad)

    def test_hooks_and_attributes_of_tensors_are_kept(self):
        x = torch.randn(3)
        x.note = "mine"
        m = nn.Linear(3, 3)
        calls = []
        handle = m.register_forward_hook(lambda *a: calls.append(1))
        with torch.no_grad():
            extract_compiled_graph(m, (x,))
        self.assertEqual(x.note, "mine")
        self.assertEqual(list(m._forward_hooks), [handle.id])

    def test_warnings_of_the_program_are_shown_once(self):
        def program(x):
            warnings.warn("from the program", UserWarning, stacklevel=2)
            return x + 1

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = extract_compiled_graph(program, (torch.randn(3),))
            graph(torch.randn(3))
        self.assertEqual({str(w.message) for w in caught}, {"from the program"})

    def test_nothing_is_printed(self):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            extract_compiled_graph(Stateful(), (torch.randn(4, 3),))(torch.randn(4, 3))
        self.assertEqual((out.getvalue(), err.getvalue()), ("", ""))


FRESH_PROCESS = """
import sys, warnings
import torch
import torch_lazy_ext
{before}
filters, stdout = list(warnings.filters), sys.stdout
threads = torch.get_num_threads()
graph = torch_lazy_ext.extract_compiled_graph(lambda x, y: (x + 1) @ y, (torch.ones(2, 2),) * 2)
graph(torch.ones(2, 2), torch.ones(2, 2))
assert list(warnings.filters) == filters, [f for f in warnings.filters if f not in filters]
assert torch.get_num_threads() == threads
{after}
"""


class FreshProcessTest(unittest.TestCase):
    """The first extraction of a process, which imports and initialises what there is to."""

    def run_fresh(self, before: str = "", after: str = "") -> None:
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:torch_lazy_ext", "-c",
             FRESH_PROCESS.format(before=before, after=after)],
            cwd=os.path.dirname(__file__),  # not where sources hide an installed package
            capture_output=True,
            text=True,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual((done.stdout, done.stderr), ("", ""))

    def test_warning_filters(self):
        self.run_fresh()

    def test_users_own_filter_is_kept(self):
        self.run_fresh("warnings.simplefilter('error')")

    def test_functionalization_of_views(self):
        self.run_fresh(
            "before = torch._C._functionalization_reapply_views_tls()",
            "assert torch._C._functionalization_reapply_views_tls() == before",
        )

    def test_lazy_device_initialised_before(self):
        self.run_fresh(
            "import torch._lazy.ts_backend; torch._lazy.ts_backend.init()",
            "assert (torch.ones(2).to('lazy') + 1).cpu().tolist() == [2, 2]",
        )

    def test_lazy_device_initialised_afterwards(self):
        self.run_fresh(
            after="from torch_lazy_ext import ts_backend; ts_backend.init(); "
            "assert (torch.ones(2).to('lazy') + 1).cpu().tolist() == [2, 2]"
        )


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(enabled: bool) -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Doubling(TorchFunctionMode):
    """A user's mode that changes what a function computes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.sin else result


class Times(TorchFunctionMode):
    """A user's mode that changes what a function computes by its attribute."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * self.factor if func is torch.sin else result


class DispatchTimes(TorchDispatchMode):
    """The same of an operator."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * self.factor if func is torch.ops.aten.sin.default else result


TIMES = Times(1)


def times_changed(i: int) -> Times:
    TIMES.factor = 2 + i % 2
    return TIMES


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def makes_tensors(x):
    made = torch.zeros(2), torch.arange(3.0), x.int() / 2, torch.tensor(1.5) + x, torch.rand(2)
    return *made, torch.tensor([1.5]), made[0].dtype, torch.get_default_dtype()


class SurroundingsTest(unittest.TestCase):
    """Modes and defaults of the caller decide, at the time of each call."""

    test_default_dtype = makefunctiontest(
        makes_tensors, tensors((3,)), context=lambda i: default_dtype(torch.float64)
    )
    test_default_dtype_changes = makefunctiontest(
        makes_tensors,
        tensors((3,)),
        calls=5,
        captures=2,
        context=lambda i: default_dtype((torch.float32, torch.float64)[i % 2]),
    )
    test_default_device = makefunctiontest(
        makes_tensors, tensors((3,)), context=lambda i: torch.device("cpu")
    )
    test_default_device_meta_sometimes = makefunctiontest(
        lambda x: (x + 1, torch.zeros(3).device.type),
        tensors((3,)),
        calls=4,
        captures=2,
        context=lambda i: torch.device("meta") if i % 2 else contextlib.nullcontext(),
    )
    test_default_device_changes = makefunctiontest(
        lambda x: (x + 1, torch.zeros(3).device.type),
        tensors((3,)),
        calls=4,
        captures=2,
        context=lambda i: torch.device(("cpu", "meta")[i % 2]),
    )
    test_deterministic_algorithms = makefunctiontest(
        lambda x, i: x.index_add(0, i, x),
        lambda: (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])),
        calls=5,
        captures=2,
        context=lambda i: deterministic(bool(i % 2)),
    )
    test_deterministic_read = makefunctiontest(
        lambda x: x + 1 if torch.are_deterministic_algorithms_enabled() else x - 1,
        tensors((3,)),
        calls=5,
        captures=2,
        context=lambda i: deterministic(bool(i % 2)),
    )
    test_own_function_mode = makefunctiontest(
        lambda x: x.sin() + torch.sin(x), tensors((3,)), captures=None, context=lambda i: Doubling()
    )
    test_own_function_mode_sometimes = makefunctiontest(
        lambda x: torch.sin(x),
        tensors((3,)),
        calls=4,
        captures=None,
        context=lambda i: Doubling() if i % 2 else contextlib.nullcontext(),
    )
    test_own_function_modes_in_turn = makefunctiontest(
        lambda x: torch.sin(x), tensors((3,)), captures=None, context=lambda i: Times(2 + i % 2)
    )
    test_attribute_of_own_function_mode = makefunctiontest(
        lambda x: torch.sin(x), tensors((3,)), calls=4, captures=2, context=times_changed
    )
    test_own_dispatch_modes_in_turn = makefunctiontest(
        lambda x: torch.sin(x), tensors((3,)), context=lambda i: DispatchTimes(2 + i % 2)
    )
    test_dispatch_mode_seen = makefunctiontest(
        lambda x: x + torch._C._len_torch_dispatch_stack(),
        tensors((3,)),
        calls=4,
        captures=2,
        context=lambda i: Counting() if i % 2 else contextlib.nullcontext(),
    )
    test_own_function_mode_inside = makefunctiontest(
        lambda x: _under(Doubling(), lambda: torch.sin(x)), tensors((3,))
    )
    test_threads = makefunctiontest(
        lambda x: (x @ x, torch.get_num_threads())[0], tensors((4, 4)), exact=False
    )
    test_anomaly_mode = makefunctiontest(
        lambda x: x * 2, tensors((3,)), context=lambda i: torch.autograd.set_detect_anomaly(True)
    )
    test_profiler_around = makefunctiontest(
        lambda x: x * 2 + 1, tensors((3,)), context=lambda i: torch.profiler.profile()
    )
    test_record_function_inside = makefunctiontest(
        lambda x: _under(torch.profiler.record_function("here"), lambda: x * 2), tensors((3,))
    )

    def test_own_dispatch_mode(self):
        """A user's dispatch mode around a call: the values are right, with or without its help."""
        graph = extract_compiled_graph(lambda x: x.sin() + 1, (torch.randn(3),))
        x = torch.randn(3)
        with Counting():
            self.assertTrue(torch.equal(graph(x), x.sin() + 1))

    def test_backward_of_a_capture_under_own_dispatch_mode(self):
        x = torch.randn(3, requires_grad=True)
        with DispatchTimes(2):
            graph = extract_compiled_graph(torch.cos, (x,))
        for forward, backward in ((2, 1), (2, 2), (3, 1), (1, 3)):
            gradients = []
            for function in (graph, torch.cos):
                with DispatchTimes(forward):
                    result = function(x).sum()
                with DispatchTimes(backward):
                    gradients.append(torch.autograd.grad(result, x)[0].tolist())
            self.assertEqual(*gradients)

    def test_program_under_users_dispatch_mode(self):
        with Counting() as mode:
            graph = extract_compiled_graph(lambda x: x.sin() + 1, (torch.randn(3),))
        x = torch.randn(3)
        self.assertTrue(torch.equal(graph(x), x.sin() + 1))
        self.assertEqual(torch._C._len_torch_dispatch_stack(), 0)
        self.assertIsInstance(mode.seen, list)


def _under(context: Any, function: Any) -> Any:
    with context:
        return function()


class LazyDeviceTest(unittest.TestCase):
    """The user's own lazy tensors, and the metrics and settings of the lazy tensor core."""

    def setUp(self) -> None:
        ts_backend.init()

    def test_own_lazy_tensors(self):
        mine = torch.randn(3).to("lazy")
        expected = (mine.cpu() * 2 + 1).tolist()
        pending = mine * 2
        extract_compiled_graph(lambda x: x * 3, (torch.randn(3),))(torch.randn(3))
        with contextlib.suppress(RuntimeError):
            extract_compiled_graph(lambda x: x @ x, (torch.randn(2, 3),))
        self.assertEqual((pending + 1).cpu().tolist(), expected)
        self.assertEqual(pending.device.type, "lazy")

    def test_metrics(self):
        mine = torch.randn(3).to("lazy")
        (mine + 1).cpu()

        def counters():
            names = torch._lazy.metrics.counter_names()
            return {n: torch._lazy.metrics.counter_value(n) for n in names}

        gc.collect()  # Lazy tensors that earlier tests left in cycles count when they go.
        before = counters()
        extract_compiled_graph(Stateful(), (torch.randn(4, 3),))(torch.randn(4, 3))
        self.assertEqual(counters(), before)

    def test_force_fallback_setting(self):
        from torch_lazy_ext import config

        before = config.get_force_fallback()
        extract_compiled_graph(lambda x: x - 1, (torch.randn(3),))
        self.assertEqual(config.get_force_fallback(), before)

    def test_lazy_argument_is_refused_or_right(self):
        try:
            graph = extract_compiled_graph(lambda x: x + 1, (torch.ones(2).to("lazy"),))
        except ExtractionError:
            return
        self.assertEqual(graph(torch.zeros(2).to("lazy")).cpu().tolist(), [1, 1])


def lets_others_run(call: Any, calls: int = 1000) -> bool:
    """Whether another thread runs Python in the middle of one of so many calls.

    How soon that thread comes up is the machine's business. So the middle is one of the calling
    thread's own time: while that has Python's lock, nobody sees its clock go.
    """
    clock = time.pthread_getcpuclockid(threading.get_ident())
    turns: list[float] = []
    stop = threading.Event()

    def take_turns() -> None:
        while not stop.is_set():
            turns.append(time.clock_gettime(clock))
            time.sleep(0.0005)

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        for _ in range(calls):
            begin = time.clock_gettime(clock)
            call()
            quarter = (time.clock_gettime(clock) - begin) / 4
            if any(begin + quarter < turn < begin + 3 * quarter for turn in turns):
                return True
            turns.clear()
        return False
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def in_the_middle_of_a_capture(program: Any, *args: Any) -> Iterator[Future]:
    """Meanwhile another thread has begun to run `program` for a capture; the future graph."""
    inside, done = threading.Event(), threading.Event()

    def pausing(*args: Any) -> Any:
        inside.set()
        done.wait()
        return program(*args)

    with ThreadPoolExecutor(1) as pool:
        graph = pool.submit(extract_compiled_graph, pausing, args)
        graph.add_done_callback(lambda _: inside.set())  # It may fail before.
        inside.wait()
        try:
            yield graph
        finally:
            done.set()


class ThreadTest(unittest.TestCase):
    """Many threads replay one graph, and extract at the same time."""

    def in_threads(self, function: Any, count: int = 8) -> None:
        barrier = threading.Barrier(count)

        def run(k: int) -> None:
            barrier.wait()
            function(k)

        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(run, k) for k in range(count)]:
                future.result()

    def test_replay_in_threads(self):
        m = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        with torch.no_grad():
            graph = extract_compiled_graph(m, (torch.randn(2, 16),))

        def replay(k):
            generator = torch.Generator().manual_seed(k)
            with torch.no_grad():
                for _ in range(100):
                    x = torch.randn(2, 16, generator=generator)
                    torch.testing.assert_close(graph(x), m(x))

        self.in_threads(replay)
        self.assertEqual(len(graph.specializations), 1)

    def test_others_run_python_during_a_replay(self):
        def program(x):
            for _ in range(30):
                x = x.sin()
            return x

        x = torch.randn(1_000_000)
        graph = extract_compiled_graph(program, (x,))
        graph(x)
        self.assertTrue(lets_others_run(lambda: graph(x)))

    def test_what_holds_the_lock_would_show(self):
        self.assertFalse(lets_others_run(lambda: sum(range(1_000_000)), 10))

    def test_replay_of_many_variants_in_threads(self):
        graph = extract_compiled_graph(lambda x, k: x * k + x.shape[0], (torch.randn(1), 0))

        def replay(k):
            for i in range(40):
                x = torch.ones(i % 4 + 1)
                self.assertTrue(torch.equal(graph(x, k % 3), x * (k % 3) + (i % 4 + 1)))

        self.in_threads(replay)

    def test_extract_in_threads(self):
        def extract(k):
            for i in range(10):
                graph = extract_compiled_graph(
                    lambda x, i=i: x * k + i if x.sum() > -1e9 else x, (torch.randn(3),)
                )
                x = torch.randn(3)
                self.assertTrue(torch.equal(graph(x), x * k + i))

        self.in_threads(extract)

    def test_extract_modules_in_threads(self):
        def extract(k):
            m = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
            with torch.no_grad():
                for _ in range(5):
                    graph = extract_compiled_graph(m, (torch.randn(3, 4),))
                    x = torch.randn(3, 4)
                    torch.testing.assert_close(graph(x), m(x))

        self.in_threads(extract)

    def test_gradient_of_another_thread_of_the_program(self):
        """What such a thread computes is eager: it would reach the user's own gradients."""
        weight = torch.ones(3, requires_grad=True)

        def backward():
            with torch.enable_grad():
                (weight * 2).sum().backward()

        def program(x):
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
            return x + 1

        with self.assertRaisesRegex(UnsupportedError, r"backward\(\) reaches"):
            extract_compiled_graph(program, (torch.ones(3),))
        self.assertIsNone(weight.grad)

    def test_extract_one_module_in_threads(self):
        """The module is never seen in a half-captured state by another thread's eager call."""
        m = nn.BatchNorm1d(4).eval()
        stop = threading.Event()
        wrong: list[Any] = []

        def eager():
            x = torch.randn(3, 4)
            with torch.no_grad():
                expected = m(x)
                while not stop.is_set():
                    if not torch.equal(m(x), expected):
                        wrong.append(x)

        thread = threading.Thread(target=eager)
        thread.start()
        try:
            with torch.no_grad():
                for _ in range(30):
                    extract_compiled_graph(m, (torch.randn(3, 4),))
        finally:
            stop.set()
            thread.join()
        self.assertEqual(wrong, [])

    def test_other_threads_stay_eager_during_a_capture(self):
        with in_the_middle_of_a_capture(lambda x: x + 1, torch.randn(3)) as graph:
            y = torch.ones(3) * 2 + torch.zeros(3)
            z = y.clone().add_(1)
        self.assertEqual(graph.result()(torch.ones(3)).tolist(), [2] * 3)
        self.assertEqual((type(y), y.tolist(), z.tolist()), (torch.Tensor, [2] * 3, [3] * 3))

    def test_first_calls_at_once(self):
        def program(x):
            y = x + 1
            return slow(y) + y

        graph = extract_compiled_graph(program, (torch.zeros(2),))
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: graph(torch.full((2,), float(i))), range(4)))
        self.assertEqual([r.tolist() for r in results], [[3.0 * (i + 1)] * 2 for i in range(4)])

    def test_other_threads_read_tensors_during_a_capture(self):
        """What a capture answers itself, it answers for its own thread."""
        with in_the_middle_of_a_capture(lambda x: x + 1, torch.randn(3)) as captured:
            y = torch.full((2,), 1.5)
            y.data = torch.full((3,), 2.5)
            y.requires_grad_().sum().backward()
            read = (y[0].item(), y.tolist(), float(torch.tensor(y[0].item())), y.grad.tolist())
            types = (type(y[0].item()), type(torch.Generator()), type(y.data))
        self.assertEqual(read, (2.5, [2.5] * 3, 2.5, [1] * 3))
        self.assertEqual(types, (float, torch.Generator, torch.Tensor))
        graph = captured.result()
        self.assertEqual(graph(torch.ones(3)).tolist(), [2] * 3)
        self.assertEqual(len(list(graph.graph.inputs())), 1)

    def test_a_capture_ends_during_another(self):
        def program(x):
            torch.manual_seed(3)
            return x * x.sum().item(), torch.rand(2)

        with in_the_middle_of_a_capture(program, torch.ones(3)) as graph:
            extract_compiled_graph(lambda x: x * x.sum().item(), (torch.ones(3),))
        x = torch.tensor([1.0, 2, 3])
        scaled, drawn = graph.result()(x)
        torch.manual_seed(3)
        self.assertEqual((scaled.tolist(), drawn.tolist()), ([6, 12, 18], torch.rand(2).tolist()))

    def test_program_that_starts_threads(self):
        """A thread of the program's own is outside of the capture: right, or refused."""

        def program(x):
            results = []
            thread = threading.Thread(target=lambda: results.append(x * 2))
            thread.start()
            thread.join()
            return results[0] + 1

        try:
            graph = extract_compiled_graph(program, (torch.randn(3),))
        except (ExtractionError, IndexError):
            return
        x = torch.randn(3)
        self.assertTrue(torch.equal(graph(x), x * 2 + 1))

    def test_grad_mode_is_per_thread(self):
        x = torch.randn(3)
        graph = extract_compiled_graph(lambda x: (x * 2, torch.is_grad_enabled()), (x,))
        seen = {}

        def run(k):
            with torch.set_grad_enabled(bool(k % 2)):
                for _ in range(20):
                    seen.setdefault(k, set()).add(graph(x)[1])

        self.in_threads(run, 4)
        self.assertEqual(seen, {k: {bool(k % 2)} for k in range(4)})

    def test_lock_is_free_during_kernels(self):
        """Python runs on while a replay computes."""
        with torch.no_grad():
            graph = extract_compiled_graph(
                lambda x: torch.linalg.matrix_exp(x), (torch.randn(400, 400),)
            )
        x = torch.randn(400, 400)
        self.assertTrue(lets_others_run(lambda: graph(x)))


def _in_child(graph: Any, x: torch.Tensor, connection: Any) -> None:
    torch.set_num_threads(1)
    replayed = graph(x)
    extracted = extract_compiled_graph(lambda t: t * 3, (x,))(x)
    other_shape = graph(torch.ones(5))
    connection.send([t.tolist() for t in (replayed, extracted, other_shape)])


class ThreadInsideTest(unittest.TestCase):
    """Threads that a program starts: what they compute with its tensors is not recorded."""

    def refused(self, program: Callable[[torch.Tensor], Any]) -> None:
        with self.assertRaisesRegex(
            UnsupportedError, r"uses a tensor in another thread, .* \(at .*test_hygiene\.py:\d+\)"
        ):
            extract_compiled_graph(program, (torch.ones(2),))

    def test_pool(self) -> None:
        def program(x):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(lambda: x * 2).result()

        self.refused(program)

    def test_pool_that_was_there(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            self.refused(lambda x: pool.submit(lambda: x * 2).result())

    def test_error_that_only_the_thread_sees(self) -> None:
        def program(x):
            found = []
            thread = threading.Thread(target=lambda: found.append(x * 2))
            thread.start()
            thread.join()
            return found[0] if found else x

        with unittest.mock.patch("threading.excepthook", lambda args: None):
            self.refused(program)
        self.assertEqual(program(torch.ones(2)).sum(), 4)

    def test_others(self) -> None:
        """Without tensors, and with errors of its own."""

        def program(x):
            found = []
            thread = threading.Thread(target=lambda: found.append(3))
            thread.start()
            thread.join()
            assert "run" not in vars(thread)
            return x * found[0]

        graph = extract_compiled_graph(program, (torch.ones(2),))
        self.assertEqual(graph(torch.ones(2)).sum(), 6)

        def raises(x):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(lambda: {}["key"]).result()

        with self.assertRaises(KeyError):
            extract_compiled_graph(raises, (torch.ones(2),))


class LifetimeTest(unittest.TestCase):
    """Forks, memory, and what is kept alive."""

    def test_variants_beyond_the_limit_are_dropped(self):
        graph = extract_compiled_graph(lambda x: x + 1, (torch.ones(1),), limit=2)
        for size in (1, 2, 3, 1, 4):
            self.assertEqual(graph(torch.ones(size)).tolist(), [2] * size)
            self.assertEqual(graph.graph.findNode("aten::add").output().type().sizes(), [size])
        self.assertEqual(len(graph.specializations), 2)

    def test_fork_after_extraction(self):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # A fork does not survive the pools of OpenMP.
        try:
            graph = extract_compiled_graph(lambda x: x * 2 + 1, (torch.randn(3),))
            graph(torch.randn(3))
            context = multiprocessing.get_context("fork")
            here, there = context.Pipe()
            child = context.Process(target=_in_child, args=(graph, torch.ones(3), there))
            child.start()
            there.close()
            received = here.recv()  # EOFError where the child died
            child.join()
        finally:
            torch.set_num_threads(threads)
        self.assertEqual(received, [[3] * 3, [3] * 3, [3] * 5])
        self.assertEqual(child.exitcode, 0)
        self.assertEqual(graph(torch.ones(3)).tolist(), [3] * 3)

    def grown(self, call: Any, warm: int = 300, calls: int = 5000) -> float:
        """MiB that `calls` calls leave behind."""

        def resident() -> float:
            gc.collect()
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

        for _ in range(warm):
            call()
        before = resident()
        for _ in range(calls):
            call()
        return resident() - before

    @unittest.skipIf(SANITIZED, KEPT)
    def test_replays_do_not_grow(self):
        m = Stateful()
        with torch.no_grad():
            graph = extract_compiled_graph(m, (torch.randn(4, 3),))
            x = torch.randn(4, 3)
            self.assertLess(self.grown(lambda: graph(x)), 4)

    @unittest.skipIf(SANITIZED, KEPT)
    def test_mutating_replays_do_not_grow(self):
        def program(x, y):
            x.add_(y)
            v = x[0]
            v.mul_(0.5)
            return v, x, [y + 1]

        x, y = torch.randn(64, 64), torch.randn(64, 64)
        graph = extract_compiled_graph(program, (x, y))
        self.assertLess(self.grown(lambda: graph(x, y)), 4)

    @unittest.skipIf(SANITIZED, KEPT)
    def test_failing_calls_do_not_grow(self):
        graph = extract_compiled_graph(lambda x: x + torch.ones(3), (torch.randn(3),))
        bad = torch.randn(4)

        def call():
            with contextlib.suppress(RuntimeError):
                graph(bad)

        self.assertLess(self.grown(call, warm=50, calls=300), 8)

    def test_results_are_freed(self):
        graph = extract_compiled_graph(lambda x: (x + 1, x.view(-1)), (torch.randn(3),))
        x = torch.randn(3)
        results = [weakref.ref(t) for t in graph(x)] + [weakref.ref(x)]
        del x
        gc.collect()
        self.assertEqual([r() for r in results], [None] * 3)

    def test_example_arguments_are_freed(self):
        x = torch.randn(1000)
        dead = weakref.ref(x)
        graph = extract_compiled_graph(lambda x: x * 2, (x,))
        del x
        gc.collect()
        self.assertIsNone(dead())
        self.assertEqual(graph(torch.ones(1000)).sum(), 2000)

    def test_argument_of_the_last_call_is_freed(self):
        graph = extract_compiled_graph(lambda x: x.mul_(2).sum(), (torch.randn(3),))
        x = torch.randn(3)
        dead = weakref.ref(x)
        graph(x)
        del x
        gc.collect()
        self.assertIsNone(dead())

    def test_graph_is_freed(self):
        m = Stateful()
        graph = extract_compiled_graph(m, (torch.randn(4, 3),))
        dead = weakref.ref(graph)
        del graph
        gc.collect()
        self.assertIsNone(dead())

    def test_module_is_freed_with_its_graph(self):
        m = Stateful()
        dead = weakref.ref(m)
        graph = extract_compiled_graph(m, (torch.randn(4, 3),))
        del m
        del graph
        gc.collect()
        self.assertIsNone(dead())

    def test_graph_outlives_the_names_of_its_program(self):
        def make():
            m, scale = nn.Linear(3, 3), torch.randn(3)
            program = copy.deepcopy(m)
            with torch.no_grad():
                graph = extract_compiled_graph(lambda x: m(x) * scale, (torch.randn(2, 3),))
            return graph, program, scale

        graph, eager, scale = make()
        gc.collect()
        x = torch.randn(2, 3)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), eager(x) * scale)


class CollectorTest(unittest.TestCase):
    """Python's collector rests during a capture, and what is called when it runs is no program's."""

    def test_callbacks(self) -> None:
        calls = []

        def callback(phase, info):
            calls.append(time.perf_counter())

        gc.callbacks.append(callback)
        self.addCleanup(gc.callbacks.remove, callback)

        def program(x):
            for _ in range(3000):
                cycle: list[Any] = []
                cycle.append(cycle)
            return x * 2

        program(torch.ones(2))
        self.assertTrue(calls, "the collector has not run")
        graph = extract_compiled_graph(program, (torch.ones(2),))
        self.assertEqual(graph(torch.ones(2)).sum(), 4)
        self.assertEqual(len(graph.specializations), 1)

    def test_thresholds(self) -> None:
        before = gc.get_threshold()
        self.addCleanup(gc.set_threshold, *before)
        gc.set_threshold(600, 7, 8)
        extract_compiled_graph(lambda x: x * 2, (torch.ones(2),))
        self.assertEqual(gc.get_threshold(), (600, 7, 8))

        def raises(x):
            raise ValueError("mine")

        with self.assertRaisesRegex(ValueError, "mine"):
            extract_compiled_graph(raises, (torch.ones(2),))
        self.assertEqual(gc.get_threshold(), (600, 7, 8))


class ReleasedTest(unittest.TestCase):
    """Graphs, and what they were given, go with their last reference: the collector has no part."""

    def setUp(self) -> None:
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)

    def check(self, make: Callable[[], tuple[Any, ...]]) -> None:
        """`make` gives a graph that has been called, and what else nobody else holds."""
        graph, *others = make()
        dead = [weakref.ref(value) for value in (graph, *graph.specializations, *others)]
        self.assertGreater(len(dead), 1)
        del graph, others
        self.assertEqual([r() for r in dead if r() is not None], [])

    def test_inference(self) -> None:
        def make():
            model = Stateful()
            with torch.no_grad():
                graph = extract_compiled_graph(model, (torch.randn(4, 3),))
                graph(torch.randn(4, 3))
            return graph, model

        self.check(make)

    def test_results_with_gradients(self) -> None:
        def make():
            model = nn.Linear(3, 2)
            graph = extract_compiled_graph(model, (torch.randn(4, 3),))
            graph(torch.randn(4, 3)).sum().backward()
            return graph, model

        self.check(make)

    def test_second_derivatives(self) -> None:
        def make():
            model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
            graph = extract_compiled_graph(model, (torch.randn(4, 3),))
            result = graph(torch.randn(4, 3))
            (grad,) = torch.autograd.grad(result.sum(), model[0].weight, create_graph=True)
            grad.sum().backward()
            return graph, model

        self.check(make)

    def test_derivative_after_the_graph_has_gone(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        x = torch.randn(4, 3)
        graph = extract_compiled_graph(model, (x,))
        result = graph(x)
        (dead,) = map(weakref.ref, graph.specializations)
        del graph
        grads = [
            torch.autograd.grad(r.sum(), model[0].weight, create_graph=True)[0]
            for r in (result, model(x))
        ]
        seconds = [torch.autograd.grad(g.pow(2).sum(), model[0].weight)[0] for g in grads]
        self.assertTrue(torch.equal(*seconds))
        del result, grads
        self.assertIsNone(dead())

    def test_training_step(self) -> None:
        def make():
            model = nn.Linear(3, 2)
            optimizer = torch.optim.AdamW(model.parameters())

            def step(x):
                optimizer.zero_grad()
                loss = model(x).sum()
                loss.backward()
                optimizer.step()
                return loss

            graph = extract_compiled_graph(step, (torch.randn(4, 3),))
            for _ in range(3):
                graph(torch.randn(4, 3))
            return graph, step

        self.check(make)

    def test_other_backends(self) -> None:
        for arguments in ({"backend": "fx"}, {"freeze": True}, {"backend": lambda m, _i: m}):

            def make(arguments=arguments):
                model = nn.Linear(3, 2)
                with torch.no_grad():
                    graph = extract_compiled_graph(model, (torch.randn(4, 3),), **arguments)
                    for _ in range(3):
                        graph(torch.randn(4, 3))
                return graph, model

            with self.subTest(str(arguments)):
                self.check(make)

    def test_data_and_recapture(self) -> None:
        def make():
            graph = extract_compiled_graph(lambda x: -x if x.sum() > 0 else x, (torch.ones(3),))
            for x in (torch.ones(3), -torch.ones(3), torch.ones(4)):
                graph(x)
            return (graph,)

        self.check(make)

    def test_variant_that_another_takes_the_place_of(self) -> None:
        graph = extract_compiled_graph(lambda x: x + 1, (torch.ones(3),), limit=1)
        dead = weakref.ref(graph.specializations[0])
        graph(torch.ones(4))
        self.assertIsNone(dead())

    def test_failed_extraction(self) -> None:
        class Fails(nn.Linear):
            def forward(self, x):
                return super().forward(x).to_sparse()

        class Raises(nn.Linear):
            def forward(self, x):
                return super().forward(x).no_such_method()

        for cls in (Fails, Raises):
            model = cls(3, 3)
            dead = weakref.ref(model)
            with contextlib.suppress(UnsupportedError, AttributeError):
                extract_compiled_graph(model, (torch.ones(3),))
            del model
            self.assertIsNone(dead())

    # --------------------------------------------- arguments and gradients, while the graph lives

    def check_argument(
        self, program: Any, make: Callable[[], Any], only_itself: bool = True
    ) -> None:
        """The graph lets go of an argument, and of variants that are for that object only."""
        graph = extract_compiled_graph(program, (make(), torch.ones(2)))
        for _ in range(2):
            argument = make()
            dead = weakref.ref(argument)
            want = program(argument, torch.ones(2))
            self.assertTrue(torch.equal(graph(argument, torch.ones(2)), want))
            self.assertTrue(torch.equal(graph(argument, torch.ones(2)), want))
            weight = (
                weakref.ref(w) if (w := getattr(argument, "weight", None)) is not None else None
            )
            del argument, w, want
            self.assertIsNone(dead())
            if weight is not None:
                self.assertIsNone(weight())
        for variant in graph.specializations:
            self.assertFalse(only_itself, variant)

    def test_module_as_argument(self) -> None:
        with torch.no_grad():
            self.check_argument(lambda m, x: m(x), lambda: nn.Linear(2, 2))
        self.check_argument(lambda m, x: m(x), lambda: nn.Linear(2, 2))

    def test_object_as_argument(self) -> None:
        class Settings:
            def __init__(self) -> None:
                self.scale = 2.0

        self.check_argument(lambda s, x: x * s.scale, Settings, only_itself=False)

    def test_function_as_argument(self) -> None:
        self.check_argument(lambda f, x: f(x) + 1, lambda: lambda x: x * 2)

    def test_bound_to_an_argument_in_a_list(self) -> None:
        graph = extract_compiled_graph(lambda ms, x: ms[0](x), ([nn.Linear(2, 2)], torch.ones(2)))
        module = nn.Linear(2, 2)
        dead = weakref.ref(module)
        graph([module], torch.ones(2))
        del module
        self.assertIsNone(dead())

    def test_object_at_the_same_address(self) -> None:
        """An identity that was compared is that of the object, and not of its place."""

        class Settings:
            def __init__(self, scale: float) -> None:
                self.scale = scale

        graph = extract_compiled_graph(lambda s, x: x * s.scale, (Settings(2.0), torch.ones(2)))
        for scale in (3.0, 4.0, 5.0):
            self.assertEqual(graph(Settings(scale), torch.ones(2)).tolist(), [scale] * 2)

    def test_gradient_that_a_step_read(self) -> None:
        for optimizer in (torch.optim.SGD, torch.optim.AdamW):
            model = nn.Linear(2, 2)
            step = optimizer(model.parameters(), lr=0.1)
            model(torch.ones(2)).sum().backward()
            graph = extract_compiled_graph(step.step, ())
            for _ in range(2):
                graph()
                dead = weakref.ref(model.weight.grad)
                step.zero_grad()
                self.assertIsNone(dead())
                model(torch.ones(2)).sum().backward()

    def test_gradient_that_a_program_read(self) -> None:
        weight = torch.ones(2, requires_grad=True)
        graph = extract_compiled_graph(
            lambda x: x if weight.grad is None else x * weight.grad, (torch.ones(2),)
        )
        for factor in (2.0, 3.0):
            weight.grad = torch.full((2,), factor)
            self.assertEqual(graph(torch.ones(2)).tolist(), [factor] * 2)
        dead = weakref.ref(weight.grad)
        weight.grad = None
        self.assertIsNone(dead())
        self.assertEqual(graph(torch.ones(2)).tolist(), [1.0, 1.0])


class NestingTest(unittest.TestCase):
    """Graphs among programs and programs among graphs."""

    def test_graph_inside_a_program(self):
        inner = extract_compiled_graph(lambda x: x * 2, (torch.randn(3),))
        check(lambda: lambda x: inner(x) + 1, tensors((3,)))

    def test_extraction_inside_a_program(self):
        def program(x):
            return extract_compiled_graph(lambda t: t * 2, (x,))(x) + 1

        try:
            graph = extract_compiled_graph(program, (torch.randn(3),))
        except ExtractionError as e:
            self.assertRegex(str(e), "(?i)captur")
            return
        x = torch.randn(3)
        self.assertTrue(torch.equal(graph(x), x * 2 + 1))

    def test_modes_left_changed(self):
        """What a program does to them, a replay does; the extraction leaves them alone."""
        for leave in (
            lambda: torch.set_grad_enabled(True),
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.use_deterministic_algorithms(True),
            lambda: torch.set_autocast_enabled("cpu", True),
            lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        ):
            check(lambda leave=leave: lambda x: (leave(), x @ x, torch.ones(2))[1:],
                  tensors((3, 3)), exact=False)  # fmt: skip

    def test_eager_calls_are_told(self):
        """A call that no graph serves, though eager raises nothing: a warning, and a count."""
        refusals.clear()
        graph = extract_compiled_graph(lambda x: moody(x) + 1, (torch.ones(2),))
        told = r"(?s)ran eagerly.*moody.*test_hygiene\.py:\d+.*not this time"
        with self.assertWarnsRegex(UserWarning, told):
            self.assertTrue(torch.equal(graph(torch.ones(2)), torch.full((2,), 3.0)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            graph(torch.ones(2))
        self.assertRegex(graph.explain(), r"2 calls ran eagerly: .*moody")

    def test_first_call_initializes(self):
        graph = extract_compiled_graph(nn.LazyLinear(2), (torch.ones(1, 3),))
        with self.assertRaisesRegex(ExtractionError, "no graph yet.*uninitialized"):
            graph.graph_text()
        for _ in range(2):
            graph(torch.ones(1, 3))
        self.assertIn("1 call ran eagerly: the program has uninitialized", graph.explain())
        self.assertIn("addmm", graph.graph_text())

    def test_graph_of_a_graph(self):
        inner = extract_compiled_graph(nn.ReLU(), (torch.randn(3),))
        check(lambda: lambda x: inner(x), tensors((3,)))

    def test_recursive_program(self):
        def fact(x, n):
            return x if n == 0 else fact(x * n, n - 1)

        check(lambda: fact, lambda i: (torch.randn(2), i % 3), calls=5, captures=3)

    def test_long_program(self):
        def program(x):
            for i in range(3000):
                x = x * 0.999 + i * 1e-4
            return x

        check(lambda: program, tensors((3,)))

    test_sees_the_module_again = maketest(Stateful, tensors((4, 3)), calls=6, exact=False)


if __name__ == "__main__":
    unittest.main()
