"""Whoever waits for the mount can be killed or interrupted, and the work for him ends."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from sectorfs.errors import Interrupted
from sectorfs.fuse import kernel, mounts
from sectorfs.fuse.interrupts import Interrupts, is_dying
from sectorfs.fuse.operations import SectorOperations
from sectorfs.stores import storage_list
from sectorfs.stores.metadata import init_path
from sectorfs.types import Facts, SectorFile
from tests.cluster import Node, cluster, until, write
from tests.cluster_fixtures import configure, declare_at, status
from tests.hung_disk import hung_disk
from tests.mount_fixtures import HERE, World, call, eventually, sector_file, shell

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not kernel.prepare(), reason="the extension is left out"),
]

DATA = bytes(range(256)) * 64
PATIENCE = 10
"""Seconds in which a process is to be gone: far less than anything it waits for."""
LONG = 300.0
"""Deadlines of what does not answer."""

CLIENT = r"""
import ctypes, mmap, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGINT, signal.SIG_DFL)
operation, path = sys.argv[1:]
if operation in ("direct", "map"):
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if operation == "direct" else 0))
    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if operation == "map":
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_RANDOM)
os.write(1, b"ready\n")
os.read(0, 1)
result = {
    "open": lambda: libc.open(path.encode(), os.O_RDONLY),
    "opendir": lambda: libc.open(path.encode(), os.O_RDONLY | os.O_DIRECTORY),
    "lookup": lambda: libc.access(path.encode(), os.F_OK),
    "direct": lambda: libc.pread(fd, ctypes.c_void_p(address), 4096, ctypes.c_long(0)),
    "map": lambda: mapped[1],
}[operation]()
os.write(1, (str(result) if result >= 0 else os.strerror(ctypes.get_errno())).encode())
"""


@pytest.fixture
def world() -> Iterator[World]:
    """On tmpfs, where every read takes a thread of the storage's lane."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        world = World(Path(path))
        world.put("sealed/7", DATA)
        world.put("sealed/8", DATA)
        world.store.lanes[HERE].deadline = LONG
        yield world
        if mounts.find_mount(world.mountpoint) is not None:  # the test failed
            mounts.detach(world.mountpoint)


class Teacher:
    """Stands in for the store's `learn`, which waits for a peer that says nothing."""

    def __init__(self, world: World) -> None:
        self.waiting = 0
        world.store.learn = self.learn  # type: ignore[method-assign]  # of this one store

    async def learn(self, file: SectorFile) -> None:
        self.waiting += 1
        try:
            await trio.sleep_forever()
        finally:
            self.waiting -= 1


class Client:
    """A process that carries out an operation when it is told to."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process

    async def begin(self) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(b"!")

    async def said(self) -> str:
        """What it says next."""
        assert self.process.stdout is not None
        with trio.fail_after(PATIENCE):
            return (await self.process.stdout.receive_some()).decode().strip()

    async def end(self, number: int) -> None:
        """Kill it with this signal, and see it gone."""
        self.process.send_signal(number)
        with trio.fail_after(PATIENCE):
            assert await self.process.wait() == -number


@asynccontextmanager
async def client(operation: str, path: Path) -> AsyncIterator[Client]:
    """Killed at the end if it lives."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", CLIENT, operation, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    client = Client(process)
    try:
        assert await client.said() == "ready"
        yield client
    finally:
        process.kill()
        with trio.CancelScope(shield=True), trio.fail_after(PATIENCE):
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()
            await process.wait()


class Blocked:
    """A world in which one kind of operation waits for good."""

    def __init__(self, world: World, operation: str) -> None:
        self._lane = world.store.lanes[HERE]
        self._teacher = Teacher(world)
        self._operation = operation
        self.path = world.seen("sealed/7")
        if operation in ("lookup", "opendir"):
            number = 5
            world.catalog.declare(sector_file(f"cache/{number}"), None)
            self.path = world.seen(f"cache/{number}")
            if operation == "lookup":
                self.path /= "p_aux"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client that waits for its answer."""
        async with client(self._operation, self.path) as one:
            self._lane.gate.clear()
            await one.begin()
            await eventually(lambda: self.waiting == 1)
            yield one

    @property
    def waiting(self) -> int:
        """Operations that wait."""
        if self._operation in ("lookup", "opendir"):
            return self._teacher.waiting
        return self._lane.busy


OPERATIONS = ["open", "lookup", "opendir", "direct", "map"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda one: one.name)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_killed_process_is_gone(world: World, operation: str, number: int) -> None:
    blocked = Blocked(world, operation)
    async with world.mounted():
        async with blocked.client() as process:
            await process.end(number)
        world.store.lanes[HERE].gate.set()
        await eventually(lambda: blocked.waiting == 0)
        assert await call(world.seen("sealed/8").read_bytes) == DATA


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one != "map"])
async def test_an_interrupted_call_says_so(world: World, operation: str) -> None:
    async with world.mounted():
        async with Blocked(world, operation).client() as client:
            client.process.send_signal(signal.SIGUSR1)
            assert await client.said() == os.strerror(errno.EINTR)


async def test_a_mapping_survives_signals_that_do_not_kill(world: World) -> None:
    interrupts = world.operations.interrupts
    async with world.mounted():
        async with Blocked(world, "map").client() as client:
            client.process.send_signal(signal.SIGUSR1)
            await eventually(lambda: interrupts.spared == 1, PATIENCE)
            world.store.lanes[HERE].gate.set()
            assert await client.said() == str(DATA[1])
        assert not interrupts.waiting


async def test_a_mapping_that_survived_a_signal_can_be_killed_later(world: World) -> None:
    interrupts = world.operations.interrupts
    async with world.mounted():
        async with Blocked(world, "map").client() as client:
            client.process.send_signal(signal.SIGUSR1)
            await eventually(lambda: interrupts.spared == 1, PATIENCE)
            await client.end(signal.SIGKILL)
        assert not interrupts.waiting


async def test_other_readers_are_not_confused_with_the_killed_one(world: World) -> None:
    lane = world.store.lanes[HERE]
    async with world.mounted():
        async with (
            client("direct", world.seen("sealed/7")) as killed,
            client("direct", world.seen("sealed/8")) as other,
            client("direct", world.seen("sealed/8")) as third,
        ):
            lane.gate.clear()
            for one in (killed, other, third):
                await one.begin()
            await eventually(lambda: lane.busy == 3)
            await killed.end(signal.SIGKILL)
            lane.gate.set()
            assert await other.said() == "4096"
            assert await third.said() == "4096"


async def test_an_interrupt_is_heeded_that_comes_before_the_request_is_begun(world: World) -> None:
    """Both come while the loop is busy, and lie there in the kernel's order."""
    async with world.mounted():
        async with client("direct", world.seen("sealed/7")) as one:
            world.store.lanes[HERE].gate.clear()
            await one.begin()
            _block_until(one.process.pid, "S")
            one.process.send_signal(signal.SIGUSR1)
            _block_until(one.process.pid, "D")
            assert world.store.lanes[HERE].busy == 0, "the request was not begun"
            assert await one.said() == os.strerror(errno.EINTR)


def _block_until(pid: int, state: str) -> None:
    """Hold up the loop until a process waits for the mount, in this state."""
    wchan, stat = (Path(f"/proc/{pid}/{name}") for name in ("wchan", "stat"))
    until(
        f"{pid} to wait for the mount",
        lambda: (
            "request_wait_answer" in wchan.read_text()
            and stat.read_text().rsplit(")", 1)[1].split()[0] == state
        ),
    )


async def test_many_killed_processes_do_no_harm(world: World) -> None:
    """Some are killed before the request is read, some meanwhile, some after the answer."""
    async with world.mounted():
        await shell(
            'for i in $(seq 300); do echo "$i"; done | xargs -P 8 -I{} timeout -s KILL 0.00{}'
            ' cat "$A" "$B" "$D/{}" > /dev/null 2>&1 || true',
            A=world.seen("sealed/7"),
            B=world.seen("sealed/8"),
            D=world.mountpoint,
        )
        assert await call(world.seen("sealed/7").read_bytes) == DATA
        await eventually(lambda: not world.operations.interrupts.waiting)


# Without a mount


async def _wait(seconds: float) -> None:
    await trio.sleep(seconds)


async def test_requests_answered_already_and_unknown_ones_are_left_alone() -> None:
    interrupts = Interrupts()

    async def work() -> int:
        interrupts.interrupt(2, 0, buffered=False)
        await trio.lowlevel.checkpoint()
        return 1

    assert await interrupts.answer(1, work()) == 1
    interrupts.interrupt(1, 0, buffered=False)
    assert await interrupts.answer(3, work()) == 1


async def test_only_the_interrupted_request_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    interrupts = Interrupts()
    ended: list[int] = []

    async def reader(number: int) -> None:
        work = _wait(1 if number == 2 else 1000)
        try:
            await interrupts.answer(number, work)
        except Interrupted:
            ended.append(-number)
        else:
            ended.append(number)

    async with trio.open_nursery() as nursery:
        for number in (1, 2, 3):
            nursery.start_soon(reader, number)
        await trio.testing.wait_all_tasks_blocked()
        interrupts.interrupt(1, 0, buffered=False)
        interrupts.interrupt(3, os.getpid(), buffered=True)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [-1]
        assert interrupts.spared == 1
        interrupts.interrupt(3, os.getpid(), buffered=False)
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [-1, -3]
    assert ended == [-1, -3, 2]


async def test_a_result_in_time_is_not_thrown_away() -> None:
    interrupts = Interrupts()

    async def work() -> str:
        interrupts.interrupt(1, 0, buffered=False)
        return "done"

    assert await interrupts.answer(1, work()) == "done"


def test_who_dies() -> None:
    assert not is_dying(os.getpid())
    assert not is_dying(0), "of a container whose processes cannot be seen from here"
    process = subprocess.Popen(["true"])
    process.wait()
    assert is_dying(process.pid)


def test_handlers_wait_for_nothing_that_cannot_be_interrupted() -> None:
    """`Handles.read` watches by itself, and only when it waits."""
    tree = ast.parse(inspect.getsource(SectorOperations))
    waits = {
        ast.unparse(node.value).split("(")[0]
        for handler in ast.walk(tree)
        if isinstance(handler, ast.AsyncFunctionDef)
        for node in ast.walk(handler)
        if isinstance(node, ast.Await)
    }
    assert waits == {"self.interrupts.watch", "self.handles.read"}


# With real nodes


@contextmanager
def silent_peer() -> Iterator[str]:
    """Accepts connections, by the kernel's grace, and never says a word; its base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/remote"


def reader_of(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["cat", str(path)], stdout=subprocess.DEVNULL)


def test_readers_of_a_hung_disk_can_be_killed(tmp_path: Path) -> None:
    with cluster(tmp_path, "node") as (node,), hung_disk(tmp_path) as disk:
        configure(node, timeouts={"disk": LONG}, storage={"settle": 0.1})
        init_path(str(disk.source), can_seal=False, can_store=True)
        write(disk.source / "sealed/s-t01000-1", DATA)
        known = storage_list.read_storage_list(str(node.repo.storage_json))
        storage_list.write_storage_list(known.adding(str(disk.path)))
        node.start(mount=True)
        path = node.mountpoint / "sealed/s-t01000-1"
        until("the file to be seen", path.exists)
        disk.hang("open")
        readers = [reader_of(path) for _ in range(3)]
        until("the disk to be asked", lambda: disk.waiting("open") > 0)
        for reader in readers:
            reader.kill()
            reader.wait(PATIENCE)
        disk.go()


def test_a_killed_reader_ends_its_fetch_and_no_others(tmp_path: Path) -> None:
    with cluster(tmp_path, "node") as (node,), silent_peer() as url:
        configure(node, timeouts={"first_byte": LONG, "connect": LONG})
        node.start(mount=True)
        facts = Facts(1 << 20, 1_700_000_000_000_000_000)
        held: dict[str, Facts | None] = {f"sealed/s-t01000-{number}": facts for number in (1, 2)}
        declare_at(node, "silent", url, held)
        one, two = (node.mountpoint / name for name in held)
        until("the files to be seen", lambda: one.exists() and two.exists())
        readers = [reader_of(path) for path in (one, two, two)]
        until("both fetches to wait", partial(_has_fetches, node, 2))
        for reader in readers[:2]:  # one of two readers of the second
            reader.send_signal(signal.SIGINT)
            assert reader.wait(PATIENCE) == -signal.SIGINT
        until("the first fetch to end", partial(_has_fetches, node, 1))
        readers[2].kill()
        readers[2].wait(PATIENCE)
        until("no fetch to be left", partial(_has_fetches, node, 0))


def _has_fetches(node: Node, count: int) -> bool:
    return len(status(node).fetches) == count


async def test_long_reads_of_processes_that_are_gone_are_given_up() -> None:
    interrupts = Interrupts()
    gone = _no_process()
    ended: list[int] = []

    async def reader(number: int, pid: int) -> None:
        with suppress(Interrupted):
            await interrupts.answer(number, _wait(1000), pid)
        ended.append(number)

    async with trio.open_nursery() as nursery:
        for number, pid in enumerate((gone, os.getpid(), 0), start=1):
            nursery.start_soon(reader, number, pid)
        await trio.testing.wait_all_tasks_blocked()
        interrupts.look()
        await trio.testing.wait_all_tasks_blocked()
        assert not ended, "one that only just came may have a reader that is about to wait"
        interrupts.look()
        await trio.testing.wait_all_tasks_blocked()
        assert ended == [1]
        nursery.cancel_scope.cancel()
    assert not interrupts.waiting


def _no_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
