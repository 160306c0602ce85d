"""Whether the torch that is here is the one that the extension was compiled against.

The extension reads PyTorch's objects where their headers had them, so another release is refused
before anything of the extension is loaded.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch


def built_for() -> str | None:
    """The release of torch that setup.py noted beside the extension; None without an extension."""
    name = "_C" + EXTENSION_SUFFIXES[0]
    note = (Path(__file__).parent / name).with_suffix(".torch")
    return note.read_text() if note.exists() else None


def refusal(version: str) -> str | None:
    """What to say where the torch that is here is another one; None where it is not.

    Releases are compared without what comes after a `+` (`cpu`, `cu130`).

    Args:
        version: of this package.
    """
    built = built_for()
    if built is None or torch.__version__.split("+")[0] == built:
        return None
    return (
        f"torch_lazy_ext {version} is built for torch {built}, and this is torch "
        f"{torch.__version__}: run `pip install torch=={built}`, or build torch_lazy_ext again "
        "beside this one (`pip install --no-build-isolation .` in its sources)"
    )
