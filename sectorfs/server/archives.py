"""The reply with a sector directory: a tar stream whose length is known beforehand.

Files are opened one after the other as the stream reaches them. One that shrank, vanished or became
another since the header went out ends the connection before the promised length: a reader then
knows that it has not got the directory, which padding would hide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sectorfs.errors import BadRange
from sectorfs.server.conditions import Validators, precondition
from sectorfs.stores.answers import MTIME_HEADER
from sectorfs.stores.protocol import SectorDirectory
from sectorfs.stores.tar_writer import CONTENT_TYPE, FilePart, TarWriter
from sectorfs.wire.messages import FileBody, LateFile, PartedBody, Reply, Request


def archive_reply(request: Request, directory: SectorDirectory) -> Reply:
    """The reply that owns `directory`, or has closed it already; `BadRange` for a part of it."""
    current = _validators(directory)
    headers = (
        *current.headers(),
        ("accept-ranges", "none"),
        (MTIME_HEADER, str(directory.mtime_ns)),
    )
    status = precondition(request.headers, current)
    if status is not None:
        directory.close()
        return Reply(status, headers)
    if request.method == "GET" and "range" in request.headers:
        directory.close()
        raise BadRange(
            "a directory is sent whole", request.path, f"read its files at {request.path}/files"
        )
    body = PartedBody(tuple(_parts(directory)), close=directory.close)
    return Reply(200, (("content-type", CONTENT_TYPE), *headers), body)


def _parts(directory: SectorDirectory) -> Iterator[bytes | LateFile]:
    for part in TarWriter(directory.members):
        yield _late(directory, part) if isinstance(part, FilePart) else part


def _late(directory: SectorDirectory, part: FilePart) -> LateFile:
    async def open_member() -> FileBody:
        opened = await directory.open_member(part.name)
        return FileBody(
            opened.descriptor,
            offset=0,
            length=opened.size,
            run=opened.lane.run,
            close=opened.close,
        )

    return LateFile(part.size, open_member)


def _validators(directory: SectorDirectory) -> Validators:
    """Of the stream: every byte of it follows from what is hashed here and the files' contents."""
    identity = repr((directory.inode, directory.members)).encode()
    newest = max([directory.mtime_ns, *(member.mtime_ns for member in directory.members)])
    return Validators(f'"{hashlib.sha256(identity).hexdigest()[:32]}"', newest // 10**9)
