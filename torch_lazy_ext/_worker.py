"""Worker: a process that compiles one graph with Inductor, for `backend="tiered"`.

In a process of its own, since Inductor changes what all threads see while it traces (the call of
every module, the random number generator), and keeps Python busy for seconds. `_compile` starts it,
by `work`.
"""

from __future__ import annotations

import os
import threading

import torch

from torch_lazy_ext import _fx, _inductor, _native


def main(request: str, answer: str) -> None:
    """Read (graph, frozen values, threads) from a file, and write the code, or why there is none,
    to another one."""
    graph, frozen, threads = torch.load(request, weights_only=False)
    result: _native.Code | str
    try:
        torch.set_num_threads(threads)
        result = _inductor.compile(_fx.load(graph), frozen, threads, portable=True)
    except Exception as e:
        result = f"{e}" or type(e).__name__
    torch.save(result, answer)


def end_with_parent() -> None:
    """End this process when the one that started it is gone: nobody waits for the answer."""
    os.read(0, 1)  # nothing is ever written: this returns when the other end is closed
    os._exit(1)


def work(request: str, answer: str) -> None:
    """`main`, in a process that ends with its parent."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    main(request, answer)
