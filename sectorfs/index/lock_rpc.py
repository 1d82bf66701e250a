"""The methods of locks over JSON-RPC.

``Filecoin.StorageLock`` and ``StorageTryLock`` have no token, and in lotus the lock ends with the
answer. So it does here: the first waits until the lock can be had, the second says whether it can,
and neither leaves anything held. A lock that lasts has a lease (``Sectorfs.Lock``).
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

from sectorfs.errors import BadInput, Locked
from sectorfs.index import checks, lock_shapes
from sectorfs.index.protocol import Lease, SectorLocks
from sectorfs.index.shapes import SectorShape, to_sector
from sectorfs.wire.jsonrpc import Method

PASSING_SECONDS = 10.0
"""What a lock without a token lasts if the Index cannot end it with the answer."""


def lock_methods(locks: SectorLocks) -> list[Method]:
    """Every method of locks, for a `Dispatcher`."""
    serve = _Server(locks)
    passing = (SectorShape, int, int)
    lease = (lock_shapes.LeaseShape, float)
    handlers: tuple[tuple[str, str, tuple[object, ...], Callable[..., Awaitable[object]]], ...] = (
        ("Filecoin.StorageLock", "admin", passing, serve.lock_as_lotus),
        ("Filecoin.StorageTryLock", "admin", passing, serve.try_lock_as_lotus),
        ("Filecoin.StorageGetLocks", "read", (), serve.leases_as_lotus),
        ("Sectorfs.Lock", "admin", lease, serve.lock),
        ("Sectorfs.RenewLock", "admin", (str,), locks.renew),
        ("Sectorfs.ReleaseLock", "admin", (str,), locks.release),
        ("Sectorfs.Locks", "read", (), serve.leases),
    )
    return [
        Method(name=name, permission=permission, params=params, handler=handler)
        for name, permission, params, handler in handlers
    ]


class _Server:
    """Handlers: shapes in, shapes out."""

    def __init__(self, locks: SectorLocks) -> None:
        self._locks = locks

    async def lock(self, lease: lock_shapes.LeaseShape, wait: float) -> bool:
        return await self._locks.lock(lock_shapes.to_lease(lease), wait=wait)

    async def leases(self) -> list[lock_shapes.LeaseStatusShape] | None:
        return [lock_shapes.from_status(one) for one in await self._locks.leases()] or None

    async def lock_as_lotus(self, sector: SectorShape, read: int, write: int) -> None:
        if not read | write:
            raise BadInput("failed to acquire lock: no file type", to_sector(sector))
        if not await self._pass(sector, read, write, wait=checks.MAX_WAIT):
            raise Locked("failed to acquire lock", to_sector(sector))

    async def try_lock_as_lotus(self, sector: SectorShape, read: int, write: int) -> bool:
        if not read | write:
            return False
        return await self._pass(sector, read, write, wait=0)

    async def _pass(self, sector: SectorShape, read: int, write: int, *, wait: float) -> bool:
        """Have a lock, and let it go; False when it was not to be had."""
        lease = Lease(
            token=secrets.token_hex(16),
            lock=lock_shapes.to_lock(sector, read, write),
            owner="another program",
            reason="Filecoin.StorageLock",
            seconds=PASSING_SECONDS,
        )
        granted = await self._locks.lock(lease, wait=wait)
        await self._locks.release(lease.token)
        return granted

    async def leases_as_lotus(self) -> lock_shapes.SectorLocksShape:
        return lock_shapes.from_statuses_as_lotus(await self._locks.leases())
