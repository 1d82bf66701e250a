"""What several declarations of one sector file say about its content: pure rules.

Copies of a sector file may disagree for a while (one was replaced, one is stale). The newest
primary decides what the file is; a copy may serve its bytes only where it provably is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from sectorfs.index.protocol import Declaration
from sectorfs.types import Facts, MemberFacts

_SECOND = 1_000_000_000


def present_facts(declarations: Sequence[Declaration]) -> Facts | None:
    """The facts that hold now: of the newest primary that tells any, else of the newest copy."""
    best: Declaration | None = None
    for declaration in declarations:
        if declaration.facts is not None and (best is None or _newer(declaration, best)):
            best = declaration
    return best.facts if best is not None else None


def _newer(one: Declaration, other: Declaration) -> bool:
    """Primary before copy, then the later mtime, then the lower storage id."""
    assert one.facts is not None
    assert other.facts is not None
    if one.primary != other.primary:
        return one.primary
    if one.facts.mtime_ns != other.facts.mtime_ns:
        return one.facts.mtime_ns > other.facts.mtime_ns
    return one.storage < other.storage


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


def _serves(declaration: Declaration, facts: Facts | None) -> bool:
    if facts is None or declaration.facts is None:
        return True
    if declaration.primary:
        # Operators copy sectors between paths without keeping times: the size is what they share.
        return declaration.facts.size == facts.size
    return exact(declaration, facts)
