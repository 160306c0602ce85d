"""Runs the tests of one file and writes what happens to them, line by line, to an events file.

run_test.py starts this in a process of its own, so that whatever a test does to its process, the
events up to that moment are on disk:

    {"event": "start", "test": ID}
    {"event": "result", "test": ID, "outcome": "passed" | "failed" | "skipped", "seconds": S}
    {"event": "end"}

Outcomes follow from unittest's: an expected failure passed, an unexpected success failed. A test
has one outcome, however many subtests it has. What happens outside any test (import, class and
module fixtures) is a result without a start.
"""

import faulthandler
import importlib.util
import json
import sys
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def write_event(events: TextIO, event: str, **fields: object) -> None:
    """Append one event, so that it is on disk when this returns."""
    print(json.dumps({"event": event, **fields}), file=events, flush=True)


class RecordingResult(unittest.TextTestResult):
    """Prints what unittest prints, and writes the events of the module's docstring to `events`."""

    def __init__(self, events: TextIO, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._events = events
        self._running: unittest.TestCase | None = None
        self._outcome: str | None = None  # Of the running test, so far.
        self._started = 0.0

    def startTest(self, test) -> None:
        self._running, self._outcome, self._started = test, None, time.perf_counter()
        write_event(self._events, "start", test=test.id())
        super().startTest(test)

    def stopTest(self, test) -> None:
        super().stopTest(test)
        self._write_result(test, self._outcome, time.perf_counter() - self._started)
        self._running = None

    def addSuccess(self, test) -> None:
        super().addSuccess(test)
        self._record(test, "passed")

    def addExpectedFailure(self, test, err) -> None:
        super().addExpectedFailure(test, err)
        self._record(test, "passed")

    def addSkip(self, test, reason) -> None:
        super().addSkip(test, reason)
        # A skipped subtest makes its test skipped only if no other subtest ran.
        if self._running in (None, test) or self._outcome is None:
            self._record(test, "skipped")

    def addFailure(self, test, err) -> None:
        super().addFailure(test, err)
        self._record(test, "failed")

    def addError(self, test, err) -> None:
        super().addError(test, err)
        self._record(test, "failed")

    def addSubTest(self, test, subtest, err) -> None:
        super().addSubTest(test, subtest, err)
        self._record(test, "passed" if err is None else "failed")

    def addUnexpectedSuccess(self, test) -> None:
        super().addUnexpectedSuccess(test)
        self._record(test, "failed")

    def _record(self, test, outcome: str) -> None:
        if self._running is None:
            self._write_result(test, outcome, 0.0)
        elif self._outcome != "failed":
            self._outcome = outcome

    def _write_result(self, test, outcome: str, seconds: float) -> None:
        write_event(
            self._events, "result", test=test.id(), outcome=outcome, seconds=round(seconds, 4)
        )


class RecordingProgram(unittest.TestProgram):
    """unittest's command line, on a loaded module, leaving out the tests in `done`."""

    def __init__(self, module, argv: list[str], events: TextIO, done: set[str]) -> None:
        self._events = events
        self._done = done
        super().__init__(module=module, argv=argv)

    def runTests(self) -> None:
        runner = unittest.TextTestRunner(
            verbosity=self.verbosity,
            failfast=self.failfast,
            buffer=self.buffer,
            warnings=self.warnings,
            tb_locals=self.tb_locals,
            resultclass=lambda *args, **kwargs: RecordingResult(self._events, *args, **kwargs),
        )
        suite = unittest.TestSuite(t for t in flatten(self.test) if t.id() not in self._done)
        runner.run(suite)
        write_event(self._events, "end")


def flatten(test: unittest.TestSuite | unittest.TestCase) -> Iterator[unittest.TestCase]:
    """The test cases of a suite, in order."""
    if isinstance(test, unittest.TestSuite):
        for part in test:
            yield from flatten(part)
    else:
        yield test


def load(path: Path):
    """Import a test file under its own name, with the import path `python path` would have."""
    sys.path[0] = str(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main(path: Path, events_path: Path, done_path: Path, unittest_args: list[str]) -> None:
    """Run the tests of `path`, except those whose ids are the lines of the file `done_path`."""
    faulthandler.enable()
    # As the file would see it when it is run by itself.
    sys.argv = [str(path), *unittest_args]
    done = set(done_path.read_text().splitlines())
    with events_path.open("a") as events:
        try:
            module = load(path)
        except unittest.SkipTest as e:
            print(f"skipped: {e}")
            write_event(events, "result", test=path.stem, outcome="skipped", seconds=0.0)
            write_event(events, "end")
        else:
            RecordingProgram(module, sys.argv, events, done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
