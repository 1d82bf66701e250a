"""One remote file while it is open: reads of it, and the requests that bring what they need.

A read waits for exactly its own bytes. What is missing of them is asked for at once, rounded to
`PIECE`; reads that wait for a place with the same source go out together in one request. Ahead of
readers in sequence, and behind all of them when a copy is wanted, larger ranges come straight into
the partial file. A range in flight is never asked for twice: whoever needs it waits with the first.

A copy is filled from all sources that are surely alike.

A source that fails in the middle costs only what had not come: the next one goes on at that byte. A
source that gives another content than the file had at its open is left; when no other has the old
one, readers get `Stale`, never a mixture.

Cancelled readers leave; a request that nobody waits for any more goes with its last one.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import trio

from sectorfs.errors import (
    DiskError,
    NoProof,
    NoSource,
    PermissionRefused,
    SectorFSError,
    Stale,
    StorageUnavailable,
    WrongBytes,
)
from sectorfs.stores.answers import Version
from sectorfs.stores.arrivals import Arrivals
from sectorfs.stores.blocks import BLOCK, PIECE, Identity
from sectorfs.stores.gates import Priority
from sectorfs.stores.intervals import Intervals
from sectorfs.stores.prover import Prover
from sectorfs.stores.range_requests import Carrier, Outdated, Request
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.windows import Window

log = logging.getLogger(__name__)

BULK = 512 << 10
"""Bytes from which a range is received straight into the file."""
AHEAD_CHUNK = 8 << 20
AHEAD_IN_MEMORY = 2 << 20
"""Bytes asked for ahead of a reader while nothing is kept."""
FILL_CHUNK = 8 << 20
AHEAD_TASKS = 2
FILL_TASKS = 4
PAST_CACHE = 64 << 20
"""Bytes of files whose copies leave the page cache alone, while nobody has them open."""
TOGETHER = 16
"""Ranges in one request at most."""
SOURCES_SECONDS = 1.0
"""For so long the order of sources holds, unless one of them fails."""


class Stream:
    """One content of one remote file; see the module."""

    def __init__(
        self,
        name: str,
        identity: Identity,
        arrivals: Arrivals,
        *,
        carrier: Carrier,
        sources: Callable[[], Sequence[PeerSource]],
        sharing: Callable[[], Collection[PeerSource]],
        failed: Callable[[PeerSource, SectorFSError], object],
        is_open: Callable[[], bool],
        nursery: trio.Nursery,
        prover: Prover | None = None,
    ) -> None:
        self.name = name
        self.identity = identity
        self.arrivals = arrivals
        self.source: PeerSource | None = None
        """That answered last."""
        self.prover = prover
        """None while nobody told the digest: then bytes are checked by their length alone."""
        self._carrier = carrier
        self._sources = sources
        self._sharing = sharing
        self._failed = failed
        self._is_open = is_open
        self._nursery = nursery
        self._ranked: Sequence[PeerSource] = ()
        self._ranked_at = -math.inf
        self._requests: list[Request] = []
        self._readers: list[tuple[int, int]] = []
        self._versions: dict[PeerSource, Version] = {}
        self._stale: Stale | None = None
        self._outdated = False
        self._ahead: dict[Window, tuple[int, int]] = {}
        self._pumps = {Priority.AHEAD: 0, Priority.FILL: 0}
        self._fills = 0
        self._fill_rounds = 0
        self._fill_error: SectorFSError | None = None
        self._moved = trio.Event()
        self._closed = False
        arrivals.on_change = self._tell
        arrivals.needed = self._is_read

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.identity.size

    @property
    def stale(self) -> bool:
        """No source has this content any more."""
        return self._stale is not None

    @property
    def outdated(self) -> bool:
        """Its bytes can be proved by now, but here they are not."""
        return self._outdated

    async def read(self, window: Window, offset: int, size: int) -> bytes | memoryview:
        """Bytes at `offset`, fewer than `size` only at the end of the file.

        A view is good until the caller's next `await`.
        """
        data = self.read_nowait(window, offset, size)
        if data is not None:
            return data
        end = min(self.size, offset + size)
        self._readers.append((offset, end))
        try:
            return await self._read(offset, end)
        finally:
            self._readers.remove((offset, end))

    def read_nowait(self, window: Window, offset: int, size: int) -> bytes | memoryview | None:
        """As `read` does, None when that would have to wait."""
        end = min(self.size, offset + size)
        if offset < 0 or offset >= end:
            return b""
        self._want_ahead(window, end, window.read(offset, end, self.size))
        if self._stale is None and self.arrivals.has(offset, end):
            return self.arrivals.take_nowait(offset, end)
        return None

    async def _read(self, offset: int, end: int) -> bytes | memoryview:
        while True:
            if self._stale is not None:
                raise self._stale
            if self.arrivals.has(offset, end):
                data = self.arrivals.take_nowait(offset, end) or await self._take(offset, end)
                if data is not None:
                    return data
                await trio.lowlevel.checkpoint()
            with self._waiting(offset, end) as requests:
                for request in requests:
                    await self._wait(request, offset, end)

    def outdate(self) -> None:
        """A digest of the content is known now: bring nothing more without it."""
        self._outdated = True

    async def fill(self) -> None:
        """Bring everything that is missing, behind all readers, to the partial file.

        Several may ask for it; it goes on as long as one of them does.
        """
        self._fills += 1
        self._fill_rounds += 1
        self._fill_error = None
        try:
            while not self.arrivals.is_whole:
                if self.arrivals.kept is None:
                    raise DiskError("there is no place to keep it", self.name)
                self._pump(Priority.FILL, FILL_TASKS)
                await self._moved.wait()
                if self._fill_error is not None:
                    raise self._fill_error
        finally:
            self._fills -= 1

    def left(self, window: Window) -> None:
        """A reader is gone."""
        self._ahead.pop(window, None)

    def close(self) -> None:
        """Nobody reads any more: end every request."""
        self._closed = True
        for request in self._requests:
            request.scope.cancel()
        self.arrivals.close()
        self._tell()

    def _tell(self) -> None:
        """Wake those who fill: bytes came to the disk, were lost, or a request ended."""
        self._moved.set()
        self._moved = trio.Event()

    def _is_read(self, start: int, end: int) -> bool:
        return any(low < end and start < high for low, high in self._readers)

    async def _take(self, start: int, end: int) -> bytes | None:
        try:
            return await self.arrivals.take(start, end)
        except (DiskError, StorageUnavailable) as exc:
            self.arrivals.lose_disk(exc)
            return None

    # --- requests ---

    @contextmanager
    def _waiting(self, start: int, end: int) -> Iterator[list[Request]]:
        """The requests that bring a range, made where there are none, while somebody waits."""
        for low, high in self._unasked(start, end):
            self._start(Request(low, high, Priority.READ))
        requests = [one for one in self._coming() if one.start < end and start < one.end]
        for request in requests:
            request.waiters += 1
        try:
            yield requests
        finally:
            for request in requests:
                request.waiters -= 1
                leader = request.leader or request
                if not leader.wanted:
                    leader.scope.cancel()

    async def _wait(self, request: Request, start: int, end: int) -> None:
        low, high = max(start, request.start), min(end, request.end)
        while not request.ended and not self.arrivals.has(low, high):
            await request.moved.wait()
        if request.error is not None and not self.arrivals.has(low, high):
            raise request.error

    def _unasked(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of a range, rounded to pieces, is neither here nor on its way."""
        start, end = _whole_pieces(start, end, self.size)
        coming = Intervals((one.start, one.end) for one in self._coming())
        return [
            gap
            for low, high in self.arrivals.missing(start, end)
            for gap in coming.missing(low, high)
        ]

    def _coming(self) -> list[Request]:
        """What may be waited for: no reader stands behind bulk that has no place yet."""
        return [one for one in self._requests if one.priority is Priority.READ or not one.queued]

    def _start(self, request: Request) -> None:
        self._requests.append(request)
        self._nursery.start_soon(self._run, request)

    async def _run(self, request: Request) -> None:
        """The task of a request; a boundary: it may not end the node."""
        try:
            with request.scope:
                await self._bring(request)
        except SectorFSError as exc:
            request.error = exc
        except Exception as exc:
            log.exception("%s: a request failed unexpectedly", self.name)
            request.error = NoSource("a request failed unexpectedly", self.name, [exc])
        finally:
            if request.leader is None:
                for one in (request, *request.followers):
                    one.error = request.error
                    one.ended = True
                    self._requests.remove(one)
                    one.tell()
            if self._fills:
                self._tell()

    async def _bring(self, request: Request) -> None:
        """Get a range from source after source; again, while one of them is started anew.

        Once more as well when nobody had it right: it may have become wrong on the way.
        """
        causes: dict[PeerSource, SectorFSError] = {}
        since, once_more = trio.current_time(), True
        while True:
            causes.clear()
            unproved: list[NoProof] = []
            try:
                if await self._bring_from_any(request, causes):
                    return
            except NoProof as exc:  # no fault of one source, nor would the next one's bytes help
                unproved.append(exc)
            if once_more and any(isinstance(one, WrongBytes) for one in causes.values()):
                once_more = False
                continue
            failed = {**causes, **(unproved[0].failed if unproved else {})}
            if not await self._carrier.back(failed, since):
                raise self._verdict((*causes.values(), *unproved))

    async def _bring_from_any(
        self, request: Request, causes: dict[PeerSource, SectorFSError]
    ) -> bool:
        """One round over the sources; False when each failed, for one of the `causes`."""
        while (source := self._next_source(causes, request.priority)) is not None:
            request.source = source
            if self._outdated:
                raise Outdated("can be proved by now", self.name, "open it again")
            try:
                async with self._carrier.place(source, request.priority):
                    if request.leader is not None:
                        return True  # taken along in the moment it was let in
                    if request.priority is Priority.FILL and not self._fills:
                        return True  # nobody wants a copy any more
                    request.queued = False
                    self._gather(request)
                    await self._transfer(source, request)
                return True
            except (DiskError, PermissionRefused, StorageUnavailable) as exc:
                # Our own disk: the same source once more, into memory.
                self.arrivals.lose_disk(exc)
                if request.priority is Priority.FILL:
                    raise
            except NoProof:
                raise
            except SectorFSError as exc:
                causes[source] = exc
                self._ranked_at = -math.inf
                self._failed(source, exc)
                log.info("%s: source %s failed: %s", self.name, source.url, exc)
        return False

    def _next_source(self, tried: Collection[PeerSource], priority: Priority) -> PeerSource | None:
        """The best one; a copy is filled from all that are as good, by how much each does."""
        now = trio.current_time()
        if now - self._ranked_at > SOURCES_SECONDS:
            self._ranked, self._ranked_at = self._sources(), now
        left = [one for one in self._ranked if one not in tried]
        if priority is Priority.FILL and len(left) > 1:
            alike = self._sharing()
            busy = Counter(one.source for one in self._requests)
            return min([one for one in left if one in alike] or left[:1], key=busy.__getitem__)
        return left[0] if left else None

    def _verdict(self, causes: Sequence[SectorFSError]) -> SectorFSError:
        """Why readers get nothing; content that changed is so for all of them."""
        changed = next((cause for cause in causes if isinstance(cause, Stale)), None)
        if changed is not None:
            self._stale = changed
            return changed
        return NoSource("no source can give it", self.name, causes)

    def _gather(self, request: Request) -> None:
        """Take along the readers' requests that wait for a place as well."""
        if request.priority is not Priority.READ:
            return
        for other in self._requests:
            if len(request.followers) + 1 >= TOGETHER:
                return
            alone = other.queued and other.leader is None and not other.followers
            if alone and other is not request and other.priority is Priority.READ:
                other.leader = request
                request.followers.append(other)
                other.scope.cancel()

    async def _transfer(self, source: PeerSource, request: Request) -> None:
        members = (request, *request.followers)
        others = Intervals(
            (one.start, one.end) for one in self._coming() if one not in members and not one.queued
        )
        spans = self._provable(
            gap
            for one in members
            for low, high in self.arrivals.missing(one.start, one.end)
            for gap in others.missing(low, high)
        )
        if not spans:
            return
        if len(spans) == 1 and spans[0][1] - spans[0][0] >= BULK and self.arrivals.kept:
            await self._receive(source, request, spans[0])
            return

        def deliver(offset: int, data: bytes) -> None:
            self.arrivals.came(offset, data)
            for one in members:
                if one.start < offset + len(data) and offset < one.end:
                    one.tell()

        version = await self._carrier.ranges(
            source,
            spans,
            expect=self._versions.get(source),
            prover=self.prover,
            deliver=deliver,
        )
        self._learn(source, version)

    async def _receive(self, source: PeerSource, request: Request, span: tuple[int, int]) -> None:
        kept = self.arrivals.kept
        assert kept is not None

        def progress(done: int) -> None:
            if self.arrivals.kept is kept:
                self.arrivals.saved(span[0], span[0] + done)
            request.tell()

        version = await self._carrier.receive(
            source,
            span,
            kept.descriptor,
            expect=self._versions.get(source),
            prover=self.prover,
            past_cache=request.priority is Priority.FILL and self._unread(),
            progress=progress,
        )
        self._learn(source, version)

    def _unread(self) -> bool:
        """Nobody will read what comes before the copy is whole, or is likely to just after."""
        return self.size >= PAST_CACHE and not self._is_open()

    def _provable(self, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges to ask for; of whole pieces where they are proved, which what is here may cut."""
        if self.prover is None:
            return list(spans)
        return list(Intervals(_whole_pieces(start, end, self.size) for start, end in spans))

    def _learn(self, source: PeerSource, version: Version) -> None:
        self._versions[source] = version
        self.source = source

    # --- ahead of readers, and behind them ---

    def _want_ahead(self, window: Window, end: int, target: int) -> None:
        """A reader got to `end`, and bytes up to `target` may be wanted soon."""
        if self.arrivals.kept is None:
            target = min(target, end + AHEAD_IN_MEMORY)
        if target - end < PIECE:
            self._ahead.pop(window, None)
            return
        _, asked = self._ahead.get(window, (0, 0))
        if not end <= asked <= target or asked - end < (target - end) // 2:
            asked = target  # in leaps of half a window: few requests, and large ones
        self._ahead[window] = (end, asked)
        self._pump(Priority.AHEAD, AHEAD_TASKS)

    def _pump(self, priority: Priority, tasks: int) -> None:
        if self._closed or self._next_bulk(priority) is None:
            return
        if self._pumps[priority] < tasks:
            self._pumps[priority] += 1
            self._nursery.start_soon(self._pump_on, priority, tasks)

    async def _pump_on(self, priority: Priority, tasks: int) -> None:
        try:
            while not self._closed and (span := self._next_bulk(priority)) is not None:
                request, begun = Request(*span, priority), self._fill_rounds
                self._requests.append(request)
                self._pump(priority, tasks)
                await self._run(request)
                if request.error is not None:
                    self._give_up(priority, request.error, begun)
                    return
        finally:
            self._pumps[priority] -= 1

    def _next_bulk(self, priority: Priority) -> tuple[int, int] | None:
        if priority is Priority.FILL:
            wanted = [(0, self.size)] if self._fills and self.arrivals.kept else []
            chunk = FILL_CHUNK
        else:
            wanted, chunk = list(self._ahead.values()), AHEAD_CHUNK
            if self.arrivals.kept is None:  # memory has room for no more, and forgets the oldest
                wanted = [(at, min(end, at + AHEAD_IN_MEMORY)) for at, end in wanted]
        queued = Intervals((one.start, one.end) for one in self._requests)
        for start, end in wanted:
            for gap in self._unasked(start, end):
                for low, high in queued.missing(*gap):
                    return low, min(self._bulk_end(high), (low // chunk + 1) * chunk)
        return None

    def _bulk_end(self, end: int) -> int:
        """Where bulk may end: with a block where it is proved, which asks for no hashes then."""
        return end if self.prover is None else min(self.size, -(-end // BLOCK) * BLOCK)

    def _give_up(self, priority: Priority, cause: SectorFSError, begun: int) -> None:
        if priority is Priority.FILL:
            if begun == self._fill_rounds:  # else whoever fills now asks once more
                self._fill_error = cause
            self._tell()
        else:
            self._ahead.clear()  # the next read asks, and hears why


def _whole_pieces(start: int, end: int, size: int) -> tuple[int, int]:
    return start // PIECE * PIECE, min(size, -(-end // PIECE) * PIECE)
