"""How nodes of lotus and Curio read a sector directory's tar: Go's reader, and their rules on it.

Written apart from our own reader and writer, so that a mistake of theirs is not made twice. It is
as strict as the original is: about checksums, numbers, records, and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

BLOCK = 512
_GIB = 1 << 30
_NUMBERED = 16
"""Files of a tree at most."""

FINALIZED: Mapping[str, int] = {
    "p_aux": 64,
    "t_aux": 10_240,
    "sc-02-data-tree-r-last.dat": 10_000_000,
    **{f"sc-02-data-tree-r-last-{i}.dat": 10_000_000 for i in range(_NUMBERED)},
    "snap-vproof.json": 20_000_000,
}
"""What Curio takes of a finalized directory, and the most bytes of each."""
KNOWN: Mapping[str, int] = {
    **FINALIZED,
    **{f"sc-02-data-layer-{i}.dat": 65 * _GIB for i in range(1, 12)},
    **{f"sc-02-data-tree-c-{i}.dat": 5 * _GIB for i in range(_NUMBERED)},
    "sc-02-data-tree-d.dat": 130 * _GIB,
    "batch.json": 10_000,
    "commit-phase1-output": 20_000_000,
}
"""What Curio takes of any cache directory."""

Read = Callable[[int], bytes]
"""Up to so many bytes of a stream; none only at its end."""


class TarRefused(Exception):
    """The reader returns an error, and the fetch fails."""


class Header:
    """One entry as Go sees it, the records before it applied."""

    def __init__(self, name: str, size: int, kind: bytes) -> None:
        self.name = name
        self.size = size
        self.kind = kind


def extract(read: Read, directory: Path, allow: Mapping[str, int] | None) -> int:
    """Write the entries of a stream into a directory; the bytes of them.

    With `allow` as Curio does it, which refuses what is not listed; without, as lotus does.
    """
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    total = 0
    for header in headers(read):
        if allow is not None:
            if header.name not in allow:
                raise TarRefused(f"tar file {header.name!r} isn't expected")
            if header.size > allow[header.name]:
                raise TarRefused(f"tar file {header.name!r} is bigger than expected")
        out = directory / header.name
        if not str(out).startswith(str(directory)) or ".." in out.parts:
            raise TarRefused(f"unsafe tar path {header.name!r}")
        total += _copy(read, header.size, out)
        # The first writers end with the last byte of the last file.
        _up_to(read, -header.size % BLOCK)
    return total


def headers(read: Read) -> Iterator[Header]:
    """Each entry in turn; its content has to be read before the next one is asked for."""
    records: dict[str, str] = {}
    while (block := _block(read)) is not None:
        header = _header(block)
        if header.kind == b"x":
            records = _records(_exactly(read, header.size))
            _exactly(read, -header.size % BLOCK)
            continue
        if header.kind not in (b"0", b"\0"):
            raise TarRefused(f"an entry of kind {header.kind!r}")  # no node ever sends one
        header.name = records.get("path", header.name)
        header.size = int(records["size"]) if "size" in records else header.size
        records = {}
        yield header


def _copy(read: Read, size: int, out: Path) -> int:
    with out.open("wb") as file:
        for at in range(0, size, 1 << 20):
            file.write(_exactly(read, min(1 << 20, size - at)))
    return size


def _exactly(read: Read, size: int) -> bytes:
    data = _up_to(read, size)
    if len(data) < size:
        raise TarRefused("unexpected EOF")
    return data


def _up_to(read: Read, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := read(size - len(data))):
        data += piece
    return data


def _block(read: Read) -> bytes | None:
    """The next block with something in it; None at the end, be it marked by zeros or not."""
    block = _up_to(read, BLOCK)
    if not block:
        return None
    if len(block) < BLOCK:
        raise TarRefused("unexpected EOF")
    if any(block):
        return block
    if any(_up_to(read, BLOCK)):
        raise TarRefused("invalid tar header: data after a block of zeros")
    return None


def _header(block: bytes) -> Header:
    stated = _octal(block[148:156])
    if stated != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise TarRefused("invalid tar header: checksum")
    if block[257:265] != b"ustar\x0000":
        raise TarRefused("neither USTAR nor PAX")
    for start, end in ((100, 108), (108, 116), (116, 124), (136, 148)):
        _octal(block[start:end])
    return Header(_text(block[0:100]), _octal(block[124:136]), block[156:157])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode()


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits:
        return 0
    try:
        return int(digits, 8)
    except ValueError as exc:
        raise TarRefused(f"invalid tar header: number {field!r}") from exc


def _records(data: bytes) -> dict[str, str]:
    """``27 path=…\\n`` and so on; the count includes itself and the end of the line."""
    found = {}
    while data:
        count, space, _ = data.partition(b" ")
        if not space or not count.isdigit() or int(count) > len(data):
            raise TarRefused("invalid tar header: PAX record")
        record, data = data[len(count) + 1 : int(count)], data[int(count) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or not key:
            raise TarRefused("invalid tar header: PAX record")
        found[key.decode()] = value[:-1].decode()
    return found
