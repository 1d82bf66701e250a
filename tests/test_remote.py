"""Opening sector files wherever they lie: real paths, a real cache path, peers on real sockets."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from sectorfs.config import FetchConfig, TimeoutsConfig
from sectorfs.errors import DiskFull, NoSource, NotFound, StorageUnavailable
from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import Declaration, FsStat, LocationKey, StorageInfo
from sectorfs.server.routes import make_handler
from sectorfs.stores import copies as copies_module
from sectorfs.stores import metadata, places
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.manifest_store import ManifestStore
from sectorfs.stores.protocol import OpenFile, StreamFile
from sectorfs.stores.remote import RemoteStore
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from sectorfs.wire import tokens
from sectorfs.wire.client import Client
from sectorfs.wire.messages import Gone, Reply, Request, text_reply
from tests.local_fixtures import FAST, SwitchedIndex, make_path, put, switched_index, until
from tests.wire_fixtures import FolderFiles, octets, open_fds, running

SECRET = tokens.new_secret()
OWN = "http://127.0.0.1:1/remote"
TIMEOUTS = TimeoutsConfig(connect=1, first_byte=0.5, progress=0.5, disk=5)
CUTOFF = 50.0
DATA = bytes(range(256)) * 400
OLD_NS = 1_600_000_000_123_456_789


def sector_file(file_type: FileType = FileType.SEALED, number: int = 7) -> SectorFile:
    return SectorFile(file_type, SectorID(1000, number))


SEALED = sector_file()
CACHE = sector_file(FileType.CACHE)


class Peer:
    """Another node, over a directory, that can wait, fail and lie."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.storage = StorageID(name)
        self.manifests = ManifestStore(root.with_name(f"{name}-manifests"), deadline=5)
        self.url = ""
        self.asked: list[str] = []
        """Method and path of each request."""
        self.gate: trio.Event | None = None
        self.waiting = 0
        """Requests before the gate."""
        self.instead: Callable[[Request], Awaitable[Reply | None]] | None = None
        """Answers in its place, unless with None."""
        self._real = make_handler(
            FolderFiles(root, storage=name),
            secret=SECRET,
            rpc=_no_rpc,
            health=dict,
            status=str,
            deadline=5,
            manifests=self.manifests,
        )

    async def handle(self, request: Request) -> Reply:
        self.asked.append(f"{request.method} {request.path.removeprefix('/remote')}")
        if self.gate is not None:
            self.waiting += 1
            try:
                await self.gate.wait()
            finally:
                self.waiting -= 1
        reply = await self.instead(request) if self.instead is not None else None
        return await self._real(request) if reply is None else reply

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with running(self.handle) as port:
            self.url = f"http://127.0.0.1:{port}/remote"
            yield


async def _no_rpc(body: bytes, allowed: frozenset[str], *, gone: Gone) -> tuple[int, bytes]:
    raise AssertionError("peers are not asked over RPC")


class World:
    """A node's stores, its Index, and peers."""

    def __init__(self, index: SwitchedIndex, root: Path, peers: list[Peer]) -> None:
        self.index = index
        self.root = root
        self.peers = {peer.storage: peer for peer in peers}
        self.catalog = Catalog()
        self.feed = Feed(
            index,  # type: ignore[arg-type]  # a proxy of one
            self.catalog,
            heartbeat=3600,
            on_change=lambda _: None,
        )
        self.local = LocalStore(
            index,  # type: ignore[arg-type]  # a proxy of one
            urls=(OWN,),
            timeouts=TIMEOUTS,
            storage=FAST,
            heartbeat=3600,
            watch=False,
        )
        self.cache = root / "cache"
        storage = metadata.init_cache_path(str(self.cache)).storage
        self.copies = Copies(self.cache, storage, Lane(str(self.cache), deadline=5))
        self.manifests = ManifestStore(root / "own-manifests", deadline=5)
        self.fetch = FetchConfig()
        self.store: RemoteStore

    async def open(self, nursery: trio.Nursery, client: Client, parallel: int) -> None:
        self.store = RemoteStore(
            nursery=nursery,
            catalog=self.catalog,
            index=self.index,  # type: ignore[arg-type]  # a proxy of one
            local=self.local,
            peers=PeerClient(client),
            copies=self.copies,
            parallel=parallel,
            patience=0,
            cutoff=CUTOFF,
            own_urls=frozenset((OWN,)),
            fetch=self.fetch,
            manifests=self.manifests,
        )
        await self.local.attach(str(self.cache))
        for peer in self.peers.values():
            info = StorageInfo(storage=peer.storage, urls=(peer.url,), can_store=True)
            await self.index.attach(info, FsStat())
        await self.sync()

    async def sync(self) -> None:
        """Bring the catalog up to date."""
        newest = (await self.index.snapshot(limit=1)).seq
        while not self.catalog.loaded or self.catalog.seq < newest:
            await self.feed.step(wait=0)

    async def declare(
        self, peer: Peer, file: SectorFile, facts: Facts | None, *, primary: bool = True
    ) -> None:
        await self.index.declare([Declaration(file, peer.storage, primary, facts)])
        await self.sync()

    async def hold(
        self,
        peer: Peer,
        file: SectorFile,
        data: bytes | dict[str, bytes] = DATA,
        *,
        age: float = 100,
        with_facts: bool = True,
    ) -> Facts:
        """Let a peer have and declare a file."""
        facts = facts_of(put(peer.root, file, data, age=age))
        await self.declare(peer, file, facts if with_facts else None)
        return facts

    async def declared(self, file: SectorFile) -> Declaration | None:
        """What the cache path declared of a file."""
        found = await self.index.index.sector(file.sector)
        return next(
            (one for one in found if (one.file, one.storage) == (file, self.copies.storage)), None
        )

    async def until_declared(self, file: SectorFile, facts: Facts) -> None:
        """A copy is told to the Index behind its readers' backs."""

        async def told() -> bool:
            declaration = await self.declared(file)
            return declaration is not None and declaration.facts == facts

        await until(told)
        declaration = await self.declared(file)
        assert declaration is not None
        assert not declaration.primary
        await self.sync()

    async def read(self, file: SectorFile = SEALED, member: str | None = None) -> bytes:
        return read_all(await self.store.open(file, member))

    def fetching(self) -> list[str]:
        """What lies below ``fetching``."""
        return sorted(
            str(path.relative_to(self.cache))
            for path in self.cache.glob("*/fetching/**/*")
            if path.is_file()
        )


def read_all(opened: OpenFile | StreamFile) -> bytes:
    """The bytes of an open file on this node, which is closed."""
    assert isinstance(opened, OpenFile)
    try:
        with opened.descriptor as fd:
            assert os.fstat(fd).st_size == opened.size
            return os.pread(fd, opened.size + 1, 0)
    finally:
        opened.close()


def facts_of(path: Path) -> Facts:
    found = path.stat()
    if not path.is_dir():
        return Facts(found.st_size, found.st_mtime_ns)
    members = tuple(
        MemberFacts(one.name, one.stat().st_size, one.stat().st_mtime_ns)
        for one in sorted(path.iterdir())
    )
    return Facts(sum(one.size for one in members), found.st_mtime_ns, members)


@asynccontextmanager
async def world(tmp_path: Path, *names: str, parallel: int = 8) -> AsyncIterator[World]:
    """Stores with peers of these names; without names one peer."""
    async with AsyncExitStack() as stack:
        stack.enter_context(trio.fail_after(60))
        index = await stack.enter_async_context(switched_index(tmp_path))
        peers = []
        for name in names or ("a",):
            (tmp_path / name).mkdir()
            peers.append(Peer(tmp_path / name, name))
            await stack.enter_async_context(peers[-1].serving())
        token = tokens.sign(SECRET, ("read",))
        client = await stack.enter_async_context(Client(TIMEOUTS, token=token))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        made = World(index, tmp_path, peers)
        stack.callback(made.local.close)
        await made.open(nursery, client, parallel)
        yield made


# --- a copy comes ---


@pytest.mark.parametrize("data", [DATA, b""], ids=["full", "empty"])
async def test_file_of_a_peer_is_fetched_once_and_declared(tmp_path: Path, data: bytes) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED, data)
        assert w.store.state(SEALED) == "remote"
        opened = await w.store.open(SEALED)
        assert (opened.size, opened.mtime_ns) == (facts.size, facts.mtime_ns)
        assert opened.storage == w.copies.storage
        assert read_all(opened) == data
        assert facts_of(w.copies.path_of(SEALED)) == facts
        await w.until_declared(SEALED, facts)
        assert w.store.state(SEALED) == "cached"
        assert await w.read() == data
        assert peer.asked == ["GET /sealed/s-t01000-7"]
        assert w.fetching() == []
        assert w.store.fetches() == []


async def test_local_file_is_opened_in_place(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)
        path = tmp_path / "disk"
        storage = make_path(path)
        put(path, SEALED, b"local")
        await w.local.attach(str(path))
        await w.sync()
        opened = await w.store.open(SEALED)
        assert (opened.storage, opened.path) == (storage, str(path / str(SEALED)))
        assert read_all(opened) == b"local"
        assert w.store.state(SEALED) == "local"
        assert peer.asked == []


async def test_local_file_that_vanished_is_had_from_a_peer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        path = tmp_path / "disk"
        make_path(path)
        put(path, SEALED, DATA)
        await w.local.attach(str(path))
        await w.hold(peer, SEALED)
        (path / str(SEALED)).unlink()
        assert await w.read() == DATA
        assert "cannot be read" in caplog.text
        (w.cache / "sealed").rename(w.cache / "moved")
        peer.root.rename(tmp_path / "moved")
        with pytest.raises(NoSource) as caught:
            await w.store.open(SEALED)
        assert len(caught.value.causes) == 2, "the local failure is told as well"


async def test_a_path_that_is_away_is_named_when_nobody_else_has_the_file(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        path = tmp_path / "disk"
        make_path(path)
        put(path, SEALED, DATA)
        await w.local.attach(str(path))
        await w.sync()
        next(local for local in w.local.paths() if local.path == str(path)).fail(
            StorageUnavailable("read: no answer within 15 s", path)
        )
        with pytest.raises(NoSource, match="no answer within 15 s") as caught:
            await w.store.open(SEALED)
        assert str(path) in caught.value.hint


async def test_path_of_both_nodes_is_shared(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        path = tmp_path / "disk"
        storage = make_path(path)
        put(path, SEALED, b"shared")
        await w.local.attach(str(path))
        info = StorageInfo(storage=storage, urls=(peer.url,), can_store=True)
        await w.index.attach(info, FsStat())
        await w.sync()
        assert w.store.state(SEALED) == "shared"
        assert await w.read() == b"shared"
        assert peer.asked == []


async def test_unknown_names_are_not_found(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)
        await w.hold(peer, CACHE, {"p_aux": b"x"})
        for file, member in (
            (sector_file(number=8), None),
            (CACHE, "t_aux"),
            (CACHE, "../p_aux"),
            (CACHE, None),
            (SEALED, "p_aux"),
        ):
            with pytest.raises(NotFound):
                await w.store.open(file, member)
        assert w.store.state(sector_file(number=8)) == "unavailable"
        assert peer.asked == []


# --- one flight ---


async def test_many_readers_share_one_flight(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)
        peer.gate = trio.Event()
        done: list[bytes] = []

        async def reader() -> None:
            done.append(await w.read())

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(reader)
            await until(lambda: peer.waiting == 1)
            [fetch] = w.store.fetches()
            assert (fetch.file, fetch.member, fetch.size) == (SEALED, None, len(DATA))
            assert (fetch.source, fetch.done) == (peer.url, 0)
            assert w.store.state(SEALED) == "partial"
            peer.gate.set()
        assert done == [DATA] * 20
        assert len(peer.asked) == 1


async def test_flight_goes_on_while_anybody_waits_and_ends_with_the_last(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)
        peer.gate = trio.Event()
        before = open_fds()
        scopes = [trio.CancelScope() for _ in range(3)]

        async def reader(scope: trio.CancelScope) -> None:
            with scope:
                await w.store.open(SEALED)

        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(reader, scope)
            await until(lambda: peer.waiting == 1)
            assert w.fetching() == ["sealed/fetching/s-t01000-7"]
            for scope in scopes[:2]:
                scope.cancel()
            await until(lambda: all(scope.cancelled_caught for scope in scopes[:2]))
            assert len(w.store.fetches()) == 1
            scopes[2].cancel()
        await until(lambda: not w.store.fetches())
        assert w.fetching() == []
        peer.gate.set()
        await until(lambda: open_fds() == before)
        assert await w.declared(SEALED) is None
        peer.gate = None
        assert await w.read() == DATA


async def test_reader_who_comes_while_a_flight_is_given_up_gets_one_of_its_own(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)
        peer.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.store.open, SEALED)
            await until(lambda: peer.waiting == 1)
            nursery.cancel_scope.cancel()
        assert [fetch.file for fetch in w.store.fetches()] == [SEALED], "it still cleans up"
        peer.gate = None
        assert await w.read() == DATA
        assert len(peer.asked) == 2


async def test_bound_on_fetches_of_one_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "READS", 0)
    async with world(tmp_path, parallel=2) as w:
        [peer] = w.peers.values()
        files = [sector_file(number=number) for number in range(6)]
        for file in files:
            await w.hold(peer, file, b"x" * 10)
        peer.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            for file in files:
                nursery.start_soon(w.read, file)
            await until(lambda: len(w.store.fetches()) == 6 and peer.waiting == 2)
            peer.gate.set()
        assert len(peer.asked) == 6


# --- sources that fail ---


async def missing(request: Request) -> Reply:
    return text_reply(404, "no such file")


async def broken(request: Request) -> Reply:
    return text_reply(500, "broken")


async def away(request: Request) -> Reply:
    return text_reply(503, "the disk does not answer")


async def unauthorised(request: Request) -> Reply:
    return text_reply(401, "no")


async def short(request: Request) -> Reply:
    return octets(DATA[:-1])


async def long(request: Request) -> Reply:
    return octets(DATA + b"x")


async def page(request: Request) -> Reply:
    return Reply(200, (("content-type", "text/html"),), DATA)


async def silent(request: Request) -> Reply:
    await trio.sleep_forever()
    raise AssertionError


async def crash(request: Request) -> Reply:
    raise ConnectionError("gone")


FAILURES = [missing, broken, away, unauthorised, short, long, page, silent, crash]


@pytest.mark.parametrize("failure", FAILURES)
async def test_next_source_is_asked_when_one_fails(
    tmp_path: Path,
    failure: Callable[[Request], Awaitable[Reply]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with world(tmp_path, "a", "b") as w:
        first, second = w.peers.values()
        eight = sector_file(number=8)
        for file, data in ((SEALED, DATA), (eight, b"eight")):
            for peer in (first, second):
                os.utime(put(peer.root, file, data), ns=(OLD_NS, OLD_NS))
                await w.declare(peer, file, Facts(len(data), OLD_NS))
        first.instead = failure
        assert await w.read() == DATA
        assert (len(first.asked), len(second.asked)) == (1, 1)
        assert f"source {first.url} failed" in caplog.text
        assert w.fetching() == []
        first.instead = None
        await w.read(eight)
        # A peer that lacks one file is not ill; any other failure puts it behind for a while.
        asked = first if failure is missing else second
        assert asked.asked[-1] == "GET /sealed/s-t01000-8"


async def test_peer_that_is_gone(tmp_path: Path) -> None:
    async with world(tmp_path, "a", "b") as w:
        first, second = w.peers.values()
        gone = StorageInfo(storage=first.storage, urls=("http://127.0.0.1:1/remote",))
        await w.index.detach(first.storage, first.url)
        await w.index.attach(gone, FsStat())
        await w.declare(first, SEALED, Facts(len(DATA), OLD_NS))
        held = put(second.root, SEALED, DATA)
        os.utime(held, ns=(OLD_NS, OLD_NS))
        await w.declare(second, SEALED, Facts(len(DATA), OLD_NS))
        assert await w.read() == DATA


async def test_no_source_names_every_cause(tmp_path: Path) -> None:
    async with world(tmp_path, "a", "b") as w:
        first, second = w.peers.values()
        for peer in (first, second):
            await w.hold(peer, SEALED)
        first.instead, second.instead = broken, missing
        with pytest.raises(NoSource) as caught:
            await w.store.open(SEALED)
        assert len(caught.value.causes) == 2
        for peer in (first, second):
            assert peer.url in str(caught.value)
        assert caught.value.errno == errno.EIO
        assert w.fetching() == []
        assert not w.copies.path_of(SEALED).exists()
        second.instead = None
        assert await w.read() == DATA


async def test_file_that_nobody_serves(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)
        await w.index.attach(StorageInfo(storage=StorageID("x"), urls=(OWN,)), FsStat())
        file = sector_file(number=9)
        await w.index.declare([Declaration(file, StorageID("x"), True, Facts(1, 1))])
        await w.sync()
        assert w.store.state(file) == "unavailable"
        with pytest.raises(NoSource):
            await w.store.open(file)


async def test_fault_of_ours_fails_the_open_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)

        async def fault(*_: object, **__: object) -> None:
            raise KeyError("lost")

        with monkeypatch.context() as patch:
            patch.setattr(PeerClient, "fetch", fault)
            with pytest.raises(NoSource, match="unexpected KeyError"):
                await w.store.open(SEALED)
        assert "fetch failed unexpectedly" in caplog.text
        assert w.fetching() == []
        assert await w.read() == DATA


async def test_own_disk_that_refuses_is_not_the_peers_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, "a", "b") as w:
        first, second = w.peers.values()
        for peer in (first, second):
            await w.hold(peer, SEALED)
        with monkeypatch.context() as patch:
            patch.setattr(copies_module, "ROOM_LEFT", 1 << 62)
            with pytest.raises(NoSource) as caught:
                await w.store.open(SEALED)
        assert [type(cause) for cause in caught.value.causes] == [DiskFull]
        (w.cache / "sectorstore.json").rename(tmp_path / "away")
        with pytest.raises(NoSource) as caught:
            await w.store.open(SEALED)
        assert [type(cause) for cause in caught.value.causes] == [StorageUnavailable]
        assert first.asked == second.asked == []
        (tmp_path / "away").rename(w.cache / "sectorstore.json")
        assert await w.read() == DATA


# --- the Index ---


async def test_copy_that_cannot_be_declared_is_read_and_declared_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED)
        w.index.away = True
        assert await w.read() == DATA
        await until(lambda: "not declared yet" in caplog.text)
        assert await w.read() == DATA
        assert len(peer.asked) == 1, "fetched again though it was here"
        w.index.away = False
        await w.local.redeclare(str(w.cache))
        await w.until_declared(SEALED, facts)


async def test_index_that_hangs_costs_readers_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)
        asked = trio.Event()

        async def hang(*_: object) -> None:
            asked.set()
            await trio.sleep_forever()

        w.index.index.declare = hang  # type: ignore[method-assign]  # hangs from here on
        assert await w.read() == DATA
        await asked.wait()
        assert await w.read() == DATA


# --- content that changes ---


async def test_old_copy_is_replaced_and_its_readers_keep_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        old = await w.hold(peer, SEALED, b"old content", age=1000)
        before = await w.store.open(SEALED)
        await w.until_declared(SEALED, old)
        new = await w.hold(peer, SEALED, b"new content", age=10)
        assert await w.read() == b"new content"
        assert read_all(before) == b"old content"
        await w.until_declared(SEALED, new)
        assert len(peer.asked) == 2


async def test_file_dropped_during_its_fetch_is_not_found(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED)

        async def drop(request: Request) -> None:
            await w.index.drop([LocationKey(SEALED, peer.storage)])
            await w.sync()

        peer.instead = drop  # type: ignore[assignment]  # None: the real answer follows
        with pytest.raises(NotFound, match="any more"):
            await w.store.open(SEALED)


async def test_file_that_changes_at_every_fetch_is_given_up(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED)

        async def change(request: Request) -> None:
            changed = Facts(len(DATA), facts.mtime_ns + len(peer.asked))
            await w.declare(peer, SEALED, changed)

        peer.instead = change  # type: ignore[assignment]  # None: the real answer follows
        with pytest.raises(NoSource, match="vanished as often"):
            await w.store.open(SEALED)
        assert len(peer.asked) == 3
        peer.instead = None
        await w.declare(peer, SEALED, facts)
        assert await w.read() == DATA


async def test_source_with_another_content_is_passed_over(tmp_path: Path) -> None:
    """Of the same size, so that only its time tells."""
    async with world(tmp_path, "a", "b") as w:
        first, second = w.peers.values()
        facts = await w.hold(first, SEALED)
        held = put(second.root, SEALED, DATA)
        os.utime(held, ns=(facts.mtime_ns, facts.mtime_ns))
        await w.declare(second, SEALED, facts)
        put(first.root, SEALED, bytes(len(DATA)), age=5)
        assert await w.read() == DATA


# --- directories ---

MEMBERS = {"p_aux": b"p" * 64, "sc-02-data-layer-1.dat": DATA, "t_aux": b"t" * 10}


async def test_file_of_a_directory_is_fetched_alone(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, CACHE, MEMBERS)
        opened = await w.store.open(CACHE, "p_aux")
        assert read_all(opened) == MEMBERS["p_aux"]
        member = facts.member("p_aux")
        assert member is not None
        assert opened.mtime_ns == member.mtime_ns
        assert peer.asked == ["GET /cache/s-t01000-7/files/p_aux"]
        assert await w.read(CACHE, "p_aux") == MEMBERS["p_aux"]
        assert len(peer.asked) == 1
        assert w.store.state(CACHE) == "remote"
        assert await w.declared(CACHE) is None


async def test_directory_becomes_a_copy_with_its_last_file(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, CACHE, MEMBERS)
        async with trio.open_nursery() as nursery:
            for name in MEMBERS:
                nursery.start_soon(w.read, CACHE, name)
        await w.until_declared(CACHE, facts)
        assert w.store.state(CACHE) == "cached"
        assert facts_of(w.copies.path_of(CACHE)) == facts
        assert w.fetching() == []
        peer.root.rename(tmp_path / "gone")
        for name, data in MEMBERS.items():
            assert await w.read(CACHE, name) == data
        assert len(peer.asked) == 3


async def test_directory_with_an_empty_file(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, CACHE, {"p_aux": b""})
        assert await w.read(CACHE, "p_aux") == b""
        await w.until_declared(CACHE, facts)


async def test_changed_file_of_a_directory_is_fetched_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, CACHE, MEMBERS, age=1000)
        for name in MEMBERS:
            await w.read(CACHE, name)
        await w.until_declared(CACHE, facts)
        (peer.root / str(CACHE) / "t_aux").write_bytes(b"u" * 10)
        fresh = facts_of(peer.root / str(CACHE))
        await w.declare(peer, CACHE, fresh)
        assert await w.read(CACHE, "t_aux") == b"u" * 10
        assert peer.asked[3:] == ["GET /cache/s-t01000-7/files/t_aux"]
        await w.until_declared(CACHE, fresh)
        assert facts_of(w.copies.path_of(CACHE)) == fresh


# --- nodes that tell no sizes ---


async def test_file_declared_without_facts_is_asked_for_them(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED, with_facts=False)
        assert await w.read() == DATA
        assert peer.asked == ["HEAD /sealed/s-t01000-7", "GET /sealed/s-t01000-7"]
        assert facts_of(w.copies.path_of(SEALED)) == facts
        await w.until_declared(SEALED, facts)
        assert await w.read() == DATA
        assert len(peer.asked) == 2


async def test_directory_declared_without_facts_is_listed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, CACHE, MEMBERS, with_facts=False)
        assert await w.read(CACHE, "p_aux") == MEMBERS["p_aux"]
        assert peer.asked == [
            "GET /cache/s-t01000-7/files",
            "GET /cache/s-t01000-7/files/p_aux",
        ]
        for name, data in MEMBERS.items():
            assert await w.read(CACHE, name) == data
        await w.until_declared(CACHE, facts)


async def test_end_of_the_node_ends_flights_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        async with world(tmp_path) as w, trio.open_nursery() as nursery:
            [peer] = w.peers.values()
            await w.hold(peer, SEALED)
            peer.gate = trio.Event()
            nursery.start_soon(w.store.open, SEALED)
            await until(lambda: peer.waiting == 1)
            nursery.cancel_scope.cancel()
    assert w.fetching() == []
    assert caplog.text == ""
