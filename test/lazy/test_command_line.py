# Owner(s): ["oncall: jit"]

"""`python -m torch_lazy_ext`: check and explain, on modules of a user."""

import contextlib
import html.parser
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
from unittest import mock

import torch_lazy_ext
from torch_lazy_ext.__main__ import main

PROGRAMS = """
    import torch
    from torch import nn

    class Scale(nn.Module):
        def forward(self, a):
            return a * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.kept = [torch.ones(2)]

        def forward(self, x):
            self.calls += 1
            y = self.linear(x) + self.kept[0]
            if y.sum() > 1e6:
                y = -y
            return y

    class Sparse(nn.Module):
        def forward(self, a):
            return a.to_sparse()

    class Broken(nn.Module):
        def forward(self, a):
            raise ValueError("broken on purpose")

    def function():
        return lambda a, n: a.repeat(n, 1)

    class Hidden(nn.Module):
        '''Gives another result the third time, which no graph can know.'''

        def forward(self, a):
            hidden.append(1)
            return a + len(hidden)

    class Counts(list):
        __slots__ = ()

    hidden = Counts()
    not_a_factory = 3
"""


class CommandLineTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        (cls.folder / "programs.py").write_text(textwrap.dedent(PROGRAMS))
        path = mock.patch.object(sys, "path", [folder.name, *sys.path])
        path.start()
        cls.addClassCleanup(path.stop)
        cls.addClassCleanup(sys.modules.pop, "programs", None)

    def run_command(self, *args, status=0):
        """What the command prints, on stdout and stderr; checks its exit status."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                found = main([*args])
            except SystemExit as e:
                found = e.code
        self.assertEqual(found, status, printed.getvalue())
        return printed.getvalue()

    def test_from_the_shell(self):
        """Run where the modules are, which need no path then."""
        environment = {**os.environ, "PYTHONPATH": str(Path(torch_lazy_ext.__file__).parents[1])}
        for target, status in (("programs:Scale", 0), ("programs:Sparse", 1)):
            command = [sys.executable, "-m", "torch_lazy_ext", "check", target]
            result = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True
            )
            self.assertEqual(result.returncode, status, result.stderr)

    def test_check_passes(self):
        printed = self.run_command("check", "programs:Scale")
        self.assertEqual(printed, "ok: captured, and like eager on 10 sets of fresh arguments\n")

    def test_check_arguments(self):
        options = ("--args", "torch.randn(2, 3), 2", "--cases", "3")
        printed = self.run_command("check", "programs:function", *options)
        self.assertIn("on 3 sets of fresh arguments", printed)

    def test_check_refused(self):
        printed = self.run_command("check", "programs:Sparse", status=1)
        self.assertRegex(printed, r"^UnsupportedError: .*Sparse.*programs\.py:25")
        self.assertTrue(printed.endswith("FAILED\n"))

    def test_check_finds_a_difference(self):
        printed = self.run_command("check", "programs:Hidden", status=1)
        self.assertRegex(printed, "differ from eager|cases failed")
        self.assertTrue(printed.endswith("FAILED\n"))

    def test_error_of_the_program(self):
        with self.assertRaisesRegex(ValueError, "broken on purpose"):
            self.run_command("check", "programs:Broken")

    def test_misuse(self):
        for target, pattern in (
            ("programs", "not package.module:Factory"),
            ("no_such_module:A", "No module named 'no_such_module'"),
            ("programs:Nothing", "programs has no Nothing"),
            ("programs:not_a_factory", "not a factory"),
        ):
            with self.subTest(target):
                self.assertRegex(self.run_command("check", target, status=2), pattern)

    def test_explain(self):
        dot, page = self.folder / "graph.dot", self.folder / "graph.html"
        printed = self.run_command(
            "explain", "programs:Model", "--args", "torch.ones(2, 3)", "--dot", str(dot),
            "--html", str(page),
        )  # fmt: skip
        self.assertRegex(printed, r"aten::addmm\(.*\)  # programs\.py:18\n")
        inputs = re.findall(r"^  %\d+: (.*)$", printed, re.MULTILINE)
        self.assertEqual(
            sorted(inputs),
            ["argument x", "state calls", "state kept.0", "state linear.bias",
             "state linear.weight"],
        )  # fmt: skip
        self.assertRegex(printed, r"mutations:\n  state calls gets output \d of the graph\n")
        self.assertRegex(printed, r"guards:\n  value False at .*programs\.py:19\n")

        drawn = dot.read_text()
        nodes = dict(re.findall(r'n(\d+) \[label="(.*)"\];', drawn))
        edges = {(a, b) for a, b in re.findall(r"n(\d+) -> n(\d+);", drawn)}
        self.assertEqual(drawn.count("{"), drawn.count("}"))
        addmm = next(n for n, label in nodes.items() if label.startswith("aten.addmm"))
        self.assertIn("float32[2, 2]\\nprograms.py:18", nodes[addmm])
        x = next(n for n, label in nodes.items() if label.startswith("argument x"))
        self.assertIn((x, addmm), edges)

        parser = html.parser.HTMLParser()
        text = page.read_text()
        parser.feed(text)
        parser.close()
        self.assertEqual(text.count("<rect"), len(nodes))
        self.assertEqual(text.count("<path"), len(edges))
        self.assertIn("programs.py:18", text)

    def test_explain_refused(self):
        printed = self.run_command("explain", "programs:Sparse", status=1)
        self.assertRegex(printed, "^UnsupportedError: .*Sparse")

    def test_explain_nothing_to_tell(self):
        printed = self.run_command("explain", "programs:Scale")
        self.assertTrue(printed.endswith("mutations:\n  none\n\nguards:\n  none\n"), printed)


if __name__ == "__main__":
    unittest.main()
