"""A file into a socket with `os.sendfile`: the disk in a thread, the client's patience on the loop.

A thread is entered only while the socket has room and leaves when it is full, so a client that
stops reading holds no thread. A call that was given up at the disk's deadline may still be inside
`sendfile` when the connection is gone: see `duplicates`.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from functools import partial

import trio

from sectorfs.errors import SectorFSError, SourceFailed, TimedOut
from sectorfs.metrics import HTTP_SENT_BYTES
from sectorfs.wire.duplicates import Duplicate
from sectorfs.wire.messages import FileBody, PartedBody

HOP = 8 * 1024 * 1024
"""Bytes a thread sends before others get their turn."""

_PIECE = 1024 * 1024
_COPY = 256 * 1024
_HOP_SECONDS = 0.5
"""A slow disk must not use up the deadline of its lane while it moves."""
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT})


class ClientGone(SectorFSError):
    """The client closed its end."""


class Stop(enum.Enum):
    """Why a thread stopped sending."""

    HOP = enum.auto()
    FULL = enum.auto()
    SHORT = enum.auto()
    GONE = enum.auto()


async def send_file(sock: trio.socket.SocketType, body: FileBody, *, progress: float) -> None:
    """Send the whole body. Any error leaves the connection fit only for closing.

    `SourceFailed` when the file is shorter than promised, `TimedOut` for a client that takes
    nothing for `progress` seconds, `ClientGone`, and whatever `body.run` raises.
    """
    sent = 0
    # trio sets 16 KiB for latency; a thread hop per 16 KiB would cost more than the copy
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, HOP)
    out = Duplicate(sock)
    try:
        while sent < body.length:
            count, stop = await body.run(
                partial(push, out, body, body.offset + sent, body.length - sent), what="send"
            )
            sent += count
            HTTP_SENT_BYTES.inc(count)
            if stop is Stop.FULL:
                await wait_room(sock, progress)
            elif stop is Stop.SHORT:
                raise SourceFailed(f"the file ended after {sent} of {body.length} bytes")
            elif stop is Stop.GONE:
                raise ClientGone("the client closed the connection")
    except BaseException:
        out.end()
        raise
    finally:
        out.close()


async def send_parts(sock: trio.socket.SocketType, body: PartedBody, *, progress: float) -> None:
    """Send the parts of a body in order, files as `send_file` does.

    A file that cannot be opened, or gives another length than was promised, raises: the header has
    promised what cannot be kept, so the connection must end before the body does.
    """
    for part in body.parts:
        if isinstance(part, bytes):
            await send_bytes(sock, part, progress=progress)
            HTTP_SENT_BYTES.inc(len(part))
            continue
        opened = await part.open()
        try:
            if opened.length != part.length:
                raise SourceFailed(f"{opened.length} bytes instead of the {part.length} promised")
            await send_file(sock, opened, progress=progress)
        finally:
            opened.close()


def push(out: Duplicate, body: FileBody, offset: int, remaining: int) -> tuple[int, Stop]:
    """In a thread: send until the socket is full, the file ends or `HOP` bytes are out."""
    sent = 0
    send: Callable[[int, int, int, int], int] = os.sendfile
    with out as sock, body.descriptor as fd:
        goal = min(remaining, HOP)
        end = time.monotonic() + _HOP_SECONDS
        while sent < goal and time.monotonic() < end:
            try:
                count = send(sock, fd, offset + sent, min(goal - sent, _PIECE))
            except BlockingIOError:
                return sent, Stop.FULL
            except OSError as exc:
                if exc.errno in _GONE:
                    return sent, Stop.GONE
                if exc.errno == errno.EINVAL and send is not _copy:
                    send = _copy  # a file system without splice
                    continue
                raise
            if count == 0:
                return sent, Stop.SHORT
            sent += count
    return sent, Stop.HOP


def _copy(sock: int, fd: int, offset: int, count: int) -> int:
    data = os.pread(fd, min(count, _COPY), offset)
    return os.write(sock, data) if data else 0


async def send_bytes(sock: trio.socket.SocketType, data: bytes, *, progress: float) -> None:
    """Send all of `data`; `TimedOut` for a client that takes nothing for `progress` seconds."""
    await trio.lowlevel.checkpoint()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(sock.fileno(), view) :]
        except BlockingIOError:
            await wait_room(sock, progress)
        except OSError as exc:
            raise ClientGone(f"the connection broke: {exc.strerror}") from exc


async def wait_room(sock: trio.socket.SocketType, progress: float) -> None:
    """Wait until the socket takes bytes; `TimedOut` when its queue stands still that long.

    A full socket counts as writable only when a third of its buffer is free, which takes a slow
    client longer than a deadline: what the kernel has not yet got rid of tells whether it moves.
    """
    queued = _unsent(sock)
    while True:
        with trio.move_on_after(progress):
            await trio.lowlevel.wait_writable(sock)
            return
        now = _unsent(sock)
        if now >= queued:
            raise TimedOut(f"the client took nothing for {progress:g} s")
        queued = now


def _unsent(sock: trio.socket.SocketType) -> int:
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])
