"""Record: run the program once on its capture tensors.

Operators are recorded by the extension, below Python. This module adds what never reaches an
operator: reading a tensor's data from Python (`tolist`, `numpy`, printing), assignments to
`tensor.data`, and what the program does to its arguments' containers and to its own state, which
is noted and taken back.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torch_lazy_ext import _C, _lift, _tree
from torch_lazy_ext._errors import FallbackError, UnsupportedError

_C.set_unsupported_error(UnsupportedError)


class CaptureMode(TorchFunctionMode):
    """Answers the calls on tensors that reach no operator.

    Attributes:
        assigned: id of a tensor -> the tensor and what the program assigned to its `.data`.
    """

    def __init__(self, recorder: _C.Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.assigned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is None or not args or not isinstance(args[0], torch.Tensor):
            result = func(*args, **kwargs)
        elif _C.is_capture_tensor(args[0]) or self.recorder.is_liftable(args[0]):
            result = handler(self, func, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self._made.append(weakref.ref(result))
        elif isinstance(result, (tuple, list)):
            self._made.extend(weakref.ref(t) for t in result if isinstance(t, torch.Tensor))
        return result

    def kept(self) -> list[torch.Tensor]:
        """Tensors of the capture that are still alive; drops its own references to them."""
        alive = [t for t in (ref() for ref in self._made) if t is not None]
        self._made.clear()
        return list({id(t): t for t in alive}.values())

    # ------------------------------------------------------- what handlers answer

    def read(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        real = self.recorder.materialize(self.recorder.twin_of(tensor))
        return _C.standalone(_read, func, real, tensor.requires_grad, args, kwargs)

    def get_data(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        # The getter itself: memory shared, a version counter of its own.
        return func(self.recorder.twin_of(tensor))

    def set_data(self, func: Any, tensor: torch.Tensor, value: torch.Tensor) -> None:
        twin = self.recorder.twin_of(tensor)
        new = self.recorder.twin_of(value)
        if (new.shape, new.dtype, new.stride()) != (twin.shape, twin.dtype, twin.stride()):
            raise UnsupportedError(
                f"an assignment to `.data` changes a tensor of shape {tuple(twin.shape)} and type "
                f"{twin.dtype} to {tuple(new.shape)} and {new.dtype} during the capture: convert "
                "the module before the capture"
            )
        old_about, new_about = self.recorder.describe(twin), self.recorder.describe(new)
        if old_about.storage == new_about.storage and old_about.value == new_about.value:
            return  # what `module.to()` does to a module that is there already
        new = new.detach()
        new.requires_grad_(tensor.requires_grad)
        self.recorder.rebind(tensor, new)
        self.assigned[id(tensor)] = (tensor, new)

    def get_grad(self, func: Any, tensor: torch.Tensor) -> Any:
        if _C.is_capture_tensor(tensor) or func(tensor) is None:
            return func(tensor)
        raise UnsupportedError(
            "the program reads the gradient of a tensor that existed before the capture: pass the "
            "gradient as an argument"
        )

    def set_grad(self, func: Any, tensor: torch.Tensor, *value: Any) -> Any:
        if _C.is_capture_tensor(tensor):
            return func(tensor, *value)
        raise UnsupportedError(
            "the program sets the gradient of a tensor that existed before the capture: return "
            "the gradient instead"
        )

    def requires_grad_(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted = args[0] if args else kwargs.get("requires_grad", True)
        if _C.is_capture_tensor(tensor) and self.recorder.describe(tensor).lifted < 0:
            return func(tensor, *args, **kwargs)
        if tensor.requires_grad != wanted:
            raise UnsupportedError(
                f"the program sets requires_grad={wanted} on a tensor that existed before the "
                "capture: set it before the capture"
            )
        return tensor if func == torch.Tensor.requires_grad_ else None

    def deepcopy(self, func: Any, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) not in memo:
            copy = self.recorder.twin_of(tensor).detach().clone()
            memo[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    def refuse(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _C.is_capture_tensor(tensor):
            return func(tensor, *args, **kwargs)
        raise UnsupportedError(
            f"the program asks for the memory of a tensor (torch.Tensor.{func.__name__}), and "
            "there is none while it is captured: compute with tensors, or read values with "
            "tolist() or numpy()"
        )


def _read(func: Any, value: torch.Tensor, requires_grad: bool, args: Any, kwargs: Any) -> Any:
    # A copy: what the program does to it must not change the value that is guarded.
    value = value.detach().clone().requires_grad_(requires_grad)
    result = func(value, *args, **kwargs)
    if func in (torch.Tensor.numpy, torch.Tensor.__array__):
        # Eager would share the memory; a write that cannot reach the tensor has to fail.
        result.flags.writeable = False
    return result


# Property getters are new objects each time they are looked at, and equal.
_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.tolist: CaptureMode.read,
    torch.Tensor.numpy: CaptureMode.read,
    torch.Tensor.__array__: CaptureMode.read,
    torch.Tensor.__repr__: CaptureMode.read,
    torch.Tensor.__format__: CaptureMode.read,
    torch.Tensor.data.__get__: CaptureMode.get_data,
    torch.Tensor.data.__set__: CaptureMode.set_data,
    torch.Tensor.grad.__get__: CaptureMode.get_grad,
    torch.Tensor.grad.__set__: CaptureMode.set_grad,
    torch.Tensor.grad.__delete__: CaptureMode.set_grad,
    torch.Tensor.requires_grad_: CaptureMode.requires_grad_,
    torch.Tensor.requires_grad.__set__: CaptureMode.requires_grad_,
    torch.Tensor.__deepcopy__: CaptureMode.deepcopy,
    torch.Tensor.data_ptr: CaptureMode.refuse,
    torch.Tensor.untyped_storage: CaptureMode.refuse,
    torch.Tensor.storage: CaptureMode.refuse,
    torch.Tensor.share_memory_: CaptureMode.refuse,
    torch.Tensor.__dlpack__: CaptureMode.refuse,
    torch.Tensor.__reduce_ex__: CaptureMode.refuse,
}


class Recording:
    """A finished capture.

    Attributes:
        recorder: the nodes, the lifted tensors and the guards.
        result: what the program returned.
        containers: the containers of the arguments as the program saw them.
        refilled: position in `containers` -> the container, for those the program changed.
        changes: what the program did to its state; taken back already.
        assigned: tensors and what was assigned to their `.data`.
    """

    def __init__(self, recorder: _C.Recorder) -> None:
        self.recorder = recorder
        self.result: Any = None
        self.containers: list[Any] = []
        self.refilled: dict[int, Any] = {}
        self.changes: list[_lift.Change] = []
        self.assigned: list[tuple[torch.Tensor, torch.Tensor]] = []


def record(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: _lift.State,
    shared: list[torch.Tensor],
) -> Recording:
    """Run `fn` on twins of the tensors in `args` and `kwargs`.

    Args:
        fn: the program.
        args, kwargs: its arguments; neither they nor what they hold is changed.
        state: what the program can reach beside its arguments.
        shared: tensors to lift as views of their storage, because the program writes to it.

    Raises:
        FallbackError: an operator that the fallback config names was met.
        UnsupportedError: the program did something a graph cannot hold.
        Exception: whatever the program itself raises.
    """
    recorder = _C.Recorder()
    for tensor in shared:
        recorder.share_storage(tensor)

    def twin(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedError(
                f"an argument is a {type(leaf).__name__}, a subclass of torch.Tensor with a "
                "behaviour of its own: pass plain tensors"
            )
        if not recorder.is_liftable(leaf):
            raise UnsupportedError(
                f"an argument is a tensor of layout {leaf.layout} and type {leaf.type()}, which a "
                "graph cannot hold: pass dense tensors and convert outside of the program"
            )
        return recorder.lift(leaf)

    recording = Recording(recorder)
    (own_args, own_kwargs), recording.containers = _tree.rebuild((args, kwargs), twin)
    before = [_tree.parts(c) for c in recording.containers]
    mode = CaptureMode(recorder)
    try:
        recorder.enter()
        try:
            with mode:
                recording.result = fn(*own_args, **own_kwargs)
            recorder.check_generator()
        finally:
            recorder.exit()
    finally:
        recording.changes = state.take_back()
    for i, (container, old) in enumerate(zip(recording.containers, before)):
        now = _tree.parts(container)
        assert now is not None and old is not None
        if now[0] != old[0] or any(a is not b for a, b in zip(now[1], old[1])):
            recording.refilled[i] = container
    recording.assigned = list(mode.assigned.values())
    _release_kept(recording, mode)
    if recorder.fallbacks:
        listing = ", ".join(
            f"{name}={count} (at {where})" if where else f"{name}={count}"
            for name, count, where in recorder.fallbacks
        )
        raise FallbackError(
            f"Fail to extract the compiled graph because of fallback: {listing}. The fallback "
            "config asks for it: see torch_lazy_ext.config.set_force_fallback"
        )
    return recording


def _release_kept(recording: Recording, mode: CaptureMode) -> None:
    """Give data to the tensors that the program keeps where a replay cannot follow.

    A constant (`functools.lru_cache` over `torch.arange`) becomes what eager would have kept. A
    tensor that depends on the inputs would be stale after the next replay: refused.
    """
    recorder = recording.recorder
    expected: set[int] = set()
    roots = [recording.result, recording.containers]
    roots += [c.value for c in recording.changes] + [t for pair in recording.assigned for t in pair]
    _reach(roots, expected)
    expected |= {id(t) for _user, t, _constant, _base in recorder.lifted()}

    def suspects() -> list[torch.Tensor]:
        alive = mode.kept()
        found = [t for t in alive if id(t) not in expected and _C.is_capture_tensor(t)]
        return found

    kept = suspects()
    if not kept:
        return
    mode._made = [weakref.ref(t) for t in kept]
    del kept
    gc.collect()
    kept = suspects()
    stale = []
    for tensor in kept:
        if tensor.grad_fn is not None:
            # Part of the autograd graph of a result, or kept for a backward.
            continue
        about = recorder.describe(tensor)
        if not about.captured:
            continue
        if recorder.depends_on_input(about.value):
            stale.append(recorder.node_info(about.value.node))
        else:
            value = recorder.materialize(tensor, guard=False).clone()
            torch._C._swap_tensor_impl(tensor, value)
    if stale:
        name, _metas, where = stale[0]
        raise UnsupportedError(
            f"the program keeps the result of {name} (at {where}) in a place outside of its "
            "results, attributes and closures, which a replay cannot bring up to date: return it, "
            "or keep it in an attribute of the module"
        )


def _reach(values: list[Any], tensors: set[int]) -> None:
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            tensors.add(id(value))
            if value._is_view():
                # A view keeps its base alive, with its Python object.
                tensors.add(id(value._base))
            continue
        taken = _tree.parts(value)
        if taken is not None and id(value) not in seen:
            seen.add(id(value))
            stack.extend(taken[1])
