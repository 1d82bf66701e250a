"""The embedded Index: one SQLite file, read on the loop, written by one thread.

Mechanism: WAL with ``synchronous=FULL``, so a commit that returned survives a power cut. A reader
connection answers on the loop: pages are bounded and a WAL reader never waits for the writer. Only
the pages of whole snapshots are read, and made into columns, in a thread of their own. All
commits go through one thread at a time. A caller cancelled while it waits for its turn has written
nothing; once its transaction runs it is run to its end, and then it happened as a whole.

Invariants: no ``await`` inside a transaction; the event for long polls is set after the commit, on
the loop, so that whoever it wakes sees the change.

Locks are granted by `index.lessor`, in memory; the file says which leases a restart must honour.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from sectorfs.errors import (
    BadInput,
    DiskError,
    DiskFull,
    PermissionRefused,
    Refused,
    SectorFSError,
    Unreachable,
)
from sectorfs.index import checks, placement, queries, transactions
from sectorfs.index.lessor import Lessor
from sectorfs.index.migrations import APPLICATION_ID, MIGRATIONS, VERSION
from sectorfs.index.protocol import (
    Changes,
    Declaration,
    FoundStorage,
    FsStat,
    HealthReport,
    Lease,
    LeaseStatus,
    LocationKey,
    PackedPage,
    PathType,
    SnapshotPage,
    StorageInfo,
    StorageStatus,
)
from sectorfs.types import FileType, SectorFile, SectorID, StorageID

log = logging.getLogger(__name__)

KEEP_CHANGES = 200_000
"""Changes that can be followed; a catalog further behind takes a new snapshot."""
_BUSY_SECONDS = 5.0


class _Connections(NamedTuple):
    writer: sqlite3.Connection
    """Used by one thread at a time, behind its limiter."""
    reader: sqlite3.Connection
    """Used on the loop alone."""
    bulk: sqlite3.Connection
    """For pages of snapshots: one thread at a time, behind a limiter of its own."""


class SqliteIndex:
    """A `SectorIndex` in a file of its own; made by `open`."""

    def __init__(
        self,
        path: Path,
        *,
        cutoff: float,
        clock_ns: Callable[[], int],
        keep_changes: int,
    ) -> None:
        self.path = path
        self._cutoff = cutoff
        self._clock_ns = clock_ns
        self._keep_changes = keep_changes
        self._turn = trio.CapacityLimiter(1)
        self._bulk_turn = trio.CapacityLimiter(1)
        self._changed = trio.Event()
        self._began = False  # the first change of a process begins a life of the database
        self._lessor = Lessor(self._record_leases, clock_ns)
        self._odd: dict[StorageID, tuple[str, ...]] = {}
        self._connections: _Connections | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: Path,
        *,
        cutoff: float,
        clock_ns: Callable[[], int] = time.time_ns,
        keep_changes: int = KEEP_CHANGES,
    ) -> AsyncIterator[SqliteIndex]:
        """Open the Index at `path`, made or migrated when needed.

        `cutoff` is the age in seconds from which a storage gets nothing new. `BadInput` when the
        file is no SQLite database, `Refused` when it is another program's or a newer version's.
        """
        index = cls(path, cutoff=cutoff, clock_ns=clock_ns, keep_changes=keep_changes)
        await trio.to_thread.run_sync(index._connect, limiter=index._turn)
        try:
            with index._reading() as db:
                index._lessor.restore(queries.leases(db))
            yield index
        finally:
            index._lessor.close()
            with trio.CancelScope(shield=True):
                # Behind any thread that still runs for a cancelled caller.
                async with index._bulk_turn:
                    await trio.to_thread.run_sync(index._disconnect, limiter=index._turn)
            index._wake()

    async def attach(self, info: StorageInfo, stat: FsStat) -> None:
        """Make a storage known, or merge its URLs and update its other fields."""
        checks.check_info(info)
        checks.check_stat(stat, info.storage)
        now = self._clock_ns()
        await self._write(lambda db: transactions.attach(db, info, stat, now))
        self._tell_odd(info)

    def _tell_odd(self, info: StorageInfo) -> None:
        """Warn of filter entries that match nothing, once while they stay the same."""
        odd = placement.odd_filters(info)
        if self._odd.get(info.storage, ()) == odd:
            return
        self._odd.pop(info.storage, None)
        if odd:
            self._odd[info.storage] = odd  # bounded by the storages, a few entries each
            log.warning("storage %s: filters that match nothing: %s", info.storage, ", ".join(odd))

    async def detach(self, storage: StorageID, url: str) -> None:
        """Forget one URL of a storage; with its last URL, the storage and its declarations."""
        await self._write(lambda db: transactions.detach(db, storage, url))

    async def report_health(self, storage: StorageID, report: HealthReport) -> None:
        """Store a heartbeat."""
        checks.check_stat(report.stat, storage)
        cut = HealthReport(stat=report.stat, error=report.error[: checks.MAX_ERROR])
        now = self._clock_ns()
        await self._write(lambda db: transactions.report_health(db, storage, cut, now))

    async def declare(self, declarations: Sequence[Declaration]) -> None:
        """Declare a batch, all or nothing."""
        batch = tuple(declarations)
        for declaration in batch:
            checks.check_declaration(declaration)
        await self._write(lambda db: transactions.declare(db, batch))

    async def tell(self, found: Sequence[Declaration]) -> None:
        """Set the facts of declarations there are; others are passed over."""
        batch = tuple(found)
        for declaration in batch:
            checks.check_declaration(declaration)
        await self._write(lambda db: transactions.tell(db, batch))

    async def drop(self, keys: Sequence[LocationKey]) -> None:
        """Drop declarations; one that does not exist is fine."""
        batch = tuple(keys)
        for key in batch:
            checks.check_key(key)
        await self._write(lambda db: transactions.drop(db, batch))

    async def lock(self, lease: Lease, *, wait: float = 0) -> bool:
        """Grant a lock, waiting up to `wait` seconds for others."""
        return await self._lessor.lock(lease, wait=wait)

    async def renew(self, token: str) -> None:
        """Let a lease last anew; `LeaseLost` when it has ended."""
        await self._lessor.renew(token)

    async def release(self, token: str) -> None:
        """End a lease, or the wait for it; one that has ended, or never was, is fine."""
        await self._lessor.release(token)

    async def leases(self) -> list[LeaseStatus]:
        """Everything that is locked, then what waits, each by sector."""
        return await self._lessor.leases()

    async def _record_leases(
        self, granted: Lease | None, now_ns: int, ended: Sequence[str]
    ) -> None:
        await self._write(lambda db: transactions.record_leases(db, granted, now_ns, ended))

    async def info(self, storage: StorageID) -> StorageInfo:
        """What was attached."""
        await trio.lowlevel.checkpoint()
        with self._reading() as db:
            return self._known(db, storage).info

    async def storages(self) -> list[StorageStatus]:
        """Every storage by ascending id."""
        await trio.lowlevel.checkpoint()
        with self._reading() as db:
            return queries.storages(db, self._clock_ns())

    async def find(
        self, sector: SectorID, mask: int, *, sector_size: int = 0, allow_fetch: bool = False
    ) -> list[FoundStorage]:
        """Storages that hold any of the types in `mask`, then those that may fetch it."""
        await trio.lowlevel.checkpoint()
        types = checks.mask_types(mask)
        checks.check_sector(sector)
        checks.check_number(sector_size, "sector size", sector)
        with self._reading() as db:
            held = queries.sector(db, sector, types)
            statuses = queries.storages(db, self._clock_ns())
        rows = placement.found(sector, held, statuses)
        if allow_fetch:
            holders = {declaration.storage for declaration in held}
            others = [status for status in statuses if status.info.storage not in holders]
            rows += placement.fetchers(
                sector,
                types,
                others,
                cutoff=self._cutoff,
                sector_size=sector_size,
                groups=placement.fetch_groups(row.info for row in rows),
            )
        return rows

    async def best_alloc(
        self, mask: int, sector_size: int, *, path_type: PathType, miner: int
    ) -> list[StorageInfo]:
        """Storages with room for new files of all types in `mask`, best first."""
        await trio.lowlevel.checkpoint()
        types = checks.mask_types(mask)
        checks.check_number(miner, "miner", "best allocation")
        with self._reading() as db:
            statuses = queries.storages(db, self._clock_ns())
        return placement.best_alloc(
            statuses, types, sector_size, path_type=path_type, miner=miner, cutoff=self._cutoff
        )

    async def sector(self, sector: SectorID) -> list[Declaration]:
        """Every declaration of a sector in key order."""
        await trio.lowlevel.checkpoint()
        checks.check_sector(sector)
        with self._reading() as db:
            return queries.sector(db, sector, tuple(FileType))

    async def declarations(
        self, storage: StorageID, *, after: SectorFile | None = None, limit: int = 1000
    ) -> list[Declaration]:
        """Declarations of one storage by ascending sector file, from past `after` on."""
        await trio.lowlevel.checkpoint()
        if after is not None:
            checks.check_sector(after.sector)
        with self._reading() as db:
            self._known(db, storage)
            return queries.declarations(db, storage, after, checks.page_size(limit))

    async def snapshot(
        self, *, after: LocationKey | None = None, limit: int = 1000
    ) -> SnapshotPage:
        """A page of the whole Index."""
        await trio.lowlevel.checkpoint()
        if after is not None:
            checks.check_key(after)
        limit = checks.page_size(limit)
        with self._reading() as db:
            declarations = queries.page(db, after, limit)
            return SnapshotPage(
                epoch=queries.epoch(db),
                seq=queries.newest(db),
                storages=() if after is not None else tuple(queries.storages(db, self._clock_ns())),
                declarations=tuple(declarations),
                after=declarations[-1].key if len(declarations) == limit else None,
            )

    async def packed(self, *, after: SectorFile | None = None, limit: int = 1000) -> PackedPage:
        """A page of the whole Index in columns."""
        if after is not None:
            checks.check_sector(after.sector)
        limit = checks.page_size(limit)
        return await trio.to_thread.run_sync(self._packed, after, limit, limiter=self._bulk_turn)

    def _packed(self, after: SectorFile | None, limit: int) -> PackedPage:
        """Runs in a thread: a page that is not in memory waits for the disk."""
        with self._viewing(self._open_connections().bulk) as db:
            pack, last = queries.packed(db, after, limit)
            return PackedPage(
                epoch=queries.epoch(db),
                seq=queries.newest(db),
                storages=() if after is not None else tuple(queries.storages(db, self._clock_ns())),
                pack=pack,
                after=last,
            )

    async def changes(self, epoch: str, seq: int, *, wait: float = 0, limit: int = 1000) -> Changes:
        """Changes after `seq`; waits up to `wait` seconds while there are none."""
        await trio.lowlevel.checkpoint()
        limit = checks.page_size(limit)
        checks.check_number(seq, "seq", "changes")
        with trio.move_on_after(checks.poll_seconds(wait)):
            while True:
                # Taken before the look: a commit after the look sets this very event.
                changed = self._changed
                answer = self._changes_now(epoch, seq, limit)
                if answer.reload or answer.seq > seq or answer.epoch != epoch:
                    return answer
                await changed.wait()
        return self._changes_now(epoch, seq, limit)

    def _changes_now(self, epoch: str, seq: int, limit: int) -> Changes:
        with self._reading() as db:
            return queries.changes(db, epoch, seq, limit, self._clock_ns())

    def _known(self, db: sqlite3.Connection, storage: StorageID) -> StorageStatus:
        status = queries.storage(db, storage, self._clock_ns())
        if status is None:
            raise transactions.unknown_storage(storage)
        return status

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view for several statements."""
        with self._viewing(self._open_connections().reader) as db:
            yield db

    @contextmanager
    def _viewing(self, db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        with _translated(self.path):
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.execute("ROLLBACK")

    async def _write(self, change: Callable[[sqlite3.Connection], None]) -> None:
        changed = await trio.to_thread.run_sync(self._commit, change, limiter=self._turn)
        if changed:
            self._wake()

    def _commit(self, change: Callable[[sqlite3.Connection], None]) -> bool:
        """Runs in the writer thread; true when anything was recorded in ``change``."""
        db = self._open_connections().writer
        with _translated(self.path):
            db.execute("BEGIN IMMEDIATE")
            try:
                before = queries.newest(db)
                change(db)
                changed = queries.newest(db) > before
                if changed:
                    if not self._began and before:
                        transactions.begin_life(db, before)
                    transactions.prune(db, keep=self._keep_changes)
                db.execute("COMMIT")
                self._began = self._began or changed
            finally:
                # Also after a COMMIT that failed; one that the engine rolled back is over already.
                if db.in_transaction:
                    db.execute("ROLLBACK")
        return changed

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _open_connections(self) -> _Connections:
        if self._connections is None:
            raise Unreachable("the Index is closed", self.path)
        return self._connections

    def _connect(self) -> None:
        with _translated(self.path), ExitStack() as undo:
            writer = _connection(self.path, timeout=_BUSY_SECONDS)
            undo.callback(writer.close)
            _refuse_foreign(writer, self.path)
            writer.execute("PRAGMA journal_mode = WAL")
            _migrate(writer, self.path)
            # A WAL reader waits for nobody but a recovery, which only ever happens before this.
            reader, bulk = _connection(self.path, timeout=0), _connection(self.path, timeout=0)
            for db in (reader, bulk):
                undo.callback(db.close)
                db.execute("PRAGMA query_only = ON")
            undo.pop_all()
        self._connections = _Connections(writer, reader, bulk)

    def _disconnect(self) -> None:
        writer, reader, bulk = self._open_connections()
        self._connections = None
        reader.close()
        bulk.close()
        with _translated(self.path):
            writer.close()


def _connection(path: Path, *, timeout: float) -> sqlite3.Connection:
    # Shared between threads on purpose: the limiter gives the writer to one thread at a time, and
    # the reader is used on the loop alone.
    db = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    with ExitStack() as undo:
        undo.callback(db.close)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        undo.pop_all()
    return db


def _version(db: sqlite3.Connection) -> int:
    number: int = db.execute("PRAGMA user_version").fetchone()[0]
    return number


def _refuse_foreign(db: sqlite3.Connection, path: Path) -> None:
    """Refuse, before anything is written, what this program did not make or cannot read."""
    owner: int = db.execute("PRAGMA application_id").fetchone()[0]
    tables: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    version = _version(db)
    if owner != APPLICATION_ID and (owner or version or tables):
        raise Refused("a database of another program", path, "move it away, or use another --repo")
    if version > VERSION:
        raise Refused(
            f"written by a newer sectorfs (schema {version}, this one knows {VERSION})",
            path,
            "use that version, or a copy from before the upgrade",
        )


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the schema to `VERSION`, one transaction per step."""
    for number, statements in enumerate(MIGRATIONS, start=1):
        db.execute("BEGIN IMMEDIATE")
        try:
            if _version(db) < number:
                for statement in statements:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {number}")
                db.execute("COMMIT")
                log.info("%s: schema is now version %d", path, number)
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OverflowError) as exc:
        raise _translate(exc, path) from exc


def _translate(exc: Exception, path: Path) -> SectorFSError:
    """What an exception of the driver means to whoever called."""
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if isinstance(exc, OverflowError):
        return BadInput("an integer of more than 63 bits", path)
    if code == sqlite3.SQLITE_NOTADB:
        return BadInput("not an Index (no SQLite database)", path, "move it away")
    if code == sqlite3.SQLITE_CORRUPT:
        return DiskError("the Index is damaged", path, "restore it, or move it away and redeclare")
    if code == sqlite3.SQLITE_FULL:
        return DiskFull("the disk of the Index is full", path, "make room")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return PermissionRefused("the Index cannot be written", path, "check owner and mode")
    if code == sqlite3.SQLITE_CANTOPEN:
        return PermissionRefused("cannot be opened", path, "check its directory, owner and mode")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Refused("in use by another program", path, "end the program that has it open")
    return DiskError(f"the Index failed: {exc}", path, "check the disk")
