"""Hashing a file of a path that lies in the page cache, beside the blake3 library alone on it.

The library hashes all of it as one, with as many threads as it likes, either out of a buffer or, as
`b3sum` does, out of a mapping. Mapped pages need not be copied, which makes it faster than any
program that reads; but a mapped file that is cut short kills the process, and a node must outlive
whatever becomes of its files. So what is promised is promised beside the library that reads.
"""

from __future__ import annotations

import time
from pathlib import Path

import trio
from blake3 import blake3

from sectorfs.stores.hashing import CHUNK, FileHash, Read, open_to_hash
from sectorfs.stores.lanes import Lane
from tests.bench.runner import Side, Work
from tests.bench.stage import BIG, BIG_FILE, Stage

MB = 1e6
PROMISED = 0.8
READ = 1 << 20
"""Bytes read at a time: the fastest of 256 KiB to 16 MiB."""


def ours(stage: Stage) -> float:
    """As the node does it, without its pace."""
    path = _warm(stage)
    began = time.perf_counter()
    trio.run(_hash, path)
    return BIG / MB / (time.perf_counter() - began)


def mapped(stage: Stage) -> float:
    """One hash of the whole file out of a mapping of it."""
    path = _warm(stage)
    began = time.perf_counter()
    blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
    return BIG / MB / (time.perf_counter() - began)


def read(stage: Stage) -> float:
    """The same out of a buffer that it is read into."""
    path = _warm(stage)
    began = time.perf_counter()
    hasher, buffer = blake3(max_threads=blake3.AUTO), bytearray(READ)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(memoryview(buffer)[:count])
    hasher.digest()
    return BIG / MB / (time.perf_counter() - began)


async def _hash(path: Path) -> None:
    opened = await open_to_hash(str(path), Lane(str(path), deadline=15))
    try:
        await FileHash(opened, turn=_at_once, keep=_nowhere, progress=_nobody).run()
    finally:
        opened.close()


async def _at_once() -> int:
    return CHUNK


async def _nowhere(place: int, leaves: bytes) -> None:
    pass


def _nobody(read: Read) -> None:
    pass


def _warm(stage: Stage) -> Path:
    path = stage.view("bare") / BIG_FILE
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    return path


WORKS: tuple[Work[Stage], ...] = (
    Work(
        "hash",
        "hash a file from memory",
        "MB/s",
        Side("sectorfs", ours),
        (Side("blake3 alone, read", read, PROMISED), Side("blake3 alone, mapped", mapped)),
    ),
)
