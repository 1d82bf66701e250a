"""Reads whole files for their hashes, whatever their disk makes of it.

A block that cannot be read is noted, and the rest is read all the same; blocks that seem wrong are
read a second time before anybody is told, because disks and buses err as well.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

import msgspec
import trio

from sectorfs.errors import DiskError, SectorFSError, Stale
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import (
    BLOCK,
    HASH,
    Manifest,
    Outline,
    block_count,
    leaf_count,
)
from sectorfs.stores.medium import CHUNK, Medium
from sectorfs.stores.others import Subject
from sectorfs.stores.verdicts import differing

log = logging.getLogger(__name__)

READERS = 2
"""Reads of a disk at a time: one comes while the other is hashed."""
DOUBTED = 256
"""Blocks of a file that are read a second time before they are believed to be wrong."""
MOST_UNREADABLE = 64
"""Blocks of a file that are asked of a failing disk one by one; each may take it seconds."""

_LEAVES = leaf_count(BLOCK)


class Meter(Protocol):
    """Who paces reads, and follows them."""

    async def turn(self, path: LocalPath, count: int) -> None:
        """Wait until so many bytes may be read."""

    async def done(self, path: LocalPath, count: int, seconds: float) -> None:
        """So many were read; whoever else waits for the disk goes first now."""


class FileRead(msgspec.Struct, frozen=True, kw_only=True):
    """A regular file, read as far as its disk gave it."""

    subject: Subject
    size: int
    mtime_ns: int
    blocks: bytes
    """The hash of each block; nothing that means anything for one that is unreadable."""
    unreadable: tuple[int, ...] = ()
    """Numbers of blocks, ascending."""
    trouble: str = ""
    """What the disk said of the first of them."""
    manifest: Manifest | None = None
    """Of what was read, where it was to be kept and all could be read."""

    @property
    def digest(self) -> bytes:
        """Of what was read; empty unless all of it was."""
        return b"" if self.unreadable else Outline(self.size, self.blocks).digest

    def wrong(self, outline: Outline) -> tuple[int, ...]:
        """The blocks that are not what they should be, or cannot be read."""
        return tuple(sorted({*differing(self.blocks, outline.blocks), *self.unreadable}))


async def read_whole(path: LocalPath, subject: Subject, meter: Meter, *, keep: bool) -> FileRead:
    """Hash a file; its leaf hashes as well where a manifest is to be kept.

    `Stale` when it changes meanwhile.
    """
    medium = await Medium.open(path.name_of(subject.file, subject.member), path.lane)
    try:
        reading = _Reading(path, medium, meter, keep=keep)
        await reading.run()
        if not await medium.is_same():
            raise Stale("changed while it was read", medium.name)
        return reading.result(subject)
    finally:
        medium.close()


async def read_again(path: LocalPath, found: FileRead, outline: Outline, meter: Meter) -> FileRead:
    """Read what seems wrong a second time, unless it is so much that there is no doubt."""
    doubted = differing(found.blocks, outline.blocks)
    if len(doubted) > DOUBTED:
        return found
    subject = found.subject
    blocks = bytearray(found.blocks)
    unreadable = set(found.unreadable)
    medium = await Medium.open(path.name_of(subject.file, subject.member), path.lane)
    try:
        if (medium.size, medium.mtime_ns) != (found.size, found.mtime_ns):
            raise Stale("changed while it was read", medium.name)
        for block in set(doubted) - unreadable:
            start, length = block * BLOCK, min(BLOCK, found.size - block * BLOCK)
            await meter.turn(path, length)
            again = (await medium.hashes(start, length)).blocks
            if again != blocks[HASH * block : HASH * (block + 1)]:
                log.warning("%s: block %d was read wrongly once", medium.name, block)
                blocks[HASH * block : HASH * (block + 1)] = again
    finally:
        medium.close()
    return msgspec.structs.replace(found, blocks=bytes(blocks))


class _Reading:
    """One file on its way."""

    def __init__(self, path: LocalPath, medium: Medium, meter: Meter, *, keep: bool) -> None:
        self._path = path
        self._medium = medium
        self._meter = meter
        self._blocks = bytearray(HASH * block_count(medium.size))
        self._leaves = bytearray(HASH * leaf_count(medium.size)) if keep else None
        self._unreadable: set[int] = set()
        self._trouble = ""

    async def run(self) -> None:
        starts = iter(range(0, self._medium.size, CHUNK))
        failures: list[SectorFSError] = []

        async def work() -> None:
            try:
                for start in starts:
                    await self._chunk(start, min(CHUNK, self._medium.size - start))
            except SectorFSError as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(READERS):
                nursery.start_soon(work)
        if failures:
            raise failures[0]

    def result(self, subject: Subject) -> FileRead:
        size, manifest = self._medium.size, None
        if self._leaves is not None and not self._unreadable:
            manifest = Manifest.of_leaves(size, bytes(self._leaves))
        return FileRead(
            subject=subject,
            size=size,
            mtime_ns=self._medium.mtime_ns,
            blocks=bytes(self._blocks),
            unreadable=tuple(sorted(self._unreadable)),
            trouble=self._trouble,
            manifest=manifest,
        )

    async def _chunk(self, start: int, length: int) -> None:
        try:
            await self._part(start, length)
        except DiskError as exc:
            self._trouble = self._trouble or exc.what
            for offset in range(start, start + length, BLOCK):
                await self._block(offset, min(BLOCK, start + length - offset))

    async def _block(self, start: int, length: int) -> None:
        if len(self._unreadable) < MOST_UNREADABLE:
            try:
                await self._part(start, length)
                return
            except DiskError as exc:
                log.warning("%s: block %d: %s", self._medium.name, start // BLOCK, exc.what)
        self._unreadable.add(start // BLOCK)

    async def _part(self, start: int, length: int) -> None:
        await self._meter.turn(self._path, length)
        before = time.perf_counter()
        found = await self._medium.hashes(start, length)
        _put(self._blocks, start // BLOCK, found.blocks)
        if self._leaves is not None:
            _put(self._leaves, start // BLOCK * _LEAVES, found.leaves)
        await self._meter.done(self._path, length, time.perf_counter() - before)


def _put(hashes: bytearray, first: int, some: bytes) -> None:
    hashes[HASH * first : HASH * first + len(some)] = some
