"""The embedded index as a file: power cuts, migrations, foreign files, threads, full disks."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sectorfs.errors import (
    BadInput,
    DiskError,
    DiskFull,
    NotFound,
    PermissionRefused,
    Refused,
    SectorFSError,
    Unreachable,
)
from sectorfs.index import migrations, sqlite
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import Facts, StorageID
from tests.index_fixtures import CUTOFF, STAT, Clock, held, info, key, open_index, sector

WRITER = """
import sys, trio
from pathlib import Path
from sectorfs.index.protocol import Declaration, FsStat, StorageInfo
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID

async def main():
    async with SqliteIndex.open(Path(sys.argv[1]), cutoff=50) as index:
        storage = StorageID("a")
        await index.attach(StorageInfo(storage=storage, urls=("http://a:1",)), FsStat())
        for number in range(10**9):
            file = SectorFile(FileType.SEALED, SectorID(1000, number))
            await index.declare([Declaration(file, storage, True, Facts(number, number))])
            print(number, flush=True)

trio.run(main)
"""


async def open_fails(path: Path) -> SectorFSError:
    with pytest.raises(SectorFSError) as caught:
        async with open_index(path):
            pass
    return caught.value


def raw(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


async def test_reopened_index_has_everything_and_its_epoch(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    async with open_index(path) as index:
        await index.attach(info("a"), STAT)
        await index.declare([held("a", 1, facts=Facts(1, 2))])
        before = await index.snapshot()
    async with open_index(path) as index:
        assert await index.snapshot() == before
        await index.drop([key("a", 1)])
        assert (await index.snapshot()).seq == before.seq + 1


async def test_two_indexes_have_different_epochs(tmp_path: Path) -> None:
    async with open_index(tmp_path / "1") as one, open_index(tmp_path / "2") as other:
        assert (await one.snapshot()).epoch != (await other.snapshot()).epoch


def kill_writer(path: Path) -> int:
    """Let a process declare, kill it, and give the last number it acknowledged."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        last = -1
        for line in writer.stdout:
            if line.endswith("\n"):
                last = int(line)
            if last == 50:
                writer.send_signal(signal.SIGKILL)
    return last


async def test_acknowledged_declarations_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    acknowledged = await trio.to_thread.run_sync(kill_writer, path)
    async with open_index(path) as index:
        found = (await index.snapshot(limit=5000)).declarations
    numbers = [one.file.sector.number for one in found]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > acknowledged >= 50
    assert all(one.facts == Facts(number, number) for number, one in enumerate(found))


async def test_settings_that_keep_acknowledged_writes(tmp_path: Path) -> None:
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=CUTOFF) as index:
        for db in index._open_connections():
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)
            assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)


async def test_tables_have_the_columns_of_the_cluster_schema(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    async with open_index(path):
        pass
    db = raw(path)
    columns = {
        table: [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        for table in ("storage_path", "sector_location")
    }
    keys = db.execute("PRAGMA foreign_key_list(sector_location)").fetchall()
    db.close()
    assert columns["sector_location"] == [
        "miner_id",
        "sector_num",
        "sector_filetype",
        "storage_id",
        "is_primary",
        "read_ts",
        "read_refs",
        "write_ts",
        "write_lock_owner",
    ]
    assert set(columns["storage_path"]) == {
        *("storage_id", "urls", "weight", "max_storage", "can_seal", "can_store", "groups"),
        *("allow_to", "allow_types", "deny_types", "capacity", "available", "fs_available"),
        *("reserved", "used", "max", "last_heartbeat", "heartbeat_err"),
        *("allow_miners", "deny_miners"),
    }
    assert keys == []


async def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    db = raw(path)
    sqlite._migrate(db, path)
    before = list(db.iterdump())
    sqlite._migrate(db, path)
    assert list(db.iterdump()) == before
    assert db.execute("PRAGMA user_version").fetchone() == (migrations.VERSION,)
    db.close()


async def test_migration_that_fails_leaves_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.db"
    async with open_index(path) as index:
        await index.attach(info("a"), STAT)
    steps = (*migrations.MIGRATIONS, ("CREATE TABLE extra (x)", "no statement"))
    monkeypatch.setattr(sqlite, "MIGRATIONS", steps)
    monkeypatch.setattr(sqlite, "VERSION", len(steps))
    assert isinstance(await open_fails(path), DiskError)
    monkeypatch.undo()
    async with open_index(path) as index:
        assert len(await index.storages()) == 1
    db = raw(path)
    assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'extra'").fetchone() == (0,)
    db.close()


async def test_index_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    async with open_index(path):
        pass
    db = raw(path)
    db.execute(f"PRAGMA user_version = {migrations.VERSION + 1}")
    db.close()
    error = await open_fails(path)
    assert isinstance(error, Refused)
    assert "newer sectorfs" in str(error)
    assert str(path) in str(error)


async def test_database_of_another_program_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    db = raw(path)
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    before = path.read_bytes()
    error = await open_fails(path)
    assert isinstance(error, Refused)
    assert "another program" in str(error)
    assert path.read_bytes() == before


async def test_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.write_text("<html>" * 1000)
    error = await open_fails(path)
    assert isinstance(error, BadInput)
    assert str(path) in str(error)
    assert "no SQLite database" in str(error)
    assert path.read_text() == "<html>" * 1000


async def test_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "index.db"
    error = await open_fails(path)
    assert isinstance(error, PermissionRefused)
    assert str(path) in str(error)


async def test_damaged_index_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    async with open_index(path) as index:
        await index.attach(info("a"), STAT)
        await index.declare([held("a", number) for number in range(2000)])
    size = path.stat().st_size
    with path.open("r+b") as data:
        data.seek(8192)
        data.write(b"\xff" * (size - 8192))
    with pytest.raises(DiskError, match="damaged"):
        async with open_index(path) as index:
            await index.declarations(StorageID("a"), limit=5000)


async def test_index_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_SECONDS", 0.05)
    path = tmp_path / "index.db"
    async with open_index(path) as index:
        other = raw(path)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Refused, match="in use"):
            await index.attach(info("a"), STAT)
        other.execute("ROLLBACK")
        other.close()
        await index.attach(info("a"), STAT)


async def test_reader_cannot_write(tmp_path: Path) -> None:
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=CUTOFF) as index:
        with pytest.raises(PermissionRefused), index._reading() as db:
            db.execute("DELETE FROM storage_path")


async def test_integer_that_no_column_holds_is_bad_input(tmp_path: Path) -> None:
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=CUTOFF) as index:
        with pytest.raises(BadInput, match="63 bits"), index._reading() as db:
            db.execute("SELECT ?", (2**63,))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.mount
async def test_full_disk_refuses_the_write_and_keeps_the_rest(small_disk: Path) -> None:
    path = small_disk / "index.db"
    stored = 0
    async with open_index(path) as index:
        await index.attach(info("a"), STAT)

        async def fill() -> None:
            nonlocal stored
            while True:
                await index.declare([held("a", stored * 100 + n) for n in range(100)])
                stored += 1

        with pytest.raises(DiskFull, match="full"):
            await fill()
        assert stored > 0
        assert len((await index.snapshot(limit=5000)).declarations) == stored * 100
    async with open_index(path) as index:
        assert len((await index.snapshot(limit=5000)).declarations) == stored * 100


async def test_pruned_changes_ask_to_reload(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db", keep_changes=10) as index:
        await index.attach(info("a"), STAT)
        epoch = (await index.snapshot()).epoch
        await index.declare([held("a", number) for number in range(10)])
        assert (await index.changes(epoch, 0)).reload
        assert not (await index.changes(epoch, 1)).reload
        await index.declare([held("a", 99)])
        assert (await index.changes(epoch, 1)).reload
        assert len((await index.changes(epoch, 2)).declared) == 10


async def test_pruned_numbers_do_not_come_again(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    async with open_index(path, keep_changes=1) as index:
        await index.attach(info("a"), STAT)
        await index.declare([held("a", 1), held("a", 2)])
        assert (await index.snapshot()).seq == 3
    async with open_index(path, keep_changes=1) as index:
        await index.declare([held("a", 3)])
        assert (await index.snapshot()).seq == 4


async def test_closed_index_says_so(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db") as index:
        pass
    with pytest.raises(Unreachable, match="closed"):
        await index.storages()
    with pytest.raises(Unreachable, match="closed"):
        await index.attach(info("a"), STAT)


async def test_closing_ends_a_wait_for_changes(tmp_path: Path) -> None:
    failures: list[SectorFSError] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            async with open_index(tmp_path / "index.db") as index:
                epoch = (await index.snapshot()).epoch

                async def wait() -> None:
                    try:
                        await index.changes(epoch, 0, wait=60)
                    except SectorFSError as exc:
                        failures.append(exc)

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
    assert [type(exc) for exc in failures] == [Unreachable]


class Gate:
    """Holds the writer thread inside a transaction until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        declare = sqlite.transactions.declare

        def slow(*args: object) -> None:
            self.entered.set()
            assert self.open.wait(20)
            declare(*args)

        monkeypatch.setattr(sqlite.transactions, "declare", slow)


async def test_cancelled_write_that_runs_happens_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        epoch, seq = (page := await index.snapshot()).epoch, page.seq
        gate = Gate(monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index.declare, [held("a", 1), held("a", 2)])
            await trio.to_thread.run_sync(gate.entered.wait, 20)
            assert await index.sector(sector(1)) == []  # readers neither wait nor see half of it
            nursery.cancel_scope.cancel()
            gate.open.set()
        assert len(await index.sector(sector(1)) + await index.sector(sector(2))) == 2
        assert len((await index.changes(epoch, seq)).declared) == 2


async def test_cancelled_write_that_waits_for_its_turn_never_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        gate = Gate(monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(index.declare, [held("a", 1)])
            await trio.to_thread.run_sync(gate.entered.wait, 20)
            with trio.move_on_after(0) as scope:
                await index.declare([held("a", 2)])
            assert scope.cancelled_caught
            gate.open.set()
        assert len(await index.sector(sector(1))) == 1
        assert await index.sector(sector(2)) == []


async def test_closing_waits_for_the_running_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.db"
    gate = Gate(monkeypatch)
    async with trio.open_nursery() as nursery:
        async with open_index(path) as index:
            await index.attach(info("a"), STAT)
            nursery.start_soon(index.declare, [held("a", 1)])
            await trio.to_thread.run_sync(gate.entered.wait, 20)
            nursery.cancel_scope.cancel()
            gate.open.set()
    async with open_index(path) as index:
        assert len(await index.sector(sector(1))) == 1


async def test_failed_transaction_is_rolled_back(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db", clock=Clock()) as index:
        await index.attach(info("a"), STAT)
        with pytest.raises(NotFound):
            await index.declare([held("a", 1), held("b", 1)])
        await index.declare([held("a", 2)])
        assert (await index.snapshot()).seq == 2


def test_open_files_are_closed(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_index(tmp_path / "index.db") as index:
            await index.attach(info("a"), STAT)
        (tmp_path / "bad.db").write_text("x" * 5000)
        await open_fails(tmp_path / "bad.db")

    trio.run(main)
    names = [os.path.basename(path) for path in _targets()]
    assert not [name for name in names if name.startswith(("index.db", "bad.db"))]


def _targets() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
