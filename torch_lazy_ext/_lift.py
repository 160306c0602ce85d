"""Lift: where each eager tensor and each plain value of a program lives.

The recorder lifts any eager tensor that reaches an operator, by identity. What it cannot know is
how the program came to that tensor. `State` walks what the program can reach (its modules, the
objects they hold, closures, globals and default arguments) and remembers for each tensor the
dictionary, list or cell that holds it: a replay looks there, and so sees `load_state_dict`,
`p.data = ...` and a replaced `Parameter`. It also knows what those containers held before the
program ran, so that what the program did to them can be taken back, and done again by a replay.
"""

from __future__ import annotations

import collections
import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torch_lazy_ext import _tree


class _Missing:
    def __repr__(self) -> str:
        return "<nothing>"

    def __deepcopy__(self, memo: Any) -> _Missing:
        return self


MISSING = _Missing()


class Slot:
    """One place that holds a value: `owner[key]`, an attribute in a `__slots__`, or a cell.

    Attributes:
        name: the path to it from the program, for texts.
    """

    __slots__ = ("key", "name", "owner")

    def __init__(self, owner: Any, key: Any, name: str) -> None:
        self.owner = owner
        self.key = key
        self.name = name

    def read(self) -> Any:
        """What is there now, or `MISSING`."""
        owner = self.owner
        if isinstance(owner, dict):
            # Not the method: a subclass may give it another meaning.
            return dict.get(owner, self.key, MISSING)
        if isinstance(owner, types.CellType):
            try:
                return owner.cell_contents
            except ValueError:
                return MISSING
        if isinstance(owner, (list, tuple, collections.deque)):
            try:
                return owner[self.key]
            except IndexError:
                return MISSING
        return getattr(owner, self.key, MISSING)

    def write(self, value: Any) -> None:
        """Put `value` there, or nothing when it is `MISSING`."""
        owner = self.owner
        if isinstance(owner, dict):
            base = collections.OrderedDict if isinstance(owner, collections.OrderedDict) else dict
            if value is not MISSING:
                base.__setitem__(owner, self.key, value)
            elif dict.__contains__(owner, self.key):
                base.__delitem__(owner, self.key)
        elif isinstance(owner, types.CellType):
            if value is MISSING:
                del owner.cell_contents
            else:
                owner.cell_contents = value
        elif isinstance(owner, (list, collections.deque)):
            owner[self.key] = value
        elif value is MISSING:
            object.__delattr__(owner, self.key)
        else:
            object.__setattr__(owner, self.key, value)

    def __repr__(self) -> str:
        return f"Slot({self.name})"


class NumberSlot(Slot):
    """A float among the hyperparameters of an optimizer: `owner[key]`, or one of a tuple there.

    Reads as a 0-dim tensor of float64, since that is what the inputs of a graph are.
    """

    __slots__ = ("element",)

    def __init__(self, owner: Any, key: Any, name: str, element: int | None = None) -> None:
        super().__init__(owner, key, name)
        self.element = element

    def place(self) -> Slot:
        """The slot of the float, or of the tuple with the float."""
        return Slot(self.owner, self.key, self.name)

    def read(self) -> Any:
        value = super().read()
        if self.element is not None:
            known = type(value) is tuple and len(value) > self.element
            value = value[self.element] if known else MISSING
        if type(value) is not float:
            return MISSING
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


# Objects of torch that hold tensors and are neither modules nor containers.
OBJECTS_OF_TORCH = (
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
    torch.quasirandom.SobolEngine,
)
CONTENT = object()  # as a key: everything in a list


class Change:
    """A slot that the program wrote, or a list it changed (`key` is `CONTENT`)."""

    __slots__ = ("key", "owner", "value")

    def __init__(self, owner: Any, key: Any, value: Any) -> None:
        self.owner = owner
        self.key = key
        self.value = value


class State:
    """What a callable can reach, and what it held when the walk was made.

    Attributes:
        tensors: id of a tensor -> the tensor and the slots that hold it.
        modules: every `nn.Module` found, in order of discovery.
        values: slots of everything else, with what they held.
        numbers: slots of floats that become inputs of the graph: of hyperparameters, with what
            they held and a tensor for each float.
        containers: the mutable containers, each with its content: `{key: value}` or a list.
        unsized: ids of containers that may grow between the calls.
        names: the attributes and globals that functions of the program name.
        functions: the program's functions, and partials of them.
    """

    def __init__(self, *roots: Any) -> None:
        self.tensors: dict[int, tuple[torch.Tensor, list[Slot]]] = {}
        self.modules: list[nn.Module] = []
        self.values: list[tuple[Slot, Any]] = []
        self.numbers: list[tuple[Slot, Any, list[torch.Tensor]]] = []
        self.containers: list[tuple[Any, Any]] = []
        self.unsized: set[int] = set()
        self.functions: list[types.FunctionType | functools.partial[Any]] = []
        self._groups: set[int] = set()  # ids of the param_groups of optimizers
        self._put: dict[tuple[int, Any], Any] = {}  # what stands in the place of numbers
        self._seen: dict[int, Any] = {}
        self._methods: dict[type, dict[str, types.FunctionType]] = {}
        # Attributes that functions of the program name, and what PyTorch itself calls.
        self.names = {"forward", "__call__", "__torch_function__"}
        self._single: list[tuple[Slot, Any]] = []  # cells, globals, attributes in slots
        for root in roots:
            self.walk(root)

    def knows(self, value: Any) -> bool:
        """Whether this very object was there before the program ran."""
        return self._seen.get(id(value)) is value

    def slots_of(self, tensor: torch.Tensor) -> list[Slot]:
        found = self.tensors.get(id(tensor))
        return [] if found is None else found[1]

    # ------------------------------------------------------------------ changes

    def put_numbers(self, make: Callable[[torch.Tensor], Any]) -> None:
        """Put `make(tensor)` in the place of each float that is an input, until `take_back`."""
        for slot, value, tensors in self.numbers:
            made = [make(t) for t in tensors]
            new = tuple(made) if isinstance(value, tuple) else made[0]
            self._put[id(slot.owner), slot.key] = new
            slot.write(new)

    def take_back(self) -> list[Change]:
        """Undo what was done to the containers since the walk, and say what it was."""
        changes = [
            change
            for change in self._take_back()
            if self._put.get((id(change.owner), change.key), self) is not change.value
        ]
        self._put.clear()
        return changes

    def _take_back(self) -> list[Change]:
        changes: list[Change] = []
        for container, before in self.containers:
            if isinstance(container, dict):
                changes.extend(_restore_dict(container, before))
            elif len(container) != len(before) or any(
                a is not b for a, b in zip(container, before)
            ):
                changes.append(Change(container, CONTENT, list(container)))
                container.clear()
                container.extend(before)
        for slot, before in self._single:
            now = slot.read()
            if now is not before:
                changes.append(Change(slot.owner, slot.key, now))
                slot.write(before)
        return changes

    # --------------------------------------------------------------------- walk

    def walk(self, root: Any) -> None:
        """Add what `root` can reach."""
        stack: list[tuple[Any, str]] = [(root, "")]
        while stack:
            value, name = stack.pop()
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            stack.extend(reversed(list(self._children(value, name))))

    def _children(self, value: Any, name: str) -> Iterator[tuple[Any, str]]:
        if isinstance(value, functools.partial):
            self.functions.append(value)
            yield value.func, name
            yield from self._items(value.args, name)
            yield from self._items(value.keywords, name)
        elif isinstance(value, types.MethodType):
            yield value.__self__, "self"
            yield value.__func__, name
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, name)
        elif isinstance(value, nn.Module):
            self.modules.append(value)
            yield from self._items(value.__dict__, name)
            yield from self._class(type(value), name)
        elif isinstance(value, OBJECTS_OF_TORCH):
            self._groups.update(map(id, getattr(value, "param_groups", ())))
            if isinstance(value, torch.optim.Optimizer) and not hasattr(value, "_opt_called"):
                # A scheduler makes the first step leave this note, which no step reads.
                self.unsized.add(id(value.__dict__))
            yield from self._items(value.__dict__, name)
        elif isinstance(value, (dict, list, tuple, collections.deque)):
            if len(value) <= 10_000:
                yield from self._items(value, name)
            if hasattr(value, "__dict__"):
                yield from self._items(value.__dict__, name)
        elif _tree.parts(value) is not None:
            own = getattr(value, "__dict__", None)
            if own is not None:
                yield from self._items(own, name)
            for key in _tree._attributes(value):
                if own is None or key not in own:
                    yield from self._slot(Slot(value, key, _join(name, key)), single=True)
            yield from self._class(type(value), name)

    def _class(self, cls: type, name: str) -> Iterator[tuple[Any, str]]:
        """The methods of a class that some function of the program may call, by their names."""
        if cls in self._methods:
            return
        methods: dict[str, types.FunctionType] = {}
        for base in reversed(cls.__mro__):
            if not _is_library(base):
                found = vars(base).items()
                methods.update((k, v) for k, v in found if isinstance(v, types.FunctionType))
        self._methods[cls] = methods
        yield from ((m, name) for k, m in methods.items() if k in self.names)

    def _function(self, fn: types.FunctionType, name: str) -> Iterator[tuple[Any, str]]:
        if _is_library(fn):
            return
        self.functions.append(fn)
        for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
            yield from self._slot(Slot(cell, None, key), single=True)
        for default in fn.__defaults__ or ():
            yield default, name
        if fn.__kwdefaults__:
            yield from self._items(fn.__kwdefaults__, name)
        global_names, written, names = _names(fn.__code__)
        for key in global_names:
            if key in fn.__globals__ or key in written:
                yield from self._slot(Slot(fn.__globals__, key, key), single=True)
        for key in names - self.names:
            self.names.add(key)
            yield from ((m[key], name) for m in self._methods.values() if key in m)

    def _items(self, owner: Any, name: str) -> Iterator[tuple[Any, str]]:
        if isinstance(owner, dict):
            items = _tree.items_of(owner)
            self.containers.append((owner, items))
            for i, key in enumerate(items):
                # The state of an optimizer has its parameters as keys.
                label = i if isinstance(key, torch.Tensor) else key
                yield from self._slot(Slot(owner, key, _join(name, label)))
            return
        values = list(owner)
        if not isinstance(owner, tuple):
            self.containers.append((owner, values))
        for key in range(len(values)):
            yield from self._slot(Slot(owner, key, _join(name, key)))

    def _slot(self, slot: Slot, single: bool = False) -> Iterator[tuple[Any, str]]:
        value = slot.read()
        if single:
            self._single.append((slot, value))
        if isinstance(value, torch.Tensor):
            self.tensors.setdefault(id(value), (value, []))[1].append(slot)
            return
        if id(slot.owner) in self._groups and self._number(slot, value):
            return
        self.values.append((slot, value))
        if type(value) not in _tree.SIMPLE_TYPES:
            name = slot.name
            # `net._modules.layer` is `net.layer` to the user.
            for part in ("_modules.", "_parameters.", "_buffers."):
                name = name.replace(part, "")
            yield value, name

    def _number(self, slot: Slot, value: Any) -> bool:
        """Whether a hyperparameter is a float or a tuple of floats, which it then notes."""
        if type(value) is float:
            slots = [NumberSlot(slot.owner, slot.key, slot.name)]
        elif type(value) is tuple and value and all(type(v) is float for v in value):
            slots = [
                NumberSlot(slot.owner, slot.key, f"{slot.name}.{i}", i) for i in range(len(value))
            ]
        else:
            return False
        tensors = [s.read() for s in slots]
        self.numbers.append((slot, value, tensors))
        for s, tensor in zip(slots, tensors):
            self.tensors[id(tensor)] = (tensor, [s])
        return True


def _restore_dict(container: dict[Any, Any], before: dict[Any, Any]) -> Iterator[Change]:
    now = _tree.items_of(container)
    # By identity: parameters are keys of an optimizer's state.
    same_order = all(a is b for a, b in zip(now, before))
    if len(now) == len(before) and same_order and all(now[k] is v for k, v in before.items()):
        return
    for key in before:
        if key not in now:
            yield Change(container, key, MISSING)
    # A key that was deleted and set again has moved to the end.
    kept = [key for key in before if key in now]
    moved = False
    for position, (key, value) in enumerate(now.items()):
        moved = moved or (position < len(kept) and key is not kept[position])
        if moved and key in before:
            yield Change(container, key, MISSING)
        if moved or key not in before or before[key] is not value:
            yield Change(container, key, value)
    base: Any = collections.OrderedDict if isinstance(container, collections.OrderedDict) else dict
    base.clear(container)
    for key, value in before.items():
        base.__setitem__(container, key, value)


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


@functools.cache
def _names(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Globals that a function reads or writes, those it writes, and all names it uses."""
    read: dict[str, None] = {}
    written: set[str] = set()
    extended = 0
    for op, arg in zip(code.co_code[::2], code.co_code[1::2]):
        arg |= extended << 8
        if op == dis.EXTENDED_ARG:
            extended = arg
            continue
        extended = 0
        if op == _LOAD_GLOBAL:
            read[code.co_names[arg >> _LOAD_GLOBAL_SHIFT]] = None
        elif op == _LOAD_NAME:
            read[code.co_names[arg]] = None
        elif op == _STORE_GLOBAL:
            read[code.co_names[arg]] = None
            written.add(code.co_names[arg])
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner_read, inner_written, inner_names = _names(const)
            read.update(dict.fromkeys(inner_read))
            written |= inner_written
            names |= inner_names
    return tuple(read), frozenset(written), frozenset(names)


_LOAD_GLOBAL = dis.opmap["LOAD_GLOBAL"]
_LOAD_GLOBAL_SHIFT = 1 if sys.version_info >= (3, 11) else 0  # the low bit says "for a call"
_LOAD_NAME = dis.opmap["LOAD_NAME"]
_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]


def _is_library(thing: Callable[..., Any] | type) -> bool:
    root = (thing.__module__ or "").partition(".")[0]
    return root in ("torch", "torch_lazy_ext", "builtins")
