"""The sources of a sector file, best first, by what this node knows now.

The rule itself is `sources`; here is what it looks at: the catalog, this node's own paths, how fast
peers answer, which of them failed lately, and which gave wrong bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from sectorfs.errors import NoRanges, NotFound, SectorFSError, WrongBytes
from sectorfs.index.catalog import Catalog, Entry
from sectorfs.metrics import WRONG_BYTES
from sectorfs.stores.bars import Bar, Bars
from sectorfs.stores.local import LocalStore
from sectorfs.stores.node_kinds import NodeKind
from sectorfs.stores.prospects import Failure, Outlook, OwnPath, Prospect, prospects
from sectorfs.stores.sources import LocalSource, PeerSource, View, rank, sharing
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import SectorFile, StorageID

log = logging.getLogger(__name__)

FAILING_SECONDS = 15.0
"""For so long a peer that failed is tried last."""


class Ranking:
    """Ranks sources on one node."""

    def __init__(
        self,
        catalog: Catalog,
        local: LocalStore,
        peers: PeerClient,
        *,
        own_urls: frozenset[str],
        cutoff: float,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self._catalog = catalog
        self._local = local
        self._peers = peers
        self._own_urls = own_urls
        self._cutoff = cutoff
        self._now = now
        self._bars = Bars(catalog.declared)
        self._failed_at: dict[str, float] = {}
        # By storage and base URL, which is empty for copies on this node.
        self._failures: dict[tuple[StorageID, str], Failure] = {}

    def of(self, entry: Entry) -> tuple[list[LocalSource], list[PeerSource]]:
        """The copies on this node, and those of peers."""
        return rank(entry.declarations, self._view())

    def sharing(self, entry: Entry) -> frozenset[PeerSource]:
        """The peers that may give parts of one file side by side."""
        return sharing(entry.declarations, self._view())

    def prospects(self, entry: Entry, silent: Callable[[PeerSource], str]) -> list[Prospect]:
        """The same for people: every copy, and what speaks against it."""
        outlook = Outlook(
            view=self._view(),
            paths={path.storage: OwnPath(path.path, path.error) for path in self._local.paths()},
            silent=silent,
            failure=lambda storage, url: self._failures.get((storage, url)),
            node=lambda url: self._peers.kind(url) or "",
            barred=lambda file, source: str(self.bar(file, source) or ""),
        )
        return prospects(entry, outlook)

    def _view(self) -> View:
        now = self._now()
        return View(
            here=frozenset(path.storage for path in self._local.paths() if path.available),
            own_urls=self._own_urls,
            storage=self._catalog.storage,
            healthy=self.healthy,
            latency=self._peers.latency,
            whole_only=lambda url: self._peers.kind(url) is NodeKind.WHOLE,
            failing=lambda url: now - self._failed_at.get(url, -FAILING_SECONDS) < FAILING_SECONDS,
            barred=lambda file, source: self._bars.of(file, source, now) is not None,
        )

    def healthy(self, storage: StorageID) -> bool:
        """Whether a storage was heard of lately."""
        return self._catalog.healthy(storage, self._now(), self._cutoff)

    def failed(self, file: SectorFile, source: PeerSource, cause: SectorFSError) -> None:
        """A source could not give what it should of a file.

        One that lacks a file is not ill, nor is one that gives files whole only, nor one that has a
        bad copy: that one is barred.
        """
        self._note(source.storage, source.url, cause)
        if isinstance(cause, WrongBytes):
            WRONG_BYTES.inc()
            log.warning("%s: %s is asked last from now on: %s", file, source.url, cause)
            self._bars.add(file, source, cause.what, self._now())
        elif not isinstance(cause, NotFound | NoRanges):
            self._failed_at[source.url] = self._now()

    def bar(self, file: SectorFile, source: PeerSource) -> Bar | None:
        """Why a source is asked last for a file; None when it is not."""
        return self._bars.of(file, source, self._now())

    def bars(self) -> list[Bar]:
        """All sources that gave wrong bytes, the last first."""
        return self._bars.all(self._now())

    def failed_here(self, storage: StorageID, cause: SectorFSError) -> None:
        """A copy on this node could not be read."""
        self._note(storage, "", cause)

    def _note(self, storage: StorageID, url: str, cause: SectorFSError) -> None:
        self._failures[storage, url] = Failure(self._now(), str(cause))

    def answered(self, source: PeerSource) -> None:
        """A source gave what it should."""
        self._failed_at.pop(source.url, None)
