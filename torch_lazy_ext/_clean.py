"""Clean: the jit's own passes over a lowered graph, as a list one can read top to bottom.

Dead nodes and common subexpressions are gone before: lowering knows what the jit's passes cannot,
that a random operator moves the generator also when nobody uses its numbers, and that two results
must not become one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Pass = Callable[[torch._C.Graph], object]

PASSES: list[tuple[str, Pass]] = [
    ("constant pooling", torch._C._jit_pass_constant_pooling),
]


def clean(graph: torch._C.Graph) -> None:
    """Run every pass over `graph`, in place."""
    for _name, run in PASSES:
        run(graph)
