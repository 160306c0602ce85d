"""What a call costs before anything runs: whether it is like the one that was captured.

    python tools/benchmark/match.py
    python3.13 tools/benchmark/match.py

Prints, for a module of 1 block and for one of 100, the median microseconds of `match`, and of the
same after a store to an attribute, when one dictionary has to be looked through.
"""

import functools
import statistics
import sys
import time

import torch
from torch import nn

import torch_lazy_ext


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.linear(self.norm(x))


def median(call, before=lambda: None, rounds: int = 30, times: int = 20) -> float:
    """Microseconds of a call, of which the fastest of `times` counts in each round."""
    found = []
    for _ in range(rounds):
        best = float("inf")
        for _ in range(times):
            before()
            start = time.perf_counter_ns()
            call()
            best = min(best, time.perf_counter_ns() - start)
        found.append(best / 1000)
    return statistics.median(found)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    x = torch.randn(2, 8)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    for blocks in (1, 100):
        model = nn.Sequential(*(Block() for _ in range(blocks)))
        graph = torch_lazy_ext.extract_compiled_graph(model, (x,))
        graph(x)
        (variant,) = graph.specializations
        match = functools.partial(variant.match, (x,), {})
        unchanged = median(match)
        changed = median(match, functools.partial(setattr, model[0], "scale", 0.5))
        assert match() is not None
        print(f"{blocks} blocks: {unchanged:.2f} us, {changed:.2f} us after a store")


if __name__ == "__main__":
    main()
