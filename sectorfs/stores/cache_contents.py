"""What lies in the cache path, read from the disk itself, and how unfinished fetches go. Blocks.

The disk is asked and not the Index: copies that are not declared yet, or never will be, take room
as well. Entries of no known form count in the sum and are nobody's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from sectorfs.stores.blocks import DATA_SUFFIX, MAP_SUFFIX
from sectorfs.stores.eviction import Item
from sectorfs.stores.own_names import FETCHING
from sectorfs.stores.scan import check_identity
from sectorfs.stores.space import BLOCK, RawSpace, raw_space
from sectorfs.types import FileType, SectorFile, StorageID, parse_sector


class Contents(msgspec.Struct, frozen=True):
    """One look at the cache path."""

    raw: RawSpace
    items: tuple[Item, ...]
    held: int
    """Bytes of the items, and of whatever else lies there."""


def contents(root: Path, storage: StorageID) -> Contents:
    """Look at everything; `PathLost` when its disk is not mounted."""
    check_identity(str(root), storage)
    items: dict[tuple[SectorFile, bool], Item] = {}
    held = 0
    for file_type in FileType:
        folder = root / file_type.dir_name
        for partial, where in ((False, folder), (True, folder / FETCHING)):
            for entry in _entries(where):
                if not partial and entry.name == FETCHING:
                    continue
                size, changed_ns = _usage(entry)
                held += size
                file = _file(file_type, entry.name, partial=partial)
                if file is not None:
                    _add(items, Item(file, partial, size, changed_ns))
    return Contents(raw_space(str(root)), tuple(items.values()), held)


def remove_partials(root: Path, storage: StorageID, file: SectorFile) -> int:
    """Delete what was fetched of a file that is not whole; the bytes that gives."""
    check_identity(str(root), storage)
    freed = 0
    for entry in tuple(_entries(root / file.file_type.dir_name / FETCHING)):
        if _file(file.file_type, entry.name, partial=True) != file:
            continue
        freed += _usage(entry)[0]
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
    return freed


def _add(items: dict[tuple[SectorFile, bool], Item], item: Item) -> None:
    key = (item.file, item.partial)
    known = items.get(key)
    if known is not None:  # the data and the map of one
        used_ns = max(known.used_ns, item.used_ns)
        item = Item(item.file, item.partial, known.size + item.size, used_ns)
    items[key] = item


def _file(file_type: FileType, name: str, *, partial: bool) -> SectorFile | None:
    """The sector file that a name stands for."""
    if partial:
        for suffix in (MAP_SUFFIX, DATA_SUFFIX):
            name = name.removesuffix(suffix)
    try:
        return SectorFile(file_type, parse_sector(name))
    except ValueError:
        return None


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        found = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with found:
        yield from found


def _usage(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Bytes on disk of a file or of all below a directory, and when any of it last changed."""
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return 0, 0
    size, changed_ns = status.st_blocks * BLOCK, status.st_ctime_ns
    if entry.is_dir(follow_symlinks=False):
        for inner in _entries(Path(entry.path)):
            inner_size, inner_changed_ns = _usage(inner)
            size += inner_size
            changed_ns = max(changed_ns, inner_changed_ns)
    return size, changed_ns
