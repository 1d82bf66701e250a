"""Places for requests by priority, so that no reader ever waits behind bulk work.

Readers come before read-ahead, read-ahead before filling, filling before scrubbing; equals in order
of arrival. Work in the background may take all but the last places: those are kept for readers.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heappop, heappush

import trio


class Priority(enum.IntEnum):
    """What bytes are wanted for; the lower the sooner."""

    READ = 0
    """Somebody waits in a `read`."""
    AHEAD = 1
    """Somebody is likely to read them next."""
    FILL = 2
    """To make a copy whole."""
    SCRUB = 3
    """To prove a copy."""


class Gate:
    """At most `width` requests at a time, and at most `width - reserved` that nobody waits for."""

    def __init__(self, width: int, *, reserved: int = 0) -> None:
        assert 0 <= reserved < width
        self._width = width
        self._background = width - reserved
        self._taken = 0
        self._waiting: list[tuple[Priority, int, _Waiter]] = []
        self._order = 0

    @property
    def taken(self) -> int:
        """Places taken now."""
        return self._taken

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return sum(not waiter.gone for _, _, waiter in self._waiting)

    @asynccontextmanager
    async def place(self, priority: Priority) -> AsyncIterator[None]:
        """Hold a place for the block, once it is this one's turn."""
        await self.take(priority)
        try:
            yield
        finally:
            self.give_back()

    def take_nowait(self, priority: Priority) -> bool:
        """Take a place if it is this one's turn at once."""
        behind = self._waiting and self._waiting[0][0] <= priority
        if behind or self._taken >= self._bound(priority):
            return False
        self._taken += 1
        return True

    async def take(self, priority: Priority) -> None:
        """Wait for a place, which `give_back` returns."""
        waiter = _Waiter()
        self._order += 1
        heappush(self._waiting, (priority, self._order, waiter))
        self._admit()
        try:
            await waiter.admitted.wait()
        except trio.Cancelled:
            waiter.gone = True
            if waiter.admitted.is_set():
                self._taken -= 1
            self._admit()
            raise

    def give_back(self) -> None:
        """Somebody else may have the place."""
        self._taken -= 1
        self._admit()

    def _bound(self, priority: Priority) -> int:
        return self._width if priority is Priority.READ else self._background

    def _admit(self) -> None:
        """Let in whoever may go; the first in line decides, since the rest want it less."""
        while self._waiting:
            priority, _, waiter = self._waiting[0]
            if not waiter.gone:
                if self._taken >= self._bound(priority):
                    return
                self._taken += 1
                waiter.admitted.set()
            heappop(self._waiting)


class _Waiter:
    __slots__ = ("admitted", "gone")

    def __init__(self) -> None:
        self.admitted = trio.Event()
        self.gone = False
