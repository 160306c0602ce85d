#!/usr/bin/env python3
"""Measures the memory that extraction adds to a module with 384 MiB of weights.

    python tools/benchmark/memory.py
    python tools/benchmark/memory.py --contestants lazy trace+freeze compile compile-fastest

Each contestant runs in a process of its own, under no_grad, and prints MiB of resident memory,
counted from just before it is given the module:

* built: after the build (for torch.compile, nothing has happened by then);
* called: after the first call;
* peak: the most at any time until then.

Without --cold, each contestant has built a small program before, so that what it loads once for all
programs does not count. Linux only: reads /proc.
"""

from __future__ import annotations

import argparse
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from contestants import NAMES, choose
from torch import nn

WIDTH, LAYERS = 4096, 6  # Each layer has 64 MiB of float32 weights.


def resident(field: str = "VmRSS") -> float:
    """MiB of resident memory of this process: now, or at its peak ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE).group(1)) / 1024


def measure(name: str, backend: str, cold: bool) -> dict[str, float]:
    """The columns of the module's docstring, for one contestant in this process."""
    torch.set_num_threads(1)
    contestant = choose([name], [backend])[-1]
    with torch.no_grad():
        if not cold:
            contestant.first_result(nn.Tanh().eval(), (torch.zeros(3),))
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        model, args = nn.Sequential(*layers).eval(), (torch.rand(1, WIDTH),)
        before = resident()
        fn = contestant.build(model, args)
        built = resident() - before
        fn(*args)
    return {"built": built, "called": resident() - before, "peak": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=["lazy"])
    parser.add_argument("--backend", default="torchscript", help="default: torchscript")
    parser.add_argument("--cold", action="store_true", help="count what is loaded once, too")
    options = parser.parse_args()
    print(f"MiB added to {WIDTH * WIDTH * 4 * LAYERS / 2**20:.0f} MiB of weights")
    for name in options.contestants:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
            added = process.submit(measure, name, options.backend, options.cold).result()
        print(f"{name:>16}", *(f"  {column} {mib:7.1f}" for column, mib in added.items()))


if __name__ == "__main__":
    main()
