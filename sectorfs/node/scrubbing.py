"""The scrub of a node: its parts, built in one place, and the order in which they start."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sectorfs.config import Config, interval, rate_of
from sectorfs.errors import SectorFSError
from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import SectorIndex
from sectorfs.node.repo import Repo
from sectorfs.node.verify import LocalVerifying
from sectorfs.stores.local import LocalStore
from sectorfs.stores.manifest_store import ManifestStore
from sectorfs.stores.mending import Mender
from sectorfs.stores.others import Others
from sectorfs.stores.scrub import Examiner
from sectorfs.stores.scrub_notes import ScrubNotes
from sectorfs.stores.scrubber import Scrubber
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.turns import Turns
from sectorfs.types import SectorFile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scrubbing:
    """What looks at the files of a node, and repairs them."""

    verifying: LocalVerifying
    scrubber: Scrubber
    mender: Mender

    async def recover(self) -> None:
        """Finish what an earlier run left; before any path is attached."""
        await self.mender.recover()
        try:
            await self.scrubber.notes.read()
        except SectorFSError as exc:
            log.error("scrubs begin anew: %s", exc)

    async def run(self, feed: Feed) -> None:
        """Keep to the schedule, once it is known what there is."""
        await feed.wait_until(lambda catalog: catalog.loaded)
        await self.scrubber.run_schedule()


def make_scrubbing(
    repo: Repo,
    config: Config,
    *,
    index: SectorIndex,
    catalog: Catalog,
    local: LocalStore,
    peers: PeerClient,
    manifests: ManifestStore,
    turns: Turns,
    own_url: str,
    caught_up: Callable[[], Awaitable[None]],
    on_repaired: Callable[[SectorFile, str | None], object],
) -> Scrubbing:
    """The scrub over a node's parts."""
    others = Others(
        catalog=catalog,
        local=local,
        peers=peers,
        manifests=manifests,
        own_urls=frozenset((own_url,)),
        cutoff=config.index.cutoff,
    )
    mender = Mender(
        repo.scrub / "repairs",
        index=index,
        catalog=catalog,
        others=others,
        turns=turns,
        owner=own_url,
        deadline=config.timeouts.disk,
        on_repaired=on_repaired,
    )
    scrubber = Scrubber(
        local=local,
        catalog=catalog,
        examiner=Examiner(index=index, catalog=catalog, manifests=manifests, others=others),
        notes=ScrubNotes(repo.scrub, deadline=config.timeouts.disk),
        mender=mender,
        rate=rate_of(config.scrub.max_rate),
        every=interval(config.scrub.every),
    )
    verifying = LocalVerifying(scrubber=scrubber, catalog=catalog, local=local, caught_up=caught_up)
    return Scrubbing(verifying, scrubber, mender)
