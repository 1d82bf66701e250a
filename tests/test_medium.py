"""Hashes of a file as it lies on its disk: direct where that can be, whole, never of a mixture."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sectorfs.errors import DiskError, NotFound, Stale, StorageUnavailable
from sectorfs.stores.lanes import Lane
from sectorfs.stores.manifest import BLOCK, Manifest, leaf_hashes
from sectorfs.stores.medium import CHUNK, Medium
from tests.cluster_fixtures import noise
from tests.file_systems import file_system
from tests.hung_disk import hung_disk

SIZES = (0, 1, 4095, 4096, 4097, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK, CHUNK + 70_001)


@asynccontextmanager
async def opened(path: Path, *, deadline: float = 10) -> AsyncIterator[Medium]:
    medium = await Medium.open(str(path), Lane(str(path.parent), deadline=deadline))
    try:
        yield medium
    finally:
        medium.close()


async def hashed(path: Path) -> tuple[bytes, bytes]:
    """Leaf and block hashes of a whole file."""
    leaves, blocks = b"", b""
    async with opened(path) as medium:
        for start in range(0, medium.size, CHUNK):
            found = await medium.hashes(start, min(CHUNK, medium.size - start))
            leaves, blocks = leaves + found.leaves, blocks + found.blocks
    return leaves, blocks


@pytest.mark.parametrize("size", SIZES)
async def test_hashes_are_those_of_the_bytes(tmp_path: Path, size: int) -> None:
    data = noise("medium", size)
    (tmp_path / "file").write_bytes(data)
    leaves, blocks = await hashed(tmp_path / "file")
    assert leaves == leaf_hashes(data)
    assert blocks == Manifest.of_leaves(size, leaves).blocks


@pytest.mark.mount
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
async def test_every_file_system_is_read(tmp_path: Path, kind: str) -> None:
    data = noise("medium", BLOCK + 70_001)
    with file_system(tmp_path, kind, name="disk", size="300M") as disk:
        (disk / "file").write_bytes(data)
        leaves, _ = await hashed(disk / "file")
    assert leaves == leaf_hashes(data)


async def test_a_disk_is_read_past_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise("medium", CHUNK))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        async with opened(path) as medium:
            with medium._descriptor as inner:
                assert fcntl.fcntl(inner, fcntl.F_GETFL) & os.O_DIRECT
            await medium.hashes(0, CHUNK)
        assert not is_cached(fd), "a scrub fills no page cache"
    finally:
        os.close(fd)


def is_cached(fd: int) -> bool:
    """Whether the kernel has the file's first page."""
    try:
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


@pytest.mark.mount
async def test_pages_of_others_stay_where_reads_are_not_direct(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise("medium", CHUNK))
    path.read_bytes()
    async with opened(path) as medium:
        with medium._descriptor as inner:
            flags = fcntl.fcntl(inner, fcntl.F_GETFL)
            fcntl.fcntl(inner, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        await medium.hashes(0, CHUNK)
        with path.open("rb") as stream:
            assert is_cached(stream.fileno())


async def test_a_file_that_is_cut_off_meanwhile_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise("medium", BLOCK))
    async with opened(path) as medium:
        assert await medium.is_same()
        os.truncate(path, 5000)
        with pytest.raises(Stale, match="shorter"):
            await medium.hashes(0, BLOCK)
        assert not await medium.is_same()


async def test_another_file_under_the_name_is_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    async with opened(path) as medium:
        (tmp_path / "new").write_bytes(b"two")
        times = path.stat().st_mtime_ns
        os.utime(tmp_path / "new", ns=(times, times))
        os.rename(tmp_path / "new", path)
        assert not await medium.is_same()
        path.unlink()
        assert not await medium.is_same()


async def test_what_is_no_regular_file_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "nothing"):
        with pytest.raises(NotFound):
            async with opened(tmp_path / name):
                pass


@pytest.mark.mount
async def test_a_disk_that_fails_or_hangs_says_so(tmp_path: Path) -> None:
    with hung_disk(tmp_path) as disk:
        (disk.source / "file").write_bytes(noise("medium", BLOCK))
        async with opened(disk.path / "file", deadline=0.5) as medium:
            assert (await medium.hashes(0, BLOCK)).leaves
            disk.fail("read", only="file")
            with pytest.raises(DiskError):
                await medium.hashes(0, BLOCK)
            disk.go()
            disk.hang("read")
            with pytest.raises(StorageUnavailable):
                await medium.hashes(0, BLOCK)
            disk.go()


def test_buffers_are_aligned_for_direct_reads() -> None:
    assert mmap.PAGESIZE % 4096 == 0
    assert CHUNK % BLOCK == 0


@pytest.mark.mount
async def test_a_read_that_was_given_up_disturbs_no_later_one(tmp_path: Path) -> None:
    """Its thread still has its buffer, into which it writes whenever the disk answers."""
    data = noise("medium", 2 * BLOCK)
    with hung_disk(tmp_path) as disk:
        (disk.source / "file").write_bytes(data)
        async with opened(disk.path / "file") as medium:
            await medium.hashes(0, BLOCK)
            disk.hang("read")
            with trio.move_on_after(0.1) as scope:
                await medium.hashes(0, BLOCK)
            assert scope.cancelled_caught
            disk.go()
            for _ in range(3):
                found = await medium.hashes(BLOCK, BLOCK)
                assert found.leaves == leaf_hashes(data[BLOCK:])
