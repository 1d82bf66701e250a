"""How long a file probably is whose length nobody told: for listings, until somebody asked.

A miner's sectors are all of one size, which the chain fixes for good. So one known file of a miner
is enough for all others: of the same sector, or of a few that are looked at all over the miner's
range. Where nothing is known it is the size that the configuration names. A piece may have any
length, and is shown as empty.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import trio

from sectorfs.index.catalog import Catalog
from sectorfs.stores.expected import sector_size_among
from sectorfs.types import MAX_NUMBER, Facts, FileType, SectorFile, SectorID

SAMPLES = 64
"""Files of each type that are looked at for one miner."""
MAX_MINERS = 4096
"""Miners that are remembered."""
ASK_AGAIN = 5.0
"""Seconds for which a miner without any known file is not looked at again."""

_TELLING = (FileType.SEALED, FileType.UNSEALED, FileType.UPDATE, FileType.KEY, FileType.CACHE)


class Guesses:
    """The probable lengths of files."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        usual: int,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        """`usual` is the size of a sector of a miner of whom nothing is known."""
        self._catalog = catalog
        self._usual = usual
        self._now = now
        self._known: dict[int, int] = {}
        """The sector size of a miner: it never changes."""
        self._looked: dict[int, float] = {}
        """When miners without a known file were looked at."""

    def size(self, file: SectorFile) -> int:
        """Bytes that a file probably has; 0 for directories and pieces."""
        if file.file_type.is_directory or file.file_type is FileType.PIECE:
            return 0
        return self.sector_size(file.sector)

    def sector_size(self, sector: SectorID) -> int:
        """The size of a sector: what any file of its miner tells, else the usual one."""
        return self._told_size(sector) or self._usual

    def _told_size(self, sector: SectorID) -> int | None:
        known = self._known.get(sector.miner)
        if known is None and not self._is_fresh(sector.miner):
            known = self._of(sector) or self._sampled(sector.miner)
            _bound(self._known)
            _bound(self._looked)
            if known is None:
                self._looked[sector.miner] = self._now()
            else:
                self._known[sector.miner] = known
        return known

    def _is_fresh(self, miner: int) -> bool:
        looked = self._looked.get(miner)
        return looked is not None and self._now() - looked < ASK_AGAIN

    def _of(self, sector: SectorID) -> int | None:
        entries = ((one, self._catalog.entry(SectorFile(one, sector))) for one in _TELLING)
        told = {one: entry.facts for one, entry in entries if entry and entry.facts}
        return sector_size_among(told)

    def _sampled(self, miner: int) -> int | None:
        """By the first file that tells, of some that lie evenly among the miner's."""
        for file_type in _TELLING:
            names = self._catalog.sectors(file_type)
            start = bisect_left(names, SectorID(miner, 0))
            end = bisect_left(names, SectorID(miner, MAX_NUMBER))
            step = max(1, (end - start) // SAMPLES)
            for position in range(start, end, step):
                entry = self._catalog.entry(SectorFile(file_type, names[position]))
                told: dict[FileType, Facts] = {}
                if entry is not None and entry.facts is not None:
                    told[file_type] = entry.facts
                found = sector_size_among(told)
                if found is not None:
                    return found
        return None


def _bound(by_miner: dict[int, int] | dict[int, float]) -> None:
    while len(by_miner) >= MAX_MINERS:
        del by_miner[next(iter(by_miner))]
