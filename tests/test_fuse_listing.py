"""Listings through the kernel: whole, cheap, and never older than the last change."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from sectorfs.fuse import kernel, mounts, operations
from sectorfs.fuse.inodes import PACKED, InodeKey, type_number
from sectorfs.fuse.listings import KEPT_FOR, Listings
from sectorfs.fuse.notifications import ForgetName, Notice
from sectorfs.metrics import FUSE_REQUESTS
from sectorfs.types import Facts, FileType, MemberFacts
from tests.mount_fixtures import World, call, eventually, sector_file, shell

pytestmark = pytest.mark.mount

MANY = 3000
WAYS = [
    pytest.param(True, id="pages", marks=pytest.mark.skipif(PACKED is None, reason="not built")),
    pytest.param(False, id="names"),
]


SEEKS = """import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.readdir.argtypes = libc.rewinddir.argtypes = libc.telldir.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
libc.telldir.restype = ctypes.c_long
def rest():
    names = []
    while entry := libc.readdir(folder):
        names.append(ctypes.string_at(entry + 19))
    return names
folder = libc.opendir(sys.argv[1].encode())
whole = rest()
assert len(whole) == int(sys.argv[2]) + 2, len(whole)
libc.rewinddir(folder)
for _ in range(1000):
    libc.readdir(folder)
at = libc.telldir(folder)
tail = rest()
assert tail == whole[1000:]
libc.seekdir(folder, at)
assert rest() == tail
"""


@pytest.fixture(params=WAYS)
def world(tmp_path: Path, request: pytest.FixtureRequest) -> World:
    world = World(tmp_path)
    if request.param:
        assert world.operations.writes_pages
    world.operations.writes_pages = request.param
    return world


@pytest.fixture(autouse=True)
def _no_mount_stays(tmp_path: Path) -> Iterator[None]:
    """Whatever a failing test left mounted below its directory goes, without being touched."""
    yield
    for mount in mounts.parse_mountinfo(mounts.MOUNTINFO.read_bytes()):
        if mount.is_ours and mount.path.startswith(str(tmp_path)):
            mounts.abort(mount.minor)
            mounts.detach(mount.path)


def listed(path: Path) -> dict[str, os.stat_result]:
    with os.scandir(path) as entries:
        return {entry.name: entry.stat() for entry in entries}


async def test_every_name_has_its_attributes(world: World) -> None:
    for number in range(MANY):
        facts = None if number % 100 == 7 else Facts(number * 513, number * 10**9 + number)
        world.catalog.declare(sector_file(f"sealed/{number}"), facts)
    async with world.mounted():
        seen = await call(partial(listed, world.mountpoint / "sealed"))
        assert len(seen) == MANY
        for name, status in seen.items():
            number = int(name.removeprefix("s-t01000-"))
            size, time_ns = (0, 0) if number % 100 == 7 else (number * 513, number * 10**9 + number)
            assert (status.st_size, status.st_mtime_ns) == (size, time_ns)
            assert status.st_mtime_ns == status.st_ctime_ns == status.st_atime_ns
            assert status.st_blocks == -(-size // 512)
            assert (status.st_mode, status.st_nlink) == (stat.S_IFREG | 0o444, 1)
            assert (status.st_uid, status.st_gid) == (7, 8)


async def test_a_listed_inode_is_the_one_that_is_looked_up(world: World) -> None:
    for text in ("sealed/7", "sealed/8", "cache/7"):
        world.catalog.declare(sector_file(text), Facts(5, 6))
    world.catalog.declare(sector_file("sealed/9"), None)
    async with world.mounted():
        for folder in ("sealed", "cache"):
            names = await call(partial(listed, world.mountpoint / folder))
            for name, status in names.items():
                number = status.st_ino
                found = world.operations.tree.lookup(
                    type_number(FileType[folder.upper()]), name.encode()
                )
                assert found is not None
                assert found.attributes.number == number
                assert found.key == world.operations.inodes.key(number)


async def test_sector_directories_are_listed_as_such(world: World) -> None:
    members = (MemberFacts("p_aux", 64, 11),)
    world.catalog.declare(sector_file("cache/7"), Facts(64, 77, members))
    world.catalog.declare(sector_file("cache/8"), None)
    async with world.mounted():
        seen = await call(partial(listed, world.mountpoint / "cache"))
        assert {name: status.st_mtime_ns for name, status in seen.items()} == {
            "s-t01000-7": 77,
            "s-t01000-8": 0,
        }
        for status in seen.values():
            assert (status.st_mode, status.st_nlink) == (stat.S_IFDIR | 0o555, 2)
            assert (status.st_size, status.st_blocks) == (0, 0)
        number = seen["s-t01000-7"].st_ino
        assert world.operations.inodes.key(number) == InodeKey(sector_file("cache/7"))


async def test_times_before_the_epoch(world: World) -> None:
    world.catalog.declare(sector_file("sealed/7"), Facts(1, -1_500_000_001))
    async with world.mounted():
        seen = await call(partial(listed, world.mountpoint / "sealed"))
        assert seen["s-t01000-7"].st_mtime_ns == -1_500_000_001


async def test_names_that_vanish_while_they_are_listed_are_left_out(world: World) -> None:
    for number in range(MANY):
        world.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
    async with world.mounted():
        entries = await call(partial(os.scandir, world.mountpoint / "sealed"))
        first = await call(lambda: next(entries).name)
        for number in range(MANY - 1):
            world.catalog.drop(sector_file(f"sealed/{number}"))
        rest = await call(lambda: [entry.name for entry in entries])
        assert first == "s-t01000-0"
        assert rest[-1] == f"s-t01000-{MANY - 1}"
        assert len(rest) < MANY / 2, "only those of the page that was read are there"


async def test_a_listing_can_be_read_again_from_the_start_and_from_the_middle(
    world: World,
) -> None:
    for number in range(MANY):
        world.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
    async with world.mounted():
        folder, many = world.mountpoint / "sealed", MANY
        await shell(
            '"$PY" -c "$PROGRAM" "$D" "$N"', PY=sys.executable, PROGRAM=SEEKS, D=folder, N=many
        )


async def test_what_the_kernel_forgets_leaves_the_table(world: World) -> None:
    for number in range(MANY):
        world.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
    async with world.mounted():
        for _ in range(3):
            assert len(await call(partial(os.listdir, world.mountpoint / "sealed"))) == MANY
        assert len(world.operations.inodes) == MANY
        await call(lambda: Path("/proc/sys/vm/drop_caches").write_text("2"))
        await eventually(lambda: len(world.operations.inodes) < MANY / 10)


# Kept listings


def asked(world: World) -> int:
    """Pages the kernel asked for so far."""
    return int(FUSE_REQUESTS.labels("readdir", "ok")._value.get())


class Told:
    """What the kernel was told, and a way to wait for it."""

    def __init__(self, send: Callable[[Notice], bool]) -> None:
        self._send = send
        self._sent: set[Notice] = set()
        self._marks = 0

    def send(self, notice: Notice) -> bool:
        known = self._send(notice)
        self._sent.add(notice)
        return known

    async def everything(self, world: World) -> None:
        """Wait until the kernel has all news that there are now."""
        self._marks += 1
        mark = sector_file(f"key/{self._marks}")
        world.operations.notifications.forget_name(mark)
        notice = ForgetName(type_number(FileType.KEY), mark.sector.name.encode())
        await eventually(lambda: notice in self._sent)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told(operations._send)
    monkeypatch.setattr(operations, "_send", told.send)
    return told


@pytest.fixture
def kept(world: World) -> World:
    if not kernel.prepare():
        pytest.skip("the kernel keeps listings only with the extension")
    for number in range(MANY):
        world.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
        world.catalog.declare(sector_file(f"cache/{number}"), Facts(1, 1, ()))
    return world


async def test_the_kernel_keeps_a_listing(kept: World) -> None:
    async with kept.mounted():
        for folder in ("sealed", "cache"):
            path = kept.mountpoint / folder
            names = await call(partial(os.listdir, path))
            before = asked(kept)
            for _ in range(3):
                assert await call(partial(os.listdir, path)) == names
            assert asked(kept) == before


async def test_a_name_that_comes_or_goes_is_in_the_next_listing(kept: World, told: Told) -> None:
    async with kept.mounted():
        path = kept.mountpoint / "sealed"
        await call(partial(os.listdir, path))
        for number in (MANY, MANY + 1):
            kept.announce(kept.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1)))
            await told.everything(kept)
            assert f"s-t01000-{number}" in await call(partial(os.listdir, path))
        kept.announce(kept.catalog.drop(sector_file("sealed/5")))
        await told.everything(kept)
        assert "s-t01000-5" not in await call(partial(os.listdir, path))
        assert not await call((path / "s-t01000-5").exists)


async def test_a_listing_under_way_when_a_name_comes_is_not_kept(kept: World, told: Told) -> None:
    async with kept.mounted():
        path = kept.mountpoint / "sealed"
        entries = await call(partial(os.scandir, path))
        await call(lambda: next(entries))
        kept.announce(kept.catalog.declare(sector_file(f"sealed/{MANY}"), Facts(1, 1)))
        await told.everything(kept)
        await call(lambda: path.stat().st_mtime_ns)
        await call(lambda: list(entries))
        assert f"s-t01000-{MANY}" in await call(partial(os.listdir, path))


async def test_a_listing_opened_before_a_name_came_and_read_after_it_is_complete(
    kept: World, told: Told
) -> None:
    async with kept.mounted():
        path = kept.mountpoint / "sealed"
        entries = await call(partial(os.scandir, path))
        kept.announce(kept.catalog.declare(sector_file(f"sealed/{MANY}"), Facts(1, 1)))
        await told.everything(kept)
        await call(lambda: path.stat().st_mtime_ns)
        assert len(await call(lambda: list(entries))) == MANY + 1
        assert len(await call(partial(os.listdir, path))) == MANY + 1


async def test_a_listing_is_read_anew_before_its_names_time_out(kept: World) -> None:
    clock = [1000.0]
    kept.operations.listings = Listings(
        kept.operations.tree, kept.operations.inodes, lambda: clock[0]
    )
    async with kept.mounted():
        path = kept.mountpoint / "sealed"
        for passed, read in ((0, True), (1, False), (KEPT_FOR, True), (1, True), (1, False)):
            clock[0] += passed
            before = asked(kept)
            assert len(await call(partial(os.listdir, path))) == MANY
            assert (asked(kept) > before) == read, passed
