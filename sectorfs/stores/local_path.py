"""One attached storage path: its state, and the disk calls, each in a thread of the path's lane.

State changes on the loop only. A path is *available* while its ``sectorstore.json`` answers with
its id; a path that is not keeps its declarations, because its files are still on the disk that is
missing.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import trio

from sectorfs import metrics
from sectorfs.errors import SectorFSError, StorageUnavailable
from sectorfs.index.protocol import FsStat, StorageInfo
from sectorfs.stores.file_systems import FileSystems, look_at_directory
from sectorfs.stores.lanes import Lane
from sectorfs.stores.metadata import Metadata, read_metadata
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.regular import Excerpt, Spans, open_regular, read_excerpt
from sectorfs.stores.scan import Identity, Look, Names, check_identity, empty_type, look_many
from sectorfs.stores.settling import Settling
from sectorfs.stores.space import RawSpace, fs_stat, raw_space, usage_steps
from sectorfs.types import FileType, SectorFile, StorageID

log = logging.getLogger(__name__)

T = TypeVar("T")

SETTLING_LIMIT = 4096
"""Files that may wait for a second look; when more change at once, the type is scanned again."""
SPACE_AGE = 5.0
"""Seconds for which an answer of statfs serves everybody who asks."""
LOGGED_ODD = 20
"""Odd entries named in the log per scan of a type; the rest is counted."""

_GAUGES = (
    metrics.STORAGE_HEALTHY,
    metrics.STORAGE_CAPACITY,
    metrics.STORAGE_AVAILABLE,
    metrics.STORAGE_SILENT,
)


class LocalPath:
    """One storage path of this node."""

    def __init__(
        self,
        path: str,
        info: StorageInfo,
        lane: Lane,
        *,
        identity: tuple[int, int],
        real: str,
        settle: float,
    ) -> None:
        self.path = path
        """As it was attached; absolute."""
        self.identity = identity
        """Device and inode of the directory, to know it under another name; as last probed."""
        self.real = real
        """Its name without symbolic links."""
        self.info = info
        self.lane = lane
        self.available = True
        self.error = ""
        """Why it is not available."""
        self.file_systems = FileSystems()
        """Which of its files lie on a file system of this machine."""
        self.file_system = ""
        """Name of the local file system below it; empty for any other."""
        self.on_lost: Callable[[StorageID], object] | None = None
        """Told when it becomes unavailable, and when it is detached."""
        self.trouble: dict[FileType, str] = {}
        """Type directories that cannot be read, and why."""
        self.stat = FsStat()
        self.used: int | None = None
        """Bytes its files occupy; measured only under a limit."""
        self.used_at = -math.inf
        """When the walk that told `used` began."""
        self.account: Callable[[LocalPath], Awaitable[FsStat]] | None = None
        """Counts what is promised on it; None where nobody promises anything."""
        self.settling = Settling(settle=settle, limit=SETTLING_LIMIT)
        self.dirty: dict[FileType, bool] = {}
        """Types to scan again; True: look at every file, False: names suffice."""
        self.attached = False
        """The Index knows it with our URLs, as far as we know."""
        self.blocked = False
        """The Index failed; the next heartbeat it answers ends this."""
        self.watched: dict[FileType, bool] = {}
        """Types with a watch; True when the watch sees every change, False on a network."""
        self.type_ids: dict[FileType, Identity] = {}
        """Type directories as they were when they last had files in them."""
        self.looked: dict[FileType, int] = {}
        """Modification times of the type directories at the last scan; -1 if too new to trust."""
        self.changing = trio.Lock()
        """Held over declare and over verify-and-drop, so that neither undoes the other."""
        self.removals = 0
        """Grows with every removal, under `changing`: looks from before it may be of what went."""
        self.scanning = trio.Lock()
        """Held over a scan. Order: `scanning`, then `changing`."""
        self.settling_turn = trio.Lock()
        self.scope = trio.CancelScope()
        """Around the tasks that keep this path."""
        self._wake = trio.Event()
        self._changed_unseen = False
        self._space_at = -math.inf
        self._odd: dict[FileType, frozenset[str]] = {}

    @property
    def storage(self) -> StorageID:
        """Its id."""
        return self.info.storage

    @property
    def primary(self) -> bool:
        """Files found here are authoritative; on a path that may not store they are copies."""
        return self.info.can_store

    def name_of(self, file: SectorFile, member: str | None = None) -> str:
        """Where a file lies, or would."""
        parts = [self.path, file.file_type.dir_name, file.sector.name]
        return os.path.join(*parts, member) if member is not None else os.path.join(*parts)

    # State

    def fail(self, exc: SectorFSError) -> SectorFSError:
        """It does not answer, or is another one; its declarations stay. Returns `exc`."""
        reason = f"{exc.what} ({exc.hint})" if exc.hint else exc.what
        if self.available or self.error != reason:
            log.warning("storage path %s is unavailable: %s", self.path, reason)
        # A disk that was only silent has lost nothing: watches and waiting looks go on.
        self._changed_unseen = self._changed_unseen or type(exc) is not StorageUnavailable
        was_available, self.available = self.available, False
        self.error = reason
        if was_available:
            self.lose()
        metrics.STORAGE_HEALTHY.labels(self.storage).set(0)
        return exc

    def recover(self) -> None:
        """It answers again; what happened while it was lost is found by a complete scan."""
        if not self.available:
            log.info("storage path %s is available again", self.path)
        if self._changed_unseen:
            self._changed_unseen = False
            self.settling.clear()
            self.looked.clear()
            self.mark_dirty(deep=True)
        self.available = True
        self.error = ""
        metrics.STORAGE_HEALTHY.labels(self.storage).set(1)

    def lose(self) -> None:
        """Nobody is to be given files that were opened on it before."""
        if self.on_lost is not None:
            self.on_lost(self.storage)

    def forget_metrics(self) -> None:
        """It is detached: show its figures no longer."""
        for gauge in _GAUGES:
            gauge.remove(self.storage)

    def health_error(self) -> str:
        """What to tell operators; empty when all is well."""
        return self.error or "; ".join(self.trouble.values())

    def mark_dirty(self, *types: FileType, deep: bool) -> None:
        """Have types (default: all) scanned again soon."""
        for file_type in types or FileType:
            self.dirty[file_type] = deep or self.dirty.get(file_type, False)
        self.wake()

    def note(self, file: SectorFile) -> None:
        """Something may have happened to a file; never blocks."""
        if self.dirty.get(file.file_type) or self.settling.note(file, trio.current_time()):
            self.wake()
        else:
            self.mark_dirty(file.file_type, deep=True)

    def wake(self) -> None:
        """There may be work for the tasks that keep this path; each looks for its own."""
        self._wake.set()
        self._wake = trio.Event()

    async def wait_for_work(self, until: float) -> None:
        """Sleep until `wake` or the time `until`."""
        with trio.move_on_at(until):
            await self._wake.wait()

    def tell_odd(self, names: Names) -> None:
        """Log the odd entries that were not there at the last scan."""
        before = self._odd.get(names.file_type, frozenset())
        self._odd[names.file_type] = frozenset(name for name, _ in names.odd)
        fresh = [(name, reason) for name, reason in names.odd if name not in before]
        metrics.SCAN_ODD_ENTRIES.inc(len(fresh))
        where = os.path.join(self.path, names.file_type.dir_name)
        for name, reason in fresh[:LOGGED_ODD]:
            log.warning("%s: skipped %r: %s", where, name[:300], reason)
        if len(fresh) > LOGGED_ODD:
            log.warning("%s: skipped %d more odd entries", where, len(fresh) - LOGGED_ODD)

    # Disk

    async def probe(self) -> None:
        """Ask the disk for identity and space, and set availability; a sick disk does not raise."""
        try:
            raw, self.identity, self.file_system = await self.lane.share(
                self._probe, what="health check"
            )
            self._take_space(raw)
            if self.account is not None:
                self.stat = await self.account(self)
        except SectorFSError as exc:
            self.fail(exc)
            return
        self.recover()

    def _probe(self) -> tuple[RawSpace, tuple[int, int], str]:
        check_identity(self.path, self.storage)
        found, kind = look_at_directory(self.path)
        return raw_space(self.path), (found.st_dev, found.st_ino), kind

    def feel_pulse(self) -> None:
        """The disk fell silent, which makes it unavailable, or answers again: then `probe` it."""
        silence = self.lane.pulse.silence
        metrics.STORAGE_SILENT.labels(self.storage).set(1 if silence else 0)
        if silence:
            metrics.STORAGE_SILENCES.labels(self.storage).inc()
            self.fail(self.lane.unavailable(silence))

    def _take_space(self, raw: RawSpace) -> None:
        self.stat = fs_stat(raw, max_storage=self.info.max_storage, used=self.used)
        self._space_at = trio.current_time()
        metrics.STORAGE_CAPACITY.labels(self.storage).set(self.stat.capacity)
        metrics.STORAGE_AVAILABLE.labels(self.storage).set(self.stat.available)

    async def space(self) -> FsStat:
        """Its space, at most `SPACE_AGE` seconds old."""
        if not self.available:
            raise StorageUnavailable(self.error, self.path)
        if trio.current_time() - self._space_at > SPACE_AGE:
            self._take_space(await self.lane.share(lambda: raw_space(self.path), what="statfs"))
        if self.account is not None:
            self.stat = await self.account(self)
        return self.stat

    async def read_metadata(self) -> Metadata:
        """Its ``sectorstore.json`` as it is now."""
        return await self.lane.run(lambda: read_metadata(self.path), what="read sectorstore.json")

    async def names(self, file_type: FileType, progress: Callable[[int], object]) -> Names:
        """The sectors named in a type directory."""
        names = Names(file_type)
        await self._steps(names.steps(self.path, self.storage), "list sector files", progress)
        return names

    async def measure(self) -> int:
        """Bytes its files occupy: a walk through all of it."""
        totals: list[int] = []
        await self._steps(usage_steps(self.path), "measure use", totals.append)
        return totals[-1]

    async def _steps(
        self, steps: Iterator[int], what: str, progress: Callable[[int], object]
    ) -> None:
        # A generator that a hung thread is in cannot be closed from here; the thread's reference
        # is the last one, and ending closes what it holds open.
        while True:
            done = await self.lane.run(lambda: next(steps, None), what=what)
            if done is None:
                return
            progress(done)

    async def look(
        self, files: Sequence[SectorFile], *, arm: Callable[[SectorFile, str], object] | None = None
    ) -> list[Look]:
        """Look at files of one type, however long that takes in all."""
        looks: list[Look] = []
        while len(looks) < len(files):
            call = partial(look_many, self.path, self.storage, files[len(looks) :], arm=arm)
            looks += await self.lane.run(call, what="look at sector files")
        return looks

    def type_name(self, file_type: FileType) -> str:
        """Where a type directory is, or would be."""
        return os.path.join(self.path, file_type.dir_name)

    async def empty_type(self, file_type: FileType) -> Identity | None:
        """Identity of a type directory that has no entries; None for any other."""
        return await self.lane.run(
            lambda: empty_type(self.path, self.storage, file_type), what="look at type directory"
        )

    async def type_mtimes(self) -> dict[FileType, int]:
        """Modification times of the type directories; 0 for those that are not there."""
        return await self.lane.run(self._type_mtimes, what="look at type directories")

    def _type_mtimes(self) -> dict[FileType, int]:
        check_identity(self.path, self.storage)
        times = {}
        for file_type in FileType:
            try:
                found = os.stat(os.path.join(self.path, file_type.dir_name))
            except OSError:  # none, or unreadable: the scan tells which
                times[file_type] = 0
            else:
                times[file_type] = found.st_mtime_ns
        return times

    async def open(self, file: SectorFile, member: str | None, *, expected: bool) -> OpenFile:
        """Open a regular file; `expected`: the Index says that it is here.

        Then its absence may mean that the disk was unmounted since the last heartbeat, which is
        `StorageUnavailable`, not `NotFound`.
        """
        name = self.name_of(file, member)

        def call() -> OpenFile:
            fd, found = open_regular(name)
            try:
                file_system = self.file_systems.local(fd, found.st_dev)
            except BaseException:
                os.close(fd)
                raise
            return OpenFile(
                descriptor=self.lane.descriptor(fd),
                size=found.st_size,
                mtime_ns=found.st_mtime_ns,
                inode=found.st_ino,
                storage=self.storage,
                path=name,
                lane=self.lane,
                file_system=file_system,
            )

        return await self._open(call, name, expected, discard=lambda got: got.close())

    async def excerpt(
        self, file: SectorFile, member: str | None, spans: Spans, *, expected: bool
    ) -> Excerpt:
        """Parts of a regular file; else as `open`."""
        name = self.name_of(file, member)
        return await self._open(lambda: read_excerpt(name, spans, self.storage), name, expected)

    async def _open(
        self,
        call: Callable[[], T],
        name: str,
        expected: bool,
        *,
        discard: Callable[[T], object] | None = None,
    ) -> T:
        def checked() -> T:
            try:
                return call()
            except FileNotFoundError:
                if expected:
                    check_identity(self.path, self.storage)
                raise

        try:
            return await self.lane.run(checked, what=f"open {name}", discard=discard)
        except StorageUnavailable as exc:
            if type(exc) is not StorageUnavailable:  # else the lane judges whether the disk hangs
                self.fail(exc)
            raise
