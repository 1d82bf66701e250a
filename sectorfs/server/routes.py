"""Paths, methods and permissions of a node's HTTP server.

=====================================================  =========  ==========================
path                                                   methods    needs
=====================================================  =========  ==========================
``/``                                                  GET, HEAD  ``read`` off loopback
``/metrics``                                           GET, HEAD  ``read`` off loopback
``/health``                                            GET, HEAD  nothing
``/rpc/v0``                                            POST       a valid token; per method
``/remote/stat/{storage}``                             GET, HEAD  ``read``
``/remote/{type}/{sector}[?mincache|?all]``            GET, HEAD  ``read``
``/remote/{type}/{sector}[?keep=ID.ID]``               DELETE     ``admin``
``/remote/{type}/{sector}/files``                      GET, HEAD  ``read``
``/remote/{type}/{sector}/files/{name}``               GET, HEAD  ``read``
``/remote/{type}/{sector}/manifest``                   GET, HEAD  ``read``
``/remote/{type}/{sector}/manifest/{name}``            GET, HEAD  ``read``
``/remote/{type}/{sector}/{proof}/allocated/{o}/{n}``  GET, HEAD  ``read``
=====================================================  =========  ==========================

Order of answers: 404 for an unknown path, 405, 401 or 403, then what the path itself says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, Protocol

import msgspec
import prometheus_client

from sectorfs.errors import NotFound, SectorFSError
from sectorfs.metrics import HTTP_REQUESTS
from sectorfs.server.access import Access
from sectorfs.server.files import FileRoutes
from sectorfs.server.leaves import LeafHeaders
from sectorfs.server.manifests import ManifestRoutes
from sectorfs.server.removal import RemovalRoute, Removes
from sectorfs.stores.manifest_store import ManifestStore
from sectorfs.stores.protocol import LocalFiles
from sectorfs.types import SectorFile
from sectorfs.wire.messages import Gone, MethodRefused, Reply, Request, error_reply
from sectorfs.wire.server import Handler
from sectorfs.wire.tokens import Secret


class Rpc(Protocol):
    """Answers a JSON-RPC body for a caller with these permissions."""

    async def __call__(
        self, body: bytes, permissions: frozenset[str], *, gone: Gone
    ) -> tuple[int, bytes]:
        """HTTP status and body; what only waits ends when the caller is gone."""


def _nothing(file: SectorFile) -> None:
    """Nobody wants to know."""


RPC_LIMIT = 100 * 1024 * 1024


class _Route(msgspec.Struct, frozen=True):
    name: str
    """In metrics."""
    answer: Callable[[Request], Awaitable[Reply]]
    methods: tuple[str, ...] = ("GET", "HEAD")
    needs: Literal["nothing", "read", "read off loopback"] = "read"
    """`nothing` leaves the token to the route itself."""
    remove: Callable[[Request], Awaitable[Reply]] | None = None
    """Answers DELETE, which needs ``admin``."""


def make_handler(
    files: LocalFiles,
    *,
    secret: Secret,
    rpc: Rpc,
    health: Callable[[], Mapping[str, Any]],
    status: Callable[[], str],
    deadline: float,
    manifests: ManifestStore | None = None,
    missed: Callable[[SectorFile], object] = _nothing,
    remover: Removes | None = None,
) -> Handler:
    """The handler of a node's server; `deadline` bounds what waits for a disk.

    `missed` is told of files whose manifest was asked for in vain. Without `manifests` nothing is
    proved, without a `remover` nothing can be deleted.
    """
    proofs = None
    if manifests is not None:
        proofs = ManifestRoutes(files, manifests, deadline=deadline, missed=missed)
    remote = FileRoutes(files, LeafHeaders(manifests), deadline=deadline)
    return _Routes(remote, proofs, secret, rpc, health, status, remover).handle


class _Routes:
    def __init__(
        self,
        remote: FileRoutes,
        proofs: ManifestRoutes | None,
        secret: Secret,
        rpc: Rpc,
        health: Callable[[], Mapping[str, Any]],
        status: Callable[[], str],
        remover: Removes | None,
    ) -> None:
        self._access = Access(secret)
        self._rpc = rpc
        self._health = health
        self._status = status
        self._fixed = {
            (): _Route("status", self._show_status, needs="read off loopback"),
            ("metrics",): _Route("metrics", self._show_metrics, needs="read off loopback"),
            ("health",): _Route("health", self._show_health, needs="nothing"),
            ("rpc", "v0"): _Route("rpc", self._call, ("POST",), "nothing"),
        }
        self._stat = _Route("stat", remote.stat)
        self._sector = _Route("sector", remote.sector)
        if remover is not None:
            self._sector = _Route(
                "sector",
                remote.sector,
                ("GET", "HEAD", "DELETE"),
                remove=RemovalRoute(remover).remove,
            )
        self._listing = _Route("listing", remote.listing)
        self._member = _Route("member", remote.member)
        self._manifest = _Route("manifest", proofs.sector) if proofs else None
        self._member_manifest = _Route("member manifest", proofs.member) if proofs else None
        self._allocated = _Route("allocated", remote.allocated)

    async def handle(self, request: Request) -> Reply:
        """Answer a request and count it."""
        route = self._find(request.segments)
        name = route.name if route else "unknown"
        try:
            reply = await self._answer(route, request)
        except SectorFSError as exc:
            reply = error_reply(exc, request.headers.get("accept", ""))
        except Exception:
            HTTP_REQUESTS.labels(name, "500").inc()
            raise
        HTTP_REQUESTS.labels(name, str(reply.status)).inc()
        return reply

    def _find(self, segments: tuple[str, ...]) -> _Route | None:
        if segments[:1] != ("remote",):
            return self._fixed.get(segments)
        match segments[1:]:
            case ("stat", _):
                return self._stat
            case ("vanilla", _):
                return None  # proofs: after 404, and nothing else, the next holder is asked
            case (_, _):
                return self._sector
            case (_, _, "files"):
                return self._listing
            case (_, _, "files", _):
                return self._member
            case (_, _, "manifest"):
                return self._manifest
            case (_, _, "manifest", _):
                return self._member_manifest
            case (_, _, _, "allocated", _, _):
                return self._allocated
        return None

    async def _answer(self, route: _Route | None, request: Request) -> Reply:
        if route is None:
            raise NotFound("no such path", request.path[:200])
        if request.method not in route.methods:
            allow = ", ".join(route.methods)
            raise MethodRefused(f"{request.method[:20]} is not offered", request.path, allow=allow)
        if request.method == "DELETE" and route.remove is not None:
            self._access.require(request, "admin")
            return await route.remove(request)
        if route.needs == "read" or (route.needs == "read off loopback" and not request.loopback):
            self._access.require(request, "read")
        return await route.answer(request)

    async def _show_status(self, request: Request) -> Reply:
        kind = ("content-type", "text/plain; charset=utf-8")
        return Reply(200, (kind,), self._status().encode())

    async def _show_metrics(self, request: Request) -> Reply:
        kind = ("content-type", prometheus_client.CONTENT_TYPE_LATEST)
        return Reply(200, (kind,), prometheus_client.generate_latest())

    async def _show_health(self, request: Request) -> Reply:
        kind = ("content-type", "application/json")
        return Reply(200, (kind,), msgspec.json.encode(self._health()) + b"\n")

    async def _call(self, request: Request) -> Reply:
        allowed = self._access.permissions(request)
        status, body = await self._rpc(await request.body(RPC_LIMIT), allowed, gone=request.gone)
        return Reply(status, (("content-type", "application/json"),), body)
