"""Sets of byte positions as sorted, disjoint, half-open intervals. Pure.

A file read from front to back is one interval, one read at random a few hundred: far less memory
than a bit for each of its 64 KiB pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Intervals:
    """Positions as ascending intervals that neither overlap nor touch."""

    __slots__ = ("_ends", "_starts", "_total")

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._total = 0
        for start, end in spans:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def total(self) -> int:
        """How many positions are in it."""
        return self._total

    def copy(self) -> Intervals:
        """An independent set of the same positions."""
        other = Intervals()
        other._starts, other._ends, other._total = self._starts[:], self._ends[:], self._total
        return other

    def add(self, start: int, end: int) -> None:
        """Put in the positions from `start` up to `end`, that one not included."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        for merged in range(first, last):
            self._total -= self._ends[merged] - self._starts[merged]
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        self._total += end - start

    def discard(self, start: int, end: int) -> None:
        """Take out the positions from `start` up to `end`, that one not included."""
        if start >= end:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        kept = [
            (low, high)
            for low, high in ((self._starts[first], start), (end, self._ends[last - 1]))
            if low < high
        ]
        self._total -= sum(self._ends[one] - self._starts[one] for one in range(first, last))
        self._starts[first:last] = [low for low, _ in kept]
        self._ends[first:last] = [high for _, high in kept]
        self._total += sum(high - low for low, high in kept)

    def covers(self, start: int, end: int) -> bool:
        """True when every position from `start` up to `end` is in it."""
        if start >= end:
            return True
        found = bisect_right(self._starts, start) - 1
        return found >= 0 and self._ends[found] >= end

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The intervals between `start` and `end` that are not in it."""
        gaps = []
        position = start
        found = bisect_right(self._ends, start)
        while position < end and found < len(self._starts):
            low, high = self._starts[found], self._ends[found]
            if low >= end:
                break
            if position < low:
                gaps.append((position, low))
            position = max(position, high)
            found += 1
        if position < end:
            gaps.append((position, end))
        return gaps

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The intervals between `start` and `end` that are in it."""
        spans = []
        found = bisect_right(self._ends, start)
        while found < len(self._starts) and self._starts[found] < end:
            spans.append((max(start, self._starts[found]), min(end, self._ends[found])))
            found += 1
        return spans
