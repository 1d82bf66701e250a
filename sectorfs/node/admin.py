"""What operators do with a node's storage, in one place for both ways to reach it.

`Admin` is the Protocol of the command line; `LocalAdmin` does the work in the process that holds
the repo (a running node, or a command while none runs); `node.rpc` has the client of a running
node.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from sectorfs.config import Config
from sectorfs.errors import NotFound, Refused, TimedOut, Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import FsStat, SectorIndex, StorageStatus
from sectorfs.node import reports
from sectorfs.node.caching import Caching, LocalCaching
from sectorfs.node.forget import DetachReport, Lost, detach_report, forget, last_copies
from sectorfs.node.hashing import Hashing, LocalHashing
from sectorfs.node.moves import LocalMoves, Moves
from sectorfs.node.repo import Repo
from sectorfs.node.settings import SettingsReport, not_here, settings_report
from sectorfs.node.verify import LocalVerifying, Verifying
from sectorfs.stores import metadata, storage_list
from sectorfs.stores.keeper import ScanCounts
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.path_changes import PathChanges
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import SectorFile, SectorID, StorageID


class PathSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What ``storage attach --init`` writes into ``sectorstore.json``."""

    can_seal: bool = False
    can_store: bool = False
    weight: int = 10
    max_storage: int = 0
    groups: tuple[str, ...] = ()
    allow_to: tuple[str, ...] = ()
    allow_types: tuple[str, ...] = ()
    deny_types: tuple[str, ...] = ()
    allow_miners: tuple[str, ...] = ()
    deny_miners: tuple[str, ...] = ()


class Admin(Protocol):
    """Verbs on a node's storage paths."""

    @property
    def moves(self) -> Moves:
        """Verbs on sector files."""

    @property
    def caching(self) -> Caching:
        """Verbs on this node's copies; `Unreachable` where no node runs."""

    @property
    def hashing(self) -> Hashing:
        """Verbs on the hashing of this node's files."""

    @property
    def verifying(self) -> Verifying:
        """Verbs that look at every byte of this node's files; `Unreachable` where no node runs."""

    async def attach(self, path: str, settings: PathSettings | None) -> StorageID:
        """Attach a directory and remember it; with settings, initialise it first."""

    async def detach(self, target: str, *, force: bool) -> DetachReport:
        """Detach a path or storage of this node, or a storage whose node is dead."""

    async def configure(self, target: str, changes: PathChanges) -> SettingsReport:
        """Change the settings of a path or storage of this node."""

    async def redeclare(self, target: str | None, *, drop_missing: bool) -> ScanCounts:
        """Scan one path (or all of them) again."""

    async def scans(self) -> list[reports.ScanReport]:
        """Scans under way on this node."""

    async def storages(self) -> list[reports.StorageReport]:
        """Every storage of the cluster."""

    async def find(self, sector: SectorID) -> reports.SectorReport:
        """Where the files of a sector are."""

    async def locks(self) -> list[reports.LockReport]:
        """Locked sectors: what of them, by whom and why, and who waits."""


class LocalAdmin:
    """The verbs, done here."""

    def __init__(
        self,
        *,
        repo: Repo,
        index: SectorIndex,
        catalog: Catalog,
        local: LocalStore,
        peers: PeerClient,
        config: Config,
        caught_up: Callable[[], Awaitable[None]],
        state: Callable[[SectorFile], str] | None,
        moves: LocalMoves,
        caching: LocalCaching | None,
        verifying: LocalVerifying | None = None,
        hashing: LocalHashing,
    ) -> None:
        self.moves = moves
        self.hashing = hashing
        self._caching = caching
        self._verifying = verifying
        self._repo = repo
        self._index = index
        self._catalog = catalog
        self._local = local
        self._peers = peers
        self._config = config
        self._caught_up = caught_up
        self._state = state
        self._scans: dict[str, int] = {}

    @property
    def caching(self) -> Caching:
        """See `Admin.caching`."""
        if self._caching is None:
            raise self._no_node()
        return self._caching

    @property
    def verifying(self) -> Verifying:
        """See `Admin.verifying`."""
        if self._verifying is None:
            raise self._no_node()
        return self._verifying

    def _no_node(self) -> Unreachable:
        hint = "start it with `sectorfs mount` or `serve`"
        return Unreachable("no node runs", self._repo.root, hint)

    async def attach(self, path: str, settings: PathSettings | None) -> StorageID:
        """See `Admin.attach`. A path whose attachment fails is not remembered."""
        lane = Lane(path, deadline=self._config.timeouts.disk)
        await self._check_place(path, lane, init=settings is not None)
        if settings is not None:
            values = msgspec.structs.asdict(settings)
            await lane.run(lambda: metadata.init_path(path, **values), what="initialise")
        with self._scanning(path) as progress:
            info = await self._local.attach(path, progress=progress)
        known = storage_list.read_storage_list(str(self._repo.storage_json))
        # Under the name it has already, when it was attached through another one.
        where = self._local.path_of(info.storage) or path
        storage_list.write_storage_list(known.adding(where))
        await self._caught_up()
        return info.storage

    async def _check_place(self, path: str, lane: Lane, *, init: bool) -> None:
        """`Refused` for what cannot be a storage path, before anything is written below it."""
        cache = str(self._repo.cache_path(self._config))
        real, real_cache = await lane.run(
            lambda: (os.path.realpath(path), os.path.realpath(cache)), what="attach"
        )
        if real == real_cache:
            raise Refused("is the cache path of this node", path, "it is attached by itself")
        if not init:
            return  # what it says itself is looked at first
        listed = storage_list.read_storage_list(str(self._repo.storage_json)).paths
        others = {name: name for name in listed} | {cache: real_cache}
        others |= {local.path: local.real for local in self._local.paths()}
        for name, other in others.items():
            if real == other or path == name:
                # Even if it looks bare: then its disk is away, and this is only its mount point.
                raise Refused(
                    "is a storage path of this node already", path, "attach it without --init"
                )
            if os.path.commonpath((real, other)) in (real, other):
                raise Refused(f"overlaps the storage path {name}", path)

    async def detach(self, target: str, *, force: bool) -> DetachReport:
        """See `Admin.detach`; only a storage of another node is ever refused without `force`."""
        storage = self._storage_here(target)
        if storage is None and not target.startswith("/"):
            await self._check_current()
            report = await forget(
                StorageID(target),
                force=force,
                index=self._index,
                catalog=self._catalog,
                peers=self._peers,
                cutoff=self._config.index.cutoff,
            )
            await self._caught_up()
            return report
        dropped = sum(self._catalog.counts(storage).values()) if storage else 0
        lost = await last_copies(self._catalog, storage) if storage else Lost()
        await self.detach_here(target)
        if storage and self._catalog.storage(storage) is not None:
            dropped, lost = 0, Lost()  # others reach it
        return detach_report(target, self._local.urls, dropped=dropped, lost=lost)

    def _storage_here(self, target: str) -> StorageID | None:
        for path in self._local.paths():
            if target in (path.path, path.real, path.storage):
                return path.storage
        return None

    async def _check_current(self) -> None:
        """`TimedOut` unless the catalog has all that the Index has now."""
        page = await self._index.snapshot(limit=1)
        await self._caught_up()
        if self._catalog.epoch != page.epoch or self._catalog.seq < page.seq:
            raise TimedOut("this node is behind the Index", self._repo.root, "try again")

    async def configure(self, target: str, changes: PathChanges) -> SettingsReport:
        """See `Admin.configure`. Files that became primary are declared again at once."""
        storage = self._storage_here(target)
        if storage is None:
            raise await not_here(target, self._local, self._index)
        path = self._local.path_of(storage) or target
        if path == str(self._repo.cache_path(self._config)):
            raise Refused("is the cache path of this node", target, "it holds copies only")
        try:
            before, after = await self._local.configure(storage, changes)
        except Unreachable as exc:
            raise Unreachable(
                f"is changed on disk, but the Index does not know yet: {exc}",
                path,
                "a running node tells it once it answers",
            ) from exc
        declared = 0
        if after.can_store and not before.can_store:
            declared = (await self.redeclare(storage, drop_missing=False)).declared
        await self._caught_up()
        return settings_report(path, before, after, declared=declared)

    async def detach_here(self, target: str) -> None:
        """Detach a path. The Index forgets first: a crash in between leaves it attached."""
        known = storage_list.read_storage_list(str(self._repo.storage_json))
        path = target
        for attached in self._local.paths():
            if target in (attached.path, attached.real, attached.storage):
                path = attached.path
        if path == str(self._repo.cache_path(self._config)):
            raise Refused("is the cache path of this node", target, "see cache.path in config.toml")
        await self._local.detach(target)
        await self._caught_up()
        if path in known.paths:
            storage_list.write_storage_list(known.removing(path))

    async def redeclare(self, target: str | None, *, drop_missing: bool) -> ScanCounts:
        """See `Admin.redeclare`."""
        with self._scanning(target or "all paths") as progress:
            result = await self._local.redeclare(
                target, drop_missing=drop_missing, progress=progress
            )
        await self._caught_up()
        return result

    @contextmanager
    def _scanning(self, what: str) -> Iterator[Callable[[int], None]]:
        """Shows a scan in `scans` while it runs."""

        def progress(done: int) -> None:
            self._scans[what] = done

        progress(0)
        try:
            yield progress
        finally:
            self._scans.pop(what, None)  # two may scan the same

    async def scans(self) -> list[reports.ScanReport]:
        """See `Admin.scans`."""
        return [reports.ScanReport(path=path, done=done) for path, done in self._scans.items()]

    async def storages(self) -> list[reports.StorageReport]:
        """See `Admin.storages`."""
        return [self._report(status) for status in await self._index.storages()]

    def storages_known(self) -> list[reports.StorageReport]:
        """The same as the catalog knows it, while the Index is away."""
        return [self._report(status) for status in self._catalog.storages()]

    def _report(self, status: StorageStatus) -> reports.StorageReport:
        kinds = {url: self._peers.kind(url) for url in status.info.urls}
        return reports.storage_report(
            status,
            path=self._local.path_of(status.info.storage),
            cutoff=self._config.index.cutoff,
            files=self._catalog.counts(status.info.storage),
            nodes={url: str(kind) for url, kind in kinds.items() if kind is not None},
        )

    async def find(self, sector: SectorID) -> reports.SectorReport:
        """See `Admin.find`; `NotFound` when nothing is declared."""
        declarations = await self._index.sector(sector)
        if not declarations:
            raise NotFound("no storage declares any file of it", sector)
        statuses = {status.info.storage: status for status in await self._index.storages()}
        return reports.sector_report(
            sector,
            declarations,
            storages=statuses,
            cutoff=self._config.index.cutoff,
            path_of=self.file_path,
            state=self._state,
        )

    async def locks(self) -> list[reports.LockReport]:
        """See `Admin.locks`."""
        return reports.lock_reports(await self._index.leases())

    def file_path(self, file: SectorFile, storage: StorageID) -> str | None:
        """Where a copy lies on this node."""
        root = self._local.path_of(storage)
        return str(Path(root) / str(file)) if root else None

    def local_paths(self) -> dict[StorageID, str]:
        """Paths of this node by storage."""
        return {path.storage: path.path for path in self._local.paths()}

    async def stat(self, storage: StorageID) -> FsStat:
        """Space of a path of this node."""
        return await self._local.stat(storage)
