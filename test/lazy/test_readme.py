# Owner(s): ["oncall: jit"]

"""What the READMEs show as output is what their programs print."""

import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "--- end of a block ---"


def stripped(text: str) -> str:
    """`text` without spaces at the ends of lines and newlines at its own."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


class ReadmeTest(unittest.TestCase):
    def check(self, readme: Path) -> None:
        """Run the Python blocks of `readme` as one script; compare with its text blocks.

        A Python block that no text block follows prints nothing that is shown.
        """
        blocks = re.findall(r"^```(\w+)\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
        script, shown = "", []
        for (kind, body), (following, output) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
            # A block that ends in a call of unittest is a program of its own.
            if kind != "python" or "unittest.main()" in body:
                continue
            script += body
            if following == "text":
                script += f"print({MARK!r})\n"
                shown.append(stripped(output))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "walk.py")
            path.write_text(script)
            # The folder is no part of what is shown.
            result = subprocess.run(
                [sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT
            )
            printed = result.stdout.replace(f"{folder}/", "")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual([stripped(part) for part in printed.split(MARK)[:-1]], shown)
        self.assertGreater(len(shown), 0)

    def test_unittest_blocks(self):
        """A block that ends in a call of unittest is a test file that passes."""
        text = (ROOT / "README.md").read_text()
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        programs = [block for block in blocks if "unittest.main()" in block]
        self.assertEqual(len(programs), 1)
        self.assertLess(len(programs[0].splitlines()), 40)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "test_scale.py")
            path.write_text(programs[0])
            result = subprocess.run(
                [sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT
            )
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("Ran 3 tests", result.stderr)

    def test_package(self):
        self.check(ROOT / "torch_lazy_ext" / "README.md")

    def test_project(self):
        self.check(ROOT / "README.md")


if __name__ == "__main__":
    unittest.main()
