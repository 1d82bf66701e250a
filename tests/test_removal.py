"""What may be removed, what stays, and what is left when the removal is broken off."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import trio

from sectorfs.errors import (
    DiskError,
    NotFound,
    PermissionRefused,
    Refused,
    Stale,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.stores import removal
from sectorfs.stores.set_aside import Expected
from tests.local_fixtures import put
from tests.moving_fixtures import (
    CACHE,
    MEMBERS,
    OWNER,
    SEALED,
    content,
    file_system,
    rig,
    there,
)


@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_copy_goes_and_the_primary_stays(tmp_path: Path, file: object) -> None:
    chosen = CACHE if file == CACHE else SEALED
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("one", chosen)
        copy = await parts.put("two", chosen, primary=False)
        removed = await parts.remover.remove(chosen, only=[parts.ids["two"]])
        assert removed == [parts.ids["two"]]
        assert not there(copy)
        assert await parts.holders(chosen) == {"one": True}
        assert parts.litter() == []


async def test_the_last_primary_copy_stays_without_force(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        primary = await parts.put("one", SEALED)
        copy = await parts.put("two", SEALED, primary=False)
        for only in ([parts.ids["one"]], None):
            with pytest.raises(Refused, match="--force"):
                await parts.remover.remove(SEALED, only=only)
        assert there(primary)
        assert there(copy)
        assert await parts.remover.remove(SEALED, force=True) == [
            parts.ids["one"],
            parts.ids["two"],
        ]
        assert not there(primary)
        assert not there(copy)
        assert await parts.holders(SEALED) == {}


async def test_one_of_two_primary_copies_may_go(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("one", SEALED)
        await parts.put("two", SEALED)
        await parts.remover.remove_for(SEALED, keep=[parts.ids["two"]])
        assert await parts.holders(SEALED) == {"two": True}
        with pytest.raises(Refused):
            await parts.remover.remove(SEALED)


@pytest.mark.parametrize(("primary", "healthy"), [(False, True), (True, False)])
async def test_only_a_healthy_primary_elsewhere_counts(
    tmp_path: Path, primary: bool, healthy: bool
) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", SEALED)
        await parts.elsewhere(SEALED, primary=primary, healthy=healthy)
        with pytest.raises(Refused):
            await parts.remover.remove(SEALED)
        assert there(mine)
        await parts.elsewhere(SEALED, primary=True, healthy=True)
        await parts.remover.remove(SEALED)
        assert not there(mine)


async def test_two_nodes_that_trust_in_each_others_copy_do_not_both_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node's drop falls between our first look and our own drop."""
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", SEALED)
        await parts.elsewhere(SEALED, primary=True)
        drop = parts.index.index.drop

        async def dropping(keys: list[object]) -> None:
            others = await parts.index.index.sector(SEALED.sector)
            await drop([item.key for item in others])

        monkeypatch.setattr(parts.index.index, "drop", dropping)
        with pytest.raises(Refused):
            await parts.remover.remove(SEALED)
        assert there(mine)
        assert await parts.holders(SEALED) == {"one": True}


async def test_copies_go_and_every_primary_stays(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two", "three") as parts:
        await parts.put("one", SEALED)
        await parts.put("two", SEALED)
        copy = await parts.put("three", SEALED, primary=False)
        assert await parts.remover.remove_copies(SEALED) == [parts.ids["three"]]
        assert not there(copy)
        assert await parts.holders(SEALED) == {"one": True, "two": True}
        assert await parts.remover.remove_copies(SEALED) == []


async def test_without_a_primary_no_copy_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("one", SEALED, primary=False)
        await parts.put("two", SEALED, primary=False)
        assert await parts.remover.remove_copies(SEALED) == []
        assert "no primary copy" in caplog.text
        assert await parts.holders(SEALED) == {"one": False, "two": False}


async def test_what_is_kept_stays_and_what_is_not_here_is_said(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        with pytest.raises(NotFound):
            await parts.remover.remove(SEALED, force=True)
        await parts.elsewhere(SEALED, primary=True)
        with pytest.raises(NotFound):
            await parts.remover.remove(SEALED)
        mine = await parts.put("one", SEALED)
        assert await parts.remover.remove_for(SEALED, keep=[parts.ids["one"]]) == []
        assert there(mine)


async def test_a_file_that_is_not_declared_is_removed_too(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = put(parts.path("one"), SEALED)
        await parts.elsewhere(SEALED, primary=True)
        await parts.remover.remove(SEALED)
        assert not there(mine)


async def test_a_declaration_without_its_file_is_dropped(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", CACHE)
        subprocess_rm(mine)
        await parts.elsewhere(CACHE, primary=True)
        await parts.remover.remove(CACHE)
        assert await parts.holders(CACHE) == {}


def subprocess_rm(path: Path) -> None:
    subprocess.run(["rm", "-r", path], check=True)


async def test_only_what_was_meant_goes(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", SEALED)
        await parts.elsewhere(SEALED, primary=True)
        found = mine.stat()
        for expected in (
            Expected(found.st_size + 1, found.st_mtime_ns),
            Expected(found.st_size, found.st_mtime_ns + 1),
        ):
            with pytest.raises(Stale):
                await parts.remover.remove_for(SEALED, expected=expected)
        assert await parts.holders(SEALED) == {"one": True}
        await parts.remover.remove_for(SEALED, expected=Expected(found.st_size, found.st_mtime_ns))
        assert not there(mine)


# --- never outside the path ---


async def test_a_link_goes_and_what_it_names_stays(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "p_aux").write_bytes(b"precious")
        (tmp_path / "file").write_bytes(b"precious")
        for file, target in ((CACHE, "outside"), (SEALED, "file")):
            name = parts.path("one") / str(file)
            name.parent.mkdir()
            name.symlink_to(tmp_path / target)
            await parts.elsewhere(file, primary=True)
            await parts.remover.remove(file)
            assert not there(name)
        assert (tmp_path / "outside" / "p_aux").read_bytes() == b"precious"
        assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize("linked", ["cache", "cache/fetching"])
async def test_a_linked_directory_is_not_followed(tmp_path: Path, linked: str) -> None:
    async with rig(tmp_path, "one") as parts:
        outside = tmp_path / "outside"
        (outside / CACHE.sector.name).mkdir(parents=True)
        (outside / CACHE.sector.name / "p_aux").write_bytes(b"precious")
        if linked == "cache":
            (parts.path("one") / "cache").symlink_to(outside)
        else:
            await parts.put("one", CACHE)
            (parts.path("one") / "cache" / "fetching").symlink_to(outside)
        await parts.elsewhere(CACHE, primary=True)
        with pytest.raises(Refused, match="leads out"):
            await parts.remover.remove(CACHE)
        assert (outside / CACHE.sector.name / "p_aux").read_bytes() == b"precious"
        assert (await parts.store.listing(CACHE)).members
        for path in parts.store.paths():
            assert await parts.remover.clear_leftovers(path) == 0


async def test_links_inside_a_directory_are_not_followed(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", CACHE)
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "file").write_bytes(b"precious")
        (mine / "link").symlink_to(tmp_path / "outside")
        await parts.remover.remove(CACHE, force=True)
        assert not there(mine)
        assert (tmp_path / "outside" / "file").read_bytes() == b"precious"


# --- disks and Indexes that fail ---


@pytest.mark.mount
async def test_a_read_only_path_keeps_file_and_declaration(tmp_path: Path) -> None:
    with file_system(tmp_path, "one") as disk:
        async with rig(tmp_path, "one") as parts:
            mine = await parts.put("one", CACHE)
            await trio.to_thread.run_sync(remount, disk, "ro")
            with pytest.raises(PermissionRefused):
                await parts.remover.remove(CACHE, force=True)
            assert content(mine) == MEMBERS
            assert await parts.holders(CACHE) == {"one": True}


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


async def test_a_full_disk_is_emptied_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the directory to set things aside in."""
    async with rig(tmp_path, "one") as parts:
        mkdir = os.mkdir

        def full(name: object, *args: object, **kwargs: object) -> None:
            if name == "fetching":
                raise OSError(28, "No space left on device")
            mkdir(name, *args, **kwargs)  # type: ignore[arg-type]  # passed through

        for file in (SEALED, CACHE):
            mine = await parts.put("one", file)
            monkeypatch.setattr(os, "mkdir", full)
            await parts.remover.remove(file, force=True)
            monkeypatch.undo()
            assert not there(mine)
        assert parts.litter() == []


async def test_a_path_that_is_gone_keeps_its_declarations(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        await parts.put("one", SEALED)
        (parts.path("one") / "sectorstore.json").unlink()
        with pytest.raises(StorageUnavailable):
            await parts.remover.remove(SEALED, force=True)
        assert await parts.holders(SEALED) == {"one": True}
        for path in parts.store.paths():
            path.fail(StorageUnavailable("silent", path.path))
        with pytest.raises(StorageUnavailable):
            await parts.remover.remove(SEALED, force=True)


@pytest.mark.parametrize("call", ["sector", "drop", "storages"])
async def test_without_the_index_nothing_goes(tmp_path: Path, call: str) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        mine = await parts.put("one", SEALED)
        await parts.put("two", SEALED)
        parts.index.away_for = {call}
        with pytest.raises(Unreachable):
            await parts.remover.remove(SEALED, only=[parts.ids["one"]])
        parts.index.away_for = set()
        assert there(mine)
        assert await parts.holders(SEALED) == {"one": True, "two": True}


async def test_a_disk_that_fails_to_delete_says_so_and_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path, "one") as parts:
        mine = await parts.put("one", CACHE)

        def failing(*args: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(removal, "delete_aside", failing)
        with pytest.raises(DiskError):
            await parts.remover.remove(CACHE, force=True)
        monkeypatch.undo()
        assert not there(mine)
        assert len(parts.litter()) == 1 + len(MEMBERS)
        (path,) = parts.store.paths()
        assert await parts.remover.clear_leftovers(path) == 1
        assert parts.litter() == []


# --- leftovers ---


async def test_only_leftovers_of_this_node_are_cleared(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        fetching = parts.path("one") / "cache" / "fetching"
        fetching.mkdir(parents=True)
        name = CACHE.sector.name
        for ours in (f"{name}.{OWNER}.in.tmp", f"{name}.{OWNER}.gone.tmp"):
            (fetching / ours).mkdir()
            (fetching / ours / "p_aux").write_bytes(b"half")
        others = [
            name,
            f"{name}.another-node.in.tmp",
            f"{name}.tmp",
            f"s-t01000-x.{OWNER}.in.tmp",
            f"s-t0{10**18 * 9 + 10**18}-1.{OWNER}.in.tmp",
            f"{name}.{OWNER}.in",
        ]
        for other in others:
            (fetching / other).write_bytes(b"theirs")
        (path,) = parts.store.paths()
        assert await parts.remover.clear_leftovers(path) == 2
        assert sorted(entry.name for entry in fetching.iterdir()) == sorted(others)


@pytest.mark.mount
async def test_leftovers_on_a_read_only_disk_keep_nobody_from_using_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with file_system(tmp_path, "one") as disk:
        async with rig(tmp_path, "one") as parts:
            fetching = parts.path("one") / "sealed" / "fetching"
            fetching.mkdir(parents=True)
            (fetching / f"{SEALED.sector.name}.{OWNER}.in.tmp").write_bytes(b"half")
            await trio.to_thread.run_sync(remount, disk, "ro")
            (path,) = parts.store.paths()
            assert await parts.remover.clear_leftovers(path) == 0
            assert "stay" in caplog.text


async def test_attaching_clears_leftovers(tmp_path: Path) -> None:
    cleared: list[str] = []

    async with (
        rig(tmp_path, on_attach=lambda path: _clear(parts.remover, path, cleared)) as parts,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(parts.store.run)
        await parts.add("one")
        with trio.fail_after(10):
            while not cleared:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert cleared == [str(tmp_path / "one")]


async def _clear(remover: removal.Remover, path: object, cleared: list[str]) -> None:
    await remover.clear_leftovers(path)  # type: ignore[arg-type]  # a LocalPath
    cleared.append(path.path)  # type: ignore[attr-defined]  # a LocalPath
