"""The HTTP server against clients good and bad, over real sockets."""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path

import pytest
import trio

from sectorfs.errors import Forbidden, NotFound, StorageUnavailable
from sectorfs.stores.lanes import Lane
from sectorfs.wire.messages import Limits, Reply, Request, is_loopback, parse_target, text_reply
from tests.wire_fixtures import fds_return_to, file_body, octets, open_fds, raw, running, wait_until

GET = "GET /{} HTTP/1.1\r\nHost: x\r\n{}\r\n"


def get(path: str = "", *headers: str, method: str = "GET") -> str:
    lines = "".join(f"{header}\r\n" for header in headers)
    return GET.format(path, lines).replace("GET", method, 1)


async def echo(request: Request) -> Reply:
    """Names what was asked; a body is sent back."""
    body = await request.body(1000)
    return text_reply(200, f"{request.method} {'|'.join(request.segments)} {body.decode()}")


def read(path: Path) -> bytes:
    return path.read_bytes()


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


async def test_a_request_and_its_answer() -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send(get("a/b%20c?x=1&x=2&flag"))
        status, headers, body = await client.answer()
        assert (status, body) == (200, b"GET a|b c\n")
        assert headers["content-length"] == str(len(body))
        assert "date" in headers
        assert "connection" not in headers


async def test_what_a_handler_sees() -> None:
    seen: list[Request] = []

    async def handler(request: Request) -> Reply:
        seen.append(request)
        return Reply(204)

    async with running(handler) as port, raw(port) as client:
        await client.send(get("?x=1&x=%2F&flag", "X-A: 1", "x-a: 2", "X-B: v"))
        assert (await client.answer())[0] == 204
    (request,) = seen
    assert request.method == "GET"
    assert request.segments == ()
    assert request.path == "/"
    assert request.query == {"x": ["1", "/"], "flag": [""]}
    assert request.headers["x-a"] == "1, 2"
    assert request.headers["x-b"] == "v"
    assert request.peer == "127.0.0.1"
    assert request.loopback


@pytest.mark.parametrize(
    ("target", "segments"),
    [
        ("/", ()),
        ("/a", ("a",)),
        ("/a/", ("a", "")),
        ("//a", ("", "a")),
        ("/%c3%a9/x?q=/", ("é", "x")),
        ("http://host:1/a/b", ("a", "b")),
        ("/...", ("...",)),
    ],
)
def test_targets(target: str, segments: tuple[str, ...]) -> None:
    assert parse_target(target)[0] == segments


@pytest.mark.parametrize(
    "path",
    [
        "%00",
        "a%2Fb",
        "a%2fb",
        "..",
        "%2e%2e",
        "a/../b",
        ".",
        "%zz",
        "%4",
        "%ff",
        "x?q=%ff",
        "x?" + "&".join(f"a{n}=1" for n in range(100)),
    ],
)
async def test_bad_targets_are_400(path: str) -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send(get(path))
        status, _, body = await client.answer()
        assert status == 400
        assert body.count(b"\n") == 1
        await client.send(get("next"))
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("target", ["*", "host:80", "x"])
async def test_targets_that_are_no_paths(target: str) -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send(f"OPTIONS {target} HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.answer())[0] == 400


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("unknown", False),
    ],
)
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send(
            get("1") + get("2", "Content-Length: 3", method="POST") + "abc" + get("3")
        )
        bodies = [(await client.answer())[2] for _ in range(3)]
        assert bodies == [b"GET 1\n", b"POST 2 abc\n", b"GET 3\n"]


async def test_bodies_with_a_length_in_chunks_and_after_a_100() -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send(get("", "Transfer-Encoding: chunked", method="POST"))
        await client.send("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        assert (await client.answer())[2] == b"POST abcde\n"
        await client.send(get("", "Content-Length: 2", "Expect: 100-continue", method="POST"))
        with trio.fail_after(5):
            assert (await client.stream.receive_some()).startswith(b"HTTP/1.1 100 ")
        await client.send("hi")
        assert (await client.answer())[2] == b"POST hi\n"


async def test_head_gets_the_headers_of_get_only() -> None:
    async def handler(request: Request) -> Reply:
        return octets(b"12345")

    async with running(handler) as port, raw(port) as client:
        await client.send(get("", method="HEAD") + get(""))
        status, headers, body = await client.answer("HEAD")
        assert (status, headers["content-length"], body) == (200, "5", b"")
        assert (await client.answer())[2] == b"12345"


async def test_errors_as_text_and_as_json() -> None:
    async def handler(request: Request) -> Reply:
        raise NotFound("no such\nsector", "s-t01-2", "look elsewhere")

    async with running(handler) as port, raw(port) as client:
        await client.send(get())
        status, headers, body = await client.answer()
        assert status == 404
        assert headers["content-type"].startswith("text/plain")
        assert body == b"s-t01-2: no such sector (look elsewhere)\n"
        await client.send(get("", "Accept: application/json"))
        status, headers, body = await client.answer()
        assert status == 404
        assert body == (b'{"error":"no such\\nsector","thing":"s-t01-2","hint":"look elsewhere"}\n')


async def test_a_handler_that_breaks_is_500_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(request: Request) -> Reply:
        if request.segments == ("gone",):
            raise trio.BrokenResourceError("some other socket")
        raise RuntimeError("internal detail")

    async with running(handler) as port, raw(port) as client:
        for path in ("", "gone"):
            await client.send(get(path))
            status, _, body = await client.answer()
            assert (status, body) == (500, b"internal error\n")
    assert "internal detail" in caplog.text


async def test_errors_carry_their_status() -> None:
    errors = {"a": Forbidden("no"), "b": StorageUnavailable("no answer", "/mnt/x")}

    async def handler(request: Request) -> Reply:
        raise errors[request.segments[0]]

    async with running(handler) as port, raw(port) as client:
        for path, status in (("a", 403), ("b", 503)):
            await client.send(get(path))
            assert (await client.answer())[0] == status


@pytest.mark.parametrize(
    "data",
    [
        "hello\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 2\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "\x16\x03\x01\x02\x00\x01\x00",
    ],
)
async def test_malformed_requests_are_400_and_closed(data: str) -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send(data)
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (400, "close")
        assert await client.at_end()


async def test_a_header_of_ten_thousand_lines_is_refused() -> None:
    async with running(echo) as port, raw(port) as client:
        lines = [f"h{n}: v" for n in range(10_000)]
        await client.send(get("", *lines))
        status, _, body = await client.answer()
        assert status == 431
        assert b"16384" in body
        assert await client.at_end()


async def test_a_header_that_comes_at_once_is_measured_too() -> None:
    limits = Limits(header_bytes=200)
    async with running(echo, limits) as port:
        async with raw(port) as client:
            await client.send(get("", "X: " + "y" * 300))
            assert (await client.answer())[0] == 431
        async with raw(port) as client:
            await client.send(get("", "X: " + "y" * 50))
            assert (await client.answer())[0] == 200


async def test_a_body_beyond_the_limit_is_413() -> None:
    async with running(echo) as port:
        async with raw(port) as client:
            await client.send(get("", "Content-Length: 1001", method="POST") + "x" * 1001)
            status, _, body = await client.answer()
            assert status == 413
            assert b"1000" in body
            assert await client.at_end()
        async with raw(port) as client:
            await client.send(get("", "Transfer-Encoding: chunked", method="POST"))
            await client.send("7d0\r\n" + "x" * 2000 + "\r\n0\r\n\r\n")
            assert (await client.answer())[0] == 413


async def test_the_servers_own_body_limit_wins() -> None:
    async with running(echo, Limits(body_bytes=10)) as port, raw(port) as client:
        await client.send(get("", "Content-Length: 11", method="POST") + "x" * 11)
        assert (await client.answer())[0] == 413


async def test_a_body_nobody_reads_closes_the_connection() -> None:
    async def handler(request: Request) -> Reply:
        return text_reply(200, "ok")

    async with running(handler) as port, raw(port) as client:
        await client.send(get("", "Content-Length: 100000", method="POST") + "x" * 1000)
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await client.at_end()


async def test_slow_headers_are_cut_off() -> None:
    async with running(echo, Limits(header_time=0.2)) as port, raw(port) as client:
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                for byte in b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10_000:
                    await client.send(bytes([byte]))
                    await trio.sleep(0.02)

            nursery.start_soon(drip)
            assert (await client.answer())[0] == 408
            nursery.cancel_scope.cancel()
        assert await client.at_end()


async def test_a_client_that_says_nothing_is_let_go() -> None:
    async with running(echo, Limits(header_time=0.1)) as port, raw(port) as client:
        assert await client.at_end()


async def test_an_idle_connection_is_let_go() -> None:
    async with running(echo, Limits(idle=0.1)) as port, raw(port) as client:
        await client.send(get())
        assert (await client.answer())[0] == 200
        assert await client.at_end()


async def test_a_slow_body_is_cut_off() -> None:
    async with running(echo, Limits(body_progress=0.2)) as port, raw(port) as client:
        await client.send(get("", "Content-Length: 10", method="POST") + "x")
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (408, "close")


async def test_a_trickle_is_no_progress() -> None:
    async with running(echo, Limits(body_progress=0.3)) as port, raw(port) as client:
        await client.send(get("", "Content-Length: 900", method="POST"))
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                for _ in range(900):
                    await client.send(b"x")
                    await trio.sleep(0.05)

            nursery.start_soon(drip)
            assert (await client.answer())[0] == 408
            nursery.cancel_scope.cancel()


async def test_a_body_broken_off_reaches_the_handler_as_an_error() -> None:
    seen: list[Exception] = []

    async def handler(request: Request) -> Reply:
        try:
            await request.body(1000)
        except Exception as exc:
            seen.append(exc)
            raise
        return text_reply(200, "ok")

    async with running(handler) as port:
        async with raw(port) as client:
            await client.send(get("", "Content-Length: 10", method="POST") + "x")
        await wait_until(lambda: bool(seen))
    assert "body" in str(seen[0])


async def test_connections_beyond_the_limit_are_told_so() -> None:
    async with running(echo, Limits(connections=1)) as port:
        async with raw(port) as first:
            await first.send(get())
            await first.answer()
            async with raw(port) as second:
                status, headers, _ = await second.answer()
                assert (status, headers["retry-after"]) == (503, "1")
                assert await second.at_end()
            await first.send(get())
            assert (await first.answer())[0] == 200
        statuses: list[int] = []
        with trio.fail_after(10):
            while statuses[-1:] != [200]:  # until the server has seen the first one leave
                async with raw(port) as third:
                    await third.send(get())
                    statuses.append((await third.answer())[0])


async def test_the_last_request_of_a_connection_says_so() -> None:
    async with running(echo, Limits(requests=2)) as port, raw(port) as client:
        await client.send(get())
        assert "connection" not in (await client.answer())[1]
        await client.send(get())
        assert (await client.answer())[1]["connection"] == "close"
        assert await client.at_end()


async def test_http_1_0_is_answered_and_closed() -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send("GET /a HTTP/1.0\r\n\r\n")
        status, headers, body = await client.answer()
        assert (status, headers["connection"], body) == (200, "close", b"GET a\n")
        assert await client.at_end()


async def test_a_client_that_half_closes_gets_its_answer() -> None:
    async with running(echo) as port, raw(port) as client:
        await client.send(get("a"))
        await client.stream.send_eof()
        assert (await client.answer())[2] == b"GET a\n"
        assert await client.at_end()


# Files


async def test_a_piece_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = os.urandom(3_000_000)
    path.write_bytes(data)
    lane = Lane("disk", deadline=5)

    async def handler(request: Request) -> Reply:
        return octets(file_body(path, lane, offset=1000, length=2_500_000))

    before = open_fds()
    async with running(handler) as port, raw(port) as client:
        for _ in range(2):
            await client.send(get())
            status, headers, body = await client.answer()
            assert (status, headers["content-length"]) == (200, "2500000")
            assert body == data[1000:2_501_000]
        await client.send(get("", method="HEAD"))
        assert (await client.answer("HEAD"))[1]["content-length"] == "2500000"
    await fds_return_to(before)


async def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    lane = Lane("disk", deadline=5)

    async def handler(request: Request) -> Reply:
        return octets(file_body(path, lane))

    async with running(handler) as port, raw(port) as client:
        await client.send(get() + get())
        assert (await client.answer())[2] == b""
        assert (await client.answer())[2] == b""


UNSPLICED = Path("/proc/self/limits")


def can_be_spliced(path: Path) -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs, path.open("rb") as file:
        try:
            return os.sendfile(ours.fileno(), file.fileno(), 0, 10) > 0
        except OSError:
            return False


async def test_a_file_that_cannot_be_spliced_is_copied() -> None:
    path, expected = UNSPLICED, read(UNSPLICED)
    assert not can_be_spliced(path)
    lane = Lane("disk", deadline=5)

    async def handler(request: Request) -> Reply:
        return octets(file_body(path, lane, length=len(expected)))

    async with running(handler) as port, raw(port) as client:
        await client.send(get())
        assert (await client.answer())[2] == expected


async def test_a_client_that_stops_reading_holds_no_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sparse(tmp_path / "f", 256 << 20)
    lane = Lane("disk", deadline=5, width=1)
    bodies = []

    async def handler(request: Request) -> Reply:
        if request.segments:
            return octets(file_body(path, lane, length=10))
        bodies.append(file_body(path, lane))
        return octets(bodies[-1])

    before = open_fds()
    async with running(handler, Limits(write_progress=1)) as port:
        async with raw(port) as lazy, raw(port) as lively:
            await lazy.send(get())
            await wait_until(lambda: bool(bodies))
            for _ in range(20):
                await lively.send(get("small"))
                assert len((await lively.answer())[2]) == 10
            await wait_until(lambda: lane.busy == 0)
            assert not bodies[0].descriptor.closed
            await wait_until(lambda: bodies[0].descriptor.closed)
        assert "took nothing" in caplog.text
    await fds_return_to(before)


async def test_a_slow_client_that_goes_on_reading_is_served(tmp_path: Path) -> None:
    path = sparse(tmp_path / "f", 24 << 20)
    lane = Lane("disk", deadline=5)

    async def handler(request: Request) -> Reply:
        return octets(file_body(path, lane))

    async with running(handler, Limits(write_progress=0.3)) as port, raw(port) as client:
        await client.send(get())
        got = 0
        with trio.fail_after(60):
            while got < 24 << 20:
                await trio.sleep(0.02)
                got += len(await client.stream.receive_some(512 << 10))


async def test_a_file_cut_short_ends_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sparse(tmp_path / "f", 1000)
    lane = Lane("disk", deadline=5)
    bodies = []

    async def handler(request: Request) -> Reply:
        bodies.append(file_body(path, lane, length=5000))
        return octets(bodies[-1])

    async with running(handler) as port, raw(port) as client:
        await client.send(get())
        data = b""
        with trio.fail_after(5):
            while piece := await client.stream.receive_some():
                data += piece
        assert len(data.partition(b"\r\n\r\n")[2]) == 1000
        assert bodies[0].descriptor.closed
    assert "1000 of 5000" in caplog.text


async def test_a_file_truncated_during_the_send(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sparse(tmp_path / "f", 256 << 20)
    lane = Lane("disk", deadline=5)

    async def handler(request: Request) -> Reply:
        return octets(file_body(path, lane))

    async with running(handler) as port, raw(port) as client:
        await client.send(get())
        await client.stream.receive_some(1000)
        os.truncate(path, 1000)
        got = 1000
        with trio.fail_after(10):
            while piece := await client.stream.receive_some():
                got += len(piece)
        assert got < 256 << 20
    assert "the file ended" in caplog.text


async def test_a_disk_that_fails_in_mid_body(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lane = Lane("/mnt/disk", deadline=5)

    async def handler(request: Request) -> Reply:
        return octets(file_body(tmp_path, lane, length=100))  # reading a directory: EISDIR

    async with running(handler) as port, raw(port) as client:
        await client.send(get())
        with pytest.raises(Exception, match="without sending complete message body"):
            await client.answer()
    assert "/mnt/disk" in caplog.text


async def test_a_client_that_goes_away_in_mid_body(tmp_path: Path) -> None:
    path = sparse(tmp_path / "f", 256 << 20)
    lane = Lane("disk", deadline=5)
    bodies = []

    async def handler(request: Request) -> Reply:
        bodies.append(file_body(path, lane))
        return octets(bodies[-1])

    before = open_fds()
    async with running(handler) as port:
        async with raw(port) as client:
            await client.send(get())
            await client.stream.receive_some(1000)
        await wait_until(lambda: bodies[0].descriptor.closed)
        await wait_until(lambda: lane.busy == 0)
    await fds_return_to(before)


async def test_stopping_the_server_closes_everything(tmp_path: Path) -> None:
    path = sparse(tmp_path / "f", 256 << 20)
    lane = Lane("disk", deadline=5)
    waiting = trio.Event()
    bodies = []

    async def handler(request: Request) -> Reply:
        if request.segments:
            waiting.set()
            await trio.sleep_forever()
        bodies.append(file_body(path, lane))
        return octets(bodies[-1])

    before = open_fds()
    async with trio.open_nursery() as nursery:
        async with running(handler) as port:
            sending = await trio.open_tcp_stream("127.0.0.1", port)
            await sending.send_all(get().encode())
            asking = await trio.open_tcp_stream("127.0.0.1", port)
            await asking.send_all(get("wait").encode())
            idle = await trio.open_tcp_stream("127.0.0.1", port)
            await waiting.wait()
            await wait_until(lambda: bool(bodies))
        assert bodies[0].descriptor.closed
        for stream in (sending, asking, idle):
            await stream.aclose()
        nursery.cancel_scope.cancel()
    await wait_until(lambda: lane.busy == 0)
    await fds_return_to(before)


async def test_a_send_given_up_at_the_disks_deadline_touches_no_other_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread that hangs wakes up after its connection's number has been taken again."""
    path = tmp_path / "f"
    path.write_bytes(b"secret" * 1000)
    lane = Lane("disk", deadline=0.1)
    hangs, released = threading.Event(), threading.Event()

    class Slow:
        """A descriptor that takes long to get, like an open file on a dead disk."""

        def __init__(self) -> None:
            self.inner = file_body(path, lane).descriptor

        def __enter__(self) -> int:
            hangs.set()
            released.wait(20)
            return self.inner.__enter__()

        def __exit__(self, *args: object) -> None:
            self.inner.__exit__(None, None, None)

    async def handler(request: Request) -> Reply:
        if request.segments:
            return text_reply(200, "other")
        body = file_body(path, lane)
        body.descriptor = Slow()
        return octets(body)

    async with running(handler) as port:
        async with raw(port) as client:
            await client.send(get())
            with pytest.raises(Exception, match="without sending complete message body"):
                await client.answer()
        assert hangs.is_set()
        async with raw(port) as other:
            released.set()
            await wait_until(lambda: lane.busy == 0)
            await other.send(get("other"))
            assert (await other.answer())[2] == b"other\n"
    assert "no answer within" in caplog.text


async def test_small_pieces_of_a_reply_respect_the_writers_patience() -> None:
    async def handler(request: Request) -> Reply:
        return octets(bytes(64 << 20))

    logger = logging.getLogger("sectorfs.wire.server")
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    keep = Keep()
    logger.addHandler(keep)
    try:
        async with running(handler, Limits(write_progress=0.2)) as port, raw(port) as client:
            client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await client.send(get())
            await wait_until(lambda: any("took nothing" in line for line in seen))
    finally:
        logger.removeHandler(keep)
