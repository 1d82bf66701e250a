"""Requests that mostly wait end with the connection of whoever sent them; changes do not."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from sectorfs.index.rpc import index_methods
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.server.routes import make_handler
from sectorfs.wire.jsonrpc import Dispatcher, Method
from sectorfs.wire.messages import Reply, Request, text_reply
from sectorfs.wire.tokens import Secret, sign
from tests.wire_fixtures import FolderFiles, Raw, raw, running, wait_until

SECRET = Secret(bytes(32))


class Waiting:
    """A handler that waits for its client to leave."""

    def __init__(self) -> None:
        self.began = 0
        self.left = 0
        self.go_on = trio.Event()

    async def handle(self, request: Request) -> Reply:
        if "body" in request.segments:
            await request.body(100)
        self.began += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_gone, request, nursery.cancel_scope)
            await self.go_on.wait()
            nursery.cancel_scope.cancel()
        return text_reply(200, "answer")

    async def _until_gone(self, request: Request, scope: trio.CancelScope) -> None:
        await request.gone()
        self.left += 1
        scope.cancel()


async def close(client: Raw) -> None:
    await client.stream.aclose()


async def reset(client: Raw) -> None:
    client.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await client.stream.aclose()


@pytest.mark.parametrize("leave", [close, reset])
@pytest.mark.parametrize(
    "request_text",
    [
        "GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
    ],
)
async def test_a_handler_learns_that_its_client_left(
    leave: Callable[[Raw], Awaitable[None]], request_text: str
) -> None:
    waiting = Waiting()
    async with running(waiting.handle) as port, raw(port) as client:
        await client.send(request_text)
        await wait_until(lambda: waiting.began == 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert waiting.left == 0
        await leave(client)
        await wait_until(lambda: waiting.left == 1)


@pytest.mark.parametrize("more", ["GET / HTTP/1.1\r\nhost: x\r\n\r\n", "GE"])
async def test_a_client_that_asks_on_has_not_left(more: str) -> None:
    waiting = Waiting()
    async with running(waiting.handle) as port, raw(port) as client:
        await client.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await wait_until(lambda: waiting.began == 1)
        await client.send(more)
        await trio.testing.wait_all_tasks_blocked(0.05)
        waiting.go_on.set()
        assert (await client.answer())[2] == b"answer\n"
        if len(more) > 2:
            assert (await client.answer())[2] == b"answer\n"
        assert waiting.left == 0


async def test_a_client_whose_body_nobody_read_has_not_left() -> None:
    waiting = Waiting()
    async with running(waiting.handle) as port, raw(port) as client:
        await client.send("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n{}")
        await wait_until(lambda: waiting.began == 1)
        await client.send("{}.")
        await trio.testing.wait_all_tasks_blocked(0.05)
        waiting.go_on.set()
        assert (await client.answer())[2] == b"answer\n"
        assert waiting.left == 0


# JSON-RPC


class Methods:
    """A method that waits and one that changes something."""

    def __init__(self) -> None:
        self.gone = trio.Event()
        self.ended: list[str] = []
        self.go_on = trio.Event()

    async def work(self) -> str:
        try:
            await self.go_on.wait()
        except trio.Cancelled:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        return "done"

    async def fail(self) -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("detail")

    async def ask(self, name: str) -> object:
        dispatch = Dispatcher(
            [
                Method(name="Wait", permission="read", handler=self.work, waits=True),
                Method(name="Change", permission="read", handler=self.work),
                Method(name="Fail", permission="read", handler=self.fail, waits=True),
            ]
        )
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": name}).encode()
        _, answer = await dispatch(body, frozenset({"read"}), gone=self.gone.wait)
        return json.loads(answer)


@pytest.mark.parametrize(("name", "outcome"), [("Wait", "cancelled"), ("Change", "done")])
async def test_what_only_waits_ends_with_its_client(name: str, outcome: str) -> None:
    methods = Methods()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(methods.ask, name)
        await trio.testing.wait_all_tasks_blocked()
        methods.gone.set()
        await trio.testing.wait_all_tasks_blocked()
        methods.go_on.set()
    assert methods.ended == [outcome]


async def test_what_waits_answers_as_everything_else(caplog: pytest.LogCaptureFixture) -> None:
    methods = Methods()
    methods.go_on.set()
    assert await methods.ask("Wait") == {"jsonrpc": "2.0", "id": 1, "result": "done"}
    assert "internal error" in str(await methods.ask("Fail"))
    assert "Fail failed" in caplog.text


async def test_what_waits_is_cancelled_from_outside_as_well() -> None:
    methods = Methods()
    with trio.move_on_after(0):
        await methods.ask("Wait")
    assert methods.ended == ["cancelled"]


async def test_a_long_poll_for_changes_ends_with_its_client(tmp_path: Path) -> None:
    async with SqliteIndex.open(tmp_path / "index.db", cutoff=50) as index:
        page = await index.snapshot(limit=1)
        handler = make_handler(
            FolderFiles(tmp_path),
            secret=SECRET,
            rpc=Dispatcher(index_methods(index)),
            health=dict,
            status=str,
            deadline=5,
        )
        params = [page.epoch, page.seq, 300.0, 100]
        body = json.dumps(
            {"jsonrpc": "2.0", "id": 1, "method": "Sectorfs.Changes", "params": params}
        )
        async with running(handler) as port, raw(port) as client:
            await client.send(
                "POST /rpc/v0 HTTP/1.1\r\nhost: x\r\n"
                f"authorization: Bearer {sign(SECRET, ['read'])}\r\n"
                f"content-length: {len(body)}\r\n\r\n{body}"
            )
            await wait_until(lambda: index._changed.statistics().tasks_waiting == 1)
            await client.stream.aclose()
            await wait_until(lambda: index._changed.statistics().tasks_waiting == 0)
