"""Grants leases in the process that keeps the Index: who waits, who is woken, what is recorded.

Mechanism: the table in memory decides, on the loop, without an ``await`` between looking and
granting; the grant is recorded before it is told, so that a restart knows every lease that anybody
was told of. Ending is the other way round: memory first, the record behind. A record that stays by
accident costs others one lease's time after a restart, and never gives two holders one lock.

Who waits is woken when it would be granted; the first of those who wait for a sector also minds the
time, and is woken whenever what it must mind has changed.

Cancelled while it waits, a request leaves its place; cancelled while its grant is being recorded,
the lease ends at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from sectorfs.errors import LeaseLost, Unreachable
from sectorfs.index import checks
from sectorfs.index.lease_table import LeaseTable
from sectorfs.index.protocol import Lease, LeaseStatus
from sectorfs.types import SectorID

Record = Callable[[Lease | None, int, Sequence[str]], Awaitable[None]]
"""Writes, all or nothing, a lease that was granted at a time (or none), and forgets ended ones."""


class Lessor:
    """`SectorLocks` of one Index."""

    def __init__(self, record: Record, clock_ns: Callable[[], int]) -> None:
        self._record = record
        self._clock_ns = clock_ns
        self._table = LeaseTable()
        self._asleep: dict[str, trio.Event] = {}
        self._closed = False

    def restore(self, leases: Iterable[tuple[Lease, int]]) -> None:
        """Hold what was recorded before a restart."""
        now = trio.current_time()
        for lease, since_ns in leases:
            self._table.restore(lease, since_ns, now)

    def close(self) -> None:
        """End every wait, with `Unreachable`."""
        self._closed = True
        for asleep in self._asleep.values():
            asleep.set()

    async def lock(self, lease: Lease, *, wait: float = 0) -> bool:
        """Grant a lock, waiting up to `wait` seconds for others."""
        await trio.lowlevel.checkpoint()
        checks.check_lease(lease)
        wait = checks.poll_seconds(wait)
        granted = await self._wait(lease, wait) if wait else self._grant(lease)
        if granted:
            await self._note(lease)
        return granted

    async def renew(self, token: str) -> None:
        """Let a lease last anew; `LeaseLost` when it has ended."""
        await trio.lowlevel.checkpoint()
        checks.check_token(token)
        if not self._table.renew(token, trio.current_time()):
            raise LeaseLost("the lease has ended", "lock")

    async def release(self, token: str) -> None:
        """End a lease, or the wait for it."""
        await trio.lowlevel.checkpoint()
        checks.check_token(token)
        self._end(token)
        if self._table.ended:
            await self._write(None)

    async def leases(self) -> list[LeaseStatus]:
        """What is held, then what waits."""
        await trio.lowlevel.checkpoint()
        return self._table.statuses(trio.current_time())

    def _grant(self, lease: Lease) -> bool:
        granted = self._table.grant(lease, trio.current_time(), self._clock_ns())
        if granted:
            self._wake(lease.lock.sector)
        return granted

    async def _wait(self, lease: Lease, seconds: float) -> bool:
        """Keep asking from a place in the order until granted or `seconds` have passed."""
        until = trio.current_time() + seconds
        self._table.enter(lease, trio.current_time(), self._clock_ns())
        keep = False
        try:
            granted = await self._ask_until(lease, until)
            keep = not granted
            return granted
        finally:
            self._table.leave(lease.token, trio.current_time(), keep=keep)
            self._rouse(lease.token)  # the same may be asked a second time
            self._wake(lease.lock.sector)

    async def _ask_until(self, lease: Lease, until: float) -> bool:
        where = lease.lock.sector
        while not self._grant(lease):
            if trio.current_time() >= until:
                return False
            # Taken right after the look: what changes from here on sets this very event.
            asleep = self._asleep.setdefault(lease.token, trio.Event())
            minds_time = self._table.timekeeper(where) == lease.token
            alarm = self._table.next_change(where) if minds_time else until
            with trio.move_on_at(min(until, alarm)) as sleep:
                await asleep.wait()
            if sleep.cancelled_caught and minds_time:
                self._wake(where)
            if self._closed:
                raise Unreachable("the Index is closed", where)
            if not self._table.knows(lease.token):
                raise LeaseLost("was released while it waited", where)
        return True

    async def _note(self, lease: Lease) -> None:
        """Record what memory has granted; only then may it be told."""
        try:
            await self._write(lease)
        except BaseException:
            self._end(lease.token)
            raise
        # Counted from here: the disk may have been slow.
        if not self._table.renew(lease.token, trio.current_time()):
            raise LeaseLost("has ended before it was recorded", lease.lock.sector)

    async def _write(self, granted: Lease | None) -> None:
        ended = tuple(self._table.ended)
        await self._record(granted, self._clock_ns(), ended)
        self._table.ended.difference_update(ended)

    def _end(self, token: str) -> None:
        lock = self._table.end(token)
        if lock is not None:
            self._rouse(token)
            self._wake(lock.sector)

    def _wake(self, where: SectorID) -> None:
        for token in self._table.watchers(where, trio.current_time()):
            self._rouse(token)

    def _rouse(self, token: str) -> None:
        asleep = self._asleep.pop(token, None)
        if asleep is not None:
            asleep.set()
