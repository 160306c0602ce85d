"""Captures one item and compares it with eager. Runs in a worker process, since it may crash.

The outcomes:

    equal       one graph, like eager in everything that the oracle of the tests compares
    variants    the same with several graphs, as the data decided
    refused     an error says what cannot be captured; of PyTorch's own, any error in the capture
    wrong       something differs from eager, without an error
    raised      any other error
    crashed     the process is gone
    timed out   it took too long
    skipped     eager itself does not run it
"""

from __future__ import annotations

import copy
import re
import site
import time
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tools.conformance.items import ROOT, SELF, Item, load_databases

load_databases()

import model_zoo  # noqa: E402
import opinfo  # noqa: E402
import oracle  # noqa: E402
import test_modules  # noqa: E402
import test_transformers  # noqa: E402

from torch_lazy_ext import CompiledGraph, ExtractionError  # noqa: E402

OUTCOMES = ("equal", "variants", "refused", "wrong", "raised", "crashed", "timed out", "skipped")
Capture = Callable[[nn.Module, tuple[Any, ...]], Callable[..., Any]]


def check(item: Item) -> dict[str, Any]:
    """What comes of an item: an outcome, and what is known beside it."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            own = item.contestant == SELF
            result = (_OWN if own else _OTHERS)[item.kind](item)
        except unittest.SkipTest as e:
            result = dict(outcome="skipped", reason=str(e))
        except (ExtractionError, _Refused) as e:
            result = dict(outcome="refused", reason=str(e))
        except AssertionError as e:
            # The oracles say which error there was where none was expected.
            refused = isinstance(e.__cause__, ExtractionError)
            result = dict(
                outcome="refused" if refused else "wrong",
                reason=str(e.__cause__ if refused else e),
            )
        except Exception as e:
            result = dict(outcome="raised", reason=f"{type(e).__name__}: {e}")
    reason = " ".join(result.get("reason", "").split())
    for folder in (f"{ROOT}/", *(f"{path}/" for path in site.getsitepackages())):
        reason = reason.replace(folder, "")
    line = re.search(r"at ([\w./-]+\.py:\d+)", reason)
    return {
        **result,
        "reason": reason[:600],
        "line": line[1] if line else "",
        "seconds": round(time.perf_counter() - begin, 3),
    }


# ------------------------------------------------------------------------ this project's graphs


def _operator(item: Item) -> dict[str, Any]:
    op, dtype = opinfo.ENTRIES[item.name], getattr(torch, item.dtype)
    captures, refusals = opinfo.check_entry(op, dtype, 1)
    if refusals:
        raise refusals[0]
    return dict(outcome="equal" if captures == 1 else "variants", variants=captures)


def _graph_numbers(graphs: list[CompiledGraph]) -> dict[str, Any]:
    variants = max(len(graph.specializations) for graph in graphs)
    nodes = max(
        sum(not node.kind().startswith("prim::") for node in graph.graph.nodes())
        for graph in graphs
    )
    return dict(outcome="equal" if variants == 1 else "variants", variants=variants, nodes=nodes)


def _module_cases(item: Item) -> list[Any]:
    name, mode = item.name.split()
    info, training = test_modules.INFOS[name], mode == "train"
    count = len(test_modules._samples(name, training, 0))
    # Spread over the list: neighbours differ in little.
    chosen = sorted({i * count // 4 for i in range(4)}) if count else []
    cases = [test_modules._Case(info, training, k) for k in chosen]
    cases = [case for case in cases if test_modules._runs_eagerly(case)]
    if not cases:
        raise unittest.SkipTest("no sample runs eagerly on the CPU")
    return cases


def _module(item: Item) -> dict[str, Any]:
    graphs = [
        oracle.check(case.make, case.inputs, exact=False, captures=None)
        for case in _module_cases(item)
    ]
    return _graph_numbers([graph for graph in graphs if graph is not None])


def _model(item: Item) -> dict[str, Any]:
    model_zoo.set_up_module()
    row = test_transformers.Row(item.name)
    test_transformers.check(model_zoo.MODELS[item.name], row)
    return dict(
        outcome="equal" if row.variants == 1 else "variants",
        variants=row.variants,
        nodes=row.nodes,
        extraction=row.extraction,
        call=row.replay,
        eager=row.eager,
        reason=row.note,
    )


_OWN = {"operator": _operator, "module": _module, "model": _model}


# ------------------------------------------------------------------------------ PyTorch's own


class _Flat(nn.Module):
    """A program as a module that takes tensors and nothing else: what all of them can capture."""

    def __init__(self, program: Callable[..., Any], example: Any) -> None:
        super().__init__()
        self.program = program
        self._leaves, self._spec = opinfo.flatten(example)
        self._at = [i for i, v in enumerate(self._leaves) if isinstance(v, torch.Tensor)]

    def tensors(self, sample: Any) -> tuple[torch.Tensor, ...]:
        leaves, _ = opinfo.flatten(opinfo.copy_tensors(sample))
        return tuple(leaves[i] for i in self._at)

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self._leaves)
        for i, t in zip(self._at, tensors, strict=True):
            leaves[i] = t
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, self._spec)
        return self.program(*args, **kwargs)


def _capture_lazy(module: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    import torch._lazy.ts_backend
    from torch._lazy.extract_compiled_graph import extract_compiled_graph

    try:
        torch._C._lazy._get_default_device_type()
    except RuntimeError:
        torch._lazy.ts_backend.init()
    # It takes a GraphModule, and runs it: one node that is the whole program loses nothing.
    graph = torch.fx.Graph()
    inputs = tuple(graph.placeholder(f"arg{i}") for i in range(len(args)))
    graph.output(graph.call_module("program", inputs))
    return extract_compiled_graph(torch.fx.GraphModule({"program": module}, graph), args)


def _capture_compile(module: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    # The question is what it captures whole; compiling the kernels too would take days.
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    graph(*opinfo.copy_tensors(args))  # It captures on the first call.
    return graph


CAPTURES: dict[str, Capture] = {
    "torch._lazy": _capture_lazy,
    "jit.trace": lambda m, args: torch.jit.trace(m, args, check_trace=False, strict=False),
    "export": lambda m, args: torch.export.export(m, args).module(),
    "compile": _capture_compile,
}


class _Refused(Exception):
    """A contestant did not capture the program, and said so."""


def _compare(contestant: str, program: Any, captured: Any, fresh: Any, values: bool) -> None:
    """Capture `program` on one (args, kwargs), call the result on both, compare with eager.

    Compared are structure, dtypes, shapes and values of the results, and the arguments after.
    """
    torch._dynamo.reset()
    flat = _Flat(program, captured)
    eager = _Flat(copy.deepcopy(program), captured)
    try:
        graph = CAPTURES[contestant](flat, flat.tensors(captured))
    except Exception as e:
        raise _Refused(f"{type(e).__name__}: {e}") from e
    for sample in (fresh, captured, fresh):
        expected_args, actual_args = flat.tensors(sample), flat.tensors(sample)
        torch.manual_seed(0)
        expected = eager(*expected_args)
        torch.manual_seed(0)
        actual = graph(*actual_args)
        want = _tensors([expected, expected_args])
        got = _tensors([actual, actual_args])
        if len(want) != len(got):
            raise AssertionError(f"{len(got)} tensors, expected {len(want)}")
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                raise AssertionError(
                    f"tensor {i}: {b.dtype} {tuple(b.shape)}, expected {a.dtype} {tuple(a.shape)}"
                )
            if values:
                torch.testing.assert_close(b, a, equal_nan=True, check_device=False)


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors and numbers of a result; those classes that trace changes do not count."""
    leaves = model_zoo.tensors(tree)
    numbers = [torch.tensor(v) for v in opinfo.flatten(tree)[0] if isinstance(v, (int, float))]
    return [*leaves, *numbers]


def _operator_of_others(item: Item) -> dict[str, Any]:
    op, dtype = opinfo.ENTRIES[item.name], getattr(torch, item.dtype)
    with unittest.mock.patch.object(
        opinfo.common_methods_invocations, "wrapper_set_seed", opinfo.without_seed
    ):
        for captured, fresh in opinfo.samples(op, dtype, 1):
            values = item.name not in opinfo.UNINITIALISED
            _compare(item.contestant, op, captured, fresh, values)
    return dict(outcome="equal")


def _module_of_others(item: Item) -> dict[str, Any]:
    for case in _module_cases(item):
        torch.manual_seed(0)
        module = case.make()
        samples = []
        for i in range(2):
            torch.manual_seed(i)
            call = case.inputs(i)
            samples.append((call.args, call.kwargs))
        _compare(item.contestant, module, *samples, values=True)
    return dict(outcome="equal")


def _model_of_others(item: Item) -> dict[str, Any]:
    model_zoo.set_up_module()
    case = model_zoo.MODELS[item.name]
    module = case.make()
    _compare(item.contestant, module, ((), case.inputs(0)), ((), case.inputs(1)), values=True)
    return dict(outcome="equal")


_OTHERS = {
    "operator": _operator_of_others,
    "module": _module_of_others,
    "model": _model_of_others,
}
