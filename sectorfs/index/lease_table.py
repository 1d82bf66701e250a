"""The leases of an Index and the order of those who wait: values only, time is passed in.

A lease ends at its time whether or not anybody asks; it is noticed when its sector is looked at.
Who waits has a place behind those who came before; it is kept for `PLACE_SECONDS` between two
questions, so that long polls lose nothing to each other.

Invariants: a token is held or waits, never both; a sector without either is not remembered.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from sectorfs.errors import BadInput, Refused
from sectorfs.index.locks import Taken
from sectorfs.index.protocol import Lease, LeaseStatus, Lock
from sectorfs.types import SectorID

PLACE_SECONDS = 5.0
"""How long a place is kept for one who does not ask."""
MAX_LEASES = 100_000
MAX_WAITING = 10_000


class HeldLease(msgspec.Struct):
    """A lease that was granted."""

    lease: Lease
    since_ns: int
    until: float


class _Place(msgspec.Struct):
    """One who waits."""

    lease: Lease
    since_ns: int
    asking: int = 0
    """Questions under way."""
    until: float = 0.0
    """While there are none: when the place is lost."""


class _Sector(msgspec.Struct):
    held: dict[str, HeldLease] = {}
    waiting: dict[str, _Place] = {}
    """In order of arrival."""


class LeaseTable:
    """Every lease, and everyone who waits for one."""

    def __init__(self) -> None:
        self._sectors: dict[SectorID, _Sector] = {}
        self._where: dict[str, SectorID] = {}
        self._waiting = 0
        self.ended: set[str] = set()
        """Tokens of leases that have ended, to be taken from the records by the owner."""

    def restore(self, lease: Lease, since_ns: int, now: float) -> None:
        """Hold what was recorded before a restart, for its full time: its holder may live."""
        self._hold(lease, since_ns, now)

    def enter(self, lease: Lease, now: float, since_ns: int) -> None:
        """Take a place in the order, or go on asking from the place that is there."""
        sector = self._look(lease.lock.sector, now)
        self._check_same(lease)
        if lease.token in sector.held:
            return
        place = sector.waiting.get(lease.token)
        if place is None:
            if self._waiting >= MAX_WAITING:
                raise Refused("too many requests wait for locks", lease.lock.sector, "try again")
            place = _Place(lease, since_ns)
            self._sectors[lease.lock.sector] = sector
            sector.waiting[lease.token] = place
            self._where[lease.token] = lease.lock.sector
            self._waiting += 1
        place.asking += 1

    def leave(self, token: str, now: float, *, keep: bool) -> None:
        """Stop asking; the place stays for a moment if it is to be kept."""
        place = self._place(token)
        if place is None:
            return
        place.asking -= 1
        if place.asking == 0:
            place.until = now + PLACE_SECONDS
            if not keep:
                self.end(token)

    def grant(self, lease: Lease, now: float, since_ns: int) -> bool:
        """Grant a lease if nothing held excludes it, nor anyone before its place.

        Without a place nobody is before it. One that is held already is renewed.
        """
        sector = self._look(lease.lock.sector, now)
        self._check_same(lease)
        if self.renew(lease.token, now):
            return True
        if _taken(sector, before=lease.token).excludes(lease.lock):
            return False
        if len(self._where) - self._waiting >= MAX_LEASES:
            self._look_everywhere(now)
            if len(self._where) - self._waiting >= MAX_LEASES:
                raise Refused("too many locks are held", lease.lock.sector, "try again")
        self.end(lease.token)
        self._hold(lease, since_ns, now)
        return True

    def renew(self, token: str, now: float) -> bool:
        """Let a lease last anew; False when it has ended."""
        sector = self._where.get(token)
        held = None if sector is None else self._look(sector, now).held.get(token)
        if held is None:
            return False
        held.until = now + held.lease.seconds
        return True

    def end(self, token: str) -> Lock | None:
        """End a lease or a wait; what was locked or wanted."""
        where = self._where.pop(token, None)
        if where is None:
            return None
        sector = self._sectors[where]
        place = sector.waiting.pop(token, None)
        if place is None:
            lease = sector.held.pop(token).lease
            self.ended.add(token)
        else:
            lease = place.lease
            self._waiting -= 1
        if not sector.held and not sector.waiting:
            del self._sectors[where]
        return lease.lock

    def knows(self, token: str) -> bool:
        """True while a token is held or has a place."""
        return token in self._where

    def watchers(self, where: SectorID, now: float) -> list[str]:
        """Who is to ask again now: those who would be granted, and `timekeeper`, first."""
        sector = self._look(where, now)
        taken = _taken(sector)
        found = [token for token in (self.timekeeper(where),) if token is not None]
        for token, place in sector.waiting.items():
            if place.asking and not taken.excludes(place.lease.lock):
                found.append(token)
            taken.add(place.lease.lock)
        return found

    def timekeeper(self, where: SectorID) -> str | None:
        """The first of those who ask: by `next_change`, for all of them."""
        sector = self._sectors.get(where, _Sector())
        return next((token for token, place in sector.waiting.items() if place.asking), None)

    def next_change(self, where: SectorID) -> float:
        """When, if nobody does anything, something of a sector ends by itself."""
        sector = self._sectors.get(where, _Sector())
        times = [held.until for held in sector.held.values()]
        times += [place.until for place in sector.waiting.values() if not place.asking]
        return min(times, default=float("inf"))

    def statuses(self, now: float) -> list[LeaseStatus]:
        """What is held, then what waits, each by sector and in order of arrival."""
        self._look_everywhere(now)
        ordered = sorted(self._sectors.items())
        held = [one for _, sector in ordered for one in sector.held.values()]
        waiting = [one for _, sector in ordered for one in sector.waiting.values()]
        return [
            *(_status(one.lease, one.since_ns, one.until - now) for one in held),
            *(_status(one.lease, one.since_ns, None) for one in waiting),
        ]

    def _hold(self, lease: Lease, since_ns: int, now: float) -> None:
        where = lease.lock.sector
        sector = self._sectors.setdefault(where, _Sector())
        sector.held[lease.token] = HeldLease(lease, since_ns, now + lease.seconds)
        self._where[lease.token] = where
        self.ended.discard(lease.token)

    def _look(self, where: SectorID, now: float) -> _Sector:
        """A sector as it is now: what is over by now is ended first."""
        sector = self._sectors.get(where)
        if sector is None:
            return _Sector()
        for token in list(_over(sector, now)):
            self.end(token)
        return sector

    def _look_everywhere(self, now: float) -> None:
        for where in list(self._sectors):
            self._look(where, now)

    def _place(self, token: str) -> _Place | None:
        where = self._where.get(token)
        return None if where is None else self._sectors[where].waiting.get(token)

    def _check_same(self, lease: Lease) -> None:
        """`BadInput` when the token stands for something else."""
        where = self._where.get(lease.token)
        if where is None:
            return
        sector = self._sectors[where]
        place = sector.waiting.get(lease.token)
        known = place.lease if place is not None else sector.held[lease.token].lease
        if known != lease:
            raise BadInput("the token of another lease", lease.lock.sector, "choose one at random")


def _taken(sector: _Sector, *, before: str | None = None) -> Taken:
    """What is held, and what is wanted from places before that of a token, if it has one."""
    taken = Taken()
    for held in sector.held.values():
        taken.add(held.lease.lock)
    if before in sector.waiting:
        for token, place in sector.waiting.items():
            if token == before:
                break
            taken.add(place.lease.lock)
    return taken


def _over(sector: _Sector, now: float) -> Iterator[str]:
    for token, held in sector.held.items():
        if held.until <= now:
            yield token
    for token, place in sector.waiting.items():
        if not place.asking and place.until <= now:
            yield token


def _status(lease: Lease, since_ns: int, expires_in: float | None) -> LeaseStatus:
    return LeaseStatus(
        lock=lease.lock,
        owner=lease.owner,
        reason=lease.reason,
        since_ns=since_ns,
        expires_in=expires_in,
    )
