"""Room in the cache path for what is about to come, made and then held while it comes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from sectorfs.errors import (
    DiskError,
    DiskFull,
    NotFound,
    PermissionRefused,
    Refused,
    StorageUnavailable,
)
from sectorfs.stores.cache import ROOM_PATIENCE, CacheKeeper
from sectorfs.stores.copies import Copies
from sectorfs.stores.fetch_rules import SMALL
from sectorfs.stores.local import LocalStore
from sectorfs.stores.reservation import Claim
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.types import SectorFile

log = logging.getLogger(__name__)

NEEDED_PATIENCE = 3.0
"""So long somebody who cannot read without a copy waits for room within the limits."""


class CacheRoom:
    """Reserves room in a node's cache path, where it is known what is promised there."""

    def __init__(
        self,
        copies: Copies,
        local: LocalStore,
        space: SpaceLedger | None,
        keeper: CacheKeeper | None,
    ) -> None:
        self._copies = copies
        self._local = local
        self._space = space
        self._keeper = keeper

    @asynccontextmanager
    async def reserve(
        self, file: SectorFile, member: str | None, size: int, *, needed: bool = False
    ) -> AsyncIterator[None]:
        """Hold room for a copy for the block; `DiskFull` without it.

        `needed`: somebody cannot read without it, be the cache path over its limits or not.
        """
        storage = self._copies.storage
        patience = NEEDED_PATIENCE if needed else ROOM_PATIENCE
        if size > SMALL and not await self._make(file, member, size, patience) and not needed:
            raise DiskFull(
                f"{size} bytes to fetch, and no room within its limits",
                self._copies.root,
                "see max_size and min_free of [cache], and `sectorfs sector evict`",
            )
        async with AsyncExitStack() as stack:
            if self._space is not None and self._local.path_of(storage) is not None:
                claim = Claim(
                    storage=storage, file=file, member=member or "", size=size, place="fetching"
                )
                try:
                    await stack.enter_async_context(self._space.reserve([claim]))
                except DiskFull as exc:
                    raise DiskFull(
                        f"{size} bytes to fetch, {exc.what}",
                        self._copies.root,
                        "make room in the cache path",
                    ) from exc
                except Refused as exc:
                    raise DiskError(exc.what, exc.thing, exc.hint) from exc
                except (NotFound, PermissionRefused, StorageUnavailable) as exc:
                    # The cache path's own trouble: `Copies` meets it next, and says which.
                    log.debug("%s: nothing reserved: %s", file, exc)
            yield

    async def grow(self, size: int) -> bool:
        """Whether so much more may stay of what is only read, copies being evicted if need be."""
        return self._keeper is None or await self._keeper.make_room(size)

    async def _make(self, file: SectorFile, member: str | None, size: int, patience: float) -> bool:
        """Have copies evicted, if need be, for what is still to come of a file."""
        if self._keeper is None:
            return True
        begun = await self._copies.begun_bytes(file, member)
        return await self._keeper.make_room(max(0, size - begun), patience=patience)
