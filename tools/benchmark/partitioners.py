#!/usr/bin/env python3
"""Compares ways to cut a joint graph of forward and backward in two.

    python tools/benchmark/partitioners.py
    python tools/benchmark/partitioners.py --models feedforward --backends inductor

`autograd` is the cut of an extracted graph: the backward reads what eager saves. `default` and
`min-cut` are functorch's partitioners, on the same operators written as one joint graph, decomposed
as Inductor wants it (`inductor`) or as they were captured (`torchscript`). Prints milliseconds for
the forward graph and then the backward graph, the median of rounds in which all take turns; and how
much the forward makes for the backward alone, in KiB, beside its results and inputs. Before anyone
is timed, results and gradients are compared with those of the first cut; dropout draws its masks
from the same state.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import operator
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import default_partition, min_cut_rematerialization_partition
from models import CASES, Case
from torch import Tensor, fx, nn
from torch._inductor import compile_fx, config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from training import TRAINED

import torch_lazy_ext
from torch_lazy_ext import _C, _fx, _inductor

Runnable = Callable[[list[Tensor]], Sequence[Tensor]]
Compile = Callable[[fx.GraphModule, list[Tensor]], Runnable]


class FeedForward(nn.Module):
    """GELU, dropout and normalization between products: much to recompute, and cheaply."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(4 * width, width),
                nn.Dropout(0.1),
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


MODELS: dict[str, Case] = {
    "mlp": CASES["MLP, 8 layers"],
    "bert": CASES["BERT, 2 layers of 32"],
    "resnet": TRAINED["resnet"],
    "feedforward": Case(lambda: FeedForward(128, 4), lambda: (torch.randn(8, 64, 128),)),
    "elementwise": CASES["chain of 20, 1M"],
}


@dataclasses.dataclass
class Halves:
    """A joint graph that is cut.

    Attributes:
        num_results: how many outputs of the forward are not there for the backward.
        reads: for each input of the backward, where it is: "inputs", "outputs" or "tangents" of the
            forward, and its position there.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_results: int
    reads: list[tuple[str, int]]


def captured(case: Case) -> tuple[Halves, list[Tensor], list[Tensor]]:
    """The graphs of a module in training, cut as they are, and inputs and tangents of a call."""
    module = case.make().train()
    args = [a.requires_grad_() if a.is_floating_point() else a for a in case.inputs()]
    graphs: list[tuple[fx.GraphModule, list[Tensor]]] = []

    def keep(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
        graphs.append((graph, [t.detach() for t in inputs]))
        return graph

    graph = torch_lazy_ext.extract_compiled_graph(module, args, backend=keep)
    results = graph(*args)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [torch.randn_like(r) for r in results])
    (forward, inputs), (backward, given) = graphs
    (variant,) = graph.specializations
    (half,) = variant._backwards
    lowered, cut = variant._lowered, half.lowered
    roots = [*cut.outputs, *(w.root for w in lowered.writes), *(g.root for g in lowered.guards)]
    own = list(dict.fromkeys(roots))
    outputs = list(dict.fromkeys([*own, *cut.saved]))
    _set_outputs(forward, [_fx.outputs_of(forward)[lowered.outputs.index(r)] for r in outputs])
    reads = [("outputs", outputs.index(r)) for r in cut.saved]
    reads += [("tangents", k) for k in range(len(cut.outputs))]
    return Halves(forward, backward, len(own), reads), inputs, given[len(cut.saved) :]


def _set_outputs(module: fx.GraphModule, outputs: Sequence[Any]) -> None:
    module.graph.output_node().args = (tuple(outputs),)
    module.recompile()


def joined(halves: Halves) -> fx.GraphModule:
    """Both halves as the joint graph that functorch's partitioners take."""
    graph = fx.Graph()
    inputs = {}
    for i, node in enumerate(halves.forward.graph.find_nodes(op="placeholder")):
        inputs[node] = graph.placeholder(f"primals_{i + 1}")
        inputs[node].meta = dict(node.meta)
    results = _fx.outputs_of(halves.forward)[: halves.num_results]
    tangents = {}
    given = halves.backward.graph.find_nodes(op="placeholder")
    for node, (kind, k) in zip(given, halves.reads, strict=True):
        if kind == "tangents":
            tangents[k] = graph.placeholder(f"tangents_{k + 1}")
            tangents[k].meta = dict(node.meta)
    copies = dict(inputs)
    graph.graph_copy(halves.forward.graph, copies)
    for node in graph.nodes:
        node.meta["partitioner_tag"] = "is_forward"
    for node in tangents.values():
        node.meta["partitioner_tag"] = "is_backward"
    saved = _fx.outputs_of(halves.forward)
    for node, (kind, k) in zip(given, halves.reads, strict=True):
        copies[node] = tangents[k] if kind == "tangents" else copies[saved[k]]
    graph.graph_copy(halves.backward.graph, copies)
    for node in graph.nodes:
        node.meta.setdefault("partitioner_tag", "is_backward")
    gradients = _fx.outputs_of(halves.backward)
    graph.output(tuple(copies[n] for n in [*results, *gradients]))
    return fx.GraphModule(torch.nn.Module(), graph)


def decomposed(joint: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
    """A joint graph in Inductor's operators, with fake tensors of one kind."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    names = [n.target for n in joint.graph.find_nodes(op="placeholder")]
    fakes = [mode.from_tensor(t, static_shapes=True) for t in inputs]
    drawn_as_captured = config.patch(fallback_random=True)
    with drawn_as_captured, torch.no_grad(), mode, fx.traceback.preserve_node_meta():
        table = select_decomp_table()
        traced = make_fx(fx.Interpreter(joint).run, decomposition_table=table)(*fakes)
    for node, name in zip(traced.graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = name
        node._rename(name)
    traced.recompile()
    compile_fx._recursive_joint_graph_passes(traced, input_device=torch.device("cpu"))
    return traced


def cut(
    joint: fx.GraphModule, inputs: list[Tensor], num_results: int, partition: Callable[..., Any]
) -> Halves:
    """A joint graph in two, by one of functorch's partitioners."""
    placeholders = [n.name for n in joint.graph.find_nodes(op="placeholder")]
    forward, backward = partition(joint, inputs, num_fwd_outputs=num_results)
    outputs = [n.name for n in _fx.outputs_of(forward)]
    reads = []
    for node in backward.graph.find_nodes(op="placeholder"):
        name = node.name
        if name.startswith("tangents"):
            reads.append(("tangents", int(name.rpartition("_")[2]) - 1))
        elif name in outputs:
            reads.append(("outputs", outputs.index(name)))
        else:
            reads.append(("inputs", placeholders.index(name)))
    return Halves(forward, backward, num_results, reads)


def refreshed(module: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
    """The same graph with fake tensors of its own, of which views share their memory."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    module = fx.GraphModule(module, graph)
    mode = FakeTensorMode()
    with torch.no_grad(), mode:
        FakeProp(module).run(*(mode.from_tensor(t, static_shapes=True) for t in inputs))
    return module


class FakeProp(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta = {**n.meta, "val": value}
        return value


def with_inductor(module: fx.GraphModule, inputs: list[Tensor]) -> Runnable:
    module = refreshed(module, inputs)
    code = _inductor.compile(module, {}, torch.get_num_threads())
    program = code.program()
    code.check(module, inputs, program.run(inputs))
    return program.run


def with_torchscript(module: fx.GraphModule, inputs: list[Tensor]) -> Runnable:
    return _C.Program(ToTorchScript(module).translated(inputs)).run


class ToTorchScript(fx.Interpreter):
    """Writes a graph down in TorchScript while it runs, with the types of what comes out."""

    def translated(self, inputs: list[Tensor]) -> torch._C.Graph:
        self.script = torch._C.Graph()
        self.values: dict[fx.Node, torch._C.Value] = {}
        with torch.no_grad():
            self.run(*inputs)
        for node in _fx.outputs_of(self.module):
            self.script.registerOutput(self.values[node])
        return self.script

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n.op == "placeholder":
            self.values[n] = self.script.addInput()
            self.values[n].inferTypeFrom(made)
        elif isinstance(n.target, torch._ops.OpOverload):
            self.operator(n, made)
        return made

    def operator(self, n: fx.Node, made: Any) -> None:
        assert isinstance(n.target, torch._ops.OpOverload)
        operands = []
        for k, argument in enumerate(n.target._schema.arguments):
            default = argument.default_value
            value = n.args[k] if k < len(n.args) else n.kwargs.get(argument.name, default)
            operands.append(self.operand(value, argument))
        results = made if isinstance(made, tuple) else (made,)
        name = n.target._schema.name
        node = self.script.insertNode(self.script.create(name, operands, len(results)))
        for value, result in zip(node.outputs(), results, strict=True):
            if isinstance(result, Tensor):
                value.inferTypeFrom(result)
        outputs = list(node.outputs())
        self.values[n] = outputs[0]
        for user in n.users:
            if user.target is operator.getitem:
                self.values[user] = outputs[user.args[1]]

    def operand(self, value: Any, argument: torch._C.Argument) -> torch._C.Value:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, (list, tuple)) and any(isinstance(v, fx.Node) for v in value):
            items = [self.operand(v, argument) for v in value]
            made = self.script.create("prim::ListConstruct", items, 1)
            element = argument.type.getElementType()
            made.output().setType(torch._C.ListType(element))
            return self.script.insertNode(made).output()
        if value is None:
            made = self.script.create("prim::Constant")
            made.output().setType(torch._C.NoneType.get())
            return self.script.insertNode(made).output()
        for values in _fx._ENUMS.values():  # which TorchScript knows by number
            if value in values and not isinstance(value, (int, float)):
                value = values.index(value)
        return self.script.insertConstant(value)


class Step:
    """Forward and backward of a joint graph that is cut."""

    def __init__(
        self, halves: Halves, inputs: list[Tensor], tangents: list[Tensor], compile: Compile
    ) -> None:
        self.halves, self.inputs, self.tangents = halves, inputs, tangents
        self.forward = compile(halves.forward, inputs)
        outputs = list(self.forward(inputs))
        self.saved = saved_bytes(halves, inputs, outputs)
        self.backward = compile(halves.backward, self.read(outputs))

    def read(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        places = {"inputs": self.inputs, "outputs": outputs, "tangents": self.tangents}
        return [places[kind][k] for kind, k in self.halves.reads]

    def __call__(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        outputs = self.forward(self.inputs)
        return outputs[: self.halves.num_results], self.backward(self.read(outputs))


def saved_bytes(halves: Halves, inputs: list[Tensor], outputs: Sequence[Tensor]) -> int:
    """The memory that lives until the backward and that nobody else holds."""
    own = [*inputs, *outputs[: halves.num_results]]
    held = {t.untyped_storage().data_ptr() for t in own}
    storages = {}
    for kind, k in halves.reads:
        if kind == "outputs" and outputs[k].untyped_storage().data_ptr() not in held:
            storage = outputs[k].untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def steps_of(case: Case, backend: str) -> dict[str, Step]:
    with fresh_cache():
        halves, inputs, tangents = captured(case)
        compile = {"inductor": with_inductor, "torchscript": with_torchscript}[backend]
        steps = {"autograd": Step(halves, inputs, tangents, compile)}
        for name, partition in PARTITIONERS.items():
            joint = joined(halves)
            if backend == "inductor":
                joint = decomposed(joint, [*inputs, *tangents])
            halves_now = cut(joint, [*inputs, *tangents], halves.num_results, partition)
            steps[name] = Step(halves_now, inputs, tangents, compile)
    state = torch.get_rng_state()
    expected = steps["autograd"]()
    for step in steps.values():
        torch.set_rng_state(state)
        torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-4)
    return steps


PARTITIONERS: dict[str, Callable[..., Any]] = {
    "default": default_partition,
    "min-cut": min_cut_rematerialization_partition,
}
BACKENDS = ("torchscript", "inductor")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--seconds", type=float, default=4.0, help="for one row; default: 4")
    parser.add_argument("--threads", type=int, default=1, help="of each operator; default: 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuts = ["autograd", *PARTITIONERS]
    print("| model | backend |", " | ".join(f"{c}, ms | KiB" for c in cuts), "|")
    print("| --- | --- |", " | ".join("---: | ---:" for _ in cuts), "|")
    for model in options.models:
        for backend in options.backends:
            steps = steps_of(MODELS[model], backend)
            times: dict[str, list[float]] = {c: [] for c in cuts}
            end = time.perf_counter() + options.seconds
            gc.collect()
            while time.perf_counter() < end or len(times["autograd"]) < 10:
                for name, step in steps.items():
                    begin = time.perf_counter()
                    step()
                    times[name].append(time.perf_counter() - begin)
            cells = [
                f"{statistics.median(times[c]) * 1e3:.3f} | {steps[c].saved / 1024:,.0f}"
                for c in cuts
            ]
            print(f"| {model} | {backend} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
