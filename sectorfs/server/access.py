"""Who may ask: tokens of a request, and permissions."""

from __future__ import annotations

from sectorfs.errors import Forbidden, Unauthorized
from sectorfs.wire.messages import Request
from sectorfs.wire.tokens import Secret, verify


def permissions(request: Request, secret: Secret) -> frozenset[str]:
    """What the request's token allows; `Unauthorized` without a valid one."""
    return verify(secret, _token(request))


def require(request: Request, secret: Secret, permission: str) -> None:
    """`Forbidden` when the request's token is valid and lacks the permission."""
    if permission not in permissions(request, secret):
        raise Forbidden(f"the token lacks the permission {permission!r}", request.path)


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
