"""Rows of the embedded Index to values and back; columns are in the order of the constants."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

import msgspec

from sectorfs.index.packed import Pack, PackedRow, pack
from sectorfs.index.protocol import Declaration, FsStat, Lease, Lock, StorageInfo, StorageStatus
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID

# SQL rows are heterogeneous tuples whose column types the schema guarantees.
Row = Sequence[Any]

STORAGE_COLUMNS = (
    "storage_id, urls, weight, max_storage, can_seal, can_store, groups, allow_to, allow_types,"
    " deny_types, allow_miners, deny_miners, capacity, available, fs_available, reserved, max,"
    " used, heartbeat_err, last_heartbeat"
)
STORAGE_INFO_COUNT = 12
STORAGE_MARKS = ", ".join("?" * len(STORAGE_COLUMNS.split(",")))

LOCATION_COLUMNS = (
    "l.sector_filetype, l.miner_id, l.sector_num, l.storage_id, l.is_primary,"
    " f.size, f.mtime_ns, f.members, f.digest"
)
LOCATION_TABLES = (
    "sector_location AS l LEFT JOIN sector_facts AS f"
    " USING (miner_id, sector_num, sector_filetype, storage_id)"
)

LEASE_COLUMNS = (
    "token, miner_id, sector_num, read_mask, write_mask, owner, reason, seconds, granted_ns"
)
LEASE_MARKS = ", ".join("?" * len(LEASE_COLUMNS.split(",")))

_TYPES = {int(file_type): file_type for file_type in FileType}
_members = msgspec.json.Decoder(list[tuple[str, int, int]])
_encode = msgspec.json.Encoder().encode


def info_row(info: StorageInfo) -> tuple[Any, ...]:
    """The first `STORAGE_INFO_COUNT` columns."""
    return (
        info.storage,
        ",".join(info.urls),
        info.weight,
        info.max_storage,
        int(info.can_seal),
        int(info.can_store),
        ",".join(info.groups),
        ",".join(info.allow_to),
        ",".join(info.allow_types),
        ",".join(info.deny_types),
        ",".join(info.allow_miners),
        ",".join(info.deny_miners),
    )


def stat_row(stat: FsStat) -> tuple[int, ...]:
    """The columns ``capacity`` to ``used``."""
    return (
        stat.capacity,
        stat.available,
        stat.fs_available,
        stat.reserved,
        stat.max,
        stat.used,
    )


def split(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated column."""
    return tuple(text.split(",")) if text else ()


def to_info(row: Row) -> StorageInfo:
    """A storage from `STORAGE_COLUMNS`."""
    return StorageInfo(
        storage=StorageID(sys.intern(row[0])),
        urls=split(row[1]),
        weight=row[2],
        max_storage=row[3],
        can_seal=bool(row[4]),
        can_store=bool(row[5]),
        groups=split(row[6]),
        allow_to=split(row[7]),
        allow_types=split(row[8]),
        deny_types=split(row[9]),
        allow_miners=split(row[10]),
        deny_miners=split(row[11]),
    )


def to_status(row: Row, now_ns: int) -> StorageStatus:
    """A storage's status from `STORAGE_COLUMNS`, with its heartbeat's age at `now_ns`."""
    capacity, available, fs_available, reserved, maximum, used, error, heartbeat = row[12:]
    return StorageStatus(
        info=to_info(row),
        stat=FsStat(
            capacity=capacity,
            available=available,
            fs_available=fs_available,
            reserved=reserved,
            max=maximum,
            used=used,
        ),
        error=error or "",
        last_heartbeat_ns=heartbeat,
        # A clock set back would make the age negative.
        heartbeat_age=max(0, now_ns - heartbeat) / 1e9,
    )


def facts_row(facts: Facts) -> tuple[int, int, bytes | None, bytes | None]:
    """The columns ``size``, ``mtime_ns``, ``members`` and ``digest``."""
    digest = facts.digest or None
    if facts.members is None:
        return facts.size, facts.mtime_ns, None, digest
    members = [(member.name, member.size, member.mtime_ns) for member in facts.members]
    return facts.size, facts.mtime_ns, _encode(members), digest


def to_declaration(row: Row) -> Declaration:
    """A declaration from `LOCATION_COLUMNS`."""
    file_type, miner, number, storage, primary, size, mtime_ns, members, digest = row
    return Declaration(
        SectorFile(_TYPES[file_type], SectorID(miner, number)),
        StorageID(sys.intern(storage)),
        bool(primary),
        None if size is None else Facts(size, mtime_ns, _to_members(members), digest or b""),
    )


def to_pack(rows: Sequence[Row]) -> Pack:
    """Many declarations in key order, from `LOCATION_COLUMNS`."""
    return pack(cast(Sequence[PackedRow[bytes]], rows), _members.decode)


def _to_members(blob: bytes | None) -> tuple[MemberFacts, ...] | None:
    if blob is None:
        return None
    return tuple(MemberFacts(*entry) for entry in _members.decode(blob))


def to_file_type(value: int) -> FileType:
    """The type of a ``sector_filetype`` column."""
    return _TYPES[value]


def lease_row(lease: Lease, granted_ns: int) -> tuple[Any, ...]:
    """The columns of `LEASE_COLUMNS`."""
    lock = lease.lock
    return (
        lease.token,
        lock.sector.miner,
        lock.sector.number,
        lock.read,
        lock.write,
        lease.owner,
        lease.reason,
        lease.seconds,
        granted_ns,
    )


def to_lease(row: Row) -> tuple[Lease, int]:
    """A lease and when it was granted, from `LEASE_COLUMNS`."""
    token, miner, number, read, write, owner, reason, seconds, granted_ns = row
    lock = Lock(sector=SectorID(miner, number), read=read, write=write)
    lease = Lease(token=token, lock=lock, owner=owner, reason=reason, seconds=seconds)
    return lease, granted_ns


class Cursor(Protocol):
    """The answer of a statement."""

    def fetchone(self) -> Any:
        """The next row or None."""

    def fetchall(self) -> list[Any]:
        """Every row."""


class Connection(Protocol):
    """What statements are run on; its driver is imported by `index.sqlite` alone."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Cursor:
        """Run one statement."""
