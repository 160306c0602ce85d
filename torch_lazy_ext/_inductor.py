"""Inductor: from a graph in FX to a native library, through Inductor's own entry points.

The graph is functional, so none of what AOTAutograd puts around compiled code is needed: it is
decomposed, optimized and handed to `compile_fx_inner`, and the library that comes back is called at
its C++ entry point (`_C.NativeProgram`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.convert_frame import compile_lock
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, config, freezing_utils
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.constant_folding import constant_fold, replace_node_with_constant
from torch._inductor.exc import InductorError
from torch._inductor.freezing import convert_conv_weights_to_channels_last
from torch._inductor.fx_passes.freezing_patterns import freezing_passes
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.virtualized import V
from torch.compiler import config as compiler_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torch_lazy_ext import _exact, _fx, _native, _private

_private.check(_private.INDUCTOR)

aten = torch.ops.aten


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


def compile(
    module: fx.GraphModule,
    frozen: dict[int, torch.Tensor],
    threads: int,
    *,
    portable: bool = False,
) -> _native.Code:
    """Compile a graph.

    Args:
        module: a graph as `_fx.graph_module` gives it.
        frozen: for some of the inputs, the value that becomes part of the code.
        threads: how many the code runs in.
        portable: constants must be tensors that can be written to a file, which those are not that
            oneDNN lays out for a convolution.

    Raises:
        Unsuitable: the graph holds what Inductor does not compile as eager computes it.
    """
    _native.check_suitable(module)
    owners, plans = _native.outputs_of(module)
    if not owners and not any(n.target is aten.copy_.default for n in module.graph.nodes):
        raise _native.Unsuitable("nothing to compute")
    settings: dict[str, Any] = {}
    if frozen:
        settings |= _FROZEN_SETTINGS
        if not _native.has_large_products(module):
            settings |= _SMALL_PRODUCTS_SETTINGS
        if portable and any(n.target in _native.CONVOLUTIONS for n in module.graph.nodes):
            settings["cpp.weight_prepack"] = False
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
    return _native.Code(_library_of(call), kept, _constants_of(call, len(kept)), len(owners), plans)


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
        compiler_config.patch(cache_key_tag=_cache_tag()),  # type: ignore[attr-defined]
        # Compiling draws no numbers. Another thread may do so meanwhile, and would draw them again.
        unittest.mock.patch.object(dynamo_utils, "preserve_rng_state", contextlib.nullcontext),
        # Constants are arguments of the code. With their addresses in its comments, the library
        # on disk would serve no other process.
        unittest.mock.patch.object(CppWrapperCpu, "write_constant", lambda *_args: None),
        unittest.mock.patch.object(SchedulerNode, "recompute_size_and_body", _recompute_loops),
        unittest.mock.patch.object(CppWrapperCpu, _BOXED, _call_boxed),
        _exact.patched(),
    ):
        yield


_BOXED = "generate_fallback_kernel_with_runtime_lookup_boxed"
_call_boxed_with_symbols = getattr(CppWrapperCpu, _BOXED)


def _is_symbolic(kind: torch._C.JitType) -> bool:
    if isinstance(kind, (torch.ListType, torch.OptionalType)):
        return _is_symbolic(kind.getElementType())
    return isinstance(kind, torch.SymIntType)


@dataclasses.dataclass
class _Argument:
    real_type: torch._C.JitType


@dataclasses.dataclass
class _Schema:
    name: str
    overload_name: str
    arguments: list[_Argument]


@dataclasses.dataclass
class _Overload:
    """What the call of an operator is written from."""

    _schema: _Schema


def _call_boxed(wrapper: Any, overload: torch._ops.OpOverload, *rest: Any) -> None:
    """Write a call through the dispatcher, with integers where the schema has symbolic ones.

    Inductor's own hands over a list of SymInt where the schema says so, and a kernel that takes a
    list of int refuses that.
    """
    schema = overload._schema
    arguments = [
        _Argument(a.type if _is_symbolic(a.real_type) else a.real_type) for a in schema.arguments
    ]
    plain = _Overload(_Schema(schema.name, schema.overload_name, arguments))
    _call_boxed_with_symbols(wrapper, plain, *rest)


@functools.cache
def _cache_tag() -> str:
    """Part of the keys of Inductor's caches on disk: code that it makes otherwise, or another
    version of this module made, is other code of the same graph."""
    digest = hashlib.sha256()
    for module in (__file__, _exact.__file__):
        digest.update(pathlib.Path(module).read_bytes())
    return f"torch_lazy_ext {digest.hexdigest()}"


_recompute_loops_unordered = SchedulerNode.recompute_size_and_body


def _recompute_loops(node: SchedulerNode, *args: Any, **kwargs: Any) -> None:
    """Give a node other loops, and leave it after the write to what it reads.

    Inductor's own reads the dependencies anew from the body, which names a buffer and not the write
    to it that comes before: what `bernoulli_` fills was read before it was filled.
    """
    _recompute_loops_unordered(node, *args, **kwargs)
    node.set_read_writes(node.read_writes.rename(node.mutation_renames))


@contextlib.contextmanager
def _tracing(module: fx.GraphModule) -> Iterator[None]:
    """Fake tensors of one kind for all that happens to a graph, and constants among them."""
    mode = next(n.meta["val"].fake_mode for n in module.graph.nodes if _native.is_tensor(n))
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
        decomposed = make_fx(functional, decomposition_table=_exact.decompositions())(*fakes)
    with config.patch(_exact.EARLY_SETTINGS):
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
        for node in _fx.outputs_of(graph):
            if node.op == "get_attr":
                copy = graph.graph.call_function(aten.clone.default, (node,))
                copy.meta["val"] = node.meta["val"].clone()
                output.replace_input_with(node, copy)
    graph.recompile()
    return layout_opt


def _keep_layouts(graph: fx.GraphModule) -> None:
    output = graph.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(_fx.outputs_of(graph))))


def _library_of(call: Callable[..., Any]) -> str:
    """The file of the library behind the function that Inductor's generated module offers."""
    file: str = call.__globals__["inductor_entry"].__self__.__file__
    return file


def _constants_of(call: Callable[..., Any], num_inputs: int) -> list[torch.Tensor]:
    """What the generated module hands to its library after the inputs."""
    handed: list[torch.Tensor] = []

    def entry(handles: list[Any]) -> list[Any]:
        handed.extend(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles))
        return []

    with contextlib.suppress(IndexError):  # it unpacks outputs that are not there
        call.__globals__["_wrap_func"](entry)([torch.empty(0)] * num_inputs)
    return handed[num_inputs:]
