#!/usr/bin/env python3
"""How much of PyTorch is captured as one graph and replayed like eager: a page, and JSON.

    python tools/conformance/report.py                              all of it, to conformance/
    python tools/conformance/report.py --kinds operator -k 'linalg.*' --dtypes float32
    python tools/conformance/report.py --compare                    and PyTorch's own captures
    python tools/conformance/report.py --shard 1 4 --output part1   a quarter of it
    python tools/conformance/report.py --merge part1 part2 part3 part4

The work is torch's operator database in every dtype, its module database, and the architectures of
test/lazy/model_zoo.py, compared with eager by the oracles of the tests. Each item runs in a
process that may crash. Results are kept as they come: when it is stopped, the same command goes
on, unless the sources have changed. `report.html` needs no other file and no network.

`--compare` gives the same work to `torch._lazy`, `torch.jit.trace`, `torch.export` and
`torch.compile(fullgraph=True)`. Of these only dtypes, shapes and values of results and arguments
are compared, nothing is asked of strides, aliasing or random state; for torch.compile the
question is what it captures whole, so its backend is aot_eager, without native code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.

from tools.conformance import page, run  # noqa: E402
from tools.conformance.items import CONTESTANTS, KINDS, SELF, Item, all_items  # noqa: E402
from tools.conformance.run import Results  # noqa: E402


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A function to call with each result: a bar on a terminal, lines elsewhere."""
    if sys.stdout.isatty():
        try:
            from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
        except ModuleNotFoundError:
            pass
        else:
            columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn())
            with Progress(*columns, TimeRemainingColumn()) as bar:
                task = bar.add_task("", total=total)
                yield lambda item, _: bar.update(task, advance=1, description=item.name[:30])
            return
    done, begin, spoke = 0, time.monotonic(), time.monotonic()

    def advance(item: Item, result: dict[str, Any]) -> None:
        nonlocal done, spoke
        done += 1
        now = time.monotonic()
        if now - spoke > 30 or done == total:
            spoke = now
            left = (now - begin) * (total - done) / done
            print(f"{done}/{total} done, about {left / 60:.0f} min left: {item.key}", flush=True)

    yield advance


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One line for each kind and contestant: how many of each outcome."""
    lines = []
    for contestant in CONTESTANTS:
        for kind in KINDS:
            outcomes = [
                r["outcome"]
                for r in results
                if (r["item"]["contestant"], r["item"]["kind"]) == (contestant, kind)
            ]
            if outcomes:
                found = sorted(set(outcomes), key=page.OUTCOMES.index)
                counts = ", ".join(f"{outcomes.count(o)} {o}" for o in found)
                lines.append(f"{contestant}, {len(outcomes)} {kind}s: {counts}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("conformance"), metavar="DIR")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("-k", action="append", default=[], metavar="GLOB", help="only these names")
    parser.add_argument("--dtypes", nargs="+", default=[], help="only these, for operators")
    parser.add_argument("--compare", action="store_true", help="PyTorch's own captures, too")
    parser.add_argument("--shard", nargs=2, type=int, default=[1, 1], metavar=("K", "N"))
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per item (%(default)s)")
    args = parser.parse_args(argv)
    k, n = args.shard
    if not 1 <= k <= n:
        parser.error(f"--shard K N needs 1 <= K <= N, not {k} {n}")

    state = run.fingerprint()
    results = Results(args.output / "results.jsonl", state)
    if args.merge:
        for folder in args.merge:
            part = Results(folder / "results.jsonl", state)
            for result in part.by_key.values():
                results.add(Item(**result["item"]), result)
        chosen = list(results.by_key)
    else:
        contestants = CONTESTANTS if args.compare else (SELF,)
        items = all_items(args.kinds, args.k, args.dtypes, contestants)[k - 1 :: n]
        if not items:
            parser.error("nothing matches")
        left = sum(item.key not in results.by_key for item in items)
        with progress(left) as on_result:
            run.run(items, results, args.jobs, args.timeout, on_result)
        chosen = [item.key for item in items]

    shown = [results.by_key[key] for key in chosen]
    data = page.report_data(shown)
    (args.output / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.output / "report.html").write_text(page.render(data))
    print(summary(shown))
    print(f"wrote {args.output / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
