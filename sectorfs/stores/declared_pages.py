"""What a storage declared of one type, a page of the Index at a time, in key order.

A scan walks its own names in the same order beside it, so that neither side is ever held whole.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sectorfs.index.protocol import Declaration
from sectorfs.types import MAX_NUMBER, FileType, SectorFile, SectorID

Fetch = Callable[[SectorFile | None, int], Awaitable[list[Declaration]]]
"""The declarations past a sector file, at most so many, of all types."""


class DeclaredPages:
    """One pass over the declarations of a type."""

    def __init__(self, fetch: Fetch, file_type: FileType, *, limit: int) -> None:
        self._fetch = fetch
        self._file_type = file_type
        self._limit = limit
        self._page: list[Declaration] = []
        self._done = False
        lower = [other for other in FileType if other < file_type]
        last = SectorID(MAX_NUMBER, MAX_NUMBER)
        self._after = SectorFile(lower[-1], last) if lower else None

    async def _more(self) -> None:
        page = await self._fetch(self._after, self._limit)
        self._done = len(page) < self._limit or page[-1].file.file_type != self._file_type
        self._page += [item for item in page if item.file.file_type == self._file_type]
        if page:
            self._after = page[-1].file

    async def up_to(self, last: SectorFile) -> dict[SectorFile, Declaration]:
        """The next declarations, up to and with that of `last`."""
        while not self._done and (not self._page or self._page[-1].file <= last):
            await self._more()
        taken = {item.file: item for item in self._page if item.file <= last}
        self._page = self._page[len(taken) :]
        return taken

    async def rest_of_page(self) -> list[Declaration]:
        """The next page of what is left; empty at the end."""
        if not self._page and not self._done:
            await self._more()
        page, self._page = self._page, []
        return page
