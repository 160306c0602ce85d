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
import contextlib
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

from torch_lazy_ext import _C, _code, _tree


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
        if isinstance(owner, threading.local):
            return getattr(owner, self.key, MISSING)
        try:
            return object.__getattribute__(owner, self.key)
        except AttributeError:
            return MISSING

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
# By strings and, where the system has bytes, by these; both have one content.
ENVIRONMENTS: tuple[Any, ...] = (os.environ, *([os.environb] if os.supports_bytes_environ else []))
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
# Of a numpy array up to this size a copy is kept while the program is recorded.
LARGEST_COPY = 1 << 24  # bytes


class Change:
    """A slot that the program wrote, or a list it changed (`key` is `CONTENT`)."""

    __slots__ = ("key", "owner", "value")

    def __init__(self, owner: Any, key: Any, value: Any) -> None:
        self.owner = owner
        self.key = key
        self.value = value

    def make(self) -> None:
        """Do it again."""
        if self.key is CONTENT:
            _tree.refill(self.owner, self.value)
        else:
            Slot(self.owner, self.key, "").write(self.value)

    def identity(self) -> tuple[Any, ...]:
        """Equal for two changes that leave the same objects in one place."""
        value = tuple(map(id, self.value)) if self.key is CONTENT else id(self.value)
        return id(self.owner), self.key if isinstance(self.key, str) else id(self.key), value


class _Array:
    """A numpy array that was there before the program, and must be the same after it.

    A large one, and one that refers to objects, is read-only meanwhile.
    """

    def __init__(self, array: Any, name: str) -> None:
        self.name = name
        self.array = array
        self._before: Any = None
        self.is_locked = array.nbytes > LARGEST_COPY or array.dtype.hasobject
        if self.is_locked:
            array.flags.writeable = False
        else:
            self._before = array.copy(order="K")

    def put_back(self) -> bool:
        """Whether the program has written to it."""
        array, before = self.array, self._before
        if self.is_locked:
            array.flags.writeable = True
            return False
        if array.shape == before.shape and array.tobytes() == before.tobytes():
            return False
        if array.shape != before.shape and array.flags.owndata:
            array.resize(before.shape, refcheck=False)
        elif array.shape != before.shape:  # the memory cannot have been resized
            array.shape = before.shape
        sys.modules["numpy"].copyto(array, before)
        return True


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
        attributes: of what the code that ran may have read, the content of each of these, and the
            path to it.
        registries: ids of those that are the parameters or buffers of a module.
        objects: what has a class of its own: modules, instances.
        types: the classes of these, and those that the program holds, each with whether its
            functions may be called.
        locals: each threading.local.
        arrays: numpy arrays.
        weak: ids of what weak references refer to.
        bare: functions without attributes.
        entered_more: called when a function has started that the walk had not come to.
        dynamic: whether it holds something that finds attributes by names of its own.
    """

    def __init__(
        self, *roots: Any, ran: _code.Ran | None = None, before: State | None = None
    ) -> None:
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
        self.attributes: list[tuple[dict[str, Any], str]] = []
        self.registries: set[int] = set()
        self.objects: list[Any] = []
        self.types: dict[type, bool] = {}
        self.locals: list[tuple[threading.local, dict[str, Any]]] = []
        self.arrays: list[tuple[Any, str]] = []
        self._kept_arrays: list[_Array] = []  # those that can be written to
        self.dynamic = False
        self.entered: set[int] = set()  # ids of code objects whose globals were looked into
        self._codes: list[types.CodeType] = []  # which these ids are of
        self._environment = dict(_environment())
        # Modules and classes of the program, whose content counts by name: by id the owner, what
        # it held, and whether its functions may be called. And the names that any of them has.
        self._spaces: dict[int, tuple[Any, dict[str, Any], bool]] = {}
        self._of_spaces: set[str] = set()
        # By id of a module's dictionary, that, and what the globals held that were looked into.
        self._globals: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        # What another walk of the same program has found out: how to look into the objects of a
        # class, the bases of a class that are no library's, and whether a dictionary of globals is
        # a library's, by its id.
        self._looks: dict[type, _Look | None] = {dict: State._look_into_dict}
        self._own_bases: dict[type, tuple[type, ...]] = {}
        self._library_globals: dict[int, bool] = {}
        if before is not None:
            self._looks = before._looks
            self._own_bases = before._own_bases
            self._library_globals = before._library_globals
        self.bare: list[types.FunctionType] = []
        self.entered_more: Callable[[], None] | None = None
        self.weak: set[int] = set()
        self._make: Callable[[torch.Tensor], Any] | None = None
        # Attributes that functions of the program name, and what PyTorch itself calls.
        self.names = {"forward", "__call__", "__torch_function__"}
        self._readable = _code.Readable(frozenset(), False)
        if ran is not None:
            self._readable = ran.readable()
            self.names |= ran.names
            roots += tuple(e.function for e in ran.entries if e.function and not e.library)
        self._single: list[tuple[Slot, Any]] = []  # cells, attributes in slots
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

    @contextlib.contextmanager
    def after(self, changes: list[Change]) -> Iterator[list[Change]]:
        """Meanwhile all is as the program has left it, in a context of its own for ContextVars.

        Args:
            changes: what the program did, and was taken back.

        Yields:
            A list that gets what else was done meanwhile, which is taken back, too.
        """
        further: list[Change] = []
        for change in changes:
            change.make()
        try:
            yield further
        finally:
            own = {change.identity() for change in changes}
            now = self.take_back()
            found = {change.identity() for change in now}
            further += [c for c in now if c.identity() not in own]
            # What was set back to what it was before the program is a change, too.
            further += [
                c
                for c in changes
                if c.identity() not in found and not isinstance(c.owner, contextvars.ContextVar)
            ]

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
        for space, globals_ in self._globals.values():
            for key, before in globals_.items():
                now = space.get(key, MISSING)
                if now is not before:
                    changes.append(Change(space, key, now))
                    Slot(space, key, "").write(before)
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
        for tensor, _slots in self.tensors.values():
            if tensor.__dict__ and id(tensor.__dict__) not in self.namespaces:
                changes.extend(_restore_dict(tensor.__dict__, {}))
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
        self._walk([(root, name)])

    def _walk(self, stack: _Found) -> None:
        seen = self._seen
        found: _Found = []
        while stack:
            value, name = stack.pop()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            look = self._look_of(type(value), value)
            if look is not None:
                look(self, value, name, found)
                found.reverse()  # the first is looked into first
                stack += found
                found.clear()

    def _look_of(self, cls: type, value: Any) -> _Look | None:
        """How to look into an object of a class; None where it holds nothing."""
        try:
            return self._looks[cls]
        except KeyError:
            pass
        if cls in weakref.ProxyTypes:
            with contextlib.suppress(ReferenceError):
                return self._look_of(value.__class__, value)
            return None
        look = self._looks[cls] = _look_of(cls, value)
        return look

    def _look_into_dict(self, value: dict[Any, Any], name: str, found: _Found) -> None:
        if len(value) <= _tree.LIMIT:
            self._items(value, name, found)

    def _look_into_ordered_dict(self, value: Any, name: str, found: _Found) -> None:
        if value.__dict__:
            self._look_into_container(value, name, found)
        else:
            self._look_into_dict(value, name, found)

    def _look_into_partial(self, value: functools.partial[Any], name: str, found: _Found) -> None:
        self.functions.append(value)
        found.append((value.func, name))
        self._items(value.args, name, found)
        self._items(value.keywords, name, found)

    def _look_into_method(self, value: types.MethodType, name: str, found: _Found) -> None:
        found.append((value.__self__, "self"))
        found.append((value.__func__, name))

    def _look_into_module(self, value: nn.Module, name: str, found: _Found) -> None:
        self.modules.append(value)
        self.objects.append(value)
        self.registries.update((id(value._parameters), id(value._buffers)))
        self._attributes(value.__dict__, name, found)
        self._class(type(value), name, found)

    def _look_into_object_of_torch(self, value: Any, name: str, found: _Found) -> None:
        self._groups.update(map(id, getattr(value, "param_groups", ())))
        if isinstance(value, torch.optim.Optimizer) and not hasattr(value, "_opt_called"):
            # A scheduler makes the first step leave this note, which no step reads.
            self.unsized.add(id(value.__dict__))
        self._attributes(value.__dict__, name, found)

    def _look_into_container(self, value: Any, name: str, found: _Found) -> None:
        if _tree.length(value) <= _tree.LIMIT:
            self._items(value, name, found)
        own = _tree.own_dict(value)
        if own or (own is not None and not _code.is_library(type(value))):
            self.objects.append(value)
            self._attributes(value.__dict__, name, found)
            self._class(type(value), name, found)

    def _look_into_class(self, value: type, name: str, found: _Found) -> None:
        self._class(value, name, found, called=False)

    def _look_into_python_module(self, value: types.ModuleType, name: str, found: _Found) -> None:
        if not _code.is_library(value):
            self._space(value, True, name, found)

    def _look_into_content(self, value: Any, name: str, found: _Found) -> None:
        if len(value) <= _tree.LIMIT:
            self.containers.append((value, list(value)))
        if isinstance(value, set):
            found += [(item, name) for item in value]

    def _look_into_frozenset(self, value: frozenset[Any], name: str, found: _Found) -> None:
        found += [(item, name) for item in value]

    def _look_into_proxy(
        self, value: types.MappingProxyType[Any, Any], name: str, found: _Found
    ) -> None:
        found += [(held, name) for held in gc.get_referents(value)]

    def _look_into_reference(self, value: weakref.ref[Any], name: str, found: _Found) -> None:
        self.values.append((AliveSlot(value, None, name), value() is not None))
        self.weak.add(id(value()))
        found.append((value(), name))

    def _look_into_variable(
        self, value: contextvars.ContextVar[Any], name: str, found: _Found
    ) -> None:
        self._slot(Slot(value, None, name), found)

    def _look_into_local(self, value: threading.local, name: str, found: _Found) -> None:
        attributes = dict(vars(value))
        self.locals.append((value, attributes))
        for key in attributes:
            self._slot(Slot(value, key, _join(name, key)), found)

    def _look_into_getter(self, value: Any, name: str, found: _Found) -> None:
        self.dynamic = True

    def _look_into_descriptor(self, value: Any, name: str, found: _Found) -> None:
        found += [(fn, name) for fn in _functions_of(value)]

    def _look_into_array(self, value: Any, name: str, found: _Found) -> None:
        self.arrays.append((value, name))
        if self._ran is None and value.flags.writeable:
            self._kept_arrays.append(_Array(value, name))

    @contextlib.contextmanager
    def unlocked(self, array: Any) -> Iterator[None]:
        """Meanwhile an array is as the program found it."""
        found = [a for a in self._kept_arrays if a.array is array and a.is_locked]
        for kept in found:
            kept.array.flags.writeable = True
        try:
            yield
        finally:
            for kept in found:
                kept.array.flags.writeable = False

    @property
    def locks_arrays(self) -> bool:
        return any(kept.is_locked for kept in self._kept_arrays)

    def put_arrays_back(self) -> list[str]:
        """Undo what was written to numpy arrays since the walk; the names of these."""
        # A view can be written to again when its base can.
        by_base = sorted(self._kept_arrays, key=lambda kept: kept.array.base is not None)
        return [kept.name for kept in by_base if kept.put_back()]

    def _look_into_structure_of_library(self, value: Any, name: str, found: _Found) -> None:
        self.objects.append(value)
        self._attributes(value.__dict__, name, found)

    def _look_into_object(self, value: Any, name: str, found: _Found) -> None:
        self.objects.append(value)
        own = _tree.own_dict(value)
        if own is not None:
            self._attributes(value.__dict__, name, found)
        for key in _tree.slot_names(type(value)):
            if own is None or key not in own:
                self._slot(Slot(value, key, _join(name, key)), found, single=True)
        self._class(type(value), name, found)

    def _look_into_tensor(self, value: torch.Tensor, name: str, found: _Found) -> None:
        """Only a tensor that is in a slot counts, and what it has of its own: see `_found`."""

    def _attributes(self, content: dict[str, Any], name: str, found: _Found) -> None:
        """What an object holds in its dictionary."""
        self.namespaces.add(id(content))
        if not content or id(content) in self.unsized:
            self._items(content, name, found)
            return
        items = _tree.items_of(content)
        if self._ran is not None:
            readable = self._readable
            items = {k: v for k, v in items.items() if readable[k]}
            self.attributes.append((items, name))
        self.containers.append((content, items))
        prefix = f"{name}." if name else ""
        seen = self._seen
        for key, value in items.items():
            cls = type(value)
            if cls in _SIMPLE_TYPES:
                continue
            # Most of what a module has: dictionaries for hooks that it does not have.
            empty = cls in _CONTAINERS and not value
            if empty and (cls is not collections.OrderedDict or not value.__dict__):
                if id(value) not in seen:
                    seen[id(value)] = value
                    self.containers.append((value, [] if cls in _LISTS else {}))
                continue
            self._found(Slot(content, key, f"{prefix}{key}"), value, found)

    def _space(self, owner: Any, called: bool, name: str, found: _Found) -> None:
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
            self._of_spaces.update(content)
        for key in content.keys() & self.names:
            self._member(owner, key, called, name, found)

    def _member(self, owner: Any, key: str, called: bool, name: str, found: _Found) -> None:
        value = self._spaces[id(owner)][1][key]
        if type(value) in _SIMPLE_TYPES or key in _DECLARATIONS:
            return  # simple values are guarded by their names
        if not isinstance(value, FUNCTIONS):
            self._slot(Slot(_owner(owner), key, f"{owner.__name__}.{key}"), found)
        elif called and not self._waits(value):
            found.append((value, name))

    def _waits(self, value: Any) -> bool:
        """Whether a function need not be looked into: before it starts, or when it did not.

        When it starts, its arguments are there: what moves among their defaults has to be known.
        """
        if type(value) is not types.FunctionType:
            return False
        if self._ran is not None:
            # A function that ran is a root, where it is known; of others the attributes count.
            if vars(value) or (
                not _C.frames_know_functions and id(value.__code__) in self._ran.codes
            ):
                return False
            self.bare.append(value)
            return True
        if not _C.frames_know_functions or vars(value):
            return False
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        if not all(type(v) in _SIMPLE_TYPES for v in defaults):
            return False
        self.bare.append(value)
        return True

    def _class(self, cls: type, name: str, found: _Found, called: bool = True) -> None:
        """What functions of the program may use of a class, by their names."""
        if self.types.get(cls, -1) >= called:
            return
        self.types[cls] = called
        bases = self._own_bases.get(cls)
        if bases is None:
            bases = tuple(base for base in cls.__mro__ if not _code.is_library(base))
            self._own_bases[cls] = bases
        for base in bases:
            known = self._spaces.get(id(base))
            if known is None or known[2] < called:
                self._space(base, called, name, found)

    def _look_into_function(self, fn: types.FunctionType, name: str, found: _Found) -> None:
        library = self._library_globals.get(id(fn.__globals__))
        if library is None:
            library = self._library_globals[id(fn.__globals__)] = _code.is_library(fn)
        if not library:
            self.functions.append(fn)
        if fn.__closure__:
            for key, cell in zip(fn.__code__.co_freevars, fn.__closure__):
                self._slot(Slot(cell, None, key), found, single=True)
        if library:
            wrapped = vars(fn).get("__wrapped__")
            if wrapped is not None:
                found.append((wrapped, name))
            return
        if vars(fn):
            self._attributes(vars(fn), fn.__name__, found)
        else:
            self.bare.append(fn)
        if self._ran is not None and id(fn.__code__) not in self._ran.codes:
            return
        for i, default in enumerate(fn.__defaults__ or ()):
            if isinstance(default, torch.Tensor):
                self._slot(Slot(fn.__defaults__, i, f"{fn.__name__}.{i}"), found)
            elif type(default) not in _SIMPLE_TYPES:
                found.append((default, fn.__name__))
        if fn.__kwdefaults__:
            self._items(fn.__kwdefaults__, name, found)
        self._global_names(fn.__code__, fn.__globals__, found)

    def _global_names(self, code: types.CodeType, space: dict[str, Any], found: _Found) -> None:
        names = _code.names_within(code)
        self._codes.append(code)  # which holds those inside of it
        self.entered.add(id(code))
        self.entered.update(map(id, names.inner))
        known = self._globals.get(id(space))
        if known is None:
            known = self._globals[id(space)] = (space, {})
        held = known[1]
        for key in names.globals:
            if key in held:
                continue
            value = space.get(key, MISSING)
            if value is MISSING and key not in names.stored:
                continue
            held[key] = value
            # Simple values are guarded by their names.
            cls = type(value)
            if cls not in _SIMPLE_TYPES and value is not MISSING and not self._waits(value):
                self._found(Slot(space, key, key), value, found)
        new = names.all - self.names
        if new:
            self.names |= new
            wanted = new & self._of_spaces
            if wanted:
                for owner, content, called in list(self._spaces.values()):
                    for key in content.keys() & wanted:
                        self._member(owner, key, called, "", found)
        for imported in names.imports:
            module = sys.modules.get(imported)
            if module is not None:
                found.append((module, imported))

    def enter(self, code: types.CodeType, fn: types.FunctionType | None, space: Any) -> None:
        """A function of the program starts that the walk may not have come to."""
        if id(code) in self.entered and (fn is None or self.knows(fn) or not fn.__closure__):
            return
        if fn is not None:
            self.walk(fn)
        else:
            found: _Found = []
            self._global_names(code, space, found)
            found.reverse()
            self._walk(found)
        if self._make is not None:
            self.put_numbers(self._make)
        if self.entered_more is not None:
            self.entered_more()

    def forget(self) -> None:
        """Let go of the objects that were there, which may go while this is still held."""
        self._seen.clear()
        self.objects.clear()

    def reached(self, ran: _code.Ran) -> State:
        """Of the same program, what the code that ran can have reached, by the names in it."""
        return State(*self._roots, ran=ran, before=self)

    def _items(self, owner: Any, name: str, found: _Found) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(owner, dict):
            if not dict.__len__(owner):
                self.containers.append((owner, {}))
                return
            items = _tree.items_of(owner)
            self.containers.append((owner, items))
            all_count = self._ran is not None or id(owner) in self._groups
            for i, (key, value) in enumerate(items.items()):
                if type(key) is not str and type(key) not in _tree.SIMPLE_TYPES:
                    self._seen.setdefault(id(key), key)
                if all_count or type(value) not in _SIMPLE_TYPES:
                    # The state of an optimizer has its parameters as keys.
                    label = i if isinstance(key, torch.Tensor) else key
                    self._found(Slot(owner, key, f"{prefix}{label}"), value, found)
            return
        values = _tree.list_of(owner)
        if not isinstance(owner, tuple):
            self.containers.append((owner, values))
        for i, value in enumerate(values):
            if self._ran is not None or type(value) not in _SIMPLE_TYPES:
                self._found(Slot(owner, i, f"{prefix}{i}"), value, found)

    def _slot(self, slot: Slot, found: _Found, single: bool = False) -> None:
        value = slot.read()
        if single:
            self._single.append((slot, value))
        self._found(slot, value, found)

    def _found(self, slot: Slot, value: Any, found: _Found) -> None:
        """A slot holds `value`. Before the program runs, simple values do not matter."""
        cls = type(value)
        if cls in _SIMPLE_TYPES:
            if id(slot.owner) not in self._groups or not self._number(slot, value):
                self.values.append((slot, value))
            return
        look = self._look_of(cls, value)
        if look is _LOOK_INTO_TENSOR:
            self.tensors.setdefault(id(value), (value, []))[1].append(slot)
            if value.__dict__ and id(value) not in self._seen:
                self._seen[id(value)] = value
                self._attributes(value.__dict__, slot.name, found)
            return
        if cls is tuple and id(slot.owner) in self._groups and self._number(slot, value):
            return
        self.values.append((slot, value))
        if look is None:
            self._seen.setdefault(id(value), value)
            return
        name = slot.name
        # `net._modules.layer` is `net.layer` to the user.
        if "._" in name or name.startswith("_"):
            for part in ("_modules.", "_parameters.", "_buffers."):
                name = name.replace(part, "")
        found.append((value, name))

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


def _look_of(cls: type, value: Any) -> _Look | None:
    """How `State` looks into the objects of a class, of which `value` is one."""
    if cls in _WITHOUT_STATE or cls in _tree.SIMPLE_TYPES:
        return None
    for bases, look in _LOOKS:
        if issubclass(cls, bases):
            return look
    if _tree.is_array(value):
        return State._look_into_array
    if issubclass(cls, STRUCTURES_OF_LIBRARY):
        return State._look_into_structure_of_library
    return State._look_into_object if _tree.is_structure(cls) else None


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


_Found = list[tuple[Any, str]]
_Look = Callable[[State, Any, str, _Found], None]
_LOOK_INTO_TENSOR = State._look_into_tensor
_SIMPLE_TYPES = frozenset(_tree.SIMPLE_TYPES)
_LISTS = frozenset({list, set})
_CONTAINERS = _LISTS | {dict, collections.OrderedDict}
# The first row that fits counts.
_LOOKS: tuple[tuple[type | tuple[type, ...], _Look], ...] = (
    (torch.Tensor, _LOOK_INTO_TENSOR),
    (functools.partial, State._look_into_partial),
    (types.MethodType, State._look_into_method),
    (types.FunctionType, State._look_into_function),
    (nn.Module, State._look_into_module),
    (OBJECTS_OF_TORCH, State._look_into_object_of_torch),
    (collections.OrderedDict, State._look_into_ordered_dict),
    ((dict, list, tuple, collections.deque), State._look_into_container),
    (type, State._look_into_class),
    (types.ModuleType, State._look_into_python_module),
    (PLAIN_CONTENTS, State._look_into_content),
    (frozenset, State._look_into_frozenset),
    (types.MappingProxyType, State._look_into_proxy),
    (weakref.ref, State._look_into_reference),
    (contextvars.ContextVar, State._look_into_variable),
    (threading.local, State._look_into_local),
    ((operator.attrgetter, operator.methodcaller), State._look_into_getter),
    (DESCRIPTORS, State._look_into_descriptor),
)


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
