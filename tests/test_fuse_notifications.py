"""What the kernel is told to forget, and that the queue of it stays small and loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

from sectorfs.fuse.inodes import ROOT, Content, InodeKey, InodeTable, type_number
from sectorfs.fuse.notifications import (
    ForgetAttributes,
    ForgetName,
    Notice,
    Notifications,
)
from sectorfs.fuse.tree import Tree
from sectorfs.types import Facts, FileType, MemberFacts
from tests.mount_fixtures import DictCatalog, sector_file

SEALED = type_number(FileType.SEALED)
CACHE = type_number(FileType.CACHE)
UPDATE = type_number(FileType.UPDATE)
OLD = MemberFacts("p_aux", 64, 1)
NEW = MemberFacts("p_aux", 64, 2)
GONE = MemberFacts("sc-02", 8, 1)
SAME = MemberFacts("t_aux", 8, 1)


class Fixture:
    def __init__(self, limit: int = 100) -> None:
        self.catalog = DictCatalog()
        self.inodes = InodeTable()
        tree = Tree(self.catalog, self.inodes)
        self.notifications = Notifications(self.inodes, shown_types=tree.shown_types, limit=limit)
        self.notifications.start()

    def taken(self) -> list[Notice]:
        notices: Iterable[Notice] | None = self.notifications.take()
        assert notices is not None
        return list(notices)


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def test_a_new_name_is_forgotten_as_missing_and_its_directories_change(fixture: Fixture) -> None:
    fixture.notifications.changed([fixture.catalog.declare(sector_file("sealed/7"), Facts(1, 1))])
    assert set(fixture.taken()) == {
        ForgetName(SEALED, b"s-t01000-7"),
        ForgetAttributes(SEALED),
        ForgetAttributes(ROOT),
    }


def test_a_dropped_name_is_forgotten(fixture: Fixture) -> None:
    fixture.catalog.declare(sector_file("sealed/7"), Facts(1, 1))
    fixture.notifications.changed([fixture.catalog.drop(sector_file("sealed/7"))])
    assert set(fixture.taken()) == {
        ForgetName(SEALED, b"s-t01000-7"),
        ForgetAttributes(SEALED),
        ForgetAttributes(ROOT),
    }


def test_new_facts_concern_one_name(fixture: Fixture) -> None:
    fixture.catalog.declare(sector_file("sealed/7"), Facts(1, 1))
    fixture.notifications.changed([fixture.catalog.declare(sector_file("sealed/7"), Facts(2, 2))])
    assert fixture.taken() == [ForgetName(SEALED, b"s-t01000-7")]


def test_new_facts_of_a_directory_concern_the_files_that_changed(fixture: Fixture) -> None:
    file = sector_file("cache/7")
    fixture.catalog.declare(file, Facts(3, 1, (OLD, GONE, SAME)))
    directory = fixture.inodes.look_up(InodeKey(file))
    fixture.notifications.changed([fixture.catalog.declare(file, Facts(3, 2, (NEW, SAME)))])
    assert fixture.taken() == [
        ForgetAttributes(directory),
        ForgetName(directory, b"p_aux"),
        ForgetName(directory, b"sc-02"),
    ]


def test_a_directory_the_kernel_never_saw_is_left_alone(fixture: Fixture) -> None:
    file = sector_file("cache/7")
    fixture.catalog.declare(file, Facts(3, 1, (OLD,)))
    change = fixture.catalog.declare(file, Facts(3, 2, (NEW,)))
    fixture.notifications.changed([change])
    fixture.notifications.forget_name(file, "p_aux")
    fixture.notifications.forget_name(file)
    assert fixture.taken() == [ForgetName(CACHE, b"s-t01000-7")]


def test_facts_that_become_known_concern_every_file(fixture: Fixture) -> None:
    file = sector_file("cache/7")
    fixture.catalog.declare(file, None)
    directory = fixture.inodes.look_up(InodeKey(file))
    fixture.notifications.changed([fixture.catalog.declare(file, Facts(3, 2, (NEW,)))])
    assert fixture.taken() == [ForgetAttributes(directory), ForgetName(directory, b"p_aux")]


def test_a_type_that_comes_or_goes_is_forgotten_in_the_root_and_only_then(
    fixture: Fixture,
) -> None:
    first, second = sector_file("update/1"), sector_file("update/2")
    name = ForgetName(ROOT, b"update")
    fixture.notifications.changed([fixture.catalog.declare(first, None)])
    assert name in fixture.taken()
    fixture.notifications.changed([fixture.catalog.declare(second, None)])
    assert name not in fixture.taken()
    fixture.notifications.changed([fixture.catalog.drop(first)])
    assert name not in fixture.taken()
    fixture.notifications.changed([fixture.catalog.drop(second)])
    assert name in fixture.taken()


def test_one_name_asked_for_by_hand(fixture: Fixture) -> None:
    file = sector_file("cache/7")
    directory = fixture.inodes.look_up(InodeKey(file))
    fixture.notifications.forget_name(file, "p_aux")
    fixture.notifications.forget_name(sector_file("sealed/7"))
    assert fixture.taken() == [
        ForgetName(directory, b"p_aux"),
        ForgetName(SEALED, b"s-t01000-7"),
    ]


def test_equal_notices_wait_once(fixture: Fixture) -> None:
    for size in range(50):
        change = fixture.catalog.declare(sector_file("sealed/7"), Facts(size, 1))
        fixture.notifications.changed([change])
    assert len(fixture.taken()) == 3


def test_an_overflow_becomes_forget_everything() -> None:
    fixture = Fixture(limit=10)
    held = sector_file("sealed/5")
    directory, member = sector_file("cache/6"), MemberFacts("p_aux", 1, 1)
    fixture.inodes.look_up(InodeKey(held, None, Content(1, 1)))
    above = fixture.inodes.look_up(InodeKey(directory))
    fixture.inodes.look_up(InodeKey(directory, member.name, Content(1, 1)))
    fixture.notifications.changed(
        fixture.catalog.declare(sector_file(f"sealed/{number}"), None) for number in range(1000)
    )
    taken = fixture.taken()
    for file_type in FileType:
        assert ForgetName(ROOT, file_type.dir_name.encode()) in taken
        assert ForgetAttributes(type_number(file_type)) in taken
    assert ForgetAttributes(ROOT) in taken
    assert ForgetAttributes(above) in taken
    assert ForgetName(SEALED, b"s-t01000-5") in taken
    assert ForgetName(CACHE, b"s-t01000-6") in taken
    assert ForgetName(above, b"p_aux") in taken
    fixture.notifications.forget_name(held)
    assert fixture.taken() == [ForgetName(SEALED, b"s-t01000-5")], "afterwards as before"


def test_news_during_an_overflow_are_not_lost() -> None:
    fixture = Fixture(limit=1)
    held = fixture.inodes.look_up(InodeKey(sector_file("sealed/5"), None, Content(1, 1)))
    for number in range(5):
        fixture.notifications.forget_name(sector_file(f"sealed/{number}"))
    sweep = fixture.notifications.take()
    assert sweep is not None
    next(iter(sweep))
    fixture.inodes.forget([(held, 1)])
    fixture.notifications.forget_name(sector_file("sealed/9"))
    list(sweep)
    assert fixture.taken() == [ForgetName(SEALED, b"s-t01000-9")]


def test_taking_waits_for_the_start_and_ends_with_close() -> None:
    catalog = DictCatalog()
    inodes = InodeTable()
    notifications = Notifications(inodes, shown_types=Tree(catalog, inodes).shown_types)
    taken: list[Notice] = []
    first, done = threading.Event(), threading.Event()

    def worker() -> None:
        while (notices := notifications.take()) is not None:
            taken.extend(notices)
            first.set()
        done.set()

    thread = threading.Thread(target=worker)
    thread.start()
    notifications.forget_name(sector_file("sealed/7"))
    assert not first.wait(0.05)
    notifications.start()
    assert first.wait(5)
    assert taken == [ForgetName(SEALED, b"s-t01000-7")]
    assert not notifications.closed
    notifications.close()
    assert done.wait(5)
    thread.join()
    notifications.forget_name(sector_file("sealed/7"))
    assert notifications.closed
    assert notifications.take() is None
