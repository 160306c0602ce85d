"""Lift: where each eager tensor of a program lives, so that a replay reads it again.

The recorder lifts any eager tensor that reaches an operator, by identity. What it cannot know is
how the program came to that tensor. `StateIndex` walks what the program can reach (its module
tree, closure, globals and default arguments) and remembers for each tensor the dictionary, list or
cell that holds it: a replay looks there, and so sees `load_state_dict`, `p.data = ...` and a
replaced `Parameter`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Values compared with == between calls. Everything else a program reads is either walked into
# or held by identity.
SIMPLE_TYPES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Slot:
    """One place that holds a value: `owner[key]`, or a closure cell.

    `read()` returns what is there now, or `MISSING`.
    """

    __slots__ = ("owner", "key", "name")

    MISSING = object()

    def __init__(self, owner: Any, key: Any, name: str) -> None:
        self.owner = owner
        self.key = key
        self.name = name

    def read(self) -> Any:
        owner = self.owner
        if isinstance(owner, dict):
            # Not the method: a subclass may give it another meaning.
            return dict.get(owner, self.key, Slot.MISSING)
        if isinstance(owner, types.CellType):
            try:
                return owner.cell_contents
            except ValueError:
                return Slot.MISSING
        try:
            return owner[self.key]
        except IndexError:
            return Slot.MISSING

    def __repr__(self) -> str:
        return f"Slot({self.name})"


class StateIndex:
    """The tensors, plain values and module dictionaries that a callable can reach.

    Attributes:
        tensors: id of a tensor -> its `Slot`, for tensors found on the walk.
        values: slots of plain Python values, with the value found.
        modules: every `nn.Module` found, in order of discovery.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.tensors: dict[int, tuple[torch.Tensor, Slot]] = {}
        self.values: list[tuple[Slot, Any]] = []
        self.modules: list[nn.Module] = []
        self._seen: dict[int, Any] = {}
        self._walk(fn, "")

    def slot_of(self, tensor: torch.Tensor) -> Slot | None:
        found = self.tensors.get(id(tensor))
        return None if found is None else found[1]

    def _walk(self, root: Any, name: str) -> None:
        stack: list[tuple[Any, str]] = [(root, name)]
        while stack:
            value, name = stack.pop()
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            stack.extend(reversed(list(self._children(value, name))))

    def _children(self, value: Any, name: str) -> Iterator[tuple[Any, str]]:
        if isinstance(value, functools.partial):
            yield value.func, name
            yield from self._slots(list(value.args), name)
            yield from self._slots(value.keywords, name)
        elif isinstance(value, types.MethodType):
            yield value.__self__, "self"
            yield value.__func__, name
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, name)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
            for part in ("_parameters", "_buffers"):
                yield from self._slots(value.__dict__[part], name)
            yield from self._slots(
                value.__dict__, name, skip=("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
            )
            for key, child in value.__dict__["_modules"].items():
                if child is not None:
                    yield child, f"{name}.{key}" if name else key
            forward = type(value).forward
            if isinstance(forward, types.FunctionType) and not _is_library(forward):
                yield forward, name
        elif isinstance(value, dict):
            yield from self._slots(value, name)
        elif isinstance(value, (list, tuple)):
            yield from self._slots(value, name)

    def _function(self, fn: types.FunctionType, name: str) -> Iterator[tuple[Any, str]]:
        if _is_library(fn):
            return
        for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
            yield from self._slot(Slot(cell, None, key))
        for default in (fn.__defaults__ or ()):
            yield default, name
        yield from self._slots(fn.__kwdefaults__ or {}, name)
        for key in _global_names(fn.__code__):
            if key in fn.__globals__:
                yield from self._slot(Slot(fn.__globals__, key, key))

    def _slots(self, owner: Any, name: str, skip: tuple[str, ...] = ()) -> Iterator[tuple[Any, str]]:
        items = list(owner.items()) if isinstance(owner, dict) else list(enumerate(owner))
        for key, _ in items:
            if key not in skip:
                yield from self._slot(Slot(owner, key, f"{name}.{key}" if name else str(key)))

    def _slot(self, slot: Slot) -> Iterator[tuple[Any, str]]:
        value = slot.read()
        if isinstance(value, torch.Tensor):
            self.tensors.setdefault(id(value), (value, slot))
        elif isinstance(value, SIMPLE_TYPES):
            self.values.append((slot, value))
        elif isinstance(
            value, (nn.Module, dict, list, tuple, types.FunctionType, types.MethodType, functools.partial)
        ):
            yield value, slot.name


@functools.lru_cache(maxsize=None)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = dict.fromkeys(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names.update(dict.fromkeys(_global_names(const)))
    return tuple(names)


def _is_library(fn: types.FunctionType) -> bool:
    return (fn.__module__ or "").partition(".")[0] in ("torch", "torch_lazy_ext")
