"""What several declarations of one sector file say about its content: pure rules.

Copies of a sector file may disagree for a while (one was replaced, one is stale). The newest
primary decides what the file is; a copy may serve its bytes only where it provably is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from sectorfs.index.protocol import Declaration
from sectorfs.types import Facts, MemberFacts, StorageID

_SECOND = 1_000_000_000


Standing = tuple[bool, int, StorageID]


def standing(primary: bool, mtime_ns: int, storage: StorageID) -> Standing:
    """Who has the say: the least of several. Primary before copy, later mtime, lower storage id."""
    return (not primary, -mtime_ns, storage)


def present_facts(declarations: Sequence[Declaration]) -> Facts | None:
    """The facts that hold now: of the newest primary that tells any, else of the newest copy."""
    best: Facts | None = None
    least: Standing | None = None
    for one in declarations:
        if one.facts is None:
            continue
        own = standing(one.primary, one.facts.mtime_ns, one.storage)
        if least is None or own < least:
            best, least = one.facts, own
    return best


def eligible(declarations: Sequence[Declaration]) -> list[Declaration]:
    """The declarations that may serve as a source of the present content, in the given order."""
    facts = present_facts(declarations)
    return [one for one in declarations if _serves(one, facts)]


def exact(declaration: Declaration, facts: Facts) -> bool:
    """True when the declaration is known to be this very content: sizes and mtimes agree."""
    known = declaration.facts
    if known is None or not _alike(known, facts):
        return False
    # A file of a directory may change without a trace in the directory's own size and time.
    ours, theirs = known.members or (), facts.members or ()
    return len(ours) == len(theirs) and all(
        one.name == other.name and _alike(one, other)
        for one, other in zip(ours, theirs, strict=True)
    )


def _alike(one: Facts | MemberFacts, other: Facts | MemberFacts) -> bool:
    return one.size == other.size and same_mtime(one.mtime_ns, other.mtime_ns)


def same_mtime(one: int, other: int) -> bool:
    """Equal modification times, where a file system or tool without sub-second parts cut one."""
    if one == other:
        return True
    whole = one % _SECOND == 0 or other % _SECOND == 0
    return whole and one // _SECOND == other // _SECOND


def facts_of(facts: Facts | None, member: str | None) -> MemberFacts | None:
    """Size and time of a regular file; None when nobody said, or there is none of that name."""
    if facts is None:
        return None
    if member is not None:
        return facts.member(member)
    return MemberFacts("", facts.size, facts.mtime_ns)


def _serves(declaration: Declaration, facts: Facts | None) -> bool:
    if facts is None or declaration.facts is None:
        return True
    if declaration.primary:
        # Operators copy sectors between paths without keeping times: the size is what they share.
        return declaration.facts.size == facts.size
    return exact(declaration, facts)
