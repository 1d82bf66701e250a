"""Nothing hangs but what asks a disk or peer that hangs, and that no longer than its deadline."""

from __future__ import annotations

import errno
import http.client
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sectorfs.fuse import mounts
from sectorfs.node.reports import StorageReport
from sectorfs.stores import storage_list
from sectorfs.stores.metadata import init_path
from sectorfs.types import Facts
from tests.cluster import SECTORFS, Node, cluster, until, write, write_cache
from tests.cluster_fixtures import (
    attach,
    configure,
    declare_at,
    free_port,
    locations,
    metric,
    put,
    rescan,
    status,
    threads,
)
from tests.hung_disk import HungDisk, hung_disk
from tests.mount_clients import Client, Clients

pytestmark = pytest.mark.mount

DISK = 2.0
"""Deadline of a disk in these tests."""
PROMPT = 0.1
"""Seconds that an operation which has nothing to do with the hung disk takes, by the median."""
SIZE = 64 << 10


class World:
    """A node with two paths, one of them on a disk that can hang, and users of its mount."""

    def __init__(self, root: Path, nodes: list[Node], disk: HungDisk, clients: Clients) -> None:
        self.root = root
        self.node, self.next_node = nodes
        """The node, and the same one started again."""
        self.disk = disk
        self.clients = clients
        self.well = root / "well"
        self.mount = self.node.mountpoint

    def prepare(self, sectors: int = 4, *, deadline: float = DISK) -> None:
        """Both paths, known to the node; on the hung disk so many sealed files."""
        configure(self.node, timeouts={"disk": deadline}, storage={"settle": 0.1})
        init_path(str(self.disk.source), can_seal=False, can_store=True)
        for number in range(sectors):
            write(self.disk.source / f"sealed/s-t01000-{number}", bytes([number % 251]) * SIZE)
        write_cache(self.disk.source / "cache/s-t01000-0", {"p_aux": b"p" * 64, "t_aux": b"t" * 64})
        init_path(str(self.well), can_seal=False, can_store=True)
        write(self.well / "sealed/s-t02000-1", b"w" * SIZE)
        known = storage_list.read_storage_list(str(self.node.repo.storage_json))
        both = known.adding(str(self.disk.path)).adding(str(self.well))
        storage_list.write_storage_list(both)

    def start(self, sectors: int = 4, *, deadline: float = DISK, listen: str = "") -> None:
        """The node with its mount, everything declared."""
        self.prepare(sectors, deadline=deadline)
        self.node.start(*(("--listen", listen) if listen else ()), mount=True)
        until("every file to be declared", lambda: self.declared() == sectors + 1)

    def declared(self) -> int:
        """Sealed files that the Index knows."""
        return sum(one.files.get("sealed", 0) for one in status(self.node).storages)

    def hung_file(self, number: int) -> Path:
        return self.mount / f"sealed/s-t01000-{number}"

    def hung_files(self, count: int) -> list[Path]:
        return [self.hung_file(number) for number in range(count)]

    @property
    def well_file(self) -> Path:
        return self.mount / "sealed/s-t02000-1"

    def health(self, path: Path) -> StorageReport:
        """A path as `status` shows it."""
        (found,) = [one for one in status(self.node).storages if one.path == str(path)]
        return found

    def connection(self) -> Path:
        """The mount's connection in fusectl."""
        mount = mounts.find_mount(self.mount)
        assert mount is not None
        directory = mounts.connection(mount.minor)
        assert directory is not None
        return directory

    def verb(self, *arguments: str, repo: Path) -> subprocess.CompletedProcess[str]:
        """A verb of the command line that may meet what hangs."""
        return self.clients.run(*SECTORFS, "--repo", str(repo), *arguments, patience=20)

    def stick_readers(self, count: int) -> Client:
        """Readers of the hung disk, which hangs from now on; returns once all of them wait."""
        readers = self.clients.readers(self.hung_files(count))
        self.disk.hang()
        readers.begin()
        waiting = self.connection() / "waiting"
        until("all readers to wait", lambda: int(waiting.read_text()) >= count)
        until("the disk to be asked", lambda: self.disk.waiting("read") > 0)
        return readers


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    clients = Clients(tmp_path)
    with ExitStack() as stack:
        stack.callback(clients.reap)
        # The disk goes on before the nodes are ended: they could not end while it hangs.
        nodes = [stack.enter_context(cluster(tmp_path, "node"))[0] for _ in range(2)]
        disk = stack.enter_context(hung_disk(tmp_path))
        stack.callback(clients.kill)
        yield World(tmp_path, nodes, disk, clients)


def assert_prompt(world: World, asker: Client) -> dict[str, float]:
    """What has nothing to do with the hung disk is as fast as ever; returns the medians."""
    medians = {}
    for operation, path in (
        ("ls", world.mount / "sealed"),
        ("stat", world.well_file),
        ("stat", world.hung_file(0)),
        ("df", world.mount),
        ("read", world.well_file),
    ):
        answers = [asker.do(operation, path) for _ in range(7)]
        assert [answer["error"] for answer in answers] == [0] * 7, (operation, answers)
        times = [answer["seconds"] for answer in answers]
        assert max(times) < 2, (operation, times)
        medians[f"{operation} {path.name}"] = statistics.median(times)
        assert medians[f"{operation} {path.name}"] < PROMPT, (operation, times)
    return medians


def assert_comes_back(world: World, asker: Client) -> None:
    """Without anybody's doing, the hung path is healthy and read again."""
    until("the path to come back", lambda: world.health(world.disk.path).healthy)
    answer = asker.do("read", world.hung_file(3))
    assert (answer["error"], answer.get("result")) == (0, SIZE)
    assert world.health(world.disk.path).error is None


# Readers, openers and heartbeats


def test_readers_of_a_hung_disk_hold_up_nobody_else(world: World) -> None:
    count, deadline = 150, 5.0
    world.start(count, deadline=deadline)
    asker = world.clients.asker()
    readers = world.clients.readers(world.hung_files(count))
    world.disk.hang("read")
    started = time.monotonic()
    readers.begin()
    waiting = world.connection() / "waiting"
    until("all readers to wait", lambda: int(waiting.read_text()) >= count)
    assert world.disk.waiting("read") > 0
    assert_prompt(world, asker)
    shown = world.node.json("status")
    assert shown["files"]["open"] >= count
    assert time.monotonic() - started < deadline, "what was measured was not under load"
    answers = [readers.answer() for _ in range(count)]
    assert {answer["error"] for answer in answers} == {errno.EIO}
    times = [answer["seconds"] for answer in answers]
    assert min(times) > deadline - 0.5
    assert max(times) < deadline + 2
    assert_prompt(world, asker)


def test_opens_on_a_hung_disk_end_at_its_deadline(world: World) -> None:
    count = 60
    world.start(count)
    asker = world.clients.asker()
    world.disk.hang("open")
    openers = world.clients.openers(world.hung_files(count))
    until("opens to wait", lambda: world.disk.waiting("open") >= 10)
    assert_prompt(world, asker)
    answers = [openers.answer() for _ in range(count)]
    assert {answer["error"] for answer in answers} == {errno.EIO}
    assert max(answer["seconds"] for answer in answers) < DISK + 1
    until("the path to be unhealthy", lambda: not world.health(world.disk.path).healthy)
    # Known to be away, it costs nothing any more.
    refused = asker.do("read", world.hung_file(0))
    assert refused["error"] == errno.EIO
    assert refused["seconds"] < DISK / 2
    world.disk.go()
    assert_comes_back(world, asker)


@pytest.mark.parametrize("operations", [("getattr", "lookup"), ("statfs",), ()])
def test_a_path_that_hangs_is_shown_with_the_reason(
    world: World, operations: tuple[str, ...]
) -> None:
    world.start()
    asker = world.clients.asker()
    assert world.health(world.disk.path).healthy
    world.disk.hang(*operations)
    until("the path to be unhealthy", lambda: not world.health(world.disk.path).healthy)
    reason = world.health(world.disk.path).error
    assert reason is not None
    assert "answer" in reason
    assert_prompt(world, asker)
    beats = set[str]()

    def beats_on() -> bool:
        well = world.health(world.well)
        assert well.healthy
        beats.add(well.last_heartbeat)
        return len(beats) > 2

    until("two more heartbeats of the other path", beats_on)
    hung = world.health(world.disk.path)
    assert not hung.healthy
    assert any(hung.storage in problem for problem in status(world.node).problems)
    world.disk.go()
    assert_comes_back(world, asker)


def test_after_one_deadline_a_hung_disk_refuses_at_once(world: World) -> None:
    world.start()
    asker = world.clients.asker()
    holders = world.clients.readers(world.hung_files(4))
    world.disk.hang("read")
    first = asker.do("read", world.hung_file(0))
    assert first["error"] == errno.EIO
    assert DISK - 0.5 < first["seconds"] < DISK + 1
    stuck = threads(world.node)
    for number in (0, 1, 2, 3):
        refused = asker.do("read", world.hung_file(number))
        assert refused["error"] == errno.EIO
        assert refused["seconds"] < DISK / 4
    holders.begin()  # files that were open before are refused as well
    answers = [holders.answer() for _ in range(4)]
    assert {answer["error"] for answer in answers} == {errno.EIO}
    assert max(answer["seconds"] for answer in answers) < DISK / 2
    assert threads(world.node) <= stuck
    assert_prompt(world, asker)
    until("the path to be unhealthy", lambda: not world.health(world.disk.path).healthy, DISK / 2)
    hung = world.health(world.disk.path)
    assert f"no answer within {DISK:g} s" in str(hung.error)
    assert any(hung.storage in problem for problem in status(world.node).problems)
    assert metric(world.node, "sectorfs_storage_silent") == 1
    world.disk.go()
    assert_comes_back(world, asker)
    assert metric(world.node, "sectorfs_storage_silent") == 0


@pytest.mark.parametrize("where", ["on this node", "on another node"])
def test_another_copy_is_read_instead_of_one_on_a_hung_disk(
    tmp_path: Path, world: World, where: str
) -> None:
    name, data = "sealed/s-t01000-7", b"c" * SIZE
    world.prepare()
    metadata = world.disk.source / "sectorstore.json"
    metadata.write_text(metadata.read_text().replace('"Weight": 10', '"Weight": 90'))
    put(world.disk.source / name, data)
    with cluster(tmp_path, "other") as (other,):
        world.node.start(mount=True)
        if where == "on this node":
            put(world.well / name, data)
        else:
            configure(other)
            other.start(index=world.node)
            put(attach_path(other) / name, data)
            rescan(other)
        rescan(world.node)
        until("both copies to be known", lambda: len(locations(world.node, name)) == 2)
        asker = world.clients.asker()
        until("the file to be seen", lambda: asker.do("stat", world.mount / name)["error"] == 0)
        world.disk.hang("open")
        first = asker.do("read", world.mount / name)
        assert (first["error"], first["result"]) == (0, SIZE)
        assert first["seconds"] > DISK - 0.5, "the hung disk was not the best source"
        again = asker.do("read", world.mount / name)
        assert (again["error"], again["result"]) == (0, SIZE)
        assert again["seconds"] < DISK / 2


def attach_path(node: Node) -> Path:
    """A storage path of another node."""
    path = node.root / "other-disk"
    attach(node, path)
    return path


def test_closing_files_on_a_hung_disk_holds_up_nobody(world: World) -> None:
    world.start()
    asker = world.clients.asker()
    holders = world.clients.readers(world.hung_files(4))
    until("files to be open", lambda: status(world.node).files.open == 4)
    world.disk.hang()
    holders.end()
    until("closes to wait", lambda: world.disk.waiting("flush") > 0)
    assert_prompt(world, asker)
    world.disk.go()
    until("files to be closed", lambda: world.disk.waiting("flush") == 0)
    assert_comes_back(world, asker)


def test_a_disk_that_hangs_at_the_start_holds_up_no_start(world: World) -> None:
    world.prepare(deadline=10)
    world.disk.hang()
    started = time.monotonic()
    world.node.start(mount=True)
    assert time.monotonic() - started < 6
    asker = world.clients.asker()
    until("the well path's file", lambda: asker.do("stat", world.well_file)["error"] == 0)
    assert asker.do("read", world.well_file)["result"] == SIZE
    world.disk.go()
    until("the other path's files", lambda: world.declared() == 5)
    assert_comes_back(world, asker)


def test_attaching_a_hung_disk_ends_at_its_deadline(world: World) -> None:
    configure(world.node, timeouts={"disk": DISK})
    init_path(str(world.disk.source), can_seal=False, can_store=True)
    world.node.start()
    world.disk.hang()
    started = time.monotonic()
    done = world.verb("storage", "attach", str(world.disk.path), repo=world.node.repo.root)
    assert done.returncode == 1
    assert f"no answer within {DISK:g} s" in done.stderr
    assert time.monotonic() - started < DISK + 3
    assert world.node.json("status")["problems"] == []


# The end of the daemon


def state(pid: int, task: int | None = None) -> str:
    """State of a process or of one of its threads; empty when it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{task or pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]


def stuck_threads(pid: int) -> list[int]:
    """Threads that not even SIGKILL ends."""
    tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return [task for task in tasks if task != pid and state(pid, task) == "D"]


def is_gone(world: World, connection: Path) -> bool:
    return mounts.find_mount(world.mount) is None and not connection.exists()


def kill_with_stuck_threads(world: World, count: int = 3) -> int:
    """kill -9 while threads hang in reads; returns the pid of what is left."""
    world.stick_readers(count)
    pid = world.node.pid()
    world.node.send(signal.SIGKILL)
    until("the daemon to be a zombie", lambda: state(pid) == "Z")
    until("threads to be stuck", lambda: stuck_threads(pid))
    return pid


def test_sigterm_with_stuck_threads_unmounts(world: World) -> None:
    count = 40
    world.start(count)
    readers = world.stick_readers(count)
    connection, pid = world.connection(), world.node.pid()
    started = time.monotonic()
    world.node.send(signal.SIGTERM)
    until("the mount to be gone", lambda: is_gone(world, connection))
    assert time.monotonic() - started < 5
    until("the daemon to have ended", lambda: state(pid) in ("", "Z"))
    assert time.monotonic() - started < 6
    assert all(readers.answer()["error"] for _ in range(count))
    assert os.listdir(world.mount) == []


def test_the_next_start_after_a_kill_mounts_though_threads_are_stuck(world: World) -> None:
    listen = f"127.0.0.1:{free_port()}"
    world.start(listen=listen)
    pid = kill_with_stuck_threads(world)
    world.next_node.start("--listen", listen, mount=True)
    asker = world.clients.asker()
    seen = asker.do("ls", world.mount / "sealed")
    assert (seen["error"], len(seen["result"])) == (0, 5)
    assert asker.do("read", world.well_file)["result"] == SIZE
    # Every connection reaches the new node, none the dead one's queue.
    for _ in range(10):
        assert status(world.next_node).pid == world.next_node.pid()
    assert state(pid) == "Z"
    assert stuck_threads(pid)
    world.disk.go()
    until("the dead node's threads to end", lambda: state(pid) == "Z" and not stuck_threads(pid))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGABRT])
def test_a_crash_leaves_no_empty_directory(world: World, signal_number: signal.Signals) -> None:
    world.start()
    assert world.node.process is not None
    world.node.send(signal_number)
    world.node.process.wait(10)
    for look, path in (
        (os.listdir, world.mount),
        (os.stat, world.mount),
        (os.stat, world.well_file),
        (Path.read_bytes, world.well_file),
    ):
        with pytest.raises(OSError, match="not connected") as caught:
            look(path)
        assert caught.value.errno == errno.ENOTCONN


# umount


def umount(world: World, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return world.verb("umount", str(path or world.mount), repo=world.root / "another-repo")


def test_umount_of_a_live_mount_ends_its_node(world: World) -> None:
    world.start()
    assert world.node.process is not None
    done = umount(world)
    assert (done.returncode, done.stderr) == (0, "")
    assert world.node.process.wait(5) == 0
    assert mounts.find_mount(world.mount) is None
    assert umount(world).returncode == 3


def test_umount_with_stuck_threads_is_done_in_time(world: World) -> None:
    world.start()
    world.stick_readers(4)
    connection = world.connection()
    started = time.monotonic()
    done = umount(world)
    assert time.monotonic() - started < 6
    assert done.returncode == 0
    assert is_gone(world, connection)


def test_umount_after_the_daemon_was_killed(world: World) -> None:
    world.start()
    connection = world.connection()
    world.node.kill()
    done = umount(world)
    assert done.returncode == 0
    assert "was gone" in done.stdout
    assert is_gone(world, connection)


def test_umount_after_the_daemon_was_killed_with_stuck_threads(world: World) -> None:
    world.start()
    connection = world.connection()
    kill_with_stuck_threads(world)
    done = umount(world)
    assert done.returncode == 0
    assert "was gone" in done.stdout
    assert is_gone(world, connection)


def test_umount_of_a_daemon_that_is_stopped(world: World) -> None:
    world.start()
    connection = world.connection()
    world.node.send(signal.SIGSTOP)
    until("the daemon to be stopped", lambda: state(world.node.pid()) == "T")
    asker = world.clients.asker()
    asker.send("read", world.well_file)
    until("a reader to wait", lambda: int((connection / "waiting").read_text()) > 0)
    started = time.monotonic()
    done = umount(world)
    assert time.monotonic() - started < 12
    assert done.returncode == 0
    assert "hangs" in done.stdout
    assert is_gone(world, connection)
    assert asker.answer()["error"] != 0
    world.node.send(signal.SIGCONT)
    assert world.node.process is not None
    world.node.process.wait(10)


def test_umount_of_what_is_not_ours_is_refused(world: World) -> None:
    foreign = umount(world, world.disk.path)
    assert foreign.returncode == 4
    assert "not a mount of sectorfs" in foreign.stderr
    assert mounts.find_mount(world.disk.path) is not None
    nothing = umount(world, world.root)
    assert nothing.returncode == 3


# Peers


def get(world: World, path: str, answers: list[tuple[int, int, float]]) -> None:
    """One request to the node: status (0 for none), bytes of the body, seconds."""
    address = (world.node.repo.api() or "").removeprefix("http://")
    token = (world.node.repo.root / "token").read_text().strip()
    started = time.monotonic()
    connection = http.client.HTTPConnection(address, timeout=20)
    code, length = 0, 0
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        code = answer.status
        length = len(answer.read())
    except http.client.IncompleteRead as exc:
        length = len(exc.partial)
    except OSError:
        pass
    finally:
        connection.close()
    answers.append((code, length, time.monotonic() - started))


@pytest.mark.parametrize("operation", ["open", "read"])
def test_a_hung_disk_is_served_no_longer_than_its_deadline(world: World, operation: str) -> None:
    count = 60
    world.start(count)
    world.disk.hang(operation)
    answers: list[tuple[int, int, float]] = []
    users = [
        threading.Thread(target=get, args=(world, f"/remote/sealed/s-t01000-{number}", answers))
        for number in range(count)
    ]
    for thread in users:
        thread.start()
    until("requests to wait", lambda: world.disk.waiting(operation) >= 10)
    for path in ("/remote/sealed/s-t02000-1", "/health", "/metrics"):
        prompt: list[tuple[int, int, float]] = []
        get(world, path, prompt)
        assert prompt[0][0] == 200
        assert prompt[0][2] < 1, path
    for thread in users:
        thread.join(20)
    assert len(answers) == count
    assert all(code == 503 or length < SIZE for code, length, _ in answers)
    if operation == "open":
        assert {code for code, _, _ in answers} == {503}
    assert max(seconds for _, _, seconds in answers) < DISK + 1
    world.disk.go()
    until("the path to come back", lambda: world.health(world.disk.path).healthy)


@contextmanager
def silent_peer() -> Iterator[str]:
    """Accepts connections, by the kernel's grace, and never says a word; its base URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/remote"


def test_a_silent_peer_costs_one_deadline_and_nobody_else_anything(
    tmp_path: Path, world: World
) -> None:
    count, first_byte = 100, 1.0
    world.start()
    with cluster(tmp_path, "reader") as (reader,), silent_peer() as url:
        configure(reader)
        reader.start(mount=True, index=world.node)
        held: dict[str, Facts | None] = {
            f"sealed/s-t09000-{number}": Facts(SIZE, 1_700_000_000_000_000_000)
            for number in range(count)
        }
        declare_at(world.node, "silent", url, held)
        files = [reader.mountpoint / name for name in held]
        until("the files to be seen", lambda: files[-1].exists())
        until("the healthy files to be seen", (reader.mountpoint / "sealed/s-t01000-0").exists)

        asker = world.clients.asker()
        openers = world.clients.openers(files)
        until("fetches to wait", lambda: len(status(reader).fetches) > 50)
        fetched = asker.do("read", reader.mountpoint / "sealed/s-t01000-1")
        assert fetched["error"] == 0
        assert fetched["seconds"] < 1
        answers = [openers.answer() for _ in range(count)]
        assert {answer["error"] for answer in answers} == {errno.EIO}
        assert max(answer["seconds"] for answer in answers) > first_byte - 0.2
        later = asker.do("read", files[0])
        assert later["error"] == errno.EIO
        assert later["seconds"] < first_byte + 1
        assert max(answer["seconds"] for answer in answers) < 2 * first_byte + 1
