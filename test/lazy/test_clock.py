# Owner(s): ["oncall: jit"]

"""Dictionaries that a graph relies on: unchanged ones are not looked through, changes are seen."""

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import unittest
from pathlib import Path

import torch
from expecttest import TestCase
from torch import nn

import torch_lazy_ext
from torch_lazy_ext import extract_compiled_graph


class Key:
    """Tells how often a dictionary was asked for it: in C, where it is none of a program's state."""

    asked = ctypes.c_long(0)

    def __hash__(self):
        Key.asked.value += 1
        return 7


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = Key()
        self.table = {self.key: 2.0}

    def forward(self, x):
        return x * self.table[self.key]


class Scales(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class ClockTest(TestCase):
    def setUp(self):
        self.x = torch.tensor([1.0, 2.0])

    def asked(self, call):
        before = Key.asked.value
        call()
        return Key.asked.value - before

    def test_unchanged(self):
        model = Reads()
        graph = extract_compiled_graph(model, (self.x,))
        graph(self.x)
        self.assertEqual(self.asked(lambda: graph(self.x)), 0)
        Scales().factor = 3.0  # another dictionary
        self.assertEqual(self.asked(lambda: graph(self.x)), 0)
        dict.update(model.table, {"more": 1})
        self.assertGreater(self.asked(lambda: graph(self.x)), 0)

    def test_each_way_to_change(self):
        ways = {
            "set": lambda d: d.__setitem__("factor", 3.0),
            "update": lambda d: d.update(factor=3.0),
            "or": lambda d: d.__ior__({"factor": 3.0}),
            "pop, set": lambda d: (d.pop("factor"), d.setdefault("factor", 3.0)),
            "popitem, set": lambda d: (d.popitem(), d.__setitem__("factor", 3.0)),
            "clear, update": lambda d: (lambda old: (d.clear(), d.update(old, factor=3.0)))(
                dict(d)
            ),
        }
        for name, change in ways.items():
            with self.subTest(name):
                model = Scales()
                graph = extract_compiled_graph(model, (self.x,))
                for _ in range(2):
                    self.assertEqual(graph(self.x), self.x * 2)
                change(vars(model))
                self.assertEqual(graph(self.x), self.x * 3)
                model.factor = 2.0
                self.assertEqual(graph(self.x), self.x * 2)

    def assertEqual(self, a, b, *args):
        if isinstance(a, torch.Tensor):
            a, b = a.tolist(), b.tolist()
        super().assertEqual(a, b, *args)

    def test_two_graphs_of_one_module(self):
        model = Scales()
        first, second = (extract_compiled_graph(model, (self.x,)) for _ in range(2))
        for graph in (first, second):
            self.assertEqual(graph(self.x), self.x * 2)
        del first, graph
        gc.collect()
        model.factor = 3.0
        self.assertEqual(second(self.x), self.x * 3)

    def test_dictionaries_that_die(self):
        # Others get their addresses.
        for round in range(12):
            table = {"factor": float(round)}
            graph = extract_compiled_graph(lambda x, t=table: x * t["factor"], (self.x,))
            self.assertEqual(graph(self.x), self.x * round)
            table["factor"] += 1
            self.assertEqual(graph(self.x), self.x * (round + 1))
            if round % 2:
                del graph
            else:
                del table
            gc.collect()

    def test_cycle(self):
        # The graph and what it relies on go together.
        model = Scales()
        model.graph = extract_compiled_graph(model, (self.x,))
        self.assertEqual(model.graph(self.x), self.x * 2)
        del model
        gc.collect()
        model = Scales(3.0)
        graph = extract_compiled_graph(model, (self.x,))
        model.factor = 4.0
        self.assertEqual(graph(self.x), self.x * 4)

    def test_changed_by_a_thread(self):
        model = Scales(0.0)
        graph = extract_compiled_graph(model, (self.x,), limit=1)
        for round in range(1, 6):
            thread = threading.Thread(target=setattr, args=(model, "factor", float(round)))
            thread.start()
            thread.join()
            self.assertEqual(graph(self.x), self.x * round)

    @unittest.skipIf(sys.version_info < (3, 12), "this Python has no watchers")
    def test_all_watchers_taken(self):
        program = """
            import ctypes
            Callback = ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
            )
            callback = Callback(lambda *args: 0)
            import torch
            import torch_lazy_ext
            taken = 0
            try:
                while True:
                    ctypes.pythonapi.PyDict_AddWatcher(callback)
                    taken += 1
            except RuntimeError:
                pass
            assert taken > 0
            model = torch.nn.Linear(1, 1)
            model.factor = 2.0
            graph = torch_lazy_ext.extract_compiled_graph(lambda x: x * model.factor, (torch.ones(1),))
            for factor in (2.0, 3.0, 3.0):
                model.factor = factor
                print(graph(torch.ones(1)).item())
        """
        where = [str(Path(torch_lazy_ext.__file__).parents[1]), *sys.path]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=tempfile.gettempdir(),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(where)},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.stdout, "2.0\n3.0\n3.0\n", done.stderr)


if __name__ == "__main__":
    unittest.main()
