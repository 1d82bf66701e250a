"""Brings ranges of remote files from peers, when it is their turn, and what proves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from sectorfs.errors import SectorFSError
from sectorfs.stores.answers import Version
from sectorfs.stores.gates import Priority
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.manifest import Outline
from sectorfs.stores.places import Places
from sectorfs.stores.prover import Piece, Prover
from sectorfs.stores.rolls import Roll
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient
from sectorfs.types import SectorFile


class PeerCarrier:
    """Implements `range_requests.Carrier` for one remote file."""

    def __init__(
        self,
        peers: PeerClient,
        places: Places,
        lane: Lane,
        file: SectorFile,
        member: str | None,
        declared: Callable[[PeerSource], Version],
    ) -> None:
        """`declared` tells what a source must give, as far as that is known."""
        self._peers = peers
        self._places = places
        self._file = file
        self._member = member
        self._declared = declared
        # Bytes of a partial file may be written however late: nobody has to wait for them long.
        self._run = partial(lane.finish, patience=lane.deadline)

    def place(self, source: PeerSource, priority: Priority) -> AbstractAsyncContextManager[None]:
        """See `Places.place`."""
        return self._places.place(source, priority)

    async def back(self, causes: Mapping[PeerSource, SectorFSError], since: float) -> bool:
        """See `Places.back`."""
        return await self._places.back(causes, since)

    async def ranges(
        self,
        source: PeerSource,
        spans: Sequence[tuple[int, int]],
        *,
        expect: Version | None,
        prover: Prover | None,
        deliver: Callable[[int, bytes], object],
    ) -> Version:
        """See `Carrier.ranges`."""
        pieces: list[Piece] = []

        def came(start: int, data: bytes, told: bytes) -> None:
            pieces.append(Piece(start, start + len(data), data, told))

        version = await self._peers.ranges(
            source.url,
            self._file,
            self._member,
            spans,
            expect=expect or self._declared(source),
            leaves=prover is not None,
            deliver=came,
        )
        if prover is not None:
            await prover.pass_on(source, pieces, deliver)
        else:
            for piece in pieces:
                deliver(piece.start, piece.data)
        return version

    async def receive(
        self,
        source: PeerSource,
        span: tuple[int, int],
        descriptor: Descriptor,
        *,
        expect: Version | None,
        prover: Prover | None,
        past_cache: bool,
        progress: Callable[[int], object],
    ) -> Version:
        """See `Carrier.receive`."""
        return await self._peers.receive(
            source.url,
            self._file,
            self._member,
            span,
            descriptor,
            expect=expect or self._declared(source),
            run=self._run,
            past_cache=past_cache,
            progress=self._noting(source, progress),
            sieve=partial(prover.sieve, source, span) if prover is not None else None,
        )

    def _noting(
        self, source: PeerSource, progress: Callable[[int], object]
    ) -> Callable[[int], object]:
        if not self._places.reason(source):
            return progress

        def note(done: int) -> None:
            self._places.heard(source)
            progress(done)

        return note


class PeerManifests:
    """Implements `prover.Manifests` for one remote file."""

    def __init__(
        self, peers: PeerClient, places: Places, file: SectorFile, member: str | None
    ) -> None:
        self._peers = peers
        self._places = places
        self._file = file
        self._member = member

    # None of them needs a place: each is asked by a request that has one, or by one per file.

    async def roll(self, source: PeerSource, digest: bytes) -> Roll:
        """See `Manifests.roll`."""
        with self._places.asking(source):
            return await self._peers.roll(source.url, self._file, digest=digest)

    async def outline(self, source: PeerSource, size: int, digest: bytes) -> Outline:
        """See `Manifests.outline`."""
        with self._places.asking(source):
            return await self._peers.outline(
                source.url, self._file, self._member, size=size, digest=digest
            )

    async def leaves(self, source: PeerSource, outline: Outline, blocks: range) -> bytes:
        """See `Manifests.leaves`."""
        with self._places.asking(source):
            return await self._peers.leaves(source.url, self._file, self._member, outline, blocks)
