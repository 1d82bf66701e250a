"""A lock for the length of a block: taken, renewed behind its back, and given back at its end.

The holder trusts its own clock, counted from before each question was sent, and stops a little
before the Index would: whatever is lost on the way, it has let go before anybody else is granted.
When the lease cannot be renewed in time, or the Index says that it has ended, the block is
cancelled and `LeaseLost` raised. Before a step that cannot be taken back, `Held.check`.

Whatever way the block ends, cancellation included, the Index is told once, within a bounded time;
if it cannot be reached, the lease expires by itself.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from sectorfs.errors import LeaseLost, Locked, SectorFSError
from sectorfs.index.protocol import Lease, Lock, SectorLocks
from sectorfs.types import SectorID

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""How long the sectors of a node that died stay locked."""
POLL_SECONDS = 15.0
"""One question waits so long at the Index: a node that died waits no longer."""
POLLS = 16
"""Questions that wait at a time: each occupies a connection, and renewals need some too."""
_FIRST_SECONDS = 0.05
"""The first question takes its place in the order, and is over before it needs a turn here."""
RETRY_SECONDS = 1.0
RELEASE_SECONDS = 3.0
_MARGIN = 0.1
"""Share of a lease that is left to let go in."""


class Held:
    """A lease that its block holds."""

    def __init__(self, lease: Lease, sent: float) -> None:
        self.lease = lease
        self.scope = trio.CancelScope()
        """Around the block."""
        self.lost: LeaseLost | None = None
        self.renewed(sent)

    def renewed(self, sent: float) -> None:
        """It lasts anew, at least from when the question was sent."""
        self.until = sent + self.lease.seconds * (1 - _MARGIN)
        self.renew_at = sent + self.lease.seconds / 3

    def check(self) -> None:
        """`LeaseLost` unless the lease is surely held now."""
        if self.lost is None and trio.current_time() >= self.until:
            self.lose("was not renewed in time")
        if self.lost is not None:
            raise self.lost

    def lose(self, why: str, cause: SectorFSError | None = None) -> None:
        """End the block, for it is protected no longer."""
        self.lost = LeaseLost(f"the lock {why}", self.lease.lock.sector, "begin the work again")
        self.lost.__cause__ = cause
        self.scope.cancel()


class Leases:
    """Takes locks of sectors for one owner."""

    def __init__(self, locks: SectorLocks, *, owner: str, seconds: float = LEASE_SECONDS) -> None:
        self._locks = locks
        self._owner = owner
        self._seconds = seconds
        self._polls = trio.Semaphore(POLLS)

    @asynccontextmanager
    async def held(
        self,
        sector: SectorID,
        *,
        read: int = 0,
        write: int = 0,
        reason: str,
        wait: float,
    ) -> AsyncIterator[Held]:
        """Hold a lock for the block; `Locked` when others have it for more than `wait` seconds."""
        lease = Lease(
            token=secrets.token_hex(16),
            lock=Lock(sector=sector, read=read, write=write),
            owner=self._owner,
            reason=reason,
            seconds=self._seconds,
        )
        failure: BaseException | None = None
        held: Held | None = None
        try:
            held = await self._acquire(lease, trio.current_time() + wait)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep, held)
                try:
                    with held.scope:
                        yield held
                    held.check()  # also one that never looked: it may have stood still
                except BaseException as exc:  # raised below: out of the nursery it would be a group
                    failure = exc
                nursery.cancel_scope.cancel()
        finally:
            await self._release(lease, granted=held is not None)
        if held.lost is not None and (failure is None or isinstance(failure, Exception)):
            raise held.lost from (failure if failure is not held.lost else held.lost.__cause__)
        if failure is not None:
            raise failure

    async def _acquire(self, lease: Lease, until: float) -> Held:
        """Ask until granted; one who will not wait is not kept back by those who do."""
        failure: SectorFSError
        ask = partial(self._locks.lock, wait=_FIRST_SECONDS if trio.current_time() < until else 0)
        while True:
            sent = trio.current_time()
            try:
                if await ask(lease):
                    return Held(lease, sent)
                failure = Locked("is locked", lease.lock.sector, "see `sectorfs storage locks`")
            except SectorFSError as exc:
                if not exc.retry:
                    raise
                failure = exc
                await trio.sleep(min(RETRY_SECONDS, max(0.0, until - trio.current_time())))
            if trio.current_time() >= until:
                raise failure
            ask = partial(self._poll, until=until)

    async def _poll(self, lease: Lease, *, until: float) -> bool:
        """One question that waits at the Index, once this node has a connection for it."""
        with trio.move_on_at(until) as turn:
            await self._polls.acquire()
        if turn.cancelled_caught:
            return False
        try:
            # Counted from before the question, a lease must outlast the wait for it by far.
            longest = min(POLL_SECONDS, lease.seconds / 4, until - trio.current_time())
            return await self._locks.lock(lease, wait=max(0.0, longest))
        finally:
            self._polls.release()

    async def _keep(self, held: Held) -> None:
        """Renew until cancelled; when that fails for too long, the block is lost."""
        failure: SectorFSError | None = None
        with trio.move_on_at(held.until) as patience:
            while True:
                await trio.sleep_until(held.renew_at)
                sent = trio.current_time()
                try:
                    await self._locks.renew(held.lease.token)
                except LeaseLost as exc:
                    held.lose("has ended", exc)
                    return
                except SectorFSError as exc:
                    failure = exc
                    held.renew_at = trio.current_time() + RETRY_SECONDS
                else:
                    held.renewed(sent)
                    patience.deadline = held.until
        if patience.cancelled_caught:
            held.lose("was not renewed in time", failure)

    async def _release(self, lease: Lease, *, granted: bool) -> None:
        """Give back the lease, or whatever a question left behind whose answer never came."""
        why = "no answer"
        with trio.move_on_after(RELEASE_SECONDS, shield=True):
            try:
                await self._locks.release(lease.token)
                return
            except SectorFSError as exc:
                why = str(exc)
        if granted:
            log.warning("%s stays locked until the lease expires: %s", lease.lock.sector, why)
