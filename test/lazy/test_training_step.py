# Owner(s): ["oncall: jit"]

"""A whole training step is one graph: forward, backward and optimizer, equal to eager's bit for bit.

The oracle is a second copy of the same training that runs eagerly beside the graph, step after
step, in float64. After each step these must agree exactly: what the step returns, parameters,
buffers, gradients (also whether there is one), the state of the optimizers, and the random number
generator.
"""

import unittest
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_lazy_ext import CompiledGraph, extract_compiled_graph

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

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for k, model in enumerate(self.models):
            found |= {f"model {k}: {name}": t for name, t in model.state_dict().items()}
            for name, p in model.named_parameters():
                found[f"model {k}: gradient of {name}"] = p.grad
                found[f"model {k}: {name} requires grad"] = p.requires_grad
        for k, optimizer in enumerate(self.optimizers):
            paths, _ = pytree.tree_flatten_with_path(optimizer.state_dict())
            found |= {f"optimizer {k}: {pytree.keystr(path)}": leaf for path, leaf in paths}
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


Inputs = Callable[[], tuple[Tensor, ...]]


def check_training(
    test: unittest.TestCase,
    make: Callable[[], Training],
    inputs: Inputs,
    steps: int = STEPS,
    captures: int = 1,
) -> CompiledGraph:
    """Train `steps` steps with and without the graph; exactly `captures` variants serve them."""
    torch.manual_seed(0)
    oracle = make()
    torch.manual_seed(0)
    training = make()
    before = training.state()
    graph = extract_compiled_graph(training.step, inputs())
    test.assertEqual(difference(before, training.state()), "", "the extraction changed something")
    for i in range(steps):
        args = inputs()
        results, generators = [], []
        for side, step in ((oracle, oracle.step), (training, graph)):
            torch.manual_seed(i)
            results.append(step(*args))
            generators.append(torch.get_rng_state())
            side.after()
        test.assertEqual(difference(results[0], results[1]), "", f"results of step {i}")
        test.assertEqual(difference(oracle.state(), training.state()), "", f"after step {i}")
        test.assertTrue(torch.equal(*generators), f"random numbers after step {i}")
    test.assertEqual(sum(s.hits for s in graph.specializations), steps)
    test.assertEqual(len(graph.specializations), captures, graph.explain())
    return graph


def maketest(
    make: Callable[[], Training], inputs: Inputs, **options: Any
) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        check_training(self, make, inputs, **options)

    return test


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


Optimizers = Callable[[Any], torch.optim.Optimizer]


def supervised(
    make_model: Callable[[], nn.Module], make_optimizer: Optimizers
) -> Callable[[], Training]:
    """The training step of the tutorials."""

    def make() -> Training:
        model = make_model()
        optimizer = make_optimizer(model.parameters())

        def train_step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return Training(train_step, [model], [optimizer])

    return make


class PlainStepTest(TrainingTestCase):
    test_sgd = maketest(supervised(mlp, lambda p: torch.optim.SGD(p, lr=0.1)), mlp_inputs)
    # The first step makes the momentum buffers from its gradients.
    test_sgd_momentum = maketest(
        supervised(mlp, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        mlp_inputs,
        captures=2,
    )

    def test_second_backward(self) -> None:
        """A loss whose backward ran in the step says so, in eager's words."""
        messages = []
        for extracted in (False, True):
            torch.manual_seed(0)
            step = supervised(mlp, lambda p: torch.optim.SGD(p, lr=0.1))().step
            args = mlp_inputs()
            loss = (extract_compiled_graph(step, args) if extracted else step)(*args)
            with self.assertRaises(RuntimeError) as raised:
                loss.backward()
            messages.append(str(raised.exception))
        self.assertEqual(*messages)


if __name__ == "__main__":
    unittest.main()
