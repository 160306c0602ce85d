# Owner(s): ["module: ci"]

"""What CI does with a wheel: test it, in a fresh environment, beside a checkout without extension."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
import unittest
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.so", "*.torch", "*.egg-info", "__pycache__", "test-reports"
)


@unittest.skipUnless(SLOW, "builds a wheel: set PYTORCH_TEST_WITH_SLOW=1")
class WheelTest(unittest.TestCase):
    """The folders have a space in their names, as people's have."""

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.checkout = Path(folder.name, "a checkout")
        shutil.copytree(ROOT, cls.checkout, ignore=LEFT_OUT)
        cls.environment = Path(folder.name, "an environment")
        venv.create(cls.environment, with_pip=True)
        (site,) = cls.environment.glob("lib/python*/site-packages")
        # torch and what tests need are those of this environment: gigabytes that are here already.
        (site / "those.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # But for the setuptools that venv brings on some Pythons, which hides the one needed.
        cls.run_in_checkout("python", "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools")
        cls.run_in_checkout(
            *("python", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."),
            *("--wheel-dir", "dist"),
        )

    @classmethod
    def run_in_checkout(cls, *command: str, status: int = 0, folder: str = ".") -> str:
        """Run a command in the fresh environment, as it would be activated; what it printed."""
        path = os.pathsep.join([str(cls.environment / "bin"), os.environ["PATH"]])
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTORCH"))}
        done = subprocess.run(
            command,
            cwd=cls.checkout / folder,
            env={**kept, "PATH": path, "VIRTUAL_ENV": str(cls.environment)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != status:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def setUp(self) -> None:
        # Each test finds the wheel installed, and can run alone.
        wheel = next(self.checkout.glob("dist/*.whl"))
        self.run_in_checkout(
            "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--force-reinstall",
            str(wheel),
        )

    def test_shard(self) -> None:
        """Files of each kind: of the package, of the tools, and what runs programs of its own."""
        printed = self.run_in_checkout(
            ".ci/shard", "1", "1", "-i", "test_conformance", "test_shards",
            "lazy/test_extract_compiled_graph", "lazy/test_command_line", "lazy/test_versions",
        )  # fmt: skip
        self.assertRegex(printed, r"\n\d+ passed, 0 failed, \d+ skipped\n$")
        reports = {p.name for p in (self.checkout / "test/test-reports").iterdir()}
        self.assertIn("test_conformance.xml", reports)
        self.assertFalse(list(self.checkout.glob("torch_lazy_ext/_C*.so")))

    def test_report(self) -> None:
        """The job of trunk that writes the page."""
        command = "tools/conformance/report.py --output conformance --kinds operator -k add"
        printed = self.run_in_checkout("python", *command.split(), "--dtypes", "float32")
        self.assertIn("torch_lazy_ext, 1 operators: 1 equal", printed)

    def test_editable_after_another_build(self) -> None:
        """The second command of the README: it compiles nothing that the first has compiled."""
        pip = ("python", "-m", "pip")
        install = ("install", "--no-build-isolation", "--no-deps", "-v", "-e", ".")
        printed = self.run_in_checkout(*pip, *install)
        self.assertIn("ninja: no work to do", printed)
        self.assertNotIn("torch_lazy_ext: compiling", printed)
        self.run_in_checkout(*pip, "uninstall", "-y", "torch_lazy_ext")
        for built in self.checkout.glob("torch_lazy_ext/_C.cpython*"):
            built.unlink()

    def test_from_the_top_of_the_checkout(self) -> None:
        """The sources hide the installed package, and say so."""
        program = "import torch_lazy_ext; print(torch_lazy_ext.__file__)"
        printed = self.run_in_checkout("python", "-c", program, status=1)
        self.assertIn("hide the torch_lazy_ext that is installed in", printed)
        self.assertIn("another folder", printed)
        printed = self.run_in_checkout("python", "-c", program, folder="test")
        self.assertIn(str(self.environment), printed)


if __name__ == "__main__":
    unittest.main()
