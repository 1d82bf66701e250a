"""Copies one regular file piece by piece, holes kept. Every call blocks, for a piece at most.

The kernel does the copying where it can (`copy_file_range`: shared extents on file systems that
have them); between file systems that do not agree, bytes go through memory.
"""

from __future__ import annotations

import errno
import os

from sectorfs.errors import Stale, from_os

PIECE = 16 << 20
"""Bytes per step: a slow disk takes a second or two for them."""
_BUFFER = 1 << 20
_NOT_OFFERED = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY}
    # Which of the two disks failed only reading and writing apart can tell.
    | {errno.EIO}
)


class FileCopy:
    """The state of one copy; the descriptors are the caller's."""

    def __init__(self, size: int, thing: object) -> None:
        """`thing` is the source; what fails with an `OSError` is the target."""
        self.done = 0
        """Bytes of the source that need no more copying."""
        self.reading = False
        """It is the source that is being waited for."""
        self._size = size
        self._thing = thing
        self._in_kernel = True
        self._end = 0  # of the run of data that `done` lies in

    def step(self, source: int, target: int) -> bool:
        """Copy the next piece; False once everything is there."""
        if self.done >= self._end and not self._next_run(source):
            os.ftruncate(target, self._size)
            self.done = self._size
            return False
        count = min(PIECE, self._end - self.done)
        copied = self._by_kernel(source, target, count) if self._in_kernel else 0
        self.done += copied or self._through_memory(source, target, count)
        return True

    def _next_run(self, source: int) -> bool:
        """Go to the next data behind a hole; False when there is none."""
        try:
            start = os.lseek(source, self.done, os.SEEK_DATA)
            end = os.lseek(source, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return False
            if exc.errno != errno.EINVAL:
                raise
            start, end = self.done, self._size  # a file system that knows no holes
        self.done, self._end = start, min(end, self._size)
        return self.done < self._end

    def _by_kernel(self, source: int, target: int, count: int) -> int:
        try:
            return os.copy_file_range(source, target, count, self.done, self.done)
        except OSError as exc:
            if exc.errno not in _NOT_OFFERED:
                raise
            self._in_kernel = False
            return 0

    def _through_memory(self, source: int, target: int, count: int) -> int:
        copied = 0
        while copied < count:
            data = self._read(source, min(_BUFFER, count - copied), self.done + copied)
            if not data:
                raise Stale("became shorter while it was copied", self._thing)
            view = memoryview(data)
            while view:
                written = os.pwrite(target, view, self.done + copied)
                copied += written
                view = view[written:]
        return copied

    def _read(self, source: int, size: int, offset: int) -> bytes:
        self.reading = True
        try:
            return os.pread(source, size, offset)
        except OSError as exc:
            raise from_os(exc, "cannot be read", self._thing) from exc
        finally:
            self.reading = False
