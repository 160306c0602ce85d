"""Record: a capture is there as a whole, or not at all, whenever a signal comes.

Python runs signal handlers between any two instructions of the main thread, and what a handler
raises (`KeyboardInterrupt`, or a timeout of one's own) could leave PyTorch patched, or half of a
call's effects written. So handlers wait (`_C.Hold`) while something is half done. What may take
long, the program that is recorded and a compiler, is ended by a signal (`_C.stoppable`): everything
is taken back, the handlers run as if the signal had come before, and where none of them raises
anything it begins anew. So no handler runs in the middle of a capture, where its operators would be
recorded and its exception could send the program another way.

A call that has no effects but its result needs none of this: what a handler raises leaves as it is,
and the random numbers are put back. A call that runs the program itself is interrupted as eager's.

Not covered is what does not come by a signal: `PyThreadState_SetAsyncExc`, by which one thread
raises an exception in another, and the end of the process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from torch_lazy_ext import _C

T = TypeVar("T")

# A timer may be faster than a capture: after so many attempts it waits.
PATIENCE = 2


def whole(fn: Callable[[], T]) -> T:
    """Call `fn`, which leaves nothing behind when a signal ends it, until it comes to an end.

    Raises:
        Interrupted: inside of another `whole`, which begins anew.
        Exception: what `fn` raises, or the handler of a signal.
    """
    for attempt in itertools.count():
        try:
            with _C.Hold(stops=attempt < PATIENCE):
                return fn()
        except _C.Interrupted:
            if _C.is_held():
                raise
        _C.run_handlers()
    raise AssertionError("unreachable")
