"""Changes found by themselves: inotify where it works, looks and scans where it does not."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from sectorfs.config import StorageConfig
from sectorfs.stores import watch
from sectorfs.stores.keeper import Keeper
from sectorfs.stores.local import LocalStore
from sectorfs.stores.watch import Listener, Watcher
from sectorfs.types import FileType, SectorFile, StorageID, parse_storage_id
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
    until_declared,
)

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)
LOOKS = StorageConfig(settle=0.05, look=0.1, rescan=3600)
RESCANS = StorageConfig(settle=0.05, look=3600, rescan=0.2)


index = an_index
path = a_path


async def size_of(index: SwitchedIndex, storage: StorageID, file: SectorFile) -> int | None:
    found = (await declared(index, storage)).get(file)
    return found.facts.size if found is not None and found.facts is not None else None


async def until_size(index: SwitchedIndex, storage: StorageID, file: SectorFile, size: int) -> None:
    async def same() -> bool:
        return await size_of(index, storage, file) == size

    await until(same)


async def test_files_that_come_change_and_go(index: SwitchedIndex, path: Path) -> None:
    (path / "sealed").mkdir()
    store = make_store(index, watch=True)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        target = put(path, SEALED, b"1", age=0)  # written in place
        await until_declared(index, storage, [SEALED])
        with target.open("ab") as file:
            file.write(b"2")
        await until_size(index, storage, SEALED, 2)
        (path / "sealed" / "s-t01000-7.tmp").write_bytes(b"333")
        (path / "sealed" / "s-t01000-7.tmp").rename(target)  # replaced
        await until_size(index, storage, SEALED, 3)
        moved = sector_file(FileType.SEALED, 8)
        target.rename(path / str(moved))
        await until_declared(index, storage, [moved])
        (path / str(moved)).rename(path / "elsewhere")
        await until_declared(index, storage, [])
        (path / "elsewhere").rename(target)
        await until_declared(index, storage, [SEALED])
        target.unlink()
        await until_declared(index, storage, [])


async def test_sector_directories_while_they_are_filled(index: SwitchedIndex, path: Path) -> None:
    (path / "cache").mkdir()
    store = make_store(index, watch=True)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        put(path, CACHE, {"p_aux": b"1"}, age=0)
        await until_size(index, storage, CACHE, 1)
        (path / str(CACHE) / "t_aux").write_bytes(b"22")  # long after it settled
        await until_size(index, storage, CACHE, 3)
        (path / str(CACHE) / "p_aux").unlink()
        await until_size(index, storage, CACHE, 2)
        shutil.rmtree(path / str(CACHE))
        await until_declared(index, storage, [])


async def test_type_directories_that_are_made_later(index: SwitchedIndex, path: Path) -> None:
    store = make_store(index, watch=True)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        (path / "update").mkdir()
        first = sector_file(FileType.UPDATE, 1)
        put(path, first)
        await until_declared(index, storage, [first])
        second = sector_file(FileType.UPDATE, 2)
        put(path, second)
        await until_declared(index, storage, [first, second])
        (path / "update").rename(path / "aside")
        await until_declared(index, storage, [])
        (path / "aside").rename(path / "update")
        await until_declared(index, storage, [first, second])


async def test_a_burst_is_few_scans(index: SwitchedIndex, path: Path) -> None:
    (path / "sealed").mkdir()
    store = make_store(index, watch=True)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        await until(lambda: store.paths()[0].watched)
        index.calls.clear()
        files = [sector_file(FileType.SEALED, number) for number in range(10_000)]
        for file in files:
            (path / str(file)).touch()

        async def all_declared() -> bool:
            page = await index.index.declarations(storage, after=files[-2])
            return bool(page) and (await count(index, storage)) == len(files)

        await until(all_declared, within=60)
    assert index.calls.count("declare") < 60


async def count(index: SwitchedIndex, storage: StorageID) -> int:
    total, after = 0, None
    while page := await index.index.declarations(storage, after=after):
        total += len(page)
        after = page[-1].file
    return total


async def test_names_that_are_none_are_nobodys_business(index: SwitchedIndex, path: Path) -> None:
    (path / "sealed").mkdir()
    store = make_store(index, watch=True)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        for name in ("lost+found", "s-t01000-7.tmp", "x" * 255):
            (path / "sealed" / name).write_text("")
        (path / "other").mkdir()
        put(path, SEALED)
        await until_declared(index, storage, [SEALED])
        assert not store.paths()[0].trouble


async def test_a_missing_sectorstore_json_is_noticed_before_the_next_heartbeat(
    index: SwitchedIndex, path: Path
) -> None:
    put(path, SEALED)
    store = make_store(index, watch=True, heartbeat=3600)
    storage = (await store.attach(str(path))).storage
    (local,) = store.paths()
    async with running(store):
        await until(lambda: "report_health" in index.calls)
        (path / "sectorstore.json").rename(path / "aside")
        await until(lambda: not local.available)
        shutil.rmtree(path / "sealed")
        (path / "aside").rename(path / "sectorstore.json")
        await until(lambda: local.available)
        await until_declared(index, storage, [])


def queue_limit() -> int:
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


async def test_lost_events_are_made_up_for_by_a_scan(
    index: SwitchedIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path / "sealed").mkdir()
    limit = queue_limit()
    store = make_store(index, watch=True)
    storage = (await store.attach(str(path))).storage  # watched, and nobody reads events yet
    files = [sector_file(FileType.SEALED, number) for number in range(10)]
    for number in range(limit // 2):
        name = path / "sealed" / f"odd{number}.tmp"
        name.touch()
        name.unlink()
    for file in files:
        put(path, file)
    async with running(store):
        await until_declared(index, storage, files)
    assert "the kernel lost events" in caplog.text


# Without watches


def no_watches(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Refusing(watch.INotify):  # type: ignore[misc]  # the library has no types
        def add_watch(self, name: Any, mask: int) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(watch, "INotify", Refusing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
async def test_looks_do_when_watches_run_out(
    index: SwitchedIndex,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    no_watches(monkeypatch, number)
    put(path, CACHE, {"p_aux": b"1"})
    store = make_store(index, watch=True, storage=LOOKS)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        put(path, SEALED)
        await until_declared(index, storage, [CACHE, SEALED])
        (path / str(SEALED)).unlink()
        put(path, sector_file(FileType.CACHE, 8), {"p_aux": b"1"}, age=0)
        await until_declared(index, storage, [CACHE, sector_file(FileType.CACHE, 8)])
    lines = [record for record in caplog.records if "cannot watch" in record.message]
    assert len(lines) == (1 if number == errno.ENOSPC else 0)


async def test_looks_do_without_an_inotify_instance(
    index: SwitchedIndex,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(watch, "INotify", refuse)
    store = make_store(index, watch=True, storage=LOOKS)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        put(path, SEALED)
        await until_declared(index, storage, [SEALED])
    assert "cannot watch directories (Too many open files)" in caplog.text


async def test_looks_find_what_changes_on_a_network(
    index: SwitchedIndex, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_local_devices", frozenset)
    put(path, SEALED)
    store = make_store(index, watch=True, storage=LOOKS)
    storage = (await store.attach(str(path))).storage
    (local,) = store.paths()
    async with running(store):
        await until(lambda: local.watched)
        assert not any(local.watched.values())
        assert store._watcher is not None
        store._watcher.forget(storage)  # as if the change came from another machine
        (path / str(SEALED)).unlink()
        await until_declared(index, storage, [])


async def test_a_look_at_a_quiet_path_scans_nothing(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED)
    os.utime(path / "sealed", (1, 1))
    store = make_store(index, storage=LOOKS)
    storage = (await store.attach(str(path))).storage
    await store._keepers[storage].look_at_types()
    assert not store.paths()[0].dirty


async def test_a_look_does_not_trust_the_time_of_a_directory_that_just_changed(
    index: SwitchedIndex, path: Path
) -> None:
    put(path, SEALED)
    store = make_store(index, storage=LOOKS)
    storage = (await store.attach(str(path))).storage
    await store._keepers[storage].look_at_types()
    assert store.paths()[0].dirty == {FileType.SEALED: False}


async def test_a_rescan_finds_what_nothing_else_told(index: SwitchedIndex, path: Path) -> None:
    target = put(path, SEALED, b"1")
    store = make_store(index, storage=RESCANS)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        target.write_bytes(b"22")  # in place: the directory's time stays
        await until_size(index, storage, SEALED, 2)


async def test_a_type_directory_in_trouble_is_tried_again(
    index: SwitchedIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path / "sealed").symlink_to("sealed")
    store = make_store(index, watch=True, storage=LOOKS)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        (path / "sealed").unlink()
        put(path, SEALED)
        await until_declared(index, storage, [SEALED])
        assert store.paths()[0].trouble == {}


async def test_a_fault_in_a_task_does_not_end_it(
    index: SwitchedIndex,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (path / "sealed").mkdir()
    real = Keeper.settle_due
    faults = iter([ValueError("a fault of ours")])

    async def settle_due(keeper: Keeper) -> int:
        fault = next(faults, None)
        if fault is not None:
            raise fault
        return await real(keeper)

    monkeypatch.setattr(Keeper, "settle_due", settle_due)
    store = make_store(index, watch=True, heartbeat=0.05)
    storage = (await store.attach(str(path))).storage
    async with running(store):
        put(path, SEALED)
        await until_declared(index, storage, [SEALED])
    assert "look at new files failed" in caplog.text
    assert "a fault of ours" in caplog.text


# The watcher alone


class Heard:
    """What a listener was told."""

    def __init__(self) -> None:
        self.files: list[SectorFile] = []
        self.types: list[FileType] = []
        self.paths: list[StorageID] = []
        self.lost = 0

    def listener(self) -> Listener:
        def lost() -> None:
            self.lost += 1

        return Listener(
            file=lambda storage, file: self.files.append(file),
            type_directory=lambda storage, file_type: self.types.append(file_type),
            path=self.paths.append,
            lost=lost,
        )


STORAGE = parse_storage_id("a")


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def watcher(heard: Heard) -> AsyncIterator[Watcher]:
    watcher = Watcher(heard.listener())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watcher.run)
        yield watcher
        nursery.cancel_scope.cancel()
    watcher.close()


async def test_events_before_a_watch_is_adopted_are_replayed(
    watcher: Watcher, heard: Heard, path: Path
) -> None:
    (path / "sealed").mkdir()
    armed = watcher.arm_path(STORAGE, str(path))
    put(path, SEALED)
    await until(lambda: watcher._early)
    watcher.adopt(armed)
    assert SEALED in heard.files
    assert not watcher._early
    assert watcher._early_count == 0


async def test_early_events_are_bounded(
    watcher: Watcher, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EARLY_EVENTS", 5)
    (path / "sealed").mkdir()
    watcher.arm_path(STORAGE, str(path))
    for number in range(10):
        put(path, sector_file(FileType.SEALED, number))
    await until(lambda: watcher._early_count == 5)
    shutil.rmtree(path / "sealed")  # the watch ends before it was adopted
    await until(lambda: watcher._early_count <= 1)  # that of the path itself may be left


async def test_sector_watches_are_bounded(
    watcher: Watcher, heard: Heard, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SECTOR_WATCHES", 2)
    files = [sector_file(FileType.CACHE, number) for number in range(3)]
    for file in files:
        put(path, file, {"p_aux": b"1"})
        armed = watch.Armed(STORAGE)
        watcher.arm_sector(armed, file, str(path / str(file)))
        watcher.adopt(armed)
    for file in files:
        (path / str(file) / "t_aux").touch()
    await until(lambda: set(heard.files) == set(files[1:]))


async def test_a_forgotten_path_is_silent(watcher: Watcher, heard: Heard, path: Path) -> None:
    (path / "sealed").mkdir()
    watcher.adopt(watcher.arm_path(STORAGE, str(path)))
    other = path.parent / "q"
    (other / "key").mkdir(parents=True)
    watcher.adopt(watcher.arm_path(parse_storage_id("b"), str(other)))
    watcher.forget(STORAGE)
    put(path, SEALED)
    put(other, sector_file(FileType.KEY, 1))
    await until(lambda: heard.files)
    assert set(heard.files) == {sector_file(FileType.KEY, 1)}
    assert heard.types == []


async def test_a_closed_watcher_arms_nothing(watcher: Watcher, path: Path) -> None:
    watcher.close()
    assert watcher.arm_path(STORAGE, str(path)).watches == []
    watcher.close()


async def test_cancelling_a_store_gives_its_watches_back(index: SwitchedIndex, path: Path) -> None:
    def instances() -> int:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds()]
        return sum("inotify" in link for link in links)

    before = instances()
    store: LocalStore = make_store(index, watch=True)
    await store.attach(str(path))
    async with running(store):
        assert instances() == before + 1
    assert instances() == before


def fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
