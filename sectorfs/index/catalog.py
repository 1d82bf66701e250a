"""This node's mirror of the Index: what answers the kernel, from memory and at once.

Pure: no I/O and no clock; times are passed in. Changes name what is true now, so applying one twice
or late does no harm. A fresh snapshot is merged in page by page (`Reload`): pages come in key
order, so whatever the catalog has between two pages and the Index has not is gone. The loop is
never held for longer than a page, memory never holds two catalogs, and the tree never becomes
empty: in the middle of a merge each sector file is as the old or as the new snapshot says.

Invariants: an entry has at least one declaration; a name is in its type's ascending list exactly
while it has an entry; a storage's set of files is exactly those that it declares.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from sectorfs.index.content import eligible, exact, present_facts
from sectorfs.index.protocol import Changes, Declaration, SnapshotPage, StorageStatus
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID


class Entry(msgspec.Struct, frozen=True):
    """What is known of a sector file."""

    facts: Facts | None
    """The facts that hold now (`present_facts`); None while nobody told any."""
    declarations: tuple[Declaration, ...]
    """By ascending storage id; never empty."""


class FileChange(msgspec.Struct, frozen=True):
    """A sector file came, went, or has other facts than before."""

    file: SectorFile
    before: Facts | None
    after: Facts | None
    appeared: bool
    vanished: bool


Listed = tuple[int, int, int, int, bool]
"""A sector file in a listing: miner, number, size, mtime_ns, and whether anybody told the facts."""


class _Names:
    """The sectors of one type, ascending; shown as a tuple that is made once per change."""

    __slots__ = ("_shown", "changed_ns", "sectors")

    def __init__(self) -> None:
        self.sectors: list[SectorID] = []
        self.changed_ns = 0
        self._shown: tuple[SectorID, ...] | None = ()

    def update(self, added: list[SectorID], removed: list[SectorID], now_ns: int) -> None:
        """Add sectors that are not there, remove ones that are."""
        if removed:
            self.sectors = _removed(self.sectors, sorted(removed))
        if added:
            self.sectors = _merged(self.sectors, sorted(added))
        self.changed_ns = now_ns
        self._shown = None

    def shown(self) -> tuple[SectorID, ...]:
        if self._shown is None:
            self._shown = tuple(self.sectors)
        return self._shown


def _removed(sectors: list[SectorID], gone: list[SectorID]) -> list[SectorID]:
    kept: list[SectorID] = []
    start = 0
    for sector in gone:
        end = bisect_left(sectors, sector, start)
        kept += sectors[start:end]
        start = end + 1
    kept += sectors[start:]
    return kept


def _merged(sectors: list[SectorID], new: list[SectorID]) -> list[SectorID]:
    # Copying pieces: inserting one by one moves half of a million pointers for each.
    if not sectors or sectors[-1] < new[0]:
        sectors += new
        return sectors
    merged: list[SectorID] = []
    start = 0
    for sector in new:
        end = bisect_left(sectors, sector, start)
        merged += sectors[start:end]
        merged.append(sector)
        start = end
    merged += sectors[start:]
    return merged


class Catalog:
    """Every sector file of the cluster, as of change `seq` of `epoch`."""

    def __init__(self) -> None:
        self.epoch = ""
        self.seq = 0
        self.loaded = False
        """True once a snapshot was merged as a whole."""
        self._entries: dict[SectorFile, Entry] = {}
        self._names = {file_type: _Names() for file_type in FileType}
        self._held: dict[StorageID, set[SectorFile]] = {}
        self._storages: dict[StorageID, tuple[StorageStatus, float]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, file: SectorFile) -> Entry | None:
        """What is known of a sector file; None when nobody declares it."""
        return self._entries.get(file)

    def holders(self, file: SectorFile) -> tuple[StorageID, ...]:
        """The storages that hold its present content: surely so first, primaries before copies.

        One that declares another content (a copy that has become stale) is not among them.
        """
        entry = self._entries.get(file)
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
        entry = self._entries.get(file)
        for one in entry.declarations if entry else ():
            if one.storage == storage:
                return one.facts
        return None

    def sectors(self, file_type: FileType) -> Sequence[SectorID]:
        """The sectors that have a file of a type, ascending; stays as it is when they change."""
        return self._names[file_type].shown()

    def count(self, file_type: FileType) -> int:
        """How many sectors have a file of a type."""
        return len(self._names[file_type].sectors)

    def listed(
        self, file_type: FileType, names: Sequence[SectorID], start: int, limit: int
    ) -> list[Listed | None]:
        """What is known now of `limit` sectors of a listing, from position `start` on.

        `names` came from `sectors`. One item for each; None for a sector that is gone since.
        """
        found: list[Listed | None] = []
        for sector in names[start : start + limit]:
            entry = self._entries.get(SectorFile(file_type, sector))
            if entry is None:
                found.append(None)
                continue
            size, mtime_ns = (entry.facts.size, entry.facts.mtime_ns) if entry.facts else (0, 0)
            found.append((sector.miner, sector.number, size, mtime_ns, entry.facts is not None))
        return found

    def types(self) -> frozenset[FileType]:
        """The types with at least one file."""
        return frozenset(one for one, names in self._names.items() if names.sectors)

    def names_changed_ns(self, file_type: FileType) -> int:
        """When a name of a type last came or went; 0 before the first."""
        return self._names[file_type].changed_ns

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

    def files_of(self, storage: StorageID) -> list[SectorFile]:
        """The sector files a storage declares, in no order."""
        return list(self._held.get(storage, ()))

    def counts(self, storage: StorageID) -> dict[FileType, int]:
        """How many sector files of each type a storage declares."""
        return dict(Counter(file.file_type for file in self._held.get(storage, ())))

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
        touched: dict[SectorFile, Entry | None] = {}
        for storage in changes.detached:
            self._storages.pop(storage, None)
            for file in self._held.pop(storage, ()):
                self._put(touched, file, _without(self._entries[file], storage))
        self.update_storages(changes.storages, now)
        for declaration in changes.declared:
            before = self._entries.get(declaration.file)
            self._put(touched, declaration.file, _with(before, declaration))
            self._held.setdefault(declaration.storage, set()).add(declaration.file)
        for key in changes.dropped:
            held = self._held.get(key.storage)
            if held is not None and key.file in held:
                held.remove(key.file)
                self._put(touched, key.file, _without(self._entries[key.file], key.storage))
        self.epoch, self.seq = changes.epoch, changes.seq
        return self._settle(touched, now_ns)

    def replace(
        self, pages: Sequence[SnapshotPage], *, now_ns: int, now: float
    ) -> list[FileChange]:
        """Merge a whole snapshot at once; what is equal in both is no change."""
        reload = Reload(self)
        return [change for page in pages for change in reload.add(page, now_ns=now_ns, now=now)]

    def _put(
        self, touched: dict[SectorFile, Entry | None], file: SectorFile, entry: Entry | None
    ) -> None:
        """Set or remove an entry, and remember how it was before the first change."""
        before = self._entries.get(file)
        touched.setdefault(file, before)
        if entry is None:
            del self._entries[file]
        elif entry is not before:
            self._entries[file] = entry

    def _settle(self, touched: dict[SectorFile, Entry | None], now_ns: int) -> list[FileChange]:
        """Bring the lists of names in line with the entries, and tell what became different."""
        found = []
        added: dict[FileType, list[SectorID]] = {}
        removed: dict[FileType, list[SectorID]] = {}
        for file, before in touched.items():
            after = self._entries.get(file)
            if before is None and after is None:
                continue
            if before is not None and after is not None and before.facts == after.facts:
                continue
            if before is None:
                added.setdefault(file.file_type, []).append(file.sector)
            elif after is None:
                removed.setdefault(file.file_type, []).append(file.sector)
            found.append(
                FileChange(
                    file,
                    None if before is None else before.facts,
                    None if after is None else after.facts,
                    appeared=before is None,
                    vanished=after is None,
                )
            )
        for file_type in added.keys() | removed.keys():
            names = self._names[file_type]
            names.update(added.get(file_type, []), removed.get(file_type, []), now_ns)
        return found

    def _between(self, past: SectorFile | None, last: SectorFile | None) -> list[SectorFile]:
        """The known sector files after `past`, up to and with `last`; None means no end."""
        found: list[SectorFile] = []
        for file_type, names in self._names.items():
            if past is not None and file_type < past.file_type:
                continue
            if last is not None and file_type > last.file_type:
                break
            sectors, start, end = names.sectors, 0, len(names.sectors)
            if past is not None and file_type == past.file_type:
                start = bisect_right(sectors, past.sector)
            if last is not None and file_type == last.file_type:
                end = bisect_right(sectors, last.sector)
            found += [SectorFile(file_type, sector) for sector in sectors[start:end]]
        return found

    def _merge(
        self,
        past: SectorFile | None,
        last: SectorFile | None,
        declarations: Iterable[Declaration],
        now_ns: int,
    ) -> list[FileChange]:
        """Make the sector files after `past` up to `last` exactly what `declarations` say."""
        wanted: dict[SectorFile, list[Declaration]] = {}
        for declaration in declarations:
            wanted.setdefault(declaration.file, []).append(declaration)
        touched: dict[SectorFile, Entry | None] = {}
        for file in self._between(past, last):
            if file not in wanted:
                self._release(self._entries[file])
                self._put(touched, file, None)
        for file, holders in wanted.items():
            before = self._entries.get(file)
            if before is not None and before.declarations == tuple(holders):
                continue
            if before is not None:
                self._release(before)
            for declaration in holders:
                self._held.setdefault(declaration.storage, set()).add(file)
            self._put(touched, file, _entry(holders, before))
        return self._settle(touched, now_ns)

    def _release(self, entry: Entry) -> None:
        for declaration in entry.declarations:
            self._held[declaration.storage].discard(declaration.file)

    def _finish_reload(self, epoch: str, seq: int, known: frozenset[StorageID]) -> None:
        for storage in [one for one in self._storages if one not in known]:
            del self._storages[storage]
        self._held = {storage: files for storage, files in self._held.items() if files}
        self.epoch, self.seq, self.loaded = epoch, seq, True


class Reload:
    """Merges a snapshot into a catalog, page by page; the last page completes it.

    Until then `epoch` and `seq` of the catalog stay, so that one given up is simply begun anew.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._epoch = ""
        self._seq = 0
        self._storages: frozenset[StorageID] = frozenset()
        self._first = True
        self._past: SectorFile | None = None
        self._kept: list[Declaration] = []

    @property
    def epoch(self) -> str:
        """The epoch of the first page; empty before it. Later pages must agree."""
        return self._epoch

    def add(self, page: SnapshotPage, *, now_ns: int, now: float) -> list[FileChange]:
        """Merge the next page."""
        if self._first:
            self._first = False
            self._epoch, self._seq = page.epoch, page.seq
            self._storages = frozenset(status.info.storage for status in page.storages)
            self._catalog.update_storages(page.storages, now)
        declarations = [*self._kept, *page.declarations]
        last: SectorFile | None = None
        self._kept = []
        if page.after is not None:
            # The next page may have more declarations of the last sector file: it waits for them.
            end = page.after.file
            self._kept = [one for one in declarations if one.file == end]
            declarations = declarations[: len(declarations) - len(self._kept)]
            if not declarations:
                return []
            last = declarations[-1].file
        found = self._catalog._merge(self._past, last, declarations, now_ns)
        self._past = last
        if page.after is None:
            self._catalog._finish_reload(self._epoch, self._seq, self._storages)
        return found


def _with(before: Entry | None, declaration: Declaration) -> Entry:
    """The entry with a declaration added or replaced; the same one when nothing is new."""
    holders = [] if before is None else list(before.declarations)
    for position, known in enumerate(holders):
        if known.storage == declaration.storage:
            if known == declaration:
                assert before is not None
                return before
            holders[position] = declaration
            return _entry(holders, before)
    holders.append(declaration)
    return _entry(sorted(holders, key=lambda one: one.storage), before)


def _without(before: Entry, storage: StorageID) -> Entry | None:
    """The entry without a storage's declaration; None when none is left."""
    rest = [one for one in before.declarations if one.storage != storage]
    return _entry(rest, before) if rest else None


def _entry(holders: Sequence[Declaration], before: Entry | None) -> Entry:
    """An entry whose equal parts are shared: there are millions, most with a handful of values."""
    file = holders[0].file if before is None else before.declarations[0].file
    pool: list[Facts] = [] if before is None or before.facts is None else [before.facts]
    declarations = []
    for one in holders:
        facts = one.facts
        if facts is not None:
            same = next((known for known in pool if known == facts), None)
            if same is None:
                same = _compact(facts)
                pool.append(same)
            facts = same
        storage = StorageID(sys.intern(one.storage))
        declarations.append(Declaration(file, storage, one.primary, facts))
    return Entry(present_facts(declarations), tuple(declarations))


def _compact(facts: Facts) -> Facts:
    if not facts.members:
        return facts
    # The same dozen names stand in every directory.
    members = [MemberFacts(sys.intern(one.name), one.size, one.mtime_ns) for one in facts.members]
    return Facts(facts.size, facts.mtime_ns, tuple(members))
