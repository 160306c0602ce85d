# Owner(s): ["oncall: jit"]

"""What the C++ call path does that Python cannot see: memory used again, guards that trust
version counts of dictionaries, results put together without Python."""

import itertools
import math
import unittest
from typing import Any

import torch
from oracle import makefunctiontest, maketest, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from torch_lazy_ext import extract_compiled_graph


def chain(x: Tensor) -> Tensor:
    return (x * 2 + 1).relu().sigmoid()


def chain_on_argument(x: Tensor) -> Tensor:
    return x.relu().neg()


def keeps_intermediate(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y, y + 1


def keeps_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y[0], (y + 1).relu()


def computes_on_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y.t() + 1, y


def uses_twice(x: Tensor) -> Tensor:
    y = x * 2
    return (y + y) * (y * y)


def broadcasts_up(x: Tensor) -> Tensor:
    return (x[0] * 2) + x


def promotes(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x > 0) + 1, (x > 0) * 0.5


def changes_strides(x: Tensor) -> Tensor:
    return (x * 2) + (x + 1).t().contiguous().t()


def eval_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        for t in (*norm.parameters(), norm.running_mean, norm.running_var):
            t.uniform_(0.5, 2)
    return norm


class NormalizesTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = eval_batch_norm(), eval_batch_norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x + 1)).relu()


class KeepsBeforeNorm(NormalizesTwice):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x + 1
        z = y * 2
        return y, self.first(y), self.second(z.view_as(z)) + z[0]


class NormalizesPermuted(NormalizesTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.first((x + 1).permute(0, 3, 1, 2))


class MemoryReuseTest(unittest.TestCase):
    """A pointwise operator computes in its first operand's memory when nobody else has it."""

    test_chain = makefunctiontest(chain, tensors((3, 4)))
    test_chain_on_argument = makefunctiontest(chain_on_argument, tensors((3, 4)))
    test_keeps_intermediate = makefunctiontest(keeps_intermediate, tensors((3, 4)))
    test_keeps_view = makefunctiontest(keeps_view, tensors((3, 4)))
    test_computes_on_view = makefunctiontest(computes_on_view, tensors((3, 4)))
    test_uses_twice = makefunctiontest(uses_twice, tensors((3, 4)))
    test_broadcasts_up = makefunctiontest(broadcasts_up, tensors((3, 4)))
    test_promotes = makefunctiontest(promotes, tensors((3, 4)))
    test_changes_strides = makefunctiontest(changes_strides, tensors((3, 4)))

    test_batch_norm = maketest(NormalizesTwice, tensors((2, 3, 4, 5)))
    test_batch_norm_of_kept = maketest(KeepsBeforeNorm, tensors((2, 3, 4, 5)))
    test_batch_norm_of_argument = maketest(eval_batch_norm, tensors((2, 3, 4, 5)))
    test_batch_norm_of_permuted = maketest(NormalizesPermuted, tensors((2, 4, 5, 3)))

    def test_it_happens(self) -> None:
        """A long chain over a large tensor needs the memory of two tensors, not of twenty."""

        def deep(x: Tensor) -> Tensor:
            for _ in range(20):
                x = x + 1
            return x

        x = torch.zeros(1 << 16)
        graph = extract_compiled_graph(deep, (x,))
        graph(x)
        with torch.profiler.profile(profile_memory=True) as profile:
            graph(x)
        names = [e.key for e in profile.key_averages()]
        self.assertIn("aten::add_", names)
        allocated = sum(e.self_cpu_memory_usage for e in profile.events())
        self.assertLessEqual(allocated, 2 * x.nbytes)


def special_values(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Makes numbers of which many are equal, with nans, infinities and zeros of both signs."""

    def make() -> tuple[Tensor]:
        special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, -1.0])
        picked = special[torch.randint(len(special), shape)]
        return (torch.where(torch.rand(shape) < 0.1, picked, torch.randn(shape)).to(dtype),)

    return make


POOLS = {
    "padding": lambda x: F.max_pool2d(x, 3, 2, 1),
    "overlap": lambda x: F.max_pool2d(x, 3, 1),
    "ceil": lambda x: F.max_pool2d(x, (3, 2), 3, 1, ceil_mode=True),
    "dilation": lambda x: F.max_pool2d(x, 2, 2, 0, (2, 3)),
    "indices": lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
    "permuted": lambda x: F.max_pool2d(x.transpose(2, 3), 3, 2),
    "sliced": lambda x: F.max_pool2d(x[:, 1:], 3, 2),
    "without_batch": lambda x: F.max_pool2d(x[0], 3, 2),
    "of_result": lambda x: F.max_pool2d(x * 2, 3, 2).relu(),
    "to_nothing": lambda x: F.max_pool2d(x[:0], 3, 2),
}
SIZES = {"many_channels": (2, 16, 17, 15), "few_channels": (2, 3, 40, 39), "small": (1, 16, 5, 6)}


class MaxPoolTest(unittest.TestCase):
    """Of many channels it is computed with the channels last, and looks as if it were not."""

    def test_it_happens(self) -> None:
        (x,) = special_values(SIZES["many_channels"], torch.float32)()
        graph = extract_compiled_graph(POOLS["padding"], (x,))
        graph(x)
        with torch.profiler.profile() as profile:
            graph(x)
        self.assertEqual([e.count for e in profile.key_averages() if e.key == "aten::copy_"], [2])


for (_name, _pool), (_size, _shape), _dtype in itertools.product(
    POOLS.items(), SIZES.items(), (torch.float32, torch.float64, torch.bfloat16)
):
    setattr(
        MaxPoolTest,
        f"test_{_name}_{_size}_{str(_dtype).removeprefix('torch.')}",
        makefunctiontest(_pool, special_values(_shape, _dtype)),
    )


class Counter(nn.Module):
    """Attributes of several kinds, each of which decides something."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.parts = [1, 2]
        self.options: dict[str, Any] = {"shift": 1.0}
        self.weight = nn.Parameter(torch.ones(3))
        self.sub = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sub(x) * self.scale + self.options["shift"]
        return y * self.parts[-1] * self.weight


class DictionaryVersionTest(unittest.TestCase):
    """A change is seen although dictionaries are not looked through on each call."""

    def sequence(self, change: Any) -> None:
        torch.manual_seed(0)
        module = Counter()
        with torch.no_grad():
            graph = extract_compiled_graph(module, (torch.randn(2, 3),))
            for i in range(6):
                change(module, i)
                x = torch.randn(2, 3)
                torch.testing.assert_close(graph(x), module(x), rtol=0, atol=0)

    def test_attribute(self) -> None:
        self.sequence(lambda m, i: setattr(m, "scale", float(i // 2)))

    def test_equal_attribute(self) -> None:
        module = Counter()
        with torch.no_grad():
            graph = extract_compiled_graph(module, (torch.randn(2, 3),))
            for _ in range(4):
                module.scale = float("2.0")  # another object
                graph(torch.randn(2, 3))
        self.assertEqual([s.hits for s in graph.specializations], [4])

    def test_item_of_list(self) -> None:
        self.sequence(lambda m, i: m.parts.__setitem__(1, i // 2))

    def test_list_grows(self) -> None:
        self.sequence(lambda m, i: m.parts.append(i))

    def test_item_of_dict(self) -> None:
        self.sequence(lambda m, i: m.options.update(shift=float(i // 2)))

    def test_parameter_replaced(self) -> None:
        self.sequence(lambda m, i: setattr(m, "weight", nn.Parameter(torch.full((3,), float(i)))))

    def test_parameter_of_other_shape(self) -> None:
        def change(m: Counter, i: int) -> None:
            m.weight = nn.Parameter(torch.ones(3 if i % 2 else 1))

        self.sequence(change)

    def test_data_of_other_shape(self) -> None:
        """The parameter stays the same object in the same dictionary."""

        def change(m: Counter, i: int) -> None:
            m.weight.data = torch.ones(3 if i % 2 else 1)

        self.sequence(change)

    def test_submodule_replaced(self) -> None:
        self.sequence(lambda m, i: setattr(m, "sub", nn.Linear(3, 3, bias=bool(i % 2))))

    def test_forward_hook(self) -> None:
        def change(m: Counter, i: int) -> None:
            if i == 2:
                m.sub.register_forward_hook(lambda _m, _a, out: out + 1)

        self.sequence(change)


class NativeResultTest(unittest.TestCase):
    test_nested = makefunctiontest(
        lambda x: {"a": [x + 1, (x, None)], "b": {"c": 3, 4: x * 2}}, tensors((2, 3))
    )
    test_one_list_twice = maketest(lambda: _one_list_twice, tensors((2, 3)))


def _one_list_twice(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    both = [x + 1]
    return both, both


class ManyVariantsTest(unittest.TestCase):
    """Which variant answers is told by a number for the arguments, and then compared."""

    def test_in_turn(self) -> None:
        def program(x, n, *rest, **named):
            return x * (n if isinstance(n, int) else 3) + sum(rest) + named.get("y", 0)

        x = torch.arange(4.0)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((x, 1), {}),
            ((x, True), {}),
            ((x, "1"), {}),
            ((x, None), {}),
            ((x, -1), {}),
            ((x, -2), {}),
            ((x.view(2, 2), 1), {}),
            ((x.double(), 1), {}),
            ((x.view(2, 2).t(), 1), {}),
            ((nn.Parameter(x.clone()), 1), {}),
            ((x, 1, x), {}),
            ((x, 1, torch.ones(4)), {}),
            ((x, 1, torch.ones(1)), {}),
            ((x, 1), {"y": x}),
            ((x, 1), {"y": torch.ones(1)}),
            ((x[:0], 1), {}),
            ((x[0], 1), {}),
        ]
        graph = extract_compiled_graph(program, calls[0][0])
        for _ in range(3):
            for args, kwargs in [*calls, *reversed(calls)]:
                got, want = graph(*args, **kwargs), program(*args, **kwargs)
                self.assertEqual((got.tolist(), got.dtype), (want.tolist(), want.dtype))
                self.assertEqual(got.requires_grad, want.requires_grad)
        self.assertEqual(len(graph.specializations), len(calls))
        variants = graph.specializations
        self.assertEqual(len({id(v) for v in variants}), len(calls))
        self.assertEqual(sum(v.hits for v in variants), 6 * len(calls))
        # The last ones come first.
        graph(*calls[3][0], **calls[3][1])
        first = graph.specializations[0]
        self.assertEqual(first.hits, 7)
        self.assertEqual(
            [v for v in graph.specializations if v is not first],
            [v for v in variants if v is not first],
        )

    def test_dropped_ones(self) -> None:
        graph = extract_compiled_graph(lambda x: x + 1, (torch.ones(1),), limit=3)
        for _ in range(3):
            for i in range(1, 6):
                self.assertEqual(graph(torch.ones(i)).tolist(), [2.0] * i)
        self.assertEqual(len(graph.specializations), 3)
        graph(torch.ones(3))
        self.assertEqual(graph(torch.ones(3)).tolist(), [2.0] * 3)


if __name__ == "__main__":
    unittest.main()
