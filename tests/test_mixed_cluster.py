"""One cluster of nodes of lotus, Curio and ours: one tree, whoever holds a file and moves it."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.wire import tokens
from tests.cluster import Node, cluster, digest, tree, until
from tests.cluster_fixtures import (
    Background,
    configure,
    locations,
    noise,
    put,
    sector_file,
    seen,
    shows,
    state,
    storages,
    timed,
    with_index,
)
from tests.old_clients import ERAS, FetchClient, GoClient, GoRpc, Mover
from tests.old_peers import OldPeer, old_peers

pytestmark = pytest.mark.mount

SIZE = 8 << 20
"""Of a sector."""
TRAILER = bytes.fromhex("0410109004000000")
"""Of an unsealed file of which all is there. The first nodes have it behind each of theirs."""
FINALIZED = {"p_aux": 64, "sc-02-data-tree-r-last.dat": 18_720, "t_aux": 317}
TYPES = ("unsealed", "sealed", "cache", "update", "update-cache", "key")
STOP, CONT = signal.SIGSTOP, signal.SIGCONT
OWN = ("first", "late")
"""Nodes with files that nobody else has."""


class Scene:
    """Ours: `index` with a disk, and `reader` with the mount. Theirs: `first`, `late`."""

    def __init__(self, root: Path, index: Node, reader: Node, peers: dict[str, OldPeer]) -> None:
        self.index = index
        self.reader = reader
        self.peers = peers
        self.disk = index.disk()
        self.shared = root / "shared"
        index.call("storage", "attach", str(self.shared), "--init", "--store")
        self.ids = {Path(one.path): name for name, one in storages(index).items() if one.path}
        self._token = tokens.sign(index.repo.secret(create=False), ("admin",))
        self._clients: list[GoClient] = []
        for peer in peers.values():
            peer.attach(f"{index.repo.api()}/rpc/v0", self._token, heartbeat=0.5)

    def mover(self, name: str) -> Mover:
        """A node of theirs as it acts."""
        era = next(one for one in ERAS if one.name == self.peers[name].era)
        self._clients.append(GoClient(self._token))
        rpc = GoRpc(f"{self.index.repo.api()}/rpc/v0", self._clients[-1])
        return Mover(self.peers[name], rpc, FetchClient(era, self._clients[-1]))

    def close(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def shown(self, name: str) -> Path:
        """A file in the mount, which may come yet."""
        path = self.reader.mountpoint / name
        seen(name, path.exists)
        return path

    def digest(self, name: str) -> bytes:
        """The digest of a file, once some node has told it."""
        file = sector_file(name)

        async def ask(index: SectorIndex) -> list[Declaration]:
            return [one for one in await index.sector(file.sector) if one.file == file]

        held = with_index(self.index, ask)
        return b"".join(one.facts.digest for one in held if one.facts)

    def is_moved(self, name: str, storage: str) -> bool:
        """True when a storage, and no other, has the primary copy of a file."""
        held = locations(self.index, name)
        return [one for one, copy in held.items() if copy.primary] == [storage]


def fill(root: Path, types: tuple[str, ...], sector: str) -> None:
    """A sector with a file of each type, as if sealed long ago."""
    for kind in types:
        if "cache" in kind:
            for member, size in FINALIZED.items():
                where = f"{kind}/{sector}/{member}"
                put(root / where, noise(where, size))
        else:
            end = TRAILER if kind == "unsealed" else b""
            put(root / kind / sector, noise(f"{kind}/{sector}", SIZE) + end)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("mixed")
    with ExitStack() as stack:
        index, reader = stack.enter_context(cluster(root, "index", "reader"))
        for node in (index, reader):
            configure(
                node,
                index={"heartbeat": 0.3, "cutoff": 5},
                storage={"settle": 0.05},
                hash={"delay": 0.05, "idle": 0.05},
            )
        index.start()
        secret = index.repo.secret(create=False).key
        fill(root / "old/first", TYPES[:3], "s-t01000-1")
        fill(root / "old/late", TYPES, "s-t01000-2")
        peers = stack.enter_context(
            old_peers(root / "old", {"first": "sector-storage", "late": "curio"}, secret=secret)
        )
        made = Scene(root, index, reader, peers)
        stack.callback(made.close)
        fill(made.disk, TYPES, "s-t01000-3")
        fill(made.shared, TYPES[:3], "s-t01000-4")
        index.call("storage", "redeclare", "--all")
        peers["late"].open_path(made.shared)
        reader.start(mount=True, index=index)
        made.shown("cache/s-t01000-3")
        yield made
        for node in (index, reader):
            assert "Traceback" not in node.log()


# --- what is seen ---


def test_every_file_of_every_node_is_read_as_it_is(scene: Scene) -> None:
    wanted: dict[str, str] = {}
    for root in (scene.peers["first"].root, scene.peers["late"].root, scene.disk, scene.shared):
        wanted |= tree(root, TYPES)
    assert len(wanted) == 2 + 3 + (4 + 6) * 2 + 2 + 3
    assert tree(scene.reader.mountpoint, TYPES) == wanted
    assert tree(scene.reader.mountpoint, TYPES) == wanted  # and once more, by now from here


def test_tools_read_what_comes_from_another_program(scene: Scene, tmp_path: Path) -> None:
    name = "sealed/s-t01000-20"
    for peer in scene.peers.values():
        put(peer.root / name, noise(name, SIZE))
        peer.redeclare()
    path = scene.shown(name)
    (tmp_path / "data").write_bytes(noise(name, SIZE))
    subprocess.run(["cmp", path, tmp_path / "data"], check=True)
    subprocess.run(["cp", path, tmp_path / "copy"], check=True)
    assert digest(tmp_path / "copy") == digest(tmp_path / "data")
    assert path.stat().st_size == SIZE


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["sealed", "cache"])
def test_what_another_program_declares_appears_and_what_it_drops_vanishes(
    scene: Scene, name: str, kind: str
) -> None:
    peer = scene.peers[name]
    sector = f"s-t01000-3{OWN.index(name)}"
    fill(peer.root, (kind,), sector)
    peer.redeclare()
    path = scene.shown(f"{kind}/{sector}")
    remove(peer.root / kind / sector)
    peer.redeclare()
    seen("its end", lambda: not path.exists())


def remove(path: Path) -> None:
    """Delete a sector file by hand."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def tree_of(path: Path) -> dict[str, str]:
    """The digests of a sector file, or of the files of a sector directory."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: digest(file) for file in files}


# --- copies ---


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["sealed", "cache"])
def test_a_fetched_copy_outlives_its_source(scene: Scene, name: str, kind: str) -> None:
    peer = scene.peers[name]
    sector = f"s-t01000-4{OWN.index(name)}"
    fill(peer.root, (kind,), sector)
    peer.redeclare()
    path = scene.shown(f"{kind}/{sector}")
    scene.reader.call("sector", "fetch", sector, "--type", kind)
    peer.die()
    try:
        assert state(path) == "cached"
        assert tree_of(path) == tree_of(peer.root / kind / sector)
    finally:
        peer.revive()


def test_a_path_of_both_is_read_while_either_is_there(scene: Scene) -> None:
    for number, kind in enumerate(("sealed", "unsealed")):
        name = f"{kind}/s-t01000-5{number}"
        put(scene.shared / name, noise(name, SIZE))
        path = scene.shown(name)
        if number:
            scene.peers["late"].redeclare()
            scene.index.send(STOP)
        else:
            scene.peers["late"].die()
        try:
            # The other one was away a moment ago, and is asked again soon.
            seen("the file", partial(shows_whole, path, noise(name, SIZE)))
        finally:
            if number:
                scene.index.send(CONT)
            else:
                scene.peers["late"].revive()


# --- proof ---


def test_wrong_bytes_of_theirs_are_never_seen(scene: Scene) -> None:
    """What a file must be is known from the node of ours that had it first."""
    name = "unsealed/s-t01000-70"
    put(scene.disk / name, noise(name, SIZE))
    path = scene.shown(name)
    until("its digest", lambda: scene.digest(name))
    peer = scene.peers["late"]
    scene.mover("late").acquire(name, move=False)
    with (peer.root / name).open("r+b") as file:
        file.seek(5 << 20)
        file.write(bytes([noise(name, SIZE)[5 << 20] ^ 1]))
    seen("the other copy", lambda: peer.storage in locations(scene.reader, name))
    scene.index.send(STOP)
    try:
        outcome, _ = timed(path.read_bytes)
        assert isinstance(outcome, OSError), len(outcome)
        assert outcome.errno == errno.EIO
        assert f"GET /remote/{name}" in requests(peer)
    finally:
        scene.index.send(CONT)
    seen("the file as it is", lambda: shows_whole(path, noise(name, SIZE)))


def requests(peer: OldPeer) -> set[str]:
    """What was asked of a node of theirs."""
    return {f"{one.method} {one.path}" for one in peer.requests}


def shows_whole(path: Path, data: bytes) -> bool:
    """True once a file can be read; it has no other bytes."""
    outcome, _ = timed(path.read_bytes)
    if isinstance(outcome, OSError):
        return False
    assert outcome == data
    return True


# --- moves ---


@pytest.mark.parametrize("kind", ["sealed", "cache"])
def test_a_file_that_they_move_stays_what_it_is(scene: Scene, kind: str) -> None:
    sector = "s-t01000-60"
    name = f"{kind}/{sector}"
    fill(scene.disk, (kind,), sector)
    path = scene.shown(name)
    before = tree_of(scene.disk / name)
    assert tree_of(path) == before
    mover = scene.mover("late")
    mover.acquire(name, move=True)
    assert mover.refused == []
    assert not (scene.disk / name).exists()
    until("the move", lambda: scene.is_moved(name, mover.peer.storage))
    seen("the same file", lambda: path.exists() and tree_of(path) == before)


def test_a_reader_goes_on_while_they_move_its_file(scene: Scene) -> None:
    name = "unsealed/s-t01000-61"
    put(scene.disk / name, noise(name, SIZE))
    path = scene.shown(name)
    with path.open("rb", buffering=0) as file:
        assert file.read(4096) == noise(name, SIZE)[:4096]
        scene.mover("late").acquire(name, move=True)
        until("the move", lambda: scene.is_moved(name, scene.peers["late"].storage))
        rest = b"".join(iter(lambda: file.read(1 << 20), b""))
        assert rest == noise(name, SIZE)[4096:]


def test_a_file_that_they_move_to_the_shared_path_is_kept_there(scene: Scene) -> None:
    name = "sealed/s-t01000-62"
    put(scene.disk / name, noise(name, SIZE))
    path = scene.shown(name)
    mover = scene.mover("late")
    shared = scene.ids[scene.shared]
    mover.acquire_into(scene.shared, shared, name)
    assert mover.refused == []
    assert not (scene.disk / name).exists()
    until("the move", lambda: scene.is_moved(name, shared))
    seen("the same file", lambda: shows(path, noise(name, SIZE)))


@pytest.mark.parametrize("kind", ["sealed", "cache"])
def test_a_file_of_theirs_is_moved_to_us(scene: Scene, kind: str) -> None:
    sector = "s-t01000-63"
    name = f"{kind}/{sector}"
    peer = scene.peers["late"]
    fill(peer.root, (kind,), sector)
    peer.redeclare()
    path = scene.shown(name)
    before = tree_of(peer.root / name)
    scene.index.call("sector", "move", sector, "--type", kind, "--to", scene.ids[scene.disk])
    assert tree_of(scene.disk / name) == before
    assert not (peer.root / name).exists()
    assert scene.is_moved(name, scene.ids[scene.disk])
    seen("the same file", lambda: path.exists() and tree_of(path) == before)


def test_two_of_them_and_we_read_one_file_at_a_time(scene: Scene) -> None:
    name = "sealed/s-t01000-3"
    work: list[Callable[[], object]] = [scene.shown(name).read_bytes]
    work += [partial(scene.mover(each).acquire, name, move=False) for each in OWN]
    readers = [Background(one) for one in work]
    for reader in readers:
        outcome, _ = reader.result()
        assert outcome in (None, noise(name, SIZE)), outcome
    for each in OWN:
        assert tree_of(scene.peers[each].root / name) == tree_of(scene.disk / name)
