"""Shared open files: which are kept, for how long, and never two ways of reading one inode."""

from __future__ import annotations

import os
import resource
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sectorfs.errors import BadInput, NotFound, Stale
from sectorfs.fuse import backing
from sectorfs.fuse.backing import IDLE_SECONDS, PASSTHROUGH_FROM, Policy
from sectorfs.fuse.handles import Handles
from sectorfs.fuse.inodes import InodeTable
from sectorfs.fuse.interrupts import Interrupts
from sectorfs.fuse.kernel import Offer, Use
from sectorfs.fuse.tree import Tree
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.protocol import OpenFile, State
from sectorfs.types import Facts, SectorFile, StorageID
from tests.mount_fixtures import HERE, SLOW, DictCatalog, eventually, facts_of, sector_file

LARGE = PASSTHROUGH_FROM
SMALL = 4096
FILE = sector_file("sealed/7")


class StrictKernel:
    """The kernel's rules about open files; breaking one fails the test, as it fails an open."""

    def __init__(self) -> None:
        self.passthrough = True
        self.refuses = False
        self.ids: dict[int, int] = {}
        """Backing ids and the file each holds open."""
        self.modes: dict[int, int] = {}
        """Open inodes: the backing id of all handles, or 0."""
        self.opens: Counter[int] = Counter()
        self.table: dict[int, tuple[int, int, int]] = {}
        """Remembered inodes: handle, descriptor, backing id."""
        self.seen: dict[int, tuple[int, ...]] = {}
        self.fast: Counter[int] = Counter()
        self.idle: dict[int, float] = {}
        self._last = 0

    def offer(self) -> Offer:
        return Offer(self.passthrough, False, False, "")

    def open_backing(self, fd: int) -> int:
        if self.refuses:
            raise PermissionError(1, "no")
        self._last += 1
        self.ids[self._last] = os.dup(fd)
        return self._last

    def close_backing(self, backing_id: int) -> None:
        os.close(self.ids.pop(backing_id))
        assert backing_id not in self.modes.values(), "given back while it is read"

    def remember(self, inode: int, fh: int, fd: int, *, backing_id: int = 0) -> bool:
        if inode in self.table:
            return False
        self.table[inode] = (fh, fd, backing_id)
        self.seen[inode] = self._identity(fd)
        self.idle[inode] = 0.0
        return True

    def forget(self, inode: int) -> int:
        self.table.pop(inode, None)
        return self.fast.pop(inode, 0)

    def _identity(self, fd: int) -> tuple[int, ...]:
        found = os.fstat(fd)
        return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink)

    def use(self, inode: int) -> Use | None:
        if inode not in self.table:
            return None
        return Use(self.fast[inode], 0, self.idle[inode])

    def opened(self, inode: int, backing_id: int) -> None:
        """An open was answered."""
        assert not backing_id or backing_id in self.ids, "no such backing id"
        assert self.modes.setdefault(inode, backing_id) == backing_id, "EIO"
        self.opens[inode] += 1

    def open_fast(self, inode: int) -> int | None:
        """An open that needs no Python, when there is one; its handle."""
        found = self.table.get(inode)
        if found is None or self._identity(found[1]) != self.seen[inode]:
            return None
        self.fast[inode] += 1
        self.idle[inode] = 0.0
        self.opened(inode, found[2])
        return found[0]

    def closed(self, inode: int, handle: int) -> bool:
        """A handle was closed; True when Python is told."""
        self.opens[inode] -= 1
        if not self.opens[inode]:
            del self.modes[inode]
        if self.fast[inode] and self.table[inode][0] == handle:
            self.fast[inode] -= 1
            return False
        return True


class Disk:
    """A store over real files that opens at once; storages can be lost."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where: StorageID = HERE
        self.proved = True
        self.lane = Lane(str(root), deadline=60)

    def path(self, file: SectorFile) -> Path:
        return self.root / self.where / str(file)

    def write(self, file: SectorFile, size: int, mtime_ns: int) -> Facts:
        """Put a new file at the name, as a rename does."""
        path = self.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            stream.truncate(size)
        os.utime(temporary, ns=(mtime_ns, mtime_ns))
        temporary.rename(path)
        return facts_of(path)

    async def open(self, file: SectorFile, member: str | None = None) -> OpenFile:
        try:
            fd = os.open(self.path(file), os.O_RDONLY)
        except FileNotFoundError as exc:
            raise NotFound("gone", file) from exc
        found = os.fstat(fd)
        return OpenFile(
            descriptor=Descriptor(fd),
            size=found.st_size,
            mtime_ns=found.st_mtime_ns,
            inode=found.st_ino,
            storage=self.where,
            path=str(self.path(file)),
            lane=self.lane,
            file_system="ext4" if self.proved else "",
        )

    async def learn(self, file: SectorFile) -> None:
        raise AssertionError("there is no directory to learn of")

    def state(self, file: SectorFile) -> State:
        return "local"


class Fixture:
    """Handles over a disk, and the kernel in front of them."""

    def __init__(self, root: Path, *, policy: Policy | None = None, limit: int = 100) -> None:
        self.catalog = DictCatalog()
        self.disk = Disk(root)
        self.kernel = StrictKernel()
        self.inodes = InodeTable()
        self.tree = Tree(self.catalog, self.inodes)
        self.handles = Handles(
            self.disk,
            self.tree,
            self.inodes,
            on_stale=self.on_stale,
            invalidate=lambda file, member: None,
            interruptible=Interrupts().watch,
            kernel=self.kernel,
            policy=policy or Policy(),
        )
        self.now = 1000.0
        self.backing = self.handles.backing
        self.backing._limit = limit
        self.backing._now = lambda: self.now

    async def on_stale(self, file: SectorFile, member: str | None, opened: OpenFile) -> None:
        self.declare(file)

    def declare(self, file: SectorFile) -> None:
        self.catalog.declare(file, facts_of(self.disk.path(file)), self.disk.where)

    def put(self, file: SectorFile = FILE, size: int = LARGE, mtime_ns: int = 1) -> None:
        self.disk.write(file, size, mtime_ns)
        self.declare(file)

    def number(self, file: SectorFile = FILE) -> int:
        key = self.tree.current(file)
        assert key is not None
        return self.inodes.look_up(key)

    async def open(self, file: SectorFile = FILE) -> tuple[int, int]:
        """As the kernel does it: look up, open, and once more upon ESTALE; inode and handle."""
        for attempt in range(2):
            number = self.number(file)
            handle = self.kernel.open_fast(number)
            if handle is not None:
                return number, handle
            try:
                handle = await self.handles.open(number)
            except Stale:
                if attempt:
                    raise
                continue
            self.kernel.opened(number, self.handles.backing_id(handle))
            return number, handle
        raise AssertionError

    def release(self, opened: tuple[int, int]) -> None:
        number, handle = opened
        if self.kernel.closed(number, handle):
            self.handles.release(handle)

    def pass_over(self, seconds: float) -> None:
        self.now += seconds
        for number in self.kernel.idle:
            self.kernel.idle[number] += seconds

    def held(self) -> int:
        """Descriptors of this process on files of the disk."""
        count = 0
        for name in os.listdir("/proc/self/fd"):
            try:
                count += os.readlink(f"/proc/self/fd/{name}").startswith(f"{self.disk.root}/")
            except FileNotFoundError:  # of the listing itself
                continue
        return count


@pytest.fixture
def fixture(tmp_path: Path) -> Fixture:
    fixture = Fixture(tmp_path)
    fixture.put()
    return fixture


async def released(fixture: Fixture, descriptors: int = 0) -> None:
    """Wait for descriptors, which threads close."""
    await eventually(lambda: fixture.held() == descriptors)


# --- which files ---


@pytest.mark.parametrize(
    ("size", "proved", "offered", "policy", "passed"),
    [
        (LARGE, True, True, Policy(), True),
        (LARGE - 1, True, True, Policy(), False),
        (LARGE, False, True, Policy(), False),
        (LARGE, True, False, Policy(), False),
        (LARGE, True, True, Policy("off"), False),
        (LARGE, True, True, Policy("off", {HERE: "auto"}), True),
        (LARGE, True, True, Policy("auto", {HERE: "off"}), False),
        (LARGE, True, True, Policy("require", {SLOW: "off"}), True),
    ],
)
async def test_what_is_read_past_the_daemon(
    tmp_path: Path, size: int, proved: bool, offered: bool, policy: Policy, passed: bool
) -> None:
    fixture = Fixture(tmp_path, policy=policy)
    fixture.put(size=size)
    fixture.disk.proved = proved
    fixture.kernel.passthrough = offered
    _, handle = await fixture.open()
    assert bool(fixture.handles.backing_id(handle)) is passed
    assert fixture.handles.counts().passthrough == passed
    assert fixture.handles.counts().daemon == (not passed)


@pytest.mark.parametrize(
    ("policy", "requires"),
    [
        (Policy(), False),
        (Policy("require"), True),
        (Policy("off", {HERE: "require"}), True),
        (Policy("auto", {HERE: "off"}), False),
    ],
)
def test_a_storage_can_require_it(policy: Policy, requires: bool) -> None:
    assert policy.requires is requires


async def test_a_refused_backing_id_is_told_and_read_by_the_daemon(
    fixture: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    fixture.kernel.refuses = True
    _, handle = await fixture.open()
    assert fixture.handles.backing_id(handle) == 0
    assert "read through the daemon" in caplog.text
    assert await fixture.handles.read(handle, 0, 4) == bytes(4)


# --- sharing ---


async def test_all_handles_share_one_descriptor_and_one_id(fixture: Fixture) -> None:
    opened = [await fixture.open() for _ in range(5)]
    assert len(set(opened)) == 1
    assert fixture.held() == 2  # ours and the kernel's
    assert fixture.handles.open_files == 5
    for one in opened:
        fixture.release(one)
    assert fixture.handles.open_files == 0
    assert len(fixture.backing) == fixture.backing.idle == 1


async def test_opens_at_the_same_time_share_too(fixture: Fixture) -> None:
    number, found = fixture.number(), []

    async def open_one() -> None:
        found.append(await fixture.handles.open(number))

    fixture.disk.proved = True
    real = fixture.disk.open

    async def slowly(file: SectorFile, member: str | None = None) -> OpenFile:
        opened = await real(file, member)
        await trio.testing.wait_all_tasks_blocked()
        return opened

    fixture.disk.open = slowly  # type: ignore[method-assign]  # all of them open before one is in
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(open_one)
    assert len(set(found)) == 1
    await released(fixture, 2)


async def test_opens_that_python_never_saw_are_counted(fixture: Fixture) -> None:
    first = await fixture.open()
    second = await fixture.open()
    assert fixture.kernel.fast[first[0]] == 1
    fixture.release(first)
    assert fixture.handles.open_files == 1
    fixture.backing.changed(FILE)  # from here on its opens come to Python
    assert fixture.handles.open_files == 1
    fixture.release(second)
    await released(fixture, 2)
    assert fixture.handles.open_files == 0


@pytest.mark.parametrize("proved", [True, False])
async def test_what_is_open_is_told_from_what_is_only_kept(fixture: Fixture, proved: bool) -> None:
    """Whoever evicts copies asks: what is open stays, what is kept is closed first."""
    fixture.disk.proved = proved
    assert fixture.handles.in_hand(HERE) == {}
    first, second = await fixture.open(), await fixture.open()
    for opened in (first, second):
        assert fixture.handles.in_hand(HERE) == {FILE: True}
        assert fixture.handles.in_hand(SLOW) == {}
        assert not fixture.handles.let_go(FILE, HERE)
        assert fixture.handles.let_go(FILE, SLOW)
        fixture.release(opened)
    assert fixture.handles.in_hand(HERE) == ({FILE: False} if proved else {})
    assert fixture.handles.let_go(FILE, HERE)
    assert fixture.handles.in_hand(HERE) == {}
    await released(fixture)


async def test_a_handle_that_nobody_has_is_refused(fixture: Fixture) -> None:
    opened = await fixture.open()
    fixture.release(opened)
    with pytest.raises(BadInput):
        fixture.handles.release(opened[1])


async def test_a_small_file_is_kept_and_read_by_the_daemon(fixture: Fixture) -> None:
    fixture.put(size=SMALL)
    opened = await fixture.open()
    assert fixture.kernel.ids == {}
    assert await fixture.handles.read(opened[1], SMALL - 1, 10) == b"\0"
    fixture.release(opened)
    assert await fixture.open() == opened
    assert fixture.held() == 1


async def test_one_that_is_not_local_is_never_kept(fixture: Fixture) -> None:
    fixture.disk.proved = False
    first, second = await fixture.open(), await fixture.open()
    assert first[1] != second[1]
    fixture.release(first)
    fixture.release(second)
    await released(fixture)
    assert len(fixture.backing) == 0


# --- one way of reading ---


async def test_beside_a_foreign_copy_a_local_one_is_read_by_the_daemon(fixture: Fixture) -> None:
    fixture.disk.proved = False
    foreign = await fixture.open()
    fixture.disk.proved = True
    local = await fixture.open()
    assert fixture.handles.backing_id(local[1]) == 0
    fixture.release(foreign)
    again = await fixture.open()
    assert fixture.handles.backing_id(again[1]) == 0
    for one in (local, again):
        fixture.release(one)
    fixture.backing.changed(FILE)
    assert fixture.handles.backing_id((await fixture.open())[1]) != 0


async def test_a_file_read_by_the_daemon_becomes_passed_once_nobody_has_it(
    fixture: Fixture,
) -> None:
    fixture.kernel.passthrough = False
    first = await fixture.open()
    fixture.kernel.passthrough = True
    second = await fixture.open()
    assert fixture.handles.backing_id(second[1]) == 0
    fixture.release(first)
    fixture.release(second)
    fixture.disk.path(FILE).chmod(0o600)  # so that the next open comes to Python
    assert fixture.handles.backing_id((await fixture.open())[1]) != 0


@pytest.mark.parametrize("size", [LARGE, SMALL])
async def test_a_same_file_in_its_place_is_opened_beside_the_old_one(
    fixture: Fixture, size: int
) -> None:
    """Same size and time, so the same content and inode; but its old disk blocks can go."""
    fixture.put(size=size)
    old = await fixture.open()
    fixture.put(size=size)
    fixture.backing.changed(FILE)
    new = await fixture.open()
    assert new[1] != old[1]
    assert (new[0] != old[0]) is (size == LARGE)
    both = 2 if size == LARGE else 1
    assert fixture.held() == 2 * both
    fixture.release(old)
    await released(fixture, both)
    assert fixture.backing.get(new[0]) is not None
    fixture.release(new)


async def test_touched_times_are_found_to_be_the_same_file(fixture: Fixture) -> None:
    first = await fixture.open()
    fixture.backing.changed(FILE)
    fixture.disk.path(FILE).chmod(0o600)
    assert await fixture.open() == first


async def test_a_foreign_copy_is_not_given_where_a_local_one_is_passed(fixture: Fixture) -> None:
    local = await fixture.open()
    fixture.backing.lose(HERE)
    fixture.disk.where, fixture.disk.proved = SLOW, False
    fixture.disk.write(FILE, LARGE, 1)
    elsewhere = await fixture.open()
    assert elsewhere[0] != local[0]
    assert fixture.handles.backing_id(elsewhere[1]) == 0
    fixture.release(elsewhere)
    fixture.release(local)
    await released(fixture)


# --- how long ---


async def test_new_content_is_for_the_next_open(fixture: Fixture) -> None:
    old = await fixture.open()
    fixture.disk.write(FILE, LARGE + 1, 2)
    new = await fixture.open()
    assert new[0] != old[0]
    fixture.release(old)
    await released(fixture, 2)


async def test_an_idle_file_is_closed_at_once_upon_news(fixture: Fixture) -> None:
    fixture.release(await fixture.open())
    assert fixture.held() == 2
    fixture.backing.changed(FILE)
    assert fixture.held() == 0
    assert fixture.kernel.ids == {}
    assert fixture.kernel.table == {}


async def test_a_removed_file_is_closed_with_its_last_handle(fixture: Fixture) -> None:
    first, second = await fixture.open(), await fixture.open()
    fixture.disk.path(FILE).unlink()
    fixture.release(first)
    assert fixture.held() == 2
    fixture.release(second)
    fixture.backing.changed(FILE)
    assert fixture.held() == 0


async def test_a_file_removed_behind_everybodys_back_is_found(fixture: Fixture) -> None:
    fixture.release(await fixture.open())
    fixture.disk.path(FILE).unlink()
    await fixture.backing.tidy()
    assert fixture.held() == 0


async def test_nobody_gets_files_of_a_lost_storage(fixture: Fixture) -> None:
    fixture.release(await fixture.open())
    other = sector_file("sealed/8")
    fixture.put(other)
    opened = await fixture.open(other)
    fixture.backing.lose(SLOW)
    assert len(fixture.backing) == 2
    fixture.backing.lose(HERE)
    assert len(fixture.backing) == 1
    fixture.release(opened)
    assert fixture.held() == 0


async def test_an_idle_file_is_closed_after_a_while(fixture: Fixture) -> None:
    fixture.release(await fixture.open())
    fixture.pass_over(IDLE_SECONDS - 1)
    await fixture.backing.tidy()
    assert fixture.held() == 2
    fixture.pass_over(1)
    await fixture.backing.tidy()
    assert fixture.held() == 0


async def test_use_without_python_keeps_it_open(fixture: Fixture) -> None:
    fixture.release(await fixture.open())
    fixture.pass_over(IDLE_SECONDS - 1)
    opened = await fixture.open()
    fixture.pass_over(2)
    await fixture.backing.tidy()
    assert fixture.held() == 2
    fixture.release(opened)
    fixture.pass_over(IDLE_SECONDS)
    await fixture.backing.tidy()
    assert fixture.held() == 0


async def test_keep_tidy_goes_on(fixture: Fixture, autojump_clock: trio.testing.MockClock) -> None:
    fixture.backing._now = trio.current_time
    fixture.release(await fixture.open())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fixture.handles.keep_tidy)
        await trio.sleep(IDLE_SECONDS / 2)
        fixture.pass_over(IDLE_SECONDS / 2)
        assert fixture.held() == 2
        fixture.pass_over(IDLE_SECONDS)
        await trio.sleep(IDLE_SECONDS)
        assert fixture.held() == 0
        nursery.cancel_scope.cancel()


async def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, limit=3)
    files = [sector_file(f"sealed/{number}") for number in range(4)]
    numbers = {}
    for file in files[:3]:
        fixture.put(file)
        opened = await fixture.open(file)
        numbers[file] = opened[0]
        fixture.release(opened)
        fixture.pass_over(1)
    fixture.release(await fixture.open(files[0]))  # without Python
    fixture.put(files[3])
    fixture.release(await fixture.open(files[3]))
    kept = [file for file in files[:3] if fixture.backing.get(numbers[file])]
    assert kept == [files[0], files[2]]
    assert len(fixture.backing) == 3


async def test_files_in_use_may_exceed_the_bound(tmp_path: Path) -> None:
    fixture = Fixture(tmp_path, limit=2)
    opened = []
    for number in range(5):
        fixture.put(sector_file(f"sealed/{number}"))
        opened.append(await fixture.open(sector_file(f"sealed/{number}")))
    assert len(fixture.backing) == 5
    for one in opened:
        fixture.release(one)
    assert len(fixture.backing) == 2
    assert fixture.held() == 4


async def test_the_end_of_the_mount_closes_all(fixture: Fixture) -> None:
    await fixture.open()
    fixture.put(sector_file("sealed/8"), SMALL)
    fixture.release(await fixture.open(sector_file("sealed/8")))
    fixture.disk.proved = False
    fixture.put(sector_file("sealed/9"))
    await fixture.open(sector_file("sealed/9"))
    fixture.kernel.modes.clear()
    fixture.handles.close_all()
    assert fixture.held() == 0
    assert fixture.handles.open_files == 0


def test_the_bound_follows_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
        assert backing.kept_limit() == 250
        backing.raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    assert backing.kept_limit() == backing.MOST_KEPT


# --- any order of everything ---


class SharedFiles(RuleBasedStateMachine):
    """Opens, releases, changes and losses in any order, under the kernel's rules."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.fixture = Fixture(Path(self.folder.name), limit=2)
        self.opened: list[tuple[SectorFile, tuple[int, int]]] = []
        self.files = [sector_file(f"sealed/{number}") for number in range(3)]
        self.clock = 1
        for file in self.files:
            self.fixture.put(file)

    def teardown(self) -> None:
        while self.opened:
            self.release(0)
        self.fixture.handles.close_all()
        assert self.fixture.held() == 0
        assert self.fixture.kernel.ids == {}
        self.folder.cleanup()

    @rule(index=st.integers(0, 2), proved=st.booleans())
    def open(self, index: int, proved: bool) -> None:
        file = self.files[index]
        self.fixture.disk.proved = proved
        self.opened.append((file, trio.run(self.fixture.open, file)))

    @precondition(lambda self: self.opened)
    @rule(choice=st.integers(0, 10))
    def release(self, choice: int) -> None:
        _, opened = self.opened.pop(choice % len(self.opened))
        self.fixture.release(opened)

    @rule(index=st.integers(0, 2), size=st.sampled_from([SMALL, LARGE]), same=st.booleans())
    def replace(self, index: int, size: int, same: bool) -> None:
        self.clock += not same
        self.fixture.put(self.files[index], size, self.clock)
        self.fixture.backing.changed(self.files[index])

    @rule(index=st.integers(0, 2))
    def touch(self, index: int) -> None:
        path = self.fixture.disk.path(self.files[index])
        path.chmod(path.stat().st_mode ^ 0o100)
        self.fixture.backing.changed(self.files[index])

    @rule()
    def lose(self) -> None:
        self.fixture.backing.lose(HERE)

    @rule(seconds=st.sampled_from([1.0, IDLE_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.fixture.pass_over(seconds)
        trio.run(self.fixture.backing.tidy)
        in_use = len({opened for _, opened in self.opened})
        assert len(self.fixture.backing) <= max(2, in_use)

    @rule(offered=st.booleans())
    def offer(self, offered: bool) -> None:
        self.fixture.kernel.passthrough = offered

    @invariant()
    def counts_agree(self) -> None:
        assert self.fixture.handles.open_files == len(self.opened)
        assert self.fixture.kernel.opens.total() == len(self.opened)

    @invariant()
    def each_file_is_held_once(self) -> None:
        entries = len(self.fixture.backing)
        single = sum(file.backing is None for file in self.fixture.handles._files.values())
        assert self.fixture.held() == entries + single + len(self.fixture.kernel.ids)


SharedFiles.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_shared_files = SharedFiles.TestCase
