"""Reading remote files while peers hang, lie, break off, change and die, and while disks fail.

Everything goes through real mounts, and the Index is away during all of it.
"""

from __future__ import annotations

import errno
import os
import random
import statistics
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from sectorfs.index.protocol import Declaration, FsStat, HealthReport, SectorIndex, StorageInfo
from sectorfs.types import StorageID
from tests.cluster import Node, cluster, until
from tests.cluster_fixtures import (
    LIMIT,
    OLD_NS,
    Background,
    configure,
    facts_of,
    mounted,
    noise,
    put,
    sector_file,
    seen,
    status,
    timed,
    with_index,
)
from tests.faulty_peer import (
    FAULTS,
    FaultyPeer,
    dripping,
    faulty_peers,
    silent,
    silent_from,
    stalls_after,
)
from tests.hung_disk import HungDisk, hung_disk

pytestmark = pytest.mark.mount

SIZE = 12 << 20
DATA = noise("streamed", SIZE)
NEW = noise("changed", SIZE)
BLOCK = 4096
SLOW = 60.0
"""Deadlines of the node whose readers are killed."""

CROWD = 6


class Scene:
    """The nodes, the peers, and which of them has what."""

    def __init__(
        self,
        root: Path,
        index: Node,
        readers: dict[str, Node],
        peers: dict[str, FaultyPeer],
        disk: HungDisk,
    ) -> None:
        self.root = root
        self.index = index
        self.readers = readers
        self.peers = peers
        self.disk = disk
        """Of the cache path of the node `broken`."""
        self.files: dict[str, str] = {}
        self._held: dict[str, list[str]] = {}

    def hold(self, name: str, *peers: str) -> None:
        """Let peers have a file; the first of them is asked first."""
        relative = f"unsealed/s-t01000-{len(self.files) + 1}"
        self.files[name] = relative
        for peer in peers:
            path = self.peers[peer].root / relative
            path.parent.mkdir(exist_ok=True)
            path.hardlink_to(self.root / "data")
            self._held.setdefault(peer, []).append(relative)

    def declare(self) -> None:
        """Tell the Index, as the peers would."""
        with_index(self.index, self._declare)
        last = list(self.files.values())[-1]
        for node in self.readers.values():
            until("the names", (node.mountpoint / last).exists)

    async def _declare(self, index: SectorIndex) -> None:
        stat = FsStat(capacity=1 << 40, available=1 << 39)
        for name, held in self._held.items():
            storage = StorageID(f"storage-{name.replace(' ', '-')}")
            peer = self.peers[name]
            weight = 10 if name == "good" else 1000
            info = StorageInfo(storage=storage, urls=(peer.url,), weight=weight, can_store=True)
            await index.attach(info, stat)
            await index.report_health(storage, HealthReport(stat=stat))
            facts = facts_of(self.root / "data")
            await index.declare(
                [Declaration(sector_file(one), storage, True, facts) for one in held]
            )

    def shown(self, name: str, reader: str = "reader") -> Path:
        """A file in a mount."""
        return self.readers[reader].mountpoint / self.files[name]

    def misbehave(self, fault: str) -> FaultyPeer:
        """Begin a fault; the peer that has it."""
        peer, how = self.peers[fault], FAULTS[fault]
        if how is None:
            peer.die()
        else:
            peer.fault = how
        return peer

    def behave(self, fault: str) -> None:
        """End a fault."""
        self.peers[fault].fault = None
        if FAULTS[fault] is None:
            self.peers[fault].revive()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("faults")
    put(root / "data", DATA)
    with ExitStack() as stack:
        small = root / "small"
        stack.enter_context(mounted("-t", "tmpfs", "-o", "size=6m", "none", at=small))
        disk = stack.enter_context(hung_disk(root / "broken"))
        caches = {
            "reader": "",
            "patient": "",
            "full": str(small / "c"),
            "broken": str(disk.path / "c"),
        }
        index, *nodes = stack.enter_context(cluster(root, "index", *caches))
        crowd = [f"crowd {number}" for number in range(CROWD)]
        others = ("good", "one", "two", "three", "loser", "changer", "slow", "restarts")
        names = [*FAULTS, *crowd, *others]
        peers = stack.enter_context(faulty_peers(root / "peers", *names))
        for node, cache in zip((index, *nodes), ("", *caches.values()), strict=True):
            slow = (
                {"timeouts": {"first_byte": SLOW, "progress": SLOW}}
                if node.name == "patient"
                else {}
            )
            where = {"cache": {"path": cache}} if cache else {}
            configure(node, index={"heartbeat": 1, "cutoff": 3600}, **slow, **where)
        index.start()
        for node in nodes:
            node.start(mount=True, index=index, wait=False)
        for node in nodes:
            node.ready()
        by_name = dict(zip(names, peers, strict=True))
        found = Scene(root, index, dict(zip(caches, nodes, strict=True)), by_name, disk)
        for fault in FAULTS:
            found.hold(f"twice: {fault}", fault, "good")
            found.hold(f"only: {fault}", fault)
        for name in crowd:
            found.hold(name, name)
        for number in range(4):
            found.hold(f"well {number}", "good")
            found.hold(f"disk {number}", "good")
        found.hold("three", "one", "two", "three")
        found.hold("restarts", "restarts")
        found.hold("lost, twice", "loser", "good")
        found.hold("lost, only", "loser")
        found.hold("changed, twice", "changer", "good")
        found.hold("changed, only", "changer")
        for how in ("open", "direct", "buffered"):
            found.hold(f"slow {how}", "slow")
        found.declare()
        index.kill()
        yield found


def _failed(outcome: object, number: int = errno.EIO) -> bool:
    return isinstance(outcome, OSError) and outcome.errno == number


def _whole(path: Path) -> float:
    """Read a file from its begin to its end, which must be right; the longest wait in it."""
    waits = []
    with path.open("rb", buffering=0) as file:
        for offset in range(0, SIZE, BLOCK << 4):
            data, took = timed(lambda: file.read(BLOCK << 4))
            assert data == DATA[offset : offset + (BLOCK << 4)], (offset, data)
            waits.append(took)
        assert file.read(1) == b""
    return max(waits)


def _pieces(path: Path, *, count: int, seed: int) -> list[float]:
    """Read blocks here and there, which must be right; the seconds each took."""
    places = random.Random(seed)
    fd, took = timed(lambda: os.open(path, os.O_RDONLY))
    assert isinstance(fd, int), fd
    waits = [took]
    try:
        for _ in range(count):
            offset = places.randrange(SIZE - BLOCK)
            data, took = timed(lambda offset=offset: os.pread(fd, BLOCK, offset))
            assert data == DATA[offset : offset + BLOCK]
            waits.append(took)
    finally:
        os.close(fd)
    return waits


# --- peers ---


@pytest.mark.parametrize("fault", FAULTS)
def test_another_peer_takes_over_from_one_that(scene: Scene, fault: str) -> None:
    path = scene.shown(f"twice: {fault}")
    waits = _pieces(path, count=3, seed=1)  # while all is well
    peer = scene.misbehave(fault)
    peer.forget()
    try:
        waits += _pieces(path, count=20, seed=2)
        waits.append(_whole(path))
    finally:
        scene.behave(fault)
    assert peer.asked or FAULTS[fault] is None
    assert max(waits) < LIMIT, waits


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_an_error_at_one_deadline_when_the_only_peer(scene: Scene, fault: str) -> None:
    path = scene.shown(f"only: {fault}")
    peer = scene.misbehave(fault)
    try:
        outcome, took = timed(path.read_bytes)
        assert _failed(outcome), outcome
        assert took < LIMIT
    finally:
        scene.behave(fault)
    assert "no source can give it" in scene.readers["reader"].log()
    seen("the file to be read again", lambda: timed(path.read_bytes)[0] == DATA)
    assert peer.asked


def test_an_open_file_is_read_on_once_its_only_peer_is_back(scene: Scene) -> None:
    scene.peers["three"].forget()
    with scene.shown("three").open("rb", buffering=0) as file:
        assert file.read(BLOCK) == DATA[:BLOCK]
        scene.peers["one"].die()
        scene.peers["two"].die()
        data, took = timed(lambda: os.pread(file.fileno(), BLOCK, 3 << 20))
        assert data == DATA[3 << 20 :][:BLOCK]
        assert took < LIMIT
        scene.peers["three"].die()
        outcome, took = timed(lambda: os.pread(file.fileno(), BLOCK, 6 << 20))
        assert _failed(outcome), outcome
        assert took < LIMIT
        assert os.pread(file.fileno(), BLOCK, 3 << 20) == DATA[3 << 20 :][:BLOCK]
        scene.peers["two"].revive()

        def reads() -> bool:
            outcome, _ = timed(lambda: os.pread(file.fileno(), BLOCK, 6 << 20))
            return outcome == DATA[6 << 20 :][:BLOCK]

        seen("one of three to be back", reads)
    assert _whole(scene.shown("three")) < LIMIT


def test_a_peer_that_is_started_anew_costs_its_readers_a_pause_and_no_error(scene: Scene) -> None:
    peer = scene.peers["restarts"]
    with (
        scene.shown("restarts", "patient").open("rb", buffering=0) as file,
        ThreadPoolExecutor(8) as pool,
    ):
        assert file.read(BLOCK) == DATA[:BLOCK]
        peer.die()
        places = [(number << 20) + 4096 for number in range(1, 9)]
        reads = [pool.submit(os.pread, file.fileno(), BLOCK, place) for place in places]
        seen("that it is gone", lambda: "cannot connect" in scene.readers["patient"].log())
        assert not any(read.done() for read in reads)
        peer.revive()
        for place, read in zip(places, reads, strict=True):
            assert read.result(SLOW) == DATA[place : place + BLOCK]


@pytest.mark.parametrize("holders", ["twice", "only"])
def test_a_peer_loses_the_file_between_two_ranges(scene: Scene, holders: str) -> None:
    name = f"lost, {holders}"
    held = scene.peers["loser"].root / scene.files[name]
    with scene.shown(name).open("rb", buffering=0) as file:
        assert file.read(BLOCK) == DATA[:BLOCK]
        held.unlink()
        outcome, took = timed(lambda: os.pread(file.fileno(), BLOCK, 5 << 20))
        assert took < LIMIT
        if holders == "only":
            assert _failed(outcome), outcome
            held.hardlink_to(scene.root / "data")
            outcome = os.pread(file.fileno(), BLOCK, 5 << 20)
        assert outcome == DATA[5 << 20 :][:BLOCK]
    assert _whole(scene.shown(name)) < LIMIT


@pytest.mark.parametrize("holders", ["twice", "only"])
def test_a_file_that_changes_is_never_a_mixture(scene: Scene, holders: str) -> None:
    name = f"changed, {holders}"
    held = scene.peers["changer"].root / scene.files[name]
    with scene.shown(name).open("rb", buffering=0) as file:
        assert file.read(BLOCK) == DATA[:BLOCK]
        put(held.with_name("new"), NEW, OLD_NS + 10**9)
        held.with_name("new").rename(held)
        for offset in range(1 << 20, SIZE, 1 << 20):
            outcome, took = timed(lambda offset=offset: os.pread(file.fileno(), BLOCK, offset))
            assert took < LIMIT
            if holders == "twice":
                assert outcome == DATA[offset : offset + BLOCK]
            else:
                assert _failed(outcome, errno.ESTALE), outcome


def test_nobody_waits_for_the_readers_of_others(scene: Scene) -> None:
    crowd = [scene.peers[f"crowd {number}"] for number in range(CROWD)]
    before = _pieces(scene.shown("well 0"), count=40, seed=3)
    for peer, fault in zip(crowd, (silent, dripping, stalls_after(1000)) * CROWD, strict=False):
        peer.fault = fault
    readers = [Background(scene.shown(f"crowd {number}").read_bytes) for number in range(CROWD)]
    until("all of them to wait", lambda: all(peer.waiting for peer in crowd))
    during = _pieces(scene.shown("well 1"), count=40, seed=3)
    for reader in readers:
        outcome, took = reader.result()
        assert _failed(outcome), outcome
        assert took < LIMIT
    assert statistics.median(during) < statistics.median(before) + 0.1, (before, during)
    assert max(during) < LIMIT


@pytest.mark.parametrize("how", ["open", "direct", "buffered"])
def test_a_reader_that_is_killed_is_gone_with_its_request(scene: Scene, how: str) -> None:
    peer = scene.peers["slow"]
    peer.forget()
    path = scene.shown(f"slow {how}", "patient")
    peer.fault = silent if how == "open" else silent_from(4 << 20)
    command = ["dd", f"if={path}", "of=/dev/null", "bs=64k", "skip=64"]
    if how == "direct":
        command.append("iflag=direct")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as reader:
        until("the peer to be asked", lambda: peer.waiting)
        reader.kill()
        _, took = timed(lambda: reader.wait(LIMIT))
        assert took < LIMIT < SLOW
    seen("the end of its request", lambda: peer.waiting == 0)
    assert peer.abandoned
    peer.fault = None
    peer.die()  # which ends what still waits
    peer.revive()
    seen("the file to be read", lambda: timed(path.read_bytes)[0] == DATA)


# --- the cache path ---


def test_a_full_cache_path_is_read_past(scene: Scene) -> None:
    assert max(_pieces(scene.shown("disk 0", "full"), count=20, seed=4)) < LIMIT
    assert _whole(scene.shown("disk 0", "full")) < LIMIT
    assert "is read without being kept" in scene.readers["full"].log()
    assert status(scene.readers["full"]).running


def test_a_cache_path_that_becomes_read_only_is_read_past(scene: Scene) -> None:
    path = scene.shown("disk 1", "full")
    small = str(scene.root / "small")
    with path.open("rb", buffering=0) as file:
        assert file.read(BLOCK) == DATA[:BLOCK]
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        try:
            assert _whole(path) < LIMIT
            assert _whole(scene.shown("well 2", "full")) < LIMIT
        finally:
            subprocess.run(["mount", "-o", "remount,rw", small], check=True)
    assert status(scene.readers["full"]).running


@pytest.mark.parametrize("operation", ["write", "fsync", "create"])
def test_a_cache_path_that_answers_eio_is_read_past(scene: Scene, operation: str) -> None:
    number = ["write", "fsync", "create"].index(operation)
    path = scene.shown(f"disk {number}", "broken")
    scene.disk.fail(operation, after=1 << 20 if operation == "write" else 0, only="s-t0")
    try:
        assert max(_pieces(path, count=10, seed=5)) < LIMIT
        assert _whole(path) < LIMIT
    finally:
        scene.disk.go()


def test_a_cache_path_that_hangs_is_read_past(scene: Scene) -> None:
    path = scene.shown("disk 3", "broken")
    with path.open("rb", buffering=0) as file:
        assert file.read(BLOCK) == DATA[:BLOCK]
        scene.disk.hang()
        try:
            assert max(_pieces(path, count=20, seed=6)) < LIMIT
            assert _whole(path) < LIMIT
            assert _whole(scene.shown("well 3", "broken")) < LIMIT
        finally:
            scene.disk.go()


def test_nothing_unexpected_was_logged(scene: Scene) -> None:
    for name, node in scene.readers.items():
        before, found, after = node.log().partition("Traceback")
        assert not found, f"{name}: {before[-2000:]}{found}{after[:6000]}"
