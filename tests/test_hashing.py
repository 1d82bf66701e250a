"""Hashing a file on disk: the right hashes, of what did not change, gone on with after a stop."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sectorfs.errors import DiskError, NotFound, SectorFSError, SourceFailed
from sectorfs.stores import hash_progress, hashing, manifest
from sectorfs.stores.hash_progress import HashProgress
from sectorfs.stores.hashing import FileHash, Identity, Opened, Read, open_to_hash
from sectorfs.stores.lanes import Lane
from sectorfs.stores.manifest import BLOCK, LEAF, Manifest
from sectorfs.stores.manifest_store import Key
from sectorfs.types import FileType, SectorFile, SectorID, StorageID
from tests.wire_fixtures import fds_return_to, open_fds

KEY = Key(StorageID("st-1"), SectorFile(FileType.SEALED, SectorID(1000, 7)), None, 10, 5)
IDENTITY = Identity(1, 2, 3, 4, 5)


def made(data: bytes) -> Manifest:
    return Manifest.of_leaves(len(data), manifest.leaf_hashes(data))


async def opened(path: Path) -> Opened:
    return await open_to_hash(str(path), Lane(str(path), deadline=5))


async def hashed(
    one: Opened,
    *,
    known: bytes = b"",
    allowed: int = 8 << 20,
    keep: Callable[[int, bytes], object] = lambda place, leaves: None,
    progress: Callable[[Read], object] = lambda read: None,
) -> Manifest:
    async def turn() -> int:
        await trio.lowlevel.checkpoint()
        return allowed

    async def kept(place: int, leaves: bytes) -> None:
        keep(place, leaves)

    return await FileHash(one, known=known, turn=turn, keep=kept, progress=progress).run()


@pytest.mark.parametrize("size", [0, 1, LEAF, BLOCK + 1, 20 * BLOCK + 3])
@pytest.mark.parametrize("allowed", [1, LEAF + 5, 3 * LEAF, 8 << 20])
async def test_a_file_has_the_hashes_of_its_bytes(tmp_path: Path, size: int, allowed: int) -> None:
    before = open_fds()
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    one = await opened(tmp_path / "f")
    reads: list[Read] = []
    found = await hashed(one, allowed=allowed, progress=reads.append)
    assert found.encode() == made(data).encode()
    assert sum(read.count for read in reads) == size
    one.close()
    await fds_return_to(before)


async def test_it_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "KEEP_EVERY", 4 * BLOCK)
    data = os.urandom(18 * BLOCK + 9)
    (tmp_path / "f").write_bytes(data)
    kept: list[tuple[int, bytes]] = []
    one = await opened(tmp_path / "f")
    await hashed(one, keep=lambda place, leaves: kept.append((place, leaves)))
    leaves = made(data).leaves
    step = 4 * 16 * 32
    assert kept == [(at * 4 * BLOCK, leaves[at * step : (at + 1) * step]) for at in range(4)]
    reads: list[Read] = []
    found = await hashed(one, known=b"".join(part for _, part in kept), progress=reads.append)
    assert found.encode() == made(data).encode()
    assert sum(read.count for read in reads) == 2 * BLOCK + 9
    one.close()


@pytest.mark.parametrize("change", ["write", "grow", "shrink", "same time"])
async def test_what_changes_meanwhile_is_dropped(tmp_path: Path, change: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(4 * BLOCK))
    one = await opened(path)

    def spoil(read: Read) -> None:
        found = path.stat()
        with path.open("r+b") as file:
            if change == "shrink":
                file.truncate(BLOCK)
            else:
                file.seek(0 if change != "grow" else 4 * BLOCK)
                file.write(b"x")
        if change == "same time":
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

    with pytest.raises(SourceFailed, match="changed"):
        await hashed(one, allowed=BLOCK, progress=spoil)
    one.close()


async def test_a_replaced_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data = os.urandom(2 * BLOCK)
    path.write_bytes(data)
    one = await opened(path)
    path.rename(tmp_path / "old")
    path.write_bytes(b"new")
    with pytest.raises(SourceFailed):  # its change time says so; whoever asked looks again
        await hashed(one)
    one.close()


async def test_errors_of_the_disk_are_told_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(40 * BLOCK))
    one = await opened(path)
    whole = hashing.file_hashes

    def failing(fd: int, offset: int, length: int) -> bytes:
        if offset + length > 20 * BLOCK:
            raise OSError(5, "I/O error")
        return whole(fd, offset, length)

    monkeypatch.setattr(hashing, "file_hashes", failing)
    with pytest.raises(DiskError, match="I/O error"):
        await hashed(one)
    one.close()


async def test_what_is_no_file_is_not_found(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("none", "fifo", "."):
        with pytest.raises(NotFound):
            await opened(tmp_path / name)


async def test_a_cancelled_hash_leaves_nothing_open(tmp_path: Path) -> None:
    before = open_fds()
    (tmp_path / "f").write_bytes(bytes(4 * BLOCK))
    one = await opened(tmp_path / "f")
    with trio.CancelScope() as scope:
        await hashed(one, allowed=LEAF, progress=lambda read: scope.cancel())
    assert scope.cancelled_caught
    one.close()
    await fds_return_to(before)


async def test_pages_that_were_not_in_memory_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(4 * BLOCK))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if _cached(fd):
            pytest.skip("this file system keeps everything in memory")
        one = await opened(path)
        await hashed(one, allowed=4 * BLOCK)
        assert not _cached(fd)
        os.pread(fd, 4 * BLOCK, 0)
        await hashed(one, allowed=4 * BLOCK)
        assert _cached(fd)
        one.close()
    finally:
        os.close(fd)


def _cached(fd: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(4096)], 3 * BLOCK, os.RWF_NOWAIT) == 4096
    except OSError:
        return False


# What is kept over a restart


@pytest.fixture
def progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HashProgress:
    monkeypatch.setattr(hash_progress, "KEEP_EVERY", 2 * LEAF)
    monkeypatch.setattr(hash_progress, "_STEP", 64)
    return HashProgress(tmp_path, Lane("repo", deadline=5))


def step(number: int) -> bytes:
    return bytes([number]) * 64


async def test_steps_are_kept_in_order(progress: HashProgress) -> None:
    assert await progress.read(KEY, IDENTITY) == b""
    for place in range(3):
        await progress.keep(KEY, IDENTITY, place * 2 * LEAF, step(place))
    assert await progress.read(KEY, IDENTITY) == step(0) + step(1) + step(2)
    await progress.keep(KEY, IDENTITY, 2 * LEAF, step(9))
    assert await progress.read(KEY, IDENTITY) == step(0) + step(9)
    await progress.drop(KEY)
    await progress.drop(KEY)
    assert await progress.read(KEY, IDENTITY) == b""


async def test_those_of_other_bytes_do_not_count(progress: HashProgress) -> None:
    await progress.keep(KEY, IDENTITY, 0, step(1))
    assert await progress.read(KEY, Identity(1, 2, 3, 4, 6)) == b""
    assert await progress.read(KEY, Identity(1, 9, 3, 4, 5)) == b""


@pytest.mark.parametrize("damage", ["cut", "flip", "long"])
async def test_a_torn_step_does_not_count(
    progress: HashProgress, tmp_path: Path, damage: str
) -> None:
    for place in range(3):
        await progress.keep(KEY, IDENTITY, place * 2 * LEAF, step(place))
    [path] = (tmp_path / ".partial").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-1:]
    elif damage == "flip":
        data[2 * 96 + 1] ^= 1
    else:
        data += b"x"
    path.write_bytes(data)
    wanted = step(0) + step(1) + (step(2) if damage == "long" else b"")
    assert await progress.read(KEY, IDENTITY) == wanted


async def test_what_nobody_goes_on_with_is_removed(progress: HashProgress, tmp_path: Path) -> None:
    await progress.tidy()
    await progress.keep(KEY, IDENTITY, 0, step(1))
    await progress.tidy()
    [path] = (tmp_path / ".partial").iterdir()
    os.utime(path, (0, 0))
    await progress.tidy()
    assert not path.exists()


async def test_a_disk_that_fails_is_an_error_of_the_family(tmp_path: Path) -> None:
    (tmp_path / ".partial").write_bytes(b"")
    progress = HashProgress(tmp_path, Lane("repo", deadline=5))
    with pytest.raises(SectorFSError):
        await progress.keep(KEY, IDENTITY, 0, b"")
