"""Tells the Index the digests of files that were read through, so that others can prove them.

A file takes minutes to hash. Meanwhile it may be replaced, or dropped to be removed, and what is
told then must not bring it back: it is looked at once more while nothing is declared or dropped,
and the Index passes over what it does not have, or has with other facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from sectorfs.errors import Unsupported
from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.stores.local_path import LocalPath
from sectorfs.types import Facts, SectorFile

BATCH = 1000
"""Digests told, and files looked at, at a time."""


async def tell_digests(
    index: SectorIndex, path: LocalPath, found: Sequence[tuple[SectorFile, Facts]]
) -> int:
    """Tell the Index facts with digests, as far as files still are so; how many were told.

    An Index of an older version keeps none: that is no error.
    """
    told = 0
    ordered = sorted(found, key=lambda one: one[0])
    for _, same_type in groupby(ordered, key=lambda one: one[0].file_type):
        each = list(same_type)
        for start in range(0, len(each), BATCH):
            told += await _tell(index, path, each[start : start + BATCH])
    return told


async def _tell(
    index: SectorIndex, path: LocalPath, found: Sequence[tuple[SectorFile, Facts]]
) -> int:
    async with path.changing:
        looks = await path.look([file for file, _ in found])
        news = [
            Declaration(file, path.storage, False, facts)
            for (file, facts), look in zip(found, looks, strict=True)
            if look == facts.bare
        ]
        if not news:
            return 0
        try:
            await index.tell(news)
        except Unsupported:
            return 0
    return len(news)
