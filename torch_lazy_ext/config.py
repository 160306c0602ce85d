"""Settings of the lazy tensor core. They are process-wide, as in `torch._lazy.config`."""

from torch._lazy.config import get_force_fallback, set_force_fallback, set_reuse_ir

__all__ = ["get_force_fallback", "set_force_fallback", "set_reuse_ir"]
