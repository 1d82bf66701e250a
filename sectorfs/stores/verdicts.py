"""What a look at every byte of a file says of it: states, damaged ranges, and how they are told.

Pure. A file is judged by the digest it was declared with, by the manifest that was made of it here,
and by the digest of the copy that has the say: by the first of these that is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import msgspec

from sectorfs.stores.manifest import BLOCK, HASH, Outline
from sectorfs.types import SectorFile, StorageID

State = Literal["unreadable", "damaged", "incomplete", "changed", "unproved", "ok"]
"""The worst first.

``ok``: proved. ``unproved``: nothing to compare with; it is hashed now. ``changed``: other bytes
than the Index tells of, or another file by the time it was read. ``incomplete``: too short, or not
there. ``damaged``: not the bytes that were hashed. ``unreadable``: the disk does not give them.
"""

STATES: tuple[State, ...] = get_args(State)
WELL: frozenset[State] = frozenset({"ok", "unproved"})
"""States in which nothing is known to be wrong."""

MAX_RANGES = 100
"""Ranges that are told of one file."""

Range = tuple[int, int]
"""First byte, and the one behind the last."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One regular file, and what was found."""

    file: SectorFile
    storage: StorageID
    member: str | None = None
    """A file of a sector directory; None for a regular one, and for the directory as a whole."""
    state: State
    size: int = 0
    detail: str = ""
    """More words on the state."""
    bad: tuple[int, ...] = ()
    """Numbers of the blocks that are damaged or unreadable, ascending; all, where `located`."""
    located: bool = True
    """False: it is known that bytes are wrong, and not where."""
    repaired: bool = False
    """It was found so, and is well by now."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A finding as it is written down and shown: bounded, whatever was found."""

    file_type: str
    sector: str
    member: str | None
    storage: str
    state: State
    size: int
    detail: str
    blocks: int
    """How many are damaged or unreadable."""
    located: bool
    """False: it is known that bytes are wrong, and not where."""
    ranges: list[Range]
    """The bytes of these blocks, merged; see `ranges`. Empty where they are not located."""
    repaired: bool

    @property
    def name(self) -> str:
        """For people: ``cache/s-t01000-7/p_aux``."""
        name = f"{self.file_type}/{self.sector}"
        return f"{name}/{self.member}" if self.member is not None else name


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What a file can be compared with."""

    told: bytes = b""
    """The digest that its storage declared, of this size and time."""
    own: Outline | None = None
    """Of the manifest that was made of it here, at this size and time."""
    present: bytes = b""
    """The digest of the copy that has the say."""
    copied: bool = False
    """This is no primary copy, and has the very size and time of that one.

    Of two primary copies that differ nobody knows which one is damaged, before both were hashed.
    """

    @property
    def wanted(self) -> bytes:
        """The digest that it must have; empty when nobody can say."""
        if self.told:
            return self.told
        if self.own is not None:
            return self.own.digest
        return self.present if self.copied else b""


def tell(finding: Finding) -> Told:
    """A finding, as it is shown."""
    return Told(
        file_type=finding.file.file_type.dir_name,
        sector=finding.file.sector.name,
        member=finding.member,
        storage=finding.storage,
        state=finding.state,
        size=finding.size,
        detail=finding.detail,
        blocks=len(finding.bad) if finding.located else 0,
        located=finding.located,
        ranges=ranges(finding.bad, finding.size) if finding.located else [],
        repaired=finding.repaired,
    )


class Judgement(msgspec.Struct, frozen=True):
    """A state, and why."""

    state: State
    detail: str = ""


def judge(digest: bytes, known: Known) -> Judgement:
    """What it means that a file, read as a whole, has this digest."""
    wanted = known.wanted
    if wanted and digest != wanted:
        if known.own is not None and digest == known.own.digest:
            return Judgement("changed", "has the bytes hashed here, and the Index tells of others")
        return Judgement("damaged")
    if known.present and digest != known.present:
        return Judgement("changed", "has other bytes than the newest primary copy")
    return Judgement("ok" if wanted or known.present else "unproved")


def differing(one: bytes, other: bytes) -> tuple[int, ...]:
    """The numbers of the blocks whose hashes differ."""
    if one == other:
        return ()
    return tuple(
        at // HASH
        for at in range(0, len(one), HASH)
        if one[at : at + HASH] != other[at : at + HASH]
    )


def worst(states: Iterable[State]) -> State:
    """The one to tell of several; ``ok`` for none."""
    return min(states, key=STATES.index, default="ok")


def ranges(bad: Sequence[int], size: int, *, most: int = MAX_RANGES) -> list[Range]:
    """The bytes of these blocks, merged; where there are more than `most`, the nearest are joined.

    Whatever is damaged lies within them.
    """
    found: list[list[int]] = []
    for block in bad:
        start, end = block * BLOCK, min((block + 1) * BLOCK, size)
        if found and found[-1][1] == start:
            found[-1][1] = end
        else:
            found.append([start, end])
    if len(found) > most:
        gaps = sorted(range(1, len(found)), key=lambda at: found[at][0] - found[at - 1][1])
        keep = sorted(gaps[len(found) - most :])
        starts, ends = [0, *keep], [*keep, len(found)]
        found = [
            [found[first][0], found[last - 1][1]] for first, last in zip(starts, ends, strict=True)
        ]
    return [(start, end) for start, end in found]
