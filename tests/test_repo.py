"""The repo directory: its lock, its secrets and its small files."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sectorfs.errors import (
    BadConfig,
    BadInput,
    DiskError,
    NotFound,
    PermissionRefused,
    Refused,
    SectorFSError,
)
from sectorfs.node import repo as repo_module
from sectorfs.node.repo import Repo, process_runs
from sectorfs.types import StorageID
from sectorfs.wire import tokens
from tests.cluster import until

HOLD = """
import sys
from pathlib import Path
from sectorfs.node.repo import Repo
with Repo(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""
ZOMBIE = """
import fcntl, os, subprocess, sys
fd = os.open(sys.argv[1] + "/lock", os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, f"{os.getpid()}\\n".encode())
# A child without any pipe of ours keeps the open file, and with it the lock, as a thread that is
# stuck in the kernel would.
keeper = subprocess.Popen(["sleep", "300"], pass_fds=[fd], stdout=subprocess.DEVNULL)
print(keeper.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    made = Repo(tmp_path / "repo")
    made.create()
    return made


@contextmanager
def holding(repo: Repo) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a repo."""
    command = [sys.executable, "-c", HOLD, str(repo.root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def zombie(repo: Repo) -> Iterator[int]:
    """A killed process, not reaped, whose lock on the repo lives on; its pid."""
    command = [sys.executable, "-c", ZOMBIE, str(repo.root)]
    with ExitStack() as stack:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdin is not None
        stack.callback(process.wait)
        stack.callback(process.stdin.close)
        stack.callback(process.stdout.close)
        keeper = int(process.stdout.readline())
        stack.callback(os.kill, keeper, signal.SIGKILL)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert "State:\tZ" in Path(f"/proc/{process.pid}/status").read_text()
        yield process.pid


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "deep" / "repo")
    repo.create()
    repo.create()
    assert mode(repo.root) == 0o700


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Repo(Path("~/.sectorfs")).root == tmp_path / ".sectorfs"


@pytest.mark.parametrize("below", ["file", "file/repo"])
def test_repo_that_is_a_file_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    repo = Repo(tmp_path / below)
    for attempt in (repo.create, repo.holder):
        with pytest.raises(BadConfig, match="not a directory") as caught:
            attempt()
        assert caught.value.thing == str(repo.root)


def test_repo_below_a_directory_that_takes_none() -> None:
    with pytest.raises(SectorFSError, match="repo directory cannot be made"):
        Repo(Path("/proc/nowhere/repo")).create()


# --- the lock ---


def test_lock_is_refused_while_another_process_holds_it(repo: Repo) -> None:
    with holding(repo) as other:
        assert repo.holder() == other.pid
        with pytest.raises(Refused, match=f"in use by process {other.pid}") as caught, repo.lock():
            pass
        assert caught.value.thing == str(repo.root)
        assert "--repo" in caught.value.hint


def test_lock_of_a_killed_process_is_free(repo: Repo) -> None:
    with holding(repo) as other:
        other.kill()
        other.wait()
        assert repo.holder() is None
        with repo.lock():
            assert repo.holder() == os.getpid()


def test_lock_is_free_after_use(repo: Repo) -> None:
    for _ in range(2):
        with repo.lock():
            assert repo.holder() == os.getpid()
        assert repo.holder() is None


def test_lock_of_a_zombie_is_taken_over(repo: Repo) -> None:
    with zombie(repo) as pid:
        assert not process_runs(pid)
        assert repo.holder() is None
        fd = os.open(repo.root / "lock", os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(fd)
        with repo.lock():
            assert repo.holder() == os.getpid()
            with pytest.raises(Refused, match=str(os.getpid())), Repo(repo.root).lock():
                pass
        assert [name for name in os.listdir(repo.root) if name.startswith(".lock")] == []


def test_asking_who_holds_the_repo_never_refuses_a_start(repo: Repo) -> None:
    """A shared lock held by one who asks is waited out, whatever the file's text says."""
    (repo.root / "lock").write_text(f"{os.getpid()}\n")
    fd = os.open(repo.root / "lock", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    looks = 0

    def let_go(*arguments: object) -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            fcntl.flock(fd, fcntl.LOCK_UN)
        return seen(*arguments)

    seen: Callable[..., bool] = repo_module._lock_shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repo_module, "_lock_shared", let_go)
        with repo.lock():
            assert looks >= 2
    os.close(fd)


@pytest.mark.parametrize("text", ["", "99999999\n", "\0\xff"])
def test_lock_of_a_holder_that_cannot_be_seen_is_refused_in_the_end(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """In another container, or between taking the lock and noting its pid."""
    monkeypatch.setattr(repo_module, "LOCK_PATIENCE", 0.05)
    fd = os.open(repo.root / "lock", os.O_RDWR | os.O_CREAT)
    os.write(fd, text.encode())
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(Refused, match="in use by process"), repo.lock():
        pass
    assert Path(f"/proc/self/fd/{fd}").readlink() == repo.root / "lock", "it was replaced"
    os.close(fd)


def test_holder_that_has_not_noted_its_pid_is_alive(repo: Repo) -> None:
    fd = os.open(repo.root / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert repo.holder() == 0
    os.close(fd)


def test_lock_that_is_a_directory_is_named(repo: Repo) -> None:
    (repo.root / "lock").mkdir()
    with pytest.raises(DiskError, match="cannot be locked"), repo.lock():
        pass
    with pytest.raises(SectorFSError, match="lock"):
        repo.write_mountpoint("/sectors")


def test_refused_lock_leaks_no_descriptor(repo: Repo) -> None:
    with holding(repo):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(Refused), repo.lock():
                pass
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["/sectors", "/a b", "/two\nlines", "/ends\n"])
def test_mount_point_is_noted_in_the_lock(repo: Repo, path: str) -> None:
    assert repo.mountpoint() is None
    with repo.lock():
        assert repo.mountpoint() is None
        repo.write_mountpoint(path)
        assert repo.mountpoint() == path
        assert repo.holder() == os.getpid()
    with repo.lock():
        assert repo.mountpoint() is None


def test_unreadable_lock_is_named(repo: Repo) -> None:
    (repo.root / "lock").symlink_to("lock")
    with pytest.raises(DiskError, match="lock"):
        repo.holder()
    with pytest.raises(DiskError, match="lock"):
        repo.mountpoint()


# --- secret and token ---


def test_secret_is_made_once_and_kept(repo: Repo) -> None:
    first = repo.secret(create=True)
    assert repo.secret(create=True) == first
    assert repo.secret(create=False) == first
    assert mode(repo.root / "secret") == 0o600


def test_missing_secret_of_a_remote_index_says_where_from(repo: Repo) -> None:
    with pytest.raises(BadConfig, match="copy it from the index node") as caught:
        repo.secret(create=False)
    assert caught.value.thing == str(repo.root / "secret")
    assert not (repo.root / "secret").exists()


def test_two_commands_make_one_secret(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second found no file, and the first has made it before the second writes."""
    other = tokens.new_secret()

    def new_secret() -> tokens.Secret:
        (repo.root / "secret").write_text(other.text)
        return made()

    made = tokens.new_secret
    monkeypatch.setattr(tokens, "new_secret", new_secret)
    assert repo.secret(create=True) == other


def test_short_secret_is_refused(repo: Repo) -> None:
    (repo.root / "secret").write_text("short")
    with pytest.raises(BadInput, match="secret"):
        repo.secret(create=True)


def test_secret_link_to_nothing_is_not_replaced(repo: Repo) -> None:
    (repo.root / "secret").symlink_to("elsewhere")
    with pytest.raises(NotFound, match="secret"):
        repo.secret(create=True)


def test_admin_token_follows_the_secret(repo: Repo) -> None:
    first = repo.admin_token(repo.secret(create=True))
    assert mode(repo.root / "token") == 0o600
    inode = (repo.root / "token").stat().st_ino
    assert repo.admin_token(repo.secret(create=True)) == first
    assert (repo.root / "token").stat().st_ino == inode, "written though nothing changed"
    (repo.root / "secret").unlink()
    fresh = repo.secret(create=True)
    assert repo.admin_token(fresh) == (repo.root / "token").read_text().strip() != first
    assert tokens.claims(fresh, repo.admin_token(fresh)).permissions >= {"admin"}


def test_token_that_is_a_directory_is_named(repo: Repo) -> None:
    (repo.root / "token").mkdir()
    with pytest.raises(DiskError, match="token"):
        repo.admin_token(repo.secret(create=True))


# --- the running node ---


def test_stale_api_file_counts_as_no_node(repo: Repo) -> None:
    repo.write_api("http://127.0.0.1:1")
    assert repo.api() is None
    with holding(repo):
        # The new holder removed the address of a node that was killed.
        assert repo.api() is None


def test_stale_api_file_never_passes_for_that_of_a_new_holder(repo: Repo) -> None:
    """Looked at from another process at every moment of a start."""
    repo.create()
    (repo.root / "api").write_text("http://127.0.0.1:1\n")
    asked: list[str | None] = []
    write = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        asked.append((repo.root / "api").read_text() if (repo.root / "api").exists() else None)
        return write(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with repo.lock():
            assert not (repo.root / "api").exists()
    assert asked == [None]


def test_api_file_of_a_holder(repo: Repo) -> None:
    with repo.lock():
        assert repo.api() is None
        repo.write_api("http://127.0.0.1:8480")
        assert (repo.root / "api").read_text() == "http://127.0.0.1:8480\n"
        assert repo.api() == "http://127.0.0.1:8480"
        repo.remove_api()
        repo.remove_api()
        assert repo.api() is None


def test_empty_api_file_counts_as_no_node(repo: Repo) -> None:
    with repo.lock():
        (repo.root / "api").touch()
        assert repo.api() is None


def test_files_are_replaced_by_rename(repo: Repo) -> None:
    repo.write_api("http://a:1")
    with (repo.root / "api").open() as before:
        repo.write_api("http://b:1")
        assert before.read() == "http://a:1\n"
    assert [name for name in os.listdir(repo.root) if name.endswith(".tmp")] == []


def test_unwritable_file_is_named(repo: Repo) -> None:
    (repo.root / "api").mkdir()
    with pytest.raises(DiskError, match="api: cannot be written"):
        repo.write_api("http://a:1")
    assert [name for name in os.listdir(repo.root) if name.endswith(".tmp")] == []


def test_advertised_urls_are_remembered(repo: Repo) -> None:
    assert repo.advertised() == []
    repo.write_advertised(["http://a:1/remote", "http://b:1/remote"])
    assert repo.advertised() == ["http://a:1/remote", "http://b:1/remote"]


def test_the_cache_paths_id_is_remembered_for_that_path(repo: Repo) -> None:
    config = repo.config()
    assert repo.cache_storage(config) is None
    repo.write_cache_storage(config, StorageID("one"))
    assert repo.cache_storage(config) == "one"
    repo.write_cache_storage(config, StorageID("two"))
    assert repo.cache_storage(config) == "two"
    elsewhere = config.replace(cache={"path": "/a disk/cache"})
    assert repo.cache_storage(elsewhere) is None
    repo.write_cache_storage(elsewhere, StorageID("three"))
    assert repo.cache_storage(elsewhere) == "three"
    assert repo.cache_storage(config) is None


@pytest.mark.parametrize("text", ["", "one", " ", "../x {cache}", "{cache}", "\0 {cache}"])
def test_rubbish_is_no_id_of_the_cache_path(repo: Repo, text: str) -> None:
    path = repo.cache_path(repo.config())
    (repo.root / "cache-path").write_text(text.format(cache=path))
    assert repo.cache_storage(repo.config()) is None


def test_paths_of_the_repo(repo: Repo) -> None:
    (repo.root / "config.toml").write_text('[cache]\npath = "/elsewhere"\n')
    assert repo.cache_path(repo.config()) == Path("/elsewhere")
    (repo.root / "config.toml").write_text('[cache]\npath = "below"\n')
    assert repo.cache_path(repo.config()) == repo.root / "below"


def test_process_runs_knows_the_dead() -> None:
    with subprocess.Popen(["true"]) as process:
        until("the process to end", lambda: not process_runs(process.pid))
    assert not process_runs(process.pid)
    assert process_runs(os.getpid())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_repo_of_another_user() -> None:
    """Everything a command reads first is refused with the name of the file."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        repo = Repo(Path(directory) / "repo")
        repo.create()
        with repo.lock():
            pass
        child = os.fork()
        if child == 0:
            os._exit(_refused_as_nobody(repo))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4


def _refused_as_nobody(repo: Repo) -> int:
    """How many attempts the operating system refuses to another user."""
    os.setuid(65534)
    refused = 0
    for attempt in (repo.holder, repo.api, repo.mountpoint, lambda: repo.secret(create=True)):
        try:
            attempt()
        except PermissionRefused as exc:
            refused += exc.thing.startswith(str(repo.root))
        except Exception:
            return 99
    return refused
