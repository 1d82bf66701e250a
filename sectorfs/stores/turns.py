"""One change of a sector file at a time on this node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from sectorfs.types import SectorFile


class Turns:
    """A lock per sector file that is being moved, removed or acquired; first come, first served.

    Order: a turn, then `LocalPath.changing`. Never two turns in one task.
    """

    def __init__(self) -> None:
        self._locks: dict[SectorFile, trio.Lock] = {}

    @asynccontextmanager
    async def of(self, file: SectorFile) -> AsyncIterator[None]:
        """Hold the turn of a file for the block."""
        lock = self._locks.setdefault(file, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and not lock.statistics().tasks_waiting:
                self._locks.pop(file, None)
