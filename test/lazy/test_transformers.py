# Owner(s): ["oncall: jit"]

"""Whole architectures of the transformers library: each one graph, replayed on fresh inputs.

The models are those of model_zoo.py: tiny, with random weights, nothing is downloaded. The core
set runs always, the others with PYTORCH_TEST_WITH_SLOW=1. A table at the end says for each model
how it was captured and what a call costs.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import time
import types
import unittest
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from model_zoo import MODELS, ModelCase, names, set_up_module
from torch import Tensor, nn

from torch_lazy_ext import CompiledGraph, UnsupportedError, extract_compiled_graph

setUpModule = set_up_module
SLOW = os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1"
FRESH = 4
"""How many sets of inputs each model is replayed on, besides the one it was captured with."""

FIRST_CALL = "its first call creates state that later calls find"
ROUTING = "which experts receive tokens"
VARIES: dict[str, tuple[str, int]] = {
    "Funnel": (FIRST_CALL, 2),
    "Mimi": (FIRST_CALL, 2),
    "RecurrentGemma": (FIRST_CALL, 2),
    "RWKV": (FIRST_CALL, 2),
    "CLIPSeg": (FIRST_CALL, 2),
    "DPT": (FIRST_CALL, 2),
    "LLaVA": (FIRST_CALL, 2),
    "I-BERT": (FIRST_CALL, 2),
    "JetMoE": (ROUTING, 1 + FRESH),
    "NLLB-MoE": (ROUTING, 1 + FRESH),
    "Switch Transformers": (ROUTING, 1 + FRESH),
    "Reformer": ("how many tokens are padding", 1 + FRESH),
    "DBRX": (ROUTING, 1 + FRESH),
    "Qwen2-MoE": (ROUTING, 1 + FRESH),
    "FastSpeech2-Conformer": ("the durations it predicts", 1 + FRESH),
    "SuperPoint": ("how many key points it finds", 1 + FRESH),
}
"""Models that are several graphs: what decides which, and how many they may become."""

REFUSED: dict[str, str] = {
    "DETR": "the program keeps .* which a replay cannot bring up to date",
    "VITS": "draws numbers from numpy.random",
}
"""Models that cannot be captured, and what the error says. DETR keeps the positions it computes
from a pixel mask in a `functools.lru_cache`, under the mask as key."""


REFUSED_IN_TRAINING: dict[str, str] = {
    **REFUSED,
    "BigBird": "draws numbers from numpy.random",
    "BigBird-Pegasus": "draws numbers from numpy.random",
    "Data2Vec-Audio": "draws numbers from numpy.random",
    "Reformer": "takes a seed from the system",
}
NOT_TRAINED: dict[str, str] = {
    "FastSpeech2-Conformer": "wants labels in train mode",
    "xLSTM": "its backward raises in eager: it writes to what it needs",
}

# --- comparison --------------------------------------------------------------------------------


class Difference(AssertionError):
    """Something that is not as in eager; the message says where."""


class Comparison:
    """Compares what two calls left behind.

    Mappings, sequences, modules and the library's objects (outputs, caches and their layers,
    configs) are compared part by part: types, then values, and which parts are one object.
    Tensors are compared in everything, including which of them share memory.
    """

    def __init__(self) -> None:
        self.tensors: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        # For each side: id of an object -> (its counterpart, the object: so that its id stays its).
        self._partners: tuple[dict[int, tuple], dict[int, tuple]] = ({}, {})

    def compare(self, where: str, expected: Any, actual: Any) -> None:
        """Raise `Difference` at the first place where `actual` is not like `expected`."""
        self.check(type(expected) is type(actual), where, type(expected), type(actual))
        if isinstance(expected, torch.Tensor):
            self._met(where, expected, actual)
            self._tensor(where, expected, actual)
        elif isinstance(expected, Mapping):
            if not self._met(where, expected, actual):
                self.check(list(expected) == list(actual), where, list(expected), list(actual))
                for key in expected:
                    self.compare(f"{where}[{key!r}]", expected[key], actual[key])
        elif isinstance(expected, (list, tuple)):
            if isinstance(expected, tuple) or not self._met(where, expected, actual):
                self.check(len(expected) == len(actual), where, len(expected), len(actual))
                for i, (want, got) in enumerate(zip(expected, actual, strict=True)):
                    self.compare(f"{where}[{i}]", want, got)
        elif isinstance(expected, nn.Module):
            if not self._met(where, expected, actual):
                self._module(where, expected, actual)
        elif isinstance(expected, weakref.ref):
            self.compare(f"{where}()", expected(), actual())
        elif isinstance(expected, (types.FunctionType, types.MethodType)):
            same = expected.__qualname__ == actual.__qualname__
            self.check(same, where, expected, actual)
        elif type(expected).__module__.startswith("transformers.") and hasattr(
            expected, "__dict__"
        ):
            if not self._met(where, expected, actual):
                self.compare(where, vars(expected), vars(actual))
        elif type(expected).__eq__ is not object.__eq__:
            both_nan = expected != expected and actual != actual
            self.check(both_nan or expected == actual, where, expected, actual)

    def compare_sharing(self) -> None:
        """Raise `Difference` unless the tensors met share memory as their counterparts do."""
        for side in (1, 2):
            first_of: dict[int, tuple] = {}
            for entry in self.tensors:
                if entry[1].untyped_storage().nbytes() == 0:
                    continue
                storage = entry[side].untyped_storage().data_ptr()
                first = first_of.setdefault(storage, entry)
                distances = [
                    t.data_ptr() - o.data_ptr() for t, o in zip(entry[1:], first[1:], strict=True)
                ]
                if distances[0] != distances[1]:
                    raise Difference(f"{entry[0]}: shares memory with {first[0]} unlike eager")

    def check(self, same: bool, where: str, expected: object, actual: object) -> None:
        if not same:
            raise Difference(f"{where}: expected {expected}, got {actual}")

    def _met(self, where: str, expected: Any, actual: Any) -> bool:
        """Whether the two were met before; raise `Difference` where one was with another one."""
        partners, actual_partners = self._partners
        met = id(expected) in partners
        partner, _ = partners.setdefault(id(expected), (actual, expected))
        self.check(partner is actual, where, "the object met before", "another one")
        partner, _ = actual_partners.setdefault(id(actual), (expected, actual))
        self.check(partner is expected, where, "an object of its own", "one met before")
        return met

    def _module(self, where: str, expected: nn.Module, actual: nn.Module) -> None:
        want, got = vars(expected), vars(actual)
        self.check(set(want) == set(got), where, list(want), list(got))
        for name in want:
            if name.endswith("_hooks"):  # A copied hook is another object: compare their number.
                self.compare(f"{where}.{name}", len(want[name]), len(got[name]))
            else:
                self.compare(f"{where}.{name}", want[name], got[name])

    def _tensor(self, where: str, expected: torch.Tensor, actual: torch.Tensor) -> None:
        for attribute in ("device", "layout", "dtype", "shape", "requires_grad"):
            want, got = getattr(expected, attribute), getattr(actual, attribute)
            self.check(want == got, f"{where}.{attribute}", want, got)
        want, got = expected.stride(), actual.stride()
        self.check(want == got, f"{where}.stride()", want, got)
        try:
            torch.testing.assert_close(actual, expected, equal_nan=True)
        except AssertionError as e:
            raise Difference(f"{where}: {e}") from None
        self.tensors.append((where, expected, actual))


def _after(call: Callable[..., Any], inputs: dict, module: nn.Module) -> dict[str, Any]:
    """What a call of `module` through `call` leaves behind."""
    torch.manual_seed(0)
    return {
        "result": call(**inputs),
        "arguments after the call": inputs,
        "module after the call": module,
        "random number generator after the call": torch.get_rng_state(),
    }


def compare_call(oracle: nn.Module, module: nn.Module, graph: Callable, inputs: dict) -> None:
    """Raise `Difference` unless `graph` does to `module` what eager does to its copy `oracle`."""
    expected = _after(oracle, copy.deepcopy(inputs), oracle)
    actual = _after(graph, copy.deepcopy(inputs), module)
    comparison = Comparison()
    for what in expected:
        comparison.compare(what, expected[what], actual[what])
    comparison.compare_sharing()


# --- one model ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One line of the table: times in seconds."""

    name: str
    note: str = "FAILED"
    variants: int = 0
    nodes: int = 0
    extraction: float = 0.0
    replay: float = 0.0
    eager: float = 0.0

    HEADER = (
        f"{'model':<24} {'one graph':>9} {'variants':>8} {'nodes':>6} {'extraction, s':>13} "
        f"{'replay, us':>10} {'eager, us':>9}"
    )

    def __str__(self) -> str:
        if not self.variants:
            return f"{self.name:<24} {self.note}"
        return (
            f"{self.name:<24} {'yes' if self.variants == 1 else 'no':>9} {self.variants:>8} "
            f"{self.nodes:>6} {self.extraction:>13.3f} {self.replay * 1e6:>10.0f} "
            f"{self.eager * 1e6:>9.0f}  {self.note}"
        )


ROWS: list[Row] = []


def seconds(call: Callable[..., Any], inputs: dict, times: int = 7) -> float:
    """The median time of a call."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call(**inputs)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module: objects, since an id may come again for another."""
    return dict((*module.named_parameters(), *module.named_buffers()))


def replaced(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [n for n, t in tensors_of(module).items() if t is not before.get(n)]


def extract(module: nn.Module, oracle: nn.Module, inputs: dict) -> tuple[CompiledGraph, float]:
    """Extract a model's graph, in how many seconds; `oracle` is a copy of the model.

    Raises `Difference` where the extraction changed something.
    """
    untouched = {"module": oracle, "inputs": copy.deepcopy(inputs)}
    torch.manual_seed(0)  # As in the calls: some models look at random numbers.
    untouched["RNG"] = torch.get_rng_state()
    begin = time.perf_counter()
    graph = extract_compiled_graph(module, (), inputs)
    taken = time.perf_counter() - begin
    now = {"module": module, "inputs": inputs, "RNG": torch.get_rng_state()}
    Comparison().compare("after the extraction", untouched, now)
    return graph, taken


def check(case: ModelCase, row: Row) -> None:
    """Capture a model on one set of inputs; compare it with eager there, and on fresh ones.

    Fills in `row`. Raises `Difference` where the graph or the extraction is not like eager, or
    the number of variants is not what `VARIES` says.
    """
    module = case.make()
    oracle = copy.deepcopy(module)
    before, oracle_before = tensors_of(module), tensors_of(oracle)
    inputs = case.inputs(0)

    graph, row.extraction = extract(module, oracle, inputs)
    for seed in range(1 + FRESH):
        try:
            compare_call(oracle, module, graph, case.inputs(seed))
        except Difference as e:
            raise Difference(f"inputs {seed}: {e}") from None
        captures = len(graph.specializations)
        if seed == 0 and captures != 1:
            raise Difference("the inputs of the capture itself did not take its way")
        if sum(s.hits for s in graph.specializations) != seed + 1:
            raise Difference(f"inputs {seed}: the call was not answered by a graph")
    Comparison().compare(
        "the parameters and buffers that are other objects now",
        replaced(oracle, oracle_before),
        replaced(module, before),
    )

    nodes = sum(n.kind() != "prim::Constant" for n in graph.graph.nodes())
    row.replay, row.eager = seconds(graph, inputs), seconds(oracle, inputs)
    reason, bound = VARIES.get(case.name, ("", 1))
    if case.name in VARIES and captures == 1:
        raise Difference(f"is one graph: VARIES need not name it ({reason})")
    if captures > bound:
        raise Difference(f"{captures} variants, expected at most {bound} ({reason})")
    row.variants, row.nodes, row.note = captures, nodes, reason


# --- the tests ---------------------------------------------------------------------------------


def tearDownModule() -> None:
    if ROWS:
        one = sum(row.variants == 1 for row in ROWS)
        print("", Row.HEADER, *ROWS, f"{one} of {len(ROWS)} are one graph", sep="\n", flush=True)


class TransformersTestCase(unittest.TestCase):
    """Runs a test without gradients, with its own random numbers, and without warnings."""

    def run(self, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            # The library warns about configs it does not like, and about its own old functions.
            warnings.simplefilter("ignore")
            return super().run(result)


class TransformersTest(TransformersTestCase):
    """One test for each model."""


def _test(case: ModelCase) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        row = Row(case.name)
        ROWS.append(row)
        if case.name in REFUSED:
            with self.assertRaisesRegex(UnsupportedError, REFUSED[case.name]):
                check(case, row)
            row.note = "refused"
        else:
            check(case, row)

    return test if case.core else unittest.skipUnless(SLOW, "PYTORCH_TEST_WITH_SLOW=1")(test)


for _case in MODELS.values():
    _name = "".join(c if c.isalnum() else "_" for c in _case.name.lower())
    assert not hasattr(TransformersTest, f"test_{_name}"), _name
    setattr(TransformersTest, f"test_{_name}", _test(_case))


# --- training ----------------------------------------------------------------------------------


def gradients(call: Callable[..., Any], inputs: dict, module: nn.Module) -> dict[str, Any]:
    """The differentiable results of a call, and the gradients it leaves in the parameters."""
    module.zero_grad()
    torch.manual_seed(0)
    leaves = differentiable(call(**inputs))
    sum(t.float().pow(2).mean() for t in leaves).backward()
    return {
        "results": [t.detach() for t in leaves],
        "gradients": {n: p.grad for n, p in module.named_parameters()},
        "buffers": dict(module.named_buffers()),
        "random number generator": torch.get_rng_state(),
    }


def differentiable(value: Any) -> list[torch.Tensor]:
    """The tensors of a model's output that require grad."""
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in differentiable(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in differentiable(v)]
    if type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        return [t for v in vars(value).values() for t in differentiable(v)]
    return []


class TransformersGradientsTest(TransformersTestCase):
    """One test for each model: trained in train mode, all gradients of its parameters."""


def _gradients_test(case: ModelCase) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        module = case.make().train()
        if hasattr(module.config, "apply_spec_augment"):
            module.config.apply_spec_augment = False  # it draws from numpy: refused
        oracle = copy.deepcopy(module)
        with torch.enable_grad():
            torch.manual_seed(0)
            if case.name in REFUSED_IN_TRAINING:
                with self.assertRaisesRegex(UnsupportedError, REFUSED_IN_TRAINING[case.name]):
                    extract_compiled_graph(module, (), case.inputs(0))
                return
            graph = extract_compiled_graph(module, (), case.inputs(0))
            for seed in range(3):
                expected = gradients(oracle, case.inputs(seed), oracle)
                actual = gradients(graph, case.inputs(seed), module)
                self.assertTrue(any(g is not None for g in expected["gradients"].values()))
                for name, want in expected["gradients"].items():
                    got = actual["gradients"][name]
                    self.assertEqual(want is None, got is None, f"gradient of {name}")
                try:
                    torch.testing.assert_close(actual, expected, equal_nan=True)
                except AssertionError as e:
                    raise Difference(f"inputs {seed}: {e}") from None
                hits = sum(s.hits for s in graph.specializations)
                self.assertEqual(hits, seed + 1, "the call was not answered by a graph")

    return test if case.core else unittest.skipUnless(SLOW, "PYTORCH_TEST_WITH_SLOW=1")(test)


for _case in MODELS.values():
    if _case.name not in NOT_TRAINED:
        _name = "".join(c if c.isalnum() else "_" for c in _case.name.lower())
        setattr(TransformersGradientsTest, f"test_{_name}", _gradients_test(_case))


# --- the tests' own tests ----------------------------------------------------------------------


class ComparisonTest(unittest.TestCase):
    """What the comparison must not let pass."""

    def assertDiffers(self, pattern: str, expected: Any, actual: Any) -> None:
        for result in (expected, actual):
            comparison = Comparison()
            comparison.compare("it", result, copy.deepcopy(result))
            comparison.compare_sharing()
        comparison = Comparison()
        with self.assertRaisesRegex(Difference, pattern):
            comparison.compare("it", expected, actual)
            comparison.compare_sharing()

    def test_tensors(self):
        a = torch.ones(2, 3)
        self.assertDiffers("not close", [a], [a + 1e-4])
        self.assertDiffers("dtype", [a], [a.double()])
        self.assertDiffers("shape", [a], [a[:1]])
        self.assertDiffers("stride", [a], [torch.ones(3, 2).t()])
        self.assertDiffers("requires_grad", [a], [a.clone().requires_grad_()])
        self.assertDiffers("Parameter", [a], [nn.Parameter(a, requires_grad=False)])

    def test_sharing(self):
        a, b, c = torch.ones(2, 3).unbind(1)
        apart = [torch.ones(2, 3)[:, 0] for _ in range(2)]
        self.assertDiffers("it.1.: shares memory with it.0.", [a, b], apart)
        self.assertDiffers("it.1.: shares memory with it.0.", apart, [a, b])
        self.assertDiffers("it.1.: shares memory with it.0.", [a, b], [a, c])
        self.assertDiffers("it.1.: expected the object met before", [b, b], apart)
        self.assertDiffers("it.1.: expected an object of its own", apart, [b, b])

    def test_objects(self):
        cache_class = type("Cache", (), {"__module__": "transformers.cache_utils"})

        def cache(**attributes: object) -> object:
            made = cache_class()
            vars(made).update(attributes)
            return made

        layer = torch.zeros(2)
        grown = cache(layers=[layer + 1])
        self.assertDiffers("it.'layers'.*not close", cache(layers=[layer]), grown)
        self.assertDiffers("it.'length'", cache(length=1), cache(length=2))
        self.assertDiffers("it: ", cache(length=1), cache(size=1))
        self.assertDiffers("it: ", {"a": 1, "b": 2}, {"b": 2, "a": 1})
        self.assertDiffers("it: ", (1, 2), [1, 2])
        self.assertDiffers("it.0.: ", [True], [1])

    def test_modules(self):
        mod = nn.BatchNorm1d(2)
        other = copy.deepcopy(mod)
        other.num_batches_tracked += 1
        self.assertDiffers("num_batches_tracked", mod, other)
        self.assertDiffers("training", mod, copy.deepcopy(mod).eval())
        other = copy.deepcopy(mod)
        other.register_forward_hook(print)
        self.assertDiffers("_forward_hooks", mod, other)


class SetsTest(unittest.TestCase):
    def test_sets(self):
        core, slow = names(core=True), names(core=False)
        self.assertEqual(len(core), 25)
        self.assertGreaterEqual(len(slow), 30)
        listed = {*VARIES, *REFUSED, *REFUSED_IN_TRAINING, *NOT_TRAINED}
        self.assertLessEqual(listed, {*core, *slow})


class AttentionMaskTest(TransformersTestCase):
    """Models look at their attention mask: padded and full ones are at most two variants."""

    def test_switch_between_padded_and_full(self):
        most = 0
        for name in ("BERT", "GPT-2", "OPT", "Llama", "Mistral", "T5", "BART", "Wav2Vec2", "CLIP"):
            with self.subTest(name):
                case = MODELS[name]
                module = case.make()
                oracle = copy.deepcopy(module)
                graph, _ = extract(module, oracle, case.inputs(0))
                captures = []
                for seed, full in enumerate((True, False, True, False, False, True)):
                    inputs = case.inputs(seed)
                    if full:
                        inputs["attention_mask"].fill_(1)
                    compare_call(oracle, module, graph, inputs)
                    self.assertEqual(sum(s.hits for s in graph.specializations), seed + 1)
                    captures.append(len(graph.specializations))
                self.assertLessEqual(captures[1], 2)
                self.assertEqual(captures[1:], captures[1:2] * 5)
                most = max(most, captures[-1])
        self.assertEqual(most, 2, "no model looked at its mask: the test shows nothing")


if __name__ == "__main__":
    unittest.main()
