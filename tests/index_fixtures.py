"""What the tests of the Index share: short builders, and both kinds of index over one file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import structs

from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.merge import Reload
from sectorfs.index.packed import Pack, PackedRow, pack
from sectorfs.index.protocol import (
    Declaration,
    FsStat,
    Lease,
    LocationKey,
    Lock,
    PackedPage,
    SectorIndex,
    StorageInfo,
)
from sectorfs.index.rpc import RpcIndex, index_methods
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from sectorfs.wire.jsonrpc import Dispatcher

ADMIN = frozenset({"admin"})
CUTOFF = 50.0
STAT = FsStat(capacity=100, available=60, fs_available=70, reserved=1, max=90, used=30)
RPC_URL = "http://index:8480/rpc/v0"


class Clock:
    """A wall clock that tests set."""

    def __init__(self) -> None:
        self.ns = 1_700_000_000_000_000_000

    def __call__(self) -> int:
        return self.ns


def sector(number: int, miner: int = 1000) -> SectorID:
    """A sector of one miner."""
    return SectorID(miner, number)


def file(number: int, file_type: FileType = FileType.SEALED) -> SectorFile:
    """A sector file of one miner."""
    return SectorFile(file_type, sector(number))


def info(storage: str, **fields: object) -> StorageInfo:
    """A storage with one URL of its own."""
    values = {"urls": (f"http://{storage}:8480/remote",), **fields}
    return StorageInfo(storage=StorageID(storage), **values)


def held(
    storage: str,
    of: SectorFile | int,
    *,
    primary: bool = True,
    facts: Facts | None = None,
) -> Declaration:
    """A declaration; a number means the sealed file of that sector."""
    what = file(of) if isinstance(of, int) else of
    return Declaration(what, StorageID(storage), primary, facts)


def key(storage: str, of: SectorFile | int) -> LocationKey:
    """The key of such a declaration."""
    return held(storage, of).key


def directory(*names: str, mtime_ns: int = 5) -> Facts:
    """Facts of a directory of one-byte files."""
    members = tuple(MemberFacts(name, 1, mtime_ns) for name in sorted(names))
    return Facts(len(members), mtime_ns, members)


def digested(facts: Facts, byte: int) -> Facts:
    """The same facts with a digest of equal bytes; none for zero."""
    return structs.replace(facts, digest=bytes([byte]) * 32 if byte else b"")


def lease(holder: str, of: int = 7, *, read: int = 0, write: int = 0, seconds: float = 60) -> Lease:
    """A lease whose token tells the holder."""
    return Lease(
        token=holder.replace(" ", "-").ljust(16, "_"),
        lock=Lock(sector=sector(of), read=read, write=write),
        owner=holder,
        reason="a test",
        seconds=seconds,
    )


def pack_of(declarations: Iterable[Declaration]) -> Pack:
    """Declarations, which are in key order, as columns."""
    return pack(map(_row, declarations), lambda facts: [structs.astuple(one) for one in facts])


def _row(one: Declaration) -> PackedRow[tuple[MemberFacts, ...]]:
    sector, facts = one.file.sector, one.facts
    return (
        int(one.file.file_type),
        sector.miner,
        sector.number,
        one.storage,
        int(one.primary),
        None if facts is None else facts.size,
        None if facts is None else facts.mtime_ns,
        None if facts is None else facts.members,
        None if facts is None else facts.digest,
    )


def merged(
    catalog: Catalog, snapshot: Iterable[PackedPage], *, now_ns: int = 0
) -> list[FileChange]:
    """Merge a whole snapshot into a catalog."""
    reload = Reload(catalog)
    return [
        change
        for page in snapshot
        for found in reload.add(page, now_ns=now_ns, now=0)
        for change in found
    ]


def rpc_over(index: SectorIndex, permissions: frozenset[str] = ADMIN) -> RpcIndex:
    """The RPC client of an index, with the server's dispatcher where the network would be."""
    dispatch = Dispatcher(index_methods(index))

    async def post(body: bytes, patience: float) -> tuple[int, bytes]:
        return await dispatch(body, permissions)

    return RpcIndex(RPC_URL, post)


@asynccontextmanager
async def open_index(
    path: Path, *, clock: Clock | None = None, keep_changes: int = 1000, over_rpc: bool = False
) -> AsyncIterator[SectorIndex]:
    """An index in `path`, spoken to directly or over JSON-RPC."""
    async with SqliteIndex.open(
        path, cutoff=CUTOFF, clock_ns=clock or Clock(), keep_changes=keep_changes
    ) as index:
        yield rpc_over(index) if over_rpc else index


@dataclass
class World:
    """The index under test and the clock it reads."""

    index: SectorIndex
    clock: Clock


@pytest.fixture(params=["sqlite", "rpc"])
async def both_kinds(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """An index, the embedded one and over JSON-RPC; a test module calls it `world`."""
    clock = Clock()
    over_rpc = request.param == "rpc"
    async with open_index(tmp_path / "index.db", clock=clock, over_rpc=over_rpc) as index:
        yield World(index, clock)


@pytest.fixture
def index_of_world(world: World) -> SectorIndex:
    """The index alone; a test module calls it `index`."""
    return world.index
