"""The client half of the peer protocol, against our own server and against peers that lie."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from sectorfs.errors import (
    Forbidden,
    NotFound,
    SourceFailed,
    StorageUnavailable,
    TimedOut,
    TooLarge,
    Unauthorized,
    Unreachable,
)
from sectorfs.index.protocol import FsStat
from sectorfs.metrics import FETCHED_BYTES, SOURCE_FAILURES
from sectorfs.server.routes import make_handler
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.transfer import Latency, PeerClient
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from sectorfs.wire.client import Client
from sectorfs.wire.tokens import Secret, sign
from tests.wire_fixtures import (
    PATIENT,
    QUICK,
    FolderFiles,
    fds_return_to,
    hang,
    open_fds,
    peer,
    read_request,
    running,
    says,
)

SECRET = Secret(bytes(range(32)))
STORAGE = StorageID("st-1")
SECTOR = SectorID(1000, 7)
SEALED = SectorFile(FileType.SEALED, SECTOR)
EMPTY = SectorFile(FileType.SEALED, SectorID(1000, 8))
CACHE = SectorFile(FileType.CACHE, SECTOR)
ABSENT = SectorFile(FileType.UPDATE, SECTOR)


async def no_rpc(body: bytes, permissions: frozenset[str]) -> tuple[int, bytes]:
    return 404, b""


@asynccontextmanager
async def our_node(
    root: Path, *, permissions: tuple[str, ...] = ("read",), key: Secret = SECRET
) -> AsyncIterator[tuple[PeerClient, str]]:
    """A node of ours over `root`, a client, and the node's base URL."""
    (root / "sealed").mkdir()
    (root / str(SEALED)).write_bytes(os.urandom(2_000_000))
    (root / str(EMPTY)).touch()
    (root / str(CACHE)).mkdir(parents=True)
    (root / str(CACHE) / "t_aux").write_bytes(b"t" * 10)
    (root / str(CACHE) / "p_aux").write_bytes(b"p" * 64)
    handler = make_handler(
        FolderFiles(root),
        secret=SECRET,
        rpc=no_rpc,
        health=dict,
        status=str,
        deadline=5,
    )
    token = sign(key, permissions)
    async with running(handler) as port, Client(PATIENT, token=token) as client:
        yield PeerClient(client), f"http://127.0.0.1:{port}/remote"


@asynccontextmanager
async def asking(answer: bytes, *, stalls: bool = False) -> AsyncIterator[tuple[PeerClient, str]]:
    """A peer that answers everything with the same bytes."""
    script = says(answer, then=hang) if stalls else says(answer)
    async with peer(script) as url, Client(QUICK) as client:
        yield PeerClient(client), url + "/remote"


def answer(status: int, body: bytes | str = b"", *headers: str, kind: str = "") -> bytes:
    data = body.encode() if isinstance(body, str) else body
    kind = kind or "application/octet-stream"
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", f"Content-Type: {kind}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


@contextmanager
def target(path: Path) -> Iterator[Descriptor]:
    descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT))
    try:
        yield descriptor
    finally:
        descriptor.close()


async def fetch(
    client: PeerClient,
    base: str,
    path: Path,
    size: int,
    file: SectorFile = SEALED,
    member: str | None = None,
    mtime_ns: int | None = None,
) -> list[int]:
    lane, steps = Lane("disk", deadline=5), list[int]()
    with target(path) as descriptor:
        await client.fetch(
            base,
            file,
            member,
            descriptor,
            size=size,
            mtime_ns=mtime_ns,
            run=lane.finish,
            progress=steps.append,
        )
    return steps


# Our own nodes


async def test_another_content_of_the_same_size_is_refused(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        held = (tmp_path / str(SEALED)).stat().st_mtime_ns
        await fetch(client, base, tmp_path / "copy", 2_000_000, mtime_ns=held)
        with pytest.raises(SourceFailed, match="another content than was declared"):
            await fetch(client, base, tmp_path / "stale", 2_000_000, mtime_ns=held + 1_000)
        assert (tmp_path / "stale").stat().st_size == 0


async def test_space(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        expected = FsStat(capacity=1000, available=900, fs_available=950, reserved=1, max=2, used=3)
        assert await client.stat(base, STORAGE) == expected
        assert await client.stat(base + "/", STORAGE) == expected
        with pytest.raises(NotFound):
            await client.stat(base, StorageID("st-2"))


async def test_facts(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        stat = (tmp_path / str(SEALED)).stat()
        assert await client.facts(base, SEALED) == Facts(2_000_000, stat.st_mtime_ns)
        facts = await client.facts(base, CACHE)
        names = ["p_aux", "t_aux"]
        stats = [(tmp_path / str(CACHE) / name).stat() for name in names]
        assert facts == Facts(
            74,
            (tmp_path / str(CACHE)).stat().st_mtime_ns,
            tuple(
                MemberFacts(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)
            ),
        )
        with pytest.raises(NotFound):
            await client.facts(base, ABSENT)


async def test_fetch_and_read(tmp_path: Path) -> None:
    before = FETCHED_BYTES._value.get()
    async with our_node(tmp_path) as (client, base):
        data = (tmp_path / str(SEALED)).read_bytes()
        steps = await fetch(client, base, tmp_path / "copy", len(data))
        assert (tmp_path / "copy").read_bytes() == data
        assert steps[-1] == len(data)
        assert await fetch(client, base, tmp_path / "none", 0, EMPTY) == []
        await fetch(client, base, tmp_path / "p", 64, CACHE, "p_aux")
        assert (tmp_path / "p").read_bytes() == b"p" * 64
        assert await client.read(base, SEALED, None, 1_999_000, 1000) == data[1_999_000:]
        assert await client.read(base, CACHE, "t_aux", 3, 4) == b"tttt"
        assert await client.read(base, SEALED, None, 5, 0) == b""
        assert FETCHED_BYTES._value.get() - before == len(data) + 64 + 1000 + 4
        assert 0 < client.latency(base) < 5
        assert client.latency("http://unknown:1/remote") == 0


async def test_a_fetch_of_another_size(tmp_path: Path) -> None:
    failures = SOURCE_FAILURES._value.get()
    async with our_node(tmp_path) as (client, base):
        with pytest.raises(SourceFailed, match="2000000 bytes instead of 5"):
            await fetch(client, base, tmp_path / "copy", 5)
    assert SOURCE_FAILURES._value.get() == failures + 1


async def test_a_range_beyond_the_file(tmp_path: Path) -> None:
    async with our_node(tmp_path) as (client, base):
        with pytest.raises(SourceFailed, match="another range"):
            await client.read(base, SEALED, None, 1_999_999, 2)
        with pytest.raises(SourceFailed, match="416"):
            await client.read(base, SEALED, None, 2_000_000, 1)


async def test_a_wrong_secret_and_a_weak_token(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with our_node(tmp_path / "a", key=Secret(bytes(32))) as (client, base):
        with pytest.raises(Unauthorized, match="copy the secret") as info:
            await client.facts(base, SEALED)
        assert info.value.thing == f"{base}/sealed/s-t01000-7"
    async with our_node(tmp_path / "b", permissions=()) as (client, base):
        with pytest.raises(Forbidden, match="read"):
            await client.read(base, SEALED, None, 0, 1)


# Other people's nodes


async def test_space_as_old_nodes_tell_it() -> None:
    body = '{"Capacity":9,"Available":-1,"Reserved":2,"Other":{}}\n'
    async with asking(answer(200, body, kind="text/plain; charset=utf-8")) as (client, base):
        assert await client.stat(base, STORAGE) == FsStat(capacity=9, available=-1, reserved=2)


async def test_size_of_a_file_where_head_is_not_offered() -> None:
    ranged = answer(
        206, b"x", "Content-Range: bytes 0-0/77", "Last-Modified: Thu, 01 Jan 1970 00:00:05 GMT"
    )
    empty = answer(416, b"", "Content-Range: bytes */0")
    for second, expected in ((ranged, Facts(77, 5 * 10**9)), (empty, Facts(0, 0))):

        async def script(stream: trio.SocketStream, second: bytes = second) -> None:
            request = await read_request(stream)
            if request.startswith(b"HEAD"):
                await stream.send_all(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
                request = await read_request(stream)
            assert b"bytes=0-0" in request
            await stream.send_all(second)
            await hang(stream)

        async with peer(script) as url, Client(QUICK) as client:
            assert await PeerClient(client).facts(url + "/remote", SEALED) == expected


async def test_a_fetch_in_chunks_with_parameters_in_the_type(tmp_path: Path) -> None:
    kind = "Application/Octet-Stream; x=y"
    data = (
        f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
        "3\r\nabc\r\n0\r\n\r\n"
    ).encode()
    async with asking(data) as (client, base):
        await fetch(client, base, tmp_path / "f", 3)
        assert (tmp_path / "f").read_bytes() == b"abc"


async def test_queries_of_base_urls_are_kept() -> None:
    seen: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        seen.append((await read_request(stream)).split(b"\r\n")[0])
        await stream.send_all(answer(200, "{}"))

    async with peer(script) as url, Client(QUICK) as client:
        await PeerClient(client).stat(url + "/remote/?a=b", STORAGE)
    assert seen == [b"GET /remote/stat/st-1?a=b HTTP/1.1"]


# Peers that lie


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (answer(404, "not here\n"), NotFound, "not here"),
        (answer(401), Unauthorized, "copy the secret"),
        (answer(403, "no"), Forbidden, "copy the secret"),
        (answer(500), SourceFailed, "status 500 instead of 200"),
        (answer(503, "disk\nsecond"), SourceFailed, "503 .*: disk"),
        (answer(500, b"\x00\xff\x1b[31m"), SourceFailed, "instead of 200$"),
        (answer(500, b"x" * 100_000), SourceFailed, "instead of 200$"),
        (answer(206, b"abc", "Content-Range: bytes 0-2/3"), SourceFailed, "206 instead of 200"),
        (answer(302, b"", "Location: /x"), SourceFailed, "302"),
        (answer(200, b"abc", kind="text/html"), SourceFailed, "content type 'text/html'"),
        (answer(200, b"abc", kind="application/octet-streamer"), SourceFailed, "content type"),
        (answer(200, b"abcd"), SourceFailed, "4 bytes instead of 3"),
        (answer(200, b"ab"), SourceFailed, "2 bytes instead of 3"),
        (answer(200, b"abc")[:-1], SourceFailed, "after 2 of 3"),
        (b"<html>\r\n\r\n", Unreachable, "no HTTP"),
        (b"", Unreachable, "without an answer"),
    ],
)
async def test_fetches_that_fail(
    tmp_path: Path, data: bytes, error: type[Exception], text: str
) -> None:
    before, failures = open_fds(), SOURCE_FAILURES._value.get()
    async with asking(data) as (client, base):
        with pytest.raises(error, match=text) as info:
            await fetch(client, base, tmp_path / "f", 3)
        assert "s-t01000-7" in str(info.value)
    await fds_return_to(before)
    assert SOURCE_FAILURES._value.get() == failures + 1


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (answer(200, b"abc"), SourceFailed, "200 instead of 206"),
        (answer(206, b"abc"), SourceFailed, "Content-Range"),
        (answer(206, b"abc", "Content-Range: bytes 0-2/9"), SourceFailed, "another range"),
        (answer(206, b"abc", "Content-Range: bytes */9"), SourceFailed, "another range"),
        (answer(206, b"abc", "Content-Range: bytes 5-7/7"), SourceFailed, "no sense"),
        (answer(206, b"abc", "Content-Range: bytes 7-5/9"), SourceFailed, "no sense"),
        (answer(206, b"abc", "Content-Range: lines 5-7/9"), SourceFailed, "Content-Range"),
        (answer(206, b"ab", "Content-Range: bytes 5-7/9"), SourceFailed, "2 bytes instead of 3"),
        (answer(206, b"abcd", "Content-Range: bytes 5-7/9"), TooLarge, "4 bytes"),
        (answer(206, b"abc", "Content-Range: bytes 5-7/9", kind="x"), SourceFailed, "type"),
        (answer(206, b"abc", "Content-Range: bytes 5-7/9")[:-1], Unreachable, "broke off"),
    ],
)
async def test_reads_that_fail(data: bytes, error: type[Exception], text: str) -> None:
    async with asking(data) as (client, base):
        with pytest.raises(error, match=text):
            await client.read(base, SEALED, None, 5, 3)


@pytest.mark.parametrize("total", ["9", "*"])
async def test_a_read_whose_total_is_unknown(total: str) -> None:
    async with asking(answer(206, b"abc", f"Content-Range: bytes 5-7/{total}")) as (client, base):
        assert await client.read(base, SEALED, None, 5, 3) == b"abc"


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "<html>",
        "[]",
        "{",
        '{"Capacity":"9"}',
        '{"Capacity":-9}',
        '{"Capacity":1e99}',
        '{"Used":9223372036854775808}',
        b'{"Capacity":\xff}',
    ],
)
async def test_space_that_is_nonsense(body: str | bytes) -> None:
    async with asking(answer(200, body)) as (client, base):
        with pytest.raises(SourceFailed, match="JSON"):
            await client.stat(base, STORAGE)


def listing(*names: str, size: object = 1) -> str:
    files = [{"Name": name, "Size": size, "MtimeNs": 0} for name in names]
    return json.dumps({"Size": 0, "MtimeNs": 5, "Files": files})


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{}",
        "<html>",
        '{"Size":0,"MtimeNs":0}',
        '{"Size":0,"MtimeNs":0,"Files":null}',
        '{"Size":-1,"MtimeNs":0,"Files":[]}',
        '{"Size":0,"MtimeNs":99999999999999999999,"Files":[]}',
        listing(".."),
        listing("a/b"),
        listing("a\0"),
        listing(""),
        listing("x" * 300),
        listing("a.tmp"),
        listing("a", "a"),
        listing("a", size=-1),
        listing("a", size="1"),
        listing("a", "b", size=2**63 - 1),
    ],
)
async def test_listings_that_are_nonsense(body: str) -> None:
    async with asking(answer(200, body)) as (client, base):
        with pytest.raises(SourceFailed):
            await client.facts(base, CACHE)


async def test_a_listing_is_put_in_order_and_added_up() -> None:
    async with asking(answer(200, listing("b", "a"))) as (client, base):
        members = (MemberFacts("a", 1, 0), MemberFacts("b", 1, 0))
        assert await client.facts(base, CACHE) == Facts(2, 5, members)


async def test_facts_without_a_length_or_a_total() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with asking(head) as (client, base):
        with pytest.raises(SourceFailed, match="no length"):
            await client.facts(base, SEALED)

    async def script(stream: trio.SocketStream) -> None:
        if (await read_request(stream)).startswith(b"HEAD"):
            await stream.send_all(b"HTTP/1.1 405 No\r\nConnection: close\r\n\r\n")
        else:
            await stream.send_all(answer(206, b"x", "Content-Range: bytes 0-0/*"))

    async with peer(script) as url, Client(QUICK) as plain:
        with pytest.raises(SourceFailed, match="total"):
            await PeerClient(plain).facts(url, SEALED)


async def test_a_disk_of_the_peer_that_does_not_answer() -> None:
    refused = StorageUnavailable("no answer", "/mnt/x")
    async with asking(answer(refused.status, str(refused))) as (client, base):
        with pytest.raises(SourceFailed, match="/mnt/x: no answer"):
            await client.read(base, SEALED, None, 0, 1)


# Latency


async def test_a_peer_that_hangs_looks_slow() -> None:
    async with asking(b"", stalls=True) as (client, base):
        with pytest.raises(TimedOut):
            await client.stat(base, STORAGE)
        assert client.latency(base) >= QUICK.first_byte


def test_latency_moves_towards_new_samples() -> None:
    start = Latency(1.0, 0.0)
    soon = start.seen(0.0, now=0.0)
    assert soon.seconds == pytest.approx(0.8)
    late = start.seen(0.0, now=3600.0)
    assert late.seconds == pytest.approx(0.0, abs=1e-9)
    assert late.at == 3600.0


async def test_latencies_of_bygone_peers_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectorfs.stores.transfer._MAX_PEERS", 1)
    async with peer(says(answer(200, "{}"))) as one, peer(says(answer(200, "{}"))) as two:
        async with Client(QUICK) as plain:
            client = PeerClient(plain, clock=lambda: 0.0)
            for base in (one, two):
                await client.stat(base, STORAGE)
            assert client.latency(one) == 0
            assert client.latency(two) > 0


# Cancellation


async def test_a_cancelled_fetch_leaves_nothing(tmp_path: Path) -> None:
    before = open_fds()
    begun = trio.Event()
    data = answer(200, b"abc").replace(b"Content-Length: 3", b"Content-Length: 30")

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(data)
        begun.set()
        await hang(stream)

    async with peer(script) as url, Client(PATIENT) as plain:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, PeerClient(plain), url, tmp_path / "f", 30)
            await begun.wait()
            nursery.cancel_scope.cancel()
        assert plain.busy(url) == 0
    await fds_return_to(before)
