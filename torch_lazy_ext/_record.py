"""Record: run the program once on its capture tensors.

Operators are recorded by the extension, below Python. This module adds what never reaches an
operator: reading a tensor's data from Python (`tolist`, `numpy`, printing), assignments to
`tensor.data`, and what the program does to its arguments' containers and to its own state, which
is noted and taken back.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import itertools
import math
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import radam as _radam

from torch_lazy_ext import (
    _C,
    _autograd,
    _code,
    _collectives,
    _escapes,
    _generators,
    _higher_order,
    _lift,
    _moving,
    _optimizers,
    _private,
    _tree,
)
from torch_lazy_ext._errors import FallbackError, UnsupportedError
from torch_lazy_ext._number import QUESTIONS, Number, ask

_C.set_unsupported_error(UnsupportedError)
_C.claim_dispatch_key()
_private.check(_private.ENTRIES)
if torch.distributed.is_available():
    _private.check(_private.DISTRIBUTED)


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
        replaced: id of a leaf -> how many nodes there were when the program set its gradient, which
            it had not seen.
        ran_backward: whether the program called `backward()`.
        autograd: what autograd keeps of tensors.
        generators: the generators that the program was given or made.
        variables: the names of environment variables that were asked for, as the system has them.
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
        self.ran_backward = False
        self.replaced: dict[int, int] = {}
        self._arguments: dict[int, torch.Tensor] = {}  # id of a twin -> the argument
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []  # a twin, the argument
        # No methods of this: what holds them would be in a cycle with it.
        self.refusal = functools.partial(_refusal, recorder)
        self._user = functools.partial(_user_of, self._arguments)
        self.adopt = functools.partial(_adopt, recorder, self.gradients, self.refusal)
        self.autograd = _autograd.Autograd(recorder, state, self._user, self.refusal)
        self._saved_hooks: list[Any] = []  # of the caller, for saved tensors
        self.data_parallel = _collectives.DataParallel(self.adopt)
        self._rng_states: list[tuple[torch.Tensor, int]] = []  # handed out, numbers drawn so far
        self._furthest = 0  # how many were drawn before the state was put back
        self.generators = _generators.Generators(recorder)
        self.variables: set[bytes] = set()
        self._resumed = False
        self.moving = _moving.Moving(self.refusal, _ASKED)
        self.arrays = Arrays()
        self.unseen: list[str] = []  # lines that use its tensors where nothing is recorded
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
        self._resumed = self.autograd.resumed = True
        try:
            return self.recorder.resumed(fn)
        finally:
            self._resumed = self.autograd.resumed = False
            self._end()

    def _begin(self) -> None:
        with Capture._lock:
            if Capture._count == 0:
                _install()
            Capture._count += 1
        # A replay saves tensors under these, and the capture saves none.
        while (hooks := _autograd.top_saved_hooks()) is not None:
            self._saved_hooks.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
        _running.capture = self

    def _end(self) -> None:
        _running.capture = None
        while self._saved_hooks:
            torch._C._autograd._push_saved_tensors_default_hooks(*self._saved_hooks.pop())
        with Capture._lock:
            Capture._count -= 1
            if Capture._count == 0:
                _remove()

    def owns(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and (
            _C.is_capture_tensor(tensor) or self.recorder.is_liftable(tensor)
        )

    def lift_argument(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin of an argument: the program is given no other tensor."""
        twin = self.recorder.lift(tensor)
        if isinstance(tensor, torch.nn.Parameter):
            twin.__class__ = torch.nn.Parameter
        if tensor.__dict__:
            twin.__dict__.update(tensor.__dict__)
        self._arguments[id(twin)] = tensor
        self.given.append((twin, tensor))
        return twin

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
        with self._state.unlocked(data):
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
                    f"memory of a tensor (at {_moving.user_line()}): use Tensor.view(dtype)"
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

    def classify(self, func: Any, value: Any) -> bool:
        if isinstance(value, torch.Tensor) and self.owns(value) and value.numel() == 1:
            value = value.item()
        answer: bool = ask(value, func.__name__) if isinstance(value, Number) else func(value)
        return answer

    def start_thread(self, func: Any, thread: threading.Thread) -> None:
        run, unseen = thread.run, self.unseen  # the thread may outlive the capture

        def watched() -> None:
            vars(thread).pop("run", None)
            try:
                run()
            except Exception as error:
                if _is_unseen(error):
                    unseen.append(_moving.line_of(error))
                raise

        thread.run = watched  # type: ignore[method-assign]
        func(thread)

    def text(self, func: Any, tensor: torch.Tensor, **kwargs: Any) -> str:
        if kwargs or tensor.grad_fn is None:
            text: str = self.read(func, tensor, **kwargs)
            return text
        user = self._user(tensor)
        if user is not None and not _autograd.is_leaf(user):
            raise self.refusal(
                f"the program makes a text (at {_moving.user_line()}) of a tensor that it is given "
                "with a history, which says where the tensor comes from, and each call may have "
                "one from elsewhere: use the text of `detach()`"
            )
        # The text of the value, and as PyTorch would add it, where the tensor comes from.
        text = self.read(func, tensor.detach())
        name = _C.name_in_eager(tensor) or type(tensor.grad_fn).__name__
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
        if not isinstance(data, (list, tuple)) or not _any_tensor(data, Number):
            return data  # sizes stay sizes: `x.new(torch.Size([2]))`
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

        dtype: torch.dtype = self._standalone(lambda: _TENSOR(_alike(data)).dtype)
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
            f"torch.optim.LBFGS (at {_moving.user_line()}) decides by the values of loss and "
            "gradients how often it calls its closure: extract what the closure calls, and leave "
            "the optimizer outside"
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

    def apply(self, func: Any, function: type, *args: Any, **kwargs: Any) -> Any:
        # No operator: a custom autograd.Function would get the user's own tensors. Transforms of
        # functorch have operators above all twins, and come here once more, below them.
        if torch._C._are_functorch_transforms_active():
            return NotImplemented
        twins = [self.recorder.twin_of(a) if self.owns(a) else a for a in args]
        named = {key: self.recorder.twin_of(a) if self.owns(a) else a for key, a in kwargs.items()}
        if all(a is b for a, b in zip((*args, *kwargs.values()), (*twins, *named.values()))):
            return NotImplemented  # the second time
        return func.__get__(None, function)(*twins, **named)

    def variable(self, func: Any, name: Any) -> bytes:
        encoded: bytes = func(name)
        self.variables.add(encoded)
        return encoded

    def manual_seed(self, func: Any, seed: Any) -> torch.Generator:
        return self.generators.stand_in(_generators.DEFAULT).manual_seed(int(seed))

    def initial_seed(self, func: Any) -> int:
        return self.generators.initial_seed(_generators.DEFAULT)

    def seed(self, func: Any) -> int:
        raise _generators.unrepeatable("torch.seed")

    def higher_order(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return _higher_order.dispatch(func, *args, **kwargs)

    def uncompiled(self, func: Any, callback: Any) -> Any:
        return _higher_order.uncompiled(func, callback)

    def compile(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if _higher_order.dynamo() is None:
            self._standalone(importlib.import_module, "torch._dynamo.eval_frame")
            with Capture._lock:
                _replace_dynamo()
        return func(*args, **kwargs)

    def functionalize(self, func: Any, function: Any, *, remove: str = "mutations") -> Any:
        return function  # a capture is functional, and gives the same results

    def get_data(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        # The getter itself: memory shared, a version counter of its own.
        data: torch.Tensor = func(self.recorder.twin_of(tensor))
        return data

    def set_data(self, func: Any, tensor: torch.Tensor, value: torch.Tensor) -> None:
        twin = self.recorder.twin_of(tensor)
        new = self.recorder.twin_of(value)
        own = self._user(tensor)
        changed = twin if own is None else own
        is_view = torch._C.TensorBase._is_view
        if torch.is_inference_mode_enabled() and is_view(changed) and not changed.is_inference():
            raise self.refusal(
                f"an assignment to `.data` (at {_moving.user_line()}) changes in inference mode "
                "what is a view of a tensor that was made outside: assign outside of the mode, or "
                "to a clone"
            )
        if own is None and is_view(twin) and not _autograd.is_leaf(twin):
            raise self.refusal(
                f"an assignment to `.data` (at {_moving.user_line()}) changes a view that has a "
                "history: it goes on to be a view of one tensor, in the memory of another. Assign "
                "to a clone"
            )
        layout = (new.shape, new.dtype, new.stride())
        if layout != (twin.shape, twin.dtype, twin.stride()) and not _C.is_capture_tensor(tensor):
            raise self.refusal(
                f"an assignment to `.data` (at {_moving.user_line()}) changes a tensor of shape "
                f"{tuple(twin.shape)} and type {twin.dtype} to {tuple(new.shape)} and {new.dtype} "
                "during the capture: convert the module before the capture"
            )
        old_about, new_about = self.recorder.describe(twin), self.recorder.describe(new)
        if old_about.storage == new_about.storage and old_about.value == new_about.value:
            return  # what `module.to()` does to a module that is there already
        if twin.requires_grad and twin.is_leaf:
            self.autograd.former.append(twin)
        new = new.detach()
        new.requires_grad_(twin.requires_grad and twin.is_leaf)
        if id(tensor) in self.gradients:
            new.grad = twin.grad
        self.recorder.assign_data(tensor, new)
        if _C.is_capture_tensor(tensor) and layout != (tensor.shape, tensor.dtype, tensor.stride()):
            func(tensor, new.detach())  # the program holds the twin: that one can change
        user = self._user(tensor)
        self.assigned[id(tensor)] = (tensor, new, tensor if user is None else user)

    # The gradient of a lifted leaf is that of its twin, where autograd accumulates it.

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
        if leaf is not None and id(leaf) in self.autograd.retained:
            return func(self.recorder.twin_of(leaf))
        if leaf is None or not _autograd.is_leaf(leaf):
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
        if leaf is None or not _autograd.is_leaf(leaf):
            return func(tensor, *value)
        if id(leaf) not in self.gradients:
            self.replaced[id(leaf)] = len(self.recorder)
        twin = self.adopt(leaf, seen=False)
        return func(twin, *value)

    def run_backward(self, func: Any, *args: Any, accumulate_grad: bool, **kwargs: Any) -> Any:
        kwargs = dict(zip(_autograd.ENGINE, args, strict=False)) | kwargs
        kwargs["allow"] = kwargs.pop("allow_unreachable", kwargs.get("allow"))
        self.ran_backward = self.ran_backward or (accumulate_grad and not self._resumed)
        result = self.autograd.run_backward(
            self.adopt, func, accumulate_grad=accumulate_grad, **kwargs
        )
        if accumulate_grad and not self._resumed:
            self._collect_gradients()
        return result

    def will_execute(self, func: Any, node: Any) -> bool:
        answer: bool = func(self.autograd.node_of_twin(node))
        return answer

    def is_checkpoint_valid(self, func: Any) -> bool:
        # After the program its results are differentiated as by a backward without inputs.
        self.autograd.checkpoints = self.autograd.checkpoints or self._resumed
        return self._resumed or func()

    def _collect_gradients(self) -> None:
        """What a custom autograd.Function, which sees no twins, left in the user's own leaves."""
        for tensor, before, _seen in self.gradients.values():
            grad = _autograd.grad_of(tensor)
            if grad is not before:
                _autograd.set_grad(tensor, before)
                twin = self.recorder.twin_of(tensor)
                if grad is not None:
                    known = _autograd.grad_of(twin)
                    twin.grad = grad if known is None else known + grad

    def is_nested(self, func: Any, tensor: torch.Tensor) -> bool:
        return self.recorder.is_nested(tensor)

    def get_requires_grad(self, func: Any, tensor: torch.Tensor) -> Any:
        return func(self.autograd.twin_of(tensor))

    def requires_grad_(self, func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        user = self._user(tensor)
        if user is None:
            result = func(tensor, *args, **kwargs)
            if _C.is_capture_tensor(tensor):
                self.recorder.note_leaf(tensor, tensor)
            return result
        twin = self.recorder.twin_of(user)
        wanted = bool(args[0] if args else kwargs.get("requires_grad", True))
        if twin.requires_grad != wanted:
            func(twin, *args, **kwargs)
            self.recorder.note_leaf(twin, user)
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
                "the program reads `_base` of a tensor that it was given (at "
                f"{_moving.user_line()}): pass the base itself"
            )
        return base

    def deepcopy(self, func: Any, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if id(tensor) not in memo:
            twin = self.recorder.twin_of(tensor)
            if not twin.is_leaf:
                self.autograd.reads_leaf = True
                func(tensor, memo)  # which raises
            if twin.storage_offset() or not _is_dense(twin):
                raise self.refusal(
                    f"the program makes a deep copy (at {_moving.user_line()}) of a tensor that "
                    "shows a part of its memory, or one place of it several times, which copies "
                    "all of that: clone it instead"
                )
            copy = twin.detach().clone()
            memo[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        copied: torch.Tensor = memo[id(tensor)]
        return copied

    def copy(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        # A new leaf over the same memory, with a version counter of its own.
        twin = self.recorder.twin_of(tensor)
        if torch.is_inference_mode_enabled() and not twin.is_inference():
            raise self.refusal(
                f"the program copies (at {_moving.user_line()}) a tensor that was not made in "
                "inference mode in that mode (copy.copy): use clone() or detach(), or copy it "
                "outside of the mode"
            )
        made: torch.Tensor = vars(torch._C.TensorBase)["data"].__get__(twin)
        if isinstance(tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(made, tensor.requires_grad)
        else:
            made.requires_grad_(tensor.requires_grad)
        made.__dict__.update(tensor.__dict__)
        return made

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
            f"the program wants the memory of a tensor (torch.Tensor.{func.__name__}, at "
            f"{_moving.user_line()}), and there is none while it is captured: compute with "
            "tensors, or read values with tolist() or numpy()"
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


def _is_dense(value: torch.Tensor) -> bool:
    """Whether its elements lie side by side, each in a place of its own."""
    dims = [(n, s) for n, s in zip(value.shape, value.stride()) if n != 1]
    extent = 1 + sum((n - 1) * s for n, s in dims)
    return value.numel() == 0 or (extent == value.numel() and all(s for _n, s in dims))


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


def _any_tensor(data: Any, *others: type) -> bool:
    """Whether there is a tensor, or one of `others`, in nested lists."""
    if isinstance(data, (list, tuple)):
        return any(_any_tensor(v, *others) for v in data)
    return isinstance(data, (torch.Tensor, *others))


def _alike(data: Any) -> Any:
    """Nested lists with real tensors of zeros in the place of tensors, and floats of numbers."""
    if isinstance(data, (list, tuple)):
        return [_alike(v) for v in data]
    if isinstance(data, torch.Tensor):
        return torch.zeros(data.shape, dtype=data.dtype)
    return 0.0 if isinstance(data, Number) else data


def _rebuilt(tensor: torch.Tensor) -> Any:
    """What `copy.copy` makes of a tensor that no capture knows."""
    rebuild, args = tensor.__reduce_ex__(4)[:2]
    return rebuild(*args)


def _any_tensor_in_list(data: Any) -> bool:
    return not isinstance(data, torch.Tensor) and _any_tensor(data)


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _owner(array: Any) -> Any:
    """The array that an array is a view of, in the end."""
    while _tree.is_array(array.base):
        array = array.base
    return array


def _refusal(recorder: _C.Recorder, message: str) -> UnsupportedError:
    """The error to raise; the capture fails with it also when the program catches it."""
    recorder.refusal = message
    return UnsupportedError(message)


def _is_unseen(error: BaseException) -> bool:
    """Whether it is raised where a tensor of a capture has no memory, and nothing is recorded."""
    return "Tensor that doesn't have storage" in str(error)


def _unseen(line: str) -> str:
    return (
        f"the program uses a tensor in another thread, or in an extension's own code (at {line}), "
        "where its operators are not recorded: compute in the thread that calls the program, or "
        "register the extension's function with torch.library"
    )


def _user_of(arguments: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that existed before the program; None for one that the program made.

    Args:
        arguments: id of a twin -> the argument.
    """
    return arguments.get(id(tensor)) if _C.is_capture_tensor(tensor) else tensor


def _adopt(
    recorder: _C.Recorder,
    gradients: dict[int, tuple[torch.Tensor, torch.Tensor | None, bool]],
    refusal: Callable[[str], UnsupportedError],
    tensor: torch.Tensor,
    seen: bool = True,
) -> torch.Tensor:
    """The twin of a leaf, with the gradient that the leaf has, which is noted in `gradients`."""
    twin = recorder.twin_of(tensor)
    if id(tensor) not in gradients:
        grad = _autograd.grad_of(tensor)
        gradients[id(tensor)] = (tensor, grad, seen)
        if grad is not None and seen:
            if not recorder.is_liftable(grad):
                raise refusal(
                    f"the program uses a gradient that is {_C.unsupported_kind(grad)} (at "
                    f"{_moving.user_line()}), which a graph cannot hold: set it to None, or make "
                    "it dense, before the call"
                )
            twin.grad = recorder.twin_of(grad)
    return twin


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

    def alive_arrays(self) -> list[Any]:
        """The arrays themselves, those that are alive."""
        found = (array() for array, _shared in self._known.values())
        return [array for array in found if array is not None]

    def of(self, array: Any) -> SharedArray | None:
        """The tensor that an array, or what it is a view of, came from."""
        owner = _owner(array)
        found, shared = self._known.get(id(owner), (None, None))
        if found is None or shared is None or found() is not owner:
            return None
        return SharedArray(shared.memory, shared.tensor, _address(array) - _address(owner))


_FROM_NUMPY = torch.from_numpy


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


def _of_autograd(answer: Callable[..., Any]) -> Callable[..., Any]:
    def handler(capture: Capture, original: Any, *args: Any, **kwargs: Any) -> Any:
        return answer(capture.autograd, original, *args, **kwargs)

    return handler


_METHODS.update((name, _of_autograd(answer)) for name, answer in _autograd.METHODS.items())
_GETTERS.update((name, _of_autograd(answer)) for name, answer in _autograd.GETTERS.items())
_PROPERTIES.update(
    (name, (_of_autograd(getter), _of_autograd(setter)))
    for name, (getter, setter) in _autograd.PROPERTIES.items()
)
_TENSOR = torch.tensor
# Their C++ code reads the tensors in nested lists.
_FROM_DATA = [
    (torch, "tensor"),
    (torch.Tensor, "new_tensor"),
    (torch.Tensor, "new"),
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


# What is put in the place of a function: the same at each capture, for as long as the function is.
_kept = functools.lru_cache(maxsize=1024)


@_kept
def _method(original: Any, handler: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def method(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None or not capture.owns(tensor):
            return original(tensor, *args, **kwargs)
        return handler(capture, original, tensor, *args, **kwargs)

    return method


def _hook(owner: type, name: str, handler: Callable[..., Any]) -> None:
    """Like `_method`, for good, and for those too who hold the method by reference."""
    original = vars(owner)[name]

    def method(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None or not (isinstance(tensor, type) or capture.owns(tensor)):
            return NotImplemented
        return handler(capture, original, tensor, *args, **kwargs)

    try:
        _C.hook_method(original, method)
    except RuntimeError as e:
        raise _private.changed(f"{owner.__name__}.{name} has {e}", "it is replaced") from e


_hook(torch._C.TensorBase, "tolist", Capture.read)
_hook(torch._C.TensorBase, "numpy", Capture.read)
_hook(torch._C.TensorBase, "data_ptr", Capture.refuse)
_hook(torch._C._FunctionBase, "apply", Capture.apply)


def _hook_legacy_constructors() -> None:
    """`torch.LongTensor([t, 3])`, `torch.Tensor([t])`: C++ code reads the tensors in lists."""

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None or not any(map(_any_tensor_in_list, args)):
            return NotImplemented
        return cls(*map(capture.numbers, args), **kwargs)

    for metaclass in (type(torch.Tensor), type(torch.LongTensor)):
        _C.hook_calls(metaclass, call)


_hook_legacy_constructors()


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


@_kept
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


@_kept
def _function(original: Any, handler: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None:
            return original(*args, **kwargs)
        return handler(capture, original, *args, **kwargs)

    return function


def _asked(original: Any, what: str) -> Any:
    """Instead of a function that gives something else at each call."""

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        capture = getattr(_running, "capture", None)
        if capture is None:
            return original(*args, **kwargs)
        return capture.moving.call(what, original, *args, **kwargs)

    return function


# Where it stands, under what name, and what stands in its place.
_MOVING: list[tuple[Any, str, Any, Any]] = [
    (owner, name, vars(owner)[name], _asked(vars(owner)[name], what))
    for owner, name, what in _moving.functions()
] + [(owner, name, vars(owner)[name], new) for owner, name, new in _moving.clocks(_asked)]
# Functions of Python's that look at a number.
_LOOKING = [
    (math, name, getattr(math, name), _function(getattr(math, name), Capture.classify))
    for name in QUESTIONS
]
# Also where the program's state holds them.
_ASKED = {id(original): (original, new) for _owner, _name, original, new in (*_MOVING, *_LOOKING)}


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


@_kept
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
    replace(torch.Tensor, "__copy__", _method(_rebuilt, Capture.copy))
    for name, (getter, setter) in _PROPERTIES.items():
        replace(torch.Tensor, name, _property(getattr(torch.Tensor, name), getter, setter))
    for name, handler in _GETTERS.items():
        getter = _method(getattr(torch.Tensor, name).__get__, handler)
        replace(torch.Tensor, name, property(getter))
    for name, handler in _GENERATOR.items():
        function = _function(getattr(torch.random, name), handler)
        replace(torch.random, name, function)
        replace(torch, name, function)
    started = _function(threading.Thread.start, Capture.start_thread)
    replace(threading.Thread, "start", started)
    for module, name, _original, new in _LOOKING:
        replace(module, name, new)
    for owner, name, original, new in _MOVING:
        # A function of C's is no method where a class holds it, and one of Python's would be.
        held = isinstance(owner, type) and isinstance(original, types.BuiltinFunctionType)
        replace(owner, name, staticmethod(new) if held else new)
    for environment in _lift.ENVIRONMENTS:
        replace(environment, "encodekey", _function(environment.encodekey, Capture.variable))
    replace(torch, "Generator", _Generator)
    replace(torch, "__getattr__", _attribute(torch.__getattr__))
    replace(torch, "default_generator", None)
    del torch.default_generator  # which leaves it to __getattr__
    operator = torch._ops.HigherOrderOperator
    replace(operator, "dispatch", _function(operator.dispatch, Capture.higher_order))
    replace(torch, "compile", _function(torch.compile, Capture.compile))
    _replace_dynamo()
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
            _private.check_once(_private.FUNCTIONAL_COLLECTIVES)
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
    engine = _function(torch.autograd.graph._engine_run_backward, Capture.run_backward)
    replace(torch.autograd, "_engine_run_backward", engine)
    replace(torch.autograd.graph, "_engine_run_backward", engine)
    executes = _function(torch._C._will_engine_execute_node, Capture.will_execute)
    replace(torch._C, "_will_engine_execute_node", executes)
    valid = _function(torch.autograd._is_checkpoint_valid, Capture.is_checkpoint_valid)
    replace(torch.autograd, "_is_checkpoint_valid", valid)
    for name, handler in _FROM_ARRAY.items():
        replace(torch, name, _function(getattr(torch, name), handler))
    for owner, name in _FROM_DATA:
        replace(owner, name, _from_data(getattr(owner, name)))
    _C.set_stand_ins(
        {
            vars(owner)[name]: None if before is _MISSING else before
            for owner, name, before in _replaced
            if name in vars(owner)
        }
    )


def _replace_dynamo() -> None:
    """TorchDynamo is imported when something is compiled for the first time."""
    frames = _higher_order.dynamo()
    if frames is not None:
        _private.check_once(_private.DYNAMO)
    if frames is not None and not any(owner is frames for owner, _name, _before in _replaced):
        original = frames._callback_from_stance
        _replaced.append((frames, "_callback_from_stance", original))
        frames._callback_from_stance = _function(original, Capture.uncompiled)


def _remove() -> None:
    _C.set_stand_ins({})
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
        moving: what moves, and was there before the program.
        containers: the containers of the arguments as the program saw them.
        refilled: position in `containers` -> the container, for those the program changed.
        changes: what the program did to its state; taken back already.
        written: the same, with what it did to attributes of tensors.
        ran_backward_code: the code that ran in the last backward that was recorded after the
            program; None where that is PyTorch's own.
        assigned: tensors as the program held them, what was assigned to their `.data`, and the
            user's tensors that they stand for.
        arrays: the arrays over the memory of tensors.
        gradients: leaves whose gradient the program read or set: the leaf, its gradient before
            the program, what it is afterwards, and whether the program saw the one before.
        replaced: ids of leaves whose gradient the program set before it called any operator.
        required: tensors whose `requires_grad` the program changed, and what it is now.
        autograd: the hooks of tensors, and whether the program ran a backward.
        hooks: what the program left on tensors: the tensor, the method, and the hook.
        retained: tensors whose gradient the program retains.
        ran_backward: whether the program called `backward()`.
        modes: (how to set it, to what), for the modes that the program left changed.
        made: the Python objects that were made since the program began.
        attributes: (tensor of the user's, name, value or MISSING): what the program set.
        ran: the code that ran.
    """

    ran: _code.Ran

    def __init__(self, capture: Capture, state: _lift.State) -> None:
        self.recorder = capture.recorder
        self._capture = capture
        self._state = state
        self.generators = capture.generators
        self.moving = capture.moving
        self.result: Any = None
        self.containers: list[Any] = []
        self.refilled: dict[int, Any] = {}
        self.changes: list[_lift.Change] = []
        self.written: list[_lift.Change] = []
        self.ran_backward_code: _code.Ran | None = None
        self.assigned: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.arrays = Arrays()
        self.gradients: list[
            tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, bool]
        ] = []
        self.replaced: set[int] = set()
        self.required: list[tuple[torch.Tensor, bool]] = []
        self.autograd = capture.autograd
        self.hooks: list[tuple[torch.Tensor, str, Any]] = []
        self.retained: list[torch.Tensor] = []
        self.ran_backward = False
        self.modes: list[tuple[Callable[[Any], object], Any]] = []
        self.made = _escapes.Made(frozenset())
        self.attributes: list[tuple[torch.Tensor, str, Any]] = []

    def resume(self, backward: Callable[[], Any]) -> Any:
        """Record a backward after the program, which finds all as the program has left it.

        Raises:
            UnsupportedError: a hook or a custom backward does what a graph cannot hold.
        """
        before = [_tree.parts(c) for c in self.containers]
        assigned, gradients = len(self._capture.assigned), len(self._capture.gradients)
        noted = _code.note(self._state.enter)

        def run() -> tuple[Any, list[_lift.Change]]:
            with self._state.after(self.written) as changes:
                try:
                    # As eager recommends for backward().
                    with torch.autocast("cpu", enabled=False), self.moving.in_place_of(self._state):
                        noted.start()
                        try:
                            result = self._capture.resume(backward)
                        finally:
                            noted.stop()
                finally:
                    drawn.extend(self.moving.put_back())
            return result, changes

        drawn: list[Any] = []
        result, changes = contextvars.copy_context().run(run)
        self.ran_backward_code = None
        # Hooks and custom functions. PyTorch's own way to the engine reads nothing of the program.
        if not all(_code.Entry(*e).library for e in noted.entries):
            self.ran = _code.Ran(noted, self._capture.variables, self.ran.entries)
            self.ran_backward_code = _code.Ran(noted, self._capture.variables)
        if drawn:
            raise _moving.drawn_from(drawn[0])
        self._capture.check_random_position()
        changed = [
            type(c.owner).__name__ + ("" if c.key is _lift.CONTENT else f" ({c.key!r})")
            for c in changes
        ]
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
        Interrupted: a signal has ended the program (see `_interrupts`).
        SharedStorage: the recording has to be repeated with these tensors in `shared`.
        CreatesState: the recording has to be repeated with the optimizers' state in its place.
        Exception: whatever the program itself raises.
    """
    with _escapes.rest, _escapes.Since() as since:
        recording = _record(fn, args, kwargs, state, shared, verify_layouts, creates)
        recorder = recording.recorder
        try:
            recording.made = since.made()
            with recording.ran.loosely(recording.made):
                _escapes.settle(recording, since)
        except UnsupportedError:
            recorder.release()
            raise
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


def _record(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: _lift.State,
    shared: list[torch.Tensor],
    verify_layouts: bool,
    creates: bool,
) -> Recording:
    """`record`, but for what is still held when the program has ended."""
    _collectives.refuse_sharded(state.modules)
    recorder = _C.Recorder()
    recorder.verify_layouts = verify_layouts
    for tensor in shared:
        recorder.share_storage(tensor)

    def twin(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return capture.moving.given(capture.generators.given(leaf))
        check_plain(leaf, "an argument")
        # Meta tensors of functionalization are its own; one that is an argument has operators, too.
        if not recorder.is_liftable(leaf) and not leaf.is_meta:
            raise UnsupportedError(
                f"an argument is {_C.unsupported_kind(leaf) or 'a tensor of another capture'}, "
                "which a graph cannot hold: pass dense tensors and convert outside of the program"
            )
        return capture.lift_argument(leaf)

    capture = Capture(recorder, state)
    recording = Recording(capture, state)
    # What is part of the program's state as well is the same object in both places.
    (own_args, own_kwargs), recording.containers = _tree.rebuild((args, kwargs), twin, state.knows)
    recording.arrays = capture.arrays
    before_program = _tree.flatten((args, kwargs)).leaves
    before_program += [value for _slot, value in state.values]
    capture.foreign = {id(_owner(v)) for v in before_program if _tree.is_array(v)}
    before = [_tree.parts(c) for c in recording.containers]
    leaves = [(t, t.grad) for t, _slots in state.tensors.values() if t.requires_grad and t.is_leaf]
    capture.autograd.watch(t for t, _slots in state.tensors.values())
    capture.autograd.watch(t for t in before_program if isinstance(t, torch.Tensor))
    modes = [get() for get, _set in _MODES]
    state.put_numbers(lambda tensor: Number(tensor, capture))
    noted = _code.note(state.enter)
    # What the program sets of ContextVars stays in a context of its own.
    context = contextvars.copy_context()
    variables = dict(context)
    try:
        in_place = capture.moving.in_place_of(state), capture.generators.in_place_of(state)
        with in_place[0], in_place[1], capture:
            noted.start()
            try:
                recording.result = _C.stoppable(context.run, fn, *own_args, **own_kwargs)
            finally:
                undisturbed = noted.stop()
        if not undisturbed:
            raise UnsupportedError(
                "the program puts another evaluator of frames, or a profile function, in place, "
                "which hides from the capture what it reads: do that outside of the program"
            )
        capture.data_parallel.check()
    except Exception as error:
        # What it raised, it may have raised because it read memory that it had written to
        # through another tensor.
        shared_writes = _shared_writes(recorder)
        recorder.release()
        if shared_writes:
            raise SharedStorage(shared_writes) from None
        misused = isinstance(error, TypeError) or _moving.Moment.__name__ in str(error)
        if misused and capture.moving.clock:
            recorder.refusal = capture.moving.clock
        if isinstance(error, ValueError) and "read-only" in str(error) and state.locks_arrays:
            recorder.refusal = _written_array("", _moving.line_of(error))
        if _is_unseen(error):
            capture.unseen.append(_moving.line_of(error))
        if capture.unseen:
            capture.refusal(_unseen(capture.unseen[0]))
        if not isinstance(error, UnsupportedError):
            _check_refusal(recorder)
        raise
    except BaseException:
        recorder.release()
        raise
    finally:
        drawn = capture.moving.put_back()
        arrays = state.put_arrays_back()
        recording.written = recording.changes = state.take_back()
        recording.attributes = _attributes_set(capture, state, recording)
        capture.autograd.restore()
        of_variables = [
            _lift.Change(variable, None, value)
            for variable, value in context.items()
            if variables.get(variable, _MISSING) is not value
        ]
        recording.changes = recording.changes + of_variables
        recording.written = recording.written + of_variables
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
    if capture.unseen:
        capture.refusal(_unseen(capture.unseen[0]))
    _check_refusal(recorder)
    recording.ran = _code.Ran(noted, capture.variables)
    del noted, context, variables
    if drawn:
        recorder.release()
        raise _moving.drawn_from(drawn[0])
    if arrays:
        recorder.release()
        name = arrays[0].rpartition(".")[2]
        codes = [e.code for e in recording.ran.entries if not e.library]
        raise UnsupportedError(_written_array(name, _code.line_of(codes, name) if name else ""))
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
    twins = {id(twin) for _user, twin, _constant, _base in recorder.lifted()}
    strays = [
        twin
        for user, twin, constant, _base in recorder.lifted()
        if not constant and id(user) not in capture.gradients
    ]
    strays += [s for s in recorder.sources() if s is not None and id(s) not in twins]
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
    for t, _twin, constant, _base in recorder.lifted():
        if not constant and not t.is_leaf:
            seen_now = recorder.twin_of(t)
            if seen_now.is_leaf and seen_now.requires_grad:
                raise UnsupportedError(
                    "the program detaches a tensor that it is given from its history, and lets it "
                    "require grad again (Tensor.detach_): use detach(), which gives another tensor"
                )
    recording.required = [
        (t, required)
        for t, twin, constant, _base in recorder.lifted()
        if not constant
        and (required := recorder.twin_of(t).requires_grad) != t.requires_grad
        and (twin.is_leaf or not required)
    ]
    recording.retained = list(capture.autograd.retained.values())
    recording.gradients += [
        (t, None, twin_now.grad, False)
        for t in recording.retained
        if (twin_now := recorder.twin_of(t)).grad is not None
    ]
    try:
        recording.hooks = capture.autograd.finish()
        for tensor, name, _hook in recording.hooks:
            about = recorder.describe(tensor)
            if not _autograd.is_leaf(tensor) and (about.mutated or about.metadata_mutated):
                raise UnsupportedError(
                    f"the program leaves a hook (torch.Tensor.{name}) on a tensor with a history "
                    "that it writes to, and the hook belongs to the history before, or after: "
                    "register it before the call"
                )
    except UnsupportedError:
        recorder.release()
        raise
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
    return recording


def _attributes_set(
    capture: Capture, state: _lift.State, recording: Recording
) -> list[tuple[torch.Tensor, str, Any]]:
    """What the program did to attributes of tensors; those of state are no changes any more.

    A call does it to the tensors that it finds, which may be others than those of the capture.
    """
    owners = {id(t.__dict__): t for t, _slots in state.tensors.values()}
    found = [
        (owners[id(change.owner)], change.key, change.value)
        for change in recording.changes
        if id(change.owner) in owners
    ]
    recording.changes = [c for c in recording.changes if id(c.owner) not in owners]
    for twin, tensor in capture.given:
        before, now = tensor.__dict__, twin.__dict__
        found += [(tensor, key, _lift.MISSING) for key in before if key not in now]
        found += [
            (tensor, key, value)
            for key, value in now.items()
            if before.get(key, _MISSING) is not value
        ]
    return found


def _written_array(name: str, place: str) -> str:
    named = f", `{name}`" if name else ""
    at = f" (at {place})" if place else ""
    return (
        f"the program writes to a numpy array that was there before it{named}{at}, which a replay "
        "would not do again: copy the array first, or use a tensor"
    )


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
        if len(sharing) > 1 and any(_is_written(recorder, lifted[i][1]) for i in sharing)
    ]
    ranges = sorted(
        (storage.data_ptr(), storage.data_ptr() + storage.nbytes(), sharing)
        for sharing in storages.values()
        if (storage := lifted[sharing[0]][0].untyped_storage()).nbytes()
    )
    in_part = any(
        begin < end and any(_is_written(recorder, lifted[i][1]) for i in sharing + others)
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


def _is_written(recorder: _C.Recorder, twin: torch.Tensor) -> bool:
    """Whether the program has written to the memory of a twin, or was about to."""
    return recorder.describe(twin).mutated or recorder.has_failed_write(twin)


def _keeps_nested(recorder: _C.Recorder) -> bool:
    nested = recorder.nested_tensors()
    while nested:
        references = _count_of_last(nested) - _OWN_REFERENCES
        if _is_held(nested.pop(), references):
            return True
    return False


def _count_of_last(objects: list[Any]) -> int:
    return sys.getrefcount(objects[-1])


# The list's, and those of the call: Python 3.14 lets calls borrow what earlier releases count.
_OWN_REFERENCES = _count_of_last([object()])


def _is_held(tensor: torch.Tensor, references: int) -> bool:
    """Whether Python certainly holds a tensor that has so many references beside the asker's."""
    # PyTorch itself may hold a tensor (a view holds its base), and with it the Python object.
    shared: bool = tensor._use_count() > 1  # type: ignore[attr-defined] # not in PyTorch's stub
    return references - shared > 0
