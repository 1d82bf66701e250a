"""Peers that can prove what they hold, and stores that ask for it: what tests of proofs share."""

from __future__ import annotations

import random

import msgspec

from sectorfs.stores.manifest import Manifest, leaf_hashes
from sectorfs.stores.manifest_store import Key
from sectorfs.stores.rolls import make_roll
from sectorfs.types import Facts, SectorFile
from tests.test_remote import Peer, World, facts_of


def manifest_of(data: bytes) -> Manifest:
    """The manifest of a file's bytes."""
    return Manifest.of_leaves(len(data), leaf_hashes(data))


def flipped(data: bytes, bit: int) -> bytes:
    """The same with one bit the other way."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def noise(name: object, size: int) -> bytes:
    """Bytes that differ from name to name."""
    return random.Random(str(name)).randbytes(size)


async def prove(
    w: World, peer: Peer, file: SectorFile, data: bytes | dict[str, bytes], *, keep: bool = True
) -> Facts:
    """Have a peer declare the digest of a file it holds, and `keep` the manifests for it."""
    path = peer.root / str(file)
    parts: dict[str | None, bytes] = {None: data} if isinstance(data, bytes) else {**data}
    entries = []
    for name, content in parts.items():
        made, status = manifest_of(content), (path / (name or "")).stat()
        if keep:
            key = Key(peer.storage, file, name, status.st_size, status.st_mtime_ns)
            await peer.manifests.save(key, made)
        entries.append((name or "", len(content), made.digest))
    digest = entries[0][2] if isinstance(data, bytes) else make_roll(entries).digest
    facts = msgspec.structs.replace(facts_of(path), digest=digest)
    await w.declare(peer, file, facts)
    return facts
