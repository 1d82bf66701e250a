"""Servers of sector directories: our own, and stand-ins for those of lotus and Curio."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from sectorfs.server.routes import make_handler
from sectorfs.stores.protocol import LocalFiles
from sectorfs.wire.client import Client
from sectorfs.wire.messages import Gone
from sectorfs.wire.tokens import Secret, sign
from tests.tar_fixtures import stream, unterminated
from tests.wire_fixtures import PATIENT, peer, read_request, running

SECRET = Secret(bytes(range(32)))
READ = sign(SECRET, ["read"])

FINALIZED = {
    "p_aux": b"p" * 64,
    "sc-02-data-tree-r-last.dat": b"r" * 32,
    "t_aux": b"t" * 100,
}
"""A finalized cache directory of a 2 KiB sector."""
COMPLETE = {
    **FINALIZED,
    "sc-02-data-layer-1.dat": os.urandom(2048),
    "sc-02-data-layer-2.dat": os.urandom(2048),
    "sc-02-data-tree-c.dat": os.urandom(2336),
    "sc-02-data-tree-d.dat": os.urandom(4064),
}
"""The same before it is finalized."""
MTIME_NS = 1_600_000_000_000_000_000


def write_directory(path: Path, files: Mapping[str, bytes]) -> Path:
    """A sector directory on disk, of a time that a tar can say."""
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
        os.utime(path / name, ns=(MTIME_NS, MTIME_NS))
    os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return path


@dataclass
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Served:
    """Our server over some files, and a client of it."""

    url: str
    client: Client

    @property
    def base(self) -> str:
        """Base URL, as the Index lists it."""
        return f"{self.url}/remote"

    @property
    def port(self) -> int:
        """Of the server."""
        return int(self.url.rpartition(":")[2])

    async def ask(self, path: str, *headers: tuple[str, str], method: str = "GET") -> Answer:
        """A request with a token to read, and its whole answer."""
        async with self.client.request(method, self.url + path, headers) as response:
            body = await response.read(1 << 24)
            return Answer(response.status, dict(response.headers), body)


async def _no_rpc(body: bytes, permissions: frozenset[str], *, gone: Gone) -> tuple[int, bytes]:
    return 404, b""


@asynccontextmanager
async def served(files: LocalFiles, *, deadline: float = 5) -> AsyncIterator[Served]:
    """Our routes over `files`, on loopback."""
    handler = make_handler(
        files, secret=SECRET, rpc=_no_rpc, health=dict, status=str, deadline=deadline
    )
    async with running(handler) as port, Client(PATIENT, token=READ) as client:
        yield Served(f"http://127.0.0.1:{port}", client)


# Other programs' servers, as far as sector directories go


@dataclass
class Foreign:
    """A node of another program that holds one sector file, a directory as a rule."""

    path: str
    """``/remote/cache/s-t01000-7``"""
    files: dict[str, bytes]
    """Of a directory; for a regular file its content under the name ``""``."""
    kind: str = "curio"
    """``curio``, or ``lotus``: the first one, whose streams end with the last byte."""
    cut: int | None = None
    """Bytes after which a failing server ends the body."""
    breaks: bool = False
    """Whether the connection ends with the cut, or only the body."""
    stalls: bool = False
    """Whether it sends nothing more after the cut, and keeps the connection."""
    gone: bool = False
    """Whether the sector file was deleted."""
    keeps: bool = False
    """Whether it fails to delete what it is told to."""
    requests: list[str] = field(default_factory=list)
    """Method and target of each request."""
    sent: trio.Event = field(default_factory=trio.Event)
    """Set when a body was sent as far as it goes."""

    async def script(self, stream: trio.SocketStream) -> None:
        """Answer one request as the router of that program does."""
        head = (await read_request(stream)).decode()
        if not head:
            return
        method, target, _ = head.split(" ", 2)
        self.requests.append(f"{method} {target}")
        path, _, query = target.partition("?")
        if path.count("/") != 3:
            await stream.send_all(_answer(404, b"404 page not found\n", "text/plain"))
        elif method not in ("GET", "DELETE"):
            await stream.send_all(_answer(405))
        elif path != self.path or self.gone or (method == "DELETE" and self.keeps):
            await stream.send_all(_answer(500))
        elif method == "DELETE":
            self.gone = True
            await stream.send_all(_answer(200))
        elif "" in self.files:
            await self._send_file(stream, head.lower())
        elif self.kind == "curio" and "\r\nrange:" in head.lower():
            await stream.send_all(_answer(500))
        else:
            await self._send(stream, minimal="mincache" in query)

    async def _send_file(self, out: trio.SocketStream, head: str) -> None:
        data = self.files[""]
        status, more = "200 OK", ""
        if "\r\nrange: bytes=0-0\r\n" in head:
            status, more = "206 Partial Content", f"Content-Range: bytes 0-0/{len(data)}\r\n"
            data = data[:1]
        await out.send_all(
            f"HTTP/1.1 {status}\r\nContent-Type: application/octet-stream\r\n"
            f"Last-Modified: Sun, 13 Sep 2020 12:26:40 GMT\r\n{more}"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )

    async def _send(self, out: trio.SocketStream, *, minimal: bool) -> None:
        files = self.files
        if self.kind == "curio":
            files = {name: data for name, data in files.items() if _travels(name, minimal)}
        body = stream(files) if self.kind == "curio" else unterminated(files)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\n"
        await out.send_all(head + b"Transfer-Encoding: chunked\r\n\r\n")
        body = body if self.cut is None else body[: self.cut]
        for at in range(0, len(body), 1000):
            piece = body[at : at + 1000]
            await out.send_all(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.sent.set()
        if self.stalls:
            await trio.sleep_forever()
        if not self.breaks:
            await out.send_all(b"0\r\n\r\n")


def _travels(name: str, minimal: bool) -> bool:
    """The list of that program, by its own words: no tree-c of small sectors, nothing unknown."""
    if name in ("p_aux", "t_aux", "snap-vproof.json") or "-tree-r-last" in name:
        return True
    known = name.startswith("sc-02-data-") and name != "sc-02-data-tree-c.dat"
    return not minimal and (known or name in ("batch.json", "commit-phase1-output"))


def _answer(status: int, body: bytes = b"", kind: str = "application/octet-stream") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@asynccontextmanager
async def foreign(node: Foreign) -> AsyncIterator[str]:
    """The base URL of another program's node."""
    async with peer(node.script) as url:
        yield f"{url}/remote"
