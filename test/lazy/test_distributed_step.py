# Owner(s): ["oncall: distributed"]

"""Training steps with collectives, in 2 and in 4 processes on gloo.

Each scenario is a function that every process runs; it raises where something is wrong. One launch
of `torchrun` runs all of them and prints a line for each, and each test looks for its lines.
"""

import copy
import os
import subprocess
import sys
import traceback
import unittest
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_lazy_ext import UnsupportedError, extract_compiled_graph

STEPS = 6
ROWS = 4  # of a batch in each process


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(i: int, rows: int) -> tuple[Tensor, Tensor]:
    """The batch of step i, of all processes together; each takes its share of the rows."""
    generator = torch.Generator().manual_seed(i)
    count = rows * dist.get_world_size()
    x = torch.randn(count, 4, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


def share(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors)


def make_step(
    network: nn.Module, average: Callable[[list[Tensor]], Any] = lambda gradients: None
) -> tuple[Callable[..., Tensor], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        average([p.grad for p in network.parameters()])
        optimizer.step()
        return loss

    return step, optimizer


def assert_same_everywhere(parameters: Any) -> None:
    for p in parameters:
        mine = p.detach().clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, p), "the processes have different parameters"


def assert_trains_like_one_process(
    wrap: Callable[[nn.Module], nn.Module], average: Callable[[list[Tensor]], Any]
) -> None:
    """Against eager in the same processes, and against one process with all the rows."""
    network, eager, alone = wrap(model()), wrap(model()), model()
    step, _ = make_step(network, average)
    eager_step, _ = make_step(eager, average)
    alone_step, _ = make_step(alone)
    graph = extract_compiled_graph(step, share(batch(0, ROWS)))
    for i in range(STEPS):
        whole = batch(i, ROWS)
        loss = graph(*share(whole))
        expected = eager_step(*share(whole))
        alone_step(*whole)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for p, q, r in zip(network.parameters(), eager.parameters(), alone.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(p, r, rtol=1e-9, atol=1e-9)
        assert_same_everywhere(network.parameters())
    # The first step, which creates the state of the optimizer, and all others.
    assert len(graph.specializations) == 1, graph.explain()
    assert sum(s.hits for s in graph.specializations) == STEPS, graph.explain()


def plain_all_reduce(gradients: list[Tensor]) -> None:
    for g in gradients:
        dist.all_reduce(g)
        g /= dist.get_world_size()


def asynchronous_all_reduce(gradients: list[Tensor]) -> None:
    works = [dist.all_reduce(g, async_op=True) for g in gradients]
    for work in works:
        work.wait()
    for g in gradients:
        g /= dist.get_world_size()


def functional_all_reduce(gradients: list[Tensor]) -> None:
    for g in gradients:
        g.copy_(functional.all_reduce(g, "sum", dist.group.WORLD) / dist.get_world_size())


def scenario_plain_all_reduce() -> None:
    assert_trains_like_one_process(lambda m: m, plain_all_reduce)


def scenario_asynchronous_all_reduce() -> None:
    assert_trains_like_one_process(lambda m: m, asynchronous_all_reduce)


def scenario_functional_all_reduce() -> None:
    assert_trains_like_one_process(lambda m: m, functional_all_reduce)


def scenario_data_parallel() -> None:
    assert_trains_like_one_process(DistributedDataParallel, lambda gradients: None)


def scenario_data_parallel_accumulation() -> None:
    """Two micro-steps, the first of them under no_sync()."""
    networks = [DistributedDataParallel(model()) for _ in range(2)]
    steps = []
    for network in networks:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor, network=network, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            half = len(x) // 2
            with network.no_sync():
                F.cross_entropy(network(x[:half]), y[:half]).backward()
            loss = F.cross_entropy(network(x[half:]), y[half:])
            loss.backward()
            optimizer.step()
            return loss

        steps.append(step)
    graph = extract_compiled_graph(steps[1], share(batch(0, ROWS)))
    for i in range(STEPS):
        steps[0](*share(batch(i, ROWS)))
        graph(*share(batch(i, ROWS)))
        for p, q in zip(*(network.parameters() for network in networks)):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert len(graph.specializations) == 1, graph.explain()


def scenario_captures_at_different_calls() -> None:
    """Rank 0 sees batches of two sizes, and captures where the others replay."""
    network, eager = model(), model()
    step, _ = make_step(network, plain_all_reduce)
    eager_step, _ = make_step(eager, plain_all_reduce)
    graph = extract_compiled_graph(step, share(batch(0, ROWS)))
    for i in range(STEPS):
        x, y = share(batch(i, ROWS))
        if dist.get_rank() == 0 and i % 3 == 2:
            x, y = x[:2], y[:2]
        graph(x, y)
        eager_step(x, y)
        for p, q in zip(network.parameters(), eager.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert len(graph.specializations) == (2 if dist.get_rank() == 0 else 1), graph.explain()


def scenario_guard_before_collective() -> None:
    """A branch on the data of one process: its run must not be thrown away half way."""
    network, eager = model(), model()

    def make(network: nn.Module) -> Callable[..., Tensor]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            scale = 0.5 if x.sum() > 0 else 1.0
            for p in network.parameters():
                p.grad.mul_(scale)
                dist.all_reduce(p.grad)
            optimizer.step()
            return loss

        return step

    eager_step = make(eager)
    graph = extract_compiled_graph(make(network), share(batch(0, ROWS)))
    for i in range(3 * STEPS):
        args = share(batch(i, ROWS))
        graph(*args)
        eager_step(*args)
        for p, q in zip(network.parameters(), eager.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert len(graph.specializations) == 2, graph.explain()


def scenario_gather_and_scatter() -> None:
    world = dist.get_world_size()

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gathered = x.new_empty(world * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x)
        scattered = torch.empty_like(x)
        dist.reduce_scatter_tensor(scattered, gathered * 2)
        first = x * 3
        dist.broadcast(first, world - 1)
        return gathered, scattered, first

    graph = extract_compiled_graph(step, share(batch(0, ROWS))[:1])
    for i in range(3):
        x = share(batch(i, ROWS))[0].contiguous()
        for want, got in zip(step(x.clone()), graph(x)):
            assert torch.equal(want, got)


def scenario_value_of_a_collective() -> None:
    def step(x: Tensor) -> Tensor:
        total = x.sum()
        dist.all_reduce(total)
        return x if total > 0 else -x

    try:
        extract_compiled_graph(step, (torch.ones(2),))
    except UnsupportedError as e:
        assert "_c10d_functional" in str(e) and "after the call" in str(e), e
    else:
        raise AssertionError("the extraction looked at a value that is not there")


def scenario_fully_shard() -> None:
    from torch.distributed.fsdp import fully_shard

    network = copy.deepcopy(model())
    fully_shard(network)
    try:
        extract_compiled_graph(network, share(batch(0, ROWS))[:1])
    except UnsupportedError as e:
        assert "reduce_scatter_tensor" in str(e), e
    else:
        raise AssertionError("a sharded module was extracted")


SCENARIOS = {
    name.removeprefix("scenario_"): function
    for name, function in list(globals().items())
    if name.startswith("scenario_")
}


def work() -> None:
    """What each process of a launch does."""
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    for name, scenario in SCENARIOS.items():
        try:
            scenario()
            verdict = "ok"
        except Exception:
            verdict = "failed: " + traceback.format_exc().replace("\n", " | ")
        # At once, so that the lines of the processes do not mix.
        os.write(1, f"[{dist.get_rank()}] {name}: {verdict}\n".encode())
        if verdict != "ok":
            os._exit(1)  # the others would wait
    dist.destroy_process_group()


def launch(processes: int) -> str:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        __file__,
        "--work",
    ]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done.stdout


def maketest(name: str) -> Callable[[Any], None]:
    def test(self: Any) -> None:
        for rank in range(self.processes):
            line = f"[{rank}] {name}: ok"
            self.assertTrue(line in self.output.splitlines(), f"no {line!r} in\n{self.output}")

    return test


class _Launched:
    processes = 0
    output = ""

    @classmethod
    def setUpClass(cls) -> None:
        cls.output = launch(cls.processes)


for _name in SCENARIOS:
    setattr(_Launched, f"test_{_name}", maketest(_name))


@unittest.skipUnless(dist.is_available() and dist.is_gloo_available(), "needs gloo")
class TwoProcessesTest(_Launched, unittest.TestCase):
    processes = 2


@unittest.skipUnless(dist.is_available() and dist.is_gloo_available(), "needs gloo")
class FourProcessesTest(_Launched, unittest.TestCase):
    processes = 4


if __name__ == "__main__":
    if "--work" in sys.argv:
        work()
    else:
        unittest.main()
