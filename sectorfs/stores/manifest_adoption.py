"""Manifests out of other nodes' stores, for files whose digest is known and whose manifest is lost.

A manifest is a thousandth of its file: what a digest proves need not be read from a disk again. It
is for files that were hashed before, here or by another node on the same storage; a copy that never
was is to be read, whatever others have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sectorfs.errors import BadInput, SectorFSError, SourceFailed
from sectorfs.index.catalog import Catalog
from sectorfs.stores.manifest import Manifest, encoded_size
from sectorfs.stores.manifest_store import Key
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, SectorFile

log = logging.getLogger(__name__)

MOST_SOURCES = 4
"""Nodes that are asked for the manifests of one sector file."""


class Adoption:
    """Asks other nodes for manifests."""

    def __init__(self, peers: PeerClient, catalog: Catalog, own_urls: frozenset[str]) -> None:
        self._peers = peers
        self._catalog = catalog
        self._own_urls = own_urls

    async def adopt(
        self, file: SectorFile, facts: Facts, keys: Sequence[Key]
    ) -> dict[Key, Manifest]:
        """The manifests of some files of a sector file, all proved by its digest, or none."""
        for url in self._sources(file, facts)[:MOST_SOURCES]:
            try:
                digests = await self._digests(url, file, facts, keys)
                return {key: await self._manifest(url, key, digests[key]) for key in keys}
            except SectorFSError as exc:
                log.debug("no manifest of %s from %s: %s", file, url, exc)
        return {}

    def _sources(self, file: SectorFile, facts: Facts) -> list[str]:
        """The base URLs of other nodes with a file of this digest."""
        entry = self._catalog.entry(file)
        found: dict[str, None] = {}
        for one in entry.declarations if entry is not None else ():
            status = self._catalog.storage(one.storage)
            if status is not None and one.facts is not None and one.facts.digest == facts.digest:
                found |= dict.fromkeys(status.info.urls)
        return [url for url in found if url not in self._own_urls]

    async def _digests(
        self, url: str, file: SectorFile, facts: Facts, keys: Sequence[Key]
    ) -> dict[Key, bytes]:
        if facts.members is None:
            return dict.fromkeys(keys, facts.digest)
        roll = await self._peers.roll(url, file, digest=facts.digest)
        found = {}
        for key in keys:
            entry = roll.entry(key.member or "")
            if entry is None or entry.size != key.size:
                raise SourceFailed("has another roll of the directory", url)
            found[key] = entry.digest
        return found

    async def _manifest(self, url: str, key: Key, digest: bytes) -> Manifest:
        span = (0, encoded_size(key.size))
        data = await self._peers.manifest(url, key.file, key.member, span)
        try:
            made = Manifest.decode(data)
        except BadInput as exc:
            raise SourceFailed(f"its manifest of {key} {exc.what}", url) from exc
        if (made.size, made.digest) != (key.size, digest):
            raise SourceFailed(f"has the manifest of another content as that of {key}", url)
        return made
