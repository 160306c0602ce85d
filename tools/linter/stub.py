#!/usr/bin/env python3
"""Writes torch_lazy_ext/_C.pyi, the types of the extension, from the extension that is built.

    pip install -r tools/linter/requirements.txt
    python tools/linter/stub.py

mypy reads it, and people do. pybind11-stubgen makes it; what it cannot know is put right here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "torch_lazy_ext" / "_C.pyi"
HEADER = '"""The types of the extension, written by tools/linter/stub.py."""\n\n'

# What the signatures of pybind11 do not say, or say too generally for a caller.
REPLACED = (
    # A parameter that is a SymFloat in C++. One that is a double is the next but one below.
    (r"(?<!-> )\bfloat\b", "float | torch.SymFloat"),
    (r"typing\.SupportsInt \| typing\.SupportsIndex", "int"),
    (r"typing\.SupportsFloat \| typing\.SupportsIndex", "float"),
    (r"\btorch\.(Graph|Node|Value)\b", r"torch._C.\1"),
    (r"\b(list|tuple|dict)(?=[,):]| =)", r"\1[typing.Any, ...]"),
    (r"\blist\[typing\.Any, \.\.\.\]", "list[typing.Any]"),
    (r"\bdict\[typing\.Any, \.\.\.\]", "dict[typing.Any, typing.Any]"),
    (r"\b(set|frozenset)\b(?! *[\[(])", r"\1[typing.Any]"),
    (r"collections\.abc\.Callable(?!\[)", "collections.abc.Callable[..., typing.Any]"),
    (r"\*args, \*\*kwargs", "*args: typing.Any, **kwargs: typing.Any"),
    (r"\*args\)", "*args: object)"),
    (r"(def \w+\([^)]*\)):", r"\1 -> typing.Any:"),
    (r"def __eq__\(self, arg0: \w+\)", "def __eq__(self, arg0: object)"),
    (
        r"(def lifted\(self\) ->) list\[typing.Any\]",
        r"\1 list[tuple[torch.Tensor, torch.Tensor, bool, int]]",
    ),
    (
        r"(def guards\(self\) ->) list\[typing.Any\]",
        r"\1 list[tuple[ValueRef, torch.Tensor | list[int], bool, str]]",
    ),
)


def generate() -> str:
    """The text of the stub."""
    scripts = Path(sysconfig.get_path("scripts"))
    with tempfile.TemporaryDirectory() as folder:
        command = [str(scripts / "pybind11-stubgen"), "torch_lazy_ext._C", "-o", folder]
        # The extension of this checkout, whichever one is installed, if it is built.
        env = dict(os.environ)
        if list(ROOT.glob("torch_lazy_ext/_C*.so")):
            path = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
            env["PYTHONPATH"] = os.pathsep.join(path)
        subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
        text = Path(folder, "torch_lazy_ext", "_C.pyi").read_text()
    for pattern, replacement in REPLACED:
        text = re.sub(pattern, replacement, text)
    text = HEADER + text
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format"]):
        text = subprocess.run(
            [str(scripts / "ruff"), *command, "--stdin-filename", str(STUB), "-"],
            cwd=ROOT,
            input=text,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    return text


if __name__ == "__main__":
    STUB.write_text(generate())
    print(f"wrote {STUB.relative_to(ROOT)}")
