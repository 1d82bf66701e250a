"""Remote files whose digest is known: right bytes from whoever has them, wrong ones from nobody."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio

from sectorfs.errors import NoSource, WrongBytes
from sectorfs.index.protocol import Declaration
from sectorfs.metrics import FETCHED_BYTES
from sectorfs.stores import fetch_rules, stream, streams
from sectorfs.stores.blocks import BLOCK, PIECE
from sectorfs.stores.protocol import Checked, OpenFile, StreamFile
from sectorfs.types import Facts
from tests.local_fixtures import put, until
from tests.proving_fixtures import flipped, manifest_of, noise, prove
from tests.test_remote import CACHE, OLD_NS, SEALED, Peer, World, facts_of, read_all, world

SIZE = 9 * BLOCK + 5 * PIECE + 777
DATA = noise("sealed", SIZE)
OLDER_NS = OLD_NS - 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lingers for long."""
    monkeypatch.setattr(streams, "LINGER", 0.05)


async def held(
    w: World,
    peer: Peer,
    data: bytes,
    *,
    proved: bool = True,
    gives: bytes | None = None,
    mtime_ns: int = OLD_NS,
) -> Facts:
    """Let a peer hold a file whose digest is declared; what it gives may be other bytes.

    An older one is asked after a newer one.
    """
    path = put(peer.root, SEALED, data)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    facts = await prove(w, peer, SEALED, data, keep=proved)
    if gives is not None:
        path.write_bytes(gives)
        os.utime(path, ns=(mtime_ns, mtime_ns))
    return facts


async def opened(w: World) -> StreamFile:
    found = await w.store.open(SEALED)
    assert not isinstance(found, OpenFile)
    return found


async def read(file: StreamFile, at: int, size: int) -> bytes:
    with trio.fail_after(20):
        return bytes(await file.read(at, size))


async def test_small_reads_cost_no_more_requests_than_unproved_ones(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await held(w, peer, DATA)
        file = await opened(w)
        outlines = [line for line in peer.asked if line.endswith("/manifest")]
        assert len(outlines) == 1
        peer.asked.clear()
        for at in (3 * BLOCK + 5, 7 * BLOCK, SIZE - 10):
            assert await read(file, at, 100) == DATA[at : at + 100]
        assert peer.asked == [f"GET /{SEALED}"] * 3
        file.close()


async def test_whole_copies_are_proved_without_more_questions(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await held(w, peer, DATA)
        await w.store.fetch(SEALED)
        assert (w.cache / str(SEALED)).read_bytes() == DATA
        assert len([line for line in peer.asked if line.endswith("/manifest")]) == 1
        await w.until_declared(SEALED, facts)
        assert facts.digest == manifest_of(DATA).digest


@pytest.mark.parametrize("bit", [0, 8 * PIECE + 3, 8 * (3 * BLOCK + 12345), 8 * SIZE - 1])
async def test_no_reader_sees_a_wrong_bit(tmp_path: Path, bit: int) -> None:
    async with world(tmp_path, "a", "b") as w:
        bad, good = w.peers.values()
        await held(w, bad, DATA, gives=flipped(DATA, bit))
        await held(w, good, DATA, mtime_ns=OLDER_NS)
        file = await opened(w)
        for at in range(0, SIZE, 300_000):
            assert await read(file, at, 300_000) == DATA[at : at + 300_000]
        file.close()
        [bar] = w.store.bars()
        assert (bar.file, bar.source.storage) == (SEALED, bad.storage)
        bad.asked.clear()
        await w.store.fetch(SEALED)
        assert (w.cache / str(SEALED)).read_bytes() == DATA
        assert not bad.asked


# --- fetched whole ---

SMALL = DATA[: 3 * PIECE + 5]
FILES = {"p_aux": noise("p", 64), "sc-02-data-tree-r-last.dat": SMALL, "t_aux": noise("t", 700)}


async def held_directory(
    w: World, peer: Peer, *, proved: bool = True, gives: dict[str, bytes] | None = None
) -> Facts:
    """The same of a directory."""
    path = put(peer.root, CACHE, FILES)
    _settle(path)
    facts = await prove(w, peer, CACHE, FILES, keep=proved)
    for name, data in (gives or {}).items():
        (path / name).write_bytes(data)
    _settle(path)
    return facts


def _settle(path: Path) -> None:
    for one in (*path.iterdir(), path):
        os.utime(one, ns=(OLD_NS, OLD_NS))


async def test_a_small_file_is_proved_by_its_digest_alone(tmp_path: Path) -> None:
    async with world(tmp_path, "a", "b") as w:
        bad, good = w.peers.values()
        await held(w, bad, SMALL, gives=flipped(SMALL, 77))
        facts = await held(w, good, SMALL, mtime_ns=OLDER_NS)
        assert await w.read() == SMALL
        assert bad.asked == good.asked == [f"GET /{SEALED}"]
        [bar] = w.store.bars()
        assert bar.source.storage == bad.storage
        await w.until_declared(SEALED, msgspec.structs.replace(facts, mtime_ns=OLD_NS))


async def test_what_nobody_can_give_right_is_an_error_with_every_cause(tmp_path: Path) -> None:
    async with world(tmp_path, "a", "b") as w:
        for number, peer in enumerate(w.peers.values()):
            await held(w, peer, SMALL, gives=flipped(SMALL, number))
        with pytest.raises(NoSource) as caught:
            await w.store.open(SEALED)
        assert len(caught.value.causes) == 2
        for peer, cause in zip(w.peers.values(), caught.value.causes, strict=True):
            assert peer.url in str(cause)
            assert isinstance(cause, WrongBytes)
        assert w.fetching() == []
        assert not (w.cache / str(SEALED)).exists()


async def test_the_files_of_a_directory_are_proved_by_its_roll(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await held_directory(w, peer)
        for name, data in FILES.items():
            assert await w.read(CACHE, name) == data
        assert len([line for line in peer.asked if line.endswith("/manifest")]) == 1
        await w.until_declared(CACHE, facts)


async def test_a_wrong_file_of_a_directory_is_had_from_the_next(tmp_path: Path) -> None:
    async with world(tmp_path, "a", "b") as w:
        bad, good = w.peers.values()
        await held_directory(w, bad, gives={"t_aux": flipped(FILES["t_aux"], 9)})
        await held_directory(w, good)
        for name, data in FILES.items():
            assert await w.read(CACHE, name) == data
        assert [bar.file for bar in w.store.bars()] == [CACHE]


async def test_without_a_manifest_the_whole_is_fetched_and_proved(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await held(w, peer, DATA, proved=False)
        found = await w.store.open(SEALED)
        assert isinstance(found, OpenFile)
        assert read_all(found) == DATA
        await w.until_declared(SEALED, facts)


async def test_without_a_manifest_wrong_bytes_are_never_shown(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        await held(w, peer, DATA, proved=False, gives=flipped(DATA, 8 * SIZE - 1))
        with pytest.raises(NoSource, match="wrong bytes"):
            await w.store.open(SEALED)
        peer.asked.clear()
        with pytest.raises(NoSource, match="not asked for all of it again"):
            await w.store.open(SEALED)
        assert peer.asked.count(f"GET /{SEALED}") == 1, "its first bytes, and not all of it"


@pytest.mark.parametrize("right", [True, False])
async def test_without_a_roll_a_directory_is_proved_as_a_whole(tmp_path: Path, right: bool) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        wrong = {} if right else {"t_aux": flipped(FILES["t_aux"], 9)}
        facts = await held_directory(w, peer, proved=False, gives=wrong)
        if right:
            assert await w.read(CACHE, "p_aux") == FILES["p_aux"]
            await w.until_declared(CACHE, facts)
        else:
            with pytest.raises(NoSource, match="wrong bytes of a file"):
                await w.store.open(CACHE, "p_aux")
            assert w.fetching() == []


# --- what is said of it ---


async def test_what_was_checked_is_told(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await w.hold(peer, SEALED, SMALL)
        assert w.store.checked(SEALED, None) == Checked("length", b"")
        assert await w.read() == SMALL
        await w.until_declared(SEALED, facts)
        assert w.store.checked(SEALED, None) == Checked("length", b"")
        facts = await prove(w, peer, SEALED, SMALL)
        assert w.store.checked(SEALED, None) == Checked("length", facts.digest)
        await w.index.declare([Declaration(SEALED, w.copies.storage, False, facts)])
        await w.sync()
        assert w.store.checked(SEALED, None) == Checked("blocks", facts.digest)


async def test_the_digest_of_a_file_of_a_directory_is_told_once_it_was_asked_for(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        facts = await held_directory(w, peer)
        assert w.store.checked(CACHE, None) == Checked("blocks", facts.digest)
        assert w.store.checked(CACHE, "p_aux") == Checked("blocks", b"")
        await w.read(CACHE, "p_aux")
        found = w.store.checked(CACHE, "p_aux")
        assert found == Checked("blocks", manifest_of(FILES["p_aux"]).digest)


# --- a digest that comes later ---


async def test_who_reads_without_a_digest_goes_on_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SOURCES_SECONDS", 0)
    async with world(tmp_path, "a", "b") as w:
        bad, good = w.peers.values()
        for peer, mtime_ns in ((bad, OLD_NS), (good, OLDER_NS)):
            path = put(peer.root, SEALED, DATA)
            os.utime(path, ns=(mtime_ns, mtime_ns))
            await w.declare(peer, SEALED, facts_of(path))
        file = await opened(w)
        assert w.store.checked(SEALED, None) == Checked("length", b"")
        assert await read(file, 0, 100) == DATA[:100]
        await held(w, bad, DATA, gives=flipped(DATA, 8 * 3 * BLOCK))
        await held(w, good, DATA, mtime_ns=OLDER_NS)
        assert await read(file, 3 * BLOCK, 100) == DATA[3 * BLOCK : 3 * BLOCK + 100]
        assert [bar.source.storage for bar in w.store.bars()] == [bad.storage]
        again = await opened(w)
        assert await read(again, 0, SIZE) == DATA
        file.close()
        again.close()
        await until(lambda: not w.store.is_busy(SEALED))


async def test_a_fetch_goes_on_with_a_digest_that_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SOURCES_SECONDS", 0)
    monkeypatch.setattr(stream, "FILL_CHUNK", BLOCK)
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        path = put(peer.root, SEALED, DATA)
        os.utime(path, ns=(OLD_NS, OLD_NS))
        await w.declare(peer, SEALED, facts_of(path))
        peer.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(w.store.fetch, SEALED)
            await until(lambda: peer.waiting > 0)
            facts = await held(w, peer, DATA)
            peer.gate.set()
        assert (w.cache / str(SEALED)).read_bytes() == DATA
        await w.until_declared(SEALED, facts)


@pytest.mark.parametrize("keeps", [True, False])
async def test_what_came_without_a_digest_is_proved_before_it_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    monkeypatch.setattr(streams, "KEEP_FROM", PIECE)
    monkeypatch.setattr(fetch_rules, "FILL_SHARE", 1)
    async with world(tmp_path) as w:
        [peer] = w.peers.values()
        path = put(peer.root, SEALED, DATA)
        os.utime(path, ns=(OLD_NS, OLD_NS))
        await w.declare(peer, SEALED, facts_of(path))
        file = await opened(w)
        for at in (0, 2 * BLOCK + 3 * PIECE, 5 * BLOCK):
            assert await read(file, at, 2 * BLOCK) == DATA[at : at + 2 * BLOCK]
        file.close()
        await until(lambda: not w.store.is_busy(SEALED))
        [part] = w.cache.glob("*/fetching/*.part")
        with part.open("r+b") as raw:
            raw.seek(3 * BLOCK)
            raw.write(b"wrong")
        facts = await held(w, peer, DATA, proved=keeps)
        before = FETCHED_BYTES._value.get()
        await w.store.fetch(SEALED)
        came = FETCHED_BYTES._value.get() - before
        assert (w.cache / str(SEALED)).read_bytes() == DATA
        if keeps:
            assert came < SIZE - 4 * BLOCK, "what was right did not come again"
        await w.until_declared(SEALED, facts)
