"""What a handler of the server gets and gives: `Request`, `Reply`, its bodies, and their limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from urllib.parse import parse_qs, unquote_to_bytes

import msgspec
import trio

from sectorfs.errors import BadInput, SectorFSError, TooLarge

T = TypeVar("T")

Gone = Callable[[], Awaitable[object]]
"""Returns once the client closed the connection; for whoever waits on its behalf."""

_MAX_FIELDS = 64


class Runner(Protocol):
    """Runs blocking work in a thread: `Lane.run`, or `Lane.finish` where the text says so."""

    async def __call__(self, call: Callable[[], T], /, *, what: str) -> T:
        """Run `call`; raise what it raises, translated into the family of errors."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a server bears from its clients; bytes and seconds."""

    header_bytes: int = 16 * 1024
    header_time: float = 10
    """From the first byte of a request to the end of its header."""
    idle: float = 100
    """Between two requests on one connection. Go's clients close theirs after 90 s: a server that
    does so first meets a request on its way, which is lost unless it was a GET."""
    body_bytes: int = 100 * 1024 * 1024
    """Of a request's body; a handler may ask for less."""
    body_progress: float = 10
    """Between two pieces of a request's body."""
    write_progress: float = 10
    """A client that takes nothing for so long is cut off."""
    connections: int = 1024
    requests: int = 10_000
    """On one connection; the client opens another for more."""
    linger: float = 2
    """For the client to read the last reply before the connection is closed."""


class RequestTimedOut(BadInput):
    """A request that came too slowly."""

    status = 408


class HeaderTooLarge(TooLarge):
    """A request's header beyond its limit."""

    status = 431


class MethodRefused(BadInput):
    """A method that the path does not have."""

    status = 405

    def __init__(self, what: str, thing: object = "", *, allow: str) -> None:
        super().__init__(what, thing, f"use {allow}")
        self.allow = allow
        """The methods it has, as the Allow header lists them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A parsed request; its body is read only when asked for."""

    method: str
    segments: tuple[str, ...]
    """The path, split at "/" and then percent-decoded; none for "/" itself."""
    query: dict[str, list[str]]
    headers: dict[str, str]
    """By lower-case name; a repeated header's values are joined with commas."""
    peer: str
    """The client's IP address."""
    read_body: Callable[[int], Awaitable[bytes]] = field(repr=False)
    gone: Gone = field(default=trio.sleep_forever, repr=False)

    @property
    def path(self) -> str:
        """The decoded path, for messages."""
        return "/" + "/".join(self.segments)

    @property
    def loopback(self) -> bool:
        """True when the client is on this machine."""
        return is_loopback(self.peer)

    async def body(self, limit: int) -> bytes:
        """The whole body; `TooLarge` beyond `limit` bytes."""
        return await self.read_body(limit)


class FileBody:
    """A piece of an open file as a reply's body; the server closes it once, whatever happens."""

    def __init__(
        self,
        descriptor: AbstractContextManager[int],
        *,
        offset: int,
        length: int,
        run: Runner,
        close: Callable[[], None],
    ) -> None:
        self.descriptor = descriptor
        """Entered for the file descriptor by each thread that uses it."""
        self.offset = offset
        self.length = length
        self.run = run
        """Executes the reading side; may give a call up at its deadline, like `Lane.run`."""
        self._close: Callable[[], None] | None = close

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        close, self._close = self._close, None
        if close is not None:
            close()


class LateFile(msgspec.Struct, frozen=True):
    """A file within a body, opened only when its turn comes: many may follow each other."""

    length: int
    """Bytes the body has of it, whatever `open` finds."""
    open: Callable[[], Awaitable[FileBody]]
    """Its error breaks the reply off, which is all that can be told after the header."""


class PartedBody:
    """A reply's body made of parts, sent in order; closed once, whatever happens."""

    def __init__(
        self, parts: Sequence[bytes | LateFile], *, close: Callable[[], None] | None = None
    ) -> None:
        self.parts = tuple(parts)
        self.length = sum(
            part.length if isinstance(part, LateFile) else len(part) for part in self.parts
        )
        self._close = close

    def close(self) -> None:
        """Let go of what the parts are made from; a second call does nothing."""
        close, self._close = self._close, None
        if close is not None:
            close()


@dataclass(frozen=True)
class Reply:
    """What a handler answers. Content-Length, Date and Connection are the server's."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | FileBody | PartedBody | None = None

    @property
    def length(self) -> int:
        """Bytes of the body."""
        if isinstance(self.body, FileBody | PartedBody):
            return self.body.length
        return len(self.body or b"")

    def close(self) -> None:
        """Release what the body holds open, if anything."""
        if isinstance(self.body, FileBody | PartedBody):
            self.body.close()


def text_reply(status: int, text: str, *, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    """One line of plain text."""
    line = " ".join(text.split()) + "\n"
    kind = ("content-type", "text/plain; charset=utf-8")
    return Reply(status, (kind, *headers), line.encode("utf-8", "replace"))


def error_reply(exc: SectorFSError, accept: str = "") -> Reply:
    """An error as one line, or as JSON when the client's Accept header asks for it."""
    headers: tuple[tuple[str, str], ...] = ()
    if exc.status == 401:
        headers = (("www-authenticate", "Bearer"),)
    if isinstance(exc, MethodRefused):
        headers = (("allow", exc.allow),)
    if "application/json" in accept:
        shape = {"error": exc.what, "thing": exc.thing, "hint": exc.hint}
        kind = ("content-type", "application/json")
        return Reply(exc.status, (kind, *headers), msgspec.json.encode(shape) + b"\n")
    return text_reply(exc.status, str(exc), headers=headers)


def is_loopback(address: str) -> bool:
    """Whether an IP address, IPv4-mapped ones included, is this machine's own."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped.is_loopback
    return ip.is_loopback


def parse_target(target: str) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """Path segments and query of a request target; `BadInput` when a segment is no plain name."""
    if target[:7].lower() == "http://":
        target = "/" + target[7:].partition("/")[2]
    if not target.startswith("/"):
        raise BadInput("not a path", target[:80])
    path, _, query = target.partition("?")
    names = path[1:].split("/") if path != "/" else []
    try:
        fields = parse_qs(
            query, keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS
        )
    except ValueError as exc:
        raise BadInput("the query does not parse", path[:80]) from exc
    return tuple(_segment(name) for name in names), fields


def _segment(raw: str) -> str:
    for escape in raw.split("%")[1:]:
        if len(escape) < 2 or not all(c in "0123456789abcdefABCDEF" for c in escape[:2]):
            raise BadInput("bad percent-encoding in the path", raw[:80])
    try:
        name = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError as exc:
        raise BadInput("the path is not UTF-8", raw[:80]) from exc
    if "\0" in name or "/" in name or name in (".", ".."):
        raise BadInput("not the name of a file", raw[:80])
    return name
