"""Native: Python floats that a graph computes, as tensors.

In a graph as it is lowered, such a number (`_number.Number`) is a 0-dim float64 tensor that
`aten::item` makes a float of wherever an operator takes one. A compiler would have to leave its
code for each of them. Here every operator that takes such a float becomes its variant for tensors,
or what its formula says.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from torch_lazy_ext import _fx
from torch_lazy_ext._native import Unsuitable, is_tensor

aten = torch.ops.aten
numbers = torch.ops.torch_lazy_ext

# Arithmetic of numbers. Python raises where the result of the last two is not finite.
_ARITHMETIC = {
    numbers.add.default: aten.add.Tensor,
    numbers.sub.default: aten.sub.Tensor,
    numbers.mul.default: aten.mul.Tensor,
    numbers.truediv.default: aten.div.Tensor,
    numbers.pow.default: aten.pow.Tensor_Tensor,
    numbers.neg.default: aten.neg.default,
    numbers.abs.default: aten.abs.default,
}
_MAY_RAISE = {numbers.truediv.default, numbers.pow.default}

# Operators of a tensor and a number by name -> the same of two tensors.
_OF_TENSORS = {
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "pow": aten.pow.Tensor_Tensor,
    "lerp": aten.lerp.Tensor,
    "fill": aten.fill.Tensor,
    "maximum": aten.maximum.default,
    "minimum": aten.minimum.default,
    "clamp_min": aten.clamp_min.Tensor,
    "clamp_max": aten.clamp_max.Tensor,
    "masked_fill": aten.masked_fill.Tensor,
    **{name: getattr(aten, name).Tensor for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}


def as_tensors(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without `aten::item` and without numbers; itself, if it has none.

    Where Python would raise for a number, that number is not finite here: an additional last
    output of the result, `meta["check"]` of the module, says whether all of them are finite.

    Raises:
        Unsuitable: an operator takes a number that has no such variant.
    """
    if not any(n.target is aten.item.default for n in module.graph.nodes):
        return module
    return _Rewriting(module).run()


class _Rewriting:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.known: dict[fx.Node, Any] = {}
        self.numbers: set[fx.Node] = set()  # of the old graph
        self.checked: list[fx.Node] = []
        tensors = filter(is_tensor, module.graph.nodes)
        self.mode = next(n.meta["val"].fake_mode for n in tensors)

    def run(self) -> fx.GraphModule:
        with self.mode, torch.no_grad():
            for node in self.module.graph.nodes:
                self.known[node] = self.translate(node)
        made = fx.GraphModule(self.module, self.graph, "CapturedGraph")
        made.meta["check"] = bool(self.checked)
        return made

    def translate(self, node: fx.Node) -> Any:
        operands = node.all_input_nodes
        if node.target is aten.item.default or node.target is numbers.wrapped_number.default:
            self.numbers.add(node)
            return self.known[operands[0]]
        if node.target is numbers.item.default:
            value = self.call(aten._to_copy.default, self.known[operands[0]], dtype=torch.float64)
            return self.call(aten.view.default, value, [])
        if node.target in _ARITHMETIC:
            value = self.call(_ARITHMETIC[node.target], *map(self.number, node.args))
            if node.target in _MAY_RAISE:
                self.checked.append(value)
            return value
        if node.op == "output":
            return self.output()
        if node.op == "call_function" and self.numbers.intersection(operands):
            return self.rewrite(node)
        if node.target is operator.getitem and isinstance(self.known[operands[0]], list):
            return self.known[operands[0]][node.args[1]]
        copy = self.graph.node_copy(node, lambda n: self.known[n])
        return copy

    def output(self) -> Any:
        results = list(fx.map_arg(_fx.outputs_of(self.module), lambda n: self.known[n]))
        if self.checked:
            finite = [self.call(aten.isfinite.default, n) for n in self.checked]
            every = finite[0]
            for other in finite[1:]:
                every = self.call(aten.logical_and.default, every, other)
            results.append(every)
        made = self.graph.output(tuple(results))
        made.meta["val"] = fx.map_arg(tuple(results), lambda n: n.meta["val"])
        return made

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        fakes, more = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta["val"] = target(*fakes, **more)
        return made

    def number(self, value: Any) -> Any:
        """An operand of arithmetic, as a tensor."""
        if isinstance(value, fx.Node):
            return self.known[value]
        return self.call(aten.scalar_tensor.default, float(value), dtype=torch.float64)

    def rewrite(self, node: fx.Node) -> Any:
        schema = node.target._schema  # type: ignore[union-attr]
        given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
        arguments = {
            a.name: given.get(a.name, a.default_value if a.has_default_value() else None)
            for a in schema.arguments
        }
        name = schema.name.removeprefix("aten::")
        outs = node.meta["val"]
        if not name.startswith("_foreach_"):
            if not isinstance(outs, torch.Tensor):
                raise Unsuitable(f"a number of the graph as an argument of {name}")
            return self.element(name, list(arguments.items()), outs)
        made = []
        for i, out in enumerate(outs):
            each = [
                (key, value[i] if isinstance(value, (list, tuple)) else value)
                for key, value in arguments.items()
            ]
            made.append(self.element(name.removeprefix("_foreach_"), each, out))
        return made

    def element(self, name: str, arguments: list[tuple[str, Any]], out: torch.Tensor) -> fx.Node:
        """One operator on tensors, with the recorded result `out`."""
        dtype = out.dtype
        if not dtype.is_floating_point:
            dtype = next(
                (
                    self.known[v].meta["val"].dtype
                    for _k, v in arguments
                    if isinstance(v, fx.Node) and v not in self.numbers
                ),
                torch.float64,
            )
        if dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32  # what their kernels compute in
        if not dtype.is_floating_point:
            raise Unsuitable(f"a number of the graph as an argument of {name} of integers")

        def operand(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if value not in self.numbers:
                return self.known[value]
            number = self.known[value]
            if number.meta["val"].dtype == dtype:
                return number
            return self.call(aten._to_copy.default, number, dtype=dtype)

        values = {key: operand(value) for key, value in arguments}
        made = self.formula(name, values)
        if made.meta["val"].shape != out.shape:
            raise Unsuitable(f"a number of the graph as an argument of {name}")
        if made.meta["val"].dtype != out.dtype:
            made = self.call(aten._to_copy.default, made, dtype=out.dtype)
        made.meta["val"] = out
        return made

    def formula(self, name: str, values: dict[str, Any]) -> fx.Node:
        if name in ("addcmul", "addcdiv"):
            # As the kernels: self + value * tensor1 (* or /) tensor2, from left to right.
            own, first, second = (values[k] for k in ("self", "tensor1", "tensor2"))
            scale = values.get("value", values.get("scalars"))
            scaled = self.call(aten.mul.Tensor, first, scale)
            combine = aten.mul.Tensor if name == "addcmul" else aten.div.Tensor
            return self.call(aten.add.Tensor, own, self.call(combine, scaled, second))
        if name == "scalar_tensor":
            number: fx.Node = values["s"]
            return number
        if name == "full":
            made = self.call(aten.full.default, values["size"], 0.0, dtype=values["dtype"])
            return self.call(aten.fill.Tensor, made, values["fill_value"])
        if name == "full_like":
            return self.call(aten.fill.Tensor, values["self"], values["fill_value"])
        if name == "rsub":
            return self.call(aten.sub.Tensor, values["other"], values["self"])
        alpha = values.pop("alpha", 1)
        operands = [v for v in values.values() if v is not None]
        if name not in _OF_TENSORS or not all(
            isinstance(v, (fx.Node, float, int)) for v in operands
        ):
            raise Unsuitable(f"a number of the graph as an argument of {name}")
        if isinstance(alpha, fx.Node) or alpha != 1:
            operands[1] = self.call(aten.mul.Tensor, operands[1], alpha)
        first = operands[0]
        if not isinstance(first, fx.Node):
            operands[0] = self.call(aten.scalar_tensor.default, float(first), dtype=torch.float64)
        return self.call(_OF_TENSORS[name], *operands)
