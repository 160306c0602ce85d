"""Progress of a run while it runs: a live display on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.testing.results import FileResult, counts
from tools.testing.run_process import Work

HEARTBEAT = 60.0
"""Seconds after which a run that has nothing to say says where it is."""


class Progress:
    """Which works run, how many tests are done, and how long it may take.

    Prints a line for each work that is done, and one now and then in between. Its methods may be
    called from any thread; `with` it, the heart beats.
    """

    def __init__(self, works: Sequence[Work]) -> None:
        self._lock = threading.RLock()
        self._begin = time.monotonic()
        self._spoke = self._begin
        self._expected = {work: max(work.seconds, 0.1) for work in works}
        self._running: dict[Work, list[int]] = {}  # tests done, tests in all
        self._done: list[Work] = []
        self._tests = self._failed = 0
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Progress:
        self._beating.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._beating.join()

    def begin(self, work: Work) -> None:
        with self._lock:
            self._running[work] = [0, 0]
            self._changed()

    def event(self, work: Work, event: dict[str, Any]) -> None:
        """Take note of an event that run_file.py wrote."""
        with self._lock:
            now = self._running[work]
            if event["event"] == "begin":
                now[1] = now[0] + len(event["tests"])  # The process may be the second one.
            elif event["event"] == "result":
                now[0] += 1
                self._tests += 1
                if event["outcome"] == "failed":
                    self._failed += 1
                    note = f" ({event['note']})" if event.get("note") else ""
                    self.print(f"{work.file}: {event['test']} failed{note}")
            self._changed()

    def end(self, work: Work, file: FileResult) -> None:
        with self._lock:
            del self._running[work]
            self._done.append(work)
            self.print(
                f"{describe(work)}: {counts(file.tests)} in {file.seconds:.1f} s "
                f"[{len(self._done)}/{len(self._expected)}{self._left()}]"
            )
            self._changed()

    def print(self, text: str) -> None:
        with self._lock:
            self._spoke = time.monotonic()
            self._write(text)

    def status(self) -> str:
        """One line about now."""
        with self._lock:
            running = ", ".join(
                describe(work) + (f" ({done}/{tests})" if tests else "")
                for work, (done, tests) in self._running.items()
            )
            failed = f", {self._failed} failed" if self._failed else ""
            return f"{self._tests} tests done{failed}{self._left()}; running {running or 'nothing'}"

    def _left(self) -> str:
        done = sum(self._expected[w] for w in self._done)
        for work, (tests, of) in self._running.items():
            done += self._expected[work] * tests / of if of else 0.0
        fraction = done / sum(self._expected.values())
        if not 0.05 < fraction < 1:
            return ""
        seconds = (time.monotonic() - self._begin) * (1 - fraction) / fraction
        return (
            f", about {max(1, round(seconds))} s left"
            if seconds < 90
            else (f", about {round(seconds / 60)} min left")
        )

    def _beat(self) -> None:
        while not self._ended.wait(1.0):
            with self._lock:
                if self._running and time.monotonic() - self._spoke > HEARTBEAT:
                    self.print(self.status())

    def _write(self, text: str) -> None:
        print(text, flush=True)

    def _changed(self) -> None:
        """Show what `status` says now, where it is shown all the time."""


class LiveProgress(Progress):
    """The same with a line at the bottom of the terminal that is always up to date."""

    def __init__(self, works: Sequence[Work]) -> None:
        from rich.status import Status

        super().__init__(works)
        self._status = Status("")

    def __enter__(self) -> Progress:
        self._status.start()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._status.stop()

    def _write(self, text: str) -> None:
        self._status.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _changed(self) -> None:
        from rich.text import Text

        self._status.update(Text(self.status()))


def describe(work: Work) -> str:
    return work.file if work.tests is None else f"{work.file} ({len(work.tests)} tests)"


def choose() -> Callable[[Sequence[Work]], Progress]:
    """The live display where there is a terminal to show it on, and rich to make it."""
    if not sys.stdout.isatty():
        return Progress
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        return Progress
    return LiveProgress
