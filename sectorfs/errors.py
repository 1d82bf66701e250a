"""One family of errors. Each leaf knows how every face of the program shows it.

* ``errno``: what a reader of the mount gets; * ``status``: HTTP; * ``rpc_code``: JSON-RPC;
* ``exit_code``: the command line; * ``retry``: whether the same call may succeed a little later.

A message is three parts: what failed, on which thing, and what to do about it. Foreign exceptions
are translated in the module that made the call, with ``from exc``.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class SectorFSError(Exception):
    """Base of every deliberate error."""

    errno: ClassVar[int] = _errno.EIO
    status: ClassVar[int] = 500
    rpc_code: ClassVar[int] = 1
    exit_code: ClassVar[int] = 1
    retry: ClassVar[bool] = False

    def __init__(self, what: str, thing: object = "", hint: str = "") -> None:
        super().__init__(what, thing, hint)
        self.what = what
        """What failed, for example ``not found``."""
        self.thing = str(thing)
        """The sector, path, storage, URL or key it failed on."""
        self.hint = hint
        """What the reader of the message can do."""

    def __str__(self) -> str:
        text = f"{self.thing}: {self.what}" if self.thing else self.what
        return f"{text} ({self.hint})" if self.hint else text


class BadInput(SectorFSError):
    """Something from outside does not parse or makes no sense."""

    errno = _errno.EINVAL
    status = 400
    exit_code = 2


class BadRange(BadInput):
    """A byte range that the file cannot satisfy."""

    status = 416


class BadConfig(BadInput):
    """A setting that cannot be used: an unknown key, a wrong type, two settings that clash."""


class TooLarge(BadInput):
    """A header, body or reply beyond its limit."""

    status = 413


class NotFound(SectorFSError):
    """A sector, storage or path nobody knows."""

    errno = _errno.ENOENT
    status = 404
    exit_code = 3


class Refused(SectorFSError):
    """Not in this state: the thing exists, is taken, or is not initialised."""

    errno = _errno.EBUSY
    status = 409
    exit_code = 4


class Locked(Refused):
    """Somebody else holds a lock that excludes this."""

    retry = True


class LeaseLost(Refused):
    """A lock ended under its holder: others may have changed what it protected."""


class Unsupported(SectorFSError):
    """A request that is understood and not offered."""

    errno = _errno.EOPNOTSUPP
    status = 501
    exit_code = 2


class NoRanges(Unsupported):
    """A source that gives files whole only."""


class Unauthorized(SectorFSError):
    """No token, or one that does not verify."""

    errno = _errno.EACCES
    status = 401
    exit_code = 6


class Forbidden(SectorFSError):
    """A valid token without the permission."""

    errno = _errno.EACCES
    status = 403
    exit_code = 6


class PermissionRefused(SectorFSError):
    """The operating system refused: owner, mode, capability."""

    errno = _errno.EACCES
    status = 403
    exit_code = 6


class Unreachable(SectorFSError):
    """A peer or the Index did not answer, or not in its protocol."""

    status = 502
    exit_code = 5
    retry = True


class TimedOut(Unreachable):
    """A deadline of ``[timeouts]`` passed."""

    status = 504


class StorageUnavailable(SectorFSError):
    """A storage path whose UUID file is gone or whose disk does not answer."""

    status = 503
    retry = True


class DiskError(SectorFSError):
    """The operating system failed a disk operation (EIO and its kin)."""


class DiskFull(DiskError):
    """No room; readers see EIO, because ENOSPC makes no sense to a read."""

    status = 507


class SourceFailed(SectorFSError):
    """One source of a sector file could not give its bytes; the next may."""

    status = 502
    retry = True


class WrongBytes(SourceFailed):
    """A source gave bytes, or hashes, that are not those of the content that it should give."""


class NoSource(SectorFSError):
    """Every source of a sector file failed, or there is none."""

    status = 502

    def __init__(self, what: str, thing: object = "", causes: Sequence[BaseException] = ()) -> None:
        hint = "; ".join(str(cause) for cause in causes)
        super().__init__(what, thing, hint)
        self.causes = tuple(causes)
        """Why each source failed, in the order they were tried."""


class NoProof(NoSource):
    """Nobody has the manifest that would prove a part of a file; the whole of it may still be."""

    def __init__(
        self, what: str, thing: object = "", failed: Mapping[Any, SectorFSError] | None = None
    ) -> None:
        super().__init__(what, thing, tuple((failed or {}).values()))
        self.failed = dict(failed or {})
        """Why by source."""


class Stale(SectorFSError):
    """The content changed under an open file."""

    errno = _errno.ESTALE
    status = 409


class Interrupted(SectorFSError):
    """A request of a process that was killed or interrupted meanwhile."""

    errno = _errno.EINTR
    status = 503
    retry = True


class NameTooLong(BadInput):
    """A file name beyond 255 bytes."""

    errno = _errno.ENAMETOOLONG


class ReadOnly(Refused):
    """A change asked of the mount, which offers none."""

    errno = _errno.EROFS


class NoAttribute(NotFound):
    """An extended attribute that this file does not have."""

    errno = _errno.ENODATA


class MountFailed(SectorFSError):
    """The kernel refused the mount."""

    exit_code = 32


def from_os(exc: OSError, what: str, thing: object) -> SectorFSError:
    """The error of the family that an `OSError` means; raise it ``from exc``."""
    text = f"{what}: {exc.strerror or exc}"
    if exc.errno in (_errno.ENOENT, _errno.ENOTDIR):
        return NotFound(text, thing)
    if exc.errno in (_errno.EACCES, _errno.EPERM, _errno.EROFS):
        return PermissionRefused(text, thing, "check owner, mode and mount options")
    if exc.errno in (_errno.ENOSPC, _errno.EDQUOT):
        return DiskFull(text, thing, "make room")
    return DiskError(text, thing, "check the disk and the kernel log")
