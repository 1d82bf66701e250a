"""Whole files fetched before their `open` returns: small ones, and those that cannot be streamed.

One *flight* per file, whoever asks for it; it lives in the node's nursery, ends early when nobody
waits for it any more, and tries source after source on any failure. Nodes of other programs do not
know the single files of a sector directory: when no other source has one, the whole directory is
fetched from them, in a flight of its own that all its files wait for together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import trio

from sectorfs import metrics
from sectorfs.errors import (
    DiskError,
    NoProof,
    NoRanges,
    NotFound,
    SectorFSError,
    SourceFailed,
    StorageUnavailable,
    WrongBytes,
)
from sectorfs.index.catalog import Catalog
from sectorfs.index.content import facts_of
from sectorfs.stores import sources
from sectorfs.stores.cache_room import CacheRoom
from sectorfs.stores.copies import Copies
from sectorfs.stores.fetch_rules import SMALL
from sectorfs.stores.gates import Priority
from sectorfs.stores.places import Places
from sectorfs.stores.provers import Provers
from sectorfs.stores.ranking import Ranking
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.unmeasured import receive_unmeasured
from sectorfs.stores.whole_fetches import WholeFetches
from sectorfs.types import Facts, SectorFile, SectorID

log = logging.getLogger(__name__)


WRONG_SECONDS = 900.0
"""For so long a source that gave wrong bytes is not asked for the whole of a large file."""


class Fetch(msgspec.Struct):
    """A file that is coming, as `status` shows it."""

    file: SectorFile
    member: str | None
    size: int
    done: int = 0
    source: str = ""


class Flight:
    """One fetch, and those who wait for it."""

    def __init__(self, file: SectorFile, member: str | None) -> None:
        self.fetch = Fetch(file, member, 0)
        self.waiters = 0
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.causes: list[SectorFSError] | None = None
        """None unless every source failed."""
        self.facts: Facts | None = None
        """Those of the sector file whose bytes have come."""
        self.source: sources.PeerSource | None = None
        """That gave them."""


class Flights:
    """The fetches under way."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        catalog: Catalog,
        ranking: Ranking,
        peers: PeerClient,
        provers: Provers,
        places: Places,
        copies: Copies,
        room: CacheRoom,
        landed: Callable[[SectorFile, Facts], object],
        sector_size: Callable[[SectorID], int],
    ) -> None:
        """`landed` is told of each file that came, and of the facts of its sector file."""
        self._nursery = nursery
        self._catalog = catalog
        self._ranking = ranking
        self._peers = peers
        self._provers = provers
        self._whole = WholeFetches(catalog, peers, copies, provers)
        self._places = places
        self._copies = copies
        self._room = room
        self._landed = landed
        self._sector_size = sector_size
        self._flights: dict[tuple[SectorFile, str | None], Flight] = {}

    def fetches(self) -> list[Fetch]:
        """What is coming."""
        return [flight.fetch for flight in self._flights.values()]

    def has(self, file: SectorFile) -> bool:
        """True while a file, or one in that directory, is coming."""
        return any(key[0] == file for key in self._flights)

    async def fly(self, file: SectorFile, member: str | None) -> Flight:
        """Wait for the one flight of a file, or of a whole directory; it has ended then."""
        key = (file, member)
        while True:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = Flight(file, member)
                self._nursery.start_soon(self._run, flight)
            elif flight.scope.cancel_called:
                await self._landing(flight)  # its last waiter left; let it clean up first
                continue
            flight.waiters += 1
            try:
                await self._landing(flight)
            finally:
                flight.waiters -= 1
                if flight.waiters == 0:
                    flight.scope.cancel()
            return flight

    async def _landing(self, flight: Flight) -> None:
        """Wait for the end of a flight, but not for each that queues for a disk that hangs."""
        while not flight.finished.is_set():
            with trio.move_on_after(self._copies.lane.deadline):
                await flight.finished.wait()
                return
            self._copies.refuse_hung_disk()

    async def _run(self, flight: Flight) -> None:
        """The flight's task: a boundary, so nothing but cancellation of the node leaves it."""
        file, member = flight.fetch.file, flight.fetch.member
        try:
            with flight.scope:
                flight.causes = await self._try_patiently(flight)
        except Exception as exc:
            log.exception("%s: fetch failed unexpectedly", file)
            flight.causes = [SourceFailed(f"unexpected {type(exc).__name__}", file)]
        finally:
            del self._flights[file, member]
            flight.finished.set()
        if flight.facts is not None:
            self._landed(file, flight.facts)
        metrics.FETCHES.labels("failed" if flight.causes else "done").inc()

    async def _try_patiently(self, flight: Flight) -> list[SectorFSError] | None:
        """Go through the sources, and again while one of them is started anew.

        Once more as well when nobody had it right: it may have become wrong on the way.
        """
        since, once_more = trio.current_time(), True
        while True:
            failed: dict[sources.PeerSource, SectorFSError] = {}
            causes = await self._try_sources(flight, failed)
            if once_more and any(isinstance(one, WrongBytes) for one in causes or ()):
                once_more = False
                continue
            if causes is None or not await self._places.back(failed, since):
                return causes

    async def _try_sources(
        self, flight: Flight, failed: dict[sources.PeerSource, SectorFSError]
    ) -> list[SectorFSError] | None:
        file, member = flight.fetch.file, flight.fetch.member
        causes: list[SectorFSError] = []
        entry = self._catalog.entry(file)
        if entry is None:
            return [NotFound("no storage declares it any more", file)]
        try:
            digest = await self._provers.digest_of(file, member, entry.facts)
        except NoProof as exc:
            failed.update(exc.failed)
            return await self._fetch_beside(flight, [exc])
        for source in self._ranking.of(entry)[1]:
            barred = self._barred(source, flight, entry.facts)
            if barred:
                causes.append(SourceFailed(f"{barred}; not asked for all of it again", source.url))
                continue
            flight.fetch.source, flight.fetch.done = source.url, 0
            try:
                await self._fetch_from(source, flight, entry.facts, digest)
            except (DiskError, StorageUnavailable) as exc:
                causes.append(exc)  # our own disk: no source would help
                failed.clear()
                break
            except SectorFSError as exc:
                # Usual of nodes that know no single files; then the whole directory is next.
                usual = isinstance(exc, NotFound) and member is not None
                level = logging.DEBUG if usual else logging.WARNING
                log.log(level, "%s: source %s failed: %s", file, source.url, exc)
                causes.append(exc)
                failed[source] = exc
                self._ranking.failed(file, source, exc)
            else:
                self._ranking.answered(source)
                flight.source = source
                return None
        else:
            if member is not None and any(isinstance(exc, NotFound) for exc in causes):
                return await self._fetch_beside(flight, causes)
        return causes or [SourceFailed("no peer serves it", file)]

    def _barred(self, source: sources.PeerSource, flight: Flight, facts: Facts | None) -> str:
        """Why all of a large file is not got again from who gave it wrong just now; else empty."""
        if facts is None or not facts.digest or facts.size <= SMALL:
            return ""
        bar = self._ranking.bar(flight.fetch.file, source)
        recent = bar is not None and trio.current_time() - bar.at < WRONG_SECONDS
        return bar.text if bar is not None and recent else ""

    async def _fetch_beside(
        self, flight: Flight, causes: list[SectorFSError]
    ) -> list[SectorFSError] | None:
        """Get a file with its whole directory, from nodes that do not know it by itself."""
        whole = await self.fly(flight.fetch.file, None)
        if whole.causes is not None:
            return [*causes, *whole.causes]
        flight.facts = whole.facts
        return None

    async def _fetch_from(
        self, source: sources.PeerSource, flight: Flight, facts: Facts | None, digest: bytes
    ) -> None:
        file, member = flight.fetch.file, flight.fetch.member
        if file.file_type.is_directory and member is None:
            flight.facts = await self._receive_directory(source, flight, facts)
            return
        if facts is None:
            try:
                with self._places.asking(source):
                    facts = await self._peers.facts(source.url, file)
            except NoRanges:
                flight.facts = await self._receive_unmeasured(source, flight)
                return
        wanted = facts_of(facts, member)
        if wanted is None:
            raise NotFound(f"has no file {member!r}", file)
        flight.fetch.size = wanted.size

        def progress(done: int) -> None:
            flight.fetch.done = done

        # Somebody waits for each of them, but large ones must leave places to readers.
        priority = Priority.READ if wanted.size <= SMALL else Priority.AHEAD
        async with (
            self._places.place(source, priority),
            self._room.reserve(file, member, wanted.size, needed=True),
        ):
            await self._whole.file(source, file, wanted, digest, progress)
        flight.facts = facts

    async def _receive_unmeasured(self, source: sources.PeerSource, flight: Flight) -> Facts:
        file = flight.fetch.file
        sector_size = flight.fetch.size = self._sector_size(file.sector)

        def progress(done: int) -> None:
            flight.fetch.done = done

        async with (
            self._places.place(source, Priority.AHEAD),
            self._room.reserve(file, None, sector_size, needed=True),
        ):
            return await receive_unmeasured(
                self._peers,
                self._copies,
                source,
                file,
                sector_size=sector_size,
                progress=progress,
            )

    async def _receive_directory(
        self, source: sources.PeerSource, flight: Flight, facts: Facts | None
    ) -> Facts:
        file = flight.fetch.file
        size = flight.fetch.size = facts.size if facts else 0

        def progress(done: int) -> None:
            flight.fetch.done = done

        async with (
            self._places.place(source, Priority.AHEAD),
            self._room.reserve(file, None, size, needed=True),
        ):
            return await self._whole.directory(source, file, facts, progress)
