"""Hashing a file of a path that lies in the page cache, beside the blake3 library alone on it.

Ours reads the file into buffers and hashes every leaf by itself; the library maps it and hashes all
of it as one, with as many threads as it likes.
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


def ours(stage: Stage) -> float:
    """As the node does it, without its pace."""
    path = _warm(stage)
    began = time.perf_counter()
    trio.run(_hash, path)
    return BIG / MB / (time.perf_counter() - began)


def library(stage: Stage) -> float:
    """One hash of the whole file."""
    path = _warm(stage)
    began = time.perf_counter()
    blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
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
        (Side("blake3 alone", library, PROMISED),),
    ),
)
