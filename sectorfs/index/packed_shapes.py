"""JSON shapes of pages of declarations in columns: what a catalog is loaded from over RPC.

A million sectors are a few hundred megabytes of numbers in arrays, which cost little to decode, and
to check: every value that the catalog relies on is.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from sectorfs.errors import BadInput
from sectorfs.index import checks, shapes
from sectorfs.index.digests import Digests
from sectorfs.index.packed import FIRST_SHAPE, UNTOLD, Pack, Run, Shape
from sectorfs.index.protocol import PackedPage
from sectorfs.types import DIGEST_SIZE, FileType, StorageID, parse_member_name


class _Shape(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    pass


class RunShape(_Shape, frozen=True):
    """`Run`, with the type."""

    file_type: int
    miner: int
    numbers: list[int]
    holders: list[int]
    sizes: list[int]
    mtimes_ns: list[int]
    shapes: list[int]
    file_mtimes_ns: list[int] | None = None
    digests: str | None = None
    """Those of all rows in hex, zeros for one that has none; null when none has."""


class DirectoryShape(_Shape, frozen=True):
    """Names and sizes of the files of a directory."""

    names: list[str]
    sizes: list[int]


class PackedPageShape(_Shape, frozen=True):
    """A page of everything in columns."""

    epoch: str
    seq: int
    storages: list[shapes.StatusShape] | None = None
    runs: list[RunShape] | None = None
    holders: list[str] | None = None
    directories: list[DirectoryShape] | None = None
    after: shapes.FileShape | None = None


def from_page(page: PackedPage) -> PackedPageShape:
    """The shape of a page."""
    return PackedPageShape(
        epoch=page.epoch,
        seq=page.seq,
        storages=[shapes.from_status(one) for one in page.storages] or None,
        runs=[
            _from_run(file_type, run) for file_type, runs in page.pack.runs.items() for run in runs
        ],
        holders=list(page.pack.storages) or None,
        directories=[
            DirectoryShape(names=list(names), sizes=list(sizes))
            for names, sizes in page.pack.shapes
        ],
        after=None if page.after is None else shapes.from_file(page.after),
    )


def to_page(shape: PackedPageShape) -> PackedPage:
    """A checked page."""
    checks.check_number(shape.seq, "Seq", "snapshot")
    storages = [shapes.to_storage_id(one) for one in shape.holders or ()]
    directories = [_to_shape(one) for one in shape.directories or ()]
    runs: dict[FileType, list[Run]] = {}
    for one in shape.runs or ():
        file_type = shapes.single_type(one.file_type)
        runs.setdefault(file_type, []).append(_to_run(one, storages, directories))
    for file_type, found in runs.items():
        _check_ascending([run.miner for run in found], file_type)
    return PackedPage(
        epoch=shape.epoch,
        seq=shape.seq,
        storages=tuple(shapes.to_status(one) for one in shape.storages or ()),
        pack=Pack(runs, storages, directories),
        after=None if shape.after is None else shapes.to_file(shape.after),
    )


def _from_run(file_type: FileType, run: Run) -> RunShape:
    return RunShape(
        file_type=int(file_type),
        miner=run.miner,
        numbers=run.numbers.tolist(),
        holders=run.holders.tolist(),
        sizes=run.sizes.tolist(),
        mtimes_ns=run.mtimes.tolist(),
        shapes=run.shapes.tolist(),
        file_mtimes_ns=run.times.tolist() or None,
        digests=run.digests.known.hex() or None,
    )


def _to_shape(directory: DirectoryShape) -> Shape:
    thing = "the files of a directory"
    if len(directory.names) != len(directory.sizes):
        raise BadInput("names and sizes do not fit together", thing)
    if len(directory.names) > checks.MAX_MEMBERS:
        raise BadInput(f"{len(directory.names)} files in one sector directory", thing)
    _check_ascending(directory.names, thing)
    try:
        names = tuple(map(parse_member_name, directory.names))
    except ValueError as exc:
        raise BadInput(str(exc), thing) from exc
    for size in directory.sizes:
        checks.check_number(size, "size", thing)
    return names, tuple(directory.sizes)


def _to_run(shape: RunShape, storages: Sequence[StorageID], directories: Sequence[Shape]) -> Run:
    thing = f"snapshot of miner {shape.miner}"
    checks.check_number(shape.miner, "miner", "snapshot")
    columns = (shape.numbers, shape.holders, shape.sizes, shape.mtimes_ns, shape.shapes)
    if len({len(column) for column in columns}) != 1 or not shape.numbers:
        raise BadInput("columns that do not fit together", thing)
    _check_below(shape.numbers, checks.MAX_INT + 1, "sector number", thing)
    _check_below(shape.sizes, checks.MAX_INT + 1, "size", thing)
    _check_below(shape.holders, 2 * len(storages), "holder", thing)
    _check_below(shape.shapes, FIRST_SHAPE + len(directories), "shape", thing)
    holders = [storages[holder >> 1] for holder in shape.holders]
    _check_ascending(list(zip(shape.numbers, holders, strict=True)), thing)
    lengths = [0] * FIRST_SHAPE + [len(names) for names, _ in directories]
    times = shape.file_mtimes_ns or []
    if len(times) != sum(map(lengths.__getitem__, shape.shapes)):
        raise BadInput("times that do not fit to the files", thing)
    try:
        return Run(
            shape.miner,
            array("q", shape.numbers),
            array("I", shape.holders),
            array("q", shape.sizes),
            array("q", shape.mtimes_ns),
            array("I", shape.shapes),
            array("q", times),
            _to_digests(shape, thing),
        )
    except OverflowError as exc:
        raise BadInput("a modification time is beyond 63 bits", thing) from exc


def _to_digests(shape: RunShape, thing: object) -> Digests:
    known = shapes.to_digests(shape.digests or "", thing)
    rows = len(shape.numbers)
    if len(known) not in (0, rows * DIGEST_SIZE):
        raise BadInput("digests that do not fit to the rows", thing)
    digests = Digests(rows, known)
    if UNTOLD in shape.shapes and any(
        digest for kind, digest in zip(shape.shapes, digests, strict=True) if kind == UNTOLD
    ):
        raise BadInput("a digest of a file whose size nobody told", thing)
    return digests


def _check_below(values: Sequence[int], end: int, name: str, thing: object) -> None:
    for value in (min(values), max(values)):
        if not 0 <= value < end:
            raise BadInput(f"a {name} is not between 0 and {end - 1}", thing)


def _check_ascending(values: Sequence[object], thing: object) -> None:
    if not all(one < other for one, other in pairwise(values)):  # type: ignore[operator]
        raise BadInput("not in ascending order", thing)
