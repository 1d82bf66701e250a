"""The storage paths of this machine: attach, detach, scan, open.

`LocalStore` is the set of paths and answers those above; a `Keeper` does what is done to one path.
Nothing is ever written below a path by attaching, scanning or reading it: read-only disks will do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import TypeVar

import msgspec
import trio

from sectorfs.config import StorageConfig, TimeoutsConfig
from sectorfs.errors import DiskError, NotFound, Refused, SectorFSError, StorageUnavailable
from sectorfs.index.protocol import FsStat, SectorIndex, StorageInfo
from sectorfs.stores.directories import OpenDirectory, open_directory
from sectorfs.stores.file_systems import look_at_directory
from sectorfs.stores.keeper import IndexLink, Keeper, ScanCounts
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.members import check_member
from sectorfs.stores.metadata import Metadata, read_metadata
from sectorfs.stores.path_changes import PathChanges, rewrite
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.regular import Excerpt, Spans
from sectorfs.stores.scan import file_facts
from sectorfs.stores.space import fs_stat, raw_space
from sectorfs.stores.watch import Listener, Watcher
from sectorfs.types import Facts, FileType, SectorFile, StorageID

log = logging.getLogger(__name__)

T = TypeVar("T")
Seen = TypeVar("Seen", OpenFile, Excerpt)

TURN_SECONDS = 1.0
"""So long a path that could be attached waits for those listed before it, whose disks may hang."""

Progress = Callable[[int], object]
"""Called with the number of entries read so far."""


class _Found(msgspec.Struct, frozen=True):
    """What a directory says about itself before it is attached."""

    metadata: Metadata
    identity: tuple[int, int]
    real: str
    file_system: str
    stat: FsStat


class _Waiting(msgspec.Struct):
    """A path that could not be attached yet."""

    lane: Lane
    """Its only one, which has one look at a time: a mount that hangs for days holds no crowd."""
    error: str = ""


class LocalStore:
    """The storage paths attached to this node; implements `stores.protocol.LocalFiles`.

    `holders` and `declared` answer from this node's mirror of the Index: which storages hold a
    file, and what one of them declared about it. They decide the order of probing and notice
    declarations that are out of date; correctness does not rest on them. `account` says what space
    is promised to files under way; `on_attach` is a task for each path that gets attached, and must
    not raise; `on_lost` is told of paths that are detached or do not answer.
    """

    def __init__(
        self,
        index: SectorIndex,
        *,
        urls: tuple[str, ...],
        timeouts: TimeoutsConfig,
        storage: StorageConfig,
        heartbeat: float,
        watch: bool = True,
        holders: Callable[[SectorFile], Sequence[StorageID]] | None = None,
        declared: Callable[[SectorFile, StorageID], Facts | None] | None = None,
        account: Callable[[LocalPath], Awaitable[FsStat]] | None = None,
        on_attach: Callable[[LocalPath], Awaitable[object]] | None = None,
        on_lost: Callable[[StorageID], object] | None = None,
    ) -> None:
        self._index = index
        self._urls = urls
        self._timeouts = timeouts
        self._config = storage
        self._heartbeat = heartbeat
        self._watch = watch
        self._holders = holders
        self._declared = declared
        self._account = account
        self._on_attach = on_attach
        self._on_lost = on_lost
        self._link = IndexLink()
        self._watcher: Watcher | None = None
        self._nursery: trio.Nursery | None = None
        self._paths: dict[StorageID, LocalPath] = {}
        self._keepers: dict[StorageID, Keeper] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._attaching = trio.Lock()

    # What is attached

    def paths(self) -> tuple[LocalPath, ...]:
        """The attached paths."""
        return tuple(self._paths.values())

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URLs under which the paths are attached."""
        return self._urls

    def waiting(self) -> dict[str, str]:
        """Paths given to `attach_all` that could not be attached yet, and why."""
        return {path: waiting.error for path, waiting in self._waiting.items() if waiting.error}

    def path_of(self, storage: StorageID) -> str | None:
        """The directory of a storage, None when it is not attached here."""
        path = self._paths.get(storage)
        return path.path if path is not None else None

    def local_path(self, file: SectorFile, member: str | None = None) -> str | None:
        """Where the Index says that a file lies on this node; the disk is not asked."""
        for path in self._expected(file):
            if path.available:
                return path.name_of(file, member)
        return None

    def filesystem(self, storage: StorageID) -> int | None:
        """Device number under a path, to count the space of one that several paths share once."""
        path = self._paths.get(storage)
        return path.identity[0] if path is not None else None

    def file_system(self, storage: StorageID) -> str:
        """Name of the local file system below a path; empty for any other."""
        path = self._paths.get(storage)
        return path.file_system if path is not None else ""

    def note(self, storage: StorageID, file: SectorFile) -> None:
        """A file may not be as it was declared: have it looked at soon. Never blocks."""
        path = self._paths.get(storage)
        if path is not None:
            path.note(file)

    def compare(self) -> None:
        """Have all paths compared with the Index soon: it may have forgotten. Never blocks."""
        for path in self._paths.values():
            path.attached = False
            path.mark_dirty(deep=False)

    async def attach(self, path: str, *, progress: Progress | None = None) -> StorageInfo:
        """Attach a storage path, scan it and declare what it holds.

        `Refused` without a ``sectorstore.json``, for an id that is attached from elsewhere, and for
        a path inside another. A path that is attached already is left as it is. When the Index
        fails before it knows the path, nothing is attached; when it fails later, the rest of the
        scan follows in `run`.
        """
        where = _absolute(path)
        lane = self._lane(where)
        keeper, is_new = await self._take(where, lane, await self._look_at(where, lane), now=True)
        if is_new:
            await self._scan_first(keeper, progress)
        return keeper.path.info

    async def attach_all(self, paths: Sequence[str]) -> None:
        """Attach a node's paths at its start; scans follow in `run`, and nothing here is fatal.

        A path whose disk is not mounted yet is tried again at every heartbeat, and one is attached
        here even while the Index is away: its files can be read. All disks are asked at once, and
        of paths that clash the one that stands first is attached.
        """
        done = [trio.Event() for _ in paths]
        async with trio.open_nursery() as nursery:
            for place, path in enumerate(paths):
                turn = done[: place + 1]
                nursery.start_soon(self._attach_later, _absolute(path), turn)

    async def _attach_later(self, where: str, turn: Sequence[trio.Event]) -> None:
        """Attach one of several paths; `turn` are the ends of those before it, and its own."""
        *before, done = turn
        waiting = self._waiting.setdefault(where, _Waiting(self._lane(where)))
        try:
            found = await self._look_at(where, waiting.lane)
            with trio.move_on_after(TURN_SECONDS):
                for earlier in before:
                    await earlier.wait()
            await self._take(where, waiting.lane, found, now=False)
        except SectorFSError as exc:
            if waiting.error != str(exc):
                log.error("cannot attach %s: %s", where, exc)
            waiting.error = str(exc)
        else:
            self._waiting.pop(where, None)
        finally:
            done.set()

    def _lane(self, where: str) -> Lane:
        return Lane(where, deadline=self._timeouts.disk)

    async def _look_at(self, where: str, lane: Lane) -> _Found:
        return await lane.share(lambda: _examine(where), what="attach")

    async def _take(
        self, where: str, lane: Lane, found: _Found, *, now: bool
    ) -> tuple[Keeper, bool]:
        """Make a path one of ours, unless it is; `now`: not before the Index knows it."""
        async with self._attaching:
            known = self._attached_as(where, found)
            if known is not None:
                return known, False
            local = LocalPath(
                where,
                found.metadata.info,
                lane,
                identity=found.identity,
                real=found.real,
                settle=self._config.settle,
            )
            local.stat = found.stat
            local.account = self._account
            local.file_system = found.file_system
            local.on_lost = self._on_lost
            if self._watch and self._watcher is None:
                self._watcher = Watcher(self._listener())
            keeper = Keeper(
                local,
                self._index,
                urls=self._urls,
                heartbeat=self._heartbeat,
                config=self._config,
                link=self._link,
                watcher=self._watcher,
            )
            if now:
                await keeper.attach()
            else:
                local.mark_dirty(deep=True)
            self._paths[local.storage] = local
            self._keepers[local.storage] = keeper
        self._start(keeper)
        log.info("attached %s, storage %s", where, local.storage)
        return keeper, True

    def _attached_as(self, where: str, found: _Found) -> Keeper | None:
        """The keeper of a path that is ours already; `Refused` for one that clashes with ours."""
        storage = found.metadata.info.storage
        for other in self._paths.values():
            # A disk that was mounted again has another device number, and the same name.
            same = other.identity == found.identity or other.real == found.real
            if same and other.storage == storage:
                return self._keepers[storage]
            if other.storage == storage:
                raise Refused(
                    f"storage {storage} is attached from {other.path}", where, "detach that first"
                )
            if same:
                raise Refused(f"is attached as storage {other.storage}", where, "detach it first")
            if _inside(found.real, other.real) or _inside(other.real, found.real):
                raise Refused(f"overlaps the storage path {other.path}", where)
        return None

    async def _scan_first(self, keeper: Keeper, progress: Progress | None) -> None:
        """The first scan; a type directory that cannot be read was logged, and does not end it."""
        try:
            await keeper.watch()
            try:
                await keeper.scan(drop=True, deep=True, progress=progress)
            except DiskError as exc:
                log.debug("%s is attached without some types: %s", keeper.path.path, exc)
            await keeper.settle_round()
        except BaseException:
            keeper.path.mark_dirty(deep=True)
            raise

    async def detach(self, path_or_id: str) -> StorageInfo | None:
        """Forget a path, here and in the Index; nothing on disk changes.

        None for a path that waited to be attached.
        """
        async with self._attaching:
            if self._waiting.pop(_absolute(path_or_id), None) is not None:
                return None
            local = self._named(path_or_id)
            local.scope.cancel()
            try:
                for url in self._urls:
                    await self._forget_url(local, url)
            except BaseException:
                local.scope = trio.CancelScope()
                self._start(self._keepers[local.storage])
                raise
            del self._paths[local.storage], self._keepers[local.storage]
            local.lose()
            local.forget_metrics()
            if self._watcher is not None:
                self._watcher.forget(local.storage)
        log.info("detached %s, storage %s", local.path, local.storage)
        return local.info

    async def _forget_url(self, local: LocalPath, url: str) -> None:
        try:
            await self._index.detach(local.storage, url)
        except NotFound:
            log.debug("the Index did not know %s at %s", local.storage, url)

    def _named(self, path_or_id: str) -> LocalPath:
        where = _absolute(path_or_id)
        for local in self._paths.values():
            if local.storage == path_or_id or where in (local.path, local.real):
                return local
        raise NotFound("no such storage path on this node", path_or_id, "see storage list")

    async def configure(
        self, path_or_id: str, changes: PathChanges
    ) -> tuple[StorageInfo, StorageInfo]:
        """Change a path's settings on its disk, then in the Index; what they were and are."""
        async with self._attaching:
            local = self._named(path_or_id)
            keeper = self._keepers[local.storage]
            if not local.available:
                raise StorageUnavailable(local.error, local.path)
            try:
                before, after = await local.lane.run(
                    lambda: rewrite(local.path, local.storage, changes), what="change settings"
                )
                await keeper.refresh()
            except BaseException:
                local.attached = False  # the next heartbeat reads the file and tells the Index
                raise
            if self._nursery is None:
                await keeper.beat()
            else:
                keeper.beat_now()
        return before, after

    async def redeclare(
        self,
        path_or_id: str | None = None,
        *,
        drop_missing: bool = False,
        progress: Progress | None = None,
    ) -> ScanCounts:
        """Read ``sectorstore.json`` again and scan, one path or all.

        Of all paths, each is tried; the first failure is raised at the end.
        """
        chosen = self.paths() if path_or_id is None else (self._named(path_or_id),)
        total = ScanCounts()
        failure: SectorFSError | None = None
        for local in chosen:
            try:
                counts = await self._redeclare(local, drop_missing, total.entries, progress)
            except SectorFSError as exc:
                log.error("cannot redeclare %s: %s", local.path, exc)
                failure = failure or exc
            else:
                for field in counts.__struct_fields__:
                    setattr(total, field, getattr(total, field) + getattr(counts, field))
        if failure is not None:
            raise failure
        return total

    async def _redeclare(
        self, local: LocalPath, drop: bool, before: int, progress: Progress | None
    ) -> ScanCounts:
        keeper = self._keepers[local.storage]
        counts, trouble = ScanCounts(), None
        try:
            await keeper.refresh()
            try:
                counts = await keeper.scan(
                    drop=drop,
                    deep=True,
                    certain=drop,  # an operator asked for it
                    progress=None if progress is None else lambda seen: progress(before + seen),
                )
            except DiskError as exc:  # one unreadable type directory holds up no other
                trouble = exc
            counts.declared += await keeper.settle_round()
        except StorageUnavailable as exc:
            local.fail(exc)
            raise
        if trouble is not None:
            raise trouble
        return counts

    # Files

    async def open_file(self, file: SectorFile, member: str | None = None) -> OpenFile:
        """Open a file on whichever path has it, those the Index names first."""
        return await self._seen(
            file, member, lambda local, at: local.open(file, member, expected=at)
        )

    async def excerpt(self, file: SectorFile, member: str | None, spans: Spans) -> Excerpt:
        """Parts of a file; else as `open_file`."""
        return await self._seen(
            file, member, lambda local, at: local.excerpt(file, member, spans, expected=at)
        )

    async def _seen(
        self,
        file: SectorFile,
        member: str | None,
        look: Callable[[LocalPath, bool], Awaitable[Seen]],
    ) -> Seen:
        check_member(file, member)
        return await self._first(
            file, lambda local, at: self._noting(local, file, member, at, look(local, at))
        )

    async def open_at(
        self, storage: StorageID, file: SectorFile, member: str | None = None
    ) -> OpenFile:
        """Open a file on one path of this node."""
        check_member(file, member)
        local = self._paths.get(storage)
        if local is None:
            raise NotFound("no such storage on this node", storage)
        if not local.available:
            raise StorageUnavailable(local.error, local.path)
        return await self._noting(
            local, file, member, True, local.open(file, member, expected=True)
        )

    async def _noting(
        self,
        local: LocalPath,
        file: SectorFile,
        member: str | None,
        expected: bool,
        call: Awaitable[Seen],
    ) -> Seen:
        """What `call` finds of a file; what the Index does not know of it is looked at soon."""
        try:
            found = await call
        except NotFound:
            if expected:
                local.note(file)
            raise
        unknown = self._holders is not None and not expected
        if unknown or self._differs(local, file, member, found):
            local.note(file)
        return found

    def _differs(
        self, local: LocalPath, file: SectorFile, member: str | None, found: OpenFile | Excerpt
    ) -> bool:
        facts = self._declared(file, local.storage) if self._declared is not None else None
        if facts is None:
            return False
        known = facts if member is None else facts.member(member)
        return known is None or (known.size, known.mtime_ns) != (found.size, found.mtime_ns)

    async def open_directory(
        self, file: SectorFile, *, only: Container[str] | None
    ) -> OpenDirectory:
        """Open a sector directory on whichever path has it."""
        if not file.file_type.is_directory:
            raise NotFound("is not a directory", file)

        async def attempt(local: LocalPath, expected: bool) -> OpenDirectory:
            return await open_directory(
                local.path,
                local.name_of(file),
                local.lane,
                storage=local.storage,
                expected=expected,
                only=only,
            )

        return await self._first(file, attempt)

    async def listing(self, file: SectorFile) -> Facts:
        """The facts of a sector file as they are on disk now."""

        async def look(local: LocalPath, expected: bool) -> Facts:
            return await local.lane.run(
                lambda: file_facts(local.path, local.storage, file), what=f"look at {file}"
            )

        return await self._first(file, look)

    async def _first(
        self,
        file: SectorFile,
        attempt: Callable[[LocalPath, bool], Awaitable[T]],
    ) -> T:
        """The first path that succeeds; errors of paths that should have succeeded come first."""
        expected = self._expected(file)
        others = [local for local in self._paths.values() if local not in expected]
        failure: SectorFSError | None = None
        for local in (*expected, *others):
            likely = local in expected
            if not local.available:
                if likely:
                    failure = failure or StorageUnavailable(local.error, local.path)
                continue
            try:
                return await attempt(local, likely)
            except NotFound:
                continue
            except SectorFSError as exc:
                log.warning("%s on %s: %s", file, local.path, exc)
                failure = failure or exc
        raise failure or NotFound("not on this node", file)

    def _expected(self, file: SectorFile) -> tuple[LocalPath, ...]:
        holders = self._holders(file) if self._holders is not None else ()
        return tuple(self._paths[storage] for storage in holders if storage in self._paths)

    async def stat(self, storage: StorageID) -> FsStat:
        """Space of a path of this node."""
        local = self._paths.get(storage)
        if local is None:
            raise NotFound("no such storage on this node", storage)
        return await local.space()

    # Tasks

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Heartbeats, watches and scans of every path, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._watch:
                    self._watcher = self._watcher or Watcher(self._listener())
                    nursery.start_soon(self._watcher.run)
                for keeper in self._keepers.values():
                    self._start(keeper)
                nursery.start_soon(self._retry_waiting)
                task_status.started()
        finally:
            self._nursery = None
            self.close()

    def close(self) -> None:
        """Give back what the kernel watches; for stores that never ran as well."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def _start(self, keeper: Keeper) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(keeper.run)
            if self._on_attach is not None:
                self._nursery.start_soon(self._on_attach, keeper.path)

    async def _retry_waiting(self) -> None:
        while True:
            await trio.sleep(self._heartbeat)
            await self.attach_all(tuple(self._waiting))

    def _listener(self) -> Listener:
        return Listener(
            file=self.note,
            type_directory=self._type_changed,
            path=self._path_changed,
            lost=self._events_lost,
        )

    def _type_changed(self, storage: StorageID, file_type: FileType) -> None:
        keeper = self._keepers.get(storage)
        if keeper is not None:
            keeper.watch_again()
            keeper.path.mark_dirty(file_type, deep=True)

    def _path_changed(self, storage: StorageID) -> None:
        keeper = self._keepers.get(storage)
        if keeper is not None:
            keeper.beat_now()

    def _events_lost(self) -> None:
        for local in self._paths.values():
            local.mark_dirty(deep=True)


def _examine(where: str) -> _Found:
    try:
        metadata = read_metadata(where)
    except NotFound as exc:
        raise Refused(
            "is not a storage path: it has no sectorstore.json", where, "initialise it with --init"
        ) from exc
    found, file_system = look_at_directory(where)
    raw = raw_space(where)
    return _Found(
        metadata=metadata,
        identity=(found.st_dev, found.st_ino),
        real=os.path.realpath(where),
        file_system=file_system,
        stat=fs_stat(raw, max_storage=metadata.info.max_storage, used=None),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _inside(inner: str, outer: str) -> bool:
    return inner.startswith(outer.rstrip("/") + "/")
