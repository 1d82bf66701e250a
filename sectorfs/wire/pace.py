"""When a body counts as stuck: pure arithmetic on seconds waited and bytes moved."""

from __future__ import annotations

FLOOR = 16 * 1024
"""Bytes per second below which a transfer is given up in the long run."""


class Pace:
    """Patience with one body.

    No piece may take longer than `progress` seconds, and on the whole the body must move at
    `FLOOR` bytes per second: one byte every nine seconds is progress, but of no use to a reader.
    Only time spent waiting for the other side counts, never our own disk.
    """

    def __init__(self, progress: float) -> None:
        self._progress = progress
        self._credit = progress

    def patience(self) -> float:
        """Seconds to wait for the next piece."""
        return max(0.0, min(self._progress, self._credit))

    def moved(self, count: int, *, waited: float) -> None:
        """`count` bytes came after `waited` seconds."""
        self._credit += count / FLOOR - waited
