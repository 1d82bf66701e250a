"""Copies are told to the Index behind their readers' backs, together, and put into place first."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from sectorfs.errors import Unreachable
from sectorfs.index.protocol import Declaration, LocationKey
from sectorfs.stores import announcer, metadata
from sectorfs.stores.announcer import Announcer
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Lane
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID
from tests.index_fixtures import digested

OLD_NS = 1_600_000_000_000_000_007
NEW_NS = OLD_NS + 5_000_000_000


class ScriptedIndex:
    """The two calls an announcer makes; hangs, fails or takes them."""

    def __init__(self) -> None:
        self.declared: list[list[Declaration]] = []
        self.dropped: list[list[LocationKey]] = []
        self.failure: Exception | None = None
        self.gate: trio.Event | None = None
        self.waiting = 0

    async def declare(self, declarations: Sequence[Declaration]) -> None:
        await self._answer()
        self.declared.append(list(declarations))

    async def drop(self, keys: Sequence[LocationKey]) -> None:
        await self._answer()
        self.dropped.append(list(keys))

    async def _answer(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure


class Setting:
    """An announcer over a real cache path."""

    def __init__(self, root: Path, nursery: trio.Nursery) -> None:
        self.index = ScriptedIndex()
        storage = metadata.init_cache_path(str(root)).storage
        self.copies = Copies(root, storage, Lane(str(root), deadline=5))
        self.busy: set[SectorFile] = set()
        self.current: dict[SectorFile, Facts] = {}
        self.digests: dict[SectorFile, bytes] = {}
        """Of copies that were proved."""
        self.announcer = Announcer(
            nursery,
            self.index,  # type: ignore[arg-type]  # only the calls that are made
            self.copies,
            busy=lambda file: file in self.busy,
            current=self.current.get,
            digest=self._digest,
        )

    async def _digest(self, file: SectorFile, facts: Facts) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.digests.get(file, b"")

    def receive(self, file: SectorFile, name: str, data: bytes, mtime_ns: int) -> MemberFacts:
        """One file of a directory arrives."""
        folder = self.copies.root / file.file_type.dir_name / "fetching" / file.sector.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        os.utime(folder / name, ns=(mtime_ns, mtime_ns))
        return MemberFacts(name, len(data), mtime_ns)

    def add(self, file: SectorFile, facts: Facts) -> None:
        self.current[file] = facts
        self.announcer.add(file, facts)


@asynccontextmanager
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    """The block's end waits for the announcer to have nothing left to do."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            yield Setting(tmp_path / "cache", nursery)


def sealed(number: int) -> SectorFile:
    return SectorFile(FileType.SEALED, SectorID(1000, number))


CACHE = SectorFile(FileType.CACHE, SectorID(1000, 1))


def directory(*members: MemberFacts, mtime_ns: int = OLD_NS) -> Facts:
    return Facts(sum(one.size for one in members), mtime_ns, members)


async def test_what_waits_is_told_in_one_call(tmp_path: Path) -> None:
    async with setting(tmp_path) as given:
        given.index.gate = trio.Event()
        given.add(sealed(0), Facts(1, 1))
        while not given.index.waiting:
            await trio.lowlevel.checkpoint()
        for number in range(1, 50):
            given.add(sealed(number), Facts(number, number))
        given.add(sealed(1), Facts(7, 7))
        given.index.gate.set()
    assert [len(call) for call in given.index.declared] == [1, 49]
    second = {one.file: one for one in given.index.declared[1]}
    assert second[sealed(1)].facts == Facts(7, 7)
    assert not any(one.primary for one in second.values())


async def test_a_hung_index_bounds_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer, "LIMIT", 3)
    async with setting(tmp_path) as given:
        given.index.gate = trio.Event()
        given.add(sealed(0), Facts(1, 1))
        while not given.index.waiting:
            await trio.lowlevel.checkpoint()
        for number in range(1, 10):
            given.add(sealed(number), Facts(1, 1))
        given.index.gate.set()
    assert [one.file for one in given.index.declared[1]] == [sealed(1), sealed(2), sealed(3)]


async def test_an_index_that_fails_is_logged_and_asked_again_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with setting(tmp_path) as given:
        given.index.failure = Unreachable("is away", "http://index")
        given.add(sealed(1), Facts(1, 1))
        given.add(sealed(2), Facts(1, 1))
    assert "copy of sealed/s-t01000-1 and 1 more not declared yet" in caplog.text
    async with setting(tmp_path / "again") as given:
        given.index.failure = ZeroDivisionError("a fault of ours")
        given.add(sealed(1), Facts(1, 1))
        while "a fault of ours" not in caplog.text:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        given.index.failure = None
        given.add(sealed(3), Facts(1, 1))
    assert [one.file for one in given.index.declared[0]] == [sealed(3)]


async def test_a_directory_is_declared_once_all_of_it_is_in_place(tmp_path: Path) -> None:
    async with setting(tmp_path) as given:
        one = given.receive(CACHE, "p_aux", b"aux", OLD_NS)
        other = MemberFacts("t_aux", 4, OLD_NS)
        facts = directory(one, other)
        given.add(CACHE, facts)
        await _quiet(given)
        assert given.index.declared == []
        assert not given.copies.path_of(CACHE).exists()
        given.receive(CACHE, "t_aux", b"more", OLD_NS)
        given.add(CACHE, facts)
    assert [one.facts for one in given.index.declared[0]] == [facts]
    assert sorted(os.listdir(given.copies.path_of(CACHE))) == ["p_aux", "t_aux"]
    assert given.copies.path_of(CACHE).stat().st_mtime_ns == OLD_NS
    assert given.index.dropped == []


@pytest.mark.parametrize("proved", [False, True])
async def test_a_digest_that_the_index_knows_makes_a_copy_no_other(
    tmp_path: Path, proved: bool
) -> None:
    """It may have come while the copy did; what is told is the digest of the copy itself."""
    async with setting(tmp_path) as given:
        facts = directory(given.receive(CACHE, "p_aux", b"aux", OLD_NS))
        given.current[CACHE] = digested(facts, 1)
        own = digested(facts, 2) if proved else facts
        given.digests[CACHE] = own.digest
        given.announcer.add(CACHE, digested(facts, 3))
    assert [one.facts for one in given.index.declared[0]] == [own]


async def _quiet(given: Setting) -> None:
    """Wait until the announcer has done what it can."""
    while given.announcer.running:
        await trio.lowlevel.checkpoint()


async def test_a_file_of_another_content_does_not_make_a_directory_whole(tmp_path: Path) -> None:
    async with setting(tmp_path) as given:
        given.receive(CACHE, "p_aux", b"old", OLD_NS)
        other = given.receive(CACHE, "t_aux", b"more", NEW_NS)
        given.add(CACHE, directory(MemberFacts("p_aux", 3, NEW_NS), other))
    assert given.index.declared == []
    assert not given.copies.path_of(CACHE).exists()


async def test_what_an_older_copy_has_need_not_come_again(tmp_path: Path) -> None:
    async with setting(tmp_path) as given:
        one = given.receive(CACHE, "p_aux", b"aux", OLD_NS)
        given.add(CACHE, directory(one))
        await _quiet(given)
        gone = given.copies.path_of(CACHE) / "gone"
        gone.write_bytes(b"no longer wanted")
        other = given.receive(CACHE, "t_aux", b"more", NEW_NS)
        facts = directory(one, other, mtime_ns=NEW_NS)
        given.add(CACHE, facts)
    assert given.index.dropped == [[LocationKey(CACHE, given.copies.storage)]]
    assert given.index.declared[1][0].facts == facts
    whole = given.copies.path_of(CACHE)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        "p_aux": b"aux",
        "t_aux": b"more",
    }
    assert list((given.copies.root / "cache" / "fetching").iterdir()) == []


async def test_an_older_copy_stays_while_it_cannot_be_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with setting(tmp_path) as given:
        one = given.receive(CACHE, "p_aux", b"old", OLD_NS)
        given.add(CACHE, directory(one))
        await _quiet(given)
        given.index.failure = Unreachable("is away", "http://index")
        new = given.receive(CACHE, "p_aux", b"new", NEW_NS)
        given.add(CACHE, directory(new, mtime_ns=NEW_NS))
    assert "copy of cache/s-t01000-1 not replaced yet" in caplog.text
    assert (given.copies.path_of(CACHE) / "p_aux").read_bytes() == b"old"


@pytest.mark.parametrize("reason", ["arriving", "changed"])
async def test_a_directory_that_moves_is_left_alone(tmp_path: Path, reason: str) -> None:
    async with setting(tmp_path) as given:
        facts = directory(given.receive(CACHE, "p_aux", b"aux", OLD_NS))
        if reason == "arriving":
            given.busy.add(CACHE)
            given.add(CACHE, facts)
        else:
            given.add(CACHE, facts)
            given.current[CACHE] = directory(MemberFacts("p_aux", 3, NEW_NS))
    assert given.index.declared == []
    assert not given.copies.path_of(CACHE).exists()


async def test_a_disk_that_refuses_leaves_the_directory_for_another_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with setting(tmp_path) as given:
        facts = directory(given.receive(CACHE, "p_aux", b"aux", OLD_NS))
        odd = given.copies.root / "cache/fetching/s-t01000-1/odd"
        odd.mkdir()
        given.add(CACHE, facts)
        given.add(sealed(1), Facts(1, 1))
        await _quiet(given)
        assert [one.file for one in given.index.declared[0]] == [sealed(1)]
        assert "copy not complete yet" in caplog.text
        odd.rmdir()
        given.add(CACHE, facts)
    assert given.index.declared[1][0].facts == facts
