"""Compile: from a lowered graph to what runs it, by the backend that the user chose.

A variant runs on TorchScript as soon as it is lowered. What a backend makes of its graph takes the
place of that after the first call, whose inputs it is made for: what the first call has to correct
about a graph is corrected by then.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from torch_lazy_ext import _C, _fx, _native, _scalars
from torch_lazy_ext._errors import ExtractionError

BACKENDS = ("torchscript", "fx", "inductor", "tiered")
BackendFunction = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]
Backend = str | BackendFunction


class WrongOutputs(ExtractionError):
    """What a user's backend returns is not what the graph has."""


class Graph:
    """A lowered graph and what a backend has to know of it.

    Attributes:
        weights: the inputs that are state of the program, and that no call of it writes to.
        functional: where the graph writes to inputs and gives nothing else, the same graph with
            what is to be written as outputs, and for each the input that it is written to.
        runs_on: the backend that runs it by now.
    """

    def __init__(
        self,
        graph: torch._C.Graph,
        weights: Sequence[int] = (),
        unsuitable: str = "",
        functional: tuple[torch._C.Graph, list[int]] | None = None,
    ) -> None:
        self.graph = graph
        self.functional = functional
        self.weights = list(weights)
        self._unsuitable = unsuitable
        self.runs_on = "torchscript"

    @functools.cached_property
    def unsuitable(self) -> str:
        """Why a compiler of native code must not have it, or nothing."""
        for node in self.graph.nodes():
            if node.kind().startswith("torch_lazy_ext::torch_lazy_ext."):
                return "a generator that the program seeds or reads"
            if node.hasAttribute("default_dtype"):
                return "operators under another default dtype"
        return self._unsuitable

    @functools.cached_property
    def draws(self) -> bool:
        """Whether a run moves the random number generator."""
        overloads = (n.target for n in self.module.graph.nodes)
        return any(
            isinstance(o, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in o.tags
            for o in overloads
        )

    @property
    def written(self) -> list[int]:
        """The inputs that a run writes to."""
        return self.functional[1] if self.functional else []

    @functools.cached_property
    def module(self) -> fx.GraphModule:
        return _fx.graph_module(*(self.functional or (self.graph,)))


class Compiler:
    """What a program's graphs are compiled with.

    Args:
        backend: one of BACKENDS, or a function like those that `torch.compile` takes as backend.
        freeze: weights are constants of the code, which is made anew when they change.

    Raises:
        ValueError: there is no such backend, or it cannot freeze.
    """

    def __init__(self, backend: Backend, freeze: bool) -> None:
        if not callable(backend) and backend not in BACKENDS:
            raise ValueError(
                f"backend is {backend!r}: it is one of {', '.join(BACKENDS)}, or a callable that "
                "makes a callable of (GraphModule, example_inputs)"
            )
        if freeze and (callable(backend) or backend == "fx"):
            raise ValueError("freeze=True is for the backends torchscript, inductor and tiered")
        self.backend = backend
        self.freeze = freeze
        self._warned = False

    def start(self, graph: Graph) -> _C.Program | _C.Switch:
        """What runs a graph at once."""
        if self.backend == "torchscript" and not self.freeze:
            return _C.Program(graph.graph)
        return _C.Switch(_C.ScriptProgram(graph.graph))

    def finish(
        self, graph: Graph, program: _C.Program | _C.Switch, inputs: list[torch.Tensor]
    ) -> None:
        """Compile a graph for the inputs of its first call, and let `program` run that.

        Raises:
            ExtractionError: it cannot be compiled, and that is not Inductor's fault.
        """
        if not isinstance(program, _C.Switch):
            return
        try:
            self._finish(graph, program, inputs)
        except Exception as e:
            name = _name_of(self.backend)
            raise ExtractionError(f"the backend {name} does not compile a graph: {e}") from e

    def _finish(self, graph: Graph, program: _C.Switch, inputs: list[torch.Tensor]) -> None:
        if callable(self.backend):
            if graph.functional:
                return  # a compiler that takes graphs need not take some that write to inputs
            called = _C.stoppable(_called, self.backend, graph, inputs)
            program.target = self._attempt(graph, _C.PythonProgram(called), weakref.ref(program))
            graph.runs_on = _name_of(self.backend)
        elif self.backend == "fx":
            interpreted = _C.PythonProgram(_interpreted(graph.module))
            program.target = self._attempt(graph, interpreted, weakref.ref(program))
            graph.runs_on = "fx"
        elif self.freeze and graph.weights:
            _Frozen(self, graph, program).arm(inputs)
        elif self.backend != "torchscript":
            self.build(graph, {}, weakref.ref(program))

    def build(
        self,
        graph: Graph,
        frozen: dict[int, torch.Tensor],
        place: weakref.ref[_C.Switch],
    ) -> None:
        """Compile a graph, here or in the background, and let `place` run that.

        When it cannot be compiled, `place` stays as it is, and there is one warning.
        """
        if self.backend == "torchscript":
            switch = place()
            assert switch is not None
            switch.target = _C.ScriptProgram(_with_constants(graph.graph, frozen))
            return
        threads = torch.get_num_threads()  # every thread has a number of its own
        if self.backend == "inductor":
            self._compile(_here, graph, frozen, threads, place)
            return
        _Background(lambda: self._compile(_elsewhere, graph, frozen, threads, place)).start()

    def _compile(
        self,
        compile: Callable[[fx.GraphModule, dict[int, torch.Tensor], int], _native.Code],
        graph: Graph,
        frozen: dict[int, torch.Tensor],
        threads: int,
        place: weakref.ref[_C.Switch],
    ) -> None:
        try:
            if graph.unsuitable:
                raise _native.Unsuitable(graph.unsuitable)
            module = _scalars.as_tensors(graph.module)
            code = _C.stoppable(compile, module, frozen, threads)
            code.last_is_check = module.meta.get("check", False)
        except Exception as e:
            self._stays(graph, e)
            return
        switch = place()
        if switch is not None:
            first = functools.partial(self._first_run, graph, module, code, place, switch.target)
            switch.target = _C.PythonProgram(first)
            graph.runs_on = "inductor"

    def _first_run(
        self,
        graph: Graph,
        module: fx.GraphModule,
        code: _native.Code,
        place: weakref.ref[_C.Switch],
        script: _C.Runnable,
        inputs: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Run compiled code for the first time; keep it when its outputs are as they must be."""
        drawn = _C.RandomStates([torch.default_generator])
        written = {i: inputs[i].clone() for i in graph.written}
        switch = place()
        assert switch is not None
        try:
            program = code.program()
            outputs = program.run(inputs)
            code.check(module, inputs, outputs)
        except Exception as e:
            drawn.put_back()
            for i, value in written.items():
                inputs[i].copy_(value)
            outputs = script.run(inputs)  # or it raises: an error of the program on this data
            if not isinstance(e, _C.NotFinite):
                self._stays(graph, e)
                switch.target = script
            return outputs
        switch.target = self._attempt(graph, program, place, script)
        return outputs

    def _attempt(
        self,
        graph: Graph,
        program: _C.Runnable,
        place: weakref.ref[_C.Switch],
        script: _C.Runnable | None = None,
    ) -> _C.Attempt:
        """What runs `program`, and where that raises, lets TorchScript answer."""
        if script is None:
            switch = place()
            assert switch is not None
            script = switch.target
        failed = functools.partial(self._failed, graph, place, script)
        return _C.Attempt(program, graph.draws, failed)

    def _failed(
        self,
        graph: Graph,
        place: weakref.ref[_C.Switch],
        script: _C.Runnable,
        inputs: list[torch.Tensor],
        error: Exception | None,
    ) -> list[torch.Tensor]:
        """The answer to a call on which what the backend made raises.

        Raises:
            WrongOutputs: the author of the backend has to know.
            ExtractionError: it may have written to some of the inputs.
            Exception: the graph raises, too: this is the program's own error.
        """
        if isinstance(error, WrongOutputs):
            raise error
        if error is not None and graph.written:
            raise ExtractionError(
                f"what the backend {_name_of(self.backend)} made of an update in place raises: "
                f"{_first_line(error)}. Some of the tensors may have been updated"
            ) from error
        outputs = script.run(inputs)
        if error is not None:
            self._stays(graph, error)
            switch = place()
            if switch is not None:
                switch.target = script
        return outputs

    def _stays(self, graph: Graph, error: Exception) -> None:
        reason = _first_line(error)
        graph.runs_on = f"torchscript ({reason})"
        if not self._warned:
            self._warned = True
            name = _name_of(self.backend)
            why = (
                "Inductor does not compile it"
                if name in ("inductor", "tiered")
                else f"the backend {name} fails on it"
            )
            warnings.warn(
                f"a graph of this program stays on TorchScript, since {why}: {reason}",
                stacklevel=2,
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _Frozen:
    """Keeps code that has weights as constants in step with the weights.

    A call compares the tensors, their version counters and the addresses of their memory with what
    they were. Frozen weights become copy-on-write, so that every write moves them, also one through
    `weight.data`, which no version counter sees. Where something differs and the contents do not,
    the code stays. Otherwise calls run the graph on the weights as they are; when two calls have
    seen the same weights, new code is made with those.
    """

    def __init__(self, compiler: Compiler, graph: Graph, program: _C.Switch) -> None:
        self.compiler = compiler
        self.graph = graph
        self.script = program.target
        # Weak: `program` holds what is here, and no collector of cycles sees that.
        self.program = weakref.ref(program)
        self.code: _C.Switch | None = None
        self.values: dict[int, torch.Tensor] = {}
        self.seen: tuple[_C.FrozenProgram, dict[int, torch.Tensor]] | None = None
        self._lock = threading.Lock()

    def arm(self, inputs: list[torch.Tensor]) -> None:
        """Make code of the weights as they are now."""
        self.seen = None
        self.values = _snapshots(inputs, self._worth_freezing())
        program = self.program()
        if program is None:
            return
        if not self.values:
            program.target = self.script
            if self.compiler.backend != "torchscript":
                self.compiler.build(self.graph, {}, self.program)
            return
        self.code = _C.Switch(self.script)
        self._watch(inputs)
        # Not the snapshots themselves: code that asks for a pointer to write through gets a copy,
        # and the weights, with nobody left to share memory with, would stay where they are.
        constants = {i: torch._lazy_clone(value) for i, value in self.values.items()}
        self.compiler.build(self.graph, constants, weakref.ref(self.code))

    def _worth_freezing(self) -> list[int]:
        if self.compiler.backend == "torchscript":
            return _foldable(self.graph.module, self.graph.weights)
        return _native.worth_freezing(self.graph.module, self.graph.weights)

    def _watch(self, inputs: list[torch.Tensor]) -> None:
        program = self.program()
        if program is not None:
            assert self.code is not None
            program.target = _C.FrozenProgram(self.code, list(self.values), inputs, self.changed)

    def changed(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the graph on weights that are not, or may not be, those of the code."""
        with self._lock:
            if all(_C.same_bits(inputs[i], value) for i, value in self.values.items()):
                snapshots = _snapshots(inputs, self.values)
                if len(snapshots) == len(self.values):
                    self.values = snapshots
                    self._watch(inputs)
            elif self.seen is not None and self.seen[0].is_fresh(inputs):
                self.arm(inputs)
            else:
                snapshots = _snapshots(inputs, self.values)
                seen = _C.FrozenProgram(self.script, list(snapshots), inputs, self.changed)
                self.seen = (seen, snapshots)
        return self.script.run(inputs)


def _snapshots(inputs: list[torch.Tensor], weights: Iterable[int]) -> dict[int, torch.Tensor]:
    """The values of weights, in memory that the next write to a weight does not reach.

    Left out are those whose writes PyTorch cannot tell, as of an array's or a file's memory.
    """
    snapshots = {}
    for i in weights:
        with contextlib.suppress(RuntimeError):
            snapshots[i] = torch._lazy_clone(inputs[i].detach())
    return snapshots


def _foldable(module: fx.GraphModule, weights: list[int]) -> list[int]:
    """Those of the inputs `weights` that TorchScript can make constants of.

    Not a weight whose memory an output shares. None at all when an output depends on nothing else:
    folded, it would be the same tensor on each call, and another one than a view of it.
    """
    outputs = [n for n in _fx.outputs_of(module) if isinstance(n, fx.Node)]
    shared = {n.meta["val"].untyped_storage()._cdata for n in outputs}
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    constant = {placeholders[i] for i in weights}
    for node in module.graph.nodes:
        if node.op == "call_function" and constant.issuperset(node.all_input_nodes):
            constant.add(node)
    if constant.difference(placeholders).intersection(outputs):
        return []
    return [
        i for i in weights if placeholders[i].meta["val"].untyped_storage()._cdata not in shared
    ]


def _with_constants(graph: torch._C.Graph, frozen: dict[int, torch.Tensor]) -> torch._C.Graph:
    """The graph with constants for some inputs, folded by TorchScript's own passes.

    These inputs stay in the list of inputs, and nobody reads them.
    """
    graph = graph.copy()
    values = list(graph.inputs())
    first = next(graph.nodes(), graph.return_node())
    with graph.insert_point_guard(first):
        for i, value in frozen.items():
            constant = graph.insertConstant(value)  # type: ignore[attr-defined] # not in its stub
            values[i].replaceAllUsesWith(constant)
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_optimize_frozen_graph(graph, True)
    return graph


def _here(module: fx.GraphModule, frozen: dict[int, torch.Tensor], threads: int) -> _native.Code:
    from torch_lazy_ext import _inductor  # a second, which the other backends save

    return _inductor.compile(module, frozen, threads)


class _Background(threading.Thread):
    """A thread that does not hold up the end of the process, and waits for another process."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="torch_lazy_ext: waits for the compiler", daemon=True)
        self._work = work
        self._starting = threading.Lock()
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # Here, and for all that the thread will do: what a thread registers while the process is
        # about to end may be too late.
        atexit.register(self._end)
        super().start()

    def run(self) -> None:
        try:
            self._work()
        finally:
            atexit.unregister(self._end)

    def wait_for(self, command: list[str]) -> int:
        """Run a command to its end, which is the end of this process at the latest; its status."""
        with self._starting:
            if self._ended:
                raise SystemExit
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closed when this process ends, however it does
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return process.wait()

    def _end(self) -> None:
        """End it by an exception: one that ends in the middle of C++ takes the process along."""
        with self._starting:
            self._ended = True
            if self._process is not None:
                self._process.kill()
        if self.is_alive() and self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
            )
            self.join(timeout=5)


# It looks for packages where this process does: not first in the folder that it is started in.
_START_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from torch_lazy_ext import _worker; _worker.work(*sys.argv[2:])"
)


def _elsewhere(
    module: fx.GraphModule, frozen: dict[int, torch.Tensor], threads: int
) -> _native.Code:
    """Compile in another process. It ends with this one, whatever it is doing then.

    Called in a `_Background`.
    """
    thread = threading.current_thread()
    assert isinstance(thread, _Background)
    _native.check_suitable(module)  # not worth a process
    with tempfile.TemporaryDirectory() as folder:
        request, answer = os.path.join(folder, "request"), os.path.join(folder, "answer")
        torch.save((_fx.dump(module), frozen, threads), request)
        path = json.dumps([*map(str, sys.path)])
        status = thread.wait_for([sys.executable, "-c", _START_WORKER, path, request, answer])
        if status != 0:
            raise RuntimeError(f"its process ended with status {status}")
        code: _native.Code | str = torch.load(answer, weights_only=False)
    if isinstance(code, str):
        raise RuntimeError(code)
    return code


def _interpreted(module: fx.GraphModule) -> Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]:
    def run(inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            outputs: Sequence[torch.Tensor] = fx.Interpreter(module).run(*inputs)
            return outputs

    return run


def _name_of(backend: Backend) -> str:
    return (
        backend
        if isinstance(backend, str)
        else getattr(backend, "__name__", type(backend).__name__)
    )


def _called(
    backend: BackendFunction, graph: Graph, inputs: list[torch.Tensor]
) -> Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]:
    """The callable that a user's backend makes, with its results compared with the graph's."""
    expected = [n.meta["val"] for n in _fx.outputs_of(graph.module)]
    name = _name_of(backend)
    with torch.no_grad():
        # Its own copy: a backend may change the graph it is given.
        compiled = backend(_fx.graph_module(graph.graph), list(inputs))
    boxed = getattr(compiled, "_boxed_call", False)

    def run(inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            outputs: Sequence[torch.Tensor]
            outputs = compiled(list(inputs)) if boxed else compiled(*inputs)
        if len(outputs) != len(expected):
            raise WrongOutputs(
                f"the backend {name} returns {len(outputs)} outputs of a graph with {len(expected)}"
            )
        for k, (want, got) in enumerate(zip(expected, outputs)):
            if (got.shape, got.dtype) != (want.shape, want.dtype) or (
                got.stride() != want.stride() and got.numel() > 1
            ):
                raise WrongOutputs(
                    f"the backend {name} returns {got.dtype}{list(got.shape)} with strides "
                    f"{got.stride()} as output {k}, and the graph has {want.dtype}"
                    f"{list(want.shape)} with {want.stride()}"
                )
        return outputs

    return run
