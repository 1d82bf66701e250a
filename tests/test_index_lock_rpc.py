"""Locks in the exact JSON of lotus nodes, and our own methods with leases."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sectorfs.errors import Unreachable
from sectorfs.index import checks
from sectorfs.index.lock_rpc import lock_methods
from sectorfs.index.protocol import SectorIndex
from sectorfs.index.rpc import RpcIndex
from sectorfs.types import FileType
from sectorfs.wire.jsonrpc import Dispatcher
from tests.index_fixtures import ADMIN, RPC_URL, Clock, lease, open_index

SECTOR = {"Miner": 1000, "Number": 7}
READ = frozenset({"read"})
S, C = FileType.SEALED, FileType.CACHE
TOKEN = "0123456789abcdef"
LEASE = {
    "Token": TOKEN,
    "SectorID": SECTOR,
    "Read": 4,
    "Write": 2,
    "Owner": "a node",
    "Reason": "a move",
    "Seconds": 60,
}


class Server:
    """Locks spoken to in JSON."""

    def __init__(self, index: SectorIndex) -> None:
        self.index = index
        self._dispatch = Dispatcher(lock_methods(index))

    async def ask(
        self, method: str, *params: object, permissions: frozenset[str] = ADMIN
    ) -> dict[str, Any]:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        _, answer = await self._dispatch(json.dumps(body).encode(), permissions)
        found: dict[str, Any] = json.loads(answer)
        return found

    async def result(self, method: str, *params: object) -> Any:
        answer = await self.ask(method, *params)
        assert "error" not in answer, answer
        return answer["result"]

    async def error(self, method: str, *params: object) -> Any:
        return (await self.ask(method, *params))["error"]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with open_index(tmp_path / "index.db") as index:
        yield Server(index)


# As lotus spells it


async def test_locks_without_a_token_end_with_the_answer(server: Server) -> None:
    assert await server.result("Filecoin.StorageLock", SECTOR, 4, 2) is None
    assert await server.result("Filecoin.StorageTryLock", SECTOR, 0, 2) is True
    assert await server.result("Filecoin.StorageGetLocks") == {"Locks": []}
    assert await server.index.lock(lease("a", write=S))


async def test_trying_says_whether_a_lock_could_be_had(server: Server) -> None:
    await server.index.lock(lease("a", read=S, write=C))
    for read, write, free in (
        (2, 0, True),
        (0, 2, False),
        (4, 0, False),
        (0, 4, False),
        (1, 1, True),
    ):
        assert await server.result("Filecoin.StorageTryLock", SECTOR, read, write) is free
    other = {"Miner": 1001, "Number": 7}
    assert await server.result("Filecoin.StorageTryLock", other, 0, 6) is True


async def test_locking_waits_until_the_lock_is_free(
    server: Server, mock_clock: trio.testing.MockClock
) -> None:
    await server.index.lock(lease("a", write=S))
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(await server.ask("Filecoin.StorageLock", SECTOR, 2, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert answers == []
        await server.index.release(lease("a").token)
    assert answers == [{"id": 1, "jsonrpc": "2.0", "result": None}]
    assert await server.index.leases() == []


async def test_locking_does_not_wait_for_ever(
    server: Server, mock_clock: trio.testing.MockClock
) -> None:
    await server.index.lock(lease("a", write=S, seconds=600))
    errors: list[Any] = []

    async def ask() -> None:
        errors.append(await server.error("Filecoin.StorageLock", SECTOR, 2, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(checks.MAX_WAIT)
    assert errors[0]["message"] == "s-t01000-7: failed to acquire lock"
    assert len(await server.index.leases()) == 1


async def test_a_lock_of_nothing_is_refused_or_false(server: Server) -> None:
    error = await server.error("Filecoin.StorageLock", SECTOR, 0, 0)
    assert "failed to acquire lock" in error["message"]
    assert await server.result("Filecoin.StorageTryLock", SECTOR, 0, 0) is False


@pytest.mark.parametrize("method", ["Filecoin.StorageLock", "Filecoin.StorageTryLock"])
@pytest.mark.parametrize("masks", [(128, 0), (0, 128), (-1, 0), (2**70, 1)])
async def test_unknown_types_are_an_error(
    server: Server, method: str, masks: tuple[int, int]
) -> None:
    error = await server.error(method, SECTOR, *masks)
    assert (error["code"], error["data"]["kind"]) == (1, "BadInput")
    assert "unknown file types specified" in error["message"]


async def test_arrays_are_indexed_by_bit_position(server: Server) -> None:
    await server.index.lock(lease("a", read=FileType.UNSEALED | FileType.KEY, write=S))
    await server.index.lock(lease("b", read=FileType.UNSEALED))
    await server.index.lock(lease("c", 3, write=FileType.PIECE))
    assert await server.result("Filecoin.StorageGetLocks") == {
        "Locks": [
            {
                "Sector": {"Miner": 1000, "Number": 3},
                "Write": [0, 0, 0, 0, 0, 1, 0],
                "Read": [0, 0, 0, 0, 0, 0, 0],
            },
            {
                "Sector": SECTOR,
                "Write": [0, 1, 0, 0, 0, 0, 0],
                "Read": [2, 0, 0, 0, 0, 0, 1],
            },
        ]
    }


async def test_who_waits_is_no_lock(server: Server, mock_clock: trio.testing.MockClock) -> None:
    await server.index.lock(lease("a", write=S))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: server.index.lock(lease("b", write=S), wait=100))
        await trio.testing.wait_all_tasks_blocked()
        (locked,) = (await server.result("Filecoin.StorageGetLocks"))["Locks"]
        assert locked["Write"] == [0, 1, 0, 0, 0, 0, 0]
        nursery.cancel_scope.cancel()


# Ours


async def test_a_lease_in_json(server: Server, mock_clock: trio.testing.MockClock) -> None:
    assert await server.result("Sectorfs.Lock", LEASE, 0) is True
    other = {**LEASE, "Token": "f" * 16}
    assert await server.result("Sectorfs.Lock", other, 0) is False
    assert await server.result("Sectorfs.Locks") == [
        {
            "SectorID": SECTOR,
            "Read": 4,
            "Write": 2,
            "Owner": "a node",
            "Reason": "a move",
            "SinceNs": Clock().ns,
            "ExpiresIn": 60.0,
        }
    ]
    assert await server.result("Sectorfs.RenewLock", TOKEN) is None
    assert await server.result("Sectorfs.ReleaseLock", TOKEN) is None
    assert await server.result("Sectorfs.ReleaseLock", TOKEN) is None
    assert await server.result("Sectorfs.Locks") is None
    assert (await server.error("Sectorfs.RenewLock", TOKEN))["data"]["kind"] == "LeaseLost"


@pytest.mark.parametrize(
    "bad",
    [
        ("Sectorfs.Lock", {**LEASE, "Token": "x"}, 0),
        ("Sectorfs.Lock", {**LEASE, "Read": 0, "Write": 0}, 0),
        ("Sectorfs.Lock", {**LEASE, "Write": 256}, 0),
        ("Sectorfs.Lock", {**LEASE, "SectorID": {"Miner": -1, "Number": 0}}, 0),
        ("Sectorfs.Lock", {**LEASE, "Seconds": 0}, 0),
        ("Sectorfs.Lock", {**LEASE, "Seconds": 1e300}, 0),
        ("Sectorfs.Lock", {**LEASE, "Owner": ""}, 0),
        ("Sectorfs.Lock", {**LEASE, "Reason": "a\x1b[2Jb"}, 0),
        ("Sectorfs.Lock", LEASE, -1),
        ("Sectorfs.RenewLock", "../x"),
        ("Sectorfs.ReleaseLock", ""),
    ],
)
async def test_bad_values_are_bad_input_and_lock_nothing(
    server: Server, bad: tuple[object, ...]
) -> None:
    assert (await server.error(str(bad[0]), *bad[1:]))["data"]["kind"] == "BadInput"
    assert await server.index.leases() == []


@pytest.mark.parametrize(
    "bad",
    [
        ("Sectorfs.Lock", None, 0),
        ("Sectorfs.Lock", {**LEASE, "Write": "2"}, 0),
        ("Sectorfs.Lock", LEASE, None),
        ("Sectorfs.Lock", LEASE),
        ("Sectorfs.RenewLock", 5),
        ("Filecoin.StorageLock", SECTOR, 2),
        ("Filecoin.StorageTryLock", SECTOR, 2, None),
        ("Filecoin.StorageGetLocks", 1),
    ],
)
async def test_bad_shapes_are_bad_parameters(server: Server, bad: tuple[object, ...]) -> None:
    assert (await server.error(str(bad[0]), *bad[1:]))["code"] == -32602


async def test_locking_needs_admin_and_looking_read(server: Server) -> None:
    refused = {
        method.name
        for method in lock_methods(server.index)
        if "missing permission"
        in (await server.ask(method.name, permissions=READ)).get("error", {}).get("message", "")
    }
    assert refused == {
        "Filecoin.StorageLock",
        "Filecoin.StorageTryLock",
        "Sectorfs.Lock",
        "Sectorfs.RenewLock",
        "Sectorfs.ReleaseLock",
    }


STATUS = {
    "SectorID": SECTOR,
    "Read": 4,
    "Write": 0,
    "Owner": "a",
    "Reason": "b",
    "SinceNs": 1,
    "ExpiresIn": None,
}


def answering(result: object) -> RpcIndex:
    async def post(body: bytes, patience: float) -> tuple[int, bytes]:
        return 200, json.dumps({"id": json.loads(body)["id"], "result": result}).encode()

    return RpcIndex(RPC_URL, post)


@pytest.mark.parametrize(
    "change",
    [
        {"Read": 0},
        {"Read": 128},
        {"SectorID": {"Miner": 1, "Number": 2**63}},
        {"SinceNs": -1},
        {"ExpiresIn": -0.5},
        {"ExpiresIn": 1e9},
        {"ExpiresIn": "soon"},
        {"Owner": 5},
    ],
)
async def test_nonsense_about_locks_is_unreachable(change: dict[str, object]) -> None:
    assert len(await answering([STATUS]).leases()) == 1
    with pytest.raises(Unreachable, match=RPC_URL):
        await answering([{**STATUS, **change}]).leases()


async def test_an_answer_that_is_no_answer_grants_nothing() -> None:
    for nonsense in (None, 1, "true", []):
        with pytest.raises(Unreachable):
            await answering(nonsense).lock(lease("a", write=S))


async def test_a_wait_asks_for_patience() -> None:
    seen: list[float] = []

    async def post(body: bytes, patience: float) -> tuple[int, bytes]:
        seen.append(patience)
        return 200, json.dumps({"id": json.loads(body)["id"], "result": False}).encode()

    client = RpcIndex(RPC_URL, post)
    for wait in (0, 15, 10_000):
        await client.lock(lease("a", write=S), wait=wait)
    assert seen == [0, 15, checks.MAX_WAIT]
