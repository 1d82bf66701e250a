"""Open files and open directories of the mount.

Reading: `preadv(RWF_NOWAIT)` on the loop, where a cached read costs 11 µs against 63 µs through a
thread. Whatever that leaves (cold pages, a file system without RWF_NOWAIT, a short count) is read
in the lane of the file's storage, with its bound and its deadline. A short count is completed and
never replied: the kernel takes a short reply for the end of the file.

Opening proves that the bytes belong to the inode: the name must still stand for the inode's content
and the opened file must have the size the inode shows. Otherwise the answer is ESTALE, upon which
the kernel looks the name up again and opens what it finds then.

Files of other nodes that are read while they come answer for themselves (`StreamFile`); there is no
descriptor of theirs for the kernel to read past the daemon.

Files on local disks are opened once for all handles of an inode and kept for a while (`backing`);
any other file is opened for each handle anew, because asking whether it is still the same may wait.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, Protocol, TypeVar

import msgspec
import trio

from sectorfs.errors import BadInput, SectorFSError, Stale, StorageUnavailable, from_os
from sectorfs.fuse.backing import Backing, BackingFiles, Kernel, Policy, kept_limit
from sectorfs.fuse.inodes import Content, InodeKey, InodeTable
from sectorfs.fuse.tree import Listing, Tree
from sectorfs.index.content import same_mtime
from sectorfs.metrics import OPEN_FILES
from sectorfs.stores.lanes import Descriptor
from sectorfs.stores.protocol import OpenFile, SectorStore, StreamFile
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_READ = 1 << 20
"""Largest read that is tried on the loop, and the most today's kernels ask for."""
SILENT_SECONDS = 1.0
"""For so long a file whose disk let a deadline pass is not read again: the kernel repeats a read
whose read-ahead failed, and the reader would wait for a second deadline."""
STALE_PATIENCE = 5.0
"""Seconds an open waits for the catalog to learn of changed content before it answers ESTALE."""

TIDY_SECONDS = 2.0
"""So often the files that are kept are looked at: one that was removed takes room till then."""

OnStale = Callable[[SectorFile, str | None, OpenFile], Awaitable[None]]
"""Told that an opened file differs from its declaration; returns once the catalog may know."""
ReadPath = Literal["passthrough", "daemon", "stream"]
"""Whether the kernel reads a file itself, the daemon does, or it comes from another node."""
Invalidate = Callable[[SectorFile, str | None], None]
"""Makes the kernel forget a name; never waits."""


class _File:
    __slots__ = ("backing", "nowait", "number", "opened", "silent_until")

    def __init__(self, number: int, opened: OpenFile, backing: Backing | None = None) -> None:
        self.number = number
        self.opened = opened
        self.backing = backing
        """None for a file of one handle."""
        self.nowait = True  # until its file system says that it knows no RWF_NOWAIT
        self.silent_until = -math.inf


class _Streamed:
    __slots__ = ("backing", "number", "opened")

    def __init__(self, number: int, opened: StreamFile) -> None:
        self.number = number
        self.opened = opened
        self.backing = None


class Interruptible(Protocol):
    """Ends work whose reader was killed."""

    def __call__(self, work: Awaitable[T], /) -> Awaitable[T]:
        """The result of `work`. Only for what waits: it costs a third of a read of 4 KiB."""


class OpenCounts(msgspec.Struct, frozen=True):
    """Open files of the mount by the way they are read."""

    passthrough: int
    daemon: int
    stream: int
    kept: int
    """Files that nobody has open, kept open for the next reader."""


class Handles:
    """What the kernel has open. `close_all` at the end of the mount."""

    def __init__(
        self,
        store: SectorStore,
        tree: Tree,
        inodes: InodeTable,
        *,
        on_stale: OnStale,
        invalidate: Invalidate,
        interruptible: Interruptible,
        kernel: Kernel,
        policy: Policy,
    ) -> None:
        self._store = store
        self._tree = tree
        self._inodes = inodes
        self._on_stale = on_stale
        self._invalidate = invalidate
        self._interruptible = interruptible
        self._files: dict[int, _File | _Streamed] = {}
        # How often an inode is open on files of one handle each, and so through the daemon.
        self._single: Counter[int] = Counter()
        self._streamed: Counter[int] = Counter()  # those of them that come from other nodes
        self._directories: dict[int, Listing] = {}
        self._last = 0
        self._shared = bytearray(MAX_READ)
        self.backing = BackingFiles(
            kernel, policy, limit=kept_limit(), on_close=self._backing_closed
        )
        OPEN_FILES.set_function(lambda: self.open_files)  # some are opened without Python

    @property
    def open_files(self) -> int:
        """Regular files open now."""
        return self._single.total() + sum(opens for _, opens in self.backing.in_use())

    def counts(self) -> OpenCounts:
        """How the files open now are read."""
        past, stream = sum(self.passed().values()), self._streamed.total()
        return OpenCounts(past, self.open_files - past - stream, stream, self.backing.idle)

    def read_path(self, number: int, storage: StorageID | None, file_system: str) -> ReadPath:
        """How an inode is read, or would be were it opened on a storage now."""
        if number in self._streamed:
            return "stream"
        entry = self.backing.get(number)
        if entry is not None and entry.backing_id:
            return "passthrough"
        key = self._inodes.key(number)
        if number in self._single or storage is None or key is None or key.content is None:
            return "daemon"
        passes = self.backing.passes(storage, key.content.size, file_system)
        return "passthrough" if passes else "daemon"

    def passed(self) -> Counter[StorageID]:
        """How many files of each storage are open past the daemon, which cannot help them."""
        counts: Counter[StorageID] = Counter()
        for entry, opens in self.backing.in_use():
            if entry.backing_id:
                counts[entry.opened.storage] += opens
        return counts

    def in_hand(self, storage: StorageID) -> dict[SectorFile, bool]:
        """Sector files of a storage that are open (True), or kept open for the next reader."""
        found = dict.fromkeys((entry.key.file for entry in self.backing.kept_of(storage)), False)
        return found | dict.fromkeys(self._open_of(storage), True)

    def let_go(self, file: SectorFile, storage: StorageID) -> bool:
        """Close what is only kept open of a sector file; True when nobody has it open there."""
        self.backing.changed(file)
        return file not in self._open_of(storage)

    def _open_of(self, storage: StorageID) -> set[SectorFile]:
        found = {
            entry.key.file for entry, _ in self.backing.in_use() if entry.opened.storage == storage
        }
        for file in self._files.values():
            key = self._inodes.key(file.number) if file.backing is None else None
            if key is not None and file.opened.storage == storage:
                found.add(key.file)
        return found

    async def keep_tidy(self) -> None:
        """Close files that were kept long enough; until cancelled."""
        while True:
            await trio.sleep(TIDY_SECONDS)
            await self.backing.tidy()

    def backing_id(self, handle: int) -> int:
        """How the kernel is to read an open file: by this id, or 0 for through the daemon."""
        entry = self._file(handle).backing
        return entry.backing_id if entry is not None else 0

    async def open(self, number: int) -> int:
        """Open an inode for reading and return its file handle."""
        entry = self.backing.get(number)
        if entry is not None and self._is_current(entry):
            self.backing.acquire(entry, daemon=number in self._single)
            return entry.handle
        key = self._inodes.pin(number)
        if key is None:
            raise Stale("no such inode", f"inode {number}", "open the file again")
        try:
            if key.content is None:
                await self._store.learn(key.file)
                self._require_current(key)
            opened = await self._store.open(key.file, key.member)
            try:
                await self._prove(key, opened)
                return self._admit(number, key, opened)
            except BaseException:
                opened.close()
                raise
        except BaseException:
            self._inodes.unpin(number)
            raise

    def _admit(self, number: int, key: InodeKey, opened: OpenFile | StreamFile) -> int:
        """Give a proved file to the inode; takes it and the inode's pin over unless it raises."""
        entry = self.backing.get(number)
        if entry is not None:
            if isinstance(opened, OpenFile) and entry.confirm(opened):
                # Somebody else opened it meanwhile, or its times changed.
                opened.close()
                self._inodes.unpin(number)
                self.backing.acquire(entry, daemon=number in self._single)
                return entry.handle
            self._part(entry)
        handle = self._next()
        if not isinstance(opened, OpenFile):
            self._single[number] += 1
            self._streamed[number] += 1
            self._files[handle] = _Streamed(number, opened)
        elif opened.file_system:
            entry = self.backing.add(number, key, handle, opened, daemon=number in self._single)
            self._files[handle] = _File(number, opened, entry)
        else:
            self._single[number] += 1
            self._files[handle] = _File(number, opened)
        return handle

    def _part(self, entry: Backing) -> None:
        """Keep another file of the same content apart from the one its inode is open on.

        Read past the daemon, an inode can have no second file. So whoever opens the name next finds
        it under another number, while those who have it open keep theirs.
        """
        if self.backing.is_passed(entry):
            self._inodes.retire(entry.number)
            self._invalidate(entry.key.file, entry.key.member)
            raise Stale("is open on a file that was replaced", entry.key.file, "open it again")
        self.backing.part(entry)

    def _is_current(self, entry: Backing) -> bool:
        key = entry.key
        return self._tree.current(key.file, key.member) == key and entry.unchanged

    async def read(self, handle: int, offset: int, size: int) -> bytes | memoryview:
        """Bytes at `offset`, fewer than `size` only at the end of the file.

        A view is of the buffer all reads share: it is good until the caller's next `await`. (A
        fresh megabyte per read halves the rate: the kernel has to find and clear 256 pages.)
        """
        file = self._file(handle)
        if isinstance(file, _Streamed):
            data = file.opened.read_nowait(offset, size)
            if data is None:
                data = await self._interruptible(file.opened.read(offset, size))
            return data
        want = min(size, file.opened.size - offset)
        if want <= 0 or offset < 0:
            return b""
        have = self._read_nowait(file, offset, want) if file.nowait and want <= MAX_READ else 0
        if have == want:
            return memoryview(self._shared)[:want]
        buffer = bytearray(want)
        buffer[:have] = memoryview(self._shared)[:have]
        call = partial(_read_rest, file.opened.descriptor, buffer, offset, have)
        length = await self._in_lane(file, call)
        return memoryview(buffer)[:length]

    async def _in_lane(self, file: _File, call: Callable[[], int]) -> int:
        if trio.current_time() < file.silent_until:
            raise StorageUnavailable("did not answer the last read in time", file.opened.path)
        try:
            return await self._interruptible(file.opened.lane.run(call, what="read"))
        except StorageUnavailable:
            file.silent_until = trio.current_time() + SILENT_SECONDS
            raise

    def release(self, handle: int) -> None:
        """Close an open file, for one of those who have it open."""
        file = self._file(handle)
        entry = file.backing
        if entry is not None and not entry.opens:
            raise BadInput("no such file handle", handle)
        if entry is not None:
            self.backing.release(entry)
            return
        del self._files[handle]
        _count_down(self._single, file.number)
        if isinstance(file, _Streamed):
            _count_down(self._streamed, file.number)
        self._inodes.unpin(file.number)
        file.opened.close()

    async def learn(self, number: int) -> bool:
        """Find out what a directory holds that nobody told of; False when that was not needed.

        Nodes of other programs declare sectors without a word on their files. An empty listing
        would be a lie that makes copies of the tree incomplete.
        """
        file = self._tree.untold(number)
        if file is None:
            return False
        await self._store.learn(file)
        return True

    def open_directory(self, number: int) -> int:
        """Take a snapshot of a directory's names and return its handle."""
        listing = self._tree.listing(number)
        handle = self._next()
        self._directories[handle] = listing
        return handle

    def directory(self, handle: int, *, rewind: bool = False) -> Listing:
        """The snapshot behind a handle, or a new one from which it is read from the start."""
        try:
            listing = self._directories[handle]
        except KeyError:
            raise BadInput("no such directory handle", handle) from None
        if rewind:
            listing = self._directories[handle] = self._tree.listing(listing.directory)
        return listing

    def release_directory(self, handle: int) -> None:
        """Forget a snapshot."""
        if self._directories.pop(handle, None) is None:
            raise BadInput("no such directory handle", handle)

    def close_all(self) -> None:
        """Close what the kernel did not release, because its connection ended first."""
        self.backing.close_all()
        for handle, file in list(self._files.items()):
            try:
                self.release(handle)
            except OSError as exc:
                log.warning("%s: close: %s", file.opened.path, exc)
        self._directories.clear()

    def _backing_closed(self, entry: Backing) -> None:
        del self._files[entry.handle]
        self._inodes.unpin(entry.number)

    def _next(self) -> int:
        self._last += 1
        return self._last

    def _file(self, handle: int) -> _File | _Streamed:
        try:
            return self._files[handle]
        except KeyError:
            raise BadInput("no such file handle", handle) from None

    def _require_current(self, key: InodeKey) -> None:
        """`Stale` once it is known what the file is: then the name leads to another inode."""
        if self._tree.current(key.file, key.member) != key:
            self._invalidate(key.file, key.member)
            raise Stale("is known better by now", key.file, "open the file again")

    async def _prove(self, key: InodeKey, opened: OpenFile | StreamFile) -> None:
        """Return when the opened bytes are the inode's content, else raise `Stale`."""
        if self._tree.current(key.file, key.member) == key:
            if self._same(key, opened):
                return
            if isinstance(opened, OpenFile):
                where = opened.storage
                log.info("%s: content differs from its declaration in %s", key.file, where)
                await self._report(key, opened)
        self._invalidate(key.file, key.member)
        raise Stale("content changed", key.file, "open the file again")

    async def _report(self, key: InodeKey, opened: OpenFile) -> None:
        try:
            with trio.move_on_after(STALE_PATIENCE):
                await self._on_stale(key.file, key.member, opened)
        except SectorFSError as exc:
            log.warning("%s: changed content could not be declared: %s", key.file, exc)

    def _same(self, key: InodeKey, opened: OpenFile | StreamFile) -> bool:
        if key.content == Content(opened.size, opened.mtime_ns):
            return True  # whatever was last heard of this copy: it may be a fresh one
        if key.content is None or key.content.size != opened.size:
            return False
        # Copies of one content may differ in their times; one copy and its own declaration not.
        declared = self._tree.declared(key.file, key.member, opened.storage)
        return declared is None or (
            declared.size == opened.size and same_mtime(declared.mtime_ns, opened.mtime_ns)
        )

    def _read_nowait(self, file: _File, offset: int, want: int) -> int:
        view = memoryview(self._shared)[:want]
        try:
            with file.opened.descriptor as fd:
                return os.preadv(fd, [view], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise from_os(exc, "read", file.opened.path) from exc
            file.nowait = False
            return 0


def _count_down(counts: Counter[int], number: int) -> None:
    counts[number] -= 1
    if not counts[number]:
        del counts[number]


def _read_rest(descriptor: Descriptor, buffer: bytearray, offset: int, have: int) -> int:
    """Fill `buffer` from position `have` on; returns the bytes it holds when the file ends."""
    view = memoryview(buffer)
    with descriptor as fd:
        while have < len(buffer):
            count = os.preadv(fd, [view[have:]], offset + have)
            if count == 0:
                break
            have += count
    return have
