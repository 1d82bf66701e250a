"""`sector piece`: where the copies of an unsealed sector are read from, without a mount.

The node that runs on the repo comes first, then the nodes that the Index names; while none runs, a
copy on a disk of this machine is read in place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sectorfs.errors import NotFound
from sectorfs.node import access, connect, reports
from sectorfs.node.repo import Repo
from sectorfs.stores.lanes import Lane
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.unsealed import Copy, DiskCopy, PeerCopy, UnsealedReader
from sectorfs.types import FileType, SectorFile, SectorID


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
        peers = PeerClient(client)
        copies: list[Copy] = [
            PeerCopy(peers, url, file) for url in base_urls(locations, repo.api())
        ]
        if repo.api() is None:
            lane = Lane(str(file), deadline=config.timeouts.disk)
            copies[:0] = [DiskCopy(one.path, lane) for one in locations if one.path]
        if not copies:
            raise NotFound("no storage has its unsealed file", file, "see `sectorfs storage find`")
        yield UnsealedReader(file, copies)


def base_urls(locations: list[reports.LocationReport], api: str | None) -> list[str]:
    """The URLs to ask, best first: the own node, healthy storages, the others."""
    urls = []
    if api is not None and any(location.path for location in locations):
        urls.append(f"{api}/remote")
    for location in sorted(locations, key=lambda one: not one.healthy):
        urls += location.urls
    return list(dict.fromkeys(urls))
