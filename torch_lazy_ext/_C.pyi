"""The types of the extension, written by tools/linter/stub.py."""

from __future__ import annotations

import collections.abc
import typing

import torch

__all__: list[str] = [
    "Attempt",
    "Call",
    "Caller",
    "Checked",
    "Cut",
    "Described",
    "FrozenProgram",
    "Hold",
    "Interrupted",
    "NativeProgram",
    "NotFinite",
    "OutputPlan",
    "Placement",
    "Program",
    "PythonProgram",
    "Ran",
    "RandomStates",
    "Recorder",
    "Runnable",
    "ScriptProgram",
    "Surroundings",
    "Switch",
    "TensorMeta",
    "ValueRef",
    "Variant",
    "ViewSequence",
    "call_with_numbers",
    "capturing",
    "claim_dispatch_key",
    "cut",
    "drop_hooks",
    "frames_know_functions",
    "grad_of",
    "has_tangent",
    "hook_calls",
    "hook_method",
    "hooks_of",
    "is_capture_tensor",
    "is_held",
    "is_hooked",
    "lower",
    "makes_views",
    "name_in_eager",
    "names_of",
    "names_within",
    "namespaces_of",
    "note_seed",
    "run_handlers",
    "same_bits",
    "set_stand_ins",
    "set_unsupported_error",
    "share_version_counter",
    "standalone",
    "stoppable",
    "unsupported_kind",
    "update_boundary",
    "whole_storage",
    "write_in_place",
]

class ValueRef:
    def __eq__(self, arg0: object) -> bool: ...
    def __hash__(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def node(self) -> int: ...

class ViewSequence:
    def __len__(self) -> int: ...
    def after(self, arg0: ViewSequence) -> ViewSequence | None:
        """
        What follows on `first`, which it begins with; None where it does not.
        """
    def apply(self, arg0: torch.Tensor) -> torch.Tensor:
        """
        The view of `base`, a real tensor, that this sequence leads to.
        """

class Described:
    @property
    def base_lifted(self) -> int: ...
    @property
    def captured(self) -> bool: ...
    @property
    def constant(self) -> bool: ...
    @property
    def lifted(self) -> int: ...
    @property
    def metadata_mutated(self) -> bool: ...
    @property
    def mutated(self) -> bool: ...
    @property
    def shares_version(self) -> bool: ...
    @property
    def storage(self) -> int: ...
    @property
    def storage_changed(self) -> bool: ...
    @property
    def value(self) -> ValueRef: ...
    @property
    def version(self) -> int: ...
    @property
    def views(self) -> ViewSequence: ...

class TensorMeta:
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def sizes(self) -> list[int]: ...
    @property
    def strides(self) -> list[int]: ...

class Checked:
    @property
    def bumps(self) -> dict[int, int]: ...
    @property
    def complete(self) -> bool: ...
    @property
    def learned(self) -> bool: ...
    @property
    def values(self) -> list[torch.Tensor]: ...

class Recorder:
    reads_offset: bool
    reads_views: bool
    refusal: str
    verify_layouts: bool
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def add_generator(self, arg0: torch.Generator, arg1: torch.Generator) -> None:
        """
        Record `generator` where an operator draws from `stand_in`.
        """
    def add_tangent(self, arg0: torch.Tensor) -> torch.Tensor: ...
    def alive(self) -> list[torch.Tensor]: ...
    def assign_data(self, arg0: torch.Tensor, arg1: torch.Tensor) -> None: ...
    def base_value(self, arg0: torch.Tensor) -> ValueRef: ...
    def communicates(self) -> bool: ...
    def depends_on_input(self, arg0: ValueRef) -> bool: ...
    def depends_on_tangent(self, arg0: ValueRef) -> bool: ...
    def describe(self, arg0: torch.Tensor) -> Described: ...
    def draws_only_from(self, arg0: collections.abc.Sequence[torch.Generator]) -> bool: ...
    def enter(self) -> None: ...
    def exit(self) -> None: ...
    def generators(self) -> list[torch.Generator]: ...
    def guards(self) -> list[tuple[ValueRef, torch.Tensor | list[int], bool, str]]: ...
    def has_failed_write(self, arg0: torch.Tensor) -> bool: ...
    def input(self, arg0: int) -> tuple[typing.Any, ...]:
        """
        One of `lifted`.
        """
    def input_values(self, arg0: collections.abc.Sequence[int]) -> list[ValueRef]: ...
    def is_input(self, arg0: ValueRef) -> bool: ...
    def is_liftable(self, arg0: torch.Tensor) -> bool: ...
    def is_nested(self, arg0: torch.Tensor) -> bool: ...
    def lift(self, tensor: torch.Tensor, constant: bool = False) -> torch.Tensor: ...
    def lifted(self) -> list[tuple[torch.Tensor, torch.Tensor, bool, int]]:
        """
        For each lifted tensor: it, its twin, whether it is a constant, and its group or -1.
        """
    def materialize(self, tensor: torch.Tensor, guard: bool = True) -> torch.Tensor: ...
    def nested_tensors(self) -> list[torch.Tensor]: ...
    def node_info(self, arg0: int) -> tuple[str, list[TensorMeta], str]: ...
    def note_leaf(self, twin: torch.Tensor, leaf: torch.Tensor) -> None: ...
    def operands(self, arg0: int) -> list[ValueRef]: ...
    def random_calls(self) -> int: ...
    def random_position(self) -> int: ...
    def rebind(self, arg0: torch.Tensor, arg1: torch.Tensor) -> None: ...
    def release(self) -> None: ...
    def resumed(self, arg0: collections.abc.Callable[..., typing.Any]) -> typing.Any:
        """
        Call `fn`, and record its operators after those of the program.
        """
    def run_checked(
        self,
        roots: collections.abc.Sequence[ValueRef],
        begin: int,
        given: collections.abc.Sequence[ValueRef],
        values: collections.abc.Sequence[torch.Tensor],
        all_before: int = 0,
    ) -> Checked: ...
    def seek(self, arg0: int) -> None: ...
    def share_storage(self, arg0: torch.Tensor) -> None:
        """
        Lift every tensor over the storage of this one as a view of the storage.
        """
    def source(self, arg0: int) -> torch.Tensor | None:
        """
        One of `sources`.
        """
    def sources(self) -> list[torch.Tensor | None]:
        """
        For each lifted tensor, the leaf of the capture that its gradient belongs to.
        """
    def twin_of(self, arg0: torch.Tensor) -> torch.Tensor: ...
    def watch(self, arg0: torch.Tensor, arg1: collections.abc.Callable[..., typing.Any]) -> None:
        """
        Call a function after each write to the memory of a tensor.
        """
    @property
    def fallbacks(self) -> list[tuple[str, int, str]]: ...
    @property
    def running(self) -> int: ...

class Program:
    def __init__(self, arg0: torch._C.Graph) -> None: ...
    def run(self, arg0: collections.abc.Sequence[torch.Tensor]) -> list[torch.Tensor]: ...
    @property
    def graph(self) -> torch._C.Graph: ...

class RandomStates:
    """
    States of generators, to be put back.
    """
    def __init__(self, arg0: collections.abc.Sequence[torch.Generator]) -> None: ...
    def put_back(self) -> None: ...

class Interrupted(BaseException):
    pass

class Hold:
    """
    While it is entered, Python's signal handlers wait.
    """
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...
    def __init__(self, stops: bool = True) -> None: ...

class Ran:
    def __init__(
        self,
        arg0: set[typing.Any] | frozenset[typing.Any],
        arg1: set[typing.Any] | frozenset[typing.Any],
        arg2: typing.Any,
        arg3: typing.Any,
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> bool: ...
    @property
    def entries(self) -> list[typing.Any]:
        """
        For each code object that ran: code, globals, type of the first argument,
        function, whether it is a library's, and the first argument where it is told apart.
        """

class Surroundings:
    @staticmethod
    def now() -> Surroundings: ...

class Placement:
    def __init__(self, offset: bool, view: bool, leaf: bool) -> None: ...

class Call:
    pass

class Variant:
    _checked: bool
    _communicates: bool
    _has_effects: bool
    _program: typing.Any
    _runs_python: bool
    _stale: bool
    def __init__(self, arg0: list[typing.Any]) -> None: ...
    def _add_bases(self, arg0: typing.Any) -> None: ...
    def _add_code(
        self,
        arg0: typing.Any,
        arg1: dict[typing.Any, typing.Any],
        arg2: bool,
        arg3: set[typing.Any] | frozenset[typing.Any],
        arg4: set[typing.Any],
    ) -> None: ...
    def _add_content(self, arg0: set[typing.Any] | frozenset[typing.Any]) -> None: ...
    def _add_entry(self, arg0: typing.Any, arg1: typing.Any) -> None: ...
    def _add_function(self, function: typing.Any, held: bool = True) -> None: ...
    def _add_getter(self, arg0: typing.Any, arg1: typing.Any) -> None: ...
    def _add_gradient_guard(
        self, arg0: int, arg1: typing.Any, arg2: Placement, arg3: int
    ) -> None: ...
    def _add_group(
        self, arg0: int, arg1: collections.abc.Sequence[tuple[int, int]], arg2: int
    ) -> None: ...
    def _add_hooks(self, arg0: int, arg1: list[typing.Any]) -> None: ...
    def _add_names(
        self,
        owner: typing.Any,
        names: set[typing.Any] | frozenset[typing.Any],
        places: set[typing.Any] | frozenset[typing.Any],
        all_keys: bool = False,
    ) -> None: ...
    def _add_order(self, arg0: typing.Any, arg1: list[typing.Any]) -> None: ...
    def _add_same_object(self, arg0: typing.Any, arg1: int) -> None: ...
    def _add_size(self, arg0: typing.Any, arg1: int) -> None: ...
    def _add_size_guard(self, arg0: int, arg1: collections.abc.Sequence[int]) -> None: ...
    def _add_tensor(self, arg0: typing.Any, arg1: typing.Any, arg2: Placement) -> None: ...
    def _add_tied(self, arg0: typing.Any, arg1: typing.Any) -> None: ...
    def _add_type_of(self, object: typing.Any, held: bool = True) -> None: ...
    def _add_value(self, arg0: typing.Any, arg1: typing.Any) -> None: ...
    def _add_value_guard(self, arg0: int, arg1: torch.Tensor) -> None: ...
    def _lift_argument(self, arg0: int) -> None: ...
    def _lift_fixed(self, arg0: torch.Tensor | None, arg1: bool) -> None: ...
    def _lift_gradient(self, arg0: int) -> None: ...
    def _lift_number(self, arg0: typing.Any, arg1: int) -> None: ...
    def _lift_slot(self, arg0: typing.Any, arg1: typing.Any, arg2: Placement) -> None: ...
    def _lift_storage(self) -> None: ...
    def _set_arguments(
        self,
        arg0: typing.Any,
        arg1: list[typing.Any],
        arg2: collections.abc.Sequence[int],
        arg3: typing.Any,
        arg4: Placement,
    ) -> None: ...
    def _set_identities(
        self,
        arg0: collections.abc.Sequence[tuple[int, typing.Any]],
        arg1: collections.abc.Sequence[int],
    ) -> None: ...
    def _set_native_finish(
        self, arg0: collections.abc.Sequence[tuple[int, int, int]], arg1: tuple[typing.Any, ...]
    ) -> None: ...
    def _set_precheck(self, arg0: Program, arg1: collections.abc.Sequence[int]) -> None: ...
    def _set_surroundings(self, arg0: Surroundings, arg1: list[typing.Any]) -> None: ...
    def _set_written(self, arg0: collections.abc.Sequence[int]) -> None: ...
    def has_state(self) -> bool:
        """
        Whether what it compares of Python, beside the arguments, is as it was.
        """
    def match(
        self, arg0: tuple[typing.Any, ...], arg1: dict[typing.Any, typing.Any]
    ) -> Call | None:
        """
        The call, or None when it is not like the captured one in all but its data.
        """
    def run(self, arg0: Call) -> typing.Any:
        """
        The program's result, with its effects.
        """
    @property
    def _generators(self) -> list[torch.Generator]: ...
    @_generators.setter
    def _generators(self, arg0: collections.abc.Sequence[torch.Generator]) -> None: ...
    @property
    def _num_roots(self) -> int: ...
    @_num_roots.setter
    def _num_roots(self, arg0: int) -> None: ...
    @property
    def _outputs(self) -> list[int]: ...
    @_outputs.setter
    def _outputs(self, arg0: collections.abc.Sequence[int]) -> None: ...
    @property
    def _overwritten(self) -> list[int]: ...
    @_overwritten.setter
    def _overwritten(self, arg0: collections.abc.Sequence[int]) -> None: ...
    @property
    def _parameters(self) -> list[int]: ...
    @_parameters.setter
    def _parameters(self, arg0: collections.abc.Sequence[int]) -> None: ...
    @property
    def hits(self) -> int: ...
    @hits.setter
    def hits(self, arg0: int) -> None: ...
    @property
    def misses(self) -> int: ...
    @misses.setter
    def misses(self, arg0: int) -> None: ...

class Caller:
    def __call__(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        """
        Call self as a function.
        """
    def __init__(self) -> None: ...
    def _set_variants(self, arg0: list[typing.Any]) -> None: ...
    def _touch(self, arg0: typing.Any) -> None: ...
    def _variants(self) -> list[typing.Any]:
        """
        Most recently used first.
        """
    @property
    def _calls_left(self) -> int: ...
    @_calls_left.setter
    def _calls_left(self, arg0: int) -> None: ...

class Runnable:
    """
    A graph in a form that runs.
    """
    def run(self, arg0: collections.abc.Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        The graph's outputs for these inputs.
        """

class ScriptProgram(Runnable):
    def __init__(self, arg0: torch._C.Graph) -> None: ...

class NotFinite(ArithmeticError):
    pass

class Attempt(Runnable):
    def __init__(
        self, arg0: Runnable, arg1: bool, arg2: collections.abc.Callable[..., typing.Any]
    ) -> None: ...

class Switch(Runnable):
    target: Runnable
    def __init__(self, arg0: Runnable) -> None: ...

class OutputPlan:
    def __init__(
        self,
        arg0: bool,
        arg1: int,
        arg2: tuple[collections.abc.Sequence[int], collections.abc.Sequence[int], int] | None,
    ) -> None:
        """
        Where an output comes from; `view`: (sizes, strides, offset) of a view of that.
        """

class NativeProgram(Runnable):
    def __init__(
        self,
        arg0: str,
        arg1: collections.abc.Sequence[int],
        arg2: collections.abc.Sequence[torch.Tensor],
        arg3: int,
        arg4: collections.abc.Sequence[OutputPlan],
        arg5: bool,
    ) -> None: ...

class FrozenProgram(Runnable):
    def __init__(
        self,
        arg0: Runnable,
        arg1: collections.abc.Sequence[int],
        arg2: collections.abc.Sequence[torch.Tensor],
        arg3: collections.abc.Callable[..., typing.Any],
    ) -> None: ...
    def is_fresh(self, arg0: collections.abc.Sequence[torch.Tensor]) -> bool: ...

class PythonProgram(Runnable):
    def __init__(self, arg0: typing.Any) -> None: ...

class Cut:
    def restore(self) -> None: ...

def call_with_numbers(
    arg0: str,
    arg1: tuple[typing.Any, ...],
    arg2: dict[typing.Any, typing.Any],
    arg3: collections.abc.Sequence[tuple[str, float | torch.SymFloat]],
) -> None:
    """
    Call an operator that returns nothing, with floats that the graph computes.
    """

def capturing() -> bool: ...
def claim_dispatch_key() -> None:
    """
    Once for the process. Raises ImportError where somebody else has a fallback on the key.
    """

def cut(
    arg0: collections.abc.Sequence[torch.Tensor],
    arg1: collections.abc.Sequence[torch.Tensor],
    arg2: collections.abc.Sequence[torch.Tensor],
) -> Cut:
    """
    Let histories end at `places`, in the leaves `stops`, until `restore()` is called.
    """

def drop_hooks(arg0: torch.Tensor) -> None:
    """
    Take the hooks from a tensor that stands for one of the user's.
    """

def grad_of(arg0: torch.Tensor) -> torch.Tensor | None:
    """
    The gradient of a tensor, leaf or not: `Tensor.grad` warns where nobody has asked for one.
    """

def has_tangent(arg0: torch.Tensor) -> bool:
    """
    Whether a tensor has a tangent of forward-mode AD.
    """

def hook_calls(arg0: type, arg1: typing.Any) -> None:
    """
    Let calls of the classes of a metaclass in a capturing thread ask `handler` first.
    """

def hook_method(arg0: typing.Any, arg1: typing.Any) -> None:
    """
    Let calls of a method in a capturing thread ask `handler` first.
    """

def hooks_of(arg0: torch.Tensor) -> list[list[typing.Any]]:
    """
    The functions that a backward calls when it comes by a tensor, of four kinds.
    """

def is_capture_tensor(arg0: torch.Tensor) -> bool: ...
def is_held() -> bool:
    """
    Whether a Hold is entered in this thread.
    """

def is_hooked(arg0: torch.Tensor, arg1: torch.Tensor) -> bool:
    """
    Whether there are hooks in the history that a view has beyond that of its base.
    """

def lower(
    recorder: Recorder,
    roots: collections.abc.Sequence[ValueRef],
    num_exposed: int,
    begin: int,
    end: int,
    boundary: collections.abc.Sequence[ValueRef] = [],
    random: bool = True,
    collectives: bool = True,
) -> tuple[torch._C.Graph, list[int]]: ...
def makes_views(arg0: str, arg1: str) -> bool:
    """
    Whether the results of an operator share the memory of an argument.
    """

def name_in_eager(arg0: torch.Tensor) -> str | None:
    """
    Of a tensor whose function of autograd is this package's: what eager's is called.
    """

def names_of(arg0: typing.Any) -> tuple[typing.Any, ...]:
    """
    What a code object names, a _code.Names.
    """

def names_within(arg0: typing.Any) -> tuple[typing.Any, ...]:
    """
    What a code object and those inside of it name, a _code.Names.
    """

def namespaces_of(arg0: torch._C.Graph) -> set[str]:
    """
    The namespaces of the operators of a graph.
    """

def note_seed(arg0: torch.Generator) -> None:
    """
    This thread has given a generator another seed, or state.
    """

def run_handlers() -> None:
    """
    Run the handlers that have waited, if no Hold is entered.
    """

def same_bits(arg0: torch.Tensor, arg1: torch.Tensor) -> bool:
    """
    Equal shapes, dtypes and values; 0.0 and -0.0 differ, a nan equals itself.
    """

def set_stand_ins(arg0: dict[typing.Any, typing.Any]) -> None: ...
def set_unsupported_error(arg0: typing.Any) -> None: ...
def share_version_counter(arg0: torch.Tensor, arg1: torch.Tensor) -> bool: ...
def standalone(
    arg0: collections.abc.Callable[..., typing.Any], *args: typing.Any, **kwargs: typing.Any
) -> typing.Any:
    """
    Call `fn` as if there were no capture, no autograd and no mode of any kind.
    """

def stoppable(
    arg0: collections.abc.Callable[..., typing.Any], *args: typing.Any, **kwargs: typing.Any
) -> typing.Any:
    """
    Call `fn`; in a Hold, a signal ends it with `Interrupted`.
    """

def unsupported_kind(arg0: torch.Tensor) -> str: ...
def update_boundary(
    arg0: Recorder,
    arg1: collections.abc.Sequence[ValueRef],
    arg2: collections.abc.Sequence[ValueRef],
) -> list[ValueRef]: ...
def whole_storage(arg0: torch.Tensor) -> torch.Tensor: ...
def write_in_place(arg0: torch._C.Graph, arg1: collections.abc.Sequence[int]) -> None: ...

frames_know_functions: bool = True
