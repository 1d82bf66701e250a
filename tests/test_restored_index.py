"""What becomes of the nodes of an Index that was restored from a backup."""

from __future__ import annotations

import shutil
from pathlib import Path

import trio

from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import Declaration, FsStat, StorageInfo
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import FileType, SectorFile, SectorID, StorageID
from tests.local_fixtures import running, until
from tests.moving_fixtures import SEALED, rig, there

STORAGE = StorageID("st-1")


def declaration(number: int) -> Declaration:
    return Declaration(SectorFile(FileType.SEALED, SectorID(1000, number)), STORAGE, True)


async def test_changes_after_a_restore_are_not_taken_for_those_that_were_lost(
    tmp_path: Path,
) -> None:
    path, catalog = tmp_path / "index.db", Catalog()
    asked: list[bool] = []
    async with SqliteIndex.open(path, cutoff=50) as index:
        await index.attach(StorageInfo(storage=STORAGE, urls=("http://a/remote",)), FsStat())
        await index.declare([declaration(1)])
    shutil.copy(path, tmp_path / "backup")
    async with SqliteIndex.open(path, cutoff=50) as index:
        feed = Feed(
            index,
            catalog,
            heartbeat=0.05,
            on_change=lambda _: None,
            on_reload=lambda: asked.append(True),
        )
        await index.declare([declaration(2)])
        await index.drop([declaration(1).key])
        await feed.step(wait=0)
    shutil.copy(tmp_path / "backup", path)
    async with SqliteIndex.open(path, cutoff=50) as index:
        for number in range(3, 9):
            await index.declare([declaration(number)])
        feed.index = index
        page = await index.snapshot()
        with trio.fail_after(20):
            while catalog.epoch != page.epoch:
                await feed.step(wait=0)
        assert asked == [True]
        assert set(catalog.files_of(STORAGE)) == {one.file for one in page.declarations}
        assert (catalog.epoch, catalog.seq) == (page.epoch, page.seq)


async def test_a_restart_of_the_index_costs_no_snapshot(tmp_path: Path) -> None:
    path, catalog = tmp_path / "index.db", Catalog()
    async with SqliteIndex.open(path, cutoff=50) as index:
        await index.attach(StorageInfo(storage=STORAGE, urls=("http://a/remote",)), FsStat())
        feed = Feed(index, catalog, heartbeat=10, on_change=lambda _: None)
        await feed.step(wait=0)
    for number in range(1, 5):
        async with SqliteIndex.open(path, cutoff=50) as index:
            await index.declare([declaration(number)])
            if number == 2:
                continue  # the node missed a whole life
            changes = await index.changes(catalog.epoch, catalog.seq)
            assert not changes.reload
            feed.index = index
            await feed.step(wait=0)
            page = await index.snapshot()
            assert (catalog.epoch, catalog.seq) == (page.epoch, page.seq)
            assert len(catalog) == number


async def test_paths_are_compared_with_an_index_that_forgot(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        mine = await parts.put("one", SEALED)
        gone = await parts.put("two", SEALED)
        async with running(parts.store):
            await until(lambda: all(not path.dirty for path in parts.store.paths()))
            gone.unlink()
            held = await parts.index.sector(SEALED.sector)
            await parts.index.drop([one.key for one in held if one.storage == parts.ids["one"]])
            parts.store.compare()
            assert there(mine)

            async def told() -> bool:
                return await parts.holders(SEALED) == {"one": True}

            await until(told)
