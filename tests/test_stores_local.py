"""`LocalStore` on real directories: attach, scan, open, heartbeats, disks that vanish or hang."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

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
from sectorfs.stores.lanes import Lane
from sectorfs.stores.local import LocalStore
from sectorfs.stores.metadata import METADATA_NAME, init_cache_path, read_metadata
from sectorfs.types import Facts, FileType, StorageID
from tests.local_fixtures import (
    FAST,
    URL,
    SwitchedIndex,
    declared,
    make_path,
    make_store,
    put,
    running,
    sector_file,
    switched_index,
    until,
    until_declared,
)

SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[SwitchedIndex]:
    async with switched_index(tmp_path) as switched:
        yield switched


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_path(tmp_path / "p")
    return tmp_path / "p"


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
