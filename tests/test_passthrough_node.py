"""Reads past the daemon on a running node: what is told of them, and what ends them."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sectorfs.node.repo import Repo
from tests.cluster import SECTORFS, Node, cluster, until, write
from tests.cluster_fixtures import attach, configure, noise, status
from tests.file_systems import file_system, why_not
from tests.tools_fixtures import node_of

pytestmark = pytest.mark.mount

MIB = 1 << 20
LARGE, SMALL = noise("large", 3 * MIB + 5), noise("small", 5000)

HOLD = """
import hashlib, mmap, os, sys
files = [os.open(path, os.O_RDONLY) for path in sys.argv[2:]]
views = [mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) for fd in files]
print("open", flush=True)
sys.stdin.readline()
for fd, view in zip(files, views):
    data = os.pread(fd, 1 << 30, 0)
    print(hashlib.sha256(data).hexdigest(), hashlib.sha256(view).hexdigest(), flush=True)
try:
    os.open(sys.argv[1], os.O_RDONLY)
except OSError as exc:
    print(exc.errno, flush=True)
sys.stdin.readline()
"""


class Holder:
    """A process of its own with files of the mount open and mapped."""

    def __init__(self, other: Path, *paths: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(other), *map(str, paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "open"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextmanager
def holding(other: Path, *paths: Path) -> Iterator[Holder]:
    holder = Holder(other, *paths)
    try:
        yield holder
    finally:
        holder.process.kill()
        holder.process.communicate()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A mounted node that reads past itself, with a large and a small file on its disk."""
    node = node_of(tmp_path, "extension")
    configure(node)
    try:
        node.start(mount=True)
        reason = node.json("status")["mount"]["passthrough_reason"]
        if reason is not None:
            pytest.skip(reason)
        fill(tmp_path / "disk")
        attach(node, tmp_path / "disk")
        shown(node)
        yield node
    finally:
        node.end()


def fill(disk: Path) -> None:
    write(disk / "sealed/s-t01000-1", LARGE)
    write(disk / "sealed/s-t01000-2", SMALL)


def shown(node: Node) -> None:
    until("the files to be shown", lambda: large(node).exists() and small(node).exists())


def large(node: Node) -> Path:
    return node.mountpoint / "sealed/s-t01000-1"


def small(node: Node) -> Path:
    return node.mountpoint / "sealed/s-t01000-2"


def read_path(path: Path) -> str:
    return os.getxattr(path, "user.sectorfs.read_path").decode()


def test_status_and_attribute_tell_how_files_are_read(node: Node) -> None:
    assert (read_path(large(node)), read_path(small(node))) == ("passthrough", "daemon")
    with large(node).open("rb"), large(node).open("rb"), small(node).open("rb"):
        found = status(node)
        assert found.mount is not None
        assert (found.mount.passthrough, found.mount.passthrough_reason) == ("on", None)
        counts = found.files
        assert (counts.open, counts.passthrough, counts.daemon, counts.stream) == (3, 2, 1, 0)
        assert "3 (2 past the daemon, 1 through it)" in node.call("status")
        assert (read_path(large(node)), read_path(small(node))) == ("passthrough", "daemon")
    until("both to be idle", lambda: status(node).files.open == 0)
    assert status(node).files.kept == 2


def test_a_killed_daemon_ends_no_passthrough_reader(node: Node) -> None:
    expected = hashlib.sha256(LARGE).hexdigest()
    with holding(small(node), large(node)) as holder:
        assert status(node).files.passthrough == 1
        node.kill()
        holder.go_on()
        assert holder.line() == f"{expected} {expected}"
        assert holder.line() == str(errno.ENOTCONN)
        with pytest.raises(OSError, match="not connected"):
            os.listdir(node.mountpoint)


def test_readers_wait_with_their_disk_and_status_says_so(node: Node, tmp_path: Path) -> None:
    with large(node).open("rb", buffering=0) as reader:
        (tmp_path / "disk/sectorstore.json").rename(tmp_path / "aside")
        until("the path to be lost", lambda: status(node).problems)
        until(
            "the reader to be told of",
            lambda: any("1 files are open past the daemon" in one for one in status(node).problems),
        )
        assert reader.read(9) == LARGE[:9]
        (tmp_path / "aside").rename(tmp_path / "disk/sectorstore.json")
        until("the path to come back", lambda: not status(node).problems)
    assert large(node).read_bytes() == LARGE


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_detached_disk_can_be_unmounted_at_once(node: Node, tmp_path: Path, kind: str) -> None:
    if reason := why_not(kind):
        pytest.skip(reason)
    with file_system(tmp_path, kind) as root:
        write(root / "disk/sealed/s-t01000-3", LARGE)
        attach(node, root / "disk")
        seen = node.mountpoint / "sealed/s-t01000-3"
        until("it to be shown", seen.exists)
        assert seen.read_bytes() == LARGE
        assert status(node).files.kept == 1
        node.call("storage", "detach", str(root / "disk"))
        until("the disk to be free", lambda: unmounted(root), deadline=5)
        subprocess.run(["mount", "-o", "loop", f"{root}.img", str(root)], check=True)


def unmounted(root: Path) -> bool:
    return subprocess.run(["umount", str(root)], capture_output=True).returncode == 0


def test_a_removed_file_is_let_go_soon(node: Node, tmp_path: Path) -> None:
    assert large(node).read_bytes() == LARGE
    (tmp_path / "disk/sealed/s-t01000-1").unlink()
    folder = f"/proc/{node.pid()}/fd"

    def is_open() -> bool:
        for name in os.listdir(folder):
            try:
                if "s-t01000-1" in os.readlink(f"{folder}/{name}"):
                    return True
            except FileNotFoundError:
                continue
        return False

    until("it to be closed", lambda: not is_open(), deadline=10)


# --- what the configuration says ---


def test_passthrough_can_be_off_for_one_storage(tmp_path: Path) -> None:
    with cluster(tmp_path, "node") as (node,):
        disks = [tmp_path / name for name in ("one", "two")]
        configure(node)
        for number, disk in enumerate(disks):
            node.call("storage", "attach", str(disk), "--init", "--store")
            write(disk / f"sealed/s-t01000-{number}", LARGE)
        by_path = {one["path"]: one["storage"] for one in node.json("storage", "list")}
        off = by_path[str(disks[1])]
        configure(node, mount={"passthrough_storages": {off: "off"}})
        node.start(mount=True)
        seen = [node.mountpoint / f"sealed/s-t01000-{number}" for number in range(2)]
        until("both to be shown", lambda: all(path.exists() for path in seen))
        on = "passthrough" if node.json("status")["mount"]["passthrough"] == "on" else "daemon"
        assert [read_path(path) for path in seen] == [on, "daemon"]
        assert [path.read_bytes() for path in seen] == [LARGE, LARGE]


def test_off_is_told(tmp_path: Path) -> None:
    with cluster(tmp_path, "node") as (node,):
        configure(node, mount={"passthrough": "off"})
        node.start(mount=True)
        mount = node.json("status")["mount"]
        assert mount["passthrough"] == "off"
        assert mount["passthrough_reason"] == "mount.passthrough is off"
        assert "through the daemon: mount.passthrough is off" in node.call("status")


def test_what_is_required_and_not_offered_fails_the_start(tmp_path: Path) -> None:
    mountpoint = tmp_path / "sectors"
    mountpoint.mkdir()
    repo = Repo(tmp_path / "node")
    repo.create()
    repo.config_toml.write_text('[mount]\npassthrough = "require"\n')
    result = subprocess.run(
        [*SECTORFS, "--repo", str(repo.root), "mount", str(mountpoint), "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SECTORFS_NO_EXTENSION": "1"},
    )
    assert result.returncode == 32, result.stderr
    assert "passthrough is required: the extension was not loaded" in result.stderr
    assert not os.path.ismount(mountpoint)


def test_what_is_required_and_offered_starts(node: Node) -> None:
    assert node.stop() == 0
    configure(node, mount={"passthrough": "require"})
    node.start(mount=True)
    shown(node)
    assert large(node).read_bytes() == LARGE


def test_the_node_takes_all_descriptors_it_may_have(tmp_path: Path) -> None:
    with cluster(tmp_path, "node") as (node,):
        node.start()
        limits = Path(f"/proc/{node.pid()}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
        soft, hard = line.split()[3:5]
        assert soft == hard
