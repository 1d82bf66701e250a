"""Lanes: a bound on threads, a deadline on waiting, and nothing leaked by calls that come late."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from sectorfs.errors import (
    DiskError,
    DiskFull,
    NotFound,
    PermissionRefused,
    Refused,
    SectorFSError,
    StorageUnavailable,
)
from sectorfs.stores.lanes import DEFAULT_WIDTH, Descriptor, Lane
from sectorfs.stores.wanted import Wanted
from tests.local_fixtures import until


def lane(**changes: float) -> Lane:
    return Lane("/disk", **{"deadline": 30.0, **changes})  # type: ignore[arg-type]  # width is one


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


async def test_the_result_of_a_call() -> None:
    here = threading.get_ident()
    assert await lane().run(threading.get_ident, what="x") != here
    assert await lane().finish(threading.get_ident, what="x") != here


@pytest.mark.parametrize(
    ("number", "family"),
    [
        (errno.ENOENT, NotFound),
        (errno.EACCES, PermissionRefused),
        (errno.EROFS, PermissionRefused),
        (errno.ENOSPC, DiskFull),
        (errno.EIO, DiskError),
    ],
)
async def test_errors_of_the_system_are_translated(
    number: int, family: type[SectorFSError]
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    for method in (lane().run, lane().finish):
        with pytest.raises(family, match="read it: ") as caught:
            await method(fail, what="read it")
        assert str(caught.value).startswith("/disk: ")
        assert isinstance(caught.value.__cause__, OSError)


async def test_errors_of_the_family_pass() -> None:
    def fail() -> None:
        raise Refused("no")

    with pytest.raises(Refused):
        await lane().run(fail, what="x")


async def test_a_call_that_hangs_is_given_up(gate: threading.Event) -> None:
    hung = lane(deadline=0.05)
    try:
        with pytest.raises(StorageUnavailable, match=r"read: no answer within 0.05 s"):
            await hung.run(gate.wait, what="read")
        assert hung.busy == 1  # it keeps its place: the bound on stuck threads
    finally:
        gate.set()
    await until(lambda: hung.busy == 0)


async def test_a_full_lane_costs_a_deadline_and_no_thread(gate: threading.Event) -> None:
    full = lane(deadline=0.2, width=2)
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(give_up, full, gate.wait)
            await until(lambda: full.busy == 2)
            threads, ran = threading.active_count(), list[int]()
            with pytest.raises(StorageUnavailable):
                await full.run(lambda: ran.append(3), what="third")
            assert not ran
            assert threading.active_count() <= threads + 1  # one asks whether the disk answers
    finally:
        gate.set()
    await until(lambda: full.busy == 0)
    await full.run(lambda: None, what="again")


async def give_up(hung: Lane, call: Callable[[], object]) -> None:
    with pytest.raises(StorageUnavailable):
        await hung.run(call, what="hang")


async def test_one_full_lane_leaves_another_alone(gate: threading.Event) -> None:
    full, other = lane(deadline=5), lane(deadline=5)
    try:
        with trio.fail_after(4):
            async with trio.open_nursery() as nursery:
                for _ in range(DEFAULT_WIDTH):
                    nursery.start_soon(give_up, full, gate.wait)
                await until(lambda: full.busy == DEFAULT_WIDTH)
                assert await other.run(lambda: "quick", what="x") == "quick"
                nursery.cancel_scope.cancel()
    finally:
        gate.set()
    await until(lambda: full.busy == 0)


async def test_a_late_result_is_discarded(gate: threading.Event, tmp_path: Path) -> None:
    opened: list[int] = []

    def open_late() -> int:
        gate.wait()
        opened.append(os.open(tmp_path, os.O_RDONLY))
        return opened[0]

    with pytest.raises(StorageUnavailable):
        await lane(deadline=0.05).run(open_late, what="open", discard=os.close)
    gate.set()
    await until(lambda: opened and not is_open(opened[0]))


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


async def test_a_cancelled_call_is_discarded_and_quick(
    gate: threading.Event, tmp_path: Path
) -> None:
    opened: list[int] = []
    started = threading.Event()

    def open_late() -> int:
        started.set()
        gate.wait()
        opened.append(os.open(tmp_path, os.O_RDONLY))
        return opened[0]

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_in, lane(), open_late)
            await until(started.is_set)
            nursery.cancel_scope.cancel()
    gate.set()
    await until(lambda: opened and not is_open(opened[0]))


async def open_in(where: Lane, call: Callable[[], int]) -> None:
    await where.run(call, what="open", discard=os.close)


async def test_a_result_that_was_received_is_kept() -> None:
    discarded: list[int] = []
    assert await lane().run(lambda: 5, what="x", discard=discarded.append) == 5
    assert discarded == []


async def test_finish_runs_to_its_end_although_cancelled(gate: threading.Event) -> None:
    started = threading.Event()
    done: list[bool] = []

    def write() -> None:
        started.set()
        gate.wait()
        done.append(True)

    async def finish() -> None:
        await lane(deadline=0.01).finish(write, what="write")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish)
        await until(started.is_set)
        nursery.cancel_scope.cancel()
        gate.set()
    assert done == [True]


# Descriptors


@pytest.fixture
def descriptor(tmp_path: Path) -> Descriptor:
    return Descriptor(os.open(tmp_path, os.O_RDONLY))


def test_a_descriptor_closes_once(descriptor: Descriptor) -> None:
    with descriptor as fd:
        assert is_open(fd)
    assert not descriptor.closed
    descriptor.close()
    assert descriptor.closed
    assert not is_open(fd)
    other = os.open("/", os.O_RDONLY)  # takes the number over
    try:
        descriptor.close()
        assert other != fd or is_open(fd)
        with pytest.raises(OSError, match="closed"), descriptor:
            pass
    finally:
        os.close(other)


def test_a_descriptor_in_use_closes_with_its_last_user(descriptor: Descriptor) -> None:
    with descriptor as fd:
        with descriptor:
            descriptor.close()
            assert is_open(fd)
        assert is_open(fd)
    assert not is_open(fd)


async def test_a_hung_reader_keeps_its_descriptor(
    descriptor: Descriptor, gate: threading.Event
) -> None:
    numbers: list[int] = []

    def read() -> None:
        with descriptor as fd:
            numbers.append(fd)
            gate.wait()

    await give_up(lane(deadline=0.1), read)
    descriptor.close()
    assert is_open(numbers[0])
    gate.set()
    await until(lambda: not is_open(numbers[0]))


async def test_a_lane_closes_its_descriptors_in_a_thread(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = lane()
    numbers = [os.open(tmp_path, os.O_RDONLY) for _ in range(3)]
    real, threads = os.close, set[int]()

    def close(fd: int) -> None:
        if fd in numbers:
            threads.add(threading.get_ident())
            gate.wait()
        real(fd)

    monkeypatch.setattr(os, "close", close)
    for fd in numbers:
        where.descriptor(fd).close()  # would hang here if the loop closed
    assert all(is_open(fd) for fd in numbers)
    gate.set()
    await until(lambda: not any(is_open(fd) for fd in numbers))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_a_failed_close_is_told_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where = lane()
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        if fd == fds[0]:
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "close", close)
    for fd in fds:
        where.descriptor(fd).close()
    await until(lambda: not any(is_open(fd) for fd in fds))
    await until(lambda: "close" in caplog.text)


async def test_a_write_is_finished_and_timed(gate: threading.Event) -> None:
    where = lane(deadline=0.05, patience=30)
    assert where.longest_write() == 0
    done: list[str] = []

    def write() -> None:
        gate.wait()
        done.append("written")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(where.finish, write, what="write"))
        await until(lambda: where.longest_write() > 0.1)  # past the deadline it goes on
        assert not done
        gate.set()
    assert done == ["written"]
    assert where.longest_write() == 0


async def test_a_write_that_hangs_is_given_up_and_keeps_its_place(gate: threading.Event) -> None:
    where = lane(patience=0.05, width=1)
    with pytest.raises(StorageUnavailable, match=r"write: no answer within 0.05 s"):
        await where.finish(gate.wait, what="write")
    assert where.busy == 1
    assert where.longest_write() > 0
    with pytest.raises(StorageUnavailable):
        await where.finish(lambda: None, what="another write")
    gate.set()
    await until(lambda: where.busy == 0)
    assert where.longest_write() == 0
    assert await where.finish(lambda: 5, what="write") == 5


async def test_a_write_that_has_not_begun_can_be_cancelled(gate: threading.Event) -> None:
    where = lane(width=1)
    begun: list[bool] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(where.finish, gate.wait, what="first"))
        await until(lambda: where.busy == 1)
        with trio.move_on_after(0.05) as scope:
            await where.finish(lambda: begun.append(True), what="second")
        assert scope.cancelled_caught
        gate.set()
    assert where.busy == 0
    assert begun == []


async def test_what_nobody_waits_for_is_told_so(gate: threading.Event) -> None:
    where = lane(patience=0.05)
    shown: list[str] = []

    def write() -> None:
        wanted.require("the file")
        gate.wait()
        wanted.require("the file")
        shown.append("late")

    with pytest.raises(StorageUnavailable), Wanted() as wanted:
        await where.finish(write, what="write")
    gate.set()
    await until(lambda: where.busy == 0)
    assert shown == []
