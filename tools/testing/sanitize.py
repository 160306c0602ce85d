"""Run test files with the extension under AddressSanitizer, or with assertions on.

    python tools/testing/sanitize.py
    python tools/testing/sanitize.py lazy/test_mutation lazy/test_state
    python tools/testing/sanitize.py --assertions

Builds a second copy of the package, instrumented, in `build/sanitized` (once; afterwards only what
has changed), and runs each file in a process of its own on that copy. The first bad access to
memory ends a file with AddressSanitizer's report, which names the functions; torch itself is not
instrumented. Needs GCC's or Clang's sanitizer library (Debian: libasan, part of g++).

With `--assertions`, the copy in `build/asserted` has those of pybind11, that the GIL is held where
the references to an object are counted, those of torch's headers that a release leaves out, and
those of the C++ library.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
FLAG = "-fsanitize=address"
ASSERTED = ROOT / "build" / "asserted"
ASSERTIONS = ("-DPYBIND11_ASSERT_GIL_HELD_INCREF_DECREF", "-D_GLIBCXX_ASSERTIONS")
# What goes through each part of the extension, in a few minutes.
DEFAULT_TESTS = (
    "lazy/test_extract_compiled_graph",
    "lazy/test_call_path",
    "lazy/test_inputs",
    "lazy/test_outputs",
    "lazy/test_mutation",
    "lazy/test_operators",
    "lazy/test_hygiene",
)


def library(name: str) -> str:
    """The path of a library of the compiler.

    Raises:
        SystemExit: the compiler has none.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    found = subprocess.run(
        [*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        sys.exit(f"`{shlex.join(compiler)}` comes without {name}: install its sanitizer library")
    return found


def environment(assertions: bool = False) -> dict[str, str]:
    """In which Python imports the instrumented copy, and AddressSanitizer is loaded first."""
    folder = ASSERTED if assertions else BUILD
    (package,) = folder.glob(f"lib.{sysconfig.get_platform()}-*")
    if assertions:
        return {**os.environ, "PYTHONPATH": str(package)}
    return {
        **os.environ,
        # libstdc++ too, or AddressSanitizer finds no `__cxa_throw` to stand in for.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Python and torch leave much to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(package),
        # Python's own allocator hides what happens inside of its arenas.
        "PYTHONMALLOC": "malloc",
    }


def build(assertions: bool = False) -> None:
    """Build the instrumented copy.

    Raises:
        CalledProcessError: it does not compile.
    """
    flags = {"CFLAGS": f"{FLAG} -fno-omit-frame-pointer", "LDFLAGS": FLAG}
    if assertions:
        header = Path(__file__).parent / "assertions.h"
        flags = {"CFLAGS": shlex.join([*ASSERTIONS, "-include", str(header)])}
    folder = ASSERTED if assertions else BUILD
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder)],
        cwd=ROOT,
        env={**os.environ, **flags},
        check=True,
    )


def run(name: str, assertions: bool = False) -> int:
    """Run one test file on the instrumented copy; its exit status."""
    file = ROOT / "test" / f"{name}.py"
    return subprocess.run(
        [sys.executable, str(file)], cwd=file.parent, env=environment(assertions)
    ).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assertions", action="store_true", help="instead of AddressSanitizer")
    parser.add_argument("tests", nargs="*", default=DEFAULT_TESTS, metavar="TEST")
    options = parser.parse_args()
    build(options.assertions)
    failed = []
    for name in options.tests:
        print(f"{name}:", flush=True)
        if run(name, options.assertions):
            failed.append(name)
    under = "with assertions" if options.assertions else "under AddressSanitizer"
    sys.exit(f"failed {under}: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
