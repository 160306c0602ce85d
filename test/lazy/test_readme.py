# Owner(s): ["oncall: jit"]

"""What the READMEs show as output is what their programs print."""

import copy
import functools
import itertools
import keyword
import random
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import torch
import torch.distributed.fsdp
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from torch_lazy_ext import extract_compiled_graph

ROOT = Path(__file__).resolve().parents[2]
MARK = "--- end of a block ---"


def stripped(text: str) -> str:
    """`text` without spaces at the ends of lines and newlines at its own."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


class ReadmeTest(unittest.TestCase):
    def check(self, readme: Path) -> None:
        """Run the Python blocks of `readme` as one script; compare with its text blocks.

        A Python block that no text block follows prints nothing that is shown.
        """
        blocks = re.findall(r"^```(\w+)\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
        script, shown = "", []
        for (kind, body), (following, output) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
            # A block that ends in a call of unittest is a program of its own.
            if kind != "python" or "unittest.main()" in body:
                continue
            script += body
            if following == "text":
                script += f"print({MARK!r})\n"
                shown.append(stripped(output))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "walk.py")
            path.write_text(script)
            # The folder is no part of what is shown.
            result = subprocess.run(
                [sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT
            )
            printed = result.stdout.replace(f"{folder}/", "")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual([stripped(part) for part in printed.split(MARK)[:-1]], shown)
        self.assertGreater(len(shown), 0)

    def test_unittest_blocks(self):
        """A block that ends in a call of unittest is a test file that passes."""
        text = (ROOT / "README.md").read_text()
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        programs = [block for block in blocks if "unittest.main()" in block]
        self.assertEqual(len(programs), 1)
        self.assertLess(len(programs[0].splitlines()), 40)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "test_scale.py")
            path.write_text(programs[0])
            result = subprocess.run(
                [sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT
            )
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("Ran 3 tests", result.stderr)

    def test_package(self):
        self.check(ROOT / "torch_lazy_ext" / "README.md")

    def test_project(self):
        self.check(ROOT / "README.md")


def second_backward(x):
    weight = torch.ones(3, 3, requires_grad=True)

    def program(x):
        shared = x * 2 + weight + 1
        return shared.exp().sum(), shared.sin().sum()

    first, second = extract_compiled_graph(program, (x,))(x)
    first.backward()
    second.backward()


class Counting(nn.Linear):
    def forward(self, x):
        self.calls = x.sum()
        return super().forward(x).pow(2).sum()


class Normed(nn.BatchNorm1d):
    def forward(self, x):
        self.running_var.mul_(2)
        return (x * self.running_var * self.weight).pow(2).sum()


def second_derivative(module, x):
    loss = extract_compiled_graph(module, (x,))(x)
    gradients = torch.autograd.grad(
        loss, list(module.parameters()), create_graph=True, allow_unused=True
    )
    sum(g.sum() for g in gradients if g is not None).backward()


def shrunk_data(x):
    x.data = x.data[:2]


def module_attribute(x):
    keyword.kept = torch.tril(x)
    return x + 1


@functools.lru_cache
def masked(x):
    return torch.tril(x)


class Masked(torch.Tensor):
    pass


def step_of_lbfgs(x):
    weight = nn.Parameter(x.clone())
    optimizer = torch.optim.LBFGS([weight])

    def closure():
        optimizer.zero_grad()
        loss = weight.pow(2).sum()
        loss.backward()
        return loss

    extract_compiled_graph(lambda: optimizer.step(closure), ())


def sharded(x):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    module = torch.distributed.fsdp.fully_shard(nn.Linear(3, 3), mesh=mesh)
    extract_compiled_graph(module, (x,))


def data_parallel_forward(x):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    extract_compiled_graph(nn.parallel.DistributedDataParallel(module), (x,))


def backward_into_the_past(x):
    w = x.clone().requires_grad_()
    extract_compiled_graph(lambda y: y.pow(2).sum().backward(), (w * 2,))


def tangent(x):
    with torch.autograd.forward_ad.dual_level():
        extract_compiled_graph(torch.sin, (torch.autograd.forward_ad.make_dual(x, x),))


def hook_of_a_leaf(x):
    leaf = torch.ones(3, requires_grad=True)
    leaf.register_hook([].append)
    return leaf


def view_of_another_mode(x):
    y = torch.ones(3, 3, requires_grad=True) * x
    with torch.no_grad():
        view = y[0]
    y.mul_(2)
    return view


def hook_of_one_run(x):
    def program(y):
        y.register_hook([].append)
        return y * 2

    extract_compiled_graph(program, (x.clone().requires_grad_(),))


def views_of_one(x):
    y = x.clone().requires_grad_() * 1
    extract_compiled_graph(lambda a, b: a.add_(1) + b, (y[:2], y[1:]))


def captured(program):
    return lambda x: extract_compiled_graph(program, (x,))


def generator(x):
    yield x + 1
    yield x + 2


def begun(x):
    made = generator(x)
    next(made)
    return made


batches = itertools.cycle([1.0, 2.0])

# One for each thing that the table says one may do.
LIMITS = {
    "sparse": captured(lambda x: x.to_sparse()),
    "nested argument": lambda x: captured(lambda y: y + 1)(torch.nested.nested_tensor([x, x[:2]])),
    "subclass": lambda x: captured(lambda y: y + 1)(x.as_subclass(Masked)),
    "data_ptr": captured(lambda x: x.data_ptr()),
    "data of another shape": lambda x: captured(lambda y: shrunk_data(x))(x + 1),
    "a row of what is written": captured(lambda x: x.mul_(x[:1].expand_as(x))),
    "make_fx": captured(lambda x: make_fx(lambda y: y * 2)(x)(x)),
    "random": captured(lambda x: x * random.random()),
    "seed": captured(lambda x: x * torch.seed()),
    "clock": captured(lambda x: x * time.time()),
    "iterator": captured(lambda x: x * next(batches)),
    "lru_cache": captured(lambda x: x + masked(x)),
    "attribute of a Python module": captured(module_attribute),
    "generator that has begun": captured(begun),
    "two backwards": second_backward,
    "second derivative, attribute": lambda x: second_derivative(Counting(3, 3), x),
    "second derivative, buffer": lambda x: second_derivative(Normed(3), x),
    "LBFGS": step_of_lbfgs,
    "fully_shard": sharded,
    "DistributedDataParallel": data_parallel_forward,
    "backward into the past": backward_into_the_past,
    "tangent": tangent,
    "hook of one run": hook_of_one_run,
    "hook of a leaf": captured(hook_of_a_leaf),
    "view that nobody may use": captured(view_of_another_mode),
    "deep copy of a part": captured(lambda x: copy.deepcopy(x[1:])),
    "views of one": views_of_one,
    "torch.func": lambda x: torch.func.grad(extract_compiled_graph(torch.sum, (x,)))(x),
}


class LimitsTest(unittest.TestCase):
    """The table of known limits: each error is what the README quotes, word for word."""

    def test_limits(self):
        text = (ROOT / "README.md").read_text()
        table = text.partition("## Known limits")[2].partition("\n\nA call that")[0]
        rows = table.partition("| --- | --- |\n")[2].strip().splitlines()
        self.assertLessEqual(len(rows), 5)
        quotes = {unplaced(q) for row in rows for q in re.findall(r'"([^"]+)"', row)}
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.addCleanup(torch.distributed.destroy_process_group)
        met = set()
        for name, attempt in LIMITS.items():
            with self.subTest(name):
                with self.assertRaises(RuntimeError) as raised:
                    attempt(torch.rand(3, 3))
                message = unplaced(str(raised.exception))
                met |= {q for q in quotes if is_quote(q, message)}
                self.assertTrue(any(is_quote(q, message) for q in quotes), message)
        self.assertEqual(met, quotes)

    def test_padding_mask_is_none(self):
        """The nested tensors that the table takes out."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        mask = torch.tensor([[False, False, True], [False, True, True]])
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            graph = extract_compiled_graph(encoder, (x,), {"src_key_padding_mask": mask})
            actual = graph(x, src_key_padding_mask=mask)
            torch.testing.assert_close(actual, encoder(x, src_key_padding_mask=mask))


def unplaced(message: str) -> str:
    """`message` without the place in a program."""
    return re.sub(r"([(,]) ?at [^)]*\)", r"\1 at PLACE)", message)


def is_quote(quote: str, message: str) -> bool:
    """Whether a quote is the message; what ends in dots, or is PyTorch's own, is its begin."""
    if quote.endswith("..."):
        return message.startswith(quote.removesuffix("..."))
    return message == quote or (quote in SHORTENED and message.startswith(quote))


SHORTENED = {"Trying to backward through the graph a second time"}


if __name__ == "__main__":
    unittest.main()
