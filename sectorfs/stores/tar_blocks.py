"""Blocks of a tar stream as bytes and as values: headers, numbers, PAX records.

A header is 512 bytes with the name, decimal-looking octal numbers and a sum over itself. What does
not fit goes into PAX records (``<length> <key>=<value>\\n``) in a block of its own before it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

import msgspec

from sectorfs.errors import BadInput

BLOCK = 512

REGULAR = "0"
PAX = "x"
LONG_NAME = "L"

MAX_OCTAL_11 = 8**11 - 1
"""Highest size and time that fit a header."""
MAX_OCTAL_7 = 8**7 - 1
"""Highest mode and owner that fit a header."""

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_SUM = slice(148, 156)
_USTAR = b"ustar\0"
_OCTAL = re.compile(rb"[0-7]*")
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,9}) ")


class Header(msgspec.Struct, frozen=True):
    """What a header block says; `prefix/name` is joined, nothing is judged yet."""

    name: str
    kind: str
    """One character, ``0`` for a regular file."""
    size: int
    mtime: int
    """Seconds."""


def pad_length(size: int) -> int:
    """Bytes from the end of a content to the next block."""
    return -size % BLOCK


def encode_header(
    name: str,
    *,
    kind: str,
    size: int,
    mtime: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
) -> bytes:
    """A header block; every value fits its field."""
    block = bytearray(
        _HEADER.pack(
            name.encode("ascii"),
            _octal(mode, 7),
            _octal(uid, 7),
            _octal(gid, 7),
            _octal(size, 11),
            _octal(mtime, 11),
            b" " * 8,
            kind.encode("ascii"),
            b"",
            _USTAR,
            b"00",
            b"",
            b"",
            _octal(0, 7),
            _octal(0, 7),
            b"",
        )
    )
    block[_SUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def decode_header(block: bytes) -> Header:
    """The values of a header block; `BadInput` when its sum or a number is wrong."""
    stated = _number(block[_SUM], "sum")
    blanked = block[: _SUM.start] + b" " * 8 + block[_SUM.stop :]
    if sum(blanked) != stated:
        raise BadInput("tar: a header with a wrong sum")
    fields = _HEADER.unpack(block)
    name, size, mtime, kind, magic, prefix = (fields[i] for i in (0, 4, 5, 7, 9, 15))
    # Only in this one flavour do the bytes of the prefix mean one.
    joined = _text(name)
    if magic == _USTAR and prefix[0]:
        joined = f"{_text(prefix)}/{joined}"
    return Header(
        joined,
        REGULAR if kind == b"\0" else kind.decode("latin-1"),
        _number(size, "size"),
        _number(mtime, "time"),
    )


def encode_pax(records: Mapping[str, str]) -> bytes:
    """The content of a PAX header."""
    return b"".join(_pax_record(f" {key}={value}\n".encode()) for key, value in records.items())


def decode_pax(data: bytes) -> dict[str, str]:
    """The records of a PAX header; of a repeated key the last one, an empty value means absent."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        match = _PAX_LENGTH.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != 0x0A:
            raise BadInput("tar: a PAX header whose records do not add up")
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if not equals or not key:
            raise BadInput("tar: a PAX record without a key")
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        at = end
    return {key: value for key, value in records.items() if value}


def _pax_record(rest: bytes) -> bytes:
    """A record with its own length in front; the length counts its own digits."""
    length = len(rest)
    while (total := len(rest) + len(str(length))) != length:
        length = total
    return str(length).encode() + rest


def _octal(value: int, digits: int) -> bytes:
    return b"%0*o\0" % (digits, value)


def _number(field: bytes, what: str) -> int:
    """An octal number, or GNU's big-endian one, marked by its first byte."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0x80 else value - (1 << 8 * (len(field) - 1))
    text = field.partition(b"\0")[0].strip(b" ")
    if _OCTAL.fullmatch(text) is None:
        raise BadInput(f"tar: a header whose {what} is no number", repr(text))
    return int(text or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")
