"""Policy: whether a call that no variant answers is worth a capture.

A capture costs as much as tens to hundreds of eager calls, and has to be paid for by the calls that
it answers. A program that is never twice the same (a number that counts, lengths that do not come
again, data that decides anew) would be captured by each call: after a while its calls run eagerly,
and a capture is tried again exponentially seldom.
"""

from __future__ import annotations

import time

FREE = 32  # captures before any has to be paid for; more where more variants are kept
PRICE = 100  # calls that a capture has to answer for another one
SHARE = 0.05  # of the time of eager calls that goes into captures, and as much into looks
PATIENCE = 16  # calls that may run eagerly before what the looks cost counts
DOUBLINGS = 8


class Policy:
    """Counts what captures cost, and what they bring.

    Args:
        limit: how many variants are kept.

    Attributes:
        captures: how many there were.
    """

    def __init__(self, limit: int) -> None:
        self._free = max(FREE, limit)
        self.captures = 0
        self._capture_seconds = 0.0
        self._eager_calls = 0
        self._eager_seconds = 0.0
        self._look_seconds = 0.0
        self._tries = 0
        self._blocked = 0  # calls that ran eagerly without a look
        self._wait = 0.0  # seconds of eager calls before the next try
        self._answered = 0  # calls that were answered

    def missed(self, hits: int) -> None:
        """No variant answers a call.

        Args:
            hits: calls that variants have answered so far, dropped ones too. The first one of each
                capture is the call that it was made for.
        """
        self._answered = max(0, hits - self.captures)

    def may_capture(self) -> bool:
        """Whether to capture again, for a call that was missed."""
        if self.captures < self._free + self._answered // PRICE:
            self._tries = 0
            return True
        if self._tries == 0:
            self._try_later()
        if self._wait > 0:
            return False
        self._try_later()
        return True

    def _try_later(self) -> None:
        mean = self._capture_seconds / max(1, self.captures)
        self._wait = mean / SHARE * 2 ** min(self._tries, DOUBLINGS)
        self._tries += 1

    def captured(self, seconds: float) -> None:
        self.captures += 1
        self._capture_seconds += seconds

    def ran_eagerly(self, look: float, seconds: float) -> int:
        """A call that was missed ran eagerly.

        Args:
            look: seconds that it took to find that no variant answers it.
            seconds: that the program took.

        Returns:
            How many of the next calls are to run eagerly without a look at the variants.
        """
        self._eager_calls += 1
        self._eager_seconds += seconds
        self._look_seconds += look
        self._wait -= seconds
        if self._eager_calls < PATIENCE:
            return 0
        mean = self._eager_seconds / self._eager_calls
        calls = self._eager_calls + self._blocked + self._answered
        block = max(0, int(self._look_seconds / (SHARE * mean)) - calls)
        self._blocked += block
        self._wait -= block * mean
        return block


def now() -> float:
    """Seconds, to take differences of."""
    return time.perf_counter()
