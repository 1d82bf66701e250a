"""Where the files of a storage that is to be emptied may go: a pure rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sectorfs.index.placement import accepts
from sectorfs.index.protocol import Declaration, StorageStatus
from sectorfs.types import SectorFile, StorageID


def targets(
    file: SectorFile,
    size: int,
    held: Mapping[StorageID, Declaration],
    statuses: Iterable[StorageStatus],
    *,
    source: StorageID,
    cutoff: float,
) -> list[StorageID]:
    """Healthy storages that may store a file and have room for it, best first.

    One that has a primary copy already needs no room, and comes first. The others go by
    available × weight, equals by ascending id.
    """
    fit = []
    for status in statuses:
        info = status.info
        if info.storage == source or not status.healthy(cutoff):
            continue
        known = held.get(info.storage)
        has = known is not None and known.primary
        if not accepts(info, file.file_type, path_type="storage", miner=file.sector.miner):
            continue
        if has or status.stat.available >= size:
            fit.append((not has, -status.stat.available * info.weight, info.storage))
    return [storage for _, _, storage in sorted(fit)]
