"""`sectorfs demo`: two nodes on this machine, a mount over both, and the proof that it works.

The nodes are real processes started through the same command line that operators use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console

from sectorfs.cli import sample
from sectorfs.errors import Refused, SectorFSError, TimedOut
from sectorfs.fuse import mounts
from sectorfs.node.repo import Repo
from sectorfs.types import SectorFile, SectorID

PATIENCE = 60.0
"""Seconds that starting a node or seeing all sectors may take."""
POLL = 0.05


class DemoFailed(SectorFSError):
    """What the demo shows did not come true."""


class Demo:
    """Two repos, two storage paths, one mount, below one directory."""

    def __init__(self, root: Path, console: Console) -> None:
        self.root = root
        self.console = console
        self.first = Repo(root / "first")
        self.second = Repo(root / "second")
        self.disks = (root / "disk-first", root / "disk-second")
        self.mountpoint = root / "sectors"
        self.files: dict[SectorFile, Path] = {}

    def run(self, *, once: bool) -> None:
        """Set up, show, and clean up; without `once` stay until Ctrl-C in between."""
        with ExitStack() as stack:
            self._write_samples()
            self._start(stack)
            self._wait("the mount to show every sector", self._all_shown)
            self._show()
            self._compare()
            self._tools()
            if not once:
                self._stay()
        self.say("stopped both nodes, unmounted, removed the files")

    def say(self, text: str) -> None:
        """One line of what is done."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    # --- steps ---

    def _write_samples(self) -> None:
        for number, disk in enumerate(self.disks, start=1):
            for sector in (SectorID(1000, 10 * number + 1), SectorID(1000, 10 * number + 2)):
                for file in sample.write_sector(disk, sector):
                    self.files[file] = disk / file.file_type.dir_name / sector.name
        self.say(f"wrote {len(self.files)} sector files of 8 MiB sectors below {self.root}")

    def _start(self, stack: ExitStack) -> None:
        stack.enter_context(self._node(self.first, self.disks[0], ["serve"]))
        api = self.first.api()
        self.second.create()
        shutil.copy(self.first.root / "secret", self.second.root / "secret")
        arguments = ["mount", str(self.mountpoint), "--index", f"{api}/rpc/v0"]
        self.mountpoint.mkdir(exist_ok=True)
        stack.enter_context(self._node(self.second, self.disks[1], arguments))
        self.say(f"mounted {self.mountpoint} on the second node")

    @contextmanager
    def _node(self, repo: Repo, disk: Path, verb: Sequence[str]) -> Iterator[None]:
        repo.create()
        command = [*_sectorfs(repo), *verb, "--listen", "127.0.0.1:0"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=(repo.root / "log").open("wb")
        )
        try:
            self._wait(
                f"node {repo.root.name} to start",
                lambda: process.poll() is not None or repo.api() is not None,
            )
            if process.poll() is not None:
                raise DemoFailed("node did not start", repo.root, repo.log.read_text()[-500:])
            self.say(f"node {repo.root.name} runs at {repo.api()}")
            self._call(repo, "storage", "attach", str(disk), "--init", "--store")
            self.say(f"attached {disk} on node {repo.root.name}")
            yield
        finally:
            _stop(process)

    def _all_shown(self) -> bool:
        return all((self.mountpoint / str(file)).exists() for file in self.files)

    def _show(self) -> None:
        for name in sorted(os.listdir(self.mountpoint)):
            folder = self.mountpoint / name
            self.say(f"{folder}: {' '.join(sorted(os.listdir(folder)))}")

    def _compare(self) -> None:
        compared = size = 0
        for file, path in sorted(self.files.items()):
            for source in sorted(path.iterdir()) if path.is_dir() else [path]:
                shown = self.mountpoint / str(file)
                if path.is_dir():
                    shown = shown / source.name
                if _digest(shown) != _digest(source):
                    raise DemoFailed("digest through the mount differs", shown, f"from {source}")
                compared += 1
                size += source.stat().st_size
        self.say(
            f"compared SHA-256 of {compared} files, {size >> 20} MiB, half of them remote: equal"
        )

    def _tools(self) -> None:
        """The tools that people use on sector files, on the mount as a whole."""
        copy = self.root / "copy"
        for command in (
            ["cp", "-r", str(self.mountpoint), str(copy)],
            ["tar", "-cf", "/dev/null", "-C", str(self.mountpoint), "."],
            ["find", str(self.mountpoint), "-type", "f", "-size", "+1M"],
            ["rsync", "-a", "--checksum", f"{self.mountpoint}/", str(copy)],
        ):
            if shutil.which(command[0]) is None:
                self.say(f"{command[0]} is not installed, left out")
                continue
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise DemoFailed(
                    f"{' '.join(command)} failed", self.mountpoint, result.stderr[-500:]
                )
            self.say(f"ran {' '.join(command)}")

    def _stay(self) -> None:
        self.say(f"look around in {self.mountpoint}; Ctrl-C stops the nodes and cleans up. Try:")
        repo = self.second.root
        self.say(f"  ls -l {self.mountpoint}/sealed")
        self.say(f"  getfattr -n user.sectorfs.locations {self.mountpoint}/sealed/s-t01000-11")
        self.say(f"  {sys.argv[0]} --repo {repo} status")
        self.say(f"  {sys.argv[0]} --repo {repo} storage list")
        with suppress(KeyboardInterrupt):
            signal.pause()

    # --- pieces ---

    def _call(self, repo: Repo, *arguments: str) -> None:
        result = subprocess.run([*_sectorfs(repo), *arguments], capture_output=True, text=True)
        if result.returncode:
            raise DemoFailed(f"sectorfs {' '.join(arguments)} failed", repo.root, result.stderr)

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise TimedOut(f"waited {PATIENCE:g} s for {what}", self.root)
            time.sleep(POLL)


def run(directory: Path | None, *, once: bool, console: Console) -> None:
    """Run the demo in an empty or new `directory`, or in a temporary one; leaves nothing behind."""
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise Refused("directory is not empty", directory, "name an empty or a new one")
    with ExitStack() as stack:
        if directory is None:
            root = Path(tempfile.mkdtemp(prefix="sectorfs-demo-"))
        else:
            root = directory.absolute()
            root.mkdir(parents=True, exist_ok=True)
        demo = Demo(root, console)
        stack.callback(_remove, demo)
        stack.enter_context(_stopped_by_signals())
        demo.run(once=once)


def _remove(demo: Demo) -> None:
    if mounts.find_mount(demo.mountpoint) is None:
        shutil.rmtree(demo.root)
    else:
        demo.say(f"{demo.mountpoint} is still mounted: {demo.root} was left")


def _sectorfs(repo: Repo) -> list[str]:
    return [sys.executable, "-m", "sectorfs", "--repo", str(repo.root)]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that everything is cleaned up."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
