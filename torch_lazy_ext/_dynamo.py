"""The backend `torch.compile(model, backend="torch_lazy_ext")`.

TorchDynamo finds it by the entry point `torch_dynamo_backends`. AOTAutograd hands over forward and
backward, each of them a functional program of aten operators, and each becomes an extracted graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from functorch.compile import make_boxed_func  # type: ignore[import-untyped] # no py.typed
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from torch_lazy_ext._replay import CompiledGraph


def torch_lazy_ext(
    module: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile what TorchDynamo captured.

    Args:
        options: keyword arguments of `extract_compiled_graph`, such as `{"backend": "inductor"}`.

    Raises:
        ValueError: an option has a value that `extract_compiled_graph` does not take.
    """

    def compile(half: fx.GraphModule, _fakes: Sequence[Any]) -> Callable[..., Any]:
        # A call captures: sizes that TorchDynamo took for dynamic are numbers there.
        boxed: Callable[..., Any] = make_boxed_func(CompiledGraph(half, **(options or {})))
        return boxed

    CompiledGraph(module, **(options or {}))  # raises at once
    return aot_autograd(fw_compiler=compile)(module, inputs)
