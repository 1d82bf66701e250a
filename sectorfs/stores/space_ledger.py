"""Reservations at work: measures this node's storage paths, and keeps the ledger of promised space.

Measuring follows the order that `reservation` asks for, over all paths of one file system: mark,
bytes present of every claim, then free space. A path with a limit knows its use only from a walk
that takes minutes; what was written since that walk began is added to it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import trio

from sectorfs.errors import NotFound, Refused
from sectorfs.index.protocol import FsStat
from sectorfs.stores.blocks import DATA_SUFFIX
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.own_names import FETCHING, own_name
from sectorfs.stores.reservation import Claim, Reservation, Reservations, Room, Spot
from sectorfs.stores.space import BLOCK, RawSpace, raw_space, usage_steps
from sectorfs.types import StorageID

ROUNDS = 20
"""How often to measure again because space was released meanwhile."""


class _Written(msgspec.Struct, frozen=True):
    """Bytes that came to a path with a limit."""

    at: float
    size: int


class SpaceLedger:
    """The space of this node's paths, with what is promised counted."""

    def __init__(self, paths: Callable[[], Sequence[LocalPath]], *, owner: str) -> None:
        self._paths = paths
        self._owner = owner
        self._ledger = Reservations()
        self._written: dict[StorageID, list[_Written]] = {}

    @asynccontextmanager
    async def reserve(self, claims: Sequence[Claim]) -> AsyncIterator[Reservation]:
        """Hold room for files for the block; `DiskFull` without it, `Refused` if claimed already.

        A block that ends well has written them.
        """
        reservation = await self._reserve(claims)
        with reservation:
            yield reservation
            for claim in claims:
                self._note(claim)

    async def _reserve(self, claims: Sequence[Claim]) -> Reservation:
        storages = {claim.storage for claim in claims}
        for _ in range(ROUNDS):
            rooms = await self._measure(storages, claims)
            if self._ledger.is_current(rooms):
                return self._ledger.reserve(claims, rooms)
        raise Refused("space changes faster than it can be measured", "reserve", "try again")

    async def stat(self, path: LocalPath) -> FsStat:
        """Space of a path, claims counted; as it was last probed when there are none."""
        if not path.stat.reserved and not self._concerned(path):
            return path.stat
        return self._ledger.stat(path.storage, await self._measure({path.storage}, ()))

    def claims(self, storage: StorageID) -> tuple[Claim, ...]:
        """What is promised on a storage."""
        return self._ledger.claims(storage)

    def _concerned(self, path: LocalPath) -> bool:
        return any(self._ledger.claims(other.storage) for other in self._neighbours([path]))

    def _neighbours(self, paths: Sequence[LocalPath]) -> list[LocalPath]:
        """Paths that share a file system with one of `paths`, themselves included."""
        systems = {path.identity[0] for path in paths}
        return [
            path
            for path in self._paths()
            if path in paths or (path.available and path.identity[0] in systems)
        ]

    async def _measure(
        self, storages: set[StorageID], wanted: Sequence[Claim]
    ) -> dict[StorageID, Room]:
        mark = self._ledger.mark
        known = {path.storage: path for path in self._paths()}
        for storage in storages:
            if storage not in known:
                raise NotFound("not a storage path of this node", storage)
        paths = self._neighbours([known[storage] for storage in sorted(storages)])
        present: dict[StorageID, Mapping[Spot, int]] = {}
        for path in paths:
            claims = [*self._ledger.claims(path.storage)]
            claims += [claim for claim in wanted if claim.storage == path.storage]
            present[path.storage] = await self._present(path, claims)
        rooms = {}
        for path in paths:
            raw = await path.lane.run(partial(raw_space, path.path), what="statfs")
            rooms[path.storage] = self._room(path, mark, raw, present[path.storage])
        return rooms

    async def _present(self, path: LocalPath, claims: Sequence[Claim]) -> Mapping[Spot, int]:
        if not claims:
            return {}
        names = {claim.spot: _places(path, claim, self._owner) for claim in claims}

        def call() -> dict[Spot, int]:
            return {spot: sum(_usage(name) for name in at) for spot, at in names.items()}

        return await path.lane.run(call, what="measure what is being written")

    def _room(self, path: LocalPath, mark: int, raw: RawSpace, present: Mapping[Spot, int]) -> Room:
        used = path.used
        if used is not None:
            used += sum(present.values()) + self._since(path)
        return Room(
            mark=mark,
            raw=raw,
            filesystem=path.identity[0],
            max_storage=path.info.max_storage,
            used=used,
            present=present,
        )

    def _note(self, claim: Claim) -> None:
        path = next((path for path in self._paths() if path.storage == claim.storage), None)
        if path is not None and path.info.max_storage > 0:
            written = _Written(trio.current_time(), claim.size)
            self._written.setdefault(claim.storage, []).append(written)

    def _since(self, path: LocalPath) -> int:
        """Bytes written since the walk that told the path's use began."""
        fresh = [one for one in self._written.get(path.storage, ()) if one.at >= path.used_at]
        if fresh:
            self._written[path.storage] = fresh
        else:
            self._written.pop(path.storage, None)
        return sum(one.size for one in fresh)


def _places(path: LocalPath, claim: Claim, owner: str) -> list[str]:
    """Where the bytes of a claim are, under any of the names this node gives."""
    final = path.name_of(claim.file)
    if claim.place == "final":
        return [final]
    if claim.place == "temporary":
        return [f"{final}.tmp"]
    fetching = os.path.join(os.path.dirname(final), FETCHING)
    if claim.member:
        folder = os.path.join(fetching, claim.file.sector.name)
        return [os.path.join(folder, f"{claim.member}{end}") for end in (".tmp", DATA_SUFFIX)]
    return [
        os.path.join(fetching, claim.file.sector.name),
        os.path.join(fetching, f"{claim.file.sector.name}{DATA_SUFFIX}"),
        os.path.join(fetching, own_name(claim.file, owner, "in")),
    ]


def _usage(name: str) -> int:
    try:
        found = os.lstat(name)
    except OSError:
        return 0
    blocks = found.st_blocks * BLOCK
    return blocks if not os.path.isdir(name) else max(usage_steps(name))
