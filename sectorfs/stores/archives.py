"""Receive a sector directory as a tar stream: from nodes without listings.

Each file goes to a `Sink` as it comes, which puts it where it is to be: each is whole once its last
byte came, and the verdict at the end says whether the directory is. What is *expected* (the facts
that other nodes declared) bounds names and sizes to the byte. Without it the names of a sector
directory and their caps do.

The first lotus servers never mark the end of a stream, so that one that broke between two files
looks like the whole. Such an end is believed only when every expected file came, or, where nothing
is expected, when the files are at least those of a finalized directory: names are sent in ascending
order and ``t_aux`` is the last, so nothing is missing before it.

Curio sends only the files it knows and does not say what it left out, and after a move the source
is deleted. So a directory that is to be *whole* is asked for with every file, and believed only to
be so when it has what was expected, or exactly the files of a sector between two steps of sealing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

from sectorfs.errors import SectorFSError, SourceFailed
from sectorfs.metrics import FETCHED_BYTES, SOURCE_FAILURES
from sectorfs.stores import layout
from sectorfs.stores.copies import Copies, Partial
from sectorfs.stores.proof import Tally
from sectorfs.stores.tar_reader import Ending, MemberBegins, MemberData, MemberEnds, TarReader
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.whole_proof import WholeProof, whole_leaves
from sectorfs.stores.writing import SteadyWrites
from sectorfs.types import Facts, MemberFacts, SectorFile

_WRITE = 1 << 20
"""Bytes that one thread hop writes."""


class Sink(Protocol):
    """Where the files of a directory go, one after the other."""

    async def begin(self, name: str, size: int) -> None:
        """A file of so many bytes comes."""

    async def write(self, data: memoryview, offset: int) -> None:
        """Take its next bytes."""

    async def end(self, size: int, mtime_ns: int) -> None:
        """It is whole: keep it, with this time."""

    async def over(self) -> None:
        """All files came, and are what they should be."""

    async def give_up(self) -> None:
        """It will never be whole; there may be none."""


async def fetch_directory(
    peers: PeerClient,
    sink: Sink,
    base_url: str,
    file: SectorFile,
    *,
    expected: Facts | None,
    whole: bool,
    proof: WholeProof | None,
    progress: Callable[[int], object],
) -> Facts:
    """Receive a directory's files; its facts, which are `expected` where that is given.

    `SourceFailed` unless all of it came; the files that did come stay in the sink. `whole`: nothing
    may be missing that the source has. `WrongBytes` for files that are not what the `proof` says.
    """
    names = {member.name for member in expected.members or ()} if expected else None
    minimal = not whole and names is not None and names <= layout.MINIMAL.keys()
    try:
        async with peers.archive(base_url, file, minimal=minimal) as response:
            arriving = _Arriving(sink, expected, proof, response.url, progress)
            try:
                while (piece := await response.piece()) is not None:
                    await arriving.feed(piece)
                facts = arriving.facts(whole=whole)
                if proof is not None:
                    proof.over(response.url)
                await sink.over()
                return facts
            except BaseException:
                await sink.give_up()
                raise
    except SectorFSError:
        SOURCE_FAILURES.inc()
        raise


class _Arriving:
    """One stream on its way to a sink."""

    def __init__(
        self,
        sink: Sink,
        expected: Facts | None,
        proof: WholeProof | None,
        url: str,
        progress: Callable[[int], object],
    ) -> None:
        self._sink = sink
        self._expected = expected
        self._proof = proof
        self._tally = Tally(0)
        self._url = url
        self._progress = progress
        self._done = 0
        allow = layout.FULL_OURS
        if expected is not None:
            allow = {member.name: member.size for member in expected.members or ()}
        self._reader = TarReader(url, max_total=sum(allow.values()), allow=allow)
        self._held = bytearray()  # at most `_WRITE` and a piece
        self._written = 0
        """Bytes of the present file that the sink has."""

    async def feed(self, piece: bytes) -> None:
        """Take the next bytes of the stream."""
        for event in self._reader.feed(piece):
            match event:
                case MemberBegins(facts):
                    size = self._wanted(facts).size
                    await self._sink.begin(facts.name, size)
                    self._tally = Tally(size)
                    self._written = 0
                case MemberData(data):
                    self._held += data
                    if len(self._held) >= _WRITE:
                        held = len(self._held)
                        await self._flush(whole_leaves(held) if self._proof else held)
                case MemberEnds(facts):
                    await self._flush(len(self._held))
                    wanted = self._wanted(facts)
                    if self._proof is not None:
                        self._proof.take(wanted.name, self._tally, self._url)
                    await self._sink.end(wanted.size, wanted.mtime_ns)

    def facts(self, *, whole: bool) -> Facts:
        """What came, once the stream is over; `SourceFailed` when that is not all."""
        ending = self._reader.finish()
        came = {member.name: member for member in ending.members}
        if self._expected is not None:
            for wanted in self._expected.members or ():
                if wanted.name not in came:
                    raise SourceFailed(f"the tar lacks {wanted.name}", self._url)
            return self._expected
        self._require_all(ending, whole=whole)
        members = tuple(came[name] for name in sorted(came))
        newest = max((member.mtime_ns for member in members), default=0)
        return Facts(sum(member.size for member in members), newest, members)

    def _require_all(self, ending: Ending, *, whole: bool) -> None:
        sizes = {member.name: member.size for member in ending.members}
        if ending.unterminated and not layout.is_finalized(sizes):
            raise SourceFailed("the tar has no end and may be cut off", self._url)
        if whole and not layout.is_whole_cache(sizes):
            raise SourceFailed(
                "sends what may not be all of its directory",
                self._url,
                "other programs leave out files that they do not know: move it by hand",
            )

    def _wanted(self, came: MemberFacts) -> MemberFacts:
        """The facts to keep; a file of another size than expected is another file."""
        wanted = self._expected.member(came.name) if self._expected is not None else None
        if wanted is not None and wanted.size != came.size:
            raise SourceFailed(
                f"sends {came.size} bytes of {came.name} instead of {wanted.size}", self._url
            )
        return wanted or came

    async def _flush(self, count: int) -> None:
        """Hand on the first of the bytes that are held."""
        if not count:
            return
        held = self._held[:count]
        del self._held[:count]
        if self._proof is not None:
            await self._proof.add(self._tally, memoryview(held))
        await self._sink.write(memoryview(held), self._written)
        self._written += len(held)
        self._done += len(held)
        FETCHED_BYTES.inc(len(held))
        self._progress(self._done)


class CacheSink:
    """Keeps files in the cache path, each of them readable as soon as it is whole.

    A `late` one shows none of them before all came.
    """

    def __init__(self, copies: Copies, file: SectorFile, *, late: bool) -> None:
        self._copies = copies
        self._file = file
        self._late = late
        self._partial: Partial | None = None
        self._run: SteadyWrites | None = None
        self._waiting: list[tuple[Partial, int, int]] = []

    async def begin(self, name: str, size: int) -> None:
        """See `Sink`."""
        self._partial = await self._copies.begin(self._file, name, size, archive=True)
        self._run = SteadyWrites(self._copies.write, self._partial.descriptor)

    async def write(self, data: memoryview, offset: int) -> None:
        """See `Sink`."""
        assert self._partial is not None
        assert self._run is not None
        call = partial(write_at, self._partial.descriptor, data, offset)
        await self._run(call, what=f"write copy of {self._file}")
        self._run.wrote(offset + len(data))

    async def end(self, size: int, mtime_ns: int) -> None:
        """See `Sink`."""
        assert self._partial is not None
        self._waiting.append((self._partial, size, mtime_ns))
        self._partial = None
        if not self._late:
            await self._commit()

    async def over(self) -> None:
        """See `Sink`."""
        await self._commit()

    async def give_up(self) -> None:
        """See `Sink`."""
        partials = [partial for partial, _, _ in self._waiting]
        for one in (*partials, *([self._partial] if self._partial is not None else ())):
            await self._copies.discard(one)

    async def _commit(self) -> None:
        while self._waiting:
            one, size, mtime_ns = self._waiting[0]
            await self._copies.commit(one, size=size, mtime_ns=mtime_ns)
            self._waiting.pop(0)


class Nowhere:
    """Keeps nothing: for a look at what a node has."""

    async def begin(self, name: str, size: int) -> None:
        """See `Sink`."""

    async def write(self, data: memoryview, offset: int) -> None:
        """See `Sink`."""

    async def end(self, size: int, mtime_ns: int) -> None:
        """See `Sink`."""

    async def over(self) -> None:
        """See `Sink`."""

    async def give_up(self) -> None:
        """See `Sink`."""


def write_at(descriptor: AbstractContextManager[int], data: memoryview, offset: int) -> None:
    """Write all of it; blocks."""
    with descriptor as fd:
        while data:
            count = os.pwrite(fd, data, offset)
            data, offset = data[count:], offset + count
