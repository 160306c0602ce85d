"""The work of a conformance run: operators, modules and models, each an item with a key."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

KINDS = ("operator", "module", "model")
SELF = "torch_lazy_ext"
CONTESTANTS = (SELF, "torch._lazy", "jit.trace", "export", "compile")
ROOT = Path(__file__).resolve().parents[2]
TEST_DIR = ROOT / "test" / "lazy"
"""Where the databases of operators, modules and models and their oracles live."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to capture.

    Attributes:
        kind: one of KINDS.
        name: an entry of OpInfo, a module of module_db with its mode, or an architecture.
        dtype: of an operator's samples, "float32"; empty for the other kinds.
        contestant: who captures it, one of CONTESTANTS.
    """

    kind: str
    name: str
    dtype: str
    contestant: str

    @property
    def key(self) -> str:
        return "|".join(dataclasses.astuple(self))


def load_databases() -> None:
    """Make the modules of the test tree importable."""
    if str(TEST_DIR) not in sys.path:
        sys.path.insert(0, str(TEST_DIR))


def _programs(kinds: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    load_databases()
    if "model" in kinds:
        import model_zoo

        for name in model_zoo.MODELS:
            yield "model", name, ""
    if "module" in kinds:
        import test_modules

        for name, info in test_modules.INFOS.items():
            if any(str(d) == "torch.float32" for d in info.dtypes):
                yield "module", f"{name} train", ""
                yield "module", f"{name} eval", ""
    if "operator" in kinds:
        import opinfo

        for name, op in opinfo.ENTRIES.items():
            for dtype in opinfo.supported_dtypes(op):
                yield "operator", name, str(dtype).removeprefix("torch.")


def all_items(
    kinds: Sequence[str] = KINDS,
    patterns: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    contestants: Sequence[str] = (SELF,),
) -> list[Item]:
    """All items, models first; `patterns` and `dtypes` leave only those that match."""
    return [
        Item(kind, name, dtype, contestant)
        for kind, name, dtype in _programs(kinds)
        if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)
        if not dtypes or not dtype or dtype in dtypes
        for contestant in contestants
    ]
