"""Pages of the Index in columns: what they hold, where they end, what is refused over RPC."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from sectorfs.errors import BadInput, Unreachable
from sectorfs.index import packed_shapes, queries, shapes
from sectorfs.index.codes import Tables
from sectorfs.index.packed import Pack
from sectorfs.index.protocol import Declaration, PackedPage, SectorIndex
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from tests.index_fixtures import (
    CUTOFF,
    STAT,
    digested,
    directory,
    file,
    held,
    info,
    open_index,
    pack_of,
)

CACHE = file(3, FileType.CACHE)
EVERYTHING = [
    held("a", file(1, FileType.UNSEALED), facts=Facts(7, -5)),
    held("a", 1, facts=Facts(2**62, 2**62)),
    held("b", 1, primary=False),
    held("c", 1, facts=digested(Facts(0, 0), 1)),
    held("a", SectorFile(FileType.SEALED, SectorID(1001, 0))),
    held("a", CACHE, facts=directory("p_aux", "t_aux")),
    held("b", CACHE, facts=digested(Facts(0, 9, ()), 2)),
    held("a", file(4, FileType.CACHE), facts=directory("p_aux", "t_aux", mtime_ns=8)),
    held("c", file(4, FileType.CACHE), facts=Facts(5, 6)),
]


@pytest.fixture(params=[False, True], ids=["sqlite", "rpc"])
async def index(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[SectorIndex]:
    async with open_index(tmp_path / "index.db", over_rpc=request.param) as index:
        for name in "abc":
            await index.attach(info(name), STAT)
        yield index


def unpacked(pack: Pack) -> list[Declaration]:
    tables = Tables(pack.storages, pack.shapes)
    return [
        tables.declaration(SectorFile(file_type, SectorID(*key)), row)
        for file_type, runs in pack.runs.items()
        for key, rows in tables.files(runs).items()
        for row in rows
    ]


async def read(index: SectorIndex, limit: int) -> list[PackedPage]:
    pages = [await index.packed(limit=limit)]
    while pages[-1].after is not None:
        pages.append(await index.packed(after=pages[-1].after, limit=limit))
    return pages


async def test_empty_index_has_one_empty_page(index: SectorIndex) -> None:
    page = await index.packed()
    whole = await index.snapshot()
    assert (page.pack.runs, page.after) == ({}, None)
    assert (page.epoch, page.seq, page.storages) == (whole.epoch, whole.seq, whole.storages)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 8, 9, 10, 10_000])
async def test_pages_are_everything_in_key_order(index: SectorIndex, limit: int) -> None:
    await index.declare(EVERYTHING)
    pages = await read(index, limit)
    assert [one for page in pages for one in unpacked(page.pack)] == EVERYTHING
    assert [len(page.storages) for page in pages] == [3] + [0] * (len(pages) - 1)
    for page, after in pairwise(pages):
        assert page.after == unpacked(page.pack)[-1].file
        # All that is declared of a sector file is in one page.
        assert unpacked(after.pack)[0].file > page.after


async def test_columns_in_memory_come_to_the_same(index: SectorIndex) -> None:
    await index.declare(EVERYTHING)
    assert unpacked(pack_of(EVERYTHING)) == EVERYTHING
    assert (await index.packed()).pack.runs == pack_of(EVERYTHING).runs


@pytest.mark.parametrize("number", [-1, 2**63])
async def test_impossible_place_is_refused(index: SectorIndex, number: int) -> None:
    with pytest.raises(BadInput):
        await index.packed(after=file(number))


async def test_page_of_no_rows_is_refused(index: SectorIndex) -> None:
    with pytest.raises(BadInput):
        await index.packed(limit=0)


async def test_closed_index_gives_no_page(tmp_path: Path) -> None:
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=CUTOFF) as index:
        pass
    with pytest.raises(Unreachable):
        await index.packed()


async def test_index_closes_behind_a_page_that_is_being_read(tmp_path: Path) -> None:
    """Whoever is cancelled while a thread reads leaves nothing open."""
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=CUTOFF) as index:
        await index.attach(info("a"), STAT)
        await index.declare([held("a", number) for number in range(3000)])
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(index.packed)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()


def test_pages_are_found_by_an_index_alone(tmp_path: Path) -> None:
    """Without one each page of a million rows would be sorted anew."""

    async def make() -> None:
        async with SqliteIndex.open(tmp_path / "index.db", cutoff=CUTOFF) as index:
            await index.attach(info("a"), STAT)

    trio.run(make)
    asked: list[str] = []
    with sqlite3.connect(tmp_path / "index.db") as db:
        db.set_trace_callback(asked.append)
        queries.packed(db, None, 10)
        queries.packed(db, file(1), 10)
        queries.page(db, None, 10)
        db.set_trace_callback(None)
        for statement in asked:
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert "USING COVERING INDEX idx_sector_location_order" in plan[0]
            assert not any("TEMP B-TREE" in step or step.startswith("SCAN f") for step in plan)
    assert len(asked) == 3
    db.close()


# --- what an Index should not send ---


def shape() -> packed_shapes.PackedPageShape:
    page = PackedPage(epoch="e", seq=1, storages=(), pack=pack_of(EVERYTHING), after=CACHE)
    return packed_shapes.from_page(page)


def test_shape_and_back() -> None:
    page = packed_shapes.to_page(shape())
    assert unpacked(page.pack) == EVERYTHING
    assert page.after == CACHE


def run(number: int, **fields: Any) -> Callable[[Any], Any]:
    def spoil(page: packed_shapes.PackedPageShape) -> packed_shapes.PackedPageShape:
        runs = list(page.runs or ())
        runs[number] = msgspec.structs.replace(runs[number], **fields)
        return msgspec.structs.replace(page, runs=runs)

    return spoil


def whole(**fields: Any) -> Callable[[Any], Any]:
    return lambda page: msgspec.structs.replace(page, **fields)


PAIR = ["p_aux", "t_aux"]


@pytest.mark.parametrize(
    "spoil",
    [
        whole(seq=-1),
        whole(holders=["a", "b"]),
        whole(holders=["a", "b", "../c"]),
        whole(directories=[]),
        whole(directories=[packed_shapes.DirectoryShape(names=PAIR, sizes=[1])] * 2),
        whole(directories=[packed_shapes.DirectoryShape(names=PAIR[::-1], sizes=[1, 1])] * 2),
        whole(directories=[packed_shapes.DirectoryShape(names=PAIR, sizes=[1, -1])] * 2),
        whole(directories=[packed_shapes.DirectoryShape(names=["../x", "y"], sizes=[1, 1])] * 2),
        whole(
            directories=[
                packed_shapes.DirectoryShape(
                    names=[f"f{number:05}" for number in range(10_001)], sizes=[1] * 10_001
                )
            ]
        ),
        whole(after=shapes.FileShape(sector=shapes.SectorShape(miner=1, number=1), file_type=3)),
        whole(after=shapes.FileShape(sector=shapes.SectorShape(miner=1, number=-1), file_type=2)),
        lambda page: msgspec.structs.replace(page, runs=[*page.runs, page.runs[0]]),
        run(0, file_type=0),
        run(0, file_type=128),
        run(0, miner=-1),
        run(0, numbers=[]),
        run(0, numbers=[1, 2]),
        run(0, numbers=[-1]),
        run(0, numbers=[2**63]),
        run(0, sizes=[-1]),
        run(0, sizes=[2**63]),
        run(0, mtimes_ns=[2**63]),
        run(0, mtimes_ns=[-(2**63) - 1]),
        run(0, holders=[6]),
        run(0, holders=[-1]),
        run(0, shapes=[4]),
        run(0, shapes=[-1]),
        run(0, file_mtimes_ns=[1]),
        run(1, numbers=[1, 1, 0]),
        run(1, holders=[0, 0, 1]),
        run(1, holders=[2, 0, 4]),
        run(3, file_mtimes_ns=[1, 2, 3]),
        run(3, file_mtimes_ns=[1, 2, 3, 2**63]),
        run(3, file_mtimes_ns=None),
        run(0, digests="0a"),
        run(0, digests="0a" * 64),
        run(0, digests="0g" * 32),
        run(0, digests="0a " * 32),
        run(1, digests="00" * 32 + "0a" * 64),  # the second row tells no size
    ],
)
def test_nonsense_is_refused(spoil: Callable[[Any], Any]) -> None:
    with pytest.raises(BadInput):
        packed_shapes.to_page(spoil(shape()))


def test_sector_beyond_the_end_of_its_page_is_left_out() -> None:
    pack = pack_of(EVERYTHING)
    assert pack.between(FileType.CACHE, (1000, 3), (1000, 3)) == []
    [some] = pack.between(FileType.CACHE, None, (1000, 3))
    assert (some.numbers.tolist(), some.times.tolist()) == ([3, 3], [5, 5])
    [rest] = pack.between(FileType.CACHE, (1000, 3), (2000, 0))
    assert (rest.numbers.tolist(), rest.times.tolist()) == ([4, 4], [8, 8])
    assert [len(part) for part in pack.between(FileType.SEALED, (1000, 0), (1001, 0))] == [3, 1]
    assert [len(part) for part in pack.between(FileType.SEALED, (1000, 1), None)] == [1]


def test_facts_say_what_they_said() -> None:
    members = (MemberFacts("p_aux", 0, -1), MemberFacts("t_aux", 2**63 - 1, 2**63 - 1))
    facts = Facts(2**63 - 1, -(2**63), members)
    one = Declaration(CACHE, StorageID("a"), False, facts)
    assert unpacked(pack_of([one])) == [one]
