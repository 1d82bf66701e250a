"""Removes sector files from this node's storage paths.

Order: drop the declaration; ask the Index once more that a healthy primary copy remains elsewhere;
set the file aside (one rename, so that no crash leaves half a directory under the sector's name);
delete it. Two nodes that each remove a copy, trusting in the other's, thus never both succeed:
whoever asks last after its own drop finds none left, and declares its copy again.

A crash before the rename leaves a whole file, which the scan at the next start declares again; one
after it leaves what `clear_leftovers` deletes. A symbolic link is deleted as such: what it names
lies outside the storage path and stays.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial

import msgspec
import trio

from sectorfs.errors import NotFound, Refused, SectorFSError, Stale, StorageUnavailable
from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.own_names import (
    delete,
    delete_own,
    leftovers,
    opened_fetching,
    opened_type,
    own_name,
)
from sectorfs.stores.seen import Seen, see
from sectorfs.stores.turns import Turns
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

SLOW = 10
"""Deleting or syncing a whole sector may take this many times as long as one look at a disk."""


class Expected(msgspec.Struct, frozen=True):
    """What is to be removed, as somebody else saw it: anything else under its name stays."""

    size: int
    mtime_ns: int


class Remover:
    """Takes sector files off the paths of this node."""

    def __init__(
        self,
        *,
        index: SectorIndex,
        local: LocalStore,
        turns: Turns,
        owner: str,
        cutoff: float,
        deadline: float,
    ) -> None:
        self._index = index
        self._local = local
        self._turns = turns
        self._owner = owner
        self._cutoff = cutoff
        self._deadline = deadline

    async def remove(
        self,
        file: SectorFile,
        *,
        keep: Collection[StorageID] = (),
        only: Collection[StorageID] | None = None,
        force: bool = False,
        expected: Expected | None = None,
    ) -> list[StorageID]:
        """Remove a file from the paths of this node but those in `keep` (or from those in `only`).

        Returns the storages it was removed from. `NotFound` when no path here has it; `Refused`,
        unless by `force`, when no healthy primary copy would remain anywhere.
        """
        async with self._turns.of(file):
            held = await self._held(file)
            here = await self._here(file, held)
            if not here:
                raise NotFound("not on this node", file)
            victims = [
                path
                for path in here
                if path.storage not in keep and (only is None or path.storage in only)
            ]
            if victims and not force:
                await self._require_primary(file, held, victims)
            for path in victims:
                await self._remove_at(path, file, force=force, expected=expected)
        return [path.storage for path in victims]

    async def remove_copies(self, file: SectorFile) -> list[StorageID]:
        """Remove what is not primary; nothing, unless a healthy primary copy remains."""
        async with self._turns.of(file):
            held = await self._held(file)
            copies = [
                path
                for path in await self._here(file, held)
                if path.storage in held and not held[path.storage].primary
            ]
            if copies and not await self._primaries(held.values(), without=copies):
                log.warning("%s: no primary copy anywhere, no copy was removed", file)
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
                    await self._delete(path, lane, file, name)
                removed += 1
        except SectorFSError as exc:
            log.warning("%s: unfinished moves and removals stay: %s", path.path, exc)
        if removed:
            log.info("%s: cleared %d unfinished moves and removals", path.path, removed)
        return removed

    # What is where

    async def _held(self, file: SectorFile) -> dict[StorageID, Declaration]:
        declarations = await self._index.sector(file.sector)
        return {item.storage: item for item in declarations if item.file == file}

    async def _here(self, file: SectorFile, held: dict[StorageID, Declaration]) -> list[LocalPath]:
        """Paths of this node that declare a file, or have something under its name."""
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

    async def _require_primary(
        self, file: SectorFile, held: dict[StorageID, Declaration], victims: Sequence[LocalPath]
    ) -> None:
        if not await self._primaries(held.values(), without=victims):
            raise Refused(
                "no healthy primary copy would remain", file, "--force removes the last one too"
            )

    async def _primaries(
        self, declarations: Collection[Declaration], *, without: Sequence[LocalPath]
    ) -> int:
        """How many healthy primary copies there are beyond those on some paths."""
        gone = {path.storage for path in without}
        candidates = {item.storage for item in declarations if item.primary} - gone
        if not candidates:
            return 0
        here = {path.storage for path in self._local.paths() if path.available}
        healthy = {
            status.info.storage
            for status in await self._index.storages()
            if status.healthy(self._cutoff)
        }
        return len(candidates & (healthy | here))

    # One path

    async def _remove_at(
        self, path: LocalPath, file: SectorFile, *, force: bool, expected: Seen | Expected | None
    ) -> None:
        lane = self._lane(path)
        try:
            async with path.changing:
                # Between the drop and the rename the file is whole and nobody's: not to be left so.
                with trio.CancelScope(shield=True):
                    name = await self._drop_and_set_aside(path, lane, file, force, expected)
            if name is not None:
                await self._delete(path, lane, file, name)
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
    ) -> str | None:
        declaration = (await self._held(file)).get(path.storage)
        try:
            if declaration is not None:
                await self._index.drop([declaration.key])
            if not force:
                await self._require_primary(file, await self._held(file), [path])
            return await lane.run(
                lambda: _set_aside(path, file, self._owner, expected), what=f"remove {file}"
            )
        except BaseException:
            if declaration is not None:
                with suppress(SectorFSError):  # the next scan of the path tells it
                    await self._index.declare([declaration])
            raise

    async def _delete(self, path: LocalPath, lane: Lane, file: SectorFile, name: str) -> None:
        await lane.run(
            lambda: delete_own(path.path, path.storage, file, name), what=f"delete {file}"
        )

    def _lane(self, path: LocalPath) -> Lane:
        # Not the path's own: nobody who reads there may wait behind this.
        return Lane(path.path, deadline=self._deadline * SLOW, width=1)


def _set_aside(
    path: LocalPath, file: SectorFile, owner: str, expected: Seen | Expected | None
) -> str | None:
    """Rename a file to a name below ``fetching``; None when nothing is there."""
    final, name, kind = file.sector.name, own_name(file, owner, "out"), file.file_type
    where = path.name_of(file)
    try:
        with opened_type(path.path, path.storage, kind) as type_fd:
            with suppress(FileNotFoundError), opened_fetching(type_fd, path.path, kind):
                delete_own(path.path, path.storage, file, name)
            _check(final, file, where, type_fd, expected)
            try:
                with opened_fetching(type_fd, path.path, kind, make=True) as fd:
                    _rename(file, name, type_fd, fd, where, expected)
                    return name
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            # No room for a directory, and removing is how to make some.
            _rename(file, name, type_fd, type_fd, where, expected)
            delete(name, type_fd)
    except FileNotFoundError:
        pass
    return None


def _rename(
    file: SectorFile,
    name: str,
    type_fd: int,
    target_fd: int,
    where: str,
    expected: Seen | Expected | None,
) -> None:
    """Set a file aside, and back again when it is not the one that was meant."""
    os.rename(file.sector.name, name, src_dir_fd=type_fd, dst_dir_fd=target_fd)
    try:
        _check(name, file, where, target_fd, expected)
    except SectorFSError:
        os.rename(name, file.sector.name, src_dir_fd=target_fd, dst_dir_fd=type_fd)
        raise


def _check(
    name: str, file: SectorFile, where: str, dir_fd: int, expected: Seen | Expected | None
) -> None:
    """`Stale` when something else lies there than what is to be removed."""
    if expected is None:
        return
    try:
        found = see(name, file, where, dir_fd=dir_fd)
    except NotFound as exc:
        raise FileNotFoundError(where) from exc
    if isinstance(expected, Seen):
        same = (found.entry, found.parts) == (expected.entry, expected.parts)
    else:
        facts = found.facts(file)
        same = (facts.size, facts.mtime_ns) == (expected.size, expected.mtime_ns)
    if not same:
        raise Stale("was replaced meanwhile, and stays", where, "move it again")
