"""The schema of the embedded Index as numbered steps; ``PRAGMA user_version`` counts them.

A step is never edited once released: a change is a new step. Each runs in one transaction together
with its number, so that a power cut leaves the old version or the new one, and starting again
repeats nothing.

Notes on the tables:

* ``storage_path`` and ``sector_location`` have the names and columns that Curio clusters use, so
  that rows can be carried over one to one. ``max`` is ours: a report has it and Curio drops it.
* Lists are comma-separated text. ``last_heartbeat`` is Unix nanoseconds.
* ``sector_location`` has no foreign key to its storage: detaching removes both in one transaction.
* ``sector_facts`` is apart because Curio's rows know no facts; a declaration without them has none.
  ``digest`` is null while nobody computed it for this very size, time and members.
* ``lease`` has a row for each lock that was granted, apart from the lock columns that Curio keeps
  in ``sector_location``: what nobody declared can be locked too. No row says when a lease ends:
  that is measured on a clock that does not outlive the process. So after a restart each lasts its
  full time once more, and renewing one writes nothing. ``granted_ns`` is Unix nanoseconds, only
  ever shown.
* ``change`` names what changed, never how: readers get the present state. ``AUTOINCREMENT``
  because a number that was pruned or rolled back must not come again.
"""

from __future__ import annotations

APPLICATION_ID = 0x53464958  # "SFIX": tells our file from any other program's database

_STORAGE_PATH = """
CREATE TABLE storage_path (
    storage_id TEXT NOT NULL PRIMARY KEY,
    urls TEXT NOT NULL,
    weight INTEGER NOT NULL,
    max_storage INTEGER NOT NULL,
    can_seal INTEGER NOT NULL,
    can_store INTEGER NOT NULL,
    "groups" TEXT NOT NULL,
    allow_to TEXT NOT NULL,
    allow_types TEXT NOT NULL,
    deny_types TEXT NOT NULL,
    capacity INTEGER NOT NULL,
    available INTEGER NOT NULL,
    fs_available INTEGER NOT NULL,
    reserved INTEGER NOT NULL,
    used INTEGER NOT NULL,
    "max" INTEGER NOT NULL,
    last_heartbeat INTEGER NOT NULL,
    heartbeat_err TEXT,
    allow_miners TEXT NOT NULL DEFAULT '',
    deny_miners TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID
"""

_SECTOR_LOCATION = """
CREATE TABLE sector_location (
    miner_id INTEGER NOT NULL,
    sector_num INTEGER NOT NULL,
    sector_filetype INTEGER NOT NULL,
    storage_id TEXT NOT NULL,
    is_primary INTEGER NOT NULL,
    read_ts INTEGER,
    read_refs INTEGER NOT NULL DEFAULT 0,
    write_ts INTEGER,
    write_lock_owner TEXT,
    PRIMARY KEY (miner_id, sector_num, sector_filetype, storage_id)
) WITHOUT ROWID
"""

_SECTOR_FACTS = """
CREATE TABLE sector_facts (
    miner_id INTEGER NOT NULL,
    sector_num INTEGER NOT NULL,
    sector_filetype INTEGER NOT NULL,
    storage_id TEXT NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    members BLOB,
    PRIMARY KEY (miner_id, sector_num, sector_filetype, storage_id),
    FOREIGN KEY (miner_id, sector_num, sector_filetype, storage_id)
        REFERENCES sector_location ON DELETE CASCADE
)
"""

_CHANGE = """
CREATE TABLE change (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    kind INTEGER NOT NULL,
    storage_id TEXT NOT NULL,
    sector_filetype INTEGER,
    miner_id INTEGER,
    sector_num INTEGER
)
"""

_LEASE = """
CREATE TABLE lease (
    token TEXT NOT NULL PRIMARY KEY,
    miner_id INTEGER NOT NULL,
    sector_num INTEGER NOT NULL,
    read_mask INTEGER NOT NULL,
    write_mask INTEGER NOT NULL,
    owner TEXT NOT NULL,
    reason TEXT NOT NULL,
    seconds REAL NOT NULL,
    granted_ns INTEGER NOT NULL
) WITHOUT ROWID
"""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        _STORAGE_PATH,
        _SECTOR_LOCATION,
        "CREATE INDEX idx_sector_location_storage_id ON sector_location"
        " (storage_id, sector_filetype, miner_id, sector_num)",
        "CREATE INDEX idx_sector_location_order ON sector_location"
        " (sector_filetype, miner_id, sector_num, storage_id)",
        _SECTOR_FACTS,
        _CHANGE,
        "CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "INSERT INTO meta VALUES ('epoch', lower(hex(randomblob(16))))",
    ),
    (_LEASE,),
    (
        # With this column a page of everything needs no look at the table, which has another order.
        "DROP INDEX idx_sector_location_order",
        "CREATE INDEX idx_sector_location_order ON sector_location"
        " (sector_filetype, miner_id, sector_num, storage_id, is_primary)",
    ),
    ("ALTER TABLE sector_facts ADD COLUMN digest BLOB",),
)
"""Statements of each step; the version of a database is how many steps it has had."""

VERSION = len(MIGRATIONS)
