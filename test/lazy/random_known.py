# Owner(s): ["oncall: jit"]

"""Kinds of programs that are known to go wrong, and are drawn no more until they are mended.

Each row of `KNOWN` has the text that such a program has in it, the reason, and a minimal program,
which `test_random_programs.KnownTest` expects to fail: where it passes, the row has to go.
"""

import re
from typing import NamedTuple

from random_statements import WORLD


class Known(NamedTuple):
    """A kind that goes wrong.

    Attributes:
        pattern: what its programs have in their text; nothing where the generator, or the
            comparison, asks for the row by its name, or where the kind is so rare that it stays.
        reason: what goes wrong.
        body: the smallest one, for an argument `a` that requires grad, lines parted by "; ".
        inputs: makes arguments `a` and `b` of that.
        change: of the world, before the last two calls.
        derive: as in `random_programs.compare`.
        ambient: what is around the calls.
    """

    pattern: str
    reason: str
    body: str
    change: str = "pass"
    derive: int = 1
    ambient: str = "contextlib.nullcontext()"
    inputs: str = "b = a.detach().clone()"

    def source(self) -> str:
        lines = "".join(f"        {line}\n" for line in self.body.split("; "))
        return (
            f"{WORLD}\n\ndef inputs(i):\n"
            "    a = random_tensor((2, 3), torch.float32).requires_grad_()\n"
            f"    {self.inputs}\n    return (a, b, 1)\n\n\nclass Program(State):\n"
            f"    def __call__(self, a, b, n):\n        k = 0\n{lines}\n\ndef ambient(i):\n"
            f"    return {self.ambient}\n\n\ndef change(p, i):\n    if i > 1:\n        "
            f"{self.change}\n\n\nderive = {self.derive}\n"
        )


KNOWN = {
    "detached_inference_tensor": Known(
        r"with torch\.inference_mode\(\):(.|\n)*\.(detach|data\b)",
        "outside of inference mode, eager lets a caller write to what detach() gives of an inference "
        "tensor, and to no other view of it; a replay's result refuses the write",
        "c = torch.inference_mode(); c.__enter__(); v = a * 1; c.__exit__(None, None, None); "
        "return v.detach()",
    ),
    "function_after_its_backward": Known(
        "",
        "of a result whose backward has run, a custom function that returns it gives no view of it",
        "v = a * self.w; v.sum().backward(); return Same.apply(v)",
    ),
}
PATTERNS = {name: re.compile(known.pattern) for name, known in KNOWN.items() if known.pattern}
