"""A disk mounted on a type directory: unmounted, it must not look like no files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectorfs.errors import DiskError
from sectorfs.stores.metadata import read_metadata
from sectorfs.types import FileType
from tests.local_fixtures import (
    SwitchedIndex,
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
OTHER = sector_file(FileType.SEALED, 8)
UNSEALED = sector_file(FileType.UNSEALED, 7)


index = an_index


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A storage path whose ``sealed`` is a file system of its own."""
    path = tmp_path / "p"
    make_path(path)
    (path / "sealed").mkdir()
    os.utime(path / "sealed", (1e9, 1e9))  # mount points are made long before the files
    mount(path)
    yield path
    subprocess.run(["umount", "-l", path / "sealed"], stderr=subprocess.DEVNULL)


def mount(path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", path / "sealed"], check=True)


def unmount(path: Path) -> None:
    subprocess.run(["umount", "-l", path / "sealed"], check=True)


async def test_unmounted_while_attached(
    index: SwitchedIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(path, SEALED, b"12345")
    put(path, UNSEALED, b"1")
    store = make_store(index, watch=True)
    async with running(store):
        storage = (await store.attach(str(path))).storage
        await until_declared(index, storage, {SEALED, UNSEALED})
        unmount(path)
        (local,) = store.paths()
        local.mark_dirty(deep=True)
        await until(lambda: FileType.SEALED in local.trouble)
        assert "is its disk mounted?" in local.health_error()
        local.note(SEALED)  # what an open that found nothing does
        (path / "unsealed" / "s-t01000-7").unlink()
        await until_declared(index, storage, {SEALED})
        assert set(await declared(index, storage)) == {SEALED}
        mount(path)
        put(path, SEALED, b"12345")
        local.mark_dirty(deep=True)
        await until(lambda: not local.trouble)
    assert f"{path}/sealed: is empty" in caplog.text
    caplog.clear()


async def test_not_mounted_when_a_node_starts(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED, b"12345")
    storage = (await make_store(index).attach(str(path))).storage
    unmount(path)
    store = make_store(index)
    await store.attach_all([str(path)])
    with pytest.raises(DiskError, match="older than the files declared in it"):
        await keeper_scan(store)
    assert set(await declared(index, storage)) == {SEALED}


async def keeper_scan(store: object) -> None:
    (keeper,) = store._keepers.values()  # type: ignore[attr-defined]
    await keeper.scan(drop=True, deep=True)


async def test_an_operator_may_say_that_they_are_gone(index: SwitchedIndex, path: Path) -> None:
    put(path, SEALED, b"12345")
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    unmount(path)
    counts = await store.redeclare(str(path), drop_missing=True)
    assert counts.dropped == 1
    assert not await declared(index, storage)


async def test_files_that_are_removed_are_dropped_to_the_last(
    index: SwitchedIndex, path: Path
) -> None:
    for file in (SEALED, OTHER):
        put(path, file, b"12345")
    store = make_store(index)
    storage = (await store.attach(str(path))).storage
    for entry in (path / "sealed").iterdir():
        entry.unlink()
    await keeper_scan(store)
    assert not await declared(index, storage)
    assert read_metadata(str(path)).info.storage == storage
