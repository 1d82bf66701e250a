"""Which sector file of a storage is hashed next. Pure, with time passed in.

First what a peer asked a manifest of, in vain: somebody reads it from afar, with no proof but its
length. Then what is new, which is likely still in memory, and soon moved or read elsewhere. The
backlog, for which nobody waits, comes in the order of the catalog, where a place is a single key.

What failed is put off, ever longer.
"""

from __future__ import annotations

import msgspec

from sectorfs.types import SectorFile

LIMIT = 10_000
"""Files of each kind that may wait here; the next pass through the catalog finds the others."""
FIRST_PAUSE = 60.0
LONGEST_PAUSE = 86_400.0
_GROWTH = 4


class _PutOff(msgspec.Struct):
    until: float
    pause: float


class Line:
    """The files of one storage that are to be hashed before its backlog."""

    def __init__(self) -> None:
        self.overflown = False
        """Some did not fit: the catalog is to be gone through again."""
        self._asked: dict[SectorFile, None] = {}
        self._fresh: dict[SectorFile, None] = {}
        self._put_off: dict[SectorFile, _PutOff] = {}

    def ask(self, file: SectorFile) -> None:
        """Somebody waits for it; if it was put off, no longer."""
        self._put_off.pop(file, None)
        self._add(self._asked, file)

    def note(self, file: SectorFile) -> bool:
        """It is new, or was changed; False when it waits here already."""
        known = self._put_off.pop(file, None) is not None or file in self._fresh
        self._add(self._fresh, file)
        return not known

    def _add(self, files: dict[SectorFile, None], file: SectorFile) -> None:
        if len(files) < LIMIT:
            files[file] = None
        else:
            self.overflown = True

    def next(self, now: float) -> SectorFile | None:
        """Take out the first; None when only the backlog is left."""
        for files in (self._asked, self._fresh):
            if files:
                first = next(iter(files))
                del files[first]
                return first
        for file, put_off in self._put_off.items():
            if put_off.until <= now:
                put_off.until = now + put_off.pause  # unless it fails again, `done` takes it out
                return file
        return None

    def may(self, file: SectorFile, now: float) -> bool:
        """Whether a file of the backlog has its turn: it does not wait for another try."""
        put_off = self._put_off.get(file)
        return put_off is None or put_off.until <= now

    def put_off(self, file: SectorFile, now: float) -> None:
        """It failed."""
        known = self._put_off.pop(file, None)
        pause = FIRST_PAUSE if known is None else min(known.pause * _GROWTH, LONGEST_PAUSE)
        while len(self._put_off) >= LIMIT:
            del self._put_off[next(iter(self._put_off))]
            self.overflown = True
        self._put_off[file] = _PutOff(now + pause, pause)

    def done(self, file: SectorFile) -> None:
        """It needs no other try."""
        self._put_off.pop(file, None)

    @property
    def failed(self) -> tuple[SectorFile, ...]:
        """What is put off."""
        return tuple(self._put_off)

    def next_due(self) -> float | None:
        """When the first of those put off has its turn."""
        return min((one.until for one in self._put_off.values()), default=None)
