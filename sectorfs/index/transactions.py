"""What each write to the embedded Index does, inside a transaction that the caller opened.

Every function leaves a row in ``change`` for each thing that became different, and none where all
was so already: a node that declares its million files at start must not wake the whole cluster.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from sectorfs.errors import NotFound
from sectorfs.index.checks import missing
from sectorfs.index.protocol import (
    Declaration,
    FsStat,
    HealthReport,
    Lease,
    LocationKey,
    StorageInfo,
)
from sectorfs.index.rows import (
    LEASE_MARKS,
    STORAGE_COLUMNS,
    STORAGE_INFO_COUNT,
    STORAGE_MARKS,
    Connection,
    Row,
    facts_row,
    info_row,
    lease_row,
    split,
    stat_row,
)
from sectorfs.types import StorageID

KEEP_LIVES = 100
"""Epochs whose changes can be followed into the present one."""


class Kind(enum.IntEnum):
    """What a row of ``change`` is about."""

    STORAGE = 1
    """A storage was attached, or its description or error changed."""
    DETACHED = 2
    """A storage went, and with it its declarations: they get no rows of their own."""
    LOCATION = 3
    """A declaration came, changed or went."""


def unknown_storage(storage: str) -> NotFound:
    """The error for a storage that was never attached, or was detached."""
    return NotFound("unknown storage", storage, "attach it first")


def attach(db: Connection, info: StorageInfo, stat: FsStat, now_ns: int) -> None:
    """Insert a storage, or merge its URLs and replace the rest; counts as a heartbeat."""
    row = db.execute(
        f"SELECT {STORAGE_COLUMNS} FROM storage_path WHERE storage_id = ?", (info.storage,)
    ).fetchone()
    known = split(row[1]) if row is not None else ()
    values = list(info_row(info))
    values[1] = ",".join(dict.fromkeys((*known, *info.urls)))
    db.execute(
        f"INSERT OR REPLACE INTO storage_path ({STORAGE_COLUMNS}) VALUES ({STORAGE_MARKS})",
        (*values, *stat_row(stat), None, now_ns),
    )
    same = row is not None and tuple(row[:STORAGE_INFO_COUNT]) == tuple(values)
    if not same or row[-2] is not None:
        _storage_changed(db, Kind.STORAGE, info.storage)


def detach(db: Connection, storage: StorageID, url: str) -> None:
    """Remove a URL; with the last one the storage, its declarations and their facts."""
    row = db.execute("SELECT urls FROM storage_path WHERE storage_id = ?", (storage,)).fetchone()
    if row is None:
        raise unknown_storage(storage)
    urls = split(row[0])
    if urls and url not in urls:
        raise NotFound(f"not reached under {url}", storage, f"its URLs: {', '.join(urls)}")
    rest = [known for known in urls if known != url]
    if rest:
        db.execute(
            "UPDATE storage_path SET urls = ? WHERE storage_id = ?", (",".join(rest), storage)
        )
        _storage_changed(db, Kind.STORAGE, storage)
        return
    db.execute("DELETE FROM storage_path WHERE storage_id = ?", (storage,))
    db.execute("DELETE FROM sector_location WHERE storage_id = ?", (storage,))
    _storage_changed(db, Kind.DETACHED, storage)


def report_health(db: Connection, storage: StorageID, report: HealthReport, now_ns: int) -> None:
    """Store a heartbeat; only another error text is a change."""
    row = db.execute(
        "SELECT heartbeat_err FROM storage_path WHERE storage_id = ?", (storage,)
    ).fetchone()
    if row is None:
        raise unknown_storage(storage)
    error = report.error or None
    db.execute(
        "UPDATE storage_path SET capacity = ?, available = ?, fs_available = ?, reserved = ?,"
        " max = ?, used = ?, heartbeat_err = ?, last_heartbeat = ? WHERE storage_id = ?",
        (*stat_row(report.stat), error, now_ns, storage),
    )
    if row[0] != error:
        _storage_changed(db, Kind.STORAGE, storage)


def declare(db: Connection, declarations: Sequence[Declaration]) -> None:
    """Upsert declarations: primary is only upgraded, facts that are sent replace those known.

    A digest that is not sent with them is kept while the rest is as it was.
    """
    wanted = {declaration.storage for declaration in declarations}
    unknown = missing(wanted, [one for one in wanted if _known(db, one)])
    if unknown:
        raise unknown_storage(unknown[0])
    for declaration in declarations:
        _declare_one(db, declaration)


def tell(db: Connection, found: Sequence[Declaration]) -> None:
    """Set the facts of declarations there are, and nothing else of them.

    A digest is of the content it is told with: when another is declared it comes too late.
    """
    for declaration in found:
        row, facts = _known_row(db, _where(declaration.key)), declaration.facts
        if row is None or facts is None:
            continue
        if not facts.digest or row[1] is None or tuple(row[1:4]) == facts_row(facts)[:3]:
            _declare_one(db, msgspec.structs.replace(declaration, primary=False))


def drop(db: Connection, keys: Sequence[LocationKey]) -> None:
    """Delete declarations; those that do not exist change nothing."""
    for key in keys:
        where = _where(key)
        found = db.execute(
            "DELETE FROM sector_location WHERE miner_id = ? AND sector_num = ?"
            " AND sector_filetype = ? AND storage_id = ? RETURNING 1",
            where,
        ).fetchall()
        if found:
            _location_changed(db, where)


def record_leases(db: Connection, granted: Lease | None, now_ns: int, ended: Iterable[str]) -> None:
    """Forget leases that ended, then note one that was granted: nobody follows them as changes."""
    for token in ended:
        db.execute("DELETE FROM lease WHERE token = ?", (token,))
    if granted is not None:
        row = lease_row(granted, now_ns)
        db.execute(f"INSERT OR REPLACE INTO lease VALUES ({LEASE_MARKS})", row)


def begin_life(db: Connection, after: int) -> None:
    """Give what changes after `after` another epoch; see `queries.lives`."""
    row = db.execute("SELECT value FROM meta WHERE key = 'lives'").fetchone()
    known = [*split(row[0] if row is not None else ""), f"{secrets.token_hex(16)}:{after}"]
    db.execute("INSERT OR REPLACE INTO meta VALUES ('lives', ?)", (",".join(known[-KEEP_LIVES:]),))


def prune(db: Connection, *, keep: int) -> None:
    """Forget all but the newest `keep` changes."""
    db.execute("DELETE FROM change WHERE seq <= (SELECT max(seq) FROM change) - ?", (keep,))


def _known(db: Connection, storage: StorageID) -> bool:
    row = db.execute("SELECT 1 FROM storage_path WHERE storage_id = ?", (storage,)).fetchone()
    return row is not None


def _declare_one(db: Connection, declaration: Declaration) -> None:
    where = _where(declaration.key)
    row = _known_row(db, where)
    changed = False
    if row is None:
        db.execute(
            "INSERT INTO sector_location"
            " (miner_id, sector_num, sector_filetype, storage_id, is_primary)"
            " VALUES (?, ?, ?, ?, ?)",
            (*where, int(declaration.primary)),
        )
        changed = True
    elif declaration.primary and not row[0]:
        db.execute(
            "UPDATE sector_location SET is_primary = 1 WHERE miner_id = ? AND sector_num = ?"
            " AND sector_filetype = ? AND storage_id = ?",
            where,
        )
        changed = True
    if declaration.facts is not None:
        known = row[1:] if row is not None else (None, None, None, None)
        changed |= _set_facts(db, where, known, facts_row(declaration.facts))
    if changed:
        _location_changed(db, where)


def _known_row(db: Connection, where: tuple[Any, ...]) -> Row | None:
    """Whether a declaration is primary, and its facts: size, mtime_ns, members, digest."""
    row: Row | None = db.execute(
        "SELECT l.is_primary, f.size, f.mtime_ns, f.members, f.digest"
        " FROM sector_location AS l LEFT JOIN sector_facts AS f"
        " USING (miner_id, sector_num, sector_filetype, storage_id)"
        " WHERE l.miner_id = ? AND l.sector_num = ? AND l.sector_filetype = ?"
        " AND l.storage_id = ?",
        where,
    ).fetchone()
    return row


def _set_facts(db: Connection, where: tuple[Any, ...], known: Row, told: Row) -> bool:
    """Let facts be what is told of a declaration; False when that is known."""
    *content, digest = told
    if [*known[:3]] != content:
        db.execute(
            "INSERT OR REPLACE INTO sector_facts"
            " (miner_id, sector_num, sector_filetype, storage_id, size, mtime_ns, members, digest)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*where, *told),
        )
        return True
    if digest is None or digest == known[3]:
        return False
    db.execute(
        "UPDATE sector_facts SET digest = ? WHERE miner_id = ? AND sector_num = ?"
        " AND sector_filetype = ? AND storage_id = ?",
        (digest, *where),
    )
    return True


def _where(key: LocationKey) -> tuple[Any, ...]:
    sector = key.file.sector
    return sector.miner, sector.number, int(key.file.file_type), key.storage


def _storage_changed(db: Connection, kind: Kind, storage: str) -> None:
    db.execute("INSERT INTO change (kind, storage_id) VALUES (?, ?)", (int(kind), storage))


def _location_changed(db: Connection, where: tuple[Any, ...]) -> None:
    db.execute(
        "INSERT INTO change (kind, miner_id, sector_num, sector_filetype, storage_id)"
        " VALUES (?, ?, ?, ?, ?)",
        (int(Kind.LOCATION), *where),
    )
