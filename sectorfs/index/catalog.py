"""This node's mirror of the Index: what answers the kernel, from memory and at once.

Pure: no I/O and no clock; times are passed in. Changes name what is true now, so applying one twice
or late does no harm. Three million declarations are columns of numbers (`columns`); the objects
others see are made when they ask.

Nothing here takes long: callers apply changes and merge snapshots (`merge`) in slices, and after
each the catalog is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import msgspec

from sectorfs.index.codes import Codes, Row, Shown, Tables
from sectorfs.index.columns import Column
from sectorfs.index.content import eligible, exact, present_facts
from sectorfs.index.names import Numbers, Sectors
from sectorfs.index.packed import UNTOLD, Key, Pack, Run
from sectorfs.index.protocol import Changes, Declaration, LocationKey, StorageStatus
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID

PAGE = 1000
"""Sector files that `files_of` gives at a time."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What is known of a sector file."""

    facts: Facts | None
    """The facts that hold now (`present_facts`); None while nobody told any."""
    declarations: tuple[Declaration, ...]
    """By ascending storage id; never empty."""


class FileChange(msgspec.Struct, frozen=True, gc=False):
    """A sector file came, went, or has other facts than before."""

    file: SectorFile
    before: Facts | None
    after: Facts | None
    appeared: bool
    vanished: bool


Listed = tuple[int, int, int, int, bool]
"""A sector file in a listing: miner, number, size, mtime_ns, and whether anybody told the facts."""


class Catalog:
    """Every sector file of the cluster, as of change `seq` of `epoch`."""

    def __init__(self) -> None:
        self.epoch = ""
        self.seq = 0
        self.loaded = False
        """True once a snapshot was merged as a whole."""
        self._codes = Codes()
        self._columns = {file_type: Column(self._codes) for file_type in FileType}
        self._names_changed_ns = dict.fromkeys(FileType, 0)
        self._storages: dict[StorageID, tuple[StorageStatus, float]] = {}

    def __len__(self) -> int:
        return sum(column.count for column in self._columns.values())

    def entry(self, file: SectorFile) -> Entry | None:
        """What is known of a sector file; None when nobody declares it."""
        rows = self._rows(file)
        if not rows:
            return None
        declarations = tuple(self._codes.declaration(file, row) for row in rows)
        return Entry(present_facts(declarations), declarations)

    def holders(self, file: SectorFile) -> tuple[StorageID, ...]:
        """The storages that hold its present content: surely so first, primaries before copies.

        One that declares another content (a copy that has become stale) is not among them.
        """
        entry = self.entry(file)
        if entry is None:
            return ()
        facts = entry.facts
        ranked = sorted(
            eligible(entry.declarations),
            key=lambda one: (facts is not None and not exact(one, facts), not one.primary),
        )
        return tuple(one.storage for one in ranked)

    def declared(self, file: SectorFile, storage: StorageID) -> Facts | None:
        """What one storage told of a sector file; None when it told nothing."""
        number = self._codes.known(storage)
        for row in self._rows(file):
            if row[0] >> 1 == number:
                return self._codes.facts(row)
        return None

    def sectors(self, file_type: FileType) -> Sectors:
        """The sectors that have a file of a type, ascending; stays as it is when they change."""
        return self._columns[file_type].names()

    def count(self, file_type: FileType) -> int:
        """How many sectors have a file of a type."""
        return self._columns[file_type].count

    def listed(
        self, file_type: FileType, names: Sequence[SectorID], start: int, limit: int
    ) -> list[Listed | None]:
        """What is known now of `limit` sectors of a listing, from position `start` on.

        `names` came from `sectors`. One item for each; None for a sector that is gone since.
        """
        assert isinstance(names, Sectors)
        found: list[Listed | None] = []
        for part, first, last in names.pieces(start, start + limit):
            found += self._listed(self._columns[file_type], part, first, last)
        return found

    def types(self) -> frozenset[FileType]:
        """The types with at least one file."""
        return frozenset(one for one, column in self._columns.items() if column.count)

    def names_changed_ns(self, file_type: FileType) -> int:
        """When a name of a type last came or went; 0 before the first."""
        return self._names_changed_ns[file_type]

    def storage(self, storage: StorageID) -> StorageStatus | None:
        """The last known status of a storage; its heartbeat's age is as of when it came."""
        known = self._storages.get(storage)
        return None if known is None else known[0]

    def storages(self) -> list[StorageStatus]:
        """Every storage by ascending id."""
        return [self._storages[storage][0] for storage in sorted(self._storages)]

    def healthy(self, storage: StorageID, now: float, cutoff: float) -> bool:
        """No error, and a heartbeat that is younger than `cutoff` at monotonic time `now`."""
        known = self._storages.get(storage)
        if known is None:
            return False
        status, received = known
        return not status.error and status.heartbeat_age + max(0.0, now - received) <= cutoff

    def files_of(
        self, storage: StorageID, *, after: SectorFile | None = None, limit: int = PAGE
    ) -> list[SectorFile]:
        """The sector files after `after` that a storage declares, ascending, a page at a time."""
        number = self._codes.known(storage)
        found: list[SectorFile] = []
        if number is None:
            return found
        for file_type, column in self._columns.items():
            if after is not None and file_type < after.file_type:
                continue
            same = after is not None and file_type == after.file_type
            past = _key(after) if after is not None and same else None
            keys = column.held_by(number, past, limit - len(found))
            found += [SectorFile(file_type, SectorID(*key)) for key in keys]
            if len(found) == limit:
                break
        return found

    def counts(self, storage: StorageID) -> dict[FileType, int]:
        """How many sector files of each type a storage declares."""
        number = self._codes.known(storage)
        held = {
            one: column.held[number] for one, column in self._columns.items() if number is not None
        }
        return {file_type: rows for file_type, rows in held.items() if rows}

    def update_storages(self, statuses: Iterable[StorageStatus], now: float) -> None:
        """Take news of storages; those not named stay as they are."""
        for status in statuses:
            self._storages[status.info.storage] = (status, now)

    def apply(self, changes: Changes, now_ns: int, now: float) -> list[FileChange]:
        """Take changes that are not a reload: detached first, then what is, then what is not.

        A storage that was detached and attached again is named in both lists: what it declared
        before is gone, what it declared since is among `declared`, here or in the next changes.
        """
        assert not changes.reload
        touched: dict[SectorFile, Shown] = {}
        for storage in changes.detached:
            self._storages.pop(storage, None)
            while files := self.files_of(storage):
                self._drop(touched, (LocationKey(file, storage) for file in files))
        self.update_storages(changes.storages, now)
        for declaration in changes.declared:
            file = declaration.file
            touched.setdefault(file, self._shown(file))
            self._columns[file.file_type].put(_key(file), self._codes.row(declaration))
        self._drop(touched, changes.dropped)
        self.epoch, self.seq = changes.epoch, changes.seq
        return self._settle(touched, now_ns)

    def bound(
        self, file_type: FileType, past: Key | None, last: Key | None, limit: int
    ) -> Key | None:
        """Up to where `merge` has about `limit` known rows to look at; `last` if that is less."""
        return self._columns[file_type].bound(past, last, limit)

    def merge(
        self,
        file_type: FileType,
        past: Key | None,
        last: Key | None,
        runs: Sequence[Run],
        pack: Pack,
        now_ns: int,
    ) -> Sequence[FileChange]:
        """Make the sector files after `past` up to `last` exactly what `runs` of `pack` say."""
        column = self._columns[file_type]
        new = [self._codes.adopt(run, pack) for run in runs]
        old = column.between(past, last)
        if old == new:
            return ()
        if old:
            found: Sequence[FileChange] = self._differences(file_type, old, new)
            moved = any(change.appeared or change.vanished for change in found)
        else:
            found, moved = Appeared(file_type, runs, pack), True
        column.replace(past, last, new)
        if moved:
            self._names_changed_ns[file_type] = now_ns
        return found

    def finish_merge(self, epoch: str, seq: int, known: frozenset[StorageID]) -> None:
        """A whole snapshot was merged: it is the catalog as of change `seq`."""
        for storage in [one for one in self._storages if one not in known]:
            del self._storages[storage]
        self.epoch, self.seq, self.loaded = epoch, seq, True

    def _rows(self, file: SectorFile) -> list[Row]:
        return self._columns[file.file_type].rows(_key(file))

    def _shown(self, file: SectorFile) -> Shown:
        return self._codes.shown(self._rows(file))

    def _drop(self, touched: dict[SectorFile, Shown], keys: Iterable[LocationKey]) -> None:
        for key in keys:
            number = self._codes.known(key.storage)
            if number is None:
                continue
            touched.setdefault(key.file, self._shown(key.file))
            self._columns[key.file.file_type].drop(_key(key.file), number)

    def _settle(self, touched: dict[SectorFile, Shown], now_ns: int) -> list[FileChange]:
        """What became different."""
        found = []
        for file, before in touched.items():
            after = self._shown(file)
            if before == after:
                continue
            found.append(_change(file, before, after))
            if before[0] != after[0]:
                self._names_changed_ns[file.file_type] = now_ns
        return found

    def _differences(
        self, file_type: FileType, old: Sequence[Run], new: Sequence[Run]
    ) -> list[FileChange]:
        """What becomes different when `new` takes the place of `old`."""
        found = []
        before, after = self._codes.files(old), self._codes.files(new)
        for key in sorted(before.keys() | after.keys()):
            olds, news = before.get(key, []), after.get(key, [])
            if olds == news:
                continue
            shown = self._codes.shown(olds), self._codes.shown(news)
            if shown[0] != shown[1]:
                found.append(_change(SectorFile(file_type, SectorID(*key)), *shown))
        return found

    def _listed(
        self, column: Column, names: Numbers, first: int, last: int
    ) -> Iterable[Listed | None]:
        miner, numbers = names.miner, names.each[first:last]
        chunk = column.as_listed(names)
        if chunk is not None:
            return [
                (miner, number, size, mtime_ns, shape != UNTOLD)
                for number, size, mtime_ns, shape in zip(
                    numbers,
                    chunk.sizes[first:last],
                    chunk.mtimes[first:last],
                    chunk.shapes[first:last],
                    strict=True,
                )
            ]
        return [self._one_listed(column, (miner, number)) for number in numbers]

    def _one_listed(self, column: Column, key: Key) -> Listed | None:
        rows = column.rows(key)
        if not rows:
            return None
        row = self._codes.present(rows)
        return (*key, 0, 0, False) if row is None else (*key, row[1], row[2], True)


class Appeared(Sequence[FileChange]):
    """Sector files that were not known before, each told when it is asked for.

    At a start there are millions, and nobody listens.
    """

    def __init__(self, file_type: FileType, runs: Sequence[Run], pack: Pack) -> None:
        self._file_type = file_type
        self._runs = runs
        self._tables = Tables(pack.storages, pack.shapes)
        self._count = sum(len(set(run.numbers)) for run in runs)
        self._told: list[FileChange] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> FileChange: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[FileChange]: ...

    def __getitem__(self, index: int | slice) -> FileChange | Sequence[FileChange]:
        return self._changes()[index]

    def __iter__(self) -> Iterator[FileChange]:
        return iter(self._changes())

    def _changes(self) -> list[FileChange]:
        if self._told is None:
            self._told = [
                _change(
                    SectorFile(self._file_type, SectorID(*key)),
                    (False, None),
                    self._tables.shown(rows),
                )
                for key, rows in self._tables.files(self._runs).items()
            ]
        return self._told


def _change(file: SectorFile, before: Shown, after: Shown) -> FileChange:
    return FileChange(file, before[1], after[1], appeared=not before[0], vanished=not after[0])


def _key(file: SectorFile) -> Key:
    return file.sector.miner, file.sector.number
