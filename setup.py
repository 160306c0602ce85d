"""Builds the C++ extension; everything else about the package is in pyproject.toml.

Whatever stops the build on an ordinary machine (no torch or another release of it, no C++20
compiler, no Python headers) is looked for first and reported as one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
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


COMPILER_MEMORY = 1.2 * 2**30
"""Bytes that a compiler takes, at most, for one of the sources."""
COMPILER_SECONDS = 25
"""That it takes for one of them, on a usual core."""


def compilers() -> int:
    """How many compilers may run at a time: one for each core, as far as the memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = []
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        free += [int(found[1]) * 1024] if found else []
    with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    room = [int(bytes / COMPILER_MEMORY) for bytes in free]
    return max(1, min([cores or 1, *room]))


def build_key() -> str:
    """What compiled sources depend on beside themselves, in few letters.

    Python and its platform are in the names of setuptools' folders, and ninja compares commands.
    """
    compiler = shlex.split(get_cxx_compiler())
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    flags = [os.environ.get(name, "") for name in ("CFLAGS", "CPPFLAGS", "CXXFLAGS", "LDFLAGS")]
    text = "\n".join([torch.__version__, *compiler, version, *flags])
    return f"torch-{TORCH_VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class BuildCheckedExtension(BuildExtension):
    """BuildExtension that looks at the compiler first, and notes which torch it built for.

    What is compiled stays in build/, also where pip installs an editable package and setuptools
    would take a folder for once, so that ninja compiles later only what has changed.

    The note lies beside the extension and has its name, which no other Python's extension has, so
    one checkout serves several. torch_lazy_ext/_built_for.py reads it.
    """

    def note_of(self, name: str) -> Path:
        return Path(self.get_ext_fullpath(name)).with_suffix(".torch")

    def run(self) -> None:
        check_toolchain()
        notes = [self.note_of(extension.name) for extension in self.extensions]
        if self.editable_mode:
            name = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / name)
        # What was compiled against other headers is of no use, whatever its time.
        self.build_temp = f"{self.build_temp}-{build_key()}"
        self.force = True  # Link always: ninja alone knows what is up to date.
        os.environ.setdefault("MAX_JOBS", str(compilers()))
        self.announce_compilers()
        super().run()
        for note in notes:
            note.write_text(TORCH_VERSION)

    def announce_compilers(self) -> None:
        """Say how long it may take; pip shows that with `-v`."""
        objects = Path(self.build_temp)
        sources = [s for extension in self.extensions for s in extension.sources]
        left = [s for s in sources if not list(objects.rglob(f"{Path(s).stem}.o"))]
        if left:
            jobs = max(1, int(os.environ["MAX_JOBS"]))
            minutes = len(left) * COMPILER_SECONDS / jobs / 60
            print(
                f"torch_lazy_ext: compiling {len(left)} files, {jobs} at a time, "
                f"about {max(1, round(minutes))} min",
                flush=True,
            )


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
