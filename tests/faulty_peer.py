"""A peer that misbehaves on command: another node's half of the protocol, over a directory.

It answers as our nodes do (HEAD, one range, several ranges, validators, kept connections, and
manifests where it was told to `prove`) until it is given a *fault*. A fault gets the connection and
the answer that a good node would give, and does with it what bad nodes do. One that waits ends when
its client hangs up, which is counted.
"""

from __future__ import annotations

import base64
import itertools
import os
import random
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from sectorfs.errors import BadRange
from sectorfs.server.conditions import byte_ranges, validators
from sectorfs.stores.manifest import Manifest, edge_blocks
from sectorfs.stores.rolls import Roll

_CHUNK = 256 << 10
_HEAD_LIMIT = 64 << 10
_BOUNDARY = "a-boundary-of-the-faulty-peer"

Span = tuple[int, int]
"""Offset and length."""


class Asked(msgspec.Struct, frozen=True):
    """A request."""

    method: str
    path: str
    """Below ``/remote/``."""
    spans: tuple[Span, ...]
    """Empty for the whole file."""


class Answer(msgspec.Struct):
    """What a good node says; faults change it."""

    status: str
    headers: dict[str, str]
    body: list[bytes | tuple[int, Span]]
    """Bytes, and spans of an open file."""
    length: int

    def head(self) -> bytes:
        """The answer up to its body."""
        lines = [f"HTTP/1.1 {self.status}", *(f"{k}: {v}" for k, v in self.headers.items())]
        return "\r\n".join((*lines, f"content-length: {self.length}", "", "")).encode()

    def pieces(self) -> Iterator[bytes]:
        """The body, a little at a time."""
        for part in self.body:
            if isinstance(part, bytes):
                yield part
                continue
            fd, (offset, length) = part
            for at in range(offset, offset + length, _CHUNK):
                yield os.pread(fd, min(_CHUNK, offset + length - at), at)


class HangUp(Exception):
    """The connection ends here."""


class FaultyPeer:
    """See the module. Its threads end with `close`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        """Sector files, as on a storage path."""
        self.fault: Fault | None = None
        """What it does wrong from now on."""
        self.asked: list[Asked] = []
        self._told: dict[str, Manifest] = {}
        self.abandoned = 0
        """Requests whose clients hung up while they waited."""
        self.waiting = 0
        """Requests that a fault does not answer now."""
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/remote"
        """Base URL, as the Index lists it."""
        self._listen()

    # --- what tests do with it ---

    def prove(self, path: str, made: Manifest, *, header: bool = True) -> None:
        """Serve the manifest of a file (``cache/s-t01000-1/p_aux``); with its bytes too."""
        kept = self._manifest(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(made.encode())
        if header:
            self._told[path] = made

    def prove_directory(self, path: str, roll: Roll) -> None:
        """Serve the roll of a directory."""
        kept = self._manifest(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(roll.encode())

    def _manifest(self, path: str) -> Path:
        kind, sector, *member = path.split("/")
        return self.root / "manifests" / kind / sector / (member[0] if member else "whole")

    def asked_bytes(self) -> int:
        """Bytes of all ranges asked for since `forget`."""
        return sum(length for one in self.asked for _, length in one.spans)

    def forget(self) -> None:
        """Begin to count anew."""
        self.asked.clear()
        self.abandoned = 0

    def die(self) -> None:
        """Refuse connections, and break those there are."""
        with suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break()

    def revive(self) -> None:
        """Be there again, at the same address."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listen()

    def close(self) -> None:
        """End every thread."""
        self._closing.set()
        self.die()
        for thread in self._threads:
            thread.join(10)

    # --- what faults need ---

    def send(self, connection: socket.socket, data: bytes) -> None:
        """Send all of it; a client that is gone ends the connection."""
        try:
            connection.sendall(data)
        except OSError as exc:
            raise HangUp from exc

    def wait(self, connection: socket.socket, seconds: float | None = None) -> None:
        """Do nothing for so long, or until the client hangs up."""
        with self._lock:
            self.waiting += 1
        try:
            if self._hung_up(connection, seconds):
                with self._lock:
                    self.abandoned += 1
                raise HangUp
        finally:
            with self._lock:
                self.waiting -= 1

    def _hung_up(self, connection: socket.socket, seconds: float | None) -> bool:
        timeout = None if seconds is None else seconds * 1000
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        return bool(poll.poll(timeout))

    # --- the server ---

    def _listen(self) -> None:
        self._begin(self._accept, self._listener)

    def _begin(self, run: Callable[[socket.socket], None], of: socket.socket) -> None:
        thread = threading.Thread(target=run, args=(of,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._connections.add(connection)
                self._begin(self._serve, connection)

    def _break(self) -> None:
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(HangUp, OSError):
                rest = b""
                while not self._closing.is_set():
                    rest = self._one(connection, rest)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _one(self, connection: socket.socket, data: bytes) -> bytes:
        """Answer a request; what came behind it."""
        while b"\r\n\r\n" not in data:
            piece = connection.recv(_HEAD_LIMIT)
            if not piece:
                raise HangUp
            data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        with self._opened(path.removeprefix("/remote/")) as fd:
            asked, answer = self._answer(method, path, headers, fd)
            self.asked.append(asked)
            (self.fault or good)(self, connection, asked, answer)
        return rest

    @contextmanager
    def _opened(self, path: str) -> Iterator[int | None]:
        """A file of a storage path by its place in URLs; None when it is not there."""
        file, asked, member = path.replace("/files/", "/").partition("/manifest")
        kept = self._manifest(file + member) if asked else self.root / file
        try:
            fd = os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def _answer(
        self, method: str, path: str, headers: dict[str, str], fd: int | None
    ) -> tuple[Asked, Answer]:
        name = path.removeprefix("/remote/")
        if fd is None:
            return Asked(method, name, ()), Answer("404 Not Found", {}, [], 0)
        found = os.fstat(fd)
        size = found.st_size
        current = validators(inode=found.st_ino, size=size, mtime_ns=found.st_mtime_ns)
        common = {
            **dict(current.headers()),
            "content-type": "application/octet-stream",
            "sectorfs-mtime-ns": str(found.st_mtime_ns),
        }
        try:
            spans = byte_ranges(headers, current, size) if method == "GET" else None
        except BadRange:
            common["content-range"] = f"bytes */{size}"
            return Asked(method, name, ()), Answer("416 Range Not Satisfiable", common, [], 0)
        if spans is None:
            body: list[bytes | tuple[int, Span]] = [(fd, (0, size))] if method == "GET" else []
            return Asked(method, name, ()), Answer("200 OK", common, body, size)
        made = self._told.get(name.replace("/files/", "/"))
        if made is not None and headers.get("sectorfs-leaves") == "1" and len(spans) == 1:
            common["sectorfs-leaves"] = _leaves(made, *spans[0])
        return Asked(method, name, spans), _partial(fd, size, spans, common)


def _leaves(made: Manifest, offset: int, length: int) -> str:
    edges = edge_blocks(made.size, offset, offset + length)
    return base64.b64encode(b"".join(made.leaves_of(block) for block in edges)).decode()


def _partial(fd: int, size: int, spans: Sequence[Span], headers: dict[str, str]) -> Answer:
    if len(spans) == 1:
        headers["content-range"] = _extent(spans[0], size)
        return Answer("206 Partial Content", headers, [(fd, spans[0])], spans[0][1])
    headers["content-type"] = f"multipart/byteranges; boundary={_BOUNDARY}"
    body: list[bytes | tuple[int, Span]] = []
    length = 0
    line = f"--{_BOUNDARY}"
    for span in spans:
        head = f"{line}\r\ncontent-range: {_extent(span, size)}\r\n\r\n".encode()
        body += [head, (fd, span)]
        length += len(head) + span[1]
        line = f"\r\n--{_BOUNDARY}"
    end = f"{line}--\r\n".encode()
    return Answer("206 Partial Content", headers, [*body, end], length + len(end))


def _extent(span: Span, size: int) -> str:
    return f"bytes {span[0]}-{span[0] + span[1] - 1}/{size}"


# --- how to answer ---

Fault = Callable[[FaultyPeer, socket.socket, Asked, Answer], None]


def good(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
    """As a node of ours."""
    peer.send(connection, answer.head())
    for piece in answer.pieces():
        peer.send(connection, piece)


def silent(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
    """Take the request and never say anything."""
    peer.wait(connection)


def silent_from(offset: int) -> Fault:
    """Never answer about bytes from there on."""

    def fault(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        beyond = any(start + length > offset for start, length in asked.spans)
        (silent if beyond else good)(peer, connection, asked, answer)

    return fault


def dripping(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
    """Send the head at once and the body at a byte a second."""
    peer.send(connection, answer.head())
    for piece in answer.pieces():
        for at in range(len(piece)):
            peer.send(connection, piece[at : at + 1])
            peer.wait(connection, 1)


def stalls_after(count: int) -> Fault:
    """Fall silent after so many bytes of the body."""
    return _cut(count, lambda peer, connection: peer.wait(connection))


def closes_after(count: int) -> Fault:
    """Hang up after so many bytes of the body."""
    return _cut(count, lambda peer, connection: None)


def _cut(count: int, then: Callable[[FaultyPeer, socket.socket], None]) -> Fault:
    def fault(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        peer.send(connection, answer.head())
        left = count
        for piece in answer.pieces():
            peer.send(connection, piece[:left])
            left -= len(piece)
            if left <= 0:
                then(peer, connection)
                raise HangUp
        # A body as short as that comes whole.

    return fault


def with_length(more: int) -> Fault:
    """Announce and send so many bytes more (or fewer) than the range has."""

    def fault(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        if not answer.status.startswith("206"):
            good(peer, connection, asked, answer)
            return
        body = b"".join(answer.pieces())
        answer.body = [body[: len(body) + more] if more < 0 else body + bytes(more)]
        answer.length += more
        good(peer, connection, asked, answer)

    return fault


def elsewhere(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
    """Answer with the range that lies a piece before or behind the one asked for."""
    if len(asked.spans) == 1 and isinstance(answer.body[0], tuple):
        offset, length = asked.spans[0]
        fd, _ = answer.body[0]
        (extent,) = (name for name in answer.headers if name.lower() == "content-range")
        size = int(answer.headers[extent].rpartition("/")[2])
        other = (
            offset - length if offset >= length else min(offset + length, size - length),
            length,
        )
        answer.headers[extent] = _extent(other, size)
        answer.body = [(fd, other)]
    good(peer, connection, asked, answer)


class Flipping:
    """Flip one bit, anywhere, of the bytes of files in answers that `when` picks.

    It gets the number of the answer, and whether the same was never asked before.
    """

    def __init__(self, when: Callable[[int, bool], bool], seed: int = 0) -> None:
        self.flipped = 0
        self._when = when
        self._random = random.Random(seed)
        self._count = itertools.count()
        self._seen: set[tuple[str, tuple[Span, ...]]] = set()

    def __call__(
        self, peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer
    ) -> None:
        """See the class."""
        spans = [part for part in answer.body if isinstance(part, tuple)]
        key = asked.path, asked.spans
        first = key not in self._seen
        self._seen.add(key)
        if spans and "/manifest" not in asked.path and self._when(next(self._count), first):
            place = self._random.randrange(len(answer.body))
            while not isinstance(answer.body[place], tuple):
                place = self._random.randrange(len(answer.body))
            answer.body[place] = self._flip(answer.body[place])
            self.flipped += 1
        good(peer, connection, asked, answer)

    def _flip(self, part: bytes | tuple[int, Span]) -> bytes:
        assert isinstance(part, tuple)
        fd, (offset, length) = part
        data = bytearray(os.pread(fd, length, offset))
        bit = self._random.randrange(8 * length)
        data[bit // 8] ^= 1 << bit % 8
        return bytes(data)


def saying(status: str) -> Fault:
    """Answer everything with an error."""

    def fault(peer: FaultyPeer, connection: socket.socket, asked: Asked, answer: Answer) -> None:
        good(peer, connection, asked, Answer(status, {}, [], 0))

    return fault


FAULTS: dict[str, Fault | None] = {
    "is silent": silent,
    "sends a byte a second": dripping,
    "stalls half way": stalls_after(50_000),
    "closes at once": closes_after(0),
    "closes half way": closes_after(50_000),
    "sends more": with_length(1000),
    "sends less": with_length(-1000),
    "sends another range": elsewhere,
    "fails": saying("500 Internal Server Error"),
    "has it not": saying("404 Not Found"),
    "is dead": None,
}
"""What a source may do wrong, as it is said of one that does."""


@contextmanager
def faulty_peers(root: Path, *names: str) -> Iterator[list[FaultyPeer]]:
    """Peers, each over a directory of its own."""
    peers = []
    try:
        for name in names:
            (root / name).mkdir(parents=True)
            peers.append(FaultyPeer(root / name))
        yield peers
    finally:
        for peer in peers:
            peer.close()
