"""Fetching, evicting and pinning sector files on a node, and why one is read from where it is.

All of it is done by the node that runs: it alone knows what is open and what is coming. A fetch
ends when whoever asked for it leaves; what came of it stays, and the next one goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import msgspec
import trio

from sectorfs.errors import BadInput, NoSource, NotFound, SourceFailed
from sectorfs.fuse.handles import Handles
from sectorfs.index.catalog import Catalog, Entry
from sectorfs.index.content import facts_of
from sectorfs.index.feed import Feed
from sectorfs.node.why import Subject, WhyReport, why_report
from sectorfs.stores.cache import CacheKeeper
from sectorfs.stores.remote import RemoteStore
from sectorfs.types import (
    SectorFile,
    StorageID,
    parse_file_type,
    parse_member_name,
    parse_sector,
)
from sectorfs.wire.jsonrpc import Method

T = TypeVar("T")

FETCH_PATIENCE = 7 * 86400.0
"""Seconds a fetch may take: a sector being sealed has 450 GiB, and networks may be slow."""
EVICT_PATIENCE = 600.0
SEEN_SECONDS = 5.0
"""A verb waits so long for its effect to be seen in the catalog."""
HERE = ("local", "shared", "cached")


class FetchedReport(msgspec.Struct, kw_only=True):
    """A fetch that is done."""

    file_type: str
    sector: str
    size: int
    how: str
    """``fetched``, or ``was here``."""
    state: str


class ComingReport(msgspec.Struct, kw_only=True):
    """A fetch under way that somebody asked for."""

    file_type: str
    sector: str
    done: int
    size: int


class EvictedReport(msgspec.Struct, kw_only=True):
    """A copy that went."""

    file_type: str
    sector: str
    freed: int
    """Bytes on disk."""


class PinnedReport(msgspec.Struct, kw_only=True):
    """What is pinned now, or no longer."""

    file_type: str
    sector: str
    pinned: bool
    changed: bool
    state: str


class Caching(Protocol):
    """Verbs on the copies of a node."""

    async def fetch(self, file: SectorFile) -> FetchedReport:
        """Make a whole copy on this node; at once when the file is here in any way."""

    async def coming(self) -> list[ComingReport]:
        """Fetches under way, and how far they are."""

    async def evict(self, file: SectorFile) -> EvictedReport:
        """Remove the copy, and what came of one."""

    async def pin(self, file: SectorFile, *, pinned: bool) -> PinnedReport:
        """Keep a copy, be it here or yet to come, until it is unpinned."""

    async def why(self, file: SectorFile, member: str | None) -> WhyReport:
        """Where a file would be read from now, and why not from elsewhere."""


class LocalCaching:
    """The verbs, done here."""

    def __init__(
        self, *, catalog: Catalog, feed: Feed, store: RemoteStore, keeper: CacheKeeper
    ) -> None:
        self._catalog = catalog
        self._feed = feed
        self._store = store
        self._keeper = keeper
        self._coming: dict[object, ComingReport] = {}

    async def fetch(self, file: SectorFile) -> FetchedReport:
        """See `Caching.fetch`."""
        entry = self._require(file)
        size = entry.facts.size if entry.facts else 0
        here = self._store.state(file) in HERE
        if not here:
            await self._fetch(file, size)
            await self._seen(lambda: self._store.state(file) in HERE)
            found = self._catalog.entry(file)
            size = found.facts.size if found and found.facts else size
        self._keeper.used(file)
        return FetchedReport(
            **_names(file),
            size=size,
            how="was here" if here else "fetched",
            state=self._store.state(file),
        )

    async def _fetch(self, file: SectorFile, size: int) -> None:
        key = object()
        coming = self._coming[key] = ComingReport(**_names(file), done=0, size=size)

        def progress(done: int) -> None:
            coming.done = done

        try:
            await self._store.fetch(file, progress=progress)
        except NoSource as exc:  # which does not travel, for its causes do not
            raise SourceFailed(exc.what, exc.thing, exc.hint) from exc
        finally:
            del self._coming[key]

    async def coming(self) -> list[ComingReport]:
        """See `Caching.coming`."""
        return list(self._coming.values())

    async def evict(self, file: SectorFile) -> EvictedReport:
        """See `Caching.evict`; errors as `CacheKeeper.evict`."""
        freed = await self._keeper.evict(file)
        await self._seen(lambda: self._store.state(file) != "cached")
        return EvictedReport(**_names(file), freed=freed)

    async def pin(self, file: SectorFile, *, pinned: bool) -> PinnedReport:
        """See `Caching.pin`; `NotFound` for what nobody has."""
        if pinned:
            self._require(file)
        changed = await self._keeper.notes.pin(file, pinned=pinned)
        state = self._store.state(file)
        return PinnedReport(**_names(file), pinned=pinned, changed=changed, state=state)

    async def why(self, file: SectorFile, member: str | None) -> WhyReport:
        """See `Caching.why`."""
        facts = self._require(file).facts
        if facts is not None and member is not None and facts.member(member) is None:
            raise NotFound(f"has no file {member!r}", file)
        store = self._store
        subject = Subject(
            file=file,
            member=member,
            facts=facts_of(facts, member),
            state=store.state(file),
            streamed=store.is_streamed(file, member),
            present=store.present(file, member),
            pinned=self._keeper.is_pinned(file),
        )
        return why_report(subject, store.prospects(file), now=trio.current_time())

    def _require(self, file: SectorFile) -> Entry:
        entry = self._catalog.entry(file)
        if entry is None:
            raise NotFound("no storage declares it", file, "see `sectorfs storage find`")
        return entry

    async def _seen(self, condition: Callable[[], bool]) -> None:
        """Wait for the catalog, within reason."""
        with trio.move_on_after(SEEN_SECONDS):
            await self._feed.wait_until(lambda _: condition())


class MountReaders:
    """Who has copies open through the mount, if there is one; see `stores.cache.Readers`."""

    def __init__(
        self,
        storage: StorageID,
        handles: Callable[[], Handles | None],
        let_go: Callable[[SectorFile], object],
    ) -> None:
        """`let_go` ends what waits in the store for the next reader of a file."""
        self._storage = storage
        self._handles = handles
        self._let_go = let_go

    def in_hand(self) -> Mapping[SectorFile, bool]:
        """See `Readers.in_hand`."""
        handles = self._handles()
        return handles.in_hand(self._storage) if handles is not None else {}

    def let_go(self, file: SectorFile) -> bool:
        """See `Readers.let_go`."""
        self._let_go(file)
        handles = self._handles()
        return handles is None or handles.let_go(file, self._storage)


def _names(file: SectorFile) -> dict[str, str]:
    return {"file_type": file.file_type.dir_name, "sector": file.sector.name}


# Over RPC


def caching_methods(caching: LocalCaching) -> list[Method]:
    """The verbs for a `Dispatcher`."""

    async def fetch(file_type: str, sector: str) -> FetchedReport:
        return await caching.fetch(_file(file_type, sector))

    async def evict(file_type: str, sector: str) -> EvictedReport:
        return await caching.evict(_file(file_type, sector))

    async def pin(file_type: str, sector: str, pinned: bool) -> PinnedReport:
        return await caching.pin(_file(file_type, sector), pinned=pinned)

    async def why(file_type: str, sector: str, member: str | None) -> WhyReport:
        return await caching.why(_file(file_type, sector), _member(member))

    return [
        Method(
            name="Sectorfs.NodeFetch",
            permission="admin",
            params=(str, str),
            handler=fetch,
            waits=True,
        ),
        Method(name="Sectorfs.NodeComing", permission="read", handler=caching.coming),
        Method(name="Sectorfs.NodeEvict", permission="admin", params=(str, str), handler=evict),
        Method(name="Sectorfs.NodePin", permission="admin", params=(str, str, bool), handler=pin),
        Method(
            name="Sectorfs.NodeWhy", permission="read", params=(str, str, str | None), handler=why
        ),
    ]


def _file(file_type: str, sector: str) -> SectorFile:
    try:
        return SectorFile(parse_file_type(file_type), parse_sector(sector))
    except ValueError as exc:
        raise BadInput(str(exc), f"{file_type}/{sector}"[:200]) from exc


def _member(name: str | None) -> str | None:
    try:
        return parse_member_name(name) if name is not None else None
    except ValueError as exc:
        raise BadInput(str(exc), str(name)[:200]) from exc


class Call(Protocol):
    """Asks a method of a running node."""

    async def __call__(
        self, method: str, *params: object, result: type[T], patience: float = 0.0
    ) -> T:
        """The result, or the error the node answered with."""


class CachingClient:
    """The verbs of `Caching`, asked of a running node."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def fetch(self, file: SectorFile) -> FetchedReport:
        """See `Caching.fetch`."""
        return await self._call(
            "Sectorfs.NodeFetch",
            *_names(file).values(),
            result=FetchedReport,
            patience=FETCH_PATIENCE,
        )

    async def coming(self) -> list[ComingReport]:
        """See `Caching.coming`."""
        return await self._call("Sectorfs.NodeComing", result=list[ComingReport])

    async def evict(self, file: SectorFile) -> EvictedReport:
        """See `Caching.evict`."""
        return await self._call(
            "Sectorfs.NodeEvict",
            *_names(file).values(),
            result=EvictedReport,
            patience=EVICT_PATIENCE,
        )

    async def pin(self, file: SectorFile, *, pinned: bool) -> PinnedReport:
        """See `Caching.pin`."""
        return await self._call(
            "Sectorfs.NodePin", *_names(file).values(), pinned, result=PinnedReport
        )

    async def why(self, file: SectorFile, member: str | None) -> WhyReport:
        """See `Caching.why`."""
        return await self._call(
            "Sectorfs.NodeWhy", *_names(file).values(), member, result=WhyReport
        )
