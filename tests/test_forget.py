"""Storages of dead nodes: when the Index may forget them, and what goes with them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.errors import NotFound, Refused, Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import HealthReport, SectorIndex
from sectorfs.node import forget
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import FileType, SectorFile, StorageID
from sectorfs.wire.client import Client
from tests.cluster_fixtures import Behaviour, FalsePeer, false_peer, free_port
from tests.index_fixtures import CUTOFF, STAT, Clock, file, held, info, merged, open_index, sector

DEAD = StorageID("dead")


class World:
    """An Index with one storage whose node is gone, and a way to ask its URLs."""

    def __init__(self, index: SectorIndex, clock: Clock, peers: PeerClient) -> None:
        self.index = index
        self.clock = clock
        self.peers = peers

    async def attach(self, storage: str, *urls: str, holds: tuple[SectorFile, ...] = ()) -> None:
        await self.index.attach(info(storage, urls=urls), STAT)
        await self.index.declare([held(storage, one) for one in holds])

    def pass_time(self, seconds: float) -> None:
        self.clock.ns += int(seconds * 1e9)

    async def forget(self, storage: str = DEAD, *, force: bool = False) -> forget.DetachReport:
        catalog = Catalog()
        merged(catalog, [await self.index.packed()])
        return await forget.forget(
            StorageID(storage),
            force=force,
            index=self.index,
            catalog=catalog,
            peers=self.peers,
            cutoff=CUTOFF,
        )

    async def known(self) -> list[str]:
        return [status.info.storage for status in await self.index.storages()]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """With time-outs of half a second."""
    clock = Clock()
    timeouts = TimeoutsConfig(connect=0.5, first_byte=0.5, progress=0.5)
    async with open_index(tmp_path / "index.db", clock=clock) as index, Client(timeouts) as client:
        yield World(index, clock, PeerClient(client))


def gone() -> str:
    """A URL where nobody listens."""
    return f"http://127.0.0.1:{free_port()}/remote"


def says(answer: bytes) -> Callable[[FalsePeer], Behaviour]:
    """A peer that answers everything alike."""

    def behaviour(peer: FalsePeer) -> Behaviour:
        return lambda connection, path: connection.sendall(answer)

    return behaviour


def silent(peer: FalsePeer) -> Behaviour:
    """A peer that takes requests and says nothing."""

    def behaviour(connection: socket.socket, path: str) -> None:
        peer.gate.wait(10)

    return behaviour


def trickling(peer: FalsePeer) -> Behaviour:
    """A peer whose answer has no end."""

    def behaviour(connection: socket.socket, path: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while not peer.gate.wait(0.05):
            connection.sendall(b" ")

    return behaviour


def status(line: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {line}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def test_dead_storage_goes_with_all_urls_and_declarations(world: World) -> None:
    await world.attach(DEAD, gone(), gone(), holds=(file(1), file(2)))
    await world.attach("well", gone(), holds=(file(1), file(2), file(3)))
    world.pass_time(CUTOFF + 1)
    urls = (await world.index.info(DEAD)).urls
    report = await world.forget()
    assert (report.detached, report.urls, report.dropped) == (DEAD, list(urls), 2)
    assert (report.lost, report.lost_sectors) == (0, [])
    assert await world.known() == ["well"]
    assert [one.storage for one in await world.index.sector(sector(1))] == ["well"]


async def test_storage_without_urls_goes(world: World) -> None:
    await world.attach(DEAD)
    world.pass_time(CUTOFF + 1)
    assert (await world.forget()).urls == []
    assert await world.known() == []


async def test_unknown_storage(world: World) -> None:
    with pytest.raises(NotFound, match="nobody: neither a storage path of this node"):
        await world.forget("nobody")


async def test_fresh_heartbeat_is_refused_unless_forced(world: World) -> None:
    """Also of a path that is sick: its node lives, and would attach it again."""
    await world.attach(DEAD, gone())
    await world.index.report_health(DEAD, HealthReport(stat=STAT, error="disk is sick"))
    world.pass_time(CUTOFF - 1)
    with pytest.raises(Refused, match=r"its node is alive: the last heartbeat is 49 s old .*force"):
        await world.forget()
    assert await world.known() == [DEAD]
    await world.forget(force=True)
    assert await world.known() == []


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (status("200 OK", b"{}"), "a node answers for it: http://127"),
        (status("401 Unauthorized"), "refuses the token"),
        (status("403 Forbidden"), "lacks a permission"),
        (status("500 Internal Server Error"), "status 500"),
        (status("503 Service Unavailable"), "status 503"),
        (status("200 OK", b"<html>"), "not the JSON"),
    ],
)
async def test_url_that_answers_is_refused_unless_forced(
    world: World, answer: bytes, word: str
) -> None:
    with false_peer(says(answer)) as peer:
        await world.attach(DEAD, gone(), peer.url)
        world.pass_time(CUTOFF + 1)
        with pytest.raises(Refused, match=word):
            await world.forget()
        assert await world.known() == [DEAD]
        assert peer.requests == [f"/remote/stat/{DEAD}"]
        await world.forget(force=True)
        assert await world.known() == []
        assert peer.requests == [f"/remote/stat/{DEAD}"]


async def test_silence_is_death(world: World) -> None:
    """A stopped process takes connections; a node that has other paths now says 404."""
    with ExitStack() as stack:
        answers = (
            silent,
            trickling,
            says(status("404 Not Found")),
            says(b"SSH-2.0-x\r\n"),
            lambda peer: lambda connection, path: None,
        )
        peers = [stack.enter_context(false_peer(answer)) for answer in answers]
        await world.attach(DEAD, gone(), *(peer.url for peer in peers))
        world.pass_time(CUTOFF + 1)
        started = trio.current_time()
        await world.forget()
        assert trio.current_time() - started < 5
        assert await world.known() == []


async def test_last_copies_are_named_and_need_force(world: World) -> None:
    lost = [SectorFile(kind, sector(n)) for n in (3, 4) for kind in (FileType.SEALED,)]
    lost += [SectorFile(FileType.CACHE, sector(number)) for number in range(4, 10)]
    await world.attach(DEAD, gone(), holds=(file(1), *lost))
    await world.attach("well", gone(), holds=(file(1),))
    world.pass_time(CUTOFF + 1)
    with pytest.raises(Refused) as caught:
        await world.forget()
    assert "7 sectors lose their last copy" in str(caught.value)
    named = ", ".join(str(one) for one in sorted(lost)[:5])
    assert f"copy: {named} and 3 more" in str(caught.value)
    assert await world.known() == [DEAD, "well"]
    report = await world.forget(force=True)
    assert (report.dropped, report.lost) == (9, 8)
    assert report.lost_sectors == [f"s-t01000-{number}" for number in range(3, 10)]
    assert await world.index.sector(sector(4)) == []


async def test_one_last_copy(world: World) -> None:
    await world.attach(DEAD, gone(), holds=(file(1),))
    world.pass_time(CUTOFF + 1)
    with pytest.raises(Refused, match="1 sector loses its last copy: sealed/s-t01000-1 "):
        await world.forget()


async def test_index_that_is_lost_in_between_leaves_it_to_be_detached_again(world: World) -> None:
    """The storage is known until its last URL goes; another try does the rest."""
    await world.attach(DEAD, gone(), gone(), gone(), holds=(file(1),))
    world.pass_time(CUTOFF + 1)
    fragile = Fragile(world.index, calls=2)
    catalog = Catalog()
    merged(catalog, [await world.index.packed()])
    with pytest.raises(Unreachable):
        await forget.forget(
            DEAD,
            force=True,
            index=fragile,  # type: ignore[arg-type]  # only what is used
            catalog=catalog,
            peers=world.peers,
            cutoff=CUTOFF,
        )
    assert len((await world.index.info(DEAD)).urls) == 1
    assert len(await world.index.sector(sector(1))) == 1
    await world.forget(force=True)
    assert await world.known() == []


class Fragile:
    """An Index that is lost after some detaches."""

    def __init__(self, index: SectorIndex, *, calls: int) -> None:
        self._calls = calls
        self._index = index
        self.storages = index.storages

    async def detach(self, storage: StorageID, url: str) -> None:
        if not self._calls:
            raise Unreachable("lost", "index")
        self._calls -= 1
        await self._index.detach(storage, url)


async def test_urls_that_went_meanwhile_are_fine(world: World) -> None:
    await world.attach(DEAD, gone(), gone())
    world.pass_time(CUTOFF + 1)
    catalog = Catalog()
    merged(catalog, [await world.index.packed()])
    hasty = Hasty(world.index)
    report = await forget.forget(
        DEAD,
        force=False,
        index=hasty,  # type: ignore[arg-type]  # only what is used
        catalog=catalog,
        peers=world.peers,
        cutoff=CUTOFF,
    )
    assert report.detached == DEAD
    assert await world.known() == []


class Hasty:
    """An Index whose URLs another operator takes away a moment earlier."""

    def __init__(self, index: SectorIndex) -> None:
        self._index = index
        self.storages = index.storages

    async def detach(self, storage: StorageID, url: str) -> None:
        await self._index.detach(storage, url)
        await self._index.detach(storage, url)
