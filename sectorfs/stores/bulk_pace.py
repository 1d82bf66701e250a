"""How fast work that nobody waits for reads disks: not above a rate, and little while others read.

Who else reads is seen at the disk itself, by what the kernel counts there: provers read large files
past this daemon, and other programs read without it. Where the kernel counts nothing for a file
system (network, several disks), only the rate holds.
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

OTHERS = 1 << 20
"""Bytes a second that others read from a disk in use."""
LOOK = 0.25
"""Seconds between two looks at what the kernel counts."""
YIELD = 3
"""While others read, so many times as long as a read took passes before the next."""
LONGEST = 1.0
"""Seconds; so that the work goes on, whatever others do."""

_SECTOR = 512
_COUNTERS = Path("/sys/dev/block")


class DiskUse:
    """Whether others read from the disk of one device number."""

    def __init__(self, device: int, *, root: Path | None = None) -> None:
        self._counter = (root or _COUNTERS) / f"{os.major(device)}:{os.minor(device)}" / "stat"
        self._busy = False
        self._begin(trio.current_time())

    def _begin(self, now: float) -> None:
        self._since = self._read_at = now
        self._total = self._read_bytes()
        self._own = 0

    def read(self, count: int, seconds: float) -> None:
        """We read so much ourselves, in so much time."""
        now = trio.current_time()
        if now - self._read_at > seconds + LOOK:
            self._begin(now)  # what others did while we did nothing hindered nobody
            self._busy = False
        else:
            self._own += count
        self._read_at = now

    def go_on(self) -> None:
        """We did nothing just now, for the sake of others."""
        self._read_at = trio.current_time()

    def by_others(self) -> bool:
        """Whether others read much, as of the last look."""
        now = trio.current_time()
        passed = now - self._since
        if passed >= LOOK:
            total = self._read_bytes()
            if total is not None and self._total is not None:
                self._busy = total - self._total - self._own > OTHERS * passed
            self._since, self._total, self._own = now, total, 0
        return self._busy

    def _read_bytes(self) -> int | None:
        try:
            # In memory, whatever the disk does: the third field counts what was read from it.
            return int(self._counter.read_text().split()[2]) * _SECTOR
        except (OSError, ValueError, IndexError):
            return None


class BulkPace:
    """What all reads of one kind of work on a node keep to."""

    def __init__(self, rate: int) -> None:
        """`rate` in bytes a second, 0 for no limit."""
        self._rate = rate
        self._free_at = 0.0  # when what was read so far is paid for
        self._uses: dict[int, DiskUse] = {}

    async def turn(self, count: int) -> None:
        """Wait until `count` bytes may be read."""
        if not self._rate:
            await trio.lowlevel.checkpoint()
            return
        begin = max(self._free_at, trio.current_time())
        self._free_at = begin + count / self._rate
        await trio.sleep_until(begin)

    async def done(self, device: int, count: int, seconds: float) -> None:
        """So many bytes came from a disk in so much time: let others read now, if there are any."""
        use = self._uses.setdefault(device, DiskUse(device))
        use.read(count, seconds)
        if use.by_others():
            await trio.sleep(min(LONGEST, YIELD * seconds))
            use.go_on()
