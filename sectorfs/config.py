"""``config.toml`` into frozen structs. An unknown key is an error that names it.

The file is optional and so is every key; command-line flags replace values with `Config.replace`.
Times are seconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec

from sectorfs.errors import BadConfig
from sectorfs.types import FileType, parse_file_type, parse_size, parse_storage_id

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Passthrough = Literal["auto", "off", "require"]
"""Whether the kernel is to read large local files past the daemon."""

SectorSize = Literal["2KiB", "8MiB", "512MiB", "32GiB", "64GiB"]

FetchPolicy = Literal["stream", "fill", "open"]
"""How remote files are read: see `stores.fetch_rules`."""

_LEAST_RATE = 1 << 20  # with less, connections stand still until the other side gives them up
_Count = Annotated[int, msgspec.Meta(ge=1, le=4096)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class NodeConfig(_Section, frozen=True):
    """``[node]``: where this node listens and under which URL others reach it."""

    listen: str = "127.0.0.1:8480"
    advertise: str = ""
    """Base URL for other nodes; empty: ``http://<listen>``. Required on a wildcard address."""


class IndexConfig(_Section, frozen=True):
    """``[index]``: which Index this node uses and how its health is judged."""

    url: str = "sqlite"
    """``sqlite`` (this repo's own) or ``http://host:port/rpc/v0``."""
    token_file: str = ""
    heartbeat: _Seconds = 10
    cutoff: _Seconds = 50
    """Age of the last heartbeat from which a storage counts as unhealthy."""


class PeersConfig(_Section, frozen=True):
    """``[peers]``: how this node asks others."""

    token_file: str = ""
    parallel: _Count = 8
    """Requests at a time to one storage of a peer that no reader waits for."""
    max_rate: str = "0"
    """Bytes a second from each peer, like ``100MB``; ``0`` for no limit. Readers never wait."""


class TimeoutsConfig(_Section, frozen=True):
    """``[timeouts]``: how long anything may stay silent."""

    connect: _Seconds = 3
    first_byte: _Seconds = 10
    progress: _Seconds = 10
    """Longest gap between two pieces of a body, in either direction."""
    disk: _Seconds = 15
    """One operation on a storage path."""


class MountConfig(_Section, frozen=True):
    """``[mount]``: how the tree is shown."""

    allow_other: bool = False
    uid: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)] = 0
    gid: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)] = 0
    types: tuple[str, ...] = ()
    """Type directories shown even while empty, beside ``unsealed``, ``sealed``, ``cache``."""
    sector_size: SectorSize = "32GiB"
    """What files are shown with whose size nobody told, nor that of any sector of their miner."""
    passthrough: Passthrough = "auto"
    """Read local files of 1 MiB and more past the daemon; ``require``: or do not mount."""
    passthrough_storages: dict[str, Passthrough] = {}
    """The same for single storages, by id."""


class CacheConfig(_Section, frozen=True):
    """``[cache]``: where fetched copies live."""

    path: str = "cache"
    """Absolute, or relative to the repo directory."""
    max_size: str = "0"
    """Bytes that copies may take together, like ``500GiB``; ``0`` for no limit."""
    min_free: str = "5%"
    """What stays free of the file system: ``50GiB``, or a share of its size."""

    def limits(self) -> CacheLimits:
        """`max_size` and `min_free` as numbers; `ValueError` for what is none."""
        if self.min_free.endswith("%"):
            return CacheLimits(parse_size(self.max_size), share=_percent(self.min_free))
        return CacheLimits(parse_size(self.max_size), min_free=parse_size(self.min_free))


def rate_of(text: str) -> int:
    """Bytes a second, 0 for no limit; `ValueError` for what is none, or too little to be of use."""
    rate = parse_size(text)
    if 0 < rate < _LEAST_RATE:
        raise ValueError(f"{text!r} a second is less than 1MiB, the least that works")
    return rate


def interval(text: str) -> float:
    """``12h``, ``30d`` or ``8w`` in seconds, 0 for never; `ValueError` for what is none."""
    if text.strip() in ("", "0"):
        return 0.0
    match = re.fullmatch(r"\s*([1-9][0-9]{0,4})\s*([hdw])\s*", text, re.ASCII)
    if match is None:
        raise ValueError(f"not a time: {text!r}, write for example 30d")
    return int(match[1]) * {"h": 3600.0, "d": 86400.0, "w": 604800.0}[match[2]]


class CacheLimits(msgspec.Struct, frozen=True):
    """What the copies of this node may take."""

    max_size: int = 0
    """0 for no limit."""
    min_free: int = 0
    share: float = 0.0
    """Beside `min_free`: of the file system's size."""

    def free_of(self, capacity: int) -> int:
        """Bytes that stay free of a file system of this size."""
        return max(self.min_free, int(self.share * capacity))


class FetchConfig(_Section, frozen=True):
    """``[fetch]``: how files of other nodes are read."""

    policy: dict[str, FetchPolicy] = {}
    """By file type; ``stream`` for ``unsealed`` and ``fill`` for the others where not told."""
    max_rate: str = "0"
    """As in ``[peers]``, from all of them together."""

    def policy_of(self, file_type: FileType) -> FetchPolicy:
        """What holds for a file type."""
        usual: FetchPolicy = "stream" if file_type is FileType.UNSEALED else "fill"
        return self.policy.get(file_type.dir_name, usual)


class StorageConfig(_Section, frozen=True):
    """``[storage]``: how this node watches its storage paths."""

    settle: _Seconds = 0.5
    """A new file is declared once two looks this far apart agree."""
    look: _Seconds = 30
    """How often the type directories' modification times are looked at (network file systems)."""
    rescan: _Seconds = 3600
    """How often everything is listed again."""


class HashConfig(_Section, frozen=True):
    """``[hash]``: how this node makes the manifests of its files."""

    max_rate: str = "200MB"
    """Bytes a second read for it on this node, ``0`` for no limit. A share of what its disks can
    do together, for nobody waits for it: 250 TiB take sixteen days."""
    idle: _Seconds = 5
    """A path that others read waits for so many quiet seconds, or gives hashing a tenth of its
    time where there are none."""
    delay: _Seconds = 60
    """So long after its start a node has better to do."""
    xattr: bool = False
    """Note size, time and digest in ``user.sectorfs.content`` of each hashed file as well."""


class ScrubConfig(_Section, frozen=True):
    """``[scrub]``: how this node verifies the files that it holds."""

    every: str = ""
    """How long after one look at all files of a storage path the next begins, like ``30d``; empty
    or ``0`` for never but by `sectorfs sector verify`: it reads every byte of every disk."""
    max_rate: str = "0"
    """Bytes a second read for it on this node, like ``500MB``; ``0`` for no limit. Whoever else
    reads from a disk goes first."""


class Config(_Section, frozen=True):
    """All settings of a node."""

    node: NodeConfig = NodeConfig()
    index: IndexConfig = IndexConfig()
    peers: PeersConfig = PeersConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    mount: MountConfig = MountConfig()
    cache: CacheConfig = CacheConfig()
    fetch: FetchConfig = FetchConfig()
    storage: StorageConfig = StorageConfig()
    scrub: ScrubConfig = ScrubConfig()
    hash: HashConfig = HashConfig()

    def replace(self, **sections: dict[str, Any]) -> Config:
        """A copy with some keys changed, checked like the file: ``replace(node={"listen": …})``."""
        data = msgspec.to_builtins(self)
        for section, values in sections.items():
            data[section].update(values)
        return _checked(data, "flags")

    def toml(self) -> str:
        """The settings in force as a ``config.toml``."""
        return msgspec.toml.encode(self).decode()


def load(path: Path) -> Config:
    """Read a ``config.toml``; a missing file means all defaults."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Config()
    except OSError as exc:
        raise BadConfig(f"cannot be read: {exc.strerror}", path) from exc
    try:
        data = msgspec.toml.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise BadConfig(f"not TOML: {exc}", path) from exc
    return _checked(data, path)


def _checked(data: Any, origin: object) -> Config:
    _reject_unknown(data, origin)
    try:
        config = msgspec.convert(data, Config)
    except msgspec.ValidationError as exc:
        raise BadConfig(_key_first(str(exc)), origin) from exc
    if config.index.cutoff <= config.index.heartbeat:
        raise BadConfig("index.cutoff must be greater than index.heartbeat", origin)
    if config.index.url != "sqlite":
        parse_url(config.index.url, "index.url", origin)
    parse_listen(config.node.listen, origin)
    if config.node.advertise:
        parse_url(config.node.advertise, "node.advertise", origin)
    for key, path in _paths(config):
        if "\0" in path:
            raise BadConfig(f"{key} {path!r} is not a path", origin)
    if not config.cache.path:
        raise BadConfig("cache.path is empty", origin, "name a directory, or leave the key out")
    try:
        config.cache.limits()
    except ValueError as exc:
        raise BadConfig(f"cache: {exc}", origin) from exc
    for key, rate in (
        ("peers.max_rate", config.peers.max_rate),
        ("fetch.max_rate", config.fetch.max_rate),
        ("scrub.max_rate", config.scrub.max_rate),
        ("hash.max_rate", config.hash.max_rate),
    ):
        try:
            rate_of(rate)
        except ValueError as exc:
            raise BadConfig(f"{key}: {exc}", origin) from exc
    try:
        interval(config.scrub.every)
    except ValueError as exc:
        raise BadConfig(f"scrub.every: {exc}", origin) from exc
    for storage in config.mount.passthrough_storages:
        try:
            parse_storage_id(storage)
        except ValueError as exc:
            raise BadConfig(f"mount.passthrough_storages: {exc}", origin) from exc
    for key, names in (("mount.types", config.mount.types), ("fetch.policy", config.fetch.policy)):
        for name in names:
            try:
                parse_file_type(name)
            except ValueError as exc:
                raise BadConfig(f"{key}: {exc}", origin) from exc
    return config


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*%", text, re.ASCII)
    if match is None or float(match[1]) >= 100:
        raise ValueError(f"not a share of a disk: {text!r}, write for example 5%")
    return float(match[1]) / 100


def _paths(config: Config) -> tuple[tuple[str, str], ...]:
    return (
        ("index.token_file", config.index.token_file),
        ("peers.token_file", config.peers.token_file),
        ("cache.path", config.cache.path),
    )


def _reject_unknown(data: Any, origin: object) -> None:
    """Name an unknown key in full, which msgspec's own message does not for sections."""
    if not isinstance(data, dict):
        return
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    for section, values in data.items():
        if section not in sections:
            raise BadConfig(
                f"unknown key {section!r}", origin, f"known sections: {', '.join(sections)}"
            )
        known = [field.name for field in msgspec.structs.fields(sections[section])]
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                raise BadConfig(
                    f"unknown key '{section}.{key}'", origin, f"known keys: {', '.join(known)}"
                )


def _key_first(message: str) -> str:
    """``Expected `int`, got `str` - at `$.peers.parallel``` → ``peers.parallel: Expected …``."""
    match = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message)
    return f"{match[2]}: {match[1]}" if match else message


def parse_listen(text: str, origin: object = "node.listen") -> tuple[str, int]:
    """``host:port`` (``[v6]:port``) into a pair; port 0 means any free one."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BadConfig(f"node.listen {text!r} is not host:port", origin)
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_url(text: str, key: str, origin: object = "") -> str:
    """An ``http://host[:port][/path]`` URL without a trailing slash."""
    try:
        parts = urlsplit(text)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        port_ok = False
        parts = urlsplit("")
    if parts.scheme != "http" or not parts.hostname or not port_ok or parts.query:
        raise BadConfig(f"{key} {text!r} is not a URL", origin, "write http://host:port")
    return text.rstrip("/")
