"""A cache path with its keeper, beside a storage path that holds the primaries."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sectorfs.config import CacheLimits
from sectorfs.stores import metadata
from sectorfs.stores.blocks import Identity, PartialFile
from sectorfs.stores.cache import CacheKeeper
from sectorfs.stores.cache_notes import CacheNotes
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Lane
from sectorfs.types import SectorFile
from tests.moving_fixtures import Rig, rig

SIZE = 64 << 10
"""Bytes of a copy; a multiple of any block size."""
SECOND = 1_000_000_000


class Hands:
    """Who has copies open, as the test says."""

    def __init__(self) -> None:
        self.open: dict[SectorFile, bool] = {}
        self.let_gone: list[SectorFile] = []

    def in_hand(self) -> dict[SectorFile, bool]:
        return self.open

    def let_go(self, file: SectorFile) -> bool:
        self.let_gone.append(file)
        return not self.open.get(file)


class CacheRig:
    """The parts."""

    def __init__(self, parts: Rig, copies: Copies, limits: CacheLimits) -> None:
        self.parts = parts
        self.copies = copies
        self.hands = Hands()
        self.busy: set[SectorFile] = set()
        self.promised = 0
        self.now_ns = 4_000_000_000 * SECOND
        self.keeper = self.another(limits)

    def another(self, limits: CacheLimits) -> CacheKeeper:
        """A keeper as after a start."""
        self.notes = CacheNotes(
            self.copies.root, self.copies.storage, deadline=5, now_ns=lambda: self.now_ns
        )
        self.keeper = CacheKeeper(
            self.parts.nursery,
            self.copies,
            self.notes,
            self.parts.store,
            self.parts.remover,
            limits,
            readers=self.hands,
            busy=self.busy.__contains__,
            promised=self._promised,
        )
        return self.keeper

    async def _promised(self) -> int:
        return self.promised

    def used(self, *files: SectorFile) -> None:
        """Somebody opens these, one after the other."""
        for file in files:
            self.now_ns += SECOND
            self.keeper.used(file)

    async def copy(self, file: SectorFile, *, elsewhere: bool = True) -> Path:
        """A declared copy of a file, and a primary beside it."""
        content = b"c" * SIZE
        if elsewhere:
            await self.parts.put("primary", file, content)
        return await self.parts.put("cache", file, content, primary=False)

    async def partial(self, file: SectorFile, data: bytes = b"p" * SIZE) -> Path:
        """A file of which a part was fetched."""
        folder = self.copies.root / file.file_type.dir_name / "fetching"
        identity = Identity(4 * SIZE, SECOND)
        found = await PartialFile.open(self.copies.lane, folder, file.sector.name, identity)
        await found.write([(0, data)])
        await found.sync()
        found.close()
        return found.path

    def left(self) -> set[str]:
        """Sector files that lie in the cache path, whole or in part."""
        return {
            str(path.relative_to(self.copies.root))
            for path in self.copies.root.glob("*/**/*")
            if path.is_file() and path.suffix != ".map"
        }


@asynccontextmanager
async def cache_rig(root: Path, limits: CacheLimits) -> AsyncIterator[CacheRig]:
    """A cache path whose limits nobody looks after unless told."""
    async with rig(root, "primary") as parts:
        where = root / "cache"
        storage = metadata.init_cache_path(str(where)).storage
        parts.ids["cache"] = storage
        await parts.store.attach(str(where))
        yield CacheRig(parts, Copies(where, storage, Lane(str(where), deadline=5)), limits)


def disk_usage(path: Path) -> int:
    """Bytes a file occupies."""
    return os.stat(path).st_blocks * 512
