"""The breaker: its table of states, and a machine beside the plainest model of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sectorfs.stores.breaker import CLOSED, HALF_OPEN, OPEN, Breaker

PAUSE, LONGEST = 10.0, 35.0


def in_state(state: str) -> Breaker:
    """A breaker in a state at time 0; of an open one the pause ends at 10, of a probe its time."""
    breaker = Breaker(pause=PAUSE, longest=LONGEST)
    if state != CLOSED:
        breaker.failed(-PAUSE if state == HALF_OPEN else 0, "silent")
    if state == HALF_OPEN:
        assert breaker.admit(0)
    assert breaker.state == state
    return breaker


@pytest.mark.parametrize(
    ("state", "now", "admitted", "after"),
    [
        (CLOSED, 0, True, CLOSED),
        (OPEN, 0, False, OPEN),
        (OPEN, 9.9, False, OPEN),
        (OPEN, 10, True, HALF_OPEN),
        (HALF_OPEN, 0, False, HALF_OPEN),
        (HALF_OPEN, 9.9, False, HALF_OPEN),
        (HALF_OPEN, 10, True, HALF_OPEN),  # the first probe was never heard of
    ],
)
def test_who_is_admitted(state: str, now: float, admitted: bool, after: str) -> None:
    breaker = in_state(state)
    assert breaker.admit(now) is admitted
    assert breaker.state == after


@pytest.mark.parametrize(
    ("state", "event", "after"),
    [
        (CLOSED, "answered", CLOSED),
        (CLOSED, "failed", OPEN),
        (CLOSED, "withdrew", CLOSED),
        (OPEN, "answered", CLOSED),
        (OPEN, "failed", OPEN),
        (OPEN, "withdrew", OPEN),
        (HALF_OPEN, "answered", CLOSED),
        (HALF_OPEN, "failed", OPEN),
        (HALF_OPEN, "withdrew", OPEN),
    ],
)
def test_what_an_outcome_does(state: str, event: str, after: str) -> None:
    breaker = in_state(state)
    if event == "failed":
        breaker.failed(1, "again")
    else:
        getattr(breaker, event)()
    assert breaker.state == after
    assert breaker.closed is (after == CLOSED)
    assert bool(breaker.reason) is (after != CLOSED)


def test_the_first_reason_stays_while_it_is_open() -> None:
    breaker = in_state(OPEN)
    breaker.failed(1, "another")
    assert breaker.reason == "silent"


def test_failures_of_earlier_callers_prolong_nothing() -> None:
    breaker = in_state(OPEN)
    breaker.failed(9, "late")
    assert breaker.admit(10)


def test_a_probe_that_was_called_off_leaves_the_turn_to_the_next() -> None:
    breaker = in_state(HALF_OPEN)
    breaker.withdrew()
    assert breaker.admit(0)
    assert not breaker.admit(0)


def test_pauses_grow_to_a_limit_and_begin_anew_after_an_answer() -> None:
    breaker = Breaker(pause=PAUSE, longest=LONGEST)
    now, pauses = 0.0, []
    for _ in range(4):
        breaker.failed(now, "silent")
        began = now
        while not breaker.admit(now):
            now += 1
        pauses.append(now - began)
    assert pauses == [10, 20, 35, 35]
    breaker.answered()
    breaker.failed(now, "silent")
    assert not breaker.admit(now + 9.9)
    assert breaker.admit(now + 10)


class Machine(RuleBasedStateMachine):
    """However it is used: one probe per pause, and never shut for longer than the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(pause=PAUSE, longest=LONGEST)
        self.now = 0.0
        self.failed_since_answer = False
        self.probes: list[float] = []
        self.refused_since: float | None = None

    @rule(seconds=st.sampled_from([0.0, 1.0, 9.0, 10.0, 20.0, 35.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        was_closed = self.breaker.closed
        admitted = self.breaker.admit(self.now)
        assert was_closed is not self.failed_since_answer
        if was_closed:
            assert admitted
        elif admitted:
            if self.probes:
                assert self.now - self.probes[-1] >= PAUSE
            self.probes.append(self.now)
            self.refused_since = None
        else:
            self.refused_since = self.now if self.refused_since is None else self.refused_since
            assert self.now - self.refused_since < LONGEST

    @rule()
    def answer(self) -> None:
        self.breaker.answered()
        self.failed_since_answer, self.probes, self.refused_since = False, [], None

    @rule()
    def fail(self) -> None:
        if self.breaker.state == HALF_OPEN:
            self.refused_since = None  # a new pause begins
        self.breaker.failed(self.now, "silent")
        self.failed_since_answer = True

    @rule()
    def withdraw(self) -> None:
        if self.breaker.state == HALF_OPEN:
            self.probes.pop()
        self.breaker.withdrew()

    @invariant()
    def tells_why(self) -> None:
        assert bool(self.breaker.reason) is not self.breaker.closed


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
