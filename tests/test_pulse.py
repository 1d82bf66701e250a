"""Whether a disk answers: what opens and closes a lane's breaker, and what hangs meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from sectorfs.errors import StorageUnavailable
from sectorfs.stores import pulse
from sectorfs.stores.lanes import Lane
from sectorfs.stores.pulse import HUNG_PROBES, ask_disk, mount_of
from tests.cluster_fixtures import mounted
from tests.local_fixtures import until

DEADLINE = 0.2


class Disk:
    """A disk that answers while its gate is open, and notes what hangs in it."""

    def __init__(self, stack: ExitStack) -> None:
        self.gates: list[threading.Event] = []
        self.asked = 0
        self._stack = stack
        self.go()

    def hang(self) -> None:
        """Answer nothing from now on."""
        gate = threading.Event()
        self._stack.callback(gate.set)
        self.gates.append(gate)

    def go(self) -> None:
        """Answer everything."""
        for gate in self.gates:
            gate.set()

    def ask(self) -> None:
        """What a probe does."""
        self.asked += 1
        self.call()

    def call(self) -> str:
        """Any other work of it."""
        if self.gates:
            self.gates[-1].wait()
        return "done"


@pytest.fixture
def disk() -> Iterator[Disk]:
    with ExitStack() as stack:
        yield Disk(stack)


@pytest.fixture
def lane(disk: Disk) -> Lane:
    return Lane("/disk", deadline=DEADLINE, ask=disk.ask)


async def fall_silent(lane: Lane, disk: Disk) -> None:
    """One call pays the deadline."""
    disk.hang()
    with pytest.raises(StorageUnavailable, match=r"read: no answer within 0.2 s"):
        await lane.run(disk.call, what="read")


async def test_after_one_deadline_nobody_waits_any_more(lane: Lane, disk: Disk) -> None:
    changes: list[str] = []
    lane.pulse.changed = lambda: changes.append(lane.pulse.silence)
    await fall_silent(lane, disk)
    assert changes == ["read: no answer within 0.2 s"]
    busy, started = lane.busy, trio.current_time()
    for ask in (lane.run, lane.share):
        with pytest.raises(StorageUnavailable, match=r"/disk: read: no answer") as caught:
            await ask(disk.call, what="open")
        assert caught.value.hint == "check the disk"
    assert trio.current_time() - started < DEADLINE
    assert lane.busy == busy
    disk.go()
    await until(lambda: not lane.pulse.silence)
    assert await lane.run(disk.call, what="read") == "done"
    assert changes == ["read: no answer within 0.2 s", ""]


async def test_a_slow_call_on_a_disk_that_answers_refuses_nobody(lane: Lane, disk: Disk) -> None:
    release = threading.Event()
    try:
        with pytest.raises(StorageUnavailable):
            await lane.run(release.wait, what="read a bad sector")
        assert disk.asked == 1
        assert lane.pulse.silence == ""
        assert await lane.run(disk.call, what="read") == "done"
    finally:
        release.set()


async def test_calls_that_are_quick_ask_nothing_of_the_disk(lane: Lane, disk: Disk) -> None:
    for _ in range(20):
        assert await lane.run(disk.call, what="read") == "done"
    assert disk.asked == 0


async def test_an_error_is_an_answer(disk: Disk) -> None:
    release = threading.Event()

    def fail() -> None:
        raise OSError("broken")

    lane = Lane("/disk", deadline=DEADLINE, ask=fail)
    try:
        with pytest.raises(StorageUnavailable):
            await lane.run(release.wait, what="read")
        assert lane.pulse.silence == ""
    finally:
        release.set()


async def test_many_readers_pay_one_deadline_and_send_one_probe(lane: Lane, disk: Disk) -> None:
    disk.hang()

    async def read() -> None:
        with pytest.raises(StorageUnavailable):
            await lane.run(disk.call, what="read")

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(read)
    assert trio.current_time() - started < 5 * DEADLINE
    assert disk.asked == 1


async def test_a_call_that_comes_back_late_is_an_answer(lane: Lane, disk: Disk) -> None:
    release = threading.Event()
    disk.hang()
    with pytest.raises(StorageUnavailable):
        await lane.run(release.wait, what="read")
    assert lane.pulse.silence
    release.set()  # the read comes back; the probe hangs on, as a request that got lost
    await until(lambda: not lane.pulse.silence)
    assert await lane.run(lambda: "done", what="read") == "done"


async def test_a_disk_that_hangs_for_long_holds_few_probes(
    lane: Lane, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "LONGEST_PAUSE", 1)
    lane = Lane("/disk", deadline=0.02, ask=disk.ask)
    disk.hang()
    with pytest.raises(StorageUnavailable):
        await lane.run(disk.call, what="read")
    await until(lambda: bool(lane.pulse.check()) and disk.asked == HUNG_PROBES)
    ends = trio.current_time() + 0.2
    await until(lambda: bool(lane.pulse.check()) and trio.current_time() > ends)
    assert disk.asked == HUNG_PROBES
    disk.go()
    await until(lambda: not lane.pulse.silence)


async def test_a_mount_that_was_replaced_is_asked_although_probes_hang(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "LONGEST_PAUSE", 1)
    mounts = ["21"]
    monkeypatch.setattr(pulse, "mount_of", lambda path: mounts[-1])
    lane = Lane("/disk", deadline=0.02, ask=disk.ask)
    disk.hang()
    with pytest.raises(StorageUnavailable):
        await lane.run(disk.call, what="read")
    with pytest.raises(StorageUnavailable):
        await lane.share(disk.call, what="statfs")
    await until(lambda: bool(lane.pulse.check()) and disk.asked == HUNG_PROBES)
    stuck = disk.gates.pop()
    mounts.append("22")  # umount -l, and another disk mounted there
    await until(lambda: not lane.pulse.check())
    assert await lane.share(disk.call, what="statfs") == "done"
    assert not stuck.is_set()


# What one thread does for all


async def test_shared_calls_are_one(lane: Lane) -> None:
    calls, gate, answers = list[int](), threading.Event(), list[int]()

    def statfs() -> int:
        calls.append(1)
        gate.wait()
        return 7

    async def ask() -> None:
        answers.append(await lane.share(statfs, what="statfs"))

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await until(lambda: bool(calls))
            assert await lane.share(lambda: 8, what="another question") == 8
            gate.set()
    finally:
        gate.set()
    assert (answers, calls) == ([7] * 5, [1])
    assert await lane.share(lambda: 9, what="statfs") == 9
    assert lane.busy == 0


async def test_a_shared_call_that_hangs_is_not_made_again(lane: Lane) -> None:
    calls, gate = list[int](), threading.Event()

    def statfs() -> None:
        calls.append(1)
        gate.wait()

    try:
        with pytest.raises(StorageUnavailable, match="statfs: no answer"):
            await lane.share(statfs, what="statfs")
        started = trio.current_time()
        with pytest.raises(StorageUnavailable, match="statfs: no answer"):
            await lane.share(statfs, what="statfs")
        assert trio.current_time() - started < DEADLINE
        assert (len(calls), lane.busy) == (1, 1)
        assert lane.pulse.silence == ""  # it is only statfs that hangs
    finally:
        gate.set()
    await until(lambda: lane.busy == 0)


async def test_one_who_leaves_takes_a_shared_call_from_nobody(lane: Lane) -> None:
    gate, answers = threading.Event(), list[str]()

    def statfs() -> str:
        gate.wait()
        return "space"

    async def ask() -> None:
        answers.append(await lane.share(statfs, what="statfs"))

    try:
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0):
                await lane.share(statfs, what="statfs")
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
    finally:
        gate.set()
    assert answers == ["space"]


async def test_who_shares_a_call_learns_of_silence_at_once(lane: Lane, disk: Disk) -> None:
    learned: list[float] = []

    async def beat() -> None:
        await trio.sleep(DEADLINE / 2)
        with pytest.raises(StorageUnavailable, match=r"read: no answer within 0.2 s"):
            await lane.share(disk.call, what="health check")
        learned.append(trio.current_time())

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        await fall_silent(lane, disk)
    assert learned[0] - started < 1.5 * DEADLINE


async def test_errors_of_a_shared_call_reach_everybody(lane: Lane) -> None:
    def fail() -> None:
        raise OSError(5, "broken")

    for _ in range(2):
        with pytest.raises(Exception, match="statfs: broken"):
            await lane.share(fail, what="statfs")
    assert lane.busy == 0


async def test_a_lane_full_of_what_hangs_refuses_at_once(disk: Disk) -> None:
    lane = Lane("/disk", deadline=DEADLINE, width=3, ask=disk.ask)
    release = threading.Event()

    async def hang() -> None:
        with pytest.raises(StorageUnavailable):
            await lane.run(release.wait, what="read")

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(hang)
        started = trio.current_time()
        with pytest.raises(StorageUnavailable, match="3 calls: no answer within"):
            await lane.run(disk.call, what="read")
        assert trio.current_time() - started < DEADLINE
    finally:
        release.set()
    await until(lambda: lane.busy == 0)
    assert await lane.run(disk.call, what="read") == "done"


# Asking a disk


def test_a_disk_is_asked_whatever_is_there(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path/sectorstore.json").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    for name in (
        "path",
        "path/sectorstore.json",
        "fifo",
        "nothing",
        ".",
        "path/sectorstore.json/x",
    ):
        ask_disk(str(tmp_path / name))


def test_the_mount_of_a_path_is_known_by_name(tmp_path: Path) -> None:
    outer = tmp_path / "with space"
    assert mount_of(str(outer)) == mount_of(str(tmp_path)) != ""
    with mounted("-t", "tmpfs", "none", at=outer):
        number = mount_of(str(outer))
        assert number == mount_of(str(outer / "path/below"))
        assert number not in ("", mount_of(str(tmp_path)), mount_of(f"{outer}-beside"))
        with mounted("-t", "tmpfs", "none", at=outer):
            assert mount_of(str(outer)) != number
        assert mount_of(str(outer)) == number


# Calls that end after the loop


def test_a_result_that_comes_after_the_loop_is_discarded(tmp_path: Path) -> None:
    gate, discarded = threading.Event(), threading.Event()

    async def give_up() -> None:
        lane = Lane(str(tmp_path), deadline=0.02)
        with pytest.raises(StorageUnavailable):
            await lane.run(gate.wait, what="open", discard=lambda result: discarded.set())

    call: Callable[[], object] = gate.set
    trio.run(give_up)
    assert not discarded.is_set()
    call()
    assert discarded.wait(10)
