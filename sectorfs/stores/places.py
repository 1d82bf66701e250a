"""Whose turn it is to ask a source, and which sources are not asked at all for now.

Each request has a place with its source, with its peer and on the node: a disk of a peer, or a
whole peer, that hangs leaves room for the others. `parallel` of the places of a source and of a
peer may be taken by what nobody waits for; the rest is kept for readers.

A source that does not answer is not asked again for a while (`breaker`): its readers wait for one
deadline together and not for one each. Any answer, however bad, is one. A source that only *broke
off*, as a peer does that is started anew, is worth waiting for (`Places.back`), until it has been
away for `patience` seconds; one that *fell silent* has cost a deadline already.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import trio

from sectorfs.errors import (
    DiskError,
    PermissionRefused,
    SectorFSError,
    SourceFailed,
    StorageUnavailable,
    TimedOut,
    Unreachable,
)
from sectorfs.stores.breaker import Breaker
from sectorfs.stores.gates import Gate, Priority
from sectorfs.stores.sources import PeerSource

READS = 24
"""Places with one source that are kept for readers."""
PEER_FACTOR = 2
"""A peer has this many times the places of one source."""
NODE_FACTOR = 4
"""The node likewise."""
PAUSE = 1.0
"""Seconds for which a source that did not answer is left alone, the first time."""
LONGEST_PAUSE = 8.0
BREAK_PAUSE = 0.25
"""The same for a source that broke off."""
LONGEST_BREAK_PAUSE = 2.0

OWN_TROUBLE = (DiskError, PermissionRefused, StorageUnavailable)
"""Errors of the cache path: no word on the source."""


def most_requests(parallel: int) -> int:
    """Requests that `Places` has run on one peer at a time."""
    return PEER_FACTOR * (READS + parallel)


class Resting(SourceFailed):
    """A source that is not asked now, since it did not answer others."""


class _Trouble:
    """Why a source is not asked, and until when."""

    def __init__(self, since: float, *, silent: bool) -> None:
        self.since = since
        """When it failed first."""
        self.silent = silent
        """It let a deadline pass; else it broke off."""
        self.breaker = (
            Breaker(pause=PAUSE, longest=LONGEST_PAUSE)
            if silent
            else Breaker(pause=BREAK_PAUSE, longest=LONGEST_BREAK_PAUSE)
        )


class Places:
    """The places of a node, and the troubles of its sources."""

    def __init__(
        self,
        parallel: int,
        *,
        patience: float,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self._parallel = parallel
        self._patience = patience
        self._now = now
        self._gates: dict[str, Gate] = {}
        self._node = self._gate(NODE_FACTOR)
        self._troubles: dict[PeerSource, _Trouble] = {}
        # Invariant: the breaker of none of them is closed.
        self._over = trio.Event()

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
        trouble = self._troubles.get(source)
        if trouble is not None and not trouble.breaker.admit(self._now()):
            raise _resting(source, trouble)
        try:
            yield
        except Unreachable as exc:
            self._failed(source, exc)
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

    async def back(self, causes: Mapping[PeerSource, SectorFSError], since: float) -> bool:
        """Wait until one of these sources, which failed so, may be asked again.

        False when none of them just broke off, and when they have for too long: since `since`
        for him who asks, or in the eyes of all.
        """
        now = self._now()
        soonest = min((self._again(one, why, now) for one, why in causes.items()), default=None)
        if soonest is None or soonest > since + self._patience:
            return False
        with trio.move_on_after(max(0.0, soonest - now)):  # it may be his turn already
            await self._over.wait()
        return True

    def _again(self, source: PeerSource, cause: SectorFSError, now: float) -> float:
        """When a source may be asked again; never, where nobody should wait for it."""
        trouble = self._troubles.get(source)
        if trouble is not None:
            lost = trouble.silent or now - trouble.since > self._patience
            return math.inf if lost else trouble.breaker.until
        broke_off = isinstance(cause, (Unreachable, Resting)) and not isinstance(cause, TimedOut)
        return now + BREAK_PAUSE if broke_off else math.inf

    def heard(self, source: PeerSource) -> None:
        """A source began to answer: nobody has to wait for the end of it."""
        if self._troubles.pop(source, None) is not None:
            self._over.set()
            self._over = trio.Event()

    def reason(self, source: PeerSource) -> str:
        """Why a source is not asked now; empty when it is."""
        trouble = self._troubles.get(source)
        return trouble.breaker.reason if trouble is not None else ""

    def _check(self, source: PeerSource) -> None:
        """Nobody queues for a source that is not asked."""
        trouble = self._troubles.get(source)
        if trouble is not None and not trouble.breaker.may_admit(self._now()):
            raise _resting(source, trouble)

    def _failed(self, source: PeerSource, cause: Unreachable) -> None:
        now, silent = self._now(), isinstance(cause, TimedOut)
        trouble = self._troubles.get(source)
        if trouble is None or trouble.silent != silent:
            since = trouble.since if trouble is not None else now
            trouble = self._troubles[source] = _Trouble(since, silent=silent)
        trouble.breaker.failed(now, str(cause))

    def _withdrew(self, source: PeerSource) -> None:
        trouble = self._troubles.get(source)
        if trouble is not None:
            trouble.breaker.withdrew()

    def _of(self, name: str, factor: int) -> Gate:
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = self._gate(factor)
        return gate

    def _gate(self, factor: int) -> Gate:
        reserved = READS * factor
        return Gate(reserved + self._parallel * factor, reserved=reserved)


def _resting(source: PeerSource, trouble: _Trouble) -> Resting:
    return Resting("did not answer others", source.url, trouble.breaker.reason)
