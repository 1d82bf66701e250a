"""`LocalStore` on real directories: attach, scan, open, heartbeats, disks that vanish or hang."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from sectorfs import metrics
from sectorfs.config import StorageConfig, TimeoutsConfig
from sectorfs.errors import (
    BadInput,
    DiskError,
    NotFound,
    Refused,
    StorageUnavailable,
    Unreachable,
)
from sectorfs.index.protocol import Declaration
from sectorfs.stores import keeper as keeper_module
from sectorfs.stores import local as local_module
from sectorfs.stores.lanes import Lane
from sectorfs.stores.metadata import METADATA_NAME, init_cache_path, read_metadata
from sectorfs.types import Facts, FileType, StorageID
from tests.local_fixtures import (
    URL,
    SwitchedIndex,
    a_path,
    an_index,
    declared,
    make_path,
    make_store,
    put,
    running,
    sector_file,
    until,
    until_declared,
)

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)


index = an_index
path = a_path


def id_of(path: Path) -> StorageID:
    return read_metadata(str(path)).info.storage


async def test_attach_declares_what_is_there(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED, b"12345")
    put(path, CACHE, {"p_aux": b"1", "t_aux": b"22", "x.tmp": b"333"})
    store = make_store(index)
    info = await store.attach(str(path))
    found = await declared(index, info.storage)
    assert set(found) == {SEALED, CACHE}
    assert found[SEALED].primary
    assert found[SEALED].facts == Facts(5, (path / "sealed/s-t01000-7").stat().st_mtime_ns)
    facts = found[CACHE].facts
    assert facts is not None
    assert facts.size == 3
    assert [member.name for member in facts.members or ()] == ["p_aux", "t_aux"]
    (status,) = await index.storages()
    assert status.info.urls == (URL,)
    assert status.stat.capacity > 0
    assert store.path_of(info.storage) == str(path)


# Attaching what cannot be attached


async def test_a_bare_directory_is_refused(index: SwitchedIndex, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    store = make_store(index)
    for name in ("bare", "missing"):
        with pytest.raises(Refused, match="--init") as caught:
            await store.attach(str(tmp_path / name))
        assert name in str(caught.value)
    assert store.paths() == ()
    assert await index.storages() == []


async def test_a_malformed_file_is_named(index: SwitchedIndex, path: Path) -> None:
    (path / METADATA_NAME).write_text('{"ID": 5}')
    with pytest.raises(BadInput, match=f"{path}/{METADATA_NAME}.*'ID'"):
        await make_store(index).attach(str(path))


async def test_two_paths_with_one_id(index: SwitchedIndex, path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "copy")
    store = make_store(index)
    await store.attach(str(path))
    with pytest.raises(Refused) as caught:
        await store.attach(str(tmp_path / "copy"))
    assert str(path) in str(caught.value)
    assert str(tmp_path / "copy") in str(caught.value)
    assert len(store.paths()) == 1


async def test_the_same_directory_again_is_left_as_it_is(
    index: SwitchedIndex, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(path)
    store = make_store(index)
    first = await store.attach(str(path))
    for name in (str(path), f"{path}/", str(tmp_path / "link")):
        assert await store.attach(name) == first
    assert [attached.path for attached in store.paths()] == [str(path)]


async def test_a_directory_that_turned_into_another_storage(
    index: SwitchedIndex, path: Path
) -> None:
    store = make_store(index)
    old = (await store.attach(str(path))).storage
    (path / METADATA_NAME).unlink()
    make_path(path)
    with pytest.raises(Refused, match=f"attached as storage {old}"):
        await store.attach(str(path))


@pytest.mark.parametrize("linked", [False, True])
async def test_a_path_inside_another(
    index: SwitchedIndex, path: Path, tmp_path: Path, linked: bool
) -> None:
    make_path(path / "inner")
    inner = path / "inner"
    if linked:
        (tmp_path / "link").symlink_to(path)
        inner = tmp_path / "link" / "inner"
    for first, second in ((path, inner), (inner, path)):
        store = make_store(index)
        await store.attach(str(first))
        with pytest.raises(Refused, match="overlaps the storage path") as caught:
            await store.attach(str(second))
        assert str(first) in str(caught.value)


async def test_a_neighbour_with_a_common_prefix_is_no_overlap(
    index: SwitchedIndex, path: Path, tmp_path: Path
) -> None:
    make_path(tmp_path / "p2")
    store = make_store(index)
    await store.attach(str(path))
    await store.attach(str(tmp_path / "p2"))
    assert len(store.paths()) == 2


async def test_attach_while_the_index_is_away(index: SwitchedIndex, path: Path) -> None:
    store = make_store(index)
    index.away = True
    with pytest.raises(Unreachable):
        await store.attach(str(path))
    assert store.paths() == ()
    index.away = False
    await store.attach(str(path))


@pytest.mark.parametrize("trick", ["file", "loop", "link to nothing"])
async def test_a_type_directory_that_cannot_be_read(
    index: SwitchedIndex, path: Path, trick: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, SEALED)
    put(path, CACHE, {"p_aux": b"1"})
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    (path / "sealed").rename(path / "aside")
    if trick == "file":
        (path / "sealed").write_text("")
    else:
        (path / "sealed").symlink_to("sealed" if trick == "loop" else "nowhere")
    put(path, sector_file(FileType.CACHE, 8), {"p_aux": b"1"})
    for _ in range(2):
        with pytest.raises(DiskError, match=f"{path}/sealed"):
            await store.redeclare(str(path), drop_missing=True)
    assert set(await declared(index, storage)) == {
        SEALED,
        CACHE,
        sector_file(FileType.CACHE, 8),
    }
    errors = [record for record in caplog.records if "its declarations stay" in record.message]
    assert len(errors) == 1  # not one per scan
    await store._keepers[storage].beat()
    (status,) = await index.storages()
    assert f"{path}/sealed" in status.error
    (path / "sealed").unlink()
    (path / "aside").rename(path / "sealed")
    await store.redeclare(str(path), drop_missing=True)
    await store._keepers[storage].beat()
    assert (await index.storages())[0].error == ""


async def test_attach_goes_on_past_a_type_directory_that_cannot_be_read(
    index: SwitchedIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, CACHE, {"p_aux": b"1"})
    (path / "sealed").write_text("")
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert set(await declared(index, storage)) == {CACHE}
    assert f"{path}/sealed: cannot be read: Not a directory" in caplog.text


# Scans


async def test_odd_entries_are_told_once_and_never_fatal(
    index: SwitchedIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, SEALED)
    for name in ("s-t01000-8.tmp", "s-t01000-9.bak", "s-f01000-1", ".DS_Store", "x" * 255):
        (path / "sealed" / name).write_text("")
    for name in ("fetching", "stash", "lost+found", "s-t01000-10"):
        (path / "sealed" / name).mkdir()
    (path / "sealed" / "s-t01000-11").symlink_to("nowhere")
    (path / "cache").mkdir()
    (path / "cache" / "s-t01000-12").write_text("a file")
    os.mkfifo(path / "sealed" / "s-t01000-13")
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert set(await declared(index, storage)) == {SEALED}
    lines = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(lines) == 9
    assert not [line for line in lines if "'fetching'" in line or "'stash'" in line]
    assert not [line for line in lines if ".tmp'" in line]
    counts = await store.redeclare()
    assert counts.odd == 9
    assert len([record for record in caplog.records if "skipped" in record.message]) == 9
    (path / "sealed" / "new-odd").write_text("")
    await store.redeclare()
    assert len([record for record in caplog.records if "skipped" in record.message]) == 10


async def test_many_odd_entries_are_few_lines(
    index: SwitchedIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path / "sealed").mkdir()
    for number in range(100):
        (path / "sealed" / f"odd{number}").write_text("")
    await make_store(index).attach(str(path))
    lines = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(lines) == 21
    assert "skipped 80 more" in lines[-1]


async def test_a_scan_sends_differences_only(index: SwitchedIndex, path: Path) -> None:
    files = [sector_file(file_type, number) for file_type in FileType for number in range(5)]
    for file in files:
        put(path, file, {"p_aux": b"1"} if file.file_type.is_directory else b"1")
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert set(await declared(index, storage)) == set(files)
    index.calls.clear()
    counts = await store.redeclare(drop_missing=True)
    assert (counts.entries, counts.declared, counts.dropped) == (35, 0, 0)
    assert "declare" not in index.calls
    assert "drop" not in index.calls
    changed = sector_file(FileType.SEALED, 3)
    put(path, changed, b"longer")
    (path / str(sector_file(FileType.KEY, 4))).unlink()
    counts = await store.redeclare(drop_missing=True)
    assert (counts.declared, counts.dropped) == (1, 1)
    found = await declared(index, storage)
    assert set(found) == set(files) - {sector_file(FileType.KEY, 4)}
    facts = found[changed].facts
    assert facts is not None
    assert facts.size == 6


async def test_scans_across_pages(
    index: SwitchedIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "BATCH", 7)
    files = [
        sector_file(FileType.SEALED, number, miner) for miner in (9, 10) for number in range(30)
    ]
    files += [sector_file(FileType.UPDATE, number) for number in range(14)]
    for file in files:
        put(path, file)
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert set(await declared(index, storage)) == set(files)
    gone = {file for file in files if file.sector.number % 3 == 0}
    for file in gone:
        (path / str(file)).unlink()
    new = [sector_file(FileType.SEALED, number, 9) for number in range(100, 110)]
    for file in new:
        put(path, file)
    seen: list[int] = []
    counts = await store.redeclare(drop_missing=True, progress=seen.append)
    assert (counts.declared, counts.dropped) == (len(new), len(gone))
    assert set(await declared(index, storage)) == set(files) - gone | set(new)
    assert seen[-1] == counts.entries == len(files) - len(gone) + len(new)
    shutil.rmtree(path / "sealed")
    await store.redeclare(drop_missing=True)
    left = await declared(index, storage)
    assert {file.file_type for file in left} == {FileType.UPDATE}


async def test_without_drop_missing_nothing_is_dropped(index: SwitchedIndex, path: Path) -> None:
    target = put(path, SEALED)
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    target.unlink()
    assert (await store.redeclare()).dropped == 0
    assert set(await declared(index, storage)) == {SEALED}
    assert (await store.redeclare(drop_missing=True)).dropped == 1
    assert await declared(index, storage) == {}


async def test_facts_that_others_left_out_are_added(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED)
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    await index.drop([Declaration(SEALED, storage, True).key])
    await index.declare([Declaration(SEALED, storage, False, None)])
    await store.redeclare()
    found = (await declared(index, storage))[SEALED]
    assert found.facts is not None
    assert found.primary


async def test_an_entry_the_disk_cannot_answer_for_keeps_its_declaration(
    index: SwitchedIndex, path: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "other-disk"
    elsewhere.write_text("content")
    (path / "sealed").mkdir()
    (path / str(SEALED)).symlink_to(elsewhere)
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    await store.redeclare()
    assert set(await declared(index, storage)) == {SEALED}
    elsewhere.unlink()  # the disk that the link leads to is unmounted
    await store.redeclare(drop_missing=True)
    assert set(await declared(index, storage)) == {SEALED}
    (path / str(SEALED)).unlink()
    (path / str(SEALED)).mkdir()  # something else has the name
    await store.redeclare(drop_missing=True)
    assert await declared(index, storage) == {}


async def test_copies_in_a_cache_path_are_not_primary(index: SwitchedIndex, tmp_path: Path) -> None:
    storage = init_cache_path(str(tmp_path / "c")).storage
    put(tmp_path / "c", SEALED)
    store = make_store(index)
    await store.attach(str(tmp_path / "c"))
    assert not (await declared(index, storage))[SEALED].primary


async def test_a_file_that_grows_is_not_declared_until_it_is_quiet(
    index: SwitchedIndex, path: Path
) -> None:
    store = make_store(index, storage=StorageConfig(settle=0.02, look=3600, rescan=3600))
    storage = (await store.attach(str(path))).storage
    keeper = store._keepers[storage]
    target = put(path, SEALED, b"", age=0)
    store.note(storage, SEALED)
    with target.open("ab") as file:
        for _ in range(5):
            file.write(b"more")
            file.flush()
            await until(lambda: keeper.path.settling.next_due() <= trio.current_time())
            assert await keeper.settle_due() == 0
            assert await declared(index, storage) == {}
    await until(lambda: keeper.path.settling.next_due() <= trio.current_time())
    assert await keeper.settle_due() == 1
    facts = (await declared(index, storage))[SEALED].facts
    assert facts is not None
    assert facts.size == 20


async def test_a_young_file_that_is_quiet_is_declared_by_attach(
    index: SwitchedIndex, path: Path
) -> None:
    put(path, SEALED, age=0)
    put(path, CACHE, {"p_aux": b"1"}, age=-3600)  # a clock that is ahead
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert set(await declared(index, storage)) == {SEALED, CACHE}


async def test_more_changes_than_may_wait(
    index: SwitchedIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sectorfs.stores.local_path.SETTLING_LIMIT", 10)
    files = [sector_file(FileType.SEALED, number) for number in range(55)]
    for file in files:
        put(path, file, age=0)
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert set(await declared(index, storage)) == set(files)


# sectorstore.json changes


async def test_redeclare_takes_new_settings(index: SwitchedIndex, path: Path) -> None:
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    text = (path / METADATA_NAME).read_text().replace('"Weight": 10', '"Weight": 99')
    (path / METADATA_NAME).write_text(text)
    await store.redeclare(storage)
    assert (await index.info(storage)).weight == 99


async def test_redeclare_of_a_path_that_became_another_storage(
    index: SwitchedIndex, path: Path, tmp_path: Path
) -> None:
    put(path, SEALED)
    make_path(tmp_path / "q")
    put(tmp_path / "q", CACHE, {"p_aux": b"1"})
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    other = (await store.attach(str(tmp_path / "q"))).storage
    (path / METADATA_NAME).unlink()
    new = make_path(path)
    put(path, sector_file(FileType.SEALED, 8))
    put(tmp_path / "q", sector_file(FileType.CACHE, 8), {"p_aux": b"1"})
    with pytest.raises(StorageUnavailable, match=f"holds storage {new} instead of {storage}"):
        await store.redeclare(drop_missing=True)
    assert set(await declared(index, storage)) == {SEALED}
    assert len(await declared(index, other)) == 2  # the others are done all the same
    assert not next(attached for attached in store.paths() if attached.storage == storage).available


async def test_a_file_that_turned_malformed_is_named_and_mended(
    index: SwitchedIndex, path: Path
) -> None:
    put(path, SEALED)
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    (local,) = store.paths()
    text = (path / METADATA_NAME).read_text()
    (path / METADATA_NAME).write_text(text.replace('"Weight": 10', '"Weight": -1'))
    with pytest.raises(BadInput, match="'Weight'"):
        await store.redeclare(drop_missing=True)
    await store._keepers[storage].beat()
    assert not local.available
    assert "'Weight'" in (await index.storages())[0].error
    (path / METADATA_NAME).write_text(text)
    await store._keepers[storage].beat()
    assert local.available
    assert set(await declared(index, storage)) == {SEALED}


async def test_redeclare_of_what_is_not_attached(index: SwitchedIndex) -> None:
    with pytest.raises(NotFound, match="/nowhere"):
        await make_store(index).redeclare("/nowhere")


# Detach


@pytest.mark.parametrize("by", ["path", "id", "link"])
async def test_detach(index: SwitchedIndex, path: Path, by: str, tmp_path: Path) -> None:
    put(path, SEALED)
    (tmp_path / "link").symlink_to(path)
    store = make_store(index)
    where = tmp_path / "link" if by == "link" else path
    storage = (await store.attach(str(where))).storage
    async with running(store):
        await store.detach(storage if by == "id" else f"{path}/")
        assert store.paths() == ()
    assert await index.storages() == []
    with pytest.raises(NotFound):
        await store.detach(storage)
    with pytest.raises(NotFound):
        await store.open_file(SEALED)
    assert (path / str(SEALED)).exists()


async def test_detach_leaves_the_path_of_another_node(index: SwitchedIndex, path: Path) -> None:
    here, there = make_store(index), make_store(index, urls=("http://10.0.0.2:1/remote",))
    storage = (await here.attach(str(path))).storage
    await there.attach(str(path))
    assert len((await index.info(storage)).urls) == 2
    await here.detach(storage)
    assert (await index.info(storage)).urls == ("http://10.0.0.2:1/remote",)


async def test_detach_of_a_path_the_index_forgot(index: SwitchedIndex, path: Path) -> None:
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    await index.detach(storage, URL)
    await store.detach(storage)
    assert store.paths() == ()


async def test_a_detach_that_fails_leaves_the_path_kept(index: SwitchedIndex, path: Path) -> None:
    store = make_store(index, heartbeat=0.05)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        index.away = True
        with pytest.raises(Unreachable):
            await store.detach(storage)
        index.away = False
        index.calls.clear()
        await until(lambda: index.calls.count("report_health") >= 2)
        put(path, SEALED)
        await store.redeclare()
        await until_declared(index, storage, [SEALED])


# Disks that vanish


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The mount point of an ext4 file system of its own."""
    image, mountpoint = tmp_path / "disk.img", tmp_path / "disk"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mount(image, mountpoint)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, capture_output=True)


def mount(image: Path, mountpoint: Path, options: str = "loop") -> None:
    subprocess.run(["mount", "-o", options, str(image), str(mountpoint)], check=True)


def unmount(mountpoint: Path) -> None:
    subprocess.run(["umount", str(mountpoint)], check=True)


def is_mounted(mountpoint: Path) -> bool:
    return os.path.ismount(mountpoint)


def contents(path: Path) -> list[tuple[Path, int]]:
    """Everything below a path, with its modification time."""
    return sorted((entry, entry.stat().st_mtime_ns) for entry in (path, *path.rglob("*")))


def device(path: Path) -> int:
    return path.stat().st_dev


async def test_an_unmounted_disk_keeps_its_declarations(
    index: SwitchedIndex, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_path(disk)
    put(disk, SEALED)
    put(disk, CACHE, {"p_aux": b"1"})
    store = make_store(index, heartbeat=0.05, watch=True, holders=lambda file: [storage])
    await store.attach(str(disk))
    (local,) = store.paths()
    async with running(store):
        await until(lambda: local.watched)
        unmount(disk)  # and no descriptor of ours keeps it busy
        await until(lambda: not local.available)
        assert "is its disk mounted?" in local.error

        async def reported() -> bool:
            (status,) = await index.storages()
            return "is its disk mounted?" in status.error

        await until(reported)
        assert set(await declared(index, storage)) == {SEALED, CACHE}
        with pytest.raises(StorageUnavailable):
            await store.open_file(SEALED)
        with pytest.raises(StorageUnavailable):
            await store.redeclare(str(disk), drop_missing=True)
        assert store.local_path(SEALED) is None
        mount(disk.parent / "disk.img", disk)
        await until(lambda: local.available)
        put(disk, sector_file(FileType.SEALED, 8), age=0)  # the watches are back as well
        (disk / str(CACHE) / "p_aux").unlink()
        (disk / str(CACHE)).rmdir()
        await until_declared(index, storage, [SEALED, sector_file(FileType.SEALED, 8)])
        (await store.open_file(SEALED)).close()
        # Attaching the same name again is still nothing new, whatever its device number is.
        await store.attach(str(disk))

        async def healthy() -> bool:
            return (await index.storages())[0].error == ""

        await until(healthy)
    lines = [record.message for record in caplog.records if "is unavailable" in record.message]
    assert len(lines) <= 2


async def test_a_disk_unmounted_during_a_scan_drops_nothing(
    index: SwitchedIndex, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_path(disk)
    for number in range(20):
        put(disk, sector_file(FileType.SEALED, number))
    store = make_store(index)
    await store.attach(str(disk))
    real = Lane.run

    async def run(lane: Lane, call, *, what, discard=None):  # type: ignore[no-untyped-def]
        if what == "list sector files" and is_mounted(disk):
            unmount(disk)  # after the identity was read, before the names are
        return await real(lane, call, what=what, discard=discard)

    monkeypatch.setattr(Lane, "run", run)
    with pytest.raises(StorageUnavailable):
        await store.redeclare(drop_missing=True)
    assert len(await declared(index, storage)) == 20


async def test_a_file_is_dropped_only_through_a_path_that_proves_its_id(
    index: SwitchedIndex, disk: Path
) -> None:
    storage = make_path(disk)
    put(disk, SEALED)
    store = make_store(index)
    await store.attach(str(disk))
    unmount(disk)
    keeper = store._keepers[storage]
    with pytest.raises(StorageUnavailable):
        await keeper.drop([SEALED])
    store.note(storage, SEALED)  # an event that the unmounting itself caused
    with pytest.raises(StorageUnavailable):
        await keeper.settle_due()
    assert set(await declared(index, storage)) == {SEALED}


async def test_a_file_that_is_there_after_all_is_not_dropped(
    index: SwitchedIndex, path: Path
) -> None:
    put(path, SEALED)
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert await store._keepers[storage].drop([SEALED, CACHE]) == 1
    assert set(await declared(index, storage)) == {SEALED}


async def test_a_read_only_disk_is_attached_without_a_write(
    index: SwitchedIndex, disk: Path
) -> None:
    storage = make_path(disk)
    put(disk, SEALED)
    unmount(disk)
    mount(disk.parent / "disk.img", disk, "loop,ro")
    store = make_store(index, watch=True, heartbeat=0.05)
    await store.attach(str(disk))
    async with running(store):
        await store.redeclare(drop_missing=True)
        await until(lambda: index.calls.count("report_health") >= 2)
    assert set(await declared(index, storage)) == {SEALED}
    assert (await index.storages())[0].error == ""


async def test_attaching_and_scanning_writes_nothing(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED)
    before = contents(path)
    store = make_store(index, watch=True)
    await store.attach(str(path))
    await store.redeclare(drop_missing=True)
    store.close()
    assert contents(path) == before


async def test_a_path_that_is_not_mounted_at_start_is_attached_later(
    index: SwitchedIndex, disk: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = make_path(disk)
    put(disk, SEALED)
    unmount(disk)
    store = make_store(index, heartbeat=0.05)
    async with running(store):
        await store.attach_all([str(disk), f"{path}/"])
        assert [attached.path for attached in store.paths()] == [str(path)]
        assert list(store.waiting()) == [str(disk)]
        await until(lambda: index.calls.count("report_health") >= 3)
        mount(disk.parent / "disk.img", disk)
        await until_declared_somewhere(index, storage)
        assert store.waiting() == {}
    assert len([record for record in caplog.records if "cannot attach" in record.message]) == 1


async def until_declared_somewhere(index: SwitchedIndex, storage: StorageID) -> None:
    async def known() -> bool:
        if storage not in [status.info.storage for status in await index.storages()]:
            return False
        return set(await declared(index, storage)) == {SEALED}

    await until(known)


async def test_a_path_that_waits_can_be_detached(index: SwitchedIndex, tmp_path: Path) -> None:
    store = make_store(index)
    await store.attach_all([str(tmp_path / "missing")])
    assert await store.detach(str(tmp_path / "missing")) is None
    assert store.waiting() == {}


# The Index away, or another one


async def test_paths_can_be_read_while_the_index_is_away(
    index: SwitchedIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, SEALED, b"12345")
    index.away = True
    store = make_store(index, heartbeat=0.05)
    async with running(store):
        await store.attach_all([str(path)])
        opened = await store.open_file(SEALED)
        opened.close()
        assert opened.size == 5
        await until(lambda: index.calls.count("attach") >= 4)
        index.away = False
        await until_declared_somewhere(index, opened.storage)
    lines = [record for record in caplog.records if "Index does not answer" in record.message]
    assert len(lines) == 1


@pytest.mark.parametrize("method", ["declare", "drop", "declarations"])
async def test_what_failed_while_the_index_was_away_is_done_when_it_is_back(
    index: SwitchedIndex, path: Path, method: str
) -> None:
    target = put(path, SEALED)
    store = make_store(index, heartbeat=0.05, watch=True)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        index.away_for = {method}
        new = sector_file(FileType.SEALED, 8)
        put(path, new, age=0)
        target.unlink()
        if method == "declarations":
            store.paths()[0].mark_dirty(deep=True)
        await until(lambda: index.calls.count(method) >= 3)
        index.away_for = set()
        await until_declared(index, storage, [new])


async def test_an_index_that_lost_its_data_is_told_everything_again(
    index: SwitchedIndex, path: Path
) -> None:
    put(path, SEALED)
    store = make_store(index, heartbeat=0.05)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        await index.detach(storage, URL)
        await until_declared_somewhere(index, storage)


async def test_an_index_that_fails_during_the_first_scan(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED)
    store = make_store(index, heartbeat=0.05)
    index.away_for = {"declare"}
    with pytest.raises(Unreachable):
        await store.attach(str(path))
    (local,) = store.paths()
    index.away_for = set()
    async with running(store):
        await until_declared(index, local.storage, [SEALED])


async def test_a_cancelled_attach_is_finished_by_the_tasks(
    index: SwitchedIndex, path: Path
) -> None:
    files = [sector_file(FileType.SEALED, number) for number in range(50)]
    for file in files:
        put(path, file)
    store = make_store(index)
    with trio.CancelScope() as scope:
        await store.attach(str(path), progress=lambda seen: scope.cancel())
    (local,) = store.paths()
    assert await declared(index, local.storage) == {}
    async with running(store):
        await until_declared(index, local.storage, files)


# Hung disks


async def test_a_hung_disk_delays_no_other_path(
    index: SwitchedIndex, path: Path, tmp_path: Path
) -> None:
    make_path(tmp_path / "q")
    put(path, SEALED)
    store = make_store(index, heartbeat=0.05, timeouts=TimeoutsConfig(disk=0.3))
    storage = (await store.attach(str(path))).storage
    other = (await store.attach(str(tmp_path / "q"))).storage
    local = next(attached for attached in store.paths() if attached.storage == storage)
    healthy = next(attached for attached in store.paths() if attached.storage == other)
    release = threading.Event()
    try:
        async with running(store), trio.open_nursery() as nursery:

            async def hang() -> None:
                with pytest.raises(StorageUnavailable):
                    await local.lane.run(release.wait, what="read")

            for _ in range(32):
                nursery.start_soon(hang)
            await until(lambda: not local.available)
            assert "no answer within 0.3 s" in local.error
            assert healthy.available
            index.calls.clear()
            put(tmp_path / "q", CACHE, {"p_aux": b"1"})
            await store.redeclare(other)
            await until_declared(index, other, [CACHE])
            with trio.fail_after(2):
                with pytest.raises(NotFound):
                    await store.open_file(SEALED)  # not one deadline more
            assert set(await declared(index, storage)) == {SEALED}
            release.set()
            await until(lambda: local.available)
            (await store.open_file(SEALED)).close()
    finally:
        release.set()


async def test_a_hung_health_check_holds_one_thread(
    index: SwitchedIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(index, heartbeat=0.02, timeouts=TimeoutsConfig(disk=0.1))
    await store.attach(str(path))
    (local,) = store.paths()
    release = threading.Event()

    def hang(_: str) -> None:
        release.wait()

    try:
        with monkeypatch.context() as patch:
            patch.setattr("sectorfs.stores.local_path.raw_space", hang)
            async with running(store):
                await until(lambda: not local.available)
                index.calls.clear()
                await until(lambda: index.calls.count("report_health") >= 10)
                assert local.lane.busy == 1
        release.set()
        await until(lambda: local.lane.busy == 0)
        await store._keepers[local.storage].beat()
        assert local.available
    finally:
        release.set()


async def test_a_disk_that_was_only_silent_is_not_scanned_again(
    index: SwitchedIndex, path: Path
) -> None:
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    (local,) = store.paths()
    local.fail(StorageUnavailable("no answer within 15 s", path))
    assert not local.available
    await store._keepers[storage].beat()
    assert local.available
    assert not local.dirty


# Opening


async def test_open(index: SwitchedIndex, path: Path) -> None:
    target = put(path, SEALED, b"12345")
    put(path, CACHE, {"p_aux": b"1", "t_aux": b"22"})
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    opened = await store.open_file(SEALED)
    with opened.descriptor as fd:
        assert os.read(fd, 10) == b"12345"
        assert os.get_blocking(fd)
        assert not os.get_inheritable(fd)
    found = target.stat()
    assert (opened.size, opened.mtime_ns, opened.inode) == (5, found.st_mtime_ns, found.st_ino)
    assert (opened.storage, opened.path) == (storage, str(target))
    opened.close()
    member = await store.open_file(CACHE, "t_aux")
    assert member.size == 2
    member.close()


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/etc/passwd", "a\0", "x" * 300, "p_aux.tmp", "../p_aux", "é"]
)
async def test_names_that_lead_elsewhere(index: SwitchedIndex, path: Path, name: str) -> None:
    put(path, CACHE, {"p_aux": b"1", "p_aux.tmp": b"1"})
    store = make_store(index)
    await store.attach(str(path))
    with pytest.raises(NotFound):
        await store.open_file(CACHE, name)


async def test_what_cannot_be_opened(index: SwitchedIndex, path: Path) -> None:
    put(path, CACHE, {"p_aux": b"1"})
    (path / str(CACHE) / "sub").mkdir()
    (path / "sealed" / "s-t01000-1").mkdir(parents=True)
    os.mkfifo(path / "sealed" / "s-t01000-2")
    (path / "sealed" / "s-t01000-3").symlink_to("s-t01000-3")
    store = make_store(index)
    await store.attach(str(path))
    for file, member in (
        (SEALED, None),
        (SEALED, "p_aux"),
        (CACHE, None),
        (CACHE, "sub"),
        (CACHE, "other"),
        (sector_file(FileType.CACHE, 8), "p_aux"),
        (sector_file(FileType.SEALED, 1), None),
        (sector_file(FileType.SEALED, 2), None),
    ):
        with pytest.raises(NotFound):
            await store.open_file(file, member)
        with pytest.raises(NotFound):
            await store.excerpt(file, member, [(0, 1)])
    with pytest.raises(DiskError):
        await store.open_file(sector_file(FileType.SEALED, 3))
    with pytest.raises(DiskError):
        await store.excerpt(sector_file(FileType.SEALED, 3), None, [(0, 1)])
    assert (await store.excerpt(CACHE, "p_aux", [(0, 9), (1, 1)])).pieces == (b"1", b"")


async def test_a_linked_file_is_opened(index: SwitchedIndex, path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"123")
    (path / "sealed").mkdir()
    (path / str(SEALED)).symlink_to(tmp_path / "elsewhere")
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    assert set(await declared(index, storage)) == {SEALED}
    opened = await store.open_file(SEALED)
    opened.close()
    assert opened.size == 3


async def test_the_path_that_the_index_names_comes_first(
    index: SwitchedIndex, path: Path, tmp_path: Path
) -> None:
    other = make_path(tmp_path / "q")
    put(path, SEALED, b"1")
    put(tmp_path / "q", SEALED, b"22")
    store = make_store(index, holders=lambda file: ["elsewhere", other])
    storage = (await store.attach(str(path))).storage
    await store.attach(str(tmp_path / "q"))
    opened = await store.open_file(SEALED)
    opened.close()
    assert opened.storage == other
    assert store.local_path(SEALED) == str(tmp_path / "q" / str(SEALED))
    assert store.local_path(CACHE, "p_aux") == str(tmp_path / "q" / str(CACHE) / "p_aux")
    (tmp_path / "q" / str(SEALED)).unlink()
    opened = await store.open_file(SEALED)
    opened.close()
    assert opened.storage == storage
    opened = await store.open_at(storage, SEALED)
    opened.close()
    with pytest.raises(NotFound):
        await store.open_at(other, SEALED)
    with pytest.raises(NotFound):
        await store.open_at("elsewhere", SEALED)  # type: ignore[arg-type]  # never parsed
    next(local for local in store.paths() if local.storage == storage).fail(
        StorageUnavailable("gone")
    )
    with pytest.raises(StorageUnavailable):
        await store.open_at(storage, SEALED)


@pytest.mark.parametrize("whole", [True, False])
async def test_a_path_that_lost_its_disk_is_unavailable_at_the_next_open(
    index: SwitchedIndex, disk: Path, whole: bool
) -> None:
    storage = make_path(disk)
    put(disk, SEALED)
    store = make_store(index, holders=lambda file: [storage])
    await store.attach(str(disk))
    unmount(disk)
    with pytest.raises(StorageUnavailable, match="is gone"):
        await (store.open_file(SEALED) if whole else store.excerpt(SEALED, None, [(0, 1)]))
    assert not store.paths()[0].available


async def test_a_file_replaced_after_the_scan_is_declared_again_when_it_is_opened(
    index: SwitchedIndex, path: Path
) -> None:
    put(path, SEALED, b"1")
    put(path, CACHE, {"p_aux": b"1"})
    facts: dict[object, Facts | None] = {}
    store = make_store(
        index,
        holders=lambda file: [storage] if file in facts else [],
        declared=lambda file, storage: facts.get(file),
    )
    storage = (await store.attach(str(path))).storage
    facts.update({file: item.facts for file, item in (await declared(index, storage)).items()})
    (await store.open_file(SEALED)).close()
    (await store.open_file(CACHE, "p_aux")).close()
    settling = store.paths()[0].settling
    assert len(settling) == 0
    put(path, SEALED, b"22")
    put(path, CACHE, {"p_aux": b"22", "t_aux": b"1"})
    unknown = sector_file(FileType.KEY, 1)
    put(path, unknown)
    async with running(store):
        (await store.open_file(SEALED)).close()
        (await store.open_file(CACHE, "t_aux")).close()
        (await store.open_file(unknown)).close()

        async def declared_again() -> bool:
            found = await declared(index, storage)
            sizes = {file: item.facts and item.facts.size for file, item in found.items()}
            return sizes == {SEALED: 2, CACHE: 3, unknown: 6}

        await until(declared_again)
        (path / str(SEALED)).unlink()
        with pytest.raises(NotFound):
            await store.open_file(SEALED)
        await until_declared(index, storage, [CACHE, unknown])


async def test_listing(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED, b"12345")
    put(path, CACHE, {"p_aux": b"1"})
    (path / "sealed" / "s-t01000-1").mkdir()
    (path / "sealed" / "s-t01000-2").symlink_to("nowhere")
    store = make_store(index)
    await store.attach(str(path))
    assert (await store.listing(SEALED)).size == 5
    (member,) = (await store.listing(CACHE)).members or ()
    assert (member.name, member.size) == ("p_aux", 1)
    for number in (1, 3):
        with pytest.raises(NotFound):
            await store.listing(sector_file(FileType.SEALED, number))
    with pytest.raises(DiskError, match="link to nothing"):
        await store.listing(sector_file(FileType.SEALED, 2))


# Space


async def test_stat(index: SwitchedIndex, path: Path) -> None:
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    space = await store.stat(storage)
    usage = os.statvfs(path)
    assert space.capacity == usage.f_blocks * usage.f_frsize
    assert store.filesystem(storage) == device(path)
    assert store.filesystem("elsewhere") is None  # type: ignore[arg-type]  # never parsed
    assert store.path_of("elsewhere") is None  # type: ignore[arg-type]  # never parsed
    with pytest.raises(NotFound):
        await store.stat("elsewhere")  # type: ignore[arg-type]  # never parsed
    store.paths()[0].fail(StorageUnavailable("gone"))
    with pytest.raises(StorageUnavailable):
        await store.stat(storage)


async def test_a_limit_counts_what_is_allocated(index: SwitchedIndex, tmp_path: Path) -> None:
    path = tmp_path / "p"
    make_path(path, max_storage=1 << 20)
    put(path, SEALED, b"1" * 300_000)
    with (path / "sealed" / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    os.link(path / str(SEALED), path / "sealed" / "same-again")
    store = make_store(index, heartbeat=0.05)
    await store.attach(str(path))
    (status,) = await index.storages()
    assert (status.stat.max, status.stat.available) == (1 << 20, 0)  # not known yet: no room
    async with running(store):

        async def measured() -> bool:
            return (await index.storages())[0].stat.used > 0

        await until(measured)
    (status,) = await index.storages()
    assert 300_000 <= status.stat.used < 400_000
    assert status.stat.available == (1 << 20) - status.stat.used


async def test_a_mount_that_hangs_at_start_holds_one_thread(
    index: SwitchedIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, SEALED)
    release = threading.Event()
    attempts: list[str] = []
    real = local_module._examine

    def hang(where: str) -> object:
        attempts.append(where)
        release.wait()
        return real(where)

    monkeypatch.setattr(local_module, "_examine", hang)
    store = make_store(index, heartbeat=0.02, timeouts=TimeoutsConfig(disk=0.05))
    try:
        await store.attach_all([str(path)])
        assert "no answer" in store.waiting()[str(path)]
        for _ in range(5):
            await store.attach_all(list(store.waiting()))
        assert len(attempts) == 1
        release.set()
        async with running(store):
            await until(lambda: not store.waiting())
            await until_declared(index, store.paths()[0].storage, [SEALED])
    finally:
        release.set()


async def test_figures_of_a_detached_path_are_gone(index: SwitchedIndex, path: Path) -> None:
    def shown() -> bool:
        samples = next(iter(metrics.STORAGE_HEALTHY.collect())).samples
        return storage in [sample.labels["storage"] for sample in samples]

    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    await store._keepers[storage].beat()
    assert shown()
    await store.detach(storage)
    assert not shown()
