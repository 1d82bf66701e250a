"""What stores are to those above: the mount opens in `SectorStore`, the server in `LocalFiles`."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal, Protocol

import msgspec

from sectorfs.index.protocol import FsStat
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.regular import Excerpt, Spans
from sectorfs.stores.tar_writer import TarMember
from sectorfs.types import Facts, SectorFile, StorageID

State = Literal["local", "shared", "cached", "partial", "remote", "unavailable"]
"""Where a sector file is, seen from this node; `shared` is attached here and on another node."""


class Checked(msgspec.Struct, frozen=True):
    """What is known of whether the bytes that a reader gets are the right ones."""

    how: Literal["blocks", "length", "no"] = "no"
    """What comes, or came, from other nodes was proved by hashes, or compared by length alone.

    `no` of files on paths of this node, which nobody checks as they are read.
    """
    digest: bytes = b""
    """Of the file or the directory; empty where nobody told, or nobody asked yet."""


class OpenFile(msgspec.Struct, frozen=True, kw_only=True):
    """An open regular file on a storage path of this node. Whoever got it closes it."""

    descriptor: Descriptor
    size: int
    """Bytes, by `fstat` at open."""
    mtime_ns: int
    """By `fstat` at open."""
    inode: int
    """Inode number on its own file system: with size and mtime the identity behind an ETag."""
    storage: StorageID
    path: str
    lane: Lane
    """Blocking reads of it go through here."""
    file_system: str = ""
    """Name of the local file system it lies on; empty where it is not proved to be local."""

    def close(self) -> None:
        """Close once the last thread that reads has left."""
        self.descriptor.close()


class StreamFile(Protocol):
    """An open regular file of another node, read while it comes. Whoever got it closes it."""

    @property
    def size(self) -> int:
        """Bytes, as declared when it was opened."""

    @property
    def mtime_ns(self) -> int:
        """As declared when it was opened."""

    @property
    def storage(self) -> StorageID:
        """Where it comes from now."""

    @property
    def path(self) -> str:
        """Its URL there."""

    def read_nowait(self, offset: int, size: int) -> bytes | memoryview | None:
        """As `read` does, None when that would have to wait."""

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Bytes at `offset`, fewer than `size` only at the end of the file.

        `Stale` when its content is nowhere any more, `NoSource` when nobody can give it now. A view
        is good until the caller's next `await`.
        """

    def close(self) -> None:
        """Leave; its bytes may go on coming for others."""


class SectorDirectory(Protocol):
    """An open sector directory: one content on one storage, whatever takes its place meanwhile."""

    @property
    def storage(self) -> StorageID:
        """Where it lies."""

    @property
    def members(self) -> tuple[TarMember, ...]:
        """Its files, by ascending name."""

    @property
    def mtime_ns(self) -> int:
        """Of the directory itself."""

    @property
    def inode(self) -> int:
        """Of the directory itself."""

    async def open_member(self, name: str) -> OpenFile:
        """Open one of `members`; `SourceFailed` when it is gone or not what it was."""

    def close(self) -> None:
        """Close once the last thread that uses it has left."""


class LocalFiles(Protocol):
    """Files on this node's storage paths; never anybody else's."""

    async def open_file(self, file: SectorFile, member: str | None = None) -> OpenFile:
        """Open a sector file, or a file in a sector directory.

        `NotFound` when no path here has it, `StorageUnavailable` when its path does not answer.
        """

    async def excerpt(self, file: SectorFile, member: str | None, spans: Spans) -> Excerpt:
        """Small parts of a file, read in the call that opens it; errors as `open_file`."""

    async def open_directory(
        self, file: SectorFile, *, only: Container[str] | None
    ) -> SectorDirectory:
        """Open a sector directory with its files, or those in `only`; errors as `open_file`."""

    async def listing(self, file: SectorFile) -> Facts:
        """The facts of a sector file as they are on disk now; errors as `open_file`."""

    async def stat(self, storage: StorageID) -> FsStat:
        """Space of a path of this node; `NotFound` for any other."""


class SectorStore(Protocol):
    """Every sector file of the cluster, opened wherever it lies."""

    async def open(self, file: SectorFile, member: str | None = None) -> OpenFile | StreamFile:
        """Open a copy: a local one, one that is read while it comes, or a whole one fetched first.

        `NotFound` when nobody declares it, `NoSource` (with every cause) when nobody can give it.
        """

    async def learn(self, file: SectorFile) -> None:
        """Find out size and time, or the files, of a sector file that nobody told of.

        Returns once the catalog knows them; also without, where a copy on this node will tell.
        """

    def state(self, file: SectorFile) -> State:
        """Where a sector file is now."""

    def is_streamed(self, file: SectorFile, member: str | None) -> bool:
        """Whether a file is read while it comes, where it is not here."""

    def present(self, file: SectorFile, member: str | None) -> int | None:
        """Bytes that are here of a file that is open or coming from elsewhere; None of others."""

    def checked(self, file: SectorFile, member: str | None) -> Checked:
        """What is known of whether the bytes that readers get are the right ones."""
