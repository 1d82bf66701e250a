"""The declarations of one file type as sorted columns of numbers, in pieces.

A `Chunk` holds up to `FULL` rows of one miner; a `Column` is the ascending list of chunks. A row
put in the middle so moves a few kilobytes, whatever the million. All rows of a sector file are in
one chunk.

Invariants: chunks are never empty and ascend by miner and number; the numbers of a chunk are an
array that is replaced, never changed, because listings share it; the tables count each row's shape.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

from sectorfs.index.codes import Codes, Row
from sectorfs.index.names import Numbers, Sectors
from sectorfs.index.packed import Key, Run, empty_run

FULL = 2048
"""Rows of a chunk; one more and it is halved."""


class Chunk:
    """Some rows of one miner."""

    __slots__ = (
        "_spare",
        "_spots",
        "_times",
        "digests",
        "held",
        "holders",
        "mtimes",
        "names",
        "shapes",
        "sizes",
    )

    def __init__(self, run: Run, codes: Codes) -> None:
        self.names = Numbers(run.miner, run.numbers, len(set(run.numbers)))
        self.holders = run.holders
        self.sizes = run.sizes
        self.mtimes = run.mtimes
        self.shapes = run.shapes
        # The times of a row's files begin at its spot. Rows that come put theirs at the end.
        self._spots = _spots(run, codes)
        self._times = run.times
        self._spare = 0
        self.digests = run.digests
        self.held = _held(run.holders)
        """Rows of each storage."""

    def __len__(self) -> int:
        return len(self.holders)

    @property
    def first(self) -> Key:
        """The lowest key."""
        return self.names.miner, self.names.all[0]

    def find(self, number: int) -> tuple[int, int]:
        """Where the rows of a sector begin and end."""
        numbers = self.names.all
        start = end = bisect_left(numbers, number)
        while end < len(numbers) and numbers[end] == number:
            end += 1
        return start, end

    def past(self, number: int) -> int:
        """Where the rows after a sector begin."""
        return bisect_right(self.names.all, number)

    def row(self, position: int, codes: Codes) -> Row:
        """One row."""
        shape, spot = self.shapes[position], self._spots[position]
        return (
            self.holders[position],
            self.sizes[position],
            self.mtimes[position],
            shape,
            self._times[spot : spot + codes.lengths[shape]].tobytes(),
            self.digests[position],
        )

    def part(self, start: int, end: int, codes: Codes) -> Run:
        """A copy of some rows."""
        times: array[int] = array("q")
        for spot, shape in zip(self._spots[start:end], self.shapes[start:end], strict=True):
            if length := codes.lengths[shape]:
                times += self._times[spot : spot + length]
        return Run(
            self.names.miner,
            self.names.all[start:end],
            self.holders[start:end],
            self.sizes[start:end],
            self.mtimes[start:end],
            self.shapes[start:end],
            times,
            self.digests.part(start, end),
        )

    def insert(self, position: int, number: int, row: Row) -> None:
        """Put a new row before another."""
        holder, size, mtime_ns, shape, times, digest = row
        numbers = self.names.all[:]
        new = number not in numbers[max(0, position - 1) : position + 1]
        numbers.insert(position, number)
        self.names = Numbers(self.names.miner, numbers, self.names.count + new)
        self.holders.insert(position, holder)
        self.sizes.insert(position, size)
        self.mtimes.insert(position, mtime_ns)
        self.shapes.insert(position, shape)
        self._spots.insert(position, len(self._times))
        self._times.frombytes(times)
        self.digests.insert(position, digest)
        self.held[holder >> 1] += 1

    def replace(self, position: int, row: Row, codes: Codes) -> None:
        """Put another row of the same sector and storage in place of one."""
        length = codes.lengths[self.shapes[position]]
        self.holders[position], self.sizes[position], self.mtimes[position] = row[:3]
        self.shapes[position] = row[3]
        self._spots[position] = len(self._times)
        self._times.frombytes(row[4])
        self.digests.put(position, row[5])
        self._spared(length, codes)

    def remove(self, start: int, end: int, codes: Codes) -> None:
        """Take rows out."""
        lengths = sum(codes.lengths[shape] for shape in self.shapes[start:end])
        for holder in self.holders[start:end]:
            self.held[holder >> 1] -= 1
        numbers = self.names.all
        rest = numbers[:start] + numbers[end:]
        gone = set(numbers[start:end]).difference(rest[max(0, start - 1) : start + 1])
        self.names = Numbers(self.names.miner, rest, self.names.count - len(gone))
        for column in (self.holders, self.sizes, self.mtimes, self.shapes, self._spots):
            del column[start:end]
        del self.digests[start:end]
        self._spared(lengths, codes)

    def join(self, other: Chunk) -> None:
        """Append the rows of the chunk behind this one."""
        ours, theirs = self.names, other.names
        self.names = Numbers(ours.miner, ours.all + theirs.all, ours.count + theirs.count)
        self.holders += other.holders
        self.sizes += other.sizes
        self.mtimes += other.mtimes
        self.shapes += other.shapes
        begin = len(self._times)
        self._spots.extend(begin + spot for spot in other._spots)
        self._times += other._times
        self._spare += other._spare
        self.digests.extend(other.digests)
        self.held += other.held

    def _spared(self, length: int, codes: Codes) -> None:
        """So many times are not wanted any more: make them all anew when that is most of them."""
        self._spare += length
        if 2 * self._spare > len(self._times):
            run = self.part(0, len(self), codes)
            self._spots, self._times, self._spare = _spots(run, codes), run.times, 0


def _held(holders: array[int]) -> Counter[int]:
    held: Counter[int] = Counter()
    for holder, rows in Counter(holders).items():
        held[holder >> 1] += rows
    return held


def _spots(run: Run, codes: Codes) -> array[int]:
    """Where the times of each row begin."""
    ends = accumulate(map(codes.lengths.__getitem__, run.shapes), initial=0)
    return array("I", islice(ends, len(run)))


class Column:
    """Every declaration of one file type."""

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self._chunks: list[Chunk] = []
        self._firsts: list[Key] = []
        self._shown: Sectors | None = None
        self.count = 0
        """Sector files."""
        self.held: Counter[int] = Counter()
        """Rows of each storage."""

    def rows(self, key: Key) -> list[Row]:
        """The declarations of a sector file by ascending storage; none when nobody declares it."""
        number = self._near(key)
        if number < 0 or self._chunks[number].names.miner != key[0]:
            return []
        chunk = self._chunks[number]
        start, end = chunk.find(key[1])
        return [chunk.row(position, self._codes) for position in range(start, end)]

    def names(self) -> Sectors:
        """The sectors as they are now."""
        if self._shown is None:
            self._shown = Sectors([chunk.names for chunk in self._chunks])
        return self._shown

    def as_listed(self, names: Numbers) -> Chunk | None:
        """The chunk that has exactly these sectors, each with one declaration, if one still has."""
        number = self._near((names.miner, names.all[0]))
        if number >= 0 and names.single and self._chunks[number].names is names:
            return self._chunks[number]
        return None

    def put(self, key: Key, row: Row) -> bool:
        """Add a declaration, or replace the same storage's; False when it is there like this."""
        index = self._home(key)
        chunk = self._chunks[index]
        number, storages = key[1], self._codes.storages
        storage = row[0] >> 1
        start, end = chunk.find(number)
        for position in range(start, end):
            other = chunk.holders[position] >> 1
            if other == storage:
                return self._overwrite(chunk, position, row)
            if storages[other] > storages[storage]:
                end = position
                break
        self.count -= chunk.names.count
        chunk.insert(end, number, row)
        self.count += chunk.names.count
        self.held[storage] += 1
        self._codes.use(row[3])
        self._firsts[index] = chunk.first
        self._shown = None
        if len(chunk) > FULL:
            self._halve(index)
        return True

    def drop(self, key: Key, storage: int) -> bool:
        """Remove a declaration; False when there is none."""
        index = self._near(key)
        if index < 0 or self._chunks[index].names.miner != key[0]:
            return False
        chunk = self._chunks[index]
        start, end = chunk.find(key[1])
        for position in range(start, end):
            if chunk.holders[position] >> 1 == storage:
                self._take_out(index, position)
                return True
        return False

    def between(self, past: Key | None, last: Key | None) -> list[Run]:
        """Copies of the rows after `past` up to and with `last`, a run for each miner."""
        return join(
            [
                self._chunks[index].part(start, end, self._codes)
                for index, start, end in self._spans(past, last)
            ]
        )

    def bound(self, past: Key | None, last: Key | None, limit: int) -> Key | None:
        """The key up to which there are about `limit` rows after `past`; `last` if that is less."""
        for index, start, end in self._spans(past, last):
            if end - start >= limit:
                names = self._chunks[index].names
                return names.miner, names.all[start + limit - 1]
            limit -= end - start
        return last

    def replace(self, past: Key | None, last: Key | None, runs: Sequence[Run]) -> None:
        """Let `runs`, whose arrays become ours, be the rows after `past` up to and with `last`."""
        begin = 0 if past is None else self._cut_behind(past)
        end = len(self._chunks) if last is None else self._cut_behind(last)
        fresh = [Chunk(run, self._codes) for run in runs]
        for chunk in fresh:
            self.count += chunk.names.count
            self.held.update(chunk.held)
            for shape, rows in Counter(chunk.shapes).items():
                self._codes.use(shape, rows)
        # Only now: a shape that old and new rows have must not be forgotten between them.
        for chunk in self._chunks[begin:end]:
            self.count -= chunk.names.count
            self.held.subtract(chunk.held)
            for shape, rows in Counter(chunk.shapes).items():
                self._codes.release(shape, rows)
        self._chunks[begin:end] = fresh
        self._firsts[begin:end] = [chunk.first for chunk in fresh]
        self._shown = None
        for index in range(begin + len(fresh) - 1, begin - 1, -1):
            self._halve(index)
        self._join_around(begin + len(fresh))
        self._join_around(begin)

    def held_by(self, storage: int, past: Key | None, limit: int) -> list[Key]:
        """The first `limit` sector files after `past` that a storage declares."""
        found: list[Key] = []
        for index, start, end in self._spans(past, None):
            chunk = self._chunks[index]
            if not chunk.held[storage]:
                continue
            miner = chunk.names.miner
            rows = zip(chunk.names.all[start:end], chunk.holders[start:end], strict=True)
            found += [(miner, number) for number, holder in rows if holder >> 1 == storage]
            if len(found) >= limit:
                return found[:limit]
        return found

    def _near(self, key: Key) -> int:
        """The last chunk that begins at or before a key; -1 when none does."""
        return bisect_right(self._firsts, key) - 1

    def _home(self, key: Key) -> int:
        """The chunk a key belongs into."""
        index = self._near(key)
        if index >= 0 and self._chunks[index].names.miner == key[0]:
            return index
        index += 1
        if index == len(self._chunks) or self._chunks[index].names.miner != key[0]:
            self._chunks.insert(index, Chunk(empty_run(key[0]), self._codes))
            self._firsts.insert(index, key)
        return index

    def _spans(self, past: Key | None, last: Key | None) -> Iterator[tuple[int, int, int]]:
        """Where the rows after `past` up to and with `last` are: chunk, begin, end."""
        first = 0 if past is None else max(0, self._near(past))
        for index in range(first, len(self._chunks)):
            chunk = self._chunks[index]
            if last is not None and chunk.first > last:
                return
            start, end = 0, len(chunk)
            if past is not None and chunk.first <= past:
                start = chunk.past(past[1]) if chunk.names.miner == past[0] else end
            if last is not None and chunk.names.miner == last[0]:
                end = chunk.past(last[1])
            if start < end:
                yield index, start, end

    def _cut_behind(self, key: Key) -> int:
        """Let a chunk end at a key; gives the chunk after it."""
        index = self._near(key)
        if index >= 0 and self._chunks[index].names.miner == key[0]:
            self._cut(index, self._chunks[index].past(key[1]))
        return index + 1

    def _cut(self, index: int, position: int) -> None:
        """Make two chunks of one, unless one of them would be empty."""
        chunk = self._chunks[index]
        if 0 < position < len(chunk):
            runs = (
                chunk.part(0, position, self._codes),
                chunk.part(position, len(chunk), self._codes),
            )
            self._chunks[index : index + 1] = [Chunk(run, self._codes) for run in runs]
            self._firsts.insert(index + 1, self._chunks[index + 1].first)

    def _halve(self, index: int) -> None:
        """Cut a chunk that is too long, between two sectors, until none is."""
        chunk = self._chunks[index]
        if len(chunk) <= FULL:
            return
        start, end = chunk.find(chunk.names.all[len(chunk) // 2])
        middle = start or end
        if middle < len(chunk):
            self._cut(index, middle)
            self._halve(index + 1)
            self._halve(index)

    def _join_around(self, index: int) -> None:
        """Make one chunk of the ones before and at `index` if they fit into one."""
        if not 0 < index < len(self._chunks):
            return
        one, other = self._chunks[index - 1 : index + 1]
        if one.names.miner == other.names.miner and len(one) + len(other) <= FULL:
            one.join(other)
            del self._chunks[index], self._firsts[index]

    def _overwrite(self, chunk: Chunk, position: int, row: Row) -> bool:
        known = chunk.row(position, self._codes)
        if known == row:
            return False
        chunk.replace(position, row, self._codes)
        self._codes.use(row[3])
        self._codes.release(known[3])
        return True

    def _take_out(self, index: int, position: int) -> None:
        chunk = self._chunks[index]
        shape = chunk.shapes[position]
        self.held[chunk.holders[position] >> 1] -= 1
        self.count -= chunk.names.count
        chunk.remove(position, position + 1, self._codes)
        self.count += chunk.names.count
        self._codes.release(shape)
        self._shown = None
        if len(chunk):
            self._firsts[index] = chunk.first
        else:
            del self._chunks[index], self._firsts[index]


def join(runs: Sequence[Run]) -> list[Run]:
    """Runs that follow each other and are nobody else's, those of one miner made one."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].miner == run.miner:
            for ours, theirs in zip(joined[-1].columns, run.columns, strict=True):
                ours.extend(theirs)  # type: ignore[arg-type]  # each by its like
        else:
            joined.append(run)
    return joined
