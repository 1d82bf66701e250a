"""Runs of the scrub: of sector files that are named, and of whole storages by pass and by schedule.

There is one pass of a storage at a time, whoever asks: a command goes on where the schedule was and
the schedule where a command was, and both where the process before them was. A command takes a pass
over from the schedule. Storages on one device wait for each other, so that no disk is read in two
places; those on others are read side by side.

A disk that falls silent ends its pass, which goes on from there when it answers again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from sectorfs import metrics
from sectorfs.errors import Refused, SectorFSError, StorageUnavailable
from sectorfs.index.catalog import Catalog
from sectorfs.stores.bulk_pace import BulkPace
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.scrub import Examined, Examiner
from sectorfs.stores.scrub_notes import ScrubNotes
from sectorfs.stores.verdicts import STATES, WELL, Finding, Told, tell
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

AT_A_TIME = 4
"""Storages that are read at a time."""
CHECK = 60.0
"""Seconds between two looks at whether a pass is due."""
NOTE_EVERY = 30.0
"""Seconds of work that a crash may cost, and a file."""
NOTE_SECONDS = 5.0
"""So long the end of a pass waits for the repo's disk."""
PAGE = 500
MOST_KEPT = 10_000
"""Findings that a run keeps for whoever asked for it; the rest is counted."""


class Mends(Protocol):
    """Repairs what a look found damaged."""

    async def mend(
        self, path: LocalPath, file: SectorFile, examined: Examined, *, primary: bool
    ) -> Examined:
        """The same, with what was repaired marked so, and why the rest was not."""


class Run:
    """One order under way: what it read and found so far. A `Meter` for its reads."""

    def __init__(
        self, pace: BulkPace, *, what: str, repair: bool, primary: bool, every: bool
    ) -> None:
        self.what = what
        """What is looked at, for people."""
        self.repair = repair
        self.primary = primary
        """Primary copies are repaired as well."""
        self.every = every
        """Files that are well are kept in `findings`, too."""
        self.began = time.monotonic()
        self.file = ""
        """The sector file that is looked at."""
        self.files = 0
        self.bytes = 0
        """Read so far."""
        self.total: int | None = None
        """To be read in all; None while that is not known."""
        self.states = dict.fromkeys(STATES, 0)
        self.findings: list[Told] = []
        self.more = 0
        """Findings beyond `MOST_KEPT`."""
        self.stopped: dict[StorageID, str] = {}
        """Storages that could not be read to the end, and why."""
        self._pace = pace

    async def turn(self, path: LocalPath, count: int) -> None:
        """See `Meter.turn`."""
        await self._pace.turn(count)

    async def done(self, path: LocalPath, count: int, seconds: float) -> None:
        """See `Meter.done`."""
        self.bytes += count
        metrics.SCRUBBED_BYTES.inc(count)
        await self._pace.done(path.identity[0], count, seconds)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def found(self) -> int:
        """Files that are not well."""
        return sum(count for state, count in self.states.items() if state not in WELL)

    def take(self, examined: Examined) -> None:
        """A sector file was looked at."""
        self.files += 1
        for finding in examined.findings:
            self.states[finding.state] += 1
            if not self.every and finding.state in WELL:
                continue
            if len(self.findings) < MOST_KEPT:
                self.findings.append(tell(finding))
            else:
                self.more += 1


class Scrubber:
    """Looks at the sector files of this node's storages."""

    def __init__(
        self,
        *,
        local: LocalStore,
        catalog: Catalog,
        examiner: Examiner,
        notes: ScrubNotes,
        mender: Mends,
        rate: int = 0,
        every: float = 0,
    ) -> None:
        """`rate` in bytes a second, 0 for no limit; `every` in seconds, 0 for never."""
        self._local = local
        self._catalog = catalog
        self._examiner = examiner
        self.notes = notes
        self._mender = mender
        self._pace = BulkPace(rate)
        self._every = every
        self._limiter = trio.CapacityLimiter(AT_A_TIME)
        self._devices: dict[int, trio.Lock] = {}
        self._scheduled: dict[StorageID, trio.CancelScope] = {}
        self._passes: dict[StorageID, Run] = {}
        self._changed = trio.Event()
        self.runs: list[Run] = []
        """Under way, of commands and of the schedule."""

    # --- what is asked for ---

    @asynccontextmanager
    async def run(
        self, what: str, *, repair: bool = False, primary: bool = False, every: bool = False
    ) -> AsyncIterator[Run]:
        """A run, shown while the block runs."""
        run = Run(self._pace, what=what, repair=repair, primary=primary, every=every)
        self.runs.append(run)
        try:
            yield run
        finally:
            self.runs.remove(run)

    async def verify(self, run: Run, files: Sequence[tuple[LocalPath, SectorFile]]) -> None:
        """Look at these; what was known of them before is replaced."""
        run.total = sum(self._size(path.storage, file) for path, file in files)
        for path, file in files:
            examined = await self._look(path, file, run)
            run.take(examined)
            if not examined.moving:
                self.notes.of(path.storage).take(file, examined.findings)
                await self.notes.write(path.storage)

    async def scrub(self, run: Run, paths: Sequence[LocalPath], *, anew: bool = False) -> None:
        """Bring a pass of each of these to its end; one that is under way by schedule as well."""
        for path in paths:
            if path.storage in self._passes and path.storage not in self._scheduled:
                raise Refused("is being verified already", path.path, "see `sectorfs status`")
        run.total = 0
        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(self._take_over, path, run, anew)

    async def _take_over(self, path: LocalPath, run: Run, anew: bool) -> None:
        while path.storage in self._scheduled:
            self._scheduled[path.storage].cancel()
            await self._changed.wait()
        if path.storage in self._passes:  # another command was faster
            run.stopped[path.storage] = "is being verified already"
            return
        await self._pass(path, run, anew=anew)

    # --- the schedule ---

    async def run_schedule(self) -> None:
        """Begin and go on with passes as they are due, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for path in self._local.paths():
                    if self._is_due(path):
                        nursery.start_soon(self._by_schedule, path)
                await trio.sleep(CHECK)

    def _is_due(self, path: LocalPath) -> bool:
        free = path.storage not in self._passes and path.storage not in self._scheduled
        return free and path.available and self.notes.of(path.storage).is_due(self._every)

    async def _by_schedule(self, path: LocalPath) -> None:
        with trio.CancelScope() as scope:
            self._scheduled[path.storage] = scope
            try:
                async with self.run(path.path) as run:
                    await self._pass(path, run, anew=False)
            except Exception:  # a boundary: no fault in here may end the node
                log.exception("the scrub of %s failed, and is tried again", path.path)
                self.notes.of(path.storage).stop("failed unexpectedly: see the node's log")
            finally:
                del self._scheduled[path.storage]
                self._tell()

    # --- a pass ---

    async def _pass(self, path: LocalPath, run: Run, *, anew: bool) -> None:
        storage, notes = path.storage, self.notes.of(path.storage)
        self._passes[storage] = run
        try:
            async with self._place(path):
                after = notes.begin(anew=anew)
                run.total = (run.total or 0) + await self._left(storage, after)
                try:
                    await self._look_at_all(path, run, after)
                except SectorFSError as exc:
                    notes.stop(str(exc))
                    run.stopped[storage] = str(exc)
                    log.warning("the scrub of %s stops for now: %s", path.path, exc)
                else:
                    notes.end()
                    self._count(storage)
        finally:
            del self._passes[storage]
            self._tell()
            with trio.move_on_after(NOTE_SECONDS, shield=True):
                await self.notes.write(storage)

    @asynccontextmanager
    async def _place(self, path: LocalPath) -> AsyncIterator[None]:
        device = self._devices.setdefault(path.identity[0], trio.Lock())
        async with device, self._limiter:
            yield

    async def _look_at_all(self, path: LocalPath, run: Run, after: SectorFile | None) -> None:
        notes, noted = self.notes.of(path.storage), trio.current_time()
        while files := self._catalog.files_of(path.storage, after=after, limit=PAGE):
            for file in files:
                examined = await self._look(path, file, run)
                if not path.available or path.lane.pulse.silence:
                    notes.take(file, examined.findings)
                    raise StorageUnavailable(path.lane.pulse.silence or path.error, path.path)
                if not examined.moving:
                    run.take(examined)
                    notes.looked(file, self._size(path.storage, file), examined.findings)
                if trio.current_time() - noted >= NOTE_EVERY:
                    await self.notes.write(path.storage)
                    noted = trio.current_time()
            after = files[-1]
        self._require(path)

    def _require(self, path: LocalPath) -> None:
        if path not in self._local.paths():
            raise Refused("was detached", path.path)
        if not path.available:
            raise StorageUnavailable(path.error, path.path)

    async def _look(self, path: LocalPath, file: SectorFile, run: Run) -> Examined:
        self._require(path)
        run.file = str(file)
        examined = await self._examiner.examine(path, file, run)
        if run.repair and examined.state not in WELL:
            examined = await self._mender.mend(path, file, examined, primary=run.primary)
        for finding in examined.findings:
            if finding.state not in WELL:
                log.warning(
                    "%s: %s%s", path.name_of(file, finding.member), finding.state, _why(finding)
                )
        return examined

    async def _left(self, storage: StorageID, after: SectorFile | None) -> int:
        """Bytes of the files that are still to be looked at."""
        total = 0
        while files := self._catalog.files_of(storage, after=after, limit=PAGE):
            total += sum(self._size(storage, file) for file in files)
            after = files[-1]
            await trio.lowlevel.checkpoint()
        return total

    def _size(self, storage: StorageID, file: SectorFile) -> int:
        facts = self._catalog.declared(file, storage)
        return facts.size if facts is not None else 0

    def _count(self, storage: StorageID) -> None:
        last = self.notes.of(storage).last
        assert last is not None
        metrics.SCRUB_ENDED.labels(storage).set(last.ended_ns / 1e9)
        for state in STATES:
            if state not in WELL:
                metrics.SCRUB_FINDINGS.labels(storage, state).set(last.states.get(state, 0))

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _why(finding: Finding) -> str:
    blocks = f", blocks bad: {len(finding.bad)}" if finding.bad and finding.located else ""
    repaired = ", repaired" if finding.repaired else ""
    return f"{blocks}{repaired}: {finding.detail}" if finding.detail else f"{blocks}{repaired}"
