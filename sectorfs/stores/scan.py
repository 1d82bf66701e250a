"""What lies in the type directories of a storage path. Synchronous: callers run it in a `Lane`.

Names are strict; everything else is *odd*: left alone, told about once. Three answers must never
be confused, because a declaration is dropped on one of them only: an entry is *not there* (None),
it is there and *odd*, or the disk cannot say (odd and `unreadable`). For the same reason every call
opens the path first, proves its ``sectorstore.json`` through that descriptor, and looks through it:
a disk that is unmounted at any moment cannot pass an empty mount point off as a path without files.
"""

from __future__ import annotations

import os
import stat
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from sectorfs.errors import BadInput, DiskError, NotFound, StorageUnavailable, from_os
from sectorfs.stores.members import MAX_MEMBERS, member_stat
from sectorfs.stores.metadata import METADATA_NAME, read_metadata
from sectorfs.types import (
    Facts,
    FileType,
    MemberFacts,
    SectorFile,
    SectorID,
    StorageID,
    parse_sector,
)

STEP_ENTRIES = 5000
"""Names read between two yields of `Names.steps`."""
MAX_ODD = 1000
"""Odd names remembered of one directory."""
LOOK_BUDGET = 1.0
"""Seconds after which `look_many` answers with what it has: far below any disk deadline."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_QUIET_NAMES = frozenset({"fetching", "stash"})


class PathLost(StorageUnavailable):
    """The directory is not the storage path it was: unmounted, emptied, replaced."""


class Odd(msgspec.Struct, frozen=True):
    """Why an entry is no sector file."""

    reason: str
    unreadable: bool = False
    """The operating system failed, or a link leads nowhere: the file may well be there."""


Identity = tuple[int, int]
"""Device and inode of a directory."""

Look = Facts | Odd | None
"""What one look at a sector file found; None when it is not there."""


@contextmanager
def opened_path(path: str, storage: StorageID) -> Iterator[int]:
    """A descriptor of a storage path, proved to be that of `storage`."""
    try:
        fd = os.open(path, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise PathLost("the directory is gone", path, "is its disk mounted?") from exc
    except OSError as exc:
        raise from_os(exc, "cannot be opened", path) from exc
    try:
        check_identity(path, storage, dir_fd=fd)
        yield fd
    finally:
        os.close(fd)


def check_identity(path: str, storage: StorageID, *, dir_fd: int | None = None) -> None:
    """`PathLost` unless the ``sectorstore.json`` of `path` names `storage`."""
    try:
        found = read_metadata(path, dir_fd=dir_fd).info.storage
    except NotFound as exc:
        raise path_lost(path) from exc
    except BadInput as exc:
        raise PathLost(f"{METADATA_NAME} is malformed", path, str(exc)) from exc
    if found != storage:
        raise other_storage(path, found, storage)


def path_lost(path: str) -> PathLost:
    """The error for a path without its ``sectorstore.json``."""
    return PathLost(f"{METADATA_NAME} is gone", path, "is its disk mounted?")


def other_storage(path: str, found: StorageID, storage: StorageID) -> PathLost:
    """The error for a path that turned into another storage."""
    hint = "detach it, then attach it again"
    return PathLost(f"holds storage {found} instead of {storage}", path, hint)


@contextmanager
def _opened_type(root_fd: int, path: str, file_type: FileType) -> Iterator[int | None]:
    """A descriptor of a type directory, None when there is none; unreadable raises."""
    name = file_type.dir_name
    where = os.path.join(path, name)
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=root_fd)
    except FileNotFoundError as exc:
        if _is_there(name, root_fd):
            raise DiskError("is a link to nothing", where, "is its disk mounted?") from exc
        yield None
        return
    except OSError as exc:
        raise _unreadable(exc, where) from exc
    try:
        yield fd
    finally:
        os.close(fd)


def _unreadable(exc: OSError, where: str) -> DiskError:
    # Not `from_os`: its NotFound for ENOTDIR would read like an empty directory.
    return DiskError(f"cannot be read: {exc.strerror or exc}", where, "check the disk")


def _is_there(name: str, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def empty_type(path: str, storage: StorageID, file_type: FileType) -> Identity | None:
    """Identity of a type directory without any entry; None for one with entries, or none."""
    with opened_path(path, storage) as root, _opened_type(root, path, file_type) as fd:
        if fd is None:
            return None
        with os.scandir(fd) as entries:
            if next(entries, None) is not None:
                return None
        found = os.fstat(fd)
        return found.st_dev, found.st_ino


class Names:
    """The sectors named in one type directory, 16 bytes each, and its odd entries."""

    def __init__(self, file_type: FileType) -> None:
        self.file_type = file_type
        self.odd: list[tuple[str, str]] = []
        """Names that are none, with the reason; the first `MAX_ODD`."""
        self.odd_count = 0
        self.seen = 0
        """Entries read so far."""
        self.mtime_ns = 0
        """Of the directory before the first entry was read; 0 when there is no directory."""
        self.identity: Identity | None = None
        """Of the directory; None when there is none."""
        self._keys = _Keys()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, name: str) -> None:
        """Take one entry of the directory."""
        self.seen += 1
        if name in _QUIET_NAMES or name.endswith(".tmp"):
            return
        try:
            self._keys.add(parse_sector(name))
        except ValueError:
            self.add_odd(name, "not a sector name")

    def add_odd(self, name: str, reason: str) -> None:
        """Note an entry that is no sector file."""
        self.odd_count += 1
        if len(self.odd) < MAX_ODD:
            self.odd.append((name, reason))

    def steps(self, path: str, storage: StorageID) -> Iterator[int]:
        """Read the directory, yielding `seen` now and then.

        Raises when the directory cannot be read to its end, and when the path is another one, or
        none, before or after: the names are then worth nothing.
        """
        where = os.path.join(path, self.file_type.dir_name)
        with opened_path(path, storage) as root, _opened_type(root, path, self.file_type) as fd:
            if fd is not None:
                try:
                    found = os.fstat(fd)
                    self.mtime_ns = found.st_mtime_ns
                    self.identity = (found.st_dev, found.st_ino)
                    with os.scandir(fd) as entries:
                        for entry in entries:
                            self.add(entry.name)
                            if self.seen % STEP_ENTRIES == 0:
                                yield self.seen
                except OSError as exc:
                    raise _unreadable(exc, where) from exc
        check_identity(path, storage)
        self._keys.sort()
        yield self.seen

    def chunks(self, size: int) -> Iterator[list[SectorFile]]:
        """The sector files in ascending order, `size` at a time; call after the last step."""
        for start in range(0, len(self._keys), size):
            yield [SectorFile(self.file_type, sector) for sector in self._keys.slice(start, size)]


class _Keys:
    """Many sectors in little memory: a million cost 16 MB, where objects cost 120."""

    def __init__(self) -> None:
        self._miners = array("q")
        self._numbers = array("q")

    def __len__(self) -> int:
        return len(self._miners)

    def add(self, sector: SectorID) -> None:
        self._miners.append(sector.miner)
        self._numbers.append(sector.number)

    def sort(self) -> None:
        keys = zip(self._miners, self._numbers, strict=True)
        packed = sorted((miner << 63) | number for miner, number in keys)
        mask = (1 << 63) - 1
        self._miners = array("q", (key >> 63 for key in packed))
        self._numbers = array("q", (key & mask for key in packed))

    def slice(self, start: int, size: int) -> Iterator[SectorID]:
        for index in range(start, min(start + size, len(self._miners))):
            yield SectorID(self._miners[index], self._numbers[index])


def look_many(
    path: str,
    storage: StorageID,
    files: Sequence[SectorFile],
    *,
    arm: Callable[[SectorFile, str], object] | None = None,
    budget: float = LOOK_BUDGET,
) -> list[Look]:
    """Look at the first of `files` (all of one type): at least one, as many as fit the budget.

    `arm` is called with the name of each sector directory before it is looked at, so that a change
    is either in the look or seen by the watch.
    """
    file_type = files[0].file_type
    until = time.monotonic() + budget
    looks: list[Look] = []
    with opened_path(path, storage) as root, _opened_type(root, path, file_type) as fd:
        if fd is None:
            return [None] * len(files)
        for file in files:
            if arm is not None and file_type.is_directory:
                arm(file, os.path.join(path, file_type.dir_name, file.sector.name))
            looks.append(_look(fd, file))
            if time.monotonic() >= until:
                break
    return looks


def file_facts(path: str, storage: StorageID, file: SectorFile) -> Facts:
    """The facts of one sector file now; `NotFound`, or `DiskError` when the disk cannot say."""
    look = look_many(path, storage, [file])[0]
    if isinstance(look, Facts):
        return look
    where = os.path.join(path, str(file))
    if look is None:
        raise NotFound("no such sector file", where)
    if look.unreadable:
        raise DiskError(look.reason, where, "check the disk")
    raise NotFound(look.reason, where)


def _look(type_fd: int, file: SectorFile) -> Look:
    name = file.sector.name
    try:
        if file.file_type.is_directory:
            return _look_directory(type_fd, name)
        found = os.stat(name, dir_fd=type_fd)
    except FileNotFoundError:
        return _absent(type_fd, name)
    except OSError as exc:
        return Odd(f"cannot be read: {exc.strerror or exc}", unreadable=True)
    if not stat.S_ISREG(found.st_mode):
        return Odd(f"is {_kind(found.st_mode)}, not a file")
    return Facts(found.st_size, found.st_mtime_ns)


def _absent(type_fd: int, name: str) -> Odd | None:
    try:
        return Odd("is a link to nothing", unreadable=True) if _is_there(name, type_fd) else None
    except OSError as exc:
        return Odd(f"cannot be read: {exc.strerror or exc}", unreadable=True)


def _look_directory(type_fd: int, name: str) -> Facts | Odd:
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=type_fd)
    except NotADirectoryError:
        return Odd("is not a directory")
    members: list[MemberFacts] = []
    try:
        mtime_ns = os.fstat(fd).st_mtime_ns
        with os.scandir(fd) as entries:
            for entry in entries:
                found = member_stat(entry)  # what is unreadable raises for the whole
                if found is not None:
                    members.append(MemberFacts(entry.name, found.st_size, found.st_mtime_ns))
                if len(members) > MAX_MEMBERS:
                    return Odd(f"has more than {MAX_MEMBERS} files")
    finally:
        os.close(fd)
    members.sort()
    return Facts(sum(member.size for member in members), mtime_ns, tuple(members))


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a special file"
