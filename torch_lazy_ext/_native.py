"""Native: what a compiler of native code is given of a graph, and what it gives back.

Apart from Inductor itself, which takes a second to import and may work in another process.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import sysconfig
import tempfile

import torch
from torch import fx

from torch_lazy_ext import _C, _fx

aten = torch.ops.aten

CONVOLUTIONS = {aten.convolution.default, aten._convolution.default}
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# Inductor packs the weights of these ahead of time, or folds them into those of a neighbour.
_PACKING = CONVOLUTIONS | {
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
}
# From this many multiplications on, a product is faster in the library that eager calls, on the
# weight as it is, than as generated code or on a weight packed by that library. Below, the call of
# the library costs more than the product.
_LARGE_PRODUCT = 1 << 20


class Unsuitable(Exception):
    """A graph that Inductor is not given; the message says why."""


Plan = tuple[bool, int, tuple[list[int], list[int], int] | None]


@dataclasses.dataclass
class Code:
    """Native code of a graph.

    Attributes:
        library: the file.
        inputs: which of the graph's inputs it takes, in its order.
        constants: what it takes after them, the same on each call.
        num_outputs: how many tensors it returns.
        plans: for each output of the graph, whether it comes from an input, which input or which of
            the code's outputs, and sizes, strides and offset of a view of that.
        last_is_check: the last of these says whether the others are right, and is none itself.
    """

    library: str
    inputs: list[int]
    constants: list[torch.Tensor]
    num_outputs: int
    plans: list[Plan]
    last_is_check: bool = False

    def program(self) -> _C.NativeProgram:
        return _C.NativeProgram(
            self.library,
            self.inputs,
            self.constants,
            self.num_outputs,
            [_C.OutputPlan(*plan) for plan in self.plans],
            self.last_is_check,
        )

    def check(
        self, module: fx.GraphModule, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Is every output of a run laid out, and does it share memory, as the graph says?

        Raises:
            RuntimeError: it is not.
        """
        given = {t.untyped_storage()._cdata for t in inputs}
        made: dict[int, int] = {}  # storage -> which of the code's outputs it is
        for k, (node, output, plan) in enumerate(zip(_fx.outputs_of(module), outputs, self.plans)):
            val = node.meta["val"]
            if (output.shape, output.dtype) != (val.shape, val.dtype) or (
                output.numel() > 0 and _steps(output) != _steps(val)
            ):
                raise RuntimeError(
                    f"Inductor's output {k} is {output.dtype}{list(output.shape)} with strides "
                    f"{output.stride()}, and not {val.dtype}{list(val.shape)} with {val.stride()}"
                )
            from_input, index, _view = plan
            storage = output.untyped_storage()._cdata
            if not from_input and (storage in given or made.setdefault(storage, index) != index):
                raise RuntimeError(f"Inductor's output {k} shares memory with another tensor")


def worth_freezing(module: fx.GraphModule, weights: list[int]) -> list[int]:
    """Those of the inputs `weights` whose values, as constants, make faster code.

    These are weights that an operator packs or folds, or that something other than a view is
    computed of without any other input. An embedding's table, for one, is read as it is.
    """
    packing = _PACKING if has_large_products(module) else _PACKING | _PRODUCTS
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    constant = {placeholders[i] for i in weights}
    for node in module.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and operands and constant.issuperset(operands):
            constant.add(node)

    def is_worth_it(node: fx.Node) -> bool:
        return any(
            is_worth_it(user)
            if user in constant and _is_part(user)
            else user in constant or user.target in packing
            for user in node.users
        )

    return [i for i in weights if is_worth_it(placeholders[i])]


def _is_part(node: fx.Node) -> bool:
    """Whether a node is its operand in another form: a view of it, or one of several tensors."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _fx.makes_views(target)
    return target is operator.getitem


def has_large_products(module: fx.GraphModule) -> bool:
    for node in module.graph.nodes:
        if node.target in _PRODUCTS:
            *_sum, left, _right = node.args[:3]
            if node.meta["val"].numel() * left.meta["val"].shape[-1] >= _LARGE_PRODUCT:
                return True
    return False


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.op != "output"


def unquoted_path() -> str | None:
    """Why PyTorch's Inductor compiles nothing at all here, or None.

    It takes the command for the compiler apart at spaces, also those within paths.
    """
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    for path in (torch.__file__, sysconfig.get_path("include"), cache):
        if any(character.isspace() for character in path):
            return f"PyTorch's Inductor cannot work with a space in a path, as in {path!r}"
    return None


def check_suitable(module: fx.GraphModule) -> None:
    if not any(n.op == "call_function" for n in module.graph.nodes):
        raise Unsuitable("nothing to compute")
    if any(n.op == "get_attr" for n in module.graph.nodes):
        raise Unsuitable("a torch.Generator of the program's own")
    tensors = [n.meta["val"] for n in module.graph.nodes if is_tensor(n)]
    if any(t.is_complex() for t in tensors):
        raise Unsuitable("complex numbers")
    if any(t.device.type != "cpu" for t in tensors):
        raise Unsuitable("other devices than the CPU")
    if (reason := unquoted_path()) is not None:
        raise Unsuitable(reason)


def outputs_of(module: fx.GraphModule) -> tuple[list[fx.Node], list[Plan]]:
    """What the code has to return, and how each output of the graph comes out of that.

    Of the memory that outputs share with each other or with inputs, the code returns the tensor
    that owns it, and the outputs are views of that as they are in eager.
    """
    owner_of: dict[int, fx.Node] = {}
    for node in module.graph.nodes:
        if is_tensor(node):
            owner_of.setdefault(node.meta["val"].untyped_storage()._cdata, node)
    placeholders = {n: i for i, n in enumerate(module.graph.find_nodes(op="placeholder"))}
    owners: dict[fx.Node, int] = {}
    plans: list[Plan] = []
    for node in _fx.outputs_of(module):
        if not isinstance(node, fx.Node) or not is_tensor(node):
            raise Unsuitable("a result that is no tensor")
        val = node.meta["val"]
        owner = owner_of[val.untyped_storage()._cdata]
        if val.dtype != owner.meta["val"].dtype:
            raise Unsuitable("a result that is a view of memory of another dtype")
        view = None
        if owner is not node:
            view = (list(val.shape), list(val.stride()), val.storage_offset())
        if owner in placeholders:
            plans.append((True, placeholders[owner], view))
        else:
            plans.append((False, owners.setdefault(owner, len(owners)), view))
    return list(owners), plans


def _steps(t: torch.Tensor) -> list[int]:
    """The strides that lead to another element."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]
