"""Runs behave as Python sets do, and RLE+ is read and written to the bit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectorfs.errors import BadInput, TooLarge
from sectorfs.stores import rle
from sectorfs.stores.rle import MAX_END, Runs

KIB, MIB, GIB = 2**10, 2**20, 2**30

VECTORS = [
    ([], ""),
    ([(0, 2 * KIB)], "041002"),
    ([(0, 1024)], "041001"),
    ([(1024, 2048)], "0010014004"),
    ([(128, 256)], "003000c0"),
    ([(0, 8 * MIB)], "04101090"),
    ([(0, 512 * MIB)], "0410101050"),
    ([(0, 32 * GIB)], "041010101030"),
    ([(0, 64 * GIB)], "041010101050"),
    ([(16 * GIB, 20 * GIB)], "0010101010084040404008"),
    ([(0, 1), (2, 3), (4, 7), (11, 28)], "7c472202"),
]

sets = st.sets(st.integers(0, 200), max_size=80)
ends = st.one_of(st.integers(0, 300), st.integers(0, MAX_END))
sparse = st.lists(st.tuples(ends, ends).map(lambda pair: (min(pair), max(pair))), max_size=20)


def runs_of(numbers: set[int]) -> Runs:
    return Runs.of((number, number + 1) for number in numbers)


def numbers_of(runs: Runs) -> set[int]:
    return {number for start, end in runs.spans() for number in range(start, end)}


def bits(text: str) -> bytes:
    """Bytes of bits in the order in which they are read, without zero bytes at the end."""
    digits = text.replace(" ", "")
    value = int(digits[::-1], 2)
    return value.to_bytes(len(digits) // 8 + 1, "little").rstrip(b"\0")


def varint(length: int) -> str:
    """A run in the long form, as bits."""
    out = "00"
    while length >= 0x80:
        out += f"{length & 0x7F | 0x80:08b}"[::-1]
        length >>= 7
    return out + f"{length:08b}"[::-1]


@pytest.mark.parametrize(("spans", "encoded"), VECTORS)
def test_vectors_both_ways(spans: list[tuple[int, int]], encoded: str) -> None:
    assert rle.encode(Runs.of(spans)).hex() == encoded
    assert rle.decode(bytes.fromhex(encoded)) == Runs.of(spans)


@given(sets, sets)
def test_operations_agree_with_sets(left: set[int], right: set[int]) -> None:
    a, b = runs_of(left), runs_of(right)
    assert numbers_of(a) == left
    assert a.union(b) == runs_of(left | right)
    assert a.minus(b) == runs_of(left - right)
    assert a.intersection(b) == runs_of(left & right)
    assert a.count == len(left)
    assert a.last == max(left, default=None)


@given(sets, st.integers(0, 210), st.integers(0, 210))
def test_covers_agrees_with_sets(numbers: set[int], start: int, end: int) -> None:
    assert runs_of(numbers).covers(start, end) == (set(range(start, end)) <= numbers)


@given(sets, st.integers(0, 12))
def test_join_close_fills_small_inner_gaps(numbers: set[int], gap: int) -> None:
    filled = set(numbers)
    for low, high in zip(sorted(numbers), sorted(numbers)[1:], strict=False):
        if high - low - 1 <= gap:
            filled |= set(range(low, high))
    assert runs_of(numbers).join_close(gap) == runs_of(filled)


@given(sparse)
def test_any_set_survives_the_encoding(spans: list[tuple[int, int]]) -> None:
    runs = Runs.of(spans)
    encoded = rle.encode(runs)
    assert rle.decode(encoded) == runs
    assert not encoded.endswith(b"\0")


@given(sparse, sparse)
def test_bounds_stay_ascending_without_touching_runs(
    left: list[tuple[int, int]], right: list[tuple[int, int]]
) -> None:
    a, b = Runs.of(left), Runs.of(right)
    for runs in (a, a.union(b), a.minus(b), a.intersection(b), a.join_close(7)):
        assert len(runs.bounds) % 2 == 0
        assert list(runs.bounds) == sorted(set(runs.bounds))
    assert a.union(b).count == a.minus(b).count + b.count


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        runs = rle.decode(data)
    except BadInput:
        return
    # Lenient forms may decode, but what is written again is minimal and means the same.
    again = rle.encode(runs)
    assert len(again) <= len(data)
    assert rle.decode(again) == runs


@pytest.mark.parametrize("span", [(-1, 4), (5, 4), (0, MAX_END + 1)])
def test_spans_outside_64_bits_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(BadInput, match="not a span"):
        Runs.of([span])


def test_empty_spans_add_nothing() -> None:
    assert Runs.of([(3, 3)]) == Runs() == Runs.span(7, 0)
    assert Runs().last is None


def test_the_largest_set_fits() -> None:
    full = Runs.span(0, MAX_END)
    assert rle.decode(rle.encode(full)) == full
    assert full.minus(Runs.span(5, 1)).bounds == (0, 5, 6, MAX_END)


@pytest.mark.parametrize("data", [b"\0", b"\x04\x10\x02\0", b"\0\0"])
def test_a_trailing_zero_byte_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="zero byte"):
        rle.decode(data)


@pytest.mark.parametrize("version", ["10", "01", "11"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(BadInput, match="unknown version"):
        rle.decode(bits(f"{version} 1 1"))


def test_a_zero_byte_within_a_varint_is_refused() -> None:
    with pytest.raises(BadInput, match="varint ends in a zero"):
        rle.decode(bits("00 1 00 00000001 00000000 1"))


def test_a_varint_cut_off_by_the_end_is_refused() -> None:
    with pytest.raises(BadInput, match="varint ends in a zero"):
        rle.decode(bits("00 1 00 00000001"))


def test_a_varint_of_eleven_bytes_is_refused() -> None:
    with pytest.raises(BadInput, match="more than 10 bytes"):
        rle.decode(bits("00 1 00" + "10000001" * 10 + "10000000"))


@pytest.mark.parametrize(
    "lengths", [[2**64], [MAX_END, 1], [2**63, 2**63], [1, MAX_END], [2**70 - 1]]
)
def test_sums_beyond_64_bits_are_refused(lengths: list[int]) -> None:
    with pytest.raises(BadInput, match="64 bits"):
        rle.decode(bits("00 1" + "".join(map(varint, lengths)) + "1"))


def test_the_highest_sum_is_accepted() -> None:
    assert rle.decode(bits("00 1" + varint(MAX_END))) == Runs.span(0, MAX_END)


def test_runs_end_at_a_zero_length_whatever_follows() -> None:
    five = "01 1010"
    for nothing in ("00 00000000", "01 0000"):
        assert rle.decode(bits(f"00 1 {five} {nothing} {five} 1 1")) == Runs.span(0, 5)


def test_a_final_unset_run_means_nothing() -> None:
    assert rle.decode(bits("00 1 01 1010 01 1100")) == Runs.span(0, 5)
    assert rle.decode(bits("00 0 01 1011")) == Runs()


def test_long_forms_of_short_runs_are_understood() -> None:
    assert rle.decode(bits("00 0" + varint(3) + "01 1000" + "1")) == Runs.span(3, 1)


def test_hostile_bytes_are_bounded() -> None:
    with pytest.raises(TooLarge, match="more than 1048576 runs"):
        rle.decode(b"\xfc" + b"\xff" * MIB)


def test_what_would_be_refused_is_not_written() -> None:
    bounds = tuple(range(2 * rle.MAX_RUNS + 2))
    with pytest.raises(TooLarge):
        rle.encode(Runs(bounds))
    most = Runs(bounds[:-2])
    assert rle.decode(rle.encode(most)) == most
