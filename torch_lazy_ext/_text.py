"""The graph as text for people and for snapshots: no addresses, ids or paths."""

from __future__ import annotations

import re

import torch

from torch_lazy_ext._lower import Lowered


def graph_text(lowered: Lowered, *, source: bool = False) -> str:
    """One line per operator: `%2 : float32[2, 3] = aten::add.Tensor(%0, %1, alpha=1)`."""
    del source
    return re.sub(r" # .*", "", str(lowered.graph))
