"""A sector file that comes into a storage path of this node: linked, copied or received.

Order, so that a crash at any point leaves nothing, or the whole file, under the sector's name:
bytes into a name of our own below ``fetching``, times, fsync of each file, fsync of the directory,
rename, fsync of the type directory. Only then may it be declared. What a crash leaves below
``fetching`` is cleared when the path is attached again, or when the same move is begun again.

A thread that hung in the disk and was given up does nothing more that others would see (`wanted`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import trio

from sectorfs.errors import (
    Refused,
    SectorFSError,
    SourceFailed,
    Stale,
    StorageUnavailable,
    from_os,
)
from sectorfs.stores.file_copy import FileCopy
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.own_names import (
    FETCHING,
    NO_LINKS,
    delete,
    exists,
    opened_fetching,
    opened_type,
    own_name,
    rename_new,
)
from sectorfs.stores.seen import Part, Seen, see
from sectorfs.stores.wanted import Wanted
from sectorfs.types import SectorFile

log = logging.getLogger(__name__)

SYNC_EVERY = 64 << 20
"""Bytes written between two syncs, so that none takes longer than a disk may be silent."""
DISCARD_SECONDS = 5.0
"""Time for cleaning up; what is left then is cleared when the path is attached again."""
Progress = Callable[[int], object]
"""Called with bytes that came since the last call."""


class Incoming:
    """One sector file on its way into `path`. `begin`, bring every part, `commit`; or `discard`."""

    def __init__(self, path: LocalPath, lane: Lane, file: SectorFile, *, owner: str) -> None:
        self._path = path
        self._lane = lane
        self._file = file
        self._name = own_name(file, owner, "in")
        self._gone = own_name(file, owner, "gone")
        self.where = os.path.join(path.path, file.file_type.dir_name, FETCHING, self._name)
        """Where it lies until it is whole."""
        # Of what this attempt made there: a call of an earlier one, given up while the disk hung,
        # must not put what a later one writes into place.
        self._identity: tuple[int, int] | None = None

    async def begin(self) -> None:
        """Make room for it: directories, and an earlier attempt out of the way."""

        def call() -> None:
            path, kind = self._path, self._file.file_type
            with (
                opened_type(path.path, path.storage, kind, make=True) as type_fd,
                opened_fetching(type_fd, path.path, kind, make=True) as fd,
            ):
                wanted.require(self.where)
                self._clear(fd)
                wanted.require(self.where)
                if kind.is_directory:
                    os.mkdir(self._name, 0o755, dir_fd=fd)
                    self._identity = _identity(self._name, fd)

        with Wanted() as wanted:
            await self._lane.run(call, what=f"begin {self._file}")

    async def link(self, source: str, seen: Seen) -> bool:
        """Give the same bytes a second name; False when the two are not on one file system.

        A link to a symbolic link would stay one: what they name is copied.
        """
        if seen.is_link:
            return False
        return await self._lane.run(lambda: self._link(source, seen), what=f"link {self._file}")

    def _link(self, source: str, seen: Seen) -> bool:
        if any(os.path.islink(_part(source, part)) for part in seen.parts):
            return False
        for part in seen.parts:
            try:
                os.link(_part(source, part), _part(self.where, part), follow_symlinks=False)
            except OSError as exc:
                if exc.errno in NO_LINKS:
                    self._empty(seen)
                    return False
                raise
            if not _is_part(os.lstat(_part(self.where, part)), part):
                raise Stale("changed while it was moved", source)
        if not self._file.file_type.is_directory:
            self._identity = _identity(self.where)
        return True

    def _empty(self, seen: Seen) -> None:
        for part in seen.parts:
            with suppress(FileNotFoundError):
                os.unlink(_part(self.where, part))

    async def copy(self, source: str, seen: Seen, progress: Progress) -> None:
        """Copy every part from another storage path."""
        for part in seen.parts:
            with _naming(_part(source, part)):
                reader = await self._open(partial(_open_part, source, part))
            try:
                writer = await self.create(part.name)
                try:
                    await self._copy_part(reader, writer, part, _part(source, part), progress)
                    await self.end(writer, part.size, part.mtime_ns)
                finally:
                    writer.close()
            finally:
                reader.close()

    async def _copy_part(
        self, reader: Descriptor, writer: Descriptor, part: Part, where: str, progress: Progress
    ) -> None:
        state = FileCopy(part.size, where)
        synced = 0

        def step() -> bool:
            with reader as source, writer as target:
                return state.step(source, target)

        more = True
        while more:
            before = state.done
            with _naming(where, when=lambda: state.reading):
                more = await self._lane.run(step, what=f"copy {self._file}")
            progress(state.done - before)
            if state.done - synced >= SYNC_EVERY:
                synced = state.done
                await self._lane.run(lambda: _sync(writer), what=f"sync {self._file}")

    async def create(self, name: str) -> Descriptor:
        """A new file to write a part to; the caller ends it with `end`, and closes it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        where = os.path.join(self.where, name) if name else self.where

        def call() -> int:
            fd = os.open(where, flags, 0o644)
            if not name:
                found = os.fstat(fd)
                self._identity = (found.st_dev, found.st_ino)
            return fd

        return await self._open(call)

    async def _open(self, call: Callable[[], int]) -> Descriptor:
        lane = self._lane
        fd = await lane.run(call, what=f"open for {self._file}", discard=os.close)
        return lane.descriptor(fd)

    async def end(self, writer: Descriptor, size: int, mtime_ns: int) -> None:
        """A part is written: check its length, set its time, sync it."""

        def call() -> None:
            with writer as fd:
                held = os.fstat(fd).st_size
                if held != size:
                    raise SourceFailed(f"has {held} of {size} bytes", self.where)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
                os.fsync(fd)

        await self._lane.run(call, what=f"sync {self._file}")

    async def commit(self, mtime_ns: int) -> Seen:
        """Put it into place; what lies there now. `Refused` when something came there meanwhile."""
        try:
            with Wanted() as wanted:
                call = partial(self._commit, mtime_ns, wanted)
                return await self._lane.run(call, what=f"put {self._file} into place")
        finally:
            self._path.note(self._file)

    def _commit(self, mtime_ns: int, wanted: Wanted) -> Seen:
        path, kind, final = self._path, self._file.file_type, self._file.sector.name
        with (
            opened_type(path.path, path.storage, kind) as type_fd,
            opened_fetching(type_fd, path.path, kind) as fd,
        ):
            if exists(final, type_fd):
                raise self._taken()
            if kind.is_directory:
                os.utime(self._name, ns=(mtime_ns, mtime_ns), dir_fd=fd)
                _sync_directory(self._name, fd)
            if _identity(self._name, fd) != self._identity:
                raise Stale("was begun again meanwhile", self.where)
            wanted.require(self.where)
            try:
                rename_new(self._name, final, source_fd=fd, target_fd=type_fd)
            except FileExistsError as exc:
                raise self._taken() from exc
            if kind.is_directory:
                # Some file systems change its time as its ".." changes.
                os.utime(final, ns=(mtime_ns, mtime_ns), dir_fd=type_fd)
            os.fsync(type_fd)
            os.fsync(fd)
            return see(final, self._file, path.name_of(self._file), dir_fd=type_fd)

    def _taken(self) -> Refused:
        return Refused("something came there meanwhile", self._path.name_of(self._file))

    def _clear(self, fd: int) -> None:
        """Delete what lies under our name.

        A directory first gets a name from which no late `_commit` puts it into place half empty.
        """
        if not self._file.file_type.is_directory:
            delete(self._name, fd)
            return
        delete(self._gone, fd)
        with suppress(FileNotFoundError):
            os.rename(self._name, self._gone, src_dir_fd=fd, dst_dir_fd=fd)
        delete(self._gone, fd)

    async def discard(self) -> None:
        """Give it up; works in a cancelled scope as well, and never raises."""

        def call() -> None:
            path, kind = self._path, self._file.file_type
            with (
                opened_type(path.path, path.storage, kind) as type_fd,
                opened_fetching(type_fd, path.path, kind) as fd,
            ):
                wanted.require(self.where)
                self._clear(fd)

        with trio.move_on_after(DISCARD_SECONDS, shield=True), Wanted() as wanted:
            try:
                await self._lane.run(call, what=f"discard {self._file}")
            except SectorFSError as exc:
                log.debug("%s stays until the path is attached again: %s", self.where, exc)


def _part(where: str, part: Part) -> str:
    return os.path.join(where, part.name) if part.name else where


def _open_part(source: str, part: Part) -> int:
    name = _part(source, part)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise from_os(exc, "cannot be opened", name) from exc
    if not _is_part(os.fstat(fd), part):
        os.close(fd)
        raise Stale("changed while it was moved", name)
    return fd


@contextmanager
def _naming(source: str, *, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Name the source in the error for a disk that does not answer: its calls are in our lane."""
    try:
        yield
    except StorageUnavailable as exc:
        if not when():
            raise
        raise StorageUnavailable(exc.what, source, exc.hint) from exc


def _is_part(found: os.stat_result, part: Part) -> bool:
    now = (found.st_size, found.st_mtime_ns, found.st_ino)
    return now == (part.size, part.mtime_ns, part.inode)


def _identity(name: str, dir_fd: int | None = None) -> tuple[int, int]:
    found = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    return found.st_dev, found.st_ino


def _sync(writer: Descriptor) -> None:
    with writer as fd:
        os.fdatasync(fd)


def _sync_directory(name: str, dir_fd: int) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def sync_in_place(path: LocalPath, lane: Lane, file: SectorFile, seen: Seen) -> None:
    """Sync a file that somebody else brought: until then a power cut may take it."""
    for part in seen.parts:
        call = partial(_sync_name, _part(path.name_of(file), part))
        await lane.run(call, what=f"sync {file}")

    def names() -> None:
        with opened_type(path.path, path.storage, file.file_type) as type_fd:
            if file.file_type.is_directory:
                _sync_directory(file.sector.name, type_fd)
            os.fsync(type_fd)

    await lane.run(names, what=f"sync {file}")


def _sync_name(name: str) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
