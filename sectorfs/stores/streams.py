"""The remote files that are open: one session per content, shared by all who have it open.

A session begins with its first reader, in memory: no open waits for the cache path. A partial file
takes what came as soon as more than `KEEP_FROM` did, when a copy is wanted, or when an earlier run
left one. It is synced now and then, and when its last reader has been gone for `LINGER` seconds; a
copy that is being filled is filled to its end.

When the last byte is on disk the file gets its name and is told (`whole`). Whoever has it open goes
on reading the same file; the next open after the last of them finds the whole copy.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec
import trio

from sectorfs import metrics
from sectorfs.errors import DiskError, DiskFull, NoSource, SectorFSError
from sectorfs.stores.arrivals import Arrivals, Memory
from sectorfs.stores.blocks import Identity
from sectorfs.stores.copies import Copies
from sectorfs.stores.fetch_rules import is_worth_a_copy
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.stream import Carrier, Stream
from sectorfs.stores.windows import Window
from sectorfs.types import Facts, SectorFile, StorageID

log = logging.getLogger(__name__)

KEEP_FROM = 512 << 10
"""Bytes of a file up to which what came stays in memory: most proofs read less."""
ROOM_STEP = 64 << 20
"""Bytes of a file after which it is asked again whether there is room for more of it."""
LINGER = 5.0
"""For so long a session without readers stays, for the next one."""
PROGRESS_SECONDS = 0.5
"""So often those who wait for a copy hear how far it is."""
FILL_AGAIN = 15.0
"""Seconds until filling is tried again after it failed."""
FILL_WITHOUT_ROOM = 60.0
"""The same after there was no room."""


class Wanted(msgspec.Struct, frozen=True):
    """What is to be opened: a regular file of one content."""

    file: SectorFile
    member: str | None
    size: int
    mtime_ns: int
    facts: Facts
    """Of the whole sector file."""
    fills: bool
    """A copy may be made though nobody asked for one."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.file}/{self.member}" if self.member else str(self.file)

    def is_same(self, other: Wanted) -> bool:
        """The same file with the same content."""
        return (self.file, self.member, self.size, self.mtime_ns) == (
            other.file,
            other.member,
            other.size,
            other.mtime_ns,
        )


class Surroundings(msgspec.Struct, frozen=True):
    """What sessions need of the rest of the node."""

    carrier: Callable[[Wanted], Carrier]
    sources: Callable[[SectorFile], Sequence[PeerSource]]
    """Best first."""
    sharing: Callable[[SectorFile], Collection[PeerSource]]
    """Those of them that may fill one file side by side."""
    failed: Callable[[PeerSource, SectorFSError], object]
    reserve: Callable[[SectorFile, str | None, int], AbstractAsyncContextManager[None]]
    grow: Callable[[int], Awaitable[bool]]
    """Whether so many more bytes of files that are only read may stay on disk."""
    whole: Callable[[SectorFile, Facts], object]
    """Told of each file that is a whole copy now."""


class _Fill:
    """The making of one copy."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.asked = 0
        """How many asked for it and wait."""
        self.unasked = False
        """It goes on though nobody waits."""
        self.error: SectorFSError | None = None


class Session:
    """One content of one remote file while it is open, or being filled."""

    def __init__(self, wanted: Wanted, stream: Stream) -> None:
        self.wanted = wanted
        self.stream = stream
        self.handles = 0
        self.visits = 0
        """How often somebody came to use it."""
        self.attached = False
        """A partial file was asked for, and came or not."""
        self.attaching = trio.Lock()
        self.fill: _Fill | None = None
        self.fill_after = 0.0
        """No copy is begun unasked before."""
        self.allowed = ROOM_STEP
        """Bytes that may stay on disk before room is asked for."""
        self.growing = False
        self.finished: trio.Event | None = None
        """Made when the last byte came, set when the copy has its name."""
        self.is_copy = False
        self.lingers = False
        self.ended = False

    @property
    def done(self) -> int:
        """Bytes that are here."""
        return self.stream.arrivals.total

    @property
    def in_use(self) -> bool:
        """Somebody reads it, or a copy is being made."""
        return self.handles > 0 or self.fill is not None

    def is_idle(self) -> bool:
        """It is there, and nobody uses it or puts it into place."""
        finishing = self.finished is not None and not self.finished.is_set()
        return not self.ended and not self.in_use and not finishing


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
        data = self._session.stream.read_nowait(self._window, offset, size)
        if data is not None:
            self._streams.was_read(self._session, self._window)
        return data

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """See `StreamFile.read`."""
        data = await self._session.stream.read(self._window, offset, size)
        self._streams.was_read(self._session, self._window)
        return data

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

    # --- opening and reading ---

    def is_open(self, wanted: Wanted) -> bool:
        """True while somebody has this content open: whoever comes must read it the same way."""
        session = self._find(wanted)
        return session is not None and session.handles > 0

    async def open(self, wanted: Wanted) -> StreamHandle:
        """Open a remote file, its first bytes here as proof that it can be had.

        `NoSource`, `Stale` and `NoRanges` as `Stream.read`.
        """
        session = self._session(wanted)
        session.handles += 1
        session.visits += 1
        handle = StreamHandle(self, session)
        try:
            await self._prove(session)
        except BaseException:
            handle.close()
            raise
        return handle

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
                self._fill(session).unasked = True

    def left(self, session: Session) -> None:
        """A reader is gone."""
        session.handles -= 1
        self._settle(session)

    # --- copies ---

    async def fetch(self, wanted: Wanted, progress: Callable[[int], object] | None = None) -> None:
        """Make a whole copy, and wait for it; `progress` is told now and then how much is here."""
        while True:
            session = self._session(wanted)
            fill = self._fill(session)
            fill.asked += 1
            try:
                await self._await_fill(session, fill, progress)
            finally:
                fill.asked -= 1
                if not fill.asked and not fill.unasked:
                    fill.scope.cancel()
            if fill.error is not None:
                raise fill.error
            if not fill.scope.cancelled_caught:  # else whoever wanted it before left just then
                return

    async def _await_fill(
        self, session: Session, fill: _Fill, progress: Callable[[int], object] | None
    ) -> None:
        while not fill.ended.is_set():
            if progress is not None:
                progress(session.done)
            with trio.move_on_after(PROGRESS_SECONDS):
                await fill.ended.wait()

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

    def _fill(self, session: Session) -> _Fill:
        """The fill of a session, begun now unless it runs."""
        if session.fill is None:
            session.fill = _Fill()
            session.visits += 1
            self._nursery.start_soon(self._run_fill, session, session.fill)
        return session.fill

    async def _run_fill(self, session: Session, fill: _Fill) -> None:
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
            if fill.error is not None:
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
            await session.stream.fill()
            self._look(session)
            if session.finished is not None:
                await session.finished.wait()
        if not session.is_copy:
            raise DiskError("the copy could not be put into place", wanted.name)

    def _look(self, session: Session) -> None:
        """Bytes came to the disk, or were lost."""
        if session.stream.arrivals.is_whole and session.finished is None:
            session.finished = trio.Event()
            self._nursery.start_soon(self._finish, session, session.finished)

    async def _finish(self, session: Session, finished: trio.Event) -> None:
        """The task that puts a copy into place: a boundary, it may not end the node."""
        wanted, arrivals = session.wanted, session.stream.arrivals
        kept = arrivals.kept
        try:
            if kept is not None:
                await self._copies.finish(kept, wanted.file, wanted.member)
                session.is_copy = True
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
            wanted = session.wanted
            identity = Identity(wanted.size, wanted.mtime_ns)
            kept = await self._copies.partial(wanted.file, wanted.member, identity)
            if session in self._sessions.get(wanted.file, ()):
                arrivals.keep(kept)
            else:
                kept.close()

    # --- beginnings and ends ---

    def _find(self, wanted: Wanted) -> Session | None:
        for session in self._sessions.get(wanted.file, ()):
            if session.wanted.is_same(wanted) and not session.stream.stale:
                return session
        return None

    def _session(self, wanted: Wanted) -> Session:
        session = self._find(wanted)
        if session is None:
            session = self._begin(wanted)
            self._sessions.setdefault(wanted.file, []).append(session)
            if self._copies.has_partial(wanted.file, wanted.member):
                self._attach_soon(session)
        return session

    def _begin(self, wanted: Wanted) -> Session:
        around = self._around
        stream = Stream(
            wanted.name,
            Identity(wanted.size, wanted.mtime_ns),
            Arrivals(wanted.name, self._copies.lane, self._nursery, self._memory),
            carrier=around.carrier(wanted),
            sources=lambda: around.sources(wanted.file),
            sharing=lambda: around.sharing(wanted.file),
            failed=around.failed,
            nursery=self._nursery,
        )
        session = Session(wanted, stream)
        stream.arrivals.on_whole = lambda: self._look(session)
        return session

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
        sessions = self._sessions[session.wanted.file]
        sessions.remove(session)
        if not sessions:
            del self._sessions[session.wanted.file]
