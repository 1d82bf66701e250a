"""The mirror: entries, names, health, snapshots merged by page, changes in any repetition."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.merge import Reload
from sectorfs.index.protocol import Changes, Declaration, PackedPage, StorageStatus
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID
from tests.index_fixtures import STAT, file, held, info, key, merged, pack_of, sector

F1, F2 = Facts(1, 10), Facts(2, 20)


def status(storage: str, *, age: float = 0, error: str = "", weight: int = 10) -> StorageStatus:
    return StorageStatus(
        info=info(storage, weight=weight),
        stat=STAT,
        error=error,
        last_heartbeat_ns=0,
        heartbeat_age=age,
    )


def pages(
    declarations: list[Declaration], *, limit: int = 1000, seq: int = 1, storages: str = "abc"
) -> list[PackedPage]:
    """A snapshot as an index pages it: all of a sector file in one page."""
    ordered = sorted(declarations, key=lambda one: one.key)
    files = sorted({one.file for one in ordered})
    starts = range(0, len(files) or 1, limit)
    return [
        PackedPage(
            epoch="e",
            seq=seq + number,
            storages=tuple(status(name) for name in storages) if number == 0 else (),
            pack=pack_of(one for one in ordered if one.file in files[start : start + limit]),
            after=files[start + limit - 1] if start + limit < len(files) else None,
        )
        for number, start in enumerate(starts)
    ]


def loaded(*declarations: Declaration) -> Catalog:
    catalog = Catalog()
    merged(catalog, pages(list(declarations)), now_ns=100)
    return catalog


def apply(catalog: Catalog, now_ns: int = 200, **fields: object) -> list[FileChange]:
    changes = Changes(epoch="e", seq=catalog.seq + 1, **fields)
    return catalog.apply(changes, now_ns, 0)


def paged(catalog: Catalog, storage: StorageID) -> list[SectorFile]:
    found: list[SectorFile] = []
    while page := catalog.files_of(storage, after=found[-1] if found else None, limit=2):
        found += page
    return found


def contents(catalog: Catalog) -> list[Declaration]:
    """Everything in a catalog, its parts checked against each other."""
    found: list[Declaration] = []
    for file_type in FileType:
        sectors = catalog.sectors(file_type)
        assert all(one < other for one, other in pairwise(sectors))
        assert (file_type in catalog.types()) == bool(sectors)
        for one in sectors:
            entry = catalog.entry(SectorFile(file_type, one))
            assert entry is not None
            found += entry.declarations
    assert len(catalog) == sum(len(catalog.sectors(file_type)) for file_type in FileType)
    by_storage: dict[StorageID, set[SectorFile]] = {}
    for declaration in found:
        by_storage.setdefault(declaration.storage, set()).add(declaration.file)
    for storage in {*"abcd", *by_storage}:
        files = catalog.files_of(StorageID(storage))
        assert files == sorted(by_storage.get(StorageID(storage), set()))
        assert files == paged(catalog, StorageID(storage))
        assert catalog.counts(StorageID(storage)) == Counter(one.file_type for one in files)
    return found


def test_empty_catalog_knows_nothing() -> None:
    catalog = Catalog()
    assert catalog.entry(file(1)) is None
    assert tuple(catalog.sectors(FileType.SEALED)) == ()
    assert catalog.types() == frozenset()
    assert catalog.names_changed_ns(FileType.SEALED) == 0
    assert catalog.storage(StorageID("a")) is None
    assert catalog.storages() == []
    assert not catalog.healthy(StorageID("a"), 0, 50)
    assert (catalog.epoch, catalog.seq, catalog.loaded) == ("", 0, False)


def test_snapshot_fills_it() -> None:
    catalog = Catalog()
    batch = [held("b", 1, facts=F1), held("a", 1, facts=F1, primary=False), held("a", 2)]
    found = merged(catalog, pages(batch), now_ns=100)
    assert found == [
        FileChange(file(1), None, F1, True, False),
        FileChange(file(2), None, None, True, False),
    ]
    entry = catalog.entry(file(1))
    assert entry is not None
    assert entry.facts == F1
    assert entry.declarations == (batch[1], batch[0])
    assert tuple(catalog.sectors(FileType.SEALED)) == (sector(1), sector(2))
    assert catalog.names_changed_ns(FileType.SEALED) == 100
    assert catalog.names_changed_ns(FileType.CACHE) == 0
    assert (catalog.epoch, catalog.seq, catalog.loaded) == ("e", 1, True)
    assert [one.info.storage for one in catalog.storages()] == ["a", "b", "c"]


def test_names_are_made_once_per_change() -> None:
    catalog = loaded(held("a", 1), held("a", file(1, FileType.CACHE)))
    shown = catalog.sectors(FileType.SEALED)
    apply(catalog, declared=(held("a", 1, facts=F1), held("a", file(2, FileType.CACHE))))
    assert catalog.sectors(FileType.SEALED) is shown
    apply(catalog, declared=(held("a", 2),))
    assert tuple(catalog.sectors(FileType.SEALED)) == (sector(1), sector(2))


def test_names_stay_ascending_in_any_order_of_arrival() -> None:
    catalog = loaded(*(held("a", number) for number in (10, 20, 30)))
    apply(catalog, declared=tuple(held("a", number) for number in (5, 35, 15, 25, 16)))
    apply(catalog, dropped=tuple(key("a", number) for number in (5, 20, 35)))
    assert [one.number for one in catalog.sectors(FileType.SEALED)] == [10, 15, 16, 25, 30]


def test_listing_keeps_its_names_and_shows_what_is_known_now() -> None:
    catalog = loaded(*(held("a", number, facts=F1) for number in (1, 2, 3)), held("a", 4))
    names = catalog.sectors(FileType.SEALED)
    apply(catalog, dropped=(key("a", 2),), declared=(held("a", 3, facts=F2), held("a", 9)))
    assert catalog.count(FileType.SEALED) == 4
    assert catalog.count(FileType.CACHE) == 0
    assert list(names) == [sector(number) for number in (1, 2, 3, 4)]
    assert catalog.listed(FileType.SEALED, names, 0, 3) == [
        (1000, 1, 1, 10, True),
        None,
        (1000, 3, 2, 20, True),
    ]
    assert catalog.listed(FileType.SEALED, names, 3, 100) == [(1000, 4, 0, 0, False)]
    assert catalog.listed(FileType.SEALED, names, 4, 100) == []


def test_new_facts_of_a_copy_change_nothing_that_shows() -> None:
    catalog = loaded(held("a", 1, facts=F1), held("b", 1, facts=F1, primary=False))
    assert apply(catalog, declared=(held("b", 1, facts=F2, primary=False),)) == []
    assert apply(catalog, declared=(held("a", 1, facts=F2),)) == [
        FileChange(file(1), F1, F2, False, False)
    ]
    assert catalog.names_changed_ns(FileType.SEALED) == 100


def test_dropping_one_of_two_holders_keeps_the_name() -> None:
    catalog = loaded(held("a", 1, facts=F1), held("b", 1, facts=F2, primary=False))
    assert apply(catalog, dropped=(key("a", 1),)) == [FileChange(file(1), F1, F2, False, False)]
    assert apply(catalog, 300, dropped=(key("b", 1),)) == [
        FileChange(file(1), F2, None, False, True)
    ]
    assert catalog.entry(file(1)) is None
    assert catalog.names_changed_ns(FileType.SEALED) == 300
    assert catalog.types() == frozenset()


def test_dropping_what_is_not_there_is_fine() -> None:
    catalog = loaded(held("a", 1))
    assert apply(catalog, dropped=(key("b", 1), key("a", 2), key("zzz", 1))) == []
    assert contents(catalog) == [held("a", 1)]


def test_applying_twice_does_no_harm() -> None:
    catalog = loaded(held("a", 1, facts=F1), held("b", 2), held("c", 3))
    fields = {
        "declared": (held("a", 1, facts=F2), held("a", 4)),
        "dropped": (key("b", 2),),
        "detached": (StorageID("c"),),
    }
    assert len(apply(catalog, **fields)) == 4
    before = contents(catalog)
    assert apply(catalog, **fields) == []
    assert contents(catalog) == before


def test_detached_storage_takes_its_declarations_along() -> None:
    catalog = loaded(held("a", 1, facts=F1), held("b", 1, facts=F1), held("a", 2), held("b", 3))
    found = apply(catalog, detached=(StorageID("a"), StorageID("never")))
    assert found == [FileChange(file(2), None, None, False, True)]
    assert contents(catalog) == [held("b", 1, facts=F1), held("b", 3)]
    assert catalog.storage(StorageID("a")) is None


def test_storage_that_came_again_has_only_what_it_declared_since() -> None:
    catalog = loaded(held("a", 1, facts=F1), held("a", 2, facts=F1))
    found = apply(
        catalog,
        detached=(StorageID("a"),),
        storages=(status("a", weight=3),),
        declared=(held("a", 2, facts=F1),),
    )
    assert found == [FileChange(file(1), F1, None, False, True)]
    assert contents(catalog) == [held("a", 2, facts=F1)]
    known = catalog.storage(StorageID("a"))
    assert known is not None
    assert known.info.weight == 3


def test_declaration_of_a_storage_not_yet_told_of_is_kept() -> None:
    catalog = loaded()
    apply(catalog, declared=(held("new", 1),))
    assert contents(catalog) == [held("new", 1)]
    assert not catalog.healthy(StorageID("new"), 0, 50)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
def test_reload_invalidates_only_what_differs(limit: int) -> None:
    old = [
        held("a", file(1, FileType.UNSEALED), facts=F1),
        held("a", 1, facts=F1),
        held("b", 1, facts=F1),
        held("a", 2, facts=F1),
        held("a", 4, facts=F1),
        held("c", file(1, FileType.KEY)),
    ]
    catalog = loaded(*old)
    new = [
        held("a", 1, facts=F1),
        held("b", 1, facts=F1),
        held("c", 1, facts=F1, primary=False),
        held("a", 2, facts=F2),
        held("b", 3),
        held("a", file(9, FileType.PIECE)),
    ]
    found = merged(catalog, pages(new, limit=limit, seq=50, storages="ab"), now_ns=300)
    assert sorted(found, key=lambda one: one.file) == [
        FileChange(file(1, FileType.UNSEALED), F1, None, False, True),
        FileChange(file(2), F1, F2, False, False),
        FileChange(file(3), None, None, True, False),
        FileChange(file(4), F1, None, False, True),
        FileChange(file(9, FileType.PIECE), None, None, True, False),
        FileChange(file(1, FileType.KEY), None, None, False, True),
    ]
    assert contents(catalog) == sorted(new, key=lambda one: one.key)
    assert catalog.seq == 50  # of the first page: what changed during the snapshot comes again
    assert [one.info.storage for one in catalog.storages()] == ["a", "b"]


def test_reload_that_is_given_up_keeps_position_and_the_rest() -> None:
    catalog = loaded(held("a", 1), held("a", 2), held("a", 3))
    reload = Reload(catalog)
    first = pages([held("a", 2), held("a", 5), held("a", 8)], limit=2, seq=70)[0]
    for _ in reload.add(first, now_ns=1, now=0):
        pass
    assert (catalog.seq, catalog.epoch) == (1, "e")
    assert contents(catalog) == [held("a", 2), held("a", 5)]
    merged(catalog, pages([held("a", 7)], seq=80), now_ns=1)
    assert contents(catalog) == [held("a", 7)]


def test_health_ages_with_the_time_since_it_was_told() -> None:
    catalog = Catalog()
    a, b = StorageID("a"), StorageID("b")
    catalog.update_storages([status("a", age=10), status("b", error="gone")], 1000)
    assert catalog.healthy(a, 1000, 50)
    assert catalog.healthy(a, 1040, 50)
    assert not catalog.healthy(a, 1040.1, 50)
    assert catalog.healthy(a, 900, 50)
    assert not catalog.healthy(b, 1000, 50)
    catalog.update_storages([status("a")], 1050)
    assert catalog.healthy(a, 1100, 50)
    assert catalog.storage(b) is not None


DECLARATIONS = st.builds(
    lambda storage, number, miner, kind, facts: Declaration(
        SectorFile(kind, SectorID(miner, number)), StorageID(storage), True, facts
    ),
    st.sampled_from("abcd"),
    st.integers(0, 4),
    st.integers(1, 2),
    st.sampled_from([FileType.UNSEALED, FileType.CACHE, FileType.KEY]),
    st.sampled_from([None, F1, F2]),
)
BATCHES = st.lists(DECLARATIONS, unique_by=lambda one: one.key)


@given(BATCHES, BATCHES, st.integers(1, 5))
def test_merge_of_any_snapshot_ends_as_the_snapshot(
    old: list[Declaration], new: list[Declaration], limit: int
) -> None:
    catalog = loaded(*old)
    before = {one.file: catalog.entry(one.file) for one in old + new}
    found = merged(catalog, pages(new, limit=limit), now_ns=300)
    assert contents(catalog) == sorted(new, key=lambda one: one.key)
    told = {change.file: change for change in found}
    assert len(told) == len(found)
    for one, then in before.items():
        now = catalog.entry(one)
        facts = (then.facts if then else None, now.facts if now else None)
        if (then is None) == (now is None) and facts[0] == facts[1]:
            assert one not in told
        else:
            assert told[one] == FileChange(one, *facts, then is None, now is None)


def test_holders_are_those_of_the_present_content_the_surest_first() -> None:
    present, stale = Facts(11, 2_000), Facts(11, 1_000)
    catalog = loaded(
        held("a", 7, primary=False, facts=stale),
        held("b", 7, primary=False, facts=present),
        held("c", 7, primary=True, facts=stale),
        held("d", 7, primary=True, facts=present),
        held("e", 7, primary=True, facts=Facts(12, 1_500)),
    )
    # a: a copy of what was; e: a primary of another size; c: a primary copied without its time.
    assert catalog.holders(file(7)) == ("d", "b", "c")
    assert catalog.holders(file(8)) == ()
    assert catalog.declared(file(7), StorageID("a")) == stale
    assert catalog.declared(file(7), StorageID("z")) is None
    assert catalog.declared(file(8), StorageID("a")) is None
