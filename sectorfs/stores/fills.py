"""Whole copies of remote files while they are made, asked for or not, and how they get their names.

A copy is filled behind all readers of its session. When its last byte is on disk it gets its name,
its manifest is kept where it was proved, and it is told (`Surroundings.whole`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from sectorfs import metrics
from sectorfs.errors import DiskError, DiskFull, SectorFSError
from sectorfs.stores.copies import Copies
from sectorfs.stores.range_requests import Outdated
from sectorfs.stores.sessions import Fill, Session, Surroundings

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5
"""So often those who wait for a copy hear how far it is."""
FILL_AGAIN = 15.0
"""Seconds until filling is tried again after it failed."""
FILL_WITHOUT_ROOM = 60.0
"""The same after there was no room."""


class Fills:
    """The copies that a node makes of what it streams."""

    def __init__(
        self,
        nursery: trio.Nursery,
        copies: Copies,
        surroundings: Surroundings,
        *,
        attach: Callable[[Session], Awaitable[None]],
        settle: Callable[[Session], object],
        now: Callable[[], float],
    ) -> None:
        """`attach` gives a session its partial file, `settle` ends it when nobody uses it."""
        self._nursery = nursery
        self._copies = copies
        self._around = surroundings
        self._attach = attach
        self._settle = settle
        self._now = now

    def begin(self, session: Session) -> Fill:
        """The fill of a session, begun now unless it runs."""
        if session.fill is None:
            session.fill = Fill()
            session.visits += 1
            self._nursery.start_soon(self._run, session, session.fill)
        return session.fill

    async def wait(self, session: Session, progress: Callable[[int], object] | None = None) -> bool:
        """Have a whole copy made, and wait for it; False when it must be asked for once more.

        `progress` is told now and then how much is here.
        """
        fill = self.begin(session)
        fill.asked += 1
        try:
            await self._await(session, fill, progress)
        finally:
            fill.asked -= 1
            if not fill.asked and not fill.unasked:
                fill.scope.cancel()
        if isinstance(fill.error, Outdated):
            return False
        if fill.error is not None:
            raise fill.error
        return not fill.scope.cancelled_caught  # else whoever wanted it before left just then

    def look(self, session: Session) -> None:
        """Bytes came to the disk, or were lost."""
        if session.stream.arrivals.is_whole and session.finished is None:
            session.finished = trio.Event()
            self._nursery.start_soon(self._finish, session, session.finished)

    async def _await(
        self, session: Session, fill: Fill, progress: Callable[[int], object] | None
    ) -> None:
        while not fill.ended.is_set():
            if progress is not None:
                progress(session.done)
            with trio.move_on_after(PROGRESS_SECONDS):
                await fill.ended.wait()

    async def _run(self, session: Session, fill: Fill) -> None:
        """The task of a fill: a boundary, so nothing but cancellation of the node leaves it."""
        wanted = session.wanted
        try:
            with fill.scope:
                await self._make_copy(session)
        except SectorFSError as exc:
            fill.error = exc
        except Exception as exc:
            log.exception("%s: filling failed unexpectedly", wanted.name)
            fill.error = DiskError(f"unexpected {type(exc).__name__}", wanted.name)
        finally:
            if fill.error is not None and not isinstance(fill.error, Outdated):
                full = isinstance(fill.error, DiskFull)
                session.fill_after = self._now() + (FILL_WITHOUT_ROOM if full else FILL_AGAIN)
                log.warning("%s: no copy of it is made: %s", wanted.name, fill.error)
            session.fill = None
            if session.is_copy:  # told before too, but a directory waits for the end of its fills
                self._around.whole(wanted.file, wanted.facts)
            fill.ended.set()
            self._settle(session)

    async def _make_copy(self, session: Session) -> None:
        wanted = session.wanted
        async with self._around.reserve(wanted.file, wanted.member, wanted.size):
            await self._attach(session)
            if session.doubts is not None:
                await session.doubts.wait()
            await session.stream.fill()
            self.look(session)
            if session.finished is not None:
                await session.finished.wait()
        if not session.is_copy:
            raise DiskError("the copy could not be put into place", wanted.name)

    async def _finish(self, session: Session, finished: trio.Event) -> None:
        """The task that puts a copy into place: a boundary, it may not end the node."""
        wanted, arrivals = session.wanted, session.stream.arrivals
        kept = arrivals.kept
        try:
            if kept is not None:
                await self._copies.finish(kept, wanted.file, wanted.member)
                session.is_copy = True
                await self._keep_manifest(session)
        except SectorFSError as exc:
            arrivals.lose_disk(exc)
        except Exception as exc:
            log.exception("%s: finishing the copy failed unexpectedly", wanted.name)
            arrivals.lose_disk(DiskError(f"unexpected {type(exc).__name__}", wanted.name))
        finally:
            finished.set()
        metrics.FETCHES.labels("done" if session.is_copy else "failed").inc()
        if session.is_copy:
            self._around.whole(wanted.file, wanted.facts)
        self._settle(session)

    async def _keep_manifest(self, session: Session) -> None:
        """A copy without one is as good; it is made from the copy itself, some time."""
        prover = session.stream.prover
        if prover is not None:
            try:
                await self._around.keep(session.wanted, await prover.manifest())
            except SectorFSError as exc:
                log.info("%s: its manifest is not kept: %s", session.wanted.name, exc)
