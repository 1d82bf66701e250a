"""Sample sectors of the true on-disk layout, for the demo: 8 MiB sectors with complete caches.

Sizes and file names are those of an 8 MiB SDR sector before finalisation; the bytes are
pseudo-random, so nothing here proves anything, but every tool that looks at names and sizes sees a
real sector.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

from sectorfs.types import FileType, SectorFile, SectorID

SECTOR_SIZE = 8 << 20
FULL_TRAILER = bytes.fromhex("0410109004000000")
"""Trailer of a partial file in which all 8 MiB are allocated (RLE+ bitmap and its length)."""

CACHE_SIZES = {
    "sc-02-data-layer-1.dat": SECTOR_SIZE,
    "sc-02-data-layer-2.dat": SECTOR_SIZE,
    "sc-02-data-tree-c.dat": 9_586_976,
    "sc-02-data-tree-d.dat": 16_777_184,
    "sc-02-data-tree-r-last.dat": 18_720,
    "p_aux": 64,
}
_NODE = 32
_CHUNK = 1 << 20


def write_sector(path: Path, sector: SectorID) -> list[SectorFile]:
    """Write the unsealed, sealed and cache files of a sector below a storage path."""
    source = random.Random(str(sector))
    files = [
        SectorFile(file_type, sector)
        for file_type in (FileType.UNSEALED, FileType.SEALED, FileType.CACHE)
    ]
    unsealed, sealed, cache = (path / file.file_type.dir_name / sector.name for file in files)
    _write(unsealed, source, SECTOR_SIZE, FULL_TRAILER)
    _write(sealed, source, SECTOR_SIZE)
    for name, size in CACHE_SIZES.items():
        _write(cache / name, source, size)
    (cache / "t_aux").write_bytes(_t_aux(cache))
    return files


def _write(path: Path, source: random.Random, size: int, tail: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for chunk in _chunks(source, size):
            stream.write(chunk)
        stream.write(tail)


def _chunks(source: random.Random, size: int) -> Iterator[bytes]:
    while size > 0:
        yield source.randbytes(min(size, _CHUNK))
        size -= _CHUNK


def _t_aux(cache: Path) -> bytes:
    """The stores of a cache directory in bincode: labels, tree-d, tree-r-last, tree-c."""
    leaves = SECTOR_SIZE // _NODE
    octree = (8 * leaves - 1) // 7
    labels = b"".join(_store_config(cache, f"layer-{n}", leaves, 0) for n in (1, 2))
    trees = (
        _store_config(cache, "tree-d", 2 * leaves - 1, 0)
        + _store_config(cache, "tree-r-last", octree, 2)
        + _store_config(cache, "tree-c", octree, 0)
    )
    return struct.pack("<Q", 2) + labels + trees


def _store_config(cache: Path, name: str, nodes: int, discard: int) -> bytes:
    path, store_id = str(cache).encode(), name.encode()
    return b"".join(
        (
            struct.pack("<Q", len(path)) + path,
            struct.pack("<Q", len(store_id)) + store_id,
            struct.pack("<BQQ", 1, nodes, discard),
        )
    )
