"""Record: run the program once on its capture tensors.

Operators are recorded by the extension, below Python. This module adds what never reaches an
operator: reading a tensor's data from Python (`tolist`, `numpy`, printing) and assignments to
attributes of the user's modules, which are noted and taken back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torch_lazy_ext import _C
from torch_lazy_ext._errors import FallbackError, UnsupportedError

_MODULE_PARTS = ("_parameters", "_buffers", "_modules")


def _is_captured(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _C.is_capture_tensor(value)


class CaptureMode(TorchFunctionMode):
    """Answers the calls that read a capture tensor's data from Python."""

    def __init__(self, recorder: _C.Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self._handlers: dict[Any, Callable[..., Any]] = {
            func: self._on_real_value
            for func in (
                torch.Tensor.tolist,
                torch.Tensor.numpy,
                torch.Tensor.__array__,
                torch.Tensor.__repr__,
                torch.Tensor.__format__,
                torch.Tensor.__str__,
            )
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = self._handlers.get(func)
        if handler is not None and args and isinstance(args[0], torch.Tensor):
            return handler(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _on_real_value(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        if not (_is_captured(tensor) or self.recorder.is_liftable(tensor)):
            return func(*args, **kwargs)
        if not _is_captured(tensor):
            tensor = self.recorder.lift(tensor)
        real = self.recorder.materialize(tensor).clone()
        if tensor.requires_grad:
            real.requires_grad_(True)
        return func(real, *args[1:], **kwargs)


class Effect:
    """An attribute the program assigned on one of the user's modules."""

    __slots__ = ("owner", "key", "value")

    def __init__(self, owner: dict[str, Any], key: str, value: Any) -> None:
        self.owner = owner
        self.key = key
        self.value = value


@contextlib.contextmanager
def restored_modules(modules: list[nn.Module], effects: list[Effect]) -> Iterator[None]:
    """Take back every assignment to the modules' attributes, and append it to `effects`."""
    dicts = [m.__dict__ for m in modules]
    dicts += [m.__dict__[part] for m in modules for part in _MODULE_PARTS]
    before = [dict(d) for d in dicts]
    try:
        yield
    finally:
        for owner, old in zip(dicts, before):
            changed = [k for k, v in owner.items() if k not in old or old[k] is not v]
            effects.extend(Effect(owner, k, owner[k]) for k in changed)
            deleted = [k for k in old if k not in owner]
            effects.extend(Effect(owner, k, DELETED) for k in deleted)
            if changed or deleted:
                owner.clear()
                owner.update(old)


DELETED = object()


class Recording:
    """A finished capture: the recorder, the program's result and its effects."""

    def __init__(self, recorder: _C.Recorder, result: Any, effects: list[Effect]) -> None:
        self.recorder = recorder
        self.result = result
        self.effects = effects


def record(
    fn: Callable[..., Any],
    leaves: list[Any],
    treespec: pytree.TreeSpec,
    modules: list[nn.Module],
) -> Recording:
    """Run `fn` on twins of the tensors among `leaves`.

    Args:
        fn: the program.
        leaves: the flattened `(args, kwargs)`.
        treespec: how to put `(args, kwargs)` together again.
        modules: the modules whose attributes the program may assign.

    Raises:
        FallbackError: an operator that the fallback config names was met.
        UnsupportedError: an argument that a graph cannot hold.
        Exception: whatever the program itself raises.
    """
    recorder = _C.Recorder()
    effects: list[Effect] = []
    twins: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if not recorder.is_liftable(leaf):
                raise UnsupportedError(
                    f"an argument is a tensor of layout {leaf.layout} on {leaf.device}, which a "
                    "graph cannot hold: pass dense tensors and convert inside the program"
                )
            twins.append(recorder.lift(leaf))
        else:
            twins.append(leaf)
    args, kwargs = pytree.tree_unflatten(twins, treespec)
    with restored_modules(modules, effects):
        recorder.enter()
        try:
            with CaptureMode(recorder):
                result = fn(*args, **kwargs)
        finally:
            recorder.exit()
    if recorder.fallbacks:
        listing = ", ".join(
            f"{name}={count} (at {where})" if where else f"{name}={count}"
            for name, count, where in recorder.fallbacks
        )
        raise FallbackError(
            f"Fail to extract the compiled graph because of fallback: {listing}. The fallback "
            "config asks for it: see torch_lazy_ext.config.set_force_fallback"
        )
    return Recording(recorder, result, effects)
