"""What pyfuse3 leaves out of the FUSE protocol: passthrough, interrupts, cached listings, limits.

The C module `_kernel` stands between libfuse and the kernel and does it. It is optional: without it
(not built, a libfuse before 3.14, or SECTORFS_NO_EXTENSION set) everything here answers "no", and
the mount works by the daemon's own path.

The linker has to find it before libfuse, so this module must be imported before pyfuse3.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from sectorfs.fuse import mounts

log = logging.getLogger(__name__)

WITHOUT = "SECTORFS_NO_EXTENSION"
"""Environment variable that leaves the extension out, to see how it is without."""


class Offer(msgspec.Struct, frozen=True):
    """What the kernel, the daemon's privileges and the extension allow together."""

    passthrough: bool
    """Files may be read past the daemon."""
    interrupts: bool
    """Requests of killed and interrupted processes are given up."""
    cached_directories: bool
    """The kernel may keep listings."""
    reason: str
    """Why not all of it; empty when it is."""


class Use(msgspec.Struct, frozen=True):
    """What became of a remembered file."""

    open: int
    """Opens answered here that were not released yet."""
    opens: int
    """Opens answered here ever."""
    idle: float
    """Seconds since the last of them, or since it was remembered."""


def _load() -> ModuleType | None:
    if os.environ.get(WITHOUT) or "pyfuse3" in sys.modules:
        return None
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        from sectorfs.fuse import _kernel
    except ImportError as exc:
        log.debug("without the extension: %s", exc)
        return None
    finally:
        sys.setdlopenflags(before)
    return _kernel


if TYPE_CHECKING:
    from sectorfs.fuse import _kernel
else:
    _kernel = _load()

_LOADED = _kernel is not None


def prepare() -> bool:
    """Set what the next mount asks of the kernel; False without the extension."""
    if not _LOADED:
        return False
    _kernel.limit(mounts.MAX_BACKGROUND)
    return True


def attached() -> bool:
    """True while the extension stands between a mount and the kernel."""
    return _LOADED and _kernel.facts()[0] != 0


def offer() -> Offer:
    """What this mount may use, known once the kernel has introduced itself."""
    if not _LOADED:
        return Offer(False, False, False, "the extension was not loaded")
    return _judge(_kernel.facts())


def open_backing(fd: int) -> int:
    """A backing id for an open file; `OSError` as the kernel says (EPERM, ELOOP, ENODEV)."""
    if not _LOADED:
        raise _not_here()
    return _kernel.open_backing(fd)


def close_backing(backing_id: int) -> None:
    """Give a backing id back. Handles opened with it go on."""
    if not _LOADED:
        raise _not_here()
    _kernel.close_backing(backing_id)


def mark_open(fh: int, *, backing_id: int = 0, cache_directory: bool = False) -> None:
    """Say how the reply to the open that answers `fh` is to be marked; the reply consumes it."""
    if _LOADED:
        _kernel.mark_open(fh, backing_id, cache_directory)


def remember(inode: int, fh: int, fd: int, *, backing_id: int = 0) -> bool:
    """Have plain opens of an inode answered with `fh`, and its cached bytes, without Python.

    As long as the file behind `fd` keeps its size, times and links; else they come to Python. `fd`
    must stay open until `forget`, and be on a local file system. `fh` may be open already: it has
    as many releases as opens, and the last ones come to Python. False when the inode is remembered
    already, or nothing can be.
    """
    return _LOADED and _kernel.remember(inode, fh, fd, backing_id)


def forget(inode: int) -> int:
    """Answer no more opens of an inode; so many releases of its handle will come to Python."""
    return _kernel.forget(inode) if _LOADED else 0


def use(inode: int) -> Use | None:
    """What became of a remembered inode; None when it is not."""
    found = _kernel.use(inode) if _LOADED else None
    return Use(*found) if found else None


def opens() -> int:
    """Opens of this mount answered without Python."""
    return _kernel.opens() if _LOADED else 0


def reads() -> int:
    """Reads of this mount answered without Python."""
    return 0 if _kernel is None else _kernel.reads()


def current() -> tuple[int, int, bool]:
    """Number, process and "a buffered read" of the request whose handler begins now.

    The number is 0 when it is not known.
    """
    return _kernel.current() if _LOADED else (0, 0, False)


def interrupts_fd() -> int:
    """A descriptor that is readable while `interrupted` has something to tell; -1 without."""
    return _kernel.interrupts_fd() if _LOADED else -1


def interrupted() -> list[tuple[int, int, bool]]:
    """Number, process and "a buffered read" of each request interrupted since the last call."""
    return _kernel.interrupted() if _LOADED else []


def judge(facts: tuple[int, bool, bool, bool], try_backing: Callable[[], str]) -> Offer:
    """What follows from the number of the session, whether the kernel introduced itself, offers
    passthrough and grants it, and from why it refuses a backing file."""
    session, introduced, offered, granted = facts
    if not session:
        return Offer(False, False, False, "no mount, or libfuse is older than 3.14")
    if not introduced:
        reason = "the kernel has not introduced itself"
    elif not offered:
        reason = "passthrough needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH"
    elif not granted:
        reason = "no passthrough with a writeback cache"
    else:
        reason = try_backing()
    return Offer(not reason, True, True, reason)


@functools.lru_cache(maxsize=1)
def _judge(facts: tuple[int, bool, bool, bool]) -> Offer:
    return judge(facts, _try_backing)


def _try_backing() -> str:
    """Why the kernel refuses a backing file to this process; empty when it does not."""
    fd = os.memfd_create("sectorfs", os.MFD_CLOEXEC)
    try:
        close_backing(open_backing(fd))
    except OSError as exc:
        hint = " (it takes CAP_SYS_ADMIN)" if isinstance(exc, PermissionError) else ""
        return f"passthrough: {exc.strerror}{hint}"
    finally:
        os.close(fd)
    return ""


def _not_here() -> OSError:
    return OSError(errno.ENOSYS, "not without the extension")
