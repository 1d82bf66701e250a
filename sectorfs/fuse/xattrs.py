"""The extended attributes ``user.sectorfs.*``: where a sector file lies and how it is read.

Pure functions of the inode, the catalog and the store's judgement. Nothing is ever listed, so that
``cp -a`` and ``rsync -X`` copy none of them. A name outside ``user.`` answers EOPNOTSUPP and not
ENODATA: ``ls -l`` asks for ``security.*`` and ``system.*`` of every file, and the kernel remembers
only the former answer.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sectorfs.errors import NoAttribute, Unsupported
from sectorfs.fuse.inodes import InodeKey
from sectorfs.fuse.tree import CatalogView
from sectorfs.index.protocol import Declaration
from sectorfs.stores.protocol import Checked, State
from sectorfs.types import SectorFile, StorageID

PREFIX = "user.sectorfs."

LocalPath = Callable[[SectorFile, StorageID], str | None]
"""Path of a sector file on a storage of this node; None when the storage is elsewhere."""


class Location(msgspec.Struct, frozen=True):
    """One copy, in the JSON shape that ``storage find`` prints."""

    storage: str
    primary: bool
    urls: tuple[str, ...]
    path: str | None
    healthy: bool


class Subject(msgspec.Struct, frozen=True):
    """What the attributes of one inode are computed from."""

    file: SectorFile
    state: State
    locations: tuple[Location, ...]
    read_path: str = "daemon"
    pinned: bool = False
    size: int = 0
    present: int | None = None
    """Bytes that are here of a file that is open or coming from another node."""
    checked: Checked = Checked()

    @property
    def preferred(self) -> Location | None:
        """The copy that is read: here before elsewhere, healthy before not, primary before not."""
        ranked = sorted(
            self.locations,
            key=lambda copy: (copy.path is None, not copy.healthy, not copy.primary, copy.storage),
        )
        return ranked[0] if ranked else None


def locations(
    catalog: CatalogView, file: SectorFile, *, local_path: LocalPath, now: float, cutoff: float
) -> tuple[Location, ...]:
    """Every copy of a sector file by ascending storage."""
    entry = catalog.entry(file)
    return tuple(
        Location(
            storage=declaration.storage,
            primary=declaration.primary,
            urls=_urls(catalog, declaration),
            path=local_path(file, declaration.storage),
            healthy=catalog.healthy(declaration.storage, now, cutoff),
        )
        for declaration in (entry.declarations if entry else ())
    )


def value(name: bytes, key: InodeKey | None, describe: Callable[[SectorFile], Subject]) -> bytes:
    """The attribute's value; `NoAttribute` or `Unsupported`. `key` is None for fixed inodes."""
    if not name.startswith(b"user."):
        raise Unsupported("extended attribute outside user.", repr(name))
    text = name.decode("ascii", "replace")
    compute = _VALUES.get(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None
    found = compute(describe(key.file)) if compute and key else None
    if found is None:
        raise NoAttribute("no such attribute", repr(name))
    return found.encode() if isinstance(found, str) else found


def _urls(catalog: CatalogView, declaration: Declaration) -> tuple[str, ...]:
    status = catalog.storage(declaration.storage)
    bases = status.info.urls if status else ()
    return tuple(f"{base.rstrip('/')}/{declaration.file}" for base in bases)


def _locations(subject: Subject) -> bytes:
    return msgspec.json.encode(subject.locations)


def _storage(subject: Subject) -> str | None:
    preferred = subject.preferred
    return preferred.storage if preferred else None


def _digest(subject: Subject) -> str | None:
    return subject.checked.digest.hex() or None


def _progress(subject: Subject) -> str | None:
    if subject.state in ("local", "shared", "cached"):
        return "100"
    if subject.present is not None:
        return str(subject.present * 100 // max(1, subject.size))
    return "0" if subject.state in ("remote", "unavailable") else None


_VALUES: dict[str, Callable[[Subject], str | bytes | None]] = {
    "locations": _locations,
    "state": lambda subject: subject.state,
    "storage": _storage,
    "file_type": lambda subject: subject.file.file_type.dir_name,
    "miner": lambda subject: str(subject.file.sector.miner),
    "number": lambda subject: str(subject.file.sector.number),
    "read_path": lambda subject: subject.read_path,
    "verified": lambda subject: subject.checked.how,
    "digest": _digest,
    "progress": _progress,
    "pinned": lambda subject: "1" if subject.pinned else "0",
}
