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


class Taken(msgspec.Struct):
    """The types of one sector that are read, and that are written, by some locks together."""

    read: int = 0
    write: int = 0

    def add(self, lock: Lock) -> None:
        """Take what one more lock takes."""
        self.read |= lock.read
        self.write |= lock.write

    def excludes(self, wanted: Lock) -> bool:
        """True when a lock may not be granted beside these."""
        return bool(wanted.write & (self.read | self.write) or wanted.read & self.write)


class Counts(msgspec.Struct, frozen=True):
    """What is locked of one sector, as it is shown."""

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
