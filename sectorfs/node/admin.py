"""What operators do with a node's storage, in one place for both ways to reach it.

`Admin` is the Protocol of the command line; `LocalAdmin` does the work in the process that holds
the repo (a running node, or a command while none runs); `node.rpc` has the client of a running
node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from sectorfs.config import Config
from sectorfs.errors import NotFound
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import FsStat, SectorIndex, StorageStatus
from sectorfs.node import reports
from sectorfs.node.repo import Repo
from sectorfs.stores import metadata, storage_list
from sectorfs.stores.keeper import ScanCounts
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
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

    async def attach(self, path: str, settings: PathSettings | None) -> StorageID:
        """Attach a directory and remember it; with settings, initialise it first."""

    async def detach(self, target: str) -> None:
        """Detach a path or storage of this node."""

    async def redeclare(self, target: str | None, *, drop_missing: bool) -> ScanCounts:
        """Scan one path (or all of them) again."""

    async def scans(self) -> list[reports.ScanReport]:
        """Scans under way on this node."""

    async def storages(self) -> list[reports.StorageReport]:
        """Every storage of the cluster."""

    async def find(self, sector: SectorID) -> reports.SectorReport:
        """Where the files of a sector are."""


class LocalAdmin:
    """The verbs, done here."""

    def __init__(
        self,
        *,
        repo: Repo,
        index: SectorIndex,
        catalog: Catalog,
        local: LocalStore,
        config: Config,
        caught_up: Callable[[], Awaitable[None]],
        state: Callable[[SectorFile], str] | None,
    ) -> None:
        self._repo = repo
        self._index = index
        self._catalog = catalog
        self._local = local
        self._config = config
        self._caught_up = caught_up
        self._state = state
        self._scans: dict[str, int] = {}

    async def attach(self, path: str, settings: PathSettings | None) -> StorageID:
        """See `Admin.attach`. A path whose attachment fails is not remembered."""
        if settings is not None:
            lane = Lane(path, deadline=self._config.timeouts.disk)
            values = msgspec.structs.asdict(settings)
            await lane.run(lambda: metadata.init_path(path, **values), what="initialise")
        with self._scanning(path) as progress:
            info = await self._local.attach(path, progress=progress)
        known = storage_list.read_storage_list(str(self._repo.storage_json))
        storage_list.write_storage_list(known.adding(path))
        await self._caught_up()
        return info.storage

    async def detach(self, target: str) -> None:
        """See `Admin.detach`. The Index forgets first: a crash in between leaves it attached."""
        known = storage_list.read_storage_list(str(self._repo.storage_json))
        path = target
        for attached in self._local.paths():
            if target in (attached.path, attached.real, attached.storage):
                path = attached.path
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
            del self._scans[what]

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
        return reports.storage_report(
            status,
            path=self._local.path_of(status.info.storage),
            cutoff=self._config.index.cutoff,
            files=self._catalog.counts(status.info.storage),
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
