"""Manifests on disk: whole or not there, of the content they are named for, and never believed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from sectorfs.errors import DiskError
from sectorfs.stores import manifest
from sectorfs.stores.manifest import BLOCK, Manifest
from sectorfs.stores.manifest_store import KEPT_OPEN, SHARDS, Key, ManifestStore, shard_of
from sectorfs.types import FileType, SectorFile, SectorID, StorageID
from tests.wire_fixtures import fds_return_to, open_fds

SEALED = SectorFile(FileType.SEALED, SectorID(1000, 7))
CACHE = SectorFile(FileType.CACHE, SectorID(1000, 7))
STORAGE = StorageID("st-1")


def made(size: int) -> Manifest:
    return Manifest.of_leaves(size, manifest.leaf_hashes(bytes(size)))


def key(size: int = 10, file: SectorFile = SEALED, member: str | None = None) -> Key:
    return Key(STORAGE, file, member, size, -5)


@asynccontextmanager
async def opened(root: Path) -> AsyncIterator[ManifestStore]:
    before = open_fds()
    store = ManifestStore(root / "manifests", deadline=5)
    yield store
    store.close()
    await fds_return_to(before)


def files(store: ManifestStore) -> list[str]:
    return sorted(
        str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()
    )


async def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for one in (key(), key(0), key(2 * BLOCK + 1), key(10, CACHE, "p_aux")):
            assert await store.load(one) is None
            assert await store.digests([one]) == [b""]
            assert await store.leaves(one, [0]) is None
            await store.save(one, made(one.size))
            found = await store.load(one)
            assert found is not None
            assert found.encode() == made(one.size).encode()
            assert await store.digests([one]) == [made(one.size).digest]
            for block in range(manifest.block_count(one.size)):
                assert await store.leaves(one, [block]) == found.leaves_of(block)
        assert await store.leaves(key(2 * BLOCK + 1), [0, 2]) == (
            made(2 * BLOCK + 1).leaves_of(0) + made(2 * BLOCK + 1).leaves_of(2)
        )
    async with opened(tmp_path) as store:
        assert await store.digests([key()]) == [made(10).digest]


async def test_another_content_has_no_manifest(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(key(), made(10))
        for field, value in (
            ("size", 11),
            ("mtime_ns", 5),
            ("storage", StorageID("st-2")),
            ("file", SectorFile(FileType.UPDATE, SectorID(1000, 7))),
            ("member", "p_aux"),
        ):
            assert await store.load(msgspec.structs.replace(key(), **{field: value})) is None


async def test_a_new_manifest_takes_the_place_of_one_that_is_open(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(key(), made(10))
        assert await store.leaves(key(), [0]) == made(10).leaves
        other = Manifest.of_leaves(10, bytes(32))
        await store.save(key(), other)
        assert await store.leaves(key(), [0]) == other.leaves


async def test_only_so_many_are_kept_open(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        before = len(open_fds())
        for number in range(KEPT_OPEN + 20):
            one = key(10, SectorFile(FileType.SEALED, SectorID(1000, number)))
            await store.save(one, made(10))
            assert await store.leaves(one, [0]) == made(10).leaves
        await fds_return_to(open_fds())
        assert len(open_fds()) - before <= KEPT_OPEN + 5
        store.close()


@pytest.mark.parametrize(
    "damage",
    [b"", b"x", made(10).encode()[:-1], made(10).encode() + b"x", made(11).encode(), bytes(96)],
)
async def test_what_is_no_manifest_of_it_is_removed(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as store:
        await store.save(key(), made(10))
        for look in (store.load, store.open, lambda one: store.leaves(one, [0])):
            path = store.root / key().name
            path.write_bytes(damage)
            store.close()
            assert await look(key()) is None
            assert not path.exists()
            assert "not a manifest of this file" in caplog.text
            caplog.clear()
            await store.save(key(), made(10))


async def test_damaged_hashes_are_found_when_all_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as store:
        await store.save(key(), made(10))
        path = store.root / key().name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert await store.load(key()) is None
        assert not path.exists()
        assert "do not make their blocks" in caplog.text
        caplog.clear()


async def test_a_crash_leaves_nothing_that_counts(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.save(key(), made(10))
        folder = (store.root / key().name).parent
        (folder / ".s-t01000-7@10-5.0123.tmp").write_bytes(made(10).encode()[:50])
        [shard] = await store.shards(STORAGE)
        assert await store.names(shard) == {"s-t01000-7": [key().name]}


async def test_names_are_listed_by_sector_and_removed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        assert await store.shards(STORAGE) == []
        members = [key(1, CACHE, name) for name in ("p_aux", "t_aux", "x" * 255)]
        for one in (key(10), key(11), *members):
            await store.save(one, made(one.size))
        shards = await store.shards(STORAGE)
        assert sorted(shards) == sorted(f"st-1/{t}/{shard_of(SEALED)}" for t in ("cache", "sealed"))
        found = [await store.names(shard) for shard in sorted(shards)]
        assert {name for one in found for name in one} == {"s-t01000-7"}
        assert sorted(found[0]["s-t01000-7"]) == sorted(one.name for one in members)
        assert sorted(found[1]["s-t01000-7"]) == [key(10).name, key(11).name]
        assert await store.leaves(key(11), [0]) is not None
        await store.remove([key(11), *members])
        assert await store.leaves(key(11), [0]) is None
        assert files(store) == [key(10).name]
        await store.remove([key(10), key(12)])
        assert await store.shards(STORAGE) == []


async def test_a_million_sectors_make_no_large_directory() -> None:
    counts = dict[str, int]()
    for number in range(1_000_000):
        if number % 20 == 0:  # every twentieth stands for all
            shard = shard_of(SectorFile(FileType.SEALED, SectorID(1000, number)))
            counts[shard] = counts.get(shard, 0) + 1
    assert len(counts) <= SHARDS
    assert 20 * max(counts.values()) < 1000


async def test_a_disk_that_fails_is_an_error_of_the_family(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        path = store.root / key().name
        path.parent.mkdir(parents=True)
        path.symlink_to(path)
        with pytest.raises(DiskError):
            await store.load(key())
        (tmp_path / "full").write_bytes(b"")
        other = ManifestStore(tmp_path / "full", deadline=5)
        with pytest.raises(Exception, match="keep the manifest"):
            await other.save(key(), made(10))
        os.unlink(path)
