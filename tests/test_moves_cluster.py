"""Moves, drains and removals between real nodes, killed at any moment."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sectorfs.cli.drain import drain_storage
from sectorfs.types import Facts, SectorFile, StorageID
from sectorfs.wire import tokens
from tests.cluster import Node, cluster, run, until
from tests.cluster_fixtures import (
    OLD_NS,
    Background,
    Behaviour,
    FalsePeer,
    ask,
    attach,
    cache_of,
    configure,
    declare_at,
    false_peer,
    free_port,
    locations,
    mounted,
    noise,
    octets,
    put,
    sector_file,
    storages,
)
from tests.hung_disk import hung_disk

BEAT = {"index": {"heartbeat": 0.3, "cutoff": 5}, "storage": {"settle": 0.05}}
MEMBERS = {"p_aux": 64, "t_aux": 317, "sc-02-data-tree-r-last.dat": 400_000}
SIZE = 3_000_000


class Pair:
    """Two nodes, a disk each; the first has the Index."""

    def __init__(self, root: Path, nodes: list[Node]) -> None:
        self.first, self.second = self.nodes = nodes
        self.disks = [root / "disk-first", root / "disk-second"]
        self.ports = [free_port(), free_port()]
        self.ids: list[str] = []

    def start(self, node: Node) -> None:
        """Start a node where it always listens."""
        number = self.nodes.index(node)
        index = self.first if node is self.second else None
        node.start("--listen", f"127.0.0.1:{self.ports[number]}", index=index)

    def put(self, disk: int, name: str) -> None:
        """A sector file on a disk, whole at once."""
        path = self.disks[disk] / name
        if name.startswith("cache/"):
            staging = path.with_name(f"{path.name}.tmp")
            for member, size in MEMBERS.items():
                put(staging / member, noise(f"{name}/{member}", size))
            os.rename(staging, path)
        else:
            staging = path.with_name(f"{path.name}.tmp")
            put(staging, noise(name, SIZE))
            os.rename(staging, path)

    def whole(self, disk: int, name: str) -> bool:
        """True when a disk has a sector file with all of its content; fails for a part of it."""
        path = self.disks[disk] / name
        if not path.exists():
            return False
        if name.startswith("cache/"):
            found = {entry.name: entry.read_bytes() for entry in path.iterdir()}
            assert found == {member: noise(f"{name}/{member}", n) for member, n in MEMBERS.items()}
        else:
            assert path.read_bytes() == noise(name, SIZE)
        return True

    def is_true(self, name: str) -> bool:
        """True when the Index says exactly what the disks hold, one of it primary and healthy."""
        held = locations(self.first, name)
        there = {self.ids[disk] for disk in range(2) if self.whole(disk, name)}
        assert there, f"{name} is lost"
        return set(held) == there and any(one.primary and one.healthy for one in held.values())

    def names_of(self, name: str) -> list[str]:
        """What there is of a sector file on the disks, finished or not."""
        kind, sector = name.split("/")
        found = []
        for disk in self.disks:
            for folder in (disk / kind, disk / kind / "fetching"):
                with suppress(FileNotFoundError):
                    if folder.name == "fetching":
                        found += [
                            str(path.relative_to(disk)) for path in folder.rglob(f"{sector}.*")
                        ]
                    elif (folder / sector).exists():
                        found += [str(disk / name)]
        return found

    def settled(self, name: str) -> None:
        """Wait until the Index is true of a file."""
        until(f"a true Index of {name}", lambda: self.is_true(name), 20)

    def only(self, disk: int, name: str) -> bool:
        """True when a file is whole on one disk, and nowhere else."""
        return self.whole(disk, name) and not self.whole(1 - disk, name) and self.is_true(name)

    def litter(self) -> list[Path]:
        """What unfinished work left on the disks."""
        return [
            path
            for disk in self.disks
            for path in disk.rglob("*")
            if path.name.endswith(".tmp") or "fetching" in path.parts[:-1]
        ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("moves")
    with cluster(root, "first", "second") as nodes:
        found = Pair(root, nodes)
        for node in nodes:
            configure(node, **BEAT)
            found.start(node)
        found.ids = [attach(node, disk) for node, disk in zip(nodes, found.disks, strict=True)]
        for disk in found.disks:
            for kind in ("sealed", "cache", "unsealed"):
                (disk / kind).mkdir()
        until("both healthy", lambda: all(storages(found.first)[one].healthy for one in found.ids))
        yield found


# --- the verbs ---


def test_a_sector_is_moved_between_nodes_from_either(pair: Pair) -> None:
    for number, node in enumerate(pair.nodes):
        names = [f"sealed/s-t01000-{number}", f"cache/s-t01000-{number}"]
        for name in names:
            pair.put(0, name)
            pair.settled(name)
        result = node.json("sector", "move", f"s-t01000-{number}", "--to", pair.ids[1])
        assert [(one["file_type"], one["how"]) for one in result] == [
            ("sealed", "fetched"),
            ("cache", "fetched"),
        ]
        for name in names:
            assert pair.only(1, name)
            ours = pair.disks[1] / name
            assert all(path.stat().st_mtime_ns % 1000 == 789 for path in [*ours.rglob("*")])
        again = node.json("sector", "move", names[0], "--to", pair.ids[1])
        assert [one["how"] for one in again] == ["was there"]
    assert pair.litter() == []


def test_a_storage_is_drained_and_says_what_stays(pair: Pair) -> None:
    names = [f"{kind}/s-t02000-{number}" for number in range(4) for kind in ("sealed", "cache")]
    for name in names:
        pair.put(0, name)
    for name in names:
        pair.settled(name)
    stuck = pair.disks[0] / "cache" / "s-t02000-9" / "inner"
    stuck.mkdir(parents=True)
    put(stuck.parent / "p_aux", b"p" * 64)
    until("declared", lambda: locations(pair.first, "cache/s-t02000-9"))
    result = run(
        "storage", "drain", str(pair.disks[0]), "--to", pair.ids[1], repo=pair.first.repo.root
    )
    assert result.returncode == 1
    assert "moved 8 files" in result.stdout
    assert result.stderr.count("\n") == 1
    assert "cache/s-t02000-9 stays" in result.stderr
    for name in names:
        assert pair.only(1, name)
    stuck.rmdir()
    report = pair.second.json("storage", "drain", pair.ids[0])
    assert (report["moved"], report["failed"]) == (1, [])
    assert pair.first.json("storage", "drain", pair.ids[0])["moved"] == 0


def test_a_sector_is_removed_only_by_force(pair: Pair) -> None:
    name = "sealed/s-t03000-1"
    pair.put(0, name)
    pair.settled(name)
    refused = run("sector", "rm", "s-t03000-1", repo=pair.second.repo.root)
    assert refused.returncode == 4
    assert "--force" in refused.stderr
    copies = pair.second.json("sector", "rm", "s-t03000-1", "--copies")
    assert copies == [{"file_type": "sealed", "sector": "s-t03000-1", "storages": []}]
    pair.put(1, name)
    pair.settled(name)
    until("both", lambda: len(locations(pair.first, name)) == 2)
    pair.second.call("sector", "rm", name, "--from", pair.ids[0])
    assert pair.only(1, name)
    pair.first.call("sector", "rm", "s-t03000-1", "--type", "sealed", "--force")
    assert not pair.whole(0, name)
    assert not pair.whole(1, name)
    assert locations(pair.first, name) == {}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("sector", "move", "s-t01000-x", "--to", "y"), 2),
        (("sector", "move", "s-t01000-1"), 2),
        (("sector", "move", "s-t01000-1", "--to", "nowhere"), 3),
        (("sector", "move", "odd/s-t01000-1", "--to", "y"), 2),
        (("sector", "move", "sealed/s-t01000-1", "--to", "y", "--type", "cache"), 2),
        (("sector", "move", "s-t01000-1", "--to", "y", "--type", "odd"), 2),
        (("sector", "rm", "s-t09999-1", "--force"), 3),
        (("sector", "rm", "s-t01000-1", "--force", "--copies"), 2),
        (("storage", "drain", "nowhere"), 3),
    ],
)
def test_wrong_command_lines(pair: Pair, arguments: tuple[str, ...], code: int) -> None:
    result = run(*arguments, "--json", repo=pair.first.repo.root)
    assert result.returncode == code, result.stderr
    assert set(json.loads(result.stderr)) == {"error", "thing", "hint"}


# --- DELETE ---


def delete(node: Node, path: str, permission: str = "admin", **headers: str) -> int:
    """The status of a DELETE."""
    request = urllib.request.Request(f"{node.repo.api()}/remote/{path}", method="DELETE")
    token = tokens.sign(node.repo.secret(create=False), (permission,))
    request.add_header("authorization", f"Bearer {token}")
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        return error.code


def test_delete_takes_only_what_is_here_and_not_to_be_kept(pair: Pair) -> None:
    name = "sealed/s-t04000-1"
    assert delete(pair.first, name) == 404
    pair.put(0, name)
    pair.settled(name)
    assert delete(pair.first, name, permission="read") == 403
    assert delete(pair.second, name) == 404
    assert delete(pair.first, name) == 409
    assert delete(pair.first, f"{name}?keep={pair.ids[0]}") == 200
    assert pair.whole(0, name)
    pair.put(1, name)
    until("both", lambda: len(locations(pair.first, name)) == 2 and pair.is_true(name))
    assert delete(pair.first, f"{name}?keep=", sectorfs_expect="1-1") == 409
    assert pair.whole(0, name)
    assert delete(pair.first, f"{name}?keep={pair.ids[1]}.another") == 200
    assert pair.only(1, name)
    assert delete(pair.second, f"{name}?force=true") == 200
    assert locations(pair.first, name) == {}


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("keep=../x", {}),
        ("keep=%00", {}),
        (f"keep={'x' * 200}", {}),
        ("force=yes", {}),
        ("force=true&force=true", {}),
        ("", {"sectorfs_expect": "rubbish"}),
        ("", {"sectorfs_moved_to": "../x"}),
        ("", {"sectorfs_moved_to": ""}),
        ("", {"sectorfs_expect": f"{'9' * 40}-1"}),
    ],
)
def test_delete_refuses_rubbish(pair: Pair, query: str, headers: dict[str, str]) -> None:
    assert delete(pair.first, f"sealed/s-t01000-1?{query}", **headers) == 400


def test_delete_of_what_is_no_sector_file(pair: Pair) -> None:
    for path in ("sealed/..", "odd/s-t01000-1", "sealed/s-t01000-1x"):
        assert delete(pair.first, path) in (400, 404)
    assert delete(pair.first, f"stat/{pair.ids[0]}") == 405
    assert delete(pair.first, "cache/s-t01000-1/files") == 405


# --- opposite moves ---


def test_opposite_moves_of_one_file_leave_one_copy_and_wait_for_nobody(pair: Pair) -> None:
    for number in range(10):
        name = f"{'sealed' if number % 2 else 'cache'}/s-t06000-{number}"
        for disk in range(2):
            pair.put(disk, name)
        until(
            "both", lambda name=name: len(locations(pair.first, name)) == 2 and pair.is_true(name)
        )
        file = sector_file(name)

        def move(node: Node, to: int, file: SectorFile = file) -> Background:
            source, target = StorageID(pair.ids[1 - to]), StorageID(pair.ids[to])
            return Background(
                lambda: _whatever(
                    lambda: ask(
                        node, lambda admin: admin.moves.move(file, to=target, source=source)
                    )
                )
            )

        started = time.monotonic()
        both = [move(pair.first, 0), move(pair.second, 1)]
        for one in both:
            one.result(30)
        assert time.monotonic() - started < 15
        pair.settled(name)
        assert len(locations(pair.first, name)) == 1, "neither of two opposite moves was done"
    assert pair.litter() == []


# --- shared paths ---


def test_a_move_into_a_shared_path_survives_the_removal_at_its_source(tmp_path: Path) -> None:
    """Two nodes, one shared path, and a private one on the first: the second node moves."""
    with cluster(tmp_path, "one", "two") as (one, two):
        for node in (one, two):
            configure(node, **BEAT)
        one.start()
        two.start(index=one)
        private, shared = tmp_path / "private", tmp_path / "shared"
        put(private / "sealed" / "s-t01000-1", noise("shared", SIZE))
        origin = attach(one, private)
        target = attach(one, shared)
        ask(two, lambda admin: admin.attach(str(shared), None))
        until("declared", lambda: origin in locations(one, "sealed/s-t01000-1"))
        until("healthy", lambda: storages(one)[target].healthy)
        assert len(storages(one)[target].urls) == 2
        file = sector_file("sealed/s-t01000-1")
        with_two = ask(two, lambda admin: admin.moves.move(file, to=StorageID(target), source=None))
        assert (with_two.how, with_two.source) == ("fetched", origin)
        assert (shared / "sealed" / "s-t01000-1").read_bytes() == noise("shared", SIZE)
        assert not (private / "sealed" / "s-t01000-1").exists()
        held = locations(one, "sealed/s-t01000-1")
        assert set(held) == {target}
        assert held[target].primary
        # Without keep the first node would take the shared copy as well; it is the last one.
        assert delete(one, "sealed/s-t01000-1") == 409
        assert delete(one, f"sealed/s-t01000-1?keep={target}") == 200
        assert (shared / "sealed" / "s-t01000-1").exists()


@pytest.mark.mount
def test_a_full_destination_leaves_the_source(tmp_path: Path) -> None:
    small = tmp_path / "small"
    with mounted("-t", "tmpfs", "-o", "size=1M", "none", at=small):
        with cluster(tmp_path, "one", "two") as (one, two):
            for node in (one, two):
                configure(node, **BEAT)
            one.start()
            two.start(index=one)
            put(tmp_path / "big" / "sealed" / "s-t01000-1", noise("big", SIZE))
            origin, target = attach(one, tmp_path / "big"), attach(two, small / "path")
            until("declared", lambda: locations(one, "sealed/s-t01000-1"))
            until("healthy", lambda: storages(one)[target].healthy)
            result = run("sector", "move", "s-t01000-1", "--to", target, repo=one.repo.root)
            assert result.returncode == 1
            assert "no room" in result.stderr
            drained = run("storage", "drain", origin, repo=one.repo.root)
            assert drained.returncode == 1
            assert set(locations(one, "sealed/s-t01000-1")) == {origin}
            assert list((small / "path").rglob("s-t0*")) == []


@pytest.mark.mount
def test_a_disk_that_fails_is_named_marked_and_used_again(tmp_path: Path) -> None:
    name = "sealed/s-t01000-1"
    with hung_disk(tmp_path) as disk, cluster(tmp_path, "one", "two") as (one, two):
        for node in (one, two):
            configure(node, **BEAT)
        one.start()
        two.start(index=one)
        put(tmp_path / "well" / name, noise("well", SIZE))
        origin, target = attach(one, tmp_path / "well"), attach(two, disk.path)
        until("declared", lambda: locations(one, name))
        until("healthy", lambda: storages(one)[target].healthy)
        disk.fail("write", after=SIZE // 2, only="s-t0")
        result = run("sector", "move", name, "--to", target, repo=one.repo.root)
        assert result.returncode == 1
        assert f"{disk.path}" in result.stderr
        assert "Input/output error" in result.stderr
        assert set(locations(one, name)) == {origin}
        disk.fail("read")
        until("the reason", lambda: "Input/output error" in (storages(one)[target].error or ""))
        refused = run("sector", "move", name, "--to", target, repo=one.repo.root)
        assert refused.returncode == 1
        assert "Input/output error" in refused.stderr
        disk.go()
        until("healthy again", lambda: storages(one)[target].healthy)
        one.call("sector", "move", name, "--to", target)
        assert set(locations(one, name)) == {target}
        assert (disk.source / name).read_bytes() == noise("well", SIZE)


@pytest.mark.mount
def test_a_fetch_is_counted_until_it_ends(tmp_path: Path) -> None:
    def stalls(peer: FalsePeer) -> Behaviour:
        def behave(connection: socket.socket, path: str) -> None:
            connection.sendall(octets(SIZE) + b"x" * 1000)
            peer.gate.wait(30)

        return behave

    with cluster(tmp_path, "one") as (one,), false_peer(stalls) as peer:
        configure(one, **BEAT, timeouts={"progress": 20})
        one.start(mount=True)
        declare_at(one, "far", peer.url, {"sealed/s-t01000-1": Facts(SIZE, OLD_NS)})
        path = one.mountpoint / "sealed" / "s-t01000-1"
        until("the file", path.exists)
        reader = Background(path.read_bytes)
        cache = cache_of(one)
        until("the fetch to be counted", lambda: storages(one)[cache].reserved > SIZE // 2)
        peer.close()
        outcome, _ = reader.result()
        assert isinstance(outcome, OSError)
        until("its end to be counted", lambda: storages(one)[cache].reserved == 0)


# --- kill -9 ---


def crash_at_random(pair: Pair, seed: int) -> None:
    """One piece of work, one node killed while it is done, and what the next start finds."""
    rng = random.Random(seed)
    kind = rng.choice(["sealed", "cache"])
    work = rng.choice(["move", "drain", "remove"])
    victim = rng.choice(pair.nodes)
    asked = rng.choice(pair.nodes)
    name = f"{kind}/s-t05000-{seed}"
    file = sector_file(name)
    pair.put(0, name)
    if work == "remove":
        pair.put(1, name)
    pair.settled(name)
    origin, target = StorageID(pair.ids[0]), StorageID(pair.ids[1])

    def call() -> object:
        if work == "move":
            return ask(asked, lambda admin: admin.moves.move(file, to=target, source=None))
        if work == "drain":
            return ask(asked, lambda admin: drain_storage(admin, origin, target))
        return ask(
            asked,
            lambda admin: admin.moves.remove(file, force=False, copies=False, storage=origin),
        )

    changes, more = rng.randint(0, 5), rng.uniform(0.0, 0.004)
    outcome = Background(lambda: _whatever(call))
    _wait_for_changes(lambda: pair.names_of(name), changes, outcome)
    moment = time.monotonic() + more
    while time.monotonic() < moment:
        pass  # a few milliseconds, too short to be slept
    victim.kill()
    outcome.result()
    pair.start(victim)
    pair.settled(name)
    until("nothing unfinished", lambda: pair.litter() == [])
    if not pair.only(1, name):
        until("both healthy", lambda: all(storages(pair.first)[one].healthy for one in pair.ids))
        call()
    assert pair.only(1, name), (
        f"seed {seed}: {work} of {name} by {asked.name}, {victim.name} killed"
    )
    assert pair.litter() == []


def _wait_for_changes(look: Callable[[], object], changes: int, work: Background) -> None:
    """Return once what `look` sees changed so often, or when the work is done."""
    before = look()
    while changes and not work.done:
        now = look()
        if now != before:
            before = now
            changes -= 1


def _whatever(call: object) -> None:
    try:
        call()  # type: ignore[operator]  # the work
    except Exception as exc:
        print(f"as killed: {exc!r}")


@pytest.mark.timeout(240)
def test_a_node_killed_at_any_moment_leaves_one_whole_primary_copy(pair: Pair) -> None:
    for seed in range(20):
        crash_at_random(pair, seed)


@pytest.mark.long
def test_nodes_killed_at_many_more_moments(pair: Pair) -> None:
    for seed in range(1000, 1200):
        crash_at_random(pair, seed)


def crash_at_every_step(root: Path, scenario: str, least: int) -> None:
    """See `tests.move_crasher`."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.move_crasher", str(root), scenario],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= least


@pytest.mark.parametrize(("scenario", "least"), [("copy-directory", 20), ("remove-directory", 6)])
def test_a_process_killed_at_every_step(tmp_path: Path, scenario: str, least: int) -> None:
    crash_at_every_step(tmp_path, scenario, least)


@pytest.mark.long
@pytest.mark.parametrize(
    ("scenario", "least"),
    [("link-file", 10), ("link-directory", 10), ("copy-file", 15), ("remove-file", 6)],
)
def test_other_work_killed_at_every_step(tmp_path: Path, scenario: str, least: int) -> None:
    crash_at_every_step(tmp_path, scenario, least)
