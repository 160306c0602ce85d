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


def run_all(
    works: Sequence[Work],
    options: Options,
    jobs: int,
    progress: Progress,
    keep_going: bool,
    verbose: bool,
    on_file: Callable[[list[FileResult]], None],
) -> tuple[list[FileResult], list[Work]]:
    """Run `works` in their order, `jobs` at a time.

    Returns the results, and the works that did not begin, because a test had failed and not
    `keep_going`. Prints what failed as soon as it is known, and with `verbose` all there is. Calls
    `on_file` with the results so far, whenever there is one more.
    """
    left = collections.deque(works)
    files: list[FileResult] = []
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
            file, printed = run_process.run(work, options, functools.partial(progress.event, work))
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
        except Stopped:
            pass
        except BaseException:
            stop.set()  # Ctrl-C: the processes of the tests end with this one.
            raise
    return files, list(left)
