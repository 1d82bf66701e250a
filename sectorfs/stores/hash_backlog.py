"""What of one storage path is still to be hashed, and what of it comes next.

The catalog says what there is: a file that was declared without a digest is to be hashed, so that
nothing is lost with a node that dies. A pass through it counts what is left and finds the backlog;
what is asked for, new or put off waits in the `Line` before it.

Copies wait until the digest of a primary is known: to believe a copy that nothing could be compared
with would make its content the truth. Of a storage that several nodes have each begins with its own
part, and takes what others left in the second pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import trio

from sectorfs import metrics
from sectorfs.errors import SectorFSError, StorageUnavailable
from sectorfs.index.catalog import Catalog
from sectorfs.index.content import exact
from sectorfs.stores.hash_line import Line
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest_store import Key, ManifestStore, keys_of, shard_of
from sectorfs.types import Facts, SectorFile

PASS_EVERY = 3600.0
"""Seconds between two passes through the catalog; what changes meanwhile is told at once."""
CHECK_EVERY = 86_400.0
"""Seconds between two passes that also look whether manifests of hashed files are still here."""
LOOK_EVERY = 5.0
"""Seconds between two looks at which nodes have a storage: who came or went changes the parts."""
SLICE = 100
"""Sector files looked at in the catalog before others have their turn."""
REFUSED_FOR = 86_400.0
"""Seconds for which a file with other bytes than its digest says is not read again."""


class RepoFailed(Exception):
    """The disk of the repo failed: no fault of the file."""


@contextmanager
def keeping() -> Iterator[None]:
    """What fails within is the repo's disk."""
    try:
        yield
    except SectorFSError as exc:
        raise RepoFailed(str(exc)) from exc


class Left(msgspec.Struct):
    """What is still to be hashed."""

    files: int = 0
    size: int = 0


class Backlog:
    """The sector files of one path that are to be hashed, in the order of their turns."""

    def __init__(
        self,
        path: LocalPath,
        catalog: Catalog,
        manifests: ManifestStore,
        own_urls: Sequence[str],
    ) -> None:
        self.counted = False
        """It is known what is left."""
        self._path = path
        self._catalog = catalog
        self._manifests = manifests
        self._own_urls = own_urls
        self._line = Line()
        self._found: deque[SectorFile] = deque()  # of one slice
        self._cursor: SectorFile | None = None
        self._next_pass = self._next_check = -1.0
        self._passing = self._checking = False
        self._others_too = False
        self._shared_by: list[str] = []
        self._refused: dict[SectorFile, tuple[Facts, float]] = {}
        self._tell_left(Left())

    def ask(self, file: SectorFile) -> None:
        """Somebody wants its manifest."""
        self._line.ask(file)

    def note(self, file: SectorFile) -> None:
        """A file is new here, or another."""
        facts = self.wanted(file) if self._is_ours(file) else None
        if facts is not None and self._line.note(file):
            self._tell_left(Left(self.left.files + 1, self.left.size + facts.size))

    def again(self, file: SectorFile) -> None:
        """Take it once more: what failed was no fault of it."""
        self._line.note(file)

    def done(self, file: SectorFile, facts: Facts) -> None:
        """It is hashed, and the Index told."""
        self._line.done(file)
        if not facts.digest:
            files, size = max(0, self.left.files - 1), max(0, self.left.size - facts.size)
            self._tell_left(Left(files, size))

    def failed(self, file: SectorFile) -> None:
        """Take it again later."""
        self._line.put_off(file, trio.current_time())

    def refuse(self, file: SectorFile, facts: Facts) -> None:
        """Its bytes are wrong: let a day pass before they are read again."""
        self._line.done(file)
        self._refused[file] = facts.bare, trio.current_time() + REFUSED_FOR

    def retry(self, file: SectorFile) -> None:
        """It was repaired, perhaps."""
        self._refused.pop(file, None)
        self._line.ask(file)

    def pass_soon(self) -> None:
        """Go through the catalog again."""
        self._next_pass = trio.current_time()

    def due(self) -> float:
        """When to ask `next` again after it found nothing."""
        soon = trio.current_time() + LOOK_EVERY
        return min(soon, self._next_pass, self._line.next_due() or self._next_pass)

    async def next(self) -> SectorFile | None:
        """The next file; None when nothing is left but what is put off."""
        if not self._path.available:
            raise StorageUnavailable(self._path.error, self._path.path)
        while (file := self._line.next(trio.current_time())) is not None:
            if self.wanted(file, asked=True) is not None:
                return file
            self._line.done(file)
        file = await self._next_of_pass()
        if file is None:
            self._count_failed()
        return file

    def wanted(self, file: SectorFile, *, asked: bool = False) -> Facts | None:
        """The facts of a file that is to be hashed; one that was `asked` for may be hashed again,
        because its manifest is lost."""
        facts = self._catalog.declared(file, self._path.storage)
        if facts is None or (facts.digest and not asked):
            return None
        if file.file_type.is_directory and not facts.members:
            return None
        refused, until = self._refused.get(file, (None, 0.0))
        if refused == facts.bare and trio.current_time() < until:
            return None
        primary, digest = self._comparison(file, facts)
        return facts if primary or digest else None

    def digest(self, file: SectorFile, facts: Facts) -> bytes:
        """What a file must hash to; empty when nobody knows."""
        return self._comparison(file, facts)[1]

    def _comparison(self, file: SectorFile, facts: Facts) -> tuple[bool, bytes]:
        """Whether a file is primary here, and its `digest`."""
        entry = self._catalog.entry(file)
        for own in entry.declarations if entry is not None else ():
            if own.storage == self._path.storage:
                if facts.digest:
                    return own.primary, facts.digest
                present = entry.facts if entry is not None else None
                same = present is not None and exact(own, present)
                return own.primary, present.digest if present is not None and same else b""
        return False, b""

    # Passes through the catalog

    async def _next_of_pass(self) -> SectorFile | None:
        while True:
            now = trio.current_time()
            while self._found:
                file = self._found.popleft()
                if self._line.may(file, now):
                    return file
            if not self._passing and not await self._begin_pass(now):
                return None
            await self._look_on()

    async def _begin_pass(self, now: float) -> bool:
        """Begin a pass when it is time, and count what there is to do."""
        urls = self._urls()
        if now < self._next_pass and not self._line.overflown and urls == self._shared_by:
            return False
        # What the others left in the meantime is left for good: they may be dead.
        self._others_too = self.counted and urls == self._shared_by
        self._line.overflown, self._shared_by = False, urls
        self._passing, self._cursor = True, None
        self._checking = now >= self._next_check
        left, after = Left(), None
        while files := self._files(after):
            after = files[-1]
            for file in files:
                facts = self._of_pass(file)
                if facts is not None:
                    left.files += 1
                    left.size += facts.size
            await trio.lowlevel.checkpoint()
        self._tell_left(left)
        self.counted = True
        return True

    async def _look_on(self) -> None:
        """Look at the next slice."""
        files = self._files(self._cursor)
        if not files:
            now = trio.current_time()
            self._passing, self._next_pass = False, now + PASS_EVERY
            if self._checking:
                self._next_check = now + CHECK_EVERY
        else:
            self._cursor = files[-1]
            self._found.extend(file for file in files if self._of_pass(file) is not None)
            if self._checking:
                self._found.extend(await self._without_manifest(files))
        await trio.lowlevel.checkpoint()

    def _files(self, after: SectorFile | None) -> list[SectorFile]:
        return self._catalog.files_of(self._path.storage, after=after, limit=SLICE)

    def _of_pass(self, file: SectorFile) -> Facts | None:
        return self.wanted(file) if self._others_too or self._is_ours(file) else None

    def _is_ours(self, file: SectorFile) -> bool:
        """Whether a file is in this node's part of a storage that several have."""
        urls = self._urls()
        mine = [place for place, url in enumerate(urls) if url in self._own_urls]
        return not mine or int(shard_of(file), 16) % len(urls) == mine[0]

    def _urls(self) -> list[str]:
        status = self._catalog.storage(self._path.storage)
        return sorted(status.info.urls) if status is not None else []

    async def _without_manifest(self, files: Sequence[SectorFile]) -> list[SectorFile]:
        """Those that were hashed and have no manifest here, where no other node has it either."""
        if len(self._urls()) > 1:
            return []
        keys: dict[Key, SectorFile] = {}
        for file in files:
            facts = self.wanted(file, asked=True)
            if facts is not None and facts.digest:
                keys |= dict.fromkeys(keys_of(self._path.storage, file, facts), file)
        with keeping():
            absent = await self._manifests.absent(list(keys))
        return list(dict.fromkeys(keys[key] for key in absent))

    # What is left

    def _count_failed(self) -> None:
        """Nothing else is left."""
        facts = [self.wanted(file) for file in self._line.failed]
        sizes = [one.size for one in facts if one is not None]
        self._tell_left(Left(len(sizes), sum(sizes)))

    def _tell_left(self, left: Left) -> None:
        self.left: Left = left
        """As the last pass found it, with what came and what was hashed since."""
        metrics.HASH_LEFT_BYTES.labels(self._path.storage).set(left.size)
        metrics.HASH_LEFT_FILES.labels(self._path.storage).set(left.files)
