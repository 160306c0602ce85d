"""The TorchScript backend of the lazy device."""

import threading

import torch._C._lazy
import torch._lazy.ts_backend

_lock = threading.Lock()


def _is_registered() -> bool:
    """Whether some backend already serves the lazy device of this process."""
    try:
        torch._C._lazy._get_default_device_type()
    except RuntimeError:
        return False
    return True


def init() -> None:
    """Initialise the backend, once per process: later calls, from any thread, do nothing.

    `torch._lazy.ts_backend.init` raises when it runs twice, so this asks the lazy tensor core
    itself, and sees an initialisation that did not come through here as well.
    """
    with _lock:
        if not _is_registered():
            torch._lazy.ts_backend.init()
