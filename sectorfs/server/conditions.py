"""Validators, preconditions and byte ranges of a file (RFC 9110 §§ 8.8, 13, 14): pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import msgspec

from sectorfs.errors import BadRange
from sectorfs.wire.heads import spell_date

_MAX_DATE = 253402300799
"""End of the year 9999: dates beyond have no HTTP spelling."""
_ETAGS = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_ONE_RANGE = re.compile(r"(?:([0-9]+)-([0-9]*)|-([0-9]+))", re.ASCII)
_PLAIN_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})", re.ASCII)
_HUGE = 10**19
MAX_RANGES = 64
"""In one request: far more than readers of pieces ask for, few enough to send by `sendfile`."""


class Validators(msgspec.Struct, frozen=True):
    """What identifies one content of a file."""

    etag: str
    """Strong, with its quotes."""
    modified: int
    """Seconds since the epoch."""

    def headers(self) -> tuple[tuple[str, str], ...]:
        """ETag and, where the time can be spelled, Last-Modified."""
        if not 0 <= self.modified <= _MAX_DATE:
            return (("etag", self.etag),)
        return (("etag", self.etag), ("last-modified", spell_date(self.modified)))


def validators(*, inode: int, size: int, mtime_ns: int) -> Validators:
    """Of a file with this identity on its file system."""
    return Validators(f'"{inode:x}-{size:x}-{mtime_ns:x}"', mtime_ns // 10**9)


def precondition(headers: Mapping[str, str], current: Validators) -> int | None:
    """412 or 304 when the request's conditions say so, else None."""
    if "if-match" in headers:
        tags = headers["if-match"].strip()
        if tags != "*" and current.etag not in _ETAGS.findall(tags):
            return 412
    elif (limit := _date(headers.get("if-unmodified-since"))) is not None and (
        current.modified > limit
    ):
        return 412
    if "if-none-match" in headers:
        tags = headers["if-none-match"].strip()
        weak = {tag.removeprefix("W/") for tag in _ETAGS.findall(tags)}
        return 304 if tags == "*" or current.etag in weak else None
    since = _date(headers.get("if-modified-since"))
    return 304 if since is not None and current.modified <= since else None


def byte_ranges(
    headers: Mapping[str, str], current: Validators, size: int
) -> tuple[tuple[int, int], ...] | None:
    """Offsets and lengths asked for, in that order; None means the whole file.

    Another unit, and an If-Range about another content, mean the whole file; ranges outside the
    file are left out while others are within. `BadRange` for all else: a client that asked wrongly
    for a few bytes is not helped with 32 GiB.
    """
    text = headers.get("range")
    if text is None or not _if_range(headers, current):
        return None
    unit, equals, spec = text.partition("=")
    if unit.strip().lower() != "bytes" and equals:
        return None
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if len(parts) > MAX_RANGES:
        raise BadRange(f"{len(parts)} ranges, at most {MAX_RANGES} at a time")
    spans = tuple(span for span in [_span(part, size) for part in parts] if span is not None)
    if not spans:
        raise BadRange(f"cannot serve range {text[:80]!r} of {size} bytes")
    if sum(length for _, length in spans) > size:
        raise BadRange(f"ranges of more bytes than the {size} there are")
    return spans


def plain_ranges(headers: Mapping[str, str], limit: int) -> tuple[tuple[int, int], ...] | None:
    """Offsets and lengths asked for, told without knowing the file; None when that cannot be, or
    for more than `limit` bytes together, or when the request is not a plain one for ranges."""
    parts = headers.get("range", "").removeprefix("bytes=").split(",")
    found = [_PLAIN_RANGE.fullmatch(part.strip()) for part in parts[: MAX_RANGES + 1]]
    spans = tuple((int(one[1]), int(one[2]) + 1 - int(one[1])) for one in found if one)
    if len(spans) != len(parts) or len(spans) > MAX_RANGES:
        return None
    if min(length for _, length in spans) < 1 or sum(length for _, length in spans) > limit:
        return None
    return spans


def _span(part: str, size: int) -> tuple[int, int] | None:
    """Offset and length of one range; None if it lies outside. `BadRange` for bad syntax."""
    match = _ONE_RANGE.fullmatch(part)
    if match is None:
        raise BadRange(f"not a range: {part[:80]!r}")
    first, last, suffix = match.groups()
    if suffix is not None:
        length = min(_number(suffix), size)
        return (size - length, length) if length else None
    start = _number(first)
    end = min(_number(last), size - 1) if last else size - 1
    if last and _number(last) < start:
        raise BadRange(f"not a range: {part[:80]!r}")
    return (start, end - start + 1) if start < size else None


def _number(digits: str) -> int:
    """Python refuses to convert thousands of digits; beyond any file they are all alike."""
    return int(digits) if len(digits) < 20 else _HUGE


def _if_range(headers: Mapping[str, str], current: Validators) -> bool:
    """Whether the Range header counts."""
    text = headers.get("if-range")
    if text is None:
        return True
    if text.strip().startswith(('"', "W/")):
        return text.strip() == current.etag
    return _date(text) == current.modified


def _date(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(parsedate_to_datetime(text).timestamp())
    except (ValueError, OverflowError):
        return None
