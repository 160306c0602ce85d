# Owner(s): ["oncall: jit"]

"""Tensors of a capture that the program gives away: in results of all kinds, or where nobody looks.

What a program makes and returns, a replay makes anew. What it keeps where a replay cannot follow is
refused, with the name of the place; and what is only garbage that was not collected yet is neither.
"""

import collections
import contextlib
import functools
import gc
import itertools
import keyword
import sys
import threading
import types
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import torch
from oracle import Call, check, extract_untouched, tensors
from torch import nn

from torch_lazy_ext import UnsupportedError, _escapes, extract_compiled_graph

try:
    import numpy
except ImportError:
    numpy = None


def generated(x):
    def generator(factor):
        yield x * factor
        yield x + factor

    return generator(3)


def with_arguments(x):
    def generator(a, b=2, *rest, scale=3, **others):
        def inner():
            return a * scale

        yield inner()
        yield b * a
        yield from rest
        yield from others.values()

    return generator(x, 4, x + 1, x + 2, scale=5, last=x - 1)


def counting(x):
    """Functions that share a cell, and hold themselves."""
    total = x * 2

    def add(y):
        nonlocal total
        total = total + y
        return total, add

    return add, lambda: total


def recursive(x):
    def power(n):
        return x if n == 0 else power(n - 1) * x

    return power


class Scaled(nn.Module):
    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(scale + 1)
        self.plain = [scale]

    def forward(self, x):
        return x * self.scale + self.weight


class Tagged(functools.partial):
    pass


class Stack(set):
    pass


def linked(x):
    parent, child = types.SimpleNamespace(), types.SimpleNamespace()
    parent.child, child.parent, child.value = child, parent, x + 1
    return parent


def use_counting(result):
    add, total = result
    first, again = add(1)
    return first, again(2)[0], total(), again is add


# name -> the program, what is done with its result.
RESULTS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "set": (lambda x: {x + 1}, list),
    "set subclass": (lambda x: Stack([x + 1]), lambda r: [r.__class__ is Stack, *r]),
    "set of tuples": (lambda x: {(1, x + 1)}, list),
    "frozenset": (lambda x: frozenset([x + 1]), list),
    "keys": (lambda x: {x + 1: 1}.keys(), list),
    "values": (lambda x: {"a": x + 1, "b": x}.values(), list),
    "items": (lambda x: {1: x + 1}.items(), list),
    "values in order": (lambda x: collections.OrderedDict(a=x + 1).values(), list),
    "keyed by tensors": (lambda x: {x + 1: x * 2, (x, 2): 3}, lambda r: [*r.keys(), *r.values()]),
    "mapping proxy": (lambda x: types.MappingProxyType({"a": x + 1}), dict),
    "zip": (lambda x: zip([x + 1], (x, x)), list),
    "map": (lambda x: map(torch.exp, [x, x + 1]), list),
    "map of a closure": (lambda x: map(functools.partial(lambda a, b: a + b + x, 1), [x]), list),
    "filter": (lambda x: filter(lambda y: y is not x, [x, x + 1]), list),
    "enumerate": (lambda x: enumerate([x + 1]), list),
    "reversed": (lambda x: reversed([x, x + 1]), list),
    "iterator that has moved": (lambda x: (i := iter([x, x + 1, x + 2]), next(i))[0], list),
    "iterator over values": (lambda x: iter({"a": x + 1}.values()), list),
    "iterator over a range": (lambda x: (iter(range(3)), x + 1), lambda r: (list(r[0]), r[1])),
    "chain": (lambda x: itertools.chain([x], (x + 1,)), list),
    "product": (lambda x: itertools.product([x, x + 1], [1, 2]), list),
    "islice of a cycle": (lambda x: itertools.islice(itertools.cycle([x, x + 1]), 1, 5), list),
    "lambda": (lambda x: lambda z: x + z, lambda r: r(1)),
    "default": (lambda x: lambda z=x + 1, *, k=x + 2: z * k, lambda r: r()),
    "function with attributes": (
        lambda x: (f := lambda: None, setattr(f, "value", x + 1))[0], lambda r: r.value
    ),
    "shared cell": (counting, use_counting),
    "recursive": (recursive, lambda r: r(3)),
    "partial": (lambda x: functools.partial(torch.add, x + 1, alpha=2), lambda r: r(3)),
    "partial subclass": (lambda x: Tagged(torch.add, x + 1), lambda r: (type(r) is Tagged, r(3))),
    "bound method": (lambda x: (x + 1).mul, lambda r: r(2)),
    "method of a new object": (lambda x: Scaled(x).forward, lambda r: r(2)),
    "special method": (lambda x: [x + 1].__len__, lambda r: r()),
    "generator": (generated, list),
    "generator with arguments": (with_arguments, list),
    "generator expression": (lambda x: (x * i for i in range(3)), list),
    "slice": (lambda x: slice(x + 1, None), lambda r: r.start),
    "module": (Scaled, lambda r: (r(3), r.plain, r.scale, dict(r.named_parameters()))),
    "Linear": (
        lambda x: (m := nn.Linear(2, 2), m.weight.data.copy_(torch.stack([x, x])))[0].weight,
        lambda r: r,
    ),
    "ParameterList": (lambda x: nn.ParameterList([x + 1]), list),
    "ModuleDict": (lambda x: nn.ModuleDict({"a": Scaled(x)}), lambda r: r["a"](2)),
    "ChainMap": (lambda x: collections.ChainMap({"a": x + 1}), dict),
    "UserDict": (lambda x: collections.UserDict(a=x + 1), dict),
    "cycle of objects": (linked, lambda r: (r.child.value, r.child.parent is r)),
    "in containers": (lambda x: [{"a": (map(torch.exp, [x]), {x})}],
                      lambda r: (list(r[0]["a"][0]), list(r[0]["a"][1]))),
    "one object twice": (lambda x: [f := lambda: x, f], lambda r: (r[0] is r[1], r[0]())),
    "result and argument": (lambda x: (lambda: x, x), lambda r: r[0]() is r[1]),
}  # fmt: skip


class ResultTest(unittest.TestCase):
    """What a program makes is made anew by each replay, with the tensors of that call."""

    def setUp(self):
        # What is asked of Python's objects for this is no use that a program makes of them.
        catching = warnings.catch_warnings()
        catching.__enter__()
        self.addCleanup(catching.__exit__, None, None, None)
        warnings.simplefilter("error", DeprecationWarning)

    def test_results(self):
        for name, (program, use) in RESULTS.items():
            for grad in (False, True):
                with self.subTest(name, grad=grad), torch.set_grad_enabled(grad):
                    graph, error = extract_untouched(program, Call(torch.tensor([1.0, 2.0])))
                    self.assertIsNone(error)
                    for i in range(3):
                        x = torch.tensor([3.0, 5.0]) * (i + 1)
                        expected, actual = use(program(x)), use(graph(x))
                        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
                    self.assertEqual(len(graph.specializations), 1)

    def test_kept_in_attributes(self):
        """The same objects as attributes of the program's module."""
        for name, (program, use) in RESULTS.items():
            with self.subTest(name), torch.no_grad():
                module = Keeping(program)
                graph, error = extract_untouched(module, Call(torch.tensor([1.0, 2.0])))
                self.assertIsNone(error)
                for i in range(3):
                    x = torch.tensor([3.0, 5.0]) * (i + 1)
                    module.kept = None
                    graph(x)
                    torch.testing.assert_close(use(module.kept), use(program(x)), rtol=0, atol=0)

    def test_no_state_is_shared_between_calls(self):
        def program(x):
            seen = []
            return (lambda y: (seen.append(x + y), len(seen))[1]), x + 1

        graph = extract_compiled_graph(program, (torch.ones(2),))
        for _ in range(3):
            note, _y = graph(torch.ones(2))
            self.assertEqual([note(1), note(2)], [1, 2])

    def test_functions_that_were_there(self):
        def there(y):
            return y

        graph = extract_compiled_graph(lambda x: (there, x + 1), (torch.ones(2),))
        self.assertIs(graph(torch.ones(2))[0], there)

    def test_gradients(self):
        for name in ("lambda", "partial", "zip", "values", "generator"):
            program, use = RESULTS[name]
            graph = extract_compiled_graph(program, (torch.ones(2, requires_grad=True),))
            for i in range(3):
                x = torch.full((2,), i + 1.0, requires_grad=True)
                y = x.detach().clone().requires_grad_()

                def total(result):
                    flat = torch.utils._pytree.tree_leaves(result)
                    return sum(t.sum() * t.sum() for t in flat if isinstance(t, torch.Tensor))

                total(use(program(x))).backward()
                total(use(graph(y))).backward()
                self.assertTrue(torch.equal(x.grad, y.grad), name)


class Keeping(nn.Module):
    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.make = make
        self.kept = None

    def forward(self, x):
        self.kept = self.make(x)
        return x + 1


# ------------------------------------------------------------------- places


class Opaque:
    """An object that a program reaches, and a capture does not look into."""

    __slots__ = ("__dict__", "__weakref__", "value")


OPAQUE = threading.local()  # of the standard library
CACHE: dict[str, Any] = {}


@functools.lru_cache
def doubled(x):
    return x * 2


@functools.lru_cache
def table(n):
    return torch.arange(n) * 2


def through_module(x):
    import keyword

    keyword.kept = x + 1
    return x


def begun(x):
    def generator():
        yield x + 1
        yield x + 2

    made = generator()
    next(made)
    return made


def coroutine(x):
    async def later():
        return x + 1

    return later()


def thread_local(x):
    sys.modules["threading"].torch_lazy_ext_test = [x + 1]
    return x


def object_array(x):
    made = numpy.empty(1, dtype=object)
    made[0] = x + 1
    return made


# name -> the program, what the refusal says.
PLACES: dict[str, tuple[Callable[..., Any], str]] = {
    "cache of a function": (
        lambda x: doubled(x) + 1,
        r"keeps (a tensor that it is given|the result of aten::mul.Tensor \(at .*\)) in .*the cache"
        " of doubled",
    ),
    "attribute of a Python module": (
        through_module,
        r"keeps the result of aten::add.Tensor \(at .*py:\d+\) in attribute `kept` of module "
        "keyword,",
    ),
    "container in a Python module": (thread_local, "in a list in attribute `torch_lazy_ext_test`"),
    "generator that has begun": (begun, "in the frame of begun.<locals>.generator, which has begun"),
    "class made inside": (lambda x: type("Made", (), {"value": x + 1}), "`value` of class Made,"),
}  # fmt: skip
if numpy is not None:
    PLACES["array of objects"] = (object_array, "in a place outside of its results")


class PlaceTest(unittest.TestCase):
    def setUp(self) -> None:
        # Of a library: what a program writes to a module of its own is state.
        module = keyword
        self.addCleanup(vars(module).pop, "kept", None)
        self.addCleanup(threading.__dict__.pop, "torch_lazy_ext_test", None)
        self.addCleanup(doubled.cache_clear)
        self.module = module

    def test_refused_by_name(self):
        for name, (program, pattern) in PLACES.items():
            with self.subTest(name), self.assertRaisesRegex(UnsupportedError, pattern):
                extract_compiled_graph(program, (torch.ones(2),))

    def test_what_is_left_there(self):
        """A tensor like any other, with eager's value: not one of a capture."""
        with self.assertRaises(UnsupportedError):
            extract_compiled_graph(through_module, (torch.ones(2),))
        self.assertEqual((self.module.kept * 2).tolist(), [4.0, 4.0])

    def test_argument_is_left_there(self):
        def program(x):
            import keyword

            keyword.kept = x
            return x + 1

        x = torch.ones(2)
        with self.assertRaisesRegex(UnsupportedError, "a tensor that it is given in attribute"):
            extract_compiled_graph(program, (x,))
        self.assertEqual(self.module.kept.data_ptr(), x.data_ptr())

    def test_result_that_is_kept_as_well(self):
        """It is a result, and so brought up to date; but not in the other place."""

        def program(x):
            import keyword

            y = x + 1
            keyword.kept = y
            return y

        with self.assertRaisesRegex(UnsupportedError, "in attribute `kept` of module"):
            extract_compiled_graph(program, (torch.ones(2),))

    def test_container_that_is_kept_as_well(self):
        def program(x):
            import keyword

            result = {"a": [x + 1]}
            keyword.kept = result["a"]
            return result

        with self.assertRaisesRegex(UnsupportedError, "keeps a list .* in attribute `kept` of mod"):
            extract_compiled_graph(program, (torch.ones(2),))

    @unittest.skipIf(numpy is None, "needs numpy")
    def test_array(self):
        def program(x):
            import keyword

            keyword.kept = (x + 1).numpy()
            return x

        with self.assertRaisesRegex(UnsupportedError, "keeps a ndarray that it makes in"):
            extract_compiled_graph(program, (torch.ones(2),))

    def test_constant_in_a_cache(self):
        table.cache_clear()
        graph = extract_compiled_graph(lambda x: x + table(2), (torch.ones(2),))
        self.assertEqual((table(2) + 1).tolist(), [1, 3])
        self.assertEqual(graph(torch.ones(2)).tolist(), [1.0, 3.0])

    def test_coroutine(self):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with self.assertRaisesRegex(UnsupportedError, "coroutine|frame of"):
                extract_compiled_graph(coroutine, (torch.ones(2),))

    def test_coroutine_run_inside(self):
        async def twice(x):
            return x * 2

        def program(x):
            loop = twice(x)
            try:
                loop.send(None)
            except StopIteration as end:
                return end.value

        check(lambda: program, tensors((2,)))


class ArgumentKeptTest(unittest.TestCase):
    """The caller's own tensor is what is kept, on each call."""

    def kept(self, program: Callable[..., Any], read: Callable[[], Any]) -> None:
        graph, error = extract_untouched(program, Call(torch.ones(2)))
        self.assertIsNone(error)
        for i in range(3):
            x = torch.full((2,), float(i))
            graph(x)
            self.assertIs(read(), x)

    def test_list(self):
        seen: list[Any] = []

        def program(x):
            seen.append(x)
            return x + 1

        self.kept(program, lambda: seen[-1])

    def test_global_container(self):
        def program(x):
            CACHE["last"] = x
            return x + 1

        self.addCleanup(CACHE.clear)
        self.kept(program, lambda: CACHE["last"])

    def test_attribute(self):
        module = Keeping(lambda x: x)
        self.kept(module, lambda: module.kept)

    def test_closure_and_partial_in_attributes(self):
        module = Keeping(lambda x: [lambda: x, functools.partial(abs, x), iter([x])])
        self.kept(module, lambda: module.kept[0]())
        self.kept(module, lambda: module.kept[1].args[0])
        self.kept(module, lambda: next(module.kept[2]))

    def test_keyword(self):
        module = Keeping(lambda x: x)
        graph = extract_compiled_graph(module, (), {"x": torch.ones(2)})
        x = torch.zeros(2)
        graph(x=x)
        self.assertIs(module.kept, x)


# ------------------------------------------------------------------- garbage


def caught(x):
    y = x + 1
    try:
        raise ValueError(y)
    except ValueError as e:
        error = e
    return y * 2 if error is not None else y


def parent_and_child(x):
    parent, child = nn.Module(), nn.Module()
    parent.child = child
    object.__setattr__(child, "parent", parent)
    child.value = x + 1
    return child.value * 2


def memoized(x):
    @functools.lru_cache
    def power(n):
        return x if n == 0 else power(n - 1) * x

    return power(3)


def local_class(x):
    class Local:
        value = x + 1

        def get(self):
            return Local.value

    return Local().get()


LIBRARY: dict[str, Any] = {"__name__": "torch.test_escapes"}
exec(
    """
def class_of_library(x):
    class Local:
        def get(self):
            return x + 1

    return Local().get()
""",
    LIBRARY,
)


GARBAGE: dict[str, Callable[..., Any]] = {
    "recursive function": lambda x: recursive(x)(3),
    "memoized function": memoized,
    "parent and child": parent_and_child,
    "exception with its traceback": caught,
    "class made inside": local_class,
    "class made by a library": LIBRARY["class_of_library"],
    "distribution": lambda x: torch.distributions.MultivariateNormal(x, torch.eye(2) * 2).log_prob(
        x
    ),
    "list in itself": lambda x: (c := [x + 1], c.append(c))[0][0],
    "cycle with a result": lambda x: linked(x).child.value,
    "generator that has begun": lambda x: next(generated(x)),
}


class GarbageTest(unittest.TestCase):
    """Cycles that Python has not collected yet keep nothing."""

    def test_garbage(self):
        for name, program in GARBAGE.items():
            with self.subTest(name):
                check(lambda program=program: program, tensors((2,)))

    def test_without_the_collector(self):
        gc.disable()
        self.addCleanup(gc.enable)
        self.test_garbage()
        self.assertFalse(gc.isenabled())


class CollectorTest(unittest.TestCase):
    """What a capture does with Python's collector of garbage is undone."""

    programs = (
        lambda x: x + 1,
        lambda x: recursive(x)(3),
        lambda x: x.to_sparse(),
        lambda x: doubled(x) + 1,
        lambda x: x.no_such_method(),
        lambda x: extract_compiled_graph(lambda y: y + 1, (x,))(x),
    )

    def tearDown(self) -> None:
        doubled.cache_clear()

    def attempt(self) -> None:
        for program in self.programs:
            with contextlib.suppress(UnsupportedError, AttributeError):
                extract_compiled_graph(program, (torch.ones(2),))

    def test_nothing_stays_frozen(self):
        self.attempt()
        self.assertLess(gc.get_freeze_count(), _escapes.FROZEN_BY_PYTHON)

    def test_what_was_there_is_set_aside(self):
        """Else a capture takes as long as it takes to look through all of it."""
        gc.collect()
        count = len(gc.get_objects())
        with _escapes.Since():
            self.assertLess(len(gc.get_objects()), count / 10)

    def test_what_the_user_froze_stays(self):
        gc.collect()
        gc.freeze()
        self.addCleanup(gc.unfreeze)
        count = gc.get_freeze_count()
        self.attempt()
        self.assertGreater(gc.get_freeze_count(), count * 0.9)
        ResultTest("test_results").test_results()

    def test_in_threads(self):
        errors = []

        def run():
            try:
                for program in (caught, memoized, linked, counting) * 5:
                    extract_compiled_graph(program, (torch.ones(2),))
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        self.assertLess(gc.get_freeze_count(), _escapes.FROZEN_BY_PYTHON)


if __name__ == "__main__":
    unittest.main()
