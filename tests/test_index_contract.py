"""What every index keeps, run over the embedded one and over JSON-RPC."""

from __future__ import annotations

import math

import pytest
import trio

from sectorfs.errors import BadInput, NotFound, TooLarge
from sectorfs.index.protocol import (
    Changes,
    Declaration,
    FsStat,
    HealthReport,
    SectorIndex,
    SnapshotPage,
)
from sectorfs.types import ALL_TYPES, Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from tests.index_fixtures import (
    STAT,
    World,
    both_kinds,
    directory,
    file,
    held,
    index_of_world,
    info,
    key,
    sector,
)

world = both_kinds
index = index_of_world


async def position(index: SectorIndex) -> tuple[str, int]:
    """Where the change feed stands."""
    page = await index.snapshot()
    return page.epoch, page.seq


async def news(index: SectorIndex, since: tuple[str, int]) -> Changes:
    return await index.changes(*since)


async def everything(index: SectorIndex, limit: int) -> list[SnapshotPage]:
    pages = [await index.snapshot(limit=limit)]
    while pages[-1].after is not None:
        pages.append(await index.snapshot(after=pages[-1].after, limit=limit))
    return pages


# Storages


async def test_attached_storage_is_known_as_it_was_described(world: World) -> None:
    full = info(
        "a",
        weight=7,
        max_storage=2**62,
        can_seal=True,
        can_store=True,
        groups=("g1", "g2"),
        allow_to=("g3",),
        allow_types=("sealed", "typo"),
        deny_types=("cache",),
        allow_miners=("t01000",),
        deny_miners=("f02", "f03"),
    )
    await world.index.attach(full, STAT)
    assert await world.index.info(StorageID("a")) == full
    (status,) = await world.index.storages()
    assert status.info == full
    assert status.stat == STAT
    assert status.error == ""
    assert status.last_heartbeat_ns == world.clock.ns
    assert status.heartbeat_age == 0


async def test_attaching_again_merges_urls_and_replaces_the_rest(index: SectorIndex) -> None:
    await index.attach(info("a", urls=("http://x:1", "http://y:1"), groups=("g",)), STAT)
    await index.attach(info("a", urls=("http://z:1", "http://x:1"), weight=3), FsStat(capacity=5))
    (status,) = await index.storages()
    assert status.info == info("a", urls=("http://x:1", "http://y:1", "http://z:1"), weight=3)
    assert status.stat == FsStat(capacity=5)


async def test_attaching_the_same_again_is_a_heartbeat_and_no_change(world: World) -> None:
    await world.index.attach(info("a"), STAT)
    since = await position(world.index)
    world.clock.ns += 10**9
    await world.index.attach(info("a"), STAT)
    assert await news(world.index, since) == Changes(epoch=since[0], seq=since[1])
    (status,) = await world.index.storages()
    assert status.last_heartbeat_ns == world.clock.ns


async def test_attaching_clears_an_error_and_tells(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.report_health(StorageID("a"), HealthReport(stat=STAT, error="gone"))
    since = await position(index)
    await index.attach(info("a"), STAT)
    (status,) = (await news(index, since)).storages
    assert status.error == ""


@pytest.mark.parametrize(
    "bad",
    [
        info("no.dots"),
        info("a", urls=("ftp://x:1",)),
        info("a", urls=("http://",)),
        info("a", urls=("http://x:99999",)),
        info("a", urls=("http://x:1,http://y:1",)),
        info("a", urls=("http://x:1\n",)),
        info("a", urls=("http://x:1/a b",)),
        info("a", weight=-1),
        info("a", weight=2**63),
        info("a", max_storage=2**80),
        info("a", groups=("g,h",)),
        info("a", allow_types=("",)),
        info("a", deny_miners=("t01\x00",)),
    ],
)
async def test_storage_that_cannot_be_stored_is_refused(index: SectorIndex, bad: object) -> None:
    with pytest.raises(BadInput):
        await index.attach(bad, STAT)
    assert await index.storages() == []


@pytest.mark.parametrize("bad", [FsStat(capacity=-1), FsStat(used=2**63)])
async def test_impossible_space_is_refused(index: SectorIndex, bad: FsStat) -> None:
    with pytest.raises(BadInput):
        await index.attach(info("a"), bad)
    await index.attach(info("a"), STAT)
    with pytest.raises(BadInput):
        await index.report_health(StorageID("a"), HealthReport(stat=bad))


async def test_storages_are_in_ascending_order(index: SectorIndex) -> None:
    for name in ("b", "a", "C"):
        await index.attach(info(name), STAT)
    assert [status.info.storage for status in await index.storages()] == ["C", "a", "b"]


async def test_info_of_an_unknown_storage_is_not_found(index: SectorIndex) -> None:
    with pytest.raises(NotFound, match="a: unknown storage"):
        await index.info(StorageID("a"))


async def test_detaching_a_url_keeps_the_storage(index: SectorIndex) -> None:
    await index.attach(info("a", urls=("http://x:1", "http://y:1")), STAT)
    await index.declare([held("a", 1)])
    await index.detach(StorageID("a"), "http://x:1")
    assert (await index.info(StorageID("a"))).urls == ("http://y:1",)
    assert len(await index.sector(sector(1))) == 1


async def test_detaching_the_last_url_forgets_everything_of_the_storage(
    index: SectorIndex,
) -> None:
    for name in ("a", "b"):
        await index.attach(info(name), STAT)
        await index.declare([held(name, 1, facts=Facts(1, 2))])
    since = await position(index)
    await index.detach(StorageID("a"), info("a").urls[0])
    assert [status.info.storage for status in await index.storages()] == ["b"]
    assert await index.sector(sector(1)) == [held("b", 1, facts=Facts(1, 2))]
    found = await news(index, since)
    assert (found.detached, found.storages, found.dropped) == (("a",), (), ())
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1)])
    assert await index.sector(sector(1)) == [held("a", 1), held("b", 1, facts=Facts(1, 2))]


async def test_detaching_what_is_not_there_is_not_found(index: SectorIndex) -> None:
    with pytest.raises(NotFound):
        await index.detach(StorageID("a"), "http://x:1")
    await index.attach(info("a"), STAT)
    with pytest.raises(NotFound, match="http://a:8480/remote"):
        await index.detach(StorageID("a"), "http://x:1")
    assert (await index.info(StorageID("a"))).urls == info("a").urls


async def test_storage_without_urls_can_be_detached(index: SectorIndex) -> None:
    await index.attach(info("a", urls=()), STAT)
    await index.detach(StorageID("a"), "http://x:1")
    assert await index.storages() == []


async def test_heartbeat_is_stored_with_its_reason(world: World) -> None:
    await world.index.attach(info("a"), STAT)
    world.clock.ns += 5 * 10**9
    report = HealthReport(stat=FsStat(capacity=1), error="input/output error")
    await world.index.report_health(StorageID("a"), report)
    world.clock.ns += 2 * 10**9
    (status,) = await world.index.storages()
    assert status.stat == report.stat
    assert status.error == "input/output error"
    assert status.heartbeat_age == pytest.approx(2)
    assert not status.healthy(50)


async def test_only_another_error_text_is_a_change(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    for error, changed in (("", False), ("x", True), ("x", False), ("y", True), ("", True)):
        since = await position(index)
        await index.report_health(StorageID("a"), HealthReport(stat=FsStat(used=9), error=error))
        found = await news(index, since)
        assert [status.error for status in found.storages] == ([error] if changed else [])


async def test_heartbeat_of_an_unknown_storage_is_not_found(index: SectorIndex) -> None:
    with pytest.raises(NotFound):
        await index.report_health(StorageID("a"), HealthReport(stat=STAT))


async def test_clock_set_back_makes_no_negative_age(world: World) -> None:
    await world.index.attach(info("a"), STAT)
    world.clock.ns -= 3600 * 10**9
    (status,) = await world.index.storages()
    assert status.heartbeat_age == 0
    assert status.healthy(50)


async def test_endless_error_text_is_cut(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.report_health(StorageID("a"), HealthReport(stat=STAT, error="x" * 100_000))
    (status,) = await index.storages()
    assert len(status.error) == 4096


# Declarations


async def test_declaration_is_found_at_once_with_its_facts(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    batch = [
        held("a", 1, facts=Facts(2**62, -5)),
        held("a", file(1, FileType.CACHE), facts=directory("p_aux", "t_aux")),
        held("a", file(1, FileType.UNSEALED), primary=False),
        held("a", file(1, FileType.UPDATE_CACHE), facts=Facts(0, 3, ())),
    ]
    await index.declare(batch)
    assert await index.sector(sector(1)) == sorted(batch, key=lambda one: one.key)
    assert await index.sector(sector(2)) == []


async def test_batch_with_an_unknown_storage_is_refused_as_a_whole(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    with pytest.raises(NotFound, match="nowhere"):
        await index.declare([held("a", 1), held("nowhere", 2), held("a", 3)])
    assert (await index.snapshot()).declarations == ()


async def test_primary_is_only_upgraded(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    for sent, kept in ((False, False), (True, True), (False, True)):
        await index.declare([held("a", 1, primary=sent)])
        assert await index.sector(sector(1)) == [held("a", 1, primary=kept)]


async def test_facts_are_replaced_when_sent_and_kept_when_not(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    for sent, kept in (
        (None, None),
        (Facts(1, 1), Facts(1, 1)),
        (None, Facts(1, 1)),
        (Facts(1, 2), Facts(1, 2)),
        (directory("x"), directory("x")),
        (directory("x", "y"), directory("x", "y")),
        (Facts(1, 5), Facts(1, 5)),
    ):
        await index.declare([held("a", 1, facts=sent)])
        assert await index.sector(sector(1)) == [held("a", 1, facts=kept)]


async def test_facts_that_others_found_out_make_nobody_a_holder(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1, primary=False)])
    since = await position(index)
    told = [held("a", 1, facts=Facts(5, 6)), held("a", 2, facts=Facts(5, 6)), held("nowhere", 1)]
    await index.tell(told)
    assert (await index.snapshot()).declarations == (
        held("a", 1, primary=False, facts=Facts(5, 6)),
    )
    found = await news(index, since)
    assert found.declared == (held("a", 1, primary=False, facts=Facts(5, 6)),)
    await index.tell([held("a", 1, facts=Facts(5, 6))])
    assert (await position(index))[1] == found.seq


async def test_what_is_so_already_is_no_change(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    first = [held("a", 1, facts=Facts(1, 1)), held("a", 2, facts=directory("x")), held("a", 3)]
    await index.declare(first)
    since = await position(index)
    await index.declare([*first, held("a", 1, primary=False)])
    assert (await position(index)) == since


async def test_each_change_of_a_declaration_is_told(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    since = await position(index)
    await index.declare([held("a", 1, primary=False)])
    await index.declare([held("a", 2)])
    await index.declare([held("a", 1)])
    await index.declare([held("a", 1, facts=Facts(3, 4))])
    await index.drop([key("a", 2), key("a", 9)])
    found = await news(index, since)
    assert found.declared == (held("a", 1, facts=Facts(3, 4)),)
    assert found.dropped == (key("a", 2),)
    assert found.seq == (await position(index))[1]


async def test_one_file_twice_in_a_batch_is_one_declaration(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1, facts=Facts(1, 1)), held("a", 1, primary=False)])
    assert await index.sector(sector(1)) == [held("a", 1, facts=Facts(1, 1))]


async def test_dropping_is_idempotent_and_exact(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.attach(info("b"), STAT)
    await index.declare([held(s, n, facts=Facts(1, 1)) for s in "ab" for n in (1, 2)])
    await index.drop([key("a", 1), key("a", 7)])
    await index.drop([key("a", 1)])
    await index.drop([])
    await index.declare([])
    assert [one.key for one in (await index.snapshot()).declarations] == [
        key("b", 1),
        key("a", 2),
        key("b", 2),
    ]
    await index.declare([held("a", 1)])
    assert (await index.sector(sector(1)))[0].facts is None


@pytest.mark.parametrize(
    "bad",
    [
        held("a", SectorFile(FileType.SEALED, SectorID(1000, 2**63))),
        held("a", SectorFile(FileType.SEALED, SectorID(-1, 2))),
        held("a", 1, facts=Facts(-1, 0)),
        held("a", 1, facts=Facts(2**63, 0)),
        held("a", 1, facts=Facts(2**20000, 0)),
        held("a", 1, facts=Facts(0, 2**63)),
        held("a", 1, facts=Facts(0, 0, (MemberFacts("x", -1, 0),))),
        held("a", 1, facts=Facts(0, 0, (MemberFacts("x", 0, -(2**64)),))),
        held("a", 1, facts=Facts(0, 0, (MemberFacts("y", 0, 0), MemberFacts("x", 0, 0)))),
        held("a", 1, facts=Facts(0, 0, (MemberFacts("x", 0, 0), MemberFacts("x", 0, 0)))),
    ],
)
async def test_impossible_declaration_is_refused_with_its_batch(
    index: SectorIndex, bad: Declaration
) -> None:
    await index.attach(info("a"), STAT)
    with pytest.raises(BadInput):
        await index.declare([held("a", 5), bad])
    assert (await index.snapshot()).declarations == ()


async def test_endless_directory_is_refused(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    facts = directory(*(f"{number:06}" for number in range(10_001)))
    with pytest.raises(TooLarge):
        await index.declare([held("a", file(1, FileType.CACHE), facts=facts)])


async def test_impossible_sectors_are_refused_everywhere(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    bad = SectorID(1000, 2**63)
    broken = SectorFile(FileType.SEALED, bad)
    with pytest.raises(BadInput):
        await index.drop([key("a", broken)])
    with pytest.raises(BadInput):
        await index.find(bad, 1)
    with pytest.raises(BadInput):
        await index.find(sector(1), 1, sector_size=-1)
    with pytest.raises(BadInput):
        await index.sector(bad)
    with pytest.raises(BadInput):
        await index.declarations(StorageID("a"), after=broken)
    with pytest.raises(BadInput):
        await index.snapshot(after=key("a", broken))


async def test_more_than_one_request_holds_is_declared_and_dropped(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", number) for number in range(2500)])
    pages = await everything(index, 1000)
    assert [len(page.declarations) for page in pages] == [1000, 1000, 500]
    await index.drop([key("a", number) for number in range(2499)])
    assert [one.file for one in (await index.snapshot()).declarations] == [file(2499)]


async def test_large_directories_are_declared_in_one_call(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    facts = directory(*(f"{number:06}" for number in range(9000)))
    batch = [held("a", file(number, FileType.CACHE), facts=facts) for number in range(5)]
    await index.declare(batch)
    assert [one.facts for one in (await index.snapshot()).declarations] == [facts] * 5


# Find


async def test_find_gives_holders_in_order_with_urls_and_weight(index: SectorIndex) -> None:
    await index.attach(info("b", weight=3, urls=("http://b:1/remote", "http://b2:1/")), STAT)
    await index.attach(info("a", weight=10), STAT)
    await index.declare([held("b", 7), held("a", 7, primary=False), held("a", 8)])
    first, second = await index.find(sector(7), FileType.SEALED)
    assert (first.info, first.weight, first.primary) == (info("a", weight=10), 10, False)
    assert first.urls == ("http://a:8480/remote/sealed/s-t01000-7",)
    assert (second.weight, second.primary) == (3, True)
    assert second.urls == (
        "http://b:1/remote/sealed/s-t01000-7",
        "http://b2:1/sealed/s-t01000-7",
    )


async def test_find_with_a_mask_names_only_types_that_are_held(index: SectorIndex) -> None:
    await index.attach(info("a", weight=10), STAT)
    cache, sealed = file(7, FileType.CACHE), file(7)
    await index.declare([held("a", cache, primary=False), held("a", sealed)])
    (row,) = await index.find(sector(7), ALL_TYPES)
    assert (row.weight, row.primary) == (20, True)
    assert row.urls == (
        "http://a:8480/remote/sealed/s-t01000-7",
        "http://a:8480/remote/cache/s-t01000-7",
    )
    assert await index.find(sector(7), FileType.UNSEALED | FileType.PIECE) == []


@pytest.mark.parametrize("mask", [0, -1, 128, 255, 2**70])
async def test_find_refuses_unknown_types(index: SectorIndex, mask: int) -> None:
    with pytest.raises(BadInput, match="file type"):
        await index.find(sector(1), mask)


async def test_find_with_fetch_appends_who_may_take_the_sector(world: World) -> None:
    index = world.index
    await index.attach(info("holder"), STAT)
    await index.declare([held("holder", 7)])
    await index.attach(info("stale", can_seal=True), STAT)
    world.clock.ns += 51 * 10**9
    for name, fields in {
        "no-seal": {"can_store": True},
        "sick": {"can_seal": True},
        "deny": {"can_seal": True, "deny_types": ("sealed",)},
        "typo": {"can_seal": True, "allow_types": ("seeled",)},
        "other": {"can_seal": True, "allow_types": ("cache",)},
        "well": {"can_seal": True, "allow_types": ("sealed", "typo")},
        "any": {"can_seal": True, "weight": 99},
    }.items():
        await index.attach(info(name, **fields), STAT)
    await index.report_health(StorageID("sick"), HealthReport(stat=STAT, error="gone"))
    rows = await index.find(sector(7), FileType.SEALED, allow_fetch=True)
    assert [(row.info.storage, row.weight, row.primary) for row in rows] == [
        ("holder", 10, True),
        ("any", 0, False),
        ("well", 0, False),
    ]
    assert rows[1].urls == ("http://any:8480/remote/sealed/s-t01000-7",)
    both = FileType.SEALED | FileType.CACHE
    assert await index.find(sector(8), both, allow_fetch=True) == []  # there is nothing to fetch
    await index.declare([held("holder", 8)])
    rows = await index.find(sector(8), both, allow_fetch=True)
    assert [row.info.storage for row in rows] == ["holder", "any", "deny", "other", "well"]


# Pages and changes


async def test_declarations_of_a_storage_are_paged_in_order(index: SectorIndex) -> None:
    for name in ("a", "b"):
        await index.attach(info(name), STAT)
    files = [file(n, kind) for kind in (FileType.UNSEALED, FileType.CACHE) for n in (1, 2, 10)]
    files.append(SectorFile(FileType.CACHE, SectorID(999, 50)))
    await index.declare([held("a", one, facts=Facts(1, 1)) for one in reversed(files)])
    await index.declare([held("b", 1)])
    storage, found = StorageID("a"), []
    page = await index.declarations(storage, limit=3)
    while page:
        found += [one.file for one in page]
        page = await index.declarations(storage, after=page[-1].file, limit=3)
    assert found == sorted(files)
    assert await index.declarations(StorageID("b")) == [held("b", 1)]
    with pytest.raises(NotFound):
        await index.declarations(StorageID("c"))


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
async def test_snapshot_pages_hold_everything_once_in_key_order(
    index: SectorIndex, limit: int
) -> None:
    batch = [
        held(storage, file(number, kind), facts=Facts(number, 1))
        for storage in ("b", "a")
        for number in (5, 1)
        for kind in (FileType.CACHE, FileType.UNSEALED)
    ]
    for name in ("a", "b"):
        await index.attach(info(name), STAT)
    await index.declare(batch)
    pages = await everything(index, limit)
    found = [one for page in pages for one in page.declarations]
    assert found == sorted(batch, key=lambda one: one.key)
    assert [status.info.storage for status in pages[0].storages] == ["a", "b"]
    assert all(page.storages == () for page in pages[1:])
    assert {(page.epoch, page.seq) for page in pages} == {(pages[0].epoch, 10)}


async def test_empty_index_has_one_empty_page(index: SectorIndex) -> None:
    page = await index.snapshot()
    assert page.epoch
    assert (page.seq, page.storages, page.declarations, page.after) == (0, (), (), None)


@pytest.mark.parametrize("limit", [0, -1])
async def test_page_of_nothing_is_refused(index: SectorIndex, limit: int) -> None:
    await index.attach(info("a"), STAT)
    for ask in (
        lambda: index.snapshot(limit=limit),
        lambda: index.declarations(StorageID("a"), limit=limit),
        lambda: index.changes("x", 0, limit=limit),
    ):
        with pytest.raises(BadInput):
            await ask()


async def test_enormous_page_is_cut(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", number) for number in range(5001)])
    page = await index.snapshot(limit=10**9)
    assert len(page.declarations) == 5000
    assert page.after == page.declarations[-1].key


async def test_changes_are_paged(index: SectorIndex) -> None:
    since = await position(index)
    await index.attach(info("a"), STAT)
    await index.declare([held("a", number) for number in range(5)])
    seen: list[Declaration] = []
    first = await index.changes(*since, limit=2)
    assert [status.info.storage for status in first.storages] == ["a"]
    page = first
    while page.seq < 6:
        seen += page.declared
        page = await index.changes(page.epoch, page.seq, limit=2)
    assert [*seen, *page.declared] == [held("a", number) for number in range(5)]


async def test_another_epoch_or_a_future_number_asks_to_reload(index: SectorIndex) -> None:
    epoch, seq = await position(index)
    assert (await index.changes("another", seq)).reload
    assert (await index.changes(epoch, seq + 1)).reload
    assert not (await index.changes(epoch, seq)).reload
    with pytest.raises(BadInput):
        await index.changes(epoch, -1)


async def test_storage_that_came_again_is_both_detached_and_attached(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1), held("a", 2)])
    since = await position(index)
    await index.detach(StorageID("a"), info("a").urls[0])
    await index.attach(info("a", weight=2), STAT)
    await index.declare([held("a", 2)])
    found = await news(index, since)
    assert found.detached == ("a",)
    assert [status.info.weight for status in found.storages] == [2]
    assert found.declared == (held("a", 2),)


async def test_waiting_for_changes_ends_with_the_first(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    since = await position(index)
    answers: list[Changes] = []

    async def wait() -> None:
        answers.append(await index.changes(*since, wait=60))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert answers == []
            await index.declare([held("a", 1)])
    assert [answer.declared for answer in answers] == [(held("a", 1),)] * 2


async def test_waiting_for_changes_ends_in_time(
    index: SectorIndex, autojump_clock: trio.testing.MockClock
) -> None:
    since = await position(index)
    start = trio.current_time()
    assert await index.changes(*since, wait=30) == Changes(epoch=since[0], seq=since[1])
    assert trio.current_time() - start == pytest.approx(30)
    await index.changes(*since, wait=10**9)
    assert trio.current_time() - start == pytest.approx(330)


@pytest.mark.parametrize("wait", [-1, math.nan])
async def test_impossible_wait_is_refused(index: SectorIndex, wait: float) -> None:
    with pytest.raises(BadInput):
        await index.changes("x", 0, wait=wait)


async def test_cancelled_wait_leaves_nothing_behind(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    since = await position(index)
    with trio.move_on_after(0):
        await index.changes(*since, wait=60)
    await index.declare([held("a", 1)])
    assert (await news(index, since)).declared == (held("a", 1),)
