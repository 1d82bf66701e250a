"""The reply with an open file: whole, a range of it, or several ranges (multipart/byteranges)."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import trio

from sectorfs.errors import BadRange
from sectorfs.server.conditions import byte_ranges, precondition, validators
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.transfer import MTIME_HEADER
from sectorfs.wire.messages import FileBody, LateFile, PartedBody, Reply, Request, error_reply

OCTETS = "application/octet-stream"

Headers = tuple[tuple[str, str], ...]


def file_reply(request: Request, opened: OpenFile) -> Reply:
    """The reply that owns `opened`, or has closed it already."""
    current = validators(inode=opened.inode, size=opened.size, mtime_ns=opened.mtime_ns)
    headers = (
        *current.headers(),
        ("accept-ranges", "bytes"),
        (MTIME_HEADER, str(opened.mtime_ns)),
    )
    status = precondition(request.headers, current)
    if status is not None:
        opened.close()
        return Reply(status, headers)
    if request.method != "GET":
        return _whole(opened, headers)
    try:
        spans = byte_ranges(request.headers, current, opened.size)
    except BadRange as exc:
        opened.close()
        refusal = error_reply(exc, request.headers.get("accept", ""))
        extent = ("content-range", f"bytes */{opened.size}")
        return Reply(416, (*refusal.headers, *headers, extent), refusal.body)
    if spans is None:
        return _whole(opened, headers)
    if len(spans) > 1:
        return _parts(opened, spans, headers)
    offset, length = spans[0]
    extent = ("content-range", _extent(offset, length, opened.size))
    body = _piece(opened, offset, length, closes=True)
    return Reply(206, (("content-type", OCTETS), *headers, extent), body)


def _whole(opened: OpenFile, headers: Headers) -> Reply:
    body = _piece(opened, 0, opened.size, closes=True)
    return Reply(200, (("content-type", OCTETS), *headers), body)


def _parts(opened: OpenFile, spans: Sequence[tuple[int, int]], headers: Headers) -> Reply:
    boundary = secrets.token_hex(16)  # nothing that a file could hold by chance
    parts: list[bytes | LateFile] = []
    line = f"--{boundary}"
    for offset, length in spans:
        extent = _extent(offset, length, opened.size)
        head = f"{line}\r\ncontent-type: {OCTETS}\r\ncontent-range: {extent}\r\n\r\n"
        parts += [head.encode(), _late(opened, offset, length)]
        line = f"\r\n--{boundary}"
    parts.append(f"{line}--\r\n".encode())
    kind = ("content-type", f"multipart/byteranges; boundary={boundary}")
    return Reply(206, (kind, *headers), PartedBody(parts, close=opened.close))


def _late(opened: OpenFile, offset: int, length: int) -> LateFile:
    async def piece() -> FileBody:
        await trio.lowlevel.checkpoint()
        return _piece(opened, offset, length, closes=False)

    return LateFile(length, piece)


def _piece(opened: OpenFile, offset: int, length: int, *, closes: bool) -> FileBody:
    return FileBody(
        opened.descriptor,
        offset=offset,
        length=length,
        run=opened.lane.run,
        close=opened.close if closes else _nothing,
    )


def _nothing() -> None:
    """The file is closed with the whole reply."""


def _extent(offset: int, length: int, size: int) -> str:
    return f"bytes {offset}-{offset + length - 1}/{size}"
