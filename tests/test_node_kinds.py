"""Nodes of each era asked by the client half of the protocol: what is learned, and by what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectorfs.errors import NoRanges, NotFound, SourceFailed, Unauthorized, Unreachable
from sectorfs.stores.answers import MTIME_HEADER, Version
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.node_kinds import NodeKind, NodeKinds
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, FileType, SectorFile, SectorID
from sectorfs.wire import tokens
from sectorfs.wire.client import Client
from sectorfs.wire.credentials import Credentials
from tests.archive_fixtures import FINALIZED, served, write_directory
from tests.cluster_fixtures import noise, put
from tests.faulty_peer import closes_after
from tests.old_peers import ERAS, OldPeer, ends_after, old_peers
from tests.wire_fixtures import PATIENT, FolderFiles, says
from tests.wire_fixtures import peer as answering

SECRET = bytes(range(32))
ADMIN = tokens.sign(tokens.Secret(SECRET), ("admin",))
DATA = noise("data", 300_000)
MTIME_NS = 1_600_000_000_000_000_000
SEALED = SectorFile(FileType.SEALED, SectorID(1000, 7))
EMPTY = SectorFile(FileType.SEALED, SectorID(1000, 8))
CACHE = SectorFile(FileType.CACHE, SectorID(1000, 7))
MODERN = ("lotus", "curio")


@pytest.fixture(params=ERAS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OldPeer]:
    root = tmp_path / "node"
    put(root / str(SEALED), DATA, MTIME_NS)
    put(root / str(EMPTY), b"", MTIME_NS)
    write_directory(root / str(CACHE), FINALIZED)
    with old_peers(tmp_path, {"node": request.param}, secret=SECRET) as peers:
        yield peers["node"]


async def test_sizes_are_asked_by_a_range_of_one_byte(old: OldPeer) -> None:
    async with Client(PATIENT, token=ADMIN) as client:
        peers = PeerClient(client)
        assert peers.kind(old.url) is None
        if old.era not in MODERN:
            for _ in range(2):
                with pytest.raises(NoRanges, match="does not say how long"):
                    await peers.told(old.url, SEALED)
            assert peers.kind(old.url) is NodeKind.WHOLE
        else:
            for _ in range(2):
                told = await peers.told(old.url, SEALED)
                assert (told.facts, told.by_ours) == (Facts(len(DATA), MTIME_NS), False)
            assert (await peers.told(old.url, EMPTY)).facts == Facts(0, MTIME_NS)
            assert peers.kind(old.url) is NodeKind.RANGES
    asked = [(one.method, one.headers.get("range")) for one in old.requests[:3]]
    assert asked == [("HEAD", None), ("GET", "bytes=0-0"), ("GET", "bytes=0-0")]


async def test_a_directory_tells_what_kind_a_node_is(old: OldPeer) -> None:
    async with Client(PATIENT, token=ADMIN) as client:
        peers = PeerClient(client)
        with pytest.raises(NotFound):
            await peers.told(old.url, CACHE)
        assert peers.kind(old.url) is None  # 404 says nothing of a node
        async with peers.archive(old.url, CACHE, minimal=True) as response:
            while await response.piece() is not None:
                pass
        assert peers.kind(old.url) is NodeKind.RANGES


async def test_ranges_come_from_modern_ones_only(old: OldPeer) -> None:
    came: list[tuple[int, bytes]] = []
    spans = [(0, 10), (100, 4196), (299_000, 300_000)]
    async with Client(PATIENT, token=ADMIN) as client:
        peers = PeerClient(client)

        async def ranges() -> Version:
            def deliver(offset: int, data: bytes, leaves: bytes) -> None:
                assert leaves == b""
                came.append((offset, data))

            return await peers.ranges(
                old.url, SEALED, None, spans, expect=None, leaves=False, deliver=deliver
            )

        if old.era not in MODERN:
            with pytest.raises(NoRanges):
                await ranges()
            return
        assert await ranges() == Version(len(DATA), MTIME_NS)
        assert came == [(start, DATA[start:end]) for start, end in spans]


async def test_a_file_of_unknown_length(old: OldPeer, tmp_path: Path) -> None:
    lane = Lane("out", deadline=5)

    async def fetch(peers: PeerClient, limit: int = 1 << 20) -> tuple[Facts, bytes]:
        path = tmp_path / "out"
        descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        try:
            facts = await peers.fetch_unmeasured(
                old.url, SEALED, descriptor, limit=limit, run=lane.finish
            )
            return facts, path.read_bytes()
        finally:
            descriptor.close()

    async with Client(PATIENT, token=ADMIN) as client:
        peers = PeerClient(client)
        facts, data = await fetch(peers)
        mtime_ns = MTIME_NS if old.era in MODERN else 0
        assert (facts, data) == (Facts(len(DATA), mtime_ns), DATA)
        with pytest.raises(SourceFailed, match="more than"):
            await fetch(peers, limit=len(DATA) - 1)
        old.fault = closes_after(100_000)
        with pytest.raises(Unreachable, match="broke off"):
            await fetch(peers)
        old.fault = ends_after(100_000)
        if old.era in MODERN:
            with pytest.raises(Unreachable, match="broke off"):
                await fetch(peers)
        else:  # as good an end as any: its length alone gives it away
            assert await fetch(peers) == (Facts(100_000, 0), DATA[:100_000])


@pytest.mark.parametrize("declared", [MTIME_NS, MTIME_NS + 123, MTIME_NS + 10**9])
async def test_a_file_of_another_time_is_another_one(
    old: OldPeer, tmp_path: Path, declared: int
) -> None:
    lane = Lane("out", deadline=5)
    descriptor = Descriptor(os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT))
    async with Client(PATIENT, token=ADMIN) as client:
        peers = PeerClient(client)

        async def fetch() -> None:
            await peers.fetch(
                old.url,
                SEALED,
                None,
                descriptor,
                size=len(DATA),
                mtime_ns=declared,
                run=lane.finish,
            )

        if old.era in MODERN and declared > MTIME_NS + 123:
            with pytest.raises(SourceFailed, match="another content"):
                await fetch()
        else:  # the second is all that is told, or not even that
            await fetch()
            assert (tmp_path / "out").read_bytes() == DATA
    descriptor.close()


async def test_a_token_of_theirs_is_asked_for_by_name(old: OldPeer) -> None:
    other = tokens.sign(tokens.Secret(bytes(32)), ("admin",))
    known = Credentials(other, lambda: "not one", hint="see /etc/their-token")
    async with Client(PATIENT, token=known) as client:
        with pytest.raises(Unauthorized, match="see /etc/their-token"):
            await PeerClient(client).told(old.url, SEALED)
    read = tokens.sign(tokens.Secret(SECRET), ("read",))
    async with Client(PATIENT, token=read) as client:
        with pytest.raises(Unauthorized, match="copy the secret"):
            await PeerClient(client).told(old.url, SEALED)


async def test_a_node_that_is_replaced_by_ours_is_known_as_ours(tmp_path: Path) -> None:
    put(tmp_path / str(SEALED), DATA, MTIME_NS)
    async with served(FolderFiles(tmp_path)) as node:
        peers = PeerClient(node.client)
        peers._kinds._known[f"127.0.0.1:{node.port}"] = NodeKind.RANGES
        assert (await peers.told(node.base, SEALED)).by_ours
        assert peers.kind(node.base) is NodeKind.OURS
        assert (await peers.told(node.base, SEALED)).by_ours


async def test_what_says_nothing_of_a_node() -> None:
    for answer in (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 404 X\r\n\r\n"):
        async with answering(says(answer)) as url, Client(PATIENT) as client:
            peers = PeerClient(client)
            with pytest.raises((SourceFailed, NotFound)):
                await peers.told(f"{url}/remote", SEALED)
            assert peers.kind(f"{url}/remote") is None
    assert NodeKinds(MTIME_HEADER).of("nobody") is None
