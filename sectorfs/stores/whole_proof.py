"""Proves a whole sector file as it comes: a regular file, or the files of a directory.

With its roll each file of a directory is judged when its last byte came. Without one the digest of
the directory tells at the end of all, and nothing may be shown before; so it is of a regular file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from sectorfs.errors import WrongBytes
from sectorfs.stores.manifest import LEAF, Manifest
from sectorfs.stores.proof import Tally
from sectorfs.stores.rolls import Roll, make_roll

Hash = Callable[[Sequence[memoryview]], Awaitable[list[bytes]]]
"""The leaf hashes of parts of a file."""


class WholeProof:
    """What one sector file must be, and what came of it; a regular file is named ``""`` here."""

    def __init__(self, name: str, digest: bytes, roll: Roll | None, compute: Hash) -> None:
        self.name = name
        self.manifests: dict[str, Manifest] = {}
        """Of the files that came."""
        self._digest = digest
        self._roll = roll
        self._compute = compute

    @property
    def is_late(self) -> bool:
        """Nothing is proved before its end."""
        return self._roll is None

    def take(self, member: str, tally: Tally, giver: str) -> Manifest:
        """A file has come; `WrongBytes` naming the giver when it is known to be wrong."""
        made = tally.manifest()
        if self._roll is not None:
            entry = self._roll.entry(member)
            if entry is None or entry.digest != made.digest:
                raise _wrong(f"{self.name}/{member}", giver)
        self.manifests[member] = made
        return made

    async def add(self, tally: Tally, data: memoryview) -> None:
        """The next bytes of a file: whole leaves, but for its end."""
        (hashes,) = await self._compute([data])
        tally.add(hashes, len(data))

    def over(self, giver: str) -> None:
        """All of it came; `WrongBytes` unless that is what its digest says."""
        alone = self.manifests.get("")
        if alone is not None:
            if alone.digest != self._digest:
                raise _wrong(self.name, giver)
            return
        entries = [(name, made.size, made.digest) for name, made in self.manifests.items()]
        if make_roll(entries).digest != self._digest:
            raise _wrong(f"a file of {self.name}", giver)


def _wrong(name: str, giver: str) -> WrongBytes:
    return WrongBytes(f"gave wrong bytes of {name}", giver)


def whole_leaves(count: int) -> int:
    """How many of so many bytes are whole leaves."""
    return count // LEAF * LEAF
