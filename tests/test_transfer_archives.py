"""Sector directories of nodes without listings: fetched as tar, from stand-ins of those nodes."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from sectorfs.config import FetchConfig, TimeoutsConfig
from sectorfs.errors import (
    BadInput,
    DiskFull,
    NoSource,
    NotFound,
    SectorFSError,
    SourceFailed,
    TooLarge,
    Unreachable,
)
from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import Declaration, FsStat, LocationKey, SectorIndex, StorageInfo
from sectorfs.metrics import SOURCE_FAILURES
from sectorfs.stores import archives, metadata
from sectorfs.stores.archives import CacheSink, fetch_directory
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Lane
from sectorfs.stores.remote import RemoteStore
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from sectorfs.wire.client import Client
from tests.archive_fixtures import (
    COMPLETE,
    FINALIZED,
    MTIME_NS,
    READ,
    Foreign,
    foreign,
    served,
    write_directory,
)
from tests.index_fixtures import open_index
from tests.local_fixtures import make_store
from tests.tar_fixtures import stream
from tests.wire_fixtures import QUICK, FolderFiles, open_fds, peer, read_request, says, wait_until

CACHE = SectorFile(FileType.CACHE, SectorID(1000, 7))
SEALED = SectorFile(FileType.SEALED, SectorID(1000, 7))
PATH = f"/remote/{CACHE}"
TIMEOUTS = TimeoutsConfig(connect=5, first_byte=5, progress=5, disk=5)


def facts_of(files: dict[str, bytes], mtime_ns: int = MTIME_NS) -> Facts:
    members = tuple(MemberFacts(name, len(files[name]), mtime_ns) for name in sorted(files))
    return Facts(sum(len(data) for data in files.values()), mtime_ns, members)


@dataclass
class Receiver:
    """A cache path and a client, without a node."""

    copies: Copies
    peers: PeerClient

    async def fetch(self, base: str, expected: Facts | None = None) -> Facts:
        steps: list[int] = []
        facts = await fetch_directory(
            self.peers,
            CacheSink(self.copies, CACHE, late=False),
            base,
            CACHE,
            expected=expected,
            whole=False,
            proof=None,
            progress=steps.append,
        )
        assert steps == sorted(steps)
        assert facts.size == (steps[-1] if steps else 0)
        return facts

    def received(self) -> dict[str, bytes]:
        """Files in the fetching directory, unfinished ones too."""
        folder = self.copies.root / "cache/fetching" / CACHE.sector.name
        return (
            {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
        )


@asynccontextmanager
async def receiver(root: Path, *, timeouts: TimeoutsConfig = TIMEOUTS) -> AsyncIterator[Receiver]:
    storage = metadata.init_cache_path(str(root / "copies")).storage
    copies = Copies(root / "copies", storage, Lane("copies", deadline=5))
    async with Client(timeouts, token=READ) as client:
        yield Receiver(copies, PeerClient(client))


# One directory from one node


@pytest.mark.parametrize("kind", ["curio", "lotus"])
@pytest.mark.parametrize("told", [True, False])
async def test_a_finalized_directory(tmp_path: Path, kind: str, told: bool) -> None:
    node = Foreign(PATH, FINALIZED, kind)
    before = open_fds()
    async with foreign(node) as base, receiver(tmp_path) as it:
        expected = facts_of(FINALIZED, MTIME_NS + 123) if told else None
        facts = await it.fetch(base, expected)
        assert facts == (expected or facts_of(FINALIZED, facts.mtime_ns))
        assert it.received() == FINALIZED
        for member in facts.members or ():
            copy = await it.copies.open(
                CACHE, member.name, size=member.size, mtime_ns=member.mtime_ns
            )
            assert copy is not None
            copy.close()
    await wait_until(lambda: open_fds() == before)  # lanes close in threads of their own
    assert node.requests == [f"GET {PATH}{'?mincache=true' if told else ''}"]


async def test_the_first_lotus_sends_everything(tmp_path: Path) -> None:
    async with foreign(Foreign(PATH, COMPLETE, "lotus")) as base, receiver(tmp_path) as it:
        facts = await it.fetch(base)
        assert it.received() == COMPLETE
        assert [member.name for member in facts.members or ()] == sorted(COMPLETE)
        assert await it.fetch(base, facts_of(COMPLETE)) == facts_of(COMPLETE)


async def test_curio_leaves_out_what_it_does_not_know(tmp_path: Path) -> None:
    """A fetched directory is then not a copy of what was declared, and is not taken for one."""
    async with foreign(Foreign(PATH, COMPLETE)) as base, receiver(tmp_path) as it:
        with pytest.raises(SourceFailed, match=r"lacks sc-02-data-tree-c\.dat") as info:
            await it.fetch(base, facts_of(COMPLETE))
        assert info.value.thing == f"{base}/{CACHE}"
        travelled = {name: COMPLETE[name] for name in COMPLETE if "tree-c" not in name}
        assert it.received() == travelled


async def test_a_large_file_is_written_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_WRITE", 10_000)
    files = {**FINALIZED, "sc-02-data-layer-1.dat": os.urandom(100_000)}
    steps: list[int] = []
    async with foreign(Foreign(PATH, files)) as base, receiver(tmp_path) as it:
        await fetch_directory(
            it.peers,
            CacheSink(it.copies, CACHE, late=False),
            base,
            CACHE,
            expected=facts_of(files),
            whole=False,
            proof=None,
            progress=steps.append,
        )
        assert it.received() == files
        assert len(steps) > 5


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("breaks", [True, False])
async def test_a_cut_stream_is_never_a_directory(tmp_path: Path, told: bool, breaks: bool) -> None:
    """Whether the server ends the body as if all were well, or the connection with it."""
    before = open_fds()
    whole = stream(FINALIZED)
    async with receiver(tmp_path) as it:
        for cut in (0, 100, 512, 513, 600, 1024, 1536, 2047, 2048, 2100, 2560, 2600, 2659):
            node = Foreign(PATH, FINALIZED, "lotus", cut=cut, breaks=breaks)
            async with foreign(node) as base:
                with pytest.raises((SourceFailed, Unreachable)):
                    await it.fetch(base, facts_of(FINALIZED) if told else None)
            assert all(FINALIZED[name] == data for name, data in it.received().items())
        assert whole.index(b"t" * 100) + 100 > 2659
    await wait_until(lambda: open_fds() == before)  # lanes close in threads of their own


async def test_an_end_that_is_not_marked_is_believed_once_all_is_there(tmp_path: Path) -> None:
    files = {name: data for name, data in COMPLETE.items() if name != "t_aux"}
    async with foreign(Foreign(PATH, files, "lotus")) as base, receiver(tmp_path) as it:
        with pytest.raises(SourceFailed, match="no end"):
            await it.fetch(base)
    async with foreign(Foreign(PATH, files, "curio")) as base, receiver(tmp_path / "b") as it:
        assert (await it.fetch(base)).member("t_aux") is None  # marked: it has no such file


@pytest.mark.parametrize(
    ("files", "error", "text"),
    [
        ({"p_aux": b"p" * 65}, TooLarge, "at most 64"),
        ({"p_aux": b"p" * 63}, SourceFailed, "63 bytes of p_aux instead of 64"),
        ({**FINALIZED, "more": b"x"}, BadInput, "'more'"),
    ],
)
async def test_expected_facts_are_the_cap(
    tmp_path: Path, files: dict[str, bytes], error: type[Exception], text: str
) -> None:
    failures = SOURCE_FAILURES._value.get()
    async with foreign(Foreign(PATH, files, "lotus")) as base, receiver(tmp_path) as it:
        with pytest.raises(error, match=text):
            await it.fetch(base, facts_of(FINALIZED))
        assert not any(name.endswith(".tmp") for name in it.received())
    assert SOURCE_FAILURES._value.get() == failures + 1


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"p_aux": b"p" * 65}, TooLarge),
        ({"sc-02-data-tree-r-last.dat": bytes(10_000_001)}, TooLarge),
        ({"unknown": b""}, BadInput),
        ({"sc-02-data-layer-12.dat": b""}, BadInput),
    ],
)
async def test_the_list_is_the_cap_where_nothing_is_expected(
    tmp_path: Path, files: dict[str, bytes], error: type[Exception]
) -> None:
    async with foreign(Foreign(PATH, files, "lotus")) as base, receiver(tmp_path) as it:
        with pytest.raises(error):
            await it.fetch(base)
        assert it.received() == {}


async def test_a_full_cache_path_is_not_the_sources_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectorfs.stores.copies.ROOM_LEFT", 1 << 62)
    async with foreign(Foreign(PATH, FINALIZED)) as base, receiver(tmp_path) as it:
        with pytest.raises(DiskFull):
            await it.fetch(base)


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", SourceFailed, "500"),
        (b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n", NotFound, "does not have"),
        (
            b"HTTP/1.1 200 X\r\nContent-Type: text/html\r\nContent-Length: 1\r\n\r\nx",
            SourceFailed,
            "text/html",
        ),
        (b"<html>\r\n\r\n", Unreachable, "no HTTP"),
    ],
)
async def test_answers_that_are_no_directory(
    tmp_path: Path, answer: bytes, error: type[SectorFSError], text: str
) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(answer)

    async with peer(script) as url, receiver(tmp_path) as it:
        with pytest.raises(error, match=text):
            await it.fetch(f"{url}/remote")


def hostile(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 3) -> bytes:
    """A tar with one good file and then a member that no sector directory has."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in (tarfile.TarInfo("p_aux"), tarfile.TarInfo(name)):
            if entry.name == name:
                entry.type, entry.linkname = kind, link
            entry.size = size if entry.isreg() else 0
            archive.addfile(entry, io.BytesIO(b"x" * entry.size))
    return out.getvalue()


def _strangers(root: Path) -> list[Path]:
    """What no fetch should have made: links anywhere, files outside the cache path."""
    links = [path for path in root.rglob("*") if path.is_symlink()]
    outside = [path for path in root.iterdir() if path.name != "copies"]
    far = Path("/etc/sectorfs-test")
    return [*links, *outside, *([far] if far.exists() else [])]


@pytest.mark.parametrize(
    "body",
    [
        hostile("/etc/sectorfs-test"),
        hostile("../p_aux"),
        hostile("../../../sectorstore.json"),
        hostile("a/../../t_aux"),
        hostile("s-t01000-7/t_aux"),
        hostile("t_aux", tarfile.SYMTYPE, "/etc/passwd"),
        hostile("t_aux", tarfile.LNKTYPE, "p_aux"),
        hostile("t_aux", tarfile.CHRTYPE),
        hostile("t_aux", tarfile.FIFOTYPE),
        hostile("t_aux", tarfile.DIRTYPE),
        hostile("t_aux.tmp"),
        hostile("p_aux~tar.tmp"),
        hostile("t" * 300),
        hostile("t_aux", size=10_241),
        b"\xff" * 2048,
        b"<html>" * 100,
    ],
)
async def test_streams_of_hostile_peers_leave_nothing_but_known_files(
    tmp_path: Path, body: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\nContent-Length: %d\r\n\r\n"
    before = open_fds()
    async with peer(says(head % len(body) + body)) as url, receiver(tmp_path) as it:
        kept = (it.copies.root / "sectorstore.json").read_bytes()
        with pytest.raises((BadInput, SourceFailed)):
            await it.fetch(f"{url}/remote")
        assert set(it.received()) <= {"p_aux"}
        assert (it.copies.root / "sectorstore.json").read_bytes() == kept
        assert _strangers(tmp_path) == []
    await wait_until(lambda: open_fds() == before)


async def test_a_stream_that_stalls_is_given_up(tmp_path: Path) -> None:
    node = Foreign(PATH, FINALIZED, cut=600, stalls=True)
    async with foreign(node) as base, receiver(tmp_path, timeouts=QUICK) as it:
        with pytest.raises(Unreachable, match="stalled"):
            await it.fetch(base)
        assert list(it.received()) == ["p_aux"]


async def test_a_fetch_cancelled_within_a_file_leaves_no_part_of_it(tmp_path: Path) -> None:
    before = open_fds()
    node = Foreign(PATH, FINALIZED, cut=1550, stalls=True)
    async with foreign(node) as base, receiver(tmp_path) as it:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.fetch, base)
            await node.sent.wait()
            await wait_until(lambda: "sc-02-data-tree-r-last.dat~tar.tmp" in it.received())
            nursery.cancel_scope.cancel()
        assert list(it.received()) == ["p_aux"]
    await wait_until(lambda: open_fds() == before)  # lanes close in threads of their own


async def test_our_own_nodes_are_not_asked_for_a_tar_twice(tmp_path: Path) -> None:
    write_directory(tmp_path / str(CACHE), FINALIZED)
    async with served(FolderFiles(tmp_path)) as node, receiver(tmp_path) as it:
        with pytest.raises(NotFound, match="does not have a file of it"):
            await it.fetch(node.base)
        assert it.received() == {}


async def test_whether_a_range_is_unsealed(tmp_path: Path) -> None:
    unsealed = SectorFile(FileType.UNSEALED, SectorID(1000, 7))
    (tmp_path / "unsealed").mkdir()
    (tmp_path / str(unsealed)).write_bytes(bytes(2048))
    async with served(FolderFiles(tmp_path)) as node, receiver(tmp_path) as it:
        ask = it.peers.allocated
        assert await ask(node.base, unsealed, seal_proof=0, offset=0, size=2032)
        assert not await ask(node.base, unsealed, seal_proof=0, offset=1, size=2032)
        with pytest.raises(SourceFailed, match="400"):
            await ask(node.base, unsealed, seal_proof=99, offset=0, size=1)
        other = SectorFile(FileType.UNSEALED, SectorID(1000, 8))
        with pytest.raises(NotFound):
            await ask(node.base, other, seal_proof=0, offset=0, size=1)


# Opened by readers of the cluster


@dataclass
class Reader:
    """What a node reads with, without a node."""

    store: RemoteStore
    copies: Copies
    catalog: Catalog
    index: SectorIndex

    async def read(self, member: str) -> bytes:
        """Open a file of the directory and read all of it."""
        opened = await self.store.open(CACHE, member)
        try:
            with opened.descriptor as fd:
                return os.pread(fd, opened.size, 0)
        finally:
            opened.close()

    async def declare(self, base: str, storage: str, facts: Facts | None) -> None:
        """Declare the directory as another node would, and wait until it is known."""
        known = StorageID(storage)
        info = StorageInfo(storage=known, urls=(base,), can_store=True)
        await self.index.attach(info, FsStat(capacity=1))
        await self.index.declare([Declaration(CACHE, known, True, facts)])

        def seen() -> bool:
            entry = self.catalog.entry(CACHE)
            return entry is not None and any(d.storage == known for d in entry.declarations)

        await wait_until(seen)

    async def wait_for_copy(self) -> Facts:
        """Until the whole directory is declared as a copy of this node; its facts."""

        def held() -> Declaration | None:
            entry = self.catalog.entry(CACHE)
            for one in entry.declarations if entry else ():
                if one.storage == self.copies.storage:
                    return one
            return None

        await wait_until(lambda: held() is not None)
        copy = held()
        assert copy is not None
        assert copy.facts is not None
        return copy.facts


@asynccontextmanager
async def reader(root: Path) -> AsyncIterator[Reader]:
    async with (
        open_index(root / "index.db") as index,
        receiver(root) as it,
        trio.open_nursery() as nursery,
    ):
        catalog = Catalog()
        feed = Feed(index, catalog, heartbeat=3600, on_change=lambda changes: None)
        local = make_store(index)
        await local.attach(str(it.copies.root))
        store = RemoteStore(
            nursery=nursery,
            catalog=catalog,
            index=index,
            local=local,
            peers=it.peers,
            copies=it.copies,
            parallel=2,
            patience=0,
            cutoff=50,
            own_urls=frozenset({"http://127.0.0.1:8480/remote"}),
            fetch=FetchConfig(),
        )
        await nursery.start(feed.run)
        yield Reader(store, it.copies, catalog, index)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["curio", "lotus"])
@pytest.mark.parametrize("told", [True, False])
async def test_a_directory_of_another_programs_node_is_opened(
    tmp_path: Path, kind: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    node = Foreign(PATH, FINALIZED, kind)
    async with foreign(node) as base, reader(tmp_path) as it:
        await it.declare(base, "foreign", facts_of(FINALIZED) if told else None)
        for name, data in FINALIZED.items():
            assert await it.read(name) == data
        facts = await it.wait_for_copy()
        assert [(one.name, one.size) for one in facts.members or ()] == [
            (name, len(FINALIZED[name])) for name in sorted(FINALIZED)
        ]
        assert it.store.state(CACHE) == "cached"
        assert sum(f"{PATH}/files" not in request for request in node.requests) == 1
        assert "failed" not in caplog.text
        path = it.copies.path_of(CACHE)
        assert {one.name: one.read_bytes() for one in path.iterdir()} == FINALIZED


async def test_what_an_untold_directory_has_is_learnt(tmp_path: Path) -> None:
    node = Foreign(PATH, FINALIZED, "lotus")
    async with foreign(node) as base, reader(tmp_path) as it:
        await it.store.learn(CACHE)  # nobody declares it: nothing to learn
        await it.declare(base, "foreign", None)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(it.store.learn, CACHE)
        entry = it.catalog.entry(CACHE)
        assert entry is not None
        assert entry.facts is not None
        assert [one.name for one in entry.facts.members or ()] == sorted(FINALIZED)
        await it.store.learn(CACHE)
        assert node.requests == [f"GET {PATH}"]


async def test_what_cannot_be_learnt_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Foreign(PATH, {"p_aux": b"p" * 64}, "lotus")
    async with foreign(node) as base, reader(tmp_path) as it:
        await it.declare(base, "foreign", None)
        with pytest.raises(NoSource, match="no end"):
            await it.store.learn(CACHE)
        node.files = FINALIZED
        monkeypatch.setattr("sectorfs.stores.remote.LEARN_SECONDS", 0)
        with monkeypatch.context() as away:
            away.setattr(Copies, "is_received", _not_yet)
            with pytest.raises(Unreachable, match="Index does not tell"):
                await it.store.learn(CACHE)
            assert await it.read("p_aux") == FINALIZED["p_aux"]
        requests = len(node.requests)
        monkeypatch.setattr("sectorfs.stores.remote.LEARN_SECONDS", 10)
        await it.store.learn(CACHE)  # is told now, and not fetched again
        assert len(node.requests) == requests


async def test_a_learnt_directory_that_was_removed_is_learnt_again(tmp_path: Path) -> None:
    node = Foreign(PATH, FINALIZED, "lotus")
    async with foreign(node) as base, reader(tmp_path) as it:
        await it.declare(base, "foreign", None)
        await it.store.learn(CACHE)
        shutil.rmtree(it.copies.path_of(CACHE))
        await it.index.drop([LocationKey(CACHE, it.copies.storage)])

        def untold() -> bool:
            entry = it.catalog.entry(CACHE)
            return entry is not None and entry.facts is None

        await wait_until(untold)
        await it.store.learn(CACHE)
        assert not untold()
        assert len(node.requests) == 2


async def _not_yet(copies: Copies, file: SectorFile, facts: Facts) -> bool:
    await trio.lowlevel.checkpoint()
    return False


async def test_many_readers_wait_for_one_tar(tmp_path: Path) -> None:
    node = Foreign(PATH, COMPLETE, "lotus")
    async with foreign(node) as base, reader(tmp_path) as it:
        await it.declare(base, "foreign", facts_of(COMPLETE))
        found: dict[str, bytes] = {}

        async def read(name: str) -> None:
            found[name] = await it.read(name)

        async with trio.open_nursery() as nursery:
            for name in COMPLETE:
                nursery.start_soon(read, name)
        assert found == COMPLETE
        assert node.requests.count(f"GET {PATH}") == 1
        await it.wait_for_copy()


async def test_a_file_that_does_not_travel_fails_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with foreign(Foreign(PATH, COMPLETE)) as base, reader(tmp_path) as it:
        await it.declare(base, "foreign", facts_of(COMPLETE))
        assert await it.read("p_aux") == COMPLETE["p_aux"]
        with pytest.raises(NoSource, match="lacks sc-02-data-tree-c"):
            await it.read("sc-02-data-tree-c.dat")
        with pytest.raises(NotFound, match="no file 'other'"):
            await it.read("other")
    assert "lacks sc-02-data-tree-c" in caplog.text


async def test_a_file_that_no_node_of_an_untold_directory_has(tmp_path: Path) -> None:
    async with foreign(Foreign(PATH, FINALIZED)) as base, reader(tmp_path) as it:
        await it.declare(base, "foreign", None)
        with pytest.raises(NotFound, match="no file 'other'"):
            await it.read("other")
        with pytest.raises(NotFound, match="is a directory"):
            await it.store.open(CACHE)
        await it.index.declare([Declaration(SEALED, StorageID("foreign"), True, Facts(1, 1))])
        await wait_until(lambda: it.catalog.entry(SEALED) is not None)
        with pytest.raises(NotFound, match="is not a directory"):
            await it.store.open(SEALED, "p_aux")


async def test_our_own_nodes_come_first_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    write_directory(tmp_path / "own" / str(CACHE), FINALIZED)
    node = Foreign(PATH, FINALIZED)
    async with (
        foreign(node) as base,
        served(FolderFiles(tmp_path / "own")) as own,
        reader(tmp_path) as it,
    ):
        await it.declare(base, "a-foreign", None)
        await it.declare(own.base, "own", facts_of(FINALIZED))
        assert await it.read("p_aux") == FINALIZED["p_aux"]
        assert f"GET {PATH}?mincache=true" not in node.requests
        assert f"GET {PATH}" not in node.requests


async def test_the_next_source_when_a_tar_breaks_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, good = Foreign(PATH, FINALIZED, cut=1550), Foreign(PATH, FINALIZED, "lotus")
    async with foreign(broken) as one, foreign(good) as other, reader(tmp_path) as it:
        await it.declare(one, "a-broken", None)
        await it.declare(other, "b-good", None)
        assert await it.read("t_aux") == FINALIZED["t_aux"]
        await it.wait_for_copy()
    assert "tar ends" in caplog.text


async def test_a_reader_that_leaves_ends_the_tar(tmp_path: Path) -> None:
    node = Foreign(PATH, FINALIZED, cut=700, stalls=True)
    before = open_fds()
    async with foreign(node) as base, reader(tmp_path) as it:
        await it.declare(base, "foreign", facts_of(FINALIZED))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, "t_aux")
            await node.sent.wait()
            assert {flight.member for flight in it.store.fetches()} == {None, "t_aux"}
            nursery.cancel_scope.cancel()
        await wait_until(lambda: not it.store.fetches())
    await wait_until(lambda: open_fds() == before)  # lanes close in threads of their own
