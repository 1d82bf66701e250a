"""Every sector file of the cluster: opened in place when it is here, read while it comes when not.

`open` reads the catalog (never the Index), ranks the sources and takes the first that works. What
only peers hold is streamed (`streams`), or fetched whole first (`flights`): small files, those that
the configuration says so of, and those of nodes that know no ranges or told no sizes. As long as
somebody has a streamed file open, everybody reads it that way: an inode has one way to be read.

A sector directory comes file by file as its files are opened, so that a 64-byte ``p_aux`` never
waits for the layers beside it; it becomes a declared copy when all files are here (`announcer`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from sectorfs.config import FetchConfig
from sectorfs.errors import (
    DiskError,
    NoProof,
    NoRanges,
    NoSource,
    NotFound,
    SectorFSError,
    SourceFailed,
    Stale,
    StorageUnavailable,
    Unreachable,
    WrongBytes,
)
from sectorfs.index.catalog import Catalog, Entry
from sectorfs.index.content import facts_of
from sectorfs.index.protocol import SectorIndex
from sectorfs.stores.announcer import Announcer
from sectorfs.stores.answers import Version
from sectorfs.stores.bars import Bar
from sectorfs.stores.cache import CacheKeeper
from sectorfs.stores.cache_room import CacheRoom
from sectorfs.stores.carriers import PeerCarrier
from sectorfs.stores.copies import Copies
from sectorfs.stores.fetch_rules import is_streamed, may_fill
from sectorfs.stores.flights import Fetch, Flights
from sectorfs.stores.guesses import Guesses
from sectorfs.stores.learning import Learner, OnChange
from sectorfs.stores.local import LocalStore
from sectorfs.stores.manifest_store import ManifestStore
from sectorfs.stores.places import Places
from sectorfs.stores.prospects import Prospect
from sectorfs.stores.protocol import Checked, OpenFile, State, StreamFile
from sectorfs.stores.provers import Provers
from sectorfs.stores.ranking import Ranking
from sectorfs.stores.sessions import Surroundings, Wanted
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.streams import Streams
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, MemberFacts, SectorFile

log = logging.getLogger(__name__)

ROUNDS = 3
"""How often an open tries again when the copy is gone, or another content declared, meanwhile."""
LEARNED = 4096
"""Sector files whose facts are remembered until the Index tells them too."""
LEARN_SECONDS = 5.0
"""For so long what came may take to be in the catalog."""
LEARN_STEP = 0.02

Progress = Callable[[int], object]
"""Told how many bytes of a sector file are here."""


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
        patience: float,
        cutoff: float,
        own_urls: frozenset[str],
        fetch: FetchConfig,
        space: SpaceLedger | None = None,
        keeper: CacheKeeper | None = None,
        guesses: Guesses | None = None,
        on_change: OnChange = lambda changes: None,
        manifests: ManifestStore | None = None,
    ) -> None:
        self._catalog = catalog
        self._local = local
        self._peers = peers
        self._copies = copies
        self._policy = fetch.policy_of
        self._ranking = Ranking(catalog, local, peers, own_urls=own_urls, cutoff=cutoff)
        self._places = Places(parallel, patience=patience)
        self._learned: dict[SectorFile, Facts] = {}
        self._keeper = keeper
        self._provers = Provers(
            catalog,
            peers,
            self._places,
            manifests,
            storage=copies.storage,
            sources=self._peers_with,
            failed=self._ranking.failed,
        )
        room = CacheRoom(copies, local, space, keeper)
        guesses = guesses or Guesses(catalog, usual=0)
        self.learner = Learner(
            catalog=catalog,
            index=index,
            peers=peers,
            ranking=self._ranking,
            places=self._places,
            on_change=on_change,
        )
        """Finds out what other programs' nodes did not tell."""
        self._announcer = Announcer(
            nursery,
            index,
            copies,
            busy=self._is_arriving,
            current=self._facts,
            digest=self._provers.copy_digest,
        )
        self._flights = Flights(
            nursery=nursery,
            catalog=catalog,
            ranking=self._ranking,
            peers=peers,
            provers=self._provers,
            places=self._places,
            copies=copies,
            room=room,
            landed=self._landed,
            sector_size=guesses.sector_size,
        )
        self._streams = Streams(
            nursery,
            copies,
            Surroundings(
                carrier=self._carrier,
                sources=self._peers_with,
                sharing=self._peers_sharing,
                failed=self._ranking.failed,
                digested=self._provers.digested,
                prover=self._provers.of,
                keep=self._provers.keep,
                reserve=room.reserve,
                grow=room.grow,
                whole=self._landed,
            ),
        )

    # --- what the mount asks ---

    async def open(self, file: SectorFile, member: str | None = None) -> OpenFile | StreamFile:
        """Open the best copy that works; see `SectorStore.open`."""
        entry = self._catalog.entry(file)
        if entry is None:
            raise NotFound("no storage declares it", file, "see `sectorfs storage find`")
        if file.file_type.is_directory != (member is not None):
            raise NotFound("is a directory" if member is None else "is not a directory", file)
        if member is not None and entry.facts and entry.facts.member(member) is None:
            raise NotFound(f"has no file {member!r}", file)
        facts = entry.facts or self._learned.get(file)
        self._note_use(file, entry)
        streamed = self._streamed(file, member, facts)
        if streamed is not None and self._streams.is_open(streamed):
            return await self._streams.open(streamed)
        causes: list[SectorFSError] = []
        here, elsewhere = self._ranking.of(entry)
        for source in here:
            try:
                return await self._local.open_at(source.storage, file, member)
            except SectorFSError as exc:
                log.warning("%s: copy on storage %s cannot be read: %s", file, source.storage, exc)
                self._ranking.failed_here(source.storage, exc)
                causes.append(exc)
        if elsewhere:
            return await self._open_elsewhere(file, member, facts, causes)
        raise self._no_source(file, member, causes)

    async def learn(self, file: SectorFile) -> None:
        """Find out what a sector file is that nobody told of; see `SectorStore.learn`."""
        entry = self._catalog.entry(file)
        if entry is None or entry.facts is not None:
            return
        if file.file_type.is_directory:
            await self._learn_directory(file)
        elif not self._ranking.of(entry)[0] and not await self.learner.ask(file):
            flight = await self._flights.fly(file, None)
            if flight.causes is not None:
                raise self._no_source(file, None, flight.causes)
            if flight.source is not None and flight.facts is not None:
                self.learner.found(file, flight.source.storage, flight.facts)

    async def _learn_directory(self, file: SectorFile) -> None:
        """Fetch it: there is no other way to know the files in it."""
        known = self._learned.get(file)
        if known is not None and await self._is_here(file, known):
            self._announcer.add(file, known.bare)  # the Index may have been away the first time
        else:
            flight = await self._flights.fly(file, None)
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
        here, elsewhere = self._ranking.of(entry)
        for source in here:
            if source.storage != self._copies.storage:
                return "shared" if source.shared else "local"
        if here:
            return "cached"
        if self.is_busy(file) or self._copies.is_begun(file):
            return "partial"
        healthy = any(self._ranking.healthy(source.storage) for source in elsewhere)
        return "remote" if healthy else "unavailable"

    def is_streamed(self, file: SectorFile, member: str | None) -> bool:
        """Whether a file is read while it comes, where it is not here."""
        return self._streamed(file, member, self._facts(file)) is not None

    def present(self, file: SectorFile, member: str | None) -> int | None:
        """Bytes that are here of a file that is open or coming from elsewhere; None of others."""
        return self._streams.present(file, member)

    def checked(self, file: SectorFile, member: str | None) -> Checked:
        """What is known of whether the bytes that readers get are the right ones."""
        facts, state = self._facts(file), self.state(file)
        whole = facts.digest if facts is not None else b""
        digest = whole
        if whole and member is not None:
            digest = self._provers.known_digest(file, member, whole)
        if state in ("local", "shared"):
            return Checked("no", digest)
        held = self._catalog.declared(file, self._copies.storage) if state == "cached" else facts
        proved = bool(whole) and held is not None and held.digest == whole
        return Checked("blocks" if proved else "length", digest)

    # --- what operators ask ---

    def prospects(self, file: SectorFile) -> list[Prospect]:
        """Every copy, those that `open` would try first in front, and what speaks against it."""
        entry = self._catalog.entry(file)
        return self._ranking.prospects(entry, self._places.reason) if entry is not None else []

    def bars(self) -> list[Bar]:
        """The sources that gave wrong bytes, the last first."""
        return self._ranking.bars()

    async def fetch(self, file: SectorFile, *, progress: Progress | None = None) -> None:
        """Make a whole copy of a sector file, and wait for it; nothing to do where it is here."""
        entry = self._catalog.entry(file)
        if entry is None:
            raise NotFound("no storage declares it", file, "see `sectorfs storage find`")
        if self._ranking.of(entry)[0]:
            return
        facts = entry.facts or self._learned.get(file)
        if facts is None:
            await self._fetch_whole(file, None)
            return
        before = 0
        for one in facts.members if facts.members is not None else (_only(facts),):

            def tell(present: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + present)

            await self._fetch_one(file, one.name or None, facts, tell)
            tell(one.size)
            before += one.size

    def fetches(self) -> list[Fetch]:
        """Copies that are being made."""
        found = self._flights.fetches()
        for session in self._streams.filling():
            wanted, source = session.wanted, session.stream.source
            url = source.url if source is not None else ""
            found.append(Fetch(wanted.file, wanted.member, wanted.size, session.done, url))
        return found

    def let_go(self, file: SectorFile) -> None:
        """Forget what came of a file that only waits for its next reader."""
        self._streams.let_go(file)

    def is_busy(self, file: SectorFile) -> bool:
        """True while a file, or one of that directory, is coming or open from elsewhere."""
        return self._flights.has(file) or self._streams.has(file)

    async def _fetch_one(
        self,
        file: SectorFile,
        member: str | None,
        facts: Facts,
        progress: Callable[[int], object],
    ) -> None:
        copy = await self._open_copy(file, member, facts_of(facts, member))
        if copy is not None:
            copy.close()
            self._landed(file, facts)
            return
        streamed = self._streamed(file, member, facts)
        if streamed is not None:
            try:
                await self._streams.fetch(streamed, progress)
            except NoSource as exc:
                if not _only_whole(exc, member):
                    raise
            else:
                return
        await self._fetch_whole(file, member)

    async def _fetch_whole(self, file: SectorFile, member: str | None) -> None:
        flight = await self._flights.fly(file, member)
        if flight.causes is not None:
            raise self._no_source(file, member, flight.causes)

    def _note_use(self, file: SectorFile, entry: Entry) -> None:
        """What is in the cache path, whole or in part, is worth keeping while it is read."""
        storage = self._copies.storage
        held = any(one.storage == storage for one in entry.declarations)
        if self._keeper is not None and (held or self._copies.is_begun(file)):
            self._keeper.used(file)

    # --- what came ---

    async def settle(self) -> None:
        """Once the catalog is there: judge what an earlier run left in the cache path."""
        await self._copies.settle_leftovers(self._facts)
        for file in self._copies.begun():
            facts = self._facts(file)
            if facts is not None and file.file_type.is_directory:
                # Its last file may have come just before the end.
                self._announcer.add(file, facts.bare)

    def _landed(self, file: SectorFile, facts: Facts) -> None:
        """Remember what came until the catalog says it too, so that it is not fetched again."""
        self._learned.pop(file, None)
        while len(self._learned) >= LEARNED:
            del self._learned[next(iter(self._learned))]
        self._learned[file] = facts
        self._announcer.add(file, facts.bare)

    async def _is_here(self, file: SectorFile, facts: Facts) -> bool:
        """Whether a fetched directory still lies in the cache path."""
        return await self._copies.exists(file) or await self._copies.is_received(file, facts)

    def _is_arriving(self, file: SectorFile) -> bool:
        """Whether the end of something that comes will ask the announcer again."""
        return self._flights.has(file) or self._streams.is_filling(file)

    def _facts(self, file: SectorFile) -> Facts | None:
        entry = self._catalog.entry(file)
        return entry.facts if entry else None

    # --- what only peers hold ---

    async def _open_elsewhere(
        self,
        file: SectorFile,
        member: str | None,
        facts: Facts | None,
        causes: list[SectorFSError],
    ) -> OpenFile | StreamFile:
        for _ in range(ROUNDS):
            wanted, came = facts_of(facts, member), None
            streamed = self._streamed(file, member, facts)
            try:
                opened = await self._open_streamed(streamed) if streamed is not None else None
                if opened is None:
                    opened, came = await self._open_whole(file, member, wanted)
                if opened is not None:
                    return opened
            except (NoSource, Stale) as exc:
                if _may_have_changed(exc):
                    await self.learner.look_again(file)
                if facts_of(self._facts(file), member) in (wanted, None):
                    if isinstance(exc, Stale):
                        raise
                    raise self._no_source(file, member, [*causes, *exc.causes]) from exc
                # Replaced meanwhile, which is why: open what it is now.
            except (DiskError, StorageUnavailable) as exc:
                raise self._no_source(file, member, [*causes, exc]) from exc
            entry = self._catalog.entry(file)
            if entry is None:
                raise NotFound("no storage declares it any more", file)
            # Nodes of other programs never say size and time: then what came tells.
            facts = entry.facts or came
            if facts_of(facts, member) is None:
                raise NotFound(f"has no file {member!r}", file)
        causes.append(SourceFailed("its copy vanished as often as it was fetched", file))
        raise self._no_source(file, member, causes)

    async def _open_streamed(self, wanted: Wanted) -> OpenFile | StreamFile | None:
        """Open a large file, of which there may be a copy that was not told of yet.

        None when no source can give less than all of it.
        """
        file, member = wanted.file, wanted.member
        if member is not None or file in self._learned:
            try:
                copy = await self._open_copy(file, member, facts_of(wanted.facts, member))
                if copy is not None:
                    return copy
            except (DiskError, StorageUnavailable) as exc:
                log.debug("%s: no look for a copy: %s", wanted.name, exc)
        try:
            return await self._streams.open(wanted)
        except NoSource as exc:
            if _only_whole(exc, member):
                return None
            raise

    async def _open_whole(
        self, file: SectorFile, member: str | None, wanted: MemberFacts | None
    ) -> tuple[OpenFile | None, Facts | None]:
        """Open a whole copy, or fetch one to be opened next, and tell what came."""
        copy = await self._open_copy(file, member, wanted)
        if copy is not None:
            return copy, None
        flight = await self._flights.fly(file, member)
        if flight.causes is not None:
            # A directory may have come in part, and the part may be what was asked for.
            copy = await self._open_copy(file, member, wanted) if member else None
            if copy is None:
                raise NoSource("no source can give it", file, flight.causes)
        return copy, flight.facts

    async def _open_copy(
        self, file: SectorFile, member: str | None, wanted: MemberFacts | None
    ) -> OpenFile | None:
        if wanted is None:
            return None
        size, mtime_ns = wanted.size, wanted.mtime_ns
        return await self._copies.open(file, member, size=size, mtime_ns=mtime_ns)

    def _streamed(self, file: SectorFile, member: str | None, facts: Facts | None) -> Wanted | None:
        """What to open as a stream; None for what is fetched whole."""
        one, policy = facts_of(facts, member), self._policy(file.file_type)
        if facts is None or one is None or not is_streamed(policy, one.size):
            return None
        fills = may_fill(policy, member)
        return Wanted(file, member, one.size, one.mtime_ns, facts, fills)

    def _carrier(self, wanted: Wanted) -> PeerCarrier:
        file, member = wanted.file, wanted.member

        def declared(source: PeerSource) -> Version:
            told = facts_of(self._catalog.declared(file, source.storage), member)
            return Version(wanted.size, told.mtime_ns if told is not None else 0)

        return PeerCarrier(self._peers, self._places, self._copies.lane, file, member, declared)

    def _peers_with(self, file: SectorFile) -> Sequence[PeerSource]:
        entry = self._catalog.entry(file)
        return self._ranking.of(entry)[1] if entry is not None else ()

    def _peers_sharing(self, file: SectorFile) -> frozenset[PeerSource]:
        entry = self._catalog.entry(file)
        return self._ranking.sharing(entry) if entry is not None else frozenset()

    def _no_source(
        self, file: SectorFile, member: str | None, causes: Sequence[BaseException]
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


def _only(facts: Facts) -> MemberFacts:
    return MemberFacts("", facts.size, facts.mtime_ns)


def _only_whole(failure: NoSource, member: str | None) -> bool:
    """True when sources refused because they were asked for a part of what they have.

    Nodes of other programs do not know the single files of a directory.
    """
    usual = (NoRanges, NotFound) if member is not None else NoRanges
    return any(isinstance(cause, usual) or _without_manifest(cause) for cause in failure.causes)


def _without_manifest(cause: BaseException) -> bool:
    """True when nobody could prove a part, but the whole of it may turn out to be right."""
    return isinstance(cause, NoProof) and not all(
        isinstance(one, WrongBytes) for one in cause.causes
    )


def _may_have_changed(failure: NoSource | Stale) -> bool:
    """True when a source gave something else than was known of it."""
    causes = failure.causes if isinstance(failure, NoSource) else (failure,)
    return any(isinstance(cause, Stale | SourceFailed) for cause in causes)
