"""What an Index is: one truth about which storage holds which sector file, and how to reach it.

`SectorIndex` is implemented by `index.sqlite` (embedded) and `index.rpc` (another node's, over
JSON-RPC); one contract suite runs over all of them. Rules every implementation keeps:

* a declaration is visible to `find` before `declare` returns, and survives a power cut;
* *primary* is only ever upgraded by `declare`; facts that are sent replace those known, but a
  digest is kept while facts come that are the same without one;
* attaching again merges URLs and replaces every other field;
* every change gets a sequence number; `changes` names what is true *now* about each thing that
  changed, so applying a change twice, or late, does no harm;
* a lock belongs to a lease: it ends when its holder releases it, or has not renewed it for as long
  as it asked, measured by the Index's own monotonic clock, never by anybody's time of day.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from sectorfs.index.packed import Pack
from sectorfs.types import Facts, SectorFile, SectorID, StorageID

PathType = Literal["sealing", "storage"]
"""What a path is wanted for: the scratch of sealing, or finished sectors."""


class StorageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A storage path as its ``sectorstore.json`` describes it, and where it can be reached."""

    storage: StorageID
    urls: tuple[str, ...] = ()
    """Base URLs of the nodes that serve it, for example ``http://10.0.0.5:8480/remote``."""
    weight: int = 10
    max_storage: int = 0
    """Bytes that may be used; 0 means no limit."""
    can_seal: bool = False
    can_store: bool = False
    groups: tuple[str, ...] = ()
    allow_to: tuple[str, ...] = ()
    allow_types: tuple[str, ...] = ()
    deny_types: tuple[str, ...] = ()
    allow_miners: tuple[str, ...] = ()
    deny_miners: tuple[str, ...] = ()


class FsStat(msgspec.Struct, frozen=True, kw_only=True):
    """Space of a storage path in bytes."""

    capacity: int = 0
    available: int = 0
    """What the storage will still accept."""
    fs_available: int = 0
    """Raw free space of the file system."""
    reserved: int = 0
    max: int = 0
    used: int = 0


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """One heartbeat of a storage path."""

    stat: FsStat
    error: str = ""
    """Why it is unhealthy; empty when it is well. Kept by the Index and shown to operators."""


class StorageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the Index knows of a storage."""

    info: StorageInfo
    stat: FsStat
    error: str
    last_heartbeat_ns: int
    """Time of the last heartbeat, by the Index's clock (Unix, nanoseconds)."""
    heartbeat_age: float
    """Seconds since then when this was read, so that clocks of nodes need not agree."""

    def healthy(self, cutoff: float) -> bool:
        """No error, and a heartbeat younger than `cutoff` seconds."""
        return not self.error and self.heartbeat_age <= cutoff


class Declaration(msgspec.Struct, frozen=True, gc=False):
    """A storage holds a sector file."""

    file: SectorFile
    storage: StorageID
    primary: bool
    """This copy is authoritative; False for fetched copies."""
    facts: Facts | None = None
    """None when the declaring node did not say (lotus and Curio nodes do not)."""

    @property
    def key(self) -> LocationKey:
        """Identity of the declaration."""
        return LocationKey(self.file, self.storage)


class LocationKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """(sector file, storage): the key of a declaration, and the order snapshots are paged in."""

    file: SectorFile
    storage: StorageID


class FoundStorage(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `find`: a storage that holds (or, with `allow_fetch`, may fetch) a sector."""

    info: StorageInfo
    """`urls` are the base URLs."""
    urls: tuple[str, ...]
    """URLs of the sector itself: ``<base>/<types>/<sector>``."""
    weight: int
    """The storage's weight times the number of matching types; 0 for one that only may fetch."""
    primary: bool


class SnapshotPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of everything, in key order."""

    epoch: str
    seq: int
    """Sequence number this page is true at. Follow changes from the *first* page's number."""
    storages: tuple[StorageStatus, ...]
    """All storages; on the first page only."""
    declarations: tuple[Declaration, ...]
    after: LocationKey | None
    """Ask for the next page with this key; None on the last."""


class PackedPage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of everything in columns; all declarations of a sector file are in one page."""

    epoch: str
    seq: int
    """As of a `SnapshotPage`."""
    storages: tuple[StorageStatus, ...]
    """All storages; on the first page only."""
    pack: Pack
    after: SectorFile | None
    """The last sector file of this page: ask for the next page with it; None on the last."""


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """What changed since a sequence number: the present state of each thing that changed."""

    epoch: str
    seq: int
    reload: bool = False
    """The epoch is another one, or the asked number was pruned: take a new snapshot."""
    storages: tuple[StorageStatus, ...] = ()
    detached: tuple[StorageID, ...] = ()
    """Storages that are gone, and with them all their declarations."""
    declared: tuple[Declaration, ...] = ()
    dropped: tuple[LocationKey, ...] = ()


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """What is locked: types of one sector, as masks, declared or not."""

    sector: SectorID
    read: int = 0
    write: int = 0


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A lock with a holder and an end."""

    token: str
    """Chosen at random by who asks, and known to nobody else: a question whose answer was lost is
    asked again, or taken back, by the same token."""
    lock: Lock
    owner: str
    """Who: shown to operators."""
    reason: str
    """Why: shown to operators."""
    seconds: float
    """It lasts so long from the grant and from every renewal."""


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A lease as others see it: without its token."""

    lock: Lock
    owner: str
    reason: str
    since_ns: int
    """When it was granted or began to wait, by the Index's clock (Unix, nanoseconds)."""
    expires_in: float | None
    """Seconds until it ends unless it is renewed; None while it waits to be granted."""


class SectorLocks(Protocol):
    """Locks of sectors.

    Requests that wait are granted in their order, as far as they exclude each other, so that
    writers do not starve; one that does not wait is granted beside whatever is held.
    """

    async def lock(self, lease: Lease, *, wait: float = 0) -> bool:
        """Grant a lock, waiting up to `wait` seconds for others; False when it is not granted.

        Asked again with the same token, one that waited keeps its place for a few seconds, and
        one that was granted is renewed. `LeaseLost` when it is released while it waits.
        """

    async def renew(self, token: str) -> None:
        """Let a lease last anew; `LeaseLost` when it has ended."""

    async def release(self, token: str) -> None:
        """End a lease, or the wait for it; one that has ended, or never was, is fine."""

    async def leases(self) -> list[LeaseStatus]:
        """Everything that is locked, then what waits, each by sector."""


class SectorIndex(SectorLocks, Protocol):
    """The Index. Unknown storages raise `NotFound`, a lost connection `Unreachable`."""

    async def attach(self, info: StorageInfo, stat: FsStat) -> None:
        """Make a storage known, or merge `info.urls` and update its other fields."""

    async def detach(self, storage: StorageID, url: str) -> None:
        """Forget one URL of a storage; with its last URL, the storage and its declarations."""

    async def info(self, storage: StorageID) -> StorageInfo:
        """What was attached."""

    async def storages(self) -> list[StorageStatus]:
        """Every storage by ascending id."""

    async def report_health(self, storage: StorageID, report: HealthReport) -> None:
        """Store a heartbeat: space, error, time."""

    async def declare(self, declarations: Sequence[Declaration]) -> None:
        """Declare a batch, all or nothing."""

    async def tell(self, found: Sequence[Declaration]) -> None:
        """Set the facts of declarations there are: those that others found out of a file.

        Nobody is made a holder, or primary, by it: what is not declared is passed over, and so is
        a digest of other facts than are declared by now. `Unsupported` by an older Index.
        """

    async def drop(self, keys: Sequence[LocationKey]) -> None:
        """Drop declarations; one that does not exist is fine."""

    async def find(
        self, sector: SectorID, mask: int, *, sector_size: int = 0, allow_fetch: bool = False
    ) -> list[FoundStorage]:
        """Storages that hold any of the types in `mask`."""

    async def best_alloc(
        self, mask: int, sector_size: int, *, path_type: PathType, miner: int
    ) -> list[StorageInfo]:
        """Storages with room for new files of all types in `mask`, best first; none is no error.

        Type filters and groups are not applied here: the caller may place types apart.
        """

    async def sector(self, sector: SectorID) -> list[Declaration]:
        """Every declaration of a sector in key order."""

    async def declarations(
        self, storage: StorageID, *, after: SectorFile | None = None, limit: int = 1000
    ) -> list[Declaration]:
        """Declarations of one storage by ascending sector file, from past `after` on."""

    async def snapshot(
        self, *, after: LocationKey | None = None, limit: int = 1000
    ) -> SnapshotPage:
        """A page of the whole Index."""

    async def packed(self, *, after: SectorFile | None = None, limit: int = 1000) -> PackedPage:
        """A page of the whole Index, read and made without the loop being held."""

    async def changes(self, epoch: str, seq: int, *, wait: float = 0, limit: int = 1000) -> Changes:
        """Changes after `seq`; waits up to `wait` seconds while there are none."""
