"""Reads a file from its disk, past the page cache, and gives the hashes of what is there.

What the page cache says of a file proves nothing about its disk, and reading through terabytes by
way of it would push out whatever else the machine keeps there. So reads are direct. A file system
that has no direct reads is read as usual, and pages that were not there before are given back.

Every call blocks in a thread of the path's lane, for one chunk; two at a time keep a disk busy
while the other is hashed. A call that hangs keeps its buffer for ever, which nobody else has.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import msgspec

from sectorfs.errors import Stale
from sectorfs.stores.io_priority import idle_priority
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.manifest import BLOCK, block_hash, leaf_count, leaf_hashes
from sectorfs.stores.regular import open_regular

CHUNK = 4 * BLOCK
"""Bytes of one call: little enough for a slow disk, and enough to pay for a thread."""
_PAGE = 4096
_LEAVES = 32 * leaf_count(BLOCK)


class Hashes(msgspec.Struct, frozen=True):
    """Of a part of a file that begins with a block."""

    leaves: bytes
    blocks: bytes


class Medium:
    """An open regular file. Whoever got it closes it."""

    def __init__(
        self, name: str, lane: Lane, descriptor: Descriptor, found: os.stat_result
    ) -> None:
        self.name = name
        self.size = found.st_size
        self.mtime_ns = found.st_mtime_ns
        self._inode = found.st_ino
        self._lane = lane
        self._descriptor = descriptor
        self._buffers: list[mmap.mmap] = []

    @classmethod
    async def open(cls, name: str, lane: Lane) -> Medium:
        """`NotFound` for what is no regular file."""

        def call() -> tuple[int, os.stat_result]:
            fd, found = open_regular(name)
            _set_direct(fd, direct=True)
            return fd, found

        fd, found = await lane.run(call, what=f"open {name}", discard=lambda got: os.close(got[0]))
        return cls(name, lane, lane.descriptor(fd), found)

    def close(self) -> None:
        """Close once the last thread that reads has left."""
        self._descriptor.close()

    async def hashes(self, offset: int, length: int) -> Hashes:
        """Of the bytes at `offset`, the beginning of a block; at most `CHUNK` of them.

        `Stale` when the file has become shorter, `DiskError` where it cannot be read.
        """
        buffer = self._buffers.pop() if self._buffers else self._buffer()

        def call() -> Hashes:
            with idle_priority(), self._descriptor as fd, memoryview(buffer) as view:
                _fill(fd, view, offset, length, self.name)
                with view[:length] as data:
                    leaves = leaf_hashes(data)
            return Hashes(leaves, _blocks(leaves))

        found = await self._lane.run(call, what=f"read {self.name}")
        self._buffers.append(buffer)
        return found

    async def is_same(self) -> bool:
        """Whether the name still means this file, as it was when it was opened."""

        def call() -> bool:
            with self._descriptor as fd:
                held = os.fstat(fd)
            try:
                named = os.stat(self.name)
            except FileNotFoundError:
                return False
            return (named.st_dev, named.st_ino) == (held.st_dev, self._inode) and (
                held.st_size,
                held.st_mtime_ns,
            ) == (self.size, self.mtime_ns)

        return await self._lane.run(call, what=f"look at {self.name}")

    def _buffer(self) -> mmap.mmap:
        # A mapping is aligned as direct reads want it.
        return mmap.mmap(-1, min(CHUNK, -(-max(self.size, 1) // _PAGE) * _PAGE))


def _blocks(leaves: bytes) -> bytes:
    view = memoryview(leaves)
    return b"".join([block_hash(view[at : at + _LEAVES]) for at in range(0, len(view), _LEAVES)])


def _fill(fd: int, view: memoryview, offset: int, length: int, name: str) -> None:
    done = 0
    while done < length:
        count = _read(fd, view[done:], offset + done)
        if count == 0:
            raise Stale("became shorter while it was read", name)
        done += count
        if done < length and done % _PAGE:
            _set_direct(fd, direct=False)  # the file ends here, or grows: the rest is no whole page


def _read(fd: int, view: memoryview, offset: int) -> int:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        try:
            return os.preadv(fd, [view], offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            _set_direct(fd, direct=False)
    cached = _is_cached(fd, offset)
    count = os.preadv(fd, [view], offset)
    if not cached:
        os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)
    return count


def _is_cached(fd: int, offset: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # not at once, or not on this file system
        return False


def _set_direct(fd: int, *, direct: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # this file system has no direct reads
            raise
