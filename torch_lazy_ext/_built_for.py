"""Whether there is an extension, and the torch that is here is the one it was compiled against.

The extension reads PyTorch's objects where their headers had them, so another release is refused
before anything of the extension is loaded.
"""

from __future__ import annotations

import os
import sys
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


def without_lock() -> str | None:
    """What to say where threads of Python run at once; None where they do not.

    In a free-threaded build of Python the import of the extension turns the interpreter's lock on,
    and all holds that holds elsewhere, unless the user has asked for it to stay off.
    """
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    return (
        "torch_lazy_ext needs the lock of the interpreter (the GIL), which this free-threaded "
        "Python keeps off: start it without PYTHON_GIL=0 and -X gil=0"
    )


def has_extension() -> bool:
    """Whether the extension is beside these sources.

    An import of it may succeed without: what finds a checkout that is installed as editable finds
    each module of the package there that this folder lacks, and would join the sources of one
    folder to the extension of another.
    """
    sources = Path(__file__).resolve().parent
    return any((sources / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)


def missing_extension(error: str) -> str:
    """What to say where the extension cannot be imported: what hides it, or how to build it.

    Args:
        error: what the import said.
    """
    sources = Path(__file__).resolve().parent
    path = [p for p in sys.path if Path(p or os.curdir, sources.name).resolve() != sources]
    specs = (finder.find_spec(sources.name, path) for finder in sys.meta_path)
    found = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    installed = [origin.parents[1] for origin in found if origin.resolve().parent != sources]
    if not has_extension() and installed:
        return (
            f"the sources in {sources.parent} hide the torch_lazy_ext that is installed in "
            f"{installed[0]}, and have no compiled extension: Python looks "
            "first in the folder that it is started in. Start it in another folder, or run "
            "`pip install --no-build-isolation -e .` here, which builds the extension beside the "
            "sources"
        )
    return (
        "torch_lazy_ext has no compiled extension here: run `pip install .` (or `pip install -e .` "
        f"to work in the checkout) with a C++ compiler installed ({error})"
    )
