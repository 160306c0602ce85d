"""Native: where the code that Inductor makes of an operator is not exact, and what is done instead.

Rounding may differ from eager's. Whether a number is NaN, an infinity, or a zero with a sign, and
integers and booleans, may not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp.decompositions import pw_cast_for_opmath
from torch._inductor import config, ir, lowering
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V, ops

aten = torch.ops.aten
Overload = torch._ops.OpOverload

# Settings of Inductor -> why.
SETTINGS: dict[str, Any] = {
    # n * 0 becomes 0, and is NaN where n is an infinity or NaN.
    "joint_graph_constant_folding": False,
    # Between two operators a half or bfloat16 is rounded, and may become an infinity.
    "emulate_precision_casts": True,
}

# While the graph is optimized before it is lowered. Patterns take attention that the program writes
# out for the fused operator, which gives zeros for a row without a key where softmax gives NaN, and
# x * s - max(x * s) for (x - max(x)) * s, which overflows elsewhere.
EARLY_SETTINGS: dict[str, Any] = {"pattern_matcher": False}

# Operators that keep the kernel which eager calls, on floating numbers -> what Inductor's code has
# otherwise. Where eager's own answer depends on the processor or on the place in the tensor (its
# vectors take the second of two equal numbers where single ones take the first, and its compiler
# contracts products and sums), nothing but its kernel gives that.
KERNELS = {
    "acosh": "infinite where x * x overflows",
    "adaptive_max_pool2d": "another one of two NaN",
    "adaptive_max_pool3d": "another one of two NaN",
    "addcmul": "another infinity or zero where a product over- or underflows",
    "addmv": "another zero of a sum",
    "amax": "the other one of two zeros",
    "amin": "the other one of two zeros",
    "aminmax": "the other one of two zeros",
    "atanh": "0.0 of -0.0, and 0.0 of small numbers",
    "avg_pool2d_backward": "-0.0 where nothing but -0.0 is added up",
    "avg_pool3d_backward": "-0.0 where nothing but -0.0 is added up",
    "celu": "0.0 of -0.0",
    "clamp.Tensor": "the other one of two zeros",
    "clamp_max.Tensor": "the other one of two zeros",
    "clamp_min.Tensor": "the other one of two zeros",
    "div.Tensor_mode": "-1.0 or NaN beside an infinite or a large quotient",
    "div.Scalar_mode": "-1.0 or NaN beside an infinite or a large quotient",
    "elu": "0.0 of -0.0",
    "erf": "0.0 of small numbers",
    "expm1": "0.0 of -0.0, and 0.0 of small numbers",
    "floor_divide": "-1.0 or NaN beside an infinite or a large quotient",
    "fmax": "the other one of two zeros",
    "fmin": "the other one of two zeros",
    "fmod": "NaN, by place in the tensor, where the quotient is large",
    "fractional_max_pool2d": "another one of two NaN, and of two zeros",
    "fractional_max_pool3d": "another one of two NaN, and of two zeros",
    "gelu": "another infinity or NaN than the kernel that eager takes for this layout",
    "gelu_backward": "an infinity where eager's kernel has NaN, or the reverse, by processor",
    "grid_sampler_2d": "NaN beside infinities, and zeros of the other sign",
    "hardswish_backward": "a number where the operand is NaN",
    "hardtanh_backward": "zeros of the other sign",
    "lerp": "another infinity or zero where a product over- or underflows",
    "logaddexp2": "0.0 for small results",
    "logit_backward": "0.0 of NaN",
    "max": "the other one of two zeros",
    "max_pool3d_with_indices": "the place of another one of two NaN",
    "maximum": "the other one of two zeros",
    "min": "the other one of two zeros",
    "minimum": "the other one of two zeros",
    "mv": "another zero of a sum",
    "native_group_norm": "an infinity where eager has NaN",
    "native_group_norm_backward": "another zero of a sum",
    "native_layer_norm_backward": "another zero of a sum of one number",
    "remainder": "NaN beside infinities, and zeros of the other sign",
    "soft_margin_loss_backward": "few digits of small numbers",
    "softshrink": "zeros of the other sign",
    "special_xlog1py": "NaN beside infinities",
    "upsample_linear1d": "NaN beside infinities, and zeros of the other sign",
}


def _clamped(x: torch.Tensor, bound: Any, beyond: Callable[[Any, Any], Any]) -> torch.Tensor:
    """As eager's kernels: a number that equals the bound stays, so -0.0 stays beside 0.0."""
    x = x.to(torch.result_type(x, bound))
    if isinstance(bound, float) and math.isnan(bound):
        return torch.full_like(x, math.nan)
    return torch.where(beyond(x, bound), bound, x)


def _clamp(x: torch.Tensor, min: Any = None, max: Any = None) -> torch.Tensor:
    if min is not None:
        x = _clamped(x, min, torch.lt)
    if max is not None:
        x = _clamped(x, max, torch.gt)
    return x


def _clamp_min(x: torch.Tensor, min: Any) -> torch.Tensor:
    return _clamp(x, min=min)


def _clamp_max(x: torch.Tensor, max: Any) -> torch.Tensor:
    return _clamp(x, max=max)


@pw_cast_for_opmath
def _addcdiv(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, value: Any = 1) -> torch.Tensor:
    return x + (a * value if value != 1 else a) / b


@pw_cast_for_opmath
def _sigmoid_backward(gradient: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return gradient * (1 - y) * y


def _pow(x: torch.Tensor, exponent: Any) -> Any:
    """aten/src/ATen/native/cpu/PowKernel.cpp, which has ways of its own for these exponents."""
    if x.is_floating_point() and exponent in _POWERS:
        return _POWERS[exponent](x)
    return NotImplemented


_POWERS: dict[float, Callable[[torch.Tensor], torch.Tensor]] = {
    0.5: torch.sqrt,
    -0.5: torch.rsqrt,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    -1.0: torch.reciprocal,
    -2.0: lambda x: (x * x).reciprocal(),
}


def _largest(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Of two zeros any one: for what is only subtracted, before an exponential."""
    if x.dim() == 0:
        return x
    largest: torch.Tensor = torch.ops.prims.amax(x, [dim % x.dim()])
    return largest.unsqueeze(dim)


def _widened(x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    return x.to(torch._prims_common.get_computation_dtype(x.dtype)), x.dtype


def _softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    x, dtype = _widened(x)
    if x.numel():
        x = x - _largest(x, dim)
    x = x.exp()
    x = x / x.sum(dim, keepdim=True)
    return x if half_to_float else x.to(dtype)


def _log_softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    x, dtype = _widened(x)
    if x.numel():
        x = x - _largest(x, dim)
    x = x - x.exp().sum(dim, keepdim=True).log()
    return x if half_to_float else x.to(dtype)


def _softmax_backward(
    gradient: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    gradient, _ = _widened(gradient)
    y, _ = _widened(y)
    return ((gradient - (gradient * y).sum(dim, keepdim=True)) * y).to(dtype)


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> Any:
    """Of eager's kernels, the one that a tensor meets depends on how it lies in memory, and they
    differ at both ends: so eager is asked what it has there, and the formula is put right. Where it
    gives one number in two ways, or in a way that is not known, its kernel stays."""
    if x.dtype not in (torch.float32, torch.float64) or x.numel() == 0:
        return NotImplemented
    largest, step = torch.finfo(x.dtype).max, torch.finfo(x.dtype).eps
    half = largest / 2
    above = half * (1 + step)
    known = _eager_at((math.inf, -math.inf, largest, above, half, -largest), x, approximate)
    if known is None or not math.isfinite(known[half]) or str(known[-largest]) != "-0.0":
        return NotImplemented
    # x + x * erf(...) overflows, and x * (1 + erf(...)) does not.
    overflows = math.isinf(known[largest])
    if overflows != math.isinf(known[above]):
        return NotImplemented
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
        result = 0.5 * x * (1 + torch.tanh(inner))
    else:
        result = x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    if overflows:
        result = torch.where(x > half, math.inf, result)
    if known[math.inf] != math.inf:
        result = torch.where(x == math.inf, known[math.inf], result)
    if not math.isnan(known[-math.inf]):
        result = torch.where(x == -math.inf, known[-math.inf], result)
    return result


def _eager_at(
    values: tuple[float, ...], like: torch.Tensor, approximate: str
) -> dict[float, float] | None:
    """What eager's `gelu` has for each of `values`, all over a tensor of the given layout.

    Returns:
        None where it is not the same all over.
    """
    known: dict[float, float] = {}
    with torch.utils._python_dispatch._disable_current_modes():
        probe = torch.empty_strided(tuple(like.shape), tuple(like.stride()), dtype=like.dtype)
        for value in values:
            found = aten.gelu(probe.fill_(value), approximate=approximate).flatten()
            same = (found == found[0]) & (found.signbit() == found[0].signbit())
            if not bool((same | found.isnan() & found[0].isnan()).all()):
                return None
            known[value] = found[0].item()
    return known


# Overload -> its formula in eager's kernel, in operators whose code is exact.
FORMULAS: dict[Overload, Callable[..., Any]] = {
    aten._log_softmax.default: _log_softmax,
    aten._softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.clamp.default: _clamp,
    aten.gelu.default: _gelu,
    aten.clamp_min.default: _clamp_min,
    aten.clamp_max.default: _clamp_max,
    aten.addcdiv.default: _addcdiv,
    aten.sigmoid_backward.default: _sigmoid_backward,
    aten.pow.Tensor_Scalar: _pow,
}

# Operators on lists whose elements become one call each of this operator, as in eager; their own
# code would be made of Inductor's for the element.
_LISTS = {
    **{
        name: name
        for name in ("add", "sub", "mul", "div", "addcmul", "addcdiv", "lerp", "pow", "clamp_min")
    },
    **{name: name for name in ("clamp_max", "expm1", "sqrt", "rsqrt", "reciprocal", "sign")},
}
_LISTS_OF_NUMBERS = {"maximum": "clamp_min", "minimum": "clamp_max"}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's table without the operators above, and with formulas of our own."""
    kept = _kernels()
    table = {k: v for k, v in select_decomp_table().items() if k not in kept}
    return table | FORMULAS | _of_lists()


@functools.cache
def _kernels() -> frozenset[Overload]:
    return frozenset(o for name in KERNELS for o in _overloads(name))


def _overloads(name: str) -> list[Overload]:
    """The overloads that a functional graph may hold, or the one that is named."""
    name, _, one = name.partition(".")
    packet = getattr(aten, name)
    overloads = [getattr(packet, o) for o in ([one] if one else packet.overloads())]
    return [o for o in overloads if not o._schema.is_mutable]


@functools.cache
def _of_lists() -> dict[Overload, Callable[..., Any]]:
    found: dict[Overload, Callable[..., Any]] = {}
    for name, element in {**_LISTS, **_LISTS_OF_NUMBERS}.items():
        if not hasattr(aten, f"_foreach_{name}"):
            continue
        for overload in _overloads(f"_foreach_{name}"):
            of_numbers = overload._overloadname in ("Scalar", "ScalarList")
            if name in _LISTS or of_numbers:
                found[overload] = functools.partial(_one_by_one, overload, getattr(aten, element))
    return found


_KEYWORDS = {"value": "value", "scalars": "value", "alpha": "alpha"}


def _one_by_one(overload: Overload, element: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    given = dict(zip((a.name for a in overload._schema.arguments), args)) | kwargs
    count = max(len(v) for v in given.values() if isinstance(v, (list, tuple)))
    named = {a.name for a in getattr(element, element.overloads()[0])._schema.arguments}
    results = []
    for i in range(count):
        values = {k: v[i] if isinstance(v, (list, tuple)) else v for k, v in given.items()}
        keywords = {_KEYWORDS[k]: values.pop(k) for k in list(values) if _KEYWORDS.get(k) in named}
        results.append(element(*values.values(), **keywords))
    return results


def _lowerings() -> dict[Overload, Callable[..., Any]]:
    """Calls of eager's kernels, for Inductor's table of code for operators."""
    table: dict[Overload, Callable[..., Any]] = {
        overload: functools.partial(_call_kernel, overload) for overload in _kernels()
    }
    table[torch.ops.prims.amax.default] = _amax
    return table


def _amax(x: Any, dims: list[int], *, output_dtype: Any = None) -> Any:
    return _own_lowerings()[aten.amax.default](x, dims)


def _call_kernel(overload: Overload, *args: Any, **kwargs: Any) -> Any:
    own = _own_lowerings().get(overload)
    values = V.graph.current_node.meta["val"]
    values = values if isinstance(values, (tuple, list)) else [values]
    if own is not None and not any(v.is_floating_point() for v in values):
        return own(*args, **kwargs)  # integers are exact
    return _fallback(overload)(*args, **kwargs)


_create_reduction = ir.Reduction.create.__func__  # type: ignore[attr-defined] # a class method


def _create_sum(
    cls: Any, device: Any, dst_dtype: Any, src_dtype: Any, inner_fn: Any, *args: Any, **kwargs: Any
) -> Any:
    """A sum begins with 0.0: of nothing but -0.0 it is 0.0. Inductor's own begins with the first
    number where there are few."""
    names = ("ranges", "reduction_ranges", "reduction_type")
    given = {**dict(zip(names, args)), **kwargs}
    if given["reduction_type"] == "sum" and src_dtype.is_floating_point:
        count = V.graph.sizevars.simplify(sympy_product(given["reduction_ranges"]))
        if count.is_number and count < config.unroll_reductions_threshold:
            plain = inner_fn

            def inner_fn(index: Any, reduction_index: Any) -> Any:
                return ops.add(plain(index, reduction_index), ops.constant(0.0, src_dtype))

    return _create_reduction(cls, device, dst_dtype, src_dtype, inner_fn, *args, **kwargs)


@functools.cache
def _fallback(overload: Overload) -> Callable[..., Any]:
    made: Callable[..., Any] = lowering.fallback_handler(overload, add_to_fallback_set=False)
    return made


@functools.cache
def _own_lowerings() -> dict[Overload, Callable[..., Any]]:
    known = [*_kernels(), aten.amax.default]
    return {o: lowering.lowerings[o] for o in known if o in lowering.lowerings}


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Inductor, with what the tables here say in the place of its own."""
    _own_lowerings()  # before the tables are in their place
    with (
        config.patch(SETTINGS),
        unittest.mock.patch.dict(lowering.lowerings, _lowerings()),
        unittest.mock.patch.object(ir.Reduction, "create", classmethod(_create_sum)),
        # The operator exists in the dispatcher, which is all that calls it: nobody needs to know.
        unittest.mock.patch.object(ir.log, "warning", lambda *_args: None),
    ):
        yield
