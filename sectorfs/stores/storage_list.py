"""``storage.json``: the paths a node attaches, as lotus writes them.

``{"StoragePaths": [{"Path": "/abs"}]}``; whatever else stands in the file, at either level,
is kept. One path twice is one path and a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from sectorfs.errors import BadInput, NotFound, from_os
from sectorfs.stores.metadata import decode_object, encode_object, read_small, write_atomically

log = logging.getLogger(__name__)

STORAGE_LIST_NAME = "storage.json"
_LIST = "StoragePaths"
_PATH = "Path"


class StorageList(msgspec.Struct, frozen=True, kw_only=True):
    """The attached paths of a node."""

    file: str
    """Where the list is kept."""
    entries: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Absolute path, and the other keys of its entry."""
    extra: Mapping[str, Any] = {}
    """Other keys of the file."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths in their order."""
        return tuple(path for path, _ in self.entries)

    def adding(self, path: str) -> StorageList:
        """With `path`, which stays where it is if it is there already."""
        path = _normal(path, self.file)
        if path in self.paths:
            return self
        return msgspec.structs.replace(self, entries=(*self.entries, (path, {})))

    def removing(self, path: str) -> StorageList:
        """Without `path`; `NotFound` when it is not in the list."""
        path = _normal(path, self.file)
        if path not in self.paths:
            raise NotFound("is not in the list of storage paths", path, f"see {self.file}")
        kept = tuple(entry for entry in self.entries if entry[0] != path)
        return msgspec.structs.replace(self, entries=kept)


def storage_list_file(path: str) -> str:
    """The file meant by `path`: ``~`` expanded, ``storage.json`` in it when it is a directory."""
    expanded = os.path.abspath(os.path.expanduser(path))
    return os.path.join(expanded, STORAGE_LIST_NAME) if os.path.isdir(expanded) else expanded


def read_storage_list(path: str) -> StorageList:
    """Read the list; a missing file is an empty one, a malformed one is `BadInput`."""
    file = storage_list_file(path)
    try:
        data = read_small(file, file)
    except FileNotFoundError:
        return StorageList(file=file)
    except OSError as exc:
        raise from_os(exc, "cannot be read", file) from exc
    return _decode(data, file)


def write_storage_list(storage_list: StorageList) -> None:
    """Replace the file, all or nothing; missing directories above it are made."""
    file = storage_list.file
    entries = [{_PATH: path, **extra} for path, extra in storage_list.entries]
    try:
        os.makedirs(os.path.dirname(file), mode=0o755, exist_ok=True)
        write_atomically(file, encode_object({_LIST: entries, **storage_list.extra}))
    except OSError as exc:
        raise from_os(exc, "cannot be written", file) from exc


def _decode(data: bytes, file: str) -> StorageList:
    listed, extra = _take(decode_object(data, file), _LIST)
    if listed is not None and not isinstance(listed, list):
        raise BadInput(f"key {_LIST!r} must be a list", file)
    entries: dict[str, Mapping[str, Any]] = {}
    for number, item in enumerate(listed or ()):
        key = f"{_LIST}[{number}]"
        if not isinstance(item, dict):
            raise BadInput(f"key {key!r} must be an object", file)
        path, others = _take(item, _PATH)
        if not isinstance(path, str):
            raise BadInput(f"key '{key}.{_PATH}' must be a string", file)
        path = _normal(path, f"{file}: {key}.{_PATH}")
        if path in entries:
            log.warning("%s: %s is listed twice; the second entry is ignored", file, path)
        else:
            entries[path] = others
    return StorageList(file=file, entries=tuple(entries.items()), extra=extra)


def _take(values: Mapping[str, Any], wanted: str) -> tuple[Any, dict[str, Any]]:
    """The value of a key in any case, and the other keys."""
    found = None
    others: dict[str, Any] = {}
    for key, value in values.items():
        if key.lower() == wanted.lower():
            found = value
        else:
            others[key] = value
    return found, others


def _normal(path: str, origin: str) -> str:
    expanded = os.path.expanduser(path)
    if not os.path.isabs(expanded) or "\0" in expanded:
        raise BadInput(f"not an absolute path: {path[:200]!r}", origin)
    return os.path.normpath(expanded)
