"""A partly present file: a sparse data file, and beside it a map of the pieces it surely has.

Layout of ``NAME.part`` and ``NAME.map``: the data file has its whole length from the start and
carries, as extended attribute `IDENTITY`, a JSON object that says which content it is a part of.
The map is a header of `HEADER` bytes (magic, version, data size, piece size, generation) and one
bit per piece of `PIECE` bytes, the lowest bit of each byte first; the last piece may be short.

Order: bytes, ``fdatasync``, marks. So a crash or a power cut may lose marks and never makes one
lie: a bit is only ever set, and only when its bytes are durable. The same generation stands in the
attribute and in the header, or a map that outlived another data file would be believed.

What came while nobody told the digest of the content is *doubtful* once somebody does: it is not
present until it was proved, piece by piece; when that is done the file says so of itself (`adopt`).

Bytes at an offset of one data file are ever the same. That is why any call here may be given up
when its disk hangs: whatever a late thread still writes is what belongs there. On a file system
without extended attributes everything works, but nothing is resumed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import trio
import xattr

from sectorfs.errors import DiskError, SourceFailed
from sectorfs.stores.intervals import Intervals
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.wanted import Wanted

PIECE = 64 << 10
"""Bytes per mark, and what a small read is rounded to."""
BLOCK = 1 << 20
"""Bytes that are asked for, proved and kept together where more than a piece is wanted."""
HEADER = 4096
IDENTITY = "user.sectorfs.identity"
DATA_SUFFIX = ".part"
MAP_SUFFIX = ".map"

_HEADER = struct.Struct("<8sIQI16s")
_MAGIC = b"sfs-map\0"
_VERSION = 1
_RUNS = re.compile("1+")


class Identity(msgspec.Struct, frozen=True):
    """Which content a partial file is a part of."""

    size: int
    mtime_ns: int
    etag: str = ""
    """Of the source whose bytes came first; empty when it gave none."""
    digest: str = ""


class _Stored(msgspec.Struct, frozen=True):
    """The extended attribute."""

    identity: Identity
    generation: str


class PartialFile:
    """A file whose bytes arrive in any order. All methods belong to the loop."""

    def __init__(
        self, path: Path, identity: Identity, lane: Lane, files: _Files, found: _Found
    ) -> None:
        self.path = path
        """The data file."""
        self.identity = identity
        self.present = found.present
        """The bytes that can be read from `descriptor`."""
        self.doubtful = found.doubtful
        """Bytes that an earlier run brought, and that have to be proved before they are present."""
        self.resumed = found.present.total
        """Bytes that an earlier run had brought."""
        self._lane = lane
        self._files = files
        self._unsynced = Intervals()
        self._syncing: trio.Event | None = None
        self._doubtful = False

    @classmethod
    async def open(
        cls, lane: Lane, folder: Path, name: str, identity: Identity, *, resume: bool = True
    ) -> PartialFile:
        """Resume the partial file of this content, or begin anew instead of any other."""
        files, found = await lane.run(
            lambda: _open(lane, folder, name, identity, resume=resume),
            what=f"open the partial file {name}",
            discard=lambda opened: opened[0].close(),
        )
        return cls(folder / (name + DATA_SUFFIX), identity, lane, files, found)

    @property
    def descriptor(self) -> Descriptor:
        """Of the data file, for reading what is present and for writing what is not."""
        return self._files.data

    @property
    def unsynced(self) -> int:
        """Present bytes that a crash of the machine would lose."""
        return self._unsynced.total

    @property
    def is_whole(self) -> bool:
        """True once every byte is present."""
        return self.present.total == self.identity.size

    async def write(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Store bytes at their offsets; they are present when it returns."""
        data = self._files.data

        def call() -> None:
            with data as fd:
                for offset, piece in pieces:
                    _write_all(fd, piece, offset)

        await self._lane.run(call, what=f"write to {self.path.name}")
        for offset, piece in pieces:
            self.arrived(offset, offset + len(piece))

    def arrived(self, start: int, end: int) -> None:
        """Bytes that somebody wrote to `descriptor` are present from now on."""
        self.present.add(start, end)
        self._unsynced.add(start, end)

    async def sync(self) -> None:
        """Make what is present durable, then mark it. One runs at a time; others wait for it.

        After one that failed, or was given up, nothing is marked any more: the kernel tells of a
        lost write only once, and the next sync would succeed without it.
        """
        while self._syncing is not None:
            await self._syncing.wait()
        if self._doubtful:
            raise DiskError("an earlier sync failed", self.path, "check the cache path's disk")
        if not self._unsynced:
            return
        present, fresh = self.present.copy(), self._unsynced
        self._unsynced = Intervals()
        self._syncing = trio.Event()
        size, files = self.identity.size, self._files
        try:
            await self._lane.run(
                lambda: files.mark(present, fresh, size), what=f"sync {self.path.name}"
            )
        except BaseException:
            self._doubtful = True
            raise
        finally:
            self._syncing.set()
            self._syncing = None

    async def look(
        self, spans: Sequence[tuple[int, int]], judge: Callable[[bytes], bytes]
    ) -> list[bytes]:
        """What `judge`, in the thread that reads them, says of the bytes at these places."""
        data = self._files.data

        def call() -> list[bytes]:
            with data as fd:
                return [judge(os.pread(fd, end - start, start)) for start, end in spans]

        return await self._lane.run(call, what=f"read {self.path.name}")

    async def adopt(self) -> None:
        """What is doubtful was looked at: what is present from now on is proved, and says so."""
        await self.sync()
        present, identity, files = self.present.copy(), self.identity, self._files
        await self._lane.finish(
            lambda: files.adopt(present, identity), what=f"sync {self.path.name}"
        )
        self.doubtful = Intervals()

    async def finish(self, target: Path) -> None:
        """Sync the whole file, set its time, give it its final name; the map goes last.

        Given up, it shows nothing any more: by then another content may lie at that name.
        """
        if not self.is_whole:
            raise SourceFailed(f"has {self.present.total} of {self.identity.size} bytes", self.path)
        if self._doubtful:
            raise DiskError("an earlier sync failed", self.path, "check the cache path's disk")
        files, path, mtime_ns = self._files, self.path, self.identity.mtime_ns

        def call() -> None:
            with files.data as fd:
                os.utime(fd, ns=(mtime_ns, mtime_ns))
                with suppress(OSError):
                    xattr.xattr(fd).remove(IDENTITY)
                os.fsync(fd)
                _check_name(fd, path)
            wanted.require(path)
            os.rename(path, target)
            _sync_folder(target.parent)
            with suppress(FileNotFoundError):
                os.unlink(path.with_suffix(MAP_SUFFIX))
            _sync_folder(path.parent)

        with Wanted() as wanted:
            await self._lane.finish(call, what=f"commit {path.name}")

    async def remove(self) -> None:
        """Give it up: close and delete both files."""
        self.close()
        path = self.path
        await self._lane.run(lambda: remove(path), what=f"remove {path.name}")

    def close(self) -> None:
        """Close; what is synced is there for the next `open`."""
        self._files.close()


class _Found(msgspec.Struct, frozen=True):
    """What an earlier run left."""

    present: Intervals
    doubtful: Intervals


class _Files:
    """The two descriptors; its methods block."""

    def __init__(self, data: Descriptor, marks: Descriptor) -> None:
        self.data = data
        self.marks = marks

    def mark(self, present: Intervals, fresh: Intervals, size: int) -> None:
        """Make the data durable and set the bits of whole pieces in and around `fresh`."""
        with self.data as fd:
            os.fdatasync(fd)
        with self.marks as fd:
            for start, end in fresh:
                first, last = start // (8 * PIECE), -(-end // (8 * PIECE))
                _write_all(fd, _bits(present, first, last, size), HEADER + first)

    def adopt(self, present: Intervals, identity: Identity) -> None:
        """Clear every mark but those of what is present, and only then name the digest."""
        self.mark(present, Intervals([(0, identity.size)]), identity.size)
        with self.data as fd, self.marks as map_fd:
            os.fdatasync(map_fd)
            stored = _stored(fd)
            if stored is not None:
                named = msgspec.structs.replace(stored, identity=identity)
                xattr.xattr(fd).set(IDENTITY, msgspec.json.encode(named))

    def close(self) -> None:
        self.data.close()
        self.marks.close()


def _bits(present: Intervals, first: int, last: int, size: int) -> bytes:
    """The bytes `first` to `last` (not included) of the map."""
    base, bits = first * 8, 0
    for start, end in present.within(base * PIECE, last * 8 * PIECE):
        low = -(-start // PIECE)
        high = -(-end // PIECE) if end == size else end // PIECE
        if low < high:
            bits |= ((1 << (high - low)) - 1) << (low - base)
    return bits.to_bytes(last - first, "little")


def _open(
    lane: Lane, folder: Path, name: str, identity: Identity, *, resume: bool
) -> tuple[_Files, _Found]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name + DATA_SUFFIX)
    found = _resume(lane, path, identity) if resume else None
    if found is None:
        remove(path)
        found = _begin(lane, path, identity), _Found(Intervals(), Intervals())
    return found


def _begin(lane: Lane, path: Path, identity: Identity) -> _Files:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    generation = secrets.token_bytes(16)
    data = lane.descriptor(os.open(path, flags, 0o644))
    try:
        marks = lane.descriptor(os.open(path.with_suffix(MAP_SUFFIX), flags, 0o644))
    except BaseException:
        data.close()
        raise
    try:
        with data as fd, marks as map_fd:
            os.ftruncate(fd, identity.size)
            header = _HEADER.pack(_MAGIC, _VERSION, identity.size, PIECE, generation)
            _write_all(map_fd, header, 0)
            stored = msgspec.json.encode(_Stored(identity, generation.hex()))
            try:
                xattr.xattr(fd).set(IDENTITY, stored)
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT):
                    raise
    except BaseException:
        data.close()
        marks.close()
        raise
    return _Files(data, marks)


def _resume(lane: Lane, path: Path, identity: Identity) -> tuple[_Files, _Found] | None:
    """The files of an earlier run and what they have; None when they are not of this content."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        data = lane.descriptor(os.open(path, flags))
    except (FileNotFoundError, IsADirectoryError):
        return None
    marks: Descriptor | None = None
    try:
        marks = lane.descriptor(os.open(path.with_suffix(MAP_SUFFIX), flags))
        with data as fd, marks as map_fd:
            found = _load(fd, map_fd, identity)
        if found is not None:
            return _Files(data, marks), found
    except (FileNotFoundError, IsADirectoryError):
        pass
    except BaseException:
        data.close()
        if marks is not None:
            marks.close()
        raise
    data.close()
    if marks is not None:
        marks.close()
    return None


def _load(fd: int, map_fd: int, identity: Identity) -> _Found | None:
    stored = _stored(fd)
    if stored is None or not same(stored.identity, identity):
        return None
    if os.fstat(fd).st_size != identity.size:
        return None
    header = os.pread(map_fd, _HEADER.size, 0)
    wanted = _HEADER.pack(_MAGIC, _VERSION, identity.size, PIECE, bytes.fromhex(stored.generation))
    if header != wanted:
        return None
    pieces = -(-identity.size // PIECE)
    length = -(-pieces // 8)
    marks = os.pread(map_fd, length, HEADER)
    text = f"{int.from_bytes(marks, 'little'):b}"[::-1][:pieces]
    runs = (run.span() for run in _RUNS.finditer(text))
    marked = Intervals((low * PIECE, min(high * PIECE, identity.size)) for low, high in runs)
    if identity.digest and not stored.identity.digest:
        return _Found(Intervals(), marked)
    return _Found(marked, Intervals())


def _stored(fd: int) -> _Stored | None:
    try:
        stored = msgspec.json.decode(xattr.xattr(fd).get(IDENTITY), type=_Stored)
        bytes.fromhex(stored.generation)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, ValueError):
        return None
    return stored


def same(one: Identity, other: Identity) -> bool:
    """The same content: sizes and times agree, and so does what both tell beside them."""
    return (
        (one.size, one.mtime_ns) == (other.size, other.mtime_ns)
        and (not one.digest or not other.digest or one.digest == other.digest)
        and (not one.etag or not other.etag or one.etag == other.etag)
    )


def identity_of(path: Path) -> Identity | None:
    """Which content a data file is a part of; None when it does not say. Blocks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        stored = _stored(fd)
    finally:
        os.close(fd)
    return None if stored is None else stored.identity


def remove(path: Path) -> None:
    """Delete a data file and its map. Blocks."""
    for one in (path.with_suffix(MAP_SUFFIX), path):
        with suppress(FileNotFoundError):
            os.unlink(one)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _check_name(fd: int, path: Path) -> None:
    """`DiskError` unless `path` is the open file: what is renamed must be what was received."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return
    raise DiskError("the partial file was replaced", path, "open it again")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
