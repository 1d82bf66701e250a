"""What other copies of a sector file give: what proves it, and blocks of it, which are proved here.

A copy on another path of this node comes before one that another node serves. Which of them is the
very content does not matter: the digest decides, and the next copy is asked when one is wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import msgspec
import trio

from sectorfs.errors import NoSource, SectorFSError, SourceFailed
from sectorfs.index.catalog import Catalog
from sectorfs.index.content import facts_of
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.manifest import BLOCK, HASH, Outline, block_hash, leaf_hashes
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.rolls import Roll, make_roll
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

T = TypeVar("T")


class Copy(msgspec.Struct, frozen=True):
    """A place that has a sector file."""

    storage: StorageID
    url: str
    """Base URL of the node that serves it; empty for a path of this node."""

    def __str__(self) -> str:
        return self.url or self.storage


class Subject(msgspec.Struct, frozen=True):
    """A regular file, on one storage, that others may help with."""

    file: SectorFile
    member: str | None
    storage: StorageID

    def __str__(self) -> str:
        return f"{self.file}/{self.member}" if self.member is not None else str(self.file)


class Others:
    """Asks the other holders of sector files."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        local: LocalStore,
        peers: PeerClient,
        manifests: ManifestStore,
        own_urls: frozenset[str],
        cutoff: float,
    ) -> None:
        self._catalog = catalog
        self._local = local
        self._peers = peers
        self._manifests = manifests
        self._own_urls = own_urls
        self._cutoff = cutoff

    def copies(self, file: SectorFile, *, without: StorageID) -> list[Copy]:
        """Where else a file is: here first, then at nodes, the healthy before the others."""
        entry = self._catalog.entry(file)
        now = trio.current_time()
        here: list[Copy] = []
        away: list[tuple[bool, Copy]] = []
        for one in entry.declarations if entry is not None else ():
            if one.storage == without:
                continue
            status = self._catalog.storage(one.storage)
            unwell = not self._catalog.healthy(one.storage, now, self._cutoff)
            if self._local.path_of(one.storage) is not None:
                here.append(Copy(one.storage, ""))
            urls = status.info.urls if status is not None else ()
            away += [(unwell, Copy(one.storage, url)) for url in urls if url not in self._own_urls]
        return here + [copy for _, copy in sorted(away, key=lambda pair: pair[0])]

    async def roll(self, file: SectorFile, digest: bytes, *, without: StorageID) -> Roll | None:
        """What the files of a directory must hash to; None when nobody can say."""

        async def ask(copy: Copy) -> Roll:
            if copy.url:
                return await self._peers.roll(copy.url, file, digest=digest)
            return await self._own_roll(file, digest, copy.storage)

        return await self._first(file, without, ask)

    async def outline(self, subject: Subject, size: int, digest: bytes) -> Outline | None:
        """What the blocks of a file must hash to; None when nobody can say."""

        async def ask(copy: Copy) -> Outline:
            if copy.url:
                return await self._peers.outline(
                    copy.url, subject.file, subject.member, size=size, digest=digest
                )
            return await self._own_outline(subject, size, digest, copy.storage)

        return await self._first(subject.file, subject.storage, ask)

    async def block(self, subject: Subject, outline: Outline, block: int, *, lane: Lane) -> bytes:
        """The bytes of a block, proved; `NoSource`, with every cause, when nobody has them.

        They are hashed in a thread of `lane`.
        """
        causes: list[SectorFSError] = []
        span = block * BLOCK, min((block + 1) * BLOCK, outline.size)
        for copy in self.copies(subject.file, without=subject.storage):
            try:
                data = await self._bytes(copy, subject, span)
                what = f"hash a block of {subject}"
                if await lane.run(partial(_proves, outline, block, data), what=what):
                    return data
                raise SourceFailed(f"gives wrong bytes in block {block}", f"{copy} {subject}")
            except SectorFSError as exc:
                log.info("no block %d of %s: %s", block, subject, exc)
                causes.append(exc)
        raise NoSource("no good copy elsewhere", subject, causes)

    async def _first(
        self, file: SectorFile, without: StorageID, ask: Callable[[Copy], Awaitable[T]]
    ) -> T | None:
        for copy in self.copies(file, without=without):
            try:
                return await ask(copy)
            except SectorFSError as exc:
                log.debug("%s: nothing that proves it: %s", file, exc)
        return None

    async def _own_roll(self, file: SectorFile, digest: bytes, storage: StorageID) -> Roll:
        facts = self._catalog.declared(file, storage)
        members = facts.members if facts is not None and facts.members else ()
        keys = [Key(storage, file, one.name, one.size, one.mtime_ns) for one in members]
        digests = await self._manifests.digests(keys)
        if keys and all(digests):
            roll = make_roll(
                [(one.name, one.size, found) for one, found in zip(members, digests, strict=True)]
            )
            if roll.digest == digest:
                return roll
        raise SourceFailed("has no manifests of that content", f"{storage} {file}")

    async def _own_outline(
        self, subject: Subject, size: int, digest: bytes, storage: StorageID
    ) -> Outline:
        known = facts_of(self._catalog.declared(subject.file, storage), subject.member)
        if known is not None and known.size == size:
            key = Key(storage, subject.file, subject.member, size, known.mtime_ns)
            manifest = await self._manifests.load(key)
            if manifest is not None and manifest.digest == digest:
                return manifest.outline
        raise SourceFailed("has no manifest of that content", f"{storage} {subject}")

    async def _bytes(self, copy: Copy, subject: Subject, span: tuple[int, int]) -> bytes:
        if not copy.url:
            return await self._own_bytes(copy.storage, subject, span)
        came: list[bytes] = []
        await self._peers.ranges(
            copy.url,
            subject.file,
            subject.member,
            [span],
            expect=None,
            leaves=False,
            deliver=lambda _, data, __: came.append(data),
        )
        return b"".join(came)

    async def _own_bytes(
        self, storage: StorageID, subject: Subject, span: tuple[int, int]
    ) -> bytes:
        opened = await self._local.open_at(storage, subject.file, subject.member)
        start, end = span

        def call() -> bytes:
            with opened.descriptor as fd:
                return os.pread(fd, end - start, start)

        try:
            return await opened.lane.run(call, what=f"read {opened.path}")
        finally:
            opened.close()


def _proves(outline: Outline, block: int, data: bytes) -> bool:
    wanted = outline.blocks[HASH * block : HASH * (block + 1)]
    return block_hash(leaf_hashes(data)) == wanted
