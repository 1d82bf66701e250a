"""What an earlier run left in the cache path: kept while somebody has that content, else not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from sectorfs.errors import DiskFull
from sectorfs.stores import copies as copies_module
from sectorfs.stores import metadata, unfinished
from sectorfs.stores.blocks import PIECE, Identity, PartialFile
from sectorfs.stores.copies import Copies
from sectorfs.stores.lanes import Lane
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID

MTIME_NS = 1_600_000_000_123_456_789
SIZE = 5 * PIECE
SEALED = SectorFile(FileType.SEALED, SectorID(1000, 7))
CACHE = SectorFile(FileType.CACHE, SectorID(1000, 7))
FACTS = Facts(SIZE, MTIME_NS)
IDENTITY = Identity(SIZE, MTIME_NS)
DIRECTORY = Facts(
    SIZE + 3, MTIME_NS, (MemberFacts("p_aux", 3, MTIME_NS), MemberFacts("t", SIZE, MTIME_NS))
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    metadata.init_cache_path(str(tmp_path))
    return tmp_path


def begun(root: Path) -> Copies:
    """A cache path as the next run finds it."""
    storage = metadata.read_metadata(str(root)).info.storage
    return Copies(root, storage, Lane(str(root), deadline=5))


async def some(file: PartialFile, *pieces: int) -> None:
    await file.write([(number * PIECE, bytes([number]) * PIECE) for number in pieces])
    await file.sync()


def names(root: Path) -> list[str]:
    return sorted(
        str(path.relative_to(root)) for path in root.glob("*/fetching/**/*") if path.is_file()
    )


async def test_a_partial_file_outlives_a_restart_and_is_gone_on_with(root: Path) -> None:
    before = begun(root)
    kept = await before.partial(SEALED, None, IDENTITY)
    await some(kept, 1, 3)
    kept.close()
    copies = begun(root)
    assert await copies.clear_leftovers() == 0
    assert copies.has_partial(SEALED, None)
    assert copies.is_begun(SEALED)
    assert await copies.settle_leftovers(lambda file: FACTS) == 0
    again = await copies.partial(SEALED, None, IDENTITY)
    assert list(again.present) == [(PIECE, 2 * PIECE), (3 * PIECE, 4 * PIECE)]
    await some(again, 0, 2, 4)
    await copies.finish(again, SEALED, None)
    again.close()
    assert not copies.is_begun(SEALED)
    opened = await copies.open(SEALED, None, size=SIZE, mtime_ns=MTIME_NS)
    assert opened is not None
    with opened.descriptor as fd:
        assert os.pread(fd, SIZE, 0) == b"".join(bytes([number]) * PIECE for number in range(5))
    opened.close()
    assert names(root) == []


@pytest.mark.parametrize(
    "present",
    [None, Facts(SIZE + 1, MTIME_NS), Facts(SIZE, MTIME_NS + 1)],
    ids=["nobody", "size", "time"],
)
async def test_what_nobody_has_any_more_goes(
    root: Path, present: Facts | None, caplog: pytest.LogCaptureFixture
) -> None:
    before = begun(root)
    kept = await before.partial(SEALED, None, IDENTITY)
    await some(kept, 1)
    kept.close()
    copies = begun(root)
    await copies.clear_leftovers()
    with caplog.at_level("INFO"):
        assert await copies.settle_leftovers(lambda file: present) == 1
    assert "s-t01000-7.part: nobody has that content any more" in caplog.text
    assert names(root) == []
    assert not copies.is_begun(SEALED)
    assert await copies.settle_leftovers(lambda file: present) == 0


async def test_what_was_taken_up_again_meanwhile_stays(root: Path) -> None:
    before = begun(root)
    (await before.partial(SEALED, None, IDENTITY)).close()
    copies = begun(root)
    await copies.clear_leftovers()
    again = await copies.partial(SEALED, None, Identity(SIZE + 1, MTIME_NS))
    await copies.settle_leftovers(lambda file: Facts(SIZE + 1, MTIME_NS))
    assert names(root) == ["sealed/fetching/s-t01000-7.map", "sealed/fetching/s-t01000-7.part"]
    again.close()


async def test_files_of_a_directory_stay_whole_and_in_part(root: Path) -> None:
    before = begun(root)
    partial = await before.begin(CACHE, "p_aux", 3)
    with partial.descriptor as fd:
        os.pwrite(fd, b"aux", 0)
    await before.commit(partial, size=3, mtime_ns=MTIME_NS)
    kept = await before.partial(CACHE, "t", IDENTITY)
    await some(kept, 0, 1)
    kept.close()
    (root / "cache/fetching/s-t01000-7/gone.tmp").write_bytes(b"x")
    copies = begun(root)
    assert await copies.clear_leftovers() == 1
    assert await copies.settle_leftovers(lambda file: DIRECTORY) == 0
    assert names(root) == [
        "cache/fetching/s-t01000-7/p_aux",
        "cache/fetching/s-t01000-7/t.map",
        "cache/fetching/s-t01000-7/t.part",
    ]
    again = await copies.partial(CACHE, "t", IDENTITY)
    await some(again, 2, 3, 4)
    await copies.finish(again, CACHE, "t")
    again.close()
    assert await copies.is_received(CACHE, DIRECTORY)


async def test_a_directory_that_changed_loses_what_changed(root: Path) -> None:
    before = begun(root)
    (await before.partial(CACHE, "t", IDENTITY)).close()
    (await before.partial(CACHE, "u", IDENTITY)).close()
    copies = begun(root)
    await copies.clear_leftovers()
    assert await copies.settle_leftovers(lambda file: DIRECTORY) == 1
    assert [name for name in names(root) if name.endswith(".part")] == [
        "cache/fetching/s-t01000-7/t.part"
    ]


def spoil_map(folder: Path) -> None:
    (folder / "s-t01000-7.map").unlink()


def spoil_data(folder: Path) -> None:
    (folder / "s-t01000-7.part").unlink()


def spoil_identity(folder: Path) -> None:
    os.removexattr(folder / "s-t01000-7.part", "user.sectorfs.identity")


@pytest.mark.parametrize("spoil", [spoil_map, spoil_data, spoil_identity])
async def test_halves_and_nameless_ones_go_at_once(root: Path, spoil: object) -> None:
    before = begun(root)
    kept = await before.partial(SEALED, None, IDENTITY)
    await some(kept, 1)
    kept.close()
    assert callable(spoil)
    spoil(root / "sealed/fetching")
    copies = begun(root)
    assert await copies.clear_leftovers() >= 1
    assert names(root) == []
    assert not copies.is_begun(SEALED)


def test_odd_things_go_and_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "s-t01000-7.part").write_bytes(b"x")
    fetching = root / "sealed/fetching"
    fetching.mkdir(parents=True)
    (fetching / "odd").write_bytes(b"x")
    (fetching / "s-t01000-9").mkdir()
    (fetching / "s-t01000-8").symlink_to(precious)
    (root / "cache/fetching").mkdir(parents=True)
    (root / "cache/fetching/s-t01000-8").symlink_to(precious)
    (root / "cache/fetching/s-t01000-9").mkdir()
    (root / "cache/fetching/s-t01000-9.old.tmp").mkdir()
    kept, removed = unfinished.clear(root)
    assert kept == []
    assert removed == 6
    assert (precious / "s-t01000-7.part").exists()
    assert list(fetching.iterdir()) == []
    assert list((root / "cache/fetching").iterdir()) == []


async def test_without_room_none_is_begun_but_one_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = begun(root)
    kept = await copies.partial(SEALED, None, IDENTITY)
    await some(kept, *range(5))
    kept.close()
    stat = os.statvfs(root)
    monkeypatch.setattr(copies_module, "ROOM_LEFT", stat.f_bavail * stat.f_frsize - PIECE)
    with pytest.raises(DiskFull):
        await copies.partial(SectorFile(FileType.SEALED, SectorID(1000, 8)), None, IDENTITY)
    (await copies.partial(SEALED, None, IDENTITY)).close()


async def test_one_that_cannot_be_removed_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = begun(root)
    (await before.partial(SEALED, None, IDENTITY)).close()
    copies = begun(root)
    await copies.clear_leftovers()

    def fail(leftover: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(unfinished, "remove", fail)
    await copies.settle_leftovers(lambda file: None)
    assert "stays" in caplog.text
    await trio.lowlevel.checkpoint()
