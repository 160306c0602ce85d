"""Gradients: an extracted backward behind the results of a replay."""

from __future__ import annotations

from typing import Any

import torch

from torch_lazy_ext import _C, _lower
from torch_lazy_ext._errors import UnsupportedError


class Backward:
    """The extracted backward of a variant: a graph of its own, and what belongs around it."""

    def __init__(self, lowered: _lower.Backward) -> None:
        self.lowered = lowered
        self.program = _C.Program(lowered.graph)


def attach(
    backward: Backward,
    written: set[int],
    tensors: list[torch.Tensor],
    values: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Give the results of a replay their place in the autograd graph of the caller.

    Args:
        written: the memory that the call is going to write to.
        tensors: the lifted tensors.
        values: the roots of the forward; returned with those that require grad replaced.
    """
    lowered = backward.lowered
    saved = [values[r] for r in lowered.saved]
    if written:
        # What is saved is the value before the call wrote to it.
        saved = [t.clone() if t.untyped_storage().data_ptr() in written else t for t in saved]
    call = _Call(backward, saved, [values[r] for r in lowered.outputs])
    outputs = _Differentiable.apply(call, *(tensors[i] for i in lowered.wrt))
    values = list(values)
    for root, output in zip(lowered.outputs, outputs):
        values[root] = output
    return values


class _Call:
    """What one call hands to its backward."""

    def __init__(
        self, backward: Backward, saved: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        self.backward = backward
        self.saved = saved
        self.outputs = outputs


class _Differentiable(torch.autograd.Function):
    """A graph whose forward has run, with its extracted backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.backward_half = call.backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.saved)
        ctx.like = [(t.shape, t.dtype) for t in call.outputs]
        outputs = tuple(t.detach() for t in call.outputs)
        call.outputs = []
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "second derivatives (create_graph=True) of an extracted graph: call the program "
                "itself for those"
            )
        backward: Backward = ctx.backward_half
        lowered = backward.lowered
        given = frozenset(k for k, t in enumerate(tangents) if t is not None)
        dense = []
        for tangent, strides, (shape, dtype) in zip(tangents, lowered.strides, ctx.like):
            if tangent is None or tangent.stride() != strides:
                empty = torch.empty_strided(shape, strides, dtype=dtype)
                tangent = empty.zero_() if tangent is None else empty.copy_(tangent)
            dense.append(tangent)
        values = backward.program.run([*ctx.saved_tensors, *dense])
        # No tangent on the way: no gradient, which is not the same as zero.
        return (
            None,
            *(v if reached & given else None for v, reached in zip(values, lowered.reached)),
        )


def spend(spent: list[tuple[int, str]], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Let the roots of `spent` raise an error in their backward: it has run inside the program."""
    if not spent:
        return values
    values = list(values)
    for root, error in spent:
        values[root] = _Spent.apply(values[root], torch.empty(0, requires_grad=True), error)
    return values


class _Spent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, anchor: torch.Tensor, error: str) -> torch.Tensor:
        ctx.error = error
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        raise RuntimeError(ctx.error)
