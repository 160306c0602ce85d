# Owner(s): ["oncall: jit"]

"""Nothing of an extraction stays behind, however it ends.

A row of the table is a small world that a program changes: what it looks like is compared before
and after an extraction that succeeds, one whose program raises, one that is refused, and one that a
signal ends. That the program does change its world is seen when it runs eagerly.
"""

import array
import collections
import contextlib
import contextvars
import dataclasses
import functools
import gc
import itertools
import os
import random
import sys
import threading
import types
import unittest
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import nn

from torch_lazy_ext import UnsupportedError, _lift, extract_compiled_graph

World = tuple[Callable[[torch.Tensor], Any], Callable[[], Any]]
ROWS: dict[str, Callable[[], World]] = {}


def row(make: Callable[[], World]) -> Callable[[], World]:
    """`make` gives a program, and what tells what its world looks like: values that are equal or
    tensors, with the identity of what is held."""
    ROWS[make.__name__] = make
    return make


def described(value: Any) -> Any:
    """Of a container its items; of a tensor its identity, version and values."""
    if isinstance(value, torch.Tensor):
        grad = value.grad if value.is_leaf else None
        return id(value), value._version, value.requires_grad, value.tolist(), described(grad)
    if isinstance(value, dict):
        return type(value), [(described(k), described(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [described(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, map(described, value)))
    if isinstance(value, (bytearray, array.array)):
        return type(value), list(value)
    if isinstance(value, (int, float, str, bytes, bool, type(None))):
        return type(value), value
    return type(value), id(value)


def held(container: Any, change: Callable[[Any, torch.Tensor], object]) -> World:
    def program(x: torch.Tensor) -> torch.Tensor:
        change(container, x)
        return x * 2

    return program, lambda: described(container)


@row
def list_of_an_object() -> World:
    return held([1], lambda c, x: c.append(x + 1))


@row
def list_reversed() -> World:
    return held([1, 2, 3], lambda c, x: c.reverse())


@row
def dictionary() -> World:
    return held({"a": 1}, lambda c, x: c.update(a=x + 1, b=2))


@row
def order_of_a_dictionary() -> World:
    return held({"a": 1, "b": 2}, lambda c, x: c.update(a=c.pop("a")))


@row
def ordered_dictionary() -> World:
    content = collections.OrderedDict(a=1, b=2)
    return held(content, lambda c, x: c.move_to_end("a"))


@row
def default_dictionary() -> World:
    return held(collections.defaultdict(list), lambda c, x: c["k"].append(x.sum()))


@row
def set_of_numbers() -> World:
    return held({1, 2}, lambda c, x: c.add(len(x) + 5))


@row
def set_emptied() -> World:
    return held({1, 2}, lambda c, x: c.clear())


@row
def deque() -> World:
    return held(collections.deque([1, 2], maxlen=2), lambda c, x: c.append(x + 1))


@row
def bytes_in_place() -> World:
    return held(bytearray(b"ab"), lambda c, x: c.extend(b"c"))


@row
def array_in_place() -> World:
    return held(array.array("d", [1.0]), lambda c, x: c.append(2.0))


@row
def nested_containers() -> World:
    return held({"a": [{"b": {1}}]}, lambda c, x: c["a"][0]["b"].add(7))


@row
def user_list() -> World:
    content = collections.UserList([1])
    program, _ = held(content, lambda c, x: c.append(x * 1))
    return program, lambda: described(content.data)


@dataclasses.dataclass
class Meter:
    count: int = 0
    last: Any = None


@row
def dataclass() -> World:
    meter = Meter()

    def program(x: torch.Tensor) -> torch.Tensor:
        meter.count += 1
        meter.last = x.sum()
        return x + meter.count

    return program, lambda: described(vars(meter))


@row
def slots() -> World:
    class Slotted:
        __slots__ = ("a", "b")

    value = Slotted()
    value.a = 1

    def program(x: torch.Tensor) -> torch.Tensor:
        value.a, value.b = x + 1, 2
        return x * 2

    return program, lambda: described([getattr(value, n, None) for n in ("a", "b")])


@row
def class_attribute() -> World:
    class Counted:
        count = 0

    def program(x: torch.Tensor) -> torch.Tensor:
        Counted.count += 1
        Counted.fresh = x + 1
        return x * 2

    return program, lambda: (Counted.count, hasattr(Counted, "fresh"))


@row
def function_attribute() -> World:
    def program(x: torch.Tensor) -> torch.Tensor:
        program.calls = getattr(program, "calls", 0) + 1
        return x * 2

    return program, lambda: described(vars(program))


def counted(owner: Any) -> World:
    """A program that changes one attribute of `owner`, and adds another."""
    owner.count = 0

    def program(x: torch.Tensor) -> torch.Tensor:
        owner.count += 1
        owner.last = x + 1
        return x * 2

    def now() -> Any:
        return described({k: v for k, v in vars(owner).items() if not k.startswith("_")})

    return program, now


CALLS = 0


@row
def global_variable() -> World:
    def program(x: torch.Tensor) -> torch.Tensor:
        global CALLS
        CALLS += 1
        return x * 2

    return program, lambda: CALLS


@row
def attribute_of_a_module_of_python() -> World:
    return counted(types.ModuleType("made_for_a_test"))


@row
def closure() -> World:
    count = 0

    def program(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return x * 2

    return program, lambda: count


@row
def context_variable() -> World:
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default=0)

    def program(x: torch.Tensor) -> torch.Tensor:
        variable.set(variable.get() + 1)
        return x * 2

    return program, variable.get


@row
def thread_local() -> World:
    return counted(threading.local())


@row
def environment() -> World:
    def program(x: torch.Tensor) -> torch.Tensor:
        os.environ["TORCH_LAZY_EXT_LEFT_BEHIND"] = "1"
        return x * 2

    return program, lambda: os.environ.get("TORCH_LAZY_EXT_LEFT_BEHIND")


@row
def attribute_of_a_tensor() -> World:
    held_tensor = torch.ones(2)

    def program(x: torch.Tensor) -> torch.Tensor:
        held_tensor.tag = 3
        return x * held_tensor

    return program, lambda: described(vars(held_tensor))


@row
def state_of_modules() -> World:
    norm = nn.BatchNorm1d(2)

    def program(x: torch.Tensor) -> torch.Tensor:
        norm.momentum = 0.5
        norm.extra = nn.Linear(2, 2)
        norm.register_buffer("late", x[0] * 1)
        return norm(x)

    def now() -> Any:
        plain = {k: v for k, v in vars(norm).items() if not k.startswith("_")}
        return described([plain, norm._buffers, norm._modules, norm._parameters])

    return program, now


@row
def mode_of_a_module() -> World:
    net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))

    def program(x: torch.Tensor) -> torch.Tensor:
        net.eval()
        return net(x)

    return program, lambda: [m.training for m in net.modules()]


@row
def hooks_of_a_module() -> World:
    net = nn.Linear(2, 2)

    def program(x: torch.Tensor) -> torch.Tensor:
        net.register_forward_hook(lambda *_: None)
        net.register_forward_pre_hook(lambda *_: None)
        return net(x)

    return program, lambda: (len(net._forward_hooks), len(net._forward_pre_hooks))


@row
def hooks_of_a_parameter() -> World:
    weight = nn.Parameter(torch.ones(2))

    def program(x: torch.Tensor) -> torch.Tensor:
        weight.register_hook(lambda g: g * 2)
        return x * weight

    return program, lambda: len(weight._backward_hooks or ())


@row
def global_hooks() -> World:
    net = nn.Linear(2, 2)
    hooks = nn.modules.module._global_forward_hooks

    def program(x: torch.Tensor) -> torch.Tensor:
        nn.modules.module.register_module_forward_hook(lambda *_: None)
        return net(x)

    return program, lambda: len(hooks)


@row
def gradients() -> World:
    net = nn.Linear(2, 2)

    def program(x: torch.Tensor) -> torch.Tensor:
        net(x).sum().backward()
        return x * 2

    return program, lambda: described(list(net.parameters()))


@row
def gradient_set_to_none() -> World:
    net = nn.Linear(2, 2)
    net(torch.ones(1, 2)).sum().backward()

    def program(x: torch.Tensor) -> torch.Tensor:
        net.zero_grad()
        return net(x)

    return program, lambda: described(list(net.parameters()))


@row
def requires_grad_switched() -> World:
    weight = nn.Parameter(torch.ones(2))

    def program(x: torch.Tensor) -> torch.Tensor:
        weight.requires_grad_(False)
        return x * weight

    return program, lambda: described(weight)


@row
def steps_of_an_optimizer() -> World:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def program(x: torch.Tensor) -> torch.Tensor:
        loss = net(x).sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    def now() -> Any:
        return described([list(net.parameters()), dict(optimizer.state), scheduler.last_epoch])

    return program, now


@row
def tensors_in_place() -> World:
    state = torch.ones(2)

    def program(x: torch.Tensor) -> torch.Tensor:
        state.add_(1)
        state.unsqueeze_(0)
        return x * state

    return program, lambda: (described(state), state.shape)


@row
def data_of_a_tensor() -> World:
    state = torch.ones(2)

    def program(x: torch.Tensor) -> torch.Tensor:
        state.data = x[0] + 1
        return x * state

    return program, lambda: described(state)


@row
def random_numbers() -> World:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(2)

    return program, lambda: torch.get_rng_state().tolist()


@row
def seed() -> World:
    def program(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return x + torch.rand(2)

    torch.manual_seed(0)
    return program, torch.initial_seed


@row
def generator_of_its_own() -> World:
    generator = torch.Generator().manual_seed(3)

    def program(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(2, generator=generator)

    return program, lambda: generator.get_state().tolist()


@row
def grad_mode() -> World:
    def program(x: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(False)
        return x * 2

    return program, torch.is_grad_enabled


@row
def module_imported_inside() -> World:
    module: Any = types.ModuleType("made")
    module.uses = []
    sys.modules["this_module_is_made_by_a_test"] = module

    def program(x: torch.Tensor) -> torch.Tensor:
        import this_module_is_made_by_a_test as made

        made.uses.append(1)
        return x * 2

    return program, lambda: described(module.uses)


@row
def partial_with_a_list() -> World:
    calls: list[int] = []

    def note(into: list[int], x: torch.Tensor) -> torch.Tensor:
        into.append(len(x))
        return x * 2

    return functools.partial(note, calls), lambda: described(calls)


@row
def method_of_an_object() -> World:
    class Net:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def run(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(x.shape[0])
            return x * 2

    net = Net()
    return net.run, lambda: described(net.seen)


@row
def weak_references() -> World:
    class Thing:
        pass

    thing = Thing()
    kept_alive = [thing]
    references = weakref.WeakValueDictionary(a=thing)
    kept: list[Any] = []

    def program(x: torch.Tensor) -> torch.Tensor:
        kept.append(references["a"])
        return x * 2

    return program, lambda: (described(kept), list(references), len(kept_alive))


def surroundings() -> Any:
    """What is the process's, and no row's: PyTorch as it was, and the interpreter."""
    methods = {name: value for name, value in vars(torch.Tensor).items() if callable(value)}
    return [
        {name: id(value) for name, value in methods.items()},
        {name: id(value) for name, value in vars(torch).items() if callable(value)},
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        gc.isenabled(),
        gc.get_freeze_count(),
        sys.getprofile(),
        sys.gettrace(),
        warnings.filters[:],
        random.getstate(),
    ]


class Interrupt(KeyboardInterrupt):
    """As a signal's handler raises it."""


def succeeds(x: Any) -> None:
    pass


def raises(x: Any) -> None:
    raise ValueError("the program's own")


def is_refused(x: Any) -> None:
    random.random()


def is_interrupted(x: Any) -> None:
    raise Interrupt


ENDS: dict[Callable[[Any], None], type[BaseException] | None] = {
    succeeds: None,
    raises: ValueError,
    is_refused: UnsupportedError,
    is_interrupted: Interrupt,
}


class Kept:
    """Where a program finds an array."""

    def __init__(self, array: Any) -> None:
        self.array = array


def large() -> Any:
    return numpy.zeros(_lift.LARGEST_COPY // 8 + 1)


WRITES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "item": (lambda: numpy.zeros(3), lambda a: a.__setitem__(0, 1)),
    "slice": (lambda: numpy.zeros(3), lambda a: a[1:].fill(2)),
    "in place": (lambda: numpy.zeros(3), lambda a: a.__iadd__(1)),
    "out": (lambda: numpy.zeros(3), lambda a: numpy.add(a, 1, out=a)),
    "method": (lambda: numpy.array([3, 1, 2]), lambda a: a.sort()),
    "transposed": (lambda: numpy.zeros((2, 3)).T, lambda a: a.__setitem__((0, 1), 1)),
    "part of a larger one": (lambda: numpy.zeros(9)[::2], lambda a: a.__setitem__(0, 1)),
    "shape": (lambda: numpy.zeros(4), lambda a: setattr(a, "shape", (2, 2))),
    "shape of a part": (lambda: numpy.zeros(9)[:4], lambda a: setattr(a, "shape", (2, 2))),
    "objects": (lambda: numpy.array([object(), None]), lambda a: a.__setitem__(0, 1)),
    "large": (large, lambda a: a.__setitem__(0, 1)),
    "part of a large one": (lambda: large()[1:], lambda a: a.__setitem__(0, 1)),
}
FOUND_IN: dict[str, Callable[[Any, Any], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "closure": lambda a, write: (lambda x: (write(a), x * 2)[1], ()),
    "argument": lambda a, write: (lambda x, a: (write(a), x * 2)[1], (a,)),
    "argument's list": lambda a, write: (lambda x, held: (write(held[0]), x * 2)[1], ([a],)),
    "attribute": lambda a, write: ((lambda k: lambda x: (write(k.array), x * 2)[1])(Kept(a)), ()),
    "default": lambda a, write: (lambda x, a=a: (write(a), x * 2)[1], ()),
}


class ArrayTest(unittest.TestCase):
    """What numpy writes is not recorded: it is undone and refused."""

    def test_writes(self) -> None:
        for way, (make, write) in WRITES.items():
            for place, put in FOUND_IN.items():
                with self.subTest(way, place=place):
                    array = make()
                    text = array.shape, array.tobytes()
                    program, further = put(array, write)
                    with self.assertRaisesRegex(
                        UnsupportedError, "writes to a numpy array that was there before it"
                    ):
                        extract_compiled_graph(program, (torch.ones(2), *further))
                    self.assertEqual((array.shape, array.tobytes()), text)
                    self.assertTrue(array.flags.writeable)
                    program(torch.ones(2), *further)
                    self.assertNotEqual((array.shape, array.tobytes()), text)

    def test_program_that_raises(self) -> None:
        array = numpy.zeros(3)

        def program(x):
            array[0] = 1
            raise ValueError("mine")

        with self.assertRaisesRegex(ValueError, "mine"):
            extract_compiled_graph(program, (torch.ones(2),))
        self.assertEqual(array.tolist(), [0, 0, 0])

    def test_base_and_views(self) -> None:
        for base in (numpy.zeros(4), large()):
            views = [base, base[1:], base[:3], base[1:3]]

            def program(x, views=views):
                views[3][0] = 1
                return x * 2

            before = base.tobytes()
            with self.assertRaisesRegex(UnsupportedError, "writes to a numpy array"):
                extract_compiled_graph(program, (torch.ones(2),))
            self.assertEqual(base.tobytes(), before)
            self.assertTrue(all(v.flags.writeable for v in views))

    def test_line(self) -> None:
        array, big = numpy.zeros(3), large()
        line = program_line = 0

        def small_one(x):
            array[0] = 1
            return x

        def large_one(x):
            big[0] = 1
            return x

        for program in (small_one, large_one):
            line = program.__code__.co_firstlineno + 1
            with self.assertRaisesRegex(UnsupportedError, rf"test_left_behind\.py:{line}\)"):
                extract_compiled_graph(program, (torch.ones(2),))
            self.assertGreater(line, program_line)
            program_line = line

    def test_read(self) -> None:
        """Arrays that are only read, or that the program makes; and those that nobody may write."""
        array, big, locked = numpy.ones(3), large(), numpy.ones(3)
        locked.flags.writeable = False

        def program(x):
            own = array.copy()
            own[0] = 3
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ours = torch.from_numpy(own) + torch.from_numpy(big)[:3] + float(array[1])
            return x * ours + float(locked[0])

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            graph = extract_compiled_graph(program, (torch.ones(3, dtype=torch.float64),))
        for _ in range(2):
            x = torch.randn(3, dtype=torch.float64)
            self.assertTrue(torch.equal(graph(x), program(x)))
        self.assertEqual(len(graph.specializations), 1)
        self.assertTrue(big.flags.writeable)
        self.assertFalse(locked.flags.writeable)
        array[1] = 5
        x = torch.randn(3, dtype=torch.float64)
        self.assertTrue(torch.equal(graph(x), program(x)))


class LeftBehindTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.addCleanup(os.environ.pop, "TORCH_LAZY_EXT_LEFT_BEHIND", None)
        self.addCleanup(sys.modules.pop, "this_module_is_made_by_a_test", None)
        self.addCleanup(nn.modules.module._global_forward_hooks.clear)
        self.addCleanup(torch.set_grad_enabled, True)

    def extract(self, name: str, end: Callable[[Any], None]) -> None:
        program, now = ROWS[name]()
        x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

        def ending(x: torch.Tensor) -> Any:
            result = program(x)
            end(result)
            return result

        before, around = now(), surroundings()
        raised: BaseException | None = None
        try:
            extract_compiled_graph(ending, (x,))
        except BaseException as e:
            raised = e
        self.assertIs(type(raised) if raised else None, ENDS[end], raised)
        del raised
        self.assertEqual(now(), before)
        self.assertEqual(surroundings(), around)
        self.assertEqual(x.tolist(), [[1.0, 2.0], [3.0, 4.0]])
        self.assertEqual((x._version, x.requires_grad, x.grad), (0, False, None))
        with contextlib.suppress(ValueError, Interrupt):
            ending(x.clone())
        self.assertNotEqual(now(), before, "the program changes nothing")

    def test_nothing_is_left(self) -> None:
        for name, end in itertools.product(ROWS, ENDS):
            with self.subTest(world=name, end=end.__name__):
                self.extract(name, end)
                self.doCleanups()
                self.setUp()

    def test_hooks_that_are_removed(self) -> None:
        """By their handles, of which the program's tensors know nothing; no backward is run."""
        state, argument = (torch.ones(2, requires_grad=True) for _ in range(2))
        handles = [state.register_hook(lambda g: g * 2)]
        handles.append(argument.register_post_accumulate_grad_hook(lambda t: None))
        for handle in handles:
            with self.subTest(hook=handle):

                def program(x: torch.Tensor, handle: Any = handle) -> torch.Tensor:
                    handle.remove()
                    return x * state

                with self.assertRaisesRegex(UnsupportedError, "the program removes a hook"):
                    extract_compiled_graph(program, (argument,))
        self.assertEqual(len(state._backward_hooks), 1)
        self.assertEqual(len(argument._post_accumulate_grad_hooks), 1)


if __name__ == "__main__":
    unittest.main()
