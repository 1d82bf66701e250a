"""What it costs to prove what comes: files with a digest beside the same ones without.

The holder's own hashing has not begun; here the digests are told, and the manifests kept, as it
would do it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext

import msgspec

from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.stores.manifest import LEAF, Manifest, leaf_count, leaf_hashes
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.types import StorageID
from tests.bench.remote import fetch_named
from tests.bench.runner import Side, Work
from tests.bench.stage import BIG_DIR, COLD, COLD_DIR, FETCHED, Stage
from tests.bench.streams import CROWD, read_here_and_there
from tests.cluster import until
from tests.cluster_fixtures import facts_of, locations, sector_file, with_index

FETCH_PROMISED = 0.85
RANDOM_PROMISED = 0.7


def fetch(stage: Stage) -> float:
    """A whole fetch of a file by its length."""
    return fetch_named(stage, f"{BIG_DIR}/{stage.next_link()}")


def proved_fetch(stage: Stage) -> float:
    """A whole fetch of a file with a digest."""
    name = f"{BIG_DIR}/{stage.next_link()}"
    made = stage.enter("fetched manifest", lambda: nullcontext(_manifest_of(stage, name)))
    _prove(stage, [name], made)
    return fetch_named(stage, name)


def crowd(stage: Stage) -> float:
    """Small reads of cold files by their length."""
    return read_here_and_there(stage, stage.cold(CROWD))


def proved_crowd(stage: Stage) -> float:
    """Small reads of cold files with digests."""
    names = stage.cold(CROWD)
    made = stage.enter("cold manifest", lambda: nullcontext(_zeros(COLD)))
    _prove(stage, [f"{COLD_DIR}/{name}" for name in names], made)
    return read_here_and_there(stage, names)


def _manifest_of(stage: Stage, name: str) -> Manifest:
    with (stage.disk / name).open("rb") as file:
        leaves = [leaf_hashes(part) for part in iter(lambda: file.read(64 * LEAF), b"")]
    return Manifest.of_leaves(FETCHED, b"".join(leaves))


def _zeros(size: int) -> Manifest:
    """Of a file that is a hole."""
    assert size % LEAF == 0
    return Manifest.of_leaves(size, leaf_hashes(bytes(LEAF)) * leaf_count(size))


def _prove(stage: Stage, names: Sequence[str], made: Manifest) -> None:
    (storage,) = locations(stage.holder, names[0])
    known = StorageID(storage)

    async def work(index: SectorIndex) -> None:
        manifests = ManifestStore(stage.holder.repo.manifests, deadline=60)
        for name in names:
            file, facts = sector_file(name), facts_of(stage.disk / name)
            await manifests.save(Key(known, file, None, facts.size, facts.mtime_ns), made)
            told = msgspec.structs.replace(facts, digest=made.digest)
            await index.declare([Declaration(file, known, True, told)])

    with_index(stage.holder, work)
    until("the digests", lambda: all(_digest(stage, name) == made.digest for name in names))


def _digest(stage: Stage, name: str) -> bytes:
    try:
        found = os.getxattr(stage.fetcher.mountpoint / name, "user.sectorfs.digest")
    except OSError:
        return b""
    return bytes.fromhex(found.decode())


WORKS: tuple[Work[Stage], ...] = (
    Work(
        "verified fetch",
        "fetch a remote 1 GiB file whole, proved",
        "MB/s",
        Side("sectorfs", proved_fetch),
        (Side("the same by length", fetch, FETCH_PROMISED),),
    ),
    Work(
        "verified random",
        "random 4 KiB over 64 cold remote files, 128 threads, proved",
        "IOPS",
        Side("sectorfs", proved_crowd),
        (Side("the same by length", crowd, RANDOM_PROMISED),),
    ),
)
