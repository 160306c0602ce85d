"""The oracle of the behaviour tests: a replay must be indistinguishable from the eager call.

    from oracle import Call, check

    check(lambda: Model(), lambda i: (torch.randn(2, 3),))

`check` makes two programs that do not know of each other, captures one of them and calls both
with equal inputs, call after call. What it compares is what a program can observe:

* the result: its structure and types, and of each tensor the value, dtype, shape, strides,
  storage offset, device, layout, requires_grad, conj and neg bits, gradient;
* which tensors are one object and which share a storage, among results, arguments, parameters,
  buffers and everything else that the program can reach; and that writing through a result shows
  in the same places (and moves the same version counters);
* arguments and state of the program after the call: values, shapes, strides, the storage they
  live in, how far the version counters moved, Python attributes;
* the results of the call before: no later call may write over them unless eager does;
* the random number generator, and the modes and defaults of torch after the call;
* exceptions: type and message, and everything above in the state that they leave behind.

The extraction must change nothing: arguments, program, random numbers, modes, defaults, warning
filters. The calls must be served by graphs, and by no more of them than expected.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import random
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torch_lazy_ext import CompiledGraph, _native, extract_compiled_graph

__all__ = [
    "Call",
    "check",
    "check_refused",
    "expected_failures",
    "makefunctiontest",
    "maketest",
    "needs_inductor",
    "random_tensor",
    "tensors",
]

Program = Callable[..., Any]

needs_inductor = unittest.skipIf(_native.unquoted_path(), str(_native.unquoted_path()))

SEED = 20240
VERSION = "version counter moved by"

# Compared by value; anything else is walked into, or compared by type alone.
PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    slice,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.finfo,
    torch.iinfo,
)


class Call:
    """The arguments of one call, where a tuple of positional ones does not say it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """A `make_inputs`: fresh random tensors of these shapes on each call."""

    def make(i: int) -> tuple[torch.Tensor, ...]:
        return tuple(random_tensor(shape, dtype) for shape in shapes)

    return make


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values that fit the dtype: normal ones, integers of 0 to 9, or booleans."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 10, shape).to(dtype)


# ------------------------------------------------------------------- what can be observed


@dataclasses.dataclass
class Found:
    """A place that a walk came by: a tensor, a plain value, or the type of a container."""

    path: str
    value: Any


def walk(value: Any, path: str, seen: dict[int, str]) -> Iterator[Found]:
    """Everything that `value` holds, in an order that depends on its structure alone.

    An object that was met before is a string, "the same object as PATH": which objects are one is
    part of the structure. `seen` maps ids to paths; the caller keeps the objects alive.
    """
    if isinstance(value, PLAIN):
        yield Found(path, value)
        return
    if id(value) in seen:
        yield Found(path, f"the same object as {seen[id(value)]}")
        return
    if not isinstance(value, (tuple, set, frozenset)):
        # The compiler may make one object of two equal constants: those have no identity.
        seen[id(value)] = path
    if nn.parameter.is_lazy(value):
        yield Found(path, type(value))
        return
    if isinstance(value, torch.Tensor):
        yield Found(path, value)
        # Asking a view that is no leaf whether it is one may raise.
        grad = value.grad if value._base is None and value.is_leaf else None
        if grad is not None:
            yield from walk(grad, f"{path}.grad", seen)
        return
    yield Found(path, type(value))
    if isinstance(value, torch.Generator):
        yield Found(f"{path}.state", bytes(value.get_state().tolist()))
    elif isinstance(value, functools.partial):
        for name in ("func", "args", "keywords"):
            yield from walk(getattr(value, name), f"{path}.{name}", seen)
    elif isinstance(value, types.MethodType):
        yield from walk(value.__self__, f"{path}.__self__", seen)
    elif isinstance(value, types.FunctionType):
        yield Found(f"{path}.__qualname__", value.__qualname__)
        yield from _walk_function(value, path, seen)
    elif isinstance(value, torch.jit.ScriptModule):
        for name, item in (*value.named_parameters(), *value.named_buffers()):
            yield from walk(item, f"{path}.{name}", seen)
    elif isinstance(value, (torch.jit.ScriptFunction, CompiledGraph)):
        pass  # Nothing that a program could look into.
    elif isinstance(value, (set, frozenset)):
        yield Found(path, sorted(map(repr, value)))
    elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        yield Found(path, value)
    else:
        yield from _walk_container(value, path, seen)


def _walk_container(value: Any, path: str, seen: dict[int, str]) -> Iterator[Found]:
    if isinstance(value, dict):
        # The keys of hooks are numbers drawn from a counter of the process.
        anonymous = path.rpartition(".")[2].endswith(("_hooks", "_hooks_with_kwargs"))
        for i, (key, item) in enumerate(value.items()):
            yield from walk(item, f"{path}[{i if anonymous else key!r}]", seen)
    elif isinstance(value, (list, tuple, collections.deque)):
        for i, item in enumerate(value):
            yield from walk(item, f"{path}[{i}]", seen)
    for name in ("maxlen", "default_factory"):
        if isinstance(value, (collections.deque, collections.defaultdict)):
            yield from walk(getattr(value, name, None), f"{path}.{name}", seen)
    for name, item in getattr(value, "__dict__", {}).items():
        yield from walk(item, f"{path}.{name}", seen)
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield from walk(getattr(value, name), f"{path}.{name}", seen)


def _walk_function(
    function: types.FunctionType, path: str, seen: dict[int, str]
) -> Iterator[Found]:
    if (function.__module__ or "").partition(".")[0] == "torch":
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # A cell that is still empty.
            yield from walk(cell.cell_contents, f"{path}<{name}>", seen)
    yield from walk(function.__defaults__, f"{path}.__defaults__", seen)
    yield from walk(function.__kwdefaults__, f"{path}.__kwdefaults__", seen)
    for name in function.__code__.co_names:
        item = function.__globals__.get(name)
        if isinstance(item, (torch.Tensor, nn.Module, *PLAIN, dict, list, tuple)):
            yield from walk(item, f"{path}<global {name}>", seen)


class Scene:
    """One side of the comparison: a program, and what went into it and came out of it.

    `roots` are the named values to walk; a Scene holds on to them, so that ids stay unique.
    """

    def __init__(self, **roots: Any) -> None:
        self.roots = roots
        self._before: dict[int, tuple[torch.Tensor, int, int]] = {}
        self._kept: list[Any] = []

    def found(self) -> list[Found]:
        seen: dict[int, str] = {}
        return [f for name, root in self.roots.items() for f in walk(root, name, seen)]

    def identities(self) -> list[int]:
        """The ids of all objects on the walk, plain values aside."""
        seen: dict[int, str] = {}
        for name, root in self.roots.items():
            for _ in walk(root, name, seen):
                pass
        return list(seen)

    def remember(self) -> None:
        """Note which tensors there are, with their storages and version counters."""
        here = [f.value for f in self.found() if isinstance(f.value, torch.Tensor)]
        self._before = {id(t): (t, _version(t), _storage(t)) for t in here}
        # An address says nothing once its storage is gone and another one lives there.
        self._kept = [t.untyped_storage() for t in here if _has_storage(t)]

    def observe(self) -> list[tuple[str, Any, torch.Tensor | None]]:
        """One (path, facts, value) for each place; `value` is a copy where it is a tensor."""
        storages: dict[int, str] = {}
        observed: list[tuple[str, Any, torch.Tensor | None]] = []
        for f in self.found():
            if isinstance(f.value, torch.Tensor):
                facts = self._facts(f.value, f.path, storages)
                observed.append((f.path, facts, _copy(f.value)))
            else:
                observed.append((f.path, f.value, None))
        return observed

    def _facts(self, t: torch.Tensor, path: str, storages: dict[int, str]) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "type": type(t),
            "dtype": t.dtype,
            "shape": tuple(t.shape),
            "device": t.device,
            "layout": t.layout,
            "requires_grad": t.requires_grad,
            "inference": t.is_inference(),
        }
        if t.layout is not torch.strided:
            return facts
        facts |= {
            "strides": t.stride(),
            "storage offset": t.storage_offset(),
            "conj": t.is_conj(),
            "neg": t.is_neg(),
            "shares the storage of": storages.setdefault(_storage(t), path),
        }
        before = self._before.get(id(t))
        if before is None:
            facts["was there before the call"] = False
        else:
            facts |= {
                "was there before the call": True,
                VERSION: _version(t) - before[1],
                "has a new storage": _storage(t) != before[2],
                "bytes of storage": t.untyped_storage().nbytes(),
            }
        return facts


def _has_storage(t: torch.Tensor) -> bool:
    return t.layout is torch.strided


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata if _has_storage(t) else 0


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _copy(t: torch.Tensor) -> torch.Tensor:
    # Neither autograd nor the lazy bits of the original belong to its value.
    with torch.no_grad(), torch.inference_mode(False):
        if t.is_quantized:
            return t.int_repr()
        return (
            t.detach().clone() if t.is_sparse else t.detach().resolve_conj().resolve_neg().clone()
        )


def _difference(
    expected: list[tuple[str, Any, torch.Tensor | None]],
    actual: list[tuple[str, Any, torch.Tensor | None]],
    exact: bool,
    compare_values: bool,
) -> str | None:
    """The first difference between two lists that `Scene.observe` made, in words, or None."""
    for want, got in zip(expected, actual, strict=False):
        if want[0] != got[0]:
            return f"expected to find {want[0]}, found {got[0]}"
        path = want[0]
        if isinstance(want[1], dict) and isinstance(got[1], dict):
            for key in sorted((want[1].keys() | got[1].keys()) - {VERSION}):
                w, g = want[1].get(key), got[1].get(key)
                if w != g:
                    return f"{path}: {key}: expected {w}, got {g}"
        elif not _same_plain(want[1], got[1]):
            return f"{path}: expected {_name(want[1])}, got {_name(got[1])}"
        if want[2] is not None and compare_values:
            difference = _value_difference(want[2], got[2], exact)
            if difference is not None:
                return f"{path}: {difference}"
    if len(expected) != len(actual):
        longer, verb = (
            (expected, "lacks") if len(expected) > len(actual) else (actual, "has, unlike eager,")
        )
        return f"{verb} {longer[min(len(expected), len(actual))][0]}"
    # Last, since this is the least of what can go wrong with a mutation.
    for want, got in zip(expected, actual, strict=True):
        if isinstance(want[1], dict) and want[1].get(VERSION) != got[1].get(VERSION):
            return f"{want[0]}: {VERSION}: expected {want[1][VERSION]}, got {got[1][VERSION]}"
    return None


def _name(value: Any) -> str:
    if isinstance(value, type):
        return f"an object of {value.__qualname__}"
    return "a tensor" if isinstance(value, dict) else repr(value)


def _same_plain(want: Any, got: Any) -> bool:
    if isinstance(want, type) and isinstance(got, type):
        # A class may be made anew for each object, as that of an fx.GraphModule is.
        return (want.__module__, want.__qualname__) == (got.__module__, got.__qualname__)
    if type(want) is not type(got):
        return False
    return want == got or (want != want and got != got)  # Equal, or both NaN.


def _value_difference(want: torch.Tensor, got: torch.Tensor, exact: bool) -> str | None:
    if exact and want.layout is torch.strided:
        # Bit for bit: tells -0.0 from 0.0, and finds NaN equal to itself.
        if want.is_meta or torch.equal(_bits(want), _bits(got)):
            return None
        return f"expected {want}, got {got} (bit for bit)"
    try:
        torch.testing.assert_close(got, want, equal_nan=True)
    except AssertionError as e:
        return str(e)
    return None


def _bits(t: torch.Tensor) -> torch.Tensor:
    flat = t.reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8) if t.numel() else flat


def surroundings() -> dict[str, Any]:
    """What a call may depend on, or change by mistake, outside its arguments and its program."""
    return {
        "random number generator": bytes(torch.get_rng_state().tolist()),
        "random module": hash(random.getstate()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "torch function modes": torch._C._len_torch_function_stack(),
        "torch dispatch modes": torch._C._len_torch_dispatch_stack(),
        "torch function": torch._C._is_torch_function_enabled(),
        "dispatch keys included": str(torch._C._dispatch_tls_local_include_set()),
        "dispatch keys excluded": str(torch._C._dispatch_tls_local_exclude_set()),
        "functorch levels": torch._C._functorch.maybe_current_level(),
        "jit tracing": torch.jit.is_tracing(),
        "force fallback": torch._C._lazy._get_force_fallback(),
        "warning filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
    }


def _put_back(before: dict[str, Any]) -> None:
    """Set modes that a program left changed to what they were."""
    torch.set_grad_enabled(before["grad mode"])
    torch.set_default_dtype(before["default dtype"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    torch.set_autocast_enabled("cpu", before["autocast"][0])
    torch.set_autocast_dtype("cpu", before["autocast"][1])
    torch.set_num_threads(before["threads"])


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if before[key] != after[key]]


# --------------------------------------------------------------------------- the oracle


@dataclasses.dataclass
class Outcome:
    """What a call came to: its result, or the exception it raised."""

    result: Any = None
    error: Exception | None = None

    def __str__(self) -> str:
        if self.error is None:
            return "a result"
        return f"{type(self.error).__module__}.{type(self.error).__qualname__}: {self.error}"


def _attempt(function: Callable[..., Any], call: Call) -> Outcome:
    try:
        return Outcome(result=function(*call.args, **call.kwargs))
    except Exception as e:
        return Outcome(error=e)


def _poke(scene: Scene) -> list[str]:
    """Write to every tensor of the result; returns the types of the errors that this raised."""
    errors = []
    seen: dict[int, str] = {}
    for f in list(walk(scene.roots["result"], "result", seen)):
        if isinstance(f.value, torch.Tensor) and f.value.layout is torch.strided:
            try:
                with torch.no_grad():
                    f.value.logical_not_() if f.value.dtype is torch.bool else f.value.add_(1)
            except RuntimeError as e:  # Expanded memory, an inference tensor, ...
                errors.append(f"{f.path}: {type(e).__name__}")
    return errors


class _Run:
    """The state of one `check`: a program and its twin, and what to make of them."""

    def __init__(
        self, make_program: Callable[[], Program], make_inputs: Callable[..., Any]
    ) -> None:
        _warmed_up()
        self._make_program = make_program
        self._make_inputs = make_inputs
        parameters = inspect.signature(make_inputs).parameters.values()
        self._takes_index = any(p.default is p.empty for p in parameters)

    def program(self) -> Program:
        torch.manual_seed(SEED)
        random.seed(SEED)
        return self._make_program()

    def inputs(self, i: int) -> Call:
        torch.manual_seed(SEED + 1 + i)
        random.seed(SEED + 1 + i)
        made = self._make_inputs(i) if self._takes_index else self._make_inputs()
        if isinstance(made, Call):
            return made
        if not isinstance(made, (tuple, list)):
            raise TypeError(f"make_inputs returns a tuple or a Call, not {type(made).__name__}")
        return Call(*made)


@contextlib.contextmanager
def _surroundings_kept(grad: bool) -> Iterator[None]:
    """Run with the grad mode `grad`; put RNG states, modes and defaults back afterwards."""
    state, dtype, python_state = torch.get_rng_state(), torch.get_default_dtype(), random.getstate()
    try:
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python_state)
        torch.set_default_dtype(dtype)


@functools.cache
def _warmed_up() -> None:
    """Extract once: what the first extraction of a process imports is not the test's subject."""
    with warnings.catch_warnings():
        extract_compiled_graph(lambda x: x + 1, (torch.zeros(2),))


def _seeded(i: int) -> None:
    torch.manual_seed(SEED * 2 + i)
    random.seed(SEED * 2 + i)


def extract_untouched(
    program: Program, call: Call, options: dict[str, Any] | None = None
) -> tuple[CompiledGraph | None, Exception | None]:
    """Extract `program`; raise AssertionError where that changed anything at all.

    Returns the graph, or the exception that the extraction raised.
    """
    scene = Scene(program=program, arguments=(call.args, call.kwargs))
    scene.remember()
    objects = scene.identities()
    state, around = scene.observe(), surroundings()
    graph, error = None, None
    try:
        graph = extract_compiled_graph(program, call.args, call.kwargs, **(options or {}))
    except Exception as e:
        error = e
    raised = "" if error is None else f" (it raised {error!r})"
    difference = _difference(state, scene.observe(), exact=True, compare_values=True)
    if difference is None and objects != scene.identities():
        difference = "an object was replaced"
    if difference is not None:
        raise AssertionError(
            f"extraction changed the program or its arguments{raised}: {difference}"
        )
    if changed := _changed(around, surroundings()):
        raise AssertionError(f"extraction changed {', '.join(changed)}{raised}")
    return graph, error


def check(
    make_program: Callable[[], Program],
    make_inputs: Callable[..., Any],
    calls: int = 3,
    *,
    captures: int | None = 1,
    exact: bool = True,
    values: bool = True,
    grad: bool = False,
    poke: bool = True,
    between: Callable[[Any, int], object] | None = None,
    context: Callable[[int], contextlib.AbstractContextManager] | None = None,
    options: dict[str, Any] | None = None,
) -> CompiledGraph | None:
    """Compare a program with its extracted graph, over `calls` calls; see the module's docstring.

    Args:
        make_program: makes the program. Called several times, from one seed each time; the
            programs must not share state (a closure made inside does not, a global does).
        make_inputs: the arguments of call `i`, a tuple or a `Call`; i is 0 for the example that
            is extracted from, and 1 to `calls` for the calls. Called several times for each i,
            from one seed; what it returns must not be shared between times. May take no argument
            (a parameter with a default is none).
        captures: the most variants there may be in the end; None for any number.
        exact: whether tensors must agree bit for bit. Else within the tolerances of
            `torch.testing.assert_close` for their dtype: for sums in an order of their own.
        values: False for a program that returns uninitialised memory.
        grad: the grad mode of the extraction and of the calls.
        poke: whether to write to each result, and to compare once more what that changed.
        between: called as `between(program, i)` on both programs before call i, from one seed.
        context: entered around call i (0 for the extraction) on either side.
        options: further arguments of `extract_compiled_graph`.

    Returns the graph; None if the program raises on the example: then the extraction must raise
    the same, and that was checked. Raises AssertionError for every difference.
    """
    if calls < 3:
        raise ValueError("a replay that went well twice can be wrong the third time")
    run = _Run(make_program, make_inputs)
    context = context or (lambda i: contextlib.nullcontext())
    with _surroundings_kept(grad):
        program_scene, graph_scene = Scene(program=run.program()), Scene(program=run.program())
        program, captured = program_scene.roots["program"], graph_scene.roots["program"]

        # What eager makes of the example, on a program that is not used again.
        spare, call = run.program(), run.inputs(0)
        _seeded(0)
        modes = surroundings()
        with context(0):
            example = _attempt(spare, call)
        _put_back(modes)
        call = run.inputs(0)
        _seeded(0)
        with context(0):
            graph, error = extract_untouched(captured, call, options)
        if error is not None:
            if str(Outcome(error=error)) == str(example):
                return None
            raise AssertionError(f"extraction raised {error!r}, eager came to {example}") from error
        assert graph is not None
        if example.error is not None:
            # An error that depends on the values of tensors: it comes with the call.
            call = run.inputs(0)
            _seeded(0)
            with context(0):
                late = _attempt(graph, call)
            if str(late) != str(example):
                raise AssertionError(f"eager came to {example}, and the graph to {late}")

        served = 0
        for i in range(1, calls + 1):
            outcomes, around, expected = [], [], []
            for scene, function in ((program_scene, program), (graph_scene, graph)):
                if between is not None:
                    _seeded(-i)
                    between(scene.roots["program"], i)
                call = run.inputs(i)
                scene.roots |= {"arguments": (call.args, call.kwargs), "result": None}
                scene.remember()
                _seeded(i)
                before = surroundings()
                with context(i):
                    outcomes.append(_attempt(function, call))
                around.append(surroundings())
                _put_back(before)
                scene.roots["result"] = outcomes[-1].result
                expected.append(scene.observe())
            try:
                _compare(i, outcomes, around, expected, exact, values)
                if poke and outcomes[0].error is None:
                    errors = [_poke(scene) for scene in (program_scene, graph_scene)]
                    observed = [scene.observe() for scene in (program_scene, graph_scene)]
                    difference = _difference(*observed, exact=exact, compare_values=values)
                    if errors[0] != errors[1] or difference is not None:
                        raise AssertionError(
                            f"call {i}: after writing to the results: {difference or errors}"
                        )
            except AssertionError as e:
                raise e from outcomes[1].error
            served += outcomes[0].error is None
            for scene in (program_scene, graph_scene):
                # The next call must leave them as they are.
                scene.roots |= {
                    "earlier result": scene.roots["result"],
                    "earlier arguments": scene.roots["arguments"],
                }

        number = len(graph.specializations)
        if captures is not None and number > captures:
            raise AssertionError(f"{number} variants were captured, expected at most {captures}")
        hits = sum(s.hits for s in graph.specializations)
        if captures is not None and hits < served:
            raise AssertionError(f"{served} calls returned, and the graphs served {hits} of them")
        return graph


def _compare(
    i: int,
    outcomes: list[Outcome],
    around: list[dict[str, Any]],
    observed: list[list[tuple[str, Any, torch.Tensor | None]]],
    exact: bool,
    values: bool,
) -> None:
    """Raise AssertionError where the two sides of call `i`, eager first, differ."""
    if (outcomes[0].error is None) != (outcomes[1].error is None) or (
        outcomes[0].error is not None and str(outcomes[0]) != str(outcomes[1])
    ):
        raise AssertionError(f"call {i}: eager came to {outcomes[0]}, the graph to {outcomes[1]}")
    difference = _difference(observed[0], observed[1], exact, values)
    if difference is not None:
        raise AssertionError(f"call {i}: {difference}")
    if changed := _changed(around[0], around[1]):
        raise AssertionError(f"call {i}: differs from eager after the call: {', '.join(changed)}")


def check_refused(
    make_program: Callable[[], Program],
    make_inputs: Callable[..., Any],
    error: type[Exception],
    pattern: str,
    *,
    grad: bool = False,
) -> None:
    """The extraction must raise `error` with a message that matches, and change nothing."""
    run = _Run(make_program, make_inputs)
    with _surroundings_kept(grad):
        _, raised = extract_untouched(run.program(), run.inputs(0))
    if raised is None:
        raise AssertionError(f"the extraction raised nothing, expected {error.__name__}")
    if not isinstance(raised, error):
        raise AssertionError(f"expected {error.__name__}, got {raised!r}") from raised
    unittest.TestCase().assertRegex(str(raised), pattern)


# ---------------------------------------------------------------------- making test methods


def maketest(
    make_program: Callable[[], Program], make_inputs: Callable[..., Any], **options: Any
) -> Callable[[Any], None]:
    """A test method: `check` with these arguments."""

    def test(self: Any) -> None:
        check(make_program, make_inputs, **options)

    return test


def makefunctiontest(
    function: Program, make_inputs: Callable[..., Any], **options: Any
) -> Callable[[Any], None]:
    """A test method for a function that holds no state, so that one serves all sides."""
    return maketest(lambda: function, make_inputs, **options)


def expected_failures(reasons: dict[str, str]) -> Callable[[type], type]:
    """A class decorator: the tests named in `reasons` must fail, for the reason given there.

    A test that passes counts as a failure, and so does a name without a test.
    """

    def decorate(cls: type) -> type:
        for name, reason in reasons.items():
            if not reason:
                raise ValueError(f"{name} is expected to fail, for no reason given")
            setattr(cls, name, unittest.expectedFailure(getattr(cls, name)))
        return cls

    return decorate
