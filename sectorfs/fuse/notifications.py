"""What the kernel must forget, and the bounded queue of it. No kernel here, and no thread.

The loop fills the queue (`changed`, `forget_name`), one thread empties it (`take`), because the
kernel may block a notification for as long as a request on the same directory is in flight; on the
loop, which has to answer that request, this would be a deadlock.

Regular files need no notification of their own inode. New content gets a new number, so the pages
and attributes of the old one stay true for those who have it open, and dropping pages would wait
for every read in flight: one hung disk would hold up the news of all others.

The queue is a set in order of arrival. When it is full, it is replaced by one order to forget
everything: the names of the type directories and every inode that the kernel holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec

from sectorfs.fuse.inodes import ROOT, InodeKey, InodeTable, type_number
from sectorfs.types import Facts, FileType, SectorFile

DEFAULT_LIMIT = 65536
"""Notices kept before all names are forgotten instead."""


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


class ForgetAttributes(msgspec.Struct, frozen=True):
    """Drop the cached attributes of a directory."""

    number: int


Notice = ForgetName | ForgetAttributes


class Notifications:
    """Notices on their way to the kernel. `close` ends the thread that takes them."""

    def __init__(
        self,
        inodes: InodeTable,
        *,
        shown_types: Callable[[], Iterable[FileType]],
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        self._inodes = inodes
        self._shown_types = shown_types
        self._shown = frozenset(shown_types())
        self._limit = limit
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
        self._put(self._of_types())
        self._put(notice for change in changes for notice in self._of(change))

    def forget_name(self, file: SectorFile, member: str | None = None) -> None:
        """Queue one name, so that its next look-up asks again."""
        self._put(self._name_of(file, member))

    def take(self) -> Iterator[Notice] | None:
        """Everything queued so far; waits while there is nothing; None after `close`.

        For the notifying thread only.
        """
        with self._ready:
            self._ready.wait_for(self._is_news)
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
        file = change.file
        directory = type_number(file.file_type)
        if change.appeared or change.vanished:
            yield from self._name_of(file, None)
            yield ForgetAttributes(directory)
            yield ForgetAttributes(ROOT)  # its time is the latest of its directories
        elif not file.file_type.is_directory:
            yield from self._name_of(file, None)
        if file.file_type.is_directory:
            yield from self._of_members(file, change.before, change.after)

    def _of_members(
        self, file: SectorFile, before: Facts | None, after: Facts | None
    ) -> Iterator[Notice]:
        number = self._inodes.number(InodeKey(file))
        if number not in self._inodes:
            return  # the kernel knows nothing below it
        yield ForgetAttributes(number)
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
            yield ForgetAttributes(type_number(file_type))
        yield ForgetAttributes(ROOT)
        for number in self._inodes.numbers():
            key = self._inodes.key(number)
            if key is None:
                continue
            if key.is_directory:
                yield ForgetAttributes(number)
            yield from self._name_of(key.file, key.member)
