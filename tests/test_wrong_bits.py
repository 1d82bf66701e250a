"""A thousand bits flipped on their way, manifests that lie, digests that nobody satisfies.

All of it through a real mount: no reader ever sees a wrong byte.
"""

from __future__ import annotations

import errno
import json
import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from sectorfs.index.protocol import Declaration, FsStat, HealthReport, SectorIndex, StorageInfo
from sectorfs.stores.manifest import BLOCK, LEAF, Manifest, leaf_hashes
from sectorfs.stores.rolls import make_roll
from sectorfs.types import Facts, StorageID
from tests.cluster import Node, cluster, until
from tests.cluster_fixtures import (
    LIMIT,
    configure,
    facts_of,
    metric,
    noise,
    put,
    sector_file,
    status,
    timed,
    with_index,
)
from tests.faulty_peer import (
    Answer,
    Asked,
    Fault,
    FaultyPeer,
    Flipping,
    closes_after,
    dripping,
    elsewhere,
    faulty_peers,
    good,
    saying,
    silent,
    stalls_after,
    with_length,
)

pytestmark = pytest.mark.mount

LARGE = noise("large", 640 * LEAF + 1)
MIDDLE = noise("middle", 6 * BLOCK + 100)
SMALL = noise("small", 70_000)
OTHER = noise("other", 70_000)
MEMBERS = {"p_aux": noise("p", 64), "t_aux": noise("t", 3000), "sc-02-data-tree-r-last.dat": MIDDLE}


class Scene:
    """An index, a reader, and peers whose manifests are right until a test says otherwise."""

    def __init__(self, root: Path, index: Node, reader: Node, peers: list[FaultyPeer]) -> None:
        self.root = root
        self.index = index
        self.reader = reader
        self.bad, self.good = peers
        self._number = 0

    def hold(
        self,
        data: bytes | dict[str, bytes],
        *peers: FaultyPeer,
        count: int = 1,
        header: bool = True,
        manifests: bool = True,
        digest: bytes | None = None,
    ) -> list[str]:
        """Let peers hold and declare sector files of one content; their names."""
        kind = "unsealed" if isinstance(data, bytes) else "cache"
        names = [f"{kind}/s-t01000-{self._number + one}" for one in range(1, count + 1)]
        self._number += count
        made = _manifests(data)
        roll = make_roll([(name, one.size, one.digest) for name, one in made.items()])
        known = made[""].digest if isinstance(data, bytes) else roll.digest
        facts: dict[str, Facts] = {}
        for peer in peers:
            for name in names:
                path = peer.root / name
                for member, content in ({"": data} if isinstance(data, bytes) else data).items():
                    put(path / member if member else path, content)
                    if manifests:
                        peer.prove(f"{name}/{member}".rstrip("/"), made[member], header=header)
                if not isinstance(data, bytes):
                    os.utime(path, ns=(10**18, 10**18))
                    peer.prove_directory(name, roll)
                facts[name] = msgspec.structs.replace(facts_of(path), digest=digest or known)
        with_index(self.index, lambda index: self._declare(index, peers, facts))
        last = self.shown(names[-1])
        until("the names", last.exists)
        until("all who have them", lambda: len(_holders(last)) == len(peers))
        return names

    async def _declare(
        self, index: SectorIndex, peers: tuple[FaultyPeer, ...], facts: dict[str, Facts]
    ) -> None:
        stat = FsStat(capacity=1 << 40, available=1 << 39)
        for peer in peers:
            storage = StorageID(peer.root.name)
            weight = 1000 if peer is self.bad else 10
            await index.attach(
                StorageInfo(storage=storage, urls=(peer.url,), weight=weight, can_store=True), stat
            )
            await index.report_health(storage, HealthReport(stat=stat))
            await index.declare(
                [Declaration(sector_file(name), storage, True, one) for name, one in facts.items()]
            )

    def shown(self, name: str) -> Path:
        """A file in the mount."""
        return self.reader.mountpoint / name

    def wrong(self) -> float:
        """How often wrong bytes were caught."""
        return metric(self.reader, "sectorfs_wrong_bytes_total")


def _holders(shown: Path) -> list[object]:
    found: list[object] = json.loads(os.getxattr(shown, "user.sectorfs.locations"))
    return found


def _manifests(data: bytes | dict[str, bytes]) -> dict[str, Manifest]:
    parts = {"": data} if isinstance(data, bytes) else data
    return {name: Manifest.of_leaves(len(one), leaf_hashes(one)) for name, one in parts.items()}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("bits")
    with ExitStack() as stack:
        index, reader = stack.enter_context(cluster(root, "index", "reader"))
        peers = stack.enter_context(faulty_peers(root / "peers", "bad", "good"))
        for node in (index, reader):
            policy = {"policy": {"unsealed": "stream", "cache": "stream"}}
            configure(node, index={"heartbeat": 1, "cutoff": 3600}, fetch=policy)
        index.start()
        reader.start(mount=True, index=index)
        yield Scene(root, index, reader, peers)


@pytest.fixture(autouse=True)
def behaving(scene: Scene) -> Iterator[None]:
    yield
    scene.bad.fault = scene.good.fault = None


@pytest.mark.parametrize("header", [True, False], ids=["told", "asked"])
def test_small_reads_of_the_only_source(scene: Scene, header: bool) -> None:
    """Whether the leaf hashes come with the bytes or have to be asked for."""
    (name,) = scene.hold(LARGE, scene.bad, header=header)
    before, flips = scene.wrong(), Flipping(lambda number, first: first)
    fd = os.open(scene.shown(name), os.O_RDONLY | os.O_DIRECT)
    try:
        scene.bad.fault = flips
        for step in range(500):
            leaf = 1 + step * 257 % 639  # far from each other: nothing is read ahead
            offset = leaf * LEAF + 4096 * (leaf % 16)
            assert os.pread(fd, 4096, offset) == LARGE[offset : offset + 4096]
    finally:
        os.close(fd)
    assert flips.flipped >= 500
    assert scene.wrong() - before == flips.flipped
    assert os.getxattr(scene.shown(name), "user.sectorfs.verified") == b"blocks"


def test_whole_files_in_sequence(scene: Scene) -> None:
    """Bulk, and what is read ahead: the bad source is left at the first bit, and named."""
    names = scene.hold(MIDDLE, scene.bad, scene.good, count=40)
    before, flips = scene.wrong(), Flipping(lambda number, first: number % 3 == 1)
    scene.bad.fault = flips
    for name in names:
        assert scene.shown(name).read_bytes() == MIDDLE
    assert flips.flipped >= 20
    assert scene.wrong() - before == flips.flipped
    problems = status(scene.reader).problems
    assert any(scene.bad.url in line and "gave wrong bytes" in line for line in problems), problems


def test_small_files_fetched_whole(scene: Scene) -> None:
    names = scene.hold(SMALL, scene.bad, scene.good, count=60)
    before, flips = scene.wrong(), Flipping(lambda number, first: True)
    scene.bad.fault = flips
    for name in names:
        assert scene.shown(name).read_bytes() == SMALL
    assert flips.flipped >= 30
    assert scene.wrong() - before == flips.flipped


def test_the_files_of_directories(scene: Scene) -> None:
    names = scene.hold(MEMBERS, scene.bad, scene.good, count=10)
    before, flips = scene.wrong(), Flipping(lambda number, first: True)
    scene.bad.fault = flips
    for name in names:
        for member, data in MEMBERS.items():
            assert (scene.shown(name) / member).read_bytes() == data
    assert flips.flipped >= 10
    assert scene.wrong() - before == flips.flipped
    why = scene.reader.json("why", str(scene.shown(names[-1]) / "t_aux"))
    (barred,) = [one for one in why["sources"] if one["storage"] == "bad"]
    assert "gave wrong bytes" in barred["against"]


def test_once_in_a_thousand_is_nothing_to_a_reader(scene: Scene) -> None:
    (name,) = scene.hold(LARGE, scene.bad)
    scene.bad.fault = Flipping(lambda number, first: number % 1000 == 5)
    fd = os.open(scene.shown(name), os.O_RDONLY | os.O_DIRECT)
    try:
        for leaf in random.Random(2).sample(range(len(LARGE) // LEAF), 200):
            assert os.pread(fd, 4096, leaf * LEAF) == LARGE[leaf * LEAF : leaf * LEAF + 4096]
    finally:
        os.close(fd)


@pytest.mark.parametrize("data", [LARGE, SMALL], ids=["large", "small"])
def test_a_digest_that_nobody_satisfies_is_an_error_with_all_causes(
    scene: Scene, data: bytes
) -> None:
    (name,) = scene.hold(data, scene.bad, scene.good, digest=b"\1" * 32)
    outcome, _ = timed(scene.shown(name).read_bytes)
    assert isinstance(outcome, OSError), outcome
    assert outcome.errno == errno.EIO
    (line,) = [line for line in scene.reader.log().splitlines() if f"{name}: no source" in line][:1]
    assert scene.bad.url in line
    assert scene.good.url in line


def _cut(encoded: bytes) -> bytes:
    return encoded[: len(encoded) // 2]


def _longer(encoded: bytes) -> bytes:
    return encoded + bytes(32)


def _of_another(encoded: bytes) -> bytes:
    other = noise("yet another", len(LARGE))
    return Manifest.of_leaves(len(other), leaf_hashes(other)).encode()


def _of_another_size(encoded: bytes) -> bytes:
    return Manifest.of_leaves(len(OTHER), leaf_hashes(OTHER)).encode()


def _wrong_leaves(encoded: bytes) -> bytes:
    return encoded[: -64 * 32] + bytes(64 * 32)


def _nonsense(encoded: bytes) -> bytes:
    return noise("nonsense", len(encoded))


@pytest.mark.parametrize(
    "lie", [_cut, _longer, _of_another, _of_another_size, _wrong_leaves, _nonsense]
)
def test_a_manifest_that_lies_is_had_from_the_next(scene: Scene, lie: object) -> None:
    assert callable(lie)
    (name,) = scene.hold(LARGE, scene.bad, scene.good, header=False)
    kept = scene.bad.root / "manifests" / name / "whole"
    kept.write_bytes(lie(kept.read_bytes()))
    fd = os.open(scene.shown(name), os.O_RDONLY | os.O_DIRECT)
    try:
        for leaf in (0, 300, len(LARGE) // LEAF - 5):
            assert os.pread(fd, 4096, leaf * LEAF) == LARGE[leaf * LEAF : leaf * LEAF + 4096]
    finally:
        os.close(fd)


def about_manifests(fault: Fault) -> Fault:
    """A fault of answers about manifests alone."""

    def chosen(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        (fault if "/manifest" in asked.path else good)(peer, connection, asked, answer)

    return chosen


@pytest.mark.parametrize(
    "fault",
    [
        silent,
        dripping,
        stalls_after(40),
        closes_after(0),
        closes_after(40),
        with_length(32),
        with_length(-32),
        elsewhere,
        saying("500 Internal Server Error"),
    ],
)
def test_manifests_that_do_not_come_cost_one_deadline(scene: Scene, fault: Fault) -> None:
    (name,) = scene.hold(LARGE, scene.bad, scene.good, header=False)
    scene.bad.fault = about_manifests(fault)
    waits = []
    fd, took = timed(lambda: os.open(scene.shown(name), os.O_RDONLY | os.O_DIRECT))
    assert isinstance(fd, int), fd
    waits.append(took)
    try:
        for leaf in (0, 300, len(LARGE) // LEAF - 5):
            data, took = timed(lambda leaf=leaf: os.pread(fd, 4096, leaf * LEAF))
            assert data == LARGE[leaf * LEAF : leaf * LEAF + 4096]
            waits.append(took)
    finally:
        os.close(fd)
    assert max(waits) < LIMIT, waits


def test_without_any_manifest_the_whole_is_proved_before_it_is_shown(scene: Scene) -> None:
    right, wrong = (scene.hold(MIDDLE, scene.bad, manifests=False)[0] for _ in range(2))
    assert scene.shown(right).read_bytes() == MIDDLE
    scene.bad.fault = Flipping(lambda number, first: True)
    outcome, _ = timed(scene.shown(wrong).read_bytes)
    assert isinstance(outcome, OSError), outcome
    assert outcome.errno == errno.EIO


def test_wrong_bytes_are_had_right_while_a_source_is_back(scene: Scene) -> None:
    """The reader of a bad source waits for the good one that was away, and sees nothing before."""
    (name,) = scene.hold(MIDDLE, scene.bad, scene.good)
    faults: list[Fault] = [Flipping(lambda number, first: True), good]
    scene.bad.fault = faults[0]
    scene.good.die()
    outcome, _ = timed(scene.shown(name).read_bytes)
    assert isinstance(outcome, OSError), outcome
    scene.good.revive()
    until("the file", lambda: timed(scene.shown(name).read_bytes)[0] == MIDDLE)


def test_nothing_unexpected_was_logged(scene: Scene) -> None:
    assert "Traceback" not in scene.reader.log()
