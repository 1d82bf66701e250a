"""Space that is promised: what is granted, what counts, and that all of it comes back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sectorfs.errors import BadInput, DiskFull, NotFound, Refused
from sectorfs.index.protocol import FsStat
from sectorfs.stores.reservation import (
    Claim,
    Place,
    Reservation,
    Reservations,
    Room,
    Spot,
    claims_for,
    remaining,
)
from sectorfs.stores.space import RawSpace
from sectorfs.types import FileType, SectorFile, SectorID, StorageID

A, B, C = StorageID("a"), StorageID("b"), StorageID("c")
SECTOR = SectorID(1000, 7)
SEALED, CACHE = SectorFile(FileType.SEALED, SECTOR), SectorFile(FileType.CACHE, SECTOR)
UNSEALED = SectorFile(FileType.UNSEALED, SECTOR)
PLACES: tuple[Place, ...] = ("final", "temporary", "fetching")


def claim(
    size: int, file: SectorFile = SEALED, storage: StorageID = A, place: Place = "fetching"
) -> Claim:
    return Claim(storage=storage, file=file, size=size, place=place)


def room(
    available: int,
    *,
    mark: int = 0,
    filesystem: int = 1,
    capacity: int = 1000,
    max_storage: int = 0,
    used: int | None = None,
    present: dict[tuple[SectorFile, Place], int] | None = None,
) -> Room:
    return Room(
        mark=mark,
        raw=RawSpace(capacity, available),
        filesystem=filesystem,
        max_storage=max_storage,
        used=used,
        present=present or {},
    )


@pytest.fixture
def ledger() -> Reservations:
    return Reservations()


# Sizes


def test_files_of_one_directory_are_claimed_apart() -> None:
    ledger = Reservations()
    first = Claim(storage=A, file=CACHE, size=10, place="fetching", member="p_aux")
    second = Claim(storage=A, file=CACHE, size=20, place="fetching", member="t_aux")
    with ledger.reserve([first], {A: room(100)}) as one, ledger.reserve([second], {A: room(100)}):
        present: dict[Spot, int] = {(CACHE, "fetching", "p_aux"): 4}
        here = Room(mark=0, raw=RawSpace(1000, 96), filesystem=1, present=present)
        assert ledger.reserved(A, {A: here}) == 26
        with pytest.raises(Refused):
            ledger.reserve([first], {A: here})
        assert one.finish(A, CACHE, "p_aux")
        assert not one.finish(A, CACHE)
        assert ledger.reserved(A, {A: here}) == 20


def test_unknown_sizes_are_claimed_by_the_table_of_the_purpose() -> None:
    storages = {FileType.CACHE: A, FileType.SEALED: B}
    for path_type, cache in (("sealing", 28876), ("storage", 204)):
        claims = claims_for(SECTOR, storages, 2048, path_type=path_type, place="final", known={})
        assert claims == [
            claim(2048, SEALED, B, place="final"),
            claim(cache, CACHE, A, place="final"),
        ]


def test_known_sizes_are_claimed_as_they_are() -> None:
    storages = {FileType.CACHE: A, FileType.SEALED: A, FileType.UNSEALED: A}
    known = {FileType.CACHE: 75, FileType.UNSEALED: 0}
    claims = claims_for(SECTOR, storages, 2048, path_type="sealing", place="fetching", known=known)
    assert claims == [claim(0, UNSEALED), claim(2048), claim(75, CACHE)]
    known = {**known, FileType.SEALED: 5}
    claims = claims_for(SECTOR, storages, 0, path_type="sealing", place="fetching", known=known)
    assert [one.size for one in claims] == [0, 5, 75]


@pytest.mark.parametrize("sector_size", [0, -1, 2**63])
def test_a_size_nobody_knows_is_refused(sector_size: int) -> None:
    with pytest.raises(BadInput, match="size"):
        claims_for(
            SECTOR,
            {FileType.SEALED: A},
            sector_size,
            path_type="sealing",
            place="final",
            known={FileType.CACHE: 1},
        )


@pytest.mark.parametrize("size", [-1, 2**63])
def test_sizes_beyond_63_bits_are_refused(ledger: Reservations, size: int) -> None:
    with pytest.raises(BadInput, match="size"):
        ledger.reserve([claim(size)], {A: room(2**62)})
    assert ledger.claims(A) == ()


# What is on disk already


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lies", PLACES)
@pytest.mark.parametrize(("written", "left"), [(0, 100), (30, 70), (100, 0), (130, 0)])
def test_bytes_where_the_file_is_written_count(
    place: Place, lies: Place, written: int, left: int
) -> None:
    measured = room(0, present={(SEALED, lies): written})
    assert remaining(claim(100, place=place), measured) == (left if place == lies else 100)


def test_bytes_of_other_files_do_not_count() -> None:
    measured = room(0, present={(CACHE, "fetching"): 60})
    assert remaining(claim(100), measured) == 100
    assert remaining(claim(100), None) == 100


def test_a_file_that_grows_keeps_what_is_left_for_others(ledger: Reservations) -> None:
    with ledger.reserve([claim(100)], {A: room(150)}):
        for written in (0, 40, 100, 120):
            rooms = {A: room(150 - written, present={(SEALED, "fetching"): written})}
            stat = ledger.stat(A, rooms)
            assert stat.reserved == max(0, 100 - written)
            assert stat.available == min(50, 150 - written)
        with pytest.raises(DiskFull):
            ledger.reserve([claim(51, CACHE)], {A: room(150)})


def test_only_what_is_missing_needs_room(ledger: Reservations) -> None:
    rooms = {A: room(40, present={(SEALED, "fetching"): 60})}
    with pytest.raises(DiskFull, match="a: no room for 41 bytes: 40 are left"):
        ledger.reserve([claim(101)], rooms)
    ledger.reserve([claim(100)], rooms)


def test_a_file_that_is_complete_needs_no_room(ledger: Reservations) -> None:
    full = {A: room(0, present={(SEALED, "final"): 100})}
    with ledger.reserve([claim(100, place="final")], full):
        # Others took what was promised: nothing more is granted, and this still is.
        rooms = {A: room(0, present={(CACHE, "final"): 10})}
        with ledger.reserve([claim(10, CACHE, place="final")], rooms):
            assert ledger.stat(A, rooms).available == 0


# Room


@pytest.mark.parametrize(
    ("available", "max_storage", "used", "room_left"),
    [
        (100, 0, None, 100),
        (100, 0, 90, 100),
        (100, 50, 0, 50),
        (100, 50, 20, 30),
        (100, 50, 50, 0),
        (100, 50, 60, 0),
        (100, 500, 20, 100),
        (100, 50, None, 0),
    ],
)
def test_claims_count_against_the_disk_and_the_limit(
    ledger: Reservations, available: int, max_storage: int, used: int | None, room_left: int
) -> None:
    rooms = {A: room(available, max_storage=max_storage, used=used)}
    assert ledger.stat(A, rooms).available == room_left
    with pytest.raises(DiskFull):
        ledger.reserve([claim(room_left + 1)], rooms)
    first = ledger.reserve([claim(room_left)], rooms)
    assert ledger.stat(A, rooms) == FsStat(
        capacity=1000,
        available=0,
        fs_available=available,
        reserved=room_left,
        max=max_storage,
        used=(used or 0) if max_storage else 0,
    )
    with pytest.raises(DiskFull):
        ledger.reserve([claim(1, CACHE)], rooms)
    first.release()


def test_one_file_system_is_granted_once_however_many_storages_share_it(
    ledger: Reservations,
) -> None:
    rooms = {A: room(100), B: room(100), C: room(100, filesystem=2)}
    with ledger.reserve([claim(60)], rooms):
        assert [ledger.stat(one, rooms).available for one in (A, B, C)] == [40, 40, 100]
        assert [ledger.stat(one, rooms).reserved for one in (A, B, C)] == [60, 0, 0]
        with pytest.raises(DiskFull, match="b: "):
            ledger.reserve([claim(41, storage=B)], rooms)
        # A neighbour that was not measured counts in full.
        assert ledger.stat(B, {B: room(100)}).available == 40
        grown = {**rooms, A: room(100, present={(SEALED, "fetching"): 25})}
        assert ledger.stat(B, grown).available == 65
        with ledger.reserve([claim(40, storage=B), claim(100, storage=C)], rooms):
            assert [ledger.stat(one, rooms).available for one in (A, B, C)] == [0, 0, 0]


def test_a_disk_mounted_again_keeps_its_claims(ledger: Reservations) -> None:
    reservation = ledger.reserve([claim(60)], {A: room(100)})
    again = {A: room(100, filesystem=9)}
    assert ledger.stat(A, again).available == 40
    reservation.release()
    with pytest.raises(Refused, match="measure again"):
        ledger.reserve([claim(60)], again)


@pytest.mark.parametrize(
    ("size", "percent", "max_storage", "granted"),
    [
        (100, 0, 0, True),
        (90, 1, 0, True),
        (91, 1, 0, False),
        (50, 5, 0, True),
        (51, 5, 0, False),
        (0, 10, 0, True),
        (0, 11, 0, False),
        (95, 5, 100, True),
        (96, 5, 100, False),
        (100, 1, 5000, False),
        (50, 1, 5000, True),
        (51, 1, 5000, False),
    ],
)
def test_min_free_percent_of_the_limit_else_of_the_disk(
    ledger: Reservations, size: int, percent: int, max_storage: int, granted: bool
) -> None:
    rooms = {A: room(100, max_storage=max_storage, used=0)}
    if granted:
        ledger.reserve([claim(size)], rooms, min_free_percent=percent)
    else:
        with pytest.raises(DiskFull):
            ledger.reserve([claim(size)], rooms, min_free_percent=percent)
    assert len(ledger.claims(A)) == granted


def test_min_free_percent_is_named_and_exact_for_huge_disks(ledger: Reservations) -> None:
    huge = 2**63 - 1
    rooms = {A: room(huge, capacity=huge)}
    most = huge * 95 // 100
    with pytest.raises(DiskFull, match="5 % must stay free"):
        ledger.reserve([claim(most + 1)], rooms, min_free_percent=5)
    ledger.reserve([claim(most)], rooms, min_free_percent=5)


@pytest.mark.parametrize("percent", [-1, 101])
def test_percentages_are_checked(ledger: Reservations, percent: int) -> None:
    with pytest.raises(BadInput, match="percentage"):
        ledger.reserve([claim(1)], {A: room(100)}, min_free_percent=percent)


# All or nothing


def test_all_types_and_storages_or_none(ledger: Reservations) -> None:
    rooms = {A: room(100), B: room(100, filesystem=2), C: room(10, filesystem=3)}
    wanted = [claim(60), claim(40, CACHE), claim(50, storage=B)]
    for extra in (claim(11, storage=C), claim(1, UNSEALED), claim(51, CACHE, B)):
        with pytest.raises(DiskFull):
            ledger.reserve([*wanted, extra], rooms)
        assert [ledger.reserved(one, rooms) for one in (A, B, C)] == [0, 0, 0]
    with ledger.reserve(wanted, rooms):
        assert [ledger.reserved(one, rooms) for one in (A, B, C)] == [100, 50, 0]
        assert ledger.claims(A) == tuple(wanted[:2])
        assert ledger.claims(C) == ()


def test_nothing_may_be_reserved(ledger: Reservations) -> None:
    with ledger.reserve([], {}) as nothing:
        assert nothing.release()


def test_unknown_storages_are_not_found(ledger: Reservations) -> None:
    with pytest.raises(NotFound, match="b: not a storage path"):
        ledger.reserve([claim(1), claim(1, storage=B)], {A: room(100)})
    with pytest.raises(NotFound):
        ledger.stat(B, {A: room(100)})
    assert ledger.claims(A) == ()


def test_a_file_is_claimed_once_per_storage(ledger: Reservations) -> None:
    rooms = {A: room(100), B: room(100, filesystem=2)}
    with pytest.raises(BadInput, match="twice"):
        ledger.reserve([claim(1), claim(2)], rooms)
    with ledger.reserve([claim(1)], rooms):
        with pytest.raises(Refused, match="reserved already"):
            ledger.reserve([claim(1, CACHE), claim(1, place="final")], rooms)
        with ledger.reserve([claim(1, CACHE), claim(1, storage=B)], rooms):
            assert len(ledger.claims(A)) == 2
    ledger.reserve([claim(1)], {A: room(100, mark=ledger.mark)})


# Release


def assert_empty(ledger: Reservations) -> None:
    fresh = room(100, mark=ledger.mark)
    assert ledger.claims(A) == ()
    assert ledger.stat(A, {A: fresh}).available == 100
    ledger.reserve([claim(100)], {A: fresh}).release()


def test_the_end_of_the_block_releases(ledger: Reservations) -> None:
    with ledger.reserve([claim(60), claim(40, CACHE)], {A: room(100)}):
        assert len(ledger.claims(A)) == 2
    assert_empty(ledger)


def test_an_exception_releases(ledger: Reservations) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        ledger.reserve([claim(60), claim(40, CACHE)], {A: room(100)}),
    ):
        raise ZeroDivisionError
    assert_empty(ledger)


async def test_cancellation_releases(
    ledger: Reservations, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(1):
        with ledger.reserve([claim(100)], {A: room(100)}):
            assert len(ledger.claims(A)) == 1
            await trio.sleep_forever()
    assert_empty(ledger)


def test_release_inside_the_block_is_quiet(
    ledger: Reservations, caplog: pytest.LogCaptureFixture
) -> None:
    with ledger.reserve([claim(100)], {A: room(100)}) as reservation:
        assert reservation.release()
        assert_empty(ledger)
    assert_empty(ledger)
    assert caplog.records == []


def test_a_second_release_is_harmless_and_told(
    ledger: Reservations, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    first = ledger.reserve([claim(60)], {A: room(100)})
    assert first.release()
    rooms = {A: room(100, mark=ledger.mark)}
    second = ledger.reserve([claim(70)], rooms)
    assert not first.release()
    assert not first.finish(A, SEALED)
    assert ledger.reserved(A, rooms) == 70
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert second.release()
    assert_empty(ledger)


def test_a_file_in_place_is_released_alone(
    ledger: Reservations, caplog: pytest.LogCaptureFixture
) -> None:
    rooms = {A: room(100)}
    with ledger.reserve([claim(60), claim(40, CACHE)], rooms) as reservation:
        assert reservation.finish(A, SEALED)
        assert ledger.reserved(A, rooms) == 40
        assert not caplog.records
        assert not reservation.finish(A, SEALED)
        assert not reservation.finish(B, CACHE)
        assert "sealed/s-t01000-7 on a" in caplog.text
        assert ledger.reserved(A, rooms) == 40
    assert_empty(ledger)


def test_rooms_from_before_a_release_are_refused(ledger: Reservations) -> None:
    # Measured while the file was being written: 50 of 100 bytes were free.
    old = {A: room(50, mark=ledger.mark), B: room(50, mark=ledger.mark)}
    other = {C: room(50, mark=ledger.mark, filesystem=2)}
    first = ledger.reserve([claim(50)], old)
    assert ledger.is_current(old)
    # It writes all of it, and is done: nothing is free now, and no claim tells so.
    first.release()
    for storage in (A, B):
        assert not ledger.is_current({storage: old[storage]})
        with pytest.raises(Refused, match="measure again"):
            ledger.reserve([claim(50, storage=storage)], {storage: old[storage]})
    assert ledger.is_current(other)
    ledger.reserve([claim(50, storage=C)], other)
    with pytest.raises(DiskFull):
        ledger.reserve([claim(50)], {A: room(0, mark=ledger.mark)})


# A disk that fills while measurements grow old, beside the ledger

FILESYSTEM = {A: 1, B: 1, C: 2}
CAPACITY = {1: 1000, 2: 600}
LIMIT = {A: 0, B: 300, C: 400}
FILES = [SEALED, CACHE, UNSEALED]


@dataclass
class Task:
    """A reservation and what its holder may still write."""

    reservation: Reservation
    claims: dict[tuple[StorageID, SectorFile], Claim]
    over: bool = field(default=False)


class Disks(RuleBasedStateMachine):
    """Holders write what they were granted; whatever the order, there is room for it."""

    @initialize()
    def start(self) -> None:
        self.ledger = Reservations()
        self.lies: dict[tuple[StorageID, SectorFile, Place], int] = {}
        self.tasks: list[Task] = []
        self.rooms = self.measure_now()

    def free(self, filesystem: int) -> int:
        taken = sum(
            size for (storage, *_), size in self.lies.items() if FILESYSTEM[storage] == filesystem
        )
        return CAPACITY[filesystem] - taken

    def used(self, storage: StorageID) -> int:
        return sum(size for (where, *_), size in self.lies.items() if where == storage)

    def left(self, one: Claim) -> int:
        return max(0, one.size - self.lies.get((one.storage, one.file, one.place), 0))

    def claims(self) -> list[Claim]:
        return [one for task in self.tasks for one in task.claims.values()]

    def measure_now(self) -> dict[StorageID, Room]:
        return {
            storage: Room(
                mark=self.ledger.mark,
                raw=RawSpace(CAPACITY[filesystem], self.free(filesystem)),
                filesystem=filesystem,
                max_storage=LIMIT[storage],
                used=self.used(storage),
                present={
                    (file, place): size
                    for (where, file, place), size in self.lies.items()
                    if where == storage
                },
            )
            for storage, filesystem in FILESYSTEM.items()
        }

    @rule()
    def measure(self) -> None:
        self.rooms = self.measure_now()

    @rule(
        wanted=st.lists(
            st.builds(
                Claim,
                storage=st.sampled_from([A, B, C]),
                file=st.sampled_from(FILES),
                size=st.integers(0, 500),
                place=st.sampled_from(PLACES),
            ),
            min_size=1,
            max_size=3,
            unique_by=lambda one: one.key,
        ),
        percent=st.sampled_from([0, 0, 1, 5]),
    )
    def reserve(self, wanted: list[Claim], percent: int) -> None:
        before = self.claims()
        try:
            granted = self.ledger.reserve(wanted, self.rooms, min_free_percent=percent)
        except Refused:
            taken = {one.key for one in before} & {one.key for one in wanted}
            assert taken or not self.ledger.is_current(self.rooms)
        except DiskFull:
            if self.rooms == self.measure_now():
                assert not self.would_fit(wanted, percent)
        else:
            if self.rooms == self.measure_now():
                assert self.would_fit(wanted, percent)
            self.tasks.append(Task(granted, {(one.storage, one.file): one for one in wanted}))

    def would_fit(self, wanted: list[Claim], percent: int) -> bool:
        claims = [*self.claims(), *wanted]
        for storage in {one.storage for one in wanted}:
            filesystem = FILESYSTEM[storage]
            left = self.free(filesystem) - sum(
                self.left(one) for one in claims if FILESYSTEM[one.storage] == filesystem
            )
            if LIMIT[storage]:
                here = sum(self.left(one) for one in claims if one.storage == storage)
                left = min(left, LIMIT[storage] - self.used(storage) - here)
            if left * 100 < percent * (LIMIT[storage] or CAPACITY[filesystem]):
                return False
            need = sum(self.left(one) for one in wanted if one.storage == storage)
            if need and left < 0:
                return False
        return True

    def one_of(self, data: st.DataObject) -> tuple[Task, Claim] | None:
        held = [(task, one) for task in self.tasks for one in task.claims.values()]
        return data.draw(st.sampled_from(held)) if held else None

    @rule(data=st.data(), share=st.integers(0, 100))
    def write(self, data: st.DataObject, share: int) -> None:
        if chosen := self.one_of(data):
            one = chosen[1]
            key = (one.storage, one.file, one.place)
            self.lies[key] = self.lies.get(key, 0) + self.left(one) * share // 100

    @rule(data=st.data())
    def start_again(self, data: st.DataObject) -> None:
        if chosen := self.one_of(data):
            one = chosen[1]
            self.lies.pop((one.storage, one.file, one.place), None)

    @rule(data=st.data())
    def put_in_place(self, data: st.DataObject) -> None:
        if chosen := self.one_of(data):
            task, one = chosen
            key = (one.storage, one.file, one.place)
            if key in self.lies:
                self.lies[one.storage, one.file, "final"] = self.lies.pop(key)
            assert task.reservation.finish(one.storage, one.file)
            assert not task.reservation.finish(one.storage, one.file)
            del task.claims[one.storage, one.file]

    @rule(data=st.data(), how=st.sampled_from(["release", "block", "both"]))
    def end(self, data: st.DataObject, how: str) -> None:
        if self.tasks:
            task = self.tasks.pop(data.draw(st.integers(0, len(self.tasks) - 1)))
            if how == "release":
                assert task.reservation.release()
            else:
                with task.reservation:
                    assert how == "block" or task.reservation.release()
            assert not task.reservation.release()

    @rule(data=st.data())
    def remove_a_file(self, data: st.DataObject) -> None:
        written = {(one.storage, one.file, one.place) for one in self.claims()}
        if free := sorted(set(self.lies) - written):
            del self.lies[data.draw(st.sampled_from(free))]

    @invariant()
    def everybody_can_write_what_was_granted(self) -> None:
        for filesystem in CAPACITY:
            promised = sum(
                self.left(one) for one in self.claims() if FILESYSTEM[one.storage] == filesystem
            )
            assert promised <= self.free(filesystem)
        for storage, limit in LIMIT.items():
            promised = sum(self.left(one) for one in self.claims() if one.storage == storage)
            assert not limit or self.used(storage) + promised <= limit

    @invariant()
    def the_ledger_agrees(self) -> None:
        rooms = self.measure_now()
        for storage in FILESYSTEM:
            held = {one.key: one for one in self.claims() if one.storage == storage}
            assert {one.key: one for one in self.ledger.claims(storage)} == held
            stat = self.ledger.stat(storage, rooms)
            assert stat.reserved == sum(self.left(one) for one in held.values())
            assert 0 <= stat.available <= stat.fs_available

    def teardown(self) -> None:
        for task in self.tasks:
            assert task.reservation.release()
        rooms = self.measure_now()
        for storage in FILESYSTEM:
            assert self.ledger.claims(storage) == ()
            assert self.ledger.reserved(storage, rooms) == 0


TestDisks = Disks.TestCase
TestDisks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
