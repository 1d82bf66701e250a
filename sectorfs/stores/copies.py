"""The files of the node's cache path: copies being fetched and copies that are whole.

Layout, beside the ordinary one of a storage path::

    <type>/fetching/s-t01000-7              a file being received
    <type>/fetching/s-t01000-7/NAME.tmp     one file of a sector directory being received
    <type>/fetching/s-t01000-7/NAME~tar.tmp the same, out of a tar stream of the directory
    <type>/fetching/s-t01000-7/NAME         received and synced, the directory not yet complete
    <type>/fetching/s-t01000-7.part, .map   a file that comes in pieces (`blocks`)
    <type>/fetching/s-t01000-7/NAME.part, … one file of a sector directory that does

Order of a commit, so that a crash at any point leaves either no copy or a whole one: bytes, times,
fsync, rename, fsync of the directory; only then may the copy be declared. A directory is renamed
into place when all its files are there. What is left below ``fetching`` at start stays as far as it
can be gone on with (`unfinished`), until the catalog tells that nobody has it any more. Only the
cache path is ever written here, never an operator's path.

Every write is bounded in time; a thread that hangs in one is left behind, and puts nothing into
place any more. While one hangs nothing new is begun.

What the cache path's own disk refuses is a `DiskError` or `StorageUnavailable`, never `NotFound` or
a missing permission: whoever fetches must be able to tell it from what a source of the file says.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial as bound
from pathlib import Path
from typing import TypeVar

import trio

from sectorfs.errors import (
    DiskError,
    DiskFull,
    NotFound,
    PermissionRefused,
    SectorFSError,
    SourceFailed,
    StorageUnavailable,
)
from sectorfs.index import content
from sectorfs.stores import unfinished
from sectorfs.stores.blocks import DATA_SUFFIX, Identity, PartialFile
from sectorfs.stores.cache_contents import remove_partials
from sectorfs.stores.file_systems import FileSystems, open_to_read
from sectorfs.stores.lanes import PATIENT_WRITES, Descriptor, Lane
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.scan import PathLost, check_identity
from sectorfs.stores.space import BLOCK
from sectorfs.stores.unfinished import Leftover
from sectorfs.stores.wanted import Wanted
from sectorfs.types import Facts, MemberFacts, SectorFile, StorageID

log = logging.getLogger(__name__)

T = TypeVar("T")

DISCARD_SECONDS = 5.0
"""Time for cleaning up; what is left then is cleared at the next start."""
ROOM_LEFT = 64 << 20
"""Bytes that a fetch leaves free, so that the file system never fills entirely."""


class Partial:
    """One regular file being received; `descriptor` is open for writing at its temporary name."""

    def __init__(
        self, file: SectorFile, member: str | None, path: Path, descriptor: Descriptor
    ) -> None:
        self.file = file
        self.member = member
        self.path = path
        self.descriptor = descriptor


class Copies:
    """The cache path of this node."""

    def __init__(self, root: Path, storage: StorageID, lane: Lane) -> None:
        self.root = root
        self.storage = storage
        self.lane = lane
        self._file_systems = FileSystems()
        self._leftovers: list[Leftover] = []
        self._partials: dict[SectorFile, set[str | None]] = {}
        self._cleared = trio.Event()
        self._cleared.set()

    async def clear_leftovers(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> int:
        """Remove what cannot be gone on with of an earlier run; returns how much there was.

        A disk that does not let them go (it became read-only) keeps no node from starting. One that
        hangs is waited for, however long, and no fetch begins before the end.
        """
        self._cleared = trio.Event()
        task_status.started()
        patient = Lane(str(self.root), deadline=math.inf, width=1)
        try:
            self._leftovers, removed = await patient.run(
                self._clear_leftovers, what="clear unfinished fetches"
            )
            for one in self._leftovers:
                self._partials.setdefault(one.file, set()).add(one.member)
        except SectorFSError as exc:
            log.warning("unfinished fetches stay: %s", exc)
            return 0
        finally:
            self._cleared.set()
        if removed:
            log.info("%s: removed %d unfinished fetches", self.root, removed)
        return removed

    async def settle_leftovers(self, current: Callable[[SectorFile], Facts | None]) -> int:
        """Remove what stayed of an earlier run and is of no present content; how much it was."""
        lost = [one for one in self._leftovers if not one.is_of(current(one.file))]
        self._leftovers = []
        for one in lost:
            self._forget_partial(one.file, one.member)
            try:
                await self.lane.run(bound(unfinished.remove, one), what=f"remove {one.path}")
            except SectorFSError as exc:
                log.warning("%s stays: %s", one.path, exc)
            else:
                log.info("removed %s: nobody has that content any more", one.path)
        return len(lost)

    async def partial(
        self, file: SectorFile, member: str | None, identity: Identity, *, resume: bool = True
    ) -> PartialFile:
        """The partial file of a content, resumed where there is one; `DiskFull` without room."""
        await self._require_cleared()
        self.refuse_hung_disk()
        folder, name = self._partial_place(file, member)
        self._leftovers = [
            one for one in self._leftovers if (one.file, one.member) != (file, member)
        ]
        with _own_trouble():
            await self.lane.run(
                lambda: self._check_room(identity.size, folder / f"{name}{DATA_SUFFIX}"),
                what=f"begin copy of {file}",
            )
            kept = await PartialFile.open(self.lane, folder, name, identity, resume=resume)
        self._partials.setdefault(file, set()).add(member)
        return kept

    async def finish(self, kept: PartialFile, file: SectorFile, member: str | None) -> None:
        """Give a partial file that is whole its name; whoever reads it goes on."""
        target = self._final(file) if member is None else self._fetching(file) / member
        with _own_trouble():
            await kept.finish(target)
        self._forget_partial(file, member)

    async def remove_partials(self, file: SectorFile) -> int:
        """Delete what came of a file that is not whole; the bytes that gives."""
        freed = await self.lane.finish(
            lambda: remove_partials(self.root, self.storage, file), what=f"remove parts of {file}"
        )
        self._partials.pop(file, None)
        return freed

    def has_partial(self, file: SectorFile, member: str | None) -> bool:
        """True for what came in part, in this run or an earlier one."""
        return member in self._partials.get(file, ())

    def begun(self) -> tuple[SectorFile, ...]:
        """The sector files that came in part."""
        return tuple(self._partials)

    async def begun_bytes(self, file: SectorFile, member: str | None) -> int:
        """Bytes on disk of what came in part; 0 where nothing did."""
        if not self.has_partial(file, member):
            return 0
        folder, name = self._partial_place(file, member)

        def call() -> int:
            with suppress(FileNotFoundError):
                return (folder / f"{name}{DATA_SUFFIX}").lstat().st_blocks * BLOCK
            return 0

        with _own_trouble():
            return await self.lane.run(call, what=f"look at parts of {file}")

    def is_begun(self, file: SectorFile) -> bool:
        """True when that, or a file of that directory, came in part."""
        return file in self._partials

    def _forget_partial(self, file: SectorFile, member: str | None) -> None:
        members = self._partials.get(file, set())
        members.discard(member)
        if not members:
            self._partials.pop(file, None)

    async def open(
        self, file: SectorFile, member: str | None, *, size: int, mtime_ns: int
    ) -> OpenFile | None:
        """Open a whole copy with this size and time, or None."""

        def call() -> OpenFile | None:
            for path in self._finished_paths(file, member):
                found = self._open_matching(path, size, mtime_ns)
                if found is not None:
                    return found
            return None

        return await self.lane.run(call, what=f"open copy of {file}", discard=_close)

    async def begin(
        self, file: SectorFile, member: str | None, size: int, *, archive: bool = False
    ) -> Partial:
        """Make the temporary file; `DiskFull` when `size` bytes do not fit.

        `archive`: it comes with its whole directory, while it may be coming by itself as well.
        """
        await self._require_cleared()
        self.refuse_hung_disk()
        with _own_trouble(), Wanted() as wanted:
            return await self.lane.run(
                lambda: self._begin(file, member, size, archive, wanted),
                what=f"begin copy of {file}",
                discard=_throw_away,
            )

    async def _require_cleared(self) -> None:
        with trio.move_on_after(self.lane.deadline):
            await self._cleared.wait()
            return
        raise StorageUnavailable(
            "the disk has not answered since the start", self.root, "check the cache path's disk"
        )

    def refuse_hung_disk(self) -> None:
        """`StorageUnavailable` while a write takes so long that its disk must hang."""
        hung = self.lane.longest_write()
        if hung > PATIENT_WRITES * self.lane.deadline:
            raise StorageUnavailable(
                f"a write takes {hung:.0f} s already", self.root, "check the cache path's disk"
            )

    async def write(self, call: Callable[[], T], *, what: str) -> T:
        """Run a step of receiving a file to its end: see `Lane.finish`."""
        with _own_trouble():
            return await self.lane.finish(call, what=what)

    async def commit(self, partial: Partial, *, size: int, mtime_ns: int) -> None:
        """Sync a received file and give it its name; closes it."""
        wanted = Wanted()

        def call() -> None:
            with partial.descriptor as fd:
                held = os.fstat(fd).st_size
                if held != size:
                    raise SourceFailed(f"received {held} of {size} bytes", partial.file)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
                os.fsync(fd)
                _check_name(fd, partial.path)
            wanted.require(partial.path)
            if partial.member is None:
                target = self._final(partial.file)
                os.rename(partial.path, target)
                _sync(target.parent)
            else:
                os.rename(partial.path, partial.path.with_name(partial.member))
            _sync(partial.path.parent)

        try:
            with wanted:
                await self.write(call, what=f"commit copy of {partial.file}")
        finally:
            partial.descriptor.close()

    async def discard(self, partial: Partial) -> None:
        """Give up a partly received file; works in a cancelled scope as well, and never raises."""
        partial.descriptor.close()

        def call() -> None:
            with suppress(FileNotFoundError):
                partial.path.unlink()

        with trio.move_on_after(DISCARD_SECONDS, shield=True):
            try:
                await self.lane.run(call, what=f"discard copy of {partial.file}")
            except SectorFSError as exc:
                log.debug("%s stays until the next start: %s", partial.path, exc)

    async def is_received(self, file: SectorFile, facts: Facts) -> bool:
        """True when files of a sector directory were received that make it whole.

        Those of an older content in its place that are the same count too.
        """
        return await self.lane.run(
            lambda: (
                os.path.isdir(self._fetching(file))
                and all(self._whole_member(file, member) for member in facts.members or ())
            ),
            what=f"look at files of {file}",
        )

    async def complete(self, file: SectorFile, facts: Facts) -> None:
        """Put a received sector directory into place, instead of an older content if any."""
        wanted = Wanted()

        def call() -> None:
            folder, target = self._fetching(file), self._final(file)
            names = {member.name for member in facts.members or ()}
            for name in os.listdir(folder):
                if name not in names:
                    wanted.require(folder)
                    (folder / name).unlink()
            for member in facts.members or ():
                found = self._whole_member(file, member)
                if found is None:
                    raise SourceFailed(f"lacks {member.name}", file)
                if found.parent != folder:
                    wanted.require(folder)
                    (folder / member.name).unlink(missing_ok=True)
                    os.link(found, folder / member.name)
            os.utime(folder, ns=(facts.mtime_ns, facts.mtime_ns))
            _sync(folder)
            _replace_directory(folder, target, wanted)
            os.utime(target, ns=(facts.mtime_ns, facts.mtime_ns))
            _sync(target.parent)
            _sync(folder.parent)

        with wanted:
            await self.lane.finish(call, what=f"complete copy of {file}")

    async def exists(self, file: SectorFile) -> bool:
        """True when something lies at the copy's final name."""
        return await self.lane.run(self._final(file).exists, what=f"look for copy of {file}")

    def path_of(self, file: SectorFile, member: str | None = None) -> Path:
        """Where a whole copy lies."""
        return self._final(file) / member if member else self._final(file)

    # --- blocking parts ---

    def _final(self, file: SectorFile) -> Path:
        return self.root / file.file_type.dir_name / file.sector.name

    def _fetching(self, file: SectorFile) -> Path:
        return self.root / file.file_type.dir_name / "fetching" / file.sector.name

    def _partial_place(self, file: SectorFile, member: str | None) -> tuple[Path, str]:
        """Folder and name of a partial file, without its suffixes."""
        folder = self._fetching(file)
        return (folder.parent, folder.name) if member is None else (folder, member)

    def _finished_paths(self, file: SectorFile, member: str | None) -> list[Path]:
        if member is None:
            return [self._final(file)]
        # The last once more: the directory may be put into place between the first two looks.
        final = self._final(file) / member
        return [final, self._fetching(file) / member, final]

    def _whole_member(self, file: SectorFile, member: MemberFacts) -> Path | None:
        """Where the present content of a file in a directory lies."""
        for folder in (self._fetching(file), self._final(file)):
            with suppress(FileNotFoundError, NotADirectoryError):
                if _matches((folder / member.name).lstat(), member.size, member.mtime_ns):
                    return folder / member.name
        return None

    def _open_matching(self, path: Path, size: int, mtime_ns: int) -> OpenFile | None:
        try:
            fd = open_to_read(str(path), os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            status = os.fstat(fd)
            matches = _matches(status, size, mtime_ns)
            file_system = self._file_systems.local(fd, status.st_dev) if matches else ""
        except OSError:
            os.close(fd)
            raise
        if not matches:
            os.close(fd)
            return None
        return OpenFile(
            descriptor=self.lane.descriptor(fd),
            size=size,
            mtime_ns=mtime_ns,
            inode=status.st_ino,
            storage=self.storage,
            path=str(path),
            lane=self.lane,
            file_system=file_system,
        )

    def _begin(
        self, file: SectorFile, member: str | None, size: int, archive: bool, wanted: Wanted
    ) -> Partial:
        self._check_room(size)
        folder = self._fetching(file)
        if member is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            path = folder
            if path.is_dir():
                wanted.require(path)
                shutil.rmtree(path)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / (f"{member}~tar.tmp" if archive else f"{member}.tmp")
        wanted.require(path)
        with suppress(FileNotFoundError):
            path.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        return Partial(file, member, path, self.lane.descriptor(os.open(path, flags, 0o644)))

    def _check_room(self, size: int, already: Path | None = None) -> None:
        """Raise unless a file of this size may come, some of which may be there `already`."""
        try:
            check_identity(str(self.root), self.storage)
        except PathLost as exc:
            raise StorageUnavailable(
                f"the cache path is gone: {exc.what}",
                self.root,
                "restart the node to make it again",
            ) from exc
        present = 0
        if already is not None:
            with suppress(FileNotFoundError):
                present = already.stat().st_blocks * BLOCK
        room = os.statvfs(self.root)
        free = room.f_bavail * room.f_frsize
        if size - present + ROOM_LEFT > free:
            raise DiskFull(
                f"{size} bytes to fetch, {free} free", self.root, "make room in the cache path"
            )

    def _clear_leftovers(self) -> tuple[list[Leftover], int]:
        check_identity(str(self.root), self.storage)
        return unfinished.clear(self.root)


def _throw_away(late: Partial) -> None:
    """Remove a temporary file that came when nobody waited for it any more; in a thread."""
    with suppress(OSError, SectorFSError):
        with late.descriptor as fd:
            _check_name(fd, late.path)
        late.path.unlink()
    late.descriptor.close()


def _replace_directory(folder: Path, target: Path, wanted: Wanted) -> None:
    """Rename a directory to a name under which an older content may lie.

    The older content's declaration was dropped before.
    """
    aside = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    wanted.require(folder)
    if target.exists():
        os.rename(target, aside)
    wanted.require(folder)
    os.rename(folder, target)
    shutil.rmtree(aside, ignore_errors=True)


def _matches(status: os.stat_result, size: int, mtime_ns: int) -> bool:
    """A regular file with this size and time."""
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_size == size
        and content.same_mtime(status.st_mtime_ns, mtime_ns)
    )


def _check_name(fd: int, path: Path) -> None:
    """`DiskError` unless `path` is the open file: what is renamed must be what was received.

    A call that hung in the disk and was given up may make its temporary file, in place of that of
    the fetch that came after it, at any later time.
    """
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return
    raise DiskError("the temporary file was replaced", path, "open it again")


@contextmanager
def _own_trouble() -> Iterator[None]:
    """Errors of the cache path that could be taken for answers of a source become `DiskError`."""
    try:
        yield
    except (NotFound, PermissionRefused) as exc:
        raise DiskError(exc.what, exc.thing, exc.hint) from exc


def _close(found: OpenFile | None) -> None:
    if found is not None:
        found.close()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
