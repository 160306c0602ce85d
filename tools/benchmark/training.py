#!/usr/bin/env python3
"""Times forward and backward of extracted graphs beside eager and torch.compile, in one process.

    python tools/benchmark/training.py
    python tools/benchmark/training.py --models resnet --rounds 200

Prints two tables, as they stand in README.md: microseconds for a forward in train mode and the
backward of its mean square, the median of rounds in which all take turns; and seconds from a module
to its first gradients, with nothing compiled before. Before anyone is timed, its gradients on fresh
arguments are compared with eager's; a difference ends the benchmark with an error. Dropout is off,
since torch.compile draws other masks.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import CASES, Case
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import torch_lazy_ext

Step = Callable[..., None]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(y)))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16) for _ in range(3)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


TRAINED = {
    "mlp": CASES["MLP, 8 layers"],
    "bert": CASES["BERT, 2 layers of 32"],
    "resnet": Case(resnet, lambda: (torch.randn(2, 3, 16, 16),)),
}

TITLES = {
    "mlp": "MLP, 8 layers",
    "bert": "BERT, 2 layers of 32",
    "resnet": "ResNet, 3 blocks of 16",
}

CONTESTANTS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Any]] = {
    "eager": lambda model, args: model,
    "compile": lambda model, args: torch.compile(model, isolate_recompiles=True),
    "ours, torchscript": torch_lazy_ext.extract_compiled_graph,
    "ours, inductor": functools.partial(torch_lazy_ext.extract_compiled_graph, backend="inductor"),
}


def module_of(case: Case) -> nn.Module:
    module = case.make().train()
    for dropout in (m for m in module.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    return module


def step_of(fn: Any, module: nn.Module) -> Step:
    """Forward and backward; gradients as an optimizer would find them."""
    parameters = list(module.parameters())

    def step(*args: Any) -> None:
        for p in parameters:
            p.grad = None
        results = fn(*args)
        results = results if isinstance(results, tuple) else (results,)
        sum(r.pow(2).mean() for r in results).backward()

    return step


def build(name: str, case: Case, args: tuple[Any, ...]) -> tuple[Step, float]:
    """A contestant's step, compared with eager's, and the seconds to its first gradients."""
    module = module_of(case)
    oracle = copy.deepcopy(module)
    with fresh_cache():
        begin = time.perf_counter()
        step = step_of(CONTESTANTS[name](module, args), module)
        step(*args)
        seconds = time.perf_counter() - begin
        expected = step_of(oracle, oracle)
        fresh = case.inputs()
        for each in (step, expected):
            each(*fresh)
    for got, want in zip(module.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5)
    return step, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=100, help="default: 100")
    parser.add_argument("--calls", type=int, default=5, help="in one round; default: 5")
    parser.add_argument("--threads", type=int, default=1, help="of each operator; default: 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["eager", *(n for n in options.contestants if n != "eager")]

    steps: dict[tuple[str, str], tuple[Step, tuple[Any, ...]]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for model in options.models:
        args = TRAINED[model].inputs()
        for name in names:
            print(f"building {model}: {name}", flush=True)
            step, seconds[model, name] = build(name, TRAINED[model], args)
            steps[model, name] = step, args
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    print(f"timing {options.rounds} rounds", flush=True)
    gc.collect()
    for _ in range(options.rounds):
        for key, (step, args) in steps.items():
            begin = time.perf_counter()
            for _ in itertools.repeat(None, options.calls):
                step(*args)
            times[key].append((time.perf_counter() - begin) / options.calls * 1e6)

    columns = f"| {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}"
    print(f"\n| microseconds for forward and backward {columns}")
    for model in options.models:
        cells = [f"{statistics.median(times[model, name]):,.0f}" for name in names]
        print(f"| {TITLES[model]} | {' | '.join(cells)} |")
    print(f"\n| seconds to the first gradients {columns}")
    for model in options.models:
        print(f"| {TITLES[model]} | {' | '.join(f'{seconds[model, n]:.3g}' for n in names)} |")


if __name__ == "__main__":
    main()
