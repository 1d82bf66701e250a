"""Whether a sector file is all that its type asks for: names and lengths, by the sector's size.

Pure. The size of a sector is not written down anywhere on a storage path; it is what most of the
sector's files have the length for. Of equal counts the largest wins: files get lost and cut off,
and do not grow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from sectorfs.stores import layout
from sectorfs.stores.layout import SECTOR_SIZES
from sectorfs.types import Facts, FileType

WHOLE = ""
"""The name of a regular sector file among `sizes`: that of no file in a directory."""

_EXACT = (FileType.SEALED, FileType.UPDATE, FileType.KEY)
_ALWAYS = ("p_aux", "t_aux")


class Lack(msgspec.Struct, frozen=True):
    """What is wrong with one file of a sector file."""

    name: str
    """`WHOLE`, or that of a file in a directory."""
    state: Literal["incomplete", "damaged"]
    """Too short or not there; or longer than anything it could be."""
    detail: str


def sector_size_among(told: Mapping[FileType, Facts]) -> int | None:
    """The size of the sector that has these files; None when none of them tells."""
    votes = Counter(
        size for file_type, facts in told.items() if (size := _told_by(file_type, facts))
    )
    return max(votes, key=lambda size: (votes[size], size), default=None)


def lacks(
    file_type: FileType, sizes: Mapping[str, int], sector_size: int | None, *, settled: bool
) -> list[Lack]:
    """What a sector file with files of these `sizes` lacks.

    Of one that is not `settled`, for it lies where sectors are being sealed, nothing is expected.
    """
    if not settled or file_type is FileType.PIECE:
        return []
    if file_type.is_directory:
        return _directory_lacks(file_type, sizes, sector_size)
    return _file_lacks(file_type, sizes[WHOLE], sector_size)


def _file_lacks(file_type: FileType, size: int, sector_size: int | None) -> list[Lack]:
    if sector_size is None:
        return [Lack(WHOLE, "incomplete", f"{size} bytes are the size of no sector")]
    if size < sector_size:
        return [Lack(WHOLE, "incomplete", f"has {size} of {sector_size} bytes")]
    if not layout.file_fits(file_type, size, sector_size=sector_size):
        return [Lack(WHOLE, "damaged", f"has {size - sector_size} bytes more than its sector")]
    return []


def _directory_lacks(
    file_type: FileType, sizes: Mapping[str, int], sector_size: int | None
) -> list[Lack]:
    if sector_size is None:
        return [_absent(name) for name in _ALWAYS if name not in sizes]
    complete = layout.complete_cache(sector_size)
    wanted = _wanted(file_type, sizes, sector_size)
    found = [_absent(name) for name in wanted if name not in sizes]
    for name, size in sorted(sizes.items()):
        lengths = complete.get(name)
        if lengths is None or size in lengths:
            continue
        if size < lengths.low:
            found.append(Lack(name, "incomplete", f"has {size} of {lengths.low} bytes"))
        else:
            more = size - lengths.high
            found.append(Lack(name, "damaged", f"has {more} bytes more than it may have"))
    return sorted(found, key=lambda lack: lack.name)


def _wanted(file_type: FileType, sizes: Mapping[str, int], sector_size: int) -> Iterable[str]:
    """The names of the step of sealing that a directory is at."""
    final = layout.finalized_cache(sector_size)
    labels = layout.labelled_cache(sector_size)
    if file_type is FileType.UPDATE_CACHE or final.keys() <= sizes.keys():
        return final
    if not labels.keys() & sizes.keys():
        return final  # only what stays at the end is there, and not all of it
    beyond = layout.complete_cache(sector_size).keys() - labels.keys()
    return labels if not beyond & sizes.keys() else layout.complete_cache(sector_size)


def _absent(name: str) -> Lack:
    return Lack(name, "incomplete", "is not there")


def _told_by(file_type: FileType, facts: Facts) -> int | None:
    """The size of a sector for which one of its files has the length."""
    if facts.members is not None:
        return _told_by_members({member.name: member.size for member in facts.members})
    if file_type in _EXACT:
        return facts.size if facts.size in SECTOR_SIZES else None
    if file_type is FileType.UNSEALED:
        fitting = [one for one in SECTOR_SIZES if _fits(facts.size, one)]
        return max(fitting, default=None)
    return None


def _fits(size: int, sector_size: int) -> bool:
    return layout.file_fits(FileType.UNSEALED, size, sector_size=sector_size)


def _told_by_members(sizes: Mapping[str, int]) -> int | None:
    """By what fits most; the two largest sectors differ in the number of their trees alone."""
    votes: Counter[int] = Counter()
    for sector_size in SECTOR_SIZES:
        files = layout.complete_cache(sector_size)
        own = files.keys() - set(_ALWAYS)
        votes[sector_size] = sum(
            name in own and size in files[name] for name, size in sizes.items()
        )
    best = max(votes.values())
    if best == 0:
        return None
    # The smaller of two that fit alike: the larger one would have more files.
    return min(size for size, count in votes.items() if count == best)
