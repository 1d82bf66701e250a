"""Ranges of a remote file on their way, those who wait for them, and who brings them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from sectorfs.errors import SectorFSError
from sectorfs.stores.answers import Version
from sectorfs.stores.gates import Priority
from sectorfs.stores.lanes import Descriptor
from sectorfs.stores.prover import Prover
from sectorfs.stores.sources import PeerSource


class Carrier(Protocol):
    """Brings ranges of one file from a source."""

    async def ranges(
        self,
        source: PeerSource,
        spans: Sequence[tuple[int, int]],
        *,
        expect: Version | None,
        prover: Prover | None,
        deliver: Callable[[int, bytes], object],
    ) -> Version:
        """Each span in memory, in any order, proved where there is a prover.

        `Stale` when the source gives another version, `WrongBytes` when it gives wrong bytes,
        `NoProof` when nobody can tell which are right.
        """

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
        """A span into a file, at its place; `progress` gets the bytes of it that are there.

        Errors as above; with a prover nothing that is wrong gets into the file. `past_cache`: past
        the page cache, where that is possible.
        """

    def place(self, source: PeerSource, priority: Priority) -> AbstractAsyncContextManager[None]:
        """A place for one request."""

    async def back(self, causes: Mapping[PeerSource, SectorFSError], since: float) -> bool:
        """Wait until one of these that only broke off may be asked again; False: do not wait."""


class Outdated(SectorFSError):
    """What is read here could be proved by now, and is not: it must be opened anew."""


class Request:
    """A range on its way, and how many wait for it."""

    def __init__(self, start: int, end: int, priority: Priority) -> None:
        self.start = start
        self.end = end
        self.priority = priority
        self.waiters = 0
        self.queued = True
        self.source: PeerSource | None = None
        self.moved = trio.Event()
        self.ended = False
        self.scope = trio.CancelScope()
        self.leader: Request | None = None
        self.followers: list[Request] = []
        self.error: SectorFSError | None = None

    def tell(self) -> None:
        """Wake those who wait: something came, or it ended."""
        self.moved.set()
        self.moved = trio.Event()

    @property
    def wanted(self) -> bool:
        """True while somebody waits for it, or it is not for readers."""
        if self.priority is not Priority.READ or self.waiters:
            return True
        return any(one.waiters for one in self.followers)
