"""Moves from and to disks that fail or hang in the middle: a FUSE disk that does so on command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sectorfs.errors import (
    DiskError,
    NoSource,
    SectorFSError,
    SourceFailed,
    StorageUnavailable,
)
from sectorfs.types import FileType, SectorFile
from tests.hung_disk import HungDisk, hung_disk
from tests.local_fixtures import until
from tests.moving_fixtures import CACHE, SEALED, Rig, content, rig, there, two_nodes

pytestmark = pytest.mark.mount

BIG = b"sector" * 500_000
WHOLE: dict[SectorFile, bytes | dict[str, bytes]] = {
    SEALED: BIG,
    CACHE: {"p_aux": b"p" * 64, "sc-02-data-tree-d.dat": BIG, "t_aux": b"t" * 100},
}
MIDDLE = len(BIG) // 2
NAME = "s-t0"
"""In the paths of sector files, and in no other."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[HungDisk]:
    with hung_disk(tmp_path) as found:
        yield found


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on disks is given up after half a second, cleaning up even sooner."""
    monkeypatch.setattr("sectorfs.stores.moving.SLOW", 0.5)
    monkeypatch.setattr("sectorfs.stores.removal.SLOW", 0.5)
    monkeypatch.setattr("sectorfs.stores.incoming.DISCARD_SECONDS", 0.2)


def require_named(exc: SectorFSError, disk: HungDisk) -> None:
    assert exc.thing.startswith(str(disk.path)), f"{exc} names another disk"


# --- disks that say EIO ---


@pytest.mark.parametrize(
    ("operation", "after"),
    [("read", MIDDLE), ("open", 0), ("lookup", 0), ("getattr", 0)],
)
@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_source_that_fails_keeps_its_copy_and_is_named(
    tmp_path: Path, disk: HungDisk, file: SectorFile, operation: str, after: int
) -> None:
    async with rig(tmp_path, "hung", "well") as parts:
        await parts.put("hung", file, WHOLE[file])
        disk.fail(operation, after=after, only=NAME)
        with pytest.raises(DiskError, match="Input/output error") as caught:
            await parts.mover.move(file, parts.ids["well"])
        require_named(caught.value, disk)
        assert content(disk.source / str(file)) == WHOLE[file]
        assert await parts.holders(file) == {"hung": True}
        assert not there(parts.path("well") / str(file))
        assert parts.space.claims(parts.ids["well"]) == ()
        disk.go()
        assert parts.litter() == []
        await parts.mover.move(file, parts.ids["well"])
        assert content(parts.path("well") / str(file)) == WHOLE[file]
        assert await parts.holders(file) == {"well": True}
        assert not there(disk.source / str(file))


@pytest.mark.parametrize(
    ("operation", "after"),
    [
        ("lookup", 0),
        ("create", 0),
        ("write", MIDDLE),
        ("setattr", 0),
        ("fsync", 0),
        ("link", 0),
        ("mkdir", 0),
        ("rename", 0),
        ("unlink", 0),
    ],
)
@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_destination_that_fails_gets_nothing_declared_and_is_named(
    tmp_path: Path, disk: HungDisk, file: SectorFile, operation: str, after: int
) -> None:
    async with rig(tmp_path, "well", "hung") as parts:
        source = await parts.put("well", file, WHOLE[file])
        disk.fail(operation, after=after, only=NAME)
        try:
            await parts.mover.move(file, parts.ids["hung"])
        except DiskError as exc:
            require_named(exc, disk)
            assert content(source) == WHOLE[file]
            assert await parts.holders(file) == {"well": True}
            assert parts.space.claims(parts.ids["hung"]) == ()
        else:
            # A file is put into place by a link, a directory by a rename; neither needs the other.
            assert (operation, file) in (
                ("link", CACHE),
                ("mkdir", SEALED),
                ("rename", SEALED),
            ) or operation == "unlink"
        disk.go()
        await parts.mover.move(file, parts.ids["hung"])
        for path in parts.store.paths():
            await parts.remover.clear_leftovers(path)
        assert content(disk.source / str(file)) == WHOLE[file]
        assert await parts.holders(file) == {"hung": True}
        assert parts.litter() == []


async def test_a_destination_that_fails_after_the_rename_has_a_whole_file(
    tmp_path: Path, disk: HungDisk
) -> None:
    """Not yet surely on the disk, so not declared: the same move goes on from there."""
    async with rig(tmp_path, "well", "hung") as parts:
        source = await parts.put("well", SEALED, BIG)
        disk.fail("fsyncdir", only="sealed")
        with pytest.raises(DiskError):
            await parts.mover.move(SEALED, parts.ids["hung"])
        assert source.read_bytes() == BIG
        assert await parts.holders(SEALED) == {"well": True}
        disk.go()
        moved = await parts.mover.move(SEALED, parts.ids["hung"])
        assert moved.how in ("copied", "was there")
        assert await parts.holders(SEALED) == {"hung": True}


@pytest.mark.parametrize("operation", ["rename", "unlink", "mkdir"])
@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_source_that_does_not_let_go_leaves_two_whole_copies(
    tmp_path: Path, disk: HungDisk, file: SectorFile, operation: str
) -> None:
    async with rig(tmp_path, "hung", "well") as parts:
        await parts.put("hung", file, WHOLE[file])
        disk.fail(operation)
        with pytest.raises(DiskError, match="Input/output error") as caught:
            await parts.mover.move(file, parts.ids["well"])
        require_named(caught.value, disk)
        assert content(parts.path("well") / str(file)) == WHOLE[file]
        held = await parts.holders(file)
        assert held["well"] is True
        assert there(disk.source / str(file)) is ("hung" in held)
        disk.go()
        await parts.mover.move(file, parts.ids["well"])
        for path in parts.store.paths():
            await parts.remover.clear_leftovers(path)
        assert await parts.holders(file) == {"well": True}
        assert not there(disk.source / str(file))
        assert parts.litter() == []


@pytest.mark.parametrize("mode", ["copy", "move"])
async def test_acquiring_from_and_to_disks_that_fail(
    tmp_path: Path, disk: HungDisk, mode: str
) -> None:
    async with two_nodes(tmp_path) as (here, away):
        await here.store.detach(str(here.path("mine")))
        here.ids = {}
        await here.add("hung")
        await away.put("theirs", SEALED, BIG)
        here.ids.update(away.ids)

        async def acquire() -> None:
            async with here.acquirer.acquire(
                SEALED.sector,
                SEALED.file_type,
                0,
                path_type="storage",
                mode=mode,  # type: ignore[arg-type]  # a literal
                sector_size=len(BIG),
            ) as found:
                assert content(Path(found.paths[FileType.SEALED])) == BIG

        disk.fail("write", after=MIDDLE, only=NAME)
        with pytest.raises((DiskError, NoSource), match=str(disk.path)):
            await acquire()
        assert await here.holders(SEALED) == {"theirs": True}
        assert not there(disk.source / str(SEALED))
        disk.go()
        await acquire()
        assert await here.holders(SEALED) == (
            {"hung": True} if mode == "move" else {"hung": False, "theirs": True}
        )
        assert here.litter() == []


async def test_a_source_on_another_node_that_fails(tmp_path: Path, disk: HungDisk) -> None:
    async with two_nodes(tmp_path) as (here, away):
        await away.add("hung")
        await away.put("hung", SEALED, BIG)
        here.ids.update(away.ids)
        disk.fail("read", after=MIDDLE, only=NAME)
        with pytest.raises((NoSource, SourceFailed)):
            await here.mover.move(SEALED, here.ids["mine"])
        assert await here.holders(SEALED) == {"hung": True}
        assert not there(here.path("mine") / str(SEALED))
        assert here.litter() == []
        disk.go()
        await here.mover.move(SEALED, here.ids["mine"])
        assert await here.holders(SEALED) == {"mine": True}


@pytest.mark.parametrize("operation", ["read", "lookup", "getattr", "statfs"])
async def test_a_disk_that_fails_as_a_whole_is_marked_with_the_reason(
    tmp_path: Path, disk: HungDisk, operation: str
) -> None:
    """A bad file is no bad disk; one whose own ``sectorstore.json`` cannot be read is."""
    async with rig(tmp_path, "hung", "well") as parts:
        await parts.put("hung", SEALED, BIG)
        path = next(path for path in parts.store.paths() if path.storage == parts.ids["hung"])
        disk.fail(operation, only=NAME)
        await path.probe()
        assert path.available
        disk.go()
        disk.fail(operation)
        await path.probe()
        assert not path.available
        assert "Input/output error" in path.error
        with pytest.raises(StorageUnavailable, match="Input/output error"):
            await parts.mover.move(SEALED, parts.ids["well"])
        assert await parts.holders(SEALED) == {"hung": True}
        disk.go()
        await path.probe()
        assert path.available
        await parts.mover.move(SEALED, parts.ids["well"])


# --- disks that hang ---


async def settle(parts: Rig, disk: HungDisk) -> None:
    """The disk goes on, and so do all threads that hung in it."""
    disk.go()
    lanes = [*parts.mover._lanes.values(), *parts.remover._lanes.values()]
    lanes += [path.lane for path in parts.store.paths()]
    await until(lambda: not any(lane.busy for lane in lanes))
    for lane in lanes:
        await until(lambda lane=lane: not lane.pulse.check())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("operation", ["create", "write", "setattr", "fsync", "link", "rename"])
@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_destination_that_hangs_ends_the_move_and_shows_nothing_later(
    tmp_path: Path, disk: HungDisk, file: SectorFile, operation: str
) -> None:
    if (operation, file) in (("link", CACHE), ("rename", SEALED)):
        pytest.skip("a file is put into place by a link, a directory by a rename")
    async with rig(tmp_path, "well", "hung") as parts:
        source = await parts.put("well", file, WHOLE[file])
        disk.hang(operation)
        with trio.fail_after(10), pytest.raises(StorageUnavailable) as caught:
            await parts.mover.move(file, parts.ids["hung"])
        require_named(caught.value, disk)
        assert content(source) == WHOLE[file]
        assert await parts.holders(file) == {"well": True}
        assert parts.mover.moves() == []
        assert parts.space.claims(parts.ids["hung"]) == ()
        assert not there(disk.source / str(file))
        await settle(parts, disk)
        late = disk.source / str(file)
        # What the kernel was doing it has done: that is whole. Nothing else was.
        assert there(late) is (operation in ("link", "rename"))
        assert not there(late) or content(late) == WHOLE[file]
        assert await parts.holders(file) == {"well": True}
        await parts.mover.move(file, parts.ids["hung"])
        assert content(late) == WHOLE[file]
        assert await parts.holders(file) == {"hung": True}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("operation", ["write", "fsync", "create"])
@pytest.mark.parametrize("file", [SEALED, CACHE])
async def test_a_destination_that_hangs_during_a_fetch_ends_it(
    tmp_path: Path, disk: HungDisk, file: SectorFile, operation: str
) -> None:
    async with two_nodes(tmp_path) as (here, away):
        await here.add("hung")
        source = await away.put("theirs", file, WHOLE[file])
        here.ids.update(away.ids)
        disk.hang(operation)
        with trio.fail_after(10), pytest.raises(StorageUnavailable) as caught:
            await here.mover.move(file, here.ids["hung"])
        require_named(caught.value, disk)
        assert content(source) == WHOLE[file]
        assert await here.holders(file) == {"theirs": True}
        # The file is nobody's: another destination takes it at once.
        await here.mover.move(file, here.ids["mine"])
        assert await here.holders(file) == {"mine": True}
        await settle(here, disk)
        assert not there(disk.source / str(file))
        await here.mover.move(file, here.ids["hung"])
        assert content(disk.source / str(file)) == WHOLE[file]
        assert await here.holders(file) == {"hung": True}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("operation", ["read", "open", "getattr"])
async def test_a_source_that_hangs_ends_the_move_and_is_named(
    tmp_path: Path, disk: HungDisk, operation: str
) -> None:
    async with rig(tmp_path, "hung", "well") as parts:
        await parts.put("hung", SEALED, BIG)
        disk.hang(operation)
        with trio.fail_after(10), pytest.raises(StorageUnavailable) as caught:
            await parts.mover.move(SEALED, parts.ids["well"])
        require_named(caught.value, disk)
        assert await parts.holders(SEALED) == {"hung": True}
        await settle(parts, disk)
        assert not there(parts.path("well") / str(SEALED))
        await parts.mover.move(SEALED, parts.ids["well"])
        assert await parts.holders(SEALED) == {"well": True}
