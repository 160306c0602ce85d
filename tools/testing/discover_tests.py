"""Which test files there are, and which tests are in them."""

from __future__ import annotations

import os
from pathlib import Path


def discover(test_dir: Path) -> list[str]:
    """Names of all test files, sorted: paths below `test_dir`, without ".py"."""
    paths = test_dir.rglob("test_*.py")
    return sorted(p.relative_to(test_dir).with_suffix("").as_posix() for p in paths)


def folders(names: list[str]) -> list[str]:
    """Names of the folders that files are in, sorted: -i and -x take these, too."""
    return sorted({os.path.dirname(name) for name in names} - {""})


def normalize(name: str) -> str:
    """The name of a file or folder from what people type: "test/lazy/test_state.py" is a name."""
    return name.removeprefix("./").removeprefix("test/").removesuffix(".py").rstrip("/")


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name of a file, or of a folder that the file is in."""
    return name == pattern or name.startswith(pattern + "/")


def select(names: list[str], include: list[str], exclude: list[str]) -> list[str]:
    """The files to run: those included (all, if none is), less those excluded."""
    included = [n for n in names if not include or any(matches(n, p) for p in include)]
    return [n for n in included if not any(matches(n, p) for p in exclude)]
