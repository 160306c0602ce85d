# Owner(s): ["oncall: jit"]

"""Numerics of a replay: type promotion, rounding, special values, and ops often done wrong."""

import itertools
import math
import unittest
from typing import Any

import torch
from oracle import makefunctiontest, maketest, random_tensor, tensors
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
    torch.complex64,
)  # fmt: skip
SCALARS = {"int": 3, "float": 2.5, "bool": True, "complex": 1 + 2j, "large": 2**33}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PromotionTest(unittest.TestCase):
    """Result types with Python scalars, wrapped numbers and 0-dim tensors."""


def _with_scalar(scalar: Any) -> Any:
    def program(x):
        # Subtraction is not defined for booleans, nor floor division for complex numbers.
        results = [x + scalar, scalar + x, x * scalar, x == scalar]
        if x.dtype is not torch.bool and not isinstance(scalar, bool):
            results += [x - scalar, scalar - x]
        if not x.is_complex() and not isinstance(scalar, complex):
            results += [x / scalar, torch.maximum(x, torch.full_like(x, 1)), x < scalar]
        return results, torch.result_type(x, scalar)

    return program


for _dtype, (_name, _scalar) in itertools.product(DTYPES, SCALARS.items()):
    if not (_dtype is torch.uint8 and _name == "large"):
        setattr(
            PromotionTest,
            f"test_{_short(_dtype)}_with_{_name}",
            makefunctiontest(_with_scalar(_scalar), tensors((2, 3), dtype=_dtype)),
        )


def _pair(first: torch.dtype, second: torch.dtype, shape: tuple[int, ...]) -> Any:
    return makefunctiontest(
        lambda x, y: (x + y, y * x, torch.where(x == y, x, y), torch.stack([x + y, y + x])),
        lambda: (random_tensor((2, 3), first), random_tensor(shape, second)),
    )


for _first, _second in itertools.permutations(DTYPES, 2):
    _name = f"{_short(_first)}_and_{_short(_second)}"
    setattr(PromotionTest, f"test_{_name}_tensor", _pair(_first, _second, (2, 3)))
    # A 0-dim tensor takes part only by category.
    setattr(PromotionTest, f"test_{_name}_zero_dim", _pair(_first, _second, ()))


class WrappedNumberTest(unittest.TestCase):
    """Numbers that became tensors on their way: some remember that they were numbers."""

    test_tensor_of_number = makefunctiontest(
        lambda x: (x + torch.tensor(2.5), x.int() + torch.tensor(2.5), torch.tensor(2) * x),
        tensors((2, 3)),
    )
    test_double_scalar_tensor = makefunctiontest(
        lambda x: (
            x * torch.tensor(0.1, dtype=torch.float64),
            x.half() * torch.tensor(0.1).double(),
        ),
        tensors((2, 3)),
    )
    test_zero_dim_of_reduction = makefunctiontest(
        lambda x: (x.half() * x.double().mean(), x.int() * x.sum()), tensors((2, 3))
    )
    test_zero_dim_of_index = makefunctiontest(
        lambda x: (x.half() + x[0, 0], x.half() + x[0, :1]), tensors((2, 3))
    )
    test_where_with_scalars = makefunctiontest(
        lambda x: (
            torch.where(x > 0, x, 0), torch.where(x > 0, 1.5, x), torch.where(x > 0, 1, 2.0),
            torch.where(x > 0, x.half(), 1.5),
        ),
        tensors((2, 3)),
    )  # fmt: skip
    test_scalar_tensor_then_item_type = makefunctiontest(
        lambda x: (torch.scalar_tensor(3), torch.tensor(True) + x, torch.tensor(1j) * x),
        tensors((2, 3)),
    )
    # A float that is read from a tensor is a number of the graph.
    test_number_on_the_right = makefunctiontest(
        lambda x: (
            x * (2 - x.sum().item()),
            x * (3 / (x.sum().item() + 20)),
            x + 1.5 ** x.mean().item(),
        ),
        tensors((2, 3)),
    )
    test_number_in_a_tensor = makefunctiontest(
        lambda x: (
            torch.tensor(x.sum().item(), dtype=torch.float64),
            torch.tensor(x.sum().item()),
            torch.tensor(x.sum().item(), dtype=torch.int32),
        ),
        tensors((2, 3)),
    )
    test_tensors_in_a_list = makefunctiontest(
        lambda x: (torch.tensor([x[0], x[1]]), torch.tensor([x[0].long(), 1])),
        tensors((2,), dtype=torch.float64),
        captures=None,
    )
    test_numpy_scalars = makefunctiontest(
        lambda x: (x * _float32(2.5), x + _int64(2), _float64(0.1) * x), tensors((2, 3))
    )
    test_pow_with_scalars = makefunctiontest(
        lambda x: (x**2, 2**x, x**0.5, x.int() ** 2, 2.0 ** x.int(), x.abs() ** -1), tensors((2, 3))
    )
    test_fill_and_full = makefunctiontest(
        lambda x: (torch.full((2,), 1), torch.full((2,), 1.0), torch.full((2,), True),
                   torch.full((2,), 1j), x.new_full((2,), 3), torch.full_like(x, 2**40)),
        tensors((2, 3)),
    )  # fmt: skip
    test_sum_of_integers = makefunctiontest(
        lambda x: (x.sum(), x.prod(), x.cumsum(0), x.to(torch.uint8).sum(), x.bool().sum()),
        tensors((2, 3), dtype=torch.int32),
    )
    test_mean_of_integers_is_refused = makefunctiontest(
        lambda x: x.mean(), tensors((2, 3), dtype=torch.int32)
    )
    test_clamp_with_scalars = makefunctiontest(
        lambda x: (x.clamp(0), x.int().clamp(0.5), x.clamp(min=-1, max=1), x.int().clamp(0, 2)),
        tensors((2, 3)),
    )
    test_alpha_scalars = makefunctiontest(
        lambda x: (torch.add(x, x, alpha=2), torch.sub(x.int(), x.int(), alpha=3),
                   torch.add(x, 1, alpha=0.5), torch.rsub(x, 2)),
        tensors((2, 3)),
    )  # fmt: skip
    test_addmm_scalars = makefunctiontest(
        lambda x, y: (
            torch.addmm(x, y, y, beta=2, alpha=0.5),
            torch.baddbmm(x[None], y[None], y[None], beta=0),
        ),
        tensors((3, 3), (3, 3)),
        exact=False,
    )
    test_default_dtype_of_results = makefunctiontest(
        lambda x: (torch.arange(3), torch.arange(3.0), torch.linspace(0, 1, 3), torch.zeros(2),
                   torch.tensor([1.0]), torch.tensor([1]), torch.tensor([]), torch.empty(0).dtype),
        tensors((2, 3)),
    )  # fmt: skip
    test_float64_default_dtype = makefunctiontest(
        lambda x: _with_default_dtype(
            torch.float64, lambda: (torch.zeros(2), x.int() / 2, torch.tensor(1.5))
        ),
        tensors((2, 3)),
    )
    test_huge_and_tiny_constants = makefunctiontest(
        lambda x: (x * 1e38, x * 1e-45, x * 1e300, x.double() * 5e-324, x + 16777217),
        tensors((2, 3)),
    )
    test_neighbouring_constants = makefunctiontest(
        lambda x: _read(
            *(x.double() * k for k in NEIGHBOURS),
            *(torch.add(x.double(), x.double(), alpha=k) for k in NEIGHBOURS),
        ),
        tensors((2, 3)),
    )
    test_equal_numbers_of_other_types = makefunctiontest(
        lambda x: _read(
            *(x.int() * one for one in (1, 1.0, True, 1 + 0j)),
            *(x.int() * zero for zero in (0, 0.0, False, 0j)),
            *(torch.full((2,), one) for one in (1, 1.0, True, 1 + 0j)),
        ),
        tensors((2, 3)),
    )
    test_numbers_of_equal_bits = makefunctiontest(
        lambda x: _read(x.double() * 1.0, x.double() * 0x3FF0000000000000), tensors((2, 3))
    )
    test_signed_zero_constants = makefunctiontest(
        lambda x: _read(x * 0.0, x * -0.0, torch.full((1,), 0.0), torch.full((1,), -0.0)),
        tensors((2, 3)),
    )


NEIGHBOURS = (0.1, 0.10000000000000002, math.nextafter(0.1, 0))


def _read(*values):
    """Copies: values of the graph that are no results become one where they are equal."""
    return tuple(v.clone() for v in values)


def _float32(x):
    import numpy

    return numpy.float32(x)


def _float64(x):
    import numpy

    return numpy.float64(x)


def _int64(x):
    import numpy

    return numpy.int64(x)


def _with_default_dtype(dtype, function):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return function()
    finally:
        torch.set_default_dtype(before)


SPECIAL = [
    float("nan"),
    float("inf"),
    -float("inf"),
    0.0,
    -0.0,
    1.0,
    -1.5,
    2.5,
    1e-40,
    3e38,
    0.5,
    -0.5,
]


def special() -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(SPECIAL))
    return torch.tensor(SPECIAL)[order], torch.tensor(SPECIAL)


def signed() -> tuple[Tensor, Tensor]:
    return torch.randint(-9, 10, (20,)), torch.randint(1, 5, (20,)) * (
        torch.randint(0, 2, (20,)) * 2 - 1
    )


DIVISIONS = {
    "true": lambda x, y: x / y,
    "floor_divide": lambda x, y: x // y,
    "remainder": lambda x, y: x % y,
    "fmod": lambda x, y: torch.fmod(x, y),
    "floor_mode": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "trunc_mode": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "none_mode": lambda x, y: torch.div(x, y, rounding_mode=None),
    "by_scalar": lambda x, y: (x // 3, x % 3, x / 3, 7 // y, 7 % y, x // -2, x % -2),
    "by_float": lambda x, y: (x // 0.3, x % 0.3, x // -0.3, x % -0.3),
    "divmod": lambda x, y: divmod(x, 3) if False else (x // y, x % y),
}
del DIVISIONS["divmod"]


def _products_in_place(number: Any) -> Any:
    """Products with a number, in place and not, where the memory could be used again."""

    def program(x, y):
        mul, mul_ = torch.ops.aten.mul.Scalar, torch.ops.aten.mul_.Scalar
        parts = [x.exp(), x.exp(), y.exp()]
        torch._foreach_mul_(parts, number)
        others = [x.exp(), y.exp()]
        torch._foreach_mul_(others, [number, number])
        y.mul_(number)
        mul_(x, number)
        return [
            mul(x.exp(), number),
            mul_(x.exp(), number),
            torch._foreach_mul([x.exp(), x], number),
            parts,
            others,
        ]

    return program


class InPlaceProductTest(unittest.TestCase):
    """`mul_` rounds its number to the tensor's type, and `mul` does not."""


for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _name, _scalar in {"fraction": 0.3989422804014327, "int": 1027, "exact": 2}.items():
        setattr(
            InPlaceProductTest,
            f"test_{_short(_dtype)}_{_name}",
            makefunctiontest(
                _products_in_place(_scalar),
                lambda dtype=_dtype: (torch.randn(64).to(dtype), torch.randn(64)),
            ),
        )


def _pointwise_with_number(operator: Any, dtype: torch.dtype) -> Any:
    def program(x):
        return operator(x.exp(), 0.3989422804014327), operator(x.exp(), -1.7)

    return makefunctiontest(program, lambda: (torch.randn(64).to(dtype),))


class PointwiseInPlaceTest(unittest.TestCase):
    """The executor takes in-place variants where it can: each rounds as its operator does."""


for _name in (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "remainder",
    "fmod",
    "clamp_min",
    "clamp_max",
):
    for _overload, _dtype in itertools.product(
        ("Scalar", "Tensor_Scalar", "default"), (torch.bfloat16, torch.float16)
    ):
        _operator = getattr(getattr(torch.ops.aten, _name), _overload, None)
        if _operator is not None:
            setattr(
                PointwiseInPlaceTest,
                f"test_{_name}_{_overload}_{_short(_dtype)}",
                _pointwise_with_number(_operator, _dtype),
            )


class DivisionTest(unittest.TestCase):
    """Division in each rounding mode, on signed integers and on special values."""

    test_two_rounding_modes = makefunctiontest(
        lambda x, y: _read(*(torch.div(x, y, rounding_mode=m) for m in ("floor", "trunc"))), signed
    )
    test_by_zero_integer = makefunctiontest(lambda x, y: x // (y - y), signed, captures=None)
    test_integer_true_division = makefunctiontest(lambda x, y: (x / y, x.byte() / 2), signed)
    test_shifts = makefunctiontest(lambda x, y: (x << 2, x >> 1, x & y, x | y, x ^ 3, ~x), signed)


for _name, _program in DIVISIONS.items():
    setattr(DivisionTest, f"test_integers_{_name}", makefunctiontest(_program, signed))
    setattr(DivisionTest, f"test_special_{_name}", makefunctiontest(_program, special))
    setattr(
        DivisionTest,
        f"test_bfloat16_{_name}",
        makefunctiontest(_program, tensors((9,), (9,), dtype=torch.bfloat16)),
    )

UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "digamma",
    "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "frac", "isfinite", "isinf",
    "isnan", "isneginf", "isposinf", "isreal", "lgamma", "log", "log10", "log1p", "log2",
    "logical_not", "logit", "nan_to_num", "neg", "positive", "reciprocal", "relu", "round",
    "rsqrt", "sgn", "sigmoid", "sign", "signbit", "sin", "sinc", "sinh", "sqrt", "square", "tan",
    "tanh", "trunc", "i0", "deg2rad", "rad2deg",
)  # fmt: skip
BINARY = (
    "atan2", "copysign", "eq", "fmax", "fmin", "ge", "gt", "heaviside", "hypot", "ldexp",
    "logaddexp", "logaddexp2", "logical_and", "logical_or", "logical_xor", "maximum", "minimum",
    "mul", "ne", "nextafter", "pow", "sub", "xlogy", "isclose", "float_power",
)  # fmt: skip
REDUCTIONS = {
    "max_min": lambda x, y: (x.max(), x.min(), x.max(0), x.argmax(), x.argmin(), x.aminmax()),
    "nan_reductions": lambda x, y: (x.nansum(), x.nanmean(), x.nanmedian(), x.nan_to_num().sum()),
    "sums": lambda x, y: (x.sum(), x.prod(), x.mean(), x.std(), x.var(), x.norm()),
    "any_all": lambda x, y: (x.any(), x.all(), (x == x).all(), x.count_nonzero()),
    "sort": lambda x, y: (x.sort(), x.argsort(), x.topk(3), x.sort(descending=True, stable=True)),
    "cumulative": lambda x, y: (x.cummax(0), x.cummin(0), x.cumsum(0), x.logcumsumexp(0)),
    "softmax": lambda x, y: (x.softmax(0), x.log_softmax(0), x.logsumexp(0)),
    "clamps": lambda x, y: (x.clamp(-1, 1), x.clamp(y, y + 1), x.nan_to_num(0, 1, -1)),
    "comparisons": lambda x, y: (x < y, x == y, x != x, torch.equal(x.isnan(), x != x)),
    "casts": lambda x, y: (x.half(), x.bfloat16(), x.double(), x.isfinite().int(), x.bool()),
    "rounding": lambda x, y: (x.round(decimals=1), (x * 10).round(decimals=-1), x.trunc()),
    "frexp": lambda x, y: torch.frexp(x),
    "unordered_where": lambda x, y: torch.where(x.isnan(), y, x),
    "lerp": lambda x, y: (x.lerp(y, 0.5), torch.lerp(x, y, torch.tensor(0.25))),
    "isin": lambda x, y: (torch.isin(x, y[:3]), torch.bucketize(x, y[5:].nan_to_num().sort()[0])),
    "histc": lambda x, y: torch.histc(x.nan_to_num(0, 1, -1).clamp(-2, 2), 4),
}


class ComparisonTest(unittest.TestCase):
    """Tensors beside a number that their dtype rounds, or cannot hold: what the tensor is compared
    with is the rounded number."""


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
NUMBERS = (0, 0.1, -0.1, 1, 3, 2**24 + 1, 0.1 + 1e-12, math.inf, -math.inf, math.nan, True)


def _compare(name: str) -> Any:
    comparison = getattr(torch, name)
    return lambda x: [comparison(x, number) for number in NUMBERS]


def _numbers(dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.tensor(NUMBERS, dtype=dtype)
    return torch.tensor([int(number) for number in NUMBERS if math.isfinite(number)] * 2)


for _name, _dtype in itertools.product(
    COMPARISONS, (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
):
    setattr(
        ComparisonTest,
        f"test_{_name}_{_short(_dtype)}",
        makefunctiontest(
            _compare(_name),
            lambda dtype=_dtype: (_numbers(dtype)[torch.randperm(len(NUMBERS))],),
        ),
    )


class SpecialValueTest(unittest.TestCase):
    """nan, inf, signed zeros, subnormal numbers and halves."""


for _name in UNARY:
    setattr(
        SpecialValueTest,
        f"test_{_name}",
        makefunctiontest(lambda x, y, name=_name: getattr(torch, name)(x), special),
    )
for _name in BINARY:
    setattr(
        SpecialValueTest,
        f"test_{_name}",
        makefunctiontest(lambda x, y, name=_name: getattr(torch, name)(x, y), special),
    )
for _name, _program in REDUCTIONS.items():
    # torch.equal looks at the values.
    _captures = None if _name == "comparisons" else 1
    setattr(
        SpecialValueTest,
        f"test_{_name}",
        makefunctiontest(_program, special, exact=False, captures=_captures),
    )


def _fresh_target() -> tuple[Tensor, Tensor, Tensor]:
    return randn(5), randn(5), torch.randint(0, 2, (5,)) * 2.0 - 1


LOSSES = {
    "margin_ranking": lambda a, b, t: F.margin_ranking_loss(a, b, t, margin=0.5),
    "margin_ranking_none": lambda a, b, t: F.margin_ranking_loss(a, b, t, reduction="none"),
    "mse": lambda a, b, t: F.mse_loss(a, b),
    "l1": lambda a, b, t: F.l1_loss(a, b, reduction="sum"),
    "smooth_l1": lambda a, b, t: F.smooth_l1_loss(a, b, beta=0.7),
    "huber": lambda a, b, t: F.huber_loss(a, b, delta=0.3),
    "soft_margin": lambda a, b, t: F.soft_margin_loss(a, t),
    "hinge_embedding": lambda a, b, t: F.hinge_embedding_loss(a, t, margin=0.4),
    "cosine_embedding": lambda a, b, t: F.cosine_embedding_loss(a[None], b[None], t[:1], 0.1),
    "triplet": lambda a, b, t: F.triplet_margin_loss(a[None], b[None], t[None]),
    "poisson_nll": lambda a, b, t: F.poisson_nll_loss(a, b.abs(), full=True),
    "gaussian_nll": lambda a, b, t: F.gaussian_nll_loss(a, b, t.abs()),
    "kl_div": lambda a, b, t: F.kl_div(a.log_softmax(0), b.softmax(0), reduction="batchmean"),
    "bce": lambda a, b, t: F.binary_cross_entropy(a.sigmoid(), (t + 1) / 2),
    "bce_with_logits": lambda a, b, t: F.binary_cross_entropy_with_logits(
        a, (t + 1) / 2, pos_weight=torch.tensor(2.0)
    ),
    "cross_entropy": lambda a, b, t: F.cross_entropy(
        torch.stack([a, b]), torch.tensor([1, -100]), label_smoothing=0.1
    ),
    "cross_entropy_probabilities": lambda a, b, t: F.cross_entropy(a[None], b.softmax(0)[None]),
    "nll_2d": lambda a, b, t: F.nll_loss(a.view(1, 5, 1, 1).log_softmax(1), torch.tensor([[[3]]])),
    "multilabel": lambda a, b, t: F.multilabel_soft_margin_loss(a[None], (t[None] + 1) / 2),
    "multi_margin": lambda a, b, t: F.multi_margin_loss(a[None], torch.tensor([2])),
    "ctc": lambda a, b, t: F.ctc_loss(
        randn(0, 0).new_ones(4, 1, 5).mul(a).log_softmax(2), torch.tensor([[1, 2]]),
        torch.tensor([4]), torch.tensor([2]),
    ),
    "ctc_of_lists": lambda a, b, t: F.ctc_loss(
        randn(0, 0).new_ones(4, 1, 5).mul(a).log_softmax(2), torch.tensor([[1, 2]]), [4], [2]
    ),
}  # fmt: skip


class LossTest(unittest.TestCase):
    """Losses: most are compositions that pick constants by dtype and reduction."""


for _name, _loss in LOSSES.items():
    setattr(LossTest, f"test_{_name}", makefunctiontest(_loss, _fresh_target, exact=False))

IMAGE = tensors((2, 4, 6, 6))
LAYOUT_OPS = {
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 3),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "pad_circular": lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"),
    "pad_circular_1d": lambda x: F.pad(x[0], (2, 3), mode="circular"),
    "pad_circular_3d": lambda x: F.pad(x[None], (1, 1, 1, 1, 1, 1), mode="circular"),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (3, 0, 1, 2), mode="replicate"),
    "pad_constant": lambda x: F.pad(x, (1, 2, -1, 1), value=-0.5),
    "pad_negative": lambda x: F.pad(x, (-1, -2)),
    "roll": lambda x: (x.roll(2), x.roll((1, -1), (2, 3)), x.roll(-7, 0)),
    "flip": lambda x: (x.flip(0, 2), x.fliplr(), x.rot90(1, (2, 3))),
    "unfold_fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "unfold_overlapping": lambda x: F.unfold(x, 3, padding=1),
    "interpolate_nearest": lambda x: F.interpolate(x, size=(4, 9)),
    "interpolate_nearest_exact": lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest-exact"),
    "interpolate_bilinear": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "interpolate_bicubic": lambda x: F.interpolate(x, size=(5, 7), mode="bicubic", antialias=True),
    "interpolate_area": lambda x: F.interpolate(x, size=(3, 4), mode="area"),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].movedim(1, -1).tanh(), align_corners=False),
    "affine_grid": lambda x: F.affine_grid(x[:, :2, 0, :3], [2, 1, 4, 5], align_corners=True),
    "max_pool_indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "max_pool_ceil": lambda x: F.max_pool2d(x, 4, stride=3, ceil_mode=True, padding=1),
    "lp_pool": lambda x: F.lp_pool2d(x.abs(), 2, 2),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, (4, 5), return_indices=True),
    "local_response_norm": lambda x: F.local_response_norm(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, (6, 6), eps=1e-3),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x),
    "normalize": lambda x: F.normalize(x, dim=1),
    "gelu_tanh": lambda x: (F.gelu(x, approximate="tanh"), F.gelu(x), F.silu(x), F.mish(x)),
    "hard_activations": lambda x: (F.hardtanh(x), F.hardsigmoid(x), F.hardswish(x), F.relu6(x * 9)),
    "shrinks": lambda x: (
        F.softshrink(x),
        F.hardshrink(x),
        F.tanhshrink(x),
        F.threshold(x, 0.1, 20),
    ),
    "glu": lambda x: (F.glu(x), F.softsign(x), F.softplus(x, beta=2), F.celu(x), F.selu(x)),
    "one_hot": lambda x: F.one_hot(x[0, 0].argmax(1), 6),
    "cdist": lambda x: torch.cdist(x[0, 0], x[1, 0]),
    "pairwise_distance": lambda x: (
        F.pairwise_distance(x[0, 0], x[1, 0]),
        F.cosine_similarity(x, x + 1),
    ),
    "conv_transposed": lambda x: F.conv_transpose2d(
        x, x[:, :3].reshape(4, 2, 3, 9)[:, :, :, :3], stride=2
    ),
    "conv_dilated_grouped": lambda x: F.conv2d(x, x[0, :, None, :3, :3], dilation=2, groups=4),
    "conv_same": lambda x: F.conv2d(x, x[:, :, :3, :3], padding="same"),
    "conv_circular_module": lambda x: x,
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, 1], indexing="ij"),
    "cartesian_prod": lambda x: (
        torch.cartesian_prod(x[0, 0, 0], x[0, 0, 1]),
        torch.combinations(x[0, 0, 0]),
    ),
    "tril_triu": lambda x: (
        x.tril(-1),
        x.triu(1),
        torch.tril_indices(3, 4),
        torch.triu_indices(3, 3),
    ),
    "diag_embed": lambda x: (
        torch.diag_embed(x[0, 0]),
        torch.block_diag(x[0, 0], x[0, 1]),
        x[0, 0].diag(),
    ),
    "kron": lambda x: (torch.kron(x[0, 0], x[0, 1]), torch.outer(x[0, 0, 0], x[0, 0, 1])),
    "gather_scatter": lambda x: (
        x.gather(1, x.argsort(1)),
        torch.take_along_dim(x, x.argmax(1, keepdim=True), 1),
    ),
    "repeat": lambda x: (x.repeat(1, 2, 1, 1), x.repeat_interleave(2, 1), x.tile(2)),
    "searchsorted": lambda x: torch.searchsorted(x.sort(-1).values, x),
    "quantile": lambda x: (
        x.quantile(0.3),
        x.quantile(torch.tensor([0.1, 0.9]), dim=1),
        x.median(),
    ),
    "embedding": lambda x: F.embedding(x[0, 0].argmax(1), x[0, 1], padding_idx=2),
    "linspace": lambda x: (
        torch.linspace(0, 1, 7),
        torch.logspace(0, 2, 5),
        torch.eye(3, 4),
        torch.arange(1, 2, 0.3),
    ),
    "windows": lambda x: (torch.hann_window(6), torch.kaiser_window(5), torch.bartlett_window(4)),
    "cumulative_trapezoid": lambda x: (
        torch.cumulative_trapezoid(x),
        torch.trapezoid(x),
        x.diff(dim=1),
    ),
    "gradient": lambda x: torch.gradient(x[0, 0]),
    "cov": lambda x: (x[0, 0].cov(), x[0, 0].corrcoef(), x[0, 0].var(1, correction=0)),
    "polygamma": lambda x: (torch.polygamma(1, x.abs() + 1), torch.mvlgamma(x.abs() + 3, 2)),
    "bitwise": lambda x: (x.int() & 3, x.int().bitwise_left_shift(1), (x > 0) ^ (x < 1)),
    "vander": lambda x: (torch.vander(x[0, 0, 0]), torch.tensordot(x[0], x[1], dims=([0], [0]))),
    "bilinear": lambda x: F.bilinear(x[0, 0], x[0, 1], x[0, :, :, :]),
}
del LAYOUT_OPS["conv_circular_module"]


class LayoutOperatorTest(unittest.TestCase):
    """Operators whose shapes or indices are easily got wrong."""

    test_conv_circular = maketest(
        lambda: nn.Conv2d(4, 3, 3, padding=2, padding_mode="circular"), IMAGE, exact=False
    )
    test_conv_reflect = maketest(
        lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="reflect"),
        tensors((2, 4, 6)),
        exact=False,
    )


for _name, _program in LAYOUT_OPS.items():
    # one_hot looks at the largest index.
    _captures = None if _name == "one_hot" else 1
    setattr(
        LayoutOperatorTest,
        f"test_{_name}",
        makefunctiontest(_program, IMAGE, exact=False, captures=_captures),
    )


if __name__ == "__main__":
    unittest.main()
