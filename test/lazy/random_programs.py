# Owner(s): ["oncall: jit"]

"""Random programs, and the comparison of a program with its graph.

`Generated` makes a program of numbers: statements over a few inputs (some of which share memory), a
module's own state and earlier results. A statement that eager refuses is left out when the program
is made, or ends it. `compare` calls the program and its graph side by side and looks at everything
that a caller can see.

A *wide* program has parameters, leaves, hooks, classes and a module's globals too; between its calls
the world changes, and what it returns is differentiated.
"""

import array
import collections
import contextlib
import contextvars
import copy
import functools
import itertools
import math
import re
import textwrap
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from hypothesis import reject
from random_known import KNOWN, PATTERNS
from random_statements import (
    ALIASED,
    AMBIENT,
    CHANGES_OF_WORLD,
    DRAWN,
    DTYPES,
    FRESH,
    GROUPS,
    NUMBERS,
    RETURNS,
    SHAPES,
    WIDE_DRAWN,
    WIDE_DTYPES,
    WIDE_GROUPS,
    WIDE_RETURNS,
    WIDE_SHAPES,
    WORLD,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_lazy_ext import ExtractionError, extract_compiled_graph

CALLS = 3
LARGEST = 200  # elements of a tensor in a program


class Wide(NamedTuple):
    """The numbers that a wide program has beside those of a plain one."""

    ambient: int  # what is around the calls
    changes: list[tuple[int, int]]  # (before which call, which change of the world)
    derive: int  # what is made of the results
    ends: bool  # the first statement that eager refuses is the last one


class Generated:
    """A program that numbers were turned into.

    Args:
        inputs: for each input, numbers that say what it is; the second list is for the last call.
        statements: (group, template, and numbers to choose operands) of each statement.
        result: numbers that choose what is returned.
        wide: of a wide program; None of a plain one.
    """

    def __init__(
        self,
        inputs: list[tuple[int, int, int, int]],
        other_inputs: list[tuple[int, int, int, int]] | None,
        statements: list[tuple[int, int, int, int, int]],
        result: tuple[int, int, int, int],
        wide: Wide | None = None,
    ) -> None:
        self.wide = wide
        self.excluded: collections.Counter[str] = collections.Counter()
        self.make_inputs = _make_inputs_source(inputs, "make_inputs", wide is not None)
        self.count = len(inputs)
        if other_inputs is not None:
            # As many as the program takes.
            other = (other_inputs * self.count)[: self.count]
            self.make_inputs += _make_inputs_source(other, "make_other_inputs", wide is not None)
            last = f"make_other_inputs(i) if i == {CALLS} else make_inputs(i)"
        else:
            last = "make_inputs(i)"
        self.make_inputs += f"\n\ndef inputs(i):\n    return {last}\n"
        self.body: list[str] = []
        self.surroundings = ""
        self._made = 0
        self._grow(statements, result)

    # ------------------------------------------------------------------ making it

    def _grow(
        self, statements: list[tuple[int, int, int, int, int]], result: tuple[int, int, int, int]
    ) -> None:
        """Add statement after statement; what eager refuses is left out, or is the last one."""
        world: dict[str, Any] = _scope()
        exec(self.make_inputs, world)
        exec(_world_code(STATE_CLASS if self.wide is None else WORLD), world)
        ambient = "contextlib.nullcontext()"
        ends = False
        if self.wide is not None:
            ambient = AMBIENT[self.wide.ambient % len(AMBIENT)]
            ends = self.wide.ends
            self._change_world()
        _seeded(0)
        *tensors, n = world["inputs"](0)
        world |= dict(zip("abc", tensors))
        world |= {"n": n, "self": world["State"](), "k": 0}
        returns = RETURNS if self.wide is None else WIDE_RETURNS
        pending = list(reversed(statements))
        with warnings.catch_warnings(), modes_kept():
            warnings.simplefilter("ignore")
            with eval(ambient, {**world, "i": 0}):
                while pending:
                    last = statements[len(statements) - len(pending)][4] == 127
                    lines = self._statement(pending, world)
                    if self._is_excluded(lines):
                        continue
                    trial = dict(world)
                    if self._runs(lines, trial):
                        world = trial
                        self.body += lines
                    elif last or (ends and self.wide is not None and self.body):
                        # A program of which the last statement may raise.
                        self.body += lines
                        return
                known = self.wide is not None and "only_a_backward_would_fail" in KNOWN
                if known and _backward_would_fail(world):
                    reject()
                for choice in (result, (0, *result[1:])):
                    lines = [self._fill(returns[choice[0] % len(returns)], choice[1:], world)]
                    tried = [line.replace("return ", "_ = ") for line in lines]
                    if not self._is_excluded(lines) and self._runs(tried, world):
                        self.body += lines
                        return
        self.body.append("return k")

    def _is_excluded(self, lines: list[str]) -> bool:
        """Whether these lines, after those that are there, are of a kind that is known to fail."""
        if self.wide is None:
            return False
        text = "\n".join([self.surroundings, *self.body, *lines])
        found = [name for name, known in PATTERNS.items() if known.search(text)]
        self.excluded.update(found)
        return bool(found)

    def _change_world(self) -> None:
        assert self.wide is not None
        lines = [f"def ambient(i):\n    return {AMBIENT[self.wide.ambient % len(AMBIENT)]}\n\n"]
        lines.append("def change(p, i):\n    pass")
        for when, what in self.wide.changes:
            text = CHANGES_OF_WORLD[what % len(CHANGES_OF_WORLD)]
            if not any(known.search(text) for known in PATTERNS.values()):
                lines.append(f"    if i == {2 + when % (CALLS - 1)}:\n        {text}")
        lines.append(f"\n\nderive = {self.wide.derive % DERIVATIONS}\n")
        self.surroundings = "\n".join(lines)

    def _runs(self, lines: list[str], world: dict[str, Any]) -> bool:
        if any("register_hook" in line for line in lines) and any(
            _is_variable(name) and isinstance(v, Tensor) and _crashes_with_a_hook(v)
            for name, v in world.items()
        ):
            return False
        try:
            exec("\n".join(lines), world)
        except Exception:
            # Nobody can read such a tensor, not even eager.
            if any(isinstance(v, Tensor) and _exceeds_memory(v) for v in world.values()):
                reject()
            return False
        tensors = [v for name, v in world.items() if _is_variable(name) and isinstance(v, Tensor)]
        if _reads_unwritten(tensors):
            return False
        return bool(tensors) and all(t.numel() <= LARGEST and t.dim() <= 6 for t in tensors)

    def _statement(self, pending: list[tuple[int, ...]], world: dict[str, Any]) -> list[str]:
        group, template, *operands = pending.pop()
        drawn, groups = (DRAWN, GROUPS) if self.wide is None else (WIDE_DRAWN, WIDE_GROUPS)
        templates = groups[drawn[group % len(drawn)]]
        text = self._fill(templates[template % len(templates)], operands, world)
        if ":|" not in text:
            return [text]
        lines: list[str] = []
        for head in text.split("|"):
            if head.startswith("    "):
                lines.append(head)
                continue
            if not head:
                continue
            lines.append(head)
            body = self._statement(pending, world) if pending else ["pass"]
            lines += ["    " + line for line in body]
        return lines

    def _fill(self, template: str, operands: Any, world: dict[str, Any]) -> str:
        names = [name for name, v in world.items() if _is_variable(name) and isinstance(v, Tensor)]
        x, y, z = operands
        values = {
            "x": names[-1 - x % len(names)],
            "y": names[-1 - y % len(names)],
            "z": names[-1 - z % len(names)],
            "c": NUMBERS[z % len(NUMBERS)],
            "d": (0, -1, 1)[y % 3],
            "dtype": f"torch.{DTYPES[z % len(DTYPES)]}",
        }
        if self.wide is not None:
            differentiable = [name for name in names if world[name].requires_grad] or names
            values["g"] = differentiable[-1 - x % len(differentiable)]
            values["h"] = differentiable[-1 - y % len(differentiable)]
        if "{v}" in template:
            self._made += 1
            values["v"] = f"v{self._made}"
        return template.format(**values)

    # -------------------------------------------------------------------- its text

    @property
    def source(self) -> str:
        parameters = ", ".join(["self", *"abc"[: self.count], "n"])
        lines = [
            f"def __call__({parameters}):",
            "    k = 0",
            *textwrap.indent("\n".join(self.body), "    ").splitlines(),
        ]
        return (
            f"{self.make_inputs}\n{STATE_CLASS if self.wide is None else WORLD}"
            f"\n\nclass Program(State):\n{textwrap.indent(chr(10).join(lines), '    ')}\n"
            + (f"\n\n{self.surroundings}" if self.wide is not None else "")
        )

    @property
    def script(self) -> str:
        return f'from random_programs import compare\n\ncompare("""{self.source}""")\n'


def _crashes_with_a_hook(t: Tensor) -> bool:
    """Whether `register_hook` may end the process: PyTorch then looks at a history that it has not
    made anew since what the view is a view of was written to."""
    base = t._base if t.requires_grad and not t.is_inference() else None
    return base is not None and base.requires_grad and base._version != 0


def _reads_unwritten(tensors: list[Tensor]) -> bool:
    """Whether one of them shows memory that no operator has written to, which holds anything.

    What `F.mse_loss` gives lies in memory for all the elements that it has added up, and `as_strided`
    leads there.
    """
    ends: dict[int, int] = {}
    for t in tensors:
        base = t._base
        written = max(_end(t), 0 if base is None else _end(base))
        if _end(t) > ends.setdefault(_storage(t), written):
            return True
    return False


def _end(t: Tensor) -> int:
    """The byte of its storage at which the memory of a tensor ends."""
    if not t.numel():
        return 0
    extent = 1 + sum([(n - 1) * s for n, s in zip(t.shape, t.stride())])
    return int(t.storage_offset() + extent) * t.itemsize


def _backward_would_fail(world: dict[str, Any]) -> bool:
    tensors = [v for name, v in world.items() if _is_variable(name)]
    tensors += [v for _, v in walk(vars(world["self"]), "state", {})]
    roots = [t for t in tensors if _is_differentiable(t) and not t.is_leaf]
    try:
        for root in roots:
            root.sum().backward(retain_graph=True, inputs=[t for t in roots if t is not root])
    except RuntimeError:
        return True
    return False


def _is_variable(name: str) -> bool:
    return re.fullmatch(r"[abc]|v\d+", name) is not None


STATE_CLASS = """
class State:
    def __init__(self):
        self.s = torch.ones(2, 3)
        self.t = torch.zeros(3)
        self.l = [torch.ones(3), self.s]
        self.d = {"k": torch.ones(2)}
        self.n = 1
"""


def _make_inputs_source(inputs: list[tuple[int, int, int, int]], name: str, wide: bool) -> str:
    lines = [f"\n\ndef {name}(i):"]
    names: list[str] = []
    both = len(FRESH) + len(ALIASED)
    for position, (kind, shape, dtype, other) in enumerate(inputs):
        own = "abc"[position]
        shapes, dtypes = (WIDE_SHAPES, WIDE_DTYPES) if wide else (SHAPES, DTYPES)
        fresh = f"random_tensor({shapes[shape % len(shapes)]}, torch.{dtypes[dtype % len(dtypes)]})"
        kind %= both
        if kind < len(FRESH) or not names:
            text = FRESH[kind % len(FRESH)]
            if text.count("{f}") > 1:
                lines.append(f"    f = {fresh}")
                fresh = "f"
        else:
            text = ALIASED[kind - len(FRESH)]
        text = text.format(f=fresh, a=names[other % len(names)] if names else "")
        try:
            # Not every view can be made of every tensor.
            scope = _scope()
            exec("\n".join([*lines, f"    {own} = {text}", f"{name}(0)"]), scope)
        except Exception:
            text = fresh
        lines.append(f"    {own} = {text}")
        requires = (kind * 7 + shape * 3 + dtype + other) % 5 if wide else 0
        if "aliased_arguments" in KNOWN and any(k % both >= len(FRESH) for k, *_ in inputs):
            requires = 0
        if requires > 1:
            # A leaf, or something with a history.
            lines.append(f"    if {own}.is_floating_point() and not {own}.requires_grad:")
            lines.append(f"        {own}.requires_grad_()")
        if requires == 4:
            lines.append(f"    {own} = {own} * 1")
        names.append(own)
    lines.append(f"    return ({', '.join(names)}, {{0: 1, 1: 1, 2: 3}}.get(i, 1))")
    return "\n".join(lines) + "\n"


def _scope() -> dict[str, Any]:
    modules = (array, collections, contextlib, contextvars, copy, functools, itertools, math, numpy)
    return {
        **{module.__name__: module for module in (*modules, torch, types)},
        "__name__": "program",
        "checkpoint": checkpoint,
        "F": F,
        "nn": nn,
        "random_tensor": random_tensor,
    }


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Multiples of a half, from -3 to 3: small enough that sums are exact, and often zero."""
    halves = torch.randint(-6, 7, shape)
    if dtype is torch.bool:
        return halves > 0
    if dtype.is_complex:
        return torch.complex(halves / 2, torch.randint(-6, 7, shape) / 2)
    return (halves / 2).to(dtype) if dtype.is_floating_point else halves.to(dtype)


def _seeded(i: int) -> None:
    # Not `torch.manual_seed`, which keeps a stack trace for each device that is not there.
    torch.default_generator.manual_seed(1000 + i)


# ------------------------------------------------------------------------------ the comparison

DERIVATIONS = 6


class Outcome(NamedTuple):
    """What a comparison came to.

    Attributes:
        what: "equal", "raises" when eager raised in the end and the graph alike, or "refused".
        why: of a refusal, its text without what differs from program to program.
    """

    what: str
    why: str = ""


@functools.cache
def _world_code(text: str) -> types.CodeType:
    return compile(text, "<world>", "exec")


def _parts(source: str) -> list[types.CodeType]:
    """The code of a program; that of the world is the same one for all programs."""
    before, world, after = source.partition(WORLD)
    lines = f"{before}{world}".count("\n") * "\n"
    codes = [compile(before, "<program>", "exec"), _world_code(world)]
    return [*codes, compile(lines + after, "<program>", "exec")] if world else codes[:1]


def compare(source: str, known: Collection[str] = ()) -> Outcome:
    """Capture a program on `inputs(0)`, call it on `inputs(1)`, ...; compare each call with eager.

    Args:
        source: defines `Program` and `inputs`. May define `ambient(i)`, the context of call i,
            `change(program, i)`, which changes the world before call i, and `derive`, a number that
            says what is made of the results.
        known: rows of `random_known.KNOWN` that the comparison leaves out.

    Raises AssertionError for every difference.
    """
    code = _parts(source)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), modes_kept():
        warnings.simplefilter("ignore")
        return _compare(code, known)


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_autocast_enabled("cpu", autocast)
        torch.set_default_dtype(dtype)


class _History(NamedTuple):
    """What autograd tells of a tensor.

    Attributes:
        view: only where it requires grad: a replay's views of other tensors share the memory, and
            autograd has nothing to tell of them.
        hooks: of a leaf. What the program registers on its other results runs in their extracted
            backward, and not from their dictionaries.
    """

    grad_fn: bool
    leaf: bool
    view: bool
    retains_grad: bool
    hooks: int


class _Values:
    """The elements of a tensor, to the bit, but that one nan is as good as another."""

    __slots__ = ("_dtype", "_raw")

    def __init__(self, t: Tensor) -> None:
        if t.dtype is torch.bfloat16:
            t = t.float()  # numpy has no such type; the values of one are values of the other
        elements = t.numpy(force=True)
        self._dtype = elements.dtype
        self._raw = elements.tobytes()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Values):
            return False
        return self._raw == other._raw or self._with_one_nan() == other._with_one_nan()

    def __hash__(self) -> int:
        raise TypeError("values are compared, and no keys")

    def _with_one_nan(self) -> bytes:
        elements = numpy.frombuffer(self._raw, self._dtype)
        if elements.dtype.kind not in "fc":
            return self._raw
        nan = numpy.isnan(elements)
        return numpy.where(nan, elements.dtype.type("nan"), elements).tobytes()

    def __repr__(self) -> str:
        return f"{numpy.frombuffer(self._raw, self._dtype).tolist()} = {self._raw!r}"


class _Facts(NamedTuple):
    """What can be seen of a tensor.

    Attributes:
        memory: where its storage was met first.
        moved: since the call began, how far its version counter went, and whether it kept its
            storage; None of what is new.
        history: of a wide program, for a tensor that is no inference tensor: a `_History`, or why
            there is none.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    requires_grad: bool
    conj: bool
    neg: bool
    inference: bool
    cls: type
    memory: str
    moved: tuple[int, bool] | None
    values: _Values | str
    history: Any


class _Side:
    """Eager's half of the comparison, or the graph's: what can be seen of it after each call."""

    def __init__(self, code: list[types.CodeType], known: Collection[str] = ()) -> None:
        self.known = known
        self.scope = _scope()
        for part in code:
            exec(part, self.scope)
        self.wide = "ambient" in self.scope
        self.program = self.scope["Program"]()
        self.function = self.program
        self.arguments: Any = None
        self.result: Any = None
        self.error: str | None = None
        self.refused = ""
        self.kept: list[Any] = []  # earlier results and arguments; they hold their storages
        self.rng_state: Tensor | None = None
        self.modes: Any = None
        self._before: dict[int, tuple[int, int, Any, Any]] = {}

    def inputs(self, i: int) -> tuple[Any, ...]:
        _seeded(-i)
        made: tuple[Any, ...] = self.scope["inputs"](i)
        return made

    def ambient(self, i: int) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any]
        context = self.scope["ambient"](i) if self.wide else contextlib.nullcontext()
        return context

    def change(self, i: int) -> None:
        if self.wide:
            _seeded(-i)
            self.error = self._attempt(lambda: self.scope["change"](self.program, i))

    def call(self, i: int) -> None:
        self.arguments = self.inputs(i)
        self.result = None
        self._before = {
            # Held, since an id says nothing once its object is gone.
            id(t): (_version(t), _storage(t), t, t.untyped_storage())
            for _, t in self._walk()
            if isinstance(t, Tensor)
        }
        _seeded(i)
        with modes_kept():
            with self.ambient(i):
                self.error = self._attempt(self._call)
                self.modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            if self.error is None:
                self.error = self._attempt(self._consume)
        self.rng_state = torch.get_rng_state()

    def _call(self) -> None:
        self.result = self.function(*self.arguments)

    def _consume(self) -> None:
        self.result = _consumed(self.result)

    def _attempt(self, run: Any) -> str | None:
        """What `run` raises, as text."""
        try:
            run()
        except ExtractionError as e:
            self.refused = str(e)
            return str(e)
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return None

    def _walk(self) -> list[tuple[str, Any]]:
        roots = {
            "arguments": self.arguments,
            "state": vars(self.program),
            "result": self.result,
            "earlier": self.kept,
        }
        if self.wide:
            scope = self.scope
            helper = scope["helper"]
            roots["class"] = _plain({**vars(scope["State"]), **vars(scope["Program"])})
            roots["globals"] = {
                **{name: scope[name] for name in ("FLAG", "TABLE")},
                "VAR": scope["VAR"].get(),
                "config": {k: v for k, v in vars(scope["config"]).items() if k[0] != "_"},
                "helper": [vars(helper), helper.__defaults__],
            }
        seen: dict[int, str] = {}
        found: list[tuple[str, Any]] = []
        for name, root in roots.items():
            _walk_into(root, name, seen, found)
        return found

    def seen(self) -> list[tuple[Any, ...]]:
        storages: dict[int, str] = {}
        found: list[tuple[Any, ...]] = []
        with torch.no_grad():
            for path, value in self._walk():
                if isinstance(value, Tensor):
                    found.append((path, self._facts(value, path, storages)))
                else:
                    found.append((path, value))
        return found

    def _facts(self, value: Tensor, path: str, storages: dict[int, str]) -> _Facts:
        storage = value.untyped_storage()
        cdata = storage._cdata
        before = self._before.get(id(value))
        inference = value.is_inference()
        told = value.requires_grad
        history: Any = None
        if self.wide and not inference:
            try:
                history = _History(
                    value.grad_fn is not None,
                    value.is_leaf,
                    told and value._base is not None,
                    value.retains_grad,
                    len(value._backward_hooks or ()) if value.is_leaf else 0,
                )
            except RuntimeError as e:  # a view that was made in another mode, and written to
                history = _forbidden(e)
        return _Facts(
            value.dtype,
            tuple(value.shape),
            _strides(value),
            value.storage_offset(),
            told,
            value.is_conj(),
            value.is_neg(),
            inference,
            type(value),
            storages.setdefault(cdata, path),
            None if before is None else (_version(value) - before[0], before[1] == cdata),
            "beyond its memory" if _end(value) > storage.nbytes() else _Values(value),
            history,
        )

    def derive(self, kind: int, i: int) -> list[Any]:
        """Differentiate the result; returns what that gives, or raises."""
        roots = [t for _, t in walk(self.result, "result", {}) if _is_differentiable(t)]
        if not roots or kind == 0:
            return []
        total = sum((t.double().sum() * (k + 1) for k, t in enumerate(roots)), torch.zeros(()))
        leaves = [t for _, t in self._walk() if _is_differentiable(t) and t.is_leaf]
        if kind == 1:
            total.backward()
        elif kind == 2:
            roots[0].sum().backward()
        elif kind == 3:
            found = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else ()
            # Eager's tangent may lie as nothing but its own gradient formula makes it, broadcast or
            # transposed; a replay's is dense, and so is what is made of it.
            return [None if g is None else g.contiguous() for g in found]
        elif kind == 4:
            total.backward(retain_graph=True)
            (total * 2).backward()
        elif leaves:
            first = torch.autograd.grad(total, leaves, allow_unused=True, create_graph=True)
            second = [g.pow(2).sum() for g in first if g is not None and g.requires_grad]
            if second:
                sum(second).backward()  # type: ignore[union-attr]
            return [None if g is None else g.detach().contiguous() for g in first]
        return []

    def derived(self, kind: int, i: int) -> str | None:
        def run() -> None:
            self.result = [self.result, self.derive(kind, i)]

        _seeded(100 + i)
        return self._attempt(run)

    def poke(self) -> list[str]:
        """Write to each tensor of the result."""
        errors = []
        for path, value in walk(self.result, "result", {}):
            if isinstance(value, Tensor):
                try:
                    with torch.no_grad():
                        value.logical_not_() if value.dtype is torch.bool else value.add_(1)
                except RuntimeError as e:
                    errors.append(f"{path}: {_forbidden(e)}")
        return errors


def _forbidden(error: RuntimeError) -> str:
    """What autograd says of a view that must not be used, without the name of the function that gave
    it, which is another one in a replay."""
    text = str(error)
    return "a view that autograd forbids to use" if " modified inplace" in text else text


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in attributes.items() if isinstance(v, (int, float, list, Tensor))}


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.dtype.is_floating_point


def _consumed(result: Any) -> Any:
    """What a caller gets out of a result that is called or iterated."""
    if isinstance(result, Iterator):
        return list(result)
    if isinstance(result, (types.FunctionType, functools.partial)):
        return result()
    return result


_PLAIN = {bool, int, float, complex, str, type(None)}
_MUTABLE = (Tensor, list, dict, set, array.array, collections.deque, nn.Module)
# Of a module: how many hooks there are counts, since their keys come from a counter of the process.
_HOOKS = {name for name in vars(nn.Module()) if name.endswith(("_hooks", "_kwargs", "_called"))}


class _Kind(NamedTuple):
    """How objects of a type are looked into.

    Attributes:
        identified: which object it is counts.
        look: called with the object, its path, `seen` and `found` as in `_walk_into`.
    """

    identified: bool
    look: Callable[[Any, str, dict[int, str], list[tuple[str, Any]]], None]


def _look_at_items(value: Any, path: str, seen: dict[int, str], found: list[Any]) -> None:
    found.append((path, f"{type(value).__name__} of {len(value)}"))
    for i, item in enumerate(value):
        _walk_into(item, f"{path}[{i}]", seen, found)


def _look_at_dict(value: Any, path: str, seen: dict[int, str], found: list[Any]) -> None:
    found.append((path, f"{type(value).__name__} with {list(value)}"))
    for key, item in value.items():
        _walk_into(item, f"{path}[{key!r}]", seen, found)


def _look_at_tensor(value: Tensor, path: str, seen: dict[int, str], found: list[Any]) -> None:
    found.append((path, value))
    grad = _grad(value)
    if grad is not None:
        _walk_into(grad, f"{path}.grad", seen, found)
    attributes = vars(value)
    if attributes:
        _walk_into(attributes, f"{path}.__dict__", seen, found)


def _look_at_numpy(value: Any, path: str, seen: dict[int, str], found: list[Any]) -> None:
    text = f"numpy {value.dtype} {value.shape} {value.strides} {value.tolist()}"
    found.append((path, text))


def _look_at_attributes(value: Any, path: str, seen: dict[int, str], found: list[Any]) -> None:
    items = vars(value).items()
    hooks = [(name, len(item)) for name, item in items if name in _HOOKS]
    found.append((path, (type(value).__name__, hooks)))
    for name, item in items:
        if name not in _HOOKS:
            _walk_into(item, f"{path}.{name}", seen, found)


def _look_at_callable(value: Any, path: str, seen: dict[int, str], found: list[Any]) -> None:
    found.append((path, f"a {type(value).__name__}"))


def _look_at_set(value: Any, path: str, seen: dict[int, str], found: list[Any]) -> None:
    found.append((path, repr(list(value))))


def _look_at_text(value: Any, path: str, seen: dict[int, str], found: list[Any]) -> None:
    found.append((path, repr(value)))


@functools.cache
def _kind_of(cls: type) -> _Kind:
    look: Any = _look_at_text
    if issubclass(cls, (list, tuple, collections.deque)):
        look = _look_at_items
    elif issubclass(cls, dict):
        look = _look_at_dict
    elif issubclass(cls, Tensor):
        look = _look_at_tensor
    elif cls.__module__ == "numpy":
        look = _look_at_numpy
    elif issubclass(cls, (nn.Module, types.SimpleNamespace)):
        look = _look_at_attributes
    elif any("__call__" in vars(base) for base in cls.__mro__):
        look = _look_at_callable
    elif issubclass(cls, set):
        look = _look_at_set
    return _Kind(issubclass(cls, _MUTABLE) or hasattr(cls, "__array__"), look)


def walk(value: Any, path: str, seen: dict[int, str]) -> list[tuple[str, Any]]:
    """What can be seen of a value: (path, tensor or text) for all that it holds.

    Args:
        seen: id of an object -> where it was met before.
    """
    found: list[tuple[str, Any]] = []
    _walk_into(value, path, seen, found)
    return found


def _walk_into(value: Any, path: str, seen: dict[int, str], found: list[tuple[str, Any]]) -> None:
    cls = type(value)
    if cls in _PLAIN:
        found.append((path, repr(value)))
        return
    kind = _kind_of(cls)
    if kind.identified:
        met = seen.setdefault(id(value), path)
        if met is not path:
            found.append((path, f"the same object as {met}"))
            return
    kind.look(value, path, seen, found)


def _grad(t: Tensor) -> Tensor | None:
    try:
        return t.grad if t.is_leaf or t.retains_grad else None
    except RuntimeError:  # a view that was made in another mode, and written to
        return None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _strides(t: Tensor) -> tuple[int, ...]:
    """The strides that lead somewhere: those of one element, or of none, are left to chance."""
    return tuple([s if n > 1 else 0 for n, s in zip(t.shape, t.stride())]) if t.numel() else ()


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _exceeds_memory(t: Tensor) -> bool:
    """What eager leaves when it has set the sizes of a tensor, and cannot resize its storage."""
    return _end(t) > t.untyped_storage().nbytes()


def _compare(code: list[types.CodeType], known: Collection[str]) -> Outcome:
    eager, graph = _Side(code, known), _Side(code, known)
    graph.arguments = graph.inputs(0)
    before, _seed = graph.seen(), _seeded(0)
    rng_state = torch.get_rng_state()
    error: Exception | None = None
    with graph.ambient(0):
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        try:
            graph.function = extract_compiled_graph(graph.program, graph.arguments)
        except Exception as e:
            error = e
        assert modes == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")), "modes"
    assert torch.equal(rng_state, torch.get_rng_state()), "the extraction moved the generator"
    if error is not None and not isinstance(error, ExtractionError):
        spare = _Side(code)
        spare.call(0)
        if spare.error is None or spare.error.partition(":")[0] != type(error).__name__:
            raise AssertionError(
                f"extraction raised {error!r}, eager came to {spare.error}"
            ) from error
    _expect(before, graph.seen(), "the extraction changed something")
    if error is not None:
        return _refused(error) if isinstance(error, ExtractionError) else Outcome("raises")
    what = "equal"
    for i in range(1, CALLS + 1):
        for side in (eager, graph):
            side.change(i)
        assert eager.error == graph.error, f"change {i}: {eager.error}, {graph.error}"
        for side in (eager, graph):
            side.call(i)
        if graph.refused:
            return _refused(graph.refused)
        if eager.error != graph.error:
            raise AssertionError(f"call {i}: eager: {eager.error}\ngraph: {graph.error}")
        _expect(eager.seen(), graph.seen(), f"call {i}")
        assert torch.equal(eager.rng_state, graph.rng_state), f"call {i}: random numbers drawn"
        assert eager.modes == graph.modes, f"call {i}: modes {eager.modes}, {graph.modes}"
        if eager.error is not None:
            what = "raises"
        elif eager.wide:
            kind = eager.scope["derive"]
            if kind == 5 and "no_second_derivative" in known:
                kind = 3
            raised = [side.derived(kind, i) for side in (eager, graph)]
            if graph.refused:
                return _refused(graph.refused)
            kinds = [None if e is None else e.partition(":")[0] for e in raised]
            assert kinds[0] == kinds[1], f"derivative of call {i}: {raised[0]}\ngraph: {raised[1]}"
            if kinds[0] is not None:
                # Which leaves had their gradients by then: a replay's backward is one function, which
                # gives all of its gradients or none.
                return Outcome("raises")
            _expect(eager.seen(), graph.seen(), f"derivative of call {i}")
        if eager.error is None and i != 1:
            errors = eager.poke(), graph.poke()
            assert errors[0] == errors[1], f"call {i}: writing to the result: {errors}"
            _expect(eager.seen(), graph.seen(), f"call {i}, after writing to the result")
        for side in (eager, graph):
            side.kept.append((side.result, side.arguments))
    return Outcome(what)


def _refused(error: Exception | str) -> Outcome:
    text = str(error)
    assert "INTERNAL ASSERT" not in text, f"an internal error: {text}"
    why = re.sub(r"\(at [^)]*\)|\d+|<[^>]*>|'[^']*'", "_", text)
    return Outcome("refused", why[:90])


def _expect(want: list[tuple[Any, ...]], got: list[tuple[Any, ...]], when: str) -> None:
    if want == got:
        return
    for w, g in zip(want, got):
        if w != g:
            raise AssertionError(f"{when}: expected {w}\ngot {g}")
    raise AssertionError(f"{when}: {len(want)} things to see, and {len(got)} were there")
