"""Interval sets against plain sets of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sectorfs.stores.intervals import Intervals

_SPANS = st.tuples(st.integers(0, 40), st.integers(0, 40))
_STEPS = st.lists(st.tuples(st.booleans(), _SPANS), max_size=30)


def _flat(spans: list[tuple[int, int]]) -> list[int]:
    return [position for start, end in spans for position in range(start, end)]


@given(_STEPS, _SPANS)
def test_they_are_sets(steps: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]) -> None:
    intervals, model = Intervals(), set[int]()
    for adds, (start, end) in steps:
        if adds:
            intervals.add(start, end)
            model |= set(range(start, end))
        else:
            intervals.discard(start, end)
            model -= set(range(start, end))
        spans = list(intervals)
        assert _flat(spans) == sorted(model)
        assert all(low < high for low, high in spans)
        assert all(one[1] < other[0] for one, other in pairwise(spans))
        assert intervals.total == len(model)
        assert len(intervals) == len(spans)
    wanted = set(range(*asked))
    assert intervals.covers(*asked) == (wanted <= model)
    assert _flat(intervals.missing(*asked)) == sorted(wanted - model)
    assert _flat(intervals.within(*asked)) == sorted(wanted & model)
    again = intervals.copy()
    again.add(50, 60)
    assert not intervals.covers(50, 51)
    assert list(Intervals(reversed(list(intervals)))) == list(intervals)
