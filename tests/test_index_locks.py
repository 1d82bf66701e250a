"""Who may lock what beside whom: the whole matrix, type by type."""

from __future__ import annotations

from itertools import product

import pytest

from sectorfs.index.locks import Counts, Taken
from sectorfs.index.protocol import Lock
from sectorfs.types import ALL_TYPES, FileType, SectorID

SECTOR = SectorID(1000, 7)
U, S, C = FileType.UNSEALED, FileType.SEALED, FileType.CACHE
MASKS = range(8)


def lock(read: int = 0, write: int = 0) -> Lock:
    return Lock(sector=SECTOR, read=read, write=write)


def taken(*locks: Lock) -> Taken:
    found = Taken()
    for one in locks:
        found.add(one)
    return found


def conflict(one: Lock, other: Lock) -> bool:
    return taken(one).excludes(other)


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

    assert conflict(made(held), made(wanted)) is not granted
    assert excluded(held, wanted) is not granted


def test_every_lock_of_three_types_beside_every_other() -> None:
    for read, write in product(MASKS, MASKS):
        held = lock(read, write)
        assert taken(held) == Taken(read, write)
        for wanted in (lock(*masks) for masks in product(MASKS, MASKS)):
            free = not any(excluded(of_type(held, one), of_type(wanted, one)) for one in (U, S, C))
            assert conflict(held, wanted) is not free
            assert conflict(wanted, held) is not free


def test_every_type_is_apart_from_every_other() -> None:
    for one, other in product(FileType, FileType):
        assert conflict(lock(write=one), lock(write=other)) is (one is other)
        assert conflict(lock(write=one), lock(read=other)) is (one is other)
        assert not conflict(lock(read=one), lock(read=other))


def test_all_types_or_none() -> None:
    held = taken(lock(read=S))
    assert held.excludes(lock(read=U, write=S | C))
    assert not held.excludes(lock(read=S, write=U | C))
    assert not held.excludes(lock(read=ALL_TYPES))


def test_locks_together_exclude_what_any_of_them_excludes() -> None:
    locks = [lock(*masks) for masks in product(range(4), range(4))]
    for one, other in product(locks, locks):
        for wanted in locks:
            alone = conflict(one, wanted) or conflict(other, wanted)
            assert taken(one, other).excludes(wanted) is alone


def test_readers_are_counted_by_bit_position() -> None:
    counts = Counts.of(
        [lock(read=FileType.KEY | S), lock(read=S), lock(write=FileType.PIECE), lock(read=U)]
    )
    assert counts.readers == (1, 2, 0, 0, 0, 0, 1)
    assert counts.write == FileType.PIECE
    assert Counts.of([]) == Counts((0,) * 7, 0)
