"""Digests in the Index: kept while the content is, told to all, refused when they are none."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sectorfs.errors import BadInput, Unsupported
from sectorfs.index import migrations
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.index.feed import Feed
from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.index.rpc import RpcIndex, index_methods
from sectorfs.types import Facts, FileType, SectorFile, StorageID
from sectorfs.wire.jsonrpc import Dispatcher
from tests.index_fixtures import (
    ADMIN,
    RPC_URL,
    STAT,
    World,
    both_kinds,
    digested,
    directory,
    file,
    held,
    index_of_world,
    info,
    key,
    open_index,
    sector,
)

world = both_kinds
index = index_of_world

PLAIN = Facts(1, 1)
CACHE = file(1, FileType.CACHE)


async def facts_of(index: SectorIndex, of: SectorFile | int = 1) -> Facts | None:
    [found] = [one for one in await index.sector(sector(1)) if one.key == key("a", of)]
    return found.facts


async def test_every_answer_has_them(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    page = await index.snapshot()
    batch = [
        held("a", 1, facts=digested(PLAIN, 1)),
        held("a", 2, facts=PLAIN),
        held("a", CACHE, facts=digested(directory("p_aux", "t_aux"), 3)),
    ]
    await index.declare(batch)
    assert await index.declarations(StorageID("a")) == batch
    assert (await index.snapshot()).declarations == tuple(batch)
    assert (await index.changes(page.epoch, page.seq)).declared == tuple(batch)
    assert await index.sector(sector(1)) == [batch[0], batch[2]]
    found = (await index.packed()).pack.runs
    assert [[*run.digests] for runs in found.values() for run in runs] == [
        [b"\1" * 32, b""],
        [b"\3" * 32],
    ]


async def test_a_digest_stays_as_long_as_the_facts(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    for sent, kept in (
        (PLAIN, PLAIN),
        (digested(PLAIN, 1), digested(PLAIN, 1)),
        (PLAIN, digested(PLAIN, 1)),
        (None, digested(PLAIN, 1)),
        (digested(PLAIN, 2), digested(PLAIN, 2)),
        (Facts(2, 1), Facts(2, 1)),
        (PLAIN, PLAIN),
        (digested(PLAIN, 3), digested(PLAIN, 3)),
        (Facts(1, 2), Facts(1, 2)),
        (digested(PLAIN, 4), digested(PLAIN, 4)),
        (digested(Facts(7, 7), 5), digested(Facts(7, 7), 5)),
    ):
        await index.declare([held("a", 1, facts=sent)])
        assert await facts_of(index) == kept
    await index.drop([key("a", 1)])
    await index.declare([held("a", 1, facts=Facts(7, 7))])
    assert await facts_of(index) == Facts(7, 7)


async def test_that_of_a_directory_stays_as_long_as_its_files(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    one, two = directory("p_aux", "t_aux"), directory("p_aux", "x_aux")
    for sent, kept in (
        (digested(one, 1), digested(one, 1)),
        (one, digested(one, 1)),
        (two, two),
        (one, one),
    ):
        await index.declare([held("a", CACHE, facts=sent)])
        assert await facts_of(index, CACHE) == kept


async def test_a_node_that_becomes_primary_keeps_it(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1, primary=False, facts=digested(PLAIN, 1))])
    await index.declare([held("a", 1, facts=PLAIN)])
    assert await index.sector(sector(1)) == [held("a", 1, facts=digested(PLAIN, 1))]


async def test_one_that_comes_is_a_change_and_one_that_is_known_is_none(
    index: SectorIndex,
) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1, facts=PLAIN)])
    for sent, changed in (
        (digested(PLAIN, 1), True),
        (digested(PLAIN, 1), False),
        (PLAIN, False),
        (digested(PLAIN, 2), True),
    ):
        page = await index.snapshot()
        await index.declare([held("a", 1, facts=sent)])
        found = await index.changes(page.epoch, page.seq)
        assert [one.facts for one in found.declared] == ([sent] if changed else [])


@pytest.mark.parametrize("digest", [b"x", b"\1" * 31, b"\1" * 33, bytes(32)])
async def test_what_is_no_digest_is_refused_with_its_batch(
    index: SectorIndex, digest: bytes
) -> None:
    await index.attach(info("a"), STAT)
    batch = [held("a", 1), held("a", 2, facts=Facts(1, 1, None, digest))]
    for call in (index.declare, index.tell):
        with pytest.raises(BadInput, match="digest"):
            await call(batch)
    assert (await index.snapshot()).declarations == ()


async def test_one_that_was_found_out_too_late_is_passed_over(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1, facts=Facts(2, 2)), held("a", CACHE)])
    await index.tell(
        [
            held("a", 1, facts=digested(PLAIN, 1)),
            held("a", 9, facts=digested(PLAIN, 1)),
            held("a", CACHE, facts=digested(directory("p_aux"), 2)),
        ]
    )
    assert await index.sector(sector(9)) == []
    assert await facts_of(index) == Facts(2, 2)
    assert await facts_of(index, CACHE) == digested(directory("p_aux"), 2)
    await index.tell([held("a", 1, facts=digested(Facts(2, 2), 7))])
    assert await facts_of(index) == digested(Facts(2, 2), 7)


async def test_many_in_one_batch(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", number, facts=PLAIN) for number in range(2500)])
    seq = (await index.snapshot()).seq
    news = [held("a", number, facts=digested(PLAIN, 1 + number % 99)) for number in range(2500)]
    await index.tell(news)
    assert await index.declarations(StorageID("a"), limit=5000) == news
    assert (await index.snapshot()).seq == seq + 2500


# --- a node that follows ---


class Follower:
    """A catalog, and what its node was told of it."""

    def __init__(self, index: SectorIndex) -> None:
        self.catalog = Catalog()
        self.told: list[FileChange] = []
        self.feed = Feed(index, self.catalog, heartbeat=10, on_change=self._note)

    def _note(self, found: Sequence[FileChange]) -> None:
        self.told += found

    async def catch_up(self, *, anew: bool = False) -> list[FileChange]:
        """Follow, or take a whole snapshot; what changed."""
        self.told = []
        self.feed._reload = self.feed._reload or anew
        await self.feed.step(wait=0)
        return self.told

    def facts(self, of: SectorFile | int = 1) -> Facts | None:
        found = self.catalog.entry(file(of) if isinstance(of, int) else of)
        return found.facts if found else None


@pytest.mark.parametrize("anew", [False, True])
async def test_a_digest_alone_is_no_new_content(index: SectorIndex, anew: bool) -> None:
    """No inode, no cached page and no name becomes another when it comes or goes."""
    await index.attach(info("a"), STAT)
    cached = directory("p_aux", "t_aux")
    await index.declare([held("a", 1, facts=PLAIN), held("a", CACHE, facts=cached)])
    node = Follower(index)
    assert len(await node.catch_up()) == 2
    changed_ns = node.catalog.names_changed_ns(FileType.SEALED)
    for byte in (1, 2):
        await index.declare(
            [
                held("a", 1, facts=digested(PLAIN, byte)),
                held("a", CACHE, facts=digested(cached, byte)),
            ]
        )
        assert await node.catch_up(anew=anew) == []
        assert node.facts() == digested(PLAIN, byte)
        assert node.facts(CACHE) == digested(cached, byte)
    await index.drop([key("a", 1)])
    await index.declare([held("a", 1, facts=PLAIN)])
    assert await node.catch_up(anew=anew) == []
    assert (node.facts(), node.facts(CACHE)) == (PLAIN, digested(cached, 2))
    assert node.catalog.names_changed_ns(FileType.SEALED) == changed_ns


async def test_what_changed_is_told_without_digests(index: SectorIndex) -> None:
    await index.attach(info("a"), STAT)
    await index.declare([held("a", 1, facts=digested(PLAIN, 1))])
    node = Follower(index)
    [found] = await node.catch_up()
    assert (found.before, found.after, found.appeared) == (None, PLAIN, True)
    await index.declare([held("a", 1, facts=digested(Facts(2, 2), 2))])
    [found] = await node.catch_up()
    assert (found.before, found.after) == (PLAIN, Facts(2, 2))


async def test_a_copy_with_another_digest_holds_it_no_more(world: World) -> None:
    index = world.index
    for name in "abc":
        await index.attach(info(name), STAT)
    await index.declare([held(name, 1, primary=name == "b", facts=PLAIN) for name in "abc"])
    node = Follower(index)
    await node.catch_up()
    assert node.catalog.holders(file(1)) == ("b", "a", "c")
    await index.tell([held("a", 1, facts=digested(PLAIN, 1))])
    await node.catch_up()
    assert node.facts() == digested(PLAIN, 1)
    await index.tell([held("b", 1, facts=digested(PLAIN, 2))])
    assert await node.catch_up() == []
    assert node.facts() == digested(PLAIN, 2)
    assert node.catalog.holders(file(1)) == ("b", "c")
    assert node.catalog.declared(file(1), StorageID("a")) == digested(PLAIN, 1)
    assert node.catalog.declared(file(1), StorageID("c")) == PLAIN


# --- nodes of an older version, and what no version sends ---


class _Older(msgspec.Struct, rename="pascal"):
    """Shapes from before there were digests."""


class _OldFacts(_Older):
    size: int
    mtime_ns: int
    files: list[dict[str, Any]] | None = None


class _OldDeclaration(_Older):
    file_type: int
    primary: bool
    facts: _OldFacts | None = None


async def ask(index: SectorIndex, method: str, *params: object) -> tuple[int, bytes]:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    status, answer = await Dispatcher(index_methods(index))(json.dumps(body).encode(), ADMIN)
    return status, answer


def declaring(**facts: object) -> dict[str, object]:
    shape = {"Miner": 1000, "Number": 1}
    return {"StorageID": "a", "SectorID": shape, "FileType": 2, "Primary": True, "Facts": facts}


async def test_a_node_of_an_older_version_erases_none(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        await index.declare([held("a", 1, facts=digested(PLAIN, 1))])
        page = await index.snapshot()
        shape = declaring(Size=1, MtimeNs=1, Files=None)
        status, _ = await ask(index, "Filecoin.BatchStorageDeclareSectors", [shape])
        assert status == 200
        assert await facts_of(index) == digested(PLAIN, 1)
        assert (await index.snapshot()).seq == page.seq
        _, answer = await ask(index, "Sectorfs.Sector", {"Miner": 1000, "Number": 1})
        [old] = msgspec.convert(json.loads(answer)["result"], list[_OldDeclaration])
        assert old == _OldDeclaration(file_type=2, primary=True, facts=_OldFacts(1, 1))


def older(index: SectorIndex) -> RpcIndex:
    """The client of an Index that never heard of digests: passes over keys that it does not know.

    It has no method for what came with them.
    """
    dispatch = Dispatcher([one for one in index_methods(index) if one.name != "Sectorfs.TellFacts"])

    async def post(body: bytes, patience: float) -> tuple[int, bytes]:
        status, answer = await dispatch(_without_digests(body), ADMIN)
        return status, _without_digests(answer)

    return RpcIndex(RPC_URL, post)


def _without_digests(body: bytes) -> bytes:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("Digest", "Digests")}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return json.dumps(strip(json.loads(body))).encode()


async def test_an_index_of_an_older_version_forgets_them_and_goes_on(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        old = older(index)
        batch = [
            held("a", 1, facts=digested(PLAIN, 1)),
            held("a", CACHE, facts=digested(directory("p_aux"), 1)),
        ]
        await old.declare(batch)
        bare = [
            Declaration(one.file, one.storage, one.primary, one.facts.bare)
            for one in batch
            if one.facts is not None
        ]
        assert await old.sector(sector(1)) == bare
        node = Follower(old)
        await node.catch_up()
        assert (node.facts(), node.facts(CACHE)) == (PLAIN, directory("p_aux"))
        with pytest.raises(Unsupported, match="TellFacts"):
            await old.tell(batch)


@pytest.mark.parametrize(
    ("digest", "expected"),
    [("0a" * 32, b"\x0a" * 32), ("0A" * 32, b"\x0a" * 32), ("", b""), (None, b"")],
)
async def test_the_spellings_of_a_digest(
    tmp_path: Path, digest: str | None, expected: bytes
) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        shape = declaring(Size=1, MtimeNs=1, Digest=digest)
        await ask(index, "Filecoin.BatchStorageDeclareSectors", [shape])
        assert await facts_of(index) == Facts(1, 1, None, expected)


@pytest.mark.parametrize(
    "digest",
    [
        "0a" * 31,
        "0a" * 33,
        "0a" * 31 + "0",
        "0g" * 32,
        "00" * 32,
        "0a " * 32,
        " " + "0a" * 32,
        "٠a" * 32,
        "x",
        " ",
        5,
        ["0a" * 32],
    ],
)
async def test_no_other_spelling(tmp_path: Path, digest: object) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        shape = declaring(Size=1, MtimeNs=1, Digest=digest)
        _, answer = await ask(index, "Filecoin.BatchStorageDeclareSectors", [shape])
        assert "error" in json.loads(answer)
        assert (await index.snapshot()).declarations == ()


async def test_a_digest_without_size_and_time_is_refused(tmp_path: Path) -> None:
    async with open_index(tmp_path / "index.db") as index:
        await index.attach(info("a"), STAT)
        shape = declaring(Digest="0a" * 32)
        _, answer = await ask(index, "Filecoin.BatchStorageDeclareSectors", [shape])
        assert "error" in json.loads(answer)
        assert (await index.snapshot()).declarations == ()


async def test_an_index_from_before_there_were_digests_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    with sqlite3.connect(path) as db:
        for statements in migrations.MIGRATIONS[:3]:
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {migrations.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 3")
        db.execute("INSERT INTO sector_location VALUES (1000, 1, 2, 'a', 1, NULL, 0, NULL, NULL)")
        db.execute("INSERT INTO sector_facts VALUES (1000, 1, 2, 'a', 1, 1, NULL)")
    db.close()
    async with open_index(path) as index:
        await index.attach(info("a"), STAT)
        assert await index.sector(sector(1)) == [held("a", 1, facts=PLAIN)]
        await index.tell([held("a", 1, facts=digested(PLAIN, 1))])
    async with open_index(path) as index:
        assert await index.sector(sector(1)) == [held("a", 1, facts=digested(PLAIN, 1))]
