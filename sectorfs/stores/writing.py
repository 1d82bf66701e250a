"""Writes one file as its bytes come, synced now and then.

What the page cache holds of a file of 64 GiB takes a disk minutes to write out. Synced only at the
end, that could not be told from a disk that hangs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from sectorfs.wire.messages import Runner

T = TypeVar("T")

SYNC_EVERY = 1 << 30
"""Bytes between two syncs: slow disks take ten seconds for them, far below any patience."""


class SteadyWrites:
    """A `Runner` of the writes to one file, which syncs what they left in the page cache."""

    def __init__(self, run: Runner, descriptor: AbstractContextManager[int]) -> None:
        self._run = run
        self._descriptor = descriptor
        self._done = 0
        self._synced = 0

    def wrote(self, done: int) -> None:
        """So many bytes of the file are written by now."""
        self._done = done

    async def __call__(self, call: Callable[[], T], /, *, what: str) -> T:
        """Run one write; see `Runner`."""
        if self._done - self._synced >= SYNC_EVERY:
            self._synced = self._done
            await self._run(self._sync, what="sync")
        return await self._run(call, what=what)

    def _sync(self) -> None:
        with self._descriptor as fd:
            os.fdatasync(fd)
