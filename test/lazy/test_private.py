# Owner(s): ["oncall: jit"]

"""Private parts of PyTorch: a release that has changed one is refused, and gives no wrong results."""

import functools
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
import textwrap
import types
import typing
import unittest
from pathlib import Path

import torch
import torch._dynamo.eval_frame
import torch._inductor.codegen.cpp_wrapper_cpu
import torch._inductor.compile_fx
import torch._inductor.freezing
from expecttest import TestCase

import torch_lazy_ext
from torch_lazy_ext import _private

ROOT = Path(__file__).resolve().parents[2]
if torch.distributed.is_available():
    importlib.import_module("torch.distributed._functional_collectives")
    ENTRIES = _private.every()
else:
    ENTRIES = _private.ENTRIES + _private.DYNAMO + _private.INDUCTOR


class Impostor:
    """One thing of each kind that an entry can be, none of them right."""

    def python(self, something_else):
        pass

    things: typing.ClassVar = {
        "function": python,
        "function in C": len,
        "method": str.upper,
        "class method": vars(dict)["fromkeys"],
        "property": types.FunctionType.__globals__,
        "class": int,
    }


def planted(entry, thing):
    """A lookup that finds `thing` in the place of one entry."""

    def find(place, name):
        if (place, name) != (entry.place, entry.name):
            return _private.lookup(place, name)
        if thing is None:
            raise AttributeError(name)
        return thing

    return find


class TableTest(TestCase):
    def test_as_they_are(self):
        for entry in ENTRIES:
            self.assertIsNone(_private.difference(entry))

    def refused(self, entry, thing):
        with self.assertRaisesRegex(
            _private.PrivateApiError, f"has changed one: .*{entry.path}.*{entry.use[:8]}"
        ):
            _private.check([entry], planted(entry, thing))

    def test_gone(self):
        for entry in ENTRIES:
            with self.subTest(entry.path):
                self.refused(entry, None)

    def test_of_another_kind(self):
        for entry in ENTRIES:
            for kind, thing in Impostor.things.items():
                if not isinstance(thing, _private.KINDS[entry.kind]):
                    with self.subTest(entry.path, kind=kind):
                        self.refused(entry, thing)

    def test_other_parameters(self):
        for entry in ENTRIES:
            if entry.kind == "function":
                found = _private.lookup(entry.place, entry.name)
                found = getattr(found, "__func__", found)

                def one_more(*args, **kwargs):
                    pass

                def renamed(something_else):
                    pass

                parameters = [*inspect.signature(found).parameters.values()]
                parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
                extra = inspect.Parameter("one_more", inspect.Parameter.KEYWORD_ONLY)
                one_more.__signature__ = inspect.Signature([*parameters, extra])
                with self.subTest(entry.path):
                    self.refused(entry, one_more)
                    self.refused(entry, renamed)

    def test_one_more_with_a_default(self):
        def zero_grad(self, set_to_none=True, *, lazily=False):
            pass

        (entry,) = (e for e in ENTRIES if e.path == "torch.nn.Module.zero_grad")
        _private.check([entry], planted(entry, zero_grad))

    def test_not_called(self):
        called = [e for e in ENTRIES if e.caller]
        self.assertGreater(len(called), 10)
        for entry in called:
            place, _, name = entry.caller.rpartition(".")

            def find(where, what, place=place, name=name):
                return (
                    (lambda: None)
                    if (where, what) == (place, name)
                    else _private.lookup(where, what)
                )

            with (
                self.subTest(entry.path),
                self.assertRaisesRegex(
                    _private.PrivateApiError, f"{entry.caller} does not call {entry.path}"
                ),
            ):
                _private.check([entry], find)

    def test_optimizers_that_create_state(self):
        # All that a capture replaces stand in the table.
        found = {
            name
            for name, cls in vars(torch.optim).items()
            if isinstance(cls, type) and "_init_group" in vars(cls)
        }
        listed = {e.place.rpartition(".")[2] for e in ENTRIES if e.name == "_init_group"}
        self.assertEqual(found, listed)

    def test_tests_that_notice(self):
        for entry in ENTRIES:
            self.assertTrue((ROOT / "test" / "lazy" / f"{entry.notice}.py").exists(), entry)

    @unittest.skipUnless((ROOT / "docs").exists(), "tests without their checkout")
    def test_page(self):
        # To write it: python -c "from torch_lazy_ext import _private; print(_private.table())"
        self.assertIn(_private.table(), (ROOT / "docs" / "private.md").read_text())


@functools.cache
def where():
    """The search path in which this very package is found."""
    return os.pathsep.join([str(Path(torch_lazy_ext.__file__).parents[1]), *sys.path])


def run(program):
    """What a program prints in a process of its own, and whether it succeeded."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tempfile.gettempdir(),
        env={**os.environ, "PYTHONPATH": where()},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr, done.returncode == 0


class ImportTest(TestCase):
    """The same at the import of the package."""

    def refused(self, program, message):
        text, fine = run(program)
        self.assertFalse(fine, text)
        self.assertIn(message, text)

    def test_of_another_kind(self):
        self.refused(
            """
            import torch
            torch._tensor_str._add_suffixes = print
            import torch_lazy_ext
            """,
            "PrivateApiError: torch_lazy_ext relies on private parts of torch, and this torch "
            f"({torch.__version__}) has changed one: torch._tensor_str._add_suffixes is a "
            "builtin_function_or_method, and no function (called: the text of a tensor). ",
        )

    def test_apply_that_is_not_called(self):
        self.refused(
            """
            import torch
            torch.autograd.Function.apply = classmethod(lambda cls, *args: None)
            import torch_lazy_ext
            """,
            "torch.autograd.Function.apply does not call torch._C._FunctionBase.apply",
        )

    def test_inductor(self):
        self.refused(
            """
            import torch
            import torch._inductor.freezing_utils as utils
            utils.record_has_frozen_params = lambda module, more: None
            import torch_lazy_ext
            from torch_lazy_ext import _inductor
            """,
            "torch._inductor.freezing_utils.record_has_frozen_params takes (module, more), and not "
            "(gm)",
        )

    def test_dispatch_key_taken(self):
        self.refused(
            """
            import torch
            library = torch.library.Library("_", "IMPL")
            library.fallback(lambda *args, **kwargs: None, "DeferredInit")
            import torch_lazy_ext
            """,
            "ImportError: torch_lazy_ext records through PyTorch's dispatch key DeferredInit, and "
            "something that was imported before has a fallback of its own there (torchdistx is one "
            "that does): import torch_lazy_ext in a process without it",
        )

    def test_other_keys_are_left(self):
        # PyTorch's own fake tensors have a fallback on Fake from 2.15 on.
        text, fine = run(
            """
            import torch
            library = torch.library.Library("_", "IMPL")
            library.fallback(lambda *args, **kwargs: None, "Fake")
            library.fallback(lambda *args, **kwargs: None, "CustomRNGKeyId")
            import torch_lazy_ext
            def f(x):
                x.add_(1)
                return x[0] * 2, torch.zeros(2)
            graph = torch_lazy_ext.extract_compiled_graph(f, (torch.ones(2, 3),))
            x = torch.ones(2, 3)
            print(graph(x)[0].tolist(), x.sum().item())
            """
        )
        self.assertTrue(fine, text)
        self.assertEqual(text, "[4.0, 4.0, 4.0] 12.0\n")

    def test_key_is_taken_for_good(self):
        self.refused(
            """
            import torch
            import torch_lazy_ext
            library = torch.library.Library("_", "IMPL")
            library.fallback(lambda *args, **kwargs: None, "DeferredInit")
            """,
            "DeferredInit",
        )


if __name__ == "__main__":
    unittest.main()
