# Owner(s): ["module: ci"]

"""run_test.py on small trees of test files, written for each test."""

import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path

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
        self.test_dir = Path(folder.name) / "test"
        self.test_dir.mkdir()
        for name in ("run_test.py", "_run_file.py"):
            shutil.copy(Path(__file__).parent / name, self.test_dir)

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
        self.assertCounts(self.run_test(status=1), 0, 0, 0)
        self.write(test_a=PASSING)
        self.assertCounts(self.run_test("-k", "no_such_test", status=1), 0, 0, 0)

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
        self.assertTrue(any("Fatal Python error" in line for line in lines), lines)

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
        stopped = self.run_test(status=1)
        self.assertCounts(stopped, 2, 3, 1)
        self.assertTrue(any("1 files not run" in line for line in stopped), stopped)
        self.assertCounts(self.run_test("--continue-through-error", status=1), 4, 3, 1)

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
        self.write(test_a=PASSING + "\n        def test_z(self):\n            self.fail()")
        self.assertIn("one ran", "\n".join(self.run_test(status=1)))

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
