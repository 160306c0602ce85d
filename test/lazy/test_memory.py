# Owner(s): ["oncall: jit"]

"""What captures and replays cost in memory: weights are shared, and nothing piles up."""

import gc
import re
import unittest
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_lazy_ext import extract_compiled_graph


def resident_mib(field: str = "VmRSS") -> float:
    """Resident memory of this process in MiB: now, or at its peak ("VmHWM")."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1024


def in_fresh_process(function: Callable[[], object]) -> object:
    """What `function()` returns in a process of its own, where no memory was freed before."""
    # One thread: those of OpenMP wait by spinning, which takes minutes on a machine that is busy.
    with ProcessPoolExecutor(
        max_workers=1,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as process:
        return process.submit(function).result()


def mlp(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())))


class Stateful(nn.Module):
    """Writes a buffer, draws random numbers and branches on its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("steps", torch.zeros(64, 64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        y = self.linear(x)
        if x.sum() > 0:
            y = y + torch.rand(64, 64)
        return {"y": y, "view": y[0]}


def added_by_large_weights() -> float:
    """MiB at the peak of extraction and first replay of a module with 384 MiB of weights."""
    with torch.no_grad():
        # Whatever the first extraction of a process imports does not depend on the weights.
        extract_compiled_graph(mlp(64, 6), (torch.rand(1, 64),))(torch.rand(1, 64))
        mod, x = mlp(4096, 6), torch.rand(1, 4096)
        before = resident_mib()
        extract_compiled_graph(mod, (x,))(x)
        return resident_mib("VmHWM") - before


def added_by_extractions() -> float:
    """MiB that 200 extractions of one module, each replayed once, leave behind."""
    mod, x = mlp(256, 4), torch.rand(64, 256)

    def extract(times: int) -> None:
        for _ in range(times):
            extract_compiled_graph(mod, (x,))(x)

    extract(20)
    before = resident_mib()
    extract(200)
    return resident_mib() - before


def added_by_replays() -> float:
    """MiB that 5,000 replays leave behind, with each way through the module taken in turn."""
    mod = Stateful()
    x = torch.rand(64, 64)
    with torch.no_grad():
        graph = extract_compiled_graph(mod, (x,))

        def replay(times: int) -> None:
            for i in range(times):
                graph(x if i % 2 else -x)

        replay(500)
        before = resident_mib()
        replay(5000)
        return resident_mib() - before


class MemoryTest(unittest.TestCase):
    def test_large_weights(self):
        self.assertLess(in_fresh_process(added_by_large_weights), 40)

    def test_many_extractions_of_one_module(self):
        self.assertLess(in_fresh_process(added_by_extractions), 25)

    def test_many_replays(self):
        self.assertLess(in_fresh_process(added_by_replays), 4)

    def test_graph_outlives_1100_others(self):
        """More graphs than the lazy tensor core's own cache holds (1,024) evict none of ours."""
        a, b = torch.randn(2, 3), torch.randn(2, 3)
        first = extract_compiled_graph(lambda x: x * -1, (a,))
        captured = first.specializations
        for factor in range(1100):
            extract_compiled_graph(lambda x, factor=factor: x * factor, (a,))
        torch.testing.assert_close(first(b), -b, rtol=0, atol=0)
        self.assertEqual(first.specializations, captured)  # It was replayed, not captured again.


if __name__ == "__main__":
    unittest.main()
