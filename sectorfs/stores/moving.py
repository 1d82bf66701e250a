"""Moves sector files between storages: copy, sync, compare, declare, drop, delete, in this order.

Where a crash falls, and what is true after the next start:

* while it is brought (`incoming`): the source is whole and declared; what came is cleared;
* after the rename, before the declaration: two whole files; the scan declares the new one;
* after the declaration: two whole, declared primary copies;
* after the source's drop: two whole files; the scan declares the old one again;
* after the old one was set aside (`removal`): one whole, declared primary copy.

So there is always one whole primary copy, and the same move, begun again, goes on from there: what
is at the destination already, with the sizes and times of the source, is not brought again.

Within one file system the same order holds, with a second hard link instead of a copy. A plain
rename would leave a moment in which the Index names only the place where the file is no more.

Between nodes the destination's node does it all: it fetches, declares, and asks the source's node
to remove its copy and to keep every other storage's, its own before all: the two nodes may share
the storage that was moved to. A source that changes meanwhile stays, and the move fails. Nodes of
other programs keep their own books, not this Index: what they hold is dropped from here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Literal

import msgspec
import trio

from sectorfs.errors import (
    NotFound,
    Refused,
    SectorFSError,
    SourceFailed,
    Stale,
    StorageUnavailable,
    TimedOut,
)
from sectorfs.index.placement import accepts
from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.stores.incoming import Incoming, sync_in_place
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.receiving import Moving, Origin, Receiver
from sectorfs.stores.removal import SLOW, Remover
from sectorfs.stores.reservation import Claim
from sectorfs.stores.seen import Seen, see
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.turns import Turn, Turns
from sectorfs.types import Facts, SectorFile, StorageID

log = logging.getLogger(__name__)

How = Literal["linked", "copied", "fetched", "was there"]
WIDTH = 4
"""Threads that may write to one storage for moves."""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """A move that is done."""

    file: SectorFile
    source: StorageID | None
    """None when there was nothing left to take away."""
    to: StorageID
    size: int
    how: How


class Mover:
    """Moves sector files to the paths of this node, from wherever they are."""

    def __init__(
        self,
        *,
        index: SectorIndex,
        local: LocalStore,
        peers: PeerClient,
        space: SpaceLedger,
        remover: Remover,
        turns: Turns,
        owner: str,
        own_urls: frozenset[str],
        deadline: float,
    ) -> None:
        self._index = index
        self._local = local
        self._peers = peers
        self._space = space
        self._remover = remover
        self._turns = turns
        self._owner = owner
        self._own_urls = own_urls
        self._deadline = deadline
        self._receiver = Receiver(peers=peers, space=space, owner=owner)
        self._lanes: dict[StorageID, Lane] = {}
        self._moves: list[Moving] = []

    def moves(self) -> list[Moving]:
        """Moves under way."""
        return list(self._moves)

    async def move(
        self, file: SectorFile, to: StorageID, *, source: StorageID | None = None
    ) -> Moved:
        """Move a file from `source` (the one other storage with a primary copy) to a path here."""
        async with self._turns.of(file, to=to) as turn:
            target = self._target(to, file)
            held = await self._held(file)
            origin = _origin(file, held, to, source)
            moving = Moving(file, to)
            self._moves.append(moving)
            try:
                if origin is None:
                    return await self._confirm(file, target, held[to])
                path = self._path(origin)
                if path is not None:
                    return await self._from_here(moving, path, target)
                return await self._from_peer(moving, turn, held, origin, target)
            finally:
                self._moves.remove(moving)

    async def bring(
        self, file: SectorFile, to: StorageID, source: StorageID, *, move: bool
    ) -> None:
        """Fetch a file to a path of this node: a copy, or by `move` the primary one."""
        async with self._turns.of(file, to=to if move else None) as turn:
            target = self._path(to)
            if target is None:
                raise NotFound("not a storage path of this node", to)
            moving = Moving(file, to)
            self._moves.append(moving)
            try:
                if move:
                    held = await self._held(file)
                    if source not in held:
                        raise NotFound(f"not on storage {source}", file)
                    await self._from_peer(moving, turn, held, source, target)
                else:
                    await self._copy_from_peer(moving, source, target)
            finally:
                self._moves.remove(moving)

    # Where from, where to

    def _path(self, storage: StorageID) -> LocalPath | None:
        for path in self._local.paths():
            if path.storage == storage:
                if not path.available:
                    raise StorageUnavailable(path.error, path.path)
                return path
        return None

    def _target(self, to: StorageID, file: SectorFile) -> LocalPath:
        path = self._path(to)
        if path is None:
            raise NotFound("not a storage path of this node", to)
        info = path.info
        if not accepts(info, file.file_type, path_type="storage", miner=file.sector.miner):
            raise Refused(f"may not be placed on {path.path}", file, "see `sectorfs storage list`")
        return path

    async def _held(self, file: SectorFile) -> dict[StorageID, Declaration]:
        declarations = await self._index.sector(file.sector)
        held = {item.storage: item for item in declarations if item.file == file}
        if not held:
            raise NotFound("no storage declares it", file)
        return held

    async def _urls(self, storage: StorageID) -> list[str]:
        urls = [url for url in (await self._index.info(storage)).urls if url not in self._own_urls]
        if not urls:
            raise StorageUnavailable("no other node serves it", storage)
        return urls

    def _lane(self, target: LocalPath) -> Lane:
        # Not the path's own: nobody who reads there may wait behind bulk work.
        lane = self._lanes.get(target.storage)
        if lane is None or lane.thing != target.path:
            deadline = self._deadline * SLOW
            lane = self._lanes[target.storage] = Lane(
                target.path, deadline=deadline, patience=deadline, width=WIDTH
            )
        return lane

    async def _look(self, path: LocalPath, file: SectorFile) -> Seen | None:
        call = partial(see, path.name_of(file), file, path.name_of(file))
        try:
            return await self._lane(path).run(call, what=f"look at {file}")
        except NotFound:
            return None

    # Ways

    async def _confirm(self, file: SectorFile, target: LocalPath, known: Declaration) -> Moved:
        """Nothing to take away: it is there alone; make sure that it is, and primary."""
        seen = await self._look(target, file)
        if seen is None:
            target.note(file)
            raise NotFound("is declared there, and is not there", target.name_of(file))
        if not known.primary:
            await self._declare(target, file, seen.facts(file), primary=True)
        return Moved(file=file, source=None, to=target.storage, size=seen.size, how="was there")

    async def _from_here(self, moving: Moving, source: LocalPath, target: LocalPath) -> Moved:
        file = moving.file
        seen = await self._look(source, file)
        if seen is None:
            source.note(file)
            raise NotFound("is declared there, and is not there", source.name_of(file))
        moving.size = seen.size
        there = await self._look(target, file)
        if there is None:
            there, how = await self._bring_from_here(moving, source, seen, target)
        else:
            how = "was there"
            _require_same(there, seen, target.name_of(file))
            await sync_in_place(target, self._lane(target), file, there)
        await self._declare(target, file, there.facts(file), primary=True)
        await self._remover.take(source, file, seen)
        return Moved(file=file, source=source.storage, to=target.storage, size=seen.size, how=how)

    async def _bring_from_here(
        self, moving: Moving, source: LocalPath, seen: Seen, target: LocalPath
    ) -> tuple[Seen, How]:
        file, name = moving.file, source.name_of(moving.file)
        incoming = Incoming(target, self._lane(target), file, owner=self._owner)
        how: How = "linked"
        try:
            await incoming.begin()
            if not await incoming.link(name, seen):
                how = "copied"
                async with self._space.reserve([_claim(target, file, seen.size)]):
                    await incoming.copy(name, seen, moving.more)
            if await self._look(source, file) != seen:
                raise Stale("changed while it was moved", name, "move it again")
            there = await incoming.commit(seen.mtime_ns)
        except BaseException:
            await incoming.discard()
            raise
        _require_same(there, seen, target.name_of(file))
        return there, how

    async def _from_peer(
        self,
        moving: Moving,
        turn: Turn,
        held: Mapping[StorageID, Declaration],
        origin: StorageID,
        target: LocalPath,
    ) -> Moved:
        file = moving.file
        urls = await self._urls(origin)
        there = await self._look(target, file)
        if there is None:
            declared = held[origin].facts
            source = await self._receiver.receive(
                *(moving, urls, target, self._lane(target)), declared=declared, whole=True
            )
            there = await self._look(target, file)
            how: How = "fetched"
        else:
            source = await self._receiver.look(file, urls)
            how = "was there"
        if there is None or not there.holds(source.facts, rounded=not source.ours):
            raise Refused(
                "something else than what is to be moved lies there", target.name_of(file)
            )
        moving.size = source.facts.size
        if how == "was there":
            await sync_in_place(target, self._lane(target), file, there)
        await self._declare(target, file, there.facts(file), primary=True)
        turn.ask()
        if source.ours:
            await self._remove_at(source, file, origin, target, held)
        else:
            await self._remove_at_foreign(source, held[origin], target, there, held)
        return Moved(file=file, source=origin, to=target.storage, size=moving.size, how=how)

    async def _remove_at(
        self,
        source: Origin,
        file: SectorFile,
        origin: StorageID,
        target: LocalPath,
        held: Collection[StorageID],
    ) -> None:
        """Have a node of ours remove its copy: it drops, makes sure of ours, and deletes."""
        try:
            await self._peers.remove(
                source.url,
                file,
                keep=_kept(held, target, origin),
                expected=source.facts,
                moved_to=target.storage,
            )
        except NotFound:
            log.debug("%s: gone from %s already", file, source.url)
        await self._require_gone(file, origin, source.url)

    async def _remove_at_foreign(
        self,
        source: Origin,
        known: Declaration,
        target: LocalPath,
        there: Seen,
        held: Collection[StorageID],
    ) -> None:
        """Have another program's node remove its copy, which just deletes what it is told to.

        So this node makes sure of its own copy, and drops the other one from the Index first. Such
        a node says 500 to everything, also where there is nothing to delete: whether it still gives
        the file decides.
        """
        file = known.file
        ours = (await self._held(file)).get(target.storage)
        if ours is None or not ours.primary or await self._look(target, file) != there:
            raise Stale("changed while it was moved", target.name_of(file), "move it again")
        try:
            await self._index.drop([known.key])
            try:
                keep = _kept(held, target, known.storage)
                await self._peers.remove(source.url, file, keep=keep)
            except (NotFound, SourceFailed, TimedOut):
                if await self._receiver.still_has(file, source.url):
                    raise
        except BaseException:
            with trio.CancelScope(shield=True), suppress(SectorFSError):
                await self._index.declare([known])
            raise

    async def _copy_from_peer(self, moving: Moving, source: StorageID, target: LocalPath) -> None:
        file = moving.file
        known = (await self._held(file)).get(source)
        origin = await self._receiver.receive(
            *(moving, await self._urls(source), target, self._lane(target)),
            declared=known.facts if known is not None else None,
            whole=False,
        )
        await self._declare(target, file, origin.facts, primary=False)

    async def _require_gone(self, file: SectorFile, origin: StorageID, url: str) -> None:
        if origin in await self._held(file):
            raise SourceFailed(
                f"was moved, and is still declared on {origin}", file, f"ask the node at {url}"
            )

    async def _declare(
        self, target: LocalPath, file: SectorFile, facts: Facts, *, primary: bool
    ) -> None:
        async with target.changing:
            with trio.CancelScope(shield=True):
                await self._index.declare([Declaration(file, target.storage, primary, facts)])


def _origin(
    file: SectorFile,
    held: Mapping[StorageID, Declaration],
    to: StorageID,
    source: StorageID | None,
) -> StorageID | None:
    """The storage to take a file from; None when it is at the destination and nowhere else."""
    if source == to:
        raise Refused("is to be moved to where it is", file)
    if source is not None:
        if source in held:
            return source
        if to in held:
            return None
        raise NotFound(f"not on storage {source}", file, "see `sectorfs storage find`")
    others = {storage: item for storage, item in held.items() if storage != to}
    primaries = [storage for storage, item in others.items() if item.primary]
    if len(primaries) == 1:
        return primaries[0]
    if not primaries and to in held:
        return None
    if not primaries and len(others) == 1:
        return next(iter(others))
    raise Refused(
        f"is on {len(primaries or others)} other storages", file, "say which: --from STORAGE"
    )


def _kept(held: Collection[StorageID], target: LocalPath, origin: StorageID) -> list[StorageID]:
    """Every storage that is to keep a file: two nodes may share the one that it was moved to."""
    return sorted({target.storage, *held} - {origin})


def _claim(target: LocalPath, file: SectorFile, size: int) -> Claim:
    return Claim(storage=target.storage, file=file, size=size, place="fetching")


def _require_same(there: Seen, seen: Seen, where: str) -> None:
    if not there.same_content(seen):
        raise Refused("something else than what is to be moved lies there", where)
