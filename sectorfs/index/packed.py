"""Many declarations as columns of numbers: the form they are read in, and kept in by the catalog.

A declaration as an object costs a microsecond to make and half a kilobyte to keep. A `Run` holds
those of one file type and miner as one array per field; what repeats all the time is a small number
that stands for it: the storage, and the *shape* of a directory, which is the names and sizes of its
files. The times of the files of all directories follow each other in one more array.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

import msgspec

from sectorfs.index.digests import Digests
from sectorfs.types import Facts, FileType, MemberFacts, StorageID

K = TypeVar("K")

Shape = tuple[tuple[str, ...], tuple[int, ...]]
"""Names and sizes of the files of a sector directory, by ascending name."""

Key = tuple[int, int]
"""Miner and number of a sector."""

UNTOLD, PLAIN, FIRST_SHAPE = 0, 1, 2
"""Numbers of shapes: nobody told any facts; no directory; the first one that stands in a table."""

Members = Sequence[tuple[str, int, int]]
"""Name, size and mtime_ns of the files of a directory."""

M = TypeVar("M")
PackedRow = tuple[int, int, int, str, int, int | None, int | None, M | None, bytes | None]
"""File type, miner, number, storage, primary, and the facts: size, mtime_ns, encoded members,
digest."""


class Run(msgspec.Struct, frozen=True):
    """Declarations of one file type and miner in key order; equal when all of them are."""

    miner: int
    numbers: array[int]
    """Sector numbers; one that several storages declare stands there several times."""
    holders: array[int]
    """The storage's number times two, plus one for a primary copy."""
    sizes: array[int]
    mtimes: array[int]
    shapes: array[int]
    times: array[int]
    """Modification times of the files of directories, row after row."""
    digests: Digests

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def columns(self) -> tuple[array[int] | Digests, ...]:
        """All of its arrays."""
        return (
            self.numbers,
            self.holders,
            self.sizes,
            self.mtimes,
            self.shapes,
            self.times,
            self.digests,
        )


def empty_run(miner: int) -> Run:
    """A run without rows."""
    return Run(
        miner, array("q"), array("I"), array("q"), array("q"), array("I"), array("q"), Digests()
    )


class Pack(msgspec.Struct, frozen=True):
    """Declarations in key order, with what the numbers in their runs stand for."""

    runs: Mapping[FileType, Sequence[Run]] = {}
    """By ascending type, and within a type by ascending miner."""
    storages: Sequence[StorageID] = ()
    shapes: Sequence[Shape] = ()
    """The first one is number `FIRST_SHAPE`."""

    def between(self, file_type: FileType, past: Key | None, last: Key | None) -> list[Run]:
        """The runs of a type, cut to the sectors after `past` up to and with `last`."""
        found = []
        for run in self.runs.get(file_type, ()):
            start, end = 0, len(run)
            if past is not None and run.miner <= past[0]:
                start = end if run.miner < past[0] else bisect_right(run.numbers, past[1])
            if last is not None and run.miner >= last[0]:
                end = 0 if run.miner > last[0] else bisect_right(run.numbers, last[1])
            if start < end:
                found.append(self._part(run, start, end))
        return found

    def _part(self, run: Run, start: int, end: int) -> Run:
        if (start, end) == (0, len(run)):
            return run
        begin = self._files(run.shapes[:start])
        stop = begin + self._files(run.shapes[start:end])
        return Run(
            run.miner,
            run.numbers[start:end],
            run.holders[start:end],
            run.sizes[start:end],
            run.mtimes[start:end],
            run.shapes[start:end],
            run.times[begin:stop],
            run.digests.part(start, end),
        )

    def _files(self, shapes: array[int]) -> int:
        """How many files directories of some shapes have together."""
        return sum(
            len(self.shapes[shape - FIRST_SHAPE][0]) for shape in shapes if shape >= FIRST_SHAPE
        )


class _Numbered(dict[K, int]):
    """Gives a number to each new key: the next one."""

    def __missing__(self, key: K) -> int:
        self[key] = number = len(self)
        return number


def pack(rows: Iterable[PackedRow[M]], decode: Callable[[M], Members]) -> Pack:
    """Rows, which are in key order, as columns."""
    storages = _Numbered[str]()
    shapes = _Numbered[Shape]()
    runs: dict[FileType, list[Run]] = {}
    for (file_type, miner), group in groupby(rows, itemgetter(0, 1)):
        run = _run(miner, list(group), decode, storages, shapes)
        runs.setdefault(FileType(file_type), []).append(run)
    return Pack(runs, tuple(map(StorageID, storages)), tuple(shapes))


def _run(
    miner: int,
    group: list[PackedRow[M]],
    decode: Callable[[M], Members],
    storages: _Numbered[str],
    shapes: _Numbered[Shape],
) -> Run:
    # Column by column: a million rows are packed at every start.
    _, _, numbers, names, primaries, sizes, mtimes, members, digests = zip(*group, strict=True)
    found, times = _shaped(sizes, members, decode, shapes)
    return Run(
        miner,
        array("q", numbers),
        array("I", [2 * storages[name] + one for name, one in zip(names, primaries, strict=True)]),
        array("q", sizes if None not in sizes else [size or 0 for size in sizes]),
        array("q", mtimes if None not in mtimes else [mtime_ns or 0 for mtime_ns in mtimes]),
        found,
        times,
        Digests.of(digests),
    )


def _shaped(
    sizes: Sequence[int | None],
    members: Sequence[M | None],
    decode: Callable[[M], Members],
    shapes: _Numbered[Shape],
) -> tuple[array[int], array[int]]:
    """Shapes and times of rows."""
    found = array("I", [UNTOLD if size is None else PLAIN for size in sizes])
    times: array[int] = array("q")
    for position, encoded in enumerate(members):
        if encoded is None:
            continue
        files = decode(encoded)  # one at a time: thousands of tuples at once occupy the collector
        names, lengths, when = zip(*files, strict=True) if files else ((), (), ())
        found[position] = FIRST_SHAPE + shapes[names, lengths]
        times.extend(when)
    return found, times


def to_facts(
    shape: Shape | None, size: int, mtime_ns: int, times: Iterable[int], digest: bytes
) -> Facts:
    """Facts that were told; `shape` is None for a regular file."""
    members = None if shape is None else tuple(map(MemberFacts, *shape, times))
    return Facts(size, mtime_ns, members, digest)
