"""The plain heads of HTTP/1.1, parsed and spelled in a few steps; every other one is h11's.

Pure functions. h11 took a third of a small request's time on the server and half of it on the
client. What is accepted here is a strict part of what h11 accepts, and means the same: a whole
head, no body or one with a length, no folded lines. `None` is no verdict: h11 is to look at it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

import msgspec

END = b"\r\n\r\n"

_LINES = re.compile(r"[\t\r\n\x20-\x7e\x80-\xff]*")
_VALUE = re.compile(r"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_ASKS = re.compile(r"(GET|HEAD|DELETE) ([\x21-\x7e]+) HTTP/1\.1")
_ANSWERS = re.compile(r"HTTP/1\.1 ([2-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
_LENGTH = re.compile(r"[0-9]{1,19}", re.ASCII)
_METHOD = re.compile(r"[A-Z]+")
_TARGET = re.compile(r"[\x21-\x7e]+")
_UNUSUAL = frozenset({"transfer-encoding", "expect", "upgrade"})
NO_BODY = frozenset({204, 304})
"""Statuses whose answers never have a body."""

Headers = Iterable[tuple[str, str]]


class RequestHead(msgspec.Struct, frozen=True):
    """A request without its body."""

    method: str
    target: str
    headers: dict[str, str]
    """By lower-case name; a repeated header's values are joined with commas."""
    keep: bool
    """Whether the client wants the connection kept."""


class ResponseHead(msgspec.Struct, frozen=True):
    """An answer without its body."""

    status: int
    headers: dict[str, str]
    """As in `RequestHead`."""
    keep: bool
    """Whether the server keeps the connection."""
    length: int | None
    """Bytes of the body; None when only h11 can tell where it ends."""


def parse_request(head: bytes) -> RequestHead | None:
    """A request that has no body, of bytes that end with an empty line."""
    first, headers = _parse(head)
    asks = _ASKS.fullmatch(first)
    if asks is None or headers is None or not _UNUSUAL.isdisjoint(headers):
        return None
    if "content-length" in headers or "," in headers.get("host", ","):
        return None
    return RequestHead(asks[1], asks[2], headers, wants_keeping(headers))


def parse_response(head: bytes, method: str) -> ResponseHead | None:
    """An answer to `method` whose body has a length or is none."""
    first, headers = _parse(head)
    answers = _ANSWERS.fullmatch(first)
    if answers is None or headers is None or not _UNUSUAL.isdisjoint(headers):
        return None
    status = int(answers[1])
    text = headers.get("content-length")
    if text is not None and not _LENGTH.fullmatch(text):
        return None
    if method == "HEAD" or status in NO_BODY:
        length = 0
    elif text is None:
        return None
    else:
        length = int(text)
    return ResponseHead(status, headers, wants_keeping(headers), length)


def _parse(head: bytes) -> tuple[str, dict[str, str] | None]:
    """The first line and the fields; no fields when any line is unusual."""
    text = head.decode("latin-1")
    first, *lines = text[: -len(END)].split("\r\n")
    ends = len(lines) + 2
    if not _LINES.fullmatch(text) or text.count("\r") != ends or text.count("\n") != ends:
        return first, None
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name):
            return first, None
        add_header(headers, name.lower(), value.strip(" \t"))
    return first, headers


def add_header(headers: dict[str, str], name: str, value: str) -> None:
    """Add one line; the values of several lines of one name are joined."""
    headers[name] = f"{headers[name]}, {value}" if name in headers else value


def wants_keeping(headers: dict[str, str]) -> bool:
    """Whether a message of HTTP/1.1 leaves the connection open."""
    value = headers.get("connection")
    return value is None or "close" not in {token.strip().lower() for token in value.split(",")}


def spell_request(method: str, target: str, headers: Headers) -> bytes | None:
    """A request's head; None when there is something in it that HTTP cannot carry."""
    if not _METHOD.fullmatch(method) or not _TARGET.fullmatch(target):
        return None
    return _spelled(f"{method} {target} HTTP/1.1\r\n", headers)


def spell_response(status: int, headers: Headers) -> bytes:
    """A response's head; `ValueError` when there is something in it that HTTP cannot carry."""
    spelled = _spelled(_status_line(status), headers)
    if spelled is None:
        raise ValueError(f"not headers: {headers!r}")
    return spelled


def _spelled(first: str, headers: Headers) -> bytes | None:
    lines = [first]
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            return None
        lines.append(f"{name}: {value}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode("latin-1")


@lru_cache(maxsize=64)
def _status_line(status: int) -> str:
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = ""
    return f"HTTP/1.1 {status} {reason}\r\n"


def date_now() -> str:
    """The value of a Date header."""
    return spell_date(int(time.time()))


@lru_cache(maxsize=1024)
def spell_date(seconds: int) -> str:
    """A time as HTTP spells it."""
    return formatdate(seconds, usegmt=True)
