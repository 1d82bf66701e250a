"""`sectorfs why`: where a file would be read from now, and why not from elsewhere, as JSON."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sectorfs.stores.prospects import Prospect
from sectorfs.stores.protocol import State
from sectorfs.types import MemberFacts, SectorFile


class WayReport(msgspec.Struct, kw_only=True):
    """One way to one copy."""

    storage: str
    primary: bool
    where: str
    """Path or URL; empty where no node serves the storage."""
    chosen: bool
    against: str
    """Why it is not read; empty for the one that is."""
    failure: str | None
    """The last thing that went wrong with this source, whichever file it was about."""
    failed_ago: float | None
    """Seconds since then."""
    node: str | None
    """What kind of node gives it; None for this one, and while that is not known."""


class WhyReport(msgspec.Struct, kw_only=True):
    """Where a file is read from."""

    file_type: str
    sector: str
    member: str | None
    size: int | None
    mtime_ns: int | None
    state: str
    how: str
    """``in place``, ``streamed``, ``fetched whole first``, or ``nowhere``."""
    where: str | None
    present: int | None
    """Bytes that are here already of a file that comes in part."""
    pinned: bool
    sources: list[WayReport]
    """Those that would be tried first in front."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the file that is asked about."""

    file: SectorFile
    member: str | None
    facts: MemberFacts | None
    state: State
    streamed: bool
    present: int | None
    pinned: bool


def why_report(subject: Subject, prospects: Sequence[Prospect], *, now: float) -> WhyReport:
    """What operators are shown."""
    chosen = next((one for one in prospects if not one.against), None)
    facts = subject.facts
    return WhyReport(
        file_type=subject.file.file_type.dir_name,
        sector=subject.file.sector.name,
        member=subject.member,
        size=facts.size if facts else None,
        mtime_ns=facts.mtime_ns if facts else None,
        state=subject.state,
        how=_how(chosen, streamed=subject.streamed),
        where=_where(chosen, subject) if chosen else None,
        present=subject.present,
        pinned=subject.pinned,
        sources=[_way(one, subject, chosen=one is chosen, now=now) for one in prospects],
    )


def _how(chosen: Prospect | None, *, streamed: bool) -> str:
    if chosen is None:
        return "nowhere"
    if chosen.kind == "here":
        return "in place"
    return "streamed" if streamed else "fetched whole first"


def _where(prospect: Prospect, subject: Subject) -> str:
    """The file itself, below the path or base URL."""
    if not prospect.where:
        return ""
    member = f"/{subject.member}" if subject.member else ""
    # Other nodes have the files of a directory below `files`.
    folder = "/files" if member and prospect.kind == "peer" else ""
    return f"{prospect.where.rstrip('/')}/{subject.file}{folder}{member}"


def _way(prospect: Prospect, subject: Subject, *, chosen: bool, now: float) -> WayReport:
    failure = prospect.failure
    return WayReport(
        storage=prospect.storage,
        primary=prospect.primary,
        where=_where(prospect, subject),
        chosen=chosen,
        against=prospect.against,
        failure=failure.text if failure else None,
        failed_ago=now - failure.at if failure else None,
        node=prospect.node or None,
    )
