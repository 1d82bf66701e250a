"""Inode numbers: stable, fresh for new content, and kept while the kernel holds them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sectorfs.fuse.inode_objects import FIRST_HASHED, HASH_SPACE, FlatKey, stable_hash
from sectorfs.fuse.inodes import (
    PACKED,
    ROOT,
    Content,
    InodeKey,
    InodeTable,
    PageReply,
    flat,
    number_type,
    type_number,
)
from sectorfs.types import FileType, SectorFile, SectorID

BOTH = [
    pytest.param(True, id="packed", marks=pytest.mark.skipif(PACKED is None, reason="not built")),
    pytest.param(False, id="objects"),
]
needs_packed = pytest.mark.skipif(PACKED is None, reason="not built")
int63 = st.integers(0, 2**63 - 1)

FILE = SectorFile(FileType.SEALED, SectorID(1000, 7))
KEYS = [
    InodeKey(SectorFile(FileType.SEALED, SectorID(1000, number)), None, Content(size, 5))
    for number in range(6)
    for size in (1, 2)
]
TINY = len(KEYS) + 1
SPACE = len(KEYS) * 2
"""Room for every key, and as many again that were retired."""
NUMBER_OF_FILE = 3716504215989733297


@pytest.fixture(params=BOTH)
def new(request: pytest.FixtureRequest) -> Callable[..., InodeTable]:
    """Makes a table of either kind."""

    def make(space: int = HASH_SPACE) -> InodeTable:
        return InodeTable(space, native=request.param)

    return make


def test_a_number_does_not_depend_on_the_process(new: Callable[..., InodeTable]) -> None:
    key = InodeKey(FILE, None, Content(2048, 1_700_000_000_000_000_000))
    assert new().number(key) == new().number(key) == NUMBER_OF_FILE


@pytest.mark.parametrize(
    "other",
    [
        InodeKey(FILE, None, Content(2049, 5)),
        InodeKey(FILE, None, Content(2048, 6)),
        InodeKey(FILE, None, Content(2048, -5)),
        InodeKey(FILE, None, Content(0, 0)),
        InodeKey(FILE, None, None),
        InodeKey(FILE, "p_aux", Content(2048, 5)),
        InodeKey(FILE, "p_au", Content(2048, 5)),
        InodeKey(FILE, "sc-02-data-tree-r-last-0.dat", Content(2048, 5)),
        InodeKey(FILE, "sc-02-data-tree-r-last-1.dat", Content(2048, 5)),
        InodeKey(SectorFile(FileType.UNSEALED, FILE.sector), None, Content(2048, 5)),
        InodeKey(SectorFile(FileType.SEALED, SectorID(1000, 8)), None, Content(2048, 5)),
        InodeKey(SectorFile(FileType.SEALED, SectorID(1001, 7)), None, Content(2048, 5)),
    ],
)
def test_whatever_differs_gives_another_number(
    new: Callable[..., InodeTable], other: InodeKey
) -> None:
    table = new()
    first = table.look_up(InodeKey(FILE, None, Content(2048, 5)))
    second = table.look_up(other)
    assert first != second
    assert table.key(second) == other


def test_fixed_numbers_are_the_root_and_the_types() -> None:
    numbers = [type_number(file_type) for file_type in FileType]
    assert numbers == [2, 3, 4, 5, 6, 7, 8]
    assert [number_type(number) for number in numbers] == list(FileType)
    assert number_type(ROOT) is None
    assert number_type(9) is None
    assert number_type(FIRST_HASHED) is None


def test_numbers_stay_clear_of_the_fixed_range(new: Callable[..., InodeTable]) -> None:
    table = new(1)
    assert table.look_up(KEYS[0]) == FIRST_HASHED == 17


def test_the_second_claimant_of_a_number_gets_the_next_and_keeps_it(
    new: Callable[..., InodeTable],
) -> None:
    first, second = clash(TINY)
    table = new(TINY)
    taken = table.look_up(first)
    moved = table.look_up(second)
    assert moved != taken
    table.forget([(taken, 1)])
    assert table.number(second) == moved, "its number is known to the kernel"
    table.forget([(moved, 1)])
    assert table.number(second) == taken, "forgotten, it may have its own"


def clash(space: int) -> tuple[InodeKey, InodeKey]:
    seen: dict[int, InodeKey] = {}
    for key in KEYS:
        other = seen.setdefault(stable_hash(flat(key), space), key)
        if other != key:
            return other, key
    raise AssertionError("no two keys share a hash")


def test_what_is_not_held_is_left_alone(new: Callable[..., InodeTable]) -> None:
    table = new()
    table.forget([(ROOT, 1), (12345, 9), (2**64 - 1, 2**64 - 1)])
    table.retire(12345)
    assert table.pin(12345) is None
    assert table.key(2**64 - 1) is None
    assert len(table) == 0
    with pytest.raises(KeyError):
        table.unpin(12345)


def test_an_open_that_was_never_counted_is_not_taken_back(new: Callable[..., InodeTable]) -> None:
    table = new()
    number = table.look_up(KEYS[0])
    with pytest.raises(KeyError):
        table.unpin(number)
    assert number in table


def test_a_retired_number_is_left_to_those_who_hold_it(new: Callable[..., InodeTable]) -> None:
    table = new()
    old = table.look_up(KEYS[0])
    table.retire(old)
    fresh = table.look_up(KEYS[0])
    assert fresh != old
    assert table.key(old) == table.key(fresh) == KEYS[0]
    table.forget([(old, 1)])
    assert table.number(KEYS[0]) == fresh, "its number is known to the kernel"
    table.retire(fresh)
    assert table.number(KEYS[0]) == old, "free again, and its own"
    table.forget([(fresh, 1)])
    assert len(table) == 0


@needs_packed
@given(
    key=st.tuples(
        st.sampled_from([one.value for one in FileType]),
        int63,
        int63,
        st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,40}", fullmatch=True),
        int63,
        st.integers(-(2**63), 2**63 - 1),
    ),
    told=st.booleans(),
)
def test_both_tables_give_the_same_numbers(key: FlatKey, told: bool) -> None:
    assert PACKED is not None
    if not told:
        key = (*key[:4], None, None)
    table = PACKED()
    assert table.number(key) == FIRST_HASHED + stable_hash(key, HASH_SPACE)
    assert table.key(table.look_up(key)) == key


@needs_packed
@pytest.mark.parametrize(
    "key",
    [
        (2, 1000, 7, None, 1),
        (2, 1000, 7, None, 2**63, 1),
        (2, 1000, -(2**64), None, 1, 1),
        (2, 1000, 7, b"p_aux", 1, 1),
        (2, 1000, 7, "p_ä", 1, 1),
        (256, 1000, 7, None, 1, 1),
        (2, "1000", 7, None, 1, 1),
        [2, 1000, 7, None, 1, 1],
    ],
)
def test_what_is_no_key_is_refused(key: object) -> None:
    assert PACKED is not None
    table = PACKED()
    for call in (table.look_up, table.number):
        with pytest.raises((TypeError, ValueError, OverflowError)):
            call(key)  # type: ignore[arg-type]  # that is the point
    assert len(table) == 0


@needs_packed
def test_pages_are_not_written_past_what_calls_back() -> None:
    calls: list[tuple[object, ...]] = []

    def reply(*call: object) -> bool:
        calls.append(call)
        return False

    table = InodeTable()
    to = PageReply(reply, "token", "pattern")
    assert not table.writes_pages(to)
    page = table.write_page([(1000, 7, 1, 1, True)], FileType.SEALED, 2, to)
    assert (page.taken, page.written, len(table)) == (0, 0, 0)
    assert {call[0] for call in calls} == {"token"}


@needs_packed
def test_an_inode_costs_less_than_a_hundred_bytes() -> None:
    assert PACKED is not None
    many = 100_000
    table = PACKED()
    tracemalloc.start()
    try:
        numbers = [table.look_up((4, 1000, each, "p_aux", 1, each)) for each in range(many)]
        held = sum(trace.size for trace in tracemalloc.take_snapshot().traces) - sum(
            number.__sizeof__() for number in numbers
        )
        assert held / many < 100 + 9  # the list of numbers in the test has 8 bytes for each
        table.forget([(number, 1) for number in numbers[:-10]])
        assert len(table) == 10
        del numbers[:-10]
        held = sum(trace.size for trace in tracemalloc.take_snapshot().traces)
        assert held < 200_000, "what is forgotten costs nothing"
    finally:
        tracemalloc.stop()


class Objects(RuleBasedStateMachine):
    """The table beside a dict, in a space so small that nearly every number is contested."""

    native = False

    def __init__(self) -> None:
        super().__init__()
        self.table = InodeTable(SPACE, native=self.native)
        self.held: dict[int, tuple[InodeKey, int, int]] = {}
        self.retired: set[int] = set()

    @precondition(lambda self: len(self.held) < SPACE)
    @rule(key=st.sampled_from(KEYS))
    def look_up(self, key: InodeKey) -> None:
        expected = self.table.number(key)
        number = self.table.look_up(key)
        assert number == expected
        known, lookups, opens = self.held.get(number, (key, 0, 0))
        assert known == key
        assert number not in self.retired
        self.held[number] = (key, lookups + 1, opens)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), many=st.integers(1, 3))
    def forget(self, data: st.DataObject, many: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        self.table.forget([(number, many), (5, 1)])
        key, lookups, opens = self.held[number]
        self._keep(number, key, max(0, lookups - many), opens)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        key, lookups, opens = self.held[number]
        assert self.table.pin(number) == key
        self.held[number] = (key, lookups, opens + 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        self.table.retire(number)
        self.retired.add(number)

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
            self.retired.discard(number)

    @invariant()
    def numbers_mean_what_they_meant(self) -> None:
        assert sorted(self.table.numbers()) == sorted(self.held)
        assert len(self.table) == len(self.held)
        for number, (key, _, _) in self.held.items():
            assert number >= FIRST_HASHED
            assert number in self.table
            assert self.table.key(number) == key
            assert number in self.retired or self.table.number(key) == number

    @precondition(lambda self: len(self.held) < SPACE)
    @invariant()
    def nothing_else_is_remembered(self) -> None:
        for key in KEYS:
            number = self.table.number(key)
            assert self.table.key(number) in (None, key)


class Packed(Objects):
    """The same of the native table."""

    native = True


Objects.TestCase.settings = Packed.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None
)
TestObjects = Objects.TestCase
TestPacked = needs_packed(Packed.TestCase)
