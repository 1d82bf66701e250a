"""Columns: memory that is given back, chunks that stay small, and what the machine cannot see."""

from __future__ import annotations

import random

import pytest

from sectorfs.index import columns
from sectorfs.index.codes import Codes, Row
from sectorfs.index.columns import FULL, Column
from sectorfs.index.names import Sectors
from sectorfs.types import FileType, SectorID, StorageID
from tests.index_fixtures import directory, file, held


def row(codes: Codes, storage: str = "a", mtime_ns: int = 5, name: str = "p_aux") -> Row:
    facts = directory(name, "t_aux", mtime_ns=mtime_ns)
    return codes.row(held(storage, file(1, FileType.CACHE), facts=facts))


def filled(count: int) -> tuple[Codes, Column]:
    codes = Codes()
    column = Column(codes)
    numbers = list(range(count))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        assert column.put((1000, number), row(codes, mtime_ns=number))
    return codes, column


def test_a_row_in_the_middle_moves_one_chunk_only() -> None:
    codes, column = filled(5 * FULL)
    sizes = [len(chunk) for chunk in column._chunks]
    assert max(sizes) <= FULL
    assert min(sizes) >= FULL // 2 - 1
    before = list(column._chunks)
    assert column.put((1000, 2 * FULL), row(codes, storage="b"))
    assert sum(one is other for one, other in zip(before, column._chunks, strict=True)) == len(
        before
    )
    assert len(column.rows((1000, 2 * FULL))) == 2
    assert column.count == 5 * FULL


def test_times_that_are_not_wanted_any_more_are_thrown_away() -> None:
    codes, column = filled(100)
    [chunk] = column._chunks
    for turn in range(1000):
        column.put((1000, turn % 100), row(codes, mtime_ns=1000 + turn))
    assert len(chunk._times) <= 2 * 2 * len(chunk) + 2
    for number in range(99):
        column.drop((1000, number), 0)
    assert len(chunk._times) <= 6
    assert [one[2] for one in column.rows((1000, 99))] == [1999]
    assert column.put((1000, 99), row(codes, mtime_ns=7))
    assert not column.put((1000, 99), row(codes, mtime_ns=7))


def test_shapes_are_forgotten_with_their_last_row() -> None:
    codes = Codes()
    column = Column(codes)
    for turn in range(1000):
        column.put((1000, turn % 3), row(codes, name=f"a{turn}"))
    assert len(codes.shapes) < 10
    for number in range(3):
        assert column.drop((1000, number), 0)
        assert not column.drop((1000, number), 0)
    assert not any(codes.shapes)
    assert (column.count, column._chunks, column._firsts) == (0, [], [])


def test_sector_with_more_declarations_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "FULL", 4)
    codes = Codes()
    column = Column(codes)
    for number in (1, 2, 3):
        for storage in range(9):
            column.put((1000, number), row(codes, storage=f"s{storage}"))
    assert [len(column.rows((1000, number))) for number in (1, 2, 3)] == [9, 9, 9]
    assert [len(chunk) for chunk in column._chunks] == [9, 9, 9]
    assert list(column.names()) == [SectorID(1000, number) for number in (1, 2, 3)]


def test_names_are_a_sequence() -> None:
    codes, column = filled(3 * FULL)
    names = column.names()
    assert names is column.names()
    assert len(names) == 3 * FULL
    assert names[0] == SectorID(1000, 0)
    assert names[-1] == names[3 * FULL - 1] == SectorID(1000, 3 * FULL - 1)
    assert names[-2:] == (SectorID(1000, 3 * FULL - 2), SectorID(1000, 3 * FULL - 1))
    assert names[5:1:-2] == (SectorID(1000, 5), SectorID(1000, 3))
    assert names[10**9 :] == ()
    assert SectorID(1000, 7) in names
    for position in (3 * FULL, -3 * FULL - 1):
        with pytest.raises(IndexError):
            names[position]
    column.put((1, 1), row(codes))
    assert len(names) == 3 * FULL
    assert column.names()[0] == SectorID(1, 1)


def test_no_names() -> None:
    names = Sectors([])
    assert (len(names), list(names), names[:3]) == (0, [], ())
    with pytest.raises(IndexError):
        names[0]


def test_storages_keep_their_numbers() -> None:
    codes = Codes()
    a, b = codes.storage(StorageID("a")), codes.storage(StorageID("b"))
    assert codes.storage(StorageID("a")) == a != b
    assert (codes.known(StorageID("b")), codes.known(StorageID("c"))) == (b, None)
