"""The name space: what exists, what `stat` shows, and names that must not hurt."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import NameTooLong, Stale
from sectorfs.fuse.inodes import ROOT, Content, InodeKey, InodeTable, type_number
from sectorfs.fuse.notifications import ForgetName, Notifications
from sectorfs.fuse.tree import CACHED_FOR, DirectoryEntry, Tree, space
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import Changes, Declaration, FsStat, StorageInfo, StorageStatus
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from tests.mount_fixtures import HERE, SLOW, DictCatalog, sector_file

SEALED = type_number(FileType.SEALED)
CACHE = type_number(FileType.CACHE)
MEMBERS = (MemberFacts("p_aux", 64, 11), MemberFacts("t_aux", 1025, 12))


class Fixture:
    def __init__(self, *types: str) -> None:
        self.catalog = DictCatalog()
        self.inodes = InodeTable()
        self.tree = Tree(self.catalog, self.inodes, types=types)

    def hold(self, parent: int, name: str) -> int:
        """Look a name up as the kernel does."""
        found = self.tree.lookup(parent, name.encode())
        assert found is not None
        if found.key is None:
            return found.attributes.number
        return self.inodes.look_up(found.key)

    def names(self, number: int, start: int = 0) -> list[str]:
        return [entry.name for _, entry in self.tree.entries(self.tree.listing(number), start)]


@pytest.fixture
def fixture() -> Fixture:
    fixture = Fixture()
    fixture.catalog.declare(sector_file("sealed/7"), Facts(513, 99))
    fixture.catalog.declare(sector_file("sealed/8"), None)
    fixture.catalog.declare(sector_file("cache/7"), Facts(1089, 77, MEMBERS))
    return fixture


def test_the_root_shows_three_types_even_when_nothing_is_declared() -> None:
    fixture = Fixture()
    assert fixture.names(ROOT) == [".", "..", "unsealed", "sealed", "cache"]
    root = fixture.tree.attributes(ROOT)
    assert (root.mode, root.links, root.mtime_ns) == (stat.S_IFDIR | 0o555, 5, 0)


def test_other_types_are_shown_once_one_exists() -> None:
    fixture = Fixture()
    assert fixture.tree.lookup(ROOT, b"update-cache") is None
    fixture.catalog.declare(sector_file("update-cache/1"), None)
    found = fixture.tree.lookup(ROOT, b"update-cache")
    assert found is not None
    assert found.attributes.number == type_number(FileType.UPDATE_CACHE)
    assert fixture.names(ROOT)[2:] == ["unsealed", "sealed", "cache", "update-cache"]
    fixture.catalog.drop(sector_file("update-cache/1"))
    assert fixture.tree.lookup(ROOT, b"update-cache") is None


def test_other_types_are_shown_as_configured() -> None:
    fixture = Fixture("piece", "sealed")
    assert fixture.names(ROOT)[2:] == ["unsealed", "sealed", "cache", "piece"]


def test_a_sector_file_shows_the_facts(fixture: Fixture) -> None:
    shown = fixture.tree.attributes(fixture.hold(SEALED, "s-t01000-7"))
    assert shown.mode == stat.S_IFREG | 0o444
    assert (shown.size, shown.blocks, shown.mtime_ns, shown.links) == (513, 2, 99, 1)
    assert shown.valid_for == CACHED_FOR


@pytest.mark.parametrize(
    ("size", "blocks"), [(0, 0), (1, 1), (512, 1), (513, 2), (1 << 40, 1 << 31)]
)
def test_blocks_are_rounded_up(size: int, blocks: int) -> None:
    fixture = Fixture()
    fixture.catalog.declare(sector_file("sealed/1"), Facts(size, 1))
    assert fixture.tree.attributes(fixture.hold(SEALED, "s-t01000-1")).blocks == blocks


def test_a_file_of_unknown_facts_is_empty_and_never_cached(fixture: Fixture) -> None:
    shown = fixture.tree.attributes(fixture.hold(SEALED, "s-t01000-8"))
    assert (shown.size, shown.mtime_ns, shown.valid_for) == (0, 0, 0)


def test_a_sector_directory_and_its_files(fixture: Fixture) -> None:
    directory = fixture.hold(CACHE, "s-t01000-7")
    shown = fixture.tree.attributes(directory)
    assert (shown.mode, shown.links, shown.mtime_ns) == (stat.S_IFDIR | 0o555, 2, 77)
    assert fixture.names(directory) == [".", "..", "p_aux", "t_aux"]
    member = fixture.tree.attributes(fixture.hold(directory, "t_aux"))
    assert (member.mode, member.size, member.mtime_ns) == (stat.S_IFREG | 0o444, 1025, 12)
    assert fixture.tree.lookup(directory, b"sc-02-data") is None


def test_a_sector_directory_of_unknown_facts_is_empty_and_never_cached() -> None:
    fixture = Fixture()
    fixture.catalog.declare(sector_file("cache/7"), None)
    directory = fixture.hold(CACHE, "s-t01000-7")
    assert fixture.tree.attributes(directory).valid_for == 0
    assert fixture.names(directory) == [".", ".."]
    assert fixture.tree.lookup(directory, b"p_aux") is None


def test_links_of_type_directories_count_their_directories(fixture: Fixture) -> None:
    assert fixture.tree.attributes(CACHE).links == 3
    assert fixture.tree.attributes(SEALED).links == 2


def test_times_of_directories_move_with_their_names(fixture: Fixture) -> None:
    before = fixture.tree.attributes(SEALED).mtime_ns
    fixture.catalog.declare(sector_file("sealed/9"), None)
    after = fixture.tree.attributes(SEALED).mtime_ns
    assert after > before > 0
    assert fixture.tree.attributes(ROOT).mtime_ns == after


def test_new_content_has_a_new_inode_and_the_old_one_keeps_its_meaning(fixture: Fixture) -> None:
    old = fixture.hold(SEALED, "s-t01000-7")
    fixture.catalog.declare(sector_file("sealed/7"), Facts(700, 100))
    new = fixture.hold(SEALED, "s-t01000-7")
    assert new != old
    assert fixture.tree.attributes(old).size == 513
    assert fixture.tree.attributes(new).size == 700


def test_a_directory_keeps_its_inode_when_its_files_change(fixture: Fixture) -> None:
    directory = fixture.hold(CACHE, "s-t01000-7")
    old = fixture.hold(directory, "p_aux")
    changed = (MemberFacts("p_aux", 65, 13),)
    fixture.catalog.declare(sector_file("cache/7"), Facts(65, 78, changed))
    assert fixture.hold(CACHE, "s-t01000-7") == directory
    assert fixture.hold(directory, "p_aux") != old
    assert fixture.names(directory) == [".", "..", "p_aux"]


def test_dots_are_looked_up_too(fixture: Fixture) -> None:
    directory = fixture.hold(CACHE, "s-t01000-7")
    member = fixture.hold(directory, "p_aux")
    for number, name, expected in [
        (ROOT, ".", ROOT),
        (ROOT, "..", ROOT),
        (SEALED, "..", ROOT),
        (directory, ".", directory),
        (directory, "..", CACHE),
        (member, "..", directory),
    ]:
        assert fixture.hold(number, name) == expected


@pytest.mark.parametrize(
    "name",
    [
        b"s-t01000-7.tmp",
        b"s-f01000-7",
        b"s-t01000-07",
        b"s-t01000-9",
        b"fetching",
        b"s-t01000-7\n",
        b"s-t01000-7\x00",
        b"a\x00b",
        b"",
        b"\xff\xfe",
        b"\xc3\xa4",
        b"../sealed",
        b"s-t0" + b"9" * 200,
    ],
)
def test_names_outside_the_format_do_not_exist(fixture: Fixture, name: bytes) -> None:
    directory = fixture.hold(CACHE, "s-t01000-7")
    for parent in (ROOT, SEALED, CACHE, directory):
        assert fixture.tree.lookup(parent, name) is None


@pytest.mark.parametrize("length", [256, 300, 4096])
def test_a_name_beyond_the_limit_says_so(fixture: Fixture, length: int) -> None:
    for parent in (ROOT, SEALED):
        with pytest.raises(NameTooLong):
            fixture.tree.lookup(parent, b"x" * length)
        assert fixture.tree.lookup(parent, b"x" * 255) is None


@given(st.binary(max_size=255))
def test_no_name_crashes_the_look_up(name: bytes) -> None:
    fixture = Fixture()
    fixture.catalog.declare(sector_file("cache/7"), Facts(1089, 77, MEMBERS))
    directory = fixture.hold(CACHE, "s-t01000-7")
    for parent in (ROOT, CACHE, directory):
        found = fixture.tree.lookup(parent, name)
        assert found is None or isinstance(found, DirectoryEntry)


def test_a_file_has_no_names_below_it(fixture: Fixture) -> None:
    number = fixture.hold(SEALED, "s-t01000-7")
    assert fixture.tree.lookup(number, b"p_aux") is None
    with pytest.raises(Stale):
        fixture.tree.listing(number)


def test_a_number_nobody_holds_is_stale(fixture: Fixture) -> None:
    for call in (fixture.tree.attributes, fixture.tree.listing, fixture.tree.parent):
        with pytest.raises(Stale):
            call(123456)
    with pytest.raises(Stale):
        fixture.tree.lookup(123456, b"p_aux")


def test_a_listing_is_a_snapshot_that_can_be_continued(fixture: Fixture) -> None:
    for number in range(10, 20):
        fixture.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
    listing = fixture.tree.listing(SEALED)
    whole = list(fixture.tree.entries(listing))
    for position, _ in whole:
        rest = list(fixture.tree.entries(listing, position))
        assert rest == [pair for pair in whole if pair[0] > position]
    fixture.catalog.drop(sector_file("sealed/10"))
    fixture.catalog.declare(sector_file("sealed/5"), None)
    names = [entry.name for _, entry in fixture.tree.entries(listing)]
    assert "s-t01000-10" not in names
    assert "s-t01000-5" not in names
    assert len(names) == 2 + 11


def test_listing_counts_only_hashed_inodes(fixture: Fixture) -> None:
    listed = dict(fixture.tree.entries(fixture.tree.listing(ROOT)))
    assert all(entry.key is None for entry in listed.values())
    directory = fixture.hold(CACHE, "s-t01000-7")
    keys = [entry.key for _, entry in fixture.tree.entries(fixture.tree.listing(directory))]
    assert keys[:2] == [None, None]
    assert [key.member for key in keys[2:] if key] == ["p_aux", "t_aux"]


def test_a_directory_that_vanished_lists_nothing(fixture: Fixture) -> None:
    directory = fixture.hold(CACHE, "s-t01000-7")
    fixture.catalog.drop(sector_file("cache/7"))
    assert fixture.names(directory) == [".", ".."]


def test_current_is_what_a_name_stands_for_now(fixture: Fixture) -> None:
    assert fixture.tree.current(SectorFile(FileType.SEALED, SectorID(1, 1))) is None
    file = sector_file("sealed/7")
    assert fixture.tree.current(file) == InodeKey(file, None, Content(513, 99))
    assert fixture.tree.current(sector_file("cache/7"), "nothing") is None


def test_declared_is_what_one_storage_said(fixture: Fixture) -> None:
    file = sector_file("sealed/7")
    fixture.catalog.declare(file, Facts(513, 5), SLOW, primary=False)
    assert fixture.tree.declared(file, None, HERE) == Content(513, 99)
    assert fixture.tree.declared(file, None, SLOW) == Content(513, 5)
    assert fixture.tree.declared(file, None, StorageID("other")) is None
    assert fixture.tree.declared(sector_file("cache/7"), "p_aux", HERE) == Content(64, 11)
    assert fixture.tree.declared(sector_file("cache/7"), "nothing", HERE) is None
    assert fixture.tree.declared(sector_file("sealed/99"), None, HERE) is None


def status(name: str, capacity: int, available: int) -> StorageStatus:
    return StorageStatus(
        info=StorageInfo(storage=StorageID(name)),
        stat=FsStat(capacity=capacity, available=available),
        error="",
        last_heartbeat_ns=0,
        heartbeat_age=0,
    )


def test_space_counts_a_shared_file_system_once() -> None:
    storages = [status("a", 100, 10), status("b", 100, 10), status("c", 7, 3), status("d", 7, 3)]
    filesystems = {StorageID("a"): 1, StorageID("b"): 1}
    total = space(storages, filesystems.get)
    assert (total.capacity, total.available) == (114, 16)


def test_space_of_nothing_is_nothing_and_nonsense_counts_as_nothing() -> None:
    assert space([], lambda storage: None).capacity == 0
    assert space([status("a", -5, -5)], lambda storage: None).available == 0


def test_the_real_catalog_fits() -> None:
    catalog = Catalog()
    inodes = InodeTable()
    tree = Tree(catalog, inodes)
    notifications = Notifications(inodes, shown_types=tree.shown_types)
    notifications.start()
    file = sector_file("update-cache/7")
    declared = Declaration(file, HERE, True, Facts(1089, 77, MEMBERS))
    changes = Changes(epoch="e", seq=1, declared=(declared,))
    notifications.changed(catalog.apply(changes, now_ns=5, now=0))
    found = tree.lookup(ROOT, b"update-cache")
    assert found is not None
    assert (found.attributes.links, found.attributes.mtime_ns) == (3, 5)
    assert tree.current(file, "p_aux") == InodeKey(file, "p_aux", Content(64, 11))
    taken = notifications.take()
    assert taken is not None
    assert ForgetName(ROOT, b"update-cache") in list(taken)
