"""Lower: from a recording to roots, and from roots to a TorchScript graph.

The roots of a graph are, in this order: the values of the program's results and of what it
assigned, the new value of every lifted tensor that it mutated, and the guards.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torch_lazy_ext import _C, _lift, _made, _tree
from torch_lazy_ext._autograd import drop_hooks, function_of, grad_of, set_grad
from torch_lazy_ext._code import Ran
from torch_lazy_ext._errors import FallbackError, UnsupportedError
from torch_lazy_ext._number import Number
from torch_lazy_ext._record import Recording, SharedStorage, check_plain

# ------------------------------------------------- where a replay takes a result from


@dataclasses.dataclass(eq=False)
class FromLifted:
    """A lifted tensor itself; `alias`: another tensor object over its memory (`x.data`)."""

    index: int
    alias: bool = False


@dataclasses.dataclass(eq=False)
class FromRoot:
    """An output of the graph.

    Attributes:
        alias: not the object that the graph gives, for that is another result.
        requires_grad: a leaf that the program made so.
        parameter: it is an `nn.Parameter`.
        inference: whether it is an inference tensor, where the mode of the call does not say so.
        counted_with: index of the lifted tensor whose version counter it has: it was a view of
            that one before it was given other memory (`Tensor.set_`, `x.data = ...`).
        retains_grad: the program called `retain_grad()`.
    """

    root: int
    alias: bool = False
    requires_grad: bool = False
    parameter: bool = False
    inference: bool | None = None
    counted_with: int | None = None
    retains_grad: bool = False


@dataclasses.dataclass(eq=False)
class FromNumber:
    """A Python float that is an output of the graph."""

    root: int


@dataclasses.dataclass(eq=False)
class FromView:
    """A view of a lifted tensor or of an output; with no `views`, another object like it.

    Attributes:
        grad_mode: in which the program made it; None where that makes no difference.
        requires_grad: a leaf that the program made so.
        retains_grad: the program called `retain_grad()`.
        of_detached: it is a view of the detached base.
        detached: autograd knows nothing of its being a view.
    """

    base: FromLifted | FromRoot | FromConstant | FromView | AsParameter
    views: _C.ViewSequence
    grad_mode: bool | None = None
    requires_grad: bool = False
    retains_grad: bool = False
    of_detached: bool = False
    detached: bool = False


@dataclasses.dataclass(eq=False)
class FromStrided:
    """A view of the memory of a lifted tensor, by its place in the storage.

    Attributes:
        alias: with a version counter of its own (`x.data`).
        detached: autograd knows nothing of its being a view.
        relative: the offset counts from the tensor's own.
        grad_mode: in which the program made it.
    """

    index: int
    sizes: list[int]
    strides: list[int]
    offset: int
    dtype: torch.dtype
    conj: bool
    neg: bool
    alias: bool
    detached: bool
    relative: bool = False
    grad_mode: bool = True


@dataclasses.dataclass(eq=False)
class AsParameter:
    """An `nn.Parameter` that the program made over memory that somebody else has, too."""

    source: FromLifted | FromView | FromStrided
    requires_grad: bool


@dataclasses.dataclass(eq=False)
class FromArray:
    """A numpy array over the memory of a tensor, by its place in the tensor's storage.

    Attributes:
        dtype: numpy's.
        offset: in bytes, from the tensor's first element.
    """

    tensor: Source
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclasses.dataclass(eq=False)
class FromConstant:
    """Memory that the program made from Python data: a new copy on each call.

    Attributes:
        counted_with, requires_grad, parameter: as in FromRoot.
    """

    index: int
    views: _C.ViewSequence
    counted_with: int | None = None
    requires_grad: bool = False
    parameter: bool = False


@dataclasses.dataclass(eq=False)
class Constant:
    """Something that is the same object on each call."""

    value: Any


@dataclasses.dataclass(eq=False)
class Copied:
    """Something the program makes on each call, without tensors: a new copy."""

    value: Any


@dataclasses.dataclass(eq=False)
class FromArgument:
    """A container of the arguments: the caller's own object."""

    position: int


@dataclasses.dataclass(eq=False)
class Built:
    """A container that the program makes on each call."""

    shape: _tree.Shape
    children: list[Any]


@dataclasses.dataclass(eq=False)
class Assembled:
    """An object that is no container and that the program makes on each call: see `_made`."""

    recipe: _made.Recipe
    children: list[Any]


Source = (
    FromLifted
    | FromRoot
    | FromNumber
    | FromView
    | FromStrided
    | AsParameter
    | FromArray
    | FromConstant
    | Constant
    | Copied
    | FromArgument
    | Built
    | Assembled
)


@dataclasses.dataclass
class Write:
    """What a call leaves in a lifted tensor.

    Attributes:
        index: the lifted tensor.
        root: its new value, or None when only its metadata or version changed.
        bumps: how often eager would have bumped its version counter.
        storage: the identity of its storage in the recording.
        meta: sizes, strides and storage offset relative to the old one, when they change.
        source: what replaces its storage (`Tensor.set_`).
        differentiable: autograd follows the write.
        in_place: the update writes it.
    """

    index: int
    root: int | None
    bumps: int
    storage: int
    meta: tuple[list[int], list[int], int] | None = None
    source: Source | None = None
    differentiable: bool = False
    in_place: bool = False


@dataclasses.dataclass
class ValueGuard:
    root: int
    expected: Any  # a tensor, or a list of sizes
    is_value: bool
    source: str


@dataclasses.dataclass
class Backward:
    """The backward half of a joint graph, of results that share some of their history.

    Attributes:
        graph: from saved values and tangents to gradients.
        outputs: roots of the forward that get a tangent, in order.
        positions: where these are among all that get a tangent.
        once: it frees what it needs, unless told to retain that: eager's does.
        sharing: for each output, those whose backward needs what its own frees.
        saved: roots of the forward that the backward reads.
        wrt: for each gradient, the index of the lifted tensor it belongs to, or ~k for what
            `Lowered.made` has at k; then those that autograd leads to and has no gradient for.
            One index comes several times where gradients are to be added up.
        count: how many gradients there are.
        nested: (index of a lifted tensor, which value): what a backward inside of the backward (a
            reentrant checkpoint) accumulates, in order. No gradient of `wrt` belongs to these.
        written: (index of a lifted tensor, or ~k for the tangent of output k; which value): what
            the backward writes.
        live: position in `saved` -> index of the lifted tensor that the backward reads as it is
            then, since it writes to it.
        whole: it must not be asked for some gradients alone.
        aliases: position of an output -> of which of `wrt` it is a view, and how.
        reached: for each of `wrt`, the positions in `outputs` that autograd leads to it from.
        strides: for each output, the strides of the tangent it was recorded with.
        guards: shapes that depend on the tangents; their roots follow the gradients.
        begin: the first node of the backward.
        given: the values of `saved`, then the tangents.
        roots: the values of gradients and guards.
        ran: the code of the program's own that ran in it (hooks, custom functions), if any.
    """

    graph: torch._C.Graph
    outputs: list[int]
    positions: list[int]
    once: bool
    sharing: list[frozenset[int]]
    saved: list[int]
    wrt: list[int]
    count: int
    nested: list[tuple[int, int]]
    written: list[tuple[int, int]]
    live: dict[int, int]
    whole: bool
    aliases: dict[int, tuple[int, _C.ViewSequence]]
    reached: list[frozenset[int]]
    strides: list[tuple[int, ...]]
    guards: list[ValueGuard]
    begin: int
    given: list[_C.ValueRef]
    roots: list[_C.ValueRef]
    ran: Ran | None


@dataclasses.dataclass
class Derivative:
    """Gradients of a program as a graph, which a backward belongs to.

    Attributes:
        graph: from lifted tensors and tangents to gradients.
        roots: gradients, what the backward saves, and guards.
        parameters: for each input of the graph, the index of the lifted tensor or tangent.
        constants: index -> what the program made itself.
        tangents: indices of the tangents of the last differentiation.
        gradients: index of a lifted tensor or earlier tangent -> roots, which are added up.
        spent: (root, error, indices): gradients whose own backward raises an error.
    """

    graph: torch._C.Graph
    roots: list[_C.ValueRef]
    parameters: list[int]
    constants: dict[int, torch.Tensor]
    tangents: list[int]
    gradients: dict[int, list[int]]
    guards: list[ValueGuard]
    backwards: list[Backward]
    spent: list[tuple[int, Exception, list[int]]]


@dataclasses.dataclass
class Update:
    """The last part of a graph, which writes to lifted tensors in place.

    It runs when the guards have held. All it does is elementwise and cannot raise.

    Attributes:
        graph: its inputs are lifted tensors, and then values that the main graph computes.
        functional: the same without the writes; its outputs are what is to be written.
        targets: for each of these, the input that it is written to.
        parameters: the indices of the lifted tensors among its inputs.
        boundary: the roots that are its other inputs.
    """

    graph: torch._C.Graph
    functional: torch._C.Graph
    targets: list[int]
    parameters: list[int]
    boundary: list[int]


@dataclasses.dataclass
class Lowered:
    """A lowered graph and what belongs around it.

    Attributes:
        outputs: for each output of the graph, the root that it is.
        parameters: for each input of the graph, the index of the lifted tensor.
        end: how many nodes the program itself recorded.
        update: what brings further lifted tensors up to date; the roots of their writes are no
            outputs of `graph`.
        lifted: (the user's tensor, whether it is a constant, index of its storage's input or -1).
        result: how to put the result together.
        refills: (position of an argument's container, its new content).
        effects: (owner, key or CONTENT, source or MISSING): changes of state.
        assigned: (lifted index, source): assignments to `tensor.data`.
        former: sources of what a tensor was before the assignment to its `.data`, or before it
            forgot its history.
        leaves: (lifted index of a leaf, its gradient or None): what the gradient was like.
        gradients: (lifted index of a leaf, source): assignments to `tensor.grad`.
        overwritten: indices of leaves whose gradient the program sets without having looked at it,
            and before anything can fail.
        required: (lifted index, whether): assignments to `tensor.requires_grad`.
        attributes: (lifted index, name, source or MISSING): of tensors, that the program set.
        attributed: (source of a tensor, {name: source}): attributes of results.
        spent: (root, error, keys as in `Backward.wrt`): results whose backward raises an error,
            such as one that it has run, and the leaves that it would lead to.
        made: where a replay takes further leaves of the backwards from: leaves that the program
            makes (None: nobody has it), and results that other results depend on.
        hooks: (lifted index, method, hook): what the program leaves on tensors.
        hooks_of_made: (source of a leaf, method, hook): and on leaves that it makes.
        grads_of_made: (source, source of its gradient): what its backward gave these.
        retained: indices of lifted tensors whose gradient the program retains.
        reads_leaf: it matters whether a tensor is a leaf.
        hooked: (lifted index, hooks): of tensors that a backward of the program may come by.
        related: pairs of lifted indices: the history of the first does not lead to the second.
        makes_generators: whether it draws from generators of its own: one run at a time.
        modes: (how to set it, to what): modes that the program leaves changed.
        communicates: whether the graph holds collectives, which must run once in each call.
        written: what the program does to its state, as it was recorded.
        precheck: a graph that gives the guarded values alone, and the indices of its inputs: for
            guards that must or can be looked at before anything else. Without, they are roots.
    """

    graph: torch._C.Graph
    roots: list[_C.ValueRef]
    outputs: list[int]
    parameters: list[int]
    end: int
    update: Update | None
    lifted: list[tuple[torch.Tensor, bool, int]]
    writes: list[Write]
    result: Source
    refills: list[tuple[int, Built]]
    effects: list[tuple[Any, Any, Any]]
    assigned: list[tuple[int, Source]]
    former: list[Source]
    leaves: list[tuple[int, torch.Tensor | None]]
    gradients: list[tuple[int, Source]]
    overwritten: list[int]
    required: list[tuple[int, bool]]
    attributes: list[tuple[int, str, Any]]
    attributed: list[tuple[Source, dict[str, Source]]]
    spent: list[tuple[int, Exception, list[int]]]
    made: list[Source | None]
    hooks: list[tuple[int, str, Any]]
    hooks_of_made: list[tuple[Source, str, Any]]
    grads_of_made: list[tuple[Source, Source]]
    retained: list[int]
    reads_leaf: bool
    hooked: list[tuple[int, list[list[Any]]]]
    related: list[tuple[int, int]]
    communicates: bool
    precheck: tuple[torch._C.Graph, list[int]] | None
    guards: list[ValueGuard]
    generators: list[torch.Generator]
    makes_generators: bool
    modes: list[tuple[Callable[[Any], object], Any]]
    reads_offset: bool
    reads_views: bool
    backwards: list[Backward]
    written: list[_lift.Change]


class _Roots:
    def __init__(self) -> None:
        self.values: list[_C.ValueRef] = []
        self._index: dict[_C.ValueRef, int] = {}

    def add(self, value: _C.ValueRef) -> int:
        if value not in self._index:
            self._index[value] = len(self.values)
            self.values.append(value)
        return self._index[value]


def lower(recording: Recording, state: _lift.State) -> Lowered:
    """Choose the roots of a recording and lower them to one graph."""
    recorder = recording.recorder
    roots = _Roots()
    sources = _Sources(recording, state, roots)
    result = sources.of(recording.result)
    refills = [(i, sources.build(c)) for i, c in recording.refilled.items()]
    effects: list[tuple[Any, Any, Any]] = []
    for change in recording.changes:
        if change.key is _lift.CONTENT:
            effects.append((change.owner, change.key, sources.build(change.value)))
        elif change.value is _lift.MISSING:
            effects.append((change.owner, change.key, _lift.MISSING))
        else:
            effects.append((change.owner, change.key, sources.of(change.value)))
    assigned = [
        (sources.lifted[id(tensor)], sources.of(value))
        for tensor, value, _user in recording.assigned
        if id(tensor) in sources.lifted  # others are the program's own
    ]
    leaves, gradients = [], []
    for tensor, before, grad, seen in recording.gradients:
        index = sources.lifted[id(tensor)]
        if seen:
            leaves.append((index, before))
            before = None if before is None else recorder.twin_of(before)
        if not seen or grad is not before:
            gradients.append((index, sources.of(grad)))
    attributes = [
        (
            sources.index_of(tensor),
            key,
            value if value is _lift.MISSING else sources.of(value),
        )
        for tensor, key, value in recording.attributes
    ]
    lifted = recorder.lifted()
    _check_generators(recording)
    num_results = len(roots.values)
    writes = [w for i in range(len(lifted)) for w in _write(recorder, lifted, i, sources, roots)]
    for write in writes:
        if write.differentiable and write.root is not None:
            twin = lifted[write.index][1]
            sources.differentiable.append((FromRoot(write.root), twin))
    num_exposed = len(roots.values)
    _check_sharing(recorder, lifted, writes)
    end = len(recorder)
    backwards: list[Backward] = []
    spent: list[tuple[int, Exception, list[int]]] = []
    made: list[Source | None] = []
    if sources.differentiable:
        differentiable = sources.differentiable
        # What a backward needs is gone when it has run, or may have been written to.
        if recording.ran_backward or any(
            t.requires_grad and not t.is_inference() and t._version for _t, t, _c, _b in lifted
        ):
            differentiable, spent = _unspent(recording, differentiable)
        if differentiable:
            history = _History(recording, sources, differentiable)
            made = history.made
            with history:
                backwards, failed = _backwards(recording, history, roots)
            spent += failed
    lifted = recorder.lifted()
    # A backward may have looked at values of the forward, too.
    precheck, guards = _guards(recorder, state, lifted, roots)
    update = None
    if recording.ran_backward or state.numbers:  # a training step
        update = _update(recorder, lifted, writes, num_results, num_exposed, roots)
    updated = set() if update is None else {w.root for w in writes if w.in_place}
    outputs = [r for r in range(len(roots.values)) if r not in updated]
    graph, parameters = _C.lower(
        recorder,
        [roots.values[r] for r in outputs],
        sum(r < num_exposed for r in outputs),
        0,
        len(recorder),
    )
    lifted = recorder.lifted()
    strided = graph.findNode("aten::as_strided")  # type: ignore[attr-defined] # not in its stub
    return Lowered(
        graph=graph,
        roots=roots.values,
        outputs=outputs,
        parameters=parameters,
        end=end,
        update=update,
        lifted=[(tensor, constant, base) for tensor, _twin, constant, base in lifted],
        writes=writes,
        result=result,
        refills=refills,
        effects=effects,
        assigned=assigned,
        former=sources.former,
        leaves=leaves,
        gradients=gradients,
        overwritten=[
            sources.lifted[id(t)]
            for t, _before, _grad, seen in recording.gradients
            if not seen and id(t) in recording.replaced
        ],
        required=[(sources.lifted[id(t)], now) for t, now in recording.required],
        attributes=attributes,
        attributed=sources.attributed,
        spent=spent,
        made=made,
        hooks=[(sources.lifted[id(t)], name, hook) for t, name, hook in recording.hooks],
        hooks_of_made=sources.hooks,
        grads_of_made=sources.grads,
        retained=[sources.lifted[id(t)] for t in recording.retained],
        reads_leaf=recording.autograd.reads_leaf,
        hooked=[
            (sources.lifted[id(h.user)], h.before)
            for h in recording.autograd.hooked.values()
            if recording.autograd.ran or any(h.before)
        ],
        related=[
            (sources.lifted[id(a)], sources.lifted[id(b)]) for a, b in recording.autograd.related
        ],
        communicates=recorder.communicates(),
        precheck=precheck,
        guards=guards,
        generators=recorder.generators(),
        makes_generators=bool(recording.generators.made),
        modes=recording.modes,
        reads_offset=sources.reads_offset or recorder.reads_offset or strided is not None,
        reads_views=recorder.reads_views,
        backwards=backwards,
        written=recording.written,
    )


def lower_derivative(
    recording: Recording, state: _lift.State, path: tuple[frozenset[int], ...]
) -> Derivative:
    """Record `torch.autograd.grad` after a program, as often as told, and lower the last gradients.

    The results, and then the gradients, are differentiated with respect to all that the program
    lifted and to the tangents so far, with tangents of their own.

    Args:
        path: for each differentiation, which of them.
    """
    recorder = recording.recorder
    roots = _Roots()
    sources = _Sources(recording, state, roots)
    sources.of(recording.result)
    lifted = recorder.lifted()
    for i in range(len(lifted)):
        for write in _write(recorder, lifted, i, sources, roots):
            if write.differentiable and write.root is not None:
                sources.differentiable.append((FromRoot(write.root), lifted[i][1]))
    history = _History(recording, sources, sources.differentiable)
    outputs = list(history.by_root.values())
    leaves = history.leaves
    tangents: dict[int, torch.Tensor] = {}
    gradients: dict[int, _Gradient] = {}
    for given in path:
        tangents = {}
        outputs = [outputs[k] for k in sorted(given)]
        for output in outputs:
            index = len(recorder.sources())
            tangents[index] = recorder.add_tangent(output).requires_grad_()
        with history.cut(outputs):
            gradients = _differentiate(recording, outputs, leaves, list(tangents.values()), True)
        gradients = {i: g for i, g in gradients.items() if i not in history.hidden}
        leaves = {**leaves, **tangents}
        every = [part for g in gradients.values() for part in g.parts]
        by_value = {recorder.describe(part).value: part for part in every}
        outputs = [part for part in by_value.values() if part.requires_grad]
    roots = _Roots()
    by_leaf = {
        i: [roots.add(recorder.describe(part).value) for part in g.parts]
        for i, g in gradients.items()
    }
    by_root = {
        root: part
        for i, found in by_leaf.items()
        for root, part in zip(found, gradients[i].parts)
        if part.requires_grad
    }
    num_exposed = len(roots.values)
    end = len(recorder)
    backwards: list[Backward] = []
    spent: list[tuple[int, Exception, list[int]]] = []
    with history.cut(list(by_root.values())):
        for positions in _components(list(by_root.values())):
            try:
                backwards.append(
                    _backward(recording, by_root, positions, roots, leaves, history.hidden)
                )
            except (UnsupportedError, FallbackError):
                raise
            except Exception as e:
                # A derivative that PyTorch does not have: eager, too, raises once it is asked for.
                for root, gradient in (list(by_root.items())[k] for k in positions):
                    paths = _paths([gradient])
                    keys = [i for i, leaf in leaves.items() if i >= 0 and id(leaf) in paths]
                    spent.append((root, _bare(e), keys))
    guards = [
        ValueGuard(roots.add(value), expected, is_value, source)
        for value, expected, is_value, source in recorder.guards()
        if value.node < end or not recorder.depends_on_tangent(value)
    ]
    graph, parameters = _C.lower(recorder, roots.values, num_exposed, 0, len(recorder))
    constants = {
        i: tensor
        for i, (tensor, _twin, constant, _base) in enumerate(recorder.lifted())
        if constant and tensor is not None
    }
    return Derivative(
        graph=graph,
        roots=roots.values,
        parameters=parameters,
        constants=constants,
        tangents=list(tangents),
        gradients=by_leaf,
        guards=guards,
        backwards=backwards,
        spent=spent,
    )


def _gradients(
    outputs: list[torch.Tensor],
    leaves: list[torch.Tensor],
    tangents: list[torch.Tensor],
    create_graph: bool,
) -> list[torch.Tensor | None]:
    """The gradients of leaves, which keep those that they have."""
    before = [grad_of(leaf) for leaf in leaves]
    for leaf in leaves:
        set_grad(leaf, None)
    try:
        found = torch.autograd.grad(
            outputs,
            leaves,
            tangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    finally:
        for leaf, grad in zip(leaves, before):
            set_grad(leaf, grad)
    return list(found)


def _bare(error: Exception) -> Exception:
    """An error to raise later, without the frames of the capture."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _differentiate(
    recording: Recording,
    outputs: list[torch.Tensor],
    leaves: dict[int, torch.Tensor],
    tangents: list[torch.Tensor],
    create_graph: bool,
) -> dict[int, _Gradient]:
    """The gradients of `leaves` that there are."""
    if not leaves:
        return {}
    recorder = recording.recorder
    random_calls = recorder.random_calls()
    every = list(leaves.values())
    summands: dict[int, list[torch.Tensor]] = {}
    with _noting_summands(outputs, summands):
        found = recording.resume(lambda: _gradients(outputs, every, tangents, create_graph))
    if recorder.random_calls() != random_calls:
        raise UnsupportedError(
            "the backward of the program draws random numbers that its forward has not drawn "
            "(torch.utils.checkpoint with preserve_rng_state=False around dropout): a replay could "
            "not draw them in eager's order"
        )
    return {
        i: _Gradient(g, _summands(recorder, g, summands.get(id(leaf), [])))
        for (i, leaf), g in zip(leaves.items(), found)
        if g is not None
    }


# A leaf that a program reads more often gets its gradient as one sum, which costs less memory; only
# what it gets from elsewhere is then added in another order than eager's.
MOST_SUMMANDS = 8


@dataclasses.dataclass
class _Gradient:
    """The gradient of a leaf.

    Attributes:
        parts: what autograd adds up to it, in order: one part for each function that leads to the
            leaf. A caller's autograd adds them one by one to what it has from elsewhere, and a sum
            depends on its order to the last bit.
    """

    whole: torch.Tensor
    parts: list[torch.Tensor]


@contextlib.contextmanager
def _noting_summands(
    outputs: list[torch.Tensor], summands: dict[int, list[torch.Tensor]]
) -> Iterator[None]:
    """While a backward runs, note for each leaf (by its id) what is added up to its gradient."""
    ways: dict[Any, list[tuple[Any, int]]] = {}  # into a function: from which one, by which edge
    seen: set[Any] = set()
    stack = [output.grad_fn for output in outputs]
    accumulators: list[tuple[Any, torch.Tensor]] = []
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        leaf = getattr(function, "variable", None)
        if leaf is not None:
            accumulators.append((function, leaf))
        for k, (following, _nr) in enumerate(function.next_functions):
            if following is not None:
                ways.setdefault(following, []).append((function, k))
                stack.append(following)
    noted: dict[Any, dict[int, list[torch.Tensor]]] = {}  # function -> edge -> the leaf's
    for accumulator, leaf in accumulators:
        into = ways.get(accumulator, [])
        if len(into) == 1 and _is_given(into[0][0]):
            into = ways.get(into[0][0], [])
        if 1 < len(into) <= MOST_SUMMANDS:
            own = summands[id(leaf)] = []
            for function, k in into:
                noted.setdefault(function, {})[k] = own

    def note(edges: dict[int, list[torch.Tensor]], found: Any, _given: Any) -> None:
        for k, own in sorted(edges.items()):
            if found[k] is not None:
                own.append(found[k])

    handles = [
        function.register_hook(functools.partial(note, edges)) for function, edges in noted.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summands(
    recorder: _C.Recorder, whole: torch.Tensor, noted: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What a gradient is the sum of, if it is just that; else the gradient itself."""
    value = recorder.describe(whole).value
    first, *others = noted or [whole]
    for summand in reversed(others):
        operator, _outputs, _line = recorder.node_info(value.node)
        operands = recorder.operands(value.node)
        own = recorder.describe(summand).value
        if operator != "aten::add.Tensor" or len(operands) != 2 or own not in operands:
            return [whole]
        value = operands[0] if operands[1] == own else operands[1]
    return noted if others and value == recorder.describe(first).value else [whole]


# What guards of hyperparameters are made of, beside arithmetic of numbers.
_ON_NUMBERS = {"prim::Constant", "aten::Float"}
_ON_NUMBERS |= {f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _guards(
    recorder: _C.Recorder,
    state: _lift.State,
    lifted: list[tuple[torch.Tensor, torch.Tensor, bool, int]],
    roots: _Roots,
) -> tuple[tuple[torch._C.Graph, list[int]] | None, list[ValueGuard]]:
    recorded = [guard for guard in recorder.guards() if not recorder.depends_on_tangent(guard[0])]
    values = [value for value, _expected, _is_value, _source in recorded]
    precheck = None
    if values and state.numbers:
        # Hyperparameters are cheap to look at.
        graph, parameters = _C.lower(
            recorder, values, 0, 0, len(recorder), random=False, collectives=False
        )
        numbers = {id(t) for _slot, _value, tensors in state.numbers for t in tensors}
        if all(id(lifted[i][0]) in numbers for i in parameters) and all(
            n.kind() in _ON_NUMBERS or n.kind().startswith("torch_lazy_ext::")
            for n in graph.nodes()
        ):
            precheck = graph, parameters
    if values and precheck is None and recorder.communicates():
        # No other process may wait for a collective of a run that is thrown away.
        precheck = _C.lower(recorder, values, 0, 0, len(recorder), collectives=False)
    early = precheck is not None
    guards = [
        ValueGuard(k if early else roots.add(value), expected, is_value, source)
        for k, (value, expected, is_value, source) in enumerate(recorded)
    ]
    return precheck, guards


def _update(
    recorder: _C.Recorder,
    lifted: list[tuple[torch.Tensor, torch.Tensor, bool, int]],
    writes: list[Write],
    num_results: int,
    num_exposed: int,
    roots: _Roots,
) -> Update | None:
    """Mark the writes that can happen in place, and lower what only they need."""
    shared = collections.Counter(w.root for w in writes)
    read = {w.root for w in writes if w.meta is not None or w.source is not None}
    new = {w.index: roots.values[w.root] for w in writes if w.root is not None}
    chosen = [
        w
        for w in writes
        if w.root is not None
        and num_results <= w.root < num_exposed
        and w.root not in read
        and lifted[w.index][3] < 0
        and not lifted[w.index][0].is_conj()
        and not lifted[w.index][0].is_neg()
        and shared[w.root] == 1
    ]
    while chosen:
        written = [new[w.index] for w in chosen]
        updated = set(written)
        kept = [v for v in roots.values if v not in updated]
        boundary = _C.update_boundary(recorder, kept, written)
        # What the main graph computes anyway is an ordinary write.
        computed = set(boundary)
        rest = [w for w in chosen if new[w.index] not in computed]
        if len(rest) == len(chosen):
            break
        chosen = rest
    if not chosen:
        return None
    graph, parameters = _C.lower(
        recorder, written, 0, 0, len(recorder), boundary, random=False, collectives=False
    )
    positions = {index: position for position, index in enumerate(parameters)}
    if not all(w.index in positions for w in chosen):
        return None  # values that do not depend on what they replace
    for write in chosen:
        write.in_place = True
    targets = [positions[w.index] for w in chosen]
    functional = graph.copy()
    _C.write_in_place(graph, targets)
    return Update(graph, functional, targets, parameters, [roots.add(v) for v in boundary])


def _unspent(
    recording: Recording, differentiable: list[tuple[FromRoot, torch.Tensor]]
) -> tuple[list[tuple[FromRoot, torch.Tensor]], list[tuple[int, Exception, list[int]]]]:
    """Tell results with a backward from those whose backward raises, since it has run already."""
    every = recording.recorder.sources()
    leaves = [leaf for leaf in every if leaf is not None]
    made = _made_leaves([leaf for _source, leaf in differentiable], leaves)
    leaves += [leaf for leaf in made if leaf.requires_grad]  # some do not any more
    fresh, spent = [], []
    for source, result in differentiable:
        try:
            recording.resume(lambda: _gradients([result], leaves, [result.detach()], False))  # noqa: B023 # called at once
        except (UnsupportedError, FallbackError):
            raise
        except Exception as e:
            paths = _paths([result])
            keys = [i for i, leaf in enumerate(every) if leaf is not None and id(leaf) in paths]
            spent.append((source.root, _bare(e), keys))
        else:
            fresh.append((source, result))
    return fresh, spent


class _History:
    """What differentiable results depend on.

    A result that other results depend on is a leaf to them: a hook of the caller's on it, its
    `retain_grad()` and `torch.autograd.grad` with respect to it see what eager's would.

    Attributes:
        by_root: the results, by root.
        leaves: the leaves that gradients belong to, by index of the lifted tensor, or by ~k.
        made: for each such k, where a replay takes the leaf from; None where nobody has it.
        hidden: the keys of those.
        aliases: root -> the leaves that it is a view of, and how; the nearest first.
    """

    def __init__(
        self,
        recording: Recording,
        sources: _Sources,
        differentiable: list[tuple[FromRoot, torch.Tensor]],
    ) -> None:
        recorder = recording.recorder
        self.by_root = {source.root: leaf for source, leaf in differentiable}
        self.made: list[Source | None] = []
        self.leaves = {i: leaf for i, leaf in enumerate(recorder.sources()) if leaf is not None}
        self.hidden: set[int] = set()
        outputs = list(self.by_root.values())
        lifted = sources.lifted
        assigned = {
            id(leaf): lifted[id(t)]
            for t, new, _user in recording.assigned
            for leaf in (t, new)
            if id(t) in lifted
        }
        for leaf in _made_leaves(outputs, list(self.leaves.values())):
            if not leaf.requires_grad:
                continue  # any more
            key = ~len(self.made)
            self.leaves[key] = leaf
            if id(leaf) in assigned:  # what a tensor of the user's was until then, or is since
                self.made.append(FromLifted(assigned[id(leaf)]))
            else:
                self.made.append(sources.known(leaf))
            if self.made[-1] is None:
                self.hidden.add(key)
        inner = _inner(outputs)
        places = [o for o in outputs if any(o is place for place in inner)]
        self._places = _separable(recorder, outputs, places)
        self._stops: list[torch.Tensor] = []
        from_root = {source.root: source for source, _leaf in differentiable}
        for root, output in self.by_root.items():
            if any(output is place for place in self._places):
                # Nothing reads its value.
                stop = recorder.resumed(output.detach).requires_grad_()
                self.leaves[~len(self.made)] = stop
                self.made.append(from_root[root])
                self._stops.append(stop)
        key_of = {id(source): ~k for k, source in enumerate(self.made) if source is not None}
        self.aliases: dict[int, list[tuple[int, _C.ViewSequence]]] = {}
        for root, aliases in sources.aliases.items():
            keys = [
                of if isinstance(of, int) else key_of.get(id(sources.known(of)))
                for of, _v in aliases
            ]
            self.aliases[root] = [
                (key, views) for key, (_of, views) in zip(keys, aliases) if key is not None
            ]

    def cut(self, outputs: list[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Let the histories of these outputs end at the results that they depend on."""
        context = contextlib.ExitStack()
        if self._places:
            context.callback(_C.cut(outputs, self._places, self._stops).restore)
        return context

    def __enter__(self) -> None:
        self._cut = self.cut(list(self.by_root.values()))
        self._cut.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._cut.__exit__(*exc)


def _made_leaves(outputs: list[torch.Tensor], known: list[torch.Tensor]) -> list[torch.Tensor]:
    """Leaves in the history of outputs that are none of `known`: the program made them."""
    found: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    stack = [output.grad_fn for output in reversed(outputs)]
    ids = set(map(id, known))
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        variable = getattr(function, "variable", None)
        if variable is not None and id(variable) not in ids:
            found[id(variable)] = variable
        stack.extend(following for following, _k in reversed(function.next_functions))
    return list(found.values())


def _inner(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the outputs that others depend on."""
    edges = {(o.grad_fn, o.output_nr): o for o in outputs}
    inner: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    stack = [output.grad_fn for output in outputs]
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        for edge in function.next_functions:
            if edge in edges:
                inner[id(edges[edge])] = edges[edge]
            stack.append(edge[0])
    return list(inner.values())


def _separable(
    recorder: _C.Recorder, outputs: list[torch.Tensor], places: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Those of `places`, which are outputs, at which the histories of the others can be cut.

    A backward comes before those of what it depends on. So what depends on a place must not share
    functions of autograd with it beyond the cut, as the two results of an LSTM cell do: these are
    differentiated together.
    """
    while places:
        stops = [recorder.resumed(place.detach).requires_grad_() for place in places]
        cut = _C.cut(outputs, places, stops)
        try:
            groups = _components(outputs)
            reached = [_paths([outputs[k] for k in group]) for group in groups]
        finally:
            cut.restore()
        group_of = {id(outputs[k]): n for n, group in enumerate(groups) for k in group}
        depends: list[set[int]] = [set() for _ in groups]  # on the groups of places
        for place, stop in zip(places, stops):
            for n, leaves in enumerate(reached):
                if id(stop) in leaves:
                    depends[n].add(group_of[id(place)])
        tied = set()
        for n in range(len(groups)):
            found: set[int] = set()
            stack = list(depends[n])
            while stack:
                other = stack.pop()
                if other not in found:
                    found.add(other)
                    stack.extend(depends[other])
            if n in found:
                tied.add(n)
        apart = [place for place in places if group_of[id(place)] not in tied]
        if len(apart) == len(places):
            break
        places = apart
    return places


def _is_plain_view(leaf: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether nothing but views lies between a tensor and what it is a view of."""
    function = leaf.grad_fn
    ends = base.grad_fn
    while function is not None and function is not ends:
        variable = getattr(function, "variable", None)
        if variable is not None:
            return variable is base
        following = function.next_functions
        if len(following) != 1 or isinstance(function, torch.autograd.function.BackwardCFunction):
            return False
        function = following[0][0]
    return function is ends and ends is not None


def _is_view_of_given(leaf: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether nothing but views lies between a tensor and the history that a tensor was given with.

    Args:
        source: the leaf that the gradient of that one belongs to.
    """
    function = leaf.grad_fn
    while function is not None and not _is_given(function):
        following = function.next_functions
        if len(following) != 1 or isinstance(function, torch.autograd.function.BackwardCFunction):
            return False
        function = following[0][0]
    accumulator = None if function is None else function.next_functions[0][0]
    return getattr(accumulator, "variable", None) is source


def _leads_nowhere(leaf: torch.Tensor) -> bool:
    """Whether a history ends at a tensor that gets no gradient."""
    function = leaf.grad_fn
    while function is not None and not hasattr(function, "variable"):
        following = function.next_functions
        if len(following) != 1 or isinstance(function, torch.autograd.function.BackwardCFunction):
            return False
        function = following[0][0]
    return function is None


def _backwards(
    recording: Recording, history: _History, roots: _Roots
) -> tuple[list[Backward], list[tuple[int, Exception, list[int]]]]:
    """The backwards of results, in an order in which each comes after those that it depends on.

    Returns:
        Them, and (root, error, leaves) for results whose backward raises an error.
    """
    backwards: list[Backward] = []
    spent: list[tuple[int, Exception, list[int]]] = []
    by_root = list(history.by_root.items())
    stack = _components([leaf for _root, leaf in by_root])
    while stack:
        positions = stack.pop(0)
        try:
            backwards.append(
                _backward(
                    recording,
                    history.by_root,
                    positions,
                    roots,
                    history.leaves,
                    history.hidden,
                    history.aliases,
                )
            )
        except (UnsupportedError, FallbackError):
            raise
        except Exception as e:
            if len(positions) == 1:
                root, leaf = by_root[positions[0]]
                paths = _paths([leaf])
                keys = [i for i, known in history.leaves.items() if id(known) in paths]
                spent.append((root, _bare(e), keys))
                continue
            # Each by itself: eager raises only what the way of one result comes to.
            part = [(FromRoot(by_root[k][0]), by_root[k][1]) for k in positions]
            fresh, failed = _unspent(recording, part)
            kept = {source.root for source, _leaf in fresh}
            spent += failed
            left = [k for k in positions if by_root[k][0] in kept]
            if left == positions:
                raise
            if left:
                stack.insert(0, left)
    # Topological: what is a leaf of another comes first.
    ordered: list[Backward] = []
    produced = {root: backward for backward in backwards for root in backward.outputs}
    for backward in backwards:
        _put_after_leaves(backward, history, produced, ordered)
    return ordered, spent


def _put_after_leaves(
    backward: Backward, history: _History, produced: dict[int, Backward], ordered: list[Backward]
) -> None:
    if any(backward is known for known in ordered):
        return
    for key in backward.wrt:
        source = history.made[~key] if key < 0 else None
        if isinstance(source, FromRoot) and source.root in produced:
            _put_after_leaves(produced[source.root], history, produced, ordered)
    ordered.append(backward)


def _components(outputs: list[torch.Tensor]) -> list[list[int]]:
    """The positions of the outputs, with those together that share functions of autograd.

    Eager can run the backward of one such group without that of another. What leads to leaves
    alone, or to what a tensor was before the program, is no function that is shared.
    """
    owner: dict[Any, int] = {}  # function -> the first output that leads to it
    group = list(range(len(outputs)))

    def first(k: int) -> int:
        while group[k] != k:
            k = group[k]
        return k

    for k, output in enumerate(outputs):
        stack = [output.grad_fn]
        while stack:
            function = stack.pop()
            if function is None or hasattr(function, "variable") or _is_given(function):
                continue
            if function in owner:
                a, b = sorted((first(owner[function]), first(k)))
                group[b] = a
            else:
                owner[function] = k
                stack.extend(f for f, _k in function.next_functions)
    found: dict[int, list[int]] = {}
    for k in range(len(outputs)):
        found.setdefault(first(k), []).append(k)
    return list(found.values())


def _is_given(function: torch.autograd.graph.Node) -> bool:
    """Whether it stands for the history that a tensor had before the program."""
    return function.name().endswith("Given")


def _holds_values(function: Any) -> bool:
    """Whether a function of autograd keeps tensors for its backward, or may do so."""
    custom = isinstance(function, torch.autograd.function.BackwardCFunction)
    # Of C++: a user's, or of csrc/products.cpp.
    custom = custom or function.name().startswith("torch::autograd::CppNode<")
    return custom or any(name.startswith("_raw_saved") for name in dir(function))


def _sharing(outputs: list[torch.Tensor]) -> list[frozenset[int]]:
    """For each output, those whose backward needs what its own frees, mostly itself."""
    holders: list[set[Any]] = []
    holds: dict[Any, bool] = {}
    for output in outputs:
        seen: set[Any] = set()
        stack = [output.grad_fn]
        while stack:
            function = stack.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            if function not in holds:
                holds[function] = _holds_values(function)
            stack.extend(f for f, _k in function.next_functions)
        holders.append({function for function in seen if holds[function]})
    return [
        frozenset(k for k, others in enumerate(holders) if not own.isdisjoint(others))
        for own in holders
    ]


def _backward(
    recording: Recording,
    by_root: dict[int, torch.Tensor],
    positions: list[int],
    roots: _Roots,
    leaves: dict[int, torch.Tensor],
    hidden: set[int],
    aliases: dict[int, list[tuple[int, _C.ViewSequence]]] | None = None,
) -> Backward:
    """Record `torch.autograd.grad` after the program, and lower what it adds on its own.

    The joint graph is cut where PyTorch's autograd cuts it: what the backward reads of the forward
    is what eager saves.

    Args:
        by_root: all roots that get a tangent.
        positions: which of them to differentiate.
        hidden: those of `leaves` that nobody has.
        aliases: root -> the leaves that it is a view of, and how; the nearest first.
    """
    recorder = recording.recorder
    begin = len(recorder)
    every = list(by_root.items())
    outputs = dict(every[k] for k in positions)
    tangents = [recorder.add_tangent(leaf) for leaf in outputs.values()]
    # As they are given: the backward may write to them, and to tensors of the user's.
    tangent_values = [recorder.describe(t).value for t in tangents]
    versions = _versions(recorder)
    autograd = recording.autograd
    autograd.contributions, autograd.checkpoints = [], False
    recording.ran_backward_code = None
    gradients = _differentiate(recording, list(outputs.values()), leaves, tangents, False)
    ran = recording.ran_backward_code
    nested = _nested(recorder, autograd.contributions, leaves, gradients)
    written = _written_by_backward(recorder, versions, tangents)
    paths = _paths(list(outputs.values()))
    sharing = _sharing(list(outputs.values()))
    by_leaf = {i: g for i, g in gradients.items() if i not in hidden}
    # In the order in which eager has them ready: DistributedDataParallel fills buckets by it.
    ready = sorted(by_leaf, key=lambda i: recorder.describe(by_leaf[i].whole).value.node)
    wrt = [i for i in ready for _part in by_leaf[i].parts]
    values = [recorder.describe(part).value for i in ready for part in by_leaf[i].parts]
    values += [value for _i, value in nested]
    values += [value for _i, value in written]
    guards = [
        (value, ValueGuard(len(values) + k, expected, is_value, source))
        for k, (value, expected, is_value, source) in enumerate(
            g for g in recorder.guards() if g[0].node >= begin and recorder.depends_on_tangent(g[0])
        )
    ]
    values += [value for value, _guard in guards]
    given = set(tangent_values)

    def is_saved(v: _C.ValueRef) -> bool:
        return v.node < begin or (recorder.is_input(v) and v not in given)

    saved: dict[_C.ValueRef, None] = {v: None for v in values if is_saved(v)}
    needed = {v.node for v in values}
    for node in range(len(recorder) - 1, begin - 1, -1):
        if node in needed:
            for v in recorder.operands(node):
                needed.add(v.node)
                if is_saved(v):
                    saved[v] = None
    boundary = list(saved) + tangent_values
    graph, parameters = _C.lower(recorder, values, len(values), begin, len(recorder), boundary)
    assert not parameters, "everything that a backward reads is saved"
    every_leaf = wrt + [i for i in leaves if id(leaves[i]) in paths and i not in by_leaf]
    return Backward(
        graph=graph,
        outputs=list(outputs),
        positions=positions,
        once=bool(saved) or any(sharing),
        sharing=sharing,
        saved=[roots.add(v) for v in saved],
        wrt=every_leaf,
        count=len(wrt),
        nested=[(i, len(wrt) + k) for k, (i, _value) in enumerate(nested)],
        written=[(i, len(wrt) + len(nested) + k) for k, (i, _value) in enumerate(written)],
        live={
            k: i
            for i, _value in written
            if i >= 0
            for k, v in enumerate(saved)
            if v == recorder.input_values([i])[0]
        },
        whole=autograd.checkpoints,
        aliases={
            k: (every_leaf.index(leaf), views)
            for k, root in enumerate(outputs)
            for leaf, views in reversed((aliases or {}).get(root, []))
            if leaf in every_leaf
        },
        reached=[paths[id(leaves[i])] for i in every_leaf],
        strides=[t.stride() for t in tangents],
        guards=[guard for _value, guard in guards],
        begin=begin,
        given=boundary,
        roots=values,
        ran=ran,
    )


def _versions(recorder: _C.Recorder) -> list[int]:
    """The version counters of twins; -1 for what has none or is no tensor of the user's."""
    return [
        -1 if constant or twin.is_inference() else twin._version
        for _tensor, twin, constant, _base in recorder.lifted()
    ]


def _written_by_backward(
    recorder: _C.Recorder, versions: list[int], tangents: list[torch.Tensor]
) -> list[tuple[int, _C.ValueRef]]:
    """What a backward has written: index of the lifted tensor, or ~k for a tangent; its value."""
    written = [(~k, t) for k, t in enumerate(tangents) if recorder.describe(t).mutated]
    lifted = recorder.lifted()
    versions = versions + [0] * (len(lifted) - len(versions))  # it comes by further ones
    for i, (before, now) in enumerate(zip(versions, _versions(recorder))):
        if before == now or now < 0:
            continue
        _tensor, twin, _constant, base = lifted[i]
        if before > 0 or base >= 0:
            raise UnsupportedError(
                "the backward of the program writes to a tensor that its forward writes to, or "
                "that shares its memory with another one: let the two write to tensors of their own"
            )
        written.append((i, twin))
    return [(i, recorder.describe(t).value) for i, t in written]


def _nested(
    recorder: _C.Recorder,
    contributions: list[tuple[int, torch.Tensor, torch.Tensor]],
    leaves: dict[int, torch.Tensor],
    gradients: dict[int, _Gradient],
) -> list[tuple[int, _C.ValueRef]]:
    """What is accumulated one after the other, by leaf; it is taken out of `gradients`."""
    if not contributions:
        return []
    key_of = {id(leaf): i for i, leaf in leaves.items()}
    ordered = [(begin, key_of[id(leaf)], grad) for begin, leaf, grad in contributions]
    for i in {i for _begin, i, _grad in ordered} & gradients.keys():
        gradient = gradients.pop(i).whole
        node = recorder.describe(gradient).value.node
        before = sum(begin <= node for begin, _i, _grad in ordered)
        ordered.insert(before, (node + 1, i, gradient))
    return [(i, recorder.describe(grad).value) for _begin, i, grad in ordered]


def _paths(outputs: list[torch.Tensor]) -> dict[int, frozenset[int]]:
    """id of a leaf -> the positions in `outputs` from which autograd has a way to it."""
    order: list[Any] = []  # every function before those that it leads to, once reversed
    found: set[Any] = set()
    for output in outputs:
        stack: list[tuple[Any, bool]] = [(output.grad_fn, False)] if output.grad_fn else []
        while stack:
            function, done = stack.pop()
            if done:
                order.append(function)
            elif function not in found:
                found.add(function)
                stack.append((function, True))
                stack.extend((f, False) for f, _k in function.next_functions if f is not None)
    reached: dict[Any, int] = dict.fromkeys(order, 0)
    for k, output in enumerate(outputs):
        if output.grad_fn is not None:
            reached[output.grad_fn] |= 1 << k
    # A gradient may be the tangent itself.
    leaves = {id(o): frozenset([k]) for k, o in enumerate(outputs) if o.grad_fn is None}
    for function in reversed(order):
        mask = reached[function]
        for following, _k in function.next_functions:
            if following is not None:
                reached[following] |= mask
        if hasattr(function, "variable"):
            positions = (k for k in range(len(outputs)) if mask >> k & 1)
            leaves[id(function.variable)] = frozenset(positions)
    return leaves


def _write(
    recorder: _C.Recorder,
    lifted: list[tuple[torch.Tensor, torch.Tensor, bool, int]],
    index: int,
    sources: _Sources,
    roots: _Roots,
) -> list[Write]:
    tensor, twin, constant, base = lifted[index]
    if constant:
        return []
    about = recorder.describe(twin)
    if about.storage_changed and twin.requires_grad:
        raise UnsupportedError(
            "the program gives a tensor that it was given the memory of one that requires grad "
            "(torch.Tensor.set_): use copy_, or return a new tensor"
        )
    if about.storage_changed:
        return [Write(index, None, about.version, about.storage, source=sources.memory_of(twin))]
    meta = None
    # Without such a mutation, other strides are functionalization's: an out-of-place
    # operator gives a dense tensor in the place of a strided one.
    if id(twin) not in sources.assigned and (about.metadata_mutated or twin.shape != tensor.shape):
        viewed = _viewed(recorder, twin, lifted[base if base >= 0 else index][0])
        offset = int(viewed.storage_offset()) - int(tensor.storage_offset())
        meta = (list(viewed.shape), list(viewed.stride()), offset)
    differentiable = _has_own_history(twin, recorder.source(index))
    if differentiable and base >= 0:
        raise UnsupportedError(
            "the program writes a result that requires grad to a tensor that it was given, and "
            "writes to its memory through another tensor: return the result instead"
        )
    if about.mutated and base in (-1, index):
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise UnsupportedError(
                "the program writes to a tensor of which several elements are one place in memory "
                "(an expanded one): pass a clone"
            )
        return [
            Write(
                index,
                roots.add(about.value),
                about.version,
                about.storage,
                meta,
                differentiable=differentiable,
            )
        ]
    if about.version or meta is not None:
        return [
            Write(index, None, about.version, about.storage, meta, differentiable=differentiable)
        ]
    return []


def _viewed(recorder: _C.Recorder, twin: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What eager makes of `base` where the program has changed the shape of the twin in place.

    The twin's own layout would not do: the values that a written tensor has from then on lie
    elsewhere than it does, or with other strides.
    """
    value = recorder.base_value(twin)
    _operator, outputs, _line = recorder.node_info(value.node)
    meta = outputs[value.index]
    if tuple(meta.sizes) != tuple(base.shape):  # it was made larger, or got a result's shape
        base = base.new_empty(0, device="meta").as_strided(
            meta.sizes, meta.strides, base.storage_offset()
        )
    viewed = recorder.describe(twin).views.apply(base.detach())
    assert viewed.shape == twin.shape
    return viewed


def _has_own_history(twin: torch.Tensor, source: torch.Tensor | None) -> bool:
    """Whether autograd has followed a write to a lifted tensor."""
    if twin.grad_fn is None:
        return False
    # What it had before leads to nothing else.
    following = [function for function, _k in twin.grad_fn.next_functions]
    return source is None or getattr(following[0], "variable", None) is not source


def _check_generators(recording: Recording) -> None:
    if not recording.recorder.draws_only_from(recording.generators.known()):
        raise UnsupportedError(
            "the program draws from a torch.Generator that a replay cannot find again: pass it, "
            "keep it in an attribute, or make it in the program by the name torch.Generator"
        )


def _check_sharing(
    recorder: _C.Recorder,
    lifted: list[tuple[torch.Tensor, torch.Tensor, bool, int]],
    writes: list[Write],
) -> None:
    """Tensors that share memory that is written to must have been lifted as views of it."""
    storages: dict[int, list[int]] = {}
    for i, (tensor, _twin, constant, base) in enumerate(lifted):
        if not constant and base < 0 and tensor.numel() > 0:
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(i)
    again: list[torch.Tensor] = []
    for write in writes:
        tensor = lifted[write.index][0]
        others = storages.get(tensor.untyped_storage().data_ptr(), [])
        if write.root is None or lifted[write.index][3] >= 0:
            continue
        # What lies beside the tensor in its storage is none of the graph's values.
        beside = recorder.reads_offset and tensor.nbytes != tensor.untyped_storage().nbytes()
        if len(others) > 1 or beside:
            again.extend(lifted[i][0] for i in others)
    if again:
        raise SharedStorage(again)


def copied(value: Any) -> Any:
    """Another object with the same content; `copy.copy` gives a numpy scalar itself."""
    scalar = type(value).__module__ == "numpy" and not _tree.is_array(value)
    return value.copy() if scalar and hasattr(value, "copy") else copy.copy(value)


def _inference(leaf: torch.Tensor) -> bool | None:
    """Whether a result is an inference tensor; None when all made in the mode of now are alike."""
    made = leaf.is_inference()
    return None if made == torch.is_inference_mode_enabled() else made


@dataclasses.dataclass
class _Base:
    """An output that other results are views of: those which count their versions together."""

    leaf: torch.Tensor  # one of them
    source: FromRoot
    taken: bool = False  # a result is the output itself


# What a tensor is a view of (the index of a lifted tensor, or a result), and how.
_Aliases = list[tuple[int | torch.Tensor, _C.ViewSequence]]


class _Inputs:
    """The lifted tensors of a recorder, of which each is looked up when it is asked for."""

    def __init__(self, recorder: _C.Recorder) -> None:
        self._recorder = recorder

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, bool, int]:
        found: tuple[torch.Tensor, torch.Tensor, bool, int] = self._recorder.input(index)
        return found

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool, int]]:
        return iter(self._recorder.lifted())


class _Sources:
    """Says for each object of the program where a replay takes it from."""

    def __init__(self, recording: Recording, state: _lift.State, roots: _Roots) -> None:
        self.recorder = recording.recorder
        self.state = state
        self.roots = roots
        self._made = recording.made
        self._moving = recording.moving
        self.arguments = {id(c): i for i, c in enumerate(recording.containers)}
        self._generators = recording.generators
        self._known: dict[int, tuple[Any, Source]] = {}  # id -> the object, its source
        self.differentiable: list[tuple[FromRoot, torch.Tensor]] = []
        # By root: lifted tensors, or other results, that it is a view of; the nearest first.
        self.aliases: dict[int, _Aliases] = {}
        self._of_assigned: set[int] = set()  # ids of views of what is assigned to `.data`
        self._by_edge: dict[Any, torch.Tensor] = {}  # what custom functions give
        self.lifted = {}  # id of a lifted tensor or its twin -> its index
        for i, (tensor, twin, _constant, _base) in enumerate(self.recorder.lifted()):
            self.lifted[id(tensor)] = self.lifted[id(twin)] = i
        self.assigned = {}  # id of the tensor that the program holds -> what was assigned to it
        for tensor, value, user in recording.assigned:
            if id(user) in self.lifted:
                self.lifted[id(tensor)] = self.lifted[id(user)]
                self.assigned[id(tensor)] = value
        self.former: list[Source] = []
        # Of lifted tensors of which the program says that they require no grad any more.
        self._forgetting = {self.lifted[id(t)] for t, now in recording.required if not now}
        self.attributed: list[tuple[Source, dict[str, Source]]] = []
        self.hooks: list[tuple[Source, str, Any]] = []
        self.grads: list[tuple[Source, Source]] = []
        self._autograd = recording.autograd
        self.arrays = recording.arrays
        self.reads_offset = False
        self._held = {id(value): tensor for tensor, value, _user in recording.assigned}
        self._moved = [(tensor, value) for tensor, value, _user in recording.assigned]
        self._assigned_at = {  # of arguments: what the program holds all the time, by index
            self.lifted[id(tensor)]: tensor
            for tensor, _value, user in recording.assigned
            if tensor is not user and id(tensor) in self.lifted
        }
        self._bases: dict[int, list[_Base]] = {}  # root -> the objects that are views of it
        self._sharing: dict[int, int] = {}
        self._objects: set[int] = set()  # roots that are a result already
        everything = [recording.result, list(recording.refilled.values())]
        everything += [c.value for c in recording.changes]
        everything += [value for _tensor, value, _user in recording.assigned]
        everything += [grad for _tensor, _before, grad, _seen in recording.gradients]
        everything += [value for _tensor, _key, value in recording.attributes]
        self._count(everything)

    def index_of(self, tensor: torch.Tensor) -> int:
        """Of a tensor of the user's, which may have met no operator."""
        if id(tensor) not in self.lifted:
            if not self.recorder.is_liftable(tensor):
                raise UnsupportedError(
                    f"the program sets an attribute of {_C.unsupported_kind(tensor)}, which a "
                    "graph cannot hold: set it outside of the program"
                )
            self.recorder.lift(tensor)
            self.lifted[id(tensor)] = self.recorder.describe(tensor).lifted
        return self.lifted[id(tensor)]

    def known(self, value: Any) -> Source | None:
        """The source of an object that was met before."""
        found = self._known.get(id(value))
        return None if found is None else found[1]

    def _count(self, values: list[Any]) -> None:
        """How many tensors of the results belong to each storage."""
        seen: set[int] = set()
        stack = list(values)
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                about = self.recorder.describe(value)
                if about.captured:
                    self._sharing[about.storage] = self._sharing.get(about.storage, 0) + 1
                    self._note_edge(value)
                    if about.lifted < 0 and (grad := _C.grad_of(value)) is not None:
                        stack.append(grad)
                    stack.extend(vars(value).values())
                continue
            if _tree.is_array(value):
                shared = self.arrays.of(value)
                if shared is not None:
                    stack.append(shared.tensor)
                continue
            taken = self._taken(value) or _tree.parts(value)
            if taken is not None:
                stack.extend(taken[1])

    def _note_edge(self, tensor: torch.Tensor) -> None:
        of_users = self.recorder.describe(tensor).base_lifted >= 0  # of a leaf that is a view, too
        if tensor.requires_grad and (of_users or tensor._is_view()):
            function = self.recorder.resumed(lambda: function_of(tensor))
            if isinstance(function, torch.autograd.function.BackwardCFunction):
                self._by_edge[function, tensor.output_nr] = tensor

    def _taken(self, value: Any) -> _made.Parts | None:
        """The parts of an object that the program made, and that is no plain container."""
        if value not in self._made:
            return None
        plain = _tree.parts(value) is not None and not _made.has_tensor_keys(value)
        return None if plain else _made.parts(value)

    def of(self, value: Any) -> Source:
        if type(value) in _tree.SIMPLE_TYPES:
            return Constant(value)
        value = self._moving.real(value)
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, torch.Tensor):
            source = self._tensor(value)
            self._known[id(value)] = (value, source)
            is_users = isinstance(source, FromLifted) and not source.alias
            if is_users or isinstance(source, Constant):
                return source
            if value.is_leaf:
                self._note_hooks(value, source)
            if value.requires_grad and (grad := _C.grad_of(value)) is not None:
                self.grads.append((source, self.of(grad)))
            if vars(value):
                attributes = {key: self.of(held) for key, held in vars(value).items()}
                self.attributed.append((source, attributes))
            return source
        if isinstance(value, Number):
            number = self.recorder.describe(value.node.number)
            return FromNumber(self.roots.add(number.value))
        if id(value) in self.arguments:
            return FromArgument(self.arguments[id(value)])
        if isinstance(value, torch._C.Generator):
            return self._generator(value)
        if self.state.knows(value):
            return Constant(value)
        taken = self._taken(value)
        if taken is not None:
            assembled = Assembled(taken[0], [])
            self._known[id(value)] = (value, assembled)
            assembled.children.extend(self.of(child) for child in taken[1])
            return assembled
        if _tree.parts(value) is not None:
            return self.build(value)
        if _tree.is_array(value):
            source = self._array(value)
        elif isinstance(value, (set, bytearray)) or type(value).__module__ == "numpy":
            source = Copied(copied(value))
        else:
            return Constant(value)
        self._known[id(value)] = (value, source)
        return source

    def _note_hooks(self, leaf: torch.Tensor, source: Source) -> None:
        """Of a leaf that the program makes: they are the caller's, and fire in its backward."""
        hooks, after, *accumulate = _C.hooks_of(leaf)
        every = [("register_hook", h) for h in hooks]
        every += [("register_post_accumulate_grad_hook", h) for h in after]
        for name, hook in every:
            if not self._autograd.is_lasting(hook):
                raise UnsupportedError(
                    f"the program leaves a hook on a leaf that it makes (torch.Tensor.{name} with "
                    f"{getattr(hook, '__qualname__', type(hook).__name__)}), which belongs to this "
                    "one run of it: register it after the call"
                )
            self.hooks.append((source, name, hook))
        if every:
            drop_hooks(leaf)
        if any(accumulate):
            raise UnsupportedError(
                "the program leaves a hook on the function that accumulates the gradient of a leaf "
                "that it makes: register it after the call, or use Tensor.register_hook"
            )

    def _generator(self, value: torch.Generator) -> Source:
        generator = self._generators.real(value)
        if any(generator is made for made in self._generators.made):
            raise UnsupportedError(
                "the program returns or keeps a torch.Generator that it makes: make it before the "
                "capture"
            )
        return Constant(generator)

    def build(self, value: Any) -> Built:
        """The source of a container as a new object, whatever it was before."""
        taken = _tree.parts(value)
        assert taken is not None
        built = Built(taken[0], [])
        if id(value) not in self.arguments and not self.state.knows(value):
            self._known[id(value)] = (value, built)
        built.children.extend(self.of(child) for child in taken[1])
        return built

    def _tensor(self, leaf: torch.Tensor) -> Source:
        if id(leaf) in self.assigned:
            return FromLifted(self.lifted[id(leaf)])
        about = self.recorder.describe(leaf)
        if about.captured:
            check_plain(leaf, "a result")
            if _C.has_tangent(leaf):
                raise UnsupportedError(
                    "a result has a tangent of forward-mode AD, which a graph would drop: unpack "
                    "it in the program, and return the tangent"
                )
        if not about.captured:
            if not self.recorder.is_liftable(leaf):
                return Constant(leaf)
            # An eager tensor that met no operator (a parameter returned as it is).
            self.recorder.lift(leaf)
            about = self.recorder.describe(leaf)
        if about.lifted >= 0 and not about.constant:
            return FromLifted(about.lifted)
        source = self.memory_of(leaf)
        if isinstance(leaf, torch.nn.Parameter) and isinstance(
            source, (FromLifted, FromView, FromStrided)
        ):
            return AsParameter(source, leaf.requires_grad)
        return source

    def _strided(
        self, index: int, leaf: torch.Tensor, alias: bool, detached: bool = False
    ) -> FromStrided:
        return FromStrided(
            index,
            list(leaf.shape),
            list(leaf.stride()),
            int(leaf.storage_offset()),
            leaf.dtype,
            leaf.is_conj(),
            leaf.is_neg(),
            alias,
            detached,
        )

    def _array(self, array: Any) -> Source:
        """The source of a numpy array: the program may have it from a tensor."""
        shared = self.arrays.of(array)
        if shared is None:
            return Copied(copied(array))
        return FromArray(
            self.of(shared.tensor), array.dtype, array.shape, array.strides, shared.offset
        )

    def _view_of_assigned(self, leaf: torch.Tensor) -> FromStrided | None:
        """The source of a view of what was assigned to `.data`: one version counter for both."""
        if leaf.requires_grad:
            return None
        for id_, value in self.assigned.items():
            if leaf is not value and _C.share_version_counter(leaf, value):
                if self.recorder.describe(leaf).storage != self.recorder.describe(value).storage:
                    continue  # of what the tensor was before
                if leaf.dtype != value.dtype:
                    raise UnsupportedError(
                        "a result has the memory of a tensor whose `.data` the program assigned, "
                        "as another dtype: return the tensor itself"
                    )
                source = self._strided(self.lifted[id_], leaf, alias=False)
                source.offset -= int(value.storage_offset())
                source.relative = True
                return source
        return None

    def memory_of(self, leaf: torch.Tensor) -> Source:
        """The source of what a tensor holds, also when it is a lifted tensor itself."""
        source = self._memory_of(leaf)
        if id(source) in self._of_assigned:
            return source  # it comes after the assignment
        owner = source
        while isinstance(owner, FromView):
            owner = owner.base
        relative = isinstance(owner, FromStrided) and owner.relative
        if isinstance(owner, FromLifted) and owner.index in self._forgetting and leaf.requires_grad:
            self.former.append(source)  # with the history that its owner has until then
        elif (
            isinstance(owner, (FromLifted, FromStrided))
            and not relative
            and any(self.lifted[id_] == owner.index for id_ in self.assigned)
        ):
            self.former.append(source)
        return source

    def _memory_of(self, leaf: torch.Tensor) -> Source:
        recorder = self.recorder
        self._check_history(leaf)
        view = self._view_of_assigned(leaf)
        if view is not None:
            return view
        about = recorder.describe(leaf)
        lifted = _Inputs(recorder)
        base = about.base_lifted
        if base >= 0 and not lifted[base][2]:
            self._check_own_history(leaf)
        if leaf.requires_grad and leaf.is_leaf and (base < 0 or lifted[base][2]):
            found = self._leaf_over_result(leaf)
            if found is not None:
                return found
        if base >= 0 and lifted[base][2]:
            of_leaf = leaf._base is not None and leaf._base.requires_grad and leaf.is_leaf
            found = self._view_of_result(leaf) if of_leaf and leaf.requires_grad else None
            if found is not None:
                return found
            if not about.mutated and (leaf.is_leaf or not leaf.requires_grad):
                return FromConstant(
                    base,
                    about.views,
                    self._counted_with(leaf),
                    requires_grad=leaf.requires_grad and leaf.is_leaf and not leaf._is_view(),
                    parameter=isinstance(leaf, torch.nn.Parameter),
                )
        elif base >= 0 and lifted[base][3] == base:
            # Of a member, not of the storage as a whole: so it shares the version counter.
            members = [i for i, (*_, group) in enumerate(lifted) if group == base and i != base]
            if leaf.requires_grad:
                return self._view_of_member(leaf, members)
            alike = [i for i in members if lifted[i][0].dtype == leaf.dtype]
            owner_index = (alike or members)[0]
            detached = lifted[owner_index][0].requires_grad
            return self._strided(owner_index, leaf, not about.shares_version, detached)
        elif base >= 0 and recorder.describe(lifted[base][1]).metadata_mutated:
            # The views lead from what the tensor was.
            self.reads_offset = True
            viewed = _viewed(recorder, leaf, lifted[base][0])
            detached = not leaf.requires_grad and lifted[base][1].requires_grad
            turned = self._strided(base, viewed, not about.shares_version, detached)
            turned.grad_mode = not leaf.requires_grad or leaf.grad_fn is not None
            return turned
        elif base >= 0 and about.mutated:
            found = self._view_of_leaf(leaf) if leaf.requires_grad else None
            if found is not None:
                return found
            of_base = leaf._base is not None and leaf._base.requires_grad
            made_so = leaf.requires_grad and leaf.is_leaf and not of_base
            if not len(about.views) and not made_so:
                return FromLifted(base, alias=True)
            if leaf.requires_grad and leaf.grad_fn is not None:
                self._check_plain(leaf, lifted[base][1])
            return FromView(
                FromLifted(base, alias=not about.shares_version),
                about.views,
                leaf.grad_fn is not None if leaf.requires_grad else None,
                requires_grad=made_so,
                of_detached=made_so or (not leaf.requires_grad and lifted[base][0].requires_grad),
                detached=made_so and leaf._base is None,
                retains_grad=leaf.retains_grad,
            )
        differentiable = leaf.requires_grad and leaf.grad_fn is not None
        of_user = base >= 0 and not lifted[base][2] and len(about.views) > 0
        if of_user and leaf.requires_grad and leaf.is_leaf and not about.mutated:
            found = self._view_of_leaf(leaf)
            if found is not None:
                return found
            # Of what requires grad, a view without a history says so, too.
            made_so = leaf._base is None or not leaf._base.requires_grad
            owner = FromLifted(base, alias=not about.shares_version)
            return FromView(
                owner,
                about.views,
                grad_mode=False,
                requires_grad=made_so,
                of_detached=made_so,
                detached=leaf._base is None,
            )
        alias_of: _Aliases = []
        if differentiable and of_user:
            source_of_base = recorder.source(base)
            twin = self._assigned_at.get(base, lifted[base][1])
            if _is_plain_view(leaf, twin) or (
                base in self._forgetting
                and source_of_base is not None
                and _is_view_of_given(leaf, source_of_base)
            ):
                # Eager's own view of the user's tensor, with eager's gradient.
                self._check_hooks(leaf, twin)
                return FromView(
                    FromLifted(base), about.views, grad_mode=True, retains_grad=leaf.retains_grad
                )
            if not about.mutated:
                found = self._view_of_function(leaf) or self._view_of_leaf(leaf)
                if found is not None:
                    return found
                if _leads_nowhere(leaf):
                    # A view of one that was taken without grad mode.
                    without_grad = FromView(FromLifted(base), about.views, grad_mode=False)
                    nothing = about.views.after(about.views)
                    assert nothing is not None
                    return FromView(without_grad, nothing, grad_mode=True)
                alias_of = [*self._customs_before(leaf), (base, about.views)]
        elif leaf.requires_grad and leaf._base is not None and leaf._base.requires_grad:
            found = self._view_of_result(leaf) or self._view_of_function(leaf)
            if found is not None:
                return found
            if differentiable:
                alias_of = self._alias_of_result(leaf)
        elif differentiable and leaf._base is not None and not of_user:
            found = self._view_of_made_leaf(leaf)
            if found is not None:
                return found
        if about.mutated and self._sharing.get(about.storage, 0) > 1 and not differentiable:
            whole = self._base(self.roots.add(recorder.base_value(leaf)), leaf)
            if len(about.views) or whole.taken:
                return FromView(whole.source, about.views)
            whole.taken = True
            return whole.source
        counted_with = None if differentiable else self._counted_with(leaf)
        if (
            recorder.is_input(about.value)
            and base >= 0
            and about.shares_version
            and about.storage_changed
            and not lifted[base][2]
        ):
            return FromView(FromLifted(base), about.views)
        root = self.roots.add(about.value)
        # `y.data` is another tensor object over the same value.
        alias = root in self._objects or recorder.is_input(about.value)
        of_input = base >= 0 and not lifted[base][2]
        if base >= 0 and not about.shares_version:
            alias = True
        else:
            self._objects.add(root)
        source = FromRoot(
            root,
            alias,
            requires_grad=leaf.requires_grad
            and leaf.is_leaf
            and (leaf._base is None or not leaf._base.requires_grad),
            parameter=isinstance(leaf, torch.nn.Parameter),
            inference=None if of_input else _inference(leaf),
            counted_with=counted_with,
            retains_grad=differentiable and leaf.retains_grad,
        )
        if differentiable:
            if alias_of:
                self.aliases[root] = alias_of
            self.differentiable.append((source, leaf))
        return source

    def _check_history(self, leaf: torch.Tensor) -> None:
        """Bring the history up to date of a view whose base was written to."""
        if not leaf.requires_grad or not leaf._is_view():
            return
        try:
            self.recorder.resumed(lambda: leaf.grad_fn)
        except (UnsupportedError, FallbackError):
            raise
        except RuntimeError as e:
            where = self._place_of(leaf)
            raise UnsupportedError(
                f"a result is a view (at {where}) that autograd allows nobody to use since what it "
                "is a view of was written to: make the view and write in one mode, or "
                f"return a clone. PyTorch says of it: {str(e).splitlines()[0]}"
            ) from None

    def _views_after(self, leaf: torch.Tensor, other: torch.Tensor) -> _C.ViewSequence | None:
        """How `leaf` is a view of `other`; None if it is none."""
        about, of_other = self.recorder.describe(leaf), self.recorder.describe(other)
        if not of_other.captured or about.storage != of_other.storage:
            return None
        return about.views.after(of_other.views)

    def _view_of_result(self, leaf: torch.Tensor) -> FromView | None:
        """The source of a view of what has a history, or is a leaf: eager's own view.

        A view that was taken without grad mode has no history, and requires grad.
        """
        base = leaf._base
        assert base is not None
        held = self._held.get(id(base), base)  # as the program holds it
        views = self._views_after(leaf, base)
        has_history = leaf.grad_fn is not None
        if views is None or (has_history and not _is_plain_view(leaf, base)):
            return None
        source = self.of(held)
        if not isinstance(source, (FromRoot, FromConstant, FromLifted, FromView, AsParameter)):
            return None
        self._check_hooks(leaf, base)
        view = FromView(source, views, grad_mode=has_history, retains_grad=leaf.retains_grad)
        if id(held) in self.assigned:
            self._of_assigned.add(id(view))
        return view

    def _leaf_over_result(self, leaf: torch.Tensor) -> FromView | None:
        """The source of a leaf that was a view, of what requires no grad, when it was made one."""
        base = leaf._base
        if base is None or base.requires_grad or isinstance(leaf, torch.nn.Parameter):
            return None
        views = self._views_after(leaf, base)
        source = None if views is None else self.of(self._held.get(id(base), base))
        if views is None or not isinstance(source, (FromRoot, FromConstant, FromView)):
            return None
        return FromView(source, views, grad_mode=torch.is_grad_enabled(), requires_grad=True)

    def _view_of_leaf(self, leaf: torch.Tensor) -> FromView | None:
        """The source of a view of a leaf that the program made over the user's memory."""
        base = leaf._base
        if base is None or not base.requires_grad or not base.is_leaf or id(base) in self.lifted:
            return None
        return self._view_of_result(leaf)

    def _view_of_made_leaf(self, leaf: torch.Tensor) -> FromView | None:
        """The source of a view of a leaf that is itself a view, of what requires no grad."""
        function = leaf.grad_fn
        while function is not None and len(function.next_functions) == 1:
            if isinstance(function, torch.autograd.function.BackwardCFunction):
                return None
            function = function.next_functions[0][0]
        made = getattr(function, "variable", None)
        views = None if made is None else self._views_after(leaf, made)
        source = None if views is None else self.of(made)
        if made is None or views is None or not isinstance(source, FromView):
            return None
        self._check_hooks(leaf, made)
        return FromView(source, views, grad_mode=True, retains_grad=leaf.retains_grad)

    def _check_plain(self, leaf: torch.Tensor, base: torch.Tensor) -> None:
        """A view of what the program has written to is eager's own one, with eager's gradient."""
        if not _is_plain_view(leaf, base) and not _leads_nowhere(leaf):
            raise UnsupportedError(
                f"a result (at {self._place_of(leaf)}) is what a custom autograd.Function gives as "
                "a view of a tensor that the program was given and writes to: return a clone"
            )
        self._check_hooks(leaf, base)

    def _check_own_history(self, leaf: torch.Tensor) -> None:
        """What lies in the memory of a tensor of the user's has the history of that, or none."""
        owner = leaf if leaf._base is None else leaf._base
        moved = self.recorder.describe(owner).storage_changed or any(
            owner is tensor for tensor, _value in self._moved
        )
        if moved and leaf.requires_grad and not owner.is_leaf:
            raise UnsupportedError(
                "a result has a history of its own, and was given the memory of a tensor of the "
                "caller's (Tensor.set_, Tensor.data): return a clone"
            )

    def _check_hooks(self, leaf: torch.Tensor, base: torch.Tensor) -> None:
        """A replay makes the view anew, and the hooks are the program's."""
        if leaf.grad_fn is not None and _C.is_hooked(leaf, base):
            raise UnsupportedError(
                f"a result is a view (at {self._place_of(leaf)}) with a hook of the program, on it "
                "or on a view that it was made from: register the hook on what it is a view of, or "
                "after the call"
            )

    def _place_of(self, leaf: torch.Tensor) -> str:
        return self.recorder.node_info(self.recorder.describe(leaf).value.node)[2]

    def _view_of_member(self, leaf: torch.Tensor, members: list[int]) -> FromView:
        """The source of a view of one of the tensors that share memory that is written to."""
        for i in members:
            twin = _Inputs(self.recorder)[i][1]
            views = self._views_after(leaf, twin) if leaf._base is twin else None
            if views is not None and (leaf.grad_fn is None or _is_plain_view(leaf, twin)):
                self._check_hooks(leaf, twin)
                has_history = leaf.grad_fn is not None
                return FromView(FromLifted(i), views, has_history, retains_grad=leaf.retains_grad)
        raise UnsupportedError(
            f"a result (at {self._place_of(leaf)}) requires grad and lies in memory that the "
            "program writes to, and that several of its tensors share: return a clone"
        )

    def _view_of_function(self, leaf: torch.Tensor) -> FromView | None:
        """The source of a view of a result that is a view itself, by a custom function."""
        function = leaf.grad_fn
        while function is not None:
            following = function.next_functions
            custom = isinstance(function, torch.autograd.function.BackwardCFunction)
            if custom or len(following) != 1:
                return None
            result = self._by_edge.get(following[0])
            views = None if result is None else self._views_after(leaf, result)
            if result is not None and views is not None:
                source = self.of(result)
                if not isinstance(source, FromRoot):
                    return None
                self._check_hooks(leaf, result)
                return FromView(source, views, grad_mode=True, retains_grad=leaf.retains_grad)
            function = following[0][0]
        return None

    def _customs_before(self, leaf: torch.Tensor) -> _Aliases:
        """The results of custom functions that a tensor is a view of, and how."""
        found: _Aliases = []
        for result in self._by_edge.values():
            views = None if result is leaf else self._views_after(leaf, result)
            if views is not None:
                found.append((result, views))
        return sorted(found, key=lambda alias: len(alias[1]))

    def _alias_of_result(self, leaf: torch.Tensor) -> _Aliases:
        """What a custom function gives as a view of another tensor of the program, and how."""
        base = leaf._base
        assert base is not None
        views = self._views_after(leaf, base)
        if views is None or not isinstance(self.of(base), (FromRoot, FromConstant)):
            return []
        return [*self._customs_before(leaf), (base, views)]

    def _base(self, root: int, leaf: torch.Tensor) -> _Base:
        """The output `root` as what `leaf` is a view of."""
        bases = self._bases.setdefault(root, [])
        for base in bases:
            if _C.share_version_counter(base.leaf, leaf):
                return base
        source = FromRoot(
            root,
            alias=bool(bases),
            inference=_inference(leaf),
            counted_with=self._counted_with(leaf),
        )
        bases.append(_Base(leaf, source))
        return bases[-1]

    def _counted_with(self, leaf: torch.Tensor) -> int | None:
        """The lifted tensor whose version counter a tensor has, and not its memory."""
        about = self.recorder.describe(leaf)
        if id(leaf) in self.lifted or leaf.is_inference():
            return None
        owner = leaf
        for tensor, value in self._moved:
            if leaf is not tensor and _C.share_version_counter(leaf, value):
                owner = tensor  # of which it is a view
        moved = any(owner is tensor for tensor, _value in self._moved)
        if not (about.storage_changed or moved or leaf._is_view()):
            return None
        if not (about.storage_changed or moved):
            base = leaf._base
            if base is None or not self.recorder.describe(base).storage_changed:
                return None
        for i, (_tensor, twin, constant, group) in enumerate(self.recorder.lifted()):
            # A storage as a whole has no counter of the user's; its members have.
            if not constant and group != i and _C.share_version_counter(owner, twin):
                other = self.recorder.describe(twin)
                own_memory = other.storage == about.storage and not other.storage_changed
                return None if own_memory else i
        return None
