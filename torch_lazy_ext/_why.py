"""What tells the variants of a program apart, in words."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from torch_lazy_ext import _tree
from torch_lazy_ext._relied import Relied, short


class Seen(NamedTuple):
    """What a capture saw of its arguments and of Python.

    Attributes:
        leaves: of the arguments, each as text.
        relied: what the program read of Python.
        guards: the lines that looked at data.
    """

    leaves: list[str]
    relied: Relied
    guards: list[str]


def leaf(value: Any) -> str:
    """An argument, as far as a graph is tied to it: "float32[2, 3]", "17"."""
    if isinstance(value, torch.Tensor):
        text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return f"{text} that requires grad" if value.requires_grad else text
    return short(value)


def names(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The path to each leaf of a call's arguments: "x", "batch.ids", "layers.0"."""
    positional: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        called = fn.forward if isinstance(fn, torch.nn.Module) else fn
        parameters = inspect.signature(called).parameters.values()
        positional = [p.name for p in parameters if p.kind in by_position]
    found: list[str] = []

    def walk(value: Any, path: str) -> None:
        taken = _tree.parts(value)
        if taken is None:
            found.append(path)
            return
        shape, children = taken
        keys = [*(shape.keys or range(shape.length)), *shape.attributes]
        keys += ["a key"] * (len(children) - len(keys))
        for key, child in zip(keys, children):
            walk(child, f"{path}.{key}")

    for i, value in enumerate(args):
        walk(value, positional[i] if i < len(positional) else f"argument {i}")
    for name, value in kwargs.items():
        walk(value, name)
    return found


def differences(paths: list[str], captures: Iterable[Seen]) -> list[str]:
    """What was another one in captures that answered no further call, the worst first.

    Args:
        paths: of the arguments' leaves.
    """
    known: dict[str, dict[str, int]] = {}
    count = 0
    for seen in captures:
        count += 1
        texts: dict[str, str] = {}
        if len(seen.leaves) == len(paths):
            texts.update({f"argument `{p}`": text for p, text in zip(paths, seen.leaves)})
        texts.update({f"`{name}`": text for name, text in seen.relied.simple().items()})
        for i, guard in enumerate(seen.guards):
            texts[f"look {i + 1} at data"] = guard
        for name, text in texts.items():
            values = known.setdefault(name, {})
            values[text] = values.get(text, 0) + 1
    varied = {name: values for name, values in known.items() if len(values) > 1}
    ranked = sorted(varied, key=lambda name: -len(varied[name]))
    return [
        f"{name}: {len(varied[name])} values in {count} captures "
        f"({', '.join(list(varied[name])[:3])}{', ...' if len(varied[name]) > 3 else ''})"
        for name in ranked[:3]
    ]
