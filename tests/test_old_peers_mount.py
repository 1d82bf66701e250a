"""Nodes of other programs, of every era, read through the mount of one of ours."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sectorfs.wire import tokens
from tests.archive_fixtures import COMPLETE, FINALIZED, MTIME_NS, write_directory
from tests.cluster import Node, cluster, tree, until
from tests.cluster_fixtures import attach, configure, noise, put, seen, state, status
from tests.faulty_peer import Answer, Asked, Fault, FaultyPeer, closes_after, silent
from tests.old_peers import ERAS, Era, OldPeer, ends_after, old_peers

pytestmark = pytest.mark.mount

SECRET = bytes(range(32))
"""Of the other programs' cluster."""
FULL = bytes.fromhex("0410109004000000")
"""Trailer of an unsealed file of 8 MiB that is there as a whole."""
SIZE = 8 << 20
DATA = noise("data", SIZE)
MODERN: tuple[Era, ...] = ("lotus", "curio")
KINDS: dict[Era, str] = {
    "sector-storage": "early lotus: files whole only",
    "lotus": "lotus or Curio",
    "curio": "lotus or Curio",
}


class Scene:
    """An Index, a node of ours with a mount, and nodes of other programs."""

    def __init__(self, index: Node, reader: Node, peers: dict[str, OldPeer]) -> None:
        self.index = index
        self.reader = reader
        self.peers = peers

    def join(self, name: str) -> OldPeer:
        """Let a peer look at its disk, and tell the Index."""
        peer = self.peers[name]
        peer.redeclare()
        token = tokens.sign(self.index.repo.secret(create=False), ("admin",))
        peer.attach(f"{self.index.repo.api()}/rpc/v0", token)
        return peer

    def shown(self, name: str) -> Path:
        """A name in the mount, once it is there."""
        path = self.reader.mountpoint / name
        seen(name, path.exists)
        return path


@contextmanager
def scene(root: Path, sector_size: str = "8MiB", **eras: Era) -> Iterator[Scene]:
    with (
        cluster(root, "index", "reader") as (index, reader),
        old_peers(root, eras, secret=SECRET) as peers,
    ):
        token = root / "their-token"
        token.write_text(tokens.sign(tokens.Secret(SECRET), ("admin",)) + "\n")
        configure(index, peers={"token_file": str(token)}, hash={"delay": 0.05, "idle": 0.05})
        configure(reader, peers={"token_file": str(token)}, mount={"sector_size": sector_size})
        index.start()
        reader.start(mount=True, index=index)
        yield Scene(index, reader, peers)


def why(node: Node, name: str) -> list[dict[str, Any]]:
    """The ways to a file, as `sectorfs why` tells them."""
    found: list[dict[str, Any]] = node.json("why", str(node.mountpoint / name))["sources"]
    return found


def can_read(path: Path, data: bytes) -> bool:
    """True when a file has these bytes, False when it cannot be read now."""
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def has_digest(path: Path) -> bool:
    """True once it is known what a file's bytes hash to."""
    try:
        return bool(os.getxattr(path, "user.sectorfs.digest"))
    except OSError:
        return False


def fails(call: Callable[[], object]) -> str:
    """The name of the error that a call must raise."""
    with pytest.raises(OSError, match=r"\[Errno") as info:
        call()
    return errno.errorcode[info.value.errno or 0]


def once(fault: Fault) -> Fault:
    """The same for one request."""

    def first(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        peer.fault = None
        fault(peer, connection, asked, answer)

    return first


def fill(root: Path, *, types: tuple[str, ...]) -> dict[str, bytes]:
    """A sector of 8 MiB with all its files; what is on disk by name."""
    files = {}
    for kind in types:
        if kind in ("cache", "update-cache"):
            write_directory(root / f"{kind}/s-t01000-7", FINALIZED)
            files |= {f"{kind}/s-t01000-7/{name}": data for name, data in FINALIZED.items()}
            continue
        name = f"{kind}/s-t01000-7" if kind != "piece" else "piece/s-t00-42"
        data = noise(name, SIZE) + (FULL if kind == "unsealed" else b"")
        put(root / name, data, MTIME_NS)
        files[name] = data
    return files


@pytest.mark.parametrize("era", ERAS)
def test_the_whole_tree_of_a_node_of(tmp_path: Path, era: Era) -> None:
    with scene(tmp_path, node=era) as it:
        peer = it.peers["node"]
        files = fill(peer.root, types=peer.types)
        it.join("node")
        for name in files:
            it.shown(name)
        found = tree(it.reader.mountpoint, peer.types)
        assert found == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, data in files.items():
            known = (it.reader.mountpoint / name).stat()
            assert known.st_size == len(data)
            whole = era == "sector-storage" and "cache" not in name
            assert known.st_mtime_ns == (0 if whole else MTIME_NS), name
        assert {one["node"] for one in why(it.reader, "sealed/s-t01000-7")} == {None, KINDS[era]}
        [known] = [one for one in status(it.reader).storages if one.storage == peer.storage]
        assert known.nodes == {peer.url: KINDS[era]}
        assert KINDS[era] in it.reader.call("storage", "list")


@pytest.mark.parametrize("era", MODERN)
def test_what_nobody_told_is_shown_as_long_as_a_sector_until_somebody_asked(
    tmp_path: Path, era: Era
) -> None:
    with scene(tmp_path, "512MiB", node=era) as it:
        peer = it.peers["node"]
        peer.fault = silent  # so that nobody finds out
        put(peer.root / "sealed/s-t01000-7", DATA, MTIME_NS)
        put(peer.root / "unsealed/s-t01000-8", DATA + FULL, MTIME_NS)
        put(peer.root / "sealed/s-t02000-1", DATA, MTIME_NS)
        it.join("node")
        names = ("sealed/s-t01000-7", "unsealed/s-t01000-8", "sealed/s-t02000-1")
        shown = [it.shown(name) for name in names]
        assert [path.stat().st_size for path in shown] == [512 << 20] * 3  # as the settings say
        listed = subprocess.run(
            ["ls", "-l", str(shown[0].parent)], capture_output=True, text=True, check=True
        )
        assert f" {512 << 20} " in listed.stdout
        assert fails(lambda: shown[0].read_bytes()) == "EIO"
        peer.fault = None
        until("the source to be asked again", lambda: can_read(shown[0], DATA))
        # The first file tells of all others of its miner, and each of itself once it is asked for.
        seen("the size", lambda: shown[1].stat().st_size == SIZE + len(FULL), 30)
        assert shown[0].stat().st_size == SIZE
        assert shown[0].stat().st_mtime_ns == MTIME_NS
        until("the others to be asked for", lambda: shown[2].stat().st_size == SIZE)
        # It is kept: nobody is asked again, here or elsewhere, now or after a restart.
        asked = len(peer.requests)
        it.reader.stop()
        it.reader.start(mount=True, index=it.index)
        assert [it.shown(name).stat().st_size for name in names] == [SIZE, SIZE + len(FULL), SIZE]
        assert len(peer.requests) == asked


def test_a_miner_of_whom_one_file_is_known(tmp_path: Path) -> None:
    with scene(tmp_path, "512MiB", node="lotus") as it:
        peer = it.peers["node"]
        peer.fault = silent
        put(peer.root / "unsealed/s-t01000-7", DATA, MTIME_NS)
        put(peer.root / "sealed/s-t02000-7", DATA, MTIME_NS)
        it.join("node")
        disk = tmp_path / "disk"
        attach(it.index, disk)
        put(disk / "sealed/s-t01000-99", noise("ours", SIZE), MTIME_NS)
        it.shown("sealed/s-t01000-99")
        first = it.shown("unsealed/s-t01000-7")
        until("its miner to be looked at again", lambda: first.stat().st_size == SIZE, 60)
        assert it.shown("sealed/s-t02000-7").stat().st_size == 512 << 20


@pytest.mark.parametrize("era", MODERN)
def test_large_files_are_streamed_and_go_on_where_they_broke(tmp_path: Path, era: Era) -> None:
    with scene(tmp_path, node=era) as it:
        peer = it.peers["node"]
        put(peer.root / "unsealed/s-t01000-7", DATA + FULL, MTIME_NS)
        put(peer.root / "sealed/s-t01000-7", DATA, MTIME_NS)
        it.join("node")
        path = it.shown("unsealed/s-t01000-7")
        with path.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, SIZE // 2) == DATA[SIZE // 2 :][:4096]
            assert os.getxattr(path, "user.sectorfs.read_path") == b"stream"
            assert os.pread(file.fileno(), 10, SIZE) == FULL
        assert peer.asked_bytes() < SIZE // 2
        whole = it.shown("sealed/s-t01000-7")
        with whole.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 10, 0) == DATA[:10]
            peer.forget()
            peer.fault = once(closes_after(300_000))
            assert os.pread(file.fileno(), 4 << 20, 2 << 20) == DATA[2 << 20 : 6 << 20]
            assert not [one for one in peer.asked if not one.spans]  # never from the start
            assert peer.fault is None
            starts = [start for one in peer.asked for start, _ in one.spans]
            assert len(starts) - len(set(starts)) <= 1  # nothing again but what broke off
            assert file.read() == DATA
        assert it.reader.json("sector", "fetch", "s-t01000-7", "--type", "sealed")
        seen("the copy", lambda: state(whole) == "cached")
        assert whole.read_bytes() == DATA


@pytest.mark.parametrize("kind", ["sealed", "unsealed"])
def test_what_an_early_node_cuts_off_is_caught_by_its_length(tmp_path: Path, kind: str) -> None:
    data = DATA + (FULL if kind == "unsealed" else b"")
    with scene(tmp_path, bad="sector-storage", good="sector-storage") as it:
        for peer in it.peers.values():
            put(peer.root / f"{kind}/s-t01000-7", data, MTIME_NS)
        bad = it.join("bad")
        path = it.shown(f"{kind}/s-t01000-7")
        # The end of a read at a disk error, of 32 KiB a time: one is at the end of the sector.
        for count in (0, 5 << 20, 2 << 10, *((SIZE, SIZE + 1) if kind == "unsealed" else ())):
            bad.fault = ends_after(count)
            assert fails(lambda: path.read_bytes()) == "EIO", count
            assert state(path) == "remote"
        it.join("good")
        until("the other one", lambda: can_read(path, data))
        seen("the copy", lambda: state(path) == "cached")
        assert path.stat().st_size == len(data)


def test_a_file_that_was_replaced_is_seen_by_the_next_open(tmp_path: Path) -> None:
    small = noise("small", 2048)
    with scene(tmp_path, node="curio") as it:
        peer = it.peers["node"]
        put(peer.root / "sealed/s-t01000-7", DATA, MTIME_NS)
        put(peer.root / "sealed/s-t02000-7", small, MTIME_NS)
        it.join("node")
        large, little = it.shown("sealed/s-t01000-7"), it.shown("sealed/s-t02000-7")
        with large.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 10, 0) == DATA[:10]
            new = noise("new", SIZE)
            put(peer.root / "sealed/s-t01000-7", new, MTIME_NS + 5 * 10**9)
            assert fails(lambda: os.pread(file.fileno(), 10, 5 << 20)) == "ESTALE"
        assert large.read_bytes() == new
        assert large.stat().st_mtime_ns == MTIME_NS + 5 * 10**9
        seen("the size", lambda: little.stat().st_size == 2048)
        put(peer.root / "sealed/s-t02000-7", noise("other", 2048), MTIME_NS + 5 * 10**9)
        assert little.read_bytes() == noise("other", 2048)


@pytest.mark.parametrize("era", ERAS)
def test_a_directory_that_not_all_of_travels(tmp_path: Path, era: Era) -> None:
    """Curio sends what is on its list; the tree-c of a small sector is not."""
    with scene(tmp_path, node=era) as it:
        peer = it.peers["node"]
        peer.pax = True  # as of files beyond 8 GiB
        write_directory(peer.root / "cache/s-t01000-7", COMPLETE)
        (peer.root / "cache/s-t01000-7/sub").mkdir() if era == "curio" else None
        it.join("node")
        shown = it.shown("cache/s-t01000-7")
        lost = {"sc-02-data-tree-c.dat"} if era == "curio" else set()
        assert set(os.listdir(shown)) == COMPLETE.keys() - lost
        for name in COMPLETE.keys() - lost:
            assert (shown / name).read_bytes() == COMPLETE[name]
            assert (shown / name).stat().st_mtime_ns == MTIME_NS
        for name in lost:
            with pytest.raises(FileNotFoundError):
                (shown / name).read_bytes()


@pytest.mark.parametrize("proved", [False, True], ids=["unproved", "proved"])
def test_a_file_of_a_directory_that_only_its_owner_has_in_full(
    tmp_path: Path, proved: bool
) -> None:
    """What one of ours declared is shown in full; from Curio alone it is read as far as it goes.

    That is not at all once there is a digest of the whole, which a part of it cannot prove.
    """
    with scene(tmp_path, node="curio") as it:
        peer = it.peers["node"]
        if not proved:
            it.index.call("hash", "pause")
        disk = tmp_path / "disk"
        attach(it.index, disk)
        for root in (peer.root, disk):
            write_directory(root / "cache/s-t01000-7", COMPLETE)
        shown = it.shown("cache/s-t01000-7")
        seen("the files", lambda: set(os.listdir(shown)) == set(COMPLETE))
        if proved:
            until("its digest", lambda: has_digest(shown))
        it.join("node")
        until("the reader to know both", lambda: _copies(shown) == 2)
        it.index.kill()
        if not proved:
            for name in ("p_aux", "sc-02-data-layer-1.dat"):
                until(name, lambda name=name: can_read(shown / name, COMPLETE[name]))
        for name in COMPLETE if proved else ("sc-02-data-tree-c.dat",):
            assert fails((shown / name).read_bytes) == "EIO"
        assert "lacks sc-02-data-tree-c.dat" in it.reader.log()
        assert proved == ("nobody has its manifest" in it.reader.log())


@pytest.mark.parametrize("era", ERAS)
def test_a_tar_that_is_cut_off_is_no_directory(tmp_path: Path, era: Era) -> None:
    with scene(tmp_path, node=era) as it:
        peer = it.peers["node"]
        write_directory(peer.root / "cache/s-t01000-7", FINALIZED)
        it.join("node")
        shown = it.shown("cache/s-t01000-7")
        for fault in (ends_after(600), ends_after(1024), ends_after(0), closes_after(700)):
            peer.fault = fault
            assert fails(lambda: os.listdir(shown)) == "EIO"
        peer.fault = None
        until("the source to be asked again", lambda: can_read(shown / "p_aux", b"p" * 64))
        assert set(os.listdir(shown)) == set(FINALIZED)


def test_names_that_no_sector_has_are_refused(tmp_path: Path) -> None:
    names = ("..evil", ".hidden", "a b", "more\nlines", "x.tmp", "unknown")
    with scene(tmp_path, node="lotus") as it:
        peer = it.peers["node"]
        for number, name in enumerate(names):
            write_directory(peer.root / f"cache/s-t01000-{number}", {**FINALIZED, name: b"evil"})
        it.join("node")
        for number in range(len(names)):
            shown = it.shown(f"cache/s-t01000-{number}")
            assert fails(lambda shown=shown: os.listdir(shown)) == "EIO"
        for name in names:  # which one it is, is said there
            assert f"member {name!r}" in it.reader.log()
        cache = it.reader.repo.cache_path(it.reader.repo.config())
        assert not {path.name for path in cache.rglob("*")} & {*names}


@pytest.mark.parametrize("era", ERAS)
def test_bytes_of_theirs_are_asked_for_a_digest_of_ours(tmp_path: Path, era: Era) -> None:
    with scene(tmp_path, node=era) as it:
        disk = tmp_path / "disk"
        attach(it.index, disk)
        wrong = bytearray(DATA)
        wrong[5 << 20] ^= 1
        for number, bad in ((7, bytes(wrong)), (8, DATA)):
            name = f"sealed/s-t01000-{number}"
            put(disk / name, DATA, MTIME_NS)
            put(it.peers["node"].root / name, bad, MTIME_NS)
        shown = [it.shown(f"sealed/s-t01000-{number}") for number in (7, 8)]
        for path in shown:
            until("its digest", lambda path=path: has_digest(path))
        it.join("node")
        for path in shown:
            until("the reader to know both", lambda path=path: _copies(path) == 2)
        it.index.kill()
        assert fails(shown[0].read_bytes) == "EIO"
        until("the good one", lambda: can_read(shown[1], DATA))
        assert fails(shown[0].read_bytes) == "EIO"


def test_their_token_is_read_again(tmp_path: Path) -> None:
    with scene(tmp_path, node="lotus") as it:
        peer = it.peers["node"]
        put(peer.root / "sealed/s-t01000-7", DATA, MTIME_NS)
        put(peer.root / "sealed/s-t01000-8", DATA, MTIME_NS)
        it.join("node")
        assert it.shown("sealed/s-t01000-7").read_bytes() == DATA
        ours = tokens.sign(it.index.repo.secret(create=False), ("admin",))
        assert all(ours not in one.headers["authorization"] for one in peer.requests)
        peer.secret = bytes(32)
        path = it.shown("sealed/s-t01000-8")
        assert fails(path.read_bytes) == "EIO"
        failures = [str(one["failure"]) for one in why(it.reader, "sealed/s-t01000-8")]
        assert f"neither the token in {tmp_path}/their-token nor one of this" in failures[0]
        put(tmp_path / "their-token", tokens.sign(tokens.Secret(bytes(32)), ("admin",)).encode())
        until("the new token", lambda: can_read(path, DATA))


def _copies(shown: Path) -> int:
    """How many copies the mount knows of: with the next change of the Index, and not before."""
    return len(json.loads(os.getxattr(shown, "user.sectorfs.locations")))
