"""Storage paths whose disk falls silent, and paths that clash at a start."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from sectorfs import metrics
from sectorfs.config import TimeoutsConfig
from sectorfs.errors import StorageUnavailable
from sectorfs.stores import local as local_module
from sectorfs.stores import pulse
from sectorfs.types import FileType
from tests.local_fixtures import (
    SwitchedIndex,
    declared,
    make_path,
    make_store,
    put,
    running,
    sector_file,
    switched_index,
    until,
)

SEALED = sector_file(FileType.SEALED, 7)
DISK = 0.2


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[SwitchedIndex]:
    async with switched_index(tmp_path) as switched:
        yield switched


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_path(tmp_path / "p")
    put(tmp_path / "p", SEALED, b"12345")
    return tmp_path / "p"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Probes hang while it is closed; it is open at first."""
    gate = threading.Event()
    gate.set()
    monkeypatch.setattr(pulse, "ask_disk", lambda path: gate.wait())
    yield gate
    gate.set()


async def test_a_disk_that_falls_silent_is_marked_and_comes_back_by_itself(
    index: SwitchedIndex, path: Path, gate: threading.Event
) -> None:
    store = make_store(index, timeouts=TimeoutsConfig(disk=DISK))  # a heartbeat comes in an hour
    async with running(store):
        storage = (await store.attach(str(path))).storage
        (local,) = store.paths()
        gate.clear()
        with pytest.raises(StorageUnavailable):
            await local.lane.run(gate.wait, what="read")
        assert not local.available

        async def told() -> bool:
            (status,) = await index.storages()
            return bool(status.error == "read: no answer within 0.2 s (check the disk)")

        await until(told)
        started = trio.current_time()
        with pytest.raises(StorageUnavailable, match=r"read: no answer within 0.2 s"):
            await store.open_at(storage, SEALED)
        assert trio.current_time() - started < DISK
        assert figure("sectorfs_storage_silent", storage) == 1
        assert figure("sectorfs_storage_silences_total", storage) == 1
        assert figure("sectorfs_storage_healthy", storage) == 0
        gate.set()
        await until(lambda: local.available)
        (await store.open_at(storage, SEALED)).close()
        assert figure("sectorfs_storage_silent", storage) == 0
        assert set(await declared(index, storage)) == {SEALED}
        await store.detach(storage)
        assert figure("sectorfs_storage_silent", storage) is None


def figure(name: str, storage: str) -> float | None:
    """A metric of a storage as it is exposed."""
    found = {
        sample.name: sample.value
        for metric in (metrics.STORAGE_SILENT, metrics.STORAGE_SILENCES, metrics.STORAGE_HEALTHY)
        for family in metric.collect()
        for sample in family.samples
        if sample.labels["storage"] == storage
    }
    return found.get(name)


async def test_an_open_that_is_slow_on_a_disk_that_answers_marks_nothing(
    index: SwitchedIndex, path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(index, timeouts=TimeoutsConfig(disk=DISK))
    release = threading.Event()
    opened = os.open

    def slow(name: str | bytes | os.PathLike[str], *arguments: int) -> int:
        if str(name).endswith(str(SEALED)):
            release.wait()
        return opened(name, *arguments)

    storage = (await store.attach(str(path))).storage
    (local,) = store.paths()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", slow)
            with pytest.raises(StorageUnavailable, match="no answer"):
                await store.open_at(storage, SEALED)
        assert local.available
        (await store.open_at(storage, SEALED)).close()
    finally:
        release.set()
    await until(lambda: local.lane.busy == 0)


# Two paths with one id


@pytest.fixture
def twins(tmp_path: Path, path: Path) -> list[str]:
    """Two directories with one id, as after ``cp -a``."""
    shutil.copytree(path, tmp_path / "twin")
    return [str(path), str(tmp_path / "twin")]


class Slow:
    """Looks at a directory that end when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self._examine = local_module._examine
        monkeypatch.setattr(local_module, "_examine", self._wait)

    def _wait(self, where: str) -> local_module._Found:
        gate = self.gates.get(where)
        if gate is not None:
            gate.wait()
        found = self._examine(where)
        self.ended.append(where)
        return found


@pytest.mark.parametrize("first", [0, 1])
async def test_of_two_paths_with_one_id_the_first_in_the_list_is_attached(
    index: SwitchedIndex,
    twins: list[str],
    tmp_path: Path,
    first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = tmp_path / "broken"  # what fails at once must not make the way free
    broken.mkdir()
    listed = [twins[first], twins[1 - first]]
    monkeypatch.setattr(local_module, "TURN_SECONDS", 60.0)
    slow = Slow(monkeypatch)
    gate = slow.gates[listed[0]] = threading.Event()
    store = make_store(index)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.attach_all, [listed[0], str(broken), listed[1]])
            await until(lambda: slow.ended == [listed[1]])  # the later disk is the faster one
            gate.set()
    finally:
        gate.set()
    assert [local.path for local in store.paths()] == listed[:1]
    assert set(store.waiting()) == {str(broken), listed[1]}
    reason = store.waiting()[listed[1]]
    assert f"attached from {listed[0]}" in reason
    assert listed[1] in reason


async def test_a_disk_that_hangs_holds_up_no_path_listed_after_it(
    index: SwitchedIndex, twins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "TURN_SECONDS", 0.05)
    slow = Slow(monkeypatch)
    gate = slow.gates[twins[0]] = threading.Event()
    store = make_store(index, timeouts=TimeoutsConfig(disk=60))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.attach_all, twins)
            await until(lambda: [local.path for local in store.paths()] == twins[1:])
            gate.set()
    finally:
        gate.set()
    assert f"attached from {twins[1]}" in store.waiting()[twins[0]]


async def test_one_directory_listed_twice_is_one_storage(
    index: SwitchedIndex, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(path)
    store = make_store(index)
    await store.attach_all([str(tmp_path / "link"), str(path)])
    assert [local.path for local in store.paths()] == [str(tmp_path / "link")]
    assert store.waiting() == {}
