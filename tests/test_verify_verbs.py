"""`sector verify` as operators meet it: real nodes, exit codes, text, JSON, repairs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sectorfs.cli.sample import write_sector
from sectorfs.stores.manifest import BLOCK
from sectorfs.types import SectorID
from tests.cli_fixtures import Say, fine, on_terminal, refused, sayer
from tests.cluster import SECTORFS, Node, cluster, run, until, write_cache
from tests.cluster_fixtures import (
    OLD_NS,
    attach,
    configure,
    declare_at,
    facts_of,
    locations,
    metric,
    noise,
    put,
    put_sparse,
)
from tests.scrub_fixtures import SIZE, cache_files, flip

ONE, TWO = "sealed/s-t01000-1", "sealed/s-t01000-2"
CACHE = "cache/s-t01000-1"
PIECE = "piece/s-t00-1"
"""May have any length."""


class Pair:
    """A node that holds sectors, and one that has copies."""

    def __init__(self, holder: Node, keeper: Node) -> None:
        self.holder = holder
        self.keeper = keeper
        self.disk = holder.root / "disk"

    def hold(self, name: str, data: bytes) -> Path:
        """Give the holder a file, and wait until both know it."""
        put(self.disk / name, data)
        self.known(name)
        return self.disk / name

    def known(self, name: str) -> None:
        """Wait until both nodes know of a file."""
        for node in (self.holder, self.keeper):
            until(f"{name} at {node.name}", partial(locations, node, name))

    def copy(self, name: str) -> Path:
        """Where the keeper has its copy."""
        return self.keeper.repo.cache_path(self.keeper.repo.config()) / name

    def fetched(self, name: str, data: bytes) -> Path:
        """A hashed file, and the keeper's copy of it."""
        self.hold(name, data)
        self.holder.call("sector", "verify", name)
        self.keeper.call("sector", "fetch", name)
        return self.copy(name)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with cluster(tmp_path, "holder", "keeper") as [holder, keeper]:
        configure(holder)
        configure(keeper)
        holder.start()
        found = Pair(holder, keeper)
        attach(holder, found.disk)
        keeper.start(index=holder)
        yield found


@pytest.fixture
def say(pair: Pair, capfd: pytest.CaptureFixture[str]) -> Say:
    return sayer(pair.holder.repo, capfd)


@pytest.fixture
def say_keeper(pair: Pair, capfd: pytest.CaptureFixture[str]) -> Say:
    return sayer(pair.keeper.repo, capfd)


# --- what is found ---


def test_files_are_unproved_then_ok_then_damaged(pair: Pair, say: Say) -> None:
    path = pair.hold(ONE, noise("one", SIZE))
    assert fine(say("sector", "verify", ONE)).out.startswith(f"{ONE} unproved, 8.0 MiB, on ")
    lines = fine(say("sector", "verify", "s-t01000-1")).out.splitlines()
    assert lines[0] == f"{ONE} ok, 8.0 MiB, on {pair.disk}"
    assert lines[1].startswith("verified 1 sector file, 8.0 MiB in ")
    assert lines[1].endswith("/s: 1 ok")
    flip(path, 8 * BLOCK)
    flip(path, 8 * (3 * BLOCK + 70_000))
    flip(path, 8 * (4 * BLOCK))
    said = say("sector", "verify", ONE)
    assert said.code == 1
    assert said.out.startswith(
        f"{ONE} damaged, 3 blocks: {BLOCK}-{2 * BLOCK - 1} {3 * BLOCK}-{5 * BLOCK - 1}, on "
    )
    found = say("sector", "verify", "--all", "--json")
    assert found.code == 1
    report = found.json()
    assert report["states"] == {"damaged": 1}
    (one,) = report["findings"]
    assert (one["state"], one["blocks"]) == ("damaged", 3)
    assert one["ranges"] == [[BLOCK, 2 * BLOCK], [3 * BLOCK, 5 * BLOCK]]
    assert path.stat().st_mtime_ns == OLD_NS, "nothing is written"


def test_a_thousand_bits_are_found_in_one_run(pair: Pair, say: Say) -> None:
    names = [f"piece/s-t00-{number}" for number in range(1, 7)]
    size = 24 * BLOCK + 12_345
    for name in names:
        put(pair.disk / name, noise(name, size))
    until("all of them", lambda: say("storage", "list", "--json").out.count('"piece": 6') == 1)
    fine(say("sector", "verify", "--all"))
    draw = random.Random(1000)
    bits = {(draw.choice(names), draw.randrange(8 * size)) for _ in range(1000)}
    for name, bit in bits:
        flip(pair.disk / name, bit)
    found = say("sector", "verify", "--all", "--json")
    assert found.code == 1
    ranges = {
        f"{one['file_type']}/{one['sector']}": one["ranges"] for one in found.json()["findings"]
    }
    for name, bit in bits:
        assert any(start <= bit // 8 < end for start, end in ranges[name])


def test_a_directory_is_one_line_while_it_is_well(pair: Pair, say: Say) -> None:
    files = cache_files("cache")
    write_cache(pair.disk / CACHE, files)
    pair.known(CACHE)
    until("it is hashed", lambda: " unproved, " in say("sector", "verify", CACHE).out)
    assert fine(say("sector", "verify", CACHE)).out.splitlines()[0].startswith(f"{CACHE} ok, ")
    flip(pair.disk / CACHE / "p_aux", 9)
    (pair.disk / CACHE / "t_aux").unlink()
    until("both are found", lambda: say("sector", "verify", CACHE).out.count("\n") == 3)
    lines = say("sector", "verify", CACHE).out.splitlines()
    assert lines[0].startswith(f"{CACHE}/p_aux damaged, 1 block: 0-63, on ")
    assert lines[1] == f"{CACHE}/t_aux incomplete, is not there, on {pair.disk}"
    assert lines[2].endswith(": 1 damaged, 1 incomplete, 1 ok")


def test_a_sector_as_sealing_leaves_it_lacks_nothing(pair: Pair, say: Say) -> None:
    write_sector(pair.disk, SectorID(1000, 1))
    until("its three files", lambda: "cache" in say("storage", "find", "s-t01000-1").out)
    until("all are known", lambda: say("sector", "verify", "s-t01000-1").out.count(", on ") == 3)
    report = fine(say("sector", "verify", "s-t01000-1", "--json")).json()
    assert report["states"] == {"ok": 9}


def test_status_tells_what_was_found_until_it_is_well(pair: Pair, say: Say) -> None:
    path = pair.hold(ONE, noise("one", SIZE))
    fine(say("sector", "verify", "--all"))
    assert fine(say("status", "--json")).json()["problems"] == []
    flip(path, 5)
    assert say("sector", "verify", "--storage", str(pair.disk)).code == 1
    status = say("status", "--json").json()
    (scrub,) = [one for one in status["scrubs"] if one["path"] == str(pair.disk)]
    assert scrub["states"] == {"damaged": 1}
    assert [one["sector"] for one in scrub["findings"]] == ["s-t01000-1"]
    assert scrub["ended"] is not None
    assert scrub["begun"] is None
    assert f"{pair.disk}: {ONE} is damaged" in status["problems"][0]
    assert metric(pair.holder, "sectorfs_scrub_findings") == 1
    assert metric(pair.holder, "sectorfs_scrubbed_bytes_total") == 2 * SIZE
    said = say("status")
    assert f"scrub of {pair.disk}: ended " in said.out
    pair.holder.stop()
    pair.holder.start()
    until("the file", lambda: say("sector", "verify", ONE).code == 1)
    assert say("status", "--json").json()["problems"], "findings outlive the node"
    flip(path, 5)
    fine(say("sector", "verify", ONE))
    assert say("status", "--json").json()["problems"] == []


# --- repair ---


def test_a_damaged_copy_is_repaired_by_its_bad_blocks_alone(pair: Pair, say_keeper: Say) -> None:
    data = noise("one", 32 * BLOCK)
    copy = pair.fetched(PIECE, data)
    before = copy.stat()
    for block in (0, 7, 31):
        flip(copy, 8 * (block * BLOCK + 11))
    assert say_keeper("sector", "verify", PIECE).code == 1
    sent = metric(pair.holder, "sectorfs_http_sent_bytes_total")
    said = say_keeper("sector", "verify", PIECE, "--repair")
    assert said.code == 1, "something was found"
    assert "damaged, 3 blocks" in said.out
    assert "repaired" in said.out
    assert metric(pair.holder, "sectorfs_http_sent_bytes_total") - sent <= 3 * BLOCK + 65536
    assert copy.read_bytes() == data
    after = copy.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert fine(say_keeper("sector", "verify", PIECE)).out.startswith(f"{PIECE} ok, ")
    assert metric(pair.keeper, "sectorfs_repaired_blocks_total") == 3
    assert say_keeper("status", "--json").json()["problems"] == []


def test_a_primary_copy_is_repaired_only_where_it_is_named(
    pair: Pair, say: Say, say_keeper: Say
) -> None:
    data = noise("one", SIZE)
    pair.fetched(ONE, data)
    path = pair.disk / ONE
    flip(path, 77)
    for arguments in (("--all",), ("--storage", str(pair.disk)), ("s-t01000-1",)):
        said = say("sector", "verify", *arguments, "--repair")
        assert said.code == 1
        assert "not repaired: is a primary copy" in said.out
        assert path.read_bytes() != data
    assert ", repaired" in say("sector", "verify", "s-t01000-1", "--type", "sealed", "--repair").out
    assert path.read_bytes() == data
    fine(say("sector", "verify", ONE))


@pytest.mark.mount
def test_who_reads_through_the_mount_sees_the_repair(tmp_path: Path) -> None:
    """Also of a small file, whose wrong bytes the kernel has cached."""
    data = noise("small", 300_000)
    with cluster(tmp_path, "node") as [node]:
        configure(node)
        node.start(mount=True)
        for name in ("one", "two"):
            attach(node, tmp_path / name)
            put(tmp_path / name / PIECE, data)
        shown = node.mountpoint / PIECE
        until("the file", shown.exists)
        until("both copies", lambda: len(locations(node, PIECE)) == 2)
        node.call("sector", "verify", PIECE)
        for name in ("one", "two"):
            flip(tmp_path / name / PIECE, 8 * 250_000)
        with shown.open("rb") as stream:
            assert stream.read() != data
            flip(tmp_path / "one" / PIECE, 8 * 250_000)
            said = run("sector", "verify", PIECE, "--repair", repo=node.repo.root)
            assert ", repaired" in said.stdout
            stream.seek(0)
            until("the repair", lambda: os.pread(stream.fileno(), len(data), 0) == data)
        assert shown.read_bytes() == data


# --- passes ---


def test_a_pass_that_was_stopped_goes_on(pair: Pair, say: Say) -> None:
    names = [f"piece/s-t00-{number}" for number in range(1, 9)]
    for name in names:
        put_sparse(pair.disk / name, 256 << 20, name.encode())
    pair.known(names[-1])
    until("all of them", lambda: say("storage", "list", "--json").out.count('"piece": 8') == 1)
    command = [*SECTORFS, "--repo", str(pair.holder.repo.root), "sector", "verify", "--all"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until("a file", lambda: metric(pair.holder, "sectorfs_scrubbed_bytes_total") > 300 << 20)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "stopped; the same command goes on from there\n"
    until("the end of it", lambda: not say("status", "--json").json()["verifying"])
    (scrub,) = [one for one in say("status", "--json").json()["scrubs"] if one["begun"]]
    assert 1 <= scrub["files"] < 8
    pair.holder.stop()
    pair.holder.start()
    until("the files", partial(locations, pair.holder, names[-1]))
    rest = fine(say("sector", "verify", "--storage", str(pair.disk), "--json")).json()
    assert rest["files"] == 8 - scrub["files"], "what was looked at is not looked at again"
    again = fine(say("sector", "verify", "--storage", str(pair.disk), "--restart", "--json")).json()
    assert again["files"] == 8


def test_a_terminal_shows_how_far_it_is(pair: Pair) -> None:
    put_sparse(pair.disk / PIECE, 1 << 30, b"the end")
    pair.known(PIECE)
    code, screen = on_terminal(pair.holder, "sector", "verify", PIECE, columns=120)
    assert code == 0
    assert f"{PIECE} unproved, 1.0 GiB" in screen
    assert "/1.0 GiB" in screen, "a bar with bytes came first"


def test_while_the_index_is_away_what_is_known_is_verified(pair: Pair, say_keeper: Say) -> None:
    copy = pair.fetched(ONE, noise("one", SIZE))
    pair.holder.kill()
    assert fine(say_keeper("sector", "verify", ONE)).out.startswith(f"{ONE} ok, ")
    flip(copy, 5)
    said = say_keeper("sector", "verify", ONE, "--repair")
    assert said.code == 1
    assert f"{ONE} damaged, 1 block: 0-{BLOCK - 1}, not repaired: " in said.out


# --- what cannot be done ---


def test_bad_orders(pair: Pair, say: Say, say_keeper: Say) -> None:
    pair.hold(ONE, b"x")
    refused(say("sector", "verify"), 2, "--storage")
    refused(say("sector", "verify", ONE, "--all"), 2)
    refused(say("sector", "verify", "--all", "--storage", str(pair.disk)), 2)
    refused(say("sector", "verify", ONE, "--restart"), 2)
    refused(say("sector", "verify", "nonsense"), 2, "nonsense")
    refused(say("sector", "verify", "--storage", "/nowhere"), 3, "/nowhere")
    refused(say("sector", "verify", "s-t01000-99"), 3, "not on this node")
    refused(say_keeper("sector", "verify", ONE), 3, "not on this node")
    storage = say("storage", "find", "s-t01000-1", "--json").json()["files"][0]["locations"][0]
    refused(say_keeper("sector", "verify", "--storage", storage["storage"]), 3, "no storage path")


def test_what_is_declared_elsewhere_only_is_not_read(pair: Pair, say: Say) -> None:
    path = pair.hold(ONE, noise("one", SIZE))
    declare_at(pair.holder, "liar", "http://127.0.0.1:1/remote", {TWO: facts_of(path)})
    until("the other", lambda: say("storage", "find", "s-t01000-2").code == 0)
    refused(say("sector", "verify", TWO), 3, "not on this node")
    fine(say("sector", "verify", "--all"))


def test_without_a_node_there_is_nobody_to_ask(tmp_path: Path) -> None:
    said = run("sector", "verify", "--all", repo=tmp_path / "repo")
    assert said.returncode == 5
    assert "no node runs" in said.stderr


def test_types_of_all_storages(pair: Pair, say: Say) -> None:
    pair.hold(ONE, noise("one", SIZE))
    write_cache(pair.disk / CACHE, cache_files("cache"))
    until("both", lambda: say("storage", "list", "--json").out.count('"cache": 1') == 1)
    found = fine(say("sector", "verify", "--all", "--type", "sealed", "--json")).json()
    assert found["files"] == 1
    assert os.path.exists(pair.disk / CACHE)
