"""The roll of a sector directory: name, size and digest of each file, proved by the directory's.

The Index keeps one digest for a directory; what its files must hash to is asked of whoever has
their manifests, as JSON, and believed because it hashes to that digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from sectorfs.errors import BadInput
from sectorfs.stores.manifest import HASH, directory_digest
from sectorfs.types import MAX_NUMBER, parse_member_name

LIMIT = 16 * 1024 * 1024
"""Bytes of an encoded roll."""


class RollEntry(msgspec.Struct, frozen=True):
    """One file of a directory."""

    name: str
    size: int
    digest: bytes


class Roll(msgspec.Struct, frozen=True):
    """The files of a directory by ascending name."""

    entries: tuple[RollEntry, ...]

    @property
    def digest(self) -> bytes:
        """The digest of the directory."""
        return directory_digest((one.name, one.size, one.digest) for one in self.entries)

    def entry(self, name: str) -> RollEntry | None:
        """One of its files."""
        return next((one for one in self.entries if one.name == name), None)

    def encode(self) -> bytes:
        """Its form on the wire."""
        files = [_EntryShape(one.name, one.size, one.digest.hex()) for one in self.entries]
        return msgspec.json.encode(_RollShape(self.digest.hex(), files)) + b"\n"


class _EntryShape(msgspec.Struct, rename="pascal"):
    name: str
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
    digest: Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{{2 * HASH}}}$")]


class _RollShape(msgspec.Struct, rename="pascal"):
    digest: str
    files: list[_EntryShape]


def make_roll(entries: Sequence[tuple[str, int, bytes]]) -> Roll:
    """The roll of files given by name, size and digest."""
    return Roll(tuple(RollEntry(*one) for one in sorted(entries)))


def decode_roll(data: bytes, digest: bytes) -> Roll:
    """The roll in an answer; `BadInput` unless it hashes to the digest of the directory."""
    try:
        shape = msgspec.json.decode(data, type=_RollShape)
        entries = [
            (parse_member_name(one.name), one.size, bytes.fromhex(one.digest))
            for one in shape.files
        ]
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as exc:
        raise BadInput(f"is no roll: {exc}", "roll") from exc
    if len({name for name, _, _ in entries}) != len(entries):
        raise BadInput("names a file twice", "roll")
    roll = make_roll(entries)
    if roll.digest != digest:
        raise BadInput("does not hash to the digest of the directory", "roll")
    return roll
