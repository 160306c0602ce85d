# Owner(s): ["module: ci"]

"""The command that runs tests under AddressSanitizer does so, on an extension made for it."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.

from tools.testing import sanitize  # noqa: E402

SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"

WRITES_BEYOND = """
import ctypes
from torch_lazy_ext import _C
print(_C.__file__, flush=True)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ctypes.memset(libc.malloc(8), 0, 9)
"""


@unittest.skipUnless(SLOW, "builds the extension: set PYTORCH_TEST_WITH_SLOW=1")
class SanitizeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        sanitize.build()

    def run_program(self, source: str) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "program.py"
            file.write_text(source)
            return subprocess.run(
                [sys.executable, str(file)],
                cwd=folder,
                env=sanitize.environment(),
                capture_output=True,
                text=True,
            )

    def test_bad_access_is_reported(self) -> None:
        ran = self.run_program(WRITES_BEYOND)
        self.assertNotEqual(ran.returncode, 0)
        self.assertIn(str(sanitize.BUILD), ran.stdout)
        self.assertIn("AddressSanitizer: heap-buffer-overflow", ran.stderr)

    def test_extension_is_instrumented(self) -> None:
        (extension,) = sanitize.BUILD.glob("lib.*/torch_lazy_ext/_C*.so")
        self.assertIn(b"__asan_init", extension.read_bytes())

    def test_test_files_pass(self) -> None:
        for name in ("lazy/test_extract_compiled_graph", "lazy/test_call_path"):
            with self.subTest(name):
                self.assertEqual(sanitize.run(name), 0)


@unittest.skipUnless(SLOW, "builds the extension: set PYTORCH_TEST_WITH_SLOW=1")
class AssertionsTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        sanitize.build(assertions=True)

    def test_assertions_are_on(self) -> None:
        (extension,) = sanitize.ASSERTED.glob("lib.*/torch_lazy_ext/_C*.so")
        self.assertIn(b"PyGILState_Check()", extension.read_bytes())

    def test_test_files_pass(self) -> None:
        """Among them what computes with numbers in threads that do not hold the GIL."""
        for name in (
            "lazy/test_extract_compiled_graph",
            "lazy/test_call_path",
            "lazy/test_interrupts",
        ):
            with self.subTest(name):
                self.assertEqual(sanitize.run(name, assertions=True), 0)


if __name__ == "__main__":
    unittest.main()
