"""Whether a range of an unsealed sector is there: what peers ask before they read it.

Numbers are *unpadded*, unlike those of a Range header; the sector's size follows from the number of
its seal proof.
"""

from __future__ import annotations

import re

from sectorfs.errors import BadInput, BadRange
from sectorfs.stores import layout
from sectorfs.stores.fr32 import padded
from sectorfs.stores.protocol import OpenFile
from sectorfs.stores.trailer import PartialFile
from sectorfs.types import MAX_NUMBER, FileType, SectorFile

_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)


def parse(file: SectorFile, proof: str, offset: str, size: str) -> tuple[int, int, int]:
    """Sector size, offset and size out of a path; `BadInput` for what is no such question."""
    if file.file_type is not FileType.UNSEALED:
        raise BadInput("only unsealed files have allocated ranges", file)
    start, length = _number(offset, "offset"), _number(size, "size")
    if padded(start) + padded(length) > MAX_NUMBER:
        raise BadInput("offset and size beyond 63 bits", file)
    return layout.sector_size_of(_number(proof, "seal proof")), start, length


async def check(
    opened: OpenFile, file: SectorFile, *, sector_size: int, offset: int, size: int
) -> None:
    """`BadRange` when part of the range is missing, `SourceFailed` for a damaged file."""
    _check_size(opened, file, sector_size)
    partial = await opened.lane.run(
        lambda: PartialFile.open(opened.descriptor, sector_size=sector_size, thing=file),
        what=f"read trailer of {file}",
    )
    if not partial.has_allocated(offset, size):
        raise BadRange("part of the range is not unsealed", file, f"{size} from {offset}")


def _check_size(opened: OpenFile, file: SectorFile, sector_size: int) -> None:
    """A wrong seal proof is the client's mistake, not a damaged file."""

    def fits(size: int) -> bool:
        return layout.file_fits(FileType.UNSEALED, opened.size, sector_size=size)

    if not fits(sector_size) and any(map(fits, layout.SECTOR_SIZES)):
        raise BadInput(f"the seal proof is for sectors of {sector_size} bytes", file)


def _number(text: str, what: str) -> int:
    if _NUMBER.fullmatch(text) is None or int(text) > MAX_NUMBER:
        raise BadInput(f"the {what} is not a decimal number of 63 bits: {text[:80]!r}")
    return int(text)
