"""What the works are done on: files, nodes and peers, each made when a work first needs it.

One node holds all files and mounts them; a second one fetches from it. Hard links make many remote
files out of one: each whole fetch takes one that nobody fetched before, and costs no room.
"""

from __future__ import annotations

import getpass
import itertools
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

from tests.bench import processes
from tests.bench.processes import listening, mounted, program, running
from tests.cluster import Node, until
from tests.cluster_fixtures import free_port

T = TypeVar("T")

GIB = 1 << 30
BIG = GIB
"""Bytes of the file that is read and fetched whole."""
LISTED = 20_000
"""Entries of the directory that is listed."""
OPENED = 2_000
"""Small files that are opened one after another."""
SMALL = 8192
PAYLOAD = 127 << 20
"""Bytes that are padded and hashed."""
NEEDED = 5 * GIB
"""Free bytes the directory must have: the file, copies of it, and some air."""
BIG_DIR, LISTED_DIR, OPENED_DIR = "update", "sealed", "unsealed"
"""Type directories with the big files, the listed and the opened ones."""


class Stage:
    """Everything a run needs, below one directory; ends it all in reverse order."""

    def __init__(self, root: Path, *, links: int) -> None:
        self.root = root
        self._link_count = links
        self._stack = ExitStack()
        self._made: dict[str, object] = {}
        self._links = itertools.count(1)

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

    def _enter(self, name: str, make: Callable[[], AbstractContextManager[T]]) -> T:
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

    def view(self, name: str) -> Path:
        """The tree of files: itself (``bare``), or through one of the file systems."""
        if name == "bare":
            return self.disk
        if name == "sectorfs":
            return self.holder.mountpoint
        return self._enter(name, lambda: self._union(name))

    @property
    def payload(self) -> Path:
        """A file to pad and hash: no stretch of zeros, of which trees are known."""
        return self._once("payload", self._write_payload)

    def _write_payload(self) -> Path:
        path = self.root / "payload"
        path.write_bytes(random.Random(2).randbytes(PAYLOAD))
        return path

    def next_link(self) -> str:
        """The name of a big file that nobody has fetched."""
        return f"s-t01000-{next(self._links)}"

    def _fill_disk(self) -> Path:
        disk = self.root / "disk"
        for name in (BIG_DIR, LISTED_DIR, OPENED_DIR):
            (disk / name).mkdir(parents=True)
        for number in range(LISTED):
            with (disk / LISTED_DIR / f"s-t01000-{number}").open("wb") as file:
                file.truncate(32 * GIB)
        for number in range(OPENED):
            (disk / OPENED_DIR / f"s-t01000-{number}").write_bytes(os.urandom(SMALL))
        big = disk / BIG_DIR / "s-t01000-0"
        source = random.Random(1)
        with big.open("wb") as file:
            for _ in range(BIG >> 20):
                file.write(source.randbytes(1 << 20))
        for number in range(1, self._link_count + 1):
            (disk / BIG_DIR / f"s-t01000-{number}").hardlink_to(big)
        os.sync()  # nothing is written back in the middle of a measurement
        return disk

    def _start_holder(self) -> Node:
        node = Node(self.root, "holder")
        self._stack.callback(node.end)
        node.call("storage", "attach", str(self.disk), "--init", "--store")
        node.start(mount=True)
        self._wait_for_files(node)
        return node

    def _start_fetcher(self) -> Node:
        holder = self.holder
        node = Node(self.root, "fetcher")
        self._stack.callback(node.end)
        node.start(mount=True, index=holder)
        self._wait_for_files(node)
        return node

    def _wait_for_files(self, node: Node) -> None:
        wanted = {LISTED_DIR: LISTED, OPENED_DIR: OPENED, BIG_DIR: self._link_count + 1}

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
        options = {"mergerfs": "cache.files=auto-full", "bindfs": "ro"}[name]
        at = self.root / name
        return mounted(program(name), "-f", "-o", options, str(self.disk), str(at), at=at)

    @property
    def webdav(self) -> str:
        """URL of rclone's server over the storage path."""
        port = self._once("webdav port", free_port)
        command = [program("rclone"), "serve", "webdav", str(self.disk), "--read-only"]
        self._enter(
            "webdav",
            lambda: running(
                *command,
                "--config=/dev/null",
                f"--addr=127.0.0.1:{port}",
                log=self.root / "webdav.log",
                ready=lambda: listening(port),
            ),
        )
        return f"http://127.0.0.1:{port}"

    @property
    def sshfs(self) -> Path:
        """The storage path through sshfs and an sshd on loopback with a key for this run."""
        return self._enter("sshfs", self._sshfs)

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
