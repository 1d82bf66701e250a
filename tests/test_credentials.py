"""Peers of two clusters asked with the token that each takes."""

from __future__ import annotations

from sectorfs.wire import credentials
from sectorfs.wire.client import Client
from sectorfs.wire.credentials import Credentials
from sectorfs.wire.messages import Reply, Request, text_reply
from tests.wire_fixtures import PATIENT, running


class Door:
    """A server that takes one token."""

    def __init__(self, takes: str) -> None:
        self.takes = takes
        self.shown: list[str] = []

    async def answer(self, request: Request) -> Reply:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        self.shown.append(token)
        body = (await request.body(100)).decode()
        return text_reply(200, body) if token == self.takes else text_reply(401, "no")


async def ask(client: Client, port: int, method: str = "GET", body: bytes = b"") -> int:
    async with client.request(method, f"http://127.0.0.1:{port}/", (), body) as response:
        text = await response.read(100)
        assert response.status != 200 or text == body + b"\n"
        assert response.token_hint == "look there"
        return response.status


async def test_each_peer_gets_the_token_it_takes() -> None:
    theirs, ours, nobody = Door("theirs"), Door("own"), Door("another")
    known = Credentials("own", lambda: "theirs", hint="look there")
    async with (
        running(theirs.answer) as first,
        running(ours.answer) as second,
        running(nobody.answer) as third,
        Client(PATIENT, token=known) as client,
    ):
        for _ in range(2):
            assert await ask(client, first) == 200
            assert await ask(client, second, "POST", b"body") == 200
            assert await ask(client, third) == 401
    assert theirs.shown == ["theirs", "theirs"]  # and never our own
    assert ours.shown == ["theirs", "own", "own"]
    assert nobody.shown == ["theirs", "own", "own", "theirs"]


async def test_a_token_that_was_replaced_is_the_next_one_shown() -> None:
    door, now = Door("old"), ["old"]
    known = Credentials("own", lambda: now[0], hint="look there")
    async with running(door.answer) as port, Client(PATIENT, token=known) as client:
        assert await ask(client, port) == 200
        door.takes = now[0] = "new"
        assert await ask(client, port) == 200
    assert door.shown == ["old", "new"]


async def test_one_token_is_shown_once() -> None:
    door = Door("another")
    for known in (
        Credentials("own", hint="look there"),
        Credentials("own", lambda: "own", hint="look there"),
    ):
        async with running(door.answer) as port, Client(PATIENT, token=known) as client:
            assert await ask(client, port) == 401
    assert door.shown == ["own", "own"]


def test_peers_are_remembered_within_bounds() -> None:
    known = Credentials("own", lambda: "theirs")
    for number in range(credentials.MAX_PEERS + 1):
        assert known.refused(str(number), "theirs") == "own"
    assert known.token("0") == "theirs"
    assert known.token(str(credentials.MAX_PEERS)) == "own"
