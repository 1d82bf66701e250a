"""Ways to lose the last copy of a file although every step of a removal succeeds."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from sectorfs.errors import Refused, SectorFSError, StorageUnavailable
from sectorfs.stores.seen import see
from sectorfs.stores.set_aside import Expected, Place, put_back, set_aside
from sectorfs.types import SectorFile
from tests.gates import Gate
from tests.local_fixtures import URL, until
from tests.moving_fixtures import CACHE, MEMBERS, OWNER, SEALED, Rig, content, rig, there
from tests.wire_fixtures import peer, read_request

WHOLE = b"sector" * 10_000


async def link_file(parts: Rig) -> None:
    target = parts.path("two") / str(SEALED)
    target.parent.mkdir()
    target.symlink_to(parts.path("one") / str(SEALED))


async def link_type(parts: Rig) -> None:
    (parts.path("two") / "sealed").symlink_to(parts.path("one") / "sealed")


@pytest.mark.parametrize("alias", [link_file, link_type])
async def test_a_destination_that_is_the_source_under_another_name_takes_nothing(
    tmp_path: Path, alias: Callable[[Rig], Awaitable[None]]
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", SEALED)
        await alias(parts)
        with pytest.raises(Refused):
            await parts.mover.move(SEALED, parts.ids["two"])
        assert source.read_bytes() == WHOLE
        assert (await parts.holders(SEALED))["one"] is True


async def test_a_destination_whose_files_are_links_to_the_source_takes_nothing(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", CACHE)
        target = parts.path("two") / str(CACHE)
        target.mkdir(parents=True)
        for name in MEMBERS:
            (target / name).symlink_to(source / name)
        with pytest.raises(Refused):
            await parts.mover.move(CACHE, parts.ids["two"])
        assert content(source) == MEMBERS


async def test_a_primary_copy_that_is_a_link_to_the_last_file_does_not_count(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", SEALED)
        await link_file(parts)
        await parts.store.redeclare()
        assert await parts.holders(SEALED) == {"one": True, "two": True}
        with pytest.raises(Refused):
            await parts.remover.remove(SEALED, only=[parts.ids["one"]])
        assert source.read_bytes() == WHOLE
        assert await parts.holders(SEALED) == {"one": True, "two": True}
        assert parts.litter() == []
        await parts.remover.remove(SEALED, only=[parts.ids["two"]])
        assert source.read_bytes() == WHOLE


@pytest.mark.parametrize("what", ["gone", "cut short"])
async def test_a_primary_copy_that_is_declared_and_not_whole_does_not_count(
    tmp_path: Path, what: str
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        mine = await parts.put("one", SEALED)
        other = await parts.put("two", SEALED)
        if what == "gone":
            other.unlink()
        else:
            os.truncate(other, 1000)
        with pytest.raises(Refused):
            await parts.remover.remove(SEALED, only=[parts.ids["one"]])
        assert mine.read_bytes() == WHOLE
        assert (await parts.holders(SEALED))["one"] is True


async def test_hidden_files_that_no_peer_was_told_of_stay(tmp_path: Path) -> None:
    """A move between nodes brings what a listing names; the rest has no other copy."""
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("two", CACHE)
        mine = await parts.put("one", CACHE)
        (mine / "notes of the operator").write_text("keep me")
        seen = see(str(mine), CACHE, str(mine))
        facts = seen.facts(CACHE)
        with pytest.raises(Refused, match="notes of the operator"):
            await parts.remover.remove_for(
                CACHE, keep=[parts.ids["two"]], expected=Expected(facts.size, facts.mtime_ns)
            )
        assert (mine / "notes of the operator").read_text() == "keep me"
        assert (await parts.holders(CACHE))["one"] is True


async def test_a_removal_given_up_takes_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk hung, the removal failed, the file was declared again: then the disk goes on."""
    async with rig(tmp_path, "one", "two") as parts:
        mine = await parts.put("one", SEALED)
        await parts.put("two", SEALED)
        gate = Gate(monkeypatch, "rename", lambda source, *a, **k: source == SEALED.sector.name)
        monkeypatch.setattr("sectorfs.stores.removal.SLOW", 0.2)
        with pytest.raises(StorageUnavailable):
            await parts.remover.remove(SEALED, only=[parts.ids["one"]])
        assert await parts.holders(SEALED) == {"one": True, "two": True}
        gate.opened.set()
        await until(gate.passed.is_set)
        await until(lambda: there(mine) and parts.litter() == [])
        assert mine.read_bytes() == WHOLE


async def test_a_scan_declares_nothing_that_was_removed_since_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        mine = await parts.put("one", SEALED)
        await parts.put("two", SEALED)
        path = next(path for path in parts.store.paths() if path.path == str(mine.parents[1]))
        keeper = parts.store._keepers[path.storage]
        path.looked.clear()
        await parts.index.drop([item.key for item in await parts.index.sector(SEALED.sector)][:1])
        await parts.index.drop(
            [d.key for d in await parts.index.sector(SEALED.sector) if d.storage == path.storage]
        )
        look = path.look
        done = False

        async def looking(files: Any, **kwargs: Any) -> Any:
            nonlocal done
            found = await look(files, **kwargs)
            if not done:
                done = True
                await parts.remover.remove(SEALED, only=[path.storage])
            return found

        await parts.store.redeclare(parts.ids["two"])
        monkeypatch.setattr(path, "look", looking)
        await keeper.scan(drop=True, deep=True)
        assert done
        assert not there(mine)
        assert await parts.holders(SEALED) == {"two": True}


async def test_removals_of_a_disk_that_hangs_hold_few_threads(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        (path,) = parts.store.paths()
        assert parts.remover._lane(path) is parts.remover._lane(path)


async def test_a_copy_that_another_node_only_declares_does_not_count(tmp_path: Path) -> None:
    """As after the Index was restored from a backup: what it names has been moved since."""
    async with rig(tmp_path, "one") as parts:
        for file in (SEALED, CACHE):
            mine = await parts.put("one", file)
            await parts.elsewhere(file, primary=True)
            theirs = tmp_path / "of another node" / str(file)
            theirs.rename(tmp_path / "away")
            with pytest.raises(Refused, match="does not have"):
                await parts.remover.remove(file)
            assert there(mine)
            assert (await parts.holders(file))["one"] is True
            (tmp_path / "away").rename(theirs)
            await parts.remover.remove(file)
            assert not there(mine)


async def test_a_node_that_cannot_be_asked_is_no_witness(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", SEALED)
        await parts.elsewhere(SEALED, primary=True, url="http://127.0.0.1:9/remote")
        with pytest.raises(Refused, match=r"127\.0\.0\.1:9"):
            await parts.remover.remove(SEALED)
        assert there(mine)
        await parts.remover.remove(SEALED, force=True)
        assert not there(mine)


async def test_a_storage_that_only_we_serve_and_do_not_have_is_no_witness(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", SEALED)
        await parts.elsewhere(SEALED, primary=True, url=URL)
        with pytest.raises(Refused, match="no other node"):
            await parts.remover.remove(SEALED)
        assert there(mine)


async def test_a_node_without_listings_is_asked_for_the_directory(tmp_path: Path) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        request = await read_request(stream)
        found = b" /remote/cache/s-t01000-7?mincache=true " in request
        kind = b"application/x-tar" if found else b"text/plain"
        status = b"200 OK" if found else b"404 Not Found"
        await stream.send_all(
            b"HTTP/1.1 " + status + b"\r\nContent-Type: " + kind + b"\r\nContent-Length: 0\r\n\r\n"
        )

    async with rig(tmp_path, "one") as parts, peer(answer) as url:
        mine = await parts.put("one", CACHE)
        await parts.elsewhere(CACHE, primary=True, url=url + "/remote")
        await parts.remover.remove(CACHE)
        assert not there(mine)


async def test_a_file_that_came_while_another_was_aside_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The removal is taken back, but the name is taken: nothing is replaced."""
    async with rig(tmp_path, "one", "two") as parts:
        mine = await parts.put("one", SEALED)
        await link_file(parts)
        await parts.store.redeclare()
        before = os.rename

        def rename(source: str, target: str, **kwargs: int) -> None:
            before(source, target, **kwargs)
            if source == SEALED.sector.name:
                mine.write_bytes(b"new")

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(SectorFSError):
            await parts.remover.remove(SEALED, only=[parts.ids["one"]])
        assert mine.read_bytes() == b"new"
        assert [path.read_bytes() for path in parts.litter()] == [WHOLE]


@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_crash_before_the_other_copy_was_seen_again_takes_nothing(
    tmp_path: Path, file: SectorFile
) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", file)
        before = content(mine)
        (path,) = parts.store.paths()
        held = await parts.index.sector(file.sector)
        await parts.index.drop([item.key for item in held])
        place = Place(path.path, path.storage, file, OWNER)
        assert set_aside(place, None) is not None
        assert await parts.remover.clear_leftovers(path) == 1
        assert content(mine) == before
        assert await parts.holders(file) == {"one": True}
        assert parts.litter() == []
        # The same when the removal is begun again before anything was cleared.
        set_aside(place, None)
        with pytest.raises(Refused):
            await parts.remover.remove(file)
        again = set_aside(place, None)
        assert again is not None
        put_back(again)
        assert content(mine) == before


async def test_what_was_set_aside_goes_when_something_newer_has_its_name(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", SEALED)
        (path,) = parts.store.paths()
        set_aside(Place(path.path, path.storage, SEALED, OWNER), None)
        mine.write_bytes(b"newer")
        assert await parts.remover.clear_leftovers(path) == 1
        assert mine.read_bytes() == b"newer"
        assert parts.litter() == []
