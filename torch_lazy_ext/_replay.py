"""Replay: a specialization is one captured variant; a CompiledGraph keeps several and picks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_lazy_ext import _C, _clean, _lift, _lower, _record, _text
from torch_lazy_ext._errors import UnsupportedError

MISMATCH = object()


def _same(a: Any, b: Any) -> bool:
    """Equality of Python values as a program can tell them apart: 1, 1.0 and True differ."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    try:
        return bool(a == b)
    except Exception:  # a foreign __eq__ may raise anything; then only identity counts
        return False


class _TensorGuard:
    __slots__ = ("dtype", "shape", "stride", "requires_grad", "device", "conj", "neg", "kind")

    def __init__(self, t: torch.Tensor) -> None:
        self.dtype = t.dtype
        self.shape = t.shape
        self.stride = t.stride()
        self.requires_grad = t.requires_grad
        self.device = t.device
        self.conj = t.is_conj()
        self.neg = t.is_neg()
        self.kind = type(t)

    def check(self, t: Any) -> bool:
        return (
            type(t) is self.kind
            and t.dtype == self.dtype
            and t.shape == self.shape
            and t.stride() == self.stride
            and t.requires_grad == self.requires_grad
            and t.device == self.device
            and t.is_conj() == self.conj
            and t.is_neg() == self.neg
        )


class Specialization:
    """One variant of a program: its graph, what it reads, and when it may be used."""

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], treespec: pytree.TreeSpec) -> None:
        index = _lift.StateIndex(fn)
        recording = _record.record(fn, leaves, treespec, index.modules)
        lowered = _lower.lower(recording)
        _clean.clean(lowered.graph)
        self.lowered = lowered
        self.treespec = treespec
        self.hits = 0
        self.misses = 0
        self.grad_enabled = torch.is_grad_enabled()
        self.program = _C.Program(lowered.graph)

        position: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                position.setdefault(id(leaf), i)
        self.leaf_guards = [
            _TensorGuard(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves
        ]
        self.leaf_values = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        # Which arguments are one tensor object matters: the program saw them so.
        self.duplicates = tuple(
            position[id(leaf)] if isinstance(leaf, torch.Tensor) else -1 for leaf in leaves
        )
        self.value_guards = list(index.values)

        # How to come by each lifted tensor at a call.
        self.getters: list[Any] = []
        self.state_guards: list[tuple[_lift.Slot, _TensorGuard]] = []
        for tensor, _twin, constant, _node in lowered.lifted:
            if id(tensor) in position and not constant:
                self.getters.append(position[id(tensor)])
                continue
            slot = None if constant else index.slot_of(tensor)
            if slot is None:
                self.getters.append(tensor)
            else:
                self.getters.append(slot)
                self.state_guards.append((slot, _TensorGuard(tensor)))
        self._check_supported()

    def _check_supported(self) -> None:
        storages: dict[int, list[int]] = {}
        for i, (tensor, _twin, constant, _node) in enumerate(self.lowered.lifted):
            if not constant and tensor.numel() > 0:
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(i)
        for index, _root in self.lowered.writes:
            tensor = self.lowered.lifted[index][0]
            others = storages.get(tensor.untyped_storage().data_ptr(), [])
            if len(others) > 1:
                raise UnsupportedError(
                    "the program mutates a tensor that shares its memory with another one it "
                    "reads: pass one of them and derive the other inside the program"
                )

    def matches(self, leaves: list[Any], treespec: pytree.TreeSpec) -> bool:
        if treespec != self.treespec or torch.is_grad_enabled() != self.grad_enabled:
            return False
        for leaf, guard, value in zip(leaves, self.leaf_guards, self.leaf_values):
            if guard is not None:
                if not guard.check(leaf):
                    return False
            elif not _same(leaf, value):
                return False
        position: dict[int, int] = {}
        for i, (leaf, first) in enumerate(zip(leaves, self.duplicates)):
            if first >= 0 and position.setdefault(id(leaf), i) != first:
                return False
        for slot, value in self.value_guards:
            if not _same(slot.read(), value):
                return False
        return all(guard.check(slot.read()) for slot, guard in self.state_guards)

    def run(self, leaves: list[Any]) -> Any:
        """The program's result on `leaves`, or `MISMATCH` when its data took another way."""
        lowered = self.lowered
        tensors = [
            leaves[g] if type(g) is int else g.read() if type(g) is _lift.Slot else g
            for g in self.getters
        ]
        rng_state = torch.get_rng_state() if lowered.guards else None
        try:
            values = self.program.run([tensors[i] for i in lowered.parameters])
        except RuntimeError:
            # The program itself decides whether this is its error.
            self.misses += 1
            if rng_state is not None:
                torch.set_rng_state(rng_state)
            return MISMATCH
        for guard in lowered.guards:
            value = values[guard.root]
            holds = (
                _equal_values(value, guard.expected)
                if guard.is_value
                else list(value.shape) == guard.expected
            )
            if not holds:
                self.misses += 1
                torch.set_rng_state(rng_state)
                return MISMATCH
        self.hits += 1
        with torch.no_grad():
            for index, root in lowered.writes:
                tensors[index].copy_(values[root])
        taken: dict[int, torch.Tensor] = {}
        constants: dict[int, torch.Tensor] = {}
        take = functools.partial(self._take, tensors, values, constants)
        result = pytree.tree_unflatten([take(s) for s in lowered.outputs], lowered.out_spec)
        for owner, key, source in lowered.effects:
            if source is None:
                owner.pop(key, None)
            else:
                owner[key] = take(source)
        del taken
        return result

    def _take(
        self,
        tensors: list[torch.Tensor],
        values: list[torch.Tensor],
        constants: dict[int, torch.Tensor],
        source: _lower.Source,
    ) -> Any:
        if isinstance(source, _lower.FromRoot):
            return values[source.root]
        if isinstance(source, _lower.Constant):
            return source.value
        if isinstance(source, _lower.FromLifted):
            return tensors[source.index]
        if isinstance(source, _lower.FromView):
            base = self._take(tensors, values, constants, source.base)
            return source.views.apply(base)
        base = constants.setdefault(source.index, tensors[source.index].clone())
        return source.views.apply(base) if len(source.views) else base


def _equal_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(
        torch.equal(torch.isnan(a), torch.isnan(b)) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


class CompiledGraph:
    """A callable that replays the compiled graph of a program.

    Called like the program it was made from; captures again when what the capture relied on
    (shapes, dtypes, Python values, data the program branched on) differs, and keeps the variants.

    Args:
        fn: the program.
        limit: how many variants are kept; the least recently used one goes first.
    """

    def __init__(self, fn: Callable[..., Any], *, limit: int = 32) -> None:
        self._fn = fn
        self._limit = limit
        self._specializations: list[Specialization] = []  # most recently used first
        functools.update_wrapper(self, fn, updated=()) if not isinstance(fn, nn.Module) else None

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Specialization:
        leaves, treespec = pytree.tree_flatten((args, kwargs))
        specialization = Specialization(self._fn, leaves, treespec)
        self._specializations.insert(0, specialization)
        del self._specializations[self._limit :]
        return specialization

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _C.capturing():
            return self._fn(*args, **kwargs)
        leaves, treespec = pytree.tree_flatten((args, kwargs))
        for specialization in list(self._specializations):
            if specialization.matches(leaves, treespec):
                result = specialization.run(leaves)
                if result is not MISMATCH:
                    if self._specializations[0] is not specialization:
                        self._specializations.remove(specialization)
                        self._specializations.insert(0, specialization)
                    return result
        result = self._capture(args, kwargs).run(leaves)
        if result is MISMATCH:
            return self._fn(*args, **kwargs)
        return result

    @property
    def specializations(self) -> list[Specialization]:
        """The captured variants, most recently used first."""
        return list(self._specializations)

    @property
    def graph(self) -> torch._C.Graph:
        """The TorchScript graph of the most recently used variant."""
        return self._specializations[0].lowered.graph

    def graph_text(self, *, source: bool = False) -> str:
        """The graph as text that is the same from run to run.

        Args:
            source: show the user's source line behind each operator.
        """
        return _text.graph_text(self._specializations[0].lowered.graph, source=source)
