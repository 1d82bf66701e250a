"""The reply with an open file: whole, a range of it, or several ranges (multipart/byteranges).

Small ranges come as an `Excerpt`, read by the thread that opened the file; all else by `sendfile`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

import trio

from sectorfs.errors import BadRange, SourceFailed
from sectorfs.server.conditions import byte_ranges, precondition, validators
from sectorfs.stores.answers import LEAVES_HEADER, MTIME_HEADER
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.regular import Excerpt, Spans
from sectorfs.wire.messages import FileBody, LateFile, PartedBody, Reply, Request, error_reply

OCTETS = "application/octet-stream"

Headers = tuple[tuple[str, str], ...]


def file_reply(request: Request, opened: OpenFile) -> Reply:
    """The reply that owns `opened`, or has closed it already."""
    headers, wanted = _wanted(request, opened)
    if isinstance(wanted, Reply):
        opened.close()
        return wanted
    if wanted is None:
        return _whole(opened, headers)
    if len(wanted) > 1:
        return _parts(opened, wanted, headers)
    offset, length = wanted[0]
    return _one(headers, wanted[0], opened.size, _piece(opened, offset, length, closes=True))


def excerpt_reply(
    request: Request, excerpt: Excerpt, asked: Spans, leaves: Sequence[str]
) -> Reply | None:
    """The reply with an excerpt of the spans `asked`; None when the whole file is wanted.

    `leaves` go beside those of the spans that lie in the file; empty ones are left out.
    """
    headers, wanted = _wanted(request, excerpt)
    if isinstance(wanted, Reply) or wanted is None:
        return wanted
    within = [
        piece
        for (offset, _), piece in zip(asked, excerpt.pieces, strict=True)
        if offset < excerpt.size
    ]
    for (offset, length), piece in zip(wanted, within, strict=True):
        if len(piece) != length:
            raise SourceFailed(f"the file ends within {length} bytes from {offset}", request.path)
    if len(wanted) == 1:
        beside = ((LEAVES_HEADER, leaves[0]),) if leaves[0] else ()
        return _one((*headers, *beside), wanted[0], excerpt.size, within[0])
    boundary = _boundary()
    lines = _part_heads(wanted, boundary, excerpt.size, leaves)
    body = b"".join(part for pair in zip(lines, within, strict=True) for part in pair)
    return Reply(206, (_parted(boundary), *headers), body + _end(boundary))


def _wanted(request: Request, content: OpenFile | Excerpt) -> tuple[Headers, Reply | Spans | None]:
    """Headers that say what the content is, and a reply without it, its spans, or None for all."""
    current = validators(inode=content.inode, size=content.size, mtime_ns=content.mtime_ns)
    headers = (
        *current.headers(),
        ("accept-ranges", "bytes"),
        (MTIME_HEADER, str(content.mtime_ns)),
    )
    status = precondition(request.headers, current)
    if status is not None:
        return headers, Reply(status, headers)
    if request.method != "GET":
        return headers, None
    try:
        return headers, byte_ranges(request.headers, current, content.size)
    except BadRange as exc:
        refusal = error_reply(exc, request.headers.get("accept", ""))
        extent = ("content-range", f"bytes */{content.size}")
        return headers, Reply(416, (*refusal.headers, *headers, extent), refusal.body)


def _one(headers: Headers, span: tuple[int, int], size: int, body: bytes | FileBody) -> Reply:
    extent = ("content-range", _extent(*span, size))
    return Reply(206, (("content-type", OCTETS), *headers, extent), body)


def _whole(opened: OpenFile, headers: Headers) -> Reply:
    body = _piece(opened, 0, opened.size, closes=True)
    return Reply(200, (("content-type", OCTETS), *headers), body)


def _parts(opened: OpenFile, spans: Spans, headers: Headers) -> Reply:
    boundary = _boundary()
    lines = _part_heads(spans, boundary, opened.size, [""] * len(spans))
    parts: list[bytes | LateFile] = []
    for line, (offset, length) in zip(lines, spans, strict=True):
        parts += [line, _late(opened, offset, length)]
    parts.append(_end(boundary))
    return Reply(206, (_parted(boundary), *headers), PartedBody(parts, close=opened.close))


def _boundary() -> str:
    return secrets.token_hex(16)  # nothing that a file could hold by chance


def _parted(boundary: str) -> tuple[str, str]:
    return ("content-type", f"multipart/byteranges; boundary={boundary}")


def _part_heads(spans: Spans, boundary: str, size: int, leaves: Sequence[str]) -> Iterator[bytes]:
    """What stands before each part."""
    line = f"--{boundary}"
    for span, hashes in zip(spans, leaves, strict=True):
        extent = _extent(*span, size)
        beside = f"{LEAVES_HEADER}: {hashes}\r\n" if hashes else ""
        yield (
            f"{line}\r\ncontent-type: {OCTETS}\r\ncontent-range: {extent}\r\n{beside}\r\n".encode()
        )
        line = f"\r\n--{boundary}"


def _end(boundary: str) -> bytes:
    return f"\r\n--{boundary}--\r\n".encode()


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
