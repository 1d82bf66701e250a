"""What a piece of work on a sector gets: files that are here, are fetched, or may be made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sectorfs.errors import BadInput, DiskFull, NoSource, NotFound
from sectorfs.index.protocol import HealthReport
from sectorfs.types import FileType, SectorFile
from tests.moving_fixtures import (
    CACHE,
    SEALED,
    UNSEALED,
    Rig,
    beat,
    content,
    rig,
    there,
    two_nodes,
)

SIZE = 2048
BOTH = int(FileType.SEALED | FileType.UNSEALED)


async def test_what_is_here_is_found_and_what_is_not_is_an_empty_slot(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        mine = await parts.put("two", SEALED)
        async with parts.acquirer.local(
            SEALED.sector, BOTH, 0, path_type="storage", sector_size=SIZE
        ) as found:
            assert found.paths == {FileType.SEALED: str(mine)}
            assert found.storages == {FileType.SEALED: parts.ids["two"]}


async def test_the_primary_copy_is_preferred_then_the_weight(tmp_path: Path) -> None:
    async with rig(tmp_path) as parts:
        await parts.add("heavy", weight=100)
        await parts.add("light", weight=1)
        await parts.put("heavy", SEALED, primary=False)
        await parts.put("light", SEALED)
        async with _local(parts, existing=FileType.SEALED) as storages:
            assert storages == [parts.ids["light"]]
        await parts.put("heavy", SEALED)
        async with _local(parts, existing=FileType.SEALED) as storages:
            assert storages == [parts.ids["heavy"]]


@asynccontextmanager
async def _local(
    parts: Rig, *, existing: int = 0, allocate: int = 0, path_type: str = "storage"
) -> AsyncIterator[list[str]]:
    async with parts.acquirer.local(
        SEALED.sector,
        existing,
        allocate,
        path_type=path_type,  # type: ignore[arg-type]  # a literal
        sector_size=SIZE,
    ) as found:
        yield [*found.storages.values()]


async def test_finding_and_allocating_one_type_is_refused(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        for existing, allocate in ((1, 1), (3, 2), (256, 0), (0, 128), (-1, 0)):
            with pytest.raises(BadInput):
                async with _local(parts, existing=existing, allocate=allocate):
                    raise AssertionError("was acquired")
            with pytest.raises(BadInput):
                async with parts.acquirer.acquire(
                    SEALED.sector,
                    existing,
                    allocate,
                    path_type="storage",
                    mode="copy",
                    sector_size=SIZE,
                ):
                    raise AssertionError("was acquired")


async def test_nothing_is_made_by_allocating_and_the_room_is_held(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        await beat(parts)
        before = sorted(parts.path("one").rglob("*"))
        async with parts.acquirer.local(
            SEALED.sector,
            0,
            BOTH | FileType.CACHE,
            path_type="storage",
            sector_size=SIZE,
        ) as found:
            assert set(found.paths) == {FileType.SEALED, FileType.UNSEALED, FileType.CACHE}
            assert sorted(parts.path("one").rglob("*")) == before
            stat = await parts.store.stat(parts.ids["one"])
            assert stat.reserved == SIZE + SIZE + SIZE // 10
        assert parts.space.claims(parts.ids["one"]) == ()


async def test_the_purpose_of_a_path_and_its_filters_hold(tmp_path: Path) -> None:
    async with rig(tmp_path) as parts:
        await parts.add("sealing", can_seal=True, can_store=False)
        await parts.add("storing", deny_types=["unsealed"])
        await beat(parts)
        async with _local(parts, allocate=FileType.SEALED, path_type="sealing") as storages:
            assert storages == [parts.ids["sealing"]]
        async with _local(parts, allocate=FileType.SEALED) as storages:
            assert storages == [parts.ids["storing"]]
        with pytest.raises(DiskFull):
            async with _local(parts, allocate=FileType.UNSEALED):
                raise AssertionError("was allocated")


async def test_a_path_that_holds_it_already_is_used_again(tmp_path: Path) -> None:
    async with rig(tmp_path) as parts:
        await parts.add("heavy", weight=100)
        await parts.add("light", weight=1)
        await beat(parts)
        await parts.put("light", SEALED)
        async with _local(parts, allocate=FileType.SEALED) as storages:
            assert storages == [parts.ids["light"]]


async def test_work_spreads_over_paths(tmp_path: Path) -> None:
    async with rig(tmp_path) as parts:
        await parts.add("heavy", weight=100)
        await parts.add("light", weight=1)
        await beat(parts)
        async with _local(parts, allocate=FileType.SEALED) as first:
            assert first == [parts.ids["heavy"]]
            async with _local(parts, allocate=FileType.UNSEALED) as second:
                assert second == [parts.ids["light"]]


async def test_without_room_nothing_is_allocated(tmp_path: Path) -> None:
    async with rig(tmp_path) as parts:
        await parts.add("one", max_storage=3000)
        (path,) = parts.store.paths()
        path.used, path.used_at = 0, trio.current_time()
        path.stat = await parts.store.stat(path.storage)
        report = HealthReport(stat=path.stat)
        await parts.index.report_health(path.storage, report)
        with pytest.raises(DiskFull):
            async with parts.acquirer.local(
                SEALED.sector, 0, BOTH, path_type="storage", sector_size=SIZE
            ):
                raise AssertionError("was allocated")
        assert parts.space.claims(path.storage) == ()


@pytest.mark.parametrize("mode", ["copy", "move"])
async def test_what_nobody_has_is_not_found(tmp_path: Path, mode: str) -> None:
    async with rig(tmp_path, "one") as parts:
        with pytest.raises(NotFound):
            async with _acquire(parts, SEALED, mode):
                raise AssertionError("was acquired")
        await parts.elsewhere(SEALED, primary=True, url="http://127.0.0.1:9/remote")
        with pytest.raises(NoSource):
            async with _acquire(parts, SEALED, mode):
                raise AssertionError("was acquired")
        assert parts.litter() == []


@asynccontextmanager
async def _acquire(parts: Rig, file: SectorFile, mode: str) -> AsyncIterator[Path]:
    async with parts.acquirer.acquire(
        file.sector,
        file.file_type,
        0,
        path_type="storage",
        mode=mode,  # type: ignore[arg-type]  # a literal
        sector_size=SIZE,
    ) as found:
        yield Path(found.paths[file.file_type])


async def test_what_is_here_is_not_fetched(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", UNSEALED)
        await parts.elsewhere(UNSEALED, primary=True)
        async with _acquire(parts, UNSEALED, "copy") as path:
            assert path == mine


@pytest.mark.parametrize("mode", ["copy", "move"])
@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_what_another_node_has_is_fetched(
    tmp_path: Path, mode: str, file: SectorFile
) -> None:
    async with two_nodes(tmp_path) as (here, away):
        source = await away.put("theirs", file)
        whole = content(source)
        async with _acquire(here, file, mode) as path:
            assert content(path) == whole
            assert path.parent.parent == here.path("mine")
        here.ids.update(away.ids)
        if mode == "copy":
            assert await here.holders(file) == {"mine": False, "theirs": True}
            assert there(source)
        else:
            assert await here.holders(file) == {"mine": True}
            assert not there(source)
        assert here.litter() == []
