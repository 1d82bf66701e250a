"""The Index's methods in the exact JSON of lotus nodes, and a client that trusts no answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sectorfs.errors import BadInput, Forbidden, NotFound, Unauthorized, Unreachable
from sectorfs.index.protocol import HealthReport, SectorIndex
from sectorfs.index.rpc import RpcIndex, index_methods
from sectorfs.types import Facts, FileType, SectorID, StorageID
from sectorfs.wire.jsonrpc import Dispatcher
from tests.index_fixtures import (
    ADMIN,
    RPC_URL,
    STAT,
    digested,
    directory,
    file,
    held,
    info,
    key,
    open_index,
)

SECTOR = {"Miner": 1000, "Number": 7}
STORAGE = {"ID": "a", "URLs": ["http://a:8480/remote"], "Weight": 10, "CanSeal": True}
SPACE = {"Capacity": 100, "Available": 60, "Reserved": 1}


class Server:
    """An index spoken to in JSON."""

    def __init__(self, index: SectorIndex) -> None:
        self.index = index
        self.dispatch = Dispatcher(index_methods(index, max_listed=5))

    async def ask(
        self, method: str, *params: object, permissions: frozenset[str] = ADMIN
    ) -> dict[str, Any]:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        _, answer = await self.dispatch(json.dumps(body).encode(), permissions)
        found: dict[str, Any] = json.loads(answer)
        return found

    async def result(self, method: str, *params: object) -> Any:
        answer = await self.ask(method, *params)
        assert "error" not in answer, answer
        return answer["result"]

    async def kind(self, method: str, *params: object) -> object:
        error = (await self.ask(method, *params))["error"]
        return error["data"]["kind"] if "data" in error else error["code"]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with open_index(tmp_path / "index.db") as index:
        yield Server(index)


@pytest.fixture
async def attached(server: Server) -> Server:
    assert await server.result("Filecoin.StorageAttach", STORAGE, SPACE) is None
    return server


async def test_attach_and_info(attached: Server) -> None:
    assert await attached.result("Filecoin.StorageInfo", "a") == {
        "ID": "a",
        "URLs": ["http://a:8480/remote"],
        "Weight": 10,
        "MaxStorage": 0,
        "CanSeal": True,
        "CanStore": False,
        "Groups": None,
        "AllowTo": None,
        "AllowTypes": None,
        "DenyTypes": None,
        "AllowMiners": None,
        "DenyMiners": None,
    }


async def test_null_and_empty_lists_are_one(server: Server) -> None:
    shape = {**STORAGE, "Groups": None, "AllowTypes": [], "DenyTypes": ["cache"], "New": {"x": 1}}
    await server.result("Filecoin.StorageAttach", shape, {**SPACE, "FSAvailable": 70})
    found = await server.result("Filecoin.StorageInfo", "a")
    assert (found["Groups"], found["AllowTypes"], found["DenyTypes"]) == (None, None, ["cache"])


async def test_health(attached: Server) -> None:
    report = {"Stat": {**SPACE, "FSAvailable": 70, "Max": 90, "Used": 30}, "Err": "gone"}
    assert await attached.result("Filecoin.StorageReportHealth", "a", report) is None
    (status,) = await attached.result("Sectorfs.StorageStatus")
    assert status["Stat"] == report["Stat"]
    assert (status["Err"], status["HeartbeatAge"]) == ("gone", 0)
    assert status["LastHeartbeatNs"] > 0
    assert status["Info"]["ID"] == "a"
    await attached.result("Filecoin.StorageReportHealth", "a", {"Stat": SPACE, "Err": None})
    assert (await attached.index.storages())[0].error == ""


async def test_declare_one_splits_its_mask(attached: Server) -> None:
    assert await attached.result("Filecoin.StorageDeclareSector", "a", SECTOR, 6, True) is None
    assert await attached.index.sector(SectorID(1000, 7)) == [
        held("a", 7),
        held("a", file(7, FileType.CACHE)),
    ]


async def test_batch_declares_with_and_without_facts(attached: Server) -> None:
    plain = {"StorageID": "a", "SectorID": SECTOR, "FileType": 3, "Primary": False}
    cache = {
        **plain,
        "FileType": 4,
        "Primary": True,
        "Facts": {
            "Size": 1,
            "MtimeNs": 5,
            "Files": [{"Name": "p_aux", "Size": 1, "MtimeNs": 5}],
            "Digest": "0a" * 32,
        },
    }
    assert await attached.result("Filecoin.BatchStorageDeclareSectors", [plain, cache]) is None
    assert await attached.index.sector(SectorID(1000, 7)) == [
        held("a", file(7, FileType.UNSEALED), primary=False),
        held("a", 7, primary=False),
        held("a", file(7, FileType.CACHE), facts=digested(directory("p_aux"), 10)),
    ]
    assert await attached.result("Filecoin.BatchStorageDeclareSectors", None) is None
    (shape,) = [
        one for one in await attached.result("Sectorfs.Sector", SECTOR) if one["FileType"] == 4
    ]
    assert shape == cache


async def test_drop(attached: Server) -> None:
    await attached.result("Filecoin.StorageDeclareSector", "a", SECTOR, 7, True)
    assert await attached.result("Filecoin.StorageDropSector", "a", SECTOR, 5) is None
    assert await attached.index.sector(SectorID(1000, 7)) == [held("a", 7)]
    keys = [{"StorageID": "a", "SectorID": SECTOR, "FileType": 127}]
    assert await attached.result("Sectorfs.DropSectors", keys) is None
    assert await attached.result("Sectorfs.DropSectors", None) is None
    assert await attached.result("Sectorfs.Sector", SECTOR) is None


async def test_find_as_lotus_spells_it(attached: Server) -> None:
    await attached.result("Filecoin.StorageDeclareSector", "a", SECTOR, 2, True)
    found = await attached.result("Filecoin.StorageFindSector", SECTOR, 2, 34359738368, False)
    assert found == [
        {
            "ID": "a",
            "URLs": ["http://a:8480/remote/sealed/s-t01000-7"],
            "BaseURLs": ["http://a:8480/remote"],
            "Weight": 10,
            "CanSeal": True,
            "CanStore": False,
            "Primary": True,
            "AllowTypes": None,
            "DenyTypes": None,
            "AllowMiners": None,
            "DenyMiners": None,
        }
    ]
    assert await attached.result("Filecoin.StorageFindSector", SECTOR, 1, 0, False) is None
    assert await attached.result("Filecoin.StorageFindSector", SECTOR, 1, 2048, True) is None
    await attached.index.attach(info("b", can_seal=True), STAT)
    rows = await attached.result("Filecoin.StorageFindSector", SECTOR, 2, 0, True)
    assert [(row["ID"], row["Weight"], row["Primary"]) for row in rows] == [
        ("a", 10, True),
        ("b", 0, False),
    ]


async def test_list_has_every_storage_and_one_mask_per_sector(attached: Server) -> None:
    await attached.index.attach(info("b"), STAT)
    await attached.result("Filecoin.StorageDeclareSector", "a", SECTOR, 6, True)
    await attached.result("Filecoin.StorageDeclareSector", "a", {**SECTOR, "Number": 3}, 1, True)
    assert await attached.result("Filecoin.StorageList") == {
        "a": [
            {"Miner": 1000, "Number": 3, "SectorFileType": 1},
            {"Miner": 1000, "Number": 7, "SectorFileType": 6},
        ],
        "b": [],
    }
    await attached.index.declare([held("b", number) for number in range(3)])
    assert await attached.kind("Filecoin.StorageList") == "TooLarge"


async def test_detach(attached: Server) -> None:
    assert await attached.kind("Filecoin.StorageDetach", "a", "http://b:1") == "NotFound"
    assert await attached.result("Filecoin.StorageDetach", "a", "http://a:8480/remote") is None
    assert await attached.kind("Filecoin.StorageInfo", "a") == "NotFound"
    assert await attached.result("Sectorfs.StorageStatus") is None


async def test_pages_and_changes(attached: Server) -> None:
    await attached.index.declare([held("a", number, facts=Facts(1, 2)) for number in (1, 2)])
    page = await attached.result("Sectorfs.Snapshot", None, 1)
    assert [one["Info"]["ID"] for one in page["Storages"]] == ["a"]
    assert page["After"] == {
        "StorageID": "a",
        "SectorID": {"Miner": 1000, "Number": 1},
        "FileType": 2,
    }
    page = await attached.result("Sectorfs.Snapshot", page["After"], 5)
    assert [one["SectorID"]["Number"] for one in page["Declarations"]] == [2]
    assert (page["Storages"], page["After"], page["Seq"]) == (None, None, 3)
    await attached.index.drop([key("a", 1)])
    found = await attached.result("Sectorfs.Changes", page["Epoch"], 2, 0, 100)
    assert (found["Seq"], found["Reload"], found["Detached"]) == (4, False, None)
    assert [one["SectorID"]["Number"] for one in found["Declared"]] == [2]
    assert [one["SectorID"]["Number"] for one in found["Dropped"]] == [1]
    assert (await attached.result("Sectorfs.Changes", "other", 2, 0.0, 100))["Reload"]
    after = {"SectorID": SECTOR, "FileType": 1}
    rows = await attached.result("Sectorfs.Declarations", "a", after, 10)
    assert [one["SectorID"]["Number"] for one in rows] == [2]


FACTS = {"Size": 1, "MtimeNs": 5, "Files": None}
DECLARATION = {"StorageID": "a", "SectorID": SECTOR, "FileType": 2, "Primary": True}


def declared(**fields: object) -> tuple[str, list[object]]:
    return "Filecoin.BatchStorageDeclareSectors", [{**DECLARATION, **fields}]


def with_file(name: str) -> dict[str, object]:
    return {**FACTS, "Files": [{"Name": name, "Size": 1, "MtimeNs": 1}]}


@pytest.mark.parametrize(
    "bad",
    [
        ("Filecoin.StorageAttach", {**STORAGE, "ID": "../a"}, SPACE),
        ("Filecoin.StorageAttach", {**STORAGE, "ID": ""}, SPACE),
        ("Filecoin.StorageAttach", {**STORAGE, "URLs": ["file:///etc"]}, SPACE),
        ("Filecoin.StorageAttach", {**STORAGE, "URLs": ["http://[::1"]}, SPACE),
        ("Filecoin.StorageAttach", {**STORAGE, "Weight": -1}, SPACE),
        ("Filecoin.StorageAttach", {**STORAGE, "Weight": 2**63}, SPACE),
        ("Filecoin.StorageAttach", STORAGE, {**SPACE, "Capacity": -1}),
        ("Filecoin.StorageInfo", "a/b"),
        ("Filecoin.StorageDetach", "", "http://a:1"),
        ("Filecoin.StorageReportHealth", "a", {"Stat": {**SPACE, "Used": 2**64}}),
        ("Filecoin.StorageDeclareSector", "a", SECTOR, 0, True),
        ("Filecoin.StorageDeclareSector", "a", SECTOR, 128, True),
        ("Filecoin.StorageDeclareSector", "a", {"Miner": -1, "Number": 1}, 1, True),
        ("Filecoin.StorageDeclareSector", "a", {"Miner": 1, "Number": 2**63}, 1, True),
        ("Filecoin.StorageDropSector", "a", SECTOR, -1),
        ("Filecoin.StorageFindSector", SECTOR, 256, 0, False),
        ("Filecoin.StorageFindSector", SECTOR, 1, -1, False),
        declared(FileType=3, Facts=FACTS),
        declared(Facts={**FACTS, "Size": -1}),
        declared(Facts={**FACTS, "MtimeNs": 2**63}),
        declared(Facts=with_file("../x")),
        declared(Facts=with_file("..")),
        declared(Facts=with_file("a/b")),
        declared(Facts=with_file("x" * 300)),
        declared(Facts=with_file("x.tmp")),
        declared(Facts=with_file("\x00")),
        declared(StorageID="a.b"),
        ("Sectorfs.Snapshot", None, 0),
        ("Sectorfs.Snapshot", {"StorageID": "a", "SectorID": SECTOR, "FileType": 3}, 1),
        ("Sectorfs.Declarations", "a", {"SectorID": SECTOR, "FileType": 3}, 1),
        ("Sectorfs.Changes", "x", -1, 0, 10),
        ("Sectorfs.Changes", "x", 0, -1, 10),
        ("Sectorfs.Changes", "x", 2**70, 0, 10),
    ],
)
async def test_bad_values_are_bad_input_and_change_nothing(
    attached: Server, bad: tuple[object, ...]
) -> None:
    before = await attached.index.snapshot()
    assert await attached.kind(str(bad[0]), *bad[1:]) == "BadInput"
    assert await attached.index.snapshot() == before


@pytest.mark.parametrize(
    "bad",
    [
        ("Filecoin.StorageAttach", {}, SPACE),
        ("Filecoin.StorageAttach", STORAGE, None),
        ("Filecoin.StorageAttach", {**STORAGE, "Weight": "10"}, SPACE),
        ("Filecoin.StorageDeclareSector", "a", {"Miner": 1}, 1, True),
        ("Filecoin.StorageDeclareSector", "a", SECTOR, 1, "yes"),
        ("Filecoin.StorageFindSector", SECTOR, 1, False),
        ("Filecoin.StorageInfo",),
        declared(Facts=5),
        declared(Facts={"Size": 1}),
    ],
)
async def test_bad_shapes_are_bad_parameters(attached: Server, bad: tuple[object, ...]) -> None:
    assert await attached.kind(str(bad[0]), *bad[1:]) == -32602


async def test_reading_needs_read_and_changing_needs_admin(attached: Server) -> None:
    read = frozenset({"read"})
    for method in index_methods(attached.index):
        for permissions, allowed in (
            (frozenset[str](), False),
            (read, method.permission == "read"),
            (ADMIN, True),
        ):
            answer = await attached.ask(method.name, permissions=permissions)
            refused = "missing permission" in answer.get("error", {}).get("message", "")
            assert refused is not allowed, method.name
    changing = {one.name for one in index_methods(attached.index) if one.permission == "admin"}
    assert changing == {
        "Filecoin.StorageAttach",
        "Filecoin.StorageDetach",
        "Filecoin.StorageReportHealth",
        "Filecoin.StorageDeclareSector",
        "Filecoin.BatchStorageDeclareSectors",
        "Filecoin.StorageDropSector",
        "Sectorfs.DropSectors",
        "Sectorfs.TellFacts",
        "Filecoin.StorageLock",
        "Filecoin.StorageTryLock",
        "Sectorfs.Lock",
        "Sectorfs.RenewLock",
        "Sectorfs.ReleaseLock",
    }


# The client


def answering(status: int, result: object) -> RpcIndex:
    """A client of a server that gives one result, or a whole body."""

    async def post(body: bytes, patience: float) -> tuple[int, bytes]:
        if isinstance(result, bytes):
            return status, result
        request_id = json.loads(body)["id"]
        return status, json.dumps({"id": request_id, "result": result}).encode()

    return RpcIndex(RPC_URL, post)


async def test_index_that_answers_html_is_unreachable() -> None:
    with pytest.raises(Unreachable, match=r"check index\.url"):
        await answering(200, b"<html><body>It works!</body></html>").storages()


async def test_refused_token_says_what_to_copy() -> None:
    with pytest.raises(Unauthorized, match="copy the secret file from the index node"):
        await answering(401, b"").storages()


async def test_read_token_cannot_declare(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db") as index:
        dispatch = Dispatcher(index_methods(index))

        async def post(body: bytes, patience: float) -> tuple[int, bytes]:
            return await dispatch(body, frozenset({"read"}))

        client = RpcIndex(RPC_URL, post)
        assert await client.storages() == []
        with pytest.raises(Forbidden, match="missing permission"):
            await client.declare([held("a", 1)])


STATUS = {
    "Info": STORAGE,
    "Stat": SPACE,
    "Err": "",
    "LastHeartbeatNs": 1,
    "HeartbeatAge": 0.5,
}


@pytest.mark.parametrize(
    "result",
    [
        5,
        "x",
        [None],
        [{}],
        [{**STATUS, "Info": {**STORAGE, "ID": "a/b"}}],
        [{**STATUS, "Info": {**STORAGE, "URLs": ["javascript:x"]}}],
        [{**STATUS, "HeartbeatAge": -1}],
        [{**STATUS, "HeartbeatAge": None}],
        [{**STATUS, "LastHeartbeatNs": 2**64}],
        [{**STATUS, "Stat": {"Capacity": -5}}],
    ],
)
async def test_nonsense_about_storages_is_unreachable(result: object) -> None:
    with pytest.raises(Unreachable, match=RPC_URL):
        await answering(200, result).storages()


async def test_sound_answer_passes_the_same_checks() -> None:
    (status,) = await answering(200, [STATUS]).storages()
    assert status.info.storage == "a"


@pytest.mark.parametrize(
    "shape",
    [
        {**DECLARATION, "FileType": 3},
        {**DECLARATION, "FileType": 0},
        {**DECLARATION, "Facts": with_file("../../etc/passwd")},
        {**DECLARATION, "Facts": {**FACTS, "Size": -1}},
        {**DECLARATION, "SectorID": {"Miner": 1, "Number": 2**63}},
        {**DECLARATION, "StorageID": "."},
    ],
)
async def test_nonsense_about_sectors_is_unreachable(shape: dict[str, object]) -> None:
    page = {"Epoch": "x", "Seq": 1, "Declarations": [shape]}
    with pytest.raises(Unreachable):
        await answering(200, page).snapshot()
    with pytest.raises(Unreachable):
        await answering(200, [shape]).sector(SectorID(1, 1))
    changes = {"Epoch": "x", "Seq": 1, "Declared": [shape]}
    with pytest.raises(Unreachable):
        await answering(200, changes).changes("x", 0)


async def test_negative_sequence_number_is_unreachable() -> None:
    with pytest.raises(Unreachable):
        await answering(200, {"Epoch": "x", "Seq": -1}).snapshot()
    with pytest.raises(Unreachable):
        await answering(200, {"Epoch": "x", "Seq": -1}).changes("x", 0)


async def test_long_poll_asks_for_patience() -> None:
    seen: list[float] = []

    async def post(body: bytes, patience: float) -> tuple[int, bytes]:
        seen.append(patience)
        return 200, json.dumps(
            {"id": json.loads(body)["id"], "result": {"Epoch": "x", "Seq": 0}}
        ).encode()

    client = RpcIndex(RPC_URL, post)
    await client.changes("x", 0, wait=30)
    await client.snapshot()
    assert seen == [30, 0]


async def test_errors_of_the_index_arrive_as_themselves(attached: Server) -> None:
    async def post(body: bytes, patience: float) -> tuple[int, bytes]:
        return await attached.dispatch(body, ADMIN)

    client = RpcIndex(RPC_URL, post)
    with pytest.raises(NotFound) as caught:
        await client.report_health(StorageID("zzz"), HealthReport(stat=STAT))
    assert (caught.value.thing, caught.value.hint) == ("zzz", "attach it first")
    with pytest.raises(BadInput):
        await client.info(StorageID("a/b"))
