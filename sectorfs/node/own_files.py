"""The files of this node while the Index has been away since its start: shown from its own disks.

After a power cut the nodes of a cluster come back in any order. One whose Index is not there yet
has an empty catalog, and an Index to ask for as long as it takes; meanwhile what lies on its own
storage paths is shown, as the Index will tell of it later: the same facts, so that no inode number
changes then. With the first answer of the Index all of this ends, and the feed makes the catalog
what the Index says. Nothing is declared here: that is done by the scans that follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec
import trio

from sectorfs.errors import SectorFSError
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.protocol import Changes, Declaration, LocationKey, StorageStatus
from sectorfs.stores.keeper import is_old
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.types import Facts, FileType, StorageID

log = logging.getLogger(__name__)

SLICE = 250
"""Files looked at, and shown, at a time."""


class OwnFiles:
    """Shows them until the Index answers; `run` is its only task."""

    def __init__(
        self,
        local: LocalStore,
        catalog: Catalog,
        *,
        answered: Callable[[], bool],
        on_change: Callable[[Sequence[FileChange]], None],
        heartbeat: float,
        look: float,
    ) -> None:
        self._local = local
        self._catalog = catalog
        self._answered = answered
        """True once the Index said anything: from then on it alone tells what there is."""
        self._on_change = on_change
        self._heartbeat = heartbeat
        self._look = look
        self._due: dict[StorageID, float] = {}

    async def run(self) -> None:
        """Look at every path as it comes, and again after a while; return when there is no need."""
        while not self._answered():
            for path in self._local.paths():
                self._tell_health(path)
                if path.available and trio.current_time() >= self._due.get(path.storage, 0):
                    quiet = await self._show(path)
                    pause = self._look if quiet else 0
                    self._due[path.storage] = trio.current_time() + pause
            await trio.sleep(self._heartbeat)

    def _tell_health(self, path: LocalPath) -> None:
        if not self._answered():
            status = StorageStatus(
                info=msgspec.structs.replace(path.info, urls=self._local.urls),
                stat=path.stat,
                error=path.health_error(),
                last_heartbeat_ns=time.time_ns(),
                heartbeat_age=0,
            )
            self._catalog.update_storages([status], trio.current_time())

    async def _show(self, path: LocalPath) -> bool:
        """Show what a path holds; False when something still grows, and is to come soon."""
        quiet = True
        for file_type in FileType:
            try:
                quiet &= await self._show_type(path, file_type)
            except SectorFSError as exc:
                log.warning("%s: %s", path.type_name(file_type), exc)
        return quiet

    async def _show_type(self, path: LocalPath, file_type: FileType) -> bool:
        quiet = True
        shown = {
            file for file in self._catalog.files_of(path.storage) if file.file_type is file_type
        }
        for files in (await path.names(file_type, lambda seen: None)).chunks(SLICE):
            fresh = [file for file in files if file not in shown]
            shown.difference_update(files)
            there = [
                Declaration(file, path.storage, path.primary, look)
                for file, look in zip(fresh, await path.look(fresh), strict=True)
                if isinstance(look, Facts)
            ]
            found = [one for one in there if one.facts is not None and is_old(one.facts)]
            quiet &= len(found) == len(there)
            self._apply(found, [])
        self._apply([], [LocationKey(file, path.storage) for file in sorted(shown)])
        return quiet

    def _apply(self, found: Sequence[Declaration], gone: Sequence[LocationKey]) -> None:
        # Looked at and done in one step of the loop: an answer cannot come in between.
        if self._answered() or not (found or gone):
            return
        catalog = self._catalog
        changes = Changes(
            epoch=catalog.epoch, seq=catalog.seq, declared=tuple(found), dropped=tuple(gone)
        )
        self._on_change(catalog.apply(changes, time.time_ns(), trio.current_time()))
