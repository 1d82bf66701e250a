"""What each read of the embedded Index asks, inside a read transaction that the caller opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sectorfs.index.packed import Pack
from sectorfs.index.protocol import Changes, Declaration, Lease, LocationKey, StorageStatus
from sectorfs.index.rows import (
    LEASE_COLUMNS,
    LOCATION_COLUMNS,
    LOCATION_TABLES,
    STORAGE_COLUMNS,
    Connection,
    split,
    to_declaration,
    to_file_type,
    to_lease,
    to_pack,
    to_status,
)
from sectorfs.index.transactions import Kind
from sectorfs.types import FileType, SectorFile, SectorID, StorageID

_FILE = "(l.sector_filetype, l.miner_id, l.sector_num)"
_KEY = "(l.sector_filetype, l.miner_id, l.sector_num, l.storage_id)"
_KEY_ORDER = "l.sector_filetype, l.miner_id, l.sector_num, l.storage_id"


def lives(db: Connection) -> list[tuple[str, int]]:
    """Names of the lives of this database, and the change each began after; the present one last.

    A restored backup goes on from an earlier point under another name, so that nobody takes its
    numbers for those of the life that was lost.
    """
    known = dict(db.execute("SELECT key, value FROM meta").fetchall())
    found = [(known["epoch"], 0)]
    for life in split(known.get("lives", "")):
        name, _, start = life.partition(":")
        found.append((name, int(start)))
    return found


def epoch(db: Connection) -> str:
    """The random name of the present life of this database."""
    return lives(db)[-1][0]


def newest(db: Connection) -> int:
    """The number of the last change; 0 before the first."""
    number: int = db.execute("SELECT coalesce(max(seq), 0) FROM change").fetchone()[0]
    return number


def oldest(db: Connection) -> int:
    """The smallest number from which changes can still be followed."""
    number: int = db.execute("SELECT coalesce(min(seq) - 1, 0) FROM change").fetchone()[0]
    return number


def storages(db: Connection, now_ns: int) -> list[StorageStatus]:
    """Every storage by ascending id."""
    rows = db.execute(f"SELECT {STORAGE_COLUMNS} FROM storage_path ORDER BY storage_id").fetchall()
    return [to_status(row, now_ns) for row in rows]


def storage(db: Connection, wanted: StorageID, now_ns: int) -> StorageStatus | None:
    """One storage."""
    row = db.execute(
        f"SELECT {STORAGE_COLUMNS} FROM storage_path WHERE storage_id = ?", (wanted,)
    ).fetchone()
    return None if row is None else to_status(row, now_ns)


def sector(db: Connection, wanted: SectorID, types: Sequence[FileType]) -> list[Declaration]:
    """The declarations of some types of a sector, in key order."""
    marks = ", ".join("?" * len(types))
    rows = db.execute(
        f"SELECT {LOCATION_COLUMNS} FROM {LOCATION_TABLES} WHERE l.miner_id = ?"
        f" AND l.sector_num = ? AND l.sector_filetype IN ({marks}) ORDER BY {_KEY_ORDER}",
        (wanted.miner, wanted.number, *(int(file_type) for file_type in types)),
    ).fetchall()
    return [to_declaration(row) for row in rows]


def declarations(
    db: Connection, wanted: StorageID, after: SectorFile | None, limit: int
) -> list[Declaration]:
    """A page of one storage's declarations."""
    past = "" if after is None else "AND (l.sector_filetype, l.miner_id, l.sector_num) > (?, ?, ?)"
    rows = db.execute(
        f"SELECT {LOCATION_COLUMNS} FROM {LOCATION_TABLES} WHERE l.storage_id = ? {past}"
        " ORDER BY l.sector_filetype, l.miner_id, l.sector_num LIMIT ?",
        (wanted, *_file_values(after), limit),
    ).fetchall()
    return [to_declaration(row) for row in rows]


def page(db: Connection, after: LocationKey | None, limit: int) -> list[Declaration]:
    """A page of all declarations in key order."""
    past = "" if after is None else f"WHERE {_KEY} > (?, ?, ?, ?)"
    values = () if after is None else (*_file_values(after.file), after.storage)
    rows = db.execute(
        f"SELECT {LOCATION_COLUMNS} FROM {LOCATION_TABLES} {past} ORDER BY {_KEY_ORDER} LIMIT ?",
        (*values, limit),
    ).fetchall()
    return [to_declaration(row) for row in rows]


def packed(db: Connection, after: SectorFile | None, limit: int) -> tuple[Pack, SectorFile | None]:
    """About `limit` declarations in key order, and the last sector file unless they are the end."""
    past = "" if after is None else f"WHERE {_FILE} > (?, ?, ?)"
    while True:
        rows = db.execute(
            f"SELECT {LOCATION_COLUMNS} FROM {LOCATION_TABLES} {past}"
            f" ORDER BY {_KEY_ORDER} LIMIT ?",
            (*_file_values(after), limit),
        ).fetchall()
        if len(rows) < limit:
            return to_pack(rows), None
        # The last sector file may have more declarations than fitted: it is left to the next page.
        cut = rows[-1][:3]
        whole = [row for row in rows if row[:3] != cut]
        if whole:
            return to_pack(whole), _to_file(whole[-1])
        limit *= 2


def changes(db: Connection, name: str, seq: int, limit: int, now_ns: int) -> Changes:
    """The present state of what changed in the `limit` changes after `seq`."""
    last = newest(db)
    begun = lives(db)
    ends = [start for _, start in begun[1:]] + [last]
    end = dict(zip((life for life, _ in begun), ends, strict=True)).get(name, -1)
    name = begun[-1][0]
    if not oldest(db) <= seq <= end:
        return Changes(epoch=name, seq=last, reload=True)
    last = min(last, seq + limit)
    declared, dropped = _changed_locations(db, seq, last)
    known, detached = _changed_storages(db, seq, last, now_ns)
    return Changes(
        epoch=name,
        seq=last,
        storages=tuple(known),
        detached=tuple(detached),
        declared=tuple(declared),
        dropped=tuple(dropped),
    )


def leases(db: Connection) -> list[tuple[Lease, int]]:
    """Every lease on record, and when it was granted."""
    rows = db.execute(f"SELECT {LEASE_COLUMNS} FROM lease ORDER BY granted_ns, token").fetchall()
    return [to_lease(row) for row in rows]


def _changed_locations(
    db: Connection, seq: int, last: int
) -> tuple[list[Declaration], list[LocationKey]]:
    rows = db.execute(
        f"SELECT DISTINCT c.sector_filetype, c.miner_id, c.sector_num, c.storage_id,"
        f" {LOCATION_COLUMNS} FROM change AS c"
        " LEFT JOIN sector_location AS l ON l.miner_id = c.miner_id"
        " AND l.sector_num = c.sector_num AND l.sector_filetype = c.sector_filetype"
        " AND l.storage_id = c.storage_id"
        " LEFT JOIN sector_facts AS f ON f.miner_id = l.miner_id"
        " AND f.sector_num = l.sector_num AND f.sector_filetype = l.sector_filetype"
        " AND f.storage_id = l.storage_id"
        " WHERE c.seq > ? AND c.seq <= ? AND c.kind = ? ORDER BY 1, 2, 3, 4",
        (seq, last, int(Kind.LOCATION)),
    ).fetchall()
    declared = [to_declaration(row[4:]) for row in rows if row[4] is not None]
    dropped = [_to_key(row) for row in rows if row[4] is None]
    return declared, dropped


def _changed_storages(
    db: Connection, seq: int, last: int, now_ns: int
) -> tuple[list[StorageStatus], list[StorageID]]:
    rows = db.execute(
        "SELECT storage_id, max(kind) FROM change WHERE seq > ? AND seq <= ? AND kind IN (?, ?)"
        " GROUP BY storage_id ORDER BY storage_id",
        (seq, last, int(Kind.STORAGE), int(Kind.DETACHED)),
    ).fetchall()
    known = [storage(db, row[0], now_ns) for row in rows]
    gone = [
        StorageID(row[0])
        for row, status in zip(rows, known, strict=True)
        # One that went and came again meanwhile is both: its old declarations are gone.
        if status is None or row[1] == Kind.DETACHED
    ]
    return [status for status in known if status is not None], gone


def _file_values(file: SectorFile | None) -> tuple[int, ...]:
    if file is None:
        return ()
    return int(file.file_type), file.sector.miner, file.sector.number


def _to_key(row: Sequence[Any]) -> LocationKey:
    return LocationKey(_to_file(row), StorageID(row[3]))


def _to_file(row: Sequence[Any]) -> SectorFile:
    file_type, miner, number = row[:3]
    return SectorFile(to_file_type(file_type), SectorID(miner, number))
