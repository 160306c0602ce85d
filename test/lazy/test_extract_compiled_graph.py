# Owner(s): ["oncall: jit"]

"""The main job: extract the graph of a small module once, replay it on fresh arguments."""

import sys
import unittest
import unittest.mock

import expecttest
import torch
from torch import nn

import torch_lazy_ext
from torch_lazy_ext.testing import force_fallback_ctx_mgr, gen_rand_args, maketest


class ModuleConstScale(nn.Module):
    def forward(self, a):
        return a * 2


class ModuleSub(nn.Module):
    def forward(self, a, b):
        return a - b


class ModuleAddcmul(nn.Module):
    """`value` is a Scalar argument: a constant of the graph, not one of its parameters."""

    def forward(self, a, b, c):
        return torch.addcmul(a, b, c, value=5)


class ModuleReturnMulti(nn.Module):
    def forward(self, a, b):
        return (b + 1, a - 1)


class ModuleEagerTensor(nn.Module):
    """A factory with an explicit eager device: part of the graph, fresh numbers on each call."""

    def forward(self, a):
        b = torch.randn(2, 3, device="cpu")
        return a + b


class ModuleReturnEagerTensorOnDefaultDevice(nn.Module):
    """No arguments, and a factory that names no device at all."""

    def forward(self):
        return torch.tensor((2, 3), dtype=torch.float32)


class ModuleReturnDupTensor(nn.Module):
    """The graph computes `c` once; the caller gets it twice."""

    def forward(self, a, b):
        c = a + b
        return a - b, c, a + 1, c


class ModuleInplaceUpdate(nn.Module):
    """The update must reach the caller's `a`, although no result holds it."""

    def forward(self, a, b):
        a.sub_(b)
        return b - 1, b + 1


class OptimizeTest(unittest.TestCase):
    test_sub = maketest(ModuleSub)
    test_ltc_fallback = maketest(
        ModuleSub,
        exception_msg_pattern="fallback.*aten::sub",
        ctxmgr=force_fallback_ctx_mgr("aten::sub"),
    )
    test_const_scale = maketest(ModuleConstScale)
    test_addcmul = maketest(ModuleAddcmul)
    test_return_multi = maketest(ModuleReturnMulti)
    test_eager_tensor = maketest(ModuleEagerTensor)
    test_return_eager_tensor_on_default_device = maketest(ModuleReturnEagerTensorOnDefaultDevice)
    test_return_dup_tensor = maketest(ModuleReturnDupTensor)
    test_inplace_update = maketest(ModuleInplaceUpdate)


class GraphTextTest(expecttest.TestCase):
    """The text of each graph. `EXPECTTEST_ACCEPT=1` rewrites the snapshots in this file."""

    maxDiff = None

    def text(self, module_cls):
        """graph_text() of a fresh module; must not depend on the values of the arguments."""
        mod = module_cls()
        first = torch_lazy_ext.extract_compiled_graph(mod, gen_rand_args(mod)).graph_text()
        again = torch_lazy_ext.extract_compiled_graph(mod, gen_rand_args(mod)).graph_text()
        self.assertEqual(first, again)
        return first

    def test_sub(self):
        self.assertExpectedInline(
            self.text(ModuleSub),
            """\
graph(%0 : float32[2, 3], %1 : float32[2, 3]):
  %2 : float32[2, 3] = aten::sub.Tensor(%0, %1)
  return (%2)
""",
        )

    def test_const_scale(self):
        self.assertExpectedInline(
            self.text(ModuleConstScale),
            """\
graph(%0 : float32[2, 3]):
  %1 : float32[2, 3] = aten::mul.Tensor(%0, 2)
  return (%1)
""",
        )

    def test_addcmul(self):
        self.assertExpectedInline(
            self.text(ModuleAddcmul),
            """\
graph(%0 : float32[2, 3], %1 : float32[2, 3], %2 : float32[2, 3]):
  %3 : float32[2, 3] = aten::addcmul(%0, %1, %2, value=5)
  return (%3)
""",
        )

    def test_return_multi(self):
        self.assertExpectedInline(
            self.text(ModuleReturnMulti),
            """\
graph(%0 : float32[2, 3], %1 : float32[2, 3]):
  %2 : float32[2, 3] = aten::add.Tensor(%1, 1)
  %3 : float32[2, 3] = aten::sub.Tensor(%0, 1)
  return (%2, %3)
""",
        )

    def test_eager_tensor(self):
        self.assertExpectedInline(
            self.text(ModuleEagerTensor),
            """\
graph(%0 : float32[2, 3]):
  %1 : float32[2, 3] = aten::randn([2, 3], dtype=float32, device=cpu, pin_memory=False)
  %2 : float32[2, 3] = aten::add.Tensor(%0, %1)
  return (%2)
""",
        )

    def test_return_eager_tensor_on_default_device(self):
        self.assertExpectedInline(
            self.text(ModuleReturnEagerTensorOnDefaultDevice),
            """\
graph():
  return ()
""",
        )

    def test_return_dup_tensor(self):
        self.assertExpectedInline(
            self.text(ModuleReturnDupTensor),
            """\
graph(%0 : float32[2, 3], %1 : float32[2, 3]):
  %2 : float32[2, 3] = aten::add.Tensor(%0, %1)
  %3 : float32[2, 3] = aten::sub.Tensor(%0, %1)
  %4 : float32[2, 3] = aten::add.Tensor(%0, 1)
  return (%3, %2, %4)
""",
        )

    def test_inplace_update(self):
        self.assertExpectedInline(
            self.text(ModuleInplaceUpdate),
            """\
graph(%0 : float32[2, 3], %1 : float32[2, 3]):
  %2 : float32[2, 3] = aten::sub.Tensor(%0, %1)
  %3 : float32[2, 3] = aten::sub.Tensor(%1, 1)
  %4 : float32[2, 3] = aten::add.Tensor(%1, 1)
  return (%3, %4, %2)
""",
        )


def main() -> None:
    """Run the tests, and say in three lines what was extracted and how it compared with eager."""
    extract, graphs = torch_lazy_ext.extract_compiled_graph, []

    def noted(*args, **kwargs):
        graphs.append(extract(*args, **kwargs))
        return graphs[-1]

    with unittest.mock.patch.object(torch_lazy_ext, "extract_compiled_graph", noted):
        result = unittest.main(exit=False).result
    used = [graph for graph in graphs if any(v.hits for v in graph.specializations)]
    variants = [variant for graph in used for variant in graph.specializations]
    operators = [len(graph.graph_text().splitlines()) - 2 for graph in used]
    calls = sum(variant.hits for variant in variants)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    equal = f"equal in all {calls} calls" if not failed else f"{failed} tests FAILED, see above"
    print(
        f"extracted: {len(used)} modules as {len(variants)} graphs of {sum(operators)} operators",
        f"replayed: {calls} calls, on fresh arguments, without the modules' Python",
        f"compared with eager (results, arguments, state, random numbers): {equal}",
        sep="\n",
        flush=True,
    )
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main()
