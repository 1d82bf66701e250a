"""What an answer of a peer says, and what must hold of it before it is believed.

Status, type, length, range, version, names: what a peer says wrongly is an error of the family that
names the URL, so that the caller can go on to the next source.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Annotated, TypeVar

import msgspec

from sectorfs.errors import (
    Forbidden,
    NoRanges,
    NotFound,
    SourceFailed,
    Stale,
    TooLarge,
    Unauthorized,
    Unreachable,
)
from sectorfs.index.content import same_mtime
from sectorfs.index.protocol import FsStat
from sectorfs.types import MAX_NUMBER, Facts, MemberFacts, parse_member_name
from sectorfs.wire.multipart import CONTENT_RANGE, boundary_of, parts
from sectorfs.wire.response import Response

MTIME_HEADER = "sectorfs-mtime-ns"
"""Last-Modified to the nanosecond, in answers of our nodes."""

LEAVES_HEADER = "sectorfs-leaves"
"""``1`` in a request for ranges: with leaf hashes, please; in the answer, or in each of its parts,
those of the blocks that the range touches without covering them, in base64."""

_ERROR_LIMIT = 4 * 1024

_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
_Time = Annotated[int, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]


class _StatShape(msgspec.Struct, rename="pascal"):
    """FsStat as lotus and Curio send it; old nodes send three of the fields."""

    capacity: _Size = 0
    available: Annotated[int, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)] = 0
    fs_available: _Size = msgspec.field(default=0, name="FSAvailable")
    reserved: _Size = 0
    max: _Size = 0
    used: _Size = 0


class _MemberShape(msgspec.Struct, rename="pascal"):
    name: str
    size: _Size
    mtime_ns: _Time


class _ListingShape(msgspec.Struct, rename="pascal"):
    size: _Size
    mtime_ns: _Time
    files: list[_MemberShape] | None = None


class Version(msgspec.Struct, frozen=True):
    """What a source says of the content it gives."""

    size: int
    mtime_ns: int
    """0 when it does not say."""
    etag: str = ""

    def agrees(self, other: Version) -> bool:
        """True unless the two tell of different contents."""
        return (
            self.size == other.size
            and (
                not self.mtime_ns or not other.mtime_ns or same_mtime(self.mtime_ns, other.mtime_ns)
            )
            and (not self.etag or not other.etag or self.etag == other.etag)
        )


async def expect_status(response: Response, status: int) -> None:
    """Raise what an answer with another status means."""
    if response.status == status:
        return
    detail = await error_text(response)
    if response.status == 404:
        raise NotFound(f"the peer does not have it{detail}", response.url)
    if response.status == 401:
        hint = response.token_hint
        raise Unauthorized(f"the peer refuses the token{detail}", response.url, hint)
    if response.status == 403:
        hint = response.token_hint
        raise Forbidden(f"the token lacks a permission{detail}", response.url, hint)
    raise SourceFailed(f"status {response.status} instead of {status}{detail}", response.url)


async def expect_ranges(response: Response) -> None:
    """Raise what an answer to a request for ranges means, unless it has them."""
    if response.status == 200:
        raise NoRanges("sends the whole file instead of a range", response.url)
    if response.status == 416:
        raise Stale("the peer has a shorter file by now", response.url, "open the file again")
    await expect_status(response, 206)


async def error_text(response: Response) -> str:
    """The first line of an error's body, if there is a readable one."""
    try:
        body = await response.read(_ERROR_LIMIT)
    except (TooLarge, Unreachable):
        return ""
    lines = body.decode("utf-8", "replace").strip().splitlines()
    if not lines or not lines[0].isprintable():
        return ""
    return f": {lines[0][:200]}"


def expect_octets(response: Response) -> None:
    expect_type(response, "application/octet-stream")


def expect_type(response: Response, wanted: str) -> None:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise SourceFailed(f"unknown content type {kind[:80]!r}", response.url)


def content_range(response: Response) -> tuple[tuple[int, int] | None, int | None]:
    """First and last byte (None for an unsatisfied range) and the total (None if unknown)."""
    match = CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None:
        raise SourceFailed("no valid Content-Range", response.url)
    first, last, total = match.groups()
    size = None if total == "*" else int(total)
    if first is None:
        return None, size
    if int(last) < int(first) or (size is not None and int(last) >= size):
        raise SourceFailed("a Content-Range that makes no sense", response.url)
    return (int(first), int(last)), size


def expect_time(response: Response, mtime_ns: int | None) -> None:
    found = mtime_of(response)
    if mtime_ns and found and not same_mtime(found, mtime_ns):
        raise SourceFailed("gives another content than was declared", response.url)


def span_version(response: Response, span: tuple[int, int], expect: Version | None) -> Version:
    """The version that an answer of one range is of, which must be the range asked for."""
    expect_octets(response)
    found, total = content_range(response)
    if found != (span[0], span[1] - 1):
        raise SourceFailed(f"sends another range than {span[0]}-{span[1] - 1}", response.url)
    return _version(response, total, expect)


def _version(response: Response, total: int | None, expect: Version | None) -> Version:
    if total is None:
        raise SourceFailed("names no total size", response.url)
    found = Version(total, mtime_of(response), response.headers.get("etag", ""))
    if expect is not None and not found.agrees(expect):
        raise Stale("the peer gives another content by now", response.url, "open the file again")
    return found


def deliver_parts(
    response: Response,
    body: bytes,
    spans: Sequence[tuple[int, int]],
    expect: Version | None,
    deliver: Callable[[int, bytes, bytes], object],
) -> Version:
    """Take an answer of several ranges, which must be those asked for, apart."""
    boundary = boundary_of(response.headers.get("content-type", ""))
    if boundary is None:
        raise SourceFailed("does not send several ranges at once", response.url)
    try:
        found = list(parts(body, boundary))
    except ValueError as exc:
        raise SourceFailed(f"its ranges cannot be read: {exc}", response.url) from exc
    if [(part.start, part.end) for part in found] != list(spans):
        raise SourceFailed("sends other ranges than were asked for", response.url)
    totals = {part.total for part in found}
    version = _version(response, totals.pop() if len(totals) == 1 else None, expect)
    for part in found:
        deliver(part.start, bytes(part.data), told_leaves(part.headers))
    return version


def told_leaves(headers: Mapping[str, str]) -> bytes:
    """The leaf hashes in a header; none when there is none that can be read."""
    try:
        return base64.b64decode(headers.get(LEAVES_HEADER, ""), validate=True)
    except ValueError:
        return b""


def mtime_of(response: Response) -> int:
    """To the nanosecond from our nodes, to the second from others, else 0."""
    exact = response.headers.get(MTIME_HEADER, "")
    if re.fullmatch(r"-?[0-9]{1,19}", exact, re.ASCII):
        return int(exact)
    try:
        return int(parsedate_to_datetime(response.headers["last-modified"]).timestamp()) * 10**9
    except (KeyError, ValueError, OverflowError):
        return 0


_Shape = TypeVar("_Shape", _StatShape, _ListingShape)


def _decode(response: Response, body: bytes, shape: type[_Shape]) -> _Shape:
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SourceFailed(f"not the JSON of this protocol: {exc}", response.url) from exc


def told_space(response: Response, body: bytes) -> FsStat:
    """Space of a storage."""
    return FsStat(**msgspec.structs.asdict(_decode(response, body, _StatShape)))


def listed_facts(response: Response, body: bytes) -> Facts:
    """A listing whose names are safe and unlike, in ascending order."""
    shape, url = _decode(response, body, _ListingShape), response.url
    if shape.files is None:
        raise SourceFailed("the listing of a directory has no files", url)
    members = {}
    for entry in shape.files:
        try:
            name = parse_member_name(entry.name)
        except ValueError as exc:
            raise SourceFailed(str(exc), url) from exc
        if name in members:
            raise SourceFailed(f"lists {name} twice", url)
        members[name] = MemberFacts(name, entry.size, entry.mtime_ns)
    total = sum(member.size for member in members.values())
    if total > MAX_NUMBER:
        raise SourceFailed("lists sizes beyond reason", url)
    return Facts(total, shape.mtime_ns, tuple(members[name] for name in sorted(members)))
