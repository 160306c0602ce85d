"""What a capture of a program found, for people: as text, as a DOT graph, as a drawing.

Nothing here is needed to capture or to replay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torch_lazy_ext import _fx, _lift, _lower, _replay, _text, _tree


@dataclasses.dataclass
class Node:
    """One box of a drawing: an input, an operator, or what the graph returns."""

    title: str
    value: str  # dtype and shape of what it makes
    source: str  # the user's line
    inputs: list[int]  # positions of other nodes


@dataclasses.dataclass
class Explanation:
    """A captured program.

    Attributes:
        text: the graph, an operator a line, with the user's lines.
        inputs: for each input of the graph, where its tensor comes from.
        mutations: what a call changes, besides returning a result.
        guards: what the program looked at in its data.
        nodes: the graph, to be drawn.
    """

    text: str
    inputs: list[str]
    mutations: list[str]
    guards: list[str]
    nodes: list[Node]

    def __str__(self) -> str:
        parts = [self.text.rstrip()]
        for title, lines in (
            ("inputs", [f"%{i}: {name}" for i, name in enumerate(self.inputs)]),
            ("mutations", self.mutations),
            ("guards", self.guards),
        ):
            parts.append("\n".join([f"{title}:", *(f"  {line}" for line in lines or ["none"])]))
        return "\n\n".join(parts) + "\n"


def explain(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> Explanation:
    """Capture `fn` on example arguments and tell what there is to know.

    Raises:
        ExtractionError: the program cannot be captured.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    flat = _tree.flatten((args, kwargs))
    with contextlib.ExitStack() as undo:
        state, _recorder, lowered, *_rest = _replay.capture(fn, args, kwargs, flat, undo)
        names = _lifted_names(fn, args, kwargs, state, lowered)
    return Explanation(
        text=_text.graph_text(lowered.graph, source=True),
        inputs=[names[i] for i in lowered.parameters],
        mutations=_mutations(lowered, names),
        guards=[repr(_replay.Guard(guard)) for guard in lowered.guards],
        nodes=_nodes(lowered.graph, [names[i] for i in lowered.parameters]),
    )


def _argument_names(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, str]:
    """The names of the tensors among the arguments, by id."""
    function = fn.forward if isinstance(fn, torch.nn.Module) else fn
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    names: dict[int, str] = {}
    for name, value in bound.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                names.setdefault(id(leaf), f"argument {name}{pytree.keystr(path)}")
    return names


def _lifted_names(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: _lift.State,
    lowered: _lower.Lowered,
) -> list[str]:
    """Where each lifted tensor comes from."""
    arguments = _argument_names(fn, args, kwargs)
    names = []
    for i, (tensor, constant, base) in enumerate(lowered.lifted):
        slots = [] if constant else state.slots_of(tensor)
        if id(tensor) in arguments and not constant:
            names.append(arguments[id(tensor)])
        elif slots:
            name = slots[0].name.replace("_parameters.", "").replace("_buffers.", "")
            names.append(f"state {name}")
        elif base == i:
            names.append("memory that several tensors share")
        else:
            names.append("a constant of the program")
    return names


def _mutations(lowered: _lower.Lowered, names: list[str]) -> list[str]:
    found = []
    for write in lowered.writes:
        if write.root is not None:
            found.append(f"{names[write.index]} gets output {write.root} of the graph")
        else:
            found.append(f"{names[write.index]}: its version counter, sizes or strides")
    found += [f"{names[index]}: its .data" for index, _ in lowered.assigned]
    found += [f"{names[index]}: its .grad" for index, _ in lowered.gradients]
    for _owner, key, _source in lowered.effects:
        found.append("the content of a container" if key is _lift.CONTENT else f"attribute {key}")
    return found


def _nodes(graph: torch._C.Graph, inputs: list[str]) -> list[Node]:
    nodes: list[Node] = []
    position: dict[torch.fx.Node, int] = {}
    names = iter(inputs)
    for node in _fx.graph_module(graph).graph.nodes:
        title = str(node.target)
        if node.op == "placeholder":
            title = next(names)
        elif node.op == "output":
            title = "result"
        elif node.target is operator.getitem:
            title = f"[{node.args[1]}]"
        position[node] = len(nodes)
        value = node.meta.get("val")
        is_tensor = isinstance(value, torch.Tensor)
        nodes.append(
            Node(
                title,
                f"{str(value.dtype)[6:]}{list(value.shape)}" if is_tensor else "",
                _line(node.meta.get("stack_trace")),
                [position[n] for n in node.all_input_nodes],
            )
        )
    return nodes


def _line(stack_trace: str | None) -> str:
    """`File "/a/model.py", line 7, in ...` as "model.py:7"."""
    if not stack_trace:
        return ""
    _, path, rest = stack_trace.strip().splitlines()[0].split('"', 2)
    number = "".join(c for c in rest.split(",")[1] if c.isdigit())
    return f"{path.rpartition('/')[2]}:{number}"


def dot(explanation: Explanation) -> str:
    """The graph in the language of Graphviz: `dot -Tsvg` draws it."""
    lines = ["digraph {", '  node [shape=box, fontname="monospace"];']
    for i, node in enumerate(explanation.nodes):
        label = "\n".join(part for part in (node.title, node.value, node.source) if part)
        quoted = label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines.append(f'  n{i} [label="{quoted}"];')
    for i, node in enumerate(explanation.nodes):
        lines += [f"  n{j} -> n{i};" for j in node.inputs]
    return "\n".join([*lines, "}"]) + "\n"


WIDTH, HEIGHT, GAP, SPACE = 230, 56, 24, 48
"""Of a box of the drawing and between boxes, in pixels."""


def _rows(nodes: list[Node]) -> list[list[int]]:
    """Positions of nodes by row: below the lowest of its inputs; an input just above its user."""
    row_of: list[int] = []
    for node in nodes:
        row_of.append(max((row_of[j] + 1 for j in node.inputs), default=0))
    first_user: dict[int, int] = {}
    for i, node in enumerate(nodes):
        for j in node.inputs:
            first_user[j] = min(first_user.get(j, row_of[i]), row_of[i])
    for i, node in enumerate(nodes):
        if not node.inputs:
            row_of[i] = first_user.get(i, 1) - 1
    rows: list[list[int]] = [[] for _ in range(max(row_of, default=0) + 1)]
    for i in sorted(range(len(nodes)), key=lambda i: not nodes[i].inputs):
        rows[row_of[i]].append(i)  # Operators first: they stand below one another.
    return rows


def page(explanation: Explanation) -> str:
    """The graph drawn on a page of its own, with everything else below: HTML with one SVG."""
    rows = _rows(explanation.nodes)
    place = {
        i: (column * (WIDTH + GAP), row * (HEIGHT + SPACE))
        for row, nodes in enumerate(rows)
        for column, i in enumerate(nodes)
    }
    width = max(map(len, rows)) * (WIDTH + GAP)
    height = len(rows) * (HEIGHT + SPACE)
    edges, boxes = [], []
    for i, node in enumerate(explanation.nodes):
        x, y = place[i]
        for j in node.inputs:
            a, b = place[j]
            start, end = (a + WIDTH // 2, b + HEIGHT), (x + WIDTH // 2, y)
            middle = (start[1] + end[1]) // 2
            edges.append(
                f'<path d="M{start[0]} {start[1]}C{start[0]} {middle} {end[0]} {middle} '
                f'{end[0]} {end[1]}"/>'
            )
        lines = [part for part in (node.title, node.value, node.source) if part]
        texts = "".join(
            f'<tspan x="{x + WIDTH // 2}" y="{y + 18 + 15 * k}">{html.escape(line)}</tspan>'
            for k, line in enumerate(lines)
        )
        kind = "operator" if node.inputs else "input"
        boxes.append(
            f'<g class="{kind}"><rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
            f"<text>{texts}</text></g>"
        )
    return (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Captured graph</title>\n'
        "<style>\n"
        "body { font: 14px monospace; margin: 1.5rem; }\n"
        "text { text-anchor: middle; font-size: 12px; }\n"
        "rect { fill: #eef3fb; stroke: #4a6fa5; } .input rect { fill: #f3f3f3; stroke: #888; }\n"
        "path { fill: none; stroke: #888; }\n"
        "</style>\n"
        f'<svg width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">\n'
        + "\n".join([*edges, *boxes])
        + f"\n</svg>\n<pre>{html.escape(str(explanation))}</pre>\n</html>\n"
    )
