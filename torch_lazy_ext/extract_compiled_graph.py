"""The entry point: from a program to the callable that replays its graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch_lazy_ext import _C
from torch_lazy_ext._compile import Backend
from torch_lazy_ext._replay import CompiledGraph


def extract_compiled_graph(
    fn: Callable[..., Any],
    example_args: Sequence[Any],
    example_kwargs: dict[str, Any] | None = None,
    *,
    limit: int = 32,
    on_guard_failure: str = "recapture",
    backend: Backend = "torchscript",
    freeze: bool = False,
) -> CompiledGraph:
    """Capture `fn` on example arguments as one graph.

    Args:
        fn: an `nn.Module`, `fx.GraphModule`, function, bound method or partial.
        example_args: the positional arguments, any pytree each.
        example_kwargs: the keyword arguments.
        limit: how many variants (other shapes, dtypes, Python values, ways of the data) are kept.
            The least recently used one goes first; when the data alone would need more, or captures
            do not pay (`_policy.py`), such calls run eagerly, with one warning.
        on_guard_failure: what to do when the data takes a way that no variant took: "recapture",
            run this call in "eager", or raise a GuardError ("error").
        backend: what runs the graphs: "torchscript", ready in milliseconds; "inductor", native code
            that the first call of a variant compiles; "tiered", TorchScript until another process
            has compiled native code; "fx", operator by operator in Python; or a function with the
            signature of a `torch.compile` backend, (GraphModule, example inputs) -> callable.
        freeze: make constants of weights, which compiled code can fold and lay out ahead of time.
            Calls notice when a weight changes, and go on with the weights as they are; when they
            have stopped changing, the code is made anew. For variants without gradients.

    Returns:
        A callable with the program's own signature.

    Raises:
        ExtractionError: the program cannot be captured; the message names the operator and line.
        ValueError: an argument is none of the values above.
    """
    graph = CompiledGraph(
        fn, limit=limit, on_guard_failure=on_guard_failure, backend=backend, freeze=freeze
    )
    if _C.capturing():
        return graph  # part of the program that is captured: its calls run inline
    graph._extract(tuple(example_args), dict(example_kwargs or {}))
    return graph
