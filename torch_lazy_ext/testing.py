"""Test kit: is a module, captured once and replayed on fresh arguments, the module run by eager?

    import unittest
    from torch_lazy_ext.testing import maketest

    class MyTest(unittest.TestCase):
        test_mine = maketest(MyModule)

`maketest` makes the test method, `verify_reusing_compiled_graph` is what it checks; the rest are
the parts they are made of. What runs as the oracle is always a deep copy of the module, on deep
copies of the arguments, from the same state of the random number generator.
"""

import contextlib
import copy
import dis
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import torch_lazy_ext
from torch_lazy_ext import config

__all__ = [
    "allclose",
    "force_fallback_ctx_mgr",
    "gen_rand_args",
    "maketest",
    "nop_ctx_mgr",
    "verify_reusing_compiled_graph",
]


@contextlib.contextmanager
def force_fallback_ctx_mgr(fallback_op: str) -> Iterator[None]:
    """Make the lazy device fall back to eager for `fallback_op` (such as "aten::sub") inside."""
    before = config.get_force_fallback()
    config.set_force_fallback(fallback_op)
    try:
        yield
    finally:
        config.set_force_fallback(before)


@contextlib.contextmanager
def nop_ctx_mgr() -> Iterator[None]:
    """Change nothing: stands where a context manager is asked for and none is needed."""
    yield


def gen_rand_args(mod: nn.Module | Callable[..., Any]) -> list[torch.Tensor]:
    """Random float32 tensors of shape (2, 3), one for each argument a call of `mod` needs.

    Arguments with a default and variadic ones are left out. Raises TypeError where an argument
    without a default is keyword-only, since a list cannot hold it.
    """
    function = mod.forward if isinstance(mod, nn.Module) else mod
    needed = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    for p in needed:
        if p.kind is p.KEYWORD_ONLY:
            raise TypeError(f"gen_rand_args makes positional arguments, and {p.name!r} is not one")
    return [torch.randn(2, 3) for _ in needed]


def _difference(
    expected: Any, actual: Any, rtol: float | None = None, atol: float | None = None
) -> str | None:
    """The first difference between two pytrees in words, or None; see `allclose`."""
    expected_leaves, expected_spec = pytree.tree_flatten_with_path(expected)
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    if expected_spec != actual_spec:
        return f"structure: expected {expected_spec}, got {actual_spec}"
    for (path, want), got in zip(expected_leaves, actual_leaves, strict=True):
        where = pytree.keystr(path) or "the value"
        if type(want) is not type(got):
            return f"{where}: expected {type(want).__name__}, got {type(got).__name__}"
        if isinstance(want, torch.Tensor):
            try:
                torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)
            except AssertionError as e:
                return f"{where}: {e}"
            if want.requires_grad != got.requires_grad:
                return f"{where}: expected requires_grad={want.requires_grad}"
        elif want != got and not (want != want and got != got):  # Equal, or both NaN.
            return f"{where}: expected {want!r}, got {got!r}"
    return None


def allclose(
    expected: Any, actual: Any, rtol: float | None = None, atol: float | None = None
) -> bool:
    """Whether two pytrees have one structure and equal leaves.

    Tensors agree in type, dtype, shape, layout, device and requires_grad, and in value within
    the tolerances of `torch.testing.assert_close` for their dtype unless `rtol` and `atol` are
    given; NaN equals NaN. Other leaves agree in type and value.
    """
    return _difference(expected, actual, rtol, atol) is None


def _state(mod: Any) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module by name, also those outside its state_dict."""
    if not isinstance(mod, nn.Module):
        return {}
    return {**dict(mod.named_parameters()), **dict(mod.named_buffers())}


def _compare_call(
    oracle: Callable[..., Any], mod: Any, graph: Callable[..., Any], args: list[Any]
) -> Any:
    """Call `oracle` and `graph` on copies of `args`, and raise AssertionError where they differ.

    `oracle` is an eager copy of `mod`, whose weights and buffers `graph` uses and updates.
    Compared are the results, and after the call the arguments, the module's state and the random
    number generator. Returns what `graph` returned.
    """
    eager_args, replay_args = copy.deepcopy(args), copy.deepcopy(args)
    rng_state = torch.get_rng_state()
    expected = oracle(*eager_args)
    rng_after_eager = torch.get_rng_state()
    torch.set_rng_state(rng_state)
    actual = graph(*replay_args)
    for what, want, got in (
        ("results", expected, actual),
        ("arguments after the call", eager_args, replay_args),
        ("module state after the call", _state(oracle), _state(mod)),
        ("random number generator after the call", rng_after_eager, torch.get_rng_state()),
    ):
        difference = _difference(want, got)
        if difference is not None:
            raise AssertionError(f"{what} differ from eager: {difference}")
    return actual


def _extract_untouched(mod: Any, args: list[Any]) -> Callable[..., Any]:
    """Extract `mod`, and raise AssertionError where that changed something it must not change."""

    def surroundings() -> dict[str, Any]:
        return copy.deepcopy(
            {"arguments": args, "module state": _state(mod), "RNG state": torch.get_rng_state()}
        )

    before = surroundings()
    try:
        return torch_lazy_ext.extract_compiled_graph(mod, args)
    finally:
        # Also when the extraction raises: half a capture must leave no traces either.
        difference = _difference(before, surroundings(), rtol=0, atol=0)
        if difference is not None:
            raise AssertionError(f"extraction changed what it was given: {difference}")


def verify_reusing_compiled_graph(
    mod: nn.Module | Callable[..., Any],
    exception_msg_pattern: str | None,
    ncase: int = 10,
    make_args: Callable[[], list[Any]] | None = None,
) -> None:
    """Extract the graph of `mod` and compare it with eager on `ncase` sets of fresh arguments.

    `make_args` makes the arguments of one call; without it they are those of `gen_rand_args`.
    Prints the bytecode of the forward and what the graph returns for the arguments it was
    captured with. With `exception_msg_pattern` the extraction must raise a RuntimeError whose
    message the pattern is found in, and nothing is replayed. Raises AssertionError for anything
    else than that, and passes on an exception that was not expected.
    """
    dis.dis(mod.forward if isinstance(mod, nn.Module) else mod)
    oracle = copy.deepcopy(mod)
    make_args = make_args or functools.partial(gen_rand_args, mod)
    args = list(make_args())

    try:
        graph = _extract_untouched(mod, args)
    except RuntimeError as e:
        if exception_msg_pattern is None:
            raise
        if re.search(exception_msg_pattern, str(e)) is None:
            raise AssertionError(
                f"the extraction's message does not match {exception_msg_pattern!r}: {e}"
            ) from e
        return
    if exception_msg_pattern is not None:
        raise AssertionError(
            f"the extraction raised nothing, expected a match of {exception_msg_pattern!r}"
        )

    print("return value of the extracted graph:", _compare_call(oracle, mod, graph, args))

    failures = []
    for i in range(ncase):
        try:
            _compare_call(oracle, mod, graph, list(make_args()))
        except AssertionError as e:
            failures.append(f"case {i}: {e}")
    if failures:
        raise AssertionError("\n".join([f"{len(failures)} of {ncase} cases failed", *failures]))


def maketest(
    module_cls: Callable[[], nn.Module | Callable[..., Any]],
    exception_msg_pattern: str | None = None,
    ctxmgr: contextlib.AbstractContextManager[Any] | Callable[..., Any] | None = None,
    make_args: Callable[[], list[Any]] | None = None,
) -> Callable[[Any], None]:
    """A test method: `verify_reusing_compiled_graph` on what `module_cls()` makes.

    `make_args` makes the arguments of one call; without it they are those of `gen_rand_args`.
    `ctxmgr` is entered around it: a context manager, or a function without arguments that makes
    one. The result of a `@contextlib.contextmanager` function is made anew for each run, so the
    test can run any number of times. The random numbers are the same in each run, and the
    caller's generator is left as it was.
    """

    def run() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            verify_reusing_compiled_graph(module_cls(), exception_msg_pattern, make_args=make_args)

    def test(self: Any) -> None:
        if ctxmgr is None:
            run()
        elif isinstance(ctxmgr, contextlib.ContextDecorator):
            # Used as a decorator, a generator's context manager is one that can be used again.
            ctxmgr(run)()
        elif isinstance(ctxmgr, contextlib.AbstractContextManager):
            with ctxmgr:
                run()
        else:
            with ctxmgr():
                run()

    return test
