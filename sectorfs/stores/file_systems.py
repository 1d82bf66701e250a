"""Sector files opened to be read on the loop, and what kind of file system they lie on.

Only file systems that are known to be local have a name here. A list of those that are not (nfs,
cifs, ceph, fuse, overlay, …) would never be complete, and a file wrongly taken for local could make
its reader wait for a network without a deadline. `fstatfs` tells them apart, which Python lacks:
its `fstatvfs` leaves the kind out.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable

FOREIGN_FOR = 60.0
"""Seconds for which a device that is not local is not asked again: it may answer from afar."""

_LOCAL = {
    0xEF53: "ext4",  # ext2 and ext3 too
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0x01021994: "tmpfs",
}

_libc = ctypes.CDLL(None, use_errno=True)
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_fstatfs.restype = ctypes.c_int


class _StatFS(ctypes.Structure):
    # Only the type is read; the rest is room for whatever the C library of the machine writes.
    _fields_ = (("type", ctypes.c_long), ("rest", ctypes.c_byte * 512))


class FileSystems:
    """Kinds of the file systems under one storage path: links lead operators' files elsewhere.

    That a file lies on a local one is asked for each file anew, because it costs a microsecond
    there, and because the number of an unmounted device may come back as that of another.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._foreign: dict[int, float] = {}  # a handful: the devices that one path leads to

    def local(self, fd: int, device: int) -> str:
        """As `local_file_system`, of a file on `device`; for threads."""
        if self._now() < self._foreign.get(device, 0.0):
            return ""
        name = local_file_system(fd)
        if not name:
            self._foreign[device] = self._now() + FOREIGN_FOR
        return name


def open_to_read(path: str, flags: int = 0) -> int:
    """A descriptor whose reads of cached bytes never wait for the disk.

    Not even to note the time of the access, which takes a place in the disk's journal: where the
    file is somebody else's and this process has no privilege, it is noted after all.
    """
    flags |= os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)


def look_at_directory(path: str) -> tuple[os.stat_result, str]:
    """`stat` of a directory, and the name of the local file system it is on."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return os.fstat(fd), local_file_system(fd)
    finally:
        os.close(fd)


def local_file_system(fd: int) -> str:
    """Name of the local file system that an open file lies on; empty for every other kind.

    Waits for a file system that hangs, as `fstat` does: for threads of a lane.
    """
    found = _StatFS()
    while _fstatfs(fd, ctypes.byref(found)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return _LOCAL.get(found.type & 0xFFFFFFFF, "")
