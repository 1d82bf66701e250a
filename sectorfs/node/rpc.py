"""A node's own methods on ``/rpc/v0``, beside those of the Index, and the client the verbs use.

``Filecoin.*`` have the names and shapes that tools of lotus and Curio call on a node;
``Sectorfs.*`` are what our command line uses, in the public field names of `node.reports`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from sectorfs.errors import BadInput
from sectorfs.index import shapes
from sectorfs.node import reports
from sectorfs.node.admin import LocalAdmin, PathSettings
from sectorfs.node.caching import CachingClient
from sectorfs.node.forget import DetachReport
from sectorfs.node.hashing import HashingClient
from sectorfs.node.moves import MovesClient
from sectorfs.node.settings import SettingsReport
from sectorfs.node.verify import VerifyingClient
from sectorfs.stores.keeper import ScanCounts
from sectorfs.stores.path_changes import PathChanges
from sectorfs.types import SectorID, StorageID, parse_sector
from sectorfs.wire import jsonrpc
from sectorfs.wire.jsonrpc import Method
from sectorfs.wire.tokens import PERMISSIONS, Secret, claims

T = TypeVar("T")

Post = Callable[[bytes, float], Awaitable[tuple[int, bytes]]]
"""POST a body, waiting so many seconds longer than usual for the answer: status and body."""

DETACH_PATIENCE = 600.0
"""Seconds that detaching may take: each URL is asked, and a million declarations may go."""
SCAN_PATIENCE = 86400.0
"""Seconds that attaching or scanning a path may take: a path may hold a million files."""


def node_methods(
    admin: LocalAdmin, status: Callable[[], Awaitable[reports.StatusReport]], secret: Secret
) -> list[Method]:
    """The table of a node's own methods."""

    async def add_local(path: str) -> None:
        await admin.attach(_absolute(path), None)

    async def detach_local(path: str) -> None:
        await admin.detach_here(path)

    async def detach(target: str, force: bool) -> DetachReport:
        return await admin.detach(target, force=force)

    async def configure(target: str, changes: PathChanges) -> SettingsReport:
        return await admin.configure(target, changes)

    async def redeclare_local(storage: str | None, drop_missing: bool) -> None:
        await admin.redeclare(storage, drop_missing=drop_missing)

    async def local() -> dict[StorageID, str]:
        return admin.local_paths()

    async def stat(storage: str) -> shapes.FsStatShape:
        return shapes.from_stat(await admin.stat(shapes.to_storage_id(storage)))

    async def verify(token: str) -> list[str]:
        allowed = claims(secret, token).permissions
        return [name for name in PERMISSIONS if name in allowed]

    async def attach(path: str, settings: PathSettings | None) -> StorageID:
        return await admin.attach(_absolute(path), settings)

    async def redeclare(target: str | None, drop_missing: bool) -> ScanCounts:
        return await admin.redeclare(target, drop_missing=drop_missing)

    async def find(sector: str) -> reports.SectorReport:
        return await admin.find(_sector(sector))

    handlers: tuple[tuple[str, str, tuple[object, ...], Callable[..., Awaitable[object]]], ...] = (
        ("Filecoin.StorageAddLocal", "admin", (str,), add_local),
        ("Filecoin.StorageDetachLocal", "admin", (str,), detach_local),
        ("Filecoin.StorageRedeclareLocal", "admin", (str | None, bool), redeclare_local),
        ("Filecoin.StorageLocal", "admin", (), local),
        ("Filecoin.StorageStat", "admin", (str,), stat),
        ("Filecoin.StorageAuthVerify", "read", (str,), verify),
        ("Sectorfs.NodeStatus", "read", (), status),
        ("Sectorfs.NodeAttach", "admin", (str, PathSettings | None), attach),
        ("Sectorfs.NodeDetach", "admin", (str, bool), detach),
        ("Sectorfs.NodeConfigure", "admin", (str, PathChanges), configure),
        ("Sectorfs.NodeRedeclare", "admin", (str | None, bool), redeclare),
        ("Sectorfs.NodeScans", "read", (), admin.scans),
        ("Sectorfs.NodeStorages", "read", (), admin.storages),
        ("Sectorfs.NodeFind", "read", (str,), find),
        ("Sectorfs.NodeLocks", "read", (), admin.locks),
    )
    return [
        Method(name=name, permission=permission, params=params, handler=handler)
        for name, permission, params, handler in handlers
    ]


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise BadInput("is not an absolute path", path)
    return path


def _sector(text: str) -> SectorID:
    try:
        return parse_sector(text)
    except ValueError as exc:
        raise BadInput(str(exc), text) from exc


class NodeClient:
    """The verbs of `Admin`, asked of a running node."""

    def __init__(self, url: str, post: Post) -> None:
        self._url = url
        self._post = post
        self._last_id = 0
        self.moves = MovesClient(url, lambda _, body, patience: post(body, patience))
        self.caching = CachingClient(self._call)
        self.verifying = VerifyingClient(self._call)
        self.hashing = HashingClient(self._call)

    async def status(self) -> reports.StatusReport:
        """What the node does now."""
        return await self._call("Sectorfs.NodeStatus", result=reports.StatusReport)

    async def attach(self, path: str, settings: PathSettings | None) -> StorageID:
        """See `Admin.attach`."""
        return StorageID(
            await self._call(
                "Sectorfs.NodeAttach", path, settings, result=str, patience=SCAN_PATIENCE
            )
        )

    async def detach(self, target: str, *, force: bool) -> DetachReport:
        """See `Admin.detach`."""
        return await self._call(
            "Sectorfs.NodeDetach", target, force, result=DetachReport, patience=DETACH_PATIENCE
        )

    async def configure(self, target: str, changes: PathChanges) -> SettingsReport:
        """See `Admin.configure`."""
        return await self._call(
            "Sectorfs.NodeConfigure",
            target,
            changes,
            result=SettingsReport,
            patience=SCAN_PATIENCE,
        )

    async def redeclare(self, target: str | None, *, drop_missing: bool) -> ScanCounts:
        """See `Admin.redeclare`."""
        return await self._call(
            "Sectorfs.NodeRedeclare",
            target,
            drop_missing,
            result=ScanCounts,
            patience=SCAN_PATIENCE,
        )

    async def scans(self) -> list[reports.ScanReport]:
        """See `Admin.scans`."""
        return await self._call("Sectorfs.NodeScans", result=list[reports.ScanReport])

    async def storages(self) -> list[reports.StorageReport]:
        """See `Admin.storages`."""
        return await self._call("Sectorfs.NodeStorages", result=list[reports.StorageReport])

    async def find(self, sector: SectorID) -> reports.SectorReport:
        """See `Admin.find`."""
        return await self._call("Sectorfs.NodeFind", sector.name, result=reports.SectorReport)

    async def locks(self) -> list[reports.LockReport]:
        """See `Admin.locks`."""
        return await self._call("Sectorfs.NodeLocks", result=list[reports.LockReport])

    async def _call(
        self, method: str, *params: object, result: type[T], patience: float = 0.0
    ) -> T:
        self._last_id += 1
        request_id = self._last_id
        body = jsonrpc.encode_request(request_id, method, params)
        status, answer = await self._post(body, patience)
        found: T = jsonrpc.decode_answer(
            status, answer, request_id=request_id, result=result, url=self._url
        )
        return found
