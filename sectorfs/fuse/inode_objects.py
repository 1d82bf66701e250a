"""The inode table as Python objects: where the native module `_inodes` was not built.

It costs some hundred bytes for each inode, and listings are made name by name.
"""

from __future__ import annotations

from collections.abc import Iterable

FlatKey = tuple[int, int, int, str | None, int | None, int | None]
"""File type, miner, sector number, member, size and mtime_ns of an `InodeKey`."""

FIRST_HASHED = 17
"""Numbers 1 to 16 are fixed: the root, and the type directories from 2 on."""
HASH_SPACE = 2**63 - FIRST_HASHED

_MASK = 2**64 - 1


def stable_hash(key: FlatKey, space: int) -> int:
    """The same number in [0, space) for the same key, on every node and after every restart."""
    file_type, miner, number, member, size, mtime_ns = key
    state = _mixed(_mixed(_mixed(0, file_type), miner), number)
    if size is not None and mtime_ns is not None:
        state = _mixed(_mixed(state, size), mtime_ns)
    if member is not None:
        name = member.encode("ascii")
        state = _mixed(state, len(name))
        for start in range(0, len(name), 8):
            state = _mixed(state, int.from_bytes(name[start : start + 8], "little"))
    return state % space


def _mixed(state: int, value: int) -> int:
    # Each step can be undone, so that two states or two values never become one.
    x = ((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


class _Node:
    __slots__ = ("key", "lookups", "opens", "retired")

    def __init__(self, key: FlatKey) -> None:
        self.key = key
        self.lookups = 0
        self.opens = 0
        self.retired = False


class Table:
    """Which inodes the kernel holds."""

    PARTS = 1
    """Into how many parts `numbers` is divided."""

    def __init__(self, space: int = HASH_SPACE) -> None:
        self._space = space
        self._nodes: dict[int, _Node] = {}
        # Keys that had to take another number than their own: only they need a second index.
        self._displaced: dict[FlatKey, int] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, number: int) -> bool:
        return number in self._nodes

    def number(self, key: FlatKey) -> int:
        """The number of a key: its own while held, else the one it would get now."""
        if self._displaced and (number := self._displaced.get(key)) is not None:
            return number
        offset = stable_hash(key, self._space)
        while True:
            node = self._nodes.get(FIRST_HASHED + offset)
            if node is None or (node.key == key and not node.retired):
                return FIRST_HASHED + offset
            assert len(self._nodes) < self._space, "every inode number is held"
            offset = (offset + 1) % self._space

    def look_up(self, key: FlatKey) -> int:
        """Count a look-up of a key; its number."""
        number = self.number(key)
        node = self._nodes.get(number)
        if node is None:
            node = self._nodes[number] = _Node(key)
            if number != FIRST_HASHED + stable_hash(key, self._space):
                self._displaced[key] = number
        node.lookups += 1
        return number

    def forget(self, counts: Iterable[tuple[int, int]]) -> None:
        """Take look-ups back: pairs of a number and a count."""
        for number, count in counts:
            node = self._nodes.get(number)
            if node is not None:
                node.lookups = max(0, node.lookups - count)
                self._release(number, node)

    def key(self, number: int) -> FlatKey | None:
        """The key of a held number."""
        node = self._nodes.get(number)
        return node.key if node is not None else None

    def pin(self, number: int) -> FlatKey | None:
        """Count an open of a held number; its key."""
        node = self._nodes.get(number)
        if node is None:
            return None
        node.opens += 1
        return node.key

    def unpin(self, number: int) -> None:
        """Take an open back."""
        node = self._nodes.get(number)
        if node is None or not node.opens:
            raise KeyError(number)
        node.opens -= 1
        self._release(number, node)

    def retire(self, number: int) -> None:
        """Give the key of a held number another one from now on."""
        node = self._nodes.get(number)
        if node is not None and not node.retired:
            node.retired = True
            self._displaced.pop(node.key, None)

    def numbers(self, part: int) -> list[int]:
        """The numbers held in one part."""
        return list(self._nodes)

    def _release(self, number: int, node: _Node) -> None:
        if node.lookups == 0 and node.opens == 0:
            del self._nodes[number]
            if not node.retired:
                self._displaced.pop(node.key, None)
