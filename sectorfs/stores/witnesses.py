"""Proof that a sector file has another primary copy, before one of its copies goes.

A declaration alone is none: an Index restored from a backup names copies that were moved since, a
clock set back shows dead storages as healthy, a file deleted by hand is declared until a scan. So
the file is looked at where it is declared: on the disk, or by asking a node that serves its
storage. A copy that cannot be seen, or has another length than was declared, does not count.

Nodes of other programs declare no lengths: theirs must have that of the copy which goes, as a fetch
of theirs that was cut short looks well to them. Of a directory they keep only files that they know,
and do not list them: one with others in it stays.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from sectorfs.errors import NotFound, Refused, SectorFSError, SourceFailed
from sectorfs.index.protocol import Declaration, SectorIndex, StorageInfo
from sectorfs.stores import layout
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.stores.scan import file_facts
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, SectorFile, StorageID

FORCE_HINT = "--force removes the last one too"


class Witnesses:
    """Knows who else has a file."""

    def __init__(
        self,
        *,
        index: SectorIndex,
        local: LocalStore,
        peers: PeerClient,
        own_urls: frozenset[str],
        cutoff: float,
    ) -> None:
        self._index = index
        self._local = local
        self._peers = peers
        self._own_urls = own_urls
        self._cutoff = cutoff

    async def require(
        self, file: SectorFile, *, without: Collection[StorageID], lost: Collection[Declaration]
    ) -> None:
        """`Refused` unless a healthy primary copy is seen on a storage that is not in `without`.

        `lost` are the declarations of those storages.
        """
        doubts: list[str] = []
        for item, info, path in await self._candidates(file, without):
            try:
                if path is not None:
                    await self._look(item, path)
                else:
                    await self._ask(item, info, lost)
            except SectorFSError as exc:
                doubts.append(str(exc))
            else:
                return
        hint = "; ".join([*doubts, FORCE_HINT])
        raise Refused("no healthy primary copy would remain", file, hint)

    async def _candidates(
        self, file: SectorFile, without: Collection[StorageID]
    ) -> list[tuple[Declaration, StorageInfo, LocalPath | None]]:
        """Primary declarations, those on available paths of this node first."""
        declared = [
            item
            for item in await self._index.sector(file.sector)
            if item.file == file and item.primary and item.storage not in without
        ]
        if not declared:
            return []
        here = {path.storage: path for path in self._local.paths() if path.available}
        statuses = {status.info.storage: status for status in await self._index.storages()}
        found = [
            (item, statuses[item.storage].info, here.get(item.storage))
            for item in declared
            if item.storage in statuses
            and (item.storage in here or statuses[item.storage].healthy(self._cutoff))
        ]
        return sorted(found, key=lambda one: one[2] is None)

    async def _look(self, item: Declaration, path: LocalPath) -> None:
        call = partial(file_facts, path.path, path.storage, item.file)
        facts = await path.lane.run(call, what=f"look at {item.file}")
        _require_same(item, facts, path.name_of(item.file))

    async def _ask(
        self, item: Declaration, info: StorageInfo, lost: Collection[Declaration]
    ) -> None:
        """Ask the nodes that serve a storage, until one has the file."""
        failure: SectorFSError = NotFound("is served by no other node", item.storage)
        for url in info.urls:
            if url in self._own_urls:
                continue
            try:
                found = await self._facts(url, item.file)
                for expected in [item] if item.facts else lost:
                    _require_same(expected, found, f"{url} {item.file}")
                if found is None:
                    _require_known(lost, f"{url} {item.file}")
            except SectorFSError as exc:
                failure = exc
            else:
                return
        raise failure

    async def _facts(self, url: str, file: SectorFile) -> Facts | None:
        """What a node tells of a file; None from one that has it and knows no listings."""
        try:
            return await self._peers.facts(url, file)
        except (NotFound, SourceFailed):
            if not file.file_type.is_directory:
                raise
        async with self._peers.archive(url, file, minimal=True):
            return None


def _require_same(item: Declaration, found: Facts | None, where: str) -> None:
    """`SourceFailed` for another content than was declared; times may differ between copies."""
    if item.facts is None or found is None:
        return
    if _lengths(item.facts) != _lengths(found):
        raise SourceFailed(f"has {found.size} bytes and {item.facts.size} are declared", where)


def _require_known(lost: Collection[Declaration], where: str) -> None:
    """`SourceFailed` when a directory has files that programs without listings leave out."""
    members = [one for item in lost if item.facts for one in item.facts.members or ()]
    unknown = sorted({member.name for member in members} - layout.FULL.keys())
    if unknown:
        raise SourceFailed(
            f"does not take {unknown[0]} along", where, "copy what it leaves out by hand"
        )


def _lengths(facts: Facts) -> list[tuple[str, int]]:
    if facts.members is None:
        return [("", facts.size)]
    return [(member.name, member.size) for member in facts.members]
