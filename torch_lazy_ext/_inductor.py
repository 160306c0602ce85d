"""Inductor: from a graph in FX to a native library, through Inductor's own entry points.

The graph is functional, so none of what AOTAutograd puts around compiled code is needed: it is
decomposed, optimized and handed to `compile_fx_inner`, and the library that comes back is called at
its C++ entry point (`_C.NativeProgram`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, config, freezing_utils
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.constant_folding import constant_fold, replace_node_with_constant
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.freezing import convert_conv_weights_to_channels_last
from torch._inductor.fx_passes.freezing_patterns import freezing_passes
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torch_lazy_ext import _C, _fx

aten = torch.ops.aten


class Unsuitable(Exception):
    """A graph that Inductor is not given; the message says why."""


_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
# Inductor packs the weights of these ahead of time, or folds them into those of a neighbour.
_PACKING = {
    aten.convolution.default,
    aten._convolution.default,
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
}
# From this many multiplications on, a product is faster in the library that eager calls, on the
# weight as it is, than as generated code or on a weight packed by that library. Below, the call of
# the library costs more than the product.
_LARGE_PRODUCT = 1 << 20

_SETTINGS = {
    "cpp_wrapper": True,
    # Eager's random numbers, drawn in the order of the program.
    "fallback_random": True,
    "reorder_for_peak_memory": False,
    # A variant's guards have compared sizes and strides.
    "size_asserts": False,
    "alignment_asserts": False,
}
_FROZEN_SETTINGS = {"freezing": True}
# Products by constant weights as generated code, together with what stands around them.
_SMALL_PRODUCTS_SETTINGS = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "CPP"}


Plan = tuple[bool, int, tuple[list[int], list[int], int] | None]


@dataclasses.dataclass
class Compiled:
    """Native code of a graph.

    Attributes:
        plans: for each output, whether it comes from an input, which input or which of the code's
            outputs, and sizes, strides and offset of a view of that.
    """

    module: fx.GraphModule
    program: _C.NativeProgram
    plans: list[Plan]

    def check(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Is every output of a run laid out, and does it share memory, as the graph says?

        Raises:
            RuntimeError: it is not.
        """
        given = {t.untyped_storage()._cdata for t in inputs}
        made: dict[int, int] = {}  # storage -> which of the code's outputs it is
        for k, (node, output, plan) in enumerate(
            zip(self.module.graph.output_node().args[0], outputs, self.plans)
        ):
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
    packing = _PACKING if _has_large_products(module) else _PACKING | _PRODUCTS
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    constant = {placeholders[i] for i in weights}
    for node in module.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and operands and constant.issuperset(operands):
            constant.add(node)

    def is_worth_it(node: fx.Node) -> bool:
        return any(
            is_worth_it(user)
            if user in constant and _fx.makes_views(user.target)
            else user in constant or user.target in packing
            for user in node.users
        )

    return [i for i in weights if is_worth_it(placeholders[i])]


def _has_large_products(module: fx.GraphModule) -> bool:
    for node in module.graph.nodes:
        if node.target in _PRODUCTS:
            *_sum, left, _right = node.args[:3]
            if node.meta["val"].numel() * left.meta["val"].shape[-1] >= _LARGE_PRODUCT:
                return True
    return False


def compile(
    module: fx.GraphModule,
    frozen: dict[int, torch.Tensor],
    threads: int,
) -> Compiled:
    """Compile a graph.

    Leaves the random number generator alone, so that it can run beside the program.

    Args:
        module: a graph as `_fx.graph_module` gives it.
        frozen: for some of the inputs, the value that becomes part of the code.
        threads: how many the code runs in.

    Raises:
        Unsuitable: the graph holds what Inductor does not compile as eager computes it.
    """
    _check_suitable(module)
    owners, plans = _outputs(module)
    if not owners:
        raise Unsuitable("nothing to compute")
    settings: dict[str, Any] = {}
    if frozen:
        settings |= _FROZEN_SETTINGS
        if not _has_large_products(module):
            settings |= _SMALL_PRODUCTS_SETTINGS
    try:
        compiled = _compiled(module, owners, frozen, threads, settings)
    except InductorError as e:
        if "NoValidChoicesError" not in str(e):
            raise
        # Some product has no generated code: two activations, another dtype.
        settings["max_autotune_gemm_backends"] = "CPP,ATEN"
        compiled = _compiled(module, owners, frozen, threads, settings)
    call = compiled.current_callable
    count = len(module.graph.find_nodes(op="placeholder"))
    kept = [i for i in range(count) if i not in frozen]
    program = _C.NativeProgram(
        _library_of(call),
        kept,
        _constants_of(call, len(kept)),
        len(owners),
        [_C.OutputPlan(*plan) for plan in plans],
    )
    return Compiled(module, program, plans)


def _compiled(
    module: fx.GraphModule,
    owners: list[fx.Node],
    frozen: dict[int, torch.Tensor],
    threads: int,
    settings: dict[str, Any],
) -> Any:
    with _configured(settings, threads), _tracing(module):
        graph = _decomposed(module, owners)
        layout_opt = _freeze(graph, frozen) if frozen else None
        _keep_layouts(graph)
        fakes = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
        return compile_fx.compile_fx_inner(
            graph, fakes, cpp_wrapper=True, is_inference=True, layout_opt=layout_opt
        )


@contextlib.contextmanager
def _configured(settings: dict[str, Any], threads: int) -> Iterator[None]:
    settings = {**_SETTINGS, **settings, "cpp.threads": threads}
    with (
        # torch.compile holds the same lock: Inductor compiles one thing at a time.
        compile_lock,
        config.patch(settings),
        config.patch(compile_fx.get_cpp_wrapper_config()),
        # Compiling draws no numbers. Another thread may do so meanwhile, and would draw them again.
        unittest.mock.patch.object(
            compile_fx.dynamo_utils, "preserve_rng_state", contextlib.nullcontext
        ),
        # Constants are arguments of the code. With their addresses in its comments, the library
        # on disk would serve no other process.
        unittest.mock.patch.object(CppWrapperCpu, "write_constant", lambda *_args: None),
    ):
        yield


@contextlib.contextmanager
def _tracing(module: fx.GraphModule) -> Iterator[None]:
    """Fake tensors of one kind for all that happens to a graph, and constants among them."""
    mode = next(n.meta["val"].fake_mode for n in module.graph.nodes if _is_tensor(n))
    with (
        torch.no_grad(),
        torch._C._DisableAutocast(),
        V.set_fake_mode(mode),
        tracing(TracingContext(mode)),
        unittest.mock.patch.object(mode, "allow_non_fake_inputs", True),
        # All sizes are numbers; the cache on disk is there for graphs with this only.
        unittest.mock.patch.object(mode, "shape_env", ShapeEnv()),
    ):
        yield


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.op != "output"


def _check_suitable(module: fx.GraphModule) -> None:
    if not any(n.op == "call_function" for n in module.graph.nodes):
        raise Unsuitable("nothing to compute")
    if any(n.op == "get_attr" for n in module.graph.nodes):
        raise Unsuitable("a torch.Generator of the program's own")
    tensors = [n.meta["val"] for n in module.graph.nodes if _is_tensor(n)]
    if any(t.is_complex() for t in tensors):
        raise Unsuitable("complex numbers")
    if any(t.device.type != "cpu" for t in tensors):
        raise Unsuitable("other devices than the CPU")


def _outputs(module: fx.GraphModule) -> tuple[list[fx.Node], list[Plan]]:
    """What the code has to return, and how each output of the graph comes out of that.

    Of the memory that outputs share with each other or with inputs, the code returns the tensor
    that owns it, and the outputs are views of that as they are in eager.
    """
    owner_of: dict[int, fx.Node] = {}
    for node in module.graph.nodes:
        if _is_tensor(node):
            owner_of.setdefault(node.meta["val"].untyped_storage()._cdata, node)
    placeholders = {n: i for i, n in enumerate(module.graph.find_nodes(op="placeholder"))}
    owners: dict[fx.Node, int] = {}
    plans: list[Plan] = []
    for node in module.graph.output_node().args[0]:
        if not isinstance(node, fx.Node) or not _is_tensor(node):
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


def _decomposed(module: fx.GraphModule, owners: list[fx.Node]) -> fx.GraphModule:
    """The graph in the operators that Inductor lowers, with `owners` as its outputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    graph.output(tuple(copies[owner] for owner in owners))
    interpreter = fx.Interpreter(fx.GraphModule(module, graph))

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Where a fake kernel has other strides than the recorded ones, these count.
        return tuple(
            value
            if value.stride() == owner.meta["val"].stride()
            else _with_strides(value, owner.meta["val"].stride())
            for value, owner in zip(interpreter.run(*args), owners)
        )

    fakes = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    # The mode also for what has no operand: a factory would make, or draw, real numbers.
    with torch.fx.traceback.preserve_node_meta(), V.fake_mode:
        functional = torch.func.functionalize(run, remove="mutations")
        decomposed = make_fx(functional, decomposition_table=select_decomp_table())(*fakes)
    compile_fx._recursive_joint_graph_passes(decomposed, input_device=torch.device("cpu"))
    return decomposed


def _with_strides(value: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    return value.new_empty_strided(value.shape, strides).copy_(value)


def _freeze(graph: fx.GraphModule, frozen: dict[int, torch.Tensor]) -> bool:
    """Make constants of inputs, fold what depends on nothing else, and pack weights.

    Not `torch._inductor.freezing.freeze`: that also merges equal nodes, two results among them.
    Returns whether Inductor chooses layouts for convolutions.
    """
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    with freezing_utils.enter_freezing():
        for i, value in frozen.items():
            replace_node_with_constant(graph, placeholders[i], value)
        graph.recompile()
        fakes = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
        layout_opt = GraphLowering.decide_layout_opt(graph, is_inference=True)
        if layout_opt:
            compile_fx.fake_tensor_prop(graph, fakes, True)
            convert_conv_weights_to_channels_last(graph)
        view_to_reshape(graph)
        freezing_passes(graph, fakes)
        constant_fold(graph)
        freezing_utils.record_has_frozen_params(graph)
    # A result that is a constant is a new tensor on each call: the caller may write to it.
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        for node in output.args[0]:
            if node.op == "get_attr":
                copy = graph.graph.call_function(aten.clone.default, (node,))
                copy.meta["val"] = node.meta["val"].clone()
                output.replace_input_with(node, copy)
    graph.recompile()
    return layout_opt


def _keep_layouts(graph: fx.GraphModule) -> None:
    output = graph.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))


def _library_of(call: Callable[..., Any]) -> str:
    """The file of the library behind the function that Inductor's generated module offers."""
    return call.__globals__["inductor_entry"].__self__.__file__


def _constants_of(call: Callable[..., Any], num_inputs: int) -> list[torch.Tensor]:
    """What the generated module hands to its library after the inputs."""
    handed: list[torch.Tensor] = []

    def entry(handles: list[Any]) -> list[Any]:
        handed.extend(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles))
        return []

    with contextlib.suppress(IndexError):  # it unpacks outputs that are not there
        call.__globals__["_wrap_func"](entry)([torch.empty(0)] * num_inputs)
    return handed[num_inputs:]


def _steps(t: torch.Tensor) -> list[int]:
    """The strides that lead to another element."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1]
