"""What tests of whole clusters share: quick settings, looks into nodes, false peers, mounts."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
import trio

from sectorfs.errors import NotFound
from sectorfs.index.protocol import (
    Declaration,
    FsStat,
    HealthReport,
    SectorIndex,
    StorageInfo,
)
from sectorfs.node import access, connect, reports
from sectorfs.node.admin import Admin, PathSettings
from sectorfs.stores.metadata import read_metadata
from sectorfs.types import (
    Facts,
    MemberFacts,
    SectorFile,
    StorageID,
    parse_file_type,
    parse_sector,
)
from sectorfs.wire import tokens
from tests.cluster import Node, until

T = TypeVar("T")

QUICK: dict[str, dict[str, Any]] = {
    "timeouts": {"connect": 1, "first_byte": 1, "progress": 1, "disk": 2},
    "index": {"heartbeat": 1, "cutoff": 5},
}
"""Settings under which a test sees every time-out within seconds."""
LIMIT = 4.0
"""Seconds within which a read must have failed under `QUICK`: one time-out and a busy machine."""
OLD_NS = 1_700_000_000_123_456_789
"""A modification time long ago, with all of its nanoseconds."""


def configure(node: Node, /, **sections: dict[str, Any]) -> None:
    """Write a node's ``config.toml``: the quick settings, and `sections` over them."""
    node.repo.create()
    merged = {name: {**QUICK.get(name, {}), **sections.get(name, {})} for name in QUICK | sections}
    node.repo.config_toml.write_text(tomli_w.dumps(merged))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- content ---


def noise(name: str, size: int) -> bytes:
    """Bytes that differ from name to name."""
    return random.Random(name).randbytes(size)


def put(path: Path, data: bytes, mtime_ns: int = OLD_NS) -> None:
    """Write a file with a modification time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def put_sparse(path: Path, size: int, tail: bytes) -> None:
    """A file of `size` bytes that ends with `tail` and is a hole before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.truncate(size - len(tail))
        stream.seek(size - len(tail))
        stream.write(tail)
    os.utime(path, ns=(OLD_NS, OLD_NS))


def listing(root: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and modification time of everything below a directory, itself included."""
    found = {}
    for path in (root, *sorted(root.rglob("*"))):
        status = path.lstat()
        found[str(path.relative_to(root))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def attach(node: Node, path: Path, *, weight: int = 10) -> str:
    """Initialise and attach a storage path of a running node; its id."""
    settings = PathSettings(can_store=True, weight=weight)
    path.mkdir(parents=True, exist_ok=True)
    return ask(node, lambda admin: admin.attach(str(path), settings))


def rescan(node: Node) -> None:
    """Have a running node look at all its paths now."""
    ask(node, lambda admin: admin.redeclare(None, drop_missing=False))


# --- looks into a running node ---


def ask(node: Node, work: Callable[[Admin], Awaitable[T]]) -> T:
    """Do `work` on a running node, without a process of its own."""

    async def run() -> T:
        async with access.open_admin(node.repo) as admin:
            return await work(admin)

    return trio.run(run)


def status(node: Node) -> reports.StatusReport:
    """The status of a running node."""
    report = trio.run(access.status, node.repo)
    assert report is not None
    return report


def storages(node: Node) -> dict[str, reports.StorageReport]:
    """Every storage of the cluster by id, as the node's Index knows it."""
    return {item.storage: item for item in ask(node, lambda admin: admin.storages())}


def locations(node: Node, name: str) -> dict[str, reports.LocationReport]:
    """The copies of ``sealed/s-t01000-1`` by storage, as the node's Index knows them."""
    file = sector_file(name)

    async def find(admin: Admin) -> list[reports.FileReport]:
        try:
            return (await admin.find(file.sector)).files
        except NotFound:
            return []

    for found in ask(node, find):
        if found.file_type == file.file_type.dir_name:
            return {copy.storage: copy for copy in found.locations}
    return {}


def metric(node: Node, name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"{node.repo.api()}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", text, re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(float(value) for value in values)


def state(path: Path) -> str:
    """Where the mount says that a file is."""
    return os.getxattr(path, "user.sectorfs.state").decode()


def cache_of(node: Node) -> str:
    """Storage id of a node's cache path."""
    return read_metadata(str(node.repo.cache_path(node.repo.config()))).info.storage


def leftovers(node: Node) -> list[Path]:
    """Files of unfinished fetches of a node."""
    root = node.repo.cache_path(node.repo.config())
    return [path for path in root.glob("*/fetching/**/*") if path.is_file()]


def descriptors(node: Node) -> list[str]:
    """What a node has open once it reads nothing, but connections and whole copies: those it keeps.

    What arrives, or was given up, is not kept.
    """
    cache = str(node.repo.cache_path(node.repo.config()))

    def idle() -> list[str] | None:
        found = []
        for entry in Path(f"/proc/{node.pid()}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.append(os.readlink(entry))
        # The kernel tells the end of an open file later, and nobody waits for it.
        copies = [name for name in found if name.startswith(cache)]
        if any("/fetching/" in name or name.endswith(" (deleted)") for name in copies):
            return None
        kept = ("socket:", cache)
        return sorted(name for name in found if not name.startswith(kept))

    return until("open copies to be released", idle)


def threads(node: Node) -> int:
    """How many threads a node has."""
    return len(list(Path(f"/proc/{node.pid()}/task").iterdir()))


# --- expectations ---


def holds(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Poll a condition that must stay true for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert condition(), f"no longer: {what}"
        time.sleep(0.02)  # gives the processes under test the processor


def shows(path: Path, data: bytes) -> bool:
    """True when a path of a mount exists and has these bytes."""
    try:
        return path.read_bytes() == data
    except FileNotFoundError:
        return False


def timed(call: Callable[[], T]) -> tuple[T | OSError, float]:
    """The result of a call, or the `OSError` it raised, and the seconds it took."""
    started = time.monotonic()
    try:
        result: T | OSError = call()
    except OSError as exc:
        result = exc
    return result, time.monotonic() - started


class Background:
    """One call in a thread; `result` waits for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._outcome: tuple[Any, float] | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._outcome = timed(self._call)

    @property
    def done(self) -> bool:
        """True once the call returned or raised."""
        return self._outcome is not None

    def result(self, deadline: float = 30) -> tuple[Any, float]:
        """What `timed` says of the call."""
        self._thread.join(deadline)
        assert self._outcome is not None, f"still running after {deadline} s"
        return self._outcome


# --- other file systems ---


@contextmanager
def mounted(*command: str, at: Path) -> Iterator[None]:
    """``mount COMMAND AT`` for the time of the block; gone afterwards, busy or not."""
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *command, str(at)], check=True, capture_output=True)
    try:
        yield
    finally:
        unmount(at)


def unmount(at: Path) -> None:
    """Take the topmost mount away, busy or not; none there is fine."""
    subprocess.run(["umount", "-l", str(at)], capture_output=True)


# --- peers that lie ---

Behaviour = Callable[[socket.socket, str], None]
"""Answers one request (its path given) on a connection, which is closed afterwards."""


class FalsePeer:
    """A server that answers every request as a behaviour says; for peers that fail or lie."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._closing = threading.Event()
        self.gate = threading.Event()
        """Behaviours that stop half way wait for it; set at the end."""
        self.requests: list[str] = []
        """Paths asked for."""
        self.heads: list[str] = []
        """Requests without their bodies."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/remote"
        """Base URL, as the Index lists it."""
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._closing.is_set():
                connection.close()
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(65536)
                if not piece:
                    return
                head += piece
            path = head.split(b" ", 2)[1].decode()
            self.requests.append(path)
            self.heads.append(head.decode())
            self._behaviour(connection, path)

    def close(self) -> None:
        """End every thread; once is enough."""
        if self._closing.is_set():
            return
        self._closing.set()
        self.gate.set()
        with suppress(OSError), socket.create_connection(self._listener.getsockname(), 5):
            pass
        self._threads[0].join(10)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


@contextmanager
def false_peer(behaviour: Callable[[FalsePeer], Behaviour]) -> Iterator[FalsePeer]:
    """A false peer for the time of the block."""
    chosen: list[Behaviour] = []
    peer = FalsePeer(lambda connection, path: chosen[0](connection, path))
    chosen.append(behaviour(peer))
    try:
        yield peer
    finally:
        peer.close()


def octets(length: int, status: str = "200 OK", headers: bytes = b"") -> bytes:
    """The head of an answer with a body of so many bytes."""
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: application/octet-stream\r\n".encode()
        + headers
        + f"content-length: {length}\r\nconnection: close\r\n\r\n".encode()
    )


# --- declarations by hand ---


def sector_file(name: str) -> SectorFile:
    """``sealed/s-t01000-1`` as a value."""
    file_type, _, sector = name.partition("/")
    return SectorFile(parse_file_type(file_type), parse_sector(sector))


def facts_of(path: Path) -> Facts:
    """The facts of a file or of a directory of files."""
    status = path.stat()
    if not path.is_dir():
        return Facts(status.st_size, status.st_mtime_ns)
    members = []
    for entry in sorted(path.iterdir()):
        found = entry.stat()
        members.append(MemberFacts(entry.name, found.st_size, found.st_mtime_ns))
    return Facts(sum(one.size for one in members), status.st_mtime_ns, tuple(members))


def with_index(index: Node, work: Callable[[SectorIndex], Awaitable[T]]) -> T:
    """Do `work` on the Index of a running node, over its RPC."""

    async def run() -> T:
        repo = index.repo
        config = repo.config().replace(index={"url": f"{repo.api()}/rpc/v0"})
        token = tokens.sign(repo.secret(create=False), ("admin",))
        async with connect.open_index(repo, config, token) as client:
            return await work(client)

    return trio.run(run)


def declare_at(
    index: Node, storage: str, url: str, held: dict[str, Facts | None], *, weight: int = 1000
) -> None:
    """Attach a storage under a URL and declare files on it, as a node there would."""
    known = StorageID(storage)

    async def work(client: SectorIndex) -> None:
        info = StorageInfo(storage=known, urls=(url,), weight=weight, can_store=True)
        await client.attach(info, FsStat(capacity=1 << 40, available=1 << 39))
        await client.report_health(known, HealthReport(stat=FsStat(capacity=1 << 40)))
        await client.declare(
            [Declaration(sector_file(name), known, True, facts) for name, facts in held.items()]
        )

    with_index(index, work)


def seen(what: str, condition: Callable[[], object], deadline: float = 15.0) -> float:
    """Wait until a condition is true; the seconds it took."""
    started = time.monotonic()
    until(what, condition, deadline)
    return time.monotonic() - started
