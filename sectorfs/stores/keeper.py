"""Keeps the Index true about one storage path: heartbeats, scans, looks, declarations.

A scan lists names, then compares them chunk by chunk with the Index's own pages in the same order,
so that memory is bounded and only differences are sent. Whatever is to be dropped is looked at once
more, through a descriptor of the path that proved its id, while nothing is being declared.

Four tasks per path, so that a long scan holds up neither heartbeats nor new files; a path that
hangs holds up its own four. When the Index is away the work stays marked and is done after the
heartbeat that the Index answers again.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TypeVar

import msgspec
import trio

from sectorfs import metrics
from sectorfs.config import StorageConfig
from sectorfs.errors import (
    DiskError,
    NotFound,
    SectorFSError,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.index.protocol import Declaration, HealthReport, LocationKey, SectorIndex
from sectorfs.stores.declared_pages import DeclaredPages
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.scan import Look, Names, Odd, other_storage, path_lost
from sectorfs.stores.watch import Armed, Watcher
from sectorfs.types import Facts, FileType, SectorFile

log = logging.getLogger(__name__)

T = TypeVar("T")

BATCH = 1000
"""Declarations sent, and drops verified, at a time."""
OLD_ENOUGH = 10.0
"""Age in seconds from which one look at a file suffices the first time its type is scanned."""
YOUNG_DIRECTORY = 2.0
"""A directory changed this lately may change again without a new time: clocks tick coarsely."""
MEASURE_EVERY = 300.0
"""Seconds between two walks for the use of a path with a limit."""
BEAT_PAUSE = 0.2
"""Shortest time between two heartbeats, when events ask for them."""
SCAN_PAUSE = 1.0
"""Seconds between two scans of one path, so that a burst of changes costs few."""


class ScanCounts(msgspec.Struct):
    """What a scan came to."""

    entries: int = 0
    declared: int = 0
    dropped: int = 0
    odd: int = 0


class IndexLink:
    """Whether the Index answers, as the paths of this node see it; a line per transition."""

    def __init__(self) -> None:
        self.away = False

    def lost(self, exc: Unreachable) -> None:
        """A call failed."""
        if not self.away:
            log.warning("the Index does not answer, changes are declared later: %s", exc)
        self.away = True

    def answered(self) -> None:
        """A call succeeded."""
        if self.away:
            log.info("the Index answers again")
        self.away = False


class Keeper:
    """The tasks around one path, and the steps they are made of."""

    def __init__(
        self,
        path: LocalPath,
        index: SectorIndex,
        *,
        urls: tuple[str, ...],
        heartbeat: float,
        config: StorageConfig,
        link: IndexLink,
        watcher: Watcher | None,
    ) -> None:
        self.path = path
        self._index = index
        self._urls = urls
        self._heartbeat = heartbeat
        self._config = config
        self._link = link
        self._watcher = watcher
        self._limit_changed = trio.Event()
        self._beat_soon = trio.Event()
        self._watch_stale = False
        path.lane.pulse.changed = self._pulse_changed

    def _pulse_changed(self) -> None:
        self.path.feel_pulse()
        self.beat_now()

    def beat_now(self) -> None:
        """Something happened to the path itself: do not wait for the next heartbeat."""
        self._beat_soon.set()

    def watch_again(self) -> None:
        """A type directory came or went: the next scan renews the watches first."""
        self._watch_stale = True

    # The Index

    async def _ask(self, call: Awaitable[T]) -> T:
        """Await a call of the Index and note what its outcome says about the Index."""
        try:
            result = await call
        except NotFound:
            # It lost its data or was replaced: everything is to be told again.
            if self.path.attached:
                log.warning("the Index does not know %s, attaching it again", self.path.path)
            self.path.attached = False
            self.path.blocked = True
            self.path.mark_dirty(deep=True)
            raise
        except Unreachable as exc:
            self._link.lost(exc)
            self.path.blocked = True
            raise
        self._link.answered()
        return result

    async def attach(self) -> None:
        """Make the path known to the Index."""
        info = msgspec.structs.replace(self.path.info, urls=self._urls)
        await self._ask(self._index.attach(info, self.path.stat))
        self.path.attached = True

    async def refresh(self) -> None:
        """Read ``sectorstore.json`` again and attach with what it says now."""
        path = self.path
        try:
            info = (await path.read_metadata()).info
        except NotFound as exc:
            raise path.fail(path_lost(path.path)) from exc
        if info.storage != path.storage:
            raise path.fail(other_storage(path.path, info.storage, path.storage))
        if info.max_storage != path.info.max_storage:
            path.used = None
            self._limit_changed.set()
            self._limit_changed = trio.Event()
        path.info = info
        await self.attach()

    async def declare(self, found: Sequence[tuple[SectorFile, Facts]], *, removals: int) -> None:
        """Declare files of one type that are quiet.

        `removals` is that of the path from before they were looked at: after another one, what went
        is not declared.
        """
        path = self.path
        for part in _batches(found):
            async with path.changing:
                if path.removals != removals:
                    looks = await path.look([file for file, _ in part])
                    part = [
                        one for one, look in zip(part, looks, strict=True) if look == one[1].bare
                    ]
                batch = [Declaration(file, path.storage, path.primary, one) for file, one in part]
                if batch:
                    await self._ask(self._index.declare(batch))
            metrics.DECLARATIONS.labels("declared").inc(len(batch))

    async def drop(self, files: Sequence[SectorFile], *, certain: bool = False) -> int:
        """Drop declarations of files of one type that are, looked at again, really not there.

        Unless it is `certain`, a type directory that became another, empty one keeps them: a disk
        may be mounted on a type directory, and what shows when it is not looks like no files.
        """
        path = self.path
        dropped = 0
        for part in _batches(files):
            async with path.changing:
                if not certain:
                    await self._refuse_other_directory(part[0].file_type)
                looks = await path.look(part)
                keys = [
                    LocationKey(file, path.storage)
                    for file, look in zip(part, looks, strict=True)
                    if _is_gone(look)
                ]
                if keys:
                    await self._ask(self._index.drop(keys))
            dropped += len(keys)
            metrics.DECLARATIONS.labels("dropped").inc(len(keys))
        return dropped

    async def _refuse_other_directory(self, file_type: FileType) -> None:
        path = self.path
        empty = await path.empty_type(file_type)
        if empty is not None and path.type_ids.get(file_type, empty) != empty:
            raise _suspicious(
                path.type_name(file_type), "is empty, and another directory than before"
            )

    # Scans

    async def scan(
        self,
        types: Sequence[FileType] = tuple(FileType),
        *,
        drop: bool,
        deep: bool,
        certain: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> ScanCounts:
        """List types and declare and drop the differences; `progress` gets the entries so far.

        `deep` looks at every file; without it at those only whose names are new. A type directory
        that cannot be read keeps its declarations; the others are scanned, then its error raised.
        """
        counts = ScanCounts()
        errors: list[DiskError] = []
        async with self.path.scanning:
            for file_type in types:
                try:
                    await self._scan_type(
                        file_type, counts, drop, deep, certain, progress or _ignore
                    )
                except StorageUnavailable as exc:
                    self.path.fail(exc)
                    raise
                except DiskError as exc:
                    self._note_trouble(file_type, exc)
                    errors.append(exc)
                else:
                    self.path.trouble.pop(file_type, None)
        self._tell(counts.declared, counts.dropped)
        if errors:
            raise errors[0]
        return counts

    def _tell(self, declared: int, dropped: int) -> None:
        if declared or dropped:
            log.info("%s: declared %d, dropped %d files", self.path.path, declared, dropped)

    def _note_trouble(self, file_type: FileType, exc: DiskError) -> None:
        if self.path.trouble.get(file_type) != str(exc):
            log.error("%s; its declarations stay", exc)
        self.path.trouble[file_type] = str(exc)
        self.path.looked.pop(file_type, None)

    async def _scan_type(
        self,
        file_type: FileType,
        counts: ScanCounts,
        drop: bool,
        deep: bool,
        certain: bool,
        progress: Callable[[int], object],
    ) -> None:
        path = self.path
        before = counts.entries
        started_ns = time.time_ns()
        names = await path.names(file_type, lambda seen: progress(before + seen))
        counts.entries += len(names)
        first = file_type not in path.looked
        pages = DeclaredPages(self._page, file_type, limit=BATCH)
        for files in names.chunks(BATCH):
            declared = await pages.up_to(files[-1])
            gone = list(declared.keys() - set(files))
            asked = files if deep else [file for file in files if file not in declared]
            gone += await self._compare(asked, declared, names, counts, first)
            if drop and gone:
                counts.dropped += await self.drop(sorted(gone), certain=certain)
        rest = await pages.rest_of_page()
        if drop and not certain and not len(names):
            self._refuse_older_directory(names, rest)
        while drop and rest:
            files = [item.file for item in rest]
            counts.dropped += await self.drop(files, certain=certain)
            rest = await pages.rest_of_page()
        if len(names) and names.identity is not None:
            path.type_ids[file_type] = names.identity
        counts.odd += names.odd_count
        path.tell_odd(names)
        young = started_ns - names.mtime_ns < YOUNG_DIRECTORY * 1e9
        path.looked[file_type] = -1 if young else names.mtime_ns

    def _refuse_older_directory(self, names: Names, declared: Sequence[Declaration]) -> None:
        """Taking a file out of a directory makes it younger than the file."""
        newest = max((item.facts.mtime_ns for item in declared if item.facts), default=0)
        if names.identity is not None and names.mtime_ns < newest:
            where = self.path.type_name(names.file_type)
            raise _suspicious(where, "is empty, and older than the files declared in it")

    async def _page(self, after: SectorFile | None, limit: int) -> list[Declaration]:
        call = self._index.declarations(self.path.storage, after=after, limit=limit)
        return await self._ask(call)

    async def _compare(
        self,
        files: Sequence[SectorFile],
        declared: dict[SectorFile, Declaration],
        names: Names,
        counts: ScanCounts,
        first: bool,
    ) -> list[SectorFile]:
        """Look at files and declare what differs; returns those that are not there after all."""
        path = self.path
        fresh: list[tuple[SectorFile, Facts]] = []
        gone: list[SectorFile] = []
        removals = path.removals
        for file, look in zip(files, await path.look(files), strict=True):
            known = declared.get(file)
            if isinstance(look, Odd):
                names.add_odd(file.sector.name, look.reason)
            if isinstance(look, Facts):
                same = known is not None and known.facts is not None and known.facts.bare == look
                if known is None or not same or known.primary < path.primary:
                    # The first scan of a path meets millions of files that have long been quiet;
                    # one that only became primary is as it was declared.
                    if (first and is_old(look)) or same:
                        fresh.append((file, look))
                    else:
                        await self._let_settle(file, look)
            elif known is not None and _is_gone(look):
                gone.append(file)
        await self.declare(fresh, removals=removals)
        counts.declared += len(fresh)
        return gone

    async def _let_settle(self, file: SectorFile, look: Facts) -> None:
        settling = self.path.settling
        if not settling.note(file, trio.current_time(), look):
            await self.settle_round()
            if not settling.note(file, trio.current_time(), look):
                self.path.mark_dirty(file.file_type, deep=True)
        self.path.wake()

    # Files that change

    async def settle_round(self) -> int:
        """Wait until a second look is due, and take it; returns how many were declared."""
        if not len(self.path.settling):
            return 0
        await trio.sleep(self._config.settle)
        return await self.settle_due()

    async def settle_due(self) -> int:
        """Look at the files that are due; declare the quiet, drop the gone."""
        path = self.path
        declared = 0
        async with path.settling_turn:
            due = path.settling.due(trio.current_time())
            for _, same_type in groupby(due, key=lambda file: file.file_type):
                for part in _batches(list(same_type)):
                    declared += await self._settle(part)
        return declared

    async def _settle(self, files: Sequence[SectorFile]) -> int:
        path = self.path
        removals = path.removals
        looks = await self._armed_look(files)
        now = trio.current_time()
        fresh: list[tuple[SectorFile, Facts]] = []
        gone: list[SectorFile] = []
        for file, look in zip(files, looks, strict=True):
            if path.settling.saw(file, look, now):
                if isinstance(look, Facts):
                    fresh.append((file, look))
                else:
                    gone.append(file)
        try:
            await self.declare(fresh, removals=removals)
            self._tell(len(fresh), await self.drop(gone))
        except BaseException:  # cancelled as well: they wait no longer, so only a scan finds them
            path.mark_dirty(files[0].file_type, deep=True)
            raise
        return len(fresh)

    async def _armed_look(self, files: Sequence[SectorFile]) -> list[Look]:
        watcher = self._watcher
        if watcher is None or not files[0].file_type.is_directory:
            return await self.path.look(files)
        armed = Armed(self.path.storage)
        looks = await self.path.look(
            files, arm=lambda file, name: watcher.arm_sector(armed, file, name)
        )
        watcher.adopt(armed)
        return looks

    async def watch(self) -> None:
        """Watch the path and its type directories, as far as that is possible."""
        path, watcher = self.path, self._watcher
        if watcher is None:
            return
        armed = await path.lane.run(
            lambda: watcher.arm_path(path.storage, path.path), what="watch directories"
        )
        watcher.adopt(armed)
        path.watched = armed.complete

    async def look_at_types(self) -> None:
        """Have types scanned whose directories changed without a watch telling it."""
        path = self.path
        for file_type, mtime_ns in (await path.type_mtimes()).items():
            if file_type in path.trouble:
                path.mark_dirty(file_type, deep=True)
            elif not path.watched.get(file_type) and path.looked.get(file_type, 0) != mtime_ns:
                path.mark_dirty(file_type, deep=False)

    # Tasks

    async def run(self) -> None:
        """Keep the path until cancelled."""
        with self.path.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat_forever)
                nursery.start_soon(self._scan_forever)
                nursery.start_soon(self._settle_forever)
                nursery.start_soon(self._measure_forever)

    async def _guarded(self, what: str, step: Callable[[], Awaitable[object]]) -> bool:
        """Take a step of a task; a failure is logged, and the task goes on after a heartbeat."""
        try:
            await step()
        except (Unreachable, NotFound, StorageUnavailable, DiskError) as exc:
            # Told already where it was noticed: link, path or type directory.
            log.debug("%s: %s: %s", self.path.path, what, exc)
            if isinstance(exc, StorageUnavailable):
                self.path.fail(exc)
            return False
        except SectorFSError as exc:
            log.error("%s: %s: %s", self.path.path, what, exc)
        except Exception:  # boundary: a fault here must not end the node
            log.exception("%s: %s failed", self.path.path, what)
        else:
            return True
        self.path.blocked = True
        return False

    async def _beat_forever(self) -> None:
        await self._guarded("watch", self.watch)
        while True:
            started = trio.current_time()
            await self._guarded("heartbeat", self.beat)
            with trio.move_on_at(started + self._heartbeat):
                await self._beat_soon.wait()
            self._beat_soon = trio.Event()
            await trio.sleep_until(started + min(BEAT_PAUSE, self._heartbeat))

    async def beat(self) -> None:
        """One heartbeat: look at the disk, tell the Index, let waiting work go on."""
        path = self.path
        was_available = path.available
        await path.probe()
        if path.available and not was_available:
            await self._guarded("watch", self.watch)
            path.attached = False  # its sectorstore.json may say something else now
        if not path.attached:
            await (self.refresh() if path.available else self.attach())
        report = HealthReport(stat=path.stat, error=path.health_error())
        try:
            await self._ask(self._index.report_health(path.storage, report))
        except NotFound:
            await self.attach()
            await self._ask(self._index.report_health(path.storage, report))
        path.blocked = False
        path.wake()

    @property
    def _may_work(self) -> bool:
        return self.path.available and not self.path.blocked

    def _rescan_in(self) -> float:
        # Not all paths of a cluster in the same minute: their disks are busy with proofs as well.
        return self._config.rescan * random.uniform(0.8, 1.0)

    async def _scan_forever(self) -> None:
        path = self.path
        now = trio.current_time()
        pause_until = now
        next_look, next_rescan = now + self._config.look, now + self._rescan_in()
        while True:
            now = trio.current_time()
            until = pause_until if path.dirty else max(pause_until, min(next_look, next_rescan))
            if not self._may_work or until > now:
                await path.wait_for_work(until if self._may_work else math.inf)
                continue
            if now >= next_rescan:
                path.mark_dirty(deep=True)
                next_rescan = now + self._rescan_in()
            if now >= next_look:
                await self._guarded("look at type directories", self.look_at_types)
                next_look = now + self._config.look
            if path.dirty and self._may_work:
                await self._guarded("scan", self._scan_dirty)
                pause_until = trio.current_time() + min(SCAN_PAUSE, self._config.look)
            await trio.lowlevel.checkpoint()

    async def _scan_dirty(self) -> None:
        path = self.path
        dirty, path.dirty = path.dirty, {}
        try:
            if not path.attached:
                await self.refresh()
            if self._watch_stale:
                self._watch_stale = False
                await self.watch()
            for deep in (True, False):
                types = [file_type for file_type in sorted(dirty) if dirty[file_type] is deep]
                if types:
                    with suppress(DiskError):  # noted; the next look tries it again
                        await self.scan(types, drop=True, deep=deep)
        except BaseException:
            for file_type, deep in dirty.items():
                path.mark_dirty(file_type, deep=deep)
            raise

    async def _settle_forever(self) -> None:
        path = self.path
        while True:
            until = path.settling.next_due() if self._may_work else math.inf
            if until > trio.current_time():
                await path.wait_for_work(until)
            else:
                await self._guarded("look at new files", self.settle_due)
                await trio.lowlevel.checkpoint()

    async def _measure_forever(self) -> None:
        path = self.path
        while True:
            changed = self._limit_changed
            if path.info.max_storage > 0 and path.available:
                await self._guarded("measure use", self._measure)
            with trio.move_on_after(MEASURE_EVERY):
                await changed.wait()

    async def _measure(self) -> None:
        started = trio.current_time()
        self.path.used = await self.path.measure()
        self.path.used_at = started


def _suspicious(where: str, what: str) -> DiskError:
    hint = "is its disk mounted? If the files are gone: sectorfs storage redeclare --drop-missing"
    return DiskError(what, where, hint)


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _is_gone(look: Look) -> bool:
    """Not there, or something else under its name; a disk that cannot say is no answer."""
    return look is None or (isinstance(look, Odd) and not look.unreadable)


def is_old(facts: Facts) -> bool:
    """Unchanged for so long that one look tells it is quiet."""
    latest = max([facts.mtime_ns, *(member.mtime_ns for member in facts.members or ())])
    return latest < time.time_ns() - OLD_ENOUGH * 1e9


def _ignore(done: int) -> None:
    """No progress wanted."""
