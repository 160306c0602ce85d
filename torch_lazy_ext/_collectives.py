"""Record: collectives of `torch.distributed` as operators of the graph.

The functional collectives are operators like all others. The functions of `torch.distributed`
write to their arguments through operators that take process groups and give handles; while a
program is recorded they are made of the functional ones. So no collective runs during a capture,
and each process may capture at another call.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torch_lazy_ext import _moving
from torch_lazy_ext._errors import UnsupportedError


class Done:
    """What an asynchronous collective returns while it is recorded: nothing to wait for."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _group(group: Any) -> Any:
    # What the functional collectives give is known to this module.
    importlib.import_module("torch.distributed._functional_collectives")
    return dist.group.WORLD if group is None else group


def _reduction(op: Any) -> str:
    op = getattr(op, "op", op)  # with a factor, it is an object around its name
    name = str(op).rpartition(".")[2].lower()
    if name not in ("sum", "avg", "product", "min", "max", "band", "bor", "bxor"):
        raise UnsupportedError(
            f"the program reduces with {op} (at {_moving.user_line()}), which the functional "
            "collectives do not know: scale the tensor, and sum"
        )
    return name


def _finish(target: torch.Tensor, value: torch.Tensor, async_op: bool) -> Done | None:
    value = torch.ops._c10d_functional.wait_tensor(value)
    with torch.no_grad():
        target.copy_(value.view(target.shape))
    return Done() if async_op else None


def all_reduce(
    tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
) -> Done | None:
    name = _reduction(dist.ReduceOp.SUM if op is None else op)
    value = torch.ops._c10d_functional.all_reduce(tensor.detach(), name, _group(group).group_name)
    return _finish(tensor, value, async_op)


def broadcast(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Any = None,
    async_op: bool = False,
    group_src: int | None = None,
) -> Done | None:
    group = _group(group)
    root = dist.distributed_c10d._canonicalize_group_rank(group, src, group_src)
    value = torch.ops._c10d_functional.broadcast(tensor.detach(), root, group.group_name)
    return _finish(tensor, value, async_op)


def all_gather_into_tensor(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Any = None,
    async_op: bool = False,
) -> Done | None:
    group = _group(group)
    value = torch.ops._c10d_functional.all_gather_into_tensor(
        input_tensor.detach(), group.size(), group.group_name
    )
    return _finish(output_tensor, value, async_op)


def reduce_scatter_tensor(
    output: torch.Tensor,
    input: torch.Tensor,
    op: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Done | None:
    group = _group(group)
    name = _reduction(dist.ReduceOp.SUM if op is None else op)
    value = torch.ops._c10d_functional.reduce_scatter_tensor(
        input.detach(), name, group.size(), group.group_name
    )
    return _finish(output, value, async_op)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "all_reduce": all_reduce,
    "broadcast": broadcast,
    "all_gather_into_tensor": all_gather_into_tensor,
    "reduce_scatter_tensor": reduce_scatter_tensor,
}


class DataParallel:
    """DistributedDataParallel without its reducer, whose hooks see no capture tensors.

    Args:
        leaf_of: gives the twin of a parameter, with its gradient.
    """

    def __init__(self, leaf_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.leaf_of = leaf_of
        self.pending: dict[int, Any] = {}  # id of a parameter -> its hook

    def forward(self, module: Any, *inputs: Any, **kwargs: Any) -> Any:
        if module._comm_hooks or module._join_config.enable or module.mixed_precision is not None:
            raise UnsupportedError(
                "a DistributedDataParallel with a communication hook, join() or mixed precision: "
                "call the module inside of it, and all-reduce the gradients in the program"
            )
        if module.will_sync_module_buffers():
            for buffer in module.modules_buffers:
                broadcast(buffer, group=module.process_group, group_src=0)
        if torch.is_grad_enabled() and module.require_backward_grad_sync:
            for parameter in module._module_parameters:
                if id(parameter) not in self.pending:
                    self._average(parameter, module.process_group)
        with module._inside_ddp_forward():
            return module.module(*inputs, **kwargs)

    def check(self) -> None:
        """To be called after the program.

        Raises:
            UnsupportedError: gradients are still to come, or never will, that eager averages.
        """
        if self.pending:
            raise UnsupportedError(
                f"{len(self.pending)} parameters under DistributedDataParallel get no gradient in "
                "the program, and outside of it its hooks do not see them: call backward() in the "
                "captured program, on all parameters; or capture the module, and wrap its graph: "
                "DistributedDataParallel(extract_compiled_graph(module, args).as_module())"
            )

    def _average(self, parameter: torch.Tensor, group: Any) -> None:
        def hook(leaf: torch.Tensor) -> None:
            self.pending.pop(id(parameter)).remove()
            assert leaf.grad is not None  # it was just accumulated
            with torch.no_grad():
                leaf.grad.div_(group.size())  # as the reducer does, before it sums
                all_reduce(leaf.grad, group=group)

        leaf = self.leaf_of(parameter)
        self.pending[id(parameter)] = leaf.register_post_accumulate_grad_hook(hook)


def refuse_sharded(modules: list[nn.Module]) -> None:
    """
    Raises:
        UnsupportedError: a module is sharded by `fully_shard` or FullyShardedDataParallel.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        if isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            raise UnsupportedError(
                f"{type(module).__name__} gathers its parameters in hooks, outside of what a graph "
                "can hold: keep the shards as parameters of the program, and call "
                "torch.distributed.all_gather_into_tensor before the forward and "
                "reduce_scatter_tensor on the gradients; or use DistributedDataParallel"
            )
