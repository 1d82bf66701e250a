"""Which sources gave wrong bytes of which sector files, and therefore are asked last of all.

A barred source is asked only where nobody else can give the bytes, for every byte is proved: one
bad block must not take the rest of the only copy away. The bar is on one sector file of one source,
until its storage declares it anew, and for a day at most: what was wrong on the way is not so for
ever. Pure; times are passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from sectorfs.stores.sources import PeerSource
from sectorfs.types import Facts, SectorFile, StorageID

BARRED_SECONDS = 86400.0
MOST = 10_000
"""Bars that are remembered; the oldest go."""

Declared = Callable[[SectorFile, StorageID], Facts | None]
"""What a storage declares of a sector file now."""


class Bar(msgspec.Struct, frozen=True):
    """Why one source is barred for one sector file."""

    file: SectorFile
    source: PeerSource
    declared: Facts | None
    at: float
    """When it gave something wrong last."""
    count: int
    """How often it did."""
    text: str

    def __str__(self) -> str:
        times = f", {self.count} times" if self.count > 1 else ""
        return f"{self.text}{times}; asked last for this file until it is declared anew"


class Bars:
    """The bars of a node."""

    def __init__(self, declared: Declared) -> None:
        self._declared = declared
        self._bars: OrderedDict[tuple[SectorFile, PeerSource], Bar] = OrderedDict()

    def add(self, file: SectorFile, source: PeerSource, text: str, now: float) -> None:
        """A source gave something wrong."""
        before = self.of(file, source, now)
        count = before.count + 1 if before is not None else 1
        declared = self._declared(file, source.storage)
        self._bars[file, source] = Bar(file, source, declared, now, count, text)
        self._bars.move_to_end((file, source))
        while len(self._bars) > MOST:
            self._bars.popitem(last=False)

    def of(self, file: SectorFile, source: PeerSource, now: float) -> Bar | None:
        """The bar that holds; None for a source like any other."""
        bar = self._bars.get((file, source))
        if bar is None:
            return None
        if now - bar.at < BARRED_SECONDS and self._declared(file, source.storage) == bar.declared:
            return bar
        del self._bars[file, source]
        return None

    def all(self, now: float) -> list[Bar]:
        """Those that hold, the last first."""
        held = (self.of(file, source, now) for file, source in tuple(self._bars))
        return [bar for bar in held if bar is not None][::-1]
