"""What other copies give: which are asked, in which order, and that nothing unproved is taken."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sectorfs.errors import NoSource
from sectorfs.index.protocol import FsStat, HealthReport, StorageInfo
from sectorfs.stores.manifest import BLOCK, Manifest, leaf_hashes
from sectorfs.stores.others import Copy, Subject
from sectorfs.types import FileType, StorageID
from tests.cluster_fixtures import noise
from tests.local_fixtures import URL, sector_file
from tests.scrub_fixtures import SIZE, ScrubRig, cache_files, flip, scrub_rig, two_scrub_rigs
from tests.wire_fixtures import peer, says

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)
DATA = noise("sealed", SIZE)
OUTLINE = Manifest.of_leaves(SIZE, leaf_hashes(DATA)).outline


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[ScrubRig]:
    async with scrub_rig(tmp_path, "disk", "other") as found:
        yield found


async def elsewhere(node: ScrubRig, name: str, *urls: str, healthy: bool = True) -> StorageID:
    """Have another node's storage declare the file."""
    storage = StorageID(name)
    await node.parts.index.attach(StorageInfo(storage=storage, urls=urls), FsStat())
    report = HealthReport(stat=FsStat(), error="" if healthy else "dead")
    await node.parts.index.report_health(storage, report)
    entry = node.catalog.entry(SEALED)
    assert entry is not None
    one = entry.declarations[0]
    await node.parts.index.declare([type(one)(SEALED, storage, False, one.facts)])
    await node.sync()
    return storage


def subject(node: ScrubRig, name: str = "disk") -> Subject:
    return Subject(SEALED, None, node.parts.ids[name])


async def test_own_paths_come_before_nodes_and_the_healthy_before_the_others(
    node: ScrubRig,
) -> None:
    for name in ("disk", "other"):
        await node.put(name, SEALED, DATA)
    dead = await elsewhere(node, "a-dead", "http://dead/remote", healthy=False)
    well = await elsewhere(node, "b-well", "http://well/remote", URL)
    disk, other = node.parts.ids["disk"], node.parts.ids["other"]
    found = node.others.copies(SEALED, without=disk)
    assert found == [
        Copy(other, ""),
        Copy(well, "http://well/remote"),
        Copy(dead, "http://dead/remote"),
    ]
    assert node.others.copies(CACHE, without=disk) == []


async def test_a_block_comes_from_the_first_copy_that_has_it_right(node: ScrubRig) -> None:
    for name in ("disk", "other"):
        await node.put(name, SEALED, DATA)
    lane = node.path("disk").lane
    data = await node.others.block(subject(node), OUTLINE, 3, lane=lane)
    assert data == DATA[3 * BLOCK : 4 * BLOCK]
    flip(node.parts.path("other") / str(SEALED), 8 * 3 * BLOCK)
    with pytest.raises(NoSource, match="no good copy elsewhere") as caught:
        await node.others.block(subject(node), OUTLINE, 3, lane=lane)
    assert "wrong bytes in block 3" in caught.value.hint


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nall",
        b"HTTP/1.1 206 Partial Content\r\ncontent-type: application/octet-stream\r\n"
        b"content-range: bytes 0-3/8388608\r\ncontent-length: 4\r\n\r\nfour",
        b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n",
        b"",
    ],
)
async def test_nodes_that_give_something_else_are_causes(node: ScrubRig, answer: bytes) -> None:
    await node.put("disk", SEALED, DATA)
    async with peer(says(answer)) as url:
        await elsewhere(node, "odd", f"{url}/remote")
        with pytest.raises(NoSource) as caught:
            await node.others.block(subject(node), OUTLINE, 0, lane=node.path("disk").lane)
        assert len(caught.value.causes) == 1
        assert await node.others.outline(subject(node), SIZE, OUTLINE.digest) is None


async def test_outlines_and_rolls_are_proved_by_their_digest(tmp_path: Path) -> None:
    async with two_scrub_rigs(tmp_path) as (ours, theirs):
        files = cache_files("cache")
        await theirs.put("theirs", SEALED, DATA, hashed=True)
        await theirs.put("theirs", CACHE, files)
        digest = await theirs.hash("theirs", CACHE)
        await ours.put("mine", SEALED, DATA)
        await ours.sync()
        mine = ours.parts.ids["mine"]
        wanted = Subject(SEALED, None, mine)
        found = await ours.others.outline(wanted, SIZE, OUTLINE.digest)
        assert found is not None
        assert found.blocks == OUTLINE.blocks
        assert await ours.others.outline(wanted, SIZE, b"?" * 32) is None
        roll = await ours.others.roll(CACHE, digest, without=mine)
        assert roll is not None
        assert {entry.name for entry in roll.entries} == set(files)
        assert await ours.others.roll(CACHE, b"?" * 32, without=mine) is None


async def test_what_another_path_of_this_node_knows_is_used(node: ScrubRig) -> None:
    files = cache_files("cache")
    for name in ("disk", "other"):
        await node.put(name, SEALED, DATA)
        await node.put(name, CACHE, files)
    assert await node.others.outline(subject(node), SIZE, OUTLINE.digest) is None
    await node.hash("other", SEALED)
    digest = await node.hash("other", CACHE)
    assert await node.others.outline(subject(node), SIZE, OUTLINE.digest) is not None
    disk = node.parts.ids["disk"]
    assert await node.others.roll(CACHE, digest, without=disk) is not None
    os.utime(node.parts.path("other") / str(SEALED), ns=(1, 1))
    await node.declare("other", SEALED)
    assert await node.others.outline(subject(node), SIZE, OUTLINE.digest) is None
