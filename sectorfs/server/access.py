"""Who may ask: tokens of a request, and permissions."""

from __future__ import annotations

import time
from collections.abc import Callable

from sectorfs.errors import Forbidden, Unauthorized
from sectorfs.wire.messages import Request
from sectorfs.wire.tokens import Claims, Secret, claims

_REMEMBERED = 256
"""Tokens; a cluster has a handful."""
_LONGEST = 4096
"""Characters of a token that is worth remembering."""


class Access:
    """Judges requests by their tokens.

    Checking a signature takes longer than reading a few pages of a file, so that tokens found valid
    are remembered, whole, until they expire.
    """

    def __init__(self, secret: Secret, *, now: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._now = now
        self._valid: dict[str, Claims] = {}  # the one found last is at the end

    def permissions(self, request: Request) -> frozenset[str]:
        """What the request's token allows; `Unauthorized` without a valid one."""
        token = _token(request)
        known = self._valid.get(token)
        if known is None or known.expired(self._now()):
            self._valid.pop(token, None)
            known = claims(self._secret, token)
            self._remember(token, known)
        return known.permissions

    def require(self, request: Request, permission: str) -> None:
        """`Forbidden` when the request's token is valid and lacks the permission."""
        if permission not in self.permissions(request):
            raise Forbidden(f"the token lacks the permission {permission!r}", request.path)

    def _remember(self, token: str, found: Claims) -> None:
        if len(token) > _LONGEST:
            return
        if len(self._valid) >= _REMEMBERED:
            del self._valid[next(iter(self._valid))]
        self._valid[token] = found


def _token(request: Request) -> str:
    header = request.headers.get("authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("the Authorization header is not 'Bearer <token>'", request.path)
        return token.strip()
    tokens = request.query.get("token", [])
    if not tokens:
        raise Unauthorized("no token", request.path, "send 'Authorization: Bearer <token>'")
    return tokens[0]
