# Owner(s): ["oncall: jit"]

"""An extracted graph trains: outputs, gradients, state and weights over optimizer steps."""

import copy
import unittest
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torch_lazy_ext import UnsupportedError, extract_compiled_graph


def loss_of(result: Any) -> Tensor:
    """A number that every differentiable part of the result has a share in."""
    leaves = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    return sum(t.pow(2).sum() * (k + 1) for k, t in enumerate(leaves))


def maketest(
    make: Callable[[], nn.Module],
    inputs: Callable[[], list[Tensor]],
    steps: int = 4,
    variants: int = 1,
) -> Callable[[unittest.TestCase], None]:
    """A test method: `steps` optimizer steps of a module and of the graph of its copy agree.

    All calls but those that capture must be answered by a graph, and `variants` of them suffice.
    """

    def test(self: unittest.TestCase) -> None:
        torch.manual_seed(0)
        module = make()
        oracle = copy.deepcopy(module)
        graph = extract_compiled_graph(module, inputs())
        optimizers = [
            torch.optim.SGD(list(m.parameters()) or [torch.zeros(1)], lr=0.1, momentum=0.9)
            for m in (oracle, module)
        ]
        for _ in range(steps):
            expected_args = inputs()
            args = [t.detach().clone().requires_grad_(t.requires_grad) for t in expected_args]
            rng = torch.get_rng_state()
            expected = oracle(*expected_args)
            rng_after = torch.get_rng_state()
            torch.set_rng_state(rng)
            actual = graph(*args)
            self.assertTrue(torch.equal(torch.get_rng_state(), rng_after))
            self.assertEqual(
                [t.requires_grad for t in pytree.tree_leaves(expected)],
                [t.requires_grad for t in pytree.tree_leaves(actual)],
            )
            torch.testing.assert_close(actual, expected)
            loss_of(expected).backward()
            loss_of(actual).backward()
            for want, got in zip(
                [*expected_args, *oracle.parameters()], [*args, *module.parameters()]
            ):
                self.assertEqual(want.grad is None, got.grad is None)
                if want.grad is not None:
                    torch.testing.assert_close(got.grad, want.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            torch.testing.assert_close(dict(module.state_dict()), dict(oracle.state_dict()))
        self.assertEqual(sum(s.hits for s in graph.specializations), steps)
        self.assertEqual(len(graph.specializations), variants)

    return test


def floats(*shapes: tuple[int, ...], requires_grad: bool = False) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(s, requires_grad=requires_grad) for s in shapes]


class Several(nn.Module):
    """Results with and without gradient, frozen and tied weights, a no_grad region."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.unseen = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.tied = self.first

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.first(x)
        with torch.no_grad():
            hidden = self.unseen(x)
        return {
            "y": y,
            "detached": self.frozen(y).detach(),
            "through frozen": self.frozen(y),
            "hidden": hidden,
            "tied": self.tied(y)[0],
            "count": (y > 0).sum(),
        }


class TimesThree(torch.autograd.Function):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return tangent * w * 3, tangent * x * 2


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return TimesThree.apply(x, self.w) + self.w


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda v: torch.tanh(self.linear(v)), x, use_reentrant=False
        )


class Views(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[0], x.t(), x * 2


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if x.sum() > 0 else y.exp()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.mul_(2).relu_()
        self.seen.add_(y.detach().mean(0))
        return y


def alternating() -> Callable[[], list[Tensor]]:
    calls = iter(range(100))
    return lambda: [torch.rand(2, 3) * (1 if next(calls) % 2 else -1)]


class TrainingTest(unittest.TestCase):
    test_mlp = maketest(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), floats((3, 4))
    )
    test_argument_gradients = maketest(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)),
        floats((3, 4), requires_grad=True),
    )
    test_conv_batch_norm_dropout = maketest(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(144, 2),
        ),
        floats((2, 3, 8, 8)),
    )
    test_attention = maketest(
        lambda: nn.MultiheadAttention(4, 2, dropout=0.1), floats((3, 2, 4), (3, 2, 4), (3, 2, 4))
    )
    test_encoder_layer = maketest(lambda: nn.TransformerEncoderLayer(8, 2, 16), floats((3, 2, 8)))
    test_several = maketest(Several, floats((2, 3)))
    test_custom_function = maketest(Custom, floats((2, 3), requires_grad=True))
    test_checkpoint = maketest(Checkpointed, floats((2, 3), requires_grad=True))
    test_views = maketest(Views, floats((2, 3), requires_grad=True))
    test_in_place = maketest(InPlace, floats((2, 3)))
    test_branch = maketest(Branch, alternating(), steps=6, variants=2)


class ModeTest(unittest.TestCase):
    def test_unused_output_leaves_none(self) -> None:
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        graph = extract_compiled_graph(lambda x: (a(x), b(x)), (torch.randn(2, 3),))
        graph(torch.randn(2, 3))[0].sum().backward()
        self.assertIsNotNone(a.weight.grad)
        self.assertIsNone(b.weight.grad)

    def test_grad_mode_of_the_call_decides(self) -> None:
        linear = nn.Linear(3, 3)
        x = torch.randn(2, 3)
        graph = extract_compiled_graph(linear, (x,))
        with torch.no_grad():
            self.assertFalse(graph(x).requires_grad)
        self.assertTrue(graph(x).requires_grad)
        linear.requires_grad_(False)
        self.assertFalse(graph(x).requires_grad)

    def test_gradients_accumulate_and_graphs_are_kept(self) -> None:
        linear = nn.Linear(3, 3)
        x = torch.randn(2, 3)
        y = extract_compiled_graph(linear, (x,))(x).sum()
        y.backward(retain_graph=True)
        y.backward()
        oracle = copy.deepcopy(linear)
        oracle.zero_grad()
        oracle(x).sum().backward()
        torch.testing.assert_close(linear.weight.grad, oracle.weight.grad * 2)

    def test_second_derivatives_are_refused(self) -> None:
        x = torch.randn(3, requires_grad=True)
        y = extract_compiled_graph(torch.tanh, (x,))(x)
        with self.assertRaisesRegex(UnsupportedError, "second derivatives"):
            torch.autograd.grad(y.sum(), x, create_graph=True)

    def test_random_backward_is_refused(self) -> None:
        def program(x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(
                torch.dropout, x, 0.5, True, use_reentrant=False
            )

        with self.assertRaises(UnsupportedError):
            extract_compiled_graph(program, (torch.randn(3, requires_grad=True),))


if __name__ == "__main__":
    unittest.main()
