# Owner(s): ["oncall: jit"]

"""Random programs, captured once and replayed with fresh values, compared with eager.

Hypothesis draws numbers, and `Generated` makes a program of them: statements over a few inputs
(some of which share memory), a module's own state and earlier results. A statement that eager
refuses is left out when the program is made, or ends it. `compare` calls the program and its graph
side by side and looks at everything that a caller can see.

A failure shrinks to a small program, and is printed as a script that can be pasted into a file
beside this one. The default set draws the same programs on each run. The slow set has 100,000 of
them, 5,000 a test, and prints the seeds:

    PYTORCH_TEST_WITH_SLOW=1 python test/lazy/test_random_programs.py LongRunTest
    PYTORCH_TEST_WITH_SLOW=1 python test/lazy/test_random_programs.py LongRunTest.test_part_07
"""

import collections
import math
import os
import tempfile
import textwrap
import unittest
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_lazy_ext import ExtractionError, extract_compiled_graph

SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"

CALLS = 3
LARGEST = 200  # elements of a tensor in a program

# ---------------------------------------------------------------------- what programs are made of

# {v} is a new variable; {x}, {y}, {z} are tensors that are there; {c} is a number, {d} a dimension.
# The simplest of each kind come first: that is what a failure shrinks to.
POINTWISE = """
    {v} = {x} + {y}
    {v} = {x} * {c}
    {v} = {x} + 1
    {v} = -{x}
    {v} = {x} - {y}
    {v} = {x} * {y}
    {v} = {x} / ({y} + 2)
    {v} = {x} * n
    {v} = {x} > {c}
    {v} = {x} == {y}
    {v} = ~{x}
    {v} = {x} & {y}
    {v} = {x}.exp()
    {v} = {x}.sin()
    {v} = {x}.tanh()
    {v} = {x}.abs().sqrt()
    {v} = {x}.pow(2)
    {v} = {x} // 2
    {v} = {x} % 3
    {v} = {x}.round()
    {v} = {x}.clamp(min={c})
    {v} = F.relu({x})
    {v} = F.gelu({x})
    {v} = torch.sigmoid({x})
    {v} = torch.maximum({x}, {y})
    {v} = torch.where({x} > {c}, {x}, {y})
    {v} = torch.where({x} > {y}, {c}, {x})
    {v} = torch.lerp({x}, {y}, 0.5)
    {v} = torch.addcmul({x}, {y}, {z})
    {v} = {x}.to({dtype})
    {v} = {x}.to({y}.dtype)
    {v} = {x}.to({y})
    {v} = {x}.to(torch.float64, copy=True)
    {v} = {x}.nan_to_num().clamp(-9, 9).to(torch.int64)
    {v} = {x}.bool()
    {v} = {x}.float()
    {v} = {x}.clone()
    {v} = {x}.contiguous()
    {v} = {x}.clone(memory_format=torch.preserve_format)
    {v} = torch.zeros_like({x})
    {v} = torch.full_like({x}, {c})
    {v} = torch.ones(2, 3)
    {v} = torch.arange(3)
    {v} = torch.tensor([{c}, 1.0, 2.0])
    {v} = {x}.new_zeros(2)
    {v} = torch.polar({x}.abs(), {y})
    {v} = torch.view_as_complex(torch.stack([{x}, {y}], -1))
    {v} = {x}.conj()
    {v} = {x}.conj() * {y}
    {v} = {x}.resolve_conj()
    {v} = {x}.masked_fill({x} > {c}, 0)
    {v} = {x} @ {y}
    {v} = {x}.matmul({y}.mT)
    {v} = F.softmax({x}, {d})
    {v} = F.layer_norm({x}, {x}.shape[-1:])
    {v} = F.linear({x}, {y})
    {v} = F.one_hot({x}.abs() % 4, 4)
"""
VIEWS = """
    {v} = {x}.detach()
    {v} = {x}[0]
    {v} = {x}.t()
    {v} = {x}.view(-1)
    {v} = {x}[1:]
    {v} = {x}[::2]
    {v} = {x}[..., 0]
    {v} = {x}[..., 1:]
    {v} = {x}[..., None]
    {v} = {x}[None]
    {v} = {x}[-1]
    {v} = {x}.mT
    {v} = {x}.transpose(0, -1)
    {v} = {x}.reshape(-1)
    {v} = {x}.flatten()
    {v} = {x}.unsqueeze({d})
    {v} = {x}.squeeze()
    {v} = {x}.squeeze(0)
    {v} = {x}.expand(2, *{x}.shape)
    {v} = {x}.expand_as({y})
    {v} = {x}.expand(-1, 3)
    {v} = {x}.diagonal()
    {v} = {x}.unfold({d}, 2, 1)
    {v} = {x}.narrow({d}, 0, 1)
    {v} = {x}.select({d}, -1)
    {v} = {x}.movedim(0, -1)
    {v} = {x}.view(*{x}.shape, 1)
    {v} = {x}.view_as({y})
    {v} = {x}.as_strided((2,), (1,), {x}.storage_offset())
    {v} = {x}.as_strided((2, 2), (1, 1))
    {v} = {x}.view(torch.int32)
    {v} = {x}.view(torch.uint8)
    {v} = {x}.data
    {v} = {x}.real
    {v} = {x}.imag
    {v} = torch.view_as_real({x})
    {v} = {x}.split(1)[-1]
    {v} = {x}.chunk(2, {d})[0]
    {v} = {x}.unbind({d})[0]
    {v} = torch.broadcast_tensors({x}, {y})[0]
    {v} = torch.atleast_2d({x})
    {v} = {x}.to({x}.dtype)
    {v} = {x}.alias() if False else {x}
"""
MUTATIONS = """
    {x}.add_({y})
    {x}.add_(1)
    {x}.mul_({c})
    {x}.zero_()
    {x}.fill_({c})
    {x}.copy_({y})
    {x} += {y}
    {x} *= 2
    {x}[0] = {y}
    {x}[0] = {c}
    {x}[...] = {y}
    {x}[..., 0] += 1
    {x}[1:] = {x}[:-1].clone()
    {x}[..., 1:].mul_(2)
    {x}[{x} > {c}] = 0
    {x}[{x} > {c}] += 1
    {x}[torch.tensor([0, 0])] = {y}
    {x}.data.add_(1)
    {x}.detach().mul_(2)
    {x}.t_()
    {x}.unsqueeze_({d})
    {x}.squeeze_()
    {x}.transpose_(0, -1)
    {x}.neg_()
    {x}.exp_()
    {x}.sin_()
    {x}.clamp_(min={c})
    {x}.clamp_(max={c})
    {x}.masked_fill_({x} > {c}, {c})
    {x}.masked_fill_({y} > {c}, {c})
    {x}.index_fill_(0, torch.tensor([0]), {c})
    {x}.index_add_(0, torch.tensor([0]), {y}[:1])
    {x}.index_copy_(0, torch.tensor([0]), {y}[:1])
    {x}.index_put_((torch.tensor([0, 0]),), {y}[0], accumulate=True)
    {x}.scatter_(0, torch.zeros_like({x}, dtype=torch.int64), {c})
    {x}.scatter_add_(0, torch.zeros_like({x}, dtype=torch.int64), {y})
    {x}.cumsum_(0)
    {x}.lerp_({y}, 0.5)
    {x}.addcmul_({y}, {z})
    {x}.logical_not_()
    {x}.eq_({y})
    {x}.div_(2)
    {x}.floor_divide_(2)
    {x}.sub_({y}.t())
    {x}.copy_({x}.flip(0))
    {x}.fill_diagonal_({c})
    {x}.tril_()
    {x}.conj_physical_()
    torch.add({x}, {y}, out={z})
    torch.sin({x}, out={y})
    torch.cat([{x}, {y}], out={z})
    torch.sum({x}, 0, out={y})
    F.relu({x}, inplace=True)
    F.relu_({x})
    torch._foreach_add_([{x}, {y}], 1)
    torch._foreach_mul_([{x}, {y}], [{z}, {z}])
    {x}.set_({y})
    {x}.swapaxes_(0, -1)
    {x}.squeeze_(0)
    {x}.data = {x} * 2
    {x}.data = {y}
"""
REDUCTIONS = """
    {v} = {x}.sum()
    {v} = {x}.mean()
    {v} = {x}.sum({d})
    {v} = {x}.max()
    {v} = {x}.amax({d}, keepdim=True)
    {v} = {x}.argmax()
    {v} = {x}.max({d})[1]
    {v} = {x}.min({d}).values
    {v} = {x}.prod()
    {v} = {x}.var({d})
    {v} = {x}.norm()
    {v} = {x}.any()
    {v} = {x}.all({d})
    {v} = {x}.logsumexp({d})
    {v} = {x}.cumsum({d})
    {v} = {x}.cumprod({d})
    {v} = {x}.sort({d})[0]
    {v} = {x}.argsort({d}, stable=True)
    {v} = {x}.topk(1, {d})[0]
    {v} = {x}.median()
    {v} = {x}.sum(dtype=torch.float64)
    {v} = torch.count_nonzero({x})
    {v} = torch.var_mean({x}, {d})[1]
    {v} = torch.cummax({x}, {d}).values
    {v} = torch.einsum("i...,i...->...", {x}, {y})
    {v} = torch.aminmax({x}).max
    {v} = F.mse_loss({x}, {y})
"""
INDEXING = """
    {v} = {x}[[0, 0]]
    {v} = {x}[torch.tensor([1, 0])]
    {v} = {x}[:, torch.tensor([1, 0])]
    {v} = {x}[{x} > {c}]
    {v} = {x}[{y}]
    {v} = {x}[{y} > {c}]
    {v} = {x}[{x}.argmax(0)]
    {v} = {x}[{y}.long().abs() % 2]
    {v} = {x}.masked_select({y} > {c})
    {v} = {x}.nonzero()
    {v} = torch.where({x})[0]
    {v} = {x}.unique()
    {v} = {x}.unique(return_counts=True)[1]
    {v} = torch.bincount({x}.flatten().abs())
    {v} = torch.repeat_interleave({x}, {y}.flatten().abs())
    {v} = {x}.index_select({d}, torch.tensor([0]))
    {v} = {x}.gather({d}, {x}.argsort({d}))
    {v} = {x}.take(torch.tensor([0, 1]))
    {v} = {x}.take_along_dim({x}.argmax({d}, keepdim=True), {d})
    {v} = torch.cat([{x}, {y}])
    {v} = torch.cat([{x}, {x}], -1)
    {v} = torch.stack([{x}, {y}])
    {v} = {x}.flip(0)
    {v} = {x}.roll(1, {d})
    {v} = {x}.repeat(2, 1)
    {v} = {x}.tile(2)
    {v} = {x}.tril()
    {v} = {x}.diag()
    {v} = F.pad({x}, (1, 0))
    {v} = F.embedding({x}.long().abs() % 2, {y})
    {v} = torch.searchsorted({x}.flatten().sort()[0], {y})
"""
RANDOM = """
    {v} = torch.rand(2, 3)
    {v} = torch.randn_like({x})
    {v} = torch.rand_like({x})
    {v} = torch.randint(0, 5, (2, 3))
    {v} = torch.randint_like({x}, 3)
    {v} = torch.randperm(3)
    {v} = torch.bernoulli(torch.full_like({x}, 0.5))
    {v} = torch.normal({x}, 1.0)
    {v} = torch.multinomial({x}.abs().flatten() + 1, 2)
    {v} = F.dropout({x}, 0.5, training=True)
    {v} = F.rrelu({x}, training=True)
    {x}.uniform_()
    {x}.normal_()
    {x}.random_(0, 5)
    {x}.bernoulli_(0.5)
    {x}.exponential_()
    F.dropout({x}, 0.5, training=True, inplace=True)
    {x}[0].normal_()
    torch.rand(3)
    torch.rand(2, 3, out={x})
"""
STATE = """
    {v} = self.s
    self.s = {x}
    self.s += 1
    self.s.add_({x})
    self.s = self.s + {x}
    self.s = {x}[0]
    self.t = {x}
    {v} = self.t
    {v} = self.s[0]
    self.s.copy_({x})
    self.s[0] = {x}
    self.l[0] = {x}
    self.l[1] = self.l[0]
    {v} = self.l[0]
    {v} = self.l[1] * 2
    self.l.append({x})
    self.l.pop()
    self.l[0].add_(1)
    self.l = [{x}, {y}]
    self.l.reverse()
    self.d["k"] = {x}
    {v} = self.d["k"]
    self.d = {{"k": {x}, "m": self.s}}
    self.d.pop("k", None)
    self.n += 1
    self.n = 2
    {v} = {x} * self.n
    self.s, self.t = self.t, self.s
    del self.t
    self.s.data = {x}
    self.s = {x}.view(-1)
"""
VALUES = """
    k = int({x}.sum() > {c})
    {v} = {x} * k
    {v} = {x}[k:]
    {v} = {x}[k]
    k = {x}.long().sum().item() % 3
    k = {x}.abs().tolist()
    k = len({x}[{x} > {c}])
    k = float({x}.max())
    k = bool({x}.any())
    k = {x}.numpy().shape
    k = {x}.numpy().tolist()
    k = {x}.numpy().sum().item()
    k = str({x})
    k = f"{{{x}.sum()}}"
    k = {x}.shape[0]
    k = ({x}.stride(), {x}.is_contiguous(), {x}.dtype)
    k = torch.equal({x}, {y})
    k = torch.allclose({x}, {y})
    k = {x}.is_nonzero()
    k = {x} is {y}
    k = {x}.data_ptr() == {y}.data_ptr()
    k = n
    k = {x}.numpy()
    {v} = torch.full((2,), k)
    {v} = torch.tensor([k, {x}.max()])
    {v} = torch.from_numpy({x}.numpy().copy())
    assert {x}.sum() < 100
    k = [{x}, {y}]
    k = ({x}, [{y}], {{"a": {x}}})
    {v} = torch.zeros(int(({x} > {c}).sum()))
    {v} = {x}._version * {y}
    del {x}
    {v} = {x}
    {x} = {y}
"""
# `k` is a number or something made of one, mostly.
SCALARS = """
    k = {x}.sum().item()
    k = {x}.mean().item()
    k = {x}.double().max().item()
    k = {x}.flatten()[0].item()
    k = {x}.norm().item() * 2 - n
    k = {x}.sum().item() + {y}.sum().item()
    k = k + {c}
    k = {c} - k
    k = k * 2
    k = k / 4
    k = 1 / k
    k = k ** 2
    k = 2 ** k
    k = -k
    k = +k
    k = abs(k)
    k = k // 2
    k = 7 // k
    k = k % 2
    k = divmod(k, 2)
    k = int(k)
    k = float(k)
    k = complex(k)
    k = round(k)
    k = round(k, 1)
    k = math.floor(k)
    k = math.ceil(k)
    k = math.trunc(k)
    k = math.sqrt(abs(k))
    k = math.exp(k)
    k = math.isnan(k)
    k = math.copysign(1.0, k)
    k = math.fsum([k, 1.5])
    k = max(k, {c})
    k = min(0.5, k)
    k = sum([k, 1.5])
    k = sorted([k, {c}, 0.5])
    k = k > {c}
    k = {c} <= k
    k = k == {c}
    k = k == k
    k = not k
    k = 0 < k < 2
    k = k in (0, {c})
    k = k or {c}
    k = isinstance(k, float)
    k = type(k).__name__
    k = hash(k)
    k = k.is_integer()
    k = k.as_integer_ratio()
    k = k.conjugate()
    k = k.real
    k = str(k)
    k = repr(k)
    k = f"{{k:.2f}}"
    k = "%.1f %s" % (k, k)
    k = [k, k + 1]
    k = (k, [k], {{"k": k}})
    k = {{k: 1}}
    k = numpy.float64(k)
    k = numpy.array([k, 1.0])
    k = self.n * k
    self.n = k
    self.d["n"] = k
    {v} = {x} * k
    {v} = k * {x}
    {v} = k - {x}
    {v} = {x} / (k + 10)
    {v} = k / ({x} + 10)
    {v} = {x} ** k
    {v} = k ** {x}
    {v} = {x} // k
    {v} = {x} % k
    {v} = {x} > k
    {v} = {x} == k
    {v} = k < {x}
    {v} = {x}.clamp(max=k)
    {v} = {x}.clamp(-1, k)
    {v} = {x}.add({y}, alpha=k)
    {v} = torch.sub({x}, k)
    {v} = torch.pow({x}, k)
    {v} = torch.lerp({x}, {y}, k)
    {v} = torch.addcmul({x}, {y}, {z}, value=k)
    {v} = torch.where({x} > {c}, k, {x})
    {v} = torch.full((2,), k)
    {v} = torch.full_like({x}, k)
    {v} = {x}.new_full((2,), k)
    {v} = torch.tensor(k)
    {v} = torch.tensor([k, 1])
    {v} = torch.tensor([[k], [{x}.sum().item()]])
    {v} = torch.tensor(k, dtype={dtype})
    {v} = torch.as_tensor(k)
    {v} = torch.asarray([k])
    {v} = torch.scalar_tensor(k)
    {v} = {x}.new_tensor(k)
    {v} = {x}.new_tensor([k, 2])
    {v} = torch.linspace(0, k, 3)
    {v} = torch.arange(0, abs(k) % 5)
    {v} = {x}.masked_fill({x} > {c}, k)
    {v} = F.leaky_relu({x}, k)
    {v} = F.pad({x}, (1, 0), value=k)
    {v} = F.dropout({x}, min(abs(k), 1) / 2)
    {v} = {x}[int(k):]
    {v} = {x}.repeat(abs(int(k)) % 3, *{x}.shape)
    {x}.fill_(k)
    {x}.mul_(k)
    {x}.add_({y}, alpha=k)
    {x}.clamp_(min=k)
    {x} += k
    {x}[0] = k
    {x}[{x} > {c}] = k
    {x}.masked_fill_({x} > {c}, k)
    torch.add({x}, k, out={y})
    torch._foreach_add_([{x}, {y}], k)
"""
# Take the statements that follow as their bodies.
COMPOUND = """
    if {x}.sum() > {c}:|
    if {x}.sum() > {c}:|else:|
    for _ in range(2):|
    for _ in range(4):|    {x} = {x} / 2|    if not {x}.abs().max() > 2: break
    if n > 2:|else:|
    try:|except RuntimeError:|
    for i in range(int({x}.abs().max()) % 3):|
    for r in {x}:|    {v} = r + 1
    with torch.no_grad():|
    if ({x} > {y}).any() and {x}.mean() < {c}:|else:|
    if self.n > 2:|else:|
    if {x}.isnan().any():|
    if k:|
    if k > {c}:|else:|
    for _ in range(int(abs(k)) % 3):|
    while k > 2:|    k = k / 2
"""


def _lines(templates: str) -> list[str]:
    return textwrap.dedent(templates).strip().splitlines()


GROUPS = [
    _lines(t)
    for t in (
        POINTWISE,
        MUTATIONS,
        VIEWS,
        REDUCTIONS,
        INDEXING,
        RANDOM,
        STATE,
        VALUES,
        SCALARS,
        COMPOUND,
    )
]
# How often each group is drawn; views and mutations are where the difficulties are.
DRAWN = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9]
DTYPES = ("float32", "float64", "int64", "bool", "float16", "bfloat16", "complex64", "int32")
SHAPES = ((2, 3), (3,), (), (2, 2), (1, 3), (2, 1, 3), (0, 3), (4,))
NUMBERS = (0, 1, -1, 0.5, 2, 3)

# How an input lies in memory. {a} is an earlier input, {f} a fresh tensor.
FRESH = (
    "{f}",
    "{f}.t()",
    "{f}.repeat_interleave(2, -1)[..., ::2]",
    "torch.cat([{f}, {f}])[1:]",
    "{f}.expand(2, *{f}.shape)",
    "{f}.flip(0)",
)
ALIASED = (
    "{a}",
    "{a}[0]",
    "{a}.t()",
    "{a}[..., 1:]",
    "{a}.detach()",
    "{a}.view(-1)",
    "{a}.view(-1)[1:]",
    "{a}[1:]",
    "torch.from_numpy({a}.numpy())",
)
RETURNS = (
    "return {x}",
    "return {x}, {y}",
    "return [{x}, {y}, k]",
    "return {{'x': {x}, 'l': [{y}, {z}], 'k': k}}",
    "return {x}, ({x}, {y}), n",
    "return {x}[:1], {x}",
    "return k",
    "return {x}.t(), {y}, {z}.view(-1)",
)


class Arguments(NamedTuple):
    """Where the inputs come from: source lines, and the name that each call's seed has in them."""

    lines: list[str]
    names: list[str]


class Generated:
    """A program that numbers were turned into.

    Args:
        inputs: for each input, numbers that say what it is; the second list is for the last call.
        statements: (group, template, and numbers to choose operands) of each statement.
        result: numbers that choose what is returned.
    """

    def __init__(
        self,
        inputs: list[tuple[int, int, int, int]],
        other_inputs: list[tuple[int, int, int, int]] | None,
        statements: list[tuple[int, int, int, int, int]],
        result: tuple[int, int, int, int],
    ) -> None:
        self.make_inputs = _make_inputs_source(inputs, "make_inputs")
        self.count = len(inputs)
        if other_inputs is not None:
            # As many as the program takes.
            other = (other_inputs * self.count)[: self.count]
            self.make_inputs += _make_inputs_source(other, "make_other_inputs")
            last = f"make_other_inputs(i) if i == {CALLS} else make_inputs(i)"
        else:
            last = "make_inputs(i)"
        self.make_inputs += f"\n\ndef inputs(i):\n    return {last}\n"
        self.body: list[str] = []
        self._made = 0
        self._finished = False
        self._grow(statements, result)

    # ------------------------------------------------------------------ making it

    def _grow(
        self, statements: list[tuple[int, int, int, int, int]], result: tuple[int, int, int, int]
    ) -> None:
        """Add statement after statement; what eager refuses is left out, or is the last one."""
        space: dict[str, Any] = _scope()
        exec(self.make_inputs, space)
        exec(STATE_CLASS, space)
        _seeded(0)
        *tensors, n = space["inputs"](0)
        local = dict(zip("abc", tensors))
        local |= {"n": n, "self": space["State"](), "k": 0}
        pending = list(reversed(statements))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while pending and not self._finished:
                lines = self._statement(pending, local)
                trial = dict(local)
                if self._runs(lines, space, trial):
                    local = trial
                    self.body += lines
                elif statements[len(statements) - len(pending) - 1][4] == 127:
                    # A program of which the last statement may raise.
                    self.body += lines
                    return
            for choice in (result, (0, *result[1:])):
                lines = [self._fill(RETURNS[choice[0] % len(RETURNS)], choice[1:], local)]
                if self._runs([line.replace("return ", "_ = ") for line in lines], space, local):
                    self.body += lines
                    return
        self.body.append("return k")

    def _runs(self, lines: list[str], space: dict[str, Any], local: dict[str, Any]) -> bool:
        try:
            exec("\n".join(lines), space, local)
        except Exception:
            # Nobody can read such a tensor, not even eager.
            if any(isinstance(v, Tensor) and _exceeds_memory(v) for v in local.values()):
                reject()
            return False
        tensors = [v for v in local.values() if isinstance(v, Tensor)]
        return bool(tensors) and all(t.numel() <= LARGEST and t.dim() <= 6 for t in tensors)

    def _statement(self, pending: list[tuple[int, ...]], local: dict[str, Any]) -> list[str]:
        group, template, *operands = pending.pop()
        number = DRAWN[group % len(DRAWN)]
        templates = GROUPS[number]
        text = self._fill(templates[template % len(templates)], operands, local)
        if number != len(GROUPS) - 1:
            return [text]
        lines: list[str] = []
        for head in text.split("|"):
            if head.startswith("    "):
                lines.append(head)
                continue
            if not head:
                continue
            lines.append(head)
            body = self._statement(pending, local) if pending else ["pass"]
            lines += ["    " + line for line in body]
        return lines

    def _fill(self, template: str, operands: Any, local: dict[str, Any]) -> str:
        names = [name for name, v in local.items() if isinstance(v, Tensor)]
        x, y, z = operands
        values = {
            "x": names[-1 - x % len(names)],
            "y": names[-1 - y % len(names)],
            "z": names[-1 - z % len(names)],
            "c": NUMBERS[z % len(NUMBERS)],
            "d": (0, -1, 1)[y % 3],
            "dtype": f"torch.{DTYPES[z % len(DTYPES)]}",
        }
        if "{v}" in template:
            self._made += 1
            values["v"] = f"v{self._made}"
        return template.format(**values)

    # -------------------------------------------------------------------- its text

    @property
    def source(self) -> str:
        parameters = ", ".join(["self", *"abc"[: self.count], "n"])
        lines = [
            f"def __call__({parameters}):",
            "    k = 0",
            *textwrap.indent("\n".join(self.body), "    ").splitlines(),
        ]
        return (
            f"{self.make_inputs}\n{STATE_CLASS}\n\nclass Program(State):\n"
            + textwrap.indent("\n".join(lines), "    ")
            + "\n"
        )

    @property
    def script(self) -> str:
        return (
            "import math\n\nimport numpy\nimport torch\nimport torch.nn.functional as F\n\n"
            f"from test_random_programs import compare, random_tensor\n\n{self.source}\n\n"
            "compare(Program, inputs)\n"
        )


STATE_CLASS = """
class State:
    def __init__(self):
        self.s = torch.ones(2, 3)
        self.t = torch.zeros(3)
        self.l = [torch.ones(3), self.s]
        self.d = {"k": torch.ones(2)}
        self.n = 1
"""


def _make_inputs_source(inputs: list[tuple[int, int, int, int]], name: str) -> str:
    lines = [f"\n\ndef {name}(i):"]
    names: list[str] = []
    for position, (kind, shape, dtype, other) in enumerate(inputs):
        own = "abc"[position]
        fresh = f"random_tensor({SHAPES[shape % len(SHAPES)]}, torch.{DTYPES[dtype % len(DTYPES)]})"
        kind %= len(FRESH) + len(ALIASED)
        if kind < len(FRESH) or not names:
            text = FRESH[kind % len(FRESH)]
            if text.count("{f}") > 1:
                lines.append(f"    f = {fresh}")
                fresh = "f"
        else:
            text = ALIASED[kind - len(FRESH)]
        text = text.format(f=fresh, a=names[other % len(names)] if names else "")
        try:
            # Not every view can be made of every tensor.
            scope = _scope()
            exec("\n".join([*lines, f"    {own} = {text}", f"{name}(0)"]), scope)
        except Exception:
            text = fresh
        lines.append(f"    {own} = {text}")
        names.append(own)
    lines.append(f"    return ({', '.join(names)}, {{0: 1, 1: 1, 2: 3}}.get(i, 1))")
    return "\n".join(lines) + "\n"


def _scope() -> dict[str, Any]:
    return {
        "__name__": "program",
        "math": math,
        "numpy": numpy,
        "torch": torch,
        "F": F,
        "random_tensor": random_tensor,
    }


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Multiples of a half, from -3 to 3: small enough that sums are exact, and often zero."""
    halves = torch.randint(-6, 7, shape)
    if dtype is torch.bool:
        return halves > 0
    if dtype.is_complex:
        return torch.complex(halves / 2, torch.randint(-6, 7, shape) / 2)
    return (halves / 2).to(dtype) if dtype.is_floating_point else halves.to(dtype)


def _seeded(i: int) -> None:
    torch.manual_seed(1000 + i)


# ------------------------------------------------------------------------------ the comparison


def compare(make_program: Callable[[], Any], inputs: Callable[[int], tuple[Any, ...]]) -> str:
    """Capture a program on `inputs(0)`, call it on `inputs(1)`, ...; compare each call with eager.

    Returns "equal", "raises" when eager raised in the end and the graph alike, or "refused" with
    the package's error. Raises AssertionError for every difference.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _compare(make_program, inputs)


class _Side:
    """Eager's half of the comparison, or the graph's: what can be seen of it after each call."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.function = program
        self.arguments: Any = None
        self.result: Any = None
        self.error: str | None = None
        self.refused = False
        self.kept: list[Any] = []  # earlier results and arguments; they hold their storages
        self.rng_state: Tensor | None = None
        self._before: dict[int, tuple[int, int, Any, Any]] = {}

    def call(self, i: int, arguments: Any) -> None:
        self.arguments, self.result, self.error = arguments, None, None
        self._before = {
            # Held, since an id says nothing once its object is gone.
            id(t): (t._version, _storage(t), t, t.untyped_storage())
            for _, t in self._walk()
            if isinstance(t, Tensor)
        }
        _seeded(i)
        try:
            self.result = self.function(*arguments)
        except ExtractionError as e:
            self.refused, self.error = True, str(e)
        except Exception as e:
            self.error = f"{type(e).__name__}: {e}"
        self.rng_state = torch.get_rng_state()

    def _walk(self) -> Iterator[tuple[str, Any]]:
        roots = {
            "arguments": self.arguments,
            "state": vars(self.program),
            "result": self.result,
            "earlier": self.kept,
        }
        seen: dict[int, str] = {}
        for name, root in roots.items():
            yield from walk(root, name, seen)

    def seen(self) -> list[tuple[Any, ...]]:
        storages: dict[int, str] = {}
        found: list[tuple[Any, ...]] = []
        for path, value in self._walk():
            if not isinstance(value, Tensor):
                found.append((path, value))
                continue
            storage = _storage(value)
            before = self._before.get(id(value))
            moved = None if before is None else (value._version - before[0], before[1] == storage)
            found.append(
                (
                    path,
                    str(value.dtype),
                    tuple(value.shape),
                    _strides(value),
                    value.storage_offset(),
                    value.requires_grad,
                    value.is_conj(),
                    value.is_neg(),
                    type(value),
                    storages.setdefault(storage, path),
                    moved,
                    _bytes(value),
                )
            )
        return found

    def poke(self) -> list[str]:
        """Write to each tensor of the result."""
        errors = []
        for path, value in walk(self.result, "result", {}):
            if isinstance(value, Tensor):
                try:
                    value.logical_not_() if value.dtype is torch.bool else value.add_(1)
                except RuntimeError as e:
                    errors.append(f"{path}: {e}")
        return errors


def walk(value: Any, path: str, seen: dict[int, str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, list, dict)) or hasattr(value, "__array__"):
        if id(value) in seen:
            yield path, f"the same object as {seen[id(value)]}"
            return
        seen[id(value)] = path
    if isinstance(value, (list, tuple)):
        yield path, f"{type(value).__name__} of {len(value)}"
        for i, item in enumerate(value):
            yield from walk(item, f"{path}[{i}]", seen)
    elif isinstance(value, dict):
        yield path, f"dict with {list(value)}"
        for key, item in value.items():
            yield from walk(item, f"{path}[{key!r}]", seen)
    elif isinstance(value, Tensor):
        yield path, value
    elif type(value).__module__ == "numpy":
        yield path, f"numpy {value.dtype} {value.shape} {value.strides} {value.tolist()}"
    else:
        yield path, repr(value)


def _strides(t: Tensor) -> tuple[int, ...]:
    """The strides that lead somewhere: those of one element, or of none, are left to chance."""
    return tuple(s if n > 1 else 0 for n, s in zip(t.shape, t.stride())) if t.numel() else ()


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _exceeds_memory(t: Tensor) -> bool:
    """What eager leaves when it has set the sizes of a tensor, and cannot resize its storage."""
    if not t.numel():
        return False
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    return bool((t.storage_offset() + extent) * t.itemsize > t.untyped_storage().nbytes())


def _bytes(t: Tensor) -> Any:
    if _exceeds_memory(t):
        return "beyond its memory"
    if t.is_conj() or t.is_neg():
        t = t.resolve_conj().resolve_neg()
    if t.dtype.is_floating_point or t.dtype.is_complex:
        # One nan is as good as another.
        t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    flat = t.reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _compare(make_program: Callable[[], Any], inputs: Callable[[int], tuple[Any, ...]]) -> str:
    def made(i: int) -> tuple[Any, ...]:
        _seeded(-i)
        return inputs(i)

    eager, graph = _Side(make_program()), _Side(make_program())
    graph.arguments = made(0)
    before, _seed = graph.seen(), _seeded(0)
    rng_state = torch.get_rng_state()
    error: Exception | None = None
    try:
        graph.function = extract_compiled_graph(graph.program, graph.arguments)
    except Exception as e:
        error = e
    assert torch.equal(rng_state, torch.get_rng_state()), "the extraction moved the generator"
    if error is not None and not isinstance(error, ExtractionError):
        spare = _Side(make_program())
        spare.call(0, made(0))
        if spare.error is None or spare.error.partition(":")[0] != type(error).__name__:
            raise AssertionError(
                f"extraction raised {error!r}, eager came to {spare.error}"
            ) from error
    _expect(before, graph.seen(), "the extraction changed something")
    if error is not None:
        return "raises" if not isinstance(error, ExtractionError) else "refused"
    outcome = "equal"
    for i in range(1, CALLS + 1):
        eager.call(i, made(i))
        graph.call(i, made(i))
        if graph.refused:
            return "refused"
        if eager.error != graph.error:
            raise AssertionError(f"call {i}: eager: {eager.error}\ngraph: {graph.error}")
        _expect(eager.seen(), graph.seen(), f"call {i}")
        assert torch.equal(eager.rng_state, graph.rng_state), f"call {i}: random numbers drawn"
        if eager.error is not None:
            outcome = "raises"
        elif i != 1:
            errors = eager.poke(), graph.poke()
            assert errors[0] == errors[1], f"call {i}: writing to the result: {errors}"
            _expect(eager.seen(), graph.seen(), f"call {i}, after writing to the result")
        for side in (eager, graph):
            side.kept.append((side.result, side.arguments))
    return outcome


def _expect(want: list[tuple[Any, ...]], got: list[tuple[Any, ...]], when: str) -> None:
    if want == got:
        return
    for w, g in zip(want, got):
        if w != g:
            raise AssertionError(f"{when}: expected {w}\ngot {g}")
    raise AssertionError(f"{when}: {len(want)} things to see, and {len(got)} were there")


# ------------------------------------------------------------------------------------ the tests

number = st.integers(0, 15)
input_numbers = st.tuples(
    st.integers(0, len(FRESH) + len(ALIASED) - 1),
    st.integers(0, len(SHAPES) - 1),
    st.integers(0, len(DTYPES) - 1),
    st.integers(0, 2),
)
input_lists = st.lists(input_numbers, min_size=1, max_size=3)
statement_numbers = st.tuples(
    st.integers(0, len(DRAWN) - 1),
    st.integers(0, max(map(len, GROUPS)) - 1),
    number,
    number,
    st.integers(0, 127),
)
programs = st.builds(
    Generated,
    input_lists,
    st.one_of(st.none(), input_lists),
    st.lists(statement_numbers, min_size=1, max_size=14),
    st.tuples(st.integers(0, len(RETURNS) - 1), number, number, number),
)

# The program that runs, for the case that it takes the process down.
LAST_PROGRAM = Path(tempfile.gettempdir(), f"random_program_{os.getpid()}.py")


def run(count: int, first_seed: int | None) -> collections.Counter[str]:
    """Compare `count` random programs; of no seed, the same ones on each run."""
    outcomes: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=count,
        derandomize=first_seed is None,
        database=None,
        deadline=None,
        # Shrinking runs many more programs: in the long run only.
        phases=[Phase.generate] if first_seed is None else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs)
    def test(program: Generated) -> None:
        script = program.script
        LAST_PROGRAM.write_text(script)
        scope = _scope()
        exec(compile(program.source, "<program>", "exec"), scope)
        try:
            outcomes[compare(scope["Program"], scope["inputs"])] += 1
        except Exception as e:
            raise AssertionError(f"{type(e).__name__}: {e}\n\n{script}") from e

    if first_seed is not None:
        test = seed(first_seed)(test)
    test()
    LAST_PROGRAM.unlink()
    return outcomes


class RandomProgramTest(unittest.TestCase):
    def test_programs(self) -> None:
        """The same programs on each run."""
        run(400, None)


# Found by long runs, and shrunk: the type of `a`, of shape (2, 3), and what the program does.
FOUND = {
    "data_before_its_view": ("float32", "v = a[0]; d = v.data; return {'x': d, 'l': [d, v]}"),
    "view_of_former_data": ("float32", "a.add_(1); v = a.t(); a.data = a * 2; return v[0]"),
    "former_data_in_state": ("float32", "a.add_(1); v = a.t(); a.data = a * 2; self.s = v[0]"),
    "data_of_a_written_tensor": (
        "float32",
        "v = a + 1; w = a * 2; w *= 2; v.data = w; return v[:1], v, w",
    ),
    "data_then_write": ("float32", "v = a + 1; v.data = a * 2; v.add_(1); return v[:1], v"),
    "set_after_write": ("float32", "b = a.view(-1)[1:]; a.clamp_(min=3); a.set_(b)"),
    "sum_into_itself": ("bool", "v = a[0, 0].clone(); torch.sum(v, 0, out=v); return v"),
    "write_of_no_bools": ("bool", "v = a.any().expand(0, 3); v.zero_(); return v"),
    "write_of_no_windows": ("int64", "v = a[:0].unfold(-1, 2, 1); v.data.add_(1); return v"),
    "out_broadcasts": ("float32", "torch.add(a, torch.ones(2, 2, 3), out=a)"),
    "view_dtype_after_conj_write": (
        "complex64",
        "v = a.conj(); v *= 2; return a.view(torch.uint8), v",
    ),
    "view_dtype_of_conj": ("complex64", "return a.conj().view(torch.uint8)"),
    "numpy_of_conj": ("complex64", "return a.conj().numpy()"),
    "numpy_of_neg": ("complex64", "return a.conj().imag.numpy()"),
    "number_and_complex": (
        "float32",
        "k = a[0, 0].item(); return k + 1j, 2j - k, 2j**k, k == 1 + 0j, 1j != k",
    ),
    "number_below_complex": ("float32", "return a[0, 0].item() < 1j"),
    "number_and_numpy": (
        "float32",
        "k = a[0, 0].item(); f = numpy.float32(0.1); return k + f, f + k, numpy.sqrt(k * k), k < f",
    ),
    "layout_of_a_transposed_state": (
        "float32",
        "self.s.transpose_(0, 1); return self.s.shape, self.s.stride(), self.s * 2",
    ),
    "layout_of_a_larger_state": (
        "float32",
        "self.t.unsqueeze_(0); self.t.add_(1); return self.t.shape, self.t.size(0), self.t + 1",
    ),
    "layout_of_a_state_that_is_set": (
        "float32",
        "self.s.set_(a.t()); return self.s.stride(), self.s.is_contiguous(), self.s + 1",
    ),
    "data_of_a_view_is_a_constant": (
        "float32",
        "v = a[0]; v.data = torch.tensor([1.0]); return v",
    ),
    "number_and_large_int": ("float32", "k = a[0, 0].item(); return k < 10**400, k == 2**60 + 1"),
}


class FoundTest(unittest.TestCase):
    """What was wrong once."""


def _found(dtype: str, body: str) -> Callable[[unittest.TestCase], None]:
    lines = "".join(f"        {line}\n" for line in body.split("; "))
    source = f"class Program(State):\n    def __call__(self, a):\n{lines}"

    def test(self: unittest.TestCase) -> None:
        scope = _scope()
        exec(STATE_CLASS + source, scope)
        compare(scope["Program"], lambda i: (random_tensor((2, 3), getattr(torch, dtype)),))

    return test


for _name, (_dtype, _body) in FOUND.items():
    setattr(FoundTest, f"test_{_name}", _found(_dtype, _body))


# Seeds of its own for each run that has a number, and the same ones for runs that have none.
RUN = int(os.environ.get("RANDOM_PROGRAMS_RUN", "0"))


def longtest(part: int) -> Callable[[unittest.TestCase], None]:
    """A test of 5,000 programs from 10 seeds of their own."""

    def test(self: unittest.TestCase) -> None:
        outcomes: collections.Counter[str] = collections.Counter()
        begin = 200 * RUN + 10 * part
        for first in range(begin, begin + 10):
            outcomes += run(500, first)
        print(
            f"seeds {begin} to {begin + 9}: {outcomes.total()} programs, 0 wrong: {dict(outcomes)}"
        )

    return test


@unittest.skipUnless(SLOW, "set PYTORCH_TEST_WITH_SLOW=1")
class LongRunTest(unittest.TestCase):
    """100,000 programs in parts of 5,000; a part can be run alone, and again."""


for _part in range(20):
    setattr(LongRunTest, f"test_part_{_part:02}", longtest(_part))


if __name__ == "__main__":
    unittest.main()
