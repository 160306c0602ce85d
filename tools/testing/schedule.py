"""Runs works one after the other, or several at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence

from tools.testing import run_process
from tools.testing.progress import Progress
from tools.testing.results import FileResult, describe_failure
from tools.testing.run_process import Options, Stopped, Work


@dataclasses.dataclass
class Outcome:
    """What became of a run.

    Attributes:
        files: the results, of a file that was stopped those so far.
        left: the works that did not begin.
        running: (file, id) of the tests that were running when the run was stopped.
        interrupted: what stopped the run, if it was not a failure.
    """

    files: list[FileResult] = dataclasses.field(default_factory=list)
    left: list[Work] = dataclasses.field(default_factory=list)
    running: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    interrupted: BaseException | None = None


def run_all(
    works: Sequence[Work],
    options: Options,
    jobs: int,
    progress: Progress,
    keep_going: bool,
    verbose: bool,
    on_file: Callable[[list[FileResult]], None],
) -> Outcome:
    """Run `works` in their order, `jobs` at a time.

    Works are left where a test has failed and not `keep_going`, and at Ctrl-C or a request to end.
    Prints what failed as soon as it is known, and with `verbose` all there is. Calls `on_file` with
    the results so far, whenever there is one more.
    """
    left = collections.deque(works)
    outcome = Outcome()
    files = outcome.files
    lock = threading.Lock()
    failed, stop = threading.Event(), threading.Event()
    options = dataclasses.replace(options, stop=stop.is_set)

    def worker() -> None:
        while True:
            with lock:
                if not left or stop.is_set() or (failed.is_set() and not keep_going):
                    return
                work = left.popleft()
            progress.begin(work)
            try:
                on_event = functools.partial(progress.event, work)
                file, printed = run_process.run(work, options, on_event)
            except Stopped as e:
                with lock:
                    files.append(e.file)
                    if e.running is not None:
                        outcome.running.append((work.file, e.running))
                return
            with lock:
                files.append(file)
                on_file(files)
            failures = [r for r in file.tests if r.outcome == "failed"]
            if failures:
                failed.set()
            if verbose and printed:
                progress.print(f"{work.file} printed:\n{printed.rstrip()}\n")
            for result in file.tests:
                for failure in [*result.failures, result]:
                    if failure.outcome == "failed":
                        progress.print(describe_failure(failure))
            progress.end(work, file)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(worker) for _ in range(jobs)]
        try:
            for future in concurrent.futures.as_completed(workers):
                future.result()
        except (KeyboardInterrupt, SystemExit) as e:
            stop.set()  # The processes of the tests end with this one.
            outcome.interrupted = e
        except BaseException:
            stop.set()
            raise
    outcome.left = list(left)
    return outcome
