"""Training steps per second and peak memory: eager, extracted, torch.compile.

    python tools/benchmark/training_step.py [mlp transformer ...] [--contestants eager ...]

Steps are timed in one process, the contestants taking turns, and the medians are compared. Peak
memory is that of a process with one contestant alone: the high-water mark of the resident set while
steps run, after the first ones, above what it was before the first step (Linux only). `compile
model` compiles the model alone and runs backward and optimizer as they are; `compile step` compiles
the whole function.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTESTANTS = ("eager", "extracted", "extracted, inductor", "compile model", "compile step")


def mlp() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10)), (
        torch.randn(32, 64),
        torch.randint(0, 10, (32,)),
    )


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(256, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.token(tokens))).transpose(1, 2)


def transformer() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    tokens = torch.randint(0, 256, (8, 32))
    return Transformer(), (tokens, tokens.roll(-1, 1))


def large() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Mostly parameters: 128 MiB of them, for the peak of memory."""
    layers = [nn.Linear(2048, 2048) for _ in range(8)]
    return nn.Sequential(*layers), (torch.randn(4, 2048), torch.randint(0, 2048, (4,)))


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]] = {
    "mlp": mlp,
    "transformer": transformer,
    "large": large,
}


def resident(entry: str) -> float:
    """MiB, from the process's status: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(entry):
            return int(line.split()[1]) / 1024
    raise LookupError(entry)


def forget_the_peak() -> None:
    """What building has left free goes back to the system, and the high-water mark is reset."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def make_step(name: str, contestant: str) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callee: Callable[..., Tensor] = model
    if contestant == "compile model":
        callee = torch.compile(model)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(callee(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step: Callable[..., Tensor] = train_step
    if contestant == "compile step":
        step = torch.compile(train_step)
    elif contestant.startswith("extracted"):
        from torch_lazy_ext import extract_compiled_graph

        backend = "inductor" if contestant.endswith("inductor") else "torchscript"
        step = extract_compiled_graph(train_step, batch, backend=backend)
    for _ in range(4):
        step(*batch)
    return lambda: step(*batch)


def measure_times(name: str, contestants: list[str], seconds: float) -> dict[str, Any]:
    """The median time of a step, in seconds, of each contestant."""
    steps = {contestant: make_step(name, contestant) for contestant in contestants}
    times: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end:
        for contestant, step in steps.items():
            for _ in range(4):
                begin = time.perf_counter()
                step()
                times[contestant].append(time.perf_counter() - begin)
    return {contestant: statistics.median(t) for contestant, t in times.items()}


def measure_memory(name: str, contestant: str, seconds: float) -> dict[str, Any]:
    """The peak, in MiB, and how long the first four steps took, in seconds."""
    torch.manual_seed(0)
    forget_the_peak()
    before = resident("VmRSS")
    begin = time.perf_counter()
    step = make_step(name, contestant)
    ready = time.perf_counter() - begin
    forget_the_peak()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        step()
    return {"peak": resident("VmHWM") - before, "ready": ready}


def in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--here"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="model")
    parser.add_argument("--contestants", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contestant")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    contestants, seconds = options.contestants, options.seconds
    if options.here:
        torch.set_num_threads(1)
        name = options.models[0]
        if options.memory:
            print(json.dumps(measure_memory(name, contestants[0], seconds)))
        else:
            print(json.dumps(measure_times(name, contestants, seconds)))
        return
    for name in options.models:
        common = [name, "--seconds", str(seconds), "--contestants"]
        times = in_a_process(*common, *contestants)
        for contestant in contestants:
            memory = in_a_process(*common, contestant, "--memory")
            print(
                f"{name:12} {contestant:20} {1 / times[contestant]:9.1f} steps/s "
                f"{times[contestants[0]] / times[contestant]:6.2f} x {contestants[0]} "
                f"{memory['peak']:8.1f} MiB above the start {memory['ready']:7.2f} s "
                "for the first four",
                flush=True,
            )


if __name__ == "__main__":
    main()
