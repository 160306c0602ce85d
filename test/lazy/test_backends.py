# Owner(s): ["oncall: jit"]

"""Each backend computes what eager computes; frozen code follows the weights; tiers switch.

The oracle compares results, memory they share, writes and random numbers, as for TorchScript.
"""

import copy
import gc
import importlib.metadata
import operator
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle import check, needs_inductor, tensors
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

import torch_lazy_ext._dynamo
from torch_lazy_ext import (
    CompiledGraph,
    ExtractionError,
    _compile,
    _inductor,
    _native,
    extract_compiled_graph,
)

TEST_WITH_SLOW = os.getenv("PYTORCH_TEST_WITH_SLOW") == "1"
Program = Callable[..., Any]


def setUpModule() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unittest.addModuleCleanup(torch.set_num_threads, threads)


def interpreting_backend(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend of the user's own."""
    module.graph.lint()
    return lambda *args: fx.Interpreter(module).run(*args)


BACKENDS: dict[str, dict[str, Any]] = {
    "fx": {"backend": "fx"},
    "torchscript_frozen": {"backend": "torchscript", "freeze": True},
    "inductor": {"backend": "inductor"},
    "inductor_frozen": {"backend": "inductor", "freeze": True},
    "callable": {"backend": interpreting_backend},
}


# --- one program after the other on every backend ----------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() if x.sum() > 0 else x.cos()


class Views(nn.Module):
    """Results that share memory: with an argument, with the weight, and with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = (x + 1).sin()
        return [x.t(), x[1:], self.weight.t(), y, y[:, 1], y.t(), (x * 2)[1], x]


class Results(nn.Module):
    """Equal results are still two tensors, constants are new on each call, a copy is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + 1, x + 1, torch.ones(2), x.clone(), self.weight * 2, (x * 3).clone()]


class Counter(nn.Module):
    """A buffer that each call writes to is never a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x.mul_(2)
        return self.linear(x) * self.count


class Net(nn.Module):
    """What Inductor packs and folds: convolution, batch norm, products, attention, embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = nn.functional.scaled_dot_product_attention(x, x, x)
        x = self.norm(self.conv(x[:, None])).relu()
        return self.linear(x) @ (self.scale * 2).t()


class Products(nn.Module):
    """Products that no generated code is offered for: of two activations, and of doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y).double() @ self.weight


class Randoms(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        a = nn.functional.dropout(x, 0.5)
        b = torch.rand(3) + torch.randn(3)
        torch.rand(2)  # moves the generator, and nobody has the numbers
        c = torch.bernoulli(torch.full((3,), 0.5)) + torch.randint(0, 10, (3,))
        return [a, b, c, torch.randperm(4), torch.rand_like(x), torch.empty(3).uniform_(1, 2)]


class Mask(nn.Module):
    """Numbers drawn in place, which a loop around a reduction reads."""

    def forward(self, x: Tensor) -> list[Tensor]:
        y = nn.functional.layer_norm(x, (32,))
        mask = torch.bernoulli(torch.empty_like(y), 0.9) / 0.9
        return [y * mask, mask]


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def ids() -> tuple[Tensor]:
    return (torch.randint(0, 10, (2, 8)),)


PROGRAMS: dict[str, tuple[Program, Callable[..., Any], dict[str, Any]]] = {
    "sub": (ModuleSub, tensors((2, 3), (2, 3)), {}),
    "const_scale": (ModuleConstScale, tensors((2, 3)), {}),
    "addcmul": (ModuleAddcmul, tensors((2, 3), (2, 3), (2, 3)), {}),
    "return_multi": (ModuleReturnMulti, tensors((2, 3), (2, 3)), {}),
    "eager_tensor": (ModuleEagerTensor, tensors((2, 3)), {}),
    "no_arguments": (ModuleReturnEagerTensorOnDefaultDevice, tensors(), {}),
    "return_dup": (ModuleReturnDupTensor, tensors((2, 3), (2, 3)), {}),
    "inplace_update": (ModuleInplaceUpdate, tensors((2, 3), (2, 3)), {}),
    "branch": (Branch, tensors((4,)), {"captures": 2, "calls": 5}),
    "views": (Views, tensors((3, 3)), {}),
    "results": (Results, tensors((3,)), {}),
    "counter": (Counter, tensors((2, 3)), {}),
    "net": (lambda: Net().eval(), ids, {}),
    "products": (Products, tensors((4, 4), (4, 4)), {}),
    "random": (Randoms, tensors((3, 3)), {"exact": True}),
    "mask": (Mask, tensors((16, 32)), {}),
    "nothing": (Nothing, tensors((3,)), {}),
}
# What is as fast on TorchScript runs there; the others must have been compiled.
STAYS_ON_TORCHSCRIPT = {"no_arguments", "nothing"}


def make_test(program: str, backend: str) -> Callable[[unittest.TestCase], None]:
    make, inputs, options = PROGRAMS[program]

    def test(self: unittest.TestCase) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = check(make, inputs, **{"exact": False, **options}, options=BACKENDS[backend])
        reasons = [str(w.message) for w in caught if "stays on TorchScript" in str(w.message)]
        if backend.startswith("inductor"):
            expected = program in STAYS_ON_TORCHSCRIPT
            self.assertEqual(bool(reasons), expected, reasons)
            self.assertEqual(
                {s.backend == "inductor" for s in graph.specializations}, {not expected}
            )

    return test


class ProgramTest(unittest.TestCase):
    """Every program on every backend."""


for _program in PROGRAMS:
    for _backend in BACKENDS:
        _test = make_test(_program, _backend)
        if _backend.startswith("inductor"):
            _test = needs_inductor(_test)
        setattr(ProgramTest, f"test_{_program}_{_backend}", _test)


# --- gradients ---------------------------------------------------------------------------------


def make_gradient_test(backend: str) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.LayerNorm(16)]
        module = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(16, 2))
        oracle = copy.deepcopy(module)
        graph = extract_compiled_graph(module, (torch.randn(5, 3),), **BACKENDS[backend])
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, oracle)]
        for _ in range(4):
            x = torch.randn(5, 3)
            args = [x.clone().requires_grad_() for _ in range(2)]
            state = torch.get_rng_state()
            results = []
            for f, a in zip((graph, oracle), args):
                torch.set_rng_state(state)
                results.append(f(a))
            torch.testing.assert_close(*results)
            for result, optimizer in zip(results, optimizers):
                optimizer.zero_grad()
                result.pow(2).mean().backward()
                optimizer.step()
            torch.testing.assert_close(args[0].grad, args[1].grad)
            torch.testing.assert_close(module.state_dict(), oracle.state_dict())
        self.assertEqual(sum(s.hits for s in graph.specializations), 4)
        if backend == "inductor":
            (variant,) = [s for s in graph.specializations if s.hits]
            self.assertEqual(variant.backend, "inductor")

    return test


class GradientTest(unittest.TestCase):
    """Training steps; a variant with gradients is not frozen."""

    test_fx = make_gradient_test("fx")
    test_inductor = needs_inductor(make_gradient_test("inductor"))
    test_frozen = make_gradient_test("torchscript_frozen")
    test_callable = make_gradient_test("callable")


# --- frozen weights ----------------------------------------------------------------------------


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def no_grad_update(module: Frozen) -> None:
    with torch.no_grad():
        module.linear.weight.mul_(2)


def through_data(module: Frozen) -> None:
    module.linear.weight.data.mul_(2)


def through_a_view_of_data(module: Frozen) -> None:
    module.linear.bias.data[1:].add_(1)


def assigned_data(module: Frozen) -> None:
    module.linear.weight.data = torch.randn(3, 3)


def replaced(module: Frozen) -> None:
    module.linear.weight = nn.Parameter(torch.randn(3, 3))


def replaced_module(module: Frozen) -> None:
    module.linear = nn.Linear(3, 3)


def loaded(module: Frozen) -> None:
    module.load_state_dict(Frozen().state_dict())


def loaded_by_assignment(module: Frozen) -> None:
    module.load_state_dict(Frozen().state_dict(), assign=True)


def through_set(module: Frozen) -> None:
    with torch.no_grad():
        module.linear.weight.set_(torch.randn(3, 3))


def through_numpy(module: Frozen) -> None:
    module.linear.weight.detach().numpy()[:] *= 2


def stepped(module: Frozen) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
        module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    module.zero_grad()


def restored(module: Frozen) -> None:
    """Written to, with the values that were there."""
    module.load_state_dict(copy.deepcopy(module.state_dict()))


CHANGES = (
    no_grad_update,
    through_data,
    through_a_view_of_data,
    assigned_data,
    replaced,
    replaced_module,
    loaded,
    loaded_by_assignment,
    through_set,
    through_numpy,
    stepped,
    restored,
)


class Builds:
    """Counts how often frozen code is made."""

    def __init__(self, graph: CompiledGraph) -> None:
        self.count = 0
        build = graph._compiler.build

        def counted(*args: Any) -> None:
            self.count += 1
            build(*args)

        graph._compiler.build = counted


def make_change_test(change: Callable[[Frozen], None], backend: str) -> Callable[..., None]:
    def test(self: unittest.TestCase) -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            module = Frozen()
            graph = extract_compiled_graph(
                module, (torch.randn(2, 3),), backend=backend, freeze=True
            )
            builds = Builds(graph)

            def compare(times: int) -> None:
                for _ in range(times):
                    x = torch.randn(2, 3)
                    torch.testing.assert_close(graph(x), module(x))

            compare(3)
            self.assertEqual(builds.count, 1)
            change(module)
            compare(1)
            same_variant = len(graph.specializations) == 1
            if same_variant:
                self.assertEqual(builds.count, 1)  # a weight may change before each call
            compare(3)
            if same_variant:
                self.assertEqual(builds.count, 1 if change is restored else 2)
            change(module)
            compare(3)

    return test


class FreezeTest(unittest.TestCase):
    """No change of a weight goes unseen, and the code is made anew once the weights rest."""

    def test_nothing_frozen_is_stale_in_a_loop(self) -> None:
        with torch.no_grad():
            module = Frozen()
            graph = extract_compiled_graph(
                module, (torch.randn(2, 3),), backend="torchscript", freeze=True
            )
            builds = Builds(graph)
            for _ in range(6):
                through_data(module)
                x = torch.randn(2, 3)
                torch.testing.assert_close(graph(x), module(x))
            self.assertEqual(builds.count, 1)

    def test_weights_are_not_moved(self) -> None:
        """Freezing neither copies the weights nor gives them other memory."""
        with torch.no_grad():
            module = Frozen()
            before = [torch._C._data_address(p) for p in module.parameters()]
            graph = extract_compiled_graph(
                module, (torch.randn(2, 3),), backend="torchscript", freeze=True
            )
            for _ in range(3):
                graph(torch.randn(2, 3))
            self.assertEqual([torch._C._data_address(p) for p in module.parameters()], before)

    def test_memory_of_others_is_not_frozen(self) -> None:
        """A write to an array is seen by no one, so a weight over one is no constant."""
        np = __import__("numpy")
        array = np.ones((3, 3), dtype=np.float32)
        with torch.no_grad():
            module = Frozen()
            module.linear.weight = nn.Parameter(torch.from_numpy(array))
            graph = extract_compiled_graph(
                module, (torch.randn(2, 3),), backend="torchscript", freeze=True
            )
            for _ in range(4):
                array += 1
                x = torch.randn(2, 3)
                torch.testing.assert_close(graph(x), module(x))

    def test_what_is_worth_freezing(self) -> None:
        with torch.no_grad():
            module = Net().eval()
            graph = extract_compiled_graph(module, ids())
            placeholders = list(graph.graph_module.graph.find_nodes(op="placeholder"))
            weights = [
                i for i, n in enumerate(placeholders) if n.meta["val"].dtype is torch.float32
            ]
            frozen = _native.worth_freezing(graph.graph_module, weights)
            (left,) = set(weights) - set(frozen)
            self.assertEqual(placeholders[left].meta["val"].shape, module.table.weight.shape)

    @needs_inductor
    def test_parts_of_a_weight_are_worth_freezing(self) -> None:
        class Parts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.added = nn.Parameter(torch.randn(2, 3, 3))
                self.returned = nn.Parameter(torch.randn(2, 3))

            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                left, right = self.added.unbind()
                return (x.mm(left + right), *self.returned.unbind())

        with torch.no_grad():
            module, args = Parts(), (torch.randn(2, 3),)
            graph = extract_compiled_graph(module, args).graph_module
            # A weight of which only views are returned need not be an input.
            weights = list(range(1, len(graph.graph.find_nodes(op="placeholder"))))
            self.assertEqual(_native.worth_freezing(graph, weights), [1])
            compiled = extract_compiled_graph(module, args, backend="inductor", freeze=True)
            for _ in range(3):
                torch.testing.assert_close(compiled(*args), module(*args))
            self.assertEqual(compiled.specializations[0].backend, "inductor")

    def test_what_is_written_to_is_not_frozen(self) -> None:
        with torch.no_grad():
            graph = extract_compiled_graph(Counter(), (torch.ones(2, 3),), freeze=True)
        (variant,) = graph.specializations
        inputs = list(variant.graph_module.graph.find_nodes(op="placeholder"))
        shapes = [tuple(inputs[i].meta["val"].shape) for i in variant._graph.weights]
        self.assertEqual(sorted(shapes), [(3,), (3, 3)])

    @needs_inductor
    def test_large_products_are_not_worth_freezing(self) -> None:
        """But convolutions beside them are."""

        class Large(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(1, 2, 3)
                self.linear = nn.Linear(128, 128)

            def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
                return [self.conv(x), self.linear(y)]

        with torch.no_grad():
            module = Large()
            for rows, shapes in ((2, 4), (128, 2)):
                args = (torch.randn(1, 1, 8, 8), torch.randn(rows, 128))
                graph = extract_compiled_graph(module, args).graph_module
                frozen = _native.worth_freezing(graph, [2, 3, 4, 5])  # after the arguments
                self.assertEqual(len(frozen), shapes)
                compiled = extract_compiled_graph(module, args, backend="inductor", freeze=True)
                for _ in range(3):
                    torch.testing.assert_close(compiled(*args), module(*args))

    def test_freed(self) -> None:
        """What freezing keeps goes with the graph."""
        with torch.no_grad():
            module = Frozen()
            graph = extract_compiled_graph(
                module, (torch.randn(2, 3),), backend="torchscript", freeze=True
            )
            graph(torch.randn(2, 3))
            weight = weakref.ref(module.linear.weight)
            del graph, module
            gc.collect()
            self.assertIsNone(weight())

    def test_wrong_combinations(self) -> None:
        for backend in ("fx", interpreting_backend):
            with self.assertRaisesRegex(ValueError, "freeze"):
                extract_compiled_graph(torch.neg, (torch.ones(1),), backend=backend, freeze=True)
        with self.assertRaisesRegex(ValueError, "backend is 'none'"):
            extract_compiled_graph(torch.neg, (torch.ones(1),), backend="none")


for _change in CHANGES:
    setattr(FreezeTest, f"test_{_change.__name__}", make_change_test(_change, "torchscript"))
    if _change in (through_data, replaced, loaded) or TEST_WITH_SLOW:
        _test = make_change_test(_change, "inductor")
        setattr(FreezeTest, f"test_{_change.__name__}_inductor", _test)


# --- what Inductor is not given, and what it fails at ------------------------------------------


def only_warning(caught: list[warnings.WarningMessage]) -> str:
    (message,) = [str(w.message) for w in caught if "stays on TorchScript" in str(w.message)]
    return message


class FallbackTest(unittest.TestCase):
    """A graph that stays on TorchScript computes what eager does, with one warning."""

    def check(self, program: Program, inputs: Callable[..., Any], reason: str, **options) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graph = check(lambda: program, inputs, **options, options={"backend": "inductor"})
        self.assertIn(reason, only_warning(caught))
        self.assertIn(f"on torchscript ({reason}", graph.explain())

    def test_complex(self) -> None:
        self.check(lambda x: x.conj() * 2, tensors((2,), dtype=torch.complex64), "complex")

    def test_sizes_from_data(self) -> None:
        self.check(lambda x: x[x > -100] * 2, tensors((4,)), "sizes that depend on the data")

    def test_generator(self) -> None:
        generators: dict[str, torch.Generator] = {}

        def draw(generator: torch.Generator) -> Tensor:
            return torch.rand(2, generator=generator)

        def inputs(i: int) -> tuple[torch.Generator]:
            return (generators.setdefault("one", torch.Generator()).manual_seed(i),)

        self.check(draw, inputs, "a torch.Generator", captures=None)

    def test_path_with_a_space(self) -> None:
        place = {"TORCHINDUCTOR_CACHE_DIR": "/tmp/not there"}
        with unittest.mock.patch.dict(os.environ, place):
            self.check(
                lambda x: x * 2,
                tensors((2,)),
                "PyTorch's Inductor cannot work with a space in a path",
            )

    @needs_inductor
    def test_failure(self) -> None:
        def fails(*_args: Any, **_kwargs: Any) -> None:
            raise RuntimeError("planted\nsecond line")

        with unittest.mock.patch.object(_inductor.compile_fx, "compile_fx_inner", fails):
            self.check(lambda x: x + 1, tensors((2,)), "planted")

    @needs_inductor
    def test_wrong_layout(self) -> None:
        """The first run looks at what the code returns, and finds a result that is another one."""
        plain = _inductor._decomposed

        def merged(*args: Any) -> fx.GraphModule:
            graph = plain(*args)
            first, second = graph.graph.output_node().args[0]
            second.replace_all_uses_with(first)
            graph.recompile()
            return graph

        with unittest.mock.patch.object(_inductor, "_decomposed", merged):
            # Random numbers, which that run has drawn and the graph draws again.
            self.check(
                lambda x: [x + torch.rand(2), x + torch.rand(2)],
                tensors((2,)),
                "Inductor's output 1",
            )


class CallableTest(unittest.TestCase):
    """A function with the signature of a torch.compile backend."""

    def test_arguments(self) -> None:
        seen: list[Any] = []

        def backend(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            seen.append((module, inputs))
            return module.forward

        x = torch.randn(3)
        graph = extract_compiled_graph(lambda x: x * 2, (x,), backend=backend)
        torch.testing.assert_close([graph(x), graph(x)], [x * 2, x * 2])
        ((module, inputs),) = seen
        self.assertIsInstance(module, fx.GraphModule)
        self.assertIs(inputs[0], x)
        self.assertEqual(graph.specializations[0].backend, "backend")

    def test_torch_compile_backends(self) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        for name in ("eager", "aot_eager", "inductor"):
            with self.subTest(name), torch.no_grad():
                module = Frozen()
                graph = extract_compiled_graph(
                    module, (torch.randn(2, 3),), backend=lookup_backend(name)
                )
                for _ in range(3):
                    x = torch.randn(2, 3)
                    torch.testing.assert_close(graph(x), module(x))

    def test_failure(self) -> None:
        def broken(_module: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
            raise RuntimeError("planted")

        graph = extract_compiled_graph(lambda x: x * 2, (torch.ones(2),), backend=broken)
        with self.assertRaisesRegex(ExtractionError, "the backend broken .* planted"):
            graph(torch.ones(2))

    def test_wrong_results(self) -> None:
        for outputs, message in (
            ((), "0 outputs"),
            ((torch.ones(3),), r"torch.float32\[3\]"),
            ((torch.ones(2, 2).t(),), r"strides \(1, 2\)"),
        ):
            with self.subTest(message):
                graph = extract_compiled_graph(
                    lambda x: x * 2,
                    (torch.ones(2, 2),),
                    backend=lambda _m, _i, o=outputs: lambda *_: o,
                )
                graph(torch.ones(2, 2))
                with self.assertRaisesRegex(ExtractionError, message):
                    graph(torch.ones(2, 2))


# --- tiers -------------------------------------------------------------------------------------


@contextmanager
def held_compiler(error: Exception | None = None) -> Iterator[threading.Event]:
    """The compiler waits for this event, and then compiles, or raises `error`."""
    event = threading.Event()
    plain = _compile._elsewhere

    def compile(*args: Any) -> Any:
        event.wait()
        if error is not None:
            raise error
        return plain(*args)

    with unittest.mock.patch.object(_compile, "_elsewhere", compile):
        try:
            yield event
        finally:
            event.set()
            wait_for_compilers()


def compilers() -> list[threading.Thread]:
    """The threads that wait for a compiler."""
    return [t for t in threading.enumerate() if t.name.startswith("torch_lazy_ext")]


def wait_for_compilers() -> None:
    """However long they take: that is the machine's business."""
    for thread in compilers():
        thread.join()


def while_compiled(call: Callable[[], None]) -> None:
    """Call again and again, until what the first call had compiled is there."""
    call()
    while compilers():
        call()
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether the process is there, and not only because nobody asked how it ended."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class TieredTest(unittest.TestCase):
    def calls(self, graph: CompiledGraph, module: Program, times: int = 3) -> None:
        for _ in range(times):
            x = torch.randn(2, 3)
            torch.testing.assert_close(graph(x), module(x))

    @needs_inductor
    def test_switch(self) -> None:
        for freeze in (False, True):
            with self.subTest(freeze=freeze), torch.no_grad(), held_compiler() as event:
                module = Frozen()
                graph = extract_compiled_graph(
                    module, (torch.randn(2, 3),), backend="tiered", freeze=freeze
                )
                self.calls(graph, module)
                (variant,) = graph.specializations
                self.assertEqual(variant.backend, "torchscript")
                event.set()
                wait_for_compilers()
                self.assertEqual(variant.backend, "inductor")
                self.calls(graph, module)

    def test_failure(self) -> None:
        with (
            torch.no_grad(),
            held_compiler(RuntimeError("planted")) as event,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            module = Frozen()
            graph = extract_compiled_graph(module, (torch.randn(2, 3),), backend="tiered")
            event.set()
            self.calls(graph, module)
            wait_for_compilers()
            self.assertIn("planted", graph.specializations[0].backend)
            self.calls(graph, module)
            x = torch.randn(4, 3)
            torch.testing.assert_close(graph(x), module(x))  # another variant, no other warning
            wait_for_compilers()
            self.assertIn("planted", graph.specializations[0].backend)
        self.assertIn("planted", only_warning(caught))

    @needs_inductor
    def test_weights_that_change_meanwhile(self) -> None:
        with torch.no_grad(), held_compiler() as event:
            module = Frozen()
            graph = extract_compiled_graph(
                module, (torch.randn(2, 3),), backend="tiered", freeze=True
            )
            self.calls(graph, module)
            through_data(module)
            event.set()
            wait_for_compilers()
            self.assertEqual(graph.specializations[0].backend, "inductor")
            self.calls(graph, module)

    @needs_inductor
    def test_undisturbed(self) -> None:
        """Random numbers, torch.compile and modules of this process, while the other compiles."""
        compiled = torch.compile(lambda x: x * 2, backend="eager")
        x = torch.ones(5)
        with torch.no_grad():
            graph = extract_compiled_graph(
                lambda x: nn.functional.dropout(x, 0.5), (x,), backend="tiered"
            )
            torch.manual_seed(0)
            stream = torch.get_rng_state()

            def call() -> None:
                nonlocal stream
                actual = graph(x)
                with torch.random.fork_rng():
                    torch.set_rng_state(stream)
                    self.assertTrue(torch.equal(actual, nn.functional.dropout(x, 0.5)))
                    stream = torch.get_rng_state()
                self.assertTrue(torch.equal(compiled(x), x * 2))

            while_compiled(call)
            self.assertEqual(graph.specializations[0].backend, "inductor")
            for _ in range(3):
                call()

    @needs_inductor
    def test_convolution(self) -> None:
        """Constants come from the other process."""
        with torch.no_grad():
            module = Net().eval()
            graph = extract_compiled_graph(module, ids(), backend="tiered", freeze=True)
            (x,) = ids()
            while_compiled(lambda: torch.testing.assert_close(graph(x), module(x)))
            self.assertEqual(graph.specializations[0].backend, "inductor")
            for _ in range(3):
                (x,) = ids()
                torch.testing.assert_close(graph(x), module(x))

    @needs_inductor
    def test_threads(self) -> None:
        """Calls from several threads go on while the code is switched under them."""
        with held_compiler() as event:
            module = Frozen().requires_grad_(False)
            graph = extract_compiled_graph(module, (torch.randn(2, 3),), backend="tiered")
            failures: list[BaseException] = []
            stop = threading.Event()

            calls = [0, 0, 0]

            def work(i: int) -> None:
                try:
                    while not stop.is_set():
                        self.calls(graph, module, 1)
                        calls[i] += 1
                except BaseException as e:
                    failures.append(e)

            def each_calls_again() -> None:
                before = list(calls)
                while not failures and any(b == c for b, c in zip(before, calls)):
                    time.sleep(0.01)

            threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
            for thread in threads:
                thread.start()
            try:
                each_calls_again()
                event.set()
                wait_for_compilers()
                each_calls_again()
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
            self.assertEqual(failures, [])
            self.assertEqual(graph.specializations[0].backend, "inductor")

    @needs_inductor
    def test_exit_while_compiling(self) -> None:
        """The end of the process neither waits for the compiler nor crashes."""
        self.exit_while_compiling("")

    @needs_inductor
    def test_exit_while_the_compiler_starts(self) -> None:
        """This process ends before it knows that the other one has begun."""
        self.exit_while_compiling(
            "import subprocess\n"
            "class Slow(subprocess.Popen):\n"
            "    def __init__(self, *args, **kwargs):\n"
            "        super().__init__(*args, **kwargs)\n"
            "        time.sleep(1)\n"
            "subprocess.Popen = Slow\n"
        )

    def exit_while_compiling(self, prepare: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            compiler = pathlib.Path(folder, "compiler")
            compiler.write_text(f"#!/bin/sh\necho $$ > '{folder}/pid'\nexec sleep 100000\n")
            compiler.chmod(0o755)
            script = (
                "import os, sys, time, torch, torch_lazy_ext as t\n"
                f"{prepare}sys.executable = {str(compiler)!r}\n"  # as if it took a day
                "graph = t.extract_compiled_graph(lambda x: x.sin(), (torch.ones(3),),"
                " backend='tiered')\n"
                "graph(torch.ones(3))\n"
                f"while not os.path.exists({folder!r} + '/pid'): time.sleep(0.01)\n"
            )
            result = subprocess.run(
                [sys.executable, "-c", script],
                cwd=pathlib.Path(__file__).parent,  # not where sources hide an installed package
                capture_output=True,
                text=True,
            )
            pid = int(pathlib.Path(folder, "pid").read_text())
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        while runs(pid):
            time.sleep(0.01)


# --- torch.compile -----------------------------------------------------------------------------


class DynamoTest(unittest.TestCase):
    """torch.compile(model, backend="torch_lazy_ext"), in inference and training."""

    def tearDown(self) -> None:
        torch._dynamo.reset()

    def test_registered(self) -> None:
        """By the name that pyproject.toml gives it; an install turns that into an entry point."""
        text = (pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text()
        (value,) = re.findall(
            r'^\[project.entry-points.torch_dynamo_backends\]\ntorch_lazy_ext = "(.*)"$', text, re.M
        )
        group = "torch_dynamo_backends"
        point = importlib.metadata.EntryPoint("torch_lazy_ext", value, group)
        points = importlib.metadata.EntryPoints([point])
        registry = torch._dynamo.backends.registry
        registry._discover_entrypoint_backends.cache_clear()
        with unittest.mock.patch("importlib.metadata.entry_points", lambda **_k: points):
            registry._discover_entrypoint_backends()
            compiled = torch.compile(lambda x: x * 2, backend="torch_lazy_ext")
            torch.testing.assert_close(compiled(torch.ones(2)), torch.full((2,), 2.0))
        registry._discover_entrypoint_backends.cache_clear()

    def test_inference(self) -> None:
        module = Counter().eval()
        oracle = copy.deepcopy(module)
        graphs: list[CompiledGraph] = []

        def made(*args: Any, **kwargs: Any) -> CompiledGraph:
            graphs.append(CompiledGraph(*args, **kwargs))
            return graphs[-1]

        with (
            torch.no_grad(),
            unittest.mock.patch.object(torch_lazy_ext._dynamo, "CompiledGraph", made),
        ):
            compiled = torch.compile(module, backend=torch_lazy_ext._dynamo.torch_lazy_ext)
            for size in (2, 2, 5, 7):
                x = torch.randn(size, 3)
                args = [x.clone(), x.clone()]
                torch.testing.assert_close(compiled(args[0]), oracle(args[1]))
                torch.testing.assert_close(*args)
        self.assertEqual(sum(s.hits for graph in graphs for s in graph.specializations), 4)
        torch.testing.assert_close(module.count, oracle.count)

    def test_training(self) -> None:
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        oracle = copy.deepcopy(module)
        compiled = torch.compile(module, backend=torch_lazy_ext._dynamo.torch_lazy_ext)
        optimizers = [torch.optim.Adam(m.parameters()) for m in (module, oracle)]
        for _ in range(3):
            x = torch.randn(5, 3)
            for function, optimizer in zip((compiled, oracle), optimizers):
                optimizer.zero_grad()
                function(x).pow(2).sum().backward()
                optimizer.step()
            torch.testing.assert_close(module.state_dict(), oracle.state_dict())

    def test_options(self) -> None:
        compiled = torch.compile(
            lambda x: x.sin() + 1,
            backend=torch_lazy_ext._dynamo.torch_lazy_ext,
            options={"backend": "fx"},
        )
        x = torch.randn(3)
        torch.testing.assert_close(compiled(x), x.sin() + 1)
        with self.assertRaisesRegex(Exception, "backend is 'none'"):
            torch.compile(
                operator.neg,
                backend=torch_lazy_ext._dynamo.torch_lazy_ext,
                options={"backend": "none"},
            )(x)


if __name__ == "__main__":
    unittest.main()
