"""A mount over directories of the tests: a catalog in a dict, a store with real lanes."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from sectorfs.config import MountConfig
from sectorfs.errors import NoSource, NotFound
from sectorfs.fuse.inodes import Row
from sectorfs.fuse.operations import Mount, SectorOperations
from sectorfs.index.protocol import Declaration, FsStat, StorageInfo, StorageStatus
from sectorfs.stores.file_systems import local_file_system
from sectorfs.stores.lanes import Descriptor, Lane
from sectorfs.stores.protocol import Checked, OpenFile, State
from sectorfs.types import Facts, FileType, MemberFacts, SectorFile, SectorID, StorageID

T = TypeVar("T")

HERE = StorageID("here")
SLOW = StorageID("slow")


class Known(msgspec.Struct, frozen=True):
    facts: Facts | None
    declarations: tuple[Declaration, ...]


class Changed(msgspec.Struct, frozen=True):
    file: SectorFile
    before: Facts | None
    after: Facts | None
    appeared: bool
    vanished: bool


class DictCatalog:
    """What the mount asks of the catalog, kept in a dict."""

    def __init__(self) -> None:
        self.files: dict[SectorFile, dict[StorageID, Declaration]] = {}
        self.statuses: dict[StorageID, StorageStatus] = {}
        self.changed_ns: dict[FileType, int] = {}
        self.unhealthy: set[StorageID] = set()
        self._clock = 1_700_000_000_000_000_000

    def attach(self, storage: StorageID, *, capacity: int = 1 << 40, available: int = 0) -> None:
        self.statuses[storage] = StorageStatus(
            info=StorageInfo(storage=storage, urls=(f"http://{storage}:1/remote",)),
            stat=FsStat(capacity=capacity, available=available),
            error="",
            last_heartbeat_ns=0,
            heartbeat_age=0,
        )

    def declare(
        self,
        file: SectorFile,
        facts: Facts | None,
        storage: StorageID = HERE,
        *,
        primary: bool = True,
    ) -> Changed:
        before = self.entry(file)
        if before is None:
            self._touch(file)
        self.files.setdefault(file, {})[storage] = Declaration(file, storage, primary, facts)
        return Changed(file, before.facts if before else None, facts, before is None, False)

    def drop(self, file: SectorFile, storage: StorageID = HERE) -> Changed:
        before = self.entry(file)
        del self.files[file][storage]
        if not self.files[file]:
            del self.files[file]
            self._touch(file)
        after = self.entry(file)
        facts = before.facts if before else None
        return Changed(file, facts, after.facts if after else None, False, after is None)

    def entry(self, file: SectorFile) -> Known | None:
        found = self.files.get(file)
        if not found:
            return None
        ordered = tuple(found[storage] for storage in sorted(found))
        primary = [declaration for declaration in ordered if declaration.primary]
        return Known((primary or ordered)[0].facts, ordered)

    def sectors(self, file_type: FileType) -> tuple[SectorID, ...]:
        return tuple(sorted(file.sector for file in self.files if file.file_type is file_type))

    def count(self, file_type: FileType) -> int:
        return len(self.sectors(file_type))

    def listed(
        self, file_type: FileType, names: Sequence[SectorID], start: int, limit: int
    ) -> list[Row | None]:
        return [self._row(SectorFile(file_type, sector)) for sector in names[start : start + limit]]

    def _row(self, file: SectorFile) -> Row | None:
        entry = self.entry(file)
        if entry is None:
            return None
        facts = entry.facts or Facts(0, 0)
        sector = file.sector
        return sector.miner, sector.number, facts.size, facts.mtime_ns, entry.facts is not None

    def types(self) -> frozenset[FileType]:
        return frozenset(file.file_type for file in self.files)

    def names_changed_ns(self, file_type: FileType) -> int:
        return self.changed_ns.get(file_type, 0)

    def storages(self) -> list[StorageStatus]:
        return list(self.statuses.values())

    def storage(self, storage: StorageID) -> StorageStatus | None:
        return self.statuses.get(storage)

    def healthy(self, storage: StorageID, now: float, cutoff: float) -> bool:
        return storage in self.statuses and storage not in self.unhealthy

    def _touch(self, file: SectorFile) -> None:
        self._clock += 1_000_000_000
        self.changed_ns[file.file_type] = self._clock


class GateLane(Lane):
    """A lane whose threads wait while the gate is shut, as on a disk that does not answer."""

    def __init__(self, thing: str, *, deadline: float = 60, width: int = 32) -> None:
        super().__init__(thing, deadline=deadline, width=width)
        self.gate = threading.Event()
        self.gate.set()

    @property
    def waiting(self) -> int:
        """Calls that wait for a place in the lane."""
        return self._limiter.statistics().tasks_waiting

    async def run(
        self, call: Callable[[], T], *, what: str, discard: Callable[[T], object] | None = None
    ) -> T:
        return await super().run(partial(self._pass, call), what=what, discard=discard)

    def _pass(self, call: Callable[[], T]) -> T:
        if not self.gate.wait(100):
            raise OSError("the test left the gate shut")
        return call()


class DirectoryStore:
    """A `SectorStore` over directories of the tests."""

    def __init__(self) -> None:
        self.roots: dict[StorageID, Path] = {}
        self.lanes: dict[StorageID, GateLane] = {}
        self.states: dict[SectorFile, State] = {}
        self.checks: dict[SectorFile, Checked] = {}
        self.opened: list[OpenFile] = []
        self.waiting = 0
        """Opens that are under way."""
        self.proved = False
        """It tells which files lie on local file systems."""

    def attach(self, storage: StorageID, root: Path, *, deadline: float = 60) -> None:
        self.roots[storage] = root
        self.lanes[storage] = GateLane(str(root), deadline=deadline)

    async def open(self, file: SectorFile, member: str | None = None) -> OpenFile:
        for storage, root in self.roots.items():
            path = root / str(file) / member if member else root / str(file)
            if path.exists():
                self.waiting += 1
                try:
                    return await self._open(storage, path)
                finally:
                    self.waiting -= 1
        raise NotFound("nobody declares it", file)

    async def learn(self, file: SectorFile) -> None:
        if file.file_type.is_directory:
            raise NoSource("nobody tells of its files", file)

    def state(self, file: SectorFile) -> State:
        return self.states.get(file, "local")

    def is_streamed(self, file: SectorFile, member: str | None) -> bool:
        return False

    def present(self, file: SectorFile, member: str | None) -> int | None:
        return None

    def checked(self, file: SectorFile, member: str | None) -> Checked:
        return self.checks.get(file, Checked())

    async def _open(self, storage: StorageID, path: Path) -> OpenFile:
        lane = self.lanes[storage]
        fd = await lane.run(
            lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), what="open", discard=os.close
        )
        status = os.fstat(fd)
        opened = OpenFile(
            descriptor=Descriptor(fd),
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            inode=status.st_ino,
            storage=storage,
            path=str(path),
            lane=lane,
            file_system=local_file_system(fd) if self.proved else "",
        )
        self.opened.append(opened)
        return opened


def facts_of(path: Path) -> Facts:
    """What `stat` says of a sector file on disk."""
    status = path.stat()
    if not path.is_dir():
        return Facts(status.st_size, status.st_mtime_ns)
    members = tuple(
        MemberFacts(child.name, child.stat().st_size, child.stat().st_mtime_ns)
        for child in sorted(path.iterdir())
    )
    return Facts(sum(member.size for member in members), status.st_mtime_ns, members)


def sector_file(text: str, miner: int = 1000) -> SectorFile:
    """``sealed/7`` as a sector file."""
    directory, number = text.split("/")
    file_type = next(one for one in FileType if one.dir_name == directory)
    return SectorFile(file_type, SectorID(miner, int(number)))


class World:
    """A catalog, a store, and what the mount is built of."""

    def __init__(self, base: Path, config: MountConfig | None = None) -> None:
        self.base = base
        self.mountpoint = base / "mnt"
        self.mountpoint.mkdir(exist_ok=True)
        self.catalog = DictCatalog()
        self.store = DirectoryStore()
        self.stale: list[tuple[SectorFile, str | None]] = []
        self.redeclare = True
        """Changed content becomes known to the catalog before the open is answered."""
        self.add_storage(HERE, base / "here")
        self.operations = SectorOperations(
            self.catalog,
            self.store,
            config or MountConfig(uid=7, gid=8),
            cutoff=50,
            guess=lambda file: 0,
            local_path=self.local_path,
            is_pinned=lambda file: False,
            filesystem=lambda storage: None,
            local_file_system=self.local_file_system,
            on_stale=self.on_stale,
        )

    def add_storage(self, storage: StorageID, root: Path) -> None:
        root.mkdir(exist_ok=True, parents=True)
        self.store.attach(storage, root)
        self.catalog.attach(storage)

    def path(self, file: SectorFile, storage: StorageID = HERE) -> Path:
        return self.store.roots[storage] / str(file)

    def local_path(self, file: SectorFile, storage: StorageID) -> str | None:
        root = self.store.roots.get(storage)
        return str(root / str(file)) if root else None

    def local_file_system(self, storage: StorageID) -> str:
        return "ext4" if self.store.proved and storage in self.store.roots else ""

    async def on_stale(self, file: SectorFile, member: str | None, opened: OpenFile) -> None:
        self.stale.append((file, member))
        if self.redeclare:
            path = self.path(file, opened.storage)
            self.announce(self.catalog.declare(file, facts_of(path), opened.storage))

    def announce(self, *changes: Changed) -> None:
        self.operations.changed(changes)

    def put(self, text: str, data: bytes, storage: StorageID = HERE) -> Path:
        """Write a sector file (``sealed/7``) or a member (``cache/7/p_aux``), and declare it."""
        directory, number, *member = text.split("/")
        file = sector_file(f"{directory}/{number}")
        path = self.path(file, storage)
        target = path / member[0] if member else path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_bytes(data)
        temporary.rename(target)
        self.announce(self.catalog.declare(file, facts_of(path), storage))
        return target

    def put_sparse(self, text: str, size: int, storage: StorageID = HERE) -> None:
        """Declare a file of zeros that takes no room."""
        file = sector_file(text)
        path = self.path(file, storage)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(size)
        self.announce(self.catalog.declare(file, facts_of(path), storage))

    def seen(self, text: str) -> Path:
        """The path of ``sealed/7`` or ``cache/7/p_aux`` in the mount."""
        directory, number, *member = text.split("/")
        return Path(self.mountpoint, directory, f"s-t01000-{number}", *member)

    @asynccontextmanager
    async def mounted(self) -> AsyncIterator[Mount]:
        with open_gates(self.store):
            async with trio.open_nursery() as nursery:
                async with Mount(self.mountpoint, self.operations, allow_other=False) as mount:
                    await nursery.start(mount.run)
                    yield mount


@contextmanager
def open_gates(store: DirectoryStore) -> Iterator[None]:
    """Let every blocked thread go at the end, so that none outlives its test."""
    try:
        yield
    finally:
        for lane in store.lanes.values():
            lane.gate.set()


def open_descriptors(path: Path) -> int:
    """How many descriptors of this process are of that file, deleted or not."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # of the listing itself
            continue
        count += target.removesuffix(" (deleted)") == str(path)
    return count


_threads = trio.CapacityLimiter(400)


async def call(function: Callable[[], T]) -> T:
    """Touch the mount: always from a thread, because the loop has to answer."""
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=_threads)


async def shell(command: str, **variables: object) -> str:
    """Run a shell command and return what it prints; an error fails the test with its output."""
    environment = dict(os.environ, LC_ALL="C", **{k: str(v) for k, v in variables.items()})
    done = await trio.run_process(
        ["bash", "-ec", command],
        capture_stdout=True,
        capture_stderr=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout.decode()} {done.stderr.decode()}"
    return done.stdout.decode()


async def eventually(condition: Callable[[], bool], patience: float = 5) -> None:
    """Wait until a condition of the loop holds."""
    with trio.fail_after(patience):
        while True:
            if condition():
                return
            await trio.sleep(0.005)


async def eventually_seen(condition: Callable[[], bool], patience: float = 2) -> None:
    """Wait until a condition that touches the mount holds."""
    with trio.fail_after(patience):
        while True:
            if await call(condition):
                return
            await trio.sleep(0.005)
