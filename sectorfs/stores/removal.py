"""Removes sector files from this node's storage paths.

Order: drop the declaration; see once more that a healthy primary copy remains (`witnesses`); set
the file aside (one rename, so that no crash leaves half a directory under the sector's name); see
the other copy again, which may have been this very file under another name; delete. Two nodes that
each remove a copy, trusting in the other's, thus never both succeed: whoever asks last after its
own drop finds none left, and declares its copy again.

A crash before the other copy was seen twice leaves a whole file, which is put back and declared at
the next start; one after it leaves what is deleted then (`clear_leftovers`). A symbolic link is
deleted as such: what it names lies outside the storage path and stays.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import suppress
from functools import partial

import trio

from sectorfs.errors import NotFound, Refused, SectorFSError, StorageUnavailable
from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.own_names import delete_own, leftovers
from sectorfs.stores.scan import file_facts
from sectorfs.stores.seen import Seen
from sectorfs.stores.set_aside import (
    Aside,
    Expected,
    Place,
    delete_aside,
    give_up,
    put_back,
    put_back_late,
    set_aside,
)
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.turns import Turns
from sectorfs.stores.witnesses import Witnesses
from sectorfs.types import Facts, SectorFile, StorageID

log = logging.getLogger(__name__)

SLOW = 10
"""Deleting or syncing a whole sector may take this many times as long as one look at a disk."""


WIDTH = 4
"""Threads that removals may occupy on one storage."""


class Remover:
    """Takes sector files off the paths of this node."""

    def __init__(
        self,
        *,
        index: SectorIndex,
        local: LocalStore,
        peers: PeerClient,
        turns: Turns,
        owner: str,
        own_urls: frozenset[str],
        cutoff: float,
        deadline: float,
    ) -> None:
        self._index = index
        self._local = local
        self._turns = turns
        self._owner = owner
        self._deadline = deadline
        self._lanes: dict[StorageID, Lane] = {}
        self._witnesses = Witnesses(
            index=index, local=local, peers=peers, own_urls=own_urls, cutoff=cutoff
        )

    async def remove(
        self,
        file: SectorFile,
        *,
        only: Collection[StorageID] | None = None,
        force: bool = False,
    ) -> list[StorageID]:
        """Remove a file from the paths of this node, or from those in `only`.

        Returns the storages it was removed from. `NotFound` when no path here has it; `Refused`,
        unless by `force`, when no healthy primary copy would remain anywhere.
        """
        async with self._turns.of(file):
            here = await self._here(file)
            stays = {path.storage for path in here if only is not None and path.storage not in only}
            return await self._remove(file, here, stays, force, None)

    async def remove_for(
        self,
        file: SectorFile,
        *,
        keep: Collection[StorageID] = (),
        force: bool = False,
        expected: Expected | None = None,
        moved_to: StorageID | None = None,
    ) -> list[StorageID]:
        """Remove a file from all paths of this node but those in `keep`, as another node asks.

        Where that moved it to a storage, `moved_to` says so. Errors as `remove`; `Refused` also
        rather than to wait for a move to this node, which may wait for the other one.
        """
        async with self._turns.asked(file, moved_to):
            return await self._remove(file, await self._here(file), keep, force, expected)

    async def _remove(
        self,
        file: SectorFile,
        here: list[LocalPath],
        keep: Collection[StorageID],
        force: bool,
        expected: Expected | None,
    ) -> list[StorageID]:
        if not here:
            raise NotFound("not on this node", file)
        victims = [path for path in here if path.storage not in keep]
        if victims and not force:
            await self._require_others(file, victims)
        for path in victims:
            await self._remove_at(path, file, force=force, expected=expected)
        return [path.storage for path in victims]

    async def remove_copies(self, file: SectorFile) -> list[StorageID]:
        """Remove what is not primary; nothing, unless a healthy primary copy remains."""
        async with self._turns.of(file):
            held = await self._held(file)
            copies = [
                path
                for path in await self._here(file)
                if path.storage in held and not held[path.storage].primary
            ]
            if not copies:
                return []
            try:
                await self._require_others(file, copies)
            except Refused as exc:
                log.warning("no primary copy anywhere, no copy was removed: %s", exc)
                return []
            for path in copies:
                await self._remove_at(path, file, force=False, expected=None)
        return [path.storage for path in copies]

    async def take(self, path: LocalPath, file: SectorFile, seen: Seen) -> None:
        """Remove from one path what was seen there; the caller has the turn of the file.

        `Stale` when something else lies there now.
        """
        await self._remove_at(path, file, force=False, expected=seen)

    async def clear_leftovers(self, path: LocalPath) -> int:
        """Delete what this node left unfinished in a path; how many there were.

        A disk that does not let them go keeps nobody from using it.
        """
        removed = 0
        lane = self._lane(path)
        try:
            for file, name in await path.lane.run(
                lambda: leftovers(path.path, path.storage, self._owner), what="look for leftovers"
            ):
                async with self._turns.of(file):
                    await self._clear(path, lane, file, name)
                removed += 1
        except SectorFSError as exc:
            log.warning("%s: unfinished moves and removals stay: %s", path.path, exc)
        if removed:
            log.info("%s: cleared %d unfinished moves and removals", path.path, removed)
        return removed

    async def _clear(self, path: LocalPath, lane: Lane, file: SectorFile, name: str) -> None:
        place = Place(path.path, path.storage, file, self._owner)
        if name == place.aside:
            # Nobody saw another copy since it went: it is here again, and the scan declares it.
            with trio.CancelScope(shield=True):
                await self._restore(path, lane, Aside(place, beside=False))
        clear = partial(delete_own, path.path, path.storage, file, name)
        await lane.run(clear, what=f"delete {file}")

    async def _restore(self, path: LocalPath, lane: Lane, aside: Aside) -> None:
        file = aside.place.file

        def call() -> Facts | None:
            try:
                put_back(aside)
            except FileExistsError:
                return None  # something newer has its name
            return file_facts(path.path, path.storage, file)

        try:
            async with path.changing:
                facts = await lane.run(call, what=f"put {file} back")
                if facts is not None:
                    await self._index.declare(
                        [Declaration(file, path.storage, path.primary, facts)]
                    )
        finally:
            path.note(file)

    async def _require_others(self, file: SectorFile, going: Collection[LocalPath]) -> None:
        """`Refused` unless a healthy primary copy remains without those of some paths."""
        storages = [path.storage for path in going]
        held = await self._held(file)
        lost = [held[storage] for storage in storages if storage in held]
        await self._witnesses.require(file, without=storages, lost=lost)

    # What is where

    async def _held(self, file: SectorFile) -> dict[StorageID, Declaration]:
        declarations = await self._index.sector(file.sector)
        return {item.storage: item for item in declarations if item.file == file}

    async def _here(self, file: SectorFile) -> list[LocalPath]:
        """Paths of this node that declare a file, or have something under its name."""
        held = await self._held(file)
        found = []
        for path in self._local.paths():
            if path.storage in held:
                if not path.available:
                    raise StorageUnavailable(path.error, path.path)
                found.append(path)
            elif path.available:
                look = partial(os.path.lexists, path.name_of(file))
                if await path.lane.run(look, what=f"look for {file}"):
                    found.append(path)
        return found

    # One path

    async def _remove_at(
        self, path: LocalPath, file: SectorFile, *, force: bool, expected: Seen | Expected | None
    ) -> None:
        lane = self._lane(path)
        try:
            async with path.changing:
                # Between the drop and the rename the file is whole and nobody's: not to be left so.
                with trio.CancelScope(shield=True):
                    aside = await self._drop_and_set_aside(path, lane, file, force, expected)
                    path.removals += 1
            if aside is not None:
                await lane.run(partial(delete_aside, aside), what=f"delete {file}")
        finally:
            path.note(file)
        log.info("removed %s from %s", file, path.path)

    async def _drop_and_set_aside(
        self,
        path: LocalPath,
        lane: Lane,
        file: SectorFile,
        force: bool,
        expected: Seen | Expected | None,
    ) -> Aside | None:
        declaration = (await self._held(file)).get(path.storage)
        place = Place(path.path, path.storage, file, self._owner)
        lost = [declaration] if declaration is not None else []
        require = partial(self._witnesses.require, file, without=[path.storage], lost=lost)
        aside: Aside | None = None
        try:
            if declaration is not None:
                await self._index.drop([declaration.key])
            if not force:
                await require()
            # A disk that hung may do it at any later time, when the file is declared again.
            aside = await lane.run(
                partial(set_aside, place, expected), what=f"remove {file}", discard=put_back_late
            )
            if aside is not None:
                if not force:
                    await require()
                await lane.run(partial(give_up, aside), what=f"remove {file}")
        except BaseException:
            if aside is not None:
                await lane.run(partial(put_back, aside), what=f"put {file} back")
            if declaration is not None:
                with suppress(SectorFSError):  # the next scan of the path tells it
                    await self._index.declare([declaration])
            raise
        return aside

    def _lane(self, path: LocalPath) -> Lane:
        # Not the path's own: nobody who reads there may wait behind this. One per storage, or each
        # attempt on a disk that hangs would leave a thread of its own behind.
        lane = self._lanes.get(path.storage)
        if lane is None or lane.thing != path.path:
            deadline = self._deadline * SLOW
            lane = self._lanes[path.storage] = Lane(path.path, deadline=deadline, width=WIDTH)
        return lane
