"""Hashes the files of one storage path, keeps their manifests and tells the Index their digests.

One file at a time, its leaf hashes kept now and then, so that a restart goes on in its middle. What
is found is told only of what lies there by then: under the path's lock for changes, and after one
more look. A file whose bytes are not those of a digest that is known already is an event: nothing
is told of it, and its manifest is not kept.

Copies wait until the digest of a primary is known: to believe a copy that nothing could be compared
with would make its content the truth.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import msgspec
import trio
import xattr

from sectorfs import metrics
from sectorfs.errors import NotFound, SectorFSError, SourceFailed, StorageUnavailable, Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.index.content import exact
from sectorfs.index.protocol import SectorIndex
from sectorfs.stores.digest_news import tell_digests
from sectorfs.stores.hash_line import Line
from sectorfs.stores.hash_pace import HashPace, PathPace
from sectorfs.stores.hash_progress import HashProgress
from sectorfs.stores.hashing import FileHash, Opened, Read, changed, open_to_hash
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import HASH, LEAF, Manifest, directory_digest
from sectorfs.stores.manifest_store import Key, ManifestStore, shard_of
from sectorfs.types import Facts, SectorFile

log = logging.getLogger(__name__)

XATTR = "user.sectorfs.content"
"""``<size> <mtime in ns> <digest in hex>`` on the file itself, where the configuration says so."""

PASS_EVERY = 3600.0
"""Seconds between two passes through the catalog; what changes meanwhile is told at once."""
CHECK_EVERY = 86_400.0
"""Seconds between two passes that also look whether manifests of hashed files are still here."""
SLICE = 100
"""Sector files looked at in the catalog before others have their turn."""
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


class Left(msgspec.Struct):
    """What is still to be hashed, as the last pass found it."""

    files: int = 0
    size: int = 0


class Current(NamedTuple):
    """What is being hashed."""

    key: Key
    done: int


class _RepoFailed(Exception):
    """The disk of the repo failed: no fault of the file."""


class PathHasher:
    """The hashing of one path; `run` is its task."""

    def __init__(self, path: LocalPath, shared: Shared) -> None:
        self.path = path
        self.line = Line()
        self._tell_left(Left())
        self.current: Current | None = None
        self.trouble = ""
        """Why nothing is hashed now, besides a pause; empty while all is well."""
        self.bad: dict[SectorFile, str] = {}
        """Files with other bytes than their digest says, or that cannot be read."""
        self.counted = False
        """It is known what is left."""
        self.pace = PathPace(shared.pace, path.lane)
        self._shared = shared
        self._backlog: deque[SectorFile] = deque()
        self._cursor: SectorFile | None = None
        self._next_pass = self._next_check = -1.0
        self._passing = self._checking = False
        self._share: tuple[int, int] | None = None
        self._refused: dict[SectorFile, Facts] = {}
        self._wake = trio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def note(self, file: SectorFile) -> None:
        """A file is new here, or another."""
        facts = self._wanted(file)
        if facts is None:
            return
        if self.line.note(file):
            self._tell_left(Left(self.left.files + 1, self.left.size + facts.size))
        self.wake()

    def pass_soon(self) -> None:
        """Go through the catalog again."""
        self._next_pass = trio.current_time()
        self.wake()

    async def run(self) -> None:
        """Hash until cancelled."""
        while True:
            self._wake = trio.Event()
            try:
                file = await self._next()
                if file is not None:
                    await self._take(file)
                self.trouble = ""
                if file is None:
                    self._count_failed()
                    await self._rest(self._due())
            except (Unreachable, StorageUnavailable, _RepoFailed) as exc:
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

    def _due(self) -> float:
        return min(self._next_pass, self.line.next_due() or self._next_pass)

    # What is next

    async def _next(self) -> SectorFile | None:
        if not self.path.available:
            raise StorageUnavailable(self.path.error, self.path.path)
        while (file := self.line.next(trio.current_time())) is not None:
            if self._wanted(file, asked=True) is not None:
                return file
            self.line.done(file)
        return await self._next_of_backlog()

    async def _next_of_backlog(self) -> SectorFile | None:
        while True:
            now = trio.current_time()
            while self._backlog:
                file = self._backlog.popleft()
                if self.line.may(file, now):
                    return file
            if not self._passing and not await self._begin_pass(now):
                return None
            await self._look_on()

    async def _begin_pass(self, now: float) -> bool:
        """Begin a pass when it is time, and count what there is to do."""
        if now < self._next_pass and not self.line.overflown:
            return False
        self.line.overflown = False
        self._passing, self._cursor = True, None
        self._checking = now >= self._next_check
        # What other nodes on this storage left is done here in the second pass.
        self._share = None if self.counted else self._own_share()
        left, after = Left(), None
        while files := self._files(after):
            after = files[-1]
            for file in files:
                facts = self._wanted(file)
                if facts is not None:
                    left.files += 1
                    left.size += facts.size
            await trio.lowlevel.checkpoint()
        self._tell_left(left)
        self.counted = True
        return True

    async def _look_on(self) -> None:
        """Find more of the backlog."""
        files = self._files(self._cursor)
        if not files:
            now = trio.current_time()
            self._passing, self._next_pass = False, now + PASS_EVERY
            if self._checking:
                self._next_check = now + CHECK_EVERY
        else:
            self._cursor = files[-1]
            self._backlog.extend(file for file in files if self._wanted(file) is not None)
            if self._checking:
                self._backlog.extend(await self._without_manifest(files))
        await trio.lowlevel.checkpoint()

    def _own_share(self) -> tuple[int, int] | None:
        """Of a storage that several nodes have: which of so many parts is this node's."""
        status = self._shared.catalog.storage(self.path.storage)
        urls = sorted(status.info.urls) if status is not None else []
        mine = [place for place, url in enumerate(urls) if url in self._shared.urls]
        return (mine[0], len(urls)) if len(urls) > 1 and mine else None

    def _is_ours(self, file: SectorFile) -> bool:
        if self._share is None:
            return True
        part, parts = self._share
        return int(shard_of(file), 16) % parts == part

    def _files(self, after: SectorFile | None) -> list[SectorFile]:
        return self._shared.catalog.files_of(self.path.storage, after=after, limit=SLICE)

    async def _without_manifest(self, files: Sequence[SectorFile]) -> list[SectorFile]:
        """Those that were hashed and have no manifest here, where no other node has it either."""
        status = self._shared.catalog.storage(self.path.storage)
        if status is None or len(status.info.urls) > 1:
            return []
        keys: dict[Key, SectorFile] = {}
        for file in files:
            facts = self._shared.catalog.declared(file, self.path.storage)
            if facts is not None and facts.digest and self._wanted(file, asked=True):
                keys |= dict.fromkeys(self._keys(file, facts), file)
        with self._keeping():
            absent = await self._shared.manifests.absent(list(keys))
        return list(dict.fromkeys(keys[key] for key in absent))

    def _wanted(self, file: SectorFile, *, asked: bool = False) -> Facts | None:
        """The facts of a file that is to be hashed; one that was `asked` for may be hashed again,
        because its manifest is lost."""
        storage = self.path.storage
        facts = self._shared.catalog.declared(file, storage)
        if facts is None or (not asked and (facts.digest or not self._is_ours(file))):
            return None
        if file.file_type.is_directory and not facts.members:
            return None
        if file in self._refused and self._refused[file] == facts.bare:
            return None
        primary, wanted = self._comparison(file, facts)
        return facts if primary or wanted else None

    def _comparison(self, file: SectorFile, facts: Facts) -> tuple[bool, bytes]:
        """Whether a file is primary here, and the digest that it should have, if anybody knows."""
        entry = self._shared.catalog.entry(file)
        if entry is None:
            return False, b""
        for own in entry.declarations:
            if own.storage == self.path.storage:
                if facts.digest:
                    return own.primary, facts.digest
                same = entry.facts is not None and exact(own, entry.facts)
                return own.primary, entry.facts.digest if same and entry.facts else b""
        return False, b""

    def _keys(self, file: SectorFile, facts: Facts) -> list[Key]:
        storage = self.path.storage
        if facts.members is None:
            return [Key(storage, file, None, facts.size, facts.mtime_ns)]
        return [Key(storage, file, one.name, one.size, one.mtime_ns) for one in facts.members]

    # One sector file

    async def _take(self, file: SectorFile) -> None:
        """Hash a sector file, unless it is put off for a reason of its own."""
        facts = self._wanted(file, asked=True)
        if facts is None:
            return
        try:
            await self._sector_file(file, facts)
        except (Unreachable, StorageUnavailable, _RepoFailed):
            self.line.note(file)
            raise
        except SectorFSError as exc:
            self.line.put_off(file, trio.current_time())
            metrics.HASH_FAILURES.inc()
            if isinstance(exc, NotFound | SourceFailed):
                self.path.note(file)
                log.info("%s is not hashed now: %s", file, exc)
            elif self.bad.get(file) != str(exc):
                self._note_bad(file, str(exc))
        else:
            self.line.done(file)

    async def _sector_file(self, file: SectorFile, facts: Facts) -> None:
        keys = self._keys(file, facts)
        with self._keeping():
            digests = await self._shared.manifests.digests(keys)
        before = list(digests)
        for place, key in enumerate(keys):
            if not digests[place]:
                digests[place] = await self._file(key)
        found = digests[0]
        if facts.members is not None:
            names = [(key.member or "", key.size) for key in keys]
            found = directory_digest((*one, two) for one, two in zip(names, digests, strict=True))
        wanted = self._comparison(file, facts)[1]
        if wanted and found != wanted:
            await self._disagrees(file, facts, keys, read=not all(before))
        else:
            await self._declare(file, facts, found)
            self.bad.pop(file, None)
            self._count_done(facts)

    async def _disagrees(
        self, file: SectorFile, facts: Facts, keys: Sequence[Key], *, read: bool
    ) -> None:
        """What lies there is not what was hashed before, here or elsewhere."""
        with self._keeping():
            await self._shared.manifests.remove(keys)
        if not read:  # nor need the manifests be right: the next try reads the bytes
            raise SourceFailed("its manifest is of another content", file)
        self._refused[file] = facts.bare
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
        with self._keeping():
            await shared.manifests.require_room(key)
        opened = await open_to_hash(self.path.name_of(key.file, key.member), self.path.lane)
        try:
            if (opened.identity.size, opened.identity.mtime_ns) != (key.size, key.mtime_ns):
                raise changed(opened.name)
            made = await self._hash(key, opened)
            with self._keeping():
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
        with self._keeping():
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

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """What fails within is the repo's disk."""
        try:
            yield
        except SectorFSError as exc:
            raise _RepoFailed(str(exc)) from exc

    # What is told

    def _count_failed(self) -> None:
        """Nothing else is left."""
        facts = [self._wanted(file) for file in self.line.failed]
        sizes = [one.size for one in facts if one is not None]
        self._tell_left(Left(len(sizes), sum(sizes)))

    def _count_done(self, facts: Facts) -> None:
        if not facts.digest:
            files, size = max(0, self.left.files - 1), max(0, self.left.size - facts.size)
            self._tell_left(Left(files, size))

    def _tell_left(self, left: Left) -> None:
        self.left: Left = left
        """As the last pass found it, less what was hashed since."""
        metrics.HASH_LEFT_BYTES.labels(self.path.storage).set(left.size)
        metrics.HASH_LEFT_FILES.labels(self.path.storage).set(left.files)
