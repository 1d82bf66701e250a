"""What an index refuses: values that no column, list or URL can hold. Pure; raises `BadInput`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sectorfs.config import parse_url
from sectorfs.errors import BadConfig, BadInput, TooLarge
from sectorfs.index.protocol import Declaration, FsStat, Lease, LocationKey, Lock, StorageInfo
from sectorfs.types import (
    ALL_TYPES,
    DIGEST_SIZE,
    Facts,
    FileType,
    SectorID,
    file_types,
    parse_storage_id,
)

MAX_INT = 2**63 - 1
MIN_INT = -(2**63)
MAX_MEMBERS = 10_000
"""Files in one sector directory; real ones have a few dozen."""
MAX_PAGE = 5000
"""Rows of one page, whatever was asked."""
MAX_WAIT = 300.0
"""Seconds one long poll may last, whatever was asked."""
MAX_ERROR = 4096
"""Characters of a health report's error that are kept."""
MIN_LEASE = 1.0
MAX_LEASE = 600.0
"""Seconds a lease may last without being renewed."""
MAX_NOTE = 200
"""Characters of a lease's owner, and of its reason."""

_TOKEN = re.compile(r"[0-9a-zA-Z_-]{16,64}", re.ASCII)


def check_info(info: StorageInfo) -> None:
    """Refuse ids, URLs, lists and numbers that cannot be stored."""
    try:
        parse_storage_id(info.storage)
    except ValueError as exc:
        raise BadInput(str(exc), info.storage) from exc
    for url in info.urls:
        check_url(url, info.storage)
    check_number(info.weight, "weight", info.storage)
    check_number(info.max_storage, "max_storage", info.storage)
    for field in ("groups", "allow_to", "allow_types", "deny_types", "allow_miners", "deny_miners"):
        for entry in getattr(info, field):
            _check_entry(entry, field, info.storage)


def check_url(url: str, thing: object) -> None:
    """Refuse what is no ``http`` URL, or would not survive the comma-separated column."""
    if "," in url or not url.isprintable() or " " in url:
        raise BadInput(f"URL {url[:200]!r} has a comma, a blank or a control character", thing)
    try:
        parse_url(url, "URL", thing)
    except BadConfig as exc:
        raise BadInput(exc.what, thing, exc.hint) from exc


def _check_entry(entry: str, field: str, thing: object) -> None:
    # An empty entry would read back as an empty list, which allows everything.
    if not entry or "," in entry or not entry.isprintable():
        raise BadInput(
            f"{field} has the entry {entry[:80]!r}", thing, "one name per entry, without commas"
        )


def check_stat(stat: FsStat, thing: object) -> None:
    """Refuse negative or huge byte counts."""
    for field in FsStat.__struct_fields__:
        check_number(getattr(stat, field), field, thing)


def check_number(value: int, name: str, thing: object) -> None:
    """Refuse what is not a count of at most 63 bits."""
    if not 0 <= value <= MAX_INT:
        raise BadInput(f"{name} {_short(value)} is not between 0 and 2^63 - 1", thing)


def check_sector(sector: SectorID) -> None:
    """Refuse sector and miner numbers beyond 63 bits."""
    if not (0 <= sector.miner <= MAX_INT and 0 <= sector.number <= MAX_INT):
        raise BadInput("miner or sector number is not between 0 and 2^63 - 1", "sector")


def check_key(key: LocationKey) -> None:
    """Refuse keys of impossible sectors."""
    check_sector(key.file.sector)


def check_declaration(declaration: Declaration) -> None:
    """Refuse impossible sectors and facts."""
    check_sector(declaration.file.sector)
    if declaration.facts is not None:
        _check_facts(declaration.facts, declaration.file)


def _check_facts(facts: Facts, thing: object) -> None:
    check_number(facts.size, "size", thing)
    _check_time(facts.mtime_ns, thing)
    if facts.digest:
        check_digest(facts.digest, thing)
    members = facts.members or ()
    if len(members) > MAX_MEMBERS:
        raise TooLarge(f"{len(members)} files in one sector directory", thing)
    previous = ""
    for member in members:
        if member.name <= previous:
            raise BadInput("the files of a directory are not in ascending order", thing)
        previous = member.name
        check_number(member.size, "size", f"{thing}/{member.name}")
        _check_time(member.mtime_ns, f"{thing}/{member.name}")


def check_digest(digest: bytes, thing: object) -> None:
    """Refuse what is no digest; zeros are none, for they stand for one that is not known."""
    if len(digest) != DIGEST_SIZE or not any(digest):
        raise BadInput("not a digest", thing, f"{DIGEST_SIZE} bytes, not all of them zero")


def _check_time(mtime_ns: int, thing: object) -> None:
    if not MIN_INT <= mtime_ns <= MAX_INT:
        raise BadInput(f"modification time {_short(mtime_ns)} is beyond 63 bits", thing)


def check_lock(lock: Lock) -> None:
    """Refuse impossible sectors, unknown types, and a lock of nothing."""
    check_sector(lock.sector)
    for mask in (lock.read, lock.write):
        if mask < 0 or mask & ~ALL_TYPES:
            raise BadInput(f"unknown file types specified: mask {_short(mask)}", lock.sector)
    if not lock.read | lock.write:
        raise BadInput("a lock of no file type", lock.sector)


def check_token(token: str) -> None:
    """Refuse what is not 16 to 64 letters and digits; never shown, for who knows it may release."""
    if _TOKEN.fullmatch(token) is None:
        raise BadInput("not the token of a lease", "lease", "16 to 64 letters, digits, - and _")


def check_lease(lease: Lease) -> None:
    """Refuse impossible locks, tokens and times, and notes that cannot be shown in a line."""
    check_lock(lease.lock)
    check_token(lease.token)
    for name, text in (("owner", lease.owner), ("reason", lease.reason)):
        if not text or len(text) > MAX_NOTE or not text.isprintable():
            raise BadInput(
                f"{name} {text[:80]!r}", lease.lock.sector, f"a line of 1 to {MAX_NOTE} characters"
            )
    if not MIN_LEASE <= lease.seconds <= MAX_LEASE:
        raise BadInput(
            f"a lease of {lease.seconds} seconds",
            lease.lock.sector,
            f"from {MIN_LEASE:g} to {MAX_LEASE:g}",
        )


def mask_types(mask: int) -> tuple[FileType, ...]:
    """The single types of a mask; `BadInput` when it has none or unknown ones."""
    try:
        return file_types(mask)
    except ValueError as exc:
        raise BadInput(f"unknown sector file types in mask {_short(mask)}", "file type") from exc


def page_size(limit: int) -> int:
    """How many rows to give when `limit` are asked."""
    if limit < 1:
        raise BadInput(f"a page of {_short(limit)} rows", "limit")
    return min(limit, MAX_PAGE)


def poll_seconds(wait: float) -> float:
    """How long to wait when `wait` seconds are asked; NaN and negative waits are refused."""
    if not wait >= 0:
        raise BadInput(f"cannot wait {wait} seconds", "wait")
    return min(wait, MAX_WAIT)


def missing(wanted: Iterable[str], known: Iterable[str]) -> list[str]:
    """What is wanted and not known, ascending."""
    return sorted(set(wanted).difference(known))


def _short(value: int) -> str:
    # Python refuses to print integers of thousands of digits, which JSON can bring.
    return str(value) if abs(value) < 10**30 else "(too long)"
