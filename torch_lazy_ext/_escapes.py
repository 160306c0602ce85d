"""Record: no tensor of a capture gets out.

After a program has run, the recorder knows which of its tensors are still alive. What the results
and the noted changes of state hold is made anew by each replay; a tensor that anything else holds
would be a dead one, or stale after the next replay. References are counted: those that results and
changes have, against all that there are. Only where that does not come out even is it worth to
collect cycles of garbage, and then to look for the holder, whose name is in the refusal.
"""

from __future__ import annotations

import collections.abc
import gc
import sys
import threading
import time
import types
from typing import Any, ClassVar, Protocol

import torch

from torch_lazy_ext import _C, _made, _tree
from torch_lazy_ext._autograd import function_of
from torch_lazy_ext._code import Ran
from torch_lazy_ext._errors import UnsupportedError
from torch_lazy_ext._moving import Moving

# Python 3.12 itself sets aside what it has made immortal, some hundreds; `gc.freeze` sets aside all
# that there is, which is thousands before anything is imported.
FROZEN_BY_PYTHON = 1000

PATIENCE = 2.0  # seconds that a capture waits for those of other threads


class _Rest:
    """Python collects no cycles by itself while any thread is within this.

    It would look again and again through what a capture makes, and run what others have in
    `gc.callbacks` as if the program had called it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # to ask for thresholds may run finalizers, which capture
        self._count = 0
        self._thresholds = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if self._count == 0:
                self._thresholds = gc.get_threshold()
                gc.set_threshold(0)
            self._count += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                gc.set_threshold(*self._thresholds)


rest = _Rest()


class Since:
    """Tells what Python objects were made since a moment, until it is closed.

    What was there before is set aside for Python's collector of cycles (`gc.freeze`): so what it
    keeps track of is what was made since, and to collect it takes no time. Where the user has set
    something aside, which must stay there, what was made since is what the collector has not come
    to: it is called once, and then rests.

    What is made by another thread may be incomplete, such as a tuple that is going to be resized,
    which fails when anybody else refers to it: so ids are kept here, and no references. An id that
    is given to another object meanwhile is that of an object made since all the same.

    Captures of several threads take turns: each changes the state of its program for a time, which
    another one may share, and each counts references. But a program that waits for the capture of
    another thread must not wait for ever: after `PATIENCE` they overlap.
    """

    _turn = threading.RLock()

    _lock = threading.RLock()  # setting aside may run finalizers
    _all: ClassVar[list[Since]] = []  # those that are open
    _freezes = False
    _rests = False  # the collector, which was enabled

    def __init__(self) -> None:
        self._young: set[int] = set()  # ids of what was made since, and then set aside
        self._has_turn = False

    def __enter__(self) -> Since:
        self._has_turn = Since._turn.acquire(timeout=PATIENCE)
        with Since._lock:
            if not Since._all:
                Since._freezes = gc.get_freeze_count() < FROZEN_BY_PYTHON
                Since._rests = not Since._freezes and gc.isenabled()
                if Since._rests:
                    gc.disable()
            Since._set_aside()
            Since._all.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._close()
        finally:
            if self._has_turn:
                Since._turn.release()

    def _close(self) -> None:
        with Since._lock:
            Since._all.remove(self)
            if Since._all:
                return
            if Since._freezes:
                gc.unfreeze()
            if Since._rests:
                gc.enable()

    @staticmethod
    def _fresh() -> list[Any]:
        """What was made since the last call of `_set_aside`."""
        return gc.get_objects() if Since._freezes else gc.get_objects(generation=0)

    @staticmethod
    def _note_fresh() -> None:
        if Since._all:
            young = set(map(id, Since._fresh()))
            for since in Since._all:
                since._young |= young

    @staticmethod
    def _set_aside() -> None:
        Since._note_fresh()
        if Since._freezes:
            gc.unfreeze()
            gc.freeze()
        else:
            gc.collect(1)

    def made(self) -> Made:
        with Since._lock:
            return Made(self._young.union(map(id, Since._fresh())))

    def collect(self) -> None:
        """Collect cycles of garbage among what was made since."""
        with Since._lock:
            if not (Since._freezes and self._young):
                _collect()
                return
            # A capture that began later has set some of it aside.
            Since._note_fresh()
            gc.unfreeze()
            _collect()
            gc.freeze()

    def referrers(self, values: list[Any]) -> list[Any]:
        """What holds any of these, of everything that there is."""
        with Since._lock:
            if not Since._freezes:
                return _referrers(values)
            Since._note_fresh()
            gc.unfreeze()
            found = _referrers(values)
            gc.freeze()
            return found


def _referrers(values: list[Any]) -> list[Any]:
    """What the collector knows that holds any of these, but for the arguments of this question.

    Python leaves those out itself up to 3.12; from 3.13 on they are found as well.
    """
    arguments = tuple(values)  # which a call passes on as it is
    return [found for found in gc.get_referrers(*arguments) if found is not arguments]


def _collect() -> None:
    """`gc.collect()`, which does nothing while another thread collects and has let this one run."""
    done = _collections()
    while gc.collect() == 0 and _collections() == done:
        time.sleep(0)


def _collections() -> int:
    count: int = gc.get_stats()[-1]["collections"]
    return count


class Made:
    """The objects that were made since."""

    def __init__(self, ids: collections.abc.Set[int]) -> None:
        self._ids = ids

    def __contains__(self, value: object) -> bool:
        # What the collector does not track, it may be: no iterator over a range is known.
        return id(value) in self._ids or not gc.is_tracked(value)


class _Walk:
    """What a program's results and changes hold, and how many references they have to each thing.

    Attributes:
        opened: the objects that were looked into: those that a replay makes anew.
    """

    def __init__(self, made: Made) -> None:
        self.opened: list[Any] = []
        self._made = made
        self._counts: dict[int, int] = {}
        self._seen: dict[int, Any] = {}
        self._own_parts: set[int] = set()  # attributes of objects, frames of generators
        self._looked_into: set[int] = set()

    def add(self, roots: list[Any]) -> None:
        """Look into `roots`, which are held by nothing that is compared."""
        stack = list(roots)
        own = {id(root) for root in roots}
        while stack:
            value = stack.pop()
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if not self._is_open(value):
                if _tree.is_array(value) and value.base is not None:
                    # A view of another one, of which the collector knows nothing.
                    self._counts[id(value.base)] = self._counts.get(id(value.base), 0) + 1
                    stack.append(value.base)
                continue
            self._looked_into.add(id(value))
            if id(value) not in own and not _is_own(value) and gc.is_tracked(value):
                self.opened.append(value)
            if type(value).__dictoffset__:
                # Python may make it only now that it is asked for it.
                self._own_parts.add(id(value.__dict__))
            if isinstance(value, types.GeneratorType):
                self._own_parts.update(map(id, _frames_of(value)))
            for held in gc.get_referents(value):
                if type(held) not in _CLOSED:
                    self._counts[id(held)] = self._counts.get(id(held), 0) + 1
                    stack.append(held)

    def note(self, values: list[Any]) -> None:
        """Each of `values` is held once more, by what Python cannot look into."""
        for value in values:
            self._counts[id(value)] = self._counts.get(id(value), 0) + 1
        self.add(values)

    def _is_open(self, value: Any) -> bool:
        if id(value) in self._own_parts:
            return True
        # What the collector does not track holds nothing that it tracks; but for the tuples with
        # names that C code makes (torch.return_types).
        cls = type(value)
        named = cls is not tuple and issubclass(cls, tuple)
        if not (gc.is_tracked(value) or named) or _is_tensor(value) or value not in self._made:
            return False
        if type(value) in (list, tuple, dict):
            return True
        if _is_own(value):
            # The one holds what was there before, the other says itself what it holds.
            return not isinstance(value, (Moving, Ran))
        return _tree.parts(value) is not None or _made.parts(value) is not None

    def looked_into(self, value: Any) -> bool:
        return id(value) in self._looked_into

    def knows(self, value: Any) -> bool:
        return id(value) in self._counts

    def is_ours(self, value: Any) -> bool:
        return self.looked_into(value) or value is self._seen or value is self.opened

    def uneven(self, tensors: list[Any]) -> list[Any]:
        """Of `tensors` and of what was opened, those that something else holds, too.

        Nothing else may hold them at the moment of this call, but the list `tensors` itself.
        """
        values = [*tensors, *self.opened]
        found = []
        for i, count in enumerate(_references(values)):
            key = id(values[i])
            count -= _REFERENCES + 1 + self._counts.get(key, 0) + (key in self._seen)
            if count > 0:
                # PyTorch itself may hold a tensor (a view holds its base), and so the object.
                shared = _is_tensor(values[i]) and values[i]._use_count() > 1
                if count > shared:
                    found.append(values[i])
        return found


# They hold nothing of a program's, and who holds them does not matter.
_CLOSED = frozenset(_tree.SIMPLE_TYPES) | {types.CodeType, types.ModuleType}


def _is_tensor(value: Any) -> bool:
    return issubclass(type(value), torch.Tensor)  # a `__class__` may be anything, and may warn


def _frames_of(generator: Any) -> list[types.FrameType]:
    """Of a generator or coroutine up to Python 3.10 its frame, which alone holds its variables."""
    return [held for held in gc.get_referents(generator) if type(held) is types.FrameType]


def _is_own(value: Any) -> bool:
    return type(value).__module__.startswith("torch_lazy_ext.")


def _references(values: list[Any]) -> list[int]:
    return [sys.getrefcount(value) for value in values]


_REFERENCES = _references([object()])[0]  # of an object that nothing but the list holds


class Recording(Protocol):
    """What is left of a finished capture; see `_record.Recording`."""

    recorder: _C.Recorder
    made: Made
    ran: Ran

    @property
    def arrays(self) -> Any: ...


def settle(recording: Recording, since: Since) -> None:
    """See to it that no tensor of the capture is held where a replay cannot follow.

    A constant (`functools.lru_cache` over `torch.arange`) becomes what eager would have kept.

    Raises:
        UnsupportedError: something holds a tensor that would be stale after the next replay. There
            it leaves the value that the tensor would have had.
    """
    recorder = recording.recorder
    walk = _Walk(recording.made)
    walk.add([recording])
    walk.note(recording.ran.held())
    users = {id(twin): user for user, twin, _constant, _base in recorder.lifted()}
    tensors = [t for t in recorder.alive() if id(t) not in users]
    tensors += [twin for _user, twin, _constant, _base in recorder.lifted()]
    tensors = [t for t in tensors if _C.is_capture_tensor(t)] + recording.arrays.alive_arrays()
    uneven = walk.uneven(tensors)
    kept = [t for t in uneven if _is_constant(recorder, t) and not walk.knows(t)]
    for tensor in kept:
        value = recorder.materialize(tensor, guard=False).clone()
        torch._C._swap_tensor_impl(tensor, value)
    if len(kept) == len(uneven):
        return
    del uneven
    since.collect()
    # What a custom autograd.Function keeps in its context is for the backward.
    # Autograd makes the history anew of a view whose base was written to.
    contexts, saved = recorder.resumed(lambda: _contexts(tensors))
    walk.add(contexts)
    walk.note(saved)
    del contexts, saved
    tensors = [t for t in tensors if not _is_tensor(t) or _C.is_capture_tensor(t)]
    uneven = [v for v in walk.uneven(tensors) if _leads_to(v, walk, tensors)]
    if not uneven:
        return
    found = _Holders(walk, since, [uneven, tensors, users]).of(uneven)
    if found is None:
        # The collector knows no holder; those of what the walk has come by may be C++ code.
        unknown = [v for v in uneven if not walk.knows(v)]
        if not unknown:
            return
        found = unknown[0], UNKNOWN
    value, holder = found
    what = _describe(recorder, value, users)
    _leave_values(recorder, [t for t in uneven if _is_tensor(t)], users)
    raise UnsupportedError(
        f"the program keeps {what} in {holder}, which a replay cannot bring up to date: return it, "
        "or keep it in an attribute of the module"
    )


def _leads_to(value: Any, walk: _Walk, tensors: list[Any]) -> bool:
    """Whether one of the tensors is there, or in what the walk came by from there on."""
    wanted = {id(t) for t in tensors}
    seen: set[int] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if id(value) in wanted:
            return True
        if id(value) not in seen:
            seen.add(id(value))
            stack += [held for held in gc.get_referents(value) if walk.looked_into(held)]
            stack += [held for held in gc.get_referents(value) if id(held) in wanted]
    return False


UNKNOWN = "a place outside of its results, attributes and closures"


def _is_constant(recorder: _C.Recorder, tensor: Any) -> bool:
    if not _is_tensor(tensor):
        return False
    about = recorder.describe(tensor)
    return about.captured and about.lifted < 0 and not recorder.depends_on_input(about.value)


def _describe(recorder: _C.Recorder, value: Any, users: dict[int, torch.Tensor]) -> str:
    if not _is_tensor(value):
        return f"a {type(value).__name__} that it makes"
    if id(value) in users:
        return "a tensor that it is given"
    name, _metas, where = recorder.node_info(recorder.describe(value).value.node)
    return f"the result of {name} (at {where})"


def _leave_values(
    recorder: _C.Recorder, tensors: list[torch.Tensor], users: dict[int, torch.Tensor]
) -> None:
    """Make what eager would have of tensors that somebody keeps; the recording ends with it."""
    values = []
    for tensor in tensors:
        user = users.get(id(tensor))
        if user is not None:
            values.append((tensor, torch.ops.aten.alias(user.detach())))
        else:
            values.append((tensor, recorder.materialize(tensor, guard=False).clone()))
    recorder.release()
    for tensor, value in values:
        if tensor._use_count() == 1:  # type: ignore[attr-defined] # not in its stub
            torch._C._swap_tensor_impl(tensor, value)


def _contexts(tensors: list[Any]) -> tuple[list[Any], list[Any]]:
    """What the functions in the history of these tensors keep: custom ones in attributes; and what
    they all have of the program's hooks for saved tensors.
    """
    seen: set[Any] = set()
    stack = [function_of(t) for t in tensors if _is_tensor(t) and t.requires_grad]
    held: list[Any] = []
    saved: list[Any] = []
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        stack.extend(following for following, _k in function.next_functions)
        if isinstance(function, torch.autograd.function.FunctionCtx):
            held.append(vars(function))
        for name in dir(function):
            if name.startswith("_raw_saved_"):
                try:
                    value = getattr(function, name)
                except RuntimeError:
                    continue  # a backward of the program has freed it
                for each in value if isinstance(value, (list, tuple)) else [value]:
                    saved.append(each.data)
    return held, saved


class _Holders:
    """Finds what holds objects, and what to call it."""

    def __init__(self, walk: _Walk, since: Since, own: list[Any]) -> None:
        self._walk = walk
        self._since = since
        self._own = {id(value) for value in own}

    def of(self, values: list[Any]) -> tuple[Any, str] | None:
        """The first of `values` that something holds which the walk did not come by."""
        self._own.add(id(values))
        for holder in self._referrers(values):
            for value in values:
                if _holds(holder, value):
                    return value, self._name(holder, value, _DEPTH)
        return None

    def _referrers(self, values: list[Any]) -> list[Any]:
        holders = self._since.referrers(values)
        frames = [holder for holder in holders if type(holder) is types.FrameType]
        if frames:
            generators = [g for g in self._since.referrers(frames) if isinstance(g, _GENERATORS)]
            holders += generators
            self._own.add(id(generators))
        self._own.update((id(holders), id(frames)))
        found = [
            holder
            for holder in holders
            if not issubclass(type(holder), (types.FrameType, torch.Tensor))
            and type(holder) is not _LIST_ITERATOR  # those of this search
            and id(holder) not in self._own
            and not self._walk.is_ours(holder)
            and not _is_own(holder)
        ]
        self._own.add(id(found))
        return found

    def _name(self, holder: Any, value: Any, depth: int) -> str:
        """What to call a `holder`, which holds `value`."""
        if isinstance(holder, type):
            return f"class {holder.__name__}"
        if isinstance(holder, types.ModuleType):
            return f"module {holder.__name__}"
        if isinstance(holder, _GENERATORS):
            return f"the frame of {holder.__qualname__}, which has begun and not ended"
        if isinstance(holder, types.FunctionType):
            searched: list[Any] = [holder]
            self._own.add(id(searched))
            for parent in self._referrers(searched) if depth else []:
                if isinstance(parent, types.GeneratorType):
                    return self._name(parent, holder, 0)
            return f"function {holder.__qualname__}"
        kind = type(holder).__name__
        if kind == _CACHE:
            return f"the cache of {holder.__qualname__}"
        what = "a closure" if isinstance(holder, types.CellType) else f"a {kind}"
        containers = (dict, list, tuple, set, frozenset, types.CellType)
        if not isinstance(holder, containers) or not depth:
            return what
        searched = [holder]
        self._own.add(id(searched))
        parents = self._referrers(searched)
        parents.sort(key=lambda parent: not _is_named(parent))
        if isinstance(holder, dict):
            key = _key_of(holder, value)
            for parent in parents:
                if isinstance(parent, type) or _attributes_of(parent) is holder:
                    return f"attribute {key}{self._name(parent, holder, 0)}"
            what = f"{key}{what}" if key else what
        if not parents:
            return what
        if type(parents[0]).__name__ == _CACHE:
            return self._name(parents[0], holder, 0)
        return f"{what} in {self._name(parents[0], holder, depth - 1)}"


_DEPTH = 6
_CACHE = "_lru_cache_wrapper"
_GENERATORS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_LIST_ITERATOR: type = type(iter([0]))


def _is_named(holder: Any) -> bool:
    return isinstance(holder, (type, types.ModuleType, types.FunctionType))


# No closures and no generators here: their cells would be found among the holders.


def _holds(holder: Any, value: Any) -> bool:
    parts = [holder]
    if isinstance(holder, _GENERATORS):
        parts += _frames_of(holder)
    for part in parts:
        for held in gc.get_referents(part):
            if held is value:
                return True
    return False


def _attributes_of(value: Any) -> Any:
    return value.__dict__ if type(value).__dictoffset__ else None


def _key_of(holder: dict[Any, Any], value: Any) -> str:
    for key, held in holder.items():
        if held is value:
            return f"`{key}` of "
    return ""
