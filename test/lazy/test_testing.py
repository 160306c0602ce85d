# Owner(s): ["oncall: jit"]

"""The test kit must fail when the extraction is wrong, in each of the ways it says it checks.

What stands for the extraction here returns a function that is wrong on purpose.
"""

import contextlib
import io
import unittest
from unittest import mock

import torch
from torch import nn

from torch_lazy_ext import config
from torch_lazy_ext.testing import (
    allclose,
    force_fallback_ctx_mgr,
    gen_rand_args,
    maketest,
    nop_ctx_mgr,
)


class Sub(nn.Module):
    def forward(self, a, b):
        return a - b


class InplaceAndPair(nn.Module):
    def forward(self, a, b):
        a.sub_(b)
        return b - 1, b + 1


class Noise(nn.Module):
    def forward(self, a):
        return a + torch.randn(2, 3)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, a):
        self.calls += 1
        return a * 1


def eager(mod, args):
    return mod


class KitTest(unittest.TestCase):
    def run_kit(self, module_cls, extract, **kwargs):
        """The printed output of the test that `maketest` makes, with `extract` as extraction."""
        with (
            mock.patch("torch_lazy_ext.extract_compiled_graph", extract),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            maketest(module_cls, **kwargs)(self)
        return printed.getvalue()

    def assertCaught(self, pattern, module_cls, extract, **kwargs):
        with self.assertRaisesRegex(AssertionError, pattern):
            self.run_kit(module_cls, extract, **kwargs)

    def test_eager_itself_passes(self):
        for module_cls in (Sub, InplaceAndPair, Noise, Counter):
            with self.subTest(module_cls.__name__):
                self.run_kit(module_cls, eager)

    def test_prints_bytecode_and_result(self):
        printed = self.run_kit(Sub, eager)
        self.assertIn("BINARY", printed)
        self.assertIn("return value of the extracted graph: tensor(", printed)

    def test_wrong_results(self):
        self.assertCaught("results.*not close", Sub, lambda m, _: lambda a, b: a - b + 1e-3)
        self.assertCaught("results.*dtype", Sub, lambda m, _: lambda a, b: (a - b).double())
        self.assertCaught("results.*shape", Sub, lambda m, _: lambda a, b: (a - b)[None])
        self.assertCaught("structure", Sub, lambda m, _: lambda a, b: [a - b])
        self.assertCaught("structure", InplaceAndPair, lambda m, _: lambda *x: list(m(*x)))

    def test_right_only_on_the_captured_arguments(self):
        def bake(mod, args):
            out = mod(*args)
            return lambda *_: out

        self.assertCaught("10 of 10 cases", Sub, bake)

    def test_missing_side_effects(self):
        self.assertCaught(
            "arguments after", InplaceAndPair, lambda m, _: lambda a, b: (b - 1, b + 1)
        )
        self.assertCaught("module state after", Counter, lambda m, _: lambda a: a * 1)

    def test_random_numbers(self):
        self.assertCaught("results", Noise, lambda m, _: lambda a: a + torch.ones(2, 3))

        def draws_once_more(mod, args):
            def replay(a):
                out = mod(a)
                torch.rand(1)
                return out

            return replay

        self.assertCaught("random number generator", Noise, draws_once_more)

    def test_extraction_with_traces(self):
        def changes_argument(mod, args):
            args[0].add_(1)
            return mod

        def changes_module(mod, args):
            mod(*args)
            return mod

        def draws(mod, args):
            torch.rand(1)
            return mod

        def changes_and_raises(mod, args):
            args[0].add_(1)
            raise RuntimeError("refused")

        self.assertCaught("extraction changed.*arguments", Sub, changes_argument)
        self.assertCaught("extraction changed.*module state", Counter, changes_module)
        self.assertCaught("extraction changed.*RNG", Sub, draws)
        self.assertCaught(
            "extraction changed", Sub, changes_and_raises, exception_msg_pattern="refused"
        )

    def test_expected_exception(self):
        def refuse(mod, args):
            raise RuntimeError("because of fallback: aten::sub.Tensor=1")

        self.run_kit(Sub, refuse, exception_msg_pattern="fallback.*aten::sub")
        self.assertCaught("does not match", Sub, refuse, exception_msg_pattern="aten::mul")
        self.assertCaught("raised nothing", Sub, eager, exception_msg_pattern="fallback")
        with self.assertRaisesRegex(RuntimeError, "because of fallback"):
            self.run_kit(Sub, refuse)

    def test_arguments_of_the_caller(self):
        made = []

        def make_args():
            made.append([torch.randn(4), torch.randn(4)])
            return made[-1]

        self.run_kit(Sub, eager, make_args=make_args)
        self.assertEqual(len(made), 11)  # The capture's, and those of ten replays.
        with self.assertRaisesRegex(TypeError, "missing 1 required"):
            self.run_kit(Sub, eager, make_args=lambda: [torch.randn(4)])

    def test_context_manager_twice(self):
        seen = []

        def extract(mod, args):
            seen.append(config.get_force_fallback())
            return mod

        class Plain:
            def __enter__(self):
                seen.append("entered")

            def __exit__(self, *exc):
                seen.append("left")

        once = ["entered", "", "left"]
        for ctxmgr, expected in (
            (force_fallback_ctx_mgr("aten::sub"), ["aten::sub"]),
            (lambda: force_fallback_ctx_mgr("aten::sub"), ["aten::sub"]),
            (nop_ctx_mgr, [""]),
            (nop_ctx_mgr(), [""]),
            (Plain(), once),
            (Plain, once),
            (None, [""]),
        ):
            seen.clear()
            with (
                mock.patch("torch_lazy_ext.extract_compiled_graph", extract),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                test = maketest(Sub, ctxmgr=ctxmgr)
                test(self)
                test(self)
            self.assertEqual(seen, expected * 2)
        self.assertEqual(config.get_force_fallback(), "")

    def test_random_numbers_of_the_caller(self):
        before = torch.get_rng_state()
        self.run_kit(Noise, eager)
        self.assertTrue(torch.equal(before, torch.get_rng_state()))


class PartsTest(unittest.TestCase):
    def test_allclose(self):
        one, nan = torch.ones(2), torch.tensor([float("nan")])
        for expected, actual in (
            (one, one + 1e-7),
            (nan, nan.clone()),
            ({"a": [one, (2, None)]}, {"a": [one.clone(), (2, None)]}),
            (float("nan"), float("nan")),
        ):
            self.assertTrue(allclose(expected, actual))
        for expected, actual in (
            (one, one + 1e-3),
            (one, one.double()),
            (one, one[None]),
            (one, [one]),
            (one, nn.Parameter(one)),
            (one, one.clone().requires_grad_()),
            ({"a": one}, {"b": one}),
            (2, 2.0),
            (2, 3),
        ):
            self.assertFalse(allclose(expected, actual))
        self.assertTrue(allclose(one, one + 1e-3, rtol=0, atol=1e-2))

    def test_gen_rand_args(self):
        def function(a, b, c=1, *rest, d=2, **others):
            pass

        args = gen_rand_args(function)
        self.assertEqual([(x.shape, x.dtype) for x in args], [((2, 3), torch.float32)] * 2)
        self.assertFalse(torch.equal(*args))
        with self.assertRaisesRegex(TypeError, "'b'"):
            gen_rand_args(lambda a, *, b: a)


if __name__ == "__main__":
    unittest.main()
