"""Places with sources, and sources that do not answer: one deadline for all who wait together."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from sectorfs.errors import DiskFull, NotFound, SourceFailed, TimedOut, Unreachable
from sectorfs.stores.gates import Priority
from sectorfs.stores.places import BREAK_PAUSE, LONGEST_PAUSE, PAUSE, READS, Places, Resting
from sectorfs.stores.sources import PeerSource
from sectorfs.types import StorageID

URL = "http://a/remote"
ONE, TWO, THREE = (PeerSource(StorageID(name), URL) for name in ("one", "two", "three"))
OTHER = PeerSource(StorageID("far"), "http://b/remote")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def places(clock: Clock) -> Places:
    return Places(2, patience=10, now=clock)


async def fall_silent(places: Places, source: PeerSource) -> None:
    with pytest.raises(TimedOut):
        async with places.place(source, Priority.READ):
            raise TimedOut("no answer within 10 s", source.url)


async def test_a_silent_source_is_not_asked_again_at_once(places: Places, clock: Clock) -> None:
    await fall_silent(places, ONE)
    assert "no answer within 10 s" in places.reason(ONE)
    with pytest.raises(SourceFailed, match="did not answer others"):
        async with places.place(ONE, Priority.READ):
            raise AssertionError("it was asked")
    async with places.place(TWO, Priority.READ):
        pass  # another disk of the same peer
    clock.now += PAUSE
    async with places.place(ONE, Priority.READ):
        with pytest.raises(SourceFailed):
            async with places.place(ONE, Priority.READ):
                raise AssertionError("one probe is enough")
    assert places.reason(ONE) == ""


async def test_pauses_grow_to_a_limit(places: Places, clock: Clock) -> None:
    waited = []
    for _ in range(6):
        await fall_silent(places, ONE)
        start = clock.now
        while True:
            clock.now += 0.5
            try:
                with places.asking(ONE):
                    raise TimedOut("again", ONE.url)
            except SourceFailed:
                continue
            except TimedOut:
                break
        waited.append(clock.now - start)
        if waited[-1] >= LONGEST_PAUSE:
            break
        clock.now += waited[-1] * 2
    assert waited[-1] == LONGEST_PAUSE
    assert math.isclose(min(waited), PAUSE)


@pytest.mark.parametrize("answer", [NotFound("gone", URL), SourceFailed("500", URL), None])
async def test_any_answer_is_one(
    places: Places, clock: Clock, answer: NotFound | SourceFailed | None
) -> None:
    await fall_silent(places, ONE)
    clock.now += PAUSE
    try:
        with places.asking(ONE):
            if answer is not None:
                raise answer
    except (NotFound, SourceFailed):
        pass
    async with places.place(ONE, Priority.READ):
        pass


async def test_what_our_own_disk_says_is_none(places: Places, clock: Clock) -> None:
    await fall_silent(places, ONE)
    clock.now += PAUSE
    with pytest.raises(DiskFull), places.asking(ONE):
        raise DiskFull("no room", "cache")
    assert places.reason(ONE)
    async with places.place(ONE, Priority.READ):
        pass  # it was no probe, so the next one is


async def test_a_probe_that_was_called_off_leaves_the_next_one(
    places: Places, clock: Clock
) -> None:
    await fall_silent(places, ONE)
    clock.now += PAUSE
    with trio.move_on_after(0):
        async with places.place(ONE, Priority.READ):
            await trio.sleep_forever()
    async with places.place(ONE, Priority.READ):
        pass


async def test_a_source_that_began_to_answer_is_asked_by_others_too(
    places: Places, clock: Clock
) -> None:
    await fall_silent(places, ONE)
    clock.now += PAUSE
    async with places.place(ONE, Priority.READ):
        places.heard(ONE)
        async with places.place(ONE, Priority.READ):
            pass


async def test_those_who_queue_are_let_go_with_those_who_were_asked(
    autojump_clock: MockClock,
) -> None:
    places = Places(2, patience=10)
    failed: list[float] = []

    async def read() -> None:
        try:
            async with places.place(ONE, Priority.READ):
                await trio.sleep(10)
                raise TimedOut("no answer within 10 s", URL)
        except (TimedOut, SourceFailed):
            failed.append(trio.current_time())

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5 * READS):
            nursery.start_soon(read)
    assert len(failed) == 5 * READS
    assert max(failed) - start < 10.1


async def test_bulk_leaves_places_to_readers_and_one_disk_leaves_some_to_others(
    places: Places,
) -> None:
    async with trio.open_nursery() as nursery:

        async def hold(source: PeerSource, priority: Priority) -> None:
            async with places.place(source, priority):
                held.append((source, priority))
                await trio.sleep_forever()

        held: list[tuple[PeerSource, Priority]] = []
        for source in (ONE, TWO, THREE):
            for _ in range(10):
                nursery.start_soon(hold, source, Priority.FILL)
        await wait_all_tasks_blocked()
        assert len(held) == 4  # two of each source, four of the peer
        for _ in range(READS + 10):
            nursery.start_soon(hold, ONE, Priority.READ)
        await wait_all_tasks_blocked()
        assert held.count((ONE, Priority.READ)) == READS
        for source in (TWO, OTHER):
            with trio.fail_after(1):
                async with places.place(source, Priority.READ):
                    pass
        nursery.cancel_scope.cancel()
    assert places._node.taken == 0


async def break_off(places: Places, source: PeerSource) -> Unreachable:
    with pytest.raises(Unreachable) as caught:
        async with places.place(source, Priority.READ):
            raise Unreachable("cannot connect", source.url)
    return caught.value


async def test_who_broke_off_is_waited_for_and_who_fell_silent_is_not(
    autojump_clock: MockClock,
) -> None:
    places = Places(2, patience=10)
    start = trio.current_time()
    cause = await break_off(places, ONE)
    with pytest.raises(Resting, match="cannot connect") as caught:
        async with places.place(ONE, Priority.READ):
            raise AssertionError("it was asked")
    for error in (cause, caught.value):
        assert await places.back({ONE: error}, start)
    assert trio.current_time() - start >= BREAK_PAUSE
    async with places.place(ONE, Priority.READ):
        pass
    await fall_silent(places, ONE)
    assert not await places.back({ONE: cause}, trio.current_time())
    assert not await places.back({TWO: NotFound("gone", URL)}, trio.current_time())
    assert not await places.back({}, trio.current_time())


async def test_it_is_waited_for_as_long_as_an_answer_would_be(autojump_clock: MockClock) -> None:
    places = Places(2, patience=10)
    start = trio.current_time()
    cause = await break_off(places, ONE)
    tries = 0
    while await places.back({ONE: cause}, start):
        tries += 1
        await break_off(places, ONE)
    assert 6 <= tries <= 12
    assert 6 < trio.current_time() - start <= 10
    # It has been away for long now: who comes later hears of it at once.
    await trio.sleep(10)
    late = trio.current_time()
    assert not await places.back({ONE: cause}, late)
    assert trio.current_time() == late


async def test_those_who_wait_go_on_with_the_first_answer(autojump_clock: MockClock) -> None:
    places = Places(2, patience=10)
    cause = await break_off(places, ONE)
    woken: list[float] = []
    start = trio.current_time()

    async def wait() -> None:
        assert await places.back({ONE: cause}, start)
        woken.append(trio.current_time() - start)

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        places.heard(ONE)
    assert len(woken) == 50
    assert max(woken) < BREAK_PAUSE


async def test_whose_pause_is_over_is_asked_at_once(autojump_clock: MockClock) -> None:
    places = Places(2, patience=10)
    cause = await break_off(places, ONE)
    await trio.sleep(2 * BREAK_PAUSE)
    now = trio.current_time()
    assert await places.back({ONE: cause}, now)
    with trio.move_on_after(0):
        async with places.place(ONE, Priority.READ):
            await trio.sleep_forever()  # a probe that is called off
    assert await places.back({ONE: cause}, now)
    assert trio.current_time() == now
