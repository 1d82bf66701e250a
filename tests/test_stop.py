"""Stops of real processes: in order, and when their loop hangs."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sectorfs.fuse import mounts
from sectorfs.node import stop
from tests.cluster import SECTORFS, Node, cluster, until
from tests.cluster_fixtures import configure
from tests.mount_clients import Clients, read_line

BOUND = stop.PATIENCE + stop.RELEASE_SECONDS
"""Seconds after which a process that was told to stop is gone, whatever it does."""
SLACK = 3.0
"""For a busy machine."""

PROGRAM = """
import logging, os, signal, sys, time
import trio
from sectorfs.node.stop import LastResort

def release():
    print("released", flush=True)
    if "release" in sys.argv:
        time.sleep(1000)

async def work(token, scope):
    print("at work", flush=True)
    if "busy" in sys.argv:
        while True:
            pass
    elif "stuck" in sys.argv:
        os.read(pipe[0], 1)
    elif "logging" in sys.argv:
        with logging.getLogger().handlers[0].lock:
            os.read(pipe[0], 1)
    with trio.CancelScope(shield="shielded" in sys.argv):
        await trio.sleep_forever()

async def main():
    token, scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
    resort = LastResort(release, patience=float(sys.argv[1]), release_seconds=0.5)
    tell = lambda number: (print("told", number.name, flush=True),
                           token.run_sync_soon(scope.cancel))
    with resort.listening(tell), scope:
        await work(token, scope)
    print("stopped in order", signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)

pipe = os.pipe()
logging.basicConfig()
trio.run(main)
"""


class Program:
    """A process with a last resort and nothing else."""

    def __init__(self, patience: float, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(patience), *how.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self.line() == "at work"

    def line(self) -> str:
        assert self.process.stdout is not None
        return read_line(self.process.stdout, 20).decode().strip()

    def end(self, seconds: float = 20) -> tuple[int, str]:
        """Wait for its end, which comes within so many seconds; its status, what it said."""
        started = time.monotonic()
        out, errors = self.process.communicate(timeout=30)
        assert time.monotonic() - started < seconds
        return self.process.returncode, (out + errors).decode()


@contextmanager
def program(patience: float, how: str) -> Iterator[Program]:
    """The process, gone afterwards."""
    found = Program(patience, how)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_order_uses_no_last_resort(number: signal.Signals) -> None:
    with program(60, "well") as found:
        found.process.send_signal(number)
        assert found.line() == f"told {number.name}"
        status, said = found.end()
        assert status == 0
        assert said == "stopped in order set()\n"  # signals are as they were before


@pytest.mark.parametrize("how", ["busy", "stuck", "logging", "shielded", "release shielded"])
def test_a_loop_that_hangs_is_left_after_a_while(how: str) -> None:
    with program(0.2, how) as found:
        found.process.send_signal(signal.SIGTERM)
        assert found.line() == "told SIGTERM"
        status, said = found.end(10)
        assert status == 1
        assert said.startswith("released\n")
        if how in ("busy", "stuck", "shielded"):
            assert "stop took longer than 0.2 s: leaving without it" in said
            assert "in main" in said or "in get_events" in said, "where it hangs"


@pytest.mark.parametrize("how", ["busy", "stuck", "shielded"])
def test_a_second_signal_ends_it_at_once(how: str) -> None:
    with program(1000, how) as found:
        found.process.send_signal(signal.SIGTERM)
        assert found.line() == "told SIGTERM"
        found.process.send_signal(signal.SIGTERM)
        status, said = found.end()
        assert status == 1
        assert "stop was told twice" in said


# Nodes


def gone(node: Node, seconds: float) -> None:
    """The node ends, and its mount, within so many seconds."""
    assert node.process is not None
    started = time.monotonic()
    node.process.wait(30)
    assert time.monotonic() - started < seconds
    assert mounts.find_mount(node.mountpoint) is None


@pytest.mark.parametrize("twice", [False, True])
def test_a_node_that_hangs_in_its_start_is_stopped(tmp_path: Path, twice: bool) -> None:
    """A token's file on a disk that does not answer; here a pipe that nobody writes to."""
    with cluster(tmp_path, "node") as (node,):
        configure(node, peers={"token_file": str(tmp_path / "token")})
        os.mkfifo(tmp_path / "token")
        node.start(wait=False)
        with written_by_nobody(tmp_path / "token"):
            started = time.monotonic()
            node.send(signal.SIGTERM)
            if twice:
                until("the signal to be taken", lambda: not pending(node))
                node.send(signal.SIGTERM)
            gone(node, BOUND + SLACK)
        assert (time.monotonic() - started < stop.PATIENCE) is twice
        assert node.process is not None
        assert node.process.returncode == 1


@contextmanager
def written_by_nobody(pipe: Path) -> Iterator[None]:
    """Once somebody reads a named pipe; he waits for the time of the block."""

    def writer() -> int:
        with suppress(OSError):  # nobody has it open yet
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return 0

    fd = until("the node to read the pipe", writer)
    try:
        yield
    finally:
        os.close(fd)


def pending(node: Node) -> bool:
    """A signal was sent that nobody took yet."""
    text = Path(f"/proc/{node.pid()}/status").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("ShdPnd:")]
    return int(line.split()[1], 16) != 0


@pytest.mark.mount
def test_a_node_whose_loop_hangs_leaves_no_mount(tmp_path: Path) -> None:
    """Nobody reads its log any more, so that a line of it waits for good, the mount behind it."""
    clients = Clients(tmp_path)
    with cluster(tmp_path, "node") as (node,):
        configure(node)
        node.mountpoint.mkdir()
        command = [*SECTORFS, "--repo", str(node.repo.root), "mount", str(node.mountpoint), "-v"]
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        node.process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0"], stdout=writer, stderr=writer
        )
        os.close(writer)
        try:
            with open(reader, "rb", buffering=0, closefd=False) as log:
                while b"is ready" not in read_line(log, 30):
                    pass
            hang_by_log(node)
            asker = clients.asker()
            asker.send("ls", node.mountpoint)
            node.send(signal.SIGTERM)
            gone(node, BOUND + SLACK)
            assert node.process.returncode == 1
            assert asker.answer()["error"] != 0
        finally:
            clients.kill()
            os.close(reader)
    clients.reap()


def hang_by_log(node: Node) -> None:
    """Have the node log until it hangs."""
    host, _, port = (node.repo.api() or "").removeprefix("http://").rpartition(":")

    def hangs() -> bool:
        with suppress(OSError), socket.create_connection((host, int(port)), 1) as connection:
            connection.settimeout(1)
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            return not connection.recv(1)
        return True

    until("the node to hang", hangs)
