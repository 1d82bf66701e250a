"""Threads for disk work, bounded and timed per storage, and descriptors that outlive a hung call.

Every storage path has one `Lane`: at most `width` calls at a time, each given up after `deadline`
seconds. A disk that hangs therefore fills its own lane and costs its readers one deadline each, and
nobody else anything. A thread that was given up runs on until the kernel lets it go; it keeps its
place in the lane meanwhile, which is the bound on stuck threads.

A descriptor that such a thread still uses must not be closed and its number reused under it, or the
late call would act on another file: `Descriptor` closes when its last user has left.

Closing waits for the disk as well: a FUSE file system is asked to flush at each close. So nothing
is closed on the loop; each lane has one thread, while there is something to close, that does it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

import trio

from sectorfs.errors import StorageUnavailable, from_os

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_WIDTH = 32


class Lane:
    """The threads one storage may occupy."""

    def __init__(self, thing: str, *, deadline: float, width: int = DEFAULT_WIDTH) -> None:
        self.thing = thing
        """Path or URL named in errors."""
        self.deadline = deadline
        self._limiter = trio.CapacityLimiter(width)
        self._writes: dict[object, float] = {}  # when each call of `finish` under way began
        self._closer = _Closer(thing)

    @property
    def busy(self) -> int:
        """Calls that run or hang now."""
        return self._limiter.borrowed_tokens

    async def run(
        self, call: Callable[[], T], *, what: str, discard: Callable[[T], object] | None = None
    ) -> T:
        """Run `call` in a thread; an `OSError` is translated by `errors.from_os`.

        `StorageUnavailable` at the deadline. A call given up (deadline, cancellation) may still
        finish later: `discard` then gets its result, so that a late `os.open` leaks nothing.
        """
        job = _Job(call, discard)
        with trio.move_on_after(self.deadline):
            try:
                result = await trio.to_thread.run_sync(
                    job.run, limiter=self._limiter, abandon_on_cancel=True
                )
                job.received = True
                return result
            except OSError as exc:
                raise from_os(exc, what, self.thing) from exc
            finally:
                job.leave()
        raise StorageUnavailable(
            f"{what}: no answer within {self.deadline:g} s", self.thing, "check the disk"
        )

    async def finish(self, call: Callable[[], T], *, what: str) -> T:
        """Run `call` in a thread to its end, whatever happens: for writes that must not be torn."""
        write = object()
        self._writes[write] = trio.current_time()
        try:
            return await trio.to_thread.run_sync(call, limiter=self._limiter)
        except OSError as exc:
            raise from_os(exc, what, self.thing) from exc
        finally:
            del self._writes[write]

    def longest_write(self) -> float:
        """Seconds that the oldest call of `finish` under way takes already; 0 without any."""
        now = trio.current_time()
        return now - min(self._writes.values(), default=now)

    def descriptor(self, fd: int) -> Descriptor:
        """A descriptor of a file on this storage, closed in a thread of the storage."""
        return Descriptor(fd, close=self._closer.close)


class _Closer:
    """Closes descriptors in one thread; when that hangs, only the descriptors wait."""

    def __init__(self, thing: str) -> None:
        self._thing = thing
        self._lock = threading.Lock()  # held for a few instructions only
        self._waiting: deque[int] = deque()  # bounded by the process's limit on descriptors
        self._running = False

    def close(self, fd: int) -> None:
        """Have a descriptor closed soon; never waits."""
        with self._lock:
            self._waiting.append(fd)
            if self._running:
                return
            self._running = True
        trio.lowlevel.start_thread_soon(self._close_all, lambda outcome: outcome.unwrap())

    def _close_all(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                fd = self._waiting.popleft()
            try:
                os.close(fd)
            except OSError as exc:
                # The descriptor is gone all the same; of a file only read, nothing is lost.
                log.warning("%s: close: %s", self._thing, exc)


class _Job(Generic[T]):
    """One call, and who cleans up its result when nobody waits for it any more."""

    def __init__(self, call: Callable[[], T], discard: Callable[[T], object] | None) -> None:
        self._call = call
        self._discard = discard
        self._lock = threading.Lock()
        self._left = False
        self._results: list[T] = []
        self.received = False

    def run(self) -> T:
        result = self._call()
        with self._lock:
            self._results.append(result)
            late = self._left
        if late and self._discard is not None:
            self._discard(result)
        return result

    def leave(self) -> None:
        """The waiter goes; a result that came too late to reach it is discarded here."""
        with self._lock:
            self._left = True
            orphans = [] if self.received else list(self._results)
        for result in orphans:
            if self._discard is not None:
                self._discard(result)


class Descriptor:
    """A file descriptor closed by `close`, but not before the last ``with`` block over it ends.

    One of a file on a storage is made by its `Lane`, whose thread does the closing.
    """

    def __init__(self, fd: int, *, close: Callable[[int], None] | None = None) -> None:
        self._fd = fd
        self._close = close
        self._users = 0
        self._closed = False
        self._lock = (
            threading.Lock()
        )  # held for a few instructions only, on the loop and in threads

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    def __enter__(self) -> int:
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "file was closed")
            self._users += 1
            return self._fd

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and self._users == 0
        if last:
            self._end()

    def close(self) -> None:
        """Close now, or when the last user leaves; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            last = self._users == 0
        if last:
            self._end()

    def _end(self) -> None:
        if self._close is None:
            os.close(self._fd)
        else:
            self._close(self._fd)
