"""Nodes of lotus and Curio that take files away from a node of ours, in all ways that go wrong.

They fetch, declare the file on a path of their own, and tell the source to delete it, all from
within one cluster whose Index is ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest

from sectorfs.wire import tokens
from tests.cluster import Node, cluster, until
from tests.cluster_fixtures import configure, locations, noise, put, storages
from tests.old_clients import ERAS, FetchClient, GoClient, GoRpc, Mover, Refused, join_url
from tests.old_peers import Era as EraName
from tests.old_peers import OldPeer, old_peers

SIZE = 300_000
MEMBERS = {"p_aux": 64, "sc-02-data-tree-r-last.dat": 18_720, "t_aux": 317}
"""Of a finalized sector of 8 MiB."""
MODERN = ("lotus", "curio")
NAMES: tuple[EraName, ...] = ("sector-storage", "lotus", "curio")
KINDS = ("sealed", "cache")


class Scene:
    """Our node with two disks, and a node of each era."""

    def __init__(self, root: Path, node: Node, peers: dict[str, OldPeer]) -> None:
        self.node = node
        self.disk = node.disk()
        self.shared = root / "shared"
        node.call("storage", "attach", str(self.shared), "--init", "--store", "--weight", "50")
        self.ids = {one.path: name for name, one in storages(node).items()}
        self._token = tokens.sign(node.repo.secret(create=False), ("admin",))
        self._clients: list[GoClient] = []
        self._files = 0
        api = node.repo.api()
        self.base = f"{api}/remote"
        self.movers = {}
        for era in ERAS:
            client = GoClient(self._token)
            self._clients.append(client)
            index = GoRpc(f"{api}/rpc/v0", client)
            peers[era.name].attach(index.url, self._token, heartbeat=0.5)
            self.movers[era.name] = Mover(peers[era.name], index, FetchClient(era, client))

    def storage(self, path: Path) -> str:
        return self.ids[str(path)]

    def put(self, kind: str, **more: int) -> str:
        """A new sector file on our first disk, declared."""
        self._files += 1
        name = f"{kind}/s-t01000-{self._files}"
        if kind == "cache":
            for member, size in {**MEMBERS, **more}.items():
                put(self.disk / f"{name}.new" / member, noise(f"{name}/{member}", size))
        else:
            put(self.disk / f"{name}.new", noise(name, SIZE))
        os.rename(self.disk / f"{name}.new", self.disk / name)
        until("its declaration", lambda: self.holders(name) == {self.storage(self.disk): True})
        return name

    def holders(self, name: str) -> dict[str, bool]:
        """Storages that declare a file, and whether it is primary there."""
        return {storage: one.primary for storage, one in locations(self.node, name).items()}

    def close(self) -> None:
        for client in self._clients:
            client.close()


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a sector file, by name those of a directory; nothing when it is gone."""
    if path.is_dir():
        return {entry.name: entry.read_bytes() for entry in path.iterdir()}
    return {"": path.read_bytes()} if path.exists() else {}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("old-movers")
    with ExitStack() as stack:
        (node,) = stack.enter_context(cluster(root, "node"))
        configure(node, index={"heartbeat": 0.3, "cutoff": 5}, storage={"settle": 0.05})
        node.start()
        secret = node.repo.secret(create=False).key
        eras: dict[str, EraName] = {era: era for era in NAMES}
        peers = stack.enter_context(old_peers(root / "old", eras, secret=secret))
        made = Scene(root, node, peers)
        stack.callback(made.close)
        yield made
        assert "Traceback" not in node.log()


# --- what is moved ---


@pytest.mark.parametrize(("era", "kind"), [*product(MODERN, KINDS), ("sector-storage", "cache")])
def test_a_file_is_moved_to_another_program(scene: Scene, era: str, kind: str) -> None:
    name, mover = scene.put(kind), scene.movers[era]
    before = content(scene.disk / name)
    mover.acquire(name, move=True)
    assert mover.refused == []
    assert content(mover.peer.root / name) == before
    assert content(scene.disk / name) == {}
    assert scene.holders(name) == {mover.peer.storage: True}


@pytest.mark.parametrize("era", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_copied_by_another_program(scene: Scene, era: str, kind: str) -> None:
    name, mover = scene.put(kind), scene.movers[era]
    before = content(scene.disk / name)
    mover.acquire(name, move=False)
    assert content(mover.peer.root / name) == content(scene.disk / name) == before
    assert scene.holders(name).keys() == {mover.peer.storage, scene.storage(scene.disk)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_goes_through_nodes_of_all_eras_and_back(scene: Scene, kind: str) -> None:
    name = scene.put(kind)
    before = content(scene.disk / name)
    for era in ("lotus", "curio", "lotus"):
        mover = scene.movers[era]
        mover.acquire(name, move=True)
        assert content(mover.peer.root / name) == before
        assert scene.holders(name) == {mover.peer.storage: True}
    scene.node.call("sector", "move", name.split("/")[1], "--to", scene.storage(scene.disk))
    assert content(scene.disk / name) == before
    assert scene.holders(name) == {scene.storage(scene.disk): True}


# --- what is not given away ---


@pytest.mark.parametrize("era", MODERN)
def test_a_directory_with_files_that_the_other_leaves_out_stays(scene: Scene, era: str) -> None:
    name = scene.put("cache", **{"syn-porep-vanilla-proofs.dat": 4000})
    mover = scene.movers[era]
    before = content(scene.disk / name)
    mover.acquire(name, move=True)
    assert content(mover.peer.root / name).keys() == MEMBERS.keys()
    assert mover.refused.pop() == "non-200 code: 409"
    assert content(scene.disk / name) == before
    assert scene.holders(name).keys() == {mover.peer.storage, scene.storage(scene.disk)}


@pytest.mark.parametrize("era", MODERN)
def test_a_file_stays_whose_copy_there_was_cut_short(scene: Scene, era: str) -> None:
    name, mover = scene.put("sealed"), scene.movers[era]
    mover.acquire(name, move=False)
    os.truncate(mover.peer.root / name, SIZE - 1)
    with pytest.raises(Refused, match="409"):
        mover.client.delete(join_url(scene.base, name), [mover.peer.storage])
    assert content(scene.disk / name) == {"": noise(name, SIZE)}
    assert scene.storage(scene.disk) in scene.holders(name)


def test_a_file_stays_whose_copy_tells_no_length(scene: Scene) -> None:
    """The first ones send a file without it, and theirs may have been cut short on its way."""
    name, mover = scene.put("sealed"), scene.movers["sector-storage"]
    mover.acquire(name, move=True)
    assert mover.refused.pop() == "non-200 code: 409"
    assert content(mover.peer.root / name) == content(scene.disk / name)
    assert scene.storage(scene.disk) in scene.holders(name)


@pytest.mark.parametrize("era", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_only_copy_stays(scene: Scene, era: str, kind: str) -> None:
    name, mover = scene.put(kind), scene.movers[era]
    before = content(scene.disk / name)
    for keep in (None, [], [""], [mover.peer.storage], ["", "x"]):
        with pytest.raises(Refused, match="409"):
            mover.client.delete(join_url(scene.base, name), keep)
    assert content(scene.disk / name) == before
    assert scene.holders(name) == {scene.storage(scene.disk): True}


def test_what_is_not_here_is_not_deleted(scene: Scene) -> None:
    for mover in scene.movers.values():
        with pytest.raises(Refused, match="404"):
            mover.client.delete(join_url(scene.base, "sealed/s-t01000-999"), ["x"])


# --- a path that both have ---


@pytest.mark.parametrize("era", MODERN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_moved_to_a_shared_path_is_kept_there(scene: Scene, era: str, kind: str) -> None:
    name, mover = scene.put(kind), scene.movers[era]
    before = content(scene.disk / name)
    shared = scene.storage(scene.shared)
    mover.acquire_into(scene.shared, shared, name)
    assert mover.refused == []
    assert content(scene.disk / name) == {}
    assert content(scene.shared / name) == before
    until("the declaration", lambda: scene.holders(name) == {shared: True})


@pytest.mark.parametrize("kind", KINDS)
def test_a_mover_that_cannot_say_what_to_keep_loses_nothing(scene: Scene, kind: str) -> None:
    """The first ones delete, on a path they share with the source, what they have just moved."""
    name, mover = scene.put(kind), scene.movers["sector-storage"]
    before = content(scene.disk / name)
    mover.acquire_into(scene.shared, scene.storage(scene.shared), name)
    assert mover.refused.pop() == "non-200 code: 409"
    assert content(scene.disk / name) == content(scene.shared / name) == before


def test_every_storage_of_the_node_is_to_be_kept(scene: Scene) -> None:
    name, mover = scene.put("sealed"), scene.movers["curio"]
    mover.client.delete(join_url(scene.base, name), ["", *scene.ids.values(), "elsewhere"])
    assert content(scene.disk / name) == {"": noise(name, SIZE)}
