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


# Leave the run of a variant as they are; every other exception is a mismatch.
_KEPT_ERRORS = (_Learned, _Mismatch, ExtractionError)
_HANDLED_ERRORS = (_Learned, _Mismatch)


def _no_derivatives(lowered: _lower.Lowered) -> str:
    """Why a program cannot be recorded once more after a call; nothing if it can."""
    if lowered.refills or lowered.effects or lowered.assigned or lowered.required:
        return "the program changes attributes, or containers that it is given"
    if lowered.gradients or lowered.spent:
        return "the program calls backward() itself"
    if any(base >= 0 for _tensor, _constant, base in lowered.lifted):
        return "the program writes to memory that several of its tensors share"
    return ""


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


class Specialization(_C.Variant):
    """One variant of a program: its graph, what it reads, and when it may be used.

    The C++ half (`csrc/call.h`) compares a call with the capture, gathers the lifted tensors and
    runs the graph; this half sets it up, and does what is not needed on every call.

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
        # Whatever the C++ half points to: here Python's collector of cycles sees it.
        self._keep: list[Any] = []
        super().__init__(self._keep)
        surroundings = _C.Surroundings.now()
        modes = surroundings.function_modes
        self._set_surroundings(surroundings, torch.get_default_device() if modes else None)
        opaque = [v for v in flat.leaves if not isinstance(v, torch.Tensor)]
        state = _lift.State(fn, *opaque)
        recorder, lowered = _capture(fn, args, kwargs, state, verify_layouts)
        self.graph = lowered.graph
        self._lowered = lowered
        self._program = _C.Program(lowered.graph)
        self._parameters = lowered.parameters
        self._generators = lowered.generators
        self._overwritten = lowered.overwritten
        self._communicates = lowered.communicates
        self._update: _C.Program | None = None
        if lowered.update is not None:
            self._update = _C.Program(lowered.update.graph)
            self._outputs, self._num_roots = lowered.outputs, len(lowered.roots)
        if lowered.precheck is not None:
            graph, parameters = lowered.precheck
            self._set_precheck(_C.Program(graph), parameters)
        self._recorder: _C.Recorder | None = recorder  # until the first run
        self._first_run = threading.Lock()
        self._guard_calls(flat, state, lowered)
        self._set_up_lifted(flat, state, lowered)
        self._derivatives = _gradients.Derivatives(
            functools.partial(
                self._record_again,
                fn,
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
            ),
            _no_derivatives(lowered),
        )
        self.guards = [Guard(g) for g in lowered.guards]
        for guard in self.guards:
            add = self._add_value_guard if guard.is_value else self._add_size_guard
            add(guard.root, guard.expected)
        lowered.lifted = []
        self._backward: _gradients.Backward | None = None
        if lowered.backward is not None:
            self._backward = _gradients.Backward(lowered.backward)
        self._set_up_native_finish(lowered)

    @functools.cached_property
    def graph_module(self) -> torch.fx.GraphModule:
        """The graph as aten operators in FX, with a fake tensor for each value."""
        return _fx.graph_module(self.graph)

    def _guard_calls(self, flat: _tree.Flat, state: _lift.State, lowered: _lower.Lowered) -> None:
        leaves = [v if isinstance(v, torch.Tensor) else _kept_value(v) for v in flat.leaves]
        self._set_arguments(flat.spec, leaves, lowered.uses_storage_offset)
        for slot, value in state.values:
            self._add_value(slot, value)
        for container, before in state.containers:
            if id(container) not in state.unsized:
                self._add_size(container, len(before))

    def _set_up_lifted(self, flat: _tree.Flat, state: _lift.State, lowered: _lower.Lowered) -> None:
        """Say how to come by each lifted tensor at a call."""
        position: dict[int, int] = {}
        for i, leaf in enumerate(flat.leaves):
            if isinstance(leaf, torch.Tensor):
                position.setdefault(id(leaf), i)
        leaf_of = {id(grad): leaf for leaf, grad in lowered.leaves if grad is not None}
        members: dict[int, list[int]] = {}
        for i, (_tensor, _constant, base) in enumerate(lowered.lifted):
            if base >= 0 and base != i:
                members.setdefault(base, []).append(i)
        for i, (tensor, constant, _base) in enumerate(lowered.lifted):
            slots = [] if constant else state.slots_of(tensor)
            for other in slots[1:]:
                self._add_tied(slots[0], other)  # they hold one tensor
            if i in members:
                self._lift_storage()
            elif id(tensor) in leaf_of and not constant:
                self._lift_gradient(leaf_of[id(tensor)])
            elif id(tensor) in position and not constant:
                self._lift_argument(position[id(tensor)])
                if slots:
                    self._add_same_object(slots[0], position[id(tensor)])
            elif slots and isinstance(slots[0], _lift.NumberSlot):
                place, element = slots[0].place(), slots[0].element
                self._lift_number(place, -1 if element is None else element)
            elif slots:
                self._lift_slot(slots[0], tensor, lowered.uses_storage_offset)
            else:
                self._lift_fixed(tensor, constant)
        for leaf, grad in lowered.leaves:
            self._add_gradient_guard(leaf, grad, lowered.uses_storage_offset)
        lowered.leaves = []
        # Tensors lifted as views of one storage.
        for base, indices in members.items():
            offsets = [(i, lowered.lifted[i][0].storage_offset()) for i in indices]
            self._add_group(base, offsets, lowered.lifted[base][0].untyped_storage().nbytes())
        self._set_written([w.index for w in lowered.writes if w.root is not None])

    def _set_up_native_finish(self, lowered: _lower.Lowered) -> None:
        """Let the C++ half write back and put the result together, where both are plain."""
        further = (lowered.backward, lowered.refills, lowered.effects, lowered.assigned)
        further += (lowered.gradients, lowered.required, lowered.spent, lowered.update)
        if any(further) or any(w.root is None or w.meta or w.source for w in lowered.writes):
            return
        result = _native_result(lowered.result, set())
        if result is not None:
            writes = [(w.index, w.root, w.bumps) for w in lowered.writes]
            self._set_native_finish(writes, result)

    def may_follow(self, observed: list[torch.Tensor]) -> bool:
        """Whether this variant went the way that another one's guards have shown."""
        return len(self.guards) >= len(observed) and all(
            guard.holds(value) for guard, value in zip(self.guards, observed)
        )

    def _record_again(
        self,
        fn: Callable[..., Any],
        autocast: bool,
        autocast_dtype: torch.dtype,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[_record.Recording, _lift.State]:
        """Record the program once more, on the arguments of a call that this variant answered.

        Raises:
            UnsupportedError: what it reads beside its arguments has changed since.
        """
        with torch.enable_grad(), torch.autocast("cpu", autocast_dtype, autocast):
            if self.match(args, kwargs) is None:
                raise UnsupportedError(_gradients.CHANGED)
            leaves = _tree.flatten((args, kwargs)).leaves
            state = _lift.State(fn, *(v for v in leaves if not isinstance(v, torch.Tensor)))
            return _record.record(fn, args, kwargs, state, []), state

    def _written(self, tensors: list[torch.Tensor]) -> set[int]:
        """The memory that a call writes to."""
        writes = [w for w in self._lowered.writes if w.root is not None]
        return {tensors[w.index].untyped_storage().data_ptr() for w in writes}

    def _first_values(self, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """The roots, from a run operator by operator that is compared with the recording."""
        lowered = self._lowered
        with self._first_run:
            recorder = self._recorder
            if recorder is not None:
                given = recorder.input_values(lowered.needed)
                inputs = [tensors[i] for i in lowered.needed]
                checked = recorder.run_checked(lowered.roots, 0, given, inputs)
                if checked.learned and not checked.complete:
                    raise _Learned
                if not checked.complete:
                    raise _Mismatch(None)
                if self._backward is not None and not self._backward.check(
                    recorder, checked.values
                ):
                    raise _Learned
                self._stale = checked.learned
                self._recorder = None
                self._checked = True
                return checked.values
        values: list[torch.Tensor | None] = [None] * len(lowered.roots)
        outputs = self._program.run([tensors[i] for i in lowered.parameters])
        for root, value in zip(lowered.outputs, outputs):
            values[root] = value
        return values

    def _finish(
        self,
        containers: list[Any],
        tensors: list[torch.Tensor],
        values: list[torch.Tensor],
        states: list[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The effects and the result of a call, once it is certain that they are right.

        Args:
            states: of the generators, as the call found them.
        """
        lowered = self._lowered
        if self._backward is not None:
            drawn = list(zip(lowered.generators, states))
            origin = _gradients.Origin(self._derivatives, args, kwargs, tensors, drawn)
            written = self._written(tensors)
            values = _gradients.attach(self._backward, written, origin, tensors, values)
        values = _gradients.spend(lowered.spent, values)
        take = _Results(containers, tensors, values)
        with torch.no_grad():
            _write_back(lowered, self._update, tensors, values, take)
            new_data = [(index, take(source)) for index, source in lowered.assigned]
            for index, value in new_data:
                tensors[index].data = value
            for index, required in lowered.required:
                tensors[index].requires_grad_(required)
            for index, source in lowered.gradients:
                tensors[index].grad = take(source)
        result = take(lowered.result)
        for position, built in lowered.refills:
            _tree.fill(containers[position], built.shape, [take(c) for c in built.children])
        for owner, key, source in lowered.effects:
            if key is _lift.CONTENT:
                _tree.fill(owner, source.shape, [take(c) for c in source.children])
            else:
                value = source if source is _lift.MISSING else take(source)
                _lift.Slot(owner, key, "").write(value)
        return result


def _native_result(source: _lower.Source, seen: set[int]) -> tuple[Any, ...] | None:
    """A result as `csrc/call.h` makes it; None where only `_Results` can."""
    if isinstance(source, _lower.Constant):
        return ("constant", source.value)
    if isinstance(source, _lower.FromRoot):
        plain = not (source.alias or source.requires_grad or source.parameter)
        return ("root", source.root) if plain else None
    if isinstance(source, _lower.FromLifted):
        return None if source.alias else ("lifted", source.index)
    if isinstance(source, _lower.Built) and source.shape.cls in (tuple, list, dict):
        if id(source) in seen:
            return None  # one object in two places
        seen.add(id(source))
        children = [_native_result(c, seen) for c in source.children]
        if any(c is None for c in children):
            return None
        return (source.shape.cls.__name__, children, source.shape.keys)
    return None


def _write_back(
    lowered: _lower.Lowered,
    update: _C.Program | None,
    tensors: list[torch.Tensor],
    values: list[Any],
    take: _Results,
) -> None:
    writes = lowered.writes
    counted = [w for w in writes if not tensors[w.index].is_inference()]
    versions = [tensors[w.index]._version for w in counted]
    if any(w.in_place and values[w.root] is None for w in writes):
        assert lowered.update is not None and update is not None
        inputs = [tensors[i] for i in lowered.update.parameters]
        update.run(inputs + [values[r] for r in lowered.update.boundary])
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
        if write.root is not None and values[write.root] is not None:
            with torch.set_grad_enabled(write.differentiable):
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
        if isinstance(source, _lower.FromNumber):
            return self.values[source.root].item()
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


class ExtractedModule(nn.Module):
    """A graph as a module, for what wraps modules (`DistributedDataParallel`).

    Attributes:
        module: the module that was captured; its parameters and buffers are those of the graph.
    """

    def __init__(self, module: nn.Module, graph: CompiledGraph) -> None:
        super().__init__()
        self.module = module
        self.graph = graph
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)


class CompiledGraph(_C.Caller):
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
        super().__init__()
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
            self._set_variants(self._specializations)
        return specialization

    def _serve(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tried: Specialization | None,
        error: BaseException | None,
    ) -> Any:
        """Answer a call that the C++ half could not: none of the variants fits, or `tried`, the
        first that does, ended with `error`."""
        matching = 0
        failed: list[Specialization] = []
        observed: list[torch.Tensor] = []
        for specialization in list(self._specializations):
            if specialization is not tried:
                call = specialization.match(args, kwargs)
                if call is None:
                    continue
            matching += 1
            if not specialization.may_follow(observed):
                continue
            try:
                if specialization is tried:
                    assert error is not None
                    raise error
                result = specialization.run(call)
            except _Mismatch as mismatch:
                failed.append(specialization)
                if mismatch.observed is not None and len(mismatch.observed) > len(observed):
                    observed = mismatch.observed
                continue
            except _Learned:
                self._discard(specialization)
                return self._capture_and_run(args, kwargs, verify_layouts=True)
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
        return self._capture_and_run(args, kwargs)

    def _capture_and_run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
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
                call = specialization.match(args, kwargs)
                assert call is not None, "a variant does not fit the call it was captured for"
                return specialization.run(call)
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
                self._set_variants(self._specializations)

    def _touch(self, specialization: Specialization) -> None:
        if self._specializations[:1] != [specialization]:
            with self._lock:
                if specialization in self._specializations:
                    self._specializations.remove(specialization)
                    self._specializations.insert(0, specialization)
                    self._set_variants(self._specializations)

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

    def as_module(self) -> ExtractedModule:
        """The graph as an `nn.Module` around the one that was captured.

        Raises:
            TypeError: what was captured is no module.
        """
        if not isinstance(self._fn, nn.Module):
            raise TypeError(f"{self._fn!r} is no nn.Module, and so its graph cannot be one")
        return ExtractedModule(self._fn, self)

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
