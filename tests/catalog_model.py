"""What a catalog is, as simply as it can be said: a dict of dicts, all of it looked through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sectorfs.index.catalog import Entry, FileChange
from sectorfs.index.content import present_facts
from sectorfs.index.protocol import Changes, Declaration
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID

Held = dict[StorageID, Declaration]


class CatalogModel:
    """Every sector file with its declarations."""

    def __init__(self) -> None:
        self.files: dict[SectorFile, Held] = {}

    def entry(self, file: SectorFile) -> Entry | None:
        """As `Catalog.entry`."""
        held = self.files.get(file)
        if not held:
            return None
        declarations = tuple(held[storage] for storage in sorted(held))
        return Entry(present_facts(declarations), declarations)

    def sectors(self, file_type: FileType) -> list[SectorID]:
        """As `Catalog.sectors`."""
        return sorted(one.sector for one in self.files if one.file_type == file_type)

    def files_of(self, storage: StorageID) -> list[SectorFile]:
        """As `Catalog.files_of`, all of them."""
        return sorted(file for file, held in self.files.items() if storage in held)

    def counts(self, storage: StorageID) -> dict[FileType, int]:
        """As `Catalog.counts`."""
        return dict(Counter(file.file_type for file in self.files_of(storage)))

    def apply(self, changes: Changes) -> list[FileChange]:
        """As `Catalog.apply`; what changed is in key order."""
        after = {file: dict(held) for file, held in self.files.items()}
        for held in after.values():
            for storage in changes.detached:
                held.pop(storage, None)
        for one in changes.declared:
            after.setdefault(one.file, {})[one.storage] = one
        for key in changes.dropped:
            after.get(key.file, {}).pop(key.storage, None)
        return self._become(after)

    def merge(
        self, declarations: Sequence[Declaration], past: SectorFile | None, last: SectorFile | None
    ) -> list[FileChange]:
        """Let the files after `past` up to `last` be what a snapshot says."""
        after = {file: held for file, held in self.files.items() if not _within(file, past, last)}
        for one in declarations:
            if _within(one.file, past, last):
                after.setdefault(one.file, {})[one.storage] = one
        return self._become(after)

    def _become(self, files: dict[SectorFile, Held]) -> list[FileChange]:
        before = {file: self.entry(file) for file in self.files}
        self.files = {file: held for file, held in files.items() if held}
        found = []
        for file in sorted(before.keys() | self.files.keys()):
            old, new = before.get(file), self.entry(file)
            facts = (_facts(old), _facts(new))
            if (old is None) != (new is None) or facts[0] != facts[1]:
                found.append(FileChange(file, *facts, appeared=old is None, vanished=new is None))
        return found


def _facts(entry: Entry | None) -> Facts | None:
    """What a change of it tells: not the digest, which comes later."""
    return None if entry is None or entry.facts is None else entry.facts.bare


def _within(file: SectorFile, past: SectorFile | None, last: SectorFile | None) -> bool:
    return (past is None or file > past) and (last is None or file <= last)
