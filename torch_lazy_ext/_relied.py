"""What a variant relies on of Python, in words: for `explain()`."""

from __future__ import annotations

import contextvars
import types
import weakref
from typing import Any

import torch

from torch_lazy_ext import _code, _lift, _tree


class Relied:
    """What a variant relies on of Python.

    Args:
        state: the program's own state, as far as the code that ran reaches it.
        ran: the code that ran.

    Attributes:
        tensors: slots of tensors of which only shape, dtype and the like count, and what they say.
        settings: of PyTorch, with their values.
    """

    def __init__(self, state: _lift.State, ran: _code.Ran) -> None:
        self.tensors: list[tuple[_lift.Slot, str]] = []
        self.settings: list[tuple[str, str]] = []
        self._attributes = state.attributes
        self._values = state.values
        self._spaces = state.namespaces
        self._sets = [c for c, _items in state.containers if isinstance(c, _lift.PLAIN_CONTENTS)]
        self._classes = {*state.types, *(e.first for e in ran.entries if e.first is not None)}
        self._codes = [e.code for e in ran.entries if not e.library]
        self._globals = [(e.code, e.globals) for e in ran.entries if not e.library]
        self._functions = [
            weakref.ref(e.function) for e in ran.entries if e.function and not e.library
        ]

    def simple(self) -> dict[str, str]:
        """The numbers, strings and the like that the program's own code names, as text."""
        found: dict[str, str] = {}
        self._list({}, {}, found)
        return found

    def lines(self, verbose: bool) -> list[str]:
        """One line for each value that the program's own code names, and one for all else."""
        values: dict[str, None] = {}
        objects: dict[str, None] = {}
        self._list(values, objects, {})
        if verbose:
            return [*values, *objects, self._rest(False)]
        return [*values, self._rest(bool(objects))]

    def _list(
        self, values: dict[str, None], objects: dict[str, None], found: dict[str, str]
    ) -> None:
        """Add a line for each value, and for each object; and to `found`, by name the values."""

        def add(name: str, value: Any, kind: str, place: str = "") -> None:
            simple = type(value) in (*_tree.SIMPLE_TYPES, tuple)
            place = place or self._place(name)
            text = f"{name} = {short(value)} ({kind}{place and f', read at {place}'})"
            (values if simple and place else objects)[text] = None
            if simple and place:
                found[name] = short(value)

        for content, path in self._attributes:
            for key, value in content.items():
                if not isinstance(value, torch.Tensor):
                    add(f"{path}.{key}" if path else key, value, "attribute")
        for slot, value in self._values:
            add(slot.name, value, self._kind(slot))
        for cls in sorted(self._classes, key=lambda c: (c.__module__, c.__qualname__)):
            for base in () if _code.is_library(cls) else cls.__mro__:
                if not _code.is_library(base):
                    for key, value in vars(base).items():
                        if key in self._named and not key.startswith("__"):
                            add(f"{base.__name__}.{key}", value, "class attribute")
        for code, space in self._globals:
            for chain in _code.names_of(code).chains:
                held: Any = space.get(chain[0], _lift.MISSING)
                name = chain[0]
                for attribute in chain[1:]:
                    if not isinstance(held, types.ModuleType):
                        break
                    held = vars(held).get(attribute, _lift.MISSING)
                    name = f"{name}.{attribute}"
                if isinstance(held, torch.Tensor) or held is _lift.MISSING:
                    continue
                add(name, held, "global" if name == chain[0] else "attribute of a module")
        function: Any  # a method has what its function has
        for reference in self._functions:
            function = reference()
            if function is None:
                continue
            code = function.__code__
            place = f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"
            defaults = function.__defaults__ or ()
            names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
            given = [*zip(names, defaults), *(function.__kwdefaults__ or {}).items()]
            for name, value in given:
                add(f"{function.__name__}({name})", value, "default argument", place)
        for container in self._sets:
            objects[f"the items of a {type(container).__name__}: {short(container)}"] = None
        for slot, text in self.tensors:
            place = self._place(slot.name)
            values[f"{slot.name}: {text} (tensor{place and f', read at {place}'})"] = None
        for name, setting in self.settings:
            values[f"{name} = {setting} (setting)"] = None
            found[name] = setting

    @staticmethod
    def _rest(objects: bool) -> str:
        # Without numbers: each release of Python and torch has others.
        text = "what functions of libraries name"
        return f"other objects and values, and {text}" if objects else text

    @property
    def _named(self) -> frozenset[str]:
        return frozenset().union(*(_code.names_of(c).all for c in self._codes))

    def _place(self, name: str) -> str:
        """Where the program's own code names something, "file:line", or nothing.

        Args:
            name: a path; the item of a list is read where the list is.
        """
        parts = [part for part in name.split(".") if not part.isdigit()]
        return _code.line_of(self._codes, parts[-1]) if parts else ""

    def _kind(self, slot: _lift.Slot) -> str:
        owner = slot.owner
        if isinstance(owner, types.CellType):
            return "closure"
        if isinstance(owner, type):
            return "class attribute"
        if isinstance(owner, contextvars.ContextVar):
            return "ContextVar"
        if isinstance(owner, dict):
            if id(owner) in self._spaces:
                return "attribute"
            return "global" if "__builtins__" in owner else "item of a dictionary"
        if isinstance(owner, (list, tuple)):
            return f"item of a {type(owner).__name__}"
        return "weak reference" if isinstance(slot, _lift.AliveSlot) else "attribute"


def short(value: Any) -> str:
    """A value in few words."""
    if type(value) in _tree.SIMPLE_TYPES:
        text = repr(value)
    elif isinstance(value, (tuple, list, dict, set, frozenset)):
        text = f"{type(value).__name__} of {_tree.length(value)}"
    else:
        text = getattr(value, "__name__", "") or f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
