"""Record: a capture is there as a whole, or not at all, whenever a signal comes.

Python runs signal handlers between any two instructions of the main thread, and what a handler
raises (`KeyboardInterrupt`, or a timeout of one's own) could leave PyTorch patched, or half of a
call's effects written. So handlers wait (`Hold`) while something is half done. What may take long,
the program that is recorded and a compiler, is ended by a signal: everything is taken back, the
handlers run as if the signal had come before, and where none of them raises anything it begins
anew. So no handler runs in the middle of a capture, where its operators would be recorded and its
exception could send the program another way.

Not covered: what does not come by a signal (`PyThreadState_SetAsyncExc`, by which one thread raises
an exception in another), and a signal between the run of a graph and its effects, which finds the
random number generator moved and nothing else.
"""

from __future__ import annotations

import _signal  # without the wrappers of `signal`, which make enumerations of numbers
import itertools
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# A timer may be faster than a capture: from then on it waits.
PATIENCE = 2
# They come from the code that runs, and it does not go on.
_SYNCHRONOUS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_NUMBERS = sorted(set(map(int, signal.valid_signals())) - set(map(int, _SYNCHRONOUS)))


class Interrupted(BaseException):
    """A signal has ended a capture; its handler has still to run."""


class _State:
    """What the main thread is at.

    Attributes:
        depth: how many `Hold`s there are, one in another.
        stops: the next signal ends what runs.
        impatient: nothing is ended.
        waiting: the signals whose handlers have to run.
        postponed: those that a `Hold` has left to `run_waiting`.
        handlers: number of a signal -> the handler in whose place `_note` is.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.stops = False
        self.impatient = False
        self.waiting: list[int] = []
        self.postponed: list[int] = []
        self.handlers: dict[int, Any] = {}


_state = _State()


def _note(number: int, frame: types.FrameType | None) -> None:
    """The handler of every signal in the meantime."""
    if not _state.depth:
        _state.handlers[number](number, frame)  # on the way to or from a Hold
        return
    if number not in _state.waiting:
        _state.waiting.append(number)
    if _state.stops:
        _state.stops = False  # once: what is ended is not ended again while it is taken back
        raise Interrupted


def _is_main() -> bool:
    return threading.main_thread().ident == threading.get_ident()


def _run(numbers: list[int]) -> None:
    while numbers:
        number = numbers.pop(0)
        handler = _signal.getsignal(number)
        if callable(handler):
            try:
                handler(number, sys._getframe(1))
            except BaseException:
                while numbers:
                    signal.raise_signal(numbers.pop())
                raise


def _give_back() -> None:
    for number, handler in _state.handlers.items():
        if _signal.getsignal(number) is _note:  # the program may have put another one there
            _signal.signal(number, handler)


class Hold:
    """While it is entered, in the main thread, signal handlers wait. Their end runs them.

    Args:
        runs: whether the end runs the handlers; else it raises `Interrupted`, and whoever catches
            that calls `run_waiting`.
    """

    def __init__(self, runs: bool = True) -> None:
        self._runs = runs
        self._active = False
        self._stops = False

    def __enter__(self) -> None:
        if not _is_main():
            return
        if not _state.depth:
            try:
                for number in _NUMBERS:
                    handler = _signal.getsignal(number)
                    if callable(handler) and handler is not _note:
                        _state.handlers[number] = handler
                        _signal.signal(number, _note)
            except BaseException:
                _give_back()  # a handler has raised before anything has begun
                raise
        self._stops, _state.stops = _state.stops, False
        _state.depth += 1
        self._active = True

    def __exit__(self, *exc: object) -> None:
        if not self._active:
            return
        if _state.depth > 1:
            _state.depth -= 1
            if self._stops and _state.waiting:
                raise Interrupted
            _state.stops = self._stops
            return
        try:
            # From here on a signal has its handler run, and none is noted any more.
            _state.depth = 0
            _give_back()
        except BaseException:
            while _state.waiting:
                signal.raise_signal(_state.waiting.pop())
            raise
        waiting, _state.waiting = _state.waiting, []
        if waiting and not self._runs:
            _state.postponed = waiting
            raise Interrupted
        _run(waiting)


def run_waiting() -> None:
    """Run the handlers that a `Hold` has left."""
    _run(_state.postponed)


def stoppable(fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `fn`; in a `Hold` of this thread, a signal ends it.

    Raises:
        Interrupted: a signal came, whatever the program made of that.
        Exception: what `fn` raises.
    """
    if not _state.depth or _state.impatient or not _is_main():
        return fn(*args, **kwargs)
    if _state.waiting:
        raise Interrupted
    _state.stops = True
    try:
        result = fn(*args, **kwargs)
    except BaseException:
        _state.stops = False
        if _state.waiting:
            raise Interrupted from None
        raise
    _state.stops = False
    if _state.waiting:
        raise Interrupted
    return result


def whole(fn: Callable[[], T]) -> T:
    """Call `fn`, which holds on to nothing when a signal has ended it, until it comes to an end.

    Raises:
        Exception: what `fn` raises, or the handler of a signal.
    """
    for attempt in itertools.count():
        with Hold():
            impatient = _state.impatient
            if attempt >= PATIENCE and _is_main():
                _state.impatient = True
            try:
                return fn()
            except Interrupted:
                pass  # the end of the Hold runs the handlers
            finally:
                if _is_main():
                    _state.impatient = impatient
    raise AssertionError("unreachable")
