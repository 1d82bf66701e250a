"""How far ahead of a reader to ask for bytes. Pure.

A reader that goes on where it stopped gets a window as long as what it has read in sequence, up to
a bound: it doubles by itself. One that jumps gets what it asks for and nothing else. The kernel's
own read-ahead sends the requests of one sequential reader slightly out of order, and skips what it
has already: both are still a sequence.
"""

from __future__ import annotations

LONGEST = 32 << 20
"""Bytes asked for ahead of a reader at most."""
SLACK = 2 << 20
"""Bytes by which a read may lie before or behind the expected place and still be in sequence."""


class Window:
    """The place and the pattern of one reader."""

    __slots__ = ("_end", "streak")

    def __init__(self) -> None:
        self._end: int | None = None
        self.streak = 0
        """Bytes read in sequence until now."""

    def read(self, start: int, end: int, size: int) -> int:
        """Note a read of a file of `size` bytes; the position up to which it wants bytes soon."""
        reached = self._end
        if reached is not None and abs(start - reached) <= SLACK:
            self.streak += max(0, end - reached)
            self._end = max(reached, end)
        else:
            self.streak = end - start if start == 0 else 0
            self._end = end
        if reached is None or not self.streak:
            return min(size, end)
        return min(size, max(end, self._end + min(self.streak, LONGEST)))
