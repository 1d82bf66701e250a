"""Listings through the kernel: whole, cheap, and never older than the last change."""

from __future__ import annotations

import os
import stat
import sys
from functools import partial
from pathlib import Path

import pytest

from sectorfs.fuse.inodes import PACKED, InodeKey, type_number
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
