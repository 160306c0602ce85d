"""Record: run the program once on its capture tensors.

Operators are recorded by the extension, below Python. This module adds what never reaches an
operator: reading a tensor's data from Python (`tolist`, `numpy`, printing), assignments to
`tensor.data`, and what the program does to its arguments' containers and to its own state, which
is noted and taken back.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch import utils as _functorch_utils
from torch.optim import radam as _radam

from torch_lazy_ext import _C, _collectives, _generators, _lift, _moving, _optimizers, _tree
from torch_lazy_ext._errors import FallbackError, UnsupportedError
from torch_lazy_ext._number import Number

_C.set_unsupported_error(UnsupportedError)


_running = threading.local()  # .capture: the Capture of this thread, or None


class Capture:
    """Answers the calls on tensors that reach no operator, while a program is recorded.

    For the time of a capture, the few methods of `torch.Tensor` that read or replace a tensor's
    memory go through here. Not a `TorchFunctionMode`: under one, `has_torch_function` is true,
    and PyTorch's own modules leave the kernels that eager would run.

    Attributes:
        assigned: id of a tensor -> the tensor as the program holds it, what the program assigned
            to its `.data`, and the user's tensor that it stands for.
        gradients: id of a leaf -> the leaf, the gradient that it had before the program, and
            whether the program saw that one (not if it only set another).
        required: id of a tensor -> the tensor, for those whose `requires_grad` the program set.
        replaced: id of a leaf -> how many nodes there were when the program set its gradient, which
            it had not seen.
        ran_backward: whether the program called `backward()`.
        generators: the generators that the program was given or made.
        creations: the state that steps of optimizers made.
    """

    _lock = threading.Lock()
    _count = 0

    def __init__(self, recorder: _C.Recorder, state: _lift.State) -> None:
        self.recorder = recorder
        self._state = state
        self.creations: list[_optimizers.Creation] = []
        self.assigned: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.gradients: dict[int, tuple[torch.Tensor, torch.Tensor | None, bool]] = {}
        self.required: dict[int, torch.Tensor] = {}
        self.ran_backward = False
        self.replaced: dict[int, int] = {}
        self._arguments: dict[int, torch.Tensor] = {}  # id of a twin -> the argument
        self.data_parallel = _collectives.DataParallel(self.adopt)
        self._rng_states: list[tuple[torch.Tensor, int]] = []  # handed out, numbers drawn so far
        self._furthest = 0  # how many were drawn before the state was put back
        self.generators = _generators.Generators(recorder)
        self._resumed = False
        self.moving = _moving.Moving(self.refusal)
        self.arrays = Arrays()
        self.foreign: set[int] = set()  # ids of arrays that were there before the program
        self.borrowed: list[torch.Tensor] = []  # tensors over the memory of these

    def __enter__(self) -> Capture:
        self._begin()
        self.recorder.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.recorder.exit()
        self._end()

    def resume(self, fn: Callable[[], Any]) -> Any:
        """Call `fn` after the program has ended, as a part of it."""
        self._begin()
        self._resumed = True
        try:
            return self.recorder.resumed(fn)
        finally:
            self._resumed = False
            self._end()

    def _begin(self) -> None:
        with Capture._lock:
            if Capture._count == 0:
                _install()
            Capture._count += 1
        _running.capture = self

    def _end(self) -> None:
        _running.capture = None
        with Capture._lock:
            Capture._count -= 1
            if Capture._count == 0:
                _remove()

    def refusal(self, message: str) -> UnsupportedError:
        """The error to raise; the capture fails with it also when the program catches it."""
        self.recorder.refusal = message
        return UnsupportedError(message)

    def owns(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and (
            _C.is_capture_tensor(tensor) or self.recorder.is_liftable(tensor)
        )

    def lift_argument(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin of an argument: the program is given no other tensor."""
        twin = self.recorder.lift(tensor)
        if isinstance(tensor, torch.nn.Parameter):
            twin.__class__ = torch.nn.Parameter
        self._arguments[id(twin)] = tensor
        return twin

    def _user(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor that existed before the program; None for one that the program made."""
        return self._arguments.get(id(tensor)) if _C.is_capture_tensor(tensor) else tensor

    # ------------------------------------------------------- what handlers answer

    def read(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        twin = self.recorder.twin_of(tensor)
        memory = self._standalone(
            _copy_of_memory, self.recorder.materialize(twin), twin.is_conj(), twin.is_neg()
        )
        requires_grad = tensor.requires_grad
        grad_mode = torch.is_grad_enabled()
        result = self._standalone(_read, func, memory, requires_grad, grad_mode, args, kwargs)
        if _tree.is_array(result) and _address(result) == memory.data_ptr():
            # Eager would share the memory; a write that cannot reach the tensor has to fail.
            result.flags.writeable = False
            alias = twin.detach()
            self.arrays.add(result, memory, alias)
            self.recorder.watch(alias, self._refresh)
        return result

    def _standalone(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        _running.capture = None
        try:
            return _C.standalone(func, *args, **kwargs)
        finally:
            _running.capture = self

    def _refresh(self) -> None:
        """The program wrote to memory that it has arrays of."""
        for shared in self.arrays.alive():
            value = self.recorder.materialize(shared.tensor)
            self._standalone(_copy_memory, shared.memory, value)

    def from_array(self, func: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        """`torch.from_numpy` and its like: a tensor over the memory of an array."""
        made = _of_number(data, *args, **kwargs)
        if made is not None:
            return made
        if not _tree.is_array(data):
            numbers = [self.numbers(a) for a in args]
            return func(
                self.numbers(data), *numbers, **{k: self.numbers(v) for k, v in kwargs.items()}
            )
        shared = self.arrays.of(data)
        made = self._standalone(_FROM_NUMPY, data)
        if shared is None:
            foreign = id(_owner(data)) in self.foreign
            made = self.recorder.lift(made, constant=True)
            if foreign:
                self.borrowed.append(made)
        else:
            dtype, strides = made.dtype, made.stride()
            if dtype != shared.tensor.dtype or shared.offset % made.itemsize:
                raise self.refusal(
                    "the program makes a tensor of another dtype over an array that shares the "
                    "memory of a tensor: use Tensor.view(dtype)"
                )
            offset = shared.tensor.storage_offset() + shared.offset // made.itemsize
            made = shared.tensor.as_strided(made.shape, strides, offset).data
        return made if func is _FROM_NUMPY else func(made, *args, **kwargs)

    def twin_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.recorder.twin_of(tensor)

    def observe(self, tensor: torch.Tensor) -> Any:
        return self.read(torch._C.TensorBase.item, tensor)

    def item(self, func: Any, tensor: torch.Tensor) -> Any:
        twin = self.twin_of(tensor)
        about = self.recorder.describe(twin)
        if (
            not tensor.is_floating_point()
            or tensor.numel() != 1
            or not self.recorder.depends_on_input(about.value)
        ):
            return func(tensor)
        with torch.no_grad():
            return Number(torch.ops.torch_lazy_ext.item(twin), self)

    def text(self, func: Any, tensor: torch.Tensor, **kwargs: Any) -> str:
        if kwargs or tensor.grad_fn is None:
            text: str = self.read(func, tensor, **kwargs)
            return text
        # The text of the value, and as PyTorch would add it, where the tensor comes from.
        text = self.read(func, tensor.detach())
        name = type(tensor.grad_fn).__name__
        text = torch._tensor_str._add_suffixes(
            text.removesuffix(")"), [f"grad_fn=<{name}>"], len("tensor("), force_newline=False
        )
        return text

    def format(self, func: Any, tensor: torch.Tensor, spec: str) -> str:
        # As torch.Tensor.__format__: a number is formatted, anything larger is its text.
        return (
            self.read(func, tensor, spec) if tensor.dim() == 0 else object.__format__(tensor, spec)
        )

    def numbers(self, data: Any) -> Any:
        """Python data with a number in the place of each tensor, for C++ code that reads them."""
        if isinstance(data, Number):
            return float(data)
        if not isinstance(data, (list, tuple)):
            return data
        return [
            self.read(torch._C.TensorBase.tolist, v)
            if isinstance(v, torch.Tensor)
            else self.numbers(v)
            for v in data
        ]

    def dtype_of(self, data: Any) -> torch.dtype | None:
        """What `torch.tensor` makes of nested lists with tensors in them; None without tensors."""
        if not isinstance(data, (list, tuple)) or not _any_tensor(data):
            return None

        def known(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [known(v) for v in value]
            if isinstance(value, torch.Tensor):
                return torch.zeros(value.shape, dtype=value.dtype)
            return 0.0 if isinstance(value, Number) else value

        dtype: torch.dtype = self._standalone(lambda: _TENSOR(known(data)).dtype)
        return dtype

    def fused(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        # PyTorch's own call would ask for the value of each float.
        numbers = [(name, v) for name, v in kwargs.items() if isinstance(v, Number)]
        known = {name: 0.0 if isinstance(v, Number) else v for name, v in kwargs.items()}
        _C.call_with_numbers(f"aten::{func.__name__}", args, known, numbers)

    def init_group(self, func: Any, optimizer: Any, group: Any, *lists: Any) -> Any:
        if self._state.knows(optimizer):
            found = _optimizers.creation(optimizer, group, len(lists), self._state.names)
            if found is not None:
                self.creations.append(found)
        return func(optimizer, group, *lists)

    def radam(self, func: Any, *args: Any, **kwargs: Any) -> None:
        _optimizers.RADAM[func.__name__](func, *args, **kwargs)

    def lbfgs(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        raise self.refusal(
            "torch.optim.LBFGS decides by the values of loss and gradients how often it calls its "
            "closure: extract what the closure calls, and leave the optimizer outside"
        )

    def get_rng_state(self, func: Any) -> torch.Tensor:
        # After the program, nothing is recorded of it.
        state = func() if self._resumed else self.generators.get_state(_generators.DEFAULT)
        self._rng_states.append((state, self.recorder.random_position()))
        return state

    def set_rng_state(self, func: Any, new_state: torch.Tensor) -> None:
        if not self._resumed:
            self.generators.set_state(_generators.DEFAULT, new_state)
            return
        # In a backward of its own, back to where it was (`torch.utils.checkpoint`): the same
        # numbers come again.
        for known, position in self._rng_states:
            if new_state is known:
                self._furthest = max(self._furthest, self.recorder.random_position())
                self.recorder.seek(position)
                return
        raise UnsupportedError(
            "a backward sets the state of the random number generator to one that is not of its "
            "forward: draw from a torch.Generator that is an argument"
        )

    def check_random_position(self) -> None:
        if self.recorder.random_position() < self._furthest:
            raise UnsupportedError(
                "the program leaves the random number generator in a state of before "
                "(torch.set_rng_state, torch.random.fork_rng): a replay goes on from its last "
                "number. Draw from a torch.Generator that is an argument"
            )

    def unwrap(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # No operator: a custom autograd.Function would be given the user's own tensors. Its `apply`
        # calls this, and may have been looked up before the capture.
        twins = (self.recorder.twin_of(a) if self.owns(a) else a for a in args)
        unwrapped: tuple[Any, ...] = func(tuple(twins))
        return unwrapped

    def manual_seed(self, func: Any, seed: Any) -> torch.Generator:
        return self.generators.stand_in(_generators.DEFAULT).manual_seed(int(seed))

    def initial_seed(self, func: Any) -> int:
        return self.generators.initial_seed(_generators.DEFAULT)

    def seed(self, func: Any) -> int:
        raise _generators.unrepeatable("torch.seed")

    def cond(self, func: Any, pred: Any, true_fn: Any, false_fn: Any, operands: Any = ()) -> Any:
        # What it does in the end; compiling the branches is nothing that a graph could hold.
        return (true_fn if pred else false_fn)(*operands)

    def functionalize(self, func: Any, function: Any, *, remove: str = "mutations") -> Any:
        return function  # a capture is functional, and gives the same results

    def get_data(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        # The getter itself: memory shared, a version counter of its own.
        data: torch.Tensor = func(self.recorder.twin_of(tensor))
        return data

    def set_data(self, func: Any, tensor: torch.Tensor, value: torch.Tensor) -> None:
        twin = self.recorder.twin_of(tensor)
        new = self.recorder.twin_of(value)
        layout = (new.shape, new.dtype, new.stride())
        if layout != (twin.shape, twin.dtype, twin.stride()) and not _C.is_capture_tensor(tensor):
            raise self.refusal(
                f"an assignment to `.data` changes a tensor of shape {tuple(twin.shape)} and "
                f"type {twin.dtype} to {tuple(new.shape)} and {new.dtype} during the capture: "
                "convert the module before the capture"
            )
        old_about, new_about = self.recorder.describe(twin), self.recorder.describe(new)
        if old_about.storage == new_about.storage and old_about.value == new_about.value:
            return  # what `module.to()` does to a module that is there already
        new = new.detach()
        new.requires_grad_(tensor.requires_grad)
        if id(tensor) in self.gradients:
            new.grad = twin.grad
        self.recorder.assign_data(tensor, new)
        if _C.is_capture_tensor(tensor) and layout != (tensor.shape, tensor.dtype, tensor.stride()):
            func(tensor, new.detach())  # the program holds the twin: that one can change
        user = self._user(tensor)
        self.assigned[id(tensor)] = (tensor, new, tensor if user is None else user)

    # The gradient of a lifted leaf is that of its twin, where autograd accumulates it.

    def adopt(self, tensor: torch.Tensor, seen: bool = True) -> torch.Tensor:
        """The twin of a leaf, with the gradient that the leaf has."""
        twin = self.recorder.twin_of(tensor)
        if id(tensor) not in self.gradients:
            grad = _grad_of(tensor)
            self.gradients[id(tensor)] = (tensor, grad, seen)
            if grad is not None and seen:
                if not self.recorder.is_liftable(grad):
                    raise self.refusal(
                        f"the program uses a gradient that is {_C.unsupported_kind(grad)}, which "
                        "a graph cannot hold: set it to None, or make it dense, before the call"
                    )
                twin.grad = self.recorder.twin_of(grad)
        return twin

    def zero_grad(self, func: Any, owner: Any, set_to_none: bool = True) -> None:
        # Whether there are gradients decides nothing when they all become None.
        groups = getattr(owner, "param_groups", None)
        if set_to_none:
            for p in owner.parameters() if groups is None else _parameters(groups):
                if self.owns(p):
                    p.grad = None
        func(owner, set_to_none)

    def get_grad(self, func: Any, tensor: torch.Tensor) -> Any:
        leaf = self._user(tensor)
        if leaf is None or not leaf.is_leaf:
            return func(tensor)
        grad = func(self.adopt(leaf))
        _leaf, user, seen = self.gradients[id(leaf)]
        if seen and user is not None and self.recorder.twin_of(user) is grad:
            return user
        return grad

    def set_grad(self, func: Any, tensor: torch.Tensor, *value: Any) -> Any:
        leaf = self._user(tensor)
        if value and isinstance(value[0], torch.Tensor):
            value = (self.recorder.twin_of(value[0]),)
        if leaf is None or not leaf.is_leaf:
            return func(tensor, *value)
        if id(leaf) not in self.gradients:
            self.replaced[id(leaf)] = len(self.recorder)
        twin = self.adopt(leaf, seen=False)
        return func(twin, *value)

    def backward(self, func: Any, *args: Any, **kwargs: Any) -> None:
        for tensor, twin, constant, _base in self.recorder.lifted():
            if not constant and twin.requires_grad and twin.is_leaf and tensor.is_leaf:
                self.adopt(tensor)
        self.ran_backward = True
        func(*args, **kwargs)
        self._collect_gradients()

    def _collect_gradients(self) -> None:
        """What a custom autograd.Function, which sees no twins, left in the user's own leaves."""
        for tensor, before, _seen in self.gradients.values():
            grad = _grad_of(tensor)
            if grad is not before:
                _set_grad(tensor, before)
                twin = self.recorder.twin_of(tensor)
                if grad is not None:
                    known = _grad_of(twin)
                    twin.grad = grad if known is None else known + grad

    def is_nested(self, func: Any, tensor: torch.Tensor) -> bool:
        return self.recorder.is_nested(tensor)

    def get_requires_grad(self, func: Any, tensor: torch.Tensor) -> Any:
        return func(self.recorder.twin_of(tensor) if id(tensor) in self.required else tensor)

    def requires_grad_(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        user = self._user(tensor)
        if user is None:
            return func(tensor, *args, **kwargs)
        twin = self.recorder.twin_of(user)
        wanted = bool(args[0] if args else kwargs.get("requires_grad", True))
        if twin.requires_grad != wanted:
            func(twin, *args, **kwargs)
            self.required[id(user)] = user
        return tensor

    def storage_offset(self, func: Any, tensor: torch.Tensor) -> int:
        self.recorder.reads_offset = True
        offset: int = func(self.recorder.twin_of(tensor))
        return offset

    def is_view(self, func: Any, tensor: torch.Tensor) -> bool:
        self.recorder.reads_views = True
        user = self._user(tensor)
        view: bool = func(tensor if user is None else user)
        return view

    def base(self, func: Any, tensor: torch.Tensor) -> Any:
        self.recorder.reads_views = True
        user = self._user(tensor)
        base = func(tensor if user is None else user)
        if user is not None and base is not None:
            raise self.refusal(
                "the program reads `_base` of a tensor that it was given: pass the base itself"
            )
        return base

    def deepcopy(self, func: Any, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) not in memo:
            copy = self.recorder.twin_of(tensor).detach().clone()
            memo[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        copied: torch.Tensor = memo[id(tensor)]
        return copied

    def collective(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.owns(tensor):
            return func(tensor, *args, **kwargs)
        return _collectives.FUNCTIONS[func.__name__](tensor, *args, **kwargs)

    def wait(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        waited: torch.Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
        return waited

    def forward_data_parallel(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.data_parallel.forward(*args, **kwargs)

    def refuse(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _C.is_capture_tensor(tensor):
            return self._standalone(func, tensor, *args, **kwargs)
        raise self.refusal(
            f"the program wants the memory of a tensor (torch.Tensor.{func.__name__}), and "
            "there is none while it is captured: compute with tensors, or read values with "
            "tolist() or numpy()"
        )


def _read(
    func: Any, value: torch.Tensor, requires_grad: bool, grad_mode: bool, args: Any, kwargs: Any
) -> Any:
    value.requires_grad_(requires_grad)
    with torch.set_grad_enabled(grad_mode):
        return func(value, *args, **kwargs)


def _copy_of_memory(value: torch.Tensor, conj: bool, neg: bool) -> torch.Tensor:
    """A copy with the same strides, also where elements are one place in memory.

    Args:
        conj, neg: whether the copy is to have these bits, as eager's tensor has them.
    """
    value = value.detach().resolve_conj().resolve_neg()
    if conj or neg:
        # The same value with the bits is a view of the opposite.
        value = value.conj_physical().conj() if conj else value
        return torch._neg_view(-value) if neg else value
    if value.numel() == 0:
        return value.clone()
    return _span(value).clone().as_strided(value.shape, value.stride(), 0)


def _span(value: torch.Tensor) -> torch.Tensor:
    extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride()))
    return value.as_strided((extent,), (1,), value.storage_offset())


def _copy_memory(memory: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        memory = memory.detach()
        if memory.numel() and memory.stride() == value.stride():
            _span(memory).copy_(_span(value))
        else:
            memory.copy_(value)


def _any_tensor(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return any(map(_any_tensor, data))
    return isinstance(data, torch.Tensor)


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _owner(array: Any) -> Any:
    """The array that an array is a view of, in the end."""
    while _tree.is_array(array.base):
        array = array.base
    return array


class SharedArray:
    """An array that shares memory with a tensor of the program.

    Attributes:
        memory: what the array really lies over, during the capture.
        tensor: the tensor of the program.
        offset: in bytes, from the tensor's first element.
    """

    def __init__(self, memory: torch.Tensor, tensor: torch.Tensor, offset: int) -> None:
        self.memory = memory
        self.tensor = tensor
        self.offset = offset


class Arrays:
    """The arrays that the program was given over the memory of its tensors."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], SharedArray]] = {}

    def add(self, array: Any, memory: torch.Tensor, tensor: torch.Tensor) -> None:
        self._known[id(array)] = (weakref.ref(array), SharedArray(memory, tensor, 0))

    def alive(self) -> list[SharedArray]:
        return [shared for array, shared in self._known.values() if array() is not None]

    def tensors(self) -> list[torch.Tensor]:
        return [shared.tensor for _array, shared in self._known.values()]

    def of(self, array: Any) -> SharedArray | None:
        """The tensor that an array, or what it is a view of, came from."""
        owner = _owner(array)
        found, shared = self._known.get(id(owner), (None, None))
        if found is None or shared is None or found() is not owner:
            return None
        return SharedArray(shared.memory, shared.tensor, _address(array) - _address(owner))


_FROM_NUMPY = torch.from_numpy


# The slot itself, also while a capture has the property replaced.
_grad_of = vars(torch._C.TensorBase)["grad"].__get__
_set_grad = vars(torch._C.TensorBase)["grad"].__set__

_METHODS: dict[str, Callable[..., Any]] = {
    "item": Capture.item,
    "__array__": Capture.read,
    "__repr__": Capture.text,
    "__format__": Capture.format,
    "requires_grad_": Capture.requires_grad_,
    "__deepcopy__": Capture.deepcopy,
    "storage_offset": Capture.storage_offset,
    "_is_view": Capture.is_view,
    "apply_": Capture.refuse,
    "map_": Capture.refuse,
    "map2_": Capture.refuse,
    "untyped_storage": Capture.refuse,
    "storage": Capture.refuse,
    "share_memory_": Capture.refuse,
    "__dlpack__": Capture.refuse,
    "__reduce_ex__": Capture.refuse,
}
_PROPERTIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "data": (Capture.get_data, Capture.set_data),
    "grad": (Capture.get_grad, Capture.set_grad),
    "requires_grad": (Capture.get_requires_grad, Capture.requires_grad_),
}
_GETTERS: dict[str, Callable[..., Any]] = {"is_nested": Capture.is_nested, "_base": Capture.base}
_TENSOR = torch.tensor
# Their C++ code reads the tensors in nested lists.
_FROM_DATA = [
    (torch, "tensor"),
    (torch.Tensor, "new_tensor"),
]
_FROM_ARRAY = {
    "from_numpy": Capture.from_array,
    "as_tensor": Capture.from_array,
    "asarray": Capture.from_array,
}
_GENERATOR: dict[str, Callable[..., Any]] = {
    "manual_seed": Capture.manual_seed,
    "seed": Capture.seed,
    "initial_seed": Capture.initial_seed,
    "get_rng_state": Capture.get_rng_state,
    "set_rng_state": Capture.set_rng_state,
}
_FUSED = ("_fused_sgd_", "_fused_adam_", "_fused_adamw_", "_fused_adagrad_")
_MISSING = object()
_replaced: list[tuple[Any, str, Any]] = []


def _method(original: Any, handler: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def method(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None or not capture.owns(tensor):
            return original(tensor, *args, **kwargs)
        return handler(capture, original, tensor, *args, **kwargs)

    return method


def _hook(name: str, handler: Callable[..., Any]) -> None:
    """Like `_method`, for good, and for those too who hold the method by reference."""
    original = getattr(torch._C.TensorBase, name)

    def method(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None or not capture.owns(tensor):
            return NotImplemented
        return handler(capture, original, tensor, *args, **kwargs)

    _C.hook_method(original, method)


_hook("tolist", Capture.read)
_hook("numpy", Capture.read)
_hook("data_ptr", Capture.refuse)


def _property(original: Any, getter: Any, setter: Any) -> property:
    return property(
        _method(original.__get__, getter),
        _method(original.__set__, setter),
        _method(original.__delete__, setter),
    )


def _of_number(data: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """`torch.tensor` of a `Number`; None for other data, and for what else it may be asked for."""
    if not isinstance(data, Number) or args or kwargs.keys() - {"dtype", "device"}:
        return None
    if torch.device(kwargs.get("device") or torch.get_default_device()).type != "cpu":
        return None
    return data.tensor(kwargs.get("dtype") or torch.get_default_dtype())


def _from_data(original: Any) -> Any:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is not None:
            made = _of_number(*args, **kwargs)
            if made is not None:
                return made
            if original is _TENSOR and kwargs.get("dtype") is None:
                dtype = capture.dtype_of(kwargs.get("data", args[0] if args else None))
                kwargs = kwargs if dtype is None else {**kwargs, "dtype": dtype}
            args = tuple(capture.numbers(a) for a in args)
            kwargs = {k: capture.numbers(v) for k, v in kwargs.items()}
        return original(*args, **kwargs)

    return function


def _function(original: Any, handler: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None:
            return original(*args, **kwargs)
        return handler(capture, original, *args, **kwargs)

    return function


class _MakesGenerators(type(torch._C.Generator)):  # type: ignore[misc]
    def __call__(cls, *args: Any, **kwargs: Any) -> torch.Generator:
        capture: Capture | None = getattr(_running, "capture", None)
        if capture is None:
            return torch._C.Generator(*args, **kwargs)
        return capture.generators.make(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class _Generator(torch._C.Generator, metaclass=_MakesGenerators):
    """`torch.Generator` while a program is captured."""


def _attribute(original: Any) -> Any:
    @functools.wraps(original)
    def attribute(name: str) -> Any:
        if name != "default_generator":
            return original(name)
        capture = getattr(_running, "capture", None)
        default = _generators.DEFAULT
        return default if capture is None else capture.generators.stand_in(default)

    return attribute


def _install() -> None:
    def replace(owner: Any, name: str, new: Any) -> None:
        _replaced.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, new)

    for name, handler in _METHODS.items():
        replace(torch.Tensor, name, _method(getattr(torch.Tensor, name), handler))
    for name, (getter, setter) in _PROPERTIES.items():
        replace(torch.Tensor, name, _property(getattr(torch.Tensor, name), getter, setter))
    for name, handler in _GETTERS.items():
        getter = _method(getattr(torch.Tensor, name).__get__, handler)
        replace(torch.Tensor, name, property(getter))
    for name, handler in _GENERATOR.items():
        function = _function(getattr(torch.random, name), handler)
        replace(torch.random, name, function)
        replace(torch, name, function)
    replace(torch, "Generator", _Generator)
    replace(torch, "__getattr__", _attribute(torch.__getattr__))
    replace(torch, "default_generator", None)
    del torch.default_generator  # which leaves it to __getattr__
    replace(torch, "cond", _function(torch.cond, Capture.cond))
    replace(torch.func, "functionalize", _function(torch.func.functionalize, Capture.functionalize))
    for name in _FUSED:
        replace(torch, name, _function(getattr(torch, name), Capture.fused))
    if torch.distributed.is_available():
        for name in _collectives.FUNCTIONS:
            function = _function(getattr(torch.distributed, name), Capture.collective)
            replace(torch.distributed, name, function)
            replace(torch.distributed.distributed_c10d, name, function)
        functional = sys.modules.get("torch.distributed._functional_collectives")
        if functional is not None:
            wait = _function(functional._maybe_wrap_tensor, Capture.wait)
            replace(functional, "_maybe_wrap_tensor", wait)
        parallel = torch.nn.parallel.DistributedDataParallel
        replace(parallel, "forward", _function(parallel.forward, Capture.forward_data_parallel))
    for name in _optimizers.RADAM:
        function = _function(getattr(_radam, name), Capture.radam)
        replace(_radam, name, function)
    for cls in vars(torch.optim).values():
        if isinstance(cls, type) and "_init_group" in vars(cls):  # AdamW has Adam's
            own = vars(cls)["_init_group"]
            replace(cls, "_init_group", _function(own, Capture.init_group))
    replace(torch.optim.LBFGS, "step", _function(torch.optim.LBFGS.step, Capture.lbfgs))
    for cls in (torch.nn.Module, torch.optim.Optimizer):
        replace(cls, "zero_grad", _function(cls.zero_grad, Capture.zero_grad))
    replace(torch.autograd, "backward", _function(torch.autograd.backward, Capture.backward))
    unwrap = _function(_functorch_utils.unwrap_dead_wrappers, Capture.unwrap)
    replace(_functorch_utils, "unwrap_dead_wrappers", unwrap)
    for name, handler in _FROM_ARRAY.items():
        replace(torch, name, _function(getattr(torch, name), handler))
    for owner, name in _FROM_DATA:
        replace(owner, name, _from_data(getattr(owner, name)))


def _remove() -> None:
    while _replaced:
        owner, name, before = _replaced.pop()
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _parameters(groups: list[dict[str, Any]]) -> Iterator[torch.Tensor]:
    for group in groups:
        yield from group["params"]


class CreatesState(Exception):
    """The program creates the state of optimizers: record it with that state in its place."""

    def __init__(self, creations: list[_optimizers.Creation]) -> None:
        super().__init__()
        self.creations = creations


class SharedStorage(Exception):
    """The program writes to memory that it reads through several tensors: lift them as views."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set_deterministic(mode: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


# What a program may leave behind changed: how to read it, and how to set it.
_MODES: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_deterministic, _set_deterministic),
    (
        functools.partial(torch.is_autocast_enabled, "cpu"),
        functools.partial(torch.set_autocast_enabled, "cpu"),
    ),
    (
        functools.partial(torch.get_autocast_dtype, "cpu"),
        functools.partial(torch.set_autocast_dtype, "cpu"),
    ),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.get_num_threads, torch.set_num_threads),
)


class Recording:
    """A finished capture.

    Attributes:
        recorder: the nodes, the lifted tensors and the guards.
        result: what the program returned.
        generators: what the program was given or made.
        containers: the containers of the arguments as the program saw them.
        refilled: position in `containers` -> the container, for those the program changed.
        changes: what the program did to its state; taken back already.
        assigned: tensors as the program held them, what was assigned to their `.data`, and the
            user's tensors that they stand for.
        arrays: the arrays over the memory of tensors.
        gradients: leaves whose gradient the program read or set: the leaf, its gradient before
            the program, what it is afterwards, and whether the program saw the one before.
        replaced: ids of leaves whose gradient the program set before it called any operator.
        required: tensors whose `requires_grad` the program changed, and what it is now.
        ran_backward: whether the program called `backward()`.
        modes: (how to set it, to what), for the modes that the program left changed.
    """

    def __init__(self, capture: Capture, state: _lift.State) -> None:
        self.recorder = capture.recorder
        self._capture = capture
        self._state = state
        self.generators = capture.generators
        self.result: Any = None
        self.containers: list[Any] = []
        self.refilled: dict[int, Any] = {}
        self.changes: list[_lift.Change] = []
        self.assigned: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.arrays = Arrays()
        self.gradients: list[
            tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, bool]
        ] = []
        self.replaced: set[int] = set()
        self.required: list[tuple[torch.Tensor, bool]] = []
        self.ran_backward = False
        self.modes: list[tuple[Callable[[Any], object], Any]] = []

    def resume(self, backward: Callable[[], Any]) -> Any:
        """Record a backward after the program.

        Raises:
            UnsupportedError: a hook or a custom backward does what a graph cannot hold.
        """
        before = [_tree.parts(c) for c in self.containers]
        assigned, gradients = len(self._capture.assigned), len(self._capture.gradients)
        with torch.autocast("cpu", enabled=False):  # as eager recommends for backward()
            result = self._capture.resume(backward)
        self._capture.check_random_position()
        changed = [f"{type(c.owner).__name__} ({c.key!r})" for c in self._state.take_back()]
        for container, old in zip(self.containers, before):
            now = _tree.parts(container)
            assert now is not None and old is not None
            if now[0] != old[0] or any(a is not b for a, b in zip(now[1], old[1])):
                changed.append(type(container).__name__)
        if assigned != len(self._capture.assigned) or gradients != len(self._capture.gradients):
            changed.append("tensor (its data or gradient)")
        if changed:
            raise UnsupportedError(
                f"the backward of the program changes state, a {changed[0]} (a hook that notes "
                "what it sees, a custom autograd.Function): a replay runs no Python in the "
                "backward. Register such a hook outside of the program, on its arguments, "
                "parameters or results"
            )
        return result


def record(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: _lift.State,
    shared: list[torch.Tensor],
    verify_layouts: bool = False,
    creates: bool = False,
) -> Recording:
    """Run `fn` on twins of the tensors in `args` and `kwargs`.

    Args:
        fn: the program.
        args, kwargs: its arguments; neither they nor what they hold is changed.
        state: what the program can reach beside its arguments.
        shared: tensors to lift as views of their storage, because the program writes to it.
        verify_layouts: run each operator while it is recorded, and believe its strides instead of
            its meta kernel's.
        creates: ask for the state that the program creates for optimizers.

    Raises:
        FallbackError: an operator that the fallback config names was met.
        UnsupportedError: the program did something a graph cannot hold.
        Interrupted: a signal ended the program (see `_interrupts`).
        SharedStorage: the recording has to be repeated with these tensors in `shared`.
        CreatesState: the recording has to be repeated with the optimizers' state in its place.
        Exception: whatever the program itself raises.
    """
    _collectives.refuse_sharded(state.modules)
    recorder = _C.Recorder()
    recorder.verify_layouts = verify_layouts
    for tensor in shared:
        recorder.share_storage(tensor)

    def twin(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return capture.moving.given(capture.generators.given(leaf))
        check_plain(leaf, "an argument")
        if not recorder.is_liftable(leaf):
            raise UnsupportedError(
                f"an argument is {_C.unsupported_kind(leaf) or 'a tensor of another capture'}, "
                "which a graph cannot hold: pass dense tensors and convert outside of the program"
            )
        return capture.lift_argument(leaf)

    capture = Capture(recorder, state)
    recording = Recording(capture, state)
    (own_args, own_kwargs), recording.containers = _tree.rebuild((args, kwargs), twin)
    recording.arrays = capture.arrays
    before_program = _tree.flatten((args, kwargs)).leaves
    before_program += [value for _slot, value in state.values]
    capture.foreign = {id(_owner(v)) for v in before_program if _tree.is_array(v)}
    before = [_tree.parts(c) for c in recording.containers]
    leaves = [(t, t.grad) for t, _slots in state.tensors.values() if t.requires_grad and t.is_leaf]
    modes = [get() for get, _set in _MODES]
    state.put_numbers(lambda tensor: Number(tensor, capture))
    try:
        in_place = capture.moving.in_place_of(state), capture.generators.in_place_of(state)
        with in_place[0], in_place[1], capture:
            recording.result = _C.stoppable(fn, *own_args, **own_kwargs)
        if _C.interrupted():
            raise _C.Interrupted  # the program caught it
        capture.data_parallel.check()
    except Exception as error:
        if _C.interrupted():
            recorder.release()
            raise _C.Interrupted from None
        # What it raised, it may have raised because it read memory that it had written to
        # through another tensor.
        shared_writes = _shared_writes(recorder)
        recorder.release()
        if shared_writes:
            raise SharedStorage(shared_writes) from None
        if not isinstance(error, UnsupportedError):
            _check_refusal(recorder)
        raise
    except BaseException:
        recorder.release()
        if _C.interrupted():
            raise _C.Interrupted from None
        raise
    finally:
        drawn = capture.moving.put_back()
        recording.changes = state.take_back()
        for (get, set_mode), mode in zip(_MODES, modes):
            left = get()
            if left != mode:
                set_mode(mode)
                recording.modes.append((set_mode, left))
        moved = [(t, grad) for t, grad in leaves if t.grad is not grad]
        for tensor, grad in moved:
            tensor.grad = grad
    for user, _twin, constant, _base in recorder.lifted():
        if not constant:
            check_plain(user, "a tensor that the program uses")
    shared_writes = _shared_writes(recorder)
    if shared_writes:
        recorder.release()
        raise SharedStorage(shared_writes)
    _check_refusal(recorder)
    if drawn:
        recorder.release()
        raise _moving.drawn_from(drawn[0])
    if creates and capture.creations:
        recorder.release()
        raise CreatesState(capture.creations)
    if _keeps_nested(recorder):
        recorder.release()
        raise UnsupportedError(
            "the program returns or keeps a nested tensor, which a graph cannot hold: convert it "
            "with to_padded_tensor"
        )
    if any(recorder.describe(t).mutated for t in capture.borrowed):
        recorder.release()
        raise UnsupportedError(
            "the program writes to the memory of a numpy array through torch.from_numpy: pass a "
            "tensor instead of the array"
        )
    strays = [
        twin
        for user, twin, constant, _base in recorder.lifted()
        if not constant and id(user) not in capture.gradients
    ]
    if moved or any(t.is_leaf and t.grad is not None for t in strays):
        recorder.release()
        raise UnsupportedError(
            "backward() reaches a tensor whose history begins outside of the program, or is not "
            "called as Tensor.backward or torch.autograd.backward: detach what the program is "
            "given, or use torch.autograd.grad"
        )
    recording.gradients = [
        (t, before, recorder.twin_of(t).grad, seen)
        for t, before, seen in capture.gradients.values()
    ]
    if capture.replaced:
        count = len(recorder)
        first = next((i for i in range(count) if recorder.node_info(i)[0] != "lifted"), count)
        recording.replaced = {leaf for leaf, begin in capture.replaced.items() if begin <= first}
    recording.ran_backward = capture.ran_backward
    recording.required = [
        (t, required)
        for t in capture.required.values()
        if (required := recorder.twin_of(t).requires_grad) != t.requires_grad
    ]
    for i, (container, old) in enumerate(zip(recording.containers, before)):
        now = _tree.parts(container)
        assert now is not None and old is not None
        if now[0] != old[0] or any(a is not b for a, b in zip(now[1], old[1])):
            recording.refilled[i] = container
    recording.assigned = list(capture.assigned.values())
    try:
        capture.check_random_position()
    except UnsupportedError:
        recorder.release()
        raise
    _release_kept(recording)
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


def check_plain(tensor: torch.Tensor, what: str) -> None:
    """Raise UnsupportedError for an instance of a subclass of torch.Tensor."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise UnsupportedError(
            f"{what} is a {type(tensor).__name__}, a subclass of torch.Tensor with a behaviour of "
            "its own: use plain tensors, and wrap them outside of the program"
        )


def _check_refusal(recorder: _C.Recorder) -> None:
    """A program that catches an `UnsupportedError` has gone a way that eager does not go."""
    if recorder.refusal:
        refusal = recorder.refusal
        recorder.release()
        raise UnsupportedError(refusal)


def _shared_writes(recorder: _C.Recorder) -> list[torch.Tensor]:
    """Tensors over memory that is written to, where several share it and are no views of it."""
    lifted = recorder.lifted()
    storages: dict[tuple[str, int], list[int]] = {}
    for i, (tensor, _twin, constant, base) in enumerate(lifted):
        if not constant and base in (-1, i):
            storage = tensor.untyped_storage()
            # Two storages over one memory are one; of nothing, only the storage itself.
            key = ("memory", storage.data_ptr()) if storage.nbytes() else ("of", storage._cdata)
            storages.setdefault(key, []).append(i)
    written = [
        sharing
        for sharing in storages.values()
        if len(sharing) > 1 and any(recorder.describe(lifted[i][1]).mutated for i in sharing)
    ]
    ranges = sorted(
        (storage.data_ptr(), storage.data_ptr() + storage.nbytes(), sharing)
        for sharing in storages.values()
        if (storage := lifted[sharing[0]][0].untyped_storage()).nbytes()
    )
    in_part = any(
        begin < end and any(recorder.describe(lifted[i][1]).mutated for i in sharing + others)
        for (_begin, end, sharing), (begin, _end, others) in itertools.pairwise(ranges)
    )
    if in_part or any(lifted[i][3] == i for sharing in written for i in sharing):
        recorder.release()
        raise UnsupportedError(
            "the program writes to memory that several of its tensors share without being views of "
            "one tensor (such as two torch.from_numpy of one array): pass one of them, and derive "
            "the others inside the program"
        )
    return [lifted[i][0] for sharing in written for i in sharing]


def _release_kept(recording: Recording) -> None:
    """Give data to the tensors that the program keeps where a replay cannot follow.

    A constant (`functools.lru_cache` over `torch.arange`) becomes what eager would have kept. A
    tensor that depends on the inputs would be stale after the next replay: refused.
    """
    recorder = recording.recorder
    expected: dict[int, torch.Tensor] = {}  # held, so that no id is given to another object
    roots = [recording.result, recording.containers]
    roots += [c.value for c in recording.changes] + [t for pair in recording.assigned for t in pair]
    roots.append(recording.arrays.tensors())
    roots += [grad for _tensor, _before, grad, _seen in recording.gradients]
    _reach(roots, expected)
    for user, twin, _constant, _base in recorder.lifted():
        expected[id(user)] = user
        expected[id(twin)] = twin
    stale = []
    alive = recorder.alive()
    while alive:
        tensor = alive.pop()
        if id(tensor) in expected or not _C.is_capture_tensor(tensor):
            continue
        about = recorder.describe(tensor)
        references = sys.getrefcount(tensor) - 2  # its own and ours
        if not references or not about.captured:
            continue
        if recorder.depends_on_input(about.value):
            if _is_held(tensor, references):
                stale.append(tensor)
        else:
            value = recorder.materialize(tensor, guard=False).clone()
            torch._C._swap_tensor_impl(tensor, value)
    if stale:
        # What a custom autograd.Function keeps in its context is for the backward.
        contexts: dict[int, torch.Tensor] = {}
        _reach(_contexts(list(expected.values())), contexts)
        stale = [t for t in stale if id(t) not in contexts]
    if stale:
        name, _metas, where = recorder.node_info(recorder.describe(stale[0]).value.node)
        raise UnsupportedError(
            f"the program keeps the result of {name} (at {where}) in a place outside of its "
            "results, attributes and closures, which a replay cannot bring up to date: return it, "
            "or keep it in an attribute of the module"
        )


def _keeps_nested(recorder: _C.Recorder) -> bool:
    nested = recorder.nested_tensors()
    while nested:
        tensor = nested.pop()
        references = sys.getrefcount(tensor) - 2  # its own and ours
        if _is_held(tensor, references):
            return True
    return False


def _is_held(tensor: torch.Tensor, references: int) -> bool:
    """Whether Python certainly holds a tensor that has so many references beside the asker's.

    The asker counts, for a call of this has one more where TorchDynamo evaluates frames.
    """
    # PyTorch itself may hold a tensor (a view holds its base), and with it the Python object.
    shared: bool = tensor._use_count() > 1  # type: ignore[attr-defined] # not in PyTorch's stub
    return references - shared > 0


def _contexts(tensors: list[torch.Tensor]) -> list[Any]:
    """What the custom functions in the history of these tensors keep in attributes."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in tensors if t.requires_grad]
    held = []
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        stack.extend(following for following, _k in function.next_functions)
        if isinstance(function, torch.autograd.function.FunctionCtx):
            held.append(list(vars(function).values()))
    return held


def _reach(values: list[Any], tensors: dict[int, torch.Tensor]) -> None:
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, Number):
            value = value.node.number
        if isinstance(value, torch.Tensor):
            tensors[id(value)] = value
            if value._is_view():
                # A view keeps its base alive, with its Python object.
                base = value._base
                assert base is not None
                tensors[id(base)] = base
            continue
        taken = _tree.parts(value)
        if taken is not None and id(value) not in seen:
            seen.add(id(value))
            stack.extend(taken[1])
