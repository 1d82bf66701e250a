"""Inode numbers: stable, fresh for new content, and kept while the kernel holds them."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sectorfs.fuse.inodes import (
    FIRST_HASHED,
    ROOT,
    Content,
    InodeKey,
    InodeTable,
    number_type,
    stable_hash,
    type_number,
)
from sectorfs.types import FileType, SectorFile, SectorID

FILE = SectorFile(FileType.SEALED, SectorID(1000, 7))
KEYS = [
    InodeKey(SectorFile(FileType.SEALED, SectorID(1000, number)), None, Content(size, 5))
    for number in range(6)
    for size in (1, 2)
]
TINY = len(KEYS) + 1


def test_a_number_does_not_depend_on_the_process() -> None:
    key = InodeKey(FILE, None, Content(2048, 1_700_000_000_000_000_000))
    assert InodeTable().number(key) == InodeTable().number(key) == 728105921490845727


@pytest.mark.parametrize(
    "other",
    [
        InodeKey(FILE, None, Content(2049, 5)),
        InodeKey(FILE, None, Content(2048, 6)),
        InodeKey(FILE, None, None),
        InodeKey(FILE, "p_aux", Content(2048, 5)),
        InodeKey(SectorFile(FileType.UNSEALED, FILE.sector), None, Content(2048, 5)),
        InodeKey(SectorFile(FileType.SEALED, SectorID(1000, 8)), None, Content(2048, 5)),
        InodeKey(SectorFile(FileType.SEALED, SectorID(1001, 7)), None, Content(2048, 5)),
    ],
)
def test_whatever_differs_gives_another_number(other: InodeKey) -> None:
    table = InodeTable()
    assert table.number(other) != table.number(InodeKey(FILE, None, Content(2048, 5)))


def test_fixed_numbers_are_the_root_and_the_types() -> None:
    numbers = [type_number(file_type) for file_type in FileType]
    assert numbers == [2, 3, 4, 5, 6, 7, 8]
    assert [number_type(number) for number in numbers] == list(FileType)
    assert number_type(ROOT) is None
    assert number_type(9) is None
    assert number_type(FIRST_HASHED) is None


def test_numbers_stay_clear_of_the_fixed_range() -> None:
    table = InodeTable(1)
    assert table.look_up(KEYS[0]) == FIRST_HASHED == 17


def test_the_second_claimant_of_a_number_gets_the_next_and_keeps_it() -> None:
    first, second = clash(TINY)
    table = InodeTable(TINY)
    taken = table.look_up(first)
    moved = table.look_up(second)
    assert moved != taken
    table.forget(taken, 1)
    assert table.number(second) == moved, "its number is known to the kernel"
    table.forget(moved, 1)
    assert table.number(second) == taken, "forgotten, it may have its own"


def clash(space: int) -> tuple[InodeKey, InodeKey]:
    seen: dict[int, InodeKey] = {}
    for key in KEYS:
        other = seen.setdefault(stable_hash(key, space), key)
        if other != key:
            return other, key
    raise AssertionError("no two keys share a hash")


def test_forgetting_what_is_not_held_does_nothing() -> None:
    table = InodeTable()
    table.forget(ROOT, 1)
    table.forget(12345, 9)
    assert len(table) == 0


def test_pinning_what_is_not_held_is_refused() -> None:
    assert InodeTable().pin(12345) is None


class Machine(RuleBasedStateMachine):
    """The table beside a dict, in a space so small that nearly every number is contested."""

    def __init__(self) -> None:
        super().__init__()
        self.table = InodeTable(TINY)
        self.held: dict[int, tuple[InodeKey, int, int]] = {}

    @rule(key=st.sampled_from(KEYS))
    def look_up(self, key: InodeKey) -> None:
        expected = self.table.number(key)
        number = self.table.look_up(key)
        assert number == expected
        known, lookups, opens = self.held.get(number, (key, 0, 0))
        assert known == key
        self.held[number] = (key, lookups + 1, opens)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), many=st.integers(1, 3))
    def forget(self, data: st.DataObject, many: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        self.table.forget(number, many)
        key, lookups, opens = self.held[number]
        self._keep(number, key, max(0, lookups - many), opens)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        key, lookups, opens = self.held[number]
        assert self.table.pin(number) == key
        self.held[number] = (key, lookups, opens + 1)

    @precondition(lambda self: any(opens for _, _, opens in self.held.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = sorted(number for number, node in self.held.items() if node[2])
        number = data.draw(st.sampled_from(pinned))
        self.table.unpin(number)
        key, lookups, opens = self.held[number]
        self._keep(number, key, lookups, opens - 1)

    def _keep(self, number: int, key: InodeKey, lookups: int, opens: int) -> None:
        if lookups or opens:
            self.held[number] = (key, lookups, opens)
        else:
            del self.held[number]

    @invariant()
    def numbers_mean_what_they_meant(self) -> None:
        assert sorted(self.table.numbers()) == sorted(self.held)
        assert len(self.table) == len(self.held)
        for number, (key, _, _) in self.held.items():
            assert number >= FIRST_HASHED
            assert number in self.table
            assert self.table.key(number) == key
            assert self.table.number(key) == number

    @invariant()
    def nothing_else_is_remembered(self) -> None:
        for key in KEYS:
            number = self.table.number(key)
            assert self.table.key(number) in (None, key)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestMachine = Machine.TestCase
