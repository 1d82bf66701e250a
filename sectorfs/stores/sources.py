"""Which copy of a sector file to read: a pure ranking of its declarations.

Local paths come first, then paths attached here and elsewhere (usually network file systems), then
peers: healthy before unhealthy, those that failed lately last, and behind them those that gave
wrong bytes of this file; the very content before a primary of
the same size with another time, then by latency and weight. The order is total, so that every
reader of a node takes the same source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from sectorfs.index import content
from sectorfs.index.protocol import Declaration, StorageStatus
from sectorfs.types import Facts, SectorFile, StorageID

LATENCY_STEP = 0.005
"""Seconds: latencies are compared in steps, so that noise does not override weights."""


class LocalSource(msgspec.Struct, frozen=True):
    """A copy on a storage path of this node."""

    storage: StorageID
    shared: bool
    """The path is attached on other nodes too."""


class PeerSource(msgspec.Struct, frozen=True):
    """A copy another node serves."""

    storage: StorageID
    url: str
    """Base URL, for example ``http://10.0.0.5:8480/remote``."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranking looks at; all of it values or cheap look-ups in memory."""

    here: frozenset[StorageID]
    """Storages attached to this node that answer."""
    own_urls: frozenset[str]
    """Base URLs of this node: never a peer."""
    storage: Callable[[StorageID], StorageStatus | None]
    healthy: Callable[[StorageID], bool]
    latency: Callable[[str], float]
    """Seconds to the first byte of a base URL; 0 when never asked."""
    failing: Callable[[str], bool]
    """True for a base URL that failed lately."""
    barred: Callable[[SectorFile, PeerSource], bool]
    """True for a source that gave wrong bytes of a sector file."""
    whole_only: Callable[[str], bool] = lambda url: False
    """True for a base URL whose node gives files whole only."""


def rank(
    declarations: Sequence[Declaration], view: View
) -> tuple[list[LocalSource], list[PeerSource]]:
    """The sources of a sector file's present content, best first."""
    facts = content.present_facts(declarations)
    local: list[tuple[tuple[object, ...], LocalSource]] = []
    peers: list[tuple[tuple[object, ...], PeerSource]] = []
    for declaration in content.eligible(declarations):
        status = view.storage(declaration.storage)
        urls = status.info.urls if status else ()
        weight = status.info.weight if status else 0
        others = [url for url in urls if url not in view.own_urls]
        inexact = not _exact(declaration, facts)
        if declaration.storage in view.here:
            key = (bool(others), inexact, -weight, declaration.storage)
            local.append((key, LocalSource(declaration.storage, bool(others))))
        unwell = not view.healthy(declaration.storage)
        for url in others:
            source = PeerSource(declaration.storage, url)
            step = int(view.latency(url) / LATENCY_STEP)
            troubles = (view.barred(declaration.file, source), view.failing(url), unwell, inexact)
            whole_only = view.whole_only(url)
            peers.append(((*troubles, whole_only, step, -weight, declaration.storage, url), source))
    return (
        [source for _, source in sorted(local, key=lambda pair: pair[0])],
        [source for _, source in sorted(peers, key=lambda pair: pair[0])],
    )


def sharing(declarations: Sequence[Declaration], view: View) -> frozenset[PeerSource]:
    """The peers that may give parts of one file side by side: well, and surely alike."""
    facts = content.present_facts(declarations)
    found = set()
    for declaration in content.eligible(declarations):
        if not _exact(declaration, facts) or not view.healthy(declaration.storage):
            continue
        status = view.storage(declaration.storage)
        for url in status.info.urls if status else ():
            source = PeerSource(declaration.storage, url)
            troubled = view.failing(url) or view.barred(declaration.file, source)
            troubled |= view.whole_only(url)
            if url not in view.own_urls and not troubled:
                found.add(source)
    return frozenset(found)


def _exact(declaration: Declaration, facts: Facts | None) -> bool:
    return facts is None or content.exact(declaration, facts)
