"""Files of other nodes read while they come: real nodes, real mounts."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster import Node, cluster, until
from tests.cluster_fixtures import (
    OLD_NS,
    Background,
    attach,
    cache_of,
    configure,
    leftovers,
    locations,
    metric,
    noise,
    put,
    seen,
    state,
    status,
    timed,
)

pytestmark = pytest.mark.mount

BIG = 1 << 30
STEP = 48 << 20
PIECE = 64 << 10
FETCHED = "sectorfs_fetched_bytes_total"


def put_marked(path: Path, size: int) -> None:
    """A sparse file in which a few places say where they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(size)
        for at in range(0, size, STEP):
            os.pwrite(stream.fileno(), noise(str(at), 4096), at)
    os.utime(path, ns=(OLD_NS, OLD_NS))


class Pair:
    """A node with disks, and one with a mount that reads them."""

    def __init__(self, owner: Node, reader: Node) -> None:
        self.owner = owner
        self.reader = reader
        self.disk = owner.root / "disk"

    def shown(self, name: str) -> Path:
        path = self.reader.mountpoint / name
        seen(name, path.exists)
        return path

    def fetched(self) -> float:
        return metric(self.reader, FETCHED)

    def read_path(self, name: str) -> str:
        return os.getxattr(self.shown(name), "user.sectorfs.read_path").decode()

    def progress(self, name: str) -> int:
        return int(os.getxattr(self.shown(name), "user.sectorfs.progress"))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with cluster(tmp_path, "owner", "reader") as nodes:
        owner, reader = nodes
        for node in nodes:
            configure(node)
        owner.start()
        it = Pair(owner, reader)
        put_marked(it.disk / "unsealed/s-t01000-1", BIG)
        put(it.disk / "sealed/s-t01000-2", noise("two", 24 << 20))
        put_marked(it.disk / "sealed/s-t01000-3", 256 << 20)
        attach(owner, it.disk)
        reader.start(mount=True, index=owner)
        yield it


def test_a_large_file_opens_at_once_and_brings_what_is_read(pair: Pair) -> None:
    shown = pair.shown("unsealed/s-t01000-1")
    assert pair.read_path("unsealed/s-t01000-1") == "stream"
    assert state(shown) == "remote"
    fd = os.open(shown, os.O_RDONLY)
    try:
        assert pair.fetched() <= PIECE
        places = list(range(0, BIG, STEP))
        random.Random(5).shuffle(places)
        for at in places:
            assert os.pread(fd, 4096, at) == noise(str(at), 4096)
            assert os.pread(fd, 100, at + 8192) == bytes(100)
        assert os.pread(fd, 1 << 20, BIG - 10) == bytes(10)
        assert os.pread(fd, 10, BIG) == b""
        assert pair.fetched() < BIG / 8
        assert state(shown) == "partial"
        report = status(pair.reader)
        assert (report.files.open, report.files.stream) == (1, 1)
        assert report.fetches == []
    finally:
        os.close(fd)
    assert cache_of(pair.reader) not in locations(pair.owner, "unsealed/s-t01000-1")


def test_a_file_that_was_read_becomes_a_copy_while_others_read_it(pair: Pair) -> None:
    name, data = "sealed/s-t01000-2", noise("two", 24 << 20)
    shown = pair.shown(name)
    with shown.open("rb", buffering=0) as early:
        assert early.read(10) == data[:10]
        assert shown.read_bytes() == data
        seen("the copy", lambda: cache_of(pair.reader) in locations(pair.owner, name))
        assert pair.read_path(name) == "stream"
        assert pair.fetched() <= len(data)
        os.posix_fadvise(early.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pair.owner.kill()
        early.seek(0)
        assert early.read(len(data)) == data
    seen("its way to be read to be that of copies", lambda: pair.read_path(name) != "stream")
    assert shown.read_bytes() == data
    assert state(shown) == "cached"
    assert leftovers(pair.reader) == []
    assert status(pair.reader).files.stream == 0


def test_a_fill_killed_half_way_goes_on_where_it_was(pair: Pair) -> None:
    name = "sealed/s-t01000-3"
    size = 256 << 20
    shown = pair.shown(name)
    # The end of a mount is an error at `close`.
    with suppress(OSError), shown.open("rb", buffering=0) as stream:
        stream.read(8 << 20)
        reading = Background(lambda: stream.read(size))
        until("half of it", lambda: pair.fetched() > size / 2)
        pair.reader.kill()
        reading.result()
    there = sum(
        int(path.stat().st_blocks) * 512
        for path in leftovers(pair.reader)
        if path.suffix == ".part"
    )
    assert there > size / 4
    pair.reader.start(mount=True, index=pair.owner)
    shown = pair.shown(name)
    assert state(shown) == "partial"
    with shown.open("rb", buffering=0) as stream:
        for at in range(0, size, STEP):
            assert os.pread(stream.fileno(), 4096, at) == noise(str(at), 4096)
        seen("the copy", lambda: cache_of(pair.reader) in locations(pair.owner, name), 60)
    assert pair.fetched() < size * 0.8
    assert leftovers(pair.reader) == []


def test_a_killed_reader_is_gone_at_once_and_its_request_with_it(pair: Pair) -> None:
    shown = pair.shown("unsealed/s-t01000-1")
    with shown.open("rb", buffering=0) as stream:
        pair.owner.send(signal.SIGSTOP)
        outcome, took = timed(lambda: os.pread(stream.fileno(), 4096, BIG // 2))
        assert isinstance(outcome, OSError)
        assert took < 4
        pair.owner.send(signal.SIGCONT)

        def reads() -> bool:
            data, _ = timed(lambda: os.pread(stream.fileno(), 4096, STEP * 10))
            return bool(data == noise(str(STEP * 10), 4096))

        seen("the owner to be back", reads)
