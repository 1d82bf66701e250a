"""Remote files whose digest is known: right bytes from whoever has them, wrong ones from nobody."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from sectorfs.stores import streams
from sectorfs.stores.blocks import BLOCK, PIECE
from sectorfs.stores.protocol import OpenFile, StreamFile
from sectorfs.types import Facts
from tests.local_fixtures import put
from tests.proving_fixtures import flipped, manifest_of, noise, prove
from tests.test_remote import OLD_NS, SEALED, Peer, World, world

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
