"""Paired measurements: ours, theirs, ours, theirs, … and what the pairs say.

A machine that others use as well is faster at one minute than at the next. Two figures taken right
after one another share their minute, so the result is the median of the ratios pair by pair, not
the ratio of two medians. The first pair warms everything up and is not counted.
"""

from __future__ import annotations

import math
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Generic, Literal, TypeVar

S = TypeVar("S")

PAIRS = 7
ENOUGH_PAIRS = 5
"""Below this a median says little."""
PATIENCE = 120
"""Seconds after which one measurement is given up."""
FIRST_PATIENCE = 600
"""The same for the ones that warm up: they make the files and start the nodes that are needed."""

State = Literal["measured", "left out", "failed"]


class LeftOut(Exception):
    """This machine cannot run one side of a row; the text says why."""


class TooSlow(Exception):
    """One measurement took longer than anybody would wait for it."""


@dataclass(frozen=True)
class Side(Generic[S]):
    """One way to do a work."""

    name: str
    sample: Callable[[S], float]
    """Prepares, measures once, and returns a rate: more is better."""
    at_least: float | None = None
    """Of a peer: what ours / theirs has to reach, where something is promised."""


@dataclass(frozen=True)
class Work(Generic[S]):
    """Something people do, done by sectorfs and by its peers."""

    name: str
    """For selection and for JSON."""
    title: str
    unit: str
    ours: Side[S]
    peers: tuple[Side[S], ...]


@dataclass(frozen=True)
class Spread:
    """Several figures of one kind."""

    median: float
    low: float
    """The lower quartile."""
    high: float
    """The upper quartile."""
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Row:
    """A work, ours and one peer: a line of the table."""

    work: str
    title: str
    unit: str
    ours: str
    peer: str
    state: State
    reason: str = ""
    """Why there are no figures."""
    pairs: tuple[tuple[float, float], ...] = ()
    """(ours, theirs), in the order they were measured."""
    ours_spread: Spread | None = None
    peer_spread: Spread | None = None
    ratio_spread: Spread | None = None
    """Of ours / theirs pair by pair: above 1 ours is faster."""
    at_least: float | None = None
    """What the median ratio has to reach, where something is promised."""

    @property
    def missed(self) -> bool:
        """True where less was reached than promised, or nothing could be measured."""
        if self.at_least is None:
            return False
        return self.ratio_spread is None or self.ratio_spread.median < self.at_least


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and extremes; of one value, the value."""
    if not values:
        raise ValueError("no values")
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high, min(values), max(values))


def measure(work: Work[S], peer: Side[S], scene: S, *, pairs: int) -> Row:
    """One row: a pair to warm up, then `pairs` that count."""
    taken: list[tuple[float, float]] = []
    state: State = "measured"
    reason = ""
    try:
        for number in range(pairs + 1):
            patience = PATIENCE if number else FIRST_PATIENCE
            ours = _sample(work.ours, scene, patience)
            taken.append((ours, _sample(peer, scene, patience)))
    except LeftOut as exc:
        state, reason = "left out", str(exc)
    except Exception as exc:  # one row fails, the others are measured
        state, reason = "failed", explain(exc)
    counted = tuple(taken[1:]) if state == "measured" else ()
    return Row(
        work=work.name,
        title=work.title,
        unit=work.unit,
        ours=work.ours.name,
        peer=peer.name,
        state=state,
        reason=reason,
        pairs=counted,
        ours_spread=spread([ours for ours, _ in counted]) if counted else None,
        peer_spread=spread([theirs for _, theirs in counted]) if counted else None,
        ratio_spread=spread([ours / theirs for ours, theirs in counted]) if counted else None,
        at_least=peer.at_least,
    )


def _sample(side: Side[S], scene: S, patience: float) -> float:
    with within(patience, side.name):
        rate = side.sample(scene)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"{side.name} measured {rate}")
    return rate


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Raise `TooSlow` in the block at the deadline: a hung mount must not hang the benchmark."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"{what} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def explain(exc: BaseException) -> str:
    """One line about a failure; of a command, with the last thing it said."""
    text = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    if isinstance(exc, subprocess.CalledProcessError) and exc.stderr:
        said = exc.stderr.decode(errors="replace") if isinstance(exc.stderr, bytes) else exc.stderr
        text = f"{text} {said.strip().splitlines()[-1:]}"
    return " ".join(text.split())


def select(
    works: Sequence[Work[S]], words: Sequence[str], *, only: Sequence[str] = ()
) -> list[tuple[Work[S], Side[S]]]:
    """The rows to measure: of these works, where the work's or the peer's name contains a word."""
    return [
        (work, peer)
        for work in works
        for peer in work.peers
        if not only or work.name in only
        if not words or any(word in f"{work.name} {peer.name}" for word in words)
    ]
