"""A node's stores without a node: paths, an Index, and what moves and removes files on them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from sectorfs.config import TimeoutsConfig
from sectorfs.index.protocol import Declaration, FsStat, HealthReport, StorageInfo
from sectorfs.server.routes import make_handler
from sectorfs.stores.acquire import Acquirer
from sectorfs.stores.local import LocalStore
from sectorfs.stores.moving import Mover
from sectorfs.stores.removal import Remover
from sectorfs.stores.scan import file_facts
from sectorfs.stores.space_ledger import SpaceLedger
from sectorfs.stores.transfer import PeerClient
from sectorfs.stores.turns import Turns
from sectorfs.types import FileType, SectorFile, StorageID
from sectorfs.wire import tokens
from sectorfs.wire.client import Client
from sectorfs.wire.messages import Gone, Limits
from sectorfs.wire.server import Handler, serve
from tests import file_systems
from tests.local_fixtures import (
    URL,
    SwitchedIndex,
    declared,
    make_path,
    make_store,
    put,
    sector_file,
    switched_index,
)
from tests.wire_fixtures import FolderFiles, running

OWNER = "node-under-test"
SECRET = tokens.Secret(bytes(range(32)))
SEALED = sector_file(FileType.SEALED, 7)
CACHE = sector_file(FileType.CACHE, 7)
UNSEALED = sector_file(FileType.UNSEALED, 7)
MEMBERS = {"p_aux": b"p" * 64, "t_aux": b"t" * 317, "sc-02-data-tree-d.dat": b"d" * 40_000}


class Rig:
    """The parts, and the paths by name."""

    def __init__(
        self,
        root: Path,
        index: SwitchedIndex,
        client: Client,
        nursery: trio.Nursery,
        **changes: Any,
    ) -> None:
        self.root = root
        self.nursery = nursery
        urls = frozenset(changes.get("urls", (URL,)))
        self.index = index
        self.store: LocalStore = make_store(
            index, account=lambda path: self.space.stat(path), **changes
        )
        self.space: SpaceLedger = SpaceLedger(self.store.paths, owner=OWNER)
        self.turns = Turns()
        self.remover = Remover(
            index=index,
            local=self.store,
            peers=PeerClient(client),
            turns=self.turns,
            owner=OWNER,
            own_urls=urls,
            cutoff=50,
            deadline=1,
        )
        self.mover = Mover(
            index=index,
            local=self.store,
            peers=PeerClient(client),
            space=self.space,
            remover=self.remover,
            turns=self.turns,
            owner=OWNER,
            own_urls=urls,
            deadline=1,
        )
        self.acquirer = Acquirer(
            index=index,
            local=self.store,
            space=self.space,
            mover=self.mover,
        )
        self.ids: dict[str, StorageID] = {}

    def path(self, name: str) -> Path:
        """Directory of a path."""
        return self.root / name

    async def add(self, name: str, **options: Any) -> StorageID:
        """Initialise a directory (made already or not) and attach it."""
        self.ids[name] = make_path(self.path(name), **options)
        await self.store.attach(str(self.path(name)))
        return self.ids[name]

    async def put(
        self,
        name: str,
        file: SectorFile,
        content: bytes | dict[str, bytes] | None = None,
        *,
        primary: bool = True,
    ) -> Path:
        """Write a file on a path and declare it."""
        if content is None:
            content = MEMBERS if file.file_type.is_directory else b"sector" * 10_000
        target = put(self.path(name), file, content)
        facts = file_facts(str(self.path(name)), self.ids[name], file)
        await self.index.declare([Declaration(file, self.ids[name], primary, facts)])
        return target

    async def holders(self, file: SectorFile) -> dict[str, bool]:
        """Names of the paths that declare a file, and whether primary."""
        found = {}
        for name, storage in self.ids.items():
            item = (await declared(self.index, storage)).get(file)
            if item is not None:
                found[name] = item.primary
        return found

    def litter(self) -> list[Path]:
        """What lies below any ``fetching`` directory, or under a temporary name."""
        return [
            path
            for name in self.ids
            for path in self.path(name).rglob("*")
            if "fetching" in path.parts[:-1] or path.name.endswith(".tmp")
        ]

    async def elsewhere(
        self, file: SectorFile, *, primary: bool, healthy: bool = True, url: str = ""
    ) -> None:
        """Have another node's storage declare a file: one that has it, or the one at `url`."""
        storage = StorageID("elsewhere")
        info = StorageInfo(storage=storage, urls=(url or await self._serve(file),), can_store=True)
        await self.index.attach(info, FsStat())
        report = HealthReport(stat=FsStat(), error="" if healthy else "dead")
        await self.index.report_health(storage, report)
        await self.index.declare([Declaration(file, storage, primary, None)])

    async def _serve(self, file: SectorFile) -> str:
        """A node that has a file; its base URL."""
        folder = self.root / "of another node"
        put(folder, file, MEMBERS if file.file_type.is_directory else b"sector" * 10_000)
        handler = make_handler(
            FolderFiles(folder), secret=SECRET, rpc=no_rpc, health=dict, status=str, deadline=5
        )
        return f"http://127.0.0.1:{await self.nursery.start(_serve, handler)}/remote"


async def no_rpc(body: bytes, permissions: frozenset[str], *, gone: Gone) -> tuple[int, bytes]:
    """For nodes that are asked for files only."""
    return 404, b""


async def _serve(handler: Handler, *, task_status: trio.TaskStatus[int]) -> None:
    async with running(handler) as port:
        task_status.started(port)
        await trio.sleep_forever()


@asynccontextmanager
async def rig(root: Path, *names: str, **changes: Any) -> AsyncIterator[Rig]:
    """Paths by name, all of which may store, and everything around them."""
    token = tokens.sign(SECRET, ("read", "admin"))
    async with (
        switched_index(root) as index,
        Client(TimeoutsConfig(), token=token) as client,
        trio.open_nursery() as nursery,
    ):
        found = Rig(root, index, client, nursery, **changes)
        for name in names:
            await found.add(name)
        yield found
        found.store.close()
        nursery.cancel_scope.cancel()


async def beat(parts: Rig) -> None:
    """Have every path told to the Index as it is."""
    for path in parts.store.paths():
        stat = await parts.store.stat(path.storage)
        await parts.index.report_health(path.storage, HealthReport(stat=stat))


@asynccontextmanager
async def two_nodes(root: Path) -> AsyncIterator[tuple[Rig, Rig]]:
    """Two sets of stores on one Index, each of which serves its paths."""
    listeners = [await trio.open_tcp_listeners(0, host="127.0.0.1") for _ in range(2)]
    ours, theirs = (
        f"http://127.0.0.1:{listener[0].socket.getsockname()[1]}/remote" for listener in listeners
    )
    async with (
        switched_index(root) as index,
        Client(TimeoutsConfig(), token=tokens.sign(SECRET, ("read", "admin"))) as client,
        trio.open_nursery() as nursery,
    ):
        here = Rig(root, index, client, nursery, urls=(ours,))
        away = Rig(root, index, client, nursery, urls=(theirs,))
        await away.add("theirs")
        await here.add("mine")
        for one, listener in ((here, listeners[0]), (away, listeners[1])):
            await beat(one)
            handler = make_handler(
                one.store,
                secret=SECRET,
                rpc=no_rpc,
                health=dict,
                status=str,
                deadline=5,
                remover=one.remover,
            )
            await nursery.start(partial(serve, handler, listener, limits=Limits()))
        yield here, away
        nursery.cancel_scope.cancel()


def content(path: Path) -> bytes | dict[str, bytes]:
    """Bytes of a file, or of every file in a directory."""
    if path.is_dir():
        return {entry.name: entry.read_bytes() for entry in path.iterdir()}
    return path.read_bytes()


def file_system(
    root: Path, name: str, size: str = "64M", *, kind: str = "tmpfs"
) -> AbstractContextManager[Path]:
    """A file system of its own, small unless said otherwise, mounted at ``root/name``."""
    return file_systems.file_system(root, kind, name=name, size=size)


def blocks(path: Path) -> int:
    """Bytes a file occupies."""
    return os.stat(path).st_blocks * 512


def there(path: Path) -> bool:
    """Whether a name exists, be it a link to nothing."""
    return os.path.lexists(path)


def clone(source: Path, target: Path) -> None:
    """Copy a file or directory with its times."""
    subprocess.run(["cp", "-a", source, target], check=True)


def one_file(path: Path) -> Path:
    """A regular file: the path itself, or one in the directory."""
    return path / "p_aux" if path.is_dir() else path
