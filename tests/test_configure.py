"""Settings of an attached path: when the Index is away, the caller goes, or the catalog lags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from sectorfs.config import Config
from sectorfs.errors import BadInput, NotFound, StorageUnavailable, TimedOut, Unreachable
from sectorfs.index.catalog import Catalog
from sectorfs.index.protocol import FsStat, StorageInfo
from sectorfs.node.admin import LocalAdmin
from sectorfs.node.hashing import LocalHashing
from sectorfs.node.repo import Repo
from sectorfs.stores.path_changes import PathChanges
from sectorfs.types import StorageID
from tests.cli_fixtures import settings_of
from tests.local_fixtures import (
    SwitchedIndex,
    an_index,
    make_path,
    make_store,
    running,
)
from tests.local_fixtures import until as until_true

index = an_index


class Hanging(SwitchedIndex):
    """An Index that hangs instead of failing."""

    def __getattr__(self, name: str) -> Any:
        method = super().__getattr__(name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.away:
                await trio.sleep_forever()
            return await method(*args, **kwargs)

        return call


async def test_caller_that_goes_while_the_index_hangs(index: SwitchedIndex, tmp_path: Path) -> None:
    """The file is changed; the next heartbeat tells the Index; the next change need not wait."""
    hanging = Hanging(index.index)
    store = make_store(hanging)
    storage = make_path(tmp_path / "disk")
    await store.attach(str(tmp_path / "disk"))
    [path] = store.paths()
    hanging.away = True
    with trio.move_on_after(0.2) as scope:
        await store.configure(storage, PathChanges(weight=3))
    assert scope.cancelled_caught
    assert settings_of(tmp_path / "disk")["Weight"] == 3
    assert not path.attached
    hanging.away = False
    async with running(store):

        async def told() -> bool:
            return (await index.index.info(storage)).weight == 3

        await until_true(told)
        assert path.attached
    await store.configure(storage, PathChanges(weight=4))
    assert (await index.index.info(storage)).weight == 4


async def test_index_that_does_not_answer(index: SwitchedIndex, tmp_path: Path) -> None:
    store = make_store(index)
    storage = make_path(tmp_path / "disk")
    await store.attach(str(tmp_path / "disk"))
    index.away = True
    with pytest.raises(Unreachable):
        await store.configure(storage, PathChanges(weight=3))
    assert not store.paths()[0].attached
    index.away = False
    before, after = await store.configure(storage, PathChanges(weight=3))
    assert before == after
    assert (await index.index.info(storage)).weight == 3
    assert store.paths()[0].attached


@pytest.mark.parametrize("runs", [True, False])
async def test_limit_is_counted_at_once(index: SwitchedIndex, tmp_path: Path, runs: bool) -> None:
    """Without a node nobody measures, so nothing may be placed yet."""
    store = make_store(index, heartbeat=0.2)
    storage = make_path(tmp_path / "disk")
    await store.attach(str(tmp_path / "disk"))

    async def stat() -> FsStat:
        [status] = await index.index.storages()
        return status.stat

    if not runs:
        await store.configure(storage, PathChanges(max_storage=1 << 30))
        found = await stat()
        assert (found.max, found.available) == (1 << 30, 0)
        return
    async with running(store):
        await store.configure(storage, PathChanges(max_storage=1 << 30))

        async def measured() -> bool:
            return 0 < (await stat()).available < 1 << 30 == (await stat()).max

        await until_true(measured)


async def test_path_that_is_not_there(index: SwitchedIndex, tmp_path: Path) -> None:
    store = make_store(index)
    with pytest.raises(NotFound):
        await store.configure("nobody", PathChanges(weight=3))
    storage = make_path(tmp_path / "disk")
    await store.attach(str(tmp_path / "disk"))
    [path] = store.paths()
    path.fail(StorageUnavailable("no answer", path.path))
    with pytest.raises(StorageUnavailable, match="no answer"):
        await store.configure(storage, PathChanges(weight=3))
    assert settings_of(tmp_path / "disk")["Weight"] == 10


async def test_bad_change_leaves_all_as_it_was(index: SwitchedIndex, tmp_path: Path) -> None:
    store = make_store(index)
    storage = make_path(tmp_path / "disk")
    await store.attach(str(tmp_path / "disk"))
    with pytest.raises(BadInput):
        await store.configure(storage, PathChanges(deny_types=("x",)))
    assert (await index.index.info(storage)).deny_types == ()
    assert settings_of(tmp_path / "disk")["DenyTypes"] is None


async def test_dead_storage_is_not_judged_by_an_old_catalog(
    index: SwitchedIndex, tmp_path: Path
) -> None:
    """What looks like a second copy may have gone since."""

    async def caught_up() -> None:
        """It never does."""

    url = "http://127.0.0.1:9/remote"
    repo = Repo(tmp_path / "repo")
    await index.index.attach(StorageInfo(storage=StorageID("dead"), urls=(url,)), FsStat())
    admin = LocalAdmin(
        repo=repo,
        index=index,  # type: ignore[arg-type]  # a proxy
        catalog=Catalog(),
        local=make_store(index),
        peers=None,  # type: ignore[arg-type]  # nobody is asked
        config=Config(),
        caught_up=caught_up,
        state=None,
        moves=None,  # type: ignore[arg-type]  # nothing is moved
        caching=None,
        hashing=LocalHashing(repo, None),
    )
    with pytest.raises(TimedOut, match="behind the Index"):
        await admin.detach("dead", force=True)
    assert len(await index.index.storages()) == 1
