"""Where sector files may be placed, and the rows of `find`: pure rules.

Filters are judged on the raw lists, where entries that name no type or no miner match nothing: an
allow list of typing errors denies everything instead of allowing everything, and one bad address
never fails the query of others. Filters rule new placement only; what is there stays readable.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from sectorfs.index.checks import check_number
from sectorfs.index.protocol import (
    Declaration,
    FoundStorage,
    PathType,
    StorageInfo,
    StorageStatus,
)
from sectorfs.types import MAX_NUMBER, FileType, SectorID, parse_file_type

# Tenths of the sector size. A cache being sealed holds 11 layers and the trees.
_SEALING = {
    FileType.UNSEALED: 10,
    FileType.SEALED: 10,
    FileType.CACHE: 141,
    FileType.UPDATE: 10,
    FileType.UPDATE_CACHE: 21,
    FileType.PIECE: 10,
    FileType.KEY: 111,
}
_FINALIZED = {**_SEALING, FileType.CACHE: 1, FileType.UPDATE_CACHE: 1, FileType.KEY: 10}
OVERHEAD: Mapping[PathType, Mapping[FileType, int]] = {"sealing": _SEALING, "storage": _FINALIZED}
"""Room that a file of each type may come to need, in tenths of the sector size."""

_MINER = re.compile(r"[tf]0([0-9]{1,19})", re.ASCII)


# Space


def tenths(count: int, sector_size: int) -> int:
    """`count` tenths of a sector size, rounded down."""
    return count * sector_size // 10


def space_needed(types: Iterable[FileType], sector_size: int, *, path_type: PathType) -> int:
    """Bytes to have free for new files of some types; `BadInput` beyond 63 bits."""
    check_number(sector_size, "sector size", "placement")
    table = OVERHEAD[path_type]
    need = sum(tenths(table[file_type], sector_size) for file_type in types)
    check_number(need, "the space needed", f"sector size {sector_size}")
    return need


# Filters


def allows_type(info: StorageInfo, file_type: FileType) -> bool:
    """Whether the type filter of a storage lets new files of a type be placed there."""
    name = file_type.dir_name
    if info.allow_types and name not in info.allow_types:
        return False
    return name not in info.deny_types


def parse_miner(address: str) -> int:
    """The actor id of an address such as ``t01000`` or ``f01000``; `ValueError` for any other."""
    match = _MINER.fullmatch(address)
    if match is None or int(match[1]) > MAX_NUMBER:
        raise ValueError(f"not a miner's address: {address[:80]!r}")
    return int(match[1])


def allows_miner(info: StorageInfo, miner: int) -> bool:
    """Whether the miner filter of a storage lets a miner's new files be placed there.

    Miner 0 stands for pieces, which belong to no miner: they pass every miner filter, here and at
    the storage, so that both always agree. ``DenyTypes`` keeps pieces away.
    """
    if miner == 0:
        return True
    if info.allow_miners and miner not in _miners(info.allow_miners):
        return False
    return miner not in _miners(info.deny_miners)


def _miners(addresses: Iterable[str]) -> Iterator[int]:
    for address in addresses:
        try:
            yield parse_miner(address)
        except ValueError:
            continue  # `odd_filters` tells of it


def odd_filters(info: StorageInfo) -> tuple[str, ...]:
    """Entries of a storage's filters that name no file type or miner, to warn of."""
    odd = []
    for field, parse in (
        ("allow_types", parse_file_type),
        ("deny_types", parse_file_type),
        ("allow_miners", parse_miner),
        ("deny_miners", parse_miner),
    ):
        for entry in getattr(info, field):
            try:
                parse(entry)
            except ValueError:
                odd.append(f"{field} {entry[:80]!r}")
    return tuple(odd)


def fits(info: StorageInfo, path_type: PathType) -> bool:
    """Whether a storage serves a purpose at all."""
    return info.can_seal if path_type == "sealing" else info.can_store


def accepts(info: StorageInfo, file_type: FileType, *, path_type: PathType, miner: int) -> bool:
    """Whether a new file may be placed on a storage, room and health aside."""
    return fits(info, path_type) and allows_type(info, file_type) and allows_miner(info, miner)


# Allocation


def best_alloc(
    statuses: Iterable[StorageStatus],
    types: Sequence[FileType],
    sector_size: int,
    *,
    path_type: PathType,
    miner: int,
    cutoff: float,
) -> list[StorageInfo]:
    """Storages with room for all the types, by available × weight, best first.

    Equals go by available bytes, then by ascending id: every node must choose alike.
    """
    need = space_needed(types, sector_size, path_type=path_type)
    good = [
        status
        for status in statuses
        if fits(status.info, path_type)
        and status.stat.available >= need
        and status.healthy(cutoff)
        and allows_miner(status.info, miner)
    ]
    good.sort(key=_allocation_order)
    return [status.info for status in good]


def _allocation_order(status: StorageStatus) -> tuple[int, int, str]:
    available = status.stat.available
    return -available * status.info.weight, -available, status.info.storage


# Find


def may_fetch(
    status: StorageStatus,
    types: Sequence[FileType],
    *,
    cutoff: float,
    need: int = 0,
    miner: int = 0,
    groups: Collection[str] | None = None,
) -> bool:
    """Whether a storage may be chosen to fetch at least one of the types to.

    `need` is the room for all of them, `groups` what `fetch_groups` says of the holders.
    """
    return (
        status.info.can_seal
        and status.stat.available >= need
        and status.healthy(cutoff)
        and any(allows_type(status.info, file_type) for file_type in types)
        and allows_miner(status.info, miner)
        and (groups is None or not set(groups).isdisjoint(status.info.groups))
    )


def fetch_groups(holders: Iterable[StorageInfo]) -> frozenset[str] | None:
    """The groups that may pull a sector from its holders; None when everybody may.

    One holder open to all suffices. Without any holder nobody may: there is nothing to pull.
    """
    groups: set[str] = set()
    for info in holders:
        if not info.allow_to:
            return None
        groups.update(info.allow_to)
    return frozenset(groups)


def found(
    sector: SectorID, held: Sequence[Declaration], statuses: Iterable[StorageStatus]
) -> list[FoundStorage]:
    """Holders of a sector by ascending storage id; declarations of unknown storages are left out.

    A mask of several types has no directory name, so every base URL yields one URL per held type.
    """
    by_storage: dict[str, list[Declaration]] = {}
    for declaration in held:
        by_storage.setdefault(declaration.storage, []).append(declaration)
    rows = []
    for status in sorted(statuses, key=lambda one: one.info.storage):
        declarations = by_storage.get(status.info.storage)
        if declarations:
            types = sorted(one.file.file_type for one in declarations)
            rows.append(
                FoundStorage(
                    info=status.info,
                    urls=sector_urls(status.info, sector, types),
                    weight=status.info.weight * len(types),
                    primary=any(one.primary for one in declarations),
                )
            )
    return rows


def without_caches(rows: Sequence[FoundStorage]) -> list[FoundStorage]:
    """The holders of one type that another program should know of.

    Its nodes ask the lightest storage first, and delete what they move only where they got it: from
    a cached copy they would leave the primary one behind.
    """
    if not any(row.primary for row in rows):
        return list(rows)
    return [row for row in rows if row.primary or row.info.can_seal or row.info.can_store]


def fetchers(
    sector: SectorID,
    types: Sequence[FileType],
    others: Iterable[StorageStatus],
    *,
    cutoff: float,
    sector_size: int,
    groups: Collection[str] | None,
) -> list[FoundStorage]:
    """Storages without the sector that may fetch it, by ascending id, with weight 0."""
    need = space_needed(types, sector_size, path_type="sealing")
    return [
        FoundStorage(
            info=status.info,
            urls=sector_urls(status.info, sector, types),
            weight=0,
            primary=False,
        )
        for status in sorted(others, key=lambda one: one.info.storage)
        if may_fetch(status, types, cutoff=cutoff, need=need, miner=sector.miner, groups=groups)
    ]


def sector_urls(info: StorageInfo, sector: SectorID, types: Sequence[FileType]) -> tuple[str, ...]:
    """``<base>/<type>/<sector>`` for every base URL and type."""
    return tuple(
        f"{base.rstrip('/')}/{file_type.dir_name}/{sector.name}"
        for base in info.urls
        for file_type in types
    )
