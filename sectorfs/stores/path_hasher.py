"""Hashes the files of one storage path, keeps their manifests and tells the Index their digests.

One file at a time, its leaf hashes kept now and then, so that a restart goes on in its middle. What
is found is told only of what lies there by then: under the path's lock for changes, and after one
more look. A file whose bytes are not those of a digest that is known already is an event: nothing
is told of it, and its manifest is not kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import trio
import xattr

from sectorfs import metrics
from sectorfs.errors import NotFound, SectorFSError, SourceFailed, StorageUnavailable, Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import SectorIndex
from sectorfs.stores.digest_news import tell_digests
from sectorfs.stores.hash_backlog import Backlog, RepoFailed, keeping
from sectorfs.stores.hash_pace import HashPace, PathPace
from sectorfs.stores.hash_progress import HashProgress
from sectorfs.stores.hashing import FileHash, Opened, Read, changed, open_to_hash
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import HASH, LEAF, Manifest, directory_digest
from sectorfs.stores.manifest_adoption import Adoption
from sectorfs.stores.manifest_store import Key, ManifestStore, keys_of
from sectorfs.types import Facts, SectorFile

log = logging.getLogger(__name__)

XATTR = "user.sectorfs.content"
"""``<size> <mtime in ns> <digest in hex>`` on the file itself, where the configuration says so."""

TROUBLE_PAUSE = 30.0
"""Seconds to wait when the repo's disk, the path or the Index fails."""


class Shared(msgspec.Struct, frozen=True):
    """What the hashers of all paths use."""

    catalog: Catalog
    index: SectorIndex
    manifests: ManifestStore
    progress: HashProgress
    pace: HashPace
    xattr: bool
    urls: tuple[str, ...]
    """Base URLs of this node."""
    adoption: Adoption


class Current(NamedTuple):
    """What is being hashed."""

    key: Key
    done: int


class PathHasher:
    """The hashing of one path; `run` is its task."""

    def __init__(self, path: LocalPath, shared: Shared) -> None:
        self.path = path
        self.backlog = Backlog(path, shared.catalog, shared.manifests, shared.urls)
        self.current: Current | None = None
        self.trouble = ""
        """Why nothing is hashed now, besides a pause; empty while all is well."""
        self.bad: dict[SectorFile, str] = {}
        """Files with other bytes than their digest says, or that cannot be read."""
        self.pace = PathPace(shared.pace, path.lane)
        self._shared = shared
        self._wake = trio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    async def run(self) -> None:
        """Hash until cancelled."""
        while True:
            self._wake = trio.Event()
            try:
                file = await self.backlog.next()
                if file is not None:
                    await self._take(file)
                self.trouble = ""
                if file is None:
                    await self._rest(self.backlog.due())
            except (Unreachable, StorageUnavailable, RepoFailed) as exc:
                self.trouble = str(exc)
                log.debug("hashing %s waits: %s", self.path.path, exc)
                await self._rest(trio.current_time() + TROUBLE_PAUSE)
            except Exception:  # the boundary of a task in the node's nursery
                log.exception("hashing %s failed", self.path.path)
                await self._rest(trio.current_time() + TROUBLE_PAUSE)

    async def _rest(self, until: float) -> None:
        with trio.move_on_at(until):
            await self._wake.wait()
        await trio.lowlevel.checkpoint()

    # One sector file

    async def _take(self, file: SectorFile) -> None:
        """Hash a sector file, unless it is put off for a reason of its own."""
        facts = self.backlog.wanted(file, asked=True)
        if facts is None:
            return
        try:
            await self._sector_file(file, facts)
        except (Unreachable, StorageUnavailable, RepoFailed):
            self.backlog.again(file)
            raise
        except SectorFSError as exc:
            self.backlog.failed(file)
            metrics.HASH_FAILURES.inc()
            if isinstance(exc, NotFound | SourceFailed):
                self.path.note(file)
                log.info("%s is not hashed now: %s", file, exc)
            elif self.bad.get(file) != str(exc):
                self._note_bad(file, str(exc))

    async def _sector_file(self, file: SectorFile, facts: Facts) -> None:
        keys = keys_of(self.path.storage, file, facts)
        with keeping():
            digests = await self._shared.manifests.digests(keys)
        if facts.digest and not all(digests):
            digests = await self._adopted(file, facts, keys, digests)
        before = list(digests)
        for place, key in enumerate(keys):
            if not digests[place]:
                digests[place] = await self._file(key)
        found = digests[0]
        if facts.members is not None:
            names = [(key.member or "", key.size) for key in keys]
            found = directory_digest((*one, two) for one, two in zip(names, digests, strict=True))
        wanted = self.backlog.digest(file, facts)
        if wanted and found != wanted:
            await self._disagrees(file, facts, keys, read=not all(before))
        else:
            await self._declare(file, facts, found)
            self.bad.pop(file, None)
            self.backlog.done(file, facts)

    async def _adopted(
        self, file: SectorFile, facts: Facts, keys: Sequence[Key], digests: Sequence[bytes]
    ) -> list[bytes]:
        """The digests with those whose manifests other nodes still had; these are kept here now."""
        lost = [key for key, digest in zip(keys, digests, strict=True) if not digest]
        made = await self._shared.adoption.adopt(file, facts, lost)
        with keeping():
            for key, one in made.items():
                await self._shared.manifests.require_room(key)
                await self._shared.manifests.save(key, one)
        return [
            made[key].digest if key in made else digest
            for key, digest in zip(keys, digests, strict=True)
        ]

    async def _disagrees(
        self, file: SectorFile, facts: Facts, keys: Sequence[Key], *, read: bool
    ) -> None:
        """What lies there is not what was hashed before, here or elsewhere."""
        with keeping():
            await self._shared.manifests.remove(keys)
        if not read:  # nor need the manifests be right: the next try reads the bytes
            raise SourceFailed("its manifest is of another content", file)
        self.backlog.refuse(file, facts)
        self._note_bad(file, f"{file}: its bytes are not those of its digest")

    def _note_bad(self, file: SectorFile, text: str) -> None:
        log.error("%s: %s", self.path.path, text)
        self.bad.pop(file, None)
        while len(self.bad) >= 1000:
            del self.bad[next(iter(self.bad))]
        self.bad[file] = text

    async def _declare(self, file: SectorFile, facts: Facts, digest: bytes) -> None:
        """Tell the digest of what lies there, if it is still what was hashed."""
        if facts.digest == digest:
            return
        lane = self.path.lane
        used_at = lane.used_at
        told = msgspec.structs.replace(facts, digest=digest)
        count = await tell_digests(self._shared.index, self.path, [(file, told)])
        lane.used_at = used_at  # that was no reader
        if not count:
            raise SourceFailed(
                "changed while it was hashed, or the Index is of an older version", file
            )

    # One regular file

    async def _file(self, key: Key) -> bytes:
        """The digest of a file whose manifest is made and kept now."""
        shared = self._shared
        with keeping():
            await shared.manifests.require_room(key)
        opened = await open_to_hash(self.path.name_of(key.file, key.member), self.path.lane)
        try:
            if (opened.identity.size, opened.identity.mtime_ns) != (key.size, key.mtime_ns):
                raise changed(opened.name)
            made = await self._hash(key, opened)
            with keeping():
                await shared.manifests.save(key, made)
                await shared.progress.drop(key)
            if shared.xattr:
                await self._mark(key, opened, made)
        finally:
            self.current = None
            opened.close()
        return made.digest

    async def _hash(self, key: Key, opened: Opened) -> Manifest:
        progress = self._shared.progress
        with keeping():
            known = await progress.read(key, opened.identity)
        self.current = Current(key, min(len(known) // HASH * LEAF, key.size))

        def saw(read: Read) -> None:
            assert self.current is not None
            self.current = Current(key, self.current.done + read.count)
            self.pace.read(read.count, read.allowed, seconds=read.seconds)
            metrics.HASHED_BYTES.inc(read.count)

        async def keep(place: int, leaves: bytes) -> None:
            with suppress(SectorFSError):  # it is only lost to a restart
                await progress.keep(key, opened.identity, place, leaves)

        return await FileHash(
            opened, known=known, turn=self.pace.turn, keep=keep, progress=saw
        ).run()

    async def _mark(self, key: Key, opened: Opened, made: Manifest) -> None:
        text = f"{key.size} {key.mtime_ns} {made.digest.hex()}".encode()

        def call() -> None:
            with opened.descriptor as fd, suppress(OSError):
                xattr.xattr(f"/proc/self/fd/{fd}").set(XATTR, text)

        with suppress(SectorFSError):
            await self.path.lane.run(call, what=f"mark {opened.name}", background=True)
