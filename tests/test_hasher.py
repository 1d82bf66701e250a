"""The hashing of a node's files: what is hashed, told and kept, and what holds it up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from sectorfs.config import HashConfig
from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import Declaration, FsStat, StorageInfo
from sectorfs.server.routes import make_handler
from sectorfs.stores import hasher as hasher_module
from sectorfs.stores import hashing, manifest, path_hasher
from sectorfs.stores.hash_backlog import Backlog
from sectorfs.stores.hasher import Hasher
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.manifest import BLOCK, Manifest
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.manifest_sweep import ManifestSweep
from sectorfs.stores.path_hasher import XATTR
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, FileType, SectorFile, StorageID
from sectorfs.wire.client import Client
from sectorfs.wire.tokens import sign
from tests.local_fixtures import (
    SwitchedIndex,
    make_path,
    make_store,
    put,
    running,
    sector_file,
    switched_index,
    until,
)
from tests.test_server_manifests import SECRET, no_rpc
from tests.wire_fixtures import PATIENT, FolderFiles
from tests.wire_fixtures import running as serving

CONFIG = HashConfig(max_rate="0", idle=0.01, delay=0.001)
SEALED = sector_file(FileType.SEALED, 1)
OTHER = sector_file(FileType.SEALED, 2)
CACHE = sector_file(FileType.CACHE, 1)
MEMBERS = {"p_aux": b"p" * 64, "t_aux": b"t" * 100}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hasher_module, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(path_hasher, "TROUBLE_PAUSE", 0.05)


class Rig:
    """An Index, paths, a catalog that follows, and the hasher of a node."""

    def __init__(self, root: Path, index: SwitchedIndex) -> None:
        self.root = root
        self.index = index
        self.catalog = Catalog()
        self.local: LocalStore = make_store(
            index, holders=self.catalog.holders, declared=self.catalog.declared
        )
        self.manifests = ManifestStore(root / "manifests", deadline=5)
        self.client = Client(PATIENT, token=sign(SECRET, ("read",)))
        self.hasher: Hasher
        self.feed = Feed(
            index,  # type: ignore[arg-type]  # a proxy
            self.catalog,
            heartbeat=0.1,
            on_change=lambda changes: self.hasher.changed(changes),
        )

    @property
    def path(self) -> LocalPath:
        return self.local.paths()[0]

    def start(self, nursery: trio.Nursery, config: HashConfig, *, paused: bool = False) -> None:
        self.hasher = Hasher(
            catalog=self.catalog,
            index=self.index,  # type: ignore[arg-type]  # a proxy
            manifests=self.manifests,
            paths=self.local.paths,
            config=config,
            paused=paused,
            urls=self.local.urls,
            peers=PeerClient(self.client),
        )
        nursery.start_soon(self.hasher.run)

    def digest(self, file: SectorFile, storage: StorageID | None = None) -> bytes:
        facts = self.catalog.declared(file, storage or self.path.storage)
        return facts.digest if facts is not None else b""

    def key(self, file: SectorFile, member: str | None = None) -> Key:
        found = os.stat(self.path.name_of(file, member))
        return Key(self.path.storage, file, member, found.st_size, found.st_mtime_ns)


@asynccontextmanager
async def rig(
    root: Path, *paths: Path, config: HashConfig = CONFIG, paused: bool = False
) -> AsyncIterator[Rig]:
    async with switched_index(root) as index:
        it = Rig(root, index)
        async with trio.open_nursery() as nursery:
            it.start(nursery, config, paused=paused)
            await nursery.start(it.feed.run)
            async with running(it.local):
                for path in paths:
                    await it.local.attach(str(path))
                yield it
            nursery.cancel_scope.cancel()
        it.manifests.close()
        it.client.close()


def digest_of(data: bytes) -> bytes:
    return Manifest.of_leaves(len(data), manifest.leaf_hashes(data)).digest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_path(tmp_path / "p")
    return tmp_path / "p"


async def test_files_are_hashed_kept_and_told(tmp_path: Path, path: Path) -> None:
    data = os.urandom(3 * BLOCK + 5)
    put(path, SEALED, data)
    put(path, CACHE, MEMBERS)
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED) and it.digest(CACHE))
        assert it.digest(SEALED) == digest_of(data)
        wanted = manifest.directory_digest(
            (name, len(content), digest_of(content)) for name, content in MEMBERS.items()
        )
        assert it.digest(CACHE) == wanted
        kept = await it.manifests.load(it.key(SEALED))
        assert kept is not None
        assert kept.leaves == manifest.leaf_hashes(data)
        assert all(await it.manifests.digests([it.key(CACHE, name) for name in MEMBERS]))
        await until(lambda: it.hasher.status().state == "idle")
        status = it.hasher.status()
        assert (status.left_files, status.left_bytes, status.bad) == (0, 0, ())
        assert status.rate > 0


async def test_new_and_changed_files_are_hashed_when_they_come(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED) == digest_of(b"one"))
        put(path, OTHER, b"other")
        put(path, SEALED, b"changed", age=50)
        await it.local.redeclare()
        await until(lambda: it.digest(OTHER) == digest_of(b"other"))
        await until(lambda: it.digest(SEALED) == digest_of(b"changed"))


async def test_what_is_hashed_is_not_read_again_after_a_restart(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED))
    os.chmod(path / str(SEALED), 0o444)
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED))
        await until(lambda: it.hasher.status().state == "idle")
        assert it.hasher.pace.meter.rate(trio.current_time()) == 0


async def test_an_index_that_forgot_is_told_without_reading(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED))
    for name in os.listdir(tmp_path):
        if name.startswith("index.db"):
            os.unlink(tmp_path / name)
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED) == digest_of(b"one"))
        assert it.hasher.pace.meter.rate(trio.current_time()) == 0


async def test_a_lost_manifest_is_made_again(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED))
        await it.manifests.remove([it.key(SEALED)])
    async with rig(tmp_path, path) as it:

        async def again() -> bool:
            return any(await it.manifests.digests([it.key(SEALED)]))

        await until(again)
        await it.manifests.remove([it.key(SEALED)])
        it.hasher.asked(SEALED)  # by a peer
        await until(again)


@asynccontextmanager
async def another_node(
    it: Rig, file: SectorFile, data: bytes | dict[str, bytes]
) -> AsyncIterator[ManifestStore]:
    """A node that has a primary of a file that is here too, and its manifests."""
    root = it.root / "other"
    put(root, file, data)
    files = FolderFiles(root, storage="away")
    store = ManifestStore(it.root / "other manifests", deadline=5)
    found = it.catalog.declared(file, it.path.storage)
    assert found is not None
    for name, content in data.items() if isinstance(data, dict) else [(None, data)]:
        status = os.stat(root / str(file) / (name or ""))
        key = Key(files.storage, file, name, status.st_size, status.st_mtime_ns)
        await store.save(key, Manifest.of_leaves(len(content), manifest.leaf_hashes(content)))
    handler = make_handler(
        files,
        secret=SECRET,
        rpc=no_rpc,
        health=dict,
        status=str,
        deadline=5,
        manifests=store,
    )
    async with serving(handler) as port:
        info = StorageInfo(storage=files.storage, urls=(f"http://127.0.0.1:{port}/remote",))
        await it.index.attach(info, FsStat())
        await it.index.declare([Declaration(file, files.storage, True, found)])
        await until(lambda: it.catalog.declared(file, files.storage))
        yield store
    store.close()


@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_lost_manifest_comes_from_a_node_that_has_it(
    tmp_path: Path, path: Path, file: SectorFile
) -> None:
    data: bytes | dict[str, bytes] = b"s" * 100_000 if file is SEALED else MEMBERS
    put(path, file, data)
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(file))
        keys = [it.key(file, name) for name in (data if isinstance(data, dict) else [None])]
        before = it.hasher.pace.meter.rate(trio.current_time() + 1e6)
        async with another_node(it, file, data):
            await it.manifests.remove(keys)
            it.hasher.asked(file)
            await until(lambda: _have(it, keys))
        assert it.hasher.pace.meter.rate(trio.current_time() + 1e6) == before  # nothing was read


async def test_a_manifest_that_proves_nothing_is_not_taken(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED))
        async with another_node(it, SEALED, b"two"):
            await it.manifests.remove([it.key(SEALED)])
            it.hasher.asked(SEALED)
            await until(lambda: _have(it, [it.key(SEALED)]))
        assert await it.manifests.digests([it.key(SEALED)]) == [digest_of(b"one")]


async def _have(it: Rig, keys: list[Key]) -> bool:
    return all(await it.manifests.digests(keys))


async def test_bytes_that_are_not_those_of_the_digest_are_told(
    tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED))
        found = place.stat()
        place.write_bytes(b"two")
        os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))
        await it.manifests.remove([it.key(SEALED)])
        it.hasher.asked(SEALED)
        await until(lambda: it.hasher.status().bad)
        assert "not those of its digest" in it.hasher.status().bad[0]
        assert it.digest(SEALED) == digest_of(b"one")
        assert await it.manifests.load(it.key(SEALED)) is None
        caplog.clear()
        place.write_bytes(b"one")
        os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))
        it.hasher.retry(SEALED)
        await until(lambda: _have(it, [it.key(SEALED)]))
        assert not it.hasher.status().bad


async def test_a_copy_waits_for_the_digest_of_a_primary(tmp_path: Path) -> None:
    make_path(tmp_path / "copy", can_seal=True, can_store=False)
    place = put(tmp_path / "copy", SEALED, b"one")
    put(tmp_path / "copy", OTHER, b"two")
    async with rig(tmp_path, tmp_path / "copy") as it:
        await until(lambda: it.catalog.declared(OTHER, it.path.storage))
        await until(lambda: it.hasher.status().state == "idle")
        assert not it.digest(SEALED)
        away = StorageID("away")
        await it.index.attach(StorageInfo(storage=away, urls=("http://x/remote",)), FsStat())
        facts = Facts(3, place.stat().st_mtime_ns, None, digest_of(b"one"))
        await it.index.declare([Declaration(SEALED, away, True, facts)])
        await until(lambda: it.digest(SEALED, away))
        it.hasher.asked(SEALED)
        await until(lambda: it.digest(SEALED) == digest_of(b"one"))
        assert not it.digest(OTHER)


async def test_a_copy_with_other_bytes_than_its_primary_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_path(tmp_path / "copy", can_seal=True, can_store=False)
    place = put(tmp_path / "copy", SEALED, b"one")
    async with rig(tmp_path, tmp_path / "copy") as it:
        away = StorageID("away")
        await it.index.attach(StorageInfo(storage=away, urls=("http://x/remote",)), FsStat())
        facts = Facts(3, place.stat().st_mtime_ns, None, digest_of(b"two"))
        await it.index.declare([Declaration(SEALED, away, True, facts)])
        await until(lambda: it.digest(SEALED, away))
        it.hasher.asked(SEALED)
        await until(lambda: it.hasher.status().bad)
        assert not it.digest(SEALED)
        caplog.clear()


async def test_a_pause_holds_and_ends(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path, paused=True) as it:
        await until(lambda: it.hasher.status().left_files == 1)
        await until(lambda: it.hasher.status().current)
        status = it.hasher.status()
        assert (status.state, status.left_bytes, status.seconds_left) == ("paused", 3, None)
        assert not it.digest(SEALED)
        it.hasher.pace.resume()
        await until(lambda: it.digest(SEALED))


async def test_a_file_that_changes_while_it_is_hashed_is_taken_again(
    tmp_path: Path, path: Path
) -> None:
    place = put(path, SEALED, b"one")
    async with rig(tmp_path, path, paused=True) as it:
        await until(lambda: it.hasher.status().current)
        place.write_bytes(b"two!")
        os.utime(place, (time.time() - 20,) * 2)
        it.hasher.pace.resume()
        await it.local.redeclare()
        await until(lambda: it.digest(SEALED) == digest_of(b"two!"))


async def test_a_file_that_vanishes_holds_up_no_other(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    put(path, OTHER, b"two")
    async with rig(tmp_path, path, paused=True) as it:
        await until(lambda: it.hasher.status().current)
        (path / str(SEALED)).unlink()
        it.hasher.pace.resume()
        await until(lambda: it.digest(OTHER))
        assert not it.digest(SEALED)


async def test_a_file_that_cannot_be_read_is_told_and_holds_up_no_other(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, SEALED, b"one")
    put(path, OTHER, b"other")
    whole = hashing.file_hashes

    def failing(fd: int, offset: int, length: int) -> bytes:
        if os.fstat(fd).st_size == 3:
            raise OSError(5, "I/O error")
        return whole(fd, offset, length)

    monkeypatch.setattr(hashing, "file_hashes", failing)
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(OTHER))
        await until(lambda: it.hasher.status().bad)
        assert "I/O error" in it.hasher.status().bad[0]
        monkeypatch.undo()
        it.hasher.asked(SEALED)
        await until(lambda: it.digest(SEALED))
        assert not it.hasher.status().bad
        caplog.clear()


async def test_an_index_that_is_away_costs_no_second_reading(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        it.index.away_for = {"tell"}
        await until(lambda: it.hasher.status().troubles)
        assert "does not answer" in it.hasher.status().troubles[0]
        rate = it.hasher.pace.meter
        before = rate.rate(trio.current_time() + 1e6)
        it.index.away_for = set()
        await until(lambda: it.digest(SEALED))
        assert rate.rate(trio.current_time() + 1e6) == before
        await until(lambda: not it.hasher.status().troubles)


async def test_a_full_repo_disk_holds_hashing_up_with_its_reason(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, SEALED, b"one")
    found = os.statvfs(tmp_path)
    full = os.statvfs_result((*found[:4], 10, *found[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    async with rig(tmp_path, path) as it:
        await until(lambda: it.hasher.status().troubles)
        assert "no room for manifests" in it.hasher.status().troubles[0]
        assert it.hasher.status().state == "waiting"
        monkeypatch.undo()
        await until(lambda: it.digest(SEALED))


async def test_a_path_that_is_detached_is_left_alone(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    make_path(tmp_path / "q")
    put(tmp_path / "q", OTHER, b"two")
    async with rig(tmp_path, path, tmp_path / "q", paused=True) as it:
        await until(lambda: it.hasher.status().left_files == 2)
        await it.local.detach(str(path))
        await until(lambda: it.hasher.status().left_files == 1)
        it.hasher.pace.resume()
        await until(lambda: it.digest(OTHER))


async def test_a_disk_that_hangs_holds_up_its_own_files_only(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, SEALED, b"one")
    make_path(tmp_path / "q")
    put(tmp_path / "q", OTHER, b"other")
    whole, go = hashing.file_hashes, threading.Event()

    def hanging(fd: int, offset: int, length: int) -> bytes:
        if length == 3:
            assert go.wait(60)
        return whole(fd, offset, length)

    monkeypatch.setattr(hashing, "file_hashes", hanging)
    async with rig(tmp_path, path, tmp_path / "q") as it:
        hung, well = (one.storage for one in it.local.paths())
        it.path.lane.deadline = 0.2
        try:
            await until(lambda: it.digest(OTHER, well))
            await until(lambda: it.hasher.status().troubles)
            assert "no answer within" in it.hasher.status().troubles[0]
            assert it.hasher.status().left_files == 1
        finally:
            go.set()
        it.path.lane.deadline = 10
        await until(lambda: it.digest(SEALED, hung))


async def test_nodes_that_share_a_storage_share_the_work(tmp_path: Path, path: Path) -> None:
    files = [sector_file(FileType.SEALED, number) for number in range(20)]
    for file in files:
        put(path, file, str(file).encode())
    async with rig(tmp_path, path, paused=True) as it:
        other = "http://127.0.0.1:9999/remote"
        info = msgspec.structs.replace(it.path.info, urls=(other,))
        await it.index.attach(info, FsStat())

        def is_shared() -> bool:
            status = it.catalog.storage(it.path.storage)
            return status is not None and len(status.info.urls) == 2

        await until(is_shared)
        backlogs = [
            Backlog(it.path, it.catalog, it.manifests, urls) for urls in ((other,), it.local.urls)
        ]
        parts = [await _all_of(one) for one in backlogs]
        assert set(parts[0]) | set(parts[1]) == set(files)
        assert not set(parts[0]) & set(parts[1])
        assert all(parts)
        backlogs[0].pass_soon()
        assert set(await _all_of(backlogs[0])) == set(files)  # the other node may be dead


async def _all_of(backlog: Backlog) -> list[SectorFile]:
    found = []
    while (file := await backlog.next()) is not None:
        found.append(file)
    return found


async def test_the_attribute_is_written_where_it_is_wanted(tmp_path: Path, path: Path) -> None:
    place = put(path, SEALED, b"one")
    config = HashConfig(max_rate="0", idle=0.01, delay=0.001, xattr=True)
    mtime_ns = place.stat().st_mtime_ns
    async with rig(tmp_path, path, config=config) as it:
        await until(lambda: it.digest(SEALED))
        text = os.getxattr(place, XATTR).decode()
        assert text == f"3 {mtime_ns} {digest_of(b'one').hex()}"


async def test_old_manifests_go_and_the_others_stay(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    put(path, OTHER, b"two")
    put(path, CACHE, MEMBERS)
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED) and it.digest(OTHER) and it.digest(CACHE))
        it.hasher.pace.pause()
        sweep = ManifestSweep(it.manifests, it.catalog)
        assert await sweep.run(it.path) == 0
        stay = [it.key(SEALED), it.key(CACHE, "p_aux")]
        gone = [it.key(OTHER), it.key(CACHE, "t_aux")]
        (path / str(OTHER)).unlink()
        (path / str(CACHE) / "t_aux").write_bytes(b"longer than before")
        it.path.available = False
        await it.local.redeclare()
        it.path.available = False
        assert await sweep.run(it.path) == 0
        it.path.available = True
        await until(lambda: it.catalog.declared(CACHE, it.path.storage) is not None)
        assert await sweep.run(it.path) >= 1
        await it.index.drop([Declaration(OTHER, it.path.storage, True).key])
        await until(lambda: it.catalog.declared(OTHER, it.path.storage) is None)
        await sweep.run(it.path)
        assert all(await it.manifests.digests(stay))
        assert await it.manifests.digests(gone) == [b"", b""]


async def test_an_index_that_forgot_costs_no_manifest(tmp_path: Path, path: Path) -> None:
    put(path, SEALED, b"one")
    async with rig(tmp_path, path) as it:
        await until(lambda: it.digest(SEALED))
        assert await ManifestSweep(it.manifests, Catalog()).run(it.path) == 0
        assert await it.manifests.digests([it.key(SEALED)]) == [digest_of(b"one")]
