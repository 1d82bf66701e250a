"""What comes over a socket gets into the file as it is, past the page cache as through it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from sectorfs.errors import DiskFull
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.wire.client import Client
from sectorfs.wire.sink import BUFFER, EAGER, Sieve
from tests.wire_fixtures import (
    PATIENT,
    fds_return_to,
    open_fds,
    peer,
    read_request,
    says,
    wait_until,
)

PAGE = mmap.PAGESIZE
DATA = os.urandom(3 * BUFFER + 5 * PAGE + 77)
SIZES = [1, PAGE - 1, PAGE, PAGE + 1, BUFFER, BUFFER + 1, len(DATA)]

Writes = list[tuple[bool, int, int]]
"""Whether it went past the page cache, bytes and offset of each."""
Pwrite = Callable[[int, memoryview, int], int]


@contextmanager
def opened(path: Path) -> Iterator[Descriptor]:
    descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT))
    try:
        yield descriptor
    finally:
        descriptor.close()


def is_direct(fd: int) -> bool:
    """Whether what is written there goes past the page cache."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    """What is written."""
    made: Writes = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        count = real(fd, data, offset)
        made.append((is_direct(fd), count, offset))
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    return made


async def save(
    path: Path,
    data: bytes,
    *,
    offset: int = 0,
    sieve: Sieve | None = None,
    pieces: int = 0,
) -> list[int]:
    """Save an answer past the cache, sent in pieces or at once; what `progress` was told."""
    steps: list[int] = []

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data))
        for at in range(0, len(data), pieces or len(data)):
            await stream.send_all(data[at : at + (pieces or len(data))])

    async with (
        peer(script) as url,
        Client(PATIENT) as client,
        client.request("GET", url) as response,
    ):
        with opened(path) as descriptor:
            done = await response.save(
                descriptor,
                offset=offset,
                length=len(data),
                run=Lane("disk", deadline=5).finish,
                past_cache=True,
                progress=steps.append,
                sieve=sieve,
            )
    assert done == len(data)
    return steps


@pytest.mark.parametrize("pieces", [0, 10_001])
@pytest.mark.parametrize("size", SIZES)
async def test_whole_pages_go_past_the_cache(
    tmp_path: Path, writes: Writes, size: int, pieces: int
) -> None:
    steps = await save(tmp_path / "f", DATA[:size], pieces=pieces)
    past = sum(count for direct, count, _ in writes if direct)
    assert past == size // PAGE * PAGE
    assert (tmp_path / "f").read_bytes() == DATA[:size]
    assert steps == sorted(steps)
    assert steps[-1] == size


@pytest.mark.parametrize("offset", [PAGE, BUFFER - PAGE, 7])
async def test_it_begins_anywhere(tmp_path: Path, writes: Writes, offset: int) -> None:
    await save(tmp_path / "f", DATA, offset=offset)
    assert any(direct for direct, _, _ in writes) is (offset != 7)
    assert (tmp_path / "f").read_bytes() == bytes(offset) + DATA
    ends = [at + count for _, count, at in writes][:-1]
    assert all(end % PAGE == 0 for end in ends if offset != 7)


async def test_what_is_sent_fast_is_written_up_to_a_megabyte_of_the_file(
    tmp_path: Path, writes: Writes
) -> None:
    await save(tmp_path / "f", DATA, offset=BUFFER - EAGER)
    # All but what came with the header.
    assert all(at // BUFFER == (at + count - 1) // BUFFER for _, count, at in writes[1:])


@pytest.mark.parametrize("size", SIZES)
async def test_a_sieve_sees_each_byte_once_and_in_order(tmp_path: Path, size: int) -> None:
    seen = bytearray()

    def sieve(view: memoryview) -> int:
        last = len(seen) + len(view) == size
        passed = len(view) if last else len(view) // EAGER * EAGER
        seen.extend(view[:passed])
        return passed

    await save(tmp_path / "f", DATA[:size], sieve=sieve, pieces=50_001)
    assert seen == DATA[:size]
    assert (tmp_path / "f").read_bytes() == DATA[:size]


def _refuses(real: Pwrite, calls: list[int]) -> Pwrite:
    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if is_direct(fd):
            calls.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, data, offset)

    return pwrite


def _cuts_short(real: Pwrite, calls: list[int]) -> Pwrite:
    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if is_direct(fd):
            calls.append(offset)
            return real(fd, data[:PAGE], offset)
        return real(fd, data, offset)

    return pwrite


@pytest.mark.parametrize("way", [_refuses, _cuts_short])
async def test_a_file_system_that_will_not_gets_it_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[Pwrite, list[int]], Pwrite]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "pwrite", way(os.pwrite, calls))
    await save(tmp_path / "f", DATA)
    assert calls == [0]  # it is asked once
    assert (tmp_path / "f").read_bytes() == DATA


async def test_a_file_that_opens_only_through_the_cache_is_opened_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.open, list[str]()

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            calls.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    await save(tmp_path / "f", DATA, pieces=10_001)
    assert len(calls) == 1
    assert (tmp_path / "f").read_bytes() == DATA


async def test_past_the_cache_it_is_the_same_file_and_stays_open_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = os.open, open_fds()

    def replaced(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT and not (tmp_path / "old").exists():
            (tmp_path / "f").rename(tmp_path / "old")
            (tmp_path / "f").write_bytes(b"another")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", replaced)
    await save(tmp_path / "f", DATA)
    assert (tmp_path / "old").read_bytes() == DATA
    assert (tmp_path / "f").read_bytes() == b"another"
    await fds_return_to(before)


async def test_a_full_disk_says_so() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4096\r\n\r\n" + bytes(4096)
    full = Descriptor(os.open("/dev/full", os.O_RDWR))
    async with peer(says(answer)) as url, Client(PATIENT) as client:
        run = Lane("disk", deadline=5).finish
        with pytest.raises(DiskFull, match=os.strerror(errno.ENOSPC)):
            async with client.request("GET", url) as response:
                await response.save(full, offset=0, length=4096, run=run)
    full.close()


async def test_a_slow_peer_holds_no_thread_and_is_heard_of(tmp_path: Path) -> None:
    """After every piece the peer waits until what came is told."""
    lane = Lane("disk", deadline=5)
    steps: list[int] = []

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(DATA))
        for at in range(0, len(DATA), 2 * EAGER):
            part = DATA[at : at + 2 * EAGER]
            await stream.send_all(part)
            end = at + len(part)
            await wait_until(lambda end=end: (steps or [0])[-1] == end and not lane.busy)

    async with (
        peer(script) as url,
        Client(PATIENT) as client,
        client.request("GET", url) as response,
    ):
        with trio.fail_after(60), opened(tmp_path / "f") as descriptor:
            await response.save(
                descriptor, offset=0, length=len(DATA), run=lane.finish, progress=steps.append
            )
    assert (tmp_path / "f").read_bytes() == DATA


async def test_what_came_with_the_header_waits_for_nothing(tmp_path: Path) -> None:
    early, steps = DATA[: 2 * EAGER], list[int]()

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(DATA)
        await stream.send_all(head + early)
        await wait_until(lambda: steps[-1:] == [len(early)])
        await stream.send_all(DATA[len(early) :])

    async with (
        peer(script) as url,
        Client(PATIENT) as client,
        client.request("GET", url) as response,
    ):
        with opened(tmp_path / "f") as descriptor:
            await response.save(
                descriptor,
                offset=0,
                length=len(DATA),
                run=Lane("disk", deadline=5).finish,
                past_cache=True,
                progress=steps.append,
            )
    assert (tmp_path / "f").read_bytes() == DATA


async def test_one_answer_may_be_all(tmp_path: Path) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    async with peer(says(answer)) as url, Client(PATIENT) as client:
        with opened(tmp_path / "f") as descriptor:
            async with client.request("GET", url) as response:
                run = Lane("disk", deadline=5).finish
                assert await response.save(descriptor, offset=0, length=5, run=run) == 5
    assert (tmp_path / "f").read_bytes() == b"hello"
