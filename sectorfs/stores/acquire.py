"""Finds, fetches and allocates the files that one piece of work on a sector needs.

*Existing* types are looked for on this node's paths, then fetched from other nodes; *allocated*
types get a path with room, where nothing is made: whoever writes there makes it. Everything
acquired stays reserved until the block ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

import msgspec

from sectorfs.errors import BadInput, DiskFull, NoSource, NotFound, Refused, SectorFSError
from sectorfs.index.placement import accepts
from sectorfs.index.protocol import Declaration, PathType, SectorIndex, StorageInfo
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.moving import Mover
from sectorfs.stores.reservation import Claim, Place, claims_for
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.types import FileType, SectorFile, SectorID, StorageID, file_types

Mode = Literal["copy", "move"]


class Acquired(msgspec.Struct):
    """Where the files of a sector are, or are to be made, on this node."""

    sector: SectorID
    paths: dict[FileType, str] = {}
    """A type that was looked for here alone, and is not here, has no entry."""
    storages: dict[FileType, StorageID] = {}

    def put(self, path: LocalPath, file_type: FileType) -> None:
        """Fill the slot of a type."""
        self.paths[file_type] = path.name_of(SectorFile(file_type, self.sector))
        self.storages[file_type] = path.storage


class Acquirer:
    """Acquires files of sectors on the paths of this node."""

    def __init__(
        self, *, index: SectorIndex, local: LocalStore, space: SpaceLedger, mover: Mover
    ) -> None:
        self._index = index
        self._local = local
        self._space = space
        self._mover = mover

    @asynccontextmanager
    async def local(
        self,
        sector: SectorID,
        existing: int,
        allocate: int,
        *,
        path_type: PathType,
        sector_size: int,
    ) -> AsyncIterator[Acquired]:
        """What is on this node, and room for new files; what is not here is an empty slot."""
        _check(sector, existing, allocate)
        async with AsyncExitStack() as stack:
            found = Acquired(sector)
            held = await self._index.sector(sector)
            for file_type in _types(existing):
                path = self._holder(held, file_type)
                if path is not None:
                    found.put(path, file_type)
            await self._allocate(stack, found, _types(allocate), path_type, sector_size)
            yield found

    @asynccontextmanager
    async def acquire(
        self,
        sector: SectorID,
        existing: int,
        allocate: int,
        *,
        path_type: PathType,
        mode: Mode,
        sector_size: int,
    ) -> AsyncIterator[Acquired]:
        """As `local`, and what only others have is fetched; `NotFound` when nobody has it.

        By `move` what was fetched becomes primary here and is taken from where it came.
        """
        _check(sector, existing, allocate)
        async with AsyncExitStack() as stack:
            found = await stack.enter_async_context(
                self.local(sector, existing, 0, path_type=path_type, sector_size=sector_size)
            )
            for file_type in _types(existing):
                if file_type not in found.paths:
                    await self._fetch(found, file_type, path_type, mode)
            await self._allocate(stack, found, _types(allocate), path_type, sector_size)
            yield found

    # Existing files

    def _holder(self, held: Sequence[Declaration], file_type: FileType) -> LocalPath | None:
        """The path here that holds a type: primary first, then by weight."""
        here = {path.storage: path for path in self._local.paths() if path.available}
        fit = [item for item in held if item.file.file_type is file_type and item.storage in here]
        fit.sort(key=lambda item: (not item.primary, -here[item.storage].info.weight, item.storage))
        return here[fit[0].storage] if fit else None

    async def _fetch(
        self, found: Acquired, file_type: FileType, path_type: PathType, mode: Mode
    ) -> None:
        file = SectorFile(file_type, found.sector)
        held = [item for item in await self._index.sector(found.sector) if item.file == file]
        if not held:
            raise NotFound("no storage declares it", file, "see `sectorfs storage find`")
        held.sort(key=lambda item: (not item.primary, item.storage))
        causes: list[SectorFSError] = []
        for item in held:
            try:
                size = item.facts.size if item.facts else 0
                path = await self._room(file, size, path_type)
                await self._mover.bring(file, path.storage, item.storage, move=mode == "move")
            except (DiskFull, Refused):
                raise
            except SectorFSError as exc:
                causes.append(exc)
            else:
                found.put(path, file_type)
                return
        raise NoSource("no storage that declares it gives it", file, causes)

    async def _room(self, file: SectorFile, size: int, path_type: PathType) -> LocalPath:
        """The fit path of this node with the most room, weighted."""
        fit = []
        for path in self._fit(file, path_type):
            stat = await self._space.stat(path)
            if stat.available >= size:
                fit.append((-stat.available * path.info.weight, path.storage, path))
        if not fit:
            raise DiskFull(f"no path of this node has room for {size} bytes", file, "make room")
        return min(fit, key=lambda one: one[:2])[2]

    def _fit(self, file: SectorFile, path_type: PathType) -> list[LocalPath]:
        return [
            path
            for path in self._local.paths()
            if path.available
            and accepts(path.info, file.file_type, path_type=path_type, miner=file.sector.miner)
        ]

    # New files

    async def _allocate(
        self,
        stack: AsyncExitStack,
        found: Acquired,
        types: Sequence[FileType],
        path_type: PathType,
        sector_size: int,
    ) -> None:
        """Choose and reserve a path for each type: one that holds it already, else the best."""
        held = await self._index.sector(found.sector) if types else []
        for file_type in types:
            file = SectorFile(file_type, found.sector)
            path = self._reusable(held, file, path_type)
            candidates = (
                [path] if path is not None else await self._best(file, path_type, sector_size)
            )
            path = await self._reserve(stack, file, candidates, path_type, sector_size)
            found.put(path, file_type)

    def _reusable(
        self, held: Sequence[Declaration], file: SectorFile, path_type: PathType
    ) -> LocalPath | None:
        holders = {item.storage for item in held if item.file == file}
        fit = [path for path in self._fit(file, path_type) if path.storage in holders]
        return min(fit, key=lambda path: (-path.info.weight, path.storage), default=None)

    async def _best(
        self, file: SectorFile, path_type: PathType, sector_size: int
    ) -> list[LocalPath]:
        best: list[StorageInfo] = await self._index.best_alloc(
            file.file_type, sector_size, path_type=path_type, miner=file.sector.miner
        )
        fit: Mapping[StorageID, LocalPath] = {
            path.storage: path for path in self._fit(file, path_type)
        }
        ranked = [fit[info.storage] for info in best if info.storage in fit]
        # The fewest tasks under way first: several writers share a disk badly.
        return sorted(ranked, key=lambda path: len(self._space.claims(path.storage)))

    async def _reserve(
        self,
        stack: AsyncExitStack,
        file: SectorFile,
        candidates: Sequence[LocalPath],
        path_type: PathType,
        sector_size: int,
    ) -> LocalPath:
        failure: DiskFull | None = None
        for path in candidates:
            place: Place = "final"
            claims: list[Claim] = claims_for(
                file.sector,
                {file.file_type: path.storage},
                sector_size,
                path_type=path_type,
                place=place,
                known={},
            )
            try:
                await stack.enter_async_context(self._space.reserve(claims))
            except DiskFull as exc:
                failure = exc
            else:
                return path
        raise failure or DiskFull(
            "no path of this node may take it and has room", file, "see `sectorfs storage list`"
        )


def _types(mask: int) -> tuple[FileType, ...]:
    if not mask:
        return ()
    return file_types(mask)


def _check(sector: SectorID, existing: int, allocate: int) -> None:
    if existing & allocate:
        raise BadInput("the same type can not be both found and allocated", sector)
    try:
        _types(existing), _types(allocate)
    except ValueError as exc:
        raise BadInput(str(exc), sector) from exc
