"""Reading files of lotus and Curio nodes while sources fail in every way that sources fail.

Each fault befalls a node of theirs, with another of theirs or one of ours to take over, and one of
ours, with theirs to take over. Everything goes through real mounts, and the Index is away.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from sectorfs.index.protocol import Declaration, FsStat, HealthReport, SectorIndex, StorageInfo
from sectorfs.types import StorageID
from sectorfs.wire import tokens
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
    Answer,
    Asked,
    Fault,
    FaultyPeer,
    faulty_peers,
    silent,
    silent_from,
)
from tests.hung_disk import HungDisk, hung_disk
from tests.old_peers import Era, OldPeer, ends_after, old_peers

pytestmark = pytest.mark.mount

TRAILER = bytes.fromhex("0410109004000000")
"""Of an unsealed file of 8 MiB of which all is there. The first nodes have it behind each."""
DATA = noise("streamed", 8 << 20) + TRAILER
NEW = noise("changed", 8 << 20) + TRAILER
SIZE = len(DATA)
BLOCK = 4096
SLOW = 60.0
"""Deadlines of the node whose readers are killed."""
FAR = 10**9


def more_after(count: int) -> Fault:
    """Send a whole body, and so many bytes more."""

    def fault(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        answer.body.append(bytes(count))
        peer.send(connection, answer.head())
        for piece in answer.pieces():
            peer.send(connection, piece)

    return fault


FIRST_FAULTS: dict[str, Fault | None] = {
    **FAULTS,
    "sends more": more_after(1000),
    "sends less": ends_after(SIZE - 1000),
}
"""Of nodes that know neither ranges nor lengths."""
del FIRST_FAULTS["sends another range"]

ROWS = {
    "curio, then lotus": ("bad curio", "lotus"),
    "curio, then ours": ("bad curio", "ours"),
    "first, then another": ("bad first", "first"),
    "ours, then curio": ("bad ours", "curio"),
    "ours, then first": ("bad ours", "first"),
    "curio alone": ("bad curio",),
    "first alone": ("bad first",),
}
"""Who is asked first, and who takes over; a bad one has the fault."""


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
        self.told: set[str] = set()
        """Files of theirs whose facts our nodes have found out before."""
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
        if any(not isinstance(self.peers[peer], OldPeer) for peer in peers):
            self.told.add(relative)

    def declare(self) -> None:
        """Let all peers tell the Index, as each of them does it."""
        token = tokens.sign(self.index.repo.secret(create=False), ("admin",))
        for name in self._held:
            peer = self.peers[name]
            if isinstance(peer, OldPeer):
                _weigh(peer, _weight(name))
                peer.redeclare()
                peer.attach(f"{self.index.repo.api()}/rpc/v0", token, heartbeat=FAR)
                peer.report_health()
        with_index(self.index, self._declare)
        last = list(self.files.values())[-1]
        for node in self.readers.values():
            until("the names", (node.mountpoint / last).exists)

    async def _declare(self, index: SectorIndex) -> None:
        """What nodes of ours say, and what they have found out of files of theirs."""
        stat = FsStat(capacity=1 << 40, available=1 << 39)
        facts = facts_of(self.root / "data")
        for name, held in self._held.items():
            peer = self.peers[name]
            storage = StorageID(re.sub("[: ]+", "-", name))
            if isinstance(peer, OldPeer):
                storage = StorageID(peer.storage)
            else:
                info = StorageInfo(storage=storage, urls=(peer.url,), weight=_weight(name))
                await index.attach(info, stat)
                await index.report_health(storage, HealthReport(stat=stat))
            told = [sector_file(one) for one in held if one in self.told]
            await index.declare([Declaration(one, storage, True, facts) for one in told])

    def shown(self, name: str, reader: str = "reader") -> Path:
        """A file in a mount."""
        return self.readers[reader].mountpoint / self.files[name]


def _weight(name: str) -> int:
    """Bad peers are asked first."""
    return 1000 if name.startswith("bad") else 10


def _weigh(peer: OldPeer, weight: int) -> None:
    """Set the weight of its path."""
    path = peer.root / "sectorstore.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "Weight": weight}))


OURS = ("ours", *(f"bad ours: {fault}" for fault in FAULTS))
THEIRS: dict[str, Era] = {
    "curio": "curio",
    "lotus": "lotus",
    "first": "sector-storage",
    **{f"bad curio: {fault}": "curio" for fault in FAULTS},
    **{f"bad first: {fault}": "sector-storage" for fault in FIRST_FAULTS},
    "bad loser": "curio",
    "bad changer": "lotus",
    "slow": "curio",
}


def rows(fault: str) -> list[str]:
    """The rows in which a fault makes sense."""
    return [row for row in ROWS if fault in FIRST_FAULTS or "first" not in ROWS[row][0]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("mixed-faults")
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
        secret = index.repo.secret(create=False).key
        peers: dict[str, FaultyPeer] = {
            **stack.enter_context(old_peers(root / "theirs", THEIRS, secret=secret)),
            **dict(
                zip(OURS, stack.enter_context(faulty_peers(root / "peers", *OURS)), strict=True)
            ),
        }
        for node in nodes:
            node.ready()
        made = Scene(root, index, dict(zip(caches, nodes, strict=True)), peers, disk)
        for fault in FAULTS:
            for row in rows(fault):
                bad, *good = ROWS[row]
                made.hold(f"{row}: {fault}", f"{bad}: {fault}", *good)
        made.hold("lost, twice", "bad loser", "ours")
        made.hold("lost, only", "bad loser")
        made.hold("changed, twice", "bad changer", "ours")
        made.hold("changed, only", "bad changer")
        for number in range(4):
            made.hold(f"disk {number}", "curio")
        for how in ("open", "direct", "buffered"):
            made.hold(f"slow {how}", "slow")
        made.declare()
        index.kill()
        yield made


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
            data, took = timed(partial(os.pread, fd, BLOCK, offset))
            assert data == DATA[offset : offset + BLOCK]
            waits.append(took)
    finally:
        os.close(fd)
    return waits


def _is_whole(path: Path) -> bool:
    return timed(path.read_bytes)[0] == DATA


def _read(path: Path) -> float:
    return max(*_pieces(path, count=10, seed=2), _whole(path))


# --- every fault ---


@pytest.mark.parametrize("fault", FAULTS)
def test_another_takes_over_from_one_that_fails_beside_others(scene: Scene, fault: str) -> None:
    paths = {row: scene.shown(f"{row}: {fault}") for row in rows(fault)}
    bad = {name: peer for name, peer in scene.peers.items() if name.endswith(f": {fault}")}
    for row in ("curio, then lotus", "curio, then ours", "ours, then curio"):
        _pieces(paths[row], count=2, seed=1)  # while all is well
    for name, peer in bad.items():
        peer.forget()
        if FAULTS[fault] is None:
            peer.die()
        else:
            peer.fault = (FIRST_FAULTS if "first" in name else FAULTS)[fault]
    try:
        alone = {row: Background(path.read_bytes) for row, path in paths.items() if "alone" in row}
        twice = {
            row: Background(partial(_read, path))
            for row, path in paths.items()
            if "alone" not in row
        }
        for row, reading in twice.items():
            longest, _ = reading.result()
            assert isinstance(longest, float), (row, longest)
            assert longest < LIMIT, row
        for row, reading in alone.items():
            outcome, took = reading.result()
            assert _failed(outcome), (row, outcome)
            assert took < LIMIT, row
    finally:
        for peer in bad.values():
            peer.fault = None
            if FAULTS[fault] is None:
                peer.revive()
    assert all(peer.asked for peer in bad.values()) or FAULTS[fault] is None
    for row in alone:
        seen(row, partial(_is_whole, paths[row]))
    assert "no source can give it" in scene.readers["reader"].log()


# --- what befalls the file itself ---


@pytest.mark.parametrize("holders", ["twice", "only"])
def test_a_node_of_theirs_loses_the_file_between_two_ranges(scene: Scene, holders: str) -> None:
    name = f"lost, {holders}"
    held = scene.peers["bad loser"].root / scene.files[name]
    with scene.shown(name).open("rb", buffering=0) as file:
        assert file.read(BLOCK) == DATA[:BLOCK]
        held.unlink()
        outcome, took = timed(partial(os.pread, file.fileno(), BLOCK, 5 << 20))
        assert took < LIMIT
        if holders == "only":
            assert _failed(outcome), outcome
            held.hardlink_to(scene.root / "data")
            outcome = os.pread(file.fileno(), BLOCK, 5 << 20)
        assert outcome == DATA[5 << 20 :][:BLOCK]
    assert _whole(scene.shown(name)) < LIMIT


@pytest.mark.parametrize("holders", ["twice", "only"])
def test_a_file_of_theirs_that_changes_is_never_a_mixture(scene: Scene, holders: str) -> None:
    """They have no ETags; seconds in Last-Modified are all that tells."""
    name = f"changed, {holders}"
    held = scene.peers["bad changer"].root / scene.files[name]
    with scene.shown(name).open("rb", buffering=0) as file:
        assert file.read(BLOCK) == DATA[:BLOCK]
        put(held.with_name("new"), NEW, OLD_NS + 10**9)
        held.with_name("new").rename(held)
        for offset in range(1 << 20, SIZE, 1 << 20):
            outcome, took = timed(partial(os.pread, file.fileno(), BLOCK, offset))
            assert took < LIMIT
            if holders == "twice":
                assert outcome == DATA[offset : offset + BLOCK]
            else:
                assert _failed(outcome, errno.ESTALE), outcome


@pytest.mark.parametrize("how", ["open", "direct", "buffered"])
def test_a_reader_of_theirs_that_is_killed_is_gone_with_its_request(scene: Scene, how: str) -> None:
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
    # The kernel does not tell of the ends of those whose pages it was reading.
    if how != "buffered":
        seen("the end of its request", lambda: peer.waiting == 0)
        assert peer.abandoned
    peer.fault = None
    peer.die()  # which ends what still waits
    peer.revive()
    seen("the file to be read", partial(_is_whole, path))


# --- the cache path ---


def test_a_full_cache_path_is_read_past(scene: Scene) -> None:
    assert _read(scene.shown("disk 0", "full")) < LIMIT
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
        finally:
            subprocess.run(["mount", "-o", "remount,rw", small], check=True)
    assert status(scene.readers["full"]).running


@pytest.mark.parametrize("operation", ["write", "fsync", "create"])
def test_a_cache_path_that_answers_eio_is_read_past(scene: Scene, operation: str) -> None:
    number = ["write", "fsync", "create"].index(operation)
    path = scene.shown(f"disk {number}", "broken")
    scene.disk.fail(operation, after=1 << 20 if operation == "write" else 0, only="s-t0")
    try:
        assert _read(path) < LIMIT
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
        finally:
            scene.disk.go()


def test_nothing_unexpected_was_logged(scene: Scene) -> None:
    for node in scene.readers.values():
        assert "Traceback" not in node.log()
