"""The remote files that are open: one session per content, shared by all who have it open.

A session begins with its first reader, in memory: no open waits for the cache path. A partial file
takes what came as soon as more than `KEEP_FROM` did, when a copy is wanted, or when an earlier run
left one. It is synced now and then, and when its last reader has been gone for `LINGER` seconds; a
copy that is being filled is filled to its end.

When the last byte is on disk the file gets its name and is told (`fills`). Whoever has it open goes
on reading the same file; the next open after the last of them finds the whole copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import trio

from sectorfs.errors import DiskFull, NoSource, SectorFSError
from sectorfs.stores.arrivals import Arrivals, Memory
from sectorfs.stores.blocks import Identity, PartialFile
from sectorfs.stores.copies import Copies
from sectorfs.stores.fetch_rules import is_worth_a_copy
from sectorfs.stores.fills import Fills
from sectorfs.stores.prover import Prover
from sectorfs.stores.range_requests import Outdated
from sectorfs.stores.reproof import reprove
from sectorfs.stores.sessions import Session, Surroundings, Wanted
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.stream import Stream
from sectorfs.stores.windows import Window
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

KEEP_FROM = 512 << 10
"""Bytes of a file up to which what came stays in memory: most proofs read less."""
ROOM_STEP = 64 << 20
"""Bytes of a file after which it is asked again whether there is room for more of it."""
LINGER = 5.0
"""For so long a session without readers stays, for the next one."""


class StreamHandle:
    """An open remote file; implements `stores.protocol.StreamFile`."""

    def __init__(self, streams: Streams, session: Session) -> None:
        self._streams = streams
        self._session = session
        self._window = Window()
        self._closed = False
        self.size = session.wanted.size
        self.mtime_ns = session.wanted.mtime_ns

    @property
    def storage(self) -> StorageID:
        """Of the source that answered last."""
        source = self._session.stream.source
        return source.storage if source is not None else StorageID("")

    @property
    def path(self) -> str:
        """Which file it is, and where from."""
        source = self._session.stream.source
        name = self._session.wanted.name
        return f"{source.url}/{name}" if source is not None else name

    def read_nowait(self, offset: int, size: int) -> bytes | memoryview | None:
        """See `StreamFile.read_nowait`."""
        if self._session.stream.outdated:
            return None
        data = self._session.stream.read_nowait(self._window, offset, size)
        if data is not None:
            self._streams.was_read(self._session, self._window)
        return data

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """See `StreamFile.read`."""
        while True:
            if self._session.stream.outdated:
                self._move()
            with suppress(Outdated):
                data = await self._session.stream.read(self._window, offset, size)
                self._streams.was_read(self._session, self._window)
                return data

    def _move(self) -> None:
        """Go on where bytes are proved."""
        left = self._session
        self._session = self._streams.enter(left.wanted)
        left.stream.left(self._window)
        self._streams.left(left)

    def close(self) -> None:
        """Leave; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._session.stream.left(self._window)
            self._streams.left(self._session)


class Streams:
    """The sessions of a node."""

    def __init__(
        self,
        nursery: trio.Nursery,
        copies: Copies,
        surroundings: Surroundings,
        *,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self._nursery = nursery
        self._copies = copies
        self._around = surroundings
        self._now = now
        self._memory = Memory()
        self._sessions: dict[SectorFile, list[Session]] = {}
        self._fills = Fills(
            nursery, copies, surroundings, attach=self._attach, settle=self._settle, now=now
        )

    # --- opening and reading ---

    def is_open(self, wanted: Wanted) -> bool:
        """True while somebody has this content open: whoever comes must read it the same way."""
        sessions = self._sessions.get(wanted.file, ())
        return any(
            one.handles > 0 and one.wanted.is_same(wanted) and not one.stream.stale
            for one in sessions
        )

    async def open(self, wanted: Wanted) -> StreamHandle:
        """Open a remote file, its first bytes here as proof that it can be had.

        `NoSource`, `Stale` and `NoRanges` as `Stream.read`.
        """
        while True:
            session = self.enter(wanted)
            handle = StreamHandle(self, session)
            try:
                await self._prove(session)
            except Outdated:
                handle.close()
                continue
            except BaseException:
                handle.close()
                raise
            return handle

    def enter(self, wanted: Wanted) -> Session:
        """The session of a content, with one reader more."""
        session = self._session(wanted)
        session.handles += 1
        session.visits += 1
        return session

    async def _prove(self, session: Session) -> None:
        stream = session.stream
        if stream.arrivals.has(0, 1) and not stream.stale:
            await trio.lowlevel.checkpoint()
            return
        try:
            await stream.read(Window(), 0, 1)
        except NoSource:
            # An earlier run may have left some of it: better than nothing.
            if not self._copies.has_partial(session.wanted.file, session.wanted.member):
                raise
            await self._attach(session)
            if not stream.arrivals.total:
                raise

    def was_read(self, session: Session, window: Window) -> None:
        """A reader got something."""
        if not session.attached and session.done >= KEEP_FROM:
            self._attach_soon(session)
        self._grow_soon(session)
        if session.fill is None and session.wanted.fills and self._now() >= session.fill_after:
            present, size = session.done, session.wanted.size
            if is_worth_a_copy(streak=window.streak, present=present, size=size):
                self._fills.begin(session).unasked = True

    def left(self, session: Session) -> None:
        """A reader is gone."""
        session.handles -= 1
        self._settle(session)

    # --- copies ---

    async def fetch(self, wanted: Wanted, progress: Callable[[int], object] | None = None) -> None:
        """Make a whole copy, and wait for it; `progress` is told now and then how much is here."""
        while not await self._fills.wait(self._session(wanted), progress):
            pass

    def filling(self) -> Iterator[Session]:
        """The sessions whose copies are being made."""
        for sessions in self._sessions.values():
            yield from (session for session in sessions if session.fill is not None)

    def present(self, file: SectorFile, member: str | None = None) -> int | None:
        """Bytes that are here of a file that is open or coming; None of any other."""
        found = [one for one in self._sessions.get(file, ()) if one.wanted.member == member]
        return max((session.done for session in found), default=None)

    def has(self, file: SectorFile) -> bool:
        """True while a file, or one in that directory, is open or coming."""
        return file in self._sessions

    def let_go(self, file: SectorFile) -> None:
        """End what only waits for its next reader."""
        for session in tuple(self._sessions.get(file, ())):
            if session.is_idle():
                self._end(session)

    def is_filling(self, file: SectorFile) -> bool:
        """True while a copy of a file, or of one in that directory, is being made."""
        return any(session.fill is not None for session in self._sessions.get(file, ()))

    # --- partial files ---

    def _attach_soon(self, session: Session) -> None:
        session.attached = True

        async def attach() -> None:
            try:
                await self._attach(session)
            except SectorFSError as exc:
                log.warning("%s is read without being kept: %s", session.wanted.name, exc)
            except Exception:  # the boundary of a task in the node's nursery
                log.exception("%s is read without being kept", session.wanted.name)

        self._nursery.start_soon(attach)

    def _grow_soon(self, session: Session) -> None:
        if session.growing or session.fill is not None or session.done < session.allowed:
            return
        if session.stream.arrivals.kept is not None:
            session.growing = True
            self._nursery.start_soon(self._grow, session)

    async def _grow(self, session: Session) -> None:
        """Ask for room for more of what is read; a boundary, like `_attach_soon`."""
        full = DiskFull("no room for more of it", self._copies.root, "make room in the cache path")
        try:
            if await self._around.grow(ROOM_STEP):
                session.allowed = session.done + ROOM_STEP
                session.growing = False
            else:
                session.stream.arrivals.lose_disk(full)
        except Exception:
            log.exception("%s: asking for room failed unexpectedly", session.wanted.name)

    async def _attach(self, session: Session) -> None:
        """Give a session its partial file, unless it has one."""
        async with session.attaching:
            arrivals = session.stream.arrivals
            if arrivals.kept is not None or session.ended:
                return
            session.attached = True
            wanted, stream = session.wanted, session.stream
            kept = await self._copies.partial(
                wanted.file, wanted.member, stream.identity, resume=self._is_alone(session)
            )
            if session not in self._sessions.get(wanted.file, ()):
                kept.close()
                return
            if stream.prover is not None:
                stream.prover.keep_all()
                if kept.doubtful:
                    session.doubts = trio.Event()
                    self._nursery.start_soon(self._resolve, session, kept, stream.prover)
            arrivals.keep(kept)

    def _is_alone(self, session: Session) -> bool:
        """Nobody else writes to the partial file that there may be, without a proof."""
        sessions = self._sessions.get(session.wanted.file, ())
        return not any(
            one is not session and one.wanted.is_same(session.wanted) for one in sessions
        )

    async def _resolve(self, session: Session, kept: PartialFile, prover: Prover) -> None:
        """Prove what an earlier run left without a digest; a boundary, like `_attach_soon`."""
        try:
            await reprove(kept, prover, saved=session.stream.arrivals.saved)
        except SectorFSError as exc:
            log.info("%s: what came of it before is not proved: %s", session.wanted.name, exc)
        except Exception:
            log.exception("%s: proving what came before failed", session.wanted.name)
        finally:
            assert session.doubts is not None
            session.doubts.set()

    # --- beginnings and ends ---

    def _session(self, wanted: Wanted) -> Session:
        """The session of a content, with its digest if anybody knows it; begun now if need be."""
        wanted = self._around.digested(wanted)
        for session in self._sessions.get(wanted.file, ()):
            known = session.wanted
            if known.is_same(wanted) and not session.stream.stale:
                if wanted.digest in (known.digest, b""):
                    return session
                if not known.digest:
                    session.stream.outdate()
        session = self._begin(wanted)
        self._sessions.setdefault(wanted.file, []).append(session)
        if self._copies.has_partial(wanted.file, wanted.member):
            self._attach_soon(session)
        return session

    def _begin(self, wanted: Wanted) -> Session:
        around = self._around
        prover = around.prover(wanted)
        stream = Stream(
            wanted.name,
            Identity(wanted.size, wanted.mtime_ns, digest=wanted.digest.hex()),
            Arrivals(wanted.name, self._copies.lane, self._nursery, self._memory),
            carrier=around.carrier(wanted),
            sources=lambda: self._sources(session),
            sharing=lambda: around.sharing(wanted.file),
            failed=partial(around.failed, wanted.file),
            is_open=lambda: session.handles > 0,
            nursery=self._nursery,
            prover=prover,
        )
        session = Session(wanted, stream, allowed=ROOM_STEP)
        stream.arrivals.on_whole = lambda: self._fills.look(session)
        if prover is not None:
            self._nursery.start_soon(self._warm, session, prover)
        return session

    def _sources(self, session: Session) -> Sequence[PeerSource]:
        wanted = session.wanted
        if not wanted.digest and self._around.digested(wanted).digest:
            session.stream.outdate()
        return self._around.sources(wanted.file)

    async def _warm(self, session: Session, prover: Prover) -> None:
        """A task; a boundary, like `_attach_soon`."""
        try:
            await prover.warm()
        except Exception:
            log.exception("%s: looking for its manifest failed unexpectedly", session.wanted.name)

    def _settle(self, session: Session) -> None:
        """End a session that nobody uses: later, when it has something to keep or to be found."""
        if not session.is_idle():
            return  # what is being put into place comes here again
        nothing = session.is_copy or session.stream.stale or not session.done
        if nothing or self._nursery.cancel_scope.cancel_called:
            self._end(session)
        elif not session.lingers:
            session.lingers = True
            self._nursery.start_soon(self._linger, session)

    async def _linger(self, session: Session) -> None:
        try:
            while session.is_idle():
                visits = session.visits
                await trio.sleep(LINGER)
                if visits != session.visits or not session.is_idle():
                    continue
                await session.stream.arrivals.sync()
                if visits == session.visits:
                    self._end(session)
                    return
        finally:
            session.lingers = False
            if self._nursery.cancel_scope.cancel_called:
                self._settle(session)

    def _end(self, session: Session) -> None:
        if session.ended:
            return
        session.ended = True
        session.stream.close()
        if session.stream.prover is not None:
            session.stream.prover.close()
        sessions = self._sessions[session.wanted.file]
        sessions.remove(session)
        if not sessions:
            del self._sessions[session.wanted.file]
