# Owner(s): ["oncall: distributed"]

"""A graph under DistributedDataParallel, in two processes started with torchrun, beside eager DDP.

Every process runs the scenarios of this file and leaves its differences in a JSON file; the tests
read it. `python -m torch.distributed.run --standalone --nproc-per-node 2 test_ddp.py OUT` runs them
by hand.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_lazy_ext import UnsupportedError, extract_compiled_graph

PROCESSES = 2
FEATURES = 8


class Unused(nn.Module):
    """The second process leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(FEATURES, FEATURES)
        self.sometimes = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x).tanh()
        return self.sometimes(y) if dist.get_rank() == 0 else y


def mlp() -> nn.Module:
    layers = [nn.Linear(FEATURES, FEATURES) for _ in range(4)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), *layers[2:])


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES), nn.Dropout(0.2))


class Pair:
    """A module under DDP in eager, and the graph of an equal one under DDP."""

    def __init__(self, make: Callable[[], nn.Module], **options: Any) -> None:
        torch.manual_seed(dist.get_rank())  # DDP sends the weights of the first process to all
        eager = make()
        captured = copy.deepcopy(eager)
        graph = extract_compiled_graph(captured, (self.batch(),))
        self.modules = [eager, captured]
        options = {"bucket_cap_mb": 1e-4, **options}
        self.ddp = [DistributedDataParallel(m, **options) for m in (eager, graph.as_module())]
        self.buckets = [0, 0]
        for i, ddp in enumerate(self.ddp):
            ddp.register_comm_hook(i, self._count)
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in self.modules]

    def _count(self, i: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.buckets[i] += 1
        averaged = dist.all_reduce(bucket.buffer().div_(PROCESSES), async_op=True).get_future()
        return averaged.then(lambda done: done.value()[0])

    @staticmethod
    def batch() -> Tensor:
        return torch.randn(4, FEATURES)

    def backward(self, x: Tensor) -> None:
        state = torch.get_rng_state()
        for ddp in self.ddp:
            torch.set_rng_state(state)
            ddp(x).pow(2).mean().backward()

    def compare(self) -> None:
        eager, captured = self.modules
        for (name, want), got in zip(eager.named_parameters(), captured.parameters()):
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(got.grad, want.grad, msg=lambda m, n=name: f"{n}.grad: {m}")
        torch.testing.assert_close(dict(captured.named_buffers()), dict(eager.named_buffers()))
        if self.buckets[0] != self.buckets[1]:
            raise AssertionError(f"{self.buckets[1]} buckets, expected {self.buckets[0]}")

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def trains(make: Callable[[], nn.Module], **options: Any) -> Pair:
    pair = Pair(make, **options)
    for _ in range(4):
        pair.backward(pair.batch())
        pair.compare()
        pair.step()
    pair.compare()
    return pair


def check_gradients_are_averaged() -> None:
    pair = trains(mlp)
    weights = [p.detach().clone() for p in pair.modules[1].parameters()]
    for mine in weights:
        others = mine.clone()
        dist.broadcast(others, src=0)
        torch.testing.assert_close(others, mine)


def check_buckets_fire() -> None:
    pair = trains(mlp)
    if pair.buckets[1] <= 4:
        raise AssertionError(f"{pair.buckets[1]} buckets in 4 steps")


def check_state() -> None:
    trains(batch_norm)


def check_unused_parameters() -> None:
    trains(Unused, find_unused_parameters=True)


def check_accumulation() -> None:
    pair = Pair(mlp)
    for _ in range(2):
        for ddp in pair.ddp:
            ddp.require_backward_grad_sync = False  # what no_sync() sets
        pair.backward(pair.batch())
        for ddp in pair.ddp:
            ddp.require_backward_grad_sync = True
        pair.backward(pair.batch())
        pair.compare()
        pair.step()


def check_extraction_of_ddp_is_refused() -> None:
    ddp = DistributedDataParallel(mlp())
    try:
        extract_compiled_graph(ddp, (Pair.batch(),))
    except UnsupportedError as e:
        if "as_module" not in str(e):
            raise
    else:
        raise AssertionError("a module under DistributedDataParallel was captured")


SCENARIOS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def worker(folder: Path) -> None:
    """Run every scenario as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, check in SCENARIOS.items():
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


class DistributedDataParallelTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(PROCESSES), __file__, folder]
            run = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            files = [Path(folder, f"{rank}.json") for rank in range(PROCESSES)]
            if run.returncode or not all(f.exists() for f in files):
                raise AssertionError(f"torchrun ended with {run.returncode}:\n{run.stdout}")
            cls.found = [json.loads(f.read_text()) for f in files]


def make_test(name: str) -> Callable[[DistributedDataParallelTest], None]:
    def test(self: DistributedDataParallelTest) -> None:
        for rank, found in enumerate(self.found):
            self.assertEqual(found[name], "", f"in process {rank}")

    return test


for _name in SCENARIOS:
    setattr(DistributedDataParallelTest, f"test_{_name}", make_test(_name))


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        worker(Path(sys.argv[1]))
    else:
        unittest.main()
