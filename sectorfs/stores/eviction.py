"""Which copies go to make room: pure rules over values.

What was not used for longest goes first. Nothing goes at all unless enough can go: a file that does
not fit anyway must not cost those that do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from sectorfs.config import CacheLimits
from sectorfs.types import SectorFile


class Space(msgspec.Struct, frozen=True):
    """A cache path and its file system, in bytes."""

    capacity: int
    free: int
    held: int
    """What lies in the cache path, whole and in part."""
    promised: int = 0
    """What is still to come of files that are being fetched."""


class Item(msgspec.Struct, frozen=True):
    """A sector file in the cache path."""

    file: SectorFile
    partial: bool
    """Not whole yet, and so not declared."""
    size: int
    """Bytes on disk, which for sparse files are fewer than they show."""
    used_ns: int
    """When somebody last opened it, or when it came."""


def excess(space: Space, limits: CacheLimits, size: int = 0) -> int:
    """Bytes that have to go before `size` more may come."""
    over = space.held + space.promised + size - limits.max_size if limits.max_size else 0
    short = limits.free_of(space.capacity) - (space.free - space.promised - size)
    return max(0, over, short)


def choose(items: Iterable[Item], needed: int) -> Sequence[Item] | None:
    """Which of the items that may go give `needed` bytes together; None when all do not.

    The longest unused ones, less those that the others make superfluous: many small files that are
    older than the one large file which alone is enough stay.
    """
    chosen: list[Item] = []
    total = 0
    for item in sorted(items, key=lambda one: (one.used_ns, one.file, one.partial)):
        if total >= needed:
            break
        chosen.append(item)
        total += item.size
    if total < needed:
        return None
    needless = set()
    for item in reversed(chosen):
        if total - item.size >= needed:
            needless.add(item)
            total -= item.size
    return [item for item in chosen if item not in needless]
