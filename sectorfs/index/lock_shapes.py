"""JSON shapes of locks and leases, and their conversion to values and back.

``StorageGetLocks`` has two arrays per sector with a number per file type, indexed by the type's bit
position and as long as the answering version knows types: 3, 5 or 6 in older ones, 7 here. Who
holds a lock, and why, is only in our own shapes; a token is in none that is given out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import msgspec

from sectorfs.errors import BadInput
from sectorfs.index import checks, shapes
from sectorfs.index.locks import Counts
from sectorfs.index.protocol import Lease, LeaseStatus, Lock
from sectorfs.types import FileType


class _Shape(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    pass


class LeaseShape(_Shape, frozen=True):
    """A lease that is asked for."""

    token: str
    sector: shapes.SectorShape = msgspec.field(name="SectorID")
    read: int
    write: int
    owner: str
    reason: str
    seconds: float


class LeaseStatusShape(_Shape, frozen=True):
    """A lease as others see it; `expires_in` is null while it waits."""

    sector: shapes.SectorShape = msgspec.field(name="SectorID")
    read: int
    write: int
    owner: str
    reason: str
    since_ns: int
    expires_in: float | None


class SectorLockShape(_Shape, frozen=True):
    """What is locked of one sector, as the original shows it."""

    sector: shapes.SectorShape
    write: Sequence[int]
    read: Sequence[int]


class SectorLocksShape(_Shape, frozen=True):
    """The answer of ``StorageGetLocks``."""

    locks: list[SectorLockShape]


def to_lock(sector: shapes.SectorShape, read: int, write: int) -> Lock:
    """A checked lock."""
    lock = Lock(sector=shapes.to_sector(sector), read=read, write=write)
    checks.check_lock(lock)
    return lock


def to_lease(shape: LeaseShape) -> Lease:
    """A checked lease."""
    lease = Lease(
        token=shape.token,
        lock=to_lock(shape.sector, shape.read, shape.write),
        owner=shape.owner,
        reason=shape.reason,
        seconds=shape.seconds,
    )
    checks.check_lease(lease)
    return lease


def from_lease(lease: Lease) -> LeaseShape:
    """The shape of a lease."""
    return LeaseShape(
        token=lease.token,
        sector=shapes.from_sector(lease.lock.sector),
        read=lease.lock.read,
        write=lease.lock.write,
        owner=lease.owner,
        reason=lease.reason,
        seconds=lease.seconds,
    )


def to_status(shape: LeaseStatusShape) -> LeaseStatus:
    """What is checked of a lease that another Index shows."""
    lock = to_lock(shape.sector, shape.read, shape.write)
    checks.check_number(shape.since_ns, "SinceNs", lock.sector)
    if shape.expires_in is not None and not 0 <= shape.expires_in <= checks.MAX_LEASE:
        raise BadInput(f"ExpiresIn {shape.expires_in}", lock.sector)
    return LeaseStatus(
        lock=lock,
        owner=shape.owner,
        reason=shape.reason,
        since_ns=shape.since_ns,
        expires_in=shape.expires_in,
    )


def from_status(status: LeaseStatus) -> LeaseStatusShape:
    """The shape of a lease that others see."""
    return LeaseStatusShape(
        sector=shapes.from_sector(status.lock.sector),
        read=status.lock.read,
        write=status.lock.write,
        owner=status.owner,
        reason=status.reason,
        since_ns=status.since_ns,
        expires_in=status.expires_in,
    )


def from_statuses_as_lotus(statuses: Iterable[LeaseStatus]) -> SectorLocksShape:
    """What is held, per sector and by number, as the original shows it."""
    held = [status.lock for status in statuses if status.expires_in is not None]
    held.sort(key=lambda lock: (lock.sector.number, lock.sector.miner))
    return SectorLocksShape(
        locks=[
            SectorLockShape(
                sector=shapes.from_sector(sector),
                write=[int(bool(counts.write & file_type)) for file_type in FileType],
                read=counts.readers,
            )
            for sector, locks in groupby(held, key=lambda lock: lock.sector)
            for counts in (Counts.of(locks),)
        ]
    )
