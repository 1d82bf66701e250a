"""The mount itself, through the kernel: reading, listing, changes, hung disks and dead daemons."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio

from sectorfs.config import MountConfig
from sectorfs.errors import MountFailed, NotFound, Refused
from sectorfs.fuse import kernel, mounts
from sectorfs.fuse.operations import Mount
from sectorfs.metrics import FUSE_REQUESTS
from sectorfs.types import Facts
from tests.hung_disk import hung_disk
from tests.mount_fixtures import (
    HERE,
    SLOW,
    World,
    call,
    eventually,
    eventually_seen,
    facts_of,
    sector_file,
    shell,
)

pytestmark = pytest.mark.mount

DATA = bytes(range(256)) * 4096 + b"end"


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.put("sealed/7", DATA)
    world.put("unsealed/7", b"")
    world.put("cache/7/p_aux", b"p" * 64)
    world.put("cache/7/sc-02-data-tree-r-last.dat", DATA[:70_000])
    return world


@pytest.fixture(autouse=True)
def _no_mount_stays(tmp_path: Path) -> Iterator[None]:
    """Whatever a failing test left mounted below its directory goes, without being touched."""
    yield
    for mount in mounts.parse_mountinfo(mounts.MOUNTINFO.read_bytes()):
        if mount.is_ours and mount.path.startswith(str(tmp_path)):
            mounts.abort(mount.minor)
            mounts.detach(mount.path)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on tmpfs, where every read takes a thread of the storage's lane."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


# Tools


@pytest.mark.parametrize(
    "command",
    [
        'test "$(sha256sum < "$M/sealed/s-t01000-7")" = "$(sha256sum < "$B/sealed/s-t01000-7")"',
        'cmp "$M/cache/s-t01000-7/p_aux" "$B/cache/s-t01000-7/p_aux"',
        'cp -a "$M" "$B/copy" && diff -r "$M" "$B/copy" && test ! -s "$B/copy/unsealed/s-t01000-7"',
        'mkdir "$B/x" && tar -C "$M" -cf - . | tar -C "$B/x" -xf - && diff -r "$M" "$B/x"',
        'rsync -aX "$M/" "$B/r" && diff -r "$M" "$B/r" && test -z "$(rsync -ain "$M/" "$B/r")"',
        'test "$(find "$M" -type f | wc -l)" = 4',
        'test "$(find "$M" -type d -links 2 | wc -l)" = 3',
        'dd if="$M/$F" bs=4k status=none | cmp - "$B/$F"',
        'dd if="$M/$F" bs=4k iflag=direct status=none | cmp - "$B/$F"',
    ],
)
async def test_existing_tools_work(world: World, command: str) -> None:
    async with world.mounted():
        base = world.store.roots[HERE]
        await shell(command, M=world.mountpoint, B=base, F="sealed/s-t01000-7")


async def test_a_listing_shows_everything(world: World) -> None:
    async with world.mounted():
        printed = await shell('cd "$M" && ls -laR', M=world.mountpoint)
        lines = [line.split() for line in printed.splitlines() if line.startswith(("d", "-"))]
        names = [line[8] for line in lines]
        assert names.count(".") == names.count("..") == 5
        assert names.count("s-t01000-7") == 3
        assert {"unsealed", "sealed", "cache", "p_aux"} < set(names)
        assert all(
            line[0][1:] == "r-xr-xr-x" for line in lines if line[0][0] == "d" and line[8] != ".."
        )
        assert all(line[0] == "-r--r--r--" for line in lines if line[0][0] == "-")


async def test_stat_shows_what_the_source_has(world: World) -> None:
    async with world.mounted():
        seen = await call(world.seen("sealed/7").stat)
        real = world.path(sector_file("sealed/7")).stat()
        assert (seen.st_size, seen.st_mtime_ns) == (real.st_size, real.st_mtime_ns)
        assert (seen.st_blocks, seen.st_nlink) == (2049, 1)
        assert (seen.st_uid, seen.st_gid) == (7, 8)
        directory = await call(world.seen("cache/7").stat)
        assert (directory.st_nlink, directory.st_size) == (2, 0)


async def test_inode_numbers_survive_a_remount(world: World) -> None:
    numbers = []
    for _ in range(2):
        async with world.mounted():
            paths = [world.seen(text) for text in ("sealed/7", "cache/7", "cache/7/p_aux")]
            numbers.append([(await call(path.stat)).st_ino for path in paths])
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 3


async def test_many_names_are_listed_once_each(world: World) -> None:
    for number in range(3000):
        world.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
    async with world.mounted():
        names = await call(partial(os.listdir, world.mountpoint / "sealed"))
        assert len(names) == len(set(names)) == 3000
        sizes = await call(
            lambda: [e.stat().st_size for e in os.scandir(world.mountpoint / "sealed")]
        )
        assert sum(sizes) == 3000


async def test_forgotten_inodes_leave_the_table(world: World) -> None:
    async with world.mounted():
        await call(partial(world.seen("cache/7/p_aux").read_bytes))
        assert len(world.operations.inodes) == 2
        await shell("echo 2 > /proc/sys/vm/drop_caches")
        await eventually(lambda: len(world.operations.inodes) == 0)


# Reading


async def test_mmap_shared_and_private(world: World) -> None:
    code = (
        "import mmap,os,sys;fd=os.open(sys.argv[1],os.O_RDONLY);"
        "print([mmap.mmap(fd,0,flags=f,prot=mmap.PROT_READ)[1048570:].hex()"
        " for f in (mmap.MAP_SHARED,mmap.MAP_PRIVATE)])"
    )
    async with world.mounted():
        printed = await shell(
            f'"$PYTHON" -c "{code}" "$F"', PYTHON=sys.executable, F=world.seen("sealed/7")
        )
        assert printed.strip() == str([DATA[1_048_570:].hex()] * 2)
    assert mmap.PAGESIZE == 4096


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (4095, 2), (1 << 20, 3), (1 << 20, 4096), ((1 << 20) + 3, 1), (1 << 33, 4096)],
)
async def test_reads_at_and_past_the_end(world: World, offset: int, size: int) -> None:
    def read() -> bytes:
        fd = os.open(world.seen("sealed/7"), os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    async with world.mounted():
        assert await call(read) == DATA[offset : offset + size]


async def test_a_sparse_file_beyond_four_gigabytes(world: World) -> None:
    path = world.put("unsealed/8", b"start")
    with path.open("r+b") as stream:
        stream.seek((5 << 30) + 7)
        stream.write(b"far away")
    world.announce(world.catalog.declare(sector_file("unsealed/8"), facts_of(path)))

    def read() -> tuple[int, bytes, bytes]:
        with world.seen("unsealed/8").open("rb") as stream:
            first = stream.read(10)
            stream.seek((5 << 30) + 5)
            return os.fstat(stream.fileno()).st_size, first, stream.read()

    async with world.mounted():
        size, first, last = await call(read)
        assert size == (5 << 30) + 15
        assert first == b"start" + bytes(5)
        assert last == bytes(2) + b"far away"


async def test_an_empty_file_is_empty(world: World) -> None:
    async with world.mounted():
        assert await call(world.seen("unsealed/7").read_bytes) == b""


@pytest.mark.parametrize("storage", [HERE, SLOW])
async def test_cold_and_threaded_reads_are_whole(world: World, memory: Path, storage: str) -> None:
    world.add_storage(SLOW, memory)
    data = os.urandom(5_000_001)
    path = world.put("sealed/20", data, SLOW if storage == SLOW else HERE)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    async with world.mounted():
        printed = await shell('sha256sum < "$F"', F=world.seen("sealed/20"))
        assert printed.split()[0] == hashlib.sha256(data).hexdigest()


async def test_parallel_readers_get_their_own_bytes(world: World, memory: Path) -> None:
    world.add_storage(SLOW, memory)
    texts = [f"sealed/{number}" for number in range(100, 130)]
    for number, text in enumerate(texts):
        world.put(text, bytes([number]) * 300_000, SLOW if number % 2 else HERE)
    seen: dict[str, bytes] = {}

    async def read(text: str) -> None:
        seen[text] = await call(world.seen(text).read_bytes)

    async with world.mounted():
        async with trio.open_nursery() as nursery:
            for text in texts:
                nursery.start_soon(read, text)
    assert [set(seen[text]) for text in texts] == [{number} for number in range(30)]
    assert {len(data) for data in seen.values()} == {300_000}


# What is refused


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC])
async def test_opening_for_writing_is_refused(world: World, flags: int) -> None:
    async with world.mounted():
        assert await code_of(partial(os.open, world.seen("sealed/7"), flags)) == errno.EROFS


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.unlink(path),
        lambda path: os.mkdir(path.parent / "new"),
        lambda path: os.rename(path, path.parent / "s-t01000-8"),
        lambda path: os.link(path, path.parent / "s-t01000-8"),
        lambda path: os.symlink("x", path.parent / "s-t01000-8"),
        lambda path: os.chmod(path, 0o777),
        lambda path: os.truncate(path, 0),
        lambda path: os.utime(path),
        lambda path: os.mknod(path.parent / "s-t01000-8"),
        lambda path: os.rmdir(path.parent),
        lambda path: os.setxattr(path, "user.sectorfs.pinned", b"1"),
        lambda path: os.removexattr(path, "user.sectorfs.pinned"),
        lambda path: os.close(os.open(path.parent / "s-t01000-8", os.O_CREAT | os.O_WRONLY)),
    ],
)
async def test_every_change_is_refused(world: World, change: Callable[[Path], object]) -> None:
    async with world.mounted():
        assert await code_of(partial(change, world.seen("sealed/7"))) == errno.EROFS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sealed/s-t01000-8", errno.ENOENT),
        ("sealed/s-t01000-7.tmp", errno.ENOENT),
        ("sealed/.hidden", errno.ENOENT),
        ("nothing", errno.ENOENT),
        ("update", errno.ENOENT),
        ("cache/s-t01000-7/t_aux", errno.ENOENT),
        ("sealed/" + "x" * 255, errno.ENOENT),
        ("sealed/" + "x" * 256, errno.ENAMETOOLONG),
        ("sealed/" + "x" * 300, errno.ENAMETOOLONG),
        ("sealed/\udcff\udcfe", errno.ENOENT),
        ("sealed/s-t01000-7/below", errno.ENOTDIR),
    ],
)
async def test_names_that_do_not_exist(world: World, name: str, expected: int) -> None:
    async with world.mounted():
        assert await code_of(partial(os.stat, world.mountpoint / name)) == expected


async def code_of(function: Callable[[], object]) -> int | None:
    """The errno a call on the mount fails with; None when it succeeds."""

    def run() -> int | None:
        try:
            function()
        except OSError as exc:
            return exc.errno
        return None

    return await call(run)


async def test_access_is_judged(world: World) -> None:
    path = world.seen("sealed/7")
    async with world.mounted():
        assert await call(partial(os.access, path, os.R_OK))
        assert not await call(partial(os.access, path, os.W_OK))
        assert not await call(partial(os.access, path, os.X_OK))
        assert await call(partial(os.access, path.parent, os.R_OK | os.X_OK))


async def test_space_is_that_of_the_storages(world: World) -> None:
    world.catalog.attach(HERE, capacity=1 << 40, available=1 << 30)
    world.catalog.attach(SLOW, capacity=1 << 41, available=1 << 31)
    async with world.mounted():
        seen = await call(partial(os.statvfs, world.mountpoint))
        assert seen.f_frsize * seen.f_blocks == 3 << 40
        assert seen.f_frsize * seen.f_bavail == 3 << 30
        assert seen.f_namemax == 255


# Extended attributes


async def test_attributes_are_read_by_name_and_never_listed(world: World) -> None:
    async with world.mounted():
        for text in ("sealed/7", "cache/7", "cache/7/p_aux"):
            path = world.seen(text)
            raw = await call(partial(os.getxattr, path, "user.sectorfs.locations"))
            assert [copy["storage"] for copy in json.loads(raw)] == ["here"]
            assert await call(partial(os.listxattr, path)) == []
            printed = await shell('getfattr -n user.sectorfs.state --only-values "$F"', F=path)
            assert printed == "local"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("sealed/7", "user.sectorfs.nothing", errno.ENODATA),
        ("sealed/7", "user.other", errno.ENODATA),
        ("sealed/7", "security.selinux", errno.EOPNOTSUPP),
        ("sealed/7", "system.posix_acl_access", errno.EOPNOTSUPP),
        ("cache/7", "security.capability", errno.EOPNOTSUPP),
    ],
)
async def test_other_attributes(world: World, text: str, name: str, expected: int) -> None:
    async with world.mounted():
        assert await code_of(partial(os.getxattr, world.seen(text), name)) == expected
        parent = world.mountpoint / "sealed"
        assert await code_of(partial(os.getxattr, parent, "user.sectorfs.state")) == errno.ENODATA
        root = world.mountpoint
        assert await code_of(partial(os.getxattr, root, "user.sectorfs.state")) == errno.ENODATA


# Changes of the catalog


async def test_a_name_declared_after_it_was_missed_appears(world: World) -> None:
    async with world.mounted():
        path = world.seen("sealed/8")
        assert not await call(path.exists)
        assert await call(partial(os.listdir, path.parent)) == ["s-t01000-7"]
        before = (await call(path.parent.stat)).st_mtime_ns
        world.put("sealed/8", b"new")
        # Less than the second for which a missing name may be remembered.
        await eventually_seen(path.exists, patience=0.8)
        assert await call(path.read_bytes) == b"new"
        assert await call(partial(os.listdir, path.parent)) == ["s-t01000-7", "s-t01000-8"]
        assert (await call(path.parent.stat)).st_mtime_ns > before


async def test_a_new_type_appears_and_vanishes(world: World) -> None:
    async with world.mounted():
        path = world.seen("update/8")
        assert not await call(path.parent.exists)
        world.put("update/8", b"new")
        await eventually_seen(path.exists, patience=0.8)
        links = (await call(world.mountpoint.stat)).st_nlink
        assert links == 6
        world.announce(world.catalog.drop(sector_file("update/8")))
        await eventually_seen(lambda: not path.parent.exists())
        assert (await call(world.mountpoint.stat)).st_nlink == 5


async def test_a_dropped_name_vanishes_and_an_open_file_goes_on(world: World) -> None:
    path = world.seen("sealed/7")
    async with world.mounted():
        stream = await call(partial(path.open, "rb"))
        assert await call(partial(stream.read, 3)) == DATA[:3]
        world.announce(world.catalog.drop(sector_file("sealed/7")))
        await eventually_seen(lambda: not path.exists())
        assert await call(partial(os.listdir, path.parent)) == []
        assert await call(stream.read) == DATA[3:]
        await call(stream.close)


async def test_changed_content_is_for_the_next_open_only(world: World) -> None:
    path = world.seen("sealed/7")
    async with world.mounted():
        old = await call(partial(path.open, "rb"))
        before = await call(path.stat)
        assert await call(partial(old.read, 70_000)) == DATA[:70_000]
        world.put("sealed/7", DATA[::-1])
        await eventually_seen(lambda: path.stat().st_ino != before.st_ino)
        assert await call(path.read_bytes) == DATA[::-1]
        assert await call(old.read) == DATA[70_000:]
        assert (await call(lambda: os.fstat(old.fileno()))).st_ino == before.st_ino
        await call(old.close)


async def test_files_of_a_directory_come_change_and_go(world: World) -> None:
    directory, first, second = (world.seen(f"cache/7{name}") for name in ("", "/p_aux", "/t_aux"))
    async with world.mounted():
        assert not await call(second.exists)
        assert await call(first.read_bytes) == b"p" * 64
        world.put("cache/7/t_aux", b"new")
        await eventually_seen(second.exists, patience=0.8)
        world.put("cache/7/p_aux", b"q" * 64)
        await eventually_seen(lambda: first.read_bytes() == b"q" * 64)
        (world.path(sector_file("cache/7")) / "p_aux").unlink()
        file = sector_file("cache/7")
        world.announce(world.catalog.declare(file, facts_of(world.path(file))))
        await eventually_seen(lambda: not first.exists())
        names = await call(partial(os.listdir, directory))
        assert sorted(names) == ["sc-02-data-tree-r-last.dat", "t_aux"]


async def test_content_that_changed_unannounced_is_found_at_open(world: World) -> None:
    path = world.seen("sealed/7")
    async with world.mounted():
        assert await call(path.read_bytes) == DATA
        real = world.path(sector_file("sealed/7"))
        real.with_suffix(".tmp").write_bytes(b"other")
        real.with_suffix(".tmp").rename(real)
        assert await call(path.read_bytes) == b"other", "the kernel looked it up again"
        assert world.stale == [(sector_file("sealed/7"), None)]


async def test_content_that_nobody_declares_again_is_refused(world: World) -> None:
    world.redeclare = False
    path = world.seen("cache/7/p_aux")
    async with world.mounted():
        (world.path(sector_file("cache/7")) / "p_aux").write_bytes(b"longer than before" * 9)
        assert await code_of(path.read_bytes) == errno.ESTALE
        assert world.stale[0] == (sector_file("cache/7"), "p_aux")
        assert not world.operations.handles.open_files


async def test_a_file_of_unknown_facts_can_be_read(world: World) -> None:
    world.catalog.declare(sector_file("sealed/7"), None)
    async with world.mounted():
        path = world.seen("sealed/7")
        assert (await call(path.stat)).st_size == 0
        assert await call(path.read_bytes) == DATA
        assert (await call(path.stat)).st_size == len(DATA)


async def test_an_overflowing_queue_loses_nothing(world: World) -> None:
    world.operations.notifications._limit = 5
    world.put("cache/8/p_aux", b"8")
    async with world.mounted():
        missing, file, member = (
            world.seen(text) for text in ("sealed/500", "sealed/7", "cache/8/p_aux")
        )
        assert not await call(missing.exists)
        assert await call(file.read_bytes) == DATA
        assert await call(member.read_bytes) == b"8"
        holder = await call(partial(member.open, "rb"))
        world.put("sealed/7", b"new")
        world.put("cache/8/p_aux", b"nine")
        changes = [
            world.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
            for number in range(400, 600)
        ]
        world.announce(*changes)
        await eventually_seen(missing.exists)
        await eventually_seen(lambda: file.read_bytes() == b"new")
        await eventually_seen(lambda: member.read_bytes() == b"nine")
        await call(holder.close)


# Hung disks


@pytest.mark.parametrize("readers", [40, 150])
async def test_a_disk_that_hangs_in_open_does_not_stall_the_others(
    world: World, memory: Path, readers: int
) -> None:
    world.add_storage(SLOW, memory)
    for number in range(readers):
        world.put(f"sealed/{1000 + number}", b"s" * 65_536, SLOW)
    finished: list[bytes] = []

    async def read(number: int) -> None:
        finished.append(await call(world.seen(f"sealed/{1000 + number}").read_bytes))

    async with world.mounted():
        world.store.lanes[SLOW].gate.clear()
        async with trio.open_nursery() as nursery:
            for number in range(readers):
                nursery.start_soon(read, number)
            await eventually(lambda: world.store.waiting == readers, 10)
            await others_are_quick(world)
            assert not finished
            world.store.lanes[SLOW].gate.set()
    assert finished == [b"s" * 65_536] * readers


@pytest.mark.parametrize("readers", [40, 150])
async def test_a_disk_that_hangs_in_reads_does_not_stall_the_others(
    world: World, memory: Path, readers: int
) -> None:
    """Large sequential reads: the kernel makes background requests of them, and bounds those."""
    world.add_storage(SLOW, memory)
    for number in range(readers):
        world.put_sparse(f"sealed/{1000 + number}", 8 << 20, SLOW)
    finished: list[int] = []
    opened = []

    async def read(fd: int) -> None:
        data = await call(partial(os.pread, fd, 2 << 20, 0))
        await call(partial(os.close, fd))
        finished.append(len(data))

    async with world.mounted():
        for number in range(readers):
            path = world.seen(f"sealed/{1000 + number}")
            opened.append(await call(partial(os.open, path, os.O_RDONLY)))
        lane = world.store.lanes[SLOW]
        lane.gate.clear()
        async with trio.open_nursery() as nursery:
            for fd in opened:
                nursery.start_soon(read, fd)
            await eventually(lambda: lane.busy == 32 and lane.waiting >= readers - 32, 10)
            await others_are_quick(world)
            # News of a file that is being read, and of its directory, come through as well.
            world.put("sealed/1000", b"replaced", SLOW)
            await eventually_seen(lambda: world.seen("sealed/1000").stat().st_size == 8)
            assert not finished
            lane.gate.set()
    assert finished == [2 << 20] * readers


async def others_are_quick(world: World) -> None:
    """`ls`, `stat` and a first read elsewhere, while a disk hangs; and news of a name."""
    took: dict[str, list[float]] = {"ls": [], "stat": [], "read": []}
    for number in range(9):
        world.put_sparse(f"unsealed/{2000 + number}", 4 << 20)
    with trio.fail_after(20):
        for number in range(9):
            path = world.seen(f"unsealed/{2000 + number}")
            calls: list[tuple[str, Callable[[], object]]] = [
                ("ls", partial(os.listdir, world.mountpoint / "sealed")),
                ("stat", path.stat),
                ("read", path.read_bytes),
            ]
            for name, function in calls:
                started = time.perf_counter()
                await call(function)
                took[name].append(time.perf_counter() - started)
        world.put("unsealed/3000", b"")
        await eventually_seen(world.seen("unsealed/3000").exists)
    for name, seconds in took.items():
        assert max(seconds) < 2, name
        assert statistics.median(seconds) < 0.1, name


async def test_a_hanging_read_is_an_error_after_its_deadline(world: World, memory: Path) -> None:
    world.add_storage(SLOW, memory)
    world.put("sealed/9", b"s" * 65_536, SLOW)
    async with world.mounted():
        world.store.lanes[SLOW].gate.clear()
        world.store.lanes[SLOW].deadline = 0.2
        assert await code_of(world.seen("sealed/9").read_bytes) == errno.EIO
        world.store.lanes[SLOW].gate.set()
        assert await call(world.seen("sealed/9").read_bytes) == b"s" * 65_536


# Failing handlers

KINDS: list[Callable[[], BaseException]] = [
    lambda: ValueError("broken"),
    lambda: OSError(errno.ENOSPC, "broken"),
    lambda: MemoryError(),
    lambda: RecursionError(),
    lambda: ExceptionGroup("broken", [KeyError("a"), NotFound("b")]),
    lambda: AssertionError(),
    lambda: StopAsyncIteration(),
]
PARTS: dict[str, tuple[str, Callable[[World], Any], Callable[[World], object]]] = {
    "lookup": ("lookup", lambda w: w.operations.tree, lambda w: os.stat(w.seen("sealed/99"))),
    "getattr": ("attributes", lambda w: w.operations.tree, lambda w: w.seen("unsealed/8").stat()),
    "opendir": (
        "open_directory",
        lambda w: w.operations.handles,
        lambda w: os.listdir(w.mountpoint),
    ),
    "readdir": ("entries", lambda w: w.operations.tree, lambda w: os.listdir(w.mountpoint)),
    "open": ("open", lambda w: w.store, lambda w: w.seen("sealed/7").read_bytes()),
    "read": ("read", lambda w: w.operations.handles, lambda w: w.seen("sealed/7").read_bytes()),
    "statfs": ("storages", lambda w: w.catalog, lambda w: os.statvfs(w.mountpoint)),
    "getxattr": (
        "state",
        lambda w: w.store,
        lambda w: os.getxattr(w.seen("sealed/7"), "user.sectorfs.state"),
    ),
}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("operation", PARTS)
async def test_no_exception_ends_the_mount(
    world: World,
    operation: str,
    make: Callable[[], BaseException],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, part, touch = PARTS[operation]
    world.catalog.declare(sector_file("unsealed/8"), None)

    def broken(*arguments: object, **more: object) -> Any:
        raise make()

    async with world.mounted():
        if operation == "getattr":
            await call(world.seen("unsealed/8").stat)
        with monkeypatch.context() as patch:
            patch.setattr(part(world), name, broken)
            assert await code_of(partial(touch, world)) == errno.EIO
            assert f"{operation} failed" in caplog.text
        assert await call(world.seen("sealed/7").read_bytes) == DATA


@pytest.mark.parametrize("operation", ["forget", "release", "releasedir"])
async def test_no_exception_in_an_answerless_request_ends_the_mount(
    world: World,
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = {"forget": "forget", "release": "release", "releasedir": "release_directory"}[operation]
    part = world.operations.inodes if operation == "forget" else world.operations.handles

    def broken(*arguments: object) -> None:
        raise ValueError("broken")

    async with world.mounted():
        with monkeypatch.context() as patch:
            patch.setattr(part, name, broken)
            await shell(
                'cat "$F" > /dev/null; ls "$M"', F=world.seen("sealed/7"), M=world.mountpoint
            )
            if operation == "forget":
                await shell("echo 2 > /proc/sys/vm/drop_caches")
            await eventually(lambda: f"{operation} failed" in caplog.text)
        assert await call(world.seen("sealed/7").read_bytes) == DATA


async def test_a_deliberate_error_answers_its_errno_and_is_counted(world: World) -> None:
    refused = FUSE_REQUESTS.labels("open", "ENOENT")
    before = refused._value.get()
    async with world.mounted():
        world.path(sector_file("sealed/7")).unlink()
        assert await code_of(world.seen("sealed/7").read_bytes) == errno.ENOENT
    assert refused._value.get() == before + 1


CHANGES = ["setattr", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "create"]
CHANGES += ["write", "setxattr", "removexattr"]


@pytest.mark.parametrize("name", CHANGES)
async def test_handlers_refuse_changes_even_without_the_kernel(world: World, name: str) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await getattr(world.operations, name)(1, b"name", None)
    assert caught.value.errno == errno.EROFS


async def test_handlers_refuse_to_open_for_writing_even_without_the_kernel(world: World) -> None:
    operations: Any = world.operations
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_TRUNC, os.O_APPEND):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.open(1, flags, None)
        assert caught.value.errno == errno.EROFS
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.access(1, os.W_OK, None)
    assert caught.value.errno == errno.EROFS
    assert await operations.access(1, os.R_OK | os.X_OK, None)


# The life of the mount


def mount_line(world: World) -> str:
    """The mount in `/proc/self/mounts`, with its options."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return next(line for line in lines if line.split()[1] == str(world.mountpoint))


def read_ahead_kb(mount: mounts.MountInfo) -> int:
    return int(Path(f"/sys/class/bdi/{mount.major}:{mount.minor}/read_ahead_kb").read_text())


async def test_the_kernel_is_tuned(world: World) -> None:
    async with world.mounted():
        mount = mounts.find_mount(world.mountpoint)
        assert mount is not None
        directory = mounts.connection(mount.minor)
        assert directory is not None
        assert int((directory / "max_background").read_text()) >= 512
        assert int((directory / "congestion_threshold").read_text()) >= 384
        assert read_ahead_kb(mount) == 1024
        line = mount_line(world)
        source, _, kind, options = line.split()[:4]
        assert (source, kind) == ("sectorfs", "fuse.sectorfs")
        assert {"ro", "nosuid", "nodev", "default_permissions"} <= set(options.split(","))
        assert "allow_other" not in options


async def test_allow_other_and_more_options_reach_the_kernel(world: World) -> None:
    mount = Mount(world.mountpoint, world.operations, allow_other=True, options=["noexec"])
    async with mount:
        line = mount_line(world)
        assert {"allow_other", "noexec"} <= set(line.split()[3].split(","))


async def test_an_unknown_option_is_explained_and_the_next_mount_works(world: World) -> None:
    with pytest.raises(MountFailed, match="unknown mount option"):
        async with Mount(
            world.mountpoint, world.operations, allow_other=False, options=["nonsense=1"]
        ):
            raise AssertionError("mounted")
    async with world.mounted():
        assert await call(world.seen("sealed/7").read_bytes) == DATA


async def test_a_mount_the_kernel_refuses_is_explained(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "check_mountpoint", lambda path: None)
    world.mountpoint.rmdir()
    with pytest.raises(MountFailed, match="refused"):
        async with Mount(world.mountpoint, world.operations, allow_other=False):
            raise AssertionError("mounted")
    world.mountpoint.mkdir()
    async with world.mounted():
        assert await call(world.seen("sealed/7").read_bytes) == DATA


async def test_a_mount_that_fails_half_way_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = Mount(world.mountpoint, world.operations, allow_other=False)

    def broken() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(mount._notifier, "start", broken)
    with pytest.raises(RuntimeError, match="new thread"):
        async with mount:
            raise AssertionError("mounted")
    assert mounts.find_mount(world.mountpoint) is None


async def test_a_second_mount_on_one_directory_is_refused(world: World) -> None:
    async with world.mounted():
        with pytest.raises(MountFailed, match="mounted already"):
            async with Mount(world.mountpoint, world.operations, allow_other=False):
                raise AssertionError("mounted")
        assert await call(world.seen("sealed/7").read_bytes) == DATA


async def test_a_stop_unmounts_even_a_busy_mount(world: World) -> None:
    stream = None
    async with world.mounted():
        stream = await call(partial(world.seen("sealed/7").open, "rb"))
        await call(partial(stream.read, 1))
    assert mounts.find_mount(world.mountpoint) is None
    assert world.operations.handles.open_files == 0
    assert all(opened.descriptor.closed for opened in world.store.opened)
    assert stream is not None
    assert await code_of(stream.close) in (None, errno.ENOTCONN)


async def test_a_stop_does_not_wait_for_a_stuck_thread(world: World, memory: Path) -> None:
    world.add_storage(SLOW, memory)
    world.put("sealed/9", b"s" * 65_536, SLOW)
    results: list[int | None] = []

    async def read() -> None:
        results.append(await code_of(world.seen("sealed/9").read_bytes))

    async with trio.open_nursery() as nursery:
        async with bare_mount(world):
            world.store.lanes[SLOW].gate.clear()
            nursery.start_soon(read)
            await eventually(lambda: world.store.waiting == 1)
            started = trio.current_time()
        assert trio.current_time() - started < 5
        assert mounts.find_mount(world.mountpoint) is None
        world.store.lanes[SLOW].gate.set()
    assert results in ([errno.ECONNABORTED], [errno.ENOTCONN])


@asynccontextmanager
async def bare_mount(world: World) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        async with Mount(world.mountpoint, world.operations, allow_other=False) as mount:
            await nursery.start(mount.run)
            yield


async def test_a_stop_by_cancellation_unmounts(world: World) -> None:
    async with trio.open_nursery() as nursery:
        async with Mount(world.mountpoint, world.operations, allow_other=False) as mount:
            await nursery.start(mount.run)
            nursery.cancel_scope.cancel()
            await trio.sleep_forever()
    assert mounts.find_mount(world.mountpoint) is None


async def test_a_crash_leaves_a_dead_mount_and_no_empty_directory(world: World) -> None:
    async def crash() -> None:
        async with bare_mount(world):
            raise ValueError("a fault of the node")

    with pytest.raises(ExceptionGroup):
        await crash()
    assert mounts.find_mount(world.mountpoint) is not None
    assert await code_of(partial(os.listdir, world.mountpoint)) == errno.ENOTCONN
    assert mounts.clear_dead_mount(world.mountpoint, lambda mount: False) is True
    assert await call(partial(os.listdir, world.mountpoint)) == []


async def test_unmounting_from_outside_ends_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted: list[int] = []
    monkeypatch.setattr(mounts, "abort", aborted.append)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            async with Mount(world.mountpoint, world.operations, allow_other=False) as mount:
                await nursery.start(mount.run)
                assert await call(world.seen("sealed/7").read_bytes) == DATA
                await shell('umount "$M"', M=world.mountpoint)
                await mount.ended.wait()
    assert not aborted, "the number may be that of another mount by now"


async def test_aborting_from_outside_ends_the_run_and_is_cleaned_up(world: World) -> None:
    with trio.fail_after(10):
        async with bare_mount(world):
            mount = mounts.find_mount(world.mountpoint)
            assert mount is not None
            mounts.abort(mount.minor)
    assert mounts.find_mount(world.mountpoint) is None


async def test_a_mount_without_fusectl_is_unmounted_too(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mounts, "FUSECTL", tmp_path / "none")
    async with world.mounted():
        assert await call(world.seen("sealed/7").read_bytes) == DATA
    assert mounts.find_mount(world.mountpoint) is None
    assert ("cannot set" in caplog.text) is not kernel.prepare(), "else the introduction set it"


DAEMON = """
import sys, trio
from pathlib import Path
from tests.mount_fixtures import *

async def main():
    world = World(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        world.add_storage(SLOW, Path(sys.argv[2]))
        file = sector_file("sealed/9")
        world.catalog.declare(file, facts_of(world.path(file, SLOW)), SLOW)
    world.put("sealed/7", b"seven")
    async with world.mounted():
        print("ready", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@asynccontextmanager
async def daemon(*arguments: object) -> AsyncIterator[trio.Process]:
    """A mount in a process of its own; killed at the end if it lives."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", DAEMON, *map(str, arguments)],
        stdout=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=str(Path(__file__).parent)),
    )
    try:
        assert process.stdout is not None
        with trio.fail_after(20):
            assert await process.stdout.receive_some(5) == b"ready"
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True), trio.fail_after(20):
            if process.stdout is not None:
                await process.stdout.aclose()
            await process.wait()


async def test_a_killed_daemon_with_a_stuck_thread_is_replaced(tmp_path: Path) -> None:
    """Its thread hangs in a disk that does not even hear of the kill."""
    other = tmp_path / "daemon"
    other.mkdir()
    path = other / "mnt" / "sealed"
    with hung_disk(tmp_path) as disk:
        (disk.source / "sealed").mkdir()
        (disk.source / "sealed" / "s-t01000-9").write_bytes(b"s" * 65_536)
        async with daemon(other, disk.path) as process:
            assert (await wait_shell(f"cat {path}/s-t01000-7")) == "seven"
            disk.hang("open")
            reader = await trio.lowlevel.open_process(
                ["cat", str(path / "s-t01000-9")], stderr=subprocess.DEVNULL
            )
            await eventually(lambda: disk.waiting("open") == 1, 10)
            process.send_signal(signal.SIGKILL)
            await eventually(lambda: thread_states(process.pid) >= {"D"}, 10)
            found = mounts.find_mount(other / "mnt")
            assert found is not None, "the mount outlives its daemon"
            assert mounts.clear_dead_mount(other / "mnt", lambda mount: False) is True
            assert mounts.find_mount(other / "mnt") is None
            with trio.fail_after(10):
                assert await reader.wait() != 0
            async with daemon(other):
                assert (await wait_shell(f"cat {path}/s-t01000-7")) == "seven"
            assert mounts.clear_dead_mount(other / "mnt", lambda mount: False) is True
            assert thread_states(process.pid) >= {"D"}, "it was stuck all the time"
            disk.go()


async def wait_shell(command: str) -> str:
    with trio.fail_after(10):
        return await shell(command)


def thread_states(pid: int) -> set[str]:
    """States of the threads a process still has."""
    states = set()
    for status in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.add(status.read_text().rsplit(")", 1)[1].split()[0])
        except OSError:
            continue
    return states


async def test_a_living_daemon_is_not_cleared_away(tmp_path: Path) -> None:
    async with daemon(tmp_path) as process:
        with pytest.raises(Refused):
            mounts.clear_dead_mount(tmp_path / "mnt", lambda mount: process.poll() is None)
        assert await mounts.wait_mounted(tmp_path / "mnt", patience=1)
        assert (await wait_shell(f"cat {tmp_path}/mnt/sealed/s-t01000-7")) == "seven"
        process.kill()
        await process.wait()
        assert mounts.clear_dead_mount(tmp_path / "mnt", lambda mount: False) is True


async def test_configured_types_are_shown(tmp_path: Path) -> None:
    world = World(tmp_path, MountConfig(types=("piece",)))
    async with world.mounted():
        names = await call(partial(os.listdir, world.mountpoint))
        assert sorted(names) == ["cache", "piece", "sealed", "unsealed"]
