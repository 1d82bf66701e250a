"""The sectors of one type as a sequence: made in microseconds, and never changed by later news.

It shares the arrays of numbers with the catalog, which replaces an array instead of changing it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

from sectorfs.types import SectorID


class Numbers:
    """Sector numbers of one miner, ascending; never changed once made."""

    __slots__ = ("_each", "all", "count", "miner")

    def __init__(self, miner: int, numbers: array[int], count: int) -> None:
        self.miner = miner
        self.all = numbers
        """One for each declaration."""
        self.count = count
        """How many different ones."""
        self._each = numbers if count == len(numbers) else None

    @property
    def single(self) -> bool:
        """No number has more than one declaration."""
        return self.count == len(self.all)

    @property
    def each(self) -> array[int]:
        """Every number once."""
        if self._each is None:
            self._each = array("q", dict.fromkeys(self.all))
        return self._each


class Sectors(Sequence[SectorID]):
    """Ascending sectors as they were at one moment."""

    __slots__ = ("_ends", "_parts")

    def __init__(self, parts: Sequence[Numbers]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.count for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> SectorID: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SectorID]: ...

    def __getitem__(self, index: int | slice) -> SectorID | Sequence[SectorID]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return tuple(self._between(start, stop))
            return tuple(self[position] for position in range(start, stop, step))
        position = range(len(self))[index]
        [(part, start, _)] = self.pieces(position, position + 1)
        return SectorID(part.miner, part.each[start])

    def __iter__(self) -> Iterator[SectorID]:
        return self._between(0, len(self))

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Numbers, int, int]]:
        """The parts that positions `start` to `stop` lie in, each with its own positions."""
        stop = min(stop, len(self))
        number = bisect_right(self._ends, start)
        while start < stop:
            part, end = self._parts[number], self._ends[number]
            begin = end - part.count
            yield part, start - begin, min(stop, end) - begin
            start = end
            number += 1

    def _between(self, start: int, stop: int) -> Iterator[SectorID]:
        for part, first, last in self.pieces(start, stop):
            miner = part.miner
            for number in part.each[first:last]:
                yield SectorID(miner, number)
