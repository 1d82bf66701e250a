"""``sectorstore.json``: what makes a directory a storage path, and says what may be placed there.

The file is the one lotus and Curio write: CamelCase keys that are read in any case, ``null`` for an
empty list, unknown keys kept when it is written again. It is replaced by rename, because a storage
path whose file is torn is a storage path nobody can attach.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from sectorfs.errors import BadInput, Refused, from_os
from sectorfs.index.protocol import StorageInfo
from sectorfs.types import MAX_NUMBER, StorageID, parse_file_type, parse_storage_id

T = TypeVar("T")

METADATA_NAME = "sectorstore.json"
MAX_FILE_BYTES = 1 << 20
"""A longer JSON file is not ours; reading it would only cost memory."""

_MINER = re.compile(r"[tf]0(0|[1-9][0-9]{0,18})", re.ASCII)
_LISTS = ("Groups", "AllowTo", "AllowTypes", "DenyTypes", "AllowMiners", "DenyMiners")
_KEYS = ("ID", "Weight", "CanSeal", "CanStore", "MaxStorage", *_LISTS)
_EXACT = {key.lower(): key for key in _KEYS}


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded ``sectorstore.json``."""

    info: StorageInfo
    """Without URLs: the file does not hold any."""
    extra: Mapping[str, Any] = {}
    """Keys of other programs; they survive a rewrite."""


def decode_metadata(data: bytes, origin: object) -> Metadata:
    """Parse the file's text; `BadInput` names `origin` and the key."""
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in decode_object(data, origin).items():
        exact = _EXACT.get(key.lower())
        if exact is None:
            extra[key] = value
        else:
            known[exact] = value
    fields = _Fields(known, origin)
    info = StorageInfo(
        storage=fields.storage(),
        weight=fields.integer("Weight"),
        max_storage=fields.integer("MaxStorage"),
        can_seal=fields.boolean("CanSeal"),
        can_store=fields.boolean("CanStore"),
        groups=fields.strings("Groups"),
        allow_to=fields.strings("AllowTo"),
        allow_types=fields.strings("AllowTypes"),
        deny_types=fields.strings("DenyTypes"),
        allow_miners=fields.strings("AllowMiners"),
        deny_miners=fields.strings("DenyMiners"),
    )
    return Metadata(info=info, extra=extra)


class _Fields:
    """Typed access to the keys of the file; missing and null mean the zero value, as in Go."""

    def __init__(self, values: Mapping[str, Any], origin: object) -> None:
        self._values = values
        self._origin = origin

    def _bad(self, key: str, want: str) -> BadInput:
        found = repr(self._values.get(key))[:60]
        return BadInput(f"key {key!r} must be {want}, not {found}", self._origin)

    def storage(self) -> StorageID:
        text = self._values.get("ID")
        if not isinstance(text, str):
            raise self._bad("ID", "the id of the storage, a string")
        try:
            return parse_storage_id(text)
        except ValueError as exc:
            raise self._bad("ID", "letters, digits, '-' and '_', such as a UUID") from exc

    def integer(self, key: str) -> int:
        value = self._values.get(key)
        if value is None:
            return 0
        if type(value) is not int or not 0 <= value <= MAX_NUMBER:
            raise self._bad(key, "an integer from 0 to 2^63-1")
        return value

    def boolean(self, key: str) -> bool:
        value = self._values.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._bad(key, "a list of strings")
        return tuple(value)


def encode_metadata(metadata: Metadata) -> bytes:
    """The file's text: known keys in their order, then the keys of others; 2 spaces."""
    info = metadata.info
    values: dict[str, Any] = {
        "ID": info.storage,
        "Weight": info.weight,
        "CanSeal": info.can_seal,
        "CanStore": info.can_store,
        "MaxStorage": info.max_storage,
        "Groups": info.groups,
        "AllowTo": info.allow_to,
        "AllowTypes": info.allow_types,
        "DenyTypes": info.deny_types,
        "AllowMiners": info.allow_miners,
        "DenyMiners": info.deny_miners,
    }
    for key in _LISTS:
        values[key] = list(values[key]) or None
    return encode_object({**values, **metadata.extra})


def read_metadata(path: str, *, dir_fd: int | None = None) -> Metadata:
    """Read the file of a storage path; `NotFound` when there is none.

    With `dir_fd`, an open descriptor of the same directory, the answer is about that directory even
    if something is mounted over, or unmounted from, `path` at the same moment.
    """
    origin = os.path.join(path, METADATA_NAME)
    try:
        data = read_small(METADATA_NAME if dir_fd is not None else origin, origin, dir_fd=dir_fd)
    except OSError as exc:
        raise from_os(exc, "cannot be read", origin) from exc
    return decode_metadata(data, origin)


def write_metadata(path: str, metadata: Metadata) -> None:
    """Replace the file of a storage path, all or nothing."""
    write_atomically(os.path.join(path, METADATA_NAME), encode_metadata(metadata))


def init_path(
    path: str,
    *,
    can_seal: bool,
    can_store: bool,
    weight: int = 10,
    max_storage: int = 0,
    groups: Sequence[str] = (),
    allow_to: Sequence[str] = (),
    allow_types: Sequence[str] = (),
    deny_types: Sequence[str] = (),
    allow_miners: Sequence[str] = (),
    deny_miners: Sequence[str] = (),
) -> StorageInfo:
    """Make a directory a storage path with a new id; `Refused` when it is one already."""
    if not can_seal and not can_store:
        raise BadInput("may neither seal nor store", path, "add --seal, --store or both")
    for key, value in (("weight", weight), ("max storage", max_storage)):
        if not 0 <= value <= MAX_NUMBER:
            raise BadInput(f"{key} must be from 0 to 2^63-1, not {value}", path)
    _check_names("file types", (*allow_types, *deny_types), parse_file_type, path)
    _check_names("miners", (*allow_miners, *deny_miners), _parse_miner, path)
    info = StorageInfo(
        storage=_new_id(),
        weight=weight,
        max_storage=max_storage,
        can_seal=can_seal,
        can_store=can_store,
        groups=tuple(groups),
        allow_to=tuple(allow_to),
        allow_types=tuple(allow_types),
        deny_types=tuple(deny_types),
        allow_miners=tuple(allow_miners),
        deny_miners=tuple(deny_miners),
    )
    return _create(path, info)


def init_cache_path(path: str) -> StorageInfo:
    """Make a directory a node's cache path: never chosen for placement, all its files copies."""
    return _create(path, StorageInfo(storage=_new_id(), weight=0))


def _new_id() -> StorageID:
    return parse_storage_id(str(uuid.uuid4()))


def _check_names(
    what: str, names: Sequence[str], parse: Callable[[str], object], path: str
) -> None:
    for name in names:
        try:
            parse(name)
        except ValueError as exc:
            raise BadInput(f"{what}: {exc}", path) from exc


def _parse_miner(text: str) -> str:
    if _MINER.fullmatch(text) is None:
        raise ValueError(f"not a miner's address: {text[:80]!r}, write t01000")
    return text


def _create(path: str, info: StorageInfo) -> StorageInfo:
    target = os.path.join(path, METADATA_NAME)
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
    except OSError as exc:
        raise from_os(exc, "cannot be made", path) from exc
    try:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        write_atomically(target, encode_metadata(Metadata(info=info)), replace=False)
        # Only now is the new directory worth finding again after a power cut.
        _sync_directory(os.path.dirname(os.path.abspath(path)))
    except FileExistsError as exc:
        raise Refused("is already initialised", path, "attach it without --init") from exc
    except OSError as exc:
        raise from_os(exc, "cannot be initialised", path) from exc
    return info


def decode_object(data: bytes, origin: object) -> dict[str, Any]:
    """A JSON object, or `BadInput` naming `origin`."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadInput(f"is not JSON: {exc}", origin) from exc
    if not isinstance(value, dict):
        raise BadInput("is not a JSON object", origin)
    return value


def encode_object(value: Mapping[str, Any]) -> bytes:
    """JSON as lotus writes it: two spaces, a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def read_small(name: str, origin: object, *, dir_fd: int | None = None) -> bytes:
    """The bytes of a small regular file; anything else under the name is `BadInput`."""
    # O_NONBLOCK: a FIFO of that name would otherwise hold the thread for ever.
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadInput("is not a regular file", origin)
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadInput(f"is longer than {MAX_FILE_BYTES} bytes", origin)
    return data


def write_atomically(target: str, data: bytes, *, replace: bool = True, mode: int = 0o644) -> None:
    """Write a file so that after a power cut it is the old one or the new one, and complete.

    Without `replace` an existing file is `FileExistsError`, also when it appears meanwhile.
    """
    directory, name = os.path.split(target)
    temporary = os.path.join(directory, f".{name}.{uuid.uuid4().hex}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        if replace:
            os.rename(temporary, target)
        else:
            _publish(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def _publish(temporary: str, target: str) -> None:
    """Give a finished file its name unless the name is taken."""
    try:
        os.link(temporary, target)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(temporary, target)  # a file system without hard links
    else:
        os.unlink(temporary)


def _sync_directory(path: str) -> None:
    fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
