"""Receives one whole file, or a whole directory, from one source into the cache path.

Where the Index has a digest nothing is put into place before it was proved: a file by its own
digest, the files of a directory by its roll, or all of them together by the digest of the directory
where nobody has its roll.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from sectorfs.errors import NotFound, SectorFSError, WrongBytes
from sectorfs.index.catalog import Catalog
from sectorfs.index.content import facts_of
from sectorfs.metrics import PROVED_BYTES
from sectorfs.stores.archives import CacheSink, fetch_directory
from sectorfs.stores.copies import Copies, Partial
from sectorfs.stores.manifest import Manifest
from sectorfs.stores.proof import Tally
from sectorfs.stores.provers import Provers
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.whole_proof import WholeProof
from sectorfs.stores.writing import SteadyWrites
from sectorfs.types import Facts, MemberFacts, SectorFile

log = logging.getLogger(__name__)

Progress = Callable[[int], object]


class WholeFetches:
    """What flights do with one source."""

    def __init__(
        self, catalog: Catalog, peers: PeerClient, copies: Copies, provers: Provers
    ) -> None:
        self._catalog = catalog
        self._peers = peers
        self._copies = copies
        self._provers = provers

    async def file(
        self,
        source: PeerSource,
        file: SectorFile,
        wanted: MemberFacts,
        digest: bytes,
        progress: Progress,
    ) -> None:
        """A regular file, or one of a directory; proved unless the digest is empty."""
        member = wanted.name or None
        partial = await self._copies.begin(file, member, wanted.size)
        try:
            tally = Tally(wanted.size) if digest else None
            await self._bring(source, file, wanted, partial, tally, progress)
            made = tally.manifest() if tally is not None else None
            if made is not None and made.digest != digest:
                raise WrongBytes(f"gave wrong bytes of {_name(file, member)}", source.url)
            await self._copies.commit(partial, size=wanted.size, mtime_ns=wanted.mtime_ns)
        except BaseException:
            await self._copies.discard(partial)
            raise
        if made is not None:
            await self._keep(file, wanted, made)

    async def directory(
        self, source: PeerSource, file: SectorFile, facts: Facts | None, progress: Progress
    ) -> Facts:
        """A directory, as one stream or file by file, and the facts of what came."""
        proof = await self._provers.directory(file, facts)
        try:
            came = await fetch_directory(
                self._peers,
                CacheSink(self._copies, file, late=proof is not None and proof.is_late),
                source.url,
                file,
                expected=facts,
                whole=False,
                proof=proof,
                progress=progress,
            )
        except NotFound:
            # Our nodes send no stream, since they know each file; all are wanted for their digest.
            if proof is None or facts is None or not proof.is_late:
                raise
            await self._members(source, file, facts, proof, progress)
            came = facts
        for member in came.members or ():
            made = proof.manifests.get(member.name) if proof is not None else None
            if made is not None:
                await self._keep(file, member, made)
        return came

    async def _members(
        self,
        source: PeerSource,
        file: SectorFile,
        facts: Facts,
        proof: WholeProof,
        progress: Progress,
    ) -> None:
        """All files of a directory, one by one, and none is put into place before all came."""
        partials: list[tuple[Partial, MemberFacts]] = []
        before = 0
        try:
            for member in facts.members or ():
                one = await self._copies.begin(file, member.name, member.size, archive=True)
                partials.append((one, member))
                tally = Tally(member.size)
                so_far = partial(_add, progress, before)
                await self._bring(source, file, member, one, tally, so_far)
                proof.take(member.name, tally, source.url)
                before += member.size
            proof.over(source.url)
            for one, member in partials:
                await self._copies.commit(one, size=member.size, mtime_ns=member.mtime_ns)
        except BaseException:
            for one, _ in partials:
                await self._copies.discard(one)
            raise

    async def _bring(
        self,
        source: PeerSource,
        file: SectorFile,
        wanted: MemberFacts,
        into: Partial,
        tally: Tally | None,
        progress: Progress,
    ) -> None:
        run = SteadyWrites(self._copies.write, into.descriptor)

        def came(done: int) -> None:
            progress(done)
            run.wrote(done)

        told = facts_of(self._catalog.declared(file, source.storage), wanted.name or None)
        await self._peers.fetch(
            source.url,
            file,
            wanted.name or None,
            into.descriptor,
            size=wanted.size,
            mtime_ns=told.mtime_ns if told else None,
            run=run,
            progress=came,
            sieve=tally,
        )

    async def _keep(self, file: SectorFile, wanted: MemberFacts, made: Manifest) -> None:
        """A copy without its manifest is as good."""
        PROVED_BYTES.inc(made.size)
        try:
            await self._provers.keep_one(file, wanted.name or None, wanted.mtime_ns, made)
        except SectorFSError as exc:
            log.info("%s: its manifest is not kept: %s", _name(file, wanted.name), exc)


def _add(progress: Progress, before: int, done: int) -> None:
    progress(before + done)


def _name(file: SectorFile, member: str | None) -> str:
    return f"{file}/{member}" if member else str(file)
