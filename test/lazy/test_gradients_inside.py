# Owner(s): ["oncall: jit"]

"""Gradients inside of a program: hooks, leaves, histories and modes of autograd, as in eager."""

import contextlib
import copy
import functools
import random
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F

from torch_lazy_ext import UnsupportedError, extract_compiled_graph

Program = Callable[..., Any]
# Makes a program, and what to look at beside its arguments and results: parameters, notes of hooks.
Make = Callable[[], tuple[Program, Any]]
Caller = Callable[[Program, tuple[Any, ...]], Any]


def seen(value: Any) -> Any:
    """What can be told of a value: of a tensor its contents, and what autograd says of it."""
    if isinstance(value, Tensor):
        told = [type(value).__name__, value.dtype, tuple(value.shape), value.requires_grad]
        told += [value.is_leaf, value.retains_grad, bool(value.requires_grad) and value._is_view()]
        if value.is_leaf or value.retains_grad:
            told.append(None if value.grad is None else value.grad.clone())
        return [*told, value.detach().clone()]
    if isinstance(value, nn.Module):
        return seen(dict(value.state_dict(keep_vars=True)))
    if isinstance(value, dict):
        return {k: seen(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [seen(v) for v in value]
    return value


def differs(a: Any, b: Any, path: str = "") -> str | None:
    """Where two values that `seen` gave differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
        same = same and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        return None if same else f"{path}: eager {a.tolist()}, graph {b.tolist()}"
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return next((d for k in a if (d := differs(a[k], b[k], f"{path}.{k}"))), None)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b))
        return next((d for i, (x, y) in pairs if (d := differs(x, y, f"{path}[{i}]"))), None)
    same_type = type(a) is type(b)
    return None if same_type and a == b else f"{path}: eager {a!r}, graph {b!r}"


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def backward(fn: Program, args: tuple[Any, ...]) -> Any:
    """Call, and differentiate all results that can be."""
    result = fn(*args)
    before = seen([result, args])
    results = [t for t in tensors_in(result) if t.requires_grad]
    if results:
        with torch.enable_grad():
            loss = sum((t.pow(2) * (k + 1)).sum() for k, t in enumerate(results))
        loss.backward()
    return [before, seen([result, args])]


def call(fn: Program, args: tuple[Any, ...]) -> Any:
    """Call only."""
    return seen([fn(*args), args])


def each_alone(fn: Program, args: tuple[Any, ...]) -> Any:
    """Differentiate one result after the other, up to an error."""
    results = [t for t in tensors_in(fn(*args)) if t.requires_grad]
    told = []
    for t in results:
        try:
            t.sum().backward()
        except RuntimeError as e:
            told.append(str(e))
            break
        told.append(seen(args))
    return told


def check(
    make: Make,
    inputs: Callable[[], tuple[Any, ...]],
    caller: Caller = backward,
    *,
    calls: int = 4,
    captures: int = 1,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Eager and the graph, side by side, on inputs of one seed and state of their own."""
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        sides.append(make())
    (program, watched), (other, other_watched) = sides
    with context():
        torch.manual_seed(1)
        before = seen(other_watched)
        args = inputs()
        kept = seen(args)
        graph = extract_compiled_graph(other, args)
        found = differs([before, kept], [seen(other_watched), seen(args)], "extraction")
        if found:
            raise AssertionError(f"the extraction changes something: {found}")
        for i in range(calls):
            told = []
            for fn, state in ((program, watched), (graph, other_watched)):
                torch.manual_seed(2 + i)
                told.append([caller(fn, inputs()), seen(state)])
            found = differs(told[0], told[1], f"call {i}")
            if found:
                raise AssertionError(found)
    if len(graph.specializations) > captures:
        raise AssertionError(f"{len(graph.specializations)} variants instead of {captures}")
    if captures == 1 and graph.specializations[0].hits < calls:
        raise AssertionError(f"graphs answered {graph.specializations[0].hits} calls of {calls}")


def maketest(make: Make, inputs: Any, caller: Caller = backward, **options: Any) -> Any:
    """A test method: `check` with these arguments."""
    return lambda self: check(make, inputs, caller, **options)


def stateless(program: Program) -> Make:
    return lambda: (program, None)


def floats(*shapes: tuple[int, ...], leaf: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(s, requires_grad=leaf) for s in shapes)


def history(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Tensors that are no leaves."""
    return lambda: tuple(torch.randn(s, requires_grad=True) * 2 for s in shapes)


def linear(step: Callable[[nn.Linear, Tensor], Any]) -> Make:
    """A program around a linear layer."""

    def make() -> tuple[Program, Any]:
        module = nn.Linear(3, 3)
        return (lambda x: step(module, x)), module

    return make


def hooked(register: Callable[[nn.Linear], Any], step: Callable[[nn.Linear, Tensor], Any]) -> Make:
    """The same with hooks that were there before."""

    def make() -> tuple[Program, Any]:
        module = nn.Linear(3, 3)
        kept = register(module)
        return (lambda x, kept=kept: step(module, x)), module

    return make


def train(module: nn.Linear, x: Tensor) -> Tensor:
    module.zero_grad()
    module(x).pow(2).sum().backward()
    return module.weight.grad.clone()


def accumulator(p: Tensor) -> Any:
    return p.view_as(p).grad_fn.next_functions[0][0]


def _triple_gradient(p: Tensor) -> None:
    p.grad.mul_(3)


class HooksBeforeTest(unittest.TestCase):
    """Hooks that tensors have before the program runs a backward."""

    test_scaled = maketest(
        hooked(lambda m: m.weight.register_hook(lambda g: g * 0), train), floats((2, 3))
    )
    test_several_in_order = maketest(
        hooked(
            lambda m: [
                m.weight.register_hook(lambda g: g + 1),
                m.weight.register_hook(lambda g: g * 2),
                m.bias.register_hook(lambda g: g.clamp(-1, 1)),
            ],
            train,
        ),
        floats((2, 3)),
    )
    test_after_accumulation = maketest(
        hooked(lambda m: m.weight.register_post_accumulate_grad_hook(_triple_gradient), train),
        floats((2, 3)),
    )
    test_accumulator = maketest(
        hooked(
            lambda m: [n := accumulator(m.weight), n.register_prehook(lambda g: (g[0] * 5,))], train
        ),
        floats((2, 3)),
    )
    test_accumulator_after = maketest(
        hooked(
            lambda m: [
                n := accumulator(m.weight),
                n.register_hook(lambda gi, go, m=m: _triple_gradient(m.bias)),
            ],
            lambda m, x: (
                m.zero_grad(),
                m(x).sum().backward(inputs=[m.bias]),
                m.weight.sum().backward(),
                m.bias.grad.clone(),
            )[-1],
        ),
        floats((2, 3)),
    )
    test_of_grad = maketest(
        hooked(
            lambda m: m.weight.register_hook(lambda g: g * 7),
            lambda m, x: torch.autograd.grad(m(x).pow(2).sum(), [m.weight, m.bias]),
        ),
        floats((2, 3)),
    )
    test_not_reached = maketest(
        hooked(lambda m: m.weight.register_hook(lambda g: g * 7), lambda m, x: m(x)),
        floats((2, 3)),
    )

    def test_optimizer_in_backward(self) -> None:
        def make() -> tuple[Program, Any]:
            module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            optimizers = {
                p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in module.parameters()
            }

            def hook(p: Tensor) -> None:
                optimizers[p].step()
                optimizers[p].zero_grad()

            for p in module.parameters():
                p.register_post_accumulate_grad_hook(hook)

            def step(x: Tensor) -> Tensor:
                loss = module(x).pow(2).sum()
                loss.backward()
                return loss.detach()

            return step, module

        check(make, floats((2, 3)), call)

    def test_notes_and_counts(self) -> None:
        def make() -> tuple[Program, Any]:
            module, norms = nn.Linear(3, 3), {"count": torch.zeros(()), "calls": 0}

            def hook(gradient: Tensor) -> None:
                norms["count"] = norms["count"] + gradient.norm()

            module.weight.register_hook(hook)
            return (lambda x: train(module, x)), [module, norms]

        check(make, floats((2, 3)), call)

    def test_added_and_removed_between_the_calls(self) -> None:
        def make() -> tuple[Program, Any]:
            module = nn.Linear(3, 3)
            handles: list[Any] = []

            def step(x: Tensor) -> Tensor:
                return train(module, x)

            step.module, step.handles = module, handles  # type: ignore[attr-defined]
            return step, module

        (eager, _), (mine, _) = make(), make()
        mine.module.load_state_dict(eager.module.state_dict())  # type: ignore[attr-defined]
        graph = extract_compiled_graph(mine, (torch.ones(2, 3),))
        registers = [
            lambda m: m.weight.register_hook(lambda g: g * 2),
            lambda m: m.bias.register_post_accumulate_grad_hook(_triple_gradient),
            lambda m: accumulator(m.weight).register_prehook(lambda g: (g[0] + 1,)),
        ]
        for register in registers:
            nodes = [accumulator(m.weight) for m in (eager.module, mine.module)]  # type: ignore[attr-defined]
            for on in (True, False):
                if on:
                    handles = [register(m) for m in (eager.module, mine.module)]  # type: ignore[attr-defined]
                else:
                    for handle in handles:
                        handle.remove()
                for _ in range(2):
                    x = torch.randn(2, 3)
                    want, got = eager(x), graph(x)
                    self.assertTrue(torch.equal(want, got))
                    self.assertTrue(torch.equal(eager.module.bias.grad, mine.module.bias.grad))  # type: ignore[attr-defined]
            del nodes

    def test_argument(self) -> None:
        def inputs() -> tuple[Tensor, ...]:
            x = torch.randn(3, requires_grad=True)
            x.register_hook(_times_ten)
            return (x,)

        def program(x: Tensor) -> Tensor:
            (g,) = torch.autograd.grad((x * x).sum(), x)
            return g + x * 1

        check(stateless(program), inputs)

    def test_removed_inside_is_refused(self) -> None:
        module = nn.Linear(3, 3)
        handle = module.weight.register_hook(lambda g: g * 2)

        def program(x: Tensor) -> Tensor:
            train(module, x)
            handle.remove()
            return x * 1

        with self.assertRaisesRegex(UnsupportedError, "removes a hook"):
            extract_compiled_graph(program, (torch.ones(2, 3),))
        self.assertEqual(len(module.weight._backward_hooks), 1)


class MultiGradHookTest(unittest.TestCase):
    """Hooks of several tensors, which count the nodes of these that a backward runs."""

    def check(self, program: Callable[..., Any], **options: Any) -> None:
        logs: list[list[Any]] = []
        for extracts in (False, True):
            torch.manual_seed(0)
            module, unused = nn.Linear(3, 2), torch.ones(2, requires_grad=True)
            tensors = [module.weight, unused, module.bias]
            log: list[Any] = []
            register_multi_grad_hook(tensors, _logs(log), **options)
            step = functools.partial(program, module, unused)
            run = extract_compiled_graph(step, (torch.ones(2, 3),)) if extracts else step
            self.assertEqual(log, [])
            for i in range(4):
                module.zero_grad()
                result = run(torch.full((2, 3), i + 1.0))
                if result is not None:
                    result.backward()
                log.append(module.weight.grad.sum())
            logs.append(log)
        self.assertGreater(len(logs[0]), 4, "no hook has run")
        self.assertEqual(str(logs[0]), str(logs[1]))

    def test_backward_inside(self) -> None:
        self.check(lambda module, unused, x: module(x).sum().backward())

    def test_with_what_is_elsewhere_unused(self) -> None:
        self.check(lambda module, unused, x: (module(x) * unused).sum().backward())

    def test_backward_outside(self) -> None:
        self.check(lambda module, unused, x: (module(x) * unused).sum())

    def test_two_backwards(self) -> None:
        def program(module: nn.Module, unused: Tensor, x: Tensor) -> None:
            module(x).sum().backward()
            (module(x) * unused).pow(2).sum().backward()

        self.check(program)


def _logs(log: list[Any]) -> Callable[[Any], None]:
    return lambda gradients: log.append([g if g is None else g.sum() for g in gradients])


def _times_ten(gradient: Tensor) -> Tensor:
    return gradient * 10


def _with_handle(register: Callable[[nn.Linear], Any]) -> Callable[[nn.Linear, Tensor], Any]:
    def step(module: nn.Linear, x: Tensor) -> Any:
        handle = register(module)
        result = train(module, x)
        handle.remove()
        return result

    return step


class HooksInsideTest(unittest.TestCase):
    """Hooks that the program registers."""

    test_removed = maketest(
        linear(_with_handle(lambda m: m.weight.register_hook(lambda g: g * 2))), floats((2, 3))
    )
    test_after_accumulation = maketest(
        linear(_with_handle(lambda m: m.bias.register_post_accumulate_grad_hook(_triple_gradient))),
        floats((2, 3)),
    )
    test_accumulator = maketest(
        linear(
            _with_handle(lambda m: accumulator(m.weight).register_prehook(lambda g: (g[0] * 4,)))
        ),
        floats((2, 3)),
    )
    test_multi_grad = maketest(
        linear(
            _with_handle(
                lambda m: torch.autograd.graph.register_multi_grad_hook(
                    [m.weight, m.bias], lambda grads: None
                )
            )
        ),
        floats((2, 3)),
    )

    def test_left_on_an_argument(self) -> None:
        def program(x: Tensor) -> Tensor:
            x.register_hook(_times_ten)
            return x.exp()

        check(stateless(program), floats((3,), leaf=True))
        check(stateless(program), history((3,)))

    def test_left_with_what_the_run_made_is_refused(self) -> None:
        def program(x: Tensor) -> Tensor:
            y = x * 2
            x.register_hook(lambda g: g * y)
            return y

        with self.assertRaisesRegex(UnsupportedError, "leaves a hook on a tensor"):
            extract_compiled_graph(program, (torch.ones(3, requires_grad=True),))

    def test_left_with_its_handle_kept_is_refused(self) -> None:
        def program(x: Tensor) -> Any:
            return x * 2, x.register_hook(_times_ten)

        with self.assertRaisesRegex(UnsupportedError, "leaves a hook on a tensor"):
            extract_compiled_graph(program, (torch.ones(3, requires_grad=True),))


def penalty(module: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
    return g.pow(2).sum()


def inner_loop(module: nn.Linear, x: Tensor) -> Tensor:
    """MAML: a step of its own, and the loss after that."""
    weights = [module.weight, module.bias]
    for _ in range(2):
        loss = F.linear(x, *weights).tanh().pow(2).sum()
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        weights = [w - 0.1 * g for w, g in zip(weights, grads)]
    return F.linear(x, *weights).pow(2).sum()


def adaptive(module: nn.Linear, x: Tensor) -> Tensor:
    y = module(x)
    one, other = y.pow(2).sum(), y.exp().sum()
    norms = [
        torch.autograd.grad(loss, module.weight, retain_graph=True)[0].norm()
        for loss in (one, other)
    ]
    return one + other * (norms[0] / (norms[1] + 1e-4)).clamp(0, 10).detach()


def hessian_product(module: nn.Linear, x: Tensor) -> Any:
    parameters = list(module.parameters())
    grads = torch.autograd.grad(module(x).exp().sum(), parameters, create_graph=True)
    dot = sum((g * p.detach()).sum() for g, p in zip(grads, parameters))
    return torch.autograd.grad(dot, parameters, retain_graph=True)


def unused(module: nn.Linear, x: Tensor) -> Any:
    other = nn.Parameter(torch.ones(2))
    return torch.autograd.grad(module(x).sum(), [module.bias, other], allow_unused=True)


class InnerGradTest(unittest.TestCase):
    """torch.autograd.grad and backward(inputs=...) inside, with respect to the user's tensors."""

    test_parameters = maketest(
        linear(lambda m, x: torch.autograd.grad(m(x).pow(2).sum(), list(m.parameters()))),
        floats((2, 3)),
    )
    test_create_graph = maketest(
        linear(
            lambda m, x: torch.autograd.grad(
                m(x).pow(2).sum(), list(m.parameters()), create_graph=True
            )[0].sum()
        ),
        floats((2, 3)),
    )
    test_gradient_penalty = maketest(linear(penalty), floats((2, 3)))
    test_inner_loop = maketest(linear(inner_loop), floats((2, 3)))
    test_adaptive_weight = maketest(linear(adaptive), floats((2, 3)))
    test_hessian_product = maketest(linear(hessian_product), floats((2, 3)))
    test_unused = maketest(linear(unused), floats((2, 3)))
    test_materialized = maketest(
        linear(
            lambda m, x: torch.autograd.grad(
                x.pow(2).sum(), [m.weight, x], materialize_grads=True, create_graph=True
            )
        ),
        floats((2, 3), leaf=True),
    )
    test_non_leaf_argument = maketest(
        stateless(lambda x: torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)[0]),
        history((3,)),
    )
    test_edge = maketest(
        linear(
            lambda m, x: torch.autograd.grad(
                m(x).pow(2).sum(), [torch.autograd.graph.get_gradient_edge(m.weight)]
            )
        ),
        floats((2, 3)),
    )
    test_is_leaf = maketest(
        linear(lambda m, x: x * 2 if x.is_leaf and m.weight.is_leaf else x * 3),
        lambda: (torch.randn(2, 3, requires_grad=True),),
    )

    def test_error_of_unused(self) -> None:
        module = nn.Linear(3, 3)
        with self.assertRaisesRegex(RuntimeError, "not have been used in the graph"):
            extract_compiled_graph(
                lambda x: torch.autograd.grad(x.sum(), module.weight),
                (torch.ones(2, requires_grad=True),),
            )

    def test_backward_with_inputs(self) -> None:
        def make() -> tuple[Program, Any]:
            module = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(module.parameters(), 0.1)

            def step(x: Tensor) -> None:
                optimizer.zero_grad()
                module(x).sum().backward(inputs=list(module.parameters()))
                optimizer.step()

            return step, module

        check(make, floats((2, 3)), call)

    test_some_inputs = maketest(
        linear(lambda m, x: m(x).pow(2).sum().backward(inputs=m.weight)),
        floats((2, 3), leaf=True),
        call,
        captures=2,
    )
    test_inputs_of_autograd_backward = maketest(
        linear(lambda m, x: torch.autograd.backward([m(x).sum()], inputs=[m.bias, x])),
        floats((2, 3), leaf=True),
        call,
        captures=2,
    )

    def test_arguments_made_from_one_another_are_refused(self) -> None:
        def program(a: Tensor, b: Tensor) -> Tensor:
            return torch.autograd.grad((b * b).sum() + a.sum(), a)[0]

        def pair(related: bool) -> tuple[Tensor, Tensor]:
            a = torch.ones(2, requires_grad=True)
            return a, (a if related else torch.ones(2, requires_grad=True)) * 3

        refused = self.assertRaisesRegex(UnsupportedError, "another one, which it is given too")
        with refused:
            extract_compiled_graph(program, pair(True))
        graph = extract_compiled_graph(program, pair(False))
        self.assertTrue(torch.equal(graph(*pair(False)), torch.ones(2)))
        with refused:
            graph(*pair(True))

    def test_called_on_a_non_leaf_after_a_leaf(self) -> None:
        """Where a history begins outside, eager goes on there."""

        def program(x: Tensor) -> Tensor:
            y = (x * x).sum()
            y.backward()
            return y.detach()

        graph = extract_compiled_graph(program, (torch.ones(2, requires_grad=True),))
        x = torch.full((2,), 3.0, requires_grad=True)
        graph(x)
        self.assertTrue(torch.equal(x.grad, torch.full((2,), 6.0)))
        w = torch.ones(2, requires_grad=True)
        with self.assertRaisesRegex(UnsupportedError, "history begins outside"):
            graph(w * 2)
        self.assertIsNone(w.grad)


class RequiresGradTest(unittest.TestCase):
    """requires_grad_, detach_ and retain_grad on what the program is given."""

    test_saliency = maketest(
        stateless(lambda x: (x.requires_grad_(), (x * 2).exp().sum())[1]), floats((3,))
    )
    test_attribute = maketest(
        stateless(lambda x: (setattr(x, "requires_grad", True), x.sin())[1]), floats((3,))
    )
    test_whole_saliency = maketest(
        stateless(
            lambda x: (x.requires_grad_(), x.exp().sum().backward(), x.grad.abs().clone())[2]
        ),
        floats((3,)),
        call,
    )
    test_taken_back = maketest(
        stateless(
            lambda x: (x.requires_grad_(), y := (x * x).sum(), x.requires_grad_(False), y)[-1]
        ),
        floats((3,)),
    )
    test_frozen_for_a_while = maketest(
        linear(
            lambda m, x: (m.requires_grad_(False), y := m(x), m.requires_grad_(True), y + m.bias)[
                -1
            ]
        ),
        floats((2, 3), leaf=True),
    )
    test_frozen_for_good = maketest(
        linear(lambda m, x: (y := m(x), m.weight.requires_grad_(False), y)[-1]),
        floats((2, 3)),
        captures=2,
    )
    test_detach_of_a_non_leaf = maketest(
        stateless(lambda x, w: (x.detach_(), x * w)[1]),
        lambda: (torch.randn(3, requires_grad=True) * 2, torch.randn(3, requires_grad=True)),
    )
    test_detach_of_a_leaf = maketest(
        stateless(lambda x, w: (x.detach_(), x * w)[1]), floats((3,), (3,), leaf=True)
    )
    test_detach_after_use = maketest(
        stateless(lambda x: (y := x * 3, x.detach_(), y + x)[-1]), history((3,))
    )
    test_view_of_an_argument = maketest(
        stateless(lambda x: (v := x[0], v.requires_grad_(), y := v * v, [y, v])[-1]),
        lambda: (torch.randint(5, (2, 3)).float(),),  # sums in another order are the same
    )
    test_retained_argument = maketest(
        stateless(lambda x: (x.retain_grad(), x.exp())[1]), history((3,))
    )
    test_retained_result = maketest(
        stateless(lambda x: (y := x * 2, y.retain_grad(), y)[-1]), floats((3,), leaf=True)
    )
    test_retained_on_the_way = maketest(
        stateless(lambda x: (h := x * 2, h.retain_grad(), [h, h.exp()])[-1]),
        floats((3,), leaf=True),
        lambda fn, args: (r := fn(*args), r[1].sum().backward(), seen([r, args]))[-1],
    )

    def test_kept_activation(self) -> None:
        """Grad-CAM: an activation is kept, its gradient is looked at after the backward."""

        def make() -> tuple[Program, Any]:
            module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            kept: dict[str, Any] = {"h": None}

            def program(x: Tensor) -> Tensor:
                kept["h"] = module[0](x)
                kept["h"].retain_grad()
                return module[1:](kept["h"])

            return program, [module, kept]

        check(make, floats((2, 3)), captures=3)


class ResultsOfResultsTest(unittest.TestCase):
    """A result that other results depend on."""

    @staticmethod
    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.exp()
        return h, h.sin() * x

    def test_gradient_with_respect_to_it(self) -> None:
        check(
            stateless(self.program),
            floats((3,), leaf=True),
            lambda fn, args: seen((r := fn(*args), torch.autograd.grad(r[1].sum(), r[0]))[-1]),
        )

    def test_hook_of_the_caller(self) -> None:
        def caller(fn: Program, args: tuple[Any, ...]) -> Any:
            h, y = fn(*args)
            h.register_hook(_times_ten)
            (y.sum() + h.sum()).backward()
            return seen(args)

        check(stateless(self.program), floats((3,), leaf=True), caller)

    def test_second_derivative(self) -> None:
        def caller(fn: Program, args: tuple[Any, ...]) -> Any:
            h, y = fn(*args)
            (g,) = torch.autograd.grad(y.sum() + h.pow(2).sum(), args[0], create_graph=True)
            (g2,) = torch.autograd.grad(g.pow(2).sum(), args[0])
            return [g.detach(), g2]

        def close(fn: Program, args: tuple[Any, ...]) -> Any:
            return [t.mul(1e6).round() for t in caller(fn, args)]

        def inputs() -> tuple[Tensor, ...]:
            return (torch.rand(3, dtype=torch.float64, requires_grad=True),)

        check(stateless(self.program), inputs, close)

    test_each_alone = maketest(
        stateless(lambda x: (h := x.exp(), [h.sin(), h])[-1]), floats((3,), leaf=True), each_alone
    )
    test_chain = maketest(
        stateless(lambda x: (a := x.exp(), b := a.sin(), c := b * a, [c, b, a])[-1]),
        floats((3,), leaf=True),
    )


def _cell(x: Tensor) -> tuple[Tensor, Tensor]:
    gates = x * 2
    c = gates.exp()
    return gates.sigmoid() * c.tanh(), c


def _crossed(x: Tensor) -> tuple[Tensor, ...]:
    a, b = x * 2, x * 3
    first, second = a.exp(), b.exp()
    return first, second, a.sin() * second, b.sin() * first


class SharedHistoryTest(unittest.TestCase):
    """A result that another one depends on, where both share history beyond it as well."""

    test_cell = maketest(stateless(_cell), floats((2, 3), leaf=True))
    test_crossed = maketest(stateless(_crossed), floats((2, 3), leaf=True))
    test_chain = maketest(
        stateless(lambda x: (lambda h, c: (h * c, h, c.sum()))(*_cell(x))),
        floats((2, 3), leaf=True),
    )


class ModesTest(unittest.TestCase):
    """Modes of autograd and autocast that the program sets inside of others."""

    @staticmethod
    def enabled(m: nn.Linear, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return m(x).pow(2).sum()

    @staticmethod
    def view_enabled(m: nn.Linear, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return m.weight[0]

    @staticmethod
    def view_disabled(m: nn.Linear, x: Tensor) -> Any:
        with torch.no_grad():
            return m.weight[0] * x, m.weight[1]

    test_enable_grad = maketest(linear(enabled), floats((2, 3)), context=torch.no_grad)
    test_view = maketest(linear(view_enabled), floats((2, 3)), context=torch.no_grad)
    test_view_without = maketest(linear(view_disabled), floats((3,)))
    test_inner_training = maketest(
        linear(
            lambda m, x: (m.zero_grad(), ModesTest.enabled(m, x).backward(), m.weight.grad.clone())[
                -1
            ]
        ),
        floats((2, 3)),
        context=torch.no_grad,
    )
    test_no_grad = maketest(linear(lambda m, x: (torch.no_grad()(m)(x), m(x))), floats((2, 3)))

    @staticmethod
    def autocast(**options: Any) -> Callable[[], Any]:
        return lambda: torch.autocast("cpu", dtype=torch.bfloat16, **options)

    @staticmethod
    def off(m: nn.Linear, x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            y = m(x)
        return y, m(x)

    @staticmethod
    def half(m: nn.Linear, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
            y = m(x)
        return y, m(x)

    def test_autocast_inside(self) -> None:
        for program in (self.off, self.half):
            for grad in (torch.enable_grad, torch.no_grad):
                with self.subTest(program.__name__, grad=grad.__name__), grad():
                    check(linear(program), floats((2, 3)), call, context=self.autocast())

    def test_backward_under_autocast(self) -> None:
        def caller(fn: Program, args: tuple[Any, ...]) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = fn(*args)
                y.float().sum().backward()
            return seen([y, args])

        check(linear(lambda m, x: m(x)), floats((2, 3), leaf=True), caller, captures=2)
        program, _module = linear(lambda m, x: torch.autocast("cpu", enabled=False)(m)(x))()
        args = floats((2, 3), leaf=True)()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = extract_compiled_graph(program, args)(*args)
            with self.assertRaisesRegex(UnsupportedError, "called under autocast"):
                y.sum().backward()
        extract_compiled_graph(program, args)(*args).sum().backward()

    @staticmethod
    def looks(m: nn.Linear, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = m(x).sum()
        return m(x) * (2 if scale > 0 else 3)

    test_parameter_first_met_in_inference_mode = maketest(linear(looks), floats((2, 3)), captures=2)

    def test_shape_cache_stays_right(self) -> None:
        """What runs under autocast says nothing of the same operator without it."""

        def off(m: nn.Linear, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return m(x.float())

        for _ in range(2):
            check(linear(off), floats((5, 3)), call, context=self.autocast())
            check(linear(lambda m, x: m(x)), floats((5, 3)), call)

    def test_custom_forward_that_casts(self) -> None:
        check(
            linear(lambda m, x: CastsToFloat.apply(x, m.weight)),
            floats((2, 3)),
            call,
            context=self.autocast(),
        )


class CastsToFloat(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


class MadeInsideTest(unittest.TestCase):
    """Leaves that the program makes."""

    test_returned = maketest(
        stateless(lambda x: (w := torch.ones(3, requires_grad=True), [w, (w * x).exp()])[-1]),
        floats((3,)),
    )
    test_hidden = maketest(
        stateless(lambda x: (torch.full((3,), 2.0, requires_grad=True) * x).exp()), floats((3,))
    )
    test_from_data = maketest(
        stateless(lambda x: (w := torch.tensor([1.0, 2, 3], requires_grad=True), [w, w * x])[-1]),
        floats((3,)),
    )
    test_beside_an_argument = maketest(
        stateless(lambda x: (w := torch.zeros(3, requires_grad=True), [w, w + x * x])[-1]),
        floats((3,), leaf=True),
    )
    test_parameter = maketest(
        stateless(lambda x: (p := nn.Parameter(x.clone()), [p, p * x])[-1]), floats((3,))
    )
    test_detached_copy = maketest(
        stateless(lambda x: (w := x.detach().clone().requires_grad_(), [w, w * x])[-1]),
        floats((3,), leaf=True),
    )
    test_differentiated_inside = maketest(
        stateless(
            lambda x: (
                w := torch.ones(3, requires_grad=True),
                (w * x).exp().sum().backward(),
                w.grad,
            )[-1]
        ),
        floats((3,)),
    )
    test_view_of_it = maketest(
        stateless(lambda x: (w := (x * 0 + 1).requires_grad_(), [w[:1], w])[-1]), floats((2, 3))
    )
    test_module = maketest(
        linear(lambda m, x: (n := copy.deepcopy(m), [n.weight, n(x) + m(x)])[-1]), floats((2, 3))
    )

    def test_replaced_parameter(self) -> None:
        def make() -> tuple[Program, Any]:
            module = nn.Linear(3, 3)

            def program(x: Tensor) -> Tensor:
                module.weight = nn.Parameter(module.weight.detach() * 2)
                return module(x)

            return program, module

        check(make, floats((2, 3)))

    def test_vector_to_parameters(self) -> None:
        def make() -> tuple[Program, Any]:
            module = nn.Linear(3, 3)

            def program(x: Tensor) -> Tensor:
                vector = nn.utils.parameters_to_vector(module.parameters())
                nn.utils.vector_to_parameters(vector.detach() * 0.5, module.parameters())
                return module(x)

            return program, module

        check(make, floats((2, 3)))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class ReturnsItself(Reverse):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class Flat(Reverse):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.view(-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.view(ctx.shape) * 5


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 7


def written_to(which: int) -> Caller:
    def caller(fn: Program, args: tuple[Any, ...]) -> Any:
        results = fn(*args)
        results[which].mul_(3)
        sum((t * t).sum() for t in results).backward()
        return seen([results, args])

    return caller


class AliasTest(unittest.TestCase):
    """Results that share memory with one another, or with what the program was given."""

    test_view_and_base = maketest(
        stateless(lambda x: (i := x * 2, [i.view(-1), i])[-1]),
        floats((2, 2), leaf=True),
        written_to(0),
    )
    test_base_and_view = maketest(
        stateless(lambda x: (i := x * 2, [i, i[0]])[-1]), floats((2, 2), leaf=True), written_to(0)
    )
    test_two_views = maketest(
        stateless(lambda x: (i := x * 2, [i[0], i.t()])[-1]),
        floats((2, 2), leaf=True),
        written_to(0),
    )
    test_written_inside = maketest(
        stateless(lambda x: (i := x * 2, v := i.view(-1), v.mul_(3), [v, i])[-1]),
        floats((2, 2), leaf=True),
        written_to(1),
    )
    test_base_written_after_the_view = maketest(
        stateless(lambda x: (y := x * 2, v := y[1:], v.mul_(3), y.add_(1), [v, y])[-1]),
        floats((4,), leaf=True),
        written_to(0),
    )
    test_of_a_parameter = maketest(
        linear(lambda m, x: [(m.weight * x).view(-1), m.weight[0]]), floats((2, 3, 3))
    )
    test_custom = maketest(stateless(Reverse.apply), floats((3,), leaf=True))
    test_custom_of_a_non_leaf = maketest(stateless(Reverse.apply), history((3,)))
    test_custom_itself = maketest(stateless(ReturnsItself.apply), floats((3,), leaf=True))
    test_custom_view = maketest(stateless(Flat.apply), floats((2, 3), leaf=True))
    test_custom_of_a_parameter = maketest(
        linear(lambda m, x: Reverse.apply(m.weight) @ x), floats((3, 2))
    )
    test_custom_of_a_parameter_returned = maketest(
        linear(lambda m, x: Flat.apply(m.weight)), floats((3, 2))
    )
    test_custom_in_place = maketest(
        stateless(lambda x: (y := x * 1, InPlace.apply(y), y.exp())[-1]), floats((3,), leaf=True)
    )

    def test_writing_to_a_custom_view_raises(self) -> None:
        def caller(fn: Program, args: tuple[Any, ...]) -> Any:
            y = fn(*args)
            try:
                y.mul_(2)
            except RuntimeError as e:
                return str(e).partition(" is ")[2]
            return "nothing"

        check(stateless(Reverse.apply), history((3,)), caller)


class LateErrorTest(unittest.TestCase):
    """What only a backward raises is raised there."""

    @staticmethod
    def caller(fn: Program, args: tuple[Any, ...]) -> Any:
        result = fn(*args)
        told = [seen(result)]
        for t in tensors_in(result):
            try:
                t.sum().backward(retain_graph=True)
            except Exception as e:
                told.append(f"{type(e).__name__}: {e}")
            else:
                told.append(seen(args))
        return told

    test_written_to = maketest(
        stateless(lambda x: x.tanh().mul_(2)), floats((3,), leaf=True), caller
    )
    test_one_of_two = maketest(
        stateless(lambda x: (y := x.exp(), z := y.tanh(), w := z.mul_(2), [w, y.sin()])[-1]),
        floats((3,), leaf=True),
        caller,
    )
    test_custom = maketest(
        stateless(lambda x: [Raises.apply(x), x * 2]), floats((3,), leaf=True), caller
    )


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise LookupError("no gradient of this")


class Doubles(torch.autograd.Function):
    """Its backward writes to its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        g.mul_(2)
        return g.clone()


class Counts(torch.autograd.Function):
    """Its backward keeps statistics of its gradients in a buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.buffer.mul_(0.5).add_(g.abs().sum())
        return g * 2 + ctx.buffer, None


class Scratch(torch.autograd.Function):
    """Its backward writes to a tensor that it has saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.kept = y.detach()
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.kept.mul_(g).clone()


def own_tangent(fn: Program, args: tuple[Any, ...]) -> Any:
    y = fn(*args)
    tangent = torch.arange(1.0, 1 + y.numel()).view_as(y)
    y.backward(tangent)
    return seen([y, args, tangent])


class WritingBackwardTest(unittest.TestCase):
    test_own_gradient = maketest(
        stateless(lambda x: Doubles.apply(x * 3)), floats((3,), leaf=True), own_tangent
    )
    test_gradient_on_the_way = maketest(
        stateless(lambda x: Doubles.apply(x * 3) * 2), floats((3,), leaf=True), own_tangent
    )
    test_saved_tensor = maketest(
        stateless(lambda x: Scratch.apply(x * 3) * 2), floats((3,), leaf=True), own_tangent
    )

    @staticmethod
    def counting() -> tuple[Program, Any]:
        module = nn.Linear(3, 3)
        module.register_buffer("seen", torch.zeros(()))
        return (lambda x: Counts.apply(module(x), module.seen)), module

    test_buffer = maketest(counting, floats((2, 3)))

    def test_two_calls_and_then_their_backwards(self) -> None:
        def caller(fn: Program, args: tuple[Any, ...]) -> Any:
            first, second = fn(*args), fn(args[0] * 2)
            second.sum().backward()
            first.pow(2).sum().backward()
            return seen(args)

        check(self.counting, floats((2, 3), leaf=True), caller, captures=2)

    def test_buffer_that_the_forward_writes_is_refused(self) -> None:
        buffer = torch.zeros(())

        def program(x: Tensor) -> Tensor:
            buffer.add_(1)
            return Counts.apply(x, buffer)

        with self.assertRaisesRegex(UnsupportedError, "backward of the program writes to a tensor"):
            extract_compiled_graph(program, (torch.ones(3, requires_grad=True),))


class Scales(torch.autograd.Function):
    factor = 2.0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * Scales.factor


class Jitters(Scales):
    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * random.random()


class HookedBySelf(nn.Module):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y.register_hook(self.scale)
        return y

    def scale(self, gradient: Tensor) -> Tensor:
        return gradient * self.factor


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ValueError("there is no further derivative")


class SquareOnce(torch.autograd.Function):
    """A square whose second derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return NoDerivative.apply(x * gradient * 2)


class CubeTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return SquareOnce.apply(x) * gradient * 3


class NoFurtherDerivativeTest(unittest.TestCase):
    """An error of a derivative is raised where that derivative is asked for, and not before."""

    def derivatives(self, program: Program) -> list[Any]:
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        y, found = program(x), []
        for _ in range(4):
            try:
                (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            except ValueError as e:
                return [*found, str(e)]
            found.append(y.tolist())
        return found

    def test_of_a_function(self) -> None:
        for program in (SquareOnce.apply, CubeTwice.apply, lambda x: CubeTwice.apply(x * 2) + x):
            with self.subTest(program):
                x = torch.ones(2, requires_grad=True)
                graph = extract_compiled_graph(program, (x,))
                expected = self.derivatives(program)
                self.assertEqual(expected[-1], "there is no further derivative")
                for _ in range(2):
                    self.assertEqual(self.derivatives(graph), expected)


class ReadingBackwardTest(unittest.TestCase):
    """What a backward or a hook reads of Python counts like what the program reads."""

    def follows(self, program: Program, owner: Any) -> None:
        self.addCleanup(setattr, owner, "factor", 2.0)
        owner.factor = 2.0
        graph = extract_compiled_graph(program, (torch.ones(2, requires_grad=True),))
        for factor in (2.0, 5.0, 2.0):
            owner.factor = factor
            x = torch.ones(2, requires_grad=True)
            graph(x).sum().backward()
            self.assertEqual(x.grad.tolist(), [factor, factor])
        self.assertEqual(len(graph.specializations), 2)

    def test_of_a_function(self) -> None:
        self.follows(Scales.apply, Scales)

    def test_of_a_hook(self) -> None:
        module = HookedBySelf()
        self.follows(module, module)

    def test_drawn_numbers_are_refused(self) -> None:
        before = random.getstate()
        with self.assertRaisesRegex(UnsupportedError, "draws numbers from Python's random"):
            extract_compiled_graph(Jitters.apply, (torch.ones(2, requires_grad=True),))
        self.assertEqual(random.getstate(), before)


class HistoryTest(unittest.TestCase):
    """What the program does in place to arguments with a history."""

    test_transposed = maketest(stateless(lambda x: x.t_() * 2), history((2, 3)))
    test_unsqueezed = maketest(stateless(lambda x: (x.unsqueeze_(0), x.exp())[1]), history((2, 3)))
    test_written_and_transposed = maketest(stateless(lambda x: x.mul_(2).t_() + 0), history((2, 3)))
    test_transposed_and_written = maketest(
        stateless(lambda x: (x.t_(), x.mul_(3), x[0])[-1]), history((2, 3))
    )
    test_squeezed_and_returned = maketest(stateless(lambda x: x.squeeze_(0)), history((1, 3)))
    test_seen_by_the_caller = maketest(
        stateless(lambda x, w: (x.mul_(2).t_(), None)[1]),
        lambda: ((w := torch.randn(2, 3, requires_grad=True)) * 1, w),
        lambda fn, args: (fn(*args), args[0].pow(2).sum().backward(), seen(args))[-1],
    )

    def test_views_of_one_are_refused(self) -> None:
        def program(a: Tensor, b: Tensor) -> Tensor:
            a.add_(1)
            return a + b

        x = torch.ones(4, requires_grad=True) * 1
        with self.assertRaisesRegex(UnsupportedError, "aten::add_.Tensor writes to memory that"):
            extract_compiled_graph(program, (x[:2], x[1:3]))

    def test_version_is_refused(self) -> None:
        with self.assertRaisesRegex(UnsupportedError, "reads the version counter"):
            extract_compiled_graph(lambda x: x + x._version, (torch.ones(3),))


class TransformTest(unittest.TestCase):
    """torch.func of a graph names the graph; a graph of torch.func's is one."""

    def test_of_a_graph(self) -> None:
        graph = extract_compiled_graph(lambda x: x.sin().sum(), (torch.ones(3),))
        for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
            refused = self.assertRaisesRegex(UnsupportedError, "under a transform of torch.func")
            with self.subTest(transform.__name__), refused:
                transform(graph)(torch.ones(3))
        self.assertTrue(torch.equal(graph(torch.ones(3)), torch.ones(3).sin().sum()))

    def test_of_a_graph_of_a_module(self) -> None:
        module = nn.Linear(3, 3)
        graph = extract_compiled_graph(module, (torch.ones(2, 3),)).as_module()

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(graph, parameters, (torch.ones(2, 3),)).sum()

        parameters = {f"module.{k}": v.detach() for k, v in module.named_parameters()}
        with self.assertRaisesRegex(UnsupportedError, "under a transform of torch.func"):
            torch.func.grad(loss)(parameters)

    test_grad = maketest(stateless(torch.func.grad(lambda x: x.exp().sum())), floats((3,)))
    test_grad_of_a_leaf = maketest(
        stateless(torch.func.grad(lambda x: x.exp().sum())), floats((3,), leaf=True)
    )
    test_vmap = maketest(
        stateless(torch.func.vmap(lambda x: x.sin() * x.sum())), floats((2, 3), leaf=True)
    )
    test_jacrev = maketest(stateless(torch.func.jacrev(torch.sin)), floats((3,)))
    test_with_respect_to_parameters = maketest(
        linear(
            lambda m, x: torch.func.grad(
                lambda p: torch.func.functional_call(m, p, (x,)).pow(2).sum()
            )(dict(m.named_parameters()))["weight"]
        ),
        floats((2, 3)),
    )


class CheckpointTest(unittest.TestCase):
    @staticmethod
    def block(m: nn.Linear, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda v: m(v).tanh(), x, use_reentrant=True)

    test_reentrant = maketest(linear(block), floats((2, 3), leaf=True))
    test_reentrant_twice = maketest(
        linear(lambda m, x: CheckpointTest.block(m, CheckpointTest.block(m, x))),
        floats((2, 3), leaf=True),
    )
    test_reentrant_beside = maketest(
        linear(lambda m, x: CheckpointTest.block(m, x) + m(x)), floats((2, 3), leaf=True)
    )
    test_reentrant_inside = maketest(
        linear(
            lambda m, x: (
                m.zero_grad(),
                CheckpointTest.block(m, x).sum().backward(),
                m.weight.grad.clone(),
            )[-1]
        ),
        floats((2, 3), leaf=True),
        captures=2,
    )

    @staticmethod
    def with_dropout() -> tuple[Program, Any]:
        module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.2))
        return (lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=True)), module

    test_reentrant_with_dropout = maketest(with_dropout, floats((2, 3), leaf=True))

    def test_some_gradients_of_a_reentrant_one(self) -> None:
        program, _module = linear(self.block)()
        x = torch.randn(2, 3, requires_grad=True)
        graph = extract_compiled_graph(program, (x,))
        for fn in (program, graph):
            with self.assertRaisesRegex(RuntimeError, "incompatible with .grad()"):
                torch.autograd.grad(fn(x).sum(), x)


class PackedTest(unittest.TestCase):
    @staticmethod
    def make(kind: type[nn.RNNBase], **options: Any) -> Make:
        def make() -> tuple[Program, Any]:
            rnn = kind(3, 4, **options)
            first = options.get("batch_first", False)

            def program(x: Tensor, lengths: Tensor) -> Any:
                packed = nn.utils.rnn.pack_padded_sequence(
                    x, lengths, batch_first=first, enforce_sorted=False
                )
                out, sizes = nn.utils.rnn.pad_packed_sequence(
                    rnn(packed)[0], batch_first=first, padding_value=-1.0, total_length=7
                )
                return out, sizes

            return program, rnn

        return make

    @staticmethod
    def inputs(batch_first: bool = False) -> Callable[[], tuple[Tensor, ...]]:
        shape = (2, 5, 3) if batch_first else (5, 2, 3)
        return lambda: (torch.randn(shape, requires_grad=True), torch.tensor([3, 5]))

    test_gru = maketest(make(nn.GRU), inputs())
    test_lstm = maketest(make(nn.LSTM, batch_first=True, bidirectional=True), inputs(True))
    test_rnn = maketest(make(nn.RNN, num_layers=2), inputs())


class HigherTest(unittest.TestCase):
    @staticmethod
    def caller(fn: Program, args: tuple[Any, ...]) -> Any:
        y = fn(*args)
        grads = torch.autograd.grad(y.sum(), args, create_graph=True)
        t = torch.ones_like(y, requires_grad=True)
        more = torch.autograd.grad(fn(*args), args, t, create_graph=True)
        last = torch.autograd.grad(sum(g.sum() for g in more), t, allow_unused=True)
        return [seen(grads), seen([g.detach() for g in more]), seen(last)]

    test_no_second_derivative = maketest(
        stateless(lambda x, p: torch.relu(x) + p), floats((3,), (3,), leaf=True), caller
    )
    test_identity = maketest(stateless(lambda x: x + 1), floats((3,), leaf=True), caller)
    test_linear = maketest(stateless(lambda x: (x * 2).t()), floats((3, 2), leaf=True), caller)


class ForwardModeTest(unittest.TestCase):
    """A tangent is used, or refused; it is never dropped."""

    def test_of_an_argument(self) -> None:
        from torch.autograd import forward_ad

        graph = extract_compiled_graph(torch.sin, (torch.ones(3),))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
            with self.assertRaisesRegex(UnsupportedError, "tangent of forward-mode AD"):
                graph(dual)
            with self.assertRaisesRegex(UnsupportedError, "tangent of forward-mode AD"):
                extract_compiled_graph(torch.sin, (dual,))
        self.assertTrue(torch.equal(graph(torch.ones(3)), torch.ones(3).sin()))

    def test_of_a_parameter(self) -> None:
        from torch.autograd import forward_ad

        module = nn.Linear(3, 3)
        graph = extract_compiled_graph(module, (torch.ones(2, 3),))
        plain = module.weight
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(plain.detach(), torch.ones(3, 3))
            del module.weight
            module.weight = dual
            with self.assertRaisesRegex(UnsupportedError, "tangent of forward-mode AD"):
                graph(torch.ones(2, 3))

    def test_of_a_result(self) -> None:
        from torch.autograd import forward_ad

        with (
            forward_ad.dual_level(),
            self.assertRaisesRegex(UnsupportedError, "result has a tangent of forward-mode AD"),
        ):
            extract_compiled_graph(lambda x: forward_ad.make_dual(x, x * 2).sin(), (torch.ones(3),))

    def test_inside(self) -> None:
        from torch.autograd import forward_ad

        def program(x: Tensor, t: Tensor) -> Any:
            with forward_ad.dual_level():
                y = forward_ad.make_dual(x, t).sin().exp()
                return tuple(forward_ad.unpack_dual(y))

        check(stateless(program), floats((3,), (3,)), call)


class SavedTensorsTest(unittest.TestCase):
    def test_hooks_of_the_caller(self) -> None:
        """They see what a replay saves, and nothing of the extraction."""
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        packed: list[Tensor] = []

        def pack(t: Tensor) -> int:
            packed.append(t.clone())
            return len(packed) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: packed[k] * 2):
            graph = extract_compiled_graph(module, (torch.randn(2, 3, requires_grad=True),))
            self.assertEqual(packed, [])
            x = torch.randn(2, 3, requires_grad=True)
            (want,) = torch.autograd.grad(module(x).sum(), x)
            count = len(packed)
            self.assertTrue(count)
            (got,) = torch.autograd.grad(graph(x).sum(), x)
            self.assertGreater(len(packed), count)
        self.assertTrue(torch.equal(want, got))

    def test_of_the_program(self) -> None:
        def program(x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2 + 1):
                return x.exp()

        check(stateless(program), floats((3,), leaf=True))


if __name__ == "__main__":
    unittest.main()
