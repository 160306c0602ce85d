"""Which code runs while a program is recorded, and what it names.

What a program reads of Python cannot be known from the objects that it can reach: it may look up
anything by a name. So `csrc/ran.h` notes each code object that starts, of libraries too, and this
module says what names such code uses: globals, attributes, strings that may be attributes. A guard
then stands on each namespace that the program reaches, for these names (`_namespaces.py`).
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from torch_lazy_ext import _C

# Code that is none of the program's: what it reads, and counts, decides nothing of the graph.
# TorchDynamo compiles nothing while a program is recorded (`_higher_order.py`), and where warnings
# and logs go is no affair of a replay, which gives none.
OWN = frozenset(
    {"torch_lazy_ext", "torch._dynamo", "torch._inductor", "torch.utils._config_module"}
    | {"logging", "warnings"}
)
# Their functions are not looked into for state of the program; what they name is guarded all the
# same when they run.
LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"numpy", "torch", "torch_lazy_ext"}

# Names of what finds attributes that no code names. Where a program's own code uses one of them,
# everything that its objects hold is guarded.
DYNAMIC = frozenset(
    {"__dict__", "__getattribute__", "__reduce__", "__slots__", "attrgetter", "delattr", "dir"}
    | {"eval", "exec", "getattr", "hasattr", "methodcaller", "setattr", "vars", "globals"}
)
# Library modules whose functions read all attributes of what they are given.
READ_ALL = frozenset({"copy", "copyreg", "dataclasses", "inspect", "json", "pickle", "pprint"})
# Methods of nn.Module that go through all its parameters, buffers or children.
GO_THROUGH = frozenset(
    {"_named_members", "named_modules", "named_children", "state_dict", "_apply"}
)
# What every module has for the use of nn.Module, which names it.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Names(NamedTuple):
    """What one code object names, without the code objects inside it.

    Attributes:
        chains: each global that it reads, with the attributes that it reads of that one at once:
            `torch.nn.functional` is ("torch", "nn", "functional").
        stored: globals that it sets or deletes.
        attributes: that it reads, of whatever object.
        stored_attributes: that it sets or deletes.
        imports: modules.
        strings: parts of its string constants that could be attributes.
        all: attributes, set ones too, and strings.
        globals: which it reads or sets.
        inner: the code objects inside of it, where these are meant as well.
    """

    chains: tuple[tuple[str, ...], ...]
    stored: frozenset[str]
    attributes: frozenset[str]
    stored_attributes: frozenset[str]
    imports: tuple[str, ...]
    strings: frozenset[str]
    all: frozenset[str]
    globals: tuple[str, ...]
    inner: tuple[types.CodeType, ...]

    @property
    def is_dynamic(self) -> bool:
        """Whether it may find attributes by names that stand nowhere in it."""
        return not DYNAMIC.isdisjoint(self.attributes) or any(c[0] in DYNAMIC for c in self.chains)


def names_of(code: types.CodeType) -> Names:
    """What a code object names, noted with it when it is first asked for."""
    return cast(Names, _C.names_of(code))


def names_within(code: types.CodeType) -> Names:
    """What a code object and those inside of it name."""
    return cast(Names, _C.names_within(code))


def is_library(thing: Callable[..., Any] | type | types.ModuleType) -> bool:
    """Whether a function, class or module is one of `LIBRARIES`."""
    name: Any
    if isinstance(thing, type):
        name = thing.__module__
    elif isinstance(thing, types.FunctionType):
        name = thing.__globals__.get("__name__")
    else:
        name = thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__
    return isinstance(name, str) and _is_of_library(name)


@functools.lru_cache(maxsize=4096)
def _is_of_library(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES


class Entry(NamedTuple):
    """A code object that ran, once for each type of its first argument."""

    code: types.CodeType
    globals: dict[str, Any]
    first: type | None
    function: types.FunctionType | None
    library: bool
    prop: torch.backends.ContextProp | None  # the first argument, where it is one


class Ran:
    """The code that ran, and what it called.

    Attributes:
        entries: each code object that ran.
        codes: ids of their code objects.
        names: all that the code names, but for globals.
        dynamic: whether attributes may have been read that no code names.
        goes_through: whether all parameters, buffers or children of a module were read.
        props: the settings that were read or written as attributes of `torch.backends`.
        variables: the names of environment variables that it asked for, as the system has them.
    """

    def __init__(self, noted: _C.Ran, variables: set[bytes], before: Iterable[Entry] = ()) -> None:
        self.variables = variables
        self.entries = [*before, *(Entry(*e) for e in noted.entries)]
        # The methods of a class that the program has made: nothing outside can change it.
        self.entries = [
            e._replace(first=None) if e.first is not None and _made_inside(e) else e
            for e in self.entries
        ]
        codes = {id(e.code): e for e in self.entries}.values()
        self.names: frozenset[str] = frozenset().union(*(names_of(e.code).all for e in codes))
        self.dynamic = any(
            names_of(e.code).is_dynamic if not e.library else e.globals.get("__name__") in READ_ALL
            for e in codes
        )
        self.codes = {id(e.code) for e in codes}
        self.goes_through = any(e.library and e.code.co_name in GO_THROUGH for e in codes)
        # Globals that a library keeps for itself: counts, what it has made on first use.
        stored: dict[int, set[str]] = {}
        for e in codes:
            if e.library:
                stored.setdefault(id(e.globals), set()).update(names_of(e.code).stored)
        self._stored = {key: frozenset(names) for key, names in stored.items()}
        self.props = [e.prop for e in self.entries if e.prop is not None]
        self._set = frozenset().union(
            *(names_of(e.code).stored_attributes for e in codes if e.library)
        )

    def held(self) -> list[Any]:
        """The classes and functions that it holds, which a program may have made."""
        held = [e.first for e in self.entries] + [e.function for e in self.entries]
        return [value for value in held if value is not None]

    @contextlib.contextmanager
    def loosely(self, made: Container[Any]) -> Iterator[None]:
        """Meanwhile hold none of the classes that were `made` since the program has begun.

        Where nothing else does, they are garbage, and may hold the program's own variables: from
        Python 3.13 on, `f_locals` of a frame that a method closes over is the frame itself.
        """
        references = {
            i: weakref.ref(e.first)
            for i, e in enumerate(self.entries)
            if e.first is not None and e.first in made
        }

        def put(i: int, first: type | None) -> None:
            self.entries[i] = self.entries[i]._replace(first=first)

        for i in references:
            put(i, None)
        try:
            yield
        finally:
            for i, reference in references.items():
                put(i, reference())

    def readable(self) -> Readable:
        """By attribute, whether the code may have read it of an object."""
        return Readable(self.names, self.dynamic)

    def kept_by(self, entry: Entry) -> frozenset[str]:
        """The globals of a library that it writes itself while it runs."""
        return self._stored.get(id(entry.globals), frozenset()) if entry.library else frozenset()

    def counts_of(self, cls: type) -> frozenset[str]:
        """Attributes of a library's class that are numbers, which the library sets as it runs."""
        if not is_library(cls):
            return frozenset()
        held = vars(cls)
        return frozenset(k for k in held.keys() & self._set if isinstance(held[k], int))


class Readable(dict[Any, bool]):
    """Which attributes may have been read: found out once for each, as modules have the same."""

    def __init__(self, names: frozenset[str], dynamic: bool) -> None:
        self._names = names
        self._dynamic = dynamic

    def __missing__(self, key: Any) -> bool:
        answer = self[key] = (
            key in self._names
            or (self._dynamic and key not in MODULE_ATTRIBUTES)
            or not isinstance(key, str)
            or key.startswith("__")
        )
        return answer


def _made_inside(entry: Entry) -> bool:
    return entry.function is None and not entry.library


def note(entered: Callable[..., None] | None) -> _C.Ran:
    """Something to `start` and `stop`; then `Ran` says what has run."""
    return _C.Ran(LIBRARIES, OWN, entered, torch.backends.ContextProp)


def place_of(ran: Ran) -> str:
    """Where the first function of the program's own that ran begins: "name, file:line"."""
    for entry in ran.entries:
        if not entry.library:
            code = entry.code
            file = code.co_filename.rpartition("/")[2]
            return f"{code.co_name}, {file}:{code.co_firstlineno}"
    return ""


def line_of(codes: Iterable[types.CodeType], name: str) -> str:
    """Where the first of `codes` that names something does so: "file:line", or nothing."""
    for code in codes:
        names = names_of(code)
        if name in names.all or any(name in c for c in names.chains) or name in code.co_freevars:
            line = code.co_firstlineno
            for instruction in dis.get_instructions(code):
                # The line at each instruction from Python 3.13 on, at the first of a line before.
                begins: Any = getattr(instruction, "line_number", instruction.starts_line)
                line = begins or line
                if instruction.argval == name:
                    break
            return f"{code.co_filename.rpartition('/')[2]}:{line}"
    return ""
