"""The leaf hashes of files that are half hashed, so that a restart goes on where it was.

One file for each, in ``.partial`` of the store of manifests: records of a step's leaf hashes and a
checksum over them, their place and the identity of the bytes they are of. A record that a power cut
tore, and every one behind it, does not count; nor do those of a file that changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from sectorfs.stores.hashing import KEEP_EVERY, Identity
from sectorfs.stores.lanes import Lane
from sectorfs.stores.manifest import HASH, LEAF
from sectorfs.stores.manifest_store import Key

LONGEST = 30 * 86400.0
"""Seconds after which what nobody went on with is removed."""

_STEP = HASH * (KEEP_EVERY // LEAF)
_CHECK = 32


class HashProgress:
    """Half hashed files by key and identity. All methods belong to the loop."""

    def __init__(self, root: Path, lane: Lane) -> None:
        self._folder = root / ".partial"
        self._lane = lane

    async def read(self, key: Key, identity: Identity) -> bytes:
        """The leaf hashes from the start of the file on, of whole steps; or nothing."""

        def call() -> bytes:
            try:
                data = self._path(key).read_bytes()
            except FileNotFoundError:
                return b""
            found: list[bytes] = []
            for at in range(0, len(data), _STEP + _CHECK):
                leaves = data[at : at + _STEP]
                place = len(found) * KEEP_EVERY
                if data[at + _STEP : at + _STEP + _CHECK] != _check(key, identity, place, leaves):
                    break
                found.append(leaves)
            return b"".join(found)

        return await self._lane.run(call, what=f"read the hashes of {key}")

    async def keep(self, key: Key, identity: Identity, place: int, leaves: bytes) -> None:
        """Add the hashes of the step at `place`; what lay there or behind it goes."""
        record = leaves + _check(key, identity, place, leaves)

        def call() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path(key), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                at = place // KEEP_EVERY * (_STEP + _CHECK)
                os.ftruncate(fd, at)
                os.pwrite(fd, record, at)
                os.fdatasync(fd)
            finally:
                os.close(fd)

        await self._lane.run(call, what=f"keep the hashes of {key}")

    async def drop(self, key: Key) -> None:
        """They are not needed any more."""

        def call() -> None:
            with suppress(FileNotFoundError):
                os.unlink(self._path(key))

        await self._lane.run(call, what=f"remove the hashes of {key}")

    async def tidy(self) -> None:
        """Remove what nobody went on with for long."""

        def call() -> None:
            with suppress(FileNotFoundError):
                for entry in list(os.scandir(self._folder)):
                    if time.time() - entry.stat().st_mtime > LONGEST:
                        os.unlink(entry)

        await self._lane.run(call, what="look at what is half hashed")

    def _path(self, key: Key) -> Path:
        return self._folder / hashlib.blake2b(key.name.encode(), digest_size=16).hexdigest()


def _check(key: Key, identity: Identity, place: int, leaves: bytes) -> bytes:
    said = repr((key.name, identity, place)).encode()
    return hashlib.blake2b(said + leaves, digest_size=_CHECK).digest()
