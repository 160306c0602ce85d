#!/usr/bin/env python3
"""Times extracted graphs beside eager, jit.trace + freeze and torch.compile.

    pip install -e '.[test]' matplotlib
    python tools/benchmark/benchmark.py
    python tools/benchmark/benchmark.py --only "a - b" "MLP, 8 layers" --rounds 100
    python tools/benchmark/benchmark.py --only scaling
    python tools/benchmark/benchmark.py --report

Measures inference without gradients, one thread for the small models and two for the large ones,
and writes tools/benchmark/results/: results.json, table.md and results.svg. What results.json holds
already is not measured again (--again does), so that a run that was broken off goes on, model by
model. --report only writes table and plot.

For each model:

* microseconds per call: one process builds every contestant, compares its results with eager's, and
  times all of them in turns; the median of the rounds counts;
* cold build: seconds from the module to its first result in that process. Inductor's cache on disk
  is empty but for what any program needs (headers), and each contestant has built another program
  before, so that imports do not count;
* warm build: the same in a second process, with the cache that the first one left;
* peak memory, for the large models: MiB of resident memory above what the process had before it
  made the model, at most, while the built contestant is called; each contestant in a process of its
  own. Linux only.

What a data guard costs is the time of the 8-layer MLP that first looks at the sum of its input,
against the same without.

Scaling is measured on the TorchScript backend: the time of a call by the number of operators and by
the number of parameters (eager's time for the same operator taken off), and the time of an
extraction by the number of operators, each with the line that fits best, relative errors squared.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import CONTESTANTS, DEFAULT, Contestant
from models import CASES, Case, Guarded, Parameters, Steps
from torch import nn

HERE = Path(__file__).parent
SCALING = "scaling"
Results = dict[str, Any]


# --- measuring, in processes of their own ------------------------------------------------------


def time_calls(fn: Callable[..., Any], args: tuple[Any, ...], calls: int) -> float:
    """Seconds that `calls` calls take."""
    begin = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        fn(*args)
    return time.perf_counter() - begin


def calls_in(seconds: float, fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """How many calls take at least `seconds`. Counting them warms `fn` up."""
    for _ in range(3):
        fn(*args)
    calls = 1
    while (took := time_calls(fn, args, calls)) < seconds:
        calls = max(2 * calls, int(calls * seconds / took))
    return calls


def build(
    case: Case, contestant: Contestant, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], float]:
    """A contestant's callable for `case`, and its seconds to the first result."""
    contestant.first_result(nn.Tanh().eval(), (torch.zeros(3),))
    model = case.make()
    begin = time.perf_counter()
    fn = contestant.first_result(model, args)
    return fn, time.perf_counter() - begin


def attempt(
    case: Case, contestant: Contestant, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], float] | None:
    """`build`, or None for a peer that cannot build the model."""
    try:
        return build(case, contestant, args)
    except Exception as e:
        if contestant.name.startswith("ours"):
            raise
        print(f"  {contestant.name} fails: {type(e).__name__}: {e}", flush=True)
        return None


def measure_calls(case: Case, contestants: list[Contestant], options: Any) -> Results:
    """Cold builds, then all contestants in turns."""
    args = case.inputs()
    results: Results = {}
    timed = []
    for contestant in contestants:
        built = attempt(case, contestant, args)
        if built is None:
            continue
        fn, seconds = built
        fresh = case.inputs()
        # Fused sums round otherwise. A second comparison: the first call of a variant is special.
        for _ in range(2):
            torch.testing.assert_close(fn(*fresh), case.make()(*fresh), rtol=1e-3, atol=1e-3)
        result = results[contestant.name] = {"cold_s": seconds, "rounds_us": []}
        timed.append((result["rounds_us"], fn, calls_in(options.min_time, fn, args)))
        print(f"  {contestant.name}: cold build {seconds:.2f} s", flush=True)
    gc.collect()
    gc.disable()
    for _ in range(options.rounds):
        for rounds, fn, calls in timed:
            rounds.append(time_calls(fn, args, calls) / calls * 1e6)
    gc.enable()
    for result in results.values():
        result["call_us"] = statistics.median(result["rounds_us"])
    return results


def measure_warm(case: Case, contestants: list[Contestant], options: Any) -> Results:
    args = case.inputs()
    results = {}
    for contestant in contestants:
        built = attempt(case, contestant, args)
        if built is not None:
            results[contestant.name] = {"warm_s": built[1]}
            print(f"  {contestant.name}: warm build {built[1]:.2f} s", flush=True)
    return results


def resident(field: str) -> float:
    """MiB of resident memory of this process: now ("VmRSS"), or at its peak ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) / 1024


def measure_memory(case: Case, contestants: list[Contestant], options: Any) -> Results:
    (contestant,) = contestants
    args = case.inputs()
    contestant.first_result(nn.Tanh().eval(), (torch.zeros(3),))
    gc.collect()
    before = resident("VmRSS")
    fn = contestant.first_result(case.make(), args)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building has left free is not the calls'
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for _ in range(5):
        fn(*args)
    return {contestant.name: {"memory_mib": resident("VmHWM") - before}}


def measure_scaling(options: Any) -> Results:
    """Points (size, seconds) of call and extraction times on the TorchScript backend."""
    ours = CONTESTANTS["ours, torchscript"]
    points: dict[str, list[tuple[int, float]]] = {
        "operators": [],
        "parameters": [],
        "extraction": [],
    }

    def best(fn: Callable[..., Any], args: tuple[Any, ...]) -> float:
        calls = calls_in(0.02, fn, args)
        return statistics.median(time_calls(fn, args, calls) / calls for _ in range(9))

    def difference(fn: Any, args: Any, without: Any, its_args: Any) -> float:
        # In turns: both are small, and the difference is smaller.
        calls = calls_in(0.01, fn, args)
        return statistics.median(
            (time_calls(fn, args, calls) - time_calls(without, its_args, calls)) / calls
            for _ in range(31)
        )

    x = torch.randn(4)
    for count in (10, 30, 100, 300, 1000, 3000, 10000):
        model = Steps(count)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            fn = ours.build(model, (x,))
            times.append(time.perf_counter() - begin)
        fn(x)
        points["extraction"].append((count, statistics.median(times)))
        points["operators"].append((count, best(fn, (x,))))
        print(f"  {count} operators", flush=True)
    for count in (1, 10, 30, 100, 300, 1000, 3000, 10000):
        model = Parameters(count)
        tensors = [x, *model.parts]
        fn = ours.first_result(model, (x,))
        points["parameters"].append((count, difference(fn, (x,), torch.cat, (tensors,))))
        print(f"  {count} parameters", flush=True)
    points["guard"] = guard_rounds(ours)
    return points


def guard_rounds(ours: Contestant) -> list[tuple[float, float]]:
    """Seconds of a call of the MLP with a look at its data, and without, in turns."""
    case = CASES["MLP, 8 layers"]
    args = case.inputs()
    without, guarded = case.make(), Guarded(case.make()).eval()
    fns = [ours.first_result(model, args) for model in (guarded, without)]
    calls = calls_in(0.02, fns[0], args)
    rounds = [[time_calls(fn, args, calls) / calls for fn in fns] for _ in range(31)]
    return [(a, b) for a, b in rounds]


PHASES = {"calls": measure_calls, "warm": measure_warm, "memory": measure_memory}


def child(phase: str, model: str, contestants: list[str], options: Any) -> None:
    """Measure one thing in this process, and write it as JSON to options.output."""
    with torch.no_grad():
        if phase == SCALING:
            torch.set_num_threads(1)
            found = measure_scaling(options)
        else:
            case = CASES[model]
            torch.set_num_threads(2 if case.large else 1)
            found = PHASES[phase](case, [CONTESTANTS[n] for n in contestants], options)
    options.output.write_text(json.dumps(found))


def run_child(phase: str, model: str, contestants: list[str], options: Any, cache: str) -> Results:
    """What `child` finds, in a new process with Inductor's cache in the folder `cache`."""
    threads = str(2 if model in CASES and CASES[model].large else 1)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--phase", phase, "--only", model]
        command += ["--contestants", *contestants, "--output", str(output)]
        command += ["--rounds", str(options.rounds), "--min-time", str(options.min_time)]
        subprocess.run(
            command,
            check=True,
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": cache,
                "OMP_NUM_THREADS": threads,
                "OMP_PROC_BIND": "true",
                "HF_HUB_OFFLINE": "1",
            },
        )
        return json.loads(output.read_text())


def measure(model: str, options: Any) -> Results:
    """Everything about one model: contestant -> measurement -> value."""
    found: Results = {}
    with tempfile.TemporaryDirectory() as cache:
        for phase in ("calls", "warm"):
            print(f"{model}: {phase}", flush=True)
            for name, values in run_child(
                phase, model, options.contestants, options, cache
            ).items():
                found.setdefault(name, {}).update(values)
        if CASES[model].large:
            for name in found:
                print(f"{model}: memory of {name}", flush=True)
                found[name].update(run_child("memory", model, [name], options, cache)[name])
    return found


# --- reports -----------------------------------------------------------------------------------


def geometric_means(results: Results) -> dict[str, dict[str, float]]:
    """For small and for large models, how many times faster than torch.compile in both its forms
    `ours, inductor+freeze` is."""
    ours = "ours, inductor+freeze"
    means: dict[str, dict[str, float]] = {}
    for size in ("small", "large"):
        for peer in ("compile", "compile, fastest"):
            ratios = [
                row[peer]["call_us"] / row[ours]["call_us"]
                for model, row in results["models"].items()
                if CASES[model].large == (size == "large") and {peer, ours} <= row.keys()
            ]
            if ratios:
                means.setdefault(size, {})[peer] = statistics.geometric_mean(ratios)
                means[size][f"{peer}, lowest"] = min(ratios)
    return means


def rounded(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "—"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def markdown(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join([title, *header])} |", "| --- " + "| ---: " * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def table(results: Results) -> str:
    """All results as Markdown."""
    text = ""
    for key, title in (
        ("call_us", "microseconds per call"),
        ("cold_s", "seconds to the first result, cold"),
        ("warm_s", "seconds to the first result, warm"),
        ("memory_mib", "peak MiB while it is called"),
    ):
        names = [n for n in CONTESTANTS if any(n in row for row in results["models"].values())]
        rows = [
            [model, *(rounded(row.get(name, {}).get(key)) for name in names)]
            for model, row in results["models"].items()
            if any(key in cell for cell in row.values())
        ]
        if rows:
            text += markdown(title, names, rows) + "\n"
    for size, means in geometric_means(results).items():
        for peer in ("compile", "compile, fastest"):
            if peer in means:
                text += (
                    f"* {size} models, `ours, inductor+freeze` against `{peer}`: "
                    f"{means[peer]:.2f} times faster in the geometric mean, "
                    f"{means[f'{peer}, lowest']:.2f} at least\n"
                )
    scaling = dict(results.get(SCALING, {}))
    if "guard" in scaling:
        guarded, without = map(statistics.median, zip(*scaling.pop("guard")))
        text += f"* with one data guard, the MLP takes {guarded / without:.2f} times as long\n"
    for name, points in scaling.items():
        slope, offset, worst = fit(points)
        text += (
            f"* {name}: {offset * 1e6:.3g} us + {slope * 1e6:.3g} us for each, "
            f"at most {worst:.0%} off the line\n"
        )
    return text


def fit(points: list[list[float]]) -> tuple[float, float, float]:
    """Slope and offset of the line through `points` with the least squared relative errors, and the
    largest relative error."""
    import numpy as np

    x, y = np.array(points).T
    weighted = np.stack([x / y, 1 / y], axis=1)
    (slope, offset), *_ = np.linalg.lstsq(weighted, np.ones_like(y), rcond=None)
    return slope, offset, float(np.max(np.abs((slope * x + offset) / y - 1)))


def plot(results: Results, file: Path) -> None:
    """Times by model, relative to torch.compile; and what grows with operators and parameters."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "torch_lazy_ext"  # the same file for the same numbers
    import matplotlib.pyplot as plt
    import numpy as np

    rows = {m: row for m, row in results["models"].items() if "compile" in row}
    names = [n for n in CONTESTANTS if n != "compile" and any(n in row for row in rows.values())]
    scaling = {n: points for n, points in results.get(SCALING, {}).items() if n != "guard"}
    figure = plt.figure(figsize=(11, 8 if scaling else 5), layout="constrained")
    grid = figure.add_gridspec(2 if scaling else 1, 3, height_ratios=[2, 1][: 2 if scaling else 1])
    axes = figure.add_subplot(grid[0, :])
    width = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        speedups = [
            row["compile"]["call_us"] / row[name]["call_us"] if name in row else 0
            for row in rows.values()
        ]
        places = np.arange(len(rows)) + (k - (len(names) - 1) / 2) * width
        axes.bar(places, speedups, width, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda v, _p: f"{v:g}x")
    axes.set_ylabel("speed, torch.compile = 1")
    axes.set_xticks(range(len(rows)), rows.keys(), rotation=20, ha="right")
    axes.legend(ncols=3, fontsize="small")
    for k, (name, points) in enumerate(scaling.items()):
        axes = figure.add_subplot(grid[1, k])
        x, y = np.array(points).T
        slope, offset, _worst = fit(points)
        axes.loglog(x, y * 1e6, "o")
        axes.loglog(x, (slope * x + offset) * 1e6, "-", linewidth=1)
        what = "extraction" if name == "extraction" else "call"
        axes.set_xlabel("parameters" if name == "parameters" else "operators")
        axes.set_ylabel(f"microseconds per {what}")
        axes.set_title(f"{offset * 1e6:.2g} us + {slope * 1e6:.2g} us for each", fontsize="small")
    figure.savefig(file, metadata={"Date": None})


def report(results: Results, folder: Path) -> None:
    text = table(results)
    (folder / "table.md").write_text(text)
    print(f"\n{text}")
    if any("compile" in row for row in results["models"].values()):
        plot(results, folder / "results.svg")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*CASES, SCALING], default=[*CASES, SCALING], metavar="MODEL"
    )
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    parser.add_argument(
        "--min-time",
        type=float,
        default=0.02,
        metavar="SECONDS",
        help="the least a round of one contestant takes; default: 0.02",
    )
    parser.add_argument("--again", action="store_true", help="measure what has been measured")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path, default=HERE / "results", help="of the results")
    parser.add_argument("--phase", choices=[*PHASES, SCALING], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        child(options.phase, options.only[0], options.contestants, options)
        return
    options.folder.mkdir(exist_ok=True)
    file = options.folder / "results.json"
    results: Results = json.loads(file.read_text()) if file.exists() else {}
    results.setdefault("models", {})
    for name in [] if options.report else options.only:
        known = results if name == SCALING else results["models"]
        if name in known and not options.again:
            continue
        if name == SCALING:
            with tempfile.TemporaryDirectory() as cache:
                known[name] = run_child(SCALING, SCALING, DEFAULT, options, cache)
        else:
            known[name] = measure(name, options)
        results["torch"] = torch.__version__
        order = {m: results["models"][m] for m in CASES if m in results["models"]}
        results["models"] = copy.copy(order)
        file.write_text(json.dumps(results, indent=1) + "\n")
    report(results, options.folder)


if __name__ == "__main__":
    main()
