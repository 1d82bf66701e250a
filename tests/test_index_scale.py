"""A cluster of many sectors in small: loaded as the million of the benchmark is."""

from __future__ import annotations

import gc
import itertools
import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path

from sectorfs.index.catalog import Catalog
from sectorfs.index.feed import Feed
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import FileType, SectorFile, SectorID
from tests.bench import scale
from tests.index_fixtures import CUTOFF

SECTORS = 10_000
MOST_BYTES = 100
"""Of a declaration, cache directories with their ten files among them: three million are 300 MB."""


MOST_DIGEST_BYTES = 33
"""More, once each file has a digest."""


async def loaded(path: Path, *, digests: bool = False) -> Catalog:
    await scale.attach(path)
    scale.fill(path, SECTORS)
    if digests:
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE sector_facts SET digest = randomblob(32)")
    catalog = Catalog()
    async with SqliteIndex.open(path, cutoff=CUTOFF) as index:
        await Feed(index, catalog, heartbeat=10, on_change=lambda _: None).step(wait=0)
    return catalog


async def test_everything_is_there(tmp_path: Path) -> None:
    catalog = await loaded(tmp_path / "index.db")
    assert len(catalog) == 3 * SECTORS
    for (miner, number, kind, storage), facts in itertools.islice(scale.declared(SECTORS), 300):
        entry = catalog.entry(SectorFile(FileType(kind), SectorID(miner, number)))
        assert entry is not None
        assert entry.facts == facts
        assert [(one.storage, one.primary) for one in entry.declarations] == [(storage, True)]
    for storage in scale.STORAGES:
        assert catalog.counts(storage) == dict.fromkeys(scale.TYPES, SECTORS // 4)
        assert len(catalog.files_of(storage, limit=10**6)) == 3 * SECTORS // 4


async def test_a_declaration_takes_few_bytes(tmp_path: Path) -> None:
    assert await taken(tmp_path / "index.db", digests=False) < MOST_BYTES


async def test_a_digest_takes_its_own_bytes_and_no_more(tmp_path: Path) -> None:
    without = await taken(tmp_path / "a.db", digests=False)
    assert await taken(tmp_path / "b.db", digests=True) < without + MOST_DIGEST_BYTES


async def taken(path: Path, *, digests: bool) -> float:
    """Memory of a declaration."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        catalog = await loaded(path, digests=digests)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / len(catalog)
    finally:
        tracemalloc.stop()
