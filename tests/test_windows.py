"""Read-ahead: none for those who jump, ever more for those who go on."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sectorfs.stores.windows import LONGEST, SLACK, Window

SIZE = 1 << 35
STEP = 128 << 10


def test_the_first_read_asks_for_nothing_more() -> None:
    assert Window().read(0, 4096, SIZE) == 4096
    assert Window().read(1 << 30, (1 << 30) + 4096, SIZE) == (1 << 30) + 4096


def test_a_sequence_doubles_its_window_up_to_the_bound() -> None:
    window = Window()
    ahead = [window.read(at, at + STEP, SIZE) - at - STEP for at in range(0, 64 << 20, STEP)]
    assert ahead[:4] == [0, 2 * STEP, 3 * STEP, 4 * STEP]
    assert ahead[-1] == LONGEST
    assert ahead == sorted(ahead)
    assert window.streak == 64 << 20


def test_random_reads_get_what_they_ask_for() -> None:
    window, source = Window(), random.Random(1)
    for _ in range(1000):
        start = source.randrange(SIZE // (8 * SLACK)) * 8 * SLACK + 5
        assert window.read(start, start + 4096, SIZE) == start + 4096
    assert window.streak == 0


def test_requests_out_of_order_are_a_sequence() -> None:
    window, source = Window(), random.Random(2)
    places = list(range(0, 32 << 20, STEP))
    for at in range(0, len(places), 8):
        part = places[at : at + 8]
        source.shuffle(part)
        places[at : at + 8] = part
    ends = [window.read(at, at + STEP, SIZE) for at in places]
    assert window.streak >= (32 << 20) - SLACK
    assert ends[-1] > (40 << 20)


def test_a_jump_begins_anew() -> None:
    window = Window()
    for at in range(0, 8 << 20, STEP):
        window.read(at, at + STEP, SIZE)
    far = 1 << 30
    assert window.read(far, far + STEP, SIZE) == far + STEP
    assert window.streak == 0
    assert window.read(far + STEP, far + 2 * STEP, SIZE) == far + 3 * STEP


@given(
    st.integers(1, 1 << 24),
    st.lists(st.tuples(st.integers(0, 1 << 24), st.integers(1, 1 << 20)), max_size=50),
)
def test_never_beyond_the_end_nor_less_than_asked(size: int, reads: list[tuple[int, int]]) -> None:
    window = Window()
    for offset, length in reads:
        start = offset % size
        end = min(size, start + length)
        wanted = window.read(start, end, size)
        assert end <= wanted <= size
        assert wanted - end <= LONGEST + SLACK
