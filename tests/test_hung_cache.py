"""A cache path whose disk hangs or fails: fetches end, everything else goes on, a start starts."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster import Node, cluster, until
from tests.cluster_fixtures import Background, attach, configure, leftovers, noise, put, status
from tests.hung_disk import HungDisk, hung_disk
from tests.mount_clients import Clients

pytestmark = pytest.mark.mount

DISK = 0.5
"""Deadline of a disk in these tests."""
PATIENCE = 8 * DISK
"""How long a write may take."""
SIZE = 3 << 20


class World:
    """A node with files, and one that keeps its copies of them on a disk that can hang."""

    def __init__(self, owner: Node, reader: Node, disk: HungDisk, files: Path, mine: Path) -> None:
        self.owner = owner
        self.reader = reader
        self.disk = disk
        self.files = files
        self.mine = mine
        self.cache = disk.path / "cache"

    def start(self) -> None:
        self.reader.start(mount=True, index=self.owner)

    def shown(self, number: int) -> Path:
        """A file of the owner in the reader's mount."""
        return self.reader.mountpoint / f"sealed/s-t01000-{number}"

    def read(self, number: int) -> bytes:
        until("the name", self.shown(number).exists)
        return self.shown(number).read_bytes()

    def comes_back(self, number: int) -> None:
        """Without anybody's doing, files are fetched again."""

        def reads() -> bool:
            try:
                return self.shown(number).read_bytes() == noise(f"{number}", SIZE)
            except OSError:
                return False

        until("files to be fetched again", reads, 30)
        until("no leftovers", lambda: leftovers(self.reader) == [])

    def own_is_read(self) -> None:
        """What lies here has nothing to do with it."""
        own = self.reader.mountpoint / "sealed/s-t02000-1"
        until("the own file", own.exists)
        started = time.monotonic()
        assert own.read_bytes() == b"own"
        assert time.monotonic() - started < 2

    def problems(self) -> str:
        return " ".join(status(self.reader).problems)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        clients = Clients(tmp_path)
        stack.callback(clients.reap)
        # The disk goes on before the nodes are ended: they could not end while it hangs.
        owner, reader = stack.enter_context(cluster(tmp_path, "owner", "reader"))
        disk = stack.enter_context(hung_disk(tmp_path))
        it = World(owner, reader, disk, tmp_path / "files", tmp_path / "mine")
        configure(owner)
        configure(reader, timeouts={"disk": DISK}, cache={"path": str(it.cache)})
        owner.start()
        for number in range(6):
            put(it.files / f"sealed/s-t01000-{number}", noise(f"{number}", SIZE))
        put(it.mine / "sealed/s-t02000-1", b"own")
        attach(owner, it.files)
        yield it


def test_a_start_while_the_cache_path_hangs(world: World) -> None:
    world.start()
    attach(world.reader, world.mine)
    assert world.read(0) == noise("0", SIZE)
    world.reader.stop()
    world.disk.hang()
    started = time.monotonic()
    world.start()
    assert time.monotonic() - started < 8
    world.own_is_read()
    until("the cache path to be named", lambda: str(world.cache) in world.problems())
    outcome, seconds = Background(lambda: world.read(1)).result()
    assert isinstance(outcome, OSError)
    assert outcome.errno == errno.EIO
    assert seconds < PATIENCE
    world.disk.go()
    world.comes_back(1)
    until("the cache path to be well", lambda: str(world.cache) not in world.problems())


def test_a_start_while_leftovers_cannot_be_cleared(world: World) -> None:
    world.start()
    attach(world.reader, world.mine)
    world.reader.stop()
    fetching = world.disk.source / "cache/sealed/fetching"
    fetching.mkdir(parents=True, exist_ok=True)
    (fetching / "s-t01000-5").write_bytes(b"half")
    world.disk.hang("unlink")
    world.start()
    world.own_is_read()
    outcome, _ = Background(lambda: world.read(0)).result()
    assert isinstance(outcome, OSError)
    assert (fetching / "s-t01000-5").exists()
    world.disk.go()
    world.comes_back(0)


def test_the_first_start_says_that_the_cache_path_hangs(world: World) -> None:
    """Nobody knows its id yet."""
    world.disk.hang()
    world.reader.start(index=world.owner, wait=False)
    until("the reason", lambda: "no answer within" in world.reader.log())
    assert str(world.cache) in world.reader.log()
    world.disk.go()  # until then a thread in the kernel keeps the process
    assert world.reader.process is not None
    assert world.reader.process.wait(10) == 1


@pytest.mark.parametrize("operation", ["write", "fsync", "rename", "create"])
def test_readers_of_a_fetch_into_a_disk_that_hangs_are_let_go(world: World, operation: str) -> None:
    world.start()
    attach(world.reader, world.mine)
    assert world.read(0) == noise("0", SIZE)
    world.disk.hang(operation)
    readers = [Background(lambda number=number: world.read(number)) for number in (1, 1, 2, 3)]
    until("the disk to be asked", lambda: world.disk.waiting(operation) > 0)
    world.own_is_read()
    for reader in readers:
        outcome, seconds = reader.result()
        assert isinstance(outcome, OSError)
        assert outcome.errno == errno.EIO
        assert seconds < 2 * PATIENCE + 8
    for number in (1, 2, 3):
        assert not (world.disk.source / f"cache/sealed/s-t01000-{number}").exists()
    world.disk.go()
    for number in (1, 2, 3):
        world.comes_back(number)


@pytest.mark.parametrize(
    ("operation", "after"),
    [("write", 1 << 20), ("fsync", 0), ("rename", 0), ("create", 0), ("setattr", 0)],
)
def test_a_cache_path_that_fails_fails_fetches_and_nothing_else(
    world: World, operation: str, after: int
) -> None:
    world.start()
    attach(world.reader, world.mine)
    world.disk.fail(operation, after=after, only="s-t01000")
    outcome, _ = Background(lambda: world.read(1)).result()
    assert isinstance(outcome, OSError)
    assert outcome.errno == errno.EIO
    assert str(world.cache) in world.reader.log()
    assert not os.path.lexists(world.disk.source / "cache/sealed/s-t01000-1")
    world.own_is_read()
    world.disk.go()
    world.comes_back(1)
