"""Brings ranges of remote files from peers: when it is their turn, and while their source answers.

Each request has a place with its source, with its peer and on the node: a disk of a peer, or a
whole peer, that hangs leaves room for the others. `parallel` of the places of a source and of a
peer may be taken by what nobody waits for; the rest is kept for readers.

A source that does not answer is not asked again for a while (`breaker`): its readers wait for one
deadline together and not for one each. Any answer, however bad, is one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar

import trio

from sectorfs.errors import (
    DiskError,
    PermissionRefused,
    SectorFSError,
    SourceFailed,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.stores.breaker import Breaker
from sectorfs.stores.gates import Gate, Priority
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.sources import PeerSource
from sectorfs.stores.transfer import PeerClient, Version
from sectorfs.types import SectorFile

T = TypeVar("T")

READS = 24
"""Places with one source that are kept for readers."""
PEER_FACTOR = 2
"""A peer has this many times the places of one source."""
NODE_FACTOR = 4
"""The node likewise."""
PAUSE = 1.0
"""Seconds for which a source that did not answer is left alone, the first time."""
LONGEST_PAUSE = 8.0

OWN_TROUBLE = (DiskError, PermissionRefused, StorageUnavailable)
"""Errors of the cache path: no word on the source."""


def most_requests(parallel: int) -> int:
    """Requests that `Places` has run on one peer at a time."""
    return PEER_FACTOR * (READS + parallel)


class Places:
    """Whose turn it is to be asked, and who is not asked at all."""

    def __init__(self, parallel: int, *, now: Callable[[], float] = trio.current_time) -> None:
        self._parallel = parallel
        self._now = now
        self._gates: dict[str, Gate] = {}
        self._node = self._gate(NODE_FACTOR)
        self._breakers: dict[PeerSource, Breaker] = {}
        # Invariant: none of them is closed.

    @asynccontextmanager
    async def place(self, source: PeerSource, priority: Priority) -> AsyncIterator[None]:
        """A place for one request; `SourceFailed` while the source does not answer anybody."""
        self._check(source)
        held: list[Gate] = []
        try:
            for gate in (
                self._of(f"{source.url} {source.storage}", 1),
                self._of(source.url, PEER_FACTOR),
                self._node,
            ):
                if not gate.take_nowait(priority):
                    await gate.take(priority)
                held.append(gate)
            with self.asking(source):
                yield
        finally:
            for gate in reversed(held):
                gate.give_back()

    @contextmanager
    def asking(self, source: PeerSource) -> Iterator[None]:
        """Learn from one request whether a source answers; `SourceFailed` while it does not."""
        breaker = self._breakers.get(source)
        if breaker is not None and not breaker.admit(self._now()):
            raise _silent(source, breaker)
        try:
            yield
        except Unreachable as exc:
            self._failed(source, str(exc))
            raise
        except OWN_TROUBLE:
            self._withdrew(source)
            raise
        except SectorFSError:
            self.heard(source)
            raise
        except BaseException:
            self._withdrew(source)
            raise
        self.heard(source)

    def heard(self, source: PeerSource) -> None:
        """A source began to answer: nobody has to wait for the end of it."""
        self._breakers.pop(source, None)

    def reason(self, source: PeerSource) -> str:
        """Why a source is not asked now; empty when it is."""
        breaker = self._breakers.get(source)
        return breaker.reason if breaker is not None else ""

    def _check(self, source: PeerSource) -> None:
        """Nobody queues for a source that is not asked."""
        breaker = self._breakers.get(source)
        if breaker is not None and not breaker.may_admit(self._now()):
            raise _silent(source, breaker)

    def _failed(self, source: PeerSource, reason: str) -> None:
        breaker = self._breakers.get(source)
        if breaker is None:
            breaker = self._breakers[source] = Breaker(pause=PAUSE, longest=LONGEST_PAUSE)
        breaker.failed(self._now(), reason)

    def _withdrew(self, source: PeerSource) -> None:
        breaker = self._breakers.get(source)
        if breaker is not None:
            breaker.withdrew()

    def _of(self, name: str, factor: int) -> Gate:
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = self._gate(factor)
        return gate

    def _gate(self, factor: int) -> Gate:
        reserved = READS * factor
        return Gate(reserved + self._parallel * factor, reserved=reserved)


def _silent(source: PeerSource, breaker: Breaker) -> SourceFailed:
    return SourceFailed("did not answer others in time", source.url, breaker.reason)


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
