"""Reads of remembered files that are answered without Python: whole, true, and never waiting."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from prometheus_client import REGISTRY

from sectorfs.fuse import kernel
from tests.bare_mount import HANDLES, Bare, bare_mount
from tests.mount_fixtures import World, call

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not kernel.prepare(), reason="the extension is left out"),
]

DATA = os.urandom((2 << 20) + 77)
END = len(DATA)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    directory.mkdir()
    for name in ("a", "b"):
        (directory / name).write_bytes(DATA)
    return directory


@contextmanager
def remembered(bare: Bare, path: Path) -> Iterator[int]:
    """A file whose opens and cached reads need no Python; its inode."""
    number = bare.number(path.name)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert kernel.remember(number, number + HANDLES, fd)
        yield number
        kernel.forget(number)
    finally:
        os.close(fd)


def read(path: Path, offset: int, size: int, flags: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def forget_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 1),
        (0, 4096),
        (4095, 2),
        (123_457, 100_000),
        (1 << 20, 1 << 20),
        (END - 5, 5),
        (END - 5, 6000),
        (END, 10),
        (END + 4096, 10),
        (1 << 40, 10),
        (0, END + 1),
    ],
)
async def test_cached_bytes_are_read_without_python(
    directory: Path, offset: int, size: int
) -> None:
    async with bare_mount(directory) as (bare, mount):
        with remembered(bare, directory / "a"):
            found = await call(partial(read, mount / "a", offset, size))
            assert found == DATA[offset : offset + size]
            assert (bare.asked["open"], bare.asked["read"]) == (0, 0)
            assert bool(kernel.reads()) is (offset < END)


async def test_direct_reads_are_answered_too(directory: Path) -> None:
    async with bare_mount(directory) as (bare, mount):
        with remembered(bare, directory / "a"):
            # O_DIRECT opens are Python's, reads of their handle are not.
            fd = await call(lambda: os.open(mount / "a", os.O_RDONLY | os.O_DIRECT))
            assert bare.asked["open"] == 1
            buffer = memoryview(bytearray(4096 * 3))
            assert await call(lambda: os.preadv(fd, [buffer], END - 4096 - 77)) == 4096 + 77
            assert buffer[: 4096 + 77] == DATA[-4096 - 77 :]
            assert bare.asked["read"] == 0
            await call(partial(os.close, fd))


async def test_what_is_not_cached_is_pythons(directory: Path) -> None:
    async with bare_mount(directory) as (bare, mount):
        with remembered(bare, directory / "a"):
            forget_pages(directory / "a")
            assert await call(partial(read, mount / "a", 1 << 20, 4096)) == DATA[1 << 20 :][:4096]
            assert bare.asked["read"] > 0


async def test_other_handles_and_forgotten_files_are_pythons(directory: Path) -> None:
    async with bare_mount(directory) as (bare, mount):
        fd = await call(lambda: os.open(mount / "a", os.O_RDONLY))
        number = bare.number("a")
        kept = os.open(directory / "a", os.O_RDONLY)
        assert kernel.remember(number, number + HANDLES + 500, kept)
        assert await call(lambda: os.pread(fd, 10, 0)) == DATA[:10]
        assert (bare.asked["read"], kernel.reads()) == (1, 0)
        kernel.forget(number)
        os.close(kept)
        assert await call(partial(read, mount / "a", 1 << 20, 10)) == DATA[1 << 20 :][:10]
        assert bare.asked["read"] == 2
        await call(partial(os.close, fd))


async def test_a_file_cut_short_is_pythons_and_one_that_grew_keeps_its_end(
    directory: Path,
) -> None:
    async with bare_mount(directory) as (bare, mount):
        with remembered(bare, directory / "a"):
            fd = await call(lambda: os.open(mount / "a", os.O_RDONLY))
            with (directory / "a").open("ab") as stream:
                stream.write(b"more")
            assert await call(lambda: os.pread(fd, 4096, END - 9)) == DATA[-9:]
            assert bare.asked["read"] == 0
            os.truncate(directory / "a", 1000)
            assert await call(lambda: os.pread(fd, 4096, 1 << 20)) == b""
            assert bare.asked["read"] > 0
            await call(partial(os.close, fd))


async def test_a_busy_loop_holds_up_no_cached_read(directory: Path) -> None:
    async with bare_mount(directory) as (bare, mount):
        with remembered(bare, directory / "a"):
            await call(partial(read, mount / "a", 0, 1))  # with the names, and the one flush
            found: list[bytes] = []
            reader = threading.Thread(target=lambda: found.append(read(mount / "a", 1 << 20, 4096)))
            reader.start()
            reader.join(10)  # on the loop, which answers nobody meanwhile
            assert found == [DATA[1 << 20 :][:4096]]


READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer, wanted = memoryview(bytearray(4096)), open(sys.argv[2], "rb").read(4096)
print("reads", flush=True)
while os.preadv(fd, [buffer], 0) == 4096 and buffer == wanted and not os.path.exists(sys.argv[3]):
    pass
print(buffer == wanted, flush=True)
"""


async def test_a_descriptor_that_becomes_anothers_shows_nothing_of_it(
    directory: Path, tmp_path: Path
) -> None:
    """Files are forgotten, and their descriptors become others', while they are read."""
    (directory / "b").write_bytes(bytes(END))
    stop, truth = tmp_path / "stop", tmp_path / "truth"
    truth.write_bytes(DATA[:4096])

    def forget_while_read(mount: Path, number: int) -> list[str]:
        command = [sys.executable, "-c", READER, str(mount / "a"), str(truth), str(stop)]
        readers = [Popen(command, stdout=PIPE, text=True) for _ in range(2)]
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "reads\n"
        own, other = (os.open(directory / name, os.O_RDONLY) for name in ("a", "b"))
        fd = os.dup(own)
        while kernel.reads() < 20_000 and all(reader.poll() is None for reader in readers):
            os.dup2(own, fd)
            kernel.remember(number, number + HANDLES, fd)
            os.stat(truth)  # the readers' turn
            kernel.forget(number)
            os.dup2(other, fd)
        for one in (own, other, fd):
            os.close(one)
        stop.touch()
        return [reader.communicate()[0] for reader in readers]

    async with bare_mount(directory) as (bare, mount):
        said = await call(partial(forget_while_read, mount, bare.number("a")))
        assert said == ["True\n", "True\n"]


async def test_reads_without_python_are_a_metric(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.store.proved = True
    world.put("sealed/7", DATA[:5000])
    async with world.mounted():
        assert await call(world.seen("sealed/7").read_bytes) == DATA[:5000]
        shown = REGISTRY.get_sample_value("sectorfs_fuse_kept_reads")
        assert shown == kernel.reads() > 0
