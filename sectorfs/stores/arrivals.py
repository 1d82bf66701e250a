"""The bytes of one remote file on this node: those on disk, and those that have only just come.

What comes answers its readers from memory at once; a partial file, as soon as there is one, takes
it behind them, many small pieces at a time. When the cache path cannot (full, read-only, hung)
reading goes on from memory alone: the oldest bytes go when there are too many, and are asked for
again if need be.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from functools import partial

import trio

from sectorfs.errors import DiskError, SectorFSError
from sectorfs.stores.blocks import PartialFile
from sectorfs.stores.intervals import Intervals
from sectorfs.stores.lanes import Descriptor, Lane

log = logging.getLogger(__name__)

FILE_MEMORY = 16 << 20
"""Bytes of one file kept in memory at most, beside those that a reader just waits for."""
NODE_MEMORY = 256 << 20
"""The same for all open files of the node."""
WRITE_FROM = 1 << 20
"""Bytes that are written at a time: a thread for each small piece costs more than its bytes."""
SYNC_EVERY = 16 << 20
"""Bytes after which what came is made durable: so much is asked for again after a crash."""
READ_NOWAIT = 1 << 20
"""Bytes of a read that is tried without a thread: the most that today's kernels ask for."""


class Memory:
    """What the open files of a node share."""

    def __init__(self) -> None:
        self.used = 0
        """Bytes that came and are not on disk."""
        self.buffer = bytearray(READ_NOWAIT)
        """For reads that do not wait; good until the next of them."""

    @property
    def is_short(self) -> bool:
        """True when who holds more than it needs should let go."""
        return self.used > NODE_MEMORY


class Arrivals:
    """Where the bytes of one file go and come from; `nursery` is for writing behind."""

    def __init__(self, name: str, lane: Lane, nursery: trio.Nursery, memory: Memory) -> None:
        self.kept: PartialFile | None = None
        """None until there is a partial file, and since its disk failed: memory only."""
        self._name = name
        self._lane = lane
        self._nursery = nursery
        self._memory = memory
        self._fresh: dict[int, bytes] = {}  # by offset, oldest first
        self._fresh_bytes = 0
        self._there = Intervals()
        self._nowait = True  # until the file system says that it knows no RWF_NOWAIT
        self._writing = False
        self._one_writes = trio.Lock()
        self._syncing = False
        self.on_whole: Callable[[], object] = lambda: None
        """Called when the last byte is on disk."""
        self.on_change: Callable[[], object] = lambda: None
        """Called then, and when bytes were lost."""
        self.needed: Callable[[int, int], bool] = lambda start, end: False
        """True of bytes that somebody waits for: they are not let go."""

    @property
    def total(self) -> int:
        """Bytes that are here."""
        return self._there.total

    @property
    def is_whole(self) -> bool:
        """Every byte is on disk."""
        return self.kept is not None and self.kept.is_whole

    def has(self, start: int, end: int) -> bool:
        """True when these bytes are here."""
        return self._there.covers(start, end)

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of these bytes is not here."""
        return self._there.missing(start, end)

    def keep(self, kept: PartialFile) -> None:
        """Put what came, and what will come, into a partial file, which may have some already."""
        assert self.kept is None
        self.kept = kept
        for start, end in kept.present:
            self._there.add(start, end)
        self._write_behind()
        self._after_write()

    def came(self, offset: int, data: bytes) -> None:
        """Bytes came into memory."""
        old = self._fresh.pop(offset, b"")
        self._fresh[offset] = data = max(old, data, key=len)
        self._hold(len(data) - len(old))
        self._there.add(offset, offset + len(data))
        self._write_behind()
        if self._fresh_bytes > FILE_MEMORY or self._memory.is_short:
            self._shrink()

    def saved(self, start: int, end: int) -> None:
        """Bytes came straight into the partial file."""
        if self.kept is not None:
            self.kept.arrived(start, end)
            self._there.add(start, end)
            self._after_write()
            self._write_behind()

    def take_nowait(self, start: int, end: int) -> bytes | memoryview | None:
        """These bytes if that takes no thread; a view is good until the caller's next `await`."""
        for offset, data in self._fresh.items():
            if offset <= start and end <= offset + len(data):
                return memoryview(data)[start - offset : end - offset]
        if self.kept is None or not self._nowait or end - start > READ_NOWAIT:
            return None
        if not self.kept.present.covers(start, end):
            return None
        view = memoryview(self._memory.buffer)[: end - start]
        try:
            with self.kept.descriptor as fd:
                count = os.preadv(fd, [view], start, os.RWF_NOWAIT)
        except OSError as exc:
            self._nowait = exc.errno != errno.EOPNOTSUPP
            return None  # whatever it is, a thread meets it again, and has time for it
        return view if count == end - start else None

    async def take(self, start: int, end: int) -> bytes | None:
        """These bytes, or None when a part of them has gone meanwhile."""
        if self.kept is not None and self.kept.present.covers(start, end):
            return await self._read(self.kept, start, end)
        found = bytearray(end - start)
        held = Intervals()
        for offset, data in self._fresh.items():
            low, high = max(start, offset), min(end, offset + len(data))
            if low < high:
                found[low - start : high - start] = memoryview(data)[low - offset : high - offset]
                held.add(low, high)
        for low, high in held.missing(start, end):
            if self.kept is None or not self.kept.present.covers(low, high):
                return None
            found[low - start : high - start] = await self._read(self.kept, low, high)
        return bytes(found)

    async def _read(self, kept: PartialFile, start: int, end: int) -> bytes:
        call = partial(_read, kept.descriptor, start, end)
        return await self._lane.run(call, what=f"read {self._name}")

    def lose_disk(self, cause: SectorFSError) -> None:
        """The cache path failed: go on in memory."""
        kept, self.kept = self.kept, None
        if kept is None:
            return
        log.warning("%s is read without being kept: %s", self._name, cause)
        kept.close()
        self._there = Intervals((at, at + len(data)) for at, data in self._fresh.items())
        self.on_change()

    def close(self) -> None:
        """Let go of everything; what is durable stays for the next time."""
        self._fresh.clear()
        self._hold(-self._fresh_bytes)
        self._there = Intervals()
        kept, self.kept = self.kept, None
        if kept is not None:
            kept.close()

    def _hold(self, more: int) -> None:
        self._fresh_bytes += more
        self._memory.used += more

    def _shrink(self) -> None:
        """Let the oldest bytes go that nobody waits for."""
        enough = FILE_MEMORY // 2
        lost = False
        for offset, data in list(self._fresh.items()):
            if self._fresh_bytes <= enough and not self._memory.is_short:
                break
            end = offset + len(data)
            if self.needed(offset, end):
                continue
            del self._fresh[offset]
            self._hold(-len(data))
            if self.kept is None or not self.kept.present.covers(offset, end):
                self._there.discard(offset, end)
                lost = True
        if lost:
            self._keep_overlaps()
            self.on_change()

    def _keep_overlaps(self) -> None:
        """What was let go may be here a second time."""
        for offset, data in self._fresh.items():
            self._there.add(offset, offset + len(data))
        if self.kept is not None:
            for start, end in self.kept.present:
                self._there.add(start, end)

    def _write_behind(self) -> None:
        """Write what came once it is much, or the last that was missing."""
        if self._writing or not self._fresh or self.kept is None:
            return
        if self._fresh_bytes >= WRITE_FROM or self._there.total == self.kept.identity.size:
            self._writing = True
            self._nursery.start_soon(self._write_task)

    async def _write_task(self) -> None:
        """A boundary: it may not end the node."""
        try:
            await self._write_all()
        except SectorFSError as exc:
            self.lose_disk(exc)
        except Exception as exc:
            log.exception("%s: writing failed unexpectedly", self._name)
            self.lose_disk(DiskError(f"unexpected {type(exc).__name__}", self._name))
        finally:
            self._writing = False

    async def _write_all(self) -> None:
        async with self._one_writes:
            while self._fresh and self.kept is not None:
                batch = list(self._fresh.items())
                await self.kept.write(batch)
                for offset, data in batch:
                    if self._fresh.get(offset) is data:
                        del self._fresh[offset]
                        self._hold(-len(data))
                    if self.kept is not None:
                        self._there.add(offset, offset + len(data))
                self._after_write()

    def _after_write(self) -> None:
        kept = self.kept
        if kept is None:
            return
        if kept.is_whole:
            self.on_whole()
            self.on_change()
        else:
            self._sync_if_due()

    def _sync_if_due(self) -> None:
        kept = self.kept
        if kept is not None and kept.unsynced >= SYNC_EVERY and not self._syncing:
            self._syncing = True
            self._nursery.start_soon(self.sync)

    async def sync(self) -> None:
        """Make what came durable; failures end the keeping."""
        try:
            await self._write_all()
            if self.kept is not None:
                await self.kept.sync()
        except SectorFSError as exc:
            self.lose_disk(exc)
        except Exception as exc:  # a boundary, as above
            log.exception("%s: syncing failed unexpectedly", self._name)
            self.lose_disk(DiskError(f"unexpected {type(exc).__name__}", self._name))
        finally:
            self._syncing = False
        self._sync_if_due()  # much may have come meanwhile


def _read(descriptor: Descriptor, start: int, end: int) -> bytes:
    with descriptor as fd:
        parts = []
        while start < end:
            part = os.pread(fd, end - start, start)
            if not part:
                raise DiskError("is shorter than it was made", f"byte {start}")
            parts.append(part)
            start += len(part)
    return b"".join(parts)
