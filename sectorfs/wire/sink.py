"""The file end of a body that comes over a socket, in a thread while the bytes keep coming.

Bytes go from the socket into one buffer and from there into the file, in pieces that end where the
file's own megabytes do: the kernel keeps and writes those as one. Whoever can tell good bytes from
bad ones does so in between (`Sieve`), so that what is bad never gets into the file.

What nobody reads soon goes past the page cache (``O_DIRECT``), which spares a copy of every byte
and leaves the cache to those who read.
"""

from __future__ import annotations

import enum
import errno
import logging
import mmap
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TypeVar

from sectorfs.errors import SourceFailed
from sectorfs.metrics import FETCHED_BYTES
from sectorfs.wire.duplicates import Duplicate
from sectorfs.wire.messages import Runner

log = logging.getLogger(__name__)

T = TypeVar("T")

BUFFER = 1 << 20
HOP = 8 << 20
"""Bytes that one call of a thread moves at most."""
HOP_SECONDS = 0.5
EAGER = 64 << 10
"""Bytes after which a thread waits for more by itself: it costs less than to come back."""
EAGER_MS = 5
EAGER_SECONDS = 0.02
"""For so long it does: those who wait for the bytes of a slow peer are to hear of them."""

Progress = Callable[[int], object]

Sieve = Callable[[memoryview], int]
"""How many of the next bytes of a body may be written; 0 when more must come to tell.

Raises when they are bad. Called in a thread. Asked of all that is left at the end of the body, and
of all up to a multiple of `BUFFER` in the file, it never says 0.
"""


_Files = tuple[int, int | None]
"""A file's descriptor, and a second one that goes past the page cache and takes whole pages."""


class Stop(enum.Enum):
    """Why a thread stopped receiving."""

    HOP = enum.auto()
    EMPTY = enum.auto()
    END = enum.auto()
    BROKEN = enum.auto()


class Sink:
    """Takes a body of `length` bytes to `offset` of a file; one call at a time."""

    def __init__(
        self,
        descriptor: AbstractContextManager[int],
        offset: int,
        length: int,
        run: Runner,
        progress: Progress | None,
        sieve: Sieve | None,
        *,
        past_cache: bool = False,
    ) -> None:
        """`progress` is told how many bytes are in the file; `run` is a `Lane.finish`."""
        self._descriptor = descriptor
        self._past_cache = past_cache and offset % mmap.PAGESIZE == 0
        self._offset = offset
        self.length = length
        self._run = run
        self._progress = progress
        self._sieve = sieve
        # Begins with a page, as writing past the cache wants it.
        self._buffer = memoryview(mmap.mmap(-1, max(1, min(BUFFER, length))))
        self._used = 0  # bytes at the start of the buffer that are not in the file yet
        self._done = 0
        self.came = 0
        """Bytes that came."""

    @property
    def done(self) -> int:
        """Bytes in the file."""
        return self._done

    async def write(self, data: bytes | bytearray) -> None:
        """Append bytes that are in memory already."""
        if data:
            await self._hop(partial(self._put, memoryview(data)))
            self._count(len(data))

    async def begin(self, early: bytes) -> None:
        """Take what came with the header: it is written by the next `pull`, which has to follow."""
        if len(early) < min(self.length, len(self._buffer)):
            self._buffer[: len(early)] = early
            self._used = len(early)
            self.came += len(early)
            FETCHED_BYTES.inc(len(early))
        else:
            await self.write(early)

    async def pull(self, source: Duplicate, most: int) -> tuple[int, Stop]:
        """Move what the socket holds into the file, in a thread."""
        count, stop = await self._hop(partial(self._drain, source, most))
        self._count(count)
        return count, stop

    async def _hop(self, call: Callable[[], T]) -> T:
        try:
            return await self._run(call, what="write")
        except SourceFailed:  # some of it, before the bytes that are bad
            self._tell()
            raise

    def _count(self, count: int) -> None:
        self.came += count
        FETCHED_BYTES.inc(count)
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done)

    # --- in a thread, one at a time ---

    def _put(self, data: memoryview) -> None:
        with self._opened() as files:
            while data:
                room = self._room()
                count = min(len(room), len(data))
                room[:count] = data[:count]
                data = data[count:]
                self._used += count
                self._let_through(files)

    def _drain(self, source: Duplicate, most: int) -> tuple[int, Stop]:
        moved, stop, begun = 0, Stop.HOP, time.monotonic()
        goal = min(self.length - self.came, most)
        with source as sock, self._opened() as files:
            while stop is Stop.HOP and moved < goal and time.monotonic() < begun + HOP_SECONDS:
                room = self._room()[: goal - moved]
                filled, stop = _fill(sock, room, EAGER - moved, begun + EAGER_SECONDS)
                moved += filled
                self._used += filled
                self._let_through(files)
        return moved, stop

    @contextmanager
    def _opened(self) -> Iterator[_Files]:
        with self._descriptor as plain:
            direct = _open_direct(plain) if self._past_cache else None
            self._past_cache = direct is not None
            try:
                yield plain, direct
            finally:
                if direct is not None:
                    os.close(direct)

    def _room(self) -> memoryview:
        """Where the next bytes go: up to a multiple of `BUFFER` in the file, so never nothing."""
        end = BUFFER - (self._offset + self._done + self._used) % BUFFER
        room = self._buffer[self._used : self._used + end]
        assert room, "a sieve let nothing through"
        return room

    def _let_through(self, files: _Files) -> None:
        """Write what may be written of the first bytes of the buffer, and keep the rest there."""
        ready = self._used
        if self._past_cache and self._done + ready < self.length:
            ready -= ready % mmap.PAGESIZE
        written = 0
        while written < ready:
            waiting = self._buffer[written:ready]
            passed = self._sieve(waiting) if self._sieve is not None else len(waiting)
            if not passed:
                break
            self._write(files, waiting[:passed])
            written += passed
        rest = self._buffer[written : self._used]
        if written and rest:
            self._buffer[: len(rest)] = rest  # they may overlap: memory is moved, not copied
        self._used = len(rest)

    def _write(self, files: _Files, data: memoryview) -> None:
        plain, direct = files
        whole = len(data) - len(data) % mmap.PAGESIZE
        if self._past_cache and direct is not None and whole:
            try:
                count = os.pwrite(direct, data[:whole], self._offset + self._done)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                count = 0
            self._past_cache = count == whole  # else the other one does it, or says why not
            self._done += count
            data = data[count:]
        while data:
            count = os.pwrite(plain, data, self._offset + self._done)
            self._done += count
            data = data[count:]


def _open_direct(fd: int) -> int | None:
    """The very same file, whatever lies at its name by now; None where it cannot be had so."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        log.debug("descriptor %d: written through the page cache: %s", fd, exc)
        return None


def _fill(sock: int, buffer: memoryview, eager: int, until: float) -> tuple[int, Stop]:
    """Receive until the buffer is full or the socket has no more.

    From `eager` bytes on it is waited for more, till `until` at most.
    """
    filled = 0
    while filled < len(buffer):
        try:
            count = os.readv(sock, [buffer[filled:]])
        except BlockingIOError:
            if filled >= eager and time.monotonic() < until and _comes(sock):
                continue
            return filled, Stop.EMPTY
        except OSError:
            return filled, Stop.BROKEN
        if count == 0:
            return filled, Stop.END
        filled += count
    return filled, Stop.HOP


def _comes(sock: int) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(EAGER_MS))
