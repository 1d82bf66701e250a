"""Placement as every index answers it: the embedded one, and one over JSON-RPC."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sectorfs.errors import BadInput
from sectorfs.index.protocol import FsStat, HealthReport, PathType, SectorIndex
from sectorfs.index.rpc import index_methods
from sectorfs.types import FileType, StorageID
from sectorfs.wire.jsonrpc import Dispatcher
from tests.index_fixtures import (
    ADMIN,
    STAT,
    World,
    both_kinds,
    held,
    index_of_world,
    info,
    open_index,
    sector,
)

SEALED, CACHE = FileType.SEALED, FileType.CACHE


world = both_kinds
index = index_of_world


def room(available: int) -> FsStat:
    return FsStat(capacity=2**62, available=available)


async def best(
    index: SectorIndex,
    mask: int = SEALED,
    size: int = 100,
    *,
    path_type: PathType = "storage",
    miner: int = 1000,
) -> list[str]:
    storages = await index.best_alloc(mask, size, path_type=path_type, miner=miner)
    return [storage.storage for storage in storages]


async def test_without_storages_there_is_none(index: SectorIndex) -> None:
    assert await best(index) == []


async def test_storages_come_whole_and_best_first(index: SectorIndex) -> None:
    full = info(
        "b",
        urls=("http://x:1/remote", "http://y:1/remote"),
        can_store=True,
        weight=3,
        max_storage=5,
        groups=("g",),
        allow_types=("sealed", "cache"),
        allow_miners=("t01000",),
    )
    await index.attach(full, room(100))
    await index.attach(info("a", can_store=True, weight=1), room(299))
    await index.attach(info("c", can_store=True, weight=1), room(300))
    storages = await index.best_alloc(SEALED, 100, path_type="storage", miner=1000)
    assert [storage.storage for storage in storages] == ["c", "b", "a"]
    assert storages[1] == full


async def test_only_storages_for_the_purpose_with_room_and_for_the_miner(
    index: SectorIndex,
) -> None:
    for name, available, fields in (
        ("store", 100, {"can_store": True}),
        ("seal", 1510, {"can_seal": True}),
        ("small", 99, {"can_store": True, "can_seal": True}),
        ("denied", 9999, {"can_store": True, "can_seal": True, "deny_miners": ("f01000",)}),
        ("neither", 9999, {}),
    ):
        await index.attach(info(name, **fields), room(available))
    assert await best(index) == ["store"]
    assert await best(index, SEALED | CACHE, path_type="sealing") == ["seal"]
    assert await best(index, SEALED | CACHE, 101, path_type="sealing") == []
    assert await best(index, miner=1001) == ["denied", "store"]
    assert await best(index, miner=0) == ["denied", "store"]


async def test_silent_and_sick_storages_are_left_out(world: World) -> None:
    index = world.index
    for name in ("silent", "sick", "well"):
        await index.attach(info(name, can_store=True), room(100))
    world.clock.ns += 40 * 10**9
    await index.report_health(StorageID("sick"), HealthReport(stat=room(100), error="gone"))
    await index.report_health(StorageID("well"), HealthReport(stat=room(100)))
    assert await best(index) == ["silent", "well"]
    world.clock.ns += 11 * 10**9
    assert await best(index) == ["well"]
    await index.report_health(StorageID("sick"), HealthReport(stat=room(100)))
    assert await best(index) == ["sick", "well"]


async def test_a_bad_address_fails_no_query(index: SectorIndex) -> None:
    await index.attach(info("typo", can_store=True, allow_miners=("f1oops",)), room(100))
    await index.attach(info("half", can_store=True, allow_miners=("oops", "t01000")), room(100))
    await index.attach(info("odd", can_store=True, deny_miners=("oops",)), room(100))
    assert await best(index) == ["half", "odd"]


async def test_two_nodes_with_one_directory_are_one_storage(index: SectorIndex) -> None:
    for url in ("http://x:1/remote", "http://y:1/remote"):
        await index.attach(info("a", urls=(url,), can_store=True), room(100))
    (storage,) = await index.best_alloc(SEALED, 100, path_type="storage", miner=1000)
    assert storage.urls == ("http://x:1/remote", "http://y:1/remote")


@pytest.mark.parametrize(
    ("mask", "size", "miner"),
    [
        (0, 100, 1000),
        (128, 100, 1000),
        (-1, 100, 1000),
        (1, -1, 1000),
        (1, 2**63, 1000),
        (3, 2**63 - 1, 1000),
        (1, 100, -1),
        (1, 100, 2**63),
    ],
)
async def test_impossible_questions_are_refused(
    index: SectorIndex, mask: int, size: int, miner: int
) -> None:
    with pytest.raises(BadInput):
        await best(index, mask, size, miner=miner)
    assert await best(index) == []


# Find with those that may fetch


async def takers(
    index: SectorIndex, number: int = 7, *, mask: int = SEALED, size: int = 0
) -> set[str]:
    """Storages that may fetch a sector, without its holders."""
    rows = await index.find(sector(number), mask, sector_size=size, allow_fetch=True)
    return {row.info.storage for row in rows if row.weight == 0}


async def test_nothing_is_fetched_before_anybody_holds_it(index: SectorIndex) -> None:
    for name in ("a", "b"):
        await index.attach(info(name, can_seal=True), STAT)
    assert await index.find(sector(7), SEALED, allow_fetch=True) == []
    await index.declare([held("a", 7)])
    rows = await index.find(sector(7), SEALED, allow_fetch=True)
    assert [(row.info.storage, row.weight) for row in rows] == [("a", 10), ("b", 0)]
    # Another type of the same sector has no holder still.
    assert await index.find(sector(7), CACHE, allow_fetch=True) == []


async def test_only_groups_that_the_holder_allows_fetch(index: SectorIndex) -> None:
    await index.attach(info("holder", allow_to=("x", "y")), STAT)
    await index.declare([held("holder", 7)])
    for name, groups in (("none", ()), ("z", ("z",)), ("x", ("x",)), ("yz", ("y", "z"))):
        await index.attach(info(name, can_seal=True, groups=groups), STAT)
    assert await takers(index) == {"x", "yz"}
    await index.attach(info("open"), STAT)
    await index.declare([held("open", 7, primary=False)])
    assert await takers(index) == {"none", "z", "x", "yz"}


async def test_who_fetches_needs_room_to_seal_and_to_serve_the_miner(index: SectorIndex) -> None:
    await index.attach(info("holder"), STAT)
    await index.declare([held("holder", 7)])
    await index.attach(info("small", can_seal=True), room(1509))
    await index.attach(info("large", can_seal=True), room(1510))
    await index.attach(info("other", can_seal=True, deny_miners=("t01000",)), room(1510))
    await index.attach(info("typo", can_seal=True, deny_miners=("oops",)), room(1510))
    assert await takers(index, mask=SEALED | CACHE, size=100) == {"large", "typo"}
    assert await takers(index, size=100) == {"small", "large", "typo"}
    with pytest.raises(BadInput):
        await index.find(sector(7), CACHE, sector_size=2**62, allow_fetch=True)
    assert len(await index.find(sector(7), SEALED, sector_size=2**63 - 1)) == 1


# Over JSON-RPC, as lotus spells it


async def ask(index: SectorIndex, *params: object) -> dict[str, Any]:
    dispatch = Dispatcher(index_methods(index))
    body = {"jsonrpc": "2.0", "id": 1, "method": "Filecoin.StorageBestAlloc", "params": params}
    _, answer = await dispatch(json.dumps(body).encode(), ADMIN)
    found: dict[str, Any] = json.loads(answer)
    return found


async def test_best_alloc_as_lotus_spells_it(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a", can_seal=True, groups=("g",)), room(2**60))
        answer = await ask(index, 4, 34359738368, "sealing", 1000)
        assert answer["result"] == [
            {
                "ID": "a",
                "URLs": ["http://a:8480/remote"],
                "Weight": 10,
                "MaxStorage": 0,
                "CanSeal": True,
                "CanStore": False,
                "Groups": ["g"],
                "AllowTo": None,
                "AllowTypes": None,
                "DenyTypes": None,
                "AllowMiners": None,
                "DenyMiners": None,
            }
        ]
        assert (await ask(index, 4, 34359738368, "storage", 1000))["result"] is None


@pytest.mark.parametrize("path_type", ["", "Sealing", "none", "x" * 5000])
async def test_unknown_path_types_are_refused(tmp_path: Path, path_type: str) -> None:
    async with open_index(tmp_path / "index.db") as index:
        error = (await ask(index, 4, 2048, path_type, 1000))["error"]
        assert error["data"]["kind"] == "BadInput"
        assert "unknown path type" in error["message"]


@pytest.mark.parametrize("params", [(4, 2048), ("4", 2048, "sealing", 1), (4,) * 4])
async def test_wrong_parameters_are_refused(tmp_path: Path, params: tuple[object, ...]) -> None:
    async with open_index(tmp_path / "index.db") as index:
        assert (await ask(index, *params))["error"]["code"] == -32602


# Warnings


async def test_filters_that_match_nothing_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="sectorfs.index.sqlite")
    odd = info("a", allow_types=("seeled",), deny_miners=("t01", "oops"))
    async with open_index(tmp_path / "index.db") as index:
        for _ in range(3):
            await index.attach(odd, STAT)
            await best(index)
        assert [record.getMessage() for record in caplog.records] == [
            "storage a: filters that match nothing: allow_types 'seeled', deny_miners 'oops'"
        ]
        await index.attach(info("a"), STAT)
        assert len(caplog.records) == 1
        await index.attach(odd, STAT)
        assert len(caplog.records) == 2
