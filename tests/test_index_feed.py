"""Following an index: loading, changes, an Index that goes away, comes back, or is another one."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from prometheus_client import REGISTRY

from sectorfs.errors import SectorFSError, TimedOut, Unauthorized, Unreachable
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.feed import PAGE, SNAPSHOT_PAGE, Feed
from sectorfs.index.merge import SLICE
from sectorfs.index.protocol import (
    Changes,
    HealthReport,
    PackedPage,
    SectorIndex,
    StorageStatus,
)
from sectorfs.types import FileType, SectorFile, StorageID
from tests.index_fixtures import STAT, Clock, file, held, info, key, open_index


class Wire:
    """What lies between a node and its index: can fail, and can be plugged into another one."""

    def __init__(self, index: SectorIndex) -> None:
        self.index = index
        self.failure: Exception | None = None
        self.asked: list[tuple[float, str]] = []

    def _ask(self, what: str) -> SectorIndex:
        self.asked.append((trio.current_time(), what))
        if self.failure is not None:
            raise self.failure
        return self.index

    async def packed(self, *, after: SectorFile | None = None, limit: int = 1000) -> PackedPage:
        return await self._ask("snapshot").packed(after=after, limit=limit)

    async def changes(self, epoch: str, seq: int, *, wait: float = 0, limit: int = 1000) -> Changes:
        index = self._ask("changes")
        answer = await index.changes(epoch, seq, wait=wait, limit=limit)
        if self.failure is not None:
            raise self.failure
        return answer

    async def storages(self) -> list[StorageStatus]:
        return await self._ask("storages").storages()


class Node:
    """A feed with everything around it."""

    def __init__(self, index: SectorIndex) -> None:
        self.index = index
        self.wire = Wire(index)
        self.catalog = Catalog()
        self.found: list[FileChange] = []
        self.now: float | None = None  # a time of the test's own
        self.feed = Feed(
            self.wire,
            self.catalog,
            heartbeat=10,
            on_change=self.found.extend,
            clock=lambda: trio.current_time() if self.now is None else self.now,
            clock_ns=Clock(),
        )

    async def caught_up(self) -> None:
        await self.feed.wait_seq((await self.index.snapshot()).seq)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        yield Node(index)


async def steps(node: Node, count: int = 1) -> None:
    for _ in range(count):
        await node.feed.step(wait=0)


async def test_first_step_loads_and_later_ones_follow(node: Node) -> None:
    await node.index.declare([held("a", 1)])
    await steps(node)
    assert node.catalog.loaded
    assert tuple(node.catalog.sectors(FileType.SEALED)) == (file(1).sector,)
    await node.index.declare([held("a", 2)])
    await node.index.drop([key("a", 1)])
    await steps(node)
    assert tuple(node.catalog.sectors(FileType.SEALED)) == (file(2).sector,)
    assert [(one.file, one.appeared, one.vanished) for one in node.found] == [
        (file(1), True, False),
        (file(2), True, False),
        (file(1), False, True),
    ]


async def test_more_than_a_page_is_loaded_and_followed(node: Node) -> None:
    count = 2 * SNAPSHOT_PAGE + 7
    await node.index.declare([held("a", number) for number in range(count)])
    await steps(node)
    assert len(node.catalog) == count
    await node.index.declare([held("a", count + number) for number in range(count)])
    await steps(node, count // PAGE + 1)
    assert len(node.catalog) == 2 * count
    await node.index.drop([key("a", number) for number in range(count)])
    await steps(node, count // PAGE + 1)
    assert [one.number for one in node.catalog.sectors(FileType.SEALED)] == list(
        range(count, 2 * count)
    )
    assert len(node.found) == 3 * count


async def test_detaching_a_large_storage_yields_to_the_loop(node: Node) -> None:
    await node.index.attach(info("b"), STAT)
    await node.index.declare([held("a", number) for number in range(2000)])
    await node.index.declare([held("b", number) for number in range(5)])
    await steps(node)
    node.found.clear()
    await node.index.detach(StorageID("a"), info("a").urls[0])
    sizes: list[int] = []

    async def watch() -> None:
        while node.catalog.storage(StorageID("a")) is not None:
            sizes.append(len(node.catalog))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await steps(node)
    assert len(set(sizes)) > 4
    assert len(node.catalog) == 5
    assert sum(one.vanished for one in node.found) == 1995


async def sizes_during(node: Node, count: int) -> list[int]:
    """How many sector files there were at each moment of a step at which others could look."""
    sizes = [len(node.catalog)]

    async def watch() -> None:
        while True:
            sizes.append(len(node.catalog))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await steps(node, count)
        nursery.cancel_scope.cancel()
    return [*sizes, len(node.catalog)]


def longest(sizes: list[int]) -> int:
    """Of two steps: the one who watches may miss one."""
    return max(abs(later - earlier) for earlier, later in pairwise(sizes))


async def test_load_and_reload_never_do_much_at_once(node: Node) -> None:
    count = 4 * SNAPSHOT_PAGE
    await node.index.declare([held("a", number) for number in range(count)])
    loading = await sizes_during(node, 1)
    assert (loading[0], loading[-1]) == (0, count)
    assert longest(loading) <= 2 * SNAPSHOT_PAGE
    # More changes than are kept, so that a new snapshot is taken; it lacks nearly everything.
    await node.index.drop([key("a", number) for number in range(count) if number % 1000])
    node.found.clear()
    reloading = await sizes_during(node, 2)
    assert (reloading[0], reloading[-1]) == (count, count // 1000)
    assert longest(reloading) <= 2 * SLICE
    assert len(node.found) == count - count // 1000
    assert all(one.vanished for one in node.found)


async def test_cancelled_reload_begins_anew(node: Node) -> None:
    await node.index.declare([held("a", number) for number in range(3000)])
    await steps(node)
    await node.index.drop([key("a", number) for number in range(2, 3000)])
    await steps(node)
    with trio.CancelScope() as scope:
        node.feed._on_change = lambda found: scope.cancel()
        await steps(node)
    assert 2 < len(node.catalog) < 3000
    await node.index.declare([held("a", 4000)])
    await steps(node)
    numbers = [one.number for one in node.catalog.sectors(FileType.SEALED)]
    assert numbers == [0, 1, 4000]
    assert node.catalog.seq == (await node.index.snapshot()).seq


async def test_cancelled_step_is_made_up_for(node: Node) -> None:
    await steps(node)
    await node.index.declare([held("a", number) for number in range(PAGE)])
    with trio.CancelScope() as scope:
        node.feed._on_change = lambda found: scope.cancel()
        await steps(node)
    assert 0 < len(node.catalog) < PAGE
    assert node.catalog.seq == 1
    await steps(node)
    assert len(node.catalog) == PAGE


async def test_cancelled_load_begins_anew(node: Node) -> None:
    await node.index.declare([held("a", number) for number in range(2 * SNAPSHOT_PAGE)])
    with trio.CancelScope() as scope:
        node.feed._on_change = lambda found: scope.cancel()
        await steps(node)
    assert not node.catalog.loaded
    await node.index.drop([key("a", 0)])
    await steps(node)
    assert len(node.catalog) == 2 * SNAPSHOT_PAGE - 1


async def test_pruned_changes_are_made_up_for_by_a_snapshot(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db", keep_changes=3) as index:
        node = Node(index)
        await index.attach(info("a"), STAT)
        await index.declare([held("a", 1)])
        await steps(node)
        await index.declare([held("a", number) for number in range(1, 9)])
        await index.drop([key("a", 1)])
        node.found.clear()
        await steps(node, 2)
        assert [one.number for one in node.catalog.sectors(FileType.SEALED)] == list(range(2, 9))
        assert len(node.found) == 8


async def look(node: Node, at: float) -> None:
    """Look at an Index that was replaced, so many seconds after the first look; begins at 0."""
    node.now = at
    with trio.move_on_after(0.2):  # it rests after a look that did not content it
        await steps(node)


async def test_another_index_is_taken_over_without_a_gap(node: Node, tmp_path: Path) -> None:
    await node.index.declare([held("a", 1), held("a", 2)])
    await steps(node)
    node.found.clear()
    async with open_index(tmp_path / "other.db") as other:
        await other.attach(info("b"), STAT)
        await other.declare([held("b", 2), held("b", 3)])
        node.wire.index = other
        await look(node, 0)
        for at in (0, 20, 59):  # storage a may still come
            await look(node, at)
            assert tuple(node.catalog.sectors(FileType.SEALED)) == (file(1).sector, file(2).sector)
        await look(node, 60)
    assert [(one.file, one.vanished) for one in node.found] == [(file(1), True), (file(3), False)]
    assert [one.info.storage for one in node.catalog.storages()] == ["b"]


async def test_an_index_that_comes_back_empty_never_empties_the_tree(
    node: Node, tmp_path: Path
) -> None:
    await node.index.attach(info("b"), STAT)
    await node.index.declare([held("a", 1), held("b", 2)])
    await steps(node)
    node.found.clear()
    async with open_index(tmp_path / "other.db") as other:
        node.wire.index = other
        await look(node, 0)
        await look(node, 1)
        await other.attach(info("a"), STAT)
        await other.declare([held("a", 1)])
        await look(node, 15)  # quiet for long, but b is missing
        await other.attach(info("b"), STAT)
        await look(node, 16)
        await look(node, 25)  # there, but it may still be declaring
        await other.declare([held("b", 2)])
        await look(node, 26)
        await look(node, 35)
        assert node.catalog.epoch != (await other.snapshot()).epoch
        await look(node, 36)
        assert node.catalog.epoch == (await other.snapshot()).epoch
        await other.declare([held("b", 3)])
        node.now = None
        await steps(node)
    assert [(one.file, one.appeared) for one in node.found] == [(file(3), True)]


async def test_an_index_replaced_twice_is_given_its_own_time(node: Node, tmp_path: Path) -> None:
    await steps(node)
    async with open_index(tmp_path / "b.db") as second, open_index(tmp_path / "c.db") as third:
        node.wire.index = second
        await look(node, 0)
        await look(node, 59)
        node.wire.index = third
        await look(node, 60)
        await look(node, 119)
        assert [one.info.storage for one in node.catalog.storages()] == ["a"]
        await look(node, 120)
        assert not node.catalog.storages()


async def test_index_replaced_between_two_pages(node: Node, tmp_path: Path) -> None:
    await node.index.declare([held("a", number) for number in range(SNAPSHOT_PAGE + 1)])
    async with open_index(tmp_path / "other.db") as other:
        await other.attach(info("b"), STAT)
        await other.declare([held("b", number) for number in range(SNAPSHOT_PAGE + 10)])
        node.feed._on_change = lambda found: setattr(node.wire, "index", other)
        await steps(node)
        assert not node.catalog.loaded
        await steps(node)
        assert len(node.catalog) == SNAPSHOT_PAGE + 10


async def test_index_that_repeats_a_page_is_not_followed_for_ever(node: Node) -> None:
    await node.index.declare([held("a", number) for number in range(SNAPSHOT_PAGE + 1)])
    page = await node.index.packed(limit=SNAPSHOT_PAGE)

    class Repeating(Wire):
        async def packed(self, *, after: SectorFile | None = None, limit: int = 1000) -> PackedPage:
            await trio.lowlevel.checkpoint()
            return page

    node.feed.index = Repeating(node.index)
    with pytest.raises(Unreachable, match="repeats"):
        await steps(node)


async def test_heartbeats_are_fetched_now_and_then(
    node: Node, autojump_clock: trio.testing.MockClock
) -> None:
    await steps(node)
    await node.index.report_health(StorageID("a"), HealthReport(stat=STAT))
    async with trio.open_nursery() as nursery:
        await nursery.start(node.feed.run)
        await trio.sleep(34)
        nursery.cancel_scope.cancel()
    asked = [when for when, what in node.wire.asked if what == "storages"]
    assert [round(when - asked[0]) for when in asked] == [0, 10, 20]
    assert node.feed.age == pytest.approx(4)


async def test_run_starts_loaded_and_sees_a_declaration_at_once(node: Node) -> None:
    await node.index.declare([held("a", 1)])
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(node.feed.run)
            assert node.catalog.loaded
            assert node.feed.connected
            await node.index.declare([held("a", 2)])
            await node.feed.wait_until(lambda catalog: catalog.entry(file(2)) is not None)
            await node.index.drop([key("a", 2)])
            await node.caught_up()
            assert node.catalog.entry(file(2)) is None
            nursery.cancel_scope.cancel()


async def test_index_away_keeps_the_tree_and_is_asked_ever_more_seldom(
    node: Node, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await node.index.declare([held("a", 1)])
    async with trio.open_nursery() as nursery:
        await nursery.start(node.feed.run)
        await trio.testing.wait_all_tasks_blocked()
        node.wire.failure = Unreachable("connection refused", "http://index")
        await trio.sleep(100)
        assert not node.feed.connected
        assert REGISTRY.get_sample_value("sectorfs_index_connected") == 0
        assert node.feed.age > 80
        assert len(node.catalog) == 1
        await node.index.declare([held("a", 2)])
        asked = [when for when, what in node.wire.asked if what != "snapshot"]
        gaps = [later - earlier for earlier, later in pairwise(asked)]
        gaps[0] -= 10  # the first question was still waiting for changes
        for gap, longest in zip(gaps, [0.5, 1, 2, 4, *[5] * 100], strict=False):
            assert longest / 2 <= gap <= longest + 0.001
        assert len(gaps) > 15
        node.wire.failure = None
        await node.caught_up()
        assert len(node.catalog) == 2
        assert node.feed.connected
        assert REGISTRY.get_sample_value("sectorfs_index_connected") == 1
        nursery.cancel_scope.cancel()
    texts = [record.getMessage() for record in caplog.records if "Index" in record.getMessage()]
    assert len(texts) == 2
    assert "connection refused" in texts[0]
    assert texts[1] == "the Index answers again"
    assert [what for _, what in node.wire.asked].count("snapshot") == 1


@pytest.mark.parametrize(
    "failure", [Unreachable("away"), TimedOut("slow"), Unauthorized("no token")]
)
async def test_run_starts_without_an_index(
    node: Node, failure: SectorFSError, autojump_clock: trio.testing.MockClock
) -> None:
    node.wire.failure = failure
    async with trio.open_nursery() as nursery:
        await nursery.start(node.feed.run)
        assert not node.catalog.loaded
        assert node.feed.age == float("inf")
        node.wire.failure = None
        await node.feed.wait_seq(1)
        assert node.catalog.loaded
        nursery.cancel_scope.cancel()


async def test_refused_token_is_logged_once_and_tried_again(
    node: Node, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await steps(node)
    node.wire.failure = Unauthorized("the token is not accepted")
    node.wire.asked.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.feed.run)
        await trio.sleep(40)
        node.wire.failure = TimedOut("slow")
        await trio.sleep(40)
        nursery.cancel_scope.cancel()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    gaps = [
        later[0] - earlier[0]
        for earlier, later in zip(node.wire.asked, node.wire.asked[1:], strict=False)
    ]
    assert all(gap >= 0.25 for gap in gaps)
    assert len(node.wire.asked) < 80


async def test_bug_is_logged_and_does_not_end_the_feed(
    node: Node, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(node.feed.run)
        node.wire.failure = RuntimeError("a bug")
        await trio.sleep(60)
        node.wire.failure = None
        await node.index.declare([held("a", 1)])
        await node.caught_up()
        nursery.cancel_scope.cancel()
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].exc_info is not None
