"""The repo directory: one node's settings, keys and state, held by one process at a time.

The lock is a `flock` on ``<repo>/lock``, whose text is the holder's pid and its mount point. A
daemon killed while one of its threads hangs in the kernel stays a zombie that keeps its locks, so a
lock whose holder is a zombie counts as free: the file is replaced by a new one, and whoever ends up
holding the file that lies at the path holds the repo.

Whoever only asks who holds the repo takes the lock shared for an instant, and the text of a lock
just taken is still its last holder's: a start that meets either looks again instead of trusting it.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sectorfs import config as config_module
from sectorfs.config import Config
from sectorfs.errors import BadConfig, Refused, from_os
from sectorfs.stores.metadata import write_atomically
from sectorfs.types import StorageID, parse_storage_id
from sectorfs.wire import tokens

LOCK_PATIENCE = 1.0
"""Seconds that a start waits for whoever takes the lock at the same moment to say who it is."""


def process_runs(pid: int) -> bool:
    """True while a process lives; a zombie (killed, with a thread stuck in the kernel) does not."""
    return _process_state(pid) not in ("", "Z", "X")


def _process_state(pid: int) -> str:
    """The letter of ``/proc/PID/status``; empty when there is no such process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    match = re.search(r"^State:\s+(\S)", status, re.MULTILINE)
    return match[1] if match else ""


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
        except (FileExistsError, NotADirectoryError) as exc:
            raise _not_a_directory(self.root) from exc
        except OSError as exc:
            raise from_os(exc, "repo directory cannot be made", self.root) from exc

    def config(self) -> Config:
        """The settings of ``config.toml``."""
        return config_module.load(self.config_toml)

    def cache_path(self, config: Config) -> Path:
        """The node's cache path."""
        return self.root / config.cache.path

    def cache_storage(self, config: Config) -> StorageID | None:
        """The storage id of the cache path when it was used last; None for one never used."""
        storage, _, path = (self._read("cache-path") or "").strip().partition(" ")
        if path != str(self.cache_path(config)):
            return None
        try:
            return parse_storage_id(storage)
        except ValueError:
            return None

    def write_cache_storage(self, config: Config, storage: StorageID) -> None:
        """Remember it for a start at which the cache path's disk does not answer."""
        if self.cache_storage(config) != storage:
            self._write("cache-path", f"{storage} {self.cache_path(config)}")

    def knows_index(self, url: str) -> bool:
        """Whether the Index at this URL has answered this node before."""
        return (self._read("index-url") or "").strip() == url

    def note_index(self, url: str) -> None:
        """Remember that an Index answered, for a start at which it does not."""
        if not self.knows_index(url):
            self._write("index-url", url)

    @property
    def manifests(self) -> Path:
        """What proves the files of this node."""
        return self.root / "manifests"

    def hashing_paused(self) -> bool:
        """Whether an operator holds up the hashing of files."""
        return self._read("hashing-paused") is not None

    def write_hashing_paused(self, *, paused: bool) -> None:
        """Remember it over restarts."""
        if paused:
            self._write("hashing-paused", "see `sectorfs hash`")
        else:
            with suppress(FileNotFoundError):
                (self.root / "hashing-paused").unlink()

    @property
    def scrub(self) -> Path:
        """How far the scrub of each storage is, and what it found."""
        return self.root / "scrub"

    # --- the lock ---

    def mountpoint(self) -> str | None:
        """Where the holder of the repo has its mount."""
        text = self._read("lock")
        return (text or "").partition("\n")[2].removesuffix("\n") or None

    def write_mountpoint(self, path: str) -> None:
        """Note the holder's mount point; only the holder calls this."""
        try:
            with (self.root / "lock").open("w") as file:
                file.write(f"{os.getpid()}\n{path}\n")
        except OSError as exc:
            raise from_os(exc, "cannot be written", self.root / "lock") from exc

    def holder(self) -> int | None:
        """Pid of the live process that holds the repo, without taking it."""
        try:
            fd = os.open(self.root / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except NotADirectoryError as exc:
            raise _not_a_directory(self.root) from exc
        except OSError as exc:
            raise from_os(exc, "cannot be read", self.root / "lock") from exc
        try:
            if _lock_shared(fd):
                return None
            pid = _noted_pid(fd)
            # No pid: the holder is between taking the lock and noting it, so it lives.
            return pid if pid == 0 or process_runs(pid) else None
        finally:
            os.close(fd)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the repo; `Refused` naming the pid while another live process does."""
        try:
            fd = self._take_lock()
        except OSError as exc:
            raise from_os(exc, "cannot be locked", self.root / "lock") from exc
        try:
            yield
        finally:
            os.close(fd)

    def _take_lock(self) -> int:
        path = self.root / "lock"
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if self._lock_now(fd, path, deadline):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _lock_now(self, fd: int, path: Path, deadline: float) -> bool:
        """Take the lock of an open lock file; False when all is to be looked at again."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not _lock_shared(fd):
                self._judge_holder(_noted_pid(fd), path, deadline)
            return False
        if os.fstat(fd).st_ino != _inode(path):
            return False  # somebody replaced the file meanwhile
        # Of a node that was killed; gone before a live pid is noted, or it would pass for ours.
        self.remove_api()
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return True

    def _judge_holder(self, pid: int, path: Path, deadline: float) -> None:
        """`Refused` for a live holder; a zombie's lock file is replaced."""
        state = _process_state(pid) if pid else ""
        if state in ("Z", "X"):
            self._replace_lock(path)
        elif state or time.monotonic() > deadline:
            # No state until the end: it runs where this process cannot see it, say in a container.
            raise Refused(
                f"repo is in use by process {pid or '(unknown)'}",
                self.root,
                "stop that node, or choose another directory with --repo",
            )

    def _replace_lock(self, path: Path) -> None:
        """Put a fresh lock file in place of one that a zombie holds."""
        fd, temp = tempfile.mkstemp(dir=self.root, prefix=".lock.", suffix=".tmp")
        os.close(fd)
        os.replace(temp, path)

    # --- secret and token ---

    def secret(self, *, create: bool) -> tokens.Secret:
        """The cluster's JWT key; made on first use when `create`, else its absence is an error."""
        path = self.root / "secret"
        if not os.path.lexists(path):
            if not create:
                raise BadConfig(
                    "the cluster's secret is missing", path, "copy it from the index node"
                )
            with suppress(FileExistsError):  # made by another command at this moment: use that
                self._write("secret", tokens.new_secret().text, replace=False)
        return tokens.load_secret(path)

    def admin_token(self, secret: tokens.Secret) -> str:
        """The admin token of ``<repo>/token``, made again when the secret changed."""
        token = tokens.sign(secret, ("admin",))
        if (self._read("token") or "").strip() != token:
            self._write("token", token)
        return token

    # --- the running node ---

    def write_api(self, url: str) -> None:
        """Announce the node's own address; written when it is ready."""
        self._write("api", url)

    def remove_api(self) -> None:
        """The node stops, or did not come to that."""
        with suppress(FileNotFoundError):
            (self.root / "api").unlink()

    def api(self) -> str | None:
        """Address of the running node; a stale file counts as none."""
        if self.holder() is None:
            return None
        return (self._read("api") or "").strip() or None

    # --- URLs this node was known under ---

    def advertised(self) -> list[str]:
        """URLs this node's paths may still be attached under."""
        return (self._read("advertised") or "").split()

    def write_advertised(self, urls: list[str]) -> None:
        """Remember them before the first attach, forget old ones after their detach."""
        self._write("advertised", "\n".join(urls))

    def _read(self, name: str) -> str | None:
        """The text of a small file of ours; None when there is none."""
        path = self.root / name
        try:
            return path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise from_os(exc, "cannot be read", path) from exc

    def _write(self, name: str, text: str, *, replace: bool = True) -> None:
        """Replace a small file of ours; without `replace` one that exists is `FileExistsError`."""
        path = self.root / name
        try:
            write_atomically(str(path), f"{text.strip()}\n".encode(), mode=0o600, replace=replace)
        except FileExistsError:
            raise
        except OSError as exc:
            raise from_os(exc, "cannot be written", path) from exc


def _not_a_directory(root: Path) -> BadConfig:
    return BadConfig("is not a directory", root, "name another one with --repo")


def _lock_shared(fd: int) -> bool:
    """True when nobody holds a lock file, apart from others who only ask; leaves it free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _noted_pid(fd: int) -> int:
    """The pid that a lock file names; 0 when it names none."""
    text = os.pread(fd, 32, 0).decode(errors="replace").partition("\n")[0]
    return int(text) if text.isascii() and text.isdigit() else 0


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
