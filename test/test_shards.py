# Owner(s): ["module: ci"]

"""Shards on the recorded times, and how these are recorded."""

import json
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.

from tools.stats import test_times  # noqa: E402
from tools.stats.test_times import FileTimes, TestTimes  # noqa: E402
from tools.testing import results, shards  # noqa: E402
from tools.testing.results import FileResult, TestResult  # noqa: E402
from tools.testing.run_process import Work  # noqa: E402


def lister(times):
    """Lists the tests that are recorded, and two that are new, as ids."""

    def list_tests(work):
        module = work.file.rpartition("/")[2]
        recorded = times.of(work.file).tests
        return [f"{module}.{t}" for t in (*recorded, "NewTest.test_1", "NewTest.test_2")]

    return list_tests


class ShardsTest(unittest.TestCase):
    def check(self, times, count, new=()):
        """Every test is in one shard; returns the seconds of the longest shard and of the mean.

        `new` are files that are not recorded.
        """
        list_tests = lister(times)
        works = [Work(file) for file in [*sorted(times.files), *new]]
        planned = shards.plan(works, times, count, list_tests)
        self.assertEqual(len(planned), count)
        found = [
            (work.file, test)
            for shard in planned
            for work in shard
            for test in (list_tests(work) if work.tests is None else work.tests)
        ]
        wanted = [(work.file, test) for work in works for test in list_tests(work)]
        self.assertEqual(sorted(found), sorted(wanted))
        seconds = [sum(work.seconds for work in shard) for shard in planned]
        return max(seconds), sum(seconds) / count

    def test_recorded_times(self):
        for slow in (False, True):
            times = TestTimes.load(slow)
            self.assertGreater(len(times.files), 10)
            for count in range(1, 9):
                with self.subTest(slow=slow, count=count):
                    longest, mean = self.check(times, count, ["test_not_recorded"])
                    self.assertLessEqual(longest, 1.15 * mean)

    def test_one_large_file(self):
        tests = {f"A.test_{i}": 1.0 + i % 7 for i in range(200)}
        times = TestTimes({"large": FileTimes(2.0, sum(tests.values()), tests)})
        for count in range(1, 9):
            longest, mean = self.check(times, count)
            self.assertLessEqual(longest, 1.15 * mean)

    def test_longest_first(self):
        """Whatever they are called: a long one that comes last makes its shard longer."""
        seconds = dict(a=3.0, b=3.0, c=3.0, d=4.0, e=5.0)
        times = TestTimes({name: FileTimes(0.0, total) for name, total in seconds.items()})
        planned = shards.plan([Work(name) for name in seconds], times, 2, self.fail)
        self.assertEqual(
            [[w.file for w in shard] for shard in planned], [["e", "b"], ["d", "a", "c"]]
        )

    def test_nothing_recorded(self):
        works = [Work(name) for name in "abcde"]
        planned = shards.plan(works, TestTimes({}), 2, self.fail)
        self.assertEqual(sorted(w.file for shard in planned for w in shard), list("abcde"))
        self.assertEqual(sorted(map(len, planned)), [2, 3])

    def test_same_for_everybody(self):
        times = TestTimes.load(slow=False)
        works = [Work(file) for file in sorted(times.files)]
        planned = shards.plan(works, times, 5, lister(times))
        self.assertEqual(planned, shards.plan(works[::-1], times, 5, lister(times)))

    def test_file_that_cannot_be_imported_is_run(self):
        tests = {f"A.test_{i}": 10.0 for i in range(4)}
        times = TestTimes({"broken": FileTimes(1.0, 40.0, tests)})
        planned = shards.plan([Work("broken")], times, 3, lambda work: [])
        self.assertEqual([w.file for shard in planned for w in shard], ["broken"])

    def test_parts_are_split_again(self):
        tests = {f"A.test_{i}": 10.0 for i in range(8)}
        times = TestTimes({"f": FileTimes(1.0, 80.0, tests)})
        (first, *_), *_ = shards.plan([Work("f")], times, 2, lister(times))
        halves = shards.plan([first], times, 2, self.fail)
        parts = [w.tests for half in halves for w in half]
        self.assertEqual(len(parts), 2)
        self.assertEqual(sorted(parts[0] + parts[1]), sorted(first.tests))


class TimesTest(unittest.TestCase):
    def test_from_xml_to_json(self):
        long = [TestResult("deep/test_a", f"test_a.A.test_{i}", "passed", 4.0 + i) for i in (1, 2)]
        new = TestResult("deep/test_a", "test_a.B.test_new", "passed", 0.004)
        short = [TestResult("test_b", "test_b.B.test_1", "passed", 1.0)]
        with tempfile.TemporaryDirectory() as folder:
            reports, path = Path(folder, "xml"), Path(folder, "times.json")
            # Two shards of one run.
            results.save_xml(reports / "1", [FileResult("deep/test_a", long[:1], 8.0)], "-1")
            second = [FileResult("deep/test_a", [long[1], new], 9.0)]
            results.save_xml(reports / "2", second, "-2")
            results.save_xml(reports / "2", [*second, FileResult("test_b", short, 2.5)], "-2")
            path.write_text(json.dumps({"slow": {}, "default": {"gone": {}, "other": {}}}))
            read = test_times.read_reports(reports)
            test_times.record(read, False, {"deep/test_a", "test_b", "other"}, path)
            recorded = json.loads(path.read_text())
            self.assertEqual(
                recorded["default"],
                {
                    "deep/test_a": {
                        "startup": 3.0,
                        "total": 11.0,
                        "tests": {"A": {"test_1": 5.0, "test_2": 6.0}, "B": {"test_new": 0.0}},
                    },
                    "test_b": {"startup": 1.5, "total": 1.0},
                    "other": {},
                },
            )
            recorded["default"].pop("other")
            path.write_text(json.dumps(recorded))
            times = TestTimes.load(False, path)
            self.assertEqual(TestTimes.load(True, path).files, times.files)
        file = times.of("deep/test_a")
        self.assertEqual(file.of("test_a.A.test_2"), 6.0)
        self.assertEqual(file.of("test_a.A.test_9"), 5.0)  # The median.
        self.assertEqual(times.of("test_new").total, 6.0)


if __name__ == "__main__":
    unittest.main()
