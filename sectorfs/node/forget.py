"""`storage detach UUID` for a storage whose node is dead: the Index forgets it, its files stay.

A node that lives would attach its storage again at its next heartbeat, and meanwhile its readers
would look elsewhere: so a storage that anybody still vouches for is refused, and so is one with
the only copy of something, unless it is forced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
import trio

from sectorfs.errors import NotFound, Refused, SectorFSError, Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import SectorIndex, StorageStatus
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import SectorFile, SectorID, StorageID

NAMED = 5
"""Sector files that a message names; the rest is counted."""
LISTED = 10_000
"""Sectors that a report lists."""
_FORCE = "use --force to detach it all the same"


class DetachReport(msgspec.Struct, kw_only=True):
    """What `storage detach` did."""

    detached: str
    """The path or storage."""
    urls: list[str]
    """Where the Index had it."""
    dropped: int
    """Declarations that went with it; none while it is reached under other URLs."""
    lost: int
    """Sector files nobody declares any more."""
    lost_sectors: list[str]
    """The sectors of those, ascending; when they are very many, some of them."""


class Lost(msgspec.Struct):
    """Sector files that nobody would declare any more."""

    files: int = 0
    first: list[SectorFile] = []
    """The first few, ascending."""
    sectors: set[SectorID] = set()
    """Their sectors, or the first `LISTED` of them."""


async def forget(
    storage: StorageID,
    *,
    force: bool,
    index: SectorIndex,
    catalog: Catalog,
    peers: PeerClient,
    cutoff: float,
) -> DetachReport:
    """Detach a storage from all its URLs; `NotFound` when the Index does not know it.

    The catalog must be current. The last URL goes last, so a crash leaves it as it was, with fewer.
    """
    status = await _status(index, storage)
    lost = await last_copies(catalog, storage)
    if not force:
        await _check_dead(status, peers, cutoff)
        if lost.files:
            raise Refused(_loss(lost), storage, _FORCE)
    dropped = sum(catalog.counts(storage).values())
    for url in status.info.urls or ("",):
        with suppress(NotFound):  # it went meanwhile, which is what is wanted
            await index.detach(storage, url)
    return detach_report(storage, status.info.urls, dropped=dropped, lost=lost)


def detach_report(detached: str, urls: Sequence[str], *, dropped: int, lost: Lost) -> DetachReport:
    """What a detach came to."""
    return DetachReport(
        detached=detached,
        urls=list(urls),
        dropped=dropped,
        lost=lost.files,
        lost_sectors=[sector.name for sector in sorted(lost.sectors)],
    )


async def _status(index: SectorIndex, storage: StorageID) -> StorageStatus:
    for status in await index.storages():
        if status.info.storage == storage:
            return status
    raise NotFound(
        "neither a storage path of this node nor a storage of the cluster",
        storage,
        "see `sectorfs storage list`",
    )


async def last_copies(catalog: Catalog, storage: StorageID) -> Lost:
    """Sector files that no other storage declares."""
    lost = Lost()
    after: SectorFile | None = None
    while page := catalog.files_of(storage, after=after):
        for file in page:
            entry = catalog.entry(file)
            if entry is not None and all(one.storage == storage for one in entry.declarations):
                _count(lost, file)
        after = page[-1]
        await trio.lowlevel.checkpoint()  # a storage may have a million
    return lost


def _count(lost: Lost, file: SectorFile) -> None:
    lost.files += 1
    if len(lost.first) < NAMED:
        lost.first.append(file)
    if len(lost.sectors) < LISTED:
        lost.sectors.add(file.sector)


def _loss(lost: Lost) -> str:
    """``2 sectors lose their last copy: sealed/s-t01000-1, …``."""
    sectors = len(lost.sectors)
    names = ", ".join(map(str, lost.first))
    more = f" and {lost.files - NAMED} more" if lost.files > NAMED else ""
    whose = "1 sector loses its" if sectors == 1 else f"{sectors} sectors lose their"
    if sectors == LISTED:
        whose = f"at least {whose}"
    return f"{whose} last copy: {names}{more}"


async def _check_dead(status: StorageStatus, peers: PeerClient, cutoff: float) -> None:
    """`Refused` while its node reports, or one of its URLs answers."""
    if status.heartbeat_age <= cutoff:
        raise Refused(
            f"its node is alive: the last heartbeat is {status.heartbeat_age:.0f} s old",
            status.info.storage,
            f"detach it there, or {_FORCE}",
        )
    answers: list[str] = []
    async with trio.open_nursery() as nursery:
        for url in status.info.urls:
            nursery.start_soon(_probe, peers, url, status.info.storage, answers.append)
    if answers:
        where = ", ".join(sorted(answers))
        raise Refused(
            f"a node answers for it: {where}", status.info.storage, f"detach it there, or {_FORCE}"
        )


async def _probe(
    peers: PeerClient, url: str, storage: StorageID, answered: Callable[[str], object]
) -> None:
    """Tell of a URL under which the storage is served, or may be: only silence and 404 are no."""
    try:
        await peers.stat(url, storage)
    except (Unreachable, NotFound):
        return
    except SectorFSError as exc:  # a refused token, a sick disk: somebody is there
        answered(f"{url} ({exc.what})")
    else:
        answered(url)
