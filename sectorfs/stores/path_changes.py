"""Changes of a storage path's settings: what may be asked, and how ``sectorstore.json`` follows.

The rule is a function of values; the file is replaced as a whole in the very directory that proved
its id, so that a disk unmounted in between leaves nothing behind on the disk below it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from sectorfs.errors import BadInput, NotFound, Refused
from sectorfs.index.checks import check_info
from sectorfs.index.placement import parse_miner
from sectorfs.index.protocol import StorageInfo
from sectorfs.stores.metadata import METADATA_NAME, encode_metadata, read_metadata, write_atomically
from sectorfs.stores.scan import other_storage, path_lost
from sectorfs.types import FileType, StorageID, parse_file_type

_TYPES = ", ".join(file_type.dir_name for file_type in FileType)
_PARSERS: tuple[tuple[str, Callable[[str], object], str], ...] = (
    ("allow_types", parse_file_type, f"types are {_TYPES}"),
    ("deny_types", parse_file_type, f"types are {_TYPES}"),
    ("allow_miners", parse_miner, "write for example t01000"),
    ("deny_miners", parse_miner, "write for example t01000"),
)


class PathChanges(msgspec.Struct, frozen=True, kw_only=True):
    """Settings to change. None leaves one as it is; an empty list clears it."""

    weight: int | None = None
    max_storage: int | None = None
    can_seal: bool | None = None
    can_store: bool | None = None
    groups: tuple[str, ...] | None = None
    allow_to: tuple[str, ...] | None = None
    allow_types: tuple[str, ...] | None = None
    deny_types: tuple[str, ...] | None = None
    allow_miners: tuple[str, ...] | None = None
    deny_miners: tuple[str, ...] | None = None


def changed(info: StorageInfo, changes: PathChanges, origin: object) -> StorageInfo:
    """The settings after a change; `BadInput` for names and numbers that make no sense.

    Entries that were there before are not judged: one that is odd must not forbid other changes.
    """
    wanted = {
        name: tuple(dict.fromkeys(value)) if isinstance(value, tuple) else value
        for name, value in msgspec.structs.asdict(changes).items()
        if value is not None
    }
    if not wanted:
        raise BadInput("nothing to change", origin, "name a setting, for example --weight 5")
    for name, parse, hint in _PARSERS:
        for entry in wanted.get(name, ()):
            try:
                parse(entry)
            except ValueError as exc:
                raise BadInput(f"{name}: {exc}", origin, hint) from exc
    after = msgspec.structs.replace(info, **wanted)
    check_info(after)
    return after


def rewrite(path: str, storage: StorageID, changes: PathChanges) -> tuple[StorageInfo, StorageInfo]:
    """Change the file of a storage path; what it said before and says now. Blocks.

    `StorageUnavailable` unless the directory is that of `storage`. A change that changes nothing
    writes nothing, and so is fine on a read-only disk.
    """
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise path_lost(path) from exc
    try:
        try:
            found = read_metadata(path, dir_fd=directory)
        except NotFound as exc:
            raise path_lost(path) from exc
        before = found.info
        if before.storage != storage:
            raise other_storage(path, before.storage, storage)
        after = changed(before, changes, path)
        if after != before:
            if _is_link(directory):
                raise Refused(f"{METADATA_NAME} is a link", path, "change the file it names")
            data = encode_metadata(msgspec.structs.replace(found, info=after))
            write_atomically(f"/proc/self/fd/{directory}/{METADATA_NAME}", data)
    finally:
        os.close(directory)
    return before, after


def _is_link(directory: int) -> bool:
    """Replacing a link would leave the file it names as it was, and part the two for ever."""
    try:
        os.readlink(METADATA_NAME, dir_fd=directory)
    except OSError:
        return False
    return True
