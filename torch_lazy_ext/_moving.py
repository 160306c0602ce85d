"""Record: things that move when they are used, and that were there before the program.

The next value of an iterator, a line of a file, an item of a queue, a number of a random generator
that is not torch's: no operator sees where they come from, and a replay would use the one of the
capture again. So for the time of a capture something else stands in the place of each, which
refuses before the thing itself has moved. Generators of random numbers can be put back: those are
compared instead.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from torch_lazy_ext import _code, _lift, _tree
from torch_lazy_ext._errors import UnsupportedError

_ITERATOR = "takes the next value of an iterator"
# Beside everything else that has a `__next__`: module, class, what a use of it is called.
_CLASSES = (
    ("io", "IOBase", "reads or writes a file"),
    ("queue", "Queue", "uses a queue"),
    ("queue", "SimpleQueue", "uses a queue"),
    ("multiprocessing.queues", "Queue", "uses a queue"),
    ("multiprocessing.queues", "SimpleQueue", "uses a queue"),
    ("multiprocessing.connection", "Connection", "uses a connection"),
    ("socket", "socket", "uses a socket"),
)
# Methods that a program may hold instead of the object.
_METHODS = ("__next__", "send", "throw", "get", "get_nowait", "read", "readline", "recv")
_METHOD_TYPES = (types.BuiltinMethodType, types.MethodWrapperType, types.MethodType)

# Random generators: module, class, how to read the state, how to set it, what to compare of it.
_RANDOM: tuple[tuple[str, str, Callable[[Any], Any], Any, Callable[[Any], Any]], ...] = (
    ("random", "Random", lambda r: r.getstate(), lambda r, state: r.setstate(state), tuple),
    (
        "numpy.random",
        "Generator",
        lambda r: r.bit_generator.state,
        lambda r, state: setattr(r.bit_generator, "state", state),
        pickle.dumps,
    ),
    (
        "numpy.random",
        "BitGenerator",
        lambda r: r.state,
        lambda r, state: setattr(r, "state", state),
        pickle.dumps,
    ),
    (
        "numpy.random",
        "RandomState",
        lambda r: r.get_state(),
        lambda r, state: r.set_state(state),
        pickle.dumps,
    ),
)


# Functions that give something else at each call: module, name, what a call of them is called.
# They are replaced where they stand, and where the program's state holds them.
_CLOCK = "reads the clock"
_FUNCTIONS = (
    *(("time", name, _CLOCK) for name in ("time", "perf_counter", "monotonic", "process_time")),
    *(("time", f"{name}_ns", _CLOCK) for name in ("time", "perf_counter", "monotonic")),
    ("os", "urandom", "draws from the system's random numbers"),
    ("random", "_urandom", "draws from the system's random numbers"),  # and the module `secrets`
    ("uuid", "_generate_time_safe", "makes a UUID of the time"),
    ("builtins", "input", "reads what is typed"),
    ("builtins", "open", "opens a file"),
    ("io", "open", "opens a file"),  # and the module `pathlib` from Python 3.11 on
    ("pathlib", "_NormalAccessor.open", "opens a file"),  # and before
    ("torch", "load", "reads a file"),
    ("random", "Random.seed", "takes a seed from the system"),  # without an argument
)
# Classes with class methods that read the clock.
_CLOCKS = (("datetime", "datetime", ("now", "utcnow", "today")), ("datetime", "date", ("today",)))
# Whoever these read the clock, a file or the like for, it is not for the program's result.
_LIBRARIES = (
    *("torch", "logging", "warnings", "linecache", "traceback", "tokenize", "inspect"),
    *("importlib", "_frozen_importlib", "_frozen_importlib_external", "threading", "concurrent"),
)


def functions() -> Iterator[tuple[Any, str, str]]:
    """The owner, the name and the description of each function of the table."""
    for module, names, what in _FUNCTIONS:
        *path, name = names.split(".")
        owner: Any = importlib.import_module(module)
        for part in path:
            owner = getattr(owner, part, None)
        # Where Python was built without a library, a function may be there as None; and another
        # Python may have it elsewhere.
        if getattr(owner, name, None) is not None:
            yield owner, name, what


def clocks(replace: Callable[[Any, str], Any]) -> Iterator[tuple[Any, str, type]]:
    """The module, the name and the stand-in of each class that reads the clock.

    Args:
        replace: makes what is called instead of a method, from this and its description.
    """
    for module, name, methods in _CLOCKS:
        owner = importlib.import_module(module)
        original = getattr(owner, name)
        named = {m: staticmethod(replace(getattr(original, m), _CLOCK)) for m in methods}
        yield owner, name, _MakesOriginals(name, (original,), named)


class _MakesOriginals(type):
    """Of a subclass that is its base to everybody: only its class methods are other ones."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.__base__(*args, **kwargs)  # type: ignore[misc] # there is one

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__base__ or object)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__base__ or object)


_SEED = random.Random.seed


def _asking_line() -> str | None:
    """The line of the program that a call is for; None when a library does it for itself, or what
    the collector of garbage calls at its own moments."""
    frame: types.FrameType | None = sys._getframe(1)
    own = True
    of_collector = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        if frame.f_code in of_collector:
            return None
        root = frame.f_globals.get("__name__", "").partition(".")[0]
        own = own and root == "torch_lazy_ext"
        if not own:
            if root in _LIBRARIES or root == "torch_lazy_ext":
                return None
            if root not in sys.stdlib_module_names and root != "numpy":
                return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None


class Moment:
    """What a clock says, while a program is captured: it may be subtracted, and forgotten."""

    __slots__ = ("_refusal",)

    def __init__(self, refusal: Callable[[], UnsupportedError]) -> None:
        self._refusal = refusal

    @property  # type: ignore[misc] # for isinstance
    def __class__(self) -> type:
        return float

    def refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise self._refusal()

    def _another(self, other: Any) -> Moment:
        return self if type(other) in (Moment, int, float) else self.refuse()

    def __neg__(self) -> Moment:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _another
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = __hash__ = refuse
    __float__ = __int__ = __index__ = __round__ = __trunc__ = __floor__ = __ceil__ = refuse
    __abs__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __pow__ = refuse
    __rtruediv__ = __rpow__ = __rdivmod__ = __str__ = __repr__ = __format__ = refuse
    __copy__ = __deepcopy__ = __reduce_ex__ = refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            # C code asks whether this is an array, say, and takes no other error for a no.
            raise AttributeError(f"'float' object has no attribute {name!r}")
        self.refuse()


def _class(module: str, name: str) -> type | tuple[()]:
    """A class for isinstance, if its module has been imported."""
    found = getattr(sys.modules.get(module), name, ())
    return found if isinstance(found, type) else ()


def _kind(value: Any) -> str:
    """What a use of `value` is called; nothing if it does not move."""
    if isinstance(value, _METHOD_TYPES):
        return _kind(value.__self__) if value.__name__ in _METHODS else ""
    for module, name, what in _CLASSES:
        if isinstance(value, _class(module, name)):
            return what
    # The attributes of an object that can be looked into are state like any other.
    moves = hasattr(type(value), "__next__") and _tree.parts(value) is None
    return _ITERATOR if moves and not isinstance(value, torch.nn.Module) else ""


_IMMUTABLE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE, from Python 3.10 on
_MAY_MOVE: dict[type, bool] = {}  # of classes that nobody can change


def _may_move(cls: type) -> bool:
    """Whether an object of this class can be anything that is meant here."""
    answer = _MAY_MOVE.get(cls)
    if answer is None:
        answer = _can_move(cls)
        if cls.__flags__ & _IMMUTABLE:
            _MAY_MOVE[cls] = answer
    return answer


def _can_move(cls: type) -> bool:
    classes = [row[:2] for row in _CLASSES] + [row[:2] for row in _RANDOM]
    return (
        hasattr(cls, "__next__")
        or issubclass(cls, _METHOD_TYPES)
        or any(issubclass(cls, _class(*names)) for names in classes)
    )


def user_line() -> str:
    """The line of the program that is running: the innermost one that is in no library."""
    frame: types.FrameType | None = sys._getframe(1)
    innermost = ""
    while frame is not None:
        root = frame.f_globals.get("__name__", "").partition(".")[0]
        if root != "torch_lazy_ext":
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if root not in _code.LIBRARIES:
                return line
            innermost = innermost or line
        frame = frame.f_back
    return innermost


def line_of(error: BaseException) -> str:
    """The line that raised an error."""
    found = error.__traceback__
    while found is not None and found.tb_next is not None:
        found = found.tb_next
    return f"{found.tb_frame.f_code.co_filename}:{found.tb_lineno}" if found else ""


class StandIn:
    """Takes the place of something that moves: every use of it is refused."""

    __slots__ = ("_name", "_refusal", "_value", "_what")

    def __init__(
        self, refusal: Callable[[str], UnsupportedError], value: Any, what: str, name: str
    ) -> None:
        self._refusal = refusal
        self._value = value
        self._what = what
        self._name = name

    @property  # type: ignore[misc] # for isinstance
    def __class__(self) -> type:
        return type(self._value)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        cls = type(getattr(self._value, "__self__", self._value))
        raise self._refusal(
            f"the program {self._what} that was there before it, `{self._name}` of type "
            f"{cls.__name__} (at {user_line()}), which a replay would not move: take from it "
            "before the call, and pass what it gave"
        )

    def __iter__(self) -> StandIn:
        return self

    def __getattr__(self, name: str) -> Any:
        self._refuse()

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return repr(self._value)

    __next__ = __call__ = __len__ = __getitem__ = __enter__ = __exit__ = _refuse
    __copy__ = __deepcopy__ = __reduce_ex__ = _refuse


class _Random:
    """A random generator, and the state in which the program found it."""

    def __init__(self, value: Any, name: str) -> None:
        self.name = name
        self._value = value
        self._get, self._set, self._key = next(
            row[2:] for row in _RANDOM if isinstance(value, _class(*row[:2]))
        )
        self._state = self._get(value)
        self._before = self._key(self._state)

    def put_back(self) -> bool:
        """Whether the state was another by now."""
        if self._key(self._get(self._value)) == self._before:
            return False
        self._set(self._value, self._state)
        return True


class Moving:
    """What moves, of one capture.

    Args:
        refusal: makes the error, which the capture then fails with in any case.
        replaced: id of a function or class -> this, and what asks `call` in its place.

    Attributes:
        clock: the error for a program that uses a time in a way that none could foresee.
    """

    def __init__(
        self, refusal: Callable[[str], UnsupportedError], replaced: dict[int, tuple[Any, Any]]
    ) -> None:
        self.refusal = refusal
        self._replaced = replaced
        self._originals = {id(new): original for original, new in replaced.values()}
        self.clock = ""  # why the program may not use the time that it asked for
        self._stand_ins: dict[int, StandIn] = {}  # id of what they stand for ->
        self._kinds: dict[type, bool] = {}
        self._random: dict[int, _Random] = {}
        # The generators of the modules: every program can reach these.
        self._add_random(random._inst, "Python's random")
        if "numpy.random" in sys.modules:
            import numpy.random

            self._add_random(numpy.random.mtrand._rand, "numpy.random")

    def _add_random(self, value: Any, name: str) -> None:
        self._random.setdefault(id(value), _Random(value, name))

    def given(self, value: Any, name: str = "an argument") -> Any:
        """What the program sees of a value that was there before it."""
        cls = type(value)
        if id(value) in self._replaced:
            return self._replaced[id(value)][1]
        if cls is tuple or (hasattr(cls, "_fields") and isinstance(value, tuple)):
            items = list(tuple.__iter__(value))
            made = [self.given(item, f"{name}.{i}") for i, item in enumerate(items)]
            if all(a is b for a, b in zip(items, made)):
                return value
            return tuple.__new__(cls, made)
        if cls not in self._kinds:
            self._kinds[cls] = _may_move(cls)
        if not self._kinds[cls]:
            return value
        if any(isinstance(value, _class(*row[:2])) for row in _RANDOM):
            self._add_random(value, f"{name}, a {cls.__module__}.{cls.__name__}")
            return value
        known = self._stand_ins.get(id(value))
        if known is None:
            # The program prints to these.
            standard = any(value is s for s in (sys.stdout, sys.stderr, sys.__stdout__))
            what = "" if standard else _kind(value)
            if not what:
                return value
            known = self._stand_ins[id(value)] = StandIn(self.refusal, value, what, name)
        return known

    @contextlib.contextmanager
    def in_place_of(self, state: _lift.State) -> Iterator[None]:
        """Put stand-ins in the place of what moves among the program's state."""
        values = functions = 0
        kinds = self._kinds

        def put() -> None:
            nonlocal values, functions
            for slot, value in state.values[values:]:
                cls = type(value)
                if not kinds.get(cls, True) and id(value) not in self._replaced:
                    continue
                # What a tuple holds, with the slot that holds the tuple.
                if cls in _tree.SIMPLE_TYPES or isinstance(slot.owner, tuple):
                    continue
                made = self.given(value, slot.name or type(value).__name__)
                if made is not value:
                    slot.write(made)
                    undo.callback(_put_back, slot, value, made)
            for function in state.functions[functions:]:
                self._defaults(function, undo)
            values, functions = len(state.values), len(state.functions)

        with contextlib.ExitStack() as undo:
            put()
            # What functions reach that the program comes to only when it runs.
            outer, state.entered_more = state.entered_more, put
            try:
                yield
            finally:
                state.entered_more = outer

    def _defaults(
        self, function: types.FunctionType | functools.partial[Any], undo: contextlib.ExitStack
    ) -> None:
        """The same for the tuple of a function's defaults, and for the arguments of a partial."""
        if isinstance(function, functools.partial):
            args = self.given(function.args, "an argument of a partial")
            if args is not function.args:
                # Function, arguments, keywords, attributes; not in its stub.
                set_state = function.__setstate__  # type: ignore[attr-defined]
                before: Any = function.__reduce__()[2]
                set_state((before[0], args, *before[2:]))
                undo.callback(set_state, before)
            return
        defaults = function.__defaults__
        made = self.given(defaults, f"a default of {function.__name__}")
        if made is not defaults:
            function.__defaults__ = made
            undo.callback(setattr, function, "__defaults__", defaults)

    def real(self, value: Any) -> Any:
        """What a stand-in stands for; anything else itself."""
        if type(value) is StandIn:
            return value._value
        if type(value) is Moment:
            value.refuse()
        return self._originals.get(id(value), value)

    def call(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of a function of the table, by the program or by a library."""
        line = _asking_line()
        seeds = [*args[1:], *kwargs.values()]
        if line is None or (function is _SEED and seeds and seeds[0] is not None):
            return function(*args, **kwargs)
        message = (
            f"the program {what} (`{function.__name__}`, at {line}), which gives something else at "
            "each call, and a replay would not ask again: ask before the call, and pass the answer"
        )
        if what is _CLOCK:
            self.clock = message
            return Moment(functools.partial(self.refusal, message))
        raise self.refusal(message)

    def put_back(self) -> list[str]:
        """Put the random generators back; the names of those that the program has moved."""
        return [r.name for r in self._random.values() if r.put_back()]


def drawn_from(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"the program draws numbers from {name}, which a replay would not draw again: draw "
        "them with torch, or before the call, and pass them"
    )


def _put_back(slot: _lift.Slot, value: Any, made: Any) -> None:
    if slot.read() is made:
        slot.write(value)
