# Owner(s): ["oncall: jit"]

"""What the C++ call path does that Python cannot see: memory used again, guards that trust
version counts of dictionaries, results put together without Python."""

import unittest
from typing import Any

import torch
from oracle import makefunctiontest, maketest, tensors
from torch import Tensor, nn

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


if __name__ == "__main__":
    unittest.main()
