"""The command line: is a module captured right, and what does its graph look like?

    python -m torch_lazy_ext check package.module:Factory
    python -m torch_lazy_ext check package.module:Factory --args "torch.randn(4, 8), 3"
    python -m torch_lazy_ext explain package.module:Factory --html graph.html

`Factory` is called without arguments and makes the program: a module class, a function that returns
a module or a function. `--args` is a Python expression for the arguments of a call, evaluated anew
for each; without it each argument is a random float32 tensor of shape (2, 3).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_lazy_ext import ExtractionError, _explain, testing


def _load(target: str) -> Callable[[], Any]:
    """The factory that "package.module:Factory" names. Raises ValueError, ImportError."""
    module, colon, path = target.partition(":")
    if not colon:
        raise ValueError(f"{target!r} is not package.module:Factory")
    value: Any = importlib.import_module(module)
    for name in path.split("."):
        if not hasattr(value, name):
            raise ValueError(f"{module} has no {path}")
        value = getattr(value, name)
    if not callable(value):
        raise ValueError(f"{target} is not a factory: it cannot be called")
    return value  # type: ignore[no-any-return]


def _arguments(expression: str) -> list[Any]:
    """The positional arguments that a Python expression stands for."""
    return list(eval(f"({expression},)" if expression.strip() else "()", {"torch": torch}))


def _check(program: Any, make_args: Callable[[], list[Any]] | None, cases: int) -> int:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            testing.verify_reusing_compiled_graph(program, None, cases, make_args)
    except (AssertionError, ExtractionError) as e:
        print(f"{type(e).__name__}: {e}")
        print("FAILED")
        return 1
    print(f"ok: captured, and like eager on {cases} sets of fresh arguments")
    return 0


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit status: 0, 1 (failed) or 2 (misused)."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_lazy_ext",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="capture, replay on fresh arguments, compare with eager; exits 0 or 1"
    )
    explain = commands.add_parser(
        "explain", help="the graph with source lines, guards, lifted tensors and mutations"
    )
    for command in (check, explain):
        command.add_argument("target", metavar="package.module:Factory")
        command.add_argument("--args", metavar="EXPRESSION", help='"torch.randn(4, 8), 3"')
    check.add_argument("--cases", type=int, default=10, help="how many replays (%(default)s)")
    explain.add_argument("--dot", type=Path, metavar="FILE", help="for Graphviz")
    explain.add_argument("--html", type=Path, metavar="FILE", help="the graph, drawn")
    options = parser.parse_args(argv)
    try:
        factory = _load(options.target)
    except (ImportError, ValueError) as e:
        parser.error(str(e))

    torch.manual_seed(0)
    program = factory()
    make_args = None if options.args is None else lambda: _arguments(options.args)
    if options.command == "check":
        return _check(program, make_args, options.cases)
    args = testing.gen_rand_args(program) if make_args is None else make_args()
    try:
        explanation = _explain.explain(program, args)
    except ExtractionError as e:
        print(f"{type(e).__name__}: {e}")
        return 1
    print(explanation, end="")
    if options.dot is not None:
        options.dot.write_text(_explain.dot(explanation))
    if options.html is not None:
        options.html.write_text(_explain.page(explanation))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
