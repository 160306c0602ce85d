"""Sweep: what Inductor's code makes of each item, beside what eager makes of it.

Many items become one graph, since each compilation costs seconds; a graph that cannot be compiled
is divided until the item that is at fault stands alone.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import lowering
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tools.exactness.compare import Difference, compare
from tools.exactness.items import Item, is_tensor
from torch_lazy_ext import _inductor


@dataclasses.dataclass
class Outcome:
    item: Item
    difference: Difference
    refused: str = ""  # why it stays on TorchScript


def is_eager(overload: torch._ops.OpOverload) -> bool:
    """Whether Inductor calls the kernel that eager calls."""
    return overload not in select_decomp_table() and (
        overload not in lowering.lowerings or overload in lowering.fallbacks
    )


def sweep(items: Sequence[Item], size: int = 48) -> Iterator[Outcome]:
    """The outcome of each item that eager computes."""
    runnable = []
    for item in items:
        try:
            with torch.no_grad():
                eager = item.overload(*item.args, **item.kwargs)
        except Exception:
            continue  # eager refuses the values
        results = [v for v in pytree.tree_leaves(eager) if is_tensor(v)]
        if results and all(
            r.layout is torch.strided and not r.is_complex() and r.numel() for r in results
        ):
            runnable.append((item, [r.clone() for r in results]))
    for k in range(0, len(runnable), size):
        yield from _batch(runnable[k : k + size])


def _batch(batch: list[tuple[Item, list[torch.Tensor]]]) -> Iterator[Outcome]:
    try:
        outputs = run([item for item, _eager in batch])
    except Exception as e:
        if len(batch) == 1:
            text = f"{type(e).__name__}: {e}".partition("\n")[0]
            yield Outcome(batch[0][0], Difference(), text[:300])
            return
        half = len(batch) // 2
        yield from _batch(batch[:half])
        yield from _batch(batch[half:])
        return
    for item, eager in batch:
        ours, outputs = outputs[: len(eager)], outputs[len(eager) :]
        differences = [compare(a, b) for a, b in zip(eager, ours)]
        wrong = next((d.wrong for d in differences if d.wrong), "")
        ulps = max(d.ulps for d in differences)
        yield Outcome(item, Difference(wrong, ulps, max(d.error for d in differences)))


def run(items: Sequence[Item]) -> list[torch.Tensor]:
    """The results of items, from native code of one graph."""
    module, inputs = graph_of(items)
    with torch.no_grad():
        return _inductor.compile(module, {}, 1).program().run(inputs)


def graph_of(items: Sequence[Item]) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    graph = fx.Graph()
    mode = FakeTensorMode()
    inputs: list[torch.Tensor] = []
    placeholders: list[fx.Node] = []
    calls: list[tuple[Item, Any]] = []
    known: dict[tuple[Any, ...], fx.Node] = {}

    def placeholder(v: Any) -> Any:
        if not is_tensor(v):
            return v
        key = (
            v.dtype,
            v.shape,
            v.stride(),
            v.contiguous().view(-1).numpy().tobytes()
            if v.dtype is not torch.bfloat16
            else v.contiguous().view(torch.int16).numpy().tobytes(),
        )
        if key not in known:
            node = known[key] = graph.placeholder(f"arg{len(inputs)}")
            node.meta["val"] = mode.from_tensor(v)
            inputs.append(v)
            placeholders.append(node)
        return known[key]

    for item in items:
        calls.append((item, pytree.tree_map(placeholder, (item.args, item.kwargs))))
    results: list[fx.Node] = []
    for item, (args, kwargs) in calls:
        node = graph.call_function(item.overload, args, kwargs)
        with mode, torch.no_grad():
            fake = item.overload(*fx.map_arg(args, _val), **fx.map_arg(kwargs, _val))
        node.meta["val"] = fake
        if is_tensor(fake):
            results.append(node)
            continue
        for i, element in enumerate(fake):
            if is_tensor(element):
                part = graph.call_function(operator.getitem, (node, i))
                part.meta["val"] = element
                results.append(part)
    graph.output(tuple(results)).meta["val"] = tuple(r.meta["val"] for r in results)
    return fx.GraphModule(torch.nn.Module(), graph), inputs


def _val(node: fx.Node) -> Any:
    return node.meta["val"]
