"""Work that nobody waits for keeps to its rate, and reads little while others do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from sectorfs.stores import bulk_pace
from sectorfs.stores.bulk_pace import LONGEST, LOOK, OTHERS, YIELD, BulkPace, DiskUse

DEVICE = os.makedev(8, 1)
MIB = 1 << 20


class Disk:
    """What the kernel counts for a disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file = root / "8:1" / "stat"
        self._file.parent.mkdir(parents=True)
        self.total = 0
        self.reads(0)

    def reads(self, count: int) -> None:
        """So many more bytes were read from it, by whomever."""
        self.total += count
        self._file.write_text(f"  12 0 {self.total // 512} 7 3 0 99 1 0 0 0\n")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk(tmp_path / "block")
    monkeypatch.setattr(bulk_pace, "_COUNTERS", found.root)
    return found


async def test_a_rate_holds_over_all_who_ask(autojump_clock: MockClock) -> None:
    pace = BulkPace(10 * MIB)
    began = trio.current_time()

    async def work() -> None:
        for _ in range(10):
            await pace.turn(MIB)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(work)
    assert trio.current_time() - began == pytest.approx(2.9)


async def test_time_that_passed_unused_is_not_saved_up(autojump_clock: MockClock) -> None:
    pace = BulkPace(MIB)
    await trio.sleep(100)
    began = trio.current_time()
    for _ in range(3):
        await pace.turn(MIB)
    assert trio.current_time() - began == pytest.approx(2)


async def test_without_a_rate_nothing_waits(autojump_clock: MockClock) -> None:
    pace = BulkPace(0)
    began = trio.current_time()
    for _ in range(100):
        await pace.turn(1 << 40)
    assert trio.current_time() == began


async def test_what_others_read_is_told_from_what_we_read(
    disk: Disk, autojump_clock: MockClock
) -> None:
    use = DiskUse(DEVICE, root=disk.root)
    for others, busy in ((0, False), (OTHERS * 2, True), (OTHERS * 2, True), (0, False)):
        await trio.sleep(1)
        disk.reads(50 * MIB + others)
        use.read(50 * MIB, 1)
        assert use.by_others() is busy


async def test_between_two_looks_the_last_one_holds(disk: Disk, autojump_clock: MockClock) -> None:
    use = DiskUse(DEVICE, root=disk.root)
    await trio.sleep(LOOK / 2)
    disk.reads(100 * MIB)
    assert not use.by_others()
    await trio.sleep(LOOK)
    assert use.by_others()
    assert use.by_others()


@pytest.mark.parametrize("text", ["", "1 2", "a b c d", "\0"])
async def test_counts_that_make_no_sense_count_nothing(
    disk: Disk, autojump_clock: MockClock, text: str
) -> None:
    (disk.root / "8:1" / "stat").write_text(text)
    use = DiskUse(DEVICE, root=disk.root)
    await trio.sleep(1)
    assert not use.by_others()
    assert not DiskUse(os.makedev(0, 99), root=disk.root).by_others()


async def test_others_who_read_go_first_and_the_work_goes_on(
    disk: Disk, autojump_clock: MockClock
) -> None:
    pace = BulkPace(0)
    await pace.done(DEVICE, 0, 0.1)
    for took, pause in ((0.3, YIELD * 0.3), (60, LONGEST)):
        await trio.sleep(took)
        disk.reads(100 * MIB)
        began = trio.current_time()
        await pace.done(DEVICE, 4 * MIB, took)
        assert trio.current_time() - began == pytest.approx(pause)
    await trio.sleep(5)
    disk.reads(4 * MIB)
    began = trio.current_time()
    await pace.done(DEVICE, 4 * MIB, 5)
    assert trio.current_time() == began, "nobody else reads any more"


async def test_what_others_did_between_two_runs_holds_up_nothing(
    disk: Disk, autojump_clock: MockClock
) -> None:
    pace = BulkPace(0)
    await pace.done(DEVICE, 0, 0.1)
    await trio.sleep(100)
    disk.reads(10_000 * MIB)
    began = trio.current_time()
    await pace.done(DEVICE, 4 * MIB, 0.1)
    assert trio.current_time() == began
