"""Structures of Python objects: taken apart for comparison, and put together again.

`torch.utils._pytree` knows a fixed list of containers and no identity. A program's arguments,
results and state hold more than that: dataclasses, caches with tensors as attributes, one list that
is held twice, the caller's own dictionary in the result. So this takes apart whatever is made of
lists, tuples, dictionaries and instance attributes, and remembers what was the same object.
"""

from __future__ import annotations

import array
import collections
import contextlib
import enum
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Values that a program can only read; compared with `same`.
SIMPLE_TYPES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

_ATOMIC = frozenset(SIMPLE_TYPES) | {
    torch.Tensor,
    nn.Parameter,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    slice,
    range,
    torch.layout,
    torch.memory_format,
}
# Classes of torch that are plain structures of tensors.
_STRUCTURES_OF_TORCH = ("torch.distributions", "torch.nn.utils.rnn", "torch.return_types")
LIMIT = 10_000  # a longer container is data, not structure: it counts by identity


class _TensorKey:
    """Stands among the keys of a dictionary for a tensor, which is a child."""

    def __repr__(self) -> str:
        return "<a tensor>"


TENSOR_KEY = _TensorKey()


class Shape:
    """What a container looks like without its children: class, keys, attribute names.

    Two containers with equal shapes and equal children are indistinguishable.
    """

    __slots__ = ("_identity", "attributes", "cls", "extra", "has_tensor_keys", "keys", "length")

    def __init__(
        self,
        cls: type,
        length: int,
        keys: tuple[Any, ...] | None,
        attributes: tuple[str, ...],
        extra: Any = None,
    ) -> None:
        self.cls = cls
        # Children are as many items, then attributes, and last the keys that are tensors: a program
        # finds an item by the twin of such a key.
        self.length = length
        self.keys = keys
        self.has_tensor_keys = keys is not None and any(k is TENSOR_KEY for k in keys)
        self.attributes = attributes
        self.extra = extra  # default_factory, maxlen
        key_types = None if keys is None else tuple(map(type, keys))
        self._identity = (cls, length, keys, key_types, attributes, extra)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shape) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((self.cls, self.length, len(self.attributes)))


def parts(value: Any) -> tuple[Shape, list[Any]] | None:
    """The shape and the children of a container; None for a leaf."""
    cls = type(value)
    if cls in _ATOMIC:
        return None
    if cls is list or cls is tuple:
        return Shape(cls, len(value), None, ()), list(value)
    if cls is dict:
        if len(value) > LIMIT:
            return None
        keys, tensors = _keys(value)
        return Shape(cls, len(value), keys, ()), [*value.values(), *tensors]
    if not is_structure(cls):
        return None
    items: list[Any] = []
    tensors = []
    extra: Any = None
    names: tuple[Any, ...] | None = None
    if isinstance(value, dict):
        content = items_of(value)
        names, tensors = _keys(content)
        items = list(content.values())
        if isinstance(value, collections.defaultdict):
            extra = value.default_factory
    elif isinstance(value, (tuple, list)):
        items = list_of(value)
    elif isinstance(value, collections.deque):
        items = list(value)
        extra = value.maxlen
    elif isinstance(value, (set, bytearray, array.array)):
        items = list(value)
        extra = value.typecode if isinstance(value, array.array) else None
    if len(items) > LIMIT:
        return None
    attributes = _attributes(value)
    shape = Shape(cls, len(items), names, tuple(attributes), extra)
    return shape, [*items, *attributes.values(), *tensors]


def _keys(content: dict[Any, Any]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The keys of a dictionary, and which of them are tensors."""
    tensors = [key for key in content if isinstance(key, torch.Tensor)]
    if not tensors:
        return tuple(content), tensors
    return tuple(TENSOR_KEY if isinstance(k, torch.Tensor) else k for k in content), tensors


def items_of(value: dict[Any, Any]) -> dict[Any, Any]:
    """The items of a dictionary in its own order, whatever the methods of its class give."""
    if isinstance(value, collections.OrderedDict):
        return dict(collections.OrderedDict.items(value))
    return dict(dict.items(value))


def length(value: Any) -> int:
    """The number of items, whatever `__len__` of the class says."""
    bases: tuple[Any, ...] = (tuple, list, dict, collections.deque)
    for base in bases:
        if isinstance(value, base):
            number: int = base.__len__(value)
            return number
    return len(value)


def list_of(value: Any) -> list[Any]:
    """The items of a tuple, list or deque, whatever the methods of its class give."""
    bases: tuple[Any, ...] = (tuple, list, collections.deque)
    for base in bases:
        if isinstance(value, base):
            return list(base.__iter__(value))
    return list(value)


def differs(value: Any, items: list[Any]) -> bool:
    """Whether a list, deque, set, bytearray or array holds other items than these."""
    if isinstance(value, bytearray):
        return bytes(value) != bytes(items)
    if isinstance(value, array.array):
        return value.tobytes() != array.array(value.typecode, items).tobytes()
    now = list_of(value)
    return len(now) != len(items) or any(a is not b for a, b in zip(now, items))


def refill(value: Any, items: list[Any]) -> None:
    """Give a list, deque, set, bytearray or array exactly these items, in place."""
    if isinstance(value, list):
        list.clear(value)
        list.extend(value, items)
    elif isinstance(value, set):
        value.clear()
        value.update(items)
    elif isinstance(value, bytearray):
        value[:] = bytes(items)
    elif isinstance(value, array.array):
        value[:] = array.array(value.typecode, items)
    else:
        value.clear()
        value.extend(items)


def is_structure(cls: type) -> bool:
    """Whether the items and attributes of an object of this class are all that there is to it."""
    if issubclass(cls, (torch.Tensor, nn.Module, type, enum.Enum, BaseException)):
        return False
    if cls in (set, bytearray, array.array):
        return True
    if issubclass(cls, (set, frozenset, functools.partial)):
        return False  # more than their attributes
    if issubclass(cls, (tuple, list, dict, collections.deque, bytearray, array.array)):
        return True
    module = cls.__module__ or ""
    root = module.partition(".")[0]
    if root == "torch":
        return module.startswith(_STRUCTURES_OF_TORCH)
    if cls is types.SimpleNamespace:
        return True
    if root in sys.stdlib_module_names or root == "torch_lazy_ext":
        return False
    if root == "numpy" and (not _is_in_python(cls) or hasattr(cls, "__array_finalize__")):
        return False
    return cls.__dictoffset__ != 0 or any("__slots__" in vars(c) for c in cls.__mro__)


def _is_in_python(cls: type) -> bool:
    """Whether a class is written in Python."""
    heap_type = 1 << 9  # Py_TPFLAGS_HEAPTYPE
    return bool(cls.__flags__ & heap_type)


def own_dict(value: Any) -> dict[str, Any] | None:
    """The attributes of an object, where it has a dictionary for them.

    Its class is asked whether it has, since its own `__getattr__` may raise anything.
    """
    if type(value).__dictoffset__ == 0:
        return None
    attributes: dict[str, Any] = value.__dict__
    return attributes


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(own_dict(value) or ())
    for name in slot_names(type(value)):
        with contextlib.suppress(AttributeError):
            found[name] = object.__getattribute__(value, name)
    return found


def slot_names(cls: type) -> list[str]:
    """The attributes for which objects of a class have places, set or not."""
    found = []
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__"):
                found.append(name)
    return found


def is_immutable(shape: Shape) -> bool:
    return issubclass(shape.cls, tuple)


def make(shape: Shape) -> Any:
    """An empty container of this shape, for `fill`. Not for tuples, which cannot be filled."""
    cls = shape.cls
    if cls is list or cls is dict:
        return cls()
    if issubclass(cls, collections.deque):
        return cls(maxlen=shape.extra)
    if issubclass(cls, array.array):
        return cls(shape.extra)
    if issubclass(cls, collections.defaultdict):
        made = collections.defaultdict.__new__(cls)
        made.default_factory = shape.extra
        return made
    # Not a `__new__` that is written in Python, which may ask for arguments.
    base: Any = next(base for base in cls.__mro__ if not _is_in_python(base))
    return base.__new__(cls)


def make_tuple(shape: Shape, children: list[Any]) -> Any:
    cls = shape.cls
    items = children[: shape.length]
    if cls is tuple:
        return tuple(items)
    if cls is torch.Size:
        return torch.Size(items)
    if hasattr(cls, "n_sequence_fields"):  # torch.return_types: made by C code
        return cls(items)
    made: Any = tuple.__new__(cls, items)
    _set_attributes(made, shape, children)
    return made


def fill(value: Any, shape: Shape, children: list[Any]) -> None:
    """Give `value` exactly this content, in place."""
    items = children[: shape.length]
    if isinstance(value, dict):
        ordered = isinstance(value, collections.OrderedDict)
        base: Any = collections.OrderedDict if ordered else dict
        base.clear(value)
        tensors = iter(children[shape.length + len(shape.attributes) :])
        for key, item in zip(shape.keys or (), items, strict=True):
            base.__setitem__(value, next(tensors) if key is TENSOR_KEY else key, item)
    elif isinstance(value, (list, collections.deque, set, bytearray, array.array)):
        refill(value, items)
    _set_attributes(value, shape, children)


def _set_attributes(value: Any, shape: Shape, children: list[Any]) -> None:
    own = own_dict(value)
    wanted = dict(zip(shape.attributes, children[shape.length :]))
    if own is not None:
        for name in [n for n in own if n not in wanted]:
            del own[name]
    for name, child in wanted.items():
        if own is not None and not isinstance(
            getattr(type(value), name, None), types.MemberDescriptorType
        ):
            own[name] = child
        else:
            object.__setattr__(value, name, child)


class Flat:
    """A value taken apart.

    Attributes:
        leaves: everything that is no container, in order.
        spec: the nested structure; equal specs mean equal structures, also in what is one object.
        containers: each container once, in order of discovery.
    """

    __slots__ = ("containers", "leaves", "spec")

    def __init__(self, leaves: list[Any], spec: Any, containers: list[Any]) -> None:
        self.leaves = leaves
        self.spec = spec
        self.containers = containers


# No functions that refer to themselves by a closure: each of these would keep what it was called
# with until Python collects cycles.


def flatten(value: Any) -> Flat:
    leaves: list[Any] = []
    containers: list[Any] = []
    spec = _flatten(value, leaves, containers, {})
    return Flat(leaves, spec, containers)


def _flatten(value: Any, leaves: list[Any], containers: list[Any], seen: dict[int, int]) -> Any:
    taken = parts(value)
    if taken is None:
        leaves.append(value)
        return None
    shape, children = taken
    if not is_immutable(shape):
        # Whether one tuple is held twice or two equal ones are is Python's affair.
        known = seen.get(id(value))
        if known is not None:
            return known
        seen[id(value)] = len(containers)
    containers.append(value)
    return (shape, tuple([_flatten(c, leaves, containers, seen) for c in children]))


def rebuild(
    value: Any, replace: Callable[[Any], Any], keep: Callable[[Any], bool] = lambda _value: False
) -> tuple[Any, list[Any]]:
    """A copy of `value` with `replace(leaf)` for each leaf, and its containers as in `flatten`.

    An immutable container without containers or replaced leaves below it is still made anew. A
    mutable one for which `keep` says so stays itself, with all that it holds.
    """
    rebuilding = _Rebuilding(replace, keep)
    return rebuilding.walk(value), rebuilding.containers


class _Rebuilding:
    def __init__(self, replace: Callable[[Any], Any], keep: Callable[[Any], bool]) -> None:
        self.containers: list[Any] = []
        self._replace = replace
        self._keep = keep
        self._made: dict[int, Any] = {}

    def walk(self, value: Any) -> Any:
        taken = parts(value)
        if taken is None:
            return self._replace(value)
        if id(value) in self._made:
            return self._made[id(value)]
        shape, children = taken
        position = len(self.containers)
        self.containers.append(None)
        if is_immutable(shape):
            copy = make_tuple(shape, [self.walk(c) for c in children])
        elif self._keep(value):
            copy = self._made[id(value)] = value
            for child in children:
                self.walk(child)
        else:
            copy = self._made[id(value)] = make(shape)
            fill(copy, shape, [self.walk(c) for c in children])
        self.containers[position] = copy
        return copy


def is_array(value: Any) -> bool:
    """Whether it is a numpy array (and no numpy scalar), without a need for numpy."""
    return type(value).__module__ == "numpy" and hasattr(value, "ctypes")


def same(a: Any, b: Any) -> bool:
    """Equality of leaves as a program can tell them apart: 1, 1.0, True differ, nan equals nan."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a == b and str(a) == str(b)) or (a != a and b != b)
    if type(a).__module__ == "numpy" and hasattr(a, "tobytes"):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    try:
        return bool(a == b)
    except Exception:  # a foreign __eq__ may raise anything; then only identity counts
        return False
