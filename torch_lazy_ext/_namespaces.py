"""Guards on what a program reads of Python: its state, and what the names in its code mean.

`_lift.State` knows the containers and slots that the program can reach, `_code.Ran` the code that
ran. Where a program finds things by names (globals, modules, classes, attributes), what its code
names is guarded, and what no code names may change. Where it finds them otherwise (lists,
dictionaries, sets), everything is.
"""

from __future__ import annotations

import abc
import contextvars
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from torch_lazy_ext import _C, _code, _lift, _tree
from torch_lazy_ext._relied import Relied

# Settings that PyTorch keeps in C++, by the names of their getters: where code that ran names one,
# it may have read it. (Gradient and inference mode, autocast, the default dtype, determinism and
# the modes that are on are compared at each call: see csrc/guards.h.)
SETTINGS = frozenset(
    {"_get_cudnn_allow_tf32", "_get_cudnn_benchmark", "_get_cudnn_deterministic"}
    | {"_get_cudnn_enabled", "_get_cublas_allow_tf32", "_get_deterministic_algorithms"}
    | {"_get_deterministic_algorithms_warn_only", "_get_deterministic_fill_uninitialized_memory"}
    | {"_get_float32_matmul_precision", "_get_mkldnn_enabled", "_get_nnpack_enabled"}
    | {"_get_onednn_allow_tf32", "_get_qengine", "_get_warnAlways", "_is_multithreading_enabled"}
    | {"_profiler_enabled", "get_num_interop_threads", "get_num_threads"}
    | {"is_anomaly_check_nan_enabled", "is_anomaly_enabled", "is_autocast_cache_enabled"}
)
# Special names that Python puts into a class when somebody first asks (copyreg, annotations).
MADE_LATER = frozenset({"__slotnames__", "__annotations__", "__annotations_cache__"})
# What an attention looks at when it chooses its kernel, which is recorded.
ATTENTION = ("_get_flash_sdp_enabled", "_get_math_sdp_enabled", "_get_mem_efficient_sdp_enabled")
SETTINGS |= frozenset(ATTENTION)
# Methods of `os.environ` that look at no variable but at what `encodekey` is given.
_BY_NAME = frozenset(
    {"__contains__", "__delitem__", "__getitem__", "__setitem__", "get", "pop", "setdefault"}
    | {"update"}
)


def guard(
    variant: _C.Variant,
    state: _lift.State,
    ran: _code.Ran,
    lifted: set[int],
    arguments: set[int],
    placement: _C.Placement,
) -> Relied:
    """Let a variant compare at each call what the program read of Python.

    Args:
        lifted: ids of the tensors that the graph reads.
        arguments: ids of arguments that are not to be kept alive; a call has these very objects.
    """
    ran.dynamic = ran.dynamic or state.dynamic
    state = state.reached(ran)
    relied = Relied(state, ran)
    _guard_state(variant, state, ran, arguments, {})
    _guard_tensors(variant, state, ran, lifted, placement, relied)
    _guard_code(variant, state, ran, arguments, relied, {})
    state.forget()
    return relied


class Read:
    """What a backward has read of Python (hooks, custom functions), to compare when it runs.

    The call makes sure that all is as it was at the capture, and leaves it as the program did
    there. What it leaves are other objects each time, so each call notes these itself.

    Args:
        state: the program's own state, as it was before the program.
        ran: the code that ran in the backward. What it names is compared, of all that the program
            has come to: the program may have handed it that.
        program: the code that ran in the program and in its backwards.
        written: what the program did to the state.
        lifted: the lifted tensors, for those that the graph reads.
        arguments: ids of arguments that are not to be kept alive.
    """

    def __init__(
        self,
        state: _lift.State,
        ran: _code.Ran,
        *,
        program: _code.Ran,
        written: list[_lift.Change],
        lifted: list[torch.Tensor | None],
        arguments: set[int],
        placement: _C.Placement,
    ) -> None:
        self._keep: list[Any] = []
        self._variant = _C.Variant(self._keep)
        self.place = _code.place_of(ran)
        self._readable = ran.readable()
        ran.dynamic = ran.dynamic or state.dynamic
        fixed = [change for change in written if _is_same_each_time(change.value, state)]
        free: _Free = {}
        for change in written:
            if not any(change is known for known in fixed):
                free.setdefault(id(change.owner), set()).add(change.key)
        self._left = [
            change
            for change in written
            if id(change.owner) in free and change.key in free[id(change.owner)]
        ]
        index_of = {id(t): i for i, t in enumerate(lifted) if t is not None}
        self._tensors: list[tuple[_lift.Slot, int]] = []

        def guard() -> None:
            with state.after(fixed):
                reached = state.reached(program)
                relied = Relied(reached, ran)
                _guard_state(self._variant, reached, ran, None, free)
                for slot, read in _read_tensors(reached, ran):
                    if slot.key in free.get(id(slot.owner), ()) or _C.is_capture_tensor(read):
                        continue
                    self._variant._add_tensor(slot, read, placement)
                    if id(read) in index_of:
                        self._tensors.append((slot, index_of[id(read)]))
                for slot, value, _tensors in reached.numbers:
                    self._variant._add_value(slot, value)
                _guard_code(self._variant, reached, ran, arguments, relied, free, weak=False)
                reached.forget()

        contextvars.copy_context().run(guard)

    def tensors(self, tensors: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """Those of the lifted tensors of a call that the backward has found in Python."""
        return [tensors[i] for _slot, i in self._tensors]

    def left(self, containers: Sequence[Any]) -> list[Any]:
        """What a call has left, right after it.

        Args:
            containers: of its arguments.
        """
        found = [self._content(change) for change in self._left]
        return found + [self._items(container) for container in containers]

    def _items(self, container: Any) -> list[Any]:
        """The items that the backward may read."""
        if not isinstance(container, dict):
            _shape, children = _tree.parts(container) or (None, ())
            return list(children)
        items = _tree.items_of(container).items()
        return [part for item in items if self._readable[item[0]] for part in item]

    @staticmethod
    def _content(change: _lift.Change) -> Any:
        if change.key is _lift.CONTENT:
            return _tree.list_of(change.owner)
        return _lift.Slot(change.owner, change.key, "").read()

    def holds(
        self, tensors: list[torch.Tensor], left: list[Any], containers: Sequence[Any]
    ) -> bool:
        """Whether all is as a call has left it.

        Args:
            tensors, left, containers: of that call.
        """
        return (
            self._variant.has_state()
            and all(slot.read() is t for (slot, _i), t in zip(self._tensors, tensors))
            and all(map(_is_same, self.left(containers), left))
        )


# By id of a container or object: what may be anything there, keys or `_lift.CONTENT` for all.
_Free = dict[int, set[Any]]


def _is_same_each_time(value: Any, state: _lift.State) -> bool:
    """Whether a program that leaves a value leaves this very object, or an equal one."""
    return value is _lift.MISSING or type(value) in _tree.SIMPLE_TYPES or state.knows(value)


def _is_same(now: Any, before: Any) -> bool:
    """Whether a value, or each of the values in a list, is the same object or an equal number."""
    if isinstance(now, list) and isinstance(before, list) and now is not before:
        return len(now) == len(before) and all(map(_is_equal, now, before))
    return _is_equal(now, before)


def _is_equal(now: Any, before: Any) -> bool:
    return now is before or (type(now) in _tree.SIMPLE_TYPES and _tree.same(now, before))


def _guard_state(
    variant: _C.Variant,
    state: _lift.State,
    ran: _code.Ran,
    arguments: set[int] | None,
    free: _Free,
) -> None:
    """Guards on slots and containers.

    Args:
        arguments: as of `guard`; None: the classes of objects are compared elsewhere.
        free: what is not compared.
    """
    by_name = state.namespaces - state.unsized
    left: Collection[Any]
    for slot, value in state.values:
        left = free.get(id(slot.owner), ())
        if slot.key in left or _lift.CONTENT in left:
            continue
        # Classes, and the attributes of objects, are guarded by names.
        if not isinstance(slot.owner, type) and id(slot.owner) not in by_name:
            variant._add_value(slot, value)
    for container, before in state.containers:
        left = free.get(id(container), ())
        if _lift.CONTENT in left:
            continue
        if id(container) in by_name:
            places = set(left)
            if any(issubclass(cls, torch.Tensor) for cls in set(map(type, before.values()))):
                places |= {k for k, v in before.items() if isinstance(v, torch.Tensor)}
            names = frozenset(before) if ran.dynamic else ran.names
            variant._add_names(container, names, places, ran.dynamic and not left)
        elif id(container) not in state.unsized and not left:
            size = _tree.length(container)
            variant._add_size(container, size)
            if isinstance(container, dict) and size > 1:
                variant._add_order(container, list(container))
            elif isinstance(container, _lift.PLAIN_CONTENTS):
                _add_content(variant, container)
    for array, _name in state.arrays:
        _add_getter(variant, array.tobytes)
    for local, _attributes in state.locals:
        _add_getter(variant, _Keys(local, ran.names))
    if arguments is not None:
        for value in state.objects:
            if id(value) not in state.weak:  # this would keep it alive
                variant._add_type_of(value, id(value) not in arguments)
    for fn in state.bare:
        variant._add_names(vars(fn), ran.names, set(free.get(id(vars(fn)), ())))


class _Keys:
    """Which attributes a threading.local has in this thread, of those that code names."""

    def __init__(self, local: Any, names: frozenset[str]) -> None:
        self._local = local
        self._names = names

    def __call__(self) -> tuple[str, ...]:
        return tuple(sorted(k for k in vars(self._local) if k in self._names))


def _add_getter(variant: _C.Variant, getter: Callable[[], Any]) -> None:
    variant._add_getter(getter, getter())


def _add_content(variant: _C.Variant, container: Any) -> None:
    if isinstance(container, set):
        variant._add_content(container)
    else:
        _add_getter(variant, lambda: bytes(container))


def _guard_tensors(
    variant: _C.Variant,
    state: _lift.State,
    ran: _code.Ran,
    lifted: set[int],
    placement: _C.Placement,
    relied: Relied,
) -> None:
    """Guards on the tensors of which the program may have read only what they are like."""
    for tensor, slots in state.tensors.values():
        if ran.dynamic and not tensor.__dict__ and not isinstance(slots[0], _lift.NumberSlot):
            variant._add_names(tensor.__dict__, ran.names, set())
    first: dict[int, _lift.Slot] = {}
    for slot, tensor in _read_tensors(state, ran):
        if id(tensor) not in lifted:
            variant._add_tensor(slot, tensor, placement)
            relied.tensors.append((slot, f"{tensor.dtype}{list(tensor.shape)}"))
            if first.setdefault(id(tensor), slot) is not slot:
                variant._add_tied(first[id(tensor)], slot)


def _read_tensors(state: _lift.State, ran: _code.Ran) -> Iterator[tuple[_lift.Slot, torch.Tensor]]:
    """The slots that the program may have read a tensor from."""
    everything = ran.dynamic or ran.goes_through
    by_name = state.namespaces | state.registries
    for tensor, slots in state.tensors.values():
        for slot in slots if not isinstance(slots[0], _lift.NumberSlot) else ():
            if everything or id(slot.owner) not in by_name or slot.key in ran.names:
                yield slot, tensor


def _guard_code(
    variant: _C.Variant,
    state: _lift.State,
    ran: _code.Ran,
    arguments: set[int],
    relied: Relied,
    free: _Free,
    weak: bool = True,
) -> None:
    """Guards on what code names.

    Args:
        free: what is not compared.
        weak: whether to compare functions that are arguments, too, which the call has compared.
    """
    found: set[Any] = set()
    named: set[Any] = set()  # the same, by code that is no library's
    types: set[type] = set()
    known: set[int] = set()
    for entry in ran.entries:
        if id(entry.code) not in known:
            known.add(id(entry.code))
            into = found if entry.library else named
            skip = ran.kept_by(entry) | free.get(id(entry.globals), frozenset())
            variant._add_code(entry.code, entry.globals, entry.library, skip, into)
        if entry.first is not None:
            types.add(entry.first)
        if entry.function is not None and (weak or id(entry.function) not in arguments):
            variant._add_function(entry.function, id(entry.function) not in arguments)
    if any(isinstance(value, abc.ABCMeta) for value in named | state.types.keys()):
        # What is an instance of such a class changes with each `register`.
        _add_getter(variant, abc.get_cache_token)
        relied.settings.append(("abc.get_cache_token()", repr(abc.get_cache_token())))
    for value in found | named:
        if isinstance(value, type):
            types.add(value)
        elif isinstance(value, contextvars.ContextVar):
            if id(value) in free:
                continue
            _add_getter(variant, functools.partial(value.get, _lift.MISSING))
        elif value.__name__ in SETTINGS:
            _add_getter(variant, value)
            relied.settings.append((f"{value.__name__}()", repr(value())))
        elif value.__name__ == "scaled_dot_product_attention":
            for name in ATTENTION:
                _add_getter(variant, getattr(torch._C, name))
    for prop in ran.props:
        _add_getter(variant, prop.getter)
        relied.settings.append((_name_of(prop), repr(prop.getter())))
    types |= state.types.keys()
    types |= {type(value) for value in state.objects}
    done: set[type] = set()
    for cls in types:
        if not _code.is_library(cls):
            variant._add_bases(cls)
        metaclass: type = type(cls)
        for base in (*cls.__mro__, *metaclass.__mro__):
            if base not in done:
                done.add(base)
                places = MADE_LATER | ran.counts_of(base) | free.get(id(base), frozenset())
                variant._add_names(base, ran.names, places)
    _guard_environment(variant, ran, relied)


def _guard_environment(variant: _C.Variant, ran: _code.Ran, relied: Relied) -> None:
    """Guards on the variables that were asked for by name, or on all of them."""
    environment: Any = os.environ
    content: dict[Any, Any] = environment._data
    methods = {e.code.co_name for e in ran.entries if e.first is _lift.ENVIRONMENT}
    if methods <= _BY_NAME:
        for key in sorted(ran.variables):
            slot = _lift.Slot(content, key, "os.environ")
            variant._add_value(slot, slot.read())
            text = repr(environment[name]) if (name := os.fsdecode(key)) in environment else "unset"
            relied.settings.append((f"os.environ[{name!r}]", text))
    else:
        variant._add_size(content, len(content))
        for key, setting in content.items():
            variant._add_value(_lift.Slot(content, key, "os.environ"), setting)
        relied.settings.append(("os.environ", f"{len(content)} variables"))


def _name_of(prop: torch.backends.ContextProp) -> str:
    """`torch.backends.mkldnn.enabled` for the property of that name."""
    for name, module in vars(torch.backends).items():
        for attribute, held in vars(type(module)).items():
            if held is prop:
                return f"torch.backends.{name}.{attribute}"
    return "a setting of torch.backends"
