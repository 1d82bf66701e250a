"""A sector directory opened as one thing: its files as they were, and each of them opened later.

The descriptor pins the directory, so that all files come from one storage and one content even when
another one is put in its place meanwhile. A file that changed since is refused when its turn comes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container

import msgspec

from sectorfs.errors import NotFound, SourceFailed
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.scan import check_identity
from sectorfs.stores.tar_writer import TarMember, members_of
from sectorfs.types import StorageID

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO would wait for a writer. Links are followed: see `members`.
_MEMBER = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class OpenDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """An open sector directory. Whoever got it closes it."""

    descriptor: Descriptor
    members: tuple[TarMember, ...]
    """Its files, by ascending name."""
    mtime_ns: int
    inode: int
    storage: StorageID
    path: str
    lane: Lane

    def close(self) -> None:
        """Close once the last thread that uses it has left."""
        self.descriptor.close()

    async def open_member(self, name: str) -> OpenFile:
        """Open one of `members`; `SourceFailed` when it is gone or not what it was."""
        member = next(member for member in self.members if member.name == name)

        def call() -> OpenFile:
            where = os.path.join(self.path, name)
            with self.descriptor as directory:
                try:
                    fd = os.open(name, _MEMBER, dir_fd=directory)
                except FileNotFoundError as exc:
                    raise SourceFailed("vanished while it was read", where) from exc
            found = os.fstat(fd)
            if not _is(found, member):
                os.close(fd)
                raise SourceFailed("changed while it was read", where)
            os.set_blocking(fd, True)
            return OpenFile(
                descriptor=self.lane.descriptor(fd),
                size=found.st_size,
                mtime_ns=found.st_mtime_ns,
                inode=found.st_ino,
                storage=self.storage,
                path=where,
                lane=self.lane,
            )

        what = f"open {self.path}/{name}"
        return await self.lane.run(call, what=what, discard=lambda opened: opened.close())


async def open_directory(
    path: str,
    name: str,
    lane: Lane,
    *,
    storage: StorageID,
    expected: bool,
    only: Container[str] | None,
) -> OpenDirectory:
    """Open the directory `name` of a storage path, with those of its files that are in `only`.

    `expected`: the Index says that it is here; its absence may mean that the disk is gone.
    """

    def call() -> OpenDirectory:
        try:
            fd = os.open(name, _DIRECTORY)
        except NotADirectoryError as exc:
            raise NotFound("is not a directory", name) from exc
        except FileNotFoundError:
            if expected:
                check_identity(path, storage)
            raise
        descriptor = lane.descriptor(fd)
        try:
            members = tuple(members_of(fd, only=only))
            found = os.fstat(fd)
        except BaseException:
            descriptor.close()
            raise
        return OpenDirectory(
            descriptor=descriptor,
            members=members,
            mtime_ns=found.st_mtime_ns,
            inode=found.st_ino,
            storage=storage,
            path=name,
            lane=lane,
        )

    return await lane.run(call, what=f"open {name}", discard=lambda opened: opened.close())


def _is(found: os.stat_result, member: TarMember) -> bool:
    return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (
        member.size,
        member.mtime_ns,
    )
