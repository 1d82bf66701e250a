"""What this node proves of the files of others, and the manifests that it keeps of its copies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from sectorfs.errors import NoProof, SectorFSError
from sectorfs.index.catalog import Catalog
from sectorfs.stores.carriers import PeerManifests
from sectorfs.stores.manifest import Manifest
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.places import Places
from sectorfs.stores.prover import Prover, Proving, Subject
from sectorfs.stores.rolls import Roll, make_roll
from sectorfs.stores.sessions import Wanted
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.whole_proof import WholeProof
from sectorfs.types import Facts, MemberFacts, SectorFile, StorageID

log = logging.getLogger(__name__)


class Provers:
    """Makes provers, and knows which copies of the cache path were proved."""

    def __init__(
        self,
        catalog: Catalog,
        peers: PeerClient,
        places: Places,
        manifests: ManifestStore | None,
        *,
        storage: StorageID,
        sources: Callable[[SectorFile], Sequence[PeerSource]],
        failed: Callable[[SectorFile, PeerSource, SectorFSError], object],
    ) -> None:
        """`storage` is that of the cache path; without `manifests` nothing is kept."""
        self._catalog = catalog
        self._peers = peers
        self._places = places
        self._manifests = manifests
        self._storage = storage
        self._sources = sources
        self._failed = failed
        self._proving = Proving()

    def digested(self, wanted: Wanted) -> Wanted:
        """The same with its digest, once somebody told it."""
        entry = None if wanted.digest else self._catalog.entry(wanted.file)
        facts = entry.facts if entry is not None else None
        if facts is None or not facts.digest or facts.bare != wanted.facts.bare:
            return wanted
        return msgspec.structs.replace(wanted, facts=facts)

    def of(self, wanted: Wanted) -> Prover | None:
        """What proves a file that is read; None while nobody told its digest."""
        return self.prover(wanted.file, wanted.member, wanted.facts, wanted.size)

    def prover(
        self, file: SectorFile, member: str | None, facts: Facts | None, size: int
    ) -> Prover | None:
        """The same by the facts of the whole sector file."""
        if facts is None or not facts.digest:
            return None
        return Prover(
            Subject(file, member, facts, size),
            self._proving,
            PeerManifests(self._peers, self._places, file, member),
            sources=lambda: self._sources(file),
            failed=partial(self._failed, file),
        )

    async def digest_of(self, file: SectorFile, member: str | None, facts: Facts | None) -> bytes:
        """The digest of a regular file, or one of a directory; empty while nobody told any.

        `NoProof` when nobody has that of one file of a directory.
        """
        if file.file_type.is_directory and member is None:
            return b""
        prover = self.prover(file, member, facts, 0)
        return await prover.own_digest() if prover is not None else b""

    async def directory(self, file: SectorFile, facts: Facts | None) -> WholeProof | None:
        """What proves a whole directory; None while nobody told its digest."""
        prover = self.prover(file, None, facts, 0)
        if prover is None:
            return None
        roll: Roll | None = None
        try:
            roll = await prover.roll()
        except NoProof as exc:
            log.info("%s: proved by its digest alone: %s", file, exc)
        return WholeProof(str(file), prover.subject.digest, roll, self._proving.hash)

    def known_digest(self, file: SectorFile, member: str, digest: bytes) -> bytes:
        """That of a file of a directory with this digest; empty while it was not asked for."""
        roll = self._proving.roll(file, digest)
        entry = roll.entry(member) if roll is not None else None
        return entry.digest if entry is not None else b""

    async def keep(self, wanted: Wanted, manifest: Manifest) -> None:
        """Keep the manifest of a file of the cache path, which was proved."""
        await self.keep_one(wanted.file, wanted.member, wanted.mtime_ns, manifest)

    async def keep_one(
        self, file: SectorFile, member: str | None, mtime_ns: int, manifest: Manifest
    ) -> None:
        """The same by what it is of."""
        if self._manifests is not None:
            key = Key(self._storage, file, member, manifest.size, mtime_ns)
            await self._manifests.save(key, manifest)

    async def copy_digest(self, file: SectorFile, facts: Facts) -> bytes:
        """The digest of a whole copy by the manifests kept of it; empty when one is lacking."""
        if self._manifests is None:
            return b""
        members = facts.members
        if members is None:
            members = (MemberFacts("", facts.size, facts.mtime_ns),)
        keys = [
            Key(self._storage, file, one.name or None, one.size, one.mtime_ns) for one in members
        ]
        try:
            digests = await self._manifests.digests(keys)
        except SectorFSError as exc:
            log.info("%s: its digest is not told: %s", file, exc)
            return b""
        if not digests or not all(digests):
            return b""
        if facts.members is None:
            return digests[0]
        named = zip(members, digests, strict=True)
        return make_roll([(one.name, one.size, digest) for one, digest in named]).digest
