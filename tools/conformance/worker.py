"""Checks items, one after the other: a line of JSON comes in for each, and one goes out.

What the checks print goes to stderr, so that stdout holds results alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from tools.conformance.checks import check
    from tools.conformance.items import Item

    for line in sys.stdin:
        print(json.dumps(check(Item(**json.loads(line)))), file=results, flush=True)


if __name__ == "__main__":
    main()
