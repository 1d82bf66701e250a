"""Merges a snapshot of the Index into a catalog, a page at a time and a slice of it at a time.

Pages come in key order, so whatever the catalog has between two of them and the Index has not is
gone. Memory never holds two catalogs, and the tree never becomes empty: in the middle of a merge
each sector file is as the old or as the new snapshot says. Until the end the catalog's `epoch` and
`seq` stay, so that a merge that is given up is simply begun anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.packed import Key
from sectorfs.index.protocol import PackedPage
from sectorfs.types import FileType, SectorFile, StorageID

SLICE = 500
"""Known rows looked at without a pause."""


class Reload:
    """One merge."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._epoch = ""
        self._seq = 0
        self._storages: frozenset[StorageID] = frozenset()
        self._first = True
        self._past: SectorFile | None = None

    @property
    def epoch(self) -> str:
        """The epoch of the first page; empty before it. Later pages must agree."""
        return self._epoch

    def add(self, page: PackedPage, *, now_ns: int, now: float) -> Iterator[Sequence[FileChange]]:
        """Merge the next page: a slice with each step, with what it changed.

        The catalog may be read between two steps. The last page completes the merge.
        """
        if self._first:
            self._first = False
            self._epoch, self._seq = page.epoch, page.seq
            self._storages = frozenset(status.info.storage for status in page.storages)
            self._catalog.update_storages(page.storages, now)
        for file_type in FileType:
            if self._past is not None and file_type < self._past.file_type:
                continue
            if page.after is not None and file_type > page.after.file_type:
                break
            yield from self._merge_type(file_type, page, now_ns)
        self._past = page.after
        if page.after is None:
            self._catalog.finish_merge(self._epoch, self._seq, self._storages)

    def _merge_type(
        self, file_type: FileType, page: PackedPage, now_ns: int
    ) -> Iterator[Sequence[FileChange]]:
        past, last = _key(self._past, file_type), _key(page.after, file_type)
        while True:
            bound = self._catalog.bound(file_type, past, last, SLICE)
            part = page.pack.between(file_type, past, bound)
            yield self._catalog.merge(file_type, past, bound, part, page.pack, now_ns)
            if bound == last:
                return
            past = bound


def _key(file: SectorFile | None, file_type: FileType) -> Key | None:
    """A sector file as an end of a range of its type; None for one of another type."""
    if file is None or file.file_type != file_type:
        return None
    return file.sector.miner, file.sector.number
