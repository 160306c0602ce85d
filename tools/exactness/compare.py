"""Compare: two results of one operator, to the bit, to rounding, or not at all."""

from __future__ import annotations

import dataclasses
import math

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass
class Difference:
    """How far two tensors are apart.

    Attributes:
        wrong: what must never differ and does: dtype, shape, an integer, NaN or not, an infinity,
            the sign of a zero. Empty if nothing of it does.
        ulps: the largest distance of two finite numbers, counted in numbers of their dtype.
        error: the same relative to the largest finite number of the result, in units of the
            dtype's precision: how far sums in different orders are apart.
    """

    wrong: str = ""
    ulps: int = 0
    error: float = 0.0


def compare(eager: torch.Tensor, ours: torch.Tensor) -> Difference:
    if (eager.dtype, eager.shape) != (ours.dtype, ours.shape):
        return Difference(f"{eager.dtype}{list(eager.shape)} / {ours.dtype}{list(ours.shape)}")
    if not eager.is_floating_point():
        return Difference(_first(eager, ours, eager != ours, "integers"))
    zeros = (eager == 0) & (ours == 0)
    for what, differs in (
        ("NaN", eager.isnan() != ours.isnan()),
        ("infinities", (eager.isinf() | ours.isinf()) & (eager != ours) & ~eager.isnan()),
        ("signs of zeros", zeros & (eager.signbit() != ours.signbit())),
    ):
        if bool(differs.any()):
            return Difference(_first(eager, ours, differs, what))
    finite = eager.isfinite()
    a, b = eager[finite], ours[finite]
    tiny = torch.finfo(a.dtype).tiny
    normal = (a.abs() >= tiny) | (b.abs() >= tiny)  # denormals are flushed by some kernels
    a, b = a[normal], b[normal]
    if a.numel() == 0:
        return Difference()
    largest = float(a.abs().max())
    apart = float((a.double() - b.double()).abs().max())
    unit = torch.finfo(a.dtype).eps * max(largest, torch.finfo(a.dtype).tiny)
    return Difference("", distance(a, b), apart / unit if math.isfinite(apart) else math.inf)


def distance(a: torch.Tensor, b: torch.Tensor) -> int:
    """The most numbers that lie between two finite ones, with -0.0 as 0.0."""

    def ordered(t: torch.Tensor) -> torch.Tensor:
        bits = t.contiguous().view(_INTEGERS[t.itemsize]).long()
        top = 1 << (8 * t.itemsize - 1)
        magnitude = bits & (top - 1)
        return torch.where(bits < 0, -magnitude, magnitude)

    return int((ordered(a) - ordered(b)).abs().max()) if a.numel() else 0


def _first(eager: torch.Tensor, ours: torch.Tensor, differs: torch.Tensor, what: str) -> str:
    if not bool(differs.any()):
        return ""
    where = tuple(differs.nonzero()[0].tolist())
    return f"{what}: {eager[where].item()} / {ours[where].item()} at {where}, {int(differs.sum())}x"
