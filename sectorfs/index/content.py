"""What several declarations of one sector file say about its content: pure rules.

Copies of a sector file may disagree for a while (one was replaced, one is stale). The newest
primary decides what the file is; a copy may serve its bytes only where it provably is the same.
Digests, which come later than sizes and times or never, say more than these where two are known.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sectorfs.index.protocol import Declaration
from sectorfs.types import Facts, MemberFacts, StorageID

_SECOND = 1_000_000_000


Standing = tuple[bool, int, StorageID]


def standing(primary: bool, mtime_ns: int, storage: StorageID) -> Standing:
    """Who has the say: the least of several. Primary before copy, later mtime, lower storage id."""
    return (not primary, -mtime_ns, storage)


def present_facts(declarations: Sequence[Declaration]) -> Facts | None:
    """The facts that hold now: of the newest primary that tells any, else of the newest copy.

    Their digest, if that one does not know it, is of the next that declares the same content.
    """
    best: Facts | None = None
    least: Standing | None = None
    digested = False
    for one in declarations:
        if one.facts is None:
            continue
        digested = digested or bool(one.facts.digest)
        own = _standing(one, one.facts)
        if least is None or own < least:
            best, least = one.facts, own
    if best is None or best.digest or not digested:
        return best
    return _with_digest(best, declarations)


def _with_digest(facts: Facts, declarations: Sequence[Declaration]) -> Facts:
    same = [
        (_standing(one, one.facts), one.facts.digest)
        for one in declarations
        if one.facts is not None and one.facts.digest and exact(one, facts)
    ]
    return msgspec.structs.replace(facts, digest=min(same)[1]) if same else facts


def _standing(one: Declaration, facts: Facts) -> Standing:
    return standing(one.primary, facts.mtime_ns, one.storage)


def eligible(declarations: Sequence[Declaration]) -> list[Declaration]:
    """The declarations that may serve as a source of the present content, in the given order."""
    facts = present_facts(declarations)
    return [one for one in declarations if _serves(one, facts)]


def exact(declaration: Declaration, facts: Facts) -> bool:
    """True when the declaration is known to be this very content: sizes and mtimes agree.

    So must the digests, as far as they are known.
    """
    known = declaration.facts
    if known is None or not _alike(known, facts) or _contradict(known, facts):
        return False
    # A file of a directory may change without a trace in the directory's own size and time.
    ours, theirs = known.members or (), facts.members or ()
    return len(ours) == len(theirs) and all(
        one.name == other.name and _alike(one, other)
        for one, other in zip(ours, theirs, strict=True)
    )


def _contradict(one: Facts, other: Facts) -> bool:
    return bool(one.digest and other.digest) and one.digest != other.digest


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
        return declaration.facts.size == facts.size and not _contradict(declaration.facts, facts)
    return exact(declaration, facts)
