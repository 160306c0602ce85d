"""Every error of the package, under one root, so that one `except` catches them all.

Each message says what could not be captured, where in the user's program, and what to try next.
An error of the user's own program is never wrapped: it leaves with its own type.
"""

from __future__ import annotations


class ExtractionError(RuntimeError):
    """A program could not be captured, or a captured one could not be replayed."""


class FallbackError(ExtractionError):
    """An operator left the graph, because the fallback config names it or nothing can record it."""


class UnsupportedError(ExtractionError):
    """The program does something a graph cannot hold (sparse tensors, a replaced storage, ...)."""


class GuardError(ExtractionError):
    """A replay met other data than was captured, and `on_guard_failure="error"` forbids more."""
