"""Who may lock what beside whom: the whole matrix, type by type."""

from __future__ import annotations

from itertools import product

import pytest

from sectorfs.index.locks import Counts, conflict
from sectorfs.index.protocol import Lock
from sectorfs.types import ALL_TYPES, FileType, SectorID

SECTOR = SectorID(1000, 7)
U, S, C = FileType.UNSEALED, FileType.SEALED, FileType.CACHE
MASKS = range(8)


def lock(read: int = 0, write: int = 0) -> Lock:
    return Lock(sector=SECTOR, read=read, write=write)


def excluded(held: str, wanted: str) -> bool:
    """For one type: anybody excludes a writer, a writer excludes anybody."""
    return ("w" in held and wanted != "") or ("w" in wanted and held != "")


def of_type(one: Lock, file_type: FileType) -> str:
    return ("r" if one.read & file_type else "") + ("w" if one.write & file_type else "")


@pytest.mark.parametrize(
    ("held", "wanted", "granted"),
    [
        ("", "r", True),
        ("", "w", True),
        ("", "rw", True),
        ("r", "r", True),
        ("r", "w", False),
        ("r", "rw", False),
        ("w", "r", False),
        ("w", "w", False),
        ("w", "rw", False),
        ("rw", "r", False),
        ("rw", "w", False),
    ],
)
@pytest.mark.parametrize("file_type", FileType)
def test_one_type(held: str, wanted: str, granted: bool, file_type: FileType) -> None:
    def made(letters: str) -> Lock:
        return lock(file_type * ("r" in letters), file_type * ("w" in letters))

    assert Counts.of([made(held)] if held else []).allow(made(wanted)) is granted
    assert excluded(held, wanted) is not granted


def test_every_lock_of_three_types_beside_every_other() -> None:
    for read, write in product(MASKS, MASKS):
        held = lock(read, write)
        counts = Counts.of([held])
        assert (counts.read, counts.write) == (read, write)
        for wanted in (lock(*masks) for masks in product(MASKS, MASKS)):
            free = not any(excluded(of_type(held, one), of_type(wanted, one)) for one in (U, S, C))
            assert counts.allow(wanted) is free
            assert conflict(held, wanted) is not free
            assert conflict(wanted, held) is not free


def test_every_type_is_apart_from_every_other() -> None:
    for one, other in product(FileType, FileType):
        assert conflict(lock(write=one), lock(write=other)) is (one is other)
        assert conflict(lock(write=one), lock(read=other)) is (one is other)
        assert not conflict(lock(read=one), lock(read=other))


def test_all_types_or_none() -> None:
    counts = Counts.of([lock(read=S)])
    assert not counts.allow(lock(read=U, write=S | C))
    assert counts.allow(lock(read=S, write=U | C))
    assert counts.allow(lock(read=ALL_TYPES))


def test_readers_are_counted_by_bit_position() -> None:
    counts = Counts.of(
        [lock(read=FileType.KEY | S), lock(read=S), lock(write=FileType.PIECE), lock(read=U)]
    )
    assert counts.readers == (1, 2, 0, 0, 0, 0, 1)
    assert counts.read == U | S | FileType.KEY
    assert counts.write == FileType.PIECE
    assert Counts.of([]) == Counts((0,) * 7, 0)
