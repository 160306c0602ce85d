# Owner(s): ["oncall: jit"]

"""A whole training step is one graph: forward, backward and optimizer, equal to eager's bit for bit.

The oracle is a second copy of the same training that runs eagerly beside the graph, step after
step, in float64. After each step these must agree exactly: what the step returns, parameters,
buffers, gradients (also whether there is one), the state of the optimizers, and the random number
generator.
"""

import copy
import os
import unittest
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracle import needs_inductor
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_lazy_ext import CompiledGraph, UnsupportedError, extract_compiled_graph

STEPS = 20


class Training:
    """What a training loop holds.

    Attributes:
        step: one step of the training, to be extracted.
        models, optimizers: whose state is compared.
        after: what the loop does after each step, outside of the graph (a scheduler).
    """

    def __init__(
        self,
        step: Callable[..., Any],
        models: list[nn.Module],
        optimizers: list[torch.optim.Optimizer],
        after: Callable[[], Any] = lambda: None,
    ) -> None:
        self.step = step
        self.models = models
        self.optimizers = optimizers
        self.after = after

    def state(self, versions: bool = False) -> dict[str, Any]:
        """What the training has come to, and how often each tensor was written to."""
        found: dict[str, Any] = {}
        for k, model in enumerate(self.models):
            found |= {f"model {k}: {name}": t for name, t in model.state_dict().items()}
            for name, t in (*model.named_parameters(), *model.named_buffers()) if versions else ():
                found[f"model {k}: version of {name}"] = t._version
            for name, p in model.named_parameters():
                found[f"model {k}: gradient of {name}"] = p.grad
                found[f"model {k}: {name} requires grad"] = p.requires_grad
        for k, optimizer in enumerate(self.optimizers):
            paths, _ = pytree.tree_flatten_with_path(optimizer.state_dict())
            for path, leaf in paths:
                found[f"optimizer {k}: {pytree.keystr(path)}"] = leaf
                if versions and isinstance(leaf, Tensor):
                    found[f"optimizer {k}: version of {pytree.keystr(path)}"] = leaf._version
        return found


def difference(expected: Any, actual: Any) -> str:
    """Nothing when two results or states agree exactly."""
    wants, gots = pytree.tree_flatten_with_path(expected), pytree.tree_flatten_with_path(actual)
    if wants[1] != gots[1]:
        return f"the structures differ: {wants[1]} and {gots[1]}"
    for (path, want), (_path, got) in zip(wants[0], gots[0]):
        if type(want) is not type(got):
            return f"{pytree.keystr(path)}: {type(want)} and {type(got)}"
        if isinstance(want, Tensor):
            same = (
                want.dtype == got.dtype
                and want.stride() == got.stride()
                and want.requires_grad == got.requires_grad
                and torch.equal(want, got)
            )
        else:
            same = want == got
        if not same:
            return f"{pytree.keystr(path)}: expected {want}, got {got}"
    return ""


def almost(expected: Any, actual: Any) -> str:
    """Nothing when two results or states are as close as `torch.testing` wants them."""
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError as e:
        return str(e)
    return ""


Inputs = Callable[[], tuple[Tensor, ...]]


def check_training(
    test: unittest.TestCase,
    make: Callable[[], Training],
    inputs: Inputs,
    steps: int = STEPS,
    captures: int = 1,
    backend: str = "torchscript",
    runs_on: str = "",
) -> CompiledGraph:
    """Train `steps` steps with and without the graph; exactly `captures` variants serve them.

    Inductor fuses operators, and rounds between them where eager does not: it is compared closely.
    """
    torch.manual_seed(0)
    oracle = make()
    torch.manual_seed(0)
    training = make()
    before = training.state()
    graph = extract_compiled_graph(training.step, inputs(), backend=backend)
    differ = almost if backend == "inductor" else difference
    test.assertEqual(difference(before, training.state()), "", "the extraction changed something")
    for i in range(steps):
        args = inputs()
        results, generators = [], []
        for side, step in ((oracle, oracle.step), (training, graph)):
            torch.manual_seed(i)
            results.append(step(*args))
            generators.append(torch.get_rng_state())
            side.after()
        test.assertEqual(differ(results[0], results[1]), "", f"results of step {i}")
        # What a graph makes (the state, in a first step of its own) has no history of writes.
        states = [side.state(versions=captures == 1) for side in (oracle, training)]
        test.assertEqual(differ(*states), "", f"after step {i}")
        test.assertTrue(torch.equal(*generators), f"random numbers after step {i}")
    test.assertEqual(sum(s.hits for s in graph.specializations), steps)
    test.assertEqual(len(graph.specializations), captures, graph.explain())
    for variant in graph.specializations[: 1 if runs_on else None]:
        test.assertEqual(variant.backend, runs_on or backend)
    return graph


def maketest(
    make: Callable[[], Training], inputs: Inputs, **options: Any
) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        check_training(self, make, inputs, **options)

    return test


slow = unittest.skipUnless(
    os.environ.get("PYTORCH_TEST_WITH_SLOW") == "1", "set PYTORCH_TEST_WITH_SLOW=1 to run"
)


class TrainingTestCase(unittest.TestCase):
    def setUp(self) -> None:
        self._dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def tearDown(self) -> None:
        torch.set_default_dtype(self._dtype)


# ------------------------------------------------------------------------------- models


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def mlp_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.randint(0, 3, (6,))


def conv() -> nn.Module:
    """A conv net with batch norm, whose buffers each step updates."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 3),
    )


def conv_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 2, 6, 6), torch.randint(0, 3, (4,))


class Attention(nn.Module):
    """Self attention with dropout, over tokens that are embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


def attention_inputs() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (4, 5)), torch.randint(0, 3, (4,))


MODELS = {
    "mlp": (mlp, mlp_inputs),
    "conv": (conv, conv_inputs),
    "attention": (Attention, attention_inputs),
}

Optimizers = Callable[[Any], torch.optim.Optimizer]


def supervised(
    make_model: Callable[[], nn.Module], make_optimizer: Optimizers
) -> Callable[[], Training]:
    """The training step of the tutorials, with a scheduler in the loop around it."""

    def make() -> Training:
        model = make_model()
        optimizer = make_optimizer(model.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)

        def train_step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return Training(train_step, [model], [optimizer], scheduler.step)

    return make


# --------------------------------------------------------------------------- optimizers

# Name -> the options that lead through other code.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"momentum": 0.9, "dampening": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"maximize": True},
    ],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.01}, {"maximize": True}],
    "AdamW": [{}, {"amsgrad": True, "maximize": True}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.01}, {"maximize": True}],
    "RAdam": [
        {},
        {"decoupled_weight_decay": True, "weight_decay": 0.01},
        {"betas": (0.9, 0.6)},  # never long enough to be rectified: its divisor is 0
    ],
    "Adagrad": [{}, {"lr_decay": 0.1, "weight_decay": 0.01}],
    "Adadelta": [{}, {"weight_decay": 0.01, "maximize": True}],
    "Adamax": [{}, {"weight_decay": 0.01, "maximize": True}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.9, "weight_decay": 0.01}],
    "Rprop": [{}, {"maximize": True}],
    "ASGD": [{}, {"weight_decay": 0.01, "t0": 4.0}],
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


def kinds(name: str) -> list[str]:
    return ["plain", "foreach"] + ["fused"] * (name in FUSED)


def makeoptimizer(name: str, kind: str, options: dict[str, Any]) -> Optimizers:
    flags = {"foreach": kind == "foreach"}
    if name in FUSED:
        flags["fused"] = kind == "fused"
    return lambda parameters: getattr(torch.optim, name)(parameters, lr=0.02, **flags, **options)


def expected_captures(name: str, kind: str, options: dict[str, Any]) -> int:
    """One, whatever the first step creates; more where Python takes another way some day."""
    if name == "SGD" and options.get("dampening"):
        return 2  # the first step is without
    if name == "ASGD" and "t0" in options:
        return 2 if kind == "foreach" else 3  # averages from step t0 on
    return 1


class OptimizerTest(TrainingTestCase):
    """Each optimizer and option, 20 steps with a scheduler."""


for _model in MODELS:
    for _name, _variations in OPTIONS.items():
        for _kind in kinds(_name):
            for _i, _options in enumerate(_variations):
                _test = maketest(
                    supervised(MODELS[_model][0], makeoptimizer(_name, _kind, _options)),
                    MODELS[_model][1],
                    captures=expected_captures(_name, _kind, _options),
                )
                if _model != "mlp" and not (_kind == "plain" and _i == 0):
                    _test = slow(_test)
                setattr(OptimizerTest, f"test_{_name}_{_kind}_{_i}_{_model}".lower(), _test)


def stays(name: str) -> str:
    """The fused kernels of eager are fast enough, and Inductor has none."""
    kernel = f"_fused_{name.lower()}_"
    return (
        "inductor; updates in place: torchscript "
        f"(a number of the graph as an argument of {kernel})"
    )


class BackendTest(TrainingTestCase):
    """Each optimizer on the other backends."""


for _backend in ("fx", "inductor"):
    for _name, _variations in OPTIONS.items():
        for _kind in kinds(_name):
            _test = maketest(
                supervised(MODELS["mlp"][0], makeoptimizer(_name, _kind, _variations[0])),
                MODELS["mlp"][1],
                steps=6,
                captures=expected_captures(_name, _kind, _variations[0]),
                backend=_backend,
                runs_on=stays(_name) if (_kind, _backend) == ("fused", "inductor") else "",
            )
            if _backend == "inductor":
                _test = needs_inductor(_test)
                if (_name, _kind) != ("AdamW", "foreach"):
                    _test = slow(_test)  # it compiles for seconds
            setattr(BackendTest, f"test_{_name}_{_kind}_{_backend}".lower(), _test)


# -------------------------------------------------------------------- what loops do


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def looped(
    step_of: Callable[[nn.Module, torch.optim.Optimizer], Callable[..., Any]],
    make_optimizer: Optimizers = sgd,
    make_model: Callable[[], nn.Module] = mlp,
    make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Callable[[], Training]:
    """A training whose step is `step_of(model, optimizer)`."""

    def make() -> Training:
        model = make_model()
        optimizer = make_optimizer(model.parameters())
        if make_scheduler is None:
            return Training(step_of(model, optimizer), [model], [optimizer])
        after = make_scheduler(optimizer).step
        return Training(step_of(model, optimizer), [model], [optimizer], after)

    return make


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def accumulating(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for xs, ys in zip(x.chunk(3), y.chunk(3)):
            loss = F.cross_entropy(model(xs), ys) / 3
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        return total

    return step


def accumulating_over_calls(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[..., Any]:
    """Gradients stay from call to call, and grow."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return step


def zeroing(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def clipping_norm(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return loss.detach(), norm

    return step


def clipping_value(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        optimizer.step()
        return loss.detach()

    return step


def autocasting(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    model.float()

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def returning_numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> dict[str, Any]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return {
            "loss": loss.item(),
            "twice": 2 * loss.item(),
            "lr": optimizer.param_groups[0]["lr"],
        }

    return step


def functional(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """No optimizer and no `.grad`: torch.func, and an update by hand."""
    parameters = dict(model.named_parameters())

    def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    def step(x: Tensor, y: Tensor) -> Tensor:
        gradients, loss = torch.func.grad_and_value(loss_of)(parameters, x, y)
        with torch.no_grad():
            for name, p in parameters.items():
                p -= 0.1 * gradients[name]
        return loss

    return step


def scaling_with(scaler: torch.amp.GradScaler) -> Any:
    def scaling(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        return step

    return scaling


def averaging() -> Training:
    """An exponential moving average of the weights, as torch.optim.swa_utils keeps it."""
    model = mlp()
    optimizer = sgd(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        return loss.detach()

    return Training(step, [model, average], [optimizer])


def adversarial() -> Training:
    """Two models and two optimizers; the generator's turn freezes the discriminator."""
    generator, discriminator = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    adam = lambda m: torch.optim.Adam(m.parameters(), lr=0.01)  # noqa: E731
    of_generator, of_discriminator = adam(generator), adam(discriminator)

    def step(real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        fake = generator(noise)
        discriminator.requires_grad_(True)
        of_discriminator.zero_grad()
        judged = discriminator(real).mean() - discriminator(fake.detach()).mean()
        (-judged).backward()
        of_discriminator.step()
        discriminator.requires_grad_(False)
        of_generator.zero_grad()
        fooled = discriminator(fake).mean()
        (-fooled).backward()
        of_generator.step()
        return judged.detach(), fooled.detach()

    return Training(step, [generator, discriminator], [of_generator, of_discriminator])


class LoopTest(TrainingTestCase):
    """What training loops do besides the plain step."""

    test_accumulation = maketest(looped(accumulating), mlp_inputs)
    # The first call finds no gradients.
    test_accumulation_over_calls = maketest(looped(accumulating_over_calls), mlp_inputs, captures=2)
    test_zeroing = maketest(looped(zeroing), mlp_inputs, captures=2)
    test_clip_norm = maketest(looped(clipping_norm), mlp_inputs)
    test_clip_value = maketest(looped(clipping_value), mlp_inputs)
    test_autocast = maketest(looped(autocasting), mlp_inputs)
    test_numbers_returned = maketest(looped(returning_numbers), mlp_inputs)
    test_functional = maketest(looped(functional), mlp_inputs)
    # The first update copies the weights.
    test_averaging = maketest(averaging, mlp_inputs, captures=2)
    # The first call finds the discriminator's parameters with requires_grad.
    test_adversarial = maketest(
        adversarial, lambda: (torch.randn(5, 4), torch.randn(5, 2)), captures=2
    )
    test_one_cycle_momentum = maketest(
        looped(
            plain,
            lambda p: torch.optim.Adam(p, lr=0.1),
            make_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(
                o, max_lr=0.2, total_steps=STEPS + 1
            ),
        ),
        mlp_inputs,
        captures=1,
    )
    test_one_cycle_fused = maketest(
        looped(
            plain,
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
            make_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(
                o, max_lr=0.2, total_steps=STEPS + 1
            ),
        ),
        mlp_inputs,
        captures=1,
    )

    def test_frozen_parameters(self) -> None:
        def make_model() -> nn.Module:
            model = mlp()
            model[0].weight.requires_grad_(False)
            return model

        check_training(self, looped(plain, make_model=make_model), mlp_inputs)

    def test_second_backward(self) -> None:
        """A loss whose backward ran in the step says so, in eager's words."""
        messages = []
        for extracted in (False, True):
            torch.manual_seed(0)
            step = looped(plain)().step
            args = mlp_inputs()
            loss = (extract_compiled_graph(step, args) if extracted else step)(*args)
            with self.assertRaises(RuntimeError) as raised:
                loss.backward()
            messages.append(str(raised.exception))
        self.assertEqual(*messages)

    def test_resume(self) -> None:
        """Saved and loaded in mid-run, into another training: as if nothing had happened."""
        adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
        torch.manual_seed(0)
        uninterrupted, first, second = (looped(plain, adam)() for _ in range(3))
        for training in (first, second):
            training.models[0].load_state_dict(uninterrupted.models[0].state_dict())
        batches = [mlp_inputs() for _ in range(STEPS)]
        for batch in batches:
            uninterrupted.step(*batch)
        graph = extract_compiled_graph(first.step, batches[0])
        for batch in batches[: STEPS // 2]:
            graph(*batch)
        models = copy.deepcopy(first.models[0].state_dict())
        optimizers = copy.deepcopy(first.optimizers[0].state_dict())
        for training in (first, second):  # into itself, and into a new one
            training.models[0].load_state_dict(models)
            training.optimizers[0].load_state_dict(copy.deepcopy(optimizers))
            resumed = graph if training is first else extract_compiled_graph(training.step, batch)
            for batch in batches[STEPS // 2 :]:
                resumed(*batch)
            self.assertEqual(difference(uninterrupted.state(), training.state()), "")

    def test_state_is_read(self) -> None:
        """Whoever looks whether there is state sees none in the first step."""

        def telling(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
            step = plain(model, optimizer)
            return lambda x, y: (len(optimizer.state), step(x, y))

        adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
        check_training(self, looped(telling, adam), mlp_inputs, captures=2)

    def test_first_call_fails(self) -> None:
        """No state is left, nothing is changed, and the next call is the first step."""
        cases: list[tuple[str, str, dict[str, Any]]] = [
            ("Adam", "plain", {}),
            ("SGD", "plain", {"momentum": 0.9}),
            ("SGD", "fused", {}),
            ("Rprop", "plain", {}),
        ]
        for name, kind, options in cases:
            make = looped(plain, makeoptimizer(name, kind, options))
            torch.manual_seed(0)
            oracle = make()
            torch.manual_seed(0)
            training = make()
            x, y = mlp_inputs()
            notes = {k: v for k, v in vars(training.optimizers[0]).items() if type(v) is bool}
            graph = extract_compiled_graph(training.step, (x, y))
            with self.assertRaises(IndexError):
                graph(x, y + 7)
            self.assertEqual(len(training.optimizers[0].state), 0, name)
            self.assertEqual(vars(training.optimizers[0]), vars(training.optimizers[0]) | notes)
            oracle.step(x, y)
            graph(x, y)
            self.assertEqual(difference(oracle.state(), training.state()), "", name)

    def test_later_call_fails(self) -> None:
        """Gradients stay where the program fails before it replaces them."""

        def forward_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
            def step(x: Tensor, y: Tensor) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return loss

            return step

        adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
        for step_of in (forward_first, plain):
            torch.manual_seed(0)
            oracle = looped(step_of, adam)()
            torch.manual_seed(0)
            training = looped(step_of, adam)()
            graph = extract_compiled_graph(training.step, mlp_inputs())
            for i in range(6):
                x, y = mlp_inputs()
                for step in (oracle.step, graph):
                    if i % 2:
                        self.assertRaises(IndexError, step, x, y + 7)
                    else:
                        step(x, y)
                self.assertEqual(difference(oracle.state(True), training.state(True)), "")
            self.assertEqual(len(graph.specializations), 1)

    def test_two_shapes(self) -> None:
        """Graphs of two shapes were captured, and either may come first."""
        adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
        torch.manual_seed(0)
        oracle = looped(plain, adam)()
        torch.manual_seed(0)
        training = looped(plain, adam)()
        batches = [tuple(t[: 6 - i % 2] for t in mlp_inputs()) for i in range(6)]
        graph = extract_compiled_graph(training.step, batches[1])
        for batch in batches:
            oracle.step(*batch)
            graph(*batch)
            self.assertEqual(difference(oracle.state(), training.state()), "")
        self.assertEqual(len(graph.specializations), 2)

    def test_state_is_dropped(self) -> None:
        """`optimizer.state.clear()`: the next step creates it again, in the same graph."""
        adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
        torch.manual_seed(0)
        oracle = looped(plain, adam)()
        torch.manual_seed(0)
        training = looped(plain, adam)()
        batches = [mlp_inputs() for _ in range(6)]
        graph = extract_compiled_graph(training.step, batches[0])
        kept = []
        for i, batch in enumerate(batches):
            for side, step in ((oracle, oracle.step), (training, graph)):
                step(*batch)
                if i % 2:
                    kept.append(dict(side.optimizers[0].state))
                    side.optimizers[0].state.clear()
            self.assertEqual(difference(oracle.state(), training.state()), "")
        for old, new in zip(kept[::2], kept[1::2]):
            self.assertEqual(difference(list(old.values()), list(new.values())), "")

    def test_versions_of_momentum(self) -> None:
        for kind in ("plain", "foreach", "fused"):
            make = looped(plain, makeoptimizer("SGD", kind, {"momentum": 0.9}))
            versions = []
            for extracted in (False, True):
                training = make()
                batch = mlp_inputs()
                step = extract_compiled_graph(training.step, batch) if extracted else training.step
                for _ in range(3):
                    step(*batch)
                    state = training.optimizers[0].state.values()
                    versions.append([s["momentum_buffer"]._version for s in state])
            self.assertEqual(versions[:3], versions[3:], kind)

    def test_signs_of_momentum(self) -> None:
        """The first step copies the gradient, also zeros with a sign."""
        for kind in ("plain", "foreach", "fused"):
            signs = []
            for extracted in (False, True):
                p = nn.Parameter(torch.tensor([1.0, -1.0, 2.0]))
                optimizer = makeoptimizer("SGD", kind, {"momentum": 0.9})([p])

                def step(p: Tensor = p, optimizer: Any = optimizer) -> None:
                    optimizer.zero_grad()
                    (p * torch.tensor([-0.0, 0.0, 1.0])).sum().backward()
                    optimizer.step()

                (extract_compiled_graph(step, ()) if extracted else step)()
                signs.append(optimizer.state[p]["momentum_buffer"].signbit().tolist())
            self.assertEqual(*signs)
            self.assertTrue(any(signs[0]))

    def test_lbfgs_is_refused(self) -> None:
        model = mlp()
        optimizer = torch.optim.LBFGS(model.parameters())
        x, y = mlp_inputs()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        with self.assertRaisesRegex(UnsupportedError, "LBFGS.*closure"):
            extract_compiled_graph(lambda: optimizer.step(closure), ())

    def test_memory(self) -> None:
        """The graph writes parameters and state in place: none of them is an output."""
        for optimizer in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad"):
            training = looped(plain, makeoptimizer(optimizer, "plain", {}))()
            graph = extract_compiled_graph(training.step, mlp_inputs())
            for _ in range(3):
                graph(*mlp_inputs())
            lowered = graph.specializations[0]._lowered
            self.assertIsNotNone(lowered.update, optimizer)
            kinds = [n.kind() for n in lowered.update.graph.nodes()]
            self.assertNotIn("aten::copy_", kinds, optimizer)


if __name__ == "__main__":
    unittest.main()
