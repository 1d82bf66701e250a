"""A digest on its way: hashed where the file lies, told to the Index, proved by who reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Node, cluster, until
from tests.cluster_fixtures import cache_of, configure, locations, metric, noise, put, state

pytestmark = pytest.mark.mount

LARGE = noise("large", 9 << 20)
MEMBERS = {"p_aux": noise("p", 64), "t_aux": noise("t", 3000), "sc-02-data-tree-r-last.dat": LARGE}
FILE, CACHE = "sealed/s-t01000-1", "cache/s-t01000-1"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node, Node]]:
    """One that holds files, and two that read them; the first of these keeps the Index."""
    with cluster(tmp_path, "reader", "other", "holder") as [reader, other, holder]:
        for node in (reader, other, holder):
            configure(node, hash={"delay": 0.1, "idle": 0.1})
        disk = holder.disk()
        put(disk / FILE, LARGE)
        for name, data in MEMBERS.items():
            put(disk / CACHE / name, data)
        reader.start(mount=True)
        other.start(mount=True, index=reader, wait=False)
        holder.start(index=reader)
        other.ready()
        yield reader, other, holder


def told(path: Path, name: str) -> str:
    try:
        return os.getxattr(path, f"user.sectorfs.{name}").decode()
    except OSError:
        return ""


def test_what_a_node_hashed_is_proved_by_the_others(nodes: tuple[Node, Node, Node]) -> None:
    reader, other, holder = nodes
    sealed, cache = reader.mountpoint / FILE, reader.mountpoint / CACHE
    until("the digests", lambda: told(sealed, "digest") and told(cache, "digest"))
    assert told(sealed, "verified") == "blocks"
    assert sealed.read_bytes() == LARGE
    for name, data in MEMBERS.items():
        assert (cache / name).read_bytes() == data
        assert told(cache / name, "verified") == "blocks"
        assert len(told(cache / name, "digest")) == 64
    assert metric(reader, "sectorfs_proved_bytes_total") >= len(LARGE)
    reader.call("sector", "fetch", "s-t01000-1")
    copy = cache_of(reader)
    for path, name in ((sealed, FILE), (cache, CACHE)):
        until("the copy", lambda path=path: state(path) == "cached")
        digest = told(path, "digest")

        def is_proved(name: str = name, digest: str = digest) -> bool:
            found = locations(reader, name).get(copy)
            return found is not None and found.digest == digest

        until("the copy to be declared with its digest", is_proved)
        assert told(path, "verified") == "blocks"
    assert metric(reader, "sectorfs_hashed_bytes_total") == 0, "what was proved is not hashed again"
    assert metric(reader, "sectorfs_wrong_bytes_total") == 0
    holder.kill()
    assert (other.mountpoint / FILE).read_bytes() == LARGE, "by the copy and its manifest"
    for name, data in MEMBERS.items():
        assert (other.mountpoint / CACHE / name).read_bytes() == data
    assert metric(other, "sectorfs_proved_bytes_total") >= len(LARGE)
