# Owner(s): ["oncall: jit"]

"""A build belongs to one torch: it says so in its metadata, and refuses another."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unittest
import unittest.mock
from pathlib import Path

import torch
from expecttest import TestCase

import torch_lazy_ext
from torch_lazy_ext import _built_for

ROOT = Path(__file__).resolve().parents[2]
HERE = torch.__version__.split("+")[0]


def run(*command, folder=ROOT, **variables):
    """Output of a process of its own, and whether it succeeded."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr, done.returncode == 0


def pretend(folder, version):
    """Put a torch of another version into a folder, with as much of it as setup.py imports."""
    package = Path(folder) / "torch" / "utils"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (package / "__init__.py").write_text("")
    (package / "cpp_extension.py").write_text(
        textwrap.dedent(
            """
            from setuptools import Extension as CppExtension
            from setuptools.command.build_ext import build_ext as BuildExtension
            get_cxx_compiler = lambda: "c++"
            """
        )
    )


class ImportTest(TestCase):
    def test_note(self):
        self.assertEqual(_built_for.built_for(), HERE)

    def check(self, version):
        program = f"import torch; torch.__version__ = {version!r}; import torch_lazy_ext"
        return run("-c", program, folder=tempfile.gettempdir(), PYTHONPATH=where())

    def test_refused(self):
        for version in ("2.12.1", "2.15.0.dev20261120+cpu"):
            with self.subTest(version):
                text, fine = self.check(version)
                self.assertFalse(fine)
                self.assertIn(
                    f"ImportError: torch_lazy_ext {torch_lazy_ext.__version__} is built for torch "
                    f"{HERE}, and this is torch {version}: run `pip install torch=={HERE}`",
                    text,
                )

    def test_free_threads(self):
        program = "import sys; sys._is_gil_enabled = lambda: False; import torch_lazy_ext"
        text, fine = run("-c", program, folder=tempfile.gettempdir(), PYTHONPATH=where())
        self.assertFalse(fine)
        self.assertIn(
            "ImportError: torch_lazy_ext needs the lock of the interpreter (the GIL)", text
        )

    def test_local_version(self):
        text, fine = self.check(HERE + "+cu130")
        self.assertTrue(fine, text)


class MissingExtensionTest(TestCase):
    """In the folder of sources that nobody has built the extension beside."""

    def attempt(self, **variables):
        package = Path(torch_lazy_ext.__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            left_out = shutil.ignore_patterns("*.so", "*.torch", "csrc", "__pycache__")
            shutil.copytree(package, Path(folder, package.name), ignore=left_out)
            program = f"import {package.name}"
            text, fine = run("-c", program, folder=folder, **variables)
            self.assertFalse(fine)
            return folder, text.splitlines()[-1]

    def test_installed_elsewhere(self):
        folder, error = self.attempt(PYTHONPATH=where())
        self.assertIn(
            f"ImportError: the sources in {folder} hide the torch_lazy_ext that is installed in "
            f"{Path(torch_lazy_ext.__file__).parents[1]}, and have no compiled extension",
            error,
        )
        self.assertIn("Start it in another folder, or run `pip install", error)

    def test_installed_as_editable(self):
        """The finder of an editable installation gives these sources another folder's extension."""
        package = Path(torch_lazy_ext.__file__).parent
        finder = textwrap.dedent(
            f"""
            import sys
            from importlib.machinery import EXTENSION_SUFFIXES
            from importlib.util import spec_from_file_location

            class Finder:
                def find_spec(name, path=None, target=None):
                    if name == "torch_lazy_ext":
                        return spec_from_file_location(name, {str(package / "__init__.py")!r})
                    if name == "torch_lazy_ext._C":
                        file = {str(package / "_C")!r} + EXTENSION_SUFFIXES[0]
                        return spec_from_file_location(name, file)

            sys.meta_path.append(Finder)
            """
        )
        with tempfile.TemporaryDirectory() as site:
            Path(site, "sitecustomize.py").write_text(finder)
            path = os.pathsep.join([site, *(p for p in sys.path if Path(p) != package.parent)])
            folder, error = self.attempt(PYTHONPATH=path)
        self.assertIn(
            f"ImportError: the sources in {folder} hide the torch_lazy_ext that is installed in "
            f"{package.parent}, and have no compiled extension",
            error,
        )

    def test_installed_nowhere(self):
        with (
            unittest.mock.patch.object(sys, "path", []),
            unittest.mock.patch.object(sys, "meta_path", []),
        ):
            error = _built_for.missing_extension("no module")
        self.assertIn("torch_lazy_ext has no compiled extension here: run `pip install .`", error)
        self.assertIn("(no module)", error)


def where():
    """The search path in which this very package is found."""
    return os.pathsep.join([str(Path(torch_lazy_ext.__file__).parents[1]), *sys.path])


@unittest.skipUnless((ROOT / "setup.py").exists(), "tests without their checkout")
class BuildTest(TestCase):
    def build(self, version, **variables):
        with tempfile.TemporaryDirectory() as folder:
            pretend(folder, version)
            path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
            text, fine = run("setup.py", "--version", PYTHONPATH=path, **variables)
        return text, fine

    def test_refused(self):
        for version in ("2.12.1", "2.12.1+cpu", "2.15.0", "2.15.0.dev20261120"):
            with self.subTest(version):
                text, fine = self.build(version)
                self.assertFalse(fine)
                self.assertIn(f"and this is torch {version}: run `pip install 'torch", text)

    def test_taken(self):
        for version in ("2.13.0", "2.13.1+cpu", "2.14.0", "2.14.1+cu130"):
            with self.subTest(version):
                text, fine = self.build(version)
                self.assertTrue(fine, text)

    def test_a_release_to_come(self):
        text, fine = self.build("2.99.0", TORCH_LAZY_EXT_ANY_TORCH="1")
        self.assertTrue(fine, text)

    def test_without_torch(self):
        program = textwrap.dedent(
            """
            import runpy, sys
            sys.modules["torch"] = None
            runpy.run_path("setup.py")
            """
        )
        text, fine = run("-c", program)
        self.assertFalse(fine)
        self.assertIn("and there is none here: run `pip install 'torch", text)

    def test_metadata(self):
        with tempfile.TemporaryDirectory() as folder:
            text, fine = run("setup.py", "-q", "egg_info", "--egg-base", folder)
            self.assertTrue(fine, text)
            (metadata,) = Path(folder).glob("*.egg-info/PKG-INFO")
            requires = [r for r in metadata.read_text().splitlines() if "Requires-Dist: torch" in r]
        self.assertEqual(requires, [f"Requires-Dist: torch=={HERE}"])


if __name__ == "__main__":
    unittest.main()
