"""Record: what autograd keeps of the user's tensors, and the backward that a program runs itself.

Operators get twins, so the history that autograd builds, the gradients that it accumulates and the
hooks that it calls are those of twins, while the program may hold the user's own tensors. Whatever
Python asks or tells a tensor about autograd goes through here to its twin (`METHODS`, `PROPERTIES`,
`FUNCTIONS`), and what the user's tensor had before, its hooks, is carried over to the twin before
the program runs a backward.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from torch_lazy_ext import _C, _lift, _moving, _tree
from torch_lazy_ext._errors import UnsupportedError

# As they are, also while a capture has them replaced.
_register_hook: Callable[..., Any] = torch.Tensor.register_hook
_register_after: Callable[..., Any] = torch.Tensor.register_post_accumulate_grad_hook
grad_of = vars(torch._C.TensorBase)["grad"].__get__
set_grad = vars(torch._C.TensorBase)["grad"].__set__
_grad_fn = vars(torch._C.TensorBase)["grad_fn"].__get__
_output_nr = vars(torch._C.TensorBase)["output_nr"].__get__
is_leaf: Callable[[torch.Tensor], bool] = vars(torch._C.TensorBase)["is_leaf"].__get__
requires_grad: Callable[[torch.Tensor], bool] = vars(torch._C.TensorBase)["requires_grad"].__get__
_hooks_of_tensor = vars(torch._C.TensorBase)["_backward_hooks"].__get__
_hooks_after = vars(torch._C.TensorBase)["_post_accumulate_grad_hooks"].__get__
_set_hooks_after = vars(torch._C.TensorBase)["_post_accumulate_grad_hooks"].__set__


# The arguments of torch.autograd.graph._engine_run_backward, as they are passed by position.
ENGINE = ("outputs", "gradients", "retain_graph", "create_graph", "inputs", "allow")


def top_saved_hooks() -> Any:
    """The innermost pair of hooks for tensors that autograd saves, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


RELATED = (
    "the program differentiates with respect to a tensor that another one, which it is given too, "
    "was made from: derive the one from the other inside of the program, or detach it"
)


def leads_to(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the history of a tensor of the user's leads to another one."""
    edge = _grad_fn(other), _output_nr(other)
    seen: set[Any] = set()
    stack = [_grad_fn(tensor)]
    while stack and tensor is not other:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if getattr(function, "variable", None) is other:
            return True
        for following in function.next_functions:
            if edge[0] is not None and following == edge:
                return True
            stack.append(following[0])
    return False


def function_of(tensor: torch.Tensor) -> Any:
    """The function that a tensor of the capture is a result of; None for a view that autograd
    forbids to use, since it was made in another mode than what it is a view of was written to.
    """
    try:
        return _grad_fn(tensor)
    except RuntimeError:
        return None


def drop_hooks(tensor: torch.Tensor) -> None:
    """Take its hooks from a tensor of the capture."""
    _C.drop_hooks(tensor)
    _set_hooks_after(tensor, None)


class Hooked:
    """A tensor of the user's with hooks, or whose hooks the program may come by.

    Attributes:
        before: its hooks, as `_C.hooks_of` lists them.
    """

    def __init__(self, user: torch.Tensor, twin: torch.Tensor) -> None:
        self.user = user
        self.twin = twin
        self.before = _C.hooks_of(user)
        own = (_hooks_of_tensor(user), _hooks_after(user))
        self._dicts = [(d, dict(d)) for d in own if d is not None]
        self._carried: tuple[set[int], set[int]] = set(), set()

    def carry(self, seen: torch.Tensor) -> Any:
        """Give the twin the hooks; `seen`: what the program sees in the place of the user's.

        Returns:
            What has to live as long as these hooks.
        """
        hooks, after, accumulate_pre, accumulate_post = self.before
        for hook in hooks:
            _register_hook(self.twin, hook)
        for hook in after:
            _register_after(self.twin, functools.partial(_call_with, hook, seen))
        self._carried = tuple(set(d or ()) for d in self._of_twin())  # type: ignore[assignment] # two
        if not accumulate_pre and not accumulate_post:
            return None
        node = torch.autograd.graph.get_gradient_edge(self.twin).node
        for hook in accumulate_pre:
            node.register_prehook(hook)
        for hook in accumulate_post:
            node.register_hook(hook)
        return node

    def _of_twin(self) -> tuple[dict[int, Any] | None, dict[int, Any] | None]:
        return _hooks_of_tensor(self.twin), _hooks_after(self.twin)

    def left(self) -> list[tuple[str, Any]]:
        """What the program registered and did not remove: the method, and the hook."""
        names = "register_hook", "register_post_accumulate_grad_hook"
        return [
            (name, hook)
            for name, hooks, carried in zip(names, self._of_twin(), self._carried)
            for key, hook in (hooks or {}).items()
            if key not in carried
        ]

    def drop(self) -> None:
        """Take the hooks from the twin: from now on those of the user's tensor are called."""
        drop_hooks(self.twin)

    def restore(self) -> bool:
        """Put the hooks of the user's tensor back; returns whether any was gone."""
        changed = [_put_back(now, before) for now, before in self._dicts]
        return any(changed)


def _put_back(now: dict[int, Any], before: dict[int, Any]) -> bool:
    """Give a dictionary of hooks those that it had; returns whether it had others by now."""
    if dict(now) == before:
        return False
    now.clear()
    now.update(before)
    return True


def _call_with(hook: Callable[[torch.Tensor], Any], seen: torch.Tensor, _twin: Any) -> Any:
    return hook(seen)


class Autograd:
    """Answers for the twins of one capture.

    Attributes:
        hooked: id of a tensor -> its hooks, for all that the program may come by.
        retained: id of a tensor with a history -> the tensor, whose gradient the program retains.
        reads_leaf: whether a tensor is a leaf decides what the program does.
        ran: whether the program ran a backward.
        resumed: whether the program has ended, and a backward of its results is recorded.
        contributions: of a backward inside of that backward, in order: how many nodes there were
            before it, the leaf, and what it accumulates.
        checkpoints: whether a reentrant checkpoint is in that backward.
        former: twins of leaves, from before the program assigned to their `.data`.
        related: (a tensor with a history, one that the program differentiated with respect to): no
            history outside of the program leads from the first to the second.
    """

    def __init__(
        self,
        recorder: _C.Recorder,
        state: _lift.State,
        user_of: Callable[[torch.Tensor], torch.Tensor | None],
        refusal: Callable[[str], UnsupportedError],
    ) -> None:
        self.recorder = recorder
        self.hooked: dict[int, Hooked] = {}
        self._watched: list[tuple[dict[int, Any], dict[int, Any]]] = []  # and what they held
        self.retained: dict[int, torch.Tensor] = {}
        self.reads_leaf = False
        self.ran = False
        self.resumed = False
        self.contributions: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.checkpoints = False
        self.related: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.former: list[torch.Tensor] = []
        self._state = state
        self._user_of = user_of
        self._refusal = refusal
        self._handles: list[weakref.ref[Any]] = []
        self._kept: list[Any] = []
        self._removed = False

    def owns(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and (
            _C.is_capture_tensor(tensor) or self.recorder.is_liftable(tensor)
        )

    def twin_of(self, value: Any) -> Any:
        """What autograd knows of a tensor of the user's by; anything else as it is."""
        if not self.owns(value):
            return value
        user = self._user_of(value)
        return value if user is None else self.recorder.twin_of(user)

    def _carried(self, tensor: torch.Tensor) -> torch.Tensor:
        """The twin, with the hooks that the tensor has."""
        user = self._user_of(tensor)
        if user is None or self.resumed:
            return self.twin_of(tensor)  # type: ignore[no-any-return]
        twin = self.recorder.twin_of(user)
        if id(user) not in self.hooked:
            hooked = self.hooked[id(user)] = Hooked(user, twin)
            if any(hooked.before):
                for hooks in hooked.before:
                    for hook in hooks:
                        self._state.walk(hook)
                seen = twin if self._user_of(twin) is user else user
                self._kept.append(hooked.carry(seen))
        return twin

    # ------------------------------------------------------- what handlers answer

    def run_backward(
        self,
        adopt: Callable[[torch.Tensor], object],
        func: Callable[..., Any],
        outputs: Sequence[Any],
        gradients: Sequence[Any],
        retain_graph: bool,
        create_graph: bool,
        inputs: Sequence[Any],
        allow: bool,
        *,
        accumulate_grad: bool,
    ) -> Any:
        """The engine of autograd, for twins.

        Args:
            adopt: called with each leaf of the user's that may get a gradient.
        """
        if not self.resumed:
            self._check_former(outputs)
            self.ran = self.reads_leaf = True
            self._relate(
                [user for i in inputs if self.owns(i) and (user := self._user_of(i)) is not None]
            )
            for tensor, twin, constant, _base in self.recorder.lifted():
                if constant or tensor is None or not requires_grad(twin):
                    continue
                self._carried(tensor)
                wanted = not inputs or any(i is tensor or i is twin for i in inputs)
                if accumulate_grad and wanted and is_leaf(twin) and is_leaf(tensor):
                    adopt(tensor)
        if accumulate_grad:
            for tensor in inputs:
                if self.owns(tensor) and not is_leaf(self.twin_of(tensor)):
                    self.retain_grad(torch.Tensor.retain_grad, tensor)
        begin = len(self.recorder)

        def twin_of(value: Any) -> Any:
            # After the program, an argument stands for what it was before its `.data` was assigned.
            return value if self.resumed and _C.is_capture_tensor(value) else self.twin_of(value)

        result = func(
            tuple(map(twin_of, outputs)),
            tuple(map(twin_of, gradients)),
            retain_graph,
            create_graph,
            tuple(map(twin_of, inputs)),
            allow,
            accumulate_grad=accumulate_grad,
        )
        if accumulate_grad and self.resumed:
            for leaf in self.recorder.sources():
                if leaf is not None and (grad := grad_of(leaf)) is not None:
                    self.contributions.append((begin, leaf, grad))
                    set_grad(leaf, None)
        return result

    def _check_former(self, outputs: Sequence[Any]) -> None:
        """Raise an error where a backward of the program leads to what a leaf was before."""
        seen: set[Any] = set()
        stack = [_grad_fn(self.twin_of(output)) for output in outputs if self.former]
        while stack:
            function = stack.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            variable = getattr(function, "variable", None)
            if variable is not None and any(variable is leaf for leaf in self.former):
                raise self._refusal(
                    f"the program runs a backward (at {_moving.user_line()}) of what it has "
                    "computed with a leaf before it assigned to the `.data` of that: assign after "
                    "the backward, or write to the leaf under torch.no_grad()"
                )
            stack.extend(following for following, _k in function.next_functions)

    def node_of_twin(self, node: Any) -> Any:
        """The node of autograd that has the part of one of the user's, where that is a tensor's."""
        leaf = getattr(node, "variable", None)  # of what accumulates a gradient
        for tensor, twin, constant, _base in self.recorder.lifted():
            if constant or tensor is None or not requires_grad(twin):
                continue
            if tensor is leaf or (leaf is None and _grad_fn(tensor) is node):
                return torch.autograd.graph.get_gradient_edge(twin).node
        return node

    def _relate(self, inputs: list[torch.Tensor]) -> None:
        for tensor, twin, constant, _base in self.recorder.lifted():
            if inputs and not constant and requires_grad(twin) and not is_leaf(tensor):
                for other in inputs:
                    if leads_to(tensor, other):
                        raise self._refusal(RELATED)
                    self.related.append((tensor, other))

    def register(self, func: Any, tensor: torch.Tensor, hook: Any) -> Any:
        handle = func(self._carried(tensor), hook)
        if self._user_of(tensor) is not None:
            self._handles.append(weakref.ref(handle))
        return handle

    def retain_grad(self, func: Any, tensor: torch.Tensor) -> None:
        user = self._user_of(tensor)
        twin = self.twin_of(tensor)
        if user is not None and not is_leaf(twin) and not self.resumed:
            self.retained[id(user)] = user
        func(twin)

    def get_hooks(self, func: Any, tensor: torch.Tensor) -> Any:
        return func(self._carried(tensor))

    def set_hooks(self, func: Any, tensor: torch.Tensor, *value: Any) -> None:
        func(self._carried(tensor), *value)

    def get(self, func: Any, tensor: torch.Tensor) -> Any:
        if self._user_of(tensor) is not None:
            self.reads_leaf = True
        return func(self.twin_of(tensor))

    def version(self, func: Any, tensor: torch.Tensor) -> Any:
        if self._user_of(tensor) is not None:
            raise self._refusal(
                "the program reads the version counter of a tensor that it was given "
                f"(torch.Tensor._version, at {_moving.user_line()}), which each call finds "
                "elsewhere: compare values, or read it before the call"
            )
        return func(tensor)

    # ------------------------------------------------------------------ the end

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note the hooks of tensors that the program may reach, and need not come by."""
        for tensor in tensors:
            for hooks in (_hooks_of_tensor(tensor), _hooks_after(tensor)):
                if hooks:
                    self._watched.append((hooks, dict(hooks)))

    def restore(self) -> None:
        """Put back the hooks that the program took from tensors of the user's."""
        removed = [hooked.restore() for hooked in self.hooked.values()]
        removed += [_put_back(now, before) for now, before in self._watched]
        self._removed = any(removed)

    def finish(self) -> list[tuple[torch.Tensor, str, Any]]:
        """What is left after the program: hooks that it registered on tensors of the user's.

        Raises:
            UnsupportedError: a replay cannot register such a hook, or the program removed one.
        """
        left = [(h.user, *each) for h in self.hooked.values() for each in h.left()]
        for hooked in self.hooked.values():
            hooked.drop()
        if self._removed:
            raise UnsupportedError(
                "the program removes a hook that a tensor had before: remove it before the call"
            )
        alive = any(handle() is not None for handle in self._handles)
        for _user, name, hook in left:
            if alive or not self.is_lasting(hook):
                raise UnsupportedError(
                    f"the program leaves a hook on a tensor that it was given (torch.Tensor.{name}"
                    f" with {getattr(hook, '__qualname__', type(hook).__name__)}), which belongs "
                    "to this one run of it: remove the hook in the program, or register it before "
                    "the call"
                )
        return left

    def is_lasting(self, hook: Any) -> bool:
        """Whether a hook is the same one in each run of the program, as far as it can be told."""
        stack, seen = [hook], set()
        while stack:
            value = stack.pop()
            if id(value) in seen or type(value) in _tree.SIMPLE_TYPES or self._state.knows(value):
                continue
            seen.add(id(value))
            if isinstance(value, types.FunctionType):
                try:
                    stack += [cell.cell_contents for cell in value.__closure__ or ()]
                except ValueError:
                    return False
                stack += value.__defaults__ or ()
                stack += (value.__kwdefaults__ or {}).values()
            elif isinstance(value, types.MethodType):
                stack += [value.__self__, value.__func__]
            elif isinstance(value, types.BuiltinFunctionType):
                stack.append(value.__self__)
            elif isinstance(value, torch.Tensor):
                if _C.is_capture_tensor(value):
                    return False
            elif not isinstance(value, (type, types.ModuleType)):
                return False
        return True


# On torch.Tensor: what asks or changes what autograd keeps, and reaches no operator.
METHODS: dict[str, Callable[..., Any]] = {
    "register_hook": Autograd.register,
    "register_post_accumulate_grad_hook": Autograd.register,
    "retain_grad": Autograd.retain_grad,
}
GETTERS: dict[str, Callable[..., Any]] = {
    "grad_fn": Autograd.get,
    "is_leaf": Autograd.get,
    "output_nr": Autograd.get,
    "retains_grad": Autograd.get,
    "_version": Autograd.version,
}
PROPERTIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "_backward_hooks": (Autograd.get_hooks, Autograd.set_hooks),
    "_post_accumulate_grad_hooks": (Autograd.get_hooks, Autograd.set_hooks),
}
