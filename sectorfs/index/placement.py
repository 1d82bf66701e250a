"""Where sector files may be placed, and the rows of `find`: pure rules.

Type filters are judged on the raw lists, where names that are no type count as entries that match
nothing: an allow list of typing errors denies everything instead of allowing everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sectorfs.index.protocol import Declaration, FoundStorage, StorageInfo, StorageStatus
from sectorfs.types import FileType, SectorID


def allows_type(info: StorageInfo, file_type: FileType) -> bool:
    """Whether the type filter of a storage lets new files of a type be placed there."""
    name = file_type.dir_name
    if info.allow_types and name not in info.allow_types:
        return False
    return name not in info.deny_types


def may_fetch(status: StorageStatus, types: Sequence[FileType], *, cutoff: float) -> bool:
    """Whether a storage may be chosen to fetch at least one of the types to."""
    return (
        status.info.can_seal
        and status.healthy(cutoff)
        and any(allows_type(status.info, file_type) for file_type in types)
    )


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


def fetchers(
    sector: SectorID,
    types: Sequence[FileType],
    others: Iterable[StorageStatus],
    *,
    cutoff: float,
) -> list[FoundStorage]:
    """Storages without the sector that may fetch it, by ascending id, with weight 0."""
    return [
        FoundStorage(
            info=status.info,
            urls=sector_urls(status.info, sector, types),
            weight=0,
            primary=False,
        )
        for status in sorted(others, key=lambda one: one.info.storage)
        if may_fetch(status, types, cutoff=cutoff)
    ]


def sector_urls(info: StorageInfo, sector: SectorID, types: Sequence[FileType]) -> tuple[str, ...]:
    """``<base>/<type>/<sector>`` for every base URL and type."""
    return tuple(
        f"{base.rstrip('/')}/{file_type.dir_name}/{sector.name}"
        for base in info.urls
        for file_type in types
    )
