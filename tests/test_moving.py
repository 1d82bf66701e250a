"""Moves between the paths of one node: order, holes, times, and every disk that says no."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import trio

from sectorfs.errors import (
    DiskError,
    DiskFull,
    NotFound,
    PermissionRefused,
    Refused,
    SectorFSError,
    Stale,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.stores.incoming import Incoming
from sectorfs.types import StorageID
from tests.cluster import digest
from tests.cluster_fixtures import OLD_NS, put_sparse
from tests.moving_fixtures import (
    CACHE,
    MEMBERS,
    OWNER,
    SEALED,
    blocks,
    clone,
    content,
    file_system,
    one_file,
    rig,
    there,
)


@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_move_within_a_file_system_links(tmp_path: Path, file: object) -> None:
    chosen = CACHE if file == CACHE else SEALED
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", chosen)
        before, inode = content(source), source.stat().st_ino
        mtime_ns = source.stat().st_mtime_ns
        moved = await parts.mover.move(chosen, parts.ids["two"])
        target = parts.path("two") / str(chosen)
        assert (moved.how, moved.source, moved.to) == ("linked", parts.ids["one"], parts.ids["two"])
        assert content(target) == before
        assert target.stat().st_mtime_ns == mtime_ns
        assert (target.stat().st_ino == inode) is (chosen == SEALED)
        assert not there(source)
        assert await parts.holders(chosen) == {"two": True}
        assert parts.litter() == []


@pytest.mark.mount
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
async def test_a_move_to_another_file_system_copies(tmp_path: Path, kind: str) -> None:
    with file_system(tmp_path, "two", kind=kind):
        async with rig(tmp_path, "one", "two") as parts:
            for file in (SEALED, CACHE):
                source = await parts.put("one", file)
                before, mtime_ns = content(source), source.stat().st_mtime_ns
                times = _times(source)
                moved = await parts.mover.move(file, parts.ids["two"])
                target = parts.path("two") / str(file)
                assert moved.how == "copied"
                assert content(target) == before
                assert (target.stat().st_mtime_ns, _times(target)) == (mtime_ns, times)
                assert not there(source)
                assert await parts.holders(file) == {"two": True}
            assert parts.litter() == []


def _times(path: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_mtime_ns for entry in path.glob("*")}


@pytest.mark.mount
async def test_holes_stay_holes(tmp_path: Path) -> None:
    with file_system(tmp_path, "two", kind="ext4"):
        async with rig(tmp_path, "one", "two") as parts:
            source = parts.path("one") / str(SEALED)
            put_sparse(source, 256 << 20, b"the end")
            with source.open("r+b") as stream:
                stream.seek(100 << 20)
                stream.write(b"middle" * 1000)
            os.utime(source, ns=(OLD_NS, OLD_NS))
            with source.open("r+b") as stream:
                stream.truncate(257 << 20)  # ends in a hole
            os.utime(source, ns=(OLD_NS, OLD_NS))
            assert blocks(source) < 1 << 20
            await parts.store.redeclare()
            before = digest(source)
            # The claim is for all of the size: the file system has less than that.
            with pytest.raises(DiskFull):
                await parts.mover.move(SEALED, parts.ids["two"])
            assert source.exists()
    with file_system(tmp_path, "three", size="400M", kind="ext4"):
        (tmp_path / "again").mkdir()
        async with rig(tmp_path / "again") as parts:
            parts.root = tmp_path  # where the disk is
            parts.ids["one"] = (await parts.store.attach(str(tmp_path / "one"))).storage
            await parts.add("three")
            await parts.mover.move(SEALED, parts.ids["three"])
            target = parts.path("three") / str(SEALED)
            assert blocks(target) < 1 << 20
            assert target.stat().st_size == 257 << 20
            after = digest(target)
            assert after == before


async def test_a_move_that_was_done_is_done_again_without_harm(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("one", SEALED)
        await parts.mover.move(SEALED, parts.ids["two"])
        again = await parts.mover.move(SEALED, parts.ids["two"])
        assert (again.how, again.source) == ("was there", None)
        named = await parts.mover.move(SEALED, parts.ids["two"], source=parts.ids["one"])
        assert named.source is None
        assert await parts.holders(SEALED) == {"two": True}


async def test_a_move_goes_on_where_an_earlier_one_ended(tmp_path: Path) -> None:
    """After the rename, before the declaration; with half a file of an attempt before that."""
    async with rig(tmp_path, "one", "two") as parts:
        for file in (SEALED, CACHE):
            source = await parts.put("one", file)
            target = parts.path("two") / str(file)
            target.parent.mkdir(exist_ok=True)
            clone(source, target)
            fetching = target.parent / "fetching"
            fetching.mkdir()
            (fetching / f"{file.sector.name}.{OWNER}.in.tmp").write_bytes(b"half")
            moved = await parts.mover.move(file, parts.ids["two"])
            assert moved.how == "was there"
            assert await parts.holders(file) == {"two": True}
            assert not source.exists()


async def test_an_unfinished_attempt_is_no_obstacle(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        for file in (SEALED, CACHE):
            await parts.put("one", file)
            fetching = parts.path("two") / file.file_type.dir_name / "fetching"
            fetching.mkdir(parents=True)
            name = fetching / f"{file.sector.name}.{OWNER}.in.tmp"
            if file == CACHE:
                name.mkdir()
                (name / "p_aux").write_bytes(b"half")
            else:
                name.write_bytes(b"half")
            await parts.mover.move(file, parts.ids["two"])
            assert await parts.holders(file) == {"two": True}
        assert parts.litter() == []


async def test_what_else_lies_at_the_destination_stays(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", SEALED)
        other = parts.path("two") / str(SEALED)
        other.parent.mkdir()
        other.write_bytes(b"something else")
        with pytest.raises(Refused, match="something else"):
            await parts.mover.move(SEALED, parts.ids["two"])
        assert other.read_bytes() == b"something else"
        assert source.exists()
        assert await parts.holders(SEALED) == {"one": True}


async def test_something_that_comes_to_the_destination_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", SEALED)
        target = parts.path("two") / str(SEALED)
        commit = Incoming.commit

        async def late(self: Incoming, mtime_ns: int) -> object:
            target.write_bytes(b"came meanwhile")
            return await commit(self, mtime_ns)

        monkeypatch.setattr(Incoming, "commit", late)
        with pytest.raises(Refused, match="meanwhile"):
            await parts.mover.move(SEALED, parts.ids["two"])
        assert target.read_bytes() == b"came meanwhile"
        assert source.exists()
        assert parts.litter() == []


# --- disks that say no ---


@pytest.mark.mount
async def test_a_destination_that_fills_up_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file_system(tmp_path, "two", size="8M") as disk:
        async with rig(tmp_path, "one", "two") as parts:
            files = {"a": b"a" * (1 << 20), "b": b"b" * (4 << 20)}
            source = await parts.put("one", CACHE, files)
            create = Incoming.create

            async def filling(self: Incoming, name: str) -> object:
                if name == "b":
                    (disk / "others").write_bytes(b"x" * (5 << 20))
                return await create(self, name)

            monkeypatch.setattr(Incoming, "create", filling)
            with pytest.raises(DiskFull):
                await parts.mover.move(CACHE, parts.ids["two"])
            assert content(source) == files
            assert await parts.holders(CACHE) == {"one": True}
            assert parts.litter() == []
            assert parts.space.claims(parts.ids["two"]) == ()
            (disk / "others").unlink()
            monkeypatch.undo()
            assert (await parts.mover.move(CACHE, parts.ids["two"])).how == "copied"


@pytest.mark.mount
async def test_a_destination_that_becomes_read_only_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with file_system(tmp_path, "two", kind="ext4") as disk:
        async with rig(tmp_path, "one", "two") as parts:
            source = await parts.put("one", CACHE)
            create = Incoming.create

            async def freezing(self: Incoming, name: str) -> object:
                if name == "t_aux":
                    await trio.to_thread.run_sync(_remount, disk, "ro")
                return await create(self, name)

            monkeypatch.setattr(Incoming, "create", freezing)
            with pytest.raises(PermissionRefused):
                await parts.mover.move(CACHE, parts.ids["two"])
            assert content(source) == MEMBERS
            assert await parts.holders(CACHE) == {"one": True}
            monkeypatch.undo()
            await trio.to_thread.run_sync(_remount, disk, "rw")
            await parts.mover.move(CACHE, parts.ids["two"])
            assert await parts.holders(CACHE) == {"two": True}
            assert parts.litter() == []


def _remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


@pytest.mark.mount
async def test_a_source_that_becomes_read_only_keeps_its_copy_and_declaration(
    tmp_path: Path,
) -> None:
    with file_system(tmp_path, "one") as disk:
        async with rig(tmp_path, "one", "two") as parts:
            source = await parts.put("one", SEALED)
            await trio.to_thread.run_sync(_remount, disk, "ro")
            with pytest.raises(PermissionRefused):
                await parts.mover.move(SEALED, parts.ids["two"])
            assert source.exists()
            assert await parts.holders(SEALED) == {"one": True, "two": True}
            await trio.to_thread.run_sync(_remount, disk, "rw")
            await parts.mover.move(SEALED, parts.ids["two"], source=parts.ids["one"])
            assert await parts.holders(SEALED) == {"two": True}
            assert not source.exists()


async def test_a_path_that_is_gone_is_neither_source_nor_destination(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("one", SEALED)
        (tmp_path / "two" / "sectorstore.json").rename(tmp_path / "away")
        with pytest.raises(StorageUnavailable):
            await parts.mover.move(SEALED, parts.ids["two"])
        assert not (tmp_path / "two" / "sealed").exists()
        (tmp_path / "away").rename(tmp_path / "two" / "sectorstore.json")
        for path in parts.store.paths():
            if path.path.endswith("one"):
                path.fail(StorageUnavailable("silent", path.path))
        with pytest.raises(StorageUnavailable):
            await parts.mover.move(SEALED, parts.ids["two"])


@pytest.mark.mount
@pytest.mark.parametrize(("call", "named"), [("pread", "one"), ("pwrite", "two")])
async def test_a_disk_that_fails_is_named_and_the_source_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, named: str
) -> None:
    def failing(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with file_system(tmp_path, "two"):
        async with rig(tmp_path, "one", "two") as parts:
            source = await parts.put("one", SEALED)
            monkeypatch.setattr(os, "copy_file_range", failing)
            monkeypatch.setattr(os, call, failing)
            with pytest.raises(DiskError, match="Input/output error") as caught:
                await parts.mover.move(SEALED, parts.ids["two"])
            monkeypatch.undo()
            assert caught.value.thing.startswith(str(parts.path(named)))
            assert source.exists()
            assert await parts.holders(SEALED) == {"one": True}
            assert parts.litter() == []


# --- sources that change ---


async def test_a_source_replaced_during_its_move_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", SEALED)
        link = Incoming.link

        async def replacing(self: Incoming, name: str, seen: object) -> bool:
            done = await link(self, name, seen)  # type: ignore[arg-type]  # passed through
            source.unlink()
            source.write_bytes(b"new content")
            return done

        monkeypatch.setattr(Incoming, "link", replacing)
        with pytest.raises(Stale):
            await parts.mover.move(SEALED, parts.ids["two"])
        assert source.read_bytes() == b"new content"
        assert not (parts.path("two") / str(SEALED)).exists()
        assert parts.litter() == []


async def test_a_source_replaced_just_before_its_removal_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        for file in (SEALED, CACHE):
            source = await parts.put("one", file)
            drop = parts.index.index.drop

            async def dropping(keys: object, source: Path = source, drop: object = drop) -> None:
                await drop(keys)  # type: ignore[operator]  # the method
                changed = one_file(source)
                changed.unlink()
                changed.write_bytes(b"new content")

            monkeypatch.setattr(parts.index.index, "drop", dropping)
            with pytest.raises(Stale):
                await parts.mover.move(file, parts.ids["two"])
            monkeypatch.undo()
            changed = one_file(source)
            assert changed.read_bytes() == b"new content"
            assert await parts.holders(file) == {"one": True, "two": True}
        assert parts.litter() == []


# --- who may be moved where ---


async def test_moves_that_make_no_sense(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two", "three") as parts:
        one, two, three = (parts.ids[name] for name in ("one", "two", "three"))
        with pytest.raises(NotFound, match="no storage declares"):
            await parts.mover.move(SEALED, two)
        await parts.put("one", SEALED)
        with pytest.raises(NotFound, match="not a storage path"):
            await parts.mover.move(SEALED, StorageID("unknown"))
        with pytest.raises(NotFound, match="not on storage"):
            await parts.mover.move(SEALED, two, source=three)
        with pytest.raises(Refused, match="where it is"):
            await parts.mover.move(SEALED, one, source=one)
        await parts.put("two", SEALED)
        with pytest.raises(Refused, match="--from"):
            await parts.mover.move(SEALED, three)
        assert await parts.holders(SEALED) == {"one": True, "two": True}
        assert parts.mover.moves() == []


async def test_filters_of_the_destination_hold(tmp_path: Path) -> None:
    async with rig(tmp_path, "one") as parts:
        await parts.put("one", SEALED)
        await parts.add("sealing", can_seal=True, can_store=False)
        await parts.add("types", deny_types=["sealed"])
        await parts.add("miners", allow_miners=["t02000"])
        for name in ("sealing", "types", "miners"):
            with pytest.raises(Refused, match="may not be placed"):
                await parts.mover.move(SEALED, parts.ids[name])


async def test_a_copy_at_the_destination_becomes_primary(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("two", SEALED, primary=False)
        moved = await parts.mover.move(SEALED, parts.ids["two"])
        assert (moved.how, moved.source) == ("was there", None)
        assert await parts.holders(SEALED) == {"two": True}


async def test_a_declared_file_that_is_not_there(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", SEALED)
        source.unlink()
        with pytest.raises(NotFound, match="not there"):
            await parts.mover.move(SEALED, parts.ids["two"])
        with pytest.raises(NotFound, match="not there"):
            await parts.mover.move(SEALED, parts.ids["one"])


async def test_a_directory_with_directories_is_not_moved_by_halves(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", CACHE)
        (source / "inner").mkdir()
        with pytest.raises(Refused, match="inner"):
            await parts.mover.move(CACHE, parts.ids["two"])
        assert source.exists()


async def test_a_link_is_moved_as_the_file_it_names(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        real = tmp_path / "elsewhere"
        real.write_bytes(b"far away")
        source = parts.path("one") / str(SEALED)
        source.parent.mkdir()
        source.symlink_to(real)
        await parts.store.redeclare()
        await parts.mover.move(SEALED, parts.ids["two"])
        target = parts.path("two") / str(SEALED)
        assert target.read_bytes() == b"far away"
        assert not target.is_symlink()
        assert not there(source)
        assert real.read_bytes() == b"far away"


async def test_a_link_out_of_the_destination_is_not_followed(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        await parts.put("one", SEALED)
        (tmp_path / "outside").mkdir()
        (parts.path("two") / "sealed").symlink_to(tmp_path / "outside")
        with pytest.raises(Refused, match="leads out"):
            await parts.mover.move(SEALED, parts.ids["two"])
        assert list((tmp_path / "outside").iterdir()) == []


# --- an Index that is away, and moves that are cancelled ---


@pytest.mark.parametrize("call", ["sector", "declare", "drop"])
async def test_an_index_that_fails_leaves_a_whole_declared_file(tmp_path: Path, call: str) -> None:
    async with rig(tmp_path, "one", "two") as parts:
        source = await parts.put("one", SEALED)
        parts.index.away_for = {call}
        with pytest.raises(Unreachable):
            await parts.mover.move(SEALED, parts.ids["two"])
        parts.index.away_for = set()
        assert source.exists()
        assert (await parts.holders(SEALED))["one"] is True
        await parts.mover.move(SEALED, parts.ids["two"])
        assert await parts.holders(SEALED) == {"two": True}
        assert not source.exists()
        assert parts.litter() == []


@pytest.mark.mount
async def test_a_move_cancelled_at_every_checkpoint_loses_nothing(tmp_path: Path) -> None:
    """Cancelled at the first, second, … checkpoint until the move gets through."""
    with file_system(tmp_path, "two"):
        async with rig(tmp_path, "one", "two") as parts:
            await parts.put("one", CACHE)
            for steps in range(1, 400):
                done = await _cancelled_after(steps, parts.mover.move, CACHE, parts.ids["two"])
                held = await parts.holders(CACHE)
                assert held
                for name in held:
                    assert content(parts.path(name) / str(CACHE)) == MEMBERS
                assert parts.mover.moves() == []
                assert parts.space.claims(parts.ids["two"]) == ()
                if done:
                    break
            assert await parts.holders(CACHE) == {"two": True}
            assert steps > 20


async def _cancelled_after(steps: int, work: object, *arguments: object) -> bool:
    """Run `work`, cancelled once its task was scheduled `steps` times; True if it ended first."""

    class Count(trio.abc.Instrument):
        left = steps
        task: trio.lowlevel.Task | None = None

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task is self.task:
                self.left -= 1
                if self.left <= 0:
                    scope.cancel()

    count = Count()
    done = False

    async def run() -> None:
        nonlocal done
        count.task = trio.lowlevel.current_task()
        with scope:
            await work(*arguments)  # type: ignore[operator]  # any async function
            done = True

    scope = trio.CancelScope()
    trio.lowlevel.add_instrument(count)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
    finally:
        trio.lowlevel.remove_instrument(count)
    return done


async def test_two_moves_of_one_file_go_one_after_the_other(tmp_path: Path) -> None:
    async with rig(tmp_path, "one", "two", "three") as parts:
        await parts.put("one", SEALED)
        outcomes: list[object] = []

        async def move(name: str) -> None:
            try:
                outcomes.append(await parts.mover.move(SEALED, parts.ids[name]))
            except SectorFSError as exc:
                outcomes.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(move, "two")
            nursery.start_soon(move, "three")
        held = await parts.holders(SEALED)
        assert len(held) == 1
        assert content(parts.path(next(iter(held))) / str(SEALED)) == b"sector" * 10_000
        assert len(outcomes) == 2
