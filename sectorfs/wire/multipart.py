"""The parts of a ``multipart/byteranges`` body (RFC 9110, section 14.6). Pure, and strict.

What does not parse is a `ValueError`: bytes of a file may look like anything, so that a part ends
where its own Content-Range says and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19}|\*)", re.ASCII)
"""First byte, last byte, total."""

_BOUNDARY = re.compile(
    r"""multipart/byteranges\s*;\s*boundary=("?)([-A-Za-z0-9'()+_,./:=?]{1,70})\1""",
    re.IGNORECASE | re.ASCII,
)
_HEADER_LIMIT = 4096


class Part(msgspec.Struct, frozen=True):
    """One range of a file."""

    start: int
    end: int
    """One past the last byte."""
    total: int | None
    data: memoryview
    headers: Mapping[str, str] = {}
    """By lower-case name."""


def boundary_of(content_type: str) -> str | None:
    """The boundary that a Content-Type names; None when it is another type."""
    found = _BOUNDARY.fullmatch(content_type.strip())
    return found[2] if found else None


def parts(body: bytes, boundary: str) -> Iterator[Part]:
    """The parts of a body in its order."""
    view, line = memoryview(body), f"--{boundary}".encode()
    at = 0
    if not body.startswith(line):
        raise ValueError("does not begin with its boundary")
    while True:
        at += len(line)
        if body[at : at + 2] == b"--":
            if body[at + 2 :] not in (b"", b"\r\n"):
                raise ValueError("goes on after its end")
            return
        part, at = _part(body, view, at)
        yield part
        if not body.startswith(b"\r\n" + line, at):
            raise ValueError(f"no boundary after byte {part.end - 1}")
        at += 2


def _part(body: bytes, view: memoryview, at: int) -> tuple[Part, int]:
    end = body.find(b"\r\n\r\n", at, at + _HEADER_LIMIT)
    if end < 0 or body[at : at + 2] != b"\r\n":
        raise ValueError("a part without a header")
    header = body[at + 2 : end].decode("latin-1").split("\r\n")
    fields = [line.partition(":") for line in header]
    ranges = [value.strip() for name, _, value in fields if name.lower() == "content-range"]
    found = CONTENT_RANGE.fullmatch(ranges[0]) if len(ranges) == 1 else None
    if found is None or found[1] is None:
        raise ValueError("a part without a valid Content-Range")
    first, last = int(found[1]), int(found[2])
    total = None if found[3] == "*" else int(found[3])
    length = last + 1 - first
    if length < 1 or (total is not None and last >= total):
        raise ValueError("a Content-Range that makes no sense")
    begin = end + 4
    data = view[begin : begin + length]
    if len(data) != length:
        raise ValueError(f"ends within bytes {first}-{last}")
    headers = {name.lower(): value.strip() for name, _, value in fields}
    return Part(first, last + 1, total, data, headers), begin + length
