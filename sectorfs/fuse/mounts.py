"""Mount points as the kernel lists them, and getting rid of dead ones.

Everything is read from ``/proc/self/mountinfo``. Nothing here calls `stat` on a mount point, nor
lets anything else do so: while a dead daemon's last thread hangs in the kernel its connection stays
open, and whoever touches the mount waits for good. Writing to the connection's ``abort`` ends that.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from sectorfs.errors import MountFailed, PermissionRefused, Refused, TimedOut, from_os

log = logging.getLogger(__name__)

NAME = "sectorfs"
FUSECTL = Path("/sys/fs/fuse/connections")
MOUNTINFO = Path("/proc/self/mountinfo")

MAX_BACKGROUND = 2048
"""Reads the kernel keeps in flight. Its own 12 were filled by 30 readers of one hung disk."""
READ_AHEAD_KB = 1024
"""The kernel's own 128 KiB cost a third of the sequential rate."""

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_LINKS = 40


class MountInfo(msgspec.Struct, frozen=True):
    """One line of ``mountinfo``."""

    mount_id: int
    major: int
    minor: int
    """Also the name of a FUSE connection in fusectl."""
    path: str
    fstype: str
    source: str

    @property
    def is_fuse(self) -> bool:
        """True for every FUSE mount, whoever made it."""
        return self.fstype in ("fuse", "fuseblk") or self.fstype.startswith("fuse.")

    @property
    def is_ours(self) -> bool:
        """True for a mount that some sectorfs made."""
        return self.fstype == f"fuse.{NAME}" or (self.is_fuse and self.source.split(":")[0] == NAME)


def parse_mountinfo(data: bytes) -> list[MountInfo]:
    """The mounts in the kernel's order: of two on one path the later one is seen."""
    return [_parse_line(line) for line in data.splitlines() if line.strip()]


def canonical(path: str | os.PathLike[str]) -> str:
    """The absolute path without links, as ``mountinfo`` spells it; never looks at the path itself.

    `os.path.realpath` would `lstat` the mount point. Reading it as a link is safe: the kernel
    answers from the mount's cached root.
    """
    text = os.path.abspath(os.fspath(path))
    for _ in range(_LINKS):
        above, name = os.path.split(text)
        if not name:
            return text
        text = os.path.join(os.path.realpath(above), name)
        try:
            target = os.readlink(text)
        except OSError:
            return text
        text = os.path.abspath(os.path.join(os.path.dirname(text), target))
    raise MountFailed("too many symbolic links", path, "give the directory itself")


def find_mount(path: str | os.PathLike[str]) -> MountInfo | None:
    """The mount one sees at exactly this path; None when it is no mount point."""
    wanted = canonical(path)
    at_path = [mount for mount in parse_mountinfo(MOUNTINFO.read_bytes()) if mount.path == wanted]
    return at_path[-1] if at_path else None


def connection(minor: int) -> Path | None:
    """The fusectl directory of a connection, mounting fusectl when that is possible."""
    directory = FUSECTL / str(minor)
    if not directory.is_dir() and os.geteuid() == 0 and FUSECTL.is_dir():
        _mount_fusectl()
    return directory if directory.is_dir() else None


def abort(minor: int) -> None:
    """End a FUSE connection: every request waiting in it, and every later one, fails.

    A connection that is gone already is fine.
    """
    directory = connection(minor)
    if directory is None:
        return
    try:
        (directory / "abort").write_text("1")
    except FileNotFoundError:
        return
    except OSError as exc:
        raise from_os(exc, "cannot abort the connection", directory) from exc


def detach(path: str | os.PathLike[str]) -> None:
    """Take the mount at this path out of the tree, busy or not; none there is fine."""
    text = canonical(path)
    code = _libc_call("umount2", os.fsencode(text), _MNT_DETACH | _UMOUNT_NOFOLLOW)
    if code in (0, errno.EINVAL, errno.ENOENT):
        return
    if code != errno.EPERM:
        raise from_os(OSError(code, os.strerror(code)), "cannot unmount", text)
    _detach_with_helper(text)


def clear_dead_mount(path: str | os.PathLike[str], is_alive: Callable[[MountInfo], bool]) -> bool:
    """Remove mounts of ours at this path whose daemon is gone; True when there was one.

    `Refused` for a mount that is not ours, or whose daemon `is_alive`.
    """
    cleared = False
    while (mount := find_mount(path)) is not None:
        if not mount.is_ours:
            raise Refused(
                f"something else is mounted here ({mount.fstype})", path, "choose another directory"
            )
        if is_alive(mount):
            raise Refused("mounted already", path, f"run: sectorfs umount {os.fspath(path)}")
        log.info("%s: removing a mount whose daemon is gone", path)
        abort(mount.minor)
        detach(path)
        if find_mount(path) == mount:
            raise Refused("cannot be unmounted", path, f"run: umount -l {os.fspath(path)}")
        cleared = True
    return cleared


def check_mountpoint(path: str) -> None:
    """Say why a mount would fail, in words that libfuse prints to stderr only."""
    mount = find_mount(path)
    if mount is not None and mount.is_fuse:
        raise MountFailed("mounted already", path, f"run: sectorfs umount {path}")
    try:
        status = os.stat(path)
    except OSError as exc:
        raise MountFailed(exc.strerror or str(exc), path, "create the directory") from exc
    if not stat.S_ISDIR(status.st_mode):
        raise MountFailed("not a directory", path, "give an existing directory")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        hint = "load the module: modprobe fuse; in a container pass --device /dev/fuse"
        raise MountFailed(f"/dev/fuse: {exc.strerror}", path, hint) from exc


def tune(mount: MountInfo, *, bounds: bool) -> None:
    """Raise the kernel's read-ahead, and its `bounds` unless its introduction did, if permitted."""
    wanted = [(Path(f"/sys/class/bdi/{mount.major}:{mount.minor}/read_ahead_kb"), READ_AHEAD_KB)]
    if bounds:
        directory = connection(mount.minor) or FUSECTL / str(mount.minor)
        wanted.append((directory / "max_background", MAX_BACKGROUND))
        wanted.append((directory / "congestion_threshold", MAX_BACKGROUND * 3 // 4))
    refused = [str(path) for path, number in wanted if not _write(path, number)]
    if refused:
        log.warning(
            "%s: cannot set %s; %s (run as root)",
            mount.path,
            ", ".join(refused),
            "many readers of one slow disk may stall the others" if bounds else "reads are slower",
        )


async def wait_mounted(path: str | os.PathLike[str], *, patience: float) -> MountInfo:
    """The mount of ours at this path, once it is there; `TimedOut` after `patience` seconds."""
    with trio.move_on_after(patience):
        while True:
            mount = find_mount(path)
            if mount is not None and mount.is_ours:
                return mount
            await trio.sleep(0.02)
    raise TimedOut(f"not mounted within {patience:g} s", path, "see the daemon's log")


def _parse_line(line: bytes) -> MountInfo:
    fields = line.split(b" ")
    separator = fields.index(b"-", 6)
    major, minor = fields[2].split(b":")
    return MountInfo(
        mount_id=int(fields[0]),
        major=int(major),
        minor=int(minor),
        path=_unescape(fields[4]),
        fstype=_unescape(fields[separator + 1]),
        source=_unescape(fields[separator + 2]),
    )


def _unescape(field: bytes) -> str:
    """Undo the kernel's octal escapes of space, tab, newline and backslash."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def _write(path: Path, number: int) -> bool:
    try:
        path.write_text(str(number))
    except OSError:
        return False
    return True


def _mount_fusectl() -> None:
    code = _libc_call(
        "mount", b"fusectl", os.fsencode(FUSECTL), b"fusectl", ctypes.c_ulong(0), None
    )
    if code not in (0, errno.EBUSY):
        log.warning("%s cannot be mounted: %s", FUSECTL, os.strerror(code))


def _libc_call(name: str, *arguments: object) -> int:
    """Call a function of the C library; returns 0 or its errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if getattr(libc, name)(*arguments) == 0 else ctypes.get_errno()


def _detach_with_helper(path: str) -> None:
    command = ["fusermount3", "-u", "-z", "--", path]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise PermissionRefused(f"cannot unmount: {exc}", path, "install fuse3") from exc
    if done.returncode != 0 and find_mount(path) is not None:
        reason = done.stderr.decode(errors="replace").strip()
        raise PermissionRefused(f"cannot unmount: {reason}", path, "unmount it as its owner")
