# Owner(s): ["oncall: jit"]

"""Every module of torch's module_db, in train and eval mode: fresh inputs, results and state."""

import copy
import functools
import os
import unittest
from typing import Any

import torch
from oracle import Call, check
from torch import nn
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.utils import _pytree as pytree

from torch_lazy_ext import extract_compiled_graph

# Samples per module and mode: of a few modules there are hundreds.
SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"
SAMPLES = 60 if SLOW else 4

UNINITIALIZED = "its first call gives its parameters their shapes, eagerly"

# Modules that look at their data, so that their calls may take several variants; and modules
# whose first call runs eagerly.
NOT_ONE_GRAPH = {
    "AdaptiveLogSoftmaxWithLoss": "selects the rows of each cluster",
    "BatchNorm1d": "with momentum=None divides by the number of batches so far",
    "BatchNorm2d": "with momentum=None divides by the number of batches so far",
    "BatchNorm3d": "with momentum=None divides by the number of batches so far",
    "CTCLoss": "lengths are read",
    "GaussianNLLLoss": "refuses negative variances",
    "LazyBatchNorm": UNINITIALIZED,
    "LazyConv1d": UNINITIALIZED,
    "LazyConv2d": UNINITIALIZED,
    "LazyConv3d": UNINITIALIZED,
    "LazyConvTranspose1d": UNINITIALIZED,
    "LazyConvTranspose2d": UNINITIALIZED,
    "LazyConvTranspose3d": UNINITIALIZED,
    "TransformerDecoderLayer": "detects causal masks",
    "TransformerEncoder": "detects causal masks",
    "TransformerEncoderLayer": "detects causal masks",
    "Transformer": "detects causal masks",
}
INFOS = {info.name: info for info in module_db}


def _name(info: ModuleInfo) -> str:
    # `quantized` and `parametrized` variants share the class name with others.
    return info.name.replace(".", "_")


class _Case:
    """One module, one mode, one sample; everything is made anew, from the current seed."""

    def __init__(self, info: ModuleInfo, training: bool, k: int) -> None:
        self.info = info
        self.training = training
        self.k = k

    def sample(self) -> Any:
        seed = torch.initial_seed()
        samples = _samples(self.info.name, self.training, seed)
        torch.manual_seed(seed)  # Whether or not they had to be made.
        return copy.deepcopy(samples[self.k])

    def make(self) -> nn.Module:
        construct = self.sample().constructor_input
        module = self.info.module_cls(*construct.args, **construct.kwargs)
        return module.to(torch.float32).train(self.training)

    def inputs(self, i: int) -> Call:
        forward = self.sample().forward_input
        return Call(*forward.args, **forward.kwargs)


@functools.lru_cache(maxsize=8)
def _samples(name: str, training: bool, seed: int) -> list[Any]:
    """All samples of a module, as they come out after torch.manual_seed(seed)."""
    info = INFOS[name]
    torch.manual_seed(seed)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    return [s for s in samples if s.forward_input is not None]


def _runs_eagerly(case: _Case) -> bool:
    """Whether eager takes the sample at all (some are for CUDA alone)."""
    try:
        call = case.inputs(0)
        with torch.no_grad():
            case.make()(*call.args, **call.kwargs)
    except Exception:
        return False
    return True


def maketest(info: ModuleInfo, training: bool) -> Any:
    def test(self: unittest.TestCase) -> None:
        torch.manual_seed(0)
        count = len(_samples(info.name, training, 0))
        ran = 0
        # Spread over the list: neighbours differ in little.
        for k in sorted({i * count // SAMPLES for i in range(SAMPLES)}):
            case = _Case(info, training, k)
            if not _runs_eagerly(case):
                continue
            ran += 1
            name = info.module_cls.__name__
            with self.subTest(sample=k, desc=case.sample().desc):
                check(
                    case.make,
                    case.inputs,
                    exact=False,
                    captures=None if name in NOT_ONE_GRAPH else 1,
                )
        if not ran:
            self.skipTest("no sample runs eagerly on CPU")

    return test


def _floats(value: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(value)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _may_require_grad(case: _Case) -> slice:
    """Which of the floating point arguments: all, or the first, where others are targets."""
    call = case.inputs(0)
    for t in _floats((call.args, call.kwargs)):
        t.requires_grad_()
    try:
        case.make()(*call.args, **call.kwargs)
    except RuntimeError as e:
        assert "is not differentiable with respect to" in str(e), e
        return slice(1)
    return slice(None)


def _train(case: _Case, i: int, module: nn.Module, fn: Any, which: slice) -> dict[str, Any]:
    """Results, gradients of arguments and parameters, and state after a backward."""
    torch.manual_seed(i)
    call = case.inputs(i)
    args = [t.requires_grad_() for t in _floats((call.args, call.kwargs))[which]]
    module.zero_grad()
    results = [t for t in _floats(fn(*call.args, **call.kwargs)) if t.requires_grad]
    if results:
        tangents = [torch.randn_like(t) for t in results]
        torch.autograd.backward(results, tangents)
    return {
        "results": [t.detach() for t in results],
        "arguments": [t.grad for t in args],
        "parameters": [p.grad for p in module.parameters()],
        "state": dict(module.named_buffers()),
    }


def make_gradients_test(info: ModuleInfo) -> Any:
    def test(self: unittest.TestCase) -> None:
        torch.manual_seed(0)
        count = len(_samples(info.name, True, 0))
        ran = 0
        for k in sorted({i * count // SAMPLES for i in range(SAMPLES)}):
            case = _Case(info, True, k)
            if not _runs_eagerly(case):
                continue
            torch.manual_seed(0)
            module = case.make()
            oracle = copy.deepcopy(module)
            first_is_eager = any(map(nn.parameter.is_lazy, module.parameters()))
            call = case.inputs(0)
            which = _may_require_grad(case)
            for t in _floats((call.args, call.kwargs))[which]:
                t.requires_grad_()
            with self.subTest(sample=k, desc=case.sample().desc):
                graph = extract_compiled_graph(module, call.args, call.kwargs)
                for i in range(3):
                    expected, actual = (
                        _train(case, i, oracle, oracle, which),
                        _train(case, i, module, graph, which),
                    )
                    ran += bool(expected["results"])
                    for what, want in expected.items():
                        none = [
                            [t is None for t in pytree.tree_leaves(x)] for x in (want, actual[what])
                        ]
                        self.assertEqual(*none, what)
                        torch.testing.assert_close(actual[what], want, equal_nan=True)
                hits = sum(s.hits for s in graph.specializations)
                self.assertEqual(hits, 3 - first_is_eager)
        if not ran:
            self.skipTest("no sample is differentiable")

    return test


class ModulesTest(unittest.TestCase):
    """Made below: one test for each module and mode."""


for _info in module_db:
    if torch.float32 not in _info.dtypes:
        continue
    for _training in (True, False):
        _test = maketest(_info, _training)
        _test_name = f"test_{_name(_info)}_{'train' if _training else 'eval'}"
        if hasattr(ModulesTest, _test_name):
            raise ValueError(f"two tests are called {_test_name}")
        setattr(ModulesTest, _test_name, _test)


class ModuleGradientsTest(unittest.TestCase):
    """Made below: one test for each module, in train mode."""


for _info in module_db:
    if torch.float32 in _info.dtypes:
        setattr(ModuleGradientsTest, f"test_{_name(_info)}", make_gradients_test(_info))


class CompletenessTest(unittest.TestCase):
    def test_every_module_has_its_tests(self):
        names = {f"test_{_name(i)}_{m}" for i in module_db for m in ("train", "eval")}
        missing = {n for n in names if not hasattr(ModulesTest, n)}
        without_float = {
            f"test_{_name(i)}_{m}"
            for i in module_db
            if torch.float32 not in i.dtypes
            for m in ("train", "eval")
        }
        self.assertEqual(missing, without_float)


if __name__ == "__main__":
    unittest.main()
