"""Tokens that were found valid are remembered, and for no longer than they are."""

from __future__ import annotations

import pytest

from sectorfs.errors import Forbidden, Unauthorized
from sectorfs.server import access
from sectorfs.server.access import Access
from sectorfs.wire import tokens
from sectorfs.wire.messages import Request
from sectorfs.wire.tokens import Claims, Secret, sign

SECRET = Secret(b"s" * 32)


async def no_body(limit: int) -> bytes:
    return b""


def bearing(token: str) -> Request:
    return Request(
        method="GET",
        segments=("x",),
        query={},
        headers={"authorization": f"Bearer {token}"},
        peer="10.0.0.9",
        read_body=no_body,
    )


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tokens whose signature was checked."""
    seen: list[str] = []

    def claims(secret: Secret, token: str) -> Claims:
        seen.append(token)
        return tokens.claims(secret, token)

    monkeypatch.setattr(access, "claims", claims)
    return seen


def test_a_valid_token_is_checked_once(checked: list[str]) -> None:
    judge, token = Access(SECRET), sign(SECRET, ["read"])
    for _ in range(3):
        judge.require(bearing(token), "read")
        with pytest.raises(Forbidden):
            judge.require(bearing(token), "admin")
    assert checked == [token]


def test_another_token_is_checked_for_itself(checked: list[str]) -> None:
    judge, token = Access(SECRET), sign(SECRET, ["admin"])
    judge.require(bearing(token), "admin")
    for wrong in (token[:-3] + "xxx", sign(Secret(b"t" * 32), ["admin"]), "x"):
        for _ in range(2):
            with pytest.raises(Unauthorized):
                judge.permissions(bearing(wrong))
    assert len(checked) == 7


def test_an_expired_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    judge = Access(SECRET, now=lambda: now[0])
    token = sign(SECRET, ["read"], 3600)
    expires = tokens.claims(SECRET, token).expires
    assert expires is not None
    judge.require(bearing(token), "read")
    now[0] = expires - 1
    judge.require(bearing(token), "read")

    def expired(secret: Secret, token: str) -> Claims:
        raise Unauthorized("the token is expired")

    monkeypatch.setattr(access, "claims", expired)
    judge.require(bearing(token), "read")
    now[0] = expires
    for _ in range(2):
        with pytest.raises(Unauthorized, match="expired"):
            judge.require(bearing(token), "read")


def test_few_tokens_are_remembered_and_no_long_ones(
    checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_REMEMBERED", 2)
    judge = Access(SECRET)
    few = [sign(SECRET, ["read"], 3600 + n) for n in range(3)]
    for token in (*few, few[2], few[1], few[0]):
        judge.require(bearing(token), "read")
    assert checked == [*few, few[0]]
    long = sign(SECRET, ["read"] * 1000)
    for _ in range(2):
        judge.require(bearing(long), "read")
    assert checked[4:] == [long, long]
