"""Sets of byte positions as sorted runs, and RLE+ version 0, their form in trailers.

RLE+ is a stream of bits, the lowest bit of each byte first: two bits of version (0), one bit that
says whether the first run is set, then the lengths of runs that alternate. A length is ``1`` for 1;
``01`` and four bits for 2 to 15; ``00`` and an unsigned LEB128 varint for more. The last unset run
and trailing zero bytes are left out, so that the empty set is no bytes at all.

Everything takes time linear in the number of runs. One byte of hostile input can ask for eight
runs, so `MAX_RUNS` bounds what is decoded: a bitmap takes about 100 MB at most.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from sectorfs.errors import BadInput, TooLarge

MAX_RUNS = 2**20
"""Set runs in one bitmap; real ones have as many as there are gaps between pieces."""
MAX_END = 2**64 - 1
"""Highest end of a run: the sum of all runs fits 64 bits."""

_VARINT_BYTES = 10


class Runs(msgspec.Struct, frozen=True):
    """A set of whole numbers as runs; build it with `of`, `span` or `decode`."""

    # Invariant: of even length and strictly ascending; a run begins at each even index and ends
    # before the number at the next odd one. So equal sets are equal values.
    bounds: tuple[int, ...] = ()

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int]]) -> Runs:
        """The union of half-open spans ``(start, end)`` in any order; `BadInput` for bad ones."""
        bounds: list[int] = []
        for start, end in sorted(spans):
            if not 0 <= start <= end <= MAX_END:
                raise BadInput("not a span of bytes", f"{start}-{end}")
            if start == end:
                continue
            if bounds and start <= bounds[-1]:
                bounds[-1] = max(bounds[-1], end)
            else:
                bounds += (start, end)
        return cls(tuple(bounds))

    @classmethod
    def span(cls, start: int, size: int) -> Runs:
        """One run of `size` from `start`."""
        return cls.of([(start, start + size)])

    def spans(self) -> Iterator[tuple[int, int]]:
        """The runs in ascending order, each as ``(start, end)``."""
        return zip(self.bounds[::2], self.bounds[1::2], strict=True)

    @property
    def count(self) -> int:
        """How many numbers are in the set."""
        return sum(self.bounds[1::2]) - sum(self.bounds[::2])

    @property
    def last(self) -> int | None:
        """The highest number in the set; None when it is empty."""
        return self.bounds[-1] - 1 if self.bounds else None

    def covers(self, start: int, end: int) -> bool:
        """True when every number from `start` to before `end` is in the set."""
        if start >= end:
            return True
        passed = bisect_right(self.bounds, start)
        return passed % 2 == 1 and end <= self.bounds[passed]

    def union(self, other: Runs) -> Runs:
        """Numbers in either set."""
        return _merge(self.bounds, other.bounds, keep=(False, True, True, True))

    def intersection(self, other: Runs) -> Runs:
        """Numbers in both sets."""
        return _merge(self.bounds, other.bounds, keep=(False, False, False, True))

    def minus(self, other: Runs) -> Runs:
        """Numbers in this set and not in the other."""
        return _merge(self.bounds, other.bounds, keep=(False, False, True, False))

    def join_close(self, gap: int) -> Runs:
        """The set with every inner unset run of at most `gap` filled in."""
        bounds: list[int] = []
        for start, end in self.spans():
            if bounds and start - bounds[-1] <= gap:
                bounds[-1] = end
            else:
                bounds += (start, end)
        return Runs(tuple(bounds))


def _merge(left: Sequence[int], right: Sequence[int], *, keep: Sequence[bool]) -> Runs:
    """Sweep over both; `keep` is asked with 2 for "inside left" plus 1 for "inside right"."""
    bounds: list[int] = []
    kept = False
    # Past its last bound a side stands outside: the sentinel is never passed.
    left, right = (*left, MAX_END + 1), (*right, MAX_END + 1)
    i = j = 0
    while (at := min(left[i], right[j])) <= MAX_END:
        i += left[i] == at
        j += right[j] == at
        now = keep[2 * (i & 1) + (j & 1)]
        if now != kept:
            bounds.append(at)
            kept = now
    return Runs(tuple(bounds))


def encode(runs: Runs) -> bytes:
    """The one minimal encoding; `TooLarge` for a bitmap that `decode` would refuse."""
    if not runs.bounds:
        return b""
    if len(runs.bounds) > 2 * MAX_RUNS:
        raise TooLarge(f"bitmap of more than {MAX_RUNS} runs", len(runs.bounds) // 2)
    bits = _BitWriter()
    bits.put(0, 2)
    bits.put(runs.bounds[0] == 0, 1)
    previous = 0
    for bound in runs.bounds:
        if bound:
            _put_length(bits, bound - previous)
        previous = bound
    return bits.finish().rstrip(b"\0")


def decode(data: bytes) -> Runs:
    """The set behind an encoding; `BadInput` says which rule the bytes break."""
    if not data:
        return Runs()
    if data[-1] == 0:
        raise BadInput("RLE+: ends in a zero byte")
    bits = _BitReader(data)
    version = bits.take(2)
    if version != 0:
        raise BadInput("RLE+: unknown version", version)
    bounds = [0] if bits.take(1) else []
    at = 0
    while length := _take_length(bits):
        at += length
        if at > MAX_END:
            raise BadInput("RLE+: runs add up to more than 64 bits")
        bounds.append(at)
        if len(bounds) > 2 * MAX_RUNS:
            raise TooLarge(f"RLE+: more than {MAX_RUNS} runs")
    if len(bounds) % 2:
        bounds.pop()  # the runs ended with an unset one
    return Runs(tuple(bounds))


def _put_length(bits: _BitWriter, length: int) -> None:
    if length == 1:
        bits.put(1, 1)
    elif length < 16:
        bits.put(0b10 | length << 2, 6)
    else:
        bits.put(0, 2)
        while length >= 0x80:
            bits.put(length & 0x7F | 0x80, 8)
            length >>= 7
        bits.put(length, 8)


def _take_length(bits: _BitReader) -> int:
    """The next length; 0 ends the runs, and is what the zeros past the end read as."""
    if bits.take(1):
        return 1
    if bits.take(1):
        return bits.take(4)
    length = 0
    for index in range(_VARINT_BYTES):
        byte = bits.take(8)
        length |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if byte == 0 and index:
                raise BadInput("RLE+: a varint ends in a zero byte")
            return length
    raise BadInput(f"RLE+: a varint of more than {_VARINT_BYTES} bytes")


class _BitReader:
    """Bits of a buffer, lowest first; past the end they are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._held = 0
        self._count = 0

    def take(self, count: int) -> int:
        while self._count < count:
            # Eight bytes at a time: the held number stays small, so this is linear.
            chunk = self._data[self._at : self._at + 8]
            self._held |= int.from_bytes(chunk, "little") << self._count
            self._at += 8
            self._count += 64
        value = self._held & ((1 << count) - 1)
        self._held >>= count
        self._count -= count
        return value


class _BitWriter:
    """Bits into bytes, lowest first."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._held = 0
        self._count = 0

    def put(self, value: int, count: int) -> None:
        self._held |= value << self._count
        self._count += count
        while self._count >= 8:
            self._data.append(self._held & 0xFF)
            self._held >>= 8
            self._count -= 8

    def finish(self) -> bytes:
        return bytes(self._data) + bytes([self._held])
