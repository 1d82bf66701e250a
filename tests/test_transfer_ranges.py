"""Ranges of a file from peers: each one asked for, of one version, or an error that says why."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sectorfs.errors import NoRanges, SectorFSError, SourceFailed, Stale, TimedOut, Unreachable
from sectorfs.stores.answers import Version
from sectorfs.stores.lanes import Lane
from sectorfs.stores.transfer import PeerClient
from sectorfs.wire.client import Client
from tests.test_transfer import CACHE, SEALED, answer, asking, our_node, target
from tests.wire_fixtures import PATIENT, fds_return_to, open_fds, peer, read_request

Spans = list[tuple[int, int]]
SPREAD: Spans = [(0, 10), (65_536, 131_072), (1_999_999, 2_000_000)]


def into(found: dict[int, bytes]) -> Callable[[int, bytes, bytes], object]:
    """Puts what is delivered into a dict."""
    return lambda start, data, told: found.__setitem__(start, data)


async def ranges(
    client: PeerClient, base: str, spans: Spans, *, expect: Version | None = None
) -> tuple[dict[int, bytes], Version]:
    found: dict[int, bytes] = {}
    version = await client.ranges(
        base, SEALED, None, spans, expect=expect, leaves=False, deliver=into(found)
    )
    return found, version


async def receive(
    client: PeerClient,
    base: str,
    path: Path,
    span: tuple[int, int],
    *,
    expect: Version | None = None,
) -> tuple[list[int], Version]:
    lane, steps = Lane("disk", deadline=5), list[int]()
    with target(path) as descriptor:
        version = await client.receive(
            base,
            SEALED,
            None,
            span,
            descriptor,
            expect=expect,
            run=lane.finish,
            progress=steps.append,
        )
    return steps, version


async def test_one_and_several_ranges(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        data = (tmp_path / str(SEALED)).read_bytes()
        for spans in ([(5, 6)], SPREAD):
            found, version = await ranges(client, base, spans)
            assert found == {start: data[start:end] for start, end in spans}
        status = (tmp_path / str(SEALED)).stat()
        assert (version.size, version.mtime_ns) == (2_000_000, status.st_mtime_ns)
        assert version.etag
        assert (await ranges(client, base, [(0, 1)], expect=version))[1] == version


async def test_a_file_of_a_directory(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        found: dict[int, bytes] = {}
        await client.ranges(
            base, CACHE, "p_aux", [(1, 3), (7, 9)], expect=None, leaves=False, deliver=into(found)
        )
        assert found == {1: b"pp", 7: b"pp"}


async def test_a_range_into_its_place(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        data = (tmp_path / str(SEALED)).read_bytes()
        steps, version = await receive(client, base, tmp_path / "copy", (500_000, 1_900_000))
        assert steps[-1] == 1_400_000
        assert version.size == 2_000_000
        with (tmp_path / "copy").open("rb") as copy:
            assert copy.seek(500_000) == 500_000
            assert copy.read() == data[500_000:1_900_000]


async def test_another_version_is_stale_and_brings_nothing(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        _, version = await ranges(client, base, [(0, 1)])
        new = tmp_path / "new"
        new.write_bytes(os.urandom(2_000_000))
        os.utime(new, ns=(0, version.mtime_ns))  # only the ETag tells
        new.rename(tmp_path / str(SEALED))
        for spans in ([(0, 1)], SPREAD):
            with pytest.raises(Stale):
                await ranges(client, base, spans, expect=version)
        with pytest.raises(Stale):
            await receive(client, base, tmp_path / "copy", (0, 10), expect=version)
        assert (tmp_path / "copy").read_bytes() == b""


async def test_a_range_beyond_the_end(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        for spans in ([(2_000_000, 2_000_001)], [(1_999_999, 2_000_001)], [(0, 1), (5_000_000, 6)]):
            with pytest.raises(SectorFSError):
                await ranges(client, base, spans)


def parted(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    body = b"".join(
        f"\r\n--{boundary}\r\ncontent-range: bytes {extent}\r\n\r\n".encode() + data
        for extent, data in parts
    )
    return body[2:] + f"\r\n--{boundary}--".encode()


TWO: Spans = [(0, 2), (4, 6)]
KIND = "multipart/byteranges; boundary=b"


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (answer(200, b"abcdefgh"), NoRanges, "whole file instead of a range"),
        (answer(206, b"ab", "Content-Range: bytes 0-1/8"), SourceFailed, "several ranges"),
        (answer(206, b"rubbish", kind=KIND), SourceFailed, "cannot be read"),
        (
            answer(206, parted(("4-5/8", b"ef"), ("0-1/8", b"ab")), kind=KIND),
            SourceFailed,
            "other ranges",
        ),
        (answer(206, parted(("0-1/8", b"ab")), kind=KIND), SourceFailed, "other ranges"),
        (
            answer(206, parted(("0-1/8", b"ab"), ("4-5/9", b"ef")), kind=KIND),
            SourceFailed,
            "total",
        ),
        (
            answer(206, parted(("0-1/*", b"ab"), ("4-5/*", b"ef")), kind=KIND),
            SourceFailed,
            "total",
        ),
        (answer(206, b"x" * 100_000, kind=KIND), SectorFSError, "more than"),
        (answer(416, b"", "Content-Range: bytes */3"), Stale, "shorter file"),
        (b"HTTP/1.1 206 X\r\nContent-Length: 50\r\n\r\n", Unreachable, "broke off|unexpected"),
    ],
)
async def test_answers_of_several_ranges_that_are_none(
    data: bytes, error: type[Exception], text: str
) -> None:
    async with asking(data) as (client, base):
        with pytest.raises(error, match=text):
            await ranges(client, base, TWO)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (answer(206, b"ab", "Content-Range: bytes 1-2/8"), "another range"),
        (answer(206, b"ab", "Content-Range: bytes 0-2/8"), "another range"),
        (answer(206, b"ab", "Content-Range: bytes 0-1/*"), "total"),
        (answer(206, b"ab"), "Content-Range"),
        (answer(206, b"ab", "Content-Range: bytes 0-1/8", kind="text/html"), "type"),
    ],
)
async def test_answers_of_one_range_that_are_another(
    tmp_path: Path, data: bytes, text: str
) -> None:
    async with asking(data) as (client, base):
        with pytest.raises(SourceFailed, match=text):
            await ranges(client, base, [(0, 2)])
        with pytest.raises(SourceFailed, match=text):
            await receive(client, base, tmp_path / "copy", (0, 2))


async def test_a_peer_that_stalls_costs_its_time_out(tmp_path: Path) -> None:
    head = answer(206, b"ab" * 50, "Content-Range: bytes 0-99/100")
    async with asking(head[:-50], stalls=True) as (client, base):
        with pytest.raises(TimedOut):
            await ranges(client, base, [(0, 100)])
        with pytest.raises(TimedOut):
            await receive(client, base, tmp_path / "copy", (0, 100))


async def test_a_cancelled_request_leaves_nothing(tmp_path: Path) -> None:
    before = open_fds()
    head = answer(206, b"ab" * 50, "Content-Range: bytes 0-99/100")
    async with asking(head[:-50], stalls=True) as (client, base):
        for _ in range(2):
            with trio.move_on_after(0.1):
                await ranges(client, base, [(0, 100)])
            with trio.move_on_after(0.1):
                await receive(client, base, tmp_path / "copy", (0, 100))
    await fds_return_to(before)


async def test_a_whole_file_for_a_range_is_not_read() -> None:
    """The connection is closed at once: what comes on it is nobody's."""
    head = b"HTTP/1.1 200 X\r\nContent-Length: 34359738368\r\n"
    head += b"Content-Type: application/octet-stream\r\n\r\n"
    hung_up = trio.Event()

    async def pour(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(head)
        try:
            while True:
                await stream.send_all(bytes(65_536))
        except trio.BrokenResourceError:
            hung_up.set()

    async with peer(pour) as url, Client(PATIENT) as client:
        with pytest.raises(NoRanges):
            await ranges(PeerClient(client), url, [(0, 10)])
        with trio.fail_after(10):
            await hung_up.wait()


@pytest.mark.parametrize(
    "data",
    [
        answer(500, b"no"),
        answer(503, b"too many connections\n", "Retry-After: 1"),
        answer(302, b"", "Location: http://elsewhere/"),
    ],
)
async def test_answers_after_which_another_source_is_asked(data: bytes) -> None:
    async with asking(data) as (client, base):
        with pytest.raises(SourceFailed, match=r"status \d+ instead of 206") as caught:
            await ranges(client, base, [(0, 10)])
        assert caught.value.retry
        with pytest.raises(SourceFailed, match=r"status \d+"):
            await client.facts(base, SEALED)
