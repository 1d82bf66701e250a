"""Space promised to files that are still being written: pure accounting, no disk, no clock.

A `Claim` is the size one sector file may come to have on one storage. What it counts is that size
less the bytes that lie already in the place it is written to; as the file grows, the claim shrinks
by what the file system has lost. `Reservations` is the ledger of this node; `Reservation` is what
one task holds, from before its first byte until its files are in place.

Whoever reserves measures first, in this order: `Reservations.mark`, then the bytes present of every
held and wanted claim, then use and free space. Bytes written between two steps then count twice for
a moment, never zero times. A measurement from before a release is refused: it would miss both the
released claim and the bytes written under it.

Invariants: a file, or a file of a directory, is claimed once per storage; claims on one file
system, whichever storages they are on, are together never granted more than it has free; a limit
counts claims like bytes used; a request is granted as a whole or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal

import msgspec

from sectorfs.errors import BadInput, DiskFull, NotFound, Refused
from sectorfs.index.checks import check_number
from sectorfs.index.placement import space_needed
from sectorfs.index.protocol import FsStat, PathType
from sectorfs.stores.space import RawSpace, fs_stat
from sectorfs.types import FileType, SectorFile, SectorID, StorageID

log = logging.getLogger(__name__)

Place = Literal["final", "temporary", "fetching"]
"""Where a file is written: under its name, as ``<name>.tmp``, or below ``fetching/``."""


Spot = tuple[SectorFile, Place] | tuple[SectorFile, Place, str]
"""The bytes that a claim counts as written: of a sector file, or of one file in a directory."""


class ClaimKey(msgspec.Struct, frozen=True):
    """What can be claimed once."""

    file: SectorFile
    member: str
    storage: StorageID


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """Room for one sector file, or one file of a sector directory, on one storage."""

    storage: StorageID
    file: SectorFile
    size: int
    """Bytes the file may come to have."""
    place: Place
    """Only bytes there count as written: an older copy elsewhere may stay until the end."""
    member: str = ""
    """One file of a directory, which readers fetch one by one; empty for the whole."""

    @property
    def key(self) -> ClaimKey:
        """What can be claimed once."""
        return ClaimKey(self.file, self.member, self.storage)

    @property
    def spot(self) -> Spot:
        """Where its bytes are counted."""
        return (self.file, self.place, self.member) if self.member else (self.file, self.place)


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of a storage."""

    mark: int
    """`Reservations.mark` from before anything was measured."""
    raw: RawSpace
    filesystem: int
    """Device number: storages on one file system share its free space."""
    max_storage: int = 0
    """The storage's limit; 0 for none."""
    used: int | None = None
    """Bytes its files occupy, or more; None while unknown. Counts only under a limit."""
    present: Mapping[Spot, int] = {}
    """Bytes on disk (blocks, directories summed up) of claimed files; one left out has none."""


def claims_for(
    sector: SectorID,
    storages: Mapping[FileType, StorageID],
    sector_size: int,
    *,
    path_type: PathType,
    place: Place,
    known: Mapping[FileType, int],
) -> list[Claim]:
    """Claims for the files of a sector: of its `known` size, else by the overhead table."""
    claims = []
    for file_type, storage in sorted(storages.items()):
        size = known.get(file_type)
        file = SectorFile(file_type, sector)
        if size is None:
            if sector_size == 0:
                raise BadInput("neither its size nor the sector size is known", file)
            size = space_needed((file_type,), sector_size, path_type=path_type)
        claims.append(Claim(storage=storage, file=file, size=size, place=place))
    return claims


def remaining(claim: Claim, room: Room | None) -> int:
    """Bytes of a claim that are still to be written; all of it where nothing was measured."""
    written = 0 if room is None else room.present.get(claim.spot, 0)
    return max(0, claim.size - written)


class _Held(msgspec.Struct, frozen=True):
    claim: Claim
    filesystem: int


class Reservations:
    """The ledger of a node's storages. Used on the loop only, and never waits."""

    def __init__(self) -> None:
        self._held: dict[ClaimKey, _Held] = {}
        self._mark = 0
        # Mark of the last release on each storage and each file system.
        self._released: dict[StorageID | int, int] = {}

    @property
    def mark(self) -> int:
        """Grows with every release; a `Room` carries it."""
        return self._mark

    def claims(self, storage: StorageID) -> tuple[Claim, ...]:
        """What is claimed on a storage: whose bytes to measure, and how busy it is."""
        return tuple(held.claim for held in self._held.values() if held.claim.storage == storage)

    def is_current(self, rooms: Mapping[StorageID, Room]) -> bool:
        """Whether no space was released since the rooms were measured; else measure again."""
        return all(
            room.mark >= self._released.get(key, 0)
            for storage, room in rooms.items()
            for key in (storage, room.filesystem)
        )

    def reserve(
        self,
        claims: Sequence[Claim],
        rooms: Mapping[StorageID, Room],
        *,
        min_free_percent: int = 0,
    ) -> Reservation:
        """Grant all claims, or none.

        `rooms` has every storage of `claims`, and should have those that share their file systems:
        the claims of a storage that was not measured count in full. `min_free_percent` of each
        storage's capacity must stay free. `DiskFull` without room; `Refused` for a file that is
        claimed already and for rooms that are not current.
        """
        if not 0 <= min_free_percent <= 100:
            raise BadInput(f"{min_free_percent} is no percentage", "min_free_percent")
        wanted = self._wanted(claims, rooms)
        if not self.is_current(rooms):
            raise Refused("space was released since it was measured", "reserve", "measure again")
        after = [*self._held.values(), *wanted.values()]
        for storage in sorted({claim.storage for claim in claims}):
            need = sum(remaining(one, rooms[storage]) for one in claims if one.storage == storage)
            left = _left(storage, rooms, after)
            if (need and left < 0) or _too_full(rooms[storage], left, min_free_percent):
                has = max(0, _left(storage, rooms, self._held.values()))
                keep = f", {min_free_percent} % must stay free" if min_free_percent else ""
                raise DiskFull(
                    f"no room for {need} bytes: {has} are left{keep}", storage, "make room"
                )
        self._held |= wanted
        return Reservation(self, wanted)

    def reserved(self, storage: StorageID, rooms: Mapping[StorageID, Room]) -> int:
        """Bytes still to be written to a storage under its claims."""
        return _reserved(storage, rooms, self._held.values())

    def stat(self, storage: StorageID, rooms: Mapping[StorageID, Room]) -> FsStat:
        """Space of a storage with all claims counted; `rooms` as in `reserve`."""
        room = _room(storage, rooms)
        stat = fs_stat(
            room.raw,
            max_storage=room.max_storage,
            used=room.used,
            reserved=self.reserved(storage, rooms),
        )
        left = max(0, _left(storage, rooms, self._held.values()))
        return msgspec.structs.replace(stat, available=left)

    def _wanted(
        self, claims: Sequence[Claim], rooms: Mapping[StorageID, Room]
    ) -> dict[ClaimKey, _Held]:
        wanted: dict[ClaimKey, _Held] = {}
        for claim in claims:
            check_number(claim.size, "size", claim.file)
            filesystem = _room(claim.storage, rooms).filesystem
            if claim.key in wanted:
                raise BadInput(f"claimed twice on {claim.storage}", claim.file)
            if claim.key in self._held:
                raise Refused(f"space on {claim.storage} is reserved already", claim.file)
            wanted[claim.key] = _Held(claim, filesystem)
        return wanted

    def _release(self, keys: Iterable[ClaimKey]) -> None:
        for key in keys:
            self._mark += 1
            self._released[key.storage] = self._mark
            self._released[self._held.pop(key).filesystem] = self._mark


class Reservation:
    """Claims that one task holds. Released by `release`, or at the end of a ``with`` over it."""

    def __init__(self, ledger: Reservations, keys: Iterable[ClaimKey]) -> None:
        self._ledger = ledger
        self._keys = set(keys)  # Invariant: exactly our keys in the ledger
        self._released = False

    def finish(self, storage: StorageID, file: SectorFile, member: str = "") -> bool:
        """A file is in place, or was given up: release its claim alone. False if not held."""
        key = ClaimKey(file, member, storage)
        if key not in self._keys:
            log.warning("%s on %s: space released twice, or never reserved", file, storage)
            return False
        self._keys.remove(key)
        self._ledger._release([key])
        return True

    def release(self) -> bool:
        """Release what is left. A second call changes nothing, is logged, and returns False."""
        if self._released:
            log.warning("a reservation was released twice")
            return False
        self._released = True
        keys, self._keys = self._keys, set()
        self._ledger._release(keys)
        return True

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._released:
            self.release()


def _room(storage: StorageID, rooms: Mapping[StorageID, Room]) -> Room:
    room = rooms.get(storage)
    if room is None:
        raise NotFound("not a storage path of this node", storage)
    return room


def _reserved(storage: StorageID, rooms: Mapping[StorageID, Room], held: Iterable[_Held]) -> int:
    return sum(
        remaining(one.claim, rooms.get(storage)) for one in held if one.claim.storage == storage
    )


def _left(storage: StorageID, rooms: Mapping[StorageID, Room], held: Iterable[_Held]) -> int:
    """Bytes a storage has beyond all claims; negative when it was overtaken by other programs."""
    room = rooms[storage]
    held = list(held)
    promised = sum(
        remaining(one.claim, rooms.get(one.claim.storage))
        for one in held
        if _filesystem(one, rooms) == room.filesystem
    )
    left = room.raw.available - promised
    if room.max_storage > 0:
        # While use is not known nothing may be placed, as in `fs_stat`.
        used = room.max_storage if room.used is None else room.used
        left = min(left, room.max_storage - used - _reserved(storage, rooms, held))
    return left


def _filesystem(held: _Held, rooms: Mapping[StorageID, Room]) -> int:
    # A disk that was mounted again has another number than when the claim was granted.
    room = rooms.get(held.claim.storage)
    return held.filesystem if room is None else room.filesystem


def _too_full(room: Room, left: int, min_free_percent: int) -> bool:
    if min_free_percent == 0:
        return False
    return left * 100 < min_free_percent * (room.max_storage or room.raw.capacity)
