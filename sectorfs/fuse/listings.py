"""Listings of type directories: written a page at a time, and kept by the kernel while they hold.

The kernel keeps a listing until its directory is invalidated (`notifications`) or has another time
of modification. Only those of the types are kept: they are big and few. A listing is taken anew
when it is read from its start, so that what the kernel keeps is never older than the time it saw.
"""

from __future__ import annotations

from collections.abc import Callable

from sectorfs.fuse.inodes import InodeTable, PageReply, number_type
from sectorfs.fuse.tree import CACHED_FOR, DOTS, Listing, Tree
from sectorfs.types import FileType

MIN_ROWS = 16
"""Names that are asked of the catalog for one page, at least; more once pages prove to be big."""
ROW_BYTES = 176
"""Bytes a name takes in the kernel's buffer, about."""
KEPT_FOR = CACHED_FOR / 2
"""Seconds until a listing is read anew, before its names time out. That renews a page of them at a
time; in a listing that was kept for longer, each would be looked up for itself."""


class Listings:
    """Listings on their way to the kernel."""

    def __init__(self, tree: Tree, inodes: InodeTable, clock: Callable[[], float]) -> None:
        self._tree = tree
        self._inodes = inodes
        self._clock = clock
        self._rows = MIN_ROWS
        self._begun: dict[FileType, float] = {}

    def begun(self, listing: Listing) -> None:
        """A listing is read from its start."""
        if listing.file_type is not None:
            self._begun[listing.file_type] = self._clock()

    def may_be_kept(self, number: int) -> bool:
        """True when the kernel may keep a directory's listing, and go on with the one it has."""
        file_type = number_type(number)
        if file_type is None:
            return False
        return self._clock() < self._begun.get(file_type, self._clock()) + KEPT_FOR

    def write_page(self, listing: Listing, start: int, to: PageReply) -> None:
        """Write names after position `start`, at least one: none would be the listing's end."""
        file_type, position = listing.file_type, max(start, DOTS)
        assert file_type is not None
        while rows := self._tree.rows(listing, position, self._rows):
            page = self._inodes.write_page(rows, file_type, position, to)
            position += page.taken
            if page.written or page.taken < len(rows):
                self._rows = max(MIN_ROWS, page.written + page.left // ROW_BYTES)
                break
