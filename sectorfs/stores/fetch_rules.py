"""What is fetched whole, what is streamed, and when a streamed file is worth a whole copy. Pure.

Policies, by file type: *open* fetches whole before `open` returns; *stream* brings what is read and
no more; *fill* streams, and makes the copy whole once enough of it was read. Whoever reads a few
kilobytes of each of two thousand sectors must not start two thousand copies.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from sectorfs.config import FetchPolicy

SMALL = 4 << 20
"""Bytes up to which a file is fetched whole, and never queues behind bulk."""
FILL_AFTER = 64 << 20
"""Bytes read in sequence after which a reader is taken to want all of it."""
FILL_SHARE = 16
"""Likewise after one part in so many came, in whatever order."""

_NEVER_FILLED = ("sc-02-data-layer-*", "*tree-c*", "*tree-d*")
"""Files of sector directories that only sealing reads as a whole: hundreds of gigabytes each."""


def is_streamed(policy: FetchPolicy, size: int) -> bool:
    """Whether a file is read while it comes."""
    return policy != "open" and size > SMALL


def may_fill(policy: FetchPolicy, member: str | None) -> bool:
    """Whether a copy may be made that nobody asked for."""
    if policy != "fill":
        return False
    return member is None or not any(fnmatchcase(member, pattern) for pattern in _NEVER_FILLED)


def is_worth_a_copy(*, streak: int, present: int, size: int) -> bool:
    """Whether enough was read: `streak` bytes in sequence, `present` of `size` in all."""
    return streak >= FILL_AFTER or present * FILL_SHARE >= size
