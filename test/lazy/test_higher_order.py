# Owner(s): ["oncall: jit"]

"""Programs that call what PyTorch compiles on its own: control flow, flex_attention, torch.compile."""

import unittest
from typing import Any

import torch
from functorch.experimental.control_flow import map as control_flow_map
from oracle import makefunctiontest, maketest, tensors
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, cond, scan, while_loop
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def with_gradients(*shapes: tuple[int, ...]) -> Any:
    return lambda: tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def sums(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return carry + x, (carry * x).sin()


PROGRAMS = {
    "cond": lambda x: cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "torch_cond": lambda x: torch.cond(x.sum() > 0, lambda t: t.sin() * t, torch.cos, (x,)),
    "cond_of_cond": lambda x: cond(
        x[0, 0] > 0, lambda t: cond(t[0, 1] > 0, torch.exp, torch.neg, (t,)), torch.cos, (x,)
    ),
    "while_loop": lambda x: while_loop(
        lambda i, t: i < 3, lambda i, t: (i + 1, t * 2), (torch.tensor(0), x.detach())
    ),
    "map": lambda x: control_flow_map(lambda row: row.sin() * 2, x),
    "map_with_argument": lambda x: control_flow_map(lambda row, a: row * a, x, x[0].sum()),
    "scan": lambda x: scan(sums, torch.zeros(3), x, dim=0),
    "scan_reversed": lambda x: scan(sums, torch.ones(2), x, dim=1, reverse=True),
    "associative_scan": lambda x: associative_scan(torch.add, x, 0, combine_mode="generic"),
}


class ControlFlowTest(unittest.TestCase):
    """By name or as an attribute of torch, with and without gradients: the operators of a body."""


WAYS = {"cond": 2, "torch_cond": 2, "cond_of_cond": 3}  # each branch is a graph

for _name, _program in PROGRAMS.items():
    _captures = WAYS.get(_name, 1)
    setattr(
        ControlFlowTest,
        f"test_{_name}",
        makefunctiontest(_program, tensors((2, 3)), captures=_captures),
    )
    if _name != "while_loop":
        setattr(
            ControlFlowTest,
            f"test_{_name}_with_gradients",
            makefunctiontest(_program, with_gradients((2, 3)), captures=_captures),
        )

CAUSAL = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")


class FlexAttentionTest(unittest.TestCase):
    test_plain = makefunctiontest(flex_attention, tensors((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)))
    test_score_mod = makefunctiontest(
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)),
        tensors((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
    )
    test_block_mask = makefunctiontest(
        lambda q, k, v: flex_attention(q, k, v, block_mask=CAUSAL),
        tensors((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 4)),
    )


INNER = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), backend="eager")


@torch.compile(backend="eager")
def branching(x: Tensor) -> Tensor:
    return x.sin() if x.sum() > 0 else x - 1


@torch.compile(backend="eager", fullgraph=True)
def whole(x: Tensor) -> Tensor:
    return x.sin() * 2


class CompiledFunctionTest(unittest.TestCase):
    """A function of torch.compile in the program is recorded as it was before it was compiled."""

    test_module = makefunctiontest(lambda x: INNER(x) * 2, tensors((2, 3)))
    test_full_graph = makefunctiontest(lambda x: whole(x) + whole(-x), tensors((2, 3)))
    test_compiled_inside = makefunctiontest(
        lambda x: torch.compile(torch.cos, backend="eager")(x) * 2, tensors((2, 3))
    )
    test_branch = makefunctiontest(lambda x: branching(x) + 1, tensors((2, 3)), captures=2)

    def test_compiles_again_afterwards(self) -> None:
        """What the capture switched off is on again, and nothing of it stays in the compiler."""
        import torch_lazy_ext

        compiled = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        function = torch.compile(lambda x: x.cos(), backend=backend)
        graph = torch_lazy_ext.extract_compiled_graph(lambda x: function(x), (torch.ones(2),))
        x = torch.randn(2)
        torch.testing.assert_close(graph(x), x.cos(), rtol=0, atol=0)
        self.assertEqual(len(compiled), 0)
        function(x)
        self.assertEqual(len(compiled), 1)


class QuantizationAwareTest(unittest.TestCase):
    """Fake quantization: observers that resize their buffers in the first step."""

    def check(self, inputs: Any) -> None:
        from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

        def make() -> nn.Module:
            module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).train()
            module.qconfig = get_default_qat_qconfig("fbgemm")
            return prepare_qat(module)

        maketest(make, inputs, captures=2)(self)  # the first call gives shapes to the observers

    def test_first_module(self) -> None:
        self.check(tensors((4, 4)))

    def test_second_module(self) -> None:
        self.check(tensors((4, 4)))
        self.check(tensors((4, 4)))

    def test_operator_with_gradients(self) -> None:
        def program(x, low, high, scale, zero_point, on):
            return torch.fused_moving_avg_obs_fake_quant(
                x, on, on, low, high, scale, zero_point, 0.01, 0, 255, 0, False
            )

        makefunctiontest(
            program,
            lambda: (
                torch.randn(4, 4, requires_grad=True),
                torch.tensor(float("inf")),
                torch.tensor(-float("inf")),
                torch.ones(1),
                torch.zeros(1, dtype=torch.int32),
                torch.tensor([1]),
            ),
            poke=False,
        )(self)


class LegacyConstructorTest(unittest.TestCase):
    """torch.LongTensor and its like read the tensors in a list."""

    test_integers = makefunctiontest(
        lambda x: torch.LongTensor([x.max(), 3]) * x, lambda: (torch.randint(0, 9, (3,)),)
    )
    # What is read is guarded.
    test_floats = makefunctiontest(
        lambda x: torch.FloatTensor([[x[0], 3.0]]) + 1, tensors((3,)), captures=4
    )
    test_tensor = makefunctiontest(
        lambda x: torch.Tensor([x[0], x[1]]) + x[:2], tensors((3,)), captures=4
    )
    test_new = makefunctiontest(lambda x: x.new([x[0], 1.0]) + x[1:], tensors((3,)), captures=4)
    test_new_of_sizes = makefunctiontest(
        lambda x: x.new(torch.Size([2, 3])).zero_() + x.new(2, 3).zero_() + x, tensors((3,))
    )
    test_sizes = makefunctiontest(lambda x: torch.FloatTensor(2, 3).fill_(1) * x, tensors((3,)))


class MetaTensorTest(unittest.TestCase):
    """Tensors without memory: as arguments, made inside, returned."""

    test_argument = makefunctiontest(
        lambda m, x: (m.view(-1).shape[0] + x, m * 2),
        lambda: (torch.empty(2, 3, device="meta"), torch.randn(3)),
        poke=False,
    )
    test_made_inside = makefunctiontest(
        lambda x: x.reshape(torch.empty(x.shape, device="meta").t().shape), tensors((2, 3))
    )
    test_result = makefunctiontest(lambda x: (x + 1, x.to("meta")), tensors((2, 3)))


class CopyTest(unittest.TestCase):
    """copy.copy of a tensor: another one over the same memory."""

    def test_writes_are_seen(self) -> None:
        import copy

        def program(x):
            y = copy.copy(x)
            y.add_(1)
            return x * 2, y

        makefunctiontest(program, tensors((2, 3)))(self)

    def test_attributes(self) -> None:
        import copy

        def program(x):
            y = x * 2
            y.mark = 3
            return copy.copy(y) * copy.copy(y).mark

        makefunctiontest(program, tensors((2, 3)))(self)


if __name__ == "__main__":
    unittest.main()
