"""What the kernel is told to forget, and that the queue of it stays small and loses nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest

from sectorfs.fuse.inodes import ROOT, Content, InodeKey, InodeTable, type_number
from sectorfs.fuse.notifications import (
    MISSED_FOR,
    ForgetDirectory,
    ForgetName,
    ForgetPages,
    Notice,
    Notifications,
    deliver,
)
from sectorfs.fuse.tree import Tree
from sectorfs.types import Facts, FileType, MemberFacts
from tests.mount_fixtures import Changed, DictCatalog, sector_file

SEALED = type_number(FileType.SEALED)
CACHE = type_number(FileType.CACHE)
UPDATE = type_number(FileType.UPDATE)
OLD = MemberFacts("p_aux", 64, 1)
NEW = MemberFacts("p_aux", 64, 2)
GONE = MemberFacts("sc-02", 8, 1)
SAME = MemberFacts("t_aux", 8, 1)


class Fixture:
    def __init__(self, limit: int = 100, missed_limit: int = 100) -> None:
        self.catalog = DictCatalog()
        self.inodes = InodeTable()
        self.now = 1000.0
        tree = Tree(self.catalog, self.inodes)
        self.notifications = Notifications(
            self.inodes,
            shown_types=tree.shown_types,
            limit=limit,
            missed_limit=missed_limit,
            clock=lambda: self.now,
        )
        self.notifications.start()

    def hold(self, text: str, content: Content | None = None) -> int:
        """Have the kernel know a file."""
        return self.inodes.look_up(InodeKey(sector_file(text), None, content))

    def changed(self, *changes: Changed) -> list[Notice]:
        """What the kernel is told of changes."""
        self.notifications.changed(changes)
        return self.taken()

    def taken(self) -> list[Notice]:
        notices: Iterable[Notice] | None = self.notifications.take(0)
        assert notices is not None
        return list(notices)


@pytest.fixture
def fixture() -> Fixture:
    return Fixture()


def test_a_name_that_appears_changes_its_directories(fixture: Fixture) -> None:
    change = fixture.catalog.declare(sector_file("sealed/7"), Facts(1, 1))
    assert fixture.changed(change) == [ForgetDirectory(SEALED), ForgetDirectory(ROOT)]


def test_the_pages_of_a_file_that_was_repaired_are_forgotten(fixture: Fixture) -> None:
    content = Content(10, 1)
    number = fixture.hold("sealed/7", content)
    fixture.notifications.forget_pages(sector_file("sealed/7"), None, content)
    assert fixture.taken() == [ForgetPages(number)]
    fixture.notifications.forget_pages(sector_file("sealed/8"), None, content)
    fixture.notifications.forget_pages(sector_file("sealed/7"), None, Content(10, 2))
    assert fixture.taken() == [], "the kernel knows none of these"


def test_a_name_that_was_missed_is_forgotten_when_it_appears(fixture: Fixture) -> None:
    fixture.notifications.missed(SEALED, b"s-t01000-7")
    fixture.notifications.missed(CACHE, b"s-t01000-8")
    change = fixture.catalog.declare(sector_file("sealed/7"), Facts(1, 1))
    assert ForgetName(SEALED, b"s-t01000-7") in fixture.changed(change)
    change = fixture.catalog.declare(sector_file("cache/8"), Facts(1, 1))
    assert ForgetName(CACHE, b"s-t01000-8") in fixture.changed(change)


@pytest.mark.parametrize(
    ("passed", "told"), [(0, True), (MISSED_FOR, True), (MISSED_FOR * 2, False), (1e6, False)]
)
def test_a_name_counts_as_missed_for_a_while(fixture: Fixture, passed: float, told: bool) -> None:
    fixture.notifications.missed(SEALED, b"s-t01000-7")
    fixture.now += passed
    change = fixture.catalog.declare(sector_file("sealed/7"), Facts(1, 1))
    assert (ForgetName(SEALED, b"s-t01000-7") in fixture.changed(change)) == told


def test_too_many_missed_names_are_not_told_apart() -> None:
    fixture = Fixture(missed_limit=5)
    for number in range(6):
        fixture.notifications.missed(SEALED, b"s-t01000-%d" % number)
    change = fixture.catalog.declare(sector_file("sealed/77"), Facts(1, 1))
    assert ForgetName(SEALED, b"s-t01000-77") in fixture.changed(change)
    fixture.now += MISSED_FOR * 2
    change = fixture.catalog.declare(sector_file("sealed/78"), Facts(1, 1))
    assert ForgetName(SEALED, b"s-t01000-78") not in fixture.changed(change)


def test_a_thousand_names_are_one_piece_of_news(fixture: Fixture) -> None:
    changes = [
        fixture.catalog.declare(sector_file(f"{folder}/{number}"), Facts(1, 1))
        for number in range(1000)
        for folder in ("sealed", "cache")
    ]
    assert fixture.changed(*changes) == [
        ForgetDirectory(SEALED),
        ForgetDirectory(CACHE),
        ForgetDirectory(ROOT),
    ]


def test_a_dropped_name_is_forgotten_by_a_kernel_that_holds_it(fixture: Fixture) -> None:
    for text in ("sealed/7", "sealed/8", "cache/7", "cache/8"):
        fixture.catalog.declare(sector_file(text), Facts(1, 1))
    fixture.hold("sealed/7", Content(1, 1))
    fixture.hold("cache/7")
    texts = ("sealed/7", "sealed/8", "cache/7", "cache/8")
    taken = fixture.changed(*[fixture.catalog.drop(sector_file(text)) for text in texts])
    assert [notice for notice in taken if isinstance(notice, ForgetName)] == [
        ForgetName(SEALED, b"s-t01000-7"),
        ForgetName(CACHE, b"s-t01000-7"),
    ]
    assert {ForgetDirectory(SEALED), ForgetDirectory(CACHE), ForgetDirectory(ROOT)} < set(taken)


def test_new_facts_concern_one_name_and_no_directory(fixture: Fixture) -> None:
    fixture.catalog.declare(sector_file("sealed/7"), Facts(1, 1))
    change = fixture.catalog.declare(sector_file("sealed/7"), Facts(2, 2))
    assert fixture.changed(change) == [], "the kernel does not know it"
    fixture.hold("sealed/7", Content(2, 2))
    change = fixture.catalog.declare(sector_file("sealed/7"), Facts(3, 3))
    assert fixture.changed(change) == [ForgetName(SEALED, b"s-t01000-7")]


def test_facts_that_become_known_concern_the_name(fixture: Fixture) -> None:
    fixture.catalog.declare(sector_file("sealed/7"), None)
    fixture.hold("sealed/7")
    change = fixture.catalog.declare(sector_file("sealed/7"), Facts(3, 3))
    assert fixture.changed(change) == [ForgetName(SEALED, b"s-t01000-7")]


def test_new_facts_of_a_directory_concern_the_files_that_changed(fixture: Fixture) -> None:
    file = sector_file("cache/7")
    fixture.catalog.declare(file, Facts(3, 1, (OLD, GONE, SAME)))
    directory = fixture.inodes.look_up(InodeKey(file))
    fixture.notifications.changed([fixture.catalog.declare(file, Facts(3, 2, (NEW, SAME)))])
    assert fixture.taken() == [
        ForgetDirectory(directory),
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
    assert fixture.taken() == [ForgetDirectory(directory), ForgetName(directory, b"p_aux")]


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
    for number in range(50):
        change = fixture.catalog.declare(sector_file(f"sealed/{number}"), Facts(1, 1))
        fixture.notifications.changed([change])
        fixture.notifications.forget_name(sector_file("sealed/7"))
    assert len(fixture.taken()) == 3


def test_an_overflow_becomes_forget_everything() -> None:
    fixture = Fixture(limit=10)
    held = sector_file("sealed/5")
    directory, member = sector_file("cache/6"), MemberFacts("p_aux", 1, 1)
    fixture.inodes.look_up(InodeKey(held, None, Content(1, 1)))
    above = fixture.inodes.look_up(InodeKey(directory))
    fixture.inodes.look_up(InodeKey(directory, member.name, Content(1, 1)))
    for number in range(1000):
        fixture.notifications.missed(SEALED, b"s-t01000-%d" % number)
    fixture.notifications.changed(
        fixture.catalog.declare(sector_file(f"sealed/{number}"), None) for number in range(1000)
    )
    taken = fixture.taken()
    for file_type in FileType:
        assert ForgetName(ROOT, file_type.dir_name.encode()) in taken
        assert ForgetDirectory(type_number(file_type)) in taken
    assert ForgetDirectory(ROOT) in taken
    assert ForgetDirectory(above) in taken
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


class Impatient(Notifications):
    """Ends where the thread would wait for news; time passes where it would wait for that."""

    now = 0.0

    def take(self, patience: float | None = None) -> Iterator[Notice] | None:
        if not self._queue:
            self.now += patience or 0
        return super().take(0) if patience is not None or self._queue else None


def repeated(inodes: InodeTable, notice: ForgetDirectory, known_after: int) -> list[float]:
    """When a notice is sent to a kernel that knows what it is about after so many of them."""
    notifications = Impatient(inodes, shown_types=tuple)
    notifications.start()
    notifications._put([notice])
    sent: list[float] = []

    def send(taken: Notice) -> bool:
        assert taken == notice
        sent.append(notifications.now)
        return len(sent) > known_after

    deliver(notifications, send, pauses=(1, 2, 4), clock=lambda: notifications.now)
    return sent


@pytest.mark.parametrize(
    ("known_after", "times"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 3, 7]), (9, [0, 1, 3, 7])]
)
def test_news_of_a_directory_that_is_being_looked_up_are_repeated(
    known_after: int, times: list[float]
) -> None:
    inodes = InodeTable()
    held = inodes.look_up(InodeKey(sector_file("cache/7")))
    for number in (held, SEALED, ROOT):
        assert repeated(inodes, ForgetDirectory(number), known_after) == times


def test_news_of_what_nobody_holds_are_told_once() -> None:
    assert repeated(InodeTable(), ForgetDirectory(12345), 9) == [0]


def test_newer_news_of_a_directory_take_the_place_of_repeated_ones() -> None:
    notifications = Impatient(InodeTable(), shown_types=tuple)
    notifications.start()
    notifications._put([ForgetDirectory(SEALED)])
    sent: list[float] = []

    def send(notice: Notice) -> bool:
        sent.append(notifications.now)
        if len(sent) == 2:
            notifications._put([ForgetDirectory(SEALED)])
        return False

    deliver(notifications, send, pauses=(1, 2), clock=lambda: notifications.now)
    assert sent == [0, 1, 1, 2, 4]


def test_nothing_is_sent_after_the_end() -> None:
    notifications = Impatient(InodeTable(), shown_types=tuple)
    notifications.start()
    notifications._put([ForgetDirectory(SEALED), ForgetDirectory(CACHE)])
    sent: list[Notice] = []

    def send(notice: Notice) -> bool:
        sent.append(notice)
        notifications.close()
        return True

    deliver(notifications, send)
    assert sent == [ForgetDirectory(SEALED)]
