"""Storage paths in temporary directories, and an Index that can be away."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sectorfs.config import StorageConfig, TimeoutsConfig
from sectorfs.errors import Unreachable
from sectorfs.index.protocol import Declaration, SectorIndex
from sectorfs.index.sqlite import SqliteIndex
from sectorfs.stores.local import LocalStore
from sectorfs.stores.metadata import init_path
from sectorfs.types import FileType, SectorFile, SectorID, StorageID

URL = "http://127.0.0.1:8480/remote"
FAST = StorageConfig(settle=0.1, look=3600, rescan=3600)
TIMEOUTS = TimeoutsConfig(disk=10)


class SwitchedIndex:
    """An Index whose calls fail while `away` is set; counts what it is asked."""

    def __init__(self, index: SqliteIndex) -> None:
        self.index = index
        self.away = False
        self.away_for: set[str] = set()
        self.calls: list[str] = []
        self.errors: dict[StorageID, str] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.index, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if self.away or name in self.away_for:
                await trio.lowlevel.checkpoint()
                raise Unreachable("does not answer", "index")
            return await method(*args, **kwargs)

        return call


@asynccontextmanager
async def switched_index(directory: Path) -> AsyncIterator[SwitchedIndex]:
    """An embedded Index in a file, with a switch."""
    async with SqliteIndex.open(directory / "index.db", cutoff=50) as index:
        yield SwitchedIndex(index)


@pytest.fixture
async def an_index(tmp_path: Path) -> AsyncIterator[SwitchedIndex]:
    """An embedded Index; a test module gives it a name by assignment."""
    async with switched_index(tmp_path) as switched:
        yield switched


@pytest.fixture
def a_path(tmp_path: Path) -> Path:
    """An initialised storage path; likewise."""
    make_path(tmp_path / "p")
    return tmp_path / "p"


def make_store(index: SectorIndex | SwitchedIndex, **changes: Any) -> LocalStore:
    """A store with short times; `changes` replace arguments."""
    arguments: dict[str, Any] = {
        "urls": (URL,),
        "timeouts": TIMEOUTS,
        "storage": FAST,
        "heartbeat": 3600.0,
        "watch": False,
    }
    return LocalStore(index, **{**arguments, **changes})  # type: ignore[arg-type]  # a proxy


@asynccontextmanager
async def running(store: LocalStore) -> AsyncIterator[None]:
    """`store.run` in the background."""
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        yield
        nursery.cancel_scope.cancel()


def make_path(path: Path, **options: Any) -> StorageID:
    """An initialised storage path."""
    return init_path(str(path), **{"can_seal": False, "can_store": True, **options}).storage


def sector_file(file_type: FileType, number: int, miner: int = 1000) -> SectorFile:
    return SectorFile(file_type, SectorID(miner, number))


def put(
    path: Path, file: SectorFile, content: bytes | dict[str, bytes] = b"sector", *, age: float = 100
) -> Path:
    """Write a sector file that was last changed `age` seconds ago."""
    target = path / str(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        target.mkdir(exist_ok=True)
        for name, data in content.items():
            (target / name).write_bytes(data)
            _age(target / name, age)
    else:
        target.write_bytes(content)
    _age(target, age)
    return target


def _age(path: Path, age: float) -> None:
    when = time.time() - age
    os.utime(path, (when, when))


async def declared(index: Any, storage: StorageID) -> dict[SectorFile, Declaration]:
    """Everything a storage declared."""
    inner: SectorIndex = index.index if isinstance(index, SwitchedIndex) else index
    return {item.file: item for item in await inner.declarations(storage)}


async def until(check: Callable[[], Any], *, within: float = 15) -> None:
    """Wait until `check` (a function or an async one) is true."""
    with trio.fail_after(within):
        while True:
            result = check()
            if hasattr(result, "__await__"):
                result = await result
            if result:
                return
            await trio.sleep(0.02)


async def until_declared(
    index: Any, storage: StorageID, files: Sequence[SectorFile], *, within: float = 15
) -> None:
    """Wait until exactly `files` are declared."""
    seen: set[SectorFile] = set()

    async def same() -> bool:
        nonlocal seen
        seen = set(await declared(index, storage))
        return seen == set(files)

    try:
        await until(same, within=within)
    except trio.TooSlowError:
        raise AssertionError(f"declared {sorted(map(str, seen))}") from None
