"""Remote files that are open: sessions, what they keep, the copies they become, and their ends."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sectorfs.config import FetchConfig
from sectorfs.errors import DiskFull, NoSource, NotFound, Stale
from sectorfs.stores import copies as copies_module
from sectorfs.stores import fetch_rules, fills, streams
from sectorfs.stores.blocks import PIECE
from sectorfs.stores.cache_room import CacheRoom
from sectorfs.stores.copies import Copies
from sectorfs.stores.protocol import OpenFile, StreamFile
from sectorfs.types import FileType
from sectorfs.wire.messages import Reply, Request, text_reply
from tests.local_fixtures import put, until
from tests.test_remote import CACHE, SEALED, Peer, World, facts_of, sector_file, world
from tests.wire_fixtures import fds_return_to, octets, open_fds

SIZE = 40 * PIECE + 777
DATA = random.Random(7).randbytes(SIZE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are large, few bytes are many, and nothing lingers for long."""
    monkeypatch.setattr(fetch_rules, "SMALL", PIECE)
    monkeypatch.setattr(fetch_rules, "FILL_AFTER", SIZE * 2)
    monkeypatch.setattr(fetch_rules, "FILL_SHARE", 2)
    monkeypatch.setattr(streams, "KEEP_FROM", 4 * PIECE)
    monkeypatch.setattr(streams, "LINGER", 0.05)


async def opened(w: World, number: int = 7, member: str | None = None) -> StreamFile:
    file = CACHE if member is not None else sector_file(number=number)
    found = await w.store.open(file, member)
    assert not isinstance(found, OpenFile)
    return found


async def read(file: StreamFile, at: int, size: int) -> bytes:
    with trio.fail_after(20):
        return bytes(await file.read(at, size))


def asked(peer: Peer) -> list[str]:
    return [line for line in peer.asked if line.startswith("GET")]


async def ended(w: World) -> None:
    await until(lambda: not w.store.is_busy(SEALED))


async def test_an_open_proves_that_the_file_can_be_had(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED, DATA)
        assert w.store.is_streamed(SEALED, None)
        file = await opened(w)
        assert (file.size, file.mtime_ns) == (facts.size, facts.mtime_ns)
        assert file.storage == peer.storage
        assert file.path == f"{peer.url}/{SEALED}"
        assert len(peer.asked) == 1
        assert await read(file, 0, 100) == DATA[:100]
        assert await read(file, SIZE - 5, 100) == DATA[-5:]
        assert await read(file, SIZE, 100) == b""
        assert len(peer.asked) == 2
        assert w.store.state(SEALED) == "partial"
        assert w.store.present(SEALED, None) == PIECE + SIZE % PIECE
        assert w.store.fetches() == []
        assert w.fetching() == [], "a few kilobytes stay in memory"
        file.close()
        file.close()
        await ended(w)
        assert w.store.state(SEALED) == "remote"


async def test_what_cannot_be_had_cannot_be_opened(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)

        async def missing(request: Request) -> Reply:
            return text_reply(404, "no such file")

        peer.instead = missing
        with pytest.raises(NoSource, match="no such file"):
            await w.store.open(SEALED)
        assert not w.store.is_busy(SEALED)
        peer.instead = None
        file = await opened(w)
        file.close()


async def test_readers_share_a_session(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        peer.gate = trio.Event()
        files: list[StreamFile] = []

        async def one() -> None:
            files.append(await opened(w))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
            await until(lambda: peer.waiting == 1)
            peer.gate.set()
        assert len(peer.asked) == 1
        for file in files:
            assert await read(file, 3 * PIECE, 10) == DATA[3 * PIECE : 3 * PIECE + 10]
        assert len(peer.asked) == 2
        for file in files[1:]:
            file.close()
        assert await read(files[0], 3 * PIECE, 10) == DATA[3 * PIECE : 3 * PIECE + 10]
        files[0].close()


async def test_a_cancelled_open_leaves_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        before = open_fds()
        peer.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.store.open, SEALED)
            await until(lambda: peer.waiting == 1)
            nursery.cancel_scope.cancel()
        assert not w.store.is_busy(SEALED)
        peer.gate.set()
        await fds_return_to(before)
        peer.gate = None
        (await opened(w)).close()


async def test_a_file_whose_half_was_read_becomes_a_copy(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED, DATA)
        file = await opened(w)
        for piece in range(1, 22):
            await read(file, piece * PIECE, 10)
        await w.until_declared(SEALED, facts)
        assert w.store.state(SEALED) == "cached"
        assert facts_of(w.copies.path_of(SEALED)) == facts
        assert w.fetching() == []
        other = await opened(w)  # as long as somebody streams it
        asked_before = len(peer.asked)
        assert await read(other, 0, SIZE) == DATA
        assert len(peer.asked) == asked_before
        for one in (file, other):
            one.close()
        await ended(w)
        assert await w.read() == DATA
        assert len(peer.asked) == asked_before


async def test_nobody_reads_all_of_it_and_no_copy_is_made(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        unsealed = sector_file(FileType.UNSEALED)
        await w.hold(peer, SEALED, DATA)
        await w.hold(peer, unsealed, DATA)
        few = await opened(w)
        for piece in range(10):
            await read(few, piece * PIECE, 10)
        streamed = await w.store.open(unsealed)
        assert not isinstance(streamed, OpenFile)
        assert bytes(await streamed.read(0, SIZE - 1)) == DATA[:-1]
        await wait_all_tasks_blocked()
        assert w.store.fetches() == []
        assert await w.declared(SEALED) is None
        for file in (few, streamed):
            file.close()


async def test_members_that_only_sealing_reads_are_not_filled(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, CACHE, {"sc-02-data-layer-1.dat": DATA, "p_aux": b"aux"})
        file = await opened(w, member="sc-02-data-layer-1.dat")
        for piece in range(30):
            at = piece * PIECE
            assert await read(file, at, 10) == DATA[at : at + 10]
        await wait_all_tasks_blocked()
        assert w.store.fetches() == []
        assert w.store.present(CACHE, "sc-02-data-layer-1.dat") is not None
        assert w.store.present(CACHE, "p_aux") is None
        file.close()


async def test_what_came_is_gone_on_with_after_a_pause_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_rules, "FILL_SHARE", 1)
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        file = await opened(w)
        for piece in range(10):
            await read(file, piece * PIECE, 10)
        await until(lambda: len(w.fetching()) == 2)
        file.close()
        await ended(w)
        assert w.store.state(SEALED) == "partial"
        before = len(peer.asked)
        again = await opened(w)
        await until(lambda: (w.store.present(SEALED, None) or 0) >= 10 * PIECE)
        assert await read(again, 0, 10 * PIECE) == DATA[: 10 * PIECE]
        assert len(peer.asked) <= before + 1
        again.close()
        await ended(w)
        after = Copies(w.copies.root, w.copies.storage, w.copies.lane)
        assert await after.clear_leftovers() == 0
        assert after.has_partial(SEALED, None)


async def test_what_is_here_is_read_though_all_sources_are_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_rules, "FILL_SHARE", 1)
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        file = await opened(w)
        for piece in range(10):
            await read(file, piece * PIECE, 10)
        file.close()
        await ended(w)
        peer.root.rename(tmp_path / "gone")
        file = await opened(w)
        assert await read(file, PIECE, 10) == DATA[PIECE : PIECE + 10]
        with pytest.raises(NoSource):
            await read(file, 30 * PIECE, 10)
        file.close()


async def test_a_fetch_makes_a_copy_and_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fills, "PROGRESS_SECONDS", 0.01)
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED, DATA)
        peer.gate = trio.Event()
        told: list[int] = []

        async def fetch() -> None:
            await w.store.fetch(SEALED, progress=told.append)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            await until(lambda: len(told) > 2)
            [listed] = w.store.fetches()
            assert (listed.file, listed.member, listed.size) == (SEALED, None, SIZE)
            peer.gate.set()
        assert told[-1] == SIZE
        assert sorted(told) == told
        await w.until_declared(SEALED, facts)
        assert await w.read() == DATA
        before = len(peer.asked)
        await w.store.fetch(SEALED)
        assert len(peer.asked) == before


async def test_a_fetch_of_a_directory_brings_all_its_files(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        members = {"p_aux": b"aux", "sc-02-data-layer-1.dat": DATA, "t_aux": b"t"}
        facts = await w.hold(peer, CACHE, members)
        await w.store.fetch(CACHE)
        await w.until_declared(CACHE, facts)
        assert facts_of(w.copies.path_of(CACHE)) == facts


async def test_a_fetch_ends_with_those_who_asked_for_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        peer.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.store.fetch, SEALED)
            nursery.start_soon(w.store.fetch, SEALED)
            await until(lambda: peer.waiting > 0)
            assert len(w.store.fetches()) == 1
            nursery.cancel_scope.cancel()
        await until(lambda: w.store.fetches() == [])
        peer.gate.set()
        await ended(w)
        peer.gate = None
        await w.store.fetch(SEALED)


async def test_a_fetch_says_why_it_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        with pytest.raises(NotFound):
            await w.store.fetch(sector_file(number=9))
        peer.root.rename(tmp_path / "gone")
        with pytest.raises(NoSource, match="no source can give it"):
            await w.store.fetch(SEALED)
        assert "no copy of it is made" in caplog.text


async def test_without_room_it_is_read_from_memory_and_no_copy_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies_module, "ROOM_LEFT", 1 << 62)
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        file = await opened(w)
        for at in range(0, SIZE, 3 * PIECE):
            assert await read(file, at, 3 * PIECE) == DATA[at : at + 3 * PIECE]
        assert "read without being kept" in caplog.text
        assert w.fetching() == []
        with pytest.raises(DiskFull):
            await w.store.fetch(SEALED)
        file.close()


@pytest.mark.parametrize("may", [True, False])
async def test_what_is_only_read_grows_within_the_limits_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, may: bool
) -> None:
    asked_for: list[int] = []

    async def grow(self: CacheRoom, size: int) -> bool:
        asked_for.append(size)
        return may

    monkeypatch.setattr(CacheRoom, "grow", grow)
    monkeypatch.setattr(streams, "ROOM_STEP", 8 * PIECE)
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        unsealed = sector_file(FileType.UNSEALED)
        await w.hold(peer, unsealed, DATA)
        file = await w.store.open(unsealed)
        assert not isinstance(file, OpenFile)
        for at in range(0, 36 * PIECE, PIECE):
            assert await read(file, at, PIECE) == DATA[at : at + PIECE]
            await trio.testing.wait_all_tasks_blocked()
        assert set(asked_for) == {8 * PIECE}
        assert len(asked_for) > 1 if may else len(asked_for) == 1
        assert ("no room for more of it" in caplog.text) is not may
        file.close()


async def test_the_cache_path_going_away_does_not_end_the_reading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        (w.cache / "sectorstore.json").rename(tmp_path / "away")
        file = await opened(w)
        assert await read(file, 0, SIZE) == DATA
        await until(lambda: "the cache path is gone" in caplog.text)
        assert await read(file, 0, SIZE) == DATA
        file.close()


async def test_content_that_changed_is_stale_for_its_readers_and_new_for_the_next(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA, age=1000)
        file = await opened(w)
        new = DATA[::-1]
        facts = facts_of(put(peer.root, SEALED, new, age=10))
        with pytest.raises(Stale):
            await read(file, 30 * PIECE, 10)
        with pytest.raises(Stale):
            await w.store.open(SEALED)
        await w.declare(peer, SEALED, facts)
        other = await opened(w)
        assert await read(other, 30 * PIECE, 10) == new[30 * PIECE : 30 * PIECE + 10]
        with pytest.raises(Stale):
            await read(file, 0, 10)
        for one in (file, other):
            one.close()


async def test_a_source_that_is_another_file_than_declared_is_never_believed(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, "a", "b") as w:
        first, second = w.peers.values()
        facts = await w.hold(first, SEALED, DATA, age=1000)
        put(second.root, SEALED, bytes(SIZE), age=10)
        await w.declare(second, SEALED, facts)
        file = await opened(w)
        assert await read(file, 0, SIZE) == DATA
        file.close()


async def test_nodes_without_ranges_give_whole_files(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED, DATA)

        async def whole(request: Request) -> Reply:
            return octets(DATA)

        peer.instead = whole
        assert await w.read() == DATA
        await w.until_declared(SEALED, facts)
        other = sector_file(number=8)
        await w.hold(peer, other, DATA)
        await w.store.fetch(other)


async def test_a_policy_may_ask_for_whole_files(tmp_path: Path) -> None:
    async with with_policy(tmp_path, {"sealed": "open"}) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        assert not w.store.is_streamed(SEALED, None)
        assert await w.read() == DATA
        assert asked(peer) == ["GET /sealed/s-t01000-7"]


@asynccontextmanager
async def with_policy(tmp_path: Path, policy: dict[str, str]) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("tests.test_remote.FetchConfig", lambda: FetchConfig(policy))  # type: ignore[arg-type]  # one of them
        yield await stack.enter_async_context(world(tmp_path))


async def test_the_end_of_the_node_closes_every_file(tmp_path: Path) -> None:
    before = open_fds()
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)
        files = [await opened(w) for _ in range(3)]
        for piece in range(10):
            await read(files[0], piece * PIECE, 10)
        await until(lambda: len(w.fetching()) == 2)
        files[0].close()
        files[1].close()
    files[2].close()
    await fds_return_to(before)


@pytest.mark.parametrize("fault", [KeyError("lost"), DiskFull("no room", "cache")])
async def test_a_copy_that_cannot_be_put_into_place_is_read_all_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await w.hold(peer, SEALED, DATA)

        async def fail(*_: object) -> None:
            raise fault

        monkeypatch.setattr(Copies, "finish", fail)
        file = await opened(w)
        assert await read(file, 0, SIZE) == DATA
        await until(lambda: "no copy" in caplog.text or "without being kept" in caplog.text)
        assert await read(file, 5, 10) == DATA[5:15]
        file.close()
        assert await w.declared(SEALED) is None
