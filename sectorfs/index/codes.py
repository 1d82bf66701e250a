"""What the small numbers in the catalog's columns stand for: storages, and shapes of directories.

A storage keeps its number for as long as the process runs. Shapes are counted, and forgotten with
the last row that has them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from sectorfs.index.content import Standing, standing
from sectorfs.index.packed import FIRST_SHAPE, PLAIN, UNTOLD, Key, Pack, Run, Shape, to_facts
from sectorfs.index.protocol import Declaration
from sectorfs.types import Facts, SectorFile, StorageID

Row = tuple[int, int, int, int, bytes, bytes]
"""A declaration of some sector file: holder, size, mtime_ns, shape, its files' times, digest."""


Shown = tuple[bool, Facts | None]
"""Whether anybody declares a sector file, and the facts that hold now, bare of their digest: one
that comes later is no new content."""


class Tables:
    """What numbers stand for; rows become values with it."""

    def __init__(self, storages: Iterable[StorageID] = (), shapes: Iterable[Shape] = ()) -> None:
        self.storages = list(storages)
        self.shapes: list[Shape | None] = [*[None] * FIRST_SHAPE, *shapes]
        self.lengths = [len(shape[0]) if shape else 0 for shape in self.shapes]
        """Files of a directory of each shape."""

    def facts(self, row: Row) -> Facts | None:
        """What a row tells."""
        _, size, mtime_ns, shape, times, digest = row
        if shape == UNTOLD:
            return None
        return to_facts(self.shapes[shape], size, mtime_ns, array("q", times), digest)

    def declaration(self, file: SectorFile, row: Row) -> Declaration:
        """A row as a declaration of a sector file."""
        holder = row[0]
        return Declaration(file, self.storages[holder >> 1], bool(holder & 1), self.facts(row))

    def present(self, rows: Iterable[Row]) -> Row | None:
        """The one of a sector file's rows whose facts hold now; None while nobody told any."""
        told = [row for row in rows if row[3] != UNTOLD]
        if len(told) > 1:
            return min(told, key=self._standing)
        return told[0] if told else None

    def _standing(self, row: Row) -> Standing:
        return standing(bool(row[0] & 1), row[2], self.storages[row[0] >> 1])

    def shown(self, rows: Sequence[Row]) -> Shown:
        """What several declarations of a sector file, or none, come to."""
        present = self.present(rows)
        return bool(rows), None if present is None else self.facts((*present[:5], b""))

    def files(self, runs: Iterable[Run]) -> dict[Key, list[Row]]:
        """The rows of each sector file, in the order of the runs."""
        found: dict[Key, list[Row]] = {}
        for run in runs:
            spot = 0
            columns = (run.numbers, run.holders, run.sizes, run.mtimes, run.shapes, run.digests)
            for number, holder, size, mtime_ns, shape, digest in zip(*columns, strict=True):
                end = spot + self.lengths[shape]
                row = (holder, size, mtime_ns, shape, run.times[spot:end].tobytes(), digest)
                found.setdefault((run.miner, number), []).append(row)
                spot = end
        return found


class Codes(Tables):
    """The tables of one catalog: they grow with what comes."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[StorageID, int] = {}
        self._uses = [0] * FIRST_SHAPE
        self._known: dict[Shape, int] = {}
        self._free: list[int] = []

    def storage(self, storage: StorageID) -> int:
        """The number of a storage; a new one when it was never seen."""
        number = self._numbers.setdefault(storage, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return number

    def known(self, storage: StorageID) -> int | None:
        """The number of a storage, if it has one."""
        return self._numbers.get(storage)

    def use(self, shape: int, times: int = 1) -> None:
        """Count rows that have a shape."""
        self._uses[shape] += times

    def release(self, shape: int, times: int = 1) -> None:
        """Count rows that had a shape; after the last one its number is free."""
        self._uses[shape] -= times
        known = self.shapes[shape]
        if known is not None and not self._uses[shape]:
            del self._known[known]
            self.shapes[shape] = None
            self._free.append(shape)

    def shape(self, shape: Shape) -> int:
        """The number of a shape; a new one, for a row that will `use` it, when it has none."""
        number = self._known.get(shape)
        if number is not None:
            return number
        if self._free:
            number = self._free.pop()
            self.shapes[number], self.lengths[number] = shape, len(shape[0])
        else:
            number = len(self.shapes)
            self.shapes.append(shape)
            self.lengths.append(len(shape[0]))
            self._uses.append(0)
        self._known[shape] = number
        return number

    def adopt(self, run: Run, pack: Pack) -> Run:
        """A run of a pack with the numbers of these tables, and arrays of its own."""
        holders = {
            2 * local + primary: 2 * self.storage(pack.storages[local]) + primary
            for local in {holder >> 1 for holder in run.holders}
            for primary in (0, 1)
        }
        shapes = {
            local: self.shape(pack.shapes[local - FIRST_SHAPE]) if local >= FIRST_SHAPE else local
            for local in set(run.shapes)
        }
        return Run(
            run.miner,
            run.numbers,
            array("I", map(holders.__getitem__, run.holders)),
            run.sizes[:],
            run.mtimes[:],
            array("I", map(shapes.__getitem__, run.shapes)),
            run.times[:],
            run.digests.part(0, len(run)),
        )

    def row(self, one: Declaration) -> Row:
        """A declaration as a row."""
        holder = 2 * self.storage(one.storage) + one.primary
        facts = one.facts
        if facts is None:
            return holder, 0, 0, UNTOLD, b"", b""
        if facts.members is None:
            return holder, facts.size, facts.mtime_ns, PLAIN, b"", facts.digest
        shape = (
            tuple(member.name for member in facts.members),
            tuple(member.size for member in facts.members),
        )
        times = array("q", [member.mtime_ns for member in facts.members])
        number = self.shape(shape)
        return holder, facts.size, facts.mtime_ns, number, times.tobytes(), facts.digest
