"""Real nodes as real processes on loopback, for tests of the whole program."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sectorfs.fuse import mounts
from sectorfs.node.repo import Repo, process_runs

T = TypeVar("T")

DEADLINE = 30.0
LOG_SHOWN = 6000
"""Characters."""
SECTORFS = [sys.executable, "-m", "sectorfs"]


def until(what: str, condition: Callable[[], T], deadline: float = DEADLINE) -> T:
    """Poll a condition until it is true; fail by name at the deadline."""
    end = time.monotonic() + deadline
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"waited {deadline} s for {what}"
        _pause()


def _pause() -> None:
    # Gives the processes under test the processor; no test depends on how long it takes.
    time.sleep(0.02)


def run(*arguments: str, repo: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """One command line of sectorfs, whatever comes of it."""
    return subprocess.run(
        [*SECTORFS, "--repo", str(repo), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Node:
    """One node: a repo, a process, perhaps a mount."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self.repo = Repo(root / name)
        self.mountpoint = root / f"{name}-sectors"
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        """More variables for the process."""

    def call(self, *arguments: str) -> str:
        """A verb that must succeed; its output."""
        result = run(*arguments, repo=self.repo.root)
        assert result.returncode == 0, f"{arguments}: {result.stderr}\n{self.log()}"
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """A verb that must succeed; its JSON."""
        return json.loads(self.call(*arguments, "--json"))

    def start(
        self, *arguments: str, mount: bool = False, index: Node | None = None, wait: bool = True
    ) -> None:
        """Start the process and wait until it is ready."""
        self.repo.create()
        command = [*SECTORFS, "--repo", str(self.repo.root)]
        if mount:
            self.mountpoint.mkdir(exist_ok=True)
            command += ["mount", str(self.mountpoint)]
        else:
            command += ["serve"]
        if index is not None:
            shutil.copy(index.repo.root / "secret", self.repo.root / "secret")
            command += ["--index", f"{index.repo.api()}/rpc/v0"]
        if "--listen" not in arguments:
            command += ["--listen", "127.0.0.1:0"]
        log = (self.root / f"{self.name}.log").open("ab")
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdout=log,
            stderr=log,
            env={**os.environ, **self.environment},
        )
        log.close()
        if wait:
            self.ready()

    def ready(self) -> None:
        """Wait until the node announces itself."""
        process = self.process
        assert process is not None

        def up() -> bool:
            assert process.poll() is None, f"{self.name} ended:\n{self.log()}"
            return self.repo.api() is not None and self.repo.holder() == process.pid

        until(f"{self.name} to start", up)

    def kill(self) -> None:
        """Kill the process as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, and wait for nothing."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask the process to stop; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def end(self) -> None:
        """Whatever state it is in: no process, no mount."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self._clear_mount()
                self.process.wait(10)
        self._clear_mount()

    def _clear_mount(self) -> None:
        mount = mounts.find_mount(self.mountpoint)
        if mount is not None:
            mounts.abort(mount.minor)
            mounts.detach(self.mountpoint)

    def log(self) -> str:
        """What the process said so far."""
        path = self.root / f"{self.name}.log"
        return path.read_text() if path.exists() else ""

    def pid(self) -> int:
        """Process id."""
        assert self.process is not None
        return self.process.pid

    def alive(self) -> bool:
        """True while the process lives."""
        return process_runs(self.pid())

    def disk(self, name: str = "disk") -> Path:
        """A storage path of this node, initialised and attached."""
        path = self.root / f"{self.name}-{name}"
        self.call("storage", "attach", str(path), "--init", "--store")
        return path


@contextmanager
def cluster(root: Path, *names: str) -> Iterator[list[Node]]:
    """Nodes by name, not started; all ended at the end. What they said is shown with a failure."""
    nodes = [Node(root, name) for name in names]
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.end)
        try:
            yield nodes
        except BaseException:
            for node in nodes:
                print(f"--- the end of what {node.name} said:\n{node.log()[-LOG_SHOWN:]}")
            raise


def write(path: Path, data: bytes) -> None:
    """Write a file the way careful producers do: temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    os.rename(temporary, path)


def write_cache(path: Path, files: dict[str, bytes]) -> None:
    """Write a sector directory at once."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.mkdir(parents=True)
    for name, data in files.items():
        (temporary / name).write_bytes(data)
    os.rename(temporary, path)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree(root: Path, types: Sequence[str] = ("unsealed", "sealed", "cache")) -> dict[str, str]:
    """Every regular file below the type directories by relative name, with its digest."""
    return {
        str(path.relative_to(root)): digest(path)
        for name in types
        for path in sorted((root / name).rglob("*"))
        if path.is_file() and "fetching" not in path.parts
    }
