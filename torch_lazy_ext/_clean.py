"""Clean: the jit's own passes over a lowered graph, as a list one can read top to bottom."""

from __future__ import annotations

from collections.abc import Callable

import torch

Pass = Callable[[torch._C.Graph], object]

PASSES: list[tuple[str, Pass]] = [
    ("common subexpressions", torch._C._jit_pass_cse),
    ("dead code", torch._C._jit_pass_dce),
    ("constant pooling", torch._C._jit_pass_constant_pooling),
]


def clean(graph: torch._C.Graph) -> None:
    """Run every pass over `graph`, in place."""
    for _name, run in PASSES:
        run(graph)
