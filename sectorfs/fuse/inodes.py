"""Inode numbers, and which of them the kernel still holds. Pure: no kernel, no clock, no I/O.

A number is a stable hash of what the inode stands for, so that unchanged files keep theirs across
remounts. For a regular file that includes its size and modification time: the kernel caches pages
by inode, and new content under a new number can never be mixed with pages of the old.

Invariant: while the kernel holds look-ups of a number, or a file is open under it, the number
means the same `InodeKey`. Everything else is forgotten, and computed again when it is asked for.

The table itself is native (`_inodes`), because a kernel may hold millions: less than 100 bytes for
each, and listings are written a page at a time. Where that was not built it is `inode_objects`.
The linker has to find the native one before libfuse, so import this module before pyfuse3.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from sectorfs.fuse import inode_objects, kernel
from sectorfs.fuse.inode_objects import HASH_SPACE, FlatKey
from sectorfs.types import FileType, SectorFile, SectorID

if TYPE_CHECKING:
    from sectorfs.fuse._inodes import Table as PackedTable

ROOT = 1

Row = tuple[int, int, int, int, bool]
"""A name of a listing: miner, number, size, mtime_ns, and whether anybody told the last two."""

_TYPES = {file_type.value: file_type for file_type in FileType}
_FIXED_TYPES = {2 + file_type.bit: file_type for file_type in FileType}


class Content(msgspec.Struct, frozen=True, order=True):
    """What tells two contents of one file apart."""

    size: int
    mtime_ns: int


class InodeKey(msgspec.Struct, frozen=True):
    """What an inode stands for: a sector file, or one file in a sector directory."""

    file: SectorFile
    member: str | None = None
    content: Content | None = None
    """None for directories, and for files nobody has told the facts of."""

    @property
    def is_directory(self) -> bool:
        """True for a sector directory itself."""
        return self.member is None and self.file.file_type.is_directory


class PageReply(msgspec.Struct, frozen=True):
    """How a page of a listing goes to the kernel: pyfuse3's own objects for one request."""

    reply: Callable[..., bool]
    """`pyfuse3.readdir_reply`."""
    token: object
    pattern: object
    """`EntryAttributes` with what all names of the page have in common."""


class Page(msgspec.Struct, frozen=True):
    """What became of a page."""

    taken: int
    """Rows that are done with."""
    written: int
    """Names that were written."""
    left: int
    """Bytes of the kernel's buffer that are free."""


def type_number(file_type: FileType) -> int:
    """The fixed inode number of a type's directory."""
    return 2 + file_type.bit


def number_type(number: int) -> FileType | None:
    """The type whose directory has this fixed number."""
    return _FIXED_TYPES.get(number)


def flat(key: InodeKey) -> FlatKey:
    """A key as the tables take it."""
    sector, content = key.file.sector, key.content
    size, mtime_ns = (content.size, content.mtime_ns) if content else (None, None)
    return (key.file.file_type.value, sector.miner, sector.number, key.member, size, mtime_ns)


def _key(found: FlatKey) -> InodeKey:
    file_type, miner, number, member, size, mtime_ns = found
    content = None if size is None or mtime_ns is None else Content(size, mtime_ns)
    return InodeKey(SectorFile(_TYPES[file_type], SectorID(miner, number)), member, content)


def _load() -> type[PackedTable] | None:
    if os.environ.get(kernel.WITHOUT):
        return None
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        from sectorfs.fuse._inodes import Table
    except ImportError:
        return None
    finally:
        sys.setdlopenflags(before)
    return Table


PACKED = _load()
"""The native table, if it was built."""


class InodeTable:
    """Which inodes the kernel holds. Used on the loop only, except `numbers` and `key`."""

    def __init__(self, space: int = HASH_SPACE, *, native: bool = True) -> None:
        packed = PACKED(space) if native and PACKED is not None else None
        self._packed = packed
        self._table = packed if packed is not None else inode_objects.Table(space)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, number: int) -> bool:
        return number in self._table

    def number(self, key: InodeKey) -> int:
        """The number of a key: its own while held, else the one it would get now."""
        return self._table.number(flat(key))

    def look_up(self, key: InodeKey) -> int:
        """Count one look-up by the kernel and return the number it refers to."""
        return self._table.look_up(flat(key))

    def forget(self, counts: Iterable[tuple[int, int]]) -> None:
        """Take look-ups back: numbers, with how many; those not held are none of our business."""
        self._table.forget(counts)

    def pin(self, number: int) -> InodeKey | None:
        """Hold a number for an open file; None when nobody holds it yet."""
        found = self._table.pin(number)
        return None if found is None else _key(found)

    def unpin(self, number: int) -> None:
        """End one `pin`."""
        self._table.unpin(number)

    def retire(self, number: int) -> None:
        """Leave a number to those who hold it: its key gets another one from now on."""
        self._table.retire(number)

    def key(self, number: int) -> InodeKey | None:
        """What a held number means."""
        found = self._table.key(number)
        return None if found is None else _key(found)

    def numbers(self) -> Iterator[int]:
        """The numbers held, each part as it is when it is reached; safe from another thread."""
        for part in range(self._table.PARTS):
            yield from self._table.numbers(part)

    def writes_pages(self, probe: PageReply) -> bool:
        """True when `write_page` may be used: the extension is in front of libfuse."""
        packed = self._packed
        return packed is not None and packed.in_front(probe.reply, probe.token, probe.pattern)

    def write_page(
        self, rows: list[Row | None], file_type: FileType, position: int, to: PageReply
    ) -> Page:
        """Write names of a type directory into a reply, and count their look-ups.

        `position` is that of the first row; a row of None is a name that is gone.
        """
        assert self._packed is not None, "only when writes_pages"
        directory = file_type.is_directory
        done = self._packed.page(
            rows, file_type, directory, position, to.reply, to.token, to.pattern
        )
        return Page(*done)
