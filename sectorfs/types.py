"""Sectors, file types, storage ids and facts: the words every other module speaks.

Values are parsed once, at the door (`parse_*`), into frozen objects; after that no function takes a
bare string for a sector or a type. Names follow the layout of lotus and Curio storage paths:
``<path>/<type>/s-t0<miner>-<number>``, always with a ``t``, on every network.

The values are msgspec structs because the catalog holds millions of them and a struct costs a fifth
of a frozen dataclass to make; they carry no JSON meaning here (wire shapes live in `index.rpc`).
They cannot be part of a circle, so the garbage collector is spared them (``gc=False``).
"""

from __future__ import annotations

import enum
import re
from decimal import Decimal
from typing import NewType

import msgspec

__all__ = [
    "ALL_TYPES",
    "DIGEST_SIZE",
    "DIRECTORY_TYPES",
    "MAX_NUMBER",
    "Facts",
    "FileType",
    "MemberFacts",
    "SectorFile",
    "SectorID",
    "StorageID",
    "file_types",
    "parse_file_type",
    "parse_member_name",
    "parse_sector",
    "parse_size",
    "parse_storage_id",
]

MAX_NUMBER = 2**63 - 1
"""Highest sector number of the chain, and the highest integer SQL's bigint holds."""

DIGEST_SIZE = 32
"""Bytes of a digest."""

StorageID = NewType("StorageID", str)
"""Identity of a storage path: the ``ID`` of its ``sectorstore.json``, usually a UUID."""


class FileType(enum.IntEnum):
    """What a sector file is; the values are the bit flags used on disk, in SQL and in JSON."""

    UNSEALED = 1
    SEALED = 2
    CACHE = 4
    UPDATE = 8
    UPDATE_CACHE = 16
    PIECE = 32
    KEY = 64

    @property
    def dir_name(self) -> str:
        """Name of the type's directory in a storage path, in URLs and in the mount."""
        return _DIR_NAMES[self]

    @property
    def is_directory(self) -> bool:
        """True for the types whose sector file is a directory of files."""
        return self in DIRECTORY_TYPES

    @property
    def bit(self) -> int:
        """Position of the flag, 0 to 6: the index into lock arrays and fixed inode numbers."""
        return self.value.bit_length() - 1


_DIR_NAMES = {
    FileType.UNSEALED: "unsealed",
    FileType.SEALED: "sealed",
    FileType.CACHE: "cache",
    FileType.UPDATE: "update",
    FileType.UPDATE_CACHE: "update-cache",
    FileType.PIECE: "piece",
    FileType.KEY: "key",
}
_BY_DIR_NAME = {name: file_type for file_type, name in _DIR_NAMES.items()}

DIRECTORY_TYPES = frozenset({FileType.CACHE, FileType.UPDATE_CACHE})
ALL_TYPES = sum(FileType)
"""The mask of every known type: 127."""


def parse_file_type(text: str) -> FileType:
    """The type of an exact directory name; `ValueError` for anything else."""
    try:
        return _BY_DIR_NAME[text]
    except KeyError:
        raise ValueError(f"unknown sector file type {text!r}") from None


def file_types(mask: int) -> tuple[FileType, ...]:
    """The single types of a mask in ascending bit order; `ValueError` for unknown or no bits."""
    if mask <= 0 or mask & ~ALL_TYPES:
        raise ValueError(f"unknown sector file types in mask {mask}")
    return tuple(file_type for file_type in FileType if mask & file_type)


class SectorID(msgspec.Struct, frozen=True, order=True, gc=False):
    """A sector: the miner's actor id and the sector's number (pieces use miner 0)."""

    miner: int
    number: int

    @property
    def name(self) -> str:
        """File name in a storage path, for example ``s-t01000-7``."""
        return f"s-t0{self.miner}-{self.number}"

    def __str__(self) -> str:
        return self.name


# No leading zeros: two spellings of one sector would be two files with one declaration.
_SECTOR_NAME = re.compile(r"s-t0(0|[1-9][0-9]{0,18})-(0|[1-9][0-9]{0,18})", re.ASCII)


def parse_sector(name: str) -> SectorID:
    """The sector of an exact file name; `ValueError` for any other name.

    Go's scanner ignores trailing text, so the original declares ``s-t01000-7.tmp`` as a sector.
    """
    match = _SECTOR_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not a sector name: {name[:80]!r}")
    miner, number = int(match[1]), int(match[2])
    if miner > MAX_NUMBER or number > MAX_NUMBER:
        raise ValueError(f"sector number out of range: {name!r}")
    return SectorID(miner, number)


class SectorFile(msgspec.Struct, frozen=True, order=True, gc=False):
    """One file (or directory of files) of a sector: what the Index declares."""

    file_type: FileType
    sector: SectorID

    def __str__(self) -> str:
        return f"{self.file_type.dir_name}/{self.sector.name}"


class MemberFacts(msgspec.Struct, frozen=True, order=True, gc=False):
    """Name, size in bytes and modification time of one file in a sector directory."""

    name: str
    size: int
    mtime_ns: int


class Facts(msgspec.Struct, frozen=True, gc=False):
    """What `stat` would tell of a sector file, sent with its declaration."""

    size: int
    """Bytes; for a directory the sum over its files."""
    mtime_ns: int
    """Modification time of the file, or of the directory itself."""
    members: tuple[MemberFacts, ...] | None = None
    """The files of a directory by ascending name; None for a regular file."""
    digest: bytes = b""
    """`DIGEST_SIZE` bytes that prove the content, empty while nobody computed them.

    It comes and goes without the content being another: compare what is `bare` for that.
    """

    @property
    def bare(self) -> Facts:
        """The same without the digest, as a look at a disk tells it."""
        return Facts(self.size, self.mtime_ns, self.members) if self.digest else self

    def member(self, name: str) -> MemberFacts | None:
        """The facts of one file in a directory."""
        for member in self.members or ():
            if member.name == name:
                return member
        return None


_MEMBER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", re.ASCII)
_STORAGE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", re.ASCII)


def parse_member_name(name: str) -> str:
    """The name of a file in a sector directory, safe as one path component; else `ValueError`."""
    if _MEMBER_NAME.fullmatch(name) is None or name.endswith(".tmp"):
        raise ValueError(f"not the name of a file in a sector directory: {name[:80]!r}")
    return name


def parse_storage_id(text: str) -> StorageID:
    """A storage id; `ValueError` unless it is safe in URLs and in ``keep=a.b`` lists (no dot)."""
    if _STORAGE_ID.fullmatch(text) is None:
        raise ValueError(f"not a storage id: {text[:80]!r}")
    return StorageID(text)


def parse_size(text: str) -> int:
    """``10TiB``, ``10TB``, ``1.5T`` or plain bytes; `ValueError` otherwise."""
    match = re.fullmatch(r"\s*([0-9]{1,19}(?:\.[0-9]{1,6})?)\s*([a-zA-Z]{0,3})\s*", text)
    number, unit = (match[1], match[2].lower()) if match else ("", "")
    powers: dict[str, tuple[int, int]] = {"": (1, 0), "b": (1, 0)}
    for power, letter in enumerate("kmgtpe", start=1):
        powers[f"{letter}ib"] = powers[letter] = (1024, power)
        powers[f"{letter}b"] = (1000, power)
    if not number or unit not in powers:
        raise ValueError(f"not a size: {text!r}, write for example 10TiB")
    base, power = powers[unit]
    result = int(Decimal(number) * base**power)
    if result > MAX_NUMBER:
        raise ValueError(f"size out of range: {text!r}")
    return result
