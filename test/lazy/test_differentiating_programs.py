# Owner(s): ["oncall: jit"]

"""Whole programs that differentiate: inner loops, adversaries, custom operators, torch.autograd's API."""

import copy
import unittest
from typing import Any

import torch
from test_gradients_inside import (
    Program,
    call,
    check,
    floats,
    history,
    linear,
    maketest,
    seen,
    stateless,
    written_to,
)
from torch import Tensor, nn
from torch.autograd import functional

from torch_lazy_ext import UnsupportedError, extract_compiled_graph


@torch.library.custom_op("torch_lazy_ext_test_gradients::scaled", mutates_args=())
def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


@scaled.register_fake
def _scaled(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def _scaled_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.factor = inputs[1]
    ctx.save_for_backward(inputs[0])


def _scaled_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return g * ctx.factor + x.sum(), None  # not the derivative: nobody may find it by himself


scaled.register_autograd(_scaled_backward, setup_context=_scaled_setup)


@torch.library.custom_op("torch_lazy_ext_test_gradients::squared", mutates_args=())
def squared(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() ** 2)


squared.register_autograd(
    lambda ctx, g: g * 3 * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Picky(torch.autograd.Function):
    """Computes only the gradients that are asked for, and has an output without any."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x * w, x.argmax()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        x, w = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return g * w if wanted[0] else None, (g * x).sum(0) if wanted[1] else None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


def twice(fn: Program, args: tuple[Any, ...]) -> Any:
    """The first gradients, with a history, and the second ones or the error instead."""
    (g,) = torch.autograd.grad(fn(*args).sum(), args, create_graph=True)
    told = [g.requires_grad, g.detach().clone()]
    try:
        g.sum().backward()
    except RuntimeError as e:
        return [*told, str(e)]
    return [*told, seen(args)]


class CustomTest(unittest.TestCase):
    """Custom operators and functions, whose backwards are Python."""

    test_operator = maketest(stateless(lambda x: scaled(x, 3.0).exp()), floats((3,), leaf=True))
    test_operator_on_a_parameter = maketest(
        linear(lambda m, x: scaled(m.weight, 3.0) @ x), floats((3, 2), leaf=True)
    )
    test_operator_without_a_fake = maketest(
        stateless(lambda x: squared(x * 2)), floats((3,), leaf=True)
    )
    test_operator_inside = maketest(
        linear(lambda m, x: torch.autograd.grad(squared(m(x)).sum(), m.weight)), floats((2, 3))
    )
    test_function = maketest(linear(lambda m, x: Picky.apply(x, m.bias)), floats((2, 3)))
    test_function_of_a_leaf = maketest(
        linear(lambda m, x: Picky.apply(x, m.bias)), floats((2, 3), leaf=True)
    )
    test_once_differentiable = maketest(stateless(Once.apply), floats((3,), leaf=True), twice)


class InterfaceTest(unittest.TestCase):
    """torch.autograd's own functions, inside."""

    test_jacobian = maketest(
        linear(lambda m, x: functional.jacobian(lambda v: m(v).exp(), x)), floats((3,))
    )
    test_hessian = maketest(
        linear(lambda m, x: functional.hessian(lambda v: m(v).exp().sum(), x)), floats((3,))
    )
    test_vjp = maketest(
        linear(lambda m, x: functional.vjp(lambda v: m(v).exp().sum(), x)), floats((3,))
    )
    test_jvp = maketest(
        stateless(lambda x: functional.jvp(torch.sin, x, torch.ones_like(x))), floats((3,))
    )
    test_differentiable_vhp = maketest(
        linear(
            lambda m, x: functional.vhp(
                lambda v: m(v).exp().sum(), x, x.detach(), create_graph=True
            )
        ),
        floats((3,), leaf=True),
    )
    test_batched = maketest(
        linear(
            lambda m, x: torch.autograd.grad(
                m(x).exp(), m.weight, torch.eye(3), is_grads_batched=True
            )
        ),
        floats((3,)),
    )
    test_of_a_parameter_itself = maketest(
        linear(lambda m, x: torch.autograd.grad(m.bias, m.bias, x)), floats((3,))
    )
    test_backward_of_parameters = maketest(
        linear(
            lambda m, x: (
                m.zero_grad(),
                m.weight.sum().backward(),
                torch.autograd.backward(m.bias, x),
                m.bias.grad.clone(),
            )[-1]
        ),
        floats((3,)),
        call,
    )
    test_several_with_tangents = maketest(
        linear(
            lambda m, x: (
                m.zero_grad(),
                torch.autograd.backward([m(x), m(x).sum()], [x, None]),
                m.bias.grad.clone(),
            )[-1]
        ),
        floats((2, 3)),
        call,
    )
    test_twice_through_one_history = maketest(
        linear(
            lambda m, x: (
                m.zero_grad(),
                y := m(x),
                y.sum().backward(retain_graph=True),
                y.exp().sum().backward(),
                m.weight.grad.clone(),
            )[-1]
        ),
        floats((2, 3)),
        call,
    )
    test_grad_fn = maketest(
        linear(
            lambda m, x: (
                x
                * (2 if m.weight.grad_fn is None and x.grad_fn is not None else 3)
                * len(m(x).grad_fn.next_functions)
            )
        ),
        history((2, 3)),
    )
    test_retained_inside = maketest(
        stateless(
            lambda x: (h := x * 2, h.retain_grad(), h.exp().sum().backward(), h.grad.clone())[-1]
        ),
        floats((3,), leaf=True),
        call,
        captures=2,
    )


def adversaries() -> tuple[Program, Any]:
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (generator, critic)]

    def program(z: Tensor, x: Tensor) -> Tensor:
        critic.requires_grad_(True)
        steps[1].zero_grad()
        (critic(x).mean() - critic(generator(z).detach()).mean()).backward()
        steps[1].step()
        critic.requires_grad_(False)
        steps[0].zero_grad()
        loss = critic(generator(z)).mean()
        loss.backward()
        steps[0].step()
        critic.requires_grad_(True)
        return loss.detach()

    return program, [generator, critic]


def by_hand() -> tuple[Program, Any]:
    module = nn.Linear(3, 3)

    def program(x: Tensor) -> Tensor:
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(module(x).pow(2).sum(), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                p.sub_(0.1 * g)
        return gradients[0].norm()

    return program, module


def enabled() -> tuple[Program, Any]:
    program, module = by_hand()
    return torch.enable_grad()(program), module


def averaged() -> tuple[Program, Any]:
    module = nn.Linear(3, 3)
    average = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)

    def program(x: Tensor) -> Any:
        optimizer.zero_grad()
        loss = module(x).pow(2).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(average.parameters(), module.parameters()):
                a.lerp_(b, 0.1)
        return loss.detach(), norm

    return program, [module, average]


def adapted() -> tuple[Program, Any]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def program(x: Tensor) -> Tensor:
        parameters = dict(module.named_parameters())
        for _ in range(2):
            loss = torch.func.functional_call(module, parameters, (x,)).pow(2).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            parameters = {k: p - 0.1 * g for (k, p), g in zip(parameters.items(), gradients)}
        return torch.func.functional_call(module, parameters, (x,)).pow(2).sum()

    return program, module


def fitted(x: Tensor) -> Tensor:
    """Trains a leaf of its own."""
    w = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([w], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (w - x).pow(2).sum().backward()
        optimizer.step()
    return w.detach()


def of_a_copy() -> tuple[Program, Any]:
    module = nn.Linear(3, 3)

    def program(x: Tensor) -> Any:
        other = copy.deepcopy(module)
        other(x).pow(2).sum().backward()
        return [p.grad.clone() for p in other.parameters()]

    return program, module


def tied() -> tuple[Program, Any]:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    module[0].weight.register_hook(lambda g: g * 2)

    def program(x: Tensor) -> Tensor:
        module.zero_grad()
        module(x).sum().backward()
        return module[1].weight.grad.clone()

    return program, module


class TrainingTest(unittest.TestCase):
    test_adversaries = maketest(adversaries, floats((2, 2), (2, 3)), call, captures=2)
    test_steps_by_hand = maketest(by_hand, floats((2, 3)), call)
    test_averaged_weights = maketest(averaged, floats((2, 3)), call)
    test_adapted_weights = maketest(adapted, floats((2, 3)))
    test_leaf_of_its_own = maketest(stateless(fitted), floats((3,)), call)
    test_deepcopy = maketest(of_a_copy, floats((2, 3)), call)
    test_tied_with_a_hook = maketest(tied, floats((2, 3)), call)
    test_enabled_in_no_grad = maketest(enabled, floats((2, 3)), call, context=torch.no_grad)

    def test_hook_that_writes_to_its_gradient(self) -> None:
        def make() -> tuple[Program, Any]:
            module = nn.Linear(3, 3)

            def hook(gradient: Tensor) -> None:
                gradient.mul_(2)

            module.weight.register_hook(hook)

            def program(x: Tensor) -> Tensor:
                module.zero_grad()
                module(x).sum().backward()
                return module.weight.grad.clone()

            return program, module

        check(make, floats((2, 3)), call)

    def test_error_of_a_hook_that_the_program_catches(self) -> None:
        def make() -> tuple[Program, Any]:
            module = nn.Linear(3, 3)

            def hook(gradient: Tensor) -> None:
                raise KeyError("enough")

            module.weight.register_hook(hook)

            def program(x: Tensor) -> Tensor:
                module.zero_grad()
                try:
                    module(x).sum().backward()
                except KeyError:
                    return x * 5
                return x

            return program, module

        check(make, floats((2, 3)), call)

    def test_a_graph_behind_a_graph(self) -> None:
        modules = [nn.Linear(3, 3), nn.Linear(3, 3)]
        graphs = [
            extract_compiled_graph(modules[0], (torch.ones(2, 3),)),
            extract_compiled_graph(modules[1], (torch.ones(2, 3, requires_grad=True) * 2,)),
        ]
        parameters = [p for m in modules for p in m.parameters()]
        for _ in range(3):
            x = torch.randn(2, 3)
            want, got = (
                torch.autograd.grad(second(first(x)).pow(2).sum(), parameters)
                for first, second in (modules, graphs)
            )
            self.assertTrue(all(map(torch.equal, want, got)))


class ViewsTest(unittest.TestCase):
    """Views as arguments and as results."""

    test_split = maketest(stateless(lambda x: (x * 2).split(1)), floats((3, 2), leaf=True))
    test_unbind = maketest(stateless(lambda x: list((x * 2).unbind(0))), floats((3, 2), leaf=True))
    test_complex_parts = maketest(
        stateless(lambda x: [torch.view_as_complex(x * 2).real, torch.view_as_complex(x * 3).imag]),
        floats((3, 2), leaf=True),
    )
    test_strided = maketest(
        stateless(lambda x: (y := x * 2, [y.as_strided((2,), (2,), 1), y])[-1]),
        floats((5,), leaf=True),
        written_to(0),
    )
    test_expanded = maketest(stateless(lambda x: (x * 2).expand(3, 4)), floats((4,), leaf=True))
    test_of_a_layer = maketest(linear(lambda m, x: m(x).view(3, 2).transpose(0, 1)), floats((2, 3)))
    test_view_and_what_it_is_of = maketest(
        stateless(lambda a, w: a * w),
        lambda: ((w := torch.randn(2, 3, requires_grad=True))[0], w),
    )
    test_one_argument_twice = maketest(
        stateless(lambda a, b: a * b), lambda: ((x := torch.randn(3, requires_grad=True)), x)
    )

    def test_views_of_one_that_are_read(self) -> None:
        def caller(fn: Program, args: tuple[Any, ...]) -> Any:
            w = torch.arange(4.0, requires_grad=True)
            x = w * 1
            y = fn(x[:2], x[1:3])
            y.pow(2).sum().backward()
            return seen([y, w])

        def inputs() -> tuple[Tensor, ...]:
            x = torch.ones(4, requires_grad=True) * 1
            return x[:2], x[1:3]

        check(stateless(lambda a, b: a * b), inputs, caller)

    def test_view_that_is_written_to(self) -> None:
        def caller(fn: Program, args: tuple[Any, ...]) -> Any:
            w = torch.arange(4.0, requires_grad=True)
            x = w * 1
            y = fn(x[1:])
            (x.pow(2).sum() + y.sum()).backward()
            return seen([y, x, w])

        def inputs() -> tuple[Tensor, ...]:
            return ((torch.ones(4, requires_grad=True) * 1)[1:],)

        check(stateless(lambda x: (x.mul_(2), x * 3)[-1]), inputs, caller)

    def test_detached_result(self) -> None:
        check(
            stateless(lambda x: (y := x * 2, z := y * 3, y.detach_(), [y, z])[-1]),
            floats((3,), leaf=True),
        )


class ErrorsTest(unittest.TestCase):
    """What eager refuses, with eager's words."""

    def check(self, program: Program, make: Any) -> None:
        with self.assertRaises(RuntimeError) as eager:
            program(make())
        with self.assertRaises(RuntimeError) as mine:
            extract_compiled_graph(program, (make(),))
        self.assertNotIsInstance(mine.exception, UnsupportedError)
        self.assertEqual(str(mine.exception), str(eager.exception))

    def test_words(self) -> None:
        def leaf() -> Tensor:
            return torch.ones(2, requires_grad=True)

        self.check(lambda x: x.register_hook(lambda g: g), lambda: torch.ones(2))
        self.check(lambda x: x.requires_grad_(False), lambda: leaf() * 2)
        self.check(lambda x: x.add_(1), leaf)
        self.check(lambda x: x.detach_(), lambda: (leaf() * 2)[0:])
        self.check(lambda x: x.requires_grad_(), lambda: torch.ones(2, dtype=torch.long))
        self.check(lambda x: x.retain_grad(), lambda: torch.ones(2))
        self.check(
            lambda x: x.register_post_accumulate_grad_hook(lambda p: None), lambda: leaf() * 2
        )
        self.check(lambda x: x.sum().backward(), lambda: torch.ones(2))
        self.check(lambda x: torch.autograd.grad(x, x), leaf)


if __name__ == "__main__":
    unittest.main()
