"""Servers, peers that misbehave, and a small `LocalFiles`, for the tests of HTTP both ways."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import h11
import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.errors import NotFound, from_os
from sectorfs.index.protocol import FsStat
from sectorfs.stores.directories import OpenDirectory, open_directory
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.regular import Excerpt, Spans, read_excerpt
from sectorfs.types import Facts, MemberFacts, SectorFile, StorageID
from sectorfs.wire.messages import FileBody, Limits, Reply
from sectorfs.wire.server import Handler, serve

QUICK = TimeoutsConfig(connect=2, first_byte=0.3, progress=0.3, disk=5)
DEFAULTS = Limits()
PATIENT = TimeoutsConfig(connect=10, first_byte=30, progress=30, disk=30)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until true, for at most ten seconds."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what is waited for knows no events
            await trio.sleep(0.005)


async def fds_return_to(before: set[str]) -> None:
    """Until everything opened since is closed: lanes close in threads of their own."""
    with suppress(trio.TooSlowError):
        await wait_until(lambda: open_fds() == before)
    assert open_fds() == before


def open_fds() -> set[str]:
    """What every open descriptor of this process points at, by number."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


@asynccontextmanager
async def running(handler: Handler, limits: Limits = DEFAULTS) -> AsyncIterator[int]:
    """A server on loopback; its port."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port: int = listeners[0].socket.getsockname()[1]

        async def run(task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED) -> None:
            await serve(handler, listeners, limits=limits, task_status=task_status)

        await nursery.start(run)
        yield port
        nursery.cancel_scope.cancel()


Script = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def peer(script: Script) -> AsyncIterator[str]:
    """A server that runs `script` on each connection, then closes it; its URL."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]

        async def run(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):  # the client under test may hang up
                await script(stream)

        await nursery.start(trio.serve_listeners, run, listeners)
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


async def read_request(stream: trio.SocketStream) -> bytes:
    """The header of one request (and what came with it)."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = await stream.receive_some()
        if not piece:
            break
        data += piece
    return data


def says(answer: bytes, *, then: Script | None = None) -> Script:
    """A script: read a request, send these bytes, go on with `then` or close."""

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        if answer:
            await stream.send_all(answer)
        if then is not None:
            await then(stream)

    return script


async def hang(stream: trio.SocketStream) -> None:
    """Never do anything again, but read."""
    while await stream.receive_some():
        pass


class Raw:
    """A client that sends any bytes and parses answers with h11."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, data: bytes | str) -> None:
        await self.stream.send_all(data.encode() if isinstance(data, str) else data)

    async def answer(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        http.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        http.send(h11.EndOfMessage())
        if self._buffer:
            http.receive_data(self._buffer)
        body = b""
        head: h11.Response | None = None
        with trio.fail_after(20):
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await self.stream.receive_some())
                elif isinstance(event, h11.Response):
                    head = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif isinstance(event, h11.ConnectionClosed):
                    raise EOFError
        assert head is not None
        self._buffer = http.trailing_data[0]
        headers = {name.decode(): value.decode() for name, value in head.headers}
        return head.status_code, headers, body

    async def at_end(self) -> bool:
        """Whether the server closes, within a few seconds, without another byte."""
        with trio.fail_after(10):
            try:
                return self._buffer + await self.stream.receive_some() == b""
            except trio.BrokenResourceError:
                return True


@asynccontextmanager
async def raw(port: int) -> AsyncIterator[Raw]:
    """Connect to a local server."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield Raw(stream)


def file_body(path: Path, lane: Lane, *, length: int | None = None, offset: int = 0) -> FileBody:
    """A reply's body over a real file."""
    descriptor = Descriptor(os.open(path, os.O_RDONLY))
    size = path.stat().st_size - offset if length is None else length
    return FileBody(descriptor, offset=offset, length=size, run=lane.run, close=descriptor.close)


def octets(body: FileBody | bytes) -> Reply:
    """A 200 with binary content."""
    return Reply(200, (("content-type", "application/octet-stream"),), body)


class FolderFiles:
    """`LocalFiles` over one directory, with a real lane."""

    def __init__(self, root: Path, *, storage: str = "st-1", width: int = 8) -> None:
        self.root = root
        self.storage = StorageID(storage)
        self.lane = Lane(str(root), deadline=5, width=width)
        self.opened: list[OpenFile] = []

    async def open_file(self, file: SectorFile, member: str | None = None) -> OpenFile:
        path = self.root / file.file_type.dir_name / file.sector.name / (member or "")
        fd = await self.lane.run(lambda: os.open(path, os.O_RDONLY), what="open", discard=os.close)
        stat = os.fstat(fd)
        opened = OpenFile(
            descriptor=Descriptor(fd),
            size=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            inode=stat.st_ino,
            storage=self.storage,
            path=str(path),
            lane=self.lane,
        )
        self.opened.append(opened)
        return opened

    async def excerpt(self, file: SectorFile, member: str | None, spans: Spans) -> Excerpt:
        path = self.root / file.file_type.dir_name / file.sector.name / (member or "")
        return await self.lane.run(
            lambda: read_excerpt(str(path), spans, self.storage), what="open"
        )

    async def open_directory(
        self, file: SectorFile, *, only: Container[str] | None
    ) -> OpenDirectory:
        return await open_directory(
            str(self.root),
            str(self.root / str(file)),
            self.lane,
            storage=self.storage,
            expected=False,
            only=only,
        )

    async def listing(self, file: SectorFile) -> Facts:
        path = self.root / file.file_type.dir_name / file.sector.name
        try:
            stat = path.stat()
        except OSError as exc:
            raise from_os(exc, "stat", path) from exc
        if not file.file_type.is_directory:
            return Facts(stat.st_size, stat.st_mtime_ns)
        entries = [(entry.name, entry.stat()) for entry in os.scandir(path)]
        members = tuple(MemberFacts(n, s.st_size, s.st_mtime_ns) for n, s in sorted(entries))
        return Facts(sum(m.size for m in members), stat.st_mtime_ns, members)

    async def stat(self, storage: StorageID) -> FsStat:
        if storage != self.storage:
            raise NotFound("not a storage of this node", storage)
        return FsStat(capacity=1000, available=900, fs_available=950, reserved=1, max=2, used=3)
