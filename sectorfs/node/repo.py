"""The repo directory: one node's settings, keys and state, held by one process at a time.

The lock is a `flock` on ``<repo>/lock``, whose text is the holder's pid and its mount point. A
daemon killed while one of its threads hangs in the kernel stays a zombie that keeps its locks, so a
lock whose holder is a zombie counts as free: the file is replaced by a new one, and whoever ends up
holding the file that lies at the path holds the repo.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sectorfs import config as config_module
from sectorfs.config import Config
from sectorfs.errors import BadConfig, Refused, from_os
from sectorfs.stores.metadata import write_atomically
from sectorfs.wire import tokens


def process_runs(pid: int) -> bool:
    """True while a process lives; a zombie (killed, with a thread stuck in the kernel) does not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    match = re.search(r"^State:\s+(\S)", status, re.MULTILINE)
    return match is not None and match[1] not in "ZX"


class Repo:
    """Paths and small files of one repo directory."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root.expanduser()))

    @property
    def index_db(self) -> Path:
        """The embedded Index."""
        return self.root / "index.db"

    @property
    def storage_json(self) -> Path:
        """Attached storage paths, as lotus writes them."""
        return self.root / "storage.json"

    @property
    def config_toml(self) -> Path:
        """Settings."""
        return self.root / "config.toml"

    @property
    def log(self) -> Path:
        """Where a node in the background writes its log."""
        return self.root / "log"

    def create(self) -> None:
        """Make the directory (mode 0700) unless it is there."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise from_os(exc, "repo directory cannot be made", self.root) from exc

    def config(self) -> Config:
        """The settings of ``config.toml``."""
        return config_module.load(self.config_toml)

    def cache_path(self, config: Config) -> Path:
        """The node's cache path."""
        return self.root / config.cache.path

    # --- the lock ---

    def mountpoint(self) -> str | None:
        """Where the holder of the repo has its mount."""
        try:
            lines = (self.root / "lock").read_text().splitlines()
        except FileNotFoundError:
            return None
        return lines[1] if len(lines) > 1 else None

    def write_mountpoint(self, path: str) -> None:
        """Note the holder's mount point; only the holder calls this."""
        with (self.root / "lock").open("w") as file:
            file.write(f"{os.getpid()}\n{path}\n")

    def holder(self) -> int | None:
        """Pid of the live process that holds the repo, without taking it."""
        try:
            fd = os.open(self.root / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _live_pid(fd)
            return None
        finally:
            os.close(fd)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the repo; `Refused` naming the pid while another live process does."""
        fd = self._take_lock()
        try:
            yield
        finally:
            os.close(fd)

    def _take_lock(self) -> int:
        path = self.root / "lock"
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _live_pid(fd)
                os.close(fd)
                if pid is not None:
                    raise Refused(
                        f"repo is in use by process {pid}",
                        self.root,
                        "stop that node, or choose another directory with --repo",
                    ) from None
                self._replace_lock(path)
                continue
            if os.fstat(fd).st_ino == _inode(path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
            os.close(fd)  # somebody replaced the file meanwhile: look again

    def _replace_lock(self, path: Path) -> None:
        """Put a fresh lock file in place of one that a zombie holds."""
        fd, temp = tempfile.mkstemp(dir=self.root, prefix=".lock.", suffix=".tmp")
        os.close(fd)
        os.replace(temp, path)

    # --- secret and token ---

    def secret(self, *, create: bool) -> tokens.Secret:
        """The cluster's JWT key; made on first use when `create`, else its absence is an error."""
        path = self.root / "secret"
        if not path.exists():
            if not create:
                raise BadConfig(
                    "the cluster's secret is missing", path, "copy it from the index node"
                )
            self._write("secret", tokens.new_secret().text)
        return tokens.load_secret(path)

    def admin_token(self, secret: tokens.Secret) -> str:
        """The admin token of ``<repo>/token``, made again when the secret changed."""
        path = self.root / "token"
        token = tokens.sign(secret, ("admin",))
        with suppress(FileNotFoundError):
            if path.read_text().strip() == token:
                return token
        self._write("token", token)
        return token

    # --- the running node ---

    def write_api(self, url: str) -> None:
        """Announce the node's own address; written when it is ready."""
        self._write("api", url)

    def remove_api(self) -> None:
        """The node stops."""
        with suppress(FileNotFoundError):
            (self.root / "api").unlink()

    def api(self) -> str | None:
        """Address of the running node; a stale file counts as none."""
        if self.holder() is None:
            return None
        try:
            return (self.root / "api").read_text().strip() or None
        except FileNotFoundError:
            return None

    # --- URLs this node was known under ---

    def advertised(self) -> list[str]:
        """URLs this node's paths may still be attached under."""
        try:
            return (self.root / "advertised").read_text().split()
        except FileNotFoundError:
            return []

    def write_advertised(self, urls: list[str]) -> None:
        """Remember them before the first attach, forget old ones after their detach."""
        self._write("advertised", "\n".join(urls))

    def _write(self, name: str, text: str) -> None:
        path = self.root / name
        try:
            write_atomically(str(path), f"{text.strip()}\n".encode(), mode=0o600)
        except OSError as exc:
            raise from_os(exc, "cannot be written", path) from exc


def _live_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).decode(errors="replace").partition("\n")[0]
    if not text.isdigit():
        # The holder is between taking the lock and writing its pid: alive.
        return 0
    pid = int(text)
    return pid if process_runs(pid) else None


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
