"""Directories between real nodes and other programs, through a mount and with real tools."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sectorfs.types import Facts, MemberFacts
from sectorfs.wire import tokens
from tests.archive_fixtures import FINALIZED
from tests.cluster import Node, cluster, tree
from tests.cluster_fixtures import (
    OLD_NS,
    Behaviour,
    FalsePeer,
    attach,
    configure,
    declare_at,
    false_peer,
    locations,
    put,
    seen,
    shows,
    state,
    status,
)
from tests.tar_fixtures import stream, unterminated

NAME = "cache/s-t01000-7"
MTIME_NS = 1_600_000_000_000_000_000

pytestmark = pytest.mark.mount


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[tuple[Node, Node, Path]]:
    """The owner (with the Index), a mounted reader, and the owner's disk."""
    with cluster(tmp_path, "owner", "reader") as nodes:
        owner, reader = nodes
        for node in nodes:
            configure(node)
        owner.start()
        reader.start(mount=True, index=owner)
        disk = tmp_path / "disk"
        attach(owner, disk)
        yield owner, reader, disk


def as_lotus(body: bytes) -> Behaviour:
    """Nothing but the directory as tar, in chunks, without a length."""

    def answer(connection: socket.socket, path: str) -> None:
        if path.partition("?")[0] != f"/remote/{NAME}":
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))

    return answer


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("make", [stream, unterminated])
def test_a_directory_of_another_programs_node_in_the_mount(
    twins: tuple[Node, Node, Path], make: object, told: bool
) -> None:
    owner, reader, _ = twins
    members = tuple(MemberFacts(name, len(FINALIZED[name]), MTIME_NS) for name in sorted(FINALIZED))
    facts = Facts(sum(one.size for one in members), MTIME_NS, members)
    assert callable(make)
    requests: list[str] = []

    def behaviour(peer: FalsePeer) -> Behaviour:
        peer.requests = requests
        return as_lotus(make(FINALIZED))

    with false_peer(behaviour) as peer:
        declare_at(owner, "false-7", peer.url, {NAME: facts if told else None})
        shown = reader.mountpoint / NAME
        seen("the name", shown.exists)
        if not told:
            assert (shown / "p_aux").read_bytes() == FINALIZED["p_aux"]  # before it was listed
            assert not (shown / "other").exists()
        assert sorted(os.listdir(shown)) == sorted(FINALIZED)
        for name, data in FINALIZED.items():
            assert (shown / name).read_bytes() == data
        seen("the copy", lambda: state(shown) == "cached")
        assert len([path for path in requests if "/files" not in path]) == 1
    assert len(locations(reader, NAME)) == 2


@pytest.mark.parametrize("make", [stream, unterminated])
def test_a_directory_is_moved_from_another_programs_node(
    twins: tuple[Node, Node, Path], make: Callable[[dict[str, bytes]], bytes]
) -> None:
    owner, reader, disk = twins
    gone: list[str] = []

    def behaviour(peer: FalsePeer) -> Behaviour:
        give = as_lotus(make(FINALIZED))

        def answer(connection: socket.socket, path: str) -> None:
            if gone:
                connection.sendall(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")
            elif peer.heads[-1].startswith("DELETE "):
                gone.append(path)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            else:
                give(connection, path)

        return answer

    with false_peer(behaviour) as peer:
        declare_at(owner, "false-7", peer.url, {NAME: None})
        (target,) = [one.storage for one in status(owner).storages if one.path == str(disk)]
        shown = reader.mountpoint / NAME
        seen("the name", shown.exists)
        [moved] = reader.json("sector", "move", NAME, "--to", target)
        assert (moved["how"], moved["source"]) == ("fetched", "false-7")
    assert gone == [f"/remote/{NAME}?keep={target}"]
    held = locations(owner, NAME)
    assert [(storage, one.primary) for storage, one in held.items()] == [(target, True)]
    for name, data in FINALIZED.items():
        assert (disk / NAME / name).read_bytes() == data
        seen("the file", lambda name=name, data=data: shows(shown / name, data))


def test_a_peer_without_listings_gets_a_directory_as_tar(
    twins: tuple[Node, Node, Path], tmp_path: Path
) -> None:
    owner, _, disk = twins
    for name, data in FINALIZED.items():
        put(disk / NAME / name, data, OLD_NS)
    token = tokens.sign(owner.repo.secret(create=False), ("read",))
    out = tmp_path / "unpacked"
    out.mkdir()
    fetch = ["curl", "-sSf", "-H", f"Authorization: Bearer {token}"]
    url = f"{owner.repo.api()}/remote/{NAME}"
    tar = subprocess.run([*fetch, url], capture_output=True, check=True, timeout=30).stdout
    subprocess.run(["tar", "xf", "-", "-C", str(out)], input=tar, check=True, timeout=30)
    assert tree(tmp_path, ("unpacked",)).keys() == {f"unpacked/{name}" for name in FINALIZED}
    for name, data in FINALIZED.items():
        assert (out / name).read_bytes() == data
        assert (out / name).stat().st_mtime_ns == OLD_NS // 10**9 * 10**9
