"""What operators are shown, as JSON and in tables: storages, a sector's files, the node.

Field names and units are the public ones (sizes in bytes, times RFC 3339 in UTC); the builders are
pure functions over values of the Index, so that a running node and a repo without one answer alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType

import msgspec

from sectorfs.index import content
from sectorfs.index.locks import Counts
from sectorfs.index.protocol import Declaration, LeaseStatus, StorageStatus
from sectorfs.stores.verdicts import Told
from sectorfs.types import FileType, SectorFile, SectorID, StorageID


class StorageReport(msgspec.Struct, kw_only=True):
    """One storage, as `storage list` shows it."""

    storage: str
    path: str | None
    """Directory on this node; None when it is attached elsewhere only."""
    urls: list[str]
    weight: int
    can_seal: bool
    can_store: bool
    max_storage: int
    groups: list[str]
    allow_to: list[str]
    allow_types: list[str]
    deny_types: list[str]
    allow_miners: list[str]
    deny_miners: list[str]
    capacity: int
    available: int
    fs_available: int
    reserved: int
    used: int
    healthy: bool
    error: str | None
    last_heartbeat: str
    files: dict[str, int]
    """Declared sector files by type."""
    nodes: dict[str, str] = {}
    """What kind of node answers at those of the URLs that were asked for something."""


class LocationReport(msgspec.Struct, kw_only=True):
    """One copy of a sector file."""

    storage: str
    primary: bool
    urls: list[str]
    path: str | None
    healthy: bool
    digest: str | None
    """Of this copy, as far as its node told it."""


class FileReport(msgspec.Struct, kw_only=True):
    """One sector file and where it is."""

    file_type: str
    size: int | None
    mtime_ns: int | None
    state: str
    locations: list[LocationReport]


class SectorReport(msgspec.Struct, kw_only=True):
    """A sector, as `storage find` shows it."""

    sector: str
    files: list[FileReport]


class LeaseReport(msgspec.Struct, kw_only=True):
    """One holder of a lock, or one who waits for it."""

    owner: str
    reason: str
    read: list[str]
    write: list[str]
    since: str
    expires_in: float | None
    """Seconds until it ends unless it is renewed; None while it waits."""


class LockReport(msgspec.Struct, kw_only=True):
    """What is locked of a sector, as `storage locks` shows it."""

    sector: str
    read: dict[str, int]
    """Readers by type."""
    write: list[str]
    leases: list[LeaseReport]
    waiting: list[LeaseReport]


class MountReport(msgspec.Struct, kw_only=True):
    """The mount of a node."""

    path: str
    mode: str
    passthrough: str
    """``on`` when the kernel reads large local files past the daemon, or ``off``."""
    passthrough_reason: str | None = None
    """Why it is off."""


class IndexReport(msgspec.Struct, kw_only=True):
    """How current this node's view of the Index is."""

    url: str
    connected: bool
    seq: int
    age: float | None
    """Seconds since the Index last answered; None before the first time."""


class FilesReport(msgspec.Struct, kw_only=True):
    """Open files of the mount by the way they are read."""

    open: int
    passthrough: int
    daemon: int
    stream: int
    kept: int = 0
    """Files that nobody has open, kept open for the next reader."""


class FetchReport(msgspec.Struct, kw_only=True):
    """A fetch under way."""

    sector: str
    file_type: str
    member: str | None
    done: int
    size: int
    source: str


class ScanReport(msgspec.Struct, kw_only=True):
    """A scan of a storage path under way."""

    path: str
    done: int
    """Entries looked at."""


class HashedFileReport(msgspec.Struct, kw_only=True):
    """A file that is being hashed."""

    sector: str
    file_type: str
    member: str | None
    done: int
    size: int


class HashReport(msgspec.Struct, kw_only=True):
    """The hashing of a node, in `status` and from `hash`."""

    state: str
    """``hashing``, ``waiting`` (for readers, a disk or the Index), ``idle`` (nothing is left),
    ``paused``, or ``stopped`` where no node runs."""
    paused: bool
    left_files: int = 0
    """Sector files that have no manifest yet."""
    left_bytes: int = 0
    rate: int = 0
    """Bytes a second of late."""
    seconds_left: int | None = None
    """At this rate; None while nothing moves."""
    current: list[HashedFileReport] = []
    problems: list[str] = []


class VerifyingReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run of the scrub under way, of a command or by schedule."""

    what: str
    """A sector file, or paths."""
    file: str
    """The sector file that is looked at."""
    files: int
    """Sector files looked at."""
    done: int
    """Bytes."""
    size: int | None
    """Bytes in all; None while that is counted."""
    rate: float
    """Bytes a second."""
    left: float | None
    """Seconds."""
    found: int
    """Files that are not well."""


class ScrubReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the files of a storage path of this node, by its scrub."""

    storage: str
    path: str
    begun: str | None
    """When the pass began that goes on, or can be gone on with."""
    files: int
    """Sector files of it."""
    bytes: int
    stopped: str | None
    """Why it does not go on."""
    ended: str | None
    """When the last whole pass did."""
    states: dict[str, int]
    """Regular files by what that pass found."""
    findings: list[Told]
    """Files that were not well when they were looked at last; the first few."""
    more: int
    """How many more there are."""


class StatusReport(msgspec.Struct, kw_only=True):
    """A node, as `status` shows it."""

    running: bool
    version: str
    pid: int
    repo: str
    api: str
    mount: MountReport | None
    index: IndexReport
    storages: list[StorageReport]
    files: FilesReport
    fetches: list[FetchReport]
    scans: list[ScanReport]
    verifying: list[VerifyingReport]
    scrubs: list[ScrubReport]
    hashing: HashReport
    problems: list[str]
    """What an operator should look at, one line each."""


def storage_report(
    status: StorageStatus,
    *,
    path: str | None,
    cutoff: float,
    files: Mapping[FileType, int],
    nodes: Mapping[str, str] = MappingProxyType({}),
) -> StorageReport:
    """What is known of one storage."""
    info, stat = status.info, status.stat
    error = status.error or None
    if error is None and not status.healthy(cutoff):
        error = f"no heartbeat for {status.heartbeat_age:.0f} s"
    return StorageReport(
        storage=info.storage,
        path=path,
        urls=list(info.urls),
        weight=info.weight,
        can_seal=info.can_seal,
        can_store=info.can_store,
        max_storage=info.max_storage,
        groups=list(info.groups),
        allow_to=list(info.allow_to),
        allow_types=list(info.allow_types),
        deny_types=list(info.deny_types),
        allow_miners=list(info.allow_miners),
        deny_miners=list(info.deny_miners),
        capacity=stat.capacity,
        available=stat.available,
        fs_available=stat.fs_available,
        reserved=stat.reserved,
        used=stat.used,
        healthy=error is None,
        error=error,
        last_heartbeat=rfc3339(status.last_heartbeat_ns),
        files={file_type.dir_name: count for file_type, count in sorted(files.items()) if count},
        nodes=dict(nodes),
    )


def sector_report(
    sector: SectorID,
    declarations: Sequence[Declaration],
    *,
    storages: Mapping[StorageID, StorageStatus],
    cutoff: float,
    path_of: Callable[[SectorFile, StorageID], str | None],
    state: Callable[[SectorFile], str] | None,
) -> SectorReport:
    """Every file of a sector; `state` is None where no node runs."""
    files = []
    for file_type in FileType:
        held = [item for item in declarations if item.file.file_type is file_type]
        if not held:
            continue
        facts = content.present_facts(held)
        locations = [
            LocationReport(
                storage=item.storage,
                primary=item.primary,
                urls=list(storages[item.storage].info.urls) if item.storage in storages else [],
                path=path_of(item.file, item.storage),
                healthy=item.storage in storages and storages[item.storage].healthy(cutoff),
                digest=item.facts.digest.hex() or None if item.facts else None,
            )
            for item in held
        ]
        files.append(
            FileReport(
                file_type=file_type.dir_name,
                size=facts.size if facts else None,
                mtime_ns=facts.mtime_ns if facts else None,
                state=state(held[0].file) if state else _state_at_rest(locations),
                locations=locations,
            )
        )
    return SectorReport(sector=sector.name, files=files)


def lock_reports(statuses: Iterable[LeaseStatus]) -> list[LockReport]:
    """What is locked, by sector; who waits is in order of arrival."""
    by_sector: dict[SectorID, list[LeaseStatus]] = {}
    for status in statuses:
        by_sector.setdefault(status.lock.sector, []).append(status)
    return [_lock_report(sector, found) for sector, found in sorted(by_sector.items())]


def _lock_report(sector: SectorID, statuses: Sequence[LeaseStatus]) -> LockReport:
    held = [status for status in statuses if status.expires_in is not None]
    counts = Counts.of(status.lock for status in held)
    return LockReport(
        sector=sector.name,
        read={one.dir_name: counts.readers[one.bit] for one in FileType if counts.readers[one.bit]},
        write=_names(counts.write),
        leases=[_lease_report(status) for status in held],
        waiting=[_lease_report(status) for status in statuses if status.expires_in is None],
    )


def _lease_report(status: LeaseStatus) -> LeaseReport:
    return LeaseReport(
        owner=status.owner,
        reason=status.reason,
        read=_names(status.lock.read),
        write=_names(status.lock.write),
        since=rfc3339(status.since_ns),
        expires_in=status.expires_in,
    )


def _names(mask: int) -> list[str]:
    return [one.dir_name for one in FileType if mask & one]


def _state_at_rest(locations: Iterable[LocationReport]) -> str:
    """The state of a file where no node runs: by what the Index last heard."""
    locations = list(locations)
    if any(location.path for location in locations):
        return "local"
    return "remote" if any(location.healthy for location in locations) else "unavailable"


def rfc3339(time_ns: int) -> str:
    """Unix nanoseconds as RFC 3339 in UTC with milliseconds."""
    moment = datetime.fromtimestamp(time_ns // 1_000_000 / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
