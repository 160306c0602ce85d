#!/usr/bin/env python3
"""Times extracted graphs beside eager, jit.trace + freeze and torch.compile, in one process.

    python tools/benchmark/benchmark.py
    python tools/benchmark/benchmark.py --models mlp mlp_guard --contestants lazy --rounds 500
    python tools/benchmark/benchmark.py --contestants lazy compile compile-fastest --json out.json

Prints, for inference without gradients:

* microseconds per call: the median of rounds in which all contestants on all models take turns,
  and the ratio to eager (below 1 is faster than eager), with the geometric mean of the ratios;
* what a data guard costs: the time of a model with one over the time of the same model without;
* seconds from a module to its first result, and the ratio to torch.compile. Caches on disk are
  empty, and each contestant has built another program before, so that imports do not count.

Before a contestant is timed, its results on fresh arguments are compared with eager's; a difference
ends the benchmark with an error.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import DEFAULT_NAMES, EAGER, NAMES, Contestant, choose
from models import CASES, GUARDED, Case
from torch import nn
from torch._inductor.utils import fresh_cache


@dataclasses.dataclass
class Result:
    """One contestant on one model."""

    build_s: float
    round_us: list[float] = dataclasses.field(default_factory=list)

    @property
    def call_us(self) -> float:
        return statistics.median(self.round_us)


Results = dict[str, dict[str, Result]]  # Model -> contestant -> result.


def time_calls(fn: Callable[..., Any], args: tuple[Any, ...], calls: int) -> float:
    """Seconds that `calls` calls take."""
    begin = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        fn(*args)
    return time.perf_counter() - begin


def calls_in(seconds: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """How many calls take at least `seconds`. Counting them warms `fn` up."""
    calls = 1
    while (took := time_calls(fn, args, calls)) < seconds:
        calls = max(2 * calls, int(calls * seconds / took))
    return calls


def timed_build(
    contestant: Contestant, model: nn.Module, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], float]:
    """What the contestant makes of `model`, and the median of the seconds to its first result."""
    times = []
    for fresh in [copy.deepcopy(model) for _ in range(contestant.builds)]:
        with fresh_cache():
            begin = time.perf_counter()
            fn = contestant.first_result(fresh, args)
            times.append(time.perf_counter() - begin)
    return fn, statistics.median(times)


def build(case: Case, contestant: Contestant, args: tuple[Any, ...]) -> tuple[Any, float]:
    """A contestant's callable for `case`, compared with eager, and its seconds to a first result.

    Raises AssertionError where its results on fresh arguments are not eager's.
    """
    model = case.make()
    fn, seconds = timed_build(contestant, model, args)
    fresh_args = case.inputs()
    torch.testing.assert_close(fn(*fresh_args), model(*fresh_args), rtol=1e-4, atol=1e-5)
    return fn, seconds


def measure(
    models: list[str], contestants: list[Contestant], rounds: int, min_time: float
) -> Results:
    """Build and check every contestant on every model, then time all of them in turns.

    Args:
        models: keys of `CASES`.
        rounds: how often each is timed.
        min_time: seconds that one round of one contestant on one model takes at least.
    """
    results: Results = {}
    timed = []
    for name in models:
        results[name] = {}
        args = CASES[name].inputs()
        for contestant in contestants:
            print(f"building {name}: {contestant.name}", flush=True)
            fn, build_s = build(CASES[name], contestant, args)
            result = results[name][contestant.name] = Result(build_s)
            timed.append((result, fn, args, calls_in(min_time, fn, args)))

    print(f"timing {rounds} rounds", flush=True)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for result, fn, args, calls in timed:
                result.round_us.append(time_calls(fn, args, calls) / calls * 1e6)
    finally:
        gc.enable()
    return results


def call_ratios(results: Results) -> dict[str, float]:
    """The geometric mean over all models of time / eager's time, by contestant."""
    by_contestant: dict[str, list[float]] = {}
    for row in results.values():
        for name, result in row.items():
            by_contestant.setdefault(name, []).append(result.call_us / row[EAGER.name].call_us)
    return {name: statistics.geometric_mean(ratios) for name, ratios in by_contestant.items()}


def guard_ratios(results: Results) -> dict[str, dict[str, float]]:
    """For each guarded model whose plain model was timed: time / the plain one's, by contestant."""
    return {
        guarded: {
            name: result.call_us / results[plain][name].call_us
            for name, result in results[guarded].items()
        }
        for guarded, plain in GUARDED.items()
        if guarded in results and plain in results
    }


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A title, then columns as wide as they need to be, the first one flush left."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    print(f"\n{title}\n")
    for row in table:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))


def report(results: Results) -> None:
    """Print the tables of the module's docstring."""
    means = call_ratios(results)
    names = list(means)
    rows = [
        [model]
        + [f"{r.call_us:.1f} ({r.call_us / row[EAGER.name].call_us:.2f})" for r in row.values()]
        for model, row in results.items()
    ]
    rows.append(["geometric mean", *(f"({ratio:.2f})" for ratio in means.values())])
    print_table("microseconds per call (ratio to eager)", ["model", *names], rows)

    guards = guard_ratios(results)
    if guards:
        rows = [
            [f"{guarded} / {GUARDED[guarded]}", *(f"{ratio:.2f}" for ratio in row.values())]
            for guarded, row in guards.items()
        ]
        print_table("cost of a data guard", ["models", *names], rows)

    rows = []
    for model, row in results.items():
        base = row["compile"].build_s if "compile" in row else math.nan
        builds = [r.build_s for name, r in row.items() if name != EAGER.name]
        rows.append([model, *(f"{s:.4f} ({s / base:.4f})" for s in builds)])
    print_table("seconds to the first result (ratio to compile)", ["model", *names[1:]], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=NAMES,
        default=DEFAULT_NAMES,
        help=f"who is timed beside eager; default: {' '.join(DEFAULT_NAMES)}",
    )
    parser.add_argument(
        "--backend",
        nargs="+",
        default=["torchscript"],
        help="the backends of torch_lazy_ext to time; default: torchscript",
    )
    parser.add_argument("--rounds", type=int, default=100, help="default: 100")
    parser.add_argument(
        "--min-time",
        type=float,
        default=0.005,
        metavar="SECONDS",
        help="the least a round of one contestant takes; default: 0.005",
    )
    parser.add_argument("--threads", type=int, default=1, help="of each operator; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    try:
        contestants = choose(options.contestants, options.backend)
    except ValueError as e:
        parser.error(str(e))

    torch.set_num_threads(options.threads)
    with torch.no_grad():
        for contestant in contestants:
            contestant.first_result(nn.Tanh().eval(), (torch.zeros(3),))
        results = measure(options.models, contestants, options.rounds, options.min_time)
    report(results)

    if options.json:
        document = {
            "torch": torch.__version__,
            "threads": options.threads,
            "models": {
                model: {
                    name: {"call_us": result.call_us, **dataclasses.asdict(result)}
                    for name, result in row.items()
                }
                for model, row in results.items()
            },
            "geometric_mean": call_ratios(results),
            "guard_ratio": guard_ratios(results),
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
