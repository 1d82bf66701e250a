"""Hashes one file from its disk: a chunk at a time, in threads of its path's lane.

Chunks are read through the page cache, so that what was just written is hashed from memory; pages
that were not there before are given back, or a node that hashes its disks would keep nothing else
in memory. One thread reads a file on a disk, whose order that keeps; more only while chunks come as
fast as from memory.

A file is what it was when it was opened as long as inode, size and both of its times stay: the
second is set by the kernel alone, at every write. Hashes of one that changed are worth nothing.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import trio

from sectorfs.errors import SectorFSError, SourceFailed
from sectorfs.stores.io_priority import idle_priority
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.manifest import HASH, LEAF, Manifest, file_hashes, leaf_count
from sectorfs.stores.regular import open_regular

CHUNK = 8 << 20
"""Most bytes of one call: enough to pay for a thread, and read within a deadline by a sick disk."""
FAST_CHUNK = 32 << 20
"""The same while chunks come as fast as from memory."""
WORKERS = 3
"""Threads for one file that comes from memory."""
KEEP_EVERY = 1 << 30
"""Bytes after which the hashes so far are kept."""

_FAST = 5e8  # bytes a second; no single disk that turns reads so fast


class Identity(msgspec.Struct, frozen=True):
    """Which bytes a file has, as far as the kernel tells."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Opened(msgspec.Struct, frozen=True):
    """A regular file to be hashed. Whoever got it closes it."""

    name: str
    lane: Lane
    descriptor: Descriptor
    identity: Identity

    async def check(self) -> None:
        """`SourceFailed` when it is not what it was when it was opened."""

        def call() -> Identity:
            with self.descriptor as fd:
                return _identity(os.fstat(fd))

        if await self.lane.run(call, what=f"look at {self.name}", background=True) != self.identity:
            raise changed(self.name)

    def close(self) -> None:
        """Close once the last thread that reads has left."""
        self.descriptor.close()


async def open_to_hash(name: str, lane: Lane) -> Opened:
    """`NotFound` for what is no regular file."""

    def call() -> tuple[int, os.stat_result]:
        fd, found = open_regular(name)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return fd, found

    fd, found = await lane.run(
        call, what=f"open {name}", discard=lambda got: os.close(got[0]), background=True
    )
    return Opened(name, lane, lane.descriptor(fd), _identity(found))


class Turn(Protocol):
    """Waits until something may be read; how many bytes."""

    async def __call__(self) -> int: ...


class Read(msgspec.Struct, frozen=True):
    """One turn that is over."""

    count: int
    """Bytes."""
    allowed: int
    seconds: float


class FileHash:
    """The hashes of one file, as they come."""

    def __init__(
        self,
        opened: Opened,
        *,
        known: bytes = b"",
        turn: Turn,
        keep: Callable[[int, bytes], Awaitable[object]],
        progress: Callable[[Read], None],
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """`known` are the leaf hashes of an earlier run, from the start of the file on.

        `keep` is given a position and the leaf hashes from there, of `KEEP_EVERY` bytes each time;
        `progress` is told of each turn.
        """
        self._opened = opened
        self._turn = turn
        self._keep = keep
        self._progress = progress
        self._clock = clock
        self._size = opened.identity.size
        self._leaves = bytearray(HASH * leaf_count(self._size))
        self._leaves[: len(known)] = known
        self._next = min(len(known) // HASH * LEAF, self._size)
        self._kept = self._next
        self._keeping = trio.Lock()
        self._under_way: set[int] = set()
        self._fast = False
        self._workers = 0
        self._failure: SectorFSError | None = None

    async def run(self) -> Manifest:
        """Hash what is left; `SourceFailed` when the file changes meanwhile."""
        async with trio.open_nursery() as nursery:
            await self._worker(nursery, alone=True)
        if self._failure is not None:
            raise self._failure
        await self._opened.check()
        return Manifest.of_leaves(self._size, bytes(self._leaves))

    async def _worker(self, nursery: trio.Nursery, *, alone: bool = False) -> None:
        self._workers += 1
        try:
            await self._work(nursery, alone)
        except SectorFSError as exc:
            self._failure = self._failure or exc
        finally:
            self._workers -= 1

    async def _work(self, nursery: trio.Nursery, alone: bool) -> None:
        while self._next < self._size and (alone or self._fast) and self._failure is None:
            allowed = await self._turn()
            start = self._next
            most = min(allowed, FAST_CHUNK if self._fast else CHUNK)
            end = min(start + max(LEAF, most // LEAF * LEAF), self._size)
            if start >= end:  # another worker took the last
                self._progress(Read(0, allowed, 0.0))
                return
            self._next = end
            self._under_way.add(start)
            if self._fast and self._workers < WORKERS:
                nursery.start_soon(self._worker, nursery)
            began = self._clock()
            await self._hash(start, end)
            seconds = self._clock() - began
            self._fast = end - start >= CHUNK and seconds * _FAST < end - start
            self._under_way.discard(start)
            self._progress(Read(end - start, allowed, seconds))
            await self._keep_some()

    async def _hash(self, start: int, end: int) -> None:
        opened = self._opened

        def call() -> bytes:
            with opened.descriptor as fd:
                return hash_chunk(fd, start, end - start, opened.name)

        found = await opened.lane.run(call, what=f"read {opened.name}", background=True)
        at = HASH * (start // LEAF)
        self._leaves[at : at + len(found)] = found

    async def _keep_some(self) -> None:
        """Keep what came, in order and in whole steps."""
        async with self._keeping:
            while min(self._under_way, default=self._next) >= self._kept + KEEP_EVERY:
                at = HASH * (self._kept // LEAF)
                part = self._leaves[at : at + HASH * (KEEP_EVERY // LEAF)]
                await self._keep(self._kept, bytes(part))
                self._kept += KEEP_EVERY


def hash_chunk(fd: int, offset: int, length: int, name: str) -> bytes:
    """The leaf hashes of a part of a file that begins with a leaf; blocks."""
    cached = _is_cached(fd, offset + length - 1)
    with idle_priority():
        found = file_hashes(fd, offset, length)
    if len(found) < HASH * leaf_count(length):
        raise changed(name)
    if not cached:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
    return found


def changed(name: str) -> SourceFailed:
    """The error for a file that is not what it was."""
    return SourceFailed("changed while it was hashed", name, "it is tried again later")


def _is_cached(fd: int, offset: int) -> bool:
    # The last byte of a chunk: the kernel reads ahead into its beginning.
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait, or this file system cannot tell
        return False


def _identity(found: os.stat_result) -> Identity:
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
