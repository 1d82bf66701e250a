"""The manifests of this node's files, below ``<repo>/manifests`` and never in a storage path.

``STORAGE/TYPE/SHARD/SECTOR@SIZE-MTIME``, and for the files of a directory
``STORAGE/TYPE/SHARD/SECTOR/NAME@SIZE-MTIME``: a name says of which content it is, so that a file
that changed has no manifest, whatever lies there. The shards are spread by a checksum of the
sector's name; a million sectors make directories of a few hundred entries.

A manifest is written beside its name, synced and renamed: there is a whole one or none. What does
not begin as it should is removed when it is met; whoever gets hashes from here proves them anyway.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from sectorfs.errors import BadInput, DiskFull
from sectorfs.stores import manifest
from sectorfs.stores.lanes import Lane
from sectorfs.stores.manifest import HEADER, Manifest
from sectorfs.stores.metadata import write_atomically
from sectorfs.stores.protocol import OpenFile
from sectorfs.types import Facts, SectorFile, StorageID

log = logging.getLogger(__name__)

SHARDS = 4096
KEPT_OPEN = 64
"""Manifests kept open for the next small read of their files."""
SPARE = 64 << 20
"""Bytes of the repo's disk that manifests leave free: the Index may live there."""
KNOWN_ABSENT = 4096
"""Files that are remembered to have no manifest, so that asking again costs nothing."""

_LONG_NAME = 200  # with size and time behind it a name still fits into 255 bytes


class Key(msgspec.Struct, frozen=True):
    """One content of one regular file of a storage."""

    storage: StorageID
    file: SectorFile
    member: str | None
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """Path of the manifest below the store's root."""
        file, stem = self.file, self.file.sector.name
        parts = [self.storage, file.file_type.dir_name, shard_of(file)]
        if self.member is not None:
            parts.append(stem)
            stem = self.member
            if len(stem) > _LONG_NAME:
                stem = f"~{hashlib.blake2b(stem.encode(), digest_size=16).hexdigest()}"
        return "/".join([*parts, f"{stem}@{self.size}-{self.mtime_ns}"])

    def __str__(self) -> str:
        return f"{self.file}/{self.member}" if self.member else str(self.file)


def keys_of(storage: StorageID, file: SectorFile, facts: Facts) -> list[Key]:
    """The keys of a regular file, or of each file of a directory."""
    if facts.members is None:
        return [Key(storage, file, None, facts.size, facts.mtime_ns)]
    return [Key(storage, file, one.name, one.size, one.mtime_ns) for one in facts.members]


def shard_of(file: SectorFile) -> str:
    """The directory of a sector's manifests among those of its type."""
    return f"{zlib.crc32(file.sector.name.encode()) % SHARDS:03x}"


class ManifestStore:
    """Manifests by file and content. All methods belong to the loop; the repo's disk may hang."""

    def __init__(self, root: Path, *, deadline: float) -> None:
        self.root = root
        self.lane = Lane(str(root), deadline=deadline)
        self._open: OrderedDict[Key, OpenFile] = OrderedDict()
        self._absent: OrderedDict[Key, None] = OrderedDict()
        self._changes = 0  # what was looked for while this grew may have come meanwhile

    async def save(self, key: Key, made: Manifest) -> None:
        """Keep a manifest; it survives a power cut when this returns."""
        assert made.size == key.size
        target = self.root / key.name

        def call() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_atomically(str(target), made.encode(), mode=0o600)
            except FileNotFoundError:  # its directory was just removed for being empty
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(str(target), made.encode(), mode=0o600)

        try:
            await self.lane.finish(call, what=f"keep the manifest of {key}")
        finally:
            self._forget(key)

    async def open(self, key: Key) -> OpenFile | None:
        """The encoded manifest, to be read in part or whole; its caller closes it."""
        if key in self._absent:
            return None
        before = self._changes
        opened = await self.lane.run(
            lambda: self._open_now(key),
            what=f"open the manifest of {key}",
            discard=lambda opened: opened.close() if opened else None,
        )
        if opened is None and before == self._changes:
            self._absent[key] = None
            while len(self._absent) > KNOWN_ABSENT:
                self._absent.popitem(last=False)
        return opened

    async def load(self, key: Key) -> Manifest | None:
        """A whole manifest that proved itself; one that is damaged is removed."""
        if key in self._absent:
            return None
        what = f"read the manifest of {key}"
        try:
            return await self.lane.run(lambda: self._load_now(key), what=what)
        finally:
            self._close_kept(key)

    async def digests(self, keys: Sequence[Key]) -> list[bytes]:
        """The digest of each; empty where there is no manifest."""
        return await self.lane.run(
            lambda: [self._digest_now(key) for key in keys], what="read digests"
        )

    async def absent(self, keys: Sequence[Key]) -> list[Key]:
        """Those that have no manifest."""
        return await self.lane.run(
            lambda: [key for key in keys if not os.path.exists(self.root / key.name)],
            what="look for manifests",
        )

    async def require_room(self, key: Key) -> None:
        """`DiskFull` when the repo's disk has no room for another manifest, and some to spare."""
        needed = manifest.encoded_size(key.size) + SPARE

        def call() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            found = os.statvfs(self.root)
            if found.f_bavail * found.f_frsize < needed:
                raise DiskFull("no room for manifests", self.root, "make room")

        await self.lane.run(call, what="look for room for manifests")

    async def leaves(self, key: Key, blocks: Sequence[int]) -> bytes | None:
        """The leaf hashes of some blocks, one after the other; None where there is no manifest."""
        opened = self._open.get(key)
        if opened is None:
            opened = await self.open(key)
            if opened is None:
                return None
            self._keep(key, opened)
        self._open.move_to_end(key)
        spans = [manifest.leaves_at(key.size, block) for block in blocks]
        descriptor = opened.descriptor
        with descriptor as fd, suppress(BlockingIOError):
            found = b"".join([_read_cached(fd, length, offset) for offset, length in spans])
            if len(found) == sum(length for _, length in spans):
                return found

        def call() -> bytes:
            with descriptor as fd:
                return b"".join([os.pread(fd, length, offset) for offset, length in spans])

        return await self.lane.run(call, what=f"read the manifest of {key}")

    async def remove(self, keys: Sequence[Key]) -> None:
        """Forget manifests; one that does not exist is fine."""
        await self.remove_names([key.name for key in keys])

    async def shards(self, storage: StorageID) -> list[str]:
        """The directories, ``STORAGE/TYPE/SHARD``, that hold manifests of a storage."""

        def call() -> list[str]:
            return [
                f"{storage}/{kind}/{shard}"
                for kind in _names(self.root / storage)
                for shard in _names(self.root / storage / kind)
            ]

        return await self.lane.run(call, what="list manifests")

    async def names(self, shard: str) -> dict[str, list[str]]:
        """What lies in a shard: paths below the root by the name of their sector."""

        def call() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            for entry in _names(self.root / shard):
                sector = entry.partition("@")[0]
                inner = [] if "@" in entry else _names(self.root / shard / entry)
                names = [f"{shard}/{entry}/{name}" for name in inner] or [f"{shard}/{entry}"]
                found.setdefault(sector, []).extend(names)
            return found

        return await self.lane.run(call, what="list manifests")

    async def remove_names(self, names: Sequence[str]) -> None:
        """Remove files that `names` told of, and directories that are left empty."""

        def call() -> None:
            for name in names:
                path = self.root / name
                with suppress(FileNotFoundError, IsADirectoryError):
                    os.unlink(path)
                with suppress(OSError):
                    os.rmdir(path.parent)
                    os.rmdir(path.parent.parent)

        try:
            await self.lane.run(call, what="remove manifests")
        finally:
            gone = frozenset(names)
            for key in [key for key in self._open if key.name in gone]:
                self._close_kept(key)

    def close(self) -> None:
        """Close what is kept open."""
        while self._open:
            self._open.popitem()[1].close()

    def _keep(self, key: Key, opened: OpenFile) -> None:
        self._close_kept(key)
        self._open[key] = opened
        while len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)[1].close()

    def _close_kept(self, key: Key) -> None:
        kept = self._open.pop(key, None)
        if kept is not None:
            kept.close()

    def _forget(self, key: Key) -> None:
        """There is another manifest now, or may be."""
        self._changes += 1
        self._absent.pop(key, None)
        self._close_kept(key)

    # --- blocking parts ---

    def _open_now(self, key: Key) -> OpenFile | None:
        path = str(self.root / key.name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            found = os.fstat(fd)
            trouble = _trouble(os.pread(fd, HEADER, 0), found.st_size, key)
            if not trouble:
                return OpenFile(
                    descriptor=self.lane.descriptor(fd),
                    size=found.st_size,
                    mtime_ns=key.mtime_ns,
                    inode=found.st_ino,
                    storage=key.storage,
                    path=path,
                    lane=self.lane,
                )
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        self._drop_now(key, trouble)
        return None

    def _load_now(self, key: Key) -> Manifest | None:
        try:
            data = (self.root / key.name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        trouble = _trouble(data, len(data), key)
        if not trouble:
            try:
                return Manifest.decode(data)
            except BadInput as exc:
                trouble = exc.what
        self._drop_now(key, trouble)
        return None

    def _digest_now(self, key: Key) -> bytes:
        opened = self._open_now(key)
        if opened is None:
            return b""
        with opened.descriptor as fd:
            header = os.pread(fd, HEADER, 0)
        opened.close()
        return manifest.parse_header(header)[1]

    def _drop_now(self, key: Key, trouble: str) -> None:
        log.warning("%s: not a manifest of this file, removed: %s", self.root / key.name, trouble)
        with suppress(FileNotFoundError):
            os.unlink(self.root / key.name)


def _trouble(data: bytes, length: int, key: Key) -> str:
    """Why bytes do not begin a manifest of this file; empty when they do."""
    try:
        size, _ = manifest.parse_header(data)
    except BadInput as exc:
        return exc.what
    if size != key.size:
        return f"is of a file of {size} bytes"
    wanted = manifest.encoded_size(size)
    return "" if length == wanted else f"has {length} bytes instead of {wanted}"


def _names(folder: Path) -> list[str]:
    """The entries of a directory but temporary ones; none where there is no directory."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_cached(fd: int, length: int, offset: int) -> bytes:
    """What the kernel has at hand; fewer bytes, or `BlockingIOError`, where it has not."""
    buffer = bytearray(length)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return b""
        raise
    return bytes(buffer[:count])
