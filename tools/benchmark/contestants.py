"""What is compared: ways to make a callable that computes what a module computes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_lazy_ext

Build = Callable[[nn.Module, tuple[Any, ...]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One column of the tables.

    Attributes:
        build: from a module and example arguments to a callable.
        compiles: with Inductor, so that it finds on disk what it compiled before.
    """

    name: str
    build: Build
    compiles: bool = False

    def first_result(self, model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
        """Build and call once: with `torch.compile`, the call is what compiles."""
        fn = self.build(model, args)
        fn(*args)
        return fn


def _eager(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    return model


def _trace_and_freeze(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and bakes branches in
        return torch.jit.freeze(torch.jit.trace(model, args, check_trace=False))


def _compile(options: dict[str, Any] | None = None) -> Build:
    # Isolated, so that no contestant looks through the compiled code of another.
    return lambda model, args: torch.compile(model, options=options, isolate_recompiles=True)


def _extract(**options: Any) -> Build:
    return lambda model, args: torch_lazy_ext.extract_compiled_graph(model, args, **options)


CONTESTANTS = {
    c.name: c
    for c in (
        Contestant("eager", _eager),
        Contestant("trace+freeze", _trace_and_freeze),
        Contestant("compile", _compile(), compiles=True),
        Contestant(
            "compile, fastest",
            _compile({"freezing": True, "cpp_wrapper": True}),
            compiles=True,
        ),
        Contestant("ours, torchscript", _extract()),
        Contestant("ours, inductor", _extract(backend="inductor"), compiles=True),
        Contestant(
            "ours, inductor+freeze", _extract(backend="inductor", freeze=True), compiles=True
        ),
    )
}
DEFAULT = [name for name in CONTESTANTS if name != "ours, inductor"]
