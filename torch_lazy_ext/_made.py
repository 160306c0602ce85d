"""Record: objects that are no containers, taken apart: what a program makes and returns or keeps.

A closure, a partial, a `zip`, a view of a dictionary, a new module: each holds tensors of the
capture, and a replay has to make another one that holds its own. `_tree.parts` takes apart what
arguments and state are made of; here is the rest, which only a program's results need.
"""

from __future__ import annotations

import collections
import functools
import gc
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Recipe:
    """How to make an object again.

    Attributes:
        make: makes it from its children; from nothing when `fill` puts them in afterwards.
        fill: puts the children into an object that exists already, for objects that may hold
            themselves.
    """

    __slots__ = ("fill", "make")

    def __init__(
        self, make: Callable[..., Any], fill: Callable[[Any, list[Any]], None] | None = None
    ) -> None:
        self.make = make
        self.fill = fill


Parts = tuple[Recipe, list[Any]]


def parts(value: Any) -> Parts | None:
    """How to make `value` again, and of what; None for what cannot be taken apart like this."""
    take = _TAKE.get(type(value))
    if take is not None:
        return take(value)
    if isinstance(value, dict):
        return _keyed(value)
    for base in (set, frozenset, functools.partial):
        if isinstance(value, base):
            return _TAKE[base](value)
    if isinstance(value, nn.Module) or _is_plain_object(type(value)):
        return _object(value)
    return None


def has_tensor_keys(value: Any) -> bool:
    """Whether it is a dictionary that `_tree.parts`, which keeps keys as they are, cannot split."""
    return isinstance(value, dict) and any(map(_holds_tensor, value))


def _holds_tensor(key: Any) -> bool:
    if isinstance(key, (tuple, frozenset)):
        return any(map(_holds_tensor, key))
    return isinstance(key, torch.Tensor)


def _keyed(value: dict[Any, Any]) -> Parts | None:
    cls = type(value)
    if cls not in (dict, collections.OrderedDict, collections.defaultdict):
        return None

    def fill(made: dict[Any, Any], children: list[Any]) -> None:
        made.update(zip(children[: len(value)], children[len(value) :]))

    factory = getattr(value, "default_factory", None)
    make = functools.partial(cls, factory) if cls is collections.defaultdict else cls
    return Recipe(make, fill), [*value.keys(), *value.values()]


def _is_plain_object(cls: type) -> bool:
    """Whether its attributes are all that there is to an object: of a class written in Python."""
    defined = {name for base in cls.__mro__[:-1] for name in vars(base)}
    return (
        cls.__basicsize__ <= _BASIC_SIZE
        and cls.__dictoffset__ != 0
        and not defined & {"__new__", "__reduce_ex__", "__reduce__"}
        and not issubclass(cls, (type, types.ModuleType))
        and cls.__module__.partition(".")[0] not in _OPAQUE
    )


# Their objects are more than their attributes: locks, threads, what a system call gave.
_OPAQUE = (
    *("torch_lazy_ext", "builtins", "threading", "queue", "multiprocessing", "concurrent"),
    *("asyncio", "socket", "contextvars", "weakref", "io", "logging"),
)


class _Empty:
    pass


_BASIC_SIZE = _Empty.__basicsize__


def _object(value: Any) -> Parts:
    names = tuple(vars(value))

    def fill(made: Any, children: list[Any]) -> None:
        vars(made).update(zip(names, children))

    return Recipe(functools.partial(object.__new__, type(value)), fill), list(vars(value).values())


def _set(value: set[Any]) -> Parts:
    cls = type(value)
    return Recipe(functools.partial(cls.__new__, cls), _fill_set), list(value)


def _fill_set(made: set[Any], children: list[Any]) -> None:
    set.update(made, children)


def _frozenset(value: frozenset[Any]) -> Parts:
    cls = type(value)
    return Recipe(lambda *items: cls(items)), list(value)


def _view(value: Any) -> Parts:
    cls = type(value)
    mapping = gc.get_referents(value)[0]
    return Recipe(lambda made: _VIEWS[cls](made)), [mapping]


def _proxy(value: Any) -> Parts | None:
    mapping = gc.get_referents(value)[0]
    return None if isinstance(mapping, type) else (Recipe(types.MappingProxyType), [mapping])


def _partial(value: functools.partial[Any]) -> Parts:
    cls = type(value)
    state: Any = value.__reduce__()[2]  # function, arguments, keywords, attributes

    def make(func: Any, args: Any, keywords: Any, attributes: Any) -> Any:
        made: Any = cls.__new__(cls, func)
        made.__setstate__((func, args, keywords, attributes))
        return made

    return Recipe(make), list(state)


def _method(value: types.MethodType) -> Parts:
    return Recipe(types.MethodType), [value.__func__, value.__self__]


def _bound(value: Any) -> Parts | None:
    owner, name = value.__self__, value.__name__
    if owner is None or isinstance(owner, (types.ModuleType, type)):
        return None
    return Recipe(lambda made: getattr(made, name)), [owner]


def _cell(value: types.CellType) -> Parts:
    try:
        content = [value.cell_contents]
    except ValueError:
        content = []
    return Recipe(types.CellType, _fill_cell), content


def _fill_cell(made: types.CellType, children: list[Any]) -> None:
    for child in children:
        made.cell_contents = child


def _function(value: types.FunctionType) -> Parts:
    cells = value.__closure__ or ()

    def make(defaults: Any, keywords: Any, attributes: Any, *cells: Any) -> Any:
        made = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, defaults, cells or None
        )
        made.__kwdefaults__ = keywords
        made.__dict__.update(attributes or {})
        made.__qualname__, made.__module__ = value.__qualname__, value.__module__
        made.__doc__, made.__annotations__ = value.__doc__, dict(value.__annotations__)
        return made

    attributes = vars(value)
    return Recipe(make), [value.__defaults__, value.__kwdefaults__, attributes or None, *cells]


def _generator(value: types.GeneratorType[Any, Any, Any]) -> Parts | None:
    """A generator that has not begun: its function, and the arguments that this was called with."""
    if not _has_not_begun(value):
        return None
    held = gc.get_referents(value)
    return _of_frame(value, held) if sys.version_info < (3, 11) else _of_function(value, held)


def _of_function(value: types.GeneratorType[Any, Any, Any], held: list[Any]) -> Parts | None:
    """By the function, which the generator holds, and then its variables."""
    code = value.gi_code
    functions = [
        i for i, v in enumerate(held) if isinstance(v, types.FunctionType) and v.__code__ is code
    ]
    if not functions:
        return None  # a CPython whose frames do not know their function
    names, call = _arguments_of(code)
    arguments = [v for v in held[functions[0] + 1 :] if v is not code][: len(names)]
    if len(arguments) < len(names):
        return None
    arguments = [
        v.cell_contents if n in code.co_cellvars and isinstance(v, types.CellType) else v
        for n, v in zip(names, arguments)
    ]
    return Recipe(call), [held[functions[0]], *arguments]


def _of_frame(value: types.GeneratorType[Any, Any, Any], held: list[Any]) -> Parts:
    """The same up to Python 3.10, where the generator holds a frame, and nothing its function.

    The frame holds code, builtins and globals, arguments in their order, but for those that
    functions inside share, then the cells of these, and of the functions around it.
    """
    code = value.gi_code
    frame = next(v for v in held if isinstance(v, types.FrameType))
    variables = gc.get_referents(frame)[3:]
    names, call = _arguments_of(code)
    outer = variables[len(variables) - len(code.co_freevars) :]
    shared = dict(zip(code.co_cellvars, variables[-len(code.co_cellvars + code.co_freevars) :]))
    own = iter(variables)
    arguments = [shared[n].cell_contents if n in shared else next(own) for n in names]
    space = frame.f_globals

    def make(*children: Any) -> Any:
        cells = children[: len(outer)]
        function = types.FunctionType(code, space, value.__name__, None, cells or None)
        function.__qualname__ = value.__qualname__
        return call(function, *children[len(outer) :])

    return Recipe(make), [*outer, *arguments]


def _arguments_of(code: types.CodeType) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """The names of all arguments, and what calls a function of `code` with their values."""
    count = code.co_argcount + code.co_kwonlyargcount
    starred = bool(code.co_flags & _VARARGS), bool(code.co_flags & _VARKEYWORDS)
    names = code.co_varnames[: count + sum(starred)]

    def call(function: Any, *arguments: Any) -> Any:
        positional = list(arguments[: code.co_argcount])
        keywords = dict(zip(names[code.co_argcount : count], arguments[code.co_argcount : count]))
        if starred[0]:
            positional += arguments[count]
        if starred[1]:
            keywords.update(arguments[-1])
        return function(*positional, **keywords)

    return names, call


_VARARGS, _VARKEYWORDS = 4, 8  # of code.co_flags, see the module `inspect`


def _has_not_begun(value: types.GeneratorType[Any, Any, Any]) -> bool:
    import inspect

    return inspect.getgeneratorstate(value) == inspect.GEN_CREATED


def _iterator(value: Any) -> Parts | None:
    """By the state that it tells; None where there is none to be had."""
    try:
        function, arguments, *rest = _quietly(value.__reduce__)
    except TypeError:
        return None  # itertools from Python 3.14 on
    # As for pickle: None is no state. Python 3.12 has it for an iterator over a range.
    state = [s for s in rest[:1] if s is not None]

    def make(*children: Any) -> Any:
        made = function(*children[: len(arguments)])
        if state:
            _quietly(made.__setstate__, children[-1])
        return made

    return Recipe(make), [*arguments, *state]


def _quietly(method: Callable[..., Any], *args: Any) -> Any:
    """Without the warning of Python 3.12 and 3.13 that itertools will lose these methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return method(*args)


def _slice(value: slice) -> Parts:
    return Recipe(slice), [value.start, value.stop, value.step]


def _types(*values: Any) -> Iterator[type]:
    return map(type, values)


_ordered: collections.OrderedDict[int, int] = collections.OrderedDict()
_VIEWS: dict[type, Callable[[Any], Any]] = {
    type({}.keys()): dict.keys,
    type({}.values()): dict.values,
    type({}.items()): dict.items,
    type(_ordered.keys()): collections.OrderedDict.keys,
    type(_ordered.values()): collections.OrderedDict.values,
    type(_ordered.items()): collections.OrderedDict.items,
}
_ITERATORS = (
    *(zip, map, filter, enumerate, reversed, itertools.chain, itertools.cycle, itertools.islice),
    *(itertools.repeat, itertools.count, itertools.accumulate, itertools.starmap),
    *(itertools.takewhile, itertools.dropwhile, itertools.compress, itertools.filterfalse),
    *(itertools.product, itertools.permutations, itertools.combinations, itertools.zip_longest),
    *_types(iter([]), reversed([]), iter(()), iter(range(0)), iter(""), iter(set())),
    *_types(iter({}), iter({}.values()), iter({}.items()), iter(int, 0)),
    *_types(reversed({}), reversed({}.values()), reversed({}.items())),
)
_TAKE: dict[type, Callable[[Any], Parts | None]] = {
    set: _set,
    frozenset: _frozenset,
    types.MappingProxyType: _proxy,
    functools.partial: _partial,
    types.MethodType: _method,
    types.BuiltinMethodType: _bound,
    types.MethodWrapperType: _bound,
    types.CellType: _cell,
    types.FunctionType: _function,
    types.GeneratorType: _generator,
    slice: _slice,
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_ITERATORS, _iterator),
}
