"""Replay: a specialization is one captured variant; a CompiledGraph keeps several and picks."""

from __future__ import annotations

import collections
import copy
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torch_lazy_ext import _C, _fx, _gradients, _lift, _lower, _record, _text, _tree
from torch_lazy_ext._errors import ExtractionError, GuardError, UnsupportedError

GUARD_FAILURE = ("recapture", "eager", "error")


class _Mismatch(Exception):
    """The data of a call took another way than the captured one.

    Attributes:
        observed: values of the first guards, up to and with the one that failed; None when the
            graph itself raised.
    """

    def __init__(self, observed: list[torch.Tensor] | None) -> None:
        super().__init__()
        self.observed = observed


class _Learned(Exception):
    """The first run corrected what is known about an operator's strides: capture again."""


class _TensorGuard:
    __slots__ = (
        "conj",
        "device",
        "dtype",
        "kind",
        "neg",
        "offset",
        "requires_grad",
        "shape",
        "stride",
    )

    def __init__(self, t: torch.Tensor, with_offset: bool) -> None:
        self.dtype = t.dtype
        self.shape = t.shape
        self.stride = t.stride()
        self.requires_grad = t.requires_grad
        self.device = t.device
        self.conj = t.is_conj()
        self.neg = t.is_neg()
        self.kind = type(t)
        self.offset = t.storage_offset() if with_offset else None

    def check(self, t: Any) -> bool:
        return (
            type(t) is self.kind
            and t.dtype == self.dtype
            and t.shape == self.shape
            and t.layout == torch.strided
            and t.stride() == self.stride
            and t.requires_grad == self.requires_grad
            and t.device == self.device
            and t.is_conj() == self.conj
            and t.is_neg() == self.neg
            and (self.offset is None or t.storage_offset() == self.offset)
        )


def _surroundings() -> tuple[Any, ...]:
    """What is no argument and no state, and still decides what a program does."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


class Guard:
    """A value or a shape that the program looked at while it was captured.

    Attributes:
        expected: what it saw.
        source: the line that looked, "file:line".
    """

    __slots__ = ("expected", "is_value", "root", "source")

    def __init__(self, guard: _lower.ValueGuard) -> None:
        expected = guard.expected
        self.expected: Any = expected
        self.source = guard.source
        self.root = guard.root
        self.is_value = guard.is_value

    def holds(self, value: torch.Tensor) -> bool:
        if not self.is_value:
            return list(value.shape) == self.expected
        return _C.same_bits(value, self.expected)

    def __repr__(self) -> str:
        if self.is_value:
            what = f"value {self.expected.tolist()}" if self.expected.numel() <= 8 else "values"
        else:
            what = f"shape {tuple(self.expected)}"
        return f"{what} at {self.source}" if self.source else what


class _Gradient:
    """As a getter: the gradient of the lifted tensor `leaf`."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: int) -> None:
        self.leaf = leaf


def _fetch(getter: Any, leaves: list[Any]) -> Any:
    if type(getter) is int:
        return leaves[getter]
    return getter.read() if isinstance(getter, _lift.Slot) else getter


class Specialization:
    """One variant of a program: its graph, what it reads, and when it may be used.

    Attributes:
        guards: what the program looked at in its data, in program order.
        hits: calls that this variant answered.
        misses: runs whose result was thrown away, because the data took another way.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        flat: _tree.Flat,
        verify_layouts: bool = False,
    ) -> None:
        self.hits = 0
        self.misses = 0
        self._surroundings = _surroundings()
        opaque = [v for v in flat.leaves if not isinstance(v, torch.Tensor)]
        state = _lift.State(fn, *opaque)
        recorder, lowered = _capture(fn, args, kwargs, state, verify_layouts)
        self.graph = lowered.graph
        self._lowered = lowered
        self._program = _C.Program(lowered.graph)
        self._recorder: _C.Recorder | None = recorder  # until the first run
        self._first_run = threading.Lock()
        self.guards = [Guard(g) for g in lowered.guards]

        with_offset = lowered.uses_storage_offset
        position: dict[int, int] = {}
        for i, leaf in enumerate(flat.leaves):
            if isinstance(leaf, torch.Tensor):
                position.setdefault(id(leaf), i)
        self._spec = flat.spec
        self._leaf_guards = [
            _TensorGuard(leaf, with_offset) if isinstance(leaf, torch.Tensor) else None
            for leaf in flat.leaves
        ]
        self._leaf_values = [
            None if isinstance(leaf, torch.Tensor) else _kept_value(leaf) for leaf in flat.leaves
        ]
        # Which arguments are one tensor object matters: the program saw them so.
        self._duplicates = tuple(
            position[id(leaf)] if isinstance(leaf, torch.Tensor) else -1 for leaf in flat.leaves
        )
        self._value_guards = [(slot, value) for slot, value in state.values]
        self._sizes = [(c, len(before)) for c, before in state.containers]

        # How to come by each lifted tensor at a call: position of an argument, slot, or itself.
        self._getters: list[Any] = []
        self._state_guards: list[tuple[_lift.Slot, _TensorGuard]] = []
        self._same_objects: list[tuple[_lift.Slot, int]] = []
        self._tied: list[tuple[_lift.Slot, _lift.Slot]] = []  # hold one tensor
        members: dict[int, list[int]] = {}
        leaf_of = {id(grad): leaf for leaf, grad in lowered.leaves if grad is not None}
        for i, (tensor, constant, base) in enumerate(lowered.lifted):
            slots = [] if constant else state.slots_of(tensor)
            slot = slots[0] if slots else None
            self._tied.extend((slots[0], other) for other in slots[1:])
            if base >= 0 and base != i:
                members.setdefault(base, []).append(i)
            if id(tensor) in leaf_of and not constant:
                self._getters.append(_Gradient(leaf_of[id(tensor)]))
            elif id(tensor) in position and not constant:
                self._getters.append(position[id(tensor)])
                if slot is not None:
                    self._same_objects.append((slot, position[id(tensor)]))
            elif slot is None:
                self._getters.append(tensor)
            else:
                self._getters.append(slot)
                self._state_guards.append((slot, _TensorGuard(tensor, with_offset)))
        # What the gradients of leaves must be like: None, or tensors.
        self._leaves = [
            (self._getters[leaf], None if grad is None else _TensorGuard(grad, with_offset))
            for leaf, grad in lowered.leaves
        ]
        lowered.leaves = []
        # Tensors lifted as views of one storage: (whole storage, [(member, offset)], bytes).
        self._groups = []
        for base, indices in members.items():
            whole = lowered.lifted[base][0]
            offsets = [(i, lowered.lifted[i][0].storage_offset()) for i in indices]
            self._groups.append((base, offsets, whole.untyped_storage().nbytes()))
            self._getters[base] = None
        # For each tensor written to, the others that must not share its memory.
        self._apart: list[tuple[int, list[int]]] = []
        group_of = {i: base for base, indices in members.items() for i in [base, *indices]}
        for write in lowered.writes:
            if write.root is not None:
                own = group_of.get(write.index, -1)
                others = [
                    i
                    for i, (_tensor, constant, _base) in enumerate(lowered.lifted)
                    if i != write.index and not constant and group_of.get(i, -2) != own
                ]
                self._apart.append((write.index, others))
        lowered.lifted = []
        self._backward: _gradients.Backward | None = None
        if lowered.backward is not None:
            self._backward = _gradients.Backward(lowered.backward)

    @functools.cached_property
    def graph_module(self) -> torch.fx.GraphModule:
        """The graph as aten operators in FX, with a fake tensor for each value."""
        return _fx.graph_module(self.graph)

    def matches(self, flat: _tree.Flat, surroundings: tuple[Any, ...]) -> bool:
        """Whether everything but the data is as it was at the capture."""
        if flat.spec != self._spec or self._surroundings != surroundings:
            return False
        leaves = flat.leaves
        for leaf, guard, value in zip(leaves, self._leaf_guards, self._leaf_values):
            if guard is not None:
                if not guard.check(leaf):
                    return False
            elif not _tree.same(leaf, value):
                return False
        position: dict[int, int] = {}
        for i, (leaf, first) in enumerate(zip(leaves, self._duplicates)):
            if first >= 0 and position.setdefault(id(leaf), i) != first:
                return False
        for container, size in self._sizes:
            if len(container) != size:
                return False
        for slot, value in self._value_guards:
            now = slot.read()
            if now is not value and not (
                type(value) in _tree.SIMPLE_TYPES and _tree.same(now, value)
            ):
                return False
        if any(slot.read() is not leaves[i] for slot, i in self._same_objects):
            return False
        if any(a.read() is not b.read() for a, b in self._tied):
            return False
        if not all(guard.check(slot.read()) for slot, guard in self._state_guards):
            return False
        for getter, guard in self._leaves:
            grad = _fetch(getter, leaves).grad
            if not (grad is None if guard is None else guard.check(grad)):
                return False
        return True

    def may_follow(self, observed: list[torch.Tensor]) -> bool:
        """Whether this variant went the way that another one's guards have shown."""
        return len(self.guards) >= len(observed) and all(
            guard.holds(value) for guard, value in zip(self.guards, observed)
        )

    def run(self, flat: _tree.Flat) -> Any:
        """The program's result on these arguments, with its effects.

        Raises:
            _Mismatch: the data took another way; nothing has happened.
            _Learned: nothing has happened, and the program must be captured again.
        """
        tensors = self._gather(flat.leaves)
        lowered = self._lowered
        states = [g.get_state() for g in lowered.generators]
        try:
            values = self._values([tensors[i] for i in lowered.parameters])
            observed = []
            for guard in self.guards:
                observed.append(values[guard.root])
                if not guard.holds(values[guard.root]):
                    raise _Mismatch(observed)
        except (_Learned, Exception, KeyboardInterrupt) as e:
            for generator, state in zip(lowered.generators, states):
                generator.set_state(state)
            if isinstance(e, _Learned):
                raise
            self.misses += 1
            if isinstance(e, (_Mismatch, ExtractionError)) or not isinstance(e, Exception):
                raise
            # The program itself decides whether this is its error.
            raise _Mismatch(None) from None
        self.hits += 1
        if self._backward is not None:
            values = _gradients.attach(self._backward, self._written(tensors), tensors, values)
        values = _gradients.spend(self._lowered.spent, values)
        return self._finish(flat, tensors, values)

    def _written(self, tensors: list[torch.Tensor]) -> set[int]:
        """The memory that a call writes to."""
        writes = [w for w in self._lowered.writes if w.root is not None]
        return {tensors[w.index].untyped_storage().data_ptr() for w in writes}

    def _gather(self, leaves: list[Any]) -> list[torch.Tensor]:
        tensors: list[Any] = []
        for getter in self._getters:
            if type(getter) is _Gradient:
                tensors.append(tensors[getter.leaf].grad)
            else:
                tensors.append(_fetch(getter, leaves))
        for base, members, nbytes in self._groups:
            storage = tensors[members[0][0]].untyped_storage()
            for i, offset in members:
                other = tensors[i].untyped_storage()
                if (
                    other.data_ptr() != storage.data_ptr()
                    or other.nbytes() != nbytes
                    or tensors[i].storage_offset() != offset
                ):
                    raise _Mismatch(None)
            tensors[base] = _C.whole_storage(tensors[members[0][0]])
        for index, others in self._apart:
            start = tensors[index].untyped_storage().data_ptr()
            if start and any(tensors[i].untyped_storage().data_ptr() == start for i in others):
                raise _Mismatch(None)
        return tensors

    def _values(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._recorder is not None:
            with self._first_run:
                recorder = self._recorder
                if recorder is not None:
                    checked = recorder.run_checked(
                        self._lowered.roots, self._lowered.parameters, inputs
                    )
                    if checked.learned:
                        raise _Learned
                    if not checked.complete:
                        raise _Mismatch(None)
                    self._recorder = None
                    return checked.values
        return self._program.run(inputs)

    def _finish(
        self, flat: _tree.Flat, tensors: list[torch.Tensor], values: list[torch.Tensor]
    ) -> Any:
        lowered = self._lowered
        take = _Results(flat.containers, tensors, values)
        with torch.no_grad():
            _write_back(lowered.writes, tensors, values, take)
            new_data = [(index, take(source)) for index, source in lowered.assigned]
            for index, value in new_data:
                tensors[index].data = value
            for index, required in lowered.required:
                tensors[index].requires_grad_(required)
            for index, source in lowered.gradients:
                tensors[index].grad = take(source)
        result = take(lowered.result)
        for position, built in lowered.refills:
            _tree.fill(flat.containers[position], built.shape, [take(c) for c in built.children])
        for owner, key, source in lowered.effects:
            if key is _lift.CONTENT:
                _tree.fill(owner, source.shape, [take(c) for c in source.children])
            else:
                value = source if source is _lift.MISSING else take(source)
                _lift.Slot(owner, key, "").write(value)
        return result


def _write_back(
    writes: list[_lower.Write],
    tensors: list[torch.Tensor],
    values: list[torch.Tensor],
    take: _Results,
) -> None:
    counted = [w for w in writes if not tensors[w.index].is_inference()]
    versions = [tensors[w.index]._version for w in counted]
    for write in writes:
        tensor = tensors[write.index]
        if write.source is not None:
            tensor.set_(take(write.source))
            continue
        if write.meta is not None:
            sizes, strides, moved = write.meta
            offset = tensor.storage_offset() + moved
            extent = offset + 1 + sum((n - 1) * s for n, s in zip(sizes, strides))
            if 0 not in sizes and extent * tensor.itemsize > tensor.untyped_storage().nbytes():
                tensor.resize_(sizes)
            tensor.as_strided_(sizes, strides, offset)
        if write.root is not None:
            tensor.copy_(values[write.root])
    if counted:
        torch._C._autograd._unsafe_set_version_counter(
            tuple(tensors[w.index] for w in counted),
            tuple(v + w.bumps for v, w in zip(versions, counted)),
        )


class _Results:
    """Puts objects together from the tensors of a call; one object for one source."""

    def __init__(
        self, containers: list[Any], tensors: list[torch.Tensor], values: list[torch.Tensor]
    ) -> None:
        self.containers = containers
        self.tensors = tensors
        self.values = values
        self._made: dict[int, Any] = {}
        self._constants: dict[int, torch.Tensor] = {}

    def __call__(self, source: _lower.Source) -> Any:
        if isinstance(source, _lower.Constant):
            return source.value
        made = self._made.get(id(source), self)
        if made is not self:
            return made
        if isinstance(source, _lower.Built):
            return self._build(source)
        value = self._made[id(source)] = self._tensor(source)
        return value

    def _build(self, source: _lower.Built) -> Any:
        if _tree.is_immutable(source.shape):
            value = _tree.make_tuple(source.shape, [self(c) for c in source.children])
            self._made[id(source)] = value
            return value
        value = self._made[id(source)] = _tree.make(source.shape)
        _tree.fill(value, source.shape, [self(c) for c in source.children])
        return value

    def _tensor(self, source: _lower.Source) -> Any:
        if isinstance(source, _lower.FromRoot):
            value = self.values[source.root]
            if source.parameter:
                return nn.Parameter(value, source.requires_grad)
            if source.alias or source.requires_grad:
                value = value.data
            return value.requires_grad_() if source.requires_grad else value
        if isinstance(source, _lower.FromLifted):
            tensor = self.tensors[source.index]
            return tensor.data if source.alias else tensor
        if isinstance(source, _lower.FromView):
            return source.views.apply(self(source.base))
        if isinstance(source, _lower.FromStrided):
            member = self.tensors[source.index]
            return member.as_strided(source.sizes, source.strides, source.offset)
        if isinstance(source, _lower.FromArgument):
            return self.containers[source.position]
        if isinstance(source, _lower.Copied):
            return copy.copy(source.value)
        assert isinstance(source, _lower.FromConstant)
        if source.index not in self._constants:
            self._constants[source.index] = self.tensors[source.index].clone()
        base = self._constants[source.index]
        return source.views.apply(base) if len(source.views) else base


def _capture(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: _lift.State,
    verify_layouts: bool,
) -> tuple[_C.Recorder, _lower.Lowered]:
    shared: list[torch.Tensor] = []
    while True:
        recording = _record.record(fn, args, kwargs, state, shared, verify_layouts)
        try:
            return recording.recorder, _lower.lower(recording, state)
        except _lower.SharedStorage as request:
            if shared:
                raise UnsupportedError(
                    "the program writes to memory that several of its tensors share without being "
                    "views of one tensor (such as two torch.from_numpy of one array): pass one of "
                    "them, and derive the others inside the program"
                ) from None
            shared = request.tensors
        finally:
            recording.recorder.release()


def _kept_value(leaf: Any) -> Any:
    # An array can be written to between the calls.
    return leaf.copy() if type(leaf).__module__ == "numpy" else leaf


class CompiledGraph:
    """A callable that replays the compiled graph of a program.

    Called like the program it was made from; captures again when what the capture relied on
    (shapes, dtypes, Python values, data the program branched on) differs, and keeps the variants.
    Safe to call from several threads.

    Args:
        fn: the program.
        limit: how many variants are kept; the least recently used one goes first.
        on_guard_failure: what happens when the data takes a way that no variant took.
    """

    def __init__(
        self, fn: Callable[..., Any], *, limit: int = 32, on_guard_failure: str = "recapture"
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}: a graph keeps one variant at least")
        if on_guard_failure not in GUARD_FAILURE:
            raise ValueError(
                f"on_guard_failure is {on_guard_failure!r}: it is one of {', '.join(GUARD_FAILURE)}"
            )
        self._fn = fn
        self._limit = limit
        self._on_guard_failure = on_guard_failure
        self._specializations: list[Specialization] = []  # most recently used first
        self._lock = threading.Lock()
        self._warned = False
        if not isinstance(fn, nn.Module):
            functools.update_wrapper(self, fn, updated=())

    def _capture(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], verify_layouts: bool = False
    ) -> Specialization:
        flat = _tree.flatten((args, kwargs))
        specialization = Specialization(self._fn, args, kwargs, flat, verify_layouts)
        with self._lock:
            self._specializations.insert(0, specialization)
            del self._specializations[self._limit :]
        return specialization

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _C.capturing():
            return self._fn(*args, **kwargs)
        flat = _tree.flatten((args, kwargs))
        surroundings = _surroundings()
        matching = 0
        failed: list[Specialization] = []
        observed: list[torch.Tensor] = []
        for specialization in list(self._specializations):
            if not specialization.matches(flat, surroundings):
                continue
            matching += 1
            if not specialization.may_follow(observed):
                continue
            try:
                result = specialization.run(flat)
            except _Mismatch as mismatch:
                failed.append(specialization)
                if mismatch.observed is not None and len(mismatch.observed) > len(observed):
                    observed = mismatch.observed
                continue
            except _Learned:
                self._discard(specialization)
                return self._capture_and_run(args, kwargs, flat, verify_layouts=True)
            self._touch(specialization)
            return result
        if failed:
            if self._on_guard_failure == "error":
                raise GuardError(self._failure(failed[-1], observed))
            if self._on_guard_failure == "eager":
                return self._fn(*args, **kwargs)
            if matching >= self._limit:
                self._warn(failed[-1], observed)
                return self._fn(*args, **kwargs)
        return self._capture_and_run(args, kwargs, flat)

    def _capture_and_run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        flat: _tree.Flat,
        verify_layouts: bool = False,
    ) -> Any:
        for _attempt in range(4):
            try:
                specialization = self._capture(args, kwargs, verify_layouts)
            except ExtractionError:
                raise
            except Exception:
                # The program's own error, and nothing has happened yet: eager does what the
                # program does before it raises, and raises.
                return self._fn(*args, **kwargs)
            try:
                return specialization.run(flat)
            except _Learned:
                self._discard(specialization)
                verify_layouts = True
            except _Mismatch:
                # The operators raise on this data: so does the program, in its own words.
                self._discard(specialization)
                return self._fn(*args, **kwargs)
        raise UnsupportedError(
            "an operator of the program gives other shapes or dtypes on each run than were "
            "recorded (does the program change the default dtype?): keep that outside of it"
        )

    def _discard(self, specialization: Specialization) -> None:
        with self._lock:
            if specialization in self._specializations:
                self._specializations.remove(specialization)

    def _touch(self, specialization: Specialization) -> None:
        if self._specializations[:1] != [specialization]:
            with self._lock:
                if specialization in self._specializations:
                    self._specializations.remove(specialization)
                    self._specializations.insert(0, specialization)

    def _failure(self, specialization: Specialization, observed: list[torch.Tensor]) -> str:
        if not observed:
            return "an operator of the captured graph raises an error on this data"
        guard = specialization.guards[min(len(observed), len(specialization.guards)) - 1]
        seen = observed[-1].tolist() if guard.is_value else tuple(observed[-1].shape)
        where = f" at {guard.source}" if guard.source else ""
        return (
            f"the program looks at its data{where}: the capture saw {guard!r}, this call has {seen}"
        )

    def _warn(self, specialization: Specialization, observed: list[torch.Tensor]) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._limit} variants of a graph are kept, and none fits: "
                f"{self._failure(specialization, observed)}. Such calls run eagerly from now on; "
                "raise `limit`, or keep this value out of the program's control flow",
                stacklevel=3,
            )

    @property
    def specializations(self) -> list[Specialization]:
        """The captured variants, most recently used first."""
        return list(self._specializations)

    @property
    def graph(self) -> torch._C.Graph:
        """The TorchScript graph of the most recently used variant."""
        return self._specializations[0].graph

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The graph of the most recently used variant as FX: one node per operator.

        It takes the graph's inputs and returns a tuple of its outputs: what a call writes to its
        arguments, and the structure of its result, stand outside of it. `meta["val"]` of a node is
        a fake tensor, `meta["stack_trace"]` the user's line.
        """
        return self._specializations[0].graph_module

    def graph_text(self, *, source: bool = False) -> str:
        """The graph as text that is the same from run to run.

        Args:
            source: show the user's source line behind each operator.
        """
        return _text.graph_text(self.graph, source=source)

    def explain(self) -> str:
        """The variants with their guards, hits and misses, for people."""
        count = len(self._specializations)
        lines = [f"{count} variant{'s' * (count != 1)}, most recently used first"]
        for i, s in enumerate(self._specializations):
            operators = collections.Counter(n.kind() for n in s.graph.nodes())
            count = sum(v for k, v in operators.items() if not k.startswith("prim::"))
            lines.append(
                f"variant {i}: {count} operator{'s' * (count != 1)}, {s.hits} "
                f"hit{'s' * (s.hits != 1)}, {s.misses} miss{'es' * (s.misses != 1)}"
            )
            lines += [f"  guard: {guard!r}" for guard in s.guards] or ["  no guards"]
        return "\n".join(lines) + "\n"
