"""Threads for disk work, bounded and timed per storage, and descriptors that outlive a hung call.

Every storage path has one `Lane`: at most `width` calls at a time, each given up after `deadline`
seconds. A disk that hangs therefore fills its own lane and costs its readers one deadline each, and
nobody else anything. A thread that was given up runs on until the kernel lets it go; it keeps its
place in the lane meanwhile, which is the bound on stuck threads. When a deadline passes in which
the disk answers nothing at all (`pulse`), later calls fail at once and take no thread until it
answers again.

A descriptor that such a thread still uses must not be closed and its number reused under it, or the
late call would act on another file: `Descriptor` closes when its last user has left.

Closing waits for the disk as well: a FUSE file system is asked to flush at each close. So nothing
is closed on the loop; each lane has one thread, while there is something to close, that does it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import trio

from sectorfs.errors import StorageUnavailable, from_os
from sectorfs.stores.calls import Call
from sectorfs.stores.pulse import Placed, Pulse

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_WIDTH = 32
PATIENT_WRITES = 8
"""Deadlines that one call of `finish` may take: syncing a large file is slow on a busy disk."""


class Lane:
    """The threads one storage may occupy."""

    def __init__(
        self,
        thing: str,
        *,
        deadline: float,
        width: int = DEFAULT_WIDTH,
        patience: float | None = None,
        ask: Callable[[], object] | None = None,
    ) -> None:
        self.thing = thing
        """Path or URL named in errors."""
        self.deadline = deadline
        self.patience = deadline * PATIENT_WRITES if patience is None else patience
        """Seconds after which a call of `finish` is given up."""
        self.used_at = -math.inf
        """When somebody last began a call that was not in the background."""
        self.pulse = Pulse(thing, ask, deadline=deadline)
        """Whether the disk answers at all; `ask` asks it, where `thing` is no path on it."""
        self._limiter = trio.CapacityLimiter(width)
        self._running: set[Call[Any]] = set()
        self._shared: dict[str, tuple[Call[Any], Placed[Any]]] = {}
        self._writes: set[Call[Any]] = set()  # of `finish`, until their threads end
        self._closer = _Closer(thing)

    @property
    def busy(self) -> int:
        """Calls that run or hang now."""
        return self._limiter.borrowed_tokens + len(self._shared)

    async def run(
        self,
        call: Callable[[], T],
        *,
        what: str,
        discard: Callable[[T], object] | None = None,
        background: bool = False,
    ) -> T:
        """Run `call` in a thread; an `OSError` is translated by `errors.from_os`.

        What runs in the `background` steps back while anybody else uses the lane: see `used_at`.

        `StorageUnavailable` at the deadline, and at once while the disk is silent. A call given up
        (deadline, cancellation) may still finish later: `discard` then gets its result, so that a
        late `os.open` leaks nothing.
        """
        self.check()
        if not background:
            self.used_at = trio.current_time()
        with trio.move_on_after(self.deadline):
            return await self._result(await self._start(call, discard), what)
        raise self._no_answer(what)

    async def share(self, call: Callable[[], T], *, what: str) -> T:
        """Like `run`, with one thread at a time for everybody who asks the same `what`.

        For what is asked again and again, as heartbeats do: of a disk that hangs one thread hangs,
        and not one more each time. No crowd of readers holds it up: its thread is beyond the bound.
        It ends as soon as the disk proves silent, so that heartbeats tell of it at once.
        """
        self.check()
        running, placed = self._shared.get(what, (None, None))
        if running is not None and placed is not None and self._is_late(running):
            if not placed.moved():
                raise self._no_answer(what)
            running = None  # it hangs on a mount that is no more
        if running is None:
            placed = Placed(self.thing, call)
            running = Call(placed, ended=lambda ended: self._share_ended(what, ended))
            self._shared[what] = running, placed
        with trio.move_on_after(self.deadline) as scope, self.pulse.until_silent(scope):
            return await self._result(running, what)
        self.check()
        raise self._no_answer(what)

    async def finish(self, call: Callable[[], T], *, what: str, patience: float | None = None) -> T:
        """Run `call` in a thread to its end, cancelled or not: for writes that must not be torn.

        `StorageUnavailable` after `patience` seconds (the lane's own unless told), and at once
        while the disk is silent. The thread runs on then, and shows nothing that nobody waits for:
        see `wanted`.
        """
        self.check()
        patience = self.patience if patience is None else patience
        with trio.move_on_after(patience) as scope:
            running = await self._start(call, None)
            self._writes.add(running)
            scope.shield = True
            return await self._result(running, what)
        raise self._no_answer(what, patience)

    def check(self) -> None:
        """`StorageUnavailable` while the disk is silent, or every place is taken by what hangs."""
        reason = self.pulse.check() or self._stuck()
        if reason:
            raise self.unavailable(reason)

    def _stuck(self) -> str:
        hung = [one for one in self._running if one.given_up and self._is_late(one)]
        if len(hung) < self._limiter.total_tokens:
            return ""
        return f"{len(hung)} calls: no answer within {self.deadline:g} s"

    def unavailable(self, reason: str) -> StorageUnavailable:
        """The error for a disk that does not answer."""
        return StorageUnavailable(reason, self.thing, "check the disk")

    def longest_write(self) -> float:
        """Seconds that the oldest thread of `finish` takes already, given up or not; 0 for none."""
        now = trio.current_time()
        return now - min((write.began for write in self._writes), default=now)

    def descriptor(self, fd: int) -> Descriptor:
        """A descriptor of a file on this storage, closed in a thread of the storage."""
        return Descriptor(fd, close=self._closer.close)

    async def _start(self, call: Callable[[], T], discard: Callable[[T], object] | None) -> Call[T]:
        """Begin a call once there is a place for it, which it keeps to its end."""
        place = object()

        def ended(ended: Call[T]) -> None:
            self._writes.discard(ended)
            self._limiter.release_on_behalf_of(place)
            self._running.discard(ended)
            self._ended(ended)

        await self._limiter.acquire_on_behalf_of(place)
        try:
            running = Call(call, discard=discard, ended=ended)
        except BaseException:
            self._limiter.release_on_behalf_of(place)
            raise
        self._running.add(running)
        return running

    async def _result(self, running: Call[T], what: str) -> T:
        """Wait for a call as long as the caller's scope allows; half way, doubt the disk."""
        try:
            with trio.move_on_after(self.deadline / 2):
                return await running.result()
            self.pulse.doubt()
            return await running.result()
        except OSError as exc:
            raise from_os(exc, what, self.thing) from exc
        except trio.Cancelled:
            running.give_up()
            raise

    def _no_answer(self, what: str, seconds: float | None = None) -> StorageUnavailable:
        reason = f"{what}: no answer within {seconds or self.deadline:g} s"
        self.pulse.gave_up(reason)
        return self.unavailable(reason)

    def _is_late(self, call: Call[Any]) -> bool:
        return trio.current_time() - call.began >= self.deadline

    def _share_ended(self, what: str, call: Call[Any]) -> None:
        if self._shared.get(what, (None,))[0] is call:
            del self._shared[what]
        self._ended(call)

    def _ended(self, call: Call[Any]) -> None:
        # What comes at once may come from a cache of the kernel; this had to wait for the disk.
        if trio.current_time() - call.began >= self.deadline / 2:
            self.pulse.answered()


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


class Descriptor:
    """A file descriptor closed by `close`, but not before the last ``with`` block over it ends.

    One of a file on a storage is made by its `Lane`, whose thread does the closing.
    """

    def __init__(self, fd: int, *, close: Callable[[int], None] | None = None) -> None:
        self._fd = fd
        self._close = close
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()  # held for a few instructions, on the loop and in threads

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
