"""What is hashed next, and when: pure rules, with time passed in."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from sectorfs.stores import hash_line
from sectorfs.stores.hash_line import FIRST_PAUSE, LONGEST_PAUSE, Line
from sectorfs.stores.hash_pace import READERS_SHARE, HashPace, Meter, PathPace
from sectorfs.stores.hashing import CHUNK, FAST_CHUNK
from sectorfs.stores.lanes import Lane
from sectorfs.types import FileType, SectorFile, SectorID


def file(number: int) -> SectorFile:
    return SectorFile(FileType.SEALED, SectorID(1000, number))


def test_what_is_asked_for_comes_first_then_what_is_new() -> None:
    line = Line()
    for number in (1, 2):
        line.note(file(number))
    line.ask(file(3))
    line.ask(file(3))
    assert [line.next(0) for _ in range(4)] == [file(3), file(1), file(2), None]


def test_what_failed_is_put_off_ever_longer_and_asking_ends_that() -> None:
    line, now = Line(), 0.0
    pauses = []
    line.put_off(file(1), now)
    for _ in range(8):
        due = line.next_due()
        assert due is not None
        assert not line.may(file(1), due - 1)
        assert line.next(due - 1) is None
        pauses.append(due - now)
        now = due
        assert line.next(now) == file(1)
        assert line.next(now) is None
        line.put_off(file(1), now)
    assert pauses[:3] == [FIRST_PAUSE, 4 * FIRST_PAUSE, 16 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE
    line.ask(file(1))
    assert line.may(file(1), now)
    assert line.next(now) == file(1)
    line.put_off(file(1), now)
    line.done(file(1))
    assert line.next_due() is None


def test_what_does_not_fit_is_left_to_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_line, "LIMIT", 3)
    line = Line()
    for number in range(3):
        line.note(file(number))
    assert not line.overflown
    line.note(file(3))
    assert line.overflown
    line = Line()
    for number in range(4):
        line.put_off(file(number), 0)
    assert line.overflown
    assert line.may(file(0), 0)
    assert not line.may(file(3), 0)


def test_a_meter_shows_the_rate_of_late() -> None:
    meter = Meter(0.0)
    assert meter.rate(0.0) == 0.0
    for second in range(1, 200):
        meter.add(100, float(second))
        assert 90 <= meter.rate(float(second)) <= 125 or second < 5
    assert meter.rate(1000.0) < 1


async def test_a_pause_holds_until_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    pace = HashPace(rate=0, idle=5, paused=True)
    assert pace.paused
    with trio.move_on_after(1000) as scope:
        await pace.turn()
    assert scope.cancelled_caught
    pace.resume()
    assert await pace.turn() == FAST_CHUNK
    pace.pause()
    assert pace.paused


async def test_no_more_is_read_than_the_rate_allows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pace = HashPace(rate=100 << 20, idle=5, paused=False)
    began, count = trio.current_time(), 0
    while trio.current_time() - began < 60:
        allowed = await pace.turn()
        pace.read(allowed // 2, allowed)
        count += allowed // 2
    assert 0.95 < count / (60 * (100 << 20)) < 1.05
    assert 0.9 < pace.meter.rate(trio.current_time()) / (100 << 20) < 1.1


async def test_a_path_that_nobody_reads_is_hashed_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lane = Lane("p", deadline=5)
    path = PathPace(HashPace(rate=0, idle=5, paused=False), lane)
    began = trio.current_time()
    for _ in range(10):
        path.read(CHUNK, await path.turn(), seconds=1)
    assert trio.current_time() - began < 1


async def test_readers_come_first(autojump_clock: trio.testing.MockClock) -> None:
    lane = Lane("p", deadline=5)
    path = PathPace(HashPace(rate=0, idle=5, paused=False), lane)
    path.read(CHUNK, await path.turn(), seconds=10)
    began = trio.current_time()
    lane.used_at = began
    assert path.waits
    await path.turn()  # once nobody read for a while
    assert trio.current_time() - began == pytest.approx(5, abs=0.5)


async def test_a_path_that_is_always_read_gives_hashing_a_share(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lane = Lane("p", deadline=5)
    path = PathPace(HashPace(rate=0, idle=5, paused=False), lane)

    async def read() -> None:
        while True:
            lane.used_at = trio.current_time()
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        began, busy = trio.current_time(), 0.0
        while trio.current_time() - began < 100:
            allowed = await path.turn()
            await trio.sleep(0.2)
            busy += 0.2
            path.read(CHUNK, allowed, seconds=0.2)
        nursery.cancel_scope.cancel()
    assert busy / 100 == pytest.approx(1 / (1 + READERS_SHARE), rel=0.2)


async def test_a_turn_that_is_cancelled_costs_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    lane = Lane("p", deadline=5)
    pace = HashPace(rate=1 << 20, idle=1000, paused=False)
    path = PathPace(pace, lane)
    path.read(0, await path.turn(), seconds=1000)
    lane.used_at = trio.current_time()
    for _ in range(100):
        with trio.move_on_after(1):
            await path.turn()
    began = trio.current_time()
    await pace.turn()
    assert trio.current_time() - began < 1


async def test_what_runs_in_the_background_is_no_reader() -> None:
    lane = Lane("p", deadline=5)
    await lane.run(lambda: None, what="hash", background=True)
    assert lane.used_at < 0
    await lane.run(lambda: None, what="read")
    assert lane.used_at > 0
