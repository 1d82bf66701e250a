"""Inode numbers, and which of them the kernel still holds. Pure: no kernel, no clock, no I/O.

A number is a stable hash of what the inode stands for, so that unchanged files keep theirs across
remounts. For a regular file that includes its size and modification time: the kernel caches pages
by inode, and new content under a new number can never be mixed with pages of the old.

Invariant: while the kernel holds look-ups of a number, or a file is open under it, the number
means the same `InodeKey`. Everything else is forgotten, and computed again when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import msgspec

from sectorfs.types import FileType, SectorFile

ROOT = 1
FIRST_HASHED = 17
"""Numbers 1 to 16 are fixed: the root, and the type directories from 2 on."""
HASH_SPACE = 2**63 - FIRST_HASHED

_FIXED_TYPES = {2 + file_type.bit: file_type for file_type in FileType}


class Content(msgspec.Struct, frozen=True, order=True):
    """What tells two contents of one file apart."""

    size: int
    mtime_ns: int


class InodeKey(msgspec.Struct, frozen=True):
    """What an inode stands for: a sector file, or one file in a sector directory."""

    file: SectorFile
    member: str | None = None
    content: Content | None = None
    """None for directories, and for files nobody has told the facts of."""

    @property
    def is_directory(self) -> bool:
        """True for a sector directory itself."""
        return self.member is None and self.file.file_type.is_directory


class _Node:
    __slots__ = ("key", "lookups", "opens")

    def __init__(self, key: InodeKey) -> None:
        self.key = key
        self.lookups = 0
        self.opens = 0


def type_number(file_type: FileType) -> int:
    """The fixed inode number of a type's directory."""
    return 2 + file_type.bit


def number_type(number: int) -> FileType | None:
    """The type whose directory has this fixed number."""
    return _FIXED_TYPES.get(number)


def stable_hash(key: InodeKey, space: int) -> int:
    """The same number in [0, space) for the same key, on every node and after every restart."""
    file, content = key.file, key.content
    identity = f"{content.size}:{content.mtime_ns}" if content else ""
    text = (
        f"{file.file_type.value}/{file.sector.miner}/{file.sector.number}"
        f"/{key.member or ''}/{identity}"
    )
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") % space


class InodeTable:
    """Which inodes the kernel holds. Used on the loop only, except `numbers` and `key`."""

    def __init__(self, space: int = HASH_SPACE) -> None:
        self._space = space
        self._nodes: dict[int, _Node] = {}
        # Keys that had to take another number than their own: only they need a second index.
        self._displaced: dict[InodeKey, int] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, number: int) -> bool:
        return number in self._nodes

    def number(self, key: InodeKey) -> int:
        """The number of a key: its own while held, else the one it would get now."""
        if self._displaced and (number := self._displaced.get(key)) is not None:
            return number
        offset = stable_hash(key, self._space)
        while True:
            node = self._nodes.get(FIRST_HASHED + offset)
            if node is None or node.key == key:
                return FIRST_HASHED + offset
            assert len(self._nodes) < self._space, "every inode number is held"
            offset = (offset + 1) % self._space

    def look_up(self, key: InodeKey) -> int:
        """Count one look-up by the kernel and return the number it refers to."""
        number, node = self._hold(key)
        node.lookups += 1
        return number

    def forget(self, number: int, count: int) -> None:
        """Take back `count` look-ups; a number that is not held is none of our business."""
        node = self._nodes.get(number)
        if node is None:
            return
        node.lookups = max(0, node.lookups - count)
        self._release(number, node)

    def pin(self, number: int) -> InodeKey | None:
        """Hold a number for an open file; None when nobody holds it yet."""
        node = self._nodes.get(number)
        if node is None:
            return None
        node.opens += 1
        return node.key

    def unpin(self, number: int) -> None:
        """End one `pin`."""
        node = self._nodes[number]
        assert node.opens > 0, "unpin without pin"
        node.opens -= 1
        self._release(number, node)

    def key(self, number: int) -> InodeKey | None:
        """What a held number means."""
        node = self._nodes.get(number)
        return node.key if node is not None else None

    def numbers(self) -> Iterator[int]:
        """The numbers held at the moment of the call; safe from another thread."""
        return iter(list(self._nodes))

    def _hold(self, key: InodeKey) -> tuple[int, _Node]:
        number = self.number(key)
        node = self._nodes.get(number)
        if node is None:
            node = self._nodes[number] = _Node(key)
            if number != FIRST_HASHED + stable_hash(key, self._space):
                self._displaced[key] = number
        return number, node

    def _release(self, number: int, node: _Node) -> None:
        if node.lookups == 0 and node.opens == 0:
            del self._nodes[number]
            self._displaced.pop(node.key, None)
