"""What other implementations of these formats got wrong, or what is easily misread: each once."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from sectorfs.config import Config, TimeoutsConfig
from sectorfs.errors import BadInput, NotFound, SourceFailed
from sectorfs.index.placement import allows_type, space_needed
from sectorfs.index.proof_shapes import PorepShape, to_cid
from sectorfs.index.protocol import FsStat, HealthReport, SectorIndex, StorageInfo
from sectorfs.index.rpc import index_methods
from sectorfs.stores import holes, layout, rle, sources
from sectorfs.stores.archives import CacheSink, fetch_directory
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.metadata import init_cache_path, read_metadata, write_metadata
from sectorfs.stores.reservation import Claim, Reservations, Room
from sectorfs.stores.rle import Runs
from sectorfs.stores.space import RawSpace, usage_steps
from sectorfs.stores.tar_writer import TarMember, TarWriter
from sectorfs.stores.trailer import PartialFile
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import (
    Facts,
    FileType,
    MemberFacts,
    SectorFile,
    SectorID,
    StorageID,
    file_types,
    parse_sector,
    parse_storage_id,
)
from sectorfs.wire.client import Client
from sectorfs.wire.jsonrpc import Dispatcher
from tests.archive_fixtures import COMPLETE, FINALIZED, Foreign, foreign, served
from tests.index_fixtures import ADMIN, STAT, Clock, held, info, lease, open_index
from tests.local_fixtures import (
    declared,
    make_path,
    make_store,
    put,
    sector_file,
    switched_index,
)
from tests.moving_fixtures import rig
from tests.tar_fixtures import read, unterminated
from tests.wire_fixtures import FolderFiles, peer, read_request

SIZE = 2048
UNSEALED = SectorFile(FileType.UNSEALED, SectorID(1000, 7))
SEALED = SectorFile(FileType.SEALED, SectorID(1000, 7))
CACHE = SectorFile(FileType.CACHE, SectorID(1000, 7))
TIMEOUTS = TimeoutsConfig(connect=5, first_byte=5, progress=5, disk=5)


def partial_file(path: Path, *spans: tuple[int, int]) -> PartialFile:
    """An unsealed file of a 2 KiB sector with some padded bytes there; left open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT))
    made = PartialFile.create(descriptor, sector_size=SIZE, thing=path)
    for offset, size in spans:
        made.mark(offset, size)
    return made


@pytest.fixture
async def index(tmp_path: Path) -> Any:
    async with open_index(tmp_path / "index.db") as opened:
        yield opened


# The disk


async def test_01_names_are_strict_and_tolerated_leftovers_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert SectorID(1000, 7).name == "s-t01000-7"
    assert SectorID(0, 42).name == "s-t00-42"
    for name in ("s-f01000-7", "s-t1000-7", "s-t01000-7.tmp", "s-t01000-7.bak", "s-t01000-07"):
        with pytest.raises(ValueError, match="not a sector name"):
            parse_sector(name)
    path = tmp_path / "disk"
    storage = make_path(path, can_seal=True)
    good = [sector_file(FileType.SEALED, 7), sector_file(FileType.PIECE, 42, miner=0)]
    for file in good:
        put(path, file)
    for name in ("s-t01000-8.tmp", "s-t01000-9.bak", ".DS_Store"):
        (path / "sealed" / name).write_bytes(b"x")
    (path / "sealed/lost+found").mkdir()
    (path / "sealed/fetching").mkdir()
    (path / "sealed/fetching/s-t01000-10").write_bytes(b"half of it")
    (path / "stash").mkdir()
    (path / "stash/s-t01000-11").write_bytes(b"x")
    async with switched_index(tmp_path) as opened:
        await make_store(opened).attach(str(path))
        assert sorted(await declared(opened, storage)) == sorted(good)
    assert "s-t01000-9.bak" in caplog.text
    assert "s-t01000-10" not in caplog.text


def test_02_the_trailer_starts_at_the_padded_size_and_none_means_all(tmp_path: Path) -> None:
    empty = partial_file(tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == bytes(SIZE) + bytes(4)
    empty.mark(0, SIZE // 2)
    # RLE+ 041001, then its length in four little-endian bytes.
    assert (tmp_path / "empty").read_bytes()[SIZE:] == bytes.fromhex("04100103000000")
    empty.descriptor.close()
    (tmp_path / "whole").write_bytes(b"w" * SIZE)
    descriptor = Descriptor(os.open(tmp_path / "whole", os.O_RDONLY))
    whole = PartialFile.open(descriptor, sector_size=SIZE, thing="whole")
    assert whole.allocated == Runs.span(0, SIZE)
    descriptor.close()


def test_03_rle_is_minimal_and_a_trailing_zero_byte_is_refused() -> None:
    assert rle.encode(Runs()) == b""
    assert rle.encode(Runs.span(0, 2048)) == bytes.fromhex("041002")
    assert rle.encode(Runs.span(128, 128)) == bytes.fromhex("003000c0")
    assert rle.decode(bytes.fromhex("041002")) == Runs.span(0, 2048)
    with pytest.raises(BadInput):
        rle.decode(bytes.fromhex("04100200"))


async def test_04_allocated_is_unpadded_and_range_is_padded(tmp_path: Path) -> None:
    half = partial_file(tmp_path / str(UNSEALED), (0, 1024))
    half.write(1023, b"x")
    half.descriptor.close()
    async with served(FolderFiles(tmp_path)) as node:
        path = f"/remote/{UNSEALED}"
        assert (await node.ask(f"{path}/0/allocated/0/1016")).status == 200
        assert (await node.ask(f"{path}/0/allocated/0/1017")).status == 416
        answer = await node.ask(path, ("Range", "bytes=1016-1023"))
        assert answer.body == bytes(7) + b"x"


async def test_05_the_sector_size_comes_from_the_seal_proof_and_zero_is_one(
    tmp_path: Path,
) -> None:
    assert layout.sector_size_of(0) == layout.sector_size_of(5) == 2048
    assert [layout.sector_size_of(proof) for proof in (8, 9)] == [32 << 30, 64 << 30]
    partial_file(tmp_path / str(UNSEALED), (0, SIZE)).descriptor.close()
    async with served(FolderFiles(tmp_path)) as node:
        path = f"/remote/{UNSEALED}"
        assert (await node.ask(f"{path}/0/allocated/2031/1")).status == 200
        assert (await node.ask(f"{path}/0/allocated/2032/1")).status == 416
        assert (await node.ask(f"{path}/8/allocated/0/1")).status == 400
        assert (await node.ask(f"{path}/20/allocated/0/1")).status == 400


# HTTP


async def test_06_peers_answer_as_go_does_and_we_answer_better(tmp_path: Path) -> None:
    async def script(stream: trio.SocketStream) -> None:
        head = await read_request(stream)
        if b"/stat/" in head:
            body = b'{"Capacity":9,"Available":8,"Reserved":7}\n'
            kind = b"Content-Type: text/plain; charset=utf-8\r\n"
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)
            )
            return
        status = b"405" if head.startswith(b"HEAD") else b"500"
        await stream.send_all(b"HTTP/1.1 %b X\r\nContent-Length: 0\r\n\r\n" % status)

    async with peer(script) as url, Client(TIMEOUTS) as client:
        peers = PeerClient(client)
        assert (await peers.stat(f"{url}/remote", StorageID("st-1"))).capacity == 9
        with pytest.raises(SourceFailed, match="status 500"):
            await peers.facts(f"{url}/remote", SEALED)
    put(tmp_path, SEALED)
    put(tmp_path, CACHE, FINALIZED)
    async with served(FolderFiles(tmp_path)) as node:
        assert (await node.ask(f"/remote/{SEALED}", method="HEAD")).status == 200
        assert (await node.ask(f"/remote/{CACHE}", method="HEAD")).status == 200
        part = await node.ask(f"/remote/{CACHE}", ("Range", "bytes=0-0"))
        assert (part.status, part.body.count(b"\n")) == (416, 1)
        missing = await node.ask("/remote/sealed/s-t01000-8")
        assert (missing.status, missing.body.count(b"\n")) == (404, 1)
        stat = await node.ask("/remote/stat/st-1")
        assert stat.headers["content-type"] == "application/json"


def test_07_unterminated_tar_is_read_and_large_sizes_are_pax_records() -> None:
    data = unterminated(FINALIZED)
    with (
        pytest.raises(tarfile.ReadError, match="unexpected end of data"),
        tarfile.open(fileobj=io.BytesIO(data)) as archive,
    ):
        archive.getmembers()
    found, ending = read([data])
    assert found == FINALIZED
    assert ending.unterminated
    big = TarMember(name="sc-02-data-layer-1.dat", size=32 << 30, mtime_ns=0)
    first = next(iter(TarWriter([big])))
    assert isinstance(first, bytes)
    assert b"size=34359738368\n" in first


async def test_08_a_tar_without_a_file_is_not_a_whole_directory(tmp_path: Path) -> None:
    members = tuple(MemberFacts(name, len(COMPLETE[name]), 1) for name in sorted(COMPLETE))
    expected = Facts(sum(member.size for member in members), 1, members)
    storage = init_cache_path(str(tmp_path)).storage
    copies = Copies(tmp_path, storage, Lane("copies", deadline=5))
    async with foreign(Foreign(f"/remote/{CACHE}", COMPLETE)) as base, Client(TIMEOUTS) as client:
        with pytest.raises(SourceFailed, match="lacks sc-02-data-tree-c"):
            await fetch_directory(
                PeerClient(client),
                CacheSink(copies, CACHE, late=False),
                base,
                CACHE,
                expected=expected,
                whole=False,
                proof=None,
                progress=lambda n: None,
            )
    assert not await copies.exists(CACHE)


async def test_09_ids_to_keep_are_joined_by_dots_so_no_id_has_one(tmp_path: Path) -> None:
    assert parse_storage_id("0d1b5b9c-63f4-4b8b-9b7e-2f1f6c1a7c11")
    for text in ("a.b", "a/b", "a b", "", "a&b"):
        with pytest.raises(ValueError, match="not a storage id"):
            parse_storage_id(text)
    asked: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        asked.append((await read_request(stream)).split(b"\r\n")[0])
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with peer(script) as url, Client(TIMEOUTS) as client:
        keep = (StorageID("a"), StorageID("b"))
        await PeerClient(client).remove(f"{url}/remote", SEALED, keep=keep)
    assert asked == [b"DELETE /remote/sealed/s-t01000-7?keep=a.b HTTP/1.1"]
    async with rig(tmp_path, "shared", "private") as it:
        for name in ("shared", "private"):
            await it.put(name, SEALED)
        await it.remover.remove_for(SEALED, keep=(it.ids["shared"],), force=False)
        assert await it.holders(SEALED) == {"shared": True}


# Stores


async def test_10_what_is_not_here_is_an_error_and_no_empty_path(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    make_path(path)
    async with switched_index(tmp_path) as opened:
        store = make_store(opened)
        await store.attach(str(path))
        for call in (store.open_file(SEALED), store.listing(SEALED)):
            with pytest.raises(NotFound):
                await call
        with pytest.raises(NotFound):
            await store.open_directory(CACHE, only=None)
        assert store.local_path(SEALED) is None


async def test_11_allocating_finds_what_is_there_already(tmp_path: Path) -> None:
    async with rig(tmp_path) as it:
        await it.add("heavy", weight=100)
        await it.add("light", weight=1)
        for path in it.store.paths():
            stat = await it.store.stat(path.storage)
            await it.index.report_health(path.storage, HealthReport(stat=stat))

        async def allocated(path_type: Any = "storage") -> str:
            async with it.acquirer.local(
                SEALED.sector, 0, FileType.SEALED, path_type=path_type, sector_size=SIZE
            ) as found:
                return found.paths[FileType.SEALED]

        assert await allocated() == str(it.path("heavy") / str(SEALED))
        here = await it.put("light", SEALED)
        data = here.read_bytes()
        assert await allocated() == str(here)
        assert here.read_bytes() == data  # who writes there decides what becomes of it
        await it.add("sealing", can_seal=True, can_store=False)
        sealing = it.store.paths()[-1]
        stat = await it.store.stat(sealing.storage)
        await it.index.report_health(sealing.storage, HealthReport(stat=stat))
        # Not if it lies where this kind of work must not write.
        assert await allocated("sealing") == str(it.path("sealing") / str(SEALED))


async def test_11_an_allow_list_of_typos_denies_everything(index: SectorIndex) -> None:
    typos = info("a", can_store=True, allow_types=("seeled", "Cache"))
    await index.attach(typos, STAT)
    kept = await index.info(typos.storage)
    assert kept.allow_types == ("seeled", "Cache")
    assert not any(allows_type(kept, file_type) for file_type in FileType)


async def test_12_attaching_again_merges_urls_and_updates_the_rest(index: SectorIndex) -> None:
    await index.attach(info("a", urls=("http://one/remote",), weight=1), STAT)
    await index.attach(info("a", urls=("http://two/remote",), weight=2, can_seal=True), STAT)
    known = await index.info(StorageID("a"))
    assert sorted(known.urls) == ["http://one/remote", "http://two/remote"]
    assert (known.weight, known.can_seal) == (2, True)


# Placement


async def test_13_one_open_holder_opens_the_gate_and_none_closes_it(index: SectorIndex) -> None:
    async def fetchers() -> list[str]:
        rows = await index.find(SEALED.sector, SEALED.file_type, allow_fetch=True)
        return [row.info.storage for row in rows if row.weight == 0]

    await index.attach(info("member", can_seal=True, groups=("g",)), STAT)
    await index.attach(info("stranger", can_seal=True), STAT)
    await index.attach(info("shut", allow_to=("g",)), STAT)
    await index.attach(info("open"), STAT)
    assert await fetchers() == []
    await index.declare([held("shut", SEALED)])
    assert await fetchers() == ["member"]
    await index.declare([held("open", SEALED)])
    assert await fetchers() == ["member", "stranger"]
    best = await _best(index, path_type="sealing")
    assert best == ["member", "stranger"]  # groups do not matter for new files


async def _best(
    index: SectorIndex, *, path_type: Any = "storage", miner: int = 1000, size: int = 10
) -> list[str]:
    found = await index.best_alloc(SEALED.file_type, size, path_type=path_type, miner=miner)
    return [one.storage for one in found]


async def test_14_miner_filters_are_part_of_best_alloc_and_type_filters_are_not(
    index: SectorIndex,
) -> None:
    await index.attach(info("a", can_store=True, deny_types=("sealed",)), STAT)
    await index.attach(info("b", can_store=True, allow_miners=("t01001",)), STAT)
    await index.attach(info("c", can_store=True, deny_miners=("f01000",)), STAT)
    assert await _best(index) == ["a"]
    assert await _best(index, miner=1001) == ["a", "b", "c"]
    assert await _best(index, miner=0) == ["a", "b", "c"]  # pieces belong to no miner


async def test_15_available_times_weight_needs_more_than_64_bits(index: SectorIndex) -> None:
    room = {"capacity": 2**62, "fs_available": 2**62}
    for name, available, weight in (("a", 2**61, 4), ("b", 2**60, 2**40), ("c", 2**62, 1)):
        info_ = info(name, can_store=True, weight=weight)
        await index.attach(info_, FsStat(available=available, **room))
    assert await _best(index) == ["b", "a", "c"]
    await index.declare([held("a", SEALED), held("b", SEALED), held("c", SEALED)])
    here: frozenset[StorageID] = frozenset()
    statuses = {status.info.storage: status for status in await index.storages()}
    view = _view(here, statuses.get)
    _, peers = sources.rank(await index.sector(SEALED.sector), view)
    assert [one.storage for one in peers] == ["b", "a", "c"]  # heavier first, for every read


def _view(here: frozenset[StorageID], storage: Callable[[StorageID], Any]) -> sources.View:
    return sources.View(
        here=here,
        own_urls=frozenset({"http://me:8480/remote"}),
        storage=storage,
        healthy=lambda storage: True,
        latency=lambda url: 0.0,
        failing=lambda url: False,
        barred=lambda file, source: False,
    )


async def test_16_primary_is_can_store_on_scan_and_only_upgraded(tmp_path: Path) -> None:
    async with switched_index(tmp_path) as opened:
        store = make_store(opened)
        for name, can_store in (("store", True), ("seal", False)):
            path = tmp_path / name
            storage = make_path(path, can_store=can_store, can_seal=not can_store)
            put(path, SEALED)
            await store.attach(str(path))
            assert (await declared(opened, storage))[SEALED].primary is can_store
            await opened.declare([held(storage, SEALED, primary=not can_store)])
            assert (await declared(opened, storage))[SEALED].primary is True


async def test_17_a_move_from_a_path_that_may_store_is_a_move(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as it:
        source = await it.put("one", SEALED)
        data = source.read_bytes()
        moved = await it.mover.move(SEALED, it.ids["two"])
        assert moved.source == it.ids["one"]
        assert await it.holders(SEALED) == {"two": True}
        assert not source.exists()
        assert (it.path("two") / str(SEALED)).read_bytes() == data


async def test_18_heartbeats_govern_placement_and_not_what_is_found(tmp_path: Path) -> None:
    assert (Config().index.heartbeat, Config().index.cutoff) == (10, 50)
    clock = Clock()
    async with open_index(tmp_path / "index.db", clock=clock) as index:
        await index.attach(info("a", can_store=True), STAT)
        await index.declare([held("a", SEALED)])
        clock.ns += 50 * 10**9
        assert await _best(index) == ["a"]
        clock.ns += 1 * 10**9
        assert await _best(index) == []
        (row,) = await index.find(SEALED.sector, SEALED.file_type)
        assert row.info.storage == "a"
        await index.report_health(StorageID("a"), HealthReport(stat=STAT))
        assert await _best(index) == ["a"]


def test_19_reservations_take_the_right_table_round_down_and_end_once() -> None:
    assert space_needed([FileType.CACHE], 2048, path_type="sealing") == 141 * 2048 // 10
    assert space_needed([FileType.CACHE], 2048, path_type="storage") == 2048 // 10
    ledger = Reservations()
    room = Room(mark=ledger.mark, raw=RawSpace(1000, 1000), filesystem=1)
    rooms = {StorageID("a"): room}
    claim = Claim(storage=StorageID("a"), file=SEALED, size=600, place="final")
    reservation = ledger.reserve([claim], rooms)
    assert ledger.reserved(StorageID("a"), rooms) == 600
    assert reservation.release() is True
    assert reservation.release() is False
    assert ledger.reserved(StorageID("a"), rooms) == 0


def caller(index: SectorIndex) -> Callable[..., Any]:
    """Calls methods of lotus on an index; their results."""
    dispatch = Dispatcher(index_methods(index))

    async def call(method: str, *params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": f"Filecoin.{method}", "params": params}
        _, answer = await dispatch(json.dumps(body).encode(), ADMIN)
        return json.loads(answer)["result"]

    return call


async def test_20_a_busy_lock_is_false_and_a_lock_without_a_declaration_locks(
    index: SectorIndex,
) -> None:
    call = caller(index)
    asked = [{"Miner": 1000, "Number": 7}, 0, 2]
    assert await index.sector(SEALED.sector) == []
    writer = lease("writer", write=FileType.SEALED)
    assert await index.lock(writer)
    assert not await index.lock(lease("other", read=FileType.SEALED))
    assert await call("StorageTryLock", *asked) is False  # and no error
    await index.release(writer.token)
    assert await call("StorageTryLock", *asked) is True
    # As in lotus, without a token nothing is held after the answer: a lease is what lasts.
    assert await call("StorageLock", *asked) is None
    assert await index.lock(writer)


async def test_21_arrays_of_locks_are_indexed_by_bit_and_as_long_as_types_are_known(
    index: SectorIndex,
) -> None:
    assert [file_type.bit for file_type in FileType] == list(range(7))
    assert [file_type.value for file_type in FileType] == [1, 2, 4, 8, 16, 32, 64]
    assert file_types(127) == tuple(FileType)
    for file_type in FileType:
        for reads in (True, False):
            masks = {"read": file_type} if reads else {"write": file_type}
            one = lease(f"{file_type} {reads}", **masks)
            assert await index.lock(one)
            (found,) = (await caller(index)("StorageGetLocks"))["Locks"]
            ones = [int(at == file_type.bit) for at in range(7)]
            assert found == {
                "Sector": {"Miner": 1000, "Number": 7},
                "Read": ones if reads else [0] * 7,
                "Write": [0] * 7 if reads else ones,
            }
            await index.release(one.token)


async def test_22_declarations_are_flat_and_empty_lists_null(index: SectorIndex) -> None:
    call = caller(index)
    await index.attach(info("a"), STAT)
    assert (await call("StorageInfo", "a"))["Groups"] is None
    await index.declare([held("a", SEALED), held("a", CACHE)])
    (flat,) = (await call("StorageList"))["a"]
    assert flat == {"Miner": 1000, "Number": 7, "SectorFileType": 6}


def test_22_cids_are_objects_with_a_slash_and_bytes_base64() -> None:
    body = {
        "Sector": {"ID": {"Miner": 1000, "Number": 7}, "ProofType": 8},
        "Sealed": {"/": "bagboea4b5abcabcabcabcabcabc"},
        "Unsealed": {"/": "baga6ea4seaqabcabcabcabcabcabc"},
        "Ticket": "AAEC/w==",
        "Seed": None,
    }
    porep = msgspec.json.decode(json.dumps(body), type=PorepShape)
    assert to_cid(porep.unsealed) == "baga6ea4seaqabcabcabcabcabcabc"
    assert (porep.ticket, porep.seed) == (b"\x00\x01\x02\xff", None)
    assert json.loads(msgspec.json.encode(porep)) == body


async def test_23_a_combined_mask_gives_one_url_per_type(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", SEALED), held("a", CACHE)])
    (row,) = await index.find(SEALED.sector, 127)
    assert row.urls == (
        "http://a:8480/remote/sealed/s-t01000-7",
        "http://a:8480/remote/cache/s-t01000-7",
    )
    assert row.info.urls == ("http://a:8480/remote",)


def test_24_keys_in_any_case_and_unknown_ones_survive_a_rewrite(tmp_path: Path) -> None:
    name = tmp_path / "sectorstore.json"
    name.write_text('{"id":"st-1","WEIGHT":3,"canseal":true,"Future":{"x":[1]},"Groups":null}')
    metadata = read_metadata(str(tmp_path))
    assert (metadata.info.storage, metadata.info.weight, metadata.info.can_seal) == (
        "st-1",
        3,
        True,
    )
    write_metadata(str(tmp_path), metadata)
    written = json.loads(name.read_text())
    assert (written["Future"], written["Weight"], written["ID"]) == ({"x": [1]}, 3, "st-1")


def test_25_use_is_blocks_and_directories_are_counted_whole(tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir()
    with (tmp_path / "sealed/s-t01000-7").open("wb") as stream:
        stream.truncate(1 << 30)  # sparse
    (tmp_path / "cache/s-t01000-7").mkdir(parents=True)
    (tmp_path / "cache/s-t01000-7/sc-02-data-layer-1.dat").write_bytes(os.urandom(1 << 20))
    used = list(usage_steps(str(tmp_path)))[-1]
    assert 1 << 20 <= used < 2 << 20


def test_26_a_hole_gives_blocks_back_and_keeps_the_length(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        assert holes.punch(fd, 0, 1 << 19)
        assert os.fstat(fd).st_blocks < before
        assert os.fstat(fd).st_size == 1 << 20
    finally:
        os.close(fd)
    assert path.read_bytes()[: 1 << 19] == bytes(1 << 19)


async def test_27_one_storage_may_have_several_urls_and_be_here_too(index: SectorIndex) -> None:
    urls = ("http://me:8480/remote", "http://other:8480/remote")
    for url in urls:
        await index.attach(StorageInfo(storage=StorageID("shared"), urls=(url,)), STAT)
    await index.declare([held("shared", SEALED)])
    statuses = {status.info.storage: status for status in await index.storages()}
    declarations = await index.sector(SEALED.sector)
    here, elsewhere = sources.rank(
        declarations, _view(frozenset({StorageID("shared")}), statuses.get)
    )
    assert here == [sources.LocalSource(StorageID("shared"), shared=True)]
    assert elsewhere == [sources.PeerSource(StorageID("shared"), urls[1])]
    (row,) = await index.find(SEALED.sector, SEALED.file_type)
    assert len(row.urls) == 2
