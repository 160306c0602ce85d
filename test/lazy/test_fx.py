# Owner(s): ["oncall: jit"]

"""A graph as `torch.fx`: the operators, values, layouts and lines of the TorchScript graph.

The slow set takes every entry of PyTorch's operator database and every transformers model.
"""

import inspect
import os
import re
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import torch
from model_zoo import MODELS, names, set_up_module
from opinfo import ENTRIES, UNINITIALISED, copy_tensors, samples, supported_dtypes
from test_extract_compiled_graph import (
    ModuleAddcmul,
    ModuleConstScale,
    ModuleEagerTensor,
    ModuleInplaceUpdate,
    ModuleReturnDupTensor,
    ModuleReturnEagerTensorOnDefaultDevice,
    ModuleReturnMulti,
    ModuleSub,
)
from torch import Tensor, fx, nn

from torch_lazy_ext import _C, ExtractionError, _fx, _lift, _replay, extract_compiled_graph
from torch_lazy_ext.testing import gen_rand_args

TEST_WITH_SLOW = os.getenv("PYTORCH_TEST_WITH_SLOW") == "1"
setUpModule = set_up_module


def steps(t: Tensor) -> list[int]:
    """The strides that lead to another element."""
    return [stride for size, stride in zip(t.shape, t.stride()) if size > 1 and t.numel()]


class Checked(fx.Interpreter):
    """Runs a graph module and compares each value with what the node's `val` says of it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.storages: dict[int, int] = {}  # real -> fake
        self.known: set[int] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            self.compare(n, value, n.meta["val"])
        return value

    def compare(self, n: fx.Node, value: Tensor, val: Tensor) -> None:
        for what in ("shape", "dtype", "device"):
            if getattr(value, what) != getattr(val, what):
                raise AssertionError(f"{n}: {getattr(val, what)}, and it is {getattr(value, what)}")
        if steps(value) != steps(val):
            raise AssertionError(f"{n}: strides {val.stride()}, and they are {value.stride()}")
        real = value.untyped_storage().data_ptr()
        fake = val.untyped_storage()._cdata
        if real:
            if self.storages.get(real, fake) != fake or (
                real not in self.storages and fake in self.known
            ):
                raise AssertionError(f"{n}: fake tensors share storages as the real ones do not")
            self.storages[real] = fake
            self.known.add(fake)


def elsewhere(module: fx.GraphModule) -> list[Callable[..., Any]]:
    """The module as another process gets it, unless it holds a generator."""
    if any(n.op == "get_attr" for n in module.graph.nodes):
        return []
    return [Checked(_fx.load(_fx.dump(module))).run]


def check(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare, bit for bit, the graph of `program` with the FX module made of it."""
    state = _lift.State(program, *args, *kwargs.values())
    _recorder, lowered, _ran = _replay._capture(program, args, kwargs, state, verify_layouts=True)
    module = _fx.graph_module(lowered.graph)
    module.graph.lint()
    inputs = [lowered.lifted[i][0] for i in lowered.parameters]
    torch.manual_seed(0)
    expected = _C.Program(lowered.graph).run(copy_tensors(inputs))
    rng = torch.get_rng_state()
    with torch.no_grad():
        for run in (module, Checked(module).run, *elsewhere(module)):
            torch.manual_seed(0)
            actual = run(*copy_tensors(inputs))
            assert torch.equal(torch.get_rng_state(), rng), "random numbers"
            for i, (want, got) in enumerate(zip(expected, actual, strict=True)):
                assert _C.same_bits(want, got), f"output {i}: {got}, and not {want}"
                assert want.stride() == got.stride(), f"output {i}: strides {got.stride()}"


def make_toy_test(module_cls: type[nn.Module]) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        module = module_cls()
        check(module, tuple(gen_rand_args(module)), {})

    return test


def make_entry_test(entry: str) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        op = ENTRIES[entry]
        dtypes = supported_dtypes(op)
        # What ctc_loss keeps for its backward has holes.
        if not dtypes or entry in UNINITIALISED or entry == "nn.functional.ctc_loss":
            self.skipTest("no values to compare")
        for (args, kwargs), _fresh in samples(op, dtypes[0], 2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations of what the database uses
                try:
                    check(lambda *a, op=op, **k: op(*a, **k), args, kwargs)
                except ExtractionError as e:
                    self.skipTest(str(e))

    return test


def make_model_test(name: str) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        case = MODELS[name]
        with torch.no_grad():
            try:
                check(case.make(), (), case.inputs(0))
            except ExtractionError as e:
                self.skipTest(str(e))

    return test


class ToyTest(unittest.TestCase):
    test_sub = make_toy_test(ModuleSub)
    test_const_scale = make_toy_test(ModuleConstScale)
    test_addcmul = make_toy_test(ModuleAddcmul)
    test_return_multi = make_toy_test(ModuleReturnMulti)
    test_eager_tensor = make_toy_test(ModuleEagerTensor)
    test_no_arguments = make_toy_test(ModuleReturnEagerTensorOnDefaultDevice)
    test_return_dup_tensor = make_toy_test(ModuleReturnDupTensor)
    test_inplace_update = make_toy_test(ModuleInplaceUpdate)


class EntryTest(unittest.TestCase):
    """Every tenth entry of the operator database."""


@unittest.skipUnless(TEST_WITH_SLOW, "slow: set PYTORCH_TEST_WITH_SLOW=1")
class EntrySlowTest(unittest.TestCase):
    """Every entry."""


class ModelTest(unittest.TestCase):
    """A few architectures of transformers."""


@unittest.skipUnless(TEST_WITH_SLOW, "slow: set PYTORCH_TEST_WITH_SLOW=1")
class ModelSlowTest(unittest.TestCase):
    """Every architecture."""


def method_name(name: str) -> str:
    return "test_" + re.sub(r"\W", "_", name)


for _i, _entry in enumerate(ENTRIES):
    setattr(EntrySlowTest, method_name(_entry), make_entry_test(_entry))
    if _i % 10 == 0:
        setattr(EntryTest, method_name(_entry), make_entry_test(_entry))
for _name in names():
    setattr(ModelSlowTest, method_name(_name), make_model_test(_name))
for _name in ("BERT", "GPT-2", "ViT", "T5", "Mamba"):
    setattr(ModelTest, method_name(_name), make_model_test(_name))


class SurfaceTest(unittest.TestCase):
    """What stands on the nodes, and what is special."""

    def module_of(self, fn: Callable[..., Any], *args: Any) -> fx.GraphModule:
        return extract_compiled_graph(fn, args).graph_module

    def operators(self, module: fx.GraphModule) -> list[Any]:
        return [n.target for n in module.graph.nodes if n.op == "call_function"]

    def test_property_is_of_the_latest_variant(self) -> None:
        graph = extract_compiled_graph(lambda x: x + 1, (torch.ones(2),))
        first = graph.graph_module
        self.assertIs(first, graph.graph_module)
        graph(torch.ones(3))
        (argument,) = (n for n in graph.graph_module.graph.nodes if n.op == "placeholder")
        self.assertEqual(argument.meta["val"].shape, (3,))
        self.assertIs(graph.specializations[1].graph_module, first)

    def test_stack_trace(self) -> None:
        def program(x: Tensor) -> Tensor:
            return x * 3

        module = self.module_of(program, torch.ones(2))
        (node,) = (n for n in module.graph.nodes if n.op == "call_function")
        line = inspect.getsourcelines(program)[1] + 1
        self.assertIn(f'File "{__file__}", line {line}', node.meta["stack_trace"])
        self.assertIn("return x * 3", module.print_readable(print_output=False))

    def test_boxed_operator_and_dtypes(self) -> None:
        module = self.module_of(lambda x: x.view(torch.int32).to(torch.float64), torch.ones(2))
        self.assertEqual(
            self.operators(module),
            [torch.ops.aten.view.dtype, torch.ops.aten._to_copy.default],
        )
        (_x, view, copy, _out) = module.graph.nodes
        self.assertIs(view.args[1], torch.int32)
        self.assertEqual(dict(copy.kwargs), {"dtype": torch.float64})

    def test_defaults_are_left_out(self) -> None:
        module = self.module_of(lambda x: torch.add(x, 2, alpha=3) + x, torch.ones(2))
        (x, scaled, added, _out) = module.graph.nodes
        self.assertEqual((scaled.args, dict(scaled.kwargs)), ((x, 2), {"alpha": 3}))
        self.assertEqual((added.args, dict(added.kwargs)), ((scaled, x), {}))

    def test_generator(self) -> None:
        def program(generator: torch.Generator) -> Tensor:
            return torch.rand(3, generator=generator)

        generator = torch.Generator().manual_seed(1)
        (drawn,) = self.module_of(program, generator)()
        self.assertTrue(torch.equal(drawn, program(torch.Generator().manual_seed(1))))

    def test_learned_strides(self) -> None:
        """What the first run learned of an operator's strides stands in the FX graph, too."""
        norm = nn.BatchNorm2d(3).eval().requires_grad_(False)
        x = torch.randn(2, 4, 4, 3).permute(0, 3, 2, 1)
        graph = extract_compiled_graph(norm, (x,))
        expected = graph(x)
        module = graph.graph_module
        (output,) = module.graph.output_node().args[0]
        self.assertEqual(output.meta["val"].stride(), expected.stride())

    def test_views_share_a_storage(self) -> None:
        (x, view, _sum, _out) = self.module_of(lambda x: x.t().sum(), torch.ones(2, 3)).graph.nodes
        storage = view.meta["val"].untyped_storage()._cdata
        self.assertEqual(storage, x.meta["val"].untyped_storage()._cdata)

    def test_operator_that_writes(self) -> None:
        with torch.library._scoped_library("tle_test_fx", "DEF") as library:
            library.define("fill_twice(Tensor(a!) x, Tensor(b!)[] y) -> Tensor")

            def fill_twice(x: Tensor, y: list[Tensor]) -> Tensor:
                x.fill_(2)
                for t in y:
                    t.fill_(3)
                return torch.ones(1)

            library.impl("fill_twice", fill_twice, "CPU")
            library.impl("fill_twice", lambda x, y: x.new_empty(1), "Meta")

            def program(x: Tensor) -> Tensor:
                a, b, c = x + 1, x + 2, x + 3
                made = torch.ops.tle_test_fx.fill_twice(a, [b, c])
                return a + b + c + made

            check(program, (torch.zeros(2),), {})


if __name__ == "__main__":
    unittest.main()
