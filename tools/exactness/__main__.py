"""Say how far native code is from eager's kernels, operator by operator, as Markdown.

    python -m tools.exactness
    python -m tools.exactness --dtype bfloat16 --samples 8 --each 20

Takes some twenty minutes of one core. Exits with 1 if anything but rounding differs.
"""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
from collections.abc import Iterable

import torch

from tools.exactness.items import Item, collect
from tools.exactness.sweep import Outcome, is_eager, sweep


def chosen(items: Iterable[Item], each: int) -> list[Item]:
    """The first `each` items of each operator that Inductor has code of its own for."""
    counts: collections.Counter[str] = collections.Counter()
    found = []
    for item in items:
        counts[item.name] += 1
        if counts[item.name] <= each and not is_eager(item.overload):
            found.append(item)
    return found


def table(outcomes: Iterable[Outcome]) -> str:
    """Operators that are equal to the bit, and those that are equal to rounding, with how far."""
    of: dict[str, list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        of[outcome.item.name.removeprefix("aten.").removesuffix(".default")].append(outcome)
    exact, rounded, refused = [], [], []
    for name, found in sorted(of.items()):
        ran = [o.difference for o in found if not o.refused]
        if not ran:
            refused.append(name)
        elif any(d.ulps for d in ran):
            ulps, error = max(d.ulps for d in ran), max(d.error for d in ran)
            rounded.append(f"| `{name}` | {ulps} | {error:.2g} |")
        else:
            exact.append(f"`{name}`")
    lines = [f"Equal to the bit ({len(exact)}): {', '.join(exact)}", ""]
    lines += ["| Equal to rounding | numbers between | of the largest |", "|---|---|---|", *rounded]
    if refused:
        names = ", ".join(f"`{name}`" for name in refused)
        lines += ["", f"Left to TorchScript ({len(refused)}): {names}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="of the samples")
    parser.add_argument("--samples", type=int, default=3, help="of each entry of the database")
    parser.add_argument("--each", type=int, default=4, help="calls of each operator")
    parser.add_argument("--size", type=int, default=64, help="calls in one graph")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    items = chosen(collect((getattr(torch, options.dtype),), options.samples), options.each)
    outcomes = []
    for outcome in sweep(items, options.size):
        outcomes.append(outcome)
        if outcome.difference.wrong:
            print(f"{outcome.item}: {outcome.difference.wrong}", file=sys.stderr, flush=True)
        if len(outcomes) % options.size == 0:
            print(f"{len(outcomes)} of {len(items)}", file=sys.stderr, flush=True)
    print(table(outcomes))
    sys.exit(any(o.difference.wrong for o in outcomes))


if __name__ == "__main__":
    main()
