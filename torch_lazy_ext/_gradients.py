"""Gradients: an extracted backward behind the results of a replay.

The backward of a variant is captured with it. Its own derivative, which `create_graph=True` asks
for, is captured when that happens: the program is recorded once more, with `torch.autograd.grad`
after it as often as was differentiated, and this graph is differentiable as the first one was.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from torch_lazy_ext import _C, _compile, _interrupts, _lift, _lower, _record
from torch_lazy_ext._errors import UnsupportedError

# For each differentiation, the positions of the outputs that had a tangent.
Path = tuple[frozenset[int], ...]


class Backward:
    """The extracted backward of a variant: a graph of its own, and what belongs around it."""

    def __init__(self, lowered: _lower.Backward, compiler: _compile.Compiler) -> None:
        self.lowered = lowered
        self._compiler = compiler
        unsuitable = "sizes that depend on the data" if lowered.guards else ""
        self._graph = _compile.Graph(lowered.graph, unsuitable=unsuitable)
        self._program = compiler.start(self._graph)
        self._first_run = threading.Lock()
        self._compiled = False

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

    def run(self, saved: tuple[torch.Tensor, ...], tangents: list[torch.Tensor]) -> Any:
        """The gradients of `lowered.wrt`."""
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


class Derivatives:
    """The higher derivatives of one variant.

    Args:
        record: records the program once more, on the arguments of a call that the variant answered.
        refused: why there are none, or nothing.
    """

    def __init__(
        self,
        record: Callable[[tuple[Any, ...], dict[str, Any]], tuple[_record.Recording, _lift.State]],
        refused: str,
    ) -> None:
        self.refused = refused
        self._record = record
        self._known: dict[Path, _Derivative] = {}
        self._lock = threading.Lock()

    def get(self, path: Path, origin: Origin) -> _Derivative:
        known = self._known.get(path)
        if known is None:
            with self._lock:
                recording, state = self._record(origin.args, origin.kwargs)
                try:
                    lowered = _lower.lower_derivative(recording, state, path)
                    origin.check_lifted(recording.recorder)
                    known = _Derivative(lowered, recording.recorder)
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
        args, kwargs: the arguments.
        tensors: the lifted tensors, before the call wrote to any.
        states: the generators that the program draws from, as the call found them.
    """

    def __init__(
        self,
        derivatives: Derivatives,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        states: list[tuple[torch.Generator, torch.Tensor]],
    ) -> None:
        self.derivatives = derivatives
        self.refused = derivatives.refused
        if not self.refused:  # or all this would be kept for nothing
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


def _stamp(tensor: torch.Tensor) -> tuple[int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr()


class _Derivative:
    """Gradients as a graph of the lifted tensors and the tangents, with a backward of its own."""

    def __init__(self, lowered: _lower.Derivative, recorder: _C.Recorder) -> None:
        self.lowered = lowered
        inputs = recorder.lifted()
        self.reads = [i for i in lowered.parameters if not inputs[i][2]]
        self.program = _C.Program(lowered.graph)
        self.backward: Backward | None = None
        if lowered.backward is not None:
            self.backward = Backward(lowered.backward, _compile.Compiler("torchscript", False))
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
            if self.backward is not None and not self.backward.check(recorder, values):
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
) -> list[torch.Tensor]:
    """Give the results of a replay their place in the autograd graph of the caller.

    Args:
        backwards: each of results of its own.
        written: the memory that the call is going to write to.
        values: the roots of the forward; returned with those that require grad replaced.
    """
    # What is saved is the value before the call wrote to it.
    kept = {r: values[r] for backward in backwards for r in backward.lowered.saved}
    if written:
        for r, t in kept.items():
            if t.untyped_storage().data_ptr() in written:
                kept[r] = t.clone()
    inputs = {} if origin.refused else dict(enumerate(tensors))
    for backward in backwards:
        saved = [kept[r] for r in backward.lowered.saved]
        call = _Call(backward, saved, origin, (), dict(enumerate(tensors)))
        values = _apply(call, values)
        call.inputs = inputs
    return values


def _apply(call: _Call, values: list[torch.Tensor]) -> list[torch.Tensor]:
    lowered = call.backward.lowered
    call.outputs = [values[r] for r in lowered.outputs]
    inputs = (call.inputs[i] for i in lowered.wrt)
    outputs = _Differentiable.apply(call, *inputs)  # type: ignore[no-untyped-call] # PyTorch's own
    values = list(values)
    for root, output in zip(lowered.outputs, outputs):
        values[root] = output
    return values


class _Call:
    """What one call hands to its backward.

    Attributes:
        saved, outputs: taken by the autograd.Function.
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
        self.origin = origin
        self.path = path
        self.inputs = inputs

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
        now = [(g, g.get_state()) for g, _state in origin.states]
        try:
            for _attempt in range(4):
                # The numbers that the call has drawn.
                for generator, state in origin.states:
                    generator.set_state(state)
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
            for generator, state in now:
                generator.set_state(state)
        if derivative.backward is not None and torch.is_grad_enabled():
            saved = [values[r] for r in derivative.backward.lowered.saved]
            values = _apply(_Call(derivative.backward, saved, origin, path, inputs), values)
        gradients = derivative.lowered.gradients
        return [values[gradients[i]] if i in gradients else None for i in self.backward.lowered.wrt]


class _Differentiable(torch.autograd.Function):
    """A graph whose forward has run, with its extracted backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.saved)
        ctx.like = [(t.shape, t.dtype) for t in call.outputs]
        outputs = tuple(t.detach() for t in call.outputs)
        call.saved, call.outputs = [], []
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        call: _Call = ctx.call
        lowered = call.backward.lowered
        given = frozenset(k for k, t in enumerate(tangents) if t is not None)
        # Eager's error, when this has run before and what it needs is gone.
        saved = ctx.saved_tensors if lowered.once else ()
        dense = []
        for tangent, strides, (shape, dtype) in zip(tangents, lowered.strides, ctx.like):
            if tangent is None or tangent.stride() != strides or tangent.is_conj():
                empty = torch.empty_strided(shape, strides, dtype=dtype)
                tangent = empty.zero_() if tangent is None else empty.copy_(tangent)
            dense.append(tangent)
        if torch.is_grad_enabled():
            values = call.differentiably({k: dense[k] for k in sorted(given)})
        else:
            values = call.backward.run(saved, dense)
            mixed = [
                v
                for v, reached in zip(values, lowered.reached)
                if reached & given and not reached <= given
            ]
            if _any_nan(mixed):
                # A zero is not nothing: 0 * inf is NaN.
                values = call.differentiably({k: dense[k] for k in sorted(given)})
        # No tangent on the way: no gradient, which is not the same as zero.
        results = [v if reached & given else None for v, reached in zip(values, lowered.reached)]
        return (None, *results, *[None] * (len(lowered.wrt) - len(results)))


def _any_nan(tensors: list[torch.Tensor]) -> bool:
    if not tensors:
        return False
    return bool(torch.nn.utils.get_total_norm(tensors).isnan())


def spend(spent: list[tuple[int, str]], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Let the roots of `spent` raise an error in their backward: it has run inside the program."""
    if not spent:
        return values
    values = list(values)
    for root, error in spent:
        anchor = torch.empty(0, requires_grad=True)
        values[root] = _Spent.apply(values[root], anchor, error)  # type: ignore[no-untyped-call] # PyTorch's own
    return values


class _Spent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, anchor: torch.Tensor, error: str) -> torch.Tensor:
        ctx.error = error
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        raise RuntimeError(ctx.error)
