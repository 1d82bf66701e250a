"""A node whose Index is away at its start: its own files at once, everybody's when it answers."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from sectorfs.errors import DiskError
from sectorfs.index.catalog import Catalog, FileChange
from sectorfs.node.own_files import OwnFiles
from sectorfs.stores.local import LocalStore
from sectorfs.stores.local_path import LocalPath
from sectorfs.types import FileType, SectorFile
from tests.cluster import Node, cluster, run, until
from tests.cluster_fixtures import OLD_NS, attach, configure, free_port, put, rescan, status
from tests.local_fixtures import (
    SwitchedIndex,
    make_path,
    make_store,
    running,
    sector_file,
    switched_index,
)
from tests.local_fixtures import put as put_sector
from tests.local_fixtures import until as eventually

AWAY = "has been away since this node's start: only its own files are shown"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """The Index's node and another, which know each other's files, and are stopped."""
    with cluster(tmp_path, "first", "second") as (first, second):
        listen = f"127.0.0.1:{free_port()}"
        configure(first)
        configure(second)
        first.start("--listen", listen)
        second.start(index=first)
        for node in (first, second):
            disk = node.root / f"{node.name}-disk"
            attach(node, disk)
            put(disk / f"sealed/s-t01000-{len(node.name)}", node.name.encode())
            put(disk / f"cache/s-t01000-{len(node.name)}/p_aux", b"p" * 64)
            os.utime(disk / f"cache/s-t01000-{len(node.name)}", ns=(OLD_NS, OLD_NS))
            rescan(node)
        for node in (second, first):
            node.stop()
        url = f"http://{listen}/rpc/v0"
        configure(second, index={"url": url}, storage={"settle": 0.1, "look": 0.5})
        yield first, second


OWN, OTHER = "s-t01000-6", "s-t01000-5"


@pytest.mark.mount
def test_a_node_shows_its_own_files_and_then_everybodys(pair: tuple[Node, Node]) -> None:
    first, second = pair
    second.start(mount=True)
    mount = second.mountpoint
    until("its own files", (mount / "sealed" / OWN).exists)
    until("its own directories", (mount / "cache" / OWN).exists)
    assert os.listdir(mount / "sealed") == [OWN]
    assert (mount / "sealed" / OWN).read_bytes() == b"second"
    assert (mount / "cache" / OWN / "p_aux").read_bytes() == b"p" * 64
    shown = status(second)
    assert any(AWAY in problem for problem in shown.problems)
    assert (shown.index.connected, shown.index.age) == (False, None)
    assert [one.path for one in shown.storages if one.files] == [str(second.root / "second-disk")]
    (disk,) = [one for one in shown.storages if one.files]
    assert (disk.healthy, disk.error) == (True, None)
    metadata = second.root / "second-disk/sectorstore.json"
    metadata.rename(f"{metadata}.away")  # as an unmounted disk looks
    until("the path to be shown unhealthy", lambda: is_away(second, disk.storage))
    os.rename(f"{metadata}.away", metadata)
    until("the path to be well", lambda: not is_away(second, disk.storage))
    assert run("storage", "list", repo=second.repo.root).returncode == 5
    put(second.root / "second-disk/sealed/s-t01000-7", b"later")
    until("a file that comes meanwhile", (mount / "sealed/s-t01000-7").exists)
    numbers = {
        name: (mount / "sealed" / name).stat().st_ino for name in os.listdir(mount / "sealed")
    }

    first.start("--listen", second.repo.config().index.url.split("/")[2])
    seen = set[str]()

    def complete() -> bool:
        names = os.listdir(mount / "sealed")
        seen.update(names)
        assert OWN in names, "what was shown never goes"
        return {OTHER, OWN, "s-t01000-7"} <= set(names)

    until("everybody's files", complete)
    assert (mount / "sealed" / OTHER).read_bytes() == b"first"
    after = {name: (mount / "sealed" / name).stat().st_ino for name in numbers}
    assert after == numbers
    until("no problem to be left", lambda: not status(second).problems)


def is_away(node: Node, storage: str) -> bool:
    """A path is shown as lost, by its own node, with the Index away."""
    (shown,) = [one for one in status(node).storages if one.storage == storage]
    return not shown.healthy and "sectorstore.json is gone" in str(shown.error)


@pytest.mark.mount
def test_the_background_start_tells_of_it(pair: tuple[Node, Node]) -> None:
    _, second = pair
    second.mountpoint.mkdir()
    command = ["mount", str(second.mountpoint), "--daemon", "--listen", "127.0.0.1:0"]
    try:
        started = run(*command, repo=second.repo.root)
        assert started.returncode == 0
        assert AWAY in started.stderr
        assert started.stderr.startswith("sectorfs: the Index at http://127.0.0.1:")
    finally:
        run("umount", str(second.mountpoint), repo=second.repo.root)


def test_an_index_that_hangs_holds_up_no_start(pair: tuple[Node, Node]) -> None:
    _, second = pair
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/rpc/v0"
        refused = run("serve", "--listen", "127.0.0.1:0", "--index", url, repo=second.repo.root)
        assert refused.returncode == 5, "an Index that never answered is a mistake"
        second.repo.note_index(url)
        started = time.monotonic()
        second.start("--index", url)
        assert time.monotonic() - started < 10
        assert any(AWAY in problem for problem in status(second).problems)
        second.send(signal.SIGTERM)
        assert second.process is not None
        assert second.process.wait(10) == 0


# The task itself


class World:
    """One storage path, a catalog and an Index that is away."""

    def __init__(self, path: Path, store: LocalStore) -> None:
        self.path = path
        self.store = store
        self.catalog = Catalog()
        self.changes: list[FileChange] = []
        self.answered = False

    def own_files(self) -> OwnFiles:
        return OwnFiles(
            self.store,
            self.catalog,
            answered=lambda: self.answered,
            on_change=self.changes.extend,
            heartbeat=0.02,
            look=0.02,
        )

    def shown(self) -> set[SectorFile]:
        return {file for path in self.store.paths() for file in self.catalog.files_of(path.storage)}


SEALED = [sector_file(FileType.SEALED, number) for number in range(4)]
CACHE = sector_file(FileType.CACHE, 1)


@pytest.fixture
async def index(tmp_path: Path) -> AsyncIterator[SwitchedIndex]:
    async with switched_index(tmp_path) as switched:
        switched.away = True
        yield switched


@pytest.fixture
async def world(index: SwitchedIndex, tmp_path: Path) -> AsyncIterator[World]:
    make_path(tmp_path / "p")
    store = make_store(index)
    async with running(store):
        await store.attach_all([str(tmp_path / "p")])
        yield World(tmp_path / "p", store)


async def test_what_is_quiet_is_shown_and_what_goes_goes(world: World) -> None:
    put_sector(world.path, SEALED[0], b"123")
    put_sector(world.path, CACHE, {"p_aux": b"1", "t_aux": b"22"})
    put_sector(world.path, SEALED[1], age=0)  # may still grow
    (world.path / "sealed/s-t01000-9.tmp").write_bytes(b"odd")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.own_files().run)
        await eventually(lambda: world.shown() == {SEALED[0], CACHE})
        entry = world.catalog.entry(CACHE)
        assert entry is not None
        assert entry.facts is not None
        assert [member.name for member in entry.facts.members or ()] == ["p_aux", "t_aux"]
        (path,) = world.store.paths()
        assert world.catalog.healthy(path.storage, trio.current_time(), 50)
        put_sector(world.path, SEALED[2])
        (world.path / str(SEALED[0])).unlink()
        await eventually(lambda: world.shown() == {SEALED[2], CACHE})
        assert [change.file for change in world.changes if change.vanished] == [SEALED[0]]
        world.answered = True  # and it ends
    assert not world.catalog.loaded


async def test_an_answer_of_the_index_ends_it_between_two_slices(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sector(world.path, SEALED[0])
    look: Callable[..., object] = LocalPath.look

    async def answer_meanwhile(self: LocalPath, files: list[SectorFile]) -> object:
        world.answered = True
        return await look(self, files)  # type: ignore[misc]  # it is async

    monkeypatch.setattr(LocalPath, "look", answer_meanwhile)
    with trio.fail_after(10):
        await world.own_files().run()
    assert (world.shown(), world.changes) == (set(), [])


async def test_a_type_that_cannot_be_read_hides_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_sector(world.path, SEALED[0])
    put_sector(world.path, CACHE, {"p_aux": b"1"})
    names = LocalPath.names

    async def fail(
        self: LocalPath, file_type: FileType, progress: Callable[[int], object]
    ) -> object:
        if file_type is FileType.SEALED:
            raise DiskError("broken", self.path)
        return await names(self, file_type, progress)

    monkeypatch.setattr(LocalPath, "names", fail)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.own_files().run)
        await eventually(lambda: world.shown() == {CACHE})
        nursery.cancel_scope.cancel()
    assert "broken" in caplog.text
