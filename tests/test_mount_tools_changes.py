"""Files that change under their readers: each reader has one content, and none has an error.

With and without the extension for the kernel. Versions of a file are told apart by every one of
their bytes, so that a read which mixes two of them cannot pass.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.cluster import Node, until, write
from tests.cluster_fixtures import Background, attach
from tests.tools_fixtures import MIB, WAYS, MountedDisks, mounted_disks, node_of

pytestmark = pytest.mark.mount

THREADS = 16
SIZES = (64 << 10, 3 * MIB // 2)
"""Of small files, and of files that the kernel may read without the daemon."""


def version(name: str, number: int, size: int) -> bytes:
    """A content that says in every 32 bytes whose and which it is."""
    return f"{name[-20:]:>22}{number:>9}\n".encode() * (size // 32)


# --- one change at a time ---


@pytest.fixture(scope="module", params=WAYS)
def disks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MountedDisks]:
    with mounted_disks(tmp_path_factory.mktemp("changes"), request.param) as found:
        yield found


class Reader:
    """One that has a file open and mapped, and has read only its first bytes."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._content = content
        self.fd = os.open(path, os.O_RDONLY)
        self._view = mmap.mmap(self.fd, 0, prot=mmap.PROT_READ)
        self.number = os.fstat(self.fd).st_ino
        assert os.pread(self.fd, 32, 0) == content[:32]

    def check(self) -> None:
        """Everything is as it was when it was opened."""
        size = len(self._content)
        assert os.fstat(self.fd).st_size == size
        assert os.pread(self.fd, size + 1, 0) == self._content
        assert self._view[:] == self._content

    def close(self) -> None:
        """Close it; when its daemon was killed, nobody is there to be told."""
        self._view.close()
        assert code(os.close, self.fd) in (0, errno.ENOTCONN)


def test_readers_keep_what_they_opened_while_files_change(disks: MountedDisks) -> None:
    """Replaced, dropped and come back; on every file system at once, small and large."""
    names = [
        (disk.root, disk.own("sealed", 20 + step), size)
        for disk in disks.disks.values()
        for step, size in enumerate(SIZES)
    ]
    with ExitStack() as stack:
        readers: list[Reader] = []

        def put_and_open(number: int, extra: int) -> list[Reader]:
            for root, name, size in names:
                write(root / name, version(name, number, size + extra))
            opened = []
            for _, name, size in names:
                content = version(name, number, size + extra)
                until(f"{name} {number}", lambda name=name, c=content: holds(name, c))
                opened.append(Reader(disks.seen(name), content))
                stack.callback(opened[-1].close)
            readers.extend(opened)
            return opened

        def holds(name: str, content: bytes) -> bool:
            try:
                return disks.seen(name).read_bytes() == content
            except FileNotFoundError:
                return False

        first = put_and_open(1, 0)
        second = put_and_open(2, 0)
        for before, after in zip(first, second, strict=True):
            assert before.number != after.number, "new content has a new number"
        put_and_open(3, 32)
        for root, name, _ in names:
            (root / name).unlink()
        for _, name, _ in names:
            until(f"{name} to vanish", lambda name=name: not disks.seen(name).exists())
        for reader in readers:
            reader.check()
        put_and_open(4, -32)
        for reader in readers:
            reader.check()


def test_the_next_open_sees_what_replaced_a_file(disks: MountedDisks) -> None:
    """At once where it lies, however often it changes and whoever has it open."""
    disk = next(iter(disks.disks.values()))
    names = [(disk.own("sealed", 40 + step), size) for step, size in enumerate(SIZES)]
    for name, size in names:
        write(disk.root / name, version(name, 0, size))
        until(name, disks.seen(name).exists)
    with ExitStack() as stack:
        readers = []
        for number, (name, size) in itertools.product(range(1, 3), names):
            content = version(name, number, size)
            write(disk.root / name, content)
            readers.append(Reader(disks.seen(name), content))
            stack.callback(readers[-1].close)
        for reader in readers:
            reader.check()


# --- many changes while many read ---


class Load:
    """Threads that open, read and map files all the time, and what they found."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._finished = [0] * THREADS
        self.reads: Counter[tuple[str, int]] = Counter()
        """By name and version."""
        self.wrong: Counter[str] = Counter()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(THREADS)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a reader hangs"

    def settle(self) -> None:
        """Wait until every read that is under way has ended.

        The kernel looks a name up once more when its file was switched during an open; an open that
        meets a second switch is ESTALE.
        """
        before = list(self._finished)
        until(
            "every reader to go on",
            lambda: all(now > then for now, then in zip(self._finished, before, strict=True)),
        )

    def _run(self, number: int) -> None:
        choice = random.Random(number)
        ways = itertools.cycle([self._read, self._map, self._read_twice])
        while not self._stop.is_set():
            path, way = choice.choice(self._paths), next(ways)
            try:
                found = self._judge(path, way(path))
            except OSError as exc:
                found = errno.errorcode[exc.errno or 0]
            with self._lock:
                if isinstance(found, int):
                    self.reads[path.name, found] += 1
                else:
                    self.wrong[f"{way.__name__}: {found}"] += 1
            self._finished[number] += 1

    def _judge(self, path: Path, data: bytes) -> int | str:
        """The version of a file that was read, or what is wrong with it."""
        if not data or data != data[:32] * (len(data) // 32):
            return f"{len(data)} bytes of several versions"
        if data[:22].decode().strip() not in str(path):
            return "bytes of another file"
        return int(data[22:31])

    def _read(self, path: Path) -> bytes:
        return path.read_bytes()

    def _map(self, path: Path) -> bytes:
        with path.open("rb", buffering=0) as file:
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                return view[:]

    def _read_twice(self, path: Path) -> bytes:
        """Through one handle, with another open between; a mixture when they differ."""
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            first = os.pread(fd, size, 0)
            self._read(path)
            return first if os.pread(fd, size, 0) == first else first + b"?"
        finally:
            os.close(fd)


@pytest.fixture(params=WAYS)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Starts mounted nodes that read one way; all are ended."""
    with ExitStack() as stack:

        def started(name: str, index: Node | None = None) -> Node:
            node = node_of(tmp_path, request.param, name)
            stack.callback(node.end)
            node.start(mount=True, index=index)
            return node

        yield started


@pytest.fixture
def owner(start: Callable[..., Node], tmp_path: Path) -> Node:
    """A node with small and large files on its disk."""
    node = start("owner")
    for name, size in SWITCHED.items():
        write(tmp_path / "disk" / name, version(name, 0, size))
    attach(node, tmp_path / "disk")
    until("the files", lambda: all(path.exists() for path in seen_by(node)))
    return node


SWITCHED = dict(
    zip((f"sealed/s-t01000-{number}" for number in range(6)), itertools.cycle(SIZES), strict=False)
)
ROUNDS = 6


def seen_by(node: Node) -> list[Path]:
    return [node.mountpoint / name for name in SWITCHED]


def test_files_replaced_while_sixteen_threads_read(owner: Node, tmp_path: Path) -> None:
    with Load(seen_by(owner)) as load:
        for number in range(1, ROUNDS):
            load.settle()
            for name, size in SWITCHED.items():
                write(tmp_path / "disk" / name, version(name, number, size))
            for name in SWITCHED:
                wanted = (Path(name).name, number)
                until(f"{wanted} to be read", lambda wanted=wanted: load.reads[wanted] >= 3)
    assert load.wrong == {}
    assert sum(load.reads.values()) > ROUNDS * len(SWITCHED) * 3


def test_copies_evicted_while_sixteen_threads_read(owner: Node, start: Callable[..., Node]) -> None:
    """Fetched, thrown out and fetched again, on a node that holds nothing itself."""
    reader = start("reader", owner)
    cache = reader.repo.cache_path(reader.repo.config())
    until("the files", lambda: all(path.exists() for path in seen_by(reader)))
    with Load(seen_by(reader)) as load:
        for _ in range(ROUNDS):
            load.settle()
            for name in SWITCHED:
                until(f"a copy of {name}", (cache / name).exists)
                (cache / name).unlink()
                wanted = (Path(name).name, 0)
                enough = load.reads[wanted] + 3
                until("it is read again", lambda w=wanted, e=enough: load.reads[w] >= e)
    assert load.wrong == {}


# --- the daemon dies ---


def test_open_files_of_a_killed_daemon(owner: Node) -> None:
    """What is read past it goes on to the end, also beside the next daemon; nothing hangs."""
    small, large = (owner.mountpoint / name for name in list(SWITCHED)[:2])
    with ExitStack() as stack:
        reader = Reader(large, version(f"sealed/{large.name}", 0, SIZES[1]))
        stack.callback(reader.close)
        fd = os.open(small, os.O_RDONLY)
        stack.callback(code, os.close, fd)
        past = os.getxattr(large, "user.sectorfs.read_path") == b"passthrough"
        owner.kill()
        assert code(os.listdir, owner.mountpoint) == errno.ENOTCONN
        assert code(os.open, large, os.O_RDONLY) == errno.ENOTCONN
        assert code(os.read, fd, 1) in (errno.ENOTCONN, errno.ECONNABORTED)
        if past:
            reader.check()
        owner.start(mount=True)
        until("the files", small.exists)
        for path, size in ((small, SIZES[0]), (large, SIZES[1])):
            assert path.read_bytes() == version(f"sealed/{path.name}", 0, size)
        assert code(os.read, fd, 1) in (errno.ENOTCONN, errno.ECONNABORTED)
        if past:
            reader.check()


def code(call: Callable[..., object], *arguments: object) -> int:
    """The errno a call fails with, within bounds of time; 0 when it succeeds."""
    outcome, _ = Background(partial(call, *arguments)).result(20)
    return (outcome.errno or -1) if isinstance(outcome, OSError) else 0
