"""The entries of PyTorch's operator database as programs to capture, replay and compare with eager.

An entry is checked on a few of its samples. A sample is drawn twice, from two seeds: the program is
captured on the first draw and replayed on the second, so that a value baked into the graph shows.
"""

import copy
import itertools
import unittest
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_utils import set_rng_seed
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as pytree

from torch_lazy_ext import ExtractionError, extract_compiled_graph

CAPTURE_SEED, REPLAY_SEED, CALL_SEED = 1, 2, 3

# The dtype an entry is checked with by default: the first of these that it supports.
DTYPES = (
    torch.float32,
    torch.complex64,
    torch.int64,
    torch.bool,
    torch.float64,
    torch.complex128,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bfloat16,
    torch.float16,
    torch.complex32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)

# Their results hold whatever was in memory: compared by everything but values.
UNINITIALISED = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}

Sample = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs


def full_name(op: OpInfo) -> str:
    """The name of an entry, with that of its variant: unique in the database."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


ENTRIES: dict[str, OpInfo] = {full_name(op): op for op in common_methods_invocations.op_db}
assert len(ENTRIES) == len(common_methods_invocations.op_db)


def supported_dtypes(op: OpInfo) -> list[torch.dtype]:
    """The dtypes that `op` supports on the CPU, the default one first."""
    supported = op.supported_dtypes("cpu")
    return [d for d in DTYPES if d in supported] + sorted(supported - set(DTYPES), key=str)


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """`tree_flatten` with torch.Size as a leaf: pytree would put it together as a tuple."""
    return pytree.tree_flatten(tree, is_leaf=lambda x: isinstance(x, torch.Size))


def copy_tensors(tree: Any) -> Any:
    """`tree` with its tensors copied, with their strides and the memory they share."""
    memo: dict[int, Any] = {}
    copies: dict[int, torch.Tensor] = {}

    def copied(t: torch.Tensor) -> torch.Tensor:
        if t.layout != torch.strided:
            return t.clone()  # A sparse tensor has no deep copy.
        if t.is_conj():
            return copied(t.conj()).conj()  # A deep copy would resolve the bit.
        if t.is_neg():
            return torch._neg_view(copied(torch._neg_view(t)))
        return copy.deepcopy(t, memo)

    leaves, spec = flatten(tree)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in copies:
                copies[id(leaf)] = copied(leaf)
            leaves[i] = copies[id(leaf)]
    return pytree.tree_unflatten(leaves, spec)


def draw(op: OpInfo, dtype: torch.dtype, seed: int) -> list[Sample]:
    """All samples of `op`, with tensor values from `seed`."""
    # Shapes and numbers come from the generators of Python and numpy: the same for every seed.
    set_rng_seed(0)
    torch.manual_seed(seed)
    samples = op.sample_inputs("cpu", dtype, set_seed=False)
    return [((s.input, *s.args), dict(s.kwargs)) for s in samples]


def fits(a: Any, b: Any) -> bool:
    """Whether what was captured on the leaf `a` can be replayed on `b`."""
    if type(a) is not type(b) or not isinstance(a, torch.Tensor):
        return type(a) is type(b)
    if a.layout != torch.strided or b.layout != torch.strided:
        return a.layout == b.layout
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor's values."""
    return t.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def telling(captured: Sample, fresh: Sample) -> bool:
    """Whether the two differ, so that a replay on `fresh` tells a baked value from a read one."""
    return any(
        isinstance(a, torch.Tensor)
        and (a.layout != torch.strided or not torch.equal(bits(a), bits(b)))
        for a, b in zip(flatten(captured)[0], flatten(fresh)[0], strict=True)
    )


def fresh_values(captured: Sample, other: Sample | None) -> Sample:
    """Values to replay on what was captured: the tensors of `other`, and the rest of `captured`.

    Where the two differ in more than values, or not at all, `captured` with its numbers in reverse
    order; indices stay as they are then, since they may not be valid elsewhere.
    """
    old, spec = flatten(captured)
    new, other_spec = flatten(other)
    if spec == other_spec and all(map(fits, old, new)):
        leaves = [b if isinstance(b, torch.Tensor) else a for a, b in zip(old, new, strict=True)]
        fresh = pytree.tree_unflatten(leaves, spec)
        if telling(captured, fresh):
            return fresh
    fresh = copy_tensors(captured)
    # By storage, since leaves may share one, and their own elements may overlap.
    storages = {
        leaf.untyped_storage().data_ptr(): leaf
        for leaf in flatten(fresh)[0]
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
    }
    for leaf in storages.values():
        if leaf.is_floating_point() or leaf.is_complex():
            # As bytes, since not every dtype can be flipped.
            stored = torch.empty(0, dtype=torch.uint8).set_(leaf.untyped_storage())
            stored.copy_(stored.view(-1, leaf.itemsize).flip(0).view(-1))
    return fresh


def first_line(e: Exception) -> str:
    """What was raised, in one line."""
    return f"{type(e).__name__}: {e}".split("\n")[0]


def samples(op: OpInfo, dtype: torch.dtype, count: int | None) -> Iterator[tuple[Sample, Sample]]:
    """The samples of `op` that eager accepts: (to capture, to replay) for each.

    Up to `count` of them, or all if it is None: the first, the last and evenly between, of those
    with values that the seed decides (of all, where there are none: factories). Raises SkipTest
    where eager accepts none of them.
    """
    try:
        captured, others = draw(op, dtype, CAPTURE_SEED), draw(op, dtype, REPLAY_SEED)
    except Exception as e:
        raise unittest.SkipTest(f"the database has no sample: {first_line(e)}") from e
    # The values that were drawn may decide about how many samples there are.
    drawn = itertools.zip_longest(captured, others[: len(captured)])
    pairs = [(sample, fresh_values(sample, other)) for sample, other in drawn]
    if count is not None:
        pairs = [pair for pair in pairs if telling(*pair)] or pairs
        last = len(pairs) - 1
        chosen = {last // 2} if count == 1 else {i * last // (count - 1) for i in range(count)}
        pairs = [pairs[i] for i in sorted(chosen)]
    errors = []
    for captured, fresh in pairs:
        error = call(op, copy_tensors(captured)).error
        if error is None:
            yield captured, fresh
        else:
            errors.append(error)
    if len(errors) == len(pairs):
        raise unittest.SkipTest(f"eager refuses its samples: {first_line(errors[0])}")


def tensor_difference(want: torch.Tensor, got: torch.Tensor, exact: bool, values: bool) -> str:
    """The first difference between two tensors in words, or nothing; see `difference`."""
    for what in ("dtype", "layout", "device", "shape", "requires_grad"):
        if getattr(want, what) != getattr(got, what):
            return f"{what} {getattr(got, what)}, expected {getattr(want, what)}"
    if want.layout == torch.strided:
        for what in ("stride", "storage_offset", "is_conj", "is_neg"):
            if getattr(want, what)() != getattr(got, what)():
                return f"{what} {getattr(got, what)()}, expected {getattr(want, what)()}"
    if not values:
        return ""
    if exact and want.layout == torch.strided:
        return "" if torch.equal(bits(want), bits(got)) else f"values {got}, expected {want}"
    try:
        torch.testing.assert_close(got, want, equal_nan=True)
    except AssertionError as e:
        return str(e)
    return ""


def sharing(tree: Any) -> list[int]:
    """For each tensor of `tree`, the number of the first one that has the same storage."""
    first: dict[int, int] = {}
    return [
        first.setdefault(leaf.untyped_storage().data_ptr() or -i, i)
        for i, leaf in enumerate(flatten(tree)[0])
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
    ]


def difference(want: Any, got: Any, exact: bool = False, values: bool = True) -> str:
    """The first difference between two pytrees in words, or nothing.

    Args:
        exact: tensors agree bit for bit, not only within the tolerances of `assert_close`.
        values: compare what tensors hold, too.
    """
    expected, expected_spec = flatten(want)
    actual, actual_spec = flatten(got)
    if expected_spec != actual_spec:
        return f"structure {actual_spec}, expected {expected_spec}"
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if type(a) is not type(b):
            return f"leaf {i}: {type(b).__name__}, expected {type(a).__name__}"
        if isinstance(a, torch.Tensor):
            found = tensor_difference(a, b, exact, values)
            if found:
                return f"leaf {i}: {found}"
        elif a is not b and a != b and not (a != a and b != b):  # Equal, or both NaN.
            return f"leaf {i}: {b!r}, expected {a!r}"
    if sharing(want) != sharing(got):
        return f"leaves share storages as {sharing(got)}, expected {sharing(want)}"
    return ""


class Call(NamedTuple):
    """What a call did, as far as the caller sees without looking at the arguments."""

    result: Any
    error: Exception | None
    rng: torch.Tensor  # The state of the random number generator after the call.


def call(fn: Callable, sample: Sample) -> Call:
    """Call `fn` on `sample`, with the same random numbers ahead every time."""
    args, kwargs = sample
    torch.manual_seed(CALL_SEED)
    result, error = None, None
    try:
        result = fn(*args, **kwargs)
    except Exception as e:
        error = e
    return Call(result, error, torch.get_rng_state())


def without_seed(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the `wrapper_set_seed` around the random entries of the database.

    That one gives every call the same seed and takes it back afterwards, so that the generator
    of the caller, which is to be compared, would never be used.
    """
    return fn(*args, **kwargs)


@unittest.mock.patch.object(common_methods_invocations, "wrapper_set_seed", without_seed)
def check_sample(op: OpInfo, captured: Sample, fresh: Sample) -> int:
    """Capture `op` on one sample, call the graph on both, and compare each call with eager.

    Compared are the result, the exception, the arguments afterwards, which of all those tensors
    share memory, and the state of the random number generator.

    Returns:
        The number of captures.

    Raises:
        AssertionError: there is a difference, or a call was not served by a graph.
        ExtractionError: the capture refuses the program.
    """

    def program(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    values = full_name(op) not in UNINITIALISED
    torch.manual_seed(CALL_SEED)
    rng_before = torch.get_rng_state()
    before = copy_tensors(captured)
    graph = extract_compiled_graph(program, *captured)
    if not torch.equal(torch.get_rng_state(), rng_before):
        raise AssertionError("the extraction moved the random number generator")
    found = difference(before, captured, exact=True)
    if found:
        raise AssertionError(f"the extraction changed its arguments: {found}")

    served = 0
    # Fresh values again, since the first run of a variant need not be like the later ones.
    for sample in (fresh, captured, fresh):
        eager_sample, replay_sample = copy_tensors(sample), copy_tensors(sample)
        eager, replay = call(program, eager_sample), call(graph, replay_sample)
        if repr(eager.error) != repr(replay.error):
            message = f"raised {replay.error!r}, expected {eager.error!r}"
            raise AssertionError(message) from replay.error
        if not torch.equal(eager.rng, replay.rng):
            raise AssertionError("the random number generator is in another state after the call")
        # Random numbers are the same ones, not similar ones.
        exact = not torch.equal(eager.rng, rng_before)
        found = difference(
            [eager.result, eager_sample], [replay.result, replay_sample], exact, values
        )
        if found:
            raise AssertionError(f"result and arguments after the call: {found}")
        served += eager.error is None
    if sum(s.hits for s in graph.specializations) != served:
        raise AssertionError("a call was not served by a graph")
    return len(graph.specializations)


def check_entry(
    op: OpInfo, dtype: torch.dtype, count: int | None
) -> tuple[int, list[ExtractionError]]:
    """`check_sample` on `samples(op, dtype, count)`.

    Returns:
        The most captures that a sample took, and the refusals.

    Raises:
        AssertionError: a sample that was not refused differs from eager.
        SkipTest: eager itself cannot run the entry.
    """
    captures, refusals = 0, []
    for captured, fresh in samples(op, dtype, count):
        try:
            captures = max(captures, check_sample(op, captured, fresh))
        except ExtractionError as e:
            refusals.append(e)
    return captures, refusals
