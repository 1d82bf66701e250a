"""The HTTP client against servers good and bad, over real sockets."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.errors import (
    BadInput,
    DiskError,
    Refused,
    SourceFailed,
    StorageUnavailable,
    TimedOut,
    TooLarge,
    Unreachable,
)
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.manifest import LEAF
from sectorfs.wire.client import IDLE_SECONDS, Client, parse_target_url
from sectorfs.wire.messages import Reply, Request, text_reply
from sectorfs.wire.pace import FLOOR, Pace
from sectorfs.wire.response import HEADER_LIMIT
from tests.gates import Gate
from tests.wire_fixtures import (
    PATIENT,
    QUICK,
    Script,
    fds_return_to,
    file_body,
    hang,
    octets,
    open_fds,
    peer,
    read_request,
    running,
    says,
    wait_until,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def get(client: Client, url: str, **options: float) -> bytes:
    async with client.request("GET", url, **options) as response:
        return await response.read(1000)


@contextmanager
def target_file(path: Path) -> Iterator[Descriptor]:
    descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT))
    try:
        yield descriptor
    finally:
        descriptor.close()


async def save(client: Client, url: str, path: Path, length: int, offset: int = 0) -> int:
    lane = Lane("disk", deadline=5)
    with target_file(path) as descriptor:
        async with client.request("GET", url) as response:
            return await response.save(descriptor, offset=offset, length=length, run=lane.finish)


def counted(script: Script, seen: list[int]) -> Script:
    async def run(stream: trio.SocketStream) -> None:
        seen.append(len(seen))
        await script(stream)

    return run


def in_turn(*answers: bytes) -> Script:
    """One connection that answers several requests."""

    async def script(stream: trio.SocketStream) -> None:
        for answer in answers:
            if not await read_request(stream):
                return
            await stream.send_all(answer)
        await hang(stream)

    return script


# Requests


async def test_what_is_sent() -> None:
    seen: list[Request] = []

    async def handler(request: Request) -> Reply:
        seen.append(request)
        return text_reply(200, (await request.body(100)).decode())

    async with running(handler) as port, Client(PATIENT, token=lambda: "T\n") as client:
        url = f"http://127.0.0.1:{port}/a%20b?x=1#part"
        async with client.request("POST", url, (("x-y", "z"),), b"body") as response:
            assert response.status == 200
            assert response.url == f"http://127.0.0.1:{port}/a%20b"
            assert response.length == 5
            assert 0 <= response.first_byte < 10
            assert await response.read(100) == b"body\n"
        assert await get(client, url) == b"\n"
    first, second = seen
    assert first.method == "POST"
    assert first.segments == ("a b",)
    assert first.query == {"x": ["1"]}
    assert first.headers["host"] == f"127.0.0.1:{port}"
    assert first.headers["authorization"] == "Bearer T"
    assert first.headers["x-y"] == "z"
    assert second.method == "GET"
    assert "content-length" not in second.headers


async def test_a_given_authorization_replaces_the_token() -> None:
    async def handler(request: Request) -> Reply:
        return text_reply(200, request.headers["authorization"])

    async with running(handler) as port, Client(PATIENT, token="T") as client:
        headers = (("Authorization", "Basic x"),)
        async with client.request("GET", f"http://127.0.0.1:{port}", headers) as response:
            assert await response.read(100) == b"Basic x\n"


async def test_post() -> None:
    async def handler(request: Request) -> Reply:
        return text_reply(202, request.headers["content-type"])

    async with running(handler) as port, Client(PATIENT) as client:
        answer = await client.post(f"http://127.0.0.1:{port}/rpc/v0", b"{}", limit=100)
        assert answer == (202, b"application/json\n")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "https://host/",
        "http://",
        "http:///path",
        "http://user:pass@host/",
        "http://host:0/",
        "http://host:99999/",
        "http://host:x/",
        "http://[::1/",
    ],
)
async def test_urls_that_are_refused(url: str) -> None:
    async with Client(QUICK) as client:
        with pytest.raises(BadInput):
            await get(client, url)


@pytest.mark.parametrize("path", ["/a b", "/é", "/\x01"])
async def test_paths_that_http_cannot_carry(path: str) -> None:
    async with peer(says(OK)) as url, Client(QUICK) as client:
        with pytest.raises(BadInput):
            await get(client, url + path)
        assert client.busy(url) == 0


def test_parts_of_a_url() -> None:
    target = parse_target_url("http://[::1]:81?token=secret")
    assert (target.host, target.port, target.path) == ("::1", 81, "/?token=secret")
    assert target.authority == "[::1]:81"
    assert "secret" not in target.name
    assert parse_target_url("http://Host/x").authority == "host"


# Peers that fail


async def test_nobody_listens() -> None:
    async with peer(hang) as url:
        pass
    async with Client(QUICK) as client:
        with pytest.raises(Unreachable, match="refused") as info:
            await get(client, url + "/x?token=secret")
        assert info.value.thing == url + "/x"
        assert client.busy(url) == 0


@pytest.mark.parametrize("host", ["x" * 70, "name.invalid"])
async def test_names_that_do_not_resolve(host: str) -> None:
    async with Client(TimeoutsConfig(connect=10)) as client:
        with pytest.raises(Unreachable):
            await get(client, f"http://{host}/")


async def test_a_peer_that_does_not_take_the_connection() -> None:
    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [trio.socket.socket() for _ in range(4)]
        async with trio.open_nursery() as nursery:
            for filler in fillers:  # the backlog is full after one or two
                nursery.start_soon(filler.connect, ("127.0.0.1", port))
            async with Client(TimeoutsConfig(connect=0.2)) as client:
                with pytest.raises(TimedOut, match="no connection within"):
                    await get(client, f"http://127.0.0.1:{port}/")
            nursery.cancel_scope.cancel()
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (hang, TimedOut, "no answer within"),
        (says(b"H", then=hang), TimedOut, "no whole header"),
        (says(b"HTTP/1.1 200 OK\r\nX: y\r\n", then=hang), TimedOut, "no whole header"),
        (says(b""), Unreachable, "without an answer"),
        (says(b"HTTP/1.1 2"), Unreachable, "no HTTP answer"),
        (says(b"<html>Not HTTP</html>\r\n\r\n"), Unreachable, "no HTTP answer"),
        (says(b"\x16\x03\x01\x00\x00\r\n\r\n"), Unreachable, "no HTTP answer"),
        (says(b"HTTP/1.1 100 Continue\r\n\r\n" * 100), Unreachable, "interim"),
        (says(b"HTTP/1.1 100 Continue\r\n\r\n", then=hang), TimedOut, "no whole header"),
        (says(b"HTTP/1.1 100 Continue\r\n\r\n"), Unreachable, "no HTTP answer"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), Unreachable, "no HTTP"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), Unreachable, "no HTTP"),
        (says(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 99_999), Unreachable, "no HTTP"),
        (
            says(b"HTTP/1.1 200 OK\r\nX: " + b"y" * HEADER_LIMIT + b"\r\n\r\n"),
            Unreachable,
            "header of more than|no HTTP",
        ),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"), Unreachable, "broke off"),
        (
            says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", then=hang),
            TimedOut,
            "stalled",
        ),
        (
            says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
            Unreachable,
            "broke off",
        ),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"), TooLarge, "1001"),
        (says(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001), TooLarge, "more than 1000"),
    ],
)
async def test_answers_that_are_errors(script: Script, error: type[Exception], text: str) -> None:
    before = open_fds()
    async with peer(script) as url, Client(QUICK) as client:
        with pytest.raises(error, match=text) as info:
            await get(client, url + "/f?token=secret")
        assert "secret" not in str(info.value)
        assert url in str(info.value)
        assert client.busy(url) == 0
    await fds_return_to(before)


async def test_a_peer_that_takes_no_request() -> None:
    async def script(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with peer(script) as url, Client(QUICK) as client:
        with pytest.raises(TimedOut, match="took nothing"):
            async with client.request("POST", url, (), bytes(64 << 20)):
                pass


async def test_an_answer_before_the_end_of_the_request() -> None:
    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        answer = b"HTTP/1.1 413 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
        await stream.send_all(answer)
        await stream.send_eof()
        await hang(stream)

    async with peer(script) as url, Client(PATIENT) as client:
        async with client.request("POST", url, (), bytes(4 << 20)) as response:
            assert (response.status, await response.read(10)) == (413, b"no")


async def test_interim_answers_are_skipped() -> None:
    async with peer(says(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK)) as url:
        async with Client(QUICK) as client:
            assert await get(client, url) == b"ok"


async def test_patience_lengthens_the_wait_for_the_first_byte() -> None:
    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await trio.sleep(0.4)
        await stream.send_all(OK)

    async with peer(script) as url, Client(QUICK) as client:
        with pytest.raises(TimedOut):
            await get(client, url)
        assert await get(client, url, patience=30) == b"ok"


@pytest.mark.parametrize(
    "how", [b"Content-Length: 900\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n1;"]
)
async def test_a_trickle_is_no_progress(how: bytes) -> None:
    """Be it of the body, or of what stands between its chunks."""

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n" + how)
        for _ in range(900):
            await stream.send_all(b"x")
            await trio.sleep(0.02)

    async with peer(script) as url, Client(QUICK) as client:
        with pytest.raises(TimedOut, match="stalled"):
            await get(client, url)


def test_pace() -> None:
    pace = Pace(10)
    assert pace.patience() == 10
    pace.moved(FLOOR, waited=3)
    assert pace.patience() == 8
    pace.moved(100 * FLOOR, waited=10)
    assert pace.patience() == 10
    pace.moved(0, waited=1000)
    assert pace.patience() == 0


async def test_redirects_are_not_followed() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n"
    async with peer(says(answer)) as url, Client(QUICK) as client:
        async with client.request("GET", url) as response:
            assert response.status == 302


# The pool


async def test_a_connection_is_used_again() -> None:
    seen: list[int] = []
    head_only = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    script = counted(in_turn(OK, chunked, head_only, b"HTTP/1.1 204 No\r\n\r\n", OK, OK), seen)
    async with peer(script) as url, Client(PATIENT) as client:
        assert await get(client, url) == b"ok"
        assert await get(client, url) == b"ok"
        async with client.request("HEAD", url) as response:
            assert response.length == 999
            assert await response.read(10) == b""
        async with client.request("GET", url) as response:
            assert response.status == 204
        async with client.request("GET", url):
            pass  # a short answer that came whole need not be read
        assert await get(client, url) == b"ok"
    assert seen == [0]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        OK + b"and more",
    ],
)
async def test_a_connection_that_cannot_be_used_again(answer: bytes) -> None:
    seen: list[int] = []
    async with peer(counted(says(answer, then=hang), seen)) as url, Client(PATIENT) as client:
        for _ in range(2):
            assert await get(client, url) == b"ok"
    assert seen == [0, 1]


async def test_an_unread_body_closes_the_connection() -> None:
    seen: list[int] = []
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"
    async with peer(counted(says(answer, then=hang), seen)) as url, Client(PATIENT) as client:
        for _ in range(2):
            async with client.request("GET", url) as response:
                assert response.status == 200
    assert seen == [0, 1]


async def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    seen: list[int] = []
    async with peer(counted(says(OK), seen)) as url, Client(PATIENT) as client:
        for _ in range(3):
            assert await get(client, url) == b"ok"
            async with client.request("POST", url) as response:
                assert await response.read(10) == b"ok"
    assert len(seen) == 6


async def test_a_kept_connection_that_closes_on_the_next_request() -> None:
    """It looks well when it is taken: only the request finds out."""
    seen: list[int] = []

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(OK)
        await read_request(stream)

    async with peer(counted(script, seen)) as url, Client(PATIENT) as client:
        assert await get(client, url) == b"ok"
        assert await get(client, url) == b"ok"
        assert seen == [0, 1]
        with pytest.raises(Unreachable, match="closed"):
            async with client.request("POST", url):
                pass
        assert seen == [0, 1]


async def test_a_connection_that_fails_twice_is_not_tried_a_third_time() -> None:
    seen: list[int] = []

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        if seen == [0]:
            await stream.send_all(OK)
            await read_request(stream)

    async with peer(counted(script, seen)) as url, Client(PATIENT) as client:
        assert await get(client, url) == b"ok"
        with pytest.raises(Unreachable, match="without an answer"):
            await get(client, url)
    assert seen == [0, 1]


async def test_at_most_per_peer_requests_at_a_time() -> None:
    running_now, most = 0, 0

    async def handler(request: Request) -> Reply:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await trio.sleep(0.02)
        running_now -= 1
        return text_reply(200, "ok")

    async with running(handler) as port, Client(PATIENT, per_peer=3) as client:
        url = f"http://127.0.0.1:{port}/"
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(get, client, url)
        assert client.busy(url) == 0
    assert most == 3


async def test_one_peers_hang_does_not_touch_another() -> None:
    async with peer(hang) as stuck, peer(says(OK)) as well, Client(PATIENT, per_peer=1) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(get, client, stuck)
            await wait_until(lambda: client.busy(stuck) == 3)
            assert await get(client, well) == b"ok"
            nursery.cancel_scope.cancel()
        assert client.busy(stuck) == 0


async def test_idle_connections_are_dropped(autojump_clock: trio.testing.MockClock) -> None:
    closed = trio.Event()

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(OK)
        await hang(stream)
        closed.set()

    autojump_clock.autojump_threshold = 0.5
    async with peer(script) as url, Client(PATIENT) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.keep_tidy)
            assert await get(client, url) == b"ok"
            start = trio.current_time()
            await closed.wait()
            assert IDLE_SECONDS <= trio.current_time() - start <= 2 * IDLE_SECONDS + 1
            nursery.cancel_scope.cancel()


async def test_an_old_connection_is_not_taken(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[int] = []
    autojump_clock.autojump_threshold = 0.5
    async with peer(counted(in_turn(OK, OK), seen)) as url, Client(PATIENT) as client:
        await get(client, url)
        await trio.sleep(IDLE_SECONDS + 1)
        await get(client, url)
    assert seen == [0, 1]


async def test_a_closed_client_keeps_and_asks_nothing() -> None:
    before = open_fds()
    async with peer(in_turn(OK, OK)) as url:
        client = Client(PATIENT)
        await get(client, url)
        async with client.request("GET", url) as response:
            client.close()
            assert await response.read(10) == b"ok"
        with pytest.raises(Refused, match="closed"):
            await get(client, url)
    await fds_return_to(before)


# Cancellation


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"]
)
async def test_cancellation_closes_and_releases(answer: bytes, tmp_path: Path) -> None:
    before = open_fds()
    seen: list[int] = []
    async with peer(counted(says(answer, then=hang), seen)) as url, Client(PATIENT) as client:
        for job in (get, save):
            async with trio.open_nursery() as nursery:
                if job is get:
                    nursery.start_soon(get, client, url)
                else:
                    nursery.start_soon(save, client, url, tmp_path / "f", 9)
                count = len(seen)
                await wait_until(lambda count=count: len(seen) > count)
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert client.busy(url) == 1
                nursery.cancel_scope.cancel()
            assert client.busy(url) == 0
    await fds_return_to(before)
    assert len(seen) == 2


async def test_cancellation_while_waiting_for_a_slot() -> None:
    async with peer(hang) as url, Client(PATIENT, per_peer=1) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(get, client, url)
            await wait_until(lambda: client.busy(url) == 1)
            with trio.move_on_after(0.05):
                await get(client, url)
            assert client.busy(url) == 1
            nursery.cancel_scope.cancel()
        assert client.busy(url) == 0


# Into a file


@pytest.mark.parametrize("size", [0, 1, 100_000, 5_000_001])
async def test_save(tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(size))
    lane = Lane("disk", deadline=5)
    steps: list[int] = []

    async def handler(request: Request) -> Reply:
        return octets(file_body(source, lane))

    async with running(handler) as port, Client(PATIENT) as client:
        url = f"http://127.0.0.1:{port}/"
        with target_file(target) as descriptor:
            for offset in (0, 7):
                async with client.request("GET", url) as response:
                    saved = await response.save(
                        descriptor,
                        offset=offset,
                        length=size,
                        run=lane.finish,
                        progress=steps.append,
                    )
                assert saved == size
    expected = source.read_bytes()
    assert target.read_bytes()[7:] == expected
    assert steps == sorted(steps) or size
    assert steps[-1:] == ([size] if size else [])


async def test_saving_keeps_the_connection(tmp_path: Path) -> None:
    seen: list[int] = []
    async with peer(counted(in_turn(OK, OK), seen)) as url, Client(PATIENT) as client:
        assert await save(client, url, tmp_path / "f", 2) == 2
        assert await save(client, url, tmp_path / "f", 2, offset=2) == 2
    assert seen == [0]
    assert (tmp_path / "f").read_bytes() == b"okok"


async def test_bytes_beyond_the_body_end_the_connection(tmp_path: Path) -> None:
    seen: list[int] = []
    script = counted(says(OK + b"garbage", then=hang), seen)
    async with peer(script) as url, Client(PATIENT) as client:
        for _ in range(2):
            assert await save(client, url, tmp_path / "f", 2) == 2
    assert seen == [0, 1]
    assert (tmp_path / "f").read_bytes() == b"ok"


async def test_a_write_that_hangs_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread goes on later: not on a connection that got the same number meanwhile."""
    ended = trio.Event()

    async def told(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(b"x" * 100_000)
            await hang(stream)
        finally:
            ended.set()

    gate = Gate(monkeypatch, "pwrite", lambda fd, data, offset: True)
    lane = Lane("disk", deadline=5, patience=0.3)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nfirst"
    before = open_fds()
    async with peer(says(answer, then=told)) as url, Client(PATIENT) as client:
        with target_file(tmp_path / "f") as descriptor:
            with pytest.raises(StorageUnavailable):
                async with client.request("GET", url) as response:
                    await response.save(descriptor, offset=0, length=1_000_000, run=lane.finish)
            with trio.fail_after(10):
                await ended.wait()
            assert lane.busy == 1
            gate.opened.set()
            await wait_until(lambda: lane.busy == 0)
    await fds_return_to(before)


async def test_save_in_chunks(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for at in range(0, len(data), 70_000):
        piece = data[at : at + 70_000]
        answer += b"%x\r\n%s\r\n" % (len(piece), piece)
    async with peer(says(answer + b"0\r\n\r\n")) as url, Client(PATIENT) as client:
        assert await save(client, url, tmp_path / "f", len(data)) == len(data)
        assert (tmp_path / "f").read_bytes() == data
        with pytest.raises(SourceFailed, match=r"sends more than .* instead of 100"):
            await save(client, url, tmp_path / "g", 100)
        with pytest.raises(SourceFailed, match="3000000 bytes instead of 3000001"):
            await save(client, url, tmp_path / "g", 3_000_001)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "9 bytes instead of 5"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "after 3 of 5 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\nabc", "3 bytes instead of 5"),
        (b"HTTP/1.1 200 OK\r\n\r\nabcdefgh", "instead of 5"),
        (b"HTTP/1.1 204 No\r\n\r\n", "0 bytes instead of 5"),
    ],
)
async def test_bodies_of_another_length(tmp_path: Path, answer: bytes, text: str) -> None:
    before = open_fds()
    async with peer(says(answer)) as url, Client(PATIENT) as client:
        with pytest.raises(SourceFailed, match=text) as info:
            await save(client, url, tmp_path / "f", 5)
        assert url in info.value.thing
        assert client.busy(url) == 0
    await fds_return_to(before)


async def test_a_body_that_stalls(tmp_path: Path) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc"
    async with peer(says(answer, then=hang)) as url, Client(QUICK) as client:
        with pytest.raises(TimedOut, match="stalled"):
            await save(client, url, tmp_path / "f", 5)


async def test_a_peer_that_resets_in_mid_body(tmp_path: Path) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1] + [0] * 7))

    async with peer(script) as url, Client(QUICK) as client:
        with pytest.raises((SourceFailed, Unreachable)):
            await save(client, url, tmp_path / "f", 5)


async def test_a_full_disk_is_the_disks_error() -> None:
    async with peer(says(OK)) as url, Client(QUICK) as client:
        lane = Lane("/mnt/full", deadline=5)
        descriptor = Descriptor(os.open("/dev/full", os.O_RDWR))
        with pytest.raises(DiskError, match=os.strerror(errno.ENOSPC)) as info:
            async with client.request("GET", url) as response:
                await response.save(descriptor, offset=0, length=2, run=lane.finish)
        descriptor.close()
        assert info.value.thing == "/mnt/full"
        assert client.busy(url) == 0


# Into a file, as far as it is good


def chunked(data: bytes) -> bytes:
    """An answer with a body in chunks that end anywhere."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for at in range(0, len(data), 70_001):
        piece = data[at : at + 70_001]
        answer += b"%x\r\n%s\r\n" % (len(piece), piece)
    return answer + b"0\r\n\r\n"


def plain(data: bytes) -> bytes:
    """An answer with a body of known length."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)


def sieve_of(good: bytes) -> Callable[[memoryview], int]:
    """Lets whole parts of `LEAF` bytes through that are as they should be, and the short end."""
    done = 0

    def sieve(view: memoryview) -> int:
        nonlocal done
        passed = 0
        while passed + LEAF <= len(view) or done + len(view) == len(good):
            wanted = good[done : done + LEAF]
            if not wanted:
                break
            if view[passed : passed + LEAF] != wanted:
                if not passed:
                    raise SourceFailed("gave bad bytes", f"byte {done}")
                break
            passed += len(wanted)
            done += len(wanted)
        return passed

    return sieve


@pytest.mark.parametrize("answer", [plain, chunked])
@pytest.mark.parametrize("size", [1, LEAF - 1, LEAF, 5_000_001])
async def test_a_sieve_sees_every_byte_before_the_file(
    tmp_path: Path, size: int, answer: Callable[[bytes], bytes]
) -> None:
    data, lane, steps = os.urandom(size), Lane("disk", deadline=5), list[int]()
    async with peer(says(answer(data))) as url, Client(PATIENT) as client:
        with target_file(tmp_path / "f") as descriptor:
            async with client.request("GET", url) as response:
                saved = await response.save(
                    descriptor,
                    offset=0,
                    length=size,
                    run=lane.finish,
                    progress=steps.append,
                    sieve=sieve_of(data),
                )
    assert saved == size
    assert steps[-1] == size
    assert steps == sorted(steps)
    assert all(step % LEAF == 0 for step in steps[:-1])
    assert (tmp_path / "f").read_bytes() == data


@pytest.mark.parametrize("answer", [plain, chunked])
@pytest.mark.parametrize("place", [0, 65_535, 65_536, 3_000_000, 4_999_999])
async def test_what_the_sieve_refuses_never_gets_into_the_file(
    tmp_path: Path, place: int, answer: Callable[[bytes], bytes]
) -> None:
    good, lane, steps = os.urandom(5_000_000), Lane("disk", deadline=5), list[int]()
    bad = bytearray(good)
    bad[place] ^= 1
    before = open_fds()
    async with peer(says(answer(bytes(bad)))) as url, Client(PATIENT) as client:
        with target_file(tmp_path / "f") as descriptor:
            with pytest.raises(SourceFailed, match="bad bytes"):
                async with client.request("GET", url) as response:
                    await response.save(
                        descriptor,
                        offset=0,
                        length=len(good),
                        run=lane.finish,
                        progress=steps.append,
                        sieve=sieve_of(good),
                    )
        assert client.busy(url) == 0
    expected = place // LEAF * LEAF
    assert max(steps, default=0) == expected
    assert (tmp_path / "f").read_bytes() == good[:expected]
    await fds_return_to(before)
