"""Which copies go: the arithmetic of limits, and a rule that takes neither more nor others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.config import CacheConfig, CacheLimits
from sectorfs.stores.eviction import Item, Space, choose, excess
from sectorfs.types import FileType
from tests.local_fixtures import sector_file


def item(number: int, size: int, used_ns: int, *, partial: bool = False) -> Item:
    return Item(sector_file(FileType.SEALED, number), partial, size, used_ns)


@pytest.mark.parametrize(
    ("space", "limits", "size", "expected"),
    [
        pytest.param(Space(1000, 500, 400), CacheLimits(), 499, 0, id="no limits at all"),
        pytest.param(Space(1000, 500, 400), CacheLimits(), 501, 1, id="more than is free"),
        pytest.param(Space(1000, 500, 400), CacheLimits(500), 100, 0, id="just fits"),
        pytest.param(Space(1000, 500, 400), CacheLimits(500), 101, 1, id="over the size"),
        pytest.param(Space(1000, 500, 400, 60), CacheLimits(500), 101, 61, id="promised counts"),
        pytest.param(Space(1000, 500, 400), CacheLimits(0, 450), 50, 0, id="just enough free"),
        pytest.param(Space(1000, 500, 400), CacheLimits(0, 450), 51, 1, id="too little free"),
        pytest.param(Space(1000, 60, 400), CacheLimits(0, 0, 0.1), 0, 40, id="share of the disk"),
        pytest.param(Space(1000, 60, 400, 30), CacheLimits(0, 0, 0.1), 0, 70, id="share, promised"),
        pytest.param(Space(1000, 500, 400), CacheLimits(300, 700), 0, 200, id="the larger counts"),
    ],
)
def test_what_has_to_go(space: Space, limits: CacheLimits, size: int, expected: int) -> None:
    assert excess(space, limits, size) == expected


def test_the_longest_unused_goes_first() -> None:
    old, middle, young = item(1, 10, 100), item(2, 10, 200), item(3, 10, 300)
    assert choose([young, old, middle], 10) == [old]
    assert choose([young, old, middle], 11) == [old, middle]


def test_small_files_stay_where_one_large_one_is_enough() -> None:
    small = [item(number, 1, number) for number in range(100)]
    large = item(1000, 1000, 1000)
    assert choose([*small, large], 1000) == [large]


def test_nothing_goes_where_all_would_not_be_enough() -> None:
    assert choose([item(1, 10, 1), item(2, 10, 2)], 21) is None
    assert choose([], 1) is None
    assert choose([item(1, 10, 1)], 0) == []


ITEMS = st.lists(
    st.builds(
        item,
        st.integers(0, 5),
        st.integers(0, 50),
        st.integers(0, 5),
        partial=st.booleans(),
    ),
    unique_by=lambda one: (one.file, one.partial),
    max_size=12,
)


@given(items=ITEMS, needed=st.integers(0, 400))
def test_enough_goes_none_of_it_needlessly_and_the_oldest_that_do(
    items: list[Item], needed: int
) -> None:
    chosen = choose(items, needed)
    if chosen is None:
        assert sum(one.size for one in items) < needed
        return
    total = sum(one.size for one in chosen)
    assert total >= needed
    assert all(total - one.size < needed for one in chosen if needed), "one of them is needless"
    if chosen:
        newest = max(one.used_ns for one in chosen)
        older = sum(one.size for one in items if one.used_ns < newest)
        assert older < needed, "those used before it would have been enough"


@pytest.mark.parametrize(
    ("settings", "limits", "capacity", "free"),
    [
        (CacheConfig(), CacheLimits(share=0.05), 1000, 50),
        (CacheConfig(max_size="2KiB", min_free="0"), CacheLimits(2048), 1000, 0),
        (CacheConfig(min_free="1MB"), CacheLimits(min_free=10**6), 1000, 10**6),
        (CacheConfig(min_free=" 12.5 %"), CacheLimits(share=0.125), 1000, 125),
    ],
)
def test_limits_as_they_are_written(
    settings: CacheConfig, limits: CacheLimits, capacity: int, free: int
) -> None:
    assert settings.limits() == limits
    assert limits.free_of(capacity) == free
