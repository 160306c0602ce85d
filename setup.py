"""Builds the C++ extension; everything else about the package is in pyproject.toml.

Whatever stops the build on an ordinary machine (no torch or another release of it, no C++20
compiler, no Python headers) is looked for first and reported as one sentence.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from setuptools import setup

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent


def supported_torch() -> SpecifierSet:
    """The releases of torch that these sources build with, as pyproject.toml has them."""
    from packaging.specifiers import SpecifierSet  # setuptools brings it, once it is imported

    found = re.search(r'^requires = .*"torch([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found is not None
    return SpecifierSet(found[1])


try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise
    sys.exit(
        f"torch_lazy_ext: building needs torch {supported_torch()}, and there is none here: "
        f"run `pip install 'torch{supported_torch()}'`, or build without --no-build-isolation."
    )

# The build belongs to exactly this release: the extension is compiled against its headers.
TORCH_VERSION = torch.__version__.split("+")[0]
# For trying the sources with a release to come.
ANY_TORCH = os.environ.get("TORCH_LAZY_EXT_ANY_TORCH") == "1"
if not ANY_TORCH and not supported_torch().contains(TORCH_VERSION, prereleases=True):
    sys.exit(
        f"torch_lazy_ext: building needs torch {supported_torch()}, and this is torch "
        f"{torch.__version__}: run `pip install 'torch{supported_torch()}'`."
    )


def check_toolchain() -> None:
    """Exit with one sentence if a C++20 program that includes Python.h does not compile."""
    compiler = shlex.split(get_cxx_compiler())
    if shutil.which(compiler[0]) is None:
        sys.exit(
            f"torch_lazy_ext: building needs a C++ compiler, and `{compiler[0]}` is not there: "
            "install one (Debian: `apt install g++`; Fedora: `dnf install gcc-c++`; "
            "macOS: `xcode-select --install`), or name yours in the environment variable CXX."
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        sys.exit(
            "torch_lazy_ext: building needs the Python headers, and Python.h is not in "
            f"{sysconfig.get_path('include')}: install them (Debian: `apt install python3-dev`; "
            "Fedora: `dnf install python3-devel`)."
        )
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <concepts>\nstatic_assert(std::integral<int>);\n")
        result = subprocess.run(
            [*compiler, "-std=c++20", "-c", str(probe), "-o", str(probe.with_suffix(".o"))],
            capture_output=True,
        )
    if result.returncode != 0:
        sys.exit(
            f"torch_lazy_ext: building needs C++20, and `{shlex.join(compiler)}` does not compile "
            "it: install GCC 11, Clang 14 or newer, or name such a compiler in the environment "
            "variable CXX."
        )


class BuildCheckedExtension(BuildExtension):
    """BuildExtension that looks at the compiler first, and notes which torch it built for.

    The note lies beside the extension and has its name, which no other Python's extension has, so
    one checkout serves several. torch_lazy_ext/_built_for.py reads it.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        # What was compiled against other headers is of no use, whatever its time.
        self.build_temp = f"{self.build_temp}-torch-{TORCH_VERSION}"

    def note_of(self, name: str) -> Path:
        return Path(self.get_ext_fullpath(name)).with_suffix(".torch")

    def run(self) -> None:
        check_toolchain()
        notes = [self.note_of(extension.name) for extension in self.extensions]
        if any(not note.exists() or note.read_text() != TORCH_VERSION for note in notes):
            self.force = True
        super().run()
        for note in notes:
            note.write_text(TORCH_VERSION)


def relative_glob(pattern: str) -> list[str]:
    """Files under the package that match `pattern`, as setuptools wants them: relative, sorted."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "torch_lazy_ext").glob(pattern))


# torch asks PATH for ninja, and in a virtual environment that is not activated PATH lacks it.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

setup(
    ext_modules=[
        CppExtension(
            name="torch_lazy_ext._C",
            sources=relative_glob("csrc/*.cpp"),
            depends=relative_glob("csrc/*.h"),
            extra_compile_args=["-O2", "-std=c++20", "-g0"],
        )
    ],
    cmdclass={"build_ext": BuildCheckedExtension},
    install_requires=[f"torch=={TORCH_VERSION}"],
)
