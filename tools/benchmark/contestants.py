"""What is compared: ways to make a callable that computes what a module computes."""

from __future__ import annotations

import dataclasses
import inspect
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
        builds: how many builds are timed. One where a second would find the first one's code
            (`torch.compile`).
    """

    name: str
    build: Build
    builds: int = 5

    def first_result(self, model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
        """Build and call once: with `torch.compile`, the call is what compiles."""
        fn = self.build(model, args)
        fn(*args)
        return fn


def _eager(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    return model


def _trace_and_freeze(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and bakes branches in.
        return torch.jit.freeze(torch.jit.trace(model, args, check_trace=False))


def _compile(options: dict[str, Any] | None = None) -> Build:
    # Isolated, so that no contestant looks through the compiled code of another.
    return lambda model, args: torch.compile(model, options=options, isolate_recompiles=True)


CAN_CHOOSE_BACKEND = (
    "backend" in inspect.signature(torch_lazy_ext.extract_compiled_graph).parameters
)


def _extract(backend: str) -> Build:
    kwargs = {"backend": backend} if CAN_CHOOSE_BACKEND else {}
    return lambda model, args: torch_lazy_ext.extract_compiled_graph(model, args, **kwargs)


EAGER = Contestant("eager", _eager)
PEERS = [
    Contestant("trace+freeze", _trace_and_freeze),
    Contestant("compile", _compile(), builds=1),
    Contestant("compile-fastest", _compile({"freezing": True, "cpp_wrapper": True}), builds=1),
]
NAMES = ["lazy", *(peer.name for peer in PEERS)]
DEFAULT_NAMES = [name for name in NAMES if name != "compile-fastest"]


def choose(names: list[str], backends: list[str]) -> list[Contestant]:
    """Eager, then those of `names` in the order of `NAMES`, "lazy" once for each backend.

    Raises ValueError for a backend that this torch_lazy_ext does not offer.
    """
    if not CAN_CHOOSE_BACKEND and backends != ["torchscript"]:
        raise ValueError("this torch_lazy_ext has one backend: torchscript")
    lazy = [Contestant(f"lazy:{backend}", _extract(backend)) for backend in backends]
    peers = [peer for peer in PEERS if peer.name in names]
    return [EAGER, *(lazy if "lazy" in names else []), *peers]
