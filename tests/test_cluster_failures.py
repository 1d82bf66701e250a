"""What a cluster does when a part of it dies, hangs, lies, fills up or goes away."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster import Node, cluster, digest, until, write
from tests.cluster_fixtures import (
    LIMIT,
    Background,
    Behaviour,
    FalsePeer,
    attach,
    cache_of,
    configure,
    declare_at,
    descriptors,
    facts_of,
    false_peer,
    free_port,
    leftovers,
    locations,
    mounted,
    noise,
    octets,
    put,
    put_sparse,
    rescan,
    seen,
    shows,
    state,
    status,
    storages,
    threads,
    timed,
    unmount,
)

pytestmark = pytest.mark.mount

BIG = 1 << 30
"""Bytes of a sparse file whose fetch takes long enough to be caught in the middle."""


def _failed(outcome: object) -> bool:
    """True for the EIO that a reader gets when nobody can give a file."""
    return isinstance(outcome, OSError) and outcome.errno == errno.EIO


# --- the owner dies or hangs during a fetch ---


class Trio:
    """The Index with a disk, an owner with a disk, and a reader with a mount."""

    def __init__(self, index: Node, owner: Node, reader: Node) -> None:
        self.index, self.owner, self.reader = index, owner, reader
        self.big, self.far, self.near = (
            "sealed/s-t01000-1",
            "sealed/s-t01000-2",
            "sealed/s-t01000-3",
        )
        self.owner_disk = owner.root / "owner-disk"
        self.index_disk = index.root / "index-disk"

    def fill(self) -> None:
        put_sparse(self.owner_disk / self.big, BIG, b"the end")
        for number in range(20, 40):
            put(self.owner_disk / "unsealed" / f"s-t01000-{number}", noise(str(number), 20_000))
            put(
                self.index_disk / "unsealed" / f"s-t01000-{number + 20}", noise(str(number), 20_000)
            )
        put(self.owner_disk / self.near, b"from the owner")
        put(self.index_disk / self.far, b"from the index node")
        attach(self.owner, self.owner_disk)
        attach(self.index, self.index_disk)
        for name in (self.big, self.far, self.near):
            seen(name, lambda name=name: self.shown(name).exists())

    def shown(self, name: str) -> Path:
        return self.reader.mountpoint / name

    def start_owner(self) -> None:
        self.owner.start(index=self.index)

    def fetching(self) -> bool:
        """True while the big file is arriving."""
        return any(path.stat().st_size for path in _there(leftovers(self.reader)))


def _there(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Trio]:
    with cluster(tmp_path, "index", "owner", "reader") as nodes:
        for node in nodes:
            configure(node)
        found = Trio(*nodes)
        found.index.start("--listen", f"127.0.0.1:{free_port()}")
        found.start_owner()
        found.reader.start(mount=True, index=found.index)
        found.fill()
        yield found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_owner_is_lost_during_a_fetch(three: Trio, how: signal.Signals) -> None:
    owner, reader = three.owner, three.reader
    assert three.shown(three.near).read_bytes() == b"from the owner"  # warms what is kept open
    assert three.shown(three.far).read_bytes() == b"from the index node"
    files, running = descriptors(reader), threads(reader)

    reading = Background(three.shown(three.big).read_bytes)
    until("the fetch to be under way", three.fetching)
    assert not reading.done
    assert state(three.shown(three.big)) == "partial"
    owner.process.send_signal(how)  # type: ignore[union-attr]  # it was started
    lost = Background(lambda: until("the read to fail", lambda: reading.done, 20))
    # Others go on meanwhile.
    for number in range(40, 45):
        (data, took) = timed(three.shown(f"unsealed/s-t01000-{number}").read_bytes)
        assert data == noise(str(number - 20), 20_000)
        assert took < 1
    outcome, _ = reading.result()
    assert _failed(outcome), outcome
    assert lost.result()[1] < LIMIT
    # So does another file of the lost owner: one time-out each, no more.
    outcome, took = timed(three.shown("unsealed/s-t01000-20").read_bytes)
    assert _failed(outcome), outcome
    assert took < LIMIT
    # What was read before is here still.
    assert three.shown(three.near).read_bytes() == b"from the owner"
    # What came of the big file stays, to be gone on with.
    begun = Path(three.big).name
    assert {path.name for path in leftovers(reader)} == {f"{begun}.part", f"{begun}.map"}
    assert not status(reader).fetches
    assert descriptors(reader) == files
    assert "no source can give it" in reader.log()
    assert "Traceback" not in reader.log()

    if how is signal.SIGSTOP:
        owner.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]  # it was started
    else:
        owner.process.wait()  # type: ignore[union-attr]  # it was started
        three.start_owner()
    data = noise("21", 20_000)
    seen("the owner to be back", lambda: _reads(three.shown("unsealed/s-t01000-21"), data))
    assert digest(three.shown(three.big)) == digest(three.owner_disk / three.big)
    seen("the copy", lambda: leftovers(reader) == [])
    assert descriptors(reader) == files
    seen("threads to end", lambda: threads(reader) <= running + 2, 20)


def _reads(path: Path, data: bytes) -> bool:
    content, _ = timed(path.read_bytes)
    return not _failed(content) and content == data


def test_the_reader_is_killed_during_a_fetch(three: Trio) -> None:
    reading = Background(three.shown(three.big).read_bytes)
    until("the fetch to be under way", three.fetching)
    three.reader.kill()
    outcome, _ = reading.result()
    assert isinstance(outcome, OSError)
    assert leftovers(three.reader)
    three.reader.start(mount=True, index=three.index)
    seen("the tree", lambda: three.shown(three.big).exists())
    assert state(three.shown(three.big)) == "partial"
    assert list(locations(three.index, three.big)) == [
        storage
        for storage, item in storages(three.index).items()
        if item.files.get("unsealed") and item.urls == [f"{three.owner.repo.api()}/remote"]
    ]
    assert digest(three.shown(three.big)) == digest(three.owner_disk / three.big)
    seen("the copy", lambda: state(three.shown(three.big)) == "cached")
    assert leftovers(three.reader) == []


def test_many_readers_of_a_hung_owner_fail_together_and_hold_up_nobody(three: Trio) -> None:
    three.owner.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]  # it was started
    readers = [
        Background(three.shown(f"unsealed/s-t01000-{number}").read_bytes)
        for number in range(20, 40)
    ]
    for number in range(40, 60):
        data, took = timed(three.shown(f"unsealed/s-t01000-{number}").read_bytes)
        assert data == noise(str(number - 20), 20_000)
        assert took < 1
    for reader in readers:
        outcome, took = reader.result()
        assert _failed(outcome), outcome
        assert took < 2 * LIMIT  # eight at a time from one peer
    three.owner.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]  # it was started
    for number in range(20, 40):
        shown, data = three.shown(f"unsealed/s-t01000-{number}"), noise(str(number), 20_000)
        seen("the owner to be back", lambda shown=shown, data=data: _reads(shown, data))


def test_the_owner_of_the_only_copy_is_shown_unavailable_and_heals(three: Trio) -> None:
    shown = three.shown("unsealed/s-t01000-22")
    assert state(shown) == "remote"
    three.owner.kill()
    seen("its loss", lambda: state(shown) == "unavailable")
    assert not next(iter(locations(three.reader, "unsealed/s-t01000-22").values())).healthy
    assert shown.stat().st_size == 20_000
    three.start_owner()
    seen("its return", lambda: state(shown) == "remote")
    assert shown.read_bytes() == noise("22", 20_000)


# --- two sources, one of them bad ---


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node, Path]]:
    """An owner with the Index, a mounted reader, and the owner's disk."""
    with cluster(tmp_path_factory.mktemp("twins"), "owner", "reader") as nodes:
        owner, reader = nodes
        configure(owner, index={"cutoff": 60})
        configure(reader, index={"cutoff": 60})
        owner.start()
        reader.start(mount=True, index=owner)
        disk = owner.root / "disk"
        attach(owner, disk)
        yield owner, reader, disk


def _hang(peer: FalsePeer) -> Behaviour:
    return lambda connection, path: (peer.gate.wait(), None)[1]


def _hang_midway(peer: FalsePeer) -> Behaviour:
    def answer(connection: socket.socket, path: str) -> None:
        connection.sendall(octets(100_000) + b"x" * 30_000)
        peer.gate.wait()

    return answer


def _says(answer: bytes) -> Callable[[FalsePeer], Behaviour]:
    return lambda peer: lambda connection, path: connection.sendall(answer)


BAD = {
    "hangs": _hang,
    "hangs midway": _hang_midway,
    "ends early": _says(octets(100_000) + b"x" * 30_000),
    "is shorter": _says(octets(30_000) + b"x" * 30_000),
    "is longer": _says(octets(200_000) + b"x" * 200_000),
    "closes": _says(b""),
    "is no HTTP": _says(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "sends HTML": _says(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 100000\r\n\r\n"
        + b"<" * 100_000
    ),
    "fails": _says(octets(0, "500 Internal Server Error")),
    "refuses": _says(octets(0, "401 Unauthorized")),
    "has it not": _says(octets(0, "404 Not Found")),
    "redirects": _says(
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("fault", [*BAD, "is dead"])
def test_another_source_is_read_when_the_first_one(
    twins: tuple[Node, Node, Path], fault: str
) -> None:
    owner, reader, disk = twins
    number = 100 + [*BAD, "is dead"].index(fault)
    name, data = f"sealed/s-t01000-{number}", noise(fault, 100_000)
    put(disk / name, data)
    rescan(owner)
    facts = facts_of(disk / name)
    with false_peer(BAD.get(fault, _hang)) as peer:
        if fault == "is dead":
            peer.close()
        declare_at(owner, f"false-{number}", peer.url, {name: facts})
        seen("both copies", lambda: _places(reader, name) == 2)
        content, took = timed((reader.mountpoint / name).read_bytes)
        assert content == data
        assert took < LIMIT
        assert peer.requests == ([] if fault == "is dead" else [f"/remote/{name}"])
        assert leftovers(reader) == []
        # The one that failed is not asked first again.
        more, count = f"unsealed/s-t01000-{number}", len(peer.requests)
        if fault != "has it not":
            put(disk / more, data)
            rescan(owner)
            declare_at(owner, f"false-{number}", peer.url, {more: facts_of(disk / more)})
            seen("both copies", lambda: _places(reader, more) == 2)
            assert (reader.mountpoint / more).read_bytes() == data
            assert len(peer.requests) == count
    assert (reader.mountpoint / name).read_bytes() == data


def _places(node: Node, name: str) -> int:
    """How many copies the mount knows of."""
    with suppress(FileNotFoundError):
        raw = os.getxattr(node.mountpoint / name, "user.sectorfs.locations")
        return raw.count(b'"storage"')
    return 0


def test_a_bad_only_source_is_an_error_and_the_file_reads_once_there_is_a_good_one(
    twins: tuple[Node, Node, Path],
) -> None:
    owner, reader, disk = twins
    name, data = "sealed/s-t01000-200", noise("late", 100_000)
    put(disk.parent / "aside" / "file", data)
    facts = facts_of(disk.parent / "aside" / "file")
    with false_peer(BAD["ends early"]) as peer:
        declare_at(owner, "false-200", peer.url, {name: facts})
        seen("the name", lambda: (reader.mountpoint / name).exists())
        outcome, took = timed((reader.mountpoint / name).read_bytes)
        assert _failed(outcome)
        assert took < LIMIT
        put(disk / name, data)
        rescan(owner)
        seen("the good source", lambda: _reads(reader.mountpoint / name, data))
    assert "the body ended after 30000 of 100000 bytes" in reader.log()


def test_a_node_that_tells_no_sizes_is_asked_for_them(twins: tuple[Node, Node, Path]) -> None:
    """Nodes of other programs declare without facts and know GET and Range only."""
    owner, reader, _ = twins
    name, data = "sealed/s-t01000-201", noise("lotus", 70_000)

    def as_others(peer: FalsePeer) -> Behaviour:
        def answer(connection: socket.socket, path: str) -> None:
            head = peer.heads[-1].lower()
            date = b"last-modified: Tue, 14 Nov 2023 22:13:20 GMT\r\n"
            if not head.startswith("get"):
                connection.sendall(octets(0, "405 Method Not Allowed"))
            elif "range: bytes=0-0" in head:
                extent = f"content-range: bytes 0-0/{len(data)}\r\n".encode()
                connection.sendall(octets(1, "206 Partial Content", date + extent) + data[:1])
            else:
                connection.sendall(octets(len(data), "200 OK", date) + data)

        return answer

    with false_peer(as_others) as peer:
        declare_at(owner, "false-201", peer.url, {name: None})
        shown = reader.mountpoint / name
        seen("the name", lambda: "s-t01000-201" in os.listdir(shown.parent))
        assert shown.read_bytes() == data
        assert shown.stat().st_size == len(data)
        assert shown.stat().st_mtime == 1_700_000_000
        seen("the copy", lambda: state(shown) == "cached")
        requests = len(peer.requests)
        assert shown.read_bytes() == data
        assert len(peer.requests) == requests


# --- the cache path ---


@pytest.fixture
def small_cache(tmp_path: Path) -> Iterator[tuple[Node, Node, Path, Path]]:
    """Owner (with Index), mounted reader with a cache path of 160 MiB, owner's disk, the cache."""
    cache = tmp_path / "tmpfs"
    with (
        mounted("-t", "tmpfs", "-o", "size=160m", "none", at=cache),
        cluster(tmp_path, "owner", "reader") as nodes,
    ):
        owner, reader = nodes
        configure(owner)
        configure(reader, cache={"path": str(cache / "copies")})
        owner.start()
        reader.start(mount=True, index=owner)
        disk, own = tmp_path / "disk", tmp_path / "own"
        put(disk / "sealed" / "s-t01000-1", b"small")
        put(disk / "sealed" / "s-t01000-2", b"small too")
        put_sparse(disk / "sealed" / "s-t01000-3", 200 << 20, b"end")
        put(own / "sealed" / "s-t01000-4", b"own")
        attach(owner, disk)
        attach(reader, own)
        for number in (1, 2, 3, 4):
            seen(
                "the files",
                lambda number=number: (reader.mountpoint / f"sealed/s-t01000-{number}").exists(),
            )
        yield owner, reader, disk, cache


def test_a_file_that_cannot_fit_is_read_without_being_kept(
    small_cache: tuple[Node, Node, Path, Path],
) -> None:
    _, reader, disk, _ = small_cache
    name = "sealed/s-t01000-3"
    assert digest(reader.mountpoint / name) == digest(disk / name)
    assert f"{200 << 20} bytes to fetch" in reader.log()
    assert "make room in the cache path" in reader.log()
    assert state(reader.mountpoint / name) in ("partial", "remote")
    _still_well(small_cache)


def _still_well(parts: tuple[Node, Node, Path, Path]) -> None:
    """The reader's node is up, nothing is left over, and other files are read."""
    _, reader, _, _ = parts
    assert leftovers(reader) == []
    assert (reader.mountpoint / "sealed/s-t01000-4").read_bytes() == b"own"
    assert (reader.mountpoint / "sealed/s-t01000-1").read_bytes() == b"small"
    assert status(reader).running
    assert "Traceback" not in reader.log()


def test_the_cache_fills_up_during_a_fetch(small_cache: tuple[Node, Node, Path, Path]) -> None:
    owner, reader, disk, cache = small_cache
    name, size = "sealed/s-t01000-5", 80 << 20
    put_sparse(disk.parent / "aside", size, b"end")
    facts = facts_of(disk.parent / "aside")

    def half_first(peer: FalsePeer) -> Behaviour:
        def answer(connection: socket.socket, path: str) -> None:
            connection.sendall(octets(size) + bytes(size // 4))
            peer.gate.wait()
            for _ in range(size // 4, size, 1 << 20):
                connection.sendall(bytes(1 << 20))

        return answer

    with false_peer(half_first) as peer:
        declare_at(owner, "false", peer.url, {name: facts})
        seen("the name", lambda: (reader.mountpoint / name).exists())
        reading = Background((reader.mountpoint / name).read_bytes)
        until("a quarter", lambda: sum(path.stat().st_size for path in leftovers(reader)))
        with (cache / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(1 << 20))
        peer.gate.set()
        outcome, took = reading.result()
        assert _failed(outcome)
        assert took < 2 * LIMIT
    assert "No space left on device" in reader.log()
    os.unlink(cache / "filler")
    _still_well(small_cache)


def test_the_cache_becomes_read_only(small_cache: tuple[Node, Node, Path, Path]) -> None:
    owner, reader, _, cache = small_cache
    assert (reader.mountpoint / "sealed/s-t01000-1").read_bytes() == b"small"
    subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
    outcome, _ = timed((reader.mountpoint / "sealed/s-t01000-2").read_bytes)
    assert _failed(outcome)
    assert "Read-only file system" in reader.log()
    assert "source http" not in reader.log()  # no peer is blamed
    _still_well(small_cache)
    # It starts on a read-only cache path too: what lies here, and copies, are read.
    reader.stop()
    subprocess.run(["mount", "-o", "remount,rw", str(cache)], check=True)
    put(cache / "copies" / "sealed" / "fetching" / "s-t01000-2", b"sma")
    subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
    reader.start(mount=True, index=owner)
    seen("the tree", lambda: (reader.mountpoint / "sealed/s-t01000-1").exists())
    assert (reader.mountpoint / "sealed/s-t01000-1").read_bytes() == b"small"
    assert "unfinished fetches stay" in reader.log()
    reader.stop()
    subprocess.run(["mount", "-o", "remount,rw", str(cache)], check=True)
    reader.start(mount=True, index=owner)
    _still_well(small_cache)
    assert (reader.mountpoint / "sealed/s-t01000-2").read_bytes() == b"small too"


def test_the_cache_is_removed_while_the_node_runs(
    small_cache: tuple[Node, Node, Path, Path],
) -> None:
    owner, reader, _, cache = small_cache
    assert (reader.mountpoint / "sealed/s-t01000-1").read_bytes() == b"small"
    gone = cache_of(reader)
    shutil.rmtree(cache / "copies")
    outcome, _ = timed((reader.mountpoint / "sealed/s-t01000-2").read_bytes)
    assert _failed(outcome)
    assert "the cache path is gone" in reader.log()
    assert "source http" not in reader.log()  # no peer is blamed
    assert not (cache / "copies").exists()
    assert (reader.mountpoint / "sealed/s-t01000-4").read_bytes() == b"own"
    seen("the loss to be told", lambda: not storages(owner)[gone].healthy)
    reader.stop()
    reader.start(mount=True, index=owner)
    seen("the tree", lambda: (reader.mountpoint / "sealed/s-t01000-1").exists())
    assert (reader.mountpoint / "sealed/s-t01000-2").read_bytes() == b"small too"
    _still_well(small_cache)


# --- the Index goes away ---


def test_the_index_is_away_for_a_while(three: Trio) -> None:
    index, reader = three.index, three.reader
    own = reader.root / "reader-disk"
    put(own / "sealed" / "s-t01000-4", b"local")
    attach(reader, own)
    seen("the local file", lambda: shows(three.shown("sealed/s-t01000-4"), b"local"))
    assert three.shown(three.near).read_bytes() == b"from the owner"
    port = index.repo.api().rpartition(":")[2]  # type: ignore[union-attr]  # it runs
    before = sorted(os.listdir(three.shown("sealed"))), sorted(os.listdir(three.shown("unsealed")))
    index.stop()
    seen("the absence to be noticed", lambda: not status(reader).index.connected)
    listed = sorted(os.listdir(three.shown("sealed"))), sorted(os.listdir(three.shown("unsealed")))
    assert listed == before
    assert three.shown("sealed/s-t01000-4").read_bytes() == b"local"
    assert three.shown(three.near).read_bytes() == b"from the owner"
    assert three.shown("unsealed/s-t01000-23").read_bytes() == noise("23", 20_000)
    report = status(reader)
    assert any("does not answer" in problem for problem in report.problems)
    # Changes meanwhile are not lost.
    write(three.owner_disk / "sealed" / "s-t01000-5", b"made in the absence")
    (three.owner_disk / "unsealed" / "s-t01000-24").unlink()
    write(own / "sealed" / "s-t01000-6", b"made here")
    # Long away: everybody counts as unhealthy, and still everything is read.
    seen("all to look lost", lambda: state(three.shown("unsealed/s-t01000-25")) == "unavailable")
    assert three.shown("unsealed/s-t01000-25").read_bytes() == noise("25", 20_000)
    assert "sealed" in os.listdir(reader.mountpoint)

    index.start("--listen", f"127.0.0.1:{port}")
    for name, data in (("5", b"made in the absence"), ("6", b"made here")):
        shown = three.shown(f"sealed/s-t01000-{name}")
        seen("the new file", lambda shown=shown, data=data: shows(shown, data))
    seen("the removed one's end", lambda: not three.shown("unsealed/s-t01000-24").exists())
    # The copy fetched in the absence is declared.
    seen(
        "the copy",
        lambda: cache_of(reader) in locations(index, "unsealed/s-t01000-23"),
    )
    assert status(reader).index.connected


def test_the_index_hangs(three: Trio) -> None:
    three.index.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]  # it was started
    assert len(os.listdir(three.shown("unsealed"))) == 40
    for number in range(20, 30):
        data, took = timed(three.shown(f"unsealed/s-t01000-{number}").read_bytes)
        assert data == noise(str(number), 20_000)
        assert took < 0.9  # asking the Index would cost its time-out
    three.index.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]  # it was started
    seen(
        "the copies",
        lambda: all(
            cache_of(three.reader) in locations(three.index, f"unsealed/s-t01000-{number}")
            for number in range(20, 30)
        ),
    )


def test_the_index_comes_back_empty(three: Trio) -> None:
    index, reader = three.index, three.reader
    assert three.shown(three.near).read_bytes() == b"from the owner"
    port = index.repo.api().rpartition(":")[2]  # type: ignore[union-attr]  # it runs
    before = {kind: sorted(os.listdir(three.shown(kind))) for kind in ("sealed", "unsealed")}
    known = set(storages(index))

    def whole() -> bool:
        return {kind: sorted(os.listdir(three.shown(kind))) for kind in before} == before

    def taken_over() -> bool:
        assert whole(), "a part of the tree was gone for a moment"
        return shows(three.shown("cache/s-t01000-5/p_aux"), b"declared since")

    index.kill()
    for path in index.repo.root.glob("index.db*"):
        path.unlink()
    index.start("--listen", f"127.0.0.1:{port}")
    seen("every storage", lambda: set(storages(index)) == known)
    put(three.owner_disk / "cache" / "s-t01000-5" / "p_aux", b"declared since")
    seen("the new Index to be taken over", taken_over)
    assert whole()
    for name in (three.near, three.far):
        assert three.shown(name).read_bytes().startswith(b"from the")
    assert three.shown("unsealed/s-t01000-26").read_bytes() == noise("26", 20_000)
    seen("the copy", lambda: cache_of(reader) in locations(index, three.near))
    assert not locations(index, three.near)[cache_of(reader)].primary


# --- a disk goes away ---


def test_a_disk_is_unmounted_and_comes_back(three: Trio) -> None:
    owner, reader = three.owner, three.reader
    real, path = owner.root / "real", owner.root / "path"
    name = "key/s-t01000-70"
    put(real / name, b"on the disk")
    with mounted("--bind", str(real), at=path):
        storage = attach(owner, path)
        seen("the file", lambda: three.shown(name).exists())
        unmount(path)
        seen("the loss", lambda: not storages(reader)[storage].healthy)
        reason = storages(reader)[storage].error
        assert reason
        assert "sectorstore.json" in reason
        assert storage in {item["storage"] for item in reader.json("storage", "list")}
        assert list(locations(reader, name)) == [storage]
        seen("the state", lambda: state(three.shown(name)) == "unavailable")
        outcome, took = timed(three.shown(name).read_bytes)
        assert _failed(outcome)
        assert took < LIMIT
        # Nothing was dropped, and nothing is written into the bare mount point.
        assert os.listdir(path) == []
        subprocess.run(["mount", "--bind", str(real), str(path)], check=True)
        seen("the return", lambda: storages(reader)[storage].healthy)
        assert three.shown(name).read_bytes() == b"on the disk"
        write(path / "key" / "s-t01000-71", b"new on it")
        seen("a new file", lambda: shows(three.shown("key/s-t01000-71"), b"new on it"))
        owner.call("storage", "detach", storage)


def test_another_copy_is_read_while_a_disk_is_covered(three: Trio) -> None:
    owner, index, reader = three.owner, three.index, three.reader
    name, path = "key/s-t01000-72", owner.root / "covered"
    put(path / name, b"twice")
    storage = attach(owner, path, weight=1000)
    put(three.index_disk / name, b"twice")
    rescan(index)
    seen("both copies", lambda: len(locations(reader, name)) == 2)
    with mounted("-t", "tmpfs", "-o", "size=1m", "none", at=path):
        content, took = timed(three.shown(name).read_bytes)
        assert content == b"twice"
        assert took < LIMIT
        seen("the loss", lambda: not storages(reader)[storage].healthy)
        assert storage in locations(reader, name)
    seen("the return", lambda: storages(reader)[storage].healthy)
    assert len(locations(reader, name)) == 3
