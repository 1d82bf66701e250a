"""One change of a sector file at a time on this node.

A move to a path of this node holds the file's turn until the source's node has removed its own
copy, for which that node needs a turn in its place. Of moves that so wait for each other, in a ring
of any length, all but one would wait for ever: so each asks in the name of the storage it moves to,
and the one to the least of these storages goes on. The node that does it refuses the request it
gets meanwhile; whoever is refused gives its own turn back.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from sectorfs.errors import Refused
from sectorfs.types import SectorFile, StorageID

MOMENT = 2.0
"""Seconds that a move which goes first waits for another to begin to ask, as it soon may."""


class Turn:
    """One change under way."""

    def __init__(self, to: StorageID | None, changed: Callable[[], object]) -> None:
        self.to = to
        """Where a move goes; None for any other change."""
        self.asks = False
        """The move waits for another node to remove its copy."""
        self._changed = changed

    def ask(self) -> None:
        """The move is about to ask another node."""
        self.asks = True
        self._changed()

    def refuses(self, by: StorageID | None) -> bool:
        """Whether a removal asked for by another node, for a move to `by`, must not wait for it."""
        if self.to is None:
            return False
        return by is None or self.to <= by

    def is_undecided(self, by: StorageID | None) -> bool:
        """Whether it would let that removal go first, once it waits for another node itself."""
        return self.to is not None and not self.asks and by is not None


class _Line:
    """Those who want to change one file, first come, first served."""

    def __init__(self) -> None:
        self.holder: Turn | None = None
        self.waiting: list[Turn] = []
        self.moved = trio.Event()

    def tell(self) -> None:
        """Something changed: everybody who waits looks again."""
        self.moved.set()
        self.moved = trio.Event()


class Turns:
    """Who may change a sector file that is to be moved, removed or acquired.

    Order: a turn, then `LocalPath.changing`. Never two turns in one task.
    """

    def __init__(self) -> None:
        self._lines: dict[SectorFile, _Line] = {}

    @asynccontextmanager
    async def of(self, file: SectorFile, *, to: StorageID | None = None) -> AsyncIterator[Turn]:
        """Hold the turn of a file for the block; `to` where a move to this node is to be done."""
        async with self._hold(file, to, lambda holder: math.inf) as turn:
            yield turn

    @asynccontextmanager
    async def asked(self, file: SectorFile, by: StorageID | None) -> AsyncIterator[Turn]:
        """The same for another node, which moves the file to `by`, or just wants it removed.

        `Refused` at once rather than to wait for a move that may wait for that node, and after
        `MOMENT` seconds for one that will not wait for any node soon, as it copies yet.
        """
        end = trio.current_time() + MOMENT

        def decide(holder: Turn) -> float:
            undecided = holder.is_undecided(by)
            if holder.refuses(by) or (undecided and trio.current_time() >= end):
                raise Refused(f"is being moved to {holder.to}", file, "try again when that is done")
            return end if undecided else math.inf

        async with self._hold(file, None, decide) as turn:
            yield turn

    @asynccontextmanager
    async def _hold(
        self, file: SectorFile, to: StorageID | None, decide: Callable[[Turn], float]
    ) -> AsyncIterator[Turn]:
        """`decide` says when to look at a holder again, though nothing changed, or raises."""
        line = self._lines.setdefault(file, _Line())
        turn = Turn(to, line.tell)
        line.waiting.append(turn)
        try:
            await trio.lowlevel.checkpoint()
            while line.holder is not None or line.waiting[0] is not turn:
                until = decide(line.holder) if line.holder is not None else math.inf
                with trio.move_on_at(until):
                    await line.moved.wait()
            line.holder = turn
            line.waiting.remove(turn)
            line.tell()
            yield turn
        finally:
            if line.holder is turn:
                line.holder = None
            else:
                line.waiting.remove(turn)
            line.tell()
            if line.holder is None and not line.waiting:
                del self._lines[file]
