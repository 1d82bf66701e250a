"""Open files: what a read returns, what an open refuses, and that every descriptor is closed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from prometheus_client import REGISTRY

from sectorfs.errors import BadInput, DiskError, NotFound, Stale, StorageUnavailable, Unreachable
from sectorfs.fuse import handles, kernel
from sectorfs.fuse.backing import Policy
from sectorfs.fuse.handles import MAX_READ, Handles
from sectorfs.fuse.inodes import InodeTable
from sectorfs.fuse.interrupts import Interrupts
from sectorfs.fuse.tree import Tree
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.protocol import OpenFile, State
from sectorfs.types import Facts, FileType, SectorFile
from tests.mount_fixtures import (
    HERE,
    SLOW,
    DictCatalog,
    DirectoryStore,
    eventually,
    facts_of,
    open_descriptors,
    open_gates,
    sector_file,
)

FILE = sector_file("sealed/7")
DATA = os.urandom(300_000)


class Fixture:
    """Handles over one file on a disk of the test."""

    def __init__(self, root: Path, *, deadline: float = 60) -> None:
        self.catalog = DictCatalog()
        self.store = DirectoryStore()
        self.store.attach(HERE, root, deadline=deadline)
        self.inodes = InodeTable()
        self.tree = Tree(self.catalog, self.inodes)
        self.stale: list[SectorFile] = []
        self.forgotten: list[tuple[SectorFile, str | None]] = []
        self.handles = Handles(
            self.store,
            self.tree,
            self.inodes,
            on_stale=self.on_stale,
            invalidate=lambda file, member: self.forgotten.append((file, member)),
            interruptible=Interrupts().watch,
            kernel=kernel,
            policy=Policy(),
        )
        self.path = root / str(FILE)
        self.path.parent.mkdir()
        self.path.write_bytes(DATA)
        self.catalog.declare(FILE, facts_of(self.path))

    async def on_stale(self, file: SectorFile, member: str | None, opened: OpenFile) -> None:
        self.stale.append(file)

    def number(self) -> int:
        key = self.tree.current(FILE)
        assert key is not None
        return self.inodes.look_up(key)

    async def open(self) -> int:
        return await self.handles.open(self.number())

    def all_closed(self) -> bool:
        return all(opened.descriptor.closed for opened in self.store.opened)


@pytest.fixture
def fixture(tmp_path: Path) -> Iterator[Fixture]:
    fixture = Fixture(tmp_path)
    with open_gates(fixture.store):
        yield fixture
    fixture.handles.close_all()


@pytest.fixture
def memory(shm_path: Path) -> Iterator[Fixture]:
    """On tmpfs, which knows no RWF_NOWAIT: every read takes a thread."""
    fixture = Fixture(shm_path)
    with open_gates(fixture.store):
        yield fixture
    fixture.handles.close_all()


@pytest.fixture
def shm_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.mark.parametrize("where", ["fixture", "memory"])
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 10),
        (0, 300_000),
        (0, 300_001),
        (0, MAX_READ),
        (299_999, 4096),
        (299_999, 1),
        (300_000, 1),
        (300_001, 4096),
        (1 << 40, 4096),
        (123_456, 65_536),
        (0, 0),
    ],
)
async def test_a_read_returns_exactly_what_the_file_has(
    where: str, offset: int, size: int, request: pytest.FixtureRequest
) -> None:
    fixture: Fixture = request.getfixturevalue(where)
    handle = await fixture.open()
    for _ in range(2):
        assert await fixture.handles.read(handle, offset, size) == DATA[offset : offset + size]


async def test_a_read_beyond_the_usual_size_is_whole_too(fixture: Fixture) -> None:
    data = DATA * 10
    fixture.path.write_bytes(data)
    fixture.catalog.declare(FILE, facts_of(fixture.path))
    handle = await fixture.open()
    assert await fixture.handles.read(handle, 1, MAX_READ + 2) == data[1 : MAX_READ + 3]


async def test_cached_pages_are_read_without_a_thread(fixture: Fixture) -> None:
    handle = await fixture.open()
    fixture.path.read_bytes()
    fixture.store.lanes[HERE].gate.clear()
    with trio.fail_after(2):
        assert await fixture.handles.read(handle, 5, 4096) == DATA[5:4101]


async def test_cold_pages_are_read_in_the_lane(fixture: Fixture) -> None:
    drop_pages(fixture.path)
    handle = await fixture.open()
    assert await fixture.handles.read(handle, 0, 300_000) == DATA


async def test_a_partly_cached_range_is_completed(fixture: Fixture) -> None:
    drop_pages(fixture.path)
    fd = os.open(fixture.path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 65_536, 0)
    os.close(fd)
    handle = await fixture.open()
    assert await fixture.handles.read(handle, 0, 300_000) == DATA


def drop_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


async def test_a_short_count_is_completed_in_the_lane(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    counts: list[int] = []

    def short(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        one = buffers[0][: 65_536 if flags else 100_000]
        counts.append(real(fd, [one], offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", short)
    handle = await fixture.open()
    assert await fixture.handles.read(handle, 0, 300_000) == DATA
    assert counts == [65_536, 100_000, 100_000, 34_464]


async def test_a_file_system_without_nowait_is_asked_once(
    memory: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    flags_seen: list[int] = []

    def counting(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", counting)
    handle = await memory.open()
    for _ in range(3):
        assert await memory.handles.read(handle, 0, 10) == DATA[:10]
    assert flags_seen == [os.RWF_NOWAIT, 0, 0, 0]


@pytest.mark.parametrize("where", ["fixture", "memory"])
async def test_a_file_cut_meanwhile_ends_where_it_ends_now(
    where: str, request: pytest.FixtureRequest
) -> None:
    fixture: Fixture = request.getfixturevalue(where)
    handle = await fixture.open()
    os.truncate(fixture.path, 1000)
    assert await fixture.handles.read(handle, 0, 4096) == DATA[:1000]
    assert await fixture.handles.read(handle, 2000, 4096) == b""


async def test_a_file_that_grew_meanwhile_keeps_its_size(fixture: Fixture) -> None:
    handle = await fixture.open()
    with fixture.path.open("ab") as stream:
        stream.write(b"more")
    assert await fixture.handles.read(handle, 299_990, 4096) == DATA[299_990:]


@pytest.mark.parametrize("on_the_loop", [True, False])
async def test_a_failing_disk_is_an_error_of_the_disk(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch, on_the_loop: bool
) -> None:
    handle = await fixture.open()

    def broken(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EAGAIN if flags and not on_the_loop else errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DiskError) as caught:
        await fixture.handles.read(handle, 0, 4096)
    assert caught.value.errno == errno.EIO


async def test_a_hanging_disk_costs_one_deadline_and_the_buffer_is_nobody_elses(
    shm_path: Path,
) -> None:
    fixture = Fixture(shm_path, deadline=0.05)
    with open_gates(fixture.store):
        handle = await fixture.open()
        fixture.store.lanes[HERE].gate.clear()
        with trio.fail_after(5), pytest.raises(StorageUnavailable) as caught:
            await fixture.handles.read(handle, 0, 4096)
        assert caught.value.errno == errno.EIO
        fixture.handles.release(handle)
    await eventually(lambda: fixture.store.lanes[HERE].busy == 0)
    assert fixture.all_closed()


async def test_the_read_that_the_kernel_repeats_waits_for_no_second_deadline(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "SILENT_SECONDS", 60)
    fixture = Fixture(shm_path, deadline=1)
    lane = fixture.store.lanes[HERE]
    with open_gates(fixture.store):
        handle = await fixture.open()
        lane.gate.clear()
        with pytest.raises(StorageUnavailable, match="no answer"):
            await fixture.handles.read(handle, 0, 4096)
        threads = lane.busy
        with trio.fail_after(0.5), pytest.raises(StorageUnavailable, match="last read"):
            await fixture.handles.read(handle, 0, 4096)
        assert lane.busy == threads
        fixture.handles.release(handle)
    await eventually(lambda: lane.busy == 0)


async def test_a_disk_that_was_silent_is_read_again(
    shm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "SILENT_SECONDS", 0)
    fixture = Fixture(shm_path, deadline=0.05)
    lane = fixture.store.lanes[HERE]
    with open_gates(fixture.store):
        handle = await fixture.open()
        lane.gate.clear()
        with pytest.raises(StorageUnavailable):
            await fixture.handles.read(handle, 0, 4096)
        lane.gate.set()
        await eventually(lambda: lane.busy == 0)
        lane.deadline = 60
        assert await fixture.handles.read(handle, 0, 4096) == DATA[:4096]
        fixture.handles.release(handle)


def shown_open_files() -> float | None:
    return REGISTRY.get_sample_value("sectorfs_open_files")


async def test_each_handle_is_closed_once(fixture: Fixture) -> None:
    handles = [await fixture.open() for _ in range(3)]
    assert len(set(handles)) == 3
    assert fixture.handles.open_files == 3
    assert shown_open_files() == 3
    for handle in handles:
        fixture.handles.release(handle)
        with pytest.raises(BadInput):
            fixture.handles.release(handle)
        with pytest.raises(BadInput):
            await fixture.handles.read(handle, 0, 1)
    assert fixture.all_closed()
    assert shown_open_files() == 0


async def test_an_open_file_pins_its_inode(fixture: Fixture) -> None:
    number = fixture.number()
    handle = await fixture.handles.open(number)
    fixture.inodes.forget([(number, 1)])
    assert number in fixture.inodes
    fixture.handles.release(handle)
    assert number not in fixture.inodes


async def test_a_cancelled_open_leaves_nothing(fixture: Fixture) -> None:
    number = fixture.number()
    fixture.store.lanes[HERE].gate.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fixture.handles.open, number)
        await eventually(lambda: fixture.store.waiting == 1)
        nursery.cancel_scope.cancel()
    fixture.inodes.forget([(number, 1)])
    assert number not in fixture.inodes
    fixture.store.lanes[HERE].gate.set()
    await eventually(lambda: fixture.store.lanes[HERE].busy == 0)
    assert fixture.handles.open_files == 0
    assert open_descriptors(fixture.path) == 0


async def test_an_open_cancelled_while_it_reports_closes_its_file(fixture: Fixture) -> None:
    number = fixture.number()
    fixture.path.write_bytes(DATA + b"more")
    reporting = trio.Event()

    async def report(file: SectorFile, member: str | None, opened: OpenFile) -> None:
        reporting.set()
        await trio.sleep_forever()

    fixture.handles._on_stale = report
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fixture.handles.open, number)
        await reporting.wait()
        assert not fixture.all_closed()
        nursery.cancel_scope.cancel()
    assert fixture.all_closed()
    assert open_descriptors(fixture.path) == 0


async def test_a_failed_open_keeps_no_pin(fixture: Fixture) -> None:
    number = fixture.number()
    fixture.path.unlink()
    with pytest.raises(NotFound):
        await fixture.handles.open(number)
    fixture.inodes.forget([(number, 1)])
    assert len(fixture.inodes) == 0


async def test_an_inode_nobody_holds_cannot_be_opened(fixture: Fixture) -> None:
    with pytest.raises(Stale):
        await fixture.handles.open(99_999)


@pytest.mark.parametrize("change", ["longer", "shorter", "rewritten"])
async def test_content_that_changed_unseen_is_reported_and_refused(
    fixture: Fixture, change: str
) -> None:
    number = fixture.number()
    data = {"longer": DATA + b"x", "shorter": DATA[:-1], "rewritten": DATA}[change]
    fixture.path.write_bytes(data)
    os.utime(fixture.path, ns=(1, 1))
    with pytest.raises(Stale) as caught:
        await fixture.handles.open(number)
    assert caught.value.errno == errno.ESTALE
    assert fixture.stale == [FILE]
    assert fixture.forgotten == [(FILE, None)]
    assert fixture.all_closed()


async def test_an_inode_of_older_content_is_refused_without_a_report(fixture: Fixture) -> None:
    number = fixture.number()
    fixture.path.write_bytes(DATA[::-1])
    os.utime(fixture.path, ns=(1, 1))
    fixture.catalog.declare(FILE, facts_of(fixture.path))
    with pytest.raises(Stale):
        await fixture.handles.open(number)
    assert fixture.stale == []
    assert fixture.forgotten == [(FILE, None)]
    assert fixture.all_closed()


async def test_a_file_dropped_while_it_was_opened_is_refused(fixture: Fixture) -> None:
    number = fixture.number()
    fixture.catalog.drop(FILE)
    with pytest.raises(Stale):
        await fixture.handles.open(number)
    assert fixture.all_closed()


async def test_a_copy_may_have_its_own_times(fixture: Fixture) -> None:
    fixture.catalog.attach(HERE)
    facts = facts_of(fixture.path)
    fixture.catalog.drop(FILE)
    fixture.catalog.declare(FILE, facts, HERE, primary=False)
    fixture.catalog.declare(FILE, Facts(facts.size, 12345), SLOW)
    handle = await fixture.open()
    assert await fixture.handles.read(handle, 0, 5) == DATA[:5]


async def test_a_fresh_copy_is_good_before_its_declaration_is_known(fixture: Fixture) -> None:
    fixture.catalog.attach(HERE)
    facts = facts_of(fixture.path)
    fixture.catalog.drop(FILE)
    fixture.catalog.declare(FILE, facts, SLOW)
    fixture.catalog.declare(FILE, Facts(facts.size - 1, 12345), HERE, primary=False)
    handle = await fixture.open()
    assert await fixture.handles.read(handle, 0, 5) == DATA[:5]
    assert not fixture.stale


async def test_unknown_facts_are_found_out_by_opening(fixture: Fixture) -> None:
    fixture.catalog.declare(FILE, None)
    with pytest.raises(Stale):
        await fixture.open()
    assert fixture.stale == [FILE]


class OneFile:
    """A store that opens without a thread, so that the clock of the test may jump."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def open(self, file: SectorFile, member: str | None = None) -> OpenFile:
        return OpenFile(
            descriptor=Descriptor(os.open(self.path, os.O_RDONLY)),
            size=1,
            mtime_ns=1,
            inode=1,
            storage=HERE,
            path=str(self.path),
            lane=Lane(str(self.path), deadline=1),
        )

    async def learn(self, file: SectorFile) -> None:
        raise AssertionError("there is no directory to learn of")

    def state(self, file: SectorFile) -> State:
        return "local"


@pytest.mark.parametrize("fails", [True, False])
async def test_a_report_that_hangs_or_fails_is_still_stale(
    fixture: Fixture,
    fails: bool,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def report(file: SectorFile, member: str | None, opened: OpenFile) -> None:
        if fails:
            raise Unreachable("no Index", "http://index")
        await trio.sleep_forever()

    number = fixture.number()
    handles = Handles(
        OneFile(fixture.path),
        fixture.tree,
        fixture.inodes,
        on_stale=report,
        invalidate=lambda file, member: fixture.forgotten.append((file, member)),
        interruptible=Interrupts().watch,
        kernel=kernel,
        policy=Policy(),
    )
    with pytest.raises(Stale):
        await handles.open(number)
    assert fixture.forgotten == [(FILE, None)]
    assert ("no Index" in caplog.text) is fails
    assert open_descriptors(fixture.path) == 0


async def test_directories_are_snapshots_with_handles(fixture: Fixture) -> None:
    number = 2 + FileType.SEALED.bit
    handle = fixture.handles.open_directory(number)
    assert fixture.handles.directory(handle).names == (FILE.sector,)
    fixture.handles.release_directory(handle)
    with pytest.raises(BadInput):
        fixture.handles.directory(handle)
    with pytest.raises(BadInput):
        fixture.handles.release_directory(handle)


async def test_closing_all_closes_all_even_if_one_fails(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        await fixture.open()
    fixture.handles.open_directory(1)
    real, calls = OpenFile.close, []

    def close(opened: OpenFile) -> None:
        calls.append(opened)
        real(opened)
        if len(calls) == 1:
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(OpenFile, "close", close)
    fixture.handles.close_all()
    monkeypatch.undo()
    assert fixture.handles.open_files == 0
    assert calls == fixture.store.opened
    assert fixture.all_closed()
    assert "close" in caplog.text
