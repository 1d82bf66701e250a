"""Every sector file of the cluster: opened in place when it is here, fetched whole when it is not.

`open` reads the catalog (never the Index), ranks the sources and takes the first that works. What
only peers hold is fetched into the cache path: one *flight* per file, whoever asks for it; the
flight lives in the node's nursery, ends early when nobody waits for it any more, and tries source
after source on any failure. A sector directory is fetched file by file as its files are opened, so
that a 64-byte ``p_aux`` never waits for the layers beside it; it becomes a declared copy when all
files are here (`announcer`). Nodes of other programs do not know single files: when no other source
has the file, the whole directory is fetched from them, in a flight of its own that all its files
wait for together.

Bounds: `parallel` fetches at a time from one storage, twice that from one peer and four times that
on the node, so that a disk of a peer, or a whole peer, that hangs leaves room for the others; files
up to `SMALL` have places of their own and never queue behind bulk. Whoever queued for a source that
meanwhile fell silent does not ask it any more: a hundred readers of it wait for one deadline.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import trio

from sectorfs import metrics
from sectorfs.errors import (
    DiskError,
    DiskFull,
    NoSource,
    NotFound,
    PermissionRefused,
    Refused,
    SectorFSError,
    SourceFailed,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.index.catalog import Catalog, Entry
from sectorfs.index.protocol import SectorIndex
from sectorfs.stores import sources
from sectorfs.stores.announcer import Announcer
from sectorfs.stores.archives import CacheSink, fetch_directory
from sectorfs.stores.copies import Copies
from sectorfs.stores.local import LocalStore
from sectorfs.stores.protocol import OpenFile, State
from sectorfs.stores.reservation import Claim
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.writing import SteadyWrites
from sectorfs.types import Facts, MemberFacts, SectorFile, StorageID

log = logging.getLogger(__name__)

SMALL = 4 << 20
"""Bytes up to which a fetch counts as small."""
PEER_FACTOR = 2
"""The bound on fetches per peer is this many times the bound per storage."""
NODE_FACTOR = 4
"""The same for the node."""
ROUNDS = 3
"""How often an open fetches again when the copy is gone, or another content declared, meanwhile."""
LEARNED = 4096
"""Sector files whose facts are remembered until the Index tells them too."""
LEARN_SECONDS = 5.0
"""For so long what came may take to be in the catalog."""
LEARN_STEP = 0.02
FAILING_SECONDS = 15.0
"""For so long a peer that failed is tried last."""


class Fetch(msgspec.Struct):
    """A flight as `status` shows it."""

    file: SectorFile
    member: str | None
    size: int
    done: int = 0
    source: str = ""


class _Flight:
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


class RemoteStore:
    """Implements `stores.protocol.SectorStore` over local paths, the cache path and peers."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        catalog: Catalog,
        index: SectorIndex,
        local: LocalStore,
        peers: PeerClient,
        copies: Copies,
        parallel: int,
        cutoff: float,
        own_urls: frozenset[str],
        space: SpaceLedger | None = None,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self._space = space
        self._nursery = nursery
        self._catalog = catalog
        self._local = local
        self._peers = peers
        self._copies = copies
        self._parallel = parallel
        self._cutoff = cutoff
        self._own_urls = own_urls
        self._now = now
        self._flights: dict[tuple[SectorFile, str | None], _Flight] = {}
        self._places: dict[tuple[str, bool], trio.CapacityLimiter] = {}
        self._failed_at: dict[str, float] = {}
        self._silent_at: dict[sources.PeerSource, float] = {}
        self._learned: dict[SectorFile, Facts] = {}
        self._announcer = Announcer(
            nursery, index, copies, busy=self._is_arriving, current=self._facts
        )

    # --- what the mount asks ---

    async def open(self, file: SectorFile, member: str | None = None) -> OpenFile:
        """Open the best copy that works; see `SectorStore.open`."""
        entry = self._catalog.entry(file)
        if entry is None:
            raise NotFound("no storage declares it", file, "see `sectorfs storage find`")
        if file.file_type.is_directory != (member is not None):
            raise NotFound("is a directory" if member is None else "is not a directory", file)
        if member is not None and entry.facts and entry.facts.member(member) is None:
            raise NotFound(f"has no file {member!r}", file)
        causes: list[SectorFSError] = []
        here, elsewhere = self._rank(entry)
        for source in here:
            try:
                return await self._local.open_at(source.storage, file, member)
            except SectorFSError as exc:
                log.warning("%s: copy on storage %s cannot be read: %s", file, source.storage, exc)
                causes.append(exc)
        if elsewhere:
            facts = entry.facts or self._learned.get(file)
            return await self._open_fetched(file, member, facts, causes)
        raise self._no_source(file, member, causes)

    async def learn(self, file: SectorFile) -> None:
        """Fetch a directory whose files nobody told of: there is no other way to know them."""
        entry = self._catalog.entry(file)
        if entry is None or entry.facts is not None or not file.file_type.is_directory:
            return
        known = self._learned.get(file)
        if known is not None and await self._is_here(file, known):
            self._announcer.add(file, known)  # the Index may have been away the first time
        else:
            flight = await self._fly(file, None)
            if flight.causes is not None:
                raise self._no_source(file, None, flight.causes)
        with trio.move_on_after(LEARN_SECONDS):
            while self._facts(file) is None:  # noqa: ASYNC110 - the catalog calls nobody here
                await trio.sleep(LEARN_STEP)
            return
        raise Unreachable("has come, but the Index does not tell of it yet", file, "try again")

    def state(self, file: SectorFile) -> State:
        """Where a sector file is, seen from this node."""
        entry = self._catalog.entry(file)
        if entry is None:
            return "unavailable"
        here, elsewhere = self._rank(entry)
        for source in here:
            if source.storage != self._copies.storage:
                return "shared" if source.shared else "local"
        if here:
            return "cached"
        if self._is_arriving(file):
            return "partial"
        healthy = any(self._healthy(source.storage) for source in elsewhere)
        return "remote" if healthy else "unavailable"

    def fetches(self) -> list[Fetch]:
        """Flights under way."""
        return [flight.fetch for flight in self._flights.values()]

    async def _is_here(self, file: SectorFile, facts: Facts) -> bool:
        """Whether a fetched directory still lies in the cache path."""
        return await self._copies.exists(file) or await self._copies.is_received(file, facts)

    def _is_arriving(self, file: SectorFile) -> bool:
        return any(key[0] == file for key in self._flights)

    def _learn(self, file: SectorFile, facts: Facts) -> None:
        """Remember what came until the catalog says it too, so that it is not fetched again."""
        self._learned.pop(file, None)
        while len(self._learned) >= LEARNED:
            del self._learned[next(iter(self._learned))]
        self._learned[file] = facts

    def _facts(self, file: SectorFile) -> Facts | None:
        entry = self._catalog.entry(file)
        return entry.facts if entry else None

    # --- ranking ---

    def _rank(self, entry: Entry) -> tuple[list[sources.LocalSource], list[sources.PeerSource]]:
        now = self._now()
        view = sources.View(
            here=frozenset(path.storage for path in self._local.paths() if path.available),
            own_urls=self._own_urls,
            storage=self._catalog.storage,
            healthy=self._healthy,
            latency=self._peers.latency,
            failing=lambda url: now - self._failed_at.get(url, -FAILING_SECONDS) < FAILING_SECONDS,
        )
        return sources.rank(entry.declarations, view)

    def _healthy(self, storage: StorageID) -> bool:
        return self._catalog.healthy(storage, self._now(), self._cutoff)

    # --- flights ---

    async def _open_fetched(
        self,
        file: SectorFile,
        member: str | None,
        facts: Facts | None,
        causes: list[SectorFSError],
    ) -> OpenFile:
        wanted = _wanted(facts, member)
        for _ in range(ROUNDS):
            try:
                copy = await self._open_copy(file, member, wanted)
                if copy is not None:
                    return copy
                flight = await self._fly(file, member)
                if flight.causes is not None:
                    # A directory may have come in part, and the part may be what was asked for.
                    copy = await self._open_copy(file, member, wanted) if member else None
                    if copy is not None:
                        return copy
                    if self._wanted_now(file, member) in (wanted, None):
                        raise self._no_source(file, member, [*causes, *flight.causes])
                    # Replaced meanwhile, which is why: fetch what it is now.
            except (DiskError, StorageUnavailable) as exc:
                raise self._no_source(file, member, [*causes, exc]) from exc
            entry = self._catalog.entry(file)
            if entry is None:
                raise NotFound("no storage declares it any more", file)
            # Nodes of other programs never say size and time: then what came tells.
            wanted = _wanted(entry.facts or flight.facts, member)
            if wanted is None:
                raise NotFound(f"has no file {member!r}", file)
        causes.append(SourceFailed("its copy vanished as often as it was fetched", file))
        raise self._no_source(file, member, causes)

    def _wanted_now(self, file: SectorFile, member: str | None) -> MemberFacts | None:
        return _wanted(self._facts(file), member)

    async def _open_copy(
        self, file: SectorFile, member: str | None, wanted: MemberFacts | None
    ) -> OpenFile | None:
        if wanted is None:
            return None
        size, mtime_ns = wanted.size, wanted.mtime_ns
        return await self._copies.open(file, member, size=size, mtime_ns=mtime_ns)

    async def _fly(self, file: SectorFile, member: str | None) -> _Flight:
        """Wait for the one flight of a file, or of a whole directory; it has ended then."""
        key = (file, member)
        while True:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight(file, member)
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

    async def _landing(self, flight: _Flight) -> None:
        """Wait for the end of a flight, but not for each that queues for a disk that hangs."""
        while not flight.finished.is_set():
            with trio.move_on_after(self._copies.lane.deadline):
                await flight.finished.wait()
                return
            self._copies.refuse_hung_disk()

    async def _run(self, flight: _Flight) -> None:
        """The flight's task: a boundary, so nothing but cancellation of the node leaves it."""
        key = (flight.fetch.file, flight.fetch.member)
        try:
            with flight.scope:
                flight.causes = await self._try_sources(flight)
        except Exception as exc:
            log.exception("%s: fetch failed unexpectedly", flight.fetch.file)
            flight.causes = [SourceFailed(f"unexpected {type(exc).__name__}", flight.fetch.file)]
        finally:
            del self._flights[key]
            flight.finished.set()
        if flight.facts is not None:
            self._learn(flight.fetch.file, flight.facts)
            self._announcer.add(flight.fetch.file, flight.facts)
        metrics.FETCHES.labels("failed" if flight.causes else "done").inc()

    async def _try_sources(self, flight: _Flight) -> list[SectorFSError] | None:
        file = flight.fetch.file
        causes: list[SectorFSError] = []
        entry = self._catalog.entry(file)
        if entry is None:
            return [NotFound("no storage declares it any more", file)]
        for source in self._rank(entry)[1]:
            flight.fetch.source, flight.fetch.done = source.url, 0
            try:
                await self._fetch_from(source, flight, entry.facts)
                return None
            except (DiskError, StorageUnavailable) as exc:
                causes.append(exc)  # our own disk: another source would not help
                break
            except SectorFSError as exc:
                # Usual of nodes that know no single files; then the whole directory is next.
                usual = isinstance(exc, NotFound) and flight.fetch.member is not None
                level = logging.DEBUG if usual else logging.WARNING
                log.log(level, "%s: source %s failed: %s", file, source.url, exc)
                causes.append(exc)
                if not isinstance(exc, NotFound):
                    self._failed_at[source.url] = self._now()
                if isinstance(exc, Unreachable):
                    self._silent_at[source] = self._now()
        else:
            if flight.fetch.member is not None and any(isinstance(exc, NotFound) for exc in causes):
                return await self._fetch_beside(flight, causes)
        return causes or [SourceFailed("no peer serves it", file)]

    async def _fetch_beside(
        self, flight: _Flight, causes: list[SectorFSError]
    ) -> list[SectorFSError] | None:
        """Get a file with its whole directory, from nodes that do not know it by itself."""
        whole = await self._fly(flight.fetch.file, None)
        if whole.causes is not None:
            return [*causes, *whole.causes]
        flight.facts = whole.facts
        return None

    async def _fetch_from(
        self, source: sources.PeerSource, flight: _Flight, facts: Facts | None
    ) -> None:
        file, member = flight.fetch.file, flight.fetch.member
        if file.file_type.is_directory and member is None:
            flight.facts = await self._receive_directory(source, flight, facts)
            return
        if facts is None:
            facts = await self._peers.facts(source.url, file)
        wanted = _wanted(facts, member)
        if wanted is None:
            raise NotFound(f"has no file {member!r}", file)
        flight.fetch.size = wanted.size
        async with (
            self._turn(source, small=wanted.size <= SMALL),
            self._reserved(flight.fetch.file, flight.fetch.member, wanted.size),
        ):
            await self._receive(source, flight, wanted)
        flight.facts = facts

    async def _receive_directory(
        self, source: sources.PeerSource, flight: _Flight, facts: Facts | None
    ) -> Facts:
        size = flight.fetch.size = facts.size if facts else 0

        def progress(done: int) -> None:
            flight.fetch.done = done

        async with (
            self._turn(source, small=False),
            self._reserved(flight.fetch.file, None, size),
        ):
            return await fetch_directory(
                self._peers,
                CacheSink(self._copies, flight.fetch.file),
                source.url,
                flight.fetch.file,
                expected=facts,
                whole=False,
                progress=progress,
            )

    @asynccontextmanager
    async def _turn(self, source: sources.PeerSource, *, small: bool) -> AsyncIterator[None]:
        """Once there is room to receive; not from a source that fell silent meanwhile."""
        queued_at = self._now()
        async with (
            self._place(f"{source.url} {source.storage}", small, 1),
            self._place(source.url, small, PEER_FACTOR),
            self._place("", small, NODE_FACTOR),
        ):
            if self._silent_at.get(source, queued_at) > queued_at:
                raise SourceFailed("did not answer others in time", source.url)
            yield
        self._failed_at.pop(source.url, None)
        self._silent_at.pop(source, None)

    @asynccontextmanager
    async def _reserved(
        self, file: SectorFile, member: str | None, size: int
    ) -> AsyncIterator[None]:
        """Room in the cache path for a copy, where it is known what is promised there."""
        storage = self._copies.storage
        async with AsyncExitStack() as stack:
            if self._space is not None and self._local.path_of(storage) is not None:
                claim = Claim(
                    storage=storage, file=file, member=member or "", size=size, place="fetching"
                )
                try:
                    await stack.enter_async_context(self._space.reserve([claim]))
                except DiskFull as exc:
                    raise DiskFull(
                        f"{size} bytes to fetch, {exc.what}",
                        self._copies.root,
                        "make room in the cache path",
                    ) from exc
                except Refused as exc:
                    raise DiskError(exc.what, exc.thing, exc.hint) from exc
                except (NotFound, PermissionRefused, StorageUnavailable) as exc:
                    # The cache path's own trouble: `Copies` meets it next, and says which.
                    log.debug("%s: nothing reserved: %s", file, exc)
            yield

    async def _receive(
        self, source: sources.PeerSource, flight: _Flight, wanted: MemberFacts
    ) -> None:
        file, member = flight.fetch.file, flight.fetch.member

        def progress(done: int) -> None:
            flight.fetch.done = done
            run.wrote(done)

        told = _wanted(self._catalog.declared(file, source.storage), member)
        partial = await self._copies.begin(file, member, wanted.size)
        run = SteadyWrites(self._copies.write, partial.descriptor)
        try:
            await self._peers.fetch(
                source.url,
                file,
                member,
                partial.descriptor,
                size=wanted.size,
                mtime_ns=told.mtime_ns if told else None,
                run=run,
                progress=progress,
            )
            await self._copies.commit(partial, size=wanted.size, mtime_ns=wanted.mtime_ns)
        except BaseException:
            await self._copies.discard(partial)
            raise

    def _place(self, of: str, small: bool, factor: int) -> trio.CapacityLimiter:
        """The bound on fetches from a storage, from a peer, or of the node."""
        key = (of, small)
        limiter = self._places.get(key)
        if limiter is None:
            limiter = self._places[key] = trio.CapacityLimiter(self._parallel * factor)
        return limiter

    def _no_source(
        self, file: SectorFile, member: str | None, causes: list[SectorFSError]
    ) -> NoSource:
        thing = f"{file}/{member}" if member else str(file)
        entry = self._catalog.entry(file)
        holders = {item.storage for item in entry.declarations} if entry else set()
        away: list[SectorFSError] = [
            StorageUnavailable(path.error, path.path)
            for path in self._local.paths()
            if path.storage in holders and not path.available
        ]
        return NoSource("no source can give it", thing, causes or away)


def _wanted(facts: Facts | None, member: str | None) -> MemberFacts | None:
    """Size and time of the regular file that is to be opened; None when nobody said."""
    if facts is None:
        return None
    if member is not None:
        return facts.member(member)
    return MemberFacts("", facts.size, facts.mtime_ns)
