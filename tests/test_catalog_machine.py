"""The catalog beside its model: any changes and merges, given up anywhere, with tiny chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sectorfs.index import columns, merge
from sectorfs.index.catalog import Catalog, Entry, FileChange
from sectorfs.index.names import Sectors
from sectorfs.index.protocol import Changes, Declaration, LocationKey, PackedPage
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from tests.catalog_model import CatalogModel
from tests.index_fixtures import pack_of

# A failure takes minutes to shrink, and is worth them.
pytestmark = pytest.mark.timeout(600)

TYPES = [FileType.SEALED, FileType.CACHE, FileType.KEY]
STORAGES = st.sampled_from([StorageID(name) for name in "bacd"])
FILES = st.builds(
    SectorFile, st.sampled_from(TYPES), st.builds(SectorID, st.integers(1, 3), st.integers(0, 12))
)
MEMBERS = st.lists(
    st.builds(MemberFacts, st.sampled_from("pqrst"), st.integers(0, 1), st.integers(0, 2)),
    max_size=4,
    unique_by=lambda one: one.name,
).map(lambda found: tuple(sorted(found)))
DIGESTS = st.sampled_from([b"", b"", b"\1" * 32, b"\2" * 32])
FACTS = st.none() | st.builds(
    Facts, st.integers(0, 1), st.integers(-1, 2), st.none() | MEMBERS, DIGESTS
)
DECLARATIONS = st.builds(Declaration, FILES, STORAGES, st.booleans(), FACTS)
BATCHES = st.lists(DECLARATIONS, max_size=12)
SNAPSHOTS = st.lists(DECLARATIONS, max_size=40, unique_by=lambda one: one.key).map(
    lambda found: sorted(found, key=lambda one: one.key)
)
KEYS = st.lists(st.builds(LocationKey, FILES, STORAGES), max_size=8)


def pages(snapshot: list[Declaration], size: int) -> Iterator[PackedPage]:
    """A snapshot of a few sector files a page."""
    files = sorted({one.file for one in snapshot})
    for start in range(0, len(files) or 1, size):
        some = files[start : start + size]
        yield PackedPage(
            epoch="e",
            seq=7,
            storages=(),
            pack=pack_of(one for one in snapshot if one.file in some),
            after=some[-1] if start + size < len(files) else None,
        )


class Beside(RuleBasedStateMachine):
    """Every answer is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = columns.FULL, merge.SLICE
        columns.FULL, merge.SLICE = 4, 3
        self.catalog = Catalog()
        self.model = CatalogModel()
        self.now_ns = 1
        self.names: list[tuple[FileType, Sectors, list[SectorID]]] = []

    def teardown(self) -> None:
        columns.FULL, merge.SLICE = self.sizes

    @rule(detached=st.lists(STORAGES, max_size=1), declared=BATCHES, dropped=KEYS)
    def apply(
        self,
        detached: list[StorageID],
        declared: list[Declaration],
        dropped: list[LocationKey],
    ) -> None:
        changes = Changes(
            epoch="e",
            seq=1,
            detached=tuple(detached),
            declared=tuple(declared),
            dropped=tuple(dropped),
        )
        self._told(self.catalog.apply(changes, self.now_ns, 0), self.model.apply(changes))

    @rule(snapshot=SNAPSHOTS, page=st.integers(1, 12), steps=st.integers(1, 99))
    def merge(self, snapshot: list[Declaration], page: int, steps: int) -> None:
        """A snapshot, or the first slices of it."""
        reload = merge.Reload(self.catalog)
        past: SectorFile | None = None
        for one in pages(snapshot, page):
            found: list[FileChange] = []
            for part in reload.add(one, now_ns=self.now_ns, now=0):
                found += part
                steps -= 1
                if not steps:
                    return self._given_up(snapshot, past, one.after, found)
            self._told(found, self.model.merge(snapshot, past, one.after))
            past = one.after
        assert self.catalog.loaded
        return None

    def _given_up(
        self,
        snapshot: list[Declaration],
        past: SectorFile | None,
        last: SectorFile | None,
        found: list[FileChange],
    ) -> None:
        """In the middle of a page each sector file is as before, or as the snapshot says."""
        expected = CatalogModel()
        expected.files = dict(self.model.files)
        differences = {one.file: one for one in expected.merge(snapshot, past, last)}
        for change in found:
            assert differences[change.file] == change
        now = {}
        for file in self.model.files.keys() | expected.files.keys():
            entry = self.catalog.entry(file)
            assert entry in (self.model.entry(file), expected.entry(file))
            now[file] = {one.storage: one for one in entry.declarations} if entry else {}
        files = {file for file in now if file in differences and self._changed(file, differences)}
        assert files == {change.file for change in found}
        self.model.files = {file: held for file, held in now.items() if held}
        if found:
            self.now_ns += 1

    def _changed(self, file: SectorFile, differences: dict[SectorFile, FileChange]) -> bool:
        entry, change = self.catalog.entry(file), differences[file]
        before = self.model.entry(file)
        assert _bare(entry) in (change.before, change.after)
        if change.appeared or change.vanished:
            return (entry is None) == change.vanished
        assert entry is not None
        assert before is not None
        return _bare(entry) != _bare(before)

    @rule(file_type=st.sampled_from(TYPES))
    def list_names(self, file_type: FileType) -> None:
        """From now on this listing stays as it is."""
        names = self.catalog.sectors(file_type)
        self.names.append((file_type, names, self.model.sectors(file_type)))

    def _told(self, found: Iterable[FileChange], expected: list[FileChange]) -> None:
        assert sorted(found, key=lambda one: one.file) == expected
        for file_type in {one.file.file_type for one in expected if one.appeared or one.vanished}:
            assert self.catalog.names_changed_ns(file_type) == self.now_ns
        self.now_ns += 1

    @invariant()
    def entries_are_the_models(self) -> None:
        for file in (
            SectorFile(kind, SectorID(m, n)) for kind in TYPES for m in (1, 2) for n in range(13)
        ):
            assert self.catalog.entry(file) == self.model.entry(file)
        assert len(self.catalog) == len(self.model.files)

    @invariant()
    def names_are_the_models(self) -> None:
        for file_type in FileType:
            names, expected = self.catalog.sectors(file_type), self.model.sectors(file_type)
            assert list(names) == expected
            assert self.catalog.count(file_type) == len(names) == len(expected)
            assert (file_type in self.catalog.types()) == bool(expected)

    @invariant()
    def listings_stay_and_show_what_is_now(self) -> None:
        for file_type, names, expected in self.names:
            assert list(names) == expected
            assert [names[position] for position in range(len(names))] == expected
            assert list(names[2:9]) == expected[2:9]
            for start, limit in ((0, 99), (1, 3)):
                listed = self.catalog.listed(file_type, names, start, limit)
                assert listed == [
                    self._listed(SectorFile(file_type, sector))
                    for sector in expected[start : start + limit]
                ]

    def _listed(self, file: SectorFile) -> tuple[int, int, int, int, bool] | None:
        entry = self.model.entry(file)
        if entry is None:
            return None
        key = file.sector.miner, file.sector.number
        if entry.facts is None:
            return (*key, 0, 0, False)
        return (*key, entry.facts.size, entry.facts.mtime_ns, True)

    @invariant()
    def storages_hold_what_the_model_says(self) -> None:
        for storage in map(StorageID, "abcde"):
            files = self.model.files_of(storage)
            assert self.catalog.files_of(storage) == files
            assert self.catalog.counts(storage) == self.model.counts(storage)
            after = files[len(files) // 2] if files else None
            page = self.catalog.files_of(storage, after=after, limit=2)
            assert page == [one for one in files if after is None or one > after][:2]

    @invariant()
    def shapes_are_counted(self) -> None:
        codes = self.catalog._codes
        used = {
            (tuple(one.name for one in facts.members), tuple(one.size for one in facts.members))
            for held in self.model.files.values()
            for facts in (one.facts for one in held.values())
            if facts is not None and facts.members is not None
        }
        assert {shape for shape in codes.shapes if shape is not None} == used


def _bare(entry: Entry | None) -> Facts | None:
    return None if entry is None or entry.facts is None else entry.facts.bare


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.long
class TestBesideLong(Beside.TestCase):
    settings = settings(max_examples=3000, stateful_step_count=50, deadline=None)
