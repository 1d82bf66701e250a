"""Digests of files that were read through, and scans that leave them alone."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sectorfs.errors import Unreachable, Unsupported
from sectorfs.index.protocol import LocationKey
from sectorfs.stores import digest_news
from sectorfs.stores.digest_news import tell_digests
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.types import Facts, FileType, SectorFile
from tests.index_fixtures import digested
from tests.local_fixtures import (
    SwitchedIndex,
    a_path,
    an_index,
    declared,
    make_store,
    put,
    running,
    sector_file,
    until,
)

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)

index = an_index
path = a_path


@asynccontextmanager
async def attached(index: SwitchedIndex, root: Path) -> AsyncIterator[tuple[LocalStore, LocalPath]]:
    store = make_store(index)
    await store.attach(str(root))
    [local] = store.paths()
    yield store, local


async def facts_of(index: SwitchedIndex, local: LocalPath, file: SectorFile = SEALED) -> Facts:
    facts = (await declared(index, local.storage))[file].facts
    assert facts is not None
    return facts


async def test_files_of_all_types_are_told_at_once(
    index: SwitchedIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_news, "BATCH", 2)
    files = [sector_file(FileType.SEALED, number) for number in range(5)]
    for file in files:
        put(path, file)
    put(path, CACHE, {"p_aux": b"1", "t_aux": b"22"})
    async with attached(index, path) as (_, local):
        found = [(file, digested(await facts_of(index, local, file), 1)) for file in files]
        found.insert(2, (CACHE, digested(await facts_of(index, local, CACHE), 2)))
        index.calls.clear()
        assert await tell_digests(index, local, found) == 6
        assert index.calls == ["tell"] * 4
        after = await declared(index, local.storage)
        assert {file: one.facts for file, one in after.items()} == dict(found)
        assert all(one.primary for one in after.values())


@pytest.mark.parametrize("change", ["removed", "replaced", "dropped", "touched"])
async def test_what_is_not_so_any_more_is_not_told(
    index: SwitchedIndex, path: Path, change: str
) -> None:
    target = put(path, SEALED, b"12345")
    async with attached(index, path) as (_, local):
        facts = await facts_of(index, local)
        match change:
            case "removed":
                target.unlink()
            case "replaced":
                put(path, SEALED, b"123")
            case "dropped":
                await index.drop([LocationKey(SEALED, local.storage)])
            case "touched":
                os.utime(target, ns=(5, 5))
        await tell_digests(index, local, [(SEALED, digested(facts, 1))])
        after = await declared(index, local.storage)
        assert [one.facts for one in after.values()] == ([] if change == "dropped" else [facts])


async def test_it_waits_while_a_file_is_being_removed(index: SwitchedIndex, path: Path) -> None:
    target = put(path, SEALED)
    async with attached(index, path) as (_, local), trio.open_nursery() as nursery:
        found = [(SEALED, digested(await facts_of(index, local), 1))]
        async with local.changing:
            nursery.start_soon(tell_digests, index, local, found)
            await index.drop([LocationKey(SEALED, local.storage)])
            await trio.testing.wait_all_tasks_blocked()
            target.unlink()
    assert await declared(index, local.storage) == {}


async def test_an_index_of_an_older_version_is_no_failure(
    index: SwitchedIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(found: object) -> None:
        await trio.lowlevel.checkpoint()
        raise Unsupported("method 'Sectorfs.TellFacts' not found", "index")

    put(path, SEALED)
    async with attached(index, path) as (_, local):
        facts = await facts_of(index, local)
        monkeypatch.setattr(index.index, "tell", refuse)
        assert await tell_digests(index, local, [(SEALED, digested(facts, 1))]) == 0
        assert await facts_of(index, local) == facts


async def test_an_index_that_is_away_is_one(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED)
    async with attached(index, path) as (_, local):
        facts = await facts_of(index, local)
        index.away = True
        with pytest.raises(Unreachable):
            await tell_digests(index, local, [(SEALED, digested(facts, 1))])
        assert not local.changing.locked()


# --- scans ---


@pytest.mark.parametrize("deep", [False, True])
async def test_scans_declare_nothing_of_unchanged_files_with_digests(
    index: SwitchedIndex, path: Path, deep: bool
) -> None:
    put(path, SEALED)
    put(path, CACHE, {"p_aux": b"1"})
    async with attached(index, path) as (store, local):
        found: list[Any] = []
        for number, file in enumerate((SEALED, CACHE), start=1):
            found.append((file, digested(await facts_of(index, local, file), number)))
        assert await tell_digests(index, local, found) == 2
        seq = (await index.snapshot()).seq
        index.calls.clear()
        if deep:
            await store.redeclare()
        async with running(store):
            local.mark_dirty(deep=deep)
            await until(lambda: index.calls.count("declarations") >= 7)
            await until(lambda: not local.dirty and not local.scanning.locked())
        assert "declare" not in index.calls
        assert (await index.snapshot()).seq == seq
        assert {file: await facts_of(index, local, file) for file, _ in found} == dict(found)


async def test_a_file_that_changed_loses_its_digest(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED, b"12345")
    async with attached(index, path) as (store, local):
        before = await facts_of(index, local)
        await tell_digests(index, local, [(SEALED, digested(before, 1))])
        put(path, SEALED, b"123", age=50)
        await store.redeclare()
        after = await facts_of(index, local)
        assert (after.size, after.digest) == (3, b"")
