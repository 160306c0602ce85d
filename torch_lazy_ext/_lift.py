"""Lift: where each eager tensor and each plain value of a program lives.

The recorder lifts any eager tensor that reaches an operator, by identity. What it cannot know is
how the program came to that tensor. `State` walks what the program can reach (its modules, the
objects they hold, closures, globals and default arguments) and remembers for each tensor the
dictionary, list or cell that holds it: a replay looks there, and so sees `load_state_dict`,
`p.data = ...` and a replaced `Parameter`. It also knows what those containers held before the
program ran, so that what the program did to them can be taken back, and done again by a replay.
"""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import gc
import operator
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

from torch_lazy_ext import _code, _tree


class _Missing:
    def __repr__(self) -> str:
        return "<nothing>"

    def __deepcopy__(self, memo: Any) -> _Missing:
        return self


MISSING = _Missing()


class Slot:
    """One place that holds a value: `owner[key]`, an attribute that is in no dictionary, a cell, a
    ContextVar.

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
        if isinstance(owner, type):
            return vars(owner).get(self.key, MISSING)
        if isinstance(owner, contextvars.ContextVar):
            return owner.get(MISSING)
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
        elif isinstance(owner, contextvars.ContextVar):
            owner.set(value)
        elif isinstance(owner, ENVIRONMENT):
            if value is not MISSING:
                owner[self.key] = value
            elif self.key in owner:
                del owner[self.key]
        elif isinstance(owner, (type, threading.local)):
            if value is not MISSING:
                setattr(owner, self.key, value)
            elif self.key in vars(owner):
                delattr(owner, self.key)
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


class AliveSlot(Slot):
    """Whether a weak reference still has its object."""

    __slots__ = ()

    def read(self) -> Any:
        return self.owner() is not None

    def write(self, value: Any) -> None:
        raise TypeError("nothing can be put into a weak reference")


ENVIRONMENT = type(os.environ)
# Containers whose content is a list of items, and that have no attributes of their own.
PLAIN_CONTENTS = (set, bytearray, array.array)
# Classes of the standard library whose instances keep what a program puts into them in attributes.
STRUCTURES_OF_LIBRARY = (collections.ChainMap, collections.UserDict, collections.UserList)
# Hooks that every module runs, by the names of their dictionaries in torch.nn.modules.module.
GLOBAL_HOOKS = tuple(k for k in vars(_module) if k.startswith("_global_") and k.endswith("hooks"))
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
        namespaces: ids of the containers that are the attributes of an object.
        registries: ids of those that are the parameters or buffers of a module.
        objects: what has a class of its own: modules, instances.
        types: the classes of these, and those that the program holds.
        locals: each threading.local.
        arrays: numpy arrays.
        weak: ids of what weak references refer to.
        bare: functions without attributes.
        dynamic: whether it holds something that finds attributes by names of its own.
    """

    def __init__(self, *roots: Any, ran: _code.Ran | None = None) -> None:
        self._ran = ran
        self._roots = roots
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
        self.namespaces: set[int] = set()
        self.registries: set[int] = set()
        self.objects: list[Any] = []
        self.types: dict[type, None] = {}
        self.locals: list[tuple[threading.local, dict[str, Any]]] = []
        self.arrays: list[tuple[Any, str]] = []
        self.dynamic = False
        self.entered: set[int] = set()  # ids of code objects whose globals were looked into
        self._codes: list[types.CodeType] = []  # which these ids are of
        self._environment = dict(_environment())
        # Modules and classes of the program, whose content counts by name: by id the owner, what
        # it held, and whether its functions may be called. By name those that have it.
        self._spaces: dict[int, tuple[Any, dict[str, Any], bool]] = {}
        self._with_name: dict[str, list[tuple[Any, bool]]] = {}
        self.bare: list[types.FunctionType] = []
        self.weak: set[int] = set()
        self._make: Callable[[torch.Tensor], Any] | None = None
        # Attributes that functions of the program name, and what PyTorch itself calls.
        self.names = {"forward", "__call__", "__torch_function__"}
        if ran is not None:
            self.names |= ran.names
            roots += tuple(e.function for e in ran.entries if e.function and not e.library)
        self._single: list[tuple[Slot, Any]] = []  # cells, globals, attributes in slots
        for root in roots:
            self.walk(root)
        if self.modules:
            for name in GLOBAL_HOOKS:
                self.walk(vars(_module)[name], name)

    def knows(self, value: Any) -> bool:
        """Whether this very object was there before the program ran."""
        return self._seen.get(id(value)) is value

    def mutable_ids(self) -> list[int]:
        """The ids of what could be an argument as well: containers and objects."""
        return [id(c) for c, _content in self.containers] + [id(v) for v in self.objects]

    def slots_of(self, tensor: torch.Tensor) -> list[Slot]:
        found = self.tensors.get(id(tensor))
        return [] if found is None else found[1]

    # ------------------------------------------------------------------ changes

    def put_numbers(self, make: Callable[[torch.Tensor], Any]) -> None:
        """Put `make(tensor)` in the place of each float that is an input, until `take_back`."""
        self._make = make
        for slot, value, tensors in self.numbers:
            if (id(slot.owner), slot.key) not in self._put:
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
        self._make = None  # which may hold this
        return changes

    def _take_back(self) -> list[Change]:
        changes: list[Change] = []
        for container, before in self.containers:
            if isinstance(container, dict):
                if before or dict.__len__(container):
                    changes.extend(_restore_dict(container, before))
            elif _tree.differs(container, before):
                changes.append(Change(container, CONTENT, list(container)))
                _tree.refill(container, before)
        for slot, before in self._single:
            now = slot.read()
            if now is not before:
                changes.append(Change(slot.owner, slot.key, now))
                slot.write(before)
        for owner, held, _called in self._spaces.values():
            content = dict(vars(owner))
            if not _same_items(content, held):
                for change in list(_restore_dict(content, held)):
                    slot = Slot(_owner(owner), change.key, "")
                    slot.write(held.get(change.key, MISSING))
                    changes.append(Change(slot.owner, change.key, change.value))
        for fn in self.bare:
            if vars(fn):
                changes.extend(_restore_dict(vars(fn), {}))
        for local, attributes in self.locals:
            for change in list(_restore_dict(vars(local), attributes)):
                changes.append(Change(local, change.key, change.value))
        if self._environment != _environment():
            decode = os.environ.decodekey, os.environ.decodevalue
            for change in list(_restore_dict(dict(_environment()), self._environment)):
                key = decode[0](change.key)
                now = change.value if change.value is MISSING else decode[1](change.value)
                changes.append(Change(os.environ, key, now))
                before = self._environment.get(change.key, MISSING)
                Slot(os.environ, key, "").write(before if before is MISSING else decode[1](before))
        return changes

    # --------------------------------------------------------------------- walk

    def walk(self, root: Any, name: str = "") -> None:
        """Add what `root` can reach; `name` is the path to it."""
        stack: list[tuple[Any, str]] = [(root, name)]
        while stack:
            value, name = stack.pop()
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            stack.extend(reversed(list(self._children(value, name))))

    def _children(self, value: Any, name: str) -> Iterator[tuple[Any, str]]:
        cls = type(value)
        if cls is dict or (cls is collections.OrderedDict and not value.__dict__):
            if len(value) <= _tree.LIMIT:
                yield from self._items(value, name)
        elif cls in _WITHOUT_STATE:
            return
        elif isinstance(value, functools.partial):
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
            self.objects.append(value)
            self.registries.update((id(value._parameters), id(value._buffers)))
            yield from self._attributes(value, name)
            yield from self._class(type(value), name)
        elif isinstance(value, OBJECTS_OF_TORCH):
            self._groups.update(map(id, getattr(value, "param_groups", ())))
            if isinstance(value, torch.optim.Optimizer) and not hasattr(value, "_opt_called"):
                # A scheduler makes the first step leave this note, which no step reads.
                self.unsized.add(id(value.__dict__))
            yield from self._attributes(value, name)
        elif isinstance(value, (dict, list, tuple, collections.deque)):
            if _tree.length(value) <= _tree.LIMIT:
                yield from self._items(value, name)
            own = _tree.own_dict(value)
            if own or (own is not None and not _code.is_library(type(value))):
                self.objects.append(value)
                yield from self._attributes(value, name)
                yield from self._class(type(value), name)
        elif isinstance(value, type):
            yield from self._class(value, name, called=False)
        elif isinstance(value, types.ModuleType):
            if not _code.is_library(value):
                yield from self._space(value, True, name)
        elif isinstance(value, PLAIN_CONTENTS):
            if len(value) <= _tree.LIMIT:
                self.containers.append((value, list(value)))
            if isinstance(value, set):
                yield from ((item, name) for item in value)
        elif isinstance(value, frozenset):
            yield from ((item, name) for item in value)
        elif isinstance(value, types.MappingProxyType):
            yield from ((d, name) for d in gc.get_referents(value))
        elif isinstance(value, weakref.ref):
            self.values.append((AliveSlot(value, None, name), value() is not None))
            self.weak.add(id(value()))
            yield value(), name
        elif isinstance(value, contextvars.ContextVar):
            yield from self._slot(Slot(value, None, name))
        elif isinstance(value, threading.local):
            attributes = dict(vars(value))
            self.locals.append((value, attributes))
            for key in attributes:
                yield from self._slot(Slot(value, key, _join(name, key)))
        elif isinstance(value, (operator.attrgetter, operator.methodcaller)):
            self.dynamic = True
        elif isinstance(value, DESCRIPTORS):
            yield from ((f, name) for f in _functions_of(value))
        elif _tree.is_array(value):
            self.arrays.append((value, name))
        elif isinstance(value, STRUCTURES_OF_LIBRARY):
            self.objects.append(value)
            yield from self._attributes(value, name)
        elif _tree.parts(value) is not None:
            self.objects.append(value)
            own = _tree.own_dict(value)
            if own is not None:
                yield from self._attributes(value, name)
            for key in _tree._attributes(value):
                if own is None or key not in own:
                    yield from self._slot(Slot(value, key, _join(name, key)), single=True)
            yield from self._class(type(value), name)

    def _attributes(self, owner: Any, name: str) -> Iterator[tuple[Any, str]]:
        """What an object holds in its dictionary."""
        self.namespaces.add(id(owner.__dict__))
        yield from self._items(owner.__dict__, name)

    def _space(self, owner: Any, called: bool, name: str) -> Iterator[tuple[Any, str]]:
        """What functions of the program name of a module or a class.

        Args:
            called: whether to look into the functions there; else into all but these, which are
                looked into when they start.
        """
        known = self._spaces.get(id(owner))
        if known is not None and known[2] >= called:
            return
        content = dict(vars(owner)) if known is None else known[1]
        self._spaces[id(owner)] = (owner, content, called)
        if self._ran is None:
            for key in content:
                self._with_name.setdefault(key, []).append((owner, called))
        for key in content.keys() & self.names:
            yield from self._member(owner, key, called, name)

    def _member(self, owner: Any, key: str, called: bool, name: str) -> Iterator[tuple[Any, str]]:
        value = self._spaces[id(owner)][1][key]
        if self._ran is not None and type(value) in _tree.SIMPLE_TYPES:
            return  # guarded by its name
        if key in _DECLARATIONS:
            return
        if not isinstance(value, FUNCTIONS):
            yield from self._slot(Slot(_owner(owner), key, f"{owner.__name__}.{key}"))
        elif called:
            yield value, name

    def _class(self, cls: type, name: str, called: bool = True) -> Iterator[tuple[Any, str]]:
        """What functions of the program may use of a class, by their names."""
        self.types[cls] = None
        for base in cls.__mro__:
            known = self._spaces.get(id(base))
            if (known is None or known[2] < called) and not _code.is_library(base):
                yield from self._space(base, called, name)

    def _function(self, fn: types.FunctionType, name: str) -> Iterator[tuple[Any, str]]:
        if not _code.is_library(fn):
            self.functions.append(fn)
        for key, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ()):
            yield from self._slot(Slot(cell, None, key), single=True)
        if _code.is_library(fn):
            wrapped = vars(fn).get("__wrapped__")
            if wrapped is not None:
                yield wrapped, name
            return
        if self._ran is not None and id(fn.__code__) not in self._ran.codes:
            return
        for i, default in enumerate(fn.__defaults__ or ()):
            if isinstance(default, torch.Tensor):
                yield from self._slot(Slot(fn.__defaults__, i, f"{fn.__name__}.{i}"))
            elif type(default) not in _tree.SIMPLE_TYPES:
                yield default, fn.__name__
        if fn.__kwdefaults__:
            yield from self._items(fn.__kwdefaults__, name)
        if vars(fn):
            self.namespaces.add(id(vars(fn)))
            yield from self._items(vars(fn), fn.__name__)
        else:
            self.bare.append(fn)
        yield from self._global_names(fn.__code__, fn.__globals__, name)

    def _global_names(
        self, code: types.CodeType, space: dict[str, Any], name: str
    ) -> Iterator[tuple[Any, str]]:
        stack = [code]
        while stack:
            inner = stack.pop()
            self.entered.add(id(inner))
            self._codes.append(inner)
            stack += [c for c in inner.co_consts if isinstance(c, types.CodeType)]
        names = _code.names_within(code)
        for key in dict.fromkeys([c[0] for c in names.chains] + sorted(names.stored)):
            if key in space or key in names.stored:
                yield from self._slot(Slot(space, key, key), single=True)
        new = names.all - self.names
        self.names |= new
        for key in new & self._with_name.keys():
            for owner, called in self._with_name[key]:
                yield from self._member(owner, key, called, name)
        for imported in names.imports:
            module = sys.modules.get(imported)
            if module is not None:
                yield module, imported

    def enter(self, code: types.CodeType, fn: types.FunctionType | None, space: Any) -> None:
        """A function of the program starts that the walk may not have come to."""
        if id(code) in self.entered and (fn is None or self.knows(fn) or not fn.__closure__):
            return
        if fn is not None:
            self.walk(fn)
        else:
            for value, name in list(self._global_names(code, space, "")):
                self.walk(value, name)
        if self._make is not None:
            self.put_numbers(self._make)

    def forget(self) -> None:
        """Let go of the objects that were there, which may go while this is still held."""
        self._seen.clear()
        self.objects.clear()

    def reached(self, ran: _code.Ran) -> State:
        """Of the same program, what the code that ran can have reached, by the names in it."""
        return State(*self._roots, ran=ran)

    def _items(self, owner: Any, name: str) -> Iterator[tuple[Any, str]]:
        if isinstance(owner, dict):
            if not dict.__len__(owner):
                self.containers.append((owner, {}))
                return
            items = _tree.items_of(owner)
            if self._ran is not None and id(owner) in self.namespaces:
                items = {k: v for k, v in items.items() if self._ran.may_read(k)}
            self.containers.append((owner, items))
            for i, key in enumerate(items):
                # The state of an optimizer has its parameters as keys.
                label = i if isinstance(key, torch.Tensor) else key
                if type(key) is not str and type(key) not in _tree.SIMPLE_TYPES:
                    self._seen.setdefault(id(key), key)
                yield from self._slot(Slot(owner, key, _join(name, label)))
            return
        values = _tree.list_of(owner)
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
            if value.__dict__ and id(value) not in self._seen:
                self._seen[id(value)] = value
                yield from self._attributes(value, slot.name)
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
    same = len(now) == len(before) and all(map(operator.is_, now, before))
    if same and all(map(operator.is_, now.values(), before.values())):
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


_WITHOUT_STATE: set[type] = {type(int | str), type(list[int]), types.GetSetDescriptorType}
_WITHOUT_STATE |= {types.MemberDescriptorType, types.BuiltinFunctionType, types.CodeType, slice}
# Of a class: what it says of its attributes, and no value of theirs.
_DECLARATIONS = frozenset(("__annotations__", "__dataclass_fields__", "__slots__", "__doc__"))
# What a class holds in the place of functions.
DESCRIPTORS: tuple[type, ...] = (property, classmethod, staticmethod, functools.partialmethod)
DESCRIPTORS += (functools.cached_property,)
FUNCTIONS = (types.FunctionType, *DESCRIPTORS)


def _environment() -> dict[Any, Any]:
    """What `os.environ` keeps, in the encoding of the system."""
    environment: Any = os.environ
    content: dict[Any, Any] = environment._data
    return content


def _same_items(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two dictionaries hold the same objects under the same keys, in one order."""
    return (
        len(a) == len(b)
        and all(map(operator.is_, a.values(), b.values()))
        and all(map(operator.eq, a, b))
    )


def _functions_of(descriptor: Any) -> list[Any]:
    """The functions in a property, a classmethod and their like."""
    names = ("fget", "fset", "fdel", "func", "__func__")
    return [f for name in names if (f := getattr(descriptor, name, None)) is not None]


def _owner(space: Any) -> Any:
    """What stands in a slot for a module or a class."""
    return space.__dict__ if isinstance(space, types.ModuleType) else space
