"""Space of a storage path: the arithmetic, and the walk that a limit on a path makes necessary."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from sectorfs.index.protocol import FsStat

STEP_ENTRIES = 2000
"""Entries between two yields of `usage_steps`: milliseconds on a disk, a second on a bad one."""
BLOCK = 512
"""Unit of ``st_blocks``, whatever the file system's own block size is."""


class RawSpace(msgspec.Struct, frozen=True):
    """What the file system says, in bytes."""

    capacity: int
    available: int


def raw_space(path: str) -> RawSpace:
    """Ask the file system that holds `path`."""
    stats = os.statvfs(path)
    return RawSpace(stats.f_blocks * stats.f_frsize, stats.f_bavail * stats.f_frsize)


def fs_stat(raw: RawSpace, *, max_storage: int, used: int | None, reserved: int = 0) -> FsStat:
    """Space of a path from that of its file system.

    `used` counts only under a limit (`max_storage` > 0). While it is not known yet nothing may be
    placed: a guess of zero would fill a path that is at its limit.
    """
    available = max(0, raw.available - reserved)
    if max_storage > 0:
        room = 0 if used is None else max(0, max_storage - used)
        available = min(available, room)
    return FsStat(
        capacity=raw.capacity,
        available=available,
        fs_available=raw.available,
        reserved=reserved,
        max=max_storage,
        used=(used or 0) if max_storage > 0 else 0,
    )


def usage_steps(path: str) -> Iterator[int]:
    """Bytes allocated by the files below `path`, so far, again and again; the last is the sum.

    Blocks, not sizes: sector files are sparse while they are written. An entry that vanishes or
    cannot be read is left out; hard links are counted once. A step at a time keeps each call short.
    """
    total = 0
    count = 0
    linked: set[tuple[int, int]] = set()
    directories = [path]
    while directories:
        try:
            entries = os.scandir(directories.pop())
        except OSError:
            continue
        with entries:
            for entry in entries:
                try:
                    stat = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
                elif stat.st_nlink == 1 or (stat.st_dev, stat.st_ino) not in linked:
                    total += stat.st_blocks * BLOCK
                    if stat.st_nlink > 1:
                        linked.add((stat.st_dev, stat.st_ino))
                count += 1
                if count % STEP_ENTRIES == 0:
                    yield total
    yield total
