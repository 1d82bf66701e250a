"""``/remote``: the sector files of this node's storage paths, as lotus and Curio nodes serve them.

Only what lies here is served; nothing is fetched on behalf of a peer. Each storage bounds its own
work by its lane; what waits longer than the disk's deadline is answered 503.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import msgspec
import trio

from sectorfs.errors import BadRange, NotFound, StorageUnavailable, Unsupported
from sectorfs.index.protocol import FsStat
from sectorfs.server.conditions import byte_range, precondition, validators
from sectorfs.stores.protocol import LocalFiles, OpenFile
from sectorfs.stores.transfer import MTIME_HEADER
from sectorfs.types import (
    Facts,
    SectorFile,
    parse_file_type,
    parse_member_name,
    parse_sector,
    parse_storage_id,
)
from sectorfs.wire.messages import FileBody, Reply, Request, error_reply

T = TypeVar("T")

_OCTETS = ("content-type", "application/octet-stream")
_JSON = ("content-type", "application/json")


class _StatShape(msgspec.Struct, rename="pascal"):
    capacity: int
    available: int
    fs_available: int = msgspec.field(name="FSAvailable")
    reserved: int
    max: int
    used: int


class _MemberShape(msgspec.Struct, rename="pascal"):
    name: str
    size: int
    mtime_ns: int


class _ListingShape(msgspec.Struct, rename="pascal"):
    size: int
    mtime_ns: int
    files: list[_MemberShape] | None


class FileRoutes:
    """Answers for storage paths of this node."""

    def __init__(self, files: LocalFiles, *, deadline: float) -> None:
        self._files = files
        self._deadline = deadline

    async def stat(self, request: Request) -> Reply:
        """``/remote/stat/{storage}``: space of a path of this node."""
        name = request.segments[2]
        try:
            storage = parse_storage_id(name)
        except ValueError as exc:
            raise NotFound(str(exc), request.path) from exc
        stat = await self._timely(self._files.stat(storage), name)
        return Reply(200, (_JSON,), _stat_json(stat))

    async def sector(self, request: Request) -> Reply:
        """``/remote/{type}/{sector}``: a sector file, whole or a range of it."""
        file = _sector_file(request)
        if file.file_type.is_directory:
            await self._timely(self._files.listing(file), file)  # 404 for one that is not here
            raise Unsupported(
                "a directory is not sent whole", file, f"list it at {request.path}/files"
            )
        return await self._file(request, file, None)

    async def listing(self, request: Request) -> Reply:
        """``/remote/{type}/{sector}/files``: the facts of a sector file."""
        file = _sector_file(request)
        facts = await self._timely(self._files.listing(file), file)
        return Reply(200, (_JSON,), _listing_json(facts))

    async def member(self, request: Request) -> Reply:
        """``/remote/{type}/{sector}/files/{name}``: one file of a sector directory."""
        file = _sector_file(request)
        if not file.file_type.is_directory:
            raise NotFound("not a directory", file)
        try:
            name = parse_member_name(request.segments[4])
        except ValueError as exc:
            raise NotFound(str(exc), file) from exc
        return await self._file(request, file, name)

    async def _file(self, request: Request, file: SectorFile, member: str | None) -> Reply:
        opened = await self._timely(self._files.open_file(file, member), file)
        try:
            return _file_reply(request, opened)
        except BaseException:
            opened.close()
            raise

    async def _timely(self, call: Awaitable[T], thing: object) -> T:
        with trio.move_on_after(self._deadline):
            return await call
        raise StorageUnavailable(f"no answer within {self._deadline:g} s", thing)


def _sector_file(request: Request) -> SectorFile:
    _, type_name, sector_name = request.segments[:3]
    try:
        return SectorFile(parse_file_type(type_name), parse_sector(sector_name))
    except ValueError as exc:
        raise NotFound(str(exc), request.path[:200]) from exc


def _file_reply(request: Request, opened: OpenFile) -> Reply:
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
    try:
        span = (
            byte_range(request.headers, current, opened.size) if request.method == "GET" else None
        )
    except BadRange as exc:
        opened.close()
        refusal = error_reply(exc, request.headers.get("accept", ""))
        extent = ("content-range", f"bytes */{opened.size}")
        return Reply(416, (*refusal.headers, *headers, extent), refusal.body)
    offset, length = span or (0, opened.size)
    if span is not None:
        last = offset + length - 1
        headers = (*headers, ("content-range", f"bytes {offset}-{last}/{opened.size}"))
    body = FileBody(
        opened.descriptor,
        offset=offset,
        length=length,
        run=opened.lane.run,
        close=opened.close,
    )
    return Reply(206 if span else 200, (_OCTETS, *headers), body)


def _stat_json(stat: FsStat) -> bytes:
    return msgspec.json.encode(_StatShape(**msgspec.structs.asdict(stat))) + b"\n"


def _listing_json(facts: Facts) -> bytes:
    files = None
    if facts.members is not None:
        files = [_MemberShape(m.name, m.size, m.mtime_ns) for m in facts.members]
    return msgspec.json.encode(_ListingShape(facts.size, facts.mtime_ns, files)) + b"\n"
