# Owner(s): ["oncall: jit"]

"""Every entry of PyTorch's operator database that supports autograd: gradients against eager's.

The program is captured on one set of values; graph and eager are called and differentiated on
another, in float64, with the same random tangents. `-k '*.test_add'` runs the entry `add`. By
default two samples of each entry are taken; the slow set takes all samples, and one in complex128.
"""

import os
import re
import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from opinfo import (
    CALL_SEED,
    CAPTURE_SEED,
    ENTRIES,
    REPLAY_SEED,
    Sample,
    copy_tensors,
    difference,
    flatten,
    fresh_values,
    full_name,
    without_seed,
)
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_utils import set_rng_seed
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as pytree

from torch_lazy_ext import UnsupportedError, extract_compiled_graph

TEST_WITH_SLOW = os.getenv("PYTORCH_TEST_WITH_SLOW") == "1"

# Entries whose gradients a graph cannot give, with the reason: they are refused with an error.
EXPECTED_FAILURES: dict[str, str] = {
    "linalg.eig": "its backward reads the gradients, to refuse those that are not well defined",
    "linalg.eigvals": "its backward reads the gradients, to refuse those that are not well defined",
    "sparse.mm.reduce": "takes a sparse tensor, which a graph cannot hold",
    "sparse.sampled_addmm": "takes a sparse tensor, which a graph cannot hold",
    "to_sparse": "returns a sparse tensor, which a graph cannot hold",
}

# Entries whose gradients have other strides than eager's, with the reason. (What a backward
# accumulates in `.grad` has the strides of its tensor, with a graph as in eager.)
OTHER_STRIDES: dict[str, str] = {
    "ormqr": "its formula takes another way for tensors that are functionalized",
    "prod": "its formula takes another way for tensors that are functionalized",
}

# Entries that are refused when they are complex: their backward reads the gradients then, to refuse
# those that are not well defined.
COMPLEX_REFUSED = ("linalg.svd", "pca_lowrank", "svd", "svd_lowrank")


def setUpModule() -> None:
    # The tensors are small: more threads would only wait for each other.
    torch.set_num_threads(1)


def detached(sample: Sample) -> tuple[Sample, list[bool]]:
    """A sample as leaves without gradient, and which of its leaves required it."""
    leaves, spec = flatten(sample)
    flags = [isinstance(t, torch.Tensor) and t.requires_grad for t in leaves]
    leaves = [t.detach() if isinstance(t, torch.Tensor) else t for t in leaves]
    return pytree.tree_unflatten(leaves, spec), flags


def fresh_leaves(sample: Sample, flags: list[bool]) -> Sample:
    """A copy of a sample whose flagged leaves require grad."""
    leaves, spec = flatten(copy_tensors(sample))
    for leaf, flag in zip(leaves, flags, strict=True):
        if flag:
            leaf.requires_grad_()
    return pytree.tree_unflatten(leaves, spec)


def draw(
    op: OpInfo, dtype: torch.dtype, seed: int
) -> list[tuple[Sample, list[bool], Callable[[Any], Any]]]:
    set_rng_seed(0)
    torch.manual_seed(seed)
    drawn = op.sample_inputs("cpu", dtype, requires_grad=True, set_seed=False)
    return [
        (*detached(((s.input, *s.args), dict(s.kwargs))), s.output_process_fn_grad) for s in drawn
    ]


def chosen(
    op: OpInfo, dtype: torch.dtype, count: int | None
) -> Iterator[tuple[Sample, Sample, list[bool], Callable[[Any], Any]]]:
    """(to capture, to replay, which leaves require grad, what to do with the output)."""
    try:
        captured, others = draw(op, dtype, CAPTURE_SEED), draw(op, dtype, REPLAY_SEED)
    except Exception as e:
        raise unittest.SkipTest(f"the database has no sample: {e}") from e
    positions = [i for i, (_sample, flags, _process) in enumerate(captured) if any(flags)]
    if count is not None and len(positions) > count:
        last = len(positions) - 1
        positions = [positions[k * last // (count - 1)] for k in range(count)]
    for i in positions:
        sample, flags, process = captured[i]
        other = others[i][0] if i < len(others) else None
        yield sample, fresh_values(sample, other), flags, process


def differentiate(
    fn: Callable[..., Any], sample: Sample, process: Callable[[Any], Any]
) -> tuple[Any, list[torch.Tensor | None]]:
    """The result of a call and the gradients of its leaves, for random tangents."""
    args, kwargs = sample
    torch.manual_seed(CALL_SEED)
    result = process(fn(*args, **kwargs))
    outputs = [
        t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    inputs = [t for t in flatten(sample)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.manual_seed(CALL_SEED)
    tangents = [torch.randn_like(t) for t in outputs]
    if not outputs:
        return result, []
    gradients = torch.autograd.grad(outputs, inputs, tangents, allow_unused=True)
    # Some formulas give zeros without memory, in eager and in the graph alike.
    return result, [
        torch.zeros_like(g) if g is not None and g._is_zerotensor() else g for g in gradients
    ]


@unittest.mock.patch.object(common_methods_invocations, "wrapper_set_seed", without_seed)
def check_sample(
    op: OpInfo,
    captured: Sample,
    fresh: Sample,
    flags: list[bool],
    process: Callable[[Any], Any],
) -> bool:
    """Capture on one sample; compare results and gradients with eager on both.

    Returns:
        Whether eager can run it at all.

    Raises:
        AssertionError: there is a difference, or a call was not served by a graph.
        ExtractionError: the capture refuses the program.
    """

    def program(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    try:
        for sample in (captured, fresh):
            differentiate(program, fresh_leaves(sample, flags), process)
    except Exception:
        return False
    torch.manual_seed(CALL_SEED)
    args, kwargs = fresh_leaves(captured, flags)
    graph = extract_compiled_graph(program, args, kwargs)
    for calls, sample in enumerate((fresh, captured, fresh)):
        expected = differentiate(program, fresh_leaves(sample, flags), process)
        actual = differentiate(graph, fresh_leaves(sample, flags), process)
        if full_name(op) in OTHER_STRIDES:
            expected, actual = (
                (
                    result,
                    [
                        g if g is None else g.clone(memory_format=torch.contiguous_format)
                        for g in gradients
                    ],
                )
                for result, gradients in (expected, actual)
            )
        found = difference(expected, actual)
        if found:
            raise AssertionError(f"result and gradients: {found}")
        for want, got in zip(*(pytree.tree_leaves(x[0]) for x in (expected, actual))):
            if isinstance(want, torch.Tensor) and want.requires_grad != got.requires_grad:
                raise AssertionError(f"requires_grad is {got.requires_grad}")
        if sum(s.hits for s in graph.specializations) != calls + 1:
            raise AssertionError("a call was not served by a graph")
    return True


class EntryTestCase(unittest.TestCase):
    def check(self, entry: str, dtype: torch.dtype, count: int | None) -> None:
        ran = 0
        with warnings.catch_warnings():
            # Deprecations of what the database uses.
            warnings.simplefilter("ignore")
            refused = entry in EXPECTED_FAILURES or (dtype.is_complex and entry in COMPLEX_REFUSED)
            for sample in chosen(ENTRIES[entry], dtype, count):
                if refused:
                    with self.assertRaises(UnsupportedError):
                        check_sample(ENTRIES[entry], *sample)
                    ran += 1
                else:
                    ran += check_sample(ENTRIES[entry], *sample)
        if not ran:
            self.skipTest("eager differentiates no sample")


class OpInfoGradientsTest(EntryTestCase):
    """The default set: two samples of each entry."""


@unittest.skipUnless(TEST_WITH_SLOW, "slow: set PYTORCH_TEST_WITH_SLOW=1")
class OpInfoGradientsSlowTest(EntryTestCase):
    """The slow set: all samples of each entry, and one in complex128."""


def make_test(entry: str) -> Callable[[EntryTestCase], None]:
    def test(self: EntryTestCase) -> None:
        self.check(entry, torch.float64, 2)

    return test


def make_slow_test(entry: str) -> Callable[[EntryTestCase], None]:
    def test(self: EntryTestCase) -> None:
        self.check(entry, torch.float64, None)
        if torch.complex128 in ENTRIES[entry].supported_backward_dtypes("cpu"):
            with self.subTest(dtype=torch.complex128):
                self.check(entry, torch.complex128, 2)

    return test


for _entry, _op in ENTRIES.items():
    if _op.supports_autograd and torch.float64 in _op.supported_backward_dtypes("cpu"):
        _name = "test_" + re.sub(r"\W", "_", _entry)
        setattr(OpInfoGradientsTest, _name, make_test(_entry))
        setattr(OpInfoGradientsSlowTest, _name, make_slow_test(_entry))


if __name__ == "__main__":
    unittest.main()
