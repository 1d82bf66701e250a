"""``/remote``: the sector files of this node's storage paths, as lotus and Curio nodes serve them.

Only what lies here is served; nothing is fetched on behalf of a peer. Each storage bounds its own
work by its lane; what waits longer than the disk's deadline is answered 503.
"""

from __future__ import annotations

from collections.abc import Awaitable, Container
from typing import TypeVar

import msgspec
import trio

from sectorfs.errors import BadRange, NotFound, StorageUnavailable
from sectorfs.index.protocol import FsStat
from sectorfs.server import allocated
from sectorfs.server.archives import archive_reply
from sectorfs.server.conditions import plain_ranges
from sectorfs.server.leaves import LeafHeaders
from sectorfs.server.ranges import excerpt_reply, file_reply
from sectorfs.stores.layout import FULL, MINIMAL
from sectorfs.stores.protocol import LocalFiles
from sectorfs.types import (
    Facts,
    SectorFile,
    parse_file_type,
    parse_member_name,
    parse_sector,
    parse_storage_id,
)
from sectorfs.wire.messages import Reply, Request

T = TypeVar("T")

EXCERPT = 256 * 1024
"""Bytes that a reply may hold in memory: what readers ask for is less, what fills copies more."""

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

    def __init__(self, files: LocalFiles, leaves: LeafHeaders, *, deadline: float) -> None:
        self._files = files
        self._leaves = leaves
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
        """``/remote/{type}/{sector}``: a sector file, whole or ranges of it, or a directory."""
        file = sector_file(request)
        if not file.file_type.is_directory:
            return await self._file(request, file, None)
        directory = await self._timely(
            self._files.open_directory(file, only=_travelling(request)), file
        )
        try:
            return archive_reply(request, directory)
        except BaseException:
            directory.close()
            raise

    async def allocated(self, request: Request) -> Reply:
        """``/remote/unsealed/{sector}/{proof}/allocated/{offset}/{size}``: 200 or 416."""
        file = sector_file(request)
        _, _, _, proof, _, offset, size = request.segments
        sector_size, start, length = allocated.parse(file, proof, offset, size)
        opened = await self._timely(self._files.open_file(file), file)
        try:
            await allocated.check(opened, file, sector_size=sector_size, offset=start, size=length)
        except BadRange as exc:
            return Reply(exc.status)  # no text: Go gives up a connection that has some unread
        finally:
            opened.close()
        return Reply(200)

    async def listing(self, request: Request) -> Reply:
        """``/remote/{type}/{sector}/files``: the facts of a sector file."""
        file = sector_file(request)
        facts = await self._timely(self._files.listing(file), file)
        return Reply(200, (_JSON,), _listing_json(facts))

    async def member(self, request: Request) -> Reply:
        """``/remote/{type}/{sector}/files/{name}``: one file of a sector directory."""
        file = sector_file(request)
        return await self._file(request, file, member_name(request, file))

    async def _file(self, request: Request, file: SectorFile, member: str | None) -> Reply:
        asked = plain_ranges(request.headers, EXCERPT) if request.method == "GET" else None
        if asked is not None:
            excerpt = await self._timely(self._files.excerpt(file, member, asked), file)
            leaves = await self._leaves.of(request, file, member, excerpt, asked)
            reply = excerpt_reply(request, excerpt, asked, leaves)
            if reply is not None:
                return reply
        opened = await self._timely(self._files.open_file(file, member), file)
        try:
            return file_reply(request, opened)
        except BaseException:
            opened.close()
            raise

    async def _timely(self, call: Awaitable[T], thing: object) -> T:
        return await timely(call, thing, self._deadline)


async def timely(call: Awaitable[T], thing: object, deadline: float) -> T:
    """What a call gives; `StorageUnavailable` after so many seconds."""
    with trio.move_on_after(deadline):
        return await call
    raise StorageUnavailable(f"no answer within {deadline:g} s", thing)


def member_name(request: Request, file: SectorFile) -> str:
    """The file of a sector directory that a path names."""
    if not file.file_type.is_directory:
        raise NotFound("not a directory", file)
    try:
        return parse_member_name(request.segments[4])
    except ValueError as exc:
        raise NotFound(str(exc), file) from exc


def _travelling(request: Request) -> Container[str] | None:
    """Which files of a directory are sent; None for all.

    Nodes of Curio, and late ones of lotus, give a whole fetch up at the first name they do not
    know, and nothing in a request tells them from others.
    """
    if "mincache" in request.query:
        return MINIMAL
    return None if "all" in request.query else FULL


def sector_file(request: Request) -> SectorFile:
    """The sector file that a path names."""
    _, type_name, sector_name = request.segments[:3]
    try:
        return SectorFile(parse_file_type(type_name), parse_sector(sector_name))
    except ValueError as exc:
        raise NotFound(str(exc), request.path[:200]) from exc


def _stat_json(stat: FsStat) -> bytes:
    return msgspec.json.encode(_StatShape(**msgspec.structs.asdict(stat))) + b"\n"


def _listing_json(facts: Facts) -> bytes:
    files = None
    if facts.members is not None:
        files = [_MemberShape(m.name, m.size, m.mtime_ns) for m in facts.members]
    return msgspec.json.encode(_ListingShape(facts.size, facts.mtime_ns, files)) + b"\n"
