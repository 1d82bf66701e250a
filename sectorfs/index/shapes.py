"""JSON shapes of the Index's RPC, and their conversion to values and back.

Keys are CamelCase as lotus and Curio write them; an empty list is written as null, and null or a
missing key is read as empty; unknown keys are tolerated. Every ``to_…`` function is a door: what it
returns was checked, what it refuses is `BadInput`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from sectorfs.errors import BadInput
from sectorfs.index import checks
from sectorfs.index.protocol import (
    Changes,
    Declaration,
    FoundStorage,
    FsStat,
    HealthReport,
    LocationKey,
    PathType,
    SnapshotPage,
    StorageInfo,
    StorageStatus,
)
from sectorfs.types import (
    Facts,
    FileType,
    MemberFacts,
    SectorFile,
    SectorID,
    StorageID,
    parse_member_name,
    parse_storage_id,
)

Names = list[str] | None

_MUTE = "has failed, and does not say how"


class _Shape(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    pass


class SectorShape(_Shape, frozen=True):
    """``{"Miner": 1000, "Number": 7}``."""

    miner: int
    number: int


class StorageInfoShape(_Shape, frozen=True):
    """A storage as nodes attach it."""

    storage: str = msgspec.field(name="ID")
    urls: Names = msgspec.field(name="URLs", default=None)
    weight: int = 0
    max_storage: int = 0
    can_seal: bool = False
    can_store: bool = False
    groups: Names = None
    allow_to: Names = None
    allow_types: Names = None
    deny_types: Names = None
    allow_miners: Names = None
    deny_miners: Names = None


class FsStatShape(_Shape, frozen=True):
    """Space of a storage; old nodes send only the first, second and fourth key."""

    capacity: int = 0
    available: int = 0
    fs_available: int = msgspec.field(name="FSAvailable", default=0)
    reserved: int = 0
    max: int = 0
    used: int = 0


class HealthReportShape(_Shape, frozen=True):
    """One heartbeat."""

    stat: FsStatShape
    err: str | dict[str, object] | None = ""
    """The first nodes of lotus have an object without its text here."""


class DeclShape(_Shape, frozen=True):
    """A sector and the mask of the types a storage holds of it, flat."""

    miner: int
    number: int
    sector_file_type: int


class SectorStorageInfoShape(_Shape, frozen=True):
    """A row of ``StorageFindSector``."""

    storage: str = msgspec.field(name="ID")
    urls: Names = msgspec.field(name="URLs", default=None)
    base_urls: Names = msgspec.field(name="BaseURLs", default=None)
    weight: int = 0
    can_seal: bool = False
    can_store: bool = False
    primary: bool = False
    allow_types: Names = None
    deny_types: Names = None
    allow_miners: Names = None
    deny_miners: Names = None


class FoundShape(_Shape, frozen=True):
    """A row of ``Sectorfs.FindSector``: the same with the whole storage."""

    info: StorageInfoShape
    weight: int
    primary: bool
    urls: Names = msgspec.field(name="URLs", default=None)


class MemberShape(_Shape, frozen=True):
    """One file of a sector directory."""

    name: str
    size: int
    mtime_ns: int


class FactsShape(_Shape, frozen=True):
    """Facts; ``Files`` is null for a regular file, ``Digest`` hex or empty."""

    size: int
    mtime_ns: int
    files: list[MemberShape] | None = None
    digest: str | None = ""


class KeyShape(_Shape, frozen=True):
    """What names a declaration; in a request `file_type` may be a mask."""

    storage: str = msgspec.field(name="StorageID")
    sector: SectorShape = msgspec.field(name="SectorID")
    file_type: int


class DeclarationShape(_Shape, frozen=True):
    """A declaration; in a request `file_type` may be a mask."""

    storage: str = msgspec.field(name="StorageID")
    sector: SectorShape = msgspec.field(name="SectorID")
    file_type: int
    primary: bool = False
    facts: FactsShape | None = None


class FileShape(_Shape, frozen=True):
    """A sector file."""

    sector: SectorShape = msgspec.field(name="SectorID")
    file_type: int


class StatusShape(_Shape, frozen=True):
    """What the Index knows of a storage."""

    info: StorageInfoShape
    stat: FsStatShape
    err: str
    last_heartbeat_ns: int
    heartbeat_age: float


class SnapshotShape(_Shape, frozen=True):
    """A page of everything."""

    epoch: str
    seq: int
    storages: list[StatusShape] | None = None
    declarations: list[DeclarationShape] | None = None
    after: KeyShape | None = None


class ChangesShape(_Shape, frozen=True):
    """What changed."""

    epoch: str
    seq: int
    reload: bool = False
    storages: list[StatusShape] | None = None
    detached: Names = None
    declared: list[DeclarationShape] | None = None
    dropped: list[KeyShape] | None = None


def to_storage_id(text: str) -> StorageID:
    """A storage id; `BadInput` unless it is one."""
    try:
        return parse_storage_id(text)
    except ValueError as exc:
        raise BadInput(str(exc), "storage") from exc


def to_path_type(text: str) -> PathType:
    """``"sealing"`` or ``"storage"``; `BadInput` for anything else."""
    if text == "sealing":
        return "sealing"
    if text == "storage":
        return "storage"
    raise BadInput(f"unknown path type {text[:80]!r}", "path type", "sealing or storage")


def to_info(shape: StorageInfoShape) -> StorageInfo:
    """A checked storage."""
    info = StorageInfo(
        storage=to_storage_id(shape.storage),
        urls=tuple(shape.urls or ()),
        weight=shape.weight,
        max_storage=shape.max_storage,
        can_seal=shape.can_seal,
        can_store=shape.can_store,
        groups=tuple(shape.groups or ()),
        allow_to=tuple(shape.allow_to or ()),
        allow_types=tuple(shape.allow_types or ()),
        deny_types=tuple(shape.deny_types or ()),
        allow_miners=tuple(shape.allow_miners or ()),
        deny_miners=tuple(shape.deny_miners or ()),
    )
    checks.check_info(info)
    return info


def from_info(info: StorageInfo) -> StorageInfoShape:
    """The shape of a storage."""
    return StorageInfoShape(
        storage=info.storage,
        urls=list(info.urls) or None,
        weight=info.weight,
        max_storage=info.max_storage,
        can_seal=info.can_seal,
        can_store=info.can_store,
        groups=list(info.groups) or None,
        allow_to=list(info.allow_to) or None,
        allow_types=list(info.allow_types) or None,
        deny_types=list(info.deny_types) or None,
        allow_miners=list(info.allow_miners) or None,
        deny_miners=list(info.deny_miners) or None,
    )


def to_stat(shape: FsStatShape, thing: object) -> FsStat:
    """Checked space."""
    stat = FsStat(**msgspec.structs.asdict(shape))
    checks.check_stat(stat, thing)
    return stat


def from_stat(stat: FsStat) -> FsStatShape:
    """The shape of space."""
    return FsStatShape(**msgspec.structs.asdict(stat))


def to_report(shape: HealthReportShape, thing: object) -> HealthReport:
    """A checked heartbeat."""
    error = shape.err if isinstance(shape.err, str | None) else _MUTE
    return HealthReport(stat=to_stat(shape.stat, thing), error=error or "")


def to_sector(shape: SectorShape) -> SectorID:
    """A checked sector."""
    sector = SectorID(shape.miner, shape.number)
    checks.check_sector(sector)
    return sector


def from_sector(sector: SectorID) -> SectorShape:
    """The shape of a sector."""
    return SectorShape(miner=sector.miner, number=sector.number)


def to_file(shape: FileShape) -> SectorFile:
    """A checked sector file."""
    return SectorFile(single_type(shape.file_type), to_sector(shape.sector))


def from_file(file: SectorFile) -> FileShape:
    """The shape of a sector file."""
    return FileShape(sector=from_sector(file.sector), file_type=int(file.file_type))


def to_keys(shape: KeyShape) -> list[LocationKey]:
    """One key per type of the mask."""
    sector, storage = to_sector(shape.sector), to_storage_id(shape.storage)
    return [
        LocationKey(SectorFile(file_type, sector), storage)
        for file_type in checks.mask_types(shape.file_type)
    ]


def to_key(shape: KeyShape) -> LocationKey:
    """The key of one declaration."""
    file = SectorFile(single_type(shape.file_type), to_sector(shape.sector))
    return LocationKey(file, to_storage_id(shape.storage))


def from_key(key: LocationKey) -> KeyShape:
    """The shape of a key."""
    return KeyShape(
        storage=key.storage,
        sector=from_sector(key.file.sector),
        file_type=int(key.file.file_type),
    )


def to_declarations(shape: DeclarationShape) -> list[Declaration]:
    """One declaration per type of the mask; facts only make sense with a single type."""
    types = checks.mask_types(shape.file_type)
    if len(types) > 1 and shape.facts is not None:
        raise BadInput("facts sent for several types at once", "FileType", "send one type each")
    sector, storage = to_sector(shape.sector), to_storage_id(shape.storage)
    facts = None if shape.facts is None else _to_facts(shape.facts)
    declarations = [
        Declaration(SectorFile(file_type, sector), storage, shape.primary, facts)
        for file_type in types
    ]
    for declaration in declarations:
        checks.check_declaration(declaration)
    return declarations


def to_declaration(shape: DeclarationShape) -> Declaration:
    """One checked declaration."""
    single_type(shape.file_type)
    return to_declarations(shape)[0]


def from_declaration(declaration: Declaration) -> DeclarationShape:
    """The shape of a declaration."""
    facts = declaration.facts
    return DeclarationShape(
        storage=declaration.storage,
        sector=from_sector(declaration.file.sector),
        file_type=int(declaration.file.file_type),
        primary=declaration.primary,
        facts=None if facts is None else _from_facts(facts),
    )


def from_declarations(declarations: Sequence[Declaration]) -> list[DeclarationShape] | None:
    """The shapes of several declarations, null for none."""
    return [from_declaration(declaration) for declaration in declarations] or None


def _to_facts(shape: FactsShape) -> Facts:
    digest = to_digests(shape.digest or "", "Digest")
    if shape.files is None:
        return Facts(shape.size, shape.mtime_ns, None, digest)
    try:
        members = tuple(
            MemberFacts(sys.intern(parse_member_name(file.name)), file.size, file.mtime_ns)
            for file in shape.files
        )
    except ValueError as exc:
        raise BadInput(str(exc), "Files") from exc
    return Facts(shape.size, shape.mtime_ns, members, digest)


def to_digests(text: str, thing: object) -> bytes:
    """The bytes of a digest, or of several, in hex."""
    try:
        found = bytes.fromhex(text)
    except ValueError as exc:
        raise BadInput("not hex", thing) from exc
    if 2 * len(found) != len(text):  # blanks, which Python lets pass
        raise BadInput("not hex", thing)
    return found


def _from_facts(facts: Facts) -> FactsShape:
    files = None
    if facts.members is not None:
        files = [
            MemberShape(name=one.name, size=one.size, mtime_ns=one.mtime_ns)
            for one in facts.members
        ]
    return FactsShape(
        size=facts.size, mtime_ns=facts.mtime_ns, files=files, digest=facts.digest.hex()
    )


def single_type(value: int) -> FileType:
    """The type of a mask that has one; `BadInput` for others."""
    types = checks.mask_types(value)
    if len(types) != 1:
        raise BadInput(f"{value} is not a single file type", "FileType")
    return types[0]


def to_status(shape: StatusShape) -> StorageStatus:
    """A checked status."""
    info = to_info(shape.info)
    checks.check_number(shape.last_heartbeat_ns, "LastHeartbeatNs", info.storage)
    if not 0 <= shape.heartbeat_age < float("inf"):
        raise BadInput(f"HeartbeatAge {shape.heartbeat_age}", info.storage)
    return StorageStatus(
        info=info,
        stat=to_stat(shape.stat, info.storage),
        error=shape.err,
        last_heartbeat_ns=shape.last_heartbeat_ns,
        heartbeat_age=shape.heartbeat_age,
    )


def from_status(status: StorageStatus) -> StatusShape:
    """The shape of a status."""
    return StatusShape(
        info=from_info(status.info),
        stat=from_stat(status.stat),
        err=status.error,
        last_heartbeat_ns=status.last_heartbeat_ns,
        heartbeat_age=status.heartbeat_age,
    )


def to_found(shape: FoundShape) -> FoundStorage:
    """A checked row of find."""
    return FoundStorage(
        info=to_info(shape.info),
        urls=tuple(shape.urls or ()),
        weight=shape.weight,
        primary=shape.primary,
    )


def from_found(row: FoundStorage) -> FoundShape:
    """Our shape of a row of find."""
    return FoundShape(
        info=from_info(row.info),
        urls=list(row.urls) or None,
        weight=row.weight,
        primary=row.primary,
    )


def from_found_as_lotus(row: FoundStorage) -> SectorStorageInfoShape:
    """The reference's shape of a row of find."""
    info = from_info(row.info)
    return SectorStorageInfoShape(
        storage=info.storage,
        urls=list(row.urls) or None,
        base_urls=info.urls,
        weight=row.weight,
        can_seal=info.can_seal,
        can_store=info.can_store,
        primary=row.primary,
        allow_types=info.allow_types,
        deny_types=info.deny_types,
        allow_miners=info.allow_miners,
        deny_miners=info.deny_miners,
    )


def to_snapshot(shape: SnapshotShape) -> SnapshotPage:
    """A checked page."""
    checks.check_number(shape.seq, "Seq", "snapshot")
    return SnapshotPage(
        epoch=shape.epoch,
        seq=shape.seq,
        storages=tuple(to_status(one) for one in shape.storages or ()),
        declarations=tuple(to_declaration(one) for one in shape.declarations or ()),
        after=None if shape.after is None else to_key(shape.after),
    )


def from_snapshot(page: SnapshotPage) -> SnapshotShape:
    """The shape of a page."""
    return SnapshotShape(
        epoch=page.epoch,
        seq=page.seq,
        storages=[from_status(one) for one in page.storages] or None,
        declarations=from_declarations(page.declarations),
        after=None if page.after is None else from_key(page.after),
    )


def to_changes(shape: ChangesShape) -> Changes:
    """Checked changes."""
    checks.check_number(shape.seq, "Seq", "changes")
    return Changes(
        epoch=shape.epoch,
        seq=shape.seq,
        reload=shape.reload,
        storages=tuple(to_status(one) for one in shape.storages or ()),
        detached=tuple(to_storage_id(one) for one in shape.detached or ()),
        declared=tuple(to_declaration(one) for one in shape.declared or ()),
        dropped=tuple(to_key(one) for one in shape.dropped or ()),
    )


def from_changes(changes: Changes) -> ChangesShape:
    """The shape of changes."""
    return ChangesShape(
        epoch=changes.epoch,
        seq=changes.seq,
        reload=changes.reload,
        storages=[from_status(one) for one in changes.storages] or None,
        detached=list(changes.detached) or None,
        declared=from_declarations(changes.declared),
        dropped=[from_key(one) for one in changes.dropped] or None,
    )
