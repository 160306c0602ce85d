"""Native: where the code that Inductor makes of an operator is not exact, and what is done instead.

Rounding may differ from eager's. Whether a number is NaN, an infinity, or a zero with a sign, and
integers and booleans, may not.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator

from torch._inductor import config, cpp_builder

# Flags of the compiler -> what they change.
_FLAGS = {
    "fno-signed-zeros": "x + 0.0 becomes x, and -(a - b) becomes b - a",
    "funsafe-math-optimizations": "sums are put in another order, flushes denormals when linked",
    "ffinite-math-only": "comparisons with NaN are left out",
}

# Settings of Inductor -> why.
SETTINGS = {
    # n * 0 becomes 0, which is NaN where n is an infinity or NaN.
    "joint_graph_constant_folding": False,
    # Between two operators a half or bfloat16 is rounded, and may become an infinity.
    "emulate_precision_casts": True,
}


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Inductor, with what the tables here say in the place of its own."""
    with (
        config.patch(SETTINGS),
        unittest.mock.patch.object(cpp_builder, "_get_ffast_math_flags", _flags),
    ):
        yield


_fast_flags = cpp_builder._get_ffast_math_flags


def _flags() -> list[str]:
    return [flag for flag in _fast_flags() if flag not in _FLAGS]
