"""What a look at every byte means, and how damage is told: pure rules."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.stores.manifest import BLOCK, HASH, Outline
from sectorfs.stores.verdicts import (
    MAX_RANGES,
    STATES,
    Known,
    differing,
    judge,
    ranges,
    worst,
)

GOOD = Outline(1, b"g" * HASH)
BAD = Outline(1, b"b" * HASH)
ODD = Outline(1, b"o" * HASH)


def test_what_nobody_knows_is_unproved() -> None:
    assert judge(GOOD.digest, Known()).state == "unproved"


@pytest.mark.parametrize(
    "known",
    [
        Known(told=GOOD.digest),
        Known(own=GOOD),
        Known(present=GOOD.digest),
        Known(present=GOOD.digest, copied=True),
        Known(told=GOOD.digest, own=BAD),
        Known(told=GOOD.digest, own=GOOD, present=GOOD.digest, copied=True),
    ],
)
def test_what_agrees_with_what_counts_most_is_well(known: Known) -> None:
    assert judge(GOOD.digest, known).state == "ok"


@pytest.mark.parametrize(
    "known",
    [
        Known(told=GOOD.digest),
        Known(own=GOOD),
        Known(present=GOOD.digest, copied=True),
        Known(told=GOOD.digest, own=ODD),
    ],
)
def test_other_bytes_than_were_hashed_are_damage(known: Known) -> None:
    assert judge(BAD.digest, known).state == "damaged"


def test_the_bytes_that_were_hashed_are_no_damage_whatever_the_index_tells() -> None:
    found = judge(GOOD.digest, Known(told=BAD.digest, own=GOOD))
    assert found.state == "changed"
    assert "hashed here" in found.detail


def test_a_copy_of_another_content_has_changed() -> None:
    for known in (Known(own=GOOD, present=BAD.digest), Known(present=BAD.digest)):
        assert judge(GOOD.digest, known).state == "changed"


@given(st.data())
def test_nothing_unknown_is_ever_well_or_damaged(data: st.DataObject) -> None:
    """By every combination of what may be known: damage needs a digest, and so does health."""
    digests = st.sampled_from([b"", GOOD.digest, BAD.digest])
    known = Known(
        told=data.draw(digests),
        own=data.draw(st.sampled_from([None, GOOD, BAD])),
        present=data.draw(digests),
        copied=data.draw(st.booleans()),
    )
    state = judge(GOOD.digest, known).state
    spoken = {known.told, known.own.digest if known.own else b"", known.present} - {b""}
    assert (state == "unproved") == (not spoken)
    if state == "ok":
        assert GOOD.digest in spoken
    if state == "damaged":
        assert known.wanted == BAD.digest
    if spoken == {GOOD.digest}:
        assert state == "ok"


def test_the_worst_of_several_is_told() -> None:
    assert worst([]) == "ok"
    for one, other in product(STATES, STATES):
        assert worst([one, other]) == STATES[min(STATES.index(one), STATES.index(other))]


def test_blocks_that_differ() -> None:
    one = b"a" * HASH + b"b" * HASH + b"c" * HASH
    other = b"a" * HASH + b"x" * HASH + b"y" * HASH
    assert differing(one, one) == ()
    assert differing(one, other) == (1, 2)


# --- ranges ---


def test_neighbours_are_one_range_and_the_last_ends_with_the_file() -> None:
    size = 10 * BLOCK + 5
    assert ranges((0, 1, 4, 10), size) == [
        (0, 2 * BLOCK),
        (4 * BLOCK, 5 * BLOCK),
        (10 * BLOCK, size),
    ]
    assert ranges((), size) == []


def test_of_many_ranges_the_nearest_are_joined() -> None:
    assert ranges((0, 10, 12, 40), 50 * BLOCK, most=3) == [
        (0, BLOCK),
        (10 * BLOCK, 13 * BLOCK),
        (40 * BLOCK, 41 * BLOCK),
    ]
    assert ranges((0, 10, 12, 40), 50 * BLOCK, most=1) == [(0, 41 * BLOCK)]


@given(st.sets(st.integers(0, 30_000)), st.integers(1, MAX_RANGES))
def test_ranges_are_few_apart_and_cover_every_block(blocks: set[int], most: int) -> None:
    bad = sorted(blocks)
    found = ranges(bad, 40_000 * BLOCK, most=most)
    assert len(found) <= most
    assert all(before[1] < after[0] for before, after in pairwise(found))
    for block in bad:
        assert any(start <= block * BLOCK < end for start, end in found)
    if len(found) < most:
        assert sum(end - start for start, end in found) == len(bad) * BLOCK
