"""Keeps a catalog current: a snapshot first, then changes by long poll, for as long as it runs.

One loop asks; nothing else does. Whatever fails, the catalog stays as it is and the loop asks again
a little later: an Index that is away, or a token it does not take, never empties the tree. Answers
are applied in slices with a checkpoint between them, so that the kernel is not kept waiting.

An Index that was replaced, or restored from a backup, lacks what the nodes are about to declare
anew. It is taken over once they have: until then the tree stays as it was (`_Newcomer`).

Cancelled anywhere it leaves a catalog that is right as of its `seq`, or one in the middle of a
merge, which the next `step` begins anew.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import trio

from sectorfs import metrics
from sectorfs.errors import SectorFSError, Unreachable
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.merge import Reload
from sectorfs.index.protocol import Changes, LocationKey, PackedPage, SectorIndex
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

PAGE = 250
"""Changes asked for at a time: decoding and applying them takes a few milliseconds."""
SNAPSHOT_PAGE = 1000
"""Rows of a snapshot asked for at a time."""
SLICE = 200
"""Changes applied without a checkpoint."""
PATIENCE = 6
"""Heartbeats after which a replaced Index is taken over, whatever it still lacks."""
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 5.0


class _Newcomer:
    """Judges when an Index of another epoch knows again what the nodes have.

    It does once every storage known before is attached and nothing was declared for a heartbeat:
    within one each node notices. Storages of nodes that are gone never come: patience ends.
    """

    def __init__(self, page: PackedPage, now: float, heartbeat: float) -> None:
        self.epoch = page.epoch
        self._seq = page.seq
        self._heartbeat = heartbeat
        self._quiet_since = now
        self._until = now + PATIENCE * heartbeat

    def ready(self, page: PackedPage, known: set[StorageID], now: float) -> bool:
        """Look at its first page: may the catalog become what it says?"""
        if page.seq != self._seq:
            self._seq, self._quiet_since = page.seq, now
        complete = known <= {status.info.storage for status in page.storages}
        quiet = now - self._quiet_since >= self._heartbeat
        return (complete and quiet) or now >= self._until


class Feed:
    """Follows an index into a catalog; `run` is its only task."""

    def __init__(
        self,
        index: SectorIndex,
        catalog: Catalog,
        *,
        heartbeat: float,
        on_change: Callable[[Sequence[FileChange]], None],
        on_reload: Callable[[], None] | None = None,
        clock: Callable[[], float] = trio.current_time,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.index = index
        self.catalog = catalog
        self.connected = False
        """True while the last question was answered."""
        self._heartbeat = heartbeat
        self._on_change = on_change
        # The Index was replaced, or an older one restored: what it says of this node may be wrong.
        self._on_reload = on_reload
        self._clock = clock
        self._clock_ns = clock_ns
        self._reload = True
        self._newcomer: _Newcomer | None = None
        self._refresh_at = 0.0
        self._answered: float | None = None
        self._failure = ""
        self._moved = trio.Event()

    @property
    def age(self) -> float:
        """Seconds since the Index last answered; infinite before the first time."""
        return float("inf") if self._answered is None else self._clock() - self._answered

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled. Started once the catalog is loaded or the Index proved away."""
        pause = 0.0
        while True:
            if self.catalog.loaded or pause:
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
            # Nodes that lost the Index together must not come back in step.
            await trio.sleep(pause * random.uniform(0.5, 1))
            try:
                await self.step(wait=self._heartbeat)
                pause = 0.0
            except SectorFSError as exc:
                self._failed(exc)
                pause = _next_pause(pause, exc)
            except Exception as exc:  # the boundary of a long-lived task: the mount must go on
                self._failed(exc)
                pause = LONGEST_PAUSE

    async def step(self, *, wait: float) -> None:
        """Ask once: a snapshot when one is due, else changes, waiting up to `wait` seconds."""
        if self._reload:
            await self._load()
            self._refresh_at = self._clock() + self._heartbeat
        else:
            await self._refresh()
            await self._follow(wait)

    async def wait_until(self, condition: Callable[[Catalog], bool]) -> None:
        """Wait until something holds of the catalog, looked at after every slice applied."""
        while not condition(self.catalog):
            await self._moved.wait()

    async def wait_seq(self, seq: int) -> None:
        """Wait until the catalog is loaded and has change `seq`."""
        await self.wait_until(lambda catalog: catalog.loaded and catalog.seq >= seq)

    async def _load(self) -> None:
        reload = Reload(self.catalog)
        after: SectorFile | None = None
        while True:
            page = await self.index.packed(after=after, limit=SNAPSHOT_PAGE)
            self._answer()
            if after is not None and page.epoch != reload.epoch:
                return  # the Index was replaced between two pages: begin anew
            if after is not None and page.after is not None and page.after <= after:
                raise Unreachable("the Index repeats a page of its snapshot", str(after))
            if after is None and self._is_incomplete(page):
                await trio.sleep(self._heartbeat / 4)
                return
            for found in reload.add(page, now_ns=self._clock_ns(), now=self._clock()):
                self._applied(found)
                await trio.lowlevel.checkpoint()
            after = page.after
            if after is None:
                self._reload = False
                self._applied(())
                return

    def _is_incomplete(self, page: PackedPage) -> bool:
        """True while this is another Index than the catalog's, and the nodes still declare."""
        if not self.catalog.loaded or page.epoch == self.catalog.epoch:
            self._newcomer = None
            return False
        now = self._clock()
        if self._newcomer is None or self._newcomer.epoch != page.epoch:
            log.info("the Index was replaced: the tree stays until the nodes have declared anew")
            self._newcomer = _Newcomer(page, now, self._heartbeat)
        known = {status.info.storage for status in self.catalog.storages()}
        return not self._newcomer.ready(page, known, now)

    async def _refresh(self) -> None:
        """Heartbeats make no changes: space and age are asked for now and then."""
        if self._clock() < self._refresh_at:
            return
        statuses = await self.index.storages()
        self._answer()
        self.catalog.update_storages(statuses, self._clock())
        self._refresh_at = self._clock() + self._heartbeat

    async def _follow(self, wait: float) -> None:
        wait = min(wait, max(0.0, self._refresh_at - self._clock()))
        changes = await self.index.changes(
            self.catalog.epoch, self.catalog.seq, wait=wait, limit=PAGE
        )
        self._answer()
        if changes.reload:
            log.info("the Index asks for a new snapshot")
            self._reload = True
            if self._on_reload is not None:
                self._on_reload()
            return
        for part in _sliced(changes, self.catalog):
            self._applied(self.catalog.apply(part, self._clock_ns(), self._clock()))
            await trio.lowlevel.checkpoint()

    def _applied(self, found: Sequence[FileChange]) -> None:
        metrics.CATALOG_FILES.set(len(self.catalog))
        metrics.CATALOG_SEQ.set(self.catalog.seq)
        if found:
            self._on_change(found)
        self._moved.set()
        self._moved = trio.Event()

    def _answer(self) -> None:
        self._answered = self._clock()
        if not self.connected:
            self.connected = True
            metrics.INDEX_CONNECTED.set(1)
            if self._failure:
                log.info("the Index answers again")
        self._failure = ""

    def _failed(self, exc: Exception) -> None:
        """Log the first failure and every one of another kind, not each."""
        self.connected = False
        metrics.INDEX_CONNECTED.set(0)
        kind = type(exc).__name__
        if kind == self._failure:
            return
        self._failure = kind
        if isinstance(exc, SectorFSError):
            log.warning("the Index is away, its last known state stays: %s", exc)
        else:
            log.error("following the Index failed", exc_info=exc)


def _next_pause(pause: float, exc: SectorFSError) -> float:
    if not exc.retry:
        return LONGEST_PAUSE
    return min(LONGEST_PAUSE, 2 * pause) if pause else FIRST_PAUSE


def _sliced(changes: Changes, catalog: Catalog) -> Iterator[Changes]:
    """Parts that are quickly applied, in an order that keeps the catalog right after each.

    Only the last part carries the new `seq`: one that is cancelled before is asked for again.
    """

    def part(**fields: object) -> Changes:
        return msgspec.structs.replace(empty, **fields)

    empty = Changes(epoch=changes.epoch, seq=catalog.seq)
    for storage in changes.detached:
        while files := catalog.files_of(storage, limit=SLICE):
            yield part(dropped=tuple(LocationKey(file, storage) for file in files))
    yield part(detached=changes.detached, storages=changes.storages)
    for start in range(0, len(changes.declared), SLICE):
        yield part(declared=changes.declared[start : start + SLICE])
    for start in range(0, len(changes.dropped), SLICE):
        yield part(dropped=changes.dropped[start : start + SLICE])
    yield part(seq=changes.seq)
