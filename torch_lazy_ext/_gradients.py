"""Gradients: an extracted backward behind the results of a replay.

The backward of a variant is captured with it. Its own derivative, which `create_graph=True` asks
for, is captured when that happens: the program is recorded once more, with `torch.autograd.grad`
after it as often as was differentiated, and this graph is differentiable as the first one was.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_lazy_ext import (
    _C,
    _code,
    _compile,
    _interrupts,
    _lift,
    _lower,
    _namespaces,
    _record,
    _tree,
)
from torch_lazy_ext._errors import UnsupportedError

# Products of a backward that autocast computes in its own type.
_CAST = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "matmul", "linear"}
_SCALAR_TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Half"}

# Operators that give something else of a tensor that lies otherwise.
_UNKNOWN = ("torch_lazy_ext::", "_c10d_functional::")
_BY_STRIDES = {"aten::as_strided", "aten::_reshape_alias", "aten::as_strided_scatter", "aten::set_"}

# For each differentiation, the positions of the outputs that had a tangent.
Path = tuple[frozenset[int], ...]


class Backward:
    """The extracted backward of a variant: a graph of its own, and what belongs around it.

    Args:
        read: makes a guard of what code in it has read of Python.
    """

    def __init__(
        self,
        lowered: _lower.Backward,
        compiler: _compile.Compiler,
        read: Callable[[_code.Ran], _namespaces.Read],
    ) -> None:
        self.lowered = lowered
        self.read = None if lowered.ran is None else read(lowered.ran)
        lowered.ran = None
        self._compiler = compiler
        unsuitable = "sizes that depend on the data" if lowered.guards else ""
        self._graph = _compile.Graph(lowered.graph, unsuitable=unsuitable)
        self._program = compiler.start(self._graph)
        self._first_run = threading.Lock()
        self._compiled = False
        # Whether it may run on tangents that lie otherwise than they were recorded.
        self.takes_any_strides = isinstance(self._program, _C.Program) and not any(
            n.kind() in _BY_STRIDES or n.kind().startswith(_UNKNOWN) for n in lowered.graph.nodes()
        )

    def check(self, recorder: _C.Recorder, values: list[torch.Tensor]) -> bool:
        """Run it operator by operator for some tangents, before anybody has seen a result.

        Args:
            values: the roots of the forward.

        Returns:
            Whether all strides are as recorded; if not, they are known now.
        """
        lowered = self.lowered
        saved = [values[r] for r in lowered.saved]
        tangents = [
            torch.empty_strided(values[r].shape, strides, dtype=values[r].dtype).fill_(1)
            for r, strides in zip(lowered.outputs, lowered.strides)
        ]
        checked = recorder.run_checked(
            lowered.roots, lowered.begin, lowered.given, [*saved, *tangents]
        )
        return not checked.learned

    def _is_cast_by_autocast(self, dtype: torch.dtype) -> bool:
        """Whether eager's backward computes otherwise under an autocast to this dtype."""
        others = {"Float", "Half", "BFloat16"} - {_SCALAR_TYPES.get(dtype, "")}
        return any(
            n.kind().rpartition("aten::")[2] in _CAST
            and any(
                isinstance(v.type(), torch._C.TensorType) and v.type().scalarType() in others
                for v in n.inputs()
            )
            for n in self.lowered.graph.nodes()
        )

    def run(self, saved: tuple[torch.Tensor, ...], tangents: list[torch.Tensor]) -> Any:
        """The gradients of `lowered.wrt`."""
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            if self._is_cast_by_autocast(dtype):
                raise UnsupportedError(
                    "the backward of an extracted graph is called under autocast, where eager "
                    f"would compute matrix products in {dtype} that the program computed in "
                    "another type: call backward() outside of autocast, as PyTorch recommends"
                )
        inputs = [*saved, *tangents]
        if not self._compiled:
            with self._first_run:
                if not self._compiled:
                    finish = functools.partial(self._compiler.finish, self._graph, self._program)
                    _interrupts.whole(lambda: finish(inputs))
                    self._compiled = True
        values = self._program.run(inputs)
        for guard in self.lowered.guards:
            value = values[guard.root]
            if list(value.shape) != guard.expected:
                raise UnsupportedError(
                    f"a tensor in the backward of an extracted graph has the shape "
                    f"{tuple(value.shape)} on these gradients (at {guard.source}), and had "
                    f"{tuple(guard.expected)} when it was captured: call the program itself"
                )
        return values

    def run_as_they_lie(self, saved: tuple[torch.Tensor, ...], tangents: list[torch.Tensor]) -> Any:
        """The gradients as eager has them of these tangents, which lie otherwise than recorded.

        Returns:
            None where the recording holds for its own strides only.
        """
        if any(t.is_conj() or t.is_neg() for t in tangents):
            return None
        try:
            return self.run(saved, tangents)
        except RuntimeError:
            return None  # a view that these strides do not allow, where eager makes a copy


class Derivatives:
    """The higher derivatives of one variant, which holds this, and is not held by it.

    Args:
        refused: why there are none, or nothing.
    """

    def __init__(self, refused: str) -> None:
        self.refused = refused
        self._known: dict[Path, _Derivative] = {}
        self._lock = threading.Lock()

    def get(self, path: Path, origin: Origin) -> _Derivative:
        known = self._known.get(path)
        if known is None:
            with self._lock:
                recording, state = origin.record(origin.args, origin.kwargs)
                try:
                    lowered = _lower.lower_derivative(recording, state, path)
                    origin.check_lifted(recording.recorder)
                    arguments = _tree.flatten((origin.args, origin.kwargs)).leaves
                    known = _Derivative(lowered, recording, state, arguments)
                finally:
                    recording.recorder.release()
                self._known[path] = known
        return known

    def forget(self, path: Path) -> None:
        with self._lock:
            self._known.pop(path, None)


class Origin:
    """What a higher derivative needs of the call that it belongs to.

    Args:
        record: records the program once more, on the arguments of a call that the variant answered.
        args, kwargs: the arguments.
        tensors: the lifted tensors, before the call wrote to any.
        states: the generators that the program draws from, as the call found them.
    """

    def __init__(
        self,
        derivatives: Derivatives,
        record: Callable[[tuple[Any, ...], dict[str, Any]], tuple[_record.Recording, _lift.State]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        states: list[tuple[torch.Generator, torch.Tensor]],
    ) -> None:
        self.derivatives = derivatives
        self.refused = derivatives.refused
        if not self.refused:  # or all this would be kept for nothing
            self.record = record
            self.args, self.kwargs = args, kwargs
            self.tensors = tensors
            self.states = states
            self._stamps = [None if t is None else _stamp(t) for t in tensors]

    def check_lifted(self, recorder: _C.Recorder) -> None:
        """Raise an error unless the program was recorded on the tensors of the call."""
        for i, (tensor, _twin, constant, _base) in enumerate(recorder.lifted()):
            if not constant and (i >= len(self.tensors) or tensor is not self.tensors[i]):
                raise UnsupportedError(CHANGED)

    def check(self, derivative: _Derivative) -> None:
        """Raise an error unless these tensors are as the call found them."""
        for i in derivative.reads:
            if _stamp(self.tensors[i]) != self._stamps[i]:
                raise UnsupportedError(
                    "a tensor that the program reads was modified by an in-place operation between "
                    "the call of an extracted graph and the derivative of its backward "
                    "(create_graph=True), or by the call itself: call the program itself instead "
                    "of its graph"
                )


CHANGED = (
    "the derivative of an extracted backward (create_graph=True) is captured when it is asked for, "
    "and the program's arguments, attributes or settings are not as they were at the call: call "
    "the program itself instead of its graph"
)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _stamp(tensor: torch.Tensor) -> tuple[int, int]:
    return _version(tensor), tensor.data_ptr()


class _Derivative:
    """Gradients as a graph of the lifted tensors and the tangents, with a backward of its own."""

    def __init__(
        self,
        lowered: _lower.Derivative,
        recording: _record.Recording,
        state: _lift.State,
        arguments: list[Any],
    ) -> None:
        self.lowered = lowered
        recorder = recording.recorder
        inputs = recorder.lifted()
        self.reads = [i for i in lowered.parameters if not inputs[i][2]]
        self.program = _C.Program(lowered.graph)
        compiler = _compile.Compiler("torchscript", False)
        read = functools.partial(
            _namespaces.Read,
            state,
            program=recording.ran,
            written=recording.written,
            lifted=[None if constant else tensor for tensor, _twin, constant, _base in inputs],
            arguments=set(map(id, arguments)),
            placement=_C.Placement(offset=False, view=False, leaf=False),
        )
        self.backwards = [Backward(b, compiler, read) for b in lowered.backwards]
        self._recorder: _C.Recorder | None = recorder  # until the first run

    def run(self, inputs: dict[int, torch.Tensor]) -> list[torch.Tensor] | None:
        """The roots for lifted tensors and tangents by index; None: capture again."""
        given = [inputs[i] for i in self.lowered.parameters]
        recorder = self._recorder
        if recorder is None:
            values = self.program.run(given)
        else:
            parameters = recorder.input_values(self.lowered.parameters)
            checked = recorder.run_checked(self.lowered.roots, 0, parameters, given)
            if not checked.complete:
                return None
            values = checked.values
            known = [b.check(recorder, values) for b in self.backwards]
            if not all(known):
                return None
            self._recorder = None
        for guard in self.lowered.guards:
            value = values[guard.root]
            if not (
                _C.same_bits(value, guard.expected)
                if guard.is_value
                else list(value.shape) == guard.expected
            ):
                return None
        return values


def attach(
    backwards: list[Backward],
    written: set[int],
    origin: Origin,
    tensors: list[torch.Tensor],
    values: list[torch.Tensor],
    made: Sequence[Callable[[], torch.Tensor]],
) -> list[_Call]:
    """Give the results of a replay their place in the autograd graph of the caller.

    Args:
        backwards: each of results of its own.
        written: the memory that the call is going to write to.
        values: the roots of the forward; those that require grad are replaced.
        made: gives each of the further leaves, when all that it depends on is in its place.

    Returns:
        What has to be told when the call has had its effects (`_Call.note_left`).
    """
    # What is saved is the value before the call wrote to it.
    kept = {r: values[r] for backward in backwards for r in backward.lowered.saved}
    if written:
        for r, t in kept.items():
            if t.untyped_storage().data_ptr() in written:
                kept[r] = t.clone()
    every = dict(enumerate(tensors))
    calls: list[_Call] = []
    for backward in backwards:
        for i in backward.lowered.wrt:
            if i < 0 and i not in every:
                every[i] = made[~i]()
        live = backward.lowered.live
        saved = [kept[r] for k, r in enumerate(backward.lowered.saved) if k not in live]
        call = _Call(backward, saved, origin, (), every)
        _apply(call, values)
        if origin.refused:
            call.inputs = {}
        if backward.read is not None:
            calls.append(call)
    return calls


def _apply(call: _Call, values: list[torch.Tensor]) -> None:
    lowered = call.backward.lowered
    call.outputs = [values[r] for r in lowered.outputs]
    inputs = [call.inputs[i] for i in lowered.wrt]
    if not any(t.requires_grad for t in inputs):
        inputs.append(anchor())  # no leaf requires grad any more, and the results do
    outputs = _Differentiable.apply(call, *inputs)  # type: ignore[no-untyped-call] # PyTorch's own
    for root, output in zip(lowered.outputs, outputs):
        values[root] = output


def anchor() -> torch.Tensor:
    """Stands for a leaf that nobody has."""
    return torch.empty(0, requires_grad=True)


class _Call:
    """What one call hands to its backward.

    Attributes:
        saved, outputs: taken by the autograd.Function.
        nested: the leaves that a backward inside of the backward accumulates into.
        written: lifted tensors that the backward writes to, by index.
        path: how the program was differentiated to come to this graph.
        inputs: what the graph was given, by the index of the lifted tensor or tangent.
    """

    def __init__(
        self,
        backward: Backward,
        saved: list[torch.Tensor],
        origin: Origin,
        path: Path,
        inputs: dict[int, torch.Tensor],
    ) -> None:
        self.backward = backward
        self.saved = saved
        self.outputs: list[torch.Tensor] = []
        lowered = backward.lowered
        self.nested = [inputs[i] for i, _k in lowered.nested]
        self.written = {i: inputs[i] for i, _k in lowered.written if i >= 0}
        self.origin = origin
        self.path = path
        self.inputs = inputs
        # For outputs whose backward another one's has left what it needs.
        self._left_over: tuple[tuple[torch.Tensor, ...], list[int]] | None = None
        self._freed: set[int] = set()
        self._read = backward.read
        if self._read is not None:
            self._tensors = self._read.tensors(inputs)
            self._left: list[Any] = []
            self._containers: Sequence[Any] = ()

    def note_left(self, containers: Sequence[Any]) -> None:
        """The call has had its effects; `containers`: of its arguments."""
        assert self._read is not None
        self._containers = containers
        self._left = self._read.left(containers)

    def saved_for(self, ctx: Any, given: frozenset[int]) -> tuple[torch.Tensor, ...]:
        """What the backward has saved, for tangents of the outputs `given`.

        Raises:
            RuntimeError: eager's, where what these outputs need is gone, or was written to.
        """
        sharing = self.backward.lowered.sharing
        try:
            saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        except RuntimeError:
            # The last run has freed it, which in eager frees no more than that run went by.
            if self._left_over is None or any(
                not self._freed.isdisjoint(sharing[k]) for k in given
            ):
                raise
            saved, versions = self._left_over
            if [_version(t) for t in saved] != versions:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    "inplace operation, after the backward of another result of the graph"
                ) from None
            self._freed |= given
        else:
            self._freed = set(given)
        if all(not self._freed.isdisjoint(own) for own in sharing):
            self._left_over = None
        else:
            self._left_over = saved, [_version(t) for t in saved]
        return saved

    def check_read(self) -> None:
        """Raise an error where code of the program would read something else than was recorded."""
        if self._read is not None and not self._read.holds(
            self._tensors, self._left, self._containers
        ):
            raise UnsupportedError(
                "something that the backward of an extracted graph has read of Python (a hook or a "
                f"custom autograd.Function: {self._read.place}) was changed since the call, and "
                "the graph holds what it was then: change it after backward(), or call the program "
                "itself"
            )

    def differentiably(self, tangents: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
        return _interrupts.whole(lambda: self._differentiably(tangents))

    def _differentiably(self, tangents: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
        """The gradients of `backward.lowered.wrt`, as results of a graph with a backward.

        Args:
            tangents: by the position of the output; there is no part of the others in the graph.
        """
        origin = self.origin
        if origin.refused:
            what = "second derivatives (create_graph=True) of an extracted graph"
            if not torch.is_grad_enabled():
                what = (
                    "the backward of some results of an extracted graph, which gives NaN if it "
                    "takes zeros as the gradients of the others"
                )
            raise UnsupportedError(f"{what}: {origin.refused}. Call the program itself for those")
        positions = self.backward.lowered.positions
        path = (*self.path, frozenset(positions[k] for k in tangents))
        now = _C.RandomStates([g for g, _state in origin.states])
        try:
            for _attempt in range(4):
                # The numbers that the call has drawn.
                for generator, state in origin.states:
                    generator.set_state(state)
                    _C.note_seed(generator)
                derivative = origin.derivatives.get(path, origin)
                origin.check(derivative)
                inputs = dict(self.inputs)
                inputs.update(derivative.lowered.constants)
                inputs.update(zip(derivative.lowered.tangents, tangents.values(), strict=True))
                values = derivative.run(inputs)
                if values is not None:
                    break
                origin.derivatives.forget(path)
            else:
                raise UnsupportedError(CHANGED)
        finally:
            now.put_back()
        for backward in derivative.backwards if torch.is_grad_enabled() else ():
            saved = [values[r] for r in backward.lowered.saved]
            call = _Call(backward, saved, origin, path, inputs)
            if backward.read is not None:
                call.note_left(())
            # As eager's, a gradient has a history where something in it requires grad.
            if any(inputs[i].requires_grad for i in backward.lowered.wrt):
                _apply(call, values)
        for root, error, keys in derivative.lowered.spent if torch.is_grad_enabled() else ():
            leaves = [inputs[i] for i in keys if inputs[i].requires_grad]
            if leaves:
                values[root] = _Spent.apply(values[root], error, *leaves)  # type: ignore[no-untyped-call] # PyTorch's own
        left = dict(derivative.lowered.gradients)
        places = collections.Counter(self.backward.lowered.wrt)
        found: list[torch.Tensor | None] = []
        for i in self.backward.lowered.wrt:
            places[i] -= 1
            roots = left.get(i, [])
            here, left[i] = (roots[:1], roots[1:]) if places[i] else (roots, [])
            found.append(functools.reduce(torch.add, (values[r] for r in here)) if here else None)
        return found


class _Differentiable(torch.autograd.Function):
    """A graph whose forward has run, with its extracted backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.saved)
        ctx.like = [(t.shape, t.dtype) for t in call.outputs]
        aliases = call.backward.lowered.aliases
        # A view of an input is a view to the caller, too.
        outputs = tuple(
            aliases[k][1].apply(inputs[aliases[k][0]]) if k in aliases else t.detach()
            for k, t in enumerate(call.outputs)
        )
        call.saved, call.outputs = [], []
        if call.path:
            # The results of a program require grad as they did; its gradients may or may not.
            found = zip(call.backward.lowered.reached, inputs)
            live = frozenset[int]().union(*(reached for reached, t in found if t.requires_grad))
            ctx.mark_non_differentiable(*(t for k, t in enumerate(outputs) if k not in live))
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        call: _Call = ctx.call
        call.check_read()
        lowered = call.backward.lowered
        if lowered.whole and not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "torch.utils.checkpoint with use_reentrant=True is incompatible with .grad() or "
                "passing an `inputs` parameter to .backward(): set use_reentrant=False, or call "
                ".backward() without `inputs`"
            )
        given = frozenset(k for k, t in enumerate(tangents) if t is not None)
        saved = call.saved_for(ctx, given) if lowered.once else ()
        if lowered.live:
            rest = iter(saved)
            saved = tuple(
                call.written[lowered.live[k]] if k in lowered.live else next(rest)
                for k in range(len(lowered.saved))
            )
        dense = []
        for tangent, strides, (shape, dtype) in zip(tangents, lowered.strides, ctx.like):
            if tangent is None or tangent.stride() != strides or tangent.is_conj():
                empty = torch.empty_strided(shape, strides, dtype=dtype)
                tangent = empty.zero_() if tangent is None else empty.copy_(tangent)
            dense.append(tangent)
        values: Any = None
        if torch.is_grad_enabled():
            values = call.differentiably({k: dense[k] for k in sorted(given)})
        else:
            present = [t for t in tangents if t is not None]
            otherwise = any(t is not d for t, d in zip(tangents, dense))
            if otherwise and call.backward.takes_any_strides and len(present) == len(dense):
                values = call.backward.run_as_they_lie(saved, present)
            if values is None:
                values = call.backward.run(saved, dense)
            mixed = [
                v
                for v, reached in zip(values[: lowered.count], lowered.reached)
                if reached & given and not reached <= given
            ]
            if (mixed and call.path) or _any_nan(mixed):
                # A zero is not nothing: 0 * inf is NaN, and a second derivative may leave a leaf
                # without a gradient.
                values = call.differentiably({k: dense[k] for k in sorted(given)})
        with torch.no_grad():
            for i, k in lowered.written:
                target = call.written.get(i, tangents[~i] if i < 0 else None)
                value = values[k]
                if target is not None and value is not None:
                    target.copy_(value)
        for tensor, (_i, k) in zip(call.nested, lowered.nested):
            torch.autograd.backward([tensor], [values[k]])
        # No tangent on the way: no gradient, which is not the same as zero.
        results = [
            v if reached & given else None
            for v, reached in zip(values[: lowered.count], lowered.reached)
        ]
        return (None, *results, *[None] * (len(ctx.needs_input_grad) - 1 - len(results)))


def _any_nan(tensors: list[torch.Tensor]) -> bool:
    if not tensors:
        return False
    return bool(torch.nn.utils.get_total_norm(tensors).isnan())


def spend(
    spent: list[tuple[int, Exception, list[int]]],
    tensors: list[torch.Tensor],
    values: list[torch.Tensor],
    made: Sequence[Callable[[], torch.Tensor]],
) -> list[torch.Tensor]:
    """Let the roots of `spent` raise the error in their backward that eager's raises.

    Args:
        tensors, made: what the leaves that this backward leads to are taken from, as in `attach`.
    """
    if not spent:
        return values
    values = list(values)
    for root, error, keys in spent:
        leaves = [tensors[i] if i >= 0 else made[~i]() for i in keys]
        inputs = [leaf for leaf in leaves if leaf.requires_grad] or [anchor()]
        values[root] = _Spent.apply(values[root], error, *inputs)  # type: ignore[no-untyped-call] # PyTorch's own
    return values


class _Spent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, error: Exception, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.error = error
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        raise ctx.error.with_traceback(None)
