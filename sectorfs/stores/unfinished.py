"""What an earlier run left below ``fetching``: what can be gone on with, and the rest. Blocks.

A partial file says itself which content it is a part of; a whole file of a directory that is not
complete yet has the size and time of its source. Whether anybody still has these contents is for
others to judge, once the catalog is there.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from sectorfs.index.content import facts_of, same_mtime
from sectorfs.stores import blocks
from sectorfs.stores.blocks import DATA_SUFFIX, MAP_SUFFIX
from sectorfs.stores.own_names import FETCHING
from sectorfs.types import (
    ALL_TYPES,
    Facts,
    SectorFile,
    file_types,
    parse_member_name,
    parse_sector,
)

T = TypeVar("T")


class Leftover(msgspec.Struct, frozen=True):
    """A file, whole or in part, of an earlier run."""

    file: SectorFile
    member: str | None
    size: int
    """Of the whole."""
    mtime_ns: int
    path: Path
    """Of the data; a partial file's map lies beside it."""

    def is_of(self, facts: Facts | None) -> bool:
        """True when it is a part of the content that these facts are of."""
        wanted = facts_of(facts, self.member)
        return (
            wanted is not None
            and wanted.size == self.size
            and same_mtime(wanted.mtime_ns, self.mtime_ns)
        )


def clear(root: Path) -> tuple[list[Leftover], int]:
    """Remove what can never be gone on with; what stays, and how many things went."""
    kept: list[Leftover] = []
    removed = 0
    for file_type in file_types(ALL_TYPES):
        folder = root / file_type.dir_name / FETCHING
        for name in _names(folder):
            sector = _parsed(parse_sector, name.removesuffix(DATA_SUFFIX).removesuffix(MAP_SUFFIX))
            file = SectorFile(file_type, sector) if sector is not None else None
            if file_type.is_directory and file is not None and _is_directory(folder / name):
                found, gone = _clear_directory(folder / name, file)
            elif file_type.is_directory or file is None:
                found, gone = [], _remove(folder / name)
            else:
                found, gone = _sift(folder, name, file, None)
            kept += found
            removed += gone
    return kept, removed


def remove(leftover: Leftover) -> None:
    """Delete one of them."""
    if leftover.path.name.endswith(DATA_SUFFIX):
        blocks.remove(leftover.path)
    else:
        leftover.path.unlink(missing_ok=True)
    if leftover.member is not None:
        with suppress(OSError):
            os.rmdir(leftover.path.parent)


def _clear_directory(folder: Path, file: SectorFile) -> tuple[list[Leftover], int]:
    kept: list[Leftover] = []
    removed = 0
    for name in _names(folder):
        plain = name.removesuffix(DATA_SUFFIX).removesuffix(MAP_SUFFIX)
        member = _parsed(parse_member_name, plain)
        if member is None or name.endswith(".tmp"):
            removed += _remove(folder / name)
            continue
        found, gone = _sift(folder, name, file, member)
        kept += found
        removed += gone
    if not kept:
        _remove(folder)
        removed = max(removed, 1)
    return kept, removed


def _sift(
    folder: Path, name: str, file: SectorFile, member: str | None
) -> tuple[list[Leftover], int]:
    """Keep one file, or remove it."""
    path = folder / name
    if name.endswith(MAP_SUFFIX):
        if blocks.identity_of(path.with_suffix(DATA_SUFFIX)) is not None:
            return [], 0
        return [], _remove(path)
    if name.endswith(DATA_SUFFIX):
        identity = blocks.identity_of(path)
        if identity is not None and path.with_suffix(MAP_SUFFIX).exists():
            return [Leftover(file, member, identity.size, identity.mtime_ns, path)], 0
        return [], _remove(path)
    if member is not None:
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            return [Leftover(file, member, status.st_size, status.st_mtime_ns, path)], 0
    return [], _remove(path)


def _remove(path: Path) -> int:
    if _is_directory(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
    return 1


def _is_directory(path: Path) -> bool:
    """A link to one is none: nothing outside the cache path is ever touched."""
    return stat.S_ISDIR(path.lstat().st_mode)


def _names(folder: Path) -> Iterator[str]:
    with suppress(FileNotFoundError):
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        yield from names


def _parsed(parse: Callable[[str], T], text: str) -> T | None:
    with suppress(ValueError):
        return parse(text)
    return None
