"""Two real training loops, eager and extracted side by side.

    python tools/examples/training.py conv --steps 300
    python tools/examples/training.py gpt --steps 300 --plot losses.svg

`conv` is a small conv net with batch norm that tells made-up pictures apart; `gpt` is a language
model of two layers that learns the text of Python's own documentation topics, character by
character. Both train twice from the same weights on the same batches, once eagerly and once as one
graph per step, and print both losses. With `--plot`, and matplotlib, both curves are drawn.
"""

import argparse
import pydoc_data.topics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_lazy_ext import extract_compiled_graph


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def stripes() -> tuple[Tensor, Tensor]:
    """Noisy pictures, float32 [32, 1, 16, 16], of stripes in one of four directions, int64 [32]."""
    direction = torch.randint(0, 4, (32,))
    angle = direction * torch.pi / 4
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    across = rows * angle.cos().view(-1, 1, 1) + columns * angle.sin().view(-1, 1, 1)
    return (across.sin() + torch.randn(32, 16, 16)).unsqueeze(1), direction


class GPT(nn.Module):
    def __init__(self, symbols: int, context: int = 32, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens) + self.position
        return self.head(self.layers(h, mask=self.mask, is_causal=True)).transpose(1, 2)


def text() -> tuple[int, Callable[[], tuple[Tensor, Tensor]]]:
    """How many symbols there are, and what makes batches: int64 [16, 32] and the next symbols."""
    corpus = "".join(pydoc_data.topics.topics.values())
    symbols = {c: i for i, c in enumerate(sorted(set(corpus)))}
    data = torch.tensor([symbols[c] for c in corpus])

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(0, len(data) - 33, (16, 1))
        window = data[starts + torch.arange(33)]
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    return len(symbols), batch


def train(
    make: Callable[[], nn.Module],
    batch: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    extracted: bool,
) -> tuple[list[float], float]:
    """The losses, and how long the steps took in seconds, without the first two."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    step = extract_compiled_graph(train_step, batch()) if extracted else train_step
    losses = []
    begin = 0.0
    for i in range(steps):
        if i == 2:
            begin = time.perf_counter()
        torch.manual_seed(i)
        losses.append(step(*batch()).item())
        scheduler.step()
    return losses, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=["conv", "gpt"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", help="draw both curves to this file")
    options = parser.parse_args()
    if options.model == "conv":
        make, batch = Conv, stripes
    else:
        symbols, batch = text()
        make = lambda: GPT(symbols)  # noqa: E731
    curves = {}
    for name, extracted in (("eager", False), ("extracted", True)):
        curves[name], seconds = train(make, batch, options.steps, extracted)
        print(
            f"{name}: loss {curves[name][0]:.4f} -> {curves[name][-1]:.4f}, "
            f"{(options.steps - 2) / seconds:.1f} steps per second"
        )
    apart = max(abs(a - b) for a, b in zip(*curves.values()))
    print(f"largest difference of the two losses at any step: {apart:.2g}")
    if options.plot:
        import matplotlib.pyplot as plt

        plt.plot(curves["eager"], label="eager", linewidth=3, alpha=0.5)
        plt.plot(curves["extracted"], "--", label="extracted", linewidth=1)
        plt.xlabel("step")
        plt.ylabel("loss")
        plt.legend()
        plt.savefig(options.plot)


if __name__ == "__main__":
    main()
