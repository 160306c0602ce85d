"""Items: calls of aten operators on values that show where two kernels differ.

The operators are those that PyTorch's operator database reaches, forward and backward, as a
captured graph holds them. Pointwise ones are called on all pairs of special values, others on the
database's samples with special values sprinkled over them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_utils import set_rng_seed
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
# The numbers that operators of a tensor and a number are called with, beside the samples' own.
NUMBERS = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 3.0, 0.7, math.inf, -math.inf, math.nan)
PER_OPERATOR = 6  # calls of an operator with tensors of one dtype that differ in their constants


@dataclasses.dataclass
class Item:
    """A call. Tensors among the arguments are values; `kind` names the values."""

    overload: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str

    @property
    def name(self) -> str:
        return str(self.overload)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor, a floating one if there is any."""
        tensors = [v for v in pytree.tree_leaves((self.args, self.kwargs)) if is_tensor(v)]
        floating = [t for t in tensors if t.is_floating_point()]
        first: torch.Tensor = (floating or tensors)[0]
        return first.dtype

    def __str__(self) -> str:
        def text(v: Any) -> str:
            return f"{v.dtype}{list(v.shape)}".removeprefix("torch.") if is_tensor(v) else repr(v)

        args = pytree.tree_map(text, (self.args, self.kwargs))
        return f"{self.name} {args} on {self.kind}"


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def specials(dtype: torch.dtype) -> torch.Tensor:
    """Values of a dtype at which kernels part ways."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        i = torch.iinfo(dtype)
        values = [0, 1, 2, 3, 5, 7, 13, i.max, i.max - 1, i.max // 2, i.min, i.min + 1]
        values += [] if dtype is torch.uint8 else [-1, -2, -3, -7, i.min // 2]
        return torch.tensor(values, dtype=dtype)
    f = torch.finfo(dtype)
    positive = [
        0.0,
        f.smallest_normal * f.eps,  # denormal
        f.smallest_normal / 4,
        f.smallest_normal,
        1e-5,
        f.eps / 2,
        0.1,
        0.5,
        0.7,
        1.0,
        1.0 + f.eps,
        1.5,
        2.0,
        2.5,
        3.0,
        math.pi,
        10.0,
        100.5,
        1 / f.eps,
        f.max / 4,
        f.max,
        math.inf,
    ]
    numbers = torch.tensor(positive, dtype=torch.float64)
    nan = torch.tensor([math.nan], dtype=torch.float64)
    return torch.cat([numbers, -numbers, nan]).to(dtype)


def is_usable(overload: Any) -> bool:
    """Whether a captured graph may hold it, and its result is decided by its arguments."""
    if not isinstance(overload, torch._ops.OpOverload) or overload.namespace != "aten":
        return False
    schema = overload._schema
    return not (
        schema.is_mutable
        or torch.Tag.nondeterministic_seeded in overload.tags
        or torch.Tag.data_dependent_output in overload.tags
        or not schema.returns
        or any(str(a.type).startswith("Optional[Generator") for a in schema.arguments)
        or schema.name.partition("::")[2] in _UNINITIALIZED
        or not all("Tensor" in str(r.type) for r in schema.returns)
    )


_UNINITIALIZED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty"}
_UNINITIALIZED |= {"new_empty_strided", "_efficientzerotensor"}


class _Calls(TorchDispatchMode):
    """Keeps what reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_usable(func):
            self.calls.append((func, *_copied((args, kwargs))))
        return func(*args, **kwargs)


def _copied(tree: Any) -> Any:
    def copied(v: Any) -> Any:
        if not is_tensor(v):
            return v
        v = v.detach()
        if any(s == 0 and n > 1 for s, n in zip(v.stride(), v.shape)):
            return v.clone()
        made = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)
        return made.copy_(v)

    with torch.utils._python_dispatch._disable_current_modes():
        return pytree.tree_map(copied, tree)


def calls_of(entry: Any, dtype: torch.dtype, samples: int) -> list[tuple[Any, Any, Any]]:
    """The calls of aten operators that an entry of the database comes to."""
    found: list[tuple[Any, Any, Any]] = []
    set_rng_seed(1)
    differentiable = dtype in entry.supported_backward_dtypes("cpu") and entry.supports_autograd
    for sample in itertools.islice(
        entry.sample_inputs("cpu", dtype, requires_grad=differentiable), samples
    ):
        with _Calls() as mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                out = entry.op(sample.input, *sample.args, **sample.kwargs)
                results = [r for r in pytree.tree_leaves(out) if is_tensor(r) and r.requires_grad]
                for r in results:
                    if not r.is_complex():
                        # Of ones, many a gradient is 0 but for rounding.
                        r.backward(torch.randn_like(r), retain_graph=True)
            except Exception:
                pass  # eager has no such operator here, or no backward of it: no item
        found += mode.calls
    return found


def _signature(call: tuple[Any, Any, Any], exactly: bool) -> str:
    def part(v: Any) -> str:
        if is_tensor(v):
            return f"{v.dtype}{v.dim() if not exactly else (tuple(v.shape), v.stride())}"
        return repr(v) if exactly else type(v).__name__

    func, args, kwargs = call
    return f"{func}{[part(v) for v in pytree.tree_leaves((args, kwargs))]}"


def _is_plain(call: tuple[Any, Any, Any]) -> bool:
    tensors = [v for v in pytree.tree_leaves(call[1:]) if is_tensor(v)]
    return bool(tensors) and all(
        t.layout is torch.strided
        and t.device.type == "cpu"
        and t.dtype in DTYPES
        and not t.is_neg()
        and type(t) in (torch.Tensor, torch.nn.Parameter)
        for t in tensors
    )


def pointwise(call: tuple[Any, Any, Any], numbers: bool) -> Iterator[Item]:
    """The call on all combinations of special values."""
    func, args, kwargs = call
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [k for k, v in enumerate(leaves) if is_tensor(v)]
    values = [specials(leaves[k].dtype) for k in where]
    if len(where) > 2:  # some of them would be too many
        values = [v[:: max(1, len(v) // 9)] for v in values]
    product = torch.cartesian_prod(*(torch.arange(len(v)) for v in values)).reshape(-1, len(where))
    columns = [v[product[:, i]] for i, v in enumerate(values)]
    if columns[0].numel() % 16 == 0:
        columns = [torch.cat([c, c[:1]]) for c in columns]  # a tail
    filled = list(leaves)
    for k, c in zip(where, columns):
        filled[k] = c
    choices = [filled]
    if numbers:
        for k, v in enumerate(leaves):
            if isinstance(v, float) or (isinstance(v, int) and not isinstance(v, bool)):
                choices += [[*filled[:k], n, *filled[k + 1 :]] for n in NUMBERS]
    for choice in choices:
        new_args, new_kwargs = pytree.tree_unflatten(choice, spec)
        yield Item(func, new_args, new_kwargs, "all pairs")


def sprinkled(call: tuple[Any, Any, Any]) -> Iterator[Item]:
    """The call on the sample's values, with special ones among the floating ones."""
    func, args, kwargs = call
    kinds = {
        "the sample": None,
        "zeros": [0.0, -0.0],
        "infinities": [0.0, -0.0, math.inf, -math.inf],
        "nan": [math.nan, -0.0],
    }
    for kind, special in kinds.items():
        generator = torch.Generator().manual_seed(0)

        def fill(v: Any, special: Any = special, generator: Any = generator) -> Any:
            if not is_tensor(v) or not v.is_floating_point() or special is None:
                return v
            values = torch.tensor(special, dtype=v.dtype)
            chosen = values[torch.randint(len(special), v.shape, generator=generator)]
            return torch.where(torch.rand(v.shape, generator=generator) < 0.3, chosen, v)

        if kind == "the sample" or any(
            is_tensor(v) and v.is_floating_point() for v in pytree.tree_leaves((args, kwargs))
        ):
            new_args, new_kwargs = pytree.tree_map(fill, (args, kwargs))
            yield Item(func, new_args, new_kwargs, kind)


def collect(
    dtypes: tuple[torch.dtype, ...], samples: int = 8, names: set[str] | None = None
) -> list[Item]:
    """All items whose operator is among `names`, or all."""
    seen: set[str] = set()
    counts: dict[str, int] = {}
    items: list[Item] = []
    for dtype in dtypes:
        for entry in common_methods_invocations.op_db:
            if dtype not in entry.supported_dtypes("cpu"):
                continue
            for call in calls_of(entry, dtype, samples):
                if names is not None and str(call[0]) not in names:
                    continue
                is_pointwise = torch.Tag.pointwise in call[0].tags
                key = _signature(call, exactly=not is_pointwise)
                if key in seen or not _is_plain(call):
                    continue
                seen.add(key)
                coarse = f"{call[0]}{dtype}"
                counts[coarse] = counts.get(coarse, 0) + 1
                if counts[coarse] > PER_OPERATOR:
                    continue
                first = counts[coarse] == 1
                if is_pointwise:
                    items += pointwise(call, numbers=first and dtype is torch.float32)
                else:
                    items += sprinkled(call)
    return items
