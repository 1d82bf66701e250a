"""Changes of storage paths, told by the kernel.

One inotify instance watches each path, its type directories, and the sector directories that
changed last. Events carry names, so that a new file costs a look at that file. They are hints: what
is lost (overflow, watches run out, a network file system) is found by looks and scans.

`arm_path` and `arm_sector` walk file systems, which may hang: they run in the path's lane, and only
make the system call. What a new watch means is noted by `adopt`, on the loop; events that arrive in
between are kept and replayed.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Callable

import msgspec
import trio
from inotify_simple import INotify, flags, parse_events

from sectorfs.stores.metadata import METADATA_NAME
from sectorfs.types import FileType, SectorFile, StorageID, parse_file_type, parse_sector

log = logging.getLogger(__name__)

SECTOR_WATCHES = 2048
"""Sector directories watched at a time, the last ones to change; the kernel's limit is shared."""
EARLY_EVENTS = 4096
"""Events kept of watches that are not adopted yet."""
READ_BYTES = 1 << 16
"""Bytes of events taken at a time: a few milliseconds of the loop."""

_CHANGES = flags.CREATE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.CLOSE_WRITE
_MASK = _CHANGES | flags.ATTRIB | flags.ONLYDIR | flags.EXCL_UNLINK
_PATH_MASK = _CHANGES | flags.ONLYDIR | flags.DELETE_SELF | flags.MOVE_SELF
_GONE = flags.UNMOUNT | flags.DELETE_SELF | flags.MOVE_SELF

# Elsewhere (NFS, FUSE, …) others change files and the kernel here hears nothing of it.
_LOCAL_FILE_SYSTEMS = frozenset(
    {
        *("bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "ntfs3"),
        *("overlay", "ramfs", "reiserfs", "tmpfs", "vfat", "xfs", "zfs"),
    }
)


class Listener(msgspec.Struct, frozen=True):
    """Whom a `Watcher` tells; all called on the loop, none may block."""

    file: Callable[[StorageID, SectorFile], object]
    """A sector file appeared, changed or vanished."""
    type_directory: Callable[[StorageID, FileType], object]
    """A type directory appeared, vanished or was replaced."""
    path: Callable[[StorageID], object]
    """The path was unmounted or moved, or its ``sectorstore.json`` changed."""
    lost: Callable[[], object]
    """Events were lost."""


class _Watched(msgspec.Struct, frozen=True):
    storage: StorageID
    file_type: FileType | None = None
    file: SectorFile | None = None


class Armed(msgspec.Struct):
    """Watches made in a thread, for `adopt`."""

    storage: StorageID
    watches: list[tuple[int, FileType | None, SectorFile | None]] = []
    complete: dict[FileType, bool] = {}
    """Type directories watched; True on a file system whose every change is made here."""


class Watcher:
    """The inotify instance of a node."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._watches: dict[int, _Watched] = {}
        self._sectors: OrderedDict[int, None] = OrderedDict()
        self._early: dict[int, list[tuple[int, str]]] = {}
        self._early_count = 0
        self._refused = False
        try:
            self._inotify: INotify | None = INotify(nonblocking=True)
        except OSError as exc:
            self._inotify = None
            self._refuse(exc)

    def close(self) -> None:
        """Give the instance back, with all its watches."""
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def _refuse(self, exc: OSError) -> None:
        """Say once that looks must do; a limit of the kernel is not worth a line per directory."""
        if not self._refused:
            log.warning(
                "cannot watch directories (%s); changes are found by looks only. "
                "Raise fs.inotify.max_user_watches and fs.inotify.max_user_instances",
                exc.strerror or exc,
            )
        self._refused = True

    # In a thread

    def arm_path(self, storage: StorageID, path: str) -> Armed:
        """Watch a path and the type directories in it."""
        armed = Armed(storage)
        self._arm(armed, path, _PATH_MASK, None, None)
        local = _local_devices()
        for file_type in FileType:
            name = os.path.join(path, file_type.dir_name)
            if self._arm(armed, name, _MASK, file_type, None):
                armed.complete[file_type] = os.stat(name).st_dev in local
        return armed

    def arm_sector(self, armed: Armed, file: SectorFile, name: str) -> None:
        """Watch the sector directory `name`."""
        self._arm(armed, name, _MASK, file.file_type, file)

    def _arm(
        self,
        armed: Armed,
        name: str,
        mask: int,
        file_type: FileType | None,
        file: SectorFile | None,
    ) -> bool:
        inotify = self._inotify
        if inotify is None:
            return False
        try:
            watch = inotify.add_watch(name, mask)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.ENOMEM):
                self._refuse(exc)
            return False
        armed.watches.append((watch, file_type, file))
        return True

    # On the loop

    def adopt(self, armed: Armed) -> None:
        """Take over watches made by `arm_path` or `arm_sector`."""
        for watch, file_type, file in armed.watches:
            self._watches[watch] = _Watched(armed.storage, file_type, file)
            if file is not None:
                self._sectors[watch] = None
                self._sectors.move_to_end(watch)
            early = self._early.pop(watch, [])
            self._early_count -= len(early)
            for mask, name in early:
                self._handle(watch, mask, name)
        while len(self._sectors) > SECTOR_WATCHES:
            self._remove(next(iter(self._sectors)))

    def forget(self, storage: StorageID) -> None:
        """End all watches of a path."""
        mine = [watch for watch, what in self._watches.items() if what.storage == storage]
        for watch in mine:
            self._remove(watch)

    def _remove(self, watch: int) -> None:
        self._watches.pop(watch, None)
        self._sectors.pop(watch, None)
        if self._inotify is not None:
            try:
                self._inotify.rm_watch(watch)
            except OSError as exc:  # it ended by itself: deleted, unmounted
                log.debug("watch %d: %s", watch, exc)

    async def run(self) -> None:
        """Tell the listener until cancelled."""
        if self._inotify is None:
            await trio.sleep_forever()
        fd = self._inotify.fileno()
        while True:
            await trio.lowlevel.wait_readable(fd)
            try:
                data = os.read(fd, READ_BYTES)
            except BlockingIOError:
                continue
            for event in parse_events(data):
                self._handle(event.wd, event.mask, event.name)

    def _handle(self, watch: int, mask: int, name: str) -> None:
        if mask & flags.Q_OVERFLOW:
            log.warning("the kernel lost events of storage paths; scanning them again")
            self._listener.lost()
            return
        what = self._watches.get(watch)
        if what is None:
            self._keep_early(watch, mask, name)
        elif mask & flags.IGNORED:
            self._watches.pop(watch, None)
            self._sectors.pop(watch, None)
        elif what.file is not None:
            self._listener.file(what.storage, what.file)
        elif what.file_type is not None:
            self._handle_type(what.storage, what.file_type, mask, name)
        else:
            self._handle_path(what.storage, mask, name)

    def _keep_early(self, watch: int, mask: int, name: str) -> None:
        if mask & flags.IGNORED:
            self._early_count -= len(self._early.pop(watch, ()))
        elif self._early_count < EARLY_EVENTS:
            self._early.setdefault(watch, []).append((mask, name))
            self._early_count += 1

    def _handle_type(self, storage: StorageID, file_type: FileType, mask: int, name: str) -> None:
        if mask & _GONE:
            self._listener.path(storage)
            return
        try:
            sector = parse_sector(name)
        except ValueError:
            return
        self._listener.file(storage, SectorFile(file_type, sector))

    def _handle_path(self, storage: StorageID, mask: int, name: str) -> None:
        if mask & _GONE or name == METADATA_NAME:
            self._listener.path(storage)
            return
        try:
            file_type = parse_file_type(name)
        except ValueError:
            return
        if mask & ~(flags.CLOSE_WRITE | flags.ISDIR):
            self._listener.type_directory(storage, file_type)


def _local_devices() -> frozenset[int]:
    """Device numbers of the mounted file systems that only this machine changes."""
    devices = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            major, _, minor = before.split()[2].partition(":")
            if after.split()[0] in _LOCAL_FILE_SYSTEMS:
                devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)
