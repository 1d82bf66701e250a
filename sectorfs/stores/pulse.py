"""Whether a disk answers at all: the breaker of a lane, and probes that nobody waits for.

A call that takes long is no proof of a dead disk: one sector may be bad, one queue long. So once a
call has run for half its deadline the disk is probed beside it, and only when the deadline passes
with the probe still out does the breaker open. A disk that is merely slow never refuses anybody.

A probe reads from the medium, not from a cache: on a dead disk, names and attributes that the
kernel remembers are answered for hours. A probe that hangs holds a thread until the kernel lets it
go, so that few may hang at a time; those of a mount that was replaced since do not count.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import trio

from sectorfs.stores.breaker import Breaker
from sectorfs.stores.calls import Call
from sectorfs.stores.metadata import METADATA_NAME

T = TypeVar("T")

HUNG_PROBES = 3
"""Probes of one mount that may hang at a time."""
LONGEST_PAUSE = 20
"""The longest pause between two probes, in deadlines."""
_GRACE = 4
"""A probe is given this part of a deadline before its silence counts."""

_ESCAPED = re.compile(r"\\([0-7]{3})")


class Pulse:
    """The breaker of one disk, and its probes."""

    def __init__(self, thing: str, ask: Callable[[], object] | None, *, deadline: float) -> None:
        self._thing = thing
        self._ask = ask or (lambda: ask_disk(thing))
        self._grace = deadline / _GRACE
        self._breaker = Breaker(pause=deadline, longest=LONGEST_PAUSE * deadline)
        self._probes: list[_Probe] = []  # those that are out
        self._answered_at = -math.inf
        self._scopes: set[trio.CancelScope] = set()
        self.changed: Callable[[], object] = _nobody
        """Called on the loop when the disk falls silent, and when it answers again."""

    @property
    def silence(self) -> str:
        """Why nobody may ask; empty while everybody may."""
        return self._breaker.reason

    def check(self) -> str:
        """As `silence`; sends the next probe when it is due."""
        if not self._breaker.closed and self._breaker.admit(trio.current_time()):
            self._probe()
        return self.silence

    def doubt(self) -> None:
        """A call takes long: see whether the disk answers at all."""
        if not any(probe.call.began > self._answered_at for probe in self._probes):
            self._probe()

    def gave_up(self, reason: str) -> None:
        """The deadline of a doubted call passed."""
        now = trio.current_time()
        if not self._breaker.closed or not self._probes:
            return
        if now - self._probes[-1].call.began >= self._grace:
            self._breaker.failed(now, reason)
            for scope in self._scopes:
                scope.cancel()
            self.changed()

    def answered(self) -> None:
        """A probe, or a call that was given up, came back after all."""
        self._answered_at = trio.current_time()
        if not self._breaker.closed:
            self._breaker.answered()
            self.changed()

    @contextmanager
    def until_silent(self, scope: trio.CancelScope) -> Iterator[None]:
        """Cancel `scope` when the disk falls silent during the block."""
        self._scopes.add(scope)
        try:
            yield
        finally:
            self._scopes.remove(scope)

    def _probe(self) -> None:
        if len(self._probes) >= HUNG_PROBES:
            self._probes = [probe for probe in self._probes if not probe.placed.moved()]
        if len(self._probes) < HUNG_PROBES:
            self._probes.append(_Probe(Placed(self._thing, self._ask), self._ended))

    def _ended(self, call: Call[object]) -> None:
        self._probes = [probe for probe in self._probes if probe.call is not call]
        self.answered()


class Placed(Generic[T]):
    """A call that notes which mount it is made on, in the thread it is made in."""

    def __init__(self, thing: str, call: Callable[[], T]) -> None:
        self._thing = thing
        self._call = call
        self._mount = ""

    def __call__(self) -> T:
        self._mount = mount_of(self._thing)
        return self._call()

    def moved(self) -> bool:
        """Another mount lies there since: one may hang, the other answer."""
        return self._mount not in ("", mount_of(self._thing))


class _Probe:
    def __init__(self, placed: Placed[object], ended: Callable[[Call[object]], object]) -> None:
        self.placed = placed
        self.call = Call(placed, ended=ended)
        self.call.give_up()  # nobody waits for what it gives


def ask_disk(path: str) -> None:
    """Read a byte of a path from the medium; that it cannot be read is an answer as well."""
    for name in (os.path.join(path, METADATA_NAME), path):
        with suppress(OSError):
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.pread(fd, 1, 0)
            finally:
                os.close(fd)
            return


def mount_of(path: str) -> str:
    """Which mount a path lies on, by name alone: the path itself may hang."""
    found, longest = "", -1
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            number, _, _, _, point, *_ = line.split(" ")
            point = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), point)
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= longest:
                found, longest = number, len(point)
    return found


def _nobody() -> None:
    """Nobody wants to know."""
