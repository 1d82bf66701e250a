"""The cluster's secret, and the tokens signed with it (JWT, HS256, as lotus and Curio use them).

The claims are ``{"Allow": [permission, …]}`` and, when asked for, ``exp``. The signature is
verified over the bytes received, so neither the order of keys nor spaces in a token matter.
"""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jwt
import msgspec

from sectorfs.errors import BadInput, NotFound, Unauthorized, from_os

PERMISSIONS = ("read", "write", "sign", "admin")
"""Every permission, as lotus names them; `admin` includes the others."""

MIN_KEY = 32
_MAX_FILE = 64 * 1024
_ALGORITHM = "HS256"
_HINT = "copy the secret file from the index node"


class Secret:
    """A key of at least 32 bytes; never shown by `repr`."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_KEY:
            raise BadInput(f"a key of {len(key)} bytes is too short", "secret", "32 or more")
        self._key = key

    @property
    def key(self) -> bytes:
        """The raw bytes."""
        return self._key

    @property
    def text(self) -> str:
        """Base64 with a newline: what a secret file holds."""
        return base64.b64encode(self._key).decode() + "\n"

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)


def new_secret() -> Secret:
    """32 random bytes."""
    return Secret(os.urandom(MIN_KEY))


def load_secret(path: Path) -> Secret:
    """The secret in a file; every error names the file."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except FileNotFoundError as exc:
        raise NotFound("no secret", path, _HINT) from exc
    except OSError as exc:
        raise from_os(exc, "cannot read the secret", path) from exc
    return parse_secret(data, path)


def parse_secret(data: bytes, origin: object = "secret") -> Secret:
    """A secret in one of three forms: lotus keystore JSON, base64 text, or 32+ raw bytes.

    Text that is base64 of 32 bytes or more is taken as base64; anything else is the key itself.
    """
    if len(data) > _MAX_FILE:
        raise BadInput(f"a secret of more than {_MAX_FILE} bytes", origin, _HINT)
    text = data.strip()
    if text.startswith(b"{"):
        return Secret(_keystore_key(text, origin))
    key = _base64(text)
    if key is None or len(key) < MIN_KEY:
        key = data
    if len(key) < MIN_KEY:
        raise BadInput(
            f"not a secret: neither base64 of {MIN_KEY} bytes nor {MIN_KEY} raw bytes",
            origin,
            _HINT,
        )
    return Secret(key)


def _keystore_key(text: bytes, origin: object) -> bytes:
    try:
        data = msgspec.json.decode(text)
    except msgspec.DecodeError as exc:
        raise BadInput(f"not a secret: bad JSON: {exc}", origin, _HINT) from exc
    private = data.get("PrivateKey") if isinstance(data, dict) else None
    key = _base64(private.encode()) if isinstance(private, str) else None
    if key is None or len(key) < MIN_KEY:
        raise BadInput(
            f"not a secret: no PrivateKey that is base64 of {MIN_KEY} bytes", origin, _HINT
        )
    return key


def _base64(text: bytes) -> bytes | None:
    padding = b"=" * (-len(text) % 4)
    try:
        return base64.b64decode(text + padding, validate=True)
    except binascii.Error:
        return None


def sign(secret: Secret, permissions: Iterable[str], expires_seconds: float | None = None) -> str:
    """A token for some permissions; without `expires_seconds` it never expires."""
    allow = list(permissions)
    for name in allow:
        if name not in PERMISSIONS:
            raise BadInput("unknown permission", name, f"one of {', '.join(PERMISSIONS)}")
    claims: dict[str, Any] = {"Allow": allow}
    if expires_seconds is not None:
        claims["exp"] = int(time.time() + expires_seconds)
    return jwt.encode(claims, secret.key, algorithm=_ALGORITHM)


class Claims(msgspec.Struct, frozen=True):
    """What a valid token says."""

    permissions: frozenset[str]
    expires: float | None
    """Seconds since the epoch; None for never."""

    def expired(self, now: float) -> bool:
        """Whether it is valid no more."""
        return self.expires is not None and now >= self.expires


def claims(secret: Secret, token: str) -> Claims:
    """What a token says; `Unauthorized` when it does not verify or is expired."""
    try:
        found = jwt.decode(token, secret.key, algorithms=[_ALGORITHM])
    except jwt.ExpiredSignatureError as exc:
        raise Unauthorized("the token is expired", "token", "make a new one") from exc
    # ValueError and its kin: PyJWT lets some through for headers that are JSON of a wrong shape.
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise Unauthorized("the token does not verify", "token", _HINT) from exc
    allow = found.get("Allow")
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        raise Unauthorized("the token has no list of permissions", "token", "make a new one")
    permissions = frozenset(PERMISSIONS if "admin" in allow else allow)
    # PyJWT has made sure that it is a number, if it is there
    return Claims(permissions, int(found["exp"]) if "exp" in found else None)
