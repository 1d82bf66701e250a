"""What the works are done on: files, nodes and peers, each made when a work first needs it.

One node holds all files and mounts them; a second one fetches from it. Hard links make many remote
files out of one: each whole fetch takes one that nobody fetched before, and costs no room.
"""

from __future__ import annotations

import getpass
import itertools
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

from tests.bench import processes
from tests.bench.processes import listening, mounted, program, running
from tests.cluster import Node, until
from tests.cluster_fixtures import free_port, unmount

T = TypeVar("T")

GIB = 1 << 30
BIG = 2 * GIB
"""Bytes of the file that is read here."""
FETCHED = GIB
"""Bytes of the file that is fetched whole."""
LISTED = 100_000
"""Entries of the directory that is listed."""
OPENED = 5_000
"""Small files that are opened one after another."""
SMALL = 8192
PROOF = 2_000
"""Files that are open at once."""
PROOF_SIZE = 1 << 20
"""Bytes of each: the least that the kernel reads without the daemon."""
PAYLOAD = 127 << 20
"""Bytes that are padded and hashed."""
INDEX = 2 * GIB
"""An Index of a million sectors."""
NEEDED = BIG + PROOF * PROOF_SIZE + 3 * FETCHED + INDEX + GIB
"""Free bytes the directory must have: all this, two copies of the fetched file, and some air."""
COLD = GIB
"""Bytes of a sparse file that nobody has read."""
LONG = 4 * GIB
"""The same of one that is read whole."""
AT_ONCE = 1024
"""So many cold files are made at a time: each time, every mount has to learn of them."""
BIG_DIR, LISTED_DIR, OPENED_DIR, PROOF_DIR = "update", "sealed", "unsealed", "piece"
"""Type directories with the big files, the listed and the opened ones, and those open at once."""
COLD_DIR = "key"
BIG_FILE = Path(BIG_DIR) / "s-t01000-0"
LOAD = Path(__file__).with_name("load.c")
MERGERFS = {
    "mergerfs": "ro",
    "mergerfs-files": "ro,cache.files=auto-full",
    "mergerfs-readdir": "ro,cache.readdir=true",
}
"""Options of mergerfs by the name of the view."""


class Stage:
    """Everything a run needs, below one directory; ends it all in reverse order."""

    def __init__(self, root: Path, *, links: int) -> None:
        self.root = root
        self._link_count = links
        self._stack = ExitStack()
        self._made: dict[str, object] = {}
        self._links = itertools.count(2)
        self._cold: dict[int, list[str]] = {}
        self._cold_numbers = itertools.count()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._made:
            try:
                self._made[name] = make()
            except Exception as exc:
                self._made[name] = exc  # every row that needs it fails in the same way, at once
        made = self._made[name]
        if isinstance(made, Exception):
            raise made
        return cast(T, made)

    def enter(self, name: str, make: Callable[[], AbstractContextManager[T]]) -> T:
        """What a context manager gives, entered when a work first needs it, left at the end."""
        return self._once(name, lambda: self._stack.enter_context(make()))

    # --- files and nodes ---

    @property
    def holder(self) -> Node:
        """The node that holds every file, with a mount."""
        return self._once("holder", self._start_holder)

    @property
    def fetcher(self) -> Node:
        """The node that holds nothing, with a mount."""
        return self._once("fetcher", self._start_fetcher)

    @property
    def disk(self) -> Path:
        """The storage path with every file."""
        return self._once("disk", self._fill_disk)

    @property
    def load(self) -> Path:
        """The program that makes load, built for this run."""
        return self._once("load", self._build_load)

    def view(self, name: str) -> Path:
        """The tree of files: itself (``bare``), or through one of the file systems."""
        if name == "bare":
            return self.disk
        if name == "sectorfs":
            return self.holder.mountpoint
        if name == "sectorfs-daemon":
            return self._once("daemon", self._start_daemon).mountpoint
        return self.enter(name, lambda: self._union(name))

    def _build_load(self) -> Path:
        path = self.root / "load"
        warnings = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
        processes.said(program("cc"), "-std=c11", "-O2", "-pthread", *warnings, "-o", path, LOAD)
        return path

    @property
    def payload(self) -> Path:
        """A file to pad and hash: no stretch of zeros, of which trees are known."""
        return self._once("payload", self._write_payload)

    def _write_payload(self) -> Path:
        path = self.root / "payload"
        path.write_bytes(random.Random(2).randbytes(PAYLOAD))
        return path

    def cold(self, count: int, size: int = COLD) -> list[str]:
        """Names of sparse files below `COLD_DIR` that nobody has opened."""
        pool = self._cold.setdefault(size, [])
        if len(pool) < count:
            pool += self._make_cold(max(count, AT_ONCE * COLD // size), size)
        taken, self._cold[size] = pool[:count], pool[count:]
        return taken

    def _make_cold(self, count: int, size: int) -> list[str]:
        mountpoint = self.fetcher.mountpoint
        folder = self.disk / COLD_DIR
        folder.mkdir(exist_ok=True)
        names = [f"s-t01000-{next(self._cold_numbers)}" for _ in range(count)]
        for name in names:
            with (folder / name).open("wb") as file:
                file.truncate(size)

        def seen() -> bool:
            try:
                return set(names) <= set(os.listdir(mountpoint / COLD_DIR))
            except FileNotFoundError:
                return False

        until("the cold files to be seen", seen, 120)
        if "rclone" in self._made:
            self.rclone[0].send_signal(signal.SIGHUP)  # it keeps listings
        return names

    def next_link(self) -> str:
        """The name of a big file that nobody has fetched."""
        return f"s-t01000-{next(self._links)}"

    def _fill_disk(self) -> Path:
        disk = self.root / "disk"
        for name in (BIG_DIR, LISTED_DIR, OPENED_DIR, PROOF_DIR):
            (disk / name).mkdir(parents=True)
        for number in range(LISTED):
            with (disk / LISTED_DIR / f"s-t01000-{number}").open("wb") as file:
                file.truncate(32 * GIB)
        for number in range(OPENED):
            (disk / OPENED_DIR / f"s-t01000-{number}").write_bytes(os.urandom(SMALL))
        for number in range(PROOF):
            (disk / PROOF_DIR / f"s-t01000-{number}").write_bytes(os.urandom(PROOF_SIZE))
        _write_noise(disk / BIG_FILE, BIG)
        fetched = disk / BIG_DIR / "s-t01000-1"
        _write_noise(fetched, FETCHED)
        for number in range(2, self._link_count + 2):
            (disk / BIG_DIR / f"s-t01000-{number}").hardlink_to(fetched)
        os.sync()  # nothing is written back in the middle of a measurement
        return disk

    def _start_holder(self) -> Node:
        node = Node(self.root, "holder")
        self._stack.callback(node.end)
        _configure(node, "")
        node.call("storage", "attach", str(self.disk), "--init", "--store")
        node.start(mount=True)
        self._wait_for_files(node)
        return node

    def _start_fetcher(self) -> Node:
        holder = self.holder
        node = Node(self.root, "fetcher")
        self._stack.callback(node.end)
        _configure(node, f'[fetch]\npolicy = {{ {COLD_DIR} = "stream" }}\n')
        node.start(mount=True, index=holder)
        self._wait_for_files(node)
        return node

    def _start_daemon(self) -> Node:
        """A node of its own over the big file alone, which never reads past its daemon."""
        disk = self.root / "daemon-disk"
        (disk / BIG_DIR).mkdir(parents=True)
        (disk / BIG_FILE).hardlink_to(self.disk / BIG_FILE)
        node = Node(self.root, "daemon")
        self._stack.callback(node.end)
        _configure(node, '[mount]\npassthrough = "off"\n')
        node.call("storage", "attach", str(disk), "--init", "--store")
        node.start(mount=True)
        until("the big file", (node.mountpoint / BIG_FILE).exists)
        return node

    def _wait_for_files(self, node: Node) -> None:
        wanted = {
            LISTED_DIR: LISTED,
            OPENED_DIR: OPENED,
            PROOF_DIR: PROOF,
            BIG_DIR: self._link_count + 2,
        }

        def complete() -> bool:
            try:
                return all(
                    len(os.listdir(node.mountpoint / name)) == count
                    for name, count in wanted.items()
                )
            except FileNotFoundError:
                return False  # a type directory shows once it has a file

        until(f"{node.name} to show every file", complete, 120)

    # --- peers ---

    def _union(self, name: str) -> AbstractContextManager[Path]:
        at = self.root / name
        command = program("mergerfs" if name in MERGERFS else name)
        options = MERGERFS.get(name, "ro")
        return mounted(command, "-f", "-o", options, str(self.disk), str(at), at=at)

    @property
    def webdav(self) -> str:
        """URL of rclone's server over the storage path."""
        port = self._once("webdav port", free_port)
        command = [program("rclone"), "serve", "webdav", str(self.disk), "--read-only"]
        self.enter(
            "webdav",
            lambda: running(
                *command,
                "--config=/dev/null",
                "--dir-cache-time=100ms",  # files come while it runs
                f"--addr=127.0.0.1:{port}",
                log=self.root / "webdav.log",
                ready=lambda: listening(port),
            ),
        )
        return f"http://127.0.0.1:{port}"

    @property
    def rclone(self) -> tuple[subprocess.Popen[bytes], Path]:
        """The storage path through rclone's mount of that server: its process, and where."""
        return self.enter("rclone", self._rclone)

    @contextmanager
    def _rclone(self) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        at, cache = self.root / "rclone", self.root / "rclone-cache"
        at.mkdir()
        with running(
            *(program("rclone"), "mount", ":webdav:", str(at), f"--webdav-url={self.webdav}"),
            *("--config=/dev/null", "--vfs-cache-mode=full", f"--cache-dir={cache}"),
            *("--read-only", "--dir-cache-time=24h"),
            log=self.root / "rclone.log",
            ready=lambda: os.path.ismount(at),
        ) as process:
            try:
                yield process, at
            finally:
                unmount(at)

    @property
    def sshfs(self) -> Path:
        """The storage path through sshfs and an sshd on loopback with a key for this run."""
        return self.enter("sshfs", self._sshfs)

    def _sshfs(self) -> AbstractContextManager[Path]:
        port, folder = self._sshd()
        at = self.root / "sshfs"
        return mounted(
            program("sshfs"),
            *("-f", "-o", "ro", "-p", str(port), "-F", "/dev/null"),
            *("-o", f"IdentityFile={folder / 'user'}", "-o", "BatchMode=yes"),
            *("-o", f"UserKnownHostsFile={folder / 'known'}", "-o", "StrictHostKeyChecking=yes"),
            f"{getpass.getuser()}@127.0.0.1:{self.disk}",
            str(at),
            at=at,
        )

    def _sshd(self) -> tuple[int, Path]:
        """An sshd for this user and one key; its port, and the directory with the keys."""
        port, folder = free_port(), self.root / "ssh"
        folder.mkdir(mode=0o700)
        for name in ("host", "user"):
            key = str(folder / name)
            processes.said(program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key)
        host = (folder / "host.pub").read_text()
        (folder / "known").write_text(f"[127.0.0.1]:{port} {host}")
        (folder / "config").write_text(
            f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder / 'host'}\n"
            f"AuthorizedKeysFile {folder / 'user.pub'}\nAllowUsers {getpass.getuser()}\n"
            "AuthenticationMethods publickey\nUsePAM no\nStrictModes no\nPidFile none\n"
            "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
            "ForceCommand internal-sftp\n"
        )
        empty = Path("/run/sshd")  # sshd refuses to start without
        if not empty.exists():
            empty.mkdir(mode=0o755)
            self._stack.callback(empty.rmdir)
        self._stack.enter_context(
            running(
                *(program("sshd"), "-D", "-e", "-f", str(folder / "config")),
                log=folder / "log",
                ready=lambda: listening(port),
            )
        )
        return port, folder


def _configure(node: Node, settings: str) -> None:
    """Settings of a node, which does not begin to hash in the middle of a measurement."""
    node.repo.create()
    node.repo.config_toml.write_text(f"{settings}[hash]\ndelay = 86400\n")


def _write_noise(path: Path, size: int) -> None:
    source = random.Random(1)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(source.randbytes(1 << 20))
