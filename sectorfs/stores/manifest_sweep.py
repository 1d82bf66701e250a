"""Removes manifests of what is not there any more: files that went, and earlier contents of others.

A shard at a time. What the catalog does not speak for is looked at on its disk, which alone has the
say: an Index that forgot, or a disk that does not answer, must not cost weeks of hashing.
"""

from __future__ import annotations

import trio

from sectorfs.errors import SectorFSError
from sectorfs.index.catalog import Catalog
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest_store import ManifestStore, keys_of
from sectorfs.types import Facts, SectorFile, StorageID, parse_file_type, parse_sector

PAUSE = 0.1
"""Seconds between two shards: four thousand of a type take minutes."""


class ManifestSweep:
    """Goes through the manifests of one path at a time."""

    def __init__(self, manifests: ManifestStore, catalog: Catalog) -> None:
        self._manifests = manifests
        self._catalog = catalog

    async def run(self, path: LocalPath) -> int:
        """Remove what is of no file of a path; how many manifests that were."""
        removed = 0
        for shard in await self._manifests.shards(path.storage):
            old: list[str] = []
            for sector, names in (await self._manifests.names(shard)).items():
                old += await self._old(path, shard, sector, names)
            if old:
                await self._manifests.remove_names(old)
                removed += len(old)
            await trio.sleep(PAUSE)
        return removed

    async def _old(self, path: LocalPath, shard: str, sector: str, names: list[str]) -> list[str]:
        try:
            file = SectorFile(parse_file_type(shard.split("/")[1]), parse_sector(sector))
        except ValueError:
            return []  # none of ours
        old = set(names) - _names_of(path.storage, file, self._catalog.declared(file, path.storage))
        if not old or not path.available:
            return []
        try:
            [look] = await path.look([file])
        except SectorFSError:
            return []
        if look is not None and not isinstance(look, Facts):
            return []
        return sorted(old - _names_of(path.storage, file, look))


def _names_of(storage: StorageID, file: SectorFile, facts: Facts | None) -> set[str]:
    """The names of the manifests that a file with these facts has."""
    return {key.name for key in keys_of(storage, file, facts)} if facts is not None else set()
