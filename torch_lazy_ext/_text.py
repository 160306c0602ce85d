"""The graph as text for people and for snapshots: no addresses, ids, paths or moving numbers."""

from __future__ import annotations

import os
from typing import Any

import torch

# c10::ScalarType's numbering, which operators carry as plain integers.
SCALAR_TYPES = [
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex32",
    "complex64",
    "complex128",
    "bool",
    "qint8",
    "quint8",
    "qint32",
    "bfloat16",
    "quint4x2",
    "quint2x4",
    "bits1x8",
    "bits2x4",
    "bits4x2",
    "bits8",
    "bits16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e5m2fnuz",
    "float8_e4m3fnuz",
    "uint16",
    "uint32",
    "uint64",
]
LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "mkldnn", "sparse_csc", "sparse_bsr")
MEMORY_FORMATS = (
    "contiguous_format",
    "preserve_format",
    "channels_last",
    "channels_last_3d",
)
_ENUMS = {
    "dtype": SCALAR_TYPES,
    "out_dtype": SCALAR_TYPES,
    "layout": LAYOUTS,
    "memory_format": MEMORY_FORMATS,
}


def graph_text(graph: torch._C.Graph, *, source: bool = False) -> str:
    """One line per operator: `%2 : float32[2, 3] = aten::sub.Tensor(%0, %1, alpha=1)`.

    Args:
        graph: a lowered graph.
        source: end each line with the file and line of the user's program it came from.
    """
    return _Printer(source).graph(graph)


class _Printer:
    def __init__(self, source: bool) -> None:
        self.source = source
        self.names: dict[int, str] = {}  # unique value -> text

    def graph(self, graph: torch._C.Graph) -> str:
        inputs = ", ".join(self.declare(v) for v in graph.inputs())
        lines = [f"graph({inputs}):"]
        for node in graph.nodes():
            lines.extend(self.node(node))
        outputs = ", ".join(self.use(v) for v in graph.outputs())
        lines.append(f"  return ({outputs})")
        return "\n".join(lines) + "\n"

    def declare(self, value: torch._C.Value) -> str:
        name = f"%{sum(n.startswith('%') for n in self.names.values())}"
        self.names[value.unique()] = name
        return f"{name} : {_type_text(value.type())}"

    def use(self, value: torch._C.Value) -> str:
        return self.names[value.unique()]

    def node(self, node: torch._C.Node) -> list[str]:
        kind = node.kind()
        if kind == "prim::Constant":
            self.names[node.output().unique()] = _constant_text(node.output().toIValue())
            return []
        if kind == "prim::ListConstruct":
            items = ", ".join(self.use(v) for v in node.inputs())
            self.names[node.output().unique()] = f"[{items}]"
            return []
        if kind == "prim::ListUnpack":
            return []  # shown with the operator that made the list
        text = f"{_operator_name(node)}({self.arguments(node)})"
        outputs = list(node.outputs())
        unpacked = [
            u.user for v in outputs for u in v.uses() if u.user.kind() == "prim::ListUnpack"
        ]
        if unpacked:
            outputs = [v for user in unpacked for v in user.outputs()]
        left = ", ".join(self.declare(v) for v in outputs)
        line = f"  {left} = {text}" if left else f"  {text}"
        where = _location(node) if self.source else ""
        return [f"{line}  # {where}" if where else line]

    def arguments(self, node: torch._C.Node) -> str:
        schema = schema_of(node)
        if schema is None:
            return ", ".join(self.use(v) for v in node.inputs())
        parts = []
        for i, (arg, value) in enumerate(zip(schema.arguments, node.inputs())):
            text = self.use(value)
            enum = _ENUMS.get(arg.name)
            if enum is not None and text.isdigit() and int(text) < len(enum):
                text = enum[int(text)]
            if "%" in text or (i < 2 and not arg.kwarg_only and not arg.has_default_value()):
                parts.append(text)
            elif arg.has_default_value() and text == _constant_text(arg.default_value):
                continue
            else:
                parts.append(f"{arg.name}={text}")
        return ", ".join(parts)


def _operator_name(node: torch._C.Node) -> str:
    schema = schema_of(node)
    if schema is None:
        return node.kind()
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def schema_of(node: torch._C.Node) -> torch._C.FunctionSchema | None:
    """The schema of the operator that a node calls; None for TorchScript's own kinds of nodes."""
    if node.kind().startswith(_BOXED) and "." in node.kind():
        namespace, name, *overload = node.kind()[len(_BOXED) :].split(".")
        return torch._C._get_schema(f"{namespace}::{name}", overload[0] if overload else "")
    return None if node.schema() == "(no schema)" else torch._C.parse_schema(node.schema())


# Operators that the extension calls itself: "torch_lazy_ext::aten.view.dtype".
_BOXED = "torch_lazy_ext::"


def _type_text(type_: Any) -> str:
    if not isinstance(type_, torch._C.TensorType):
        return str(type_)
    sizes = type_.sizes()
    dtype = str(type_.dtype()).removeprefix("torch.")
    return dtype if sizes is None else f"{dtype}{list(sizes)}"


def _constant_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        # Only wrapped numbers are constants of a graph; every other tensor is a parameter.
        return repr(value.item()) if value.numel() == 1 else str(tuple(value.shape))
    if isinstance(value, torch.device):
        return str(value)
    return repr(value)


def _location(node: torch._C.Node) -> str:
    return os.path.basename(str(node.sourceRange()).strip())
