"""Capture any PyTorch program as one graph, and replay it exactly like eager."""

import importlib
import warnings

from torch_lazy_ext import _built_for

__version__ = "0.1.0"

if (_refusal := _built_for.refusal(__version__)) is not None:
    raise ImportError(_refusal)
if not _built_for.has_extension():
    raise ImportError(_built_for.missing_extension("there is no _C beside the sources"))
try:
    from torch_lazy_ext import _C as _C
except ImportError as e:
    raise ImportError(_built_for.missing_extension(str(e))) from e
if (_refusal := _built_for.without_lock()) is not None:
    raise ImportError(_refusal)

with warnings.catch_warnings():
    # Meta kernels in Python import it when they first run, and it changes the warnings' filters:
    # not in the middle of a capture.
    importlib.import_module("torch._dynamo")

from torch_lazy_ext._errors import (
    ExtractionError,
    FallbackError,
    GuardError,
    UnsupportedError,
)
from torch_lazy_ext._replay import CompiledGraph, Specialization
from torch_lazy_ext.extract_compiled_graph import extract_compiled_graph

__all__ = [
    "CompiledGraph",
    "ExtractionError",
    "FallbackError",
    "GuardError",
    "Specialization",
    "UnsupportedError",
    "extract_compiled_graph",
]
