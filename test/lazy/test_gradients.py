# Owner(s): ["oncall: jit"]

"""An extracted graph trains: outputs, gradients, state and weights over optimizer steps."""

import contextvars
import copy
import itertools
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


class CustomByReference(nn.Module):
    """Has looked `apply` up before any capture."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.function = TimesThree.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda v: torch.tanh(self.linear(v)), x, use_reentrant=False
        )


class CheckpointedDropout(nn.Module):
    """The recomputation draws the masks of the forward again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.dropout = nn.Dropout(0.5)

    def block(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.dropout(self.linear(x))))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.utils.checkpoint.checkpoint(self.block, self.dropout(x), use_reentrant=False)
        second = torch.utils.checkpoint.checkpoint(self.block, x * 2, use_reentrant=False)
        return first * second + torch.rand(8)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = kind(3, 4, num_layers=2, dropout=0.2)

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


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
    test_custom_function_by_reference = maketest(
        CustomByReference, floats((2, 3), requires_grad=True)
    )
    test_checkpoint = maketest(Checkpointed, floats((2, 3), requires_grad=True))
    test_checkpoint_dropout = maketest(CheckpointedDropout, floats((2, 3), requires_grad=True))
    test_lstm = maketest(lambda: Recurrent(nn.LSTM), floats((5, 2, 3), requires_grad=True))
    test_gru = maketest(lambda: Recurrent(nn.GRU), floats((5, 2, 3)))
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

        def program(x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = a(x)
            return hidden, b(hidden)

        extract_compiled_graph(program, (torch.randn(2, 3),))(torch.randn(2, 3))[0].sum().backward()
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

    def test_results_are_ordinary_tensors_of_autograd(self) -> None:
        x = torch.randn(2, 3, requires_grad=True)
        graph = extract_compiled_graph(lambda x: (x.exp(), x * 2), (x,))

        exponential, double = graph(x)
        double.mul_(3)
        double.sum().backward()
        torch.testing.assert_close(x.grad, torch.full((2, 3), 6.0))

        exponential, double = graph(x)
        exponential.retain_grad()
        exponential.sum().backward()
        torch.testing.assert_close(exponential.grad, torch.ones(2, 3))
        with self.assertRaisesRegex(RuntimeError, "second time"):
            exponential.sum().backward()

        exponential, double = graph(x)
        exponential.add_(1)  # the backward of exp needs it
        with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
            exponential.sum().backward()

    def test_backward_of_other_strides(self) -> None:
        x = torch.randn(2, 3, requires_grad=True)
        graph = extract_compiled_graph(lambda x: (x * x).expand(4, 2, 3), (x,))
        tangent = torch.randn(3, 4, 2).permute(1, 2, 0)
        (gradient,) = torch.autograd.grad(graph(x), x, tangent)
        torch.testing.assert_close(gradient, 2 * x * tangent.sum(0))

        graph = extract_compiled_graph(lambda x: (x * 2).view(3, 2), (x,))
        tangent = torch.randn(2, 3).t()
        (gradient,) = torch.autograd.grad(graph(x), x, tangent)
        torch.testing.assert_close(gradient, 2 * tangent.reshape(2, 3))

    def test_random_backward_is_refused(self) -> None:
        def program(x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(
                torch.dropout, x, 0.5, True, use_reentrant=False, preserve_rng_state=False
            )

        with self.assertRaisesRegex(UnsupportedError, "draws random numbers"):
            extract_compiled_graph(program, (torch.randn(3, requires_grad=True),))

    def test_another_use_of_an_old_random_state(self) -> None:
        def draws_other_numbers() -> Tensor:
            state = torch.get_rng_state()
            a = torch.rand(2)
            torch.set_rng_state(state)
            return a + torch.randn(2)

        def ends_before() -> Tensor:
            with torch.random.fork_rng(devices=[]):
                return torch.rand(2)

        for program in (draws_other_numbers, ends_before):
            with self.subTest(program.__name__):
                graph = extract_compiled_graph(program, ())
                for seed in range(3):
                    torch.manual_seed(seed)
                    expected, state = program(), torch.get_rng_state()
                    torch.manual_seed(seed)
                    self.assertTrue(torch.equal(graph(), expected))
                    self.assertTrue(torch.equal(torch.get_rng_state(), state))


def one_by_one(
    fn: Callable[[Tensor], tuple[Tensor, ...]], steps: tuple[tuple[int, bool], ...]
) -> tuple[str, Tensor | None]:
    """The gradient after a backward for each (result, retain_graph), and the error that ends it."""
    x = torch.linspace(0.1, 2, 6).view(2, 3).requires_grad_()
    y = x.expand(2, 2, 3)  # an argument with a history
    results = fn(y)
    error = ""
    try:
        for k, retain in steps:
            results[k].sum().backward(retain_graph=retain)
    except RuntimeError as e:
        error = str(e)
    return error, x.grad


class SeparateBackwardTest(unittest.TestCase):
    """Backward of some results of a call, or of one after the other."""

    def check(self, program: Callable[[Tensor], tuple[Tensor, ...]], ends: int) -> None:
        """`ends`: in how many cases eager does not raise."""
        graph = extract_compiled_graph(program, (torch.randn(2, 2, 3, requires_grad=True) * 2,))
        count = 0
        for order in ((0, 1), (1, 0), (0, 0), (1, 1), (0, 1, 0)):
            for retained in itertools.product((False, True), repeat=len(order)):
                steps = tuple(zip(order, retained))
                with self.subTest(steps=steps):
                    want, want_grad = one_by_one(program, steps)
                    got, got_grad = one_by_one(graph, steps)
                    self.assertEqual(got, want)
                    torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=0)
                    count += not want
        self.assertEqual(count, ends)

    def test_independent(self) -> None:
        self.check(lambda x: (x.exp(), x * 2), 16)

    def test_shared(self) -> None:
        def program(x: Tensor) -> tuple[Tensor, ...]:
            hidden = x.tanh()
            return hidden.exp(), hidden.sin()

        self.check(program, 10)

    def test_one_leads_to_the_other(self) -> None:
        def program(x: Tensor) -> tuple[Tensor, ...]:
            hidden = x.exp()
            return hidden, hidden.sin()

        self.check(program, 10)

    def test_nothing_is_kept(self) -> None:
        self.check(lambda x: (x + 1, x.neg()), 24)

    def test_shared_parameters(self) -> None:
        linear = nn.Linear(3, 3)
        self.check(lambda x: (linear(x), linear(x).relu()), 16)

    def test_cast_is_shared(self) -> None:
        linear = nn.Linear(3, 3)

        def program(x: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", dtype=torch.bfloat16):  # which casts the weight once
                return linear(x), linear(x).relu()

        self.check(program, 16)

    def test_three_of_which_two_share(self) -> None:
        def program(x: Tensor) -> tuple[Tensor, ...]:
            hidden = x + 1
            other = hidden.tanh()
            return hidden.exp(), hidden.sin() + other.exp(), other.sin()

        self.check(program, 16)
        graph = extract_compiled_graph(program, (torch.randn(2, 2, 3, requires_grad=True) * 2,))
        for order in itertools.permutations(range(3)):
            steps = tuple((k, False) for k in order)
            want, want_grad = one_by_one(program, steps)
            got, got_grad = one_by_one(graph, steps)
            self.assertEqual(got, want)
            torch.testing.assert_close(got_grad, want_grad, rtol=0, atol=0)

    def test_written_to_between_two_backwards(self) -> None:
        def program(x: Tensor) -> tuple[Tensor, ...]:
            hidden = x + 1
            return hidden.exp(), hidden.sin()

        graph = extract_compiled_graph(program, (torch.randn(3, requires_grad=True),))
        for fn in (program, graph):
            first, second = fn(torch.randn(3, requires_grad=True))
            second.sum().backward()
            first.detach().add_(1)
            with self.assertRaisesRegex(RuntimeError, "modified by an inplace operation"):
                first.sum().backward()

    def test_only_a_sum_is_shared(self) -> None:
        def program(x: Tensor) -> tuple[Tensor, ...]:
            hidden = x + 1
            return hidden.exp(), hidden.sin()

        self.check(program, 16)

    def check_some(self, program: Callable[..., Any], orders: int = 1) -> None:
        """The gradient of the first result at zero, where that of the second is infinite."""
        example = torch.rand(3, dtype=torch.float64, requires_grad=True)
        graph = extract_compiled_graph(program, (example,))
        found = []
        for fn in (program, graph, graph):
            x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            value = fn(x)[0]
            for _ in range(orders):
                (value,) = torch.autograd.grad(value.sum(), x, create_graph=orders > 1)
            found.append(value)
            self.assertFalse(value.isnan().any())
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
        torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)

    def test_zero_is_not_nothing(self) -> None:
        def shared(x: Tensor) -> tuple[Tensor, ...]:
            hidden = x + 0
            return hidden.exp() * 2, hidden.sqrt()

        self.check_some(shared)
        self.check_some(shared, orders=2)
        self.check_some(lambda x: (x.exp() * 2, x.sqrt()))

    def test_nan_of_its_own(self) -> None:
        def program(x: Tensor) -> tuple[Tensor, ...]:
            hidden = x + 0
            return hidden.sqrt() * 0, hidden * 2

        graph = extract_compiled_graph(program, (torch.rand(3, requires_grad=True),))
        x = torch.zeros(3, requires_grad=True)
        graph(x)[0].sum().backward()
        self.assertTrue(x.grad.isnan().all())

    def test_zero_instead_of_nothing_is_refused(self) -> None:
        class Counts(nn.Module):
            calls = 0

            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                self.calls += 1
                hidden = x + 0
                return hidden * 2, hidden.sqrt()

        graph = extract_compiled_graph(Counts(), (torch.rand(3, requires_grad=True),))
        x = torch.zeros(3, requires_grad=True)
        with self.assertRaisesRegex(UnsupportedError, "zeros as the gradients of the others"):
            graph(x)[0].sum().backward()


class WriteTest(unittest.TestCase):
    """Results that require grad are written to what the program was given."""

    def check(self, program: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        """The last argument is written to, and requires no grad at first; `w` does."""
        w = torch.randn(3, requires_grad=True)

        def run(fn: Callable[..., Any], seed: int) -> list[Tensor]:
            torch.manual_seed(seed)
            x = torch.randn(2, 3, requires_grad=True)
            out = torch.randn(2, 3)
            result = fn(x * 2, w, out)
            self.assertTrue(out.requires_grad)
            self.assertFalse(out.is_leaf)
            loss = out.pow(2).sum() + (0 if result is None else result.sum())
            return [out, *torch.autograd.grad(loss, [x, w])]

        graph = extract_compiled_graph(program, (torch.randn(2, 3), w, torch.randn(2, 3)))
        for seed in range(3):
            torch.testing.assert_close(run(graph, seed), run(program, seed))
        self.assertEqual(sum(s.hits for s in graph.specializations), 3)

    def test_copy(self) -> None:
        def program(x: Tensor, w: Tensor, out: Tensor) -> None:
            out.copy_(x * w)

        self.check(program)

    def test_in_place(self) -> None:
        def program(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
            out.mul_(w).add_(x.tanh())
            return out * x

        self.check(program)

    def test_part(self) -> None:
        def program(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
            out[0] = x[1] * w
            return out

        self.check(program)

    def test_argument_with_a_history(self) -> None:
        def program(x: Tensor) -> Tensor:
            x.mul_(3)
            return x.exp()

        graph = extract_compiled_graph(program, (torch.randn(3, requires_grad=True) * 2,))
        for _ in range(3):
            leaf = torch.randn(3, requires_grad=True)
            found = []
            for fn in (program, graph):
                x = leaf * 2
                (gradient,) = torch.autograd.grad(fn(x).sum() + x.sum(), leaf)
                found.append(gradient)
            torch.testing.assert_close(found[1], found[0])

    def test_state(self) -> None:
        """A buffer that keeps its history: gradients reach through several calls."""

        class Cell(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 3)
                self.register_buffer("state", torch.zeros(3))

            def forward(self, x: Tensor) -> Tensor:
                self.state = torch.tanh(self.linear(x) + self.state)
                return self.state

        module = Cell()
        oracle = copy.deepcopy(module)
        inputs = torch.randn(4, 3)
        graph = extract_compiled_graph(module, (inputs[0],))
        for fn in (oracle, graph):
            sum(fn(x).sum() for x in inputs).backward()
        torch.testing.assert_close(module.linear.weight.grad, oracle.linear.weight.grad)


class HookTest(unittest.TestCase):
    """Hooks fire as in eager, or are refused."""

    def test_hooks_on_arguments_parameters_and_results(self) -> None:
        linear = nn.Linear(3, 3)
        graph = extract_compiled_graph(linear, (torch.randn(2, 3, requires_grad=True),))
        seen: list[list[Tensor]] = []
        for fn in (linear, graph, graph):
            torch.manual_seed(0)
            linear.zero_grad()
            seen.append([])
            x = torch.randn(2, 3, requires_grad=True)
            y = fn(x)
            hooks = [t.register_hook(seen[-1].append) for t in (x, linear.weight, y)]
            hooks.append(x.register_hook(lambda g: g * 2))
            hooks.append(
                linear.bias.register_post_accumulate_grad_hook(
                    lambda p, s=seen[-1]: s.append(p.grad.clone())
                )
            )
            y.sum().backward()
            seen[-1].append(x.grad)
            for hook in hooks:
                hook.remove()
        self.assertEqual(len(seen[0]), 5)
        for other in seen[1:]:
            torch.testing.assert_close(sorted(other, key=str), sorted(seen[0], key=str))

    def test_hooks_before_the_capture(self) -> None:
        w = torch.randn(3, requires_grad=True)
        calls: list[Tensor] = []

        def hook(gradient: Tensor) -> Tensor:
            calls.append(gradient)
            return gradient * 10

        w.register_hook(hook)
        graph = extract_compiled_graph(lambda x: TimesThree.apply(x, w), (torch.randn(3),))
        self.assertEqual(calls, [])
        x = torch.randn(3)
        graph(x).sum().backward()
        self.assertEqual(len(calls), 1)
        torch.testing.assert_close(w.grad, 20 * x)

    def check_module(self, register: Callable[[nn.Module], Any]) -> None:
        """`register` puts hooks on a module before it is captured."""

        def make() -> nn.Module:
            module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            register(module)
            return module

        maketest(make, floats((2, 3), requires_grad=True))(self)

    def test_forward_hooks(self) -> None:
        self.check_module(lambda m: m[0].register_forward_hook(lambda _m, _a, y: y * 2))
        self.check_module(lambda m: m[1].register_forward_pre_hook(lambda _m, a: (a[0] + 1,)))

    def test_full_backward_hooks(self) -> None:
        self.check_module(
            lambda m: m[0].register_full_backward_hook(lambda _m, gi, _go: (gi[0] * 3,))
        )
        self.check_module(lambda m: m[2].register_full_backward_pre_hook(lambda _m, g: (g[0] * 2,)))

    def test_hook_on_an_intermediate(self) -> None:
        def double(_module: nn.Module, _args: Any, y: Tensor) -> None:
            y.register_hook(lambda g: g * 2)

        self.check_module(lambda m: m[0].register_forward_hook(double))

    def test_hook_that_notes_what_it_sees_is_refused(self) -> None:
        noted: list[Tensor] = []

        def program(x: Tensor) -> Tensor:
            y = x * 2
            y.register_hook(noted.append)
            return y.exp()

        with self.assertRaisesRegex(UnsupportedError, "hook"):
            extract_compiled_graph(program, (torch.randn(3, requires_grad=True),))
        self.assertEqual(noted, [])

    def test_hook_registered_after_the_capture(self) -> None:
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        x = torch.randn(2, 3, requires_grad=True)
        graph = extract_compiled_graph(module, (x,))
        (plain,) = torch.autograd.grad(graph(x).sum(), x)
        handle = module[0].register_full_backward_hook(lambda _m, gi, _go: (gi[0] * 3,))
        (hooked,) = torch.autograd.grad(graph(x).sum(), x)
        torch.testing.assert_close(hooked, plain * 3)
        handle.remove()
        (again,) = torch.autograd.grad(graph(x).sum(), x)
        torch.testing.assert_close(again, plain)


RATE = 2.0
LEVEL: contextvars.ContextVar[float] = contextvars.ContextVar("LEVEL", default=2.0)


def set_rate(value: float) -> None:
    global RATE
    RATE = value


class Held:
    """What a hook, or the backward of a custom function, reads."""

    factor = 2.0

    def __init__(self) -> None:
        self.scale = 2.0
        self.other = 1.0
        self.items = [1.0, 2.0]
        self.table = {"k": 3.0}
        self.weight = torch.full((2,), 2.0)
        self.kept: Any = None
        self.block = nn.Sequential(Sine())


class Sine(nn.Module):
    scale = 2.0

    def forward(self, x):
        return (x * self.scale if self.training else x + 1).sin()


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.held.scale, None


class ReadInBackwardTest(unittest.TestCase):
    """A backward reads Python as the call has left it; what was changed since is refused."""

    def test_item_of_an_argument(self) -> None:
        def program(x, options):
            y = x * 2
            y.register_hook(lambda g: g * options["scale"] * options["list"][0])
            return y * 3

        changes: tuple[tuple[Callable[[Any], Any], bool], ...] = (
            (lambda options: options.update(other=5.0), False),
            (lambda options: options.update(scale=5.0), True),
            (lambda options: options["list"].insert(0, 5.0), True),
            (lambda options: options.pop("scale"), True),
        )

        def called(fn: Any) -> tuple[Tensor, dict[str, Any], Tensor]:
            x = torch.ones(2, requires_grad=True)
            options = {"scale": 2.0, "other": 1.0, "list": [3.0]}
            return x, options, fn(x, options).sum()

        graph = extract_compiled_graph(program, called(lambda *args: args[0])[:2])
        for change, refused in changes:
            for fn in (program, graph):
                x, options, loss = called(fn)
                if fn is graph:
                    change(options)
                if fn is graph and refused:
                    self.assertRaisesRegex(UnsupportedError, "was changed", loss.backward)
                else:
                    loss.backward()
                    self.assertEqual(x.grad.tolist(), [36.0, 36.0])


# How the program computes, what it does to what it holds, what is changed after the call, and
# whether the backward reads that.
READS: dict[str, tuple[Any, Any, Any, bool]] = {
    "attribute": ("custom", None, lambda held: setattr(held, "scale", 5.0), True),
    "attribute_that_it_does_not_read": (
        "custom",
        None,
        lambda held: setattr(held, "other", 5.0),
        False,
    ),
    "attribute_of_the_forward": (
        "forward",
        None,
        lambda held: setattr(held, "other", held.other + 1),
        False,
    ),
    "class_attribute": (
        lambda g, held: g * held.factor,
        None,
        lambda _held: setattr(Held, "factor", 5.0),
        True,
    ),
    "global": (lambda g, _held: g * RATE, None, lambda _held: set_rate(5.0), True),
    "context_variable": (lambda g, _held: g * LEVEL.get(), None, lambda _h: LEVEL.set(5.0), True),
    "item": (
        lambda g, held: g * held.items[0],
        None,
        lambda held: held.items.__setitem__(0, 5.0),
        True,
    ),
    "count": (lambda g, held: g * len(held.items), None, lambda held: held.items.append(5.0), True),
    "value_of_a_key": (
        lambda g, held: g * held.table["k"],
        None,
        lambda held: held.table.update(k=5.0),
        True,
    ),
    "tensor_in_its_place": (
        lambda g, held: g * held.weight,
        None,
        lambda held: setattr(held, "weight", torch.full((2,), 5.0)),
        True,
    ),
    "mode_of_a_checkpoint": ("checkpoint", None, lambda held: held.block.eval(), True),
    "attribute_of_a_checkpoint": (
        "checkpoint",
        None,
        lambda held: setattr(held.block[0], "scale", 5.0),
        True,
    ),
    "written_attribute": (
        lambda g, held: g * held.scale,
        lambda held, _x: setattr(held, "scale", 7.0),
        None,
        False,
    ),
    "written_global_and_items": (
        lambda g, held: g * RATE * LEVEL.get() * held.items[0] * len(held.table),
        lambda held, _x: (
            set_rate(3.0),
            LEVEL.set(4.0),
            held.items.insert(0, 5.0),
            held.table.update(m=1.0),
        ),
        None,
        False,
    ),
    "written_and_changed": (
        lambda g, _held: g * LEVEL.get(),
        lambda _held, _x: LEVEL.set(4.0),
        lambda _held: LEVEL.set(5.0),
        True,
    ),
    "written_tensor": (
        lambda g, held: g * held.kept,
        lambda held, x: setattr(held, "kept", x.detach() * 2),
        None,
        False,
    ),
    "written_tensor_and_changed": (
        lambda g, held: g * held.kept,
        lambda held, x: setattr(held, "kept", x.detach() * 2),
        lambda held: setattr(held, "kept", torch.ones(2)),
        True,
    ),
    "written_list": (
        lambda g, held: g * held.kept[1],
        lambda held, x: setattr(held, "kept", [x.detach(), 3.0]),
        None,
        False,
    ),
    "written_list_and_changed": (
        lambda g, held: g * held.kept[1],
        lambda held, x: setattr(held, "kept", [x.detach(), 3.0]),
        lambda held: setattr(held, "kept", [1.0, 5.0]),
        True,
    ),
    "written_item_and_changed": (
        lambda g, held: g * held.items[-1],
        lambda held, x: held.items.append(x.detach() * 2),
        lambda held: held.items.__setitem__(-1, 5.0),
        True,
    ),
}


def _reads(hook: Any, write: Any, change: Any, refused: bool) -> Callable[..., None]:
    def test(self: unittest.TestCase) -> None:
        held = Held()

        def program(x):
            if hook == "custom":
                y = Scaled.apply(x, held)
            elif hook == "forward":
                y = Scaled.apply(x * held.other, held)
            elif hook == "checkpoint":
                y = torch.utils.checkpoint.checkpoint(held.block, x, use_reentrant=False)
            else:
                y = x * 2
                y.register_hook(lambda g: hook(g, held))
            if write is not None:
                write(held, x)
            return y * 3

        def gradient(fn: Any, after: Any) -> Tensor | None:
            # Containers stay the same objects, or a graph would be another one for each call.
            Held.factor = 2.0
            set_rate(2.0)
            LEVEL.set(2.0)
            vars(held).update(scale=2.0, other=1.0, kept=None, weight=weight)
            held.items[:] = [1.0, 2.0]
            held.table.clear()
            held.table.update(k=3.0)
            held.block.train()
            held.block[0].scale = 2.0
            x = torch.tensor([1.0, 2.0], requires_grad=True)
            result = fn(x)
            if after is not None:
                after(held)
            try:
                result.sum().backward()
            except UnsupportedError as e:
                self.assertRegex(str(e), r"read of Python \(.*test_gradients.py:\d+\) was changed")
                return None
            return x.grad

        def run() -> None:
            graph = extract_compiled_graph(program, (torch.ones(2, requires_grad=True),))
            for after in (None, change, change, None):
                found = gradient(graph, after)
                if refused and after is not None:
                    self.assertIsNone(found)
                    self.assertFalse(torch.equal(gradient(program, after), gradient(program, None)))
                else:
                    expected = gradient(program, after)
                    assert found is not None and expected is not None
                    self.assertTrue(torch.equal(found, expected), f"{found} != {expected}")

        weight = held.weight
        self.addCleanup(set_rate, RATE)
        self.addCleanup(setattr, Held, "factor", Held.factor)
        contextvars.copy_context().run(run)

    return test


for _name, _row in READS.items():
    setattr(ReadInBackwardTest, f"test_{_name}", _reads(*_row))


def second_derivatives(fn: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a gradient penalty, with respect to `inputs`, and the first gradients."""
    first = torch.autograd.grad(fn().pow(2).sum(), inputs, create_graph=True, allow_unused=True)
    penalty = sum(g.pow(2).sum() for g in first if g is not None)
    return [*first, *torch.autograd.grad(penalty, inputs, allow_unused=True)]


class SecondDerivativeTest(unittest.TestCase):
    def check(self, make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        module = make().double()
        oracle = copy.deepcopy(module)
        example = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        graph = extract_compiled_graph(module, example)
        for _ in range(3):
            args = [torch.randn_like(a, requires_grad=True) for a in example]
            state = torch.get_rng_state()
            expected = second_derivatives(lambda: oracle(*args), [*args, *oracle.parameters()])  # noqa: B023
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            actual = second_derivatives(lambda: graph(*args), [*args, *module.parameters()])  # noqa: B023
            self.assertTrue(torch.equal(torch.get_rng_state(), after))
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(dict(module.named_buffers()), dict(oracle.named_buffers()))
        self.assertEqual(sum(s.hits for s in graph.specializations), 3)

    def test_mlp(self) -> None:
        self.check(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softplus()),
            (2, 3),
        )

    def test_conv_net(self) -> None:
        def make() -> nn.Module:
            layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.AvgPool2d(2)]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 2))

        self.check(make, (2, 2, 6, 6))

    def test_attention(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(4, 2)
                self.norm = nn.LayerNorm(4)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x + self.attention(x, x, x)[0])

        self.check(Attention, (3, 2, 4))

    def test_dropout(self) -> None:
        self.check(
            lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2)),
            (2, 3),
        )

    def test_custom_function(self) -> None:
        self.check(Custom, (2, 3))

    def test_regions_without_gradient(self) -> None:
        class Detached(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    scale = x.exp()
                return x.pow(3) * scale + x.pow(2) * x.detach()

        self.check(Detached, (2, 3))

    def test_gradgradcheck(self) -> None:
        programs = [
            lambda x, y: (x.sin() * y).sum(0),
            lambda x, y: torch.nn.functional.softmax(x @ y.t(), 1),
            lambda x, y: (x.pow(3), (x * y).cumsum(1)),
            lambda x, y: torch.nn.functional.layer_norm(x, (3,), y[0], y[1]),
            lambda x, y: torch.where(x > y, x * y, x.exp()),
        ]
        torch.manual_seed(0)
        x, y = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        for k, program in enumerate(programs):
            with self.subTest(program=k):
                graph = extract_compiled_graph(program, (x, y))
                self.assertTrue(torch.autograd.gradcheck(graph, (x, y)))
                self.assertTrue(torch.autograd.gradgradcheck(graph, (x, y)))

    def test_third_derivative(self) -> None:
        x = torch.randn(3, dtype=torch.float64, requires_grad=True)
        graph = extract_compiled_graph(lambda x: x.pow(4) + x.exp(), (x,))
        found = graph(x)
        for _ in range(3):
            (found,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        torch.testing.assert_close(found, 24 * x + x.exp())

    def test_data_dependence(self) -> None:
        def program(x: Tensor) -> Tensor:
            return x.pow(3) if x.sum() > 0 else x.pow(4)

        x = torch.ones(3, dtype=torch.float64)
        graph = extract_compiled_graph(program, (x.clone().requires_grad_(),))
        for value in (2.0, -2.0, 3.0, -3.0):
            leaf = (x * value).requires_grad_()
            (first,) = torch.autograd.grad(graph(leaf).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), leaf)
            torch.testing.assert_close(second, 6 * leaf if value > 0 else 12 * leaf.pow(2))

    def test_tensor_written_to_in_between_is_refused(self) -> None:
        w = torch.randn(3, requires_grad=True)
        graph = extract_compiled_graph(lambda x: (x * w).exp(), (torch.randn(3),))
        y = graph(torch.randn(3))
        with torch.no_grad():
            w.mul_(2)
        with self.assertRaisesRegex(UnsupportedError, "modified by an in-place operation"):
            torch.autograd.grad(y.sum(), w, create_graph=True)

    def test_state_that_moves_on_is_refused(self) -> None:
        class Counts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 3)
                self.calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return self.linear(x).exp() * self.calls

        class Mutates(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("scale", torch.ones(3))

            def forward(self, x: Tensor) -> Tensor:
                self.scale.mul_(2)
                return x.pow(2) * self.scale

        x = torch.randn(2, 3, requires_grad=True)
        for make, message in ((Counts, "changes attributes"), (Mutates, "in-place operation")):
            with self.subTest(make.__name__):
                graph = extract_compiled_graph(make(), (x,))
                with self.assertRaisesRegex(UnsupportedError, message):
                    torch.autograd.grad(graph(x).sum(), x, create_graph=True)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


class OptimizerTest(unittest.TestCase):
    """An optimizer outside of the graph steps the user's own parameters."""

    def check(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        oracle = copy.deepcopy(module)
        graph = extract_compiled_graph(module, (torch.randn(3, 4),))
        pairs = [(oracle, make(list(oracle.parameters())))]
        pairs.append((graph, make(list(module.parameters()))))
        for _ in range(6):
            x, y = torch.randn(3, 4), torch.randn(3, 2)

            def closure(fn: Any, optimizer: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(fn(x), y)
                loss.backward()
                return loss

            losses = [o.step(lambda fn=fn, o=o, c=closure: c(fn, o)).detach() for fn, o in pairs]
            torch.testing.assert_close(losses[1], losses[0])
            torch.testing.assert_close(
                dict(module.named_parameters()), dict(oracle.named_parameters())
            )
        self.assertEqual(len(graph.specializations), 1)

    def test_LBFGS(self) -> None:
        self.check(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4))


def make_optimizer_test(make: Any) -> Callable[[OptimizerTest], None]:
    return lambda self: self.check(make)


for _name, _make in OPTIMIZERS.items():
    setattr(OptimizerTest, f"test_{_name}", make_optimizer_test(_make))


if __name__ == "__main__":
    unittest.main()
