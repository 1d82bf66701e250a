"""Names that only this node gives: sector files that come into a storage path, and that leave it.

Both lie below ``<type>/fetching``, which every scan passes over, in files or directories named
``<sector>.<node>.in.tmp`` and ``<sector>.<node>.out.tmp``, and ``<sector>.<node>.gone.tmp`` for a
directory that was given up and is being deleted. The node's own id in the name is what lets it
clear what a crash left behind: another node that shares the path may be at work beside it.

Everything here blocks, and is reached through descriptors of directories that are none of them
symbolic links: nothing is ever made, renamed or deleted outside the storage path.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from sectorfs.errors import Refused
from sectorfs.stores.scan import opened_path
from sectorfs.types import FileType, SectorFile, StorageID, parse_sector

FETCHING = "fetching"
Way = Literal["in", "out", "gone"]

NO_LINKS = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
)
"""Errors of `os.link` where another way is open: other file system, directory, no links at all."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_NAME = re.compile(r"(s-t0[0-9]+-[0-9]+)\.([A-Za-z0-9_-]+)\.(?:in|out|gone)\.tmp", re.ASCII)


def own_name(file: SectorFile, owner: str, way: Way) -> str:
    """The name of a sector file that comes or leaves, below ``fetching``."""
    return f"{file.sector.name}.{owner}.{way}.tmp"


def file_of_own_name(file_type: FileType, name: str, owner: str) -> SectorFile | None:
    """The sector file that a name below ``fetching`` stands for; None for a name not ours."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] != owner:
        return None
    with suppress(ValueError):
        return SectorFile(file_type, parse_sector(match[1]))
    return None


@contextmanager
def opened_type(
    path: str, storage: StorageID, file_type: FileType, *, make: bool = False
) -> Iterator[int]:
    """A descriptor of a type directory of a storage path that proved its id.

    `Refused` where a symbolic link leads out of the path; `FileNotFoundError` for none.
    """
    with (
        opened_path(path, storage) as root,
        _opened(root, os.path.join(path, file_type.dir_name), make=make) as fd,
    ):
        yield fd


@contextmanager
def opened_fetching(
    type_fd: int, path: str, file_type: FileType, *, make: bool = False
) -> Iterator[int]:
    """A descriptor of a type's ``fetching`` directory; errors as `opened_type`."""
    with _opened(type_fd, os.path.join(path, file_type.dir_name, FETCHING), make=make) as fd:
        yield fd


@contextmanager
def _opened(parent: int, where: str, *, make: bool) -> Iterator[int]:
    name = os.path.basename(where)
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=parent)
            os.fsync(parent)
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(name, parent):
            raise Refused("a symbolic link leads out of the storage path", where) from exc
        raise
    try:
        yield fd
    finally:
        os.close(fd)


def _is_link(name: str, parent: int) -> bool:
    try:
        os.readlink(name, dir_fd=parent)
    except OSError:
        return False
    return True


def delete(name: str, dir_fd: int) -> None:
    """Delete a file, a link itself, or a directory with what is in it; none there is fine."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    except OSError as exc:
        if exc.errno not in (errno.EISDIR, errno.EPERM):
            raise
        shutil.rmtree(name, dir_fd=dir_fd)


def rename_new(source: str, target: str, *, source_fd: int, target_fd: int) -> None:
    """Rename something to a name that is free; `FileExistsError` when it is not.

    A rename would replace a file that came there after any look: a link never does.
    """
    try:
        os.link(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd, follow_symlinks=False)
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise
    else:
        os.unlink(source, dir_fd=source_fd)
        return
    # A directory, which replaces nothing but an empty one, or a file system without links.
    if exists(target, target_fd):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
    os.rename(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)


def exists(name: str, dir_fd: int) -> bool:
    """Whether there is anything under a name, be it a link to nothing."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def leftovers(path: str, storage: StorageID, owner: str) -> list[tuple[SectorFile, str]]:
    """What this node left unfinished in a storage path: sector file, and name below fetching."""
    found = []
    for file_type in FileType:
        with (
            suppress(FileNotFoundError, Refused),
            opened_type(path, storage, file_type) as type_fd,
            opened_fetching(type_fd, path, file_type) as fd,
        ):
            for name in os.listdir(fd):
                file = file_of_own_name(file_type, name, owner)
                if file is not None:
                    found.append((file, name))
    return found


def delete_own(path: str, storage: StorageID, file: SectorFile, name: str) -> None:
    """Delete something below ``fetching``."""
    with (
        suppress(FileNotFoundError),
        opened_type(path, storage, file.file_type) as type_fd,
        opened_fetching(type_fd, path, file.file_type) as fd,
    ):
        delete(name, fd)
