"""The bytes of one remote file on this node: those on disk, and those that have only just come.

What comes answers its readers from memory at once; one task writes it behind them. When the cache
path cannot take it (full, read-only, hung) reading goes on from memory alone: the oldest bytes go
when there are too many, and are asked for again if need be.
"""

from __future__ import annotations

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

MEMORY = 16 << 20
"""Bytes of one file kept in memory at most, beside those that a reader just waits for."""
SYNC_EVERY = 16 << 20
"""Bytes after which what came is made durable: so much is asked for again after a crash."""


class Arrivals:
    """Where the bytes of one file go and come from; `nursery` is for writing behind."""

    def __init__(
        self, name: str, kept: PartialFile | None, lane: Lane, nursery: trio.Nursery
    ) -> None:
        self.kept = kept
        """The partial file; None from the start or since its disk failed: memory only."""
        self._name = name
        self._lane = lane
        self._nursery = nursery
        self._fresh: dict[int, bytes] = {}  # by offset, oldest first
        self._fresh_bytes = 0
        self._there = kept.present.copy() if kept else Intervals()
        self._writing = False
        self._syncing = False
        self.on_whole: Callable[[], object] = lambda: None
        """Called once when the last byte is on disk."""

    @property
    def total(self) -> int:
        """Bytes that are here."""
        return self._there.total

    def has(self, start: int, end: int) -> bool:
        """True when these bytes are here."""
        return self._there.covers(start, end)

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of these bytes is not here."""
        return self._there.missing(start, end)

    def came(self, offset: int, data: bytes) -> None:
        """Bytes came into memory."""
        old = self._fresh.pop(offset, b"")
        self._fresh[offset] = data = max(old, data, key=len)
        self._fresh_bytes += len(data) - len(old)
        self._there.add(offset, offset + len(data))
        if self.kept is not None:
            self._write_behind()
        self._shrink()

    def saved(self, start: int, end: int) -> None:
        """Bytes came straight into the partial file."""
        if self.kept is not None:
            self.kept.arrived(start, end)
            self._there.add(start, end)
            self._after_write()

    async def take(self, start: int, end: int) -> bytes | None:
        """These bytes, or None when a part of them has gone meanwhile."""
        if self.kept is not None and self.kept.present.covers(start, end):
            return await self._lane.run(
                partial(_read, self.kept.descriptor, start, end), what=f"read {self._name}"
            )
        for offset, data in self._fresh.items():
            if offset <= start and end <= offset + len(data):
                return data[start - offset : end - offset]
        return await self._gather(start, end)

    async def _gather(self, start: int, end: int) -> bytes | None:
        found = bytearray(end - start)
        held = Intervals()
        for offset, data in self._fresh.items():
            low, high = max(start, offset), min(end, offset + len(data))
            if low < high:
                found[low - start : high - start] = data[low - offset : high - offset]
                held.add(low, high)
        for low, high in held.missing(start, end):
            if self.kept is None or not self.kept.present.covers(low, high):
                return None
            piece = await self._lane.run(
                partial(_read, self.kept.descriptor, low, high), what=f"read {self._name}"
            )
            if len(piece) != high - low:
                return None
            found[low - start : high - start] = piece
        return bytes(found)

    def lose_disk(self, cause: SectorFSError) -> None:
        """The cache path failed: go on in memory."""
        kept, self.kept = self.kept, None
        if kept is None:
            return
        log.warning("%s is read without being kept: %s", self._name, cause)
        kept.close()
        self._there = Intervals((at, at + len(data)) for at, data in self._fresh.items())

    def close(self) -> None:
        """Let go of the files; what is durable stays for the next time."""
        self._fresh.clear()
        kept, self.kept = self.kept, None
        if kept is not None:
            kept.close()

    def _shrink(self) -> None:
        """In memory alone the oldest bytes make room; otherwise they leave by being written."""
        while self._fresh_bytes > MEMORY and len(self._fresh) > 1:
            offset = next(iter(self._fresh))
            data = self._fresh.pop(offset)
            self._fresh_bytes -= len(data)
            if self.kept is None or not self.kept.present.covers(offset, offset + len(data)):
                self._there.discard(offset, offset + len(data))

    def _write_behind(self) -> None:
        if not self._writing:
            self._writing = True
            self._nursery.start_soon(self._write_all)

    async def _write_all(self) -> None:
        try:
            while self._fresh and self.kept is not None:
                batch = list(self._fresh.items())
                await self.kept.write(batch)
                for offset, data in batch:
                    if self._fresh.get(offset) is data:
                        del self._fresh[offset]
                        self._fresh_bytes -= len(data)
                    self._there.add(offset, offset + len(data))
                self._after_write()
        except SectorFSError as exc:
            self.lose_disk(exc)
        finally:
            self._writing = False

    def _after_write(self) -> None:
        kept = self.kept
        if kept is None:
            return
        if kept.is_whole:
            self.on_whole()
        elif kept.unsynced >= SYNC_EVERY and not self._syncing:
            self._syncing = True
            self._nursery.start_soon(self.sync)

    async def sync(self) -> None:
        """Make what came durable; failures end the keeping."""
        try:
            if self.kept is not None:
                await self.kept.sync()
        except SectorFSError as exc:
            self.lose_disk(exc)
        finally:
            self._syncing = False


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
