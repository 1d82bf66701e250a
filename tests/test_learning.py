"""What other programs' nodes did not tell is asked for, shown, told to the Index, and guessed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from sectorfs.config import StorageConfig, TimeoutsConfig
from sectorfs.errors import NoSource, SourceFailed
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import Changes, Declaration, FsStat, StorageInfo
from sectorfs.stores import guesses, learning, metadata
from sectorfs.stores.copies import Copies
from sectorfs.stores.guesses import Guesses
from sectorfs.stores.lanes import Lane
from sectorfs.stores.learning import Learner
from sectorfs.stores.local import LocalStore
from sectorfs.stores.places import Places
from sectorfs.stores.ranking import Ranking
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.unmeasured import receive_unmeasured
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from sectorfs.wire import tokens
from sectorfs.wire.client import Client
from tests.cluster_fixtures import noise, put
from tests.faulty_peer import closes_after
from tests.local_fixtures import SwitchedIndex, switched_index, until
from tests.old_peers import Era, OldPeer, ends_after, old_peers
from tests.wire_fixtures import open_fds, wait_until

SECRET = bytes(range(32))
ADMIN = tokens.sign(tokens.Secret(SECRET), ("admin",))
TIMEOUTS = TimeoutsConfig(connect=5, first_byte=5, progress=5, disk=5)
DATA = noise("data", 2048)
TRAILER = bytes.fromhex("04100203000000")
MTIME_NS = 1_600_000_000 * 10**9
GIB = 1 << 30


def file(number: int, file_type: FileType = FileType.SEALED, miner: int = 1000) -> SectorFile:
    return SectorFile(file_type, SectorID(miner, number))


class World:
    """A catalog, an Index, a peer, and who learns from it."""

    def __init__(self, index: SwitchedIndex, peer: OldPeer, client: Client) -> None:
        self.index = index
        self.peer = peer
        self.storage = StorageID(peer.storage)
        self.catalog = Catalog()
        self.changes: list[FileChange] = []
        self.feed = Feed(
            index,  # type: ignore[arg-type]  # a proxy of one
            self.catalog,
            heartbeat=3600,
            on_change=self.changes.extend,
        )
        local = LocalStore(
            index,  # type: ignore[arg-type]  # a proxy of one
            urls=("http://own:1/remote",),
            timeouts=TIMEOUTS,
            storage=StorageConfig(),
            heartbeat=3600,
            watch=False,
        )
        self.peers = PeerClient(client)
        self.learner = Learner(
            catalog=self.catalog,
            index=index,  # type: ignore[arg-type]  # a proxy of one
            peers=self.peers,
            ranking=Ranking(self.catalog, local, self.peers, own_urls=frozenset(), cutoff=50),
            places=Places(8, patience=0),
            on_change=self.changes.extend,
        )

    async def hold(self, *files: SectorFile, data: bytes = DATA) -> None:
        """Let the peer have files, and the Index know them without facts."""
        for one in files:
            put(self.peer.root / str(one), data, MTIME_NS)
        self.peer.redeclare()
        info = StorageInfo(storage=self.storage, urls=(self.peer.url,), can_store=True)
        await self.index.attach(info, FsStat())
        await self.index.declare([Declaration(one, self.storage, True) for one in files])
        await self.sync()

    async def sync(self) -> None:
        newest = (await self.index.snapshot(limit=1)).seq
        while not self.catalog.loaded or self.catalog.seq < newest:
            await self.feed.step(wait=0)

    def facts(self, one: SectorFile) -> Facts | None:
        entry = self.catalog.entry(one)
        return entry.facts if entry is not None else None

    async def in_index(self, one: SectorFile) -> Facts | None:
        [declaration] = await self.index.index.sector(one.sector)
        assert declaration.primary
        facts: Facts | None = declaration.facts
        return facts

    async def is_in_index(self, one: SectorFile) -> bool:
        return await self.in_index(one) is not None


@asynccontextmanager
async def world(root: Path, era: Era = "lotus") -> AsyncIterator[World]:
    with old_peers(root, {"peer": era}, secret=SECRET) as peers:
        async with switched_index(root) as index, Client(TIMEOUTS, token=ADMIN) as client:
            yield World(index, peers["peer"], client)


async def test_what_is_asked_for_is_shown_at_once_and_told_later(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.hold(file(1))
        it.index.away = True
        it.changes.clear()
        assert await it.learner.ask(file(1))
        told = Facts(2048, MTIME_NS)
        assert it.facts(file(1)) == told
        assert [(one.before, one.after) for one in it.changes] == [(None, told)]
        assert await it.in_index(file(1)) is None
        it.index.away = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.learner.run)
            await until(lambda: it.is_in_index(file(1)))
            nursery.cancel_scope.cancel()
        assert await it.in_index(file(1)) == told
        await it.sync()
        assert it.facts(file(1)) == told


async def test_the_index_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TELL_AGAIN", 0.01)
    async with world(tmp_path) as it:
        await it.hold(file(1), file(2))
        it.index.away_for = {"tell"}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.learner.run)
            await wait_until(lambda: it.index.calls.count("tell") > 2)
            await wait_until(lambda: it.facts(file(2)) == Facts(2048, MTIME_NS))
            it.index.away_for = set()
            await until(lambda: it.is_in_index(file(2)))
            nursery.cancel_scope.cancel()


async def test_everything_is_asked_for_and_what_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "PAUSE", 0)
    files = [file(number, kind) for number in range(5) for kind in (FileType.SEALED, FileType.KEY)]
    async with world(tmp_path, "curio") as it:
        await it.hold(*files)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.learner.run)
            await wait_until(lambda: all(it.facts(one) for one in files))
            asked = len(it.peer.requests)
            await it.hold(file(99))
            it.learner.noticed([FileChange(file(99), None, None, True, False)])
            await wait_until(lambda: it.facts(file(99)) is not None)
            nursery.cancel_scope.cancel()
        assert len(it.peer.requests) == asked + 1
        assert [one.method for one in it.peer.requests].count("HEAD") == 1


async def test_one_that_failed_is_asked_again_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "FIRST_PAUSE", 0.01)
    async with world(tmp_path) as it:
        await it.hold(file(1))
        it.peer.fault = closes_after(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.learner.run)
            await wait_until(lambda: bool(it.peer.requests))
            it.peer.fault = None
            await wait_until(lambda: it.facts(file(1)) is not None)
            nursery.cancel_scope.cancel()


async def test_nodes_that_send_files_whole_are_left_alone(tmp_path: Path) -> None:
    async with world(tmp_path, "sector-storage") as it:
        await it.hold(file(1), file(2))
        assert await it.learner.ask(file(1)) is False
        asked = len(it.peer.requests)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.learner.run)
            it.learner.noticed([FileChange(file(2), None, None, True, False)])
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()
        assert len(it.peer.requests) == asked


async def test_nobody_tells(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.hold(file(1))
        os.unlink(it.peer.root / str(file(1)))
        with pytest.raises(NoSource, match="500"):
            await it.learner.ask(file(1))
        with pytest.raises(NoSource):
            await it.learner.ask(file(2))  # nobody has it


async def test_what_was_dropped_meanwhile_stays_dropped(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.hold(file(1))
        it.learner.found(file(1), StorageID("another"), Facts(1, 1))
        it.learner.found(file(2), it.storage, Facts(1, 1))
        assert it.facts(file(1)) is None
        assert it.catalog.entry(file(2)) is None


async def test_another_content_is_noticed_where_nobody_tells(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.hold(file(1))
        assert await it.learner.ask(file(1))
        assert not await it.learner.look_again(file(1))
        put(it.peer.root / str(file(1)), b"more", MTIME_NS + 10**9)
        assert await it.learner.look_again(file(1))
        assert it.facts(file(1)) == Facts(4, MTIME_NS + 10**9)


# Files of unknown length


@pytest.mark.parametrize("kind", [FileType.SEALED, FileType.UNSEALED])
async def test_a_file_without_a_length_is_judged_by_its_own(tmp_path: Path, kind: FileType) -> None:
    whole = DATA + (TRAILER if kind is FileType.UNSEALED else b"")
    before = open_fds()
    async with world(tmp_path, "sector-storage") as it:
        await it.hold(file(1, kind), data=whole)
        storage = metadata.init_cache_path(str(tmp_path / "copies")).storage
        copies = Copies(tmp_path / "copies", storage, Lane("copies", deadline=5))
        source = PeerSource(it.storage, it.peer.url)

        async def receive(sector_size: int = 2048) -> Facts:
            return await receive_unmeasured(
                it.peers,
                copies,
                source,
                file(1, kind),
                sector_size=sector_size,
                progress=lambda done: None,
            )

        for count in (0, 1024, 2047, *((2048, 2049, 2054) if kind is FileType.UNSEALED else ())):
            it.peer.fault = ends_after(count)
            with pytest.raises(SourceFailed):
                await receive()
            assert not list((tmp_path / "copies" / kind.dir_name).rglob("s-*"))
        it.peer.fault = None
        for other in (8 << 20, 32 * GIB):
            with pytest.raises(SourceFailed, match=r"mount\.sector_size"):
                await receive(other)
        assert await receive() == Facts(len(whole), 0)
        copy = await copies.open(file(1, kind), None, size=len(whole), mtime_ns=0)
        assert copy is not None
        copy.close()
    await wait_until(lambda: open_fds() == before)


async def test_a_piece_without_a_length_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path, "sector-storage") as it:
        storage = metadata.init_cache_path(str(tmp_path / "copies")).storage
        copies = Copies(tmp_path / "copies", storage, Lane("copies", deadline=5))
        source = PeerSource(it.storage, it.peer.url)
        with pytest.raises(SourceFailed, match="how long"):
            await receive_unmeasured(
                it.peers,
                copies,
                source,
                file(1, FileType.PIECE),
                sector_size=2048,
                progress=lambda done: None,
            )
        assert it.peer.requests == []


# Guesses


def catalog_of(*told: tuple[SectorFile, Facts | None]) -> Catalog:
    catalog = Catalog()
    declared = tuple(Declaration(one, StorageID("a"), True, facts) for one, facts in told)
    catalog.apply(Changes(epoch="e", seq=1, declared=declared), 1, 1.0)
    return catalog


def told(known: Sequence[tuple[SectorFile, Facts | None]], *, usual: int = 32 * GIB) -> Guesses:
    return Guesses(catalog_of(*known), usual=usual, now=lambda: 0.0)


MEMBERS = (
    MemberFacts("p_aux", 64, 1),
    MemberFacts("sc-02-data-tree-r-last.dat", 18720, 1),
    MemberFacts("t_aux", 100, 1),
)


@pytest.mark.parametrize(
    ("known", "facts", "size"),
    [
        (file(2), Facts(64 * GIB, 1), 64 * GIB),
        (file(1, FileType.UNSEALED), Facts(64 * GIB + 10, 1), 64 * GIB),
        (file(1, FileType.CACHE), Facts(18884, 1, MEMBERS), 8 << 20),
        (file(2, FileType.KEY), Facts(512 << 20, 1), 512 << 20),
        (file(2), Facts(12345, 1), 32 * GIB),
        (file(2, FileType.PIECE), Facts(2048, 1), 32 * GIB),
        (file(2, miner=1001), Facts(64 * GIB, 1), 32 * GIB),
        (file(2), None, 32 * GIB),
    ],
)
def test_a_file_is_as_long_as_the_sectors_of_its_miner(
    known: SectorFile, facts: Facts | None, size: int
) -> None:
    guess = told([(file(1), None), (known, facts)])
    assert guess.size(file(1)) == size
    assert guess.size(file(7, FileType.UNSEALED)) == size
    assert guess.size(file(7, FileType.CACHE)) == 0
    assert guess.size(file(7, FileType.PIECE)) == 0


def test_one_known_file_among_many_is_found_when_it_is_looked_for_near() -> None:
    files: list[tuple[SectorFile, Facts | None]] = [(file(one), None) for one in range(10_000)]
    files[9_999] = (file(9_999), Facts(2048, 1))
    guess = told(files)
    assert guess.size(file(9_999, FileType.UNSEALED)) == 2048  # its own sector tells
    assert guess.size(file(5)) == 2048  # and then its miner is known for good


def test_a_miner_of_whom_nothing_is_known_is_looked_at_again_later() -> None:
    now = [0.0]
    catalog = catalog_of((file(1), None))
    guess = Guesses(catalog, usual=32 * GIB, now=lambda: now[0])
    assert guess.size(file(1)) == 32 * GIB
    declared = (Declaration(file(2), StorageID("a"), True, Facts(2048, 1)),)
    catalog.apply(Changes(epoch="e", seq=2, declared=declared), 1, 1.0)
    assert guess.size(file(1)) == 32 * GIB
    now[0] = guesses.ASK_AGAIN
    assert guess.size(file(1)) == 2048


def test_miners_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "MAX_MINERS", 3)
    guess = told([(file(1, miner=miner), Facts(2048, 1)) for miner in range(1, 11)])
    for _ in range(2):
        for miner in range(1, 11):
            assert guess.size(file(2, miner=miner)) == 2048
    assert len(guess._known) == 3
