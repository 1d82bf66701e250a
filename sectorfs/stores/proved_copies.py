"""A copy of an unsealed file behind a node's base URL, read by ranges that are proved."""

from __future__ import annotations

from sectorfs.index.content import same_mtime
from sectorfs.stores.manifest import LEAF
from sectorfs.stores.prover import Piece, Prover
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import Facts, SectorFile


class ProvedCopy:
    """Implements `unsealed.Copy`; what is no longer the content of `facts` is read as it is."""

    def __init__(
        self,
        peers: PeerClient,
        source: PeerSource,
        file: SectorFile,
        facts: Facts,
        prover: Prover,
    ) -> None:
        self._peers = peers
        self._source = source
        self._file = file
        self._facts = facts
        self._prover = prover
        self._is_known = False

    async def facts(self) -> Facts:
        """See `Copy.facts`."""
        found = await self._peers.facts(self._source.url, self._file)
        same = same_mtime(found.mtime_ns, self._facts.mtime_ns)
        self._is_known = found.size == self._facts.size and same
        return found

    async def read(self, offset: int, size: int) -> bytes:
        """See `Copy.read`; proved once `facts` told that it is the content with the digest."""
        if not self._is_known:
            return await self._peers.read(self._source.url, self._file, None, offset, size)
        end = min(self._facts.size, -(-(offset + size) // LEAF) * LEAF)
        span = offset // LEAF * LEAF, end
        came: list[Piece] = []
        good: dict[int, bytes] = {}
        await self._peers.ranges(
            self._source.url,
            self._file,
            None,
            [span],
            expect=None,
            leaves=True,
            deliver=lambda start, data, told: came.append(
                Piece(start, start + len(data), data, told)
            ),
        )
        await self._prover.pass_on(self._source, came, good.__setitem__)
        return good[span[0]][offset - span[0] : offset - span[0] + size]
