"""What of PyTorch's private API the package replaces or calls, and what it must look like.

PyTorch may change any of it in any release, without notice. What is replaced and no longer called,
or is another thing than it was, would give wrong results; so each entry is looked up and compared
when it is needed first, which for most is the import of the package.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch


class Entry(NamedTuple):
    """One name of PyTorch's.

    Attributes:
        place: the module or class that has it.
        name: its name there.
        kind: one of `KINDS`.
        use: what it is here for.
        notice: the tests that fail when it does something else.
        parameters: of a function in Python: what its parameters begin with; a `=` says that one has
            a default. What follows must have defaults.
        caller: what has to call it by its name, so that a replacement is called.
        since: the oldest release of torch that it was compared with.
    """

    place: str
    name: str
    kind: str
    use: str
    notice: str
    parameters: str = ""
    caller: str = ""
    since: str = "2.13"

    @property
    def path(self) -> str:
        return f"{self.place}.{self.name}"


KINDS: dict[str, tuple[type, ...]] = {
    "function": (types.FunctionType,),
    "function in C": (types.BuiltinFunctionType,),
    "method": (types.MethodDescriptorType, types.WrapperDescriptorType),
    "class method": (types.ClassMethodDescriptorType,),
    "property": (types.GetSetDescriptorType,),
    "class": (type,),
}

_TENSOR, _BASE = "torch.Tensor", "torch._C.TensorBase"
_DATA, _GRADIENTS = "test_data_dependence", "test_gradients_inside"
_CREATE_STATE = {
    "ASGD": "params_with_grad, grads, mus, axs, etas, state_steps",
    "Adadelta": "params_with_grad, grads, square_avgs, acc_deltas, state_steps",
    "Adafactor": "params_with_grad, grads, row_vars, col_vars, variances, state_steps",
    "Adagrad": "params_with_grad, grads, state_sums, state_steps",
    "Adam": "params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps",
    "Adamax": "params_with_grad, grads, exp_avgs, exp_infs, state_steps",
    "Muon": "params_with_grad, grads, muon_momentum_bufs",
    "NAdam": "params_with_grad, grads, exp_avgs, exp_avg_sqs, mu_products, state_steps",
    "RAdam": "params_with_grad, grads, exp_avgs, exp_avg_sqs, state_steps",
    "RMSprop": "params_with_grad, grads, square_avgs, momentum_buffer_list, grad_avgs, state_steps",
    "Rprop": "params, grads, prevs, step_sizes, state_steps",
    "SGD": "params, grads, momentum_buffer_list",
}
_RADAM = (
    "(params, grads, exp_avgs, exp_avg_sqs, state_steps, beta1, beta2, lr, weight_decay, eps, "
    "decoupled_weight_decay, differentiable, maximize, capturable, has_complex)"
)

# Looked at when the package is imported.
ENTRIES: tuple[Entry, ...] = (
    Entry(_BASE, "tolist", "method", "replaced: reads data", _DATA),
    Entry(_BASE, "numpy", "method", "replaced: reads data", _DATA),
    Entry(_BASE, "item", "method", "replaced: reads data", _DATA),
    Entry(_BASE, "data_ptr", "method", "replaced: refused", "test_limits"),
    Entry(_BASE, "data", "property", "replaced: assigned data are part of the graph", "test_state"),
    Entry(_BASE, "grad", "property", "replaced: gradients belong to twins", "test_training_step"),
    Entry(_BASE, "requires_grad", "property", "replaced: belongs to twins", "test_gradients"),
    Entry(_BASE, "is_nested", "property", "replaced: padded ones say so", "test_transformers"),
    Entry(_BASE, "_base", "property", "replaced: guarded", "test_inputs"),
    Entry(_BASE, "_is_view", "method", "replaced: guarded", "test_inputs"),
    Entry(_BASE, "storage_offset", "method", "replaced: guarded", "test_inputs"),
    Entry(_BASE, "requires_grad_", "method", "replaced: belongs to twins", "test_gradients"),
    Entry(_BASE, "_use_count", "method", "asked who holds a tensor", "test_hygiene"),
    Entry(_BASE, "apply_", "method", "replaced: refused", _DATA),
    Entry(_BASE, "map_", "method", "replaced: refused", _DATA),
    Entry(_BASE, "map2_", "method", "replaced: refused", _DATA),
    Entry(_BASE, "untyped_storage", "method", "replaced: refused", _DATA),
    Entry(_BASE, "new_tensor", "method", "replaced: reads data in lists", _DATA),
    Entry(_TENSOR, "__array__", "function", "replaced: reads data", _DATA, "(self, dtype=)"),
    Entry(
        _TENSOR, "__repr__", "function", "replaced: reads data", _DATA, "(self, tensor_contents=)"
    ),
    Entry(_TENSOR, "__format__", "function", "replaced: reads data", _DATA, "(self, format_spec)"),
    Entry(
        _TENSOR,
        "__deepcopy__",
        "function",
        "replaced: a twin is copied",
        "test_state",
        "(self, memo)",
    ),
    Entry(_TENSOR, "storage", "function", "replaced: refused", _DATA, "(self)"),
    Entry(_TENSOR, "share_memory_", "function", "replaced: refused", _DATA, "(self)"),
    Entry(_TENSOR, "__dlpack__", "function", "replaced: refused", _DATA, "(self)"),
    Entry(_TENSOR, "__reduce_ex__", "function", "replaced: refused", _DATA, "(self, proto)"),
    Entry(
        "torch._C._FunctionBase",
        "apply",
        "class method",
        "replaced: a custom function gets twins, or its gradients are wrong",
        "test_gradients",
        caller="torch.autograd.Function.apply",
    ),
    Entry(
        "torch.autograd",
        "_engine_run_backward",
        "function",
        "replaced: gradients and hooks of leaves belong to twins",
        _GRADIENTS,
        "(t_outputs)",
        "torch.autograd.backward",
    ),
    Entry(
        "torch._C",
        "_will_engine_execute_node",
        "function in C",
        "replaced: a hook of several tensors asks for nodes of these, and their twins have others",
        _GRADIENTS,
    ),
    Entry(
        "torch.autograd",
        "_is_checkpoint_valid",
        "function",
        "replaced: results are differentiated by torch.autograd.grad",
        _GRADIENTS,
        "()",
        "torch.utils.checkpoint.CheckpointFunction.backward",
    ),
    *(
        Entry("torch._C._autograd", name, "function in C", "called: hooks wait", _GRADIENTS)
        for name in (
            "_top_saved_tensors_default_hooks",
            "_push_saved_tensors_default_hooks",
            "_pop_saved_tensors_default_hooks",
        )
    ),
    *(
        Entry(_TENSOR, name, "function", "replaced: belongs to twins", _GRADIENTS, "(self, hook)")
        for name in ("register_hook", "register_post_accumulate_grad_hook")
    ),
    Entry(_BASE, "retain_grad", "method", "replaced: belongs to twins", _GRADIENTS),
    *(
        Entry(_BASE, name, "property", "replaced: belongs to twins", _GRADIENTS)
        for name in (
            "grad_fn",
            "is_leaf",
            "output_nr",
            "retains_grad",
            "_backward_hooks",
            "_post_accumulate_grad_hooks",
        )
    ),
    Entry(_BASE, "_version", "property", "replaced: refused", _GRADIENTS),
    Entry("torch", "tensor", "function in C", "replaced: reads data in lists", _DATA),
    Entry("torch", "from_numpy", "function in C", "replaced: shares memory", _DATA),
    Entry("torch", "as_tensor", "function in C", "replaced: shares memory", _DATA),
    Entry("torch", "asarray", "function in C", "replaced: shares memory", _DATA),
    Entry(
        "torch",
        "__getattr__",
        "function",
        "replaced: `default_generator`",
        "test_randomness",
        "(name)",
    ),
    Entry(_BASE, "new", "method", "replaced: reads data in lists", "test_higher_order"),
    Entry(
        "torch._ops.HigherOrderOperator",
        "dispatch",
        "function",
        "replaced: what the operator computes in the end is part of the graph",
        "test_higher_order",
        "(self, dispatch_key, *args, **kwargs)",
        "torch._ops.HigherOrderOperator.__call__",
    ),
    Entry(
        "torch",
        "compile",
        "function",
        "replaced: TorchDynamo is imported",
        "test_higher_order",
        "(model=)",
    ),
    Entry(
        "torch.func",
        "functionalize",
        "function",
        "replaced: a capture is functional",
        "test_mutation",
        "(func, remove=)",
    ),
    Entry(
        "torch.random",
        "manual_seed",
        "function",
        "replaced: seeds of the graph",
        "test_randomness",
        "(seed)",
    ),
    Entry("torch.random", "seed", "function", "replaced: refused", "test_limits", "()"),
    Entry(
        "torch.random",
        "initial_seed",
        "function",
        "replaced: seeds of the graph",
        "test_randomness",
        "()",
    ),
    Entry(
        "torch.random",
        "get_rng_state",
        "function",
        "replaced: states of the graph",
        "test_randomness",
        "()",
        "torch.random.fork_rng",
    ),
    Entry(
        "torch.random",
        "set_rng_state",
        "function",
        "replaced: states of the graph",
        "test_randomness",
        "(new_state)",
        "torch.random.fork_rng",
    ),
    *(
        Entry(
            "torch",
            f"_fused_{name}_",
            "function in C",
            "replaced: numbers of the graph as arguments",
            "test_training_step",
        )
        for name in ("sgd", "adam", "adamw", "adagrad")
    ),
    *(
        Entry(
            "torch.optim.radam",
            f"_{name}_tensor_radam",
            "function",
            "replaced: first steps in the same graph",
            "test_training_step",
            _RADAM,
            "torch.optim.radam.radam",
        )
        for name in ("single", "multi")
    ),
    *(
        Entry(
            f"torch.optim.{name}",
            "_init_group",
            "function",
            "replaced: the first step creates state",
            "test_training_step",
            f"(self, group, {lists})",
            f"torch.optim.{name}.step",
        )
        for name, lists in _CREATE_STATE.items()
    ),
    Entry("torch.optim.optimizer", "_to_scalar", "function", "called", "test_training_step", "(x)"),
    Entry(
        "torch.optim.optimizer",
        "_view_as_real",
        "function",
        "called",
        "test_training_step",
        "(params, *state_and_grads)",
    ),
    Entry(
        "torch.optim.Optimizer",
        "zero_grad",
        "function",
        "replaced: gradients belong to twins",
        "test_training_step",
        "(self, set_to_none=)",
    ),
    Entry(
        "torch.nn.Module",
        "zero_grad",
        "function",
        "replaced: gradients belong to twins",
        "test_training_step",
        "(self, set_to_none=)",
    ),
    Entry(
        "torch.optim.LBFGS",
        "step",
        "function",
        "replaced: refused",
        "test_limits",
        "(self, closure)",
    ),
    Entry(
        "torch._tensor_str",
        "_add_suffixes",
        "function",
        "called: the text of a tensor",
        _DATA,
        "(tensor_str, suffixes, indent, force_newline)",
    ),
    Entry(
        "torch",
        "_neg_view",
        "function in C",
        "called: a view with the negative bit",
        "test_outputs",
    ),
    Entry(
        "torch",
        "_lazy_clone",
        "function in C",
        "called: frozen weights tell of writes",
        "test_backends",
    ),
    Entry(
        "torch",
        "_debug_has_internal_overlap",
        "function in C",
        "called: memory that overlaps itself",
        "test_inputs",
    ),
    Entry(
        "torch._C",
        "_swap_tensor_impl",
        "function in C",
        "called: gives data to what the program keeps",
        "test_hygiene",
    ),
    Entry(
        "torch._C",
        "_set_grad_enabled",
        "function in C",
        "called: modes that a program leaves",
        "test_state",
    ),
    Entry(
        "torch._C",
        "_are_functorch_transforms_active",
        "function in C",
        "called: custom functions get twins below them",
        "test_operators",
    ),
    Entry(
        "torch._C",
        "_len_torch_function_stack",
        "function in C",
        "called: guards modes",
        "test_state",
    ),
    Entry(
        "torch._C", "_get_function_stack_at", "function in C", "called: guards modes", "test_state"
    ),
    Entry(
        "torch._C",
        "_get_schema",
        "function in C",
        "called: names of arguments",
        "test_generic_node",
    ),
    Entry(
        "torch._C",
        "_jit_pass_constant_propagation",
        "function in C",
        "called: folds frozen weights",
        "test_backends",
    ),
    Entry(
        "torch._C",
        "_jit_pass_optimize_frozen_graph",
        "function in C",
        "called: folds frozen weights",
        "test_backends",
    ),
    Entry(
        "torch._C._autograd",
        "_unsafe_set_version_counter",
        "function in C",
        "called: version counters as eager leaves them",
        "test_mutation",
    ),
    Entry(
        "torch._C.Generator",
        "get_state",
        "method",
        "replaced: states of the graph",
        "test_randomness",
    ),
    Entry(
        "torch.utils._device", "DeviceContext", "class", "guarded: the default device", "test_state"
    ),
)

# Looked at when torch.distributed is there.
DISTRIBUTED: tuple[Entry, ...] = (
    *(
        Entry(
            "torch.distributed",
            name,
            "function",
            "replaced: recorded as its functional variant",
            "test_distributed_step",
            parameters,
        )
        for name, parameters in (
            ("all_reduce", "(tensor, op=, group=, async_op=)"),
            ("broadcast", "(tensor, src=, group=, async_op=, group_src=)"),
            ("all_gather_into_tensor", "(output_tensor, input_tensor, group=, async_op=)"),
            ("reduce_scatter_tensor", "(output, input, op=, group=, async_op=)"),
        )
    ),
    Entry(
        "torch.nn.parallel.DistributedDataParallel",
        "forward",
        "function",
        "replaced: gradients are averaged in the graph",
        "test_ddp",
        "(self, *inputs, **kwargs)",
    ),
)

# Looked at when a program has imported it.
FUNCTIONAL_COLLECTIVES: tuple[Entry, ...] = (
    Entry(
        "torch.distributed._functional_collectives",
        "_maybe_wrap_tensor",
        "function",
        "replaced: waits at once",
        "test_distributed_step",
        "(self)",
        "torch.distributed._functional_collectives.all_reduce",
    ),
)

# Looked at when something has been compiled.
DYNAMO: tuple[Entry, ...] = (
    Entry(
        "torch._dynamo.eval_frame",
        "_callback_from_stance",
        "function",
        "replaced: a compiled function is recorded as it was before",
        "test_higher_order",
        "(callback)",
        "torch._dynamo.eval_frame._TorchDynamoContext.__call__",
    ),
)

# Looked at when Inductor is asked for first.
INDUCTOR: tuple[Entry, ...] = tuple(
    Entry(place, name, kind, use, "test_backends", parameters)
    for place, name, kind, use, parameters in (
        (
            "torch._inductor.compile_fx",
            "compile_fx_inner",
            "function",
            "called: compiles a graph",
            "(gm, example_inputs)",
        ),
        (
            "torch._inductor.compile_fx",
            "get_cpp_wrapper_config",
            "function",
            "called: settings of the C++ entry point",
            "()",
        ),
        (
            "torch._inductor.freezing_utils",
            "enter_freezing",
            "function",
            "called: constants of the code",
            "()",
        ),
        (
            "torch._inductor.freezing_utils",
            "record_has_frozen_params",
            "function",
            "called: constants of the code",
            "(gm)",
        ),
        (
            "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu",
            "write_constant",
            "function",
            "replaced: constants are handed over at the call",
            "(self, name, hashed)",
        ),
        (
            "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu",
            "generate_fallback_kernel_with_runtime_lookup_boxed",
            "function",
            "replaced: lists of integers where the schema has symbolic ones",
            "(self, op_overload, raw_args, output_args, raw_outputs)",
        ),
        (
            "torch._inductor.lowering",
            "fallback_handler",
            "function",
            "called: operators that keep eager's kernel",
            "(kernel, add_to_fallback_set=)",
        ),
        (
            "torch._inductor.constant_folding",
            "constant_fold",
            "function",
            "called: folds frozen weights",
            "(gm)",
        ),
        (
            "torch._inductor.constant_folding",
            "replace_node_with_constant",
            "function",
            "called: constants of the code",
            "(gm, node, constant=)",
        ),
        (
            "torch._inductor.decomposition",
            "select_decomp_table",
            "function",
            "called: decompositions",
            "()",
        ),
        (
            "torch._inductor.freezing",
            "convert_conv_weights_to_channels_last",
            "function",
            "called: layouts of frozen weights",
            "(gm)",
        ),
        (
            "torch._inductor.fx_passes.freezing_patterns",
            "freezing_passes",
            "function",
            "called: fuses frozen weights",
            "(gm, aot_example_inputs)",
        ),
        (
            "torch._inductor.fx_passes.post_grad",
            "view_to_reshape",
            "function",
            "called: views of other layouts",
            "(gm)",
        ),
        (
            "torch._inductor.graph.GraphLowering",
            "decide_layout_opt",
            "function",
            "called: layouts of convolutions",
            "(gm, is_inference)",
        ),
        (
            "torch._inductor.scheduler.SchedulerNode",
            "recompute_size_and_body",
            "function",
            "replaced: the order of loops",
            "(self, extra_indexing_constraints=, recompute_sizes_body_func=)",
        ),
        (
            "torch._dynamo.utils",
            "preserve_rng_state",
            "function",
            "replaced: other threads draw meanwhile",
            "()",
        ),
        ("torch._guards", "TracingContext", "class", "called: a trace", ""),
        ("torch._guards", "tracing", "function", "called: a trace", "(context)"),
        (
            "torch._C._aoti",
            "alloc_tensors_by_stealing_from_void_ptrs",
            "function in C",
            "called: results of the code",
            "",
        ),
    )
)


class PrivateApiError(ImportError):
    """A release of torch has something else under a name that the package replaces or calls."""


def lookup(place: str, name: str) -> Any:
    """What `place` has under a name, as it lies there: no descriptor is asked.

    Raises:
        AttributeError: there is nothing.
    """
    parts = place.split(".")
    for i in range(len(parts), 0, -1):
        owner = sys.modules.get(".".join(parts[:i]))
        if owner is not None:
            break
    for part in parts[i:]:
        owner = getattr(owner, part)
    return inspect.getattr_static(owner, name)


Lookup = Callable[[str, str], Any]


def difference(entry: Entry, find: Lookup = lookup) -> str | None:
    """How an entry differs from what it must be: a sentence, or None where it does not."""
    try:
        found = find(entry.place, entry.name)
    except AttributeError:
        return f"there is no {entry.path}"
    function: Any = _without_binding(found)
    if not isinstance(function, KINDS[entry.kind]):
        return f"{entry.path} is a {type(function).__name__}, and no {entry.kind}"
    if entry.parameters:
        parameters = list(inspect.signature(cast(Any, function)).parameters.values())
        expected = [p for p in entry.parameters.strip("()").split(", ") if p]
        more = parameters[len(expected) :]
        if [_text(p) for p in parameters[: len(expected)]] != expected or any(
            p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in more
        ):
            here = ", ".join(map(_text, parameters))
            return f"{entry.path} takes ({here}), and not {entry.parameters}"
    if entry.caller:
        place, _, name = entry.caller.rpartition(".")
        try:
            caller = find(place, name)
        except AttributeError:
            return f"there is no {entry.caller}, which is to call {entry.path}"
        if caller is not found and entry.name not in _names(caller):
            return f"{entry.caller} does not call {entry.path}"
    return None


def _without_binding(found: Any) -> Any:
    return found.__func__ if isinstance(found, (staticmethod, classmethod)) else found


def _text(parameter: inspect.Parameter) -> str:
    variable = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    stars = next((text for kind, text in variable.items() if kind is parameter.kind), "")
    default = "" if parameter.default is parameter.empty else "="
    return f"{stars}{parameter.name}{default}"


def _names(function: Any) -> set[str]:
    """The names that the code of a function uses, and that of functions in it."""
    stack = [getattr(inspect.unwrap(_without_binding(function)), "__code__", None)]
    names: set[str] = set()
    while stack:
        code = stack.pop()
        if code is not None:
            names.update(code.co_names)
            stack.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return names


def changed(difference: str, use: str) -> PrivateApiError:
    return PrivateApiError(
        f"torch_lazy_ext relies on private parts of torch, and this torch ({torch.__version__}) "
        f"has changed one: {difference} ({use}). Use a release of torch that it supports"
    )


def check(entries: Iterable[Entry], find: Lookup = lookup) -> None:
    """Compare entries with what is there.

    Raises:
        PrivateApiError: one is another thing.
    """
    for entry in entries:
        found = difference(entry, find)
        if found is not None:
            raise changed(found, entry.use)


@functools.cache
def check_once(entries: tuple[Entry, ...]) -> None:
    check(entries)


def every() -> tuple[Entry, ...]:
    return ENTRIES + DISTRIBUTED + FUNCTIONAL_COLLECTIVES + DYNAMO + INDUCTOR


def table() -> str:
    """All entries as a table in Markdown."""
    rows = ["| name | what it is | what for | since | what would notice |", "| --- " * 5 + "|"]
    for e in every():
        kind = f"{e.kind} `{e.parameters}`" if e.parameters else e.kind
        rows.append(f"| `{e.path}` | {kind} | {e.use} | {e.since} | {e.notice} |")
    return "\n".join(rows) + "\n"
