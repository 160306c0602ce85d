"""Counters of the lazy tensor core, as in `torch._lazy.metrics`.

Extraction only reads them: `reset` is for people, never called by this package.
"""

from torch._lazy.metrics import counter_names, counter_value, metrics_report, reset

__all__ = ["counter_names", "counter_value", "metrics_report", "reset"]
