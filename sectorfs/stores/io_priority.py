"""The kernel's idle class of disk work, for one thread and one block of code.

What nobody waits for then comes after every reader of the disk, those past the daemon and those of
other programs included, where the disk's scheduler knows of classes; elsewhere it changes nothing.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}.get(platform.machine())
_THIS_THREAD = (1, 0)  # IOPRIO_WHO_PROCESS, and no id: the caller
_IDLE = 3 << 13
_USUAL = 0

_libc = ctypes.CDLL(None)


@contextmanager
def idle_priority() -> Iterator[None]:
    """Disk work of this thread comes last within the block. For threads; never fails."""
    _set(_IDLE)
    try:
        yield
    finally:
        _set(_USUAL)


def _set(priority: int) -> None:
    if _IOPRIO_SET is not None:
        _libc.syscall(_IOPRIO_SET, *_THIS_THREAD, priority)
