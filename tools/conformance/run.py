"""Runs items in worker processes, keeps each result at once, and goes on where it was stopped."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.conformance.items import ROOT, Item
from tools.testing.run_process import describe_exit

WORKER = Path(__file__).with_name("worker.py")


def fingerprint() -> str:
    """What results depend on: the package that is tried, and what it is compared by."""
    found = importlib.util.find_spec("torch_lazy_ext")
    if found is None or found.origin is None:
        sys.exit("torch_lazy_ext is not installed here: run `pip install -e .`")
    digest = hashlib.sha256()
    for folder in (Path(found.origin).parent, ROOT / "test/lazy", ROOT / "tools/conformance"):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".so"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """Results by the key of their item, in a file that holds a line for each.

    A file that another state of the sources has written is replaced.
    """

    def __init__(self, path: Path, state: str) -> None:
        self.path = path
        self.by_key: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        header, *lines = path.read_text().splitlines() if path.exists() else [""]
        if header == state:
            for line in lines:
                try:
                    result = json.loads(line)
                except json.JSONDecodeError:
                    continue  # Half a line, written when the run was stopped: it runs again.
                self.by_key[Item(**result["item"]).key] = result
        self.path.write_text("\n".join([state, *map(json.dumps, self.by_key.values())]) + "\n")

    def add(self, item: Item, result: dict[str, Any]) -> None:
        line = {"item": dataclasses.asdict(item), **result}
        with self._lock, self.path.open("a") as file:
            self.by_key[item.key] = line
            print(json.dumps(line), file=file)


class Worker:
    """A process that checks items; a new one when an item took it down."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None

    def check(self, item: Item) -> dict[str, Any]:
        process = self._process
        if process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert process.stdin is not None and process.stdout is not None
        timed_out = threading.Event()

        def expire() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(self._timeout, expire)
        timer.start()
        try:
            print(json.dumps(dataclasses.asdict(item)), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        self._process = None
        how = describe_exit(process.wait())
        if timed_out.is_set():
            return dict(outcome="timed out", reason=f"longer than {self._timeout:g} s", line="")
        return dict(outcome="crashed", reason=how, line="")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def run(
    items: Sequence[Item],
    results: Results,
    jobs: int,
    timeout: float,
    on_result: Callable[[Item, dict[str, Any]], None],
) -> None:
    """Check those `items` that have no result yet, `jobs` at a time."""
    left = collections.deque(item for item in items if item.key not in results.by_key)
    stop = threading.Event()

    def work() -> None:
        worker = Worker(timeout)
        try:
            while not stop.is_set():
                try:
                    item = left.popleft()
                except IndexError:
                    return
                result = worker.check(item)
                results.add(item, result)
                on_result(item, result)
        finally:
            worker.close()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work) for _ in range(jobs)]
        try:
            for future in concurrent.futures.as_completed(workers):
                future.result()
        except BaseException:
            stop.set()
            raise
