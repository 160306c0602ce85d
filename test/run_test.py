#!/usr/bin/env python3
"""Runs the test files under test/, each in its own process, and counts their tests.

    python test/run_test.py                                    everything
    python test/run_test.py -i lazy/test_extract_compiled_graph -v
    python test/run_test.py -k inplace                         tests with "inplace" in their name
    python test/run_test.py --shard 1 4                        the first of four parts
    python test/run_test.py -- --failfast                      options for unittest

The last line of the output is `N passed, N failed, N skipped`, summed over the tests of all files:
an expected failure counts as passed, an unexpected success as failed. A test that takes its
process down counts as failed, and the file's other tests run in a new process. The exit status is
0 if nothing failed and at least one test ran (or was skipped), else 1.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEST_DIR = Path(__file__).resolve().parent
OUTCOMES = ("passed", "failed", "skipped")


@dataclasses.dataclass
class TestResult:
    """What became of one test."""

    test: str  # unittest's id, "module.Class.method"
    outcome: str  # one of OUTCOMES
    seconds: float
    note: str = ""  # how the process ended, where the test took it down


@dataclasses.dataclass
class FileResult:
    """The results of one file's tests, and what its processes printed."""

    name: str
    tests: list[TestResult]
    seconds: float
    output: str


def counts(results: list[TestResult]) -> str:
    """The line people and tools read: "N passed, N failed, N skipped"."""
    outcomes = [r.outcome for r in results]
    return ", ".join(f"{outcomes.count(o)} {o}" for o in OUTCOMES)


def discover() -> list[str]:
    """Names of all test files, sorted: paths below test/, without ".py"."""
    paths = TEST_DIR.rglob("test_*.py")
    return sorted(p.relative_to(TEST_DIR).with_suffix("").as_posix() for p in paths)


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` (as given to -i or -x) is the name of a file or of a folder it is in."""
    pattern = pattern.removeprefix("test/").removesuffix(".py").rstrip("/")
    return name == pattern or name.startswith(pattern + "/")


def select(
    names: list[str], include: list[str], exclude: list[str], shard: tuple[int, int]
) -> list[str]:
    """The files to run: those included (all, if none is), less those excluded, of this shard.

    `shard` is (K, N) with 1 <= K <= N: files are dealt out in turn to N shards, this is the K-th.
    Raises ValueError for a pattern that matches no file.
    """
    for pattern in include + exclude:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"no test file is called {pattern!r}; --dry-run lists them")
    included = [n for n in names if not include or any(matches(n, p) for p in include)]
    chosen = [n for n in included if not any(matches(n, p) for p in exclude)]
    k, n = shard
    return chosen[k - 1 :: n]


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exited with status {returncode}"


def run_process(
    name: str, done: set[str], unittest_args: list[str], env: dict[str, str], live: bool
) -> tuple[list[TestResult], str, bool]:
    """Run the tests of file `name`, except those in `done`, in one process.

    Returns their results, what the process printed (nothing if `live`: then it prints to this
    process's output), and whether it ended before it had run all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        events_path, done_path = Path(folder, "events"), Path(folder, "done")
        events_path.touch()
        done_path.write_text("\n".join(done))
        process = subprocess.run(
            [
                sys.executable,
                str(TEST_DIR / "_run_file.py"),
                str(TEST_DIR / f"{name}.py"),
                str(events_path),
                str(done_path),
                *unittest_args,
            ],
            stdin=subprocess.DEVNULL,
            stdout=None if live else subprocess.PIPE,
            stderr=None if live else subprocess.STDOUT,
            env=env,
            text=True,
            errors="replace",
        )
        events = [json.loads(line) for line in events_path.read_text().splitlines()]

    results = []
    running, started = None, False
    for event in events:
        if event["event"] == "start":
            running, started = event["test"], True
        elif event["event"] == "result":
            results.append(TestResult(event["test"], event["outcome"], event["seconds"]))
            running = None
    finished = bool(events) and events[-1]["event"] == "end"
    if not finished:
        note = describe_exit(process.returncode)
        results.append(TestResult(running or f"{name} (outside any test)", "failed", 0.0, note))
    elif process.returncode != 0:
        note = describe_exit(process.returncode)
        results.append(TestResult(f"{name} (after its last test)", "failed", 0.0, note))
    # Without a test in it, the next process would only end in the same way.
    return results, process.stdout or "", not finished and started


def run_file(name: str, unittest_args: list[str], env: dict[str, str], live: bool) -> FileResult:
    """Run all tests of one file: in one process, or one more for each that a test took down."""
    begin = time.perf_counter()
    tests: list[TestResult] = []
    output = ""
    unfinished = True
    while unfinished:
        done = {result.test for result in tests}
        results, printed, unfinished = run_process(name, done, unittest_args, env, live)
        tests += results
        output += printed
    return FileResult(name, tests, time.perf_counter() - begin, output)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options; `unittest_args` holds those for unittest, `shard` is checked."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-i",
        "--include",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="run only these files or folders, named as in lazy/test_extract_compiled_graph",
    )
    parser.add_argument(
        "-x",
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="leave out these files or folders",
    )
    parser.add_argument(
        "-k",
        action="append",
        default=[],
        metavar="PATTERN",
        help="run only tests whose name matches, as for unittest; can be given again",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="name each test, and show what the tests print as they run, not only on failure",
    )
    parser.add_argument(
        "--shard",
        nargs=2,
        type=int,
        default=[1, 1],
        metavar=("K", "N"),
        help="run the K-th of N parts, counted from 1; the parts together are everything",
    )
    parser.add_argument(
        "--continue-through-error",
        action="store_true",
        help="run the files after one that failed too",
    )
    parser.add_argument(
        "--slow",
        action="store_true",
        help="run slow tests too: sets PYTORCH_TEST_WITH_SLOW=1",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files, run nothing")
    args = parser.parse_args(argv[:end])
    k, n = args.shard
    if not 1 <= k <= n:
        parser.error(f"--shard K N needs 1 <= K <= N, not {k} {n}")
    args.unittest_args = [
        *(["-v"] if args.verbose else []),
        *(f"-k{pattern}" for pattern in args.k),
        *argv[end + 1 :],
    ]
    return args


def main(argv: list[str]) -> int:
    """Run what the options in `argv` say; returns the exit status."""
    args = parse_args(argv)
    try:
        names = select(discover(), args.include, args.exclude, tuple(args.shard))
    except ValueError as e:
        print(f"run_test.py: error: {e}", file=sys.stderr)
        return 2
    env = {**os.environ, **({"PYTORCH_TEST_WITH_SLOW": "1"} if args.slow else {})}

    files: list[FileResult] = []
    for i, name in enumerate(names):
        print(name, end="\n" if args.dry_run or args.verbose else " ... ", flush=True)
        if args.dry_run:
            continue
        file = run_file(name, args.unittest_args, env, live=args.verbose)
        files.append(file)
        failed = any(t.outcome == "failed" for t in file.tests)
        line = f"{counts(file.tests)} in {file.seconds:.1f} s"
        print(f"{name}: {line}" if args.verbose else line, flush=True)
        if failed:
            print(file.output, flush=True)
            if not args.continue_through_error and i + 1 < len(names):
                print(
                    f"stopped after {name}, {len(names) - i - 1} files not run "
                    "(--continue-through-error runs them)"
                )
                break

    for file in files:
        for t in file.tests:
            if t.outcome == "failed":
                print(f"FAILED {file.name}: {t.test}" + (f" ({t.note})" if t.note else ""))
    tests = [t for file in files for t in file.tests]
    print(counts(tests), flush=True)
    if args.dry_run:
        return 0
    return 1 if not tests or any(t.outcome == "failed" for t in tests) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
