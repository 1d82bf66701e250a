"""Repairs in place: bad blocks alone, each proved; nobody hindered; a power cut does no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio

from sectorfs.index.protocol import Lease, Lock
from sectorfs.stores.manifest import BLOCK
from sectorfs.stores.mending import Note
from sectorfs.stores.scrub import Examined
from sectorfs.types import FileType, StorageID
from tests.cluster_fixtures import noise
from tests.hung_disk import hung_disk
from tests.local_fixtures import sector_file
from tests.scrub_fixtures import SIZE, ScrubRig, cache_files, flip, scrub_rig, two_scrub_rigs

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)
DATA = noise("sealed", SIZE)


class Copies:
    """The same sector on two paths of one node, hashed."""

    def __init__(self, node: ScrubRig) -> None:
        self.node = node
        self.bad = node.parts.path("bad")
        self.good = node.parts.path("good")
        self.file = self.bad / str(SEALED)

    @property
    def notes(self) -> list[Path]:
        """Notes of repairs under way."""
        return list((self.node.parts.root / "repo" / "scrub" / "repairs").glob("*"))


@pytest.fixture
async def copies(tmp_path: Path) -> AsyncIterator[Copies]:
    async with scrub_rig(tmp_path, "bad", "good") as node:
        await node.put("good", SEALED, DATA, hashed=True)
        await node.put("bad", SEALED, DATA, hashed=True)
        await node.put("good", CACHE, cache_files("cache"), hashed=True)
        await node.put("bad", CACHE, cache_files("cache"), hashed=True)
        yield Copies(node)


def told(found: Examined) -> tuple[str, bool, str]:
    (one,) = [one for one in found.findings if one.state != "ok"]
    return one.state, one.repaired, one.detail


async def test_bad_blocks_are_replaced_and_nothing_else_changes(copies: Copies) -> None:
    before = copies.file.stat()
    with copies.file.open("rb") as reader:
        for bit in (3, 8 * (2 * BLOCK + 70_000), 8 * SIZE - 1):
            flip(copies.file, bit)
        assert told(await copies.node.mend("bad", SEALED)) == ("damaged", True, "")
        assert reader.read() == DATA, "who has it open reads on"
    after = copies.file.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns, after.st_blocks) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
        before.st_blocks,
    )
    assert await copies.node.states("bad", SEALED) == {"": "ok"}
    assert copies.notes == []
    assert copies.node.repaired == [(SEALED, None)]
    assert not await copies.node.parts.index.leases()


async def test_files_of_directories_are_repaired(copies: Copies) -> None:
    files = cache_files("cache")
    flip(copies.bad / str(CACHE) / "p_aux", 3)
    flip(copies.bad / str(CACHE) / "t_aux", 3)
    found = await copies.node.mend("bad", CACHE)
    assert {one.member: one.repaired for one in found.findings if one.state != "ok"} == {
        "p_aux": True,
        "t_aux": True,
    }
    for name, data in files.items():
        assert (copies.bad / str(CACHE) / name).read_bytes() == data


@pytest.mark.parametrize("stays", [1, 5])
async def test_good_blocks_come_from_wherever_they_are_good(tmp_path: Path, stays: int) -> None:
    """Of two nodes with bad copies; what is bad in both stays, and is all that stays."""
    async with two_scrub_rigs(tmp_path) as (ours, theirs):
        await theirs.put("theirs", SEALED, DATA, hashed=True)
        await ours.put("mine", SEALED, DATA, hashed=True)
        await theirs.sync()
        mine = ours.parts.path("mine") / str(SEALED)
        other = theirs.parts.path("theirs") / str(SEALED)
        for block in (1, 5):
            flip(mine, 8 * block * BLOCK)
        flip(other, 8 * stays * BLOCK + 1)
        state, repaired, detail = told(await ours.mend("mine", SEALED))
        assert (state, repaired) == ("damaged", False)
        assert "no good copy elsewhere" in detail
        assert f"wrong bytes in block {stays}" in detail
        (found,) = (await ours.examine("mine", SEALED)).findings
        assert found.bad == (stays,), "the other block was repaired"
        flip(other, 8 * stays * BLOCK + 1)
        assert told(await ours.mend("mine", SEALED))[1]
        assert mine.read_bytes() == DATA


async def test_a_primary_copy_is_left_alone_unless_it_is_named(copies: Copies) -> None:
    flip(copies.file, 3)
    state, repaired, detail = told(await copies.node.mend("bad", SEALED, primary=False))
    assert (state, repaired) == ("damaged", False)
    assert "name the sector and --type" in detail
    assert copies.file.read_bytes() != DATA


async def test_a_copy_is_repaired_unasked_for_by_name(tmp_path: Path) -> None:
    async with scrub_rig(tmp_path, "good") as node:
        await node.parts.add("copies", can_store=False, can_seal=True)
        await node.put("good", SEALED, DATA, hashed=True)
        await node.put("copies", SEALED, DATA, primary=False)
        times = (node.parts.path("good") / str(SEALED)).stat().st_mtime_ns
        os.utime(node.parts.path("copies") / str(SEALED), ns=(times, times))
        await node.hash("copies", SEALED, primary=False)
        flip(node.parts.path("copies") / str(SEALED), 3)
        assert told(await node.mend("copies", SEALED, primary=False))[1]


async def test_a_file_that_is_being_moved_or_is_locked_is_left_alone(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectorfs.stores.mending.LOCK_WAIT", 0.0)
    flip(copies.file, 3)
    async with copies.node.parts.turns.of(SEALED, to=StorageID("elsewhere")):
        assert "is being moved" in told(await copies.node.mend("bad", SEALED))[2]
    lock = Lock(sector=SEALED.sector, read=int(FileType.SEALED))
    lease = Lease(token="t" * 32, lock=lock, owner="sealer", reason="sealing", seconds=60)
    assert await copies.node.parts.index.lock(lease)
    assert "is locked" in told(await copies.node.mend("bad", SEALED))[2]
    assert copies.file.read_bytes() != DATA
    await copies.node.parts.index.release(lease.token)
    assert told(await copies.node.mend("bad", SEALED))[1]


async def test_a_file_that_changed_since_the_look_is_left_alone(copies: Copies) -> None:
    flip(copies.file, 3)
    found = await copies.node.examine("bad", SEALED)
    os.utime(copies.file, ns=(1, 1))
    found = await copies.node.mender.mend(copies.node.path("bad"), SEALED, found, primary=True)
    assert "changed before it was repaired" in told(found)[2]
    assert copies.file.read_bytes() != DATA
    assert copies.file.stat().st_mtime_ns == 1


async def test_a_file_that_changes_while_good_blocks_come_is_left_alone(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(copies.file, 3)
    flip(copies.file, 8 * 3 * BLOCK)
    new = noise("new", SIZE)
    original = copies.node.others.block

    async def block(*args: object, **kwargs: object) -> bytes:
        data: bytes = await original(*args, **kwargs)  # type: ignore[arg-type]
        copies.file.write_bytes(new)  # in place, as unsealing does
        return data

    monkeypatch.setattr(copies.node.others, "block", block)
    assert "changed while it was repaired" in told(await copies.node.mend("bad", SEALED))[2]
    assert copies.file.read_bytes() == new
    assert copies.notes == []


async def test_a_disk_that_takes_no_writes_says_so(copies: Copies) -> None:
    flip(copies.file, 3)
    await trio.run_process(["chattr", "+i", str(copies.file)])
    try:
        state, repaired, detail = told(await copies.node.mend("bad", SEALED))
    finally:
        await trio.run_process(["chattr", "-i", str(copies.file)])
    assert (state, repaired) == ("damaged", False)
    assert "Operation not permitted" in detail


async def test_cancelled_it_leaves_no_lock_no_note_and_a_file_with_its_time(
    copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copies.file.stat().st_mtime_ns
    flip(copies.file, 3)
    flip(copies.file, 8 * 3 * BLOCK)
    original = copies.node.others.block
    calls = 0

    async def block(*args: object, **kwargs: object) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 2:
            scope.cancel()
            await trio.sleep_forever()
        data: bytes = await original(*args, **kwargs)  # type: ignore[arg-type]
        return data

    monkeypatch.setattr(copies.node.others, "block", block)
    with trio.CancelScope() as scope:
        await copies.node.mend("bad", SEALED)
    assert scope.cancelled_caught
    assert copies.notes == []
    assert not await copies.node.parts.index.leases()
    assert copies.file.stat().st_mtime_ns == before
    monkeypatch.undo()
    (found,) = (await copies.node.examine("bad", SEALED)).findings
    assert found.bad == (3,)


@pytest.mark.mount
async def test_blocks_that_stay_unreadable_are_not_called_repaired(tmp_path: Path) -> None:
    piece = sector_file(FileType.PIECE, 7, miner=0)
    data = noise("piece", 24 * BLOCK)
    with hung_disk(tmp_path) as disk:
        async with scrub_rig(tmp_path, "good") as node:
            await node.parts.add("hung")
            await node.sync()
            await node.put("good", piece, data, hashed=True)
            await node.put("hung", piece, data, hashed=True)
            before = (disk.source / str(piece)).stat().st_mtime_ns
            disk.fail("read", after=13 * BLOCK, only="hung-source/piece")
            state, repaired, detail = told(await node.mend("hung", piece))
            assert (state, repaired) == ("unreadable", False)
            assert "Input/output error" in detail
            disk.go()
            assert await node.states("hung", piece) == {"": "ok"}
            after = (disk.source / str(piece)).stat()
            assert after.st_mtime_ns == before
            assert (disk.source / str(piece)).read_bytes() == data


# --- what power takes ---


def note_of(path: Path, mtime_ns: int, **changes: int) -> bytes:
    """The note of a repair that was cut short just now."""
    found = path.stat()
    values = {"inode": found.st_ino, "size": found.st_size, "noted_ns": found.st_mtime_ns}
    return msgspec.json.encode(
        Note(path=os.path.realpath(path), mtime_ns=mtime_ns, **{**values, **changes})
    )


async def recovered(copies: Copies, note: bytes) -> int:
    """Start with such a note; the file's time then."""
    where = copies.node.parts.root / "repo" / "scrub" / "repairs"
    where.mkdir(parents=True)
    (where / "0123456789abcdef.json").write_bytes(note)
    await copies.node.mender.recover()
    assert not list(where.glob("*.json"))
    return copies.file.stat().st_mtime_ns


async def test_a_time_that_a_power_cut_left_is_put_back(copies: Copies) -> None:
    before = copies.file.stat().st_mtime_ns
    copies.file.write_bytes(DATA)
    assert await recovered(copies, note_of(copies.file, before)) == before
    assert await copies.node.states("bad", SEALED) == {"": "ok"}


@pytest.mark.parametrize("changes", [{"inode": 1}, {"size": 1}, {"noted_ns": 1}])
async def test_another_file_keeps_its_time(copies: Copies, changes: dict[str, int]) -> None:
    copies.file.write_bytes(DATA)
    now = copies.file.stat().st_mtime_ns
    assert await recovered(copies, note_of(copies.file, 5, **changes)) == now


@pytest.mark.mount
async def test_a_disk_that_hangs_holds_up_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectorfs.stores.mending.RECOVERY_SECONDS", 0.2)
    with hung_disk(tmp_path) as disk:
        async with scrub_rig(tmp_path) as node:
            (disk.source / "file").write_bytes(b"file")
            notes = tmp_path / "repo" / "scrub" / "repairs"
            notes.mkdir(parents=True)
            (notes / "1.json").write_bytes(note_of(disk.path / "file", 5))
            disk.hang("open")
            with trio.fail_after(10):
                await node.mender.recover()
            assert (notes / "1.json").exists(), "the next start tries again"
            disk.go()
            await node.mender.recover()
            assert (disk.source / "file").stat().st_mtime_ns == 5
            assert not (notes / "1.json").exists()


@pytest.mark.parametrize("note", [b"", b"{}", b"\xff", b'{"path": 1}'])
async def test_notes_that_make_no_sense_are_set_aside(copies: Copies, note: bytes) -> None:
    now = copies.file.stat().st_mtime_ns
    assert await recovered(copies, note) == now


async def test_a_file_that_is_gone_is_forgotten(copies: Copies) -> None:
    note = note_of(copies.file, 5)
    other = copies.file.with_name("s-t01000-8")
    copies.file.rename(other)
    other.rename(copies.file.parent.parent / "aside")
    copies.file.write_bytes(b"another")
    note_at = msgspec.json.decode(note, type=Note)
    gone = msgspec.structs.replace(note_at, path=str(other))
    now = copies.file.stat().st_mtime_ns
    assert await recovered(copies, msgspec.json.encode(gone)) == now


def test_killed_at_some_call_a_repair_does_no_harm(tmp_path: Path) -> None:
    crash(tmp_path, 1)


@pytest.mark.long
@pytest.mark.parametrize("first", range(9, 100, 8))
def test_killed_at_any_call_a_repair_does_no_harm(tmp_path: Path, first: int) -> None:
    crash(tmp_path, first)


def crash(root: Path, first: int) -> None:
    """By a process that kills itself; a copy is as it was, or better, and the same content."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.mend_crasher", str(root), str(first), "8"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert str(-signal.SIGKILL) in done.stdout.split(), "nobody was killed"
