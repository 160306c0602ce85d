"""The programs that are timed: each a module in eval mode and arguments for it.

The architectures are those of the transformers library, with random weights; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Sub(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


class Chain(nn.Module):
    """Twenty elementwise operators, each on the result of the one before."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * 1.25
            x = x + 0.5
            x = torch.tanh(x)
            x = torch.relu(x)
        return x


class Steps(nn.Module):
    """`count` elementwise operators."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = torch.sin(x) if i % 2 else x * 1.25
        return x


class Parameters(nn.Module):
    """One operator on `count` parameters, which are empty: it passes over them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.empty(0) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *self.parts])


class Guarded(nn.Module):
    """Looks at its data before it does what the other model does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 0:
            raise ValueError("the input is negative")
        return self.model(x)


class Tensors(nn.Module):
    """The tensors that a transformers model returns, in a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        out = self.model(*args, return_dict=False)
        return tuple(t for t in out if isinstance(t, Tensor))


def mlp() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(*layers)


def transformer(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A model of the transformers library, by its class and the arguments of its config."""

    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        return Tensors(cls(cls.config_class(**config)))

    return make


def ids(length: int, vocabulary: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(vocabulary, (1, length)),)


def image(size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(1, 3, size, size),)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: `make()` gives it the same weights each time, `inputs()` draws arguments."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    large: bool = False

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


WIDTH = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)

CASES: dict[str, Case] = {
    "a - b": Case(Sub, lambda: (torch.randn(2, 3), torch.randn(2, 3))),
    "chain of 20, 64": Case(Chain, lambda: (torch.randn(64),)),
    "chain of 20, 1M": Case(Chain, lambda: (torch.randn(1_000_000),)),
    "MLP, 8 layers": Case(mlp, lambda: (torch.rand(16, 64),)),
    "BERT, 2 layers of 32": Case(
        transformer("BertModel", vocab_size=99, max_position_embeddings=32, **WIDTH), ids(16, 99)
    ),
    "ViT, 2 layers of 32": Case(
        transformer("ViTModel", image_size=32, patch_size=8, **WIDTH), image(32)
    ),
    "Llama, 2 layers of 32": Case(
        transformer(
            "LlamaModel", vocab_size=99, max_position_embeddings=32, use_cache=False, **WIDTH
        ),
        ids(16, 99),
    ),
    "BERT, 6 layers of 768": Case(
        transformer("BertModel", num_hidden_layers=6), ids(128, 30522), large=True
    ),
    "ResNet-50, 224": Case(transformer("ResNetModel"), image(224), large=True),
    "GPT-2, 6 layers": Case(
        transformer("GPT2Model", n_layer=6, use_cache=False), ids(64, 50257), large=True
    ),
}
