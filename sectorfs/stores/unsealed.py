"""Unpadded bytes of an unsealed sector by range, from whichever copy has them.

A copy says in its trailer which bytes it has; nothing else is ever handed out, because holes read
as zeros. An unsealed file may change while it is read, so each piece counts only if the file's
facts are, behind the read, those that its trailer was read under. A copy that fails, or misses part
of the range, is left for the next; memory holds one piece.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from sectorfs.errors import (
    BadInput,
    BadRange,
    NoSource,
    NotFound,
    SectorFSError,
    SourceFailed,
    Unreachable,
)
from sectorfs.stores import fr32, trailer
from sectorfs.stores.fr32 import Window
from sectorfs.stores.lanes import Lane
from sectorfs.stores.layout import SECTOR_SIZES
from sectorfs.stores.rle import Runs
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, SectorFile

STEP = 4 << 20
"""Padded bytes read at a time."""
LOOKS = 3
"""How often one piece is read from a copy that changes meanwhile."""
UNPAD_SECONDS = 60.0
"""One piece is unpadded in milliseconds; on a machine that swaps, in more."""


class Copy(Protocol):
    """One copy of an unsealed file."""

    async def facts(self) -> Facts:
        """Size and time as they are now."""

    async def read(self, offset: int, size: int) -> bytes:
        """Exactly these bytes of the file."""


class PeerCopy:
    """A copy behind a node's base URL."""

    def __init__(self, peers: PeerClient, base_url: str, file: SectorFile) -> None:
        self._peers = peers
        self._base_url = base_url
        self._file = file

    async def facts(self) -> Facts:
        """See `Copy.facts`."""
        return await self._peers.facts(self._base_url, self._file)

    async def read(self, offset: int, size: int) -> bytes:
        """See `Copy.read`."""
        return await self._peers.read(self._base_url, self._file, None, offset, size)


class DiskCopy:
    """A copy on a disk of this machine, for a command while no node serves it."""

    def __init__(self, path: str, lane: Lane) -> None:
        self._path = path
        self._lane = lane

    async def facts(self) -> Facts:
        """See `Copy.facts`."""
        found = await self._lane.run(lambda: os.stat(self._path), what="look at unsealed file")
        return Facts(found.st_size, found.st_mtime_ns)

    async def read(self, offset: int, size: int) -> bytes:
        """See `Copy.read`."""
        data = await self._lane.run(lambda: self._read(offset, size), what="read unsealed file")
        if len(data) != size:
            raise SourceFailed(f"has {len(data)} bytes instead of {size} at {offset}", self._path)
        return data

    def _read(self, offset: int, size: int) -> bytes:
        # O_NONBLOCK: opening a FIFO would wait for a writer.
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SourceFailed("is not a regular file", self._path)
            file.seek(offset)
            data = b""
            while len(data) < size and (part := file.read(size - len(data))):
                data = data + part if data else part
        return data


class _Seen(msgspec.Struct, frozen=True):
    """What a copy said of itself."""

    facts: Facts
    sector_size: int
    allocated: Runs
    """Padded bytes that are there."""


class UnsealedReader:
    """Reads ranges of one unsealed sector; the copies are tried in their order."""

    def __init__(self, file: SectorFile, copies: Sequence[Copy]) -> None:
        self._file = file
        self._copies = list(copies)
        self._seen: dict[Copy, _Seen] = {}
        self._lane = Lane(str(file), deadline=UNPAD_SECONDS, width=1)

    async def read(self, start: int, stop: int, write: Callable[[memoryview], object]) -> None:
        """Hand unpadded bytes `start` to `stop` to `write`, piece by piece.

        Before the first piece it is known that one copy has all of it. `NotFound` names what no
        copy has, `BadRange` a range that is not in the sector.
        """
        fr32.window(start, stop)
        position = start
        for window in fr32.windows(start, stop, step=STEP):
            write(await self._piece(window, position, stop))
            position += window.size

    async def _piece(self, window: Window, position: int, stop: int) -> memoryview:
        missing: NotFound | None = None
        causes: list[SectorFSError] = []
        for copy in tuple(self._copies):
            try:
                return await self._from(copy, window, position, stop)
            except BadRange:
                raise  # not in this sector, whichever copy is asked
            except _Missing as exc:
                missing = missing or exc
            except SectorFSError as exc:
                causes.append(exc)
            self._copies.remove(copy)
            self._copies.append(copy)  # the next piece begins with one that works
        if missing is not None:
            others = "".join(f"; another copy cannot be read: {cause}" for cause in causes)
            raise NotFound(missing.what, missing.thing, missing.hint + others)
        raise self._failure(causes)

    def _failure(self, causes: Sequence[SectorFSError]) -> SectorFSError:
        if causes and all(isinstance(cause, Unreachable) for cause in causes):
            return Unreachable(
                "no node that has it answers", self._file, "; ".join(map(str, causes))
            )
        return NoSource("no copy can be read", self._file, causes)

    async def _from(self, copy: Copy, window: Window, position: int, stop: int) -> memoryview:
        seen = self._seen.get(copy) or await self._look(copy, await copy.facts())
        for _ in range(LOOKS):
            self._check(seen, position, stop)
            padded = await copy.read(window.offset, window.length)
            facts = await copy.facts()
            if facts == seen.facts:
                return await self._unpad(window, padded)
            seen = await self._look(copy, facts)
        raise SourceFailed("changes while it is read", self._file, "try again")

    async def _unpad(self, window: Window, padded: bytes) -> memoryview:
        try:
            return await self._lane.run(lambda: window.cut(padded, thing=self._file), what="unpad")
        except BadInput as exc:
            raise SourceFailed(exc.what, exc.thing, exc.hint) from exc

    async def _look(self, copy: Copy, facts: Facts) -> _Seen:
        """Read the trailer of a copy that has these facts, if it has one."""
        sector_size, allocated = facts.size, Runs.span(0, facts.size)
        if facts.size not in SECTOR_SIZES:
            sector_size, allocated = await self._read_trailer(copy, facts.size)
        seen = self._seen[copy] = _Seen(facts, sector_size, allocated)
        return seen

    async def _read_trailer(self, copy: Copy, size: int) -> tuple[int, Runs]:
        if size <= min(SECTOR_SIZES):
            raise SourceFailed(f"is shorter than any sector: {size} bytes", self._file)
        end = await copy.read(size - trailer.LENGTH_BYTES, trailer.LENGTH_BYTES)
        length = int.from_bytes(end, "little") + trailer.LENGTH_BYTES
        if size - length not in SECTOR_SIZES or length > trailer.MAX_LENGTH:
            raise SourceFailed(f"no sector of any size with its trailer: {size} bytes", self._file)
        data = await copy.read(size - length, length)
        return size - length, trailer.decode(data, sector_size=size - length, thing=self._file)

    def _check(self, seen: _Seen, start: int, stop: int) -> None:
        """`_Missing` unless all of a range is there, `BadRange` unless it is in the sector."""
        end = fr32.unpadded(seen.sector_size)
        if stop > end:
            raise BadRange(f"the sector ends at {end}", self._file, f"asked for {start} to {stop}")
        window = fr32.window(start, stop)
        wanted = Runs.span(window.offset, window.length)
        gaps = tuple(wanted.minus(seen.allocated).spans())
        if gaps:
            first = max(start, fr32.unpadded(gaps[0][0]))
            last = min(stop, fr32.unpadded(gaps[0][1]))
            raise _Missing(
                f"bytes {first} to {last} are not unsealed",
                self._file,
                f"asked for {start} to {stop}",
            )


class _Missing(NotFound):
    """A copy that can be read lacks part of the range."""
