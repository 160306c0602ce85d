#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Runs the test files under test/, each in its own process, and counts their tests.

    python test/run_test.py                                    everything but slow tests
    python test/run_test.py -i lazy/test_extract_compiled_graph -v
    python test/run_test.py -k inplace                         tests with "inplace" in their name
    python test/run_test.py --slow --shard 1 4                 the first of four parts
    python test/run_test.py --failed-first --keep-going        what failed last time, then the rest
    python test/run_test.py -- --failfast                      options for unittest

The last lines of the output say what did not run, and how long it all took. The very last one is
`N passed, N failed, N skipped`, summed over the tests of all files:
an expected failure counts as passed, an unexpected success as failed. A test that takes its
process down, or takes longer than --timeout, counts as failed, and the file's other tests run in a
new process. A test that passes when it is run again (--reruns) counts as passed and is reported as
flaky. The exit status is 0 if nothing failed and at least one test ran (or was skipped), else 1.

With argcomplete installed, `eval "$(register-python-argcomplete test/run_test.py)"` makes the
shell complete the names of files.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import sys
import time
from pathlib import Path

TEST_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(TEST_DIR.parent))
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.

from tools.stats.test_times import TestTimes  # noqa: E402
from tools.testing import progress, results, run_process, schedule, shards  # noqa: E402
from tools.testing.discover_tests import discover, folders, normalize, select  # noqa: E402
from tools.testing.run_process import Options, Work  # noqa: E402
from tools.testing.schedule import Outcome  # noqa: E402

REPORTS = TEST_DIR / "test-reports"
FAILED = TEST_DIR.parent / ".test_cache" / "failed.json"
SLOW_VARIABLE = "PYTORCH_TEST_WITH_SLOW"


def default_jobs() -> int:
    """One process for each core at hand, at most four."""
    return min(4, len(os.sched_getaffinity(0)))


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options, checked; `unittest_args` holds those for unittest."""
    end = argv.index("--") if "--" in argv else len(argv)
    names = discover(TEST_DIR)
    choices = [*names, *folders(names)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    selection = parser.add_argument_group("which tests")
    for short, long, text in (
        ("-i", "--include", "run only these files or folders: lazy/test_state, lazy"),
        ("-x", "--exclude", "leave out these files or folders"),
    ):
        selection.add_argument(
            short, long, nargs="+", action="extend", default=[], metavar="NAME",
            type=normalize, choices=choices, help=text,
        )  # fmt: skip
    selection.add_argument(
        "-k", action="append", default=[], metavar="PATTERN",
        help="only tests whose name matches, as for unittest; can be given again",
    )  # fmt: skip
    selection.add_argument(
        "--slow", action="store_true", default=os.environ.get(SLOW_VARIABLE) == "1",
        help=f"slow tests too; the same as {SLOW_VARIABLE}=1",
    )  # fmt: skip
    selection.add_argument(
        "--shard", nargs=2, type=int, default=[1, 1], metavar=("K", "N"),
        help="the K-th of N parts that take about equally long, counted from 1; together they "
        "are everything",
    )  # fmt: skip
    running = parser.add_argument_group("how to run them")
    running.add_argument(
        "--continue-through-error", "--keep-going", action="store_true",
        help="run the files after one that failed too",
    )  # fmt: skip
    running.add_argument(
        "--failed-first", action="store_true", help="begin with the tests that failed last time"
    )
    running.add_argument(
        "--jobs", type=int, default=default_jobs(), metavar="N",
        help="how many files to run at a time (here %(default)s)",
    )  # fmt: skip
    running.add_argument(
        "--reruns", type=int, default=0, metavar="N",
        help="run a failed test again, up to N times; one that passes then is flaky",
    )  # fmt: skip
    running.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help="how long a test may take (default: 600, 3600 with --slow)",
    )  # fmt: skip
    running.add_argument("--dry-run", action="store_true", help="list the files, run nothing")
    output = parser.add_argument_group("what to show")
    output.add_argument(
        "-v", "--verbose", action="store_true",
        help="name each test and show what it prints, not only on failure",
    )  # fmt: skip
    output.add_argument(
        "--save-xml", nargs="?", type=Path, const=REPORTS, metavar="DIR",
        help="write the results as JUnit XML (to test/test-reports)",
    )  # fmt: skip
    try:
        import argcomplete
    except ModuleNotFoundError:
        pass
    else:
        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv[:end])
    k, n = args.shard
    if not 1 <= k <= n:
        parser.error(f"--shard K N needs 1 <= K <= N, not {k} {n}")
    if args.jobs < 1:
        parser.error("--jobs needs at least 1")
    if args.timeout is None:
        args.timeout = 3600.0 if args.slow else 600.0
    args.names = select(names, args.include, args.exclude)
    args.chosen = [*(f"-k{pattern}" for pattern in args.k), *argv[end + 1 :]]
    args.unittest_args = [*(["-v"] if args.verbose else []), *args.chosen]
    return args


def environment(slow: bool, jobs: int) -> dict[str, str]:
    """The environment of the test processes: the cores are divided among them."""
    env = dict(os.environ)
    if jobs > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    # Else a thread that waits for another takes the core that this one needs, when something else
    # keeps the machine busy: tests take ten times as long.
    env.setdefault("OMP_WAIT_POLICY", "passive")
    env[SLOW_VARIABLE] = "1" if slow else "0"
    return env


def read_failed() -> dict[str, list[str]]:
    """The tests that failed when they ran last, by file."""
    return json.loads(FAILED.read_text()) if FAILED.exists() else {}


def remember_failed(files: list[results.FileResult], whole: bool) -> None:
    """Keep for --failed-first which tests failed; those that did not run stay as they were.

    `whole` says that all tests of `files` ran, so that others of these files are gone.
    """
    failed = {name: set(tests) for name, tests in read_failed().items()}
    if whole:
        failed = {
            name: tests for name, tests in failed.items() if name not in {f.file for f in files}
        }
    for file in files:
        tests = failed.setdefault(file.file, set())
        for r in file.tests:
            (tests.add if r.outcome == "failed" else tests.discard)(r.test)
    FAILED.parent.mkdir(exist_ok=True)
    FAILED.write_text(json.dumps({name: sorted(t) for name, t in failed.items() if t}))


def choose_works(args: argparse.Namespace, options: Options) -> list[Work]:
    """What to run, in this order."""
    times = TestTimes.load(args.slow)
    args.recorded = bool(times.files)

    def list_tests(work: Work) -> list[str]:
        return run_process.list_tests(work, options)

    k, n = args.shard
    works = shards.plan([Work(name) for name in args.names], times, n, list_tests)[k - 1]
    if args.jobs > 1 and not args.dry_run:
        works = [w for part in shards.plan(works, times, args.jobs, list_tests) for w in part]
        works.sort(key=lambda w: -w.seconds)  # A long one must not be the last one.
    return sorted(works, key=lambda w: w.file not in options.first)


def remarks(args: argparse.Namespace, outcome: Outcome) -> list[str]:
    """What the counts do not say: why the run ended early, what did not run or was not found."""
    lines = []
    for file, test in outcome.running:
        lines.append(f"STOPPED in {file}: {test}")
    if outcome.left:
        why = "" if outcome.interrupted else " after a failure (--keep-going runs them)"
        names = " ".join(progress.describe(w) for w in outcome.left)
        lines.append(f"NOT RUN{why}, {len(outcome.left)} files: {names}")
    for file in outcome.files:
        if file.not_run:
            lines.append(f"NOT RUN {file.file}, {len(file.not_run)} tests: {brief(file.not_run)}")
    if not outcome.left and not outcome.interrupted:
        ran = [r.test for file in outcome.files for r in file.tests]
        where = f"these {len(args.names)} files" if args.shard == [1, 1] else "this shard"
        lines += [f"NOTHING of {where} matches -k {k}" for k in args.k if not any_matches(ran, k)]
        if not ran and not args.k:
            lines.append("NOTHING to run")
    return lines


def brief(tests: list[str]) -> str:
    """The first of these names."""
    return " ".join(tests[:3]) + (" ..." if len(tests) > 3 else "")


def any_matches(tests: list[str], pattern: str) -> bool:
    """Whether one of `tests` matches, as unittest's -k has it."""
    return any(fnmatch.fnmatchcase(t, pattern if "*" in pattern else f"*{pattern}*") for t in tests)


def main(argv: list[str]) -> int:
    """Run what the options in `argv` say; returns the exit status."""
    begin = time.monotonic()
    args = parse_args(argv)
    options = Options(
        test_dir=TEST_DIR,
        unittest_args=args.unittest_args,
        env=environment(args.slow, args.jobs),
        timeout=args.timeout,
        reruns=args.reruns,
        first=read_failed() if args.failed_first else {},
        live=args.verbose and args.jobs == 1,
    )
    try:
        works = choose_works(args, options)
    except (KeyboardInterrupt, SystemExit) as e:
        print(f"NOT RUN, {len(args.names)} files\n{results.counts([])}", flush=True)
        return status_of(e)
    if args.dry_run:
        print("\n".join([*map(progress.describe, works), results.counts([])]))
        return 0

    k, n = args.shard

    def save(files: list[results.FileResult]) -> None:
        # At once: a run that is stopped half-way has its reports.
        if args.save_xml is not None:
            results.save_xml(args.save_xml, files, f"-shard{k}of{n}" if n > 1 else "")

    if args.recorded:
        files = len({w.file for w in works})
        expected = sum(w.seconds for w in works) / min(args.jobs, max(1, len(works)))
        print(
            f"{files} files, about {max(1, round(expected / 60))} min on an idle machine",
            flush=True,
        )
    with progress.choose()(works) as shown:
        outcome = schedule.run_all(
            works, options, args.jobs, shown, args.continue_through_error, args.verbose, save
        )
    stopped = bool(outcome.left) or outcome.interrupted is not None
    remember_failed(outcome.files, whole=n == 1 and not stopped and not args.chosen)
    tests = [t for file in outcome.files for t in file.tests]
    took = f"took {results.duration(time.monotonic() - begin)}"
    print(results.summary(tests, args.slow, [*remarks(args, outcome), took]), flush=True)
    if outcome.interrupted is not None:
        return status_of(outcome.interrupted)
    return 1 if not tests or any(t.outcome == "failed" for t in tests) else 0


def status_of(interrupted: BaseException) -> int:
    """The exit status after Ctrl-C or a request to end, as shells have it."""
    return 128 + (signal.SIGINT if isinstance(interrupted, KeyboardInterrupt) else signal.SIGTERM)


if __name__ == "__main__":
    # As Ctrl-C: what ends the runner ends the processes of the tests.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    sys.exit(main(sys.argv[1:]))
