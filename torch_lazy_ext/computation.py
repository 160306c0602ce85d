"""LTC's own computation cache, as in `torch._lazy.computation`.

For lazy tensors of your own. Extracted graphs do not live in this cache: they hold their graph
themselves, so nothing evicts them.
"""

from torch._lazy.computation import (
    get_graph_hash,
    get_tensors_ts_device_data_node,
    run_cached_graph,
)

__all__ = ["get_graph_hash", "get_tensors_ts_device_data_node", "run_cached_graph"]
