"""Give a file its blocks, and take them away again: Linux' fallocate, which Python leaves out.

`os.posix_fallocate` will not do: where a file system cannot allocate, the C library writes a byte
into every block instead, over data that others may be writing.
"""

from __future__ import annotations

import ctypes
import errno
import os

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_NOT_OFFERED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int


def allocate(fd: int, size: int) -> bool:
    """Reserve blocks for the first `size` bytes; the length of the file stays.

    False where the file system does not offer it; `OSError` otherwise, ENOSPC among them.
    """
    return _call(fd, _KEEP_SIZE, 0, size)


def punch(fd: int, offset: int, size: int) -> bool:
    """Make a range read as zeros and give its blocks back; result and errors as `allocate`."""
    # Without KEEP_SIZE the kernel refuses every hole with EOPNOTSUPP.
    return _call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size)


def _call(fd: int, mode: int, offset: int, size: int) -> bool:
    if size == 0:
        return True  # the kernel refuses to do nothing
    while _fallocate(fd, mode, offset, size) != 0:
        code = ctypes.get_errno()
        if code in _NOT_OFFERED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
