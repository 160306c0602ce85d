"""Runs tests of one file and writes what happens to them, line by line, to an events file.

The runner starts this in a process of its own, so that whatever a test does to its process, the
events up to that moment are on disk:

    {"event": "begin", "tests": [ID, ...]}
    {"event": "start", "test": ID, "printed": N}
    {"event": "result", "test": ID, "outcome": "passed" | "failed" | "skipped", "seconds": S,
     "message": TEXT, "printed": N}
    {"event": "end"}

`printed` is how many bytes the process has printed, where that goes to a file. Outcomes follow from
unittest's: an expected failure passed, an unexpected success failed. A test has one outcome,
however many subtests it has. What happens outside any test (import, class and module fixtures) is
a result without a start.

The only argument is a file with a JSON object: `path` of the test file, `events` file, `tests` to
run (null: all), `done` (tests not to run), `first` (tests to run before the others), `list_only`
(no test is run, and the events are "begin" and "end"), `unittest_args`.
"""

import faulthandler
import importlib.util
import json
import os
import sys
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def write_event(events: TextIO, event: str, **fields: object) -> None:
    """Append one event, so that it is on disk when this returns."""
    print(json.dumps({"event": event, **fields}), file=events, flush=True)


def printed() -> int:
    """How many bytes this process has printed so far, if it prints to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fstat(1).st_size


class RecordingResult(unittest.TextTestResult):
    """Prints what unittest prints, and writes the events of the module's docstring to `events`."""

    def __init__(self, events: TextIO, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._events = events
        self._running: unittest.TestCase | None = None
        self._outcome: str | None = None  # Of the running test, so far.
        self._messages: list[str] = []
        self._started = 0.0

    def startTest(self, test) -> None:
        self._running, self._outcome, self._messages = test, None, []
        write_event(self._events, "start", test=test.id(), printed=printed())
        super().startTest(test)
        self._started = time.perf_counter()

    def stopTest(self, test) -> None:
        seconds = time.perf_counter() - self._started
        super().stopTest(test)
        self._write_result(test, self._outcome, seconds)
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
            self._record(test, "skipped", reason)

    def addFailure(self, test, err) -> None:
        super().addFailure(test, err)
        self._record(test, "failed", self._exc_info_to_string(err, test))

    def addError(self, test, err) -> None:
        super().addError(test, err)
        self._record(test, "failed", self._exc_info_to_string(err, test))

    def addSubTest(self, test, subtest, err) -> None:
        super().addSubTest(test, subtest, err)
        if err is None:
            self._record(test, "passed")
        else:
            where = subtest._subDescription()
            self._record(test, "failed", f"{where}\n{self._exc_info_to_string(err, test)}")

    def addUnexpectedSuccess(self, test) -> None:
        super().addUnexpectedSuccess(test)
        self._record(test, "failed", "unexpected success: expectedFailure has to go")

    def _record(self, test, outcome: str, message: str = "") -> None:
        if outcome != self._outcome == "skipped":
            self._messages = []  # Reasons of skipped subtests, and others ran.
        if message:
            self._messages.append(message)
        if self._running is None:
            self._write_result(test, outcome, 0.0)
            self._messages = []
        elif self._outcome != "failed":
            self._outcome = outcome

    def _write_result(self, test, outcome: str, seconds: float) -> None:
        write_event(
            self._events,
            "result",
            test=test.id(),
            outcome=outcome,
            seconds=round(seconds, 4),
            message="\n".join(self._messages),
            printed=printed(),
        )


class RecordingProgram(unittest.TestProgram):
    """unittest's command line, on a loaded module, with the tests that the job chooses."""

    def __init__(self, module, argv: list[str], events: TextIO, job: dict) -> None:
        self._events = events
        self._job = job
        super().__init__(module=module, argv=argv)

    def runTests(self) -> None:
        tests, done, first = self._job["tests"], set(self._job["done"]), set(self._job["first"])
        chosen = [t for t in flatten(self.test) if t.id() not in done]
        if tests is not None:
            wanted = set(tests)
            chosen = [t for t in chosen if t.id() in wanted]
        chosen.sort(key=lambda t: t.id() not in first)
        write_event(self._events, "begin", tests=[t.id() for t in chosen])
        if not self._job["list_only"]:
            runner = unittest.TextTestRunner(
                verbosity=self.verbosity,
                failfast=self.failfast,
                buffer=self.buffer,
                warnings=self.warnings,
                tb_locals=self.tb_locals,
                resultclass=lambda *args, **kwargs: RecordingResult(self._events, *args, **kwargs),
            )
            runner.run(unittest.TestSuite(chosen))
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


def main(job: dict) -> None:
    """Do the job that the module's docstring describes."""
    faulthandler.enable()
    path = Path(job["path"])
    # As the file would see it when it is run by itself.
    sys.argv = [str(path), *job["unittest_args"]]
    with Path(job["events"]).open("a") as events:
        try:
            module = load(path)
        except unittest.SkipTest as e:
            print(f"skipped: {e}")
            write_event(events, "begin", tests=[path.stem])
            fields = dict(seconds=0.0, message=str(e), printed=printed())
            write_event(events, "result", test=path.stem, outcome="skipped", **fields)
            write_event(events, "end")
        else:
            RecordingProgram(module, sys.argv, events, job)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
