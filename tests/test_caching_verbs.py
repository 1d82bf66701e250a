"""`sector fetch|evict|pin|unpin` and `why`: real nodes, a real mount, and what operators see."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectorfs.cli.why import parse_path
from sectorfs.errors import BadInput
from sectorfs.types import Facts
from tests.cli_fixtures import Say, fine, on_terminal, refused, sayer
from tests.cluster import SECTORFS, Node, cluster, run, until, write_cache
from tests.cluster_fixtures import (
    OLD_NS,
    attach,
    cache_of,
    configure,
    declare_at,
    descriptors,
    locations,
    metric,
    noise,
    put,
    put_sparse,
    state,
)

MIB = 1 << 20
SIZE = 8 * MIB
ONE, TWO, THREE = ("sealed/s-t01000-1", "sealed/s-t01000-2", "sealed/s-t01000-3")
TREE = {"p_aux": b"p" * 64, "sc-02-data-tree-r-last.dat": noise("tree", 5 * MIB)}


class Pair:
    """A node that holds sectors, and one with a mount that fetches them."""

    def __init__(self, holder: Node, reader: Node) -> None:
        self.holder = holder
        self.reader = reader
        self.disk = holder.root / "disk"

    def shown(self, name: str) -> Path:
        """A file in the reader's mount."""
        return self.reader.mountpoint / name

    def hold(self, name: str, data: bytes) -> None:
        """Give the holder a file, and wait until the reader shows it."""
        put(self.disk / name, data)
        until(f"{name} to show", self.shown(name).exists)

    def attribute(self, name: str, attribute: str) -> str:
        """An extended attribute in the reader's mount."""
        return os.getxattr(self.shown(name), f"user.sectorfs.{attribute}").decode()

    def cached(self, name: str) -> Path:
        """Where the reader keeps a copy."""
        return self.reader.repo.cache_path(self.reader.repo.config()) / name


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with cluster(tmp_path, "holder", "reader") as [holder, reader]:
        configure(holder)
        configure(reader)
        holder.start()
        found = Pair(holder, reader)
        attach(holder, found.disk)
        reader.start(mount=True, index=holder)
        yield found


@pytest.fixture
def say(pair: Pair, capfd: pytest.CaptureFixture[str]) -> Say:
    return sayer(pair.reader.repo, capfd)


# --- fetch ---


def test_fetched_sectors_are_declared_copies(pair: Pair, say: Say) -> None:
    data = noise("one", SIZE)
    pair.hold(ONE, data)
    pair.hold(TWO, data[::-1])
    write_cache(pair.disk / "cache" / "s-t01000-1", TREE)
    until("the tree", pair.shown("cache/s-t01000-1/p_aux").exists)
    lines = fine(say("sector", "fetch", "s-t01000-1", "s-t01000-2")).out.splitlines()
    names = sorted(line.split()[0] for line in lines)
    assert names == ["cache/s-t01000-1", ONE, TWO]
    assert all(" fetched, " in line and line.endswith("/s") for line in lines)
    for name, content in ((ONE, data), (TWO, data[::-1])):
        assert pair.cached(name).read_bytes() == content
        assert pair.cached(name).stat().st_mtime_ns == OLD_NS
        assert state(pair.shown(name)) == "cached"
        assert locations(pair.reader, name)[cache_of(pair.reader)].primary is False
    assert {one.name for one in pair.cached("cache/s-t01000-1").iterdir()} == set(TREE)
    again = fine(say("sector", "fetch", str(pair.shown(ONE)), "--json")).json()
    assert [(one["how"], one["size"], one["state"]) for one in again] == [
        ("was here", SIZE, "cached")
    ]


def test_a_name_that_is_wrong_stops_all_of_it(pair: Pair, say: Say) -> None:
    pair.hold(ONE, noise("one", SIZE))
    refused(say("sector", "fetch", ONE, "s-t01000-99"), 3, "s-t01000-99")
    assert not pair.cached(ONE).exists()


def test_what_cannot_be_fetched_is_told_and_the_rest_comes(pair: Pair, say: Say) -> None:
    pair.hold(ONE, noise("one", SIZE))
    declare_at(pair.holder, "liar", "http://127.0.0.1:1/remote", {TWO: Facts(SIZE, OLD_NS)})
    until("the other", pair.shown(TWO).exists)
    said = say("sector", "fetch", ONE, TWO)
    assert said.code == 1
    assert said.out.startswith(f"{ONE} fetched")
    assert said.err.startswith(f"sectorfs: {TWO}: no source can give it (http://127.0.0.1:1")
    assert "\n" not in said.err.rstrip("\n")
    found = say("sector", "fetch", ONE, TWO, "--json")
    assert found.code == 1
    assert [(one["how"], one["error"]) for one in found.json()] == [
        ("was here", None),
        ("failed", "no source can give it"),
    ]
    assert say("sector", "fetch", TWO).code == 1


def test_a_fetch_that_was_stopped_goes_on(pair: Pair, say: Say) -> None:
    size = 1 << 30
    put_sparse(pair.disk / ONE, size, b"the end")
    until("it to show", pair.shown(ONE).exists)
    command = [*SECTORFS, "--repo", str(pair.reader.repo.root), "sector", "fetch", ONE]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        part = pair.cached("sealed/fetching/s-t01000-1.part")
        until("a part to come", lambda: part.exists() and part.stat().st_blocks * 512 > size // 8)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "stopped; what came stays, and the same command goes on from there\n"
    until("the fetch to end", lambda: not pair.reader.json("status")["fetches"])
    assert state(pair.shown(ONE)) == "partial"
    assert metric(pair.reader, "sectorfs_fetched_bytes_total") < size
    fine(say("sector", "fetch", ONE))
    again = metric(pair.reader, "sectorfs_fetched_bytes_total") - size
    assert again <= 0.05 * size, "what was there was asked for again"
    assert pair.cached(ONE).read_bytes()[-7:] == b"the end"
    assert state(pair.shown(ONE)) == "cached"


def test_a_fetch_on_a_terminal_shows_what_comes(pair: Pair) -> None:
    put_sparse(pair.disk / ONE, 1 << 30, b"the end")
    pair.hold(TWO, noise("two", SIZE))
    until("it to show", pair.shown(ONE).exists)
    code, screen = on_terminal(pair.reader, "sector", "fetch", ONE, TWO, columns=120)
    assert code == 0
    assert f"{ONE} fetched, 1.0 GiB" in screen
    assert f"{TWO} fetched, 8.0 MiB" in screen
    assert re.search(r"[0-9]/1\.0 GiB", screen), "a bar with bytes came first"


# --- pins and evictions ---


def test_an_evicted_copy_is_read_from_its_source_again(pair: Pair, say: Say) -> None:
    data = noise("one", SIZE)
    pair.hold(ONE, data)
    fine(say("sector", "fetch", ONE))
    with pair.shown(ONE).open("rb") as stream:
        stream.read(1)
        refused(say("sector", "evict", ONE), 4, "is open")
    assert any(str(pair.cached(ONE)) in name for name in open_files(pair.reader)), "it is kept"
    said = until("the release", lambda: one_line(say("sector", "evict", ONE)))
    assert said.startswith(f"{ONE} evicted, 8.0 MiB")
    assert not pair.cached(ONE).exists()
    assert cache_of(pair.reader) not in locations(pair.reader, ONE)
    descriptors(pair.reader)  # waits until nothing of the cache path is open
    assert pair.shown(ONE).read_bytes() == data
    refused(say("sector", "evict", "s-t01000-1", "--type", "unsealed"), 3, "no copy")


def test_what_came_of_a_streamed_file_goes_as_well(pair: Pair, say: Say) -> None:
    name = "unsealed/s-t01000-1"
    data = noise("streamed", SIZE)
    pair.hold(name, data)
    with pair.shown(name).open("rb") as stream:
        assert stream.read(MIB) == data[:MIB]
        until("a part to be kept", lambda: pair.cached("unsealed/fetching").exists())
        refused(say("sector", "evict", name), 4, "try again when")
    until("the release", lambda: say("sector", "evict", name).code == 0)
    assert list(pair.cached("unsealed/fetching").iterdir()) == []
    assert state(pair.shown(name)) == "remote"
    assert pair.shown(name).read_bytes() == data


def one_line(said: object) -> str:
    """Output of a command that may have come before the kernel told of a close."""
    return getattr(said, "out", "")


def open_files(node: Node) -> list[str]:
    folder = Path(f"/proc/{node.pid()}/fd")
    found = []
    for entry in folder.iterdir():
        try:
            found.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return found


def test_pins_hold_and_outlive_the_node(pair: Pair, say: Say) -> None:
    pair.hold(ONE, noise("one", SIZE))
    said = fine(say("sector", "pin", ONE))
    assert said.out == f"{ONE} pinned; `sectorfs sector fetch` brings it here\n"
    assert fine(say("sector", "pin", ONE)).out.startswith(f"{ONE} was pinned already")
    fine(say("sector", "fetch", ONE))
    assert pair.attribute(ONE, "pinned") == "1"
    pair.reader.stop()
    pair.reader.start(mount=True, index=pair.holder)
    until("the pin", lambda: pair.attribute(ONE, "pinned") == "1")
    refused(say("sector", "evict", ONE), 4, "is pinned", "unpin")
    [unpinned] = fine(say("sector", "unpin", ONE, "--json")).json()
    assert unpinned == {
        "file_type": "sealed",
        "sector": "s-t01000-1",
        "state": "cached",
        "pinned": False,
        "changed": True,
    }
    assert pair.attribute(ONE, "pinned") == "0"
    assert fine(say("sector", "unpin", ONE)).out == f"{ONE} was not pinned\n"
    fine(say("sector", "evict", ONE))
    refused(say("sector", "pin", "s-t01000-99", "--type", "sealed"), 3, "s-t01000-99")


def test_of_several_files_each_that_can_go_does(pair: Pair, say: Say) -> None:
    for name in (ONE, TWO):
        pair.hold(name, noise(name, SIZE))
        fine(say("sector", "fetch", name))
    fine(say("sector", "pin", ONE))
    said = say("sector", "evict", "s-t01000-1", "s-t01000-2")
    assert said.code == 4
    assert said.out == f"{TWO} evicted, 8.0 MiB\n"
    assert "is pinned" in said.err


def test_copies_make_room_for_what_is_fetched(tmp_path: Path, pair: Pair, say: Say) -> None:
    pair.reader.stop()
    configure(pair.reader, cache={"max_size": "20MiB"})
    pair.reader.start(mount=True, index=pair.holder)
    data = {name: noise(name, SIZE) for name in (ONE, TWO, THREE)}
    for name, content in data.items():
        pair.hold(name, content)
    fine(say("sector", "fetch", ONE))
    fine(say("sector", "fetch", TWO))
    assert pair.shown(ONE).read_bytes() == data[ONE]
    until("its release", lambda: fine(say("status", "--json")).json()["files"]["open"] == 0)
    fine(say("sector", "fetch", THREE))
    here = [pair.cached(name).exists() for name in (ONE, TWO, THREE)]
    assert here == [True, False, True], "the longest unused went"
    assert metric(pair.reader, "sectorfs_evictions_total") == 1
    for name, content in data.items():
        assert pair.shown(name).read_bytes() == content
    pair.hold("sealed/s-t01000-4", noise("large", 24 * MIB))
    refused(say("sector", "fetch", "sealed/s-t01000-4"), 1, "no room", "[cache]")
    assert pair.shown("sealed/s-t01000-4").read_bytes() == noise("large", 24 * MIB)


# --- why ---


def test_why_tells_where_a_file_is_read_from_and_what_failed(pair: Pair, say: Say) -> None:
    pair.hold(ONE, noise("one", SIZE))
    write_cache(pair.disk / "cache" / "s-t01000-1", TREE)
    member = pair.shown("cache/s-t01000-1/p_aux")
    until("the tree", member.exists)
    [remote] = fine(say("storage", "find", "s-t01000-1", "--json")).json()["files"][0]["locations"]
    found = fine(say("why", str(pair.shown(ONE)), "--json")).json()
    assert found | {"sources": []} == {
        "file_type": "sealed",
        "sector": "s-t01000-1",
        "member": None,
        "size": SIZE,
        "mtime_ns": OLD_NS,
        "state": "remote",
        "how": "streamed",
        "where": f"{remote['urls'][0]}/{ONE}",
        "present": None,
        "pinned": False,
        "sources": [],
    }
    [way] = found["sources"]
    assert way == {
        "storage": remote["storage"],
        "primary": True,
        "where": found["where"],
        "chosen": True,
        "against": "",
        "failure": None,
        "failed_ago": None,
        "node": None,
    }
    told = fine(say("why", str(member), "--json")).json()
    assert (told["member"], told["size"], told["how"]) == ("p_aux", 64, "fetched whole first")
    fine(say("sector", "fetch", ONE))
    ways = fine(say("why", ONE, "--json")).json()["sources"]
    assert [way["node"] for way in ways] == [None, "sectorfs"]
    said = fine(say("why", ONE)).out
    assert f"read from {pair.cached(ONE)}, in place" in said
    assert "comes first" in ways[1]["against"]
    fine(say("sector", "evict", ONE))
    pair.holder.kill()
    with pytest.raises(OSError, match="Input/output error"):
        member.read_bytes()
    said = fine(say("why", str(member))).out
    assert " s ago: " in said
    assert "refused" in said.lower()


@pytest.mark.parametrize(
    ("text", "name", "member"),
    [
        ("sealed/s-t01000-7", "sealed", None),
        ("/sectors/sealed/s-t01000-7", "sealed", None),
        ("/a/b/cache/s-t01000-7/p_aux", "cache", "p_aux"),
        ("cache/s-t01000-7/", "cache", None),
        ("cache/s-t01000-7/sc-02-data-tree-c-0.dat", "cache", "sc-02-data-tree-c-0.dat"),
    ],
)
def test_paths(text: str, name: str, member: str | None) -> None:
    file, found = parse_path(text)
    assert (file.file_type.dir_name, file.sector.number, found) == (name, 7, member)


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "s-t01000-7", "sealed", "odd/s-t01000-7", "sealed/s-t01000-x"),
        *("cache/s-t01000-7/../p_aux", "cache/s-t01000-7/a/b", "cache/s-t01000-7/x.tmp"),
    ],
)
def test_paths_that_name_no_sector_file(text: str) -> None:
    with pytest.raises(BadInput):
        parse_path(text)


def test_what_is_asked_of_what_is_not_there(pair: Pair, say: Say) -> None:
    refused(say("why", "sealed/s-t01000-99"), 3, "s-t01000-99")
    refused(say("why", "sealed"), 2, "sealed")
    refused(say("sector", "fetch"), 2)
    refused(say("sector", "evict", "nonsense"), 2, "nonsense")
    pair.hold(ONE, b"x")
    refused(say("why", f"{ONE}/p_aux"), 3, "p_aux")


@pytest.mark.parametrize(
    "arguments",
    [
        ("sector", "fetch", ONE),
        ("sector", "evict", ONE),
        ("sector", "pin", ONE),
        ("sector", "unpin", ONE),
        ("why", ONE),
    ],
    ids=" ".join,
)
def test_without_a_node_there_is_nobody_to_ask(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    said = run(*arguments, repo=tmp_path / "repo")
    assert said.returncode == 5
    assert "no node runs" in said.stderr
