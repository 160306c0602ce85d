"""What PyTorch compiles on its own while a program runs: recorded as what it computes in the end.

`torch.cond`, `scan` and `flex_attention` call TorchDynamo on their bodies, and so does a program
that calls a function of `torch.compile`. A graph holds the operators: a compiled function is called
as it was before it was compiled, and a higher-order operator is its own implementation for eager
tensors, in Python, on the tensors of the capture. The way that data decides in a body (the branch
of `cond`, the rounds of `while_loop`) is guarded like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator


def dispatch(
    func: Callable[..., Any],
    operator: HigherOrderOperator,
    key: DispatchKey,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Answer `HigherOrderOperator.dispatch` for the thread that captures."""
    dense = operator.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    functorch = key == DispatchKey.FuncTorchDynamicLayerFrontMode  # vmap, grad: they know better
    if dense is None or functorch or torch._C._len_torch_dispatch_stack():
        return func(operator, key, *args, **kwargs)
    return dense(*args, **kwargs)


def uncompiled(func: Callable[..., Any], callback: Any) -> None:
    """Answer TorchDynamo's question what compiles the frames of a compiled function: nothing."""
    frames = dynamo()
    count = getattr(frames, "set_fullgraph_compiled_frame_count", None)
    if count is not None:
        compiled = count(-1)
        count(max(compiled, 1) if compiled >= 0 else compiled)  # fullgraph=True wants some


def dynamo() -> Any:
    """The module that asks the question, where TorchDynamo has been imported."""
    return sys.modules.get("torch._dynamo.eval_frame")
