"""Programs beside sectorfs: file systems and servers while a block runs, commands to an end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.runner import PATIENCE, LeftOut
from tests.cluster import until
from tests.cluster_fixtures import unmount


def program(name: str) -> str:
    """Where a program is; the row is left out without it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise LeftOut(f"{name} is not installed")
    return found


def seconds(*command: str | Path, output: Path | None = None) -> float:
    """How long a command takes that must succeed; what it prints goes to `output`."""
    with (output or Path(os.devnull)).open("wb") as sink:
        start = time.perf_counter()
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.PIPE, check=True
        )
        return time.perf_counter() - start


def said(*command: str | Path, given: str = "") -> str:
    """What a command prints that must succeed; `given` is its input."""
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


@contextmanager
def running(
    *command: str, log: Path, ready: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the foreground until the end of the block; it dies with this process."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [program("setpriv"), "--pdeathsig", "TERM", *command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )

    def up() -> bool:
        if process.poll() is not None:
            raise LeftOut(f"{Path(command[0]).name} does not run here: {_last_line(log)}")
        return ready()

    try:
        until(f"{command[0]} to be ready", up)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)


@contextmanager
def mounted(*command: str, at: Path) -> Iterator[Path]:
    """A file system that its program keeps at `at` while it runs in the foreground."""
    at.mkdir()
    with running(*command, log=at.with_suffix(".log"), ready=lambda: os.path.ismount(at)):
        try:
            yield at
        finally:
            unmount(at)


def listening(port: int) -> bool:
    """True when somebody on loopback takes connections on a port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
