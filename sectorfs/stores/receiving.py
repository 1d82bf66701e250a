"""Receives a sector file from another node into a storage path of this one.

From nodes of ours a directory comes file by file, and so does a regular file from any node. A
directory of another program's node comes as one tar (`archives`). Whatever comes is brought into
place as `incoming` does it: whole, with the sizes and times of its source, or not at all. Where the
source's copy was declared with a digest it is proved too, for what is moved is deleted there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec

from sectorfs.errors import (
    BadInput,
    Forbidden,
    NoSource,
    NotFound,
    SectorFSError,
    SourceFailed,
    Stale,
    Unauthorized,
    Unreachable,
)
from sectorfs.index.content import same_mtime
from sectorfs.stores.archives import Nowhere, fetch_directory, write_at
from sectorfs.stores.incoming import Incoming
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import leaf_hashes
from sectorfs.stores.proof import Tally
from sectorfs.stores.reservation import Claim
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.whole_proof import WholeProof
from sectorfs.stores.writing import SteadyWrites
from sectorfs.types import Facts, MemberFacts, SectorFile, StorageID

log = logging.getLogger(__name__)

_OF_SOURCE = (SourceFailed, NotFound, Stale, Unreachable, Unauthorized, Forbidden, BadInput)
"""What one source may fail with while the next is worth asking: our own disk's errors are not."""


class Moving(msgspec.Struct):
    """A file on its way to a path of this node."""

    file: SectorFile
    to: StorageID
    size: int = 0
    done: int = 0

    def more(self, count: int) -> None:
        """So many more bytes came."""
        self.done += count


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The node that a file comes from, and what it has."""

    url: str
    facts: Facts
    ours: bool
    """It runs this program, and so keeps its own declarations true."""


class Receiver:
    """Receives files from nodes that serve them."""

    def __init__(self, *, peers: PeerClient, space: SpaceLedger, owner: str) -> None:
        self._peers = peers
        self._space = space
        self._owner = owner

    async def receive(
        self,
        moving: Moving,
        urls: Sequence[str],
        target: LocalPath,
        lane: Lane,
        *,
        declared: Facts | None,
        whole: bool,
    ) -> Origin:
        """Receive a file from the first of several nodes that gives it.

        `declared` is what is known of the source's copy. `whole`: the source will be deleted, so
        that nothing it has may be missing.
        """

        async def attempt(url: str) -> Origin:
            moving.done = 0
            try:
                told = await self._peers.told(url, moving.file)
            except NotFound:
                if not moving.file.file_type.is_directory:
                    raise
                facts = await self._receive_archive(moving, url, target, lane, declared, whole)
                return Origin(url=url, facts=facts, ours=False)
            proof = _proof_of(moving.file, declared, told.facts, lane)
            await self._receive_parts(moving, url, told.facts, proof, target, lane)
            return Origin(url=url, facts=told.facts, ours=told.by_ours)

        return await self._first(moving.file, urls, attempt, "gives it")

    async def look(self, file: SectorFile, urls: Sequence[str]) -> Origin:
        """What the first of several nodes has that tells of a file: as tar, where need be."""

        async def attempt(url: str) -> Origin:
            try:
                told = await self._peers.told(url, file)
            except NotFound:
                if not file.file_type.is_directory:
                    raise
                facts = await fetch_directory(
                    *(self._peers, Nowhere(), url, file),
                    expected=None,
                    whole=True,
                    proof=None,
                    progress=_ignore,
                )
                return Origin(url=url, facts=facts, ours=False)
            return Origin(url=url, facts=told.facts, ours=told.by_ours)

        return await self._first(file, urls, attempt, "tells of it")

    async def still_has(self, file: SectorFile, url: str) -> bool:
        """Whether a node of another program, whose errors say nothing, gives a file yet."""
        try:
            if not file.file_type.is_directory:
                await self._peers.facts(url, file)
            else:
                async with self._peers.archive(url, file, minimal=True):
                    pass
        except (NotFound, SourceFailed):
            return False
        return True

    async def _first(
        self,
        file: SectorFile,
        urls: Sequence[str],
        attempt: Callable[[str], Awaitable[Origin]],
        does: str,
    ) -> Origin:
        causes: list[SectorFSError] = []
        for url in urls:
            try:
                return await attempt(url)
            except _OF_SOURCE as exc:
                log.warning("%s: source %s failed: %s", file, url, exc)
                causes.append(exc)
        raise NoSource(f"no node of its storage {does}", file, causes)

    # File by file

    async def _receive_parts(
        self,
        moving: Moving,
        url: str,
        facts: Facts,
        proof: WholeProof | None,
        target: LocalPath,
        lane: Lane,
    ) -> None:
        file = moving.file
        incoming = Incoming(target, lane, file, owner=self._owner)
        members = facts.members
        if members is None:
            members = (MemberFacts("", facts.size, facts.mtime_ns),)
        moving.size = facts.size
        async with self._space.reserve([_claim(target, file, facts.size)]):
            try:
                await incoming.begin()
                for member in members:
                    await self._receive_part(moving, url, member, proof, incoming, lane)
                if proof is not None:
                    proof.over(url)
                if (await self._peers.facts(url, file)).bare != facts.bare:
                    raise Stale("changed while it was moved", f"{url}: {file}", "move it again")
                await incoming.commit(facts.mtime_ns)
            except BaseException:
                await incoming.discard()
                raise

    async def _receive_part(
        self,
        moving: Moving,
        url: str,
        member: MemberFacts,
        proof: WholeProof | None,
        incoming: Incoming,
        lane: Lane,
    ) -> None:
        before = moving.done
        writer = await incoming.create(member.name)
        run = SteadyWrites(lane.finish, writer)
        tally = Tally(member.size) if proof is not None else None

        def progress(done: int) -> None:
            moving.done = before + done
            run.wrote(done)

        try:
            await self._peers.fetch(
                url,
                moving.file,
                member.name or None,
                writer,
                size=member.size,
                mtime_ns=member.mtime_ns,
                run=run,
                progress=progress,
                sieve=tally,
            )
            if proof is not None and tally is not None:
                proof.take(member.name, tally, url)
            await incoming.end(writer, member.size, member.mtime_ns)
        finally:
            writer.close()
        moving.done = before + member.size

    # As tar

    async def _receive_archive(
        self,
        moving: Moving,
        url: str,
        target: LocalPath,
        lane: Lane,
        declared: Facts | None,
        whole: bool,
    ) -> Facts:
        file = moving.file
        incoming = Incoming(target, lane, file, owner=self._owner)
        size = moving.size = declared.size if declared is not None else 0

        def progress(done: int) -> None:
            moving.done = done

        async with self._space.reserve([_claim(target, file, size)]):
            try:
                await incoming.begin()
                facts = await fetch_directory(
                    *(self._peers, _IncomingSink(incoming, lane), url, file),
                    expected=declared,
                    whole=whole,
                    proof=_proof_of(file, declared, declared, lane),
                    progress=progress,
                )
                await incoming.commit(facts.mtime_ns)
            except BaseException:
                await incoming.discard()
                raise
        return facts


class _IncomingSink:
    """Files of a tar on their way into a storage path; all of them are given up together."""

    def __init__(self, incoming: Incoming, lane: Lane) -> None:
        self._incoming = incoming
        self._lane = lane
        self._writer: Descriptor | None = None
        self._run: SteadyWrites | None = None

    async def begin(self, name: str, size: int) -> None:
        """See `Sink`."""
        self._writer = await self._incoming.create(name)
        self._run = SteadyWrites(self._lane.finish, self._writer)

    async def write(self, data: memoryview, offset: int) -> None:
        """See `Sink`."""
        assert self._writer is not None
        assert self._run is not None
        await self._run(partial(write_at, self._writer, data, offset), what="write")
        self._run.wrote(offset + len(data))

    async def end(self, size: int, mtime_ns: int) -> None:
        """See `Sink`."""
        assert self._writer is not None
        await self._incoming.end(self._writer, size, mtime_ns)
        self._writer.close()

    async def over(self) -> None:
        """See `Sink`."""

    async def give_up(self) -> None:
        """See `Sink`."""
        if self._writer is not None:
            self._writer.close()


def _proof_of(
    file: SectorFile, declared: Facts | None, given: Facts | None, lane: Lane
) -> WholeProof | None:
    """What proves the content that a node gives; None when nobody told the digest of that."""
    if declared is None or given is None or not declared.digest:
        return None
    if declared.size != given.size or not same_mtime(declared.mtime_ns, given.mtime_ns):
        return None

    async def compute(parts: Sequence[memoryview]) -> list[bytes]:
        return await lane.run(lambda: [leaf_hashes(one) for one in parts], what="hash what came")

    return WholeProof(str(file), declared.digest, None, compute)


def _claim(target: LocalPath, file: SectorFile, size: int) -> Claim:
    return Claim(storage=target.storage, file=file, size=size, place="fetching")


def _ignore(done: int) -> None:
    """No progress wanted."""
