"""The programs that are timed: each a module in eval mode and fresh arguments for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
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


class Mlp(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(depth):
            self.layers.append(nn.Linear(width, width)).append(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GuardedMlp(Mlp):
    """The same layers behind a branch on the input's values."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layers(x)
        return -x


class BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mixed = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = self.mixed(attended.transpose(1, 2).flatten(-2))
        x = self.attention_norm(x + self.dropout(mixed))
        return self.output_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """BERT's encoder: token ids and attention mask (batch, length) -> hidden states, pooled."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(depth))
        self.pooler = nn.Linear(width, width)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.norm(self.words(ids) + self.positions(position)))
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, bias)
        return x, torch.tanh(self.pooler(x[:, 0]))


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: `make()` gives it the same weights each time, `inputs()` draws arguments."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


def _bert_inputs() -> tuple[Tensor, Tensor]:
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, 12:] = 0
    return torch.randint(100, (1, 16)), mask


CASES: dict[str, Case] = {
    "sub": Case(Sub, lambda: (torch.randn(2, 3), torch.randn(2, 3))),
    "chain": Case(Chain, lambda: (torch.randn(64),)),
    # Positive numbers: the branch of the guarded one always goes the same way.
    "mlp": Case(lambda: Mlp(64, 8), lambda: (torch.rand(16, 64),)),
    "mlp_guard": Case(lambda: GuardedMlp(64, 8), lambda: (torch.rand(16, 64),)),
    "bert": Case(lambda: Bert(32, 2, 2, 100, 16), _bert_inputs),
}

GUARDED = {"mlp_guard": "mlp"}  # A case with a data guard -> the same without it.
