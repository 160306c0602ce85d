"""Builds the C++ extension; everything else about the package is in pyproject.toml.

Whatever stops the build on an ordinary machine (no torch or another release of it, no C++20
compiler, no Python headers) is looked for first and reported as one sentence.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

TORCH_VERSION = "2.13.0"  # Also in pyproject.toml, twice, and in torch_lazy_ext/__init__.py.
ROOT = Path(__file__).parent

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise
    sys.exit(
        f"torch_lazy_ext: building needs torch {TORCH_VERSION}, and there is none here: "
        f"run `pip install torch=={TORCH_VERSION}`, or build without --no-build-isolation."
    )

if torch.__version__.split("+")[0] != TORCH_VERSION:
    sys.exit(
        f"torch_lazy_ext: building needs torch {TORCH_VERSION}, and this is torch "
        f"{torch.__version__}: run `pip install torch=={TORCH_VERSION}`."
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
    """BuildExtension that looks at the compiler before it starts it."""

    def run(self) -> None:
        check_toolchain()
        super().run()


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
)
