"""The cluster's secret and its tokens."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import BadInput, NotFound, PermissionRefused, SectorFSError, Unauthorized
from sectorfs.wire.tokens import (
    PERMISSIONS,
    Secret,
    claims,
    load_secret,
    new_secret,
    parse_secret,
    sign,
)

ZERO = Secret(bytes(32))
VECTOR = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJBbGxvdyI6WyJhZG1pbiJdfQ"
    ".vGddObvEiVR2CE-aI6nuecN6zkRPtalUjCDH6VM-QoE"
)
KEY = bytes(range(200, 232))


def b64(data: bytes) -> bytes:
    return base64.b64encode(data)


def segment(value: object) -> str:
    text = json.dumps(value).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def test_the_vector_of_the_reference() -> None:
    assert sign(ZERO, ["admin"]) == VECTOR
    assert claims(ZERO, VECTOR).permissions == frozenset(PERMISSIONS)


@pytest.mark.parametrize(
    "data",
    [
        KEY,
        b64(KEY),
        b64(KEY).rstrip(b"=") + b"\n",
        b"  " + b64(KEY) + b"\r\n",
        json.dumps({"Type": "jwt-hmac-secret", "PrivateKey": b64(KEY).decode()}).encode(),
    ],
)
def test_forms_of_a_secret(data: bytes) -> None:
    assert parse_secret(data).key == KEY


def test_text_that_is_no_base64_of_32_bytes_is_the_key_itself() -> None:
    assert parse_secret(b"x" * 32).key == b"x" * 32
    assert parse_secret(b"a pass phrase of sufficient length").key.startswith(b"a pass")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        KEY[:31],
        b64(KEY)[:20],
        b"{",
        b"{}",
        b'{"PrivateKey": 7}',
        b'{"PrivateKey": "!!!"}',
        b'{"PrivateKey": "' + b64(KEY[:16]) + b'"}',
        b"x" * 100_000,
    ],
)
def test_anything_else_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(BadInput) as info:
        parse_secret(data, "/repo/secret")
    assert info.value.thing == "/repo/secret"


def test_a_secret_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(NotFound, match="secret"):
        load_secret(path)
    secret = new_secret()
    path.write_text(secret.text)
    assert load_secret(path) == secret
    with pytest.raises(SectorFSError, match="directory"):
        load_secret(tmp_path)


def test_an_unreadable_secret_is_a_matter_of_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionRefused):
        load_secret(tmp_path / "secret")


def test_secrets_are_random_long_and_not_shown() -> None:
    one, two = new_secret(), new_secret()
    assert one != two
    assert len({one, two, parse_secret(one.text.encode())}) == 2
    assert len(one.key) == 32
    assert one.text.strip() not in repr(one)
    with pytest.raises(BadInput):
        Secret(b"short")


def test_permissions_of_a_token() -> None:
    assert claims(ZERO, sign(ZERO, ["read"])).permissions == {"read"}
    assert claims(ZERO, sign(ZERO, [])).permissions == frozenset()
    assert claims(ZERO, sign(ZERO, ["admin"])).permissions >= {"read", "write", "sign", "admin"}
    with pytest.raises(BadInput, match="root"):
        sign(ZERO, ["root"])


def test_expiry() -> None:
    assert claims(ZERO, sign(ZERO, ["read"], 3600)).permissions == {"read"}
    with pytest.raises(Unauthorized, match="expired"):
        claims(ZERO, sign(ZERO, ["read"], -1))


def test_order_of_header_keys_does_not_matter() -> None:
    foreign = jwt.encode({"Allow": ["read"]}, ZERO.key, "HS256", headers={"typ": None})
    assert foreign.split(".")[0] != VECTOR.split(".")[0]
    assert claims(ZERO, foreign).permissions == {"read"}


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "a.b.c",
        "é.é.é",
        VECTOR[:-2],
        VECTOR + "A",
        VECTOR.replace(".vGdd", ".wGdd"),
        f"{segment({'alg': 'none', 'typ': 'JWT'})}.{segment({'Allow': ['admin']})}.",
        f"{segment({'alg': 'none'})}.{segment({'Allow': ['admin']})}.{VECTOR.split('.')[2]}",
        f"{segment({'alg': 7})}.{segment({'Allow': ['admin']})}.aaaa",
        f"{segment(['HS256'])}.{segment({'Allow': ['admin']})}.aaaa",
        jwt.encode({"Allow": ["admin"]}, b"another key, 32 bytes or longer!!", "HS256"),
        jwt.encode({"Allow": ["admin"]}, bytes(64), "HS512"),
        jwt.encode({"Allow": "admin"}, bytes(32), "HS256"),
        jwt.encode({"Allow": [7]}, bytes(32), "HS256"),
        jwt.encode({"allow": ["admin"]}, bytes(32), "HS256"),
        jwt.encode({}, bytes(32), "HS256"),
    ],
)
def test_tokens_that_are_refused(token: str) -> None:
    with pytest.raises(Unauthorized):
        claims(ZERO, token)


@given(st.text(max_size=200))
def test_no_text_is_anything_but_refused(token: str) -> None:
    with pytest.raises(Unauthorized):
        claims(ZERO, token)
