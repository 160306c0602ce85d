"""Record: a capture is there as a whole, or not at all, whenever a signal comes.

Python runs signal handlers between any two instructions of the main thread, and what a handler
raises (`KeyboardInterrupt`, or a timeout of one's own) could leave PyTorch patched, or half of a
call's effects written. So handlers wait (`_C.Hold`) while something is half done. What may take
long, the program that is recorded and a compiler, is ended by a signal: everything is taken back,
the handlers run as if the signal had come before, and where none of them raises anything it begins
anew. So no handler runs in the middle of a capture, where its operators would be recorded and its
exception could send the program another way.

Not covered is what does not come by a signal: `PyThreadState_SetAsyncExc`, by which one thread
raises an exception in another, and the end of the process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from torch_lazy_ext import _C

T = TypeVar("T")

# A timer may be faster than a capture: from then on it waits.
PATIENCE = 2


def whole(fn: Callable[[], T]) -> T:
    """Call `fn`, which holds on to nothing when a signal has ended it, until it comes to an end.

    Raises:
        Exception: what `fn` raises, or the handler of a signal.
    """
    for attempt in itertools.count():
        with _C.Hold(stop=attempt < PATIENCE):
            try:
                return fn()
            except _C.Interrupted:
                pass  # the end of the Hold runs the handlers
    raise AssertionError("unreachable")
