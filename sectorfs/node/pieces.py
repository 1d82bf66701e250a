"""`sector piece`: where the copies of an unsealed sector are read from, without a mount.

The node that runs on the repo comes first, then the nodes that the Index names; while none runs, a
copy on a disk of this machine is read in place. What a node gives is proved where its content was
declared with a digest.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sectorfs.errors import NotFound
from sectorfs.node import access, connect, reports
from sectorfs.node.repo import Repo
from sectorfs.stores.carriers import PeerManifests
from sectorfs.stores.lanes import Lane
from sectorfs.stores.places import Places
from sectorfs.stores.proved_copies import ProvedCopy
from sectorfs.stores.prover import Prover, Proving, Subject
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.unsealed import Copy, DiskCopy, PeerCopy, UnsealedReader
from sectorfs.types import Facts, FileType, SectorFile, SectorID, StorageID

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_unsealed(repo: Repo, sector: SectorID) -> AsyncIterator[UnsealedReader]:
    """A reader over every copy of a sector's unsealed file; `NotFound` when there is none."""
    file = SectorFile(FileType.UNSEALED, sector)
    async with access.open_admin(repo) as admin:
        found = (await admin.find(sector)).files
    locations = [
        location
        for one in found
        if one.file_type == FileType.UNSEALED.dir_name
        for location in one.locations
    ]
    config = repo.config()
    token = repo.admin_token(connect.keys(repo, config))
    async with access.peer_client(repo, config, token) as client:
        urls = base_urls(locations, repo.api())
        copies: list[Copy] = _peer_copies(PeerClient(client), file, urls, _digested(found))
        if repo.api() is None:
            lane = Lane(str(file), deadline=config.timeouts.disk)
            copies[:0] = [DiskCopy(one.path, lane) for one in locations if one.path]
        if not copies:
            raise NotFound("no storage has its unsealed file", file, "see `sectorfs storage find`")
        yield UnsealedReader(file, copies)


def _digested(found: list[reports.FileReport]) -> Facts | None:
    """What a primary copy, or else any, must be; None while nobody told the digest."""
    for one in found:
        if one.file_type != FileType.UNSEALED.dir_name or one.size is None or one.mtime_ns is None:
            continue
        for location in sorted(one.locations, key=lambda copy: not copy.primary):
            if location.digest:
                return Facts(one.size, one.mtime_ns, None, bytes.fromhex(location.digest))
    return None


def _peer_copies(
    peers: PeerClient, file: SectorFile, urls: list[str], facts: Facts | None
) -> list[Copy]:
    if facts is None:
        return [PeerCopy(peers, url, file) for url in urls]
    sources = [PeerSource(StorageID(""), url) for url in urls]
    prover = Prover(
        Subject(file, None, facts, facts.size),
        Proving(),
        PeerManifests(peers, Places(1, patience=0), file, None),
        sources=lambda: sources,
        failed=lambda source, cause: log.warning("%s: %s", source.url, cause),
    )
    return [ProvedCopy(peers, source, file, facts, prover) for source in sources]


def base_urls(locations: list[reports.LocationReport], api: str | None) -> list[str]:
    """The URLs to ask, best first: the own node, healthy storages, the others."""
    urls = []
    if api is not None and any(location.path for location in locations):
        urls.append(f"{api}/remote")
    for location in sorted(locations, key=lambda one: not one.healthy):
        urls += location.urls
    return list(dict.fromkeys(urls))
