"""When hashing may read: not while it is paused, after readers, and so many bytes a second.

A path that somebody reads is left alone until nobody did for a while. One that is always read gives
hashing a tenth of its time, or it would never be proved at all.
"""

from __future__ import annotations

import math

import trio

from sectorfs.stores.hashing import FAST_CHUNK
from sectorfs.stores.lanes import Lane
from sectorfs.wire.rates import Rates

READERS_SHARE = 9
"""A path that is read waits so many times as long as its last turn took."""

_SETTLE = 30.0


class HashPace:
    """What all paths of a node share: the pause, the rate, and how fast it goes."""

    def __init__(self, *, rate: int, idle: float, paused: bool) -> None:
        self.idle = idle
        self.meter = Meter(trio.current_time())
        self._throttle = Rates(node=rate).of("")
        self._running = trio.Event()
        if not paused:
            self._running.set()

    @property
    def paused(self) -> bool:
        """Nothing is read until `resume`."""
        return not self._running.is_set()

    def pause(self) -> None:
        """Let nobody begin another turn."""
        if not self.paused:
            self._running = trio.Event()

    def resume(self) -> None:
        """Let all go on."""
        self._running.set()

    async def turn(self) -> int:
        """Wait until bytes may be read: how many; they are charged already."""
        await self._running.wait()
        return FAST_CHUNK if self._throttle is None else await self._throttle.turn()

    def read(self, count: int, allowed: int) -> None:
        """So many bytes were read in a turn that allowed so many."""
        self.meter.add(count, trio.current_time())
        if self._throttle is not None:
            self._throttle.charge(count - allowed)


class PathPace:
    """The turns of one path."""

    def __init__(self, pace: HashPace, lane: Lane) -> None:
        self._pace = pace
        self._lane = lane
        self._wait_until = -math.inf

    @property
    def waits(self) -> bool:
        """Readers come first now."""
        now = trio.current_time()
        return now < min(self._lane.used_at + self._pace.idle, self._wait_until)

    async def turn(self) -> int:
        """As `HashPace.turn`, after the path's readers."""
        allowed = await self._pace.turn()
        try:
            while self.waits:
                quiet = self._lane.used_at + self._pace.idle
                await trio.sleep_until(min(quiet, self._wait_until))
        except BaseException:
            self._pace.read(0, allowed)
            raise
        return allowed

    def read(self, count: int, allowed: int, *, seconds: float) -> None:
        """A turn took so long."""
        self._pace.read(count, allowed)
        self._wait_until = trio.current_time() + READERS_SHARE * seconds


class Meter:
    """Bytes a second of late. Pure; old ones fade."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._at = now
        self._level = 0.0

    def add(self, count: int, now: float) -> None:
        """Bytes came."""
        self._level = self._faded(now) + count
        self._at = now

    def rate(self, now: float) -> float:
        """Bytes a second."""
        known = -math.expm1(-(now - self._began) / _SETTLE)
        return self._faded(now) / _SETTLE / known if known else 0.0

    def _faded(self, now: float) -> float:
        return self._level * math.exp(-(now - self._at) / _SETTLE)
