"""Brings ranges of remote files from peers, when it is their turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from sectorfs.errors import SectorFSError
from sectorfs.stores.gates import Priority
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.places import Places
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient, Version
from sectorfs.types import SectorFile


class PeerCarrier:
    """Implements `stream.Carrier` for one remote file."""

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
        deliver: Callable[[int, bytes], object],
    ) -> Version:
        """See `Carrier.ranges`."""
        return await self._peers.ranges(
            source.url,
            self._file,
            self._member,
            spans,
            expect=expect or self._declared(source),
            deliver=deliver,
        )

    async def receive(
        self,
        source: PeerSource,
        span: tuple[int, int],
        descriptor: Descriptor,
        *,
        expect: Version | None,
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
            progress=self._noting(source, progress),
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
