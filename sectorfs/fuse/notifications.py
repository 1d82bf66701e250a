"""What the kernel must forget, and the bounded queue of it. No kernel here, and no thread.

The loop fills the queue (`changed`, `forget_name`), one thread empties it (`deliver`), because the
kernel may block a notification for as long as a request on the same directory is in flight; on the
loop, which has to answer that request, this would be a deadlock.

Only what the kernel may know is worth a notice: names whose inode it holds, and names that it was
told not to exist a moment ago. Thousands of names may come in a second, and each notice about one
stops all who read its directory. A directory is told of once for each batch of changes: what the
kernel keeps of its listing goes with its attributes.

Regular files need no notification of their own inode. New content gets a new number, so the pages
and attributes of the old one stay true for those who have it open, and dropping pages would wait
for every read in flight: one hung disk would hold up the news of all others. Only a file that was
repaired in place has its pages dropped: they were wrong.

No answer that is older than a notice survives it. For names the kernel sees to that: a look-up
keeps its directory locked until the answer is in the cache, and a notice waits for the lock. For
attributes it compares versions, but of inodes it has, and the first look-up of a directory may be
answered while it has none: then the notice fails, the older attributes come to life after it, and
would stay for their whole time. So a notice about a directory that ought to be known is repeated.

The queue is a set in order of arrival. When it is full, it is replaced by one order to forget
everything: the names of the type directories and every inode that the kernel holds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec

from sectorfs.fuse.inodes import (
    ROOT,
    Content,
    InodeKey,
    InodeTable,
    number_type,
    type_number,
)
from sectorfs.types import Facts, FileType, SectorFile

DEFAULT_LIMIT = 65536
"""Notices kept before all names are forgotten instead."""
MISSED_FOR = 10.0
"""Seconds, at least, that a name counts as missed. The kernel believes it for a tenth of that, but
from when the process that asked gets to run."""
MISSED_LIMIT = 10_000
"""Missed names that are told apart."""
AGAIN = (0.02, 0.2, 1.0)
"""Seconds until a notice is repeated: the process that was answered may not have run yet."""
AGAIN_LIMIT = 4096
"""Notices waiting to be repeated: as many as there can be answers on their way, about."""


class Change(Protocol):
    """What the catalog tells about one sector file."""

    @property
    def file(self) -> SectorFile:
        """Whose facts or name changed."""

    @property
    def before(self) -> Facts | None:
        """What was known of it."""

    @property
    def after(self) -> Facts | None:
        """What is known now."""

    @property
    def appeared(self) -> bool:
        """The name is new."""

    @property
    def vanished(self) -> bool:
        """The name is gone."""


class ForgetName(msgspec.Struct, frozen=True):
    """Drop the name from the kernel's cache, found or not found."""

    parent: int
    name: bytes


class ForgetDirectory(msgspec.Struct, frozen=True):
    """Drop the cached attributes of a directory, and its listing."""

    number: int


class ForgetPages(msgspec.Struct, frozen=True):
    """Drop what is cached of a regular file's content."""

    number: int


Notice = ForgetName | ForgetDirectory | ForgetPages


class _Missed:
    """Names that the kernel was told not to exist, in two generations: the older one goes."""

    def __init__(self, clock: Callable[[], float], limit: int) -> None:
        self._clock = clock
        self._limit = limit
        self._since = clock()
        self._now: set[ForgetName] = set()
        self._before: set[ForgetName] = set()
        self._uncounted = -MISSED_FOR * 2  # when a name was last too many

    def add(self, notice: ForgetName) -> None:
        self._age()
        if len(self._now) < self._limit:
            self._now.add(notice)
        else:
            self._uncounted = self._clock()

    def __contains__(self, notice: ForgetName) -> bool:
        self._age()
        known = notice in self._now or notice in self._before
        return known or self._clock() < self._uncounted + MISSED_FOR

    def _age(self) -> None:
        passed = self._clock() - self._since
        if passed >= MISSED_FOR:
            self._before = self._now if passed < MISSED_FOR * 2 else set()
            self._now = set()
            self._since = self._clock()


class Notifications:
    """Notices on their way to the kernel. `close` ends the thread that takes them."""

    def __init__(
        self,
        inodes: InodeTable,
        *,
        shown_types: Callable[[], Iterable[FileType]],
        limit: int = DEFAULT_LIMIT,
        missed_limit: int = MISSED_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inodes = inodes
        self._shown_types = shown_types
        self._shown = frozenset(shown_types())
        self._limit = limit
        self._missed = _Missed(clock, missed_limit)
        self._ready = threading.Condition()
        self._queue: dict[Notice, None] = {}
        self._everything = False
        self._started = False
        self._closed = False

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def changed(self, changes: Iterable[Change]) -> None:
        """Queue what these changes of the catalog make untrue; never waits for the kernel."""
        notices: list[Notice] = list(self._of_types())
        directories: set[FileType] = set()
        for change in changes:
            notices += self._of(change)
            if change.appeared or change.vanished:
                directories.add(change.file.file_type)
        notices += [ForgetDirectory(type_number(one)) for one in sorted(directories)]
        if directories:
            notices.append(ForgetDirectory(ROOT))  # its time is the latest of its directories
        self._put(notices)

    def missed(self, parent: int, name: bytes) -> None:
        """A look-up was answered with "no such name": its appearance will be news."""
        self._missed.add(ForgetName(parent, name))

    def expects(self, notice: Notice) -> bool:
        """True when the kernel ought to know the directory that a notice is about."""
        if not isinstance(notice, ForgetDirectory):
            return False
        number = notice.number
        return number == ROOT or number_type(number) is not None or number in self._inodes

    def forget_name(self, file: SectorFile, member: str | None = None) -> None:
        """Queue one name, so that its next look-up asks again."""
        self._put(self._name_of(file, member))

    def forget_pages(self, file: SectorFile, member: str | None, content: Content) -> None:
        """Queue a file that was repaired, so that its next read asks again."""
        number = self._inodes.number(InodeKey(file, member, content))
        if number in self._inodes:
            self._put([ForgetPages(number)])

    def take(self, patience: float | None = None) -> Iterator[Notice] | None:
        """Everything queued so far; waits while there is nothing; None after `close`.

        Nothing once patience has ended. For the notifying thread only.
        """
        with self._ready:
            self._ready.wait_for(self._is_news, patience)
            if self._closed:
                return None
            queue, everything = self._queue, self._everything
            self._queue, self._everything = {}, False
        return self._all() if everything else iter(list(queue))

    def start(self) -> None:
        """Let `take` begin: the kernel takes no notices before it has introduced itself."""
        with self._ready:
            self._started = True
            self._ready.notify_all()

    def close(self) -> None:
        """Let `take` return None from now on; later notices are dropped."""
        with self._ready:
            self._closed = True
            self._queue = {}
            self._ready.notify_all()

    def _is_news(self) -> bool:
        return self._closed or (self._started and (bool(self._queue) or self._everything))

    def _put(self, notices: Iterable[Notice]) -> None:
        with self._ready:  # held for moments only, on both sides
            for notice in notices:
                if self._everything or self._closed:
                    break
                self._queue[notice] = None
                if len(self._queue) > self._limit:
                    self._everything = True
                    self._queue = {}
            self._ready.notify_all()

    def _of_types(self) -> Iterator[Notice]:
        """Type directories that came or went: only then, because their children go with them."""
        shown = frozenset(self._shown_types())
        for file_type in sorted(shown ^ self._shown):
            yield ForgetName(ROOT, file_type.dir_name.encode())
        self._shown = shown

    def _of(self, change: Change) -> Iterator[Notice]:
        file, facts = change.file, change.before
        name = ForgetName(type_number(file.file_type), file.sector.name.encode())
        if file.file_type.is_directory:
            if change.vanished and self._inodes.number(InodeKey(file)) in self._inodes:
                yield name
            yield from self._of_members(file, facts, change.after)
        elif not change.appeared:
            content = Content(facts.size, facts.mtime_ns) if facts else None
            if self._inodes.number(InodeKey(file, None, content)) in self._inodes:
                yield name
        if change.appeared and name in self._missed:
            yield name

    def _of_members(
        self, file: SectorFile, before: Facts | None, after: Facts | None
    ) -> Iterator[Notice]:
        number = self._inodes.number(InodeKey(file))
        if number not in self._inodes:
            return  # the kernel knows nothing below it
        yield ForgetDirectory(number)
        changed = set((before.members if before else None) or ())
        changed ^= set((after.members if after else None) or ())
        for name in sorted({member.name for member in changed}):
            yield ForgetName(number, name.encode())

    def _name_of(self, file: SectorFile, member: str | None) -> Iterator[Notice]:
        if member is None:
            yield ForgetName(type_number(file.file_type), file.sector.name.encode())
            return
        number = self._inodes.number(InodeKey(file))
        if number in self._inodes:
            yield ForgetName(number, member.encode())

    def _all(self) -> Iterator[Notice]:
        """Every name and directory the kernel may hold; runs in the notifying thread."""
        for file_type in FileType:
            yield ForgetName(ROOT, file_type.dir_name.encode())
            yield ForgetDirectory(type_number(file_type))
        yield ForgetDirectory(ROOT)
        for number in self._inodes.numbers():
            key = self._inodes.key(number)
            if key is None:
                continue
            if key.is_directory:
                yield ForgetDirectory(number)
            yield from self._name_of(key.file, key.member)


def deliver(
    notifications: Notifications,
    send: Callable[[Notice], bool],
    *,
    pauses: tuple[float, ...] = AGAIN,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """The notifying thread: hand notices to the kernel one by one until `close`.

    `send` says whether the kernel knew what the notice is about.
    """
    later: dict[Notice, tuple[float, int]] = {}  # when to repeat it, and how often it failed

    def attempt(notice: Notice, failed: int) -> None:
        later.pop(notice, None)
        if notifications.closed or send(notice) or not notifications.expects(notice):
            return
        if failed < len(pauses) and len(later) < AGAIN_LIMIT:
            later[notice] = (clock() + pauses[failed], failed + 1)

    while True:
        due = min((at for at, _ in later.values()), default=None)
        patience = None if due is None else max(0.0, due - clock())
        notices = notifications.take(patience)
        if notices is None:
            return
        for notice in notices:
            attempt(notice, 0)
        now = clock()
        for notice, (at, failed) in list(later.items()):
            if at <= now:
                attempt(notice, failed)
