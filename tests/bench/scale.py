"""A million sectors: what a node takes to start over them, to keep them, and to list them.

Nobody else does this work, so the peer is the figure that is promised. The Index lists the
unsealed and sealed file and the cache directory, with ten files, of each sector, spread over four
storage paths of other nodes; no file exists.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import trio

from sectorfs.index.protocol import FsStat, StorageInfo
from sectorfs.index.rows import facts_row
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import Facts, FileType, MemberFacts, StorageID
from tests.bench.processes import seconds
from tests.bench.runner import Side, Work
from tests.bench.stage import Stage
from tests.cluster import Node, until

SECTORS = 1_000_000
TYPES = (FileType.UNSEALED, FileType.SEALED, FileType.CACHE)
STORAGES = tuple(StorageID(f"{number}0000000-aaaa-4bbb-8ccc-0123456789ab") for number in range(4))
MINER = 1000
SEALED_SIZE = 32 << 30
FILES = {
    "p_aux": 64,
    **{f"sc-02-data-tree-r-last-{number}.dat": 9_586_976 for number in range(8)},
    "t_aux": 2048,
}
MOST_MIB, MOST_START_SECONDS, MOST_LIST_SECONDS = 600, 15, 6
START_PATIENCE = 100.0
MIB = 1 << 20

Key = tuple[int, int, int, str]


class Million:
    """A node over an Index that lists very many sectors."""

    def __init__(self, root: Path, sectors: int = SECTORS) -> None:
        root.mkdir()
        self.sectors = sectors
        self.node = Node(root, "million")
        self.node.repo.create()
        self._rounds: list[dict[str, float]] = []
        self._taken: Counter[str] = Counter()
        trio.run(attach, self.node.repo.root / "index.db")
        fill(self.node.repo.root / "index.db", sectors)

    def __enter__(self) -> Million:
        return self

    def __exit__(self, *exc: object) -> None:
        self.node.end()

    def next(self, figure: str) -> float:
        """One figure of a round that nobody asked it of yet."""
        number = self._taken[figure]
        self._taken[figure] += 1
        if number == len(self._rounds):
            self._rounds.append(self._round())
        return self._rounds[number][figure]

    def _round(self) -> dict[str, float]:
        """A start, a first listing, and what is in memory after both."""
        self.node.end()
        begin = time.perf_counter()
        self.node.start(mount=True, wait=False)
        until("the mount", lambda: self.node.repo.api() is not None, START_PATIENCE)
        started = time.perf_counter() - begin
        listing = self.node.root / "listing"
        listed = seconds("ls", "-f", str(self.node.mountpoint / "sealed"), output=listing)
        assert sum(1 for _ in listing.open("rb")) >= self.sectors
        return {
            "start": len(TYPES) * self.sectors / started,
            "list": self.sectors / listed,
            "memory": len(TYPES) * self.sectors / (self._resident() / MIB),
        }

    def _resident(self) -> int:
        process = self.node.process
        assert process is not None
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise LookupError("VmRSS")


async def attach(path: Path) -> None:
    """Make an Index with the storages."""
    async with SqliteIndex.open(path, cutoff=50) as index:
        for storage in STORAGES:
            url = f"http://127.0.0.1:9/{storage}/remote"
            await index.attach(StorageInfo(storage=storage, urls=(url,)), FsStat(capacity=1 << 50))


def fill(path: Path, sectors: int) -> None:
    """Declare everything, as a node would, in one transaction and in no time."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        db.executemany(
            "INSERT INTO sector_location"
            " (miner_id, sector_num, sector_filetype, storage_id, is_primary) VALUES (?,?,?,?,1)",
            (key for key, _ in declared(sectors)),
        )
        db.executemany(
            "INSERT INTO sector_facts VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            ((*key, *facts_row(facts)) for key, facts in declared(sectors)),
        )
        db.execute("COMMIT")


def declared(sectors: int) -> Iterator[tuple[Key, Facts]]:
    """Key and facts of each declaration; the same ones each time."""
    times = random.Random(sectors)
    for number in range(sectors):
        storage = STORAGES[number % len(STORAGES)]
        sealed_ns = (1_700_000_000 + number) * 10**9 + times.randrange(10**9)
        for file_type in TYPES:
            key = (MINER, number, int(file_type), storage)
            if file_type.is_directory:
                yield key, _directory(sealed_ns, (times.randrange(10**13) for _ in FILES))
            else:
                yield key, Facts(SEALED_SIZE, sealed_ns)


def _directory(begin_ns: int, later: Iterable[int]) -> Facts:
    members = tuple(
        MemberFacts(name, size, begin_ns + after)
        for (name, size), after in zip(FILES.items(), later, strict=True)
    )
    return Facts(sum(FILES.values()), begin_ns, members)


def _million(stage: Stage) -> Million:
    return stage.enter("million", lambda: Million(stage.root / "million"))


def _row(figure: str, title: str, unit: str, promise: str, rate: float) -> Work[Stage]:
    return Work(
        f"million-{figure}",
        title,
        unit,
        Side("sectorfs", lambda stage: _million(stage).next(figure)),
        (Side(promise, lambda stage: rate, at_least=1.0),),
    )


_ALL = len(TYPES) * SECTORS
WORKS: tuple[Work[Stage], ...] = (
    _row(
        "start",
        "3 M declarations: start until the mount is ready",
        "declarations/s",
        f"{MOST_START_SECONDS} s",
        _ALL / MOST_START_SECONDS,
    ),
    _row(
        "memory",
        "3 M declarations: resident memory, a million names held by the kernel",
        "declarations/MiB",
        f"{MOST_MIB} MiB",
        _ALL / MOST_MIB,
    ),
    _row(
        "list",
        "`ls -f` of 1 M names, first time",
        "names/s",
        f"{MOST_LIST_SECONDS} s",
        SECTORS / MOST_LIST_SECONDS,
    ),
)
