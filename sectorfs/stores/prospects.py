"""What would become of an `open` now, and why: every copy of a sector file with a word on each.

Pure, over the same values that `sources` ranks. The first prospect without a reason against it is
what is read; what stands before it is asked in vain, what stands after it is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Literal

import msgspec

from sectorfs.index import content
from sectorfs.index.catalog import Entry
from sectorfs.index.protocol import Declaration
from sectorfs.stores.sources import PeerSource, View, rank
from sectorfs.types import Facts, SectorFile, StorageID

Kind = Literal["here", "peer", "nowhere"]
"""On a path of this node, on another node, or on a storage that no node serves."""


class Failure(msgspec.Struct, frozen=True):
    """What a source said or did last that it should not have."""

    at: float
    """By the node's clock, in seconds."""
    text: str


class Prospect(msgspec.Struct, frozen=True):
    """One way to one copy."""

    storage: StorageID
    primary: bool
    kind: Kind
    where: str
    """Path or base URL; empty for nowhere."""
    against: str = ""
    """Why it is not read; empty for the one that is."""
    failure: Failure | None = None
    node: str = ""
    """What kind of node gives it; empty for this one, and while that is not known."""


class OwnPath(msgspec.Struct, frozen=True):
    """A storage path of this node."""

    where: str
    error: str
    """Why it is not available; empty while it is."""


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """What the judgement looks at beside the ranking's own view."""

    view: View
    paths: Mapping[StorageID, OwnPath]
    """Storage paths of this node."""
    silent: Callable[[PeerSource], str]
    """Why a source is not asked at the moment; empty when it is."""
    barred: Callable[[SectorFile, PeerSource], str]
    """Why it is asked last for a sector file; empty when it is not."""
    failure: Callable[[StorageID, str], Failure | None]
    """The last failure of a storage, here (no URL) or at a base URL."""
    node: Callable[[str], str] = lambda url: ""
    """What kind of node answers at a base URL; empty while that is not known."""


def prospects(entry: Entry, outlook: Outlook) -> list[Prospect]:
    """Every way to the sector file, those that are tried first in front."""
    primary = {one.storage: one.primary for one in entry.declarations}
    here, peers = rank(entry.declarations, outlook.view)
    found: list[Prospect] = []
    chosen = ""
    for local in here:
        where = outlook.paths[local.storage].where
        against = f"{chosen} comes first" if chosen else ""
        found.append(Prospect(local.storage, primary[local.storage], "here", where, against))
        chosen = chosen or where
    for source in peers:
        against = _against(entry, source, chosen, outlook)
        found.append(Prospect(source.storage, primary[source.storage], "peer", source.url, against))
        chosen = chosen or ("" if against else source.url)
    ranked = {_key(one) for one in found}
    serving = {one.storage for one in content.eligible(entry.declarations)}
    for one in entry.declarations:
        other = "" if one.storage in serving else f"holds another content: {_shown(one.facts)}"
        found += (way for way in _excluded(one, other, outlook) if _key(way) not in ranked)
    return [_with_failure(one, outlook) for one in found]


def _against(entry: Entry, source: PeerSource, chosen: str, outlook: Outlook) -> str:
    """Why a peer is not asked; empty for the one that is."""
    silent = outlook.silent(source)
    if silent:
        return f"is left alone for a moment: {silent}"
    if not chosen:
        return ""
    barred = outlook.barred(entry.declarations[0].file, source)
    if barred:
        return barred
    if outlook.view.failing(source.url):
        return f"failed lately, and {chosen} comes first"
    if not outlook.view.healthy(source.storage):
        return f"its storage is unhealthy, and {chosen} comes first"
    return f"{chosen} comes first"


def _key(one: Prospect) -> tuple[StorageID, str]:
    return one.storage, one.where


def _with_failure(one: Prospect, outlook: Outlook) -> Prospect:
    url = one.where if one.kind == "peer" else ""
    node = outlook.node(url) if url else ""
    return msgspec.structs.replace(one, failure=outlook.failure(one.storage, url), node=node)


def _excluded(declaration: Declaration, other: str, outlook: Outlook) -> Iterator[Prospect]:
    """The ways to a copy that are no sources now, with the reason; `other` where it is known."""
    storage, primary = declaration.storage, declaration.primary
    path = outlook.paths.get(storage)
    if path is not None:
        against = other or path.error or "does not answer"
        yield Prospect(storage, primary, "here", path.where, against)
    status = outlook.view.storage(storage)
    urls = [url for url in (status.info.urls if status else ()) if url not in outlook.view.own_urls]
    for url in urls:
        yield Prospect(storage, primary, "peer", url, other or "is no source")
    if path is None and not urls:
        yield Prospect(storage, primary, "nowhere", "", other or "no node serves its storage")


def _shown(facts: Facts | None) -> str:
    if facts is None:
        return "unknown"
    moment = datetime.fromtimestamp(facts.mtime_ns // 1_000_000_000, UTC)
    digest = f", digest {facts.digest.hex()[:16]}…" if facts.digest else ""
    return f"{facts.size} bytes of {moment:%Y-%m-%dT%H:%M:%SZ}{digest}"
