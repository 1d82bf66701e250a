"""Leases and the order of those who wait, beside a model that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sectorfs.errors import BadInput, Refused
from sectorfs.index import lease_table
from sectorfs.index.lease_table import PLACE_SECONDS, LeaseTable
from sectorfs.index.locks import Taken
from sectorfs.index.protocol import Lease, Lock
from tests.index_fixtures import lease, sector

S = 2


def conflict(one: Lock, other: Lock) -> bool:
    return Taken(one.read, one.write).excludes(other)


def grant(table: LeaseTable, wanted: Lease, now: float = 0.0) -> bool:
    return table.grant(wanted, now, since_ns=0)


def enter(table: LeaseTable, wanted: Lease, now: float = 0.0) -> None:
    table.enter(wanted, now, since_ns=0)


def test_a_lease_ends_at_its_time_and_not_before() -> None:
    table = LeaseTable()
    assert grant(table, lease("a", write=S, seconds=60), now=5)
    assert not grant(table, lease("b", write=S), now=64.9)
    assert table.next_change(sector(7)) == 65
    assert grant(table, lease("b", write=S), now=65)
    assert table.ended == {lease("a").token}
    assert not table.renew(lease("a").token, 65)


def test_renewing_counts_from_the_renewal() -> None:
    table = LeaseTable()
    grant(table, lease("a", write=S, seconds=60))
    assert table.renew(lease("a").token, 59)
    assert not grant(table, lease("b", write=S), now=118)
    assert not table.renew(lease("a").token, 119)
    assert grant(table, lease("b", write=S), now=119)


def test_who_waits_comes_before_who_came_later_as_far_as_they_exclude_each_other() -> None:
    table = LeaseTable()
    reader, writer, late, other = (
        lease("reader", read=S),
        lease("writer", write=S),
        lease("late", read=S),
        lease("other", read=1),
    )
    grant(table, reader)
    for waiting in (writer, late, other):
        enter(table, waiting)
    assert not grant(table, writer)
    assert not grant(table, late)  # or writers would starve
    assert grant(table, other)
    table.end(reader.token)
    assert not grant(table, late)
    assert grant(table, writer)
    table.end(writer.token)
    assert grant(table, late)


def test_who_does_not_wait_is_kept_back_by_holders_alone() -> None:
    table = LeaseTable()
    grant(table, lease("reader", read=S))
    enter(table, lease("writer", write=S))
    assert grant(table, lease("try", read=S))
    assert not grant(table, lease("try to write", write=S))


def test_a_place_is_kept_for_a_moment() -> None:
    table = LeaseTable()
    reader, writer, late = lease("reader", read=S), lease("writer", write=S), lease("late", read=S)
    grant(table, reader)
    enter(table, writer)
    enter(table, late)
    table.leave(writer.token, 10, keep=True)
    assert table.next_change(sector(7)) == 10 + PLACE_SECONDS
    assert not grant(table, late, now=10 + PLACE_SECONDS - 1)
    enter(table, writer, now=10 + PLACE_SECONDS - 1)  # asks again, and has its old place
    assert not grant(table, late, now=20)
    table.leave(writer.token, 20, keep=True)
    assert grant(table, late, now=20 + PLACE_SECONDS)
    assert not table.knows(writer.token)


def test_a_place_is_gone_when_the_last_one_asking_gives_it_up() -> None:
    table = LeaseTable()
    grant(table, lease("reader", read=S))
    writer = lease("writer", write=S)
    enter(table, writer)
    enter(table, writer)  # the first question's connection broke, its answer is still awaited
    table.leave(writer.token, 1, keep=False)
    assert table.knows(writer.token)
    table.leave(writer.token, 1, keep=False)
    assert not table.knows(writer.token)
    table.leave(writer.token, 1, keep=True)  # nothing left to leave


def test_what_is_held_is_renewed_when_it_is_asked_again() -> None:
    table = LeaseTable()
    grant(table, lease("a", write=S, seconds=60))
    assert grant(table, lease("a", write=S, seconds=60), now=50)
    enter(table, lease("a", write=S, seconds=60), now=50)
    (status,) = table.statuses(50)
    assert status.expires_in == 60


def test_one_token_stands_for_one_lock() -> None:
    table = LeaseTable()
    grant(table, lease("a", write=S))
    enter(table, lease("b", write=S))
    for token in "ab":
        with pytest.raises(BadInput, match="token of another lease"):
            grant(table, lease(token, read=S))
        with pytest.raises(BadInput, match="token of another lease"):
            enter(table, lease(token, 8, write=S))


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_table, "MAX_LEASES", 2)
    monkeypatch.setattr(lease_table, "MAX_WAITING", 1)
    table = LeaseTable()
    grant(table, lease("a", 1, write=S, seconds=10))
    grant(table, lease("b", 2, write=S, seconds=60))
    with pytest.raises(Refused, match="too many locks"):
        grant(table, lease("c", 3, write=S))
    assert grant(table, lease("c", 3, write=S), now=10)  # those that ended do not count
    enter(table, lease("d", 3, write=S), now=10)
    with pytest.raises(Refused, match="too many requests"):
        enter(table, lease("e", 3, write=S), now=10)
    table.end(lease("d").token)
    enter(table, lease("e", 3, write=S), now=10)


def test_what_was_recorded_is_held_for_its_full_time_again() -> None:
    table = LeaseTable()
    table.restore(lease("a", write=S, seconds=60), since_ns=5, now=1000)
    (status,) = table.statuses(1059)
    assert (status.since_ns, status.expires_in) == (5, 1)
    assert table.statuses(1060) == []


TOKENS = [f"holder-number-{number}00" for number in range(6)]
REQUESTS = st.builds(
    lease,
    st.sampled_from(TOKENS),
    st.integers(1, 2),
    read=st.integers(0, 3),
    write=st.integers(0, 3),
    seconds=st.sampled_from([10, 30]),
).filter(lambda one: one.lock.read | one.lock.write)


class Locking(RuleBasedStateMachine):
    """Any history of asking, leaving, renewing, ending and time."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.now = 0.0
        self.held: dict[str, tuple[Lease, float]] = {}
        self.waiting: dict[str, tuple[Lease, int, float]] = {}

    def _forget(self) -> None:
        self.held = {name: one for name, one in self.held.items() if one[1] > self.now}
        self.waiting = {
            name: one for name, one in self.waiting.items() if one[1] or one[2] > self.now
        }

    def _known(self, token: str) -> Lease | None:
        self._forget()
        entry = self.held.get(token) or self.waiting.get(token)
        return entry[0] if entry else None

    @rule(seconds=st.sampled_from([1.0, 5.0, 9.0, 10.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(wanted=REQUESTS)
    def ask(self, wanted: Lease) -> None:
        known = self._known(wanted.token)
        if known is not None and known != wanted:
            with pytest.raises(BadInput):
                grant(self.table, wanted, self.now)
            return
        self._grant(wanted)

    def _grant(self, wanted: Lease) -> None:
        before = []
        if wanted.token in self.waiting:
            names = list(self.waiting)
            before = [self.waiting[name][0] for name in names[: names.index(wanted.token)]]
        beside = [one for one, _ in self.held.values()] + before
        free = wanted.token in self.held or not any(
            one.lock.sector == wanted.lock.sector and conflict(one.lock, wanted.lock)
            for one in beside
        )
        assert grant(self.table, wanted, self.now) is free
        if free:
            self.waiting.pop(wanted.token, None)
            self.held[wanted.token] = (wanted, self.now + wanted.seconds)

    @rule(wanted=REQUESTS)
    def wait(self, wanted: Lease) -> None:
        known = self._known(wanted.token)
        if known is not None and known != wanted:
            with pytest.raises(BadInput):
                enter(self.table, wanted, self.now)
            return
        enter(self.table, wanted, self.now)
        if wanted.token not in self.held:
            _, asking, _ = self.waiting.get(wanted.token, (wanted, 0, 0.0))
            self.waiting[wanted.token] = (wanted, asking + 1, 0.0)

    @rule(token=st.sampled_from(TOKENS), keep=st.booleans())
    def leave(self, token: str, keep: bool) -> None:
        self._forget()
        wanted, asking, _ = self.waiting.get(token, (None, 0, 0.0))
        if wanted is None or not asking:
            return
        self.table.leave(lease(token).token, self.now, keep=keep)
        if asking == 1 and not keep:
            del self.waiting[token]
        else:
            self.waiting[token] = (wanted, asking - 1, self.now + PLACE_SECONDS)

    @rule(token=st.sampled_from(TOKENS))
    def renew(self, token: str) -> None:
        self._forget()
        assert self.table.renew(token, self.now) is (token in self.held)
        if token in self.held:
            wanted, _ = self.held[token]
            self.held[token] = (wanted, self.now + wanted.seconds)

    @rule(token=st.sampled_from(TOKENS))
    def end(self, token: str) -> None:
        known = self._known(token)
        ended = self.table.end(token)
        if known is not None:
            assert ended == known.lock
        self.held.pop(token, None)
        self.waiting.pop(token, None)

    @invariant()
    def the_table_is_the_model(self) -> None:
        self._forget()
        found = self.table.statuses(self.now)
        assert sorted((one.lock.sector, one.expires_in) for one in found if one.expires_in) == (
            sorted((one.lock.sector, until - self.now) for one, until in self.held.values())
        )
        assert sum(one.expires_in is None for one in found) == len(self.waiting)
        for token in TOKENS:
            assert self.table.knows(token) is (token in self.held or token in self.waiting)

    @invariant()
    def nobody_holds_what_another_excludes(self) -> None:
        held = [one.lock for one in self.table.statuses(self.now) if one.expires_in is not None]
        for number, one in enumerate(held):
            for other in held[number + 1 :]:
                assert one.sector != other.sector or not conflict(one, other)


TestLocking = Locking.TestCase
TestLocking.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
