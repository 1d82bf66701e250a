"""A sector directory as a tar stream: headers as bytes, contents named for whoever sends them.

The form that lotus and Curio read: bare names in ascending order, regular files only, USTAR headers
with PAX records where a value does not fit, two zero blocks at the end. A file must be sent with
exactly the length its part has; one that changed meanwhile can only be met by breaking off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from sectorfs.errors import BadInput, TooLarge
from sectorfs.stores import tar_blocks
from sectorfs.stores.members import MAX_MEMBERS, member_stat
from sectorfs.stores.tar_blocks import BLOCK, MAX_OCTAL_7, MAX_OCTAL_11
from sectorfs.types import MAX_NUMBER, parse_member_name

log = logging.getLogger(__name__)

CONTENT_TYPE = "application/x-tar"

_SECOND = 10**9
_NAME_BYTES = 100
_MODE_BITS = 0o7777
_END = bytes(2 * BLOCK)


class TarMember(msgspec.Struct, frozen=True, kw_only=True):
    """A file to be sent, as `stat` describes it."""

    name: str
    size: int
    mtime_ns: int
    mode: int = 0o644
    uid: int = 0
    gid: int = 0


class FilePart(msgspec.Struct, frozen=True):
    """Here the stream has the whole content of a file."""

    name: str
    size: int


class TarWriter:
    """A tar stream over members; iterate it as often as you like."""

    def __init__(self, members: Iterable[TarMember]) -> None:
        """`BadInput` for a name that no reader should accept, a repeated one, or a bad size."""
        self._members = sorted(members, key=lambda member: member.name)
        if len(self._members) > MAX_MEMBERS:
            raise TooLarge(f"more than {MAX_MEMBERS} files for a tar", len(self._members))
        for member in self._members:
            _check(member)
        names = [member.name for member in self._members]
        for name, following in pairwise(names):
            if name == following:
                raise BadInput("twice in one tar", name)

    @property
    def length(self) -> int:
        """Bytes of the whole stream."""
        return sum(len(part) if isinstance(part, bytes) else part.size for part in self)

    def __iter__(self) -> Iterator[bytes | FilePart]:
        """The stream in order; no part is empty."""
        padding = b""
        for member in self._members:
            yield padding + _headers(member)
            padding = bytes(tar_blocks.pad_length(member.size))
            if member.size:
                yield FilePart(member.name, member.size)
        yield padding + _END


def members_of(directory: int | Path, *, only: Container[str] | None = None) -> list[TarMember]:
    """The files of a directory that travel, by ascending name; blocks and raises `OSError`.

    What is none of its files (see `members`) or not in `only` stays behind.
    """
    members = []
    with os.scandir(directory) as entries:
        for entry in entries:
            member = _member(entry, only)
            if member is None:
                log.info("%s: %r is not sent with its directory", directory, entry.name)
            else:
                members.append(member)
    return sorted(members, key=lambda member: member.name)


def _member(entry: os.DirEntry[str], only: Container[str] | None) -> TarMember | None:
    if only is not None and entry.name not in only:
        return None
    held = member_stat(entry)
    if held is None:
        return None
    return TarMember(
        name=entry.name,
        size=held.st_size,
        mtime_ns=held.st_mtime_ns,
        mode=held.st_mode & _MODE_BITS,
        uid=held.st_uid,
        gid=held.st_gid,
    )


def _check(member: TarMember) -> None:
    try:
        parse_member_name(member.name)
    except ValueError as exc:
        raise BadInput(str(exc), member.name[:80]) from exc
    if not 0 <= member.size <= MAX_NUMBER:
        raise BadInput(f"size {member.size} in a tar", member.name)
    if not 0 <= member.mode <= MAX_OCTAL_7 or min(member.uid, member.gid) < 0:
        raise BadInput("mode or owner that no tar can say", member.name)


def _headers(member: TarMember) -> bytes:
    """The header of a member, and before it one of records for what does not fit."""
    records: dict[str, str] = {}

    def fit(key: str, value: int, limit: int) -> int:
        if 0 <= value <= limit:
            return value
        records[key] = str(value)
        return 0

    # Whole seconds, half a second rounded up: what Go's writer makes of the same file.
    mtime = fit("mtime", (member.mtime_ns + _SECOND // 2) // _SECOND, MAX_OCTAL_11)
    size = fit("size", member.size, MAX_OCTAL_11)
    uid = fit("uid", member.uid, MAX_OCTAL_7)
    gid = fit("gid", member.gid, MAX_OCTAL_7)
    if len(member.name) > _NAME_BYTES:
        records["path"] = member.name
    header = tar_blocks.encode_header(
        member.name[:_NAME_BYTES],
        kind=tar_blocks.REGULAR,
        size=size,
        mtime=mtime,
        mode=member.mode,
        uid=uid,
        gid=gid,
    )
    return _extension(member.name, records) + header if records else header


def _extension(name: str, records: dict[str, str]) -> bytes:
    content = tar_blocks.encode_pax(dict(sorted(records.items())))
    header = tar_blocks.encode_header(
        f"PaxHeaders.0/{name}"[:_NAME_BYTES], kind=tar_blocks.PAX, size=len(content)
    )
    return header + content + bytes(tar_blocks.pad_length(len(content)))
