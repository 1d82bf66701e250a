"""What a killed process still holds while one of its threads hangs in the kernel: its port.

A process killed while a thread waits for a disk that does not answer stays a zombie until the disk
goes on, and so do its sockets: a node started again could not listen where it did before. The
descriptors are reached through the thread that hangs (Linux 6.9 and the right to trace it, as root
has), and shut down: the process is dead, nobody will ever answer there.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_PROC = Path("/proc")
_PIDFD_THREAD = os.O_EXCL
_SYS_PIDFD_GETFD = 438
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def release_port(port: int) -> int | None:
    """Shut down the sockets that killed processes hold on a local port.

    Returns the id of such a process; None when none was found, or none may be touched.
    """
    found = None
    for pid, thread in _hanging_threads():
        for sock in _sockets(pid, thread):
            with sock, suppress(OSError):  # one that has no local name, or just ended
                if sock.family in _FAMILIES and sock.getsockname()[1] == port:
                    sock.shutdown(socket.SHUT_RDWR)
                    found = pid
    if found is not None:
        log.warning(
            "port %d was held by the killed process %d, a thread of which hangs", port, found
        )
    return found


def _hanging_threads() -> Iterator[tuple[int, int]]:
    """Process and thread ids where the process is dead and the thread is not."""
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and _state(folder / "stat") == "Z":
            pid = int(folder.name)
            with suppress(OSError):
                for task in (folder / "task").iterdir():
                    if int(task.name) != pid and _state(task / "stat") not in ("", "Z", "X"):
                        yield pid, int(task.name)


def _state(file: Path) -> str:
    try:
        return file.read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _sockets(pid: int, thread: int) -> Iterator[socket.socket]:
    """Our own descriptors of the sockets a thread has open."""
    try:
        handle = os.pidfd_open(thread, _PIDFD_THREAD)
    except OSError as exc:
        log.debug("thread %d of process %d cannot be reached: %s", thread, pid, exc)
        return
    try:
        for entry in (_PROC / str(pid) / "task" / str(thread) / "fd").iterdir():
            fd = _take(handle, int(entry.name)) if _is_socket(entry) else None
            if fd is not None:
                yield socket.socket(fileno=fd)
    except OSError as exc:
        log.debug("descriptors of process %d cannot be read: %s", pid, exc)
    finally:
        os.close(handle)


def _is_socket(entry: Path) -> bool:
    # By the link's text: to look at what it leads to would hang on the disk that hangs.
    try:
        return os.readlink(entry).startswith("socket:")
    except OSError:
        return False


def _take(handle: int, number: int) -> int | None:
    """Duplicate a descriptor of another process; None when that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(_SYS_PIDFD_GETFD, handle, number, 0))
    if fd < 0:
        log.debug("descriptor %d: %s", number, errno.errorcode.get(ctypes.get_errno()))
        return None
    return fd
