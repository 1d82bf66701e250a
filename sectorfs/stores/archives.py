"""Receive a sector directory as a tar stream into the cache path: from nodes without listings.

Each file is committed as its last byte comes, like one that was fetched by itself; whoever fetches
decides by the verdict at the end whether the directory is whole. What is *expected* (the facts that
other nodes declared) bounds names and sizes to the byte. Without it the names of a sector directory
and their caps do.

The first lotus servers never mark the end of a stream, so that one that broke between two files
looks like the whole. Such an end is believed only when every expected file came, or, where nothing
is expected, when the files are at least those of a finalized directory: names are sent in ascending
order and ``t_aux`` is the last, so nothing is missing before it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import trio

from sectorfs.errors import SectorFSError, SourceFailed
from sectorfs.metrics import FETCHED_BYTES, SOURCE_FAILURES
from sectorfs.stores import layout
from sectorfs.stores.copies import Copies, Partial
from sectorfs.stores.tar_reader import MemberBegins, MemberData, MemberEnds, TarReader
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, MemberFacts, SectorFile

_WRITE = 1 << 20
"""Bytes that one thread hop writes."""


async def fetch_directory(
    peers: PeerClient,
    copies: Copies,
    base_url: str,
    file: SectorFile,
    *,
    expected: Facts | None,
    progress: Callable[[int], object],
) -> Facts:
    """Receive a directory's files; its facts, which are `expected` where that is given.

    `SourceFailed` unless all of it came; the files that did come stay.
    """
    names = {member.name for member in expected.members or ()} if expected else None
    minimal = names is not None and names <= layout.MINIMAL.keys()
    try:
        async with peers.archive(base_url, file, minimal=minimal) as response:
            arriving = _Arriving(copies, file, expected, response.url, progress)
            try:
                while (piece := await response.piece()) is not None:
                    await arriving.feed(piece)
                return arriving.facts()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await arriving.give_up()
                raise
    except SectorFSError:
        SOURCE_FAILURES.inc()
        raise


class _Arriving:
    """One stream on its way to the disk."""

    def __init__(
        self,
        copies: Copies,
        file: SectorFile,
        expected: Facts | None,
        url: str,
        progress: Callable[[int], object],
    ) -> None:
        self._copies = copies
        self._file = file
        self._expected = expected
        self._url = url
        self._progress = progress
        self._done = 0
        allow = layout.FULL_OURS
        if expected is not None:
            allow = {member.name: member.size for member in expected.members or ()}
        self._reader = TarReader(url, max_total=sum(allow.values()), allow=allow)
        self._partial: Partial | None = None
        self._held = bytearray()  # at most `_WRITE` and a piece
        self._written = 0
        """Bytes of the present file that are on disk."""

    async def feed(self, piece: bytes) -> None:
        """Take the next bytes of the stream."""
        for event in self._reader.feed(piece):
            match event:
                case MemberBegins(facts):
                    await self._begin(facts)
                case MemberData(data):
                    self._held += data
                    if len(self._held) >= _WRITE:
                        await self._flush()
                case MemberEnds(facts):
                    await self._end(facts)

    def facts(self) -> Facts:
        """What came, once the stream is over; `SourceFailed` when that is not all."""
        ending = self._reader.finish()
        came = {member.name: member for member in ending.members}
        if self._expected is not None:
            for wanted in self._expected.members or ():
                if wanted.name not in came:
                    raise SourceFailed(f"the tar lacks {wanted.name}", self._url)
            return self._expected
        if ending.unterminated and not _is_finalized(ending.members):
            raise SourceFailed("the tar has no end and may be cut off", self._url)
        members = tuple(came[name] for name in sorted(came))
        newest = max((member.mtime_ns for member in members), default=0)
        return Facts(sum(member.size for member in members), newest, members)

    async def give_up(self) -> None:
        """Remove the file that is not whole."""
        if self._partial is not None:
            await self._copies.discard(self._partial)

    def _wanted(self, came: MemberFacts) -> MemberFacts:
        """The facts to keep; a file of another size than expected is another file."""
        wanted = self._expected.member(came.name) if self._expected is not None else None
        if wanted is not None and wanted.size != came.size:
            raise SourceFailed(
                f"sends {came.size} bytes of {came.name} instead of {wanted.size}", self._url
            )
        return wanted or came

    async def _begin(self, came: MemberFacts) -> None:
        size = self._wanted(came).size
        self._partial = await self._copies.begin(self._file, came.name, size, archive=True)
        self._written = 0

    async def _flush(self) -> None:
        held, self._held = self._held, bytearray()
        if not held or self._partial is None:
            return
        call = partial(_write, self._partial, memoryview(held), self._written)
        await self._copies.write(call, what=f"write copy of {self._file}")
        self._written += len(held)
        self._done += len(held)
        FETCHED_BYTES.inc(len(held))
        self._progress(self._done)

    async def _end(self, came: MemberFacts) -> None:
        await self._flush()
        assert self._partial is not None
        wanted = self._wanted(came)
        await self._copies.commit(self._partial, size=wanted.size, mtime_ns=wanted.mtime_ns)
        self._partial = None


def _write(target: Partial, data: memoryview, offset: int) -> None:
    with target.descriptor as fd:
        while data:
            count = os.pwrite(fd, data, offset)
            data, offset = data[count:], offset + count


def _is_finalized(members: Sequence[MemberFacts]) -> bool:
    """At least the files that a finalized sector of some size has, as long as they must be."""
    sizes = {member.name: member.size for member in members}
    return any(
        all(name in sizes and sizes[name] in lengths for name, lengths in files.items())
        for files in map(layout.finalized_cache, layout.SECTOR_SIZES)
    )
