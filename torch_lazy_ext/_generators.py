"""Record: what a program does to random number generators, as operators of the graph.

Seeding a generator, and reading or setting its state, reach no operator of PyTorch. Here they are
operators of their own, which stay in program order among those that draw. A program is given a
stand-in for each generator that it can reach: what it does to a stand-in is recorded, and the
generator itself does not move.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from torch_lazy_ext import _C, _lift, _moving
from torch_lazy_ext._errors import UnsupportedError

DEFAULT = torch.default_generator  # itself, also while a capture has the name replaced
_MASK = 2**64 - 1
_FRESH_SEED = 67280421310721  # c10::detail default_rng_seed_val: what torch.Generator() begins with

# The device tells shape inference from a run; `serial` keeps equal calls apart.
_library = torch.library.Library("torch_lazy_ext", "FRAGMENT")
_ORDERED = (torch.Tag.nondeterministic_seeded,)


def _define(schema: str, function: Any) -> None:
    _library.define(schema, tags=_ORDERED)
    _library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")


def _is_inference(device: torch.device | None) -> bool:
    return device is not None and device.type == "meta"


def _manual_seed(
    generator: torch.Generator, seed: int, serial: int, *, device: torch.device | None = None
) -> torch.Tensor:
    if not _is_inference(device):
        generator.manual_seed(seed & _MASK)
        _C.note_seed(generator)
    return torch.empty(0, dtype=torch.uint8, device=device)


def _initial_seed(
    generator: torch.Generator, serial: int, *, device: torch.device | None = None
) -> torch.Tensor:
    seed = 0 if _is_inference(device) else _signed(generator.initial_seed())
    return torch.full((), seed, dtype=torch.int64, device=device)


def _get_rng_state(
    generator: torch.Generator, serial: int, *, device: torch.device | None = None
) -> torch.Tensor:
    state = generator.get_state()
    return torch.empty_like(state, device=device) if _is_inference(device) else state


def _set_rng_state(
    generator: torch.Generator,
    state: torch.Tensor,
    serial: int,
    *,
    device: torch.device | None = None,
) -> torch.Tensor:
    if not state.is_meta:
        generator.set_state(state)
        _C.note_seed(generator)
    return torch.empty(0, dtype=torch.uint8, device=state.device)


_define(
    "manual_seed(Generator generator, int seed, int serial, *, Device? device=None) -> Tensor",
    _manual_seed,
)
_define(
    "initial_seed(Generator generator, int serial, *, Device? device=None) -> Tensor",
    _initial_seed,
)
_define(
    "get_rng_state(Generator generator, int serial, *, Device? device=None) -> Tensor",
    _get_rng_state,
)
_define(
    "set_rng_state(Generator generator, Tensor state, int serial, *, Device? device=None) "
    "-> Tensor",
    _set_rng_state,
)
_operators = torch.ops.torch_lazy_ext


def _signed(seed: int) -> int:
    seed &= _MASK
    return seed - 2**64 if seed >= 2**63 else seed


class Generators:
    """The generators of one capture.

    Attributes:
        made: those the program makes itself; a graph that draws from them runs one call at a time.
    """

    def __init__(self, recorder: _C.Recorder) -> None:
        self._recorder = recorder
        self._stand_ins: dict[int, tuple[torch.Generator, StandIn]] = {}
        self._real: dict[int, torch.Generator] = {}  # id of a stand-in -> what it stands for
        self._serial = 0
        self._states: list[tuple[torch.Tensor, torch.Generator, int]] = []  # handed out, when
        self.made: list[torch.Generator] = []

    def stand_in(self, generator: torch.Generator) -> StandIn:
        known = self._stand_ins.get(id(generator))
        if known is not None:
            return known[1]
        made = StandIn(self, device=generator.device)
        self._stand_ins[id(generator)] = (generator, made)
        self._real[id(made)] = generator
        self._recorder.add_generator(made, generator)
        return made

    def given(self, value: Any) -> Any:
        """What the program sees of an argument that is no tensor, or of a value of its state."""
        if isinstance(value, torch._C.Generator):
            return self.stand_in(value)
        return value

    @contextlib.contextmanager
    def in_place_of(self, state: _lift.State) -> Iterator[None]:
        """Put stand-ins in the place of the generators of the program's state.

        Raises UnsupportedError when one was moved in spite of that.
        """
        found = [
            (slot, value) for slot, value in state.values if isinstance(value, torch._C.Generator)
        ]
        known = [DEFAULT, *(value for _slot, value in found)]
        known += self._real.values()
        found = [(slot, value) for slot, value in found if not isinstance(slot.owner, tuple)]
        for slot, value in found:
            slot.write(self.stand_in(value))
        before = [g.get_state() for g in known]
        # What moves the default generator may be another thread. The program cannot, but where it
        # holds it in a tuple, in which no stand-in can be put.
        unseen = any(v is DEFAULT and isinstance(s.owner, tuple) for s, v in state.values)
        skipped = None if unseen or threading.active_count() == 1 else DEFAULT
        try:
            yield
        finally:
            for slot, value in found:
                if slot.read() is self.stand_in(value):
                    slot.write(value)
        for generator, state_before in zip(known, before):
            if generator is not skipped and not torch.equal(generator.get_state(), state_before):
                generator.set_state(state_before)
                raise UnsupportedError(
                    "the program moves a torch.Generator that it came to by a way which a capture "
                    "does not see (such as one in a tuple): use "
                    "torch.manual_seed, or keep the generator in an attribute"
                )

    def make(self, *args: Any, **kwargs: Any) -> torch.Generator:
        """What `torch.Generator(...)` gives to the program: made anew on each replay."""
        generator = torch._C.Generator(*args, **kwargs)
        if generator.device.type != "cpu":
            return generator
        self.made.append(generator)
        made = self.stand_in(generator)
        self.manual_seed(made, _FRESH_SEED)
        return made

    def known(self) -> list[torch.Generator]:
        """Those that a replay finds again."""
        return [DEFAULT, *self._real.values()]

    def real(self, generator: torch.Generator) -> torch.Generator:
        return self._real.get(id(generator), generator)

    # Each takes a stand-in or DEFAULT.

    def manual_seed(self, generator: torch.Generator, seed: Any) -> None:
        seed = torch._C.Generator().manual_seed(seed).initial_seed()  # or eager's own error
        _operators.manual_seed(self.real(generator), _signed(seed), self._next())

    def initial_seed(self, generator: torch.Generator) -> int:
        return int(_operators.initial_seed(self.real(generator), self._next())) & _MASK

    def get_state(self, generator: torch.Generator) -> torch.Tensor:
        """The state, as an eager tensor that stands for the recorded one.

        What a backward does with it, after the program, runs outside of the capture.
        """
        recorded = _operators.get_rng_state(self.real(generator), self._next())
        state = torch._C.Generator.get_state(self.real(generator))
        self._recorder.rebind(state, recorded)
        self._states.append((state, self.real(generator), self._recorder.random_calls()))
        return state

    def set_state(self, generator: torch.Generator, state: torch.Tensor) -> None:
        # Back to the present state: `torch.utils.checkpoint` around nothing random.
        now = (self.real(generator), self._recorder.random_calls())
        if not any(state is known and now == (of, count) for known, of, count in self._states):
            _operators.set_rng_state(self.real(generator), state, self._next())

    def _next(self) -> int:
        self._serial += 1
        return self._serial


class StandIn(torch._C.Generator):
    """Takes the place of a generator in a program that is captured."""

    _of: weakref.ref[Generators]  # which hold this

    def __new__(cls, generators: Generators, device: torch.device) -> StandIn:
        # PyTorch's stub says __init__, and its C++ code takes the device in __new__.
        made = super().__new__(cls, device=device)  # type: ignore[call-arg]
        made._of = weakref.ref(generators)
        return made

    @property
    def _generators(self) -> Generators:
        generators = self._of()
        if generators is None:
            raise UnsupportedError(
                "a torch.Generator is used that stood for one while a program was captured: use "
                "the generator itself, and keep none that a captured program has seen"
            )
        return generators

    def manual_seed(self, seed: int) -> StandIn:
        self._generators.manual_seed(self, seed)
        return self

    def initial_seed(self) -> int:
        return self._generators.initial_seed(self)

    def get_state(self) -> torch.Tensor:
        return self._generators.get_state(self)

    def set_state(self, state: torch.Tensor) -> StandIn:
        self._generators.set_state(self, state)
        return self

    def seed(self) -> int:
        raise unrepeatable("torch.Generator.seed")

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "the program copies or shares the state of a torch.Generator (at "
            f"{_moving.user_line()}): use get_state() and set_state()"
        )

    clone_state = graphsafe_get_state = graphsafe_set_state = get_offset = set_offset = _refuse


def unrepeatable(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"the program takes a seed from the system ({name}, at {_moving.user_line()}), which no "
        "replay can repeat: seed with a number, or before the call"
    )
