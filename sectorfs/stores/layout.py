"""What belongs to a sector of each size: files, their lengths, and which of them travel.

Lengths follow from the trees that the proofs need, with nodes of 32 bytes: tree-d is binary over
the data; tree-c and tree-r-last have eight children to a node and are cut into one file per
2^27 leaves; tree-r-last leaves out its lowest rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from sectorfs.errors import BadInput
from sectorfs.stores import trailer
from sectorfs.types import FileType

KIB, MIB, GIB = 2**10, 2**20, 2**30

SECTOR_SIZES = (2 * KIB, 8 * MIB, 512 * MIB, 32 * GIB, 64 * GIB)
"""By the seal proof's number modulo 5."""

_SEAL_PROOFS = 20
_NODE = 32
_ARITY = 8
_LEAVES_PER_FILE = 2**27
_DATA = "sc-02-data-"


def sector_size_of(seal_proof: int) -> int:
    """Bytes of a sector by the number of its seal proof, 0 to 19; `BadInput` for any other."""
    if not 0 <= seal_proof < _SEAL_PROOFS:
        raise BadInput("unknown seal proof", seal_proof)
    return SECTOR_SIZES[seal_proof % len(SECTOR_SIZES)]


class Lengths(msgspec.Struct, frozen=True):
    """Lengths that a file may have, both ends included."""

    low: int
    high: int

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high


def file_fits(file_type: FileType, size: int, *, sector_size: int) -> bool:
    """True when a whole regular sector file may be that long.

    Unsealed files may have a trailer. A piece can have any length, and a directory none.
    """
    if file_type.is_directory:
        return False
    if file_type is FileType.PIECE:
        return size >= 0
    if file_type is FileType.UNSEALED and size > sector_size:
        return trailer.MIN_LENGTH <= size - sector_size <= trailer.MAX_LENGTH
    return size == sector_size


def complete_cache(sector_size: int) -> dict[str, Lengths]:
    """Files of a sector's cache directory before it is finalized, by ascending name."""
    files = finalized_cache(sector_size)
    for layer in range(1, _layers(sector_size) + 1):
        files[f"{_DATA}layer-{layer}.dat"] = _exactly(sector_size)
    leaves = _leaves_per_file(sector_size)
    for name in _tree_names("tree-c", sector_size):
        files[name] = _exactly(_NODE * _octree_nodes(leaves))
    files[f"{_DATA}tree-d.dat"] = _exactly(2 * sector_size - _NODE)
    return dict(sorted(files.items()))


def finalized_cache(sector_size: int) -> dict[str, Lengths]:
    """Files that stay in a finalized cache directory, and those every update cache has."""
    leaves = _leaves_per_file(sector_size)
    dropped = 2 if leaves == _ARITY**2 else 3
    tree_r_last = _exactly(_NODE * _octree_nodes(leaves // _ARITY**dropped))
    files = dict.fromkeys(_tree_names("tree-r-last", sector_size), tree_r_last)
    files["p_aux"] = _exactly(64)
    files["t_aux"] = Lengths(1, _CAPS["t_aux"])
    return dict(sorted(files.items()))


def labelled_cache(sector_size: int) -> dict[str, Lengths]:
    """Files of a sector's cache directory before it has its trees over the labels."""
    files = complete_cache(sector_size)
    return {name: files[name] for name in files if "-layer-" in name or "-tree-d" in name}


def is_finalized(sizes: Mapping[str, int]) -> bool:
    """At least the files that a finalized sector of some size has, as long as they must be."""
    return any(_has(sizes, finalized_cache(sector_size)) for sector_size in SECTOR_SIZES)


def is_whole_cache(sizes: Mapping[str, int]) -> bool:
    """Exactly the files that a cache directory of some size has between two steps of sealing."""
    known = {name: size for name, size in sizes.items() if name not in _BESIDE}
    return any(
        known.keys() == files.keys() and _has(known, files)
        for sector_size in SECTOR_SIZES
        for files in (
            labelled_cache(sector_size),
            complete_cache(sector_size),
            finalized_cache(sector_size),
        )
    )


def _has(sizes: Mapping[str, int], files: Mapping[str, Lengths]) -> bool:
    return all(name in sizes and sizes[name] in lengths for name, lengths in files.items())


def _exactly(size: int) -> Lengths:
    return Lengths(size, size)


def _layers(sector_size: int) -> int:
    return 11 if _checked(sector_size) >= 32 * GIB else 2


def _leaves_per_file(sector_size: int) -> int:
    return min(_checked(sector_size) // _NODE, _LEAVES_PER_FILE)


def _tree_names(tree: str, sector_size: int) -> list[str]:
    """One file for small sectors; numbered ones where the leaves fill several."""
    files = _checked(sector_size) // _NODE // _LEAVES_PER_FILE
    if files == 0:
        return [f"{_DATA}{tree}.dat"]
    return [f"{_DATA}{tree}-{index}.dat" for index in range(files)]


def _octree_nodes(leaves: int) -> int:
    """Nodes of a tree over a power of eight leaves, the leaves included."""
    return (leaves * _ARITY - 1) // (_ARITY - 1)


def _checked(sector_size: int) -> int:
    if sector_size not in SECTOR_SIZES:
        raise BadInput("not the size of a sector", sector_size)
    return sector_size


# Which files of a cache directory travel, and the most bytes each may have. Peers of other kinds
# refuse every name that is not here, so nothing may be added to these two.
_MINIMAL = {
    "p_aux": 64,
    "t_aux": 10240,
    f"{_DATA}tree-r-last.dat": 10_000_000,
    **{f"{_DATA}tree-r-last-{index}.dat": 10_000_000 for index in range(16)},
    "snap-vproof.json": 20_000_000,
}
_CAPS = {
    **_MINIMAL,
    **{f"{_DATA}layer-{layer}.dat": 65 * GIB for layer in range(1, 12)},
    **{f"{_DATA}tree-c-{index}.dat": 5 * GIB for index in range(16)},
    f"{_DATA}tree-d.dat": 130 * GIB,
    "batch.json": 10_000,
    "commit-phase1-output": 20_000_000,
}

_BESIDE = frozenset({"snap-vproof.json", "batch.json", "commit-phase1-output"})
"""Files that some caches have besides."""

MINIMAL: Mapping[str, int] = MappingProxyType(_MINIMAL)
"""Names and caps of a finalized directory (``?mincache``)."""

FULL: Mapping[str, int] = MappingProxyType(_CAPS)
"""Names and caps of any cache directory, as every kind of peer knows them."""

FULL_OURS: Mapping[str, int] = MappingProxyType({**_CAPS, f"{_DATA}tree-c.dat": 5 * GIB})
"""`FULL` and the tree-c of small sectors, which other peers refuse: between our own nodes."""
