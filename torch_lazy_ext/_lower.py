"""Lower: from a recording to roots, and from roots to a TorchScript graph.

The roots of a graph are, in this order: the new value of every lifted tensor that the program
mutated, the values of its results, the values it assigned to attributes, and the guards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torch_lazy_ext import _C
from torch_lazy_ext._errors import UnsupportedError
from torch_lazy_ext._record import DELETED, Recording


@dataclasses.dataclass
class FromLifted:
    """A result that is a lifted tensor itself."""

    index: int


@dataclasses.dataclass
class FromRoot:
    """A result that is an output of the graph."""

    root: int
    requires_grad: bool = False


@dataclasses.dataclass
class FromView:
    """A result that shares memory with a lifted tensor or with another result."""

    base: FromLifted | FromRoot
    views: _C.ViewSequence


@dataclasses.dataclass
class FromConstant:
    """A result over memory that the program made from Python data: a new copy on each call."""

    index: int
    views: _C.ViewSequence


@dataclasses.dataclass
class Constant:
    """A result that is not a tensor."""

    value: Any


Source = FromLifted | FromRoot | FromView | FromConstant | Constant


@dataclasses.dataclass
class ValueGuard:
    root: int
    expected: Any  # a tensor, or a list of sizes
    is_value: bool
    source: str


@dataclasses.dataclass
class Lowered:
    graph: torch._C.Graph
    parameters: list[int]  # for each graph input, the index of the lifted tensor
    lifted: list[tuple[torch.Tensor, torch.Tensor, bool, int]]
    writes: list[tuple[int, int]]  # (lifted index, root): the new value of a mutated tensor
    outputs: list[Source]
    out_spec: pytree.TreeSpec
    effects: list[tuple[dict[str, Any], str, Source | None]]
    guards: list[ValueGuard]
    recorder: _C.Recorder


class _Roots:
    def __init__(self) -> None:
        self.values: list[_C.ValueRef] = []
        self._index: dict[_C.ValueRef, int] = {}

    def add(self, value: _C.ValueRef) -> int:
        if value not in self._index:
            self._index[value] = len(self.values)
            self.values.append(value)
        return self._index[value]


def lower(recording: Recording) -> Lowered:
    """Choose the roots of a recording and lower them to one graph."""
    recorder = recording.recorder
    leaves, out_spec = pytree.tree_flatten(recording.result)
    lifted = recorder.lifted()
    roots = _Roots()

    writes = []
    for index, (tensor, twin, constant, _node) in enumerate(lifted):
        about = recorder.describe(twin)
        if about.storage_changed or (about.metadata_mutated and not constant):
            raise UnsupportedError(
                f"the program changes the shape or the storage of a tensor of shape "
                f"{tuple(tensor.shape)} that it was given (set_, resize_, t_, squeeze_, ...): use "
                "the out-of-place operator and return the result"
            )
        if about.mutated and not constant:
            writes.append((index, roots.add(about.value)))

    # How many results, and which, share the memory of a storage that was mutated.
    sources = _Sources(recorder, lifted, roots)
    assigned = [e.value for e in recording.effects if e.value is not DELETED]
    assigned_leaves = [pytree.tree_flatten(v) for v in assigned]
    everything = leaves + [leaf for flat, _ in assigned_leaves for leaf in flat]
    sources.count(everything)
    outputs = [sources.of(leaf) for leaf in leaves]
    effects: list[tuple[dict[str, Any], str, Source | None]] = []
    for effect in recording.effects:
        if effect.value is DELETED:
            effects.append((effect.owner, effect.key, None))
        else:
            effects.append((effect.owner, effect.key, sources.of(effect.value)))

    guards = [
        ValueGuard(roots.add(value), expected, is_value, source)
        for value, expected, is_value, source in recorder.guards()
    ]
    graph, parameters = _C.lower(recorder, roots.values)
    return Lowered(
        graph, parameters, lifted, writes, outputs, out_spec, effects, guards, recorder
    )


class _Sources:
    """Says for each result of the program where a replay takes it from."""

    def __init__(self, recorder: _C.Recorder, lifted: list[Any], roots: _Roots) -> None:
        self.recorder = recorder
        self.lifted = lifted
        self.roots = roots
        self.sharing: dict[int, int] = {}

    def count(self, leaves: list[Any]) -> None:
        seen: set[int] = set()
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in seen:
                seen.add(id(leaf))
                about = self.recorder.describe(leaf)
                if about.captured:
                    self.sharing[about.storage] = self.sharing.get(about.storage, 0) + 1

    def of(self, leaf: Any) -> Source:
        if not isinstance(leaf, torch.Tensor):
            return Constant(leaf)
        about = self.recorder.describe(leaf)
        if not about.captured:
            # An eager tensor that met no operator (a parameter returned as it is).
            self.recorder.lift(leaf)
            self.lifted[:] = self.recorder.lifted()
            about = self.recorder.describe(leaf)
        base = about.base_lifted
        if base >= 0 and self.lifted[base][2]:
            if not about.mutated:
                return FromConstant(base, about.views)
        elif about.lifted >= 0:
            return FromLifted(about.lifted)
        elif base >= 0 and about.mutated:
            return FromView(FromLifted(base), about.views)
        if about.mutated and self.sharing.get(about.storage, 0) > 1:
            root = self.roots.add(self.recorder.base_value(leaf))
            return FromView(FromRoot(root), about.views)
        return FromRoot(self.roots.add(about.value), about.requires_grad)
