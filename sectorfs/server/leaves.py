"""Leaf hashes beside small parts of files: who reads a little proves it without another question.

A request for ranges with ``sectorfs-leaves: 1`` is answered with the leaf hashes of the blocks that
each range touches without covering them (`manifest.edge_blocks`), in base64: in the header of the
answer, or of each part. Where there is no manifest, or its disk does not answer, the header is left
out, and the bytes come all the same.
"""

from __future__ import annotations

import base64
import logging

from sectorfs.errors import SectorFSError
from sectorfs.stores.answers import LEAVES_HEADER
from sectorfs.stores.manifest import edge_blocks
from sectorfs.stores.manifest_store import Key, ManifestStore
from sectorfs.stores.regular import Excerpt, Spans
from sectorfs.types import SectorFile
from sectorfs.wire.messages import Request

log = logging.getLogger(__name__)


class LeafHeaders:
    """Headers with leaf hashes out of this node's manifests."""

    def __init__(self, manifests: ManifestStore | None) -> None:
        self._manifests = manifests

    async def of(
        self, request: Request, file: SectorFile, member: str | None, excerpt: Excerpt, asked: Spans
    ) -> list[str]:
        """The header's value for each span `asked` that lies in the file; empty for no header."""
        spans = [span for span in asked if span[0] < excerpt.size]
        if self._manifests is None or request.headers.get(LEAVES_HEADER) != "1":
            return [""] * len(spans)
        key = Key(excerpt.storage, file, member, excerpt.size, excerpt.mtime_ns)
        try:
            return [await _value(self._manifests, key, *span) for span in spans]
        except SectorFSError as exc:
            log.debug("%s: no leaf hashes: %s", key, exc)
            return [""] * len(spans)


async def _value(manifests: ManifestStore, key: Key, offset: int, length: int) -> str:
    blocks = edge_blocks(key.size, offset, offset + length)
    found = await manifests.leaves(key, blocks) if blocks else None
    return base64.b64encode(found or b"").decode()
