"""A second descriptor of a connection, for threads that may outlive it.

A call that was given up at the disk's deadline may still be at work when the connection is gone. It
must not use the connection's own number then: that may be another connection's by now.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import suppress
from types import TracebackType

import trio


class Duplicate:
    """A second descriptor of a socket, closed when both the loop and the last thread are done."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._fd = os.dup(sock.fileno())
        self._users = 1
        self._closed = False
        self._lock = threading.Lock()  # held for a few instructions only

    def __enter__(self) -> int:
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "connection was closed")
            self._users += 1
            return self._fd

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def end(self) -> None:
        """End the connection itself: closing is not enough while a thread holds the duplicate."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """No thread enters any more; called once, by the loop."""
        with self._lock:
            self._closed = True
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            os.close(self._fd)
