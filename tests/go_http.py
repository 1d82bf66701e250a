"""What Go's HTTP server, its file server and gorilla's router make of a request: for stand-ins.

Written from how those answer on the wire, not with our own server: what ours gets wrong must not be
right here too. Answers are `tests.faulty_peer.Answer`, so that every fault there can befall them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import parse_qs

import msgspec

from tests.faulty_peer import Answer, HangUp, Span

_HEAD_LIMIT = 64 << 10
_COPY = 32 << 10
"""Bytes that Go copies, and so sends as a chunk, at a time."""
OCTETS = "application/octet-stream"


class Request(msgspec.Struct, frozen=True):
    """A request with its body."""

    method: str
    target: str
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes = b""

    @property
    def path(self) -> str:
        """Without the query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, list[str]]:
        """Go's ``url.Query()``: keys without a value too."""
        return parse_qs(self.target.partition("?")[2], keep_blank_values=True)


def read_request(connection: socket.socket, data: bytes) -> tuple[Request, bytes]:
    """The next request on a connection, and what came behind it."""
    while b"\r\n\r\n" not in data:
        data += _more(connection)
    head, _, data = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    length = int(headers.get("content-length", 0))
    while len(data) < length:
        data += _more(connection)
    return Request(method, target, headers, data[:length]), data[length:]


def _more(connection: socket.socket) -> bytes:
    piece = connection.recv(_HEAD_LIMIT)
    if not piece:
        raise HangUp
    return piece


# --- answers ---


class Chunked(Answer):
    """A body of a length that nobody said; `length` means nothing."""

    def head(self) -> bytes:
        """The answer up to its body."""
        headers = {**self.headers, "Transfer-Encoding": "chunked"}
        lines = [f"HTTP/1.1 {self.status}", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join((*lines, "", "")).encode()

    def pieces(self) -> Iterator[bytes]:
        """The body in chunks, and its end."""
        for piece in super().pieces():
            for at in range(0, len(piece), _COPY):
                chunk = piece[at : at + _COPY]
                yield b"%x\r\n%b\r\n" % (len(chunk), chunk)
        yield b"0\r\n\r\n"


def say(status: str, text: str = "", kind: str = "text/plain; charset=utf-8") -> Answer:
    """A short answer; Go names no type for an empty one."""
    headers = {"Date": formatdate(usegmt=True)}
    if text:
        headers["Content-Type"] = kind
    return Answer(status, headers, [text.encode()] if text else [], len(text))


def failed() -> Answer:
    """What every problem looks like."""
    return say("500 Internal Server Error")


def not_routed() -> Answer:
    """A path that no route has."""
    return say("404 Not Found", "404 page not found\n")


def wrong_method() -> Answer:
    """A path that routes have, but not with this method."""
    return say("405 Method Not Allowed")


def copied(fd: int, kind: str = OCTETS) -> Answer:
    """``io.Copy`` of a file into an answer: neither a length nor ranges."""
    span = (0, os.fstat(fd).st_size)
    return Chunked("200 OK", {"Content-Type": kind, **_date()}, [(fd, span)], 0)


def served(request: Request, fd: int, *, empty_ranges: bool) -> Answer:
    """``http.ServeFile`` of a regular file; `empty_ranges`: 416 for a range of an empty one.

    (Go has passed over such ranges since its version of 2021.)
    """
    found = os.fstat(fd)
    seconds = found.st_mtime_ns // 10**9
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Type": OCTETS,
        "Last-Modified": formatdate(seconds, usegmt=True),
        **_date(),
    }
    since = _time(request.headers.get("if-unmodified-since"))
    if since is not None and seconds > since:
        return Answer("412 Precondition Failed", headers, [], 0)
    if "if-match" in request.headers and request.headers["if-match"] != "*":
        return Answer("412 Precondition Failed", headers, [], 0)  # there are no ETags
    since = _time(request.headers.get("if-modified-since"))
    if "if-none-match" not in request.headers and since is not None and seconds <= since:
        del headers["Content-Type"]
        return _NoBody("304 Not Modified", headers, [], 0)
    return _ranged(request, fd, headers, seconds, empty_ranges=empty_ranges)


class _NoBody(Answer):
    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status}", *(f"{k}: {v}" for k, v in self.headers.items())]
        return "\r\n".join((*lines, "", "")).encode()


def _ranged(
    request: Request, fd: int, headers: dict[str, str], seconds: int, *, empty_ranges: bool
) -> Answer:
    size = os.fstat(fd).st_size
    text = request.headers.get("range", "")
    if "if-range" in request.headers and _time(request.headers["if-range"]) != seconds:
        text = ""
    try:
        spans = parse_ranges(text, size)
    except NoOverlap:
        if size == 0 and not empty_ranges:
            spans = []
        else:
            answer = _refused("invalid range: failed to overlap\n", headers)
            answer.headers["Content-Range"] = f"bytes */{size}"
            return answer
    except ValueError:
        return _refused("invalid range\n", headers)
    if sum(length for _, length in spans) > size or not spans:
        return Answer("200 OK", headers, [(fd, (0, size))], size)
    if len(spans) == 1:
        headers["Content-Range"] = _extent(spans[0], size)
        return Answer("206 Partial Content", headers, [(fd, spans[0])], spans[0][1])
    return _multipart(fd, size, spans, headers)


def _refused(text: str, headers: Mapping[str, str]) -> Answer:
    answer = say("416 Requested Range Not Satisfiable", text)
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers["Last-Modified"] = headers["Last-Modified"]  # taken out since 2024
    return answer


def _multipart(fd: int, size: int, spans: Sequence[Span], headers: dict[str, str]) -> Answer:
    boundary = os.urandom(30).hex()
    body: list[bytes | tuple[int, Span]] = []
    length = 0
    line = f"--{boundary}"
    for span in spans:
        part = f"{line}\r\nContent-Range: {_extent(span, size)}\r\nContent-Type: {OCTETS}\r\n\r\n"
        body += [part.encode(), (fd, span)]
        length += len(part) + span[1]
        line = f"\r\n--{boundary}"
    end = f"{line}--\r\n".encode()
    headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
    return Answer("206 Partial Content", headers, [*body, end], length + len(end))


class NoOverlap(Exception):
    """Ranges that lie behind the end, all of them."""


def parse_ranges(text: str, size: int) -> list[Span]:
    """Go's ``parseRange``: offsets and lengths; `ValueError` for what is none."""
    if not text:
        return []
    if not text.startswith("bytes="):
        raise ValueError(text)
    spans: list[Span] = []
    behind = False
    for item in text.removeprefix("bytes=").split(","):
        match = re.fullmatch(r"\s*([0-9]*)\s*-\s*([0-9]*)\s*", item, re.ASCII)
        if not item.strip():
            continue
        if match is None or not any(match.groups()):
            raise ValueError(item)
        first, last = match.groups()
        if not first:
            length = min(int(last), size)
            spans.append((size - length, length))
        elif int(first) >= size:
            behind = True
        elif last and int(last) < int(first):
            raise ValueError(item)
        else:
            end = min(int(last), size - 1) if last else size - 1
            spans.append((int(first), end - int(first) + 1))
    if behind and not spans:
        raise NoOverlap
    return spans


def _extent(span: Span, size: int) -> str:
    return f"bytes {span[0]}-{span[0] + span[1] - 1}/{size}"


def _date() -> dict[str, str]:
    return {"Date": formatdate(time.time(), usegmt=True)}


def _time(text: str | None) -> int | None:
    try:
        return int(parsedate_to_datetime(text or "").timestamp())
    except ValueError:
        return None


# --- go-jsonrpc's way of looking at tokens ---


def permissions(request: Request, secret: bytes) -> list[str] | None:
    """What a request may do; None for a token that is none. Without one it may do nothing."""
    text = request.headers.get("authorization", "")
    if not text and "token" in request.query:
        text = f"Bearer {request.query['token'][0]}"
    if not text:
        return []
    if not text.startswith("Bearer "):
        return None
    signed, _, signature = text.removeprefix("Bearer ").rpartition(".")
    expected = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    try:
        if not hmac.compare_digest(_octets(signature), expected):
            return None
        if json.loads(_octets(signed.partition(".")[0]))["alg"] != "HS256":
            return None
        allow = json.loads(_octets(signed.partition(".")[2]))["Allow"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(one) for one in allow]


def _octets(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
