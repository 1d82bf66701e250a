"""Large local files are read past the daemon: through real mounts on real file systems."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from sectorfs.fuse import kernel, mounts
from sectorfs.metrics import FUSE_REQUESTS
from sectorfs.types import StorageID
from tests.file_systems import KINDS, file_system, why_not
from tests.mount_fixtures import (
    HERE,
    World,
    call,
    eventually,
    eventually_seen,
    open_descriptors,
    sector_file,
    shell,
)

pytestmark = pytest.mark.mount

MIB = 1 << 20
OTHER = StorageID("other")
FOREIGN = StorageID("foreign")


def data_of(seed: int, size: int = 2 * MIB) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.store.proved = True
    world.put("sealed/7", data_of(7))
    world.put("sealed/8", data_of(8, 4096))
    return world


@pytest.fixture(autouse=True)
def _no_mount_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for mount in mounts.parse_mountinfo(mounts.MOUNTINFO.read_bytes()):
        if mount.is_ours and mount.path.startswith(str(tmp_path)):
            mounts.abort(mount.minor)
            mounts.detach(mount.path)


@asynccontextmanager
async def passing(world: World) -> AsyncIterator[None]:
    """The world mounted, on a machine that has passthrough; nothing leaks over its end."""
    async with world.mounted():
        if not kernel.offer().passthrough:
            pytest.skip(kernel.offer().reason)
        yield
    for path in world.store.roots.values():
        for one in path.rglob("s-t*"):
            await eventually(partial(_is_closed, one))


def _is_closed(path: Path) -> bool:
    return open_descriptors(path) == 0


def reads() -> float:
    """Reads that the daemon answered, with Python or without."""
    return float(FUSE_REQUESTS.labels("read", "ok")._value.get()) + kernel.reads()


def read_path(path: Path) -> str:
    return os.getxattr(path, "user.sectorfs.read_path").decode()


def open_file(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def holds(path: Path, data: bytes) -> bool:
    return path.read_bytes() == data


async def close(*fds: int) -> None:
    """In a thread, as everything that asks the mount: the loop has to answer."""
    for fd in fds:
        await call(partial(os.close, fd))


MAPPED = "import mmap, sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=1)"


async def digest_of_mapping(path: Path) -> str:
    """By another process: one that maps a file needs its interpreter's lock for a page fault."""
    script = f"{MAPPED}; import hashlib; print(hashlib.sha256(m).hexdigest())"
    return (await shell(f"{sys.executable} -c '{script}' {path}")).strip()


async def content(path: Path) -> bytes:
    return await call(path.read_bytes)


# --- which, and how it is told ---


@pytest.mark.parametrize("kind", KINDS)
async def test_a_large_file_is_read_past_the_daemon(tmp_path: Path, kind: str) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    with file_system(tmp_path, kind) as root:
        world = World(root)
        world.store.proved = True
        world.put("sealed/7", data_of(7, MIB))
        world.put("sealed/8", data_of(8, MIB - 1))
        async with passing(world):
            before = reads()
            digest = await digest_of_mapping(world.seen("sealed/7"))
            assert digest == hashlib.sha256(data_of(7, MIB)).hexdigest()
            fd = await call(lambda: open_file(world.seen("sealed/7")))
            assert await call(lambda: os.pread(fd, 2 * MIB, 0)) == data_of(7, MIB)
            assert reads() == before
            counts = world.operations.handles.counts()
            assert (counts.passthrough, counts.daemon) == (1, 0)
            assert await content(world.seen("sealed/8")) == data_of(8, MIB - 1)
            assert reads() > before
            await close(fd)
            await eventually(lambda: world.operations.handles.open_files == 0)
            assert world.operations.handles.counts().kept == 2


async def test_without_it_everything_is_read_by_the_daemon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = kernel.Offer(False, False, False, "not today")
    monkeypatch.setattr(kernel, "offer", lambda: none)
    async with world.mounted():
        before = reads()
        assert await content(world.seen("sealed/7")) == data_of(7)
        assert reads() > before
        assert world.operations.handles.counts().passthrough == 0


# --- one content while it is open ---


@pytest.mark.parametrize("name", ["sealed/7", "sealed/8"])
async def test_a_replaced_file_keeps_its_bytes_for_its_readers(world: World, name: str) -> None:
    async with passing(world):
        old = await content(world.seen(name))
        fd = await call(lambda: open_file(world.seen(name)))
        for turn in range(3):
            new = data_of(100 + turn, len(old) + turn)
            world.put(name, new)
            await eventually_seen(partial(holds, world.seen(name), new))
            assert await call(lambda: os.pread(fd, len(old) + 9, 0)) == old
        await close(fd)


async def test_a_dropped_file_keeps_its_bytes_for_its_readers(world: World) -> None:
    async with passing(world):
        fd = await call(lambda: open_file(world.seen("sealed/7")))
        world.path(sector_file("sealed/7")).unlink()
        world.announce(world.catalog.drop(sector_file("sealed/7")))
        await eventually_seen(lambda: not world.seen("sealed/7").exists())
        assert await call(lambda: os.pread(fd, 2 * MIB, 0)) == data_of(7)
        await close(fd)
        await eventually(lambda: open_descriptors(world.path(sector_file("sealed/7"))) == 0)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_a_removed_file_gives_its_room_back(tmp_path: Path, kind: str) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    with file_system(tmp_path, kind) as root:
        world = World(root)
        world.store.proved = True
        path = world.put("sealed/7", data_of(7, 64 * MIB))
        os.sync()
        async with passing(world):
            assert await content(world.seen("sealed/7")) == data_of(7, 64 * MIB)
            path.unlink()
            before = os.statvfs(root).f_bfree
            world.announce(world.catalog.drop(sector_file("sealed/7")))
            block = os.statvfs(root).f_bsize

            def freed() -> bool:
                os.sync()
                return (os.statvfs(root).f_bfree - before) * block >= 60 * MIB

            await eventually_seen(freed)


async def test_an_equal_file_in_its_place_is_another_inode(world: World) -> None:
    """Same size and time: the old one's blocks and disk are not held by its new readers."""
    async with passing(world):
        path = world.path(sector_file("sealed/7"))
        times = path.stat()
        fd = await call(lambda: open_file(world.seen("sealed/7")))
        aside = path.with_name("aside.tmp")
        aside.write_bytes(data_of(7))
        os.utime(aside, ns=(times.st_atime_ns, times.st_mtime_ns))
        aside.rename(path)
        other = await call(lambda: open_file(world.seen("sealed/7")))
        assert os.fstat(other).st_ino != os.fstat(fd).st_ino
        assert world.operations.handles.counts().passthrough == 2
        for one in (fd, other):
            assert await call(partial(os.pread, one, 2 * MIB, 0)) == data_of(7)
            await close(one)


async def test_a_lost_storage_serves_its_readers_and_nobody_else(world: World) -> None:
    async with passing(world):
        fd = await call(lambda: open_file(world.seen("sealed/7")))
        world.operations.handles.backing.lose(HERE)
        other = await call(lambda: open_file(world.seen("sealed/7")))
        assert os.fstat(other).st_ino != os.fstat(fd).st_ino
        assert await call(lambda: os.pread(fd, 9, 0)) == data_of(7)[:9]
        await close(fd, other)


# --- under load ---


class Storm:
    """Readers of a few files that change all the time."""

    NAMES = tuple(f"sealed/{number}" for number in range(20, 24))
    SIZES = (MIB, MIB + 4096, 4096)

    def __init__(self, world: World) -> None:
        self.world = world
        self.contents: dict[str, set[bytes]] = {name: set() for name in self.NAMES}
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.opens = 0
        self.random = random.Random(1)

    def put(self, name: str, storage: StorageID) -> None:
        """New content of a size that may be read in either way; readers may get it at once."""
        data = data_of(self.random.getrandbits(30), self.random.choice(self.SIZES))
        with self.lock:
            self.contents[name].add(data)
        self.world.put(name, data, storage)

    def read(self, seed: int) -> None:
        """What one of the threads does."""
        choose = random.Random(seed)
        try:
            while not self.stop.is_set():
                self._read_one(choose.choice(self.NAMES), choose)
        except BaseException as exc:
            self.errors.append(exc)

    def _read_one(self, name: str, choose: random.Random) -> None:
        try:
            fd = open_file(self.world.seen(name))
        except OSError as exc:
            # A name may be gone for a moment, or another twice in one open.
            if exc.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return
        try:
            size = os.fstat(fd).st_size
            data = os.pread(fd, 2 * MIB, 0)
            assert len(data) == size
            with self.lock:
                assert data in self.contents[name], "bytes that were never written"
        finally:
            os.close(fd)
        self.opens += 1

    def change(self) -> None:
        """One change of the world: on the loop."""
        name, chance = self.random.choice(self.NAMES), self.random.random()
        file = sector_file(name)
        handles = self.world.operations.handles
        if chance < 0.3:
            self.put(name, HERE)
        elif chance < 0.5:  # the same again: an inode with another file
            path = self.world.path(file)
            if path.exists():
                self._copy_in_place(path)
        elif chance < 0.6:
            self._drop(name)
        elif chance < 0.7:
            self.world.store.proved = not self.world.store.proved
        elif chance < 0.8:
            handles.backing.lose(HERE)
        elif chance < 0.9:
            handles.backing.changed(file)
        else:
            handles.backing._limit = self.random.choice([1, 3, 100])

    def _copy_in_place(self, path: Path) -> None:
        times = path.stat()
        aside = path.with_name("aside.tmp")
        aside.write_bytes(path.read_bytes())
        os.utime(aside, ns=(times.st_atime_ns, times.st_mtime_ns))
        aside.rename(path)

    def _drop(self, name: str) -> None:
        file = sector_file(name)
        if file in self.world.catalog.files:
            self.world.announce(self.world.catalog.drop(file))
            self.world.path(file).unlink()


async def test_switching_under_load_never_gives_eio(world: World) -> None:
    """Sixteen threads open, read and close what is replaced, dropped, evicted and reopened."""
    storm = Storm(world)
    for name in storm.NAMES:
        storm.put(name, HERE)
    async with passing(world):
        async with trio.open_nursery() as nursery:
            for seed in range(16):
                nursery.start_soon(call, partial(storm.read, seed))
            for _ in range(1500):
                if storm.errors:
                    break
                storm.change()
                await trio.sleep(0.001)
            storm.stop.set()
        assert storm.errors == []
        assert storm.opens > 500
        await eventually(lambda: world.operations.handles.open_files == 0)
        for name in storm.NAMES:
            world.operations.handles.backing.changed(sector_file(name))
        assert len(world.operations.handles.backing) == 0
