"""Open files on local disks: one for all handles of an inode, kept a while for the next reader.

A file of a mebibyte or more is read past the daemon (passthrough): the kernel reads the open file
itself, named by a *backing id*. Its rules are strict, and a mistake shows as EIO in somebody's
`open`: while an inode is open, all its handles are read the same way, and with one backing id. So
an inode has at most one entry here, whose file all its handles share.

An entry outlives its last handle, because opening a file costs a thread and a backing id as much as
an open. That may not hold up anybody: an entry without handles is closed when its file is replaced
or removed (its space would stay taken), when its storage is detached or does not answer, when
nobody came for it in `IDLE_SECONDS` (its disk could not be unmounted), and when there are too many.

Only files that are proved to lie on a local file system are kept: asking one whether it is still
the same takes a microsecond and never waits, on no other kind is that so.
"""

from __future__ import annotations

import logging
import math
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgspec
import trio

from sectorfs.config import Passthrough
from sectorfs.errors import SectorFSError, from_os
from sectorfs.fuse.inodes import InodeKey
from sectorfs.fuse.kernel import Offer, Use
from sectorfs.stores.protocol import OpenFile
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

PASSTHROUGH_FROM = 1 << 20
"""Bytes from which a file is worth a backing id."""
IDLE_SECONDS = 30.0
"""For so long a file without handles is kept."""
TIDY_BATCH = 64
"""Entries looked at between two turns of others on the loop: 200 µs."""
ROOM_TRIES = 64
"""Entries looked at to find one that can go; when all of them are in use, the next open goes on."""
MOST_KEPT = 16384
"""Entries at most, however many descriptors the process may have: each takes a kilobyte."""
KEPT_SHARE = 2
"""The kept files may take one in so many descriptors; the others are for all the rest."""


class Kernel(Protocol):
    """What is asked of the kernel; `fuse.kernel` is one."""

    def offer(self) -> Offer:
        """Whether there are backing ids at all."""

    def open_backing(self, fd: int) -> int:
        """A backing id for an open file; `OSError` as the kernel says."""

    def close_backing(self, backing_id: int) -> None:
        """Give a backing id back; handles that are open with it go on."""

    def remember(self, inode: int, fh: int, fd: int, *, backing_id: int = 0) -> bool:
        """Have opens of an inode answered without Python while its file is what it is now."""

    def forget(self, inode: int) -> int:
        """End that; returns how many of these opens were not released yet."""

    def use(self, inode: int) -> Use | None:
        """What became of a remembered inode."""


class Policy(msgspec.Struct, frozen=True):
    """Which storages are to be read past the daemon."""

    default: Passthrough = "auto"
    by_storage: Mapping[str, Passthrough] = {}

    def allows(self, storage: StorageID) -> bool:
        """True where passthrough is wanted."""
        return self.by_storage.get(storage, self.default) != "off"

    @property
    def wanted(self) -> bool:
        """True unless it is off for all."""
        return any(mode != "off" for mode in (self.default, *self.by_storage.values()))

    @property
    def requires(self) -> bool:
        """True when a mount without passthrough is not to start."""
        return "require" in (self.default, *self.by_storage.values())


class _Seen(msgspec.Struct, frozen=True):
    """An open file as `fstat` shows it: equal as long as it is the same content at a name."""

    identity: tuple[int, int]
    size: int
    mtime_ns: int
    ctime_ns: int
    links: int


def _look(opened: OpenFile) -> _Seen:
    try:
        with opened.descriptor as fd:
            found = os.fstat(fd)
    except OSError as exc:
        raise from_os(exc, "stat", opened.path) from exc
    return _Seen(
        (found.st_dev, found.st_ino),
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_nlink,
    )


class Backing:
    """The open file of an inode, and who has it."""

    def __init__(self, number: int, key: InodeKey, handle: int, opened: OpenFile) -> None:
        self.number = number
        self.key = key
        self.handle = handle
        """The one file handle that the kernel knows for all who have it open."""
        self.opened = opened
        self.backing_id = 0
        """0: read through the daemon."""
        self.opens = 0
        """Handles, except those that were opened without Python while it is `remembered`."""
        self.remembered = False
        """The kernel's side answers opens of it."""
        self.idle_since = 0.0
        self.lost = False
        """Its storage was detached or fell silent: nobody else may get it."""
        self._seen = _look(opened)

    @property
    def unchanged(self) -> bool:
        """True while it is the file that was proved, under a name, on a storage that answers."""
        if self.lost or self._seen.links == 0:
            return False
        try:
            return _look(self.opened) == self._seen
        except SectorFSError as exc:  # a file system that was shut down
            log.debug("kept file: %s", exc)
            return False

    def confirm(self, other: OpenFile) -> bool:
        """True, and it is as good as new, when `other` is the same file, proved just now."""
        fresh = _look(other)
        if self.lost or fresh.identity != self._seen.identity:
            return False
        self._seen = fresh
        return True


class BackingFiles:
    """The entries of one mount. Used on the loop only, and nothing here waits."""

    def __init__(
        self,
        kernel: Kernel,
        policy: Policy,
        *,
        limit: int,
        on_close: Callable[[Backing], None],
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        """`on_close` is told of each entry that ends."""
        self._kernel = kernel
        self._policy = policy
        self._limit = limit
        self._on_close = on_close
        self._now = now
        self._entries: dict[int, Backing] = {}  # by inode
        self._of_file: dict[SectorFile, set[int]] = {}
        # Without handles, the longest first. Each of them is in `_entries` too.
        self._idle: dict[int, Backing] = {}
        # No longer in `_entries`, closed with their last handle.
        self._leaving: set[Backing] = set()

    def __len__(self) -> int:
        """Entries that hold a file open."""
        return len(self._entries) + len(self._leaving)

    @property
    def idle(self) -> int:
        """Entries without handles."""
        return len(self._idle)

    def get(self, number: int) -> Backing | None:
        """The entry of an inode, as long as somebody else may get it."""
        return self._entries.get(number)

    def in_use(self) -> Iterator[tuple[Backing, int]]:
        """Entries with handles, and how many."""
        for entry in (*self._entries.values(), *self._leaving):
            use = self._kernel.use(entry.number) if entry.remembered else None
            opens = entry.opens + (use.open if use is not None else 0)
            if opens:
                yield entry, opens

    def kept_of(self, storage: StorageID) -> Iterator[Backing]:
        """Entries of a storage, with handles or without."""
        entries = (*self._entries.values(), *self._leaving)
        return (entry for entry in entries if entry.opened.storage == storage)

    def passes(self, storage: StorageID, size: int, file_system: str) -> bool:
        """True for a file that would be read past the daemon, were it opened now."""
        return (
            size >= PASSTHROUGH_FROM
            and file_system != ""
            and self._policy.allows(storage)
            and self._kernel.offer().passthrough
        )

    def add(
        self, number: int, key: InodeKey, handle: int, opened: OpenFile, *, daemon: bool
    ) -> Backing:
        """Make an entry, which takes `opened` over; `daemon`: the inode is open in that way."""
        assert number not in self._entries, "an inode has one open file"
        entry = Backing(number, key, handle, opened)
        self._entries[number] = entry
        self._of_file.setdefault(key.file, set()).add(number)
        self._idle[number] = entry
        self.acquire(entry, daemon=daemon)
        self._make_room()
        return entry

    def acquire(self, entry: Backing, *, daemon: bool) -> None:
        """One more handle. The first one decides how all of them are read."""
        if not entry.backing_id and not daemon:
            self._try_passthrough(entry)
        entry.opens += 1
        self._idle.pop(entry.number, None)
        self._remember(entry)

    def release(self, entry: Backing) -> None:
        """One handle less; without any, the file stays open for a while if it may."""
        entry.opens -= 1
        if entry.opens:
            return
        if entry in self._leaving:
            self._leaving.remove(entry)
            self._close(entry)
        elif entry.unchanged:
            entry.idle_since = self._now()
            self._idle[entry.number] = entry
            self._make_room()
        else:
            self._end(entry)

    def part(self, entry: Backing) -> None:
        """Make room for another file of its inode, which must not be open with a backing id."""
        self._recall(entry)
        assert not entry.opens or not entry.backing_id, "an inode has one backing id"
        self._remove(entry)
        if entry.opens:
            self._leaving.add(entry)
        else:
            self._close(entry)

    def is_passed(self, entry: Backing) -> bool:
        """True while somebody reads it past the daemon: its inode can have no other file then."""
        self._recall(entry)
        return entry.opens > 0 and entry.backing_id != 0

    def changed(self, file: SectorFile) -> None:
        """There is news of a sector file: what is not in use is closed, the rest proved anew."""
        for number in tuple(self._of_file.get(file, ())):
            self._end(self._entries[number])

    def lose(self, storage: StorageID) -> None:
        """A storage was detached or does not answer: nobody else gets its open files."""
        for entry in [one for one in self._entries.values() if one.opened.storage == storage]:
            entry.lost = True
            self._end(entry)

    async def tidy(self) -> None:
        """Close what nobody came for, and what was removed behind everybody's back."""
        for turn, entry in enumerate(tuple(self._idle.values())):
            if turn % TIDY_BATCH == 0:
                await trio.lowlevel.checkpoint()
            if self._idle.get(entry.number) is not entry or self._was_used(entry):
                continue
            if self._now() - entry.idle_since >= IDLE_SECONDS or not entry.unchanged:
                self._end(entry)
        self._make_room(2 * len(self._idle))  # the first look tells who was used meanwhile

    def close_all(self) -> None:
        """The mount has ended."""
        for entry in tuple(self._entries.values()):
            self._recall(entry)
            self._remove(entry)
            self._close(entry)
        while self._leaving:
            self._close(self._leaving.pop())

    # Without Python

    def _remember(self, entry: Backing) -> None:
        if entry.remembered:
            return
        with entry.opened.descriptor as fd:
            entry.remembered = self._kernel.remember(
                entry.number, entry.handle, fd, backing_id=entry.backing_id
            )
        if entry.remembered and not entry.unchanged:  # it changed before it was remembered
            self._recall(entry)

    def _recall(self, entry: Backing) -> None:
        """Have its opens come to Python again, and the releases of those that did not."""
        if not entry.remembered:
            return
        entry.remembered = False
        entry.opens += self._kernel.forget(entry.number)
        if entry.opens:
            self._idle.pop(entry.number, None)

    def _was_used(self, entry: Backing) -> bool:
        """True, and it is the last to go, when somebody came for it without Python."""
        use = self._kernel.use(entry.number) if entry.remembered else None
        last = self._now() - use.idle if use is not None else -math.inf
        if use is None or (not use.open and last <= entry.idle_since):
            return False
        entry.idle_since = max(last, entry.idle_since)
        self._idle[entry.number] = self._idle.pop(entry.number)
        return True

    # Ends

    def _make_room(self, tries: int = ROOM_TRIES) -> None:
        for _ in range(tries):
            if len(self) <= self._limit or not self._idle:
                return
            longest = next(iter(self._idle.values()))
            if not self._was_used(longest):
                self._end(longest)

    def _end(self, entry: Backing) -> None:
        """Close it, unless somebody has it open: then its last release comes here again."""
        self._recall(entry)
        if not entry.opens:
            self._remove(entry)
            self._close(entry)

    def _remove(self, entry: Backing) -> None:
        del self._entries[entry.number]
        self._idle.pop(entry.number, None)
        numbers = self._of_file[entry.key.file]
        numbers.discard(entry.number)
        if not numbers:
            del self._of_file[entry.key.file]

    def _close(self, entry: Backing) -> None:
        if entry.backing_id:
            try:
                self._kernel.close_backing(entry.backing_id)
            except OSError as exc:  # the connection ended, and all its ids with it
                log.debug("%s: backing id: %s", entry.opened.path, exc)
        entry.opened.close()
        self._on_close(entry)

    # Passthrough

    def _try_passthrough(self, entry: Backing) -> None:
        opened = entry.opened
        if not self.passes(opened.storage, opened.size, opened.file_system):
            return
        self._recall(entry)
        # Only files read through the daemon leave while they are open.
        if entry.opens or any(one.number == entry.number for one in self._leaving):
            return
        try:
            with opened.descriptor as fd:
                entry.backing_id = self._kernel.open_backing(fd)
        except OSError as exc:
            log.warning("%s: read through the daemon: %s", opened.path, exc)


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as its hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        log.info("descriptors: %d instead of %d", hard, soft)


def kept_limit() -> int:
    """How many files may be kept open beside everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_KEPT if soft == resource.RLIM_INFINITY else min(MOST_KEPT, soft // KEPT_SHARE)
