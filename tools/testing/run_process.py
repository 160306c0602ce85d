"""Runs the tests of one file in processes of their own, and survives what tests do to these.

A test that crashes or hangs its process is failed, and the file's other tests run in a new one. So
does a test that failed and may run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tools.testing.results import FileResult, TestResult

RUN_FILE = Path(__file__).with_name("run_file.py")
KEPT_OUTPUT = 16_000
"""How many characters of what a test printed are kept."""
GRACE = 10.0
"""Seconds that a process has to print its traceback, after it was told to end."""
POLL = 0.02


class Stopped(Exception):
    """Somebody asked for the run to end.

    Attributes:
        file: the results so far.
        running: the test that was running, its id; None if none was.
    """

    def __init__(self, file: FileResult, running: str | None) -> None:
        super().__init__(f"{file.file} was stopped")
        self.file = file
        self.running = running


@dataclasses.dataclass(frozen=True)
class Work:
    """Tests of one file, to run in one go: all of them, or those with the ids in `tests`."""

    file: str
    tests: tuple[str, ...] | None = None
    seconds: float = 0.0
    """How long it took when that was recorded."""


@dataclasses.dataclass
class Options:
    """How tests are run.

    Attributes:
        test_dir: the folder that the names of files start from.
        unittest_args: command line for unittest.
        env: the environment of the processes.
        timeout: seconds that a test may take, without those that it waits for a core.
        reruns: how often a test that failed is run again.
        first: for each file, ids of the tests to begin with.
        live: whether the processes print to the output of this one.
        stop: whether the run should end, asked all the time.
    """

    test_dir: Path
    unittest_args: list[str]
    env: dict[str, str]
    timeout: float
    reruns: int = 0
    first: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    live: bool = False
    stop: Callable[[], bool] = lambda: False


@dataclasses.dataclass
class _Ended:
    """How a process ended, and what it left."""

    events: list[dict[str, Any]]
    output: bytes
    failure: str  # how it ended, in words; nothing if it ended well
    finished: bool  # whether it came to its last test's end
    stopped: bool = False  # whether it was ended because the run should end


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exited with status {returncode}"


def _kill(process: subprocess.Popen, sig: signal.Signals) -> None:
    """Signal the process and all that it started."""
    try:
        os.killpg(process.pid, sig)
    except ProcessLookupError:
        process.poll()


def waited_for_a_core(pid: int) -> float:
    """Seconds that a process could have run, and others had the cores; 0 where nobody counts them.

    Of its first thread, which runs the tests.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _end(process: subprocess.Popen) -> None:
    """End a process that hangs: its handler of SIGABRT prints where it is."""
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):  # SIGKILL cannot be ignored.
        process.wait(GRACE)
    _kill(process, signal.SIGKILL)
    process.wait()


def _run_process(
    work: Work,
    options: Options,
    done: Iterable[str],
    tests: Iterable[str] | None,
    on_event: Callable[[dict[str, Any]], None],
    list_only: bool = False,
) -> _Ended:
    with tempfile.TemporaryDirectory() as folder:
        events_path, output_path = Path(folder, "events"), Path(folder, "output")
        events_path.touch()
        job = dict(
            path=str(options.test_dir / f"{work.file}.py"),
            events=str(events_path),
            tests=None if tests is None else list(tests),
            done=list(done),
            first=options.first.get(work.file, []),
            list_only=list_only,
            unittest_args=options.unittest_args,
        )
        job_path = Path(folder, "job")
        job_path.write_text(json.dumps(job))
        live = options.live and not list_only
        events: list[dict[str, Any]] = []
        timed_out = stopped = False
        with output_path.open("wb") as output, events_path.open() as reader:
            process = subprocess.Popen(
                [sys.executable, str(RUN_FILE), str(job_path)],
                stdin=subprocess.DEVNULL,
                stdout=None if live else output,
                stderr=None if live else subprocess.STDOUT,
                env=options.env,
                start_new_session=True,  # A group of its own, to be killed as one.
            )
            # What a busy machine keeps from a test is not counted: that does not hang.
            last, waited = time.monotonic(), waited_for_a_core(process.pid)
            line = ""
            try:
                while True:
                    ended = process.poll() is not None
                    while chunk := reader.readline():
                        line += chunk
                        if line.endswith("\n"):  # Else it is still being written.
                            events.append(json.loads(line))
                            on_event(events[-1])
                            line, last = "", time.monotonic()
                            waited = waited_for_a_core(process.pid)
                    if ended:
                        break
                    if options.stop():
                        stopped = True
                        break
                    seconds = time.monotonic() - last
                    if seconds > options.timeout and (
                        seconds - (waited_for_a_core(process.pid) - waited) > options.timeout
                    ):
                        timed_out = True
                        _end(process)
                    time.sleep(POLL)
            finally:
                _kill(process, signal.SIGKILL)  # Whatever the tests have left running.
                process.wait()
        finished = bool(events) and events[-1]["event"] == "end"
        failure = ""
        if stopped:
            pass
        elif timed_out:
            failure = f"timed out after {options.timeout:g} s"
        elif process.returncode != 0 or not finished:
            failure = describe_exit(process.returncode)
        return _Ended(events, output_path.read_bytes(), failure, finished, stopped)


def _tail(output: bytes, begin: int, end: int | None = None) -> str:
    text = output[begin:end].decode(errors="replace")
    return text if len(text) <= KEPT_OUTPUT else f"...{text[-KEPT_OUTPUT:]}"


def _results(work: Work, ended: _Ended) -> tuple[list[TestResult], bool]:
    """What the events of a process say, and whether tests may be left to run in another one."""
    results = []
    running, started, begin = None, False, 0
    for event in ended.events:
        if event["event"] == "start":
            running, started, begin = event["test"], True, event["printed"]
        elif event["event"] == "result":
            result = TestResult(
                work.file, event["test"], event["outcome"], event["seconds"], event["message"]
            )
            if result.outcome == "failed":
                result.output = _tail(ended.output, begin, event["printed"])
            results.append(result)
            running, begin = None, event["printed"]
    if ended.failure:
        where = "after its last test" if ended.finished else "outside any test"
        name = running or f"{Path(work.file).name} ({where})"
        output = _tail(ended.output, begin)
        results.append(TestResult(work.file, name, "failed", note=ended.failure, output=output))
    # Without a test in it, the next process would only end in the same way.
    return results, not ended.finished and started


def _skipped_by_fixtures(results: Iterable[TestResult]) -> tuple[str, ...]:
    """With what the ids of the tests begin that a setUpClass or setUpModule has skipped."""
    found = [
        re.fullmatch(r"setUp(?:Class|Module) \((.+)\)", r.test)
        for r in results
        if r.outcome == "skipped"
    ]
    return tuple(f"{match[1]}." for match in found if match)


def list_tests(work: Work, options: Options) -> list[str]:
    """The ids of the tests that running `work` would run; none if the file cannot be imported."""
    ended = _run_process(work, options, [], work.tests, lambda event: None, list_only=True)
    return [t for e in ended.events if e["event"] == "begin" for t in e["tests"]]


def run(
    work: Work, options: Options, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> tuple[FileResult, str]:
    """Run tests of one file: in one process, or one more for each that a test took down.

    Returns the results, and all that was printed (nothing with `options.live`). `on_event` gets
    the events of run_file.py, and a result for what took a process down, with a `note`.

    Raises:
        Stopped: `options.stop` said so.
    """
    begin = time.perf_counter()
    results: dict[str, TestResult] = {}
    chosen: dict[str, None] = {}
    printed = ""

    def file_result(running: str | None = None) -> FileResult:
        skipped = _skipped_by_fixtures(results.values())
        ran = {*results, running}
        not_run = [t for t in chosen if t not in ran and not t.startswith(skipped)]
        return FileResult(work.file, list(results.values()), time.perf_counter() - begin, not_run)

    def run_process(
        done: Iterable[str], tests: Iterable[str] | None
    ) -> tuple[list[TestResult], bool]:
        nonlocal printed
        ended = _run_process(work, options, done, tests, on_event)
        printed += ended.output.decode(errors="replace")
        chosen.update((t, None) for e in ended.events if e["event"] == "begin" for t in e["tests"])
        new, unfinished = _results(work, ended)
        if ended.failure:
            note = dict(outcome="failed", note=new[-1].note)
            on_event({"event": "result", "test": new[-1].test, **note})
        if ended.stopped:
            results.update({r.test: r for r in new if r.test not in results})
            last = ended.events[-1] if ended.events else {"event": "none"}
            running = last["test"] if last["event"] == "start" else None
            raise Stopped(file_result(running), running)
        return new, unfinished

    unfinished = True
    while unfinished:
        new, unfinished = run_process(results, work.tests)
        results.update({r.test: r for r in new})
    for _ in range(options.reruns):
        failed = [r.test for r in results.values() if r.outcome == "failed" and r.name]
        unfinished = bool(failed)
        ran: set[str] = set()
        while unfinished:
            left = [t for t in failed if t not in ran]
            new, unfinished = run_process([], left)
            for again in new:
                ran.add(again.test)
                if again.test in failed:
                    before = results[again.test]
                    again.failures = [*before.failures, before]
                    results[again.test] = again
                else:
                    results.setdefault(again.test, again)
    return file_result(), printed
