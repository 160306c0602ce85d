# Owner(s): ["module: ci"]

"""run_test.py on small trees of test files, written for each test."""

import contextlib
import importlib.util
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
import unittest.mock
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.

from tools.testing import results, run_process  # noqa: E402

PASSING = """
    import unittest

    class A(unittest.TestCase):
        def test_one(self):
            print("one ran")

        def test_two(self):
            pass
"""

MIXED = """
    import unittest

    class A(unittest.TestCase):
        def test_pass(self):
            pass

        def test_fail(self):
            self.fail("as it should")

        def test_error(self):
            raise ValueError

        @unittest.skip("always")
        def test_skip(self):
            pass

        @unittest.expectedFailure
        def test_expected_failure(self):
            self.fail()

        @unittest.expectedFailure
        def test_unexpected_success(self):
            pass
"""


class RunTestTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.test_dir = self.root / "test"
        self.test_dir.mkdir()
        shutil.copy(ROOT / "test" / "run_test.py", self.test_dir)
        for name in ("tools/__init__.py", "tools/testing", "tools/stats/__init__.py"):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, path)
        shutil.copy(ROOT / "tools" / "stats" / "test_times.py", self.root / "tools" / "stats")

    def write(self, **files):
        """Write each file; "__" in a name stands for a folder."""
        for name, text in files.items():
            path = self.test_dir / (name.replace("__", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text))

    def run_test(self, *options, status):
        """What run_test.py prints, as lines; checks its exit status."""
        process = subprocess.run(
            [sys.executable, str(self.test_dir / "run_test.py"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Neither this run nor its caller's terminal belongs to what is tested.
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_TEST")},
            text=True,
        )
        self.assertEqual(process.returncode, status, process.stdout)
        return process.stdout.splitlines()

    def assertCounts(self, lines, passed, failed, skipped):
        self.assertEqual(lines[-1], f"{passed} passed, {failed} failed, {skipped} skipped", lines)

    def test_counts_each_outcome(self):
        self.write(test_a=MIXED)
        lines = self.run_test(status=1)
        self.assertCounts(lines, 2, 3, 1)
        self.assertIn("FAILED test_a: test_a.A.test_unexpected_success", lines)

    def test_sums_over_files_in_folders(self):
        self.write(test_a=PASSING, deep__test_b=PASSING)
        self.assertCounts(self.run_test(status=0), 4, 0, 0)

    def test_nothing_ran(self):
        lines = self.run_test(status=1)
        self.assertCounts(lines, 0, 0, 0)
        self.assertIn("NOTHING to run", lines)
        self.write(test_a=PASSING)
        lines = self.run_test("-k", "no_such_test", status=1)
        self.assertCounts(lines, 0, 0, 0)
        self.assertIn("NOTHING of these 1 files matches -k no_such_test", lines)
        lines = self.run_test("-k", "no_such_test", "-k", "A.test_o*", status=1)
        self.assertCounts(lines, 0, 0, 0)
        patterns = [x.split()[-1] for x in lines if "NOTHING" in x]
        self.assertEqual(patterns, ["no_such_test", "A.test_o*"])
        # One of two is worth a word, too.
        lines = self.run_test("-k", "no_such_test", "-k", "test_one", status=0)
        self.assertCounts(lines, 1, 0, 0)
        self.assertEqual([x.split()[-1] for x in lines if "NOTHING" in x], ["no_such_test"])

    def test_all_skipped(self):
        self.write(test_a="import unittest\nraise unittest.SkipTest('not here')")
        self.assertCounts(self.run_test(status=0), 0, 0, 1)

    def test_one_outcome_for_all_subtests(self):
        self.write(
            test_a="""
            import unittest

            class A(unittest.TestCase):
                def run_parts(self, outcomes):
                    for outcome in outcomes:
                        with self.subTest(outcome=outcome):
                            if outcome == "fail":
                                self.fail()
                            if outcome == "skip":
                                self.skipTest("part")

                def test_failed(self):
                    self.run_parts(["fail", "pass", "skip", "fail"])

                def test_passed(self):
                    self.run_parts(["skip", "pass", "skip"])

                def test_skipped(self):
                    self.run_parts(["skip", "skip"])
            """
        )
        self.assertCounts(self.run_test(status=1), 1, 1, 1)

    def test_broken_file_fails(self):
        self.write(test_a="import no_such_module")
        lines = self.run_test(status=1)
        self.assertCounts(lines, 0, 1, 0)
        self.assertIn("FAILED test_a: test_a (outside any test) (exited with status 1)", lines)

    def test_broken_class_fixture_fails(self):
        self.write(
            test_a="""
            import unittest

            class A(unittest.TestCase):
                @classmethod
                def setUpClass(cls):
                    raise ValueError

                def test_one(self):
                    pass

            class B(unittest.TestCase):
                def test_two(self):
                    pass
            """
        )
        self.assertCounts(self.run_test(status=1), 1, 1, 0)

    def test_crash_is_that_tests_failure(self):
        self.write(
            test_a="""
            import os, signal, unittest

            class A(unittest.TestCase):
                def test_1(self):
                    pass

                def test_2_crash(self):
                    os.kill(os.getpid(), signal.SIGSEGV)

                def test_3(self):
                    pass

                def test_4_exit(self):
                    os._exit(0)

                def test_5(self):
                    pass
            """
        )
        lines = self.run_test(status=1)
        self.assertCounts(lines, 3, 2, 0)
        self.assertIn("FAILED test_a: test_a.A.test_2_crash (killed by SIGSEGV)", lines)
        self.assertIn("FAILED test_a: test_a.A.test_4_exit (exited with status 0)", lines)
        # Where it crashed.
        self.assertIn("Fatal Python error: Segmentation fault", lines)
        self.assertTrue(any("line 9 in test_2_crash" in line for line in lines), lines)

    def test_crash_outside_tests(self):
        die = "import os, signal\nos.kill(os.getpid(), signal.SIGABRT)"
        self.write(
            test_import=die,
            test_exit=PASSING + "\n    import atexit, os\n    atexit.register(os.abort)",
        )
        lines = self.run_test("--continue-through-error", status=1)
        self.assertCounts(lines, 2, 2, 0)
        self.assertIn(
            "FAILED test_import: test_import (outside any test) (killed by SIGABRT)", lines
        )
        self.assertIn(
            "FAILED test_exit: test_exit (after its last test) (killed by SIGABRT)", lines
        )

    def test_continue_through_error(self):
        self.write(test_a=MIXED, test_b=PASSING)
        stopped = self.run_test("--jobs", "1", status=1)
        self.assertCounts(stopped, 2, 3, 1)
        self.assertEqual(
            stopped[-3], "NOT RUN after a failure (--keep-going runs them), 1 files: test_b"
        )
        for option in ("--continue-through-error", "--keep-going"):
            lines = self.run_test(option, status=1)
            self.assertCounts(lines, 4, 3, 1)
            self.assertNotIn("NOT RUN", "\n".join(lines))

    def test_tests_that_did_not_run(self):
        """Behind a fixture that failed; not behind one that skips."""
        self.write(
            test_a="""
            import unittest

            class A(unittest.TestCase):
                @classmethod
                def setUpClass(cls):
                    raise ValueError

                def test_1(self):
                    pass

                test_2 = test_3 = test_4 = test_1

            class B(unittest.TestCase):
                @classmethod
                def setUpClass(cls):
                    raise unittest.SkipTest("not here")

                def test_1(self):
                    pass
            """
        )
        lines = self.run_test(status=1)
        self.assertCounts(lines, 0, 1, 1)
        named = " ".join(f"test_a.A.test_{i}" for i in (1, 2, 3))
        self.assertEqual(lines[-3], f"NOT RUN test_a, 4 tests: {named} ...")

    def test_how_long_it_took(self):
        self.write(test_a=PASSING)
        self.assertRegex(self.run_test(status=0)[-2], r"^took (\d+ min )?\d+ s$")
        self.assertEqual([results.duration(s) for s in (0.2, 59.7, 725)],
                         ["0 s", "1 min 0 s", "12 min 5 s"])  # fmt: skip

    def test_failures_are_named_at_once(self):
        """Before the file is done, and whatever way the test failed."""
        self.write(
            test_a="""
            import os, unittest

            class A(unittest.TestCase):
                def test_1(self):
                    self.fail()

                def test_2(self):
                    os._exit(3)
            """
        )
        lines = self.run_test(status=1)
        self.assertEqual(
            lines[:2],
            [
                "test_a: test_a.A.test_1 failed",
                "test_a: test_a.A.test_2 failed (exited with status 3)",
            ],
        )

    def test_include_exclude(self):
        self.write(test_a=PASSING, deep__test_b=PASSING, deep__test_c=PASSING)

        def listed(*options):
            return self.run_test("--dry-run", *options, status=0)[:-1]

        self.assertEqual(listed(), ["deep/test_b", "deep/test_c", "test_a"])
        self.assertEqual(listed("-i", "deep/test_b", "test_a"), ["deep/test_b", "test_a"])
        self.assertEqual(listed("-i", "test/deep/test_b.py"), ["deep/test_b"])
        self.assertEqual(listed("--include", "deep", "-x", "deep/test_b"), ["deep/test_c"])
        self.assertEqual(listed("--exclude", "deep"), ["test_a"])
        lines = self.run_test("-i", "test_z", status=2)
        self.assertIn("'test_z'", lines[-1])
        self.assertIn("'deep/test_b'", lines[-1])

    def test_shards_are_everything_once(self):
        self.write(**{f"test_{c}": PASSING for c in "abcde"})
        shards = [self.run_test("--dry-run", "--shard", k, "2", status=0)[:-1] for k in "12"]
        self.assertEqual(sorted(shards[0] + shards[1]), [f"test_{c}" for c in "abcde"])
        self.assertLessEqual(abs(len(shards[0]) - len(shards[1])), 1)
        self.run_test("--shard", "3", "2", status=2)
        self.run_test("--shard", "0", "2", status=2)

    def test_dry_run_runs_nothing(self):
        self.write(test_a="raise AssertionError")
        self.assertEqual(
            self.run_test("--dry-run", status=0), ["test_a", "0 passed, 0 failed, 0 skipped"]
        )

    def test_select_by_name(self):
        self.write(test_a=PASSING)
        self.assertCounts(self.run_test("-k", "one", status=0), 1, 0, 0)
        self.assertCounts(self.run_test("-k", "one", "-k", "two", status=0), 2, 0, 0)

    def test_passes_the_rest_to_unittest(self):
        self.write(test_a=PASSING)
        self.assertCounts(self.run_test("--", "A.test_two", status=0), 1, 0, 0)

    def test_output_on_failure_or_verbose(self):
        self.write(test_a=PASSING)
        self.assertNotIn("one ran", "\n".join(self.run_test(status=0)))
        self.assertIn("one ran", "\n".join(self.run_test("-v", status=0)))
        self.assertIn("one ran", "\n".join(self.run_test("-v", "--jobs", "1", status=0)))
        self.write(
            test_a=PASSING
            + """
        def test_z(self):
            print("z ran")
            self.fail()
"""
        )
        text = "\n".join(self.run_test(status=1))
        self.assertIn("z ran", text)
        self.assertNotIn("one ran", text)

    def test_slow(self):
        self.write(
            test_a="""
            import os, unittest

            class A(unittest.TestCase):
                @unittest.skipUnless(os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1", "slow")
                def test_slow(self):
                    pass
            """
        )
        self.assertCounts(self.run_test(status=0), 0, 0, 1)
        self.assertCounts(self.run_test("--slow", status=0), 1, 0, 0)

    def test_threads_wait_without_a_core(self):
        """So that tests come to their end beside a load; a user's own word is kept."""
        self.write(
            test_a="""
            import os, unittest

            class A(unittest.TestCase):
                def test_policy(self):
                    self.assertEqual(os.environ["OMP_WAIT_POLICY"], "passive")
            """
        )
        with unittest.mock.patch.dict(os.environ):
            os.environ.pop("OMP_WAIT_POLICY", None)
            self.assertCounts(self.run_test(status=0), 1, 0, 0)
            os.environ["OMP_WAIT_POLICY"] = "active"
            self.assertCounts(self.run_test(status=1), 0, 1, 0)

    def test_hang_is_that_tests_failure(self):
        """In Python, where SIGABRT is ignored, and after the last test."""
        self.write(
            test_a="""
            import signal, time, unittest

            class A(unittest.TestCase):
                def test_1(self):
                    pass

                def test_2_hang(self):
                    time.sleep(600)

                def test_3(self):
                    pass
            """,
            test_b="""
            import atexit, time, unittest

            atexit.register(time.sleep, 600)

            class B(unittest.TestCase):
                def test_1(self):
                    pass
            """,
        )
        lines = self.run_test("--keep-going", "--timeout", "20", status=1)
        self.assertCounts(lines, 3, 2, 0)
        self.assertIn("FAILED test_a: test_a.A.test_2_hang (timed out after 20 s)", lines)
        self.assertIn("FAILED test_b: test_b (after its last test) (timed out after 20 s)", lines)
        self.assertTrue(any("line 9 in test_2_hang" in line for line in lines), lines)

    def test_time_without_a_core_does_not_count(self):
        """A test that a busy machine keeps from running is not one that hangs."""
        self.write(
            test_a="""
            import time, unittest

            class A(unittest.TestCase):
                def test_1(self):
                    time.sleep(4)
            """
        )
        options = run_process.Options(self.test_dir, [], dict(os.environ), timeout=2.0)
        for share, outcome in ((0.0, "failed"), (1.0, "passed")):
            # Of the time that goes by, so much is spent without a core.
            waited = unittest.mock.patch.object(
                run_process, "waited_for_a_core", lambda _, s=share: s * time.monotonic()
            )
            with waited:
                file, _ = run_process.run(run_process.Work("test_a"), options)
            self.assertEqual({t.outcome for t in file.tests}, {outcome})
        self.assertGreater(run_process.waited_for_a_core(os.getpid()), 0.0)

    def test_what_a_test_leaves_running_ends(self):
        self.write(
            test_a="""
            import subprocess, sys, unittest

            class A(unittest.TestCase):
                def test_1(self):
                    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                    print("child", child.pid)
            """
        )
        text = "\n".join(self.run_test("-v", status=0))
        pid = int(re.search(r"child (\d+)", text)[1])
        while self.runs(pid):
            time.sleep(0.05)

    def runs(self, pid):
        """Whether the process is there, and not only because nobody asked how it ended."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    FLAKY = """
        import unittest
        from pathlib import Path

        class A(unittest.TestCase):
            def test_flaky(self):
                path = Path(__file__).with_name("ran")
                ran = int(path.read_text()) if path.exists() else 0
                path.write_text(str(ran + 1))
                self.assertEqual(ran, 2, "as flaky ones do")

            def test_never(self):
                self.fail("always")
    """

    def test_reruns(self):
        self.write(test_a=self.FLAKY)
        lines = self.run_test("--reruns", "3", "--save-xml", str(self.root / "xml"), status=1)
        self.assertCounts(lines, 1, 1, 0)
        self.assertIn("FLAKY test_a: test_a.A.test_flaky: failed 2 of 3 runs", lines)
        self.assertIn("FAILED test_a: test_a.A.test_never", lines)
        self.assertEqual(sum("as flaky ones do" in line for line in lines if "Error" in line), 2)
        suite = ElementTree.parse(self.root / "xml" / "test_a.xml").getroot()
        flaky, never = sorted(suite, key=lambda case: case.attrib["name"])
        self.assertEqual([e.tag for e in flaky], ["flakyFailure"] * 2)
        self.assertEqual(never.find("failure").tag, "failure")

    def test_no_reruns(self):
        self.write(test_a=self.FLAKY)
        self.assertCounts(self.run_test(status=1), 0, 2, 0)

    def test_rerun_after_a_crash(self):
        self.write(
            test_a="""
            import os, unittest
            from pathlib import Path

            class A(unittest.TestCase):
                def test_crash_once(self):
                    path = Path(__file__).with_name("ran")
                    if not path.exists():
                        path.touch()
                        os.abort()

                def test_other(self):
                    pass
            """
        )
        lines = self.run_test("--reruns", "1", status=0)
        self.assertCounts(lines, 2, 0, 0)
        self.assertIn("FLAKY test_a: test_a.A.test_crash_once: failed 1 of 2 runs", lines)

    def test_command_that_reruns(self):
        self.write(deep__test_a=MIXED)
        lines = self.run_test(status=1)
        command = lines[lines.index("FAILED deep/test_a: test_a.A.test_fail") + 1].split()
        self.assertEqual(command[:2], ["python", "test/run_test.py"])
        self.assertCounts(self.run_test(*command[2:], status=1), 0, 1, 0)
        self.assertIn("--slow", "\n".join(self.run_test("--slow", status=1)))

    def test_xml(self):
        mixed = MIXED.replace("as it should", "as it should \\x00 <&>")
        self.write(deep__test_a=mixed, test_b="import unittest\nraise unittest.SkipTest('no b')")
        self.run_test("--keep-going", "--save-xml", status=1)
        reports = self.test_dir / "test-reports"
        self.assertEqual(
            sorted(p.name for p in reports.iterdir()), ["deep.test_a.xml", "test_b.xml"]
        )
        suite = ElementTree.parse(reports / "deep.test_a.xml").getroot()
        self.assertEqual(
            {k: suite.attrib[k] for k in ("name", "tests", "failures", "skipped")},
            dict(name="deep/test_a", tests="6", failures="3", skipped="1"),
        )
        cases = {case.attrib["name"]: case for case in suite}
        self.assertEqual(cases["test_pass"].attrib["classname"], "A")
        self.assertIn("as it should ? <&>", cases["test_fail"].find("failure").text)
        self.assertEqual(cases["test_skip"].find("skipped").attrib["message"], "always")
        suite = ElementTree.parse(reports / "test_b.xml").getroot()
        self.assertEqual(suite[0].find("skipped").attrib["message"], "no b")

    def test_failed_first(self):
        self.write(test_a=PASSING, test_b=MIXED)
        self.run_test("--keep-going", "--jobs", "1", status=1)
        lines = self.run_test("--failed-first", "--jobs", "1", "-v", status=1)
        ran = [line.split()[0] for line in lines if re.match(r"test_\w+ \(", line)]
        self.assertEqual(ran[:3], ["test_error", "test_fail", "test_unexpected_success"])
        # What was mended is forgotten.
        self.write(test_b=PASSING)
        self.run_test("-i", "test_b", status=0)
        listed = self.run_test("--dry-run", "--failed-first", status=0)
        self.assertEqual(listed[:2], ["test_a", "test_b"])

    def test_jobs(self):
        """Two files that wait for each other."""
        waiting = """
            import time, unittest
            from pathlib import Path

            class A(unittest.TestCase):
                def test_meet(self):
                    here = Path(__file__)
                    here.with_suffix(".here").touch()
                    other = here.with_name("test_b.here" if here.stem == "test_a" else "test_a.here")
                    deadline = time.monotonic() + 500
                    while not other.exists():
                        self.assertLess(time.monotonic(), deadline)
                        time.sleep(0.01)
        """
        self.write(test_a=waiting, test_b=waiting)
        self.assertCounts(self.run_test("--jobs", "2", status=0), 2, 0, 0)
        self.run_test("--jobs", "0", status=2)

    def test_progress_and_slowest(self):
        self.write(
            test_a=PASSING,
            test_b="""
            import time, unittest

            class B(unittest.TestCase):
                def test_slow(self):
                    time.sleep(1.1)
            """,
        )
        lines = self.run_test("--jobs", "1", status=0)
        text = "\n".join(lines)
        self.assertRegex(
            text,
            r"(?ms)^test_a: 2 passed, 0 failed, 0 skipped in [\d.]+ s \[1/2.*"
            r"^test_b: 1 passed, 0 failed, 0 skipped in [\d.]+ s \[2/2\]$.*"
            r"^slowest tests:$.*"
            r"^ +\d+\.\d s  test_b: test_b.B.test_slow$",
        )

    @unittest.skipIf(importlib.util.find_spec("rich") is None, "needs rich")
    def test_live_progress_on_a_terminal(self):
        self.write(test_a=PASSING)
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, str(self.test_dir / "run_test.py")],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # That is how a terminal says that nobody writes.
            while True:
                printed += os.read(ours, 4096)
        os.close(ours)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed.decode())
        self.assertEqual(process.wait(), 0, text)
        self.assertIn("running test_a", text)
        self.assertEqual(text.splitlines()[-1], "2 passed, 0 failed, 0 skipped")

    @unittest.skipIf(importlib.util.find_spec("argcomplete") is None, "needs argcomplete")
    def test_completion(self):
        self.write(test_a=PASSING, deep__test_b=PASSING)
        line = "run_test.py -i de"
        completions = self.root / "completions"
        subprocess.run(
            [sys.executable, str(self.test_dir / "run_test.py")],
            env={
                **os.environ,
                "_ARGCOMPLETE": "1",
                "_ARGCOMPLETE_IFS": "\n",
                "_ARGCOMPLETE_STDOUT_FILENAME": str(completions),
                "COMP_LINE": line,
                "COMP_POINT": str(len(line)),
                "COMP_TYPE": "9",
            },
            check=True,
        )
        self.assertEqual(sorted(completions.read_text().split()), ["deep", "deep/test_b"])

    def test_interrupt(self):
        """Ctrl-C and a request to end: the tests' processes end, and people see where it was."""
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number):
                lines = self.interrupted(number)
                self.assertCounts(lines, 1, 0, 0)
                self.assertEqual(lines[-5], "STOPPED in test_a: test_a.A.test_2_hang")
                self.assertEqual(lines[-4], "NOT RUN, 1 files: test_b")
                self.assertEqual(lines[-3], "NOT RUN test_a, 1 tests: test_a.A.test_3")
                self.assertNotIn("Traceback", "\n".join(lines))

    def interrupted(self, number):
        """What the runner prints when this signal reaches it in the middle of a test."""
        path = self.test_dir / "pid"
        path.unlink(missing_ok=True)
        self.write(
            test_a="""
            import os, time, unittest
            from pathlib import Path

            class A(unittest.TestCase):
                def test_1(self):
                    pass

                def test_2_hang(self):
                    part = Path(__file__).with_name("part")
                    part.write_text(str(os.getpid()))
                    part.rename(Path(__file__).with_name("pid"))
                    time.sleep(100_000)

                def test_3(self):
                    pass
            """,
            test_b=PASSING,
        )
        process = subprocess.Popen(
            [sys.executable, str(self.test_dir / "run_test.py"), "--jobs", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Where this runs in the background, SIGINT may be ignored, and so by its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        printed, _ = process.communicate()
        self.assertEqual(process.returncode, 128 + number, printed)
        self.assertFalse(self.runs(int(path.read_text())))
        return printed.splitlines()

    def test_shards_run_every_test_once(self):
        """A file that is longer than its share is split, also among the jobs of a shard."""
        many = "import unittest\n\nclass A(unittest.TestCase):\n" + "".join(
            f"    def test_{i}(self):\n        pass\n" for i in range(12)
        )
        self.write(test_a=PASSING, test_b=PASSING, test_many=many, test_new=PASSING)
        times = dict(
            test_a=dict(startup=1.0, total=2.0),
            test_b=dict(startup=1.0, total=2.0),
            test_many=dict(
                startup=1.0, total=11.0, tests={"A": {f"test_{i}": 1.0 for i in range(11)}}
            ),
        )
        (self.root / "tools/stats/test_times.json").write_text(json.dumps({"default": times}))
        lines = self.run_test("--jobs", "1", status=0)
        self.assertEqual(lines[0], "4 files, about 1 min on an idle machine")
        names = []
        for k in "123":
            folder = self.root / f"xml{k}"
            options = ("--shard", k, "3", "--jobs", "2", "--save-xml", str(folder))
            self.run_test(*options, status=0)
            cases = [c for p in folder.iterdir() for c in ElementTree.parse(p).iter("testcase")]
            self.assertLess(len(cases), 14)
            names += [(c.attrib["file"], c.attrib["name"]) for c in cases]
        self.assertEqual(len(names), 18)
        self.assertEqual(len(set(names)), 18)

    def test_file_sees_what_python_file_would_show(self):
        self.write(
            deep__helper="VALUE = 1",
            deep__test_a="""
            import pickle, sys, unittest
            from pathlib import Path

            import helper

            class Pickled:
                pass

            class A(unittest.TestCase):
                def test_environment(self):
                    self.assertEqual(helper.VALUE, 1)
                    self.assertEqual(sys.argv, [str(Path(__file__))])
                    self.assertEqual(sys.path[0], str(Path(__file__).parent))
                    self.assertIsInstance(pickle.loads(pickle.dumps(Pickled())), Pickled)
            """,
        )
        self.assertCounts(self.run_test(status=0), 1, 0, 0)


if __name__ == "__main__":
    unittest.main()
