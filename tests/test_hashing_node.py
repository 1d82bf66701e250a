"""`sectorfs hash` and the hashing of real nodes: over restarts, in `status`, for peers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Node, cluster, run, until
from tests.cluster_fixtures import OLD_NS, attach, configure, metric, noise, put

MIB = 1 << 20
SEALED = "sealed/s-t01000-1"
TREE = {"p_aux": b"p" * 64, "t_aux": noise("t", 3 * MIB)}
HASH = {"hash": {"delay": 0.01, "idle": 0.01}}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with cluster(tmp_path, "one") as [one]:
        configure(one, **HASH)
        yield one


def is_idle(node: Node) -> bool:
    report = node.json("hash", "status")
    return report["state"] == "idle" and not report["left_files"]


def test_a_node_hashes_its_files_and_says_how_far_it_is(node: Node) -> None:
    disk = node.root / "disk"
    put(disk / SEALED, noise("one", 5 * MIB))
    for name, data in TREE.items():
        put(disk / "cache/s-t01000-1" / name, data)
    node.start()
    attach(node, disk)
    until("the files to be hashed", lambda: metric(node, "sectorfs_hashed_bytes_total") > 8 * MIB)
    until("nothing to be left", lambda: is_idle(node))
    status = node.json("status")
    assert status["hashing"]["problems"] == []
    assert "idle, nothing is left" in node.call("status")
    assert node.call("hash", "status") == "hashing: idle, nothing is left\n"
    names = {path.name.partition("@")[0] for path in node.repo.manifests.rglob("*@*")}
    assert names == {"s-t01000-1", *TREE}
    assert sorted(path.name for path in disk.iterdir()) == [
        "cache",
        "sealed",
        "sectorstore.json",
    ]
    assert (disk / SEALED).stat().st_mtime_ns == OLD_NS


def test_a_pause_holds_over_a_restart(node: Node) -> None:
    disk = node.root / "disk"
    put(disk / SEALED, noise("one", MIB))
    assert json.loads(run("hash", "pause", "--json", repo=node.repo.root).stdout) == {
        "state": "stopped",
        "paused": True,
        "left_files": 0,
        "left_bytes": 0,
        "rate": 0,
        "seconds_left": None,
        "current": [],
        "problems": [],
    }
    node.start()
    attach(node, disk)
    until("the file to be counted", lambda: node.json("hash", "status")["left_files"] == 1)
    report = node.json("hash", "status")
    assert (report["state"], report["paused"], report["left_bytes"]) == ("paused", True, MIB)
    assert "paused, 1 files, 1.0 MiB left" in node.call("hash", "status")
    assert node.stop() == 0
    node.start()
    until("the file to be counted", lambda: node.json("hash", "status")["left_files"] == 1)
    assert node.json("hash", "status")["state"] == "paused"
    assert node.json("hash", "resume")["paused"] is False
    until("the file to be hashed", lambda: metric(node, "sectorfs_hashed_bytes_total") == MIB)
    until("nothing to be left", lambda: is_idle(node))
    assert node.stop() == 0
    assert node.call("hash", "status") == "hashing: no node runs\n"


def test_a_node_that_is_killed_goes_on_where_it_was(node: Node) -> None:
    disk = node.root / "disk"
    put(disk / SEALED, noise("one", MIB))
    put(disk / "sealed/s-t01000-2", noise("two", MIB))
    node.start()
    attach(node, disk)
    hashed = "sectorfs_hashed_bytes_total"
    until("the files to be hashed", lambda: metric(node, hashed) == 2 * MIB)
    until("nothing to be left", lambda: is_idle(node))
    node.kill()
    put(disk / "sealed/s-t01000-3", noise("three", MIB))
    node.start()
    until("the new file to be hashed", lambda: metric(node, hashed) == MIB)
    until("nothing to be left", lambda: is_idle(node))
    assert metric(node, hashed) == MIB


def test_bad_settings_are_named(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    for text, word in (
        ('max_rate = "fast"', "hash.max_rate"),
        ('max_rate = "1KB"', "hash.max_rate"),
        ("idle = 0", "hash.idle"),
        ("rate = 5", "hash.rate"),
    ):
        (repo / "config.toml").write_text(f"[hash]\n{text}\n")
        result = run("config", "check", repo=repo)
        assert result.returncode == 2
        assert word in result.stderr
