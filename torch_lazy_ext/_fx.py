"""FX: a lowered TorchScript graph as a `torch.fx.GraphModule` of the same operators.

What a compiler that speaks FX needs of a graph: one `OpOverload` per operator, and on every node a
fake tensor that says what the recording knows (`meta["val"]`) and the user's line
(`meta["stack_trace"]`).
"""

from __future__ import annotations

import dataclasses
import linecache
import operator
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_lazy_ext import _C, _text
from torch_lazy_ext._errors import ExtractionError

# What the schema calls an argument that TorchScript passes as a plain integer -> its values.
_ENUMS: dict[str, list[Any]] = {
    "ScalarType": [getattr(torch, name, None) for name in _text.SCALAR_TYPES],
    "Layout": [getattr(torch, name, None) for name in ("strided", *_text.LAYOUTS[1:])],
    "MemoryFormat": [getattr(torch, name) for name in _text.MEMORY_FORMATS],
}


def graph_module(graph: torch._C.Graph, targets: Sequence[int] | None = None) -> fx.GraphModule:
    """The same operators on the same values, in the same order.

    Inputs and outputs are those of `graph`; the module returns a tuple. With `targets`, it copies
    each output to the input with that number instead, and returns an empty tuple. Every node that
    is a tensor has a fake tensor in `meta["val"]` with the recorded sizes, strides, dtype and
    device, and views share the fake storage of what they are views of. Generators are attributes of
    the module.

    Raises:
        ExtractionError: the graph holds a node that is no operator.
    """
    return _Translation(graph).run(targets)


class _Translation:
    def __init__(self, graph: torch._C.Graph) -> None:
        self.source = graph
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.known: dict[int, Any] = {}  # unique value -> fx node, list of them, or a constant

    def run(self, targets: Sequence[int] | None) -> fx.GraphModule:
        with self.mode, torch.no_grad():
            for i, value in enumerate(self.source.inputs()):
                node = self.graph.placeholder(f"arg{i}")
                node.meta["val"] = _fake(value)
                self.known[value.unique()] = node
            for source in self.source.nodes():
                self.translate(source)
        outputs = tuple(self.known[v.unique()] for v in self.source.outputs())
        if targets is not None:
            inputs = list(self.graph.find_nodes(op="placeholder"))
            for output, target in zip(outputs, targets):
                copy = self.graph.call_function(
                    torch.ops.aten.copy_.default, (inputs[target], output)
                )
                copy.meta["val"] = inputs[target].meta["val"]
            outputs = ()
        self.graph.output(outputs).meta["val"] = fx.map_arg(outputs, lambda n: n.meta["val"])
        return fx.GraphModule(self.root, self.graph, "CapturedGraph")

    def translate(self, source: torch._C.Node) -> None:
        kind = source.kind()
        if kind == "prim::Constant":
            self.known[source.output().unique()] = self.constant(source.output())
        elif kind == "prim::ListConstruct":
            self.known[source.output().unique()] = [self.known[v.unique()] for v in source.inputs()]
        elif kind == "prim::ListUnpack":
            self.unpack(self.known[next(source.inputs()).unique()], list(source.outputs()))
        elif kind == "aten::Float":
            # A number that the graph computes, wherever an operator takes a float.
            self.number(torch.ops.aten.item.default, source).meta["val"] = 1.0
        elif kind == "torch_lazy_ext::wrapped_number":
            wrapped = self.number(torch.ops.torch_lazy_ext.wrapped_number.default, source)
            wrapped.meta["val"] = torch.empty((), dtype=torch.float64)
        else:
            self.call(source)

    def constant(self, value: torch._C.Value) -> Any:
        constant = value.toIValue()
        if isinstance(constant, torch.Generator):  # fx cannot write one down
            name = f"generator{sum(1 for n in vars(self.root) if n.startswith('generator'))}"
            setattr(self.root, name, constant)
            return self.graph.get_attr(name)
        return constant

    def number(self, target: torch._ops.OpOverload, source: torch._C.Node) -> fx.Node:
        node = self.graph.call_function(target, (self.known[next(source.inputs()).unique()],))
        self.known[source.output().unique()] = node
        return node

    def call(self, source: torch._C.Node) -> None:
        overload = _overload(source)
        arguments = overload._schema.arguments
        values = [_argument(a, self.known[v.unique()]) for a, v in zip(arguments, source.inputs())]
        positional = [v for a, v in zip(arguments, values) if not a.kwarg_only]
        while positional and _is_default(arguments[len(positional) - 1], positional[-1]):
            positional.pop()
        keywords = {
            a.name: v for a, v in zip(arguments, values) if a.kwarg_only and not _is_default(a, v)
        }
        node = self.graph.call_function(overload, tuple(positional), keywords)
        where = _stack_trace(source)
        if where:
            node.meta["stack_trace"] = where
        outputs = list(source.outputs())
        if makes_views(overload) or not all(_is_complete(v) for v in _unpacked(outputs)):
            node.meta["val"] = self.infer(node)
        elif len(outputs) == 1:
            node.meta["val"] = _recorded(outputs[0])
        else:
            node.meta["val"] = tuple(_recorded(v) for v in outputs)
        if len(outputs) == 1:
            self.known[outputs[0].unique()] = node
        else:
            self.unpack(node, outputs)

    def infer(self, node: fx.Node) -> Any:
        """What the operator gives for fake tensors: views of them, where they are views."""

        def value(n: fx.Node) -> Any:
            return n.meta["val"] if n.op != "get_attr" else getattr(self.root, str(n.target))

        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def unpack(self, node: Any, outputs: list[torch._C.Value]) -> None:
        if isinstance(node, list):  # a list made in the graph
            for value, element in zip(outputs, node):
                self.known[value.unique()] = element
            return
        for i, value in enumerate(outputs):
            element = self.graph.call_function(operator.getitem, (node, i))
            element.meta["val"] = node.meta["val"][i]
            if "stack_trace" in node.meta:
                element.meta["stack_trace"] = node.meta["stack_trace"]
            self.known[value.unique()] = element


def _overload(source: torch._C.Node) -> torch._ops.OpOverload:
    schema = _text.schema_of(source)
    if schema is None:
        raise ExtractionError(f"{source.kind()} in a lowered graph is no operator of PyTorch's")
    return _overload_named(schema.name, schema.overload_name)


def _overload_named(name: str, overload: str) -> torch._ops.OpOverload:
    namespace, _, base = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), base)
    found: torch._ops.OpOverload = getattr(packet, overload or "default")
    return found


def _argument(argument: torch._C.Argument, value: Any) -> Any:
    """A value as the Python face of the operator wants it: dtypes, not their numbers."""
    enum = next((e for name, e in _ENUMS.items() if name in str(argument.real_type)), None)
    return enum[value] if enum is not None and value is not None else value


def _is_default(argument: torch._C.Argument, value: Any) -> bool:
    if not argument.has_default_value() or isinstance(value, fx.Node):
        return False
    default = _argument(argument, argument.default_value)
    return type(default) is type(value) and repr(default) == repr(value)


def outputs_of(module: fx.GraphModule) -> Sequence[Any]:
    """What a graph returns: nodes, or constants."""
    outputs = module.graph.output_node().args[0]
    assert isinstance(outputs, Sequence)
    return outputs


def makes_views(overload: torch._ops.OpOverload) -> bool:
    """Whether the results of an operator share the memory of an argument."""
    return _C.makes_views(overload._schema.name, overload._schema.overload_name)


def _unpacked(outputs: list[torch._C.Value]) -> list[torch._C.Value]:
    """The tensors among the outputs, those of lists included."""
    tensors = []
    for value in outputs:
        users = [u.user for u in value.uses() if u.user.kind() == "prim::ListUnpack"]
        tensors += [v for user in users[:1] for v in user.outputs()] or [value]
    return tensors


def _is_complete(value: torch._C.Value) -> bool:
    kind = value.type()
    return isinstance(kind, torch._C.TensorType) and kind.sizes() is not None


def _fake(value: torch._C.Value) -> torch.Tensor:
    kind: Any = value.type()  # a TensorType
    return torch.empty_strided(
        kind.sizes(), kind.strides(), dtype=kind.dtype(), device=kind.device()
    )


def _recorded(value: torch._C.Value) -> Any:
    unpacked = _unpacked([value])
    return _fake(value) if unpacked == [value] else [_fake(v) for v in unpacked]


def _stack_trace(source: torch._C.Node) -> str:
    """As `traceback` prints a frame, which is what readers of `meta["stack_trace"]` parse."""
    file, _, line = str(source.sourceRange()).strip().rpartition(":")
    if not file:
        return ""
    code = linecache.getline(file, int(line)).strip()
    return f'  File "{file}", line {line}, in <program>\n    {code}\n'


# --- between processes -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A node, by its position in the graph."""

    position: int


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A fake tensor: which of the graph's storages it looks at, and how."""

    storage: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def dump(module: fx.GraphModule) -> bytes:
    """A graph as `graph_module` makes it, without generators, for `load` in another process."""
    positions = {n: i for i, n in enumerate(module.graph.nodes)}
    storages: dict[int, int] = {}

    def layout(val: Any) -> Any:
        if isinstance(val, torch.Tensor):
            storage = storages.setdefault(val.untyped_storage()._cdata, len(storages))
            return _Layout(
                storage, val.dtype, tuple(val.shape), tuple(val.stride()), int(val.storage_offset())
            )
        return type(val)(layout(v) for v in val) if isinstance(val, (list, tuple)) else val

    def reference(n: fx.Node) -> Any:
        return _Reference(positions[n])

    nodes = []
    for n in module.graph.nodes:
        args, kwargs = fx.map_arg((n.args, n.kwargs), reference)
        target = n.target.name() if isinstance(n.target, torch._ops.OpOverload) else n.target
        nodes.append((n.op, target, args, dict(kwargs), layout(n.meta.get("val"))))
    return pickle.dumps(nodes)


def load(data: bytes) -> fx.GraphModule:
    """The graph that `dump` wrote, with fake tensors of its own."""
    nodes: list[fx.Node] = []
    storages: dict[int, torch.UntypedStorage] = {}
    graph = fx.Graph()

    def fake(val: Any) -> Any:
        if isinstance(val, (list, tuple)):
            return type(val)(fake(v) for v in val)
        if not isinstance(val, _Layout):
            return val
        if val.storage not in storages:
            tensor = torch.empty_strided(val.sizes, val.strides, dtype=val.dtype)
            storages[val.storage] = tensor.untyped_storage()
            return tensor
        view = torch.empty(0, dtype=val.dtype)
        return view.set_(storages[val.storage], val.offset, val.sizes, val.strides)

    def resolved(value: Any) -> Any:
        return fx.node.map_aggregate(
            value, lambda v: nodes[v.position] if isinstance(v, _Reference) else v
        )

    with FakeTensorMode(), torch.no_grad():
        for op, target, args, kwargs, val in pickle.loads(data):
            if isinstance(target, str) and op == "call_function":
                name, _, overload = target.partition(".")
                target = _overload_named(name, overload)
            node = graph.create_node(op, target, resolved(args), resolved(kwargs))
            node.meta["val"] = fake(val)
            nodes.append(node)
    return fx.GraphModule(torch.nn.Module(), graph, "CapturedGraph")
