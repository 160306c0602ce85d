"""Replay: a specialization is one captured variant; a CompiledGraph keeps several and picks."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._device import DeviceContext

from torch_lazy_ext import (
    _C,
    _autograd,
    _code,
    _compile,
    _escapes,
    _fx,
    _gradients,
    _interrupts,
    _lift,
    _lower,
    _namespaces,
    _optimizers,
    _policy,
    _record,
    _text,
    _tree,
    _why,
)
from torch_lazy_ext._errors import ExtractionError, GuardError, UnsupportedError

GUARD_FAILURE = ("recapture", "eager", "error")
IN_VAIN = "captures did not pay"
OTHER_WAY = "the data took a way that no variant took"
UNINITIALIZED = "the program has uninitialized parameters, which its first call initializes eagerly"


class _Mismatch(Exception):
    """The data of a call took another way than the captured one.

    Attributes:
        observed: values of the first guards, up to and with the one that failed; None when the
            graph itself did not come to an end.
        reason: what happened, for people.
    """

    def __init__(
        self, observed: list[torch.Tensor] | None, reason: str = "the data differs"
    ) -> None:
        super().__init__(reason)
        self.observed = observed
        self.reason = reason


class _Uninitialized(Exception):
    """The program has parameters whose shapes its first call decides (`nn.LazyLinear`)."""


class _CaptureRaises(Exception):
    """What a capture raises that is no error of this package, for people."""


class _Learned(Exception):
    """The first run corrected what is known about an operator's strides: capture again."""


# Leave the run of a variant as they are; every other exception is a mismatch.
_KEPT_ERRORS = (_Learned, _Mismatch, ExtractionError)
_HANDLED_ERRORS = (_Learned, _Mismatch)
# A variant that raises one of these in its first call is not kept.
_DISCARDING_ERRORS = (_Learned, _Mismatch, _C.Interrupted)
# Operators whose kernels are C++ code.
_NATIVE = {"aten", "prim"}


def _no_derivatives(lowered: _lower.Lowered) -> str:
    """Why a program cannot be recorded once more after a call; nothing if it can."""
    changes: list[Any] = [lowered.refills, lowered.effects, lowered.assigned, lowered.required]
    changes += [lowered.hooks, lowered.retained, lowered.attributes, lowered.attributed]
    changes += [lowered.hooks_of_made]
    if any(changes):
        return "the program changes attributes, or containers that it is given"
    if lowered.gradients or lowered.spent:
        return "the program calls backward() itself"
    if any(b.written for b in lowered.backwards):
        return "its backward writes to tensors"
    if any(b.nested for b in lowered.backwards):
        return "the program calls torch.utils.checkpoint with use_reentrant=True"
    if any(base >= 0 for _tensor, _constant, base in lowered.lifted):
        return "the program writes to memory that several of its tensors share"
    return ""


def _has_effects(lowered: _lower.Lowered) -> bool:
    """Whether a call changes anything but random number generators."""
    effects: list[object] = [lowered.writes, lowered.refills, lowered.effects, lowered.assigned]
    effects += [lowered.gradients, lowered.required, lowered.hooks, lowered.retained, lowered.modes]
    effects += [lowered.attributes]
    return any(effects)


def _placement(lowered: _lower.Lowered) -> _C.Placement:
    return _C.Placement(
        offset=lowered.reads_offset, view=lowered.reads_views, leaf=lowered.reads_leaf
    )


def _function_modes() -> list[Any]:
    """Every TorchFunctionMode that is on, the innermost last."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)]


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
            expected: list[int] = self.expected
            return list(value.shape) == expected
        return _C.same_bits(value, self.expected)

    @property
    def what(self) -> str:
        """What it saw, without the place."""
        if not self.is_value:
            return f"shape {tuple(self.expected)}"
        return f"value {self.expected.tolist()}" if self.expected.numel() <= 8 else "values"

    def __repr__(self) -> str:
        return f"{self.what} at {self.source}" if self.source else self.what


class Specialization(_C.Variant):
    """One variant of a program: its graph, what it reads, and when it may be used.

    The C++ half (`csrc/call.h`) compares a call with the capture, gathers the lifted tensors and
    runs the graph; this half sets it up, and does what is not needed on every call.

    Attributes:
        guards: what the program looked at in its data, in program order.
        relied: what the program read of Python.
        hits: calls that this variant answered.
        misses: runs whose result was thrown away, because the data took another way.
        owner: the graph whose variant it is.
    """

    owner: weakref.ref[CompiledGraph] | None = None

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        flat: _tree.Flat,
        compiler: _compile.Compiler,
        verify_layouts: bool = False,
    ) -> None:
        # Whatever the C++ half points to: here Python's collector of cycles sees it.
        self._keep: list[Any] = []
        super().__init__(self._keep)
        modes = _function_modes()
        devices = [m.device if isinstance(m, DeviceContext) else m for m in modes]
        self._set_surroundings(_C.Surroundings.now(), devices)
        with _escapes.rest, contextlib.ExitStack() as undo:
            state, recorder, lowered, self._creations, ran = capture(
                fn, args, kwargs, flat, undo, verify_layouts
            )
            self._set_up(fn, flat, compiler, state, recorder, lowered, ran)
            state.forget()
        self.seen = _why.Seen(
            [_why.leaf(v) for v in flat.leaves], self.relied, [repr(g) for g in self.guards]
        )

    def _set_up(
        self,
        fn: Callable[..., Any],
        flat: _tree.Flat,
        compiler: _compile.Compiler,
        state: _lift.State,
        recorder: _C.Recorder,
        lowered: _lower.Lowered,
        ran: _code.Ran,
    ) -> None:
        self.graph = lowered.graph
        self._lowered = lowered
        self._compiler = compiler
        self._graph = _compile.Graph(lowered.graph, _weights(flat, lowered), _unsuitable(lowered))
        self._program = (
            _C.PythonProgram(_OneAtATime(lowered.graph))
            if lowered.makes_generators
            else compiler.start(self._graph)
        )
        self._parameters = lowered.parameters
        self._generators = lowered.generators
        self._overwritten = lowered.overwritten
        self._communicates = lowered.communicates
        self._update: _C.Program | _C.Switch | None = None
        if lowered.update is not None:
            functional = (lowered.update.functional, lowered.update.targets)
            self._update_graph = _compile.Graph(lowered.update.graph, functional=functional)
            self._update = compiler.start(self._update_graph)
            self._outputs, self._num_roots = lowered.outputs, len(lowered.roots)
        if lowered.precheck is not None:
            graph, parameters = lowered.precheck
            self._set_precheck(_C.Program(graph), parameters)
        self._recorder: _C.Recorder | None = recorder  # until the first run
        self._first_run = threading.Lock()
        self._guard_calls(flat, state, lowered, ran)
        self._set_up_lifted(flat, state, lowered)
        self._fn = fn
        self._autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        self._derivatives = _gradients.Derivatives(_no_derivatives(lowered))
        self.guards = [Guard(g) for g in lowered.guards]
        for guard in self.guards:
            add = self._add_value_guard if guard.is_value else self._add_size_guard
            add(guard.root, guard.expected)
        read = functools.partial(
            _namespaces.Read,
            state,
            program=ran,
            written=lowered.written,
            lifted=[None if constant else tensor for tensor, constant, _base in lowered.lifted],
            arguments=set(map(id, flat.leaves)),
            placement=_placement(lowered),
        )
        lowered.lifted, lowered.written = [], []
        self._backwards = [_gradients.Backward(b, compiler, read) for b in lowered.backwards]
        self._set_up_native_finish(lowered)
        self._has_effects = _has_effects(lowered)
        self._runs_python = bool(_C.namespaces_of(lowered.graph) - _NATIVE)

    @functools.cached_property
    def graph_module(self) -> torch.fx.GraphModule:
        """The graph as aten operators in FX, with a fake tensor for each value."""
        return _fx.graph_module(self.graph)

    @property
    def backend(self) -> str:
        """What runs the graph by now: a backend's name, and why it is not the chosen one."""
        names = [self._graph.runs_on]
        if self._update is not None and self._update_graph.runs_on != names[0]:
            names.append(f"updates in place: {self._update_graph.runs_on}")
        return "; ".join(names)

    def _guard_calls(
        self, flat: _tree.Flat, state: _lift.State, lowered: _lower.Lowered, ran: _code.Ran
    ) -> None:
        # An object that only itself is equal to needs no more than a weak reference: once it has
        # gone, no call can have it.
        gone = functools.partial(_argument_has_gone, weakref.ref(self))
        weak = [i for i, v in enumerate(flat.leaves) if _is_only_itself(v)]
        leaves = [v if isinstance(v, torch.Tensor) else _kept_value(v) for v in flat.leaves]
        for i in weak:
            leaves[i] = weakref.ref(flat.leaves[i], gone)
        names = None if ran.dynamic or state.dynamic or ran.goes_through else ran.names
        self._set_arguments(flat.spec, leaves, weak, names, _placement(lowered))
        if any(not isinstance(c, tuple) for c in flat.containers[2:-1]):
            known = [(i, c) for i, c in enumerate(flat.containers) if state.knows(c)]
            self._set_identities(
                [(i, c) for i, c in known if not isinstance(c, tuple)], state.mutable_ids()
            )
        lifted = {id(tensor) for tensor, _constant, _base in lowered.lifted}
        arguments = {id(flat.leaves[i]) for i in weak}
        self.relied = _namespaces.guard(self, state, ran, lifted, arguments, _placement(lowered))

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
            elif id(tensor) in position and not constant:
                self._lift_argument(position[id(tensor)])
                if slots:
                    self._add_same_object(slots[0], position[id(tensor)])
            elif slots and isinstance(slots[0], _lift.NumberSlot):
                place, element = slots[0].place(), slots[0].element
                self._lift_number(place, -1 if element is None else element)
            elif slots:
                self._lift_slot(slots[0], tensor, _placement(lowered))
            elif id(tensor) in leaf_of and not constant:
                self._lift_gradient(leaf_of[id(tensor)])
            else:
                self._lift_fixed(tensor, constant)
        # A gradient may be an argument as well, or an attribute, or the gradient of two leaves.
        index_of = {
            id(tensor): i
            for i, (tensor, constant, _base) in enumerate(lowered.lifted)
            if not constant
        }
        for leaf, grad in lowered.leaves:
            index = -1 if grad is None else index_of.get(id(grad), -1)
            self._add_gradient_guard(leaf, grad, _placement(lowered), index)
        lowered.leaves = []
        for index, hooks in lowered.hooked:
            self._add_hooks(index, hooks)
        lowered.hooked = []
        # Tensors lifted as views of one storage.
        for base, indices in members.items():
            # The first one has the dtype in which the storage was lifted.
            dtype = lowered.lifted[base][0].dtype
            indices.sort(key=lambda i: lowered.lifted[i][0].dtype != dtype)
            offsets = [(i, int(lowered.lifted[i][0].storage_offset())) for i in indices]
            self._add_group(base, offsets, lowered.lifted[base][0].untyped_storage().nbytes())
        self._set_written([w.index for w in lowered.writes if w.root is not None])

    def _set_up_native_finish(self, lowered: _lower.Lowered) -> None:
        """Let the C++ half write back and put the result together, where both are plain."""
        further: list[object] = [lowered.backwards, lowered.refills, lowered.effects]
        further += [lowered.assigned, lowered.gradients, lowered.required, lowered.spent]
        further += [lowered.modes, lowered.update, lowered.hooks, lowered.retained]
        further += [lowered.related, lowered.attributes, lowered.attributed]
        further += [lowered.hooks_of_made, lowered.grads_of_made]
        if any(further) or any(w.root is None or w.meta or w.source for w in lowered.writes):
            return
        result = _native_result(lowered.result, set())
        if result is not None:
            writes = [(w.index, w.root, w.bumps) for w in lowered.writes if w.root is not None]
            self._set_native_finish(writes, result)

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
        """Match a call, and make the state that it lacks of optimizers.

        Returns:
            The call, None when it is another than the captured one; and a context to run it in,
            which takes that state back when the run fails.
        """
        call = self.match(args, kwargs)
        if call is None and self._creations and all(c.missing() for c in self._creations):
            created = _optimizers.create(self._creations)
            call = self.match(args, kwargs)
            if call is not None:
                return call, created
            created.undo()
        return call, contextlib.nullcontext()

    def may_follow(self, observed: list[torch.Tensor]) -> bool:
        """Whether this variant went the way that another one's guards have shown."""
        return len(self.guards) >= len(observed) and all(
            guard.holds(value) for guard, value in zip(self.guards, observed)
        )

    def _record_again(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_record.Recording, _lift.State]:
        """Record the program once more, on the arguments of a call that this variant answered.

        Raises:
            UnsupportedError: what it reads beside its arguments has changed since.
        """
        with torch.enable_grad(), torch.autocast("cpu", *self._autocast):
            if self.match(args, kwargs) is None:
                raise UnsupportedError(_gradients.CHANGED)
            opaque = _opaque(_tree.flatten((args, kwargs)).leaves)
            state = _lift.State(self._fn, *opaque, *_function_modes())
            return _record.record(self._fn, args, kwargs, state, []), state

    def _written(self, tensors: list[torch.Tensor]) -> set[int]:
        """The memory that a call writes to."""
        writes = [w for w in self._lowered.writes if w.root is not None]
        return {tensors[w.index].untyped_storage().data_ptr() for w in writes}

    def _first_values(self, tensors: list[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """The roots, from a run operator by operator that is compared with the recording."""
        lowered = self._lowered
        there = {i: t for i, t in enumerate(tensors) if t is not None}
        inputs = [there[i] for i in lowered.parameters]
        with self._first_run:
            recorder = self._recorder
            if recorder is not None:
                try:
                    checked = recorder.run_checked(
                        lowered.roots,
                        0,
                        recorder.input_values(list(there)),
                        list(there.values()),
                        lowered.end,
                    )
                except ExtractionError:
                    raise
                except Exception as e:
                    text = (str(e).strip().splitlines() or [type(e).__name__])[0]
                    raise _Mismatch(None, f"{_operator(recorder)} raises: {text}") from e
                if checked.learned and not (checked.complete and lowered.communicates):
                    raise _Learned
                if not checked.complete:
                    raise _Mismatch(None, f"{_operator(recorder)} gives other shapes")
                # All of them: what each learns is known at the next capture.
                known = [b.check(recorder, checked.values) for b in self._backwards]
                if not all(known):
                    raise _Learned
                for write in lowered.writes:
                    write.bumps += checked.bumps.get(write.storage, 0)
                if checked.bumps:
                    self._set_up_native_finish(lowered)
                self._compiler.finish(self._graph, self._program, inputs)
                if self._update is not None:
                    self._compiler.finish(self._update_graph, self._update, [])
                self._stale = checked.learned
                self._recorder = None
                self._checked = True
                return checked.values
        values: list[torch.Tensor | None] = [None] * len(lowered.roots)
        outputs = self._program.run(inputs)
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
        for index, other in lowered.related:
            if _autograd.leads_to(tensors[index], tensors[other]):
                raise UnsupportedError(_autograd.RELATED)
        for index, required in lowered.required:
            if required:
                tensors[index].requires_grad_()
        take = _Results(containers, tensors, values)
        calls: list[_gradients._Call] = []
        if self._backwards or lowered.spent:
            drawn = list(zip(lowered.generators, states))
            origin = _gradients.Origin(
                self._derivatives, self._record_again, args, kwargs, tensors, drawn
            )
            written = self._written(tensors)
            made = [functools.partial(take.leaf, source) for source in lowered.made]
            with torch.enable_grad():
                calls = _gradients.attach(self._backwards, written, origin, tensors, values, made)
                take.values = values = _gradients.spend(lowered.spent, tensors, values, made)
        for index, name, hook in lowered.hooks:
            getattr(tensors[index], name)(hook)
        for index in lowered.retained:
            tensors[index].retain_grad()
        with torch.no_grad():
            _write_back(lowered, self._update, tensors, values, take)
            for source in lowered.former:
                take(source)
            new_data = [(index, take(source)) for index, source in lowered.assigned]
            for index, value in new_data:
                tensors[index].data = value
            for index, required in lowered.required:
                if not required:
                    _forget_history(tensors[index])
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
        for index, name, source in lowered.attributes:
            value = source if source is _lift.MISSING else take(source)
            _lift.Slot(tensors[index].__dict__, name, "").write(value)
        for tensor, grad in lowered.grads_of_made:
            take(tensor).grad = take(grad)
        for leaf, name, hook in lowered.hooks_of_made:
            _register(take(leaf), name, hook)
        for tensor, attributes in lowered.attributed:
            take(tensor).__dict__.update((name, take(s)) for name, s in attributes.items())
        for set_mode, mode in lowered.modes:
            set_mode(mode)
        mutable = [c for c in containers if not isinstance(c, tuple)] if calls else []
        for each in calls:
            each.note_left(mutable)
        return result


_NO_MATCH = object()


def _answer(specialization: Specialization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call; _NO_MATCH when it is another than the captured one."""
    call, lacking = specialization.prepare(args, kwargs)
    if call is None:
        return _NO_MATCH
    with lacking:
        return specialization.run(call)


class _OneAtATime:
    """A graph that draws from generators of its own."""

    def __init__(self, graph: torch._C.Graph) -> None:
        self._program = _C.Program(graph)
        self._lock = threading.Lock()

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with self._lock:
            return self._program.run(inputs)


def _operator(recorder: _C.Recorder) -> str:
    """The operator that a first run is at, with its line."""
    if recorder.running < 0:
        return "the graph"
    name, _metas, where = recorder.node_info(recorder.running)
    return f"{name} (at {where})" if where else name


def _native_result(source: _lower.Source, seen: set[int]) -> tuple[Any, ...] | None:
    """A result as `csrc/call.h` makes it; None where only `_Results` can."""
    if isinstance(source, _lower.Constant):
        return ("constant", source.value)
    if isinstance(source, _lower.FromRoot):
        plain = not (source.alias or source.requires_grad or source.parameter)
        plain = plain and source.inference is None and source.counted_with is None
        return ("root", source.root) if plain else None
    if isinstance(source, _lower.FromLifted):
        return None if source.alias else ("lifted", source.index)
    if isinstance(source, _lower.Built) and source.shape.cls in (tuple, list, dict):
        if id(source) in seen or source.shape.has_tensor_keys:
            return None  # one object in two places
        seen.add(id(source))
        children = [_native_result(c, seen) for c in source.children]
        if any(c is None for c in children):
            return None
        return (source.shape.cls.__name__, children, source.shape.keys)
    return None


def _write_back(
    lowered: _lower.Lowered,
    update: _C.Program | _C.Switch | None,
    tensors: list[torch.Tensor],
    values: list[Any],
    take: _Results,
) -> None:
    writes = lowered.writes
    counted = [w for w in writes if not tensors[w.index].is_inference()]
    versions = [tensors[w.index]._version for w in counted]
    if any(w.in_place and w.root is not None and values[w.root] is None for w in writes):
        assert lowered.update is not None and update is not None
        inputs = [tensors[i] for i in lowered.update.parameters]
        update.run(inputs + [values[r] for r in lowered.update.boundary])
    # As they are now, before any of them is given other memory.
    memory = {w.index: take(w.source).detach() for w in writes if w.source is not None}
    for write in writes:
        tensor = tensors[write.index]
        if write.source is not None:
            tensor.set_(memory[write.index])
            continue
        if write.meta is not None:
            sizes, strides, moved = write.meta
            offset = tensor.storage_offset() + moved
            extent = offset + 1 + sum((n - 1) * s for n, s in zip(sizes, strides))
            if 0 not in sizes and extent * tensor.itemsize > tensor.untyped_storage().nbytes():
                tensor.resize_(sizes)
            with torch.set_grad_enabled(write.differentiable):
                tensor.as_strided_(sizes, strides, offset)
        if write.root is not None and values[write.root] is not None:
            with torch.set_grad_enabled(write.differentiable):
                tensor.copy_(values[write.root])
    if counted:
        torch._C._autograd._unsafe_set_version_counter(
            tuple(tensors[w.index] for w in counted),
            tuple(v + w.bumps for v, w in zip(versions, counted)),
        )
        if any(w.root is None for w in counted):
            _count_together(counted, tensors, versions)


def _count_together(
    writes: list[_lower.Write], tensors: list[torch.Tensor], versions: list[int]
) -> None:
    """Tensors lifted one by one may yet have one version counter: what each adds, together."""
    set_versions = torch._C._autograd._unsafe_set_version_counter
    set_versions(tuple(tensors[w.index] for w in writes), tuple(versions))
    counted: set[int] = set()
    for write, version in zip(writes, versions):
        tensor = tensors[write.index]
        if tensor._version == version or write.storage not in counted:
            set_versions((tensor,), (tensor._version + write.bumps,))
        counted.add(write.storage)


def _forget_history(tensor: torch.Tensor) -> None:
    if tensor.is_leaf:
        tensor.requires_grad_(False)
    else:
        tensor.detach_()


def _in_mode(value: torch.Tensor, inference: bool) -> torch.Tensor:
    """A tensor over the same memory that is an inference tensor, or none."""
    if value.is_inference() == inference:
        return value
    with torch.inference_mode(inference):
        made = torch.empty(0, dtype=value.dtype, device=value.device)
        made.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
        made = torch._neg_view(made) if value.is_neg() else made
        return made.conj() if value.is_conj() else made


def _mode_of(value: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """The inference mode, or none, that a tensor was made in."""
    if value.is_inference() == torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(value.is_inference())


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """Let a tensor require grad, which an inference tensor can in that mode only."""
    with _mode_of(value):
        return value.requires_grad_()


def _register(leaf: torch.Tensor, name: str, hook: Any) -> None:
    """Leave a hook on a leaf, which the program may have made one that requires no grad since."""
    required = leaf.requires_grad
    with _mode_of(leaf):
        leaf.requires_grad_()
        getattr(leaf, name)(hook)
        leaf.requires_grad_(required)


def _parameter(value: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    with _mode_of(value):
        return nn.Parameter(value, requires_grad)


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
        self._unfilled: list[tuple[Any, _lower.Assembled]] = []
        self._depth = 0

    def __call__(self, source: _lower.Source) -> Any:
        if isinstance(source, _lower.Constant):
            return source.value
        made = self._made.get(id(source), self)
        if made is not self:
            return made
        self._depth += 1
        try:
            value = self._object(source)
            while self._depth == 1 and self._unfilled:
                # An object may be among its own children: when all around it is there.
                unfilled, assembled = self._unfilled.pop()
                assert assembled.recipe.fill is not None
                assembled.recipe.fill(unfilled, [self(c) for c in assembled.children])
            return value
        finally:
            self._depth -= 1

    def _object(self, source: _lower.Source) -> Any:
        if isinstance(source, _lower.Assembled):
            if source.recipe.fill is not None:
                value = self._made[id(source)] = source.recipe.make()
                self._unfilled.append((value, source))
                return value
            value = source.recipe.make(*[self(c) for c in source.children])
            self._made[id(source)] = value
            return value
        if isinstance(source, _lower.Built):
            return self._build(source)
        value = self._made[id(source)] = self._tensor(source)
        return value

    def leaf(self, source: _lower.Source | None) -> torch.Tensor:
        """A leaf of the backwards; one that nobody has is as good as any."""
        if source is None:
            return _gradients.anchor()
        if isinstance(source, _lower.FromRoot) and not source.requires_grad:
            return self.values[source.root]  # a result that others depend on
        leaf: torch.Tensor = self(source)
        return leaf

    def _build(self, source: _lower.Built) -> Any:
        if _tree.is_immutable(source.shape):
            value = _tree.make_tuple(source.shape, [self(c) for c in source.children])
            self._made[id(source)] = value
            return value
        value = self._made[id(source)] = _tree.make(source.shape)
        _tree.fill(value, source.shape, [self(c) for c in source.children])
        return value

    def _strided(self, source: _lower.FromStrided) -> torch.Tensor:
        tensor = self.tensors[source.index]
        if source.alias:
            tensor = tensor.data
        elif source.detached:
            tensor = tensor.detach()
        if tensor.dtype != source.dtype:
            count = tensor.untyped_storage().nbytes() // tensor.itemsize
            tensor = tensor.as_strided((count,), (1,), 0).view(source.dtype)
        offset = source.offset + (tensor.storage_offset() if source.relative else 0)
        with torch.set_grad_enabled(source.grad_mode and torch.is_grad_enabled()):
            tensor = tensor.as_strided(source.sizes, source.strides, offset)
        if source.conj:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if source.neg else tensor

    def _array(self, source: _lower.FromArray) -> Any:
        tensor = self(source.tensor)
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        memory = storage.numpy()
        return type(memory)(
            shape=source.shape,
            dtype=source.dtype,
            buffer=memory,
            offset=tensor.storage_offset() * tensor.itemsize + source.offset,
            strides=source.strides,
        )

    def _tensor(self, source: _lower.Source) -> Any:
        if isinstance(source, _lower.FromRoot):
            value = self.values[source.root]
            if source.counted_with is not None:
                return self._counted(source.counted_with, value)
            if source.inference is not None:
                value = _in_mode(value, source.inference)
            if source.parameter:
                return _parameter(value, source.requires_grad)
            if (source.alias or source.requires_grad) and value is self.values[source.root]:
                value = value.data
            if source.retains_grad:
                value.retain_grad()
            return _leaf(value) if source.requires_grad else value
        if isinstance(source, _lower.FromNumber):
            return self.values[source.root].item()
        if isinstance(source, _lower.AsParameter):
            return _parameter(self(source.source), source.requires_grad)
        if isinstance(source, _lower.FromLifted):
            tensor = self.tensors[source.index]
            return tensor.data if source.alias else tensor
        if isinstance(source, _lower.FromView):
            base = self(source.base)
            if source.of_detached:
                base = base.detach()
            if source.grad_mode is not None:
                with torch.set_grad_enabled(source.grad_mode):
                    again = not len(source.views) and isinstance(source.base, _lower.FromView)
                    value = torch.ops.aten.alias(base) if again else source.views.apply(base)
                if source.retains_grad:
                    value.retain_grad()
                if source.detached:
                    value = value.detach()
                return _leaf(value) if source.requires_grad else value
            return source.views.apply(base) if len(source.views) else torch.ops.aten.alias(base)
        if isinstance(source, _lower.FromStrided):
            return self._strided(source)
        if isinstance(source, _lower.FromArray):
            return self._array(source)
        if isinstance(source, _lower.FromArgument):
            return self.containers[source.position]
        if isinstance(source, _lower.Copied):
            return _lower.copied(source.value)
        assert isinstance(source, _lower.FromConstant)
        if source.index not in self._constants:
            constant = self.tensors[source.index]
            with _mode_of(constant):
                self._constants[source.index] = constant.clone()
        base = self._constants[source.index]
        with _mode_of(base):
            value = source.views.apply(base) if len(source.views) else base
        if source.counted_with is not None:
            return self._counted(source.counted_with, value)
        if source.parameter:
            return _parameter(value, source.requires_grad)
        return _leaf(value) if source.requires_grad else value

    def _counted(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """A tensor over the memory of `value` that counts its versions with another."""
        counted: torch.Tensor = torch.ops.aten.alias(self.tensors[index])
        counted.data = value
        return counted


def _opaque(leaves: list[Any]) -> list[Any]:
    """What the program can come by from arguments, beside the tensors."""
    found = [v for v in leaves if not isinstance(v, torch.Tensor)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found += vars(leaf).values()
    return found


def capture(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flat: _tree.Flat,
    undo: contextlib.ExitStack,
    verify_layouts: bool = False,
) -> tuple[_lift.State, _C.Recorder, _lower.Lowered, list[_optimizers.Creation], _code.Ran]:
    """Record and lower a program.

    Args:
        undo: until it is closed, optimizers have the state that the program's first step creates.
    """
    opaque = [*_opaque(flat.leaves), *_function_modes()]
    creations: list[_optimizers.Creation] = []
    creates = True
    while True:
        state = _lift.State(fn, *opaque)
        tensors = [t for t, _slots in state.tensors.values()]
        tensors += [leaf for leaf in flat.leaves if isinstance(leaf, torch.Tensor)]
        if any(map(nn.parameter.is_lazy, tensors)):
            raise _Uninitialized
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
            raise UnsupportedError(
                "an extracted graph is called under a transform of torch.func (grad, vmap, "
                "jacrev), which would see none of its operators: transform the program itself, and "
                "extract the result, as in extract_compiled_graph(torch.func.grad(program), ...)"
            )
        try:
            recorder, lowered, ran = _capture(fn, args, kwargs, state, verify_layouts, creates)
        except _record.CreatesState as request:
            creates = all(c.missing() for c in request.creations)
            if creates:
                creations += request.creations
                undo.callback(_optimizers.create(request.creations).undo)
        else:
            return state, recorder, lowered, creations, ran


def _capture(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: _lift.State,
    verify_layouts: bool,
    creates: bool = False,
) -> tuple[_C.Recorder, _lower.Lowered, _code.Ran]:
    shared: list[torch.Tensor] = []
    while True:
        try:
            recording = _record.record(fn, args, kwargs, state, shared, verify_layouts, creates)
        except _record.SharedStorage as request:
            shared += request.tensors
            continue
        try:
            return recording.recorder, _lower.lower(recording, state), recording.ran
        except _record.SharedStorage as request:
            fresh = [t for t in request.tensors if not any(t is known for known in shared)]
            if not fresh:
                raise UnsupportedError(
                    "the program writes to memory that several of its tensors share without being "
                    "views of one tensor (such as two torch.from_numpy of one array): pass one of "
                    "them, and derive the others inside the program"
                ) from None
            shared = shared + fresh
        finally:
            recording.recorder.release()


def _weights(flat: _tree.Flat, lowered: _lower.Lowered) -> list[int]:
    """The inputs of a graph that are state which no call of it writes to or differentiates."""
    if lowered.backwards:
        return []
    others = {id(leaf) for leaf in flat.leaves}
    others.update(id(grad) for _leaf, grad in lowered.leaves)
    written = {w.index for w in lowered.writes}
    return [
        k
        for k, i in enumerate(lowered.parameters)
        if i not in written and id(lowered.lifted[i][0]) not in others and lowered.lifted[i][2] < 0
    ]


def _unsuitable(lowered: _lower.Lowered) -> str:
    """What TorchScript alone can run, and the graph itself does not show."""
    if not all(g.is_value for g in lowered.guards):
        return "sizes that depend on the data"
    inputs = [lowered.lifted[i][0] for i in lowered.parameters]
    if any(t.is_conj() or t.is_neg() for t in inputs):
        return "inputs that are conjugated or negated views"
    return ""


def _is_only_itself(leaf: Any) -> bool:
    """Whether an argument is equal to no other object, and can be referred to weakly."""
    cls = type(leaf)
    equality: Any = cls.__eq__
    return (
        equality is object.__eq__
        and cls.__weakrefoffset__ != 0
        and not isinstance(leaf, (type, types.ModuleType, torch.Tensor))
    )


def _argument_has_gone(variant: weakref.ref[Specialization], _argument: weakref.ref[Any]) -> None:
    specialization = variant()
    if specialization is not None:
        specialization._stale = True
        graph = None if specialization.owner is None else specialization.owner()
        if graph is not None:
            graph._drop_stale()


def _kept_value(leaf: Any) -> Any:
    # An array can be written to between the calls.
    return leaf.copy() if _tree.is_array(leaf) else leaf


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
        backend: what runs the graphs.
        freeze: weights become constants of the code.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        limit: int = 32,
        on_guard_failure: str = "recapture",
        backend: _compile.Backend = "torchscript",
        freeze: bool = False,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}: a graph keeps one variant at least")
        if on_guard_failure not in GUARD_FAILURE:
            raise ValueError(
                f"on_guard_failure is {on_guard_failure!r}: it is one of {', '.join(GUARD_FAILURE)}"
            )
        super().__init__()
        self._compiler = _compile.Compiler(backend, freeze)
        self._fn = fn
        self._limit = limit
        self._on_guard_failure = on_guard_failure
        self._kept: list[Specialization] = []
        self._lock = threading.Lock()
        self._warned = False
        self._policy = _policy.Policy(limit)
        self._dropped_hits = 0  # of variants that are kept no more
        # Calls that were to run eagerly at last, without a look at the variants, and why.
        self._block, self._block_reason = 0, IN_VAIN
        self._eager_calls: collections.Counter[str] = collections.Counter()  # by reason
        if not isinstance(fn, nn.Module):
            functools.update_wrapper(self, fn, updated=())

    def _extract(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture on example arguments; with uninitialized parameters, a later call does."""
        with contextlib.suppress(_Uninitialized):
            _interrupts.whole(functools.partial(self._extract_whole, args, kwargs))

    def _extract_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raised = False
        try:
            self._capture(args, kwargs)
        except (ExtractionError, _Uninitialized):
            raise
        except Exception:
            raised = True
        if raised:
            # By itself, or since the program relies on an error that only a running kernel raises
            # (of a dtype that it lacks): once more, with each operator run.
            self._capture(args, kwargs, verify_layouts=True)

    def _capture(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], verify_layouts: bool = False
    ) -> Specialization:
        flat = _tree.flatten((args, kwargs))
        begin = _policy.now()
        specialization = Specialization(
            self._fn, args, kwargs, flat, self._compiler, verify_layouts
        )
        specialization.owner = weakref.ref(self)
        with self._lock:
            self._policy.captured(_policy.now() - begin)
            kept = [s for s in self._specializations if not s._stale]
            self._keep([specialization, *kept][: self._limit])
        return specialization

    def _drop_stale(self) -> None:
        # Called wherever an object may go. Whoever has the lock does this later, in a capture.
        with _C.Hold():
            if self._lock.acquire(blocking=False):
                try:
                    self._keep([s for s in self._specializations if not s._stale])
                finally:
                    self._lock.release()

    @property
    def _specializations(self) -> list[Specialization]:
        return self._variants()

    def _keep(self, specializations: list[Specialization]) -> None:
        # The C++ half holds none of them: it has to know them before others go.
        self._set_variants(specializations)
        kept = set(map(id, specializations))
        self._dropped_hits += sum(s.hits for s in self._kept if id(s) not in kept)
        self._kept = specializations

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
        begin = _policy.now()
        failed: list[Specialization] = []
        observed: list[torch.Tensor] = []
        for specialization in list(self._specializations):
            matching += specialization is tried
            if not specialization.may_follow(observed):
                matching += specialization.match(args, kwargs) is not None
                continue
            try:
                if specialization is tried:
                    assert error is not None
                    raise error
                result = _interrupts.whole(functools.partial(_answer, specialization, args, kwargs))
                if result is _NO_MATCH:
                    continue
                matching += 1
            except _Mismatch as mismatch:
                matching += specialization is not tried
                failed.append(specialization)
                if mismatch.observed is not None and len(mismatch.observed) > len(observed):
                    observed = mismatch.observed
                continue
            except _Learned:
                self._discard(specialization)
                return self._capture_and_run(args, kwargs, verify_layouts=True)
            finally:
                if specialization is tried:
                    error = None  # which has this frame in its traceback
            self._touch(specialization)
            return result
        self._policy.missed(self._hits())
        if failed:
            if self._on_guard_failure == "error":
                raise GuardError(self._failure(failed[-1], observed))
            if self._on_guard_failure == "eager":
                return self._eagerly(args, kwargs, OTHER_WAY)
            if matching >= self._limit:
                self._warn(failed[-1], observed)
                return self._in_vain(args, kwargs, OTHER_WAY, begin)
        if not self._policy.may_capture():
            self._warn_of_captures(args, kwargs)
            return self._in_vain(args, kwargs, IN_VAIN, begin)
        return self._capture_and_run(args, kwargs)

    def _hits(self) -> int:
        return self._dropped_hits + sum(s.hits for s in list(self._specializations))

    def _in_vain(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str, begin: float
    ) -> Any:
        """Run a call eagerly that is not worth a capture; it was looked at since `begin`."""
        self._settle_block()
        looked = _policy.now()
        result = self._eagerly(args, kwargs, reason)
        with self._lock:
            # The C++ half has looked at the variants before.
            look = 2 * (looked - begin)
            self._block = self._policy.ran_eagerly(look, _policy.now() - looked)
            self._calls_left, self._block_reason = self._block, reason
        return result

    def _settle_block(self) -> None:
        """Count the calls that ran eagerly without a look at the variants."""
        with self._lock:
            ran = self._block - self._calls_left
            self._block = self._calls_left
            if ran > 0:
                self._eager_calls[self._block_reason] += ran

    def _warn_of_captures(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._warned:
            return
        self._warned = True
        captures = [s.seen for s in self._specializations]
        differences = _why.differences(_why.names(self._fn, args, kwargs), captures)
        told = "; ".join(differences) or "they differ in objects that are not the same ones"
        warnings.warn(
            f"{self._policy.captures} captures of a graph have answered hardly any other call: "
            f"{told}. Such calls run eagerly from now on, and a capture is tried again ever more "
            "seldom: make a tensor of what changes, raise `limit` where the same come again, or "
            "keep it out of the program",
            stacklevel=4,
        )

    def _eagerly(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str, surprise: bool = False
    ) -> Any:
        """Run the program itself; `surprise`: nobody asked for that, so warn of the first one."""
        result = self._fn(*args, **kwargs)  # or the program's own error
        with self._lock:
            if len(self._eager_calls) >= self._limit and reason not in self._eager_calls:
                reason, surprise = "for other reasons", False
            first = surprise and reason not in self._eager_calls
            self._eager_calls[reason] += 1
        if first:
            warnings.warn(
                f"a call ran eagerly, without a graph: {reason}. explain() counts such calls",
                stacklevel=4,
            )
        return result

    def _capture_and_run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        verify_layouts: bool = False,
    ) -> Any:
        for _attempt in range(4):
            try:
                return _interrupts.whole(
                    functools.partial(self._capture_and_answer, args, kwargs, verify_layouts)
                )
            except _Uninitialized:
                return self._eagerly(args, kwargs, UNINITIALIZED)
            except _CaptureRaises as e:
                # The program's own error, and nothing has happened yet: eager does what the
                # program does before it raises, and raises.
                return self._eagerly(args, kwargs, str(e), surprise=True)
            except _Learned:
                verify_layouts = True
            except _Mismatch as mismatch:
                # The operators raise on this data: so does the program, in its own words.
                return self._eagerly(args, kwargs, mismatch.reason, surprise=True)
        raise UnsupportedError(
            "an operator of the program gives other shapes or dtypes on each run than were "
            "recorded: keep it outside of the program"
        )

    def _capture_and_answer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], verify_layouts: bool
    ) -> Any:
        try:
            specialization = self._capture(args, kwargs, verify_layouts)
        except (ExtractionError, _Uninitialized):
            raise
        except Exception as e:
            raise _CaptureRaises(f"the capture raises {type(e).__name__}: {e}") from e
        try:
            result = _answer(specialization, args, kwargs)
        except _DISCARDING_ERRORS:
            self._discard(specialization)
            raise
        assert result is not _NO_MATCH, "a variant does not fit the call it was captured for"
        return result

    def _discard(self, specialization: Specialization) -> None:
        with _C.Hold(), self._lock:
            self._keep([s for s in self._specializations if s is not specialization])

    def _failure(self, specialization: Specialization, observed: list[torch.Tensor]) -> str:
        if not observed:
            return "an operator of the captured graph raises an error on this data"
        guard = specialization.guards[min(len(observed), len(specialization.guards)) - 1]
        seen = observed[-1].tolist() if guard.is_value else tuple(observed[-1].shape)
        where = f" at {guard.source}" if guard.source else ""
        return (
            f"the program looks at its data{where}: the capture saw {guard.what}, "
            f"this call has {seen}"
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

    def _latest(self) -> Specialization:
        if not self._specializations:
            raise ExtractionError(f"there is no graph yet: {UNINITIALIZED}")
        return self._specializations[0]

    @property
    def specializations(self) -> list[Specialization]:
        """The captured variants, most recently used first."""
        return list(self._specializations)

    @property
    def graph(self) -> torch._C.Graph:
        """The TorchScript graph of the most recently used variant."""
        return self._latest().graph

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The graph of the most recently used variant as FX: one node per operator.

        It takes the graph's inputs and returns a tuple of its outputs: what a call writes to its
        arguments, and the structure of its result, stand outside of it. `meta["val"]` of a node is
        a fake tensor, `meta["stack_trace"]` the user's line.
        """
        return self._latest().graph_module

    def graph_text(self, *, source: bool = False) -> str:
        """The graph as text that is the same from run to run.

        Args:
            source: show the user's source line behind each operator.
        """
        return _text.graph_text(self.graph, source=source)

    def explain(self, *, verbose: bool = False) -> str:
        """The variants with their guards, hits and misses, for people.

        Args:
            verbose: list also the objects that each variant relies on (functions, classes, modules,
                containers), and what libraries read.
        """
        count = len(self._specializations)
        lines = [f"{count} variant{'s' * (count != 1)}, most recently used first"]
        for i, s in enumerate(self._specializations):
            operators = collections.Counter(n.kind() for n in s.graph.nodes())
            count = sum(v for k, v in operators.items() if not k.startswith("prim::"))
            lines.append(
                f"variant {i}: {count} operator{'s' * (count != 1)}, {s.hits} "
                f"hit{'s' * (s.hits != 1)}, {s.misses} miss{'es' * (s.misses != 1)}"
                f"{'' if s.backend == 'torchscript' else f', on {s.backend}'}"
            )
            lines += [f"  guard: {guard!r}" for guard in s.guards] or ["  no guards"]
            lines += [f"  relies on {text}" for text in s.relied.lines(verbose)]
        self._settle_block()
        for reason, count in self._eager_calls.items():
            lines.append(f"{count} call{'s' * (count != 1)} ran eagerly: {reason}")
        return "\n".join(lines) + "\n"
