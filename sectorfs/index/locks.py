"""Who may lock which types of a sector beside whom: pure rules.

Per type there are any number of readers, or one writer and nobody else. A lock covers several types
at once and is granted as a whole or not at all; reading and writing one type with one lock is no
conflict with itself. Types nobody has declared are locked like any other.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sectorfs.index.protocol import Lock
from sectorfs.types import FileType


class Counts(msgspec.Struct, frozen=True):
    """What is locked of one sector."""

    readers: tuple[int, ...]
    """Locks that read each type, by the type's bit position."""
    write: int
    """The mask of the types that are written."""

    @classmethod
    def of(cls, locks: Iterable[Lock]) -> Counts:
        """The sum of several locks of one sector."""
        readers = [0] * len(FileType)
        write = 0
        for lock in locks:
            write |= lock.write
            for file_type in FileType:
                readers[file_type.bit] += bool(lock.read & file_type)
        return cls(tuple(readers), write)

    @property
    def read(self) -> int:
        """The mask of the types that are read."""
        return sum(file_type for file_type in FileType if self.readers[file_type.bit])

    def allow(self, wanted: Lock) -> bool:
        """True when a lock may be granted beside all of these."""
        return not (wanted.write & (self.read | self.write) or wanted.read & self.write)


def conflict(one: Lock, other: Lock) -> bool:
    """True when two locks of one sector exclude each other."""
    return bool(one.write & (other.read | other.write) or one.read & other.write)
