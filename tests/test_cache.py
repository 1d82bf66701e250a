"""What leaves the cache path and what never does: on a real path, with a real Index."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import trio

from sectorfs.config import CacheLimits
from sectorfs.errors import NotFound, Refused, StorageUnavailable
from sectorfs.stores import cache, cache_notes
from sectorfs.stores.cache import CacheKeeper
from sectorfs.types import FileType
from tests.cache_fixtures import SIZE, CacheRig, cache_rig, disk_usage
from tests.local_fixtures import put, sector_file, until
from tests.moving_fixtures import file_system, there

ONE, TWO, THREE = (sector_file(FileType.SEALED, number) for number in (1, 2, 3))
TREE = sector_file(FileType.CACHE, 4)
NONE = CacheLimits()


async def loaded(rig: CacheRig) -> CacheKeeper:
    """Read what is noted, as the keeper's task does first."""
    await rig.notes.read()
    return rig.keeper


async def test_the_longest_unused_copy_goes_and_its_declaration_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with cache_rig(tmp_path, CacheLimits(3 * SIZE)) as rig:
        paths = [await rig.copy(file) for file in (ONE, TWO, THREE)]
        keeper = await loaded(rig)
        rig.used(TWO, ONE, THREE)
        rig.parts.index.calls.clear()
        assert await keeper.make_room(SIZE)
        assert [there(path) for path in paths] == [True, False, True]
        assert await rig.parts.holders(TWO) == {"primary": True}
        assert "drop" in rig.parts.index.calls
        assert "evicted the copy of sealed/s-t01000-2" in caplog.text
        assert rig.parts.litter() == []


async def test_nothing_goes_while_there_is_room(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(3 * SIZE)) as rig:
        path = await rig.copy(ONE)
        keeper = await loaded(rig)
        assert await keeper.make_room(2 * SIZE)
        assert there(path)


async def test_nothing_goes_for_what_does_not_fit_anyway(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(3 * SIZE)) as rig:
        paths = [await rig.copy(file) for file in (ONE, TWO)]
        keeper = await loaded(rig)
        assert not await keeper.make_room(4 * SIZE)
        assert all(map(there, paths))


async def test_what_is_promised_to_other_fetches_is_not_given_twice(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(3 * SIZE)) as rig:
        path = await rig.copy(ONE)
        keeper = await loaded(rig)
        rig.promised = SIZE
        assert await keeper.make_room(SIZE)
        assert there(path)
        rig.promised = 2 * SIZE
        assert await keeper.make_room(SIZE)
        assert not there(path)


async def test_what_is_pinned_open_or_being_fetched_stays(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(4 * SIZE)) as rig:
        paths = [await rig.copy(file) for file in (ONE, TWO, THREE)]
        spare = await rig.copy(TREE_FILE)
        keeper = await loaded(rig)
        assert await rig.notes.pin(ONE, pinned=True)
        rig.hands.open[TWO] = True
        rig.busy.add(THREE)
        rig.used(TREE_FILE)
        assert await keeper.make_room(SIZE)
        assert not there(spare)
        assert not await keeper.make_room(2 * SIZE)
        assert all(map(there, paths))


TREE_FILE = sector_file(FileType.UNSEALED, 9)


async def test_what_is_only_kept_open_is_closed_before_it_goes(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(SIZE)) as rig:
        path = await rig.copy(ONE)
        keeper = await loaded(rig)
        rig.hands.open[ONE] = False
        assert await keeper.make_room(SIZE)
        assert rig.hands.let_gone == [ONE]
        assert not there(path)


async def test_a_file_that_is_opened_at_the_last_moment_stays(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(2 * SIZE)) as rig:
        first, second = await rig.copy(ONE), await rig.copy(TWO)
        keeper = await loaded(rig)
        rig.used(ONE, TWO)
        rig.hands.let_go = lambda file: file != ONE  # type: ignore[method-assign]  # for a moment
        assert await keeper.make_room(SIZE)
        assert there(first)
        assert not there(second)


async def test_the_last_healthy_copy_stays(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(2 * SIZE)) as rig:
        lonely = await rig.copy(ONE, elsewhere=False)
        other = await rig.copy(TWO)
        keeper = await loaded(rig)
        rig.used(ONE, TWO)
        assert await keeper.make_room(SIZE)
        assert there(lonely)
        assert not there(other)
        assert await rig.parts.holders(ONE) == {"cache": False}
        with pytest.raises(Refused) as caught:
            await keeper.evict(ONE)
        assert "--force" not in str(caught.value), "evicting has no such option"


async def test_a_copy_whose_source_lost_it_stays(tmp_path: Path) -> None:
    """The Index may say that there is a primary: it is looked at."""
    async with cache_rig(tmp_path, CacheLimits(SIZE)) as rig:
        copy = await rig.copy(ONE)
        (tmp_path / "primary" / str(ONE)).unlink()
        keeper = await loaded(rig)
        assert not await keeper.make_room(SIZE)
        assert there(copy)
        assert await rig.parts.holders(ONE) == {"cache": False, "primary": True}


async def test_nothing_goes_while_the_index_is_away(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(SIZE)) as rig:
        copy = await rig.copy(ONE)
        keeper = await loaded(rig)
        rig.parts.index.away = True
        assert not await keeper.make_room(SIZE)
        assert there(copy)
        rig.parts.index.away = False
        assert await keeper.make_room(SIZE)
        assert not there(copy)


async def test_a_cache_path_that_was_made_primary_loses_nothing(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(SIZE)) as rig:
        copy = await rig.copy(ONE)
        store = tmp_path / "cache" / "sectorstore.json"
        store.write_text(json.dumps(json.loads(store.read_text()) | {"CanStore": True}))
        await rig.parts.store.redeclare(rig.parts.ids["cache"])
        keeper = await loaded(rig)
        assert not await keeper.make_room(SIZE)
        assert there(copy)


async def test_a_cache_path_that_is_not_attached_loses_nothing(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(SIZE)) as rig:
        copy = await rig.copy(ONE)
        keeper = await loaded(rig)
        await rig.parts.store.detach(str(tmp_path / "cache"))
        assert not await keeper.make_room(SIZE)
        with pytest.raises(StorageUnavailable, match="not attached"):
            await keeper.evict(ONE)
        assert there(copy)


async def test_unfinished_fetches_go_like_copies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with cache_rig(tmp_path, CacheLimits(3 * SIZE)) as rig:
        unfinished = await rig.partial(ONE)
        whole = await rig.copy(TWO)
        keeper = await loaded(rig)
        rig.used(ONE, TWO)
        assert await keeper.make_room(SIZE)
        assert not there(unfinished)
        assert not there(unfinished.with_suffix(".map"))
        assert there(whole)
        assert "evicted the partial of sealed/s-t01000-1" in caplog.text


async def test_a_directory_that_came_in_part_goes_as_one(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(SIZE)) as rig:
        folder = tmp_path / "cache" / "cache" / "fetching" / TREE.sector.name
        for name in ("p_aux", "t_aux.part", "t_aux.map"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"m" * SIZE)
        keeper = await loaded(rig)
        assert await keeper.evict(TREE) >= 3 * SIZE
        assert not there(folder)


async def test_what_nobody_used_goes_by_the_time_it_came(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, CacheLimits(3 * SIZE)) as rig:
        older, younger = await rig.copy(TWO), await rig.copy(ONE)
        while younger.stat().st_ctime_ns <= older.stat().st_ctime_ns:
            younger.chmod(0o644)
        keeper = await loaded(rig)
        assert await keeper.make_room(2 * SIZE)
        assert not there(older)
        assert there(younger)


async def test_free_space_is_kept_free(tmp_path: Path) -> None:
    with file_system(tmp_path, "cache", "16M"):
        async with cache_rig(tmp_path, CacheLimits(min_free=12 << 20)) as rig:
            await rig.copy(ONE)
            keeper = await loaded(rig)
            other = tmp_path / "cache" / "somebody else's"
            other.write_bytes(b"o" * (5 << 20))
            assert not await keeper.make_room(0), "it takes more than there is to evict"
            assert rig.left() == {str(ONE)}
            other.write_bytes(b"o" * ((4 << 20) - SIZE // 2))
            assert await keeper.make_room(0)
            assert rig.left() == set()


async def test_evicting_by_name(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, NONE) as rig:
        copy, unfinished = await rig.copy(ONE), await rig.partial(ONE)
        size = disk_usage(copy) + disk_usage(unfinished)
        keeper = await loaded(rig)
        await rig.notes.pin(ONE, pinned=True)
        with pytest.raises(Refused, match="pinned"):
            await keeper.evict(ONE)
        await rig.notes.pin(ONE, pinned=False)
        rig.hands.open[ONE] = True
        with pytest.raises(Refused, match="is open"):
            await keeper.evict(ONE)
        rig.hands.open.clear()
        rig.busy.add(ONE)
        with pytest.raises(Refused, match="being fetched"):
            await keeper.evict(ONE)
        rig.busy.clear()
        assert await keeper.evict(ONE) >= size
        assert rig.left() == set()
        with pytest.raises(NotFound):
            await keeper.evict(ONE)


async def test_pins_and_last_use_outlive_the_process(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, NONE) as rig:
        paths = {file: await rig.copy(file) for file in (ONE, TWO, THREE)}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.keeper.run)
            await until(lambda: rig.notes.known)
            assert await rig.notes.pin(ONE, pinned=True)
            assert not await rig.notes.pin(ONE, pinned=True)
            rig.used(ONE, THREE, TWO)
            nursery.cancel_scope.cancel()
        keeper = rig.another(CacheLimits(3 * SIZE))
        await loaded(rig)
        assert rig.notes.pinned == {ONE}
        assert keeper.is_pinned(ONE)
        assert await keeper.make_room(SIZE)
        assert [there(paths[file]) for file in (ONE, TWO, THREE)] == [True, True, False]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"pinned": ["sealed/../../etc"]}', b'{"used_ns": {"x/y": 1}}', b"\xff"]
)
async def test_notes_that_make_no_sense_keep_everything(
    tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with cache_rig(tmp_path, CacheLimits(1)) as rig:
        copy = await rig.copy(ONE)
        (tmp_path / "cache" / cache_notes.NAME).write_bytes(text)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.keeper.run)
            await until(lambda: "malformed" in rig.keeper.trouble)
            assert not await rig.keeper.make_room(SIZE)
            with pytest.raises(StorageUnavailable, match="not known"):
                await rig.notes.pin(ONE, pinned=True)
            assert not rig.keeper.is_pinned(ONE)
            nursery.cancel_scope.cancel()
        assert there(copy)
        assert "malformed" in caplog.text
        assert (tmp_path / "cache" / cache_notes.NAME).read_bytes() == text


async def test_a_pin_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    async with cache_rig(tmp_path, NONE) as rig:
        keeper = await loaded(rig)
        (tmp_path / "cache" / "sectorstore.json").rename(tmp_path / "aside.json")
        with pytest.raises(StorageUnavailable):
            await rig.notes.pin(ONE, pinned=True)
        assert not keeper.is_pinned(ONE)
        (tmp_path / "aside.json").rename(tmp_path / "cache" / "sectorstore.json")
        assert await rig.notes.pin(ONE, pinned=True)


async def test_the_task_keeps_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "LOOK_SECONDS", 0.05)
    async with cache_rig(tmp_path, CacheLimits(2 * SIZE)) as rig:
        await rig.copy(ONE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.keeper.run)
            await until(lambda: rig.notes.known)
            rig.hands.open[ONE] = True
            await rig.copy(TWO)
            await rig.copy(THREE)
            await until(lambda: len(rig.left()) == 2)
            assert str(ONE) in rig.left()
            rig.hands.open = dict.fromkeys((ONE, TWO, THREE), True)
            put(tmp_path / "cache", sector_file(FileType.CACHE, 8), {"p_aux": b"x" * SIZE})
            rig.busy.add(sector_file(FileType.CACHE, 8))
            await until(lambda: "over its limits" in rig.keeper.trouble)
            rig.hands.open.clear()
            await until(lambda: not rig.keeper.trouble)
            nursery.cancel_scope.cancel()
    assert caplog.text.count("over its limits") == 1


async def test_whoever_waits_for_room_may_leave_at_any_time(tmp_path: Path) -> None:
    """What goes is gone then, declaration and all, or it stays."""
    async with cache_rig(tmp_path, CacheLimits(1)) as rig:
        copy = await rig.copy(ONE)
        keeper = await loaded(rig)
        for steps in range(200):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_after, scope, steps)
                    await keeper.make_room(0)
                    nursery.cancel_scope.cancel()
            if not there(copy):
                break
        await until(lambda: keeper.make_room(0))
        assert rig.left() == set()
        assert await rig.parts.holders(ONE) == {"primary": True}


async def cancel_after(scope: trio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()
