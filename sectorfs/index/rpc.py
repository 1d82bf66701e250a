"""The Index over JSON-RPC: methods over any index, and the client that is an index.

Methods that lotus nodes have keep its names and shapes (`Filecoin.…`); what is ours is
`Sectorfs.…`. Reading needs the permission ``read``, everything else ``admin``.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import GenericAlias
from typing import Any, TypeVar

import trio

from sectorfs.errors import BadInput, TooLarge, Unreachable
from sectorfs.index import checks, lock_shapes, packed_shapes, placement, shapes
from sectorfs.index.lock_rpc import lock_methods
from sectorfs.index.protocol import (
    Changes,
    Declaration,
    FoundStorage,
    FsStat,
    HealthReport,
    Lease,
    LeaseStatus,
    LocationKey,
    PackedPage,
    PathType,
    SectorIndex,
    SnapshotPage,
    StorageInfo,
    StorageStatus,
)
from sectorfs.types import SectorFile, SectorID, StorageID
from sectorfs.wire.jsonrpc import Method, decode_answer, encode_request

S = TypeVar("S")
D = TypeVar("D")

MAX_LISTED = 250_000
"""Declarations that ``StorageList`` gives in its one answer."""
REQUEST_ITEMS = 1000
"""Declarations or keys in one request of the client."""
REQUEST_MEMBERS = 20_000
"""Files of sector directories in one request of the client: about 2 MB of JSON."""

Post = Callable[[bytes, float], Awaitable[tuple[int, bytes]]]
"""Sends a body, waits for the first byte of the answer `patience` seconds longer than usual."""


def index_methods(index: SectorIndex, *, max_listed: int = MAX_LISTED) -> list[Method]:
    """Every method of an Index, for a `Dispatcher`."""
    serve = _Server(index, max_listed=max_listed)
    sector, mask = shapes.SectorShape, int
    return [
        _admin("Filecoin.StorageAttach", serve.attach, shapes.StorageInfoShape, shapes.FsStatShape),
        _admin("Filecoin.StorageDetach", serve.detach, str, str),
        _read("Filecoin.StorageInfo", serve.info, str),
        _admin("Filecoin.StorageReportHealth", serve.report, str, shapes.HealthReportShape),
        _admin("Filecoin.StorageDeclareSector", serve.declare_one, str, sector, mask, bool),
        _admin(
            "Filecoin.BatchStorageDeclareSectors",
            serve.declare,
            list[shapes.DeclarationShape] | None,
        ),
        _admin("Filecoin.StorageDropSector", serve.drop_one, str, sector, mask),
        _read("Filecoin.StorageFindSector", serve.find_as_lotus, sector, mask, int, bool),
        Method(
            name="Filecoin.StorageBestAlloc",
            permission="read",
            params=(mask, int, str, int),
            optional=1,
            handler=serve.best_alloc,
        ),
        _read("Filecoin.StorageList", serve.list_all),
        _read("Sectorfs.FindSector", serve.find, sector, mask, int, bool),
        _read("Sectorfs.StorageStatus", serve.storages),
        _admin("Sectorfs.TellFacts", serve.tell, list[shapes.DeclarationShape] | None),
        _admin("Sectorfs.DropSectors", serve.drop, list[shapes.KeyShape] | None),
        _read("Sectorfs.Sector", serve.sector, sector),
        _read("Sectorfs.Declarations", serve.declarations, str, shapes.FileShape | None, int),
        _read("Sectorfs.Snapshot", serve.snapshot, shapes.KeyShape | None, int),
        _read("Sectorfs.SnapshotColumns", serve.packed, shapes.FileShape | None, int),
        Method(
            name="Sectorfs.Changes",
            permission="read",
            params=(str, int, float, int),
            handler=serve.changes,
            waits=True,
        ),
        *lock_methods(index),
    ]


def _admin(name: str, handler: Callable[..., Awaitable[object]], *params: object) -> Method:
    return Method(name=name, permission="admin", params=params, handler=handler)


def _read(name: str, handler: Callable[..., Awaitable[object]], *params: object) -> Method:
    return Method(name=name, permission="read", params=params, handler=handler)


class _Server:
    """Handlers: shapes in, shapes out."""

    def __init__(self, index: SectorIndex, *, max_listed: int) -> None:
        self._index = index
        self._max_listed = max_listed

    async def attach(self, info: shapes.StorageInfoShape, stat: shapes.FsStatShape) -> None:
        await self._index.attach(shapes.to_info(info), shapes.to_stat(stat, info.storage))

    async def detach(self, storage: str, url: str) -> None:
        await self._index.detach(shapes.to_storage_id(storage), url)

    async def info(self, storage: str) -> shapes.StorageInfoShape:
        return shapes.from_info(await self._index.info(shapes.to_storage_id(storage)))

    async def report(self, storage: str, report: shapes.HealthReportShape) -> None:
        await self._index.report_health(
            shapes.to_storage_id(storage), shapes.to_report(report, storage)
        )

    async def declare_one(
        self, storage: str, sector: shapes.SectorShape, mask: int, primary: bool
    ) -> None:
        shape = shapes.DeclarationShape(
            storage=storage, sector=sector, file_type=mask, primary=primary
        )
        await self.declare([shape])

    async def declare(self, batch: list[shapes.DeclarationShape] | None) -> None:
        await self._index.declare(
            [one for shape in batch or () for one in shapes.to_declarations(shape)]
        )

    async def tell(self, batch: list[shapes.DeclarationShape] | None) -> None:
        await self._index.tell(
            [one for shape in batch or () for one in shapes.to_declarations(shape)]
        )

    async def drop_one(self, storage: str, sector: shapes.SectorShape, mask: int) -> None:
        await self.drop([shapes.KeyShape(storage=storage, sector=sector, file_type=mask)])

    async def drop(self, batch: list[shapes.KeyShape] | None) -> None:
        await self._index.drop([key for shape in batch or () for key in shapes.to_keys(shape)])

    async def find_as_lotus(
        self, sector: shapes.SectorShape, mask: int, sector_size: int, allow_fetch: bool
    ) -> list[shapes.SectorStorageInfoShape] | None:
        rows = await self._find(sector, mask, sector_size, allow_fetch)
        if mask.bit_count() == 1:
            rows = placement.without_caches(rows)
        return [shapes.from_found_as_lotus(row) for row in rows] or None

    async def find(
        self, sector: shapes.SectorShape, mask: int, sector_size: int, allow_fetch: bool
    ) -> list[shapes.FoundShape] | None:
        rows = await self._find(sector, mask, sector_size, allow_fetch)
        return [shapes.from_found(row) for row in rows] or None

    async def _find(
        self, sector: shapes.SectorShape, mask: int, sector_size: int, allow_fetch: bool
    ) -> list[FoundStorage]:
        return await self._index.find(
            shapes.to_sector(sector), mask, sector_size=sector_size, allow_fetch=allow_fetch
        )

    async def best_alloc(
        self, mask: int, sector_size: int, path_type: str, miner: int = 0
    ) -> list[shapes.StorageInfoShape] | None:
        storages = await self._index.best_alloc(
            mask, sector_size, path_type=shapes.to_path_type(path_type), miner=miner
        )
        return [shapes.from_info(info) for info in storages] or None

    async def list_all(self) -> dict[str, list[shapes.DeclShape]]:
        """Every storage, also the empty ones, with one mask per sector."""
        listed = 0
        answer: dict[str, list[shapes.DeclShape]] = {}
        for status in await self._index.storages():
            storage = status.info.storage
            masks: dict[SectorID, int] = {}
            after: SectorFile | None = None
            while page := await self._index.declarations(storage, after=after):
                listed += len(page)
                if listed > self._max_listed:
                    raise TooLarge(
                        f"more than {self._max_listed} declarations",
                        "StorageList",
                        "page through Sectorfs.Declarations",
                    )
                for file in (declaration.file for declaration in page):
                    masks[file.sector] = masks.get(file.sector, 0) | file.file_type
                after = page[-1].file
            answer[storage] = [
                shapes.DeclShape(miner=one.miner, number=one.number, sector_file_type=mask)
                for one, mask in sorted(masks.items())
            ]
        return answer

    async def storages(self) -> list[shapes.StatusShape] | None:
        return [shapes.from_status(one) for one in await self._index.storages()] or None

    async def sector(self, sector: shapes.SectorShape) -> list[shapes.DeclarationShape] | None:
        return shapes.from_declarations(await self._index.sector(shapes.to_sector(sector)))

    async def declarations(
        self, storage: str, after: shapes.FileShape | None, limit: int
    ) -> list[shapes.DeclarationShape] | None:
        declarations = await self._index.declarations(
            shapes.to_storage_id(storage),
            after=None if after is None else shapes.to_file(after),
            limit=limit,
        )
        return shapes.from_declarations(declarations)

    async def snapshot(self, after: shapes.KeyShape | None, limit: int) -> shapes.SnapshotShape:
        key = None if after is None else shapes.to_key(after)
        return shapes.from_snapshot(await self._index.snapshot(after=key, limit=limit))

    async def packed(
        self, after: shapes.FileShape | None, limit: int
    ) -> packed_shapes.PackedPageShape:
        file = None if after is None else shapes.to_file(after)
        return packed_shapes.from_page(await self._index.packed(after=file, limit=limit))

    async def changes(self, epoch: str, seq: int, wait: float, limit: int) -> shapes.ChangesShape:
        return shapes.from_changes(await self._index.changes(epoch, seq, wait=wait, limit=limit))


class RpcIndex:
    """A `SectorIndex` on another node. Batches are cut; each cut is atomic, all of them are not."""

    def __init__(self, url: str, post: Post) -> None:
        self.url = url
        self._post = post
        self._ids = itertools.count(1)

    async def attach(self, info: StorageInfo, stat: FsStat) -> None:
        """Make a storage known, or merge its URLs and update its other fields."""
        checks.check_info(info)
        checks.check_stat(stat, info.storage)
        params = [shapes.from_info(info), shapes.from_stat(stat)]
        await self._call("Filecoin.StorageAttach", params, type(None))

    async def detach(self, storage: StorageID, url: str) -> None:
        """Forget one URL of a storage; with its last URL, the storage and its declarations."""
        await self._call("Filecoin.StorageDetach", [storage, url], type(None))

    async def info(self, storage: StorageID) -> StorageInfo:
        """What was attached."""
        shape = await self._call("Filecoin.StorageInfo", [storage], shapes.StorageInfoShape)
        return self._checked(shapes.to_info, shape)

    async def storages(self) -> list[StorageStatus]:
        """Every storage by ascending id."""
        found = await self._rows("Sectorfs.StorageStatus", [], shapes.StatusShape)
        return self._each(shapes.to_status, found)

    async def report_health(self, storage: StorageID, report: HealthReport) -> None:
        """Store a heartbeat."""
        checks.check_stat(report.stat, storage)
        shape = shapes.HealthReportShape(
            stat=shapes.from_stat(report.stat), err=report.error[: checks.MAX_ERROR]
        )
        await self._call("Filecoin.StorageReportHealth", [storage, shape], type(None))

    async def declare(self, declarations: Sequence[Declaration]) -> None:
        """Declare a batch."""
        batch = tuple(declarations)
        for declaration in batch:
            checks.check_declaration(declaration)
        await trio.lowlevel.checkpoint()
        for part in _cut(batch):
            params = [shapes.from_declarations(part)]
            await self._call("Filecoin.BatchStorageDeclareSectors", params, type(None))

    async def tell(self, found: Sequence[Declaration]) -> None:
        """Set the facts of declarations there are; others are passed over."""
        batch = tuple(found)
        for declaration in batch:
            checks.check_declaration(declaration)
        await trio.lowlevel.checkpoint()
        for part in _cut(batch):
            params = [shapes.from_declarations(part)]
            await self._call("Sectorfs.TellFacts", params, type(None))

    async def drop(self, keys: Sequence[LocationKey]) -> None:
        """Drop declarations; one that does not exist is fine."""
        batch = tuple(keys)
        for key in batch:
            checks.check_key(key)
        await trio.lowlevel.checkpoint()
        for start in range(0, len(batch), REQUEST_ITEMS):
            part = [shapes.from_key(key) for key in batch[start : start + REQUEST_ITEMS]]
            await self._call("Sectorfs.DropSectors", [part], type(None))

    async def find(
        self, sector: SectorID, mask: int, *, sector_size: int = 0, allow_fetch: bool = False
    ) -> list[FoundStorage]:
        """Storages that hold any of the types in `mask`."""
        checks.mask_types(mask)
        checks.check_sector(sector)
        checks.check_number(sector_size, "sector size", sector)
        params = [shapes.from_sector(sector), mask, sector_size, allow_fetch]
        found = await self._rows("Sectorfs.FindSector", params, shapes.FoundShape)
        return self._each(shapes.to_found, found)

    async def best_alloc(
        self, mask: int, sector_size: int, *, path_type: PathType, miner: int
    ) -> list[StorageInfo]:
        """Storages with room for new files of all types in `mask`, best first."""
        checks.mask_types(mask)
        checks.check_number(sector_size, "sector size", "placement")
        checks.check_number(miner, "miner", "best allocation")
        found = await self._rows(
            "Filecoin.StorageBestAlloc",
            [mask, sector_size, path_type, miner],
            shapes.StorageInfoShape,
        )
        return self._each(shapes.to_info, found)

    async def sector(self, sector: SectorID) -> list[Declaration]:
        """Every declaration of a sector in key order."""
        checks.check_sector(sector)
        found = await self._rows(
            "Sectorfs.Sector", [shapes.from_sector(sector)], shapes.DeclarationShape
        )
        return self._each(shapes.to_declaration, found)

    async def declarations(
        self, storage: StorageID, *, after: SectorFile | None = None, limit: int = 1000
    ) -> list[Declaration]:
        """Declarations of one storage by ascending sector file, from past `after` on."""
        if after is not None:
            checks.check_sector(after.sector)
        shape = None if after is None else shapes.from_file(after)
        found = await self._rows(
            "Sectorfs.Declarations",
            [storage, shape, checks.page_size(limit)],
            shapes.DeclarationShape,
        )
        return self._each(shapes.to_declaration, found)

    async def snapshot(
        self, *, after: LocationKey | None = None, limit: int = 1000
    ) -> SnapshotPage:
        """A page of the whole Index."""
        if after is not None:
            checks.check_key(after)
        shape = None if after is None else shapes.from_key(after)
        page = await self._call(
            "Sectorfs.Snapshot", [shape, checks.page_size(limit)], shapes.SnapshotShape
        )
        return self._checked(shapes.to_snapshot, page)

    async def packed(self, *, after: SectorFile | None = None, limit: int = 1000) -> PackedPage:
        """A page of the whole Index in columns."""
        if after is not None:
            checks.check_sector(after.sector)
        shape = None if after is None else shapes.from_file(after)
        page = await self._call(
            "Sectorfs.SnapshotColumns",
            [shape, checks.page_size(limit)],
            packed_shapes.PackedPageShape,
        )
        return self._checked(packed_shapes.to_page, page)

    async def changes(self, epoch: str, seq: int, *, wait: float = 0, limit: int = 1000) -> Changes:
        """Changes after `seq`; waits up to `wait` seconds while there are none."""
        checks.check_number(seq, "seq", "changes")
        wait = checks.poll_seconds(wait)
        params = [epoch, seq, wait, checks.page_size(limit)]
        found = await self._call("Sectorfs.Changes", params, shapes.ChangesShape, patience=wait)
        return self._checked(shapes.to_changes, found)

    async def lock(self, lease: Lease, *, wait: float = 0) -> bool:
        """Grant a lock, waiting up to `wait` seconds for others.

        Cancelled, it may still be granted there: `release` says that it is not wanted.
        """
        checks.check_lease(lease)
        wait = checks.poll_seconds(wait)
        params = [lock_shapes.from_lease(lease), wait]
        return await self._call("Sectorfs.Lock", params, bool, patience=wait)

    async def renew(self, token: str) -> None:
        """Let a lease last anew; `LeaseLost` when it has ended."""
        checks.check_token(token)
        await self._call("Sectorfs.RenewLock", [token], type(None))

    async def release(self, token: str) -> None:
        """End a lease, or the wait for it; one that has ended, or never was, is fine."""
        checks.check_token(token)
        await self._call("Sectorfs.ReleaseLock", [token], type(None))

    async def leases(self) -> list[LeaseStatus]:
        """Everything that is locked, then what waits, each by sector."""
        found = await self._rows("Sectorfs.Locks", [], lock_shapes.LeaseStatusShape)
        return self._each(lock_shapes.to_status, found)

    async def _call(
        self, method: str, params: object, result: type[S], *, patience: float = 0
    ) -> S:
        answer: S = await self._ask(method, params, result, patience)
        return answer

    async def _rows(self, method: str, params: object, row: type[S]) -> list[S]:
        rows = GenericAlias(list, (row,)) | None
        answer: list[S] | None = await self._ask(method, params, rows, 0)
        return answer or []

    async def _ask(self, method: str, params: object, result: object, patience: float) -> Any:
        request_id = next(self._ids)
        status, body = await self._post(encode_request(request_id, method, params), patience)
        return decode_answer(status, body, request_id=request_id, result=result, url=self.url)

    def _checked(self, convert: Callable[[S], D], shape: S) -> D:
        """A value out of an answer: what the Index should not have sent is its failure."""
        try:
            return convert(shape)
        except BadInput as exc:
            raise Unreachable(f"the Index answered nonsense: {exc}", self.url) from exc

    def _each(self, convert: Callable[[S], D], found: list[S]) -> list[D]:
        return [self._checked(convert, shape) for shape in found]


def _cut(batch: Sequence[Declaration]) -> Iterator[list[Declaration]]:
    """Parts of a batch that fit into one request each."""
    part: list[Declaration] = []
    members = 0
    for declaration in batch:
        count = len(declaration.facts.members or ()) if declaration.facts is not None else 0
        if part and (len(part) == REQUEST_ITEMS or members + count > REQUEST_MEMBERS):
            yield part
            part, members = [], 0
        part.append(declaration)
        members += count
    if part:
        yield part
