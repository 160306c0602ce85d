"""Text of the LTC nodes behind lazy tensors, as in `torch._lazy.debug`."""

from torch._lazy.debug import dump_ir, render_ir_graph

__all__ = ["dump_ir", "render_ir_graph"]
