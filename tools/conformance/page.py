"""The report as one page: the data, and page.html around it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.conformance.items import CONTESTANTS, SELF

# In checks.py, with what they mean; that module imports torch, and this one need not.
OUTCOMES = ("equal", "variants", "refused", "wrong", "raised", "crashed", "timed out", "skipped")
DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "complex64", "complex128", "complex32"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
"""The first columns; any others follow."""


def report_data(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows, and what report.json holds."""
    contestants = [c for c in CONTESTANTS if any(r["item"]["contestant"] == c for r in results)]
    dtypes = {r["item"]["dtype"] for r in results} - {""}
    return {
        "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "self": SELF,
        "contestants": contestants,
        "outcomes": list(OUTCOMES),
        "dtypes": [d for d in DTYPES if d in dtypes] + sorted(dtypes - set(DTYPES)),
        "results": [{**r["item"], **{k: v for k, v in r.items() if k != "item"}} for r in results],
    }


def render(data: dict[str, Any]) -> str:
    """The page, self-contained."""
    template = Path(__file__).with_name("page.html").read_text()
    # "</script>" in a message must not end the script.
    return template.replace("__DATA__", json.dumps(data).replace("<", "\\u003c"))
