"""Opens regular files and nothing else, for threads; small parts are read in the same call.

A thread costs more than reading a few pages: whoever wants no more gets them with the open.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

import msgspec

from sectorfs.errors import NotFound
from sectorfs.stores.file_systems import open_to_read
from sectorfs.types import StorageID

Spans = Sequence[tuple[int, int]]
"""Offsets and lengths."""


class Excerpt(msgspec.Struct, frozen=True):
    """Parts of a file, and what identifies its content."""

    size: int
    mtime_ns: int
    inode: int
    pieces: tuple[bytes, ...]
    """One per span, in their order; shorter, or empty, where the file ends before."""
    storage: StorageID
    """Where the file lies."""


def open_regular(name: str) -> tuple[int, os.stat_result]:
    """A descriptor to read from; `NotFound` when it is anything else than a regular file."""
    # O_NONBLOCK: opening a FIFO would wait for a writer. Symbolic links are followed: operators
    # link sector files to other disks.
    fd = open_to_read(name, os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise NotFound("is not a regular file", name)
        os.set_blocking(fd, True)
        return fd, found
    except BaseException:
        os.close(fd)
        raise


def read_excerpt(name: str, spans: Spans, storage: StorageID) -> Excerpt:
    """Read the bytes at `spans` of a file that lies on `storage`."""
    fd, found = open_regular(name)
    try:
        pieces = tuple(_read(fd, offset, length) for offset, length in spans)
        return Excerpt(found.st_size, found.st_mtime_ns, found.st_ino, pieces, storage)
    finally:
        os.close(fd)


def _read(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    while 0 < len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data
