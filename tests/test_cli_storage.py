"""Operators' verbs on storage paths: set, detach of dead nodes, redeclare, list on terminals."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sectorfs.index.protocol import Lease, SectorIndex
from sectorfs.stores.metadata import read_metadata
from sectorfs.types import FileType
from tests.cli_fixtures import Say, fine, on_terminal, refused, sayer, settings_of
from tests.cluster import SECTORFS, Node, cluster, until, write
from tests.cluster_fixtures import (
    attach,
    cache_of,
    configure,
    declare_at,
    free_port,
    locations,
    with_index,
)
from tests.index_fixtures import lease


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with quick settings, not started."""
    with cluster(tmp_path, "node") as [node]:
        configure(node)
        yield node


@pytest.fixture(params=["on the directory", "on the node"])
def say(request: pytest.FixtureRequest, node: Node, capfd: pytest.CaptureFixture[str]) -> Say:
    """Verbs on a repo, without a running node and with one."""
    if request.param == "on the node":
        node.start()
    return sayer(node.repo, capfd)


def made(say: Say, path: Path, *options: str) -> str:
    """A new storage path; its storage."""
    options = options or ("--store",)
    said = fine(say("storage", "attach", str(path), "--init", *options, "--json"))
    storage: str = said.json()["storage"]
    return storage


def known(say: Say, storage: str) -> dict[str, Any]:
    """What the Index knows of a storage."""
    [found] = [
        item for item in fine(say("storage", "list", "--json")).json() if item["storage"] == storage
    ]
    return dict(found)


# --- set ---


def test_settings_change_on_disk_and_in_the_index_at_once(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    storage = made(say, path)
    text = settings_of(path) | {"Owner": "us"}
    (path / "sectorstore.json").write_text(json.dumps(text))
    options = [
        *("--weight", "20", "--seal", "--no-store", "--max-storage", "10TiB"),
        *("--groups", "a,b", "--allow-to", "c", "--allow-types", "sealed,cache"),
        *("--deny-types", "key", "--allow-miners", "t01000,f01001", "--deny-miners", "t02"),
    ]
    said = fine(say("storage", "set", str(path), *options))
    for line in (
        "weight: 10 → 20",
        "can_seal: no → yes",
        "can_store: yes → no",
        "max_storage: no limit → 10.0 TiB",
        "groups: none → a,b",
        "files that come from now on are declared as copies; what is primary stays primary",
        "filters rule where new files go; what lies here stays",
    ):
        assert line in said.out.splitlines()
    assert settings_of(path) == {
        "ID": storage,
        "Weight": 20,
        "CanSeal": True,
        "CanStore": False,
        "MaxStorage": 10 << 40,
        "Groups": ["a", "b"],
        "AllowTo": ["c"],
        "AllowTypes": ["sealed", "cache"],
        "DenyTypes": ["key"],
        "AllowMiners": ["t01000", "f01001"],
        "DenyMiners": ["t02"],
        "Owner": "us",
    }
    found = known(say, storage)
    assert (found["weight"], found["can_seal"], found["can_store"]) == (20, True, False)
    assert (found["max_storage"], found["groups"], found["allow_to"]) == (
        10 << 40,
        ["a", "b"],
        ["c"],
    )
    assert (found["allow_types"], found["deny_types"]) == (["sealed", "cache"], ["key"])
    assert (found["allow_miners"], found["deny_miners"]) == (["t01000", "f01001"], ["t02"])


def test_empty_string_clears_a_list_and_zero_a_limit(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    storage = made(say, path, "--store", "--groups", "a", "--max-storage", "1TiB")
    said = fine(say("storage", "set", storage, "--groups", "", "--max-storage", "0", "--json"))
    assert said.json() == {
        "storage": storage,
        "path": str(path),
        "changed": {
            "max_storage": {"before": 1 << 40, "after": 0},
            "groups": {"before": ["a"], "after": []},
        },
        "declared": 0,
        "notes": [],
    }
    assert (known(say, storage)["groups"], known(say, storage)["max_storage"]) == ([], 0)
    assert settings_of(path)["Groups"] is None


def test_setting_that_is_so_already(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    made(say, path)
    before = (path / "sectorstore.json").stat().st_mtime_ns
    said = fine(say("storage", "set", str(path), "--weight", "10"))
    assert said.out == f"{path} is set so already\n"
    assert (path / "sectorstore.json").stat().st_mtime_ns == before


def primaries(node: Node) -> dict[str, bool]:
    """Whether each of three sealed files is declared as primary."""
    found = {}
    for number in (1, 2, 3):
        for copy in locations(node, f"sealed/s-t01000-{number}").values():
            found[f"s-t01000-{number}"] = copy.primary
    return found


def test_no_store_rules_what_comes_and_store_upgrades_all(
    say: Say, node: Node, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    write(path / "sealed/s-t01000-1", b"one")
    storage = made(say, path)
    fine(say("storage", "set", storage, "--no-store"))
    write(path / "sealed/s-t01000-2", b"two")
    fine(say("storage", "redeclare", storage))
    until("the new file", lambda: len(primaries(node)) == 2)
    assert primaries(node) == {"s-t01000-1": True, "s-t01000-2": False}
    said = fine(say("storage", "set", storage, "--store", "--json")).json()
    assert said["declared"] == 1
    assert said["notes"] == ["what lies here is declared as primary from now on"]
    assert primaries(node) == {"s-t01000-1": True, "s-t01000-2": True}


def test_path_with_sectors_is_closed_and_stays_readable(
    say: Say, node: Node, tmp_path: Path
) -> None:
    """Neither sealing nor storing: how a path is emptied without being refilled."""
    path = tmp_path / "disk"
    write(path / "sealed/s-t01000-1", b"one")
    storage = made(say, path)
    said = fine(say("storage", "set", str(path), "--no-store", "--no-seal"))
    assert "no new file is placed here any more; what lies here stays readable" in said.out
    assert primaries(node) == {"s-t01000-1": True}
    assert known(say, storage)["files"] == {"sealed": 1}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "nothing to change"),
        (["--allow-types", "sealed,sealde"], "unknown sector file type 'sealde'"),
        (["--deny-types", "Sealed"], "unknown sector file type"),
        (["--allow-miners", "1000"], "not a miner's address"),
        (["--deny-miners", "t01000,x"], "not a miner's address"),
        (["--weight", "-1"], "--weight"),
        (["--weight", "x"], "--weight"),
        (["--weight", "9223372036854775808"], "--weight"),
        (["--max-storage", "-1"], "not a size"),
        (["--max-storage", "10 apples"], "not a size"),
        (["--max-storage", "16EiB"], "out of range"),
        (["--groups", "a\tb,c\x01d"], "groups"),
        (["--nonsense", "1"], "--nonsense"),
    ],
)
def test_nonsense_changes_nothing(
    node: Node, capfd: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], word: str
) -> None:
    say = sayer(node.repo, capfd)
    path = tmp_path / "disk"
    made(say, path)
    before = settings_of(path)
    refused(say("storage", "set", str(path), *options), 2, word)
    assert settings_of(path) == before


def test_paths_that_are_not_here(say: Say, node: Node, tmp_path: Path) -> None:
    made(say, tmp_path / "disk")
    refused(say("storage", "set", str(tmp_path), "--weight", "1"), 3, "no such storage path")
    refused(say("storage", "set", "nobody", "--weight", "1"), 3, "nobody: no such storage path")
    if node.process is not None:
        url = f"http://127.0.0.1:{free_port()}/remote"
        declare_at(node, "elsewhere", url, {})
        refused(say("storage", "set", "elsewhere", "--weight", "1"), 4, "run it on the node", url)
        cache = cache_of(node)
        refused(say("storage", "set", cache, "--store"), 4, "cache path")
        assert known(say, cache)["can_store"] is False


def test_path_whose_disk_is_away(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    storage = made(say, path)
    (path / "sectorstore.json").rename(path / "away")
    refused(say("storage", "set", str(path), "--weight", "1"), 1, str(path))
    assert not (path / "sectorstore.json").exists()
    (path / "away").rename(path / "sectorstore.json")
    until("the disk to be back", lambda: say("storage", "set", storage, "--weight", "1").code == 0)
    assert known(say, storage)["weight"] == 1


def test_path_that_waits_to_be_attached(
    node: Node, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    say = sayer(node.repo, capfd)
    path = tmp_path / "disk"
    made(say, path)
    path.rename(tmp_path / "away")
    node.start()
    refused(say("storage", "set", str(path), "--weight", "1"), 1, "is not attached")
    assert not path.exists()


@pytest.mark.mount
def test_read_only_disk_keeps_its_settings(say: Say, tmp_path: Path) -> None:
    path = tmp_path / "ro"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=True)
    try:
        storage = made(say, path)
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        refused(say("storage", "set", str(path), "--weight", "3"), 6, "Read-only")
        assert known(say, storage)["weight"] == 10
        fine(say("storage", "detach", str(path)))
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_index_that_is_away_is_told_when_it_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with cluster(tmp_path, "index", "other") as [index, other]:
        for node in (index, other):
            configure(node)
        port = free_port()
        index.start("--listen", f"127.0.0.1:{port}")
        other.start(index=index)
        path = tmp_path / "disk"
        storage = attach(other, path)
        say = sayer(other.repo, capfd)
        index.stop()
        refused(
            say("storage", "set", str(path), "--weight", "77"),
            5,
            "is changed on disk, but the Index does not know yet",
        )
        assert settings_of(path)["Weight"] == 77
        index.start("--listen", f"127.0.0.1:{port}")
        until("the Index to know", lambda: known(sayer(index.repo, capfd), storage)["weight"] == 77)


def test_changes_at_the_same_time_do_not_lose_each_other(node: Node, tmp_path: Path) -> None:
    node.start()
    path = tmp_path / "disk"
    storage = attach(node, path)
    command = [*SECTORFS, "--repo", str(node.repo.root), "storage", "set", storage]
    settings = (["--weight", "3"], ["--groups", "a"], ["--deny-types", "key"], ["--seal"])
    running = [
        subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) for options in settings
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0, 0]
    info = read_metadata(str(path)).info
    assert (info.weight, info.groups, info.deny_types) == (3, ("a",), ("key",))
    assert (info.can_seal, info.can_store) == (True, True)


# --- detach ---


def test_storage_of_a_dead_node(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with cluster(tmp_path, "index", "dead") as [index, dead]:
        for node in (index, dead):
            configure(node, index={"cutoff": 2})
        index.start()
        dead.start(index=index)
        say = sayer(index.repo, capfd)
        shared = tmp_path / "mine"
        write(shared / "sealed/s-t01000-1", b"one")
        mine = attach(index, shared)
        theirs = tmp_path / "theirs"
        write(theirs / "sealed/s-t01000-1", b"one")
        write(theirs / "sealed/s-t01000-2", b"two")
        write(theirs / "cache/s-t01000-2/p_aux", b"aux")
        storage = attach(dead, theirs)
        until("all of it", lambda: known(say, storage)["files"] == {"sealed": 2, "cache": 1})
        refused(say("storage", "detach", storage), 4, "its node is alive", "--force")
        dead.kill()
        refused(say("storage", "detach", storage), 4, "its node is alive")
        until("its death", lambda: not known(say, storage)["healthy"])
        refused(
            say("storage", "detach", storage),
            4,
            "1 sector loses its last copy: sealed/s-t01000-2, cache/s-t01000-2",
        )
        said = fine(say("storage", "detach", storage, "--force", "--json")).json()
        assert said["detached"] == storage
        assert (said["dropped"], said["lost"], said["lost_sectors"]) == (3, 2, ["s-t01000-2"])
        assert list(locations(index, "sealed/s-t01000-1")) == [mine]
        assert say("storage", "find", "s-t01000-2").code == 3
        refused(say("storage", "detach", storage), 3, "neither a storage path of this node")
        assert (theirs / "sealed/s-t01000-2").read_bytes() == b"two"
        # A node that was only thought dead declares all of it again.
        dead.start(index=index)
        until("its return", lambda: storage in locations(index, "sealed/s-t01000-2"))


def test_dead_storage_is_detached_while_no_node_runs(
    node: Node, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configure(node, index={"cutoff": 2})
    node.start()
    declare_at(node, "gone", f"http://127.0.0.1:{free_port()}/remote", {"sealed/s-t01000-9": None})
    node.stop()
    say = sayer(node.repo, capfd)
    until("its death", lambda: "heartbeat" not in say("storage", "detach", "gone").err)
    refused(say("storage", "detach", "gone"), 4, "sealed/s-t01000-9")
    said = fine(say("storage", "detach", "gone", "--force"))
    assert said.out == ("detached gone\n1 sector file has no other copy, of s-t01000-9\n")
    refused(say("storage", "detach", "gone"), 3)


def test_path_nobody_attached_is_not_taken_for_a_storage(say: Say, tmp_path: Path) -> None:
    refused(say("storage", "detach", str(tmp_path / "none")), 3, "no such storage path")
    refused(say("storage", "detach", str(tmp_path / "none"), "--force"), 3, "no such storage path")
    refused(say("storage", "detach", "none", "--force"), 3, "neither")


# --- redeclare ---


def test_all_paths_are_scanned_and_what_is_gone_is_dropped(say: Say, tmp_path: Path) -> None:
    paths = [tmp_path / "first", tmp_path / "second"]
    for number, path in enumerate(paths):
        made(say, path)
        for sector in range(3):
            write(path / f"sealed/s-t0{number + 1}-{sector}", b"x")
        write(path / "sealed/oddity", b"x")
    said = fine(say("storage", "redeclare", "--all", "--json")).json()
    assert (said["entries"], said["dropped"], said["odd"]) == (6, 0, 2)
    for path in paths:
        (path / "sealed" / next((path / "sealed").glob("s-*")).name).unlink()
    keeps = fine(say("storage", "redeclare", "--all", "--json")).json()
    assert keeps["entries"] == 4
    said = fine(say("storage", "redeclare", "--all", "--drop-missing"))
    assert re.fullmatch(r"declared 0, dropped [0-2], odd 2\n", said.out)
    listed = fine(say("storage", "list", "--json")).json()
    assert sorted(one["files"].get("sealed", 0) for one in listed)[-2:] == [2, 2]


def test_what_is_gone_is_dropped_only_when_asked(
    node: Node, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a node nobody else looks: the counts are exact."""
    say = sayer(node.repo, capfd)
    path = tmp_path / "disk"
    for sector in range(3):
        write(path / f"sealed/s-t01-{sector}", b"x")
    storage = made(say, path)
    (path / "sealed/s-t01-1").unlink()
    write(path / "sealed/s-t01-7", b"x")
    said = fine(say("storage", "redeclare", storage, "--json")).json()
    assert said == {"entries": 3, "declared": 1, "dropped": 0, "odd": 0}
    assert known(say, storage)["files"] == {"sealed": 4}
    said = fine(say("storage", "redeclare", "--all", "--drop-missing", "--json")).json()
    assert said == {"entries": 3, "declared": 0, "dropped": 1, "odd": 0}
    assert known(say, storage)["files"] == {"sealed": 3}
    assert fine(say("storage", "redeclare", str(path))).out == "declared 0, dropped 0, odd 0\n"


def test_one_target_or_all(say: Say, tmp_path: Path) -> None:
    refused(say("storage", "redeclare"), 2, "name one path, or --all")
    refused(say("storage", "redeclare", str(tmp_path), "--all"), 2, "name one path, or --all")
    refused(say("storage", "redeclare", str(tmp_path)), 3, "no such storage path")
    said = fine(say("storage", "redeclare", "--all", "--json")).json()
    assert said == {"entries": 0, "declared": 0, "dropped": 0, "odd": 0}


# --- list ---


@pytest.mark.parametrize("columns", [80, 200])
def test_list_on_a_terminal(node: Node, tmp_path: Path, columns: int) -> None:
    node.start()
    attach(node, tmp_path / "disk")
    declare_at(node, "far-away", "http://10.255.255.1:8480/remote", {"sealed/s-t01000-1": None})
    code, screen = on_terminal(node, "storage", "list", columns=columns)
    assert code == 0, screen
    assert "\x1b[32mok" in screen
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    assert max(map(len, plain.splitlines())) <= columns
    [bar] = [line for line in plain.partition("far-away")[2].splitlines() if " % " in line]
    assert len(re.findall(r"[#.*]", bar.partition("]")[0])) == min(50, columns - 62)
    assert plain.index(str(tmp_path / "disk")) < plain.index("far-away")
    piped = node.call("storage", "list")
    assert "\x1b" not in piped
    assert "far-away" in piped


def test_scan_of_all_paths_on_a_terminal_shows_its_result(node: Node, tmp_path: Path) -> None:
    node.start()
    attach(node, tmp_path / "disk")
    code, screen = on_terminal(node, "storage", "redeclare", "--all", columns=80)
    assert code == 0, screen
    assert "declared 0, dropped 0, odd 0" in screen


# --- locks ---


def lock_by(node: Node, *wanted: Lease) -> None:
    """Have a node's Index grant some locks."""

    async def work(client: SectorIndex) -> None:
        for one in wanted:
            assert await client.lock(one)

    with_index(node, work)


def test_without_locks_it_says_so(say: Say) -> None:
    assert fine(say("storage", "locks")).out == "no sector is locked\n"
    assert fine(say("storage", "locks", "--json")).json() == []


def test_who_holds_which_sector_and_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with cluster(tmp_path, "one", "two") as [one, two]:
        configure(one)
        one.start()
        two.start(index=one)
        lock_by(
            one,
            lease("reader", 7, read=FileType.CACHE),
            lease("mover", 7, read=FileType.CACHE, write=FileType.SEALED),
            msgspec.structs.replace(lease("odd", 8, write=FileType.KEY), owner="[red]odd"),
        )
        for node in (one, two):
            say = sayer(node.repo, capfd)
            seven, eight = fine(say("storage", "locks", "--json")).json()
            assert (seven["sector"], seven["read"], seven["write"]) == (
                "s-t01000-7",
                {"cache": 2},
                ["sealed"],
            )
            assert sorted(held["owner"] for held in seven["leases"]) == ["mover", "reader"]
            assert 0 < eight["leases"][0]["expires_in"] <= 60
            lines = fine(say("storage", "locks")).out.splitlines()
            assert [line for line in lines if not line.startswith(" ")] == [
                "s-t01000-7  cache(R:2) sealed(W)",
                "s-t01000-8  key(W)",
            ]
            assert any(
                re.fullmatch(
                    r"  cache\(R\) sealed\(W\)  mover: a test, since \S+Z, ends in \d+ s", line
                )
                for line in lines
            )
            assert any("[red]odd: a test" in line for line in lines)
        one.kill()
        refused(say("storage", "locks"), 5)
