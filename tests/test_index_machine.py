"""A catalog that follows an index, beside a model made of dicts."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sectorfs.errors import NotFound
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.content import present_facts
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import (
    Declaration,
    FsStat,
    HealthReport,
    LocationKey,
    SectorIndex,
    StorageInfo,
)
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID
from tests.index_fixtures import CUTOFF, Clock, rpc_over

# A failure takes minutes to shrink, and is worth them.
pytestmark = pytest.mark.timeout(600)

KEEP = 5
HEARTBEAT = 0.001
STORAGES = st.sampled_from([StorageID(name) for name in "abc"])
X, Y = "http://x:1/remote", "http://y:1/remote"
FILES = st.builds(
    SectorFile,
    st.sampled_from([FileType.UNSEALED, FileType.SEALED, FileType.CACHE]),
    st.builds(SectorID, st.sampled_from([1000, 1001]), st.integers(0, 1)),
)
FACTS = st.none() | st.builds(
    Facts,
    st.integers(0, 2),
    st.integers(0, 2),
    st.none() | st.just((MemberFacts("p_aux", 1, 1), MemberFacts("t_aux", 1, 1))),
    st.sampled_from([b"", b"", b"\1" * 32, b"\2" * 32]),
)
BATCHES = st.lists(
    st.tuples(
        FILES, st.sampled_from([StorageID(name) for name in "aaabbbc"]), st.booleans(), FACTS
    ),
    min_size=1,
    max_size=6,
)


class Loop:
    """A trio loop in a thread of its own, for steps that are functions."""

    def __init__(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main, started))
        self._thread.start()
        assert started.wait(20)

    async def _main(self, started: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        started.set()
        await self._stop.wait()

    def run(self, call: Callable[..., Awaitable[Any]], *args: object) -> Any:
        return trio.from_thread.run(call, *args, trio_token=self._token)

    def close(self) -> None:
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join()


class Following(RuleBasedStateMachine):
    """Any history of the index, seen by a node that follows it in fits and starts."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.number = 0
        self.loop = Loop()
        self.clock = Clock()
        self.now = 0.0
        self.storages: dict[StorageID, list[str]] = {}
        self.errors: dict[StorageID, str] = {}
        self.rows: dict[LocationKey, Declaration] = {}
        self._open()
        self.restart()

    def _open(self) -> None:
        path = Path(self.directory.name) / f"{self.number}.db"
        self.opened = SqliteIndex.open(path, cutoff=CUTOFF, clock_ns=self.clock, keep_changes=KEEP)
        self.index: SqliteIndex = self.loop.run(self.opened.__aenter__)

    def _close(self) -> None:
        self.loop.run(self.opened.__aexit__, None, None, None)

    def teardown(self) -> None:
        self._close()
        self.loop.close()
        self.directory.cleanup()

    @rule(over_rpc=st.booleans())
    def restart(self, over_rpc: bool = False) -> None:
        """The node starts again, with an empty catalog."""
        self.catalog = Catalog()
        self.shown: dict[SectorFile, Facts | None] = {}
        followed: SectorIndex = rpc_over(self.index) if over_rpc else self.index
        self.feed = Feed(
            followed,
            self.catalog,
            heartbeat=HEARTBEAT,
            on_change=self._note,
            clock=lambda: self.now,
            clock_ns=self.clock,
        )

    def _note(self, found: Sequence[FileChange]) -> None:
        """What is told must add up to what is there: that is all the kernel ever hears."""
        for change in found:
            assert change.appeared == (change.file not in self.shown)
            assert change.before == self.shown.get(change.file)
            if change.vanished:
                assert change.after is None
                del self.shown[change.file]
            else:
                assert change.appeared or change.before != change.after
                self.shown[change.file] = change.after

    @initialize()
    def attach_two(self) -> None:
        for name in "ab":
            self.attach(StorageID(name), X)

    @rule(storage=STORAGES, url=st.sampled_from([X, Y]))
    def attach(self, storage: StorageID, url: str) -> None:
        info = StorageInfo(storage=storage, urls=(url,))
        self.loop.run(self.index.attach, info, FsStat())
        urls = self.storages.setdefault(storage, [])
        if url not in urls:
            urls.append(url)
        self.errors[storage] = ""

    @rule(storage=STORAGES, again=st.sampled_from([True, True, False]))
    def detach_wholly(self, storage: StorageID, again: bool) -> None:
        for url in list(self.storages.get(storage, [])):
            self.detach(storage, url)
        if again:
            self.attach(storage, X)

    @rule(storage=STORAGES, url=st.sampled_from([X, Y]))
    def detach(self, storage: StorageID, url: str) -> None:
        try:
            self.loop.run(self.index.detach, storage, url)
        except NotFound:
            assert url not in self.storages.get(storage, [])
            return
        self.storages[storage].remove(url)
        if not self.storages[storage]:
            del self.storages[storage], self.errors[storage]
            self.rows = {key: row for key, row in self.rows.items() if key.storage != storage}

    @rule(storage=STORAGES, error=st.sampled_from(["", "x", "y"]))
    def report(self, storage: StorageID, error: str) -> None:
        try:
            report = HealthReport(stat=FsStat(), error=error)
            self.loop.run(self.index.report_health, storage, report)
        except NotFound:
            assert storage not in self.storages
            return
        self.errors[storage] = error

    @rule(batch=BATCHES)
    def declare(self, batch: list[tuple[SectorFile, StorageID, bool, Facts | None]]) -> None:
        # Mostly of what is attached: one unknown storage refuses the whole batch.
        known = [one for one in batch if one[1] in self.storages]
        declarations = [Declaration(*one) for one in known or batch]
        try:
            self.loop.run(self.index.declare, declarations)
        except NotFound:
            assert any(one.storage not in self.storages for one in declarations)
            return
        for one in declarations:
            old = self.rows.get(one.key, one)
            primary = one.primary or old.primary
            facts = _known_then(old.facts, one.facts)
            self.rows[one.key] = Declaration(one.file, one.storage, primary, facts)

    @rule(batch=BATCHES)
    def tell(self, batch: list[tuple[SectorFile, StorageID, bool, Facts | None]]) -> None:
        """What others found out: of what is declared, and digests of what is declared so."""
        told = [Declaration(*one) for one in batch]
        self.loop.run(self.index.tell, told)
        for one in told:
            old, facts = self.rows.get(one.key), one.facts
            if old is None or facts is None:
                continue
            if not facts.digest or old.facts is None or old.facts.bare == facts.bare:
                facts = _known_then(old.facts, facts)
                self.rows[one.key] = Declaration(one.file, one.storage, old.primary, facts)

    @rule(keys=st.lists(st.builds(LocationKey, FILES, STORAGES), max_size=4))
    def drop(self, keys: list[LocationKey]) -> None:
        self.loop.run(self.index.drop, keys)
        for key in keys:
            self.rows.pop(key, None)

    @rule()
    def reopen(self) -> None:
        """The index node starts again."""
        self._close()
        self._open()
        self.feed.index = self.index

    @rule()
    def replace(self) -> None:
        """The Index is lost and begun anew; nodes attach what they have."""
        self._close()
        self.number += 1
        self._open()
        self.feed.index = self.index
        self.storages, self.errors, self.rows = {}, {}, {}
        self.attach_two()

    @rule()
    def step(self) -> None:
        """One question of the feed: may leave it anywhere between then and now."""
        self.loop.run(self._step)

    async def _step(self) -> None:
        await self.feed.step(wait=0)

    @rule(rpc=st.booleans())
    def catch_up(self, rpc: bool) -> None:
        """As long as it takes; then the catalog is what the model is."""

        async def follow() -> None:
            self.feed.index = rpc_over(self.index) if rpc else self.index
            for count in range(40):
                # A replaced Index is given some time before it is taken over.
                self.now += HEARTBEAT if count > 20 else 0
                await self.feed.step(wait=0)
                page = await self.index.snapshot()
                here = (self.catalog.epoch, self.catalog.seq, self.catalog.loaded)
                if here == (page.epoch, page.seq, True):
                    return
            raise AssertionError("never caught up")

        self.loop.run(follow)
        assert self._contents() == sorted(self.rows.values(), key=lambda one: one.key)
        known = {one.info.storage: one for one in self.catalog.storages()}
        assert {name: list(one.info.urls) for name, one in known.items()} == self.storages
        assert {name: one.error for name, one in known.items()} == self.errors

    def _contents(self) -> list[Declaration]:
        found: list[Declaration] = []
        for file_type in FileType:
            sectors = self.catalog.sectors(file_type)
            assert list(sectors) == sorted(set(sectors))
            for sector in sectors:
                entry = self.catalog.entry(SectorFile(file_type, sector))
                assert entry is not None
                assert entry.facts == present_facts(entry.declarations)
                found += entry.declarations
        assert len(self.catalog) == len({one.file for one in found})
        return found

    @invariant()
    def what_was_told_is_what_is_there(self) -> None:
        there = {one.file for one in self._contents()}
        assert there == set(self.shown)
        for file, facts in self.shown.items():
            entry = self.catalog.entry(file)
            assert entry is not None
            assert (entry.facts and entry.facts.bare) == facts

    @invariant()
    @precondition(lambda self: self.catalog.loaded)
    def storages_hold_what_entries_say(self) -> None:
        by_storage: dict[StorageID, set[SectorFile]] = {}
        for one in self._contents():
            by_storage.setdefault(one.storage, set()).add(one.file)
        for name in (StorageID(one) for one in "abc"):
            assert set(self.catalog.files_of(name)) == by_storage.get(name, set())


def _known_then(known: Facts | None, told: Facts | None) -> Facts | None:
    """What is known of a declaration once something was told, or nothing."""
    if told is None or (known is not None and known.bare == told):
        return known
    return told


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


@pytest.mark.long
class TestFollowingLong(Following.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=60, deadline=None)
