#!/usr/bin/env python3
"""How long tests take, as recorded in test_times.json: what shards and jobs are balanced by.

    python test/run_test.py --save-xml
    python tools/stats/test_times.py test/test-reports

reads the XML of a run and records its times, with `--slow` as those of the slow set. Files that
were not run keep the times they had, unless they are gone.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

PATH = Path(__file__).with_name("test_times.json")
BY_TEST = 8.0
"""Files that take longer than so many seconds are recorded test by test."""


@dataclasses.dataclass
class FileTimes:
    """Seconds that one file takes.

    Attributes:
        startup: what is spent outside of tests, in each process: imports above all.
        total: what all tests take together.
        tests: seconds by "Class.method"; empty for a short file.
    """

    startup: float
    total: float
    tests: dict[str, float] = dataclasses.field(default_factory=dict)

    def of(self, test_id: str) -> float:
        """Seconds of a test; a new one is taken to be like most tests of its file."""
        name = test_id.partition(".")[2]
        if name in self.tests:
            return self.tests[name]
        return statistics.median(self.tests.values()) if self.tests else 0.0


class TestTimes:
    """The recorded times of one set of tests."""

    def __init__(self, files: dict[str, FileTimes]) -> None:
        self.files = files

    def of(self, file: str) -> FileTimes:
        """The times of a file; a new one is taken to be like most files."""
        if file in self.files or not self.files:
            return self.files.get(file, FileTimes(0.0, 1.0))
        return FileTimes(
            statistics.median(t.startup for t in self.files.values()),
            statistics.median(t.total for t in self.files.values()),
        )

    @classmethod
    def load(cls, slow: bool, path: Path = PATH) -> TestTimes:
        """The recorded times; in the slow set a file may have those of the default set only."""
        sets = json.loads(path.read_text()) if path.exists() else {}
        entries = {**sets.get("default", {}), **(sets.get("slow", {}) if slow else {})}
        files = {}
        for name, entry in entries.items():
            tests = {
                f"{c}.{t}": s for c, by in entry.get("tests", {}).items() for t, s in by.items()
            }
            files[name] = FileTimes(entry["startup"], entry["total"], tests)
        return cls(files)


def read_reports(folder: Path) -> dict[str, FileTimes]:
    """The times in the JUnit XML of a run, wherever below `folder`: shards are put together."""
    totals: dict[str, float] = collections.defaultdict(float)
    startups: dict[str, list[float]] = collections.defaultdict(list)
    tests: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for path in sorted(folder.rglob("*.xml")):
        suite = ElementTree.parse(path).getroot()
        file = suite.attrib["name"]
        spent = 0.0
        for case in suite.iter("testcase"):
            seconds = float(case.attrib["time"])
            tests[file][f"{case.attrib['classname']}.{case.attrib['name']}"] = seconds
            spent += seconds
        totals[file] += spent
        startups[file].append(max(0.0, float(suite.attrib["time"]) - spent))
    return {
        file: FileTimes(statistics.median(startups[file]), total, tests[file])
        for file, total in totals.items()
    }


def record(new: dict[str, FileTimes], slow: bool, existing: set[str], path: Path = PATH) -> None:
    """Put new times beside those recorded; `existing` are the names of all files there are."""
    sets = json.loads(path.read_text()) if path.exists() else {}
    key = "slow" if slow else "default"
    entries = {name: e for name, e in sets.get(key, {}).items() if name in existing}
    for name, times in new.items():
        entry: dict = {"startup": round(times.startup, 1), "total": round(times.total, 1)}
        if times.total > BY_TEST:
            by_class: dict[str, dict[str, float]] = collections.defaultdict(dict)
            for test, seconds in sorted(times.tests.items()):
                cls, _, method = test.rpartition(".")
                by_class[cls][method] = round(seconds, 2)
            entry["tests"] = by_class
        entries[name] = entry
    sets[key] = dict(sorted(entries.items()))
    path.write_text(_text(sets))


def _text(sets: dict[str, dict]) -> str:
    """JSON with a line for each file: small, and its changes can be read."""
    parts = []
    for key, entries in sorted(sets.items()):
        lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(e)}" for n, e in entries.items())
        parts.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where --save-xml wrote to")
    parser.add_argument("--slow", action="store_true", help="these are times of the slow set")
    args = parser.parse_args(argv)
    from tools.testing.discover_tests import discover

    new = read_reports(args.folder)
    if not new:
        parser.error(f"no XML below {args.folder}")
    record(new, args.slow, set(discover(PATH.parents[2] / "test")))
    total = sum(t.startup + t.total for t in new.values())
    print(f"recorded {len(new)} files, {total:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(PATH.parents[2]))
    import tools  # noqa: F401

    del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.
    sys.exit(main(sys.argv[1:]))
