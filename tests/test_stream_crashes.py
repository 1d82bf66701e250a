"""A node that is killed while a remote file comes: no mark lies, and it goes on where it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectorfs.stores.blocks import HEADER, MAP_SUFFIX, PIECE
from sectorfs.stores.intervals import Intervals
from tests.cluster import Node, cluster, digest, run, until
from tests.cluster_fixtures import (
    Background,
    configure,
    declare_at,
    facts_of,
    noise,
    put,
    put_sparse,
)
from tests.faulty_peer import FaultyPeer, faulty_peers, silent_from
from tests.stream_crasher import name_of, true_marks

pytestmark = pytest.mark.mount

SIZE = (6 << 20) + 12_345
"""Enough to be streamed, and with a last piece that is short."""
AT_ONCE = 10
"""Seeds of one process."""


class Scene:
    """An Index, a peer that has a sector for each seed, and a node's repo."""

    def __init__(self, root: Path, index: Node, peer: FaultyPeer) -> None:
        self.root = root
        self.index = index
        self.peer = peer

    def crash(self, first: int) -> None:
        """Run some seeds; whatever they say comes with a failure."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.stream_crasher",
                str(self.root),
                str(first),
                str(AT_ONCE),
            ],
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        assert any(int(line) for line in done.stdout.split()), "nothing was ever marked"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("crashes")
    put(root / "data", noise("crashes", SIZE))
    with faulty_peers(root / "peers", "good") as (peer,), cluster(root, "index", "reader") as nodes:
        index, reader = nodes
        configure(index, index={"cutoff": 3600})
        index.start()
        url = f"{index.repo.api()}/rpc/v0"
        listen = {"listen": "127.0.0.1:0"}
        configure(reader, node=listen, index={"cutoff": 3600, "url": url})
        shutil.copy(index.repo.root / "secret", reader.repo.root / "secret")
        reader.mountpoint.mkdir()
        names = [name_of(seed) for seed in range(1, 201)]
        (peer.root / "sealed").mkdir()
        for name in names:
            (peer.root / name).hardlink_to(root / "data")
        facts = facts_of(root / "data")
        declare_at(index, "good", peer.url, dict.fromkeys(names, facts))
        yield Scene(root, index, peer)


@pytest.mark.parametrize("first", range(1, 21, AT_ONCE))
def test_no_mark_lies_after_a_crash(scene: Scene, first: int) -> None:
    scene.crash(first)


@pytest.mark.long
@pytest.mark.parametrize("first", range(21, 201, AT_ONCE))
def test_no_mark_lies_after_any_crash(scene: Scene, first: int) -> None:
    scene.crash(first)


def _marks(part: Path) -> int:
    """How many pieces the map beside a data file marks."""
    try:
        return int.from_bytes(part.with_suffix(MAP_SUFFIX).read_bytes()[HEADER:]).bit_count()
    except FileNotFoundError:
        return 0


def test_a_killed_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    name, size = "sealed/s-t01000-1", 96 << 20
    with (
        faulty_peers(tmp_path / "peers", "good") as (peer,),
        cluster(tmp_path, "index", "reader") as (index, reader),
    ):
        source = peer.root / name
        put_sparse(source, size, noise("the end", 1 << 20))
        for node in (index, reader):
            configure(node, index={"cutoff": 3600}, timeouts={"first_byte": 60})
        index.start()
        reader.start(index=index)
        declare_at(index, "good", peer.url, {name: facts_of(source)})
        cache = reader.repo.cache_path(reader.repo.config())
        part = cache / "sealed/fetching/s-t01000-1.part"
        fetch = ("sector", "fetch", "s-t01000-1")

        peer.fault = silent_from(size // 2)
        first = Background(lambda: run(*fetch, repo=reader.repo.root))
        until("half of it", lambda: peer.waiting and _marks(part) * PIECE >= size // 8)
        reader.kill()
        result, _ = first.result()
        assert result.returncode != 0
        marked = true_marks(part, tmp_path / "aside", source)
        assert marked.total >= size // 8

        peer.fault = None
        peer.forget()
        reader.start(index=index)
        reader.call(*fetch)
        assert digest(cache / name) == digest(source)
        asked = Intervals((at, at + length) for one in peer.asked for at, length in one.spans)
        again = [span for low, high in marked for span in asked.within(low, high)]
        assert again == []
