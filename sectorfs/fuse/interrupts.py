"""Requests whose readers were killed or interrupted: the work ends, and the reader gets EINTR.

A process that waits for an answer of the mount cannot be killed until it has one, not even by
SIGKILL. The kernel says so by an INTERRUPT, once per request, whatever the signal was.

A buffered read (of the page cache, also on behalf of a mapping) is given up for a dying process
only: for any other the page would stay without its bytes, which is an error to all who read it, and
SIGBUS to a mapping. A disk makes signals wait in the same place.

Of a process that only waits for a page that is being read the kernel says nothing when it is
killed: it lets it go, and the request stays. So the readers of those that wait for long are looked
at, and who is gone, or dying, is taken for interrupted.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import trio

from sectorfs.errors import Interrupted
from sectorfs.fuse import kernel

R = TypeVar("R")

LOOK_AGAIN = 0.4
"""Seconds after which it is looked whether the readers of pages that are waited for still live."""

_PROC = Path("/proc")
_KILLED = 1 << (signal.SIGKILL - 1)


class Interrupts:
    """The requests that are being answered, by the kernel's numbers."""

    def __init__(self) -> None:
        self._scopes: dict[int, trio.CancelScope] = {}
        self._readers: dict[int, int] = {}
        """The processes that wait for buffered reads."""
        # Invariant: all of their requests are in `_scopes`.
        self._seen: frozenset[int] = frozenset()
        """Those that waited at the last look already."""
        self._look_at = math.inf
        self._nap = trio.CancelScope()
        self.spared = 0
        """Interrupts of buffered reads whose readers lived on."""

    @property
    def waiting(self) -> int:
        """Buffered reads that are waited for."""
        return len(self._readers)

    async def watch(self, work: Awaitable[R]) -> R:
        """The result of `work` for the request whose handler has just begun: before its first wait.

        Only for what waits: it costs a third of a small read that does not.
        """
        number, pid, buffered = kernel.current()
        return await (self.answer(number, work, pid if buffered else 0) if number else work)

    async def answer(self, number: int, work: Awaitable[R], reader: int = 0) -> R:
        """The result of `work`; `Interrupted` when the reader of the request was.

        `reader` is the process that waits for a buffered read; 0 of every other request.
        """
        scope = self._scopes[number] = trio.CancelScope()
        if reader:
            self._readers[number] = reader
            self._look_at = min(self._look_at, trio.current_time() + LOOK_AGAIN)
            self._nap.deadline = self._look_at
        try:
            with scope:
                return await work
        finally:
            del self._scopes[number]
            self._readers.pop(number, None)
        raise Interrupted("the reader was interrupted")

    async def run(self) -> None:
        """Cancel what is interrupted, until cancelled."""
        readable = kernel.interrupts_fd()
        while readable >= 0:
            with trio.CancelScope(deadline=self._look_at) as self._nap:
                await trio.lowlevel.wait_readable(readable)
            for number, pid, buffered in kernel.interrupted():
                self.interrupt(number, pid, buffered=buffered)
            if trio.current_time() >= self._look_at:
                self.look()
                self._look_at = trio.current_time() + LOOK_AGAIN if self._readers else math.inf

    def look(self) -> None:
        """Give up what only processes wait for that are gone, if it did so at the last look too."""
        for number, pid in self._readers.items():
            if number in self._seen and is_dying(pid):
                self._scopes[number].cancel()
        self._seen = frozenset(self._readers)

    def interrupt(self, number: int, pid: int, *, buffered: bool) -> None:
        """Give a request up, unless it was answered meanwhile."""
        scope = self._scopes.get(number)
        if scope is None:
            return
        if buffered and not is_dying(pid):
            self.spared += 1
        else:
            scope.cancel()


def is_dying(pid: int) -> bool:
    """True when a process (or one thread of it) was killed. What nobody knows of lives."""
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except OSError:  # gone; but 0 is how the kernel shows processes of other containers
        return pid != 0
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return any(int(fields[name], 16) & _KILLED for name in ("SigPnd", "ShdPnd"))
