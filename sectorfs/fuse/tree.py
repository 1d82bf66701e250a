"""The name space of the mount: root → type directories → sectors → files of sector directories.

Pure: every answer is computed from the catalog and the inode table, at once and without waiting.
Nothing here raises for a name that nobody knows (that is `None`); what raises is misuse by the
caller: a number that is no directory, or that means nothing any more.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Protocol, cast

import msgspec

from sectorfs.errors import NameTooLong, Stale
from sectorfs.fuse.inodes import (
    ROOT,
    Content,
    InodeKey,
    InodeTable,
    Row,
    number_type,
    type_number,
)
from sectorfs.index.protocol import Declaration, StorageStatus
from sectorfs.types import (
    Facts,
    FileType,
    MemberFacts,
    SectorFile,
    SectorID,
    StorageID,
    parse_file_type,
    parse_member_name,
    parse_sector,
)

CACHED_FOR = 300.0
"""Seconds the kernel may keep names and attributes; changes are pushed to it (`notifications`)."""
NEGATIVE_FOR = 1.0
"""Seconds the kernel may remember that a name does not exist."""
NAME_MAX = 255
DOTS = 2
"""Names before all others in a listing: ``.`` and ``..``."""
ALWAYS_SHOWN = frozenset({FileType.UNSEALED, FileType.SEALED, FileType.CACHE})

_DIRECTORY_MODE = stat.S_IFDIR | 0o555
_FILE_MODE = stat.S_IFREG | 0o444


class EntryView(Protocol):
    """What the catalog knows of one sector file."""

    @property
    def facts(self) -> Facts | None:
        """Size and times as the mount shows them."""

    @property
    def declarations(self) -> tuple[Declaration, ...]:
        """Who holds it, by ascending storage."""


class CatalogView(Protocol):
    """What the mount needs of the catalog; every call answers from memory."""

    def entry(self, file: SectorFile) -> EntryView | None:
        """One sector file, or None when nobody declares it."""

    def sectors(self, file_type: FileType) -> Sequence[SectorID]:
        """Sectors with a file of this type, ascending; a snapshot that costs nothing to take."""

    def count(self, file_type: FileType) -> int:
        """How many sectors have a file of this type."""

    def listed(
        self, file_type: FileType, names: Sequence[SectorID], start: int, limit: int
    ) -> list[Row | None]:
        """What is known now of `limit` sectors of a snapshot; None for each that is gone."""

    def types(self) -> frozenset[FileType]:
        """Types that at least one sector file has."""

    def names_changed_ns(self, file_type: FileType) -> int:
        """When a name of this type last appeared or vanished."""

    def storages(self) -> Sequence[StorageStatus]:
        """Every storage."""

    def storage(self, storage: StorageID) -> StorageStatus | None:
        """One storage."""

    def healthy(self, storage: StorageID, now: float, cutoff: float) -> bool:
        """True while a storage's last heartbeat is young and reported no error."""


class Attributes(msgspec.Struct, frozen=True):
    """What `stat` shows of one inode, and how long the kernel may believe it."""

    number: int
    mode: int
    links: int
    size: int
    mtime_ns: int
    valid_for: float = CACHED_FOR

    @property
    def blocks(self) -> int:
        """Blocks of 512 bytes, as `du` counts."""
        return -(-self.size // 512)


class DirectoryEntry(msgspec.Struct, frozen=True):
    """One name of a listing; `key` is None for fixed inodes, which are never counted."""

    name: str
    attributes: Attributes
    key: InodeKey | None


_Names = tuple[FileType, ...] | Sequence[SectorID] | tuple[MemberFacts, ...]


class Listing(msgspec.Struct, frozen=True):
    """The names of a directory as they were when reading it began."""

    directory: int
    names: _Names

    @property
    def file_type(self) -> FileType | None:
        """The type, when it is a type's directory."""
        return number_type(self.directory)


class Tree:
    """The tree of one mount."""

    def __init__(
        self,
        catalog: CatalogView,
        inodes: InodeTable,
        *,
        types: Collection[str] = (),
        guess: Callable[[SectorFile], int] = lambda file: 0,
    ) -> None:
        """`guess` tells how long a file probably is whose length nobody told."""
        self._catalog = catalog
        self._inodes = inodes
        self._guess = guess
        self.always_shown = ALWAYS_SHOWN | {parse_file_type(name) for name in types}
        """Types whose directory exists even while it is empty."""

    def lookup(self, parent: int, name: bytes) -> DirectoryEntry | None:
        """The entry of this name; None when there is none, `NameTooLong` beyond 255 bytes."""
        if len(name) > NAME_MAX:
            raise NameTooLong(f"a name of {len(name)} bytes", f"inode {parent}")
        if name == b".":
            return self._itself(parent)
        if name == b"..":
            return self._itself(self.parent(parent))
        try:
            text = name.decode("ascii")
        except UnicodeDecodeError:
            return None
        try:
            return self._named(parent, text)
        except ValueError:
            return None

    def attributes(self, number: int) -> Attributes:
        """The attributes of an inode the kernel holds; `Stale` for any other."""
        if number == ROOT:
            return self._root()
        file_type = number_type(number)
        if file_type is not None:
            return self._type_directory(file_type)
        return self._attributes(number, self.held(number))

    def held(self, number: int) -> InodeKey:
        """What a hashed number means; `Stale` when the kernel should not know it."""
        key = self._inodes.key(number)
        if key is None:
            raise Stale("no such inode", f"inode {number}", "open the file again")
        return key

    def current(self, file: SectorFile, member: str | None = None) -> InodeKey | None:
        """What this name stands for now; None when it does not exist."""
        entry = self._catalog.entry(file)
        if entry is None:
            return None
        if member is not None:
            facts = entry.facts.member(member) if entry.facts else None
            return _member_key(file, facts) if facts else None
        if file.file_type.is_directory:
            return InodeKey(file)
        facts_of_file = entry.facts
        content = Content(facts_of_file.size, facts_of_file.mtime_ns) if facts_of_file else None
        return InodeKey(file, None, content)

    def untold(self, number: int) -> SectorFile | None:
        """The sector directory behind an inode when nobody told which files it has, else None."""
        if number == ROOT or number_type(number) is not None:
            return None
        key = self.held(number)
        entry = self._catalog.entry(key.file) if key.is_directory else None
        return key.file if entry is not None and entry.facts is None else None

    def declared(self, file: SectorFile, member: str | None, storage: StorageID) -> Content | None:
        """What one storage said of its copy; None when it said nothing."""
        entry = self._catalog.entry(file)
        for declaration in entry.declarations if entry else ():
            if declaration.storage == storage and declaration.facts is not None:
                facts = declaration.facts.member(member) if member else declaration.facts
                return Content(facts.size, facts.mtime_ns) if facts else None
        return None

    def parent(self, number: int) -> int:
        """The directory above; the root is above itself."""
        if number == ROOT or number_type(number) is not None:
            return ROOT
        key = self.held(number)
        if key.member is None:
            return type_number(key.file.file_type)
        return self._inodes.number(InodeKey(key.file))

    def shown_types(self) -> tuple[FileType, ...]:
        """The types that have a directory now, by their bit."""
        return tuple(sorted(self.always_shown | self._catalog.types()))

    def listing(self, number: int) -> Listing:
        """A snapshot of a directory's names; `Stale` when it is no directory."""
        if number == ROOT:
            return Listing(number, self.shown_types())
        file_type = number_type(number)
        if file_type is not None:
            return Listing(number, self._catalog.sectors(file_type))
        key = self.held(number)
        if not key.is_directory:
            raise Stale("not a directory", key.file)
        entry = self._catalog.entry(key.file)
        facts = entry.facts if entry else None
        return Listing(number, (facts.members if facts else None) or ())

    def entries(self, listing: Listing, start: int = 0) -> Iterator[tuple[int, DirectoryEntry]]:
        """Names from position `start` on, each with the position after it.

        Positions 1 and 2 are the dots. A name that vanished since the snapshot is left
        out; the others show what is known now.
        """
        yield from self.dots(listing, start)
        names = listing.names
        for position in range(max(0, start - DOTS), len(names)):
            found = self._listed(listing.directory, names[position])
            if found is not None:
                yield position + DOTS + 1, found

    def dots(self, listing: Listing, start: int = 0) -> Iterator[tuple[int, DirectoryEntry]]:
        """The first names of every listing, as `entries` has them."""
        if start < 1:
            yield 1, _renamed(self._itself(listing.directory), ".")
        if start < DOTS:
            yield DOTS, _renamed(self._itself(self.parent(listing.directory)), "..")

    def rows(self, listing: Listing, start: int, limit: int) -> list[Row | None]:
        """Names of a type's directory from position `start` on, after the dots, in bulk."""
        file_type, names = listing.file_type, listing.names
        assert file_type is not None
        rows = self._catalog.listed(
            file_type, cast("Sequence[SectorID]", names), start - DOTS, limit
        )
        if file_type.is_directory or all(row is None or row[4] for row in rows):
            return rows
        return [row and self._guessed(file_type, row) for row in rows]

    def _guessed(self, file_type: FileType, row: Row) -> Row:
        """A row whose size is a guess unless somebody told it."""
        miner, number, _, mtime_ns, told = row
        if told:
            return row
        size = self._guess(SectorFile(file_type, SectorID(miner, number)))
        return miner, number, size, mtime_ns, told

    def pattern(self, directory: int) -> Attributes:
        """What the names of a type's directory have in common."""
        file_type = number_type(directory)
        if file_type is not None and file_type.is_directory:
            return Attributes(0, _DIRECTORY_MODE, 2, 0, 0)
        return Attributes(0, _FILE_MODE, 1, 0, 0)

    def _named(self, parent: int, name: str) -> DirectoryEntry | None:
        if parent == ROOT:
            file_type = parse_file_type(name)
            return self._fixed(file_type) if file_type in self.shown_types() else None
        file_type_above = number_type(parent)
        if file_type_above is not None:
            return self._sector_entry(file_type_above, parse_sector(name))
        directory = self.held(parent)
        if not directory.is_directory:
            return None
        key = self.current(directory.file, parse_member_name(name))
        return self._entry(name, key) if key else None

    def _listed(
        self, directory: int, name: FileType | SectorID | MemberFacts
    ) -> DirectoryEntry | None:
        if isinstance(name, FileType):
            return self._fixed(name)
        if isinstance(name, SectorID):
            file_type = number_type(directory)
            assert file_type is not None
            return self._sector_entry(file_type, name)
        key = self.current(self.held(directory).file, name.name)
        return self._entry(name.name, key) if key else None

    def _sector_entry(self, file_type: FileType, sector: SectorID) -> DirectoryEntry | None:
        key = self.current(SectorFile(file_type, sector))
        return self._entry(sector.name, key) if key else None

    def _fixed(self, file_type: FileType) -> DirectoryEntry:
        return DirectoryEntry(file_type.dir_name, self._type_directory(file_type), None)

    def _entry(self, name: str, key: InodeKey) -> DirectoryEntry:
        return DirectoryEntry(name, self._attributes(self._inodes.number(key), key), key)

    def _itself(self, number: int) -> DirectoryEntry:
        fixed = number == ROOT or number_type(number) is not None
        key = None if fixed else self._inodes.key(number)
        return DirectoryEntry(".", self.attributes(number), key)

    def _root(self) -> Attributes:
        types = self.shown_types()
        changed = max(map(self._catalog.names_changed_ns, types))
        return Attributes(ROOT, _DIRECTORY_MODE, 2 + len(types), 0, changed)

    def _type_directory(self, file_type: FileType) -> Attributes:
        changed = self._catalog.names_changed_ns(file_type)
        sub = self._catalog.count(file_type) if file_type.is_directory else 0
        return Attributes(type_number(file_type), _DIRECTORY_MODE, 2 + sub, 0, changed)

    def _attributes(self, number: int, key: InodeKey) -> Attributes:
        if key.is_directory:
            entry = self._catalog.entry(key.file)
            facts = entry.facts if entry else None
            mtime_ns, valid_for = (facts.mtime_ns, CACHED_FOR) if facts else (0, 0.0)
            return Attributes(number, _DIRECTORY_MODE, 2, 0, mtime_ns, valid_for)
        if key.content is None:
            return Attributes(number, _FILE_MODE, 1, self._guess(key.file), 0, 0.0)
        return Attributes(number, _FILE_MODE, 1, key.content.size, key.content.mtime_ns)


def _member_key(file: SectorFile, facts: MemberFacts) -> InodeKey:
    return InodeKey(file, facts.name, Content(facts.size, facts.mtime_ns))


def _renamed(entry: DirectoryEntry, name: str) -> DirectoryEntry:
    # The kernel counts no look-up for the dots of a listing.
    return DirectoryEntry(name, entry.attributes, None)


class Space(msgspec.Struct, frozen=True):
    """Bytes of the whole tree, as `df` shows them."""

    capacity: int
    available: int


def space(
    storages: Iterable[StorageStatus], filesystem: Callable[[StorageID], Hashable | None]
) -> Space:
    """The sum over the storages; paths that are known to share a file system count once."""
    capacity = available = 0
    seen: set[Hashable] = set()
    for status in storages:
        shared = filesystem(status.info.storage)
        if shared is not None and shared in seen:
            continue
        if shared is not None:
            seen.add(shared)
        capacity += max(0, status.stat.capacity)
        available += max(0, status.stat.available)
    return Space(capacity, available)
