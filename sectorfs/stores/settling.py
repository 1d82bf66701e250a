"""New and changed sector files until two looks at them agree. Pure: looks and times are passed in.

A file that is being written is not declared: others would fetch half of it. Each look that differs
from the one before doubles the wait, up to `MAX_WAIT`: sealing writes to one file for hours.
"""

from __future__ import annotations

import math

import msgspec

from sectorfs.stores.scan import Look, Odd
from sectorfs.types import Facts, SectorFile

MAX_WAIT = 30.0
"""Longest time between two looks at one file, in seconds."""


class _Entry(msgspec.Struct):
    due: float
    wait: float
    seen: Facts | None = None
    touched: bool = False
    """Something happened since the look that is under way began, so its answer may be old."""


class Settling:
    """The files of one storage path that wait for their second look."""

    def __init__(self, *, settle: float, limit: int) -> None:
        self._settle = settle
        self._limit = limit
        self._entries: dict[SectorFile, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def note(self, file: SectorFile, now: float, seen: Facts | None = None) -> bool:
        """Something happened to `file`; with `seen` its first look is done. False when full."""
        entry = self._entries.get(file)
        if entry is not None:
            entry.touched = True
            entry.wait = self._settle
            entry.due = min(entry.due, now + self._settle)
            return True
        if len(self._entries) >= self._limit:
            return False
        due = now if seen is None else now + self._settle
        self._entries[file] = _Entry(due, self._settle, seen)
        return True

    def due(self, now: float) -> list[SectorFile]:
        """The files to look at now, in key order; report each look with `saw`."""
        files = sorted(file for file, entry in self._entries.items() if entry.due <= now)
        for file in files:
            entry = self._entries[file]
            entry.touched = False
            entry.due = now + entry.wait
        return files

    def next_due(self) -> float:
        """When the next file is due; infinity when none waits."""
        return min((entry.due for entry in self._entries.values()), default=math.inf)

    def saw(self, file: SectorFile, look: Look, now: float) -> bool:
        """Take a look; True when it is the last word: quiet, gone, or no sector file."""
        entry = self._entries.get(file)
        if entry is None:
            return False
        if isinstance(look, Odd) and look.unreadable:
            entry.due = now + MAX_WAIT
            return False
        facts = look if isinstance(look, Facts) else None
        settled = facts is None or facts == entry.seen
        if settled and not entry.touched:
            del self._entries[file]
            return True
        if not settled and entry.seen is not None and not entry.touched:
            entry.wait = min(entry.wait * 2, MAX_WAIT)
        entry.seen = facts
        entry.due = now + entry.wait
        return facts is None

    def clear(self) -> None:
        """Forget everything: a complete scan follows."""
        self._entries.clear()
