"""Requests whose readers were killed or interrupted: the work ends, and the reader gets EINTR.

A process that waits for an answer of the mount cannot be killed until it has one, not even by
SIGKILL. The kernel says so by an INTERRUPT, once per request, whatever the signal was.

A buffered read (of the page cache, also on behalf of a mapping) is given up for a dying process
only: for any other the page would stay without its bytes, which is an error to all who read it, and
SIGBUS to a mapping. A disk makes signals wait in the same place.
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

LOOK_AGAIN = 0.2
"""Seconds after which the living readers of interrupted buffered reads are looked at again."""

_PROC = Path("/proc")
_KILLED = 1 << (signal.SIGKILL - 1)


class Interrupts:
    """The requests that are being answered, by the kernel's numbers."""

    def __init__(self) -> None:
        self._scopes: dict[int, trio.CancelScope] = {}
        self.undecided: dict[int, int] = {}
        """Buffered reads whose readers were interrupted and live, with their process numbers."""
        # Invariant: all of them are in `_scopes`. The kernel will not tell of them again.

    async def watch(self, work: Awaitable[R]) -> R:
        """The result of `work` for the request whose handler has just begun: before its first wait.

        Only for what waits: it costs a third of a small read that does not.
        """
        number = kernel.current()
        return await (self.answer(number, work) if number else work)

    async def answer(self, number: int, work: Awaitable[R]) -> R:
        """The result of `work`; `Interrupted` when the reader of the request was."""
        scope = self._scopes[number] = trio.CancelScope()
        try:
            with scope:
                return await work
        finally:
            del self._scopes[number]
            self.undecided.pop(number, None)
        raise Interrupted("the reader was interrupted")

    async def run(self) -> None:
        """Cancel what is interrupted, until cancelled."""
        readable = kernel.interrupts_fd()
        while readable >= 0:
            with trio.move_on_after(LOOK_AGAIN if self.undecided else math.inf):
                await trio.lowlevel.wait_readable(readable)
            for number, pid, buffered in kernel.interrupted():
                self.interrupt(number, pid, buffered=buffered)
            for number, pid in list(self.undecided.items()):
                self.interrupt(number, pid, buffered=True)

    def interrupt(self, number: int, pid: int, *, buffered: bool) -> None:
        """Give a request up, unless it was answered meanwhile."""
        scope = self._scopes.get(number)
        if scope is None:
            return
        if buffered and not is_dying(pid):
            self.undecided[number] = pid
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
