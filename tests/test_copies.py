"""The cache path: a copy is there as a whole or not at all, whatever happens while it comes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from sectorfs.errors import DiskError, DiskFull, SourceFailed, StorageUnavailable
from sectorfs.stores import metadata
from sectorfs.stores.copies import Copies, Partial
from sectorfs.stores.lanes import Lane
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from tests.gates import Gate
from tests.local_fixtures import until
from tests.wire_fixtures import fds_return_to, open_fds

SECTOR = SectorID(1000, 7)
SEALED = SectorFile(FileType.SEALED, SECTOR)
CACHE = SectorFile(FileType.CACHE, SECTOR)
MTIME_NS = 1_600_000_000_123_456_789
DATA = b"sealed" * 1000


def cache_path(root: Path) -> Copies:
    storage = metadata.init_cache_path(str(root)).storage
    return Copies(root, storage, Lane(str(root), deadline=5))


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    return cache_path(tmp_path / "cache")


def left(copies: Copies) -> list[str]:
    """Everything in the cache path but its description."""
    found = (path.relative_to(copies.root) for path in copies.root.rglob("*"))
    return sorted(str(path) for path in found if path.name != "sectorstore.json")


async def idle(copies: Copies) -> None:
    """Until the threads of the path have done what they do behind."""
    with trio.fail_after(10):
        while copies.lane.busy:  # noqa: ASYNC110 - threads set no events
            await trio.sleep(0.005)


def fill(partial: Partial, data: bytes) -> None:
    with partial.descriptor as fd:
        os.pwrite(fd, data, 0)


async def receive(
    copies: Copies, file: SectorFile, data: bytes, member: str | None = None
) -> MemberFacts:
    """A file comes as it should."""
    partial = await copies.begin(file, member, len(data))
    fill(partial, data)
    await copies.commit(partial, size=len(data), mtime_ns=MTIME_NS)
    return MemberFacts(member or "", len(data), MTIME_NS)


async def content(
    copies: Copies,
    file: SectorFile,
    size: int,
    *,
    member: str | None = None,
    mtime_ns: int = MTIME_NS,
) -> bytes | None:
    """The bytes of a copy with this size and time, None when there is none."""
    opened = await copies.open(file, member, size=size, mtime_ns=mtime_ns)
    if opened is None:
        return None
    try:
        with opened.descriptor as fd:
            return os.pread(fd, size + 1, 0)
    finally:
        opened.close()


def directory(*members: MemberFacts) -> Facts:
    return Facts(sum(one.size for one in members), MTIME_NS, tuple(sorted(members)))


@contextmanager
def tmpfs(path: Path, size: str = "1m") -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    subprocess.run(command, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


# --- regular files ---


@pytest.mark.parametrize("data", [DATA, b""], ids=["full", "empty"])
async def test_file_is_whole_once_committed(copies: Copies, data: bytes) -> None:
    before = open_fds()
    partial = await copies.begin(SEALED, None, len(data))
    assert left(copies) == ["sealed", "sealed/fetching", "sealed/fetching/s-t01000-7"]
    assert await content(copies, SEALED, len(data)) is None
    assert not await copies.exists(SEALED)
    fill(partial, data)
    await copies.commit(partial, size=len(data), mtime_ns=MTIME_NS)
    assert left(copies) == ["sealed", "sealed/fetching", "sealed/s-t01000-7"]
    assert copies.path_of(SEALED).stat().st_mtime_ns == MTIME_NS
    assert await content(copies, SEALED, len(data)) == data
    assert await copies.exists(SEALED)
    await idle(copies)
    await fds_return_to(before)


async def test_copy_of_another_size_or_time_is_none(copies: Copies) -> None:
    await receive(copies, SEALED, DATA)
    assert await content(copies, SEALED, len(DATA) + 1) is None
    assert await content(copies, SEALED, len(DATA), mtime_ns=MTIME_NS + 1) is None
    # A source whose file system keeps whole seconds tells a time without the rest.
    whole = MTIME_NS // 10**9 * 10**9
    assert await content(copies, SEALED, len(DATA), mtime_ns=whole) == DATA


async def test_short_file_is_never_put_in_place(copies: Copies) -> None:
    partial = await copies.begin(SEALED, None, len(DATA))
    fill(partial, DATA[:-1])
    with pytest.raises(SourceFailed, match=f"received {len(DATA) - 1} of {len(DATA)} bytes"):
        await copies.commit(partial, size=len(DATA), mtime_ns=MTIME_NS)
    assert partial.descriptor.closed
    await copies.discard(partial)
    assert left(copies) == ["sealed", "sealed/fetching"]


async def test_given_up_file_is_removed_and_comes_again(copies: Copies) -> None:
    partial = await copies.begin(SEALED, None, len(DATA))
    fill(partial, DATA)
    await copies.discard(partial)
    await copies.discard(partial)
    assert left(copies) == ["sealed", "sealed/fetching"]
    await receive(copies, SEALED, DATA)
    assert await content(copies, SEALED, len(DATA)) == DATA


async def test_new_content_replaces_the_old_under_an_open_file(copies: Copies) -> None:
    await receive(copies, SEALED, b"old")
    opened = await copies.open(SEALED, None, size=3, mtime_ns=MTIME_NS)
    assert opened is not None
    await receive(copies, SEALED, b"newer")
    with opened.descriptor as fd:
        assert os.pread(fd, 10, 0) == b"old"
    opened.close()
    assert await content(copies, SEALED, 5) == b"newer"


async def test_commit_that_is_cancelled_before_it_began_leaves_nothing(copies: Copies) -> None:
    partial = await copies.begin(SEALED, None, len(DATA))
    fill(partial, DATA)
    with trio.CancelScope() as scope:
        scope.cancel()
        await copies.commit(partial, size=len(DATA), mtime_ns=MTIME_NS)
    assert scope.cancelled_caught
    assert partial.descriptor.closed
    assert not await copies.exists(SEALED)
    await copies.discard(partial)
    assert left(copies) == ["sealed", "sealed/fetching"]


async def test_begin_that_is_given_up_leaks_no_descriptor(copies: Copies) -> None:
    before = open_fds()
    with trio.CancelScope() as scope:
        scope.cancel()
        await copies.begin(SEALED, None, 1)
    await idle(copies)
    await fds_return_to(before)


async def test_file_whose_name_another_took_is_not_put_in_place(copies: Copies) -> None:
    """A thread that hung in the disk may make its temporary file after it was given up."""
    partial = await copies.begin(SEALED, None, len(DATA))
    fill(partial, DATA)
    late = await copies.begin(SEALED, None, len(DATA))
    late.descriptor.close()
    with pytest.raises(DiskError, match="temporary file"):
        await copies.commit(partial, size=len(DATA), mtime_ns=MTIME_NS)
    assert not await copies.exists(SEALED)
    late_again = await copies.begin(SEALED, None, len(DATA))
    await copies.discard(late_again)
    partial = await copies.begin(SEALED, None, len(DATA))
    partial.path.unlink()
    with pytest.raises(DiskError, match="temporary file"):
        await copies.commit(partial, size=0, mtime_ns=MTIME_NS)
    assert left(copies) == ["sealed", "sealed/fetching"]


# --- what is in the way ---


async def test_directory_where_the_copy_should_be(copies: Copies) -> None:
    (copies.root / "sealed" / "s-t01000-7" / "x").mkdir(parents=True)
    assert await content(copies, SEALED, 0) is None
    partial = await copies.begin(SEALED, None, 0)
    with pytest.raises(DiskError, match="directory"):
        await copies.commit(partial, size=0, mtime_ns=MTIME_NS)
    await copies.discard(partial)
    assert left(copies) == ["sealed", "sealed/fetching", "sealed/s-t01000-7", "sealed/s-t01000-7/x"]


@pytest.mark.parametrize("kind", ["file", "directory"])
async def test_leftover_where_the_temporary_file_should_be(copies: Copies, kind: str) -> None:
    leftover = copies.root / "sealed" / "fetching" / "s-t01000-7"
    leftover.parent.mkdir(parents=True)
    if kind == "file":
        leftover.write_bytes(DATA + b"more")
    else:
        (leftover / "x").mkdir(parents=True)
    await receive(copies, SEALED, DATA)
    assert await content(copies, SEALED, len(DATA)) == DATA


@pytest.mark.parametrize("where", ["sealed", "sealed/fetching"])
async def test_file_where_a_directory_should_be(copies: Copies, where: str) -> None:
    (copies.root / where).parent.mkdir(exist_ok=True)
    (copies.root / where).touch()
    with pytest.raises(DiskError):
        await copies.begin(SEALED, None, 1)


async def test_link_where_the_copy_should_be_is_not_followed(
    copies: Copies, tmp_path: Path
) -> None:
    (copies.root / "sealed").mkdir()
    (tmp_path / "elsewhere").write_bytes(DATA)
    os.utime(tmp_path / "elsewhere", ns=(MTIME_NS, MTIME_NS))
    copies.path_of(SEALED).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError):
        await copies.open(SEALED, None, size=len(DATA), mtime_ns=MTIME_NS)


async def test_cache_path_that_is_gone(copies: Copies) -> None:
    (copies.root / "sectorstore.json").unlink()
    with pytest.raises(StorageUnavailable, match="the cache path is gone"):
        await copies.begin(SEALED, None, 1)
    assert left(copies) == [], "an empty mount point was written to"


@pytest.mark.mount
async def test_file_that_does_not_fit_is_refused_before_it_comes(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small") as root:
        copies = cache_path(root)
        with pytest.raises(DiskFull, match="bytes to fetch") as caught:
            await copies.begin(SEALED, None, 1)
        assert caught.value.thing == str(root)
        assert left(copies) == []


@pytest.mark.mount
async def test_read_only_cache_path_is_its_own_trouble(tmp_path: Path) -> None:
    """Not a missing permission, which a peer might say as well."""
    with tmpfs(tmp_path / "ro", "100m") as root:
        copies = cache_path(root)
        await receive(copies, SEALED, DATA)
        partial = await copies.begin(CACHE, "p_aux", 1)
        partial.descriptor.close()
        await idle(copies)
        await trio.run_process(["mount", "-o", "remount,ro", str(root)])
        with pytest.raises(DiskError, match="Read-only"):
            await copies.begin(SEALED, None, 1)
        await copies.discard(partial)
        assert await copies.clear_leftovers() == 0
        assert await content(copies, SEALED, len(DATA)) == DATA


# --- directories ---


async def test_directory_comes_file_by_file_and_is_put_in_place_whole(copies: Copies) -> None:
    one = await receive(copies, CACHE, b"a" * 64, "p_aux")
    facts = directory(one, MemberFacts("t_aux", 3, MTIME_NS))
    assert await content(copies, CACHE, 64, member="p_aux") == b"a" * 64
    assert not await copies.is_received(CACHE, facts)
    assert not await copies.exists(CACHE)
    with pytest.raises(SourceFailed, match="lacks t_aux"):
        await copies.complete(CACHE, facts)
    two = await receive(copies, CACHE, b"bbb", "t_aux")
    await receive(copies, CACHE, b"not of it any more", "old")
    facts = directory(one, two)
    assert await copies.is_received(CACHE, facts)
    await copies.complete(CACHE, facts)
    assert left(copies) == [
        "cache",
        "cache/fetching",
        "cache/s-t01000-7",
        "cache/s-t01000-7/p_aux",
        "cache/s-t01000-7/t_aux",
    ]
    assert copies.path_of(CACHE).stat().st_mtime_ns == MTIME_NS
    assert copies.path_of(CACHE, "t_aux").stat().st_mtime_ns == MTIME_NS
    assert await content(copies, CACHE, 3, member="t_aux") == b"bbb"
    assert not await copies.is_received(CACHE, facts), "nothing is left to put in place"


async def test_file_being_received_does_not_count(copies: Copies) -> None:
    partial = await copies.begin(CACHE, "p_aux", 1)
    fill(partial, b"x")
    facts = directory(MemberFacts("p_aux", 1, MTIME_NS))
    assert not await copies.is_received(CACHE, facts)
    assert await content(copies, CACHE, 1, member="p_aux") is None
    assert left(copies)[-1] == "cache/fetching/s-t01000-7/p_aux.tmp"
    await copies.discard(partial)


async def test_new_content_of_a_directory_takes_over_what_stayed_the_same(copies: Copies) -> None:
    one = await receive(copies, CACHE, b"same", "p_aux")
    two = await receive(copies, CACHE, b"old", "t_aux")
    await copies.complete(CACHE, directory(one, two))
    fresh = await receive(copies, CACHE, b"newer", "t_aux")
    facts = directory(one, fresh)
    assert await copies.is_received(CACHE, facts)
    await copies.complete(CACHE, facts)
    assert await content(copies, CACHE, 5, member="t_aux") == b"newer"
    assert await content(copies, CACHE, 4, member="p_aux") == b"same"
    assert left(copies)[2:] == [
        "cache/s-t01000-7",
        "cache/s-t01000-7/p_aux",
        "cache/s-t01000-7/t_aux",
    ]


# --- a crash ---

CRASH = """
import os, sys, trio
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from sectorfs.stores import metadata
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Lane
from tests import test_copies as tests

root, left = Path(sys.argv[1]), int(sys.argv[2])
storage = metadata.read_metadata(str(root)).info.storage
copies = Copies(root, storage, Lane(str(root), deadline=60))

def dies(call):
    def step(*arguments, **keywords):
        global left
        if left == 0:
            os._exit(9)  # as if the power went here
        left -= 1
        return call(*arguments, **keywords)
    return step

for name in ("pwrite", "utime", "fsync", "rename", "link", "unlink", "mkdir"):
    setattr(os, name, dies(getattr(os, name)))
trio.run(getattr(tests, sys.argv[4]), copies)
"""


async def fetch_file(copies: Copies) -> None:
    await receive(copies, SEALED, DATA)


async def fetch_directory(copies: Copies) -> None:
    one = await receive(copies, CACHE, b"a" * 64, "p_aux")
    two = await receive(copies, CACHE, b"bbb", "t_aux")
    await copies.complete(CACHE, directory(one, two))


async def replace_directory(copies: Copies) -> None:
    """The older content is there already; its declaration was dropped."""
    two = await receive(copies, CACHE, b"bbb", "t_aux")
    await copies.complete(CACHE, directory(MemberFacts("p_aux", 64, MTIME_NS), two))


async def file_is_whole(copies: Copies) -> bool:
    if not await copies.exists(SEALED):
        return False
    assert await content(copies, SEALED, len(DATA)) == DATA
    return True


async def directory_is_whole(copies: Copies) -> bool:
    if not await copies.exists(CACHE):
        return False
    assert sorted(os.listdir(copies.path_of(CACHE))) == ["p_aux", "t_aux"]
    assert await content(copies, CACHE, 64, member="p_aux") == b"a" * 64
    return await content(copies, CACHE, 3, member="t_aux") == b"bbb"


@pytest.mark.parametrize(
    ("before", "work", "is_whole"),
    [
        (None, fetch_file, file_is_whole),
        (None, fetch_directory, directory_is_whole),
        (fetch_directory, replace_directory, directory_is_whole),
    ],
    ids=["file", "directory", "replaced"],
)
def test_crash_at_any_step_leaves_a_whole_copy_or_none(
    tmp_path: Path,
    before: Callable[[Copies], object] | None,
    work: Callable[[Copies], object],
    is_whole: Callable[[Copies], object],
) -> None:
    """Killed before each change it makes to the disk, then started again."""
    for step in range(60):
        root = tmp_path / f"step{step}"
        copies = cache_path(root)
        if before is not None:
            trio.run(before, copies)
        command = [sys.executable, "-c", CRASH, str(root), str(step), os.getcwd(), work.__name__]
        code = subprocess.run(command, check=False).returncode
        trio.run(copies.clear_leftovers)
        trio.run(copies.settle_leftovers, lambda file: None)
        assert [name for name in left(copies) if "fetching/" in name] == []
        whole = trio.run(is_whole, copies)
        if code == 0:
            assert whole
            assert step >= 5
            return
        assert code == 9
        trio.run(work if before is None or copies.path_of(CACHE).exists() else before, copies)
        assert trio.run(is_whole, copies), f"after a crash at step {step} it cannot come again"
    raise AssertionError("it never ends")


# --- a disk that hangs ---


def impatient(root: Path) -> Copies:
    """A cache path whose writes are given up soon."""
    storage = metadata.init_cache_path(str(root)).storage
    return Copies(root, storage, Lane(str(root), deadline=0.5, patience=0.3))


def syncs(path: Path) -> Callable[[int], bool]:
    """Whether an fsync is that of a file or directory."""
    return lambda fd: os.readlink(f"/proc/self/fd/{fd}") == str(path)


async def test_file_whose_sync_hangs_is_given_up_and_never_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = impatient(tmp_path / "cache")
    partial = await copies.begin(SEALED, None, len(DATA))
    fill(partial, DATA)
    gate = Gate(monkeypatch, "fsync", syncs(partial.path))
    with pytest.raises(StorageUnavailable, match=r"no answer within 0\.3 s"):
        await copies.commit(partial, size=len(DATA), mtime_ns=MTIME_NS)
    assert copies.lane.busy, "the thread lost its place while it hangs"
    gate.opened.set()
    await idle(copies)
    assert not await copies.exists(SEALED)
    await copies.discard(partial)
    assert left(copies) == ["sealed", "sealed/fetching"]
    await receive(copies, SEALED, DATA)
    assert await content(copies, SEALED, len(DATA)) == DATA


async def test_temporary_file_that_is_made_too_late_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = impatient(tmp_path / "cache")
    before = open_fds()
    gate = Gate(monkeypatch, "open", lambda path, flags, *_, **__: flags & os.O_CREAT > 0)
    with pytest.raises(StorageUnavailable):
        await copies.begin(SEALED, None, len(DATA))
    gate.opened.set()
    await idle(copies)
    await until(lambda: left(copies) == ["sealed", "sealed/fetching"])
    await fds_return_to(before)


async def test_directory_whose_sync_hangs_is_given_up_and_never_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer files come to where the older ones were, before the thread goes on."""
    copies = impatient(tmp_path / "cache")
    member = await receive(copies, CACHE, b"old", "p_aux")
    folder = copies.root / "cache" / "fetching" / CACHE.sector.name
    gate = Gate(monkeypatch, "fsync", syncs(folder))
    with pytest.raises(StorageUnavailable):
        await copies.complete(CACHE, directory(member))
    (folder / "t_aux.tmp").write_bytes(b"half of a newer file")
    gate.opened.set()
    await idle(copies)
    assert not await copies.exists(CACHE)
    assert sorted(os.listdir(folder)) == ["p_aux", "t_aux.tmp"]


async def test_directory_is_not_put_in_place_after_the_older_one_went_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = impatient(tmp_path / "cache")
    await copies.complete(CACHE, directory(await receive(copies, CACHE, b"old", "p_aux")))
    member = await receive(copies, CACHE, b"newer", "p_aux")
    gate = Gate(monkeypatch, "rename", lambda old, _: old == copies.path_of(CACHE))
    with pytest.raises(StorageUnavailable):
        await copies.complete(CACHE, directory(member))
    gate.opened.set()
    await idle(copies)
    assert not await copies.exists(CACHE)
    await copies.complete(CACHE, directory(member))
    assert await content(copies, CACHE, 5, member="p_aux") == b"newer"


async def test_discarding_ends_though_the_disk_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = impatient(tmp_path / "cache")
    monkeypatch.setattr("sectorfs.stores.copies.DISCARD_SECONDS", 0.1)
    partial = await copies.begin(SEALED, None, len(DATA))
    gate = Gate(monkeypatch, "unlink", lambda path: str(path) == str(partial.path))
    with trio.fail_after(5):
        await copies.discard(partial)
    gate.opened.set()
    await idle(copies)
    assert left(copies) == ["sealed", "sealed/fetching"]


async def test_nothing_is_begun_while_a_write_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = metadata.init_cache_path(str(tmp_path / "cache")).storage
    lane = Lane(str(tmp_path / "cache"), deadline=0.02, patience=0.01)
    copies = Copies(tmp_path / "cache", storage, lane)
    opened = threading.Event()
    with pytest.raises(StorageUnavailable):
        await copies.write(opened.wait, what="write")
    with trio.fail_after(10):
        while lane.longest_write() <= 8 * lane.deadline:  # noqa: ASYNC110 - a clock has no events
            await trio.sleep(0.01)
    with pytest.raises(StorageUnavailable):
        await copies.begin(SEALED, None, 1)
    assert lane.busy == 1
    opened.set()
    await idle(copies)


async def test_nothing_is_begun_before_leftovers_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = impatient(tmp_path / "cache")
    left_behind = copies.root / "sealed" / "fetching" / "s-t01000-9"
    left_behind.parent.mkdir(parents=True)
    left_behind.write_bytes(b"half")
    gate = Gate(monkeypatch, "unlink", lambda path, **_: str(path) == str(left_behind))
    async with trio.open_nursery() as nursery:
        await nursery.start(copies.clear_leftovers)
        with pytest.raises(StorageUnavailable, match="since the start"):
            await copies.begin(SEALED, None, len(DATA))
        gate.opened.set()
    assert left(copies) == ["sealed", "sealed/fetching"]
    await receive(copies, SEALED, DATA)


async def test_clearing_that_hangs_is_left_behind_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = impatient(tmp_path / "cache")
    gate = Gate(monkeypatch, "scandir", lambda path=".": "fetching" in str(path))
    async with trio.open_nursery() as nursery:
        await nursery.start(copies.clear_leftovers)
        await until(gate.met.is_set)
        nursery.cancel_scope.cancel()
    gate.opened.set()
    await until(gate.passed.is_set)


async def test_leftovers_of_another_storage_are_not_ours(copies: Copies) -> None:
    other = Copies(copies.root, StorageID("other"), copies.lane)
    partial = await copies.begin(SEALED, None, 1)
    assert await other.clear_leftovers() == 0
    with pytest.raises(StorageUnavailable, match=r"holds storage .* instead of other"):
        await other.begin(SEALED, None, 1)
    await copies.discard(partial)


async def test_leftovers_are_cleared_and_counted(
    copies: Copies, caplog: pytest.LogCaptureFixture
) -> None:
    assert await copies.clear_leftovers() == 0
    await receive(copies, SEALED, DATA)
    partial = await copies.begin(SectorFile(FileType.UNSEALED, SECTOR), None, 1)
    partial.descriptor.close()
    await receive(copies, CACHE, b"x", "p_aux")
    (copies.root / "sealed" / "fetching" / "link").symlink_to(copies.path_of(SEALED))
    with caplog.at_level("INFO"):
        assert await copies.clear_leftovers() == 2
        assert "removed 2 unfinished fetches" in caplog.text
        assert await copies.settle_leftovers(lambda file: None) == 1
        assert "nobody has that content any more" in caplog.text
    assert [name for name in left(copies) if "/fetching/" in name] == []
    assert await content(copies, SEALED, len(DATA)) == DATA
